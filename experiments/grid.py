"""A grid of merged models: one target, one codec; many sources, alignments, lambdas, controls.

In:    the target's file, sources of any shape, a codec.
Out:   per cell the scores of the merged model; records with paired differences, errors, verdicts.
Paper: Algorithm 1, lines 2 to 6, with the calls of merge.py; but a tensor is encoded once per
       model, aligned once per (source, pairing, alignment) and decoded once per lambda.
ours:  every cell is held against *zero* (shrinkage towards the mean latent), *noise* and *shuffled*
       (no content of the source at all). Sinkhorn needs a fourth control, *carried*: Gaussian noise
       in the place of the source, sent through the same transport. The plan pairs each slot of the
       target with whatever resembles it, so that what comes out resembles the target, whatever went
       in; the first three enter after the transport and miss that. Where hidden units are matched
       by weights, *carried* is noise in the source's place, and *neighbour* the same match with
       every layer of the source one off.
Left out on purpose: which cells are worth measuring. Previous: baselines.py.
Next:  transfer_tables.py.
"""
import functools
import hashlib
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from align import AXES, Moments, control_latents
from chunking import Checkpoint, Layers, Matched
from evaluate import DOMAINS
from lsmerge import Alignment, Codec, Parent, as_source, cast, combine, convex_coefficients
from merge import match, measure_task, plan_merge, training_parents
from scores import find, judge, machine, pooled, score, stacked, summary
from tiny_lm import TinyLM
from train import Schedule, train_vae

CONTROLS = ("zero", "noise", "shuffled", "carried", "neighbour")
SPLITS = ("validation", "test")     # validation chooses, test reports; a control is never chosen


# --- One cell -------------------------------------------------------------------------------------
class Cell(NamedTuple):
    """One measured model. `source` is a file's stem; `seed` None where nothing is random."""
    source: str
    align: str
    pairing: str
    lam: float
    control: str | None = None
    seed: int | None = None

    @property
    def curve(self):
        """All of it but lambda and control. The controls of any source have an empty one."""
        return self.source, self.align, self.pairing


class Encoded(Parent):
    """A Parent that keeps its latents: the grid asks for them again and again."""
    @functools.cached_property
    def z_NZ(self):
        return super().latents(0, self.N)

    def latents(self, first, last):
        return self.z_NZ[first:last]


def noise_parent(parent, generator):
    """A source without content: as many latents as its own, Gaussian with their moments."""
    twin, moments = Encoded(*parent), Moments.of(parent.z_NZ)
    twin.z_NZ = control_latents("noise", parent.z_NZ, moments, generator).float()
    return twin


def neighbours(found, source):
    """A Match whose every layer is one off: the source's next one; after the last, the one before.
    """
    last = len(Layers(source, AXES)) - 1
    return found._replace(layers=[None if i is None else i + 1 if i < last else i - 1
                                  for i in found.layers])


def matched(target, source, neighbour=False):
    """A relative in the order of the target's hidden units; neighbour: every layer one off."""
    found = match(target, source)
    return Matched(source, target, neighbours(found, source) if neighbour else found, AXES)


def encoded_tasks(target, sources, by="depth"):
    """Who meets whom among the encoded tensors, with statistics. by: how layers are paired, "depth"
    or "index"; "weights": the sources are `matched`."""
    align = "units" if by == "weights" else "mean"
    _, tasks = plan_merge(target, sources, align=align, by=by)
    models = [target, *sources]
    return [measure_task(models, task) for task in tasks if task.action == "encoded"]


def trained_codec(target, sources, config, schedule=Schedule()):
    """(Codec, its training record): one VAE trained on all models."""
    target, sources = Checkpoint(target), [Checkpoint(source) for source in sources]
    tasks = encoded_tasks(target, sources)
    vae, stages = train_vae(training_parents([target, *sources], tasks), config, schedule)
    return Codec(vae), stages


# --- The grid -------------------------------------------------------------------------------------
class Grid:
    """Merged models of any cell, and their scores. Scores are kept: nothing is measured twice."""

    def __init__(self, target, codec, documents=None, bar=None):
        self.target, self.codec = Checkpoint(target), codec
        self.documents, self.bar = documents, bar
        self.tensors = {name: self.target.read_tensor(name) for name in self.target.entries}
        self.encoded, self.scores, self.seconds = {}, {}, {}

    def pairs(self, source, pairing, neighbour=False):
        """[(number, target, source)] of the encoded tensors. Everything else stays the target's in
        every cell, equal shapes or not: what is compared are the latents alone, and a control must
        not receive the source's embeddings."""
        files, found = [self.target, Checkpoint(source)], []
        if pairing == "weights":
            files[1] = matched(*files, neighbour)
        for task in encoded_tasks(self.target, files[1:], pairing):
            mine, theirs = (Encoded(functools.partial(file.read, slot.name), slot, self.codec)
                            for file, slot in zip(files, task.slots))
            found.append((task.number, self.encoded.setdefault(task.name, mine), theirs))
        return found

    def transported(self, pairs, how, seed=0):
        """[z~ of each pair]: Algorithm 1, lines 3 and 4, or a control; seeds as in merge.py."""
        found = []
        for number, target, source in pairs:
            way = as_source(target, source, how, (seed, number, 1, 1))
            found.append(way.align(target.latents(0, target.N), 0, target.N))
        return found

    def model(self, pairs, transported, lam):
        """Lines 5 and 6: interpolate, decode, round to the stored type, place into the target."""
        tensors = dict(self.tensors)
        for (_, target, _), z_aligned_JZ in zip(pairs, transported):
            slot = target.slot
            z_parents = [target.latents(0, target.N), z_aligned_JZ]
            z_merged_JZ = combine(z_parents, convex_coefficients([lam]))
            merged_L = cast(target.codec.decode(z_merged_JZ, slot, slot.numel), slot)
            tensors[slot.name] = merged_L.reshape(slot.shape)
        return TinyLM.from_state_dict(tensors)

    def score(self, key, model, splits=SPLITS):
        """Enter the scores of a model (or of its tensors) on the splits under (key, split)."""
        began = time.perf_counter()
        for split in splits:
            self.scores[key, split] = score(model, split, self.documents)
        self.seconds[key] = time.perf_counter() - began
        if self.bar is not None:
            self.bar.update()

    def measure_base(self, any_source=None):
        """The target as it is, and (any source will do) its round trip, which is lambda = 0."""
        self.score("base", self.tensors)
        if any_source:
            pairs = self.pairs(any_source, "depth")
            own = [target.latents(0, target.N) for _, target, _ in pairs]
            self.score("round trip", self.model(pairs, own, 0.0))

    def measure_source(self, source, aligns, pairing, lambdas, name=None, control=None, seed=None):
        """All cells of one source and pairing. With `control` the file stands for a control of the
        source called `name`."""
        pairs = self.pairs(source, pairing, control == "neighbour")
        for align in aligns:
            how = Alignment("none" if align == "units" else align)      # they are matched already
            transported = self.transported(pairs, how)
            for lam in lambdas:
                cell = Cell(name or source.stem, align, pairing, lam, control, seed)
                self.score(cell, self.model(pairs, transported, lam), SPLITS[control is not None:])

    def measure_controls(self, any_source, lambdas, seeds):
        """Controls that hold nothing of any source, so that one set serves all."""
        pairs = self.pairs(any_source, "depth")
        for control in CONTROLS[:3]:
            for seed in range(seeds) if control != "zero" else [None]:
                transported = self.transported(pairs, Alignment(control=control), seed or 0)
                for lam in lambdas:
                    cell = Cell("", "", "", lam, control, seed)
                    self.score(cell, self.model(pairs, transported, lam), ("test",))

    def measure_carried(self, source, align, pairing, lambdas, seeds):
        """Noise in the place of this source, through this alignment."""
        pairs = self.pairs(source, pairing)
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            noise = [(number, target, noise_parent(theirs, generator))
                     for number, target, theirs in pairs]
            how = Alignment("none" if align == "units" else align)
            transported = self.transported(noise, how)
            for lam in lambdas:
                cell = Cell(source.stem, align, pairing, lam, "carried", seed)
                self.score(cell, self.model(pairs, transported, lam), ("test",))

    def controls(self, cell):
        """control -> test scores, all seeds, of the controls that this cell has to beat."""
        found = {}
        for key, split in self.scores:
            if (isinstance(key, Cell) and key.control and split == "test" and key.lam == cell.lam
                    and key.curve in (("", "", ""), cell.curve)):
                found.setdefault(key.control, []).append(self.scores[key, split])
        return {control: stacked(group) for control, group in found.items()}

    def choose(self, source, domains=DOMAINS):
        """The cell of a source with the lowest bits per byte on validation text; the plain average
        is no candidate."""
        cells = [key for key, split in self.scores if split == "validation"
                 and isinstance(key, Cell) and key.source == source and key.align != "weights"]
        return min(cells, key=lambda cell: pooled(self.scores[cell, "validation"], domains)[0])


# --- Records --------------------------------------------------------------------------------------
def facts_of(codec, stages, files):
    """What the numbers depend on. File names only: a path means nothing elsewhere."""
    digests = {Path(f).name: hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files}
    return {"chunk": codec.C, "latent": codec.Z, "blocks": codec.vae.config.blocks,
            "codec_nmse": stages[-1]["nmse"], "sha256": digests, **machine()}


def record(grid, key, facts, domains=DOMAINS):
    """One measured model as a JSON-able record, with its differences, errors and verdict."""
    plain = isinstance(key, str)                            # "base" or "round trip"
    cell = Cell("", "", "", 0.0) if plain else key
    base, scores = grid.scores["base", "test"], grid.scores[key, "test"]
    # The plain average mixes more than the latents do: the controls do not apply to it.
    held = {} if plain or cell.control or cell.align == "weights" else grid.controls(cell)
    differences, beats, said = judge(scores, base, held, domains)
    return {"row": key if plain else cell.control or "cell", **cell._asdict(),
            "scored": list(domains),
            **{split: summary(grid.scores[key, split], domains)
               for split in SPLITS if (key, split) in grid.scores},
            "difference": {name: d.record() for name, d in differences.items()},
            "beats_controls": beats if held else None, "verdict": said if held else None,
            "seconds": round(grid.seconds[key], 2), "documents": base[DOMAINS[0]].shape[1], **facts}


def records(grid, facts, domains=DOMAINS):
    """One record per measured model."""
    return [record(grid, key, facts, domains) for key in grid.seconds]


# --- Printed rows ---------------------------------------------------------------------------------
HEAD = (f"{'':<46}{'pooled':>8}" + "".join(f"{domain:>11}" for domain in DOMAINS) + " |"
        + "".join(f"{other:>15}" for other in ("base", *CONTROLS)) + " | beats every control")
YES = {True: "yes", False: "no", None: ""}


def row_text(name, row, note=None):
    """Bits per byte on test text, then the paired differences (± standard error) to the base and to
    each control."""
    cells = []
    for other in ("base", *CONTROLS):
        d = row["difference"].get(other)
        cells.append(f"{d['mean']:+.3f}±{d['se']:.4f}" if d else "")
    return (f"{name:<46}{row['test']['pooled']:>8.4f}"
            + "".join(f"{row['test'][domain]:>11.4f}" for domain in DOMAINS) + " |"
            + "".join(f"{cell:>15}" for cell in cells)
            + f" | {YES[row['beats_controls']] if note is None else note}")


def mean_control(rows, control, lam, curve=("", "", "")):
    """One printable row for all seeds of a control: means, and the spread over seeds."""
    source, align, pairing = curve
    group = find(rows, control=control, lam=lam, source=source, align=align, pairing=pairing)
    tests, to_base = [r["test"] for r in group], [r["difference"]["base"] for r in group]
    spread = np.std([test["pooled"] for test in tests], ddof=1) if len(group) > 1 else None
    return {"test": mean_of(tests), "beats_controls": None,
            "difference": {"base": mean_of(to_base)},
            "seeds": "" if spread is None else f"{len(group)} seeds, sd {spread:.4f}"}


def mean_of(records):
    """The mean of each number of equal records."""
    return {key: float(np.mean([record[key] for record in records])) for key in records[0]}
