"""experiments/results.py: what is committed is what the records say. Oracles: three
cells worked out from the raw lines, WCAG's contrast."""
import json
import math
import re
import shutil
import xml.etree.ElementTree as xml

import pytest

import compare
import results
from conftest import ROOT

HERE = ROOT / "experiments"


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


def test_a_cell_across_shapes_from_the_raw_lines():
    group = raw("figure4", source="large", align="sinkhorn", lam=0.1, control=None)
    row, = group
    d = row["difference"]["base"]
    found = cells("Table 5: another architecture", "large: sinkhorn | 0.1")
    assert found[2] == f"{d['mean']:+.4f} ± {d['se']:.4f}"


def test_seeds_of_a_control_from_the_raw_lines():
    group = [row["domains"]["code"] for row in raw("pruned", row="noise", lam=0.5)]
    assert len(group) > 1
    mean = sum(d["mean"] for d in group) / len(group)
    variance = sum((d["mean"] - mean) ** 2 for d in group) / (len(group) - 1)
    text = sum(d["se"] for d in group) / len(group)
    se = math.sqrt(text ** 2 + variance / len(group))
    found = cells("A pruned model and its sibling's expert", "noise | 0.5")
    assert found[2] == compare.pm(mean, se)


def test_a_cell_of_a_real_model_from_the_raw_lines():
    row, = [row for row in raw("real", method="PCA") if f"{row['ratio']:.4g}" == "1.016"]
    found = cells("A real model", "1.016")
    assert found[4] == f"{row['loss']:.2f} ({row['change']:+.0%})"


def test_links_lead_to_headings_and_pictures_exist():
    text = (HERE / "RESULTS.md").read_text()
    headings = {results.slug(line[3:]) for line in text.splitlines()
                if line.startswith("## ")}
    links = set(re.findall(r"\]\(#(.+?)\)", text))
    assert len(links) >= 8 and links <= headings
    shown = set(re.findall(r"\(figures/(\w+)\.svg\)", text))
    assert shown == {path.stem for path in (HERE / "figures").glob("*.svg")}
    assert len(text.splitlines()) <= 450


def luminance(colour):
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
              for part in parts]
    return sum(weight * part
               for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("colour", [results.INK, *results.COLOURS])
def test_colours_have_contrast_on_the_pictures_own_ground(colour):
    """White, drawn by the picture itself: the page behind it may be dark."""
    assert 1.05 / (luminance(colour) + 0.05) >= 3, colour
    for path in (HERE / "figures").glob("*.svg"):
        assert "fill: #ffffff" in path.read_text(), path.name
