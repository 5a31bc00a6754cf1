"""Does a pruned model gain from an expert of its larger relative? A real Llama, by hand.

    python experiments/real_sibling.py FOLDER --work /tmp/sibling \\
        --record experiments/results/sibling.jsonl                 # needs: pip install transformers

In:    a folder with a Llama-type model, its configuration and tokenizer: the base. The text is that
       of evaluate.py, in the model's own tokens: training, and test for what is reported.
Out:   in --work: the expert (the base, trained on sums), the target (the base with fewer layers and
       MLP units, in another order, then healed), and merge.py's results. A step whose output lies
       there is skipped. Per merge and control: the loss (nats per token) minus the target's, its
       standard error over texts; kinship, and how much of the known order the match has found.
       Controls, all in weights and at one lambda: zero (the target through the codec), noise of the
       difference's norm per tensor, its runs of 64 weights shuffled, the layers' neighbours.
Paper: Table 5, an expert of one architecture merged into another. ours: the target descends from
       the expert's base, so that its hidden units have known partners.
Previous: round_trips.py. Next: bench.py.
"""
import argparse
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

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from align import AXES
from chunking import Checkpoint, Matched, appear, place, write_tensors
from evaluate import DOCUMENTS, DOMAINS, held_out, mean_and_error
from grid import neighbours
from make_models import blocks, cut
from merge import match
from scores import append, machine

WINDOW = 104        # tokens: a document of eight sums
TRAIN_BYTES = 1_000_000     # of a domain's training text: more than any recipe here reads
RUN = 64            # weights that the shuffled control keeps together: a chunk of the codec
LAM = 0.5           # of the controls
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


# --- Pruned and permuted --------------------------------------------------------------------------
def layer_count(tensors):
    return 1 + max(place(name).layer for name in tensors if ".layers." in name)


def kept_layers(number, dropped, seed):
    """All layers but a few, drawn from those that are neither first nor last."""
    inner = torch.randperm(number - 2, generator=torch.Generator().manual_seed(seed))
    away = set((1 + inner[:dropped]).tolist())
    return [layer for layer in range(number) if layer not in away]


def random_order(tensors, kept, units, size, seed):
    """(stream, layers) for `cut`: these layers, so many of their units, all in random order.
    Heads stay with the group whose keys and values they read.
    ours:     units go at random. Without the 128 of smallest norm per layer, prose cost 9.4 nats
              per token rather than 3.7, without 128 random ones 4.6 (three validation texts)"""
    draw, layers = torch.Generator().manual_seed(seed), []
    for layer in kept:
        rows, keys = (len(tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"]) // size
                      for name in "qk")
        groups = torch.randperm(keys, generator=draw)
        shared = rows // keys
        inner = torch.stack([torch.randperm(shared, generator=draw) for _ in groups])
        heads = (groups[:, None] * shared + inner).flatten()
        of_all = len(tensors[f"model.layers.{layer}.mlp.up_proj.weight"])
        layers.append((layer, {"heads": blocks(heads, size), "groups": blocks(groups, size),
                               "units": torch.randperm(of_all, generator=draw)[:units]}))
    return torch.randperm(len(tensors["model.norm.weight"]), generator=draw), layers


def found_right(found, stream, layers):
    """Of the known order, the share that a Match has found, by axis."""
    right = {"layers": found.layers == [layer for layer, _ in layers],
             "stream": (found.stream_J == stream).float().mean().item()}
    for axis in ("heads", "groups", "units"):
        pairs = [(of[axis], rows[axis]) for of, (_, rows) in zip(found.units, layers) if of]
        right[axis] = float(np.mean([(a == b).float().mean().item() for a, b in pairs]))
    return right


# --- Controls: what else could a difference of weights do? ----------------------------------------
def generator(seed, number):
    return torch.Generator().manual_seed(1000 * seed + number)


def noise(difference, seed):
    """Gaussian, per tensor of the difference's norm."""
    new = {}
    for number, (name, tensor) in enumerate(difference.items()):
        drawn = torch.randn(tensor.shape, generator=generator(seed, number))
        new[name] = drawn * (tensor.norm() / drawn.norm())
    return new


def shuffled(difference, seed):
    """Runs of RUN weights in random order, within each tensor; a shorter last one stays."""
    new = {}
    for number, (name, tensor) in enumerate(difference.items()):
        flat = tensor.flatten().clone()
        runs = flat[:len(flat) // RUN * RUN].view(-1, RUN)
        runs.copy_(runs[torch.randperm(len(runs), generator=generator(seed, number))])
        new[name] = flat.view(tensor.shape)
    return new


def neighbour(target, expert, base, found, lam):
    """lam (expert - base) of the layer after each one's partner (after the last: before it)."""
    moved = [Matched(model, target, neighbours(found, base), AXES) for model in (expert, base)]
    return {name: lam * (moved[0].read(name) - moved[1].read(name)).view(entry.shape)
            for name, entry in moved[0].entries.items()}


# --- Text, training, losses -----------------------------------------------------------------------
def load_lm(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokenizer_of(folder):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folder)


def training_tokens(folder, mixture):
    """domain -> the tokens of its training text, one after another."""
    tokenizer, found = tokenizer_of(folder), {}
    for domain, share in zip(DOMAINS, mixture):
        if share:
            more = {"documents": 10_000} if domain == "arithmetic" else {}
            texts = list(DOCUMENTS[domain]("train", **more).values())
            np.random.default_rng(0).shuffle(texts)
            text = (b"" if more else b"\n").join(texts)[:TRAIN_BYTES].decode(errors="replace")
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
    """Train all weights in place; returns the loss of every step. Products are in bfloat16."""
    draw, losses = np.random.default_rng(recipe.seed), []
    optimizer = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.95), weight_decay=0, fused=True)
    for step in range(recipe.steps):
        warm = min(1, (step + 1) / recipe.warmup)
        cosine = (1 + np.cos(np.pi * step / recipe.steps)) / 2
        optimizer.param_groups[0]["lr"] = recipe.rate * warm * cosine
        ids = windows(tokens, recipe, draw)
        with torch.autocast("cpu", torch.bfloat16):
            loss = lm(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 19:
            print(f"  step {step + 1}: loss {np.mean(losses[-20:]):.3f}", flush=True)
    return losses


def judged_tokens(folder, split, documents):
    """domain -> tokens of each of its texts."""
    tokenizer = tokenizer_of(folder)
    return {domain: [tokenizer(text.decode(errors="replace"), return_tensors="pt").input_ids
                     for text in held_out(domain, split)[:documents]] for domain in DOMAINS}


@torch.no_grad()
def losses(lm, tokens):
    """domain -> nats per token of each text, after its first token."""
    return {domain: [lm(input_ids=ids, labels=ids).loss.item() for ids in texts]
            for domain, texts in tokens.items()}


def paired(ours, other):
    """domain -> mean difference, its standard error over texts, and our mean loss."""
    found = {}
    for domain, values in ours.items():
        mean, error = mean_and_error(np.subtract(values, other[domain]))
        found[domain] = {"mean": mean, "se": error, "loss": float(np.mean(values))}
    return found


# --- The steps ------------------------------------------------------------------------------------
def write_model(folder, tensors, parent, **changes):
    """A folder in the Hugging Face layout: the parent's configuration, changed, and tokenizer."""
    with appear(folder) as partial:
        Path(partial).mkdir()
        for file in Path(parent).glob("*token*"):
            shutil.copyfile(file, Path(partial, file.name))
        config = json.loads(Path(parent, "config.json").read_text()) | changes
        Path(partial, "config.json").write_text(json.dumps(config, indent=1))
        write_tensors(Path(partial, "model.safetensors"), tensors, {})


def read_model(folder):
    file = Checkpoint(folder)
    return {name: file.read_tensor(name) for name in file.entries}


def trained(folder, start, base, recipe, notes):
    """Train what lies in `start` and write it to `folder`, with a note of how it went."""
    lm, began = load_lm(start), time.perf_counter()
    curve = train(lm, training_tokens(base, recipe.mixture), recipe)
    tensors = {name: lm.get_parameter(name).detach() for name in Checkpoint(start).entries}
    note = {**asdict(recipe), "seconds": time.perf_counter() - began,
            "threads": torch.get_num_threads(),
            "first": float(np.mean(curve[:10])), "last": float(np.mean(curve[-10:]))}
    write_model(folder, tensors, start)
    Path(notes).write_text(json.dumps(note))


def the_order(base, seed):
    """The target's known order: layers, heads, units and stream of the base, for `cut`."""
    tensors = read_model(base)
    config = json.loads(Path(base, "config.json").read_text())
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kept = kept_layers(layer_count(tensors), DROPPED, seed)
    units = round(config["intermediate_size"] * KEPT)
    return random_order(tensors, kept, units, size, seed)


def make_models(base, work, seed):
    """work/expert and work/target."""
    if not (work / "expert").exists():
        print("training the expert", flush=True)
        trained(work / "expert", base, base, EXPERT, work / "expert.json")
    if not (work / "cut").exists():
        stream, layers = the_order(base, seed)
        write_model(work / "cut", cut(read_model(base), stream, layers), base,
                    num_hidden_layers=len(layers), intermediate_size=len(layers[0][1]["units"]))
    if not (work / "target").exists():
        print("healing the target", flush=True)
        trained(work / "target", work / "cut", base, HEAL, work / "target.json")


def merged(base, work, name, options):
    """Run merge.py unless its result is there. Returns (its report, the command)."""
    out, report = work / f"merged-{name}", work / f"merged-{name}.json"
    words = [word.replace("BASE", str(base)) for word in shlex.split(options)]
    run = [sys.executable, str(HERE.parent / "merge.py"), str(work / "target"),
           str(work / "expert"), *words, "-o", str(out), "--report", str(report), "--quiet"]
    if not out.exists():
        print(f"merging: {name}", flush=True)
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        subprocess.run(run, check=True, env=os.environ | threads)
    return json.loads(report.read_text()), f"python merge.py target expert {options} -o OUT"


class Judge:
    """Losses of models and of changed targets; each is kept in a file, and judged once."""

    def __init__(self, base, work, split, documents):
        self.tokens, self.lm = judged_tokens(base, split, documents), None
        self.split, self.documents = split, documents
        self.target, self.files = work / "target", work / f"losses-{split}-{documents}"
        self.files.mkdir(exist_ok=True)

    def known(self, name):
        file = self.files / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def keep(self, name, lm):
        print(f"judging: {name}", flush=True)
        found = losses(lm, self.tokens)
        (self.files / f"{name}.json").write_text(json.dumps(found))
        return found

    def folder(self, name, path):
        return self.known(name) or self.keep(name, load_lm(path))

    @torch.no_grad()
    def changed(self, name, target, difference):
        """The target's tensors plus a difference, added in place."""
        if known := self.known(name):
            return known
        self.lm = self.lm or load_lm(self.target)
        for key, tensor in target.items():
            self.lm.get_parameter(key).copy_(tensor + difference.get(key, 0))
        return self.keep(name, self.lm)


# --- The table ------------------------------------------------------------------------------------
TASK = "--base BASE --operator task-arithmetic --align units"
# What merge.py makes: row, lambda, options.
MERGES = [("difference, matched", lam, f"{TASK} --lam {lam}") for lam in (0.3, LAM, 1.0)]
MERGES += [("zero", 0.0, f"{TASK} --lam 0"), ("lerp", 0.1, "--align units --lam 0.1")]
CONTROLS = "noise", "shuffled", "neighbour"
COMMAND = "python experiments/real_sibling.py FOLDER --work WORK --seed {}"


def judged_merges(base, work, judge):
    """Yields row, lambda, losses, merge.py's report, the command."""
    for row, lam, options in MERGES:
        name = f"{row.split(',')[0]}-{lam}"
        report, said = merged(base, work, name, options)
        yield row, lam, judge.folder(name, work / f"merged-{name}"), report, said


def judged_controls(base, work, judge, found, seed):
    """Yields row and losses of the controls of the difference that the merge at LAM made."""
    target, changed = read_model(work / "target"), read_model(work / f"merged-difference-{LAM}")
    difference = {name: changed[name] - tensor for name, tensor in target.items()
                  if not torch.equal(changed[name], tensor)}
    models = [Checkpoint(path) for path in (work / "target", work / "expert", base)]
    for row in CONTROLS:
        if row == "neighbour":
            control = neighbour(*models, found, LAM)
        else:
            control = {"noise": noise, "shuffled": shuffled}[row](difference, seed)
        yield row, judge.changed(f"{row}-{LAM}-{seed}", target, control)


def kinship(report, known):
    """What merge.py reported, and what is known to be right."""
    return {**report["kinship"][0], "least": min(report["kinship"][0]["similarity"]), **known}


def table(base, work, judge, seed):
    """Yields the records: the two parents whole, the merges, the controls."""
    found = match(Checkpoint(work / "target"), Checkpoint(base))
    known = {"right": found_right(found, *the_order(base, seed))}
    target = judge.folder("target", work / "target")
    notes = {name: json.loads((work / f"{name}.json").read_text()) for name in ("expert", "target")}
    common = {"model": base.resolve().name, "seed": seed, "training": notes,
              "target": {domain: float(np.mean(of)) for domain, of in target.items()},
              "split": judge.split, "documents": judge.documents, **machine()}
    alone = {"kinship": None, "seconds": None, "command": COMMAND.format(seed), **common}
    for row, path in (("base", base), ("expert", work / "expert")):
        yield {"row": row, "lam": None, "domains": paired(judge.folder(row, path), target), **alone}
    for row, lam, scores, report, said in judged_merges(base, work, judge):
        yield {"row": row, "lam": lam, "domains": paired(scores, target), "command": said,
               "kinship": kinship(report, known), "seconds": report["seconds"], **common}
    for row, scores in judged_controls(base, work, judge, found, seed):
        yield {"row": row, "lam": LAM, "domains": paired(scores, target), **alone}


def print_row(row):
    cells = [f"{of['mean']:+.4f} ({of['mean'] / of['se'] if of['se'] else 0:+.1f})"
             for of in row["domains"].values()]
    lam = "" if row["lam"] is None else f"{row['lam']:g}"
    print(f"{row['row']:<20} {lam:>5}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def print_kinship(rows):
    found = next(row for row in rows if row["kinship"])
    kin, right = found["kinship"], found["kinship"]["right"]
    print(f"kinship: at least {kin['least']:.3f} (strangers {kin['null']:.3f}); layers "
          f"{'as known' if right['layers'] else 'WRONG'}; right: " + ", ".join(
              f"{axis} {right[axis]:.1%}" for axis in ("stream", "heads", "groups", "units")))
    stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in found["seconds"].items())
    print(f"seconds of the first merge: {stages} (matching is a part of the first)")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a Llama-type model, with its tokenizer")
    parser.add_argument("--work", type=Path, required=True, help="for all models, 6 GB of them")
    parser.add_argument("--split", choices=("test", "validation"), default="test",
                        help="choose anything by validation, report test (the default)")
    parser.add_argument("--documents", type=int, default=48, help="per domain (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of what is dropped, the order and the "
                        "controls (1: its layers, 7 and 22, cost less than those of 0 and 2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", type=Path,
                        help=f"append to this file, for example {HERE.name}/results/sibling.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    make_models(args.folder, args.work, args.seed)
    judge, rows = Judge(args.folder, args.work, args.split, args.documents), []
    print("loss minus the target's, nats per token (in standard errors)\n" + " " * 26
          + "".join(f"{domain:>18}" for domain in DOMAINS))
    for row in table(args.folder, args.work, judge, args.seed):
        rows.append(row)
        print_row(row)
    print_kinship(rows)
    if args.record:
        append(args.record, rows)


if __name__ == "__main__":
    main()
