"""The tour (python lsmerge.py): every number recomputed, from the raw files and by numpy."""
import importlib
import re

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file

import chunking as ck
import lsmerge
from conftest import ROOT, generator, save

MODELS = ROOT / "experiments" / "models"
NAME = "model.layers.0.self_attn.q_proj.weight"


def tour(*paths):
    return ck.command(lambda: lsmerge.tour([*map(str, paths)]))


ENCODED = ["w", "X", "real: 1", "z = E(X)", "w - D(z)"]
MERGED = ["z_s", "z~", "z_lambda", "W^", "W^ - w_t"]


def printed(capsys, *paths):
    """{tensor: (shape, mean, std)}; of the two models' "w_t", "w_s", ..."""
    assert tour(*paths) == 0
    lines, rows = capsys.readouterr().out.splitlines(), []
    assert len(lines) == 19 and max(map(len, lines)) <= 88
    for line in lines:
        row = re.match(r".{8}(.{10})[A-Z].{27}\[([\d, ]+)\] +(\S+e\S+) +(\S+e\S+)$", line)
        if row:
            shape = tuple(map(int, row[2].split(", ")))
            rows.append((row[1].strip(), (shape, float(row[3]), float(row[4]))))
    assert [name for name, _ in rows] == 2 * ENCODED + MERGED
    found = dict(rows[10:])
    for k, part in (("t", rows[:5]), ("s", rows[5:10])):
        found |= {f"{name} of {k}": row for name, row in part}
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


def is_row(row, x, shape):
    """Three digits are printed; a mean near 0 is noise of the arithmetic."""
    assert row[0] == shape
    assert row[1] == pytest.approx(x.mean(), rel=6e-3, abs=2e-5)
    assert row[2] == pytest.approx(x.std(), rel=6e-3)


def overlap(J, I):
    """P of line 3, by the definition: the lengths that intervals have in common."""
    left = np.maximum(np.arange(J)[:, None] / J, np.arange(I) / I)
    right = np.minimum((np.arange(J)[:, None] + 1) / J, (np.arange(I) + 1) / I)
    return J * np.clip(right - left, 0, None)


def test_every_number_recomputed(capsys, codec):
    found = printed(capsys)
    w_t, w_s = weights(MODELS / "base.safetensors"), weights(MODELS / "large.safetensors")
    latents = {}
    for k, w in (("t", w_t), ("s", w_s)):
        x, N = (w - w.mean()) / w.std(), len(w) // 64
        z = latents[k] = encoded(codec, x)
        is_row(found[f"w of {k}"], w, (len(w),))
        is_row(found[f"X of {k}"], x, (N, 64))
        is_row(found[f"real: 1 of {k}"], np.ones(1), (N, 64))
        is_row(found[f"z = E(X) of {k}"], z, (N, 64))
        lost = (decoded(codec, z) - x).std() * w.std()
        assert found[f"w - D(z) of {k}"][2] == pytest.approx(lost, rel=0.05)
    z_t, z_s = latents["t"], latents["s"]
    J = len(z_t)
    projected = overlap(J, len(z_s)) @ z_s
    is_row(found["z_s"], projected, (J, 64))
    # Line 4, by scipy's square roots.
    S_s, S_t = np.cov(projected.T, bias=True), np.cov(z_t.T, bias=True)
    root = scipy.linalg.sqrtm(S_s).real
    inverse, middle = np.linalg.inv(root), scipy.linalg.sqrtm(root @ S_t @ root).real
    A = inverse @ middle @ inverse
    aligned = z_t.mean(0) + (projected - projected.mean(0)) @ A
    is_row(found["z~"], aligned, (J, 64))
    # Lines 5 and 6, and how far that is from the target.
    merged = 0.9 * z_t + 0.1 * aligned
    is_row(found["z_lambda"], merged, (J, 64))
    w = decoded(codec, merged) * w_t.std() + w_t.mean()
    is_row(found["W^"], w, (len(w_t),))
    is_row(found["W^ - w_t"], w - w_t, (len(w_t),))


def test_it_is_what_ls_merge_does(capsys, codec):
    models = [ck.Checkpoint(MODELS / f"{name}.safetensors") for name in ("base", "large")]
    parents = [lsmerge.Parent(lambda start=0, stop=None, m=m: m.read(NAME, start, stop),
                              ck.measure(m, NAME), codec) for m in models]
    source = lsmerge.as_source(*parents, lsmerge.Alignment("gaussian"))
    pieces = lsmerge.ls_merge(parents[0], [source], [0.9, 0.1])
    merged = torch.cat([piece for _, piece in pieces]).double().numpy()
    w = models[0].read(NAME).double().numpy()
    found = printed(capsys)
    is_row(found["W^"], merged, (len(w),))
    is_row(found["W^ - w_t"], merged - w, (len(w),))


@pytest.mark.parametrize("target, source", [
    ("large", "base"), ("pruned", "grown"), ("base", "code")])
def test_other_models_and_the_other_way_round(capsys, target, source):
    """Parents of equal shape share a unit: that of all their weights together."""
    paths = [MODELS / f"{name}.safetensors" for name in (target, source)]
    found = printed(capsys, *paths)
    w = [weights(path) for path in paths]
    both = np.concatenate(w)
    for k, w_k in zip("ts", w):
        is_row(found[f"w of {k}"], w_k, (len(w_k),))
        unit = both if len(w[0]) == len(w[1]) else w_k
        x = (w_k - unit.mean()) / unit.std()
        is_row(found[f"X of {k}"], x, (len(w_k) // 64, 64))
    assert found["z~"][0] == found["z = E(X) of t"][0] == (len(w[0]) // 64, 64)
    assert 0 < found["W^ - w_t"][2] < found["w of t"][2]


def test_padding_is_shown_and_one_model_may_be_given(capsys, tmp_path):
    """100 weights: 2 chunks, the second one with 28 numbers of padding."""
    w = torch.randn(5, 20, generator=generator())
    path = save(tmp_path / "x.safetensors", {"layers.3.q_proj.weight": w})
    found = printed(capsys, path)
    assert found["X of t"][0] == found["z~"][0] == (2, 64)
    assert found["real: 1 of t"][:2] == ((2, 64), pytest.approx(100 / 128, abs=0.006))
    is_row(found["w of t"], w.double().numpy(), (100,))


def test_every_function_that_it_names_exists(capsys):
    assert tour() == 0
    out = capsys.readouterr().out
    names = re.findall(r"\b(align|chunking|lsmerge)\.([\w.]+) +\[", out)
    assert len(names) == 12
    for module, path in names:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        assert callable(found)


def test_bad_input_is_one_line(capsys, tmp_path):
    norms = save(tmp_path / "norms.safetensors", {"layers.0.norm.weight": torch.ones(8)})
    base = MODELS / "base.safetensors"
    for paths in ((tmp_path / "none",), (base, norms), (MODELS / "vae.safetensors",),
                  (ROOT / "lsmerge.py",)):
        assert tour(*paths) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("error: ") and "; fix: " in said
    for argv in (("a", "b", "c"), ("",)):
        with pytest.raises(SystemExit) as caught:
            tour(*argv)
        assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1
