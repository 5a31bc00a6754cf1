"""Real models, by hand: which compression one survives; and what a pruned one gains
from an expert of its larger relative. Needs transformers.

    python experiments/real.py --ratios FOLDER [--unseen CHECKPOINT] [--documents 24]
    python experiments/real.py --sibling FOLDER --work /tmp/sibling

In:    a folder in the Hugging Face layout with its tokenizer; for --sibling of a
       Llama-type model, the base. The text is that of evaluate.py, in the model's own
       tokens: training, and test for what is reported.
Out:   results/real.jsonl: per ratio r and method (the VAE of codec.py, trained on this
       model; PCA; noise of the VAE's NMSE) the NMSE, and the loss (nats per token)
       before and after. Of the unseen checkpoint the NMSE alone.
       results/sibling.jsonl: for each merge and control the loss minus the target's.
       In --work: the expert (the base, trained on sums), the target (the base with
       fewer layers and MLP units, in another order, then healed), both sources as
       tools/match.py writes them, merge.py's results. A step whose output lies there is
       skipped.
Paper: Tables 7 and 8; Table 5, an expert of one architecture merged into another. ours:
       the target descends from the expert's base, so that its units have partners.
Previous: codec.py. Next: bench.py.
"""
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from compare import (HERE, Claim, collect, command_line, find, lossless, machine,
                     pm_of, short, table)
from chunking import Checkpoint, StateDict, create, parse_name
from codec import (SCHEDULE, Model, RealModel, ThroughCodec, ThroughNoise, ThroughPCA,
                   config_of, effective, pca)
from evaluate import DOCUMENTS, DOMAINS, held_out, mean_and_error
from lsmerge import Codec
from make_models import blocks, cut
from shapes import (LAM, neighbour_change, noise_change, section_pruned,
                    shuffled_change)
from train import train_vae

# --- Which r? -----------------------------------------------------------------------
RATIOS = (1.0, 64 / 63, 1.25, 1.6, 2.0, 4.0)
# at most, evenly spread over each tensor: in float64 a quarter of a GB
PCA_CHUNKS = 500_000


def measure_ratio(real, unseen, ratio):
    """Yields the rows of one ratio."""
    began = time.perf_counter()
    vae, stages = train_vae([real.model.parent], config_of(ratio), SCHEDULE)
    seconds = time.perf_counter() - began
    config = vae.config
    r = config.true_ratio
    weights = real.model.weights
    through = ThroughCodec(Codec(vae))
    after, nmse, errors = real.after(through)
    numbers = sum(p.numel() for p in vae.parameters())
    found = [("VAE", through, numbers, after, nmse)]
    if r > 1:
        every = max(1, -(-weights // config.chunk // PCA_CHUNKS))
        basis = pca(real.model.chunks(config.chunk, every), config.latent)
        noise = ThroughNoise(errors, SCHEDULE.seed)
        for method, way, numbers in (("PCA", ThroughPCA(*basis), basis[1].numel()),
                                     ("noise", noise, None)):
            after, nmse, _ = real.after(way)
            found.append((method, way, numbers, after, nmse))
    for method, way, numbers, after, nmse in found:
        unseen_nmse = None
        if unseen and method != "noise":
            unseen_nmse = unseen.rebuilt(way)[1]
        yield {"model": real.model.name, "weights": weights, "ratio": r,
               "method": method, "nmse": nmse, "loss_before": real.before,
               "loss": after, "change": after / real.before - 1,
               "effective_ratio": effective(r, weights, numbers),
               "white_noise": max(0.0, 1 - 1 / r), "unseen": unseen and unseen.name,
               "unseen_nmse": unseen_nmse, "seed": SCHEDULE.seed,
               "seconds_of_training": seconds, "stages": stages,
               "schedule": asdict(SCHEDULE), "documents": len(real.tokens),
               **machine()}


def section_ratios(rows):
    lines = []
    for vae in find(rows, method="VAE"):
        line = [f"{vae['ratio']:.4g}", short(vae["nmse"]), short(vae["white_noise"])]
        for method in ("VAE", "PCA", "noise"):
            same = find(rows, model=vae["model"], ratio=vae["ratio"], method=method)
            line.append(f"{same[0]['loss']:.2f} ({same[0]['change']:+.0%})"
                        if same else "")
        lines.append([*line, short(vae["unseen_nmse"])])
    return table(["r", "NMSE", "1 - 1/r", "loss: VAE", "PCA", "noise",
                  "NMSE on an unseen model"], lines)


# --- A pruned model and its sibling -------------------------------------------------
WINDOW = 104        # tokens: a document of eight sums
# of a domain's training text: more than any recipe here reads
TRAIN_BYTES = 1_000_000
DROPPED = 2         # layers
KEPT = 1408 / 1536  # MLP units


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. mixture: shares of code, prose and arithmetic."""
    mixture: tuple
    steps: int
    rate: float
    batch: int = 2      # windows per step
    seed: int = 0
    warmup: int = 10    # steps; then a cosine to zero


EXPERT = Recipe(mixture=(0.1, 0.1, 0.8), steps=200, rate=3e-5)
HEAL = Recipe(mixture=(0.5, 0.5, 0), steps=100, rate=1e-4, batch=4, seed=1)


def kept_layers(number, dropped, seed):
    """All layers but a few, drawn from those that are neither first nor last."""
    inner = torch.randperm(number - 2, generator=torch.Generator().manual_seed(seed))
    away = set((1 + inner[:dropped]).tolist())
    return [layer for layer in range(number) if layer not in away]


def random_order(tensors, kept, units, size, seed):
    """(stream, layers) for `cut`: these layers, so many of their units, all in random
    order. Heads stay with the group whose keys and values they read.
    ours:     units go at random. Without the 128 of smallest norm per layer, prose cost
              9.4 nats per token rather than 3.7, without 128 random ones 4.6 (three
              validation texts)"""
    draw = torch.Generator().manual_seed(seed)
    layers = []
    for layer in kept:
        prefix = f"model.layers.{layer}."
        rows = len(tensors[f"{prefix}self_attn.q_proj.weight"]) // size
        keys = len(tensors[f"{prefix}self_attn.k_proj.weight"]) // size
        groups = torch.randperm(keys, generator=draw)
        shared = rows // keys
        inner = torch.stack([torch.randperm(shared, generator=draw) for _ in groups])
        heads = (groups[:, None] * shared + inner).flatten()
        of_all = len(tensors[f"{prefix}mlp.up_proj.weight"])
        order = torch.randperm(of_all, generator=draw)[:units]
        layers.append((layer, {"heads": blocks(heads, size),
                               "groups": blocks(groups, size), "units": order}))
    stream = torch.randperm(len(tensors["model.norm.weight"]), generator=draw)
    return stream, layers


def load_lm(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokenizer_of(folder):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folder)


def training_tokens(folder, mixture):
    """{domain: the tokens of its training text, one after another}"""
    tokenizer = tokenizer_of(folder)
    found = {}
    for domain, share in zip(DOMAINS, mixture):
        if share:
            sums = domain == "arithmetic"
            documents = DOCUMENTS[domain]("train", *[10_000] * sums)
            texts = list(documents.values())
            np.random.default_rng(0).shuffle(texts)
            between = b"" if sums else b"\n"
            text = between.join(texts)[:TRAIN_BYTES].decode(errors="replace")
            found[domain] = torch.tensor(tokenizer(text, verbose=False).input_ids)
    return found


def windows(tokens, recipe, draw):
    """(batch, WINDOW): a domain drawn by its share, then any place in its text."""
    rows = []
    for domain in draw.choice(DOMAINS, size=recipe.batch, p=recipe.mixture):
        start = draw.integers(len(tokens[domain]) - WINDOW)
        rows.append(tokens[domain][start:start + WINDOW])
    return torch.stack(rows)


def train(lm, tokens, recipe):
    """Train all weights in place; returns the loss of every step."""
    draw = np.random.default_rng(recipe.seed)
    losses = []
    optimizer = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.95), weight_decay=0,
                                  fused=True)
    for step in range(recipe.steps):
        warm = min(1, (step + 1) / recipe.warmup)
        cosine = (1 + np.cos(np.pi * step / recipe.steps)) / 2
        optimizer.param_groups[0]["lr"] = recipe.rate * warm * cosine
        ids = windows(tokens, recipe, draw)
        loss = lm(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 19:
            print(f"  step {step + 1}: loss {np.mean(losses[-20:]):.3f}", flush=True)
    return losses


def write_model(folder, tensors, parent, **changes):
    """A folder in the Hugging Face layout: the parent's configuration, changed, and
    tokenizer."""
    entries = StateDict(tensors).entries.values()
    with create(folder, entries, inside="model.safetensors") as output:
        beside = Path(output.path).parent
        for file in Path(parent).glob("*token*"):
            shutil.copyfile(file, beside / file.name)
        config = json.loads(Path(parent, "config.json").read_text()) | changes
        (beside / "config.json").write_text(json.dumps(config, indent=1))
        for name, tensor in tensors.items():
            output.put(name, 0, tensor.flatten())


def read_model(folder):
    file = Checkpoint(folder)
    return {name: file.read_tensor(name) for name in file.entries}


def write_trained(folder, start, base, recipe, notes):
    """Train what lies in `start` and write it to `folder`, with a note of how it
    went."""
    lm = load_lm(start)
    began = time.perf_counter()
    curve = train(lm, training_tokens(base, recipe.mixture), recipe)
    tensors = {}
    for name in Checkpoint(start).entries:
        tensors[name] = lm.get_parameter(name).detach()
    note = {**asdict(recipe), "seconds": time.perf_counter() - began,
            "threads": torch.get_num_threads(),
            "first": float(np.mean(curve[:10])), "last": float(np.mean(curve[-10:]))}
    write_model(folder, tensors, start)
    Path(notes).write_text(json.dumps(note))


def write_cut(base, folder, seed):
    """The base with fewer layers and units, in another order."""
    tensors = read_model(base)
    config = json.loads(Path(base, "config.json").read_text())
    size = config.get("head_dim")
    size = size or config["hidden_size"] // config["num_attention_heads"]
    numbers = [parse_name(name).layer for name in tensors if ".layers." in name]
    kept = kept_layers(1 + max(numbers), DROPPED, seed)
    units = round(config["intermediate_size"] * KEPT)
    stream, layers = random_order(tensors, kept, units, size, seed)
    write_model(folder, cut(tensors, stream, layers), base, num_hidden_layers=len(kept),
                intermediate_size=units)


def command(*words):
    """Run a command of the project, in as many threads as this process has."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, *map(str, words), "--quiet"], check=True,
                   env=os.environ | threads)


def make_models(base, work, seed):
    """work/expert, work/target; work/matched: base and expert in the target's order."""
    if not (work / "expert").exists():
        print("training the expert", flush=True)
        write_trained(work / "expert", base, base, EXPERT, work / "expert.json")
    if not (work / "cut").exists():
        write_cut(base, work / "cut", seed)
    if not (work / "target").exists():
        print("healing the target", flush=True)
        write_trained(work / "target", work / "cut", base, HEAL, work / "target.json")
    # match.py calls its results by the sources' names
    if not (work / "base").exists():
        (work / "base").symlink_to(base.resolve())
    if not (work / "matched").exists():
        command(HERE / "tools" / "match.py", work / "target", work / "base",
                work / "expert", "-o", work / "matched", "--report",
                work / "matched.json")


def merged(work, name, options):
    """The folder that merge.py writes, unless it is there."""
    out = work / f"merged-{name}"
    if not out.exists():
        print(f"merging: {name}", flush=True)
        matched = work / "matched"
        words = shlex.split(options.replace("BASE", str(matched / "base.safetensors")))
        command(HERE.parent / "merge.py", work / "target",
                matched / "expert.safetensors", *words, "-o", out)
    return out


class Judge:
    """Losses of models, {domain: nats per token of each text, after its first token};
    each is kept in a file, and judged once."""

    def __init__(self, base, work, documents):
        tokenizer = tokenizer_of(base)
        self.tokens = {}
        for domain in DOMAINS:
            self.tokens[domain] = []
            for text in held_out(domain, "test")[:documents]:
                text = text.decode(errors="replace")
                ids = tokenizer(text, return_tensors="pt").input_ids
                self.tokens[domain].append(ids)
        self.files = work / f"losses-test-{documents}"
        self.files.mkdir(exist_ok=True)

    @torch.no_grad()
    def losses(self, name, folder, change=()):
        """Of the model in a folder, after a change {tensor: what is added to it}."""
        file = self.files / f"{name}.json"
        if not file.exists():
            print(f"judging: {name}", flush=True)
            lm = load_lm(folder)
            for key in change:
                lm.get_parameter(key).add_(change[key])
            found = {}
            for domain, texts in self.tokens.items():
                found[domain] = []
                for ids in texts:
                    loss = lm(input_ids=ids, labels=ids).loss
                    found[domain].append(loss.item())
            file.write_text(json.dumps(found))
        return json.loads(file.read_text())


def paired(ours, other):
    """{domain: mean difference, its standard error over texts, and our mean loss}"""
    found = {}
    for domain, values in ours.items():
        mean, error = mean_and_error(np.subtract(values, other[domain]))
        found[domain] = {"mean": mean, "se": error, "loss": float(np.mean(values))}
    return found


TASK = "--base BASE --operator task-arithmetic"
# What merge.py makes: row, lambda, options.
MERGES = [("difference, matched", lam, f"{TASK} --lam {lam}")
          for lam in (0.3, LAM, 1.0)]
MERGES += [("zero", 0.0, f"{TASK} --lam 0"), ("lerp", 0.1, "--lam 0.1")]


def measure_sibling(base, work, judge, seed):
    """Yields the rows: the two parents whole, the merges, the controls of the
    difference that the merge at LAM made."""
    target = judge.losses("target", work / "target")
    notes = {}
    for name in ("expert", "target"):
        notes[name] = json.loads((work / f"{name}.json").read_text())
    kin = json.loads((work / "matched.json").read_text())["kinship"][0]
    means = {domain: float(np.mean(losses)) for domain, losses in target.items()}
    common = {"model": base.resolve().name, "seed": seed, "training": notes,
              "kinship": kin, "target": means, "split": "test",
              "documents": len(judge.tokens[DOMAINS[0]]), **machine()}
    for row, path in (("base", base), ("expert", work / "expert")):
        yield common | {"row": row, "lam": None,
                        "domains": paired(judge.losses(row, path), target)}
    for row, lam, options in MERGES:
        name = f"{row.split(',')[0]}-{lam}"
        losses = judge.losses(name, merged(work, name, options))
        yield common | {"row": row, "lam": lam, "domains": paired(losses, target),
                        "command": f"python merge.py TARGET EXPERT {options} -o OUT"}
    start = read_model(work / "target")
    change = {}
    for name, tensor in read_model(work / f"merged-difference-{LAM}").items():
        if not torch.equal(tensor, start[name]):
            change[name] = tensor - start[name]
    controls = {"noise": noise_change(change, seed),
                "shuffled": shuffled_change(change, seed),
                "neighbour": neighbour_change(work / "target", base, work / "expert",
                                              LAM)}
    for row, control in controls.items():
        name = f"{row}-{LAM}-{seed}"
        losses = judge.losses(name, work / "target", control)
        yield common | {"row": row, "lam": LAM, "domains": paired(losses, target)}


# --- Claims and the command ---------------------------------------------------------
def claims(records):
    found = []
    rows = [row for row in find(records["real"], method="VAE") if row["ratio"] > 1]
    if rows:
        row = min(rows, key=lambda row: row["ratio"])
        found.append(Claim("a real model survives r > 1", "up to r = 4",
                           f"SmolLM2-135M, r = {row['ratio']:.3g}: loss "
                           f"{row['change']:+.0%}", lossless(row["change"]),
                           "A real model", "63 numbers for 64 weights are too few"))
    for row in find(records["sibling"], row="difference, matched", lam=LAM):
        d = row["domains"]
        found.append(Claim("the same, a real model, lambda 0.5", "",
                           f"arithmetic {pm_of(d['arithmetic'])} nats; code "
                           f"{pm_of(d['code'])}", "ours", "Real siblings"))
    return found


def main():
    parser = command_line(__doc__)
    parser.add_argument("--ratios", type=Path, metavar="FOLDER",
                        help="which compression does it survive?")
    parser.add_argument("--only", type=float, nargs="+", default=RATIOS,
                        help="of these ratios")
    parser.add_argument("--unseen", help="a checkpoint that the codec is not fitted on")
    parser.add_argument("--sibling", type=Path, metavar="FOLDER",
                        help="a Llama-type model: the base")
    parser.add_argument("--work", type=Path, help="for all its models, 7 GB of them")
    parser.add_argument("--documents", type=int, default=48,
                        help="per domain (%(default)s)")
    parser.add_argument("--seed", type=int, default=1,
                        help="of what is dropped, the order and the controls (1: its "
                        "layers, 7 and 22, cost less than those of 0 and 2)")
    args = parser.parse_args()
    if args.ratios:
        real = RealModel(args.ratios, args.documents)
        unseen = Model.open(args.unseen) if args.unseen else None
        rows = []
        for ratio in args.only:
            rows += collect("real", measure_ratio(real, unseen, ratio), args)
        print(section_ratios(rows))
    if args.sibling:
        if not args.work:
            parser.error("--sibling needs --work, a folder")
        args.work.mkdir(parents=True, exist_ok=True)
        make_models(args.sibling, args.work, args.seed)
        judge = Judge(args.sibling, args.work, args.documents)
        rows = measure_sibling(args.sibling, args.work, judge, args.seed)
        print(section_pruned(collect("sibling", rows, args)))


if __name__ == "__main__":
    main()
