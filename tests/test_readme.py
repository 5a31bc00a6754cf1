"""README.md: its commands parse, its Python runs, its numbers are those of experiments/results."""
import re
import shlex

import pytest
import torch

import chunking
import merge
import train
from conftest import ROOT, llama_tensors

README = (ROOT / "README.md").read_text()
def test_the_two_commands_stand_there_and_ci_runs_them():
    install = "pip install -r requirements.txt && python merge.py experiments/models/code.safetensors experiments/models/prose.safetensors"
    assert install in README and "    python -m pytest\n" in README
    run = (ROOT / ".ci" / "run").read_text()
    assert 'pip" install' in run and "-r requirements.txt" in run
    assert install.split("&& ")[1] in run and "python -m pytest" in run


def test_every_merge_and_train_command_parses():
    joined = README.replace("\\\n", " ")
    commands = [shlex.split(c, comments=True)[2:] for c in re.findall(r"^ {4}(?:.*&& )?(python merge\.py experiments.*)$", joined, re.M)]
    assert len(commands) >= 5
    for arguments in commands:
        merge.parse(arguments)


def test_every_named_function_exists():
    import align, lsmerge, vae
    modules = {"align": align, "chunking": chunking, "lsmerge": lsmerge, "merge": merge, "train": train, "vae": vae}
    named = re.findall(r"`(\w+)\.(\w+)(?:\.(\w+))?`", README)
    assert len(named) > 15
    for module, name, attribute in named:
        if module in modules and name != "py":
            assert hasattr(getattr(modules[module], name), attribute) if attribute else hasattr(modules[module], name), f"{module}.{name}"


def test_it_is_two_screens_that_fit():
    """Tables are as wide as a page; the report fills the blocks (test_report.py compares them)."""
    lines = README.splitlines()
    assert len(lines) <= 240
    assert not [line for line in lines if line.startswith("|") and len(line) > 120]
    for name in ("main", "verdicts", "merge", "bench"):
        begin, end = (lines.index(f"<!-- {name}: {edge} -->") for edge in ("begin", "end"))
        assert end > begin + 2


def test_every_picture_and_page_exists():
    for path in re.findall(r"\]\(([\w./-]+)", README):
        assert (ROOT / path).exists(), path


def test_the_python_example_merges_two_state_dicts():
    """Norms and embeddings as the command treats them; nothing is written to the inputs."""
    a, b = llama_tensors(1, dtype=torch.float64), llama_tensors(2, dtype=torch.float64)
    kept = {name: tensor.clone() for name, tensor in a.items()}
    names = {"a": a, "b": b}
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], names)
    assert set(names["merged"]) == set(a)
    for name, got in names["merged"].items():
        torch.testing.assert_close(got, (kept[name] + b[name]) / 2, rtol=1e-5, atol=1e-6)
        assert torch.equal(a[name], kept[name])
