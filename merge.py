"""merge.py: the command.                                                              (read last)

    python merge.py TARGET [SOURCE ...] [options]

Decides which tensors meet (`plan_merge`), gets a VAE (from a file, or trained on the inputs), streams the merged
tensors into a new file (`ls_merge`, one tensor after another), checks itself on the user's own weights (`gates`), and
reports. Nothing mathematical here. lambda = 0 is the target's round trip, lambda = 1 the source's.
"""
import functools, json, math, os, sys, threading, time
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

import align as ot
from chunking import (PIECE, Checkpoint, CheckpointError, Parser, check_output, command, is_selected, measure, need, place,
                      plan_file, spans, write_checkpoint)
from lsmerge import Alignment, Codec, Parent, Tally, cast, convex_weights, lerp, ls_merge, round_trip
from train import add_machine_arguments, describe_stage, pick_device, save_vae, train_vae
from vae import VAE, VAEConfig

OPERATORS = {"lerp": lerp}
MAX_NMSE = 1e-3                 # a relative error of 3 %: what a language model just tolerates


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


def plan_merge(target, sources, pattern=None, align="auto", by="depth", control=None):
    """(kind, alignment method, [Task, ...] in the target's natural order).  Raises CheckpointError.

    A run is cross-shape if an encoded tensor of any parent differs in shape or is missing in another. Everything that is not
    encoded is averaged in weight space where shapes are equal and nothing is aligned, else it is the target's. Under a
    null control too: a norm averaged with the source's would bring in what the control is there to keep out.
    """
    encoded = [e.name for e in target.entries.values() if is_selected(e, pattern)]
    need(encoded, target.path, "no tensor is selected", "give --select a pattern that matches its names")
    fits = lambda source, name: name in source.entries and (
        source.entries[name].is_float and source.entries[name].shape == target.entries[name].shape)
    same = all(set(encoded) == {e.name for e in source.entries.values() if is_selected(e, pattern)}
               and all(fits(source, name) for name in encoded) for source in sources)
    kind = "self" if not sources else "same-shape" if same else "cross-shape"
    method = align if align != "auto" else "gaussian" if kind == "cross-shape" else "none"
    pairs = [{n: n for n in encoded} if same else pair_names(target, source, encoded, pattern, by) for source in sources]
    for source, paired in zip(sources, pairs):
        need(any(paired.values()), source.path, "no tensor pairs with one of the target by layer and role",
             "names are unknown or ambiguous: see chunking.ROLES, or narrow --select")
    tasks, chosen = [], set(encoded)
    for name, entry in target.entries.items():
        if name in chosen:
            partners = tuple((i, paired[name]) for i, paired in enumerate(pairs) if paired[name])
            lonely = sources and not partners
            tasks.append(Task(name, "copied", why=f"no source has a single partner for role {place(name).role!r}") if lonely
                         else Task(name, "encoded", partners))
        elif kind == "same-shape" and method == "none" and not control and entry.is_float:
            others = [source.path for source in sources if not fits(source, name)]
            tasks.append(Task(name, "copied", why=f"missing or of another shape in {', '.join(others)}") if others
                         else Task(name, "averaged", tuple((i, name) for i in range(len(sources)))))
        else:
            tasks.append(Task(name, "copied", why="not encoded" if entry.is_float else "not a float"))
    return kind, method, tasks


def measure_slots(tasks, target, sources):
    """The tasks with their statistics. Every float that enters the result is read once here, so that NaN and Inf are
    refused before any work. Equal shapes share the target's statistics; else each parent has its own."""
    done = []
    for task in tasks:
        entry = target.entries[task.name]
        slots = [measure(target, task.name)] if entry.is_float else []
        for index, name in task.partners:
            own = measure(sources[index], name)
            slots.append(replace(own, mean=slots[0].mean, scale=slots[0].scale) if own.shape == entry.shape else own)
        done.append(replace(task, slots=tuple(slots)))
    return done


# --- The stream of merged tensors ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """One run, as decided by the command line and the files."""
    target: Checkpoint
    sources: list
    tasks: list
    lam: list
    operator: str = "lerp"
    space: str = "latent"
    how: Alignment = Alignment()
    residual: bool = False
    seed: int = 0

    def weights(self, task):
        """The parents' weights for this tensor; a source without a partner leaves its share to the target."""
        return convex_weights([self.lam[index] for index, _ in task.partners])


def merged_pieces(job, codecs, tally):
    """(name, start, piece in the target's dtype) of every tensor; `codecs`: the target's, then one per source."""
    for number, task in enumerate(job.tasks):
        name, operator, weights = task.name, OPERATORS[job.operator], job.weights(task)
        readers = [functools.partial(job.target.read, name), *(functools.partial(job.sources[i].read, n) for i, n in task.partners)]
        kept = task.action == "copied" or not any(weights[1:])          # the target's bytes, unless they are encoded
        if task.action == "encoded" and job.space == "latent":
            parents = [Parent(read, slot, codecs[k], k) for read, slot, k in zip(readers, task.slots, task.indices)]
            if not (kept and job.residual):
                generator = torch.Generator().manual_seed(job.seed * 1_000_003 + number)
                stream = ls_merge(parents[0], parents[1:], weights, operator, job.how, job.residual, generator, tally)
                yield from ((name, start, piece) for start, piece in stream)
                continue
            round_trip(parents[0], tally)                  # for the report: no code enters the result
        entry = job.target.entries[name]
        for start, stop in spans(entry.numel):
            raw = [read(start, stop) for read in readers[:1 if task.action == "copied" else None]]
            piece = raw[0] if kept else cast(operator([part.double() for part in raw], weights), entry)
            if task.action == "encoded":
                known = zip(task.indices, task.slots, raw)
                tally.add_distances(piece, {k: part.double() for k, slot, part in known if slot.shape == entry.shape}, weights, operator)
            yield name, start, piece


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
    """[Codec of the target, of source 1, ...]: from files, or one VAE trained on all inputs."""
    device, dtype = pick_device(arguments.device), getattr(torch, arguments.dtype)
    if arguments.vae:
        vae, _ = load_vae(arguments.vae)
    else:
        vae, stages = train_vae(training_parents(job), VAEConfig(), seed=job.seed, device=device, quiet=arguments.quiet)
        for record in stages:
            print(describe_stage(record))
        if arguments.save_vae:
            save_vae(arguments.save_vae, vae, stages, seed=job.seed, select=arguments.select)
    mine = Codec(vae, device, dtype)
    theirs = Codec(load_vae(arguments.source_vae)[0], device, dtype) if arguments.source_vae else mine
    return [mine] + [theirs] * len(job.sources)


# --- The report ------------------------------------------------------------------------------------------------------
class PeakMemory(threading.Thread):
    """Samples the anonymous memory (RssAnon: file mappings such as torch's library do not count) 50 times a second, as
    its peak is inside a library call; `peak` in MiB, None where the system does not tell."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0.0 if os.path.exists("/proc/self/status") else None
        self.start()

    def run(self):
        while self.peak is not None:
            with open("/proc/self/status") as status:
                self.peak = max(self.peak, *(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon")), 0)
            time.sleep(0.02)


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
    relative = lambda squares: math.sqrt(squares / tally.target) if squares is not None and tally.target > 0 else None
    defined, covered = kind != "cross-shape", sum(map(len, actions.values()))
    gates = [{"name": f"round trip of {f'source {k}' if k else 'target'}", "passed": value <= bound, "value": value, "bound": bound}
             for k, value in nmse.items() if not (job.residual and not any(job.lam))]
    gates.append({"name": "encoded + averaged + copied = all", "passed": covered == total, "value": covered, "bound": total})
    return {
        "kind": kind, "ratio": codecs[0].vae.config.true_ratio if codecs else None, "lambda": job.lam,
        "operator": job.operator, "space": job.space, "align": job.how.method, "control": job.how.control,
        "tensors": {**{action: len(tasks) for action, tasks in actions.items()}, "total": total,
                    "weights_encoded": size(t.name for t in actions["encoded"]), "weights_total": size(job.target.entries)},
        "roundtrip": {"nmse": nmse.get(0), "worst": worst},
        "distance": {"to_target": relative(tally.to_target),
                     "to_source": [relative(tally.to_source.get(i + 1) if defined else None) for i in range(len(job.sources))],
                     "to_average": relative(tally.to_average) if kind == "same-shape" else None},
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
        names = [task.name for task in job.tasks if task.why == why]
        print(f"  copied, {why}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
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


def metadata_of(job):
    """Provenance in the result's header: strings; no time and no path, so that equal runs give equal bytes."""
    facts = {"operator": job.operator, "space": job.space, "align": job.how.method, "control": job.how.control or "",
             "lambda": ",".join(f"{value:g}" for value in job.lam), "seed": str(job.seed)}
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
    actions = by_action(job)
    encoded = actions["encoded"]
    for task in encoded:
        print(f"  {task.name} {list(task.slots[0].shape)}" + "".join(f" <- {job.sources[i].path}: {name}" for i, name in task.partners))
    print(f"{kind}, align {job.how.method}, lambda {', '.join(f'{v:g}' for v in job.lam) or '-'}: "
          + " + ".join(f"{len(tasks)} {action}" for action, tasks in actions.items()) + f" = {len(job.tasks)} tensors")
    print(f"output: {a.output}, {plan_file(job.target.entries.values(), metadata_of(job))[2]:,} bytes")
    if job.space == "latent":
        vae = load_vae(a.vae)[0] if a.vae else VAE(VAEConfig())
        # Per chunk, each parameter of encoder or decoder is one multiplication and addition. All parents are encoded
        # (twice if a map is fitted) and decoded for the gate, and the result is decoded; alone, the target is the result.
        parents = sum(slot.numel for task in encoded for slot in task.slots)
        result = sum(task.slots[0].numel for task in encoded) if job.sources else 0
        passes = parents * (2 if job.how.method == "none" else 3) + result
        seconds = sum(p.numel() for p in vae.parameters()) * passes / vae.config.chunk / matmul_rate(getattr(torch, a.dtype))
        piece = min(PIECE, max(task.slots[0].numel for task in encoded)) * 8 * (4 + 3 * len(job.sources)) / 2 ** 20
        print(f"estimated: {seconds:.0f} s for the codec{'' if a.vae else ', after training a VAE'}; {200 + piece:.0f} MiB of memory")


def write_report(path, report):
    path, temporary = os.path.realpath(path), f"{os.path.realpath(path)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w") as stream:
            json.dump(report, stream, indent=1, allow_nan=False)
            stream.write("\n")
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


# --- The command line ------------------------------------------------------------------------------------------------
def parse(argv):
    parser = Parser(prog="merge.py", description="Merge checkpoints in the latent space of a weight VAE (LS-Merge).")
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="TARGET [SOURCE ...]: .safetensors files; the result has the target's names, "
        "shapes and dtypes")
    add("-o", "--output", default="merged.safetensors", help="(%(default)s)")
    add("--lam", metavar="L[,L...]", help="weight of each source in [0, 1], the target has the rest; 0 = the target's round "
        "trip (0.5 for one source of equal shapes, 1/(N+1) each for N, 0.1 in all across shapes)")
    add("--operator", choices=list(OPERATORS), default="lerp", help="(%(default)s)")
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


def check_usage(a, parser):
    """All that the command line alone decides: exit code 2."""
    sources = len(a.models) - 1
    if a.roundtrip and sources:
        parser.error("--roundtrip takes the target alone")
    if not a.roundtrip and not sources:
        parser.error("nothing to merge: give a SOURCE, or --roundtrip")
    if a.roundtrip and (a.lam or a.align or a.control or a.source_vae):
        parser.error("--roundtrip has no source: --lam, --align, --control and --source-vae do not apply")
    if a.dry_run and a.report:
        parser.error("--dry-run makes no report: drop --report")
    codec = ["vae", "save_vae", "source_vae", "align", "epsilon", "control", "residual", "roundtrip", "max_nmse"]
    given = [name for name in codec if getattr(a, name) not in (None, False)]
    given += [name for name, default in (("device", "auto"), ("dtype", "float32")) if getattr(a, name) != default]
    if a.space == "weight" and given:
        parser.error(f"--space weight uses no codec: drop --{given[0].replace('_', '-')}")
    if a.vae and a.save_vae:
        parser.error("--save-vae keeps a VAE trained here, --vae brings one: drop one of them")
    if a.source_vae and not a.vae:
        parser.error("--source-vae needs --vae for the target")
    if a.epsilon is not None and not (a.align == "sinkhorn" and math.isfinite(a.epsilon) and a.epsilon > 0):
        parser.error("--epsilon must be above 0 and goes with --align sinkhorn")
    if a.max_nmse is not None and not (math.isfinite(a.max_nmse) and a.max_nmse > 0):
        parser.error("--max-nmse must be above 0")
    parser.check_select(a.select)
    if a.lam is not None:
        try:
            a.lam = [float(value) for value in a.lam.split(",")]
            a.lam = a.lam * sources if len(a.lam) == 1 else a.lam
            convex_weights(a.lam)
        except ValueError as error:
            parser.error(f"--lam: {error}")
        if len(a.lam) != sources:
            parser.error(f"--lam has {len(a.lam)} values for {sources} sources: give one, or one each")


def default_lam(kind, count):
    """paper: the best lambda across shapes lies in 0.05 .. 0.20; ours: a uniform share for equal shapes."""
    return [0.1 / count if kind == "cross-shape" else 1 / (count + 1)] * count


def open_job(a):
    """Everything that can be refused before any work, in the order of its cost."""
    target, *sources = [Checkpoint(path) for path in a.models]
    inputs = [*a.models, *filter(None, (a.vae, a.source_vae))]
    outputs = [] if a.dry_run else [path for path in (a.output, a.save_vae, a.report) if path]
    for i, path in enumerate(outputs):
        check_output(path, inputs, a.force or path == a.report)
        need(os.path.realpath(path) not in map(os.path.realpath, outputs[:i]), path, "two outputs in one file", "give each its own")
    kind, method, tasks = plan_merge(target, sources, a.select, a.align or "auto", control=a.control)
    need(a.space == "latent" or kind != "cross-shape", a.models[0], "its encoded tensors and the source's differ in shape or name",
         "--space weight needs equal shapes: drop it")
    need(not a.source_vae or kind == "cross-shape", a.source_vae, "models of equal shapes share one VAE", "drop --source-vae")
    how = Alignment(method, a.control, a.epsilon or ot.EPSILON)
    lam = a.lam or default_lam(kind, len(sources))
    return kind, Job(target, sources, measure_slots(tasks, target, sources), lam, a.operator, a.space, how, a.residual, a.seed)


def main(argv=None):
    a = parse(argv)
    memory, seconds, clock = PeakMemory(), {}, time.perf_counter()
    def lap(stage):
        nonlocal clock
        seconds[stage], clock = time.perf_counter() - clock, time.perf_counter()
    kind, job = open_job(a)
    lap("read and check")
    if a.dry_run:
        return print_plan(kind, job, a)
    codecs = get_codecs(a, job) if a.space == "latent" else None
    lap("codec")
    tally, report, bound = Tally(), {}, a.max_nmse or MAX_NMSE

    def accept():
        for checkpoint in (job.target, *job.sources):
            checkpoint.check_unchanged()
        lap("merge and write")
        report.update(make_report(job, kind, tally, codecs, bound, seconds, memory.peak))
        if a.report:
            write_report(a.report, report)
        for gate in report["gates"]:
            if not gate["passed"]:
                print_report(report, job)
                raise CheckpointError(a.output, f"not written: gate failed: {gate['name']}: {gate['value']:.3g} > {gate['bound']:.3g}",
                                      "train a better VAE (train.py, more steps or a lower --ratio), or raise --max-nmse")
    entries = list(job.target.entries.values())
    bar = tqdm(total=sum(e.numel for e in entries), unit="weights", unit_scale=True, disable=True if a.quiet else None, leave=False)
    def counted():
        for name, start, piece in merged_pieces(job, codecs, tally):
            yield name, start, piece
            bar.update(piece.numel())
    write_checkpoint(a.output, entries, counted(), metadata_of(job), accept)
    print_report(report, job)
    print(f"wrote {a.output}")


if __name__ == "__main__":
    sys.exit(command(main))
