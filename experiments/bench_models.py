"""What bench.py merges: synthetic checkpoints of any size, and networks that nobody
trained.

In:    a path or a folder, a shape, a seed.
Out:   bfloat16 checkpoints with Hugging Face's names, written piece by piece, so that 3
       GB need not fit into memory; VAE files. Equal arguments give equal bytes.
Paper: none of it. Speed and memory do not depend on what the weights are worth, only on
       how many there are and which shapes they have. Next: bench.py.
"""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import chunking
from vae import VAE, generator_for

MODELS = Path(__file__).resolve().parent / "models"

SPREAD = 0.02               # standard deviation of the weights, as of a new Llama
NOISE = 0.005               # of what the second model of a pair has on top of the first
# Qwen2-0.5B as its config.json has it: 494 M weights, of which 136 M are the
# embedding's.
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
         "hidden_size": 896,
         "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
         "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
         "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
         "rope_theta": 1e6, "torch_dtype": "bfloat16"}


def llama_shapes(layers, hidden, mlp, vocab, big=0):
    """{name: shape} of a Llama; `big`: rows of one more matrix, in layer 0."""
    shapes = {"model.embed_tokens.weight": (vocab, hidden),
              "model.norm.weight": (hidden,)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        for role in "qkvo":
            shapes[layer + f"self_attn.{role}_proj.weight"] = (hidden, hidden)
        for role in ("gate", "up"):
            shapes[layer + f"mlp.{role}_proj.weight"] = (mlp, hidden)
        shapes[layer + "mlp.down_proj.weight"] = (hidden, mlp)
    if big:
        shapes["model.layers.0.mlp.big_proj.weight"] = (big, hidden)
    return shapes


def qwen2_shapes(config):
    """{name: shape} of a Qwen2: biases at q, k, v, grouped queries, no head of its
    own."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = llama_shapes(config["num_hidden_layers"], hidden, mlp,
                          config["vocab_size"])
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for role, rows in (("q", hidden), ("k", kv), ("v", kv)):
            shapes[layer + f"self_attn.{role}_proj.weight"] = (rows, hidden)
            shapes[layer + f"self_attn.{role}_proj.bias"] = (rows,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[layer + f"{norm}.weight"] = (hidden,)
    return shapes


def write_model(path, shapes, seed, noise_seed=None):
    """A file of N(0, SPREAD^2) weights, with `noise_seed` plus N(0, NOISE^2); returns
    entries."""
    entries = [chunking.Entry(name, torch.bfloat16, shape,
                              place=chunking.parse_name(name))
               for name, shape in shapes.items()]
    with chunking.create(path, entries) as output:
        for number, entry in enumerate(entries):
            draws = torch.Generator().manual_seed(1000 * seed + number)
            noise = torch.Generator().manual_seed(1000 * (noise_seed or 0) + number)
            for start, stop in chunking.spans(entry.numel):
                piece = SPREAD * torch.randn(stop - start, generator=draws)
                if noise_seed is not None:
                    piece += NOISE * torch.randn(stop - start, generator=noise)
                output.put(entry.name, start, piece.bfloat16())
    return entries


def llama_pair(folder, **sizes):
    """a.safetensors and b.safetensors of equal shapes in a folder. Returns the encoded
    entries."""
    for seed, name in enumerate("ab"):
        entries = write_model(folder / f"{name}.safetensors", llama_shapes(**sizes),
                              seed)
    return [entry for entry in entries if chunking.is_selected(entry)]


def qwen2_pair(folder, **changes):
    """Folders a and b in the Hugging Face layout, the second the first with noise on
    it: weights, config.json and the smallest tokenizer, which other tools copy along.
    changes: of QWEN2.

    Returns the two paths.
    """
    config = QWEN2 | changes
    tokenizer = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0},
                                             "merges": []}}
    files = {"config.json": config, "tokenizer.json": tokenizer,
             "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}
    for name, noise_seed in (("a", None), ("b", 1)):
        (folder / name).mkdir(parents=True)
        write_model(folder / name / "model.safetensors", qwen2_shapes(config), 0,
                    noise_seed)
        for file, content in files.items():
            (folder / name / file).write_text(json.dumps(content, indent=2))
    return folder / "a", folder / "b"


def full_network(config):
    """A VAE in which every block computes, as after a training; its branches are small,
    so that it still carries weights."""
    vae = VAE(config).start(generator_for(0))
    for block in [*vae.encoder, *vae.decoder]:
        for last in (block.out, block.down):
            torch.nn.init.normal_(last.weight, std=1e-3, generator=generator_for(1))
    return vae
