"""experiments/compare.py and results.py: records, paired differences, verdicts; and
what is committed is what the records say. Oracles: scipy's paired t statistic, numbers
by hand, a cell worked out from the raw lines."""
import json
import math
import re
import shutil
import xml.etree.ElementTree as xml

import numpy as np
import pytest
import scipy.stats

import compare
import results
from compare import Difference, difference, gain, sign
from conftest import ROOT

HERE = ROOT / "experiments"


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


def test_committed_rows_have_names_of_their_own_and_a_command():
    """A row that no command can make again would stay for ever."""
    commands = (HERE / "README.md").read_text()
    for path in compare.RESULTS.glob("*.jsonl"):
        keys = compare.KEYS[path.stem]
        names = [tuple(str(row.get(key)) for key in keys)
                 for row in compare.read(path.stem)]
        assert len(names) == len(set(names)) > 0, path.name
        assert f"`{path.stem}`" in commands, path.name


# --- Differences and verdicts -------------------------------------------------------
def scores(*columns):
    names = ("code", "prose", "arithmetic")
    return {name: np.array(values, dtype=float) for name, values in zip(names, columns)}


BASE = scores([[1, 2, 3]], [[2, 2, 2]], [[5, 4]])


def test_difference_by_hand():
    """code: 0.1, 0.2, 0.3, variance 0.01; prose: 0, 0, 0.3, variance 0.03; arithmetic:
    0.3 twice. Equal weight per domain, though one has fewer documents."""
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
    (-1.0, 0.3, 0.4, 0), (1.0, 0.3, 0.4, 0),            # two errors: not more than two
    (5e-5, 1e-9, 0, 0), (2e-4, 1e-9, 0, 1)])            # rounding is no finding
def test_sign_by_hand(mean, se_text, se_seeds, said):
    assert sign(mean, Difference(mean, se_text, se_seeds).se) == said


@pytest.mark.parametrize("differences, word", [
    ([(-0.3, 0.1), (-0.3, 0.1)], "holds"), ([(-0.3, 0.1), (-0.2, 0.1)], "ties"),
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


# --- What is committed ----------------------------------------------------------------
def raw(name, **fields):
    """The raw rows that have these values, read without compare.py."""
    lines = (HERE / "results" / f"{name}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows
            if all(row.get(key) == value for key, value in fields.items())]


def cells(heading, first):
    """The cells of the line under a heading of RESULTS.md that begins like this."""
    text = (HERE / "RESULTS.md").read_text().split(f"## {heading}\n")[1]
    line, = [line for line in text.split("\n## ")[0].splitlines()
             if line.startswith(f"| {first} |")]
    return [cell.strip(" *") for cell in line.strip("|").split("|")]


@pytest.fixture
def copy(tmp_path):
    """The README and experiments/ without its modules, elsewhere."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(HERE / "results", tmp_path / "experiments" / "results")
    return tmp_path


def test_building_again_changes_nothing(copy):
    results.build(copy / "experiments")
    for file in ("README.md", "experiments/RESULTS.md"):
        assert (copy / file).read_text() == (ROOT / file).read_text(), file
    pytest.importorskip("matplotlib")
    for path in (HERE / "figures").glob("*.svg"):
        # another matplotlib may draw other curves: its words stay
        words = [[node.text for node in xml.parse(file).iter()
                  if node.tag.endswith("}text")]
                 for file in (path, copy / "experiments/figures" / path.name)]
        assert words[0] == words[1] and len(words[0]) > 3, path.name


def test_a_changed_row_changes_the_page_and_the_verdict(copy):
    folder = copy / "experiments" / "results"
    row, = raw("table3", row="soup, latents [r 1]")
    for d in row["difference"].values():
        d |= {"mean": -0.5, "se": 0.1}
    compare.keep("table3", [row], folder)
    results.build(copy / "experiments")
    text = (copy / "experiments" / "RESULTS.md").read_text()
    line = re.search(r"\| a soup of ten LoRA experts gains in latents .*", text)[0]
    assert "-0.50 ± 0.10" in line and "[holds](#table-3" in line
    assert "-0.50 ± 0.10" in (copy / "README.md").read_text()


def test_seeds_of_a_control_from_the_raw_lines():
    group = [row["domains"]["code"] for row in raw("pruned", row="noise", lam=0.5)]
    assert len(group) > 1
    mean = sum(d["mean"] for d in group) / len(group)
    variance = sum((d["mean"] - mean) ** 2 for d in group) / (len(group) - 1)
    text = sum(d["se"] for d in group) / len(group)
    se = math.sqrt(text ** 2 + variance / len(group))
    found = cells("A pruned model and its sibling's expert", "noise | 0.5")
    assert found[2] == compare.pm(mean, se)


def test_links_lead_to_headings_and_pictures_exist():
    text = (HERE / "RESULTS.md").read_text()
    headings = {results.slug(line[3:]) for line in text.splitlines()
                if line.startswith("## ")}
    links = set(re.findall(r"\]\(#(.+?)\)", text))
    assert len(links) >= 8 and links <= headings
    shown = set(re.findall(r"\(figures/(\w+)\.svg\)", text))
    assert shown == {path.stem for path in (HERE / "figures").glob("*.svg")}
