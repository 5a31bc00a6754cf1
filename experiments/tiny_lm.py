"""A byte-level Llama-type language model, small enough to train on one CPU core, and
LoRA adapters for it.

In:    a state dict with Hugging Face Llama names, or the sizes of a new model; or an
       adapter's folder in PEFT's layout.
Out:   logits over the next byte. Every size is read back from the tensors, so that any
       merged file can be evaluated without a configuration file.
Paper: Sec. 4 merges Gemma and LLaMA models of 1 to 13 billion weights. differs: the
       same block (RMSNorm, RoPE, SwiGLU, grouped-query attention, no biases, tied head)
       at about a million weights.
Left out on purpose: dropout, a key-value cache, sampling, a tokeniser.
Next:  evaluate.py.
"""
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from compare import MODELS              # finds the two below
import lora
from chunking import StateDict

VOCAB = 256         # one token per byte: no tokeniser to disagree about
HEAD_DIM = 32       # a state dict does not say how its rows split into heads
ROPE_BASE = 10_000  # period of the slowest rotary pair, in bytes; Llama's value
NORM_EPS = 1e-5     # Llama's value
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                "down_proj")


def rotary_angles(length):
    """cos and sin, each (length, HEAD_DIM): the angle of dimension i at position t is
    t / ROPE_BASE^(2i / HEAD_DIM)."""
    steps = torch.arange(0, HEAD_DIM, 2, dtype=torch.float32)
    frequency = ROPE_BASE ** (-steps / HEAD_DIM)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    # Hugging Face's layout: dimension i turns with i + HEAD_DIM/2 (Meta's own files
    # turn neighbours, 2i with 2i + 1).
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + HEAD_DIM/2]) by its angle; x is (B, heads, T,
    HEAD_DIM)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, hidden, heads, kv_heads):
        super().__init__()
        self.q_proj = nn.Linear(hidden, heads * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(heads * HEAD_DIM, hidden, bias=False)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        heads = (B, T, -1, HEAD_DIM)
        q = self.q_proj(x).view(heads).transpose(1, 2)      # (B, heads, T, HEAD_DIM)
        k = self.k_proj(x).view(heads).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        q = rotate(q, cos, sin).to(v.dtype)
        k = rotate(k, cos, sin).to(v.dtype)
        # Causal, so padding at the end of a document can never reach the bytes before
        # it: no padding mask is needed.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                           enable_gqa=k.shape[1] != q.shape[1])
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
    def __init__(self, hidden, heads, kv_heads, mlp):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden, eps=NORM_EPS)
        self.self_attn = Attention(hidden, heads, kv_heads)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=NORM_EPS)
        self.mlp = MLP(hidden, mlp)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyLM(nn.Module):
    """Bytes (B, T) int64 -> logits (B, T, 256) for the byte that follows each."""

    def __init__(self, hidden, layers, heads, mlp, kv_heads=None):
        super().__init__()
        self.model = nn.Module()  # only there to give the tensors their "model." prefix
        self.model.embed_tokens = nn.Embedding(VOCAB, hidden)
        self.model.layers = nn.ModuleList()
        for _ in range(layers):
            self.model.layers.append(Block(hidden, heads, kv_heads or heads, mlp))
        self.model.norm = nn.RMSNorm(hidden, eps=NORM_EPS)

    def forward(self, bytes_BT):
        cos, sin = rotary_angles(bytes_BT.shape[1])
        x = self.model.embed_tokens(bytes_BT)
        for block in self.model.layers:
            x = block(x, cos, sin)
        # Tied head: the embedding's rows are also the output directions, so that a file
        # has no lm_head.weight.
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    @classmethod
    def from_state_dict(cls, tensors):
        """Rebuild a model in float32 from its tensors alone.

        Raises ValueError, with the names, if a tensor is missing, left over or does not
        fit the others.
        """
        rows = {}
        try:
            for role in ("self_attn.q", "self_attn.k", "mlp.gate"):
                rows[role] = len(tensors[f"model.layers.0.{role}_proj.weight"])
            hidden = tensors["model.embed_tokens.weight"].shape[1]
        except KeyError as missing:
            raise ValueError(f"not a Llama-type state dict: {missing} is missing")
        numbers = re.findall(r"model\.layers\.(\d+)\.", " ".join(tensors))
        lm = cls(hidden, max(map(int, numbers)) + 1, mlp=rows["mlp.gate"],
                 heads=rows["self_attn.q"] // HEAD_DIM,
                 kv_heads=rows["self_attn.k"] // HEAD_DIM)
        try:
            lm.load_state_dict({name: w.float() for name, w in tensors.items()})
        except RuntimeError as error:   # torch lists every name that does not fit
            raise ValueError(f"tensors do not fit together: {error}")
        return lm.eval()


class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) B (A x): W stays as it is, A (rank, in) and B (out,
    rank) learn (Hu et al. 2021)."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.base_layer = linear
        self.scale = alpha / rank
        # torch's own start is PEFT's: kaiming uniform
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        # B, not A: with A zero as well no gradient would reach either
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base_layer(x) + self.scale * self.lora_B(self.lora_A(x))


def add_lora(lm, rank, alpha):
    """Freeze a model and give each map of LORA_TARGETS an adapter that does nothing
    yet; in place."""
    lm.requires_grad_(False)
    for module in list(lm.modules()):
        # in this order, since each A takes the next random numbers
        for name in LORA_TARGETS:
            if name in dict(module.named_children()):
                setattr(module, name, LoRALinear(getattr(module, name), rank, alpha))
    return lm


def load(path):
    """A model in float32, whatever is stored, from a safetensors file or from an
    adapter's folder, which stands for its base with the adapter folded in."""
    path = Path(path)
    if not path.is_dir():
        return TinyLM.from_state_dict(load_file(path))
    config = json.loads((path / "adapter_config.json").read_text())
    base = load_file(MODELS / f"{config['base_model_name_or_path']}.safetensors")
    base = {name: tensor.float() for name, tensor in base.items()}
    return TinyLM.from_state_dict(lora.folded_tensors(StateDict(base), path))
