"""experiments/relatives.py and real_sibling.py, on a tiny made-up Llama: what is cut, its order, the
controls, the rows.

Sizes are small for testing; oracles: the function itself, and matrices indexed by hand.
"""
import json
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import real_sibling as pair
import records
import relatives
import scores
import transfer_tables
from grid import Grid
from lsmerge import Codec
from tiny_lm import HEAD_DIM, TinyLM

LAYERS, HIDDEN, HEADS, GROUPS, UNITS = 4, 64, 6, 2, 96


@pytest.fixture
def tensors():
    """Six heads on two groups; gains away from 1, so that a gain in the wrong place is seen."""
    torch.manual_seed(0)
    lm = TinyLM(hidden=HIDDEN, layers=LAYERS, heads=HEADS, mlp=UNITS, kv_heads=GROUPS)
    for weight in lm.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.2)
    return {name: weight.detach().clone() for name, weight in lm.state_dict().items()}


def logits(tensors):
    text = torch.arange(24).view(2, 12) * 7 % 256
    return TinyLM.from_state_dict(tensors)(text).detach()


def write(path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


# --- What is cut, and its order -------------------------------------------------------------------
def test_named_layers_and_units_stay(tensors):
    rows = {"heads": torch.arange(HEADS * HEAD_DIM), "groups": torch.arange(GROUPS * HEAD_DIM),
            "units": torch.arange(30)}
    cut = pair.cut(tensors, torch.arange(HIDDEN), [(0, rows), (3, rows)])
    assert pair.layer_count(cut) == 2 and len(cut) == 2 + 2 * 9
    for new, old in ((0, 0), (1, 3)):
        for name, index in (("mlp.up_proj", slice(30)), ("mlp.down_proj", (slice(None), slice(30))),
                            ("self_attn.k_proj", slice(None)), ("input_layernorm", slice(None))):
            expected = tensors[f"model.layers.{old}.{name}.weight"][index]
            assert torch.equal(cut[f"model.layers.{new}.{name}.weight"], expected)


def test_another_order_is_the_same_function(tensors):
    stream, layers = pair.random_order(tensors, range(LAYERS), UNITS, HEAD_DIM, seed=1)
    moved = pair.cut(tensors, stream, layers)
    for name in ("q", "k", "v", "o"):       # the seed moves heads and groups, not the stream alone
        key = f"model.layers.0.self_attn.{name}_proj.weight"
        assert not torch.equal(moved[key], tensors[key])
    assert any(rows["groups"][0] != 0 for _, rows in layers)
    # float32; the order of sums differs, and logits are near 10
    torch.testing.assert_close(logits(moved), logits(tensors), rtol=1e-4, atol=1e-4)


def test_what_is_dropped():
    for seed in range(20):                  # layers never at the ends
        kept = pair.kept_layers(5, 2, seed)
        assert len(kept) == 3 and kept == sorted(kept) and {0, 4} <= set(kept) <= set(range(5))
    assert len({tuple(pair.kept_layers(30, 2, seed)) for seed in range(5)}) > 1
    assert pair.blocks(torch.tensor([1, 0]), 2).tolist() == [2, 3, 0, 1]


# --- Controls -------------------------------------------------------------------------------------
def test_controls_have_the_differences_norm(tensors):
    def norms(of):
        return {name: tensor.norm().item() for name, tensor in of.items()}
    tensors["odd"] = torch.randn(3, 50)     # two runs of 64, and 22 more
    for control in (relatives.noise, relatives.shuffled):
        found = control(tensors, seed=3)
        assert norms(found) == pytest.approx(norms(tensors), rel=1e-5)
        again, other = control(tensors, seed=3), control(tensors, seed=4)
        for name, tensor in tensors.items():
            assert found[name].shape == tensor.shape and torch.equal(found[name], again[name])
            assert tensor.numel() <= relatives.RUN or not torch.equal(found[name], tensor)
        assert not torch.equal(found["odd"], other["odd"])
    noise = relatives.noise(tensors, 3)
    up, gate = (noise[f"model.layers.0.mlp.{name}_proj.weight"].flatten()
                for name in ("up", "gate"))
    assert abs(torch.dot(up, gate) / up.norm() / gate.norm()) < 0.1        # each its own


def test_shuffled_runs_stay_whole():
    tensor = torch.arange(5 * 64 + 10.0).view(5, -1)
    before, (found,) = tensor.clone(), relatives.shuffled({"a": tensor}, seed=0).values()
    flat = found.flatten()
    runs = flat[:320].view(5, 64)
    assert torch.equal(tensor, before) and torch.equal(flat[320:], tensor.flatten()[320:])
    assert sorted(runs[:, 0].tolist()) == [0, 64, 128, 192, 256]
    assert torch.equal(runs - runs[:, :1], torch.arange(64.0).expand(5, 64))


def test_neighbour_is_the_next_layers_difference(tensors, tmp_path):
    """Layers 0, 2, 3 of the base are the target's: beside them stand 1, 3 and, at the end, 2."""
    stream, layers = pair.random_order(tensors, [0, 2, 3], 60, HEAD_DIM, seed=1)
    expert = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    paths = [write(tmp_path / f"{name}.safetensors", of) for name, of in (
        ("target", pair.cut(tensors, stream, layers)), ("base", tensors), ("expert", expert))]
    found = relatives.neighbour(*paths, 0.5)
    for j, beside in enumerate((1, 3, 2)):
        name, rows = f"model.layers.{beside}.mlp.up_proj.weight", layers[j][1]["units"]
        expected = 0.5 * (expert[name] - tensors[name])[rows][:, stream]
        torch.testing.assert_close(found[f"model.layers.{j}.mlp.up_proj.weight"], expected)


# --- Rows -----------------------------------------------------------------------------------------
@pytest.fixture
def family(tensors, tmp_path, monkeypatch):
    """`pruned`: layers 0, 2, 3 of `base`, in another order; `code`: an expert of `base`, with a
    change that is known; a stranger."""
    monkeypatch.setattr(relatives, "MODELS", tmp_path)
    monkeypatch.setattr(scores, "held_out", lambda domain, split: (b"x = 1\n" * 4, b"abc def ghi"))
    change = {name: 0.05 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    order = pair.random_order(tensors, [0, 2, 3], 60, HEAD_DIM, seed=1)
    torch.manual_seed(9)
    for name, of in (("base", tensors), ("pruned", pair.cut(tensors, *order)),
                     ("code", {name: tensors[name] + change[name] for name in tensors}),
                     ("stranger", {name: torch.randn_like(w) for name, w in tensors.items()})):
        write(tmp_path / f"{name}.safetensors", of)
    return tmp_path, pair.cut(change, *order)


def test_rows_of_a_pruned_model(family, monkeypatch, capsys):
    """The command; and a merge at lambda 1 adds the known change, in the target's order."""
    folder, change = family
    seen = []
    monkeypatch.setattr(relatives, "score", lambda tensors: seen.append(tensors) or scores.score(
        tensors))
    monkeypatch.setattr(sys, "argv", ["relatives.py", "--pruned", "--record", str(folder / "r")])
    relatives.main()
    rows = records.Results(folder / "r").rows("pruned")
    assert [row["lam"] for row in rows if row["row"].startswith("diff")] == [0.3, 0.5, 1.0]
    assert [row["row"] for row in rows[3:]] == ["neighbour", *["noise", "shuffled"] * 5]
    start, merged = seen[0], seen[3]
    assert len(merged) == 2 + 3 * 9
    for name, tensor in merged.items():
        if "norm" not in name or tensor.shape == change[name].shape:
            torch.testing.assert_close(tensor, start[name] + change[name], rtol=1e-4, atol=1e-5)
    assert "difference, matched" in capsys.readouterr().out


def test_kinship_of_every_pair(family, monkeypatch):
    monkeypatch.setattr(relatives, "NAMES", ("base", "pruned", "stranger"))
    rows = {(row["target"], row["source"]): row for row in relatives.kinship_rows()}
    assert len(rows) == 6 and json.dumps([*rows.values()], allow_nan=False)
    assert rows["pruned", "base"]["layers"] == [0, 2, 3]
    assert rows["base", "pruned"]["layers"] == [0, None, 1, 2]
    assert {row["related"] for (a, b), row in rows.items() if "stranger" in (a, b)} == {False}
    assert np.array(rows["pruned", "base"]["matrix"]).shape == (4, 3)      # source, target


def test_figure_4s_rows_of_a_relative(family, monkeypatch, tmp_path):
    """Matched: at lambda 1 the source itself, where every layer has a partner."""
    folder, change = family
    monkeypatch.setattr(transfer_tables, "LAMBDAS", (1.0,))
    target, source = folder / "pruned.safetensors", folder / "code.safetensors"
    grid, kept = Grid(target, Codec.load("exact")), {}
    monkeypatch.setattr(grid, "score", lambda key, model, splits: kept.update({key: model}))
    transfer_tables.measure_by_units(grid, target, source, tmp_path, seeds=1)
    assert [(key.align, key.pairing, key.control) for key in kept] == [
        ("units", "weights", control) for control in (None, "carried", "neighbour")]
    start = load_file(target)
    first, carried, beside = (model.state_dict() for model in kept.values())
    for name in start:
        moved = 0.0 if ".layers." not in name or "norm" in name else change[name]
        torch.testing.assert_close(first[name], start[name] + moved, rtol=1e-4, atol=1e-5)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not any(torch.allclose(other[name], first[name], atol=0.1) for other in (carried, beside))


# --- Losses of a real model -----------------------------------------------------------------------
def test_paired_difference_by_hand():
    found = pair.paired({"prose": [1.0, 2.0, 6.0]}, {"prose": [0.0, 0.0, 3.0]})["prose"]
    assert found["mean"] == pytest.approx(2) and found["loss"] == pytest.approx(3)
    assert found["se"] == pytest.approx(1 / math.sqrt(3))       # differences 1, 2, 3


def test_windows_are_runs_of_the_domains_in_the_mixture():
    tokens = {"code": torch.arange(1000), "prose": torch.arange(5000, 6000)}
    recipe = pair.Recipe(mixture=(0.5, 0.5, 0), steps=1, rate=0, batch=64)
    rows = pair.windows(tokens, recipe, np.random.default_rng(0))
    assert rows.shape == (64, pair.WINDOW) and bool((rows.diff(dim=1) == 1).all())
    assert 16 < (rows[:, 0] < 1000).sum() < 48      # four standard deviations


def test_a_model_is_written_as_a_folder(tensors, tmp_path):
    (parent := tmp_path / "parent").mkdir()
    (parent / "config.json").write_text('{"hidden_size": 64, "num_hidden_layers": 9}')
    (parent / "tokenizer.json").write_text("{}")
    pair.write_model(tmp_path / "new", tensors, parent, num_hidden_layers=4)
    assert json.loads((tmp_path / "new/config.json").read_text()) == {
        "hidden_size": 64, "num_hidden_layers": 4}
    assert (tmp_path / "new/tokenizer.json").exists()
    found = pair.read_model(tmp_path / "new")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
