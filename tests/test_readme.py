"""What a reader tries first. README.md: its commands run in order, so does its Python,
what it names exists. The tour (python lsmerge.py): every number, by numpy."""
import re
import shlex
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import align
import chunking
import evaluate
import lsmerge
import match
import merge
import train
import vae
from conftest import ROOT, generator, llama_tensors, overlap_matrix, save, transport_of

README = (ROOT / "README.md").read_text()
COMMANDS = {"merge.py": merge, "train.py": train, "experiments/tools/match.py": match,
            "experiments/evaluate.py": evaluate}


def commands():
    """The `python FILE ...` lines of README's code blocks, in order, as words."""
    joined = README.replace("\\\n", " ")
    lines = re.findall(r"^ {4}(?:.*&& |torchrun .*?)?(?:python )?(\S+\.py .*)$", joined,
                       re.M)
    return [shlex.split(line, comments=True) for line in lines]


def test_every_command_on_our_own_models_runs_in_order(tmp_path, monkeypatch, capsys):
    """In a folder with nothing but the project. Training and scoring are cut short."""
    monkeypatch.setattr(merge, "VAEConfig", lambda: vae.VAEConfig(init="pca"))
    monkeypatch.setattr(train, "Schedule", partial(train.Schedule, steps1=1, steps2=1))
    texts = (b"12+34=46\n",) * 2
    monkeypatch.setattr(evaluate, "held_out", lambda domain, split: texts)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    ran = 0
    for words in commands():
        if any("experiments/models/" in word for word in words):
            monkeypatch.setattr(sys, "argv", words)
            assert not COMMANDS[words[0]].main(), (words, capsys.readouterr().err)
            ran += 1
    assert ran >= 5


def test_commands_on_your_own_models_parse():
    parsed = 0
    for file, *arguments in commands():
        if file in COMMANDS and COMMANDS[file] is not evaluate:
            COMMANDS[file].parse(arguments)
            parsed += 1
    assert parsed >= 10


def test_every_named_function_exists(capsys):
    six = (align, chunking, lsmerge, merge, train, vae)
    modules = {module.__name__: module for module in six}
    assert lsmerge.tour([]) is None
    named = re.findall(r"\b(align|chunking|lsmerge)\.([\w.]+)", capsys.readouterr().out)
    named += re.findall(r"`(\w+)\.(\w+)`", README)
    for module, held in re.findall(r"^\| \d \| `(\w+)\.py` \| (.*?) \|", README, re.M):
        named += [(module, name) for name in re.findall(r"`([\w.]+)`", held)]
    assert len(named) >= 30
    for module, name in named:
        if module in modules and name != "py":
            found = modules[module]
            for part in name.split("."):
                found = getattr(found, part)


def test_every_picture_and_page_exists():
    for path in re.findall(r"\]\(([\w./-]+)", README):
        assert (ROOT / path).exists(), path


def test_the_python_example_merges_two_state_dicts():
    a = llama_tensors(1, dtype=torch.float64)
    b = llama_tensors(2, dtype=torch.float64)
    kept = {name: tensor.clone() for name, tensor in a.items()}
    names = {"a": a, "b": b}
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], names)
    assert set(names["merged"]) == set(a)
    for name, got in names["merged"].items():
        average = (kept[name] + b[name]) / 2
        torch.testing.assert_close(got, average, rtol=1e-5, atol=1e-6)
        assert torch.equal(a[name], kept[name])


# --- The tour -------------------------------------------------------------------------
MODELS = ROOT / "experiments" / "models"
NAME = "model.layers.0.self_attn.q_proj.weight"
ROWS = ["w", "X", "z = E(X)", "w - D(z)"]


def printed(capsys, *paths):
    """[(symbol, shape, mean, std), ...] of a tour, for each tensor that it shows."""
    assert chunking.command(lambda: lsmerge.tour([*map(str, paths)])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 12 <= len(lines) <= 24 and max(map(len, lines)) <= 88
    found = []
    for line in lines:
        row = re.match(r".{8}(.*?)(?::|  ).*\[([\d, ]+)\] +(\S+e\S+) +(\S+e\S+)$", line)
        if row:
            shape = tuple(map(int, row[2].split(",")))
            found.append((row[1], shape, float(row[3]), float(row[4])))
    assert [row[0] for row in found] == [*ROWS, *ROWS, "z_s", "z~", "z_lambda", "W^"]
    return found


def is_row(row, x, shape, near=6e-3):
    """Three digits are printed; a mean near 0 is noise of the arithmetic."""
    assert row[1] == shape
    assert row[2] == pytest.approx(x.mean(), rel=near, abs=2e-5)
    assert row[3] == pytest.approx(x.std(), rel=near)


@torch.no_grad()
def through(function, x):
    """The network itself, on windows cut here by hand; x: whole windows."""
    return function(torch.from_numpy(x).float().reshape(-1, 16, 64)).double().numpy()


@pytest.mark.parametrize("paths", [(), ("large", "base"), ("base", "code")], ids=str)
def test_every_number_of_the_tour(capsys, paths):
    """Parents of equal shape share a unit: that of all their weights together."""
    net = lsmerge.Codec.load(MODELS / "vae.safetensors").vae
    files = [MODELS / f"{name}.safetensors" for name in paths or ("base", "large")]
    rows = printed(capsys, *files[:len(paths)])
    w = [load_file(path)[NAME].double().numpy().ravel() for path in files]
    units = w
    if len(w[0]) == len(w[1]):
        units = [np.concatenate(w)] * 2
    z = []
    for k, unit in enumerate(units):
        N = len(w[k]) // 64
        x = (w[k] - unit.mean()) / unit.std()
        z.append(through(net.encode_mean, x).reshape(N, 64))
        lost = (x - through(net.decode, z[k]).ravel()) * unit.std()
        mine = rows[4 * k:4 * k + 4]
        is_row(mine[0], w[k], (len(w[k]),))
        is_row(mine[1], x, (N, 64))
        is_row(mine[2], z[k], (N, 64))
        is_row(mine[3], lost, (len(w[k]),), near=0.05)
    # line 3, and line 4 by scipy's square roots
    J = len(z[0])
    projected = overlap_matrix(len(z[1]), J).numpy() @ z[1]
    is_row(rows[8], projected, (J, 64))
    A = transport_of(projected, z[0]).numpy()
    aligned = z[0].mean(0) + (projected - projected.mean(0)) @ A
    is_row(rows[9], aligned, (J, 64))
    # lines 5 and 6
    merged = 0.9 * z[0] + 0.1 * aligned
    is_row(rows[10], merged, (J, 64))
    result = through(net.decode, merged).ravel() * units[0].std() + units[0].mean()
    is_row(rows[11], result, (len(w[0]),))


def test_one_model_may_be_given_and_chunks_are_padded(capsys, tmp_path):
    """100 weights: two chunks of 64."""
    w = torch.randn(5, 20, generator=generator())
    path = save(tmp_path / "x.safetensors", {"layers.3.q_proj.weight": w})
    rows = printed(capsys, path)
    assert rows[1][1] == rows[2][1] == rows[9][1] == (2, 64)
    assert rows[0][1] == rows[3][1] == (100,)
