"""experiments/learning_curves.py and pictures.py: what they record. Oracles: numpy's eigenvalues
and singular values, Marchenko and Pastur's law of noise, what transport keeps by definition, the
validations and rates of train.py, listened to."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import learning_curves as lc
import pictures
import train
from chunking import place
from codec_tables import Model
from conftest import ROOT
from lsmerge import Codec

HERE = ROOT / "experiments/models"


# --- Clouds ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pair():
    models = [Model.open(HERE / f"{name}.safetensors") for name in ("base", "large")]
    return pictures.pair(*models, Codec.load(HERE / "vae.safetensors"))


@pytest.fixture(scope="module")
def clouds(pair):
    return {row["align"]: row for row in pictures.measure_clouds(*pair)}


def test_the_pair_is_the_first_query_and_its_partner(pair):
    assert [(p.slot.name, p.slot.shape) for p in pair] == [
        ("model.layers.0.self_attn.q_proj.weight", (128, 128)),
        ("model.layers.0.self_attn.q_proj.weight", (192, 192))]


def test_partners_are_found_by_depth(models):
    """Two layers against three: the last meets the last."""
    small, big = Model.open(models["a"]), Model.open(models["big"])
    last = replace(small, slots=[s for s in small.slots if place(s.name).layer == 1] + small.slots)
    found = pictures.pair(last, big, Codec.load(models["vae"]))
    assert [place(parent.slot.name).layer for parent in found] == [1, 2]


def test_axes_are_the_targets_two_leading_components(pair, clouds):
    """Variances are the two largest eigenvalues of its covariance, and x and y do not covary."""
    z = pair[0].latents(0, pair[0].N).double().numpy()
    largest = np.linalg.eigvalsh(np.cov(z.T, bias=True))[::-1][:2]
    for row in clouds.values():
        shown = np.array(row["target"])
        assert len(shown) == len(row["source"]) == 256 <= pictures.POINTS
        np.testing.assert_allclose(shown.mean(0), 0, atol=1e-3)     # three digits are kept
        np.testing.assert_allclose(np.cov(shown.T, bias=True), np.diag(largest), atol=5e-3)


def test_alignments_do_to_the_cloud_what_they_say(pair, clouds):
    source = {align: np.array(row["source"]) for align, row in clouds.items()}
    target = np.array(clouds["none"]["target"])
    assert abs(source["none"].mean(0)).max() > 0.01
    # Mean: moved as a whole, onto the target's mean.
    np.testing.assert_allclose(source["mean"].mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(source["mean"] - source["none"], np.tile(
        (source["mean"] - source["none"])[:1], (256, 1)), atol=2e-3)
    # Gaussian: the target's covariance (256 chunks of 64 numbers are enough for all of it).
    np.testing.assert_allclose(np.cov(source["gaussian"].T, bias=True),
                               np.cov(target.T, bias=True), atol=0.02)
    # Sinkhorn: uniform masses, so the mean of all source latents stays where it is.
    z_target, z_source = (p.latents(0, p.N).double() for p in pair)
    mean, axes = pictures.pca(z_target, 2)
    stays = ((z_source.mean(0) - mean) @ axes.flip(1)).numpy()
    np.testing.assert_allclose(source["sinkhorn"].mean(0), stays, atol=1e-3)


@pytest.mark.parametrize("count", [256, 1000])
def test_clouds_are_thinned_and_mixed(count):
    """At most 300 points, none twice. Every second of them is of all sorts, up to chance: as many
    of odd as of even places, and of both halves."""
    z = torch.arange(float(count))[:, None] * torch.ones(1, 2)
    shown = np.array(pictures.cloud(z, torch.zeros(2), torch.eye(2).double()))[:, 0]
    assert len(shown) == len({*shown}) == min(count, 300)
    for part in (shown, shown[::2]):
        for split in (part % 2, part >= count / 2):
            assert split.mean() == pytest.approx(0.5, abs=0.15)
    again = pictures.cloud(z + 1, torch.zeros(2), torch.eye(2).double())
    np.testing.assert_array_equal(np.array(again)[:, 0], shown + 1)     # the same places


# --- Spectra --------------------------------------------------------------------------------------
def test_spectra_of_planted_chunks(tmp_path):
    """Chunks of rank 3: all of the variance in three directions, as singular values say. White
    noise: its own line."""
    g = torch.Generator().manual_seed(0)
    planted = torch.randn(512, 3, generator=g) @ torch.randn(3, 64, generator=g)
    tensors = {f"layers.{i}.mlp.up_proj.weight": planted.clone() for i in range(2)}
    tensors["layers.0.self_attn.q_proj.weight"] = torch.randn(4096, 64, generator=g)
    save_file(tensors, tmp_path / "x.safetensors")
    rows = pictures.measure_spectra("x", Model.open(tmp_path / "x.safetensors"))
    assert [(row["model"], row["role"]) for row in rows] == [("x", "q"), ("x", "up")]
    noise, low = (np.array(row["cumulative"]) for row in rows)
    squares = np.linalg.svd(planted - planted.mean(0), compute_uv=False)[:3] ** 2
    np.testing.assert_allclose(low[:3], squares.cumsum() / squares.sum(), atol=1e-5)
    assert low[3:].min() > 0.99999 and low[1] < 0.99
    for row in rows:
        straight, white = np.arange(1, 65) / 64, np.array(row["white"])
        assert len(row["cumulative"]) == len(white) == 64
        assert row["cumulative"][-1] == white[-1] == 1
        assert (np.diff(white) > 0).all() and (white >= straight - 1e-5).all()
    # 1,024 chunks of 64: the largest eigenvalue is (1 + 1/4)^2 (Marchenko and Pastur), 4,096: 1.27
    assert rows[1]["white"][0] == pytest.approx(1.5625 / 64, rel=0.05)
    assert rows[0]["white"][0] == pytest.approx(1.2656 / 64, rel=0.05)
    np.testing.assert_allclose(noise, rows[0]["white"], atol=0.01)
    assert abs(np.array(rows[0]["white"]) - straight).max() < 0.1


# --- Curves ---------------------------------------------------------------------------------------
@pytest.fixture
def small(models):
    return [Model.open(models[name]) for name in ("a", "b")]


def shortened(recipe, steps):
    """The same recipe with fewer steps, where it has any."""
    schedule = recipe.schedule
    config = replace(recipe.config, width=min(recipe.config.width, 128), blocks=1)
    return recipe._replace(config=config, schedule=replace(
        schedule, steps1=min(schedule.steps1, steps), steps2=steps, batch=2))


class Listener:
    """A function that remembers its calls."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, *arguments):
        self.calls.append((arguments, self.function(*arguments)))
        return self.calls[-1][1]


@pytest.mark.parametrize("name", [*lc.RECIPES])
def test_points_are_what_train_py_measured(name, small, monkeypatch):
    checks, rates = Listener(train.validate), Listener(train.learning_rate)
    monkeypatch.setattr(train, "validate", checks)
    monkeypatch.setattr(train, "learning_rate", rates)
    recipe = shortened(lc.RECIPES[name], 6)
    row = lc.measure_recipe(name, recipe, small, 1, "how")
    seen = [(stage, figures) for (_, _, stage), figures in checks.calls
            if stage == 2 or recipe.schedule.steps1]
    assert len(row["points"]) == len(seen) > 1
    for point, (stage, figures) in zip(row["points"], seen):
        assert point["stage"] == stage
        assert point["nmse"] == pytest.approx(figures["nmse"], rel=1e-4)
        assert point["kl"] == (pytest.approx(figures["kl"], rel=1e-4) if stage == 2 else None)
        used = [rate for (step, *_), rate in rates.calls if step == point["step"]] or [0.0]
        assert any(point["lr"] == pytest.approx(rate, rel=1e-4) for rate in used)
    for stage in {point["stage"] for point in row["points"]}:
        steps, seconds = ([point[key] for point in row["points"] if point["stage"] == stage]
                          for key in ("step", "seconds"))
        assert steps == sorted({*steps}) and steps[0] == 0 and steps[-1] == 6
        assert seconds == sorted(seconds) and seconds[0] < seconds[-1]
    assert (row["name"], row["model"], row["seed"], row["command"]) == (name, "a + b", 1, "how")
    assert row["config"]["beta"] == recipe.config.beta and row["schedule"]["seed"] == 1


def test_the_recipes_differ_in_what_their_names_say(small):
    peaks, lengths = {}, {}
    for name, recipe in lc.RECIPES.items():
        lengths[name] = recipe.schedule.steps1 + recipe.schedule.steps2
        row = lc.measure_recipe(name, shortened(recipe, 4), small, 0)
        peaks[name] = max(point["lr"] for point in row["points"])
        stages = {point["stage"] for point in row["points"]}
        assert stages == ({1, 2} if name.startswith("two stages") else {2})
    assert set(lengths.values()) == {800}
    assert peaks["one stage, beta 1"] == pytest.approx(peaks["two stages"])
    assert peaks["the release's recipe"] == 1e-4
    assert [recipe.config.beta for recipe in lc.RECIPES.values()] == [
        1e-4, 1, 1, 0.1, 0.1, 1e-4]


def test_the_papers_configuration_has_one_seed():
    names = [(name, seed) for name, _, seed in lc.trainings(2, True, lc.RECIPES)]
    assert names[:12] == [(name, seed) for seed in (0, 1) for name in lc.RECIPES]
    assert names[12:] == [("the paper's configuration", 0)]
    assert lc.trainings(0, False, lc.RECIPES) == []
    config = lc.PAPER["the paper's configuration"].config
    assert (config.chunk, config.width, config.blocks, config.heads) == (640, 768, 4, 4)
