"""merge.py: merge checkpoints in latent space.                            (read last)

    python merge.py TARGET [SOURCE ...] [options]
    python merge.py a.safetensors b.safetensors

TARGET gives names, shapes, dtypes and companions of the result; alone, it is merged
with itself. A model is a .safetensors file, a Hugging Face folder, or an index of
shards.

The run, straight down (`main` and `merge`): open the models; plan who meets whom
(Algorithm 1, line 1); take each tensor's statistics; get a codec, and check that it can
carry these weights; merge tensor by tensor; report. What happens to a tensor:

    encoded     attention and MLP: merged in latent space, by lsmerge.ls_merge
    averaged    norms, biases, embeddings: the same operator on the weights themselves
    copied      the target's own: whole numbers, what met nobody, what is not merged
"""
if __name__ == "__main__":      # Ctrl-C during the imports: end without a traceback
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import argparse
import contextlib
import glob
import hashlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from os.path import abspath, basename, dirname, isfile, join, normpath, realpath, relpath

import numpy as np
import torch
from tqdm import tqdm

import align as ot
import lsmerge as ls
from chunking import (STOP, Checkpoint, Entry, Output, appear, check_output, command,
                      create, is_selected, measure, need, say, spans, write_tensors)
from train import (MAX_NMSE, Schedule, describe_stage, gather, pick_device,
                   rank_and_size, save_vae, start_parser, train_vae)
from vae import VAEConfig

VERSION = "3.0"
REFERENCE = join(dirname(abspath(__file__)), "experiments/models/vae.safetensors")
SAMPLES = 8             # draws of a self-merge: their noise shrinks by sqrt(8)
RELATED = 0.1           # cosine of weights: trained apart 0.00, experts of one base 0.9
GLANCE = 1 << 12        # weights of a tensor for that cosine, then right to 0.02
FAR = 0.8               # distance of two parents over the target's norm; strangers: 1.4
SHARE = 1 << 12         # source weights for each of the target's, at most: a piece
GATE_WEIGHTS = 1 << 16  # of a tensor, in windows evenly spread: the gate takes seconds
MATCH = "if they are relatives, run python experiments/tools/match.py first"
HARM = ("Merging unrelated models does harm: +0.09 bits per byte and more in our "
        "measurements (experiments/RESULTS.md, Table 5)")


# --- The plan: who meets whom (paper: Algorithm 1, line 1) ----------------------------
@dataclass
class Task:
    """A tensor of the target, and what happens to it.

    parents: {0: its entry in the target, k: that of its partner in the k-th source}; with
    their statistics, once they are measured. In a task arithmetic the base stands last.
    """
    entry: Entry
    number: int                 # its position in the target: part of every seed
    parents: dict
    action: str = "averaged"    # or "encoded", or "copied"
    why: str = ""               # it is copied
    tied: tuple = ()            # names of tensors that the target holds equal to this one

    def copy(self, why):
        """The tensor stays the target's own."""
        self.action = "copied"
        self.why = why
        self.parents = {0: self.entry}


def mean_cosine(target, source, pairs):
    """The mean cosine of two models' weights: 0.00 for models trained apart, 0.9 for
    experts of one base. The first weights of each tensor are enough to tell.

    Args:     pairs: (target name, source name); only encoded pairs of one shape count
    Returns:  NaN, which is neither small nor large, if there is nothing to compare
    """
    cosines = []
    for mine, theirs in pairs:
        entry = target.entries[mine]
        if is_selected(entry) and entry.shape == source.entries[theirs].shape:
            mine_L = target.read(mine, 0, GLANCE).double()
            theirs_L = source.read(theirs, 0, GLANCE).double()
            # Zero has no direction: 0 / 0 is NaN, which the mean leaves out.
            cosines.append(mine_L.dot(theirs_L) / (mine_L.norm() * theirs_L.norm()))
    return torch.tensor(cosines).nanmean().item()


def layer_partners(target, source, mine, theirs):
    """{target layer: source layer} of two stacks, as align.pair_names asks for them.

    By depth, which for equal numbers of layers is by index. But if nearly all layers of
    the same number are alike, one model only has layers of its own (for multi-token
    prediction, or of a draft model): then by index too, and those layers meet nobody.
    Example:  62 layers and 61, of which 61 are alike: the 62nd stays the target's
    """
    common = mine.keys() & theirs.keys()
    alike = 0
    for layer in common:
        pairs = ot.pair_within_layer(mine[layer], theirs[layer])
        alike += mean_cosine(target, source, pairs.items()) > RELATED
    if len(mine) != len(theirs) and alike >= 0.9 * len(common) > 0:
        return {layer: layer for layer in common}
    return ot.partners_by_depth(mine, theirs)


def float_places(model):
    """{name: Place} of all that can be merged: whole numbers meet nobody."""
    return {name: e.place for name, e in model.entries.items() if e.is_float}


def plan_tasks(models, a):
    """(kind, [Task, ...]) in the target's order: the one table of who meets whom.

    kind: "self"; "same-shape"; "cross-shape" if an encoded pair differs in shape. What
    one model alone has (a score head, a mask, a larger vocabulary) does not make it so.
    """
    target, *sources = models
    tasks = []
    for number, entry in enumerate(target.entries.values()):
        tasks.append(Task(entry, number, {0: entry}))
    for k, source in enumerate(sources, 1):
        pairs = ot.pair_names(float_places(target), float_places(source),
                              partial(layer_partners, target, source))
        for task in tasks:
            if task.entry.name in pairs:
                task.parents[k] = source.entries[pairs[task.entry.name]]
    kind = "self"
    if sources:
        kind = "same-shape"
    for task in tasks:
        met = task.parents
        shape = task.entry.shape
        alike = {k: entry for k, entry in met.items() if entry.shape == shape}
        if is_selected(task.entry, a.select):
            task.action = "encoded"
            if alike != met:
                check_shapes(models, task, a)
                kind = "cross-shape"
        else:
            task.parents = alike
        if not task.entry.is_float:
            task.copy("whole numbers")
        elif sources and len(met) == 1:
            task.copy("met nobody")
        elif sources and len(task.parents) == 1:
            task.copy("met another shape")
        elif a.base and len(task.parents) < len(models):
            task.copy("not in every model")
    # Norms and embeddings are averaged in a plain merge of one shape only.
    aligned = a.control or a.align not in ("auto", "none")
    for task in tasks:
        if task.action == "averaged" and (kind != "same-shape" or aligned or a.select):
            task.copy("not encoded")
    tie(target, tasks)
    return kind, tasks


def check_shapes(models, task, a):
    """Refuse an encoded tensor that meets another shape, if the operator needs equal
    ones, or if a chunk of it would meet more of a source than a piece holds."""
    entry = task.entry
    strict = a.space == "weight" or a.operator in ("slerp", "task-arithmetic")
    for k, other in task.parents.items():
        need(not strict or other.shape == entry.shape, models[0].path,
             f"{list(entry.shape)} meets {other.name!r} {list(other.shape)} of "
             f"{models[k].path}", f"use lerp in latent space; or, {MATCH}", entry.name)
        need(other.numel <= SHARE * entry.numel, models[k].path, "is over "
             f"{SHARE} times as large as its partner", "narrow --select", other.name)


def digest(model, entry):
    """A fingerprint of a tensor: equal for tensors that are equal, bit for bit."""
    found = hashlib.sha256(f"{entry.dtype} {entry.shape}".encode())
    for start, stop in spans(entry.numel):
        found.update(model.read(entry.name, start, stop).view(torch.uint8).numpy())
    return found.digest()


def tie(target, tasks):
    """A matrix outside the layers that the target holds twice (an embedding and its
    redundant head) is merged once: the other is a copy of the result, so that both stay
    equal. What is merged leads what is copied, the embedding its head."""
    outside = []
    for task in tasks:
        if task.entry.place.layer is None and len(task.entry.shape) > 1:
            outside.append(task)
    outside.sort(key=lambda task: (task.why, task.entry.place.role != "embed"))
    leaders = {}
    for task in outside:
        leader = leaders.setdefault(digest(target, task.entry), task)
        if leader is not task and leader.action != "copied":
            leader.tied += (task.entry.name,)
            task.copy("tied to another")


# --- The run: what the command line and the files have decided ------------------------
@dataclass
class Run:
    a: argparse.Namespace   # the command line
    models: list            # the target first; the base of a task arithmetic last
    codecs: list            # the target's, and that of sources of other shapes; or none
    kind: str
    tasks: list
    lam: list               # one per source proper

    def coefficients(self, task):
        """The parents' c_k; a source without a partner leaves its share to the target."""
        if self.a.base and len(task.parents) > 1:
            return ls.task_coefficients(self.lam)
        return ls.convex_coefficients([self.lam[k - 1] for k in task.parents if k > 0])

    def slerp(self, vectors, steps):
        """slerp's two coefficients: the angle is that between whole vectors."""
        pieces = ([vector(*step) for vector in vectors] for step in steps)
        return ls.slerp_coefficients(self.lam[0], *ls.inner(pieces))

    def parents(self, task):
        """The tensor's Parents. Noise is seeded by run, tensor and parent."""
        parents = []
        for k, stats in task.parents.items():
            read = partial(self.models[k].read, stats.name)
            codec = self.codecs[stats.shape != task.entry.shape]
            seed = (self.a.seed, task.number, k)
            parents.append(ls.Parent(read, stats, codec, self.a.samples, seed))
        return ls.share_statistics(parents)


def plan_run(a, models, codecs):
    """(Run, warnings). What can be refused without reading all weights is refused here.
    """
    kind, tasks = plan_tasks(models, a)
    n = len(models) - 1 - bool(a.base)          # sources proper
    share = 1 / (n + 1)
    warnings = []
    if kind == "cross-shape":
        warnings.append(f"shapes differ. {HARM}; {MATCH}")
        if a.operator == "lerp":
            share = 0.1 / n                     # paper: best from 0.05 to 0.2
    else:
        need(not a.source_vae, a.source_vae, "is not needed: equal shapes share one VAE",
             "drop --source-vae")
    for k, model in enumerate(models[1:], 1):
        pairs = defaultdict(list)               # of each role
        for task in tasks:
            if task.action == "encoded" and k in task.parents:
                names = (task.entry.name, task.parents[k].name)
                pairs[task.entry.place.role].append(names)
        apart = [role for role in pairs
                 if mean_cosine(models[0], model, pairs[role]) < RELATED]
        if apart:
            warnings.append(f"{model.path} and the target are strangers in "
                            f"{', '.join(apart)}. {HARM}; {MATCH}")
    return Run(a, models, codecs, kind, tasks, a.lam or [share] * n), warnings


def parallel_map(work, run, label):
    """[work(task) for every task]. Split over the processes of a torchrun; in each one
    thread per core, with a tensor of its own, the largest first: reading, computing and
    writing overlap. One thread for a tensor: so the bytes do not depend on the number."""
    rank, size = rank_and_size()
    order = sorted(run.tasks, key=lambda task: -task.entry.numel)[rank::size]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(min(threads, 16))     # each holds a piece of every parent
    bar = tqdm(total=sum(task.entry.numel for task in order), desc=label, leave=False,
               unit=" weights", unit_scale=True, disable=run.a.quiet or None)
    found = {}
    try:
        for task, result in zip(order, pool.map(work, order)):
            found[task.number] = result
            bar.update(task.entry.numel)
    except BaseException:
        STOP.set()                                  # threads that read notice it
        gather(None)                                # and so do the other processes
        raise
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)          # waits for those that run
        torch.set_num_threads(threads)
        STOP.clear()
    for part in gather(found):
        if part is None:
            raise SystemExit(1)                     # that process has said why
        found.update(part)
    return [found[task.number] for task in run.tasks]


def measure_task(models, task):
    """The task with the statistics of its parents. All that enters the result is read
    here, so that NaN and Inf are refused before any work. What is only copied may hold
    them, as may a mask of -inf that is equal in all models."""
    if task.action == "averaged":
        found = {digest(models[k], entry) for k, entry in task.parents.items()}
        if len(found) == 1:
            task.copy("equal in all")
    if task.action == "copied":
        return task
    for k, entry in task.parents.items():
        task.parents[k] = measure(models[k], entry.name)
    parents = task.parents.values()
    if task.action == "encoded" and task.parents[0].constant:
        if any(stats.shape != task.entry.shape for stats in parents):
            task.copy("constant")
        elif all(stats.constant for stats in parents):
            task.action = "averaged"                # there is no pattern for a codec
    return task


# --- The codec, and whether it can carry these weights --------------------------------
def load_codecs(a):
    """[the target's Codec, that of sources of other shapes], before anything else: a
    wrong file is noticed at once."""
    if not a.vae:
        return []                               # none, or it is trained here
    device = pick_device(a.device)
    dtype = getattr(torch, a.dtype)
    return [ls.Codec.load(path, device, dtype) for path in (a.vae, a.source_vae or a.vae)]


def train_codec(run):
    """--init random: the paper's VAE, trained on the encoded tensors of all inputs."""
    a = run.a
    stats = [{} for _ in run.models]    # by name: a source's tensor may meet two
    for task in run.tasks:
        if task.action == "encoded":
            for k, each in task.parents.items():
                stats[k][each.name] = each
    parents = [(model, [*found.values()]) for model, found in zip(run.models, stats)]
    need(any(stats), run.models[0].path, "has no tensor to train a VAE on",
         "change --select, or pass --vae")
    device = pick_device(a.device)
    schedule = Schedule(seed=a.seed, device=device, dtype=a.dtype, quiet=a.quiet)
    vae, stages = train_vae(parents, VAEConfig(), schedule)
    say(*map(describe_stage, stages))
    if stages[-1]["ended"] == "interrupted":        # no merge with half a codec
        raise KeyboardInterrupt
    if a.save_vae and rank_and_size()[0] == 0:
        save_vae(a.save_vae, vae, stages, a.force, trained_on=names_of(run))
    return [ls.Codec(vae, device, getattr(torch, a.dtype))] * 2


def round_trip(run, task):
    """[(NMSE, typical error, weights, name) of each parent], of D(E(w)) on GATE_WEIGHTS
    of an encoded tensor, in the unit that it is encoded in.

    NMSE is the mean squared error over the variance. It weighs variance, not weights:
    beside one outlier all others may be lost. So also the typical error, the median
    squared error over the median square; of these the largest of all parents.
    """
    if task.action != "encoded" or not run.codecs:
        return []
    errors = []
    squares = []
    parents = run.parents(task)
    for parent in parents:
        stats = parent.stats
        width = parent.codec.C * parent.codec.T
        step = width * max(1, stats.numel // GATE_WEIGHTS)
        starts = range(0, stats.numel, step)
        flat_L = torch.cat([parent.read(start, start + width) for start in starts])
        z_NZ = parent.codec.encode(flat_L, stats)
        decoded_L = parent.codec.decode(z_NZ, stats, len(flat_L)).cpu().double()
        flat_L = flat_L.double()
        errors.append(((decoded_L - flat_L) / stats.scale).square())
        unit_L = (flat_L - stats.mean) / stats.scale
        squares.append(unit_L[unit_L != 0].square().median())       # 0: pruned weights
    found = []
    for parent, error in zip(parents, errors):
        typical = error.median() / max(squares)
        found.append((error.mean().item(), typical.item(), parent.stats.numel,
                      parent.stats.name))
    return found


def check_codec(run):
    """(gates, round trip of the target) for the report. A codec that loses more of a
    parent than the bound is refused before anything is merged: on average over all
    encoded weights, or of the typical weight of any tensor. With --residual what is lost
    of an unaligned parent comes back: no gate."""
    found = [[] for _ in run.models]
    for task, rows in zip(run.tasks, parallel_map(partial(round_trip, run), run, "check")):
        for k, row in zip(task.parents, rows):
            found[k].append(row)
    trip = {"nmse": None, "worst": {"name": None, "nmse": None}}
    gates = []
    for k, model in enumerate(run.models):
        if not found[k]:
            continue
        errors, typicals, weights, names = zip(*found[k])
        nmse = float(np.average(errors, weights=weights))
        worst, worst_name = max(zip(errors, names))
        typical, typical_name = max(zip(typicals, names))
        if k == 0:
            trip = {"nmse": nmse, "worst": {"name": worst_name, "nmse": worst}}
        if run.a.residual and (k == 0 or run.kind == "same-shape"):
            continue
        bound = run.a.max_nmse
        for what, value, tensor in (("NMSE", nmse, worst_name),
                                    ("typical error", typical, typical_name)):
            need(value <= bound, model.path, f"the codec would lose too much ({what} "
                 f"{value:.2g} > {bound:g}); nothing was merged", "--residual, --vae "
                 "exact, or a VAE trained for longer or at a lower ratio", tensor)
            gates.append({"name": f"{what}, {names_of(run)[k]}", "passed": True,
                          "value": value, "bound": bound})
    return gates, trip


# --- The merge ------------------------------------------------------------------------
def merge_tensor(run, output, task):
    """Merge one tensor into the output. Returns (squared distances, records of
    transports).

    In all an encoded tensor is read four times: for its statistics, by the gate, to be
    encoded, and for the distances; six times for slerp and with --residual."""
    if task.why == "tied to another":
        return {}, []                       # written with that one
    entry = task.entry
    readers = [partial(run.models[k].read, each.name) for k, each in task.parents.items()]
    encoded = task.action == "encoded"
    slerp = encoded and run.a.operator == "slerp"
    plain = run.coefficients(task)          # c_k of raw weights
    if slerp:
        plain = run.slerp(readers, spans(entry.numel))
    sources = []
    # Where only the target is left, and what the codec loses comes back, it is the target.
    nothing_lost = run.a.residual and not any(plain[1:])
    if not encoded or not run.codecs or nothing_lost:
        merged = ls.weight_merge(readers, plain, entry)
    else:
        parents = run.parents(task)
        target = parents[0]
        coefficients = plain
        if slerp:
            latents = [parent.latents for parent in parents]
            coefficients = run.slerp(latents, spans(target.N, target.per_piece))
        alignment = ls.Alignment(run.a.align, run.a.control, run.a.epsilon)
        for parent in parents[1:]:
            noise = (*parent.seed, 1)       # of a control, none of the posterior's
            sources.append(ls.as_source(target, parent, alignment, noise))
        merged = ls.ls_merge(target, sources, coefficients, run.a.residual)

    squares = Counter()
    for start, piece_L in merged:
        piece_L = piece_L.cpu()
        for name in (entry.name, *task.tied):
            output.put(name, start, piece_L)
        if encoded:
            squares.update(distances(run, task, readers, plain, start, piece_L))
    transports = [each for each in sources if isinstance(each, ls.Transport)]
    return squares, [transport.report() for transport in transports]


def distances(run, task, readers, coefficients, start, piece_L):
    """Squared distances of a merged piece, by number, to its parents; by name:
    norm     of the target to zero
    average  to what --space weight gives
    plain    of that to the target: the difference that was to be merged
    In float64, as squares of weights may leave float32. Across shapes there is no
    distance but to the target."""
    def square(one_L, other_L):
        return (one_L.double() - other_L.double()).square().sum().item()

    if run.kind == "cross-shape":
        readers = readers[:1]
    raw = [read(start, start + len(piece_L)) for read in readers]
    squares = {k: square(piece_L, raw_L) for k, raw_L in zip(task.parents, raw)}
    squares["norm"] = square(raw[0], torch.zeros(1))
    if run.kind == "same-shape":
        average_L = ls.combine(raw, coefficients, task.entry)
        squares["average"] = square(piece_L, average_L)
        squares["plain"] = square(raw[0], average_L)
    return squares


# --- The report -----------------------------------------------------------------------
def names_of(run):
    """The models' names, without folders: paths mean nothing elsewhere."""
    return [basename(normpath(model.path)) for model in run.models]


def facts_of(run):
    """How the result was made, for its header, its card, the report and the screen. No
    time, no path: equal runs give equal bytes."""
    a = run.a
    codec = basename(normpath(a.vae or "trained here"))
    if a.space == "weight":
        codec = "none"
    ratio = None
    if run.codecs:
        ratio = run.codecs[0].vae.config.true_ratio
    align = a.align
    if align == "auto":
        align = "none"
        if run.kind == "cross-shape":
            align = "gaussian"
    entries = run.models[0].entries.values()
    tensors = Counter(encoded=0, averaged=0, copied=0, total=len(run.tasks))
    for task in run.tasks:
        tensors[task.action] += 1
        tensors["weights_total"] += task.entry.numel
        tensors["weights_encoded"] += task.entry.numel * (task.action == "encoded")
    return {"version": VERSION, "kind": run.kind, "operator": a.operator,
            "space": a.space, "lambda": run.lam, "codec": codec, "ratio": ratio,
            "align": align, "control": a.control, "samples": a.samples, "seed": a.seed,
            "residual": a.residual, "select": a.select, "tensors": dict(tensors),
            "bytes": sum(e.numel * e.dtype.itemsize for e in entries)}


def make_report(run, gates, trip, results, seconds):
    """The JSON report. Distances are Frobenius norms over the encoded tensors, over the
    target's; null where undefined."""
    squares = Counter()
    records = []
    for part, transports in results:
        squares.update(part)            # adds up
        records += transports
    far = {}
    for key, value in squares.items():
        if 0 < squares["norm"] < math.inf:
            far[key] = math.sqrt(value / squares["norm"])
    return facts_of(run) | {
        "inputs": names_of(run), "output": basename(normpath(run.a.output)),
        "roundtrip": trip, "gates": gates, "seconds": seconds,
        "distance": {
            "to_target": far.get(0), "to_average": far.get("average"),
            "average_to_target": far.get("plain"),
            "to_source": [far.get(k) for k in range(1, len(run.lam) + 1)]},
        "alignment": records,
        "unpaired": [task.entry.name for task in run.tasks if task.why == "met nobody"]}


def model_card(run):
    """README.md of a result folder, in the Hub's format."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts_of(run).items())
    return ("---\ntags:\n- merge\n- lsmerge\n---\n\nMerged with LS-Merge: "
            f"{', '.join(names_of(run))}\n\n| | |\n|---|---|\n{rows}\n")


def show(template, facts):
    """Print facts of the report, their numbers to two digits."""
    def short(digits):
        return float(f"{float(digits):.2g}")
    say(template.format_map(json.loads(json.dumps(facts), parse_float=short)))


def print_plan(run):
    """What is done, for people; then why tensors are copied."""
    show("{kind}: {operator} in {space} space, lambda {lambda}, align {align}, "
         "codec {codec}\n{tensors[encoded]} in {space} space + {tensors[averaged]} "
         "averaged + {tensors[copied]} copied = {tensors[total]} tensors, "
         "{bytes:,} bytes", facts_of(run))
    for why, number in Counter(task.why for task in run.tasks if task.why).items():
        say(f"  copied, {why}: {number}")


def print_pairs(run):
    """--dry-run: who meets whom, by the names in the files; then what is copied."""
    for task in sorted(run.tasks, key=lambda task: task.action == "copied"):
        met = [f"{run.models[k].path}: {e.name}" for k, e in task.parents.items() if k > 0]
        say(f"  {task.action} {task.entry.name} <- "
            f"{task.why or ', '.join(met) or 'itself'}")


def print_report(report):
    """For people: how far the result went."""
    if report["roundtrip"]["nmse"] is not None:
        show("round trip of the target: NMSE {roundtrip[nmse]}, its worst tensor "
             "{roundtrip[worst][nmse]}", report)
    show("distance, over the target's norm: {distance[to_target]} to the target, "
         "{distance[to_source]} to the sources, {distance[to_average]} to the same "
         "operator on weights\nseconds: read {seconds[read]}, codec {seconds[codec]}, "
         "merge {seconds[merge]}", report)


def late_warnings(report, run):
    """What only the result shows: parents too far apart, a codec too coarse."""
    far = report["distance"]
    warnings = []
    if run.a.control or not any(run.lam) or far["average_to_target"] is None:
        return warnings                         # there is nothing to compare with
    for k, rest in enumerate(far["to_source"], 1):
        way = far["to_target"] + (rest or 0.0)
        if way > FAR:
            warnings.append(f"source {k} is {way:.2f} of the target's norm away. {HARM}")
    if 0 < far["average_to_target"] < far["to_average"] and run.a.vae != "exact":
        warnings.append("the codec's error exceeds the difference that was merged: add "
                        "--residual, or --vae exact")
    return warnings


# --- The command line -----------------------------------------------------------------
def parse(argv):
    """The arguments: `models` with the base at its end, `lam` a list of numbers or None
    where the plan decides."""
    parser = start_parser("merge.py", "Merge checkpoints in latent space.")
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="TARGET, then sources: .safetensors "
        "files, folders or indexes. TARGET alone is merged with itself")
    add("-o", "--output", help="the result (merged.safetensors; of a folder merged/)")
    add("--lam", "--lambda", type=numbers, metavar="L[,L...]", help="weight of each source, "
        "0 to 1; 0: the target's round trip (1/(N+1) each of N; across shapes 0.1 in all)")
    add("--operator", choices=("lerp", "slerp", "soup", "task-arithmetic"), default="lerp",
        help="soup: uniform; task-arithmetic: z_target + sum of lambda (z_i - z_base)")
    add("--base", metavar="MODEL", help="the sources' ancestor, for task arithmetic")
    add("--space", choices=("latent", "weight"), default="latent",
        help="weight: the same operator without a codec")
    add("--samples", type=int, metavar="K", help="average K posterior draws of each "
        f"parent ({SAMPLES} for TARGET alone, else 0: the mean)")
    add("--align", choices=("auto", *ot.ALIGNERS), default="auto",
        help="auto: none for equal shapes, gaussian for others")
    add("--epsilon", type=float, default=ot.EPSILON,
        help="Sinkhorn's regularisation, over the largest cost")
    add("--control", choices=ot.CONTROLS, help="a null control in the sources' place")
    add("--residual", action="store_true", help="add back what the codec lost")
    add("--vae", metavar="FILE|exact", help="a trained VAE (the reference VAE); exact: "
        "LS-Merge is then plain averaging")
    add("--init", choices=("random",), help="train the paper's VAE on the inputs first")
    add("--save-vae", metavar="FILE", help="and keep it")
    add("--source-vae", metavar="FILE", help="a second VAE, for sources of other shapes")
    add("--max-nmse", type=float, default=MAX_NMSE, help="refuse a codec that loses more")
    add("--roundtrip", action="store_true", help="encode and decode the target only")
    add("--dry-run", action="store_true", help="print the plan, write nothing")
    add("--report", metavar="FILE", help="a JSON report")
    a = parser.read(argv)
    check_usage(a, parser)
    if a.samples is None:
        a.samples = 0
        if len(a.models) == 1 and not a.roundtrip:
            a.samples = SAMPLES
    if a.base:
        a.models.append(a.base)
    if not a.vae and not a.init and a.space == "latent":
        a.vae = REFERENCE
    return a


def numbers(value):
    """The type of --lam: numbers with commas between."""
    return [float(part) for part in value.split(",")]


def check_usage(a, parser):
    """What the command line alone decides. A flag that would change nothing is refused,
    as it shows a wrong expectation.  rules: (it holds, why, flags of no use)"""
    n = len(a.models) - 1
    codec = "vae source-vae init save-vae max-nmse samples roundtrip residual dtype device"
    rules = [
        (n == 0, "there is no source", "lam align control source-vae operator base space"),
        (a.roundtrip, "a round trip takes the posterior's mean", "samples"),
        (a.space == "weight", "there is no codec", codec + " align control epsilon"),
        (a.operator == "slerp", "slerp takes latents as they are", "align control samples"),
        (a.operator == "soup", "a soup is uniform", "lam"),
        (a.operator != "task-arithmetic", "only task arithmetic has a base", "base"),
        (a.control, "a control replaces what is aligned", "align epsilon"),
        (a.residual, "what is lost comes back", "max-nmse samples"),
        (a.init, "--init trains one VAE for all", "vae source-vae"),
        (not a.init, "no VAE is trained", "save-vae"),
        (a.align != "sinkhorn", "only Sinkhorn is regularised", "epsilon"),
        (a.dry_run, "nothing is written", "report save-vae")]
    for holds, why, flags in rules:
        for flag in flags.split():
            name = flag.replace("-", "_")
            if holds and getattr(a, name) != parser.get_default(name):
                parser.error(f"{why}: drop --{flag}")
    # Beyond these a number is surely a typing error. So put, NaN is refused, too.
    for flag, value, low, high in (
            ("seed", a.seed, 0, 2 ** 32 - 1), ("samples", a.samples or 0, 0, 4096),
            ("epsilon", a.epsilon, 1e-6, 1e6), ("max-nmse", a.max_nmse, 1e-30, 1e6)):
        if not low <= value <= high:
            parser.error(f"--{flag} must be from {low} to {high}")
    if a.roundtrip and n > 0 or a.operator == "slerp" and n != 1:
        parser.error("--roundtrip takes TARGET alone, slerp TARGET and one SOURCE")
    if a.operator == "task-arithmetic" and not a.base:
        parser.error("task arithmetic needs --base")
    if a.lam is None:
        return
    if len(a.lam) == 1:
        a.lam = a.lam * n               # one for all
    if len(a.lam) != n:
        parser.error(f"--lam has {len(a.lam)} values for {n} sources")
    try:
        if a.base:
            ls.task_coefficients(a.lam)
        else:
            ls.convex_coefficients(a.lam)
    except ValueError as error:
        parser.error(f"--lam: {error}")


# What holds weights, or belongs to a training or an adapter: it stays behind.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf",
           ".onnx", ".onnx_data", ".ot", ".npz", ".index.json", "trainer_state.json",
           "adapter_config.json")


def companions(folder):
    """(files that go along with the weights, files that stay behind), as paths relative
    to a model's folder. The model card is written anew.

    All goes along but weights, states of a training, and sub-folders that hold weights:
    they are checkpoints of their own. But what modules.json names is a part of the model
    (sentence-transformers), and goes along with its weights.
    """
    modules = ""
    if isfile(join(folder, "modules.json")):
        with open(join(folder, "modules.json"), encoding="utf-8", errors="replace") as file:
            modules = file.read()
    along = []
    behind = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        sub = relpath(where, folder)
        part = f'"{sub}"' in modules
        own = sub != "." and any(name.endswith(WEIGHTS) for name in names)
        for name in sorted(names):
            path = normpath(join(sub, name))
            if not part and (own or name.endswith(WEIGHTS)):
                behind.append(path)
            elif name[0] != "." and path != "README.md":
                along.append(path)
    return along, behind


def check_outputs(a, models, codecs):
    """The files that go along into a result folder, or None: the result is a file. All
    outputs are checked before any work."""
    target = models[0]
    others = []
    for each in (*models, *codecs):
        others += each.files
    along = None
    inside = None
    if target.folder and not (a.output or "").endswith(".safetensors"):
        along, behind = companions(target.folder)
        inside = ["model.safetensors", "README.md", *along]
        behind = [path for path in behind if join(target.folder, path) not in others]
        if behind:
            say(f"not taken along: {', '.join(behind)}")
        a.output = a.output or "merged"
    a.output = a.output or "merged.safetensors"
    need(along is not None or not a.output.endswith(os.sep), a.output, "is a folder's name, "
         f"and {target.path} is a file", "give -o the name of a file")
    if a.dry_run:
        return along
    for flag, path, files in (("-o", a.output, inside), ("--save-vae", a.save_vae, None),
                              ("--report", a.report, None)):
        if path:
            check_output(path, others, a.force, flag, files)
            others.append(path)
    folder = dirname(realpath(a.output))
    for left in glob.glob(join(glob.escape(folder), ".lsmerge-*")):
        say(f"note: {left}: unfinished; delete it once the process of that number has ended")
    return along


def put_companions(run, folder, along):
    """What stands in a result folder beside the weights."""
    for file in along:
        os.makedirs(dirname(join(folder, file)), exist_ok=True)
        shutil.copyfile(join(run.models[0].folder, file), join(folder, file))
    with open(join(folder, "README.md"), "w", encoding="utf-8",
              errors="backslashreplace") as card:
        card.write(model_card(run))


def merge(run, along):
    """Statistics, codec, gate, merge: the report. The output is opened only when nothing
    can be refused any more. Under torchrun the first process makes it, and all fill it."""
    clock = [time.perf_counter()]
    run.tasks = parallel_map(partial(measure_task, run.models), run, "read")
    clock.append(time.perf_counter())
    if run.a.init:
        run.codecs = train_codec(run)
    gates, trip = check_codec(run)
    clock.append(time.perf_counter())
    entries = run.models[0].entries.values()
    header = {f"lsmerge.{key}": str(value) for key, value in facts_of(run).items()}
    is_folder = along is not None
    with contextlib.ExitStack() as stack:
        if rank_and_size()[0] == 0:
            output = stack.enter_context(create(run.a.output, entries, header, is_folder,
                                                run.a.force))
            if is_folder:
                put_companions(run, dirname(output.path), along)
            gather(output.path)             # the others wait for it
        else:
            output = Output(gather(None)[0], entries, header)
        results = parallel_map(partial(merge_tensor, run, output), run, "merge")
        output.written = sum(gather(output.written), [])
    clock.append(time.perf_counter())
    seconds = dict(zip(("read", "codec", "merge"), np.diff(clock).tolist()))
    return make_report(run, gates, trip, results, seconds)


def main(argv=None):
    a = parse(argv)
    codecs = load_codecs(a)
    models = [Checkpoint(path) for path in a.models]
    for model in models:
        single = join(model.folder or "", "model.safetensors")
        if model.folder and isfile(single) and single not in model.files:
            say(f"note: {single} is not used: the index names other files")
    along = check_outputs(a, models, codecs)
    run, warnings = plan_run(a, models, codecs)
    for warning in warnings:
        say(f"warning: {warning}", stream=sys.stderr)
    if a.dry_run:
        print_plan(run)
        print_pairs(run)
        return
    report = merge(run, along)
    if rank_and_size()[0] > 0:
        return                          # under torchrun the first process speaks for all
    if a.report:
        with appear(a.report, a.force) as path, open(path, "w") as file:
            json.dump(report, file, indent=1, allow_nan=False)
    print_plan(run)
    print_report(report)
    say(f"wrote {a.output} and {len(along or [])} companions")
    for warning in warnings + late_warnings(report, run):       # again, as the last lines
        say(f"warning: {warning}", stream=sys.stderr)


def merge_state_dicts(target, *sources, **flags):
    """What the command does, for state dicts: {name: tensor}, all of them new, by way of
    temporary files. Flags by their names; what the command prints is not printed.
    Example:  merge_state_dicts(a, b, lam=0.3, vae="exact")"""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--quiet", f"--output={folder}/merged.safetensors"]
        for name, value in flags.items():
            argv.append(f"--{name.replace('_', '-')}={value}")
        for k, tensors in enumerate((target, *sources)):
            argv.append(join(folder, f"{k}.safetensors"))
            write_tensors(argv[-1], tensors, {})
        with contextlib.redirect_stdout(io.StringIO()):
            main(argv)
        merged = Checkpoint(join(folder, "merged.safetensors"))
        return {name: merged.read_tensor(name) for name in target}


if __name__ == "__main__":
    sys.exit(command(main))
