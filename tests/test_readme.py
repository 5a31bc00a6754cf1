"""README.md: its commands run in order, its Python runs, what it names exists."""
import re
import shlex
import sys

import torch

import align
import chunking
import evaluate
import lsmerge
import match
import merge
import train
import vae
from conftest import ROOT, llama_tensors

README = (ROOT / "README.md").read_text()


def commands():
    """The `python FILE ...` lines of README's code blocks, in order, as words."""
    joined = README.replace("\\\n", " ")
    lines = re.findall(r"^ {4}(?:.*&& |torchrun .*?)?(?:python )?(\S+\.py .*)$", joined,
                       re.M)
    return [shlex.split(line, comments=True) for line in lines]


def test_the_two_commands_stand_there_and_ci_runs_them():
    models = "experiments/models/"
    install = ("pip install -r requirements.txt && python merge.py "
               f"{models}code.safetensors {models}prose.safetensors")
    assert install in README and "    python -m pytest\n" in README
    run = (ROOT / ".ci" / "run").read_text()
    assert 'pip" install' in run and "-r requirements.txt" in run
    assert install.split("&& ")[1] in run and "python -m pytest" in run


def run_evaluate(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    return evaluate.main()


def test_every_command_on_our_own_models_runs_in_order(tmp_path, monkeypatch, capsys):
    """From a folder that holds nothing but the project: none is in another's way. A
    training is cut short, and two texts are scored."""
    short = ["--init", "pca", "--steps1", "1", "--steps2", "1"]
    whole = train.main
    monkeypatch.setattr(train, "main", lambda argv: whole([*argv, *short]))
    texts = (b"12+34=46\n",) * 2
    monkeypatch.setattr(evaluate, "held_out", lambda domain, split: texts)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    ran = 0
    for file, *arguments in commands():
        if not any("experiments/models/" in word for word in arguments):
            continue
        known = {"merge.py": merge.main, "train.py": whole,
                 "experiments/tools/match.py": match.main,
                 "experiments/evaluate.py": lambda a: run_evaluate(a, monkeypatch)}
        code = known[file](arguments)
        assert not code, (file, arguments, capsys.readouterr().err)
        ran += 1
    assert ran >= 5


def test_commands_on_your_own_models_parse():
    """Their files do not exist; what the command line alone decides is right."""
    parsers = {"merge.py": merge.parse, "train.py": train.parse,
               "experiments/tools/match.py": match.parse}
    parsed = 0
    for file, *arguments in commands():
        if file in parsers:
            parsers[file](arguments)
            parsed += 1
    assert parsed >= 10


def test_every_named_function_exists(capsys):
    """In README, in its table of files, where a name stands without its module, and in
    the tour."""
    modules = {"align": align, "chunking": chunking, "lsmerge": lsmerge, "merge": merge,
               "train": train, "vae": vae}
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
    """Norms and embeddings as the command treats them; nothing is written to the
    inputs."""
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
