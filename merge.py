"""merge.py: merge checkpoints in latent space.                            (read last)

    python merge.py TARGET [SOURCE ...] [options]
    python merge.py a.safetensors b.safetensors

TARGET gives names, shapes, dtypes and companions of the result; alone, it is merged
with itself. A model is a .safetensors file, a Hugging Face folder, or an index of
shards.

The run, straight down (`main` and `merge`): open the models; plan who meets whom
(Algorithm 1, line 1); take each tensor's statistics; get a codec, and check that it can
carry these weights; merge tensor by tensor; report. What happens to a tensor:

    encoded     attention and MLP: merged in latent space, by lsmerge.ls_merge. (With
                --space weight the same tensors are merged as weights.)
    averaged    norms, biases, embeddings: the same operator on the weights themselves
    copied      the target's own: whole numbers, what met nobody, what is not merged

Example, `python merge.py base.safetensors code.safetensors --dry-run` for a model of
one layer, whose target has a score head of its own:

    same-shape: lerp in latent space, lambda 0.5, align none, codec vae.safetensors...
    7 in latent space + 5 averaged + 2 copied = 14 tensors, 85,464 bytes
      copied, whole numbers: 1
      copied, met nobody: 1
      averaged lm_head.weight <- code.safetensors: lm_head.weight
      encoded model.layers.0.mlp.up_proj.weight <- code.safetensors: model.layers.0...
      ...
      copied position_ids <- whole numbers
      copied score.weight <- met nobody

and on stderr a warning that score.weight stays the target's own.

All functions share one namespace, `run`. It holds the flags as the command line has
them (run.lam, run.operator, ...), and what was found since:

    run.models  Checkpoints: the target, the sources, and the base of a task arithmetic
    run.codecs  the target's Codec, and that of sources of other shapes; or none
    run.result  the Destination: where the result goes, and what lies beside it
    run.kind    self, same-shape or cross-shape
    run.tasks   a Task for each tensor of the target, in its order
    run.plain   whether chunk j of a source meets chunk j of the target, everywhere
    run.output, run.vae: paths, whether given or not
    run.warnings, said at once and again at the end
    run.sink    the Output that is written to
    run.seconds of each stage
"""
if __name__ == "__main__":      # Ctrl-C during the imports: end without a traceback
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import contextlib
import glob
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from os.path import (abspath, basename, dirname, isfile, islink, join, normpath,
                     realpath, relpath)
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import align as ot              # ours, not the POT library
import lsmerge as ls
import train
from chunking import (STOP, Checkpoint, Entry, Output, appear, check_output, command,
                      create, is_selected, is_weight, keep_freed_memory, measure, need,
                      one_line, say, spans, standardise, write_tensors)
from train import MAX_NMSE, gather, pick_device, rank_and_size, start_parser
from vae import VAEConfig

VERSION = "3.0"
REFERENCE = join(dirname(abspath(__file__)), "experiments/models/vae.safetensors")
SAMPLES = 8             # draws of a self-merge: their noise shrinks by sqrt(8)
RELATED = 0.5           # cosine of weights: trained apart 0.00, experts of one base 0.9
STRIP = 256             # weights in a strip of a tensor, of which that cosine is taken,
STRIPS = 11             # and their number, about. Of 2,816 weights the second
                        # lowest is 0.05 below the cosine of all, to 0.02
FAR = 0.8               # distance of two parents over the target's norm: 1.4 (the root
                        # of 2) for strangers, below 0.5 for experts of one base
SHARE = 1 << 8          # source weights for each of the target's, at most
GATE_WEIGHTS = 1 << 16  # of a tensor, in windows evenly spread: the gate takes seconds
# The names of PEFT, kohya and LyCORIS for what is added to weights.
ADAPTER = r"(^|\.)lora_|lora\.(up|down)|hada_w|lokr_w|ia3_l|\.base_layer\."
MATCH = "if they are relatives, run python experiments/tools/match.py first"
HARM = ("Merging unrelated models does harm, in our measurements 0.03 to 0.09 bits per "
        "byte at lambda 0.1, and more above (experiments/RESULTS.md, Figure 4)")


# --- The run, straight down -----------------------------------------------------------
def main(argv=None):
    """The command. What it decides and does stands here and in `merge`, in order.
    argv: as on the command line, without the program; None: what it was called with.
    Returns None, which is exit code 0; every error is raised, and chunking.command says
    it."""
    train.only_the_first_speaks()
    run = parse(argv)
    run.codecs = load_codecs(run)
    # Opening reads headers only. What is no checkpoint is refused here.
    run.models = [Checkpoint(path) for path in run.paths]
    for model in run.models:
        adapter = re.search(ADAPTER, "\n".join(model.entries), re.MULTILINE)
        need(not adapter, model.path, "is an adapter: its factors cannot be merged, "
             "their product can", "python experiments/tools/lora.py fold BASE ADAPTER "
             "-o EXPERT")
        # Beside an index lies a whole model: people may expect the one or the other.
        single = abspath(join(model.path, "model.safetensors"))
        if model.folder and isfile(single) and single not in model.files:
            run.warnings.append(f"{single} is not used: the index names other files")
    check_outputs(run)
    # Who meets whom. It reads headers, some strips of the weights, embeddings, heads.
    plan(run)
    warn(run.warnings)
    if run.dry_run:
        print_plan(run)
        print_pairs(run)
        return
    report = merge(run)
    if rank_and_size()[0] > 0:
        return                      # under torchrun the first process speaks for all
    if run.report:
        with appear(run.report, run.force) as path, open(path, "w") as file:
            json.dump(report, file, indent=1, allow_nan=False)
    print_plan(run)
    print_report(report)
    say(f"wrote {run.output}")
    warn(run.warnings + late_warnings(run, report))     # again, as the last lines


def warn(warnings):
    """On stderr: what is printed on stdout scrolls away, or into a file."""
    for warning in warnings:
        if rank_and_size()[0] == 0:
            say(one_line(f"warning: {warning}"), stream=sys.stderr)


def merge(run):
    """Statistics, codec, gate, merge: the report. The output is opened only when
    nothing can be refused any more. Under torchrun the first process makes it, and all
    fill it.
    """
    keep_freed_memory()
    # A first pass over all that enters the result: statistics, and a refusal of NaN.
    run.tasks = parallel_map(measure_task, run, "read")
    if run.init:
        train_codec(run)
    # A second pass, over a sample: does the codec keep these weights?
    gates, trip = check_codec(run)
    # The result has the target's names, dtypes and shapes, whatever was merged. Its
    # header says how it was made.
    entries = run.models[0].entries.values()
    header = {f"lsmerge.{key}": str(value) for key, value in facts_of(run).items()}
    # `create` gives the file its name at the end, when it is complete; an error before
    # that leaves nothing behind.
    with contextlib.ExitStack() as stack:
        path = None
        if rank_and_size()[0] == 0:
            output = stack.enter_context(create(run.output, entries, header,
                                                run.result.weights, run.force))
            path = output.path
            run.result.fill(dirname(path), card_of(run))
        run.sink = Output(gather(path)[0])          # the others wait for it
        # The third pass: every tensor is merged and written.
        results = parallel_map(merge_tensor, run, "merge")
        written = sum(gather(run.sink.written), [])
        if path:
            output.written = written
    return make_report(run, gates, trip, results)


def parallel_map(work, run, label):
    """[work(run, task) for every task]. Split over the processes of a torchrun; in each
    one thread per core, with a tensor of its own, the largest first: reading, computing
    and writing overlap. One thread for a tensor: so the bytes do not depend on the
    number of threads."""
    began = time.perf_counter()
    rank, size = rank_and_size()
    order = sorted(run.tasks, key=lambda task: -task.entry.numel)[rank::size]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Each thread holds a piece of every parent: 16 keep memory flat on a large machine.
    pool = ThreadPoolExecutor(min(threads, 16))
    found = {}
    try:
        done = pool.map(partial(work, run), order)
        for task in tqdm(order, label, leave=False, disable=run.quiet or None):
            found[task.entry.name] = next(done)
    except BaseException:
        STOP.set()                      # threads that read notice it,
        gather(None)                    # and so do the other processes: None, no result
        raise
    finally:
        pool.shutdown(cancel_futures=True)          # waits for those that run
        torch.set_num_threads(threads)
        STOP.clear()
    # Every process knows all results: what follows is decided alike in all of them.
    for part in gather(found):
        if part is None:
            raise SystemExit(1)                     # that process has said why
        found.update(part)
    run.seconds[label] = time.perf_counter() - began
    return [found[task.entry.name] for task in run.tasks]


# --- The plan: who meets whom (paper: Algorithm 1, line 1) ----------------------------
@dataclass
class Task:
    """A tensor of the target, and what happens to it.

    tensors: {0: the tensor of the target, k: its partner in the k-th source}, Entries;
    once they are measured TensorStats, which are Entries, too.

    Example:  the target's up_proj meets the second of two sources only:
              {0: Entry('model.layers.0.mlp.up_proj.weight', ...),
               2: Entry('layers.0.mlp.up_proj.weight', ...)}
    """
    entry: Entry
    number: int                 # its position in the target: part of every seed
    tensors: dict
    action: str = "averaged"    # or "encoded", or "copied"
    why: str = ""               # why it is copied; "" if it is not

    def keep(self, why):
        """The tensor stays the target's own."""
        self.action = "copied"
        self.why = why
        self.tensors = {0: self.entry}


def plan(run):
    """Decide kind, tasks and, where none is given, lambda. What can be refused without
    reading all weights is refused here, and what looks wrong is warned of.

    paper:    across shapes lambda is best from 0.05 to 0.2
    ours:     several sources share it. Equal shapes: 1 / (N + 1), the uniform average
              of the target and N sources
    """
    target, *sources = run.models
    run.kind = "self"
    if sources:
        run.kind = "same-shape"
    # 1. A task for each tensor of the target, and its partner in each source.
    places = [weight_places(model) for model in run.models]
    run.tasks = tasks_of(run, places)
    # 2. What happens to each; `decide` makes the run cross-shape where it must be.
    for task in run.tasks:
        decide(run, task)
    for k, source in enumerate(sources, 1):
        met = {task.tensors[k].name for task in run.tasks if k in task.tensors}
        warn_of_lost(run, source, places[k].keys() - met, "are left out")
    # What is not encoded has no latents: nothing can align it, or be a control of it,
    # and --select asks for certain tensors. So norms and embeddings are averaged with
    # their partners in a merge of one shape only, where nothing of that was asked for.
    run.plain = run.kind == "same-shape" and run.align in ("auto", "none")
    if run.control or run.select or not run.plain:
        for task in run.tasks:
            if task.action == "averaged":
                task.keep("not encoded")
    tie(run)
    for k, source in enumerate(sources, 1):
        alone = {task.entry.name for task in run.tasks
                 if k not in task.tensors and task.why != "not encoded"}
        warn_of_lost(run, target, places[0].keys() & alone,
                     f"take nothing of {source.path}")
    # 3. What is refused, and what is warned of. A copy of the target under another name
    # would look like a merge.
    why = reasons(run)
    need(why.total() < len(run.tasks), target.path, "nothing would be merged: of its "
         f"tensors {dict(why)}", "check --select, and the names in both files (what is "
         "known of names stands in chunking.ROLES)")
    # A flag that would change nothing shows a wrong expectation. The command line alone
    # cannot tell it of this one: who meets whom makes the kind.
    need(run.kind == "cross-shape" or not run.source_vae, run.source_vae,
         "is not needed: equal shapes share one VAE", "drop --source-vae")
    strangers(run)
    # 4. Lambda, where the command line has none. The base is no source of its own.
    n = len(sources) - bool(run.base)
    share = 1 / (n + 1)
    if run.kind == "cross-shape":
        run.warnings.append(f"shapes differ. {HARM}; {MATCH}")
        if run.operator == "lerp":
            share = 0.1 / n
    run.lam = run.lam or [share] * n


def tasks_of(run, places):
    """A Task for each tensor of the target, with its partners. places: of each model's
    weights, {name: Place}."""
    target, *sources = run.models
    tasks = [Task(entry, number, {0: entry})
             for number, entry in enumerate(target.entries.values())]
    for k, source in enumerate(sources, 1):
        pairs = ot.pair_names(places[0], places[k],
                              partial(layer_partners, target, source))
        for task in tasks:
            if task.entry.name in pairs:
                task.tensors[k] = source.entries[pairs[task.entry.name]]
    return tasks


def decide(run, task):
    """What happens to a tensor that has met its partners; the kind of the run with it:
    cross-shape if an encoded pair differs in shape. What one model alone has (a score
    head, a mask, a larger vocabulary) does not make it so.

    An encoded tensor may meet any shape: it is projected. What is averaged must meet
    its own shape, as there is no projection of an embedding or of a norm.
    """
    met = task.tensors
    alike = {k: other for k, other in met.items() if other.shape == task.entry.shape}
    if is_selected(task.entry, run.select):
        task.action = "encoded"
        if alike != met:
            run.kind = "cross-shape"
            check_shapes(run, task)
    else:
        task.tensors = alike
    if not task.entry.dtype.is_floating_point:
        task.keep("whole numbers")
    elif run.kind == "self":
        return                              # merged with itself, it meets nobody
    elif len(met) == 1:
        task.keep("met nobody")
    elif len(task.tensors) == 1:
        task.keep("met another shape")
    # A task vector is between a source and the base, which is the last model.
    elif run.base and (len(run.models) - 1 not in task.tensors
                       or len(task.tensors) < 3):
        task.keep("no task vector")


def check_shapes(run, task):
    """Refuse another shape if the operator needs equal ones (an angle and a difference
    are between vectors of one length), or if a piece of the target would meet more of a
    source than fits into memory.
    Example:  128 x 128 meets 192 x 192. lerp projects 576 latents to 256; slerp, task
              arithmetic and --space weight are refused
    """
    entry = task.entry
    strict = run.space == "weight" or run.operator in ("slerp", "task-arithmetic")
    for k, other in task.tensors.items():
        need(not strict or other.shape == entry.shape, run.models[0].path,
             f"{list(entry.shape)} meets {other.name!r} {list(other.shape)} of "
             f"{run.models[k].path}", f"use lerp in latent space; or, {MATCH}",
             entry.name)
        need(other.numel <= SHARE * max(1, entry.numel), run.models[k].path,
             f"is over {SHARE} times as large as its partner", "narrow --select",
             other.name)


def weight_places(model):
    """{name: Place} of all that can be merged: nothing else meets anybody."""
    return {name: entry.place for name, entry in model.entries.items()
            if is_weight(entry)}


def layer_partners(target, source, mine, theirs):
    """{target layer: source layer} of two stacks, as align.pair_names asks for them.

    By depth, which for equal numbers of layers is by index. But if nearly all layers of
    the same number are alike, one model only has layers of its own (for multi-token
    prediction, or of a draft model): then those that are alike meet by index, and the
    others meet nobody.
    Example:  62 layers and 61, of which 61 are alike: the 62nd stays the target's
    Example:  32 layers, and 31 of them, as layer 29 was removed: 0 to 28 meet. Behind
              it all numbers are shifted by one, nothing is alike at its number, and
              layers 29 to 31 stay the target's
    """
    if len(mine) == len(theirs):
        return ot.partners_by_depth(mine, theirs)       # no weight need be read
    common = mine.keys() & theirs.keys()
    alike = {}
    for layer in common:
        pairs = ot.pair_within_layer(mine[layer], theirs[layer])
        if any(cosine(target, source, *pair) > RELATED for pair in pairs.items()):
            alike[layer] = layer
    # Nearly all: of a model that lost an early layer hardly any are alike at the same
    # number.
    if len(alike) >= 0.9 * len(common) > 0:
        return alike
    return ot.partners_by_depth(mine, theirs)


def cosine(target, source, mine, theirs):
    """How alike the weights of two tensors are: the second lowest cosine of eleven
    strips of them. RELATED, which is neither above nor below it, where that says
    nothing: for vectors (norms are near 1 in any model), zeros, and two shapes.

    One strip may differ because a word was added; two that differ mean another order
    of rows: so it is the second lowest. Strips are spread over all of a tensor, as a
    model whose rows stand in another order may have its first row in place. They are 11
    as heads are 8, 16 or 32: strips that all began where a head does would see only its
    first row, which an order within heads may leave in place.
    """
    entry = target.entries[mine]
    if len(entry.shape) < 2 or entry.shape != source.entries[theirs].shape:
        return RELATED
    cosines = []
    # A strip is whole, unless there is but one: a short one says little.
    last = max(1, entry.numel - STRIP + 1)
    for start in range(0, last, max(STRIP, entry.numel // STRIPS)):
        mine_L = target.read(mine, start, start + STRIP).double()
        theirs_L = source.read(theirs, start, start + STRIP).double()
        cosines.append(F.cosine_similarity(mine_L, theirs_L, dim=0, eps=0))
    found = torch.stack(cosines).nan_to_num(RELATED).sort().values
    return found[len(found) // STRIPS].item()


def strangers(run):
    """Warn of models that are no relatives of the target, judged tensor by tensor and
    told by role.

    One role in another order is enough to ruin a merge, and the mean over all hides it:
    a copy whose MLP neurons are permuted computes the same, has cosine 1 in attention
    and 0 in gate, up and down, and its average with the target is noise. So do q and k
    whose rows are in the order of another library, the embedding of another tokenizer,
    and experts of which some have changed places.
    """
    target, *sources = run.models
    for k, source in enumerate(sources, 1):
        roles = set()
        for task in run.tasks:
            if task.action != "copied" and k in task.tensors:
                other = task.tensors[k].name
                if cosine(target, source, task.entry.name, other) < RELATED:
                    roles.add(task.entry.place.role)
        if roles:
            run.warnings.append(f"{source.path} and the target are strangers in "
                                f"{', '.join(sorted(roles))}. {HARM}; {MATCH}")


def warn_of_lost(run, model, names, what):
    """Warn of weights that are in one model only.  Example: the biases of q, k and v,
    where the target has none; a head; a vision tower; an embedding of another
    vocabulary."""
    if names:
        lost = sum(model.entries[name].numel for name in names)
        total = sum(entry.numel for entry in model.entries.values())
        run.warnings.append(f"{model.path}: {lost / total:.1%} of its weights, "
                            f"tensors like {min(names)} ({len(names)} in all), {what}: "
                            "they met no partner of their shape")


# --- Statistics and ties --------------------------------------------------------------
def measure_task(run, task):
    """The task with the statistics of its parents. All that enters the result is read
    here, so that NaN and Inf are refused before any work. What is only copied may hold
    them."""
    if task.action == "copied":
        return task
    for k, entry in task.tensors.items():
        task.tensors[k] = measure(run.models[k], entry.name)
    # A constant tensor has no pattern, and no unit in which a codec could see one. If
    # all parents are constant, the weights themselves are averaged. If only the target
    # is, and a source has another shape, then nothing says at which scale that source's
    # pattern would enter: the tensor stays the target's.
    measured = task.tensors.values()
    if task.action == "encoded" and task.tensors[0].constant:
        if any(stats.shape != task.entry.shape for stats in measured):
            task.keep("constant")
        elif all(stats.constant for stats in measured):
            task.action = "averaged"
    return task


def digest(model, entry):
    """A fingerprint of a tensor: equal for tensors that are equal, bit for bit."""
    found = hashlib.sha256(f"{entry.dtype} {entry.shape}".encode())
    for start, stop in spans(entry.numel):
        found.update(model.read(entry.name, start, stop).view(torch.uint8).numpy())
    return found.digest()


def tie(run):
    """A matrix that the target holds twice (an embedding and its redundant head) is
    merged as one: the head takes the embedding's partners, and its noise if any, so
    that both stay equal.

    They are equal bit for bit in the target, and one of them is an embedding: two heads
    may be equal by accident (both at the start of a training), as may constants. A
    source's head of its own has no place then, which is told.
    """
    def comes_later(task):
        return task.action == "copied", task.entry.place.role != "embed"

    leaders = {}
    for task in sorted(run.tasks, key=comes_later):
        role = task.entry.place.role
        if role in ("embed", "head") and len(task.entry.shape) > 1:
            leader = leaders.setdefault(digest(run.models[0], task.entry), task)
            if leader is task or leader.action == "copied":
                continue
            accident = measure(run.models[0], leader.entry.name).constant
            if "embed" in (role, leader.entry.place.role) and not accident:
                warn_of_untied(run, task.tensors, leader.tensors)
                task.tensors = dict(leader.tensors)
                task.number = leader.number
                task.action = leader.action
                task.why = ""


def warn_of_untied(run, heads, embeddings):
    """Both: {k: Entry of the k-th model}, k = 0 the target, whose two are equal."""
    for k in heads.keys() & embeddings.keys():
        model = run.models[k]
        if digest(model, heads[k]) != digest(model, embeddings[k]):
            run.warnings.append(f"{model.path}: {heads[k].name} is left out: the "
                                "target has one matrix for its embedding and its head")


# --- The codec, and whether it can carry these weights --------------------------------
def load_codecs(run):
    """[the target's Codec, that of sources of other shapes], before anything else: a
    wrong file is noticed at once. Empty where there is none yet (--init random), or
    none at all (--space weight)."""
    if not run.vae:
        return []                               # none, or it is trained here
    device = pick_device(run.device)
    dtype = getattr(torch, run.dtype)
    codec = ls.Codec.load(run.vae, device, dtype)
    if not run.source_vae:
        return [codec, codec]                   # one network for all
    return [codec, ls.Codec.load(run.source_vae, device, dtype)]


def train_codec(run):
    """--init random: the paper's VAE, from its random start and by train.py's own
    defaults, on the models that are merged. It goes to --save-vae, or is forgotten.
    Under torchrun all processes train it together, and come to the same weights."""
    began = time.perf_counter()
    schedule = train.Schedule(seed=run.seed, device=pick_device(run.device),
                              dtype=run.dtype, quiet=run.quiet)
    vae, stages = train.learn(run.save_vae, run.models, run, VAEConfig(), schedule)
    if stages[-1]["ended"] == "interrupted":
        raise KeyboardInterrupt                 # no merge with half a codec
    codec = ls.Codec(vae, schedule.device, getattr(torch, run.dtype))
    run.codecs = [codec, codec]
    run.seconds["train"] = time.perf_counter() - began


def parents_of(run, task):
    """The tensor's Parents: how each is read, its statistics, its codec. Noise is
    seeded by run, tensor and parent, so that it is the same whoever draws it, and
    when."""
    parents = []
    for k, stats in task.tensors.items():
        read = partial(run.models[k].read, stats.name)
        codec, of_other_shapes = run.codecs
        if stats.shape != task.entry.shape:
            codec = of_other_shapes
        seed = (run.seed, task.number, k)
        parents.append(ls.Parent(read, stats, codec, run.samples, seed))
    return ls.share_statistics(parents)


class Lost(NamedTuple):
    """What the codec loses of one tensor of one model."""
    model: int          # its number in run.models
    name: str
    numel: int
    nmse: float         # on average over the weights, by their squares
    typical: float      # of the weight in the middle


def round_trip(run, task):
    """[Lost, of each parent] of an encoded tensor: of D(E(w)) on some GATE_WEIGHTS of
    it, in the unit in which it is encoded.

    With x the standardised weights, of variance 1, and e = D(E(x)) - x:

        nmse_k      mean(e_k^2)
        typical_k   c_k^2 (median(e_k^2) + noise) / max_k c_k^2 median((x_k - mean)^2)

    NMSE weighs variance, not weights: beside one outlier of 1e4 standard deviations all
    others may be lost at an NMSE of 3e-4. So the weight in the middle is looked at,
    too, and at what reaches the result, c_k of it. A target near zero is no unit for a
    source that is not; but at lambda = 0 it is the result.
    """
    if task.action != "encoded" or not run.codecs:
        return []
    squares = []        # of the errors, of each parent
    unit = 1e-9         # a floor, where all weights are zero. Far above it: 1, the
                        # variance; far below: 1e-14, what float32 itself loses
    # Without vectors slerp takes lerp's, which are near its own.
    coefficients = coefficients_of(run, task, [], [])
    parents = parents_of(run, task)
    for c, own, parent in zip(coefficients, task.tensors.values(), parents):
        stats = parent.stats                            # pooled, unlike its own
        # Whole windows: a chunk is lost as in the merge, beside the same neighbours.
        width = parent.codec.C * parent.codec.T
        step = width * max(1, stats.numel // GATE_WEIGHTS)
        starts = range(0, stats.numel, step)
        flat_L = torch.cat([parent.read(start, start + width) for start in starts])
        z_NZ = parent.codec.encode(flat_L, stats)
        decoded_L = parent.codec.decode(z_NZ, stats, len(flat_L)).cpu()
        x_L = standardise(flat_L, stats).double()
        squares.append((standardise(decoded_L, stats) - x_L).square())
        # Without zeros, which are pruned weights. (NaN, of none, is not above a unit.)
        spread_L = (flat_L[flat_L != 0].double() - own.mean) / stats.scale
        unit = max(unit, c * c * spread_L.square().median().item())
    # Draws are noise, each with the posterior's variance, near beta.
    noise = 0.0
    if run.samples:
        noise = run.codecs[0].vae.config.beta / run.samples
    losses = []
    measured = zip(coefficients, task.tensors.items(), squares)
    for c, (k, stats), square_L in measured:
        typical = c * c * (square_L.median().item() + noise) / unit
        losses.append(Lost(k, stats.name, stats.numel, square_L.mean().item(), typical))
    return losses


def check_codec(run):
    """(gates, round trip of the target) for the report. A codec that loses more of a
    parent than the bound is refused before anything is merged: on average over all
    encoded weights, or of the typical weight of any tensor. With --residual what is
    lost of an unaligned parent comes back: no gate.

    gates: [{name, passed, value, bound}, ...]: who gets here has passed them all.
    round trip: {nmse, worst: {name, nmse}}; None without a codec, or if nothing is
    encoded.
    """
    losses = sum(parallel_map(round_trip, run, "codec"), [])
    trip = {"nmse": None, "worst": {"name": None, "nmse": None}}
    gates = []
    for k in sorted({loss.model for loss in losses}):
        mine = [loss for loss in losses if loss.model == k]
        # The mean over weights, not over tensors: a small one counts little.
        weights = sum(loss.numel for loss in mine)
        nmse = sum(loss.nmse * loss.numel for loss in mine) / weights
        worst = max(mine, key=lambda loss: loss.nmse)
        if k == 0:
            trip = {"nmse": nmse, "worst": {"name": worst.name, "nmse": worst.nmse}}
        # Residuals are of weights, so they fit only where chunk j meets chunk j.
        if run.residual and (k == 0 or run.plain):
            continue
        # But a tensor that is small may still be lost as a whole.
        lost = max(mine, key=lambda loss: loss.typical)
        for what, value, name in (("NMSE", nmse, worst.name),
                                  ("typical error", lost.typical, lost.name)):
            need(value <= run.max_nmse, run.models[k].path, "the codec would lose too "
                 f"much ({what} {value:.2g} > {run.max_nmse:g}); nothing was merged",
                 "--residual where shapes are equal, --vae exact, more --samples, or a "
                 "VAE trained for longer or at a lower ratio", name)
            gates.append({"name": f"{what}, {names_of(run)[k]}", "passed": True,
                          "value": value, "bound": run.max_nmse})
    return gates, trip


# --- The merge of a tensor ------------------------------------------------------------
def merge_tensor(run, task):
    """Merge one tensor into the output, piece by piece: memory depends neither on the
    model nor on its largest tensor.

    Returns (squared distances, records of transports), for the report.
    An encoded tensor is read once for its statistics, in part by the gate, once to be
    encoded and once for the distances; once more by a Transport, and for --residual,
    and twice more for slerp.
    """
    squares = Counter()
    records = []
    entry = task.entry
    readers = []
    for k, each in task.tensors.items():
        readers.append(partial(run.models[k].read, each.name))
    encoded = task.action == "encoded"
    # Of the weights themselves: for what is averaged, and for the distance to that.
    of_weights = coefficients_of(run, task, readers, spans(entry.numel))
    # Where only the target has a share, and what the codec loses comes back, the result
    # is the target: its own bits are written. (A share of 0 among weights is one of 0
    # among latents.)
    nothing_lost = run.residual and not any(of_weights[1:])
    if not encoded or not run.codecs or nothing_lost:
        pieces = ls.weight_merge(readers, of_weights, entry)
        sources = []
    else:
        target, *sources = parents_of(run, task)
        # Slerp's angle is between latents here, above between weights.
        latents = [parent.latents for parent in (target, *sources)]
        steps = spans(target.N, target.per_piece)
        coefficients = coefficients_of(run, task, latents, steps)
        alignment = ls.Alignment(run.align, run.control, run.epsilon)
        sources = [ls.as_source(target, source, alignment, (*source.seed, 1))
                   for source in sources]
        pieces = ls.ls_merge(target, sources, coefficients, run.residual)
    for start, piece_L in pieces:
        piece_L = piece_L.cpu()
        run.sink.put(entry.name, start, piece_L)
        if encoded:
            squares.update(distances(run, task, readers, of_weights, start, piece_L))
    for source in sources:
        if isinstance(source, ls.Transport):
            records.append(source.report())
    return squares, records


def coefficients_of(run, task, vectors, steps):
    """c_k of the parents, z_lambda = sum_k c_k z_k. A source without a partner leaves
    its share to the target.
    Example:  lambda 0.3, 0.2 and a tensor that only the second source has: 0.8, 0.2

    Slerp asks for the angle between two vectors, over the whole tensor: the parents'
    weights or latents, read in these steps.
    """
    # The base, which is the last model, has no lambda.
    lam = [run.lam[k - 1] for k in task.tensors if 0 < k <= len(run.lam)]
    if run.base and lam:
        return ls.task_coefficients(lam)
    if run.operator == "slerp" and task.action == "encoded" and lam:
        pieces = ([vector(*step) for vector in vectors] for step in steps)
        return ls.slerp_coefficients(lam[0], *ls.inner(pieces))
    return ls.convex_coefficients(lam)


def distances(run, task, readers, coefficients, start, piece_L):
    """{to whom: squared distance} of a merged piece: to k, the k-th model; to
    "average", what --space weight gives. And of the target: to zero, "norm"; to the
    k-th model, ("apart", k). Squares add up over pieces and tensors; the report takes
    the root. Across shapes there is no distance but to the target.
    """
    def square(one_L, other_L):         # in float64: it may leave float32
        return (one_L.double() - other_L.double()).square().sum().item()

    if run.kind == "cross-shape":
        readers = readers[:1]
    raw = [read(start, start + len(piece_L)) for read in readers]
    squares = {"norm": square(raw[0], torch.zeros(1))}
    for k, raw_L in zip(task.tensors, raw):
        squares[k] = square(piece_L, raw_L)
        if k > 0:
            squares["apart", k] = square(raw[0], raw_L)
    if run.kind == "same-shape":
        average_L = ls.combine(raw, coefficients, task.entry)
        squares["average"] = square(piece_L, average_L)
    return squares


# --- The report -----------------------------------------------------------------------
def names_of(run):
    """The models' names, without folders: paths mean nothing elsewhere.
    Example:  '/data/llama/' -> 'llama', 'x/code.safetensors' -> 'code.safetensors'
    """
    return [basename(normpath(model.path)) for model in run.models]


def facts_of(run):
    """How the result was made: one dictionary for the header of its file, the card of
    its folder, the report and the screen. No time, no path: equal runs, equal bytes.

    Example (shortened):  {"kind": "same-shape", "operator": "lerp", "lambda": [0.5],
                           "codec": "vae.safetensors", "align": "none",
                           "tensors": {"encoded": 7, "averaged": 5, "copied": 2}}
    """
    align = run.align
    if align == "auto":
        align = "none"
        if run.kind == "cross-shape":
            align = "gaussian"
    ratio = None
    if run.codecs:
        ratio = run.codecs[0].vae.config.true_ratio
    codec = run.vae or "none"
    if run.init:
        codec = "trained here"
    tensors = Counter(encoded=0, averaged=0, copied=0, weights_encoded=0)
    for task in run.tasks:
        tensors["total"] += 1
        tensors["weights_total"] += task.entry.numel
        tensors[task.action] += 1
        if task.action == "encoded":
            tensors["weights_encoded"] += task.entry.numel
    facts = {"version": VERSION, "lambda": run.lam, "align": align, "ratio": ratio,
             "codec": basename(codec), "tensors": dict(tensors)}
    for flag in ("kind operator space control epsilon samples seed dtype residual "
                 "select").split():
        facts[flag] = getattr(run, flag)
    return facts


def make_report(run, gates, trip, results):
    """The JSON report: the facts, and what was measured.

    distance: of the result, in Frobenius norms over the encoded tensors, over the
    target's norm; null where undefined.
    Example:  parents 0.27 apart, lambda 0.5: to_target 0.14, to_source [0.14],
              to_average 6e-4, which is the codec's error
    """
    squares = Counter()
    records = []
    for part, transports in results:
        squares.update(part)            # adds up
        records += transports
    far = {}
    # Not where the target is zero or too large, nor where nothing was encoded.
    norm = squares["norm"]
    for whom, value in squares.items():
        if 0 < norm < math.inf and math.isfinite(value / norm):
            far[whom] = math.sqrt(value / norm)
    ks = range(1, len(run.lam) + 1)             # of the sources
    return facts_of(run) | {
        "inputs": names_of(run), "output": basename(normpath(run.output)),
        "roundtrip": trip, "gates": gates, "seconds": run.seconds,
        "distance": {"to_target": far.get(0),
                     "to_source": [far.get(k) for k in ks],
                     "to_average": far.get("average"),
                     "source_to_target": [far.get(("apart", k)) for k in ks]},
        "alignment": records,
        "unpaired": [task.entry.name for task in run.tasks if task.why == "met nobody"]}


def print_plan(run):
    """What is done, for people: counts first, then why tensors are copied, then what
    lies beside the weights. The top of this file shows an example."""
    facts = facts_of(run)
    lam = ", ".join(f"{value:g}" for value in run.lam) or "none"
    ratio = ""
    if run.codecs:
        ratio = f" (r = {facts['ratio']:g})"
    size = sum(task.entry.nbytes for task in run.tasks)
    say("{kind}: {operator} in {space} space, lambda {lam}, align {align}, "
        "codec {codec}{r}".format(**facts, lam=lam, r=ratio),
        "{encoded} in {space} space + {averaged} averaged + {copied} copied = {total} "
        "tensors, {size:,} bytes".format(**facts["tensors"], **facts, size=size))
    for why, number in reasons(run).items():
        say(f"  copied, {why}: {number}")
    if run.result.files:
        say("beside the weights: " + ", ".join(run.result.files[1:]),
            "not taken along: " + (", ".join(run.result.behind) or "none"))


def reasons(run):
    """{why tensors are copied: how many}"""
    return Counter(task.why for task in run.tasks if task.why)


def print_pairs(run):
    """--dry-run: who meets whom, by the names in the files; then what is copied."""
    # What is merged first, then what is copied, each in the target's order.
    for task in sorted(run.tasks, key=lambda task: task.action == "copied"):
        met = [f"{run.models[k].path}: {other.name}"
               for k, other in task.tensors.items() if k > 0]
        why = task.why or ", ".join(met) or "itself"
        say(one_line(f"  {task.action} {task.entry.name} <- {why}"))


def print_report(report):
    """For people: how far the result went. What is not defined is not printed: there is
    no distance to a source of another shape, and no round trip without a codec.

    Example:  two experts of one base, 7 % of its norm to either side, and 0.3 % from
              plain averaging (in bfloat16 the rounding alone makes that much):

        round trip of the target: NMSE 9.0e-08, its worst tensor 9.6e-08
        distance to the target: 0.0739 of the target's norm, over the 28 in laten...
        distance to the same operator on weights: 0.0028 of the target's norm, ov...
        distance to source 1: 0.0739 of the target's norm, over the 28 in latent ...
    """
    trip = report["roundtrip"]
    if trip["nmse"] is not None:
        say(f"round trip of the target: NMSE {trip['nmse']:.1e}, its worst tensor "
            f"{trip['worst']['nmse']:.1e}")
    far = report["distance"]
    values = {"the target": far["to_target"],
              "the same operator on weights": far["to_average"]}
    for k, value in enumerate(far["to_source"], 1):
        values[f"source {k}"] = value
    what = f"the {report['tensors']['encoded']} in {report['space']} space"
    for name, value in values.items():
        if value is not None:
            say(f"distance to {name}: {value:.4f} of the target's norm, over {what}")
    say(f"{sum(report['seconds'].values()):.1f} seconds")


def late_warnings(run, report):
    """What only the result shows: a source that is too far from the target; a codec
    that is too coarse for a difference so small.
    Example:  a fine-tune 1e-5 of the norm away; the codec's error is 3e-4 of it
    """
    far = report["distance"]
    warnings = []
    for k, value in enumerate(far["source_to_target"], 1):
        if value is not None and value > FAR:
            warnings.append(f"source {k} is {value:.2f} of the target's norm away from "
                            f"the target. {HARM}")
    differ = any(far["source_to_target"])
    comparable = run.plain and not run.control and any(run.lam) and differ
    if not comparable or None in (far["to_average"], far["to_target"]):
        return warnings
    # (Distance to the target)^2 = step^2 + error^2, where the step is that of the plain
    # average. If the error is the larger one, it is over sqrt(1/2) of the distance.
    # (Draws are noise on purpose: with --samples it is no error of the codec.)
    if far["to_average"] > 0.71 * far["to_target"] and not run.samples:
        warnings.append("the codec's error exceeds the difference that was merged: add "
                        "--residual, or take --vae exact in float32")
    return warnings


# --- What stands beside the weights ---------------------------------------------------
# What holds weights, or belongs to a training or an adapter: it stays behind. Beside
# the merged weights it would be taken for them, or for their optimiser's state.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf",
           ".onnx", ".onnx_data", ".ot", ".npz", ".distcp", ".pkl", ".index.json",
           ".index.fp16.json", ".index.bf16.json", "trainer_state.json",
           "adapter_config.json")


def companions(model):
    """(files that go along with the weights, what stays behind), as paths relative to a
    model's folder. The weights themselves are neither: the result has its own. The
    model card is written anew.

    All goes along but weights, states of a training, and sub-folders that hold weights:
    they are checkpoints of their own. But a folder whose name begins with a number is a
    part of the model (sentence-transformers), and goes along with its weights.

    Example:  tokenizer.json               along
              1_Pooling/config.json        along
              2_Dense/model.safetensors    along: a part of the model
              optimizer.pt                 behind: of a training
              checkpoint-500               behind, with all that it holds
    """
    along = []
    behind = []
    for where, folders, names in os.walk(model.folder):
        folders[:] = [name for name in folders if name[0] != "."]      # .git, .cache
        sub = relpath(where, model.folder)
        # Links to folders are not followed, but named.
        behind += [normpath(join(sub, name)) for name in folders
                   if islink(join(where, name))]
        part = sub[0].isdigit()
        weights = [name for name in names if name.endswith(WEIGHTS) and not part]
        if weights and sub != ".":
            behind.append(sub)
            folders.clear()
            continue
        for name in sorted(names):
            file = join(where, name)
            path = normpath(join(sub, name))
            if abspath(file) in model.files or path == "README.md" or name[0] == ".":
                continue
            if name in weights or not isfile(file):
                behind.append(path)
            else:
                along.append(path)
    return along, behind


class Destination:
    """Where a result goes that has the target's names, and what lies beside its
    weights. Every command that writes a model asks here.

    path:     of the result
    weights:  the name of the weights in a result folder, as transformers looks for
              them, or diffusers; None: the result is a file
    along:    the target's companions, which are copied; as paths in its folder
    behind:   what is not taken along
    files:    all that a result folder holds; None: the result is a file
    """
    weights = None
    along = ()
    behind = ()
    files = None

    def __init__(self, target, output=None, name="merged"):
        """output: as the user gave it; None: `name`, here."""
        self.target = target
        if target.folder and not (output or "").endswith(".safetensors"):
            self.path = output or name
            self.weights = "model.safetensors"
            if "diffusion_pytorch_model." in basename(target.files[0]):
                self.weights = "diffusion_pytorch_model.safetensors"
            self.along, self.behind = companions(target)
            self.files = [self.weights, "README.md", *self.along]
        else:
            self.path = output or f"{name}.safetensors"
            need(self.path.endswith(".safetensors"), self.path, f"{target.path} is a "
                 "file: so is the result", "let its name end in .safetensors")

    def fill(self, folder, card):
        """Put into a result folder what belongs beside the weights; card: the text of
        its README.md."""
        if not self.weights:
            return
        for file in self.along:
            os.makedirs(dirname(join(folder, file)), exist_ok=True)
            shutil.copyfile(join(self.target.folder, file), join(folder, file))
        with open(join(folder, "README.md"), "w", encoding="utf-8") as file:
            file.write(card)


def card_of(run):
    """A model card in the Hub's format. JSON escapes what is no plain text in a
    name."""
    facts = json.dumps(facts_of(run) | {"inputs": names_of(run)}, indent=1)
    return (f"---\ntags:\n- merge\n- lsmerge\n---\n\nMerged with LS-Merge:\n\n"
            f"```json\n{facts}\n```\n")


def check_outputs(run):
    """Decide where the result goes. All outputs are checked before any work."""
    run.result = Destination(run.models[0], run.output)
    run.output = run.result.path
    if run.dry_run:
        return
    # What must not be overwritten: all files that are read, shards and indexes too.
    others = []
    for each in (*run.models, *run.codecs):
        others += each.files
    # Nor may anything appear within a model: it would be another model then.
    others += [model.folder for model in run.models if model.folder]
    held = run.result.files                     # only the result may be a folder
    for flag, path in (("-o", run.output), ("--save-vae", run.save_vae),
                       ("--report", run.report)):
        if path:
            check_output(path, others, run.force, flag, held)
            others.append(path)
            held = None
    # A killed run (kill -9, a power cut) leaves its hidden folder. Whether that run has
    # ended only its user knows: it is named, not deleted.
    for left in glob.glob(".lsmerge-*", root_dir=dirname(realpath(run.output))):
        say(f"note: {left}, beside the output, is of the process with the number in "
            "its name: delete it once that has ended")


# --- The command line -----------------------------------------------------------------
def parse(argv):
    """The namespace `run`: the flags; `paths` with the base at its end; `lam` a list of
    numbers, or None where the plan decides."""
    parser = start_parser("merge.py", "Merge checkpoints in latent space.")
    add = parser.add_argument
    add("paths", nargs="+", metavar="MODEL", help="TARGET, then sources: .safetensors "
        "files, folders or indexes. TARGET alone is merged with itself")
    add("-o", "--output", help="the result (merged.safetensors; of a folder merged/)")
    add("--lam", "--lambda", type=numbers, metavar="L[,L...]", help="weight of each "
        "source, 0 to 1 (task arithmetic: -10 to 10); 0: the target's round trip. "
        "1/(N+1) each of N by default; across shapes 0.1 in all")
    add("--operator", choices=("lerp", "slerp", "soup", "task-arithmetic"),
        default="lerp", help="lerp by default; soup: uniform; task-arithmetic: "
        "z_target + sum of lambda (z_i - z_base)")
    add("--base", metavar="MODEL", help="the sources' ancestor, for task arithmetic")
    add("--space", choices=("latent", "weight"), default="latent",
        help="weight: the same operator without a codec")
    add("--samples", type=int, metavar="K", help="average K posterior draws of each "
        f"parent ({SAMPLES} for TARGET alone, else 0: the mean)")
    add("--align", choices=ot.ALIGNERS, default="auto",
        help="auto: none for equal shapes, gaussian for others")
    add("--epsilon", type=float, default=ot.EPSILON,
        help="Sinkhorn's regularisation, over the largest cost (%(default)s)")
    add("--control", choices=ot.CONTROLS, help="a null control in the sources' place")
    add("--residual", action="store_true", help="add back what the codec lost")
    add("--vae", metavar="FILE|exact", help="a trained VAE (the reference VAE); exact: "
        "LS-Merge is then plain averaging")
    add("--init", choices=("random",), help="train the paper's VAE on the inputs first")
    add("--save-vae", metavar="FILE", help="and keep it")
    add("--source-vae", metavar="FILE", help="a VAE for sources of other shapes")
    add("--max-nmse", type=float, default=MAX_NMSE,
        help="refuse a lossier codec (%(default)s)")
    add("--roundtrip", action="store_true", help="encode and decode the target only")
    add("--dry-run", action="store_true", help="print the plan, write nothing")
    add("--report", metavar="FILE", help="a JSON report")
    run = parser.read(argv)
    check_usage(run, parser)
    # Defaults that hang on other flags. A model merged with itself, without noise,
    # would only be its own round trip.
    if run.samples is None:
        run.samples = 0
        if len(run.paths) == 1 and not run.roundtrip and not run.residual:
            run.samples = SAMPLES
    if run.base:
        run.paths.append(run.base)      # read, paired and measured as a source is
    if not run.vae and not run.init and run.space == "latent":
        run.vae = REFERENCE
    run.seconds = {}
    run.warnings = []
    return run


def numbers(value):
    """The type of --lam: numbers with commas between.
    Example:  '0.2,0.3' -> [0.2, 0.3]; '0.5' -> [0.5], which is then for all sources.
    A ValueError becomes argparse's own line about the flag."""
    return [float(part) for part in value.split(",")]


def check_usage(run, parser):
    """What the command line alone decides. A flag that would change nothing is refused,
    as it shows a wrong expectation.

    Example:  --space weight --vae FILE: "there is no codec: drop --vae"
    """
    n = len(run.paths) - 1
    codec = ("vae source-vae init save-vae max-nmse samples roundtrip residual dtype "
             "device align control epsilon")
    operator = run.operator
    # (it holds, why, flags of no use). A flag counts as given if it differs from its
    # default.
    rules = [
        (n == 0, "there is no source",
         "lam align control source-vae operator base space"),
        (run.roundtrip, "a round trip takes the posterior's mean", "samples"),
        (run.space == "weight", "there is no codec", codec),
        (operator == "slerp", "slerp takes latents as they are",
         "align control samples"),
        (operator == "soup", "a soup is uniform", "lam"),
        (operator != "task-arithmetic", "only task arithmetic has a base", "base"),
        (run.control, "a control replaces what is aligned", "align epsilon"),
        (run.residual, "what is lost comes back", "max-nmse samples"),
        (run.init, "--init trains one VAE for all", "vae source-vae"),
        (not run.init, "no VAE is trained", "save-vae"),
        (run.align != "sinkhorn", "only Sinkhorn is regularised", "epsilon"),
        (run.dry_run, "nothing is written", "report save-vae")]
    for holds, why, flags in rules:
        for flag in flags.split():
            name = flag.replace("-", "_")
            if holds and getattr(run, name) != parser.get_default(name):
                parser.error(f"{why}: drop --{flag}")
    if run.lam and len(run.lam) == 1:
        run.lam = run.lam * n           # one for all
    # (it holds, what is wanted). So put, NaN is refused, too.
    right = [
        (0 < run.epsilon < math.inf, "--epsilon must be positive and finite"),
        (0 < run.max_nmse < math.inf, "--max-nmse must be positive and finite"),
        (0 <= (run.samples or 0) <= 4096, "--samples must be from 0 to 4096"),
        (0 <= run.seed < 2 ** 32, "--seed must be from 0 to 2^32 - 1"),
        (not run.roundtrip or n == 0, "--roundtrip takes TARGET alone"),
        (operator != "slerp" or n == 1, "slerp takes TARGET and one SOURCE"),
        (operator != "task-arithmetic" or run.base, "task arithmetic needs --base"),
        (run.lam is None or len(run.lam) == n,
         f"--lam must be one value, or one for each of the sources ({n})")]
    for holds, wanted in right:
        if not holds:
            parser.error(wanted)
    # The operators know what lambda may be: 0 to 1 and a sum of at most 1, or any
    # number within reason.
    coefficients = ls.convex_coefficients
    if run.base:
        coefficients = ls.task_coefficients
    try:
        coefficients(run.lam or [])
    except ValueError as error:
        parser.error(f"--lam: {error}")


# --- From Python ----------------------------------------------------------------------
def merge_state_dicts(target, *sources, base=None, **flags):
    """What the command does, for state dicts: {name: tensor}, all of them new.

    base:     the state dict of the sources' ancestor, for task arithmetic
    flags:    the command's, by their names: a value, a list of lambdas, or True for a
              flag without a value; None and False: not given. Not output, nor dry_run.
              Warnings are printed on stderr, nothing else is
    Example:  merge_state_dicts(a, b, lam=0.3, vae="exact", residual=True)
    Raises:   CheckpointError; SystemExit for what is a usage error of the command
    """
    with tempfile.TemporaryDirectory() as folder:
        result = join(folder, "merged.safetensors")
        argv = ["--quiet"]
        for name, value in flags.items():
            flag = f"--{name.replace('_', '-')}"
            if value is None or value is False:
                continue
            if isinstance(value, (list, tuple)):
                value = ",".join(map(str, value))
            if value is not True:
                flag = f"{flag}={value}"
            argv.append(flag)
        for k, tensors in enumerate((target, *sources)):
            argv.append(join(folder, f"model{k}.safetensors"))
            write_tensors(argv[-1], tensors, {})
        if base:
            file = join(folder, "base.safetensors")
            write_tensors(file, base, {})
            argv.append(f"--base={file}")
        with contextlib.redirect_stdout(io.StringIO()):
            main([*argv, f"--output={result}"])
        merged = Checkpoint(result)
        return {name: merged.read_tensor(name) for name in target}


if __name__ == "__main__":
    sys.exit(command(main))
