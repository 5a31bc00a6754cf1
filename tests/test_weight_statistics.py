"""experiments/tools/weight_statistics.py. Oracles: the definitions of moments, scipy,
singular values. (Its picture is not looked at.)"""
import json
import sys

import numpy as np
import pytest
import scipy.stats

import chunking
import weight_statistics as ws


def test_moments_against_their_definitions():
    rows = np.linspace(0.1, 3, 40)[:, None]
    matrix = np.random.default_rng(0).standard_t(5, (40, 60)) * rows
    matrix[1] = 3.0                                     # a constant row counts as 0
    figures = ws.moments(matrix)
    flat = matrix.reshape(-1)
    assert figures["mean"] == pytest.approx(flat.mean())
    assert figures["variance"] == pytest.approx(flat.var())
    assert figures["skewness"] == pytest.approx(scipy.stats.skew(flat))
    assert figures["kurtosis"] == pytest.approx(scipy.stats.kurtosis(flat))
    by_row = [scipy.stats.kurtosis(row) for row in np.delete(matrix, 1, axis=0)]
    assert figures["kurtosis_row"] == pytest.approx(sum(by_row) / 40)
    # pooling rows of other scales
    assert figures["kurtosis"] > figures["kurtosis_row"] + 0.5


def test_spectrum_against_singular_values():
    scales = np.diag(np.linspace(1, 5, 20))
    matrix = np.random.default_rng(0).standard_normal((30, 20)) @ scales
    for m in (matrix, matrix.T):
        squares = np.linalg.svd(m - m.mean(axis=0), compute_uv=False) ** 2
        shares = np.append(0, squares.cumsum()) / squares.sum()
        ranks = np.array(ws.RANKS) * len(squares)
        expected = np.interp(ranks, range(len(shares)), shares)
        np.testing.assert_allclose(ws.spectrum(m), expected, rtol=1e-9)


def test_records(models):
    """One for each matrix of a layer; the few ranks lie on the drawn curve. These
    weights are white noise themselves: the same curve as noise has, up to the draw."""
    records = ws.describe(chunking.Checkpoint(models["a"]))
    assert len(records) == 14 and {r["layer"] for r in records} == {0, 1}
    assert {r["role"] for r in records} == {"q", "k", "v", "o", "gate", "up", "down"}
    for r in records:
        drawn = np.interp(ws.RANKS, ws.GRID, r["curve"])
        np.testing.assert_allclose(r["spectrum"], drawn, rtol=1e-9)
        assert r["curve"][0] == 0 and r["curve"][-1] == pytest.approx(1)
        np.testing.assert_allclose(r["curve"], r["curve_noise"], atol=0.03)


def test_the_command(desk, models, monkeypatch):
    code, out, error = desk.run(models["a"], main=ws.main)
    assert code == 0 and not error
    assert "kurtosis" in out and "explained variance" in out
    assert out.count("\n") == 1 + 14 + 7 + 3 + 7    # headings, tensors, means, roles
    records = json.loads(desk.run(models["a"], "--json", main=ws.main)[1])
    assert len(records) == 14 and records[0].keys() >= {*ws.MOMENTS, "spectrum"}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    figure = [models["a"], "--figure", desk / "f.svg"]
    desk.refuse(*figure, words=["matplotlib is not installed"], main=ws.main)


def test_a_picture_never_replaces_its_input(desk, models):
    pytest.importorskip("matplotlib")
    odd = desk / "odd.svg"
    odd.write_bytes(models["a"].read_bytes())
    desk.refuse(odd, "--figure", odd, words=["another --figure"], main=ws.main)
    nowhere = [odd, "--figure", desk / "none/f.svg"]
    desk.refuse(*nowhere, words=["its folder"], main=ws.main)
    assert desk.run(odd, "--figure", desk / "f.svg", main=ws.main)[0] == 0
    assert "<svg" in (desk / "f.svg").read_text()
