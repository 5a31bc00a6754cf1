"""Speed and memory, measured beside what they are to be held against; medians of interleaved runs.

    python experiments/bench.py --merge --memory --record       # whole processes: this file
    python experiments/bench.py --peer --peer-python peer/bin/python --record
    python experiments/bench.py --align --codec --training      # functions: bench_functions.py

In:    nothing but this repository; the models are made here (bench_models.py).
Out:   printed lines; with --record one JSON line each, appended to results/bench-PART.jsonl.
Paper: it reports neither time nor memory.

--merge: merge.py on two checkpoints of 126 M weights, over the time that the same arithmetic takes
at the matrix-multiply rate of all cores (measured before and after, same dtype) plus the bytes at
the disk's measured copy rate; with a network whose blocks all compute, and with the exact codec.

--memory: merge.py on pairs of 0.77 and 3 GB, each with one tensor of 500 MB: the peak of anonymous
memory must depend neither on the model nor on its largest tensor. Needs 10 GB of disk.

--peer: merge.py beside mergekit, its linear merge at weights 0.5 and 0.5, on two models of
Qwen2-0.5B's shape; whole processes, all imports included, in turns. mergekit wants an environment
of its own, as it pins other versions:

    python -m venv peer; peer/bin/pip install torch "mergekit>=0.1,<0.2"

Everything else is at its default for everyone: two threads on two cores, files in the page cache.
merge.py waits until its result is on the disk, mergekit leaves that to the system.
Memory is anonymous memory (RssAnon of Linux), of a process and all its children, looked at every
10 ms: what a process needs to itself; file pages that the system lends it do not count.
"""
import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import chunking
import lsmerge
from bench_functions import bench_align, bench_codec, bench_training, codec_operations
from bench_models import full_network, llama_pair, qwen2_pair
from vae import VAEConfig

HERE = Path(__file__).resolve().parent
MERGE = [sys.executable, str(HERE.parent / "merge.py")]
SAMPLING = 0.01             # seconds between two looks at a process's memory
MEMORY_BOUND = 350          # MiB, of --memory, at any size
ROUNDS = 3                  # of whole processes


def machine():
    """What a figure depends on and the code does not say."""
    return dict(python=platform.python_version(), torch=torch.__version__,
                threads=torch.get_num_threads(), load=round(os.getloadavg()[0], 2))


# --- Whole processes, watched from outside -------------------------------------------------------
def anonymous_mib(pid):
    """Anonymous memory of a process and of all below it, now, in MiB; 0 for one that has ended."""
    kib, waiting = 0, [pid]
    while waiting:
        folder = Path("/proc") / str(waiting.pop())
        try:
            lines = (folder / "status").read_text().splitlines()
            kib += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
            for task in (folder / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):     # it ended while we looked
            continue
    return kib / 1024


def watch(command):
    """Run a command to its end. Returns (seconds, peak anonymous memory in MiB, what it printed).
    Raises subprocess.CalledProcessError if it fails, with all that it printed."""
    with tempfile.TemporaryFile("w+") as printed:
        start, peak = time.perf_counter(), 0.0
        process = subprocess.Popen([str(part) for part in command], stdout=printed, stderr=printed)
        while process.poll() is None:
            peak = max(peak, anonymous_mib(process.pid))
            time.sleep(SAMPLING)
        seconds = time.perf_counter() - start
        printed.seek(0)
        text = printed.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, text)
    return seconds, peak, text


def run_merge(folder, *flags):
    """merge.py on a and b in a folder: (seconds, peak MiB, its report)."""
    seconds, peak, _ = watch([*MERGE, folder / "a.safetensors", folder / "b.safetensors",
                              "-o", folder / "merged.safetensors", "--force", "--quiet",
                              "--report", folder / "report.json", "--max-nmse", "1", *flags])
    return seconds, peak, json.loads((folder / "report.json").read_text())


# --- --merge -------------------------------------------------------------------------------------
def matmul_rate(dtype, seconds=6.0):
    """Operations per second of all cores on 1024 x 1024 matrices: the median over some seconds, as
    a core that has rested is faster at first than it can remain."""
    x, rates, began = torch.ones(1024, 1024, dtype=dtype), [], time.perf_counter()
    while time.perf_counter() - began < seconds or len(rates) < 5:
        start = time.perf_counter()
        for _ in range(4):
            x @ x
        rates.append(4 * 2 * 1024 ** 3 / (time.perf_counter() - start))
    return statistics.median(rates)


def copy_rate(path, scratch):
    """Bytes per second of reading a file and writing it anew, to the disk and not to its cache."""
    start = time.perf_counter()
    with open(path, "rb") as source, open(scratch, "wb") as target:
        shutil.copyfileobj(source, target, 2 ** 20)
        os.fsync(target.fileno())
    seconds = time.perf_counter() - start
    scratch.unlink()
    return path.stat().st_size / seconds


def merge_row(folder, entries, dtype, network):
    """One run of merge.py over what its arithmetic and its bytes alone would take."""
    arithmetic = getattr(torch, dtype)
    before, disk = matmul_rate(arithmetic), copy_rate(folder / "a.safetensors", folder / "copy")
    vae = str(folder / "full.safetensors") if network == "full" else "exact"
    seconds, peak, report = run_merge(folder, "--vae", vae, "--dtype", dtype)
    rate = (before + matmul_rate(arithmetic)) / 2
    # A copy reads and writes its bytes: both parents are read, one result is written.
    files = [folder / f"{name}.safetensors" for name in ("a", "b", "merged")]
    least = codec_operations(lsmerge.Codec.load(vae), entries, 2) / rate
    least += sum(file.stat().st_size for file in files) / 2 / disk
    return dict(what="merge", weights=sum(e.numel for e in entries), dtype=dtype, network=network,
                seconds=round(seconds, 2), least=round(least, 2), ratio=round(seconds / least, 3),
                gflops=round(rate / 1e9, 1), copy_mb_s=round(disk / 1e6), peak_mib=round(peak, 1),
                stages=report["seconds"])


def bench_merge(quick):
    """Yields a row per run; three runs of each arithmetic and network."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entries = llama_pair(folder, layers=1 if quick else 10, hidden=1024, mlp=2752, vocab=256)
        chunking.write_tensors(folder / "full.safetensors", *full_network(VAEConfig()).to_file({}))
        cells = itertools.product(("float32", "bfloat16"), ("full", "exact"))
        for dtype, network in cells:
            for _ in range(1 if quick else ROUNDS):
                row = machine() | merge_row(folder, entries, dtype, network)
                print("merge {:.0f} M weights, {}, {}: {:.1f} s, {:.2f} times the {:.1f} s of "
                      "arithmetic ({:.0f} GFLOP/s) and bytes ({} MB/s)".format(
                          row["weights"] / 1e6, dtype, network, row["seconds"], row["ratio"],
                          row["least"], row["gflops"], row["copy_mb_s"]), flush=True)
                yield row


# --- --memory ------------------------------------------------------------------------------------
def bench_memory(quick):
    """Yields a row per size and codec."""
    for layers in (1, 2) if quick else (10, 100):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            llama_pair(folder, layers=layers, hidden=1024, mlp=2752, vocab=256,
                       big=2048 if quick else 250_000)
            # A small network, so that 3 GB take minutes; what lies in memory is pieces, not it.
            small = full_network(VAEConfig(width=64, blocks=1))
            chunking.write_tensors(folder / "full.safetensors", *small.to_file({}))
            for network, vae in (("full", folder / "full.safetensors"), ("exact", "exact")):
                seconds, peak, _ = run_merge(folder, "--vae", vae)
                size = (folder / "merged.safetensors").stat().st_size
                verdict = "pass" if peak <= MEMORY_BOUND else "MISS"
                print(f"{size / 1e9:.2f} GB per checkpoint, {network}: {seconds:.0f} s, peak "
                      f"{peak:.0f} MiB anonymous  bound {MEMORY_BOUND}  {verdict}", flush=True)
                yield machine() | dict(what="memory", bytes=size, network=network,
                                       peak_mib=round(peak, 1), bound_mib=MEMORY_BOUND,
                                       seconds=round(seconds, 1))


# --- --peer --------------------------------------------------------------------------------------
# Our way -> most of mergekit's time, most of its memory. Reported, never enforced.
PEER_TARGETS = {"exact": (0.8, 0.25), "weight": (0.6, 0.25)}


def peer_version(python):
    """mergekit's version in another environment, or None."""
    code = "import importlib.metadata; print(importlib.metadata.version('mergekit'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def peer_commands(folder, python):
    """{name: command} of the three that are compared; each writes folder/NAME."""
    a, b = folder / "a", folder / "b"
    recipe = folder / "linear.yml"
    recipe.write_text(json.dumps({       # JSON is YAML
        "merge_method": "linear", "dtype": "bfloat16",
        "models": [{"model": str(path), "parameters": {"weight": 0.5}} for path in (a, b)]}))
    ours = [*MERGE, a, b, "--quiet", "-o"]
    return {"mergekit": [python, "-m", "mergekit.scripts.run_yaml", recipe, folder / "mergekit",
                         "--quiet"],
            "exact": [*ours, folder / "exact", "--vae", "exact"],
            "weight": [*ours, folder / "weight", "--space", "weight"]}


def same_tensors(path, other):
    """Whether two checkpoints hold the same names, dtypes and shapes, and the same bits."""
    mine, theirs = chunking.Checkpoint(path), chunking.Checkpoint(other)
    if ({n: (e.dtype, e.shape) for n, e in mine.entries.items()}
            != {n: (e.dtype, e.shape) for n, e in theirs.entries.items()}):
        return False
    for name, entry in mine.entries.items():
        for span in chunking.spans(entry.numel):
            pieces = [c.read(name, *span).view(torch.uint8) for c in (mine, theirs)]
            if not torch.equal(*pieces):        # as bytes: -0.0 is not 0.0, and NaN is NaN
                return False
    return True


def middle(values):
    """(median, least, most), rounded."""
    return [round(value, 3) for value in (statistics.median(values), min(values), max(values))]


def peer_rounds(folder, commands, rounds):
    """{name: [seconds, ...]}, {name: [MiB, ...]} of runs in turns, so that load hits all alike."""
    seconds, peaks = ({name: [] for name in commands} for _ in range(2))
    for _ in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(folder / name, ignore_errors=True)
            os.sync()           # nobody pays for the writes of whoever ran before
            taken, peak, _ = watch(command)
            seconds[name].append(taken)
            peaks[name].append(peak)
    return seconds, peaks


def peer_row(seconds, peaks):
    """Medians and ranges; the ratios are taken within a round, ours over mergekit's."""
    ratios, memory = {}, {}
    for name in PEER_TARGETS:
        ratios[name] = middle([x / y for x, y in zip(seconds[name], seconds["mergekit"])])
        memory[name] = middle([x / y for x, y in zip(peaks[name], peaks["mergekit"])])
    return dict(what="peer", rounds=len(seconds["mergekit"]), ratios=ratios, memory_ratios=memory,
                seconds={name: middle(values) for name, values in seconds.items()},
                peak_mib={name: middle(values) for name, values in peaks.items()})


def print_peer(row):
    for name, (median, low, high) in row["seconds"].items():
        peak, start = row["peak_mib"][name][0], row["start"][name]
        print(f"{name:9} {median:6.2f} s [{low:.2f}, {high:.2f}], peak {peak:.0f} MiB anonymous; "
              f"--help alone takes {start:.1f} s")
    for name, (time_target, memory_target) in PEER_TARGETS.items():
        for what, (median, low, high), target in (
                ("time", row["ratios"][name], time_target),
                ("memory", row["memory_ratios"][name], memory_target)):
            print(f"{name:7} / mergekit, {what:7} {median:.2f} [{low:.2f}, {high:.2f}]  "
                  f"target {target}  {'pass' if median <= target else 'MISS'}")
    print("weight and mergekit: the tensors are " + ("equal bit for bit" if row["equal_bits"]
                                                     else "NOT equal"), flush=True)


def bench_peer(quick, python):
    """Yields one row: times, memory, ratios, and whether plain averaging gives mergekit's bits."""
    version = peer_version(python)
    if version is None:
        print(f"mergekit is not installed in {python}: not run; fix: python -m venv peer; "
              'peer/bin/pip install torch "mergekit>=0.1,<0.2"; --peer-python peer/bin/python')
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = dict(num_hidden_layers=2, vocab_size=1024) if quick else {}
        qwen2_pair(folder, **small)
        commands = peer_commands(folder, python)
        helps = {"mergekit": [*commands["mergekit"][:3], "--help"],
                 "exact": [*MERGE, "--help"], "weight": [*MERGE, "--help"]}
        start = {key: round(watch(command)[0], 2) for key, command in helps.items()}
        facts = machine()
        seconds, peaks = peer_rounds(folder, commands, 1 if quick else ROUNDS)
        weights = folder / "a" / "model.safetensors"
        row = facts | peer_row(seconds, peaks) | dict(
            peer=f"mergekit {version}", bytes=weights.stat().st_size, start=start,
            equal_bits=same_tensors(folder / "weight", folder / "mergekit"))
        print(f"mergekit {version}, {row['bytes'] / 1e9:.2f} GB per model, {row['rounds']} rounds")
        print_peer(row)
        yield row


# A part is a generator of rows.
PARTS = {"align": bench_align, "merge": bench_merge, "memory": bench_memory, "codec": bench_codec,
         "training": bench_training, "peer": bench_peer}


def append(path, row):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in PARTS:
        parser.add_argument(f"--{name}", action="store_true", help=f"run the part {name!r}")
    parser.add_argument("--quick", action="store_true", help="smallest size, fewest rounds")
    parser.add_argument("--budget", type=int, default=4000, metavar="STEPS",
                        help="of the release's recipe in --training at most (%(default)s)")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON",
                        help="the Python that has mergekit (this one)")
    parser.add_argument("--record", nargs="?", const="", metavar="FILE",
                        help="append each row to FILE (results/bench-PART.jsonl)")
    arguments = parser.parse_args(argv)
    chosen = [name for name in PARTS if getattr(arguments, name)]
    if not chosen:
        parser.error("choose a part: " + ", ".join(f"--{name}" for name in PARTS))
    options = {"training": [arguments.budget], "peer": [arguments.peer_python]}
    for name in chosen:
        for row in PARTS[name](arguments.quick, *options.get(name, [])):
            if arguments.record is not None:
                file = arguments.record or HERE / "results" / f"bench-{name}.jsonl"
                append(file, {"section": name} | row)


if __name__ == "__main__":
    main()
