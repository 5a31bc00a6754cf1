"""Operators and draws: closed forms, scipy, and arithmetic by hand with an exact
codec."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.spatial import geometric_slerp

import chunking as ck
import lsmerge
import merge
from conftest import generator, relative, save
from lsmerge import Codec, Parent
from test_merge import (NAME, assert_equal, assert_models_close, combination,
                        is_encoded,
                        merged, run)


# --- Coefficients ---------------------------------------------------------------------
@pytest.mark.parametrize("degrees", [1, 40, 90, 150])
@pytest.mark.parametrize("lam", [0.0, 0.2, 0.5, 1.0])
def test_slerp_in_the_plane(degrees, lam):
    """Unit vectors: scipy's geometric_slerp. Of other lengths the same: only the angle
    enters."""
    angle = math.radians(degrees)
    a, b = np.array([1.0, 0.0]), np.array([math.cos(angle), math.sin(angle)])
    expected = geometric_slerp(a, b, lam)
    for long_a, long_b in ((1, 1), (3, 0.5)):
        dot = long_a * long_b * (a @ b)
        c = lsmerge.slerp_coefficients(lam, dot, long_a, long_b)
        np.testing.assert_allclose(c[0] * a + c[1] * b, expected, atol=1e-9)


@pytest.mark.parametrize("dot, norm", [(1.0, 1.0), (-1.0, 1.0), (0.0, 0.0)])
def test_slerp_is_lerp_where_the_angle_says_nothing(dot, norm):
    assert lsmerge.slerp_coefficients(0.3, dot, norm, norm) == [0.7, 0.3]


def test_inner_products_of_pieces():
    a, b = torch.randn(2, 100, 3, dtype=torch.float64, generator=generator())
    x, y = a.numpy(), b.numpy()
    expected = [np.vdot(x, y), np.linalg.norm(x), np.linalg.norm(y)]
    found = lsmerge.inner(zip(a.split(7), b.split(7)))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_coefficients_of_convex_and_task_operators():
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


# --- Operators on models --------------------------------------------------------------
@pytest.fixture(scope="module")
def family(models, tmp_path_factory):
    """A base and two relatives, as paths and as tensors."""
    base = tmp_path_factory.mktemp("family") / "base.safetensors"
    save(base, relative(load_file(models["a"]), 21))
    paths = {"a": models["a"], "b": models["b"], "base": base}
    return {name: (path, load_file(path)) for name, path in paths.items()}


@pytest.mark.parametrize("space", ["latent", "weight"])
@pytest.mark.parametrize("operator, lam, coefficients", [
    ("lerp", ["--lam", "0.2,0.5"], [0.3, 0.2, 0.5]),
    ("soup", [], [1 / 3, 1 / 3, 1 / 3]),
    ("task-arithmetic", ["--lam", "0.9,0.7"], [1, 0.9, 0.7 - 1.6]),
    ("task-arithmetic", ["--lam=-3,10"], [1, -3, 10 - 7]),
    ("task-arithmetic", ["--lam", "-0.5"], [1, -0.5, -0.5 + 1])])
def test_with_an_exact_codec_an_affine_operator_is_its_twin_in_weight_space(
        family, tmp_path, operator, lam, coefficients, space):
    """TARGET a, SOURCES b and base; for task arithmetic the second source is the
    base."""
    a, b, base = (family[key][0] for key in ("a", "b", "base"))
    flags = ["--operator", operator, *lam, "--space", space]
    if operator == "task-arithmetic":
        flags += ["--base", base]
    got, report = merged(tmp_path, a, b, base, *flags)
    tensors = [family[key][1] for key in ("a", "b", "base")]
    largest = max(map(abs, coefficients))           # rounding grows with what is summed
    assert_models_close(got, combination(coefficients, tensors), rtol=2e-6 * largest)
    assert report["operator"] == operator and report["space"] == space
    assert report["distance"]["to_average"] < 1e-6 * largest
    assert len(report["distance"]["to_source"]) == 2


def test_task_arithmetic_from_the_base_gives_the_source(family, tmp_path):
    base, source = family["base"][0], family["b"][0]
    flags = ["--operator", "task-arithmetic", "--base", base, "--lam", 1]
    got, report = merged(tmp_path, base, source, *flags)
    assert_models_close(got, family["b"][1], rtol=2e-6)
    assert len(report["gates"]) == 6 and report["lambda"] == [1]
    assert len(report["distance"]["to_source"]) == 1


def test_in_task_arithmetic_what_lacks_a_base_stays(family, tmp_path):
    """Of a tensor that the base, or a source, does not hold there is no task vector: in
    the layers as outside."""
    a, b, base = (dict(family[key][1]) for key in ("a", "b", "base"))
    norm = "model.norm.weight"
    del base[NAME], base[norm]
    other = "model.layers.0.mlp.up_proj.weight"
    del b[other]
    paths = [save(tmp_path / f"{i}.safetensors", t) for i, t in enumerate((b, base))]
    flags = ["--operator", "task-arithmetic", "--base", paths[1], "--lam", 0.5]
    got, report = merged(tmp_path, family["a"][0], paths[0], *flags)
    for name in (NAME, norm, other):
        assert torch.equal(got[name], a[name])
    rest = {name for name in a if name in b and name in base}
    expected = combination([1, 0.5, -0.5],
                           [{n: t[n] for n in rest} for t in (a, b, base)])
    assert_models_close({n: got[n] for n in rest}, expected, rtol=2e-6)


@pytest.mark.parametrize("operator", ["lerp", "slerp", "soup"])
def test_a_model_merged_with_itself_is_its_round_trip(models, tmp_path, operator):
    got, _ = merged(tmp_path, models["a"], models["a"], "--operator", operator)
    assert_models_close(got, load_file(models["a"]))


def test_a_soup_across_shapes_is_uniform_too(models, tmp_path):
    _, report = merged(tmp_path, models["a"], models["big"], "--operator", "soup")
    assert report["kind"] == "cross-shape" and report["lambda"] == [0.5]


def test_the_order_of_sources_does_not_matter(models, family, tmp_path):
    paths, found = [family[key][0] for key in ("b", "base")], []
    for sources in (paths, paths[::-1]):
        flags = ["--operator", "soup", "--vae", models["lossy"], "--max-nmse", 2]
        found.append(merged(tmp_path, models["a"], *sources, *flags)[0])
    assert_models_close(*found, rtol=1e-5)


def test_slerp_of_raw_weights_by_hand(models, tmp_path):
    a, b = load_file(models["a"]), load_file(models["b"])
    flags = ["--operator", "slerp", "--lam", 0.3, "--space", "weight"]
    got, report = merged(tmp_path, models["a"], models["b"], *flags)
    for name in a:
        x = a[name].double().flatten().numpy()
        y = b[name].double().flatten().numpy()
        expected = 0.7 * x + 0.3 * y                        # what is not encoded: lerp
        if is_encoded(name, a[name]):
            # Two vectors span a plane: scipy's arc between (1, 0) and (cos, sin) in it.
            cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
            sine = math.sqrt(1 - cosine ** 2)
            ends = np.array([1.0, 0.0]), np.array([cosine, sine])
            p, q = geometric_slerp(*ends, 0.3)
            expected = (p - q * cosine / sine) * x + q / sine * y
        found = got[name].double().flatten()
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(x).max())
    assert report["distance"]["to_average"] == 0


def test_slerp_of_latents_by_hand(models, tmp_path):
    """The latents from the VAE itself, whole tensors at once; the arc between them;
    decoded. The unit is the parents' own together."""
    flags = ["--operator", "slerp", "--lam", 0.4]
    got, report = merged(tmp_path, models["a"], models["b"], *flags)
    vae = Codec.load(models["vae"]).vae
    parents = [load_file(models[key])[NAME].double() for key in "ab"]
    both = torch.cat(parents)
    mean, std = both.mean(), both.std(correction=0)
    with torch.no_grad():
        x = [((w - mean) / std).float().reshape(-1, 16, 64) for w in parents]
        za, zb = (vae.encode(x_BTC).mu_BTZ.double() for x_BTC in x)
        angle = torch.acos((za * zb).sum() / za.norm() / zb.norm())
        z = torch.sin(0.6 * angle) * za + torch.sin(0.4 * angle) * zb
        decoded = vae.decode((z / torch.sin(angle)).float()).double()
    expected = (decoded * std + mean).reshape(parents[0].shape).float()
    assert_models_close({NAME: got[NAME]}, {NAME: expected})
    # standardising moves the angle
    assert report["distance"]["to_average"] > 1e-7


# --- Draws from the posterior ---------------------------------------------------------
def test_without_samples_a_self_merge_is_the_round_trip(models, tmp_path):
    zero, _ = merged(tmp_path, models["a"], "--samples", 0)
    trip, report = merged(tmp_path, models["a"], "--roundtrip")
    assert_equal(zero, trip)
    assert report["kind"] == "self" and report["samples"] == 0


@pytest.mark.parametrize("samples", [1, 16, None])
def test_samples_scatter_as_the_posterior_says(models, tmp_path, samples):
    """An exact codec with sigma = 0.01: the mean of K draws is off by 0.01 / sqrt(K) of
    a std. Each tensor and seed has noise of its own."""
    flags, a = [] if samples is None else ["--samples", samples], load_file(models["a"])
    runs = [merged(tmp_path, models["a"], *flags, "--seed", seed) for seed in (0, 0, 2)]
    assert_equal(runs[0][0], runs[1][0])
    assert runs[0][1]["roundtrip"]["nmse"] < 1e-12 and runs[0][1]["kind"] == "self"
    assert runs[0][1]["samples"] == (samples or merge.SAMPLES)
    off = [torch.cat([((got[name] - w) / w.std()).flatten() for name, w in a.items()
                      if is_encoded(name, w)]) for got in (runs[0][0], runs[2][0])]
    assert abs(torch.corrcoef(torch.stack(off))[0, 1]) < 0.02       # another seed
    names = [f"model.layers.{i}.self_attn.{role}_proj.weight" for i in (0, 1)
             for role in "qo"]
    draws = torch.stack([(runs[0][0][name] - a[name]).flatten() for name in names])
    apart = torch.corrcoef(draws) - torch.eye(4)
    # 4096 numbers: 1 / 64 by chance, six times
    assert apart.abs().max() < 0.1
    expected = 0.01 / math.sqrt(samples or merge.SAMPLES)
    assert torch.cat(off).std().item() == pytest.approx(expected, rel=0.02)


def test_parents_draw_their_own_samples(models, tmp_path):
    """lambda = 1/2 of a model with itself: two draws halve the variance of one."""
    w = load_file(models["a"])[NAME]
    got, _ = merged(tmp_path, models["a"], models["a"], "--samples", 1)
    spread = ((got[NAME] - w).std() / w.std()).item()
    assert spread == pytest.approx(0.01 / math.sqrt(2), rel=0.05)


def noise_parent(L, codec, draw, **options):
    flat_L = torch.randn(L, generator=generator(draw))
    stats = ck.measure(ck.StateDict({"layers.0.q_proj": flat_L}), "layers.0.q_proj")
    return Parent(lambda start, stop: flat_L[start:stop], stats, codec, **options)


def test_draws_of_the_posterior():
    """The exact codec's posterior has sigma^2 = beta / (1 + beta)."""
    codec = Codec.load("exact")
    mean_NZ = noise_parent(2 ** 16, codec, 0).latents(0, 1024)
    for samples in (1, 9):                  # 65,536 numbers: 1.5 % is five deviations
        draw = noise_parent(2 ** 16, codec, 0, samples=samples).latents(0, 1024)
        std = (draw - mean_NZ).std().item() * samples ** 0.5
        assert std == pytest.approx(0.01, rel=0.015)


def test_draws_do_not_depend_on_who_asks(monkeypatch):
    """In one piece or in many, from anywhere, alone or beside a second source of weight
    0 and of another shape (which once changed the target's draws): the same noise."""
    monkeypatch.setattr(lsmerge, "PIECE", 2 ** 16)
    codec = Codec.load("exact")
    parent = noise_parent(200_000, codec, 0, samples=1, seed=(5,))
    whole = parent.latents(0, parent.N)
    mean_NZ = replace(parent, samples=0).latents(0, parent.N)
    noise = (whole - mean_NZ)[:1024].reshape(2, -1)         # two batches: other noise
    assert abs(torch.corrcoef(noise)[0, 1]) < 0.05
    for first, last in ((0, 100), (700, 1300), (1023, 1025), (3000, 3125)):
        part = parent.latents(first, last)
        torch.testing.assert_close(part, whole[first:last], rtol=1e-5, atol=1e-5)
    noise = whole - replace(parent, samples=0).latents(0, parent.N)
    batches = torch.stack([noise[i:i + 512].flatten() for i in range(0, 3072, 512)])
    apart = torch.corrcoef(batches) - torch.eye(6)
    assert apart.abs().max() < 0.04             # 32,768 numbers: seven deviations
    other = noise_parent(900_000, codec, 1, samples=1, seed=(6,))
    other = lsmerge.as_source(parent, other, lsmerge.Alignment("mean"))

    def merged_L(sources, coefficients):
        pieces = lsmerge.ls_merge(parent, sources, coefficients)
        return torch.cat([piece_L for _, piece_L in pieces])
    alone = merged_L([], [1.0])
    torch.testing.assert_close(merged_L([other], [1.0, 0.0]), alone, rtol=0, atol=1e-5)
    twin = replace(parent, seed=(7,))               # other draws: that much would show
    noise = merged_L([twin], [0.0, 1.0]) - alone
    assert noise.std().item() == pytest.approx(0.01 * math.sqrt(2), rel=0.05)


# --- Sources that need a Transport ----------------------------------------------------
@pytest.mark.parametrize("mine, theirs", [(4096, 1024), (1024, 4096)])
def test_n_over_d_is_that_of_the_smaller_cloud(mine, theirs):
    """It counted the target's chunks only, and called a source of 16 chunks in 64
    dimensions plenty: repeated by the projection, they still span 15."""
    codec = Codec.load("exact")
    target, source = noise_parent(mine, codec, 0), noise_parent(theirs, codec, 1)
    way = lsmerge.as_source(target, source, lsmerge.Alignment("gaussian"))
    way.align(target.latents(0, target.N), 0, target.N)
    report = way.report()
    assert report["n_over_d"] == 16 / 64
    assert (report["cost_after"] > 0.01) == (theirs < mine)


def test_statistics_are_shared_by_those_of_one_shape():
    """The target and whoever has its shape pool theirs; the others keep their own."""
    codec = Codec.load("exact")
    sizes = (2048, 2048, 4096)
    parents = [noise_parent(L, codec, draw) for draw, L in enumerate(sizes)]
    shared = lsmerge.share_statistics(parents)
    weights = [parent.read(0, 4096).double() for parent in parents]
    both = torch.cat(weights[:2])
    for parent, w in zip(shared, (both, both, weights[2])):
        assert parent.stats.mean == pytest.approx(w.mean().item(), rel=1e-9)
        assert parent.stats.std == pytest.approx(w.std(correction=0).item(), rel=1e-9)


# --- What cannot be asked for ---------------------------------------------------------
@pytest.mark.parametrize("flags", [
    ["--operator", "slerp"], ["--space", "weight"],
    ["--operator", "task-arithmetic", "--base", "a"]], ids=" ".join)
def test_pairs_of_other_shape_are_refused_by_name(models, tmp_path, flags, capsys):
    flags = [models.get(flag, flag) for flag in flags]
    out = ["-o", tmp_path / "m.safetensors"]
    assert run(models["a"], models["big"], *flags, *out) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())
    assert "model.layers.0.mlp.down_proj.weight" in error and "[64, 96]" in error
    assert "[96, 160]" in error and str(models["big"]) in error
