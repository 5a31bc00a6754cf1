"""experiments/tools/lora.py (refusals: test_refusals.py). Oracles: the sum by numpy in
float64, scipy's singular values, recorded names, PEFT itself where it is installed."""
import json
import math
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file

import chunking
import lora
from conftest import assert_equal, assert_near, generator, llama_tensors, save

Q = "model.layers.0.self_attn.q_proj"
MODULES = [Q, "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]
P = "base_model.model."
QA = f"{P}{Q}.lora_A.weight"
QB = f"{P}{Q}.lora_B.weight"
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none",
         "use_dora": False, "rank_pattern": {}, "init_lora_weights": True}


def write_adapter(folder, edit=None, shapes=None, **settings):
    """A folder as PEFT saves it: its path and its tensors. shapes: {module: (outputs,
    inputs)}; edit: what is done to the tensors; settings: of the configuration."""
    g = generator(1)
    tensors = {}
    if shapes is None:
        weights = llama_tensors(0)
        shapes = {module: weights[module + ".weight"].shape for module in MODULES}
    for module, (outputs, inputs) in shapes.items():
        stem = f"{P}{module}.lora_"
        tensors[stem + "A.weight"] = 0.1 * torch.randn(4, inputs, generator=g)
        tensors[stem + "B.weight"] = 0.1 * torch.randn(outputs, 4, generator=g)
    if edit:
        edit(tensors)
    save(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | settings))
    return folder, tensors


def product(tensors, module, s=2.0):
    """s B A, by numpy in float64."""
    A = tensors[f"{P}{module}.lora_A.weight"].double().numpy()
    B = tensors[f"{P}{module}.lora_B.weight"].double().numpy()
    return s * (B @ A)


def by_hand(base, tensors, scales=(2.0, 2.0, 2.0)):
    """The folded model: one rounding of the float64 sum."""
    result = dict(base)
    for module, s in zip(MODULES, scales):
        weight = base[module + ".weight"]
        total = weight.double().numpy() + product(tensors, module, s)
        result[module + ".weight"] = torch.from_numpy(total).to(weight.dtype)
    return result


def near(got, expected):
    """Of numpy arrays, relative to the largest number expected. 1e-6: float32."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * abs(expected).max())


def in_memory(base, adapter):
    return lora.folded_tensors(chunking.StateDict(base), adapter)


# --- fold -----------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16,
                                   torch.float64])
def test_fold_is_the_float64_sum_rounded_once(desk, dtype):
    """Bit for bit; other tensors stay. A folder gives a folder, with companions."""
    base = llama_tensors(1, dtype=dtype)
    base |= {"ids": torch.arange(5), "empty": torch.zeros(0, 4),
             "masked_bias": torch.tensor(-math.inf)}
    path, tensors = write_adapter(desk / "x")
    folder = desk.model(base, "base", **{"README.md": "the base's card"})
    lora.fold(folder, path, desk / "m")
    assert_equal(load_file(desk / "m/model.safetensors"), by_hand(base, tensors))
    assert (desk / "m/config.json").read_text() == '{"model_type": "x"}'
    card = (desk / "m/README.md").read_text()
    assert "lora.py" in card and str(desk.folder) not in card


@pytest.mark.parametrize("settings, scales", [
    (dict(), [2, 2, 2]), (dict(use_rslora=True), [4, 4, 4]),
    (dict(lora_alpha=3), [0.75] * 3), (dict(lora_alpha=-8), [-2] * 3),
    (dict(alpha_pattern={"proj": 16}), [2, 2, 2]),
    (dict(alpha_pattern={"down_proj": 16, "layers.1.mlp.up_proj": 1}), [2, 4, 0.25]),
    (dict(alpha_pattern={r"layers\.\d+\.mlp\..*": 12}), [2, 3, 3])])
def test_scaling_follows_the_configuration(tmp_path, settings, scales):
    """s = alpha / r, or alpha / sqrt(r); a pattern matches parts at a name's end."""
    path, tensors = write_adapter(tmp_path / "x", **settings)
    base = llama_tensors(1)
    assert_equal(in_memory(base, path), by_hand(base, tensors, scales))


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("conv1d", [True, False])
def test_each_matrix_is_turned_or_not(tmp_path, flag, conv1d):
    """GPT-2's layers are stored as (inputs, outputs), its square classifier is not; the
    flag is that of the last one. GPTBigCode's layers have the same names."""
    h = "transformer.h.0"
    shapes = {f"{h}.attn.c_attn": (24, 8), f"{h}.attn.c_proj": (8, 8),
              f"{h}.mlp.c_fc": (32, 8), "classifier": (8, 8)}
    path, tensors = write_adapter(tmp_path / "x", shapes=shapes, fan_in_fan_out=flag)
    base = {}
    expected = {}
    for module, shape in shapes.items():
        weight = torch.randn(shape, generator=generator())
        total = torch.from_numpy(weight.double().numpy() + product(tensors, module))
        if conv1d and module != "classifier":
            weight = weight.T.contiguous()
            total = total.T
        name = module.removeprefix("transformer.") + ".weight"      # as on the Hub
        base[name] = weight
        expected[name] = total.float()
    assert_equal(in_memory(base, path), expected)


TEXT = "layers.1.self_attn.q_proj"
TOWER = "encoder.layers.1.self_attn.q_proj"


# Recorded from transformers 4.51 and 5.24: names in memory and on disk, place by place.
@pytest.mark.parametrize("memory, disk, same", [
    ([f"model.language_model.{TEXT}", f"model.vision_tower.{TOWER}", "lm_head.bias",
      "model.multi_modal_projector.linear_1"],                              # LLaVA
     [f"language_model.model.{TEXT}", f"vision_tower.vision_model.{TOWER}",
      "language_model.lm_head.bias", "multi_modal_projector.linear_1"], True),
    (["bert.encoder.layer.1.self.query"], ["encoder.layer.1.self.query"], True),
    ([TOWER], [f"0.auto_model.{TOWER}"], True),             # of sentence-transformers
    ([f"_orig_mod.model.{TEXT}"], [f"model.module.{TEXT}"], True),
    (["decoder.block.1.layer.0.q"], ["encoder.block.1.layer.0.q"], False),
    ([f"model.{TEXT}"], ["model.layers.0.self_attn.q_proj"], False),
    ([f"audio_tower.{TEXT}", f"language_model.{TEXT}"], [TEXT], False)])
def test_names_in_memory_and_on_disk(memory, disk, same):
    """In both directions: an adapter may be older than its file. Of two the nearer."""
    for one, other in ((memory, disk), (disk, memory)):
        assert lora.pair_names(one, other) == (dict(zip(one, other)) if same else {})
    two = [f"tower.{TEXT}", f"module.model.{TEXT}"]
    assert lora.pair_names([TEXT], two) == {TEXT: two[1]}


HEAD = {"lm_head": (40, 64)}


@pytest.mark.parametrize("change, equal", [
    (lambda head: head, True), (lambda head: head.bfloat16(), True),
    (lambda head: 1.01 * head, False), (lambda head: torch.ones(42, 64), False)])
def test_what_peft_saves_of_the_base_itself(tmp_path, change, equal):
    """A head that is targeted comes with its base: that adds nothing."""
    head = torch.randn(40, 64)
    base = llama_tensors(1) | {"lm_head.weight": head}
    copy = {f"{P}lm_head.base_layer.weight": change(head)}
    path, tensors = write_adapter(tmp_path / "x", lambda t: t.update(copy), HEAD)
    if equal:
        got = in_memory(base, path)["lm_head.weight"].numpy()
        near(got, head.double().numpy() + product(tensors, "lm_head"))
    else:
        with pytest.raises(chunking.CheckpointError, match="not what the base holds"):
            in_memory(base, path)


def test_a_tied_head_is_refused(desk):
    """Loaders read the embedding for it: the sum would be lost."""
    path, _ = write_adapter(desk / "x", shapes=HEAD)
    tensors = llama_tensors(1)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    way = ["fold", desk / "T", path, "-o", desk / "m.safetensors"]
    desk.model(tensors)
    desk.refuse(*way, words=["lm_head", "no such tensor"], main=lora.main)
    desk.model(tensors | head)
    desk.refuse(*way, words=["lm_head", "tied to an embed"], main=lora.main)
    desk.model(tensors | head, **{"config.json": '{"tie_word_embeddings": false}'})
    assert desk.run(*way, main=lora.main)[0] == 0


# --- extract --------------------------------------------------------------------------
def names_of(left_out):
    return {name for names in left_out.values() for name in names}


def changed(base, changes, path):
    """Write the base and what is added to some of its tensors; that model."""
    model = base | {name: base[name] + change for name, change in changes.items()}
    save(path, model)
    return model


def read_result(folder):
    """(configuration, factors) of what extract wrote."""
    assert sorted(p.name for p in folder.iterdir()) == [lora.CONFIG, lora.WEIGHTS]
    config = json.loads((folder / lora.CONFIG).read_text())
    return config, load_file(folder / lora.WEIGHTS)


@pytest.mark.parametrize("rank", [1, 7, 64, 100])
def test_extract_is_the_best_product_of_its_rank(models, tmp_path, rank):
    """Eckart and Young: scipy's SVD says which, its singular values what is lost."""
    base = load_file(models["a"])
    changes = {}
    for seed, module in enumerate(MODULES):
        noise = torch.randn(base[f"{module}.weight"].shape, generator=generator(seed))
        changes[f"{module}.weight"] = 0.01 * noise
    model = changed(base, changes, tmp_path / "e")
    lost, left_out, _ = lora.extract(tmp_path / "e", models["a"], rank, tmp_path / "x")
    config, tensors = read_result(tmp_path / "x")
    assert {name.split(".lora_")[0] for name in tensors} == {P + m for m in MODULES}
    assert config["target_modules"] == sorted(MODULES) and config["r"] == rank
    assert config["base_model_name_or_path"] == "a" and not config["fan_in_fan_out"]
    assert not any(left_out.values())
    cut = whole = 0.0
    for module in MODULES:
        name = f"{module}.weight"
        delta = (model[name].double() - base[name].double()).numpy()
        U, S, Vt = scipy.linalg.svd(delta, full_matrices=False)
        near(product(tensors, module, 1.0), (U[:, :rank] * S[:rank]) @ Vt[:rank])
        cut += (S[rank:] ** 2).sum()
        whole += (S ** 2).sum()
    assert lost ** 2 == pytest.approx(cut / whole, rel=1e-9, abs=1e-24)


@pytest.mark.parametrize("norm, rank, share", [(0, 1, "38%"), (0, 2, "23%"),
                                               (0, 3, "0%"), (13, 3, "71%")])
def test_what_is_lost_is_said(models, desk, norm, rank, share):
    """Singular values 12, 4, 3, whose squares sum to 13^2: rank 1 loses 5/13, rank 2
    loses 3/13. A norm that moves by 13 as well: half of the square stands in no matrix.
    What has no factors is named."""
    base = load_file(models["a"])
    U = torch.linalg.qr(torch.randn(64, 3, generator=generator(1))).Q
    V = torch.linalg.qr(torch.randn(64, 3, generator=generator(2))).Q
    down = f"{MODULES[1]}.weight"
    model = changed(base, {f"{Q}.weight": U * torch.tensor([12.0, 4.0, 3.0]) @ V.T,
                           down: 1e-7 * base[down] * torch.randn(64, 96),
                           "model.norm.weight": norm * torch.eye(64)[7]}, desk / "e")
    model["model.embed_tokens.weight"] = torch.ones(41, 64)
    model["score.weight"] = torch.ones(2, 64)
    way = [desk.put(model, "e"), models["a"], "--rank", rank, "-o", desk / "x"]
    code, said, error = desk.run("extract", *way, main=lora.main)
    assert code == 0 and not error and f"lost {share} of" in said
    assert "rounding: model.layers.*.mlp.down_proj.weight (1)" in said
    assert "differ in size: model.embed_tokens.weight (1)" in said
    assert "only the model has it: score.weight (1)" in said
    assert ("to an embedding: model.norm.weight (1)" in said) == bool(norm)
    assert read_result(desk / "x")[1].keys() == {QA, QB}


# Names on disk of GPT-2, T5, NeoX and MoEs, with small shapes; None: no linear map.
KINDS = {"h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_proj.weight": (8, 8),
         "block.0.layer.0.q.weight": (8, 8), "embed_out.weight": (9, 8),
         "block.0.layer.0.relative_attention_bias.weight": None, "wte.weight": None,
         "h.0.mlp.gate.weight": None, "h.0.mlp.experts.down_proj": None,
         "h.0.mlp.experts.3.w1.weight": None, "h.0.ln_1.weight": None}


def test_only_linear_maps_are_extracted_each_the_right_way_round(desk, monkeypatch):
    """Judged by names, without transformers."""
    monkeypatch.setitem(sys.modules, "transformers", None)      # importing it fails
    g = generator()
    base = {}
    changes = {}
    for name, shape in KINDS.items():
        rows, columns = shape or (7, 8)
        base[name] = torch.randn(rows, columns, generator=g)
        left = torch.randn(rows, 2, generator=g)
        changes[name] = left @ torch.randn(2, columns, generator=g)
    config = '{"architectures": ["GPT2LMHeadModel"]}'
    folder = desk.model(base, "base", **{"config.json": config})
    changed(base, changes, desk / "e")
    _, left_out, known = lora.extract(desk / "e", folder, 2, desk / "x")
    config, tensors = read_result(desk / "x")
    linear = {name for name in KINDS if KINDS[name]}
    assert not known and names_of(left_out) == KINDS.keys() - linear
    assert {f"{module}.weight" for module in config["target_modules"]} == linear
    for name in linear:
        change = changes[name].double().numpy()
        if ".c_" in name:
            change = change.T
        near(product(tensors, name.removesuffix(".weight"), 1.0), change)
    assert config["fan_in_fan_out"] and config["task_type"] == "CAUSAL_LM"


SIZES = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3,
             num_attention_heads=4, image_size=8, patch_size=4, projection_dim=16)


def tiny(name):
    """A random model. GPT-2's classifier is square, of ViT's names hardly one stays."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "GPT-2":
        return hf.GPT2ForTokenClassification(hf.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=60, num_labels=32))
    if name == "LLaVA":
        return hf.LlavaForConditionalGeneration(hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**SIZES),
            text_config=hf.LlamaConfig(**SIZES, vocab_size=60), image_token_index=59))
    if name == "ViT":
        return hf.ViTForImageClassification(hf.ViTConfig(**SIZES))
    return hf.T5ForConditionalGeneration(hf.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=60))


def linear_maps(model):
    """Names of what LoRA can stand beside: all but heads tied to an embedding."""
    tied = getattr(model.config, "tie_word_embeddings", False)
    return [name for name, module in model.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D")
            and not (tied and name == "lm_head")]


def saved(model, folder):
    """What is in the file of a model, saved in a folder, with GPT-2's Hub names."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors = {name.removeprefix("transformer."): w for name, w in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    return tensors


@pytest.mark.parametrize("name", ["GPT-2", "LLaVA", "ViT", "T5"])
def test_peft_merges_to_the_same_numbers(tmp_path, name):
    """What PEFT trained, folded by us; what we extract, loaded and merged by PEFT: all
    but what is no linear map, which is named and stays the base's."""
    peft = pytest.importorskip("peft")
    model = tiny(name)
    modules = linear_maps(model)
    base = saved(model, tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=modules,
        rank_pattern={"q_proj|c_fc": 2}, alpha_pattern={r"1\.mlp.*": 7},
        init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    theirs = saved(adapted.merge_and_unload(), tmp_path / "merged")
    lora.fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    # PEFT's is a float32 product, rounded twice.
    assert_near(load_file(tmp_path / "ours/model.safetensors"), theirs, rtol=3e-6)

    expert = type(model).from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for weight in expert.parameters():
            weight += 0.02 * torch.randn_like(weight)
    expected = saved(expert, tmp_path / "expert")
    way = [tmp_path / "expert", tmp_path / "base", 48, tmp_path / "x"]
    _, left_out, known = lora.extract(*way)
    config, _ = read_result(tmp_path / "x")
    assert known and set(config["target_modules"]) == set(modules)
    fresh = type(model).from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(fresh, tmp_path / "x")
    for name in names_of(left_out):
        expected[name] = base[name]
    again = saved(adapted.merge_and_unload(), tmp_path / "again")
    assert_near(again, expected, rtol=3e-6)
