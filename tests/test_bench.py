"""bench.py's instruments, against things whose size is known.

Oracles: processes that allocate a known amount, torch's own counter of operations, the published
size of Qwen2-0.5B, loops, sums by hand.
"""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import bench
import bench_functions
import bench_models
import lsmerge
import records
from vae import VAE, VAEConfig, generator_for

MIB = 1 << 20
HOLD = "x = bytearray({}); x[::4096] = b'1' * len(x[::4096]); import time; time.sleep({})"


def process(size, seconds):
    """A command that holds `size` bytes for some time."""
    return [sys.executable, "-c", HOLD.format(size, seconds)]


# --- Memory and time of a process -----------------------------------------------------------------
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc is Linux's")
def test_memory_of_a_process_and_of_its_children_is_seen():
    """A child holds 60 MiB, a grandchild 90: a look at the child alone would miss them."""
    code = (f"import subprocess, sys; p = subprocess.Popen({process(90 * MIB, 0.5)!r}); "
            + HOLD.format(60 * MIB, 0.5) + "; p.wait()")
    idle = bench.watch(process(0, 0.2))[1]
    seconds, peak, _ = bench.watch([sys.executable, "-c", code])
    # Two interpreters (idle), their libraries, and the sampling's blind 10 ms.
    assert 150 <= peak <= 150 + 2 * idle + 10
    assert 0.5 <= seconds < 10
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert bench.anonymous_mib(done.pid) == 0


def test_a_command_that_fails_is_an_error_with_what_it_printed():
    with pytest.raises(subprocess.CalledProcessError) as failed:
        bench.watch([sys.executable, "-c", "print('before'); raise SystemExit('the reason')"])
    assert failed.value.returncode == 1
    assert "before" in failed.value.output and "the reason" in failed.value.output


# --- --peer ---------------------------------------------------------------------------------------
def test_equal_bits_are_told_from_equal_values(tmp_path):
    one = {"a": torch.tensor([0.0, 1.0, math.nan]), "b": torch.arange(5)}
    changes = {"equal": {}, "sign of zero": {"a": torch.tensor([-0.0, 1.0, math.nan])},
               "last": {"b": torch.tensor([0, 1, 2, 3, 5])}, "dtype": {"b": one["b"].int()},
               "shape": {"b": one["b"][None]}, "more": {"c": torch.ones(1)}}
    save_file(one, tmp_path / "one.safetensors")
    for name, change in changes.items():
        save_file(one | change, tmp_path / "other.safetensors")
        same = bench.same_tensors(tmp_path / "one.safetensors", tmp_path / "other.safetensors")
        assert same == (name == "equal"), name


def test_peer_ratios_are_taken_within_a_round():
    """The second round met a machine of half the speed: each ratio stays 0.5, or 0.25."""
    seconds = {"mergekit": [8.0, 16.0, 8.0], "exact": [4.0, 8.0, 4.0], "weight": [2.0, 4.0, 3.0]}
    peaks = {name: [4 * s for s in values] for name, values in seconds.items()}
    row = bench.peer_row(seconds, peaks)
    assert row["ratios"] == {"exact": [0.5, 0.5, 0.5], "weight": [0.25, 0.25, 0.375]}
    assert row["memory_ratios"] == row["ratios"]
    assert row["seconds"]["mergekit"] == [8.0, 8.0, 16.0] and row["rounds"] == 3


def test_without_mergekit_the_remedy_is_printed_and_nothing_recorded(tmp_path, capsys):
    empty = tmp_path / "python"         # answers as a Python that has no mergekit
    empty.write_text("#!/bin/sh\nexit 1\n")
    empty.chmod(0o755)
    bench.main(["--peer", "--peer-python", str(empty), "--record", str(tmp_path / "r")])
    assert "fix: python -m venv peer" in capsys.readouterr().out
    assert not (tmp_path / "r").exists()


# --- What is merged -------------------------------------------------------------------------------
def test_the_peer_model_has_the_published_size_of_qwen2():
    shapes = bench_models.qwen2_shapes(bench_models.QWEN2)
    assert sum(math.prod(shape) for shape in shapes.values()) == 494_032_768
    assert len(shapes) == 24 * 12 + 2           # tied: no head of its own


def test_a_pair_is_one_model_and_the_same_with_noise(tmp_path):
    sizes = dict(hidden_size=56, intermediate_size=64, num_hidden_layers=1, vocab_size=5000)
    a, b = bench_models.qwen2_pair(tmp_path, **sizes)
    one, other = (bench.chunking.Checkpoint(path) for path in (a, b))
    assert json.loads((a / "config.json").read_text())["vocab_size"] == 5000
    embed = "model.embed_tokens.weight"         # longer than a piece
    assert one.entries[embed].numel > bench.chunking.PIECE
    x, y = (file.read_tensor(embed).double() for file in (one, other))
    # 280,000 draws: the deviation of a deviation is 0.13 %; bfloat16 adds less.
    assert x.std().item() == pytest.approx(bench_models.SPREAD, rel=0.01)
    assert (y - x).std().item() == pytest.approx(bench_models.NOISE, rel=0.01)
    assert abs(torch.corrcoef(torch.stack([x.ravel(), (y - x).ravel()]))[0, 1]) < 0.01
    assert not torch.equal(x[:500], x[-500:])   # pieces differ


def test_merge_runs_on_the_synthetic_pair(tmp_path):
    """Through the network whose blocks compute, too: it carries weights."""
    entries = bench_models.llama_pair(tmp_path, layers=1, hidden=64, mlp=96, vocab=32, big=8)
    assert len(entries) == 8                    # seven matrices and the big one
    bench.write_network(tmp_path / "full.safetensors", VAEConfig(init="pca"))
    seconds, peak, report = bench.run_merge(tmp_path, "--vae", tmp_path / "full.safetensors")
    assert seconds > 0 and peak > 0 and report["tensors"]["encoded"] == 8
    assert report["roundtrip"]["nmse"] < 0.1 and report["seconds"]


# --- --codec --------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", [
    VAEConfig(), VAEConfig(chunk=32, ratio=0.8, width=64, blocks=3),
    VAEConfig(blocks=0, init="pca")])
def test_operations_are_what_torch_counts(config):
    """torch's counter knows products only, not attention on a CPU: T x T x D twice per block."""
    codec = lsmerge.Codec(VAE(config).start(generator_for(0)))
    x_BTC = torch.randn(2, config.tokens, config.chunk)
    with FlopCounterMode(display=False) as encoding:
        z_BTZ = codec.net.encode_mean(x_BTC)
    with FlopCounterMode(display=False) as decoding:
        codec.net.decode(z_BTZ)
    for counter, ours in zip((encoding, decoding), bench_functions.window_operations(codec)):
        counts = counter.get_flop_counts()["Global"]
        products = sum(n for op, n in counts.items() if "attention" not in str(op))
        attention = config.blocks * 2 * 2 * config.tokens ** 2 * config.width
        assert products / 2 + attention == ours


# --- --align --------------------------------------------------------------------------------------
def test_marginal_error_sees_both_sides():
    assert bench_functions.marginal_error(torch.full((2, 4), 1 / 8)) == 0
    assert bench_functions.marginal_error(torch.tensor([[0.5, 0.25], [0.0, 0.25]])) == 0.5
    assert bench_functions.marginal_error(torch.tensor([[0.5, 0.0], [0.25, 0.25]])) == 0.5


def test_plain_iterations_are_the_first_ten_that_suffice():
    """Beside a loop in the log domain that returns the error of every step."""
    cost = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)).double()
    log_kernel, f = -cost / cost.max() / 0.05, torch.zeros(6).double()
    for step in range(1, 1000):
        g = -math.log(9) - torch.logsumexp(log_kernel + f[:, None], 0)
        f = -math.log(6) - torch.logsumexp(log_kernel + g, 1)
        columns = (log_kernel + f[:, None] + g).exp().sum(0)
        if (columns - 1 / 9).abs().sum() <= 1e-9:
            break
    assert bench_functions.plain_iterations(cost, 0.05, 1e-9) == math.ceil(step / 10) * 10


# --- --training -----------------------------------------------------------------------------------
def test_mmd_is_the_mean_over_all_pairs():
    """Kernels of variance h Z for h in 1/2, 1, 2, pair by pair; the sample is drawn as in mmd."""
    z = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    z = z[torch.randperm(7, generator=generator)]
    noise = torch.randn(7, 3, generator=generator)

    def kernel(a, b):
        pairs = [math.exp(-(x - y).square().sum().item() / (2 * h * 3))
                 for x in a for y in b for h in (0.5, 1, 2)]
        return sum(pairs) / len(a) / len(b)

    expected = kernel(z, z) + kernel(noise, noise) - 2 * kernel(z, noise)
    again = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    found = bench_functions.mmd(again, torch.Generator().manual_seed(2)).item()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("last, expected", [
    (0.009, {"reached": True, "seconds": 3.5, "steps": 25, "nmse": 0.009, "final": 0.002}),
    (0.02, {"reached": False, "seconds": 4.5, "steps": 35, "nmse": 0.02, "final": 0.02})])
def test_an_arrival_counts_from_the_kl_on(last, expected):
    """1e-2 at the end of stage 1 and the start of stage 2 are no VAE yet: step 20 is the first."""
    ends = (1.0, 0.01), (0.5, 0.01), (1.5, 0.5), (2.5, last), (3.5, 0.002 if last < 0.01 else last)
    checks = [{"stage": stage, "step": step, "seconds": seconds, "nmse": nmse}
              for (stage, step), (seconds, nmse) in zip(
                  [(1, 5), (2, 0), (2, 10), (2, 20), (2, 30)], ends)]
    assert bench_functions.arrival(checks) == expected


# --- The command ----------------------------------------------------------------------------------
def test_rows_are_kept_and_shown(tmp_path, capsys, monkeypatch):
    """--training for three steps: a row per recipe."""
    monkeypatch.setattr(bench_functions, "CURRICULUM",
                        bench_functions.train.Schedule(steps1=1, steps2=1, batch=2))
    bench.main(["--training", "--quick", "--budget", "2", "--record", str(tmp_path)])
    rows = records.Results(tmp_path).rows("bench-training")
    assert [row["recipe"] for row in rows] == ["release", "curriculum"]
    assert [row["steps"] for row in rows] == [2, 2] and not any(row["reached"] for row in rows)
    assert all(row["threads"] and row["commit"] and "load" in row for row in rows)
    assert "| release | not within" in capsys.readouterr().out


def test_a_part_must_be_chosen(capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main([])
    assert ended.value.code == 2 and "--peer" in capsys.readouterr().err
