"""Speed and memory of merge.py, beside what they are to be held against.

    python experiments/bench.py --peer PYTHON       # the Python that has mergekit
    python experiments/bench.py --memory            # needs 10 GB of disk

In:    nothing: neither depends on what the weights are worth, only on their shapes.
Out:   results/peer.jsonl, results/memory.jsonl, and the section. Paper: neither.

--peer: beside mergekit's linear merge at weights 0.5 and 0.5, on two models of
Qwen2-0.5B's shape; whole processes, all imports included, in turns. mergekit wants an
environment of its own, as it pins other versions:

    python -m venv peer; peer/bin/pip install torch "mergekit>=0.1,<0.2"

--memory: pairs of 1.5 and 3.5 GB, each with one encoded matrix of 500 MB: the peak must
depend neither on the model nor on its largest tensor.

Everything else is at its default for everyone, files in the page cache. merge.py waits
until its result is on the disk, mergekit leaves that to the system. Memory is what a
process and its children need to themselves (RssAnon of Linux), seen every 10 ms.
Previous: real.py. Next: results.py.
"""
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

from compare import HERE, collect, command_line, machine, table
import chunking
from merge import REFERENCE

MERGE = [sys.executable, str(HERE.parent / "merge.py")]
SAMPLING = 0.01             # seconds between two looks at a process's memory
ROUNDS = 3                  # of whole processes


# --- What is merged -----------------------------------------------------------------
SPREAD = 0.02               # standard deviation of the weights, as of a new Llama
NOISE = 0.005               # of what the second model of a pair has on top of the first
# Qwen2-0.5B as its config.json has it: 494 M weights, 136 M of them the embedding's.
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
         "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
         "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
         "tie_word_embeddings": True, "hidden_act": "silu",
         "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
         "torch_dtype": "bfloat16"}


def qwen2_shapes(layers=24, big=0):
    """{name: shape} of QWEN2: biases at q, k, v, grouped queries, a tied head. big:
    rows of one more matrix, in layer 0."""
    hidden = QWEN2["hidden_size"]
    mlp = QWEN2["intermediate_size"]
    kv = hidden // QWEN2["num_attention_heads"] * QWEN2["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (QWEN2["vocab_size"], hidden),
              "model.norm.weight": (hidden,)}
    for i in range(layers):
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


def write_pair(folder, shapes):
    """Folders a and b in the Hugging Face layout, the second the first with noise on
    it: weights, config.json and the smallest tokenizer, which mergekit copies along.
    Returns the bytes of a model."""
    tokenizer = {"version": "1.0",
                 "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    files = {"config.json": QWEN2, "tokenizer.json": tokenizer,
             "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}
    for name in ("a", "b"):
        (folder / name).mkdir()
        weights = folder / name / "model.safetensors"
        write_weights(weights, shapes, noise=name == "b")
        for file, content in files.items():
            (folder / name / file).write_text(json.dumps(content, indent=2))
    return weights.stat().st_size


# --- Whole processes, watched from outside ------------------------------------------
def anonymous_mib(pid):
    """Of a process and of all below it, now; 0 for one that has ended."""
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
    """Run a command to its end. Returns (seconds, peak MiB)."""
    start = time.perf_counter()
    peak = 0.0
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, anonymous_mib(process.pid))
        time.sleep(SAMPLING)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds, peak


# --- --memory -----------------------------------------------------------------------
def measure_memory():
    """Yields a row per size and codec."""
    for layers in (24, 92):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            size = write_pair(folder, qwen2_shapes(layers, big=280_000))
            for name, vae in (("reference", REFERENCE), ("exact", "exact")):
                seconds, peak = watch([*MERGE, folder / "a", folder / "b", "--quiet",
                                       "--vae", vae, "-o", folder / name])
                yield {"bytes": size, "network": name, "seconds": seconds,
                       "peak_mib": peak, **machine()}


def section_memory(rows):
    lines = []
    for row in rows:
        lines.append([f"{row['bytes'] / 1e9:.2f}", row["network"],
                      f"{row['peak_mib']:.0f}", f"{row['seconds']:.0f}"])
    return table(["GB per checkpoint", "codec", "peak MiB", "seconds"], lines)


# --- --peer -------------------------------------------------------------------------
# Ours, each over mergekit's: (label, flags)
WAYS = {"default": ("`merge.py`, the reference VAE", []),
        "exact": ("`--vae exact`", ["--vae", "exact"]),
        "weight": ("`--space weight`", ["--space", "weight"])}


def peer_commands(folder, python):
    """{name: command}; each writes folder/NAME."""
    pair = [folder / "a", folder / "b"]
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in pair]
    recipe = folder / "linear.yml"      # JSON is YAML
    recipe.write_text(json.dumps({"merge_method": "linear", "dtype": "bfloat16",
                                  "models": models}))
    commands = {"mergekit": [python, "-m", "mergekit.scripts.run_yaml", recipe,
                             folder / "mergekit", "--quiet"]}
    for name, (_, flags) in WAYS.items():
        commands[name] = [*MERGE, *pair, "--quiet", "-o", folder / name, *flags]
    return commands


def same_tensors(path, other):
    """Whether two checkpoints hold the same names and bits."""
    mine = chunking.Checkpoint(path)
    theirs = chunking.Checkpoint(other)
    if mine.entries.keys() != theirs.entries.keys():
        return False
    for name in mine.entries:
        one = mine.read_tensor(name).view(torch.uint8)      # -0.0 is not 0.0
        if not torch.equal(one, theirs.read_tensor(name).view(torch.uint8)):
            return False
    return True


def middle(values):
    """[median, least, most]"""
    return [statistics.median(values), min(values), max(values)]


def ratios_of(seconds, start):
    """{way: [median, least, most] of its seconds over mergekit's, within a round};
    start: what starting takes, {name: seconds}, taken off both."""
    found = {}
    for name in WAYS:
        ratios = []
        for mine, theirs in zip(seconds[name], seconds["mergekit"]):
            ratios.append((mine - start["merge.py"]) / (theirs - start["mergekit"]))
        found[name] = middle(ratios)
    return found


def measure_peer(python):
    """Yields one row, with whether plain averaging gives mergekit's bits."""
    code = "import importlib.metadata; print(importlib.metadata.version('mergekit'))"
    asked = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True,
                           check=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_pair(folder, qwen2_shapes())
        commands = peer_commands(folder, python)
        seconds = {name: [] for name in commands}
        peaks = {name: [] for name in commands}
        for _ in range(ROUNDS):     # in turns, so that load hits all alike
            for name, command in commands.items():
                shutil.rmtree(folder / name, ignore_errors=True)
                os.sync()           # nobody pays for the writes of whoever ran before
                taken, peak = watch(command)
                seconds[name].append(taken)
                peaks[name].append(peak)
        start = {"merge.py": watch([*MERGE, "--help"])[0],
                 "mergekit": watch([*commands["mergekit"][:3], "--help"])[0]}
        yield {
            "peer": f"mergekit {asked.stdout.strip()}", "bytes": size,
            "start": start, "ratios": ratios_of(seconds, dict.fromkeys(start, 0)),
            "ratios_started": ratios_of(seconds, start),
            "seconds": {name: middle(values) for name, values in seconds.items()},
            "peak_mib": {name: middle(values) for name, values in peaks.items()},
            "equal_bits": same_tensors(folder / "weight", folder / "mergekit"),
            **machine()}


def span(values):
    """0.77 [0.69, 0.80]"""
    return f"{values[0]:.2f} [{values[1]:.2f}, {values[2]:.2f}]"


def section_peer(rows):
    """With and without what starting Python and its imports takes."""
    row = rows[-1]
    lines = []
    for name, (label, _) in WAYS.items():
        lines.append([label, f"{row['seconds'][name][0]:.1f} s",
                      span(row["ratios"][name]), span(row["ratios_started"][name]),
                      f"{row['peak_mib'][name][0]:.0f} MiB"])
    lines.append([row["peer"], f"{row['seconds']['mergekit'][0]:.1f} s", "1", "1",
                  f"{row['peak_mib']['mergekit'][0]:.0f} MiB"])
    head = [f"two models of {row['bytes'] / 1e9:.2f} GB", "time",
            "over mergekit's [least, largest]", "without start-up", "memory"]
    return table(head, lines)


# --- The command --------------------------------------------------------------------
def main():
    parser = command_line(__doc__)
    parser.add_argument("--peer", metavar="PYTHON", help="that has mergekit")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    if args.peer:
        print(section_peer(collect("peer", measure_peer(args.peer), args)))
    if args.memory:
        print(section_memory(collect("memory", measure_memory(), args)))


if __name__ == "__main__":
    main()
