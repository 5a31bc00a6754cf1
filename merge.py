"""merge.py: merge checkpoints in latent space.                             (read last)

    python merge.py TARGET [SOURCE ...] [options]
    python merge.py a.safetensors b.safetensors

TARGET gives names, shapes, dtypes and companions of the result; alone, it is merged with
itself. A model is a .safetensors file, a Hugging Face folder, or an index of shards.

The run, straight down (`main`): open the models; plan who meets whom (Algorithm 1, line
1); take each tensor's statistics; get a codec, and check that it can carry these weights;
merge tensor by tensor; report. What happens to a tensor of the target (a Task):

    encoded     attention and MLP: merged in latent space, by lsmerge.ls_merge
    averaged    norms, biases, embeddings: the same operator on the weights themselves
    copied      the target's own: whole numbers, what met nobody, what was not selected
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
from os.path import basename, dirname, exists, isdir, join, normpath, relpath

import torch
from tqdm import tqdm

import align as ot
import lsmerge as ls
from chunking import (STOP, Checkpoint, CheckpointError, Output, StateDict, appear,
                      check_output, command, create, is_selected, measure, need, say, spans)
from train import (MAX_NMSE, Schedule, describe_stage, gather, pick_device, rank_and_size,
                   save_vae, start_parser, train_vae)
from vae import VAEConfig

VERSION = "3.0"
REFERENCE = join(dirname(os.path.abspath(__file__)), "experiments/models/vae.safetensors")
SAMPLES = 8             # draws of a self-merge: their noise shrinks by sqrt(8)
RELATED = 0.1           # cosine of weights: trained apart 0.00, experts of one base 0.9
GLANCE = 1 << 12        # weights of a tensor for that cosine, which is then right to 0.02
FAR = 0.8               # distance of two parents over the target's norm; strangers: 1.4
GATE_WEIGHTS = 1 << 16  # of a tensor, in windows evenly spread: the gate takes seconds


# --- The plan: who meets whom (paper: Algorithm 1, line 1) ------------------------------
@dataclass(frozen=True)
class Task:
    """What happens to one tensor of the target."""
    name: str
    number: int             # its position in the target: part of every seed
    numel: int
    action: str             # "encoded", "averaged" or "copied"
    parents: tuple          # (index, name there): 0 the target, k the k-th source
    why: str = ""           # it is copied
    stats: tuple = ()       # of the parents, once they are measured
    tied: tuple = ()        # names that the target holds equal to this one


def cosine(target, source, pair):
    """The cosine of two tensors' first weights, or None: shapes differ, one is zero."""
    mine, theirs = pair
    if target.entries[mine].shape != source.entries[theirs].shape:
        return None
    dot, a, b = ls.inner([(target.read(mine, 0, GLANCE), source.read(theirs, 0, GLANCE))])
    if a * b == 0:
        return None
    return dot / (a * b)


def layer_partners(target, source, mine, theirs):
    """{target layer: source layer} of two stacks, as align.pair_names asks for them.

    Equal numbers of layers meet by index, others by depth. But where nearly all layers of
    the same number are alike, one model has layers of its own (multi-token prediction, a
    draft model): then by index too, and those layers meet nobody."""
    common = sorted(mine.keys() & theirs.keys())
    related = 0
    for layer in common:
        keys = mine[layer].keys() & theirs[layer].keys()
        cosines = [cosine(target, source, (mine[layer][key], theirs[layer][key]))
                   for key in keys if is_selected(target.entries[mine[layer][key]])]
        known = [value for value in cosines if value is not None]
        related += len(known) > 0 and sum(known) / len(known) > RELATED
    if len(mine) != len(theirs) and related >= 0.9 * len(common) > 0:
        return {layer: layer for layer in common}
    return ot.partners_by_depth(mine, theirs)


def plan_tasks(models, a):
    """(kind, [Task, ...]): the one table of who meets whom, in the target's order.

    kind: "self"; "same-shape"; "cross-shape" if an encoded pair differs in shape. Tensors
    that one model alone has (a score head, a mask, another vocabulary) do not make it so.
    """
    target, *sources = models
    places = [{n: e.place for n, e in model.entries.items()} for model in models]
    tables = []
    for source, theirs in zip(sources, places[1:]):
        partners = partial(layer_partners, target, source)
        tables.append(ot.pair_names(places[0], theirs, partners))

    tasks = []
    differ = []             # encoded pairs of unequal shape
    for number, (name, entry) in enumerate(target.entries.items()):
        parents = [(0, name)]
        for k, table in enumerate(tables, 1):
            if name in table and sources[k - 1].entries[table[name]].is_float:
                parents.append((k, table[name]))
        action = "copied"
        why = ""
        if not entry.is_float:
            why = "whole numbers"
        elif sources and len(parents) == 1:
            why = "met nobody"
        elif a.base and (len(tables), tables[-1].get(name)) != parents[-1]:
            why = "the base has none"
        elif is_selected(entry, a.select):
            action = "encoded"
        elif a.select or a.control or a.align not in ("auto", "none") or not sources:
            why = "not selected"
        else:
            action = "averaged"
        for k, n in parents[1:]:
            if models[k].entries[n].shape != entry.shape and action == "encoded":
                differ.append((name, k, n))
        tasks.append(Task(name, number, entry.numel, action, tuple(parents), why))

    if a.space == "weight" or a.operator in ("slerp", "task-arithmetic"):
        for name, k, n in differ:
            raise CheckpointError(
                target.path, f"{list(target.entries[name].shape)} meets {n!r} of "
                f"{models[k].path}, {list(models[k].entries[n].shape)}; this operator needs "
                "equal shapes", "--operator lerp; or python experiments/tools/match.py first, "
                "if they are relatives", name)
    kind = "same-shape"
    if not sources:
        kind = "self"
    elif differ:
        kind = "cross-shape"
    for i, task in enumerate(tasks):
        if task.action != "averaged":
            continue
        shape = target.entries[task.name].shape
        same = [(k, n) for k, n in task.parents if models[k].entries[n].shape == shape]
        if kind == "cross-shape":
            tasks[i] = replace(task, action="copied", why="not encoded, across shapes")
        elif len(same) == 1 or a.base and len(same) < len(models):
            tasks[i] = replace(task, action="copied", why="its partner has another shape")
        else:
            tasks[i] = replace(task, parents=tuple(same))
    return kind, tie(target, tasks)


def equal(one, name, other, other_name):
    """Whether two tensors are equal, bit for bit."""
    mine = one.entries[name]
    theirs = other.entries[other_name]
    if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
        return False
    return all(torch.equal(one.read(name, *span).view(torch.uint8),
                           other.read(other_name, *span).view(torch.uint8))
               for span in spans(mine.numel))


def tie(target, tasks):
    """The tasks, with matrices outside the layers that the target holds twice (an embedding
    and its redundant head) merged once: the other is a copy of the result."""
    first = {}          # (shape, dtype) -> tasks that are merged
    for i, task in enumerate(tasks):
        entry = target.entries[task.name]
        if entry.place.layer is not None or len(entry.shape) < 2 or not entry.is_float:
            continue
        for leader in first.setdefault((entry.shape, entry.dtype), []):
            if equal(target, task.name, target, tasks[leader].name):
                names = (*tasks[leader].tied, task.name)
                tasks[leader] = replace(tasks[leader], tied=names)
                tasks[i] = replace(task, action="copied", parents=task.parents[:1],
                                   why=f"tied to {tasks[leader].name}")
                break
        else:
            if task.action != "copied":
                first[entry.shape, entry.dtype].append(i)
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
    codecs: tuple = ()      # the target's, and that of sources of other shapes

    def coefficients(self, task):
        """The parents' c_k; a source without a partner leaves its share to the target."""
        if self.a.operator == "task-arithmetic" and len(task.parents) > 1:
            return ls.task_coefficients(self.lam)
        return ls.convex_coefficients([self.lam[k - 1] for k, _ in task.parents[1:]])

    def parents(self, task):
        """The tensor's Parents. Noise is seeded by run, tensor and parent."""
        parents = []
        for (k, name), stats in zip(task.parents, task.stats):
            codec = None
            if self.codecs:
                codec = self.codecs[stats.shape != task.stats[0].shape]
            seed = (self.a.seed, task.number, k)
            parents.append(ls.Parent(partial(self.models[k].read, name), stats, codec,
                                     self.samples, seed))
        return ls.share_statistics(parents)


def plan_run(a, models):
    """The Run, and what to warn of. What can be refused without reading all weights is
    refused here."""
    kind, tasks = plan_tasks(models, a)
    n = len(models) - 1 - bool(a.base)
    warnings = []
    for task in tasks:
        for k, name in task.parents[1:]:
            # One chunk of the target must not meet more of the source than fits a piece.
            small = models[k].entries[name].numel <= 4096 * max(1, task.numel)
            need(small or task.action != "encoded", models[k].path, "is more than 4096 times "
                 "as large as its partner", "narrow --select", name)
    align = a.align
    if align == "auto":
        align = "none"
        if kind == "cross-shape":
            align = "gaussian"
    if kind == "cross-shape":
        warnings.append(
            "shapes differ: between unrelated models, chunks carried nothing over in any "
            "measurement, and did harm (experiments/RESULTS.md, Table 5). If one was made "
            "from the other: python experiments/tools/match.py first")
    need(kind == "cross-shape" or not a.source_vae, a.source_vae, "is of no use: equal shapes "
         "share one VAE", "drop --source-vae")
    warnings += [warning for k in range(1, n + 1)
                 for warning in strangers(models[0], models[k], k, tasks)]
    share = 1 / (n + 1)
    if kind == "cross-shape" and a.operator != "soup":
        share = 0.1 / n
    samples = a.samples
    if samples is None:
        samples = SAMPLES if kind == "self" and not a.roundtrip else 0
    alignment = ls.Alignment(align, a.control, a.epsilon or ot.EPSILON)
    run = Run(a, models, kind, tasks, a.lam or [share] * n, alignment, samples)
    return run, warnings


def strangers(target, source, k, tasks):
    """A warning if the weights of some role have nothing in common, as they stand."""
    found = {}          # role -> cosines
    for task in tasks:
        pair = dict(task.parents)
        if task.action == "encoded" and k in pair:
            value = cosine(target, source, (task.name, pair[k]))
            role = target.entries[task.name].place.role
            if value is not None:
                found.setdefault(role, []).append(value)
    roles = [role for role, values in found.items() if sum(values) / len(values) < RELATED]
    if not roles:
        return []
    return [f"{source.path} and the target are strangers in {', '.join(roles)} (cosine 0 of "
            "their weights): the merge will do harm. If one was made from the other, its "
            "units stand in another order: python experiments/tools/match.py first"]


def parallel_map(work, run, label):
    """[work(task) for every task]. Split over the processes of a torchrun, the largest
    first; in each one thread per core, with a tensor of its own: so reading, computing
    and writing overlap, and the bytes do not depend on the number of threads."""
    rank, size = rank_and_size()
    order = sorted(run.tasks, key=lambda task: -task.numel)[rank::size]
    threads = torch.get_num_threads()
    found = {}
    problem = None
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(min(threads, 16))     # each holds a piece of every parent
    try:
        with tqdm(total=sum(task.numel for task in order), desc=label, unit=" weights",
                  unit_scale=True, leave=False, disable=run.a.quiet or None) as bar:
            for task, result in zip(order, pool.map(work, order)):
                found[task.number] = result
                bar.update(task.numel)
    except BaseException as error:
        STOP.set()          # threads that read notice it
        problem = error
    finally:
        pool.shutdown(cancel_futures=True)          # waits for those that run
        torch.set_num_threads(threads)
        STOP.clear()
    parts = gather(None if problem else found)
    if problem or None in parts:                    # an error in one process ends all
        raise problem or SystemExit(1)
    merged = {number: result for part in parts for number, result in part.items()}
    return [merged[number] for number in sorted(merged)]


def measure_task(models, task):
    """The task with the statistics of its parents. All that enters the result is read here,
    so that NaN and Inf are refused before any work. What is only copied may hold them."""
    if task.action == "copied":
        return task
    try:
        stats = tuple(measure(models[k], name) for k, name in task.parents)
    except CheckpointError:
        # A mask of -inf, say: nothing to average where all are equal.
        if task.action == "averaged" and all(
                equal(models[0], task.name, models[k], name) for k, name in task.parents):
            return replace(task, action="copied", why="equal in all, and not finite")
        raise
    task = replace(task, stats=stats)
    same = all(each.shape == stats[0].shape for each in stats)
    if task.action == "encoded" and same and all(each.constant for each in stats):
        return replace(task, action="averaged")     # nothing that a codec could carry
    if task.action == "encoded" and not same and stats[0].constant:
        return replace(task, action="copied", why="constant")
    return task


# --- The codec, and whether it can carry these weights ----------------------------------
def load_codecs(a):
    """(the target's Codec, that of sources of other shapes), before anything else: a wrong
    file is noticed at once."""
    if not a.vae:
        return ()
    paths = (a.vae, a.source_vae or a.vae)
    target, other = (ls.Codec.load(path, pick_device(a.device), getattr(torch, a.dtype))
                     for path in paths)
    return target, other if a.source_vae else target


def train_codec(run):
    """--init random: the paper's VAE, trained on the encoded tensors of all inputs."""
    a = run.a
    schedule = Schedule(seed=a.seed, device=pick_device(a.device), dtype=a.dtype,
                        quiet=a.quiet)
    stats = [{} for _ in run.models]    # by name: a source's tensor may meet two
    for task in run.tasks:
        if task.action == "encoded":
            for (k, name), each in zip(task.parents, task.stats):
                stats[k][name] = each
    parents = [(model, list(many.values())) for model, many in zip(run.models, stats)]
    vae, stages = train_vae(parents, VAEConfig(), schedule)
    say(*map(describe_stage, stages))
    if stages[-1]["ended"] == "interrupted":        # no merge with half a codec
        raise KeyboardInterrupt
    if a.save_vae and rank_and_size()[0] == 0:
        names = [name_of(model.path) for model in run.models]
        save_vae(a.save_vae, vae, stages, a.force, trained_on=names)
    codec = ls.Codec(vae, schedule.device, getattr(torch, a.dtype))
    return codec, codec


def round_trip(run, task):
    """[(NMSE, typical error), ...] of D(E(w)) for each parent of an encoded tensor, on
    GATE_WEIGHTS of it, in the unit that the parent is encoded in.

    The NMSE is the mean squared error over the variance: it weighs variance, not weights.
    Beside an outlier all other weights may be lost. So the typical error: the median
    squared error over the median square, of all parents of one shape."""
    if task.action != "encoded" or not run.codecs:
        return []
    errors = []
    squares = []
    for parent in run.parents(task):
        stats = parent.stats
        width = parent.codec.C * parent.codec.T
        step = width * max(1, stats.numel // GATE_WEIGHTS)
        parts = [parent.read(start, start + width) for start in range(0, stats.numel, step)]
        flat_L = torch.cat(parts)
        decoded_L = parent.codec.decode(parent.codec.encode(flat_L, stats), stats, len(flat_L))
        error_L = (decoded_L.cpu().double() - flat_L.double()) / stats.scale
        square_L = ((flat_L.double() - stats.mean) / stats.scale).square()
        errors.append(error_L.square())
        squares.append(square_L[square_L > 0].median().nan_to_num().item())
    typical = max(squares) or 1.0
    return [(error_L.mean().item(), error_L.median().item() / typical) for error_L in errors]


def check_codec(run):
    """(gates, round trip of the target) for the report. A codec that loses more of a parent
    than the bound, in all or of some tensor's typical weights, is refused before anything
    is merged. With --residual what is lost of unaligned parents comes back: no gate."""
    sums = Counter()
    count = Counter()
    worst = {}              # parent -> (error, tensor)
    typical = {}
    for task, errors in zip(run.tasks, parallel_map(partial(round_trip, run), run, "check")):
        for (k, name), (nmse, median) in zip(task.parents, errors):
            numel = run.models[k].entries[name].numel
            sums[k] += nmse * numel
            count[k] += numel
            worst[k] = max(worst.get(k, (0.0, name)), (nmse, name))
            typical[k] = max(typical.get(k, (0.0, name)), (median, name))
    gates = []
    bound = run.a.max_nmse or MAX_NMSE
    for k in sorted(count):
        if run.a.residual and (k == 0 or run.kind != "cross-shape"):
            continue
        path = run.models[k].path
        for what, value, name in (("NMSE", sums[k] / count[k], worst[k][1]),
                                  ("typical error", *typical[k])):
            need(value <= bound, path, f"the codec would lose too much ({what} {value:.2g} > "
                 f"{bound:g}); nothing was merged", "--residual, --vae exact, or a VAE that "
                 "was trained for longer or at a lower ratio", name)
            gates.append({"name": f"{what} of {name_of(path)}", "passed": True,
                          "value": value, "bound": bound})
    if not count:
        return gates, {"nmse": None, "worst": {"name": None, "nmse": None}}
    return gates, {"nmse": sums[0] / count[0],
                   "worst": {"name": worst[0][1], "nmse": worst[0][0]}}


# --- The merge --------------------------------------------------------------------------
def merge_tensor(run, output, task):
    """Merge one tensor into the output. Returns (sums of squares, records of transports).

    An encoded tensor is read about four times: for its statistics, by the gate, to be
    encoded, and for the distances. All but the first come from the file cache."""
    target = run.models[0]
    if task.why.startswith("tied"):
        return Counter(), []                # written with the tensor that it is tied to
    if task.action == "copied":
        for start, stop in spans(task.numel):
            output.put(task.name, start, target.read(task.name, start, stop))
        return Counter(), []

    parents = run.parents(task)
    readers = [parent.read for parent in parents]
    plain = run.coefficients(task)          # of raw weights
    latent = plain                          # of latents
    encoded = task.action == "encoded"
    alone = run.a.residual and not any(plain[1:])   # what the codec loses comes back whole
    transports = []
    if run.a.operator == "slerp" and encoded:
        pieces = ([read(*span) for read in readers] for span in spans(task.numel))
        plain = ls.slerp_coefficients(run.lam[0], *ls.inner(pieces))
    if not encoded or run.a.space == "weight" or alone:
        merged = ls.weight_merge(readers, plain, task.stats[0])
    else:
        first = parents[0]
        if run.a.operator == "slerp":
            pieces = ([parent.latents(*span) for parent in parents]
                      for span in spans(first.N, first.per_piece))
            latent = ls.slerp_coefficients(run.lam[0], *ls.inner(pieces))
        sources = [ls.as_source(first, source, run.alignment, (*source.seed, 1))
                   for source in parents[1:]]
        transports = [each for each in sources if isinstance(each, ls.Transport)]
        merged = ls.ls_merge(first, sources, latent, run.a.residual)

    squares = Counter()
    for start, piece_L in merged:
        piece_L = piece_L.cpu()
        for name in (task.name, *task.tied):
            output.put(name, start, piece_L)
        if encoded:
            squares.update(distances(run, task, readers, plain, start, piece_L))
    return squares, [transport.report() for transport in transports]


def distances(run, task, readers, plain, start, piece_L):
    """Squared distances of a merged piece, in float64: to the parents of its shape, by
    their index, and to what the operator gives on raw weights; "norm" of the target."""
    merged_L = piece_L.double()
    average_L = torch.zeros_like(merged_L)
    squares = {}
    for (k, _), stats, read, c in zip(task.parents, task.stats, readers, plain):
        if stats.shape == task.stats[0].shape:
            raw_L = read(start, start + len(piece_L)).double()
            squares[k] = (merged_L - raw_L).square().sum().item()
            average_L += c * raw_L
            if k == 0:
                squares["norm"] = raw_L.square().sum().item()
    if run.kind == "same-shape":
        average_L = average_L.to(piece_L.dtype).double()
        squares["average"] = (merged_L - average_L).square().sum().item()
    return squares


# --- The report -------------------------------------------------------------------------
def name_of(path): return basename(normpath(path))


def make_report(run, gates, trip, results, seconds):
    """The JSON report. Distances are Frobenius norms over the encoded tensors, over the
    target's; null where undefined. No paths: they mean nothing elsewhere."""
    a = run.a
    squares = Counter()
    for part, _ in results:
        squares.update(part)            # adds up
    norm = squares["norm"]
    far = {}
    for key, value in squares.items():
        far[key] = math.sqrt(value / norm) if 0 < norm < math.inf else None
    by_action = Counter(task.action for task in run.tasks)
    encoded = sum(task.numel for task in run.tasks if task.action == "encoded")
    cross = run.kind == "cross-shape"
    return {
        "version": VERSION, "inputs": [name_of(path) for path in a.models],
        "output": name_of(a.output), "seed": a.seed, "samples": run.samples,
        "kind": run.kind, "lambda": run.lam, "operator": a.operator, "space": a.space,
        "ratio": run.codecs[0].vae.config.true_ratio if run.codecs else None,
        "codec": codec_name(a), "align": run.alignment.method, "control": a.control,
        "tensors": {"encoded": by_action["encoded"], "averaged": by_action["averaged"],
                    "copied": by_action["copied"], "total": len(run.tasks),
                    "weights_encoded": encoded,
                    "weights_total": sum(task.numel for task in run.tasks)},
        "roundtrip": trip,
        "distance": {"to_target": far.get(0), "to_average": far.get("average"),
                     "to_source": [None if cross else far.get(k + 1)
                                   for k in range(len(run.lam))]},
        "alignment": [record for _, records in results for record in records],
        "unpaired": [task.name for task in run.tasks if task.why == "met nobody"],
        "gates": gates, "seconds": seconds}


def codec_name(a):
    """What carried the weights, for people."""
    if a.space == "weight":
        return "none"
    return name_of(a.vae or "a new VAE")


def header(run):
    """What the result's header and its card say. No time, no path: equal runs give equal
    bytes."""
    a = run.a
    facts = {"version": VERSION, "operator": a.operator, "space": a.space,
             "codec": codec_name(a), "align": run.alignment.method, "control": a.control,
             "lambda": ", ".join(f"{value:g}" for value in run.lam), "samples": run.samples,
             "residual": a.residual, "select": a.select, "seed": a.seed}
    return {f"lsmerge.{key}": str(value) for key, value in facts.items()
            if value not in (None, "", False)}


def model_card(run):
    """README.md of a result folder, in the Hub's format."""
    names = [name_of(model.path) for model in run.models]
    rows = [f"| {key.removeprefix('lsmerge.')} | {value} |"
            for key, value in header(run).items()]
    return "\n".join([
        "---", "tags:", "- merge", "- lsmerge", "---", "", f"# {name_of(run.a.output)}", "",
        f"{', '.join(names)}, merged with LS-Merge. Configuration and tokenizer are those "
        "of the first.", "", "| | |", "|---|---|", *rows, ""])


def plan_lines(run):
    """What will be done, for people: counts first."""
    a = run.a
    lam = ", ".join(f"{value:g}" for value in run.lam)
    counts = Counter(task.action for task in run.tasks)
    said = " + ".join(f"{counts[action]} {action}" for action in
                      ("encoded", "averaged", "copied"))
    size = sum(e.numel * e.dtype.itemsize for e in run.models[0].entries.values())
    yield (f"{run.kind}: {a.operator} in {a.space} space, lambda {lam or 'none'}, "
           f"align {run.alignment.method}, codec {codec_name(a)}")
    yield f"{said} = {len(run.tasks)} tensors, {size:,} bytes"
    for why, number in Counter(task.why for task in run.tasks if task.why).items():
        first = next(task.name for task in run.tasks if task.why == why)
        yield f"  copied, {why}: {number}, the first is {first}"


def dry_run(run, companions):
    """--dry-run: the plan, then who meets whom, by the names in the files."""
    say(*plan_lines(run))
    for task in run.tasks:
        if task.action != "copied":
            met = ", ".join(f"{run.models[k].path}: {n}" for k, n in task.parents[1:])
            say(f"  {task.action} {task.name}" + f" <- {met}" * bool(met))
    for task in run.tasks:
        if task.action == "copied":
            say(f"  copied {task.name}: {task.why}")
    if companions:
        say(f"  beside it: {', '.join(companions)}")


def print_report(report, run):
    """For people: what was done, and how far it went."""
    say(*plan_lines(run))
    trip = report["roundtrip"]
    if trip["nmse"] is not None:
        say(f"round trip of the target: NMSE {trip['nmse']:.1e}, its worst tensor "
            f"{trip['worst']['nmse']:.1e}")
    far = report["distance"]
    shown = [("the target", far["to_target"]),
             ("the same operator on weights", far["to_average"]),
             *((f"source {k}", value) for k, value in enumerate(far["to_source"], 1))]
    said = ", ".join(f"{value:.2g} to {name}" for name, value in shown if value is not None)
    say(f"distance, over the target's norm: {said}")
    if report["alignment"]:
        ratios = sorted(record["std_ratio"] for record in report["alignment"])
        say(f"aligned: {len(ratios)} tensors, with {ratios[0]:.2f} to {ratios[-1]:.2f} of "
            "the target's spread")
    said = ", ".join(f"{key} {value:.1f}" for key, value in report["seconds"].items())
    say(f"seconds: {said}")


def late_warnings(report, run):
    """What only the result shows: parents too far apart, or a codec too coarse."""
    far = report["distance"]
    to_target = far["to_target"] or 0.0
    if run.a.control:
        return
    for k, to_source in enumerate(far["to_source"], 1):
        if to_source is not None and to_target + to_source > FAR:
            yield (f"source {k} is too far from the target ({to_target + to_source:.2f} of "
                   "its norm): no useful merge was that far; judge the result")
    lost = far["to_average"] or 0.0
    if any(run.lam) and lost > 0.7 * to_target and run.a.space == "latent":
        yield ("the codec's error is larger than the difference that was merged: add "
               "--residual, or --vae exact")


# --- The command line -------------------------------------------------------------------
def parse(argv):
    """The arguments, with `lam` a list of numbers, or None."""
    parser = start_parser("merge.py", "Merge checkpoints in latent space.")
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="TARGET, then sources: .safetensors "
        "files, folders or indexes; TARGET alone is merged with itself")
    add("-o", "--output", help="the result: merged.safetensors, or merged/ if TARGET is a "
        "folder")
    add("--lam", "--lambda", metavar="L[,L...]", help="weight of each source; 0 is the "
        "target's round trip. 1/(N+1) each of N, across shapes 0.1 in all")
    add("--operator", choices=("lerp", "slerp", "soup", "task-arithmetic"), default="lerp",
        help="soup: uniform; task-arithmetic: z_target + sum of lambda (z_i - z_base)")
    add("--base", metavar="MODEL", help="the sources' ancestor, for task arithmetic")
    add("--space", choices=("latent", "weight"), default="latent",
        help="weight: the same operator without a codec")
    add("--samples", type=int, metavar="K", help="average K posterior draws of each parent "
        "(self-merging: 8; else 0, the posterior's mean)")
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
    """What the command line alone decides. Flags that would change nothing are refused
    where they show a wrong expectation: (it holds, why, the flags)."""
    n = len(a.models) - 1
    codec = "vae source_vae init save_vae max_nmse samples roundtrip residual"
    rules = [
        (not n, "there is no source", "lam align control source_vae operator base space"),
        (a.roundtrip, "a round trip takes the posterior's mean", "samples"),
        (a.space == "weight", "there is no codec", codec + " align control epsilon dtype"),
        (a.operator == "slerp", "slerp takes latents as they are", "align control samples"),
        (a.operator == "soup", "a soup is uniform", "lam"),
        (a.operator != "task-arithmetic", "only task arithmetic has a base", "base"),
        (a.control, "a control replaces what is aligned", "align epsilon"),
        (a.residual, "what is lost comes back", "max_nmse samples"),
        (a.init, "--init trains one VAE for all", "vae source_vae"),
        (not a.init, "no VAE is trained", "save_vae"),
        (a.align != "sinkhorn", "only sinkhorn is regularised", "epsilon"),
        (a.dry_run, "nothing is written", "report save_vae")]
    for holds, why, names in rules:
        for name in names.split():
            if holds and getattr(a, name) != parser.get_default(name):
                parser.error(f"{why}: drop --{name.replace('_', '-')}")
    for holds, why in (
            (a.roundtrip and n, "--roundtrip takes the target alone"),
            (a.operator == "slerp" and n != 1, "slerp takes TARGET and one SOURCE"),
            (a.operator == "task-arithmetic" and not a.base, "task arithmetic needs --base"),
            (not 0 <= (a.samples or 0) <= 4096, "--samples must be from 0 to 4096"),
            (not 0 <= a.seed < 2 ** 32, "--seed must be from 0 to 2^32 - 1"),
            (not 0 < (a.epsilon or 1) < 1e6, "--epsilon must be above 0, and finite"),
            (not 0 < (a.max_nmse or 1) < 1e6, "--max-nmse must be above 0, and finite")):
        if holds:
            parser.error(why)
    if a.lam is None:
        return
    try:
        a.lam = [float(value) for value in a.lam.split(",")]
        if len(a.lam) == 1:
            a.lam = a.lam * n           # one for all
        if a.base:
            ls.task_coefficients(a.lam)
        else:
            ls.convex_coefficients(a.lam)
    except ValueError as error:
        parser.error(f"--lam: {error}")
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
            file = join(where, name)
            path = relpath(file, folder)
            if name[0] == "." or path == "README.md":
                continue
            if another or name.endswith(WEIGHTS) or not os.path.isfile(file):
                behind.append(path)
            else:
                along.append(path)
    return sorted(along), sorted(behind)


def check_outputs(a, models, codecs):
    """The files that go into a result folder, or None: the result is a file. All outputs
    are checked before any work."""
    target = models[0]
    along = None
    if target.folder and not (a.output or "").endswith(".safetensors"):
        along, behind = companions(target.folder)
        behind = [path for path in behind if join(target.folder, path) not in target.files]
        if behind:
            say(f"left behind: {', '.join(behind)}")
        a.output = a.output or "merged"
    a.output = a.output or "merged.safetensors"
    need(along is not None or not a.output.endswith(os.sep), a.output, "is a folder's name, "
         f"and {target.path} is a file", "give -o the name of a file")
    inputs = [file for each in (*models, *codecs) for file in each.files]
    inside = None
    if along is not None:
        inside = ["model.safetensors", "README.md", *along]
    if not a.dry_run:
        check_output(a.output, inputs, a.force, folder=inside)
        others = [*inputs, a.output]
        for flag, path in (("--save-vae", a.save_vae), ("--report", a.report)):
            if path:
                check_output(path, others, a.force, flag)
                others.append(path)
    for left in glob.glob(join(glob.escape(dirname(os.path.abspath(a.output))), ".lsmerge-*")):
        say(f"note: {left} is of process {basename(left).split('-')[1]}: delete it if that "
            "has ended")
    return along


@contextlib.contextmanager
def open_output(run, along):
    """The result, open for writing. Under torchrun the first process makes it, all fill
    it."""
    path = run.a.output
    entries = run.models[0].entries.values()
    if rank_and_size()[0] > 0:
        output = Output(gather(None)[0])
        yield output
        gather(output.written)
        return
    with create(path, entries, header(run), along is not None, run.a.force) as output:
        gather(output.path)             # the others wait for it
        folder = dirname(output.path)
        for file in along or []:
            os.makedirs(dirname(join(folder, file)), exist_ok=True)
            shutil.copyfile(join(run.models[0].folder, file), join(folder, file))
        if along is not None:
            with open(join(folder, "README.md"), "w", encoding="utf-8",
                      errors="backslashreplace") as card:
                card.write(model_card(run))
        yield output
        output.written = [n for part in gather(output.written) for n in part]


def merge(run, open_the_output):
    """Statistics, codec, gate, merge: (run, report). The output is opened once nothing can
    be refused any more."""
    clock = [time.perf_counter()]
    tasks = parallel_map(partial(measure_task, run.models), run, "read")
    run = replace(run, tasks=tasks)
    clock.append(time.perf_counter())
    if run.a.init and any(task.action == "encoded" for task in tasks):
        run = replace(run, codecs=train_codec(run))
    gates, trip = check_codec(run)
    clock.append(time.perf_counter())
    with open_the_output(run) as output:
        results = parallel_map(partial(merge_tensor, run, output), run, "merge")
    clock.append(time.perf_counter())
    seconds = {"read": clock[1] - clock[0], "codec": clock[2] - clock[1],
               "merge and write": clock[3] - clock[2]}
    return run, make_report(run, gates, trip, results, seconds)


def main(argv=None):
    a = parse(argv)
    codecs = load_codecs(a)
    models = [Checkpoint(path) for path in a.models]
    for model in models:
        spare = join(model.folder or "", "model.safetensors")
        if model.folder and exists(spare) and spare not in model.files:
            say(f"note: {model.path} is read by its index, not its model.safetensors")
    along = check_outputs(a, models, codecs)
    run, warnings = plan_run(a, models)
    run = replace(run, codecs=codecs)
    for warning in warnings:
        say(f"warning: {warning}", stream=sys.stderr)
    if a.dry_run:
        return dry_run(run, along)
    run, report = merge(run, partial(open_output, along=along))
    if a.report and rank_and_size()[0] == 0:
        with appear(a.report, a.force) as path:
            with open(path, "w", encoding="utf-8") as file:
                json.dump(report, file, indent=1, allow_nan=False)
    if rank_and_size()[0] == 0:
        print_report(report, run)
        say(f"wrote {a.output}" + f" and {len(along or [])} companions" * bool(along))
        for warning in [*warnings, *late_warnings(report, run)]:        # the last lines
            say(f"warning: {warning}", stream=sys.stderr)


# --- From Python ------------------------------------------------------------------------
class Memory:
    """An output in memory, filled as chunking.Output is."""

    def __init__(self, entries):
        self.flat = {e.name: torch.empty(e.numel, dtype=e.dtype) for e in entries}

    def put(self, name, start, piece_L):
        self.flat[name][start:start + len(piece_L)] = piece_L


def merge_state_dicts(target, *sources, **flags):
    """What the command does, for state dicts: {name: tensor}, new ones. The flags of the
    command by name.  Example: merge_state_dicts(a, b, lam=0.3, vae="exact")"""
    argv = ["target"] + [f"source {k}" for k in range(1, len(sources) + 1)]
    for name, value in flags.items():
        argv += [f"--{name.replace('_', '-')}={value}"]
    a = parse([*argv, "--quiet"])
    run, _ = plan_run(a, [StateDict(tensors) for tensors in (target, *sources)])
    memory = Memory(run.models[0].entries.values())
    merge(replace(run, codecs=load_codecs(a)), lambda run: contextlib.nullcontext(memory))
    return {name: flat.view(target[name].shape) for name, flat in memory.flat.items()}


if __name__ == "__main__":
    sys.exit(command(main))
