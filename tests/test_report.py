"""experiments/sections.py, report.py and figures.py. Oracles: the committed page, verdicts and cells by
hand, the means and errors of raw records, WCAG's contrast, an XML parser."""
import json
import math
import re
import shutil
import statistics
import xml.etree.ElementTree as xml

import pytest

import figures
import report
import sections
from conftest import ROOT

HERE = ROOT / "experiments"
REQUIREMENTS = (HERE / "requirements.txt").read_text()


@pytest.fixture(scope="module")
def results():
    return sections.Results(HERE / "results")


@pytest.fixture
def folder(tmp_path):
    """A copy of the records, to be changed."""
    shutil.copytree(HERE / "results", tmp_path / "results")
    return tmp_path / "results"


def write(folder, name, *rows):
    with (folder / f"{name}.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def rows_of(lines):
    """The cells of a Markdown table without its head."""
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines
            if line.startswith("|")][2:]


# --- What is committed is what the records say ----------------------------------------------------
def test_the_page_is_built_from_the_records(results):
    assert report.page(results) == (HERE / "RESULTS.md").read_text()


def test_the_readmes_blocks_are_built_from_the_records(results):
    readme = (ROOT / "README.md").read_text()
    if "<!-- verdicts: begin -->" not in readme:
        pytest.skip("the README has no place for the verdicts yet")
    assert report.fill(readme, results) == readme


def test_every_picture_is_there_and_no_other(results):
    assert ({path.stem for path in (HERE / "figures").glob("*.svg")}
            == set(report.pictures(results)) == set(re.findall(
                r"\(figures/(\w+)\.svg\)", (HERE / "RESULTS.md").read_text())))


def test_pictures_are_the_same_bytes_again(results):
    matplotlib = pytest.importorskip("matplotlib")
    if f"matplotlib=={matplotlib.__version__}" not in REQUIREMENTS:
        pytest.skip("another matplotlib than the one that drew them")
    for name in report.pictures(results):
        assert figures.svg(name, results) == (HERE / "figures" / f"{name}.svg").read_text(), name


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


def test_nearly_lossless_and_parts_of_the_curriculum(tmp_path):
    assert [sections.lossless(change) for change in (0.0, 0.01, -0.01, 0.0101, -0.45)] == [
        *["holds"] * 3, *["not reproduced"] * 2]
    group = "r = 1, random start"
    for name, mean, word in (("costs", 0.3, "holds"), ("nothing", 0.1, "ties"),
                             ("helps", -0.3, "not reproduced"), ("distillation", -0.3, "holds")):
        write(tmp_path, "ablation", {"group": group, "variant": name,
                                     "difference": {"mean": mean, "se": 0.1}})
        assert sections.part_worth(sections.Results(tmp_path), group, name)[1] == word, name


def test_every_recorded_verdict_is_the_computed_one(results):
    found = [d for table in "2346" for row in results.rows(f"table{table}", "row")
             for d in row["difference"].values()]
    assert len(found) > 100
    assert all(d["verdict"] == sections.said(d["mean"], d["se"]) for d in found)
    cells = [row for row in results.cells() if row["verdict"]]
    words = {"transfers": "holds"}
    assert len(cells) > 50 and all(
        sections.cell_gain(row) in (words.get(row["verdict"], row["verdict"]), "ties")
        for row in cells)


# --- Text -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("mean, se, text", [
    (2.5303, 0.0277, "+2.530 ± 0.028"), (17.0635, 0.1407, "+17.06 ± 0.14"),
    (5.867, 1.361, "+5.9 ± 1.4"), (-0.0018, 0.0008, "-0.0018 ± 0.0008"),
    (-1e-8, 8e-9, "0.0000 ± 0.0000"), (123.4, 17.0, "+123 ± 17"), (0.5, 0.0, "+0.5000 ± 0.0000")])
def test_an_error_has_two_digits(mean, se, text):
    assert sections.pm(mean, se) == text


def test_seeds_are_taken_together():
    mean, se = sections.over_seeds([{"mean": 1.0, "se_text": 0.3}, {"mean": 3.0, "se_text": 0.5}])
    assert mean == 2 and se == pytest.approx(math.sqrt(0.4 ** 2 + 1.0))  # var 2 of 2 seeds
    assert sections.over_seeds([{"mean": 1.0, "se": 0.3}]) == (1.0, pytest.approx(0.3))


def test_facts_of_records():
    rows = [{"python": "3.11", "threads": 1, "load": 0.5, "seed": 0},
            {"python": "3.11", "threads": 2, "load": 1.0, "seed": 1},
            {"python": "3.11", "threads": 2, "load": 1.5, "seed": 1, "per_seed": [1, 2, 3]}]
    assert sections.facts(rows) == "3 rows; Python 3.11; threads 1 and 2; load 0.5 to 1.5; seeds 3"


# --- Records --------------------------------------------------------------------------------------
def test_the_last_record_of_a_key_counts(tmp_path):
    write(tmp_path, "x", {"row": "a", "v": 1}, {"row": "b", "v": 2}, {"row": "a", "v": 3})
    results = sections.Results(tmp_path)
    assert [row["v"] for row in results.rows("x", "row")] == [3, 2]
    assert len(results.rows("x")) == 3 and results.rows("absent", "row") == []


def test_a_changed_record_changes_page_and_verdict(results, folder):
    row = sections.Results(folder).row("3", "soup, latents [r 1]")
    for d in row["difference"].values():
        d.update(mean=-0.5, se=0.1)
    write(folder, "table3", row)
    changed = report.page(sections.Results(folder))
    name = "a soup of LoRA experts gains in latents"
    before, after = (re.search(rf"\| {name} .*", text)[0]
                     for text in (report.page(results), changed))
    assert before.endswith("| [ties][table3] |")
    assert after.endswith("| -0.50 ± 0.10 to weights | [holds][table3] |")
    assert "| soup, latents [r 1] | 1.704 |  | -0.50 ± 0.10 beats |" in changed


@pytest.mark.parametrize("section", sections.SECTIONS[::4], ids=lambda section: section.title)
def test_a_section_without_its_records_is_left_out(section, folder):
    for name in section.needs:
        (folder / f"{name}.jsonl").unlink(missing_ok=True)
    text = report.page(sections.Results(folder))
    assert f"## {section.title}" not in text and f"][{section.needs[0]}]" not in text


def test_a_folder_without_records_gives_a_page_without_sections(tmp_path):
    assert "\n## " not in report.page(sections.Results(tmp_path))


# --- Cells by hand --------------------------------------------------------------------------------
def test_cells_across_shapes_from_the_raw_lines(results):
    """Independent of Results: the last line of a cell, seeds together, three columns."""
    cells = {}
    for line in (HERE / "results" / "figure4.jsonl").read_text().splitlines():
        r = json.loads(line)
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
            group = [d for key, d in cells.items() if key[:5] == (source, align, pairing, 0.1,
                                                                  control)]
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
    peer = json.loads((HERE / "results" / "bench-peer.jsonl").read_text().splitlines()[-1])
    middle, low, high = peer["ratios"]["exact"]
    assert next(sections.peer_rows(peer)) == [
        "latent merge, exact codec: time", f"{peer['seconds']['exact'][0]:.1f} s",
        f"{peer['seconds']['mergekit'][0]:.1f} s", f"{middle:.2f} [{low:.2f}, {high:.2f}]"]
    seconds = {row["seed"]: row["seconds"] for row in results.rows("bench-training")
               if row.get("recipe") == "curriculum"}.values()      # of each seed the last
    cell = dict(row[:2] for row in rows_of(sections.bench_training(results)[2]))["curriculum"]
    assert cell == (f"{statistics.median(seconds):.1f} "
                    f"[{min(seconds):.1f}, {max(seconds):.1f}]")


SIBLING = [{"row": row, "lam": lam, "seed": seed, "domains": {
    "arithmetic": {"mean": mean, "se": 0.01, "loss": 3.0}, "code": {"mean": cost, "se": 0.01}}}
    for row, lam, seed, mean, cost in (
        ("base", None, 0, -9.0, -9.0), ("difference, matched", 0.3, 0, -0.5, 0.01),
        ("difference, matched", 0.5, 0, 9.0, 0.5),              # measured again below
        ("difference, matched", 0.5, 0, -0.10, 0.5), ("difference, matched", 0.5, 1, -0.12, 0.5),
        ("neighbour", 0.5, 0, -1.0, 0.5))]
KINSHIP = [{"source": "a", "target": "b", "related": related, "layers": [0, None],
            "similarity": [value, value + 0.02], "null": 0.08, "matrix": [[0.9, 0.1], [0.2, 0.8]]}
           for related, value in ((True, 0.9),)] + [
    {"source": "c", "target": "b", "related": False, "layers": [1, 0], "similarity": [0.1, 0.1],
     "null": 0.08, "matrix": [[0.1, 0.1], [0.1, 0.1]]}]
DRIFT = [{"steps": steps, "share": share, "kinship": 0.9, "null": 0.1,
          "difference": {"code": {"mean": mean, "se": 0.01}}}
         for steps, share, mean in ((0, 0.0, -0.1), (300, 0.0, 0.0), (0, 0.5, 0.1))]
VAE = [{"vae": "reference", "model": "m", "seen": seen, "weights": 2_000_000, "nmse": nmse,
        "worst": {"name": "model.layers.0.mlp.up_proj.weight", "nmse": 1e-3}, "dtype": dtype,
        "loss_before": before, "loss": after, "seconds": 12.0}
       for seen, nmse, dtype, before, after in ((True, 1e-4, "float32", None, None),
                                                (False, 3e-5, "bfloat16", 2.0, 2.01),
                                                (False, 2e-5, "float32", 2.0, 2.002))]
CURVES = [{"name": name, "model": "m", "seed": 0, "points": [
    {"stage": 1, "step": 0, "seconds": 0.0, "nmse": 1.0, "lr": 1e-3},
    {"stage": 1, "step": 9, "seconds": 9.0, "nmse": 0.1, "lr": 1e-3},
    {"stage": 2, "step": 1, "seconds": 1.0, "nmse": 0.01, "kl": 4.6, "lr": 1e-4}]}
    for name in ("two stages, r = 1", "one stage, beta 1")]
CLOUDS = [{"align": align, "source": [[0, 0], [1, 2]], "target": [[3, 1], [2, 2]]}
          for align in ("none", "gaussian")]
SPECTRA = [{"model": "m", "role": role, "cumulative": [0.5, 0.8, 0.9, 1.0],
            "white": [0.3, 0.7, 0.8, 1.0]} for role in ("q_proj", "up_proj")]
TOUR = [{"text": "one\n  two\n"}]


@pytest.fixture
def added(folder):
    """The records with those that others will append."""
    for name, rows in (("sibling", SIBLING), ("kinship", KINSHIP), ("drift", DRIFT), ("vae", VAE),
                       ("curves", CURVES), ("clouds", CLOUDS), ("spectra", SPECTRA),
                       ("tour", TOUR)):
        (folder / f"{name}.jsonl").unlink(missing_ok=True)
        write(folder, name, *rows)
    return sections.Results(folder)


def test_siblings_seeds_together(added):
    # mean -0.11; the two seeds' variance is 2e-4, over 2 seeds 1e-4; with 0.01^2: sqrt(2e-4)
    assert rows_of(sections.sibling(added)[2]) == [
        ["base", "", "-9.000 ± 0.010 beats", "-9.000 ± 0.010 beats"],
        ["difference, matched", "0.3", "-0.500 ± 0.010 beats", "+0.010 ± 0.010 ties"],
        ["difference, matched", "0.5", "-0.110 ± 0.014 beats", "+0.500 ± 0.010 loses"],
        ["neighbour", "0.5", "-1.000 ± 0.010 beats", "+0.500 ± 0.010 loses"]]
    # neither the parent nor the control is a merge
    assert sections.sibling(added)[1][1] == (
        "Of 2 merges 2 beat the target in some domain; in 1 of them nothing else is lost.")
    claim, = (claim for claim in report.CLAIMS if claim.section == "sibling")
    assert claim.measure(added) == (
        "arithmetic -0.110 ± 0.014 nats; others up to +0.500", "ours")
    assert report.of_expert("sibling", "", added) == (      # its surest gain costs nothing
        "lambda 0.3: arithmetic -0.500 ± 0.010; no other loses", "ours")


def test_kinship_and_drift(added):
    assert rows_of(sections.kinship(added)[2]) == [
        ["`a`", "`b`", "yes", "0.900", "0.080", "0 -"],
        ["`c`", "`b`", "no", "0.100", "0.080", "1 0"]]
    assert "0.900, is above the highest of the others, 0.100" in sections.kinship(added)[1][1]
    assert report.of_kinship(added)[0] == "cosine 0.90; strangers 0.10"
    assert [row[4] for row in rows_of(sections.drift(added)[2])] == [
        "-0.100 ± 0.010 beats", "0.000 ± 0.010 ties", "+0.100 ± 0.010 loses"]
    assert sections.drift(added)[1][1] == (
        "Of 3 rows 1 beat the target in some domain; in 1 of them nothing else is lost. The lowest "
        "kinship of a gain is 0.90.")


def test_the_reference_vae(added):
    assert rows_of(sections.vae(added)[2]) == [
        ["reference", "`m`, float32", "yes", "1.0e-04", "layers.0.mlp.up_proj", "1.0e-03",
         ""],
        ["reference", "`m`, bfloat16", "no", "3.0e-05", "layers.0.mlp.up_proj", "1.0e-03",
         "+0.50%"],
        ["reference", "`m`, float32", "no", "2.0e-05", "layers.0.mlp.up_proj", "1.0e-03",
         "+0.10%"]]
    assert sections.vae(added)[1][1] == (
        "Worst NMSE of the reference VAE on an unseen model: 2.0e-05 in float32; 3.0e-05 in "
        "bfloat16, its rounding.")
    # of the unseen one in float32
    assert report.of_vae(added) == ("NMSE at most 2.0e-05, loss +0.10%", "ours, holds")


@pytest.mark.parametrize("one, two, word", [
    (0.9, 0.1, "holds"), (0.9, 0.3, "not reproduced"), (0.4, 0.1, "not reproduced")])
def test_a_collapse_is_of_one_stage_alone(tmp_path, one, two, word):
    """Most of the variance lost, and less than a quarter of it with two; means over seeds."""
    write(tmp_path, "curves", *(
        {"name": f"{stages}, beta 1", "model": "m", "seed": seed,
         "points": [{"nmse": 2.0}, {"nmse": value + shift}]}
        for stages, value in (("one stage", one), ("two stages", two))
        for seed, shift in enumerate((-0.05, 0.05))))
    assert report.of_collapse(sections.Results(tmp_path)) == (
        f"beta 1: NMSE {one:.2f}, two {two:.2f}", word)


@pytest.mark.parametrize("nmse, beta, least", [
    ({2.0: 0.5, 4.0: 0.75}, 0.1, 0.01),         # white: every variance is 1, so beta^2
    ({2.0: 0.1}, 1.0, 0.5 / 1.8 + 0.5 * 0.2),   # variances 1.8 (kept) and 0.2 (below beta: lost)
    ({2.0: 0.1}, 0.1, 0.5 * 0.01 / 1.8 + 0.5 * 0.01 / 0.2)])
def test_the_best_linear_vae(tmp_path, nmse, beta, least):
    write(tmp_path, "table8", *({"checkpoint": name, "ratio": r, "method": "PCA", "nmse": value}
                                for name in ("a", "b") for r, value in nmse.items()))
    results = sections.Results(tmp_path)
    assert sections.linear_optimum(results, beta) == pytest.approx(least)
    assert sections.linear_optimum(sections.Results(tmp_path / "none"), beta) is None


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


def test_curves_are_a_table(added):
    assert rows_of(sections.curves(added)[2]) == [
        ["two stages, r = 1", "1", "0.010", "10", "4.60"],
        ["one stage, beta 1", "1", "0.010", "10", "4.60"]]
    assert sections.paper_steps([CURVES[0] | {"name": "the paper's configuration"}]) == [
        "The paper's configuration got 10 steps in 10 s; they end at an NMSE of 0.01."]


@pytest.mark.parametrize("quarters, word", [
    ((0.35, 0.35, 0.30), "holds"),              # 0.65 of 0.70 is 7 % less: two roles of three
    ((0.35, 0.33, 0.30), "not reproduced"),     # 0.67 is 4 % less: only one
    ((0.20, 0.20, 0.20), "not reproduced")])    # less than noise
def test_dimensions_are_few_in_most_roles(tmp_path, quarters, word):
    write(tmp_path, "spectra", *({"model": "m", "role": str(i), "cumulative": [q, 0.8, 0.9, 1.0],
                                  "white": [0.3, 0.7, 0.8, 1.0]} for i, q in enumerate(quarters)))
    measured, found = report.of_spectra(sections.Results(tmp_path))
    assert found == word and measured.endswith(" over noise") and measured.startswith("m ")


def test_spectra_curves_and_the_tour(added):
    assert "explains +20% of the variance more" in sections.spectra(added)[1][1]
    assert "in 2 of 2 roles of `m`." in sections.spectra(added)[1][2]
    assert figures.shifted(CURVES[0]["points"]) == ([0.0, 9.0, 10.0], [1.0, 0.1, 0.01], 2)
    assert figures.shifted(CURVES[0]["points"][2:]) == ([1.0], [0.01], None)
    text = report.page(added)
    assert "```\none\n  two\n```" in text
    assert max(len(line) for line in text.splitlines() if line[:1] in "| ") <= 120


# --- Sentences ------------------------------------------------------------------------------------
def test_a_tally_in_words():
    rows = [{"difference": {"x": {"mean": mean, "se": 0.1}}} for mean in (-1, 0, 0, 1)]
    assert sections.tally(rows, "x", "noise") == "beat noise 1 time, tie 2, lose 1"
    assert sections.tally(rows[1:], "x", "noise") == "beat noise 0 times, tie 2, lose 1"


def test_brackets_are_explained_by_the_records():
    codecs = {"r 1": {"sigma": 0.01}, "r 1, beta 0.01": {"sigma": 0.0995}, "r 2": {"steps": 150}}
    exact, *rest = sections.codecs_of([{"row": "a [r 1]", "codecs": codecs}]).split("; ")
    assert not rest and exact.startswith("[r 1]: the exact, untrained codec")
    rows = [{"row": name, "codecs": codecs} for name in ("a [r 2]", "b [r 1, beta 0.01]")]
    assert sections.codecs_of(rows).split("; ")[1:] == [
        "[beta 0.01]: sigma 0.1, else 0.01",
        "[r 2]: trained for 150 steps of stage 2, before the schedule of the training changed."]


def test_merges_shown_are_the_rows_listed(results):
    _, sentences, lines = sections.table5(results)
    listed = [line for line in lines if re.match(r"\| (large|base-seed2|grown): ", line)]
    # a row that beats everything: five negative differences, each beyond two errors
    beat = sum(all(float(mean) < -2 * float(se) for mean, se in re.findall(
        r"([+-]?[\d.]+) ± ([\d.]+)", line)) for line in listed)
    assert sentences[1].startswith(f"Of {len(listed)} merges shown {beat} beat")


def test_what_was_chosen(results):
    difference = {name: {"mean": mean, "se": 0.1} for name, mean in (
        ("base", -1), ("zero", -1), ("noise", -1))}
    row = {"align": "units", "lam": 0.5, "difference": difference}
    assert sections.chosen_text("x", row) == (
        "`x`, chosen on validation: units, lambda 0.5: **holds**, -1.00 ± 0.10; all 2 "
        "controls lose.")
    row["difference"]["zero"]["mean"] = 0.0
    assert sections.chosen_text("x", row).endswith("**ties**, -1.00 ± 0.10; 1 of 2 controls lose.")


def test_the_beta_shown_is_that_of_the_largest_loss(tmp_path):
    write(tmp_path, "curves", *(
        {"name": f"{stages}, beta {beta}", "model": "m", "seed": 0, "points": [{"nmse": value}]}
        for stages, beta, value in (("one stage", "0.1", 0.02), ("two stages", "0.1", 0.01),
                                    ("one stage", "1", 0.8), ("two stages", "1", 0.7))))
    assert report.of_collapse(sections.Results(tmp_path)) == (
        "beta 1: NMSE 0.80, two 0.70", "not reproduced")


def test_older_records_are_named():
    """Steps of the present schedule: 400 + 400, 0 + 800, 0 + 400, none."""
    new = [{"schedule": {"steps1": a, "steps2": b}} for a, b in (
        (400, 400), (0, 800), (0, 400), (0, 0))]
    assert sections.older(new) == []
    text, = sections.older([*new, {"schedule": {"steps1": 400, "steps2": 200}},
                            {"schedule": {"steps2": 200}}])
    assert "2 of 6 rows): stages of 400 + 200 steps" in text


def test_a_codecs_own_error_is_most_of_its_distance():
    exact, good, bad = ((True, 0.0), (True, 0.0)), ((False, 0.3), (False, 0.01)), (
        (False, 0.3), (False, 0.2))
    assert sections.differs([*exact, *good]) == "Yes, mostly by its own error."
    assert sections.differs([*good, *bad]) == "Yes, partly by its own error."


def test_distance_to_the_average_is_of_trained_codecs_at_r_1(tmp_path):
    write(tmp_path, "codec-search", *(
        {"setting": setting, "pair": ["a", "b"], "residual": residual, "seed": 0, "to_average": far}
        for setting, residual, far in (
            ("random, r = 1", True, 0.01), ("random, r = 1, four blocks", True, 0.02),
            ("random, r = 1", False, 0.5), ("random, r = 1/2", True, 0.6),
            ("random, r = 2", True, 0.7), ("warm start, r = 1", True, 0.8))))
    assert report.of_search(sections.Results(tmp_path)) == (
        "by <= 2.0% of the experts' distance", "ours")


def test_a_vae_trained_on_the_inputs_has_a_row(folder):
    merged = next(row for row in sections.Results(folder).rows("merge", "file")
                  if row["file"] == "merged.safetensors")
    merged["scores"]["prose"]["mean"] += 0.5
    write(folder, "merge", merged | {"file": "learnt.safetensors"})
    results = sections.Results(folder)
    assert [row[0] for row in rows_of(sections.merges(results)[2])][-1] == "`learnt`"
    assert "; 5e-01 bits from the average at most." in sections.merges(results)[1][2]
    assert [row[0] for row in rows_of(report.readme_merge(results))] == [
        "`code`", "`prose`", "`average`", "`merged`", "`learnt`"]


def test_every_claim_fits_a_page(added):
    rows = [line for line in report.verdicts(added) if line.startswith("|")]
    assert len(rows) == len(report.CLAIMS) + 2 and max(map(len, rows)) <= 120


# --- The README's places --------------------------------------------------------------------------
def test_fill_writes_what_has_a_place_and_nothing_else(results):
    text = "a\n<!-- verdicts: begin -->\nstale row\n<!-- verdicts: end -->\nb <!-- other: begin -->\nc"
    filled = report.fill(text, results)
    assert filled.startswith("a\n<!-- verdicts: begin -->\n| claim |") and "stale" not in filled
    assert filled.endswith("\n<!-- verdicts: end -->\nb <!-- other: begin -->\nc")
    assert "[table2]: experiments/RESULTS.md#table-2-self-merging\n" in filled
    assert report.fill(filled, results) == filled


def test_the_readmes_tables(results):
    merged = rows_of(report.readme_merge(results))
    last = {r["file"]: r["scores"] for r in results.rows("merge")}
    assert 3 <= len(merged) <= 6
    for name, *cells in merged:
        scores = last[name.strip("`") + ".safetensors"]
        assert [cell.split(" ±")[0] for cell in cells][0] == f"{scores['code']['mean']:.3f}"
    assert [row[3] for row in rows_of(report.readme_bench(results))][:4] == [
        row[3] for row in rows_of(sections.bench_peer(results)[2])]


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


@pytest.mark.parametrize("name", figures.DRAW)
def test_every_picture_draws_and_twice_the_same(name, added):
    pytest.importorskip("matplotlib")
    drawn = figures.svg(name, added)
    assert drawn == figures.svg(name, added)
    tree = xml.fromstring(drawn)
    assert tree.tag.endswith("svg") and "<image" not in drawn       # no pixels
    assert float(tree.get("width").removesuffix("pt")) == pytest.approx(72 * figures.WIDTH)


def test_lines_of_figure_4_have_a_colour_each():
    colours = [colour for colour, _ in figures.FIGURE_4.values()]
    assert len(set(colours)) == len(colours) == 6


def test_titles_name_the_relation_and_the_spread(added):
    pytest.importorskip("matplotlib")
    # of [[0, 0], [1, 2]]: variances 1/4 and 1, their mean 5/8
    assert figures.spread(CLOUDS[0]["source"]) == pytest.approx(math.sqrt(5 / 8))
    assert figures.svg("clouds", added).count("source's sd 0.79") == len(CLOUDS)
    drawn = figures.svg("figure4", added)
    assert "large (unrelated) into base" in drawn and "grown (a relative) into base" in drawn


def test_without_matplotlib_the_pictures_are_skipped(monkeypatch, tmp_path, capsys, results):
    page, readme = HERE / "RESULTS.md", ROOT / "README.md"
    for path in (page, readme):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(report, "HERE", tmp_path / "experiments")
    shutil.copytree(HERE / "results", tmp_path / "experiments" / "results")
    monkeypatch.setattr(figures, "available", bool)                 # bool() is False
    monkeypatch.setattr("sys.argv", ["report.py"])
    report.main()
    assert capsys.readouterr().out.count("\n") == 1
    assert (tmp_path / "experiments" / "RESULTS.md").read_text() == page.read_text()
    assert not (tmp_path / "experiments" / "figures").exists()
