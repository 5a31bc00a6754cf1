"""Merges of equal shapes, beside the same merges of weights: Tables 2, 3, 4 and 6 in
miniature, and the README's first merge.

    python experiments/merging.py --first
    python experiments/merging.py --table 2 --table 3 --table 4 --table 6 [--quick]

In:    the models and adapters of make_models.py, as float32 copies: halfway between two
       bfloat16 numbers lies no third one, and which way such ties round moves a merge
       at lambda = 0.5 by far more than an exact codec does. (--first: as they are.)
Out:   rows of results/tableN.jsonl, each written as soon as it is measured, and the
       section. Each model is made by merge.py itself (or by baselines.py), scored on
       test text, and held against other rows by paired differences. Whatever is chosen
       (lambda, density, p, who is in a greedy soup) is chosen on validation text.
Paper: Sec. 4, Tables 2, 3, 4, 6. differs: bits per byte instead of benchmarks.
Left out on purpose: AIM (needs activations).
Previous: make_models.py. Next: shapes.py.
"""
import contextlib
import hashlib
import io
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from compare import (MODELS, QUICK, Claim, cell, command_line, difference, find,
                     gain, keep, machine, pm, pm_of, pooled, several, stacked, summary,
                     table, tally)
import lora
import merge
import train
from baselines import dare, dare_ties, noise_average, soup, ties
from evaluate import DOMAINS, evaluate, row_of, score
from greedy_soup import greedy_soup
from lsmerge import Codec
from tiny_lm import load

# Codecs. The first is exact and linear (r = 1), so that merging latents is merging
# weights. The second is the same, with a posterior ten times as wide (sigma near 0.1).
# The third has a code of half the size (the paper's r in Table 2): the principal
# directions, then trained.
EXACT = ("--init", "pca", "--blocks", 0, "--steps1", 0, "--steps2", 0)
CODECS = {"r 1": EXACT, "r 1, beta 0.01": (*EXACT, "--beta", 0.01),
          "r 2": ("--init", "pca", "--steps1", 0, "--ratio", 2)}
# K of a self-merge
DRAWS = {"r 1": (1, 8, 32), "r 1, beta 0.01": (1, 8, 32), "r 2": (8,)}
PAIRS = (("code", "arithmetic"), ("code", "prose"))
TASK_LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
DENSITIES = (0.2, 0.5)          # of TIES
DROPS = (0.5, 0.9)              # p of DARE
SCALES = (0.2, 0.4, 1.0)        # lambda of both
# of Table 6
PARTS = {"MLP": "mlp", "attention": "self_attn", "both": "mlp|self_attn"}
ACROSS_LAM = 0.1                # the paper's lambda across shapes
BASE = {"base": "base"}
KEPT = ("kind", "ratio", "lambda", "operator", "space", "align", "control", "distance")


# --- Rows and how they are made -----------------------------------------------------
def run(command, *arguments):
    """A command of the project within this process; what it prints. Raises
    RuntimeError if it fails."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        code = command([str(argument) for argument in arguments])
    if code:
        raise RuntimeError(heard.getvalue())
    return heard.getvalue()


class Sheet:
    """One table in the making: its files, its codecs, its rows."""

    def __init__(self, models, scratch, save, seeds=3, documents=None, quick=False,
                 bar=None):
        self.models = Path(models)
        self.scratch = Path(scratch)
        self.save = save                # called with each row
        self.seeds = seeds
        self.documents = QUICK if quick else documents
        self.training = ("--steps2", 0) if quick else ()
        self.bar = bar
        self.scored = {}        # row's name -> {domain: (S, documents)}
        self.rows = {}          # row's name -> its record
        self.codecs = {}        # name -> VAE file
        self.stages = {}        # name -> the record of its last stage
        self.digests = {}       # of the models

    def file(self, name):
        """A model's float32 copy; of an adapter, its base with the adapter folded
        in."""
        copy = self.scratch / f"{name}.safetensors"
        if copy.exists():
            return copy
        folder = self.models / "lora" / name
        own = self.models / f"{name}.safetensors"
        if folder.is_dir():
            own = folder / lora.WEIGHTS
            lora.fold(self.file("base"), folder, copy)
        else:
            save_file({key: w.float() for key, w in load_file(own).items()}, copy)
        self.digests[name] = hashlib.sha256(own.read_bytes()).hexdigest()
        return copy

    def tensors(self, name):
        return load_file(self.file(name))

    def write(self, name, tensors):
        """A model that was made here, as a file for merge.py."""
        path = self.scratch / f"{name}.safetensors"
        save_file({key: w.contiguous() for key, w in tensors.items()}, path)
        return path

    def train(self, names, codecs):
        """A VAE of each kind, on all these models."""
        files = [self.file(name) for name in names]
        for codec in codecs:
            path = self.scratch / f"vae {codec}.safetensors"
            run(train.main, *files, "-o", path, *CODECS[codec], *self.training,
                "--quiet")
            self.codecs[codec] = path
            self.stages[codec] = Codec.load(path).record["stages"][-1]

    def merged(self, *arguments, codec=None, seeds=1, first=0):
        """([tensors of each seed], the first report) of merge.py through a codec,
        whatever it loses; in weight space without one.  first: the first seed"""
        through = ("--space", "weight")
        if codec:
            through = ("--vae", self.codecs.get(codec, codec), "--max-nmse", 2)
        models = []
        reports = []
        out = self.scratch / "out.safetensors"
        report = self.scratch / "report.json"
        for seed in range(first, first + seeds):
            run(merge.main, *arguments, *through, "--seed", seed, "-o", out, "--report",
                report, "--force", "--quiet")
            models.append(load_file(out))
            reports.append(json.loads(report.read_text()))
        return models, reports[0]

    def scores(self, models, split="test"):
        """Of the models of all seeds: {domain: (S, documents)}"""
        found = []
        for tensors in models:
            found.append(score(tensors, split, self.documents))
            if self.bar is not None:
                self.bar.update()
        return stacked(found)

    def quality(self, models):
        """One number to choose by, higher is better: minus the bits on validation
        text."""
        return -float(pooled(self.scores(models, "validation")).mean())

    def choose(self, candidates):
        """The best of the (settings, models of all seeds), by validation text."""
        return max(candidates, key=lambda candidate: self.quality(candidate[1]))

    def add(self, name, kind, models, against=BASE, report=None, **settings):
        """Score the models of all seeds on test text, hold them against other rows,
        and save the row.  kind: parent, weight, codec, latent or control"""
        self.enter(name, kind, self.scores(models), against, report or {}, settings)

    def add_again(self, row, name, **settings):
        """A row once more under a second name."""
        against = {}
        for label, d in self.rows[row]["difference"].items():
            against[label] = d["row"]
        self.enter(name, self.rows[row]["kind"], self.scored[row], against, {},
                   settings)

    def enter(self, name, kind, scores, against, report, settings):
        self.scored[name] = scores
        differences = {}
        for label, other in against.items():
            found = difference(scores, self.scored[other])
            differences[label] = {**found.record(), "row": other}
        domains = {}            # to base, domain by domain
        if "base" in against:
            for domain in DOMAINS:
                found = difference(scores, self.scored[against["base"]], [domain])
                domains[domain] = found.record()
        kept = {key: report[key] for key in KEPT if key in report}
        self.rows[name] = {
            "row": name, "kind": kind, "settings": settings,
            "seeds": len(pooled(scores)), "test": summary(scores),
            "per_seed": pooled(scores).tolist(), "difference": differences,
            "domains": domains,
            "report": kept, "documents": scores[DOMAINS[0]].shape[1],
            "codecs": self.stages, "sha256": dict(self.digests), **machine()}
        self.save(self.rows[name])


# --- Table 2: self-merging ----------------------------------------------------------
def noise_sizes(center, draws):
    """{name: |W_draw - W_center| / |W_center|, root mean square over draws} of what
    differs."""
    sizes = {}
    for name, w in center.items():
        if not torch.equal(w, draws[0][name]):
            squares = []
            for draw in draws:
                moved = (draw[name] - w).double().norm() / w.double().norm()
                squares.append(moved.item() ** 2)
            sizes[name] = math.sqrt(np.mean(squares))
    return sizes


def noisy_copies(center, sizes, K, seed):
    """The control: the mean of K copies of a model, each with white noise of these
    sizes."""
    generator = torch.Generator().manual_seed(seed)
    noisy = dict(center)
    for name, size in sizes.items():
        noisy |= noise_average({name: center[name]}, K, size, generator)
    return noisy


def self_merges(sheet, name, codec):
    """Through one codec: the round trip; for each K the mean of K draws, and K copies
    with noise of the same size. The noise lies around the round trip, so that the two
    differ in nothing but where it was added: to codes or to weights."""
    path = sheet.file(name)
    alone = f"{name}: round trip [{codec}]"
    (trip,), report = sheet.merged(path, "--roundtrip", codec=codec)
    sheet.add(alone, "codec", [trip], {"base": name}, report)
    ones, _ = sheet.merged(path, "--samples", 1, codec=codec, seeds=sheet.seeds)
    sizes = noise_sizes(trip, ones)
    for K in DRAWS[codec]:
        draws, report = sheet.merged(path, "--samples", K, codec=codec,
                                     seeds=sheet.seeds)
        noise = f"{name}: noise, K {K} [{codec}]"
        copies = [noisy_copies(trip, sizes, K, seed) for seed in range(sheet.seeds)]
        sheet.add(noise, "control", copies, {"base": name}, relative=sizes)
        sheet.add(f"{name}: self-merge, K {K} [{codec}]", "latent", draws,
                  {"base": name, "round trip": alone, "noise": noise}, report)


def table2(sheet):
    """The model, what each codec alone does to it, and the mean of K draws."""
    sheet.train(("base", "large"), CODECS)
    for name in ("base", "large"):
        sheet.add(name, "parent", [sheet.tensors(name)], {})
        for codec in DRAWS:
            self_merges(sheet, name, codec)


# --- Table 4: two experts of one base; and what Table 3 shares with it --------------
def seeded(method, seeds, *arguments):
    """A random method's models, one per seed."""
    models = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        models.append(method(*arguments, generator=generator))
    return models


def sparse_candidates(sheet, base, models, method):
    """(settings, models of all seeds) of each cell of a method that drops entries."""
    for lam in SCALES:
        if method == "TIES":
            for density in DENSITIES:
                merged = [ties(base, models, density, lam)]
                yield {"density": density, "lambda": lam}, merged
        else:
            drawn = {"DARE": dare, "DARE-TIES": dare_ties}[method]
            for p in DROPS:
                merged = seeded(drawn, sheet.seeds, base, models, p, lam)
                yield {"p": p, "lambda": lam}, merged


def sparse_rows(sheet, tag, models, methods=("TIES", "DARE", "DARE-TIES")):
    """The weight-space methods that drop entries, their settings chosen on validation
    text."""
    base = sheet.tensors("base")
    for method in methods:
        settings, chosen = sheet.choose(sparse_candidates(sheet, base, models, method))
        sheet.add(f"{tag}: {method}", "weight", chosen, **settings)


def twin_rows(sheet, tag, codecs, *arguments, **settings):
    """The same merge in weight space and through each codec."""
    weights = f"{tag}, weights"
    sheet.add(weights, "weight", sheet.merged(*arguments)[0], **settings)
    for codec in codecs:
        models, report = sheet.merged(*arguments, codec=codec)
        sheet.add(f"{tag}, latents [{codec}]", "latent", models,
                  BASE | {"weights": weights}, report, **settings)


def table4(sheet):
    """The experts, and the merges of each pair."""
    names = ("base", "code", "arithmetic", "prose")
    codecs = ["r 1", "r 2"]
    sheet.train(names, codecs)
    for name in names:
        against = {} if name == "base" else BASE
        sheet.add(name, "parent", [sheet.tensors(name)], against)
    for pair in PAIRS:
        pair_rows(sheet, pair, codecs)


def pair_rows(sheet, pair, codecs):
    tag = " + ".join(pair)
    files = [sheet.file(name) for name in pair]
    experts = [sheet.tensors(name) for name in pair]
    best, _ = sheet.choose((name, [expert]) for name, expert in zip(pair, experts))
    sheet.add_again(best, f"{tag}: best expert", best=best)
    twin_rows(sheet, f"{tag}: lerp 0.5", codecs, *files)
    twin_rows(sheet, f"{tag}: slerp 0.5", codecs[:1], *files, "--operator", "slerp")
    # From the base towards both experts; lambda is chosen in weight space, the codec
    # takes it.
    base = sheet.file("base")
    task = (base, *files, "--operator", "task-arithmetic", "--base", base, "--lam")
    lam, _ = sheet.choose((lam, sheet.merged(*task, lam)[0]) for lam in TASK_LAMBDAS)
    twin_rows(sheet, f"{tag}: task arithmetic", codecs[:1], *task, lam, lam=lam)
    sparse_rows(sheet, tag, experts)


# --- Table 6: what is merged --------------------------------------------------------
def table6(sheet):
    """Each part alone, across shapes, against null controls."""
    codec = next(iter(CODECS))
    sheet.train(("base", "large"), [codec])
    sheet.add("base", "parent", [sheet.tensors("base")], {})
    for part in PARTS:
        across_rows(sheet, part, codec)


def across_rows(sheet, part, codec):
    """large -> base, transported by the paper's Gaussian map, and the null controls."""
    tag = f"large -> base, {part}"
    against = dict(BASE)
    flags = (sheet.file("base"), sheet.file("large"), "--lam", ACROSS_LAM, "--select",
             PARTS[part])
    for control in ("zero", "noise", "shuffled"):
        seeds = 1 if control == "zero" else sheet.seeds
        models, report = sheet.merged(*flags, "--control", control, codec=codec,
                                      seeds=seeds)
        against[control] = f"{tag}: {control}"
        sheet.add(against[control], "control", models, report=report)
    models, report = sheet.merged(*flags, "--align", "gaussian", codec=codec)
    sheet.add(tag, "latent", models, against, report)


# --- Table 3: ten LoRA experts ------------------------------------------------------
def table3(sheet):
    """The experts as whole models: alone, the best two, soups, sparse methods."""
    codec = next(iter(CODECS))
    names = sorted(folder.name for folder in (sheet.models / "lora").iterdir())
    experts = [sheet.tensors(name) for name in names]
    files = [sheet.file(name) for name in names]
    sheet.train(names, [codec])
    sheet.add("base", "parent", [sheet.tensors("base")], {})
    for name, expert in zip(names, experts):
        sheet.add(name, "parent", [expert])
    alone = [sheet.quality([expert]) for expert in experts]
    best, second = sorted(range(len(names)), key=lambda i: -alone[i])[:2]
    sheet.add_again(names[best], "best expert", best=names[best])
    two = (files[best], files[second])
    kept = [names[best], names[second]]
    twin_rows(sheet, "lerp of the best two", [codec], *two, kept=kept)
    twin_rows(sheet, "slerp of the best two", [codec], *two, "--operator", "slerp",
              kept=kept)
    twin_rows(sheet, "soup", [codec], *files, "--operator", "soup")
    greedy_rows(sheet, names, experts, files, codec)
    sparse_rows(sheet, "ten experts", experts, ("TIES", "DARE-TIES"))


def greedy_rows(sheet, names, experts, files, codec):
    """Greedy soups, chosen by validation text of all three domains, in weights and
    latents."""
    def weights(kept):
        return [soup([experts[i] for i in kept])]

    def latents(kept):
        """merge.py's uniform soup; of one model, its round trip."""
        how = ("--operator", "soup") if len(kept) > 1 else ("--roundtrip",)
        return sheet.merged(*[files[i] for i in kept], *how, codec=codec)

    kept = greedy_soup(len(names), lambda kept: sheet.quality(weights(kept)))
    sheet.add("greedy soup, weights", "weight", weights(kept),
              kept=[names[i] for i in kept])
    kept = greedy_soup(len(names), lambda kept: sheet.quality(latents(kept)[0]))
    models, report = latents(kept)
    sheet.add(f"greedy soup, latents [{codec}]", "latent", models,
              BASE | {"weights": "greedy soup, weights"}, report,
              kept=[names[i] for i in kept])


TABLES = {"2": table2, "3": table3, "4": table4, "6": table6}


def measure(number, models, save, seeds=3, documents=None, quick=False, quiet=False):
    """The rows of one table; `save` gets each as soon as it is there."""
    with (tempfile.TemporaryDirectory() as scratch,
          tqdm(desc=f"table {number}", unit="model", disable=quiet) as bar):
        sheet = Sheet(models, scratch, save, seeds, documents, quick, bar)
        TABLES[number](sheet)
        return list(sheet.rows.values())


# --- The first merge ----------------------------------------------------------------
FIRST = [["merged"], ["average", "--space", "weight"], ["learnt", "--init", "random"]]


def measure_first(models):
    """(what the README's first command prints, a row of scores per file): two experts
    merged by the reference VAE, as a plain average, and by a VAE trained on them."""
    pair = [models / "code.safetensors", models / "prose.safetensors"]
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)        # what is printed names no folder
        try:
            text = run(merge.main, *pair, "--quiet")
            for name, *flags in FIRST[1:]:
                run(merge.main, *pair, *flags, "-o", f"{name}.safetensors", "--quiet")
        finally:
            os.chdir(here)
        made = [Path(folder, f"{name}.safetensors") for name, *_ in FIRST]
        rows = [row_of(file, evaluate(load(file), "test"), "test")
                for file in [*pair, *made]]
    command = ("python merge.py experiments/models/code.safetensors "
               "experiments/models/prose.safetensors")
    return {"name": "main", "command": command, "text": text, **machine()}, rows


# --- Sections -----------------------------------------------------------------------
def section_first(rows):
    """Bits per byte of both experts and of their merges."""
    lines = []
    for row in rows:
        cells = [f"`{row['file'].removesuffix('.safetensors')}`"]
        for column in (*DOMAINS, "accuracy"):
            found = row["scores"][column]
            cells.append(pm(found["mean"], found["error"], signed=False))
        lines.append(cells)
    return table(["file", *DOMAINS, "accuracy of sums"], lines)


def section_table2(rows):
    lines = []
    for row in find(rows, kind="latent"):
        if "noise" in row["difference"]:
            model, what = row["row"].split(": self-merge, ")
            noise = find(rows, row=row["difference"]["noise"]["row"])[0]
            lines.append([f"`{model}`, {what}", cell(row["difference"]["base"]),
                          cell(noise["difference"]["base"]),
                          cell(row["difference"]["noise"])])
    draws = [row for row in find(rows, kind="latent") if "noise" in row["difference"]]
    head = ["model, draws [codec]", "self-merge minus the model",
            "white noise minus the model", "self-merge minus white noise"]
    return (f"{len(draws)} self-merges against the model: {tally(draws, 'base')}.\n"
            f"Against white noise of the same size: {tally(draws, 'noise')}.\n\n"
            + table(head, lines))


def twin_table(rows):
    """A line per merge: on weights, and what the exact codec makes of the same."""
    lines = []
    for row in rows:
        if row["kind"] == "weight" or "best expert" in row["row"]:
            name = row["row"].removesuffix(", weights")
            twin = find(rows, row=f"{name}, latents [r 1]")
            latent = twin[0]["difference"]["weights"] if twin else None
            lines.append([name, f"{row['test']['pooled']:.4f}",
                          cell(row["difference"]["base"]), cell(latent)])
    return table(["merge", "bits, on weights", "minus base",
                  "in latents, minus on weights"], lines)


def section_table3(rows):
    means = []
    for row in find(rows, kind="parent"):
        if row["row"].startswith("lora"):
            means.append(row["difference"]["base"]["mean"])
    return (f"The {len(means)} experts alone, minus base: "
            f"{several(means, '{:+.4f}'.format)} bits.\n\n" + twin_table(rows))


def section_table4(rows):
    half = []
    for row in find(rows, kind="latent"):
        if "[r 2]" in row["row"]:
            half.append(row["difference"]["weights"]["mean"])
    return (f"At r = 2 the codec alone decides: {several(half, '{:+.2f}'.format)} bits "
            "to the same merge of weights.\n\n" + twin_table(rows))


def section_table6(rows):
    lines = []
    for row in find(rows, kind="latent"):
        cells = [cell(d) for d in row["difference"].values()]
        lines.append([row["row"], *cells])
    return table(["lambda 0.1", "minus base", "zero", "noise", "shuffled"], lines)


# claim, paper; table, row, held against; what that is; section; meaning
CLAIMS = [
    ("self-merging gains, K 8", "MMLU 32.2 → 35.1", "2", "base: self-merge, K 8 [r 1]",
     "base", "the model", "Table 2: self-merging", "sampling only adds noise"),
    ("a soup of ten LoRA experts gains in latents", "MMLU 49.7 → 56.0", "3",
     "soup, latents [r 1]", "weights", "weights",
     "Table 3: ten LoRA experts", "the soup gains; an exact codec adds nothing"),
    ("task arithmetic of two experts gains in latents", "MMLU 52.2 → 55.1", "4",
     "code + arithmetic: task arithmetic, latents [r 1]", "weights",
     "the same on weights", "Table 4: two experts of one base", ""),
    ("MLP and attention of another shape gain", "MMLU 40.8 → 42.1", "6",
     "large -> base, both", "base", "the target", "Table 6: what is merged", "")]


def claims(records):
    """records: {name: rows}. A merge must gain, and lose to nothing."""
    found = []
    for claim, paper, number, name, label, other, section, meaning in CLAIMS:
        for row in find(records[f"table{number}"], row=name):
            verdict = gain([(d["mean"], d["se"]) for d in row["difference"].values()])
            here = f"{pm_of(row['difference'][label])} to {other}"
            found.append(Claim(claim, paper, here, verdict, section, meaning))
    latent = [row["difference"]["weights"]["mean"] for row in records["table3"]
              if "weights" in row["difference"]]
    if latent:
        found.append(Claim(
            "exact codec: latent merge minus plain average", "",
            f"at most {max(map(abs, latent)):.0e} bits, {len(latent)} merges", "ours",
            "Table 3: ten LoRA experts"))
    return found


SECTIONS = {"2": section_table2, "3": section_table3, "4": section_table4,
            "6": section_table6}


def main():
    parser = command_line(__doc__)
    parser.add_argument("--table", action="append", default=[], choices=TABLES,
                        help="may be given again")
    parser.add_argument("--first", action="store_true", help="the README's first merge")
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--documents", type=int, help="per domain and split, at most")
    parser.add_argument("--quick", action="store_true",
                        help=f"{QUICK} documents per domain; nothing is kept")
    args = parser.parse_args()
    if not (args.table or args.first):
        parser.error("nothing to do: give --table or --first")
    if args.first:
        printed, rows = measure_first(args.models)
        keep("main", [printed], args.results)
        keep("merge", rows, args.results)
        print(printed["text"], section_first(rows), sep="\n")
    for number in args.table:
        def save(row):
            if not args.quick:
                keep(f"table{number}", [row], args.results)
        rows = measure(number, args.models, save, args.seeds, args.documents,
                       args.quick, args.quiet)
        print(SECTIONS[number](rows))


if __name__ == "__main__":
    main()
