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
import contextlib
import glob
import json
import math
import os
import shutil
import sys
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
from chunking import (STOP, Checkpoint, CheckpointError, Output, StateDict, appear,
                      check_output, command, create, is_selected, measure, need, say,
                      spans)
from train import (MAX_NMSE, Schedule, describe_stage, gather, pick_device,
                   rank_and_size, save_vae, start_parser, train_vae)
from vae import VAEConfig

VERSION = "3.0"
REFERENCE = join(dirname(abspath(__file__)), "experiments/models/vae.safetensors")
SAMPLES = 8             # draws of a self-merge: their noise shrinks by sqrt(8)
RELATED = 0.1           # cosine of weights: trained apart 0.00, experts of one base 0.9
GLANCE = 1 << 12        # weights of a tensor for that cosine, then right to 0.02
FAR = 0.8               # distance of two parents, over the target's norm; strangers: 1.4
SHARE = 1 << 12         # largest source tensor over its partner: a chunk must meet less
GATE_WEIGHTS = 1 << 16  # of a tensor, in windows evenly spread: the gate takes seconds
MATCH = "python experiments/tools/match.py"
UNRELATED = ("Merging unrelated models does harm: +0.09 bits per byte and more in our "
             "measurements (experiments/RESULTS.md, Table 5).")


# --- The plan: who meets whom (paper: Algorithm 1, line 1) ------------------------------
@dataclass(frozen=True)
class Task:
    """What happens to one tensor of the target."""
    name: str
    number: int             # its position in the target: part of every seed
    numel: int
    parents: tuple          # (index, name there): 0 the target, k the k-th source
    action: str             # "encoded", "averaged" or "copied"
    why: str = ""           # it is copied
    stats: tuple = ()       # of the parents, once they are measured
    tied: tuple = ()        # names of tensors that the target holds equal to this one


def cosine(target, source, mine, theirs):
    """The cosine of two tensors' first weights, 1 for equal directions; None where shapes
    differ or one is zero."""
    if target.entries[mine].shape != source.entries[theirs].shape:
        return None
    pair = target.read(mine, 0, GLANCE), source.read(theirs, 0, GLANCE)
    dot, norm_a, norm_b = ls.inner([pair])
    if norm_a * norm_b == 0:
        return None
    return dot / (norm_a * norm_b)


def mean_cosine(target, source, pairs):
    """The mean over pairs of names, of those that have a cosine; None if none has."""
    values = []
    for mine, theirs in pairs:
        value = cosine(target, source, mine, theirs)
        if value is not None and is_selected(target.entries[mine]):
            values.append(value)
    if not values:
        return None
    return sum(values) / len(values)


def layer_partners(target, source, mine, theirs):
    """{target layer: source layer} of two stacks, as align.pair_names asks for them.

    By depth, which for equal numbers of layers is by index. But if nearly all layers of the
    same number are alike, one model only has layers of its own (for multi-token prediction,
    or of a draft model): then by index too, and those layers meet nobody."""
    common = sorted(mine.keys() & theirs.keys())
    alike = 0
    for layer in common:
        keys = mine[layer].keys() & theirs[layer].keys()
        pairs = [(mine[layer][key], theirs[layer][key]) for key in keys]
        alike += (mean_cosine(target, source, pairs) or 0) > RELATED
    if len(mine) != len(theirs) and alike >= 0.9 * len(common) > 0:
        return {layer: layer for layer in common}
    return ot.partners_by_depth(mine, theirs)


def float_places(model):
    """{name: Place} of what can be merged at all."""
    return {name: entry.place for name, entry in model.entries.items() if entry.is_float}


def plan_tasks(models, a):
    """(kind, [Task, ...]) in the target's order: the one table of who meets whom.

    kind: "self"; "same-shape"; "cross-shape" if an encoded pair differs in shape. What one
    model alone has (a score head, a mask, a larger vocabulary) does not make it so.
    """
    target, *sources = models
    tables = []
    for source in sources:
        partners = partial(layer_partners, target, source)
        tables.append(ot.pair_names(float_places(target), float_places(source), partners))
    met = {}                # name -> [(index, name there), ...]
    differ = []             # encoded pairs of unequal shape: (name, index, name there)
    for name, entry in target.entries.items():
        met[name] = [(k, table[name]) for k, table in enumerate(tables, 1) if name in table]
        for k, there in met[name]:
            same = models[k].entries[there].shape == entry.shape
            if is_selected(entry, a.select) and not same:
                differ.append((name, k, there))
    if a.space == "weight" or a.operator in ("slerp", "task-arithmetic"):
        for name, k, there in differ:
            raise CheckpointError(
                target.path, f"is {list(target.entries[name].shape)}, {there!r} of "
                f"{models[k].path} is {list(models[k].entries[there].shape)}",
                f"use lerp in latent space; or, if they are relatives, {MATCH} first", name)
    kind = "same-shape"
    if not sources:
        kind = "self"
    elif differ:
        kind = "cross-shape"

    average = kind == "same-shape" and a.align in ("auto", "none")
    average = average and not a.control and a.select is None
    tasks = []
    for number, (name, entry) in enumerate(target.entries.items()):
        selected = is_selected(entry, a.select)
        parents = met[name]
        if not selected:
            parents = [(k, there) for k, there in met[name]
                       if models[k].entries[there].shape == entry.shape]
        why = ""
        if not entry.is_float:
            why = "whole numbers"
        elif sources and not met[name]:
            why = "met nobody"
        elif not selected and not average:
            why = "not encoded"
        elif sources and not parents:
            why = "met another shape"
        elif a.base and len(parents) < len(sources):
            why = "not in every model"
        action = "copied"
        if not why:
            action = "encoded" if selected else "averaged"
        parents = ((0, name), *parents)
        tasks.append(Task(name, number, entry.numel, parents, action, why))
    return kind, tie(target, tasks)


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
    embedding and its redundant head) merged once; the other is a copy of the result."""
    leaders = []            # numbers of tasks
    for task in sorted(tasks, key=lambda task: task.action == "copied"):    # merged ones first
        entry = target.entries[task.name]
        if entry.place.layer is not None or len(entry.shape) < 2 or not entry.is_float:
            continue
        twins = [n for n in leaders if equal(target, task.name, target, tasks[n].name)]
        if twins:
            leader = tasks[twins[0]]
            tasks[twins[0]] = replace(leader, tied=(*leader.tied, task.name))
            tasks[task.number] = replace(task, action="copied", why="tied to another")
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
        if self.a.base:
            return ls.task_coefficients(self.lam)
        return ls.convex_coefficients([self.lam[k - 1] for k, _ in task.parents[1:]])

    def parents(self, task):
        """The tensor's Parents. Noise is seeded by run, tensor and parent."""
        parents = []
        for (k, name), stats in zip(task.parents, task.stats):
            codec = None
            if self.codecs:
                codec = self.codecs[stats.shape != task.stats[0].shape]
            read = partial(self.models[k].read, name)
            seed = (self.a.seed, task.number, k)
            parents.append(ls.Parent(read, stats, codec, self.samples, seed))
        return ls.share_statistics(parents)


def plan_run(a, models, codecs):
    """(Run, warnings). What can be refused without reading all weights is refused here."""
    kind, tasks = plan_tasks(models, a)
    n = len(models) - 1 - bool(a.base)          # sources proper
    warnings = []
    align = "none"
    share = 1 / (n + 1)
    if kind == "cross-shape":
        warnings.append(f"shapes differ. {UNRELATED} If one was made from the other, run "
                        f"{MATCH} first")
        align = "gaussian"
        share = 0.1 / n                         # paper: best from 0.05 to 0.2
    else:
        need(not a.source_vae, a.source_vae, "is not needed: equal shapes share one VAE",
             "drop --source-vae")
    if a.operator == "soup":
        share = 1 / (n + 1)
    if a.align != "auto":
        align = a.align
    for task in tasks:
        for k, there in task.parents[1:]:
            large = models[k].entries[there].numel > SHARE * max(1, task.numel)
            need(not large, models[k].path, f"is over {SHARE} times as large as its partner",
                 "narrow --select", there)
    for k in range(1, n + 1):
        apart = strangers(models, tasks, k)
        if apart:
            warnings.append(f"{models[k].path} and the target are strangers in "
                            f"{', '.join(apart)}. {UNRELATED} If one was made from the other, "
                            f"its units stand in another order: run {MATCH} first")
    samples = a.samples
    if samples is None:
        samples = SAMPLES if kind == "self" and not a.roundtrip else 0
    alignment = ls.Alignment(align, a.control, a.epsilon or ot.EPSILON)
    lam = a.lam or [share] * n
    return Run(a, models, kind, tasks, lam, alignment, samples, codecs), warnings


def strangers(models, tasks, k):
    """The roles in which source k has nothing in common with the target, as both stand."""
    pairs = {}          # role -> [(target name, source name), ...]
    for task in tasks:
        there = dict(task.parents).get(k)
        if there and task.action == "encoded":
            role = models[0].entries[task.name].place.role
            pairs.setdefault(role, []).append((task.name, there))
    apart = []
    for role, names in pairs.items():
        value = mean_cosine(models[0], models[k], names)
        if value is not None and value < RELATED:
            apart.append(role)
    return apart


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
    alike = [equal(models[0], task.name, models[k], there) for k, there in task.parents]
    if task.action == "averaged" and all(alike):    # a mask, say, that may hold -inf
        return replace(task, action="copied", why="equal in all")
    stats = tuple(measure(models[k], there) for k, there in task.parents)
    same = all(each.shape == stats[0].shape for each in stats)
    if task.action == "encoded" and same and all(each.constant for each in stats):
        return replace(task, stats=stats, action="averaged")    # no pattern for a codec
    if task.action == "encoded" and not same and stats[0].constant:
        return replace(task, action="copied", why="constant")
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
    schedule = Schedule(seed=a.seed, device=device, dtype=a.dtype, quiet=a.quiet)
    parents = []
    for k, model in enumerate(run.models):
        stats = {}          # by name: one tensor of a source may meet two of the target
        for task in run.tasks:
            for (index, name), each in zip(task.parents, task.stats):
                if index == k and task.action == "encoded":
                    stats[name] = each
        parents.append((model, list(stats.values())))
    vae, stages = train_vae(parents, VAEConfig(), schedule)
    say(*map(describe_stage, stages))
    if stages[-1]["ended"] == "interrupted":        # no merge with half a codec
        raise KeyboardInterrupt
    names = [name_of(model.path) for model in run.models]
    if a.save_vae and rank_and_size()[0] == 0:
        save_vae(a.save_vae, vae, stages, a.force, trained_on=names)
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
    return [(error.mean().item(), error.median().item() / typical) for error in errors]


def check_codec(run):
    """(gates, round trip of the target) for the report. A codec that loses more of a parent
    than the bound is refused before anything is merged: on average over all encoded
    weights, or of the typical weight of any tensor. With --residual what is lost of an
    unaligned parent comes back: no gate."""
    found = {}          # parent -> [(NMSE, typical error, weights, tensor), ...]
    for task, errors in zip(run.tasks, parallel_map(partial(round_trip, run), run, "check")):
        for (k, name), (nmse, typical) in zip(task.parents, errors):
            numel = run.models[k].entries[name].numel
            found.setdefault(k, []).append((nmse, typical, numel, name))
    trip = {"nmse": None, "worst": {"name": None, "nmse": None}}
    gates = []
    bound = run.a.max_nmse or MAX_NMSE
    for k, rows in sorted(found.items()):
        total = sum(numel for _, _, numel, _ in rows)
        mean = sum(nmse * numel for nmse, _, numel, _ in rows) / total
        worst = max(rows)
        typical = max(rows, key=lambda row: row[1])
        if k == 0:
            trip = {"nmse": mean, "worst": {"name": worst[3], "nmse": worst[0]}}
        if run.a.residual and (k == 0 or run.kind == "same-shape"):
            continue
        path = run.models[k].path
        for what, value, tensor in (("NMSE", mean, worst[3]),
                                    ("typical error", typical[1], typical[3])):
            need(value <= bound, path, f"the codec would lose too much: {what} {value:.2g} "
                 f"is above {bound:g}; nothing was merged", "--residual, --vae exact, or a "
                 "VAE trained for longer or at a lower ratio", tensor)
            gates.append({"name": f"{what} of {name_of(path)}", "passed": True,
                          "value": value, "bound": bound})
    return gates, trip


# --- The merge --------------------------------------------------------------------------
def merge_tensor(run, output, task):
    """Merge one tensor into the output. Returns (sums of squares, records of transports).

    In all an encoded tensor is read four times: for its statistics, by the gate, to be
    encoded, and for the distances; six times for slerp and with --residual."""
    if task.why == "tied to another":
        return {}, []                       # written with that one
    if task.action == "copied":
        for start, stop in spans(task.numel):
            output.put(task.name, start, run.models[0].read(task.name, start, stop))
        return {}, []

    target, *sources = run.parents(task)
    readers = [parent.read for parent in (target, *sources)]
    encoded = task.action == "encoded"
    slerp = encoded and run.a.operator == "slerp"
    plain = run.coefficients(task)          # of raw weights
    if slerp:
        pieces = ([read(*span) for read in readers] for span in spans(task.numel))
        plain = ls.slerp_coefficients(run.lam[0], *ls.inner(pieces))
    transports = []
    only_target = run.a.residual and not any(plain[1:])     # all that is lost comes back
    if not encoded or not run.codecs or only_target:
        merged = ls.weight_merge(readers, plain, target.stats)
    else:
        coefficients = plain
        if slerp:
            pieces = ((target.latents(*span), sources[0].latents(*span))
                      for span in spans(target.N, target.per_piece))
            coefficients = ls.slerp_coefficients(run.lam[0], *ls.inner(pieces))
        sources = [ls.as_source(target, source, run.alignment, (*source.seed, 1))
                   for source in sources]
        transports = [each for each in sources if isinstance(each, ls.Transport)]
        merged = ls.ls_merge(target, sources, coefficients, run.a.residual)

    squares = Counter()
    for start, piece_L in merged:
        for name in (task.name, *task.tied):
            output.put(name, start, piece_L.cpu())
        if encoded:
            squares.update(distances(run, task, readers, plain, start, piece_L.cpu()))
    return squares, [transport.report() for transport in transports]


def distances(run, task, readers, coefficients, start, piece_L):
    """Squared distances of a merged piece, in float64: to the parents of its shape, by
    index; "average": to what --space weight gives; "norm": the target's own square."""
    stop = start + len(piece_L)
    raw = {}
    for (k, _), stats, read in zip(task.parents, task.stats, readers):
        if stats.shape == task.stats[0].shape:
            raw[k] = read(start, stop)
    squares = {k: squared(piece_L, raw_L) for k, raw_L in raw.items()}
    if run.kind == "same-shape":
        average_L = ls.combine(raw.values(), coefficients, task.stats[0])
        squares["average"] = squared(piece_L, average_L)
    squares["norm"] = squared(raw[0], torch.zeros(1))
    return squares


def squared(one_L, other_L):
    """|a - b|^2 in float64: squares of weights may leave float32."""
    return (one_L.double() - other_L.double()).square().sum().item()


# --- The report -------------------------------------------------------------------------
def name_of(path): return basename(normpath(path))


def codec_name(a):
    """What carries the weights."""
    if a.space == "weight":
        return "none"
    return name_of(a.vae or "trained here")


def make_report(run, gates, trip, results, seconds):
    """The JSON report. Distances are Frobenius norms over the encoded tensors, over the
    target's; null where undefined. No paths: they mean nothing elsewhere."""
    a = run.a
    squares = Counter()
    for part, _ in results:
        squares.update(part)            # adds up
    far = {}
    for key, value in squares.items():
        if 0 < squares["norm"] < math.inf and run.kind != "cross-shape" or key == 0:
            far[key] = math.sqrt(value / squares["norm"])
    count = Counter(task.action for task in run.tasks)
    ratio = None
    if run.codecs:
        ratio = run.codecs[0].vae.config.true_ratio
    return {
        "version": VERSION, "inputs": [name_of(path) for path in a.models],
        "output": name_of(a.output), "seed": a.seed, "samples": run.samples,
        "kind": run.kind, "lambda": run.lam, "operator": a.operator, "space": a.space,
        "codec": codec_name(a), "ratio": ratio, "align": run.alignment.method,
        "control": a.control, "roundtrip": trip, "gates": gates, "seconds": seconds,
        "tensors": {
            "encoded": count["encoded"], "averaged": count["averaged"],
            "copied": count["copied"], "total": len(run.tasks),
            "weights_encoded": sum(t.numel for t in run.tasks if t.action == "encoded"),
            "weights_total": sum(task.numel for task in run.tasks)},
        "distance": {
            "to_target": far.get(0), "to_average": far.get("average"),
            "to_source": [far.get(k + 1) for k in range(len(run.lam))]},
        "alignment": [record for _, records in results for record in records],
        "unpaired": [task.name for task in run.tasks if task.why == "met nobody"]}


def recipe(run):
    """What the result's header and its card say. No time, no path: equal runs give equal
    bytes."""
    a = run.a
    facts = {"version": VERSION, "operator": a.operator, "space": a.space,
             "codec": codec_name(a), "align": run.alignment.method, "control": a.control,
             "lambda": lambdas(run), "samples": run.samples, "residual": a.residual,
             "select": a.select, "seed": a.seed}
    return {f"lsmerge.{key}": str(value) for key, value in facts.items()}


def lambdas(run): return ", ".join(f"{value:g}" for value in run.lam) or "none"


def model_card(run):
    """README.md of a result folder, in the Hub's format."""
    names = ", ".join(name_of(model.path) for model in run.models)
    lines = ["---", "tags:", "- merge", "- lsmerge", "---", f"# {name_of(run.a.output)}",
             "", f"{names}, merged with LS-Merge; configuration and tokenizer of the first.",
             "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in recipe(run).items()]
    return "\n".join(lines) + "\n"


def plan_lines(run):
    """What is done, for people: counts first, then why tensors are copied."""
    a = run.a
    count = Counter(task.action for task in run.tasks)
    size = sum(e.numel * e.dtype.itemsize for e in run.models[0].entries.values())
    lines = [f"{run.kind}: {a.operator} in {a.space} space, lambda {lambdas(run)}, align "
             f"{run.alignment.method}, codec {codec_name(a)}",
             f"{count['encoded']} encoded + {count['averaged']} averaged + {count['copied']} "
             f"copied = {len(run.tasks)} tensors, {size:,} bytes"]
    reasons = {}
    for task in run.tasks:
        if task.action == "copied":
            reasons.setdefault(task.why, []).append(task.name)
    for why, names in reasons.items():
        lines.append(f"  copied, {why}: {len(names)}, the first is {names[0]}")
    return lines


def dry_run(run):
    """--dry-run: the plan, then who meets whom, by the names in the files."""
    say(*plan_lines(run))
    for task in sorted(run.tasks, key=lambda task: task.action == "copied"):
        met = [f"{run.models[k].path}: {there}" for k, there in task.parents[1:]]
        say(f"  {task.action} {task.name} <- {task.why or ', '.join(met) or 'itself'}")


def print_report(report, run):
    """For people: what was done, and how far it went."""
    say(*plan_lines(run))
    trip = report["roundtrip"]
    if trip["nmse"] is not None:
        say(f"round trip of the target: NMSE {trip['nmse']:.1e}, its worst tensor "
            f"{trip['worst']['nmse']:.1e}")
    far = report["distance"]
    shown = {"the target": far["to_target"],
             "the same operator on weights": far["to_average"]}
    for k, value in enumerate(far["to_source"], start=1):
        shown[f"source {k}"] = value
    said = [f"{value:.2g} to {name}" for name, value in shown.items() if value is not None]
    say(f"distance, over the target's norm: {', '.join(said)}")
    ratios = sorted(record["std_ratio"] for record in report["alignment"])
    if ratios:
        say(f"aligned: {len(ratios)} tensors, which now have {ratios[0]:.2f} to "
            f"{ratios[-1]:.2f} of the target's spread")
    seconds = [f"{key} {value:.1f}" for key, value in report["seconds"].items()]
    say(f"seconds: {', '.join(seconds)}")


def late_warnings(report, run):
    """What only the result shows: parents too far apart, a codec too coarse."""
    far = report["distance"]
    moved = far["to_target"] or 0.0
    warnings = []
    for k, rest in enumerate(far["to_source"], start=1):
        if rest is not None and moved + rest > FAR and not run.a.control:
            warnings.append(f"source {k} is {moved + rest:.2f} of the target's norm away. "
                            f"{UNRELATED}")
    error = far["to_average"] or 0.0
    if error > 0.7 * moved and any(run.lam) and not run.a.control:
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
    add("--lam", "--lambda", metavar="L[,L...]", help="weight of each source, 0 to 1; 0 is "
        "the target's round trip (1/(N+1) each of N; across shapes 0.1 in all)")
    add("--operator", choices=("lerp", "slerp", "soup", "task-arithmetic"), default="lerp",
        help="soup: uniform; task-arithmetic: z_target + sum of lambda (z_i - z_base)")
    add("--base", metavar="MODEL", help="the sources' ancestor, for task arithmetic")
    add("--space", choices=("latent", "weight"), default="latent",
        help="weight: the same operator without a codec")
    add("--samples", type=int, metavar="K", help="average K posterior draws of each parent "
        "(8 for TARGET alone, else 0: the mean)")
    add("--align", choices=("auto", *ot.ALIGNERS), default="auto",
        help="auto: none for equal shapes, gaussian for others")
    add("--epsilon", type=float, help="Sinkhorn's regularisation, over the largest cost")
    add("--control", choices=ot.CONTROLS, help="a null control in the sources' place")
    add("--residual", action="store_true", help="add back what the codec lost")
    add("--vae", metavar="FILE|exact", help="a trained VAE (the reference VAE); exact: "
        "LS-Merge is then plain averaging")
    add("--init", choices=("random",), help="train the paper's VAE on the inputs first")
    add("--save-vae", metavar="FILE", help="and keep it")
    add("--source-vae", metavar="FILE", help="a second VAE, for sources of other shapes")
    add("--max-nmse", type=float, help="refuse a codec that loses more (0.001)")
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
    """What the command line alone decides. A flag that would change nothing is refused: it
    shows a wrong expectation.  rules: (it holds, why, the flags of no use)"""
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
    mistakes = [
        (a.roundtrip and n > 0, "--roundtrip takes TARGET alone"),
        (a.operator == "slerp" and n != 1, "slerp takes TARGET and one SOURCE"),
        (a.operator == "task-arithmetic" and not a.base, "task arithmetic needs --base"),
        (not 0 <= (a.samples or 0) <= 4096, "--samples must be from 0 to 4096"),
        (not 0 <= a.seed < 2 ** 32, "--seed must be from 0 to 2^32 - 1"),
        (a.epsilon is not None and not 0 < a.epsilon < 1e6, "--epsilon must be above 0"),
        (a.max_nmse is not None and not 0 < a.max_nmse < 1e6, "--max-nmse must be above 0 "
         "and finite")]
    for holds, why in mistakes:
        if holds:
            parser.error(why)
    if a.lam is None:
        return
    try:
        a.lam = [float(value) for value in a.lam.split(",")]
        if a.base:
            ls.task_coefficients(a.lam)
        elif len(a.lam) == 1:
            ls.convex_coefficients(a.lam * n)           # one for all
        else:
            ls.convex_coefficients(a.lam)
    except ValueError as error:
        parser.error(f"--lam: {error}")
    if len(a.lam) == 1:
        a.lam = a.lam * n
    if len(a.lam) != n:
        parser.error(f"--lam has {len(a.lam)} values for {n} sources")


# What holds weights, or belongs to a training or an adapter: it stays behind.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf",
           ".onnx", ".onnx_data", ".ot", ".npz", ".index.json", "trainer_state.json",
           "adapter_config.json")


def companions(folder):
    """(files that go along with the weights, files that stay behind), as paths relative to
    a model's folder: configuration, tokenizer, code, licence; also in sub-folders. One that
    holds weights is another checkpoint. The model card is written anew."""
    along = []
    behind = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        another = where != folder and any(name.endswith(WEIGHTS) for name in names)
        for name in names:
            path = relpath(join(where, name), folder)
            if another or name.endswith(WEIGHTS) or not isfile(join(where, name)):
                behind.append(path)
            elif name[0] != "." and path != "README.md":
                along.append(path)
    return sorted(along), sorted(behind)


def check_outputs(a, models, codecs):
    """The files that go into a result folder, or None: the result is a file. All outputs
    are checked before any work."""
    target = models[0]
    along = None
    inside = None
    name = "merged.safetensors"
    if target.folder and not (a.output or "").endswith(".safetensors"):
        name = "merged"
        along, behind = companions(target.folder)
        inside = ["model.safetensors", "README.md", *along]
        behind = [path for path in behind if join(target.folder, path) not in target.files]
        if behind:
            say(f"not taken along: {', '.join(behind)}")
    a.output = a.output or name
    need(along is not None or not a.output.endswith(os.sep), a.output, "is a folder's name, "
         f"and {target.path} is a file", "give -o the name of a file")
    if a.dry_run:
        return along
    others = [file for each in (*models, *codecs) for file in each.files]
    for flag, path in (("-o", a.output), ("--save-vae", a.save_vae), ("--report", a.report)):
        if path:
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
        output = Output(gather(None)[0], entries, recipe(run))
        yield output
        gather(output.written)
        return
    is_folder = along is not None
    with create(run.a.output, entries, recipe(run), is_folder, run.a.force) as output:
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


def merge(run, open_output):
    """Statistics, codec, gate, merge: (run, report). The output is opened only when nothing
    can be refused any more."""
    clock = [time.perf_counter()]
    run = replace(run, tasks=parallel_map(partial(measure_task, run.models), run, "read"))
    clock.append(time.perf_counter())
    if run.a.init and any(task.action == "encoded" for task in run.tasks):
        run = replace(run, codecs=train_codec(run))
    gates, trip = check_codec(run)
    clock.append(time.perf_counter())
    with open_output(run) as output:
        results = parallel_map(partial(merge_tensor, run, output), run, "merge")
    clock.append(time.perf_counter())
    seconds = {"read": clock[1] - clock[0], "codec": clock[2] - clock[1],
               "merge": clock[3] - clock[2]}
    return run, make_report(run, gates, trip, results, seconds)


def main(argv=None):
    a = parse(argv)
    codecs = load_codecs(a)
    models = [Checkpoint(path) for path in a.models]
    for model in models:
        single = join(model.folder or "", "model.safetensors")
        if model.folder and isfile(single) and single not in model.files:
            say(f"note: {model.path} is read by its index; its model.safetensors is not used")
    along = check_outputs(a, models, codecs)
    run, warnings = plan_run(a, models, codecs)
    for warning in warnings:
        say(f"warning: {warning}", stream=sys.stderr)
    if a.dry_run:
        return dry_run(run)
    run, report = merge(run, partial(open_output, along=along))
    if rank_and_size()[0] > 0:
        return                          # under torchrun the first process speaks for all
    if a.report:
        with appear(a.report, a.force) as path, open(path, "w") as file:
            json.dump(report, file, indent=1, allow_nan=False)
    print_report(report, run)
    say(f"wrote {a.output}" + f" and {len(along or [])} companions" * bool(along))
    for warning in warnings + late_warnings(report, run):       # again, as the last lines
        say(f"warning: {warning}", stream=sys.stderr)


# --- From Python ------------------------------------------------------------------------
class Memory:
    """An output in memory, filled as chunking.Output is."""

    def __init__(self, entries):
        self.flat = {e.name: torch.empty(e.numel, dtype=e.dtype) for e in entries}

    def put(self, name, start, piece_L):
        self.flat[name][start:start + len(piece_L)] = piece_L


def merge_state_dicts(target, *sources, **flags):
    """What the command does, for state dicts: {name: tensor}, all of them new. Flags of the
    command by name.  Example: merge_state_dicts(a, b, lam=0.3, vae="exact")"""
    argv = ["--quiet", "target", *["source"] * len(sources)]
    argv += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    a = parse(argv)
    models = [StateDict(tensors) for tensors in (target, *sources)]
    run, _ = plan_run(a, models, load_codecs(a))
    memory = Memory(models[0].entries.values())
    merge(run, lambda run: contextlib.nullcontext(memory))
    return {name: flat.view(target[name].shape) for name, flat in memory.flat.items()}


if __name__ == "__main__":
    sys.exit(command(main))
