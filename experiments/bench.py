"""Speed and memory, measured beside what they are to be held against; medians of
interleaved runs.

    python experiments/bench.py --merge --memory --record  # processes: this file
    python experiments/bench.py --peer --peer-python peer/bin/python --record
    python experiments/bench.py --align --codec --training # bench_functions.py

In:    nothing but this repository; the models are made here (bench_models.py).
Out:   printed tables; with --record the rows of results/bench-PART.jsonl.
Paper: it reports neither time nor memory.

--merge: merge.py on two checkpoints of 126 M weights, over the time that the same
arithmetic takes at the matrix-multiply rate of all cores (measured before and after,
same dtype) plus the bytes at the disk's measured copy rate; with a network whose blocks
all compute, and with the exact codec.

--memory: merge.py on pairs of 0.77 and 3 GB, each with one tensor of 500 MB: the peak
of anonymous memory must depend neither on the model nor on its largest tensor. Needs 10
GB of disk.

--peer: merge.py beside mergekit, its linear merge at weights 0.5 and 0.5, on two models
of Qwen2-0.5B's shape; whole processes, all imports included, in turns. mergekit wants
an environment of its own, as it pins other versions:

    python -m venv peer; peer/bin/pip install torch "mergekit>=0.1,<0.2"

Everything else is at its default for everyone: two threads on two cores, files in the
page cache. merge.py waits until its result is on the disk, mergekit leaves that to the
system. Memory is anonymous memory (RssAnon of Linux), of a process and all its
children, looked at every 10 ms: what a process needs to itself; file pages that the
system lends it do not count.
"""
import argparse
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

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "tools")]
import chunking
import lsmerge
import sections
from bench_functions import (bench_align, bench_codec, bench_training, codec_operations,
                             conditions)
from bench_models import full_network, llama_pair, qwen2_pair
from records import Results, keep
from vae import VAEConfig

MERGE = [sys.executable, str(HERE.parent / "merge.py")]
SAMPLING = 0.01             # seconds between two looks at a process's memory
MEMORY_BOUND = 350          # MiB, of --memory, at any size
ROUNDS = 3                  # of whole processes


# --- Whole processes, watched from outside --------------------------------------------
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
    """Run a command to its end. Returns (seconds, peak anonymous memory in MiB, what it
    printed). Raises subprocess.CalledProcessError if it fails, with all that it
    printed."""
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
    return seconds, peak, text


def run_merge(folder, *flags):
    """merge.py on a and b in a folder: (seconds, peak MiB, its report)."""
    report = folder / "report.json"
    seconds, peak, _ = watch([*MERGE, folder / "a.safetensors",
                              folder / "b.safetensors", "-o",
                              folder / "merged.safetensors", "--force", "--quiet",
                              "--report",
                              report, "--max-nmse", "1", *flags])
    return seconds, peak, json.loads(report.read_text())


# --- --merge --------------------------------------------------------------------------
def matmul_rate(dtype, seconds=6.0):
    """Operations per second of all cores on 1024 x 1024 matrices: the median over some
    seconds, as a core that has rested is faster at first than it can remain."""
    x = torch.ones(1024, 1024, dtype=dtype)
    rates = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(rates) < 5:
        start = time.perf_counter()
        for _ in range(4):
            x @ x
        rates.append(4 * 2 * 1024 ** 3 / (time.perf_counter() - start))
    return statistics.median(rates)


def copy_rate(path, scratch):
    """Bytes per second of reading a file and writing it anew, to the disk and not to
    its cache."""
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
    before = matmul_rate(arithmetic)
    disk = copy_rate(folder / "a.safetensors", folder / "copy")
    vae = str(folder / "full.safetensors") if network == "full" else "exact"
    seconds, peak, report = run_merge(folder, "--vae", vae, "--dtype", dtype)
    rate = (before + matmul_rate(arithmetic)) / 2
    # A copy reads and writes its bytes: both parents are read, one result is written.
    files = [folder / f"{name}.safetensors" for name in ("a", "b", "merged")]
    moved = sum(file.stat().st_size for file in files) / 2
    least = codec_operations(lsmerge.Codec.load(vae), entries, 2) / rate + moved / disk
    return {"what": "merge", "weights": sum(e.numel for e in entries), "dtype": dtype,
            "network": network, "seconds": round(seconds, 2), "least": round(least, 2),
            "ratio": round(seconds / least, 3), "gflops": round(rate / 1e9, 1),
            "copy_mb_s": round(disk / 1e6), "peak_mib": round(peak, 1),
            "stages": report["seconds"]}


def write_network(path, config):
    tensors, metadata = full_network(config).to_file({"trained_on": ["nothing"]})
    chunking.write_tensors(path, tensors, metadata)


def bench_merge(quick):
    """Yields a row per run; three runs of each arithmetic and network."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entries = llama_pair(folder, layers=1 if quick else 10, hidden=1024, mlp=2752,
                             vocab=256)
        write_network(folder / "full.safetensors", VAEConfig(init="pca"))
        cells = itertools.product(("float32", "bfloat16"), ("full", "exact"),
                                  range(1 if quick else ROUNDS))
        for dtype, network, number in cells:
            facts = conditions() | {"round": number}
            yield facts | merge_row(folder, entries, dtype, network)


# --- --memory -------------------------------------------------------------------------
def bench_memory(quick):
    """Yields a row per size and codec."""
    for layers in (1, 2) if quick else (10, 100):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            llama_pair(folder, layers=layers, hidden=1024, mlp=2752, vocab=256,
                       big=2048 if quick else 250_000)
            write_network(folder / "full.safetensors", VAEConfig(init="pca"))
            for network in ("full", "exact"):
                vae = folder / "full.safetensors" if network == "full" else "exact"
                facts = conditions()
                seconds, peak, _ = run_merge(folder, "--vae", vae)
                size = (folder / "merged.safetensors").stat().st_size
                yield facts | {"what": "memory", "bytes": size, "network": network,
                               "peak_mib": round(peak, 1), "bound_mib": MEMORY_BOUND,
                               "seconds": round(seconds, 1)}


# --- --peer ---------------------------------------------------------------------------
WAYS = ("exact", "weight")      # ours, each over mergekit's


def peer_version(python):
    """mergekit's version in another environment, or None."""
    code = "import importlib.metadata; print(importlib.metadata.version('mergekit'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def peer_commands(folder, python):
    """{name: command} of the three that are compared; each writes folder/NAME."""
    a = folder / "a"
    b = folder / "b"
    recipe = folder / "linear.yml"
    recipe.write_text(json.dumps({       # JSON is YAML
        "merge_method": "linear", "dtype": "bfloat16",
        "models": [{"model": str(path), "parameters": {"weight": 0.5}}
                   for path in (a, b)]}))
    ours = [*MERGE, a, b, "--quiet", "-o"]
    return {"mergekit": [python, "-m", "mergekit.scripts.run_yaml", recipe,
                         folder / "mergekit",
                         "--quiet"],
            "exact": [*ours, folder / "exact", "--vae", "exact"],
            "weight": [*ours, folder / "weight", "--space", "weight"]}


def same_tensors(path, other):
    """Whether two checkpoints hold the same names, dtypes and shapes, and the same
    bits."""
    mine = chunking.Checkpoint(path)
    theirs = chunking.Checkpoint(other)
    kinds = [{name: (entry.dtype, entry.shape) for name, entry in model.entries.items()}
             for model in (mine, theirs)]
    if kinds[0] != kinds[1]:
        return False
    for name, entry in mine.entries.items():
        for span in chunking.spans(entry.numel):
            # As bytes: -0.0 is not 0.0, and NaN is NaN.
            one = mine.read(name, *span).view(torch.uint8)
            if not torch.equal(one, theirs.read(name, *span).view(torch.uint8)):
                return False
    return True


def middle(values):
    """(median, least, most), rounded."""
    return [round(value, 3) for value in (statistics.median(values), min(values),
                                          max(values))]


def peer_rounds(folder, commands, rounds):
    """{name: [seconds, ...]}, {name: [MiB, ...]} of runs in turns, so that load hits
    all alike."""
    seconds = {name: [] for name in commands}
    peaks = {name: [] for name in commands}
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
    ratios = {}
    memory = {}
    for name in WAYS:
        ratios[name] = middle([x / y for x, y in zip(seconds[name],
                                                     seconds["mergekit"])])
        memory[name] = middle([x / y for x, y in zip(peaks[name], peaks["mergekit"])])
    return {"what": "peer", "rounds": len(seconds["mergekit"]), "ratios": ratios,
            "memory_ratios": memory,
            "seconds": {name: middle(values) for name, values in seconds.items()},
            "peak_mib": {name: middle(values) for name, values in peaks.items()}}


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
        small = {"num_hidden_layers": 2, "vocab_size": 1024} if quick else {}
        qwen2_pair(folder, **small)
        commands = peer_commands(folder, python)
        helps = {"mergekit": [*commands["mergekit"][:3], "--help"],
                 "exact": [*MERGE, "--help"], "weight": [*MERGE, "--help"]}
        start = {key: round(watch(command)[0], 2) for key, command in helps.items()}
        facts = conditions()
        seconds, peaks = peer_rounds(folder, commands, 1 if quick else ROUNDS)
        size = (folder / "a" / "model.safetensors").stat().st_size
        yield facts | peer_row(seconds, peaks) | {
            "peer": f"mergekit {version}", "bytes": size, "start": start,
            "equal_bits": same_tensors(folder / "weight", folder / "mergekit")}


# --- The command ----------------------------------------------------------------------
# A part is a generator of rows, and how the page shows them.
PARTS = {"align": (bench_align, sections.bench_align),
         "merge": (bench_merge, sections.bench_merge),
         "memory": (bench_memory, sections.bench_memory),
         "codec": (bench_codec, sections.bench_codec),
         "training": (bench_training, sections.bench_training),
         "peer": (bench_peer, sections.bench_peer)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in PARTS:
        parser.add_argument(f"--{name}", action="store_true",
                            help=f"run the part {name!r}")
    parser.add_argument("--quick", action="store_true",
                        help="smallest size, fewest rounds")
    parser.add_argument("--budget", type=int, default=4000, metavar="STEPS",
                        help="of the release's recipe, at most (%(default)s)")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON",
                        help="the Python that has mergekit (this one)")
    parser.add_argument("--record", nargs="?", const=HERE / "results", type=Path,
                        metavar="FOLDER",
                        help="keep the rows in this folder (results/)")
    a = parser.parse_args(argv)
    chosen = [name for name in PARTS if getattr(a, name)]
    if not chosen:
        parser.error("choose a part: " + ", ".join(f"--{name}" for name in PARTS))
    options = {"training": [a.budget], "peer": [a.peer_python]}
    for name in chosen:
        measure, section = PARTS[name]
        rows = []
        for row in measure(a.quick, *options.get(name, [])):
            rows.append(row)
            print(".", end="", file=sys.stderr, flush=True)
            if a.record:
                keep(a.record / f"bench-{name}.jsonl", [row])
        if rows:
            sections.show(section, Results(given={f"bench-{name}": rows}))


if __name__ == "__main__":
    main()
