"""weight_statistics.py: what a model's weights look like, for any checkpoint.

    python experiments/tools/weight_statistics.py CHECKPOINT [--json]

Paper: Sec. 3.1. Table 1, moments: heavy tails, so that an encoder must keep rare large
       weights. Fig. 2, the share of the variance that the leading principal components
       explain: it rises fast, taken as evidence of a low-dimensional set.
ours:  white noise beside it: only what lies above is structure.
"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from chunking import Checkpoint, Parser, command, is_selected, measure, need, say

MOMENTS = ("mean", "variance", "skewness", "kurtosis")
RANKS = (0.05, 0.1, 0.25, 0.5, 0.75)        # fractions of all components


def moments(matrix):
    """Mean, variance, skewness, excess kurtosis (0 for Gaussians and equal weights)."""
    mean = matrix.mean()
    std = matrix.std()
    z = (matrix - mean) / max(std, 1e-12 * abs(mean), 1e-300)       # 1e-12: rounding
    kurtosis = (z ** 4).mean() - 3 * (z ** 2).mean()
    figures = [mean, std ** 2, (z ** 3).mean(), kurtosis]
    return dict(zip(MOMENTS, map(float, figures)))


def spectrum(matrix, ranks=RANKS):
    """Share of the variance in the leading principal components, at fractions `ranks`
    of their number, linear in between; rows are samples.
    Example:  spectrum(np.array([[3, 0], [-3, 0], [0, 1], [0, -1]]), [0.5]) -> [0.9],
              which is 18 of 20"""
    centred = matrix - matrix.mean(axis=0)
    if centred.shape[0] > centred.shape[1]:
        centred = centred.T                 # X^T X and X X^T have the same eigenvalues
    values = np.linalg.eigvalsh(centred @ centred.T)[::-1].clip(0)      # largest first
    explained = np.concatenate([[0.0], np.cumsum(values)]) / (values.sum() or 1.0)
    counts = np.arange(len(explained))
    return [float(np.interp(rank * len(values), counts, explained)) for rank in ranks]


def describe(checkpoint):
    """One record per matrix."""
    noise = {}          # shape -> its spectrum
    records = []
    for entry in filter(is_selected, checkpoint.entries.values()):
        matrix = checkpoint.read_tensor(entry.name).double().numpy()
        matrix = matrix.reshape(entry.shape[0], -1)         # (outputs, the rest)
        measure(checkpoint, entry.name)                     # refuses NaN and Inf
        if matrix.shape not in noise:
            white = np.random.default_rng(0).standard_normal(matrix.shape)
            noise[matrix.shape] = spectrum(white)
        records.append({
            "name": entry.name, "layer": entry.place.layer, "role": entry.place.role,
            "shape": list(entry.shape), **moments(matrix),
            "spectrum": spectrum(matrix), "spectrum_noise": noise[matrix.shape]})
    return records


def print_tables(records):
    """Table 1, a line per matrix; then the spectra, as means of roles."""
    roles = {}
    say("role       layer        mean    variance    skewness    kurtosis")
    for record in records:
        roles.setdefault(record["role"], []).append(record)
        line = f"{record['role']:<10}{record['layer']:>6}"
        for key in MOMENTS:
            line += f"{record[key]:>12.3g}"
        say(line)
    say("", "explained variance of the leading components (white noise of that shape)")
    title = " " * 10
    for rank in RANKS:
        title += f"{f'{rank:.0%} of them':>16}"
    say(title)
    for role, group in roles.items():
        line = f"{role:<10}"
        for k in range(len(RANKS)):
            share = np.mean([record["spectrum"][k] for record in group])
            noise = np.mean([record["spectrum_noise"][k] for record in group])
            line += f"{share:>8.3f} ({noise:.3f})"
        say(line)


def main(argv=None):
    parser = Parser(prog="weight_statistics.py", description="Table 1 (moments) and "
                    "Fig. 2 (spectra) of the paper, for any checkpoint's layers")
    parser.add_argument("checkpoint")
    parser.add_argument("--json", action="store_true", help="one record per matrix")
    a = parser.read(argv)
    records = describe(Checkpoint(a.checkpoint))
    need(records, a.checkpoint, "has no matrix in numbered layers",
         "pass a model's weights")
    if a.json:
        say(json.dumps(records, allow_nan=False))
    else:
        print_tables(records)


if __name__ == "__main__":
    sys.exit(command(main))
