"""A grid of merged models: one target, one codec; many sources, alignments, lambdas,
controls.

In:    the target's file, sources of any shape, a codec.
Out:   per cell the scores of the merged model; rows with paired differences and their
       errors.
Paper: Algorithm 1, lines 2 to 6, with the calls of merge.py; but a tensor is encoded
       once per source, aligned once per (source, pairing, alignment) and decoded once
       per lambda.
ours:  every cell is held against *zero* (shrinkage towards the mean latent), *noise*
       and *shuffled* (no content of the source at all). Sinkhorn needs a fourth
       control, *carried*: Gaussian noise in the place of the source, sent through the
       same transport. The plan pairs each slot of the target with whatever resembles
       it, so that what comes out resembles the target, whatever went in; the first
       three enter after the transport and miss that. Where hidden units are matched by
       weights (tools/match.py), *carried* is noise in the source's place, and
       *neighbour* the same match with every layer of the source one off.
Left out on purpose: which cells are worth measuring. Previous: baselines.py.
Next:  transfer_tables.py.
"""
import hashlib
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import match
from align import Moments, control_latents, pair_names, partners_by_depth
from chunking import Checkpoint, cast, create, is_selected, measure
from evaluate import DOMAINS
from lsmerge import Alignment, Parent, as_source, convex_coefficients, share_statistics
from records import machine
from scores import difference, score, stacked, summary
from tiny_lm import TinyLM

ANYWHERE = ("zero", "noise", "shuffled")    # controls that hold nothing of any source
# validation chooses, test reports; no control is chosen
SPLITS = ("validation", "test")


# --- A relative in the target's order -------------------------------------------------
def neighbours(layers, numbers):
    """Every layer one off: the source's next one; after its last, the one before.

    layers:   {number of a target layer: of its source layer, or None}
    numbers:  of the source's layers
    Example:  {0: 0, 1: None, 2: 4} of 5 layers -> {0: 1, 1: None, 2: 3}
    """
    beside = dict(zip(numbers, [*numbers[1:], numbers[-2]]))
    return {mine: beside.get(theirs) for mine, theirs in layers.items()}


def write_in_order(path, target, source, neighbour=False, like=None):
    """A relative of another shape, in the order of the target's hidden units, as
    tools/match.py writes it. neighbour: the same order of units, but every layer one
    off.  like: the model whose match serves (the source's base); the source itself."""
    target = Checkpoint(target)
    matched = match.open_layers(target, Checkpoint(like or source))
    brought = match.open_layers(target, Checkpoint(source))
    kinship = match.find_kinship(*matched)
    units = match.match_units(*matched, kinship)
    if neighbour:
        beside = neighbours(kinship.layers, list(matched[1].numbers))
        kinship = kinship._replace(layers=beside)
    orders, _ = match.plan_tensors(*brought, kinship, units)
    with create(path, target.entries.values()) as output:
        match.write_matched(output, target, brought[1].checkpoint, orders)
    return path


# --- One cell -------------------------------------------------------------------------
class Cell(NamedTuple):
    """One measured model. `source` is a file's stem; `seed` None where nothing is
    random."""
    source: str = ""
    align: str = ""             # of align.ALIGNERS; "units": matched by weights before
    pairing: str = ""           # of layers: "depth", "index"; "weights": matched before
    lam: float = 0.0
    control: str | None = None
    seed: int | None = None

    @property
    def curve(self):
        """All of it but lambda and control. The controls of any source have an empty
        one."""
        return self.source, self.align, self.pairing


@dataclass(frozen=True)
class Encoded(Parent):
    """A Parent that keeps its latents: the grid asks for them again and again."""
    z_NZ: torch.Tensor = None

    @classmethod
    def of(cls, parent):
        return cls(**vars(parent), z_NZ=parent.latents(0, parent.N))

    def latents(self, first, last):
        return self.z_NZ[first:last]


def noise_parent(parent, generator):
    """A source without content: as many latents as its own, Gaussian with their
    moments."""
    z_NZ = control_latents("noise", parent.z_NZ, Moments.of(parent.z_NZ), generator)
    return replace(parent, z_NZ=z_NZ.float())


class Pair(NamedTuple):
    """Two encoded tensors that meet."""
    number: int         # of the target's tensor: part of every seed, as in merge.py
    target: Encoded
    source: Encoded


def encoded_pairs(target, source, codec, by="depth"):
    """[Pair] of two checkpoints. by: how unequal numbers of layers meet, "depth" or
    "index"."""
    places = []
    for model in (target, source):
        chosen = filter(is_selected, model.entries.values())
        places.append({entry.name: entry.place for entry in chosen})
    names = pair_names(*places, partial(partners_by_depth, by=by))
    pairs = []
    for number, name in enumerate(target.entries):
        if name in names:
            parents = []
            for model, own in ((target, name), (source, names[name])):
                read = partial(model.read, own)
                parents.append(Parent(read, measure(model, own), codec))
            pairs.append(Pair(number, *map(Encoded.of, share_statistics(parents))))
    return pairs


# --- The grid -------------------------------------------------------------------------
class Grid:
    """Merged models of any cell, and their scores. Everything but the encoded tensors
    stays the target's in every cell, equal shapes or not: what is compared are the
    latents alone, and a control must not receive the source's embeddings."""

    def __init__(self, target, codec, documents=None, bar=None):
        self.target = Checkpoint(target)
        self.codec = codec
        self.documents = documents
        self.bar = bar
        self.tensors = {name: self.target.read_tensor(name)
                        for name in self.target.entries}
        self.scores = {}        # (Cell or a name, split) -> scores
        self.seconds = {}       # Cell or a name -> of scoring

    def pairs(self, source, pairing="depth"):
        by = "index" if pairing == "index" else "depth"
        return encoded_pairs(self.target, Checkpoint(source), self.codec, by)

    def transported(self, pairs, alignment, seed=0):
        """[z~ of each pair]: Algorithm 1, lines 3 and 4, or a control; seeds as in
        merge.py."""
        found = []
        for pair in pairs:
            key = (seed, pair.number, 1, 1)
            source = as_source(pair.target, pair.source, alignment, key)
            z_target_JZ = pair.target.z_NZ
            found.append(source.align(z_target_JZ, 0, len(z_target_JZ)))
        return found

    def model(self, pairs, transported, lam):
        """Lines 5 and 6: interpolate, decode, round to the stored type, place into the
        target."""
        tensors = dict(self.tensors)
        own, given = convex_coefficients([lam])
        for pair, z_aligned_JZ in zip(pairs, transported):
            stats = pair.target.stats
            z_merged_JZ = own * pair.target.z_NZ + given * z_aligned_JZ
            merged_L = self.codec.decode(z_merged_JZ, stats, stats.numel)
            tensors[stats.name] = cast(merged_L, stats).reshape(stats.shape)
        return TinyLM.from_state_dict(tensors)

    def score(self, key, model, splits=SPLITS):
        """Enter the scores of a model (or of its tensors) on the splits under (key,
        split)."""
        began = time.perf_counter()
        for split in splits:
            self.scores[key, split] = score(model, split, self.documents)
        self.seconds[key] = time.perf_counter() - began
        if self.bar is not None:
            self.bar.update()

    def measure_base(self, any_source):
        """The target as it is, and (any source will do) its round trip, which is lambda
        = 0."""
        self.score("base", self.tensors)
        pairs = self.pairs(any_source)
        own = [pair.target.z_NZ for pair in pairs]
        self.score("round trip", self.model(pairs, own, 0.0))

    def measure_cells(self, cell, pairs, alignment, lambdas, seed=0):
        """The cells of all lambdas, else equal to `cell`."""
        transported = self.transported(pairs, alignment, seed)
        splits = ("test",) if cell.control else SPLITS
        for lam in lambdas:
            self.score(cell._replace(lam=lam), self.model(pairs, transported, lam),
                       splits)

    def measure_source(self, file, name, aligns, pairing, lambdas, control=None):
        """All cells of one source and pairing. A relative's file is in the target's
        order."""
        pairs = self.pairs(file, pairing)
        for align in aligns:
            cell = Cell(name, align, pairing, control=control)
            self.measure_cells(cell, pairs, alignment_of(align), lambdas)

    def measure_carried(self, file, name, align, pairing, lambdas, seeds):
        """Noise in the place of this source, through this alignment."""
        pairs = self.pairs(file, pairing)
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            noise = []
            for pair in pairs:
                noise.append(pair._replace(source=noise_parent(pair.source, generator)))
            cell = Cell(name, align, pairing, control="carried", seed=seed)
            self.measure_cells(cell, noise, alignment_of(align), lambdas)

    def measure_controls(self, any_source, lambdas, seeds):
        """Controls that hold nothing of any source, so that one set serves all."""
        pairs = self.pairs(any_source)
        for control in ANYWHERE:
            for seed in range(1 if control == "zero" else seeds):
                cell = Cell(control=control, seed=None if control == "zero" else seed)
                self.measure_cells(cell, pairs, Alignment(control=control), lambdas,
                                   seed)

    def controls(self, cell):
        """control -> test scores, all seeds, of the controls that this cell has to
        beat."""
        found = {}
        for key, split in self.scores:
            if isinstance(key, Cell) and key.control and split == "test":
                if key.lam == cell.lam and key.curve in (Cell().curve, cell.curve):
                    found.setdefault(key.control, []).append(self.scores[key, split])
        return {control: stacked(group) for control, group in found.items()}

    def rows(self, facts):
        """A row per measured model: what names it, its scores, its differences to the
        target and to its controls, and the facts."""
        rows = []
        base = self.scores["base", "test"]
        for key, seconds in self.seconds.items():
            cell = key if isinstance(key, Cell) else Cell()
            held = {"base": base}
            # The plain average mixes more than the latents do: controls do not apply to
            # it.
            if isinstance(key, Cell) and not cell.control and cell.align != "weights":
                held |= self.controls(cell)
            row = {"row": key} | cell._asdict()
            if isinstance(key, Cell):
                row["row"] = cell.control or "cell"
            for split in SPLITS:
                if (key, split) in self.scores:
                    row[split] = summary(self.scores[key, split])
            row["difference"] = {}
            for name, other in held.items():
                row["difference"][name] = difference(self.scores[key, "test"],
                                                     other).record()
            row["seconds"] = round(seconds, 2)
            row["documents"] = base[DOMAINS[0]].shape[1]
            rows.append(row | facts)
        return rows


def alignment_of(align):
    """Units are matched in the file already."""
    return Alignment("none" if align == "units" else align)


def facts_of(codec, files):
    """What the numbers depend on. File names only: a path means nothing elsewhere."""
    digests = {}
    for file in files:
        digests[Path(file).name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return {"chunk": codec.C, "latent": codec.Z, "blocks": codec.vae.config.blocks,
            "sha256": digests, **machine()}
