"""experiments/tools/greedy_soup.py and weight_statistics.py. Oracles: the definition of
the recipe, means by torch, a known best soup; scipy's moments, singular values."""
import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from safetensors.torch import load_file

import chunking
import greedy_soup as gs
import weight_statistics as ws
from conftest import ROOT, assert_equal, assert_near, llama_tensors, relative


# --- greedy_soup.py -------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(5))
def test_greedy_soup_by_its_definition(seed):
    values = np.random.default_rng(seed).normal(size=(5, 3))
    calls = []

    def score(kept):
        calls.append(kept)
        return -np.abs(values[list(kept)].mean(axis=0)).sum()
    found = gs.greedy_soup(5, score)
    assert len(calls) == 9 and all(call == sorted(call) for call in calls)
    order = sorted(range(5), key=lambda i: -score([i]))
    kept = order[:1]
    for index in order[1:]:
        if score(kept + [index]) > score(kept):
            kept.append(index)
    assert found == sorted(kept)
    assert gs.greedy_soup(3, lambda kept: 1.0) == [0]   # an equal score is not better


@pytest.mark.parametrize("flags", [["--space", "weight"], ["--vae", "exact"]])
def test_the_soup_keeps_what_helps(desk, monkeypatch, flags):
    """A judge who wants the mean of the last two. The target is not among those kept:
    it still gives the names, and its folder the companions."""
    first = llama_tensors(11, hidden=32, mlp=32)
    second = relative(first, 12)
    third = relative(first, 13)
    paths = [desk.model(first), desk.put(second, "b"), desk.put(third, "c")]
    wanted = {name: (second[name] + third[name]) / 2 for name in first}

    def judge(line, path):
        found = load_file(path + "/model.safetensors")
        return -sum((found[name] - wanted[name]).square().sum() for name in wanted)
    monkeypatch.setattr(gs, "evaluate", judge)
    way = ["--eval", "x", *paths, *flags, "-o", desk / "m"]
    code, out, error = desk.run(*way, main=gs.main)
    assert code == 0, error
    assert out.count("soup of") == 5 and out.count("wrote") == 1
    assert f"kept 2 of 3: {paths[1]}, {paths[2]}\n" in out
    assert_near(load_file(desk / "m/model.safetensors"), wanted, rtol=1e-5)
    assert (desk / "m/config.json").exists()
    assert desk.run(*way, "--force", main=gs.main)[0] == 0


def test_a_command_of_ones_own(desk):
    """A judge who wants the second model: bit for bit, in weight space, it comes."""
    first = llama_tensors(11, hidden=32, mlp=32)
    desk.put(first, "a")
    desk.put(relative(first, 12), "b")
    (desk / "judge").write_text("tail -c 4000 b.safetensors > end; tail -c 4000 $1 |"
                                "cmp -s end && echo scores: 7 1.0 || echo 0.0")
    script = ROOT / "experiments/tools/greedy_soup.py"
    line = "a.safetensors b.safetensors --space weight -o m.safetensors --eval"
    done = subprocess.run([sys.executable, script, *line.split(), "sh judge"],
                          cwd=desk.folder, capture_output=True, text=True)
    assert done.returncode == 0 and "kept 1 of 2: b.safetensors" in done.stdout
    assert_equal(load_file(desk / "m.safetensors"), load_file(desk / "b.safetensors"))


@pytest.mark.parametrize("words, score", [
    ("loaded 12 docs\\nscore=0.5", 0.5), ("7 (accuracy: 81.5%%)", 81.5),
    ("-1e-3", -0.001), ("[3, .5]", 0.5), ("0.5 after the 3rd", 0.5),
    ("no score", None), ("12 docs loss nan", None), (r"\377", None)])
def test_the_last_number_is_the_score(words, score):
    """If a command prints the path, which comes last, no digit of it is a score."""
    way = [["printf", f"{words}\\n%s"], "/a/1/b_2.safetensors"]
    if score is not None:
        assert gs.evaluate(*way) == score
        return
    for line, said in (way[0], "no number last"), (["false"], "exit code 1"):
        with pytest.raises(chunking.CheckpointError, match=said):
            gs.evaluate(line, way[1])


# --- weight_statistics.py -------------------------------------------------------------
def test_moments_against_scipy():
    rows = np.linspace(0.1, 3, 40)[:, None]
    matrix = np.random.default_rng(0).standard_t(5, (40, 60)) * rows
    oracles = (np.mean, np.var, scipy.stats.skew, scipy.stats.kurtosis)
    expected = [oracle(matrix.reshape(-1)) for oracle in oracles]
    assert list(ws.moments(matrix).values()) == pytest.approx(expected)
    constant = ws.moments(np.full((7, 9), 0.1))
    assert list(constant.values()) == pytest.approx([0.1, 0, 0, 0], abs=1e-5)


def test_spectrum_against_singular_values():
    scales = np.diag(np.linspace(1, 5, 20))
    matrix = np.random.default_rng(0).standard_normal((30, 20)) @ scales
    for m in (matrix, matrix.T):
        squares = np.linalg.svd(m - m.mean(axis=0), compute_uv=False) ** 2
        shares = np.append(0, squares.cumsum()) / squares.sum()
        expected = np.interp(np.array(ws.RANKS) * len(squares), range(21), shares)
        np.testing.assert_allclose(ws.spectrum(m), expected, rtol=1e-9)


def test_the_statistics_of_a_model(desk, models):
    """These weights are white noise themselves: the same spectrum as noise has, up to
    the draw. A record for each matrix of a layer."""
    code, out, _ = desk.run(models["a"], main=ws.main)
    assert code == 0 and "kurtosis" in out and "explained variance" in out
    records = json.loads(desk.run(models["a"], "--json", main=ws.main)[1])
    assert len(records) == 14 and {r["layer"] for r in records} == {0, 1}
    assert {r["role"] for r in records} == {"q", "k", "v", "o", "gate", "up", "down"}
    for r in records:
        np.testing.assert_allclose(r["spectrum"], r["spectrum_noise"], atol=0.03)
