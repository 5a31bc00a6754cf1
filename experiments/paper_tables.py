"""The paper's tables in miniature, each beside the null controls that say what its numbers mean.

    python experiments/paper_tables.py --table 5 --figure 4 [--quick]
    python experiments/paper_tables.py --table 2 --table 3 --table 4 --table 6      # see merging_tables.py
    python experiments/paper_tables.py --table 7 --table 8                          # see codec_tables.py
    python experiments/paper_tables.py --ablation curriculum                        # see curriculum.py

In:    the models of make_models.py. Target: base. Sources: large (deeper and wider) and base-seed2 (equal shapes, another
       origin, so that nothing but the data is shared).
Out:   printed tables, and a JSON line per measurement, appended to results/table5.jsonl and results/figure4.jsonl.
Paper: Sec. 4, Table 5 (LLaMA-3.2-1B -> Gemma-3-1B) and Fig. 4 (Gemma 4B -> 1B): lambda curves with and without transport.
ours:  bits per byte instead of benchmarks; every row is held against *zero* (shrinkage towards the mean latent), *noise* and
       *shuffled* (no content of the source at all), with paired standard errors; the cell that is reported is chosen on
       validation text and judged on test text. Sinkhorn needs a fourth control, *carried*: Gaussian noise in the place of
       the source, sent through the same transport. The plan pairs each slot of the target with whatever resembles it, so
       that what comes out resembles the target, whatever went in; the first three enter after the transport and miss that.
Left out on purpose: plots (figures.py). Previous: evaluate.py. Next: explore_transfer.py.
"""
import argparse
import functools
import hashlib
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from align import Moments, control_latents
from chunking import Checkpoint
from evaluate import DOMAINS, byte_scores, held_out
from lsmerge import Alignment, Codec, Parent, Transport, cast, convex_weights, lerp
from merge import Job, measure_slots, plan_merge, training_parents
from tiny_lm import TinyLM
from train import Schedule, train_vae
from vae import VAEConfig

LAMBDAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
ALIGNS = ("none", "mean", "gaussian", "sinkhorn")
PAIRINGS = ("depth", "index")
CONTROLS = ("zero", "noise", "shuffled", "carried")
QUICK = 8                       # documents per domain: enough to see that everything runs, not to conclude anything
# The paper's own figures, for orientation only: WinoGrande / ARC-C / HellaSwag in per cent, higher is better.
PAPER_TABLE5 = {"base": "56.83 / 42.78 / 49.07", 1.0: "51.13 / 34.25 / 48.50", 0.1: "57.75 / 43.34 / 50.10"}


# --- Statistics. Scores: domain -> (S, documents) bits per byte; S seeds, 1 where nothing is random. ------------------
class Difference(NamedTuple):
    """Ours minus the other's, bits per byte: negative is better."""
    mean: float
    se_text: float              # over documents, paired: how hard a document is cancels
    se_seeds: float             # over the seeds of whatever is random on either side

    @property
    def se(self): return math.hypot(self.se_text, self.se_seeds)

    @property
    def better(self): return self.mean < -2 * self.se


def pooled(scores, domains=DOMAINS):
    """(S,) each seed's bits per byte, with equal weight per domain (else the longest domain would decide)."""
    return np.mean([scores[domain].mean(1) for domain in domains], axis=0)


def text_error(scores, domains=DOMAINS):
    """Standard error of the pooled mean over documents; the domains' documents are independent of each other."""
    parts = [scores[domain].mean(0) for domain in domains]
    return math.sqrt(sum(part.var(ddof=1) / part.size for part in parts)) / len(parts)


def difference(ours, other, domains=DOMAINS):
    """Equation:  D = mean over domains of mean over documents of (ours - other), seeds averaged first;
                  se^2 = SE_text^2 + SE_seeds^2 (paper.md has no such thing; ours)"""
    paired = {domain: ours[domain].mean(0)[None] - other[domain].mean(0)[None] for domain in domains}
    seeds = [values.var(ddof=1) / values.size for values in (pooled(ours, domains), pooled(other, domains)) if values.size > 1]
    return Difference(float(pooled(paired, domains)[0]), text_error(paired, domains), math.sqrt(sum(seeds)))


def judge(ours, base, controls, domains=DOMAINS):
    """(differences to the base and to every control, beats every control, verdict).

    "transfers": more than two standard errors beyond every control, and (ours) beyond the base as well: a source that
    only does less harm than noise has brought nothing.
    """
    found = {name: difference(ours, other, domains) for name, other in {"base": base, **controls}.items()}
    beats = bool(controls) and all(found[name].better for name in controls)
    return found, beats, "transfers" if beats and found["base"].better else "not reproduced"


# --- The grid: a tensor is encoded once per model, aligned once per (source, pairing, alignment), decoded per lambda. --
class Encoded(Parent):
    """A Parent that keeps its latents: the grid asks for them again and again."""
    @functools.cached_property
    def z_NZ(self): return super().latents(0, self.N)

    def latents(self, first, last): return self.z_NZ[first:last]


def noise_parent(parent, generator):
    """A source without content: as many latents as the source's, Gaussian with their mean and covariance."""
    twin = Encoded(*parent)
    twin.z_NZ = control_latents("noise", parent.z_NZ, Moments.of(parent.z_NZ), generator)
    return twin


class Cell(NamedTuple):
    """One measured model. `source` is a file's stem; `seed` None where nothing is random."""
    source: str
    align: str
    pairing: str
    lam: float
    control: str | None = None
    seed: int | None = None


class Grid:
    """One target, one codec; merged models of any cell, and their scores. Scores are kept: nothing is measured twice."""

    def __init__(self, target, codec, documents=None, bar=None):
        self.target, self.codec, self.documents, self.bar = Checkpoint(target), codec, documents, bar
        self.tensors = {name: self.target.read_tensor(name) for name in self.target.entries}
        self.encoded, self.scores, self.seconds = {}, {}, {}

    def pairs(self, source, pairing):
        """[(number, target, source)] of the encoded tensors. Everything else stays the target's in every cell, equal
        shapes or not: what is compared are the latents alone, and a control must not receive the source's embeddings."""
        source = Checkpoint(source)
        _, _, tasks = plan_merge(self.target, [source], align="mean", by=pairing)
        found = []
        for number, task in enumerate(measure_slots(tasks, self.target, [source])):
            if task.action == "encoded":
                mine, theirs = (Encoded(functools.partial(file.read, slot.name), slot, self.codec, index)
                                for index, (file, slot) in enumerate(zip((self.target, source), task.slots)))
                found.append((number, self.encoded.setdefault(task.name, mine), theirs))
        return found

    def transported(self, pairs, how, seed=0):
        """[z~ of each pair]: Algorithm 1, lines 3 and 4, or a control; seeds as in merge.py."""
        def one(number, target, source):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            return Transport(target, source, how, target.N, generator)(target.latents(0, target.N), 0, target.N)
        return [one(*pair) for pair in pairs]

    def model(self, pairs, transported, lam):
        """Lines 5 and 6: interpolate, decode, round to the stored type, place into the target's checkpoint."""
        tensors = dict(self.tensors)
        for (_, target, _), z_aligned_JZ in zip(pairs, transported):
            slot = target.slot
            z_merged_JZ = lerp([target.latents(0, target.N), z_aligned_JZ], convex_weights([lam]))
            tensors[slot.name] = cast(target.codec.decode(z_merged_JZ, slot, slot.numel), slot).reshape(slot.shape)
        return TinyLM.from_state_dict(tensors)

    def score(self, key, tensors_or_model, splits):
        """Enter the model's scores on the splits under (key, split)."""
        began = time.perf_counter()
        model = tensors_or_model if isinstance(tensors_or_model, torch.nn.Module) else TinyLM.from_state_dict(tensors_or_model)
        for split in splits:
            # (1, documents); small batches: these activations fit into a cache, which saves a fifth of the time
            self.scores[key, split] = {d: np.array([[bits.mean() for bits, _ in byte_scores(model, held_out(d, split)[:self.documents], batch=8)]])
                                       for d in DOMAINS}
        self.seconds[key] = time.perf_counter() - began
        if self.bar is not None:
            self.bar.update()

    def measure_base(self, any_source):
        """The target as it is, and its round trip through the codec (lambda = 0)."""
        pairs = self.pairs(any_source, "depth")
        self.score("base", self.tensors, ("validation", "test"))
        self.score("round trip", self.model(pairs, [target.latents(0, target.N) for _, target, _ in pairs], 0.0), ("validation", "test"))

    def measure_source(self, source, aligns, pairing, lambdas, name=None, control=None, seed=None):
        """All cells of one source and pairing. Both splits: validation chooses, test reports. With `control` the file
        is a control of the source called `name`, never chosen: test only."""
        pairs = self.pairs(source, pairing)
        for align in aligns:
            transported = self.transported(pairs, Alignment(align))
            for lam in lambdas:
                self.score(Cell(name or source.stem, align, pairing, lam, control, seed), self.model(pairs, transported, lam),
                           ("test",) if control else ("validation", "test"))

    def measure_controls(self, any_source, lambdas, seeds):
        """Controls that hold nothing of any source, so that one set serves all; never chosen: test only."""
        pairs = self.pairs(any_source, "depth")
        for control in ("zero", "noise", "shuffled"):
            for seed in range(seeds) if control != "zero" else [None]:
                transported = self.transported(pairs, Alignment(control=control), seed or 0)
                for lam in lambdas:
                    self.score(Cell("", "", "", lam, control, seed), self.model(pairs, transported, lam), ("test",))

    def measure_carried(self, source, align, pairing, lambdas, seeds):
        """Noise in the place of this source, through this alignment."""
        pairs = self.pairs(source, pairing)
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            noise = [(number, target, noise_parent(theirs, generator)) for number, target, theirs in pairs]
            transported = self.transported(noise, Alignment(align))
            for lam in lambdas:
                self.score(Cell(source.stem, align, pairing, lam, "carried", seed), self.model(pairs, transported, lam), ("test",))

    def controls(self, cell):
        """control -> scores with all its seeds, on test, of the controls that this cell has to beat."""
        found = {}
        for (key, split), scores in self.scores.items():
            if (isinstance(key, Cell) and key.control and key.lam == cell.lam and split == "test"
                    and key[:3] in (("", "", ""), cell[:3])):
                found.setdefault(key.control, []).append(scores)
        return {control: {d: np.concatenate([s[d] for s in group]) for d in DOMAINS} for control, group in found.items()}

    def choose(self, source, domains=DOMAINS):
        """The cell of a source with the lowest bits per byte on validation text; the plain average is no candidate."""
        cells = [key for key, split in self.scores if isinstance(key, Cell) and split == "validation"
                 and key.source == source and key.align != "weights"]
        return min(cells, key=lambda cell: pooled(self.scores[cell, "validation"], domains)[0])


def plain_average(grid, source, lambdas):
    """Weight space, every float tensor, embeddings too: the usual soup of two models of equal shapes. A baseline: it
    mixes more than the latent cells do, so that the controls do not apply to it."""
    other = Checkpoint(source)
    theirs = {name: other.read_tensor(name) for name in other.entries}
    for lam in lambdas:
        tensors = {name: lerp([w.double(), theirs[name].double()], convex_weights([lam])).to(w.dtype) for name, w in grid.tensors.items()}
        grid.score(Cell(source.stem, "weights", "depth", lam), tensors, ("validation", "test"))


def trained_codec(target, sources, config, schedule=Schedule()):
    """(Codec, its training record): one VAE trained on all models, as merge.py does without --vae."""
    target, sources = Checkpoint(target), [Checkpoint(source) for source in sources]
    tasks = measure_slots(plan_merge(target, sources, align="mean")[2], target, sources)
    vae, stages = train_vae(training_parents(Job(target, sources, tasks, [])), config, schedule)
    return Codec(vae), stages


# --- Records and tables -----------------------------------------------------------------------------------------------
def summary(scores, domains=DOMAINS):
    return {"pooled": float(pooled(scores, domains).mean()), "se": text_error(scores, domains),
            **{domain: float(scores[domain].mean()) for domain in DOMAINS}}


def records(grid, facts, domains=DOMAINS):
    """One JSON-able record per measured model; each cell carries its own differences, standard errors and verdict."""
    base, found = grid.scores["base", "test"], []
    for key, seconds in grid.seconds.items():
        cell = key if isinstance(key, Cell) else Cell("", "", "", 0.0)
        record = {"row": key if isinstance(key, str) else cell.control or "cell", **cell._asdict(), "scored": list(domains),
                  **{split: summary(grid.scores[key, split], domains) for split in ("validation", "test") if (key, split) in grid.scores}}
        controls = {} if cell.control or isinstance(key, str) or cell.align == "weights" else grid.controls(cell)
        differences, beats, verdict = judge(grid.scores[key, "test"], base, controls, domains)
        record["difference"] = {name: {**d._asdict(), "se": d.se} for name, d in differences.items()}
        record |= {"beats_controls": beats if controls else None, "verdict": verdict if controls else None,
                   "seconds": round(seconds, 2), "documents": base[DOMAINS[0]].shape[1], **facts}
        found.append(record)
    return found


def append(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def facts_of(codec, stages, files):
    """What the numbers depend on. File names only: a path means nothing elsewhere."""
    return {"chunk": codec.C, "latent": codec.Z, "blocks": codec.vae.config.blocks, "codec_nmse": stages[-1]["nmse"],
            "sha256": {Path(f).name: hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files},
            "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}


HEAD = (f"{'':<46}{'pooled':>8}" + "".join(f"{d:>11}" for d in DOMAINS) + f" |{'base':>15}"
        + "".join(f"{c:>15}" for c in CONTROLS) + " | beats every control")


def row_text(name, record, note=None):
    """Bits per byte on test text, then the paired differences (+- standard error) to the base and to each control."""
    test, found = record["test"], record["difference"]
    cells = [f"{found[c]['mean']:+.3f}±{found[c]['se']:.4f}" if c in found else "" for c in ("base", *CONTROLS)]
    beats = {True: "yes", False: "no", None: ""}[record["beats_controls"]] if note is None else note
    return (f"{name:<46}{test['pooled']:>8.4f}" + "".join(f"{test[d]:>11.4f}" for d in DOMAINS) + " |"
            + "".join(f"{cell:>15}" for cell in cells) + f" | {beats}")


def mean_control(rows, control, lam, like=("", "", "")):
    """One printable row for all seeds of a control: means, the spread over seeds, the mean standard error."""
    group = [r for r in rows if r["control"] == control and r["lam"] == lam and (r["source"], r["align"], r["pairing"]) == like]
    values = [r["test"]["pooled"] for r in group]
    mean = lambda pick: float(np.mean([pick(r) for r in group]))
    return {"test": {key: mean(lambda r: r["test"][key]) for key in group[0]["test"]}, "beats_controls": None,
            "difference": {"base": {key: mean(lambda r: r["difference"]["base"][key]) for key in ("mean", "se")}},
            "seeds": f"{len(group)} seeds, sd {np.std(values, ddof=1):.4f}" if len(group) > 1 else ""}


def find(rows, **fields):
    return [r for r in rows if all(r[k] == v for k, v in fields.items())]


def print_table5(rows, chosen):
    """Paper-like: base, OT only (lambda = 1), OT + interpolation at lambda = 0.1, and what the controls do there."""
    print("\nTable 5 in miniature: bits per byte on test text (lower is better), then paired differences ± standard error. On the right,\n"
          "for orientation, the paper's accuracies (WinoGrande / ARC-C / HellaSwag, higher is better)")
    print(HEAD)
    paper = lambda lam, note="": f"{note:<20} paper {PAPER_TABLE5[lam]}"
    print(row_text("base", find(rows, row="base")[0], paper("base")))
    print(row_text("round trip of the codec alone", find(rows, row="round trip")[0]))
    label = {1.0: "only (lambda 1)", 0.1: "+ interpolation (0.1)"}
    for source in dict.fromkeys(r["source"] for r in rows if r["row"] == "cell"):
        for r in [r for lam in label for r in find(rows, row="cell", source=source, lam=lam, pairing="depth")]:
            align = "plain average" if r["align"] == "weights" else r["align"]
            name = f"{source}: {align} {label[r['lam']]}" + (f", c = {r['chunk']}" if r["few"] else "")
            beats = {True: "yes", False: "no", None: ""}[r["beats_controls"]]
            print(row_text(name, r, paper(r["lam"], beats) if r["align"] in ("gaussian", "sinkhorn") else beats))
    for lam, control in ((lam, control) for lam in label for control in CONTROLS[:3]):
        r = mean_control(find(rows, few=None), control, lam)
        print(row_text(f"control {control}, lambda {lam:g}", r, r["seeds"]))
    print("\nVerdict per source: the cell (lambda, alignment, pairing) chosen on validation text, judged on test text")
    for r in [find(rows, few=None, **cell._asdict())[0] for cell in chosen]:
        print(row_text(f"{r['source']}: {r['align']}, {r['pairing']}, lambda {r['lam']:g}", r, r["verdict"]))


def print_figure4(rows):
    """Curves over lambda; (a) with, (b) without transport."""
    rows = find(rows, few=None)
    lambdas, cells = sorted({r["lam"] for r in find(rows, row="cell")}), find(rows, row="cell")
    print(f"\nFigure 4 in miniature: pooled bits per byte on test text minus the base's {find(rows, row='base')[0]['test']['pooled']:.4f}; "
          "* = better than every control by > 2 se")
    print(f"{'':<48}" + "".join(f"{lam:>10g}" for lam in lambdas))
    for curve in dict.fromkeys((r["source"], r["align"], r["pairing"]) for r in cells):
        line = {r["lam"]: r for r in cells if (r["source"], r["align"], r["pairing"]) == curve}
        show = lambda r: f"{r['difference']['base']['mean']:>+9.4f}{'*' if r['beats_controls'] else ' '}"
        panel, name = "b" if curve[1] in ("none", "weights") else "a", f"{curve[0]}, {curve[1]}, pairing by {curve[2]}"
        print(f"{panel}  {name:<45}" + "".join(show(line[lam]) for lam in lambdas))
    for control, *like in dict.fromkeys((r["control"], r["source"], r["align"], r["pairing"]) for r in rows if r["control"]):
        name = " ".join(["control", control, *like]).strip()
        print(f"   {name:<45}" + "".join(f"{mean_control(rows, control, lam, tuple(like))['difference']['base']['mean']:>+9.4f} " for lam in lambdas))


# --- The commands -----------------------------------------------------------------------------------------------------
def transfer_grid(models, seeds, documents, quiet):
    """Rows of Table 5 and Figure 4, and the cell chosen for each source."""
    base, sources = models / "base.safetensors", [models / "large.safetensors", models / "base-seed2.safetensors"]
    pairings = {"large": PAIRINGS, "base-seed2": PAIRINGS[:1]}     # equal depths: both pairings are the same
    codec, stages = trained_codec(base, sources, VAEConfig())
    facts = facts_of(codec, stages, [base, *sources])
    lines = [(s, pairing) for s in sources for pairing in pairings[s.stem]]
    cells = 2 + len(LAMBDAS) * (len(lines) * (len(ALIGNS) + seeds) + 1 + 2 * seeds + 1)
    with tqdm(total=cells, desc="cells", disable=quiet) as bar:
        grid = Grid(base, codec, documents, bar)
        grid.measure_base(sources[0])
        for source, pairing in lines:
            grid.measure_source(source, ALIGNS, pairing, LAMBDAS)
            grid.measure_carried(source, "sinkhorn", pairing, LAMBDAS, seeds)
        plain_average(grid, sources[1], LAMBDAS)
        grid.measure_controls(sources[0], LAMBDAS, seeds)
    rows = [{**row, "few": None} for row in records(grid, facts)]
    return rows + few_samples(base, sources[0], seeds, documents), [grid.choose(source.stem) for source in sources]


def few_samples(base, source, seeds, documents, chunk=640, lambdas=(0.1, 1.0)):
    """What n < d does: chunks so long (the paper's 640) that a tensor has fewer of them than latent numbers. Without
    blocks the warm start is an exact linear codec: nothing to train."""
    codec, stages = trained_codec(base, [source], VAEConfig(chunk=chunk, width=chunk, blocks=0), Schedule(steps1=0, steps2=0))
    grid = Grid(base, codec, documents)
    grid.score("base", grid.tensors, ("validation", "test"))
    grid.measure_source(source, ("gaussian",), "depth", lambdas)
    grid.measure_controls(source, lambdas, seeds)
    pairs = grid.pairs(source, "depth")
    few = {"few": max(target.N for _, target, _ in pairs) / codec.Z}       # n / d of the largest tensor
    return [{**row, **few} for row in records(grid, facts_of(codec, stages, [base, source])) if row["row"] != "base"]


def measure_transfer(args):
    """Table 5 and Figure 4: one grid of cells for both."""
    began = time.perf_counter()
    rows, chosen = transfer_grid(args.models, args.seeds, QUICK if args.quick else args.documents, args.quiet)
    if "5" in args.table:
        print_table5(rows, chosen)
        kept = [r for r in rows if r["lam"] in (0.0, 0.1, 1.0) or any(all(r[k] == v for k, v in c._asdict().items()) for c in chosen)]
        args.quick or append(args.results / "table5.jsonl", kept)
    if "4" in args.figure:
        print_figure4(rows)
        args.quick or append(args.results / "figure4.jsonl", [r for r in rows if not r["few"]])
    print(f"\n{len(rows)} models measured in {time.perf_counter() - began:.0f} s on {torch.get_num_threads()} threads")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="append", default=[], choices=("2", "3", "4", "5", "6", "7", "8"), help="may be given again")
    parser.add_argument("--figure", action="append", default=[], choices=("4",), help="may be given again")
    parser.add_argument("--ablation", choices=("curriculum",), help="which parts of the training earn their place")
    parser.add_argument("--models", type=Path, default=HERE / "models", help="folder of the checkpoints")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON lines, appended to")
    parser.add_argument("--seeds", type=int, default=5, help="for whatever is random (%(default)s)")
    parser.add_argument("--documents", type=int, help="per domain and split, at most; fewer is faster and less sure (all)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} documents per domain; nothing is written")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    if not (args.table + args.figure or args.ablation):
        parser.error("nothing to do: give --table, --figure or --ablation")
    for table in dict.fromkeys(t for t in args.table if t != "5"):
        from codec_tables import measure_codec, print_codec        # they import this file: not before its own end
        from merging_tables import measure, print_table
        measure, print_table = (measure_codec, print_codec) if table in "78" else (measure, print_table)
        rows = measure(table, args.models, args.seeds, args.documents, args.quick, args.quiet)
        print_table(table, rows)
        args.quick or append(args.results / f"table{table}.jsonl", rows)
    if args.ablation:
        from curriculum import measure_ablation, print_ablation
        rows = measure_ablation(args.models, args.seeds, args.documents, args.quick, args.quiet)
        print_ablation(rows)
        args.quick or append(args.results / "ablation.jsonl", rows)
    if "5" in args.table or args.figure:
        measure_transfer(args)


if __name__ == "__main__":
    main()
