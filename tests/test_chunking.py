"""chunking.py: moves of data are bit-exact, statistics agree with numpy in float64, names with a
table of real models, files with the safetensors library."""
import math
import os
import random
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import chunking as ck
from conftest import llama_tensors


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- Chunks and windows ---------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("L", [0, 1, 7, 8, 9, 12, 24, 25])
def test_chunks_and_windows_are_undone_bit_for_bit(L, dtype):
    flat_L = noise(L).to(dtype)
    chunks_NC, real_NC = ck.chunk(flat_L, C=4)
    N = math.ceil(L / 4)
    assert chunks_NC.shape == real_NC.shape == (N, 4) and chunks_NC.dtype == dtype
    assert int(real_NC.sum()) == L and not chunks_NC[~real_NC].any()
    x_BTC, real_BTC = ck.to_windows(chunks_NC, real_NC, T=3)
    assert x_BTC.shape == real_BTC.shape == (math.ceil(N / 3), 3, 4) and int(real_BTC.sum()) == L
    assert torch.equal(x_BTC[real_BTC], flat_L)         # in order, nowhere else
    back_L = ck.unchunk(ck.from_windows(x_BTC, N), L)
    assert torch.equal(back_L, flat_L) and back_L.dtype == dtype


def test_windows_of_latents_lose_their_filling_too():
    z_NZ = noise(5, 2)
    z_BTZ, real_BTZ = ck.to_windows(z_NZ, torch.ones(5, 1, dtype=torch.bool), T=3)
    assert z_BTZ.shape == (2, 3, 2) and real_BTZ.flatten().tolist() == [True] * 5 + [False]
    assert torch.equal(ck.from_windows(z_BTZ, 5), z_NZ)


def test_worked_example_of_the_docstring():
    chunks, real = ck.chunk(torch.arange(1, 8), C=4)
    assert chunks.tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert real.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_padding_never_leaks_back():
    chunks, real = ck.chunk(torch.ones(5), C=4)
    chunks[~real] = torch.nan                           # whatever a decoder writes there
    assert torch.equal(ck.unchunk(chunks, 5), torch.ones(5))


@pytest.mark.parametrize("numel, step", [(0, 4), (1, 4), (4, 4), (9, 4), (2 ** 20 + 1, ck.PIECE)])
def test_spans_tile_the_tensor(numel, step):
    pieces = ck.spans(numel, step)
    assert [pieces[0][0], pieces[-1][1]] == [0, numel]
    assert all(stop - start == step for start, stop in pieces[:-1])
    assert 0 <= numel - pieces[-1][0] <= step
    assert all(stop == start for (_, stop), (start, _) in zip(pieces, pieces[1:]))


# --- Statistics -----------------------------------------------------------------------------------
def test_unscale_inverts_scale():
    flat_L = noise(1000) * 3e-3 + 0.5
    wide = flat_L.double().numpy()
    slot = ck.TensorSlot("w", torch.float32, (1000,), mean=wide.mean(), scale=wide.std())
    x_L = ck.standardise(flat_L, slot)
    assert abs(x_L.mean()) < 1e-4 and abs(x_L.square().mean() - 1) < 1e-4
    back_L = ck.unstandardise(x_L, slot)
    assert x_L.dtype == back_L.dtype == torch.float32
    # Roundings: of the difference, twice of |x| < 8, of the product, of the sum: 0.6 at most here.
    torch.testing.assert_close(back_L, flat_L, rtol=0, atol=2 * 2 ** -24 + 4 * 8 * 3e-3 * 2 ** -24)


VALUES = {"small spread, large mean": noise(5000) * 1e-4 + 1000, "normal": noise(1000) * 0.02,
          "one outlier": torch.cat([noise(970), torch.tensor([1e6])]),
          "one number": torch.tensor([3.0]), "constant": torch.full((300,), 2.5),
          "constant to rounding": torch.full((300,), 0.1),
          "zeros": torch.zeros(98), "empty": torch.zeros(0)}


@pytest.mark.parametrize("case", VALUES)
def test_measure_equals_numpy_however_the_tensor_is_cut(tmp_path, monkeypatch, case):
    """Chan's update over pieces of 97 against numpy over the whole tensor, in float64."""
    values = VALUES[case]
    save_file({"w": values.reshape(-1, 1)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(ck.spans, "__defaults__", (97,))
    slot = ck.measure(ck.Checkpoint(tmp_path / "x.safetensors"), "w")
    wide = values.double().numpy()
    std = wide.std() if len(wide) and wide.min() < wide.max() else 1.0
    assert slot.mean == pytest.approx(wide.mean() if len(wide) else 0.0, rel=1e-14)
    assert slot.scale == pytest.approx(std, rel=1e-9)
    assert (slot.shape, slot.dtype, slot.numel) == ((len(values), 1), torch.float32, len(values))


def test_measure_equals_numpy_for_every_float_dtype(tmp_path):
    dtypes = [d for d in ck.DTYPE_NAMES if d.is_floating_point]
    assert len(dtypes) == 6
    save_file({str(d): (noise(40, 50) * 0.05).to(d) for d in dtypes}, tmp_path / "x.safetensors")
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        slot, wide = ck.measure(ck.Checkpoint(tmp_path / "x.safetensors"), name), tensor.double()
        assert slot.mean == pytest.approx(wide.mean().item(), rel=1e-12)
        assert slot.scale == pytest.approx(np.std(wide.numpy()), rel=1e-12)


# --- Names ----------------------------------------------------------------------------------------
L, B = "model.layers.", "bert.encoder.layer.2."
PLACES = {
    L + "3.self_attn.q_proj.weight": (3, "q"), L + "11.mlp.gate_proj.weight": (11, "gate"),
    L + "0.self_attn.q_proj.bias": (0, "q.bias"), L + "0.self_attn.q_norm.weight": (0, "norm"),
    L + "1.self_attn.o_proj.weight": (1, "o"), L + "4.self_attn.qkv_proj.weight": (4, "qkv"),
    L + "4.mlp.gate_up_proj.weight": (4, "gate_up"), L + "2.input_layernorm.weight": (2, "norm"),
    "model.language_model.layers.7.mlp.down_proj.weight": (7, "down"),
    L + "2.block_sparse_moe.gate.weight": (2, "router"),
    L + "2.mlp.experts.6.up_proj.weight": (2, "up.6"),
    "transformer.h.5.attn.c_attn.weight": (5, "qkv"), "h.5.attn.c_proj.weight": (5, "o"),
    "h.5.mlp.c_proj.weight": (5, "down"), "h.5.mlp.c_fc.weight": (5, "up"),
    "h.5.ln_1.weight": (5, "norm"), "transformer.wte.weight": (None, "embed"),
    B + "attention.self.key.weight": (2, "k"), B + "attention.self.value.bias": (2, "v.bias"),
    B + "attention.output.dense.weight": (2, "o"), B + "output.dense.weight": (2, "down"),
    B + "intermediate.dense.weight": (2, "up"),
    B + "attention.output.LayerNorm.weight": (2, "norm"),
    "gpt_neox.layers.5.attention.query_key_value.weight": (5, "qkv"),
    "gpt_neox.layers.5.mlp.dense_h_to_4h.weight": (5, "up"),
    "blocks.3.attn.proj.weight": (3, "o"), "blocks.3.mlp.fc2.weight": (3, "down"),
    "model.embed_tokens.weight": (None, "embed"), "lm_head.weight": (None, "head"),
    "model.norm.weight": (None, "norm"), "blocks.3.mixer.zebra": (3, "mixer.zebra"),
    "layers.999999999.w": (999999999, "w"), "": (None, ""),
}


@pytest.mark.parametrize("name", PLACES, ids=lambda name: name[:50])
def test_place(name):
    assert ck.place(name) == PLACES[name]


@pytest.mark.parametrize("name", ["²", "layers." + "9" * 5000, "layers.٣.w", "layers.-1.w"])
def test_an_odd_number_is_no_layer(name):
    assert ck.place(name).layer is None and ck.place(name).role


def test_natural_order_keeps_depth():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (*range(12), 100)]
    assert sorted(random.Random(0).sample(names, 13), key=ck.natural_key) == names
    odd = ["", "2", "a", "10", "a²", "9" * 5000, "x.2.y", "x.10"]     # any two can be compared
    assert sorted(odd, key=ck.natural_key) == sorted(odd[::-1], key=ck.natural_key)
    assert sorted(["x.10", "10", "x.2.y", "2"], key=ck.natural_key) == ["2", "10", "x.2.y", "x.10"]


def test_selection(models):
    entries = ck.Checkpoint(models["a"]).entries.values()
    default = {e.name for e in entries if ck.is_selected(e)}
    assert len(default) == 14 and all("layers" in n and "norm" not in n for n in default)
    assert [e.name for e in entries if ck.is_selected(e, "embed")] == ["model.embed_tokens.weight"]
    assert len([e for e in entries if ck.is_selected(e, "self_attn")]) == 8
    assert not [e for e in entries if ck.is_selected(e, "norm")]        # of one dimension
    for shape, dtype in (((0, 4), torch.float32), ((4, 4), torch.int64), ((4,), torch.float32)):
        assert not ck.is_selected(ck.Entry("layers.0.w", dtype, shape), ".")


# --- Files ----------------------------------------------------------------------------------------
ODD = {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "bytes": torch.arange(5).byte(),
       "mask": torch.tensor([True, False]), "ids": torch.arange(3), "half": noise(3, 3).half(),
       "brain": noise(4).bfloat16(), "double": noise(2).double(), "layer 10/é": torch.ones(2),
       **{str(d): torch.arange(3).to(d) for d in ck.DTYPE_NAMES}}


def test_reading_agrees_with_the_library(tmp_path):
    save_file(ODD, tmp_path / "x.safetensors", {"format": "pt", "note": "ü"})
    file = ck.Checkpoint(tmp_path / "x.safetensors")
    assert set(file.entries) == set(ODD) and file.metadata == {"format": "pt", "note": "ü"}
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert file.read_tensor(name).dtype == file.entries[name].dtype == tensor.dtype
        assert file.read_tensor(name).shape == file.entries[name].shape == tensor.shape
        assert torch.equal(file.read_tensor(name), tensor)
    assert torch.equal(file.read("half", 2, 5), ODD["half"].reshape(-1)[2:5])
    assert len(file.read("half", 7, 99)) == 2 and len(file.read("half", 9, 12)) == 0


def test_tensors_in_memory_read_as_a_file_does(tmp_path):
    tensors = {**ODD, "view": noise(4, 6).T, "layers.10": torch.ones(1), "layers.2": torch.ones(1)}
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "x.safetensors")
    file, memory = ck.Checkpoint(tmp_path / "x.safetensors"), ck.StateDict(tensors)
    assert list(file.entries) == list(memory.entries)
    for name, entry in file.entries.items():
        mine = memory.entries[name]
        assert (mine.shape, mine.dtype, mine.numel) == (entry.shape, entry.dtype, entry.numel)
        assert torch.equal(memory.read(name, 1, 3), file.read(name, 1, 3))
        assert torch.equal(memory.read_tensor(name), file.read_tensor(name))


def test_writing_agrees_with_the_library_byte_for_byte(tmp_path):
    """One metadata key: the library's order of several is not fixed. Headers of eight lengths."""
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    for n in range(8):
        tensors = {**ODD, "x" * n: torch.ones(1)}
        save_file(tensors, theirs, {"format": "pt"})
        ck.write_tensors(ours, dict(reversed(tensors.items())), {})
        assert ours.read_bytes() == theirs.read_bytes()


ENTRY = ck.Entry("w", torch.float32, (4,))


@pytest.mark.parametrize("folder", [False, True])
def test_a_result_appears_whole_or_not_at_all(tmp_path, folder):
    path = tmp_path / "x"
    weights = path / "model.safetensors" if folder else path
    if folder:
        path.mkdir()
    weights.write_bytes(b"old")
    with pytest.raises(RuntimeError), ck.create(path, [ENTRY], folder=folder) as output:
        output.put("w", 0, torch.ones(2))
        raise RuntimeError("half-way")
    with pytest.raises(AssertionError), ck.create(path, [ENTRY], folder=folder) as output:
        output.put("w", 0, torch.ones(2))               # two elements are forgotten
    with pytest.raises(AssertionError), ck.create(path, [ENTRY], folder=folder) as output:
        output.put("w", 0, torch.ones(4).double())      # of another dtype than was declared
    assert weights.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]
    with ck.create(path, [ENTRY], {"n": "ü"}, folder=folder) as output:
        output.put("w", 2, torch.ones(2))
        output.put("w", 0, torch.zeros(2))
    assert load_file(weights)["w"].tolist() == [0, 0, 1, 1] and os.listdir(tmp_path) == ["x"]
    assert ck.Checkpoint(path).metadata == {"format": "pt", "n": "ü"}


def test_a_damaged_result_never_appears(tmp_path):
    """The last gate is the library's own reader."""
    with pytest.raises(Exception, match="header"), ck.create(tmp_path / "x", [ENTRY]) as output:
        output.put("w", 0, torch.ones(4))
        with open(output.path, "r+b") as file:
            file.write(b"\xff" * 8)
    assert os.listdir(tmp_path) == []


def test_no_file_stays_open(tmp_path):
    count = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        ck.write_tensors(tmp_path / "x.safetensors", {"w": torch.ones(1)}, {})
        ck.Checkpoint(tmp_path / "x.safetensors").read("w")
    assert len(os.listdir("/proc/self/fd")) == count


def test_mode_follows_the_umask_and_links_are_written_through(tmp_path):
    link, real = tmp_path / "link.safetensors", tmp_path / "real.safetensors"
    link.symlink_to(real)
    old = os.umask(0o027)
    try:
        ck.write_tensors(link, {"w": torch.ones(1)}, {})
    finally:
        os.umask(old)
    assert link.is_symlink() and stat.S_IMODE(real.stat().st_mode) == 0o640


def test_a_file_that_shrinks_is_an_error(tmp_path):
    save_file({"w": noise(1000)}, tmp_path / "x.safetensors")
    file = ck.Checkpoint(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 2000)
    with pytest.raises(ck.CheckpointError, match="tensor 'w'.*shrank"):
        file.read_tensor("w")


def test_an_error_is_one_line():
    error = str(ck.CheckpointError("a\nb", "is\x1b[2J wrong", "do\u2028it", "\ud800\0"))
    assert error.isprintable() and error.startswith("a\\nb: tensor ") and "; fix: do" in error


def test_natural_order_of_a_real_file(tmp_path):
    save_file(llama_tensors(0, hidden=8, layers=12, mlp=8, vocab=8), tmp_path / "x.safetensors")
    layers = [ck.place(n).layer for n in ck.Checkpoint(tmp_path / "x.safetensors").entries]
    layers = [i for i in layers if i is not None]
    assert layers == sorted(layers) and max(layers) == 11
