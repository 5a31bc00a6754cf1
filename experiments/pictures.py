"""Two pictures as rows: clouds of latents under alignment, spectra of weights.

    python experiments/pictures.py [--also NAME FILE] [--record experiments/results]

In:    models base and large; with --also any other checkpoint, by a name.
Out:   clouds.jsonl, a row per alignment: the latents of one tensor of base (the target)
       and those of its partner in large (the source, in the target's slots), at most
       300 each, in the two leading principal components of the target's. "none" is what
       line 3 projects. By the exact codec.
       spectra.jsonl, a row per model and role: the variance of its standardised chunks
       that the first 1, 2, ..., C principal directions explain, beside as many chunks
       of white noise.
Paper: Sec. 3.3 (transport); Fig. 2 (spectra of whole matrices, see
       tools/weight_statistics.py).
ours:  the pictures of clouds; spectra of chunks, which are what the VAE sees: at ratio
       r the best linear codec keeps the first C / r directions.
Previous: learning_curves.py. Next: bench.py.
"""
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "tools")]
from align import ALIGNERS
from chunking import ROLES, Checkpoint, spans
from codec_tables import Model, pca
from grid import encoded_pairs
from lsmerge import Alignment, Codec, Transport
from records import command_line, keep, machine
from vae import generator_for
from weight_statistics import spectrum

CHUNK = 64
POINTS = 300            # of a cloud, at most
COMMAND = "python experiments/pictures.py --also NAME FILE --record experiments/results"


# --- Clouds ---------------------------------------------------------------------------
def brought(target, source, method):
    """The source's latents in the target's slots, (J, Z)."""
    transport = Transport(target, source, Alignment(method))
    pieces = []
    for j0, j1 in spans(target.N, transport.per_piece):
        pieces.append(transport.align(target.latents(j0, j1), j0, j1))
    return torch.cat(pieces)


def cloud(z_NZ, mean_Z, axes_Z2):
    """At most POINTS of the latents as [[x, y], ...], in a random order, the same for
    all clouds of this length. (A row of the target's matrix is two chunks: of an
    ordered list, a picture that takes every second point would show one half of each
    row.)"""
    shown = torch.randperm(len(z_NZ), generator=generator_for(0))[:POINTS]
    flat_N2 = (z_NZ[shown].double() - mean_Z) @ axes_Z2
    return [[round(x, 3), round(y, 3)] for x, y in flat_N2.tolist()]


def measure_clouds(target, source):
    """A row per aligner, of two encoded tensors."""
    mean_Z, ascending_Z2 = pca(target.z_NZ.double(), 2)
    axes = (mean_Z, ascending_Z2.flip(1))       # the larger component first
    rows = []
    for method in ALIGNERS:
        rows.append({"align": method, "source": cloud(brought(target, source, method),
                                                      *axes),
                     "target": cloud(target.z_NZ, *axes), **machine(),
                     "command": COMMAND})
    return rows


# --- Spectra --------------------------------------------------------------------------
def cumulative(chunks_NC):
    """The share of the variance in the first 1, 2, ..., C principal directions."""
    C = chunks_NC.shape[1]
    return [round(share, 5) for share in spectrum(chunks_NC, np.arange(1, C + 1) / C)]


def reading_order(role):
    """Attention before the MLP, as in the table of names; a role that is not in it
    last."""
    return [*(known for known, _ in ROLES), role].index(role)


def measure_spectra(name, model):
    rows = []
    for role in sorted({stats.place.role for stats in model.stats}, key=reading_order):
        part = replace(model,
                       stats=[one for one in model.stats if one.place.role == role])
        chunks_NC = part.chunks(CHUNK).numpy()
        white_NC = np.random.default_rng(0).standard_normal(chunks_NC.shape)
        rows.append({"model": name, "role": role, "cumulative": cumulative(chunks_NC),
                     "white": cumulative(white_NC), **machine(), "command": COMMAND})
    return rows


# --- The command ----------------------------------------------------------------------
def show(clouds, spectra):
    print("clouds: variance of the two components")
    print(f"{'':<10}{'source':>20}{'target':>20}")
    for row in clouds:
        sides = [np.var(row[side], axis=0) for side in ("source", "target")]
        print(f"{row['align']:<10}" + "".join(f"{x:>12.3f}{y:>8.3f}" for x, y in sides))
    print("spectra: share of the variance in the leading quarter (white noise)")
    for row in spectra:
        quarter = CHUNK // 4 - 1
        print(f"{row['model']:<20} {row['role']:<10}{row['cumulative'][quarter]:.3f} "
              f"({row['white'][quarter]:.3f})")


def main():
    parser = command_line(__doc__)
    parser.add_argument("--also", nargs=2, action="append", default=[],
                        metavar=("NAME", "FILE"),
                        help="the spectra of this checkpoint as well")
    parser.add_argument("--record", type=Path, help="folder of the rows")
    args = parser.parse_args()
    base = HERE / "models" / "base.safetensors"
    large = HERE / "models" / "large.safetensors"
    pairs = encoded_pairs(Checkpoint(base), Checkpoint(large), Codec.load("exact"))
    first = next(pair for pair in pairs if pair.target.stats.place.role == "q")
    clouds = measure_clouds(first.target, first.source)
    spectra = measure_spectra("base", Model.open(base))
    for name, path in args.also:
        spectra += measure_spectra(name, Model.open(path))
    show(clouds, spectra)
    if args.record:
        keep(args.record / "clouds.jsonl", clouds)
        keep(args.record / "spectra.jsonl", spectra)


if __name__ == "__main__":
    main()
