"""README.md: its commands parse, its Python runs, its numbers are those of experiments/results."""
import json
import re
import shlex
import statistics

import pytest

import chunking
import merge
import train
from conftest import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "experiments" / "results"


def block(name):
    return re.search(f"<!-- {name}: begin -->\n(.*?)<!-- {name}: end -->", README, re.S)[1]


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")][2:]


def lines(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def test_the_two_commands_stand_there_and_ci_runs_them():
    install = "pip install -r requirements.txt && python merge.py experiments/models/code.safetensors experiments/models/prose.safetensors"
    assert install in README and "    python -m pytest\n" in README
    run = (ROOT / ".ci" / "run").read_text()
    assert "pip install" in run and install.split("&& ")[1] in run and "python -m pytest" in run


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


def test_table_of_the_merge_is_the_recorded_result():
    recorded = {r["file"].removesuffix(".safetensors"): r["scores"] for r in lines("merge.jsonl")}
    table = rows(block("merge"))
    assert len(table) >= 6
    for name, *cells in table:
        scores = recorded[name.strip("`")]
        assert cells == [f"{scores[k]['mean']:.4f} +- {scores[k]['error']:.4f}" for k in ("code", "prose", "arithmetic", "accuracy")], name


def test_table_of_the_codec_is_the_recorded_result():
    records, table = lines("codec.jsonl"), rows(block("codec"))
    assert len(table) == 4
    show = lambda value: f"{value:.1e}" if value < 1e-3 else f"{value:.3f}"
    for ratio, *cells in table:
        group = [r for r in records if f"{r['ratio']:g}" == ratio]
        assert len({r["seed"] for r in group}) >= 3
        median = lambda key: show(statistics.median(r[key] for r in group))
        spread = lambda key: f"{median(key)} [{show(min(r[key] for r in group))}, {show(max(r[key] for r in group))}]"
        after = [f"{statistics.median(r['loss'][name]['after'][name] for r in group):.3f}" for name in ("code", "prose")]
        assert cells == [show(group[0]["white_noise"]) if group[0]["white_noise"] else "0", median("pca_training"), spread("trained_training"),
                         median("pca_unseen"), spread("trained_unseen"), f"{statistics.median(r['effective_ratio'] for r in group):.2f}", *after], ratio


def test_table_across_shapes_is_the_recorded_result():
    """Difference to the base; seeds averaged, error = sqrt(SE_text^2 + SE_seeds^2)."""
    records, table = lines("figure4.jsonl"), rows(block("cross"))
    assert len(table) >= 10
    for source, method, *cells in table:
        kind = {"noise through the same Sinkhorn": "carried"}.get(method, source if source in ("zero", "noise", "shuffled") else None)
        expected = []
        for lam in (0.02, 0.1, 0.5, 1.0):
            group = [r["difference"]["base"] for r in records if r["lam"] == lam and r["control"] == kind
                     and (kind in ("zero", "noise", "shuffled") or (r["source"] == source.strip("`") and r["pairing"] == "depth"))
                     and (kind is not None or r["align"] == method)]
            assert group, (source, method, lam)
            means = [d["mean"] for d in group]
            se = (statistics.mean(d["se_text"] for d in group) ** 2
                  + (statistics.variance(means) / len(means) if len(means) > 1 else 0)) ** 0.5
            expected.append(f"{statistics.mean(means):+.4f} +- {se:.4f}")
        assert cells == expected, (source, method)
