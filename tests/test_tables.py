"""What the experiments measure, record and print, on models of a few thousand weights.
Oracles: planted models for which a verdict must say yes and no, numpy's SVD, scipy's
paired t, sums by hand; processes of a known size, the published size of Qwen2-0.5B."""
import math
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file

import bench
import codec
import compare
import evaluate
import lora
import make_models
import merging
import results
import shapes
from conftest import ROOT, generator, llama_tensors, relative, save
from evaluate import DOMAINS
from tiny_lm import TinyLM

HERE = ROOT / "experiments"


# --- Small models -------------------------------------------------------------------
def teacher(seed=0, hidden=64, layers=2):
    """A model whose blocks matter: no other predicts its samples better."""
    tensors = llama_tensors(seed, hidden, layers, mlp=48, vocab=256)
    for name, w in tensors.items():
        if "proj" in name:
            w *= 6
    return tensors


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder like models/: a base, experts and their adapters, strangers, a relative
    of another shape and order."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "lora").mkdir()
    base = teacher(1)
    stream, layers = make_models.random_order(base, 1)
    grown = make_models.cut(relative(base, 4, 0.05), stream, [*layers, layers[1]])
    models = {"base": base, "base-seed2": teacher(2), "large": teacher(3, 96, 3),
              "grown": grown}
    for seed, name in enumerate(("code", "prose", "arithmetic")):
        models[name] = relative(base, seed, 0.1)
    files = {name: folder / f"{name}.safetensors" for name in models}
    for name, tensors in models.items():
        save(files[name], tensors)
    for name in ("code", "prose", "arithmetic"):
        lora.extract(files[name], files["base"], 8, folder / "lora" / f"lora-{name}")
    return folder


@pytest.fixture
def two_texts(monkeypatch):
    texts = (b"abc def ghi", b"12+34=46\n")
    monkeypatch.setattr(evaluate, "held_out", lambda domain, split: texts)


# --- merging.py and shapes.py ---------------------------------------------------------
@pytest.mark.parametrize("number, twins", [("2", 0), ("3", 3), ("4", 3)])
def test_tables_of_merges(number, twins, zoo, two_texts, monkeypatch):
    """An exact codec ties with weight space, whatever is merged."""
    short = {"DRAWS": {"r 1": (1, 2)}, "PAIRS": (("code", "arithmetic"),),
             "TASK_LAMBDAS": (0.3,),
             "CODECS": {"r 1": merging.EXACT}}
    for name, value in short.items():
        monkeypatch.setattr(merging, name, value)
    measure, section = merging.TABLES[number]
    rows = list(measure(merging.Sheet(zoo, 2)))
    assert len({row["row"] for row in rows}) == len(rows) > 4
    found = [row["difference"]["weights"] for row in rows
             if "weights" in row["difference"]]
    assert len(found) == twins and all(abs(d["mean"]) < 1e-4 for d in found)
    assert "|---|" in section(rows)


@torch.no_grad()
def samples(tensors, count):
    """Texts of 48 bytes that the model writes itself."""
    lm = TinyLM.from_state_dict(tensors)
    g = generator(1)
    text_BT = torch.randint(256, (count, 1), generator=g)
    for _ in range(47):
        p = lm(text_BT)[:, -1].softmax(-1)
        text_BT = torch.cat([text_BT, torch.multinomial(p, 1, generator=g)], 1)
    return [bytes(row) for row in text_BT.tolist()]


def test_a_planted_source_transfers_and_noise_does_not(tmp_path, monkeypatch):
    """The target is a damaged copy of the source, the text the source's own: the source
    must help, a stranger must not; and no control is chosen."""
    truth = teacher()
    texts = samples(truth, 36)

    def held_out(domain, split):
        return texts[2 * DOMAINS.index(domain) + (split == "test")::6]
    monkeypatch.setattr(evaluate, "held_out", held_out)
    save(tmp_path / "base.safetensors", relative(truth, 5, 0.5))
    grid = shapes.Grid(merging.Sheet(tmp_path, 2))
    rows = []
    for lam in (0.2, 0.5):
        rows.append(grid.row(truth, lam, "zero"))
        for seed in range(2):
            rows.append(grid.row(truth, lam, "noise", seed))
        for name, tensors in (("helps", truth), ("nothing", teacher(6))):
            rows.append(grid.row(tensors, lam, source=name, align="none"))
    for source, word in (("helps", "holds"), ("nothing", "not reproduced")):
        row = shapes.chosen_cell(rows, source)
        assert len(row["difference"]) == 3 and shapes.cell_gain(row) == word
        assert row["difference"]["noise"]["se_seeds"] > 0
    assert all(("validation" in row) != bool(row["control"]) for row in rows)


def test_matched_beats_its_unmatched_copy(zoo, two_texts):
    """Every control is there, and what is out of order is far from the target."""
    rows = list(shapes.measure_matched(merging.Sheet(zoo, 2)))
    found = compare.find(rows, row="grown, matched")[0]["difference"]
    assert len(found) == 6 and found["zero"]["mean"] < 0


# --- codec.py -----------------------------------------------------------------------
@pytest.fixture
def tiny(zoo, two_texts, monkeypatch):
    """Of codec.py: one model to train on, one that is unseen, two seeds."""
    short = {"MODELS": zoo, "FAMILY": ("code",), "UNSEEN": ("large",), "SEEDS": 2,
             "RATIOS": (1.0, 4.0), "RECIPES": {"two": ("--steps1", 2, "--steps2", 1)},
             "FROM_PCA": ("--init", "pca", "--steps1", 0, "--steps2", 0)}
    for name, value in short.items():
        monkeypatch.setattr(codec, name, value)


def test_an_untrained_code_is_numpys_pca(zoo, tiny):
    """By Eckart-Young no linear code of 16 numbers loses less than the tail of the
    singular values; ours a little more, as a tenth of the windows is held out."""
    rows = list(codec.measure_codec())
    for row in compare.find(rows, ratio=1.0):
        assert row["nmse"] < 1e-10 and abs(row["difference"]["mean"]) < 1e-4
    chunks = []
    for name, w in load_file(zoo / "code.safetensors").items():
        if "proj" in name:
            chunks.append(((w - w.mean()) / w.std(correction=0)).view(-1, 64))
    x = torch.cat(chunks).double().numpy()
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    least = (values[16:] ** 2).sum() / x.size
    fitted, unseen = compare.find(rows, ratio=4.0)
    assert least <= fitted["nmse"] < 1.1 * least < unseen["nmse"]


def test_a_training_and_the_reference_vae(zoo, tiny):
    rows = list(codec.measure_curves())
    assert [row["seed"] for row in rows] == [0, 1]
    assert all(0 < row["nmse"] < 10 and row["kl"] > 0 for row in rows)
    row = codec.measure_vae(zoo / "grown.safetensors")
    assert row["nmse"] < 1e-6 and abs(codec.change_of(row)) < 1e-5 and not row["seen"]


def test_linearity_by_hand():
    """E(w) = w^2 of 1 and of 3: (4 - (1 + 9) / 2) / 1. The stream is three times its
    input; the decoder gives the square back."""
    vae = SimpleNamespace(embed=lambda x: x, encode_stream=lambda x: 3 * x,
                          encode_mean=lambda x: x ** 2, decode=lambda z: z)
    found = codec.linearity(vae, torch.tensor([[[1.0]], [[3.0]]]))
    assert found == {"nmse": 18, "share": 2, "nonlinearity": 1}


# --- bench.py -------------------------------------------------------------------------
HOLD = "x = b'1' * ({} << 20); import time; time.sleep({})"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_memory_of_a_process_and_of_its_children_is_seen():
    """A process holds 60 MiB, its child 90."""
    child = [sys.executable, "-c", HOLD.format(90, 0.5)]
    parent = (f"import subprocess; p = subprocess.Popen({child!r}); "
              f"{HOLD.format(60, 0.5)}; p.wait()")
    idle = bench.watch([sys.executable, "-c", HOLD.format(0, 0.2)])[1]
    seconds, peak = bench.watch([sys.executable, "-c", parent])
    # Two interpreters (idle), their libraries, and the sampling's blind 10 ms.
    assert 150 <= peak <= 150 + 2 * idle + 10 and 0.5 <= seconds < 10


def test_the_peer_model_and_its_ratios(monkeypatch):
    """Qwen2-0.5B has 494 M weights, and no head of its own. Ratios are taken within a
    round: in the second the machine had half its speed. Without start-up of 1 and 2
    seconds: 3 / 6, 7 / 14, 3 / 6."""
    sizes = [math.prod(shape) for shape in bench.qwen2_shapes().values()]
    assert sum(sizes) == 494_032_768 and len(sizes) == 24 * 12 + 2
    seconds = {"mergekit": [8.0, 16.0, 8.0], "exact": [4.0, 8.0, 4.0]}
    monkeypatch.setattr(bench, "WAYS", {"exact": ("", [])})
    for start in ({"mergekit": 0, "merge.py": 0}, {"mergekit": 2, "merge.py": 1}):
        assert bench.ratios_of(seconds, start) == {"exact": [0.5, 0.5, 0.5]}


# --- compare.py -----------------------------------------------------------------------
def test_rows_replace_those_of_equal_names(tmp_path):
    compare.keep("a", [{"row": "a", "lam": 1, "v": 1}, {"row": "b", "v": 2}], tmp_path)
    compare.keep("a", [{"row": "a", "lam": 1, "v": 3}, {"row": "a", "v": 4}], tmp_path)
    with pytest.raises(ValueError):
        compare.keep("a", [{"row": "c", "v": math.nan}], tmp_path)
    assert [row["v"] for row in compare.read("a", tmp_path)] == [3, 2, 4]
    assert len(list(tmp_path.iterdir())) == 1 and compare.read("b", tmp_path) == []


def test_committed_rows_have_names_of_their_own_and_a_command():
    """A row that no command can make again would stay for ever."""
    commands = (HERE / "README.md").read_text()
    for path in compare.RESULTS.glob("*.jsonl"):
        names = [compare.name_of(row) for row in compare.read(path.stem)]
        assert len(names) == len(set(names)) > 0, path.name
        assert f"`{path.stem}`" in commands, path.name
    for file, words in re.findall(r"`python experiments/(\w+\.py)(.*?)`", commands):
        for flag in re.findall(r"--\w+", words):
            assert f'"{flag}"' in (HERE / file).read_text(), (file, flag)


def scores(*columns):
    return {name: np.array(rows, dtype=float) for name, rows in zip(DOMAINS, columns)}


BASE = scores([[1, 2, 3]], [[2, 2, 2]], [[5, 4]])


def test_difference_by_hand():
    """code: 0.1, 0.2, 0.3, variance 0.01; prose: 0, 0, 0.3, variance 0.03; arithmetic:
    0.3 twice. Equal weight per domain, though one has fewer documents."""
    ours = scores([[1.1, 2.2, 3.3]], [[2, 2, 2.3]], [[5.3, 4.3]])
    d = compare.difference(ours, BASE)
    assert d.mean == pytest.approx((0.2 + 0.1 + 0.3) / 3) and d.se_seeds == 0
    assert d.se_text == pytest.approx(math.sqrt(0.01 / 3 + 0.03 / 3) / 3)


def test_one_domain_is_scipys_paired_t():
    draws = np.random.default_rng(0)
    ours, other = scores(draws.normal(size=(1, 40))), scores(draws.normal(size=(1, 40)))
    d = compare.difference(ours, other)
    t = scipy.stats.ttest_rel(ours["code"][0], other["code"][0])
    assert d.mean / d.se == pytest.approx(t.statistic)


def test_seeds_enter_the_error():
    """Two seeds 0.3 and 0.9 above the base everywhere: mean 0.6, and se_seeds =
    sd / sqrt(2) = 0.3; text adds nothing. Means 1 and 3 with errors 3 and 5: mean 2,
    variance 2, se^2 = 4^2 + 2 / 2."""
    control = {name: np.concatenate([v + 0.3, v + 0.9]) for name, v in BASE.items()}
    d = compare.difference(BASE, control)
    assert (d.mean, d.se_seeds, d.se) == pytest.approx((-0.6, 0.3, 0.3))
    mean, se = compare.over_seeds([{"mean": 1, "se": 3}, {"mean": 3, "se": 5}])
    assert mean == 2 and se == pytest.approx(math.sqrt(17))


@pytest.mark.parametrize("differences, word", [
    ([(-0.3, 0.1), (-0.3, 0.1)], "holds"), ([(-0.3, 0.1), (-0.2, 0.1)], "ties"),
    ([(-0.3, 0.1), (0.3, 0.1)], "not reproduced"),      # a control is better
    ([(-0.1, 0.1), (-0.3, 0.1)], "not reproduced"),     # nothing gained
    ([(-0.201, 0.1)], "holds"), ([(-0.2, 0.1)], "not reproduced"),  # two errors: not
    ([(-5e-5, 1e-9)], "not reproduced")])                           # more; rounding
def test_a_claimed_gain(differences, word):
    assert compare.gain(differences) == word


# --- results.py and what is committed -------------------------------------------------
def test_cells_from_the_raw_rows():
    text = (HERE / "RESULTS.md").read_text()
    row, = compare.find(compare.read("codec"), model="base-seed2", ratio=1.6)
    d = row["difference"]
    cells = re.search(r"\n\| 1\.6 \|.*", text)[0].split(" | ")
    assert cells[7] == f"+{d['mean']:.3f} ± {d['se']:.3f}"
    rows = compare.find(compare.read("curves"), name="one stage, beta 1")
    ends = sorted(row["nmse"] for row in rows)
    cells = re.search(r"\n\| one stage, beta 1 \|.*", text)[0].split(" | ")
    assert cells[1:3] == ["3", f"{ends[0]:.3f} to {ends[2]:.3f}"]


@pytest.fixture
def copy(tmp_path):
    """What results.py reads, elsewhere."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(HERE / "results", tmp_path / "experiments" / "results")
    return tmp_path


def test_building_again_changes_nothing(copy):
    results.build(copy / "experiments")
    for file in ("README.md", "experiments/RESULTS.md"):
        assert (copy / file).read_text() == (ROOT / file).read_text(), file
    pytest.importorskip("matplotlib")
    words = []      # another matplotlib may draw other curves: its words stay
    for folder in (HERE, copy / "experiments"):
        svg = (folder / "figures" / "figure4.svg").read_text()
        words.append(re.findall(r"<text[^>]*>([^<]+)", svg))
    assert words[0] == words[1] and len(words[0]) > 3


def test_a_changed_row_changes_the_page_and_the_verdict(copy):
    row, = compare.find(compare.read("table3"), row="soup, latents [r 1]")
    for d in row["difference"].values():
        d |= {"mean": -0.5, "se": 0.1}
    compare.keep("table3", [row], copy / "experiments" / "results")
    results.build(copy / "experiments")
    text = (copy / "experiments" / "RESULTS.md").read_text()
    line = re.search(r"\| a soup of ten LoRA experts gains in latents .*", text)[0]
    assert "-0.50 ± 0.10 to weights | [holds](#table-3" in line
    assert "-0.50 ± 0.10" in (copy / "README.md").read_text()


def test_links_lead_to_headings_and_pictures_exist():
    text = (HERE / "RESULTS.md").read_text()
    headings = {results.slug(line[3:]) for line in text.splitlines()
                if line.startswith("## ")}
    links = set(re.findall(r"\]\(#(.+?)\)", text))
    assert len(links) >= 8 and links <= headings
    shown = set(re.findall(r"\(figures/(\w+)\.svg\)", text))
    assert shown == {path.stem for path in (HERE / "figures").glob("*.svg")}
