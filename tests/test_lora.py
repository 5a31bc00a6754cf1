"""experiments/tools/lora.py. Oracles: the sum by numpy in float64, scipy's singular
values, names as transformers 4 and 5 have them on disk and in memory, PEFT itself where
it is installed."""
import json
import math
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, llama_tensors

sys.path.insert(0, str(ROOT / "experiments" / "tools"))
import chunking
import lora

Q = "model.layers.0.self_attn.q_proj"
MODULES = [Q, "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]
P = "base_model.model."
QA, QB = f"{P}{Q}.lora_A.weight", f"{P}{Q}.lora_B.weight"
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none",
         "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
         "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
         "target_modules": ["q_proj"], "init_lora_weights": True}


def run(*arguments):
    """The command, as the shell would see it: its exit code."""
    return chunking.command(lambda: lora.main([str(a) for a in arguments]))


def write_adapter(folder, edit=None, dtype=torch.float32, shapes=None, **settings):
    """A folder as PEFT saves it, for the models a and b of conftest: its path and its
    tensors.  shapes: {module: (outputs, inputs)}; edit: what is done to the tensors;
    settings: of the configuration."""
    g, tensors = torch.Generator().manual_seed(1), {}
    if shapes is None:
        weights = llama_tensors(0)
        shapes = {module: weights[module + ".weight"].shape for module in MODULES}
    for module, (out, width) in shapes.items():
        A, B = torch.randn(4, width, generator=g), torch.randn(out, 4, generator=g)
        tensors[f"{P}{module}.lora_A.weight"] = (0.1 * A).to(dtype)
        tensors[f"{P}{module}.lora_B.weight"] = (0.1 * B).to(dtype)
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


def by_hand(base, tensors, scales=(2.0, 2.0, 2.0)):
    """The folded model: one rounding of the float64 sum."""
    result = dict(base)
    for module, s in zip(MODULES, scales):
        weight = base[module + ".weight"]
        total = weight.double().numpy() + product(tensors, module, s)
        result[module + ".weight"] = torch.from_numpy(total).to(weight.dtype)
    return result


def assert_equal(got, expected):
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def assert_near(got, expected, relative=1e-6):
    """Of numpy arrays, relative to the largest number expected. 1e-6: float32."""
    largest = abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=relative * largest)


def one_line(capsys, *words):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "; fix: " in error
    assert all(str(word) in error for word in words), (error, words)
    assert len(error) < 700


# --- fold -----------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16,
                                   torch.float64])
@pytest.mark.parametrize("piece", [chunking.PIECE, 100])
def test_fold_is_the_float64_sum_rounded_once(tmp_path, monkeypatch, dtype, piece):
    """Bit for bit, whatever the pieces; all other tensors stay as they are, -inf too"""
    monkeypatch.setattr(lora, "PIECE", piece)
    base = llama_tensors(1, dtype=dtype)
    base |= {"ids": torch.arange(5), "empty": torch.zeros(0, 4),
             "masked_bias": torch.tensor(-math.inf)}
    save_file(base, tmp_path / "base.safetensors")
    half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    path, tensors = write_adapter(tmp_path / "x", dtype=half)
    out = tmp_path / "m.safetensors"
    assert run("fold", tmp_path / "base.safetensors", path, "-o", out) == 0
    assert_equal(load_file(out), by_hand(base, tensors))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "base.safetensors", "m.safetensors", "x"]


@pytest.mark.parametrize("settings, scales", [
    (dict(), [2, 2, 2]), (dict(use_rslora=True), [4, 4, 4]),
    (dict(lora_alpha=3), [0.75] * 3), (dict(lora_alpha=-8), [-2] * 3),
    (dict(alpha_pattern={"proj": 16}), [2, 2, 2]),
    (dict(alpha_pattern={"down_proj": 16, "layers.1.mlp.up_proj": 1}), [2, 4, 0.25]),
    (dict(alpha_pattern={r"layers\.\d+\.mlp\..*": 12}), [2, 3, 3]),
    (dict(rank_pattern={"q_proj": 2}), [4, 2, 2])])
def test_scaling_follows_the_configuration(models, tmp_path, settings, scales):
    """s = alpha / r, alpha / sqrt(r) for rslora; a pattern matches whole parts at a
    name's end."""
    def cut(tensors):
        if "rank_pattern" in settings:
            tensors[QA] = tensors[QA][:2].clone()
            tensors[QB] = tensors[QB][:, :2].clone()
    path, tensors = write_adapter(tmp_path / "x", cut, **settings)
    expected = by_hand(load_file(models["a"]), tensors, scales)
    assert_equal(lora.folded_tensors(models["a"], path), expected)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("conv1d", [True, False])
@pytest.mark.parametrize("piece", [chunking.PIECE, 20])
def test_each_matrix_is_turned_or_not(tmp_path, monkeypatch, flag, conv1d, piece):
    """GPT-2's layers are stored as (inputs, outputs), its classifier is not, and both
    are square here; PEFT stores one flag, of whichever came last. GPTBigCode has the
    same names and stores nothing that way."""
    monkeypatch.setattr(lora, "PIECE", piece)
    h = "transformer.h.0"
    shapes = {f"{h}.attn.c_attn": (24, 8), f"{h}.attn.c_proj": (8, 8),
              f"{h}.mlp.c_fc": (32, 8), "classifier": (8, 8)}
    path, tensors = write_adapter(tmp_path / "x", shapes=shapes, fan_in_fan_out=flag)
    base, expected, g = {}, {}, torch.Generator().manual_seed(0)
    for module, shape in shapes.items():
        weight = torch.randn(shape, generator=g)
        total = weight.double().numpy() + product(tensors, module)
        total = torch.from_numpy(total).float()
        if conv1d and module != "classifier":
            weight, total = weight.T.contiguous(), total.T
        name = module.removeprefix("transformer.") + ".weight"      # as on the Hub
        base[name], expected[name] = weight, total
    assert_equal(lora.folded_tensors(chunking.StateDict(base), path), expected)


TEXT, VISION = "layers.1.self_attn.q_proj", "encoder.layers.1.self_attn.q_proj"
# Recorded from transformers 4.51 and 5.24: names in memory and on disk, place by place.
LLAVA_5 = [f"model.language_model.{TEXT}", f"model.vision_tower.{VISION}", "lm_head",
           "model.multi_modal_projector.linear_1"]
LLAVA_4 = [f"language_model.model.{TEXT}", f"vision_tower.vision_model.{VISION}",
           "language_model.lm_head", "multi_modal_projector.linear_1"]
QWEN2VL_5 = [f"model.language_model.{TEXT}", "model.visual.blocks.1.attn.qkv",
             "model.visual.merger.mlp.0"]
QWEN2VL_4 = [f"model.{TEXT}", "visual.blocks.1.attn.qkv", "visual.merger.mlp.0"]
SAME = {"LLaVA": (LLAVA_5, LLAVA_4), "Qwen2-VL": (QWEN2VL_5, QWEN2VL_4),
        "T5": (["encoder.block.1.layer.0.SelfAttention.q",
                "decoder.block.1.layer.0.SelfAttention.q"],) * 2,
        "BERT": (["bert.encoder.layer.1.attention.self.query"],
                 ["encoder.layer.1.attention.self.query"]),
        "a sentence model": (["encoder.layer.1.attention.self.query"],
                             ["0.auto_model.encoder.layer.1.attention.self.query"]),
        "wrappers": (["_orig_mod.model.layers.1.module.mlp.fc1"],
                     ["model.layers.1.mlp.fc1"])}
OTHER = {"a decoder's": (["decoder.block.1.layer.0.SelfAttention.q"],
                         ["encoder.block.1.layer.0.SelfAttention.q"], "no such"),
         "another layer's": ([f"model.{TEXT}"], ["model.layers.0.self_attn.q_proj"],
                             "no such"),
         "another model's": (["roberta.encoder.layer.1.output.dense"],
                             ["bert.encoder.layer.1.output.dense"], "no such"),
         "another part's": (["model.layers.1.q_proj"], ["model.layers.1.attn.q_proj"],
                            "no such"),
         "audio or text": ([f"model.{TEXT}"], [f"model.audio_tower.{TEXT}",
                                               f"model.language_model.{TEXT}"], "that"),
         "two for one": ([f"transformer.{TEXT}", f"model.{TEXT}"], [TEXT], TEXT)}


@pytest.mark.parametrize("case", SAME)
def test_names_in_memory_meet_names_on_disk(tmp_path, case):
    """In both directions: an adapter may be older or newer than its base's file."""
    for turn, (memory, disk) in enumerate((SAME[case], SAME[case][::-1])):
        shapes = dict.fromkeys(memory, (6, 6))
        path, tensors = write_adapter(tmp_path / f"x{turn}", shapes=shapes)
        base = {f"{name}.weight": torch.randn(6, 6) for name in disk}
        expected = {}
        for module, (name, weight) in zip(memory, base.items()):
            total = weight.double().numpy() + product(tensors, module)
            expected[name] = torch.from_numpy(total).float()
        assert_equal(lora.folded_tensors(chunking.StateDict(base), path), expected)


@pytest.mark.parametrize("case", OTHER)
def test_names_that_do_not_meet(tmp_path, capsys, case):
    memory, disk, words = OTHER[case]
    path, _ = write_adapter(tmp_path / "x", shapes=dict.fromkeys(memory, (6, 6)))
    base = tmp_path / "base.safetensors"
    save_file({f"{name}.weight": torch.ones(6, 6) for name in disk}, base)
    assert run("fold", base, path, "-o", tmp_path / "m.safetensors") == 1
    one_line(capsys, words, memory[-1])


def test_of_two_names_the_shape_decides(tmp_path):
    path, tensors = write_adapter(tmp_path / "x", shapes={f"model.{TEXT}": (6, 6)})
    names = [f"model.audio_tower.{TEXT}.weight", f"model.language_model.{TEXT}.weight"]
    base = {names[0]: torch.ones(5, 5), names[1]: torch.ones(6, 6)}
    got = lora.folded_tensors(chunking.StateDict(base), path)
    assert torch.equal(got[names[0]], base[names[0]])
    assert_near(got[names[1]].numpy(), 1 + product(tensors, f"model.{TEXT}"))


HEAD = {"lm_head": (40, 64)}
COPY = f"{P}lm_head.base_layer.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_peft_saves_of_the_base_itself(tmp_path, capsys, dtype):
    """A head that is targeted comes with its base. That adds nothing; if it is another
    one, the adapter is of another base; with more rows, the vocabulary has grown."""
    base = llama_tensors(1) | {"lm_head.weight": torch.randn(40, 64)}
    save_file(base, tmp_path / "base.safetensors")
    copies = {COPY: base["lm_head.weight"].to(dtype),
              P + "model.embed_tokens.weight": base["model.embed_tokens.weight"]}
    path, tensors = write_adapter(tmp_path / "x", lambda t: t.update(copies),
                                  shapes=HEAD)
    got = lora.folded_tensors(tmp_path / "base.safetensors", path)
    expected = base["lm_head.weight"].double().numpy() + product(tensors, "lm_head")
    assert_near(got["lm_head.weight"].numpy(), expected)
    for i, (copy, words) in enumerate([(copies[COPY] * 1.01, "not what the base holds"),
                                       (torch.ones(42, 64), "vocabulary was resized")]):
        path, _ = write_adapter(tmp_path / f"y{i}", lambda t: t.update({COPY: copy}),
                                shapes=HEAD)
        out = tmp_path / "m.safetensors"
        assert run("fold", tmp_path / "base.safetensors", path, "-o", out) == 1
        one_line(capsys, words, COPY)


def test_a_tied_head_is_refused(base_folder, tmp_path, capsys):
    """Loaders read the embedding for it: the sum would be lost. Not if it is said to be
    no tied one."""
    path, _ = write_adapter(tmp_path / "x", shapes=HEAD)
    assert run("fold", base_folder, path, "-o", tmp_path / "m") == 1
    one_line(capsys, "lm_head", "no such tensor", "tied")
    base = load_file(base_folder / "model.safetensors")
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    save_file(base, base_folder / "model.safetensors")
    assert run("fold", base_folder, path, "-o", tmp_path / "m") == 1
    one_line(capsys, "lm_head", "tied to model.embed_tokens.weight")
    (base_folder / "config.json").write_text('{"tie_word_embeddings": false}')
    assert run("fold", base_folder, path, "-o", tmp_path / "m") == 0


def test_in_memory_as_in_a_file_and_wider_where_asked(models, tmp_path):
    """A base in memory sets the precision: what an adapter adds is not rounded away."""
    path, tensors = write_adapter(tmp_path / "x")
    lora.fold(models["half"], path, tmp_path / "m.safetensors")
    assert_equal(lora.folded_tensors(models["half"], path),
                 load_file(tmp_path / "m.safetensors"))
    wide = {name: tensor.float() for name, tensor in load_file(models["half"]).items()}
    got = lora.folded_tensors(chunking.StateDict(wide), path)
    assert_equal(got, by_hand(wide, tensors))


@pytest.fixture
def base_folder(models, tmp_path):
    """Model a as a folder in the Hugging Face layout, named `base`."""
    (folder := tmp_path / "base").mkdir()
    save_file(load_file(models["a"]), folder / "model.safetensors")
    (folder / "config.json").write_text('{"num_hidden_layers": 2}\n')
    return folder


def test_a_folder_gives_a_folder(base_folder, tmp_path, capsys):
    """Companions byte for byte, and a card of its own."""
    (base_folder / "tokenizer.json").write_bytes(bytes(range(256)))
    (base_folder / "README.md").write_text("the base's own card")
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
    assert 'base_model: "base"' in card and "lora.py fold" in card
    assert str(tmp_path) not in card
    assert run("fold", base_folder, path, "-o", tmp_path / "m.safetensors") == 0
    assert_equal(load_file(tmp_path / "m.safetensors"), expected)


def test_what_fold_notes(models, tmp_path, capsys):
    """Layers without factors; the base that the adapter names; what rounding takes:
    bfloat16 keeps 8 bits of a weight, and so fewer of the small number added to it."""
    path, tensors = write_adapter(tmp_path / "x", base_model_name_or_path="org/b")
    record = lora.fold(models["half"], path, tmp_path / "m.safetensors")
    base, got = load_file(models["half"]), load_file(tmp_path / "m.safetensors")
    error = whole = 0.0
    for module in MODULES:
        added = product(tensors, module)
        seen = got[module + ".weight"].double() - base[module + ".weight"].double()
        error += ((seen.numpy() - added) ** 2).sum()
        whole += (added ** 2).sum()
    assert record["rounding"] == pytest.approx(math.sqrt(error / whole), rel=1e-6)
    weak, _ = write_adapter(tmp_path / "weak", lora_alpha=0.8)
    for model, adapter, words, absent in [
            ("a", path, "trained on 'b'", "rounding"),
            ("b", path, "mlp.gate_proj.weight (2)", "trained on"),
            ("half", weak, "rounding", "trained on")]:
        out = tmp_path / "n.safetensors"
        assert run("fold", models[model], adapter, "-o", out, "--force") == 0
        said = capsys.readouterr().out
        assert words in said and absent not in said
        assert "nothing for 11 matrices" in said and "to 3 matrices" in said


@pytest.mark.parametrize("value, dtype, words", [
    (math.nan, torch.float32, "NaN"),
    (6e4, torch.float16, "does not fit torch.float16")])
def test_a_value_that_does_not_belong_there(tmp_path, capsys, value, dtype, words):
    """NaN in the base; a sum beyond float16's 65504."""
    base = llama_tensors(1, dtype=dtype)
    base[Q + ".weight"][3, 5] = value
    save_file(base, tmp_path / "base.safetensors")
    path, _ = write_adapter(tmp_path / "x", lora_alpha=8e6)
    out = tmp_path / "m.safetensors"
    assert run("fold", tmp_path / "base.safetensors", path, "-o", out) == 1
    one_line(capsys, words, repr(Q + ".weight"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "x"]


# --- extract --------------------------------------------------------------------------
def save_changed(base, changes, path):
    """A model, the base and what is added to some of its tensors: the tensors."""
    model = dict(base)
    for name, change in changes.items():
        model[name] = base[name] + change
    save_file(model, path)
    return model


@pytest.fixture
def expert(models, tmp_path):
    """A full-rank difference on three matrices: its file, {module: difference}."""
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
    """Eckart and Young: scipy's SVD says which, its singular values what is lost."""
    model, deltas = expert
    record = lora.extract(model, models["a"], rank, tmp_path / "x")
    config, tensors = read_result(tmp_path / "x")
    assert {name.split(".lora_")[0] for name in tensors} == {P + m for m in MODULES}
    assert config["target_modules"] == sorted(MODULES) and config["r"] == rank
    assert config["base_model_name_or_path"] == "a" and not config["fan_in_fan_out"]
    assert record["matrices"] == 3 and not record["left_out"]
    cut, whole = {}, 0.0
    for module, delta in deltas.items():
        assert tensors[f"{P}{module}.lora_A.weight"].shape == (rank, delta.shape[1])
        U, S, Vt = scipy.linalg.svd(delta, full_matrices=False)
        assert_near(product(tensors, module, 1.0), (U[:, :rank] * S[:rank]) @ Vt[:rank])
        cut[module] = (S[rank:] ** 2).sum()
        whole += (S ** 2).sum()
    worst = max(cut, key=cut.get)
    name, share, own = record["worst"]
    found = [record["lost"] ** 2, share ** 2, own ** 2]
    expected = [sum(cut.values()) / whole, cut[worst] / whole,
                cut[worst] / np.linalg.norm(deltas[worst]) ** 2]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-24)
    assert not share or name == f"{worst}.weight"


def test_a_rank_that_loses_much_is_a_warning(models, tmp_path, capsys):
    """Singular values 12, 4, 3, whose squares sum to 13^2: rank 1 loses 5/13, rank 2
    loses 3/13."""
    base, path = load_file(models["a"]), tmp_path / "e.safetensors"
    g = np.random.default_rng(0)
    U, V = (np.linalg.qr(g.standard_normal((64, 3)))[0] for _ in "UV")
    delta = torch.from_numpy((U * [12.0, 4.0, 3.0]) @ V.T).float()
    save_changed(base, {f"{Q}.weight": delta}, path)
    for rank, said in ((1, "38 %"), (2, "23 %"), (3, None)):
        out = tmp_path / f"x{rank}"
        assert run("extract", path, models["a"], "--rank", rank, "-o", out) == 0
        printed = capsys.readouterr()
        assert "wrote" in printed.out and bool(printed.err) == bool(said)
        if said:
            assert printed.err.startswith(f"warning: lost {said} of the difference")
            assert f"lost {said}" in (out / "README.md").read_text()


def test_what_an_adapter_cannot_hold_counts_as_lost(models, tmp_path, capsys):
    """A matrix moves by 4 and a norm by 3: 3/5 of the difference stand in no matrix."""
    base, expert = load_file(models["a"]), tmp_path / "e.safetensors"
    delta, norm = torch.zeros(64, 64), torch.zeros(64)
    delta[2, 3], norm[7] = 4.0, 3.0
    save_changed(base, {f"{Q}.weight": delta, "model.norm.weight": norm}, expert)
    assert run("extract", expert, models["a"], "--rank", 1, "-o", tmp_path / "x") == 0
    out, error = capsys.readouterr()
    assert "warning: lost 60 %" in error
    assert "cannot hold 1 of the tensors that differ (model.norm.weight (1)): 60" in out
    assert set(read_result(tmp_path / "x")[1]) == {QA, QB}


def test_rounding_is_no_difference(models, tmp_path, capsys):
    """An exact merge moves other matrices by a step of float32 here and there: noise of
    full rank, that no factors should follow."""
    base, expert = load_file(models["a"]), tmp_path / "e.safetensors"
    delta = torch.zeros(64, 64)
    delta[2, 3] = 4.0
    noise = 1e-7 * base[f"{MODULES[1]}.weight"] * torch.randn(64, 96)
    save_changed(base, {f"{Q}.weight": delta, f"{MODULES[1]}.weight": noise}, expert)
    assert run("extract", expert, models["a"], "--rank", 1, "-o", tmp_path / "x") == 0
    out, error = capsys.readouterr()
    assert "rounding: model.layers.*.mlp.down_proj.weight (1)" in out
    assert not error and set(read_result(tmp_path / "x")[1]) == {QA, QB}


# Names on disk of GPT-2 (from the Hub), T5, NeoX and MoEs, with small shapes; None: no
# linear map.
H, T5, MOE = "h.0", "encoder.block.0.layer.0.SelfAttention", "model.layers.0.mlp"
KINDS = {f"{H}.attn.c_attn.weight": (8, 24), f"{H}.attn.c_proj.weight": (8, 8),
         f"{H}.mlp.c_fc.weight": (8, 32), f"{H}.mlp.c_proj.weight": (32, 8),
         f"{T5}.q.weight": (8, 8), "model.layers.0.self_attn.o_proj.weight": (8, 8),
         "score.weight": (8, 8), "embed_out.weight": (9, 8), "wte.weight": None,
         "wpe.weight": None, "shared.weight": None, "model.embed_tokens.weight": None,
         f"{T5}.relative_attention_bias.weight": None, f"{H}.ln_1.weight": None,
         f"{MOE}.router.weight": None, f"{MOE}.gate.weight": None,
         f"{MOE}.experts.down_proj": None, f"{MOE}.experts.3.w1.weight": None}


@pytest.fixture
def no_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)      # importing it fails


def test_only_linear_maps_are_extracted_each_the_right_way_round(
        tmp_path, no_transformers):
    """From a base with the Hub's names, as save_pretrained names the model."""
    g, base, changes = torch.Generator().manual_seed(0), {}, {}
    for name, shape in KINDS.items():
        base[name] = torch.randn(shape or (7, 8), generator=g)
        rows, columns = base[name].shape
        left = torch.randn(rows, 2, generator=g)
        changes[name] = left @ torch.randn(2, columns, generator=g)
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base/model.safetensors")
    (tmp_path / "base/config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    path = tmp_path / "e.safetensors"
    model = save_changed(base, changes, path)
    save_file({f"transformer.{name}" if name[0] in "hw" else name: tensor
               for name, tensor in model.items()}, path)
    record = lora.extract(path, tmp_path / "base", 2, tmp_path / "x")
    config, tensors = read_result(tmp_path / "x")
    assert set(record["left_out"]) == {name for name in KINDS if not KINDS[name]}
    for name, shape in KINDS.items():
        module = name.removesuffix(".weight")
        assert (module in config["target_modules"]) == bool(shape), name
        if shape:
            change = changes[name].double().numpy()
            turned = ".c_" in name
            assert_near(product(tensors, module, 1.0), change.T if turned else change)
    assert config["fan_in_fan_out"] and config["task_type"] == "CAUSAL_LM"
    assert "cannot be known" in record["notes"][-1]
    name = f"{H}.attn.c_proj.weight"
    folded = lora.folded_tensors(tmp_path / "base", tmp_path / "x")
    assert_near(folded[name].numpy(), model[name].numpy())


def test_heads_and_vocabularies(models, tmp_path, capsys):
    """More tokens; a head that one file has, or that repeats the embedding; a further
    layer; a buffer: said, and left out. What is equal in both need not be finite."""
    base, delta = load_file(models["a"]), 0.1 * torch.ones(64, 64)
    base["masked_bias"] = torch.tensor(-math.inf)
    embedding = base["model.embed_tokens.weight"]
    grown = torch.cat([embedding, torch.ones(2, 64)])
    head = {"lm_head.weight": embedding.clone()}
    for i, (more_base, more_model, words) in enumerate([
            ({}, {"model.embed_tokens.weight": grown}, "vocabularies differ"),
            ({}, {"lm_head.weight": embedding + 1}, "only model has it: lm_head"),
            (head, {}, "only base has it: lm_head.weight"),
            (head, {"lm_head.weight": embedding + 1}, "tied to model.embed_tokens"),
            ({"model.layers.2.mlp.up_proj.weight": torch.ones(3, 3)}, {}, "only base"),
            ({}, {"model.layers.0.attn.mask": torch.ones(3)}, "only model has it: m")]):
        save_file(base | more_base, tmp_path / "base.safetensors")
        model = base | {f"{Q}.weight": base[f"{Q}.weight"] + delta} | more_model
        save_file(model, tmp_path / "model.safetensors")
        files = [tmp_path / "model.safetensors", tmp_path / "base.safetensors"]
        assert run("extract", *files, "--rank", 1, "-o", tmp_path / f"x{i}") == 0
        assert words in capsys.readouterr().out
        assert set(read_result(tmp_path / f"x{i}")[1]) == {QA, QB}


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


# --- PEFT itself ----------------------------------------------------------------------
TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, vocab_size=60)
VISION_TINY = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3,
                   num_attention_heads=4, image_size=8, patch_size=4, projection_dim=16)
GPT2_TINY = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=40,
                 num_labels=32, pad_token_id=0)


def tiny(name):
    """A random model of transformers. GPT-2's classifier is square, as its c_proj is;
    LLaVA's names differ between file and memory; of ViT's hardly one is the same."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "GPT-2":
        return hf.GPT2ForTokenClassification(hf.GPT2Config(**GPT2_TINY))
    if name == "Llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, tie_word_embeddings=False))
    if name == "LLaVA":
        return hf.LlavaForConditionalGeneration(hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION_TINY),
            text_config=hf.LlamaConfig(**TINY), image_token_index=59))
    if name == "Qwen2-VL":
        rope = dict(type="mrope", mrope_section=[1, 1, 2])
        tower = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, patch_size=4)
        return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(
            text_config=dict(**TINY, rope_scaling=rope, bos_token_id=1, eos_token_id=2),
            vision_config=tower))
    if name == "ViT":
        return hf.ViTForImageClassification(hf.ViTConfig(**VISION_TINY))
    if name == "T5":
        return hf.T5ForConditionalGeneration(hf.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=60))
    return hf.GptOssForCausalLM(hf.GptOssConfig(
        **TINY, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2))


def linear_maps(model):
    """Names of what LoRA can stand beside: all but heads tied to an embedding."""
    embeddings = {id(module.weight) for module in model.modules()
                  if isinstance(module, torch.nn.Embedding)}
    return [name for name, module in model.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D")
            and id(module.weight) not in embeddings]


def saved(model, folder):
    """What is in the file of a model, saved in a folder."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "LLaVA", "Qwen2-VL", "ViT"])
def test_what_we_fold_is_what_peft_merges(tmp_path, name):
    peft, model = pytest.importorskip("peft"), tiny(name)
    saved(model, tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=linear_maps(model),
        rank_pattern={"q_proj|c_fc": 2}, alpha_pattern={r"1\.mlp.*": 7},
        init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    theirs = saved(adapted.merge_and_unload(), tmp_path / "merged")
    lora.fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    ours = load_file(tmp_path / "ours/model.safetensors")
    assert set(ours) == set(theirs)
    for tensor in theirs:       # theirs is a float32 product, rounded twice
        torch.testing.assert_close(ours[tensor], theirs[tensor], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["GPT-2", "LLaVA", "ViT", "T5", "gpt-oss"])
def test_what_we_extract_peft_loads_as_the_model(tmp_path, name):
    """All but what is no linear map, which is named and stays the base's. GPT-2's base
    has the names of the Hub."""
    peft, model = pytest.importorskip("peft"), tiny(name)
    base = saved(model, tmp_path / "base")
    hub = {tensor.removeprefix("transformer."): base[tensor] for tensor in base}
    save_file(hub, tmp_path / "base/model.safetensors", {"format": "pt"})
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    expected = saved(model, tmp_path / "model")
    record = lora.extract(tmp_path / "model", tmp_path / "base", 48, tmp_path / "x")
    assert record["matrices"] == len(linear_maps(model))
    fresh = type(model).from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(fresh, tmp_path / "x")
    got = saved(adapted.merge_and_unload(), tmp_path / "merged")
    left_out = {"transformer." + t for t in record["left_out"]} | {*record["left_out"]}
    for tensor in expected:
        wanted = base if tensor in left_out else expected
        torch.testing.assert_close(got[tensor], wanted[tensor], rtol=1e-5, atol=1e-6)
