"""RESULTS.md, Figure 4 and the README's blocks, from the records alone, in seconds: no
model is run.

    python experiments/results.py

In:    results/*.jsonl; results/template.md, which holds all prose.
Out:   RESULTS.md: the template, {{NAME}} replaced by what section_NAME of an experiment
       makes of NAME.jsonl; README.md between <!-- NAME: begin --> and <!-- NAME: end
       -->; figures/figure4.svg (by matplotlib; without it the old one stays).
Paper: Tables 2 to 8, Fig. 4, and the abstract's two stages.
Previous: bench.py.
"""
import re
import textwrap
from collections import defaultdict

from compare import HERE, read, table
import bench
import codec
import merging
import real
import shapes

EXPERIMENTS = (merging, shapes, codec, real, bench)
# Sections whose records bear another name.
RECORDS = {"first": "merge", "table5": "figure4"}
# The claims that stand in the README, in this order.
README = ("a VAE serves unseen models at r = 1",
          "a relative of another shape, matched, lambda 0.5",
          "self-merging gains, K 8", "a soup of ten LoRA experts gains in latents",
          "another shape gains at lambda 0.1", "a VAE serves unseen models at r = 1.6",
          "a real model survives r > 1", "one stage collapses, two do not")


# --- RESULTS.md ---------------------------------------------------------------------
def facts(name, rows):
    """What the numbers of a section hang on, as its records say it."""
    found = [f"`results/{name}.jsonl`: {len(rows)} row{'s' * (len(rows) > 1)}"]
    for key in ("python", "torch", "threads", "documents", "commit"):
        values = {str(row[key]) for row in rows if row.get(key) is not None}
        if values:
            found.append(f"{key} {' and '.join(sorted(values))}")
    return "; ".join(found) + "."


def section(name, records):
    """What the experiment that has this section shows."""
    file = RECORDS.get(name, name)
    rows = records[file]
    if not rows:
        return "Not measured yet."
    show, = [getattr(experiment, f"section_{name}") for experiment in EXPERIMENTS
             if hasattr(experiment, f"section_{name}")]
    return show(rows) + "\n" + facts(file, rows)


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


def fill(text, records):
    """The README with its blocks between their marks."""
    said = textwrap.indent(records["main"][-1]["text"], "    ")
    blocks = {"main": said, "verdicts": block_verdicts(records),
              "merge": merging.section_first(records["merge"]),
              "bench": bench.section_peer(records["peer"])}
    for name, block in blocks.items():
        begin = f"<!-- {name}: begin -->\n"
        before, rest = text.split(begin)
        _, after = rest.split(f"<!-- {name}: end -->")
        text = before + begin + block + f"<!-- {name}: end -->" + after
    return text


# --- Figure 4 -----------------------------------------------------------------------
# A white ground of its own, so that it looks the same on a light and a dark page; Okabe
# and Ito's colours, apart for every eye.
INK = "#222222"
GREY = "#777777"
STYLE = {"svg.hashsalt": "lsmerge", "svg.fonttype": "none", "font.size": 9,
         "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
         "axes.titlesize": 9, "axes.grid": True, "axes.axisbelow": True,
         "grid.color": GREY, "grid.alpha": 0.25, "axes.spines.top": False,
         "axes.spines.right": False, "xtick.color": INK, "ytick.color": INK,
         "legend.frameon": False, "lines.markersize": 4}
# label, the records' fields, how it is drawn
LINES = [("none", {"align": "none"}, "o-", "#857A00"),
         ("mean", {"align": "mean"}, "o-", "#008F68"),
         ("gaussian", {"align": "gaussian"}, "o-", "#B0568C"),
         ("sinkhorn", {"align": "sinkhorn"}, "o-", "#D55E00"),
         ("noise, same Sinkhorn", {"control": "carried", "align": "sinkhorn"}, "o:",
          GREY),
         ("units matched", {"align": "units"}, "s-", "#0072B2")]


def draw_source(panel, rows, source):
    """The lines of one source; the controls without content as a band."""
    bands = [shapes.curve(rows, control=name) for name in shapes.ANYWHERE]
    low = [min(mean for _, mean, _ in at) for at in zip(*bands)]
    high = [max(mean for _, mean, _ in at) for at in zip(*bands)]
    panel.fill_between([lam for lam, _, _ in bands[0]], low, high, color=GREY,
                       alpha=0.25, linewidth=0, label="zero, noise, shuffled")
    for label, fields, style, colour in LINES:
        points = shapes.curve(rows, source=source, **fields)
        if points:
            lams, means, _ = zip(*points)
            panel.plot(lams, means, style, color=colour, label=label)


def draw_axes(panel):
    """Log lambda; bits on an axis that is linear near 0."""
    panel.axhline(0, color=INK, linewidth=1)
    panel.set_xscale("log")
    panel.set_xticks(shapes.LAMBDAS, [f"{lam:g}" for lam in shapes.LAMBDAS])
    panel.set_yscale("symlog", linthresh=0.01, linscale=0.7)
    ticks = [-0.01, 0, 0.01, 0.1, 1, 10]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.set(ylim=(-0.02, 30), xlabel="lambda")


def draw_figure4(rows, path):
    """paper: Fig. 4. A stranger and a relative, over lambda. Equal records give equal
    bytes."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("figures: skipped, matplotlib is not installed")
        return
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained", figsize=(8.3, 3.6))
        figure.suptitle("Across shapes only a relative whose units are matched first "
                        "makes base better (below 0)", fontsize=10, fontweight="bold")
        left, right = figure.subplots(1, 2, sharey=True)
        for panel, source, kind in ((left, "large", "a stranger"),
                                    (right, "grown", "a relative")):
            draw_source(panel, rows, source)
            draw_axes(panel)
            panel.set_title(f"{source}, {kind}, into base")
        left.set_ylabel("bits per byte minus base's")
        right.legend(fontsize=7)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


# --- The command --------------------------------------------------------------------
def build(here=HERE):
    """Everything below a folder that is like this one."""
    records = defaultdict(list)
    for path in (here / "results").glob("*.jsonl"):
        records[path.stem] = read(path.stem, here / "results")
    template = (here / "results" / "template.md").read_text()
    (here / "RESULTS.md").write_text(page(template, records))
    readme = here.parent / "README.md"
    readme.write_text(fill(readme.read_text(), records))
    draw_figure4(records["figure4"], here / "figures" / "figure4.svg")


if __name__ == "__main__":
    build()
