"""RESULTS.md, its pictures and the README's blocks, from the records alone, in seconds:
no model is run.

    python experiments/results.py

In:    results/*.jsonl; results/template.md, which holds all prose.
Out:   RESULTS.md: the template, each {{NAME}} replaced by the section of that name;
       figures/*.svg (matplotlib, of requirements.txt here; without it the old ones
       stay); README.md between <!-- NAME: begin --> and <!-- NAME: end -->.
Paper: Tables 2 to 8, Fig. 2 and 4, and the abstract's two stages.
Previous: bench.py.
"""
import io
import re

import numpy as np

from compare import HERE, KEYS, facts, find, grouped, read, table
import bench
import codec
import merging
import real
import shapes

# {{name}} of the template: (its records, what shows them)
SECTIONS = {
    "first": (["merge"], merging.section_first),
    "table2": (["table2"], merging.section_table2),
    "table3": (["table3"], merging.section_table3),
    "table4": (["table4"], merging.section_table4),
    "table5": (["figure4"], shapes.section_table5),
    "figure4": (["figure4"], shapes.section_figure4),
    "table6": (["table6"], merging.section_table6),
    "codec": (["table8", "table7"], codec.section_codec),
    "real": (["real"], real.section_ratios),
    "curves": (["curves"], codec.section_curves),
    "learning": (["learning"], codec.section_learning),
    "vae": (["vae"], codec.section_unseen),
    "search": (["search"], codec.section_search),
    "matched": (["matched"], shapes.section_matched),
    "kinship": (["kinship"], shapes.section_kinship),
    "pruned": (["pruned"], shapes.section_pruned),
    "sibling": (["sibling"], shapes.section_pruned),
    "peer": (["bench-peer"], bench.section_peer),
    "networks": (["bench-networks"], bench.section_networks),
    "memory": (["bench-memory"], bench.section_memory),
    "align": (["bench-align"], bench.section_align)}


# --- RESULTS.md ---------------------------------------------------------------------
def section(name, records):
    """The text of a section, and what its numbers hang on."""
    files, show = SECTIONS[name]
    rows = []
    notes = []
    for file in files:
        rows += records[file]
        notes.append(facts(file, records[file]))
    if not rows:
        return "Not measured yet."
    return show(rows) + "\n" + "\n".join(notes)


def all_claims(records):
    """Those of the paper first, in its order; then ours."""
    claims = []
    for experiment in (merging, shapes, codec, real):
        claims += experiment.claims(records)
    return sorted(claims, key=lambda claim: claim.paper == "")


def slug(title):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def claim_table(records):
    lines = []
    for claim in all_claims(records):
        link = f"[{claim.verdict}](#{slug(claim.section)})"
        lines.append([claim.claim, claim.paper, claim.here, link])
    return table(["claim", "paper", "here", "verdict"], lines)


def page(template, records):
    """RESULTS.md."""
    def replaced(match):
        if match[1] == "claims":
            return claim_table(records)
        return section(match[1], records)
    return re.sub(r"\{\{(\w+)\}\}", replaced, template)


# --- The README's blocks ------------------------------------------------------------
# The claims that stand there, in this order.
README = ("a VAE serves unseen models at r = 1",
          "a relative of another shape, matched, lambda 0.5",
          "self-merging gains, K 8", "a soup of ten LoRA experts gains in latents",
          "another shape gains at lambda 0.1", "a VAE serves unseen models at r = 1.6",
          "a real model survives r > 1", "one stage collapses, two do not")


def block_main(records):
    """What the first command printed."""
    text = ""
    for line in records["main"][-1]["text"].splitlines():
        text += f"    {line}\n"
    return text


def block_verdicts(records):
    """What was found: those of README that are measured."""
    claims = {claim.claim: claim for claim in all_claims(records)}
    lines = []
    for name in README:
        if name in claims:
            claim = claims[name]
            lines.append([name, claim.paper or "-", claim.here,
                          f"{claim.verdict}: {claim.meaning}"])
    return table(["claim", "paper", "here", "what it means"], lines)


def block_merge(records):
    return merging.section_first(records["merge"])


def block_bench(records):
    return bench.section_peer(records["bench-peer"])


BLOCKS = {"main": block_main, "verdicts": block_verdicts, "merge": block_merge,
          "bench": block_bench}


def fill(text, records):
    """The README with every block of BLOCKS that it has a place for."""
    for name, block in BLOCKS.items():
        begin = f"<!-- {name}: begin -->\n"
        end = f"<!-- {name}: end -->"
        if begin in text and end in text:
            before, rest = text.split(begin, 1)
            text = before + begin + block(records) + end + rest.split(end, 1)[1]
    return text


# --- Pictures -----------------------------------------------------------------------
# A white ground of their own, so that they look the same on a light and a dark page;
# Okabe and Ito's colours, apart for every eye.
INK = "#222222"
GREY = "#777777"
BLUE = "#0072B2"
VERMILION = "#D55E00"
GREEN = "#008F68"
PURPLE = "#B0568C"
OLIVE = "#857A00"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, OLIVE, GREY)
WIDTH = 8.3             # inches: 800 pixels, the width of a README
STYLE = {"svg.hashsalt": "lsmerge", "svg.fonttype": "none", "font.size": 9,
         "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
         "axes.titlesize": 9, "axes.grid": True, "axes.axisbelow": True,
         "grid.color": GREY, "grid.alpha": 0.25, "axes.spines.top": False,
         "axes.spines.right": False, "xtick.color": INK, "ytick.color": INK,
         "legend.frameon": False, "lines.linewidth": 1.5, "lines.markersize": 4,
         "figure.dpi": 72, "figure.facecolor": "white"}


def panels(figure, count, height, title, **how):
    """That many equal panels beside each other, under one title."""
    figure.set_size_inches(WIDTH, height)
    figure.suptitle(title, fontsize=10, fontweight="bold")
    return list(figure.subplots(1, count, squeeze=False, **how)[0])


def lambda_axis(panel):
    """Log lambda; bits on an axis that is linear near 0."""
    panel.axhline(0, color=INK, linewidth=1)
    panel.set_xscale("log")
    panel.set_xticks(shapes.LAMBDAS, [f"{lam:g}" for lam in shapes.LAMBDAS])
    panel.set_yscale("symlog", linthresh=0.01, linscale=0.7)
    ticks = [-0.01, 0, 0.01, 0.1, 1, 10]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.set(ylim=(-0.02, 30), xlabel="lambda")


def figure4(figure, records):
    """paper: Fig. 4. The controls without content as a band."""
    rows = records["figure4"]
    axes = panels(figure, 2, 3.6, "Across shapes only a relative whose units are "
                  "matched first makes base better (below 0)", sharey=True)
    lines = [("none", {"align": "none"}, OLIVE), ("mean", {"align": "mean"}, GREEN),
             ("gaussian", {"align": "gaussian"}, PURPLE),
             ("sinkhorn", {"align": "sinkhorn"}, VERMILION),
             ("noise, same Sinkhorn", {"control": "carried"}, GREY)]
    for panel, source, kind in zip(axes, ("large", "grown"), ("a stranger",
                                                              "a relative")):
        bands = [shapes.curve(rows, control=name) for name in shapes.ANYWHERE]
        low = [min(mean for _, mean, _ in at) for at in zip(*bands)]
        high = [max(mean for _, mean, _ in at) for at in zip(*bands)]
        panel.fill_between([lam for lam, _, _ in bands[0]], low, high, color=GREY,
                           alpha=0.25, linewidth=0, label="zero, noise, shuffled")
        for label, fields, colour in lines:
            points = shapes.curve(rows, source=source, pairing="depth", **fields)
            dashes = "o:" if "control" in fields else "o-"
            panel.plot([p[0] for p in points], [p[1] for p in points], dashes,
                       color=colour, label=label)
        points = shapes.curve(rows, source=source, align="units")
        if points:
            panel.plot([p[0] for p in points], [p[1] for p in points], "s-",
                       color=BLUE, label="units matched")
        lambda_axis(panel)
        panel.set_title(f"{source}, {kind}, into base")
    axes[0].set_ylabel("bits per byte minus base's")
    axes[1].legend(fontsize=7)


def codec_figure(figure, records):
    """NMSE and loss over r."""
    axes = panels(figure, 2, 2.9, "A code with fewer numbers than weights breaks what "
                  "it decodes, and PCA as much as the VAE")
    rows = records["table8"] + records["table7"]
    r = np.geomspace(1, 4, 40)
    axes[0].plot(r, 1 - 1 / r, color=INK, linewidth=1, label="white noise, 1 - 1/r")
    for index, name in enumerate(("code", "base-seed2")):
        for method, style in (("VAE", "o-"), ("PCA", "s--"), ("noise", "d:")):
            found = find(rows, checkpoint=name, method=method)
            ratios = [row["ratio"] for row in found]
            if method != "noise":
                axes[0].plot(ratios, [row["nmse"] for row in found], style,
                             color=COLOURS[index], label=f"{name}: {method}")
            bits = [row["difference"]["mean"] for row in found]
            axes[1].plot(ratios, bits, style, color=COLOURS[index],
                         label=f"{name}: {method}")
    axes[0].set(ylabel="NMSE", title="code: fitted on it; base-seed2: unseen")
    axes[1].set(ylabel="bits per byte lost", title="noise: of the VAE's NMSE")
    for panel in axes:
        panel.set_xscale("log", base=2)
        panel.set_xticks([1, 2, 4], ["1", "2", "4"])
        panel.set_xlabel("weights per number, r")
        panel.legend(fontsize=7)


def curves(figure, records):
    """NMSE over seconds of training."""
    panel, = panels(figure, 1, 3.2, "Two stages learn the weights; at beta 1 one stage "
                    "and two keep next to nothing, as Eq. 1 asks")
    rows = [row for row in records["curves"] if "paper" not in row["name"]]
    for (_, group), colour in zip(grouped(rows, "name").items(), COLOURS):
        for row in group:
            seconds, nmse, second = codec.shifted(row["points"])
            label = row["name"] if row is group[0] else None
            panel.plot(seconds, nmse, linewidth=1.2, color=colour, label=label)
            if second is not None:
                panel.plot(seconds[second], nmse[second], "o", color=colour)
    panel.set(xlabel="seconds of training (a line per seed; dot: stage 2 begins)",
              ylabel="NMSE, held-out windows", yscale="log")
    panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def learning(figure, records):
    """What the network is like while it learns, at r = 1."""
    axes = panels(figure, 2, 2.6, "At r = 1 training finds a linear code: what the "
                  "blocks add, and the code's nonlinearity, vanish")
    for row, colour in zip(records["learning"], COLOURS):
        first = max((p["step"] for p in row["points"] if p["stage"] == 1), default=0)
        steps = [p["step"] + first * (p["stage"] == 2) for p in row["points"]]
        for panel, key in zip(axes, ("share", "nonlinearity")):
            panel.plot(steps, [p[key] for p in row["points"]], color=colour,
                       label=f"width {row['width']}, seed {row['seed']}")
    axes[0].set_ylabel("share of the stream that blocks add")
    axes[1].set_ylabel("|E((a+b)/2) - (E(a)+E(b))/2| / |E(a)|")
    for panel in axes:
        panel.set(xlabel="step of training", yscale="log")
    axes[0].legend(fontsize=7)


def kinship(figure, records):
    """Similarity of every layer of a source (rows) with every layer of base."""
    names = ("code", "pruned", "grown", "upscaled", "base-seed2", "large")
    rows = []
    for name in names:
        rows += find(records["kinship"], target="base", source=name)
    axes = panels(figure, len(rows), 2.6, "Layers of base (across) find their own in a "
                  "relative (down), and nobody in a stranger")
    for panel, row in zip(axes, rows):
        matrix = np.array(row["matrix"])
        panel.pcolormesh(matrix, vmin=0, vmax=1, cmap="cividis", edgecolors="face")
        for target, source in enumerate(row["layers"]):
            if source is not None:
                panel.plot(target + 0.5, source + 0.5, "o", markerfacecolor="none",
                           markeredgecolor=VERMILION, markeredgewidth=1.5)
        panel.set_title(f"{row['source']}: {shapes.kin(row):.2f}", fontsize=8)
        panel.set(aspect="equal", xticks=[], yticks=[])
        panel.grid(visible=False)
        panel.invert_yaxis()


# {name of the file: (what draws it, the records that it needs)}
PICTURES = {"figure4": (figure4, ["figure4"]), "codec": (codec_figure, ["table7"]),
            "curves": (curves, ["curves"]), "learning": (learning, ["learning"]),
            "kinship": (kinship, ["kinship"])}


def svg(draw, records):
    """One picture as text; equal records give equal bytes."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        draw(figure, records)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def draw_all(records, folder):
    try:
        import matplotlib.figure    # noqa: F401
    except ImportError:
        print("figures: skipped, matplotlib is not installed")
        return
    folder.mkdir(exist_ok=True)
    for name, (draw, needed) in PICTURES.items():
        if all(records[file] for file in needed):
            (folder / f"{name}.svg").write_text(svg(draw, records))


# --- The command --------------------------------------------------------------------
def build(here=HERE):
    """Everything below a folder that is like this one."""
    records = {name: read(name, here / "results") for name in KEYS}
    template = (here / "results" / "template.md").read_text()
    (here / "RESULTS.md").write_text(page(template, records))
    readme = here.parent / "README.md"
    readme.write_text(fill(readme.read_text(), records))
    draw_all(records, here / "figures")


if __name__ == "__main__":
    build()
