"""Relatives of other shapes: who is one, how far may it drift, what does a pruned model gain?

    python experiments/relatives.py --kinship --pruned --drift [--record experiments/results]

In:    the models of make_models.py.
Out:   kinship.jsonl   per pair of models: cosine of matched layers, and that of strangers
       pruned.jsonl    `pruned` + lambda (`code` - `base`) through merge.py, beside controls
       drift.jsonl     a permuted `arithmetic` that is trained on with code for n steps, or whose MLP
                       units are re-initialised in part: its kinship with `base`, and base's
                       difference after a merge at lambda 0.5
Paper: merges across shapes by chunks alone (Sec. 3.3). ours: hidden units are matched first.
       Controls of a difference are those of real_sibling.py.
Previous: transfer_tables.py. Next: real_model.py.
"""
import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import merge
from chunking import Checkpoint
from evaluate import DOMAINS
from make_models import Spec, scramble, train, training_text
from real_sibling import LAM, neighbour, noise, shuffled
from scores import append, difference, machine, score
from tiny_lm import TinyLM

MODELS = HERE / "models"
NAMES = ("base", "code", "prose", "arithmetic", "base-seed2", "large", "grown", "pruned")
DRIFT = (0, 100, 300, 1000, 3000)       # steps
SHARES = (0.25, 0.5, 0.75)              # of the units, re-initialised


def checkpoint(name):
    return Checkpoint(MODELS / f"{name}.safetensors")


# --- Who is a relative? ---------------------------------------------------------------------------
def kinship_rows():
    for one, other in itertools.permutations(NAMES, 2):
        target, source = checkpoint(one), checkpoint(other)
        found = merge.match(target, source)
        yield {"source": other, "target": one, "related": found.related, "layers": found.layers,
               "similarity": [round(value, 4) for value in found.similarity],
               "null": round(found.null, 4),
               "matrix": found.similarity_JI.T.numpy().round(3).tolist(),
               "command": "python experiments/relatives.py --kinship", **machine()}


# --- A pruned model and its bigger sibling's expert -----------------------------------------------
def merged(folder, *arguments):
    """The tensors that merge.py writes."""
    path = Path(folder) / "merged.safetensors"
    assert not merge.main([*map(str, arguments), "-o", str(path), "--force", "--quiet"])
    return load_file(path)


def change_of(end, before):
    """{domain: mean, se, loss} of a model's difference to the target, in bits per byte."""
    after, found = score(end), {}
    for domain in DOMAINS:
        d = difference(after, before, (domain,))
        found[domain] = {"mean": d.mean, "se": d.se, "loss": float(after[domain].mean())}
    return found


def pruned_rows(seeds=5, lams=(0.3, 0.5, 1.0)):
    """Rows of the matched difference at every lambda, of the controls at 0.5."""
    start = {n: t.float() for n, t in load_file(MODELS / "pruned.safetensors").items()}
    before, names = score(start), ("pruned", "code", "base")
    paths = [MODELS / f"{name}.safetensors" for name in names]
    flags = [*paths[:2], "--base", paths[2], "--operator", "task-arithmetic", "--lam"]
    facts = {"command": "python experiments/relatives.py --pruned", **machine()}
    with tempfile.TemporaryDirectory() as folder:
        for lam in lams:
            end = merged(folder, *flags, lam)
            if lam == LAM:
                change = {name: end[name].float() - tensor for name, tensor in start.items()}
            yield {"row": "difference, matched", "lam": lam, "seed": 0,
                   "domains": change_of(end, before), **facts}
    change = {name: tensor for name, tensor in change.items() if tensor.any()}
    target, expert, base = map(checkpoint, names)
    beside = neighbour(target, expert, base, merge.match(target, base), LAM)
    controls = [(row, seed, control(change, seed)) for seed in range(seeds)
                for row, control in (("noise", noise), ("shuffled", shuffled))]
    for row, seed, control in [*controls, ("neighbour", 0, beside)]:
        end = {name: tensor + control.get(name, 0) for name, tensor in start.items()}
        yield {"row": row, "lam": LAM, "seed": seed, "domains": change_of(end, before), **facts}


# --- How far may it drift? ------------------------------------------------------------------------
def drift_row(steps, share, tensors, before):
    """A relative in a random order of its hidden units; what base gains by it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "relative.safetensors"
        save_file({n: t.contiguous() for n, t in scramble(tensors, seed=5)[0].items()}, path)
        base = MODELS / "base.safetensors"
        found = merge.match(Checkpoint(base), Checkpoint(path))
        end = merged(folder, base, path, "--align", "units", "--lam", 0.5)
    cosines = [value for value, i in zip(found.similarity, found.layers) if i is not None]
    return {"steps": steps, "share": share, "related": found.related, "layers": found.layers,
            "kinship": float(np.mean(cosines or found.similarity)), "null": found.null,
            "difference": {domain: {key: value[key] for key in ("mean", "se")}
                           for domain, value in change_of(end, before).items()},
            "command": "python experiments/relatives.py --drift", **machine()}


def reinitialised(tensors, share, seed=6):
    """This share of every layer's MLP units anew, each matrix with its own spread."""
    new = {name: tensor.clone() for name, tensor in tensors.items()}
    generator = torch.Generator().manual_seed(seed)
    for layer in range(sum("input_layernorm" in name for name in tensors)):
        names = [f"model.layers.{layer}.mlp.{role}_proj.weight" for role in ("gate", "up", "down")]
        units = torch.randperm(len(new[names[0]]), generator=generator)
        units = units[:round(share * len(units))]
        for name in names:
            rows = new[name].T if "down" in name else new[name]         # a view
            fresh = torch.randn(len(units), rows.shape[1], generator=generator)
            rows[units] = (fresh * rows.float().std()).to(rows.dtype)
    return new


def drift_rows(quiet):
    """Snapshots of one training, then partial relatives."""
    start = load_file(MODELS / "arithmetic.safetensors")
    before = score(load_file(MODELS / "base.safetensors"))
    spec = Spec(seed=31, steps=DRIFT[-1], lr=1e-3, mixture=(1, 0, 0))
    texts = [training_text(domain) for domain in DOMAINS]
    model, steps = TinyLM.from_state_dict(start).train(), iter(range(spec.steps))
    yield drift_row(0, 0.0, start, before)
    for share in SHARES:
        yield drift_row(0, share, reinitialised(start, share), before)
    for done, wanted in itertools.pairwise(DRIFT):
        bar = tqdm(itertools.islice(steps, wanted - done), total=wanted - done, disable=quiet)
        train(model, spec, texts, bar)      # its optimiser starts anew at each snapshot
        tensors = {n: t.detach().clone() for n, t in model.state_dict().items()}
        yield drift_row(wanted, 0.0, tensors, before)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("kinship", "pruned", "drift", "quiet"):
        parser.add_argument("--" + flag, action="store_true")
    parser.add_argument("--record", type=Path, help="folder of the JSON lines, appended to")
    args = parser.parse_args()
    for name, rows in (("kinship", kinship_rows() if args.kinship else ()),
                       ("pruned", pruned_rows() if args.pruned else ()),
                       ("drift", drift_rows(args.quiet) if args.drift else ())):
        for row in rows:
            shown = {key: row[key] for key in row if key not in ("matrix", "command", *machine())}
            print(shown, flush=True)
            if args.record:
                append(args.record / f"{name}.jsonl", [row])


if __name__ == "__main__":
    main()
