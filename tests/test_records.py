"""experiments/learning_curves.py and pictures.py: what they record. Oracles: numpy's eigenvalues and
singular values, Marchenko and Pastur's law of noise, what transport keeps by definition, the
validations of train.py, listened to."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import learning_curves as lc
import pictures
import train
from chunking import Checkpoint
from codec_tables import Model
from conftest import ROOT, llama_tensors
from grid import encoded_pairs
from lsmerge import Codec
from train import Schedule

HERE = ROOT / "experiments/models"


# --- Clouds ---------------------------------------------------------------------------------------
def test_what_alignments_do_to_the_cloud():
    """Of base's first query matrix and large's."""
    files = [Checkpoint(HERE / f"{name}.safetensors") for name in ("base", "large")]
    pairs = encoded_pairs(*files, Codec.load("exact"))
    pair = next(pair for pair in pairs if pair.target.stats.place.role == "q")
    assert pair.target.stats.place == pair.source.stats.place and pair.target.stats.place.layer == 0
    clouds = {row["align"]: row for row in pictures.measure_clouds(pair.target, pair.source)}
    source = {align: np.array(row["source"]) for align, row in clouds.items()}
    target = np.array(clouds["none"]["target"])
    # Axes: variances are the two largest eigenvalues, and x and y do not covary.
    z = pair.target.z_NZ.double()
    largest = np.linalg.eigvalsh(np.cov(z.numpy().T, bias=True))[::-1][:2]
    assert len(target) == len(source["none"]) == 256 <= pictures.POINTS
    np.testing.assert_allclose(target.mean(0), 0, atol=1e-3)            # three digits are kept
    np.testing.assert_allclose(np.cov(target.T, bias=True), np.diag(largest), atol=5e-3)
    # Mean: moved as a whole, onto the target's mean.
    assert abs(source["none"].mean(0)).max() > 0.01
    np.testing.assert_allclose(source["mean"].mean(0), 0, atol=1e-3)
    moved = source["mean"] - source["none"]
    np.testing.assert_allclose(moved, np.tile(moved[:1], (256, 1)), atol=2e-3)
    # Gaussian: the target's covariance (256 chunks of 64 numbers are enough for all of it).
    np.testing.assert_allclose(np.cov(source["gaussian"].T, bias=True),
                               np.cov(target.T, bias=True), atol=0.02)
    # Sinkhorn: uniform masses, so the mean of all source latents stays where it is.
    mean, axes = pictures.pca(z, 2)
    stays = ((pair.source.z_NZ.double().mean(0) - mean) @ axes.flip(1)).numpy()
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
    assert low[3:].min() > 0.99999 and low[1] < 0.99 and len(low) == 64
    # 1,024 chunks of 64: the largest eigenvalue is (1 + 1/4)^2 (Marchenko and Pastur), 4,096: 1.27
    assert rows[1]["white"][0] == pytest.approx(1.5625 / 64, rel=0.05)
    assert rows[0]["white"][0] == pytest.approx(1.2656 / 64, rel=0.05)
    np.testing.assert_allclose(noise, rows[0]["white"], atol=0.01)


# --- Curves ---------------------------------------------------------------------------------------
@pytest.fixture
def small(tmp_path):
    save_file(llama_tensors(1, hidden=32, mlp=48), tmp_path / "a.safetensors")
    return [Model.open(tmp_path / "a.safetensors")]


@pytest.mark.parametrize("name", ["two stages", "one stage, beta 1", "the release's recipe"])
def test_points_are_what_train_py_measured(name, small, monkeypatch):
    checks, validate = [], train.validate

    def listen(vae, windows, stage):
        checks.append((stage, validate(vae, windows, stage)))
        return checks[-1][1]
    monkeypatch.setattr(train, "validate", listen)
    recipe = lc.RECIPES[name]
    schedule = replace(recipe.schedule, steps1=min(recipe.schedule.steps1, 6), steps2=6, batch=2)
    row = lc.measure_recipe(name, recipe._replace(schedule=schedule), small, 1, "how")
    seen = [check for check in checks if check[0] == 2 or schedule.steps1]
    assert len(row["points"]) == len(seen) > 1
    for point, (stage, figures) in zip(row["points"], seen):
        assert point["stage"] == stage
        assert point["nmse"] == pytest.approx(figures["nmse"], rel=1e-4)
        assert point["kl"] == (pytest.approx(figures["kl"], rel=1e-4) if stage == 2 else None)
    for stage in {point["stage"] for point in row["points"]}:
        steps, seconds = ([point[key] for point in row["points"] if point["stage"] == stage]
                          for key in ("step", "seconds"))
        assert steps == sorted({*steps}) and steps[0] == 0 and steps[-1] == 6
        assert seconds == sorted(seconds) and seconds[0] < seconds[-1]
    assert (row["name"], row["model"], row["seed"], row["command"]) == (name, "a", 1, "how")
    assert row["config"]["beta"] == recipe.config.beta and row["schedule"]["seed"] == 1


def test_the_recipes_differ_in_what_their_names_say():
    rates = train.LEARNING_RATES["random"]
    for name, (config, schedule, _) in lc.RECIPES.items():
        assert schedule.steps1 + schedule.steps2 == Schedule.steps1 + Schedule.steps2
        assert (schedule.steps1 > 0) == name.startswith("two stages")
        beta = float(name.split("beta ")[1]) if "beta" in name else 1e-4
        assert config.beta == beta
        if name.startswith("one"):
            assert schedule.lr * train.STAGE2_RATE == pytest.approx(rates)
    names = [(name, seed) for name, _, seed in lc.trainings(2, True, lc.RECIPES)]
    assert names == [*((name, seed) for seed in (0, 1) for name in lc.RECIPES),
                     ("the paper's configuration", 0)]
