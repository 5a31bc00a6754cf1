"""Verdicts by hand; the control of self-merging; each table on a few documents of the committed
models, with untrained codecs."""
import json
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import baselines
import merging_tables
import paper_tables
from conftest import ROOT
from evaluate import DOMAINS
from merging_tables import Row, Sheet, drift, noise_sizes, noisy_copies, record
from scores import Difference, verdict

MODELS = ROOT / "experiments" / "models"


@pytest.mark.parametrize("mean, se_text, se_seeds, said", [
    (-1.01, 0.3, 0.4, "beats"), (1.01, 0.3, 0.4, "loses"),     # se = 0.5: three, four, five
    (-1.0, 0.3, 0.4, "ties"), (1.0, 0.3, 0.4, "ties"),         # two errors are not more than two
    (5e-5, 1e-9, 0, "ties"), (2e-4, 1e-9, 0, "loses")])        # rounding is no finding
def test_verdict_by_hand(mean, se_text, se_seeds, said):
    assert verdict(Difference(mean, se_text, se_seeds)) == said


def row(name, kind, against, *shifts):
    """Two documents per domain, 1 and 2 bits, and a seed per shift."""
    scores = np.array([[1.0 + shift, 2.0 + shift] for shift in shifts])
    return Row(name, kind, against, dict.fromkeys(DOMAINS, scores), {}, {})


@pytest.mark.parametrize("shifts, base, noise, claim", [
    ((-0.5, -0.7), "beats", "beats", "reproduced"),
    ((-0.1, -0.5), "ties", "ties", "not reproduced"),       # mean -0.3; sd 0.283, over sqrt 2: 0.2
    ((-0.15, -0.15), "beats", "ties", "not reproduced"),    # every one, not most
    ((0.4, 0.4), "loses", "loses", "not reproduced")])
def test_a_claim_has_to_beat_all(shifts, base, noise, claim):
    """The noise: mean -0.15, standard error 0.05."""
    sheet = Sheet(MODELS, ".")
    sheet.rows = {"base": row("base", "parent", {}, 0.0), "n": row("n", "control", {}, -0.1, -0.2)}
    against = {"base": "base", "noise": "n"}
    found = record("2", sheet, row("x", "latent", against, *shifts))
    to_base, to_noise = (found["difference"][name] for name in against)
    assert to_base["mean"] == pytest.approx(np.mean(shifts)) and found["seeds"] == 2
    assert to_base["se_seeds"] == pytest.approx(abs(shifts[0] - shifts[1]) / 2)     # sd / sqrt 2
    assert [to_base["verdict"], to_noise["verdict"]] == [base, noise]
    assert found["verdict"] == claim
    json.dumps(found, allow_nan=False)


def test_noise_of_the_measured_size():
    """Draws that lie 0.3 and 0.4 of the norm away: root mean square 0.3536; the mean of 4 copies
    moves by half of that. Four random directions of 40,000 numbers are orthogonal to 1 / 200."""
    w = torch.ones(40_000)
    draws = [{"w": w * 1.3, "same": w}, {"w": w * 0.6, "same": w}]
    sizes = noise_sizes({"w": w, "same": w}, draws)
    assert sizes == {"w": pytest.approx(math.sqrt((0.09 + 0.16) / 2), rel=1e-6)}
    copy = noisy_copies({"w": w, "same": w}, sizes, 4, seed=0)
    assert torch.equal(copy["same"], w)
    assert (copy["w"] - w).norm() / w.norm() == pytest.approx(sizes["w"] / 2, rel=0.02)


def test_drift_is_over_the_parents_distance():
    """Target at 0, source at 4, merge in weights at 2, through the codec at 2.1: 0.1 / 4."""
    far = {"to_target": 2.1, "to_source": [1.9], "to_average": 0.1}
    assert drift({"distance": far}) == pytest.approx(0.025)
    nowhere = {"to_target": 0.0, "to_source": [0.0], "to_average": 0.0}
    assert drift({}) is None and drift({"distance": nowhere}) is None


def test_only_the_selected_tensors_are_merged(tmp_path):
    """Table 6 rests on it: what --select does not name stays the target's, norms and embeddings
    too."""
    sheet = Sheet(MODELS, tmp_path)
    code = sheet.tensors("code")
    for part, roles in (("MLP", [".mlp."]), ("both", [".mlp.", ".self_attn."])):
        flags = "--select", merging_tables.PARTS[part]
        (merged,), _ = sheet.merged(sheet.file("code"), sheet.file("prose"), *flags)
        changed = {name for name in code if not torch.equal(merged[name], code[name])}
        assert changed == {name for name in code if any(role in name for role in roles)}


def test_a_cut_difference_is_of_the_rank(tmp_path):
    """Two directions with singular values 3 and 2, and eight of 1: rank 2 keeps the two."""
    sheet = Sheet(MODELS, tmp_path)
    base, name = sheet.tensors("base"), "model.layers.0.self_attn.q_proj.weight"
    turn = torch.linalg.qr(torch.randn(128, 10, generator=torch.Generator().manual_seed(0))).Q
    sizes = torch.tensor([3.0, 2.0] + [1.0] * 8)
    whole = base | {name: base[name] + turn * sizes @ turn.T}
    cut = sheet.cut(whole, rank=2)
    kept = (turn * sizes)[:, :2] @ turn[:, :2].T
    torch.testing.assert_close(cut[name] - base[name], kept, rtol=1e-4, atol=1e-4)


def test_the_product_in_weight_space_is_the_baselines_soup(tmp_path):
    """Two implementations: merge.py's stream, and baselines.py's state dicts."""
    sheet = Sheet(MODELS, tmp_path)
    names = ("code", "prose", "arithmetic")
    merged, report = sheet.merged(*map(sheet.file, names), "--operator", "soup")
    expected = baselines.soup([load_file(MODELS / f"{name}.safetensors") for name in names])
    for name, w in merged[0].items():                                   # one rounding to float32
        torch.testing.assert_close(w.double(), expected[name], rtol=1e-6, atol=1e-8)
    assert report["space"] == "weight"


def test_choice_is_by_validation_text(tmp_path, monkeypatch):
    sheet, asked = Sheet(MODELS, tmp_path), []
    def scores(models, split="test"):
        asked.append(split)
        return {domain: np.array([models]) for domain in DOMAINS}
    monkeypatch.setattr(sheet, "scores", scores)
    candidates = [("a", [2.0, 3.0]), ("b", [1.0, 1.0]), ("c", [5.0, 0.0])]
    assert sheet.choose(candidates)[0] == "b" and set(asked) == {"validation"}


SHORT = {"CODECS": {"r 1": ("--blocks", 0)}, "DRAWS": {"r 1": (1, 2)},
         "PAIRS": (("code", "arithmetic"),), "TASK_LAMBDAS": (0.3,), "DENSITIES": (0.2,),
         "DROPS": (0.5,), "SCALES": (0.4,), "PARTS": {"MLP": "mlp"}, "QUICK": 2}


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Every kind of row once: a linear codec, one pair, one value of each grid, three adapters, two
    documents."""
    for name, value in SHORT.items():
        monkeypatch.setattr(merging_tables, name, value)
    (tmp_path / "lora").mkdir()
    files = [f"{name}.safetensors" for name in ("base", "code", "prose", "arithmetic")]
    adapters = [f"lora/lora-{name}-a" for name in ("code", "prose", "arithmetic")]
    for name in (*files, *adapters):
        (tmp_path / name).symlink_to(MODELS / name)
    # Its shapes do not matter here, its size does.
    (tmp_path / "large.safetensors").symlink_to(MODELS / "base-seed2.safetensors")
    return tmp_path


@pytest.mark.parametrize("table", ["3", "6"])
def test_quick_run(table, short, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", "--table", table, "--models", str(short),
                                      "--results", str(results), "--seeds", "2", "--quick",
                                      "--quiet"])
    paper_tables.main()
    printed = capsys.readouterr().out
    assert f"Table {table} in miniature" in printed and "not reproduced" in printed
    assert "nan" not in printed and not results.exists()


def test_an_exact_codec_ties_with_weight_space(short):
    """r = 1 without training is a linear map: lerp and task arithmetic of latents are those of
    weights."""
    rows = merging_tables.measure_merging("4", short, seeds=1, quick=True, quiet=True)
    by_name = {row["row"]: row for row in rows}
    for name in ("lerp 0.5", "task arithmetic"):
        found = by_name[f"code + arithmetic: {name}, latents [r 1]"]
        to_weights = found["difference"]["weights"]
        assert to_weights["verdict"] == "ties" and abs(to_weights["mean"]) < 1e-5
        assert found["verdict"] == "not reproduced" and drift(found["report"]) < 1e-5
    json.dumps(rows, allow_nan=False)
