"""The tour (python lsmerge.py): every number recomputed, from the raw files and by
numpy."""
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import chunking as ck
import lsmerge
from conftest import ROOT, generator, overlap_matrix, save, transport_of

MODELS = ROOT / "experiments" / "models"
NAME = "model.layers.0.self_attn.q_proj.weight"
ROWS = ["w", "X", "real", "z = E(X)", "w - D(z)"]


def tour(*paths):
    return ck.command(lambda: lsmerge.tour([*map(str, paths)]))


def printed(capsys, *paths):
    """[(symbol, shape, mean, std), ...] of a tour, a row for each tensor that it
    shows."""
    assert tour(*paths) == 0
    lines, found = capsys.readouterr().out.splitlines(), []
    assert 12 <= len(lines) <= 24 and max(map(len, lines)) <= 88
    for line in lines:
        row = re.match(r".{8}(.*?)(?::|  ).*\[([\d, ]+)\] +(\S+e\S+) +(\S+e\S+)$", line)
        if row:
            shape = tuple(map(int, row[2].split(",")))
            found.append((row[1], shape, float(row[3]), float(row[4])))
    assert [row[0] for row in found] == [*ROWS, *ROWS, "z_s", "z~", "z_lambda", "W^",
                                         "W^ - w_t"]
    return found


def weights(path, name=NAME):
    return load_file(path)[name].double().numpy().ravel()


@pytest.fixture(scope="module")
def codec():
    return lsmerge.Codec.load(MODELS / "vae.safetensors")


def encoded(codec, x):
    """The network itself, on windows cut here by hand; x: whole windows."""
    with torch.no_grad():
        x_BTC = torch.from_numpy(x).float().reshape(-1, 16, 64)
        return codec.vae.encode(x_BTC).mu_BTZ.reshape(-1, 64).double().numpy()


def decoded(codec, z):
    with torch.no_grad():
        x = codec.vae.decode(torch.from_numpy(z).float().reshape(-1, 16, 64))
        return x.double().numpy().ravel()


def is_row(row, x, shape, near=6e-3):
    """Three digits are printed; a mean near 0 is noise of the arithmetic."""
    assert row[1] == shape
    assert row[2] == pytest.approx(x.mean(), rel=near, abs=2e-5)
    assert row[3] == pytest.approx(x.std(), rel=near)


@pytest.mark.parametrize("paths", [(), ("large", "base"), ("base", "code")], ids=str)
def test_every_number_recomputed(capsys, codec, paths):
    """Parents of equal shape share a unit: that of all their weights together."""
    files = [MODELS / f"{name}.safetensors" for name in paths or ("base", "large")]
    rows = printed(capsys, *files[:len(paths)])
    w = [weights(path) for path in files]
    both, z = np.concatenate(w), []
    for k in range(2):
        unit, N = both if len(w[0]) == len(w[1]) else w[k], len(w[k]) // 64
        x = (w[k] - unit.mean()) / unit.std()
        z.append(encoded(codec, x))
        mine = rows[5 * k:5 * k + 5]
        is_row(mine[0], w[k], (len(w[k]),))
        is_row(mine[1], x, (N, 64))
        is_row(mine[2], np.ones(1), (N, 64))
        is_row(mine[3], z[k], (N, 64))
        lost = (x - decoded(codec, z[k])) * unit.std()
        is_row(mine[4], lost, (len(w[k]),), near=0.05)
    # Line 3, and line 4 by scipy's square roots.
    J = len(z[0])
    projected = overlap_matrix(len(z[1]), J).numpy() @ z[1]
    is_row(rows[10], projected, (J, 64))
    A = transport_of(projected, z[0]).numpy()
    aligned = z[0].mean(0) + (projected - projected.mean(0)) @ A
    is_row(rows[11], aligned, (J, 64))
    # Lines 5 and 6, and how far that is from the target.
    merged = 0.9 * z[0] + 0.1 * aligned
    is_row(rows[12], merged, (J, 64))
    unit = both if len(w[0]) == len(w[1]) else w[0]
    result = decoded(codec, merged) * unit.std() + unit.mean()
    is_row(rows[13], result, (len(w[0]),))
    is_row(rows[14], result - w[0], (len(w[0]),))


def test_padding_is_shown_and_one_model_may_be_given(capsys, tmp_path):
    """100 weights: 28 of 128 numbers of the two chunks are padding."""
    w = torch.randn(5, 20, generator=generator())
    path = save(tmp_path / "x.safetensors", {"layers.3.q_proj.weight": w})
    rows = printed(capsys, path)
    assert rows[1][1] == rows[2][1] == rows[3][1] == rows[11][1] == (2, 64)
    assert rows[2][2] == pytest.approx(100 / 128, rel=6e-3)
    is_row(rows[0], w.double().numpy(), (100,))
