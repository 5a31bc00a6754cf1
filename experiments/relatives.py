"""Relatives of other shapes: who is one, and what does a pruned model gain?

    python experiments/relatives.py --kinship --pruned [--record experiments/results]

In:    the models of make_models.py.
Out:   kinship.jsonl   per pair of models: cosine of matched layers, and of strangers
       pruned.jsonl    `pruned` + lambda (`code` - `base`), beside controls: noise of
                       the difference's norm per tensor, its runs of 64 weights
                       shuffled, the layers' neighbours
Paper: merges across shapes by chunks alone (Sec. 3.3). ours: hidden units are matched
       first, by tools/match.py. Then shapes agree, and merge.py does the rest.
Previous: transfer_tables.py. Next: real_sibling.py.
"""
import contextlib
import io
import itertools
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "tools")]
import match
import merge
import sections
from chunking import Checkpoint
from evaluate import DOMAINS
from grid import write_in_order
from records import Results, command_line, keep, machine
from scores import difference, score

MODELS = HERE / "models"
NAMES = ("base", "code", "prose", "arithmetic", "base-seed2", "large", "grown",
         "pruned")
LAMBDAS = (0.3, 0.5, 1.0)
LAM = 0.5           # of the controls
# weights that the shuffled control keeps together: a chunk of the codec
RUN = 64


def model(name):
    return MODELS / f"{name}.safetensors"


# --- Who is a relative? ---------------------------------------------------------------
def kinship_rows():
    for one, other in itertools.permutations(NAMES, 2):
        found = match.find_kinship(*match.open_layers(Checkpoint(model(one)),
                                                      Checkpoint(model(other))))
        yield {"source": other, "target": one, "related": found.related,
               "layers": list(found.layers.values()),
               "similarity": [round(value, 4) for value in found.similarity],
               "null": round(found.null, 4),
               "matrix": found.similarity_JI.T.numpy().round(3).tolist(),
               "command": "python experiments/relatives.py --kinship", **machine()}


# --- Controls: what else could a difference of weights do? ----------------------------
def generator(seed, number):
    return torch.Generator().manual_seed(1000 * seed + number)


def noise(change, seed):
    """Gaussian, per tensor of the change's norm."""
    new = {}
    for number, (name, tensor) in enumerate(change.items()):
        drawn = torch.randn(tensor.shape, generator=generator(seed, number))
        new[name] = drawn * (tensor.norm() / drawn.norm())
    return new


def shuffled(change, seed):
    """Runs of RUN weights in random order, within each tensor; a shorter last one
    stays."""
    new = {}
    for number, (name, tensor) in enumerate(change.items()):
        flat = tensor.flatten().clone()
        runs = flat[:len(flat) // RUN * RUN].view(-1, RUN)
        runs.copy_(runs[torch.randperm(len(runs), generator=generator(seed, number))])
        new[name] = flat.view(tensor.shape)
    return new


def neighbour(target, base, expert, lam):
    """lam (expert - base), by the match of the base with every layer one off; what
    stands outside the layers (the embedding) is as in the difference itself. Paths."""
    sides = []
    with tempfile.TemporaryDirectory() as folder:
        for number, source in enumerate((expert, base)):
            path = Path(folder) / f"{number}.safetensors"
            file = Checkpoint(write_in_order(path, target, source, neighbour=True,
                                             like=base))
            sides.append({name: file.read_tensor(name).float()
                          for name in file.entries})
    return {name: lam * (tensor - sides[1][name]) for name, tensor in sides[0].items()}


# --- A pruned model and its bigger sibling's expert -----------------------------------
def run(command, *arguments):
    """match.py or merge.py, without its prints."""
    unheard = io.StringIO()
    with contextlib.redirect_stdout(unheard), contextlib.redirect_stderr(unheard):
        code = command([*map(str, arguments), "--quiet"])
    if code:
        raise SystemExit(unheard.getvalue())


def change_of(end, before):
    """{domain: mean, se, loss} of a model's difference to the target, in bits per
    byte."""
    after = score(end)
    found = {}
    for domain in DOMAINS:
        d = difference(after, before, (domain,))
        found[domain] = {"mean": d.mean, "se": d.se,
                         "loss": float(after[domain].mean())}
    return found


def pruned_rows(seeds=5):
    """Rows of the matched difference at every lambda, of the controls at LAM."""
    paths = [model(name) for name in ("pruned", "base", "code")]
    start = {name: tensor.float() for name, tensor in load_file(paths[0]).items()}
    before = score(start)
    facts = {"command": "python experiments/relatives.py --pruned", **machine()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(match.main, *paths, "-o", folder / "matched")
        base = folder / "matched" / "base.safetensors"
        expert = folder / "matched" / "code.safetensors"
        for lam in LAMBDAS:
            run(merge.main, paths[0], expert, "--base", base, "--operator",
                "task-arithmetic",
                f"--lam={lam}", "-o", folder / "merged.safetensors", "--force")
            end = load_file(folder / "merged.safetensors")
            yield {"row": "difference, matched", "lam": lam, "seed": 0,
                   "domains": change_of(end, before), **facts}
            if lam == LAM:
                change = {key: end[key].float() - tensor for key,
                          tensor in start.items()}
    controls = [("neighbour", 0, neighbour(*paths, LAM))]
    for seed in range(seeds):
        controls.append(("noise", seed, noise(change, seed)))
        controls.append(("shuffled", seed, shuffled(change, seed)))
    for row, seed, control in controls:
        end = {key: tensor + control[key] for key, tensor in start.items()}
        yield {"row": row, "lam": LAM, "seed": seed, "domains": change_of(end, before),
               **facts}


def main():
    parser = command_line(__doc__)
    parser.add_argument("--kinship", action="store_true")
    parser.add_argument("--pruned", action="store_true")
    parser.add_argument("--record", type=Path, help="folder of the rows")
    args = parser.parse_args()
    for name, wanted, measure, view in (
            ("kinship", args.kinship, kinship_rows, sections.kinship),
            ("pruned", args.pruned, pruned_rows, sections.pruned)):
        if wanted:
            rows = list(measure())
            if args.record:
                keep(args.record / f"{name}.jsonl", rows)
            sections.show(view, Results(given={name: rows}))


if __name__ == "__main__":
    main()
