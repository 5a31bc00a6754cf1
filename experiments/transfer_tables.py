"""Table 5 and Figure 4 in miniature: what a source of another shape brings to a target.

    python experiments/paper_tables.py --figure 4 --documents 48 [--quick]

In:    the models of make_models.py. Target: base. Sources: large (deeper and wider) and
       base-seed2 (equal shapes, another origin, so that nothing but the data is
       shared); and grown, a deeper and wider relative, also with its hidden units
       matched by weights (ours: "units", by tools/match.py).
Out:   a row per merged model. The codec is the exact one: what is measured is the
       method.
Paper: Sec. 4, Table 5 (LLaMA-3.2-1B -> Gemma-3-1B) and Fig. 4 (Gemma 4B -> 1B): lambda
       curves with and without transport. differs: bits per byte instead of benchmarks.
ours:  every cell is held against the null controls of grid.py; the one reported for a
       source is chosen on validation text and judged on test text.
Previous: grid.py. Next: merging_tables.py.
"""
import tempfile
from pathlib import Path

from tqdm import tqdm

from chunking import Checkpoint
from grid import Cell, Grid, encoded_pairs, facts_of, write_in_order
from lsmerge import Codec, convex_coefficients
from scores import QUICK
from vae import VAE, VAEConfig, generator_for

LAMBDAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
ALIGNS = ("none", "mean", "gaussian", "sinkhorn")
# How layers meet. Of models of equal depth the first two are the same.
PAIRINGS = {"large": ("depth", "index"), "base-seed2": ("depth",),
            "grown": ("depth", "weights")}
TABLE5 = (0.1, 1.0)         # the paper's lambdas: interpolation, transport only
# the paper's chunk: of them a tensor has fewer than latent numbers
LONG = 640


def plain_average(grid, source, lambdas):
    """Weight space, every float tensor, embeddings too: the usual soup of two models of
    equal shapes. A baseline: it mixes more than the latent cells do."""
    other = Checkpoint(source)
    for lam in lambdas:
        own, given = convex_coefficients([lam])
        tensors = {}
        for name, mine in grid.tensors.items():
            merged = own * mine.double() + given * other.read_tensor(name).double()
            tensors[name] = merged.to(mine.dtype)
        grid.score(Cell(source.stem, "weights", "depth", lam), tensors)


def measure_by_chunks(grid, source, pairing, seeds):
    """Every alignment of one source, and noise in its place through the last,
    Sinkhorn's."""
    grid.measure_source(source, source.stem, ALIGNS, pairing, LAMBDAS)
    grid.measure_carried(source, source.stem, ALIGNS[-1], pairing, LAMBDAS, seeds)


def measure_by_units(grid, base, source, folder, seeds):
    """A relative whose units are matched, noise in its place, and its neighbouring
    layers."""
    file = write_in_order(folder / "matched.safetensors", base, source)
    beside = write_in_order(folder / "beside.safetensors", base, source, neighbour=True)
    grid.measure_source(file, source.stem, ["units"], "weights", LAMBDAS)
    grid.measure_carried(file, source.stem, "units", "weights", LAMBDAS, seeds)
    grid.measure_source(beside, source.stem, ["units"], "weights", LAMBDAS, "neighbour")


def measure_few(base, source, seeds, documents):
    """What n < d does: chunks so long that a tensor has fewer of them than latent
    numbers."""
    config = VAEConfig(chunk=LONG, width=LONG, blocks=0, init="pca")
    codec = Codec(VAE(config).start(generator_for(0)))
    grid = Grid(base, codec, documents)
    grid.measure_base(source)
    grid.measure_source(source, source.stem, ["gaussian"], "depth", TABLE5)
    grid.measure_controls(source, TABLE5, seeds)
    pairs = encoded_pairs(Checkpoint(base), Checkpoint(source), codec)
    most = max(pair.target.N for pair in pairs)
    # n / d
    rows = grid.rows(facts_of(codec, [base, source]) | {"few": most / codec.Z})
    return [row for row in rows if row["row"] not in ("base", "round trip")]


def measure_transfer(models, seeds=5, documents=None, quick=False, quiet=False,
                     names=PAIRINGS):
    """The rows of Table 5 and Figure 4, for these sources."""
    documents = QUICK if quick else documents
    base = models / "base.safetensors"
    sources = [models / f"{name}.safetensors" for name in names]
    codec = Codec.load("exact")
    with tqdm(desc="cells",
              disable=quiet) as bar, tempfile.TemporaryDirectory() as folder:
        grid = Grid(base, codec, documents, bar)
        grid.measure_base(sources[0])
        for source in sources:
            for pairing in PAIRINGS[source.stem]:
                if pairing == "weights":
                    measure_by_units(grid, base, source, Path(folder), seeds)
                else:
                    measure_by_chunks(grid, source, pairing, seeds)
        if "base-seed2" in names:
            plain_average(grid, models / "base-seed2.safetensors", LAMBDAS)
        grid.measure_controls(sources[0], LAMBDAS, seeds)
        rows = grid.rows(facts_of(codec, [base, *sources]) | {"few": None})
    if "large" in names:
        rows += measure_few(base, models / "large.safetensors", seeds, documents)
    return rows
