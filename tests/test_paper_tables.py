"""records.py, scores.py and what the paper's tables are made of. Oracles: differences and verdicts by
hand, planted models for which a verdict must say yes and no, merge.py's own files, numpy's SVD."""
import functools
import json
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import codec_tables as tables
import curriculum
import grid as grids
import make_models
import merge
import merging_tables
import paper_tables
import records
import scores as scoring
import sections
import train
import transfer_tables
from evaluate import DOMAINS
from grid import Cell, Grid
from lsmerge import Alignment, Codec
from merging_tables import Sheet, noise_sizes, noisy_copies
from scores import Difference, difference, pooled, verdict
from tiny_lm import TinyLM, add_lora
from vae import VAE, VAEConfig, generator_for, sample


# --- Rows -----------------------------------------------------------------------------------------
def test_rows_replace_those_of_equal_names(tmp_path):
    path = tmp_path / "new" / "pruned.jsonl"
    records.keep(path, [{"row": "a", "lam": 1, "seed": 0, "v": 1}, {"row": "b", "lam": 1, "v": 2}])
    records.keep(path, [{"row": "a", "lam": 1, "seed": 0, "v": 3}, {"row": "a", "lam": 2, "v": 4}])
    assert [row["v"] for row in records.Results(path.parent).rows("pruned")] == [3, 2, 4]
    with pytest.raises(ValueError):
        records.keep(path, [{"row": "c", "v": math.nan}])
    assert len(records.read(path)) == 3 and len(list(path.parent.iterdir())) == 1
    assert records.Results(tmp_path).rows("absent") == []


def test_the_committed_rows_have_names_of_their_own():
    for path in (records.HERE / "results").glob("*.jsonl"):
        keys = [records.key_of(path.stem, row) for row in records.read(path)]
        assert len(keys) == len(set(keys)), path.name
        assert path.stem in records.KEYS or path.stem == "make_models"


# --- Differences and verdicts ---------------------------------------------------------------------
def scores(code, prose, arithmetic):
    columns = code, prose, arithmetic
    return {domain: np.array(values, dtype=float) for domain, values in zip(DOMAINS, columns)}


BASE = scores([[1, 2, 3]], [[2, 2, 2]], [[5, 4]])


def test_difference_by_hand():
    """code: 0.1, 0.2, 0.3, mean 0.2, variance 0.01; prose: 0, 0, 0.3, mean 0.1, variance 0.03;
    arithmetic: 0.3 twice. Equal weight per domain, though one has fewer documents."""
    ours = scores([[1.1, 2.2, 3.3]], [[2, 2, 2.3]], [[5.3, 4.3]])
    d = difference(ours, BASE)
    assert d.mean == pytest.approx((0.2 + 0.1 + 0.3) / 3)
    assert d.se_text == pytest.approx(math.sqrt(0.01 / 3 + 0.03 / 3 + 0) / 3) and d.se_seeds == 0
    only = difference(ours, BASE, ("prose",))
    assert (only.mean, only.se_text) == (pytest.approx(0.1), pytest.approx(0.1))


def test_seeds_enter_the_error():
    """Two seeds 0.3 and 0.9 above the base everywhere: mean 0.6, and SE_seeds = sd / sqrt(2) = 0.3;
    text adds nothing."""
    control = {domain: np.concatenate([v + 0.3, v + 0.9]) for domain, v in BASE.items()}
    d = difference(BASE, control)
    assert d.mean == pytest.approx(-0.6)
    assert d.se_seeds == pytest.approx(0.3) and d.se == pytest.approx(0.3)


@pytest.mark.parametrize("mean, se_text, se_seeds, said", [
    (-1.01, 0.3, 0.4, "beats"), (1.01, 0.3, 0.4, "loses"),     # se = 0.5: three, four, five
    (-1.0, 0.3, 0.4, "ties"), (1.0, 0.3, 0.4, "ties"),         # two errors are not more than two
    (5e-5, 1e-9, 0, "ties"), (2e-4, 1e-9, 0, "loses")])        # rounding is no finding
def test_verdict_by_hand(mean, se_text, se_seeds, said):
    assert verdict(Difference(mean, se_text, se_seeds)) == said


# --- Small models ---------------------------------------------------------------------------------
def teacher(seed=0, hidden=64, layers=2, scale=0.3):
    """A random model whose blocks matter: its own samples are the text, so that no other model
    predicts them better."""
    tensors = {}
    for number, (name, w) in enumerate(TinyLM(hidden, layers, hidden // 32, 48).state_dict().items()):
        drawn = torch.randn(w.shape, generator=generator_for(seed, number)) * scale
        tensors[name] = drawn if w.dim() > 1 else torch.ones_like(w)
    return tensors


def noisy(tensors, share, seed=5):
    result = dict(tensors)
    for number, (name, w) in enumerate(tensors.items()):
        if name.endswith("proj.weight"):
            noise = torch.randn(w.shape, generator=generator_for(seed, number)) * w.std()
            result[name] = (1 - share) * w + share * noise
    return result


def write(path, tensors):
    save_file({name: w.float().contiguous() for name, w in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder like models/: a base, three experts, two strangers, a relative, three adapters."""
    folder = tmp_path_factory.mktemp("zoo")
    base = teacher(1, hidden=32)
    for seed, name in enumerate(("code", "prose", "arithmetic")):
        write(folder / f"{name}.safetensors", noisy(base, 0.1, seed))
        adapted = add_lora(TinyLM.from_state_dict(base), 8, 16)
        with torch.no_grad():
            for key, weight in adapted.named_parameters():
                if "lora_B" in key:
                    weight.normal_(0, 0.02, generator=generator_for(seed))
        make_models.save_adapter(adapted, make_models.LORAS["lora-all"],
                                 folder / "lora" / f"lora-{name}-a")
    large = teacher(3, hidden=64, layers=3)
    write(folder / "base.safetensors", base)
    write(folder / "base-seed2.safetensors", teacher(2, hidden=32))
    write(folder / "large.safetensors", large)
    return folder


# --- The grid -------------------------------------------------------------------------------------
@torch.no_grad()
def samples(tensors, count, length=48):
    lm, generator = TinyLM.from_state_dict(tensors), torch.Generator().manual_seed(1)
    text_BT = torch.randint(256, (count, 1), generator=generator)
    for _ in range(length):
        p = lm(text_BT)[:, -1].softmax(-1)
        text_BT = torch.cat([text_BT, torch.multinomial(p, 1, generator=generator)], 1)
    return [bytes(row) for row in text_BT.tolist()]


def planted(text, domain, split):
    """Six documents per domain and split, for evaluate.held_out."""
    start = DOMAINS.index(domain) * 12 + (0 if split == "test" else 6)
    return tuple(text[start:start + 6])


def test_planted_source_transfers_and_noise_does_not(tmp_path, monkeypatch):
    """The target is a damaged copy of the source, the text the source's own: the source must help,
    noise must not."""
    truth = teacher()
    monkeypatch.setattr(scoring, "held_out", functools.partial(planted, samples(truth, 36)))
    target = write(tmp_path / "target.safetensors", noisy(truth, 0.4))
    sources = [write(tmp_path / "helps.safetensors", truth),
               write(tmp_path / "nothing.safetensors", noisy(truth, 1.0, 6))]
    grid = Grid(target, Codec.load("exact"))
    grid.measure_base(sources[0])
    for source in sources:
        grid.measure_source(source, source.stem, ["none"], "depth", (0.2, 0.5))
    grid.measure_controls(sources[0], (0.2, 0.5), 2)
    base, trip = grid.scores["base", "test"], grid.scores["round trip", "test"]
    np.testing.assert_allclose(pooled(trip), pooled(base), rtol=1e-4)       # the codec is exact
    rows = grid.rows({"few": None})
    results = records.Results(given={"figure4": rows})
    for source, word in (("helps", "holds"), ("nothing", "not reproduced")):
        row = sections.chosen(results, source)
        assert set(row["difference"]) == {"base", "zero", "noise", "shuffled"}
        assert row["difference"]["noise"]["se_seeds"] > 0 == row["difference"]["zero"]["se_seeds"]
        assert sections.cell_gain(row) == word
    # validation chooses, test reports, and no control is chosen
    assert {("validation" in row, bool(row["control"])) for row in rows} == {
        (True, False), (False, True)}


def test_a_cell_is_what_the_command_writes(zoo, tmp_path):
    """Encoding once and keeping the transport changes nothing: the tensors of merge.py's stream."""
    output = tmp_path / "merged.safetensors"
    for source, align, control, seed in (
            ("code", "none", None, 0), ("large", "none", None, 0), ("large", "gaussian", None, 0),
            ("large", "sinkhorn", None, 0), ("large", "gaussian", "noise", 3)):
        target, file = zoo / "base.safetensors", zoo / f"{source}.safetensors"
        grid = Grid(target, Codec.load("exact"))
        pairs = grid.pairs(file)
        transported = grid.transported(pairs, Alignment(align, control), seed)
        how = ["--control", control] if control else ["--align", align]
        merge.main([*map(str, (target, file)), "--lam", "0.3", *how, "--vae", "exact", "--seed",
                    str(seed), "--select", "self_attn|mlp", "-o", str(output), "--force", "--quiet"])
        written = load_file(output)
        assert set(written) == set(grid.tensors)
        for name, w in grid.model(pairs, transported, 0.3).state_dict().items():
            # equal but for the size of the codec's batches, which float32 sums see
            torch.testing.assert_close(w, written[name], rtol=1e-4, atol=1e-6)


def test_carried_noise_shows_what_sinkhorn_borrows(tmp_path):
    """The finding behind the fourth control: the plan finds, for each slot, what resembles it, in
    pure noise as well."""
    target = write(tmp_path / "target.safetensors", teacher(1))
    grid = Grid(target, Codec.load("exact"))
    noise = [pair._replace(source=grids.noise_parent(pair.source, generator_for(0, pair.number)))
             for pair in grid.pairs(target)]

    def likeness(align):
        found = grid.transported(noise, Alignment(align))
        return np.mean([torch.cosine_similarity(z.flatten(), pair.target.z_NZ.flatten(), 0).item()
                        for z, pair in zip(found, noise)])
    assert abs(likeness("mean")) < 0.03 and abs(likeness("gaussian")) < 0.03
    assert likeness("sinkhorn") > 0.1


def test_layers_one_off():
    assert grids.neighbours({0: 0, 1: None, 2: 4}, [0, 1, 2, 3, 4]) == {0: 1, 1: None, 2: 3}


def test_controls_are_of_the_same_lambda_and_source():
    grid = Grid.__new__(Grid)
    keys = [Cell("a", "sinkhorn", "depth", 0.1), Cell(lam=0.1, control="noise", seed=0),
            Cell(lam=0.1, control="noise", seed=1), Cell(lam=0.2, control="zero"),
            Cell("a", "sinkhorn", "depth", 0.1, "carried", 0),
            Cell("b", "sinkhorn", "depth", 0.1, "carried", 0)]
    grid.scores = {(key, "test"): BASE for key in keys}
    found = grid.controls(keys[0])
    assert {name: len(group["code"]) for name, group in found.items()} == {"noise": 2, "carried": 1}


# --- The tables of merges -------------------------------------------------------------------------
def test_noise_of_the_measured_size():
    """Draws that lie 0.3 and 0.4 of the norm away: root mean square 0.3536; the mean of 4 copies
    moves by half of that. Four random directions of 40,000 numbers are orthogonal to 1 / 200."""
    w = torch.ones(40_000)
    draws = [{"w": w * 1.3, "same": w}, {"w": w * 0.6, "same": w}]
    sizes = noise_sizes({"w": w, "same": w}, draws)
    assert sizes == {"w": pytest.approx(math.sqrt(0.125), rel=1e-6)}
    moved = noisy_copies({"w": w, "same": w}, sizes, 4, seed=0)
    assert moved["same"] is w
    relative = (moved["w"] - w).norm() / w.norm()
    assert relative.item() == pytest.approx(math.sqrt(0.125) / 2, rel=0.02)


def test_choice_is_by_validation_text(tmp_path, monkeypatch):
    sheet, asked = Sheet(tmp_path, tmp_path), []

    def scored(models, split="test"):
        asked.append(split)
        return {domain: np.array([models]) for domain in DOMAINS}
    monkeypatch.setattr(sheet, "scores", scored)
    candidates = [("a", [2.0, 3.0]), ("b", [1.0, 1.0]), ("c", [5.0, 0.0])]
    assert sheet.choose(candidates)[0] == "b" and set(asked) == {"validation"}


@pytest.fixture
def short(monkeypatch, zoo):
    """Every kind of row once: one pair, one value of each grid, two documents."""
    for name, value in {"DRAWS": {"r 1": (1, 2)}, "PAIRS": (("code", "arithmetic"),),
                        "TASK_LAMBDAS": (0.3,), "DENSITIES": (0.2,), "DROPS": (0.5,),
                        "SCALES": (0.4,), "PARTS": {"MLP": "mlp"}, "QUICK": 2}.items():
        monkeypatch.setattr(merging_tables, name, value)
    codecs = {"r 1": merging_tables.EXACT}
    monkeypatch.setattr(merging_tables, "CODECS", codecs)
    return zoo


def command(monkeypatch, capsys, *flags):
    """What paper_tables.py prints, quick and quiet."""
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", "--quick", "--quiet", "--seeds", "2",
                                      *map(str, flags)])
    paper_tables.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("table", "2346")
def test_tables_of_merges(table, short, tmp_path, monkeypatch, capsys):
    """By the command: an exact codec ties with weight space, whatever is merged."""
    seen = []
    monkeypatch.setattr(sections, "show", lambda view, results: seen.extend(view(results)[0]))
    command(monkeypatch, capsys, "--table", table, "--models", short, "--results", tmp_path / "r")
    assert json.dumps(seen, allow_nan=False) and not (tmp_path / "r").exists()
    assert len({row["row"] for row in seen}) == len(seen) > 5
    twins = [row["difference"]["weights"] for row in seen if "weights" in row["difference"]]
    assert len(twins) == {"2": 0, "3": 5, "4": 3, "6": 1}[table]
    for d in twins:
        assert d["verdict"] == "ties" and abs(d["mean"]) < 1e-4
    kinds = {row["kind"] for row in seen}
    assert kinds >= {"2": {"codec", "latent", "control"}, "3": {"weight", "latent"},
                     "4": {"codec", "weight"}, "6": {"control", "latent"}}[table]


def test_the_soup_in_weight_space_is_the_baselines(zoo, tmp_path):
    """Two implementations: merge.py's stream, and baselines.py's state dicts."""
    sheet = Sheet(zoo, tmp_path)
    names = ("code", "prose", "arithmetic")
    (merged,), report = sheet.merged(*map(sheet.file, names), "--operator", "soup")
    expected = merging_tables.soup([load_file(zoo / f"{name}.safetensors") for name in names])
    for name, w in merged.items():                                      # one rounding to float32
        torch.testing.assert_close(w.double(), expected[name], rtol=1e-6, atol=1e-8)
    assert report["space"] == "weight"


def test_a_model_cut_to_a_rank(zoo, tmp_path):
    """A difference of singular values 3 and 2, and eight of 1: rank 2 keeps the two."""
    sheet = Sheet(zoo, tmp_path)
    base, name = sheet.tensors("base"), "model.layers.0.self_attn.q_proj.weight"
    turn = torch.linalg.qr(torch.randn(32, 10, generator=generator_for(0))).Q
    sizes = torch.tensor([3.0, 2.0] + [1.0] * 8)
    cut = sheet.cut(base | {name: base[name] + turn * sizes @ turn.T}, rank=2)
    kept = (turn * sizes)[:, :2] @ turn[:, :2].T
    torch.testing.assert_close(cut[name] - base[name], kept, rtol=1e-4, atol=1e-4)


def test_figure_4_by_the_command(zoo, monkeypatch, capsys, tmp_path):
    """All sources but the relative: every cell, its controls, and few chunks."""
    monkeypatch.setattr(transfer_tables, "LAMBDAS", (0.1, 1.0))
    monkeypatch.setattr(transfer_tables, "QUICK", 2)
    monkeypatch.setattr(transfer_tables, "LONG", 128)
    printed = command(monkeypatch, capsys, "--figure", 4, "--models", zoo, "--source", "large",
                      "--source", "base-seed2", "--results", tmp_path)
    assert "large: gaussian, n < d" in printed and "base-seed2: plain average" in printed
    assert "chosen, minus" in printed and "nan" not in printed and not list(tmp_path.iterdir())


# --- Tables 7 and 8 -------------------------------------------------------------------------------
@pytest.fixture
def model(tmp_path):
    """Two tensors of 24 chunks of 16 weights, correlated and of different scale, and one that is
    not encoded."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=g)
    first, second = (torch.randn(24, 16, generator=g) @ mix for _ in range(2))
    save_file({"layers.0.mlp.up_proj.weight": first, "norm.weight": torch.ones(3),
               "layers.1.mlp.up_proj.weight": 0.1 * second + 0.2}, tmp_path / "m.safetensors")
    return tables.Model.open(tmp_path / "m.safetensors")


@pytest.mark.parametrize("Z", [1, 5, 16])
def test_pca_leaves_the_tail_of_the_singular_values(model, Z):
    raw = [model.file.read_tensor(stats.name).double().numpy() for stats in model.stats]
    x = np.concatenate([(w - w.mean()) / w.std() for w in raw])
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    way = tables.ThroughPCA(*tables.pca(model.chunks(16), Z))
    tensors, nmse, errors = model.rebuilt(way)
    assert nmse == pytest.approx((values[Z:] ** 2).sum() / x.size, rel=1e-6, abs=1e-12)
    assert nmse == pytest.approx(np.mean(list(errors.values())))        # equal sizes
    assert torch.equal(tensors["norm.weight"], torch.ones(3))


def test_noise_has_the_error_that_it_is_given(model):
    """384 draws: the mean of their squares is within 5 sqrt(2 / 384) = 36 % of each tensor's."""
    asked = {stats.name: nmse for stats, nmse in zip(model.stats, (0.5, 0.01))}
    _, _, found = model.rebuilt(tables.ThroughNoise(asked, seed=1))
    assert found == {name: pytest.approx(nmse, rel=0.36) for name, nmse in asked.items()}
    assert found != model.rebuilt(tables.ThroughNoise(asked, seed=2))[2]


def test_effective_ratio_counts_the_codec():
    assert tables.effective(2.0, 100, 0) == 0 or tables.effective(2.0, 100, 50) == 1
    assert tables.effective(4.0, 100, 75) == 1 and tables.effective(2.0, 100, None) is None


def test_table_7_on_a_few_documents(zoo, monkeypatch, capsys):
    """Untrained codecs; every method at every r, and nothing in a row but JSON."""
    monkeypatch.setattr(tables, "SCHEDULE", train.Schedule(steps1=0, steps2=0))
    monkeypatch.setattr(tables, "UNSEEN", ("base-seed2", "large"))
    rows = tables.measure_codec("7", zoo, quick=True, quiet=True)
    assert json.dumps(rows, allow_nan=False)
    found = {(row["ratio"], row["checkpoint"], row["method"]): row for row in rows}
    assert len(found) == len(rows) == 2 * 6             # the VAE at r = 1, five methods at r = 2
    for name in ("base-seed2", "large"):
        exact = found[1.0, name, "VAE"]
        vae, pca, own = (found[2.0, name, method] for method in ("VAE", "PCA", "PCA of its own"))
        assert exact["nmse"] < 1e-10 and abs(exact["difference"]["mean"]) < 1e-4
        assert vae["white_noise"] == 0.5
        assert own["nmse"] <= pca["nmse"] * (1 + 1e-3)
        # Untrained, the bottleneck is the family's basis, but for chunks held out.
        assert vae["nmse"] == pytest.approx(pca["nmse"], rel=0.05)
        gone = pca["test"]["pooled"] - pca["before"]["pooled"]
        assert pca["difference"]["mean"] == pytest.approx(gone)


# --- The ablation ---------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_distillation_adds_the_distance_to_stage_1(ratio):
    """The teacher is the network at the first batch of stage 2, and stays that."""
    config = VAEConfig(chunk=8, tokens=4, width=16, heads=2, ratio=ratio, beta=0.1)
    vae = VAE(config).start(generator_for(0))
    if ratio > 1:
        vae.set_bottleneck(torch.zeros(16), torch.eye(16))
    x = torch.randn(2, 4, 8, generator=generator_for(1))
    real = torch.ones(2, 4, 8, dtype=torch.bool)
    taught = vae.decode_stream(vae.encode_stream(x))
    if ratio <= 1:
        taught = vae.decode(vae.encode(x).mu_BTZ)
    distillation = curriculum.Distillation()
    for _ in range(2):
        found = distillation(vae, 2, x, real, generator_for(2))
        decoded = vae.decode(sample(vae.encode(x), generator_for(2)))
        plain = train.stage_loss(vae, 2, x, real, generator_for(2))
        expected = plain.total + (decoded - taught).square().mean() / 2
        torch.testing.assert_close(found.total, expected)
        torch.nn.init.normal_(vae.unembed.weight, generator=generator_for(3))
    first = distillation(vae, 1, x, real, None)
    torch.testing.assert_close(first, train.stage_loss(vae, 1, x, real, None))


def test_every_variant_has_the_same_compute():
    """Configurations and schedules exist; no two of all are the same."""
    for members in curriculum.VARIANTS.values():
        for name, (config, schedule, _) in members.items():
            plan = train.Schedule(**schedule)
            assert VAEConfig(**config).tokens * plan.batch == curriculum.CHUNKS
            if config.get("init") != "pca":
                assert plan.steps1 + plan.steps2 == curriculum.STEPS1 + curriculum.STEPS2, name
    flat = [json.dumps(one) for group in curriculum.VARIANTS.values() for one in group.values()]
    assert len(set(flat)) == len(flat)


def test_ablation_by_the_command(zoo, monkeypatch, capsys, tmp_path):
    """Two untrained variants: the first differs from itself by nothing, another r does."""
    still = {"steps1": 0, "steps2": 0}
    group = {"a": ({"init": "pca"}, still, False), "r 2": ({"init": "pca", "ratio": 2.0}, still, True)}
    monkeypatch.setattr(curriculum, "VARIANTS", {"r = 2": group})
    monkeypatch.setattr(curriculum, "QUICK", 2)
    printed = command(monkeypatch, capsys, "--ablation", "curriculum", "--models", zoo,
                      "--results", tmp_path)
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("| ")][1:]
    assert [row[1].strip() for row in rows] == ["**r = 2**", "a", "r 2"]
    nmse = [float(row[4]) for row in rows[1:]]      # on what they have not seen
    assert nmse[0] < 1e-10 and 0.3 < nmse[1] < 0.6
    assert float(rows[1][5]) == 0 and not list(tmp_path.iterdir())


def test_nothing_to_do_is_an_error(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, capsys)
    assert ended.value.code == 2
