"""experiments/tools/greedy_soup.py. Oracles: the definition of the recipe, means by torch, a known
best soup."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import chunking
import greedy_soup as gs
from conftest import ROOT, llama_tensors, relative


def run(*arguments):
    return chunking.command(lambda: gs.main([*map(str, arguments), "--quiet"]))


@pytest.mark.parametrize("seed", range(5))
def test_greedy_soup_by_its_definition(seed):
    values = np.random.default_rng(seed).normal(size=(5, 3))

    def score(kept):
        return -np.abs(values[list(kept)].mean(axis=0)).sum()
    order = sorted(range(5), key=lambda i: -score([i]))
    kept = [order[0]]
    for index in order[1:]:
        kept += [index] if score(kept + [index]) > score(kept) else []
    calls = []
    assert gs.greedy_soup(5, lambda k: calls.append(k) or score(k)) == sorted(kept)
    assert len(calls) == 9 and all(call == sorted(call) for call in calls)
    assert gs.greedy_soup(3, lambda kept: 1.0) == [0]       # an equal score is not better


@pytest.mark.parametrize("kept, expected", [
    ([0], "a b --lam 0.0"), ([1], "a b --lam 1.0"), ([2], "a c --lam 1.0"),
    ([0, 2], "a c --lam 0.5"), ([1, 3], "a b d --lam 0.5,0.5"),
    ([0, 1, 2, 3], "a b c d --lam 0.25,0.25,0.25")])
def test_what_merge_is_told(kept, expected):
    assert gs.merge_arguments(["a", "b", "c", "d"], kept) == expected.split()


@pytest.fixture
def soup(tmp_path, monkeypatch):
    """(paths of three relatives, the mean of the last two): a judge who wants that mean."""
    first = llama_tensors(11, hidden=32, mlp=32)
    tensors = [first, relative(first, 12), relative(first, 13)]
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path, model in zip(paths, tensors):
        save_file(model, path)
    wanted = {name: (tensors[1][name] + tensors[2][name]) / 2 for name in tensors[0]}

    def judge(line, path):
        found = load_file(path if path.endswith(".safetensors") else f"{path}/model.safetensors")
        return -sum((found[name] - wanted[name]).square().sum().item() for name in wanted)
    monkeypatch.setattr(gs, "evaluate", judge)
    return paths, wanted


@pytest.mark.parametrize("flags", [["--space", "weight"], ["--vae", "exact"]])
def test_the_soup_keeps_what_helps(soup, tmp_path, capsys, flags):
    """The target is not among those kept: it still gives the names."""
    paths, wanted = soup
    before = set(tmp_path.iterdir())
    result, report = tmp_path / "m.safetensors", tmp_path / "r.json"
    assert run("--eval", "x", *paths, *flags, "-o", result, "--report", report) == 0
    out, got = capsys.readouterr().out, load_file(result)
    assert out.count("soup of") == 5 and out.count("wrote") == 1    # one report: the last merge's
    assert f"kept 2 of 3: {paths[1]}, {paths[2]}\n" in out
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():        # an exact codec rounds once more, in float32
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)
    assert json.loads(report.read_text())["lambda"] == [0.5, 0.5]
    assert set(tmp_path.iterdir()) == before | {result, report}


def test_a_folder_gives_a_folder_and_force_replaces_it(soup, tmp_path):
    paths, wanted = soup
    (folder := tmp_path / "model").mkdir()
    (folder / "config.json").write_text('{"num_hidden_layers": 2}\n')
    paths[0].rename(folder / "model.safetensors")
    line = ["--eval", "x", folder, *paths[1:], "-o", tmp_path / "m", "--space", "weight"]
    assert run(*line) == 0 and run(*line) == 1 and run(*line, "--force") == 0
    assert (tmp_path / "m/config.json").read_bytes() == (folder / "config.json").read_bytes()
    got = load_file(tmp_path / "m/model.safetensors")
    torch.testing.assert_close(got["model.norm.weight"], wanted["model.norm.weight"])


def test_a_command_of_ones_own(tmp_path):
    """The script, from another folder, with a judge who wants the second model: it comes back, bit
    for bit in weight space. A judge who fails is one line."""
    first = llama_tensors(11, hidden=32, mlp=32)
    for name, tensors in (("a", first), ("b", relative(first, 12))):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    judge = tmp_path / "judge.py"
    judge.write_text("import sys, hashlib\n"
                     "mine, other = (open(p, 'rb').read()[-4000:] for p in sys.argv[1:])\n"
                     "print('scores: 7', float(mine == other))")
    command = [sys.executable, ROOT / "experiments/tools/greedy_soup.py", "a.safetensors",
               "b.safetensors", "--space", "weight", "-o", "m.safetensors", "--eval"]
    done = subprocess.run([*command, f"{sys.executable} judge.py b.safetensors"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "kept 1 of 2: b.safetensors" in done.stdout, done.stderr
    got, wanted = load_file(tmp_path / "m.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("command, words", [
    ("false", "exit code 1"), ("echo no score", "no number"),
    ("printf '12 docs loss nan %.0s'", "no number"), (r"printf '\377 %.0s'", "no number")])
def test_an_evaluation_that_fails_says_why(command, words):
    with pytest.raises(chunking.CheckpointError, match=words):
        gs.evaluate(command, "x")


@pytest.mark.parametrize("words, score", [
    ("loaded 12 docs\\nscore=0.5", 0.5), ("7 (accuracy: 81.5%%)", 81.5), ("-1e-3", -0.001),
    ("[3, .5]", 0.5), ("0.5 after the 3rd", 0.5)])
def test_the_last_number_is_the_score(words, score):
    """A good command does not print the path that comes last; if it does, no digit is a score."""
    assert gs.evaluate(f"printf '{words}\\n%s'", "/a/1/b_2.safetensors") == score
