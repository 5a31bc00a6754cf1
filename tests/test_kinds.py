"""Checkpoints as people have them, merged. What is right is known in advance, in
float64: the plain average of what belongs together, the target's own tensor where
nothing does. (By names alone, for many more models: test_align.py.)"""
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

import merge
from conftest import (INDEX, assert_equal, assert_near, generator, llama_tensors,
                      relative, save, sharded)

REFERENCE = merge.REFERENCE     # before the fixture `exact` puts another in its place
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def drawn(*shape, seed=0, std=0.02, mean=0.0):
    return mean + std * torch.randn(shape, generator=generator(seed))


def llama(layers=2, hidden=16, seed=1):
    tensors = llama_tensors(seed, hidden=hidden, layers=layers, mlp=48)
    tensors[HEAD] = drawn(40, hidden, seed=seed)
    return tensors


def tower(start, layers=3, seed=5):
    tensors = {}
    for i in range(layers):
        for n, role in enumerate("qkv"):
            name = f"{start}layers.{i}.self_attn.{role}_proj.weight"
            tensors[name] = drawn(16, 16, seed=seed + 3 * i + n)
    return tensors


def tuned(tensors, seed=100, part=0.2):
    return relative(tensors, seed, part)


def prefixed(tensors, start):
    return {start + name: tensor for name, tensor in tensors.items()}


def layer_as(tensors, layer, stack):
    """A layer under another name, its weights half as large again."""
    old = f"model.layers.{layer}."
    return {name.replace(old, stack): 1.5 * tensor for name, tensor in tensors.items()
            if name.startswith(old)}


def average(target, sources, partner=lambda name: name):
    """In float64. partner: the target's name -> the source's; without one: no share."""
    result = dict(target)
    for name, tensor in target.items():
        met = [source[partner(name)] for source in sources if partner(name) in source]
        if met and tensor.is_floating_point():
            total = tensor.double()
            for other in met:
                total = total + (other.double() - tensor.double()) / (1 + len(sources))
            result[name] = total
    return result


def check_average(got, target, sources, partner=lambda name: name):
    """To 1e-5 of each tensor's largest weight; what met nobody: bit for bit."""
    expected = average(target, sources, partner)
    alone = {name: w for name, w in target.items() if expected[name] is w}
    assert_equal({name: got.pop(name) for name in alone}, alone)
    for name, tensor in got.items():
        assert tensor.dtype == target[name].dtype, name
    assert_near(got, {name: expected[name] for name in target.keys() - alone}, 1e-5)


def check_siblings(desk, target, source, unpaired=()):
    got, report = desk.merged(target, source)
    check_average(got, target, [source])
    assert report["kind"] == "same-shape" and report["lambda"] == [0.5]
    assert sorted(report["unpaired"]) == sorted(unpaired)


# --- What one model alone has: the run stays one of equal shapes ----------------------
A = llama()
ALONE = {
    "a layer more": layer_as(A, 0, "model.layers.2."),
    "a stack for multi-token prediction": layer_as(A, 0, "mtp.layers.0."),
    "an average over the training": prefixed(tuned(A, part=2.0), "ema."),
    "a score head": {"score.weight": drawn(2, 16)},
    "mask buffers": {"model.layers.1.attn.bias": torch.ones(1, 1, 8, 8).tril()},
    "biases": {"model.layers.1.self_attn.q_proj.bias": drawn(16)},
    "a vision tower": tower("vision_tower.encoder.", layers=5),
    "a tower like the text's layers": tower("audio.", layers=2),
    "what is not finite": {
        "model.layers.0.attention.masked_bias": torch.tensor(-torch.inf),
        "score.weight": torch.tensor([[torch.nan, torch.inf, 1.0]])},
}


@pytest.mark.parametrize("case", ALONE)
def test_what_one_model_alone_has(desk, case):
    extra = ALONE[case]
    b = tuned(A)
    check_siblings(desk, A | extra, b, unpaired=extra)
    check_siblings(desk, A, b | extra)


def test_several_sources_of_which_each_lacks_something(desk):
    b = tuned(A) | layer_as(A, 0, "model.layers.2.")
    c = tuned(A, seed=7)
    del c[UP]
    got, report = desk.merged(A, b, c)
    check_average(got, A, [b, c])
    assert report["kind"] == "same-shape" and report["unpaired"] == []
    nothing = f"{UP} (1 in all), take nothing of {desk / '2.safetensors'}: "
    assert desk.err.count(nothing) == 2 and desk.err.count("take nothing") == 2
    got, _ = desk.merged(A, c, b, "--lam", "0.3,0.2")
    wanted = 0.8 * A[UP].double() + 0.2 * b[UP].double()    # c's share: the target's
    assert_near({UP: got[UP]}, {UP: wanted}, rtol=1e-5)


# --- Units: spreads that differ, constants. With the reference VAE --------------------
DOWN = "model.layers.1.mlp.down_proj.weight"
UNITS = {           # (a tensor of the target, of the source)
    "zeros, as LLaMA-Pro inserts them": (torch.zeros(16, 48), drawn(16, 48)),
    "narrow": (drawn(16, 48, std=1e-5), drawn(16, 48, std=1e-2, seed=1)),
    "narrow about a mean": (drawn(16, 48, std=1e-6, mean=1.0), drawn(16, 48, seed=1)),
    "constants": (torch.full((16, 48), 0.1), torch.full((16, 48), 0.3)),
    "hardly any spread": (drawn(16, 48, std=1e-10), drawn(16, 48, seed=1)),
    "zeros and ones": (torch.eye(16, 48), torch.eye(16, 48)),
}


@pytest.mark.parametrize("case", UNITS)
def test_spreads_that_differ(desk, case):
    """The average; with a trained codec to 1 % of a tensor's own size."""
    a = {UP: A[UP], DOWN: UNITS[case][0]}
    b = {UP: tuned(A)[UP], DOWN: UNITS[case][1]}
    check_siblings(desk, a, b)
    got, _ = desk.merged(a, b, "--vae", REFERENCE)
    for name, wanted in average(a, [b]).items():
        error = (got[name].double() - wanted).square().mean().sqrt()
        assert error <= 1e-2 * wanted.square().mean().sqrt() + 1e-9, name


def test_what_becomes_of_a_constant(desk):
    a = A | {UP: torch.full((48, 16), 0.1)}
    for way in (["--roundtrip"], ["--samples", 2], [llama(hidden=24)]):
        got, report = desk.merged(a, *way, "--vae", REFERENCE)
        assert torch.equal(got[UP], a[UP])
        assert report["tensors"]["encoded"] == 13


# --- Ties -----------------------------------------------------------------------------
T5 = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
      HEAD)
T5_MODEL = {name: drawn(40, 16) for name in T5} | tower("encoder.block.")
TIED = A | {HEAD: A[EMBED].clone()}
TIES = {            # (target, the tensors of it that are equal, those that both hold)
    "the head is the target's alone": (TIED, (EMBED, HEAD), (EMBED,)),
    "both hold it": (TIED, (EMBED, HEAD), (EMBED, HEAD)),
    "T5, one in the source": (T5_MODEL, T5, T5[:1]),
    "T5, another": (T5_MODEL, T5, T5[1:2]),
    "T5, all": (T5_MODEL, T5, T5),
}


@pytest.mark.parametrize("case", TIES)
def test_what_the_target_ties_stays_tied(desk, case):
    a, equal, held = TIES[case]
    b = tuned(a)
    for name in equal:
        b[name] = b[equal[0]].clone()
    for name in set(equal) - set(held):
        del b[name]
    got, _ = desk.merged(desk.put(a, "a"), desk.put(b, "b"))
    for name in equal:
        assert torch.equal(got[name], got[equal[0]])

    def partner(name):
        return held[0] if name in equal else name
    check_average(got, a, [b], partner)


@pytest.mark.parametrize("flags", ["", "--space weight", "--operator slerp",
                                   "--select lm_head", "--lam 0 --residual"])
def test_a_source_that_is_untied_does_not_pull_the_two_apart(desk, flags):
    got, _ = desk.merged(TIED, tuned(A), *flags.split())
    assert torch.equal(got[EMBED], got[HEAD])


def test_equal_norms_and_zeros_are_no_tie(desk):
    a = dict(A)
    for name, tensor in a.items():
        if "norm" in name:
            a[name] = torch.ones_like(tensor)
        elif "o_proj" in name:
            a[name] = torch.zeros_like(tensor)
    check_siblings(desk, a, tuned(a))


BYTES = torch.ones(8, 8, dtype=torch.uint8)
SOUND = {               # bytes, integers and float8, beside scales of something else
    "model.layers.0.relative_position_index": torch.arange(64).view(8, 8),
    "model.layers.0.logit_scale": drawn(4, 1, 1),
    "model.layers.0.attn.bias": BYTES, "model.layers.0.layer_scale.lambda1": drawn(32),
    "model.layers.0.bn.num_batches_tracked": torch.tensor(7),
    "model.layers.0.bn.scale": drawn(16),
    "model.layers.0.extra.weight": drawn(8, 8, std=1.0).to(torch.float8_e4m3fn),
    "position_ids": torch.arange(16).view(1, 16), "mask": BYTES, "logit_scale": drawn(),
    # nor are these of an adapter
    "base_layer.0.weight": drawn(8, 8), "model.att.w_lora_a.weight": drawn(8, 8),
}


def test_what_only_looks_quantised_is_merged(desk):
    a = A | SOUND
    folder = desk.model(a, **{"config.json": '{"quantization_config": null}'})
    b = tuned(a)
    got, _ = desk.merged(folder, b)
    check_average(got, a, [b])


ALONG = ["tokenizer.json", "tokenizer.model", "x.tiktoken", "templates/tool.jinja",
         "1_Pooling/config.json", "modeling_x.py", "code/deep/er/data.yaml", "LICENSE",
         "USE_POLICY.md", "picture.png", "2_Dense/model.safetensors"]
BEHIND = ["pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "x.gguf",
          "flax_model.msgpack", "model.ckpt", "onnx/model.onnx", "trainer_state.json",
          "original/consolidated.00.pth", "optimizer.pt", "adapter_config.json",
          "checkpoint-5/trainer_state.json", "checkpoint-5/config.json",
          "checkpoint-5/optimizer.pt", "adapter_model.safetensors", ".git/config"]


def test_all_goes_along_but_weights_checkpoints_and_training(desk):
    """A part of a model (2_Dense) goes along, its weights too, which is told. A link to
    a file is followed; one to a folder, and a pipe, are named and stay."""
    texts = {file: f"the text of {file}" for file in ALONG + BEHIND}
    folder = desk.model(A, **texts)
    (desk / "blob").write_text("a link's text")
    os.symlink("../blob", folder / "merges.txt")
    os.symlink(".", folder / "circle")
    os.mkfifo(folder / "pipe")
    desk.merged(folder, tuned(A), out="m")
    found = {}
    for path in (desk / "m").rglob("*"):
        if path.is_file():
            found[str(path.relative_to(desk / "m"))] = path.read_bytes()
    for file in ("config.json", "model.safetensors", "README.md"):
        del found[file]
    expected = {file: texts[file].encode() for file in ALONG}
    assert found == expected | {"merges.txt": b"a link's text"}
    assert not (desk / "m/merges.txt").is_symlink()
    assert "circle" in desk.said and "pipe" in desk.said and "2_Dense" in desk.said


def test_a_folder_of_diffusers_keeps_its_name(desk):
    name = "diffusion_pytorch_model.safetensors"
    save(desk / "one" / name, {"blocks.0.to_q.weight": drawn(64, 64)})
    assert desk.run(desk / "one", "-o", desk / "out")[0] == 0
    assert (desk / "out" / name).is_file()


def stale(folder):
    """An index, none of whose shards is there, beside a newer model."""
    sharded(folder, A)
    for shard in folder.glob("model-*"):
        shard.unlink()
    save(folder / "model.safetensors", A)


def more_than_the_index_names(folder):
    """In a sub-folder; one tensor in both shards: the index names the first."""
    sharded(folder, A, where="weights/deep/")
    shard = sorted(folder.glob("weights/deep/model-*"))[1]
    name = sorted(A)[0]
    more = {"x.scales": torch.ones(3), "extra": torch.ones(2), name: 7 + A[name]}
    save(shard, load_file(shard) | more)


def linked(folder):
    sharded(folder, A)
    for shard in sorted(folder.glob("model-*")):
        shutil.move(shard, folder.parent / shard.name)
        os.symlink(f"../{shard.name}", shard)


def beside_a_whole_file(folder):
    sharded(folder, A)
    save(folder / "model.safetensors", llama(seed=5))


@pytest.mark.parametrize("make", [stale, more_than_the_index_names, linked,
                                  beside_a_whole_file])
def test_an_index_says_where_each_tensor_is_no_more(desk, make):
    make(desk / "T")
    b = tuned(A)
    got, report = desk.merged(desk / "T", b)
    check_average(got, A, [b])
    assert report["unpaired"] == []
    assert ("is not used" in desk.err) == (make is beside_a_whole_file)
    assert (desk / "T" / INDEX).exists()


def test_float64_is_centred_before_it_is_rounded(desk):
    shapes = {UP: (48, 16), "model.norm.weight": (16,)}
    pair = []
    for seed in (1, 2):
        pair.append({name: 1 + drawn(*shape, seed=seed, std=1e-9).double()
                     for name, shape in shapes.items()})
    got, _ = desk.merged(*pair)
    for name, wanted in average(pair[0], pair[1:]).items():
        assert (got[name] - wanted).abs().max() < 1e-12, name


@pytest.mark.parametrize("scale", [5e18, 1e20, 1e25, 1e-25])
def test_distances_of_huge_and_tiny_weights(desk, scale):
    """True, or null where it cannot be said; never 0 and never NaN."""
    a = {UP: A[UP] * scale}
    b = {UP: llama(seed=9)[UP] * scale}
    got, report = desk.merged(a, b)
    check_average(got, a, [b])
    apart = (got[UP].double() - a[UP].double()) / scale
    true = (apart.norm() / (a[UP].double() / scale).norm()).item()
    assert report["distance"]["to_target"] in (None, pytest.approx(true, rel=1e-3))


# --- What the user is told ------------------------------------------------------------
LIGHT = tuned(A, part=3e-6)
DEEPER = tuned(A) | layer_as(A, 0, "model.layers.2.")
TOLD = {                # (source, flags, words of the last warning, if there is one)
    "a codec coarser than the difference": (LIGHT, "", "--residual"),
    "what it loses comes back": (LIGHT, "--residual", ""),
    "transport moves more than that": (LIGHT, "--align gaussian", ""),
    "noise does": (LIGHT, "--samples 1", ""),
    "siblings": (tuned(A), "", ""),
    "a sibling with a layer more": (DEEPER, "", "(9 in all), are left out"),
    "too far away": (llama(seed=77), "", "target's norm away"),
}


@pytest.mark.parametrize("case", TOLD)
def test_what_only_the_result_shows(desk, case):
    """The codec's error is told only where the advised flag would bring it back."""
    source, flags, words = TOLD[case]
    desk.merged(A, source, "--vae", REFERENCE, *flags.split())
    last = "".join(desk.err.splitlines()[-1:])
    assert words in last and bool(last) == bool(words)


def test_the_plan_of_a_dry_run(desk):
    extra = layer_as(A, 0, "model.layers.2.")
    pair = [A | extra, prefixed(tuned(A), "module.")]
    code, out, _ = desk.run(*pair, "--vae", "exact", "--dry-run")
    assert code == 0 and not (desk / "merged.safetensors").exists()
    lines = out.splitlines()
    for word in ("same-shape", "lerp", "0.5", "exact", "14 ", "bytes"):
        assert word in "".join(lines[:6]), word
    assert any(f" {UP} " in line and f"module.{UP}" in line for line in lines)
    last = "".join(lines[-len(extra):])
    for name in extra:
        assert name in last
