"""weight_statistics.py: what a model's weights look like, for any checkpoint.

    python experiments/tools/weight_statistics.py CHECKPOINT [--json] [--figure F.svg]

In:    a checkpoint; its matrices inside numbered layers (attention and MLP) are looked
       at.
Out:   Table 1: mean, variance, skewness and excess kurtosis, per role and layer. Fig.
       2: the share of the variance that the leading principal components explain,
       beside white noise of the same shape. As tables, as JSON (one record per tensor),
       as a picture.
Paper: Sec. 3.1: heavy tails, so that an encoder must keep rare large weights; spectra
       that fall fast, taken as evidence of a low-dimensional set.
ours:  the noise. The components of a random matrix differ in size, too: only what lies
       above that line is structure. And the kurtosis of single rows, see `moments`.
"""
import io
import json
import sys
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from chunking import (Checkpoint, CheckpointError, Parser, appear, check_output,
                      command, is_selected, need, say)

MOMENTS = ("mean", "variance", "skewness", "kurtosis", "kurtosis_row")
# The curve of Fig. 2 is printed at RANKS, and drawn at GRID, fractions of all
# components.
RANKS = (0.05, 0.1, 0.25, 0.5, 0.75)
GRID = np.linspace(0, 1, 101)
PANELS = 16                             # of the picture: one per role, at most
COLUMNS = 4
# Okabe and Ito's blues and vermilion: apart for every eye, on white as on black. The
# grey of the text has a contrast of 4.3 on white and of 4.4 on #0d1117, a common dark
# page.
BLUE = "#0072B2"
SKY = "#56B4E9"
VERMILION = "#D55E00"
GREY = "#7a7a7a"


# --- Table 1 and Fig. 2 ---------------------------------------------------------------
def moments(matrix):
    """Mean, variance, skewness, excess kurtosis (0 for a Gaussian) of raw weights.

    Args:     matrix (rows, columns) float64, a row per output
    Returns:  MOMENTS -> float. kurtosis_row is the mean over rows of each row's own:
              pooling rows of different scale inflates `kurtosis` (a scale mixture of
              Gaussians is heavy-tailed), the per-row figure is free of that. Constant
              rows count as 0.
    Source:   paper: Table 1
    """
    from scipy import stats     # here: importing it takes as long as a small merge
    flat = matrix.reshape(-1)
    with warnings.catch_warnings():     # scipy warns of constant rows, and returns NaN
        warnings.simplefilter("ignore", RuntimeWarning)
        rows = np.nan_to_num(stats.kurtosis(matrix, axis=1))
        figures = [flat.mean(), flat.var(), stats.skew(flat), stats.kurtosis(flat),
                   rows.mean()]
    return dict(zip(MOMENTS, map(float, np.nan_to_num(figures))))


def spectrum(matrix, ranks=RANKS):
    """Share of the variance in the leading principal components, at fractions `ranks`
    of their number (linear in between), float64.

    Rows are the samples, centred; eigenvalues of the smaller of X X^T and X^T X.
    Source:   paper: Fig. 2
    Example:  spectrum(np.array([[3, 0], [-3, 0], [0, 1], [0, -1]]), [0.5]) -> [0.9],
              which is 18 of 20
    """
    centred = matrix - matrix.mean(axis=0, keepdims=True)
    if centred.shape[0] < centred.shape[1]:
        gram = centred @ centred.T
    else:
        gram = centred.T @ centred
    values = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)      # largest first
    explained = np.concatenate([[0.0], np.cumsum(values)]) / (values.sum() or 1.0)
    counts = np.arange(len(explained))
    return [float(np.interp(rank * len(values), counts, explained)) for rank in ranks]


def describe(checkpoint):
    """One record per matrix: name, layer, role, shape, MOMENTS, spectrum at RANKS and
    curve at GRID, and these two of white noise of its shape."""
    noise = {}
    records = []
    at_ranks = [round(100 * rank) for rank in RANKS]        # their places on GRID
    for entry in filter(is_selected, checkpoint.entries.values()):
        matrix = checkpoint.read_tensor(entry.name).double().numpy()
        matrix = matrix.reshape(entry.shape[0], -1)         # (outputs, the rest)
        need(np.isfinite(matrix).all(), entry.file, "holds NaN or Inf",
             "repair or re-export the checkpoint", entry.name)
        if matrix.shape not in noise:
            white = np.random.default_rng(0).standard_normal(matrix.shape)
            noise[matrix.shape] = spectrum(white, GRID)
        curve = spectrum(matrix, GRID)
        curve_noise = noise[matrix.shape]
        records.append({
            "name": entry.name, "layer": entry.place.layer, "role": entry.place.role,
            "shape": list(entry.shape), **moments(matrix),
            "spectrum": [curve[i] for i in at_ranks],
            "spectrum_noise": [curve_noise[i] for i in at_ranks],
            "curve": curve, "curve_noise": curve_noise})
    return records


def by_role(records):
    """role -> its records, in the order of the checkpoint."""
    groups = {}
    for record in records:
        groups.setdefault(record["role"], []).append(record)
    return groups


def print_tables(records):
    """Table 1, a line per tensor and the mean of each role; then the spectra, as means
    of roles."""
    say(f"{'role':<10}{'layer':>6}{'mean':>11}{'variance':>11}{'skewness':>10}"
        f"{'kurtosis':>10}{'per row':>9}")
    for role, group in by_role(records).items():
        average = {key: np.mean([record[key] for record in group]) for key in MOMENTS}
        for r in [*group, {"layer": "mean", **average}]:
            say(f"{role:<10}{r['layer']:>6}{r['mean']:>11.2e}{r['variance']:>11.2e}"
                f"{r['skewness']:>10.3f}{r['kurtosis']:>10.3f}"
                f"{r['kurtosis_row']:>9.3f}")
    say("", "explained variance of the leading components "
        "(in brackets: white noise of the same shape)")
    say(f"{'role':<10}" + "".join(f"{f'{rank:.0%} of them':>16}" for rank in RANKS))
    for role, group in by_role(records).items():
        seen = np.mean([record["spectrum"] for record in group], axis=0)
        noise = np.mean([record["spectrum_noise"] for record in group], axis=0)
        cells = [f"{one:.3f} ({other:.3f})" for one, other in zip(seen, noise)]
        say(f"{role:<10}" + "".join(f"{cell:>16}" for cell in cells))


# --- The picture ----------------------------------------------------------------------
def plotting():
    """matplotlib, which only the picture needs: asked for before any work is done."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise CheckpointError("--figure", "matplotlib is not installed",
                              "pip install matplotlib") from None
    return matplotlib, Figure


def draw(records):
    """Fig. 2 as SVG text: a panel per role, a thin line per layer, white noise dashed.

    Args:     records of `describe`
    ours:     transparent, with grey text, so that it reads on a white and on a dark
              page. No date and a fixed salt of names: equal records, equal bytes.
    """
    matplotlib, Figure = plotting()
    groups = list(by_role(records).items())[:PANELS]
    columns = min(COLUMNS, len(groups))
    rows = -(-len(groups) // columns)
    style = {"svg.hashsalt": "lsmerge", "svg.fonttype": "none", "font.size": 9}
    for part in ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor",
                 "xtick.color", "ytick.color"):
        style[part] = GREY
    with matplotlib.rc_context(style):
        size = (1 + 2 * columns, 0.9 + 1.9 * rows)          # inches
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        panels = panels.flatten()
        for panel, (role, group) in zip(panels, groups):
            draw_panel(panel, role, group)
        for panel in panels[len(groups):]:
            panel.set_axis_off()
        for panel in panels[max(0, len(groups) - columns):len(groups)]:
            panel.tick_params(labelbottom=True)     # also above an empty panel
        figure.get_layout_engine().set(wspace=0.08)
        figure.supxlabel("leading components, % of all", fontsize=9)
        figure.supylabel("explained variance, %", fontsize=9)
        lines, labels = panels[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside upper center", ncols=3, frameon=False,
                      labelcolor=GREY)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True,
                       metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def draw_panel(panel, role, group):
    """One role: its layers, their mean, and the mean of the noise."""
    x = 100 * GRID
    curves = [100 * np.array(record["curve"]) for record in group]
    noise = [100 * np.array(record["curve_noise"]) for record in group]
    label = "a layer"
    for curve in curves:
        panel.plot(x, curve, color=SKY, linewidth=0.7, label=label)
        label = None                                # once in the legend
    panel.plot(x, np.mean(curves, axis=0), color=BLUE, linewidth=1.8,
               label="mean of the layers")
    panel.plot(x, np.mean(noise, axis=0), color=VERMILION, linewidth=1.4,
               linestyle=(0, (4, 2)), label="white noise of this shape")
    panel.set_title(f"{role} ({'x'.join(map(str, group[0]['shape']))})", fontsize=9)
    panel.set(xlim=(0, 100), ylim=(0, 102), xticks=(0, 50, 100), yticks=(0, 50, 100))
    panel.grid(color=GREY, alpha=0.25, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)


# --- The command ----------------------------------------------------------------------
def parse(argv):
    parser = Parser(prog="weight_statistics.py", description="Table 1 (moments) and "
                    "Fig. 2 (spectra) of the paper, for any checkpoint's layers")
    parser.add_argument("checkpoint")
    parser.add_argument("--json", action="store_true",
                        help="one JSON record per tensor instead of the tables")
    parser.add_argument("--figure", metavar="FILE.svg", help="also draw Fig. 2 (needs "
                        "matplotlib); an older picture is replaced")
    a = parser.read(argv)
    if a.figure and not a.figure.endswith(".svg"):
        parser.error(f"--figure {a.figure}: the picture is an .svg file")
    return a


def main(argv=None):
    a = parse(argv)
    checkpoint = Checkpoint(a.checkpoint)
    if a.figure:
        plotting()
        check_output(a.figure, checkpoint.files, force=True, flag="--figure")
    records = describe(checkpoint)
    need(records, a.checkpoint, "has no matrix in numbered layers",
         "pass a model's weights")
    if a.json:
        brief = []
        for record in records:
            kept = [key for key in record if not key.startswith("curve")]
            brief.append({key: record[key] for key in kept})
        say(json.dumps(brief, allow_nan=False))
    else:
        print_tables(records)
    if a.figure:
        with appear(a.figure, force=True) as partial:
            Path(partial).write_text(draw(records), encoding="utf-8")
        told = sys.stderr if a.json else sys.stdout
        say(f"wrote {a.figure}", stream=told)


if __name__ == "__main__":
    sys.exit(command(main))
