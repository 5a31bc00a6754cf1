"""Merges of equal shapes, beside the same merges of weights: Tables 2, 3 and 4 in
miniature, and the README's first merge.

    python experiments/merging.py --first
    python experiments/merging.py --table 2 --table 3 --table 4

In:    the models and adapters of make_models.py, in float32: halfway between two
       bfloat16 numbers lies no third one, and how such ties round would move a merge at
       lambda = 0.5 by far more than an exact codec does. (--first: as they are.)
Out:   results/tableN.jsonl and its section. Each model is made by merge.py, scored on
       test text, and held against others by paired differences. What is chosen (an
       expert, lambda) is chosen on validation text.
Paper: Sec. 4, Tables 2, 3, 4. differs: bits per byte; AIM needs activations.
Previous: make_models.py. Next: shapes.py.
"""
import contextlib
import io
import tempfile
from pathlib import Path

from tqdm import tqdm

from compare import (MODELS, Claim, cell, collect, command_line, difference, find, gain,
                     keep, machine, pm, pm_of, pooled, printed, stacked, summary,
                     table, tally)
import merge
import train
from evaluate import DOMAINS, evaluate, mean_and_error, score
from tiny_lm import load

# Codecs of Table 2, and the K of its self-merges. The first is exact and linear, the
# second is the same with a posterior ten times as wide (sigma near 0.1). The third has
# the paper's r: the principal directions, then trained.
EXACT = ("--init", "pca", "--blocks", 0, "--steps1", 0, "--steps2", 0)
CODECS = {"r 1": EXACT, "r 1, beta 0.01": (*EXACT, "--beta", 0.01),
          "r 2": ("--init", "pca", "--steps1", 0, "--ratio", 2)}
DRAWS = {"r 1": (1, 8, 32), "r 1, beta 0.01": (1, 8, 32), "r 2": (8,)}
PAIRS = (("code", "arithmetic"), ("code", "prose"))     # of Table 4
TASK_LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
BASE = {"base": "base"}


class Sheet:
    """One table in the making."""

    def __init__(self, models, seeds):
        self.models = models    # their folder
        self.seeds = seeds
        self.scored = {}        # row's name -> {domain: (S, documents)}

    def tensors(self, name):
        """A model in float32, in the order of its file, which random draws follow; of
        an adapter, its base with the adapter folded in."""
        path = self.models / f"{name}.safetensors"
        if not path.exists():
            path = self.models / "lora" / name
        return dict(sorted(load(path).state_dict().items()))

    def merged(self, *models, seeds=1, first=0, **flags):
        """The merge of each seed by merge.py, whatever the codec loses."""
        if "vae" in flags:
            flags["max_nmse"] = 2
        with contextlib.redirect_stderr(io.StringIO()):     # its warnings
            return [merge.merge_state_dicts(*models, seed=seed, **flags)
                    for seed in range(first, first + seeds)]

    def scores(self, models, split="test"):
        """Of the models of all seeds: {domain: (S, documents)}"""
        return stacked([score(tensors, split) for tensors in models])

    def bits(self, tensors):
        """One number to choose by, of validation text."""
        return pooled(self.scores([tensors], "validation")).mean()

    def row(self, name, kind, models, against=BASE):
        """The models of all seeds, scored on test text and held against other rows.
        kind: parent, weight, codec, latent or control"""
        scores = self.scores(models)
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
        return {"row": name, "kind": kind, "seeds": len(models),
                "test": summary(scores), "difference": differences, "domains": domains,
                "documents": scores[DOMAINS[0]].shape[1], **machine()}


# --- Table 2: self-merging ----------------------------------------------------------
def self_merges(sheet, name, codec, vae):
    """Through one codec: the round trip; for each K the mean of K draws."""
    model = sheet.tensors(name)
    alone = f"{name}: round trip [{codec}]"
    trip = sheet.merged(model, vae=vae, roundtrip=True)
    yield sheet.row(alone, "codec", trip, {"base": name})
    for K in DRAWS[codec]:
        draws = sheet.merged(model, vae=vae, samples=K, seeds=sheet.seeds)
        yield sheet.row(f"{name}: self-merge, K {K} [{codec}]", "latent", draws,
                        {"base": name, "round trip": alone})


def table2(sheet):
    """The model, what each codec alone does to it, and the mean of K draws."""
    names = ("base", "large")
    files = [sheet.models / f"{name}.safetensors" for name in names]
    with tempfile.TemporaryDirectory() as folder:
        codecs = {}
        for codec, flags in CODECS.items():
            codecs[codec] = Path(folder, codec)
            printed(train.main, *files, "-o", codecs[codec], *flags, "--quiet")
        for name in names:
            yield sheet.row(name, "parent", [sheet.tensors(name)], {})
            for codec, vae in codecs.items():
                yield from self_merges(sheet, name, codec, vae)


# --- Tables 3 and 4 -----------------------------------------------------------------
def twin_rows(sheet, tag, models, **flags):
    """The same merge in weight space and through the exact codec."""
    weights = f"{tag}, weights"
    yield sheet.row(weights, "weight", sheet.merged(*models, space="weight", **flags))
    yield sheet.row(f"{tag}, latents [r 1]", "latent",
                    sheet.merged(*models, vae="exact", **flags),
                    BASE | {"weights": weights})


def table3(sheet):
    """Ten LoRA experts as whole models: alone, the best two, the soup."""
    yield sheet.row("base", "parent", [sheet.tensors("base")], {})
    names = sorted(folder.name for folder in (sheet.models / "lora").iterdir())
    experts = [sheet.tensors(name) for name in names]
    best = sorted(experts, key=sheet.bits)[:2]
    yield sheet.row("best expert", "parent", best[:1])
    yield from twin_rows(sheet, "lerp of the best two", best)
    yield from twin_rows(sheet, "slerp of the best two", best, operator="slerp")
    yield from twin_rows(sheet, "soup", experts, operator="soup")


def table4(sheet):
    """Two experts of one base."""
    base = sheet.tensors("base")
    yield sheet.row("base", "parent", [base], {})
    for pair in PAIRS:
        tag = " + ".join(pair)
        experts = [sheet.tensors(name) for name in pair]
        best = min(experts, key=sheet.bits)
        yield sheet.row(f"{tag}: best expert", "parent", [best])
        yield from twin_rows(sheet, f"{tag}: lerp 0.5", experts)
        yield from twin_rows(sheet, f"{tag}: slerp 0.5", experts, operator="slerp")
        # From the base towards both experts; lambda is chosen in weight space, the
        # codec takes it.
        models = (base, *experts)
        task = {"operator": "task-arithmetic", "base": base}

        def bits_of(lam):
            [merged] = sheet.merged(*models, space="weight", lam=lam, **task)
            return sheet.bits(merged)
        lam = min(TASK_LAMBDAS, key=bits_of)
        yield from twin_rows(sheet, f"{tag}: task arithmetic", models, lam=lam, **task)


# --- The first merge ----------------------------------------------------------------
FIRST = {"merged": [], "average": ["--space", "weight"], "learnt": ["--init", "random"]}


def measure_first(models):
    """(what the README's first command prints, a row of scores per file): two experts
    merged by the reference VAE, as a plain average, and by a VAE trained on them."""
    files = [models / "code.safetensors", models / "prose.safetensors"]
    said = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in FIRST.items():
            out = Path(folder, f"{name}.safetensors")
            text = printed(merge.main, *files[:2], *flags, "-o", out, "--quiet")
            said[name] = text.replace(f"{folder}/", "")
            files.append(out)
        for file in files:
            scores = {}
            for column, values in evaluate(load(file), "test").items():
                mean, error = mean_and_error(values)
                scores[column] = {"mean": mean, "error": error}
            rows.append({"file": file.name, "scores": scores, **machine()})
    return {"name": "main", "text": said["merged"], **machine()}, rows


# --- Sections -----------------------------------------------------------------------
def section_first(rows):
    """Bits per byte of both experts and of their merges."""
    lines = []
    for row in rows:
        cells = [f"`{row['file'].removesuffix('.safetensors')}`"]
        for found in row["scores"].values():
            cells.append(pm(found["mean"], found["error"], signed=False))
        lines.append(cells)
    return table(["file", *DOMAINS, "accuracy of sums"], lines)


def section_table2(rows):
    draws = find(rows, kind="latent")
    lines = []
    for row in draws:
        model, what = row["row"].split(": self-merge, ")
        against = row["difference"]
        lines.append([f"`{model}`, {what}", cell(against["base"]),
                      cell(against["round trip"])])
    return (f"{len(draws)} self-merges against the model: {tally(draws, 'base')}.\n\n"
            + table(["model, draws [codec]", "self-merge minus the model",
                     "self-merge minus the round trip"], lines))


def section_table3(rows):
    """A line per merge: on weights, and what the exact codec makes of the same."""
    lines = []
    for row in rows:
        if row["kind"] == "weight" or "best expert" in row["row"]:
            name = row["row"].removesuffix(", weights")
            latent = None
            for twin in find(rows, row=f"{name}, latents [r 1]"):
                latent = twin["difference"]["weights"]
            lines.append([name, f"{row['test']['pooled']:.4f}",
                          cell(row["difference"]["base"]), cell(latent)])
    return table(["merge", "bits, on weights", "minus base",
                  "in latents, minus on weights"], lines)


section_table4 = section_table3

# claim, paper; records, row, held against; what that is; section; meaning
CLAIMS = [
    ("self-merging gains, K 8", "MMLU 32.2 → 35.1", "table2",
     "base: self-merge, K 8 [r 1]", "base", "the model", "Table 2: self-merging",
     "sampling only adds noise"),
    ("a soup of ten LoRA experts gains in latents", "MMLU 49.7 → 56.0", "table3",
     "soup, latents [r 1]", "weights", "weights",
     "Table 3: ten LoRA experts", "the soup gains, as much without a codec"),
    ("task arithmetic of two experts gains in latents", "MMLU 52.2 → 55.1", "table4",
     "code + arithmetic: task arithmetic, latents [r 1]", "weights",
     "the same on weights", "Table 4: two experts of one base", "")]


def claims(records):
    """records: {name: rows}. A merge must gain, and lose to nothing."""
    for claim, paper, name, row, label, other, section, meaning in CLAIMS:
        for found in find(records[name], row=row):
            against = found["difference"]
            verdict = gain([(d["mean"], d["se"]) for d in against.values()])
            yield Claim(claim, paper, f"{pm_of(against[label])} to {other}", verdict,
                        section, meaning)


TABLES = {"2": (table2, section_table2), "3": (table3, section_table3),
          "4": (table4, section_table4)}


def main():
    parser = command_line(__doc__)
    parser.add_argument("--table", action="append", default=[], choices=TABLES,
                        help="may be given again")
    parser.add_argument("--first", action="store_true", help="the README's first merge")
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    if args.first:
        first, rows = measure_first(args.models)
        keep("main", [first], args.results)
        keep("merge", rows, args.results)
        print(first["text"], section_first(rows), sep="\n")
    for number in args.table:
        measure, section = TABLES[number]
        rows = tqdm(measure(Sheet(args.models, args.seeds)), desc=f"table {number}",
                    unit="row", disable=args.quiet)
        print(section(collect(f"table{number}", rows, args)))


if __name__ == "__main__":
    main()
