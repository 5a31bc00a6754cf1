"""experiments/tools/lora.py. Oracles: the sum by numpy in float64, scipy's singular
values, names as transformers 4 and 5 have them on disk and in memory, PEFT itself where
it is installed. (What is refused: test_refusals.py.)"""
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
from conftest import assert_equal, generator, llama_tensors, save

Q = "model.layers.0.self_attn.q_proj"
MODULES = [Q, "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]
P = "base_model.model."
QA = f"{P}{Q}.lora_A.weight"
QB = f"{P}{Q}.lora_B.weight"
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none",
         "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
         "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
         "target_modules": ["q_proj"], "init_lora_weights": True}


def write_adapter(folder, edit=None, dtype=torch.float32, shapes=None, **settings):
    """A folder as PEFT saves it, for the models a and b of conftest: its path and its
    tensors.  shapes: {module: (outputs, inputs)}; edit: what is done to the tensors;
    settings: of the configuration."""
    g = generator(1)
    tensors = {}
    if shapes is None:
        weights = llama_tensors(0)
        shapes = {module: weights[module + ".weight"].shape for module in MODULES}
    for module, (outputs, inputs) in shapes.items():
        A = 0.1 * torch.randn(4, inputs, generator=g)
        B = 0.1 * torch.randn(outputs, 4, generator=g)
        tensors[f"{P}{module}.lora_A.weight"] = A.to(dtype)
        tensors[f"{P}{module}.lora_B.weight"] = B.to(dtype)
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


def near(got, expected, relative=1e-6):
    """Of numpy arrays, relative to the largest number expected. 1e-6: float32."""
    largest = abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=relative * largest)


def in_memory(base, adapter):
    return lora.folded_tensors(chunking.StateDict(base), adapter)


# --- fold -----------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16,
                                   torch.float64])
@pytest.mark.parametrize("piece", [chunking.PIECE, 100])
def test_fold_is_the_float64_sum_rounded_once(tmp_path, monkeypatch, dtype, piece):
    """Bit for bit, whatever the pieces; other tensors stay. In memory likewise."""
    monkeypatch.setattr(lora, "PIECE", piece)
    base = llama_tensors(1, dtype=dtype)
    base |= {"ids": torch.arange(5), "empty": torch.zeros(0, 4),
             "masked_bias": torch.tensor(-math.inf)}
    path, tensors = write_adapter(tmp_path / "x")
    out = tmp_path / "m.safetensors"
    lora.fold(save(tmp_path / "base.safetensors", base), path, out)
    assert_equal(load_file(out), by_hand(base, tensors))
    del base["empty"]
    assert_equal(in_memory(base, path), by_hand(base, tensors))
    assert {p.name for p in tmp_path.iterdir()} == {"base.safetensors", out.name, "x"}


@pytest.mark.parametrize("settings, scales", [
    (dict(), [2, 2, 2]), (dict(use_rslora=True), [4, 4, 4]),
    (dict(lora_alpha=3), [0.75] * 3), (dict(lora_alpha=-8), [-2] * 3),
    (dict(alpha_pattern={"proj": 16}), [2, 2, 2]),
    (dict(alpha_pattern={"down_proj": 16, "layers.1.mlp.up_proj": 1}), [2, 4, 0.25]),
    (dict(alpha_pattern={r"layers\.\d+\.mlp\..*": 12}), [2, 3, 3]),
    (dict(rank_pattern={"q_proj": 2}), [4, 2, 2])])
def test_scaling_follows_the_configuration(tmp_path, settings, scales):
    """s = alpha / r, or alpha / sqrt(r); a pattern matches parts at a name's end."""
    def cut(tensors):
        if "rank_pattern" in settings:
            tensors[QA] = tensors[QA][:2].clone()
            tensors[QB] = tensors[QB][:, :2].clone()
    path, tensors = write_adapter(tmp_path / "x", cut, **settings)
    base = llama_tensors(1)
    assert_equal(in_memory(base, path), by_hand(base, tensors, scales))


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("conv1d", [True, False])
def test_each_matrix_is_turned_or_not(tmp_path, monkeypatch, flag, conv1d):
    """GPT-2's layers are stored as (inputs, outputs), its classifier is not, and both
    are square here; PEFT stores one flag, of whichever came last. GPTBigCode has the
    same names and stores nothing that way. In pieces of 20 weights."""
    monkeypatch.setattr(lora, "PIECE", 20)
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
VISION = "encoder.layers.1.self_attn.q_proj"
# Recorded from transformers 4.51 and 5.24: names in memory and on disk, place by place.
SAME = {
    "LLaVA": (
        [f"model.language_model.{TEXT}", f"model.vision_tower.{VISION}", "lm_head",
         "model.multi_modal_projector.linear_1"],
        [f"language_model.model.{TEXT}", f"vision_tower.vision_model.{VISION}",
         "language_model.lm_head", "multi_modal_projector.linear_1"]),
    "BERT": (["bert.encoder.layer.1.attention.self.query"],
             ["encoder.layer.1.attention.self.query"]),
    "a sentence model": (["encoder.layer.1.attention.self.query"],
                         ["0.auto_model.encoder.layer.1.attention.self.query"]),
    "wrappers": (["_orig_mod.model.layers.1.module.mlp.fc1"],
                 ["model.layers.1.mlp.fc1"]),
}
OTHER = {       # and words of the line that refuses them
    "a decoder's": (["decoder.block.1.layer.0.SelfAttention.q"],
                    ["encoder.block.1.layer.0.SelfAttention.q"], "no such"),
    "another layer's": ([f"model.{TEXT}"], ["model.layers.0.self_attn.q_proj"],
                        "no such"),
    "audio or text": ([f"model.{TEXT}"], [f"model.audio_tower.{TEXT}",
                                          f"model.language_model.{TEXT}"], "that"),
    "two for one": ([f"transformer.{TEXT}", f"model.{TEXT}"], [TEXT], TEXT),
}


@pytest.mark.parametrize("case", SAME)
@pytest.mark.parametrize("turn", [1, -1])
def test_names_in_memory_meet_names_on_disk(tmp_path, case, turn):
    """In both directions: an adapter may be older or newer than its base's file."""
    memory, disk = SAME[case][::turn]
    path, tensors = write_adapter(tmp_path / "x", shapes=dict.fromkeys(memory, (6, 6)))
    base = {f"{name}.weight": torch.zeros(6, 6) for name in disk}
    got = in_memory(base, path)
    for module, name in zip(memory, disk):
        near(got[f"{name}.weight"].numpy(), product(tensors, module))


@pytest.mark.parametrize("case", OTHER)
def test_names_that_do_not_meet(tmp_path, case):
    memory, disk, words = OTHER[case]
    path, _ = write_adapter(tmp_path / "x", shapes=dict.fromkeys(memory, (6, 6)))
    with pytest.raises(chunking.CheckpointError, match=words):
        in_memory({f"{name}.weight": torch.ones(6, 6) for name in disk}, path)


HEAD = {"lm_head": (40, 64)}
COPY = f"{P}lm_head.base_layer.weight"


COPIES = {          # what PEFT saves of the base's head, and words of the refusal
    "itself": (lambda head: head, ""),
    "in bfloat16": (lambda head: head.bfloat16(), ""),
    "another": (lambda head: 1.01 * head, "not what the base"),
    "with two rows more": (lambda head: torch.ones(42, 64), "vocabulary was resized"),
}


@pytest.mark.parametrize("case", COPIES)
def test_what_peft_saves_of_the_base_itself(tmp_path, case):
    """A head that is targeted comes with its base: that adds nothing."""
    copy, words = COPIES[case]
    head = torch.randn(40, 64)
    base = llama_tensors(1) | {"lm_head.weight": head}
    path, tensors = write_adapter(tmp_path / "x", shapes=HEAD,
                                  edit=lambda held: held.update({COPY: copy(head)}))
    if words:
        with pytest.raises(chunking.CheckpointError, match=words):
            in_memory(base, path)
    else:
        got = in_memory(base, path)["lm_head.weight"].numpy()
        near(got, head.double().numpy() + product(tensors, "lm_head"))


def test_a_tied_head_is_refused(desk):
    """Loaders read the embedding for it: the sum would be lost."""
    path, _ = write_adapter(desk / "x", shapes=HEAD)
    tensors = llama_tensors(1)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    way = ["fold", desk / "T", path, "-o", desk / "m.safetensors"]
    desk.model(tensors)
    desk.refuse(*way, words=["lm_head", "no such tensor"], main=lora.main)
    desk.model(tensors | head)
    desk.refuse(*way, words=["tied to model.embed_tokens"], main=lora.main)
    desk.model(tensors | head, **{"config.json": '{"tie_word_embeddings": false}'})
    assert desk.run(*way, main=lora.main)[0] == 0


def test_a_folder_gives_a_folder(desk):
    """Companions, and a card of its own; or a file, if that is asked for."""
    base = llama_tensors(1)
    path, tensors = write_adapter(desk / "x")
    way = ["fold", desk.model(base, "base", **{"README.md": "the base's card"}), path]
    for out in ("m", "m.safetensors"):
        assert desk.run(*way, "-o", desk / out, main=lora.main)[0] == 0
    for file in ("m/model.safetensors", "m.safetensors"):
        assert_equal(load_file(desk / file), by_hand(base, tensors))
    assert (desk / "m/config.json").read_text() == '{"model_type": "x"}'
    card = (desk / "m/README.md").read_text()
    assert 'base_model: "base"' in card and "lora.py fold" in card
    assert str(desk.folder) not in card


def test_fold_says_what_rounding_takes(models, desk):
    """bfloat16 keeps 8 bits of a weight, and fewer of what is added to it."""
    path, tensors = write_adapter(desk / "x")
    record = lora.fold(models["half"], path, desk / "m.safetensors")
    base = load_file(models["half"])
    got = load_file(desk / "m.safetensors")
    error = whole = 0.0
    for module in MODULES:
        added = product(tensors, module)
        seen = got[module + ".weight"].double() - base[module + ".weight"].double()
        error += ((seen.numpy() - added) ** 2).sum()
        whole += (added ** 2).sum()
    assert record["rounding"] == pytest.approx(math.sqrt(error / whole), rel=1e-6)


# --- extract --------------------------------------------------------------------------
def changed(base, changes, path):
    """Write the base and what is added to some of its tensors; that model."""
    model = dict(base)
    for name, change in changes.items():
        model[name] = base[name] + change
    save(path, model)
    return model


def read_result(folder):
    """(configuration, factors) of what extract wrote."""
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("rank", [1, 7, 64, 100])
def test_extract_is_the_best_product_of_its_rank(models, tmp_path, rank):
    """Eckart and Young: scipy's SVD says which, its singular values what is lost. No
    path and no time in any file: equal inputs, equal bytes."""
    base = load_file(models["a"])
    changes = {}
    for seed, module in enumerate(MODULES):
        noise = torch.randn(base[f"{module}.weight"].shape, generator=generator(seed))
        changes[f"{module}.weight"] = 0.01 * noise
    model = changed(base, changes, tmp_path / "expert.safetensors")
    way = [tmp_path / "expert.safetensors", models["a"], rank]
    record = lora.extract(*way, tmp_path / "x")
    config, tensors = read_result(tmp_path / "x")
    assert {name.split(".lora_")[0] for name in tensors} == {P + m for m in MODULES}
    assert config["target_modules"] == sorted(MODULES) and config["r"] == rank
    assert config["base_model_name_or_path"] == "a" and not config["fan_in_fan_out"]
    assert record["matrices"] == 3 and not record["left_out"]
    cut = {}
    whole = {}
    for module in MODULES:
        name = f"{module}.weight"
        delta = (model[name].double() - base[name].double()).numpy()
        U, S, Vt = scipy.linalg.svd(delta, full_matrices=False)
        near(product(tensors, module, 1.0), (U[:, :rank] * S[:rank]) @ Vt[:rank])
        cut[name] = (S[rank:] ** 2).sum()
        whole[name] = (S ** 2).sum()
    worst = max(cut, key=cut.get)
    total = sum(whole.values())
    lost = sum(cut.values()) / total
    assert record["lost"] ** 2 == pytest.approx(lost, rel=1e-9, abs=1e-24)
    name, share, own = record["worst"]
    expected = [cut[worst] / total, cut[worst] / whole[worst]]
    assert [share ** 2, own ** 2] == pytest.approx(expected, rel=1e-9, abs=1e-24)
    assert not share or name == worst
    lora.extract(*way, tmp_path / "y")
    for path in (tmp_path / "x").iterdir():
        content = path.read_bytes()
        assert content == (tmp_path / "y" / path.name).read_bytes()
        assert str(tmp_path).encode() not in content


def test_a_loss_that_is_much_is_a_warning(models, desk):
    """Singular values 12, 4, 3, whose squares sum to 13^2: rank 1 loses 5/13, rank 2
    loses 3/13. A norm that moves by 13 as well: half of the square stands in no matrix.
    Elsewhere steps of float32's rounding: no factors follow them."""
    base = load_file(models["a"])
    U = torch.linalg.qr(torch.randn(64, 3, generator=generator(1))).Q
    V = torch.linalg.qr(torch.randn(64, 3, generator=generator(2))).Q
    down = f"{MODULES[1]}.weight"
    changes = {f"{Q}.weight": U * torch.tensor([12.0, 4.0, 3.0]) @ V.T,
               down: 1e-7 * base[down] * torch.randn(64, 96)}
    norm = {"model.norm.weight": 13.0 * torch.eye(64)[7]}
    for more, rank, words in (({}, 1, "lost 38 %"), ({}, 2, "lost 23 %"), ({}, 3, ""),
                              (norm, 3, "lost 71 %")):
        changed(base, changes | more, desk / "e.safetensors")
        way = [desk / "e.safetensors", models["a"], "--rank", rank, "--force"]
        code, said, error = desk.run("extract", *way, "-o", desk / "x", main=lora.main)
        assert code == 0 and bool(error) == bool(words) and words in error
        assert words in (desk / "x/README.md").read_text()
        assert "rounding: model.layers.*.mlp.down_proj.weight (1)" in said
        assert ("cannot hold 1 of the tensors that differ" in said) == bool(more)
        assert read_result(desk / "x")[1].keys() == {QA, QB}


# Names on disk of GPT-2 (from the Hub), T5, NeoX and MoEs, with small shapes; None: no
# linear map.
T5 = "encoder.block.0.layer.0.SelfAttention"
MOE = "model.layers.0.mlp"
KINDS = {"h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_proj.weight": (8, 8),
         f"{T5}.q.weight": (8, 8), "embed_out.weight": (9, 8), "wte.weight": None,
         f"{T5}.relative_attention_bias.weight": None, "h.0.ln_1.weight": None,
         f"{MOE}.gate.weight": None, f"{MOE}.experts.down_proj": None,
         f"{MOE}.experts.3.w1.weight": None}


def test_only_linear_maps_are_extracted_each_the_right_way_round(desk, monkeypatch):
    """From a base with the Hub's names, without transformers."""
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
    model = changed(base, changes, desk / "e.safetensors")
    saved = {}
    for name, tensor in model.items():
        lead = "transformer." if name[0] in "hw" else ""
        saved[lead + name] = tensor
    record = lora.extract(desk.put(saved, "e"), folder, 2, desk / "x")
    config, tensors = read_result(desk / "x")
    assert set(record["left_out"]) == {name for name in KINDS if not KINDS[name]}
    for name, shape in KINDS.items():
        module = name.removesuffix(".weight")
        assert (module in config["target_modules"]) == bool(shape), name
        if shape:
            change = changes[name].double().numpy()
            if ".c_" in name:
                change = change.T
            near(product(tensors, module, 1.0), change)
    assert config["fan_in_fan_out"] and config["task_type"] == "CAUSAL_LM"
    assert "cannot be known" in record["notes"][-1]
    name = "h.0.attn.c_proj.weight"
    folded = lora.folded_tensors(folder, desk / "x")
    near(folded[name].numpy(), model[name].numpy())


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
    if name == "LLaVA":
        return hf.LlavaForConditionalGeneration(hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION_TINY),
            text_config=hf.LlamaConfig(**TINY), image_token_index=59))
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


@pytest.mark.parametrize("name", ["GPT-2", "LLaVA", "ViT"])
def test_what_we_fold_is_what_peft_merges(tmp_path, name):
    peft = pytest.importorskip("peft")
    model = tiny(name)
    saved(model, tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=linear_maps(model),
        rank_pattern={"q_proj|c_fc": 2}, alpha_pattern={r"1\.mlp.*": 7},
        init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    theirs = saved(adapted.merge_and_unload(), tmp_path / "merged")
    lora.fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    ours = load_file(tmp_path / "ours/model.safetensors")
    assert ours.keys() == theirs.keys()
    for tensor in theirs:       # theirs is a float32 product, rounded twice
        torch.testing.assert_close(ours[tensor], theirs[tensor], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["GPT-2", "LLaVA", "ViT", "T5", "gpt-oss"])
def test_what_we_extract_peft_loads_as_the_model(tmp_path, name):
    """All but what is no linear map, which is named and stays the base's. GPT-2's base
    has the names of the Hub."""
    peft = pytest.importorskip("peft")
    model = tiny(name)
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


@pytest.mark.parametrize("path, name", [
    ("org/Llama-2-7b", "Llama-2-7b"), ("a/b.safetensors", "b"), ("a/b/", "b"),
    ("a/model.safetensors.index.json", "model"), (None, "")])
def test_how_a_model_is_called(path, name):
    assert lora.called(path) == name
