"""Does a pruned model gain from an expert of its larger relative? A real Llama, by
hand.

    python experiments/real_sibling.py FOLDER --work /tmp/sibling \\
        --record experiments/results/sibling.jsonl      # needs transformers

In:    a folder with a Llama-type model, its configuration and tokenizer: the base. The
       text is that of evaluate.py, in the model's own tokens: training, and test for
       what is reported.
Out:   in --work: the expert (the base, trained on sums), the target (the base with
       fewer layers and MLP units, in another order, then healed), both as
       tools/match.py writes them in the target's order, and merge.py's results. A step
       whose output lies there is skipped. For each merge and control the loss (nats
       per token) minus the target's, and its standard error over texts.
       Controls: zero (the target through the codec), and those of relatives.py.
Paper: Table 5, an expert of one architecture merged into another. ours: the target
       descends from the expert's base, so that its hidden units have known partners.
Previous: relatives.py. Next: real_model.py.
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

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "tools")]
import sections
from chunking import Checkpoint, StateDict, create, parse_name
from evaluate import DOCUMENTS, DOMAINS, held_out, mean_and_error
from make_models import blocks, cut
from records import Results, command_line, keep, machine
from relatives import LAM, neighbour, noise, shuffled

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


# --- Pruned and permuted --------------------------------------------------------------
def layer_count(tensors):
    return 1 + max(parse_name(name).layer for name in tensors if ".layers." in name)


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
        rows = {"heads": blocks(heads, size), "groups": blocks(groups, size),
                "units": torch.randperm(of_all, generator=draw)[:units]}
        layers.append((layer, rows))
    stream = torch.randperm(len(tensors["model.norm.weight"]), generator=draw)
    return stream, layers


# --- Text, training, losses -----------------------------------------------------------
def load_lm(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokenizer_of(folder):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folder)


def training_tokens(folder, mixture):
    """domain -> the tokens of its training text, one after another."""
    tokenizer = tokenizer_of(folder)
    found = {}
    for domain, share in zip(DOMAINS, mixture):
        if share:
            more = {"documents": 10_000} if domain == "arithmetic" else {}
            texts = list(DOCUMENTS[domain]("train", **more).values())
            np.random.default_rng(0).shuffle(texts)
            between = b"" if more else b"\n"
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
    """Train all weights in place; returns the loss of every step. Products are in
    bfloat16."""
    draw = np.random.default_rng(recipe.seed)
    losses = []
    optimizer = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.95), weight_decay=0,
                                  fused=True)
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
    found = {}
    for domain in DOMAINS:
        texts = [text.decode(errors="replace")
                 for text in held_out(domain, split)[:documents]]
        found[domain] = [tokenizer(text,
                                   return_tensors="pt").input_ids for text in texts]
    return found


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


# --- The steps ------------------------------------------------------------------------
def write_model(folder, tensors, parent, **changes):
    """A folder in the Hugging Face layout: the parent's configuration, changed, and
    tokenizer."""
    entries = StateDict(tensors).entries.values()
    with create(folder, entries, folder=True) as output:
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


def trained(folder, start, base, recipe, notes):
    """Train what lies in `start` and write it to `folder`, with a note of how it
    went."""
    lm = load_lm(start)
    began = time.perf_counter()
    curve = train(lm, training_tokens(base, recipe.mixture), recipe)
    tensors = {name: lm.get_parameter(name).detach()
               for name in Checkpoint(start).entries}
    note = {**asdict(recipe), "seconds": time.perf_counter() - began,
            "threads": torch.get_num_threads(),
            "first": float(np.mean(curve[:10])), "last": float(np.mean(curve[-10:]))}
    write_model(folder, tensors, start)
    Path(notes).write_text(json.dumps(note))


def cut_model(base, folder, seed):
    """The base with fewer layers and units, in another order."""
    tensors = read_model(base)
    config = json.loads(Path(base, "config.json").read_text())
    size = config["hidden_size"] // config["num_attention_heads"]
    size = config.get("head_dim") or size
    kept = kept_layers(layer_count(tensors), DROPPED, seed)
    units = round(config["intermediate_size"] * KEPT)
    stream, layers = random_order(tensors, kept, units, size, seed)
    write_model(folder, cut(tensors, stream, layers), base, num_hidden_layers=len(kept),
                intermediate_size=units)


def command(*words):
    """Run a command of the product, in as many threads as this process has."""
    run = [sys.executable, *map(str, words), "--quiet"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(run, check=True, env=os.environ | threads)


def make_models(base, work, seed):
    """work/expert, work/target; work/matched: base and expert in the target's order."""
    if not (work / "expert").exists():
        print("training the expert", flush=True)
        trained(work / "expert", base, base, EXPERT, work / "expert.json")
    if not (work / "cut").exists():
        cut_model(base, work / "cut", seed)
    if not (work / "target").exists():
        print("healing the target", flush=True)
        trained(work / "target", work / "cut", base, HEAL, work / "target.json")
    # match.py calls its results by the sources' names
    if not (work / "base").exists():
        (work / "base").symlink_to(base.resolve())
    if not (work / "matched").exists():
        command(HERE / "tools" / "match.py", work / "target", work / "base",
                work / "expert",
                "-o", work / "matched", "--report", work / "matched.json")


def merged(work, name, options):
    """The folder that merge.py writes, unless it is there; and the command."""
    out = work / f"merged-{name}"
    if not out.exists():
        print(f"merging: {name}", flush=True)
        matched = work / "matched"
        words = [word.replace("BASE", str(matched / "base.safetensors"))
                 for word in shlex.split(options)]
        command(HERE.parent / "merge.py", work / "target",
                matched / "expert.safetensors",
                *words, "-o", out)
    return out, f"python merge.py TARGET EXPERT {options} -o OUT"


class Judge:
    """Losses of models and of changed targets; each is kept in a file, and judged
    once."""

    def __init__(self, base, work, split, documents):
        self.tokens = judged_tokens(base, split, documents)
        self.split = split
        self.documents = documents
        self.target = work / "target"
        self.files = work / f"losses-{split}-{documents}"
        self.files.mkdir(exist_ok=True)
        self.lm = None

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
    def changed(self, name, target, change):
        """The target's tensors plus a change, added in place."""
        if known := self.known(name):
            return known
        self.lm = self.lm or load_lm(self.target)
        for key, tensor in target.items():
            self.lm.get_parameter(key).copy_(tensor + change.get(key, 0))
        return self.keep(name, self.lm)


# --- The table ------------------------------------------------------------------------
TASK = "--base BASE --operator task-arithmetic"
# What merge.py makes: row, lambda, options.
MERGES = [("difference, matched", lam, f"{TASK} --lam {lam}")
          for lam in (0.3, LAM, 1.0)]
MERGES += [("zero", 0.0, f"{TASK} --lam 0"), ("lerp", 0.1, "--lam 0.1")]
COMMAND = "python experiments/real_sibling.py FOLDER --work WORK --seed {}"


def table(base, work, judge, seed):
    """Yields the rows: the two parents whole, the merges, the controls of the
    difference that the merge at LAM made."""
    target = judge.folder("target", work / "target")
    notes = {name: json.loads((work / f"{name}.json").read_text())
             for name in ("expert", "target")}
    kin = json.loads((work / "matched.json").read_text())["kinship"][0]
    common = {"model": base.resolve().name, "seed": seed, "training": notes,
              "kinship": kin,
              "target": {domain: float(np.mean(of)) for domain, of in target.items()},
              "split": judge.split, "documents": judge.documents,
              "command": COMMAND.format(seed), **machine()}
    for row, path in (("base", base), ("expert", work / "expert")):
        yield common | {"row": row, "lam": None,
                        "domains": paired(judge.folder(row, path), target)}
    for row, lam, options in MERGES:
        name = f"{row.split(',')[0]}-{lam}"
        folder, said = merged(work, name, options)
        yield common | {"row": row, "lam": lam, "command": said,
                        "domains": paired(judge.folder(name, folder), target)}
    start = read_model(work / "target")
    change = {}
    for name, tensor in read_model(work / f"merged-difference-{LAM}").items():
        if not torch.equal(tensor, start[name]):
            change[name] = tensor - start[name]
    for row in ("noise", "shuffled", "neighbour"):
        if row == "neighbour":
            control = neighbour(work / "target", base, work / "expert", LAM)
        else:
            control = {"noise": noise, "shuffled": shuffled}[row](change, seed)
        scores = judge.changed(f"{row}-{LAM}-{seed}", start, control)
        yield common | {"row": row, "lam": LAM, "domains": paired(scores, target)}


def main():
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path,
                        help="a Llama-type model, with its tokenizer")
    parser.add_argument("--work", type=Path, required=True,
                        help="for all models, 7 GB of them")
    parser.add_argument("--split", choices=("test", "validation"), default="test",
                        help="choose anything by validation, report test (the default)")
    parser.add_argument("--documents", type=int, default=48,
                        help="per domain (%(default)s)")
    parser.add_argument("--seed", type=int, default=1,
                        help="of what is dropped, the order and the controls (1: its "
                        "layers, 7 and 22, cost less than those of 0 and 2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", type=Path, help="file of the rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    make_models(args.folder, args.work, args.seed)
    judge = Judge(args.folder, args.work, args.split, args.documents)
    rows = list(table(args.folder, args.work, judge, args.seed))
    if args.record:
        keep(args.record, rows)
    sections.show(sections.sibling, Results(given={"sibling": rows}))


if __name__ == "__main__":
    main()
