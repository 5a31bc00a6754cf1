"""Tables 2, 3, 4 and 6 of the paper in miniature: self-merging, LoRA experts, two experts, and what is merged.

    python experiments/paper_tables.py --table 2 --table 4 --table 6 --table 3 [--quick]

In:    the models and adapters of make_models.py, as float32 copies: halfway between two bfloat16 numbers lies no third one,
       and which way such ties round moves a merge at lambda = 0.5 by far more than an exact codec does.
Out:   rows; each model is made by merge.py itself (or by baselines.py), scored once on test text, and held against other
       rows by paired differences. Whatever is chosen (lambda, density, p, who is in a greedy soup) is chosen on validation.
Paper: Sec. 4, Tables 2, 3, 4, 6 (paper.md 8). differs: bits per byte instead of benchmarks.
ours:  "beats", "ties" or "loses": a paired difference beyond 2 sqrt(SE_text^2 + SE_seeds^2), or not; "reproduced" only where a
       row beats everything it is held against: the base, and the same in weight space or the null controls.
       Many such comparisons are made, so that one in twenty would stand out by chance; less than FLOOR is always a tie.
Left out on purpose: AIM (needs activations). Previous: paper_tables.py. Next: explore_transfer.py.
"""
import contextlib, functools, hashlib, io, json, math, platform, shutil, sys, tempfile, time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import lsmerge
import merge
import train
from baselines import dare, dare_ties, greedy_soup, noise_average, soup, ties
from chunking import Checkpoint, is_selected
from evaluate import DOMAINS, byte_scores, held_out
from lsmerge import Codec, Parent, ls_merge
from paper_tables import QUICK, difference, pooled, summary
from tiny_lm import ADAPTER, TinyLM, fold

# Codecs. The first is merge.py's default: at r = 1 exact and linear, so that merging latents is merging weights. The second has
# a posterior ten times as wide (sigma near 0.1), the third a code of half the size (the paper's r in Table 2).
CODECS = {"r 1": (), "r 1, beta 0.01": ("--beta", 0.01), "r 2": ("--ratio", 2)}
DRAWS = {"r 1": (1, 8, 32), "r 1, beta 0.01": (1, 8, 32), "r 2": (8,)}         # K of a self-merge
PAIRS = (("code", "arithmetic"), ("code", "prose"))
TASK_LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
DENSITIES, DROPS, SCALES = (0.2, 0.5), (0.5, 0.9), (0.2, 0.4, 1.0)              # TIES; p of DARE; lambda of all of them
PARTS = {"MLP": "mlp", "attention": "self_attn", "both": None}                  # --select of Table 6
ACROSS_LAM = 0.1                # the paper's lambda across shapes
FLOOR = 1e-4                    # bits per byte. ours: rounding alone makes 1e-6 in every document alike, with a still smaller error
BASE = {"base": "base"}


# --- Rows -------------------------------------------------------------------------------------------------------------
class Row(NamedTuple):
    """One line of a table. Scores: domain -> (S, documents) bits per byte; S seeds, 1 where nothing is random."""
    name: str
    kind: str                   # "parent", "weight", "codec", "latent" or "control"
    against: dict               # label -> name of a row that it is held against
    scores: dict
    settings: dict
    report: dict                # merge.py's, of the first seed


def verdict(found):
    """What a paired difference (ours minus the other's; less is better) says. Exactly two standard errors are a tie."""
    if abs(found.mean) < FLOOR:
        return "ties"
    return "beats" if found.better else "loses" if found.mean > 2 * found.se else "ties"


def run(command, *arguments):
    """A command of the product within this process, without its prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        command([str(argument) for argument in arguments])


class Sheet:
    """One table in the making: its files, its codecs, its rows."""

    def __init__(self, models, scratch, seeds=3, documents=None, quick=False, bar=None):
        self.models, self.scratch, self.seeds, self.bar = Path(models), Path(scratch), seeds, bar
        self.documents, self.training = (QUICK, ("--steps2", 0)) if quick else (documents, ())
        self.rows, self.codecs, self.stages, self.digests = {}, {}, {}, {}

    def file(self, name):
        """A model's float32 copy; of an adapter, its base with the adapter folded in."""
        copy = self.scratch / f"{name}.safetensors"
        if not copy.exists():
            folder = self.models / "lora" / name
            own = folder / ADAPTER if folder.is_dir() else self.models / f"{name}.safetensors"
            tensors = fold(self.tensors("base"), folder) if folder.is_dir() else load_file(own)
            save_file({key: w.float().contiguous() for key, w in tensors.items()}, copy)
            self.digests[name] = hashlib.sha256(own.read_bytes()).hexdigest()
        return copy

    def tensors(self, name): return load_file(self.file(name))

    def train(self, names, codecs):
        """Train a VAE of each kind on all these models."""
        for codec in codecs:
            path = self.scratch / f"vae {codec}.safetensors"
            run(train.main, *map(self.file, names), "-o", path, *CODECS[codec], *self.training, "--quiet")
            self.codecs[codec], self.stages[codec] = path, merge.load_vae(path)[1]["stages"][-1]

    def where(self, codec): return ("--vae", self.codecs[codec], "--max-nmse", 2) if codec else ("--space", "weight")

    def merged(self, *arguments, codec=None, seeds=1):
        """([tensors of each seed], the first report) of merge.py; in weight space unless a codec is named."""
        found, out, report = [], self.scratch / "out.safetensors", self.scratch / "report.json"
        for seed in range(seeds):
            run(merge.main, *arguments, *self.where(codec), "--seed", seed, "-o", out, "--report", report, "--force", "--quiet")
            found.append((load_file(out), json.loads(report.read_text())))
        return [tensors for tensors, _ in found], found[0][1]

    def scores(self, models, split="test"):
        def one(tensors):
            lm, cut = TinyLM.from_state_dict(tensors), slice(self.documents)
            if self.bar is not None:
                self.bar.update()
            # small batches, whose activations fit into a cache
            return {d: [bits.mean() for bits, _ in byte_scores(lm, held_out(d, split)[cut], batch=8)] for d in DOMAINS}
        found = [one(tensors) for tensors in models]
        return {d: np.array([scores[d] for scores in found]) for d in DOMAINS}

    def quality(self, models):
        """One number to choose by, higher is better: minus the bits per byte on validation text, all domains alike."""
        return -float(pooled(self.scores(models, "validation")).mean())

    def choose(self, candidates):
        """The best of the (settings, models of all seeds), by validation text."""
        return max(candidates, key=lambda candidate: self.quality(candidate[1]))

    def add(self, name, kind, models, against=BASE, report=None, **settings):
        """Enter the models of all seeds, scored on test text, as a row."""
        self.rows[name] = Row(name, kind, against, self.scores(models), settings, report or {})


# --- Table 2: self-merging --------------------------------------------------------------------------------------------
def noise_sizes(center, draws):
    """{name: |W_draw - W_center| / |W_center|, root mean square over draws} of the tensors that differ."""
    size = lambda name, w: math.sqrt(np.mean([((draw[name] - w).double().norm() / w.double().norm()).item() ** 2 for draw in draws]))
    return {name: size(name, w) for name, w in center.items() if not torch.equal(w, draws[0][name])}


def noisy_copies(center, sizes, K, seed):
    """The control: the mean of K copies of a model, each with white noise of these sizes on its weights."""
    generator = torch.Generator().manual_seed(seed)
    return {**center, **{name: noise_average({name: center[name]}, K, size, generator)[name] for name, size in sizes.items()}}


def prior_draws(path, vae, K, seed):
    """The decoded mean of K draws from N(0, I) (paper: Sec. 3.3); a tensor's mean and scale, and the rest, are the model's."""
    file, codec, tensors = Checkpoint(path), Codec(merge.load_vae(vae)[0]), load_file(path)
    for number, task in enumerate(merge.measure_slots(merge.plan_merge(file, [])[2], file, [])):
        if task.action == "encoded":
            read = functools.partial(file.read, task.name)
            parent = Parent(read, task.slots[0], codec, samples=K, seed=seed * 10_007 + number, prior=True)
            tensors[task.name] = torch.cat([piece for _, piece in ls_merge(parent, [], [1.0])]).reshape(tensors[task.name].shape)
    return tensors


def table2(sheet):
    """The model, what the codec alone does to it, the mean of K draws, and K copies with noise of the same size. The noise lies
    around the round trip, so that the two differ in nothing but where the noise was added: to codes or to weights."""
    sheet.train(("base", "large"), CODECS)
    for name in ("base", "large"):
        path, seeds = sheet.file(name), range(sheet.seeds)
        sheet.add(name, "parent", [load_file(path)], {})
        for codec, counts in DRAWS.items():
            trip, report = sheet.merged(path, "--roundtrip", codec=codec)
            alone = f"{name}: round trip [{codec}]"
            sheet.add(alone, "codec", trip, {"base": name}, report)
            ones, first = sheet.merged(path, "--samples", 1, codec=codec, seeds=sheet.seeds)
            sizes = noise_sizes(trip[0], ones)
            for K in counts:
                draws, report = (ones, first) if K == 1 else sheet.merged(path, "--samples", K, codec=codec, seeds=sheet.seeds)
                noise = f"{name}: noise, K {K} [{codec}]"
                sheet.add(noise, "control", [noisy_copies(trip[0], sizes, K, seed) for seed in seeds], {"base": name}, relative=sizes)
                against = {"base": name, "round trip": alone, "noise": noise}
                sheet.add(f"{name}: self-merge, K {K} [{codec}]", "latent", draws, against, report)
        first = next(iter(sheet.codecs))
        prior = [prior_draws(path, sheet.codecs[first], 8, seed) for seed in seeds]
        sheet.add(f"{name}: prior, K 8 [{first}]", "latent", prior, {"base": name, "round trip": f"{name}: round trip [{first}]"})


# --- Table 4: two experts of one base; and what Table 3 shares with it ------------------------------------------------
def sparse_rows(sheet, tag, models, methods=("TIES", "DARE", "DARE-TIES")):
    """The weight-space methods that drop entries, their settings chosen on validation text."""
    base = sheet.tensors("base")
    draws = lambda make: [make(generator=torch.Generator().manual_seed(seed)) for seed in range(sheet.seeds)]
    partial, cells = functools.partial, [(p, lam) for p in DROPS for lam in SCALES]
    grids = {
        "TIES": (({"density": d, "lambda": lam}, [ties(base, models, d, lam)]) for d in DENSITIES for lam in SCALES),
        "DARE": (({"p": p, "lambda": lam}, draws(partial(dare, base, models, p, [lam] * len(models)))) for p, lam in cells),
        "DARE-TIES": (({"p": p, "lambda": lam}, draws(partial(dare_ties, base, models, p, lam))) for p, lam in cells)}
    for method in methods:
        settings, chosen = sheet.choose(grids[method])
        sheet.add(f"{tag}: {method}", "weight", chosen, **settings)


def twin_rows(sheet, tag, codecs, *arguments, **settings):
    """The same merge in weight space and through each codec."""
    sheet.add(f"{tag}, weights", "weight", *[sheet.merged(*arguments)[0]], **settings)
    for codec in codecs:
        models, report = sheet.merged(*arguments, codec=codec)
        sheet.add(f"{tag}, latents [{codec}]", "latent", models, BASE | {"weights": f"{tag}, weights"}, report, **settings)


def table4(sheet):
    names, codecs = ("base", "code", "arithmetic", "prose"), list(CODECS)
    sheet.train(names, codecs)
    for name in names:
        sheet.add(name, "parent", [sheet.tensors(name)], BASE if name != "base" else {})
    for name, codec in ((name, codec) for name in names for codec in codecs):
        trip, report = sheet.merged(sheet.file(name), "--roundtrip", codec=codec)
        sheet.add(f"{name}: round trip [{codec}]", "codec", trip, {"parent": name}, report)
    for pair in PAIRS:
        tag, files = " + ".join(pair), [sheet.file(name) for name in pair]
        best = sheet.choose((name, [sheet.tensors(name)]) for name in pair)[0]
        sheet.rows[f"{tag}: best expert"] = sheet.rows[best]._replace(name=f"{tag}: best expert", settings={"best": best})
        twin_rows(sheet, f"{tag}: lerp 0.5", codecs, *files)
        twin_rows(sheet, f"{tag}: slerp 0.5", codecs[:1], *files, "--operator", "slerp")
        # From the base towards both experts; lambda is chosen in weight space and then the codec's as well.
        task = (sheet.file("base"), *files, "--operator", "task-arithmetic", "--base", sheet.file("base"), "--lam")
        lam = sheet.choose((lam, sheet.merged(*task, lam)[0]) for lam in TASK_LAMBDAS)[0]
        twin_rows(sheet, f"{tag}: task arithmetic", codecs[:1], *task, lam, lam=lam)
        sparse_rows(sheet, tag, [sheet.tensors(name) for name in pair])


# --- Table 6: what is merged ------------------------------------------------------------------------------------------
def only(target, merged, path, pattern):
    """The target with the selected tensors of a merge: merge.py itself would average the others in weight space."""
    chosen = {entry.name for entry in Checkpoint(path).entries.values() if is_selected(entry, pattern)}
    return {name: merged[name] if name in chosen else w for name, w in target.items()}


def table6(sheet):
    """Across shapes against null controls, and the midpoint of two experts (all else the first one's) against weight space."""
    codec = next(iter(CODECS))
    sheet.train(("base", "large", "code", "prose"), [codec])
    base, large, code, prose = (sheet.file(name) for name in ("base", "large", "code", "prose"))
    for name in ("base", "code"):
        sheet.add(name, "parent", [sheet.tensors(name)], {})
    for part, pattern in PARTS.items():
        select, controls = ("--select", pattern) if pattern else (), {}
        arguments = (base, large, "--lam", ACROSS_LAM, *select)
        for control in ("zero", "noise", "shuffled"):
            models, report = sheet.merged(*arguments, "--control", control, codec=codec, seeds=1 if control == "zero" else sheet.seeds)
            controls[control] = f"large -> base, {part}: {control}"
            sheet.add(controls[control], "control", models, report=report)
        models, report = sheet.merged(*arguments, codec=codec)
        sheet.add(f"large -> base, {part}", "latent", models, BASE | controls, report)
        placed = lambda models: [only(load_file(code), model, code, pattern) for model in models]
        twin = f"code + prose, {part}: weights"
        sheet.add(twin, "weight", placed(sheet.merged(code, prose, *select)[0]), {"code": "code"})
        models, report = sheet.merged(code, prose, *select, codec=codec)
        sheet.add(f"code + prose, {part}", "latent", placed(models), {"code": "code", "weights": twin}, report)


# --- Table 3: ten LoRA experts ----------------------------------------------------------------------------------------
def adapter_rows(sheet, names, codec):
    """The adapters merged among themselves: by their products, cut to factors of rank 8 again (merge.py), or factor by factor."""
    folders, base = [sheet.models / "lora" / name for name in names], sheet.tensors("base")
    against, mean = BASE | {"whole models": "soup, weights"}, sheet.scratch / "mean"
    shutil.copytree(folders[0], mean)
    save_file({key: w.float() for key, w in soup([load_file(folder / ADAPTER) for folder in folders]).items()}, mean / ADAPTER)
    sheet.add("soup of factors: mean B times mean A", "weight", [fold(base, mean)], against)
    for kind, label, through in (("weight", "weights", None), ("latent", f"latents [{codec}]", codec)):
        out, report = sheet.scratch / f"adapter, {kind}", sheet.scratch / "report.json"
        run(merge.main, *folders, "--operator", "soup", *sheet.where(through), "-o", out, "--report", report, "--force", "--quiet")
        sheet.add(f"soup of adapters, {label}", kind, [fold(base, out)], against, json.loads(report.read_text()))
        against = against | {"weights": "soup of adapters, weights"}


def table3(sheet):
    codec, names = next(iter(CODECS)), sorted(folder.name for folder in (sheet.models / "lora").iterdir())
    experts, files = [sheet.tensors(name) for name in names], [sheet.file(name) for name in names]
    sheet.train(names, [codec])
    sheet.add("base", "parent", [sheet.tensors("base")], {})
    for name, expert in zip(names, experts):
        sheet.add(name, "parent", [expert])
    alone = [sheet.quality([expert]) for expert in experts]
    best, second = sorted(range(len(names)), key=lambda i: -alone[i])[:2]
    sheet.rows["best expert"] = sheet.rows[names[best]]._replace(name="best expert", settings={"best": names[best]})
    two = {"kept": [names[best], names[second]]}
    twin_rows(sheet, "lerp of the best two", [codec], files[best], files[second], **two)
    twin_rows(sheet, "slerp of the best two", [codec], files[best], files[second], "--operator", "slerp", **two)
    twin_rows(sheet, "soup", [codec], *files, "--operator", "soup")
    greedy = greedy_soup(experts, lambda tensors: sheet.quality([tensors]))
    sheet.add("greedy soup, weights", "weight", [greedy.tensors], kept=[names[i] for i in greedy.kept])

    def latent_soup(kept):                                 # as merge.py's greedy soup; the score needs all three domains
        chosen = [files[i] for i in kept]
        return sheet.merged(*chosen, *(("--operator", "soup") if len(kept) > 1 else ("--roundtrip",)), codec=codec)
    kept = lsmerge.greedy_soup(len(names), lambda kept: sheet.quality(latent_soup(kept)[0]))
    models, report = latent_soup(kept)
    sheet.add(f"greedy soup, latents [{codec}]", "latent", models, BASE | {"weights": "greedy soup, weights"}, report,
              kept=[names[i] for i in kept])
    sparse_rows(sheet, "ten experts", experts, ("TIES", "DARE-TIES"))
    adapter_rows(sheet, names, codec)


# --- Records ----------------------------------------------------------------------------------------------------------
TABLES = {"2": table2, "3": table3, "4": table4, "6": table6}
TITLES = {"2": "self-merging", "3": "ten LoRA experts", "4": "two experts of one base", "6": "what is merged"}


def record(table, sheet, row):
    """The row as a JSON line: its numbers, its differences to the rows it is held against, and what they say."""
    to = lambda other, domains=DOMAINS: difference(row.scores, sheet.rows[other].scores, domains)
    found = {label: to(other) for label, other in row.against.items()}
    said = {label: verdict(d) for label, d in found.items()}
    each = lambda other: {d: to(other, (d,))._asdict() for d in DOMAINS}
    keys = ("kind", "ratio", "lambda", "operator", "space", "align", "control", "roundtrip", "distance")
    return {"table": table, "row": row.name, "kind": row.kind, "settings": row.settings, "seeds": len(pooled(row.scores)),
            "test": summary(row.scores), "per_seed": pooled(row.scores).tolist(),
            "difference": {label: {**d._asdict(), "se": d.se, "verdict": said[label], "row": row.against[label],
                                   "domains": each(row.against[label])} for label, d in found.items()},
            "verdict": None if row.kind != "latent" else "reproduced" if set(said.values()) == {"beats"} else "not reproduced",
            "report": {key: row.report[key] for key in keys if key in row.report},
            "documents": row.scores[DOMAINS[0]].shape[1], "codecs": sheet.stages, "sha256": sheet.digests,
            "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}


def measure(table, models, seeds=3, documents=None, quick=False, quiet=False):
    """The records of one table."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, tqdm(desc=f"table {table}", unit="model", disable=quiet) as bar:
        sheet = Sheet(models, scratch, seeds, documents, quick, bar)
        TABLES[table](sheet)
        rows = [record(table, sheet, row) for row in sheet.rows.values()]
    return [{**row, "seconds_of_table": round(time.perf_counter() - began)} for row in rows]


def drift(report):
    """How far the codec moved a merge from the same merge in weight space, over the way from the target through the merge to the
    first source: at a midpoint, over the distance between the parents. None where either is undefined."""
    far = report.get("distance", {})
    way = far["to_target"] + far["to_source"][0] if far.get("to_source") and far["to_source"][0] is not None else 0
    return far["to_average"] / way if way and far["to_average"] is not None else None


def print_table(table, rows):
    print(f"\nTable {table} in miniature, {TITLES[table]}: bits per byte on test text ({rows[0]['documents']} documents per domain), sd over "
          "seeds;\nthen ours minus the other's ± standard error; off: distance to the same merge of weights over that between the parents")
    print(f"{'':<54}{'pooled':>8}{'sd':>8}" + "".join(f"{d:>11}" for d in DOMAINS) + f"{'off':>9}")
    for r in rows:
        far, spread = drift(r["report"]), f"{np.std(r['per_seed'], ddof=1):.4f}" if r["seeds"] > 1 else ""
        compared = "; ".join(f"{other} {d['mean']:+.4f}±{d['se']:.4f} {d['verdict']}" for other, d in r["difference"].items())
        chosen = ", ".join(f"{k} {v}" for k, v in r["settings"].items() if k != "relative")
        print(f"{r['row']:<54}{r['test']['pooled']:>8.4f}{spread:>8}" + "".join(f"{r['test'][d]:>11.4f}" for d in DOMAINS)
              + f"{'' if far is None else f'{far:.0e}':>9} | " + " | ".join(filter(None, (compared, r["verdict"], chosen))))
