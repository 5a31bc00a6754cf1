"""experiments/tools/weight_statistics.py. Oracles: the definitions of moments, singular values, an XML
parser."""
import json
import math
import sys
import xml.etree.ElementTree as xml

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import save_file

import chunking
import weight_statistics as ws

SVG = "{http://www.w3.org/2000/svg}"


def run(*arguments):
    return chunking.command(lambda: ws.main([str(a) for a in arguments]))


def test_moments_against_their_definitions():
    rows = np.linspace(0.1, 3, 40)[:, None]
    matrix = np.random.default_rng(0).standard_t(5, (40, 60)) * rows
    figures, flat = ws.moments(matrix), matrix.reshape(-1)
    centred = flat - flat.mean()
    variance = (centred ** 2).mean()
    assert figures["mean"] == pytest.approx(flat.mean())
    assert figures["variance"] == pytest.approx(variance)
    assert figures["skewness"] == pytest.approx((centred ** 3).mean() / variance ** 1.5)
    assert figures["kurtosis"] == pytest.approx((centred ** 4).mean() / variance ** 2 - 3)
    by_row = [scipy.stats.kurtosis(row) for row in matrix]
    assert figures["kurtosis_row"] == pytest.approx(np.mean(by_row))
    assert figures["kurtosis"] > figures["kurtosis_row"] + 0.5      # pooling rows of other scales


def test_constant_rows_count_as_0():
    matrix = np.random.default_rng(0).standard_t(5, (4, 50))
    matrix[1] = 3.0
    expected = sum(scipy.stats.kurtosis(matrix[row]) for row in (0, 2, 3)) / 4
    assert ws.moments(matrix)["kurtosis_row"] == pytest.approx(expected)
    assert all(math.isfinite(value) for value in ws.moments(np.ones((3, 4))).values())


def test_spectrum_against_singular_values():
    matrix = np.random.default_rng(0).standard_normal((30, 20)) @ np.diag(np.linspace(1, 5, 20))
    for m in (matrix, matrix.T):
        squares = np.linalg.svd(m - m.mean(axis=0), compute_uv=False) ** 2
        shares = np.append(0, squares.cumsum()) / squares.sum()
        expected = np.interp(np.array(ws.RANKS) * len(squares), range(len(shares)), shares)
        np.testing.assert_allclose(ws.spectrum(m), expected, rtol=1e-9)


def test_the_docstrings_example():
    matrix = np.array([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    assert ws.spectrum(matrix, [0.5]) == pytest.approx([0.9])


def test_records(models):
    """A record per matrix of a layer; the few ranks lie on the drawn curve; noise per shape."""
    records = ws.describe(chunking.Checkpoint(models["a"]))
    assert len(records) == 14 and len({r["layer"] for r in records}) == 2
    assert {r["role"] for r in records} == {"q", "k", "v", "o", "gate", "up", "down"}
    for r in records:
        drawn = np.interp(ws.RANKS, ws.GRID, r["curve"])
        np.testing.assert_allclose(r["spectrum"], drawn, rtol=1e-9)
        assert r["curve"][0] == 0 and r["curve"][-1] == pytest.approx(1)
        # These weights are white noise themselves: the same curve up to the draw.
        np.testing.assert_allclose(r["curve"], r["curve_noise"], atol=0.03)


def test_the_command_prints_both_tables(models, capsys):
    assert run(models["a"]) == 0
    out, error = capsys.readouterr()
    assert "kurtosis" in out and "explained variance" in out and not error
    assert out.count("\n") == 1 + 14 + 7 + 3 + 7            # headings, tensors, means, roles
    assert run(models["a"], "--json") == 0
    records = json.loads(capsys.readouterr().out)
    assert len(records) == 14 and list(records[0]) == [
        "name", "layer", "role", "shape", *ws.MOMENTS, "spectrum", "spectrum_noise"]


def test_without_matplotlib_one_line_says_so_before_any_work(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(models["a"], "--figure", tmp_path / "f.svg") == 1
    captured = capsys.readouterr()
    line = "error: --figure: matplotlib is not installed; fix: pip install matplotlib\n"
    assert captured.err == line
    assert not captured.out and not list(tmp_path.iterdir())
    assert run(models["a"]) == 0


def test_a_picture_is_an_svg_and_never_an_input(models, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(models["a"], "--figure", tmp_path / "f.png")
    assert caught.value.code == 2
    pytest.importorskip("matplotlib")
    (odd := tmp_path / "odd.svg").write_bytes(models["a"].read_bytes())
    assert run(odd, "--figure", odd) == 1
    assert "choose another --figure" in capsys.readouterr().err
    assert odd.read_bytes() == models["a"].read_bytes()
    assert run(models["a"], "--figure", tmp_path / "none/f.svg") == 1
    assert "its folder" in capsys.readouterr().err


def test_the_picture(models, tmp_path, capsys):
    """A panel per role with its curves; transparent; the same bytes again, without a date."""
    pytest.importorskip("matplotlib")
    for name in ("1.svg", "2.svg"):
        assert run(models["a"], "--figure", tmp_path / name) == 0
    assert "wrote" in capsys.readouterr().out
    text = (tmp_path / "1.svg").read_text()
    assert (tmp_path / "2.svg").read_text() == text and "date" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.svg", "2.svg"]
    root = xml.fromstring(text)
    words = [node.text for node in root.iter(SVG + "text")]
    assert {"q (64x64)", "down (64x96)", "gate (96x64)", "white noise of this shape"} <= set(words)
    panels = [node for node in root.iter() if node.get("id", "").startswith("axes_")]
    assert len(panels) == 8 and len([p for p in panels if p.findall(".//*[@clip-path]")]) == 7
    # Transparent: no filled background behind figure or panels.
    patches = [node for node in root.iter() if node.get("id", "").startswith("patch_")]
    fills = [path.get("style", "") for node in patches for path in node.iter(SVG + "path")]
    assert fills and not any("fill: #" in style and "opacity: 0" not in style for style in fills)


def test_a_model_of_many_roles_gets_a_picture_of_a_page(tmp_path, monkeypatch):
    """Experts of a mixture are roles of their own: more of them do not make more panels."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(ws, "PANELS", 4)
    tensors = {f"layers.0.experts.{i}.w1.weight": torch.randn(4, 4) for i in range(6)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert run(tmp_path / "x.safetensors", "--figure", tmp_path / "f.svg") == 0
    assert (tmp_path / "f.svg").read_text().count('id="axes_') == 4
