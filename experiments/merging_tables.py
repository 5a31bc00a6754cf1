"""Tables 2, 3, 4 and 6 in miniature: self-merging, LoRA experts, two experts, what is
merged.

    python experiments/paper_tables.py --table 2 --table 4 --table 6 --table 3 [--quick]

In:    the models and adapters of make_models.py, as float32 copies: halfway between two
       bfloat16 numbers lies no third one, and which way such ties round moves a merge
       at lambda = 0.5 by far more than an exact codec does.
Out:   rows. Each model is made by merge.py itself (or by baselines.py), scored once on
       test text, and held against other rows by paired differences. Whatever is chosen
       (lambda, density, p, who is in a greedy soup) is chosen on validation text.
Paper: Sec. 4, Tables 2, 3, 4, 6. differs: bits per byte instead of benchmarks.
ours:  "beats", "ties" or "loses" (scores.verdict). With so many comparisons one in
       twenty would stand out by chance.
Left out on purpose: AIM (needs activations). Previous: transfer_tables.py.
Next:  codec_tables.py.
"""
import contextlib
import hashlib
import io
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "tools")]

import lora
import merge
import train
from baselines import dare, dare_ties, noise_average, soup, ties
from chunking import Checkpoint, cast, is_selected, measure
from evaluate import DOMAINS
from greedy_soup import greedy_soup
from lsmerge import Codec
from records import machine
from scores import QUICK, difference, pooled, score, stacked, summary, verdict
from vae import generator_for

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
RANK = 8                        # of the adapters of make_models.py
BASE = {"base": "base"}
KEPT = ("kind", "ratio", "lambda", "operator", "space", "align", "control", "distance")


# --- Rows and how they are made -------------------------------------------------------
class Row(NamedTuple):
    """One line of a table. Scores: domain -> (S, documents) bits per byte; S seeds."""
    name: str
    kind: str                   # "parent", "weight", "codec", "latent" or "control"
    against: dict               # label -> name of a row that it is held against
    scores: dict
    settings: dict
    report: dict                # merge.py's, of the first seed


def run(command, *arguments):
    """A command of the product within this process, without its prints."""
    unheard = io.StringIO()
    with contextlib.redirect_stdout(unheard), contextlib.redirect_stderr(unheard):
        command([str(argument) for argument in arguments])


class Sheet:
    """One table in the making: its files, its codecs, its rows."""

    def __init__(self, models, scratch, seeds=3, documents=None, quick=False, bar=None):
        self.models = Path(models)
        self.scratch = Path(scratch)
        self.seeds = seeds
        self.documents = QUICK if quick else documents
        self.training = ("--steps2", 0) if quick else ()
        self.bar = bar
        self.rows = {}
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

    def train(self, names, codecs):
        """A VAE of each kind, on all these models."""
        files = [self.file(name) for name in names]
        for codec in codecs:
            path = self.scratch / f"vae {codec}.safetensors"
            run(train.main, *files, "-o", path, *CODECS[codec], *self.training,
                "--quiet")
            self.codecs[codec] = path
            self.stages[codec] = Codec.load(path).record["stages"][-1]

    def merged(self, *arguments, codec=None, seeds=1):
        """([tensors of each seed], the first report) of merge.py through a codec,
        whatever it loses; in weight space without one."""
        through = ("--space", "weight")
        if codec:
            through = ("--vae", self.codecs[codec], "--max-nmse", 2)
        models = []
        reports = []
        out = self.scratch / "out.safetensors"
        report = self.scratch / "report.json"
        for seed in range(seeds):
            run(merge.main, *arguments, *through, "--seed", seed, "-o", out, "--report",
                report,
                "--force", "--quiet")
            models.append(load_file(out))
            reports.append(json.loads(report.read_text()))
        return models, reports[0]

    def cut(self, tensors, rank=RANK):
        """A model whose difference to the base is cut to factors of this rank."""
        whole = self.scratch / "whole.safetensors"
        adapter = self.scratch / "cut"
        save_file(tensors, whole)
        lora.extract(whole, self.file("base"), rank, adapter, force=True)
        return lora.folded_tensors(self.file("base"), adapter)

    def scores(self, models, split="test"):
        """Of the models of all seeds: domain -> (S, documents)."""
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
        """Enter the models of all seeds, scored on test text, as a row."""
        scores = self.scores(models)
        self.rows[name] = Row(name, kind, against, scores, settings, report or {})

    def add_again(self, row, name, **settings):
        """A row once more under a second name."""
        self.rows[name] = self.rows[row]._replace(name=name, settings=settings)


# --- Table 2: self-merging ------------------------------------------------------------
def noise_sizes(center, draws):
    """{name: |W_draw - W_center| / |W_center|, root mean square over draws} of what
    differs."""
    sizes = {}
    for name, w in center.items():
        if not torch.equal(w, draws[0][name]):
            moved = [(draw[name] - w).double().norm() / w.double().norm()
                     for draw in draws]
            sizes[name] = math.sqrt(np.mean([size.item() ** 2 for size in moved]))
    return sizes


def noisy_copies(center, sizes, K, seed):
    """The control: the mean of K copies of a model, each with white noise of these
    sizes."""
    generator = torch.Generator().manual_seed(seed)
    noisy = dict(center)
    for name, size in sizes.items():
        noisy |= noise_average({name: center[name]}, K, size, generator)
    return noisy


def prior_draws(path, vae, K, seed):
    """The decoded mean of K draws from N(0, I) (paper: Sec. 3.3); a tensor's mean and
    scale, and whatever is not encoded, are the model's."""
    file = Checkpoint(path)
    codec = Codec.load(vae)
    tensors = load_file(path)
    for number, entry in enumerate(file.entries.values()):
        if is_selected(entry):
            stats = measure(file, entry.name)
            generator = generator_for(seed, number)
            z_NZ = torch.zeros(stats.n_chunks(codec.C), codec.Z)
            for _ in range(K):
                z_NZ += torch.randn(z_NZ.shape, generator=generator) / K
            decoded_L = codec.decode(z_NZ, stats, stats.numel)
            tensors[entry.name] = cast(decoded_L, stats).reshape(stats.shape)
    return tensors


def table2(sheet):
    """The model, what each codec alone does to it, and the mean of K draws."""
    sheet.train(("base", "large"), CODECS)
    for name in ("base", "large"):
        sheet.add(name, "parent", [sheet.tensors(name)], {})
        for codec in DRAWS:
            self_merges(sheet, name, codec)
        first = next(iter(sheet.codecs))
        prior = [prior_draws(sheet.file(name), sheet.codecs[first], 8, seed)
                 for seed in range(sheet.seeds)]
        sheet.add(f"{name}: prior, K 8 [{first}]", "latent", prior,
                  {"base": name, "round trip": f"{name}: round trip [{first}]"})


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


# --- Table 4: two experts of one base; and what Table 3 shares with it ----------------
def seeded(method, seeds, *arguments):
    """A random method's models, one per seed."""
    return [method(*arguments, generator=torch.Generator().manual_seed(seed))
            for seed in range(seeds)]


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
                yield {"p": p, "lambda": lam}, seeded(drawn, sheet.seeds, base, models,
                                                      p, lam)


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
                  BASE | {"weights": weights},
                  report, **settings)


def table4(sheet):
    """The experts, what the codecs alone do to them, and the merges of each pair."""
    names = ("base", "code", "arithmetic", "prose")
    sheet.train(names, CODECS)
    for name in names:
        sheet.add(name, "parent", [sheet.tensors(name)], BASE if name != "base" else {})
    for name in names:
        for codec in CODECS:
            trip, report = sheet.merged(sheet.file(name), "--roundtrip", codec=codec)
            sheet.add(f"{name}: round trip [{codec}]", "codec", trip, {"parent": name},
                      report)
    for pair in PAIRS:
        pair_rows(sheet, pair, list(CODECS))


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


# --- Table 6: what is merged ----------------------------------------------------------
def table6(sheet):
    """Each part alone: across shapes against null controls, two experts against weight
    space."""
    codec = next(iter(CODECS))
    sheet.train(("base", "large", "code", "prose"), [codec])
    for name in ("base", "code"):
        sheet.add(name, "parent", [sheet.tensors(name)], {})
    for part in PARTS:
        across_rows(sheet, part, codec)
        midpoint_rows(sheet, part, codec)


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


def midpoint_rows(sheet, part, codec):
    """code + prose at lambda = 0.5, all else code's, in weight space and through the
    codec."""
    tag = f"code + prose, {part}"
    flags = (sheet.file("code"), sheet.file("prose"), "--select", PARTS[part])
    against = {"code": "code"}
    sheet.add(f"{tag}: weights", "weight", sheet.merged(*flags)[0], against)
    models, report = sheet.merged(*flags, codec=codec)
    sheet.add(tag, "latent", models, against | {"weights": f"{tag}: weights"}, report)


# --- Table 3: ten LoRA experts --------------------------------------------------------
def adapter_rows(sheet, names, codec):
    """What one adapter of rank 8 holds of the ten: their factors averaged, or their
    soup as whole models cut to factors again."""
    folders = [sheet.models / "lora" / name for name in names]
    against = BASE | {"whole models": "soup, weights"}
    mean = sheet.scratch / "mean"
    shutil.copytree(folders[0], mean)
    factors = soup([load_file(folder / lora.WEIGHTS) for folder in folders])
    save_file({key: w.float() for key, w in factors.items()}, mean / lora.WEIGHTS)
    averaged = lora.folded_tensors(sheet.file("base"), mean)
    sheet.add("soup of factors: mean B times mean A", "weight", [averaged], against)
    files = [sheet.file(name) for name in names]
    (whole,), _ = sheet.merged(*files, "--operator", "soup")
    sheet.add("soup of adapters, weights", "weight", [sheet.cut(whole)], against)
    (whole,), report = sheet.merged(*files, "--operator", "soup", codec=codec)
    against = against | {"weights": "soup of adapters, weights"}
    sheet.add(f"soup of adapters, latents [{codec}]", "latent", [sheet.cut(whole)],
              against,
              report)


def table3(sheet):
    """The experts as whole models: alone, the best two, soups, sparse methods; and as
    adapters."""
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
    adapter_rows(sheet, names, codec)


def latent_soup(sheet, files, codec):
    """merge.py's uniform soup; of one model, its round trip."""
    if len(files) == 1:
        return sheet.merged(*files, "--roundtrip", codec=codec)
    return sheet.merged(*files, "--operator", "soup", codec=codec)


def greedy_rows(sheet, names, experts, files, codec):
    """Greedy soups, chosen by validation text of all three domains, in weights and
    latents."""
    def weights(kept):
        return [soup([experts[i] for i in kept])]

    def latents(kept):
        return latent_soup(sheet, [files[i] for i in kept], codec)

    kept = greedy_soup(len(names), lambda kept: sheet.quality(weights(kept)))
    sheet.add("greedy soup, weights", "weight", weights(kept),
              kept=[names[i] for i in kept])
    kept = greedy_soup(len(names), lambda kept: sheet.quality(latents(kept)[0]))
    models, report = latents(kept)
    sheet.add(f"greedy soup, latents [{codec}]", "latent", models,
              BASE | {"weights": "greedy soup, weights"}, report,
              kept=[names[i] for i in kept])


# --- Rows of the file -----------------------------------------------------------------
TABLES = {"2": table2, "3": table3, "4": table4, "6": table6}


def record(sheet, row):
    """The row as a JSON line: its numbers, and its differences to the rows that it is
    held against."""
    differences = {}
    for label, name in row.against.items():
        found = difference(row.scores, sheet.rows[name].scores)
        differences[label] = {**found.record(), "verdict": verdict(found), "row": name}
    return {"row": row.name, "kind": row.kind, "settings": row.settings,
            "seeds": len(pooled(row.scores)), "test": summary(row.scores),
            "per_seed": pooled(row.scores).tolist(), "difference": differences,
            "report": {key: row.report[key] for key in KEPT if key in row.report},
            "documents": row.scores[DOMAINS[0]].shape[1], "codecs": sheet.stages,
            "sha256": sheet.digests, **machine()}


def measure_merging(table, models, seeds=3, documents=None, quick=False, quiet=False):
    """The rows of one table."""
    began = time.perf_counter()
    with (tempfile.TemporaryDirectory() as scratch,
          tqdm(desc=f"table {table}", unit="model", disable=quiet) as bar):
        sheet = Sheet(models, scratch, seeds, documents, quick, bar)
        TABLES[table](sheet)
        rows = [record(sheet, row) for row in sheet.rows.values()]
    seconds = round(time.perf_counter() - began)
    return [row | {"seconds_of_table": seconds} for row in rows]
