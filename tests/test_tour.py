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


def printed(capsys, *paths):
    """{symbol: (shape, mean, std, rest of the line)}; the projected z_s is "z_s too"."""
    assert tour(*paths) == 0
    lines, found = capsys.readouterr().out.splitlines(), {}
    assert 12 <= len(lines) <= 20 and max(map(len, lines)) <= 104
    number = r" +(\S+e\S+)"
    for line in lines:
        row = re.match(rf"(.{{8}})(\S+) +[A-Z]+: ([\dx ]+?){number}{number}  (.*)", line)
        if row:
            symbol = row[2] + " too" * row[1].startswith("line 3")
            shape = tuple(map(int, row[3].split(" x ")))
            found[symbol] = shape, float(row[4]), float(row[5]), row[6]
    assert list(found) == ["w_t", "X_t", "z_t", "w_s", "X_s", "z_s", "z_s too", "z~",
                           "z_lambda", "W^"]
    return found


def number(row):
    """The last number of a row's note."""
    return float(re.findall(r"\d\.\d+(?:e[-+]\d+)?", row[3])[-1])


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
        is_row(found[f"w_{k}"], w, (len(w),))
        is_row(found[f"X_{k}"], x, (N // 16, 16, 64))
        assert f"N = {N}, padding 0" in found[f"X_{k}"][3]
        is_row(found[f"z_{k}"], z, (N, 64))
        lost = ((decoded(codec, z) - x) ** 2).mean()
        assert number(found[f"z_{k}"]) == pytest.approx(lost, rel=0.05, abs=1e-9)
    z_t, z_s = latents["t"], latents["s"]
    J = len(z_t)
    projected = overlap(J, len(z_s)) @ z_s
    is_row(found["z_s too"], projected, (J, 64))
    # Line 4, by scipy's square roots.
    S_s, S_t = np.cov(projected.T, bias=True), np.cov(z_t.T, bias=True)
    root = scipy.linalg.sqrtm(S_s).real
    inverse, middle = np.linalg.inv(root), scipy.linalg.sqrtm(root @ S_t @ root).real
    A = inverse @ middle @ inverse
    aligned = z_t.mean(0) + (projected - projected.mean(0)) @ A
    is_row(found["z~"], aligned, (J, 64))
    shift = ((projected.mean(0) - z_t.mean(0)) ** 2).sum()
    cost = (shift + np.trace(S_s) + np.trace(S_t) - 2 * np.trace(middle)) / 64
    before, after = map(float, re.findall(r"\d\.\d+", found["z~"][3]))
    assert before == pytest.approx(cost, abs=6e-4) and after == 0
    # Lines 5 and 6, and how far that is from the target.
    merged = 0.9 * z_t + 0.1 * aligned
    is_row(found["z_lambda"], merged, (J, 64))
    w = decoded(codec, merged) * w_t.std() + w_t.mean()
    is_row(found["W^"], w, (len(w_t),))
    far = np.linalg.norm(w - w_t) / np.linalg.norm(w_t)
    assert number(found["W^"]) == pytest.approx(far, abs=5e-4)


def test_it_is_what_ls_merge_does(capsys, codec):
    models = [ck.Checkpoint(MODELS / f"{name}.safetensors") for name in ("base", "large")]
    parents = [lsmerge.Parent(lambda start=0, stop=None, m=m: m.read(NAME, start, stop),
                              ck.measure(m, NAME), codec) for m in models]
    source = lsmerge.as_source(*parents, lsmerge.Alignment("gaussian"))
    pieces = lsmerge.ls_merge(parents[0], [source], [0.9, 0.1])
    merged = torch.cat([piece for _, piece in pieces])
    w = models[0].read(NAME).double()
    far = (merged.double() - w).norm() / w.norm()
    assert number(printed(capsys)["W^"]) == pytest.approx(far.item(), abs=6e-5)


@pytest.mark.parametrize("target, source", [
    ("large", "base"), ("pruned", "grown"), ("base", "code")])
def test_other_models_and_the_other_way_round(capsys, target, source):
    """Parents of equal shape share a unit: that of all their weights together."""
    paths = [MODELS / f"{name}.safetensors" for name in (target, source)]
    found = printed(capsys, *paths)
    w = [weights(path) for path in paths]
    both = np.concatenate(w)
    for k, w_k in zip("ts", w):
        is_row(found[f"w_{k}"], w_k, (len(w_k),))
        unit = both if len(w[0]) == len(w[1]) else w_k
        x = (w_k - unit.mean()) / unit.std()
        is_row(found[f"X_{k}"], x, (len(w_k) // 1024, 16, 64))
    assert found["z~"][0] == found["z_t"][0] == (len(w[0]) // 64, 64)
    assert 0 < number(found["W^"]) < 1


def test_padding_is_counted_and_one_model_may_be_given(capsys, tmp_path):
    """100 weights: 28 numbers of padding in the 2nd chunk, 14 chunks in the window."""
    w = torch.randn(5, 20, generator=generator())
    path = save(tmp_path / "x.safetensors", {"layers.3.q_proj.weight": w})
    found = printed(capsys, path)
    assert found["X_t"][0] == (1, 16, 64)
    assert f"padding {28 + 14 * 64}" in found["X_t"][3]
    assert found["z_t"][0] == found["z~"][0] == (2, 64)
    is_row(found["w_t"], w.double().numpy(), (100,))


def test_every_function_that_it_names_exists(capsys):
    assert tour() == 0
    out = capsys.readouterr().out
    names = re.findall(r"\b(align|chunking|lsmerge)\.([\w.]+)$", out, re.M)
    assert len(names) >= 10
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
