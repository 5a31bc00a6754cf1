"""Checkpoints as people have them: a table for each kind of trouble, and a test for it.

A case of a table is a small pair of files as some tool writes it. What is right is known
in advance: the plain average of what belongs together, the target's own tensor where
nothing does, or one line that refuses. All is read back by the safetensors library, and
computed here in float64.
"""
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import chunking
import merge
import train
from conftest import ROOT, llama_tensors

REFERENCE = merge.REFERENCE     # before the fixture `exact` puts another in its place
INDEX = "model.safetensors.index.json"
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"


# --- Small models ---------------------------------------------------------------------
def drawn(*shape, seed=0, std=0.02, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(shape, generator=generator)


def llama(layers=2, hidden=16, seed=1):
    tensors = llama_tensors(seed, hidden=hidden, layers=layers, mlp=48)
    tensors[HEAD] = drawn(40, hidden, seed=seed)
    return tensors


def tower(start, layers=3, width=16, seed=5):
    """Layers of an encoder, under a name of their own."""
    tensors = {}
    for i in range(layers):
        for n, role in enumerate("qkv"):
            name = f"{start}layers.{i}.self_attn.{role}_proj.weight"
            tensors[name] = drawn(width, width, seed=seed + 3 * i + n)
    return tensors


def bert(seed=2):
    tensors = {"embeddings.word_embeddings.weight": drawn(40, 32, seed=seed),
               "embeddings.LayerNorm.weight": drawn(32, seed=seed, mean=1.0)}
    for i in range(2):
        for n, role in enumerate(("query", "key", "value")):
            name = f"encoder.layer.{i}.attention.self.{role}."
            tensors[name + "weight"] = drawn(32, 32, seed=seed + 3 * i + n)
            tensors[name + "bias"] = drawn(32, seed=seed + 3 * i + n)
    return tensors


def gpt2(seed=3):
    tensors = {"wte.weight": drawn(40, 32, seed=seed),
               "wpe.weight": drawn(16, 32, seed=seed),
               "ln_f.weight": drawn(32, seed=seed, mean=1.0)}
    for i in range(2):
        tensors[f"h.{i}.attn.c_attn.weight"] = drawn(32, 96, seed=seed + i)
        tensors[f"h.{i}.attn.c_proj.weight"] = drawn(32, 32, seed=seed + i)
        tensors[f"h.{i}.ln_1.weight"] = drawn(32, seed=seed + i, mean=1.0)
    return tensors


def tuned(tensors, seed=100, std=0.006):
    """A fine-tune: every float moves a little, each by itself."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor.clone()
        if tensor.is_floating_point():
            noise = std * torch.randn(tensor.shape, generator=generator)
            result[name] = (tensor.double() + noise).to(tensor.dtype)
    return result


def prefixed(tensors, start):
    return {start + name: tensor.clone() for name, tensor in tensors.items()}


def layer_as(tensors, layer, stack):
    """A layer under another name, its weights half as large again."""
    old = f"model.layers.{layer}."
    return {name.replace(old, stack): 1.5 * tensor for name, tensor in tensors.items()
            if name.startswith(old)}


# --- Running and judging --------------------------------------------------------------
def run(*arguments, main=merge.main):
    return chunking.command(lambda: main([*map(str, arguments), "--quiet"]))


class Desk:
    """A folder to work in: files go in, merges come out."""

    def __init__(self, folder, capsys):
        self.folder = folder
        self.capsys = capsys
        self.count = 0

    def __truediv__(self, name):
        return self.folder / name

    def put(self, tensors, name=None):
        """Write a state dict; its path."""
        self.count += 1
        path = self.folder / (name or f"{self.count}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, path, {"format": "pt"})
        return path

    def model(self, tensors, name="T", config=None, **files):
        """A model folder with some companions, name -> text."""
        self.put(tensors, f"{name}/model.safetensors")
        text = json.dumps(config or {"model_type": "x"})
        (self / name / "config.json").write_text(text)
        for file, text in files.items():
            path = self / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return self / name

    def run(self, *arguments, main=merge.main):
        """Exit code, stdout, stderr of a command."""
        self.capsys.readouterr()
        code = run(*arguments, main=main)
        said = self.capsys.readouterr()
        return code, said.out, said.err

    def merged(self, *arguments, vae="exact", out=None):
        """The result's tensors and its report."""
        self.count += 1
        output = out or self / f"out{self.count}.safetensors"
        report = self / f"{self.count}.json"
        codec = ["--vae", vae]
        if vae is None:
            codec = []
        code, _, err = self.run(*arguments, "-o", output, "--report", report, *codec)
        assert code == 0, err
        self.err = err
        file = output
        if os.path.isdir(output):
            file = os.path.join(output, "model.safetensors")
        return load_file(file), json.loads(report.read_text())

    def refuse(self, *arguments, words=(), code=None, main=merge.main):
        """Refused in one line that holds the words, and nothing changes on the disk."""
        before = self.listing()
        found, _, err = self.run(*arguments, main=main)
        assert found in (1, 2) and code in (None, found), (found, err)
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert "; fix: " in err and err[:-1].isprintable()
        for word in words:
            assert str(word) in err, (word, err)
        assert self.listing() == before
        return err

    def listing(self):
        """All files below, with their times and sizes."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            info = path.lstat()
            found[str(path)] = (info.st_mode, info.st_size, info.st_nlink)
        return found


@pytest.fixture
def desk(tmp_path, capsys):
    return Desk(tmp_path, capsys)


def average(target, sources, partner=None):
    """The plain merge in float64.  partner: the target's name -> the source's."""
    result = {}
    for name, tensor in target.items():
        result[name] = tensor
        if not tensor.is_floating_point():
            continue
        total = tensor.double()
        met = 0
        for source in sources:
            other = name
            if partner:
                other = partner(name)
            if other in source:
                difference = source[other].double() - tensor.double()
                total = total + difference / (1 + len(sources))
                met += 1
        if met:
            result[name] = total
    return result


def check_average(got, target, sources, partner=None, rms=None):
    """Every tensor to 1e-5 of its largest weight, which rounding in float32 may cost;
    rms: to that share of its root mean square, for a trained codec. What met nobody:
    bit for bit."""
    expected = average(target, sources, partner)
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        assert got[name].dtype == target[name].dtype, name
        if wanted is target[name]:
            assert same_bits(got[name], wanted), name
            continue
        error = (got[name].double() - wanted).abs()
        if rms:
            size = wanted.square().mean().sqrt()
            assert error.square().mean().sqrt() <= rms * size + 1e-9, name
        else:
            # float16 and bfloat16 are rounded once more.
            step = torch.finfo(target[name].dtype).eps
            assert error.max() <= max(1e-5, step) * wanted.abs().max(), name


def same_bits(one, other):
    one_bytes = one.reshape(-1).view(torch.uint8)
    return torch.equal(one_bytes, other.reshape(-1).view(torch.uint8))


def check_siblings(desk, target, source, partner=None, unpaired=()):
    """The whole contract for two models of one shape."""
    got, report = desk.merged(desk.put(target), desk.put(source))
    check_average(got, target, [source], partner)
    assert report["kind"] == "same-shape"
    assert report["lambda"] == [0.5]
    assert sorted(report["unpaired"]) == sorted(unpaired)


# --- What one model alone has: the run stays one of equal shapes ----------------------
def medusa():
    heads = {}
    for i in range(2):
        heads[f"medusa_head.{i}.0.linear.weight"] = drawn(16, 16, seed=i)
        heads[f"medusa_head.{i}.1.weight"] = drawn(40, 16, seed=i)
    return heads


ALONE = {
    "a layer more": lambda a: layer_as(a, 0, "model.layers.2."),
    "multi-token prediction": lambda a: layer_as(a, 0, "model.layers.2.") | {
        "model.layers.2.eh_proj.weight": drawn(16, 32),
        "model.layers.2.enorm.weight": drawn(16)},
    "a stack for multi-token prediction": lambda a: layer_as(a, 0, "mtp.layers.0."),
    "layers of a draft model": lambda a: layer_as(a, 1, "draft_model.layers.0."),
    "an average over the training": lambda a: prefixed(tuned(a, std=0.05), "ema."),
    "a score head": lambda a: {"score.weight": drawn(2, 16)},
    "Medusa heads": lambda a: medusa(),
    "mask buffers": lambda a: {
        f"model.layers.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(2)},
    "a pooler": lambda a: {
        "pooler.dense.weight": drawn(16, 16), "pooler.dense.bias": drawn(16)},
    "frequencies": lambda a: {
        f"model.layers.{i}.rotary_emb.inv_freq": torch.ones(8) for i in range(2)},
    "biases": lambda a: {
        f"model.layers.{i}.self_attn.q_proj.bias": drawn(16, seed=i) for i in range(2)},
    "a vision tower": lambda a: tower("vision_tower.encoder.", layers=5),
    "a tower like the text's layers": lambda a: tower("audio.", layers=2),
}


@pytest.mark.parametrize("side", ["target", "source"])
@pytest.mark.parametrize("case", ALONE)
def test_what_one_model_alone_has(desk, case, side):
    a = llama()
    b = tuned(a)
    extra = ALONE[case](a)
    if side == "target":
        check_siblings(desk, a | extra, b, unpaired=extra)
    else:
        check_siblings(desk, a, b | extra)


def test_several_sources_of_which_each_lacks_something(desk):
    """A source without a partner leaves its share to the target."""
    a = llama()
    b = tuned(a) | layer_as(a, 0, "model.layers.2.")
    c = tuned(a, seed=7)
    del c[UP]
    got, report = desk.merged(desk.put(a), desk.put(b), desk.put(c))
    check_average(got, a, [b, c])
    assert report["kind"] == "same-shape" and report["unpaired"] == []


# --- Names: wrappers and leading parts ------------------------------------------------
def in_layers(wrapper):
    """The wrapper behind the number of each layer."""
    def change(name):
        head, layers, rest = name.partition("layers.")
        number, _, rest = rest.partition(".")
        if not layers:
            return name
        return f"{head}layers.{number}.{wrapper}.{rest}"
    return change


def within_model(wrapper):
    """The wrapper behind a leading `model`, and nowhere else."""
    def change(name):
        if not name.startswith("model."):
            return name
        return name.replace("model.", f"model.{wrapper}.", 1)
    return change


def in_front(start):
    return lambda name: start + name


RENAMED = {
    "module": (llama, in_front("module.")),
    "torch.compile": (llama, in_front("_orig_mod.")),
    "both": (llama, in_front("module._orig_mod.")),
    "torch.compile inside": (llama, within_model("_orig_mod")),
    "torch.compile layer by layer": (llama, in_layers("_orig_mod")),
    "FSDP layer by layer": (llama, in_layers("_fsdp_wrapped_module")),
    "checkpointing": (llama, in_layers("_checkpoint_wrapped_module")),
    "module inside": (llama, within_model("module")),
    "PEFT's leading part": (llama, in_front("base_model.model.")),
    "an actor": (llama, in_front("actor.model.")),
    "no leading model": (llama, lambda name: name.removeprefix("model.")),
    "language_model inside": (llama, within_model("language_model")),
    "GPT-2's leading part": (gpt2, in_front("transformer.")),
    "BERT's leading part": (bert, in_front("bert.")),
    "a sentence-transformers file": (bert, in_front("0.auto_model.")),
}


@pytest.mark.parametrize("side", ["target", "source"])
@pytest.mark.parametrize("case", RENAMED)
def test_names_that_differ_in_wrappers_and_leading_parts(desk, case, side):
    make, change = RENAMED[case]
    a = make()
    b = tuned(a)
    if side == "source":
        source = {change(name): tensor for name, tensor in b.items()}
        check_siblings(desk, a, source, partner=change)
    else:
        target = {change(name): tensor for name, tensor in a.items()}
        back = {change(name): name for name in a}
        check_siblings(desk, target, b, partner=back.get)


# --- Stacks: text meets text, an encoder an encoder -----------------------------------
def llava_old():
    return prefixed(llama(), "language_model.") | tower("vision_tower.encoder.") | {
        "multi_modal_projector.linear_1.weight": drawn(16, 16)}


def llava_new(name):
    if name == "language_model.lm_head.weight":
        return HEAD
    return "model." + name.replace("language_model.model.", "language_model.")


def encoder_and_decoder():
    return tower("model.encoder.", seed=1) | tower("model.decoder.", seed=50)


def clip():
    text = tower("text_model.encoder.", seed=1)
    return text | tower("vision_model.encoder.", seed=50)


def text_of_llava(name):
    return name.removeprefix("language_model.")


def same(name):
    return name


def without_model(name):
    return name.removeprefix("model.")


# (target, its names -> those of the source, the part of it that the source has)
STACKS = {
    "old names meet new names": (llava_old, llava_new, ""),
    "vision and text meet text": (llava_old, text_of_llava, "language_model."),
    "vision and text meet vision": (llava_old, same, "vision_tower."),
    "both towers meet the text's": (clip, same, "text_model."),
    "both towers meet vision's": (clip, same, "vision_model."),
    "both stacks meet a decoder": (encoder_and_decoder, same, "model.decoder."),
    "and a bare one": (encoder_and_decoder, without_model, "model.decoder."),
}


@pytest.mark.parametrize("case", STACKS)
def test_stacks_meet_their_like_or_nobody(desk, case):
    make, change, part = STACKS[case]
    target = make()
    source = {change(name): tensor for name, tensor in tuned(target).items()
              if name.startswith(part)}

    def partner(name):
        return change(name) if name.startswith(part) else None
    alone = [name for name in target if not name.startswith(part)]
    check_siblings(desk, target, source, partner, unpaired=alone)


def test_a_stack_that_fits_two_alike_meets_neither(desk):
    target = tower("query_encoder.", seed=1) | tower("document_encoder.", seed=50)
    source = tower("encoder.", seed=9)
    got, report = desk.merged(desk.put(target), desk.put(source))
    check_average(got, target, [])
    assert sorted(report["unpaired"]) == sorted(target)


def test_another_width_leaves_the_vision_tower_alone(desk):
    vision = tower("vision_tower.encoder.")
    target = prefixed(llama(), "language_model.") | vision
    got, report = desk.merged(desk.put(target), desk.put(llama(layers=1, hidden=24)))
    assert report["kind"] == "cross-shape" and report["lambda"] == [0.1]
    assert set(vision) <= set(report["unpaired"])
    for name in vision:
        assert same_bits(got[name], target[name])
    text = "language_model." + UP
    assert not torch.equal(got[text], target[text])


# --- Units: spreads that differ, constants, outliers. With the reference VAE ----------
def zero_blocks(a, b):
    """As LLaMA-Pro inserts them."""
    for name in a:
        if "layers.1." in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            a[name] = torch.zeros_like(a[name])


def zero_blocks_in_the_source(a, b):
    zero_blocks(b, a)


def narrow(a, b):
    a[UP] = drawn(48, 16, std=1e-5)
    b[UP] = drawn(48, 16, std=1e-2, seed=1)


def narrow_about_a_mean(a, b):
    a[UP] = drawn(48, 16, std=1e-6, mean=1.0)


def one_constant(a, b):
    a[UP] = torch.full_like(a[UP], 0.25)


def constants(a, b):
    a[UP] = torch.full_like(a[UP], 0.1)
    b[UP] = torch.full_like(b[UP], 0.3)


def hardly_any_spread(a, b):
    a[UP] = drawn(48, 16, std=1e-10)


UNITS = [zero_blocks, zero_blocks_in_the_source, narrow, narrow_about_a_mean,
         one_constant, constants, hardly_any_spread]


@pytest.mark.parametrize("change", UNITS)
def test_spreads_that_differ(desk, change):
    """The average, to the codec's usual error: here 1 % of a tensor's own size."""
    a = llama()
    b = tuned(a)
    change(a, b)
    target = desk.put(a)
    source = desk.put(b)
    got, _ = desk.merged(target, source)
    check_average(got, a, [b])
    got, _ = desk.merged(target, source, vae=REFERENCE)
    check_average(got, a, [b], rms=1e-2)


def test_one_outlier_does_not_spoil_the_others_in_silence(desk):
    """Of 16,384 weights one is 10^4 standard deviations out: the others are right to a
    twentieth of theirs, or the merge is refused."""
    name = "layers.0.self_attn.q_proj.weight"
    a = {name: drawn(128, 128)}
    b = {name: drawn(128, 128, seed=1)}
    for tensors in (a, b):
        tensors[name][3, 5] = 200.0
    pair = [desk.put(a), desk.put(b)]
    code, _, err = desk.run(*pair, "-o", desk / "m.safetensors", "--vae", REFERENCE)
    if code != 0:
        assert code == 1 and name in err
        return
    rest = torch.ones(128, 128, dtype=torch.bool)
    rest[3, 5] = False
    wanted = average(a, [b])[name][rest]
    error = load_file(desk / "m.safetensors")[name][rest].double() - wanted
    assert error.abs().median() < 0.05 * wanted.std()


def test_constants_survive_a_round_trip(desk):
    a = llama()
    zero_blocks(a, a)
    path = desk.put(a)
    for flags in (["--roundtrip"], ["--samples", 2]):
        got, _ = desk.merged(path, *flags, vae=REFERENCE)
        for name, tensor in a.items():
            if not tensor.any():
                assert same_bits(got[name], tensor), name


# --- Ties -----------------------------------------------------------------------------
T5 = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
      HEAD)


def t5():
    tensors = {name: drawn(40, 32) for name in T5}
    for side in ("encoder", "decoder"):
        for i in range(2):
            name = f"{side}.block.{i}.layer.0.SelfAttention.q.weight"
            tensors[name] = drawn(32, 32, seed=i)
    return tensors


def tied_llama():
    tensors = llama()
    return tensors | {HEAD: tensors[EMBED].clone()}


# (target, the tensors of it that are equal, those of them that the source holds)
TIES = {
    "the head is the target's alone": (tied_llama, (EMBED, HEAD), (EMBED,)),
    "both hold it": (tied_llama, (EMBED, HEAD), (EMBED, HEAD)),
    "T5, one in the source": (t5, T5, T5[:1]),
    "T5, another": (t5, T5, T5[1:2]),
    "T5, only the head": (t5, T5, T5[3:]),
    "T5, all": (t5, T5, T5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", TIES)
def test_what_the_target_ties_stays_tied(desk, case, dtype):
    make, equal, held = TIES[case]
    a = {name: tensor.to(dtype) for name, tensor in make().items()}
    b = tuned(a)
    for name in equal:
        b[name] = b[equal[0]].clone()
    for name in set(equal) - set(held):
        del b[name]
    got, _ = desk.merged(desk.put(a), desk.put(b))
    for name in equal:
        assert same_bits(got[name], got[equal[0]])

    def partner(name):
        return held[0] if name in equal else name
    check_average(got, a, [b], partner)


FLAGS = [["--space", "weight"], ["--operator", "slerp"], ["--select", "lm_head"],
         ["--lam", "0", "--residual"]]


@pytest.mark.parametrize("flags", FLAGS)
def test_ties_under_other_flags(desk, flags):
    """An untied source, which would pull the two apart."""
    a = tied_llama()
    codec = "exact"
    if "--space" in flags:
        codec = None
    got, _ = desk.merged(desk.put(a), desk.put(tuned(llama(seed=1))), *flags, vae=codec)
    assert same_bits(got[EMBED], got[HEAD])


def test_equal_norms_and_zeros_are_no_tie(desk):
    a = llama()
    for name, tensor in a.items():
        if "norm" in name:
            a[name] = torch.ones_like(tensor)
        elif "o_proj" in name:
            a[name] = torch.zeros_like(tensor)
    check_siblings(desk, a, tuned(a))


# --- Quantised: a matrix of other numbers than its weights ----------------------------
def whole(dtype, *shape):
    low = max(torch.iinfo(dtype).min, -100)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, 100, shape, generator=generator).to(dtype)


def float8(*shape):
    return drawn(*shape, std=1.0).to(torch.float8_e4m3fn)


U8, I8, I32 = torch.uint8, torch.int8, torch.int32
# What stands in the place of q_proj.weight, by the ends of the names.
QUANTISED = {
    "scale_weight": {".weight": float8(32, 32), ".scale_weight": drawn()},
    "weight_scale_inv": {".weight": float8(32, 32), ".weight_scale_inv": drawn(1, 1)},
    "weight_scale": {".weight": float8(32, 32), ".weight_scale": drawn()},
    "scale": {".weight": float8(32, 32), ".scale": drawn()},
    "GPTQ": {".qweight": whole(I32, 4, 32), ".qzeros": whole(I32, 1, 4),
             ".scales": drawn(1, 32).half(), ".g_idx": whole(I32, 32)},
    "AWQ": {".qweight": whole(I32, 32, 4), ".qzeros": whole(I32, 1, 4),
            ".scales": drawn(1, 32).half()},
    "bitsandbytes, 8 bits": {".weight": whole(I8, 32, 32), ".SCB": drawn(32)},
    "bitsandbytes, 4 bits": {
        ".weight": whole(U8, 512, 1), ".weight.absmax": whole(U8, 16),
        ".weight.quant_state.bitsandbytes__nf4": whole(U8, 80)},
    "HQQ": {".W_q": whole(U8, 16, 32), ".scale": drawn(32, 1), ".zero": drawn(32, 1)},
    "nvfp4": {".weight": whole(U8, 32, 16), ".weight_scale": float8(32, 2),
              ".weight_scale_2": drawn()},
    "mxfp4": {"_blocks": whole(U8, 2, 32, 2, 16), "_scales": whole(U8, 2, 32, 2)},
    "packed": {".weight_packed": whole(I32, 32, 4), ".weight_scale": drawn(32, 1)},
    "EETQ": {".weight": whole(I8, 32, 32), ".weight_scales": drawn(32).half()},
    "quanto": {".weight._data": whole(I8, 32, 32), ".weight._scale": drawn(32, 1)},
    "an unknown kind": {".kernel": whole(I8, 32, 32), ".kernel_scale": drawn(32)},
}


@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_matrices_are_refused(desk, case):
    plain = llama(layers=1)
    quantised = dict(plain)
    stem = "model.layers.0.self_attn.q_proj"
    del quantised[stem + ".weight"]
    for end, tensor in QUANTISED[case].items():
        quantised[stem + end] = tensor
    target = desk.put(quantised)
    source = desk.put(plain)
    for pair in ([target, source], [source, target]):
        desk.refuse(*pair, "-o", desk / "m.safetensors", words=["quantised"])


FP8 = {"quant_method": "fp8"}
CONFIGS = {
    "at the top": ("config.json", {"quantization_config": FP8}),
    "of the text model": ("config.json", {"text_config": {"quantization_config": FP8}}),
    "an older name": ("config.json", {"compression_config": FP8}),
    "ModelOpt's own file": ("hf_quant_config.json", {"quantization": FP8}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_says_quantised_is_refused(desk, case):
    file, config = CONFIGS[case]
    folder = desk.model(llama(layers=1), **{file: json.dumps(config)})
    plain = desk.model(llama(layers=1), "P")
    for pair in ([folder, plain], [plain, folder]):
        desk.refuse(*pair, "-o", desk / "m", words=["quantised"])


# What only looks like it.
SOUND = {
    "Swin's positions and logit scale": {
        "model.layers.0.relative_position_index": torch.arange(64).view(8, 8),
        "model.layers.0.logit_scale": drawn(4, 1, 1)},
    "position ids": {
        "position_ids": torch.arange(16).view(1, 16), "norm.scale": drawn(16),
        "logit_scale": drawn()},
    "masks beside LayerScale": {
        "model.layers.0.attn.bias": torch.ones(8, 8, dtype=U8),
        "model.layers.0.layer_scale.lambda1": drawn(32)},
    "counters of batch norms": {
        "model.layers.0.bn.num_batches_tracked": torch.tensor(7),
        "model.layers.0.bn.scale": drawn(16)},
    "plain float8": {"model.layers.0.extra.weight": float8(32, 32)},
}


@pytest.mark.parametrize("case", SOUND)
def test_what_only_looks_quantised_is_merged(desk, case):
    a = llama(layers=1) | SOUND[case]
    folder = desk.model(a, config={"model_type": "x", "quantization_config": None})
    b = tuned(a)
    got, _ = desk.merged(folder, desk.put(b))
    check_average(got, a, [b])


# --- Companions -----------------------------------------------------------------------
ALONG = ["generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt",
         "x.spm", "x.tiktoken", "bpe.codes", "chat.jinja", "templates/tool.jinja",
         "1_Pooling/config.json", "modeling_x.py", "code/deep/er/data.yaml", "LICENSE",
         "USE_POLICY.md", "picture.png"]
BEHIND = ["pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "x.gguf",
          "flax_model.msgpack", "model.ckpt", "onnx/model.onnx", "consolidated.00.pth",
          "original/consolidated.00.pth", "optimizer.pt", "scheduler.pt",
          "rng_state_0.pth", "trainer_state.json", "training_args.bin",
          "checkpoint-5/trainer_state.json", "checkpoint-5/config.json",
          "checkpoint-5/optimizer.pt", "adapter_config.json",
          "adapter_model.safetensors", "global_step5/mp_rank_00_model_states.pt",
          ".git/config"]


def files_below(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)) for path in files}


def test_all_goes_along_but_weights_checkpoints_and_training(desk):
    a = llama(layers=1)
    texts = dict.fromkeys(BEHIND, "x")
    for file in ALONG:
        texts[file] = f"the text of {file}"
    folder = desk.model(a, **texts)
    desk.merged(folder, desk.put(tuned(a)), out=desk / "m")
    found = files_below(desk / "m")
    assert found == {*ALONG, "config.json", "model.safetensors", "README.md"}
    for file in ALONG:
        assert (desk / "m" / file).read_text() == texts[file]


def test_weights_of_a_part_go_along(desk):
    """A dense layer of sentence-transformers: its weights belong to the model."""
    a = llama(layers=1)
    modules = '[{"path": "2_Dense"}]'
    folder = desk.model(a, **{"modules.json": modules, "2_Dense/x.json": "{}"})
    desk.put({"linear.weight": drawn(4, 4)}, "T/2_Dense/model.safetensors")
    desk.merged(folder, desk.put(tuned(a)), out=desk / "m")
    assert {"2_Dense/x.json", "2_Dense/model.safetensors"} <= files_below(desk / "m")


def test_links_pipes_and_circles_among_the_companions(desk):
    a = llama(layers=1)
    folder = desk.model(a)
    (desk / "blob").write_text("text")
    os.symlink("../blob", folder / "tokenizer.json")
    os.symlink(".", folder / "circle")
    os.mkfifo(folder / "pipe.json")
    source = desk.put(tuned(a))
    code, _, err = desk.run(folder, source, "-o", desk / "m", "--vae", "exact")
    assert code == 0 or code == 1 and err.count("\n") == 1, err
    if code == 0:
        assert (desk / "m/tokenizer.json").read_text() == "text"
        assert not (desk / "m/tokenizer.json").is_symlink()


# --- Indexes and folders --------------------------------------------------------------
def sharded(folder, tensors, where="", changes=None):
    """Two shards and their index in place of model.safetensors; the shards' paths."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    table = {}
    paths = []
    for k in range(2):
        file = f"{where}model-{k + 1:05}-of-00002.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[k::2]}
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(part, folder / file, {"format": "pt"})
        table |= dict.fromkeys(part, file)
        paths.append(folder / file)
    table |= changes or {}
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))
    return paths


def add(path, **tensors):
    save_file(load_file(path) | tensors, path, {"format": "pt"})


def stale(folder, a):
    for path in sharded(folder, a):
        path.unlink()
    save_file(a, folder / "model.safetensors", {"format": "pt"})


def in_a_subfolder(folder, a):
    sharded(folder, a, where="weights/deep/")


def more_than_the_index_names(folder, a):
    add(sharded(folder, a)[0], **{"x.scales": torch.ones(3), "extra": torch.ones(2)})


def twice(folder, a):
    """A tensor in both shards; the index names the first."""
    name = sorted(a)[0]
    add(sharded(folder, a)[1], **{name: 7 + a[name]})


def linked(folder, a):
    for path in sharded(folder, a):
        shutil.move(path, folder.parent / path.name)
        os.symlink(f"../{path.name}", path)


READ = [stale, in_a_subfolder, more_than_the_index_names, twice, linked]


@pytest.mark.parametrize("make", READ)
def test_an_index_says_where_each_tensor_is_no_more(desk, make):
    a = llama()
    b = tuned(a)
    folder = desk.model(a)
    make(folder, a)
    got, report = desk.merged(folder, desk.put(b))
    check_average(got, a, [b])
    assert report["unpaired"] == []


def test_an_index_beside_a_whole_file_is_said(desk):
    a = llama()
    folder = desk.model(a)
    sharded(folder, a)
    desk.put(a, "T/model.safetensors")
    arguments = [folder, desk.put(tuned(a)), "-o", desk / "m", "--vae", "exact"]
    code, out, _ = desk.run(*arguments)
    assert code == 0 and "note:" in out and "model.safetensors" in out


OUTSIDE = ["../x/s.safetensors", "/etc/x.safetensors", "sub/../../x/s.safetensors", "..",
           ""]


@pytest.mark.parametrize("shard", OUTSIDE)
def test_an_index_that_leaves_its_folder_is_refused(desk, shard):
    """Whether or not there is a file, and one of that name in the folder."""
    a = llama()
    folder = desk.model(a)
    desk.put(a, "x/s.safetensors")
    desk.put(a, "T/s.safetensors")
    sharded(folder, a, changes=dict.fromkeys(a, shard))
    desk.refuse(folder, desk.put(a), "-o", desk / "m", words=[INDEX])


@pytest.mark.parametrize("shard", ["missing.safetensors",
                                   "model-00002-of-00002.safetensors"])
def test_a_shard_that_lacks_a_tensor_is_refused(desk, shard):
    a = llama()
    folder = desk.model(a)
    name = sorted(a)[0]
    sharded(folder, a, changes={name: shard})
    desk.refuse(folder, desk.put(a), "-o", desk / "m", words=[shard, name])


ADAPTER = {"adapter_config.json": '{"peft_type": "LORA", "r": 4}'}
LORA = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": drawn(4, 32)}


@pytest.mark.parametrize("also", [False, True])
def test_a_whole_model_with_an_adapters_configuration(desk, also):
    a = llama(layers=1)
    b = tuned(a)
    folder = desk.model(a, **ADAPTER)
    if also:
        desk.put(LORA, "T/adapter_model.safetensors")
    got, _ = desk.merged(folder, desk.put(b), out=desk / "m")
    check_average(got, a, [b])
    assert not [file for file in files_below(desk / "m") if "adapter" in file]


def test_an_adapter_alone_is_refused_with_the_remedy(desk):
    desk.put(LORA, "T/adapter_model.safetensors")
    (desk / "T/adapter_config.json").write_text(ADAPTER["adapter_config.json"])
    model = desk.put(llama(layers=1))
    for pair in ([desk / "T", model], [model, desk / "T"]):
        desk.refuse(*pair, "-o", desk / "m", words=["adapter", "lora.py fold"])


# --- Not finite -----------------------------------------------------------------------
INFINITE = {"model.layers.0.attention.masked_bias": torch.tensor(-torch.inf),
            "score.weight": torch.tensor([[torch.nan, torch.inf, 1.0]])}


def test_what_is_copied_need_not_be_finite(desk):
    a = llama(layers=1)
    b = tuned(a)
    check_siblings(desk, a | INFINITE, b, unpaired=INFINITE)
    check_siblings(desk, a, b | INFINITE)
    got, _ = desk.merged(desk.put(a | INFINITE), "--roundtrip")
    for name, tensor in INFINITE.items():
        assert same_bits(got[name], tensor)


def test_nan_outside_the_selection_is_copied(desk):
    a = llama(layers=1)
    a[NORM][3] = torch.nan
    source = desk.put(tuned(llama(layers=1)))
    got, _ = desk.merged(desk.put(a), source, "--select", "mlp")
    assert same_bits(got[NORM], a[NORM])


@pytest.mark.parametrize("name", [UP, NORM, EMBED])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_that_would_enter_is_refused(desk, name, side):
    pair = [llama(), tuned(llama())]
    pair[side][name].view(-1)[5] = torch.nan
    paths = [desk.put(tensors) for tensors in pair]
    desk.refuse(*paths, "-o", desk / "m.safetensors", words=[paths[side], name])


# --- Platforms ------------------------------------------------------------------------
UNIX_ONLY = ("preadv", "pwritev", "pread", "pwrite", "posix_fallocate", "statvfs",
             "sched_getaffinity", "geteuid", "fchmod", "chown", "posix_fadvise")


def as_on_windows(real):
    """A rename that fails while a file below the path is open."""
    def rename(source, target):
        for number in os.listdir("/proc/self/fd"):
            try:
                there = os.readlink(f"/proc/self/fd/{number}")
            except OSError:
                continue
            if there.startswith(os.path.realpath(source)):
                raise PermissionError(13, "is open", str(source))
        return real(source, target)
    return rename


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_no_call_of_one_platform(desk, monkeypatch, kind):
    """Without the calls that Windows lacks, and with its rule on open files."""
    for name in UNIX_ONLY:
        monkeypatch.delattr(os, name, raising=False)
    for name in ("rename", "replace", "link"):
        monkeypatch.setattr(os, name, as_on_windows(getattr(os, name)))
    a = llama(layers=1)
    b = tuned(a)
    target = desk.put(a)
    out = desk / "m.safetensors"
    if kind == "folder":
        target = desk.model(a)
        out = desk / "m"
    source = desk.put(b)
    for flags in ([], ["--force"]):
        code, _, err = desk.run(target, source, "-o", out, "--vae", "exact", *flags)
        assert code == 0, err
    if kind == "folder":
        out = out / "model.safetensors"
    check_average(load_file(out), a, [b])


OWN_PROCESS = """
import os, sys
os.environ["WORLD_SIZE"] = "100"
import merge
del os.environ["WORLD_SIZE"]
from chunking import command
try:
    command(lambda: merge.main(["--help"]))
except SystemExit:
    pass
sys.exit(command(lambda: merge.main(sys.argv[1:])))
"""


def test_a_plain_locale_without_docstrings_and_asserts(desk):
    """python -OO under LC_ALL=C, into a folder whose name is no ASCII; and nothing of a
    launcher's environment is read at import."""
    a = llama(layers=1)
    b = tuned(a)
    plain = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0",
             "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    arguments = [desk.model(a), desk.put(b), "-o", desk / "mergé", "--vae", "exact"]
    python = [sys.executable, "-OO", "-c", OWN_PROCESS]
    done = subprocess.run([*python, *map(str, arguments)],
                          cwd=ROOT, env=plain, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"--lam" in done.stdout and b"TARGET" in done.stdout
    check_average(load_file(desk / "mergé/model.safetensors"), a, [b])
    (desk / "mergé/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_stream_that_is_closed(desk, closed):
    a = llama(layers=1)
    arguments = [desk.put(a), desk.put(tuned(a)), "-o", desk / "m.safetensors"]
    code = forked(closed, *arguments, "--space", "weight")
    assert code == 0 and load_file(desk / "m.safetensors")


def forked(closed, *arguments):
    """The exit code of a merge in a child without these streams."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            for number, name in ((1, "stdout"), (2, "stderr")):
                word = f"{number}>&-".removeprefix("1")
                if word in closed.split():
                    os.close(number)
                    setattr(sys, name, None)
            code = run(*arguments)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- Numbers --------------------------------------------------------------------------
@pytest.mark.parametrize("mean, std", [(1.0, 1e-9), (1000.0, 1e-6), (-1.0, 1e-8)])
@pytest.mark.parametrize("name", [UP, NORM])
def test_float64_is_centred_before_it_is_rounded(desk, name, mean, std):
    pair = []
    for seed in (1, 2):
        tensors = {key: tensor.double() for key, tensor in llama().items()}
        noise = drawn(*tensors[name].shape, seed=seed, std=1.0).double()
        tensors[name] = mean + std * noise
        pair.append(tensors)
    got, _ = desk.merged(*map(desk.put, pair))
    error = (got[name] - average(pair[0], pair[1:])[name]).abs().max()
    assert error < 1e-3 * std


@pytest.mark.parametrize("scale", [5e18, 1e20, 1e25, 1e-25])
def test_distances_of_huge_and_tiny_weights(desk, scale):
    """True, or null where it cannot be said; never 0 and never NaN."""
    a = {name: tensor * scale for name, tensor in llama(layers=1).items()}
    b = {name: tensor * scale for name, tensor in llama(layers=1, seed=9).items()}
    got, report = desk.merged(desk.put(a), desk.put(b))
    check_average(got, a, [b])
    encoded = [name for name in a if "layers" in name and a[name].dim() > 1]
    apart = 0.0
    size = 0.0
    for name in encoded:
        wanted = a[name].double() / scale
        apart += (got[name].double() / scale - wanted).square().sum().item()
        size += wanted.square().sum().item()
    true = (apart / size) ** 0.5
    found = report["distance"]["to_target"]
    assert found is None or found == pytest.approx(true, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_users_tensors_are_left_alone(dtype):
    tensor = drawn(40, 40, mean=3.0).to(dtype)
    before = tensor.clone()
    model = chunking.StateDict({UP: tensor})
    chunking.measure(model, UP)
    model.read(UP, 0, 100).mul_(0)
    assert torch.equal(tensor, before)


# --- Outputs --------------------------------------------------------------------------
def test_what_is_no_regular_file_is_never_replaced(desk):
    a = llama(layers=1)
    pair = [desk.put(a), desk.put(tuned(a))]
    pipe = desk / "pipe"
    os.mkfifo(pipe)
    desk.refuse(*pair, "-o", pipe, "--force")
    desk.refuse(*pair, "-o", desk / "m.safetensors", "--report", pipe, "--force")
    desk.refuse(pair[0], "-o", pipe, "--force", main=train.main)
    desk.refuse(pair[0], "-o", desk / "v.safetensors", "--log", pipe, main=train.main)
    assert pipe.is_fifo()


INSIDE = ["m/model.safetensors", "m/config.json", "link/model.safetensors",
          "m/../m/README.md"]


@pytest.mark.parametrize("report", INSIDE)
def test_outputs_do_not_lie_in_one_another(desk, report):
    a = llama(layers=1)
    (desk / "m").mkdir()
    os.symlink("m", desk / "link")
    pair = [desk.model(a), desk.put(a)]
    desk.refuse(*pair, "-o", desk / "m", "--report", desk / report, "--force")


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_log_that_is_another_name_of_an_input(desk, link):
    model = desk.put(llama(layers=1))
    link(model, desk / "log")
    arguments = [model, "-o", desk / "v.safetensors", "--log", desk / "log"]
    desk.refuse(*arguments, words=["log"], main=train.main)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_appears_meanwhile_is_not_replaced(desk, monkeypatch, kind):
    """Another run ends first, under the same name."""
    a = llama(layers=1)
    target = desk.put(a)
    out = desk / "m.safetensors"
    if kind == "folder":
        target = desk.model(a)
        out = desk / "m"
    theirs = out
    real = chunking.Output.check

    def check(output):
        nonlocal theirs
        real(output)
        if kind == "folder":
            out.mkdir()
            theirs = out / "theirs"
        theirs.write_text("theirs")
    monkeypatch.setattr(chunking.Output, "check", check)
    code, _, err = desk.run(target, desk.put(tuned(a)), "-o", out, "--vae", "exact")
    assert code == 1 and err.count("\n") == 1, err
    assert theirs.read_text() == "theirs"
    assert not list(desk.folder.glob(".lsmerge*"))


@pytest.mark.parametrize("spelling", ["deep/m", "deep/m/", "deep//m//", "link"])
def test_litter_is_named_however_the_output_is_spelt(desk, spelling):
    a = llama(layers=1)
    (desk / "deep").mkdir()
    os.symlink("deep/m", desk / "link")
    litter = ".lsmerge-123-0a0b0c0d.tmp"
    (desk / "deep" / litter).write_text("x")
    out = f"{desk.folder}/{spelling}"
    code, said, err = desk.run(desk.model(a), desk.put(a), "-o", out, "--vae", "exact")
    assert code == 0, err
    assert litter in said + err and (desk / "deep" / litter).exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_signal_after_a_rename_leaves_a_whole_result(desk, monkeypatch, sent, moment):
    """Of an old folder that is replaced: the old one or the new one, and no litter."""
    a = llama(layers=1)
    b = tuned(a)
    (desk / "m").mkdir()
    (desk / "m/model.safetensors").write_text("old")
    count = 0

    def striking(real):
        def call(*paths):
            nonlocal count
            real(*paths)
            count += 1
            if count == moment:
                os.kill(os.getpid(), sent)
        return call
    for name in ("rename", "replace", "link"):
        monkeypatch.setattr(os, name, striking(getattr(os, name)))
    arguments = [desk.model(a), desk.put(b), "-o", desk / "m", "--vae", "exact", "--force"]
    try:
        code, _, err = desk.run(*arguments)
    except SystemExit as ended:
        code = ended.code
        err = ""
    struck = count >= moment
    assert code in (130, 143) or code == 0 and not struck
    file = desk / "m/model.safetensors"
    if file.read_bytes() != b"old":
        check_average(load_file(file), a, [b])
        assert "no output" not in err
    assert not list(desk.folder.glob(".lsmerge*"))


def test_a_result_whose_name_is_no_text(desk):
    a = llama(layers=1)
    b = tuned(a)
    out = os.fsdecode(os.path.join(os.fsencode(desk.folder), b"o\xff"))
    code, _, err = desk.run(desk.model(a), desk.put(b), "-o", out, "--vae", "exact")
    assert code == 0, err
    os.rename(out, desk / "m")          # the library reads no such path
    check_average(load_file(desk / "m/model.safetensors"), a, [b])
    (desk / "m/README.md").read_text(encoding="utf-8")


# --- The command line -----------------------------------------------------------------
USAGE = {
    "half a flag": ["--lamb", "0.9"], "half a switch": ["--forc"],
    "an empty report": ["--report", ""], "an empty VAE": ["--vae", ""],
    "an empty pattern": ["--select", ""], "an empty base": ["--base", ""],
    "an empty lambda": ["--lam", ""], "half a pattern": ["--select", "(?i"],
    "an endless repetition": ["--select", "a{99999999999}"],
    "3,000 brackets": ["--select", "(" * 3000 + ")" * 3000],
    "no number": ["--lam", "nan"], "an endless seed": ["--seed", "9" * 5000],
    "no bound": ["--max-nmse", "nan"],
    "no base": ["--operator", "task-arithmetic", "--lam=2"],
    "a base for nothing": ["--base", "b.safetensors"],
    "a codec for weights": ["--space", "weight", "--vae", "exact"],
    "an alignment of controls": ["--control", "zero", "--align", "gaussian"],
    "draws that come back": ["--lam", "0", "--residual", "--samples", "2"],
}


@pytest.mark.parametrize("case", USAGE)
def test_what_the_command_line_alone_decides(desk, case):
    a = llama(layers=1)
    pair = [desk.put(a), desk.put(tuned(a))]
    with pytest.raises(SystemExit) as ended:
        run(*pair, "-o", desk / "m.safetensors", *USAGE[case])
    err = desk.capsys.readouterr().err
    assert ended.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and "; fix: " in err
    assert not (desk / "m.safetensors").exists()


def test_a_base_may_be_called_none(desk, monkeypatch):
    monkeypatch.chdir(desk.folder)
    a = llama(layers=1)
    b = tuned(a)
    base = tuned(a, seed=3)
    desk.put(base, "none")
    flags = ["--base", "none", "--operator", "task-arithmetic", "--lam", "0.5"]
    got, _ = desk.merged(desk.put(a), desk.put(b), *flags)
    for name, tensor in a.items():
        wanted = tensor.double() + 0.5 * (b[name].double() - base[name].double())
        torch.testing.assert_close(got[name].double(), wanted, rtol=0, atol=1e-6)


HALF = [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "x"},
        {"WORLD_SIZE": "x", "RANK": ""}]


@pytest.mark.parametrize("environment", HALF)
def test_half_a_launchers_environment(desk, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    a = llama(layers=1)
    check_siblings(desk, a, tuned(a))


NO_LAYERS = {NORM: drawn(8), EMBED: drawn(8, 8)}
NOTHING = {
    "embeddings across shapes": (llama(layers=1), llama(layers=1, hidden=24), "embed"),
    "vectors only": (llama(layers=1), llama(layers=1), "norm"),
    "no layers": (NO_LAYERS, NO_LAYERS, ""),
    "whole numbers": ({"ids": torch.arange(4)}, {"ids": torch.arange(4)}, ""),
}


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_left_to_encode(desk, case):
    """A plain result, or one line."""
    a, b, pattern = NOTHING[case]
    flags = []
    if pattern:
        flags = ["--select", pattern]
    pair = [desk.put(a), desk.put(b)]
    output = ["-o", desk / "m.safetensors", "--vae", "exact"]
    code, _, err = desk.run(*pair, *output, *flags)
    if code == 0:
        assert load_file(desk / "m.safetensors").keys() == a.keys()
    else:
        assert code == 1 and err.startswith("error: ") and err.count("\n") == 1


# --- What the user is told ------------------------------------------------------------
def permuted(tensors):
    """The same function, its neurons in another order."""
    result = dict(tensors)
    for i in range(2):
        order = torch.randperm(48, generator=torch.Generator().manual_seed(i))
        name = f"model.layers.{i}.mlp."
        for role in ("gate_proj.weight", "up_proj.weight"):
            result[name + role] = result[name + role][order]
        result[name + "down_proj.weight"] = result[name + "down_proj.weight"][:, order]
    return result


def flipped(tensors):
    return {name: -tensor for name, tensor in tensors.items()}


HARMFUL = {
    "strangers": lambda a: llama(seed=77),
    "strangers of another shape": lambda a: llama(hidden=24, seed=77),
    "neurons in another order": lambda a: permuted(tuned(a, std=1e-3)),
    "the other sign": lambda a: flipped(a),
}


@pytest.mark.parametrize("case", HARMFUL)
def test_a_merge_that_does_harm_is_warned_of(desk, case):
    a = llama()
    desk.merged(desk.put(a), desk.put(HARMFUL[case](a)))
    lines = desk.err.splitlines()
    assert lines[0].startswith("warning: ") and lines[-1].startswith("warning: ")


def test_no_warning_for_siblings(desk):
    a = llama()
    target = desk.put(a)
    sibling = desk.put(tuned(a))
    deeper = desk.put(tuned(a) | layer_as(a, 0, "model.layers.2."))
    for arguments in ([sibling], [deeper], ["--roundtrip"], []):
        desk.merged(target, *arguments)
        assert desk.err == ""


def test_a_codec_coarser_than_the_difference_is_said(desk):
    a = llama()
    target = desk.put(a)
    light = desk.put(tuned(a, std=1e-7))
    desk.merged(target, light, vae=REFERENCE)
    assert "--residual" in desk.err
    for arguments in ([light, "--residual"], [desk.put(tuned(a))]):
        desk.merged(target, *arguments, vae=REFERENCE)
        assert "--residual" not in desk.err


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_each_source_is_judged_by_itself(desk, order):
    """A stranger of another shape, of weight 0, changes nothing for the sibling."""
    a = llama()
    b = tuned(a)
    sources = [(desk.put(b), "0.5"), (desk.put(llama(layers=1, hidden=24)), "0")]
    paths = [sources[k][0] for k in order]
    lam = ",".join(sources[k][1] for k in order)
    got, _ = desk.merged(desk.put(a), *paths, "--lam", lam)
    wanted = average(a, [b])
    for name in a:
        if "layers" in name and a[name].dim() > 1:
            error = (got[name].double() - wanted[name]).abs().max()
            assert error < 1e-6, name


def test_the_plan_says_the_sum_first_and_what_met_nobody_last(desk):
    a = llama()
    extra = layer_as(a, 0, "model.layers.2.")
    pair = [desk.put(a | extra), desk.put(prefixed(tuned(a), "module."))]
    before = desk.listing()
    code, out, _ = desk.run(*pair, "-o", desk / "m", "--vae", "exact", "--dry-run")
    assert code == 0 and desk.listing() == before
    lines = out.splitlines()
    head = "\n".join(lines[:6])
    for word in ("same-shape", "lerp", "0.5", "exact", "14 ", "bytes"):
        assert word in head, word
    assert any("module." + UP in line and " " + UP in line for line in lines)
    last = "\n".join(lines[-len(extra):])
    for name in extra:
        assert name in last


# Arguments behind two good models, words of the line, words that are not in it.
MESSAGES = {
    "a hub's id": (["org/name"], ["downloaded"], []),
    "an old report": (["--report", "old.json"], ["old.json"], ["another -o"]),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages_name_the_thing(desk, monkeypatch, case):
    monkeypatch.chdir(desk.folder)
    arguments, words, others = MESSAGES[case]
    (desk / "old.json").write_text("x")
    a = llama(layers=1)
    pair = [desk.put(a), desk.put(tuned(a))]
    err = desk.refuse(*pair, *arguments, "-o", desk / "m.safetensors", words=words)
    for word in others:
        assert word not in err
