"""chunking.py: moves of data are bit-exact, statistics and tables agree with numpy and scipy, files with safetensors."""
import json
import math
import os
import random
import stat
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import chunking as ck
from conftest import ROOT, llama_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1,), (7,), (8,), (9,), (3, 4), (2, 3, 5)])
def test_chunk_and_windows_are_undone_bit_for_bit(shape, dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    chunks_NC, real_NC = ck.chunk(tensor.reshape(-1), C=4)
    N = math.ceil(tensor.numel() / 4)
    assert chunks_NC.shape == (N, 4) and chunks_NC.dtype == dtype and int(real_NC.sum()) == tensor.numel()
    assert not chunks_NC[~real_NC].any()
    x_BTC, windows_real = ck.to_windows(chunks_NC, real_NC, T=3)
    assert x_BTC.shape == (math.ceil(N / 3), 3, 4) and int(windows_real.sum()) == tensor.numel()
    back = ck.unchunk(ck.from_windows(x_BTC, N), shape)
    assert back.shape == tensor.shape and torch.equal(back, tensor)


def test_worked_example_of_the_docstring():
    chunks, real = ck.chunk(torch.arange(1, 8), C=4)
    assert chunks.tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]] and real.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_padding_never_leaks_back():
    chunks, real = ck.chunk(torch.ones(5), C=4)
    chunks[~real] = torch.nan                              # whatever a decoder writes there
    assert torch.equal(ck.unchunk(chunks, (5,)), torch.ones(5))


def test_unscale_inverts_scale():
    flat = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3e-3 + 0.5
    slot = ck.TensorSlot("w", (1000,), torch.float32, flat.double().mean().item(), flat.double().std(correction=0).item(), None)
    # One float32 rounding of a standardised number (|x| < 8: at most 2^-22) times the scale; then exact in float64.
    torch.testing.assert_close(ck.unscale(ck.scale(flat, slot), slot), flat.double(), rtol=0, atol=slot.scale * 2 ** -22)


@pytest.mark.parametrize("values", [torch.randn(5000) * 1e-4 + 1000.0, torch.full((300,), 2.5), torch.tensor([3.0]), torch.zeros(0)])
def test_measure_equals_numpy_however_the_tensor_is_cut(tmp_path, monkeypatch, values):
    save_file({"w": values.reshape(-1, 1)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(ck, "PIECE", 97)
    monkeypatch.setattr(ck.spans, "__defaults__", (97,))
    slot = ck.measure(ck.Checkpoint(tmp_path / "x.safetensors"), "w")
    if len(values):
        std = values.double().numpy().std()
        assert slot.mean == pytest.approx(values.double().numpy().mean(), rel=1e-14)
        assert slot.scale == pytest.approx(std if std > 0 else 1.0, rel=1e-9)
    else:
        assert (slot.mean, slot.scale) == (0.0, 1.0)


PLACES = {
    "model.layers.3.self_attn.q_proj.weight": (3, "q"), "model.layers.11.mlp.gate_proj.weight": (11, "gate"),
    "model.layers.0.self_attn.q_proj.bias": (0, "q.bias"), "model.layers.0.self_attn.q_norm.weight": (0, "norm"),
    "model.language_model.layers.7.mlp.down_proj.weight": (7, "down"), "model.layers.1.self_attn.o_proj.weight": (1, "o"),
    "transformer.h.5.attn.c_attn.weight": (5, "qkv"), "transformer.h.5.attn.c_proj.weight": (5, "o"),
    "h.5.mlp.c_proj.weight": (5, "down"), "h.5.mlp.c_fc.weight": (5, "up"), "h.5.ln_1.weight": (5, "norm"),
    "encoder.layer.2.attention.self.key.weight": (2, "k"), "bert.encoder.layer.2.attention.output.dense.weight": (2, "o"),
    "encoder.layer.2.output.dense.weight": (2, "down"), "encoder.layer.2.intermediate.dense.weight": (2, "up"),
    "encoder.layer.2.attention.output.LayerNorm.weight": (2, "norm"), "model.layers.4.self_attn.qkv_proj.weight": (4, "qkv"),
    "model.layers.4.mlp.gate_up_proj.weight": (4, "gate_up"), "model.layers.2.block_sparse_moe.gate.weight": (2, "router"),
    "model.layers.2.mlp.experts.6.up_proj.weight": (2, "up.6"),
    "base_model.model.model.layers.9.self_attn.v_proj.lora_A.weight": (9, "v.lora_A"),
    "model.embed_tokens.weight": (None, "embed"), "lm_head.weight": (None, "head"), "transformer.wte.weight": (None, "embed"),
    "model.norm.weight": (None, "norm"), "blocks.3.mixer.zebra": (3, "mixer.zebra"),
}


@pytest.mark.parametrize("name", PLACES)
def test_place(name):
    where = ck.place(name)
    assert (where.layer, where.role) == PLACES[name]


def test_natural_order_keeps_depth():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(12)]
    assert sorted(random.Random(0).sample(names, 12), key=ck.natural_key) == names


def test_selection(models):
    entries = ck.Checkpoint(models["a"]).entries.values()
    default = {e.name for e in entries if ck.is_selected(e)}
    assert len(default) == 14 and all("layers" in name and "norm" not in name for name in default)
    assert {e.name for e in entries if ck.is_selected(e, "embed")} == {"model.embed_tokens.weight"}
    assert len([e for e in entries if ck.is_selected(e, "self_attn")]) == 8


# --- files -----------------------------------------------------------------------------------------------

ODD = {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "bytes": torch.arange(5, dtype=torch.uint8),
       "mask": torch.tensor([True, False]), "ids": torch.arange(3), "half": torch.randn(3, 3).half(),
       "brain": torch.randn(4).bfloat16(), "double": torch.randn(2).double(), "layer 10/é": torch.ones(2)}


def test_reading_agrees_with_the_library(tmp_path):
    save_file(ODD, tmp_path / "x.safetensors", {"format": "pt", "note": "ü"})
    file = ck.Checkpoint(tmp_path / "x.safetensors")
    assert set(file.entries) == set(ODD) and file.metadata == {"format": "pt", "note": "ü"}
    for name, tensor in ODD.items():
        assert torch.equal(file.read_tensor(name), tensor) and file.entries[name].dtype == tensor.dtype
    assert torch.equal(file.read("half", 2, 5), ODD["half"].reshape(-1)[2:5])


def test_writing_agrees_with_the_library_byte_for_byte(tmp_path):
    save_file(ODD, tmp_path / "theirs.safetensors", {"format": "pt"})      # one metadata key: its order is fixed
    ck.write_tensors(tmp_path / "ours.safetensors", dict(reversed(ODD.items())), {})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_failing_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    os.chmod(path, 0o640)
    entry = ck.Entry("w", torch.float32, (4,), "", 0)
    def half(file):
        file.put("w", 0, torch.ones(2))
        raise RuntimeError("half-way")
    with pytest.raises(RuntimeError):
        ck.write_checkpoint(path, [entry], half, {})
    with pytest.raises(AssertionError):                    # an element was forgotten
        ck.write_checkpoint(path, [entry], lambda file: file.put("w", 0, torch.ones(2)), {})
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.safetensors"]
    ck.write_checkpoint(path, [entry], lambda file: [file.put("w", 2, torch.ones(2)), file.put("w", 0, torch.zeros(2))], {})
    assert load_file(path)["w"].tolist() == [0, 0, 1, 1] and stat.S_IMODE(path.stat().st_mode) == 0o640


def test_mode_follows_the_umask_and_links_are_written_through(tmp_path):
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    old = os.umask(0o027)
    try:
        ck.write_tensors(tmp_path / "link.safetensors", {"w": torch.ones(1)}, {})
    finally:
        os.umask(old)
    assert (tmp_path / "link.safetensors").is_symlink() and stat.S_IMODE((tmp_path / "real.safetensors").stat().st_mode) == 0o640


def test_a_file_that_shrinks_is_an_error(tmp_path):
    save_file({"w": torch.randn(1000)}, tmp_path / "x.safetensors")
    file = ck.Checkpoint(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 2000)
    with pytest.raises(ck.CheckpointError, match="tensor 'w'.*shrank"):
        file.read_tensor("w")
    with pytest.raises(ck.CheckpointError, match="changed"):
        file.check_unchanged()


# --- Table 1 and Fig. 2 ----------------------------------------------------------------------------------

def test_moments_against_their_definitions():
    matrix = np.random.default_rng(0).standard_t(5, (40, 60)) * np.linspace(0.1, 3, 40)[:, None]
    figures, flat = ck.moments(matrix), matrix.reshape(-1)
    centred = flat - flat.mean()
    assert figures["variance"] == pytest.approx((centred ** 2).mean())
    assert figures["skewness"] == pytest.approx((centred ** 3).mean() / (centred ** 2).mean() ** 1.5)
    assert figures["kurtosis"] == pytest.approx((centred ** 4).mean() / (centred ** 2).mean() ** 2 - 3)
    rows = [scipy.stats.kurtosis(row) for row in matrix]
    assert figures["kurtosis_row"] == pytest.approx(np.mean(rows)) and figures["kurtosis"] > figures["kurtosis_row"] + 0.5
    assert all(math.isfinite(value) for value in ck.moments(np.ones((3, 4))).values())


def test_spectrum_against_singular_values():
    matrix = np.random.default_rng(0).standard_normal((30, 20)) @ np.diag(np.linspace(1, 5, 20))
    for m in (matrix, matrix.T):
        squares = np.linalg.svd(m - m.mean(axis=0), compute_uv=False) ** 2
        expected = [np.interp(rank * len(squares), range(len(squares) + 1), np.append(0, squares.cumsum())) / squares.sum() for rank in ck.RANKS]
        np.testing.assert_allclose(ck.spectrum(m), expected, rtol=1e-9)


def test_command_prints_both_tables(models):
    run = subprocess.run([sys.executable, ROOT / "chunking.py", models["a"]], capture_output=True, text=True)
    assert run.returncode == 0 and "kurtosis" in run.stdout and "explained variance" in run.stdout
    run = subprocess.run([sys.executable, ROOT / "chunking.py", models["a"], "--json"], capture_output=True, text=True)
    assert len(json.loads(run.stdout)) == 14
    run = subprocess.run([sys.executable, ROOT / "chunking.py", models["a"].parent / "none"], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
