"""experiments/compare.py and baselines' neighbours: records, paired differences,
verdicts. Oracles: scipy's paired t statistic, numbers by hand."""
import ast
import graphlib
import math

import numpy as np
import pytest
import scipy.stats

import compare
from compare import Difference, difference, gain, sign
from conftest import ROOT

EXPERIMENTS = ROOT / "experiments"


# --- Records ------------------------------------------------------------------------
def test_rows_replace_those_of_equal_names(tmp_path):
    compare.keep("pruned", [{"row": "a", "lam": 1, "seed": 0, "v": 1},
                            {"row": "b", "lam": 1, "v": 2}], tmp_path / "new")
    compare.keep("pruned", [{"row": "a", "lam": 1, "seed": 0, "v": 3},
                            {"row": "a", "lam": 2, "v": 4}], tmp_path / "new")
    assert [row["v"] for row in compare.read("pruned", tmp_path / "new")] == [3, 2, 4]
    with pytest.raises(ValueError):
        compare.keep("pruned", [{"row": "c", "v": math.nan}], tmp_path / "new")
    assert len(compare.read("pruned", tmp_path / "new")) == 3
    assert len(list((tmp_path / "new").iterdir())) == 1
    assert compare.read("kinship", tmp_path) == []


def test_the_committed_rows_have_names_of_their_own():
    for path in compare.RESULTS.glob("*.jsonl"):
        keys = compare.KEYS[path.stem]
        names = [tuple(str(row.get(key)) for key in keys)
                 for row in compare.read(path.stem)]
        assert len(names) == len(set(names)) > 0, path.name


# --- Differences and verdicts -------------------------------------------------------
def scores(*columns):
    names = ("code", "prose", "arithmetic")
    return {name: np.array(values, dtype=float) for name, values in zip(names, columns)}


BASE = scores([[1, 2, 3]], [[2, 2, 2]], [[5, 4]])


def test_difference_by_hand():
    """code: 0.1, 0.2, 0.3, mean 0.2, variance 0.01; prose: 0, 0, 0.3, mean 0.1,
    variance 0.03; arithmetic: 0.3 twice. Equal weight per domain, though one has fewer
    documents."""
    ours = scores([[1.1, 2.2, 3.3]], [[2, 2, 2.3]], [[5.3, 4.3]])
    d = difference(ours, BASE)
    assert d.mean == pytest.approx((0.2 + 0.1 + 0.3) / 3)
    assert d.se_text == pytest.approx(math.sqrt(0.01 / 3 + 0.03 / 3) / 3)
    assert d.se_seeds == 0


def test_one_domain_is_scipys_paired_t():
    draws = np.random.default_rng(0)
    ours, other = scores(draws.normal(size=(1, 40))), scores(draws.normal(size=(1, 40)))
    d = difference(ours, other)
    t = scipy.stats.ttest_rel(ours["code"][0], other["code"][0])
    assert d.mean / d.se == pytest.approx(t.statistic)


def test_seeds_enter_the_error():
    """Two seeds 0.3 and 0.9 above the base everywhere: mean 0.6, and se_seeds =
    sd / sqrt(2) = 0.3; text adds nothing."""
    control = {}
    for domain, v in BASE.items():
        control[domain] = np.concatenate([v + 0.3, v + 0.9])
    d = difference(BASE, control)
    assert d.mean == pytest.approx(-0.6)
    assert d.se_seeds == pytest.approx(0.3) and d.se == pytest.approx(0.3)


@pytest.mark.parametrize("mean, se_text, se_seeds, said", [
    (-1.01, 0.3, 0.4, -1), (1.01, 0.3, 0.4, 1),         # se = 0.5: three, four, five
    (-1.0, 0.3, 0.4, 0), (1.0, 0.3, 0.4, 0),            # two errors are not more than two
    (5e-5, 1e-9, 0, 0), (2e-4, 1e-9, 0, 1)])            # rounding is no finding
def test_sign_by_hand(mean, se_text, se_seeds, said):
    assert sign(mean, Difference(mean, se_text, se_seeds).se) == said


@pytest.mark.parametrize("differences, word", [
    ([(-0.3, 0.1), (-0.3, 0.1)], "holds"), ([(-0.3, 0.1)], "holds"),
    ([(-0.3, 0.1), (-0.2, 0.1)], "ties"),
    ([(-0.3, 0.1), (0.3, 0.1)], "not reproduced"),      # a control is better
    ([(-0.1, 0.1), (-0.3, 0.1)], "not reproduced")])    # nothing gained
def test_a_claimed_gain(differences, word):
    assert gain(differences) == word


@pytest.mark.parametrize("mean, se, text", [
    (2.5303, 0.0277, "+2.530 ± 0.028"), (17.0635, 0.1407, "+17.06 ± 0.14"),
    (5.867, 1.361, "+5.9 ± 1.4"), (-1e-8, 8e-9, "0.0000 ± 0.0000"),
    (123.4, 17.0, "+123 ± 17"), (0.5, 0.0, "+0.5000 ± 0.0000")])
def test_an_error_has_two_digits(mean, se, text):
    assert compare.pm(mean, se) == text


# --- The folder ---------------------------------------------------------------------
def imports(file, modules):
    """Those of the modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & set(modules)


def test_no_module_imports_what_imports_it():
    files = {file.stem: file for file in EXPERIMENTS.glob("*.py")}
    graph = {name: imports(file, files) for name, file in files.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("compare") < order.index("merging") < order.index("results")


def test_every_record_has_a_command_in_the_readme():
    """A row that no command can make again would stay for ever."""
    commands = (EXPERIMENTS / "README.md").read_text()
    for path in compare.RESULTS.glob("*.jsonl"):
        assert f"`{path.stem}`" in commands, path.name
