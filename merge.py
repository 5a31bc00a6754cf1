"""merge.py: merge checkpoints in latent space.                            (read last)

    python merge.py TARGET [SOURCE ...] [options]
    python merge.py a.safetensors b.safetensors

TARGET gives names, shapes, dtypes and companions of the result; alone, it is merged with
itself. A model is a .safetensors file, a Hugging Face folder, or an index of shards.

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
import io
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from os.path import abspath, basename, dirname, isfile, join, normpath, relpath

import torch
from tqdm import tqdm

import align as ot
import lsmerge as ls
from chunking import (STOP, Checkpoint, Entry, Output, appear, check_output, command, create,
                      is_selected, measure, need, say, spans, write_tensors)
from train import (MAX_NMSE, Schedule, describe_stage, gather, pick_device,
                   rank_and_size, save_vae, start_parser, train_vae)
from vae import VAEConfig

VERSION = "3.0"
REFERENCE = join(dirname(abspath(__file__)), "experiments/models/vae.safetensors")
SAMPLES = 8             # draws of a self-merge: their noise shrinks by sqrt(8)
RELATED = 0.1           # cosine of weights: trained apart 0.00, experts of one base 0.9
GLANCE = 1 << 12        # weights of a tensor for that cosine, which is then right to 0.02
FAR = 0.8               # distance of two parents over the target's norm; strangers: 1.4
SHARE = 1 << 12         # source weights for each of the target's, at most: a piece of them
GATE_WEIGHTS = 1 << 16  # of a tensor, in windows evenly spread: the gate takes seconds
MATCH = "if they are relatives, run python experiments/tools/match.py first"
HARM = ("Merging unrelated models does harm: +0.09 bits per byte and more in our measurements "
        "(experiments/RESULTS.md, Table 5)")


# --- The plan: who meets whom (paper: Algorithm 1, line 1) ------------------------------
@dataclass(frozen=True)
class Task(Entry):
    """A tensor of the target, and what happens to it."""
    number: int = 0         # its position in the target: part of every seed
    parents: tuple = ()     # (index, name there): 0 the target, k the k-th source
    action: str = ""        # "encoded", "averaged" or "copied"
    why: str = ""           # it is copied
    stats: tuple = ()       # of the parents, once they are measured
    tied: tuple = ()        # names of tensors that the target holds equal to this one


def mean_cosine(target, source, pairs):
    """The mean cosine of two models' weights: 0.00 for models trained apart, 0.9 for experts
    of one base. The first weights of each tensor are enough to tell.

    Args:     pairs: (target name, source name); only encoded pairs of one shape count
    Returns:  NaN, which is neither small nor large, if there is nothing to compare
    """
    values = []
    for mine, theirs in pairs:
        entry = target.entries[mine]
        if is_selected(entry) and entry.shape == source.entries[theirs].shape:
            target_L = target.read(mine, 0, GLANCE).double()
            source_L = source.read(theirs, 0, GLANCE).double()
            if target_L.any() and source_L.any():       # zero has no direction
                values.append(torch.cosine_similarity(target_L, source_L, dim=0))
    return torch.tensor(values).mean().item()


def layer_partners(target, source, mine, theirs):
    """{target layer: source layer} of two stacks, as align.pair_names asks for them.

    By depth, which for equal numbers of layers is by index. But if nearly all layers of the
    same number are alike, one model only has layers of its own (for multi-token prediction,
    or of a draft model): then by index too, and those layers meet nobody.
    Example:  62 layers and 61, of which 61 are alike: the 62nd stays the target's
    """
    common = mine.keys() & theirs.keys()
    alike = 0
    for layer in common:
        keys = mine[layer].keys() & theirs[layer].keys()
        pairs = [(mine[layer][key], theirs[layer][key]) for key in keys]
        alike += mean_cosine(target, source, pairs) > RELATED
    if len(mine) != len(theirs) and alike >= 0.9 * len(common) > 0:
        return {layer: layer for layer in common}
    return ot.partners_by_depth(mine, theirs)


def plan_tasks(models, a):
    """(kind, [Task, ...]) in the target's order: the one table of who meets whom.

    kind: "self"; "same-shape"; "cross-shape" if an encoded pair differs in shape. What one
    model alone has (a score head, a mask, a larger vocabulary) does not make it so.
    """
    target, *sources = models
    tables = []             # one per source: {target name: source name}
    for source in sources:
        mine, theirs = ({name: entry.place for name, entry in model.entries.items()
                         if entry.is_float} for model in (target, source))
        partners = partial(layer_partners, target, source)
        tables.append(ot.pair_names(mine, theirs, partners))
    kind = "same-shape" if sources else "self"
    tasks = []
    for number, (name, entry) in enumerate(target.entries.items()):
        met = [(k, table[name]) for k, table in enumerate(tables, 1) if name in table]
        parents = [(k, there) for k, there in met
                   if models[k].entries[there].shape == entry.shape]
        action = "averaged"
        if is_selected(entry, a.select):
            action = "encoded"
            if parents != met:
                check_shapes(models, name, met, a)
                parents = met
                kind = "cross-shape"
        why = ""
        if not entry.is_float:
            why = "whole numbers"
        elif sources and not met:
            why = "met nobody"
        elif sources and not parents:
            why = "met another shape"
        elif a.base and len(parents) < len(sources):
            why = "not in every model"
        tasks.append(Task(**vars(entry), number=number, parents=((0, name), *parents),
                          action=action, why=why))
    # Norms and embeddings are averaged in a plain merge of one shape only.
    plain = kind == "same-shape" and a.align in ("auto", "none")
    plain = plain and not a.control and a.select is None
    for task in tasks:
        why = task.why
        if task.action == "averaged" and not plain:
            why = why or "not encoded"
        if why:
            tasks[task.number] = replace(task, action="copied", why=why,
                                         parents=task.parents[:1])
    return kind, tie(target, tasks)


def check_shapes(models, name, met, a):
    """Refuse an encoded tensor that meets another shape, if the operator needs equal ones,
    or if a chunk of it would meet more of a source than a piece holds."""
    mine = models[0].entries[name]
    strict = a.space == "weight" or a.operator in ("slerp", "task-arithmetic")
    for k, there in met:
        theirs = models[k].entries[there]
        need(not strict or theirs.shape == mine.shape, models[0].path,
             f"{list(mine.shape)} meets {there!r} {list(theirs.shape)} of {models[k].path}",
             f"use lerp in latent space; or, {MATCH}", name)
        need(theirs.numel <= SHARE * mine.numel, models[k].path,
             f"is over {SHARE} times as large as its partner", "narrow --select", there)


def equal(one, name, other, there):
    """Whether two tensors are equal, bit for bit."""
    mine = one.entries[name]
    theirs = other.entries[there]
    if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
        return False
    for span in spans(mine.numel):
        bits = one.read(name, *span).view(torch.uint8)
        if not torch.equal(bits, other.read(there, *span).view(torch.uint8)):
            return False
    return True


def tie(target, tasks):
    """The tasks, with every matrix outside the layers that the target holds twice (an
    embedding and its redundant head) merged once: the other is a copy of the result, so
    that both stay equal. What is merged leads what is copied, the embedding its head."""
    outside = [task for task in tasks if task.place.layer is None and len(task.shape) > 1]
    outside.sort(key=lambda task: (task.action == "copied", task.place.role != "embed"))
    leaders = []
    for task in outside:
        some_L = target.read(task.name, 0, GLANCE).float()
        if torch.all(some_L == some_L[:1]):     # zeros, say: equal to others by accident
            continue
        twins = [n for n in leaders if equal(target, task.name, target, tasks[n].name)]
        if twins:
            leader = tasks[twins[0]]
            tasks[leader.number] = replace(leader, tied=(*leader.tied, task.name))
            tasks[task.number] = replace(task, action="copied", why="tied to another",
                                         parents=task.parents[:1])
        elif task.action != "copied":
            leaders.append(task.number)
    return tasks


# --- The run: what the command line and the files have decided --------------------------
@dataclass(frozen=True)
class Run:
    a: object               # the command line
    models: list            # the target first; the base of a task arithmetic last
    kind: str
    tasks: list
    lam: list               # one per source proper
    alignment: ls.Alignment
    samples: int
    codecs: tuple           # the target's, and that of sources of other shapes; or none

    def coefficients(self, task):
        """The parents' c_k; a source without a partner leaves its share to the target."""
        if self.a.base and len(task.parents) > 1:
            return ls.task_coefficients(self.lam)
        return ls.convex_coefficients([self.lam[k - 1] for k, _ in task.parents[1:]])

    def parents(self, task):
        """The tensor's Parents. Noise is seeded by run, tensor and parent."""
        parents = []
        for (k, name), stats in zip(task.parents, task.stats):
            codec = self.codecs[stats.shape != task.shape]
            read = partial(self.models[k].read, name)
            seed = (self.a.seed, task.number, k)
            parents.append(ls.Parent(read, stats, codec, self.samples, seed))
        return ls.share_statistics(parents)


def plan_run(a, models, codecs):
    """(Run, warnings). What can be refused without reading all weights is refused here."""
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
    for k in range(1, n + 1):
        pairs = {}          # role -> [(target name, source name), ...]
        for task in tasks:
            there = dict(task.parents).get(k)
            if there and task.action == "encoded":
                pairs.setdefault(task.place.role, []).append((task.name, there))
        apart = [role for role, names in pairs.items()
                 if mean_cosine(models[0], models[k], names) < RELATED]
        if apart:
            warnings.append(f"{models[k].path} and the target are strangers in "
                            f"{', '.join(apart)}. {HARM}; {MATCH}")
    samples = a.samples
    if samples is None and kind == "self" and not a.roundtrip:
        samples = SAMPLES
    alignment = ls.Alignment(a.align, a.control, a.epsilon or ot.EPSILON)
    run = Run(a, models, kind, tasks, a.lam or [share] * n, alignment, samples or 0, codecs)
    return run, warnings


def parallel_map(work, run, label):
    """[work(task) for every task]. Split over the processes of a torchrun; in each one
    thread per core, with a tensor of its own, the largest first: reading, computing and
    writing overlap. One thread for a tensor: so the bytes do not depend on the number."""
    rank, size = rank_and_size()
    order = sorted(run.tasks, key=lambda task: -task.numel)[rank::size]
    threads = torch.get_num_threads()
    found = {}
    problem = None
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(min(threads, 16))     # each holds a piece of every parent
    bar = tqdm(total=sum(task.numel for task in order), desc=label, unit=" weights",
               unit_scale=True, leave=False, disable=run.a.quiet or None)
    try:
        for task, result in zip(order, pool.map(work, order)):
            found[task.number] = result
            bar.update(task.numel)
    except BaseException as error:
        STOP.set()          # threads that read notice it
        problem = error
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)          # waits for those that run
        torch.set_num_threads(threads)
        STOP.clear()
    parts = gather(None if problem else found)
    if problem or None in parts:                    # an error in one process ends all
        raise problem or SystemExit(1)
    for part in parts:
        found.update(part)
    return [found[task.number] for task in run.tasks]


def measure_task(models, task):
    """The task with the statistics of its parents. All that enters the result is read here,
    so that NaN and Inf are refused before any work. What is only copied may hold them."""
    if task.action == "copied":
        return task
    if task.action == "averaged" and all(
            equal(models[0], task.name, models[k], there) for k, there in task.parents):
        # Nothing is to be averaged; and a mask may well hold -inf.
        return replace(task, action="copied", why="equal in all", parents=task.parents[:1])
    stats = tuple(measure(models[k], there) for k, there in task.parents)
    if task.action == "averaged" or not stats[0].constant:
        return replace(task, stats=stats)
    if any(each.shape != stats[0].shape for each in stats):
        return replace(task, action="copied", why="constant", parents=task.parents[:1])
    if all(each.constant for each in stats):        # there is no pattern for a codec
        return replace(task, stats=stats, action="averaged")
    return replace(task, stats=stats)


# --- The codec, and whether it can carry these weights ----------------------------------
def load_codecs(a):
    """(the target's Codec, that of sources of other shapes), before anything else: a wrong
    file is noticed at once."""
    codecs = []
    for path in (a.vae, a.source_vae):
        if path:
            codecs.append(ls.Codec.load(path, pick_device(a.device), getattr(torch, a.dtype)))
    return tuple(codecs * 2)[:2]


def train_codec(run):
    """--init random: the paper's VAE, trained on the encoded tensors of all inputs."""
    a = run.a
    device = pick_device(a.device)
    stats = [{} for _ in run.models]    # by name: a source's tensor may meet two
    for task in run.tasks:
        for (k, name), each in zip(task.parents, task.stats):
            if task.action == "encoded":
                stats[k][name] = each
    parents = [(model, [*found.values()]) for model, found in zip(run.models, stats)]
    schedule = Schedule(seed=a.seed, device=device, dtype=a.dtype, quiet=a.quiet)
    vae, stages = train_vae(parents, VAEConfig(), schedule)
    say(*map(describe_stage, stages))
    if stages[-1]["ended"] == "interrupted":        # no merge with half a codec
        raise KeyboardInterrupt
    if a.save_vae and rank_and_size()[0] == 0:
        save_vae(a.save_vae, vae, stages, a.force, trained_on=names_of(run))
    return (ls.Codec(vae, device, getattr(torch, a.dtype)),) * 2


def round_trip(run, task):
    """[(NMSE, typical error) of each parent], of D(E(w)) on GATE_WEIGHTS of an encoded
    tensor, in the unit that it is encoded in.

    NMSE is the mean squared error over the variance. It weighs variance, not weights:
    beside one outlier all others may be lost. So also the typical error, the median squared
    error over the median square; of these the largest of all parents of the tensor.
    """
    if task.action != "encoded" or not run.codecs:
        return []
    errors = []
    squares = []
    for parent in run.parents(task):
        stats = parent.stats
        width = parent.codec.C * parent.codec.T
        step = width * max(1, stats.numel // GATE_WEIGHTS)
        flat_L = torch.cat([parent.read(start, start + width)
                            for start in range(0, stats.numel, step)])
        z_NZ = parent.codec.encode(flat_L, stats)
        decoded_L = parent.codec.decode(z_NZ, stats, len(flat_L)).cpu().double()
        unit = (flat_L.double() - stats.mean) / stats.scale
        errors.append(((decoded_L - flat_L.double()) / stats.scale).square())
        squares.append(unit[unit != 0].square().median().item())    # 0: pruned weights
    typical = max(squares)
    noise = 0.0
    if run.samples:         # the mean of K draws, each with the posterior's variance: near beta
        noise = run.codecs[0].vae.config.beta / run.samples
    return [(error.mean().item(), (error.median().item() + noise) / typical)
            for error in errors]


def check_codec(run):
    """(gates, round trip of the target) for the report. A codec that loses more of a parent
    than the bound is refused before anything is merged: on average over all encoded
    weights, or of the typical weight of any tensor. With --residual what is lost of an
    unaligned parent comes back: no gate."""
    found = [[] for _ in run.models]    # (NMSE, typical error, weights, tensor), by parent
    for task, errors in zip(run.tasks, parallel_map(partial(round_trip, run), run, "check")):
        for (k, name), (nmse, typical) in zip(task.parents, errors):
            found[k].append((nmse, typical, run.models[k].entries[name].numel, name))
    trip = {"nmse": None, "worst": {"name": None, "nmse": None}}
    gates = []
    bound = run.a.max_nmse or MAX_NMSE
    for k, rows in enumerate(found):
        if not rows:
            continue
        nmse = sum(row[0] * row[2] for row in rows) / sum(row[2] for row in rows)
        worst = max(rows)
        if k == 0:
            trip = {"nmse": nmse, "worst": {"name": worst[3], "nmse": worst[0]}}
        if run.a.residual and (k == 0 or run.kind == "same-shape"):
            continue
        typical = max(rows, key=lambda row: row[1])
        for what, value, tensor in (("NMSE", nmse, worst[3]),
                                    ("typical error", typical[1], typical[3])):
            need(value <= bound, run.models[k].path, f"the codec would lose too much ({what} "
                 f"{value:.2g} > {bound:g}); nothing was merged", "--residual, --vae exact, "
                 "or a VAE trained for longer or at a lower ratio", tensor)
            gates.append({"name": f"{what}, {names_of(run)[k]}", "passed": True,
                          "value": value, "bound": bound})
    return gates, trip


# --- The merge --------------------------------------------------------------------------
def merge_tensor(run, output, task):
    """Merge one tensor into the output. Returns (squared distances, records of transports).

    In all an encoded tensor is read four times: for its statistics, by the gate, to be
    encoded, and for the distances; six times for slerp and with --residual."""
    def slerp(readers, steps):
        """The coefficients that the angle between two vectors asks for."""
        pieces = ([read(*step) for read in readers] for step in steps)
        return ls.slerp_coefficients(run.lam[0], *ls.inner(pieces))

    if task.why == "tied to another":
        return {}, []                       # written with that one
    readers = [partial(run.models[k].read, name) for k, name in task.parents]
    encoded = task.action == "encoded"
    plain = run.coefficients(task)          # c_k of raw weights
    if encoded and run.a.operator == "slerp":
        plain = slerp(readers, spans(task.numel))
    transports = []
    # Where only the target is left, and what the codec loses comes back, it is the target.
    if not encoded or not run.codecs or run.a.residual and not any(plain[1:]):
        merged = ls.weight_merge(readers, plain, task)
    else:
        target, *sources = parents = run.parents(task)
        coefficients = plain
        if run.a.operator == "slerp":
            steps = spans(target.N, target.per_piece)
            coefficients = slerp([parent.latents for parent in parents], steps)
        sources = [ls.as_source(target, source, run.alignment, (*source.seed, 1))
                   for source in sources]
        transports = [each for each in sources if isinstance(each, ls.Transport)]
        merged = ls.ls_merge(target, sources, coefficients, run.a.residual)

    squares = Counter()
    for start, piece_L in merged:
        piece_L = piece_L.cpu()
        for name in (task.name, *task.tied):
            output.put(name, start, piece_L)
        if encoded:
            squares.update(distances(run, task, readers, plain, start, piece_L))
    return squares, [transport.report() for transport in transports]


def distances(run, task, readers, coefficients, start, piece_L):
    """Squared distances of a merged piece, by index, to the parents of its shape; by name:
    average  to what --space weight gives
    plain    of that to the target: the difference that was to be merged
    norm     of the target to zero
    In float64, as squares of weights may leave float32."""
    def square(one_L, other_L):
        return (one_L.double() - other_L.double()).square().sum().item()

    raw = {}
    for (k, _), stats, read in zip(task.parents, task.stats, readers):
        if stats.shape == task.shape:
            raw[k] = read(start, start + len(piece_L))
    squares = {k: square(piece_L, raw_L) for k, raw_L in raw.items()}
    squares["norm"] = square(raw[0], torch.zeros(1))
    if run.kind == "same-shape":
        average_L = ls.combine(raw.values(), coefficients, task)
        squares["average"] = square(piece_L, average_L)
        squares["plain"] = square(raw[0], average_L)
    return squares


# --- The report -------------------------------------------------------------------------
def names_of(run):
    """The models' names, without folders: paths mean nothing elsewhere."""
    return [basename(normpath(model.path)) for model in run.models]


def recipe(run):
    """How the result was made, for its header, its card and the report. No time, no path:
    equal runs give equal bytes."""
    a = run.a
    codec = basename(normpath(a.vae or "trained here"))
    if a.space == "weight":
        codec = "none"
    align = a.align
    if align == "auto":
        align = "gaussian" if run.kind == "cross-shape" else "none"
    return {"version": VERSION, "kind": run.kind, "operator": a.operator, "space": a.space,
            "lambda": run.lam, "codec": codec, "align": align,
            "control": a.control, "samples": run.samples, "seed": a.seed,
            "residual": a.residual, "select": a.select}


def header(run):
    """The recipe as text, for the metadata of the result."""
    return {f"lsmerge.{key}": str(value) for key, value in recipe(run).items()}


def make_report(run, gates, trip, results, seconds):
    """The JSON report. Distances are Frobenius norms over the encoded tensors, over the
    target's; null where undefined."""
    squares = Counter()
    for part, _ in results:
        squares.update(part)            # adds up
    far = {}
    for key, value in squares.items():
        if 0 < squares["norm"] < math.inf and (key == 0 or run.kind == "same-shape"):
            far[key] = math.sqrt(value / squares["norm"])
    count = Counter(task.action for task in run.tasks)
    weights = Counter()
    for task in run.tasks:
        weights[task.action] += task.numel
    ratio = None
    if run.codecs:
        ratio = run.codecs[0].vae.config.true_ratio
    return recipe(run) | {
        "inputs": names_of(run), "output": basename(normpath(run.a.output)),
        "ratio": ratio, "roundtrip": trip, "gates": gates, "seconds": seconds,
        "tensors": {
            "encoded": count["encoded"], "averaged": count["averaged"],
            "copied": count["copied"], "total": len(run.tasks),
            "weights_encoded": weights["encoded"], "weights_total": sum(weights.values())},
        "distance": {
            "to_target": far.get(0), "to_average": far.get("average"),
            "average_to_target": far.get("plain"),
            "to_source": [far.get(k) for k in range(1, len(run.lam) + 1)]},
        "alignment": [record for _, records in results for record in records],
        "unpaired": [task.name for task in run.tasks if task.why == "met nobody"]}


def model_card(run):
    """README.md of a result folder, in the Hub's format."""
    lines = ["---", "tags:", "- merge", "- lsmerge", "---", "", "Merged with LS-Merge: "
             + ", ".join(names_of(run)), "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in recipe(run).items()]
    return "\n".join([*lines, ""])


def print_plan(run):
    """What is done, for people: counts first, then why tensors are copied."""
    facts = recipe(run)
    lam = ", ".join(f"{value:g}" for value in run.lam)
    size = sum(e.numel * e.dtype.itemsize for e in run.models[0].entries.values())
    count = Counter(task.action for task in run.tasks)
    say(f"{run.kind}: {run.a.operator} in {run.a.space} space, lambda {lam or 'none'}, align "
        f"{facts['align']}, codec {facts['codec']}",
        f"{count['encoded']} encoded + {count['averaged']} averaged + {count['copied']} "
        f"copied = {len(run.tasks)} tensors, {size:,} bytes")
    for why, number in Counter(task.why for task in run.tasks if task.why).items():
        first = next(task.name for task in run.tasks if task.why == why)
        say(f"  copied, {why}: {number}, the first is {first}")


def print_pairs(run):
    """--dry-run: who meets whom, by the names in the files; then what is copied."""
    for task in sorted(run.tasks, key=lambda task: task.action == "copied"):
        met = [f"{run.models[k].path}: {there}" for k, there in task.parents[1:]]
        say(f"  {task.action} {task.name} <- {task.why or ', '.join(met) or 'itself'}")


def print_report(report):
    """For people: how far the result went."""
    trip = report["roundtrip"]
    if trip["nmse"] is not None:
        say(f"round trip of the target: NMSE {trip['nmse']:.1e}, its worst tensor "
            f"{trip['worst']['nmse']:.1e}")
    far = report["distance"]
    shown = {"the target": far["to_target"],
             "the same operator on weights": far["to_average"]}
    for k, value in enumerate(far["to_source"], 1):
        shown[f"source {k}"] = value
    said = [f"{value:.2g} to {name}" for name, value in shown.items() if value is not None]
    say(f"distance, over the target's norm: {', '.join(said)}")
    ratios = [record["std_ratio"] for record in report["alignment"]]
    if ratios:
        say(f"aligned: {len(ratios)} tensors, which now have {min(ratios):.2f} to "
            f"{max(ratios):.2f} of the target's spread")
    say("seconds: " + ", ".join(f"{key} {value:.1f}"
                                for key, value in report["seconds"].items()))


def late_warnings(report, run):
    """What only the result shows: parents too far apart, a codec too coarse."""
    far = report["distance"]
    moved = far["to_target"] or 0.0
    warnings = []
    if run.a.control or not any(run.lam):
        return warnings
    for k, rest in enumerate(far["to_source"], 1):
        if moved + (rest or 0.0) > FAR:
            warnings.append(f"source {k} is {moved + rest:.2f} of the target's norm away. "
                            f"{HARM}")
    difference = far["average_to_target"] or 0.0
    if 0 < difference < (far["to_average"] or 0.0) and run.a.vae != "exact":
        warnings.append("the codec's error exceeds the difference that was merged: add "
                        "--residual, or --vae exact")
    return warnings


# --- The command line -------------------------------------------------------------------
def parse(argv):
    """The arguments: `models` with the base at its end, `lam` a list of numbers or None."""
    parser = start_parser("merge.py", "Merge checkpoints in latent space.")
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="TARGET, then sources: .safetensors "
        "files, folders or indexes. TARGET alone is merged with itself")
    add("-o", "--output", help="the result (merged.safetensors, or merged/ for a folder)")
    add("--lam", "--lambda", type=lambdas, metavar="L[,L...]", help="weight of each source, 0 to 1; 0 is "
        "the target's round trip (1/(N+1) each of N; across shapes 0.1 in all)")
    add("--operator", choices=("lerp", "slerp", "soup", "task-arithmetic"), default="lerp",
        help="soup: uniform; task-arithmetic: z_target + sum of lambda (z_i - z_base)")
    add("--base", metavar="MODEL", help="the sources' ancestor, for task arithmetic")
    add("--space", choices=("latent", "weight"), default="latent",
        help="weight: the same operator without a codec")
    add("--samples", type=limited(int, -1, 4097), metavar="K", help="average K posterior draws of each parent "
        "(8 for TARGET alone, else 0: the mean)")
    add("--align", choices=("auto", *ot.ALIGNERS), default="auto",
        help="auto: none for equal shapes, gaussian for others")
    add("--epsilon", type=limited(float, 0, 1e6), help="Sinkhorn's regularisation, over the largest cost")
    add("--control", choices=ot.CONTROLS, help="a null control in the sources' place")
    add("--residual", action="store_true", help="add back what the codec lost")
    add("--vae", metavar="FILE|exact", help="a trained VAE (the reference VAE); exact: "
        "LS-Merge is then plain averaging")
    add("--init", choices=("random",), help="train the paper's VAE on the inputs first")
    add("--save-vae", metavar="FILE", help="and keep it")
    add("--source-vae", metavar="FILE", help="a second VAE, for sources of other shapes")
    add("--max-nmse", type=limited(float, 0, 1e6), help="refuse a codec that loses more (0.001)")
    add("--roundtrip", action="store_true", help="encode and decode the target only")
    add("--dry-run", action="store_true", help="print the plan, write nothing")
    add("--report", metavar="FILE", help="a JSON report")
    a = parser.read(argv)
    check_usage(a, parser)
    if a.base:
        a.models.append(a.base)
    if not a.vae and not a.init and a.space == "latent":
        a.vae = REFERENCE
    return a


def check_usage(a, parser):
    """What the command line alone decides. A flag that would change nothing is refused, as
    it shows a wrong expectation.  rules: (it holds, why, flags of no use)"""
    n = len(a.models) - 1
    codec = "vae source_vae init save_vae max_nmse samples roundtrip residual dtype device"
    rules = [
        (n == 0, "there is no source", "lam align control source_vae operator base space"),
        (a.roundtrip, "a round trip takes the posterior's mean", "samples"),
        (a.space == "weight", "there is no codec", codec + " align control epsilon"),
        (a.operator == "slerp", "slerp takes latents as they are", "align control samples"),
        (a.operator == "soup", "a soup is uniform", "lam"),
        (a.operator != "task-arithmetic", "only task arithmetic has a base", "base"),
        (a.control, "a control replaces what is aligned", "align epsilon"),
        (a.residual, "what is lost comes back", "max_nmse samples"),
        (a.init, "--init trains one VAE for all", "vae source_vae"),
        (not a.init, "no VAE is trained", "save_vae"),
        (a.align != "sinkhorn", "only Sinkhorn is regularised", "epsilon"),
        (a.dry_run, "nothing is written", "report save_vae")]
    for holds, why, names in rules:
        for name in names.split():
            if holds and getattr(a, name) != parser.get_default(name):
                parser.error(f"{why}: drop --{name.replace('_', '-')}")
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


def lambdas(value):
    """The type of --lam: numbers with commas between."""
    return [float(part) for part in value.split(",")]


def limited(kind, low, high):
    """The type of a number from low to high, both excluded."""
    def number(value):
        if not low < kind(value) < high:
            raise argparse.ArgumentTypeError(f"must be above {low} and below {high}")
        return kind(value)
    return number


# What holds weights, or belongs to a training or an adapter: it stays behind.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf",
           ".onnx", ".onnx_data", ".ot", ".npz", ".index.json", "trainer_state.json",
           "adapter_config.json")


def text_of(*path):
    """The text of a file, or nothing if it is not there."""
    if not isfile(join(*path)):
        return ""
    with open(join(*path), encoding="utf-8", errors="replace") as file:
        return file.read()


def companions(folder):
    """(files that go along with the weights, files that stay behind), as paths relative to
    a model's folder. All goes along but weights, states of a training, and sub-folders that
    are checkpoints of their own; weights too if modules.json names their folder, as
    sentence-transformers do with parts of a model. The model card is written anew."""
    modules = text_of(folder, "modules.json")
    along = []
    behind = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        part = f'"{relpath(where, folder)}"' in modules
        own = "trainer_state.json" in names or "model_type" in text_of(where, "config.json")
        for name in sorted(names):
            path = relpath(join(where, name), folder)
            if not part and (name.endswith(WEIGHTS) or own and where != folder):
                behind.append(path)
            elif name[0] != "." and path != "README.md":
                along.append(path)
    return along, behind


def check_outputs(a, models, codecs):
    """The files that go into a result folder, or None: the result is a file. All outputs
    are checked before any work."""
    target = models[0]
    others = [file for each in (*models, *codecs) for file in each.files]
    along = None
    inside = None
    if target.folder and not (a.output or "").endswith(".safetensors"):
        along, behind = companions(target.folder)
        inside = ["model.safetensors", "README.md", *along]
        behind = [path for path in behind if join(target.folder, path) not in others]
        if behind:
            say(f"not taken along: {', '.join(behind)}")
    a.output = a.output or ("merged.safetensors" if along is None else "merged")
    need(along is not None or not a.output.endswith(os.sep), a.output, "is a folder's name, "
         f"and {target.path} is a file", "give -o the name of a file")
    for flag, path in (("-o", a.output), ("--save-vae", a.save_vae), ("--report", a.report)):
        if path and not a.dry_run:
            check_output(path, others, a.force, flag, inside if flag == "-o" else None)
            others.append(path)
    folder = dirname(abspath(a.output))
    for left in glob.glob(join(glob.escape(folder), ".lsmerge-*")):
        say(f"note: {left} is of process {left.split('-')[-2]}: delete it once that has ended")
    return along


@contextlib.contextmanager
def open_output(run, along):
    """The result, open for writing. Under torchrun the first process makes it, and all fill
    it."""
    entries = run.models[0].entries.values()
    if rank_and_size()[0] > 0:
        output = Output(gather(None)[0])
        yield output
        gather(output.written)
        return
    is_folder = along is not None
    with create(run.a.output, entries, header(run), is_folder, run.a.force) as output:
        gather(output.path)             # the others wait for it
        folder = dirname(output.path)
        for file in along or []:
            os.makedirs(dirname(join(folder, file)), exist_ok=True)
            shutil.copyfile(join(run.models[0].folder, file), join(folder, file))
        if is_folder:
            with open(join(folder, "README.md"), "w", encoding="utf-8",
                      errors="backslashreplace") as card:
                card.write(model_card(run))
        yield output
        output.written = sum(gather(output.written), [])


def merge(run, along):
    """Statistics, codec, gate, merge: the report. The output is opened only when nothing
    can be refused any more."""
    clock = [time.perf_counter()]
    run = replace(run, tasks=parallel_map(partial(measure_task, run.models), run, "read"))
    clock.append(time.perf_counter())
    if run.a.init and any(task.action == "encoded" for task in run.tasks):
        run = replace(run, codecs=train_codec(run))
    gates, trip = check_codec(run)
    clock.append(time.perf_counter())
    with open_output(run, along) as output:
        results = parallel_map(partial(merge_tensor, run, output), run, "merge")
    clock.append(time.perf_counter())
    seconds = {"read": clock[1] - clock[0], "codec": clock[2] - clock[1],
               "merge": clock[3] - clock[2]}
    return make_report(run, gates, trip, results, seconds)


def main(argv=None):
    a = parse(argv)
    codecs = load_codecs(a)
    models = [Checkpoint(path) for path in a.models]
    for model in models:
        single = join(model.folder or "", "model.safetensors")
        if model.folder and isfile(single) and single not in model.files:
            say(f"note: {model.path} is read by its index, without its model.safetensors")
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
    say(f"wrote {a.output}" + f" and {len(along or [])} companions" * bool(along))
    for warning in warnings + late_warnings(report, run):       # again, as the last lines
        say(f"warning: {warning}", stream=sys.stderr)


def merge_state_dicts(target, *sources, **flags):
    """What the command does, for state dicts: {name: tensor}, all of them new, by way of
    temporary files. Flags by their names; what the command prints is not printed.
    Example:  merge_state_dicts(a, b, lam=0.3, vae="exact")"""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for tensors in (target, *sources):
            paths.append(join(folder, f"{len(paths)}.safetensors"))
            write_tensors(paths[-1], tensors, {})
        argv = [*paths, "--quiet", f"--output={folder}/merged.safetensors"]
        argv += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        with contextlib.redirect_stdout(io.StringIO()):
            main(argv)
        merged = Checkpoint(join(folder, "merged.safetensors"))
        return {name: merged.read_tensor(name) for name in target}


if __name__ == "__main__":
    sys.exit(command(main))
