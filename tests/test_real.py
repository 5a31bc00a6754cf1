"""experiments/real.py on a tiny made-up Llama: what is cut, its order, the losses.
Oracles: the function itself, and matrices indexed by hand."""
import json

import pytest
import torch
from safetensors.torch import save_file

import real
from make_models import cut
from shapes import neighbour_change
from tiny_lm import HEAD_DIM, TinyLM

LAYERS, HIDDEN, HEADS, GROUPS, UNITS = 4, 64, 6, 2, 96


@pytest.fixture
def tensors():
    """Six heads on two groups; gains away from 1, so that a gain in the wrong place is
    seen."""
    torch.manual_seed(0)
    lm = TinyLM(hidden=HIDDEN, layers=LAYERS, heads=HEADS, mlp=UNITS, kv_heads=GROUPS)
    for weight in lm.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.2)
    return {name: weight.detach().clone() for name, weight in lm.state_dict().items()}


def logits(tensors):
    text = torch.arange(24).view(2, 12) * 7 % 256
    return TinyLM.from_state_dict(tensors)(text).detach()


def test_another_order_is_the_same_function(tensors):
    stream, layers = real.random_order(tensors, range(LAYERS), UNITS, HEAD_DIM, seed=1)
    moved = cut(tensors, stream, layers)
    for name in ("q", "k", "v", "o"):   # the seed moves heads and groups, too
        key = f"model.layers.0.self_attn.{name}_proj.weight"
        assert not torch.equal(moved[key], tensors[key])
    # float32; the order of sums differs, and logits are near 10
    torch.testing.assert_close(logits(moved), logits(tensors), rtol=1e-4, atol=1e-4)


def test_neighbour_is_the_next_layers_difference(tensors, tmp_path):
    """Layers 0, 2, 3 of the base are the target's: beside them stand 1, 3 and, at the
    end, 2."""
    stream, layers = real.random_order(tensors, [0, 2, 3], 60, HEAD_DIM, seed=1)
    expert = {name: w + 0.1 * torch.randn_like(w) for name, w in tensors.items()}
    paths = []
    for name, of in (("target", cut(tensors, stream, layers)), ("base", tensors),
                     ("expert", expert)):
        paths.append(tmp_path / f"{name}.safetensors")
        save_file({key: w.contiguous() for key, w in of.items()}, paths[-1])
    found = neighbour_change(*paths, 0.5)
    for j, beside in enumerate((1, 3, 2)):
        name = f"model.layers.{beside}.mlp.up_proj.weight"
        moved = (expert[name] - tensors[name])[layers[j][1]["units"]][:, stream]
        torch.testing.assert_close(found[f"model.layers.{j}.mlp.up_proj.weight"],
                                   0.5 * moved)


def test_a_model_is_written_as_a_folder(tensors, tmp_path):
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "config.json").write_text('{"hidden_size": 64, "num_hidden_layers": 9}')
    (parent / "tokenizer.json").write_text("{}")
    real.write_model(tmp_path / "new", tensors, parent, num_hidden_layers=4)
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config == {"hidden_size": 64, "num_hidden_layers": 4}
    assert (tmp_path / "new/tokenizer.json").exists()
    found = real.read_model(tmp_path / "new")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
