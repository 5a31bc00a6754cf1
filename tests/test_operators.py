"""Operators and draws: closed forms, scipy, arithmetic with an exact codec."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial import geometric_slerp

import chunking as ck
import lsmerge
import merge
from conftest import A, B, assert_equal, assert_near, generator, relative, save
from lsmerge import Codec, Parent
from test_merge import NAME, check_tensor, combination, unit_of

Q = "model.layers.0.self_attn.q_proj.weight"
O = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize("degrees", [1, 40, 90, 150])
@pytest.mark.parametrize("lam", [0.0, 0.2, 0.5, 1.0])
def test_slerp_in_the_plane(degrees, lam):
    """scipy's geometric_slerp; of other lengths, only the angle enters."""
    angle = math.radians(degrees)
    a, b = np.array([1.0, 0.0]), np.array([math.cos(angle), math.sin(angle)])
    expected = geometric_slerp(a, b, lam)
    for long_a, long_b in ((1, 1), (3, 0.5)):
        dot = long_a * long_b * (a @ b)
        c = lsmerge.slerp_coefficients(lam, dot, long_a, long_b)
        np.testing.assert_allclose(c[0] * a + c[1] * b, expected, atol=1e-9)


def test_coefficients_by_hand():
    for dot, norm in ((1.0, 1.0), (-1.0, 1.0), (0.0, 0.0)):     # no angle: lerp
        assert lsmerge.slerp_coefficients(0.3, dot, norm, norm) == [0.7, 0.3]
    assert lsmerge.convex_coefficients([0.2, 0.5]) == pytest.approx([0.3, 0.2, 0.5])
    tenths = lsmerge.convex_coefficients([0.1] * 10)                    # sums round
    assert tenths[0] == pytest.approx(0, abs=1e-12) and tenths[0] >= 0
    assert lsmerge.convex_coefficients([]) == [1.0]
    assert lsmerge.task_coefficients([0.6, -3]) == pytest.approx([1, 0.6, -3, 2.4])
    for wrong in ([-0.1], [math.nan], [1.5], [0.6, 0.6], [math.inf], [0.1, math.nan]):
        with pytest.raises(ValueError, match="lambda"):
            lsmerge.convex_coefficients(wrong)
    for wrong in ([-10.1], [math.nan], [0.5, 11], [0.5, math.nan]):
        with pytest.raises(ValueError, match="lambda"):
            lsmerge.task_coefficients(wrong)


BASE = relative(A, 21)


@pytest.mark.parametrize("space", ["latent", "weight"])
@pytest.mark.parametrize("operator, lam, coefficients", [
    ("lerp", ["--lam", "0.2,0.5"], [0.3, 0.2, 0.5]),
    ("lerp", ["--lambda", "0.25"], [0.5, 0.25, 0.25]),
    ("lerp", [], [1 / 3, 1 / 3, 1 / 3]),
    ("soup", [], [1 / 3, 1 / 3, 1 / 3]),
    ("task-arithmetic", ["--lam", "0.9,0.7"], [1, 0.9, 0.7 - 1.6]),
    ("task-arithmetic", ["--lam=-3,10"], [1, -3, 10 - 7]),
    ("task-arithmetic", ["--lam", "-0.5"], [1, -0.5, -0.5 + 1])])
def test_with_an_exact_codec_an_affine_operator_is_its_twin_in_weight_space(
        desk, operator, lam, coefficients, space):
    """Of A, B and BASE, which is task arithmetic's base: in a file called `none`."""
    flags = ["--operator", operator, *lam, "--space", space]
    if operator == "task-arithmetic":
        flags += ["--base", save(desk / "none", BASE)]
    got, report = desk.merged(A, B, BASE, *flags)
    largest = max(map(abs, coefficients))           # rounding grows with what is summed
    expected = combination(coefficients, [A, B, BASE])
    assert_near(got, expected, rtol=2e-6 * largest)
    assert report["operator"] == operator and report["space"] == space
    assert report["distance"]["to_average"] < 1e-6 * largest
    assert len(report["distance"]["to_source"]) == 2


def test_in_task_arithmetic_what_lacks_a_base_stays(desk):
    """Of a tensor that the base, or no source, holds there is no task vector: in the
    layers as outside. One that a single source lacks: W + lambda of the others."""
    b = dict(B)
    base = dict(BASE)
    c = relative(base, 5)
    norm = "model.norm.weight"
    nowhere = "model.layers.0.mlp.up_proj.weight"
    in_c = "model.layers.0.mlp.down_proj.weight"
    del base[NAME], base[norm], b[nowhere], c[nowhere], b[in_c]
    flags = ["--operator", "task-arithmetic", "--lam", "0.5,0.25"]
    got, _ = desk.merged(A, b, c, *flags, "--base", base)
    expected = {name: A[name] for name in (NAME, norm, nowhere)}
    expected |= combination([1, 0.25, -0.25], [{in_c: t[in_c]} for t in (A, c, base)])
    rest = {name: w for name, w in A.items() if name not in expected}
    expected |= combination([1, 0.5, 0.25, -0.75], [rest, b, c, base])
    assert_near(got, expected, rtol=2e-6)


def test_slerp_of_latents_by_hand(models, desk):
    """From the VAE itself, whole tensors at once, in the parents' pooled unit."""
    got, report = desk.merged(A, B, "--operator", "slerp", "--lam", 0.4)
    vae = Codec.load(models["vae"]).vae
    mean, std = unit_of(A[NAME], B[NAME])
    with torch.no_grad():
        x = [(w[NAME].double() - mean) / std for w in (A, B)]
        za, zb = (vae.encode(w.float().view(-1, 16, 64)).mu_BTZ.double() for w in x)
        angle = torch.acos((za * zb).sum() / za.norm() / zb.norm())
        z = torch.sin(0.6 * angle) * za + torch.sin(0.4 * angle) * zb
        decoded = vae.decode((z / torch.sin(angle)).float()).double()
    check_tensor(got, decoded * std + mean)
    assert report["distance"]["to_average"] > 1e-7      # standardising moves the angle


# --- Draws from the posterior ---------------------------------------------------------
@pytest.mark.parametrize("samples", [1, 16, None])
def test_samples_scatter_as_the_posterior_says(desk, samples):
    """sigma = 0.01: the mean of K draws is off by 0.01 / sqrt(K) of a std."""
    way = [A]
    if samples:
        way = [A, "--samples", samples]
    K = samples or merge.SAMPLES
    got, report = desk.merged(*way)
    assert_equal(desk.merged(*way)[0], got)
    other, _ = desk.merged(*way, "--seed", 2)
    noises = []
    for result in (got, other):
        for name in (Q, O, Q.replace("0", "1")):
            noise = (result[name] - A[name]) / A[name].std()
            noises.append(noise.flatten())
    noises = torch.stack(noises)
    assert noises.std().item() == pytest.approx(0.01 / math.sqrt(K), rel=0.03)
    apart = torch.corrcoef(noises) - torch.eye(6)
    assert apart.abs().max() < 0.1          # 4096 numbers: 1 / 64 by chance, six times
    assert report["roundtrip"]["nmse"] < 1e-12 and report["samples"] == K
    # the gate counts that noise; the median of a normal number's square is 0.455
    typical = max(gate["value"] for gate in report["gates"])
    assert typical == pytest.approx(1e-4 / K / 0.455, rel=0.1)


def test_parents_draw_their_own_samples(desk):
    """lambda = 1/2 of a model with itself: two draws halve the variance of one."""
    got, _ = desk.merged(A, A, "--samples", 1)
    spread = ((got[NAME] - A[NAME]).std() / A[NAME].std()).item()
    assert spread == pytest.approx(0.01 / math.sqrt(2), rel=0.05)


def noise_parent(L, codec, draw, **options):
    flat_L = torch.randn(L, generator=generator(draw))
    stats = ck.measure(ck.StateDict({"layers.0.q_proj": flat_L}), "layers.0.q_proj")
    return Parent(lambda start, stop: flat_L[start:stop], stats, codec, **options)


def test_draws_do_not_depend_on_who_asks(monkeypatch):
    """In pieces, from anywhere, alone or beside a source of another shape: the same."""
    monkeypatch.setattr(lsmerge, "PIECE", 2 ** 16)
    codec = Codec.load("exact")
    parent = noise_parent(200_000, codec, 0, samples=1, seed=(5,))
    whole = parent.latents(0, parent.N)
    for first, last in ((0, 100), (700, 1300), (1023, 1025), (3000, 3125)):
        part = parent.latents(first, last)
        torch.testing.assert_close(part, whole[first:last], rtol=1e-5, atol=1e-5)
    noise = whole - replace(parent, samples=0).latents(0, parent.N)
    batches = torch.stack([noise[i:i + 1024].flatten() for i in range(0, 3072, 1024)])
    apart = torch.corrcoef(batches) - torch.eye(3)
    assert apart.abs().max() < 0.04             # 65,536 numbers: ten deviations
    other = noise_parent(900_000, codec, 1, samples=1, seed=(6,))
    other = lsmerge.as_source(parent, other, lsmerge.Alignment("mean"))
    alone = torch.cat([piece for _, piece in lsmerge.ls_merge(parent, [], [1.0])])
    pieces = lsmerge.ls_merge(parent, [other], [1.0, 0.0])
    beside = torch.cat([piece for _, piece in pieces])
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mine, theirs", [(4096, 1024), (1024, 4096)])
def test_n_over_d_is_that_of_the_smaller_cloud(mine, theirs):
    """16 chunks in 64 dimensions, repeated by the projection, still span 15."""
    codec = Codec.load("exact")
    target, source = noise_parent(mine, codec, 0), noise_parent(theirs, codec, 1)
    way = lsmerge.as_source(target, source, lsmerge.Alignment("gaussian"))
    way.align(target.latents(0, target.N), 0, target.N)
    report = way.report()
    assert report["n_over_d"] == 16 / 64
    assert (report["cost_after"] > 0.01) == (theirs < mine)
