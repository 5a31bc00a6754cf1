"""merge.py and lsmerge.py end to end. With an exact codec the pipeline is plain
arithmetic, which the tests do by hand; what the codec loses, what the aligners move,
what a file says, likewise. Who meets whom: by names in test_align.py, kind by kind in
test_kinds.py; how things go wrong in test_faults.py."""
import hashlib
import json
import math
import os
import re
import signal
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file

import align
import chunking as ck
import lsmerge
import merge
import train
from conftest import generator, llama_tensors, relative, save
from lsmerge import Codec

NAME = "model.layers.1.mlp.up_proj.weight"          # the last layer of the target ...
PARTNER = "model.layers.2.mlp.up_proj.weight"       # ... and of the deeper source


def run(*arguments):
    return ck.command(lambda: merge.main([*map(str, arguments), "--quiet"]))


def merged(tmp_path, *arguments, name="m.safetensors"):
    """(tensors, report) of a run that must succeed."""
    report = tmp_path / "r.json"
    output = ["-o", tmp_path / name, "--report", report, "--force"]
    assert run(*arguments, *output) == 0
    return load_file(tmp_path / name), json.loads(report.read_text())


def combination(coefficients, tensors):
    """sum_i c_i w_i of every tensor, in float64, in the dtype of the first."""
    return {name: sum(c * t[name].double()
                      for c, t in zip(coefficients, tensors)).to(w.dtype)
            for name, w in tensors[0].items()}


def assert_models_close(got, expected, rtol=1e-6):
    """Relative to each tensor's largest weight: float32 algebra of some 20 steps."""
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        wide = tensor.double()
        torch.testing.assert_close(got[name].double(), wide, rtol=0,
                                   atol=rtol * wide.abs().max().item(),
                                   msg=lambda m: f"{name}: {m}")


def assert_equal(got, expected):
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def is_encoded(name, tensor):
    return "layers" in name and tensor.ndim == 2


# --- Equal shapes ---------------------------------------------------------------------
@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("source", ["b", "half"])
def test_an_exact_codec_gives_plain_averaging(models, tmp_path, lam, source):
    """Of relatives and of strangers, of one dtype and of two; NMSE below 1e-12."""
    a, b = load_file(models["a"]), load_file(models[source])
    way = [models["a"], models[source], "--lam", lam, "--vae", "exact"]
    got, report = merged(tmp_path, *way)
    assert_models_close(got, combination([1 - lam, lam], [a, b]))
    assert report["kind"] == "same-shape" and report["lambda"] == [lam]
    assert report["align"] == "none" and report["ratio"] == 1
    assert report["codec"] == "exact"
    values = [gate["value"] for gate in report["gates"]]
    assert len(values) == 4 and max(report["roundtrip"]["nmse"], *values) < 1e-12
    assert report["distance"]["to_average"] < 1e-6 and report["unpaired"] == []


def test_merge_state_dicts_is_the_command(models, tmp_path):
    """New tensors, in the target's shapes and dtypes; the user's are not written to."""
    a, b = load_file(models["a"]), load_file(models["b"])
    a[NAME] = a[NAME].double()
    a["extra.ids"] = torch.arange(3)
    before = [{name: w.clone() for name, w in tensors.items()} for tensors in (a, b)]
    target = save(tmp_path / "a.safetensors", a)
    for flags in (dict(), dict(lam=0.3, vae="exact"), dict(samples=2, seed=3),
                  dict(select="mlp", vae=models["lossy"], max_nmse=2)):
        words = [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()]
        expected, _ = merged(tmp_path, target, models["b"], *words)
        assert_equal(merge.merge_state_dicts(a, b, **flags), expected)
    for tensors, copies in zip((a, b), before):
        assert_equal(tensors, copies)
    assert len(merge.merge_state_dicts(a)) == len(a)        # with itself


def test_n_models_and_the_default_lambda_is_the_uniform_share(models, tmp_path):
    tensors = [load_file(models["a"]), load_file(models["b"]), llama_tensors(7)]
    parents = models["a"], models["b"], save(tmp_path / "c.safetensors", tensors[2])
    got, report = merged(tmp_path, *parents)
    assert_models_close(got, combination([1 / 3] * 3, tensors))
    assert report["lambda"] == pytest.approx([1 / 3, 1 / 3])
    for lam, coefficients in (("0.5,0.2", [0.3, 0.5, 0.2]),
                              ("0.25", [0.5, 0.25, 0.25])):
        got, _ = merged(tmp_path, "--lambda", lam, *parents)    # in any order
        assert_models_close(got, combination(coefficients, tensors))


def test_weight_space_is_exact_arithmetic(models, tmp_path):
    a, b = load_file(models["a"]), load_file(models["b"])
    got, report = merged(tmp_path, models["a"], models["b"], "--space", "weight")
    assert_equal(got, combination([0.5, 0.5], [a, b]))
    assert report["distance"]["to_average"] == 0 and report["ratio"] is None
    assert report["gates"] == [] and report["roundtrip"]["nmse"] is None
    assert report["codec"] == "none"


def test_equal_shapes_share_pooled_statistics(models, tmp_path):
    """By hand with a lossy codec, whose result depends on the unit: numpy's mean and
    deviation of both parents' weights together. So the parents may be exchanged."""
    a, b = load_file(models["a"]), load_file(models["b"])
    b = {name: 3 * w + 0.1 for name, w in b.items()}
    other = save(tmp_path / "b.safetensors", b)
    flags = ["--vae", models["lossy"], "--max-nmse", 2]
    codec = Codec.load(models["lossy"])
    got, _ = merged(tmp_path, models["a"], other, "--lam", 0.4, *flags)
    both = np.concatenate([w[NAME].double().numpy() for w in (a, b)])
    mean, std = both.mean(), both.std()
    with torch.no_grad():
        x = [((w[NAME].double() - mean) / std).float().reshape(-1, 16, 64)
             for w in (a, b)]
        z = 0.6 * codec.vae.encode(x[0]).mu_BTZ + 0.4 * codec.vae.encode(x[1]).mu_BTZ
        expected = (codec.vae.decode(z) * std + mean).reshape(a[NAME].shape)
    assert_models_close({NAME: got[NAME]}, {NAME: expected}, rtol=1e-5)
    mixed, _ = merged(tmp_path, models["a"], other, *flags)
    swapped, _ = merged(tmp_path, other, models["a"], *flags)
    assert_models_close(mixed, swapped, rtol=1e-5)


def test_a_constant_needs_no_codec(models, tmp_path):
    """Where it is constant in all parents it is averaged; where only the target's is,
    and shapes differ, it stays."""
    a, b = load_file(models["a"]), load_file(models["b"])
    a[NAME], b[NAME] = torch.full((96, 64), 0.1), torch.zeros(96, 64)
    paths = [save(tmp_path / f"{i}.safetensors", t) for i, t in enumerate((a, b))]
    got, report = merged(tmp_path, *paths, "--vae", models["lossy"], "--max-nmse", 2)
    assert torch.equal(got[NAME], torch.full((96, 64), 0.05))
    assert report["tensors"]["encoded"] == 13 and report["tensors"]["averaged"] == 7
    got, report = merged(tmp_path, paths[0], models["big"])
    assert torch.equal(got[NAME], a[NAME]) and report["tensors"]["encoded"] == 13
    got, _ = merged(tmp_path, paths[0])                     # with itself
    assert torch.equal(got[NAME], a[NAME])


def test_select_leaves_everything_else_the_targets(models, tmp_path):
    a, average = load_file(models["a"]), merged(tmp_path, models["a"], models["b"])[0]
    for pattern, count in [("mlp", 6), ("embed", 1), (r"layers\.1\..*_proj", 7),
                           ("zebra", 0)]:
        got, report = merged(tmp_path, models["a"], models["b"], "--select", pattern)
        assert report["tensors"]["encoded"] == count
        assert report["tensors"]["averaged"] == 0
        chosen = {name for name in a if re.search(pattern, name)}
        assert_equal({n: t for n, t in got.items() if n not in chosen},
                     {n: t for n, t in a.items() if n not in chosen})
        assert_models_close({n: got[n] for n in chosen},
                            {n: average[n] for n in chosen})


def test_the_target_decides_dtypes_and_integers_stay(models, tmp_path):
    half, a = load_file(models["half"]), load_file(models["a"])
    extra = {"position_ids": torch.arange(5), "mask": torch.tensor([True, False])}
    target = save(tmp_path / "t.safetensors", half | extra)
    other = {"position_ids": torch.arange(5) + 1, "mask": torch.tensor([False, False])}
    got, report = merged(tmp_path, target, save(tmp_path / "s.safetensors", a | other))
    assert_equal({name: got.pop(name) for name in extra}, extra)
    # bf16 keeps 8 bits: half a unit in the last place is 2^-9 of the weight.
    assert_models_close(got, combination([0.5, 0.5], [half, a]), rtol=2 ** -8)
    assert report["tensors"]["copied"] == 2 and report["unpaired"] == []


def test_layers_of_a_relative_with_more_of_them_meet_by_index(tmp_path):
    """By their weights. Strangers of other depth meet by depth, as the paper's do."""
    whole = llama_tensors(8, layers=4)
    deep = save(tmp_path / "deep.safetensors", relative(whole, 9))
    upper = ("model.layers.2", "model.layers.3")
    few = {n: w for n, w in whole.items() if not n.startswith(upper)}
    shallow = save(tmp_path / "shallow.safetensors", few)
    for target, source in ((shallow, deep), (deep, shallow)):
        got, report = merged(tmp_path, target, source)
        pair = [load_file(path) for path in (target, source)]
        assert report["kind"] == "same-shape" and report["alignment"] == []
        assert set(report["unpaired"]) == set(pair[0]) - set(few)
        both = [{n: tensors[n] for n in few} for tensors in pair]
        assert_models_close({n: got[n] for n in few}, combination([0.5, 0.5], both))
    other = llama_tensors(1, layers=4)
    got, report = merged(tmp_path, shallow, save(tmp_path / "o.safetensors", other))
    expected = (few[NAME] + other[NAME.replace("1", "3")]) / 2
    assert_models_close({NAME: got[NAME]}, {NAME: expected})
    assert report["kind"] == "same-shape" and report["lambda"] == [0.5]


def test_roles_without_a_partner_are_copied_and_named(models, tmp_path):
    """Fused qkv against split projections, a mixture of experts, an unknown role."""
    target, odd = load_file(models["a"]), {}
    for i in range(2):
        p = f"model.layers.{i}."
        parts = [target.pop(p + f"self_attn.{k}_proj.weight") for k in "qkv"]
        odd |= {p + "mlp.experts.0.up_proj.weight": torch.randn(32, 64),
                p + "zebra.weight": torch.randn(64, 64),
                p + "self_attn.qkv_proj.weight": torch.cat(parts)}
    path = save(tmp_path / "t.safetensors", target | odd)
    got, report = merged(tmp_path, path, models["b"])
    assert report["kind"] == "same-shape" and report["tensors"]["encoded"] == 8
    assert set(report["unpaired"]) == set(odd)
    assert_equal({name: got[name] for name in odd}, odd)


# --- What the codec loses: residual, round trip, the gate -----------------------------
@pytest.mark.parametrize("source", ["b", "big", None])
def test_residual_at_lambda_0_is_the_target_bit_for_bit(models, tmp_path, source):
    """Whatever the VAE."""
    way = ["--roundtrip"] if source is None else [models[source], "--lam", 0]
    for name in ("a", "half"):
        for codec in (models["lossy"], "exact"):
            flags = [*way, "--vae", codec, "--residual"]
            if source == "big" and codec == models["lossy"]:
                continue            # the codec must carry an aligned source: see below
            got, report = merged(tmp_path, models[name], *flags)
            assert_equal(got, load_file(models[name]))
            assert report["distance"]["to_target"] == 0


def test_residual_follows_its_formula(models, tmp_path):
    """W^ = D(z_lambda) + sum c (W - D(z)), by hand: the parents' pooled unit, the VAE
    itself. Whoever enters unaligned gets back what was lost: no gate."""
    a, b = (load_file(models[key])[NAME].double() for key in "ab")
    vae = Codec.load(models["lossy"]).vae
    both = np.concatenate([a.numpy(), b.numpy()])
    mean, std = both.mean(), both.std()

    def encode(w): return vae.encode(((w - mean) / std).float().view(-1, 16, 64)).mu_BTZ

    def decode(z): return vae.decode(z).double().reshape(96, 64) * std + mean
    with torch.no_grad():
        z_a, z_b = encode(a), encode(b)
        expected = (decode(0.7 * z_a + 0.3 * z_b) + 0.7 * (a - decode(z_a))
                    + 0.3 * (b - decode(z_b)))
    flags = ["--vae", models["lossy"], "--lam", 0.3, "--residual"]
    got, report = merged(tmp_path, models["a"], models["b"], *flags)
    assert_models_close({NAME: got[NAME]}, {NAME: expected.float()}, rtol=1e-5)
    assert (decode(z_a) - a).abs().max() > 0.1 * a.abs().max() and report["gates"] == []


def test_residual_across_shapes_keeps_the_targets_share(models, tmp_path):
    """Only the target enters unaligned: W^ = D(z) + (1 - lam) (W_t - D(z_t)). The codec
    must carry the source's weights, and only those."""
    lossy = ["--vae", models["lossy"]]
    way = [models["a"], models["big"], *lossy, "--align", "gaussian", "--lam", 0.2]
    without, _ = merged(tmp_path, *way, "--max-nmse", 2)
    trip, _ = merged(tmp_path, models["a"], "--roundtrip", *lossy, "--max-nmse", 2)
    assert run(*way, "--residual", "-o", tmp_path / "x.safetensors") == 1
    two = [*way, "--source-vae", "exact", "--residual", "-o",
           tmp_path / "x.safetensors"]
    assert run(*two) == 0
    w = load_file(models["a"])[NAME]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "MAX_NMSE", 2)
        got, _ = merged(tmp_path, *way, "--residual")
    expected = without[NAME] + 0.8 * (w - trip[NAME])
    assert_models_close({NAME: got[NAME]}, {NAME: expected})


def test_the_round_trip_reports_the_codecs_error(models, tmp_path):
    way = ["--roundtrip", "--vae", models["lossy"], "--max-nmse", 2]
    got, report = merged(tmp_path, models["a"], *way)
    a, nmse = load_file(models["a"]), {}
    for name, tensor in a.items():
        if is_encoded(name, tensor):
            lost = (got[name] - tensor).double().square().mean()
            nmse[name] = (lost / tensor.double().var(correction=0)).item()
        else:
            assert torch.equal(got[name], tensor)
    total = sum(nmse[name] * a[name].numel() for name in nmse)
    mean, worst = total / sum(a[name].numel() for name in nmse), max(nmse, key=nmse.get)
    assert report["roundtrip"] == {"nmse": pytest.approx(mean, rel=1e-4), "worst": {
        "name": worst, "nmse": pytest.approx(nmse[worst], rel=1e-4)}}
    gate = report["gates"][0]
    assert gate["name"].startswith("NMSE") and "a.safetensors" in gate["name"]
    assert gate["passed"] and gate["bound"] == 2
    assert gate["value"] == report["roundtrip"]["nmse"]
    assert report["kind"] == "self" and report["lambda"] == []
    assert report["samples"] == 0


def test_the_gate_refuses_before_anything_is_merged(models, tmp_path, monkeypatch,
                                                    capsys):
    (tmp_path / "m.safetensors").write_bytes(b"old")
    monkeypatch.setattr(merge, "merge_tensor", lambda *_: pytest.fail("it merges"))
    monkeypatch.setattr(merge, "create", lambda *_, **__: pytest.fail("it writes"))
    for inputs in ([models["a"], "--roundtrip"], [models["a"], models["b"]]):
        flags = ["-o", tmp_path / "m.safetensors", "--force", "--report",
                 tmp_path / "r"]
        assert run(*inputs, "--vae", models["lossy"], *flags) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert "; fix: " in error and re.search(r"NMSE 0\.[67]\d\D+0.001", error)
    assert (tmp_path / "m.safetensors").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.safetensors"]


def pca_vae(path, model, ratio):
    """The best linear code of a model at a ratio, without training."""
    flags = f"--init pca --blocks 0 --ratio {ratio} --steps1 0 --steps2 0 --holdout 0"
    assert train.main(["--quiet", str(model), "-o", str(path), *flags.split()]) == 0
    return path


def test_the_gate_sees_the_end_of_a_large_tensor(tmp_path):
    """It once measured only the first 65,536 weights. The start of this tensor is easy
    at r = 4, its end is noise: the sample, spread evenly, finds what the whole
    loses."""
    w = torch.randn(1024, 256, generator=generator())
    steps = torch.linspace(0.5, 1, 256)
    w[:512] = torch.randn(512, 256, generator=generator(1))[:, :1] * steps
    path = save(tmp_path / "t.safetensors", {NAME: w})
    vae = pca_vae(tmp_path / "v.safetensors", path, 4)
    got, report = merged(tmp_path, path, "--roundtrip", "--vae", vae, "--max-nmse", 1)
    error = (got[NAME] - w).double().square().mean().item()
    true = error / w.double().var(correction=0).item()
    # 64 of 256 windows: their mean is off by 5 %, where half of them have twice the
    # error
    assert report["roundtrip"]["nmse"] == pytest.approx(true, rel=0.05) and true > 0.1


def test_the_gate_minds_the_typical_weight(models, tmp_path, capsys):
    """Beside one outlier all other weights may be lost, at an NMSE of nothing: the
    variance is the outlier's alone."""
    w = {NAME: load_file(models["a"])[NAME]}
    w[NAME][3, 4] = 5000 * w[NAME].std()
    path = save(tmp_path / "t.safetensors", w)
    vae = pca_vae(tmp_path / "v.safetensors", path, 1.1)
    capsys.readouterr()
    assert run(path, "--roundtrip", "--vae", vae, "-o", tmp_path / "m.safetensors") == 1
    error = capsys.readouterr().err
    assert "typical error" in error and repr(NAME) in error and error.count("\n") == 1
    got, report = merged(tmp_path, path, "--roundtrip", "--vae", vae, "--max-nmse", 9)
    lost = (got[NAME] - w[NAME]).double().square().median()
    typical = (w[NAME].double() - w[NAME].double().mean()).square().median()
    value = max(gate["value"] for gate in report["gates"])
    assert value == pytest.approx((lost / typical).item(), rel=0.02) and value > 2e-3
    assert report["roundtrip"]["nmse"] < 1e-3


# --- Report, bytes, threads -----------------------------------------------------------
def test_report_counts_and_distances(models, tmp_path):
    a, b = load_file(models["a"]), load_file(models["b"])
    way = [models["a"], models["b"], "--lam", 0.25, "--seed", 3]
    got, report = merged(tmp_path, *way)
    encoded = [name for name, tensor in a.items() if is_encoded(name, tensor)]
    assert report["tensors"] == {
        "encoded": 14, "averaged": 6, "copied": 0, "total": 20,
        "weights_encoded": sum(a[name].numel() for name in encoded),
        "weights_total": sum(tensor.numel() for tensor in a.values())}

    def flat(tensors):
        return torch.cat([tensors[name].double().reshape(-1) for name in encoded])

    for value, other in [(report["distance"]["to_target"], a),
                         (report["distance"]["to_source"][0], b)]:
        expected = (flat(got) - flat(other)).norm() / flat(a).norm()
        assert value == pytest.approx(expected.item(), rel=1e-5)
    assert set(report) >= {
        "version", "inputs", "output", "seed", "samples", "kind", "ratio", "lambda",
        "operator", "space", "codec", "align", "control", "tensors", "roundtrip",
        "distance", "alignment", "unpaired", "gates", "seconds"}
    assert report["inputs"] == ["a.safetensors", "b.safetensors"]
    assert report["seed"] == 3
    assert report["output"] == "m.safetensors" and report["version"] == merge.VERSION
    assert report["alignment"] == [] and report["control"] is None
    assert report["codec"] == "vae.safetensors"
    for gate in report["gates"]:
        assert gate["passed"] and gate["value"] <= gate["bound"]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


CASES = {"equal shapes": ["b"], "draws": ["b", "--samples", "2"],
         "sinkhorn": ["big", "--align", "sinkhorn"],
         "noise": ["big", "--control", "noise"]}


@pytest.mark.parametrize("case", CASES)
def test_same_command_same_bytes_whatever_the_threads(
        models, tmp_path, monkeypatch, case):
    """As each tensor is computed by a single one."""
    source, *flags = CASES[case]
    threads, sums, real = torch.get_num_threads(), {}, merge.merge_tensor

    def merge_tensor(*arguments):
        assert torch.get_num_threads() == 1
        return real(*arguments)
    monkeypatch.setattr(merge, "merge_tensor", merge_tensor)
    try:
        for name, count in (("x", 1), ("y", 3)):
            torch.set_num_threads(count)
            merged(tmp_path, models["a"], models[source], *flags, name=name)
            sums[name] = digest(tmp_path / name)
    finally:
        torch.set_num_threads(threads)
    assert len(set(sums.values())) == 1
    got, _ = merged(tmp_path, models["a"], models[source], *flags, "--seed", 1)
    same = torch.equal(got[NAME], load_file(tmp_path / "x")[NAME])
    assert same == (case not in ("draws", "noise"))         # the seed decides all noise


@pytest.mark.parametrize("way", [["b"], ["big", "--align", "mean"],
                                 ["big", "--align", "gaussian"]], ids=" ".join)
def test_pieces_do_not_show(models, tmp_path, monkeypatch, way):
    """A tensor in many pieces equals one merged whole, but for the last bits of a
    product, which a map fitted on 96 points in 64 dimensions raises."""
    source, *flags = way
    whole, _ = merged(tmp_path, models["a"], models[source], "--lam", 0.3, *flags)
    monkeypatch.setattr(lsmerge, "BATCH", 1)
    monkeypatch.setattr(lsmerge, "PIECE", 2048)
    monkeypatch.setattr(ck.spans, "__defaults__", (1000,))
    cut, report = merged(tmp_path, models["a"], models[source], "--lam", 0.3, *flags)
    assert_models_close(cut, whole, rtol=1e-3 if "gaussian" in flags else 1e-5)
    assert report["roundtrip"]["nmse"] < 1e-12


# --- Training on the fly --------------------------------------------------------------
@dataclass(frozen=True)
class Short(train.Schedule):
    steps1: int = 4
    steps2: int = 2
    batch: int = 4


def test_init_random_trains_on_the_inputs_and_may_keep_it(
        models, tmp_path, monkeypatch, capsys):
    """The training is seeded; the VAE that is kept gives the same bytes; the gate
    judges it."""
    monkeypatch.setattr(train, "Schedule", Short)
    kept = tmp_path / "v.safetensors"
    inputs = [models["a"], models["b"], "--max-nmse", 9]
    for name, flags in [("x", ["--save-vae", kept]), ("y", [])]:
        got, report = merged(tmp_path, *inputs, "--init", "random", *flags, name=name)
    again, _ = merged(tmp_path, *inputs, "--vae", kept, name="z")
    assert digest(tmp_path / "x") == digest(tmp_path / "y")
    assert_equal(got, again)
    out = capsys.readouterr().out
    assert "stage 1: 4 steps" in out and "stage 2: 2 steps" in out
    assert Codec.load(kept).vae.config.init == "random"
    assert Codec.load(kept).record["trained_on"] == ["a.safetensors", "b.safetensors"]
    # hardly trained
    assert run(*inputs[:2], "--init", "random", "-o", tmp_path / "n") == 1
    assert "NMSE" in capsys.readouterr().err and not (tmp_path / "n").exists()


def test_ctrl_c_in_such_a_training_writes_nothing(models, tmp_path, monkeypatch,
                                                  capsys):
    monkeypatch.setattr(train, "Schedule", Short)
    monkeypatch.setattr(train, "train_step",
                        lambda *_: signal.raise_signal(signal.SIGINT))
    assert run(models["a"], models["b"], "--init", "random", "-o",
               tmp_path / "m") == 130
    assert capsys.readouterr().err.count("error: ") == 1
    assert not list(tmp_path.iterdir())


# --- The command line -----------------------------------------------------------------
USAGE = """
a b: --lam=2 | --lam=-1 | --lam=nan | --lam=x | --lam=0.1,0.2 | --lam= | --operator=mean
a b: --space=weight --residual | --space=weight --max-nmse=1
a b: --space=weight --vae=exact | --space=weight --dtype=bfloat16
a b: --space=weight --align=mean | --space=weight --samples=2
a b: --space=weight --control=zero | --space=weight --init=random
a b: --space=weight --epsilon=1 | --max-nmse=0 | --max-nmse=nan | --max-nmse=inf
a b: --residual --max-nmse=1 | --residual --samples=2 | --roundtrip | --bogus
a b: --vae=v --init=random | --save-vae=w | --init=pca | --init=random --source-vae=v
a b: --device=tpu | --dtype=float16 | --seed=-1 | --seed=x | --seed=4294967296
a b: --dry-run --report=r | --dry-run --init=random --save-vae=v | --epsilon=0.1
a b: --align=sinkhorn --epsilon=0 | --align=sinkhorn --epsilon=nan
a b: --align=gaussian --epsilon=0.1 | --align=ot | --align=units | --control=mean
a b: --control=zero --align=mean | --samples=-1 | --samples=4097 | --samples=1.5
a b: --lamb=0.9 | --op=soup | --report= | --vae= | -o= | --select= | --base=
a b: --source-vae= | --select=( | --select=a{99999999999} | --operator=soup --lam=0.5
a b: --base=x | --operator=task-arithmetic | --operator=task-arithmetic --lam=2
a b: --operator=task-arithmetic --base=x --lam=10.1 | --operator=slerp --align=gaussian
a b: --operator=slerp --samples=2 | --operator=slerp --control=zero
a b c: --operator=slerp | --lam=0.6,0.6 | --lam=0.5,0.5,0.5
a: --lam=0.5 | --operator=soup | --space=weight | --align=mean | --control=zero
a: --source-vae=v | --roundtrip --samples=3 | --base=x
"""


def usage_lines():
    for line in USAGE.strip().splitlines():
        models, cases = line.split(": ")
        for case in cases.split(" | "):
            yield models, case
    yield "a b", "--select=" + "(" * 3000 + ")" * 3000
    yield "", ""


@pytest.mark.parametrize("names, flags", [*usage_lines()], ids=lambda text: text[:40])
def test_what_the_command_line_alone_decides_exits_2(models, tmp_path, names, flags,
                                                     capsys):
    """No abbreviations, no empty values (an unset shell variable), no flag that would
    change nothing. One line, and nothing is written."""
    paths = [models.get(name, models["a"]) for name in names.split()]
    with pytest.raises(SystemExit) as caught:
        run(*paths, "-o", tmp_path / "m.safetensors", *flags.split())
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ")
    assert error.count("\n") == 1
    assert "; fix: " in error and not list(tmp_path.iterdir())


# --- Different shapes -----------------------------------------------------------------
def cross(models, tmp_path, *flags):
    return merged(tmp_path, models["a"], models["big"], *flags)


def standardised(path, name):
    """(chunks of 64 of the standardised tensor, its scale, its mean), by hand."""
    w = load_file(path)[name].double()
    std = w.std(correction=0)
    return ((w - w.mean()) / std).reshape(-1, 64), std, w.mean()


def projection_matrix(n_source, n_target):
    """P[j, i] = n_t |[j/n_t, (j+1)/n_t) n [i/n_s, (i+1)/n_s)|, entry by entry."""
    P = torch.zeros(n_target, n_source, dtype=torch.float64)
    for j in range(n_target):
        for i in range(n_source):
            shared = min((j + 1) / n_target, (i + 1) / n_source) - max(
                j / n_target, i / n_source)
            P[j, i] = n_target * max(0.0, shared)
    return P


def test_report_pairs_and_bookkeeping_across_shapes(models, tmp_path):
    got, report = cross(models, tmp_path)
    target = load_file(models["a"])
    assert report["kind"] == "cross-shape" and report["align"] == "gaussian"
    assert report["lambda"] == [0.1]
    counts = report["tensors"]
    assert (counts["encoded"], counts["averaged"], counts["copied"]) == (14, 0, 6)
    records = report["alignment"]
    assert {(r["layer"], r["source_layer"]) for r in records} == {(0, 0), (1, 2)}
    assert len(records) == 14 and {r["role"] for r in records} == {
        "q", "k", "v", "o", "gate", "up", "down"}
    for r in records:
        assert set(r) >= {"iterations", "marginal_error", "n_over_d"}
        assert r["cost_after"] < 1e-6 < r["cost_before"]
        assert r["std_ratio"] == pytest.approx(1, abs=1e-3)
    assert report["distance"]["to_source"] == [None]
    assert report["distance"]["to_average"] is None and len(report["gates"]) == 4
    for name, tensor in target.items():
        assert got[name].shape == tensor.shape and got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor) != is_encoded(name, tensor)


@pytest.mark.parametrize("method", ["none", "mean", "gaussian"])
def test_across_shapes_against_the_formula_by_hand(models, tmp_path, method):
    """Chunks as latents: the codec is a rigid change of axes, which commutes with these
    maps."""
    z_t, scale, mean = standardised(models["a"], NAME)
    z_s, _, _ = standardised(models["big"], PARTNER)
    z = projection_matrix(len(z_s), len(z_t)) @ z_s
    if method != "none":
        z = z - z.mean(0) + z_t.mean(0)
    if method == "gaussian":
        S, T = (torch.cov(x.T, correction=0).numpy() for x in (z, z_t))
        root = scipy.linalg.sqrtm(S).real
        inverse, middle = np.linalg.inv(root), scipy.linalg.sqrtm(root @ T @ root).real
        A = torch.from_numpy(inverse @ middle @ inverse)
        z = z_t.mean(0) + (z - z_t.mean(0)) @ A
    expected = (0.7 * z_t + 0.3 * z) * scale + mean
    got, _ = cross(models, tmp_path, "--align", method, "--lam", 0.3)
    # float32; inverting the covariance of 96 points in 64 dimensions costs three digits
    rtol = 1e-3 if method == "gaussian" else 1e-6
    expected = expected.float().reshape(got[NAME].shape)
    assert_models_close({NAME: got[NAME]}, {NAME: expected}, rtol=rtol)


def test_auto_aligns_only_what_has_another_shape(models, tmp_path):
    """A relative beside a stranger of another shape enters as it is; so does a matrix
    of equal shape within a model of other shapes. One stranger once sent all through
    the Gaussian map."""
    a, b = load_file(models["a"])[NAME].double(), load_file(models["b"])[NAME].double()
    parents = [models[name] for name in ("a", "b", "big")]
    got, report = merged(tmp_path, *parents, "--lam", "0.5,0")
    assert_models_close({NAME: got[NAME]}, {NAME: ((a + b) / 2).float()}, rtol=1e-5)
    assert report["kind"] == "cross-shape" and len(report["alignment"]) == 14
    narrow = llama_tensors(1, kv=32)
    target = save(tmp_path / "t.safetensors", narrow)
    got, report = merged(tmp_path, target, models["b"], "--lam", 0.5)
    expected = (narrow[NAME].double() + b).float() / 2
    assert_models_close({NAME: got[NAME]}, {NAME: expected}, rtol=1e-5)
    assert {r["role"] for r in report["alignment"]} == {"k", "v"}
    norm = "model.norm.weight"          # not encoded, so the target's across shapes
    assert torch.equal(got[norm], narrow[norm])


def test_sinkhorn_is_cut_into_problems_that_fit_the_memory(models, tmp_path,
                                                           monkeypatch):
    """By hand: target and source in as many equal parts, each its own problem."""
    monkeypatch.setattr(lsmerge, "BATCH", 1)
    monkeypatch.setattr(lsmerge, "PIECE", 64 * 48)
    source = {name: 2 * t for name, t in llama_tensors(5).items()}
    path = save(tmp_path / "s.safetensors", source)
    way = ["--align", "sinkhorn", "--epsilon", "0.1", "--lam", 1]
    got, report = merged(tmp_path, models["a"], path, *way)
    w = load_file(models["a"])[NAME].double()
    both = torch.cat([w, source[NAME].double()])
    mean, std = both.mean(), both.std(correction=0)
    z_t, z_s = (((x.double() - mean) / std).reshape(-1, 64) for x in (w, source[NAME]))
    parts = []
    for j in range(0, 96, 48):
        cost = (z_s[j:j + 48, None] - z_t[j:j + 48]).square().sum(2)
        f, g, kernel = torch.zeros(48), torch.zeros(48), -cost / (0.1 * cost.max())
        for _ in range(500):
            f = -math.log(48) - torch.logsumexp(kernel + g, 1)
            g = -math.log(48) - torch.logsumexp(kernel + f[:, None], 0)
        parts.append(48 * (kernel + f[:, None] + g).exp().T @ z_s[j:j + 48])
    expected = (torch.cat(parts) * std + mean).float().reshape(got[NAME].shape)
    assert_models_close({NAME: got[NAME]}, {NAME: expected}, rtol=1e-4)
    assert all(r["marginal_error"] < 1e-5 for r in report["alignment"])


def test_an_aligner_of_a_fork_works_from_the_command_line(
        models, tmp_path, monkeypatch, capsys):
    """A function and a line in the table: here one that doubles what was projected. The
    help shows it, too."""
    def doubled(m):
        return align.Aligned(2 * m.z_projected_JZ, iterations=7, error=0.25)

    monkeypatch.setitem(align.ALIGNERS, "double", doubled)
    way = ["--align", "double", "--lam", 0.3]       # z: a rotation of the chunk
    got, report = cross(models, tmp_path, *way)
    z_t, scale, mean = standardised(models["a"], NAME)
    z_s, _, _ = standardised(models["big"], PARTNER)
    z = 0.7 * z_t + 0.3 * 2 * projection_matrix(len(z_s), len(z_t)) @ z_s
    expected = (z * scale + mean).float().reshape(got[NAME].shape)
    assert_models_close({NAME: got[NAME]}, {NAME: expected})
    assert report["align"] == "double" and report["alignment"][0]["iterations"] == 7
    assert report["alignment"][0]["marginal_error"] == 0.25
    with pytest.raises(SystemExit) as caught:
        merge.main(["--help"])
    assert caught.value.code == 0 and "double" in capsys.readouterr().out


def test_controls_hold_nothing_of_the_source(models, tmp_path):
    """Of whatever shape it is: norms and embeddings stay the target's, too."""
    z_t, scale, mean = standardised(models["a"], NAME)
    other = llama_tensors(11, hidden=96, layers=3, mlp=160, kv=48)
    other = save(tmp_path / "other.safetensors", other)
    for kind in ("zero", "noise", "shuffled"):
        flags = ["--control", kind, "--lam", 0.4]
        got, report = cross(models, tmp_path, *flags)
        assert report["control"] == kind
        found, _ = merged(tmp_path, models["a"], other, *flags)
        assert_equal(found, got)
        # Of equal shapes the unit is pooled.
        found, _ = merged(tmp_path, models["a"], models["b"], *flags)
        if kind == "shuffled":
            assert_models_close(found, got, rtol=1e-5)
        plain = {n: w for n, w in found.items() if not is_encoded(n, w)}
        assert_equal(plain, {n: got[n] for n in plain})
        z = (((got[NAME].double() - mean) / scale).reshape(-1, 64) - 0.6 * z_t) / 0.4
        if kind == "zero":
            expected = z_t.mean(0).expand_as(z)
            torch.testing.assert_close(z, expected, rtol=0, atol=1e-4)
        elif kind == "shuffled":                # the target's own chunks, each once
            near = torch.cdist(z, z_t).min(1)
            assert sorted(near.indices.tolist()) == list(range(len(z_t)))
            assert near.values.max() < 1e-3
        else:           # 96 x 64 numbers: five standard errors of a deviation
            assert z.std().item() == pytest.approx(
                z_t.std().item(), abs=5 / (2 * z.numel()) ** 0.5)
        again, _ = cross(models, tmp_path, *flags, "--seed", 1)
        assert torch.equal(again[NAME], got[NAME]) == (kind == "zero")


def encoded(vae, model, name):
    """(codec, its latents of a whole tensor)."""
    codec, file = Codec.load(vae), ck.Checkpoint(model)
    return codec, codec.encode(file.read(name), ck.measure(file, name))


def test_two_vaes_of_different_latent_sizes(models, tmp_path):
    """Latents are projected in both directions, by hand; for every aligner."""
    vae, flags = tmp_path / "v.safetensors", ["--chunk", "32", "--width", "64"]
    none = "--init pca --blocks 0 --steps1 0 --steps2 0 --quiet".split()
    train.main([str(models["a"]), "-o", str(vae), *none, *flags])
    before, w = load_file(models["a"])[NAME], [models["a"], models["big"]]
    way = [*w, "--vae", vae, "--source-vae", models["vae"]]
    for method in ("gaussian", "sinkhorn"):
        got, report = merged(tmp_path, *way, "--align", method)
        assert report["tensors"]["encoded"] == 14 and not torch.equal(got[NAME], before)
    got, _ = merged(tmp_path, *way, "--align", "none")
    mine, z_t = encoded(vae, models["a"], NAME)
    _, z_s = encoded(models["vae"], models["big"], PARTNER)
    z = projection_matrix(len(z_s), len(z_t)) @ z_s.double()
    z = z @ projection_matrix(64, 32).T
    stats = ck.measure(ck.Checkpoint(models["a"]), NAME)
    decoded = mine.decode((0.9 * z_t + 0.1 * z).float(), stats, stats.numel)
    assert_models_close({NAME: got[NAME]}, {NAME: decoded.reshape(stats.shape)})
    assert run(*way, "--residual", "--lam", 0, "-o", tmp_path / "m", "--force") == 0
    assert torch.equal(load_file(tmp_path / "m")[NAME], before)

