"""merge.py and lsmerge.py end to end. With an exact codec the pipeline is plain
arithmetic, done here by hand; what the codec loses, what the aligners move, likewise.
(Who meets whom: test_align.py, test_kinds.py. What goes wrong: test_faults.py.)"""
import re
import signal
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import align
import chunking as ck
import lsmerge
import merge
import train
from conftest import (A, B, BIG, HALF, assert_equal, assert_near, generator,
                      llama_tensors, overlap_matrix, textbook_plan, transport_of)
from lsmerge import Codec

NAME = "model.layers.1.mlp.up_proj.weight"          # the last layer of the target ...
PARTNER = "model.layers.2.mlp.up_proj.weight"       # ... and of the deeper source


def combination(coefficients, tensors):
    """sum_i c_i w_i of every tensor, in float64, in the dtype of the first."""
    result = {}
    for name, w in tensors[0].items():
        total = 0
        for c, each in zip(coefficients, tensors):
            total = total + c * each[name].double()
        result[name] = total.to(w.dtype)
    return result


ENCODED = [name for name, w in A.items() if "layers" in name and w.ndim == 2]


def check_tensor(got, expected, rtol=1e-6):
    expected = expected.float().reshape(got[NAME].shape)
    assert_near({NAME: got[NAME]}, {NAME: expected}, rtol)


def unit_of(*tensors):
    """(mean, standard deviation) of all their weights together, by numpy."""
    both = np.concatenate([w.double().numpy().ravel() for w in tensors])
    return both.mean(), both.std()


# --- Equal shapes ---------------------------------------------------------------------
@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("pair", [(A, B), (A, HALF), (HALF, A)],
                         ids=["relatives", "from half", "to half"])
def test_an_exact_codec_gives_plain_averaging(desk, lam, pair):
    """Of relatives and of strangers, in the target's dtype; NMSE below 1e-12."""
    got, report = desk.merged(*pair, "--lam", lam, "--vae", "exact")
    assert_near(got, combination([1 - lam, lam], pair))
    assert report["kind"] == "same-shape" and report["lambda"] == [lam]
    assert report["align"] == "none" and report["ratio"] == 1
    assert report["codec"] == "exact" and report["unpaired"] == []
    values = [gate["value"] for gate in report["gates"]]
    assert len(values) == 4 and max(report["roundtrip"]["nmse"], *values) < 1e-12
    # bfloat16 keeps 8 bits: here and there a last one falls the other way
    assert report["distance"]["to_average"] < 1e-4


def test_merge_state_dicts_is_the_command(models, desk):
    """New tensors, in the target's shapes and dtypes; the user's are not written to."""
    a = A | {NAME: A[NAME].double(), "extra.ids": torch.arange(3)}
    before = [{name: w.clone() for name, w in tensors.items()} for tensors in (a, B)]
    for flags in (dict(), dict(lam=0.3, vae="exact"), dict(samples=2, seed=3),
                  dict(select="mlp", vae=models["lossy"], max_nmse=2)):
        words = [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()]
        expected, _ = desk.merged(a, B, *words)
        assert_equal(merge.merge_state_dicts(a, B, **flags), expected)
    assert_equal(a, before[0])
    assert_equal(B, before[1])
    assert len(merge.merge_state_dicts(a)) == len(a)        # with itself
    expected, _ = desk.merged(a, B, "--operator", "task-arithmetic", "--base", HALF)
    flags = dict(base=HALF, operator="task-arithmetic")
    assert_equal(merge.merge_state_dicts(a, B, **flags), expected)


def test_merge_state_dicts_refuses_as_the_command_does(capsys):
    for flags in (dict(lam=2), dict(lamb=1), dict(operator="sum")):
        with pytest.raises(SystemExit, match="2"):
            merge.merge_state_dicts(A, A, **flags)
    with pytest.raises(ck.CheckpointError, match="NaN"):
        odd = {"odd": torch.full((2,), torch.nan)}
        merge.merge_state_dicts(A | odd, A | odd)


@pytest.mark.parametrize("pattern, count", [
    ("mlp", 6), ("embed", 1), (r"layers\.1\..*_proj", 7)])
def test_select_leaves_everything_else_the_targets(desk, pattern, count):
    got, report = desk.merged(A, B, "--select", pattern)
    assert report["tensors"]["encoded"] == count
    assert report["tensors"]["averaged"] == 0
    mean = combination([0.5, 0.5], [A, B])
    expected = {name: mean[name] for name in A if re.search(pattern, name)}
    assert_near(got, A | expected)
    for name in A.keys() - expected:
        assert torch.equal(got[name], A[name])


# --- What the codec loses: residual, round trip, the gate -----------------------------
@pytest.mark.parametrize("target", ["a", "half"])
@pytest.mark.parametrize("source, codec", [
    ("b", "lossy"), ("b", "exact"), ("big", "exact"), (None, "lossy"), (None, "exact")])
def test_residual_at_lambda_0_gives_the_target(models, desk, target, source, codec):
    way = ["--roundtrip"]
    if source:
        way = [models[source], "--lam", 0]
    way += ["--vae", models.get(codec, codec), "--residual"]
    got, report = desk.merged(models[target], *way)
    assert_equal(got, load_file(models[target]))
    assert report["distance"]["to_target"] == 0


def test_residual_follows_its_formula(models, desk):
    """W^ = D(z_lambda) + sum c (W - D(z)), in the parents' pooled unit; no gate."""
    vae = Codec.load(models["lossy"]).vae
    mean, std = unit_of(A[NAME], B[NAME])

    def decode(z):
        return vae.decode(z).double().reshape(96, 64) * std + mean
    z = 0
    lost = 0
    with torch.no_grad():
        for share, w in ((0.7, A[NAME].double()), (0.3, B[NAME].double())):
            x_BTC = ((w - mean) / std).float().view(-1, 16, 64)
            z_BTZ = vae.encode(x_BTC).mu_BTZ
            z += share * z_BTZ
            lost += share * (w - decode(z_BTZ))
        expected = decode(z) + lost
    flags = ["--vae", models["lossy"], "--lam", 0.3, "--residual"]
    got, report = desk.merged(A, B, *flags)
    check_tensor(got, expected, rtol=1e-5)
    assert lost.abs().max() > 0.1 * w.abs().max() and report["gates"] == []


def test_residual_across_shapes_keeps_the_targets_share(models, desk, monkeypatch):
    """Only the target enters unaligned: W^ = D(z) + (1 - lam) (W_t - D(z_t)). The codec
    must carry the source's weights, and only those."""
    lossy = ["--vae", models["lossy"]]
    way = [A, models["big"], *lossy, "--align", "gaussian", "--lam", 0.2]
    without, _ = desk.merged(*way, "--max-nmse", 2)
    trip, _ = desk.merged(A, "--roundtrip", *lossy, "--max-nmse", 2)
    desk.refuse(*way, "--residual", "-o", desk / "x.safetensors", words=["big", "NMSE"])
    desk.merged(*way, "--residual", "--source-vae", "exact")
    monkeypatch.setattr(merge, "MAX_NMSE", 2)
    got, _ = desk.merged(*way, "--residual")
    check_tensor(got, without[NAME] + 0.8 * (A[NAME] - trip[NAME]))


def test_the_round_trip_reports_the_codecs_error(models, desk):
    flags = ["--roundtrip", "--vae", models["lossy"], "--max-nmse", 2]
    got, report = desk.merged(A, *flags)
    for name in A.keys() - ENCODED:
        assert torch.equal(got[name], A[name])
    nmse = {}
    for name in ENCODED:
        lost = (got[name] - A[name]).double().square().mean()
        nmse[name] = (lost / A[name].double().var(correction=0)).item()
    weights = [A[name].numel() for name in ENCODED]
    mean = np.average([*nmse.values()], weights=weights)
    worst = max(nmse, key=nmse.get)
    trip = report["roundtrip"]
    assert trip["nmse"] == pytest.approx(mean, rel=1e-4)
    assert trip["worst"]["name"] == worst
    assert trip["worst"]["nmse"] == pytest.approx(nmse[worst], rel=1e-4)
    gate = report["gates"][0]
    assert gate["name"].startswith("NMSE") and gate["passed"] and gate["bound"] == 2
    assert gate["value"] == trip["nmse"]


def test_the_gate_refuses_before_anything_is_merged(models, desk, monkeypatch):
    (desk / "m.safetensors").write_bytes(b"old")
    monkeypatch.setattr(merge, "merge_tensor", lambda *_: pytest.fail("it merges"))
    monkeypatch.setattr(merge, "create", lambda *_, **__: pytest.fail("it writes"))
    flags = ["-o", desk / "m.safetensors", "--force", "--report", desk / "r"]
    flags += ["--vae", models["lossy"]]         # it loses about 70 % of white noise
    for inputs in ([A, "--roundtrip"], [A, B]):
        desk.refuse(*inputs, *flags, words=["NMSE 0.", "> 0.001"])


def pca_vae(desk, model, ratio, more="--holdout 0"):
    flags = f"--init pca --blocks 0 --ratio {ratio} --steps1 0 --steps2 0 {more}"
    code, _, error = desk.run(model, "-o", desk / "v", *flags.split(), main=train.main)
    assert code == 0, error
    return desk / "v"


def test_the_gate_sees_the_end_of_a_large_tensor(desk):
    """Of which the first 65,536 weights are easy."""
    w = torch.randn(1024, 256, generator=generator())
    steps = torch.linspace(0.5, 1, 256)
    w[:512] = torch.randn(512, 256, generator=generator(1))[:, :1] * steps
    path = desk.put({NAME: w}, "t")
    vae = pca_vae(desk, path, 4)
    got, report = desk.merged(path, "--roundtrip", "--vae", vae, "--max-nmse", 1)
    error = (got[NAME] - w).double().square().mean().item()
    true = error / w.double().var(correction=0).item()
    # 64 of 256 windows: half of them have twice the error, so the mean is 5 % off
    assert report["roundtrip"]["nmse"] == pytest.approx(true, rel=0.05) and true > 0.1


def test_the_gate_minds_the_typical_weight(models, desk):
    """Beside one outlier, whose the variance is, all others may be lost."""
    w = A[NAME].clone()
    w[3, 4] = 5000 * w.std()
    path = desk.put({NAME: w}, "t")
    way = [path, "--roundtrip", "--vae", pca_vae(desk, path, 1.1)]
    desk.refuse(*way, "-o", desk / "m.safetensors", words=["typical error", repr(NAME)])
    got, report = desk.merged(*way, "--max-nmse", 9)
    lost = (got[NAME] - w).double().square().median()
    typical = (w.double() - w.double().mean()).square().median()
    value = max(gate["value"] for gate in report["gates"])
    assert value == pytest.approx((lost / typical).item(), rel=0.02) and value > 2e-3
    assert report["roundtrip"]["nmse"] < 1e-3


def test_report_counts_and_distances(desk):
    stranger = llama_tensors(9)
    got, report = desk.merged(A, dict(A), stranger, "--lam", 0.25, "--seed", 3)
    assert report["tensors"] == {
        "encoded": 14, "averaged": 6, "copied": 0, "total": 20,
        "weights_encoded": sum(A[name].numel() for name in ENCODED),
        "weights_total": sum(w.numel() for w in A.values())}

    def apart(one, other):
        parts = [one[name].double() - other[name].double() for name in ENCODED]
        norm = torch.cat([A[name].double().flatten() for name in ENCODED]).norm()
        distance = torch.cat([part.flatten() for part in parts]).norm() / norm
        return pytest.approx(distance.item(), rel=1e-5)
    far = report["distance"]
    assert far["to_target"] == apart(got, A)
    assert far["to_source"] == [apart(got, A), apart(got, stranger)]
    assert far["source_to_target"] == [0, apart(A, stranger)]
    assert "source 2 is" in desk.err and "source 1 is" not in desk.err
    assert report["inputs"] == ["0.safetensors", "1.safetensors", "2.safetensors"]
    assert report["output"] == "m.safetensors" and report["seed"] == 3


CASES = {"equal shapes": [A, B], "draws": [A, B, "--samples=2"],
         "sinkhorn": [A, BIG, "--align=sinkhorn"], "noise": [A, BIG, "--control=noise"]}


@pytest.mark.parametrize("case", CASES)
def test_same_command_same_bytes_whatever_the_threads(desk, monkeypatch, case):
    """As each tensor is computed by a single one. The seed decides all noise."""
    way = CASES[case]
    real = merge.merge_tensor

    def merge_tensor(*arguments):
        assert torch.get_num_threads() == 1
        return real(*arguments)
    monkeypatch.setattr(merge, "merge_tensor", merge_tensor)
    one, _ = desk.merged(*way)
    try:
        torch.set_num_threads(3)
        three, _ = desk.merged(*way)
    finally:
        torch.set_num_threads(1)
    assert_equal(three, one)
    other, _ = desk.merged(*way, "--seed", 1)
    assert torch.equal(one[NAME], other[NAME]) == (case not in ("draws", "noise"))


@pytest.mark.parametrize("source, flag, rtol", [
    (B, "--operator=lerp", 1e-5), (B, "--operator=slerp", 1e-5),
    (BIG, "--align=mean", 1e-5),
    # a map fitted on 96 points in 64 dimensions raises the last bits of a product
    (BIG, "--align=gaussian", 1e-3)])
def test_pieces_do_not_show(desk, monkeypatch, source, flag, rtol):
    way = [A, source, "--lam", 0.3, flag]
    whole, _ = desk.merged(*way)
    monkeypatch.setattr(lsmerge, "BATCH", 1)
    monkeypatch.setattr(lsmerge, "PIECE", 2048)
    monkeypatch.setattr(ck.spans, "__defaults__", (1000,))
    cut, report = desk.merged(*way)
    assert_near(cut, whole, rtol)
    assert report["roundtrip"]["nmse"] < 1e-12


def test_init_random_trains_on_the_inputs_and_may_keep_it(models, desk, monkeypatch):
    """Kept, it gives the same result; the gate judges it; Ctrl-C writes nothing."""
    short = partial(train.Schedule, steps1=4, steps2=2, batch=4)
    monkeypatch.setattr(train, "Schedule", short)
    way = [A, B, "--init", "random"]
    first, _ = desk.merged(*way, "--max-nmse", 9, "--save-vae", desk / "v")
    assert "stage 1: 4 steps" in desk.said and "stage 2: 2 steps" in desk.said
    for again in (way, [A, B, "--vae", desk / "v"]):
        assert_equal(desk.merged(*again, "--max-nmse", 9)[0], first)
    kept = Codec.load(desk / "v")
    assert kept.vae.config.init == "random"
    assert kept.record["trained_on"] == ["0.safetensors", "1.safetensors"]
    way += ["-o", desk / "n.safetensors"]
    desk.refuse(*way, words=["NMSE"])                           # hardly trained
    monkeypatch.setattr(train, "train_step",
                        lambda *_: signal.raise_signal(signal.SIGINT))
    desk.refuse(*way, code=130)


# --- Different shapes -----------------------------------------------------------------
def standardised(w):
    """(chunks of 64 of the standardised tensor, its mean, its scale), by hand."""
    mean, std = unit_of(w)
    return ((w.double() - mean) / std).reshape(-1, 64), mean, std


def test_report_pairs_and_bookkeeping_across_shapes(desk):
    got, report = desk.merged(A, BIG)
    records = report["alignment"]
    assert report["kind"] == "cross-shape" and report["align"] == "gaussian"
    assert report["lambda"] == [0.1] and len(report["gates"]) == 4
    assert report["tensors"]["encoded"] == len(records) == 14
    assert report["tensors"]["averaged"] == 0
    assert {(r["layer"], r["source_layer"]) for r in records} == {(0, 0), (1, 2)}
    assert {r["role"] for r in records} == {*"qkvo", "gate", "up", "down"}
    for r in records:
        assert r["cost_after"] < 1e-6 < r["cost_before"]
        assert r["std_ratio"] == pytest.approx(1, abs=1e-3)
    assert report["distance"]["to_source"] == [None]
    assert report["distance"]["to_average"] is None
    for name, w in A.items():
        assert torch.equal(got[name], w) == (name not in ENCODED)


@pytest.mark.parametrize("method", ["none", "mean", "gaussian", "double"])
def test_across_shapes_against_the_formula_by_hand(desk, monkeypatch, method):
    """On chunks: the codec is a rigid change of axes, which commutes with the maps.
    "double" is of a fork: a function, and a line in the table."""
    monkeypatch.setitem(align.ALIGNERS, "double", lambda m: align.Aligned(
        2 * m.z_projected_JZ, iterations=7, error=0.25))
    z_t, mean, scale = standardised(A[NAME])
    z_s, _, _ = standardised(BIG[PARTNER])
    projected = overlap_matrix(len(z_s), len(z_t)) @ z_s
    centred = projected - projected.mean(0)
    got, report = desk.merged(A, BIG, "--align", method, "--lam", 0.3)
    rtol = 1e-6
    if method == "none":
        z = projected
    elif method == "mean":
        z = centred + z_t.mean(0)
    elif method == "double":
        z = 2 * projected
        record = report["alignment"][0]
        assert (record["iterations"], record["marginal_error"]) == (7, 0.25)
        assert "double" in desk.run("--help")[1]
    else:
        z = z_t.mean(0) + centred @ transport_of(projected, z_t)
        # inverting the covariance of 96 points in 64 dimensions costs three digits
        rtol = 1e-3
    check_tensor(got, (0.7 * z_t + 0.3 * z) * scale + mean, rtol)
    assert report["align"] == method


NARROW = A | {name: A[name][:32] for name in ENCODED if re.search("[kv]_proj", name)}


@pytest.mark.parametrize("inputs, lam, aligned", [
    ([A, B, BIG], "0.5,0", 14), ([A, BIG, B], "0,0.5", 14), ([NARROW, B], "0.5", 4)])
def test_auto_aligns_only_what_has_another_shape(desk, inputs, lam, aligned):
    got, report = desk.merged(*inputs, "--lam", lam)
    check_tensor(got, (A[NAME].double() + B[NAME]) / 2, rtol=1e-5)
    assert report["kind"] == "cross-shape" and len(report["alignment"]) == aligned


def test_sinkhorn_is_cut_into_problems_that_fit_the_memory(desk, monkeypatch):
    """Both in as many equal parts, each its own problem, by the textbook."""
    monkeypatch.setattr(lsmerge, "BATCH", 1)
    monkeypatch.setattr(lsmerge, "PIECE", 64 * 48)
    source = {name: 2 * t for name, t in llama_tensors(5).items()}
    flags = ["--align", "sinkhorn", "--epsilon", "0.1", "--lam", 1]
    got, report = desk.merged(A, source, *flags)
    mean, std = unit_of(A[NAME], source[NAME])
    z_t = ((A[NAME].double() - mean) / std).reshape(2, 48, 64)
    z_s = ((source[NAME].double() - mean) / std).reshape(2, 48, 64)
    parts = []
    for mine, theirs in zip(z_t, z_s):
        plan = textbook_plan((theirs[:, None] - mine).square().sum(2), 0.1)
        parts.append(48 * plan.T @ theirs)
    check_tensor(got, torch.cat(parts) * std + mean, rtol=1e-4)
    assert all(r["marginal_error"] < 1e-5 for r in report["alignment"])


@pytest.mark.parametrize("kind", ["zero", "noise", "shuffled"])
def test_controls_hold_nothing_of_the_source(desk, kind):
    """Of whatever shape it is: norms and embeddings stay the target's, too."""
    flags = ["--control", kind, "--lam", 0.4]
    got, report = desk.merged(A, BIG, *flags)
    assert report["control"] == kind
    other = llama_tensors(11, hidden=96, layers=3, mlp=160, kv=48)
    found, _ = desk.merged(A, other, *flags)
    assert_equal(found, got)
    same, _ = desk.merged(A, B, *flags)
    for name in A.keys() - ENCODED:
        assert torch.equal(same[name], A[name])
    if kind == "zero":          # the others: test_align.py
        z_t, mean, scale = standardised(A[NAME])
        z = 0.6 * z_t + 0.4 * z_t.mean(0)
        check_tensor(got, z * scale + mean, rtol=1e-5)
        check_tensor(same, z * scale + mean, rtol=1e-5)
    again, _ = desk.merged(A, BIG, *flags, "--seed", 1)
    assert torch.equal(again[NAME], got[NAME]) == (kind == "zero")


def test_two_vaes_of_different_latent_sizes(models, desk):
    narrow = pca_vae(desk, models["a"], 1, "--chunk 32")
    way = [A, BIG, "--vae", narrow, "--source-vae", models["vae"]]
    got, _ = desk.merged(*way, "--align", "none")
    latents = []
    for vae, w in ((models["vae"], BIG[PARTNER]), (narrow, A[NAME])):
        codec = Codec.load(vae)
        stats = ck.measure(ck.StateDict({NAME: w}), NAME)
        latents.append(codec.encode(w.reshape(-1), stats))
    z_s, z_t = latents
    z = overlap_matrix(len(z_s), len(z_t)) @ z_s.double() @ overlap_matrix(64, 32).T
    check_tensor(got, codec.decode((0.9 * z_t + 0.1 * z).float(), stats, stats.numel))
    got, _ = desk.merged(*way, "--residual", "--lam", 0)
    assert_equal(got, A)
