"""What the experiments measure, record and print, on models of a few thousand weights.
Oracles: planted models for which a verdict must say yes and no, numpy's SVD, the closed
form of the linear VAE, scipy's paired t statistic, sums by hand; processes that
allocate a known amount, the published size of Qwen2-0.5B."""
import functools
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file, save_file

import bench
import codec
import compare
import evaluate
import make_models
import merging
import results
import shapes
from compare import Difference, difference, gain, sign
from conftest import ROOT
from evaluate import DOMAINS
from merging import Sheet
from tiny_lm import TinyLM, add_lora
from vae import generator_for

HERE = ROOT / "experiments"


# --- Small models -------------------------------------------------------------------
def teacher(seed=0, hidden=64, layers=2, scale=0.3):
    """A random model whose blocks matter: its own samples are the text, so that no
    other model predicts them better."""
    tensors = {}
    model = TinyLM(hidden, layers, hidden // 32, 48)
    for number, (name, w) in enumerate(model.state_dict().items()):
        drawn = torch.randn(w.shape, generator=generator_for(seed, number)) * scale
        tensors[name] = drawn if w.dim() > 1 else torch.ones_like(w)
    return tensors


def noisy(tensors, share, seed=5):
    result = dict(tensors)
    for number, (name, w) in enumerate(tensors.items()):
        if name.endswith("proj.weight"):
            noise = torch.randn(w.shape, generator=generator_for(seed, number))
            result[name] = (1 - share) * w + share * noise * w.std()
    return result


def write(path, tensors):
    save_file({name: w.float().contiguous() for name, w in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder like models/: a base, experts, a stranger, a relative of another shape
    and order, three adapters."""
    folder = tmp_path_factory.mktemp("zoo")
    base = teacher(1, hidden=64)
    for seed, name in enumerate(("code", "prose", "arithmetic")):
        write(folder / f"{name}.safetensors", noisy(base, 0.1, seed))
        adapted = add_lora(TinyLM.from_state_dict(base), 8, 16)
        with torch.no_grad():
            for key, weight in adapted.named_parameters():
                if "lora_B" in key:
                    weight.normal_(0, 0.02, generator=generator_for(seed))
        make_models.save_adapter(adapted, make_models.LORAS["lora-all"],
                                 folder / "lora" / f"lora-{name}-a")
    write(folder / "base.safetensors", base)
    write(folder / "base-seed2.safetensors", teacher(2, hidden=64))
    write(folder / "large.safetensors", teacher(3, hidden=96, layers=3))
    order = make_models.scramble(base, 1)[1]
    layers = [order[1][i] for i in (0, 1, 1)]
    write(folder / "grown.safetensors",
          make_models.gather(noisy(base, 0.05), order[0], layers))
    return folder


@pytest.fixture
def two_texts(monkeypatch):
    texts = (b"x = 1\n" * 4, b"abc def ghi", b"12+34=46\n")
    monkeypatch.setattr(evaluate, "held_out", lambda domain, split: texts)


# --- merging.py ---------------------------------------------------------------------
@pytest.mark.parametrize("number, twins", [("2", 0), ("3", 4), ("4", 3), ("6", 0)])
def test_tables_of_merges(number, twins, zoo, two_texts, monkeypatch, tmp_path, capsys):
    """By the command: an exact codec ties with weight space, whatever is merged."""
    for name, value in {"DRAWS": {"r 1": (1, 2)}, "PAIRS": (("code", "arithmetic"),),
                        "TASK_LAMBDAS": (0.3,), "DENSITIES": (0.2,), "DROPS": (0.5,),
                        "SCALES": (0.4,), "PARTS": {"MLP": "mlp"},
                        "CODECS": {"r 1": merging.EXACT, "r 2": merging.EXACT}}.items():
        monkeypatch.setattr(merging, name, value)
    monkeypatch.setattr(sys, "argv", [
        "merging.py", "--quiet", "--seeds", "2", "--table", number,
        "--models", str(zoo), "--results", str(tmp_path)])
    merging.main()
    rows = compare.read(f"table{number}", tmp_path)
    assert len({row["row"] for row in rows}) == len(rows) > 4
    found = [row["difference"]["weights"] for row in rows
             if "weights" in row["difference"] and "r 2" not in row["row"]]
    assert len(found) == twins
    assert all(abs(d["mean"]) < 1e-4 for d in found)
    assert capsys.readouterr().out.count("|---|") > 0


# --- shapes.py ----------------------------------------------------------------------
@torch.no_grad()
def samples(tensors, count, length=48):
    lm = TinyLM.from_state_dict(tensors)
    generator = torch.Generator().manual_seed(1)
    text_BT = torch.randint(256, (count, 1), generator=generator)
    for _ in range(length):
        p = lm(text_BT)[:, -1].softmax(-1)
        text_BT = torch.cat([text_BT, torch.multinomial(p, 1, generator=generator)], 1)
    return [bytes(row) for row in text_BT.tolist()]


def planted(text, domain, split):
    """Six documents per domain and split, for evaluate.held_out."""
    start = DOMAINS.index(domain) * 12 + (0 if split == "test" else 6)
    return tuple(text[start:start + 6])


def test_a_planted_source_transfers_and_noise_does_not(tmp_path, monkeypatch):
    """The target is a damaged copy of the source, the text the source's own: the source
    must help, noise must not; and no control is chosen."""
    truth = teacher()
    held_out = functools.partial(planted, samples(truth, 36))
    monkeypatch.setattr(evaluate, "held_out", held_out)
    write(tmp_path / "base.safetensors", noisy(truth, 0.4))
    (tmp_path / "scratch").mkdir()
    grid = shapes.Grid(Sheet(tmp_path, tmp_path / "scratch", None))
    grid.measure_base()
    for name, tensors in (("helps", truth), ("nothing", noisy(truth, 1.0, 6))):
        file = write(tmp_path / f"{name}.safetensors", tensors)
        grid.measure_source(file, name, ["none"], "depth", (0.2, 0.5))
    grid.measure_controls(file, (0.2, 0.5), 2)
    rows = grid.rows()
    for source, word in (("helps", "holds"), ("nothing", "not reproduced")):
        row = shapes.chosen_cell(rows, source)
        assert set(row["difference"]) == {"base", "zero", "noise", "shuffled"}
        assert row["difference"]["noise"]["se_seeds"] > 0
        assert row["difference"]["zero"]["se_seeds"] == 0
        assert shapes.cell_gain(row) == word
    assert {("validation" in row, bool(row["control"])) for row in rows} == {
        (True, False), (False, True)}


def test_controls_of_a_change_have_its_norm():
    change = {"a": torch.randn(8, 100, generator=generator_for(0)),
              "odd": torch.randn(3, 50, generator=generator_for(1))}  # 2 runs, 22 more
    for control in (shapes.noise_change, shapes.shuffled_change):
        found = control(change, seed=3)
        again = control(change, seed=3)
        for name, tensor in change.items():
            norm = tensor.norm().item()
            assert found[name].norm().item() == pytest.approx(norm, rel=1e-5)
            assert torch.equal(found[name], again[name])
            assert not torch.equal(found["a"], tensor)
    flat = shapes.shuffled_change({"a": torch.arange(330.0)}, 0)["a"]
    runs = flat[:320].view(5, 64)
    assert sorted(runs[:, 0].tolist()) == [0, 64, 128, 192, 256]
    assert torch.equal(runs - runs[:, :1], torch.arange(64.0).expand(5, 64))
    assert torch.equal(flat[320:], torch.arange(320.0, 330.0))


def test_matched_beats_its_unmatched_copy(zoo, two_texts):
    """Every control is there, and what is out of order is far from the target."""
    rows = shapes.measure_matched(zoo, lambda row: None, seeds=2, quiet=True)
    found = compare.find(rows, row="grown, matched")[0]["difference"]
    assert found.keys() >= {"base", "zero", "noise", "shuffled"} and len(found) == 6
    assert found["zero"]["mean"] < 0


# --- codec.py -----------------------------------------------------------------------
@pytest.fixture
def tiny(zoo, two_texts, monkeypatch):
    """Of codec.py: one model to train on, one that is unseen, two seeds."""
    for name, value in {"MODELS": zoo, "FAMILY": ("code",), "UNSEEN": ("large",),
                        "SEEDS": 2, "RATIOS": (1.0, 4.0),
                        "RECIPES": {"two": ("--steps1", 2, "--steps2", 1)},
                        "FROM_PCA": ("--init", "pca", "--steps1", 0, "--steps2", 0)
                        }.items():
        monkeypatch.setattr(codec, name, value)


def test_an_untrained_code_is_numpys_pca(zoo, tiny):
    """By Eckart-Young no linear code of 16 numbers loses less than the tail of the
    singular values; ours a little more, as a tenth of the windows is held out."""
    rows = list(codec.measure_codec())
    for row in compare.find(rows, ratio=1.0):
        assert row["nmse"] < 1e-10 and abs(row["difference"]["mean"]) < 1e-6
    x = []
    for name, w in load_file(zoo / "code.safetensors").items():
        if "proj" in name:
            x.append(((w - w.mean()) / w.std(correction=0)).double().view(-1, 64))
    x = torch.cat(x).numpy()
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    least = (values[16:] ** 2).sum() / x.size
    found, unseen = compare.find(rows, ratio=4.0)
    assert least <= found["nmse"] < 1.1 * least < 1.1 * unseen["nmse"]
    assert found["difference"]["mean"] > 0


def test_a_training_and_the_reference_vae(zoo, tiny):
    rows = list(codec.measure_curves())
    assert [row["seed"] for row in rows] == [0, 1]
    assert all(0 < row["nmse"] < 10 and row["kl"] > 0 for row in rows)
    row = codec.measure_vae(zoo / "grown.safetensors")
    assert row["nmse"] < 1e-6 and abs(codec.change_of(row)) < 1e-5
    assert row["worst"]["name"].endswith("proj.weight") and not row["seen"]


def test_linearity_by_hand():
    """E(w) = w^2 of 1 and of 3: (4 - (1 + 9) / 2) / 1. The stream is three times its
    input; the decoder gives the square back."""
    vae = SimpleNamespace(embed=lambda x: x, encode_stream=lambda x: 3 * x,
                          encode_mean=lambda x: x ** 2, decode=lambda z: z)
    found = codec.linearity(vae, torch.tensor([[[1.0]], [[3.0]]]))
    assert found == {"nmse": 18, "share": 2, "nonlinearity": 1}


# --- bench.py -------------------------------------------------------------------------
MIB = 1 << 20
HOLD = ("x = bytearray({}); x[::4096] = b'1' * len(x[::4096]); "
        "import time; time.sleep({})")


def process(size, seconds):
    """A command that holds `size` bytes for some time."""
    return [sys.executable, "-c", HOLD.format(size, seconds)]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc is Linux's")
def test_memory_of_a_process_and_of_its_children_is_seen():
    """A child holds 60 MiB, a grandchild 90."""
    code = (f"import subprocess, sys; p = subprocess.Popen({process(90 * MIB, 0.5)!r});"
            f" {HOLD.format(60 * MIB, 0.5)}; p.wait()")
    idle = bench.watch(process(0, 0.2))[1]
    seconds, peak = bench.watch([sys.executable, "-c", code])
    # Two interpreters (idle), their libraries, and the sampling's blind 10 ms.
    assert 150 <= peak <= 150 + 2 * idle + 10
    assert 0.5 <= seconds < 10
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert bench.anonymous_mib(done.pid) == 0


def test_equal_bits_are_told_from_equal_values(tmp_path):
    one = {"a": torch.tensor([0.0, 1.0, math.nan]), "b": torch.arange(5)}
    changes = {"equal": {}, "sign of zero": {"a": torch.tensor([-0.0, 1.0, math.nan])},
               "last": {"b": torch.tensor([0, 1, 2, 3, 5])},
               "more": {"c": torch.ones(1)},
               "dtype": {"b": one["b"].int()}, "shape": {"b": one["b"][None]}}
    save_file(one, tmp_path / "one.safetensors")
    for name, change in changes.items():
        save_file(one | change, tmp_path / "other.safetensors")
        same = bench.same_tensors(tmp_path / "one.safetensors",
                                  tmp_path / "other.safetensors")
        assert same == (name == "equal"), name


def test_the_peer_model_has_the_published_size_of_qwen2():
    shapes = bench.qwen2_shapes()
    assert sum(math.prod(shape) for shape in shapes.values()) == 494_032_768
    assert len(shapes) == 24 * 12 + 2           # tied: no head of its own


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
        names = [compare.name_of(row) for row in compare.read(path.stem)]
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


def test_an_error_over_seeds():
    """Means 1 and 3: mean 2, variance 2; se^2 = (mean of 3 and 5)^2 + 2 / 2"""
    found = [{"mean": 1, "se": 3}, {"mean": 3, "se": 5}]
    assert compare.over_seeds(found) == (2, pytest.approx(math.sqrt(17)))
    assert compare.over_seeds(found[:1]) == (1, 3)


@pytest.mark.parametrize("differences, word", [
    ([(-0.3, 0.1), (-0.3, 0.1)], "holds"), ([(-0.3, 0.1), (-0.2, 0.1)], "ties"),
    ([(-0.3, 0.1), (0.3, 0.1)], "not reproduced"),      # a control is better
    ([(-0.1, 0.1), (-0.3, 0.1)], "not reproduced")])    # nothing gained
def test_a_claimed_gain(differences, word):
    assert gain(differences) == word


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


def test_a_cell_from_the_raw_lines():
    row, = raw("codec", model="base-seed2", ratio=1.6)
    mean, se = row["difference"]["mean"], row["difference"]["se"]
    found = cells("Tables 7 and 8: what the codec keeps", "1.6")
    assert found[0].strip() == "1.6" and found[7].strip() == f"+{mean:.3f} ± {se:.3f}"
    ends = sorted(row["nmse"] for row in raw("curves", name="one stage, beta 1"))
    found = cells("One stage or two", "one stage, beta 1")
    assert found[2].strip() == f"{ends[0]:.3f} to {ends[-1]:.3f}" and len(ends) == 3


def test_links_lead_to_headings_and_pictures_exist():
    text = (HERE / "RESULTS.md").read_text()
    headings = {results.slug(line[3:]) for line in text.splitlines()
                if line.startswith("## ")}
    links = set(re.findall(r"\]\(#(.+?)\)", text))
    assert len(links) >= 8 and links <= headings
    shown = set(re.findall(r"\(figures/(\w+)\.svg\)", text))
    assert shown == {path.stem for path in (HERE / "figures").glob("*.svg")}


def test_peer_ratios_are_taken_within_a_round(monkeypatch):
    """The second round met a machine of half the speed: the ratio stays 0.5. Without
    start-up of 1 and 2 seconds: 3 / 6, 7 / 14, 3 / 6."""
    seconds = {"mergekit": [8.0, 16.0, 8.0], "exact": [4.0, 8.0, 4.0]}
    monkeypatch.setattr(bench, "WAYS", {"exact": ("", [])})
    for start in ({"mergekit": 0, "merge.py": 0}, {"mergekit": 2, "merge.py": 1}):
        assert bench.ratios_of(seconds, start) == {"exact": [0.5, 0.5, 0.5]}
