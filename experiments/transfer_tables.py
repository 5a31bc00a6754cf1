"""Table 5 and Figure 4 in miniature: what a source of another shape brings to a target.

    python experiments/paper_tables.py --table 5 --figure 4 [--quick]

In:    the models of make_models.py. Target: base. Sources: large (deeper and wider) and base-seed2
       (equal shapes, another origin, so that nothing but the data is shared); and grown, a deeper
       and wider relative, also with its hidden units matched by weights (ours: "units").
Out:   printed tables, and a record per merged model, which paper_tables.py appends to results/.
Paper: Sec. 4, Table 5 (LLaMA-3.2-1B -> Gemma-3-1B) and Fig. 4 (Gemma 4B -> 1B): lambda curves with
       and without transport. differs: bits per byte instead of benchmarks.
ours:  every cell is held against the null controls of grid.py; the one reported for a source is
       chosen on validation text and judged on test text.
Left out on purpose: the picture. Previous: grid.py. Next: merging_tables.py.
"""
from tqdm import tqdm

from chunking import Checkpoint
from grid import (CONTROLS, HEAD, YES, Cell, Grid, facts_of, mean_control, records, row_text,
                  trained_codec)
from lsmerge import combine, convex_coefficients
from scores import QUICK, find
from train import Schedule
from vae import VAEConfig

LAMBDAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
ALIGNS = ("none", "mean", "gaussian", "sinkhorn")
# Of models of equal depth both pairings are the same.
PAIRINGS = {"large": ("depth", "index"), "base-seed2": ("depth",), "grown": ("depth", "weights")}
REPORTED = {1.0: "only (lambda 1)", 0.1: "+ interpolation (0.1)"}       # the lambdas of Table 5
# The paper's own figures, for orientation: WinoGrande / ARC-C / HellaSwag (%), higher is better.
PAPER = {"base": "56.83 / 42.78 / 49.07", 1.0: "51.13 / 34.25 / 48.50",
         0.1: "57.75 / 43.34 / 50.10"}


# --- Measuring ------------------------------------------------------------------------------------
def plain_average(grid, source, lambdas):
    """Weight space, every float tensor, embeddings too: the usual soup of two models of equal
    shapes. A baseline: it mixes more than the latent cells do."""
    other = Checkpoint(source)
    for lam in lambdas:
        weights, tensors = convex_coefficients([lam]), {}
        for name, mine in grid.tensors.items():
            pair = [mine.double(), other.read_tensor(name).double()]
            tensors[name] = combine(pair, weights).to(mine.dtype)
        grid.score(Cell(source.stem, "weights", "depth", lam), tensors)


def transfer_grid(models, seeds, documents, quiet, names):
    """(rows of Table 5 and Figure 4, the cell chosen for each source)."""
    base, sources = models / "base.safetensors", [models / f"{name}.safetensors" for name in names]
    codec, stages = trained_codec(base, sources, VAEConfig())
    lines = [(source, pairing) for source in sources for pairing in PAIRINGS[source.stem]]
    weights = sum(pairing == "weights" for _, pairing in lines)
    cells = 2 + len(LAMBDAS) * ((len(lines) - weights) * (len(ALIGNS) + seeds)
                                + weights * (2 + seeds) + 1 + 2 * seeds + ("base-seed2" in names))
    with tqdm(total=cells, desc="cells", disable=quiet) as bar:
        grid = Grid(base, codec, documents, bar)
        grid.measure_base(sources[0])
        for source, pairing in lines:
            aligns = ("units",) if pairing == "weights" else ALIGNS
            grid.measure_source(source, aligns, pairing, LAMBDAS)
            grid.measure_carried(source, aligns[-1], pairing, LAMBDAS, seeds)
            if pairing == "weights":
                grid.measure_source(source, aligns, pairing, LAMBDAS, control="neighbour")
        if "base-seed2" in names:
            plain_average(grid, models / "base-seed2.safetensors", LAMBDAS)
        grid.measure_controls(sources[0], LAMBDAS, seeds)
    facts = facts_of(codec, stages, [base, *sources]) | {"few": None}
    rows = records(grid, facts)
    if "large" in names:
        rows += few_samples(base, models / "large.safetensors", seeds, documents)
    return rows, [grid.choose(source.stem) for source in sources]


def few_samples(base, source, seeds, documents, chunk=640, lambdas=(0.1, 1.0)):
    """What n < d does: chunks so long (the paper's 640) that a tensor has fewer of them than latent
    numbers. Without blocks the warm start is an exact linear codec: nothing to train."""
    config = VAEConfig(chunk=chunk, width=chunk, blocks=0)
    codec, stages = trained_codec(base, [source], config, Schedule(steps1=0, steps2=0))
    grid = Grid(base, codec, documents)
    grid.measure_base()
    grid.measure_source(source, ("gaussian",), "depth", lambdas)
    grid.measure_controls(source, lambdas, seeds)
    most = max(target.N for _, target, _ in grid.pairs(source, "depth"))
    facts = facts_of(codec, stages, [base, source]) | {"few": most / codec.Z}   # the largest n / d
    return [row for row in records(grid, facts) if row["row"] != "base"]


def measure_transfer(models, seeds=5, documents=None, quick=False, quiet=False, names=PAIRINGS):
    """(rows, chosen cells) of one grid for both, the table and the figure."""
    return transfer_grid(models, seeds, QUICK if quick else documents, quiet, names)


def of_table5(rows, chosen):
    """The records that the table holds: its lambdas, and whatever was chosen."""
    return [row for row in rows if row["lam"] in (0.0, *REPORTED)
            or any(find([row], **cell._asdict()) for cell in chosen)]


def of_figure4(rows):
    """The records of the curves: all that are at the usual chunk size."""
    return [row for row in rows if not row["few"]]


# --- Printing -------------------------------------------------------------------------------------
def paper_note(lam, note=""):
    return f"{note:<20} paper {PAPER[lam]}"


def print_table5(rows, chosen):
    """As the paper's: base, OT only (lambda = 1), OT + interpolation at lambda = 0.1, and what the
    controls do there."""
    print("\nTable 5 in miniature: bits per byte on test text (lower is better), then paired "
          "differences ± standard error. On the right,\nfor orientation, the paper's accuracies "
          "(WinoGrande / ARC-C / HellaSwag, higher is better)")
    print(HEAD)
    print(row_text("base", find(rows, row="base")[0], paper_note("base")))
    print(row_text("round trip of the codec alone", find(rows, row="round trip")[0]))
    for source in dict.fromkeys(row["source"] for row in find(rows, row="cell")):
        for lam in REPORTED:
            for row in find(rows, row="cell", source=source, lam=lam):
                if row["pairing"] != "index":
                    print_cell5(row)
    for lam in REPORTED:
        for control in CONTROLS[:3]:
            row = mean_control(find(rows, few=None), control, lam)
            print(row_text(f"control {control}, lambda {lam:g}", row, row["seeds"]))
    print("\nVerdict per source: the cell (lambda, alignment, pairing) chosen on validation text, "
          "judged on test text")
    for cell in chosen:
        name = f"{cell.source}: {cell.align}, {cell.pairing}, lambda {cell.lam:g}"
        row = find(rows, few=None, **cell._asdict())[0]
        print(row_text(name, row, row["verdict"]))


def print_cell5(row):
    align = "plain average" if row["align"] == "weights" else row["align"]
    few = f", c = {row['chunk']}" if row["few"] else ""
    beats = YES[row["beats_controls"]]
    transported = row["align"] in ("gaussian", "sinkhorn")  # what the paper's figures are about
    print(row_text(f"{row['source']}: {align} {REPORTED[row['lam']]}{few}", row,
                   paper_note(row["lam"], beats) if transported else beats))


def print_figure4(rows):
    """Curves over lambda; (a) with, (b) without transport."""
    rows = of_figure4(rows)
    base, cells = find(rows, row="base")[0]["test"]["pooled"], find(rows, row="cell")
    lambdas = sorted({row["lam"] for row in cells})
    print("\nFigure 4 in miniature: pooled bits per byte on test text minus the base's "
          f"{base:.4f}; * = better than every control by > 2 se")
    print(f"{'':<48}" + "".join(f"{lam:>10g}" for lam in lambdas))
    for curve in dict.fromkeys(curve_of(row) for row in cells):
        source, align, pairing = curve
        panel = "b" if align in ("none", "weights") else "a"
        line = {row["lam"]: row for row in cells if curve_of(row) == curve}
        values = [f"{line[lam]['difference']['base']['mean']:>+9.4f}"
                  + ("*" if line[lam]["beats_controls"] else " ") for lam in lambdas]
        print(f"{panel}  {f'{source}, {align}, pairing by {pairing}':<45}" + "".join(values))
    controls = [row for row in rows if row["control"]]
    for control, curve in dict.fromkeys((row["control"], curve_of(row)) for row in controls):
        means = [mean_control(rows, control, lam, curve)["difference"]["base"]["mean"]
                 for lam in lambdas]
        name = " ".join(["control", control, *curve]).strip()
        print(f"   {name:<45}" + "".join(f"{mean:>+9.4f} " for mean in means))


def curve_of(row):
    return row["source"], row["align"], row["pairing"]
