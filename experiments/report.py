"""RESULTS.md, its pictures and the README's tables, from the records alone: no model is run.

    python experiments/report.py [--no-figures]

In:    results/*.jsonl.
Out:   RESULTS.md: every table, what it says, the command that made it, what its numbers hang on;
       figures/*.svg (matplotlib, of requirements.txt here; without it the old ones stay);
       README.md between <!-- NAME: begin --> and <!-- NAME: end -->, for the names in BLOCKS.
Paper: Tables 2 to 8, Fig. 2 and 4, and the abstract's curriculum; what they claim is in CLAIMS.
ours:  verdicts are computed, and so is every number in a sentence. A difference counts beyond two
       standard errors (scores.verdict). A gain *holds* if the merge beats what it started from and
       every control; it *ties* if it beats what it started from but not a control, and loses to
       none; else it is *not reproduced*. "Nearly lossless" holds within 1 % of the loss; a part of
       the curriculum holds if leaving it out loses, and ties if that ties; dimensions are few if
       most spectra are clearly above white noise's (sections.structured).
       Sections, claims and pictures whose records do not exist are left out.
Previous: sections.py. Next: figures.py.
"""
import argparse
import math
import re
import statistics
import sys
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Callable, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "tools")]
import figures
from records import Results, cells, find, grouped
from sections import (LOSSLESS, SECTIONS, STRUCTURE, above_noise, cell_gain, change, chosen,
                      clear_of_noise, facts, gain, kin, latent, lossless, lost, merges, merges_of,
                      model_name, number, part_worth, peer_rows, pm, pm_of, row_of, said, several,
                      table, two)

COLLAPSED = 0.5         # NMSE: more than this, and most of the variance is lost


# --- What the paper claims, and what we add -------------------------------------------------------
# Each function: what was measured, in one number with its error, and the verdict.
def to_target(d):
    return f"{pm_of(d)} to target"


def ours(holds):
    """The verdict of a claim that the paper does not make."""
    return "ours, holds" if holds else "ours, no"


def of_row(which, name, label, results):
    d = row_of(results, which, name)["difference"]
    return (to_target(d[label]) if label == "base" else f"{pm_of(d[label])} to {label}",
            gain([(other["mean"], other["se"]) for other in d.values()]))


def of_chosen(results):
    row = chosen(results, "large")
    return f"{row['lam']:g}: {to_target(row['difference']['base'])}", cell_gain(row)


def of_alignment(results):
    """Against no alignment; the control is noise through the same Sinkhorn."""
    ours, none = (find(cells(results), row="cell", source="large", align=align, pairing="depth",
                       lam=0.1)[0]["difference"] for align in ("sinkhorn", "none"))
    to_none = (ours["base"]["mean"] - none["base"]["mean"],
               math.hypot(ours["base"]["se"], none["base"]["se"]))
    to_noise = ours["carried"]["mean"], ours["carried"]["se"]
    return f"{pm(*to_noise)} to noise, same transport", gain([to_none, to_noise])


def of_table5(results):
    row = find(cells(results), row="cell", source="large", align="gaussian",
               pairing="depth", lam=0.1)[0]
    return to_target(row["difference"]["base"]), cell_gain(row)


def of_codec(which, name, r, results):
    row = find(results.rows(f"table{which}"), checkpoint=name,
               ratio=r, method="VAE")[0]
    return f"{pm_of(row['difference'])} bits lost", lossless(change(row))


def of_real(results):
    row = min((row for row in results.rows("real")
               if row["method"] == "VAE" and row["ratio"] > 1), key=itemgetter("ratio"))
    text = f"{model_name(row['model'])}, r = {row['ratio']:.3g}: loss {row['change']:+.0%}"
    return text, lossless(row["change"])


def of_part(group, variant, results):
    d, word = part_worth(results, group, variant)
    return f"without it: {pm(*d)} bits", word


def ends_of(results):
    """name -> the mean over seeds of the NMSE at which a training ended."""
    rows = results.rows("curves")
    return {name: statistics.mean(row["points"][-1]["nmse"] for row in group)
            for (name,), group in grouped(rows, "name").items()}


def of_collapse(results):
    """At any beta measured: has one stage lost most of the variance, and two stages not? Shown is
    the beta at which one stage loses most."""
    ends, found = ends_of(results), {}
    for name in ends:
        beta = name.removeprefix("one stage, ")
        if beta != name and f"two stages, {beta}" in ends:
            found[beta] = ends[name], ends[f"two stages, {beta}"]
    if not found:
        return "not measured", "not measured"
    one, two, beta = max((one, two, beta) for beta, (one, two) in found.items())
    holds = any(one > COLLAPSED > 2 * two for one, two in found.values())
    return f"{beta}: NMSE {one:#.2g}, two {two:#.2g}", "holds" if holds else "not reproduced"


def of_spectra(results):
    """Fig. 2: by the leading quarter of the components, in most roles of the models measured."""
    rows = results.rows("spectra")
    ranges = [f"{model} {several(list(map(above_noise, group)), '{:+.0%}'.format)}"
              for (model,), group in grouped(rows, "model").items()]
    found = sum(map(clear_of_noise, rows)) > len(rows) / 2
    return f"{', '.join(ranges)} over noise", "holds" if found else "not reproduced"


def of_exact(results):
    rows = [row for row in latent(results.rows("table3")) if "weights" in row["difference"]]
    far = max(abs(row["difference"]["weights"]["mean"]) for row in rows)
    return f"at most {far:.0e} bits, {len(rows)} merges", "ours"


def of_kinship(results):
    rows = results.rows("kinship")
    sides = {name: [kin(row) for row in rows if row["related"] == side]
             for name, side in (("cosine", True), ("strangers", False))}
    return "; ".join(f"{name} {several(side, two)}" for name, side in sides.items() if side), "ours"


def of_vae(results):
    """Every VAE trained from its random start, on every model that it never saw, float32."""
    unseen = [row for row in results.rows("vae")
              if not row["seen"] and row["dtype"] == "float32"]
    nmse = max(row["nmse"] for row in unseen)
    change = max(abs(lost(row)) for row in unseen if lost(row) is not None)
    return f"NMSE at most {nmse:.1e}, loss {change:+.2%}", ours(lossless(change) == "holds")


def of_units(results):
    """A relative of another shape, its hidden units matched by weights."""
    row, = find(cells(results), row="cell", source="grown", align="units", lam=0.5)
    return to_target(row["difference"]["base"]), ours(cell_gain(row) == "holds")


def of_expert(records, unit, results, lam=None, domain=None):
    """What a pruned model gains by its sibling's expert in one domain, and what that costs in the
    others. Without a lambda and a domain: where the gain is the surest."""
    cells = [(at, key, d, found) for row, at, found in merges_of(results, records)
             for key, d in found.items() if lam in (None, at) and domain in (None, key)]
    at, key, d, found = min(cells, key=highest)
    costs = [other for name, other in found.items() if name != key and said(*other) == "loses"]
    worst = f"others up to {number(max(costs)[0], 3)}" if costs else "no other loses"
    where = "" if lam else f"lambda {at:g}: "
    return f"{where}{key} {pm(*d)}{unit}; {worst}", "ours"


def highest(cell):
    """The mean + 2 standard errors: what a gain is at least."""
    mean, se = cell[2]
    return mean + 2 * se


class Claim(NamedTuple):
    claim: str
    paper: str
    section: str                    # its name
    measure: Callable               # results -> (measured, verdict)


# --- The page -------------------------------------------------------------------------------------
CLAIMS = (
    Claim("self-merging gains, K 8", "MMLU 32.2 → 35.1", "table2",
          partial(of_row, "2", "base: self-merge, K 8 [r 1]", "base")),
    Claim("a soup of LoRA experts gains in latents", "MMLU 49.7 → 56.0", "table3",
          partial(of_row, "3", "soup, latents [r 1]", "weights")),
    Claim("task arithmetic of two experts gains in latents", "MMLU 52.2 → 55.1", "table4",
          partial(of_row, "4", "code + arithmetic: task arithmetic, latents [r 1]", "weights")),
    Claim("another shape gains at lambda 0.1", "WinoGrande 56.8 → 57.8", "table5",
          of_table5),
    Claim("another shape gains at the best lambda", "0.05 to 0.20", "figure4", of_chosen),
    Claim("transport makes the difference", "unstable without", "figure4", of_alignment),
    Claim("MLP and attention of another shape gain", "MMLU 40.8 → 42.1", "table6",
          partial(of_row, "6", "large -> base, both", "base")),
    Claim("a VAE serves unseen models at r = 1.6", "MMLU 40.8 → 40.0", "table7",
          partial(of_codec, "7", "base-seed2", 1.6)),
    Claim("a VAE keeps what it was trained on, r = 2", "MMLU 41.4 → 39.8", "table7",
          partial(of_codec, "8", "code", 2.0)),
    Claim("a real model survives r > 1", "up to r = 4", "real", of_real),
    Claim("weights fill few dimensions", "Fig. 2", "spectra", of_spectra),
    Claim("one stage collapses, two do not", "abstract", "curves", of_collapse),
    Claim("distilling in stage 2 helps", "abstract", "ablation",
          partial(of_part, "r = 1", "distillation")),
    Claim("a VAE serves unseen models at r = 1", "", "vae", of_vae),
    Claim("exact codec: latent merge minus plain average", "", "table3", of_exact),
    Claim("kinship tells relatives from strangers", "", "kinship", of_kinship),
    Claim("a relative of another shape, units matched, lambda 0.5", "", "figure4", of_units),
    Claim("a pruned model + sibling's expert", "", "pruned",
          partial(of_expert, "pruned", "")),
    Claim("the same, a real model, lambda 0.5", "", "sibling",
          partial(of_expert, "sibling", " nats", lam=0.5, domain="arithmetic")))
INTRO = f"""# Results

Built by `python experiments/report.py` from `experiments/results/*.jsonl`; not to be edited.
Where nothing else is said, *bits* are bits per byte on test text, the mean over three domains.
Lower is better.
*minus x*: paired difference to x ± standard error, sqrt(SE of texts^2 + SE of seeds^2).
*sd*: over seeds.
*beats* and *loses* are beyond two standard errors, *ties* is within them.

| verdict | of a claim of the paper |
|---|---|
| holds | a gain over the model before and every control; of a codec: loss within {LOSSLESS:.0%} |
| ties | a gain over the model before, worse than no control |
| not reproduced | anything else |
| ours | what we added: the paper has no such claim; *no*: it does not hold |

Fig. 2 holds if PCA at r = 4 leaves {STRUCTURE:.0%} less than of white noise in most roles;
shown is how much more of the variance the leading quarter of the components holds.
Two stages hold if one ends with an NMSE above {COLLAPSED} and two end below {COLLAPSED / 2}.
Distilling holds if leaving it out costs bits.
"""


# What explored and found nothing. Its code is not here any more; its numbers are not lost.
LEFT = """## No longer here

Code, tables and records of what follows are in commit 8ee01b8.

A codec better than the average: of 36 merges of two experts through nine codecs, exact or trained,
4 beat the plain average (by 0.0002 bits at most), 18 tied, 14 lost. Without the codec's own error
(`--residual`) a VAE trained at r = 1 stayed within 1.4 % of the experts' distance of that average.

Transfer between unrelated models, brought into the target's coordinates by weights or by text, or
with rows as chunks: of 6 merges chosen on validation text none beat the target and every control.
No merge measured cost less than 0.0039 ± 0.0014 bits, at the smallest lambda tried, 0.05.

How far a relative may drift: `base` with half of `arithmetic`, trained on for up to 3000 steps, or
with up to three quarters of its units initialised anew, and matched again: 8 of 8 gained in some
domain, in 2 of them nothing else was lost. The lowest kinship of a gain was 0.42 (strangers 0.15).

The curriculum with 400 + 200 steps and a network of width 128: leaving distillation out gained
0.0033 ± 0.0007 bits on unseen models; Huber's loss gained 0.0015 ± 0.0007; companding cost 0.0035 ±
0.0009, one scale for all tensors 0.0074 ± 0.0018, one code per window 3.19 ± 0.18.
"""


def present(results, section):
    return all(results.rows(name) for name in section.needs)


def slug(title):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def verdicts(results, page="experiments/RESULTS.md"):
    """A row per claim, its verdict a link to the section; the links' targets stand below."""
    titles = {section.name: section.title for section in SECTIONS if present(results, section)}
    lines, used = [], {}
    for claim in CLAIMS:
        if claim.section in titles:
            measured, word = claim.measure(results)
            lines.append([claim.claim, claim.paper, measured, f"[{word}][{claim.section}]"])
            used[claim.section] = f"[{claim.section}]: {page}#{slug(titles[claim.section])}"
    return table(["claim", "paper", "here", "verdict"], lines) + list(used.values())


def page(results):
    lines = [INTRO, *verdicts(results, ""), ""]
    for section in SECTIONS:
        if present(results, section):
            rows, sentences, tables = section.lines(results)
            lines += [f"## {section.title}", ""]
            if section.picture:
                lines += [f"![{section.title}](figures/{section.picture}.svg)", ""]
            files = ", ".join(f"`results/{name}.jsonl`" for name in section.needs)
            how = section.command or next(filter(None, (r.get("command") for r in rows)), "")
            command = [f"    {line}" for line in how.splitlines()]
            lines += [*sentences, "", *tables, *command, *[""] * bool(command),
                      f"{files}: {facts(rows)}.", ""]
    return "\n".join([*lines, LEFT])


# --- The README -----------------------------------------------------------------------------------
def readme_merge(results):
    """Without the round trips: the page has them."""
    return [line for line in merges(results)[2][:-1] if "-roundtrip" not in line]


def readme_bench(results):
    """Time and memory beside mergekit; memory beside size."""
    peer, lines = results.rows("bench-peer")[-1], []
    for (network,), group in grouped(results.rows("bench-memory"), "network").items():
        sizes, peaks = ([row[key] for row in group] for key in ("bytes", "peak_mib"))
        lines.append([f"memory, {several([n / 1e9 for n in sizes], '{:.1f}'.format)} GB per "
                      f"checkpoint, {network} network", f"{several(peaks, '{:.0f}'.format)} MiB",
                      "", ""])
    return table(["what", "here", peer["peer"], "ratio [least, largest]"],
                 [*peer_rows(peer), *lines])[:-1]


def readme_main(results):
    """What the main command printed."""
    return [f"    {line}" for line in results.rows("main")[-1]["text"].splitlines()]


BLOCKS = {"main": readme_main, "verdicts": verdicts, "merge": readme_merge, "bench": readme_bench}


def fill(text, results):
    """The README with every block of BLOCKS that it has a place for."""
    for name, block in BLOCKS.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        if begin in text and end in text:
            before, rest = text.split(begin, 1)
            text = "".join([before, begin, *(f"{line}\n" for line in block(results)), end,
                            rest.split(end, 1)[1]])
    return text


# --- The command ----------------------------------------------------------------------------------
def pictures(results):
    """The names of the pictures that the records allow."""
    return [section.picture for section in SECTIONS
            if section.picture and present(results, section)]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-figures", action="store_true", help="tables only")
    args = parser.parse_args()
    results, readme = Results(HERE / "results"), HERE.parent / "README.md"
    (HERE / "RESULTS.md").write_text(page(results))
    readme.write_text(fill(readme.read_text(), results))
    if args.no_figures or not figures.available():
        print("figures: skipped" + ("" if args.no_figures else ", matplotlib is not installed"))
        return
    (HERE / "figures").mkdir(exist_ok=True)
    for name in pictures(results):
        (HERE / "figures" / f"{name}.svg").write_text(figures.svg(name, results))


if __name__ == "__main__":
    main()
