"""The pictures of RESULTS.md, drawn from the rows that report.py reads.

In:    results (records.Results): the rows of results/*.jsonl.
Out:   SVG text; equal records give equal bytes (fixed salt for names, no date, the matplotlib of
       experiments/requirements.txt).
Paper: Fig. 4 (curves over lambda), Fig. 2 (spectra); the others are ours.
ours:  one picture for a white and for a dark page: transparent ground, grey text, and those of
       Okabe and Ito's colours, apart for every eye, that have a contrast of 3 on both grounds.
       Where more than four lines meet, they differ in their dashes as well. OLIVE is a fifth.
Left out on purpose: tables, verdicts. Previous: report.py.
"""
import io
import math

import numpy as np

from records import curve, grouped

GREY = "#7a7a7a"        # text and axes: contrast 4.3 on white, 4.4 on #0d1117, a common dark page
BLUE, VERMILION, GREEN, PURPLE = COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
OLIVE = "#857A00"       # where four colours are not enough
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))      # after four lines the colours come again, dashed
WIDTH = 8.3             # inches: 800 pixels, the width of a README
POINTS = 150            # of a cloud; more only make the file larger
STYLE = {"svg.hashsalt": "lsmerge", "svg.fonttype": "none", "font.size": 9, "text.color": GREY,
         "axes.labelcolor": GREY, "axes.edgecolor": GREY, "axes.titlecolor": GREY,
         "axes.titlesize": 9, "axes.grid": True, "axes.axisbelow": True, "grid.color": GREY,
         "grid.alpha": 0.25, "grid.linewidth": 0.5, "axes.spines.top": False,
         "axes.spines.right": False, "xtick.color": GREY, "ytick.color": GREY,
         "legend.frameon": False, "legend.labelcolor": GREY, "lines.linewidth": 1.5,
         "lines.markersize": 4, "figure.dpi": 72}
FIGURE_4 = {"none": (OLIVE, "o-"), "mean": (GREEN, "o--"), "gaussian": (PURPLE, "o-"),
            "carried": (GREY, "x:"), "sinkhorn": (VERMILION, "o-"), "units": (BLUE, "s-")}
CODES = {"VAE": (BLUE, "o-"), "PCA": (VERMILION, "s--"), "PCA, c = 1024": (GREEN, "^:"),
         "noise": (PURPLE, "d-.")}


def available():
    """Whether pictures can be drawn: matplotlib is the one package that only they need."""
    try:
        import matplotlib.figure    # noqa: F401
    except ImportError:
        return False
    return True


def svg(name, results):
    """One picture as text."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        DRAW[name](figure, results)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True,
                       metadata={"Date": None, "Creator": None})
    return stream.getvalue()


# --- Shared ---------------------------------------------------------------------------------------
def panels(figure, count, height=2.6, columns=4, **how):
    """That many equal panels, at most `columns` beside each other; [axes]."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure.set_size_inches(WIDTH, 0.6 + rows * height)
    axes = figure.subplots(rows, columns, squeeze=False, **how).flatten()
    for left in axes[count:]:
        left.set_axis_off()
    return list(axes[:count])


def legend(figure, axes, columns=4):
    """One legend above all panels: every name once, in the order in which it was drawn."""
    names = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            names.setdefault(label, handle)
    figure.legend(names.values(), names.keys(), loc="outside upper center", ncols=columns)


def line_style(index):
    return {"color": COLOURS[index % 4], "linestyle": DASHES[index // 4 % 3]}


def ratio_axis(panel, ratios):
    """Compression ratios on a doubling scale; 64/63 would sit on top of 1, so it has no label."""
    panel.set_xscale("log", base=2)
    shown = [r for r in sorted(ratios) if r in (0.5, 1, 1.6, 2, 4)]
    panel.set_xticks(shown, [f"{r:g}" for r in shown])
    panel.set_xlabel("compression ratio r")


# --- Pictures of the paper's tables ---------------------------------------------------------------
def figure4(figure, results):
    """paper: Fig. 4. Bits over lambda per alignment; the controls without content as a band."""
    axes = panels(figure, 2, height=3.1, sharey=True)
    for panel, source, kind in zip(axes, ("large", "grown"), ("unrelated", "a relative")):
        curves = [curve(results, control=control) for control in ("zero", "noise", "shuffled")]
        lambdas = [lam for lam, _, _ in curves[0]]
        low = [min(mean - se for _, mean, se in at) for at in zip(*curves)]
        high = [max(mean + se for _, mean, se in at) for at in zip(*curves)]
        panel.fill_between(lambdas, low, high, color=GREY, alpha=0.35, linewidth=0,
                           label="zero, noise, shuffled")
        for align, (colour, style) in FIGURE_4.items():
            pairing = "weights" if align == "units" else "depth"
            found = curve(results, source=source, pairing=pairing, **(
                {"control": align} if align == "carried" else {"align": align}))
            if not found:
                continue
            lam, mean, se = zip(*found)
            panel.errorbar(lam, mean, 2 * np.array(se), fmt=style, color=colour,
                           markersize=7 if align == "carried" else 4,
                           label={"carried": "noise through the same Sinkhorn",
                                  "units": "units matched by weights"}.get(align, align))
        panel.axhline(0, color=GREY, linewidth=1)
        panel.set_xscale("log")
        panel.set_yscale("symlog", linthresh=0.01, linscale=0.7)
        panel.set_xticks(lambdas, [f"{value:g}" for value in lambdas])
        panel.minorticks_off()
        panel.set_yticks([-0.01, 0, 0.01, 0.1, 1, 10], ["-0.01", "0", "0.01", "0.1", "1", "10"])
        panel.set(ylim=(-0.02, 30), title=f"{source} ({kind}) into base", xlabel="lambda (log)")
    axes[0].set_ylabel("bits per byte minus the target's")
    legend(figure, axes, 3)


def codec_panel(panel, rows, value, methods):
    """One quantity over r, a line per code."""
    for method in methods:
        line = sorted((row["ratio"], value(row)) for row in rows if row["method"] == method)
        if line:
            colour, style = CODES[method]
            label = {"noise": "noise of the VAE's NMSE"}.get(method, method)
            panel.plot(*zip(*line), style, color=colour, label=label)
    ratio_axis(panel, {row["ratio"] for row in rows})


def codec(figure, results):
    """NMSE and loss over r: on weights that the code was fitted on, on others, on a real model."""
    real = results.rows("real")
    axes = panels(figure, 4 if real else 3, height=2.5, columns=2)
    r = np.geomspace(0.5, 4, 50)
    for panel, table, name, seen in ((axes[0], "table8", "code", "the codec was fitted on it"),
                                     (axes[1], "table7", "base-seed2", "another seed, unseen")):
        rows = [row for row in results.rows(table)
                if row["checkpoint"] == name]
        codec_panel(panel, rows, nmse_of, ("VAE", "PCA", "PCA, c = 1024"))
        panel.plot(r, np.maximum(0, 1 - 1 / r), color=GREY, linestyle="-", linewidth=1,
                   label="white noise, 1 - 1/r")
        panel.set(title=f"model {name}: {seen}", ylabel="NMSE", ylim=(-0.03, 0.8))
        if table == "table8":
            codec_panel(axes[2], rows, bits_of, CODES)
            axes[2].axhline(0, color=GREY, linewidth=1)
            axes[2].set(title=f"model {name}: what it loses", ylabel="bits per byte lost")
    for panel in axes[3:]:
        panel.axhline(real[0]["loss_before"], color=GREY, linewidth=1)
        codec_panel(panel, real, loss_of, ("VAE", "PCA", "noise"))
        panel.set(title=f"a real model, {real[0]['weights'] / 1e6:.0f} M encoded weights; line: "
                  "as it was", ylabel="nats per token", ylim=(0, None))
    legend(figure, axes, 5)


def nmse_of(row):
    return row["nmse"]


def bits_of(row):
    return row["difference"]["mean"]


def loss_of(row):
    return row["loss"]


# --- Speed and memory -----------------------------------------------------------------------------
def bench(figure, results):
    """Seconds and memory beside mergekit; Sinkhorn beside the fastest of POT's over epsilon."""
    align = [row for row in results.rows("bench-align")
             if row["what"] == "sinkhorn"]
    axes = panels(figure, 3 if align else 2, height=1.9)
    peer = results.rows("bench-peer")[-1]
    names = {"weight": "--space weight", "exact": "latent merge", "mergekit": peer["peer"]}
    for panel, key, title, form in ((axes[0], "seconds", "seconds, whole process", ".1f"),
                                    (axes[1], "peak_mib", "anonymous memory, MiB", ".0f")):
        for place, (name, colour) in enumerate(zip(names, (BLUE, BLUE, GREY))):
            middle, low, high = peer[key][name]
            panel.barh(place, middle, color=colour, height=0.6,
                       xerr=[[middle - low], [high - middle]], error_kw={"ecolor": VERMILION})
            panel.annotate(format(middle, form), (high, place), (4, 0), textcoords="offset points",
                           va="center")
        panel.set_yticks(range(3), list(names.values()) if key == "seconds" else [""] * 3)
        panel.set(title=title, xlim=(0, 1.25 * max(peer[key]["mergekit"])))
        panel.grid(axis="y", visible=False)
    for panel in axes[2:]:
        sinkhorn_panel(panel, align)


def sinkhorn_panel(panel, rows):
    """Seconds of ours over those of POT's fastest, a point per problem; below 1 ours is faster."""
    epsilons = sorted({row["epsilon"] for row in rows})
    for index, ((kind,), group) in enumerate(grouped(rows, "kind").items()):
        x = [epsilons.index(row["epsilon"]) + 0.15 * (index - 1) for row in group]
        panel.plot(x, [max(row["ratios"].values()) for row in group], "osd"[index % 3],
                   color=COLOURS[index % 4], label=kind)
    panel.axhline(1, color=GREY, linewidth=1)
    panel.set_xticks(range(len(epsilons)), [f"{value:g}" for value in epsilons])
    panel.set(title="Sinkhorn: time over POT's fastest", xlabel="epsilon", yscale="log",
              ylim=(0.05, 2.2))
    panel.set_yticks([0.1, 0.3, 1, 2], ["0.1", "0.3", "1", "2"])
    panel.minorticks_off()
    panel.legend(loc="lower right", fontsize=8, handletextpad=0.1)


# --- Pictures of what was added -------------------------------------------------------------------
def curves(figure, results):
    """NMSE over seconds of training: a colour per recipe, a line per seed, a dot where stage 2
    begins (its seconds are counted from stage 1's last)."""
    rows = results.rows("curves")
    models = list(dict.fromkeys(row["model"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    axes = panels(figure, len(models), height=2.8, columns=2, sharey=True)
    for row in rows:
        panel, style = axes[models.index(row["model"])], line_style(names.index(row["name"]))
        seconds, nmse, second = shifted(row["points"])
        panel.plot(seconds, nmse, linewidth=1.2, label=row["name"], **style)
        if second is not None:
            panel.plot(seconds[second], nmse[second], "o", color=style["color"])
    longest = max(shifted(row["points"])[0][-1] for row in rows if "paper" not in row["name"])
    for panel, model in zip(axes, models):      # the paper's configuration runs out of the picture
        panel.set(title=f"one VAE of {model}", xlabel="seconds", yscale="log",
                  xlim=(0, 1.02 * longest))
    axes[0].set_ylabel("NMSE, held-out windows")
    legend(figure, axes, 3)


def shifted(points):
    """(seconds, NMSE, index of stage 2's first point): stage 2 goes on where stage 1 ended."""
    first = [point for point in points if point["stage"] == 1]
    second = [point for point in points if point["stage"] == 2]
    end = first[-1]["seconds"] if first else 0
    seconds = [p["seconds"] for p in first] + [end + p["seconds"] for p in second]
    return (seconds, [p["nmse"] for p in first + second],
            len(first) if first and second else None)


def kinship(figure, results):
    """Similarity of every layer of a source (rows) with every layer of one target, that of the
    first record; a ring marks the layers that were paired."""
    rows = results.rows("kinship")
    rows = sorted((row for row in rows if row["target"] == rows[0]["target"]), key=unrelated)
    axes = panels(figure, len(rows), height=2.3)
    for panel, row in zip(axes, rows):
        matrix = np.array(row["matrix"])
        colours = panel.pcolormesh(matrix, vmin=0, vmax=1, cmap="cividis", edgecolors="face",
                                   linewidth=0.3)       # else the ground shines through the seams
        pairs = [(j, i) for j, i in enumerate(row["layers"]) if i is not None]
        if pairs:
            panel.plot(*(np.array(pairs).T + 0.5), "o", markersize=6 if len(pairs) < 10 else 2,
                       markerfacecolor="none", markeredgecolor=VERMILION, markeredgewidth=1.5)
        kind = "related" if row["related"] else "unrelated"
        panel.set_title(f"{row['source']} \u2192\n{row['target']}: {kind}", fontsize=8)
        panel.set(xlabel="target layer", aspect="equal")
        for axis, size in ((panel.xaxis, matrix.shape[1]), (panel.yaxis, matrix.shape[0])):
            ticks = range(0, size, max(1, -(-size // 6)))
            axis.set_ticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
        panel.grid(visible=False)
        panel.invert_yaxis()
    axes[0].set_ylabel("source layer")
    bar = figure.colorbar(colours, ax=axes, shrink=0.7, pad=0.02)
    bar.set_label("similarity")
    bar.solids.set(rasterized=False, edgecolor="face")
    bar.outline.set_visible(False)


def unrelated(row):
    return not row["related"]


def clouds(figure, results):
    """The source's latents before and after alignment, among the target's, in the target's first
    two principal components."""
    rows = results.rows("clouds")
    axes = panels(figure, len(rows), height=2.1, sharex=True, sharey=True)
    for panel, row in zip(axes, rows):
        for key, colour, mark in (("target", BLUE, "o"), ("source", VERMILION, "^")):
            points = np.array(row[key])
            points = points[::-(-len(points) // POINTS)]
            panel.plot(*points.T, mark, color=colour, markersize=2.5, markeredgewidth=0,
                       label=f"{key}'s latents")
        panel.set(title=f"{row['align']}\nsource's sd {spread(row['source']):.2f}",
                  xlabel="component 1")
    axes[0].set_ylabel("component 2")
    legend(figure, axes)


def spread(points):
    """Root of the mean variance over the two components."""
    return np.sqrt(np.var(points, axis=0).mean())


def spectra(figure, results):
    """paper: Fig. 2. Explained variance of the leading components, and of white noise's."""
    rows = results.rows("spectra")
    models = list(dict.fromkeys(row["model"] for row in rows))
    roles = grouped(rows, "role")
    axes = panels(figure, len(roles), height=1.9, sharex=True, sharey=True)
    for panel, ((role,), group) in zip(axes, roles.items()):
        for row in group:
            at = models.index(row["model"])
            colour = COLOURS[at % 4]
            for key, style, label in (("cumulative", "-", row["model"]), (
                    "white", (":", "-.", "--")[at % 3], f"{row['model']}: white noise")):
                y = 100 * np.array([0, *row[key]])      # of no component, one, two, ...
                x = np.linspace(0, 100, len(y))
                panel.plot(x, y, style, color=colour, label=label)
        panel.set(title=role, ylim=(0, 103), xlim=(0, 100))
        panel.tick_params(labelbottom=True)
    figure.supxlabel("leading components, % of all", fontsize=9)
    figure.supylabel("explained variance, %", fontsize=9)
    legend(figure, axes)


DRAW = {"figure4": figure4, "codec": codec, "bench": bench, "curves": curves, "kinship": kinship,
        "clouds": clouds, "spectra": spectra}
