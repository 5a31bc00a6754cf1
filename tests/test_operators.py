"""Operators and draws: closed forms, scipy, and arithmetic by hand with an exact codec."""
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.spatial import geometric_slerp

import chunking as ck
import lsmerge
import merge
import train
from conftest import llama_tensors
from lsmerge import Codec, Parent
from test_merge import (NAME, assert_equal, assert_models_close, combination, is_encoded, merged,
                        run, save)
from vae import VAE, VAEConfig


# --- Coefficients ---------------------------------------------------------------------------------
@pytest.mark.parametrize("degrees", [1, 40, 90, 150])
@pytest.mark.parametrize("lam", [0.0, 0.2, 0.5, 1.0])
def test_slerp_in_the_plane(degrees, lam):
    """Unit vectors: scipy's geometric_slerp. Of other lengths the same: only the angle enters."""
    angle = math.radians(degrees)
    a, b = np.array([1.0, 0.0]), np.array([math.cos(angle), math.sin(angle)])
    for long_a, long_b in ((1, 1), (3, 0.5)):
        c = lsmerge.slerp_coefficients(lam, long_a * long_b * (a @ b), long_a, long_b)
        np.testing.assert_allclose(c[0] * a + c[1] * b, geometric_slerp(a, b, lam), atol=1e-9)


@pytest.mark.parametrize("dot, norm", [(1.0, 1.0), (-1.0, 1.0), (0.0, 0.0)])
def test_slerp_is_lerp_where_the_angle_says_nothing(dot, norm):
    assert lsmerge.slerp_coefficients(0.3, dot, norm, norm) == [0.7, 0.3]


def test_inner_products_of_pieces():
    a, b = torch.randn(2, 100, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, y = a.numpy(), b.numpy()
    expected = [np.vdot(x, y), np.linalg.norm(x), np.linalg.norm(y)]
    found = lsmerge.inner(zip(a.split(7), b.split(7)))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_coefficients_of_convex_and_task_operators():
    assert lsmerge.convex_coefficients([0.2, 0.5]) == pytest.approx([0.3, 0.2, 0.5])
    assert lsmerge.convex_coefficients([0.1] * 10)[0] == pytest.approx(0, abs=1e-12)    # sums round
    assert lsmerge.convex_coefficients([0.1] * 10)[0] >= 0
    assert lsmerge.convex_coefficients([]) == [1.0]
    assert lsmerge.task_coefficients([0.6, -3]) == pytest.approx([1, 0.6, -3, 2.4])
    for wrong in ([-0.1], [math.nan], [1.5], [0.6, 0.6], [math.inf]):
        with pytest.raises(ValueError, match="lambda"):
            lsmerge.convex_coefficients(wrong)
    for wrong in ([-10.1], [math.nan], [0.5, 11]):
        with pytest.raises(ValueError, match="lambda"):
            lsmerge.task_coefficients(wrong)


def test_combine_leaves_its_arguments_alone():
    parts = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    before = parts.clone()
    found = lsmerge.combine(list(parts), [0.5, -2.0, 7.0])
    expected = torch.einsum("k,knz->nz", torch.tensor([0.5, -2.0, 7.0]), parts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(parts, before)


# --- Operators on models --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def family(models, tmp_path_factory):
    """A base and two relatives of the models a and b, as paths and as tensors."""
    base = tmp_path_factory.mktemp("family") / "base.safetensors"
    paths = {"a": models["a"], "b": models["b"], "base": save(base, llama_tensors(21))}
    return {name: (path, load_file(path)) for name, path in paths.items()}


@pytest.mark.parametrize("space", ["latent", "weight"])
@pytest.mark.parametrize("operator, lam, coefficients", [
    ("lerp", ["--lam", "0.2,0.5"], [0.3, 0.2, 0.5]),
    ("soup", [], [1 / 3, 1 / 3, 1 / 3]),
    ("task-arithmetic", ["--lam", "0.9,0.7"], [1, 0.9, 0.7 - 1.6]),
    ("task-arithmetic", ["--lam=-3,10"], [1, -3, 10 - 7]),
    ("task-arithmetic", ["--lam", "-0.5"], [1, -0.5, -0.5 + 1])])
def test_with_an_exact_codec_an_affine_operator_is_its_twin_in_weight_space(
        models, family, tmp_path, operator, lam, coefficients, space):
    """TARGET a, SOURCES b and base; for task arithmetic the second source is the base itself."""
    a, b, base = (family[key][0] for key in ("a", "b", "base"))
    flags = ["--operator", operator, *lam, "--space", space]
    flags += ["--base", base] if operator == "task-arithmetic" else []
    got, report = merged(models, tmp_path, a, b, base, *flags, vae=space == "latent")
    tensors = [family[key][1] for key in ("a", "b", "base")]
    assert_models_close(got, combination(coefficients, tensors), rtol=2e-6)
    largest = max(map(abs, coefficients))           # rounding grows with what is summed
    assert report["operator"] == operator and report["space"] == space
    assert report["distance"]["to_average"] < 1e-6 * largest
    assert len(report["distance"]["to_source"]) == 2


def test_task_arithmetic_from_the_base_gives_the_source(models, family, tmp_path):
    base, source = family["base"][0], family["b"][0]
    flags = ["--operator", "task-arithmetic", "--base", base, "--lam", 1]
    got, report = merged(models, tmp_path, base, source, *flags)
    assert_models_close(got, family["b"][1], rtol=2e-6)
    assert [gate["name"] for gate in report["gates"]] == [
        "round trip of target", "round trip of source 1", "round trip of base"]
    assert report["lambda"] == [1] and len(report["distance"]["to_source"]) == 1


@pytest.mark.parametrize("operator", ["lerp", "slerp", "soup"])
def test_a_model_merged_with_itself_is_its_round_trip(models, tmp_path, operator):
    got, _ = merged(models, tmp_path, models["a"], models["a"], "--operator", operator)
    assert_models_close(got, load_file(models["a"]))


def test_a_soup_across_shapes_is_uniform_too(models, tmp_path):
    _, report = merged(models, tmp_path, models["a"], models["big"], "--operator", "soup")
    assert report["kind"] == "cross-shape" and report["lambda"] == [0.5]


def test_the_order_of_sources_does_not_matter(models, family, tmp_path):
    paths, found = [family[key][0] for key in ("b", "base")], []
    for sources in (paths, paths[::-1]):
        found.append(merged(models, tmp_path, models["a"], *sources, "--operator", "soup")[0])
    assert_models_close(*found)


def test_slerp_of_raw_weights_by_hand(models, tmp_path):
    a, b = load_file(models["a"]), load_file(models["b"])
    flags = ["--operator", "slerp", "--lam", 0.3, "--space", "weight"]
    got, report = merged(models, tmp_path, models["a"], models["b"], *flags, vae=False)
    for name in a:
        x, y = a[name].double().flatten().numpy(), b[name].double().flatten().numpy()
        expected = 0.7 * x + 0.3 * y                       # what is not encoded: lerp
        if is_encoded(name, a[name]):
            # Two vectors span a plane: scipy's arc between (1, 0) and (cos, sin) in it.
            cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
            sine = math.sqrt(1 - cosine ** 2)
            p, q = geometric_slerp(np.array([1.0, 0.0]), np.array([cosine, sine]), 0.3)
            expected = (p - q * cosine / sine) * x + q / sine * y
        found = got[name].double().flatten()
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(x).max())
    assert report["distance"]["to_average"] == 0


def test_slerp_of_latents_by_hand(models, tmp_path):
    """The latents from the VAE itself, whole tensors at once; the arc between them; decoded."""
    flags = ["--operator", "slerp", "--lam", 0.4]
    got, report = merged(models, tmp_path, models["a"], models["b"], *flags)
    vae, parents = Codec.load(models["vae"]).vae, [load_file(models[key])[NAME] for key in "ab"]
    mean, std = parents[0].double().mean(), parents[0].double().std(correction=0)
    with torch.no_grad():
        x = [((w.double() - mean) / std).float().reshape(-1, 16, 64) for w in parents]
        za, zb = (vae.encode(x_BTC).mu_BTZ.double() for x_BTC in x)
        angle = torch.acos((za * zb).sum() / za.norm() / zb.norm())
        z = torch.sin(0.6 * angle) * za + torch.sin(0.4 * angle) * zb
        decoded = vae.decode((z / torch.sin(angle)).float()).double()
    expected = (decoded * std + mean).reshape(parents[0].shape)
    atol = 1e-6 * parents[0].abs().max().item()
    torch.testing.assert_close(got[NAME].double(), expected, rtol=0, atol=atol)
    assert report["distance"]["to_average"] > 1e-6         # standardising moves the angle


# --- Draws from the posterior ---------------------------------------------------------------------
def test_without_samples_a_self_merge_is_the_round_trip(models, tmp_path):
    zero, _ = merged(models, tmp_path, models["a"], "--samples", 0)
    trip, report = merged(models, tmp_path, models["a"], "--roundtrip")
    assert_equal(zero, trip)
    assert report["kind"] == "self" and report["samples"] == 0


@pytest.mark.parametrize("samples", [1, 16, None])
def test_samples_scatter_as_the_posterior_says(models, tmp_path, samples, capsys):
    """An exact codec with sigma = 0.01: the mean of K draws is off by 0.01 / sqrt(K) of a std."""
    flags, a = [] if samples is None else ["--samples", samples], load_file(models["a"])
    runs = [merged(models, tmp_path, models["a"], *flags, "--seed", seed) for seed in (0, 0, 2)]
    assert_equal(runs[0][0], runs[1][0])
    assert runs[0][1]["roundtrip"]["nmse"] < 1e-12 and runs[0][1]["kind"] == "self"
    assert runs[0][1]["samples"] == (samples or merge.SAMPLES)
    off = [torch.cat([((got[name] - w) / w.std()).flatten() for name, w in a.items()
                      if is_encoded(name, w)]) for got in (runs[0][0], runs[2][0])]
    assert abs(torch.corrcoef(torch.stack(off))[0, 1]) < 0.02       # another seed, other noise
    names = [f"model.layers.{i}.self_attn.{role}_proj.weight" for i in (0, 1) for role in "qo"]
    draws = torch.stack([(runs[0][0][name] - a[name]).flatten() for name in names])
    apart = torch.corrcoef(draws) - torch.eye(4)
    assert apart.abs().max() < 0.1                  # 4096 numbers: each tensor draws its own
    expected = 0.01 / math.sqrt(samples or merge.SAMPLES)
    assert torch.cat(off).std().item() == pytest.approx(expected, rel=0.02)
    said = capsys.readouterr().out                  # what the draws do to the weights is said
    assert f"{samples or merge.SAMPLES} draws from the posterior" in said
    assert f"{runs[2][1]['distance']['to_target']:.4f} to the target" in said


def test_parents_draw_their_own_samples(models, tmp_path):
    """lambda = 1/2 of a model with itself: two independent draws halve the variance of one."""
    w = load_file(models["a"])[NAME]
    got, _ = merged(models, tmp_path, models["a"], models["a"], "--samples", 1)
    spread = ((got[NAME] - w).std() / w.std()).item()
    assert spread == pytest.approx(0.01 / math.sqrt(2), rel=0.05)


def test_every_tensor_parent_and_seed_has_noise_of_its_own():
    """torch looks at 32 bits of a seed: products of seed and index once left a single one."""
    codec = Codec.load("exact")
    slot = ck.TensorSlot("w", (2048,), torch.float32)
    zeros, draws = torch.zeros(2048), []
    for key in [(seed, number, k) for seed in range(4) for number in range(3) for k in range(2)]:
        parent = Parent(lambda start, stop: zeros[start:stop], slot, codec, 1, key)
        draws += [parent.latents(0, 16).flatten(), parent.latents(16, 32).flatten()]
    off = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert off.abs().max() < 0.2                            # 1024 numbers: 1 / 32 by chance, six
    again = Parent(lambda start, stop: zeros[start:stop], slot, codec, 1, (0, 0, 0))
    assert torch.equal(again.latents(16, 32).flatten(), draws[1])       # in whatever order


def test_residual_keeps_the_draws_and_loses_the_codecs_error(models, tmp_path):
    w = load_file(models["a"])[NAME]
    got, _ = merged(models, tmp_path, models["a"], "--samples", 4, "--residual")
    assert ((got[NAME] - w).std() / w.std()).item() == pytest.approx(0.005, rel=0.05)


# --- Sources that need a Transport ----------------------------------------------------------------
def noise_parent(L, codec, seed):
    flat_L = torch.randn(L, generator=torch.Generator().manual_seed(seed))
    slot = ck.measure(ck.StateDict({"layers.0.q_proj": flat_L}), "layers.0.q_proj")
    return Parent(lambda start, stop: flat_L[start:stop], slot, codec)


def test_a_source_of_another_codec_never_enters_as_it_is():
    """Equal shapes and two VAEs of equal Z: the latents of other chunks were once mixed in, without
    a word; by hand, the source's 64 chunks of 32 are averaged in pairs."""
    finer = Codec(VAE(VAEConfig(chunk=32, ratio=0.5), torch.Generator().manual_seed(1)))
    target, source = noise_parent(2048, Codec.load("exact"), 0), noise_parent(2048, finer, 1)
    found = torch.cat([w for _, w in lsmerge.ls_merge(
        target, [lsmerge.as_source(target, source)], [0.9, 0.1])])
    z = source.latents(0, 64).reshape(32, 2, 64).mean(1)
    expected = target.codec.decode(0.9 * target.latents(0, 32) + 0.1 * z, target.slot, 2048)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    twin = target._replace(seed=(1,))
    assert lsmerge.as_source(target, twin) is twin          # the same codec, and nothing asked for


def test_two_vaes_on_models_of_other_depth(models, tmp_path):
    """The command: the tensors have equal shapes, the run is cross-shape, and Z differs."""
    deep = save(tmp_path / "deep.safetensors", llama_tensors(5, layers=3))
    vae = tmp_path / "v.safetensors"
    assert train.main([str(deep), "-o", str(vae), "--chunk", "32", "--steps2", "0", "--quiet"]) == 0
    flags = ["--align", "none", "--vae", "exact", "--source-vae", vae]
    _, report = merged(models, tmp_path, models["a"], deep, *flags, vae=False)
    assert report["kind"] == "cross-shape" and len(report["alignment"]) == 14


@pytest.mark.parametrize("mine, theirs", [(4096, 1024), (1024, 4096)])
def test_n_over_d_is_that_of_the_smaller_cloud(mine, theirs):
    """It counted the target's chunks only, and called a source of 16 chunks in 64 dimensions
    plenty: repeated by the projection, they still span 15."""
    codec = Codec.load("exact")
    target, source = noise_parent(mine, codec, 0), noise_parent(theirs, codec, 1)
    way = lsmerge.as_source(target, source, lsmerge.Alignment("gaussian"))
    way.align(target.latents(0, target.N), 0, target.N)
    report = way.report()
    assert report["n_over_d"] == 16 / 64 and (report["cost_after"] > 0.01) == (theirs < mine)


# --- What cannot be asked for ---------------------------------------------------------------------
@pytest.mark.parametrize("flags", [
    ["--operator", "soup", "--lam", "0.5"], ["--operator", "task-arithmetic"], ["--base", "x"],
    ["--operator", "greedy-soup"], ["--samples", "-1"], ["--samples", "2", "--space", "weight"],
    ["--operator", "task-arithmetic", "--base", "x", "--lam", "10.1"],
    ["--operator", "slerp", "--align", "gaussian"], ["--operator", "slerp", "--samples", "2"],
    ["--operator", "slerp", "--control", "zero"], ["--operator", "slerp", "--align", "mean"],
    ["third", "--operator", "slerp"]], ids=" ".join)
def test_usage_errors_exit_2(models, tmp_path, flags):
    with pytest.raises(SystemExit) as caught:
        run(models["a"], models["b"], "-o", tmp_path / "m.safetensors", *flags)
    assert caught.value.code == 2 and not list(tmp_path.iterdir())


def test_slerp_needs_equal_shapes_and_a_base_those_of_target_or_source(models, tmp_path, capsys):
    for source, flags, said in (
            ("big", ["--operator", "slerp"], "equal ones"),
            ("b", ["--operator", "task-arithmetic", "--base", models["big"]], "its base")):
        assert run(models["a"], models[source], *flags, "-o", tmp_path / "m.safetensors") == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error and not list(tmp_path.iterdir())
