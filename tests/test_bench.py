"""bench.py's instruments, against things whose size is known. Oracles: processes that
allocate a known amount, the published size of Qwen2-0.5B, sums by hand, Sinkhorn in the
log domain."""
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bench
import compare

MIB = 1 << 20
HOLD = ("x = bytearray({}); x[::4096] = b'1' * len(x[::4096]); "
        "import time; time.sleep({})")


def process(size, seconds):
    """A command that holds `size` bytes for some time."""
    return [sys.executable, "-c", HOLD.format(size, seconds)]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc is Linux's")
def test_memory_of_a_process_and_of_its_children_is_seen():
    """A child holds 60 MiB, a grandchild 90: a look at the child alone would miss
    them."""
    code = (f"import subprocess, sys; p = subprocess.Popen({process(90 * MIB, 0.5)!r});"
            f" {HOLD.format(60 * MIB, 0.5)}; p.wait()")
    idle = bench.watch(process(0, 0.2))[1]
    seconds, peak = bench.watch([sys.executable, "-c", code])
    # Two interpreters (idle), their libraries, and the sampling's blind 10 ms.
    assert 150 <= peak <= 150 + 2 * idle + 10
    assert 0.5 <= seconds < 10
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert bench.anonymous_mib(done.pid) == 0


def test_equal_bits_are_told_from_equal_values(tmp_path):
    one = {"a": torch.tensor([0.0, 1.0, math.nan]), "b": torch.arange(5)}
    changes = {"equal": {}, "sign of zero": {"a": torch.tensor([-0.0, 1.0, math.nan])},
               "last": {"b": torch.tensor([0, 1, 2, 3, 5])}, "more": {"c": torch.ones(1)},
               "dtype": {"b": one["b"].int()}, "shape": {"b": one["b"][None]}}
    save_file(one, tmp_path / "one.safetensors")
    for name, change in changes.items():
        save_file(one | change, tmp_path / "other.safetensors")
        same = bench.same_tensors(tmp_path / "one.safetensors",
                                  tmp_path / "other.safetensors")
        assert same == (name == "equal"), name


def test_peer_ratios_are_taken_within_a_round():
    """The second round met a machine of half the speed: the ratio stays 0.5. Without
    start-up of 1 and 2 seconds: 3 / 6, 7 / 14, 3 / 6."""
    seconds = {"mergekit": [8.0, 16.0, 8.0], "exact": [4.0, 8.0, 4.0]}
    assert bench.ratios_of(seconds) == {"exact": [0.5, 0.5, 0.5]}
    start = {"mergekit": 2.0, "merge.py": 1.0}
    assert bench.ratios_of(seconds, start) == {"exact": [0.5, 0.5, 0.5]}
    assert bench.ratios_of(seconds, {"mergekit": 2.0, "merge.py": 2.0})["exact"][0] < 0.5


def test_without_mergekit_the_remedy_is_printed_and_nothing_recorded(
        tmp_path, capsys, monkeypatch):
    empty = tmp_path / "python"         # answers as a Python that has no mergekit
    empty.write_text("#!/bin/sh\nexit 1\n")
    empty.chmod(0o755)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--peer", "--peer-python", str(empty),
                                      "--results", str(tmp_path / "r")])
    bench.main()
    assert "fix: python -m venv peer" in capsys.readouterr().out
    assert not (tmp_path / "r").exists()


def test_the_peer_model_has_the_published_size_of_qwen2():
    shapes = bench.qwen2_shapes(bench.QWEN2)
    assert sum(math.prod(shape) for shape in shapes.values()) == 494_032_768
    assert len(shapes) == 24 * 12 + 2           # tied: no head of its own


def test_memory_runs_on_the_smallest_pair(capsys, monkeypatch, tmp_path):
    """The command, with two codecs."""
    monkeypatch.setattr(sys, "argv", ["bench.py", "--memory", "--quick", "--results",
                                      str(tmp_path)])
    bench.main()
    printed = capsys.readouterr().out
    assert "| reference |" in printed and "| exact |" in printed
    assert compare.read("bench-memory", tmp_path) == []     # quick: nothing is kept
