"""Operators, sampling and soups: closed forms, scipy, and arithmetic by hand with an exact codec."""
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.spatial import geometric_slerp

import chunking as ck
import lsmerge
import merge
from conftest import llama_tensors
from test_merge import assert_models_close, merged, run
from vae import VAE, VAEConfig


@pytest.mark.parametrize("degrees", [1, 40, 90, 150])
@pytest.mark.parametrize("lam", [0.0, 0.2, 0.5, 1.0])
def test_slerp_in_the_plane(degrees, lam):
    """Unit vectors: scipy's geometric_slerp. Of other lengths the coefficients are the same, as only the angle enters."""
    a, b = np.array([1.0, 0.0]), np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])
    for long_a, long_b in ((1, 1), (3, 0.5)):
        c = lsmerge.slerp_weights(lam, long_a * long_b * (a @ b), long_a, long_b)
        np.testing.assert_allclose(c[0] * a + c[1] * b, geometric_slerp(a, b, lam), atol=1e-9)


@pytest.mark.parametrize("dot, norm", [(1.0, 1.0), (-1.0, 1.0), (0.0, 0.0)])
def test_slerp_is_lerp_where_the_angle_says_nothing(dot, norm):
    assert lsmerge.slerp_weights(0.3, dot, norm, norm) == [0.7, 0.3]


def test_inner_products_of_pieces():
    a, b = torch.randn(2, 100, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = lsmerge.inner(zip(a.split(7), b.split(7)))
    np.testing.assert_allclose(got, [np.vdot(a.numpy(), b.numpy()), np.linalg.norm(a.numpy()), np.linalg.norm(b.numpy())], rtol=1e-12)


@pytest.mark.parametrize("lam", [[-0.1], [math.nan], [1.5]])
def test_every_operator_refuses_impossible_weights(lam):
    for weights in (lsmerge.convex_weights, lsmerge.task_weights):
        with pytest.raises(ValueError, match="lambda"):
            weights(lam)
    with pytest.raises(ValueError):
        lsmerge.convex_weights([0.6, 0.6])
    assert lsmerge.task_weights([0.6, 0.6]) == [1, 0.6, 0.6, -1.2]


@pytest.fixture(scope="module")
def family(models, tmp_path_factory):
    """A base and two relatives of the models a and b, as paths and as tensors."""
    folder = tmp_path_factory.mktemp("family")
    paths = {"a": models["a"], "b": models["b"], "base": folder / "base.safetensors"}
    save_file(llama_tensors(21), paths["base"])
    return {name: (path, load_file(path)) for name, path in paths.items()}


def combination(coefficients, tensors):
    return {k: sum(c * t[k].double() for c, t in zip(coefficients, tensors)).to(tensors[0][k].dtype) for k in tensors[0]}


@pytest.mark.parametrize("space", ["latent", "weight"])
@pytest.mark.parametrize("operator, flags, coefficients", [
    ("lerp", ["--lam", "0.2,0.5"], [0.3, 0.2, 0.5]),
    ("soup", [], [1 / 3, 1 / 3, 1 / 3]),
    ("task-arithmetic", ["--lam", "0.9,0.7", "--base", "base"], [1, 0.9, 0.7 - 1.6])])
def test_with_an_exact_codec_an_affine_operator_is_its_twin_in_weight_space(models, family, tmp_path, operator, flags, coefficients, space):
    """TARGET a, SOURCES b and base; for task arithmetic the second source is the base itself."""
    flags = [family["base"][0] if flag == "base" else flag for flag in flags]
    got, report = merged(models, tmp_path, family["a"][0], family["b"][0], family["base"][0], "--operator", operator, *flags, "--space", space,
                         vae=space == "latent")
    assert_models_close(got, combination(coefficients, [family[k][1] for k in ("a", "b", "base")]), rtol=2e-6)
    assert report["operator"] == operator and report["distance"]["to_average"] < 1e-6 and len(report["distance"]["to_source"]) == 2


def test_task_arithmetic_from_the_base_gives_the_source(models, family, tmp_path):
    got, report = merged(models, tmp_path, family["base"][0], family["b"][0], "--operator", "task-arithmetic", "--base", family["base"][0], "--lam", 1)
    assert_models_close(got, family["b"][1], rtol=2e-6)
    assert [gate["name"] for gate in report["gates"]][:3] == ["round trip of target", "round trip of source 1", "round trip of base"]


@pytest.mark.parametrize("flags", [["--operator", "lerp"], ["--operator", "slerp"], ["--operator", "soup"]])
def test_a_model_merged_with_itself_is_its_round_trip(models, tmp_path, flags):
    got, _ = merged(models, tmp_path, models["a"], models["a"], *flags)
    assert_models_close(got, load_file(models["a"]))


def test_a_soup_across_shapes_is_uniform_too(models, tmp_path):
    _, report = merged(models, tmp_path, models["a"], models["big"], "--operator", "soup")
    assert report["kind"] == "cross-shape" and report["lambda"] == [0.5]


def test_the_order_of_sources_does_not_matter(models, family, tmp_path):
    paths = [family[k][0] for k in ("b", "base")]
    first, _ = merged(models, tmp_path, models["a"], *paths, "--operator", "soup")
    second, _ = merged(models, tmp_path, models["a"], *paths[::-1], "--operator", "soup")
    assert_models_close(first, second)


def test_slerp_of_raw_weights_by_hand(models, tmp_path):
    a, b = load_file(models["a"]), load_file(models["b"])
    got, report = merged(models, tmp_path, models["a"], models["b"], "--operator", "slerp", "--lam", 0.3, "--space", "weight", vae=False)
    for name in a:
        x, y = a[name].double().flatten().numpy(), b[name].double().flatten().numpy()
        expected = 0.7 * x + 0.3 * y                       # what is not encoded: lerp
        if "layers" in name and a[name].ndim == 2:
            # Two vectors span a plane: scipy's arc between their directions, in coordinates (1, 0) and (cos, sin).
            cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
            sine = math.sqrt(1 - cosine ** 2)
            p, q = geometric_slerp(np.array([1.0, 0.0]), np.array([cosine, sine]), 0.3)
            expected = (p - q * cosine / sine) * x + q / sine * y
        np.testing.assert_allclose(got[name].double().flatten(), expected, atol=1e-6 * np.abs(x).max())
    assert report["distance"]["to_average"] == 0


def test_slerp_of_latents_by_hand(models, tmp_path):
    """The latents from the VAE itself, whole tensors at once; the arc between them; decoded."""
    got, report = merged(models, tmp_path, models["a"], models["b"], "--operator", "slerp", "--lam", 0.4)
    vae, _ = merge.load_vae(models["vae"])
    a, b, name = load_file(models["a"]), load_file(models["b"]), "model.layers.1.mlp.up_proj.weight"
    mean, std = a[name].double().mean(), a[name].double().std(correction=0)
    x, y = (((t[name].double() - mean) / std).float().reshape(-1, 16, 64) for t in (a, b))
    with torch.no_grad():
        za, zb = vae.encode(x).mu_BTZ.double(), vae.encode(y).mu_BTZ.double()
        angle = torch.acos((za * zb).sum() / za.norm() / zb.norm())
        z = (torch.sin(0.6 * angle) * za + torch.sin(0.4 * angle) * zb) / torch.sin(angle)
        expected = vae.decode(z.float()).double().reshape(a[name].shape) * std + mean
    torch.testing.assert_close(got[name].double(), expected, rtol=0, atol=1e-6 * a[name].abs().max().item())
    assert report["distance"]["to_average"] > 1e-6         # standardising moves the angle


# --- Sampling -------------------------------------------------------------------------------------------------------
def test_without_samples_a_self_merge_is_the_round_trip(models, tmp_path):
    zero, _ = merged(models, tmp_path, models["a"], "--samples", 0)
    trip, report = merged(models, tmp_path, models["a"], "--roundtrip")
    assert all(torch.equal(zero[k], trip[k]) for k in zero) and report["kind"] == "self"


@pytest.mark.parametrize("samples", [1, 16, None])
def test_samples_scatter_as_the_posterior_says(models, tmp_path, samples):
    """An exact codec with sigma = 0.01 on standardised weights: the mean of K draws is off by 0.01 / sqrt(K) of a tensor's std."""
    flags = [] if samples is None else ["--samples", samples]
    a = load_file(models["a"])
    results = [merged(models, tmp_path, models["a"], *flags, "--seed", seed) for seed in (0, 0, 2)]
    assert all(torch.equal(results[0][0][k], results[1][0][k]) for k in a) and results[0][1]["roundtrip"]["nmse"] < 1e-10
    off = []
    for name, tensor in a.items():
        if "layers" in name and tensor.ndim == 2:
            off += [(results[0][0][name] - tensor).double() / tensor.double().std(), (results[2][0][name] - tensor).double() / tensor.double().std()]
            assert abs(torch.corrcoef(torch.stack([part.flatten() for part in off[-2:]]))[0, 1]) < 0.1       # another seed, other noise
    spread = torch.cat([part.flatten() for part in off]).std().item()
    assert spread == pytest.approx(0.01 / math.sqrt(samples or merge.SAMPLES), rel=0.05)


def test_parents_draw_their_own_samples(models, tmp_path):
    """lambda = 1/2 of a model with itself: two independent draws halve the variance of one."""
    a = load_file(models["a"])
    got, _ = merged(models, tmp_path, models["a"], models["a"], "--samples", 1)
    name = "model.layers.0.mlp.gate_proj.weight"
    assert ((got[name] - a[name]).std() / a[name].std()).item() == pytest.approx(0.01 / math.sqrt(2), rel=0.05)


def test_every_tensor_parent_and_seed_has_noise_of_its_own():
    """torch's generator only looks at 32 bits of a seed: products of seed and index once left a single one of them."""
    vae = VAE(VAEConfig(), torch.Generator().manual_seed(0))
    vae.set_neck(torch.zeros(128), torch.eye(128))
    codec, slot = lsmerge.Codec(vae), ck.TensorSlot("w", (1024,), torch.float32, 0.0, 1.0, ck.Place(0, "q"))
    draw = lambda index, seed: lsmerge.Parent(lambda start, stop: torch.zeros(1024)[start:stop], slot, codec, index, 1, seed).latents(0, 16).flatten()
    draws = torch.stack([draw(index, seed) for index in range(4) for seed in range(8)])
    off = torch.corrcoef(draws) - torch.eye(len(draws))
    assert off.abs().max() < 0.2                           # 1024 numbers: 1 / 32 by chance, six of those


def test_residual_keeps_the_draws_and_loses_the_codecs_error(models, tmp_path):
    a = load_file(models["a"])
    got, _ = merged(models, tmp_path, models["a"], "--samples", 4, "--residual")
    name = "model.layers.0.mlp.gate_proj.weight"
    assert ((got[name] - a[name]).std() / a[name].std()).item() == pytest.approx(0.005, rel=0.05)


# --- Greedy soup ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(5))
def test_greedy_soup_by_its_definition(seed):
    values = np.random.default_rng(seed).normal(size=(5, 3))
    score = lambda kept: -np.abs(values[list(kept)].mean(axis=0)).sum()
    order = sorted(range(5), key=lambda i: -score([i]))
    kept = [order[0]]
    for index in order[1:]:
        kept += [index] if score(kept + [index]) > score(kept) else []
    calls = []
    assert lsmerge.greedy_soup(5, lambda k: calls.append(k) or score(k)) == sorted(kept) and len(calls) == 9


JUDGE = ("import sys; from safetensors.numpy import load_file; f = load_file(sys.argv[-1]); g = load_file(sys.argv[1]);"
         "print('scores: 7', -sum(((f[k].astype(float) - g[k]) ** 2).sum() for k in g))")


def test_greedy_soup_keeps_what_helps(models, family, tmp_path, capsys):
    """The score is the distance to the mean of a and b, so that the third model must be left out."""
    wanted = combination([0.5, 0.5], [family["a"][1], family["b"][1]])
    save_file(wanted, tmp_path / "wanted.safetensors")
    judge = f'{sys.executable} -c "{JUDGE}" {tmp_path / "wanted.safetensors"}'
    got, report = merged(models, tmp_path, family["base"][0], family["a"][0], family["b"][0], "--operator", "greedy-soup", "--eval", judge)
    assert_models_close(got, wanted)
    assert report["lambda"] == [0.5, 0.5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "r.json", "wanted.safetensors"]
    assert capsys.readouterr().out.count("soup of") == 5


@pytest.mark.parametrize("command, words", [
    ("false", "exit code 1"), ("echo no score", "no number"), ("printf '12 docs loss nan %.0s'", "no number"), (r"printf '\377 %.0s'", "no number")])
def test_an_evaluation_that_fails_is_one_line(models, tmp_path, capsys, command, words):
    assert run(models["a"], models["b"], "--operator", "greedy-soup", "--eval", command, "--vae", models["vae"], "-o", tmp_path / "m.safetensors") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, score", [("loaded 12 docs\\nscore=0.5", 0.5), ("7 (accuracy: 81.5%%)", 81.5), ("-1e-3", -0.001)])
def test_the_last_number_is_the_score(tmp_path, words, score):
    """The path that comes last is not printed by a good command, and its digits are no score if it is."""
    assert merge.run_evaluation(f"printf '{words}\\n%s'", "/a/1/b_2.safetensors") == score


USAGE = [["--eval", "echo 'x", "--operator", "greedy-soup"], ["--operator", "soup", "--lam", "0.5"], ["--operator", "greedy-soup"], ["--eval", "true"], ["--operator", "task-arithmetic"],
         ["--samples", "-1"], ["--samples", "2", "--space", "weight"], ["--operator", "task-arithmetic", "--base", "x", "--lam", "1.1"]]


@pytest.mark.parametrize("flags", USAGE)
def test_usage(models, tmp_path, flags):
    with pytest.raises(SystemExit) as caught:
        run(models["a"], models["b"], "-o", tmp_path / "m.safetensors", *flags)
    assert caught.value.code == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--lam", "0.5"], ["--operator", "soup"], ["--space", "weight"], ["--roundtrip", "--samples", "3"], ["--align", "none"]])
def test_usage_alone(models, tmp_path, flags):
    with pytest.raises(SystemExit) as caught:
        run(models["a"], "-o", tmp_path / "m.safetensors", *flags)
    assert caught.value.code == 2 and not list(tmp_path.iterdir())


def test_slerp_takes_two(models, family, tmp_path):
    with pytest.raises(SystemExit):
        run(models["a"], models["b"], family["base"][0], "--operator", "slerp", "-o", tmp_path / "m.safetensors")


def test_task_arithmetic_needs_equal_shapes(models, tmp_path, capsys):
    assert run(models["a"], models["b"], "--operator", "task-arithmetic", "--base", models["big"], "-o", tmp_path / "m.safetensors") == 1
    assert "equal shapes" in capsys.readouterr().err
