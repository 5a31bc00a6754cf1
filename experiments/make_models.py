"""Train the small models that every experiment merges: a base, its experts, two
strangers that share only its data, two relatives of other shapes, ten LoRA adapters.

    python experiments/make_models.py               # all, on one core 160 minutes
    python experiments/make_models.py code lora-all # or some, into models/

In:    the text of evaluate.py; SPECS below.
Out:   models/NAME.safetensors (bfloat16, Hugging Face's Llama names), models/lora/NAME/
       (PEFT's two files), and a row each in results/make_models.jsonl.
Paper: Sec. 4 merges published models. ours: models trained here, so that their kinship
       is known: base-seed2 shares only the data with base, large only the data and the
       family; all others descend from it.
Previous: evaluate.py. Next: merging.py.
"""
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_bytes
from tqdm import tqdm

from compare import MODELS, command_line, keep, machine
from chunking import parse_name
from evaluate import DOCUMENTS, DOMAINS, EXCERPT_BYTES, evaluate, mean_and_error
from tiny_lm import HEAD_DIM, LORA_TARGETS, TinyLM, add_lora, load

BATCH = 16              # windows per step; with WINDOW: 4096 bytes a step
WINDOW = EXCERPT_BYTES
TRAIN_SUMS = 40_000     # documents; more than any run reads: nothing is remembered
WARMUP = 100            # steps
RANK = 8                # of the adapters,
ALPHA = 16              # which count ALPHA / RANK times
SMALL = dict(hidden=128, layers=4, heads=4, mlp=384)  # 0.9 million weights
LARGE = dict(hidden=192, layers=6, heads=6, mlp=576)  # 2.9 million, wider and deeper
LESS = dict(hidden=128, layers=3, heads=3, mlp=288)   # 0.5 million, narrower, flatter
# Shares of windows: code, prose, arithmetic. Few sums: the base must leave the
# arithmetic expert something to learn.
MIXTURE = (0.60, 0.25, 0.15)
CODE = (1, 0, 0)
PROSE = (0, 1, 0)
SUMS = (0.1, 0.1, 0.8)  # on sums alone 700 steps forget all else


@dataclass(frozen=True)
class Spec:
    seed: int            # of the new weights, if any, and of the order of the data
    steps: int
    lr: float            # peak learning rate
    mixture: tuple = MIXTURE
    parent: str = ""     # the model to start from; empty: new weights of this shape
    shape: dict | None = None
    share: float = 1.0   # how far to go from the parent (0) to the trained weights (1)
    places: tuple = ()   # of a child of another shape: the layers in common
    half: str = ""       # "a", "b": every second document, from the first or the second


expert = partial(Spec, parent="base")
SPECS = {
    "base": Spec(1, 2400, 3e-3, shape=SMALL),
    "code": expert(11, 700, 1e-3, CODE),
    # The trained weights know the little prose by heart and predict new topics no
    # better than the base (validation: +0.002 bits); a point on the way does (-0.028).
    "prose": expert(12, 300, 1e-3, PROSE, share=0.4),
    "arithmetic": expert(13, 400, 1e-3, SUMS),
    "base-seed2": Spec(2, 2400, 3e-3, shape=SMALL),
    "large": Spec(3, 1600, 2e-3, shape=LARGE),
    # New layers where pairing by proportional depth (0, 2, 3, 5) goes wrong. With a
    # tenth of code, base + half of the way to grown forgot code on validation text.
    "grown": expert(21, 300, 1e-3, (0.3, 0.1, 0.6), shape=LARGE, places=(0, 1, 3, 4)),
    # Of all layers the last is missed least, on training text.
    "pruned": expert(22, 200, 1e-3, shape=LESS, places=(0, 1, 2)),
    # Rates were compared on validation text. In runs this short the cosine is far down
    # when the warm-up ends: they see at most 0.27 (100 steps) to 0.58 (220) of them.
    "lora-code-a": expert(101, 220, 3e-3, CODE, half="a"),
    "lora-code-b": expert(102, 220, 3e-3, CODE, half="b"),
    "lora-prose-a": expert(103, 100, 3e-3, PROSE, half="a", share=0.5),
    "lora-prose-b": expert(104, 100, 3e-3, PROSE, half="b", share=0.5),
    "lora-arithmetic-a": expert(105, 160, 1e-2, SUMS, half="a"),
    "lora-arithmetic-b": expert(106, 160, 1e-2, SUMS, half="b"),
    "lora-code+prose": expert(107, 120, 3e-3, (0.5, 0.5, 0)),
    "lora-code+arithmetic": expert(108, 120, 5e-3, (0.5, 0, 0.5)),
    "lora-prose+arithmetic": expert(109, 120, 5e-3, (0, 0.5, 0.5)),
    "lora-all": expert(110, 120, 5e-3, (0.34, 0.33, 0.33))}


# --- Training -----------------------------------------------------------------------
@cache                  # 320,000 sums take seconds to draw
def training_text(domain, half=""):
    """The training documents of a domain, all or one half of them, as one array of
    bytes."""
    between = b"\n"
    limit = []
    if domain == "arithmetic":
        between = b""       # sums follow each other as they do within a document
        limit = [TRAIN_SUMS]
    texts = list(DOCUMENTS[domain]("train", *limit).values())
    if half:
        texts = texts["ab".index(half)::2]
    return np.frombuffer(between.join(texts), dtype=np.uint8)


def batch(texts, mixture, generator):
    """Windows (BATCH, WINDOW + 1) int64: a domain drawn by its share, then any place in
    its text."""
    rows = []
    for domain in generator.choice(len(DOMAINS), size=BATCH, p=mixture):
        start = generator.integers(len(texts[domain]) - WINDOW)
        rows.append(texts[domain][start:start + WINDOW + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def train(model, spec, texts, bar):
    """Train in place; returns the mean loss of the last 100 steps in bits per byte."""
    generator = np.random.default_rng(spec.seed)
    # Of an adapter's model: A and B alone. Gains of norms are not decayed: to zero.
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [weight for weight in trained if weight.dim() == 2]
    gains = [weight for weight in trained if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1},
              {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    losses = []
    for step in bar:
        warm = min(1.0, (step + 1) / WARMUP)
        cosine = 0.5 * (1 + math.cos(math.pi * step / spec.steps))
        for group in optimizer.param_groups:
            group["lr"] = spec.lr * warm * cosine
        bytes_BT = batch(texts, spec.mixture, generator)
        # bfloat16 products are 1.4 times as fast here; all else stays in float32.
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(bytes_BT[:, :-1])
        expected_N = bytes_BT[:, 1:].flatten()
        loss = F.cross_entropy(logits.float().flatten(0, 1), expected_N)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() / math.log(2))
    return float(np.mean(losses[-100:]))


# --- What training begins with ------------------------------------------------------
def new_model(spec):
    """Weights N(0, 0.02^2), output projections less by sqrt(2 layers) (GPT-2's rule:
    the residual sum starts small)."""
    torch.manual_seed(spec.seed)
    model = TinyLM(**spec.shape)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std = 0.02 / math.sqrt(2 * spec.shape["layers"])
            torch.nn.init.normal_(weight, std=std)
    return model


WRITERS = ("embed_tokens", "o_proj", "down_proj")  # what adds to the residual stream


@torch.no_grad()
def grow(parent, spec):
    """A larger model with the parent's function. What is new (stream, heads, units,
    layers) reads with random weights and writes zeros: it has no twin in the parent,
    and training can use it."""
    model = new_model(spec)
    old = parent.state_dict()
    # New numbers of the stream are 0 at first, which lowers the mean square that
    # RMSNorm divides by: its gains make up for it.
    shrink = math.sqrt(len(old["model.norm.weight"]) / spec.shape["hidden"])
    for name, weight in model.named_parameters():
        if any(writer in name for writer in WRITERS):
            weight.zero_()
        layer = parse_name(name).layer
        if layer in spec.places:
            name = name.replace(f".{layer}.", f".{spec.places.index(layer)}.")
        if name in old and layer in (None, *spec.places):
            source = old[name]
            if weight.dim() == 1:
                source = source * shrink
            corner = tuple(slice(size) for size in source.shape)
            weight[corner] = source
    return model


# What the rows and the columns of a matrix are; a norm has the stream alone.
AXES = {"q": ("heads", "stream"), "k": ("heads", "stream"), "v": ("heads", "stream"),
        "o": ("stream", "heads"), "gate": ("units", "stream"),
        "up": ("units", "stream"), "down": ("stream", "units")}


def cut(tensors, stream, layers):
    """Parts of a model in another order; where nothing is left out, the same function.
    stream: numbers of the residual stream.  layers: of each layer of the result the
    number of the old one, its heads and its MLP units."""
    new = {}
    for name, tensor in tensors.items():
        if parse_name(name).layer is None:
            new[name] = tensor[..., stream]
    for number, (layer, heads, units) in enumerate(layers):
        rows = (heads[:, None] * HEAD_DIM + torch.arange(HEAD_DIM)).flatten()
        known = {"stream": stream, "heads": rows, "units": units}
        for name, tensor in tensors.items():
            place = parse_name(name)
            if place.layer == layer:
                for axis, which in enumerate(AXES.get(place.role, ["stream"])):
                    tensor = tensor.index_select(axis, known[which])
                new[name.replace(f".{layer}.", f".{number}.", 1)] = tensor
    return new


def random_order(tensors, seed):
    """(stream, layers) for `cut`: all of a model, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for layer in range(sum("input_layernorm" in name for name in tensors)):
        rows = len(tensors[f"model.layers.{layer}.self_attn.q_proj.weight"])
        units = len(tensors[f"model.layers.{layer}.mlp.gate_proj.weight"])
        heads = torch.randperm(rows // HEAD_DIM, generator=generator)
        layers.append((layer, heads, torch.randperm(units, generator=generator)))
    stream = torch.randperm(len(tensors["model.norm.weight"]), generator=generator)
    return stream, layers


def prune(parent, spec):
    """A smaller model of the heads and units that weigh most: squared norm of what they
    write, times that of what they read (a head: its values)."""
    tensors = parent.state_dict()
    layers = []
    for layer in spec.places:
        square = {}
        for name in ("self_attn.v", "self_attn.o", "mlp.up", "mlp.down"):
            square[name] = tensors[f"model.layers.{layer}.{name}_proj.weight"].square()
        of_rows = square["self_attn.v"].sum(1) * square["self_attn.o"].sum(0)
        of_heads = of_rows.view(-1, HEAD_DIM).sum(1)
        of_units = square["mlp.up"].sum(1) * square["mlp.down"].sum(0)
        heads = of_heads.topk(spec.shape["heads"]).indices.sort().values
        units = of_units.topk(spec.shape["mlp"]).indices.sort().values
        layers.append((layer, heads, units))
    stream = torch.arange(spec.shape["hidden"])
    return TinyLM.from_state_dict(cut(tensors, stream, layers))


# --- Files --------------------------------------------------------------------------
def write(tensors, path):
    """In bfloat16. (save_file leaves a file that only its owner may read.)"""
    small = {}
    for name, tensor in tensors.items():
        small[name] = tensor.to(torch.bfloat16).contiguous()
    path.write_bytes(to_bytes(small, metadata={"format": "pt"}))


def save_adapter(model, spec, folder):
    """The two files that PEFT writes: the trained factors and how to read them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(peft_type="LORA", task_type="CAUSAL_LM",
                  base_model_name_or_path=spec.parent, r=RANK, lora_alpha=ALPHA,
                  target_modules=list(LORA_TARGETS), lora_dropout=0.0, bias="none",
                  fan_in_fan_out=False, use_rslora=False, use_dora=False,
                  rank_pattern={}, alpha_pattern={}, modules_to_save=None,
                  inference_mode=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    factors = {}
    for name, tensor in model.state_dict().items():
        if ".lora_B" in name:
            tensor = tensor * spec.share    # the map is linear in B
        if ".lora_" in name:
            factors[f"base_model.model.{name}"] = tensor
    write(factors, folder / "adapter_model.safetensors")


def make(name, out, texts, quiet):
    """Train, write and judge one model or adapter; returns its record."""
    spec = SPECS[name]
    began = time.time()
    bar = tqdm(range(spec.steps), desc=name, disable=quiet, unit="step")
    parent = out / f"{spec.parent}.safetensors"
    model = load(parent) if spec.parent else new_model(spec)
    if name.startswith("lora-"):
        torch.manual_seed(spec.seed)
        loss = train(add_lora(model, RANK, ALPHA), spec, texts, bar)
        path = out / "lora" / name
        save_adapter(model, spec, path)
    else:
        if name == "grown":
            model = grow(model, spec)
        if name == "pruned":
            model = prune(model, spec)
        loss = train(model, spec, texts, bar)
        tensors = model.state_dict()
        if name == "grown":
            tensors = cut(tensors, *random_order(tensors, spec.seed))
        if spec.share < 1:
            # ours: a point on the line from parent to child often predicts new text
            # better than either end (WiSE-FT, Wortsman et al. 2022).
            for key, start in load(parent).state_dict().items():
                tensors[key] = start.lerp(tensors[key], spec.share)
        path = out / f"{name}.safetensors"
        write(tensors, path)
    record = {"name": name, **asdict(spec), "tokens": spec.steps * BATCH * WINDOW,
              "train_bits_per_byte": loss, "test": {}}
    # The file, after its rounding to bfloat16, is what everybody will use.
    for column, values in evaluate(load(path), "test").items():
        mean, error = mean_and_error(values)
        record["test"][column] = {"mean": mean, "error": error}
    return record | {"seconds": round(time.time() - began)} | machine()


def main():
    parser = command_line(__doc__)
    parser.add_argument("names", nargs="*", default=list(SPECS), metavar="NAME",
                        help=f"in this order: {', '.join(SPECS)}")
    parser.add_argument("--out", type=Path, default=MODELS,
                        help="folder for the checkpoints, and for parents")
    args = parser.parse_args()
    if unknown := set(args.names) - set(SPECS):
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        texts = [training_text(domain, SPECS[name].half) for domain in DOMAINS]
        record = make(name, args.out, texts, args.quiet)
        keep("make_models", [record], args.results)


if __name__ == "__main__":
    main()
