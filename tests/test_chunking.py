"""chunking.py: moves of data are bit-exact, statistics agree with numpy in float64,
names with a table of real models, files with the safetensors library."""
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import deserialize
from safetensors.torch import load_file, save_file

import chunking as ck
from conftest import generator, save


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


# --- Chunks and windows ---------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("L", [0, 1, 7, 8, 9, 12, 24, 25])
def test_chunks_and_windows_are_undone_bit_for_bit(L, dtype):
    flat_L = noise(L).to(dtype)
    chunks_NC, real_NC = ck.chunk(flat_L, C=4)
    N = math.ceil(L / 4)
    assert chunks_NC.shape == real_NC.shape == (N, 4) and chunks_NC.dtype == dtype
    assert int(real_NC.sum()) == L and not chunks_NC[~real_NC].any()
    x_BTC, real_BTC = ck.to_windows(chunks_NC, real_NC, T=3)
    assert x_BTC.shape == real_BTC.shape == (math.ceil(N / 3), 3, 4)
    assert int(real_BTC.sum()) == L
    assert torch.equal(x_BTC[real_BTC], flat_L)         # in order, nowhere else
    back_NC = ck.from_windows(x_BTC, N).clone()
    back_NC[~real_NC] = torch.nan                       # whatever a decoder writes
    back_L = ck.unchunk(back_NC, L)
    assert torch.equal(back_L, flat_L) and back_L.dtype == dtype


# --- Statistics -----------------------------------------------------------------------
VALUES = {"small spread, large mean": noise(5000) * 1e-4 + 1000,
          "normal": noise(1000) * 0.02,
          "one outlier": torch.cat([noise(970), torch.tensor([1e6])]),
          "one number": torch.tensor([3.0]), "constant": torch.full((300,), 2.5),
          "constant to rounding": torch.full((300,), 0.1),
          "empty": torch.zeros(0),
          "bfloat16": noise(500).bfloat16(),
          "float8": noise(500).to(torch.float8_e4m3fn),
          "float64, std 1e-9 of its mean": 1 + 1e-9 * noise(500).double()}


@pytest.mark.parametrize("case", VALUES)
def test_measure_equals_numpy_however_the_tensor_is_cut(tmp_path, monkeypatch, case):
    """In pieces of 97, against numpy over the whole; the tensors are not written to."""
    values = VALUES[case].reshape(-1, 1)
    before = values.clone()
    monkeypatch.setattr(ck.spans, "__defaults__", (97,))
    file = ck.Checkpoint(save(tmp_path / "x.safetensors", {"w": values}))
    wide = before.double().numpy()
    for source in (file, ck.StateDict({"w": values})):
        stats = ck.measure(source, "w")
        constant = len(wide) == 0 or wide.min() == wide.max()
        assert stats.mean == pytest.approx(wide.mean() if len(wide) else 0.0, rel=1e-14)
        assert stats.constant == constant
        # Of a spread of 1e-9 around 1, float64 itself keeps seven digits.
        assert stats.scale == pytest.approx(1.0 if constant else wide.std(), rel=1e-6)
        assert (stats.shape, stats.dtype) == (tuple(values.shape), values.dtype)
    assert torch.equal(values, before)


def test_pool_is_the_statistics_of_all_weights_together():
    one = noise(500).double() + 2
    other = 3 * noise(500, seed=1).double()
    pair = [ck.measure(ck.StateDict({"w": w}), "w") for w in (one, other)]
    both = torch.cat([one, other])
    expected = (both.mean().item(), both.std(correction=0).item())
    assert ck.pool(pair) == pytest.approx(expected)


@pytest.mark.parametrize("values, bound", [
    (noise(1000) * 3e-3 + 0.5, 4e-5), (noise(1000).double() * 1e-9 + 1, 1e-5),
    (noise(1000) * 1e-30, 1e-6)])
def test_standardised_weights_and_back(values, bound):
    """Bounds: the dtype's rounding over the spread, 2^-25 / 3e-3 and 2^-53 / 1e-9."""
    stats = ck.measure(ck.StateDict({"w": values}), "w")
    wide = values.double().numpy()
    x_L = ck.standardise(values, stats)
    expected = torch.from_numpy((wide - wide.mean()) / wide.std())
    assert x_L.dtype == torch.float32
    torch.testing.assert_close(x_L.double(), expected, rtol=0, atol=bound)
    back_L = ck.unstandardise(x_L, stats)
    assert back_L.dtype == values.dtype
    apart = (back_L.double() - values.double()).abs().max().item()
    assert apart <= bound * wide.std()


# --- Names ----------------------------------------------------------------------------
L, B, T = "model.layers.", "bert.encoder.layer.2.", "decoder.block.4.layer."
NINES = "9" * 5000
PLACES = {          # name -> (stack, layer, role)
    L + "3.self_attn.q_proj.weight": ("model.layers", 3, "q"),
    L + "0.self_attn.q_proj.bias": ("model.layers", 0, "q.bias"),
    L + "4.self_attn.qkv_proj.weight": ("model.layers", 4, "qkv"),
    L + "2.block_sparse_moe.gate.weight": ("model.layers", 2, "router"),
    L + "2.block_sparse_moe.experts.3.w1.weight": ("model.layers", 2, "gate.3"),
    L + "2.mlp.Wo.weight": ("model.layers", 2, "down"),             # ModernBERT
    "model.language_model.layers.7.mlp.down_proj.weight":
        ("model.language_model.layers", 7, "down"),
    "module.model.layers.3.self_attn._orig_mod.q_proj.weight": ("model.layers", 3, "q"),
    "transformer.h.5.attn.c_attn.weight": ("transformer.h", 5, "qkv"),
    "h.5.attn.c_proj.weight": ("h", 5, "o"), "h.5.mlp.c_proj.weight": ("h", 5, "down"),
    "h.5.mlp.c_fc.weight": ("h", 5, "up"), "h.5.ln_1.weight": ("h", 5, "norm"),
    "transformer.wte.weight": ("", None, "embed"),
    B + "attention.self.value.bias": ("bert.encoder.layer", 2, "v.bias"),
    B + "attention.output.dense.weight": ("bert.encoder.layer", 2, "o"),
    B + "output.dense.weight": ("bert.encoder.layer", 2, "down"),
    T + "0.SelfAttention.q.weight": ("decoder.block", 4, "q.0"),
    T + "1.EncDecAttention.o.weight": ("decoder.block", 4, "o.1.encdec"),
    T + "2.DenseReluDense.wi_0.weight": ("decoder.block", 4, "gate.2"),
    "shared.weight": ("", None, "embed"), "embed_out.weight": ("", None, "head"),
    "model.embed_tokens.weight": ("", None, "embed"),
    "lm_head.weight": ("", None, "head"),
    "score.weight": ("", None, "head"), "model.norm.weight": ("", None, "norm"),
    "blocks.3.mixer.zebra": ("blocks", 3, "mixer.zebra"),
    "0.auto_model.encoder.layer.3.output.dense.weight":
        ("0.auto_model.encoder.layer", 3, "down"),
    "layers.999999999.w": ("layers", 999999999, "w"), "": ("", None, ""),
    "²": ("", None, "²"), f"layers.{NINES}": ("", None, f"layers.{NINES}.{NINES}"),
    "layers.٣.w": ("", None, "layers.٣.w.٣"),
    "layers.-1.w": ("", None, "layers.-1.w.1"),
}


@pytest.mark.parametrize("name", PLACES, ids=lambda name: name[:50])
def test_parse_name(name):
    assert ck.parse_name(name)[:3] == PLACES[name]


def test_a_leading_number_is_a_layer_only_where_nothing_else_is():
    sequential = ck.parse_names(["0.weight", "2.weight"])
    assert [place.layer for place in sequential.values()] == [0, 2]
    other = ck.parse_names(["0.weight", "0.layer.3.weight"])
    assert [place.layer for place in other.values()] == [None, 3]


def test_selection(models):
    entries = ck.Checkpoint(models["a"]).entries.values()
    for pattern, count in ((None, 14), ("embed", 1), ("self_attn", 8), ("norm", 0)):
        assert sum(ck.is_selected(entry, pattern) for entry in entries) == count
    place = ck.parse_name("h.0.attn.bias")
    for name, shape, dtype, expected in (
            ("h.0.attn.w", (4, 4), torch.half, True),
            ("h.0.w", (0, 4), torch.half, False),
            ("h.0.w", (4, 4), torch.int64, False), ("h.0.w", (4,), torch.half, False),
            ("h.0.attn.mask", (8, 8), torch.half, False),
            ("h.0.attn.bias", (1, 1, 8, 8), torch.half, False),         # GPT-2's mask
            ("h.0.experts.down_proj_bias", (4, 8), torch.half, True)):  # gpt-oss
        entry = ck.Entry(name, dtype, shape, place=place)
        assert ck.is_selected(entry) == ck.is_selected(entry, ".") == expected


# --- Files ----------------------------------------------------------------------------
ODD = {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "ids": torch.arange(3),
       "mask": torch.tensor([True, False]), "half": noise(3, 3).half(),
       "layer 10/é": torch.ones(2), "layers.10.w": noise(2), "layers.2.w": noise(3),
       "../../x": torch.ones(2), "a\0\nb": torch.ones(1), "x" * 9_999: noise(2),
       **{str(d): torch.arange(3).to(d) for d in ck.DTYPE_NAMES}}


def test_reading_agrees_with_the_library(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(ODD, path, {"format": "pt", "note": "ü"})
    file, memory = ck.Checkpoint(path), ck.StateDict(ODD)
    assert set(file.entries) == set(ODD) and list(file.entries) == list(memory.entries)
    # layer by layer; the library sorts names as text
    assert [*file.entries][-2:] == ["layers.2.w", "layers.10.w"]
    assert file.metadata == {"format": "pt", "note": "ü"}
    for name, tensor in load_file(path).items():
        for source in (file, memory):
            entry = source.entries[name]
            assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
            assert torch.equal(source.read_tensor(name), tensor)
            assert torch.equal(source.read(name, 1, 3), tensor.reshape(-1)[1:3])
    assert len(file.read("half", 7, 99)) == 2 and len(file.read("half", 9, 12)) == 0
    view = noise(4, 6).T
    state = ck.StateDict({"w": view})
    assert torch.equal(state.read_tensor("w"), view)
    assert state.tensors["w"].is_contiguous()           # brought into order only once


def test_what_the_library_accepts_is_read_as_it_reads_it(tmp_path):
    """Out of order, not aligned, unknown keys, odd names, a huge shape of no number."""
    header = {"": {"dtype": "F32", "shape": [2, 2], "data_offsets": [1, 17], "note": 1},
              "²": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
              "a\nb": {"dtype": "F16", "shape": [3], "data_offsets": [17, 23]},
              "\0": {"dtype": "F32", "shape": [0, 2 ** 61], "data_offsets": [23, 23]}}
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(range(23))
    (tmp_path / "x").write_bytes(content)
    file = ck.Checkpoint(tmp_path / "x")
    expected = dict(deserialize(content))
    assert file.entries.keys() == expected.keys()
    for name, record in expected.items():
        entry = file.entries[name]
        assert ck.DTYPE_NAMES[entry.dtype] == record["dtype"]
        assert [*entry.shape] == [*record["shape"]]
        data = file.read(name).view(torch.uint8).numpy().tobytes()
        assert data == bytes(record["data"])


def test_threads_read_one_file_without_disturbing_each_other(tmp_path):
    tensors = {f"w{i}": torch.full((20_000,), float(i)) for i in range(8)}
    file = ck.Checkpoint(save(tmp_path / "x.safetensors", tensors))

    def look(number):
        name = f"w{number % 8}"
        return all(torch.equal(file.read(name, *span), tensors[name][slice(*span)])
                   for span in ck.spans(20_000, 500))
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(look, range(32)))


def test_written_files_are_whole_and_aligned_for_the_library(tmp_path):
    """Pieces in any order, headers of eight lengths; aligned to the dtype's size."""
    for n in range(8):
        tensors, path = {**ODD, "x" * n: torch.ones(1)}, tmp_path / f"{n}.safetensors"
        entries = ck.StateDict(tensors).entries.values()
        with ck.create(path, entries, {"n": "ü"}) as output:
            for name, w in reversed(tensors.items()):
                for start, stop in reversed(ck.spans(w.numel(), 2)):
                    output.put(name, start, w.reshape(-1)[start:stop])
        found, file = load_file(path), ck.Checkpoint(path)
        assert set(found) == set(tensors)
        assert file.metadata == {"format": "pt", "n": "ü"}
        for name, w in tensors.items():
            assert found[name].dtype == w.dtype and torch.equal(found[name], w)
            assert file.entries[name].start % w.dtype.itemsize == 0


ENTRY = ck.Entry("w", torch.float32, (4,))


@pytest.mark.parametrize("inside", ["", "model.safetensors"])
@pytest.mark.parametrize("fault", ["", "an error", "a piece is missing",
                                   "a piece comes twice",
                                   "the name is taken meanwhile"])
def test_a_result_appears_whole_or_not_at_all(tmp_path, inside, fault):
    path = tmp_path / "x"
    weights = save(path / inside, {"w": torch.zeros(1)})
    force = fault != "the name is taken meanwhile"
    expected = [0, 0, 1, 1]
    try:
        with ck.create(path, [ENTRY], inside=inside, force=force) as output:
            output.put("w", 2, torch.ones(2))
            if fault == "an error":
                raise ck.CheckpointError("x", "is wrong", "mend it")
            if fault != "a piece is missing":
                output.put("w", 0, torch.zeros(2))
            if fault == "a piece comes twice":
                output.put("w", 0, torch.zeros(2))
        assert not fault
    except ck.CheckpointError:
        assert fault
        expected = [0]
    assert load_file(weights)["w"].tolist() == expected
    assert os.listdir(tmp_path) == ["x"]
