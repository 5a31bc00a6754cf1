"""experiments/lora.py. Oracles: the sum by numpy in float64, scipy's singular values, PEFT itself
where it is installed."""
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file

import chunking
import lora
import merge
from conftest import ROOT, llama_tensors

Q = "model.layers.0.self_attn.q_proj"
MODULES = [Q, "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]
P = "base_model.model."
QA, QB = f"{P}{Q}.lora_A.weight", f"{P}{Q}.lora_B.weight"
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "fan_in_fan_out": False,
         "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
         "modules_to_save": None, "target_modules": ["q_proj"], "init_lora_weights": True}


def run(*arguments):
    """The command, as the shell would see it: its exit code."""
    return chunking.command(lambda: lora.main([str(a) for a in arguments]))


def write_adapter(folder, seed=1, edit=None, dtype=torch.float32, **settings):
    """A folder as PEFT saves it, for the models a and b of conftest: its path and its factors.
    edit: what is done to the tensors; settings: of the configuration."""
    g, shapes, tensors = torch.Generator().manual_seed(seed), llama_tensors(0), {}
    for module in MODULES:
        out, width = shapes[module + ".weight"].shape
        A, B = torch.randn(4, width, generator=g) * 0.1, torch.randn(out, 4, generator=g) * 0.1
        tensors[f"{P}{module}.lora_A.weight"] = A.to(dtype)
        tensors[f"{P}{module}.lora_B.weight"] = B.to(dtype)
    if edit:
        edit(tensors)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder, tensors


def product(tensors, module, s=2.0):
    """s B A, by numpy in float64."""
    A, B = (tensors[f"{P}{module}.lora_{x}.weight"].double().numpy() for x in "AB")
    return s * (B @ A)


def by_hand(base, tensors, s=(2.0, 2.0, 2.0)):
    """The folded model: one rounding of the float64 sum."""
    result = dict(base)
    for module, scale in zip(MODULES, s):
        weight = base[module + ".weight"]
        total = torch.from_numpy(weight.double().numpy() + product(tensors, module, scale))
        result[module + ".weight"] = total.to(weight.dtype)
    return result


def turned(model):
    """The adapted matrices stored the other way round, as GPT-2 does."""
    return {name: tensor.T.contiguous() if name.removesuffix(".weight") in MODULES else tensor
            for name, tensor in model.items()}


def assert_equal(got, expected):
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def assert_near(got, expected, relative):
    """Of numpy arrays, relative to the largest number expected."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=relative * abs(expected).max())


def one_line(capsys, *words):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "; fix: " in error
    assert all(str(word) in error for word in words), (error, words)


# --- fold -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("piece", [chunking.PIECE, 100, 1000])
def test_fold_is_the_float64_sum_rounded_once(tmp_path, monkeypatch, dtype, piece):
    """Bit for bit, whatever the pieces; all other tensors stay as they are."""
    monkeypatch.setattr(lora, "PIECE", piece)
    base = llama_tensors(1, dtype=dtype)
    base |= {"ids": torch.arange(5), "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5)}
    save_file(base, tmp_path / "base.safetensors")
    half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    path, tensors = write_adapter(tmp_path / "x", dtype=half)
    out = tmp_path / "m.safetensors"
    assert run("fold", tmp_path / "base.safetensors", path, "-o", out) == 0
    assert_equal(load_file(out), by_hand(base, tensors))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "m.safetensors", "x"]


@pytest.mark.parametrize("settings, scales", [
    (dict(), [2, 2, 2]), (dict(use_rslora=True), [4, 4, 4]), (dict(lora_alpha=3), [0.75] * 3),
    (dict(lora_alpha=-8), [-2] * 3), (dict(alpha_pattern={"proj": 16}), [2, 2, 2]),
    (dict(alpha_pattern={"down_proj": 16, "layers.1.mlp.up_proj": 1}), [2, 4, 0.25]),
    (dict(alpha_pattern={r"layers\.\d+\.mlp\..*": 12}), [2, 3, 3])])
def test_scaling_follows_the_configuration(models, tmp_path, settings, scales):
    """s = alpha / r, alpha / sqrt(r) for rslora; a pattern matches whole parts at a name's end."""
    path, tensors = write_adapter(tmp_path / "x", **settings)
    expected = by_hand(load_file(models["a"]), tensors, scales)
    assert_equal(lora.folded_tensors(models["a"], path), expected)


def test_ranks_may_differ_by_module(models, tmp_path):
    def cut(tensors):
        tensors[QA], tensors[QB] = tensors[QA][:2].clone(), tensors[QB][:, :2].clone()
    path, tensors = write_adapter(tmp_path / "x", edit=cut, rank_pattern={"q_proj": 2})
    expected = by_hand(load_file(models["a"]), tensors, (4.0, 2.0, 2.0))    # alpha / r = 8 / 2
    assert_equal(lora.folded_tensors(models["a"], path), expected)


@pytest.mark.parametrize("piece", [chunking.PIECE, 100])
def test_fan_in_fan_out_is_transposed(models, tmp_path, monkeypatch, piece):
    monkeypatch.setattr(lora, "PIECE", piece)
    path, tensors = write_adapter(tmp_path / "x", fan_in_fan_out=True)
    base = load_file(models["a"])
    save_file(turned(base), tmp_path / "base.safetensors")
    lora.fold(tmp_path / "base.safetensors", path, tmp_path / "m.safetensors")
    assert_equal(load_file(tmp_path / "m.safetensors"), turned(by_hand(base, tensors)))


def test_in_memory_as_in_a_file_and_wider_where_asked(models, tmp_path):
    """A base in memory sets the precision: what an adapter adds to bfloat16 is not rounded away."""
    path, tensors = write_adapter(tmp_path / "x")
    lora.fold(models["half"], path, tmp_path / "m.safetensors")
    in_memory = lora.folded_tensors(models["half"], path)
    assert_equal(in_memory, load_file(tmp_path / "m.safetensors"))
    wide = {name: tensor.float() for name, tensor in load_file(models["half"]).items()}
    assert_equal(lora.folded_tensors(chunking.StateDict(wide), path), by_hand(wide, tensors))


@pytest.fixture
def base_folder(models, tmp_path):
    """Model a as a folder in the Hugging Face layout, named `base`."""
    (folder := tmp_path / "base").mkdir()
    save_file(load_file(models["a"]), folder / "model.safetensors")
    (folder / "config.json").write_text('{"num_hidden_layers": 2}\n')
    return folder


def test_a_folder_gives_a_folder(base_folder, tmp_path, capsys):
    """Companions byte for byte, and a card of its own."""
    companions = {"tokenizer.json": bytes(range(256)), "README.md": b"the base's own card"}
    for name, content in companions.items():
        (base_folder / name).write_bytes(content)
    path, tensors = write_adapter(tmp_path / "x")
    out = tmp_path / "m"
    assert run("fold", base_folder, path, "-o", out) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json"]
    for name in ("config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (base_folder / name).read_bytes()
    expected = by_hand(load_file(base_folder / "model.safetensors"), tensors)
    assert_equal(load_file(out / "model.safetensors"), expected)
    card = (out / "README.md").read_text()
    assert 'base_model: "base"' in card and "lora.py fold" in card and str(tmp_path) not in card
    capsys.readouterr()
    assert run("fold", base_folder, path, "-o", out) == 1
    one_line(capsys, "exists")
    assert run("fold", base_folder, path, "-o", out, "--force") == 0
    assert run("fold", base_folder, path, "-o", tmp_path / "m.safetensors") == 0
    assert_equal(load_file(tmp_path / "m.safetensors"), expected)


@pytest.mark.parametrize("output, words, force", [
    ("base.safetensors", "input", True), ("x/adapter_model.safetensors", "input", True),
    ("x/adapter_config.json", "input", True), ("old.safetensors", "exists", False)])
def test_what_an_output_may_not_be(models, tmp_path, capsys, output, words, force):
    """An input, whatever --force says; what exists, without it."""
    base, out = tmp_path / "base.safetensors", tmp_path / output
    save_file(load_file(models["a"]), base)
    path, _ = write_adapter(tmp_path / "x")
    (tmp_path / "old.safetensors").write_text("old")
    before = out.read_bytes()
    assert run("fold", base, path, "-o", out, *["--force"] * force) == 1
    one_line(capsys, words)
    assert out.read_bytes() == before
    assert run("fold", base, path, "-o", tmp_path / "old.safetensors", "--force") == 0


def test_folded_models_are_whole_models_to_merge(models, tmp_path):
    """Two experts of one base through merge.py; task arithmetic adds their products."""
    base, out, adapters = load_file(models["a"]), tmp_path / "m.safetensors", []
    for seed in (1, 2):
        path, tensors = write_adapter(tmp_path / f"x{seed}", seed)
        adapters.append(tensors)
        lora.fold(models["a"], path, tmp_path / f"{seed}.safetensors")
    files = [str(tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    flags = ["--space", "weight", "--quiet", "--force", "-o", str(out)]
    for more, weights in ((["--lam", "0.25"], (0.75, 0.25)),
                          (["--operator", "task-arithmetic", "--base", str(models["a"]),
                            "--lam", "1"], (1.0, 1.0))):
        merge.main([*files, *more, *flags])
        got = load_file(out)
        for module in MODULES:
            expected = base[module + ".weight"].double().numpy()
            for weight, tensors in zip(weights, adapters):
                expected = expected + weight * product(tensors, module)
            assert_near(got[module + ".weight"].double().numpy(), expected, 1e-6)    # of float32


def test_modules_without_factors_are_said(models, tmp_path, capsys):
    path, _ = write_adapter(tmp_path / "x")
    assert run("fold", models["a"], path, "-o", tmp_path / "m.safetensors") == 0
    out = capsys.readouterr().out
    assert "note: the adapter has nothing for 11 matrices" in out and "gate" in out
    assert "the difference is zero" in out and "to 3 matrices" in out


def test_what_rounding_takes_is_said(models, tmp_path, capsys):
    """bfloat16 keeps 8 bits of a weight, and so fewer of the small number that is added to it."""
    path, tensors = write_adapter(tmp_path / "x")
    record = lora.fold(models["half"], path, tmp_path / "m.safetensors")
    base, got = load_file(models["half"]), load_file(tmp_path / "m.safetensors")
    error = whole = 0.0
    for module in MODULES:
        added = product(tensors, module)
        seen = (got[module + ".weight"].double() - base[module + ".weight"].double()).numpy()
        error, whole = error + ((seen - added) ** 2).sum(), whole + (added ** 2).sum()
    assert record["rounding"] == pytest.approx(math.sqrt(error / whole), rel=1e-6)
    for name in ("half", "a"):
        path, _ = write_adapter(tmp_path / name, lora_alpha=0.8)
        assert run("fold", models[name], path, "-o", tmp_path / "n.safetensors", "--force") == 0
        assert ("note: rounding" in capsys.readouterr().out) == (name == "half")


@pytest.mark.parametrize("named, config, noted", [
    ("org/Llama-2-7b", {"_name_or_path": "org/Llama-2-7b-hf"}, True),
    ("org/Llama-2-7b", {"_name_or_path": "/data/Llama-2-7b/"}, False),
    ("org/Llama-2-7b", {}, False), (None, {"_name_or_path": "x"}, False),
    ("org/Llama-2-7b", None, False)])
def test_a_base_of_another_name_is_noted(base_folder, tmp_path, capsys, named, config, noted):
    (base_folder / "config.json").unlink()
    if config is not None:
        (base_folder / "config.json").write_text(json.dumps(config))
    path, _ = write_adapter(tmp_path / "x", base_model_name_or_path=named)
    assert run("fold", base_folder, path, "-o", tmp_path / "m") == 0
    assert ("as its base, this one is" in capsys.readouterr().out) == noted


def test_a_file_of_another_name_is_noted(models, tmp_path, capsys):
    path, _ = write_adapter(tmp_path / "x", base_model_name_or_path="a")
    assert run("fold", models["a"], path, "-o", tmp_path / "m.safetensors") == 0
    assert "as its base" not in capsys.readouterr().out
    assert run("fold", models["b"], path, "-o", tmp_path / "n.safetensors") == 0
    assert "names 'a' as its base, this one is 'b'" in capsys.readouterr().out


# --- fold: what is refused ------------------------------------------------------------------------
def drop(tensors):
    del tensors[QB]


def spoil(tensors):
    tensors[QA][1, 2] = math.nan


def add(name, *shape):
    """A change that adds a tensor, or replaces it by one of another shape."""
    return lambda tensors: tensors.update({name: torch.ones(*shape)})


def unknown(tensors):
    add(P + "model.x.lora_A.weight", 4, 9)(tensors), add(P + "model.x.lora_B.weight", 9, 4)(tensors)


REFUSED = {     # case: (settings of the configuration, change of the tensors, words of the error)
    "dora": ({"use_dora": True}, None, "use_dora"),
    "lokr": ({"peft_type": "LOKR"}, None, "LOKR"),
    "bias": ({"bias": "all"}, None, "bias"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
    "kasa": ({"kasa_config": {"beta": 1e-4}}, None, "kasa_config"),
    "activated": ({"alora_invocation_tokens": [1]}, None, "alora_invocation_tokens"),
    "wrong rank": ({"r": 5}, None, "rank 5"),
    "rank is text": ({"r": "4"}, None, "r '4'"),
    "alpha is NaN": ({"lora_alpha": math.nan}, None, "lora_alpha nan"),
    "alpha is a table": ({"alpha_pattern": {"q_proj": {}}}, None, "lora_alpha {}"),
    "no alpha": ({"lora_alpha": None}, None, "lora_alpha None"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, None, "pissa"),
    "a list of patterns": ({"rank_pattern": ["q_proj"]}, None, "rank_pattern"),
    "a broken pattern": ({"alpha_pattern": {"(": 4}}, None, "alpha_pattern"),
    "magnitude": ({}, add(f"{P}{Q}.lora_magnitude_vector", 64), "lora_magnitude_vector"),
    "embedding": ({}, add(P + "model.embed_tokens.lora_embedding_A", 4, 40), "lora_embedding_A"),
    "a bias tensor": ({}, add(f"{P}{Q}.base_layer.bias", 64), "base_layer.bias"),
    "a convolution": ({}, add(QA, 4, 64, 1, 1), "convolution"),
    "one factor": ({}, drop, "other factor"),
    "an empty factor": ({}, add(QA, 4, 0), "no factor"),
    "a factor with NaN": ({}, spoil, "lora_A"),
    "unknown module": ({}, unknown, "model.x.weight"),
    "another shape": ({}, add(QA, 4, 63), "[64, 63]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(models, tmp_path, capsys, case):
    settings, edit, words = REFUSED[case]
    path, _ = write_adapter(tmp_path / "x", edit=edit, **settings)
    assert run("fold", models["a"], path, "-o", tmp_path / "m.safetensors") == 1
    one_line(capsys, words, path)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("file, content, words", [
    ("adapter_config.json", None, "adapter_config.json"), ("adapter_config.json", b"{", "JSON"),
    ("adapter_config.json", b"[]", "JSON"), ("adapter_config.json", b'{"r": "\xff"}', "JSON"),
    ("adapter_model.safetensors", None, "adapter_model.safetensors"),
    ("adapter_model.safetensors", b"PK\3\4" + bytes(40), "pickles run code")])
def test_a_folder_that_is_no_adapter(models, tmp_path, capsys, file, content, words):
    path, _ = write_adapter(tmp_path / "x")
    (path / file).unlink()
    if content:
        (path / file).write_bytes(content)
    assert run("fold", models["a"], path, "-o", tmp_path / "m.safetensors") == 1
    one_line(capsys, words, path)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("value, dtype, words", [
    (math.nan, torch.float32, "NaN"), (6e4, torch.float16, "does not fit torch.float16")])
def test_a_value_that_does_not_belong_into_a_file(tmp_path, capsys, value, dtype, words):
    """NaN in the base; a sum beyond float16's 65504."""
    base = llama_tensors(1, dtype=dtype)
    base[Q + ".weight"][3, 5] = value
    save_file(base, tmp_path / "base.safetensors")
    path, _ = write_adapter(tmp_path / "x", lora_alpha=8e6)
    out = tmp_path / "m.safetensors"
    assert run("fold", tmp_path / "base.safetensors", path, "-o", out) == 1
    one_line(capsys, words, repr(Q + ".weight"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "x"]


@pytest.mark.parametrize("line", ["", "fold", "fold a b", "extract a b -o c", "merge a b -o c",
                                  "extract a b -o c --rank 0", "extract a b -o c --rank x"])
def test_usage(line, capsys):
    with pytest.raises(SystemExit) as caught:
        lora.main(line.split())
    assert caught.value.code == 2
    one_line(capsys)


# --- extract --------------------------------------------------------------------------------------
def save_changed(base, changes, path):
    """A model, the base and what is added to some of its tensors: the tensors as stored."""
    model = {name: tensor + changes.get(name, torch.zeros_like(tensor))
             for name, tensor in base.items()}
    save_file(model, path)
    return model


@pytest.fixture
def expert(models, tmp_path):
    """A full-rank difference on three matrices: its file, and module -> difference as stored."""
    g, base = torch.Generator().manual_seed(5), load_file(models["a"])
    changes = {f"{m}.weight": 0.01 * torch.randn(base[f"{m}.weight"].shape, generator=g)
               for m in MODULES}
    model = save_changed(base, changes, tmp_path / "expert.safetensors")
    deltas = {m: (model[f"{m}.weight"].double() - base[f"{m}.weight"].double()).numpy()
              for m in MODULES}
    return tmp_path / "expert.safetensors", deltas


def read_result(folder):
    """(configuration, factors) of what extract wrote."""
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("rank", [1, 7, 64, 100])
def test_extract_is_the_best_product_of_its_rank(models, expert, tmp_path, rank):
    """Eckart and Young: scipy's SVD says which product, its singular values what is lost."""
    model, deltas = expert
    record = lora.extract(model, models["a"], rank, tmp_path / "x")
    config, tensors = read_result(tmp_path / "x")
    assert {name.split(".lora_")[0] for name in tensors} == {P + m for m in MODULES}
    assert config["r"] == rank and config["base_model_name_or_path"] == "a"
    assert record["matrices"] == 3 and not record["left_out"]
    cut, whole, shares = 0.0, 0.0, {}
    for module, delta in deltas.items():
        assert tensors[f"{P}{module}.lora_A.weight"].shape == (rank, delta.shape[1])
        U, S, Vt = scipy.linalg.svd(delta, full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vt[:rank]
        assert_near(product(tensors, module, 1.0), best, 1e-6)      # the factors are float32
        cut, whole = cut + (S[rank:] ** 2).sum(), whole + (S ** 2).sum()
        shares[f"{module}.weight"] = math.sqrt((S[rank:] ** 2).sum() / (S ** 2).sum())
    assert record["lost"] == pytest.approx(math.sqrt(cut / whole), rel=1e-9, abs=1e-12)
    assert record["worst"][1] == pytest.approx(max(shares.values()), rel=1e-9, abs=1e-12)


def test_other_factors_are_further(models, expert, tmp_path):
    """Brute force: no random change of the factors comes nearer."""
    model, deltas = expert
    lora.extract(model, models["a"], 3, tmp_path / "x")
    _, tensors = read_result(tmp_path / "x")
    A, B, g = tensors[QA].double().numpy(), tensors[QB].double().numpy(), np.random.default_rng(0)
    best = np.linalg.norm(deltas[Q] - B @ A)
    for _ in range(200):
        size = 10.0 ** g.uniform(-4, -1)
        near_A = A + size * A.std() * g.standard_normal(A.shape)
        near_B = B + size * B.std() * g.standard_normal(B.shape)
        assert np.linalg.norm(deltas[Q] - near_B @ near_A) > best


def test_an_adapter_comes_back(models, tmp_path):
    """fold, extract at the same rank, fold: the same model, up to float32."""
    path, tensors = write_adapter(tmp_path / "x")
    lora.fold(models["a"], path, tmp_path / "m.safetensors")
    record = lora.extract(tmp_path / "m.safetensors", models["a"], 4, tmp_path / "y")
    assert record["lost"] < 1e-5
    _, found = read_result(tmp_path / "y")
    for module in MODULES:
        assert_near(product(found, module, 1.0), product(tensors, module), 1e-6)
    again = lora.folded_tensors(models["a"], tmp_path / "y")
    for name, tensor in load_file(tmp_path / "m.safetensors").items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_rank_that_loses_much_is_a_warning(models, tmp_path, capsys):
    """Singular values 12, 4, 3, whose squares sum to 13^2: rank 1 loses 5/13, rank 2 loses 3/13."""
    base, g, expert = load_file(models["a"]), np.random.default_rng(0), tmp_path / "e.safetensors"
    U, V = (np.linalg.qr(g.standard_normal((64, 3)))[0] for _ in "UV")
    delta = torch.from_numpy((U * [12.0, 4.0, 3.0]) @ V.T).float()
    save_changed(base, {f"{Q}.weight": delta}, expert)
    for rank, said in ((1, "38 %"), (2, "23 %")):
        out = tmp_path / f"x{rank}"
        assert run("extract", expert, models["a"], "--rank", rank, "-o", out) == 0
        printed = capsys.readouterr().out
        assert f"warning: lost {said} of the difference" in printed and "all but" not in printed
        assert f"lost {said}" in (out / "README.md").read_text()
    assert run("extract", expert, models["a"], "--rank", 3, "-o", tmp_path / "x3") == 0
    assert "warning" not in capsys.readouterr().out


def test_what_an_adapter_cannot_hold_counts_as_lost(models, tmp_path, capsys):
    """A matrix moves by 4 and a norm by 3: 3/5 of the difference stand in no matrix."""
    base, expert = load_file(models["a"]), tmp_path / "e.safetensors"
    delta, norm = torch.zeros(64, 64), torch.zeros(64)
    delta[2, 3], norm[7] = 4.0, 3.0
    save_changed(base, {f"{Q}.weight": delta, "model.norm.weight": norm}, expert)
    assert run("extract", expert, models["a"], "--rank", 1, "-o", tmp_path / "x") == 0
    out = capsys.readouterr().out
    assert "warning: lost 60 %" in out
    assert "an adapter cannot hold 1 of the tensors" in out and "(model.norm.weight): 60 %" in out
    assert set(read_result(tmp_path / "x")[1]) == {QA, QB}


def test_bfloat16_models_lose_nothing_more(models, tmp_path):
    """The difference of two bfloat16 models comes back to 1e-6 at full rank; factors in bfloat16
    would miss it by 1e-3."""
    base, g = load_file(models["half"]), torch.Generator().manual_seed(0)
    change = (0.01 * torch.randn(64, 64, generator=g)).bfloat16()
    model = save_changed(base, {f"{Q}.weight": change}, tmp_path / "e.safetensors")
    record = lora.extract(tmp_path / "e.safetensors", models["half"], 64, tmp_path / "x")
    assert record["lost"] < 1e-9
    delta = model[f"{Q}.weight"].double() - base[f"{Q}.weight"].double()
    assert_near(product(read_result(tmp_path / "x")[1], Q, 1.0), delta.numpy(), 1e-6)


def test_layers_stored_the_other_way_round(tmp_path):
    """GPT-2's, (inputs, outputs): PEFT then wants fan_in_fan_out, and A with a column per input."""
    g, base, changes = torch.Generator().manual_seed(0), {}, {}
    for name, shape in (("h.0.mlp.c_fc.weight", (8, 32)), ("h.0.mlp.c_proj.weight", (32, 8))):
        base[name] = torch.randn(shape, generator=g)
        left, right = (torch.randn(size, generator=g) for size in shape)
        changes[name] = torch.outer(left, right)
    save_file(base, tmp_path / "base.safetensors")
    model = save_changed(base, changes, tmp_path / "e.safetensors")
    lora.extract(tmp_path / "e.safetensors", tmp_path / "base.safetensors", 2, tmp_path / "x")
    config, tensors = read_result(tmp_path / "x")
    assert config["fan_in_fan_out"] and tensors[P + "h.0.mlp.c_fc.lora_A.weight"].shape == (2, 8)
    folded = lora.folded_tensors(tmp_path / "base.safetensors", tmp_path / "x")
    for name, tensor in model.items():
        torch.testing.assert_close(folded[name], tensor, rtol=1e-6, atol=1e-6)


UNFIT = {       # case: (base -> tensors, words of the error)
    "the base itself": (dict, "no matrix"),
    "only a norm": (lambda base: base | {"model.norm.weight": torch.zeros(64)}, "no matrix"),
    "one tensor less": (lambda base: {n: base[n] for n in base if n != "model.norm.weight"},
                        "'model.norm.weight'"),
    "one tensor more": (lambda base: base | {"extra": torch.ones(2)}, "'extra'"),
    "another shape": (lambda base: llama_tensors(1, hidden=32), "shape"),
    "NaN": (lambda base: base | {f"{Q}.weight": torch.full((64, 64), math.nan)}, "NaN")}


@pytest.mark.parametrize("case", UNFIT)
def test_what_cannot_be_extracted(models, tmp_path, capsys, case):
    change, words = UNFIT[case]
    save_file(change(load_file(models["a"])), tmp_path / "e.safetensors")
    arguments = [tmp_path / "e.safetensors", models["a"], "--rank", 2, "-o", tmp_path / "x"]
    assert run("extract", *arguments) == 1
    one_line(capsys, words)
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]


def test_an_old_adapter_needs_force_and_a_stranger_is_kept(models, expert, tmp_path, capsys):
    arguments = ["extract", expert[0], models["a"], "--rank", 2, "-o", tmp_path / "x"]
    assert run(*arguments) == 0
    capsys.readouterr()
    assert run(*arguments) == 1
    one_line(capsys, "exists")
    assert run(*arguments, "--force") == 0
    (tmp_path / "x/precious.txt").write_text("precious")
    assert run(*arguments, "--force") == 1
    one_line(capsys, "precious.txt")
    assert (tmp_path / "x/precious.txt").read_text() == "precious"


def test_equal_inputs_equal_bytes(models, expert, tmp_path):
    """From elsewhere, too: no path and no time in any file."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lora.extract(expert[0], models["a"], 2, tmp_path / name / "x")
        lora.fold(models["a"], tmp_path / name / "x", tmp_path / name / "m.safetensors")
    files = [f"x/{p.name}" for p in (tmp_path / "one/x").iterdir()] + ["m.safetensors"]
    for file in files:
        content = (tmp_path / "one" / file).read_bytes()
        assert content == (tmp_path / "two" / file).read_bytes()
        assert str(tmp_path).encode() not in content


def test_as_a_script(models, tmp_path):
    def shell(*words):
        line = [sys.executable, ROOT / "experiments/lora.py", *map(str, words)]
        return subprocess.run(line, capture_output=True, text=True)
    path, _ = write_adapter(tmp_path / "x")
    out = tmp_path / "m.safetensors"
    done = shell("fold", models["a"], path, "-o", out)
    assert done.returncode == 0 and "wrote" in done.stdout and not done.stderr
    done = shell("extract", out, models["a"], "--rank", 4, "-o", tmp_path / "y")
    assert done.returncode == 0 and "lost" in done.stdout and not done.stderr


# --- PEFT itself ----------------------------------------------------------------------------------
def test_against_peft_where_it_is_installed(tmp_path):
    """What we fold are PEFT's weights; what we extract gives PEFT our folded model's logits."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                      num_attention_heads=4, vocab_size=40)
    lm = transformers.LlamaForCausalLM(config)
    lm.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(lm, peft.LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2}, alpha_pattern={r"layers.1.mlp.*": 7},
        init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    theirs = model.merge_and_unload().state_dict()
    for name, tensor in lora.folded_tensors(tmp_path / "base", tmp_path / "adapter").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-7)
    lora.fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "folded")
    lora.extract(tmp_path / "folded", tmp_path / "base", 4, tmp_path / "extracted")
    base, folded = (transformers.LlamaForCausalLM.from_pretrained(tmp_path / name).eval()
                    for name in ("base", "folded"))
    words = torch.arange(40)[None]
    with torch.no_grad():
        plain = base(words).logits.clone()
        ours = peft.PeftModel.from_pretrained(base, tmp_path / "extracted").eval()(words).logits
        torch.testing.assert_close(ours, folded(words).logits, rtol=1e-4, atol=1e-5)
        assert (ours - plain).abs().max() > 1e-3
