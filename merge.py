"""merge.py: merge checkpoints in latent space.                                       (read last)

    python merge.py TARGET [SOURCE ...] [options]     python merge.py a.safetensors b.safetensors

TARGET gives names, shapes, dtypes and companions of the result; alone, it is merged with itself. A
model is a .safetensors file, a Hugging Face folder or an index of shards. In brackets: defaults.

what     --lam L[,L...]    (--lambda) weight of each source, the rest is the target's (1/(N+1) each
                           of N; across shapes 0.1 in all, paper: 0.05 to 0.2); 0: its round trip
         --operator NAME   lerp, slerp, soup (uniform), task-arithmetic: z_target + sum of lambda
                           (z_i - z_base), lambda in [-10, 10], as --lam=-0.5,2 (lerp)
         --base MODEL      the sources' ancestor, for task-arithmetic
         --samples K       average K posterior draws of each parent (8 without SOURCE, else 0)
         --select REGEX    what is merged, by name; all else stays the target's (floats of two or
                           more dimensions in numbered layers are encoded, the rest is averaged)
how      --align NAME      none; on chunks: mean, gaussian, sinkhorn; units: layers and hidden units
                           are matched by their weights first (auto: none; across shapes units if
                           the models are related, else gaussian)
         --epsilon E       Sinkhorn's regularisation, over the largest cost (0.01)
         --control NAME    zero, noise, shuffled: a null control in place of the source's latents
         --residual        add back what the codec lost: lambda = 0 is then the target, bit for bit
         --space SPACE     latent, or weight: the same operator without the codec (latent)
codec    --vae FILE|exact  a trained VAE (the reference VAE, experiments/models/vae.safetensors);
                           exact: untrained, LS-Merge = plain averaging, at the speed of the disk
         --init random     instead: train the paper's VAE on the inputs first, in two stages
         --save-vae FILE   keep it;  --source-vae FILE  a second VAE, for the sources' architecture
         --max-nmse X      refuse a codec whose round trip of a parent is worse (0.001)
         --roundtrip       encode and decode the target only
output   -o, --output PATH the result (merged.safetensors; merged/ if TARGET is a folder)
         --dry-run         print the plan, write nothing
         --report FILE     JSON report;  --force  overwrite an existing output, never an input
machine  --device NAME     auto, cpu, cuda (auto);   --dtype NAME  float32, bfloat16 (float32)
         --seed S          of all noise (0);         --quiet       no progress bars

Refused are flags that would change nothing:
         without SOURCE    --lam --align --control --source-vae --operator --base --space
         with --roundtrip  --samples (it takes the mean)
         with --space weight  --vae --init --save-vae --source-vae --max-nmse --roundtrip --samples
         with --space weight  --align --epsilon --control --residual --device --dtype
         with slerp        --align --control --samples (it takes codes as they are)
         with soup         --lam
         with --dry-run    --report
         with --init       --vae --source-vae (it trains one for all)
         with --residual   --max-nmse
         without --init    --save-vae
         without sinkhorn  --epsilon
         without task-arithmetic  --base

The run, straight down (`main`): open the parents; match hidden units (ours); plan who meets whom
(Algorithm 1, line 1); get a codec; check that it can carry these weights; merge; report.
"""
if __name__ == "__main__":      # Ctrl-C during the imports: end without a traceback
    import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)
import contextlib, glob, json, math, os, re, shutil, sys, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from tqdm import tqdm

import align as ot
import lsmerge as ls
from chunking import (STOP, Checkpoint, CheckpointError, Layers, Matched, Output, appear,
                      check_output, command, create, is_selected, measure, need, place, spans)
from train import (MAX_NMSE, Schedule, describe_stage, gather, pick_device, rank_and_size, save_vae,
                   start_parser, train_vae)
from vae import VAEConfig

VERSION, CROSS = "2.0", "cross-shape"
REFERENCE = os.path.join(os.path.dirname(__file__), "experiments", "models", "vae.safetensors")
SAMPLES = 8             # draws of a self-merge: their noise shrinks by sqrt(8)
TOKENS = 4096           # of the vocabularies, that tell which place of the stream is which
STRANGERS = 0.1         # cosine of two models' weights: trained apart 0.00, experts of one base 0.9
GLANCE = 1 << 12        # weights of a tensor for that cosine, which is then right to 0.02
OTHER = "give another --align"
GATE_WEIGHTS = 1 << 16  # of a tensor, in windows evenly spread: the gate takes seconds


# --- The plan: what happens to each tensor of the target (paper: Algorithm 1, line 1) -------------
@dataclass(frozen=True)
class Task:
    """One tensor of the target."""
    name: str
    number: int             # its position in the target: part of every seed
    numel: int
    action: str             # "encoded", "averaged" (the same operator on the weights), "copied"
    parents: tuple          # (index, name there): 0 the target, i the i-th source
    slots: tuple = ()       # the parents' statistics, once they are measured
    why: str = ""           # if it is copied


def selected(checkpoint, pattern):
    """{name: shape} of the tensors to encode."""
    return {e.name: e.shape for e in checkpoint.entries.values() if is_selected(e, pattern)}


def plan_merge(target, sources, pattern=None, align="none", by="depth", control=None):
    """(kind, [Task, ...] in the target's natural order).

    kind: "cross-shape" if an encoded tensor of a parent differs in shape or is missing in another.
    What is not encoded is averaged where shapes are equal, nothing is aligned and no pattern was
    given; else it is the target's. (Under a null control too: a norm averaged with the source's
    would bring in what the control is there to keep out.)
    """
    encoded = selected(target, pattern)
    need(encoded, target.path, "no tensor is selected", "give --select a pattern that matches")
    names = [ot.same_names(target.entries, source.entries, encoded) for source in sources]
    same = all({found[n]: shape for n, shape in encoded.items()} == selected(source, pattern)
               for source, found in zip(sources, names))
    kind = "self" if not sources else "same-shape" if same else CROSS
    by_name = same or align == "units"
    if not by_name:     # layers by proportional depth, roles with their like
        mine = {name: place(name) for name in encoded}
        theirs = [{name: place(name) for name in selected(source, pattern)} for source in sources]
    pairs = names if by_name else [ot.pair_places(mine, found, by) for found in theirs]
    for source, found in zip(sources, pairs):
        need(found, source.path, "no tensor pairs with one of the target by layer and role",
             "names are unknown or ambiguous: see chunking.ROLES, or narrow --select")
    average = kind == "same-shape" and align == "none" and not control and pattern is None
    tasks, models = [], [target, *sources]      # a parent's number is its index in models
    for number, (name, entry) in enumerate(target.entries.items()):
        parents = [(0, name), *((k, p[name]) for k, p in enumerate(pairs, 1) if p.get(name))]
        alike = len(parents) == len(models) and all(
            models[k].entries[n].is_float and models[k].entries[n].shape == entry.shape
            for k, n in parents)
        action, why = "copied", "no such float in every source" if average else "not encoded"
        if name in encoded and (parents[1:] or not sources):
            action = "encoded"
        elif name in encoded:
            why = "no source has one partner of its role"
        elif average and alike:
            action = "averaged"
        parents = tuple(parents if action != "copied" else parents[:1])
        tasks.append(Task(name, number, entry.numel, action, parents, why=why))
    return kind, tasks


def measure_task(models, task):
    """The task with its statistics. Every float that enters the result is read once here, so that
    NaN and Inf are refused before any work. Equal shapes share the target's statistics: with an
    exact codec the merge is then exactly weight interpolation."""
    slots = []
    for k, name in task.parents:
        slot = models[k].entries[name]
        slot = measure(models[k], name) if slot.is_float else slot      # whole numbers are copied
        if slots and slot.shape == slots[0].shape:
            slot = replace(slot, mean=slots[0].mean, scale=slots[0].scale)
        slots.append(slot)
    return replace(task, slots=tuple(slots))


# --- Relatives (ours): sources in the order of the target's hidden units --------------------------
def match(target, source):
    """align.Match of two models, whose first tokens are the same. Raises CheckpointError where one
    shows no hidden units."""
    models, embeds = (source, target), []
    for model in models:
        found = [e for e in model.entries.values() if place(e.name) == (None, "embed")]
        need(found, model.path, "has no embedding: hidden units cannot be matched", OTHER)
        embeds.append(max(found, key=lambda entry: entry.numel))        # words, not positions
    rows = min(embed.shape[0] for embed in embeds)      # one of them may have been extended
    read, some = [], slice(None, None, -(-rows // TOKENS))
    for model, embed in zip(models, embeds):
        rows_of = spans(rows * embed.shape[1], embed.shape[1])[some]
        read.append(torch.stack([model.read(embed.name, *row) for row in rows_of]).float())
    both = [Layers(model, ot.AXES) for model in models]
    for model, layers in zip(models, both):     # fused matrices and experts show by what they lack
        lacking = {role for names in layers.names or [()] for role in {*ot.NEEDED} - {*names}}
        need(not lacking, model.path, f"a layer has no matrix for {', '.join(sorted(lacking))}: "
             "hidden units cannot be matched", OTHER)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)        # measured, 135 M weights: one takes 13 s, two take 24
    try:
        return ot.match_models(*both, *read)
    except (ValueError, LookupError, RuntimeError) as error:        # sizes that do not go together
        raise CheckpointError(source.path, " ".join(str(error).split()), OTHER) from None
    finally:
        torch.set_num_threads(threads)


def alike(one, other):
    """Mean cosine of the tensors that two models share by name and shape, as their units stand:
    0 for strangers, and for relatives whose units were permuted."""
    found = []
    for entry in filter(is_selected, one.entries.values()):
        if getattr(other.entries.get(entry.name), "shape", None) == entry.shape:
            dot, a, b = ls.inner([[model.read(entry.name, 0, GLANCE) for model in (one, other)]])
            found.append(float(dot) / (a * b) if a * b > 0 else 0.0)
    return sum(found) / max(1, len(found))


def relate(a, target, sources, kind):
    """Match hidden units, where shapes differ or it is asked for. Returns (sources as they enter,
    the method of alignment, the kinship of each source or None)."""
    if kind == "self" or kind == "same-shape" and a.align != "units":
        for source in sources if a.align == "auto" else ():
            if alike(target, source) < STRANGERS:
                print(f"note: {source.path} and the target are strangers as their hidden units "
                      "stand (cosine 0): --align units looks for another order")
        return sources, "none" if a.align == "auto" else a.align, None
    chunks = "gaussian" if a.align == "auto" else a.align       # what is left if nothing matches
    try:        # with a base one match, of target and base, serves all its experts
        found = [match(target, source) for source in (sources[-1:] if a.base else sources)]
    except CheckpointError as error:
        if a.align == "units" or a.base:
            raise
        print(f"note: {error}")
        return sources, chunks, None
    found = found * len(sources) if a.base else found       # one for each source
    for source, m in zip(sources, found):
        if not m.related:
            print(f"note: {source.path} is no relative of the target (its units match with cosine "
                  f"{max(m.similarity):.2f}, strangers with {m.null:.2f}): expect nothing of it")
    related = all(m.related for m in found)
    need(related or not a.base, target.path, "is no relative of --base", "drop --base")
    kinship = [{key: getattr(m, key) for key in ("related", "layers", "similarity", "null")}
               for m in found]
    if a.align == "units" or a.align == "auto" and related:     # asked for, even strangers match
        sources = [Matched(source, target, m, ot.AXES) for source, m in zip(sources, found)]
        return sources, "units", kinship
    return sources, chunks, kinship


# --- The run: what the command line and the files have decided ------------------------------------
@dataclass(frozen=True)
class Run:
    a: object               # the command line
    target: Checkpoint
    sources: list           # the base of a task arithmetic stands last
    kind: str
    align: str
    kinship: list | None    # one record per source, where hidden units were looked at
    tasks: list
    lam: list               # one per source proper
    how: ls.Alignment       # of chunks
    samples: int

    @property
    def models(self): return [self.target, *self.sources]

    def weights(self, task, pairs=None):
        """The parents' c_i; a source without a partner leaves its share to the target. pairs: an
        iterator over the two vectors' pieces, read only by slerp."""
        if self.a.operator == "task-arithmetic" and task.parents[1:]:
            return ls.task_coefficients(self.lam)
        if pairs and self.a.operator == "slerp" and task.action == "encoded":
            return ls.slerp_coefficients(self.lam[0], *ls.inner(pairs))
        return ls.convex_coefficients([self.lam[k - 1] for k, _ in task.parents[1:]])

    def in_weights(self, task):
        """Whether the weights themselves are combined (or copied): nothing to encode, no codec
        wanted, or only the target is left and all that the codec loses comes back."""
        alone = not any(self.weights(task)[1:]) and self.a.residual and not self.samples
        return task.action != "encoded" or self.a.space == "weight" or alone

    def parents(self, task, codecs):
        """The tensor's Parents. Noise is seeded by run, tensor and parent."""
        return [ls.Parent(partial(self.models[k].read, name), slot, codecs and codecs[k > 0],
                          self.samples, (self.a.seed, task.number, k))
                for (k, name), slot in zip(task.parents, task.slots)]


def spread(work, run, label):
    """[work(task) for every task], the largest first: split over the processes of a torchrun, in
    each one thread per core with a tensor of its own. Reading, computing and writing overlap, and
    no core waits for another after each small product. (Bytes do not depend on the threads.)"""
    rank, size = rank_and_size()
    order = sorted(range(len(run.tasks)), key=lambda n: -run.tasks[n].numel)[rank::size]
    threads, found, problem = torch.get_num_threads(), {}, None
    # Each thread holds a piece of every parent; a problem of Sinkhorn's fills its memory limit.
    count = 1 if run.how.method == "sinkhorn" else min(threads, 16)
    torch.set_num_threads(threads // count)
    pool = ThreadPoolExecutor(count)
    try:        # results in order, whichever ends first
        results = pool.map(work, [run.tasks[n] for n in order])
        with tqdm(total=sum(run.tasks[n].numel for n in order), desc=label, unit=" weights",
                  unit_scale=True, leave=False, disable=run.a.quiet or None) as bar:
            for n in order:
                found[n] = next(results)
                bar.update(run.tasks[n].numel)
    except BaseException as error:
        STOP.set()          # threads that read notice it
        problem = error
    finally:
        pool.shutdown(cancel_futures=True)      # waits for those that run
        torch.set_num_threads(threads)
        STOP.clear()
    parts = gather(None if problem else found)
    if problem or None in parts:        # an error in one process ends all
        raise problem or SystemExit(1)
    found = {n: result for part in parts for n, result in part.items()}
    return [found[n] for n in range(len(run.tasks))]


# --- The codec, and whether it can carry these weights --------------------------------------------
def load_codecs(a):
    """[the target's Codec, the sources'], first of all: a wrong file is noticed at once. One Codec
    for all, unless two are named."""
    paths = [path for path in (a.vae, a.source_vae) if path]
    found = [ls.Codec.load(path, pick_device(a.device), getattr(torch, a.dtype)) for path in paths]
    return found * 2 if len(found) == 1 else found


def train_codec(a, run):
    """With --init random: the paper's VAE, trained on the encoded tensors of all inputs."""
    schedule = Schedule(seed=a.seed, device=pick_device(a.device), dtype=a.dtype, quiet=a.quiet)
    # Of matched sources what they bring to the target's units is what will be encoded.
    parents = training_parents(run.models, run.tasks)
    vae, stages = train_vae(parents, VAEConfig(init="random"), schedule)
    print(*map(describe_stage, stages), sep="\n")
    if stages[-1]["ended"] == "interrupted":        # Ctrl-C: no merge with half a codec
        raise KeyboardInterrupt
    if a.save_vae and rank_and_size()[0] == 0:
        save_vae(a.save_vae, vae, stages, trained_on=[base_name(m.path) for m in run.models])
    return [ls.Codec(vae, schedule.device, getattr(torch, a.dtype))] * 2


def training_parents(models, tasks):
    """[(model, slots of its encoded tensors)], as `train_vae` takes them."""
    slots = [{} for _ in models]        # by name: one source tensor may meet two of the target
    for task in tasks:
        for (k, name), slot in zip(task.parents, task.slots if task.action == "encoded" else ()):
            slots[k][name] = slot
    return [(model, [*found.values()]) for model, found in zip(models, slots)]


def round_trip(run, codecs, task):
    """NMSE of D(E(w)) of each parent of an encoded tensor, on GATE_WEIGHTS of it."""
    errors = []
    for parent in run.parents(task, codecs) if task.action == "encoded" else ():
        slot, codec, width = parent.slot, parent.codec, parent.codec.C * parent.codec.T
        starts = range(0, slot.numel, width * max(1, slot.numel // GATE_WEIGHTS))
        flat_L = torch.cat([parent.read(start, start + width) for start in starts])
        decoded_L = codec.decode(codec.encode(flat_L, slot), slot, len(flat_L))
        apart_L = (decoded_L.cpu() - flat_L.float()).double() / slot.scale
        errors.append(apart_L.square().mean().item())
    return errors


def check_codec(run, codecs, bound):
    """(gates, round trip) for the report. A parent's NMSE is the mean over its encoded weights, in
    the unit that it is encoded in; a codec that loses more than the bound is refused before
    anything is merged. With --residual what is lost of an unaligned parent comes back: no gate."""
    if not codecs:          # --space weight
        return [], {"nmse": None, "worst": {"name": None, "nmse": None}}
    sums, count, worst, gates = Counter(), Counter(), {}, []        # worst: (NMSE, name) of each
    for task, errors in zip(run.tasks, spread(partial(round_trip, run, codecs), run, "check")):
        for (k, name), slot, nmse in zip(task.parents, task.slots, errors):
            sums[k], count[k] = sums[k] + nmse * slot.numel, count[k] + slot.numel
            if k not in worst or not nmse <= worst[k][0]:           # a NaN is the worst
                worst[k] = nmse, name
    names = ["target", *(f"source {i + 1}" for i in range(len(run.lam))), "base"]
    aligned = run.how != ls.Alignment() or (run.align, run.kind) == ("none", CROSS)
    free = run.a.residual and (not aligned or not any(run.lam))
    for k in sorted(count)[run.a.residual:] if not free else ():
        nmse, name = sums[k] / count[k], f"round trip of {names[k]}"
        need(nmse <= bound, name, f"the codec loses {nmse:.1%} of the variance (NMSE {nmse:.3g} > "
             f"{bound:g}); nothing was merged", "--vae exact, or a VAE trained for longer or at a "
             "lower ratio" + ", or raise --max-nmse" * (not run.a.residual), worst[k][1])
        gates.append({"name": name, "passed": True, "value": nmse, "bound": bound})
    return gates, {"nmse": sums[0] / count[0], "worst": dict(zip(("nmse", "name"), worst[0]))}


# --- The merge ------------------------------------------------------------------------------------
def merge_tensor(run, codecs, output, task):
    """Merge one tensor into the output. Returns (sums of squares, records of its transports)."""
    target, *sources = parents = run.parents(task, codecs)
    raw = ([parent.read(*span) for parent in parents] for span in spans(task.numel))
    plain, transports, squares = run.weights(task, raw), [], Counter()      # the c_i of raw weights
    if run.in_weights(task):        # the baseline, or a copy
        pieces = ls.weight_merge([parent.read for parent in parents], plain, target.slot)
    else:
        codes = ([parent.latents(*step) for parent in parents]
                 for step in spans(target.N, target.per_piece))
        weights = run.weights(task, codes)
        aligned = [ls.as_source(target, source, run.how, (*source.seed, 1)) for source in sources]
        transports = [source for source in aligned if isinstance(source, ls.Transport)]
        pieces = ls.ls_merge(target, aligned, weights, run.a.residual)
    for start, piece in pieces:
        output.put(task.name, start, piece.cpu())
        if task.action == "encoded":
            squares.update(distances(run, parents, plain, start, piece))
    return squares, [{"source": t.source.seed[-1], **t.report()} for t in transports]


def distances(run, parents, plain, start, piece):
    """Squared distances of a merged piece to the parents of its shape (read again, from the file
    cache) and to what the operator gives on raw weights; and the square of the target."""
    merged_L = piece.float()
    raw = {parent.seed[-1]: parent.read(start, start + len(piece)).to(piece.device).float()
           for parent in parents if parent.slot.shape == parents[0].slot.shape}
    apart = {"norm": raw[0], **{k: merged_L - other for k, other in raw.items()}}
    if run.kind == "same-shape" and run.a.space == "latent":
        apart["average"] = merged_L - ls.combine([*raw.values()], plain).to(piece.dtype).float()
    return {key: part.dot(part).item() for key, part in apart.items()}  # the caller adds in float64


# --- The report -----------------------------------------------------------------------------------
def base_name(path): return os.path.basename(os.path.normpath(path))


def make_report(run, codecs, gates, trip, results, clock):
    """The JSON report. Distances are Frobenius norms over the encoded tensors, over the target's;
    null where undefined. No paths: they mean nothing elsewhere."""
    squares, a, count = Counter(), run.a, Counter(task.action for task in run.tasks)
    for part, _ in results:
        squares.update(part)        # adds up
    norm, undefined = squares.pop("norm", 0), run.kind == CROSS and run.align != "units"    # shapes
    far = {key: math.sqrt(value / norm) for key, value in squares.items() if norm}
    average = 0.0 if a.space == "weight" else far.get("average")        # itself
    return {
        "version": VERSION, "inputs": [*map(base_name, a.models)], "output": base_name(a.output),
        "seed": a.seed, "samples": run.samples, "kind": run.kind, "lambda": run.lam,
        "ratio": codecs[0].vae.config.true_ratio if codecs else None, "operator": a.operator,
        "space": a.space, "align": run.align, "control": run.how.control,
        "tensors": {"encoded": count["encoded"], "averaged": count["averaged"],
                    "copied": count["copied"], "total": len(run.tasks),
                    "weights_encoded": sum(t.numel for t in run.tasks if t.action == "encoded"),
                    "weights_total": sum(task.numel for task in run.tasks)},
        "roundtrip": trip, "distance": {
            "to_target": far.get(0), "to_average": average if run.kind == "same-shape" else None,
            "to_source": [None if undefined else far.get(i + 1) for i in range(len(run.lam))]},
        "alignment": [record for _, records in results for record in records],
        "kinship": run.kinship, "gates": gates, "seconds": {
            stage: round(stop - start, 3) for stage, start, stop in zip(
                ("read and check", "codec", "merge and write"), clock, clock[1:])}}


def print_report(report, run, codecs):
    """For people: what was done, what it means, what to try next. All else is in --report."""
    far, lam = report["distance"], ", ".join(f"{value:g}" for value in run.lam) or "-"
    print("{kind}: {operator} in {space} space, align {align}, lambda {lam}{}".format(
        f", control {run.how.control}" if run.how.control else "", lam=lam, **report))
    print("tensors: {encoded} encoded + {averaged} averaged + {copied} copied = {total}; encoded: "
          "{weights_encoded:,} of {weights_total:,} weights".format(**report["tensors"]))
    copied = [task for task in run.tasks if task.action == "copied"]        # and why
    for why, number in Counter(task.why for task in copied).items():
        first = next(task.name for task in copied if task.why == why)
        print(f"  copied, {why}: {number}, the first is {first}")
    if codecs:
        names, trip = codecs[0].record.get("trained_on", ["the inputs"]), report["roundtrip"]
        others = f" and {len(names) - 1} others" if names[1:] else ""
        print("codec: exact and untrained, so that merging latents is averaging weights"
              if run.a.vae == "exact" else f"codec: {base_name(run.a.vae or 'a new VAE')}, r = "
              f"{report['ratio']:g}, trained on {names[0]}{others} (--vae exact: plain averaging)")
        print("round trip of the target: NMSE {nmse:.1e}, its worst tensor {worst:.1e}".format(
            nmse=trip["nmse"], worst=trip["worst"]["nmse"]))
    names = "the target", "the plain average", *(f"source {i + 1}" for i in range(len(run.lam)))
    shown = zip(names, (far["to_target"], far["to_average"], *far["to_source"]))
    print("distance, over the target's norm:", ", ".join(
        f"{value:.4f} to {name}" for name, value in shown if value is not None))
    if run.kind == "self" and run.samples:
        print(f"self-merging: the mean of {run.samples} draws from the posterior moved it so far")
    for source, kin in zip(run.sources, run.kinship or () if run.align == "units" else ()):
        found = [cosine for cosine, i in zip(kin["similarity"], kin["layers"]) if i is not None]
        print(f"{base_name(source.path)}: {len(found)} of {len(kin['layers'])} layers matched, "
              f"cosine at least {min(found, default=0):.2f} (strangers {kin['null']:.2f})")
    if report["alignment"]:
        spreads = sorted(record["std_ratio"] for record in report["alignment"])
        print(f"aligned: {len(spreads)} tensors, which keep {spreads[0]:.2f} to {spreads[-1]:.2f} "
              "of the target's spread (each in --report)")
    print("seconds:", ", ".join(f"{key} {value:.1f}" for key, value in report["seconds"].items()))


def recipe(run):
    """What the result's header says. No time, no path: equal runs give equal bytes."""
    facts = {"version": VERSION, "operator": run.a.operator, "space": run.a.space,
             "align": run.align, "control": run.how.control, "seed": run.a.seed,
             "lambda": ", ".join(f"{v:g}" for v in run.lam), "samples": run.samples,
             "residual": "yes" if run.a.residual else None}
    return {f"lsmerge.{key}": str(value) for key, value in facts.items() if value not in (None, "")}


def model_card(run, gates):
    """README.md of a result folder, in the Hub's format."""
    names = [base_name(path) for path in [*run.a.models, *filter(None, [run.a.base])]]
    rows = [f"| {key[8:]} | {value} |" for key, value in recipe(run).items()]
    rows += [f"| {gate['name']} | NMSE {gate['value']:.1e} |" for gate in gates]
    head = ["---", "base_model:", *(f"- {json.dumps(name)}" for name in names), "tags:", "- merge",
            "- lsmerge", "---", "", f"# {base_name(run.a.output)}", "",
            f"{', '.join(names)}, merged with LS-Merge; configuration and tokenizer of the first."]
    return "\n".join([*head, "", "| | |", "|---|---|", *rows, ""])


def print_plan(run):
    """--dry-run: who meets whom, and how much is written."""
    for task in run.tasks:
        partners = "".join(f" <- {run.models[k].path}: {n}" for k, n in task.parents[1:])
        print(f"  {task.name} {list(run.target.entries[task.name].shape)}: {task.action}{partners}")
    size = sum(e.numel * e.dtype.itemsize for e in run.target.entries.values())
    counts = Counter(task.action for task in run.tasks)
    said = " + ".join(f"{count} {action}" for action, count in counts.items())      # in order
    for source, kin in zip(run.sources, run.kinship or ()):
        print(f"kinship of {source.path}: {'' if kin['related'] else 'not '}related; cosine of the "
              f"matched units, {kin['null']:.2f} for strangers; target layer <- source layer")
        for j, (i, alike_) in enumerate(zip(kin["layers"], kin["similarity"])):
            print(f"  {j} <- {'none' if i is None else i}: {alike_:.3f}")
    print(f"{run.kind}, align {run.align}: {said} = {len(run.tasks)} tensors\n"
          f"{run.a.output}: {size:,} bytes of weights")


# --- The command line -----------------------------------------------------------------------------
def parse(argv):
    """The flags of the table above, which is what --help prints."""
    parser, add = start_parser("merge.py", __doc__, "base vae save-vae source-vae report",
                               "residual roundtrip dry-run")
    add("models", nargs="+")
    add("-o", "--output")
    add("--lam", "--lambda")
    add("--operator", choices=("lerp", "slerp", "soup", "task-arithmetic"), default="lerp")
    add("--space", choices=("latent", "weight"), default="latent")
    add("--align", choices=("auto", *ot.ALIGNERS, "units"), default="auto")
    add("--control", choices=ot.CONTROLS)
    add("--init", choices=("random",))
    for flag, kind in (("--samples", int), ("--epsilon", float), ("--max-nmse", float)):
        add(flag, type=kind)
    a = parser.parse_intermixed_args(argv)      # options and files in any order
    check_usage(a, parser)
    if not a.vae and not a.init and a.space == "latent":
        a.vae = REFERENCE
        need(os.path.exists(a.vae), a.vae, "the reference VAE is missing",
             "give --vae FILE, --vae exact or --init random")
    return a


def check_usage(a, parser):
    """What the command line alone decides; makes `lam` a number for each source."""
    n, lam = len(a.models) - 1, a.lam       # n sources, the base not among them
    given = {"--" + key.replace("_", "-"): value for key, value in vars(a).items()
             if value not in (None, False, parser.get_default(key), "auto", "none")}
    holds = {"without SOURCE": not n, "with --roundtrip": a.roundtrip, "with --init": a.init,
             "with --space weight": a.space == "weight", "without --init": not a.init,
             "with slerp": a.operator == "slerp", "with soup": a.operator == "soup",
             "without task-arithmetic": a.operator != "task-arithmetic",
             "without sinkhorn": a.align != "sinkhorn", "with --dry-run": a.dry_run,
             "with --residual": a.residual}
    for line in __doc__.split("change nothing:\n")[1].split("\n\n")[0].splitlines():
        case, flags = re.split("  +", line.strip())     # the table above is the rule
        useless = [flag for flag in flags.split() if flag in given]
        if holds[case] and useless:
            parser.error(f"{case} {useless[0]} would change nothing: drop it")
    try:
        a.lam = [float(value) for value in lam.split(",")] if lam is not None else []
        a.lam = a.lam * n if len(a.lam) == 1 else a.lam         # one for all
        (ls.task_coefficients if a.base else ls.convex_coefficients)(a.lam)       # in range?
    except ValueError as error:
        parser.error(f"--lam: {error}")
    numbers = a.epsilon, a.max_nmse, None if a.samples is None else a.samples + 1, a.seed + 1
    for holds, what in (
            (len(a.lam) in (0, n), f"--lam has {len(a.lam)} values for {n} sources"),
            (not a.roundtrip or n == 0, "--roundtrip takes the target alone"),
            (a.operator != "slerp" or n == 1, "--operator slerp takes TARGET and one SOURCE"),
            (a.operator != "task-arithmetic" or a.base, "--operator task-arithmetic needs --base"),
            ((a.samples or 0) <= 4096, "--samples must not exceed 4096: each is a whole encoding"),
            (all(number is None or 0 < number < 2 ** 32 for number in numbers),
             "--samples and --seed must be 0 or more, --epsilon and --max-nmse above 0")):
        if not holds:
            parser.error(what)


def companions(folder):
    """Files of a model folder that go with the weights: configuration, tokenizer, code, licence."""
    kept = r"^[^.].*\.(json|txt|model|jinja|py)$|^(LICEN[CS]E|NOTICE)"
    lost = r"index\.json$|^(optimizer|scheduler|trainer_state|adapter_config)"
    names = [n for n in sorted(os.listdir(folder)) if re.search(kept, n) and not re.search(lost, n)]
    return [os.path.join(folder, n) for n in names if os.path.isfile(os.path.join(folder, n))]


def open_run(a, codecs):
    """(Run, files that go into a result folder; None: the result is a file). What can be refused
    without reading weights is refused here."""
    target, *sources = [Checkpoint(path) for path in [*a.models, *filter(None, [a.base])]]
    folder = target.folder if not (a.output or "").endswith(".safetensors") else None
    need(folder or not (a.output or "").endswith(os.sep), a.output, "is a folder's name, and "
         f"{target.path} is a file", "give -o the name of a file")
    a.output = a.output or ("merged" if folder else "merged.safetensors")
    copies = companions(folder) if folder else None     # None: the result is a file
    inside = {"model.safetensors", "README.md", *map(base_name, copies)} if folder else None
    inputs = [file for model in (target, *sources) for file in model.files] + (copies or [])
    inputs += [file for codec in codecs for file in codec.files]        # a VAE is an input, too
    outputs = [path for path in (a.output, a.save_vae, a.report) if path and not a.dry_run]
    for i, path in enumerate(outputs):          # none is an input, and none lies in another
        check_output(path, inputs + outputs[:i], a.force, inside if path == a.output else None)
    kind = plan_merge(target, sources, a.select)[0]         # as they are
    need(kind != CROSS or a.space == "latent" and a.operator != "slerp", target.path, "its encoded "
         "tensors and a source's differ in shape or name", "drop --space weight, slerp: they need "
         "equal ones")
    need(kind == CROSS or not a.source_vae, a.source_vae, "equal shapes share one VAE",
         "drop --source-vae")
    need(kind != CROSS or not a.base or a.align in ("auto", "units"), "--base", "across shapes a "
         "difference needs matched hidden units", "--align units")
    for source in sources[:-1] if a.base and kind == CROSS else ():
        need(selected(source, a.select) == selected(sources[-1], a.select), source.path,
             f"differs in shape or name from its base {a.base}", "give the base of this expert")
        need(alike(source, sources[-1]) >= STRANGERS, source.path, f"is no relative of {a.base}: "
             "their difference is no skill", "give the base of this expert")
    sources, align, kinship = relate(a, target, sources, kind)
    tasks = plan_merge(target, sources, a.select, align, control=a.control)[1]  # as they enter
    n = len(a.models) - 1
    share = 0.1 / n if kind == CROSS and a.operator != "soup" else 1 / (n + 1)
    samples = a.samples if a.samples is not None else 0 if n or a.roundtrip else SAMPLES
    how = ls.Alignment("none" if align == "units" else align, a.control, a.epsilon or ot.EPSILON)
    lam = a.lam or [share] * n
    return Run(a, target, sources, kind, align, kinship, tasks, lam, how, samples), copies


@contextlib.contextmanager
def open_output(run, copies, gates):
    """The result, open for writing. Under torchrun the first process makes it, and all fill it."""
    path, entries, header = run.a.output, run.target.entries.values(), recipe(run)
    if rank_and_size()[0]:
        yield Output(gather(None)[0], entries, header)      # the first process's file
        return
    with create(path, entries, header, folder=copies is not None) as output:
        gather(output.path)             # the others wait for it
        folder = os.path.dirname(output.path)
        for file in copies or []:
            shutil.copyfile(file, os.path.join(folder, base_name(file)))
        if copies is not None:
            with open(os.path.join(folder, "README.md"), "w") as card:
                card.write(model_card(run, gates))
        yield output


def main(argv=None):
    a, clock = parse(argv), [time.perf_counter()]       # clock: when each part of the run ended
    codecs = load_codecs(a)
    run, copies = open_run(a, codecs)
    for left in glob.glob(os.path.join(glob.escape(os.path.dirname(a.output)), ".lsmerge-*")):
        print(f"note: {left} is of an unfinished run: delete it if none is running")
    if a.dry_run:
        return print_plan(run)
    run = replace(run, tasks=spread(partial(measure_task, run.models), run, "read"))
    clock.append(time.perf_counter())
    codecs = train_codec(a, run) if a.init else codecs
    gates, trip = check_codec(run, codecs, a.max_nmse or MAX_NMSE)     # refuses here or never
    clock.append(time.perf_counter())
    with open_output(run, copies, gates) as output:         # appears whole, or not at all
        results = spread(partial(merge_tensor, run, codecs, output), run, "merge")
        output.written = [n for part in gather(output.written) for n in part]
    clock.append(time.perf_counter())
    report = make_report(run, codecs, gates, trip, results, clock)      # for --report, and to print
    print_report(report, run, codecs)
    if a.report and rank_and_size()[0] == 0:
        with appear(a.report) as partial_path, open(partial_path, "w") as stream:
            json.dump(report, stream, indent=1, allow_nan=False)
    print(f"wrote {a.output}" + (f" and {len(copies)} companions of the target" if copies else ""))


if __name__ == "__main__":
    sys.exit(command(main))
