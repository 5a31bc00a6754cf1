"""Train the small models that every experiment merges: a base, its experts, two strangers that
share only its data, two relatives of other shapes, ten LoRA adapters; and the reference VAE.

    python experiments/make_models.py all --threads 1       # the models: two hours
    python experiments/make_models.py loras --threads 1     # the adapters
    python experiments/make_models.py vae                   # the VAE, on six of the models: a minute

In:    text that every Python installation has (evaluate.py says which); the tables SPECS and LORAS below.
Out:   models/NAME.safetensors (bfloat16, Hugging Face Llama names), models/lora/NAME/ (bfloat16, PEFT's two files) and
       a line each in results/make_models.jsonl; models/vae.safetensors, whose header is its record.
Paper: Sec. 4 merges published models. ours: models trained here, so that their kinship is known: experts are fine-tuned
       from the base, base-seed2 shares only the data, large only the data and the family. grown and
       pruned descend from the base: each of their layers and units has a known partner, or none.
Left out on purpose: resuming, a data loader, distributed training: a model takes minutes. Previous: evaluate.py.
"""
import argparse
import functools
import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save as to_bytes
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import train as vae_training
from chunking import parse_name
from evaluate import DOCUMENTS, DOMAINS, EXCERPT_BYTES, evaluate, mean_and_error
from tiny_lm import ADAPTER, HEAD_DIM, LORA_TARGETS, TinyLM, add_lora, fold, load

BATCH = 16            # windows per step; with WINDOW: 4096 bytes a step
WINDOW = EXCERPT_BYTES
TRAIN_SUMS = 40_000   # documents of eight sums: more than any run reads, so that sums are learned, not remembered
WARMUP = 100          # steps
SMALL = dict(hidden=128, layers=4, heads=4, mlp=384)  # 0.9 million weights
LARGE = dict(hidden=192, layers=6, heads=6, mlp=576)  # 2.9 million weights, wider and deeper
LESS = dict(hidden=128, layers=3, heads=3, mlp=288)   # 0.5 million weights, narrower and flatter
# Few sums, and of three digits: the base must leave the arithmetic expert something to learn.
MIXTURE = (0.60, 0.25, 0.15)  # share of windows in the order of DOMAINS: code, prose, arithmetic


@dataclass(frozen=True)
class Spec:
    seed: int            # of the new weights (if there is no parent) and of the order of the data
    steps: int
    lr: float            # peak learning rate
    mixture: tuple = MIXTURE
    parent: str = ""     # name of the model to start from; empty: new weights of this shape
    shape: dict | None = None
    share: float = 1.0   # how far to go from the parent (0) to the trained weights (1)
    places: tuple = ()   # of a larger child: its layers that are the parent's; others are new


SPECS = {
    "base": Spec(seed=1, steps=2400, lr=3e-3, shape=SMALL),
    "code": Spec(seed=11, steps=700, lr=1e-3, mixture=(1, 0, 0), parent="base"),
    # Only 0.3 MB of prose is left to train on, and the base has read it eight times: the trained weights know it by
    # heart and predict new topics no better than the base (validation: +0.002 bits); a point on the way does (-0.028).
    "prose": Spec(seed=12, steps=300, lr=1e-3, mixture=(0, 1, 0), parent="base", share=0.4),
    # Some text of the other domains stays in: on sums alone 700 steps forget all else (6 bits per byte of code).
    "arithmetic": Spec(seed=13, steps=400, lr=1e-3, mixture=(0.1, 0.1, 0.8), parent="base"),
    "base-seed2": Spec(seed=2, steps=2400, lr=3e-3, shape=SMALL),
    "large": Spec(seed=3, steps=1600, lr=2e-3, shape=LARGE),
    # New layers where pairing by proportional depth (0, 2, 3, 5) goes wrong. More code than the
    # arithmetic expert read: with a tenth, base + half of the way to grown forgot code on
    # validation text (+0.008 bits per byte; so -0.006).
    "grown": Spec(seed=21, steps=300, lr=1e-3, mixture=(0.3, 0.1, 0.6), parent="base", shape=LARGE,
                  places=(0, 1, 3, 4)),
    "pruned": Spec(seed=22, steps=200, lr=1e-3, parent="base", shape=LESS),
}


# The reference VAE: the network of train.py. On models of other families it loses an NMSE of 1e-7, which is the price
# of Eq. 1 at beta 1e-4.
VAE_MODELS = ("base", "code", "prose", "arithmetic", "base-seed2", "large")
VAE_FLAGS = ("--steps1", "1500", "--steps2", "1000")


@dataclass(frozen=True)
class Lora(Spec):
    parent: str = "base"
    half: str = ""       # "a" or "b": only every second training document, from the first or the second; empty: all
    rank: int = 8
    alpha: int = 16      # the adapter counts alpha / rank times


# Rates were compared on validation text, with another seed: code at 3e-3 rather than 1e-2, sums at 1e-2 rather than
# 2e-2. In runs this short the cosine is far down when the warm-up ends: they see at most 0.27 (100 steps) to 0.58 (220)
# of the rate.
LORAS = {
    "lora-code-a": Lora(seed=101, steps=220, lr=3e-3, mixture=(1, 0, 0), half="a"),
    "lora-code-b": Lora(seed=102, steps=220, lr=3e-3, mixture=(1, 0, 0), half="b"),
    # Only 0.15 MB each: on validation half the way gained 0.007 bits, all of it 0.005 and forgot three times as much.
    "lora-prose-a": Lora(seed=103, steps=100, lr=3e-3, mixture=(0, 1, 0), half="a", share=0.5),
    "lora-prose-b": Lora(seed=104, steps=100, lr=3e-3, mixture=(0, 1, 0), half="b", share=0.5),
    # A fifth of other text stays in, as for the arithmetic expert above.
    "lora-arithmetic-a": Lora(seed=105, steps=160, lr=1e-2, mixture=(0.1, 0.1, 0.8), half="a"),
    "lora-arithmetic-b": Lora(seed=106, steps=160, lr=1e-2, mixture=(0.1, 0.1, 0.8), half="b"),
    "lora-code+prose": Lora(seed=107, steps=120, lr=3e-3, mixture=(0.5, 0.5, 0)),
    "lora-code+arithmetic": Lora(seed=108, steps=120, lr=5e-3, mixture=(0.5, 0, 0.5)),
    "lora-prose+arithmetic": Lora(seed=109, steps=120, lr=5e-3, mixture=(0, 0.5, 0.5)),
    "lora-all": Lora(seed=110, steps=120, lr=5e-3, mixture=(0.34, 0.33, 0.33)),
}


@functools.cache  # ten adapters read the same text, and 320,000 sums take seconds to draw
def training_documents(domain):
    more = {"documents": TRAIN_SUMS} if domain == "arithmetic" else {}
    return tuple(DOCUMENTS[domain]("train", **more).values())


def training_text(domain, half=""):
    """The training documents of a domain, all or one half of them, in one array of bytes."""
    texts = training_documents(domain)["ab".index(half)::2] if half else training_documents(domain)
    # Sums follow each other directly, as they do within a document; elsewhere a newline parts the documents.
    return np.frombuffer((b"" if domain == "arithmetic" else b"\n").join(texts), dtype=np.uint8)


def batch(texts, mixture, generator):
    """Windows (BATCH, WINDOW + 1) int64: a domain drawn by its share, then any place in its text."""
    rows = []
    for domain in generator.choice(len(DOMAINS), size=BATCH, p=mixture):
        start = generator.integers(len(texts[domain]) - WINDOW)
        rows.append(texts[domain][start:start + WINDOW + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def learning_rate(step, spec):
    """Linear warm-up, then a cosine to zero: a function of the step alone, so that a run can be repeated."""
    warm = min(1.0, (step + 1) / WARMUP)
    return spec.lr * warm * 0.5 * (1 + math.cos(math.pi * step / spec.steps))


def new_model(spec):
    """Weights N(0, 0.02^2), output projections less by sqrt(2 layers) (GPT-2's rule: the residual sum starts small)."""
    torch.manual_seed(spec.seed)
    model = TinyLM(**spec.shape)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            output = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * spec.shape["layers"]) if output else 1))
    return model


WRITERS = ("embed_tokens", "o_proj", "down_proj")  # what adds to the residual stream


@torch.no_grad()
def grow(parent, spec):
    """A larger model with the parent's function. What is new (stream, heads, units, layers) reads
    with random weights and writes zeros: it has no twin in the parent, and training can use it."""
    model, old = new_model(spec), parent.state_dict()
    hidden = len(old["model.norm.weight"])
    # New numbers of the stream are 0 at first, which lowers the mean square that RMSNorm divides
    # by: its gains make up for it.
    shrink = math.sqrt(hidden / spec.shape["hidden"])
    known = {name: name for name in old if ".layers." not in name}
    for i, j in enumerate(spec.places):
        known |= {name.replace(f".{i}.", f".{j}."): name for name in old if f".layers.{i}." in name}
    for name, weight in model.named_parameters():
        if any(writer in name for writer in WRITERS):
            weight.zero_()
        if name in known:
            source = old[known[name]]
            corner = tuple(slice(size) for size in source.shape)
            weight[corner] = source * (shrink if weight.dim() == 1 else 1)
    return model


def blocks(heads, size):
    """Rows of whole heads. Example: heads [1, 0] of size 2: [2, 3, 0, 1]"""
    return (heads[:, None] * size + torch.arange(size)).flatten()


# What the rows and the columns of a matrix are; a norm has the stream alone.
AXES = {"q": ("heads", "stream"), "k": ("groups", "stream"), "v": ("groups", "stream"), "o": ("stream", "heads"),
        "gate": ("units", "stream"), "up": ("units", "stream"), "down": ("stream", "units")}


@torch.no_grad()
def cut(tensors, stream, layers):
    """The named places of a Llama, in that order. layers: per layer of the result the old layer and
    {"heads", "groups", "units": rows}. Where nothing is left out, the same function."""
    new = {name: tensor[..., stream] for name, tensor in tensors.items() if ".layers." not in name}
    for number, (layer, rows) in enumerate(layers):
        known = {"stream": stream, **rows}
        for name, tensor in tensors.items():
            place = parse_name(name)
            if place.layer == layer:
                for axis, which in enumerate(AXES.get(place.role, ["stream"])):
                    tensor = tensor.index_select(axis, known[which])
                new[name.replace(f".{layer}.", f".{number}.", 1)] = tensor
    return new


def gather(tensors, stream, layers):
    """`cut` for the models here, whose every head has its own keys and values: per layer of the
    result (layer, heads, units) of the model given."""
    places = []
    for layer, heads, units in layers:
        rows = blocks(heads, HEAD_DIM)
        places.append((layer, {"heads": rows, "groups": rows, "units": units}))
    return cut(tensors, stream, places)


def scramble(tensors, seed):
    """The same function with stream, whole heads and units in a random order, and that order as
    `gather` takes it: (tensors, (stream, layers))."""
    generator, layers = torch.Generator().manual_seed(seed), []
    for layer in range(sum("input_layernorm" in name for name in tensors)):
        rows, units = (len(tensors[f"model.layers.{layer}.{name}_proj.weight"])
                       for name in ("self_attn.q", "mlp.gate"))
        heads = torch.randperm(rows // HEAD_DIM, generator=generator)
        layers.append((layer, heads, torch.randperm(units, generator=generator)))
    stream = torch.randperm(len(tensors["model.norm.weight"]), generator=generator)
    return gather(tensors, stream, layers), (stream, layers)


def strongest(tensors, layer, heads, units):
    """Which heads and units of a layer weigh most: squared norm of what they write, times that of
    what they read (a head: its values). In their order."""
    v, o, up, down = (tensors[f"model.layers.{layer}.{name}_proj.weight"].square()
                      for name in ("self_attn.v", "self_attn.o", "mlp.up", "mlp.down"))
    of_heads = (v.sum(1) * o.sum(0)).view(-1, HEAD_DIM).sum(1)
    of_units = up.sum(1) * down.sum(0)
    return [of.topk(n).indices.sort().values for of, n in ((of_heads, heads), (of_units, units))]


@torch.no_grad()
def prune(parent, spec, texts):
    """The strongest heads and units of every layer stay; then layers are dropped, always the one
    whose absence costs the least on training text. Returns (model, the order as in scramble)."""
    tensors, shape, stream = parent.state_dict(), spec.shape, torch.arange(spec.shape["hidden"])
    bytes_BT = batch(texts, spec.mixture, np.random.default_rng(spec.seed))
    layers = [(layer, *strongest(tensors, layer, shape["heads"], shape["mlp"]))
              for layer in range(len(parent.model.layers))]
    while len(layers) > shape["layers"]:
        shorter = [layers[:i] + layers[i + 1:] for i in range(len(layers))]
        costs = []
        for kept in shorter:
            logits = TinyLM.from_state_dict(gather(tensors, stream, kept))(bytes_BT[:, :-1])
            costs.append(F.cross_entropy(logits.flatten(0, 1), bytes_BT[:, 1:].flatten()).item())
        layers = shorter[int(np.argmin(costs))]
    return TinyLM.from_state_dict(gather(tensors, stream, layers)), (stream, layers)


def save(model, path):
    """Write bfloat16; a temporary name first, so that a reader never meets half a file."""
    write(model.state_dict(), path)


def write(tensors, path):
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    scratch = path.with_suffix(".partial")
    # Bytes written by Python rather than save_file, which leaves a file that only its owner may read (safetensors 0.8).
    scratch.write_bytes(to_bytes(tensors, metadata={"format": "pt"}))
    scratch.replace(path)


def save_adapter(model, spec, folder):
    """Write the two files that PEFT writes for such an adapter: the trained factors and how to read them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=spec.parent, r=spec.rank,
                  lora_alpha=spec.alpha, target_modules=list(LORA_TARGETS), lora_dropout=0.0, bias="none",
                  fan_in_fan_out=False, use_rslora=False, use_dora=False, rank_pattern={}, alpha_pattern={},
                  modules_to_save=None, inference_mode=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    write({f"base_model.model.{name}": tensor for name, tensor in model.state_dict().items() if ".lora_" in name},
          folder / ADAPTER)


def train(model, spec, texts, bar, partial=None):
    """Train in place; returns the mean loss of the last 100 steps in bits per byte."""
    generator = np.random.default_rng(spec.seed)
    trained = [weight for weight in model.parameters() if weight.requires_grad]  # of an adapter's model: A and B alone
    matrices = [weight for weight in trained if weight.dim() == 2]
    gains = [weight for weight in trained if weight.dim() == 1]  # norms: decay would pull them to zero
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
                                  betas=(0.9, 0.95), fused=True)
    losses = []
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, spec)
        bytes_BT = batch(texts, spec.mixture, generator)
        # bfloat16 products are 1.4 times as fast here; weights, norms, loss and optimiser stay in float32.
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(bytes_BT[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), bytes_BT[:, 1:].flatten())
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"loss is {loss.item()} at step {step}, last good {losses[-1:]}: lower lr in SPECS")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses = (losses + [loss.item() / math.log(2)])[-100:]
        bar.set_postfix(bits_per_byte=f"{np.mean(losses):.3f}", refresh=False)
        if partial and step % 200 == 199:
            save(model, partial)
    return float(np.mean(losses))


def make(name, out, texts, quiet, partial_folder=None):
    """Train, write and judge one model; returns its record."""
    spec = (SPECS | LORAS)[name]
    adapter = isinstance(spec, Lora)
    model = load(out / f"{spec.parent}.safetensors") if spec.parent else new_model(spec)
    if spec.parent and spec.shape:
        model = grow(model, spec) if spec.places else prune(model, spec, texts)[0]
    if adapter:
        torch.manual_seed(spec.seed)
        add_lora(model, spec.rank, spec.alpha)
    start = time.time()
    bar = tqdm(range(spec.steps), desc=name, disable=quiet, mininterval=5, unit="step")
    partial = Path(partial_folder, f"{name}-partial.safetensors") if partial_folder and not adapter else None
    loss = train(model.train(), spec, texts, bar, partial)
    # The file, after its rounding to bfloat16, is what everybody will use: it is read back and judged.
    if adapter:
        path = out / "lora" / name
        with torch.no_grad():
            for factor, weight in model.named_parameters():
                if "lora_B" in factor:
                    weight.mul_(spec.share)  # the map is linear in B: again a point on the line from the parent
        save_adapter(model, spec, path)
        judged = TinyLM.from_state_dict(fold(load_file(out / f"{spec.parent}.safetensors"), path))
    else:
        path = out / f"{name}.safetensors"
        if spec.places:
            model = TinyLM.from_state_dict(scramble(model.state_dict(), spec.seed)[0])
        if spec.parent and not spec.shape:
            # ours: a point on the line from parent to child often predicts new text better than either end (WiSE-FT,
            # Wortsman et al. 2022); at share 1 this returns the child's own numbers.
            parent = load(out / f"{spec.parent}.safetensors")
            with torch.no_grad():
                for weight, start_weight in zip(model.parameters(), parent.parameters()):
                    weight.copy_(start_weight.lerp(weight, spec.share))
        save(model, path)
        judged = load(path)
    held_out = {split: {domain: dict(zip(("mean", "error"), mean_and_error(values)))
                        for domain, values in evaluate(judged, split).items()} for split in ("validation", "test")}
    return {"name": name, **asdict(spec), "tokens": spec.steps * BATCH * WINDOW, "train_bits_per_byte": loss,
            "seconds": round(time.time() - start), "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": torch.__version__, **held_out}


def make_vae(out, quiet):
    """Train the reference VAE on six of the models in `out`."""
    files = [str(out / f"{name}.safetensors") for name in VAE_MODELS]
    more = ["--quiet"] if quiet else []
    code = vae_training.main([*files, "-o", str(out / "vae.safetensors"), *VAE_FLAGS, "--force", *more])
    if code:
        raise SystemExit(code)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["all"], metavar="NAME",
                        help=f"what to train, in this order, from {', '.join(SPECS)}, which all (the default) stands "
                        f"for, {', '.join(LORAS)}, which loras stands for, and vae, the reference VAE")
    parser.add_argument("--out", type=Path, default=HERE / "models", help="folder for the checkpoints, and for parents")
    parser.add_argument("--log", type=Path, default=HERE / "results/make_models.jsonl", help="gets a line per model")
    parser.add_argument("--partial", type=Path, help="folder that gets each unfinished model every 200 steps; "
                        "adapters, a minute's work, are written once")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="part of the result: sums are "
                        "added in another order with another number")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    groups = {"all": list(SPECS), "loras": list(LORAS)}
    names = [name for given in args.names for name in groups.get(given, [given])]
    if unknown := set(names) - {*SPECS, *LORAS, "vae"}:
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are all, loras, vae, "
                     f"{', '.join(SPECS | LORAS)}")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name == "vae":
            make_vae(args.out, args.quiet)
            continue
        texts = [training_text(domain, LORAS[name].half if name in LORAS else "") for domain in DOMAINS]
        record = make(name, args.out, texts, args.quiet, args.partial)
        args.log.parent.mkdir(parents=True, exist_ok=True)
        with args.log.open("a") as log:
            log.write(json.dumps(record) + "\n")
        print(name, *(f"{domain} {record['test'][domain]['mean']:.3f}" for domain in record["test"]), file=sys.stdout)


if __name__ == "__main__":
    main()
