"""The pure parts of the real pair, on a tiny made-up Llama: what is cut, its order, the controls.

Sizes are small for testing; oracles: the function itself, and matrices indexed by hand.
"""
import math

import numpy as np
import pytest
import torch

import real_sibling as pair
from align import Match
from chunking import Checkpoint, write_tensors
from tiny_lm import HEAD_DIM, TinyLM

LAYERS, HIDDEN, HEADS, GROUPS, UNITS = 4, 48, 6, 2, 40


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


def in_order(layers=range(LAYERS), units=UNITS):
    rows = {"heads": torch.arange(HEADS * HEAD_DIM), "groups": torch.arange(GROUPS * HEAD_DIM),
            "units": torch.arange(units)}
    return [(layer, rows) for layer in layers]


def norms(tensors):
    return {name: tensor.norm().item() for name, tensor in tensors.items()}


# --- What is cut, and its order -------------------------------------------------------------------
def test_nothing_dropped_is_the_same_model(tensors):
    same = pair.cut(tensors, torch.arange(HIDDEN), in_order())
    assert same.keys() == tensors.keys()
    assert all(torch.equal(same[name], tensor) for name, tensor in tensors.items())


def test_named_layers_and_units_stay(tensors):
    cut = pair.cut(tensors, torch.arange(HIDDEN), in_order([0, 3], units=30))
    assert pair.layer_count(cut) == 2 and len(cut) == 2 + 2 * 9
    for new, old in ((0, 0), (1, 3)):
        for name, index in (("mlp.up_proj", slice(30)), ("mlp.down_proj", (slice(None), slice(30))),
                            ("self_attn.k_proj", slice(None)), ("input_layernorm", slice(None))):
            expected = tensors[f"model.layers.{old}.{name}.weight"][index]
            assert torch.equal(cut[f"model.layers.{new}.{name}.weight"], expected)
    assert logits(cut).shape == (2, 12, 256)


def test_another_order_is_the_same_function(tensors):
    stream, layers = pair.random_order(tensors, range(LAYERS), UNITS, HEAD_DIM, seed=1)
    moved = pair.cut(tensors, stream, layers)
    for name in ("q", "k", "v", "o"):       # the seed moves heads and groups, not the stream alone
        assert not torch.equal(layers[0][1]["heads"], torch.arange(HEADS * HEAD_DIM))
        assert not torch.equal(moved[f"model.layers.0.self_attn.{name}_proj.weight"],
                               tensors[f"model.layers.0.self_attn.{name}_proj.weight"])
    assert any(rows["groups"][0] != 0 for _, rows in layers)
    # float32; the order of sums differs, and logits are near 10
    torch.testing.assert_close(logits(moved), logits(tensors), rtol=1e-4, atol=1e-4)


def test_so_many_units_stay_each_once(tensors):
    _, layers = pair.random_order(tensors, [0, 3], 30, HEAD_DIM, seed=1)
    kept = [set(rows["units"].tolist()) for _, rows in layers]
    assert all(len(units) == 30 and units <= set(range(UNITS)) for units in kept)
    assert kept[0] != kept[1]


def test_layers_are_never_dropped_at_the_ends():
    for seed in range(20):
        kept = pair.kept_layers(5, 2, seed)
        assert len(kept) == 3 and kept == sorted(kept) and {0, 4} <= set(kept) <= set(range(5))
    assert len({tuple(pair.kept_layers(30, 2, seed)) for seed in range(5)}) > 1


def test_rows_of_whole_heads():
    assert pair.blocks(torch.tensor([1, 0]), 2).tolist() == [2, 3, 0, 1]


def match_of(stream, layers):
    return Match([layer for layer, _ in layers], [dict(rows) for _, rows in layers], stream,
                 [1.0] * len(layers), 0.1, True)


def test_the_share_that_a_match_found(tensors):
    stream, layers = pair.random_order(tensors, [0, 2, 3], 20, HEAD_DIM, seed=1)
    right = pair.found_right(match_of(stream, layers), stream, layers)
    assert right == {"layers": True, "stream": 1, "heads": 1, "groups": 1, "units": 1}
    wrong = match_of(stream, layers)
    wrong.units[1]["units"] = torch.full((20,), -1)
    wrong.layers[1] = 1
    right = pair.found_right(wrong, stream, layers)
    assert not right["layers"] and right["units"] == pytest.approx(2 / 3) and right["heads"] == 1


# --- Controls -------------------------------------------------------------------------------------
def test_controls_have_the_differences_norm(tensors):
    tensors["odd"] = torch.randn(3, 50)     # two runs of 64, and 22 more
    for control in (pair.noise, pair.shuffled):
        found = control(tensors, seed=3)
        assert norms(found) == pytest.approx(norms(tensors), rel=1e-5)
        again, other = control(tensors, seed=3), control(tensors, seed=4)
        for name, tensor in tensors.items():
            assert found[name].shape == tensor.shape and torch.equal(found[name], again[name])
            assert tensor.numel() <= pair.RUN or not torch.equal(found[name], tensor)
        assert not torch.equal(found["odd"], other["odd"])
    noise = pair.noise(tensors, 3)
    up, gate = (noise[f"model.layers.0.mlp.{name}_proj.weight"].flatten()
                for name in ("up", "gate"))
    assert abs(torch.dot(up, gate) / up.norm() / gate.norm()) < 0.1        # each its own


def test_shuffled_runs_stay_whole():
    tensor = torch.arange(5 * 64 + 10.0).view(5, -1)
    before, (found,) = tensor.clone(), pair.shuffled({"a": tensor}, seed=0).values()
    flat = found.flatten()
    runs = flat[:320].view(5, 64)
    assert torch.equal(tensor, before) and torch.equal(flat[320:], tensor.flatten()[320:])
    assert sorted(runs[:, 0].tolist()) == [0, 64, 128, 192, 256]
    assert torch.equal(runs - runs[:, :1], torch.arange(64.0).expand(5, 64))


def test_neighbour_is_the_next_layers_difference(tensors, tmp_path):
    stream, layers = pair.random_order(tensors, [0, 2, 3], 20, HEAD_DIM, seed=1)
    target = pair.cut(tensors, stream, layers)
    expert = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    models = []
    for name, of in (("target", target), ("expert", expert), ("base", tensors)):
        write_tensors(tmp_path / f"{name}.safetensors", of, {})
        models.append(Checkpoint(tmp_path / f"{name}.safetensors"))
    found = pair.neighbour(*models, match_of(stream, layers), 0.5)
    assert len(found) == 3 * 7              # the matrices of three layers
    for j, beside in enumerate((1, 3, 2)):
        name, rows = f"model.layers.{beside}.mlp.up_proj.weight", layers[j][1]["units"]
        expected = 0.5 * (expert[name] - tensors[name])[rows][:, stream]
        torch.testing.assert_close(found[f"model.layers.{j}.mlp.up_proj.weight"], expected)


# --- Losses ---------------------------------------------------------------------------------------
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


def test_training_lowers_the_loss_and_a_loss_is_per_token():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True))
    tokens = {"arithmetic": torch.arange(600) % 5}
    recipe = pair.Recipe(mixture=(0, 0, 1), steps=40, rate=1e-2)
    curve = pair.train(lm, tokens, recipe)
    assert len(curve) == 40 and sum(curve[-5:]) < 0.5 * sum(curve[:5])
    ids = torch.tensor([[1, 2, 3, 4]])
    (value,) = pair.losses(lm, {"arithmetic": [ids]})["arithmetic"]
    spent = lm(input_ids=ids).logits[0, :-1].log_softmax(-1)[torch.arange(3), ids[0, 1:]]
    assert value == pytest.approx(-spent.mean().item(), rel=1e-5)
