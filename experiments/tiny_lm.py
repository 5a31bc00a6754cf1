"""A byte-level Llama-type language model, small enough to train on one CPU core, and LoRA adapters for it.

In:    a state dict with Hugging Face Llama names, or the sizes of a new model; or an adapter's folder in PEFT's layout.
Out:   logits over the next byte; every size is read back from the tensors, so that any merged
       file can be evaluated without a configuration file.
Paper: Sec. 4 merges Gemma and LLaMA models of 1 to 13 billion weights. differs: the same block (RMSNorm, RoPE,
       SwiGLU, grouped-query attention, no biases, tied head) at about a million weights.
Left out on purpose: dropout, a key-value cache, sampling, a tokeniser; LoRA's variants (REFUSED). Next: make_models.py.
"""
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

VOCAB = 256         # one token per byte: no tokeniser that two models could disagree about
HEAD_DIM = 32       # a constant, because a state dict does not say how its rows split into heads
ROPE_BASE = 10_000  # period of the slowest rotary pair, in bytes; Llama's value
NORM_EPS = 1e-5     # Llama's value
MODELS = Path(__file__).parent / "models"  # where the base that an adapter names is looked for
ADAPTER = "adapter_model.safetensors"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Variants in which an adapter means something else than W + (alpha / r) B A: better refused than read wrongly.
REFUSED = ("fan_in_fan_out", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")


def rotary_angles(length):
    """cos and sin, each (length, HEAD_DIM): the angle of dimension i at position t is t / ROPE_BASE^(2i / HEAD_DIM)."""
    frequency = ROPE_BASE ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    # Hugging Face's layout: dimension i turns with i + HEAD_DIM/2 (Meta's own files turn neighbours, 2i with 2i + 1).
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + HEAD_DIM/2]) by its angle; x is (B, heads, T, HEAD_DIM)."""
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
        split = lambda y: y.view(B, T, -1, HEAD_DIM).transpose(1, 2)  # (B, T, heads * 32) -> (B, heads, T, 32)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        # Causal, so padding at the end of a document can never reach the bytes before it: no padding mask is needed.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
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
        self.model.layers = nn.ModuleList(Block(hidden, heads, kv_heads or heads, mlp) for _ in range(layers))
        self.model.norm = nn.RMSNorm(hidden, eps=NORM_EPS)

    def forward(self, bytes_BT):
        cos, sin = rotary_angles(bytes_BT.shape[1])
        x = self.model.embed_tokens(bytes_BT)
        for block in self.model.layers:
            x = block(x, cos, sin)
        # Tied head: the embedding's rows are also the output directions, so a file has no lm_head.weight.
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    @classmethod
    def from_state_dict(cls, tensors):
        """Rebuild a model in float32 from its tensors alone.

        Raises ValueError, with the names, if a tensor is missing, left over or does not fit the others.
        """
        layers = [int(m[1]) for name in tensors if (m := re.match(r"model\.layers\.(\d+)\.", name))]
        first = "model.layers.0."
        try:
            rows = {role: tensors[f"{first}{role}_proj.weight"].shape[0]
                    for role in ("self_attn.q", "self_attn.k", "mlp.gate")}
            hidden = tensors["model.embed_tokens.weight"].shape[1]
        except KeyError as missing:
            raise ValueError(f"not a Llama-type state dict: tensor {missing} is missing") from None
        lm = cls(hidden, max(layers) + 1, heads=rows["self_attn.q"] // HEAD_DIM, mlp=rows["mlp.gate"],
                 kv_heads=rows["self_attn.k"] // HEAD_DIM)
        try:
            lm.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        except RuntimeError as error:  # torch lists every name and shape that does not fit
            raise ValueError(f"tensors do not fit together: {error}") from None
        return lm.eval()


class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) B (A x): W stays as it is, A (rank, in) and B (out, rank) learn (Hu et al. 2021)."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.base_layer, self.scale = linear, alpha / rank
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)  # torch's own start is PEFT's: kaiming uniform
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)  # B, not A: with A zero as well no gradient would reach either

    def forward(self, x):
        return self.base_layer(x) + self.scale * self.lora_B(self.lora_A(x))


def add_lora(lm, rank, alpha):
    """Freeze a model and give each map of LORA_TARGETS an adapter that does nothing yet; in place."""
    lm.requires_grad_(False)
    for module in list(lm.modules()):
        for name in LORA_TARGETS:  # in this order, since each A takes the next random numbers
            if name in dict(module.named_children()):
                setattr(module, name, LoRALinear(getattr(module, name), rank, alpha))
    return lm


def fold(tensors, folder):
    """A base's tensors and an adapter's folder -> tensors in float32 with W + (alpha / r) B A in W's place.

    Raises ValueError if the adapter is of a refused kind, or a tensor is missing, left over or of another shape.
    """
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    if odd := [key for key in REFUSED if config.get(key)] + ["bias"] * (config.get("bias", "none") != "none"):
        raise ValueError(f"only plain LoRA can be folded; the adapter's configuration sets {', '.join(odd)}")
    adapter, rank = load_file(Path(folder, ADAPTER)), config["r"]
    folded = {name: tensor.float() for name, tensor in tensors.items()}
    for stem in sorted({name.rsplit(".lora_", 1)[0] for name in adapter}):
        name = stem.removeprefix("base_model.model.") + ".weight"  # PEFT's two wrappers around the model
        try:
            A, B = (adapter.pop(f"{stem}.lora_{factor}.weight").float() for factor in "AB")
            weight = folded[name]
        except KeyError as missing:
            raise ValueError(f"{stem}: tensor {missing} is missing from the adapter or its base") from None
        if (*B.shape, *A.shape) != (len(weight), rank, rank, weight.shape[1]):
            raise ValueError(f"{stem}: B {tuple(B.shape)} and A {tuple(A.shape)} are not the factors of rank {rank} "
                             f"of a weight {tuple(weight.shape)}")
        folded[name] = weight + config["lora_alpha"] / rank * (B @ A)
    if adapter:
        raise ValueError(f"tensors of the adapter that no map takes: {', '.join(adapter)}")
    return folded


def load(path):
    """Read a safetensors file, or an adapter's folder and its base, into a model in float32, whatever is stored."""
    path = Path(path)
    if path.is_dir() or path.name == ADAPTER:
        folder = path if path.is_dir() else path.parent
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        return TinyLM.from_state_dict(fold(load_file(MODELS / f"{base}.safetensors"), folder))
    return TinyLM.from_state_dict(load_file(path))
