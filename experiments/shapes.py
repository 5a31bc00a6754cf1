"""Merges across shapes, each beside the null controls that say what its number means:
Table 5, Figure 4; and a relative of another shape, made mergeable by match.py.

    python experiments/shapes.py --figure 4
    python experiments/shapes.py --matched

In:    the models of make_models.py, in float32. Target: base. Sources: large (deeper
       and wider) and base-seed2 (equal shapes), strangers that share only the data;
       and grown, a deeper and wider relative.
Out:   results/figure4, results/matched, and their sections. Every merge is one run of
       merge.py; the codec is the exact one: measured is the method.
Paper: Sec. 3.3, Table 5 and Fig. 4: lambda, with and without transport.
ours:  the controls. *zero* (shrinkage towards the mean latent), *noise* and *shuffled*
       hold no content of the source at all, and enter after the transport. *carried* is
       Gaussian noise in the place of the source, sent through the same transport:
       Sinkhorn's plan pairs each slot of the target with whatever resembles it.
Previous: merging.py. Next: codec.py.
"""
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from compare import (MODELS, Claim, cell, collect, command_line, difference, find, gain,
                     machine, over_seeds, pm_of, printed, sign, stacked, summary, table)
import match
from align import Moments, control_latents
from chunking import (StateDict, chunk, is_selected, measure, standardise, unchunk,
                      unstandardise)
from evaluate import DOMAINS
from make_models import cut, random_order
from merging import Sheet

LAMBDAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
ALIGNS = ("none", "mean", "gaussian", "sinkhorn")
SOURCES = ("large", "base-seed2", "grown")
ANYWHERE = ("zero", "noise", "shuffled")    # controls that hold nothing of any source
TABLE5 = (0.1, 1.0)         # the paper's lambdas: interpolation, transport only
C = 64                      # weights in a chunk of the exact codec
# Figure 4: only what is encoded takes part, equal shapes or not. What is compared are
# the latents alone, and a control must not receive the source's embeddings.
ENCODED = "mlp|self_attn"
LAM = 0.5                   # of the merges of the matched relative


# --- Sources that are made here -----------------------------------------------------
def in_order(target, source):
    """A relative of another shape in the target's order, shapes and names, by match.py;
    state dicts."""
    with tempfile.TemporaryDirectory() as folder:
        names = ("target", "source", "matched")
        files = [Path(folder, f"{name}.safetensors") for name in names]
        save_file(target, files[0])
        save_file(source, files[1])
        printed(match.main, *files[:2], "-o", files[2], "--quiet")
        return load_file(files[2])


def noise_like(source, seed):
    """A model without content: the encoded tensors' chunks are Gaussian, with the
    source's mean and covariance."""
    model = StateDict(source)
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(source)
    for name, entry in model.entries.items():
        if is_selected(entry):
            stats = measure(model, name)
            chunks_NC, _ = chunk(standardise(model.read(name), stats), C)
            drawn_NC = control_latents("noise", chunks_NC, Moments.of(chunks_NC),
                                       generator)
            flat_L = unstandardise(unchunk(drawn_NC.float(), entry.numel), stats)
            tensors[name] = flat_L.reshape(entry.shape)
    return tensors


# --- Figure 4 and Table 5 -----------------------------------------------------------
class Grid:
    """Merges into base, and the controls that each has to beat."""

    def __init__(self, sheet):
        self.sheet = sheet
        self.target = sheet.tensors("base")
        self.base = sheet.scores([self.target])
        self.controls = []      # (control, source, alignment, lambda, test scores)

    def row(self, tensors, lam, control=None, seed=None, source="", align=""):
        """Merge a source into base. A control is remembered; what is none is held
        against the controls of its lambda: those without content, and its own. `units`:
        the tensors are in base's order already."""
        flags = {"lam": lam, "select": ENCODED, "vae": "exact", "first": seed or 0}
        if control in ANYWHERE:
            flags["control"] = control
        elif align != "units":
            flags["align"] = align
        merged = self.sheet.merged(self.target, tensors, **flags)
        test = self.sheet.scores(merged)
        row = {"row": control or "cell", "source": source, "align": align,
               "control": control, "seed": seed, "lam": lam, "test": summary(test)}
        held = {"base": [self.base]}
        if control:
            self.controls.append((control, source, align, lam, test))
        else:
            # Validation chooses, test reports; no control is chosen.
            row["validation"] = summary(self.sheet.scores(merged, "validation"))
            for other, *of, scores in self.controls:
                if of == [source, align, lam] or other in ANYWHERE and of[2] == lam:
                    held.setdefault(other, []).append(scores)
        row["difference"] = {}
        for label, scores in held.items():
            row["difference"][label] = difference(test, stacked(scores)).record()
        return row | {"documents": test[DOMAINS[0]].shape[1], **machine()}


def measure_figure4(sheet):
    """Yields the rows: controls without content, then each source, in base's order
    as well if it is a relative."""
    grid = Grid(sheet)
    sources = [(name, sheet.tensors(name), ALIGNS, "sinkhorn") for name in SOURCES]
    for lam in LAMBDAS:
        yield grid.row(sources[0][1], lam, "zero")
        for seed in range(sheet.seeds):
            yield grid.row(sources[0][1], lam, "noise", seed)
            yield grid.row(sources[0][1], lam, "shuffled", seed)
    matched = in_order(grid.target, sheet.tensors("grown"))
    sources.append(("grown", matched, ["units"], "units"))
    for name, tensors, aligns, carrier in sources:
        for seed in range(sheet.seeds):
            noise = noise_like(tensors, seed)
            for lam in LAMBDAS:
                yield grid.row(noise, lam, "carried", seed, name, carrier)
        for align in aligns:
            for lam in LAMBDAS:
                yield grid.row(tensors, lam, source=name, align=align)


def curve(rows, **fields):
    """[(lambda, mean, standard error)]: difference to the target, the seeds of a
    control taken together."""
    chosen = find(rows, **{"control": None, **fields})
    points = []
    for lam in LAMBDAS:
        same = [row["difference"]["base"] for row in find(chosen, lam=lam)]
        if same:
            points.append((lam, *over_seeds(same)))
    return points


def chosen_cell(rows, source):
    """The cell of a source with the fewest bits on validation text."""
    found = find(rows, row="cell", source=source)
    return min(found, key=lambda row: row["validation"]["pooled"])


def cell_gain(row):
    """Against the target, then against every control."""
    return gain([(d["mean"], d["se"]) for d in row["difference"].values()])


def section_table5(rows):
    lines = []
    for lam in TABLE5:
        for row in find(rows, row="cell", lam=lam):
            line = [f"{row['source']}: {row['align']}", f"{lam:g}"]
            for label in ("base", *ANYWHERE, "carried"):
                line.append(cell(row["difference"].get(label)))
            lines.append(line)
    return table(["source: alignment", "lambda", "minus base", *ANYWHERE, "carried"],
                 lines)


def section_figure4(rows):
    lines = []
    for source in SOURCES:
        row = chosen_cell(rows, source)
        base, *controls = row["difference"].values()
        beaten = sum(sign(d["mean"], d["se"]) < 0 for d in controls)
        lines.append([f"`{source}`", row["align"], f"{row['lam']:g}", cell(base),
                      f"{beaten} of {len(controls)}", cell_gain(row)])
    return table(["source", "alignment", "lambda", "minus base", "controls beaten",
                  "verdict"], lines)


# --- A relative, matched, then merged -----------------------------------------------
def measure_matched(sheet):
    """Yields the rows: `grown` in base's order, merged at LAM, the embedding too; and
    controls of the same command."""
    base = sheet.tensors("base")
    matched = in_order(base, sheet.tensors("grown"))
    half = {"lam": LAM, "vae": "exact"}
    yield sheet.row("base", "parent", [base], {})
    against = {"base": "base"}
    for control in ANYWHERE:
        seeds = 1 if control == "zero" else sheet.seeds
        found = sheet.merged(base, matched, control=control, seeds=seeds, **half)
        yield sheet.row(control, "control", found)
        against[control] = control
    others = {"matched, its units in random order":
              cut(matched, *random_order(matched, seed=1)),
              "a stranger (base-seed2)": sheet.tensors("base-seed2")}
    for name, tensors in others.items():
        yield sheet.row(name, "control", sheet.merged(base, tensors, **half))
        against[name] = name
    found = sheet.merged(base, matched, **half)
    yield sheet.row("grown, matched", "latent", found, against)


def section_matched(rows):
    [ours] = find(rows, row="grown, matched")
    lines = []
    for row in rows[1:]:
        by_domain = [cell(row["domains"][domain]) for domain in DOMAINS]
        lines.append([row["row"], row["seeds"], cell(row["difference"]["base"]),
                      *by_domain, cell(ours["difference"].get(row["row"]))])
    return table(["merged into base, lambda 0.5", "seeds", "minus base", *DOMAINS,
                  "grown, matched, minus this"], lines)


# --- Claims and the command ---------------------------------------------------------
def claims(records):
    rows = records["figure4"]
    for row in find(rows, row="cell", source="large", align="gaussian", lam=0.1):
        yield Claim("another shape gains at lambda 0.1", "WinoGrande 56.8 → 57.8",
                    f"{pm_of(row['difference']['base'])} to the target", cell_gain(row),
                    "Table 5: another architecture", "unrelated weights do harm")
    for row in find(rows, row="cell", source="large", align="sinkhorn", lam=0.1):
        d = row["difference"]["carried"]
        word = "holds" if sign(d["mean"], d["se"]) < 0 else "not reproduced"
        yield Claim("transport makes the difference", "unstable without",
                    f"{pm_of(d)} to noise, same transport", word,
                    "Figure 4: lambda, alignment, controls")
    for row in find(records["matched"], row="grown, matched"):
        d = row["difference"]["base"]
        yield Claim("a relative of another shape, matched, lambda 0.5", "",
                    f"{pm_of(d)} to the target: {cell_gain(row)}", "ours",
                    "A relative of another shape",
                    "matched by match.py, the two merged beat it")


def main():
    parser = command_line(__doc__)
    parser.add_argument("--figure", choices=("4",), help="and Table 5: half an hour")
    parser.add_argument("--matched", action="store_true", help="grown, as base")
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    sheet = Sheet(args.models, args.seeds)
    if args.figure:
        rows = tqdm(measure_figure4(sheet), unit="merge", disable=args.quiet)
        rows = collect("figure4", rows, args)
        print(section_table5(rows), section_figure4(rows), sep="\n")
    if args.matched:
        rows = tqdm(measure_matched(sheet), unit="row", disable=args.quiet)
        print(section_matched(collect("matched", rows, args)))


if __name__ == "__main__":
    main()
