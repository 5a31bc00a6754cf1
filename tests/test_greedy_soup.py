"""experiments/greedy_soup.py. Oracles: the definition of the recipe, means by torch, a known best
soup."""
import json
import shlex
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import chunking
import greedy_soup as gs
from conftest import llama_tensors

# A score with one best answer: minus the squared distance to a wanted model.
JUDGE = """
import sys, os
from safetensors.numpy import load_file
path = sys.argv[-1]
path = path + "/model.safetensors" if os.path.isdir(path) else path
f, g = load_file(path), load_file(sys.argv[1])
print("scores: 7", -sum(((f[k].astype(float) - g[k]) ** 2).sum() for k in g))
"""


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


def test_an_equal_score_is_not_better():
    assert gs.greedy_soup(3, lambda kept: 1.0) == [0]


@pytest.mark.parametrize("kept, expected", [
    ([0], "a b --lam 0.0"), ([1], "a b --lam 1.0"), ([2], "a c --lam 1.0"),
    ([0, 2], "a c --lam 0.5"), ([1, 3], "a b d --lam 0.5,0.5"),
    ([0, 1, 2, 3], "a b c d --lam 0.25,0.25,0.25")])
def test_what_merge_is_told(kept, expected):
    assert gs.merge_arguments(["a", "b", "c", "d"], kept) == expected.split()


@pytest.fixture
def soup(models, tmp_path):
    """(paths of three models, --eval, tensors): a judge who wants the mean of the last two."""
    tensors = [llama_tensors(seed) for seed in (11, 12, 13)]
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path, model in zip(paths, tensors):
        save_file(model, path)
    wanted = {name: (tensors[1][name] + tensors[2][name]) / 2 for name in tensors[0]}
    save_file(wanted, tmp_path / "wanted.safetensors")
    (tmp_path / "judge.py").write_text(JUDGE)
    return paths, f"{sys.executable} {tmp_path}/judge.py {tmp_path}/wanted.safetensors", wanted


@pytest.mark.parametrize("flags", [["--space", "weight"], ["--vae", "exact"]])
def test_the_soup_keeps_what_helps(soup, tmp_path, capsys, flags):
    """The target is not among those kept: it still gives the names."""
    paths, judge, wanted = soup
    before = set(tmp_path.iterdir())
    result, report = tmp_path / "m.safetensors", tmp_path / "r.json"
    assert run("--eval", judge, *paths, *flags, "-o", result, "--report", report) == 0
    out, got = capsys.readouterr().out, load_file(result)
    assert out.count("soup of") == 5 and out.count("wrote") == 1    # one report: the last merge's
    assert f"kept 2 of 3: {paths[1]}, {paths[2]}\n" in out
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():        # an exact codec rounds once more, in float32
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-6)
    assert json.loads(report.read_text())["lambda"] == [0.5, 0.5]
    assert set(tmp_path.iterdir()) == before | {result, report}


def test_a_folder_gives_a_folder(soup, tmp_path):
    paths, judge, wanted = soup
    (folder := tmp_path / "model").mkdir()
    (folder / "config.json").write_text('{"num_hidden_layers": 2}\n')
    paths[0].rename(folder / "model.safetensors")
    arguments = ["--eval", judge, folder, *paths[1:], "-o", tmp_path / "m", "--space", "weight"]
    assert run(*arguments) == 0 and run(*arguments) == 1 and run(*arguments, "--force") == 0
    assert (tmp_path / "m/config.json").read_bytes() == (folder / "config.json").read_bytes()
    got = load_file(tmp_path / "m/model.safetensors")
    torch.testing.assert_close(got["model.norm.weight"], wanted["model.norm.weight"])


def test_the_best_alone_is_itself(models, soup, tmp_path, capsys):
    """The judge wants the second model, and gets it, bit for bit in weight space."""
    paths, _, _ = soup
    judge = f"{sys.executable} {tmp_path}/judge.py {paths[1]}"
    assert run("--eval", judge, *paths, "--space", "weight", "-o", tmp_path / "m.safetensors") == 0
    got = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in load_file(paths[1]).items())
    assert "kept 1 of 3" in capsys.readouterr().out


@pytest.mark.parametrize("command, words", [
    ("false", "exit code 1"), ("echo no score", "no number"),
    ("printf '12 docs loss nan %.0s'", "no number"), (r"printf '\377 %.0s'", "no number"),
    ("/no/such/program", "No such file")])
def test_an_evaluation_that_fails_is_one_line(soup, tmp_path, capsys, command, words):
    before = sorted(tmp_path.iterdir())
    flags = ["--space", "weight", "-o", tmp_path / "m.safetensors"]
    assert run("--eval", command, *soup[0], *flags) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("words, score", [
    ("loaded 12 docs\\nscore=0.5", 0.5), ("7 (accuracy: 81.5%%)", 81.5), ("-1e-3", -0.001),
    ("[3, .5]", 0.5), ("0.5 after the 3rd", 0.5)])
def test_the_last_number_is_the_score(words, score):
    """A good command does not print the path that comes last; if it does, no digit is a score."""
    assert gs.evaluate(f"printf '{words}\\n%s'", "/a/1/b_2.safetensors") == score


@pytest.mark.parametrize("case", ["output exists", "output is an input", "report exists",
                                  "no such model"])
def test_refused_before_anything_is_scored(soup, tmp_path, capsys, case):
    paths, _, _ = soup
    old, new, marker = (tmp_path / name for name in ("old.safetensors", "m.safetensors", "scored"))
    old.write_text("old")
    more = {"output exists": ["-o", old], "output is an input": ["-o", paths[1], "--force"],
            "report exists": ["-o", new, "--report", old], "no such model": ["-o", new]}[case]
    models = [*paths, tmp_path / "none.safetensors"] if case == "no such model" else paths
    assert run("--eval", f"touch {marker}", *models, "--space", "weight", *more) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not marker.exists() and not new.exists() and old.read_text() == "old"


def test_force_replaces(soup, tmp_path):
    paths, judge, _ = soup
    (tmp_path / "old.safetensors").write_text("old")
    flags = ["--space", "weight", "-o", tmp_path / "old.safetensors", "--force"]
    assert run("--eval", judge, *paths, *flags) == 0
    assert load_file(tmp_path / "old.safetensors")


@pytest.mark.parametrize("line", [
    "a b", "--eval true a", "--eval \"echo 'x\" a b", "--eval '' a b",
    "--eval true --space weight a b", "--eval true a b --lam 0.5", "--eval true a b --lambda=0.5",
    "--eval true a b --operator slerp", "--eval true a b --init random",
    "--eval true a b --dry-run"])
def test_usage(line, capsys):
    with pytest.raises(SystemExit) as caught:
        gs.main(shlex.split(line))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_the_script_says_how_it_is_used(capsys):
    with pytest.raises(SystemExit):
        gs.main(["--help"])
    assert "--eval CMD" in capsys.readouterr().out
