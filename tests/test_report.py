"""experiments/sections.py, report.py and figures.py. Oracles: the committed page, verdicts and cells by
hand, the means and errors of raw rows, WCAG's contrast, an XML parser."""
import json
import math
import re
import shutil
import xml.etree.ElementTree as xml

import pytest

import figures
import records
import report
import sections
from conftest import ROOT

HERE = ROOT / "experiments"


@pytest.fixture(scope="module")
def results():
    return records.Results(HERE / "results")


def given(**rows):
    """Results of these rows alone; _ in a name stands for -."""
    return records.Results(given={name.replace("_", "-"): each for name, each in rows.items()})


def rows_of(lines):
    """The cells of a Markdown table without its head."""
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines
            if line.startswith("|")][2:]


# --- What is committed is what the rows say -------------------------------------------------------
def test_page_and_readme_are_built_from_the_rows(results):
    assert report.page(results) == (HERE / "RESULTS.md").read_text()
    readme = (ROOT / "README.md").read_text()
    assert report.fill(readme, results) == readme


def test_every_picture_is_there_and_no_other(results):
    shown = set(re.findall(r"\(figures/(\w+)\.svg\)", (HERE / "RESULTS.md").read_text()))
    there = {path.stem for path in (HERE / "figures").glob("*.svg")}
    assert there == set(report.pictures(results)) == shown


def test_links_lead_to_headings_and_lines_are_short(results):
    text = report.page(results)
    headings = {report.slug(line[3:]) for line in text.splitlines() if line.startswith("## ")}
    links = re.findall(r"^\[([\w-]+)\]: #(.+)$", text, re.M)
    assert len(links) >= 10 and {target for _, target in links} <= headings
    assert set(re.findall(r"\]\[([\w-]+)\]", text)) == {name for name, _ in links}
    assert max(len(line) for line in text.splitlines() if line[:1] in "| ") <= 120


# --- Verdicts -------------------------------------------------------------------------------------
@pytest.mark.parametrize("differences, word", [
    ([(-0.3, 0.1), (-0.3, 0.1)], "holds"),
    ([(-0.3, 0.1)], "holds"),
    ([(-0.3, 0.1), (-0.2, 0.1)], "ties"),               # exactly two errors are a tie
    ([(-0.3, 0.1), (0.1, 0.1)], "ties"),
    ([(-0.3, 0.1), (0.3, 0.1)], "not reproduced"),      # a control is better
    ([(-0.1, 0.1), (-0.3, 0.1)], "not reproduced"),     # nothing gained, whatever the controls do
    ([(-9e-5, 1e-9), (-0.3, 0.1)], "not reproduced"),   # less than rounding can do
])
def test_a_claimed_gain(differences, word):
    assert sections.gain(differences) == word


def test_nearly_lossless_and_parts_of_the_curriculum():
    assert [sections.lossless(change) for change in (0.0, 0.01, -0.01, 0.0101, -0.45)] == [
        *["holds"] * 3, *["not reproduced"] * 2]
    for name, mean, word in (("costs", 0.3, "holds"), ("nothing", 0.1, "ties"),
                             ("helps", -0.3, "not reproduced"), ("distillation", -0.3, "holds")):
        row = {"group": "g", "variant": name, "difference": {"mean": mean, "se": 0.1}}
        assert sections.part_worth(given(ablation=[row]), "g", name)[1] == word, name


@pytest.mark.parametrize("one, two, word", [
    (0.9, 0.1, "holds"), (0.9, 0.3, "not reproduced"), (0.4, 0.1, "not reproduced")])
def test_a_collapse_is_of_one_stage_alone(one, two, word):
    """Most of the variance lost, and less than a quarter of it with two; means over seeds; of the
    beta at which one stage loses most."""
    curves = [{"name": f"{stages}, beta {beta}", "model": "m", "seed": seed,
               "points": [{"nmse": 2.0}, {"nmse": value + shift}]}
              for stages, beta, value in (("one stage", 1, one), ("two stages", 1, two),
                                          ("one stage", 0.1, 0.1), ("two stages", 0.1, 0.09))
              for seed, shift in enumerate((-0.05, 0.05))]
    assert report.of_collapse(given(curves=curves)) == (
        f"beta 1: NMSE {one:.2f}, two {two:.2f}", word)


@pytest.mark.parametrize("quarters, word", [
    ((0.35, 0.35, 0.30), "holds"),              # 0.65 of 0.70 is 7 % less: two roles of three
    ((0.35, 0.33, 0.30), "not reproduced"),     # 0.67 is 4 % less: only one
    ((0.20, 0.20, 0.20), "not reproduced")])    # less than noise
def test_dimensions_are_few_in_most_roles(quarters, word):
    spectra = [{"model": "m", "role": str(i), "cumulative": [q, 0.8, 0.9, 1.0],
                "white": [0.3, 0.7, 0.8, 1.0]} for i, q in enumerate(quarters)]
    measured, found = report.of_spectra(given(spectra=spectra))
    assert found == word and measured.endswith(" over noise") and measured.startswith("m ")


def test_a_changed_row_changes_page_and_verdict(results, tmp_path):
    shutil.copytree(HERE / "results", tmp_path / "results")
    row = json.loads(json.dumps(sections.row_of(results, "3", "soup, latents [r 1]")))
    for d in row["difference"].values():
        d.update(mean=-0.5, se=0.1)
    records.keep(tmp_path / "results" / "table3.jsonl", [row])
    changed = report.page(records.Results(tmp_path / "results"))
    line = re.search(r"\| a soup of LoRA experts gains in latents .*", changed)[0]
    assert line.endswith("| -0.50 ± 0.10 to weights | [holds][table3] |")
    assert "| soup, latents [r 1] | 1.704 |  | -0.50 ± 0.10 beats |" in changed


def test_a_section_without_its_rows_is_left_out(results):
    for section in sections.SECTIONS[::4]:
        without = records.Results(HERE / "results", dict.fromkeys(section.needs, []))
        text = report.page(without)
        assert f"## {section.title}" not in text and f"][{section.name}]" not in text
    assert "\n## " not in report.page(given()).replace("\n## No longer here", "")


# --- Text -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("mean, se, text", [
    (2.5303, 0.0277, "+2.530 ± 0.028"), (17.0635, 0.1407, "+17.06 ± 0.14"),
    (5.867, 1.361, "+5.9 ± 1.4"), (-0.0018, 0.0008, "-0.0018 ± 0.0008"),
    (-1e-8, 8e-9, "0.0000 ± 0.0000"), (123.4, 17.0, "+123 ± 17"), (0.5, 0.0, "+0.5000 ± 0.0000")])
def test_an_error_has_two_digits(mean, se, text):
    assert sections.pm(mean, se) == text


def test_seeds_are_taken_together():
    mean, se = records.over_seeds([{"mean": 1.0, "se_text": 0.3}, {"mean": 3.0, "se_text": 0.5}])
    assert mean == 2 and se == pytest.approx(math.sqrt(0.4 ** 2 + 1.0))  # var 2 of 2 seeds
    assert records.over_seeds([{"mean": 1.0, "se": 0.3}]) == (1.0, pytest.approx(0.3))


def test_facts_and_tallies():
    rows = [{"python": "3.11", "threads": 1, "load": 0.5, "seed": 0},
            {"python": "3.11", "threads": 2, "load": 1.0, "seed": 1},
            {"python": "3.11", "threads": 2, "load": 1.5, "seed": 1, "per_seed": [1, 2, 3]}]
    assert sections.facts(rows) == "3 rows; Python 3.11; threads 1 and 2; load 0.5 to 1.5; seeds 3"
    rows = [{"difference": {"x": {"mean": mean, "se": 0.1}}} for mean in (-1, 0, 0, 1)]
    assert sections.tally(rows, "x", "noise") == "beat noise 1 time, tie 2, lose 1"


# --- Cells by hand --------------------------------------------------------------------------------
def test_cells_across_shapes_from_the_raw_lines(results):
    """Independent of Results: seeds together, three columns."""
    cells = {}
    for line in (HERE / "results" / "figure4.jsonl").read_text().splitlines():
        r = json.loads(line)
        if not r["few"]:
            key = (r["source"], r["align"], r["pairing"], r["lam"], r["control"], r["seed"])
            cells[key] = r["difference"]["base"]
    table = [row for row in rows_of(sections.figure4(results)[2]) if row[0] == "0.1"]
    assert len(table) == 5
    for row, keys in zip(table, ([("large", "none", "depth", None), ("large", "mean", "depth", None),
                                  ("large", "gaussian", "depth", None),
                                  ("large", "sinkhorn", "depth", None),
                                  ("large", "sinkhorn", "depth", "carried")],
                                 [("base-seed2", "none", "depth", None)],
                                 [("grown", "none", "depth", None)],
                                 [("grown", "units", "weights", None),
                                  ("grown", "units", "weights", "carried"),
                                  ("grown", "units", "weights", "neighbour")],
                                 [("", "", "", "zero"), ("", "", "", "noise")])):
        for cell, (source, align, pairing, control) in zip(row[1:], keys):
            group = [d for key, d in cells.items()
                     if key[:5] == (source, align, pairing, 0.1, control)]
            mean = sum(d["mean"] for d in group) / len(group)
            text = sum(d["se_text"] for d in group) / len(group)
            spread = sum((d["mean"] - mean) ** 2 for d in group) / max(1, len(group) - 1)
            se = math.sqrt(text ** 2 + spread / len(group))
            assert len(group) == (5 if control in ("carried", "noise") else 1)
            assert cell == f"{mean:+.4f} ± {se:.4f}", (source, align, control)


def test_the_codecs_cells_from_the_raw_lines(results):
    last = {}
    for line in (HERE / "results" / "table7.jsonl").read_text().splitlines():
        r = json.loads(line)
        last[r["checkpoint"], f"{r['ratio']:.4g}", r["method"]] = r
    lines = sections.codec(results)[2]
    start = lines.index("Table 7, `base-seed2`, unseen:")
    row = next(row for row in rows_of(lines[start:]) if row[0] == "1.6")
    vae, pca, noise = (last["base-seed2", "1.6", method] for method in ("VAE", "PCA", "noise"))
    assert row[:4] == ["1.6", "0.375", f"{vae['nmse']:.3f}", f"{pca['nmse']:.3f}"]
    assert [cell.split(" ±")[0] for cell in row[5:8]] == [
        f"{r['difference']['mean']:+.3f}" for r in (vae, pca, noise)]
    assert row[-1] == f"{vae['effective_ratio']:.2f}"


def test_speed_from_the_raw_lines(results):
    peer = json.loads((HERE / "results" / "bench-peer.jsonl").read_text())
    middle, low, high = peer["ratios"]["exact"]
    assert next(sections.peer_rows(peer)) == [
        "latent merge, exact codec: time", f"{peer['seconds']['exact'][0]:.1f} s",
        f"{peer['seconds']['mergekit'][0]:.1f} s", f"{middle:.2f} [{low:.2f}, {high:.2f}]"]
    assert [row[3] for row in rows_of(report.readme_bench(results))][:4] == [
        row[3] for row in rows_of(sections.bench_peer(results)[2])]


def test_siblings_seeds_together():
    rows = [{"row": row, "lam": lam, "seed": seed, "domains": {
        "arithmetic": {"mean": mean, "se": 0.01, "loss": 3.0}, "code": {"mean": cost, "se": 0.01}}}
        for row, lam, seed, mean, cost in (
            ("base", None, 0, -9.0, -9.0), ("difference, matched", 0.3, 0, -0.5, 0.01),
            ("difference, matched", 0.5, 0, -0.10, 0.5), ("difference, matched", 0.5, 1, -0.12, 0.5),
            ("neighbour", 0.5, 0, -1.0, 0.5))]
    found = given(sibling=rows)
    # mean -0.11; the two seeds' variance is 2e-4, over 2 seeds 1e-4; with 0.01^2: sqrt(2e-4)
    assert rows_of(sections.sibling(found)[2])[2:] == [
        ["difference, matched", "0.5", "-0.110 ± 0.014 beats", "+0.500 ± 0.010 loses"],
        ["neighbour", "0.5", "-1.000 ± 0.010 beats", "+0.500 ± 0.010 loses"]]
    # neither the parent nor the control is a merge
    assert sections.sibling(found)[1][1] == (
        "Of 2 merges 2 beat the target in some domain; in 1 of them nothing else is lost.")
    claim, = (claim for claim in report.CLAIMS if claim.section == "sibling")
    assert claim.measure(found) == ("arithmetic -0.110 ± 0.014 nats; others up to +0.500", "ours")
    assert report.of_expert("sibling", "", found) == (      # its surest gain costs nothing
        "lambda 0.3: arithmetic -0.500 ± 0.010; no other loses", "ours")


def test_kinship():
    rows = [{"source": "a", "target": "b", "related": True, "layers": [0, None],
             "similarity": [0.9, 0.92], "null": 0.08},
            {"source": "c", "target": "b", "related": False, "layers": [1, 0],
             "similarity": [0.1, 0.1], "null": 0.08}]
    found = given(kinship=rows)
    assert rows_of(sections.kinship(found)[2]) == [
        ["`a`", "`b`", "yes", "0.900", "0.080", "0 -"],
        ["`c`", "`b`", "no", "0.100", "0.080", "1 0"]]
    assert "0.900, is above the highest of the others, 0.100" in sections.kinship(found)[1][1]
    assert report.of_kinship(found)[0] == "cosine 0.90; strangers 0.10"


def test_the_reference_vae():
    rows = [{"vae": "reference", "model": "m", "seen": seen, "nmse": nmse, "dtype": dtype,
             "worst": {"name": "model.layers.0.mlp.up_proj.weight", "nmse": 1e-3},
             "loss_before": before, "loss": after}
            for seen, nmse, dtype, before, after in ((True, 1e-4, "float32", None, None),
                                                     (False, 3e-5, "bfloat16", 2.0, 2.01),
                                                     (False, 2e-5, "float32", 2.0, 2.002))]
    found = given(vae=rows)
    assert rows_of(sections.vae(found)[2])[:2] == [
        ["reference", "`m`, float32", "yes", "1.0e-04", "layers.0.mlp.up_proj", "1.0e-03", ""],
        ["reference", "`m`, bfloat16", "no", "3.0e-05", "layers.0.mlp.up_proj", "1.0e-03",
         "+0.50%"]]
    assert sections.vae(found)[1][1].endswith("2.0e-05 in float32; 3.0e-05 in bfloat16, its "
                                              "rounding.")
    # of the unseen one in float32
    assert report.of_vae(found) == ("NMSE at most 2.0e-05, loss +0.10%", "ours, holds")


@pytest.mark.parametrize("nmse, beta, least", [
    ({2.0: 0.5, 4.0: 0.75}, 0.1, 0.01),         # white: every variance is 1, so beta^2
    ({2.0: 0.1}, 1.0, 0.5 / 1.8 + 0.5 * 0.2),   # variances 1.8 (kept) and 0.2 (below beta: lost)
    ({2.0: 0.1}, 0.1, 0.5 * 0.01 / 1.8 + 0.5 * 0.01 / 0.2)])
def test_the_best_linear_vae(nmse, beta, least):
    rows = [{"checkpoint": name, "ratio": r, "method": "PCA", "nmse": value}
            for name in ("a", "b") for r, value in nmse.items()]
    assert sections.linear_optimum(given(table8=rows), beta) == pytest.approx(least)
    assert sections.linear_optimum(given(), beta) is None


def test_the_best_linear_vae_minimises_eq_1():
    """One component of variance v: x' = a b x, posterior of variance s; the least of reconstruction
    and beta KL on a grid of gains has the error beta^2 / v."""
    for v, beta in ((1.8, 1.0), (0.5, 0.1)):
        found = min((loss_of_linear(v, beta, k / 500), (1 - k / 500) ** 2 * v)
                    for k in range(1, 500))
        assert found[1] == pytest.approx(beta ** 2 / v, rel=0.05)


def loss_of_linear(v, beta, gain):
    """Decoder a, encoder b, ab = gain, the best posterior variance s and the best a: E z^2 = b^2 v.
    error ((1 - gain)^2 v + a^2 s) / 2 + beta (b^2 v + s - 1 - log s) / 2"""
    return min(((1 - gain) ** 2 * v + a * a * s) / 2
               + beta * ((gain / a) ** 2 * v + s - 1 - math.log(s)) / 2
               for a in (k / 50 for k in range(1, 150)) for s in (beta / (a * a + beta),))


POINTS = [{"stage": 1, "step": 0, "seconds": 0.0, "nmse": 1.0},
          {"stage": 1, "step": 9, "seconds": 9.0, "nmse": 0.1},
          {"stage": 2, "step": 1, "seconds": 1.0, "nmse": 0.01, "kl": 4.6}]


def test_curves_are_a_table():
    rows = [{"name": "two stages", "model": "m", "seed": 0, "points": POINTS}]
    assert rows_of(sections.curves(given(curves=rows))[2]) == [
        ["two stages", "1", "0.010", "10", "4.60"]]
    assert sections.paper_steps([{"name": "the paper's configuration", "points": POINTS}]) == [
        "The paper's configuration got 10 steps in 10 s; they end at an NMSE of 0.01."]
    assert figures.shifted(POINTS) == ([0.0, 9.0, 10.0], [1.0, 0.1, 0.01], 2)
    assert figures.shifted(POINTS[2:]) == ([1.0], [0.01], None)


def test_brackets_are_explained_by_the_rows():
    codecs = {"r 1": {"sigma": 0.01}, "r 1, beta 0.01": {"sigma": 0.0995}, "r 2": {"steps": 150}}
    exact, *rest = sections.codecs_of([{"row": "a [r 1]", "codecs": codecs}]).split("; ")
    assert not rest and exact.startswith("[r 1]: the exact, untrained codec")
    rows = [{"row": name, "codecs": codecs} for name in ("a [r 2]", "b [r 1, beta 0.01]")]
    assert sections.codecs_of(rows).split("; ")[1:] == [
        "[beta 0.01]: sigma 0.1, else 0.01",
        "[r 2]: trained for 150 steps of stage 2, before the schedule of the training changed."]


def test_what_was_chosen():
    difference = {name: {"mean": -1.0, "se": 0.1} for name in ("base", "zero", "noise")}
    row = {"align": "units", "lam": 0.5, "difference": difference}
    assert sections.chosen_text("x", row) == (
        "`x`, chosen on validation: units, lambda 0.5: **holds**, -1.00 ± 0.10; all 2 "
        "controls lose.")
    row["difference"]["zero"]["mean"] = 0.0
    assert sections.chosen_text("x", row).endswith("**ties**, -1.00 ± 0.10; 1 of 2 controls lose.")


def test_the_readmes_table_of_merges(results):
    last = {row["file"]: row["scores"] for row in results.rows("merge")}
    merged = rows_of(report.readme_merge(results))
    assert [row[0] for row in merged] == ["`code`", "`prose`", "`average`", "`merged`", "`learnt`"]
    for name, code, *_ in merged:
        scores = last[name.strip("`") + ".safetensors"]
        assert code.split(" ±")[0] == f"{scores['code']['mean']:.3f}"


def test_fill_writes_what_has_a_place_and_nothing_else(results):
    text = "a\n<!-- verdicts: begin -->\nstale row\n<!-- verdicts: end -->\nb <!-- other: begin -->\nc"
    filled = report.fill(text, results)
    assert filled.startswith("a\n<!-- verdicts: begin -->\n| claim |") and "stale" not in filled
    assert filled.endswith("\n<!-- verdicts: end -->\nb <!-- other: begin -->\nc")
    assert report.fill(filled, results) == filled


# --- Pictures -------------------------------------------------------------------------------------
def luminance(colour):
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
              for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("colour", [figures.GREY, figures.OLIVE, *figures.COLOURS])
def test_colours_have_contrast_on_white_and_on_dark(colour):
    for ground in ("#ffffff", "#0d1117"):
        dark, light = sorted((luminance(colour), luminance(ground)))
        assert (light + 0.05) / (dark + 0.05) >= 3, (colour, ground)


@pytest.mark.parametrize("name", ["figure4", "bench"])
def test_pictures_are_what_the_rows_draw(name, results):
    """Their words, which are text in the file: another matplotlib may draw other bytes."""
    pytest.importorskip("matplotlib")
    drawn = xml.fromstring(figures.svg(name, results))
    kept = xml.fromstring((HERE / "figures" / f"{name}.svg").read_text())
    words = [[node.text for node in tree.iter("{http://www.w3.org/2000/svg}text")]
             for tree in (drawn, kept)]
    assert words[0] == words[1] and len(words[0]) > 5
    assert not list(kept.iter("{http://www.w3.org/2000/svg}image"))     # no pixels


def test_without_matplotlib_the_pictures_are_skipped(monkeypatch, tmp_path, capsys):
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(report, "HERE", tmp_path / "experiments")
    shutil.copytree(HERE / "results", tmp_path / "experiments" / "results")
    monkeypatch.setattr(figures, "available", bool)                 # bool() is False
    monkeypatch.setattr("sys.argv", ["report.py"])
    report.main()
    assert capsys.readouterr().out.count("\n") == 1
    page = (tmp_path / "experiments" / "RESULTS.md").read_text()
    assert page == (HERE / "RESULTS.md").read_text()
    assert not (tmp_path / "experiments" / "figures").exists()
