"""LoRA adapters: folding by hand, merged products against a plain SVD, refusals."""
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import chunking as ck
from conftest import llama_tensors
from test_merge import assert_models_close, merged, run

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]


def write_adapter(folder, seed, r=4, alpha=8, edit=lambda config, tensors: None, scale=0.1, dtype=torch.float32):
    """A folder as PEFT saves it, for the tiny models of conftest; returns its path and its factors."""
    g, shapes = torch.Generator().manual_seed(seed), llama_tensors(0)
    tensors = {}
    for module in MODULES:
        out, width = shapes[module + ".weight"].shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = (torch.randn(r, width, generator=g) * scale).to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = (torch.randn(out, r, generator=g) * scale).to(dtype)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
              "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "target_modules": ["q_proj"]}
    edit(config, tensors)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder, tensors


def products(tensors, s=2.0):
    pair = lambda m, which: tensors[f"base_model.model.{m}.lora_{which}.weight"].double()
    return {m + ".weight": s * pair(m, "B") @ pair(m, "A") for m in MODULES}


def folded(base, delta): return {k: (w.double() + delta[k]).to(w.dtype) if k in delta else w for k, w in base.items()}


def test_a_product_is_read_in_any_pieces(tmp_path):
    path, tensors = write_adapter(tmp_path / "x", 1)
    adapter = ck.Adapter(path)
    for name, product in products(tensors).items():
        flat = product.float().flatten()
        for start, stop in [(0, None), (0, 1), (63, 65), (100, 1000), (flat.numel() - 1, None)]:
            torch.testing.assert_close(adapter.read(name, start, stop), flat[start:stop], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(adapter.read(name, 5, 777, transposed=True), product.T.float().flatten()[5:777], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("edit, scales", [
    (dict(), [2, 2, 2]), (dict(use_rslora=True), [4, 4, 4]), (dict(lora_alpha=3), [0.75] * 3),
    (dict(alpha_pattern={"down_proj": 16, "layers.1.mlp.up_proj": 1}), [2, 4, 0.25]),
    (dict(alpha_pattern={r"layers\.\d+\.mlp\..*": 12}), [2, 3, 3]), (dict(alpha_pattern={"proj": 16}), [2, 2, 2])])
def test_scaling_follows_the_configuration(tmp_path, edit, scales):
    """s = alpha / r, alpha / sqrt(r) for rslora; a pattern must match whole parts at the end of the name."""
    path, tensors = write_adapter(tmp_path / "x", 1, edit=lambda config, _: config.update(edit))
    for module, s in zip(MODULES, scales):
        expected = products(tensors, s)[module + ".weight"].float().flatten()
        torch.testing.assert_close(ck.Adapter(path).read(module + ".weight"), expected, rtol=1e-6, atol=1e-8)


def test_ranks_may_differ_by_module(tmp_path):
    def edit(config, tensors):
        config["rank_pattern"] = {"q_proj": 2}
        for name in [n for n in tensors if "q_proj" in n]:
            tensors[name] = tensors[name][:2].clone() if "lora_A" in name else tensors[name][:, :2].clone()
    path, tensors = write_adapter(tmp_path / "x", 1, edit=edit)
    expected = products(tensors, 4.0)[MODULES[0] + ".weight"].float().flatten()          # alpha / r = 8 / 2
    torch.testing.assert_close(ck.Adapter(path).read(MODULES[0] + ".weight"), expected, rtol=1e-6, atol=1e-8)


def test_base_folds_adapters_into_whole_models(models, tmp_path):
    """Two adapters over a base: the merge of the two folded models. One adapter and a whole model: likewise."""
    (one, a), (two, b) = (write_adapter(tmp_path / name, seed) for name, seed in (("one", 1), ("two", 2)))
    base, other = load_file(models["a"]), load_file(models["b"])
    left, right = folded(base, products(a)), folded(base, products(b))
    got, _ = merged(models, tmp_path, one, two, "--base", models["a"], "--lam", 0.25)
    assert_models_close(got, {k: 0.75 * left[k] + 0.25 * right[k] for k in base}, rtol=2e-6)
    got, _ = merged(models, tmp_path, models["b"], one, "--base", models["a"])
    assert_models_close(got, {k: 0.5 * other[k] + 0.5 * left[k] for k in base}, rtol=2e-6)
    got, _ = merged(models, tmp_path, one, two, "--base", models["a"], "--operator", "task-arithmetic", "--lam", 1)
    assert_models_close(got, {k: left[k] + right[k] - base[k] for k in base}, rtol=5e-6)


def test_fan_in_fan_out_is_transposed(models, tmp_path):
    path, tensors = write_adapter(tmp_path / "x", 1, edit=lambda config, _: config.update(fan_in_fan_out=True))
    base = load_file(models["a"])
    turned = {k: w.T.contiguous() if k in products(tensors) else w for k, w in base.items()}
    save_file(turned, tmp_path / "base.safetensors")
    got, _ = merged(models, tmp_path, path, "--roundtrip", "--base", tmp_path / "base.safetensors")
    assert_models_close(got, folded(turned, {k: d.T for k, d in products(tensors).items()}), rtol=2e-6)


def read_result(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("space", ["latent", "weight"])
def test_adapters_merge_by_their_products(models, tmp_path, space):
    """The result's product is the best one of rank r to the mean product: a plain SVD of it says which."""
    (one, a), (two, b) = (write_adapter(tmp_path / name, seed, dtype=torch.float32) for name, seed in (("one", 1), ("two", 2)))
    flags = ["--vae", models["vae"]] if space == "latent" else ["--space", "weight"]
    assert run(one, two, *flags, "-o", tmp_path / "out", "--lam", 0.5) == 0
    got = read_result(tmp_path / "out")
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in a.items()}
    assert (tmp_path / "out/adapter_config.json").read_bytes() == (one / "adapter_config.json").read_bytes()
    for name, product in products(got).items():
        u, s, v = torch.linalg.svd(0.5 * products(a)[name] + 0.5 * products(b)[name], full_matrices=False)
        best = (u[:, :4] * s[:4]) @ v[:4]
        torch.testing.assert_close(product, best, rtol=0, atol=2e-6 * best.abs().max().item())


def test_an_adapter_merged_with_itself_stays(models, tmp_path):
    """Also where the other one is scaled differently, and in bfloat16."""
    one, a = write_adapter(tmp_path / "one", 1)
    def edit(config, tensors):
        config["lora_alpha"] = 4
        for name in tensors:
            tensors[name] = tensors[name] * (2 if "lora_B" in name else 1)
    two, _ = write_adapter(tmp_path / "two", 1, edit=edit)
    assert run(one, two, "--vae", models["vae"], "-o", tmp_path / "out") == 0
    for name, product in products(read_result(tmp_path / "out")).items():
        torch.testing.assert_close(product, products(a)[name], rtol=0, atol=2e-6 * product.abs().max().item())


def test_what_only_the_target_decides_keeps_its_factors(models, tmp_path, capsys):
    """lambda = 0 with --residual, and a module that the source lacks: bit for bit; of the rest is said what was cut off."""
    one, a = write_adapter(tmp_path / "one", 1)
    two, _ = write_adapter(tmp_path / "two", 2)
    assert run(one, two, "--vae", models["vae"], "--residual", "--lam", 0, "-o", tmp_path / "out") == 0
    assert all(torch.equal(w, a[name]) for name, w in read_result(tmp_path / "out").items())
    def without(_, tensors):
        for name in [n for n in tensors if MODULES[0] in n]:
            del tensors[name]
    three, b = write_adapter(tmp_path / "three", 2, edit=without)
    capsys.readouterr()
    assert run(one, three, "--vae", models["vae"], "--align", "none", "--lam", 0.5, "-o", tmp_path / "out2") == 0
    got, said = read_result(tmp_path / "out2"), capsys.readouterr().out
    assert all(torch.equal(w, a[name]) for name, w in got.items() if MODULES[0] in name)
    cut, whole = 0.0, 0.0
    for module in MODULES[1:]:
        s = torch.linalg.svdvals(0.5 * products(a)[module + ".weight"] + 0.5 * (2.0 * b[f"base_model.model.{module}.lora_B.weight"].double()
                                 @ b[f"base_model.model.{module}.lora_A.weight"].double()))
        cut, whole = cut + s[4:].square().sum(), whole + s.square().sum()
    assert f"all but {(cut / whole).sqrt():.1%}" in said


def test_an_adapter_for_a_file_result(models, tmp_path):
    one, a = write_adapter(tmp_path / "one", 1)
    assert run(one, "--roundtrip", "--vae", models["vae"], "-o", tmp_path / "out.safetensors") == 0
    assert set(load_file(tmp_path / "out.safetensors")) == set(a)


def drop(word):
    def edit(_, tensors):
        del tensors[next(name for name in tensors if word in name)]
    return edit


def add(name, *shape):
    return lambda _, tensors: tensors.update({name: torch.ones(*shape)})


P = "base_model.model."
REFUSED = {
    "dora": (lambda c, _: c.update(use_dora=True), "use_dora"),
    "lokr": (lambda c, _: c.update(peft_type="LOKR"), "LOKR"),
    "bias": (lambda c, _: c.update(bias="all"), "bias"),
    "saved modules": (lambda c, _: c.update(modules_to_save=["lm_head"]), "modules_to_save"),
    "magnitude": (add(P + MODULES[0] + ".lora_magnitude_vector", 64), "lora_magnitude_vector"),
    "embedding": (add(P + "model.embed_tokens.lora_embedding_A", 4, 40), "lora_embedding_A"),
    "a bias tensor": (add(P + MODULES[0] + ".base_layer.bias", 64), "base_layer.bias"),
    "one factor": (drop("lora_B"), "other factor"),
    "wrong rank": (lambda c, _: c.update(r=5), "rank 5"),
    "alpha": (lambda c, _: c.update(lora_alpha=math.nan), "not valid JSON"),
    "pissa": (lambda c, _: c.update(init_lora_weights="pissa_niter_4"), "pissa"),
    "a list of patterns": (lambda c, _: c.update(rank_pattern=["q_proj"]), "rank_pattern"),
    "a broken pattern": (lambda c, _: c.update(alpha_pattern={"(": 4}), "alpha_pattern"),
    "an empty factor": (lambda _, t: t.update({f"base_model.model.{MODULES[0]}.lora_A.weight": torch.ones(4, 0)}), "no factor"),
    "no alpha": (lambda c, _: c.update(lora_alpha=None), "lora_alpha"),
    "unknown module": (lambda _, t: (add(P + "model.x.lora_A.weight", 4, 9)(_, t), add(P + "model.x.lora_B.weight", 9, 4)(_, t)), "model.x.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(models, tmp_path, capsys, name):
    edit, words = REFUSED[name]
    path, _ = write_adapter(tmp_path / "x", 1, edit=edit)
    assert run(path, models["a"], "--base", models["a"], "--vae", models["vae"], "-o", tmp_path / "m.safetensors") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error and str(path) in error
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_adapters_of_other_rank_or_beside_whole_models_are_refused(models, tmp_path, capsys):
    one, _ = write_adapter(tmp_path / "one", 1)
    two, _ = write_adapter(tmp_path / "two", 2, r=8)
    for arguments, words in [((one, two), "rank"), ((models["a"], one), "--base"), ((models["a"], models["b"], "--base", models["a"]), "no parent is an adapter")]:
        assert run(*arguments, "--vae", models["vae"], "-o", tmp_path / "m") == 1
        assert words in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_against_peft_where_it_is_installed(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=40)
    lm = transformers.LlamaForCausalLM(config)
    lm.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2},
                           alpha_pattern={r"layers.1.mlp.*": 7}, init_lora_weights=False)
    model = peft.get_peft_model(lm, lora)
    model.save_pretrained(tmp_path / "adapter")
    ours = ck.Folded(tmp_path / "base", tmp_path / "adapter")
    for name, weight in model.merge_and_unload().state_dict().items():
        if name in ours.entries:
            torch.testing.assert_close(ours.read_tensor(name), weight, rtol=1e-5, atol=1e-7)
