"""Speed and memory, beside what they are to be held against.

    python experiments/bench.py --peer --peer-python peer/bin/python
    python experiments/bench.py --networks --peer-python peer/bin/python
    python experiments/bench.py --memory
    python experiments/bench.py --align                     # needs POT

In:    nothing but this repository; the checkpoints are made here. Speed and memory do
       not depend on what the weights are worth, only on how many there are and which
       shapes they have.
Out:   results/bench-PART.jsonl, and the section.
Paper: it reports neither time nor memory.

--peer: merge.py beside mergekit, its linear merge at weights 0.5 and 0.5, on two models
of Qwen2-0.5B's shape; whole processes, all imports included, in turns. mergekit wants
an environment of its own, as it pins other versions:

    python -m venv peer; peer/bin/pip install torch "mergekit>=0.1,<0.2"

--networks: such a pair with 6 of the 24 layers, merged through the networks that
codec.py --search compares. What they have learnt does not change how long they take:
they are at their exact start.

--memory: merge.py on pairs of 1 and 3 GB, each with one encoded matrix of 500 MB: the
peak of anonymous memory must depend neither on the model nor on its largest tensor.
Needs 10 GB of disk.

--align: align.py's Sinkhorn beside three solvers of POT (Python Optimal Transport).
Every solver gets the iterations it needs for the same
*measured* marginal error, the larger L1 error of both sides of the plan it returns:
1e-9 at epsilon 0.05, 1e-6 below. POT's own threshold is a 2-norm of one side, so it is
not used: its solvers are all the plain iteration, whose steps are counted beforehand.
On a busy machine set OMP_NUM_THREADS=1, or threads wait for each other.

Everything else is at its default for everyone, files in the page cache. merge.py waits
until its result is on the disk, mergekit leaves that to the system. Memory is anonymous
memory (RssAnon of Linux), of a process and all its children, looked at every 10 ms:
what a process needs to itself; file pages that the system lends it do not count.
Previous: real.py. Next: results.py.
"""
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from compare import (HERE, collect, command_line, find, grouped, machine, several, span,
                     table)
import align
import chunking
from codec import DEPTHS, WIDTHS
from merge import REFERENCE
from train import Schedule, save_vae
from vae import VAE, VAEConfig, generator_for

MERGE = [sys.executable, str(HERE.parent / "merge.py")]
SAMPLING = 0.01             # seconds between two looks at a process's memory
MEMORY_BOUND = 350          # MiB, of --memory, at any size
ROUNDS = 3                  # of whole processes


def conditions():
    """What a time depends on, and the code does not say."""
    return machine() | {"load": round(os.getloadavg()[0], 2)}


# --- What is merged -----------------------------------------------------------------
SPREAD = 0.02               # standard deviation of the weights, as of a new Llama
NOISE = 0.005               # of what the second model of a pair has on top of the first
# Qwen2-0.5B as its config.json has it: 494 M weights, of which 136 M are the
# embedding's.
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
         "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
         "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
         "tie_word_embeddings": True, "hidden_act": "silu",
         "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
         "torch_dtype": "bfloat16"}
# of --quick
SMALL = {"hidden_size": 112, "intermediate_size": 256, "num_hidden_layers": 2,
         "vocab_size": 1024}


def qwen2_shapes(config, big=0):
    """{name: shape} of a Qwen2: biases at q, k, v, grouped queries, a tied head.
    big: rows of one more matrix, in layer 0."""
    hidden = config["hidden_size"]
    mlp = config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden),
              "model.norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for role, rows in (("q", hidden), ("k", kv), ("v", kv)):
            shapes[layer + f"self_attn.{role}_proj.weight"] = (rows, hidden)
            shapes[layer + f"self_attn.{role}_proj.bias"] = (rows,)
        shapes[layer + "self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[layer + "mlp.gate_proj.weight"] = (mlp, hidden)
        shapes[layer + "mlp.up_proj.weight"] = (mlp, hidden)
        shapes[layer + "mlp.down_proj.weight"] = (hidden, mlp)
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
    if big:
        shapes["model.layers.0.mlp.big_proj.weight"] = (big, hidden)
    return shapes


def write_weights(path, shapes, noise):
    """N(0, SPREAD^2) in bfloat16, the same for every file; with `noise` plus N(0,
    NOISE^2). Piece by piece, so that 3 GB need not fit into memory."""
    entries = []
    for name, shape in shapes.items():
        entries.append(chunking.Entry(name, torch.bfloat16, shape,
                                      place=chunking.parse_name(name)))
    with chunking.create(path, entries) as output:
        for number, entry in enumerate(entries):
            draws = torch.Generator().manual_seed(number)
            more = torch.Generator().manual_seed(1000 + number)
            for start, stop in chunking.spans(entry.numel):
                piece = SPREAD * torch.randn(stop - start, generator=draws)
                if noise:
                    piece += NOISE * torch.randn(stop - start, generator=more)
                output.put(entry.name, start, piece.bfloat16())


def write_pair(folder, big=0, **changes):
    """Folders a and b in the Hugging Face layout, the second the first with noise on
    it: weights, config.json and the smallest tokenizer, which other tools copy along.
    changes: of QWEN2."""
    config = QWEN2 | changes
    tokenizer = {"version": "1.0",
                 "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    files = {"config.json": config, "tokenizer.json": tokenizer,
             "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        write_weights(folder / name / "model.safetensors", qwen2_shapes(config, big),
                      noise=name == "b")
        for file, content in files.items():
            (folder / name / file).write_text(json.dumps(content, indent=2))


# --- Whole processes, watched from outside ------------------------------------------
def anonymous_mib(pid):
    """Anonymous memory of a process and of all below it, now, in MiB; 0 for one that
    has ended."""
    kib = 0
    waiting = [pid]
    while waiting:
        folder = Path("/proc") / str(waiting.pop())
        try:
            for line in (folder / "status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    kib += int(line.split()[1])
            for task in (folder / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):     # it ended while we looked
            continue
    return kib / 1024


def watch(command):
    """Run a command to its end. Returns (seconds, peak anonymous memory in MiB). Raises
    subprocess.CalledProcessError, with all that it printed, if it fails."""
    with tempfile.TemporaryFile("w+") as printed:
        start = time.perf_counter()
        peak = 0.0
        process = subprocess.Popen([str(part) for part in command], stdout=printed,
                                   stderr=printed)
        while process.poll() is None:
            peak = max(peak, anonymous_mib(process.pid))
            time.sleep(SAMPLING)
        seconds = time.perf_counter() - start
        printed.seek(0)
        text = printed.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, text)
    return seconds, peak


# --- --memory -----------------------------------------------------------------------
def bench_memory(quick):
    """Yields a row per size and codec."""
    for layers in (1,) if quick else (24, 92):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            small = SMALL if quick else {}
            write_pair(folder, big=2048 if quick else 280_000,
                       **small | {"num_hidden_layers": layers})
            size = (folder / "a" / "model.safetensors").stat().st_size
            for network, vae in (("reference", REFERENCE), ("exact", "exact")):
                facts = conditions()
                seconds, peak = watch([*MERGE, folder / "a", folder / "b", "-o",
                                       folder / network, "--quiet", "--vae", vae])
                yield facts | {"what": "memory", "bytes": size, "network": network,
                               "peak_mib": round(peak, 1), "bound_mib": MEMORY_BOUND,
                               "seconds": round(seconds, 1)}


def section_memory(rows):
    lines = []
    for row in rows:
        lines.append([f"{row['bytes'] / 1e9:.2f}", row["network"],
                      f"{row['peak_mib']:.0f}", f"{row['seconds']:.0f}"])
    return table(["GB per checkpoint", "codec", "peak MiB", "seconds"], lines)


# --- --peer -------------------------------------------------------------------------
# Ours, each over mergekit's: the default, the exact codec, the plain average.
WAYS = {"default": [], "exact": ["--vae", "exact"], "weight": ["--space", "weight"]}


def peer_version(python):
    """mergekit's version in another environment, or None."""
    code = "import importlib.metadata; print(importlib.metadata.version('mergekit'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def peer_commands(folder, python):
    """{name: command}; each writes folder/NAME."""
    a = folder / "a"
    b = folder / "b"
    recipe = folder / "linear.yml"
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (a, b)]
    recipe.write_text(json.dumps({       # JSON is YAML
        "merge_method": "linear", "dtype": "bfloat16", "models": models}))
    commands = {"mergekit": [python, "-m", "mergekit.scripts.run_yaml", recipe,
                             folder / "mergekit", "--quiet"]}
    for name, flags in WAYS.items():
        commands[name] = [*MERGE, a, b, "--quiet", "-o", folder / name, *flags]
    return commands


def same_tensors(path, other):
    """Whether two checkpoints hold the same names, dtypes and shapes, and the same
    bits."""
    mine = chunking.Checkpoint(path)
    theirs = chunking.Checkpoint(other)
    kinds = []
    for model in (mine, theirs):
        kinds.append({name: (entry.dtype, entry.shape)
                      for name, entry in model.entries.items()})
    if kinds[0] != kinds[1]:
        return False
    for name, entry in mine.entries.items():
        for span_ in chunking.spans(entry.numel):
            # As bytes: -0.0 is not 0.0, and NaN is NaN.
            one = mine.read(name, *span_).view(torch.uint8)
            if not torch.equal(one, theirs.read(name, *span_).view(torch.uint8)):
                return False
    return True


def middle(values):
    """[median, least, most], rounded."""
    return [round(value, 3)
            for value in (statistics.median(values), min(values), max(values))]


def peer_rounds(folder, commands, rounds):
    """{name: [seconds, ...]}, {name: [MiB, ...]} of runs in turns, so that load hits
    all alike."""
    seconds = {name: [] for name in commands}
    peaks = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(folder / name, ignore_errors=True)
            os.sync()           # nobody pays for the writes of whoever ran before
            taken, peak = watch(command)
            seconds[name].append(taken)
            peaks[name].append(peak)
    return seconds, peaks


def ratios_of(values, start=None):
    """{way: [median, least, most] of ours over mergekit's, within a round}; with what
    starting takes, {name: seconds}, taken off both."""
    found = {}
    for name in values:
        if name != "mergekit":
            ratios = []
            for mine, theirs in zip(values[name], values["mergekit"]):
                if start:
                    mine -= start["merge.py"]
                    theirs -= start["mergekit"]
                ratios.append(mine / theirs)
            found[name] = middle(ratios)
    return found


def bench_peer(quick, python):
    """Yields one row: times, memory, ratios, and whether plain averaging gives
    mergekit's bits."""
    version = peer_version(python)
    if version is None:
        print(f"mergekit is not installed in {python}: not run; fix: python -m venv "
              'peer; peer/bin/pip install torch "mergekit>=0.1,<0.2"; --peer-python '
              "peer/bin/python")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pair(folder, **SMALL if quick else {})
        commands = peer_commands(folder, python)
        helps = {"mergekit": [*commands["mergekit"][:3], "--help"],
                 "merge.py": [*MERGE, "--help"]}
        start = {key: round(watch(command)[0], 2) for key, command in helps.items()}
        facts = conditions()
        seconds, peaks = peer_rounds(folder, commands, 1 if quick else ROUNDS)
        size = (folder / "a" / "model.safetensors").stat().st_size
        yield facts | {
            "what": "peer", "rounds": len(seconds["mergekit"]),
            "ratios": ratios_of(seconds), "ratios_started": ratios_of(seconds, start),
            "memory_ratios": ratios_of(peaks),
            "seconds": {key: middle(values) for key, values in seconds.items()},
            "peak_mib": {key: middle(values) for key, values in peaks.items()},
            "peer": f"mergekit {version}", "bytes": size, "start": start,
            "equal_bits": same_tensors(folder / "weight", folder / "mergekit")}


def bench_networks(quick, python):
    """Yields a row per network: seconds of the merge, and over mergekit's in the same
    run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pair(folder, **SMALL if quick else {"num_hidden_layers": 6})
        commands = {"mergekit": peer_commands(folder, python)["mergekit"]}
        networks = list(itertools.product(WIDTHS, DEPTHS))
        for width, blocks in networks:
            vae = VAE(VAEConfig(width=width, blocks=blocks, init="pca"))
            file = folder / f"{width}-{blocks}.safetensors"
            save_vae(file, vae.start(generator_for(0)), [], Schedule(), False,
                     trained_on=[])
            commands[f"{width}, {blocks}"] = [
                *MERGE, folder / "a", folder / "b", "--quiet", "--vae", file, "-o",
                folder / f"{width}, {blocks}"]
        facts = conditions()
        seconds, _ = peer_rounds(folder, commands, 1)
        theirs = seconds.pop("mergekit")[0]
        for (width, blocks), (mine,) in zip(networks, seconds.values()):
            yield facts | {"what": "networks", "width": width, "blocks": blocks,
                           "seconds": round(mine, 1), "ratio": round(mine / theirs, 2),
                           "peer_seconds": round(theirs, 1)}


def section_networks(rows):
    lines = []
    for row in rows:
        lines.append([row["width"], row["blocks"], f"{row['seconds']:.0f}",
                      f"{row['ratio']:.1f}"])
    return table(["width", "blocks", "seconds of the merge", "over mergekit's"], lines)


NAMES = {"default": "`merge.py`, the reference VAE", "exact": "`--vae exact`",
         "weight": "`--space weight`"}


def section_peer(rows):
    """With and without what starting Python and its imports takes."""
    peer = rows[-1]
    lines = []
    for name in WAYS:
        if name in peer["ratios"]:
            started = peer.get("ratios_started")
            lines.append([NAMES[name], f"{peer['seconds'][name][0]:.1f} s",
                          span(peer["ratios"][name]),
                          span(started[name]) if started else "",
                          f"{peer['peak_mib'][name][0]:.0f} MiB"])
    lines.append([peer["peer"], f"{peer['seconds']['mergekit'][0]:.1f} s", "1", "1",
                  f"{peer['peak_mib']['mergekit'][0]:.0f} MiB"])
    return table([f"two models of {peer['bytes'] / 1e9:.2f} GB", "time",
                  "over mergekit's [least, largest]", "without start-up", "memory"],
                 lines)


# --- Functions, timed in this process -----------------------------------------------
def interleaved(runs, rounds):
    """{name: function} -> {name: (median seconds, result)}, in rounds: load hits all
    alike."""
    seconds = {name: [] for name in runs}
    results = {}
    for _ in range(rounds):
        for name, run in runs.items():
            if seconds[name] and seconds[name][0] > SLOW:
                continue
            start = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(seconds[name]), results[name]) for name in runs}


SLOW = 10.0             # seconds; what takes longer is timed once, not ROUNDS times
REPEATS = 5


# --- --align ------------------------------------------------------------------------
SIZES = [(512, 512), (1024, 1536), (2048, 1024)]
CLOUDS = ("isotropic", "anisotropic", "heavy-tailed")
LATENT = 32                 # numbers per point
# POT stops here at the latest: its ratio is then an upper bound
MOST_PLAIN = 3000
SOLVERS = ("sinkhorn", "sinkhorn_stabilized", "sinkhorn_log")       # of POT


def cloud(n, kind, generator):
    """(n, LATENT) float64 points of one of CLOUDS."""
    z = torch.randn(n, LATENT, generator=generator, dtype=torch.float64)
    if kind == "anisotropic":
        return z * torch.logspace(0, -2, LATENT, dtype=torch.float64)
    # Student t, 3 degrees of freedom, one scale per point
    if kind == "heavy-tailed":
        half = torch.full((n, 1), 1.5, dtype=torch.float64)
        return z / (torch._standard_gamma(half, generator=generator) / 1.5).sqrt()
    return z


def plain_iterations(cost_IJ, epsilon, tolerance):
    """How many plain Sinkhorn iterations (v, then u, like POT) reach the tolerance, in
    tens."""
    I, J = cost_IJ.shape
    kernel = (cost_IJ / (-epsilon * cost_IJ.max())).exp()
    u = torch.full((I,), 1 / I, dtype=torch.float64)
    for iteration in range(1, MOST_PLAIN + 1):
        v = 1 / J / (kernel.T @ u)
        u = 1 / I / (kernel @ v)
        error = (v * (kernel.T @ u) - 1 / J).abs().sum()
        if iteration % 10 == 0 and error <= tolerance:
            return iteration
    return MOST_PLAIN


def marginal_error(plan):
    """The larger L1 error of a plan's two sides, against uniform masses."""
    plan = torch.as_tensor(plan)
    n, m = plan.shape
    rows = (plan.sum(1) - 1 / n).abs().sum().item()
    columns = (plan.sum(0) - 1 / m).abs().sum().item()
    return max(rows, columns)


def sinkhorn_cell(ot, n, m, kind, epsilon, rounds):
    """One row: sizes, iterations, seconds, measured errors and ratios of ours and POT's
    solvers."""
    generator = torch.Generator().manual_seed(n + m)
    cost = align.squared_cost(cloud(n, kind, generator), cloud(m, kind, generator))
    tolerance = 1e-9 if epsilon >= 0.05 else 1e-6
    plain = plain_iterations(cost, epsilon, tolerance)
    M = (cost / cost.max()).numpy()
    options = dict(reg=epsilon, numItermax=plain, stopThr=0.0, warn=False)
    solve = ot.bregman
    runs = {"ours": lambda: align.sinkhorn(cost, epsilon, tolerance).plan_IJ,
            "sinkhorn": lambda: solve.sinkhorn_knopp([], [], M, **options),
            "sinkhorn_stabilized":
                lambda: solve.sinkhorn_stabilized([], [], M, tau=1e6, **options),
            "sinkhorn_log": lambda: solve.sinkhorn_log([], [], M, **options)}
    timed = interleaved(runs, rounds)
    seconds = {name: round(one, 5) for name, (one, _) in timed.items()}
    errors = {name: float(f"{marginal_error(plan):.2g}")
              for name, (_, plan) in timed.items()}
    ratios = {name: round(timed["ours"][0] / timed[name][0], 3) for name in SOLVERS}
    return {"what": "sinkhorn", "n": n, "m": m, "kind": kind, "latent": LATENT,
            "epsilon": epsilon, "tolerance": tolerance, "plain_iterations": plain,
            "iterations": align.sinkhorn(cost, epsilon, tolerance).iterations,
            "seconds": seconds, "errors": errors, "ratios": ratios}


def bench_align(quick):
    """Yields one row per cell."""
    import ot               # pip install POT
    rounds = 2 if quick else REPEATS
    facts = conditions() | {"pot": ot.__version__, "rounds": rounds}
    sizes = SIZES[:1] if quick else SIZES
    for (n, m), kind, epsilon in itertools.product(sizes, CLOUDS, (0.05, 0.01, 0.005)):
        yield facts | sinkhorn_cell(ot, n, m, kind, epsilon, rounds)


def section_align(rows):
    plans = find(rows, what="sinkhorn")
    lines = []
    for (kind, epsilon), group in grouped(plans, "kind", "epsilon").items():
        line = [kind, f"{epsilon:g}"]
        for name in SOLVERS:
            ratios = [row["ratios"][name] for row in group]
            line.append(several(ratios, "{:.2f}".format))
        lines.append(line)
    over = [max(row["ratios"].values()) for row in plans]
    text = (f"Ours over POT's fastest, of {len(over)} problems: median "
            f"{statistics.median(over):.2f}; faster in {sum(r < 1 for r in over)}.\n")
    return text + "\n" + table(["cloud", "epsilon", "ours / sinkhorn",
                                "ours / sinkhorn_stabilized", "ours / sinkhorn_log"],
                               lines)


# --- The command --------------------------------------------------------------------
# A part is a generator of rows, and what shows them.
PARTS = {"peer": (bench_peer, section_peer),
         "networks": (bench_networks, section_networks),
         "memory": (bench_memory, section_memory),
         "align": (bench_align, section_align)}


def main():
    parser = command_line(__doc__)
    for name in PARTS:
        parser.add_argument(f"--{name}", action="store_true",
                            help=f"run the part {name!r}")
    parser.add_argument("--quick", action="store_true",
                        help="smallest size, fewest rounds; nothing is kept")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON",
                        help="the Python that has mergekit (this one)")
    args = parser.parse_args()
    chosen = [name for name in PARTS if getattr(args, name)]
    if not chosen:
        parser.error("choose a part: " + ", ".join(f"--{name}" for name in PARTS))
    for name in chosen:
        measure, section = PARTS[name]
        options = [args.peer_python] if name in ("peer", "networks") else []
        rows = collect(f"bench-{name}", measure(args.quick, *options), args)
        if rows:
            print(section(rows))


if __name__ == "__main__":
    main()
