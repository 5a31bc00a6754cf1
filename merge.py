"""merge.py: the command.                                                          (read last)

    python merge.py TARGET [SOURCE ...] [options]

TARGET gives names, shapes, dtypes and companions of the result. A model is a .safetensors file, a folder
in the Hugging Face layout, or an index of shards. Without SOURCE the target is merged with itself.

what     --lam L[,L...]    weight of each source, the target has the rest; 0 is the target's round trip
                           (0.5 for one source, 1/(N+1) each for N; across shapes 0.1 in all: the paper's
                           best range is 0.05 to 0.2). --lambda is understood, too
         --operator NAME   lerp, slerp, soup (uniform), task-arithmetic: z_target + sum lambda (z_i -
                           z_base), lambda in [-10, 10] (lerp)
         --base MODEL      the sources' ancestor, for task-arithmetic
         --samples K       average K draws from each parent's posterior (8 without SOURCE; else 0, the mean)
         --select REGEX    what is merged, by name; all else stays the target's (floats of two or more
                           dimensions in numbered layers are encoded, norms and embeddings averaged)
how      --align NAME      auto, none, mean, gaussian, sinkhorn (auto: none, across shapes gaussian)
         --epsilon E       Sinkhorn's regularisation, over the largest cost (0.01)
         --control NAME    zero, noise, shuffled: a null control in the place of the source's latents
         --residual        add back what the codec lost: lambda = 0 is then the target, bit for bit
         --space weight    the same operator without the codec: the baseline
codec    --vae FILE|exact  a trained VAE; exact: the untrained one, LS-Merge = plain averaging (exact)
         --init random     instead: train the paper's VAE on the inputs first, in two stages
         --save-vae FILE   keep it
         --source-vae FILE a second VAE, for the sources' architecture
         --max-nmse X      refuse a codec whose round trip of a parent is worse (0.001)
         --roundtrip       encode and decode the target only
output   -o, --output PATH the result (merged.safetensors; merged/ if TARGET is a folder)
         --dry-run         print the plan, write nothing
         --report FILE     JSON report
         --force           overwrite an existing output, never an input
machine  --device NAME     auto, cpu, cuda (auto)
         --dtype NAME      float32, bfloat16: the codec's arithmetic (float32)
         --seed S, --quiet seed of all noise (0); no progress bars

The run, straight down (`main`): open the parents; plan who meets whom (paper: Algorithm 1, line 1); get a
codec; check that it can carry these weights; write what `ls_merge` yields, tensor by tensor; report.
"""
if __name__ == "__main__":      # Ctrl-C during the imports: end without a traceback
    import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)
import argparse, contextlib, json, math, os, shutil, sys, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from tqdm import tqdm

import align as ot
import lsmerge as ls
from chunking import (STOP, Checkpoint, CheckpointError, Output, Parser, Place, check_output, command,
                      create, is_selected, measure, need, place, read_json, spans)
from lsmerge import Alignment, Codec, Parent, Transport, bring, ls_merge
from train import (Schedule, add_common_arguments, describe_stage, gather, pick_device, rank_and_size,
                   save_vae, train_vae)
from vae import VAEConfig

VERSION = "2.0"
SAMPLES = 8             # draws of a self-merge
MAX_NMSE = 1e-3         # a relative error of 3 %; beyond it a language model's loss is seen to rise
GATE_WEIGHTS = 1 << 16  # of a tensor, in windows evenly spread: the gate then takes seconds
WORKERS = 16            # threads at most: each holds a piece of every parent


# --- The plan: what happens to each tensor of the target (paper: Algorithm 1, line 1) -------------
@dataclass(frozen=True)
class Task:
    """One tensor of the target."""
    name: str
    number: int             # its place in the target's order: part of every seed
    numel: int
    action: str             # "encoded", "averaged" (the same operator on the weights), "copied"
    partners: tuple = ()    # (index of the source, name there)
    slots: tuple = ()       # statistics: the target's, then one per partner
    common: int = 0         # averaged: so many leading elements (rows that both vocabularies have)
    why: str = ""           # of a tensor that is not encoded

    @property
    def indices(self):      # of the parents: 0 the target, i the i-th source
        return [0, *(i + 1 for i, _ in self.partners)]


def selected(checkpoint, pattern):
    return [entry.name for entry in checkpoint.entries.values() if is_selected(entry, pattern)]


def aliases(target, source, encoded):
    """{name in the target: name in the source}: the same, but for a leading part ('model.' and '', or
    a wrapper's prefix) where the encoded names differ in that and nothing else."""
    mine = theirs = ""
    for other in source.entries if encoded[0] not in source.entries else ():
        tail = os.path.commonprefix([encoded[0][::-1], other[::-1]])[::-1]
        old, new = encoded[0].removesuffix(tail), other.removesuffix(tail)
        if all(n.startswith(old) and new + n[len(old):] in source.entries for n in encoded):
            mine, theirs = old, new
    return {n: theirs + n[len(mine):] if n.startswith(mine) else n for n in target.entries}


def pair_names(source, encoded, pattern, by="depth"):
    """The same across shapes: layers by proportional depth, roles with their like. A role that stands
    twice in a layer has no partner."""
    groups = {}, {}
    for group, names in zip(groups, (encoded, selected(source, pattern))):
        for name in names:
            group.setdefault(place(name), []).append(name)
    mine, theirs = groups
    layers = [sorted({where.layer for where in group} - {None}) for group in groups]
    partner, pairs = {None: None}, {}
    if all(layers):
        found = ot.pair_layers(len(layers[1]), len(layers[0]), by)
        partner |= {here: layers[1][j] for here, j in zip(layers[0], found) if j is not None}
    for where, names in mine.items():
        known = where.layer in partner
        match = theirs.get(Place(partner[where.layer], where.role), []) if known else []
        if len(names) == len(match) == 1:
            pairs[names[0]] = match[0]
    return pairs


def common_part(mine, theirs):
    """Leading elements that two tensors share: all, or the common rows of two vocabularies, or 0."""
    if theirs is None or not theirs.is_float or len(mine.shape) != len(theirs.shape):
        return 0
    words = place(mine.name).role in ("embed", "head") and mine.shape[1:] == theirs.shape[1:]
    return min(mine.numel, theirs.numel) if words or mine.shape == theirs.shape else 0


def rest_task(task, target, sources, names):
    """A tensor that is not encoded, in a run of equal shapes: averaged as far as all parents go."""
    entry, partners, shares = target.entries[task.name], [], []
    for i, source in enumerate(sources):
        other = names[i][task.name]
        embeds = [n for n in source.entries if place(n) == Place(None, "embed")]
        if other not in source.entries and embeds and place(task.name) == Place(None, "head"):
            # A source without a head is tied: its largest embedding is its head.
            other = max(embeds, key=lambda n: source.entries[n].numel)
        partners.append((i, other))
        shares.append(common_part(entry, source.entries.get(other)))
    if not all(shares):
        lacking = ", ".join(source.path for source, share in zip(sources, shares) if not share)
        return replace(task, why=f"missing or of another shape in {lacking}")
    why = f"averaged in the first {min(shares):,} of {entry.numel:,} weights, which all have"
    return replace(task, action="averaged", partners=tuple(partners), common=min(shares),
                   why=why if min(shares) < entry.numel else "")


def plan_merge(target, sources, pattern=None, align="auto", by="depth", control=None):
    """(kind, method, [Task, ...] in the target's natural order).

    kind: "cross-shape" if an encoded tensor of any parent differs in shape or is missing in another.
    What is not encoded is averaged where shapes are equal, nothing is aligned and no pattern was given;
    else it is the target's. (Under a null control too: a norm averaged with the source's would bring
    in what the control is there to keep out.)
    """
    encoded = selected(target, pattern)
    need(encoded, target.path, "no tensor is selected", "give --select a pattern that matches")
    names = [aliases(target, source, encoded) for source in sources]
    shapes = {n: target.entries[n].shape for n in encoded}
    same = all({found[n]: shape for n, shape in shapes.items()}
               == {n: source.entries[n].shape for n in selected(source, pattern)}
               for source, found in zip(sources, names))
    kind = "self" if not sources else "same-shape" if same else "cross-shape"
    method = align if align != "auto" else "gaussian" if kind == "cross-shape" else "none"
    pairs = names if same else [pair_names(source, encoded, pattern, by) for source in sources]
    for source, found in zip(sources, pairs):
        need(found, source.path, "no tensor pairs with one of the target by layer and role",
             "names are unknown or ambiguous: see chunking.ROLES, or narrow --select")
    average = kind == "same-shape" and method == "none" and not control and pattern is None
    tasks = []
    for number, (name, entry) in enumerate(target.entries.items()):
        task = Task(name, number, entry.numel, "copied", why="copied, not encoded")
        partners = tuple((i, found[name]) for i, found in enumerate(pairs) if name in found)
        if name in shapes and (partners or not sources):
            task = replace(task, action="encoded", partners=partners, why="")
        elif name in shapes:
            task = replace(task, why=f"copied, no source has one partner of role {place(name).role}")
        elif average and entry.is_float:
            task = rest_task(task, target, sources, names)
        tasks.append(task)
    return kind, method, tasks


def measure_task(target, sources, task):
    """The task with its statistics. Every float that enters the result is read once here, so that NaN
    and Inf are refused before any work. Equal shapes share the target's statistics: with an exact codec
    the merge is then exactly weight interpolation."""
    slots = [measure(target, task.name)] if target.entries[task.name].is_float else []
    for index, name in task.partners:
        own = measure(sources[index], name)
        if own.shape == slots[0].shape:
            own = replace(own, mean=slots[0].mean, scale=slots[0].scale)
        slots.append(own)
    return replace(task, slots=tuple(slots))


def measure_slots(tasks, target, sources): return [measure_task(target, sources, t) for t in tasks]


# --- The run: what the command line and the files have decided ------------------------------------
@dataclass(frozen=True)
class Run:
    target: Checkpoint
    sources: list           # the base of a task arithmetic stands last
    kind: str
    tasks: list
    lam: list               # one per source proper
    operator: str
    space: str
    how: Alignment
    residual: bool
    samples: int
    seed: int
    quiet: bool

    def weights(self, task):
        """The parents' c_i; a source without a partner leaves its share to the target."""
        if self.operator == "task-arithmetic":
            return ls.task_weights(self.lam)
        return ls.convex_weights([self.lam[index] for index, _ in task.partners])

    def on_weights(self, task):
        """Whether the weights themselves are combined (or copied): nothing to encode, no codec wanted,
        or only the target is left and all that the codec loses comes back."""
        alone = not any(self.weights(task)[1:]) and self.residual and not self.samples
        return task.action != "encoded" or self.space == "weight" or alone

    def readers(self, task):
        """How to read the tensor of the target, and its partners."""
        pairs = [(self.target, task.name), *((self.sources[i], n) for i, n in task.partners)]
        return [partial(model.read, name) for model, name in pairs]

    def parents(self, task, codecs):
        """The same as Parents. Noise is seeded by run, tensor and parent."""
        return [Parent(read, slot, codecs[min(k, len(codecs) - 1)], self.samples, (self.seed, task.number, k))
                for read, slot, k in zip(self.readers(task), task.slots, task.indices)]


def spread(work, run, label):
    """[work(task) for every task], the largest first: split over the processes of a torchrun, and in
    each one thread per core with a tensor of its own. Reading, computing and writing overlap, and no
    core waits for another after each small product. (The bytes do not depend on the threads.)"""
    rank, size = rank_and_size()
    order = sorted(range(len(run.tasks)), key=lambda n: -run.tasks[n].numel)[rank::size]
    threads, found = torch.get_num_threads(), {}
    # A transport problem of Sinkhorn's fills its memory limit: one at a time.
    count = 1 if run.how.method == "sinkhorn" else min(threads, WORKERS)
    torch.set_num_threads(threads // count)
    pool = ThreadPoolExecutor(count)
    try:
        with tqdm(total=sum(run.tasks[n].numel for n in order), desc=label, unit="weights", leave=False,
                  unit_scale=True, disable=run.quiet or bool(rank) or None) as bar:
            for n, result in zip(order, pool.map(work, [run.tasks[n] for n in order])):
                found[n] = result
                bar.update(run.tasks[n].numel)
    except BaseException:
        STOP.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
        STOP.clear()
    found = {n: result for part in gather(found) for n, result in part.items()}
    return [found[n] for n in range(len(run.tasks))]


# --- The codec, and whether it can carry these weights --------------------------------------------
def load_codecs(a):
    """[the target's Codec, and the sources' if it is another], from files. First of all: a wrong file
    is noticed before any weight is read."""
    device, paths = pick_device(a.device), [path for path in (a.vae, a.source_vae) if path]
    return [Codec.load(path, device, getattr(torch, a.dtype)) for path in paths]


def train_codecs(a, run):
    """--init random: the paper's VAE, trained on the inputs."""
    size, device = rank_and_size()[1], pick_device(a.device)
    schedule = Schedule(seed=a.seed, device=device, dtype=a.dtype, quiet=a.quiet,
                        batch=-(-Schedule.batch // size) * size)
    parents = training_parents(run.target, run.sources, run.tasks)
    vae, stages = train_vae(parents, VAEConfig(init="random"), schedule)
    print(*map(describe_stage, stages), sep="\n")
    if stages[-1]["ended"] == "interrupted":
        raise KeyboardInterrupt
    if a.save_vae and rank_and_size()[0] == 0:
        save_vae(a.save_vae, vae, stages)
    return [Codec(vae, device, getattr(torch, a.dtype))]


def training_parents(target, sources, tasks):
    """[(checkpoint, slots of its encoded tensors)], as `train_vae` takes them."""
    slots = [{} for _ in (target, *sources)]
    for task in tasks if tasks else []:
        if task.action == "encoded":
            for k, slot in zip(task.indices, task.slots):
                slots[k][slot.name] = slot
    return [(model, list(found.values())) for model, found in zip((target, *sources), slots)]


def round_trip(run, codecs, task):
    """NMSE of D(E(w)) of each parent of an encoded tensor, on GATE_WEIGHTS of it."""
    errors = []
    for parent in run.parents(task, codecs) if task.action == "encoded" else []:
        width, numel = parent.codec.C * parent.codec.T, parent.slot.numel
        starts = range(0, numel, width * max(1, numel // GATE_WEIGHTS))
        flat_L = torch.cat([parent.read(start, start + width) for start in starts])
        z_NZ = parent.codec.encode(flat_L, parent.slot)
        apart_L = parent.codec.decode(z_NZ, parent.slot, len(flat_L)) - flat_L.to(z_NZ.device).float()
        errors.append((apart_L.double() / parent.slot.scale).square().mean().item())
    return errors


def check_codec(run, codecs, bound):
    """(gates, round trip) of the report. A parent's NMSE is the mean over its encoded weights; a codec
    that loses more than the bound is refused, before anything is merged. With --residual no parent that
    enters unaligned can be broken by the codec: its error comes back."""
    found = spread(partial(round_trip, run, codecs), run, "check the codec")
    sums, weights, worst, gates = Counter(), Counter(), {"name": None, "nmse": None}, []
    for task, errors in zip(run.tasks, found):
        for k, slot, nmse in zip(task.indices, task.slots, errors):
            sums[k], weights[k] = sums[k] + nmse * slot.numel, weights[k] + slot.numel
            if not nmse <= (worst["nmse"] or -1):
                worst = {"name": slot.name, "nmse": nmse}
    names = ["target", *(f"source {i + 1}" for i in range(len(run.lam))), "base"]
    for k in sorted(sums) if not (run.residual and run.how == Alignment(epsilon=run.how.epsilon)) else []:
        nmse = sums[k] / weights[k]
        gates.append({"name": f"round trip of {names[k]}", "passed": True, "value": nmse, "bound": bound})
        need(nmse <= bound, f"round trip of {names[k]}", f"this codec loses {nmse:.1%} of the variance (NMSE "
             f"{nmse:.3g} > {bound:g}); nothing was merged", "use --vae exact, a VAE trained for longer or at "
             "a lower ratio, --residual, or raise --max-nmse", worst["name"])
    return gates, {"nmse": sums[0] / weights[0] if weights else None, "worst": worst}


# --- The merge ------------------------------------------------------------------------------------
def combine_weights(readers, weights, task, entry):
    """The operator on raw weights: a stream of pieces like `ls_merge`'s. Copies what is copied."""
    common = task.common if task.action == "averaged" else entry.numel
    wide = torch.promote_types(entry.dtype, torch.float32)
    rest = [(common + i, common + j) for i, j in spans(entry.numel - common)]
    for start, stop in [*spans(common), *rest] if common < entry.numel else spans(common):
        alone = not any(weights[1:]) or start >= common > 0
        raw = [read(start, stop) for read in (readers[:1] if alone else readers)]
        yield start, raw[0] if alone else ls.cast(ls.combine([w.to(wide) for w in raw], weights), entry)


def merge_tensor(run, codecs, output, task):
    """Merge one tensor into the output. Returns (sums of squares, records of its transports)."""
    entry, readers, transports = run.target.entries[task.name], run.readers(task), []
    weights = plain = run.weights(task)         # plain: the c_i of the same operator on raw weights
    squares = Counter()
    if run.operator == "slerp" and task.action == "encoded":
        plain = ls.slerp_weights(weights[1], *ls.inner([read(*s) for read in readers] for s in spans(task.numel)))
    if run.on_weights(task):
        pieces = combine_weights(readers, plain, task, entry)
    else:
        target, *sources = run.parents(task, codecs)
        if run.operator == "slerp":
            codes = ([p.latents(*s) for p in (target, *sources)] for s in spans(target.N, target.step))
            weights = ls.slerp_weights(weights[1], *ls.inner(codes))
        aligned = [bring(target, source, run.how, (*source.seed, 1)) for source in sources]
        transports = [source for source in aligned if isinstance(source, Transport)]
        pieces = ls_merge(target, aligned, weights, run.residual)
    try:
        for start, piece in pieces:
            output.put(task.name, start, piece.cpu())
            if task.action == "encoded":
                squares.update(distances(run, task, readers, plain, start, piece))
    except ValueError as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(
            "alignment", str(error), "raise --epsilon", task.name) from None
    return squares, [{"source": t.source.seed[-1], **t.record()} for t in transports]


def distances(run, task, readers, plain, start, piece):
    """Squared distances of a merged piece to the parents of its shape (read again, from the system's
    file cache) and to what the operator gives on raw weights; and the square of the target."""
    merged_L = piece.float()
    raw = {k: read(start, start + len(piece)).to(piece.device).float()
           for k, slot, read in zip(task.indices, task.slots, readers) if slot.shape == task.slots[0].shape}
    apart = {"norm": raw[0], **{k: merged_L - other for k, other in raw.items()}}
    if run.kind == "same-shape" and run.space == "latent":
        apart["average"] = merged_L - ls.combine([*raw.values()], plain).to(piece.dtype).float()
    return {key: part.double().dot(part.double()).item() for key, part in apart.items()}


# --- The report -----------------------------------------------------------------------------------
def base_name(path): return os.path.basename(os.path.normpath(path))


def make_report(a, run, codecs, gates, trip, results, seconds):
    """The JSON report. Distances are Frobenius norms over the encoded tensors, over the target's norm;
    null where undefined. No paths: they mean nothing elsewhere."""
    squares, count = sum((found for found, _ in results), Counter()), Counter(t.action for t in run.tasks)
    norm = squares.pop("norm", 0)
    far = {key: math.sqrt(value / norm) for key, value in squares.items() if norm}
    encoded = sum(task.numel for task in run.tasks if task.action == "encoded")
    average = 0.0 if run.space == "weight" else far.get("average")
    return {
        "version": VERSION, "inputs": [base_name(path) for path in a.models],
        "output": base_name(a.output), "seed": run.seed, "samples": run.samples, "kind": run.kind,
        "ratio": codecs[0].vae.config.true_ratio if codecs else None, "lambda": run.lam,
        "operator": run.operator, "space": run.space, "align": run.how.method, "control": run.how.control,
        "tensors": {**{action: count[action] for action in ("encoded", "averaged", "copied")},
                    "total": len(run.tasks), "weights_encoded": encoded,
                    "weights_total": sum(task.numel for task in run.tasks)},
        "roundtrip": trip,
        "distance": {"to_target": far.get(0), "to_average": average if run.kind == "same-shape" else None,
                     "to_source": [far.get(i + 1) if run.kind != "cross-shape" else None
                                   for i in range(len(run.lam))]},
        "alignment": [record for _, records in results for record in records], "kinship": None,
        "gates": gates, "seconds": {key: round(value, 3) for key, value in seconds.items()}}


def print_report(report, run):
    """For people: what was done, and what it means."""
    tensors, d, lam = report["tensors"], report["distance"], ", ".join(f"{v:g}" for v in run.lam) or "-"
    print(f"{report['kind']}: {report['operator']} in {report['space']} space, lambda {lam}, align "
          f"{report['align']}, control {report['control'] or 'none'}, r = {report['ratio'] or '-'}")
    print(f"tensors: {tensors['encoded']} encoded + {tensors['averaged']} averaged + {tensors['copied']} copied "
          f"= {tensors['total']}; encoded: {tensors['weights_encoded']:,} of {tensors['weights_total']:,} weights")
    for why in dict.fromkeys(task.why for task in run.tasks if task.why):
        names = [task.name for task in run.tasks if task.why == why]
        print(f"  {why}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
    far = {"the target": d["to_target"], "the plain average": d["to_average"],
           **{f"source {i + 1}": value for i, value in enumerate(d["to_source"])}}
    print("distance, over the target's norm:", ", ".join(
        f"{value:.4f} to {name}" for name, value in far.items() if value is not None))
    if run.kind == "self" and run.samples:
        print(f"self-merging: the mean of {run.samples} draws from the posterior, which move the weights by "
              f"{d['to_target'] or 0:.2%} of their norm")
    for key in ("cost_before", "cost_after", "std_ratio", "n_over_d") if report["alignment"] else ():
        values = sorted(record[key] for record in report["alignment"])
        print(f"alignment: {key} {values[len(values) // 2]:.3g} [{values[0]:.3g}, {values[-1]:.3g}]")
    for gate in report["gates"]:
        print(f"gate passed: {gate['name']}: NMSE {gate['value']:.2e} (bound {gate['bound']:.0e})")
    print("seconds:", ", ".join(f"{stage} {value:.1f}" for stage, value in report["seconds"].items()))


def recipe(run):
    """What the result says of itself in its header. No time, no path: equal runs give equal bytes."""
    facts = {"version": VERSION, "operator": run.operator, "space": run.space, "align": run.how.method,
             "control": run.how.control, "lambda": ", ".join(f"{v:g}" for v in run.lam), "seed": run.seed,
             "samples": run.samples, "residual": "yes" if run.residual else None}
    return {f"lsmerge.{key}": str(value) for key, value in facts.items() if value not in (None, "")}


def model_card(a, run, gates):
    """README.md of a result folder, in the Hub's format."""
    names = [base_name(path) for path in [*a.models, *filter(None, [a.base])]]
    rows = [f"| {key[8:]} | {value} |" for key, value in recipe(run).items()]
    rows += [f"| {gate['name']} | NMSE {gate['value']:.1e} |" for gate in gates]
    lines = ["---", "base_model:", *(f"- {json.dumps(name)}" for name in names), "tags:", "- merge",
             "- lsmerge", "---", "", f"# {base_name(a.output)}", "",
             f"{', '.join(names)}, merged with LS-Merge. Names, shapes, dtypes, tokenizer and configuration "
             f"are those of {names[0]}.", "", "| | |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def print_notes(run, folder):
    left = [name for name in sorted(os.listdir(folder)) if name.startswith(".lsmerge-")]
    if left:
        print(f"note: {folder} holds {', '.join(left)} of an unfinished run: delete what no run needs")
    if run.kind == "cross-shape":
        print("note: a merge across shapes: unrelated models have nothing to give each other (README)")


def print_plan(a, run):
    """--dry-run: who meets whom, and how much is written."""
    for task in run.tasks:
        if task.action == "encoded":
            partners = [f" <- {run.sources[i].path}: {name}" for i, name in task.partners]
            print(f"  {task.name} {list(run.target.entries[task.name].shape)}{''.join(partners)}")
    count = Counter(task.action for task in run.tasks)
    size = sum(e.numel * e.dtype.itemsize for e in run.target.entries.values())
    print(f"{run.kind}, align {run.how.method}: {count['encoded']} encoded + {count['averaged']} averaged + "
          f"{count['copied']} copied = {len(run.tasks)} tensors\noutput: {a.output}, {size:,} bytes of weights")


# --- The command line -----------------------------------------------------------------------------
def parse(argv):
    """The flags of the table above, which is also what --help prints."""
    parser = Parser(prog="merge.py", usage=argparse.SUPPRESS, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = partial(parser.add_argument, help=argparse.SUPPRESS)
    add("models", nargs="+", metavar="MODEL")
    for flag in ("--base", "--vae", "--save-vae", "--source-vae", "--report"):
        add(flag)
    for flag in ("--residual", "--roundtrip", "--dry-run"):
        add(flag, action="store_true")
    add("-o", "--output")
    add("--lam", "--lambda")
    add("--operator", choices=("lerp", "slerp", "soup", "task-arithmetic"), default="lerp")
    add("--space", choices=("latent", "weight"), default="latent")
    add("--samples", type=int)
    add("--align", choices=("auto", *ot.ALIGNERS))
    add("--epsilon", type=float)
    add("--control", choices=ot.CONTROLS)
    add("--init", choices=("random",))
    add("--max-nmse", type=float)
    add_common_arguments(add)
    a = parser.parse_intermixed_args(argv)
    check_usage(a, parser)
    if a.space == "latent" and not a.init:
        a.vae = a.vae or "exact"
    return a


def check_usage(a, parser):
    """What the command line alone decides; makes `lam` a number for each source."""
    n, beyond = len(a.models) - 1, a.align not in (None, "auto", "none") or a.control or a.samples
    given = {"--" + key.replace("_", "-") for key, value in vars(a).items()
             if value not in (None, False, parser.get_default(key))}
    codec = given & {"--vae", "--init", "--save-vae", "--source-vae", "--align", "--epsilon", "--control",
                     "--residual", "--roundtrip", "--max-nmse", "--samples", "--device", "--dtype"}
    paired = given & {"--lam", "--align", "--control", "--source-vae", "--operator", "--space", "--base"}
    for broken, what in (
            (a.roundtrip and n, "--roundtrip takes the target alone"),
            (not n and paired, f"there is no SOURCE: drop {', '.join(sorted(paired))}"),
            (a.roundtrip and a.samples, "--roundtrip draws no samples: drop one of them"),
            (not 0 <= (a.samples or 0) <= 4096, "--samples must lie between 0 and 4096"),
            (a.operator == "slerp" and n != 1, "--operator slerp takes TARGET and one SOURCE"),
            (a.operator == "slerp" and beyond, "--operator slerp takes posterior means that meet chunk by "
             "chunk: drop --align, --control, --samples"),
            (a.operator == "soup" and a.lam, "--operator soup weighs all parents alike: drop --lam"),
            ((a.operator == "task-arithmetic") != bool(a.base), "--base goes with task-arithmetic"),
            (a.dry_run and a.report, "--dry-run makes no report: drop --report"),
            (a.space == "weight" and codec, f"--space weight uses no codec: drop {', '.join(sorted(codec))}"),
            (a.vae and a.init, "--init trains a VAE, --vae brings one: drop one of them"),
            (a.save_vae and not a.init, "--save-vae keeps a VAE trained here: it goes with --init"),
            (a.source_vae and not a.vae, "--source-vae needs --vae for the target"),
            (a.epsilon is not None and not (a.align == "sinkhorn" and 0 < a.epsilon < math.inf),
             "--epsilon must be above 0 and goes with --align sinkhorn"),
            (a.max_nmse is not None and not (0 < a.max_nmse < math.inf and not a.residual),
             "--max-nmse must be above 0; --residual needs none")):
        if broken:
            parser.error(what)
    try:
        a.lam = [float(value) for value in a.lam.split(",")] if a.lam else []
        a.lam = a.lam * n if len(a.lam) == 1 else a.lam
        (ls.task_weights if a.base else ls.convex_weights)(a.lam)
    except ValueError as error:
        parser.error(f"--lam: {error}")
    if len(a.lam) not in (0, n):
        parser.error(f"--lam has {len(a.lam)} values for {n} sources: give one, or one each")


def companions(folder):
    """Files of a model folder that go with the weights: configuration, tokenizer, templates, licence.
    Not: weights in any format and their indexes, the state of a training, hidden files, the card."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz",
               ".index.json", ".tmp", ".lock")
    state = ".", "optimizer", "scheduler", "rng_state", "trainer_state", "training_args", "events.out"
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))
            if not name.endswith(weights) and not name.startswith(state) and name != "README.md"
            and os.path.isfile(os.path.join(folder, name))]


def open_run(a):
    """The Run, and the files that go into a result folder (None: the result is a file). All that can
    be refused without reading weights is refused here."""
    target, *sources = models = [Checkpoint(path) for path in [*a.models, *filter(None, [a.base])]]
    for config in [os.path.join(model.folder, "config.json") for model in models if model.folder]:
        need(not os.path.isfile(config) or not read_json(config).get("quantization_config"), config,
             "the model is quantised", "use the original 16- or 32-bit checkpoint")
    folder = target.folder if not (a.output or "").endswith(".safetensors") else None
    a.output = a.output or ("merged" if folder else "merged.safetensors")
    copies = companions(folder) if folder else None
    inside = {"model.safetensors", "README.md", *map(base_name, copies)} if folder else None
    inputs = [file for model in models for file in model.files] + (copies or [])
    inputs += [file for file in (a.vae, a.source_vae) if file and file != "exact"]
    outputs = [path for path in (a.output, a.save_vae, a.report) if path and not a.dry_run]
    for path in outputs:
        check_output(path, inputs, a.force, inside if path == a.output else None)
    need(len({*map(os.path.realpath, outputs)}) == len(outputs), a.output, "two outputs in one place",
         "give each its own")
    kind, method, tasks = plan_merge(target, sources, a.select, a.align or "auto", control=a.control)
    equal = [flag for flag, is_given in (("--space weight", a.space == "weight"), ("task arithmetic", a.base),
                                         ("slerp", a.operator == "slerp")) if is_given]
    need(not equal or kind != "cross-shape", a.models[0], "encoded tensors of the models differ in shape or "
         f"name, {' and '.join(equal)} needs equal ones", "choose another operator or another model")
    need(not a.source_vae or kind == "cross-shape", a.source_vae, "equal shapes share one VAE",
         "drop --source-vae")
    n = len(a.models) - 1
    share = 0.1 / n if kind == "cross-shape" and a.operator != "soup" else 1 / (n + 1)
    samples = a.samples if a.samples is not None else 0 if n or a.roundtrip else SAMPLES
    how = Alignment(method, a.control, a.epsilon or ot.EPSILON)
    return Run(target, sources, kind, tasks, a.lam or [share] * n, a.operator, a.space, how, a.residual, samples,
               a.seed, a.quiet), copies


@contextlib.contextmanager
def open_output(a, run, copies, gates):
    """The result, open for writing. Under torchrun the first process makes it, and all fill it."""
    entries, header = run.target.entries.values(), recipe(run)
    if rank_and_size()[0]:
        yield Output(gather(None)[0], entries, header)
        return
    with create(a.output, entries, header, folder=copies is not None) as output:
        gather(output.path)
        folder = os.path.dirname(output.path)
        for file in copies or []:
            shutil.copyfile(file, os.path.join(folder, base_name(file)))
        if copies is not None:
            with open(os.path.join(folder, "README.md"), "w") as card:
                card.write(model_card(a, run, gates))
        yield output


def main(argv=None):
    a, clock = parse(argv), [time.perf_counter()]
    codecs = load_codecs(a)
    run, copies = open_run(a)
    print_notes(run, os.path.dirname(os.path.realpath(a.output)))
    if a.dry_run:
        return print_plan(a, run)
    run = replace(run, tasks=spread(partial(measure_task, run.target, run.sources), run, "read"))
    clock.append(time.perf_counter())
    codecs = train_codecs(a, run) if a.init else codecs
    gates, trip = check_codec(run, codecs, a.max_nmse or MAX_NMSE) if codecs else ([], {"nmse": None})
    clock.append(time.perf_counter())
    with open_output(a, run, copies, gates) as output:
        results = spread(partial(merge_tensor, run, codecs, output), run, "merge")
        output.written = [n for part in gather(output.written) for n in part]
    clock.append(time.perf_counter())
    seconds = dict(zip(("read and check", "codec", "merge"), (t - s for s, t in zip(clock, clock[1:]))))
    report = make_report(a, run, codecs, gates, trip, results, seconds)
    if rank_and_size()[0] == 0:
        print_report(report, run)
        if a.report:
            with open(a.report + ".tmp", "w") as stream:
                json.dump(report, stream, indent=1, allow_nan=False)
            os.replace(a.report + ".tmp", a.report)
        print(f"wrote {a.output}" + (f" and {len(copies)} companions of the target" if copies else ""))


if __name__ == "__main__":
    sys.exit(command(main))
