"""A byte-level Llama-type language model, small enough to train on one CPU core, and
LoRA adapters for it.

In:    the sizes of a new model; or a state dict with Hugging Face's Llama names; or an
       adapter's folder in PEFT's layout.
Out:   logits over the next byte. All sizes are read back from the tensors.
Paper: Sec. 4 merges models of 1 to 13 billion weights. differs: the same block
       (RMSNorm, RoPE, SwiGLU, no biases, tied head) at about a million weights.
Next:  evaluate.py.
"""
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import compare              # noqa: F401  (finds the two below)
import lora
from chunking import StateDict, need

VOCAB = 256         # one token per byte: no tokeniser to disagree about
HEAD_DIM = 32       # a state dict does not say how its rows split into heads
ROPE_BASE = 10_000  # period of the slowest rotary pair, in bytes; Llama's value
NORM_EPS = 1e-5     # Llama's value
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                "down_proj")


def rotate(x):
    """RoPE of (B, heads, T, HEAD_DIM): at position t dimension i turns, together with
    i + HEAD_DIM / 2, by the angle t / ROPE_BASE^(2i / HEAD_DIM)."""
    frequency = ROPE_BASE ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = torch.outer(torch.arange(x.shape[2]), frequency).repeat(1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()


class Attention(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.q_proj = nn.Linear(hidden, heads * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(hidden, heads * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(hidden, heads * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(heads * HEAD_DIM, hidden, bias=False)

    def forward(self, x):
        B, T, _ = x.shape
        heads = (B, T, -1, HEAD_DIM)
        q = self.q_proj(x).view(heads).transpose(1, 2)      # (B, heads, T, HEAD_DIM)
        k = self.k_proj(x).view(heads).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        q = rotate(q).to(v.dtype)
        k = rotate(k).to(v.dtype)
        # Causal: padding at the end cannot reach the bytes before it.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, hidden, mlp):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, mlp, bias=False)
        self.up_proj = nn.Linear(hidden, mlp, bias=False)
        self.down_proj = nn.Linear(mlp, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, hidden, heads, mlp):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden, eps=NORM_EPS)
        self.self_attn = Attention(hidden, heads)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=NORM_EPS)
        self.mlp = MLP(hidden, mlp)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyLM(nn.Module):
    """Bytes (B, T) int64 -> logits (B, T, 256) for the byte that follows each."""

    def __init__(self, hidden, layers, heads, mlp):
        super().__init__()
        self.model = nn.Module()            # gives the tensors their "model." prefix
        self.model.embed_tokens = nn.Embedding(VOCAB, hidden)
        self.model.layers = nn.ModuleList()
        for _ in range(layers):
            self.model.layers.append(Block(hidden, heads, mlp))
        self.model.norm = nn.RMSNorm(hidden, eps=NORM_EPS)

    def forward(self, bytes_BT):
        x = self.model.embed_tokens(bytes_BT)
        for block in self.model.layers:
            x = block(x)
        # Tied head: the embedding's rows are also the output directions.
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    @classmethod
    def from_state_dict(cls, tensors):
        """A model in float32 from its tensors alone. KeyError or RuntimeError if one is
        missing, left over or does not fit the others."""
        hidden = tensors["model.embed_tokens.weight"].shape[1]
        layers = sum("input_layernorm" in name for name in tensors)
        rows = len(tensors["model.layers.0.self_attn.q_proj.weight"])
        mlp = len(tensors["model.layers.0.mlp.gate_proj.weight"])
        lm = cls(hidden, layers, rows // HEAD_DIM, mlp)
        lm.load_state_dict({name: w.float() for name, w in tensors.items()})
        return lm.eval()


class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) B (A x): W stays as it is, A (rank, in) and B (out,
    rank) learn (Hu et al. 2021)."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.base_layer = linear
        self.scale = alpha / rank
        # PEFT's start: A as torch draws it, B zero, so that nothing changes yet.
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base_layer(x) + self.scale * self.lora_B(self.lora_A(x))


def add_lora(lm, rank, alpha):
    """Freeze a model, and give each map of LORA_TARGETS an adapter; in place."""
    lm.requires_grad_(False)
    for module in list(lm.modules()):
        for name in LORA_TARGETS:           # in this order A takes random numbers
            if name in dict(module.named_children()):
                setattr(module, name, LoRALinear(getattr(module, name), rank, alpha))
    return lm


def load(path):
    """A model in float32 from a safetensors file, or from MODELS/lora/NAME, an
    adapter's folder, which stands for its base in MODELS with the adapter folded in."""
    path = Path(path)
    if not path.is_dir():
        return TinyLM.from_state_dict(load_file(path))
    need((path / "adapter_config.json").exists(), path, "is no model of this folder's",
         "judge models of your own by a test of your own")
    config = json.loads((path / "adapter_config.json").read_text())
    base = load(path.parents[1] / f"{config['base_model_name_or_path']}.safetensors")
    folded = lora.folded_tensors(StateDict(base.state_dict()), path)
    return TinyLM.from_state_dict(folded)
