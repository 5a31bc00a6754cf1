"""What each section of RESULTS.md says, from the rows: sentences, tables, verdicts.

In:    results/*.jsonl.
Out:   a section is a function: Results -> (the rows it used, sentences, lines of its tables).
Paper: Tables 2 to 8, Fig. 2 and 4, and the abstract's curriculum.
ours:  verdicts are computed, and so is every number in a sentence. A difference counts beyond two
       standard errors (scores.verdict).
Left out on purpose: the page, the claims, the README (report.py).
Previous: paper_tables.py. Next: report.py.
"""
import math
import re
import statistics
from functools import partial
from operator import itemgetter
from typing import Callable, NamedTuple

import figures
from evaluate import DOMAINS
from records import cells, curve, find, grouped, over_seeds
from scores import Difference, verdict
from train import Schedule

LOSSLESS = 0.01         # of the loss: what still counts as the same model
LEAST = 1.2             # r beyond which the loss is large enough to compare two kinds of error
STRUCTURE = 0.05        # of the white-noise line: less than this below it is no structure
CONTROLS = ("zero", "noise", "shuffled", "neighbour")
MODELS = {"smollm2_hf": "SmolLM2-135M"}     # folder in the records -> the model in it
FACTS = {"python": "Python", "torch": "torch", "commit": "commit", "pot": "POT", "device": "device", "dtype": "dtype",
         "threads": "threads", "load": "load", "rounds": "rounds", "documents": "documents"}


# --- Rows -----------------------------------------------------------------------------------------
def row_of(results, table, name):
    """One row of Tables 2, 3, 4 and 6."""
    return find(results.rows(f"table{table}"), row=name)[0]


# --- Verdicts -------------------------------------------------------------------------------------
def said(mean, se):
    """beats, ties or loses: a difference in bits, negative is better."""
    return verdict(Difference(mean, se, 0.0))


def gain(differences):
    """What becomes of a claimed gain. differences: (mean, se) to what was there before, then to
    every control."""
    words = [said(*d) for d in differences]
    if set(words) == {"beats"}:
        return "holds"
    return "ties" if words[0] == "beats" and "loses" not in words else "not reproduced"


def lossless(change):
    return "holds" if abs(change) <= LOSSLESS else "not reproduced"


def tally(rows, label, name):
    """How often rows beat, tie with and lose to `label`: beat the NAME 0 times, tie 8, lose 6"""
    found = [row["difference"][label] for row in rows if label in row["difference"]]
    words = [said(d["mean"], d["se"]) for d in found]
    beats, ties, loses = map(words.count, ("beats", "ties", "loses"))
    return f"beat {name} {beats} time{'s' * (beats != 1)}, tie {ties}, lose {loses}"


# --- Text -----------------------------------------------------------------------------------------
def digits(error, most=4):
    """Decimals that an error justifies: two of its digits, at most four decimals."""
    return min(most, max(0, 1 - math.floor(math.log10(error)))) if error > 0 else most


def number(value, decimals):
    text = f"{value:+.{decimals}f}"
    return text if float(text) else text[1:]        # no sign on a zero


def pm(mean, se, signed=True, most=4):
    """+0.0566 ± 0.0034"""
    text, decimals = number(mean, digits(se, most)), digits(se, most)
    return f"{text if signed else text.lstrip('+')} ± {se:.{decimals}f}"


def pm_of(d, most=4):
    return pm(d["mean"], d["se"], most=most) if d else ""


def said_of(d):
    """A difference with its verdict, computed again from its numbers."""
    return f"{pm_of(d)} {said(d['mean'], d['se'])}" if d else ""


def short(value):
    """5.1e-14, 0.008, 0.353"""
    return "" if value is None else f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3f}"


def several(values, form=short):
    """4.5e-04 to 0.007, or one of them where they look alike."""
    return " to ".join(dict.fromkeys(map(form, (min(values), max(values)))))


def span(values, form=".2f"):
    """0.77 [0.69, 0.80]: median, least, largest."""
    middle, low, high = (format(value, form) for value in values)
    return f"{middle} [{low}, {high}]"


def table(head, rows):
    head, *lines = ("| " + " | ".join(map(str, line)) + " |" for line in (head, *rows))
    return [head, "|" + "---|" * (head.count("|") - 1), *lines, ""]


def facts(rows):
    """What the numbers hang on, as the records say it; seeds are the most that any row has."""
    found = []
    for key, name in FACTS.items():
        values = sorted({row[key] for row in rows if row.get(key) is not None})
        if len(values) > 2 and not isinstance(values[0], str):
            values = [f"{values[0]:g} to {values[-1]:g}"]
        found += [f"{name} {' and '.join(map(str, values))}"] if values else []
    seeds = len({row["seed"] for row in rows if row.get("seed") is not None})
    for row in rows:
        seeds = max(seeds, row.get("seeds", 0), len(row.get("per_seed", [])),
                    len(row.get("runs", [])))
    return "; ".join([f"{len(rows)} rows", *found, *([f"seeds {seeds}"] if seeds else [])])


# --- Tables 2, 3, 4, 6: rows held against other rows ----------------------------------------------
# A section is a function: results -> (records it used, sentences, lines of its tables).
def expert_table(rows, labels, name="row"):
    head = [name, "bits", "sd", *(f"minus {label}" for label in labels)]
    lines = []
    for row in rows:
        sd = f"{statistics.stdev(row['per_seed']):.4f}" if row["seeds"] > 1 else ""
        lines.append([row["row"], f"{row['test']['pooled']:.3f}", sd,
                      *(said_of(row["difference"].get(label)) for label in labels)])
    return table(head, lines)


def latent(rows):
    return [row for row in rows if row["kind"] == "latent"]


def codecs_of(rows):
    """What the brackets in the names of the rows stand for."""
    trained, names = rows[0]["codecs"], " ".join(row["row"] for row in rows)
    parts = ["[r 1]: the exact, untrained codec (`--vae exact`), on float32 copies, so equality "
             "with weights is expected"]
    if "beta 0.01]" in names:
        parts.append(f"[beta 0.01]: sigma {trained['r 1, beta 0.01']['sigma']:.1f}, else "
                     f"{trained['r 1']['sigma']:.2f}")
    if "[r 2]" in names:
        steps = trained["r 2"]["steps"]
        earlier = ", before the schedule of the training changed" * (steps != Schedule.steps2)
        parts.append(f"[r 2]: trained for {steps} steps of stage 2{earlier}")
    return "; ".join(parts) + "."


def table2(results):
    rows, lines = results.rows("table2"), []
    for model in dict.fromkeys(row["row"].split(":")[0] for row in rows):
        group = [row | {"row": row["row"].removeprefix(f"{model}: ").removeprefix("self-merge, ")}
                 for row in rows if row["row"].split(":")[0] == model]
        lines += expert_table(group, ("base", "round trip", "noise"), f"model: `{model}`")
    draws = [r for r in latent(rows) if "self-merge" in r["row"]]
    small = [r for r in draws if r["row"].startswith("base") and "beta" in r["row"]]
    return rows, [
        codecs_of(rows),
        "K: the mean of K posterior draws, decoded; *noise*: white noise of the same size on the "
        "weights, averaged over K; *prior*: latents of pure noise; *base*: the model.",
        f"The {len(draws)} self-merges {tally(draws, 'base', 'the model')}; they "
        f"{tally(draws, 'noise', 'white noise')}.",
        "`base` with beta 0.01 loses " + "; ".join(
            f"{row['row'].split(', ')[1].split(' [')[0]}: {pm_of(row['difference']['base'])}"
            for row in small) + " bits."], lines


def table3(results):
    rows = results.rows("table3")
    best = min((row for row in rows if row["kind"] != "parent"), key=bits)
    return rows, [
        "Ten LoRA experts of `base`, folded into it and merged as whole models.",
        codecs_of(rows),
        f"The {len(latent(rows))} latent merges {tally(latent(rows), 'base', 'the base')}; they "
        f"{tally(latent(rows), 'weights', 'the same merge of weights')}.",
        f"Lowest: {best['row']}, {pm_of(best['difference']['base'])} bits to the base."
    ], expert_table(rows, ("base", "whole models", "weights"))


def bits(row):
    return row["test"]["pooled"]


def table4(results):
    rows = results.rows("table4")
    one, two_ = ([r for r in latent(rows) if mark in r["row"]] for mark in ("r 1", "r 2"))
    weight = find(rows, kind="weight")
    return rows, [
        "Lambda, density and p of every method are chosen on validation text.",
        codecs_of(rows),
        *(f"The {len(group)} latent merges at r = {r} {tally(group, 'base', 'the base')}; they "
          f"{tally(group, 'weights', 'the same merge of weights')}."
          for r, group in ((1, one), (2, two_)) if group),
        f"The {len(weight)} methods on weights {tally(weight, 'base', 'the base')}."
    ], expert_table(rows, ("base", "parent", "weights"))


def table6(results):
    rows, lines = results.rows("table6"), []
    names = [row["row"] for row in rows]
    parts = [part for part in ("MLP", "attention", "both") if f"code + prose, {part}" in names]
    for tag in ("large -> base", "code + prose"):
        columns = [row_of(results, "6", f"{tag}, {part}") for part in parts]
        lines += table([tag, *parts], [
            ["bits", *(f"{bits(row):.3f}" for row in columns)],
            *([f"minus {label}", *(said_of(row["difference"][label]) for row in columns)]
              for label in columns[0]["difference"])])
    across = [row_of(results, "6", f"large -> base, {part}") for part in parts]
    return rows, [
        "What is merged: across shapes by the paper's Gaussian map at lambda 0.1, and two experts.",
        f"Across shapes the {len(across)} merges {tally(across, 'base', 'the target')}; they "
        f"{tally(across, 'zero', 'pure shrinkage (*zero*)')}; they "
        f"{tally(across, 'noise', 'noise')}."], lines


# --- Table 5 and Figure 4: other shapes -----------------------------------------------------------
def chosen(results, source):
    """The cell of a source with the fewest bits on validation text, as grid.choose finds it."""
    rows = [row for row in find(cells(results), row="cell", source=source)
            if row["align"] != "weights"]
    return min(rows, key=validation)


def validation(row):
    return row["validation"]["pooled"]


def cell_gain(row):
    """The verdict of one cell: against the target, then against every control."""
    return gain([(d["mean"], d["se"]) for d in row["difference"].values()])


def table5(results):
    rows, lines = find(results.rows("figure4"), control=None, row="cell"), []
    rows = [row for row in rows if row["pairing"] != "index"]
    labels, shown = ("base", "zero", "noise", "shuffled", "carried"), []
    for lam, title in ((0.1, "transport and interpolation, lambda 0.1"),
                       (1.0, "transport only, lambda 1")):
        shown += find(rows, lam=lam)
        lines += table([title, *(f"minus {label}" for label in labels)], [
            [f"{row['source']}: {'plain average' if row['align'] == 'weights' else row['align']}"
             + (", n < d" if row["few"] else ""),
             *(pm_of(row["difference"].get(label)) for label in labels)]
            for row in find(rows, lam=lam)])
    words = [cell_gain(row) for row in shown]
    return shown, [
        "*carried*: Gaussian noise in the place of the source, sent through the same transport. "
        "*units* (ours): layers and hidden units matched by their weights before.",
        f"Of {len(words)} merges shown {words.count('holds')} beat the target and every control; "
        "the verdict per source is at Figure 4.",
        *(f"n < d: chunks of {c} weights, fewer chunks in a tensor than numbers in a chunk; the "
          "controls are of that size."
          for c in sorted({row["chunk"] for row in shown if row["few"]}))], lines


def figure4(results):
    lines, sentences = [], [
        "Bits per byte minus the target's, over lambda; layers paired by depth; 0 means that the "
        "merge did no harm."]
    for source in sources_of(cells(results)):
        curves = {align: curve(results, source=source, align=align, pairing="depth")
                  for align in ("none", "mean", "gaussian", "sinkhorn")}
        curves["noise by Sinkhorn"] = curve(results, source=source, pairing="depth",
                                                    control="carried")
        lines += curve_table(f"`{source}`: lambda", curves)
        if find(cells(results), source=source, align="units"):
            lines += curve_table(f"`{source}`, units matched by weights: lambda", {
                name: curve(results, source=source, align="units", control=control)
                for name, control in (("the source", None), ("noise in its place", "carried"),
                                      ("its neighbouring layers", "neighbour"))})
        sentences.append(chosen_text(source, chosen(results, source)))
    controls = {control: curve(results, control=control)
                for control in ("zero", "noise", "shuffled")}
    lines += curve_table("controls: lambda", controls) + chosen_table(results)
    return [row for row in cells(results) if row["lam"]], sentences, lines


def chosen_text(source, row):
    """`grown`, chosen on validation: units, lambda 0.5: **holds**, -0.01; all 5 controls lose."""
    base, *controls = ((d["mean"], d["se"]) for d in row["difference"].values())
    beaten = [said(*d) for d in controls].count("beats")
    many = f"all {len(controls)}" if beaten == len(controls) else f"{beaten} of {len(controls)}"
    return (f"`{source}`, chosen on validation: {row['align']}, lambda {row['lam']:g}: "
            f"**{cell_gain(row)}**, {pm(*base)}; {many} controls lose.")


def chosen_table(results):
    """The chosen merges against what they have to beat, a column per source."""
    rows = {source: chosen(results, source) for source in sources_of(cells(results))}
    labels = dict.fromkeys(label for row in rows.values() for label in row["difference"])
    return table(["chosen, minus", *(f"`{source}`" for source in rows)], [
        [label, *(said_of(row["difference"].get(label)) for row in rows.values())]
        for label in labels])


def sources_of(cells):
    return dict.fromkeys(row["source"] for row in find(cells, row="cell"))


def curve_table(name, curves):
    lambdas = [lam for lam, _, _ in next(iter(curves.values()))]
    return table([name, *curves], [
        [f"{lam:g}", *(pm(*curve[i][1:]) for curve in curves.values())]
        for i, lam in enumerate(lambdas)])


# --- Tables 7 and 8, the real model, the ablation -------------------------------------------------
def table7(results):
    return codec_lines(results, "7", "unseen")


def table8(results):
    return codec_lines(results, "8", "fitted on it")


def codec_lines(results, which, title):
    rows, lines = results.rows(f"table{which}"), []
    for name in dict.fromkeys(row["checkpoint"] for row in rows):
        lines += [f"Table {which}, `{name}`, {title}:", "", *codec_table(
            find(rows, checkpoint=name))]
    return rows, [], lines


def codec(results):
    used, lines = [], []
    for rows, _, part in (table8(results), table7(results)):
        used += rows
        lines += part
    vae = [row for row in used if row["method"] == "VAE"]
    kept = [row for row in vae if abs(change(row)) <= LOSSLESS]
    pca = [row["nmse"] / row["white_noise"] for row in used
           if row["method"] == "PCA" and row["checkpoint"] in ("base-seed2", "large")]
    louder = [row["difference"]["mean"] / by_key(used, row, "noise")["difference"]["mean"]
              for row in vae if row["ratio"] > LEAST]
    return used, [
        "NMSE: mean squared error over the variance. The codec is fitted on `code` and `prose`; "
        "1 - 1/r is what any linear code loses on white noise.",
        f"Ratios at which the VAE keeps every model within {LOSSLESS:.0%} of its loss: "
        f"{' and '.join(f'{r:g}' for r in sorted(all_kept(vae, kept))) or 'none'}.",
        f"PCA on another seed or size has {min(pca):.2f} to {max(pca):.2f} of white noise's NMSE.",
        f"At r > {LEAST} noise of equal size would cost {min(louder):.1f} to {max(louder):.1f} "
        "times fewer bits, so NMSE understates the harm.",
        "eff. r also counts the VAE's weights; below 1 they exceed what is saved."], lines


def change(row):
    return row["difference"]["mean"] / row["before"]["pooled"]


def by_key(rows, like, method):
    return find(rows, checkpoint=like["checkpoint"], ratio=like["ratio"], method=method)[0]


def all_kept(rows, kept):
    """The ratios at which no row is missing from `kept`."""
    return {row["ratio"] for row in kept} - {row["ratio"] for row in rows if row not in kept}


def codec_table(rows):
    lines = []
    for vae in find(rows, method="VAE"):
        group = {row["method"]: row for row in find(rows, ratio=vae["ratio"])}
        nmse = [short(group[m]["nmse"]) if m in group else "" for m in (
            "VAE", "PCA", "PCA, c = 1024")]
        lost = [pm_of(group[m]["difference"], 3) if m in group else "" for m in (
            "VAE", "PCA", "noise", "PCA, c = 1024")]
        lines.append([f"{vae['ratio']:.4g}", f"{vae['white_noise']:.3f}", *nmse, *lost,
                      f"{vae['effective_ratio']:.2f}"])
    return table(["r", "1 - 1/r", "NMSE: VAE", "PCA", "c 1024", "bits lost: VAE", "PCA", "noise",
                  "PCA, c 1024", "eff. r"], lines)


def real(results):
    rows, sentences, lines = results.rows("real"), [], []
    for (name,), group in grouped(rows, "model").items():
        vae = find(group, method="VAE")
        kept = [row["ratio"] for row in vae if abs(row["change"]) <= LOSSLESS]
        least = min((row for row in vae if row["ratio"] > 1), key=itemgetter("ratio"))
        sentences += [
            f"{model_name(name)}, {group[0]['weights'] / 1e6:.0f} M encoded weights, loss "
            f"{group[0]['loss_before']:.2f} nats per token: the largest r within {LOSSLESS:.0%} of "
            f"the loss is {max(kept, default=0):g}; at r = {least['ratio']:.4g} it rises by "
            f"{least['change']:.0%}."]
        lines += table(["r", "1 - 1/r", "code", "NMSE", "loss", "change", "effective r",
                        "NMSE, unseen"], [
            [f"{row['ratio']:.4g}", f"{row['white_noise']:.3f}", row["method"], short(row["nmse"]),
             f"{row['loss']:.2f}", f"{row['change']:+.0%}", two(row["effective_ratio"]),
             short(row["unseen_nmse"])] for row in group])
    return rows, sentences, lines


def model_name(folder):
    return MODELS.get(folder, folder)


def two(value):
    return "" if value is None else f"{value:.2f}"


def ablation(results):
    rows, lines = results.rows("ablation"), []
    for row in rows:
        if not lines or row["group"] != lines[-1][0]:
            lines.append([row["group"], f"**{row['group']}**", *[""] * 6])
        mean = partial(mean_of_runs, row)
        kl = statistics.mean(run["stages"][-1].get("kl", 0.0) for run in row["runs"])
        seen, unseen = ("code", "prose"), ("arithmetic", "base-seed2")
        lines.append([row["group"], row["variant"], short(mean(seen, "nmse")),
                      number(mean(seen, "difference"), 3), short(mean(unseen, "nmse")),
                      number(mean(unseen, "difference"), 3), f"{kl:.2f}",
                      said_of(row["difference"]) if row["difference"]["se"] else ""])
    return rows, [
        "One change at a time, equal steps and chunks; bits: what the decoded models lose; the "
        "last column, unseen checkpoints, is against the group's first row.",
        "KL: nats per latent number; near 0 the code holds nothing."
    ], table(["variant", "NMSE, seen", "bits lost, seen", "NMSE, unseen", "bits lost, unseen", "KL",
              "minus the first"], [line[1:] for line in lines])


def mean_of_runs(row, names, key):
    return statistics.mean(run["checkpoints"][name][key] for run in row["runs"] for name in names)


def part_worth(results, group, variant):
    """(difference, verdict): what it costs to leave a part of the curriculum out. A group's first
    row has the part; `distillation` has what its first row lacks."""
    d = find(results.rows("ablation"), group=group, variant=variant)[0]
    mean, se = d["difference"]["mean"], d["difference"]["se"]
    if variant == "distillation":
        mean = -mean
    return (mean, se), {"loses": "holds", "ties": "ties", "beats": "not reproduced"}[said(mean, se)]


# --- Merges of the small models -------------------------------------------------------------------
TWO = "experiments/models/code.safetensors experiments/models/prose.safetensors"
MERGE = f"""python merge.py {TWO} -o merged.safetensors
python merge.py {TWO} --space weight \\
    -o average.safetensors
python merge.py {TWO} --init random \\
    -o learnt.safetensors
python merge.py {TWO.split()[0]} --roundtrip -o code-roundtrip.safetensors
python merge.py {TWO.split()[1]} --roundtrip -o prose-roundtrip.safetensors
python experiments/evaluate.py {TWO} \\
    average.safetensors code-roundtrip.safetensors prose-roundtrip.safetensors merged.safetensors \\
    learnt.safetensors \\
    --record experiments/results/merge.jsonl"""


def merges(results):
    """`merged` is through the reference VAE, `learnt` through one trained on the two inputs."""
    rows = results.rows("merge")
    scores = {row["file"].removesuffix(".safetensors"): row["scores"] for row in rows}
    keys, names = (*DOMAINS, "accuracy"), [*DOMAINS, "accuracy of sums"]
    documents = rows[0]["scores"]["code"]["documents"]
    apart = {name: max(abs(scores[name][key]["mean"] - scores["average"][key]["mean"])
                       for key in DOMAINS) for name in ("merged", "learnt")}
    return rows, [
        f"Bits per byte on held-out text (lower is better), {documents} excerpts per domain; the "
        "error is that of the text, the same for all rows.",
        "Largest difference between the latent merge and the plain average: "
        f"{apart['merged']:.0e} bits (bfloat16 rounding and the VAE).",
        f"`learnt`: through a VAE trained on the inputs (`--init random`); {apart['learnt']:.0e} "
        "bits from the average at most."
    ], table(["file", *names], [
        [f"`{name}`", *(pm(score[key]["mean"], score[key]["error"], False) for key in keys)]
        for name, score in scores.items()])


# --- Speed and memory -----------------------------------------------------------------------------
def peer_rows(peer):
    """One line per way and quantity: ours, theirs, ratio [least, largest] of the rounds."""
    for way, name in (("exact", "latent merge, exact codec"), ("weight", "`--space weight`")):
        for key, ratios, form, unit in (("seconds", "ratios", ".1f", "s"),
                                        ("peak_mib", "memory_ratios", ".0f", "MiB")):
            mine, theirs = (format(peer[key][who][0], form) for who in (way, "mergekit"))
            what = f"{name}: {'time' if unit == 's' else 'memory'}"
            yield [what, f"{mine} {unit}", f"{theirs} {unit}", span(peer[ratios][way])]


def bench_peer(results):
    peer = results.rows("bench-peer")[-1]
    same = "the same bits" if peer["equal_bits"] else "other bits"
    return [peer], [
        f"Beside {peer['peer']}'s linear merge of two models of {peer['bytes'] / 1e9:.2f} GB, "
        "bfloat16; whole processes, imports included, in turns.",
        f"Of the seconds, starting takes {peer['start']['exact']:.1f} here and "
        f"{peer['start']['mergekit']:.1f} there; `--space weight` writes {same} as {peer['peer']}."
    ], table(["way", "here", "mergekit", "ratio [least, largest]"], peer_rows(peer))


def bench_memory(results):
    rows = results.rows("bench-memory")
    peaks = [row["peak_mib"] for row in rows]
    times = max(row["bytes"] for row in rows) / min(row["bytes"] for row in rows)
    return rows, [
        f"Peak of anonymous memory: {several(peaks, '{:.0f}'.format)} MiB while the checkpoint "
        f"grows {times:.1f} times; {rows[0]['bound_mib']} MiB are allowed."
    ], table(["GB per checkpoint", "network", "peak MiB", "seconds"], [
        [f"{row['bytes'] / 1e9:.2f}", row["network"], f"{row['peak_mib']:.0f}",
         f"{row['seconds']:.0f}"] for row in rows])


def bench_merge(results):
    rows, lines = results.rows("bench-merge"), []
    for (dtype, network), group in grouped(rows, "dtype", "network").items():
        ratios = sorted(row["ratio"] for row in group)
        seconds, least = (statistics.median(row[key] for row in group)
                          for key in ("seconds", "least"))
        lines.append([dtype, network, f"{seconds:.0f}", f"{least:.1f}",
                      span([statistics.median(ratios), ratios[0], ratios[-1]])])
    return rows, [
        f"merge.py on two checkpoints of {rows[0]['weights'] / 1e6:.0f} M weights, over the time "
        "that its arithmetic takes at the multiply rate of all cores plus its bytes at the disk's "
        "copy rate."
    ], table(["dtype", "network", "seconds", "least possible", "ratio [least, largest]"], lines)


def bench_codec(results):
    rows = results.rows("bench-codec")
    return rows, [
        "*network*: the products and what stands between them; *whole*: with scaling and chunks. "
        "*full*: all blocks compute; *exact*: two small products per chunk."
    ], table(["device", "dtype", "width", "network", "part", "of the multiply rate", "weights/s"], [
        [row["device"], row["dtype"], row["width"], row["network"], row["part"],
         f"{row['fraction']:.2f}", f"{row['weights_per_s'] / 1e6:.1f} M"] for row in rows])


def training_rows(results):
    """(recipe, seconds to NMSE 1e-2: median, least, largest; last NMSE; whether it got there)."""
    for (recipe,), group in grouped(results.rows("bench-training"), "recipe").items():
        values = [sorted(row[key] for row in group) for key in ("seconds", "final")]
        seconds, final = ([statistics.median(v), v[0], v[-1]] for v in values)
        yield recipe, seconds, final, all(row["reached"] for row in group)


def bench_training(results):
    rows = results.rows("bench-training")
    lines = [[recipe, span(seconds, ".1f") if there else f"not within {span(seconds, '.0f')}",
              several(final)] for recipe, seconds, final, there in training_rows(results)]
    return rows, [
        "Seconds to NMSE 1e-2 on held-out windows, within "
        f"{max(row['budget'] for row in rows)} steps. *release*: the recipe of the paper's own "
        "code; *curriculum*: two stages from a random start."
    ], table(["recipe", "seconds", "last NMSE"], lines)


def bench_align(results):
    rows = results.rows("bench-align")
    plans, gauss = ([row for row in rows if row["what"] == what]
                    for what in ("sinkhorn", "gaussian_map"))
    names = "sinkhorn", "sinkhorn_stabilized", "sinkhorn_log"
    over = [max(row["ratios"][name] for name in names) for row in plans]
    lines = table(["cloud", "n x m", "epsilon", "tolerance", "ours, s",
                   *(f"ours / {name}" for name in names)], [
        [row["kind"], f"{row['n']} x {row['m']}", f"{row['epsilon']:g}", f"{row['tolerance']:.0e}",
         f"{row['seconds']['ours']:.3f}", *(f"{row['ratios'][name]:.2f}" for name in names)]
        for row in plans])
    return rows, [
        "Our time / time of POT's fastest solver, at equal error of the marginals: median "
        f"{statistics.median(over):.2f}, {min(over):.2f} to {max(over):.2f} (below 1: ours is "
        f"faster, in {sum(r < 1 for r in over)} of {len(over)}).",
        *(f"Gaussian map, n = {row['n']}, {row['latent']} dimensions: "
          f"{row['ratios']['pot']:.2f} of POT's time; the maps differ by {row['difference']:.0e}."
          for row in gauss)], lines


# --- Beyond the paper: drawn and printed as soon as there are records -----------------------------
def curves(results):
    rows, lines = results.rows("curves"), []
    for (name,), group in grouped(rows, "name").items():
        ends = [row["points"][-1] for row in group]
        seconds = [figures.shifted(row["points"])[0][-1] for row in group]
        lines.append([name, len(group), several([end["nmse"] for end in ends]),
                      several(seconds, "{:.0f}".format),
                      several([end["kl"] for end in ends if end["kl"] is not None], two)])
    optimum = linear_optimum(results, 1.0)
    return rows, [
        "NMSE on held-out windows over seconds of training, a line per seed; the dot is the start "
        "of stage 2. KL: nats per latent number.",
        *(["At beta 1 Eq. 1 itself is lowest when almost nothing is encoded (the best linear VAE "
           f"there has an NMSE near {optimum:.2f}), so two stages cannot help."]
          if optimum else []),
        *paper_steps(rows)
    ], table(["recipe", "seeds", "last NMSE", "seconds", "last KL"], lines)


def paper_steps(rows):
    """[how many steps the paper's configuration got in how much time]"""
    return [f"{row['name'].capitalize()} got {sum(lasts(row['points'])):g} steps in "
            f"{figures.shifted(row['points'])[0][-1]:.0f} s; they end at an NMSE of "
            f"{row['points'][-1]['nmse']:.2f}."
            for row in rows if "paper" in row["name"]]


def lasts(points):
    """The last step of each stage."""
    return {point["stage"]: point["step"] for point in points}.values()


def linear_optimum(results, beta):
    """NMSE of the linear VAE that minimises Eq. 1 on the chunks of the family; None without PCA.

    Equation:  per component of variance v: beta^2 / v where v > beta, else v; the mean over all
    Source:    the linear VAE shrinks a component by 1 - beta / v (Lucas et al. 2019); the variances
               are read off Table 8, the NMSE of PCA at every r, as steps between two ratios
    """
    rows = find(results.rows("table8"), method="PCA")
    left = {kept: statistics.mean(row["nmse"] for row in group) for kept, group in
            sorted(grouped([row | {"kept": 1 / row["ratio"]} for row in rows],
                                   "kept").items())}
    ends = [(0.0, 1.0), *((kept, nmse) for (kept,), nmse in left.items()), (1.0, 0.0)]
    total = 0.0
    for (kept, nmse), (more, less) in zip(ends, ends[1:]):
        share = more - kept
        variance = (nmse - less) / share if share else 0.0
        total += share * (beta ** 2 / variance if variance > beta else variance)
    return total if rows else None


def kin(row):
    """The mean cosine of the layers that have a partner, of strangers that of all."""
    matched = [value for value, i in zip(row["similarity"], row["layers"]) if i is not None]
    return statistics.mean(matched or row["similarity"])


def kinship(results):
    rows = results.rows("kinship")
    sides = [[kin(row) for row in rows if row["related"] == side] for side in (True, False)]
    apart = all(sides) and ("above" if min(sides[0]) > max(sides[1]) else "not above")
    return rows, [
        "Kinship: the mean cosine of matched hidden units. *null*: the same with each unit's "
        "weights shuffled, what strangers reach. *layers*: for each target layer the source's, -: "
        "none.",
        *([f"The lowest of the related pairs, {min(sides[0]):.3f}, is {apart} the highest of the "
           f"others, {max(sides[1]):.3f}."] if apart else [])
    ], table(["source", "target", "related", "kinship", "null", "layers"], [
        [f"`{row['source']}`", f"`{row['target']}`", "yes" if row["related"] else "no",
         f"{kin(row):.3f}", f"{row['null']:.3f}",
         layer_text(row["layers"])] for row in rows])


def layer_text(layers, most=12):
    """0 2 3 -: the source's layer of each of the target's."""
    shown = ["-" if layer is None else str(layer) for layer in layers]
    return " ".join(shown if len(shown) <= most else [*shown[:most], "..."])


def helped_text(words):
    """words: per row the verdicts of all domains."""
    helped = [found for found in words if "beats" in found]
    return (f"{len(helped)} beat the target in some domain; in "
            f"{sum('loses' not in found for found in helped)} of them nothing else is lost.")


def lost(row):
    if row.get("loss") is None or row.get("loss_before") is None:
        return None
    return row["loss"] / row["loss_before"] - 1


def vae(results):
    rows = results.rows("vae")
    unseen = grouped(find(rows, seen=False, vae="reference"), "dtype")
    worst = {dtype: max(row["nmse"] for row in group) for (dtype,), group in unseen.items()}
    changes = [abs(lost(row)) for row in rows if lost(row) is not None]
    return rows, [
        "A VAE on models that it has never seen, and on those that it was trained on.",
        *(["Worst NMSE of the reference VAE on an unseen model: " + "; ".join(
            f"{worst[dtype]:.1e} in {dtype}{', its rounding' * (dtype == 'bfloat16')}"
            for dtype in sorted(worst, reverse=True)) + "."] if worst else []),
        *([f"Largest change of a loss: {max(changes):.1e} of it."] if changes else [])
    ], table(["VAE", "model", "seen", "NMSE", "worst tensor", "its NMSE", "loss"], [
        [row["vae"], f"`{row['model']}`, {row['dtype']}", "yes" if row["seen"] else "no",
         f"{row['nmse']:.1e}",
         re.sub(r"^(model|encoder)\.|\.weight$", "", row["worst"]["name"]),
         f"{row['worst']['nmse']:.1e}", "" if lost(row) is None else f"{lost(row):+.2%}"]
        for row in rows])


def sibling_cells(results, name="sibling"):
    """[(row, lambda, {domain: (mean, standard error)})], seeds taken together."""
    rows = results.rows(name)
    return [(row, lam, {domain: over_seeds([one["domains"][domain] for one in group])
                        for domain in group[0]["domains"]})
            for (row, lam), group in grouped(rows, "row", "lam").items()]


def merges_of(results, name):
    """Of those: without controls, and without the parents, which have no lambda."""
    return [(row, lam, found) for row, lam, found in sibling_cells(results, name)
            if lam is not None and not any(word in row for word in CONTROLS)]


def sibling(results, name="sibling", unit="Nats per token, a real model"):
    cells = sibling_cells(results, name)
    words = [[said(*d) for d in found.values()] for _, _, found in merges_of(results, name)]
    domains = list(cells[0][2])
    return results.rows(name), [
        f"{unit}, minus the target's: a pruned and healed model + lambda (an expert of its bigger "
        "sibling - that sibling), hidden units matched; controls of the same size at lambda 0.5.",
        f"Of {len(words)} merges {helped_text(words)}"
    ], table(["row", "lambda", *domains], [
        [row, "" if lam is None else f"{lam:g}",
         *(f"{pm(*found[domain])} {said(*found[domain])}" for domain in domains)]
        for row, lam, found in cells])


def pruned(results):
    return sibling(results, "pruned", "Bits per byte")


def clouds(results):
    return results.rows("clouds"), [
        "The source's latents among the target's, in the target's first two principal components: "
        "what each alignment does to the cloud. It does not show which chunk meets which."], []


def spectra(results):
    rows = results.rows("spectra")
    clear = [f"{sum(map(clear_of_noise, group))} of {len(group)} roles of `{model}`"
             for (model,), group in grouped(rows, "model").items()]
    return rows, [
        "Variance explained by the leading principal components; broken lines: white noise.",
        "The leading quarter of the components explains "
        f"{several(list(map(above_noise, rows)), '{:+.0%}'.format)} of the variance more than that "
        "of noise.",
        f"The rest is more than {STRUCTURE:.0%} smaller than noise's in {' and '.join(clear)}."
    ], []


def above_noise(row):
    """How much more of the variance the leading quarter of the components holds."""
    return quarter(row["cumulative"]) - quarter(row["white"])


def clear_of_noise(row):
    return structured(1 - quarter(row["cumulative"]), 1 - quarter(row["white"]))


def structured(nmse, white):
    """Whether PCA leaves clearly less than of white noise."""
    return nmse < (1 - STRUCTURE) * white


def quarter(curve):
    return curve[round(len(curve) / 4) - 1]


def tour(results):
    row = results.rows("tour")[-1]
    return [row], ["Printed by `lsmerge.py`."], ["```", *row["text"].rstrip("\n").split("\n"),
                                                 "```", ""]


# --- The sections, in the order of the page ------------------------------------------------------
def show(section, results):
    """Print what a section says, as text."""
    _, sentences, lines = section(results)
    print("", *sentences, "", *lines, sep="\n")


class Section(NamedTuple):
    title: str
    command: str                    # "": the records say it themselves
    needs: tuple                    # files of records; without one of them there is no section
    lines: Callable                 # results -> (records, sentences, lines of tables)
    picture: str = ""
    key: str = ""                   # what claims call it, where another section has its rows

    @property
    def name(self):
        return self.key or self.needs[0]


PAPER = "python experiments/paper_tables.py"
BENCH = "python experiments/bench.py"
SECTIONS = (
    Section("A first merge", MERGE, ("merge",), merges),
    Section("Table 2: self-merging", f"{PAPER} --table 2 --documents 48", ("table2",), table2),
    Section("Table 3: ten LoRA experts", f"{PAPER} --table 3 --documents 48", ("table3",), table3),
    Section("Table 4: two experts of one base", f"{PAPER} --table 4", ("table4",), table4),
    Section("Table 5: another architecture", f"{PAPER} --figure 4 --documents 48", ("figure4",),
            table5, key="table5"),
    Section("Figure 4: lambda, alignment, controls", f"{PAPER} --figure 4 --documents 48",
            ("figure4",), figure4, "figure4"),
    Section("Table 6: what is merged", f"{PAPER} --table 6", ("table6",), table6),
    Section("Tables 7 and 8: what the codec keeps", f"{PAPER} --table 7 --table 8 --seeds 3",
            ("table7", "table8"), codec, "codec"),
    Section("A real model", "python experiments/real_model.py FOLDER --unseen CHECKPOINT "
            "--documents 24 \\\n    --record experiments/results/real.jsonl", ("real",), real),
    Section("Ablation of the curriculum", f"{PAPER} --ablation curriculum --seeds 3 --documents 48",
            ("ablation",), ablation),
    Section("Spectra", "", ("spectra",), spectra, "spectra"),
    Section("Clouds of latents", "", ("clouds",), clouds, "clouds"),
    Section("Training curves", "", ("curves",), curves, "curves"),
    Section("The reference VAE", "", ("vae",), vae),
    Section("Kinship", "", ("kinship",), kinship, "kinship"),
    Section("A pruned model and its sibling's expert", "", ("pruned",), pruned),
    Section("Real siblings", "", ("sibling",), sibling),
    Section("Speed: beside mergekit", f"{BENCH} --peer --peer-python peer/bin/python --record",
            ("bench-peer",), bench_peer, "bench"),
    Section("Speed: memory", f"{BENCH} --memory --record", ("bench-memory",), bench_memory),
    Section("Speed: a whole merge", f"{BENCH} --merge --record", ("bench-merge",), bench_merge),
    Section("Speed: the codec", f"{BENCH} --codec --record", ("bench-codec",), bench_codec),
    Section("Speed: training", f"{BENCH} --training --record", ("bench-training",), bench_training),
    Section("Speed: transport beside POT", f"{BENCH} --align --record", ("bench-align",),
            bench_align),
    Section("The tour", "python lsmerge.py", ("tour",), tour))
