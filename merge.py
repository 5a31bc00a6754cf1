"""merge.py: the command.                                                              (read last)

    python merge.py TARGET [SOURCE ...] [options]

Decides which tensors meet (`plan_merge`), gets a VAE (from a file, or trained on the inputs), streams the merged
tensors into a new file (`ls_merge`, one tensor after another), checks itself on the user's own weights (`gates`), and
reports. Nothing mathematical here. lambda = 0 is the target's round trip, lambda = 1 the source's.
"""
import contextlib, functools, json, math, os, re, shlex, subprocess, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

import align as ot
from chunking import (STOP, Adapter, Checkpoint, CheckpointError, FactorFile, Folded, Parser, Place, TensorFile, check_output, command,
                      companions, file_sha256, is_adapter, is_selected, measure, need, open_checkpoint, place, plan_file, spans, tensors_sha256, write_checkpoint,
                      write_folder, write_tensors)
from lsmerge import (GATE_WINDOWS, Alignment, Codec, Parent, Tally, cast, convex_weights, greedy_soup, inner, lerp, ls_merge, round_trip,
                     slerp_weights, task_weights)
from train import Schedule, add_machine_arguments, agree, describe_stage, gather, pick_device, rank_and_size, train_vae, vae_file
from vae import VAE, VAEConfig

VERSION = "1.0"
OPERATORS = ("lerp", "slerp", "soup", "greedy-soup", "task-arithmetic")
SAMPLES = 8                     # of a self-merge
MAX_NMSE = 1e-3                 # a relative error of 3 %: what a language model just tolerates
OVERHEAD, PER_PARENT = 10, 13   # MiB, measured: the network at work; a piece of a parent in all its forms, per thread
WORKERS = 16                    # threads at most: each holds a piece of every parent, about 13 MiB


# --- The plan: what happens to each tensor of the target (paper: Algorithm 1, line 1) --------------------------------
@dataclass(frozen=True)
class Task:
    """One tensor of the target. `partners`: (index of the source, the name there); `slots`: the target's, then one per
    partner. `why` says what a reader of the report would ask about a tensor that was not encoded."""
    name: str
    action: str                 # "encoded", "averaged" (the same operator on the weights) or "copied"
    partners: tuple = ()
    slots: tuple = ()
    why: str = ""
    common: int | None = None       # averaged: only so many leading elements (the rows that both vocabularies have)
    # Index of each parent (and of its slot): 0 the target, i the i-th source.
    indices = property(lambda self: [0, *(i + 1 for i, _ in self.partners)])


def pair_names(target, source, names, pattern, by="depth"):
    """Name in the source for each of the target's encoded names, or None: proportional depth, equal role."""
    def by_place(checkpoint, chosen):
        places = {}
        for name in chosen:
            places.setdefault(place(name), []).append(name)
        return places
    mine = by_place(target, names)
    theirs = by_place(source, [e.name for e in source.entries.values() if is_selected(e, pattern)])
    layers = [sorted({p.layer for p in places if p.layer is not None}) for places in (mine, theirs)]
    partner = {None: None}
    if all(layers):
        chosen = ot.pair_layers(len(layers[1]), len(layers[0]), by)
        partner |= {layer: None if j is None else layers[1][j] for layer, j in zip(layers[0], chosen)}
    pairs = {}
    for where, group in mine.items():
        match = theirs.get(replace(where, layer=partner.get(where.layer)), [])
        unique = len(group) == len(match) == 1 and (where.layer is None) == (partner.get(where.layer) is None)
        for name in group:
            pairs[name] = match[0] if unique else None
    return pairs


def spelling(target, source, names):
    """(leading part in the target, in the source) where names differ in nothing else: 'model.' and '', or a wrapper's prefix."""
    if not any(name in source.entries for name in names):
        for other in source.entries:
            tail = os.path.commonprefix([names[0][::-1], other[::-1]])
            mine, theirs = names[0][:len(names[0]) - len(tail)], other[:len(other) - len(tail)]
            if all(n.startswith(mine) and theirs + n[len(mine):] in source.entries for n in names):
                return mine, theirs
    return "", ""


def twins(target):
    """{head: embedding} that the target stores twice with equal values: tied, and to stay so."""
    entries, found = target.entries, {}
    roles = {role: [n for n in entries if place(n) == Place(None, role)] for role in ("head", "embed")}
    for head, embed in ((h, e) for h in roles["head"] for e in roles["embed"]):
        if (entries[head].shape, entries[head].dtype) == (entries[embed].shape, entries[embed].dtype) and all(
                torch.equal(target.read(head, *span), target.read(embed, *span)) for span in spans(entries[head].numel)):
            found[head] = embed
    return found


def shared(mine, theirs):
    """Leading elements that two tensors have in common: all where shapes agree, whole rows of two vocabularies, else 0."""
    if theirs is None or not theirs.is_float or mine.shape[1:] != theirs.shape[1:] or len(mine.shape) != len(theirs.shape):
        return 0
    return min(mine.numel, theirs.numel) if mine.shape == theirs.shape or place(mine.name).role.split(".")[0] in ("embed", "head") else 0


def rest_task(entry, sources, names, tied):
    """What happens, in a run of equal shapes, to a tensor that is not encoded."""
    partners = tuple((i, names[i](tied.get(entry.name, entry.name))) for i in range(len(sources)))
    common = [shared(entry, sources[i].entries.get(name)) for i, name in partners]
    if not all(common):
        lacking = [source.path for source, count in zip(sources, common) if not count]
        return Task(entry.name, "copied", why=f"missing or of another shape in {', '.join(lacking)}")
    rows = f"{min(common) * entry.shape[0] // entry.numel} of {entry.shape[0]} rows are common, the others the target's" if min(common) < entry.numel else ""
    return Task(entry.name, "averaged", partners, why=rows or ("tied: as the embedding" if entry.name in tied else ""), common=min(common))


def plan_merge(target, sources, pattern=None, align="auto", by="depth", control=None):
    """(kind, alignment method, [Task, ...] in the target's natural order).  Raises CheckpointError.

    A run is cross-shape if an encoded tensor of any parent differs in shape or is missing in another. Everything that is not
    encoded is averaged in weight space where shapes are equal and nothing is aligned, else it is the target's. Under a
    null control too: a norm averaged with the source's would bring in what the control is there to keep out.
    """
    encoded = [e.name for e in target.entries.values() if is_selected(e, pattern)]
    need(encoded, target.path, "no tensor is selected", "give --select a pattern that matches its names")
    tied = twins(target)
    for pair in tied.items():
        need(not set(encoded) & {*pair}, target.path, f"is tied to {pair[1]!r}, which encoding would undo", "narrow --select", pair[0])
    prefixes = [spelling(target, source, encoded) for source in sources]
    names = [lambda name, mine=mine, theirs=theirs: theirs + name[len(mine):] if name.startswith(mine) else name for mine, theirs in prefixes]
    fits = lambda source, mine, theirs: theirs in source.entries and (
        source.entries[theirs].is_float and source.entries[theirs].shape == target.entries[mine].shape)
    same = all({names[i](name) for name in encoded} == {e.name for e in source.entries.values() if is_selected(e, pattern)}
               and all(fits(source, name, names[i](name)) for name in encoded) for i, source in enumerate(sources))
    kind = "self" if not sources else "same-shape" if same else "cross-shape"
    method = align if align != "auto" else "gaussian" if kind == "cross-shape" else "none"
    pairs = [{n: names[i](n) for n in encoded} if same else pair_names(target, s, encoded, pattern, by) for i, s in enumerate(sources)]
    for source, paired in zip(sources, pairs):
        need(any(paired.values()), source.path, "no tensor pairs with one of the target by layer and role",
             "names are unknown or ambiguous: see chunking.ROLES, or narrow --select")
    mixed = kind == "same-shape" and method == "none" and not control
    tasks, chosen = [], set(encoded)
    for name, entry in target.entries.items():
        if name in chosen:
            partners = tuple((i, paired[name]) for i, paired in enumerate(pairs) if paired[name])
            lonely = sources and not partners
            tasks.append(Task(name, "copied", why=f"no source has a single partner for role {place(name).role!r}") if lonely
                         else Task(name, "encoded", partners))
        elif mixed and entry.is_float:
            tasks.append(rest_task(entry, sources, names, tied))
        else:
            tasks.append(Task(name, "copied", why="not encoded" if entry.is_float else "not a float"))
    return kind, method, tasks


def measure_task(task, target, sources):
    """The task with its statistics. Every float that enters the result is read once here, so that NaN and Inf are refused
    before any work. Equal shapes share the target's statistics; else each parent has its own."""
    entry = target.entries[task.name]
    slots = [measure(target, task.name)] if entry.is_float else []
    for index, name in task.partners:
        own = measure(sources[index], name)
        slots.append(replace(own, mean=slots[0].mean, scale=slots[0].scale) if own.shape == entry.shape else own)
    return replace(task, slots=tuple(slots))


def measure_slots(tasks, target, sources): return [measure_task(task, target, sources) for task in tasks]


# --- The stream of merged tensors ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """One run, as decided by the command line and the files."""
    target: Checkpoint
    sources: list               # with the base of a task arithmetic as the last
    tasks: list
    lam: list                   # one per source proper
    operator: str = "lerp"
    space: str = "latent"
    how: Alignment = Alignment()
    residual: bool = False
    seed: int = 0
    samples: int = 0
    select: str | None = None

    def weights(self, task):
        """The parents' weights for this tensor; a source without a partner leaves its share to the target."""
        if self.operator == "task-arithmetic":
            return task_weights(self.lam)
        return convex_weights([self.lam[index] for index, _ in task.partners])

    def alone(self, task):
        """Only the target is left."""
        return task.action == "copied" or not any(self.weights(task)[1:])

    def kept(self, task):
        """The target's own bytes: nothing is encoded, or all that the codec lost comes back."""
        return self.alone(task) and (task.action != "encoded" or self.space == "weight" or self.residual and not self.samples)

    def share(self):
        """Numbers of the tensors that fall to this process (torchrun), the largest first: each to whoever has least so far."""
        rank, size = rank_and_size()
        cost = [self.target.entries[t.name].numel * (50 if t.action == "encoded" else 1) for t in self.tasks]
        loads, mine = [0] * size, []
        for number in sorted(range(len(cost)), key=lambda n: -cost[n]):
            least = loads.index(min(loads))
            loads[least] += cost[number]
            mine += [number] if least == rank else []
        return mine


@contextlib.contextmanager
def workers(most=WORKERS):
    """A pool of one thread per core, each with a tensor of its own: reading, computing and writing overlap, and no core waits
    for another after each of many small operations, as within torch's. (The bytes then do not depend on their number.)"""
    threads = torch.get_num_threads()
    count = min(threads, most)
    torch.set_num_threads(threads // count)
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    except BaseException:
        STOP.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
        STOP.clear()


def merge_tensor(job, codecs, number, put):
    """Merge one tensor, piece by piece into `put`; its Tally.  `codecs`: the target's, then one per source."""
    task, tally = job.tasks[number], Tally()
    name, entry, weights = task.name, job.target.entries[task.name], job.weights(task)
    readers = [functools.partial(job.target.read, name), *(functools.partial(job.sources[i].read, other) for i, other in task.partners)]
    if task.action == "encoded" and job.space == "latent":
        seed = job.seed * 1_000_003 + number
        parents = [Parent(read, slot, codecs[k], k, job.samples, seed, key=task.slots[0].key if codecs[k] is codecs[0] else None)
                   for read, slot, k in zip(readers, task.slots, task.indices)]
        if not job.kept(task):
            for start, piece in ls_merge(parents[0], parents[1:], weights, job.operator == "slerp", job.how, job.residual, seed, tally):
                put(name, start, piece)
            return tally
        round_trip(parents[0], tally)                      # for the report: no code enters the result
    common = entry.numel if task.common is None else task.common
    if task.action == "encoded" and job.operator == "slerp":
        weights = slerp_weights(weights[1], *inner([read(*span).double() for read in readers] for span in spans(common)))
    rest = [(common + start, common + stop) for start, stop in spans(entry.numel - common)] if common < entry.numel else []
    for start, stop in [*spans(common), *rest]:
        mine = task.action == "copied" or start >= common > 0
        raw = [read(start, stop) for read in readers[:1 if mine else None]]
        piece = raw[0] if mine or job.alone(task) else cast(lerp([part.double() for part in raw], weights), entry)
        if task.action == "encoded":
            known = zip(task.indices, task.slots, raw)
            tally.add_distances(piece, {k: part.double() for k, slot, part in known if slot.shape == entry.shape}, weights)
        put(name, start, piece)
    return tally


def merge_share(job, codecs, file, bar):
    """{number: Tally} of the tensors that fall to this process, written into the open TensorFile."""
    def put(name, start, piece):
        file.put(name, start, piece)
        bar.update(piece.numel())

    def one(number):
        task = job.tasks[number]
        if isinstance(file, FactorFile) and job.kept(task):
            file.copy(task.name)
            return merge_tensor(job, codecs, number, lambda *_: None)
        return merge_tensor(job, codecs, number, put)
    mine = job.share()
    # A transport problem of Sinkhorn's fills its memory limit: one at a time.
    with workers(1 if job.how.method == "sinkhorn" else WORKERS) as pool:
        return dict(zip(mine, pool.map(one, mine)))


# --- The codec -------------------------------------------------------------------------------------------------------
def load_vae(path):
    """(VAE, training record) of a file that train.py wrote."""
    file = Checkpoint(path)
    try:
        return VAE.from_file({name: file.read_tensor(name) for name in file.entries}, file.metadata)
    except ValueError as error:
        raise CheckpointError(path, str(error), "pass a file written by train.py or --save-vae") from None


def training_parents(job):
    """[(checkpoint, its encoded slots)] for the training of a VAE on the inputs of this very run."""
    tasks = [task for task in job.tasks if task.action == "encoded"]
    parents = [(job.target, [task.slots[0] for task in tasks])]
    for i, source in enumerate(job.sources):
        slots = {slot.name: slot for task in tasks for (k, _), slot in zip(task.partners, task.slots[1:]) if k == i}
        parents.append((source, list(slots.values())))
    return parents


def get_codecs(arguments, job):
    """([Codec of the target, of source 1, ...], SHA-256 of the VAE files): from files, or one VAE trained on all inputs."""
    device, dtype, (rank, size) = pick_device(arguments.device), getattr(torch, arguments.dtype), rank_and_size()
    if arguments.vae:
        vae, digests = load_vae(arguments.vae)[0], [file_sha256(file) for file in Checkpoint(arguments.vae).files]
    else:
        schedule = Schedule(batch=-(-Schedule.batch // size) * size)       # the same for every process
        vae, stages = train_vae(training_parents(job), VAEConfig(), schedule, job.seed, device, quiet=arguments.quiet)
        print(*map(describe_stage, stages), sep="\n")
        contents = vae_file(vae, stages, seed=job.seed, select=arguments.select)
        digests = [tensors_sha256(*contents)]
        if arguments.save_vae and rank == 0:
            write_tensors(arguments.save_vae, *contents)
    codecs = [Codec(vae, device, dtype)]
    if arguments.source_vae:
        codecs.append(Codec(load_vae(arguments.source_vae)[0], device, dtype))
        digests += [file_sha256(file) for file in Checkpoint(arguments.source_vae).files]
    return codecs[:1] + codecs[-1:] * len(job.sources), digests


# --- The report ------------------------------------------------------------------------------------------------------
class PeakMemory:
    """Samples the anonymous memory (RssAnon: file mappings such as torch's library do not count) 50 times a second, as
    its peak is inside a library call; `peak` in MiB, None where the system does not tell."""

    def __enter__(self):
        self.peak, self.ended = self.now(), threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()
        return self

    def __exit__(self, *_): self.ended.set()

    @staticmethod
    def now():
        if not os.path.exists("/proc/self/status"):
            return None
        with open("/proc/self/status") as status:
            return sum(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))

    def watch(self):
        while self.peak is not None and not self.ended.wait(0.02):
            self.peak = max(self.peak, self.now())


def by_action(job):
    return {action: [task for task in job.tasks if task.action == action] for action in ("encoded", "averaged", "copied")}


def round_trips(job, tally):
    """({parent index: NMSE averaged over encoded weights}, the worst tensor of all parents)."""
    sums, worst = {}, {"name": None, "nmse": None}
    for task in by_action(job)["encoded"]:
        for k, slot in zip(task.indices, task.slots):
            squares, count = tally.errors.get((k, slot.name), (0.0, 0))
            if count:
                sums.setdefault(k, []).append((squares / count, slot.numel))
                worst = max(worst, {"name": slot.name, "nmse": squares / count}, key=lambda w: -1 if w["nmse"] is None else w["nmse"])
    return {k: sum(nmse * n for nmse, n in pairs) / sum(n for _, n in pairs) for k, pairs in sums.items()}, worst


def make_report(job, kind, tally, codecs, bound, seconds, memory):
    (nmse, worst), actions, total = round_trips(job, tally), by_action(job), len(job.target.entries)
    size = lambda names: sum(job.target.entries[name].numel for name in names)
    norm = tally.squares["target"]
    relative = lambda to: math.sqrt(tally.squares[to] / norm) if to in tally.squares and norm > 0 else None
    defined, covered = kind != "cross-shape", sum(map(len, actions.values()))
    who = lambda k: "target" if not k else f"source {k}" if k <= len(job.lam) else "base"
    gates = [{"name": f"round trip of {who(k)}", "passed": value <= bound, "value": value, "bound": bound}
             for k, value in nmse.items() if not (job.residual and not any(job.lam) and not job.samples)]
    gates.append({"name": "encoded + averaged + copied = all", "passed": covered == total, "value": covered, "bound": total})
    return {
        "kind": kind, "ratio": codecs[0].vae.config.true_ratio if codecs else None, "lambda": job.lam,
        "operator": job.operator, "space": job.space, "align": job.how.method, "control": job.how.control,
        "tensors": {**{action: len(tasks) for action, tasks in actions.items()}, "total": total,
                    "weights_encoded": size(t.name for t in actions["encoded"]), "weights_total": size(job.target.entries)},
        "roundtrip": {"nmse": nmse.get(0), "worst": worst},
        "distance": {"to_target": relative(0),
                     "to_source": [relative(i + 1) if defined else None for i in range(len(job.lam))],
                     "to_average": relative("to_average") if kind == "same-shape" else None},
        "alignment": tally.alignment, "gates": gates, "seconds": {k: round(v, 3) for k, v in seconds.items()},
        "peak_anonymous_mib": memory}


def print_report(report, job):
    t, d, worst = report["tensors"], report["distance"], report["roundtrip"]["worst"]
    show = lambda value: "undefined" if value is None else f"{value:.4f}"
    print(f"{report['kind']}, {report['operator']} in {report['space']} space, align {report['align']}, "
          f"control {report['control'] or 'none'}, lambda {', '.join(f'{v:g}' for v in job.lam) or '-'}, r = {report['ratio'] or '-'}")
    print(f"tensors: {t['encoded']} encoded + {t['averaged']} averaged + {t['copied']} copied = {t['total']}; weights encoded: "
          f"{t['weights_encoded']:,} of {t['weights_total']:,} ({t['weights_encoded'] / max(1, t['weights_total']):.1%})")
    for why in dict.fromkeys(task.why for task in job.tasks if task.why):
        names, action = zip(*((task.name, task.action) for task in job.tasks if task.why == why))
        print(f"  {action[0]}, {why}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
    print(f"distance over the target's norm: to the target {show(d['to_target'])}, "
          + "".join(f"to source {i + 1} {show(v)}, " for i, v in enumerate(d["to_source"])) + f"to the plain average {show(d['to_average'])}")
    if report["alignment"]:
        print_alignment(report["alignment"])
    if worst["name"]:
        print(f"round trip, worst tensor: NMSE {worst['nmse']:.2e} ({worst['name']})")
    for gate in report["gates"]:
        value, bound = (f"{gate[k]:.2e}" if isinstance(gate[k], float) else gate[k] for k in ("value", "bound"))
        print(f"gate {'passed' if gate['passed'] else 'FAILED'}: {gate['name']}: {value} (bound {bound})")
    print("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in report["seconds"].items())
          + (f"; peak anonymous memory {report['peak_anonymous_mib']:.0f} MiB" if report["peak_anonymous_mib"] else ""))


def metadata_of(job, digests, vae):
    """Provenance in the result's header: strings; no time and no path, so that equal runs give equal bytes. `digests`: per
    parent, the SHA-256 of its weight files; `vae`: of the VAE files."""
    facts = {"version": VERSION, "operator": job.operator, "space": job.space, "align": job.how.method, "control": job.how.control or "",
             "lambda": ",".join(map(repr, job.lam)), "residual": "yes" if job.residual else "", "seed": str(job.seed),
             "samples": str(job.samples or ""), "select": job.select or "", "epsilon": str(job.how.epsilon) if job.how.method == "sinkhorn" else "",
             "sha256.target": ",".join(digests[0]), "sha256.vae": ",".join(vae)}
    facts |= {f"sha256.{f'source{i}' if i <= len(job.lam) else 'base'}": ",".join(files) for i, files in enumerate(digests) if i}
    return {f"lsmerge.{key}": value for key, value in facts.items() if value}


def print_alignment(records):
    print(f"{'role':<10}{'layer':>6}{'from':>6}{'n/d':>7}{'cost before':>13}{'after':>10}{'std ratio':>11}{'marginal':>10}{'iterations':>11}")
    for r in records:
        few = "  n < d" if r["n_over_d"] < 1 else ""
        few += f"  {r['blocks']} blocks" if r["blocks"] > 1 else ""
        layer, other = ("-" if r[key] is None else r[key] for key in ("layer", "source_layer"))
        print(f"{r['role']:<10}{layer:>6}{other:>6}{r['n_over_d']:>7.1f}{r['cost_before']:>13.4f}{r['cost_after']:>10.4f}"
              f"{r['std_ratio']:>11.3f}{r['marginal_error']:>10.1e}{r['iterations']:>11}{few}")


def matmul_rate(dtype):
    """Multiplications and additions per second of this machine, measured: the codec's time is estimated from it."""
    x, began = torch.ones(1024, 1024, dtype=dtype), time.perf_counter()
    for _ in range(8):
        x @ x
    return 8 * 2 * 1024 ** 3 / (time.perf_counter() - began)


def print_plan(kind, job, a):
    """--dry-run: who meets whom, how much, how long."""
    actions, digests = by_action(job), [["0" * 64] * len(c.seen) for c in (job.target, *job.sources)]
    encoded, vae_digests = actions["encoded"], ["0" * 64] * (1 + bool(a.source_vae)) if job.space == "latent" else []
    for task in encoded:
        print(f"  {task.name} {list(task.slots[0].shape)}" + "".join(f" <- {job.sources[i].path}: {name}" for i, name in task.partners))
    print(f"{kind}, align {job.how.method}, lambda {', '.join(f'{v:g}' for v in job.lam) or '-'}: "
          + " + ".join(f"{len(tasks)} {action}" for action, tasks in actions.items()) + f" = {len(job.tasks)} tensors")
    print(f"output: {a.output}, {plan_file(job.target.stored.values(), metadata_of(job, digests, vae_digests))[2]:,} bytes of weights")
    parents = 1 + len(job.sources)
    if job.space == "latent":
        vae = load_vae(a.vae)[0] if a.vae else VAE(VAEConfig())
        # Per chunk, each parameter of encoder or decoder is one multiplication and addition. All parents are encoded (twice
        # if a map is fitted), the result is decoded, and the gate decodes what it looks at.
        T, C = vae.config.tokens, vae.config.chunk
        seen = sum(min(slot.numel, 2 * GATE_WINDOWS * T * C) for task in encoded for slot in task.slots) if job.sources else 0
        passes = sum(slot.numel for task in encoded for slot in task.slots) * (1 if job.how.method == "none" else 2) + seen
        passes += sum(task.slots[0].numel for task in encoded)
        flops = sum(p.numel() for p in vae.parameters()) * passes / C      # 2 per parameter, halved: encoder or decoder
        print(f"estimated: {flops / matmul_rate(getattr(torch, a.dtype)):.0f} s for the codec{'' if a.vae else ', after training a VAE'}")
    threads, transport = min(torch.get_num_threads(), WORKERS), 0
    if job.how.method == "sinkhorn":                       # cost, kernel and a scratch of half their size, one problem at a time
        pairs = [[slot.n_chunks(VAEConfig().chunk) for slot in task.slots] for task in encoded]
        threads, transport = 1, max(2.5 * min(ot.LIMIT_BYTES, 8 * mine * other) / 2 ** 20 for mine, *others in pairs for other in others)
    print(f"estimated peak of anonymous memory: {(PeakMemory.now() or 200) + OVERHEAD + threads * PER_PARENT * parents + transport:.0f} MiB")


def write_report(path, report):
    path, temporary = os.path.realpath(path), f"{os.path.realpath(path)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w") as stream:
            json.dump(report, stream, indent=1, allow_nan=False)
            stream.write("\n")
        os.replace(temporary, path)
    except OSError as error:
        error.filename = path
        raise
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


# --- The command line ------------------------------------------------------------------------------------------------
def parse(argv):
    parser = Parser(prog="merge.py", description="Merge checkpoints in the latent space of a weight VAE (LS-Merge).")
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="TARGET [SOURCE ...]: .safetensors files, folders, indexes "
        "of shards, or folders of LoRA adapters; the result has the target's names, shapes and dtypes")
    add("-o", "--output", metavar="PATH", help="(merged.safetensors; merged/ if TARGET is a folder)")
    add("--lam", metavar="L[,L...]", help="weight of each source in [0, 1], the target has the rest; 0 = the target's round "
        "trip (0.5 for one source of equal shapes, 1/(N+1) each for N, 0.1 in all across shapes)")
    add("--operator", choices=OPERATORS, default="lerp", help="on latents; soup is uniform over target and sources, greedy-soup keeps "
        "what --eval says helps, task-arithmetic adds lambda (source - base) (%(default)s)")
    add("--base", metavar="FILE", help="common ancestor, for task-arithmetic and to fold LoRA adapters into")
    add("--samples", type=int, metavar="K", help=f"average K draws of each parent's posterior ({SAMPLES} without a SOURCE, else 0: its mean)")
    add("--eval", metavar="CMD", help="for greedy-soup: run with a checkpoint's path appended; the last number it prints is the score, "
        "higher is better")
    add("--space", choices=("latent", "weight"), default="latent", help="weight: the same operator without the codec, the baseline")
    add("--align", choices=("auto", "none", "mean", "gaussian", "sinkhorn"), help="auto (default): none if shapes agree, else gaussian")
    add("--epsilon", type=float, help=f"Sinkhorn's regularisation over the largest cost ({ot.EPSILON})")
    add("--control", choices=("zero", "noise", "shuffled"), help="replace the source's latents by a null control")
    add("--select", metavar="REGEX", help="which tensors are encoded (default: floats of >= 2 dimensions in numbered layers)")
    add("--residual", action="store_true", help="add back what the codec lost")
    add("--vae", metavar="FILE", help="a trained VAE; without it one is trained on the inputs first")
    add("--save-vae", metavar="FILE", help="keep the VAE trained here")
    add("--source-vae", metavar="FILE", help="a second VAE for the sources' architecture")
    add("--max-nmse", type=float, help=f"refuse to write if a round trip is worse ({MAX_NMSE})")
    add("--roundtrip", action="store_true", help="encode and decode the target only")
    add("--dry-run", action="store_true", help="print the plan; write nothing")
    add("--report", metavar="FILE", help="JSON report")
    add_machine_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    check_usage(arguments, parser)
    return arguments


def usage_errors(a, sources):
    """[(broken?, what to say), ...]: all that the command line alone decides."""
    flag = lambda name: "--" + name.replace("_", "-")
    alone = [name for name in ("lam", "align", "control", "source_vae", "eval") if getattr(a, name) is not None]
    alone += [name for name, default in (("operator", "lerp"), ("space", "latent")) if getattr(a, name) != default]
    codec = ["vae", "save_vae", "source_vae", "align", "epsilon", "control", "residual", "roundtrip", "max_nmse", "samples"]
    codec = [name for name in codec if getattr(a, name) not in (None, False)]
    codec += [name for name, default in (("device", "auto"), ("dtype", "float32")) if getattr(a, name) != default]
    above_0 = lambda value: value is None or math.isfinite(value) and value > 0
    return [
        (a.roundtrip and sources, "--roundtrip takes the target alone"),
        (not sources and alone, f"there is no SOURCE: drop {flag((alone or ['-'])[0])}"),
        (a.roundtrip and a.samples, "--roundtrip draws no samples: drop one of them"),
        (not 0 <= (a.samples or 0) <= 4096, "--samples must lie between 0 and 4096"),
        (a.operator == "slerp" and sources != 1, "--operator slerp takes two parents: TARGET and one SOURCE"),
        (a.operator in ("soup", "greedy-soup") and a.lam is not None, f"--operator {a.operator} weighs all parents alike: drop --lam"),
        (a.operator == "task-arithmetic" and a.base is None, "--operator task-arithmetic needs --base"),
        ((a.eval is None) == (a.operator == "greedy-soup"), "--operator greedy-soup and --eval go together"),
        (a.dry_run and a.eval, "--dry-run evaluates nothing: drop it, or --eval"),
        (a.dry_run and a.report, "--dry-run makes no report: drop --report"),
        (a.space == "weight" and codec, f"--space weight uses no codec: drop {flag((codec or ['-'])[0])}"),
        (a.vae and a.save_vae, "--save-vae keeps a VAE trained here, --vae brings one: drop one of them"),
        (a.source_vae and not a.vae, "--source-vae needs --vae for the target"),
        (a.epsilon is not None and a.align != "sinkhorn" or not above_0(a.epsilon), "--epsilon must be above 0 and goes with --align sinkhorn"),
        (not above_0(a.max_nmse), "--max-nmse must be above 0")]


def check_usage(a, parser):
    sources = len(a.models) - 1
    for broken, what in usage_errors(a, sources):
        if broken:
            parser.error(what)
    parser.check_select(a.select)
    try:
        shlex.split(a.eval or "")
        if a.lam is not None:
            a.lam = [float(value) for value in a.lam.split(",")]
            a.lam = a.lam * sources if len(a.lam) == 1 else a.lam
            (task_weights if a.operator == "task-arithmetic" else convex_weights)(a.lam)
    except ValueError as error:
        parser.error(f"{'--lam' if a.lam is not None else '--eval'}: {error}")
    if len(a.lam or "") not in (0, sources):
        parser.error(f"--lam has {len(a.lam)} values for {sources} sources: give one, or one each")


def default_lam(kind, count, operator):
    """paper: the best lambda across shapes lies in 0.05 .. 0.20; ours: a uniform share for equal shapes; a soup is uniform."""
    return [0.1 / count if kind == "cross-shape" and operator != "soup" else 1 / (count + 1)] * count


def open_parents(a):
    """Checkpoints of target, sources and, for a task arithmetic, base. LoRA adapters: folded into the base, or among themselves."""
    adapters = [is_adapter(path) for path in a.models]
    if a.base:
        need(any(adapters) or a.operator == "task-arithmetic", a.base, "nothing needs a base: no parent is an adapter",
             "drop --base, or use --operator task-arithmetic")
        return [*(Folded(a.base, path) if lora else Checkpoint(path) for path, lora in zip(a.models, adapters)),
                *([Checkpoint(a.base)] if a.operator == "task-arithmetic" else [])]
    need(not any(adapters) or all(adapters), a.models[adapters.index(True)] if any(adapters) else "", "is a LoRA adapter, other parents are whole "
         "models", "give its base with --base")
    parents = [open_checkpoint(path) for path in a.models]
    for name in parents[0].entries if all(adapters) else []:
        for other in parents[1:]:
            need(name not in other.entries or other.rank(name) == parents[0].rank(name), other.path, f"is of rank {other.rank(name) if name in other.entries else 0}, the target's "
                 f"adapter of {parents[0].rank(name)}", "fold both with --base", name)
    return parents


def open_job(a):
    """(kind, Job): everything that can be refused before any work, in the order of its cost."""
    target, *sources = open_parents(a)
    folder = target.folder if a.output is None or not a.output.endswith(".safetensors") else None
    a.output, a.weights_name = a.output or ("merged" if folder else "merged.safetensors"), "model.safetensors"
    copies = companions(folder) if folder else []
    if isinstance(target, Adapter):
        a.weights_name = "adapter_model.safetensors"
    vaes = [Checkpoint(path) for path in (a.vae, a.source_vae) if path]
    inputs = [f for c in (target, *sources, *vaes) for f in c.files] + copies
    outputs = [] if a.dry_run else [path for path in (a.output, a.save_vae, a.report) if path]
    for i, path in enumerate(outputs):
        check_output(path, inputs, a.force,
                     {a.weights_name, *map(os.path.basename, copies)} if folder and path == a.output else None)
        need(os.path.realpath(path) not in map(os.path.realpath, outputs[:i]), path, "two outputs in one file", "give each its own")
        need(not os.path.realpath(path).startswith(os.path.realpath(a.output) + os.sep), path, "lies in the result's folder, which is "
             "replaced as a whole", "choose another place")
    kind, method, tasks = plan_merge(target, sources, a.select, a.align or "auto", control=a.control)
    need(a.space == "latent" or kind != "cross-shape", a.models[0], "its encoded tensors and the source's differ in shape or name",
         "--space weight needs equal shapes: drop it")
    need(a.operator != "task-arithmetic" or kind == "same-shape", a.base, "task arithmetic needs equal shapes and names of target, sources and base",
         "choose another operator, or --base")
    need(not a.source_vae or kind == "cross-shape", a.source_vae, "models of equal shapes share one VAE", "drop --source-vae")
    how = Alignment(method, a.control, a.epsilon or ot.EPSILON)
    a.copies = copies if folder else None
    samples = a.samples if a.samples is not None else 0 if sources or a.roundtrip else SAMPLES
    lam = a.lam or default_lam(kind, len(a.models) - 1, a.operator)
    return kind, Job(target, sources, tasks, lam, a.operator, a.space, how, a.residual, a.seed, samples, a.select)


def measure_share(job):
    """({number: Task with its statistics} of this process's tensors, {file: its SHA-256} of its files)."""
    rank, size = rank_and_size()
    files = sorted({file for checkpoint in (job.target, *job.sources) for file in checkpoint.seen})[rank::size]
    with workers() as pool:
        digests = pool.map(file_sha256, files)
        tasks = pool.map(lambda n: (n, measure_task(job.tasks[n], job.target, job.sources)), job.share())
        return dict(tasks), dict(zip(files, digests))


def print_notes(job, digests, folder):
    for index, checkpoint in enumerate((job.target, *job.sources)):
        for note in checkpoint.notes:
            print(f"note: {note}")
        if 0 < index <= len(job.lam) and digests[index] == digests[0]:
            print(f"note: {checkpoint.path} is the target itself, byte for byte")
    inner = [n for n in os.listdir(job.target.folder or ".") if os.path.isdir(os.path.join(job.target.folder, n)) and n[0] != "."] if job.target.folder else []
    if inner:
        print(f"note: subfolders of {job.target.folder} are not copied: {', '.join(sorted(inner)[:5])}")
    left = [name for name in os.listdir(folder) if name.startswith(".lsmerge-") and name.endswith(".tmp")]
    if left:
        print(f"note: {folder} holds {', '.join(left)} of another run: delete them if it is no longer going on")


def write_output(path, a, kind, job, codecs, metadata, accept=None):
    """Merge into a file or folder. Under torchrun the first process makes the file, all fill it, the first one ends it."""
    entries = list(job.target.stored.values())
    bar = tqdm(total=sum(e.numel for e in job.target.entries.values()), unit="weights", unit_scale=True, leave=False,
               disable=True if a.quiet or rank_and_size()[0] else None)
    def fill(file):
        sink = FactorFile(file, [job.target, *job.sources], kind == "same-shape") if isinstance(job.target, Adapter) else file
        tallies = agree(lambda: merge_share(job, codecs, sink, bar))
        os.fsync(file.handle)                              # of every process: the file may lie on other machines' disks
        found = gather((tallies, file.written, sink.lost if sink is not file else []))
        file.written = [n for _, written, _ in found for n in written]
        lost = [sum(column) for column in zip(*(pair for _, _, cut in found for pair in cut))]
        if lost and lost[1] > 0 and accept is not None:
            print(f"factors of the target's rank hold all but {math.sqrt(lost[0] / lost[1]):.1%} of the merged products (Frobenius norm)")
        return {number: tally for tallies, _, _ in found for number, tally in tallies.items()}

    def begin(file):
        gather(file.path)
        tallies = fill(file)
        if accept:
            accept(tallies)
    if rank_and_size()[0]:
        fill(TensorFile(gather(None)[0], entries, metadata))
    else:
        write = lambda path: write_checkpoint(path, entries, begin, metadata)
        write(path) if a.copies is None else write_folder(path, a.copies, write, a.weights_name)


def choose_soup(a, kind, job, codecs, metadata):
    """lambda of the greedy soup: each candidate is merged into a scratch file beside the output, scored and removed."""
    count, first = len(job.sources) + 1, rank_and_size()[0] == 0
    bar = tqdm(total=2 * count - 1, unit="evaluation", leave=False, disable=True if a.quiet or not first else None)
    def score(kept):
        lam = [1 / len(kept) if index in kept else 0.0 for index in range(1, count)]
        with tempfile.TemporaryDirectory(prefix=".lsmerge-", suffix=".tmp", dir=os.path.dirname(os.path.realpath(a.output))) as scratch:
            path = os.path.join(scratch, "candidate" if a.copies is not None else "candidate.safetensors")
            write_output(path, a, kind, replace(job, lam=lam), codecs, metadata)
            value = gather(agree(lambda: run_evaluation(a.eval, path) if first else None))[0]
        bar.update()
        print(f"soup of {', '.join(a.models[index] for index in kept)}: {value:.6g}")
        return value
    kept = greedy_soup(count, score)
    bar.close()
    return [1 / len(kept) if index in kept else 0.0 for index in range(1, count)]


NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(nan|inf)", re.I)


def run_evaluation(line, path):
    """The last number that a command prints, given a checkpoint's path."""
    done = subprocess.run([*shlex.split(line), path], capture_output=True, text=True, errors="replace")
    numbers = [word for word in re.split(r"[\s=:,;()\[\]{}%]+", done.stdout) if NUMBER.fullmatch(word)]      # a path's digits are none
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    need(done.returncode == 0, "--eval", f"{line!r} failed with exit code {done.returncode}: {last}", "run it by hand on one of the parents")
    need(numbers and math.isfinite(float(numbers[-1])), "--eval", f"{line!r} printed no number last", "print the score last")
    return float(numbers[-1])


def run(a, memory):
    seconds, clock, report, bound = {}, time.perf_counter(), {}, a.max_nmse or MAX_NMSE
    def lap(stage):
        nonlocal clock
        seconds[stage], clock = time.perf_counter() - clock, time.perf_counter()
    kind, job = agree(lambda: open_job(a))
    measured, hashes = ({k: v for part in parts for k, v in part.items()} for parts in zip(*gather(agree(lambda: measure_share(job)))))
    job = replace(job, tasks=[measured[number] for number in range(len(job.tasks))])
    digests = [[hashes[file] for file in checkpoint.seen] for checkpoint in (job.target, *job.sources)]
    print_notes(job, digests, os.path.dirname(os.path.realpath(a.output)))
    lap("read and check")
    if a.dry_run:
        return print_plan(kind, job, a)
    codecs, vae_digests = get_codecs(a, job) if job.space == "latent" else (None, [])
    lap("codec")

    def accept(tallies):
        for checkpoint in (job.target, *job.sources):
            checkpoint.check_unchanged()
        tally = Tally()
        for number in sorted(tallies):
            tally.absorb(tallies[number])
        lap("merge and write")
        report.update(make_report(job, kind, tally, codecs, bound, seconds, memory.peak))
        if a.report:
            write_report(a.report, report)
        for gate in report["gates"]:
            if not gate["passed"]:
                print_report(report, job)
                raise CheckpointError(a.output, f"not written: gate failed: {gate['name']}: {gate['value']:.3g} > {gate['bound']:.3g}",
                                      "train a better VAE (train.py, more steps or a lower --ratio), or raise --max-nmse")
    if job.operator == "greedy-soup":
        job = replace(job, lam=choose_soup(a, kind, job, codecs, metadata_of(job, digests, vae_digests)))
        lap("evaluate")
    write_output(a.output, a, kind, job, codecs, metadata_of(job, digests, vae_digests), accept)
    if report:
        print_report(report, job)
        print(f"wrote {a.output}" + (f": {a.weights_name} and {len(a.copies)} companions of the target" if a.copies is not None else ""))


def main(argv=None):
    a = parse(argv)
    with PeakMemory() as memory:
        run(a, memory)


if __name__ == "__main__":
    sys.exit(command(main))
