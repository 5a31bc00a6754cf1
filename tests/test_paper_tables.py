"""The verdict's arithmetic by hand; planted cases in which it must say yes and no; what is merged
in a cell; the maps of coordinates.py."""
import functools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import coordinates
import grid as grids
import merge
import scores as scoring
from evaluate import DOMAINS, bits_per_byte
from grid import Grid
from lsmerge import Alignment, Codec
from scores import Difference, difference, judge, pooled
from tiny_lm import TinyLM


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
    text adds nothing. Exactly two standard errors are not more than two."""
    control = {domain: np.concatenate([v + 0.3, v + 0.9]) for domain, v in BASE.items()}
    d = difference(BASE, control)
    assert d.mean == pytest.approx(-0.6)
    assert d.se_seeds == pytest.approx(0.3) and d.se == pytest.approx(0.3)
    assert not d.better
    assert Difference(0, 0.3, 0.4).se == pytest.approx(0.5)


@pytest.mark.parametrize("gain, beats, said", [
    ({"base": 1, "zero": 1, "noise": 1}, True, "transfers"),
    ({"base": -1, "zero": 1, "noise": 1}, True, "not reproduced"),  # less harm than noise: no gain
    ({"base": 1, "zero": 1, "noise": 0}, False, "not reproduced"),  # every control, not most
    ({"base": 1}, False, "not reproduced")])                        # nothing to hold it against
def test_verdict(gain, beats, said):
    others = {}
    for name, value in gain.items():
        others[name] = {domain: v + value + np.linspace(-0.1, 0.1, v.shape[1])
                        for domain, v in BASE.items()}
    base = others.pop("base")
    found, beaten, verdict = judge(BASE, base, others)
    assert (beaten, verdict) == (beats, said) and set(found) == {"base", *others}


# --- Planted models -------------------------------------------------------------------------------
def teacher(seed=0, hidden=64, layers=2, scale=0.3):
    """A random model whose blocks matter: its own samples are the text, so that no other model
    predicts them better."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, w in TinyLM(hidden, layers, hidden // 32, 48).state_dict().items():
        drawn = torch.randn(w.shape, generator=generator) * scale if w.dim() > 1 else None
        tensors[name] = torch.ones_like(w) if drawn is None else drawn
    return tensors


@torch.no_grad()
def samples(tensors, count, length=48):
    lm, generator = TinyLM.from_state_dict(tensors), torch.Generator().manual_seed(1)
    text_BT = torch.randint(256, (count, 1), generator=generator)
    for _ in range(length):
        p = lm(text_BT)[:, -1].softmax(-1)
        text_BT = torch.cat([text_BT, torch.multinomial(p, 1, generator=generator)], 1)
    return [bytes(row) for row in text_BT.tolist()]


def noisy(tensors, share, seed=5):
    generator, result = torch.Generator().manual_seed(seed), dict(tensors)
    for name, w in tensors.items():
        if name.endswith("proj.weight"):
            noise = torch.randn(w.shape, generator=generator) * w.std()
            result[name] = (1 - share) * w + share * noise
    return result


def write(path, tensors):
    save_file({name: w.float().contiguous() for name, w in tensors.items()}, path)
    return path


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
        grid.measure_source(source, ("none",), "depth", (0.2, 0.5))
    grid.measure_controls(sources[0], (0.2, 0.5), 2)
    base, trip = grid.scores["base", "test"], grid.scores["round trip", "test"]
    np.testing.assert_allclose(pooled(trip), pooled(base), rtol=1e-4)       # the codec is exact
    verdicts = {}
    for source in ("helps", "nothing"):
        cell = grid.choose(source)
        controls = grid.controls(cell)
        seeds = {control: len(found["code"]) for control, found in controls.items()}
        assert seeds == {"zero": 1, "noise": 2, "shuffled": 2}
        verdicts[source] = judge(grid.scores[cell, "test"], base, controls)[2]
    assert verdicts == {"helps": "transfers", "nothing": "not reproduced"}
    said = [row["verdict"] for row in grids.records(grid, {})
            if row["row"] == "cell" and row["lam"] == 0.5]
    assert said == ["transfers", "not reproduced"]


def test_a_cell_is_what_the_command_writes(tmp_path):
    """Encoding once and keeping the transport changes nothing: the tensors of merge.py's stream."""
    target = write(tmp_path / "target.safetensors", teacher(1))
    source = write(tmp_path / "source.safetensors", teacher(2, hidden=96, layers=3))
    grid, output = Grid(target, Codec.load("exact")), tmp_path / "merged.safetensors"
    pairs = grid.pairs(source, "depth")
    for align, control, seed in (("none", None, 0), ("gaussian", None, 0), ("sinkhorn", None, 0),
                                 ("gaussian", "noise", 3)):
        transported = grid.transported(pairs, Alignment(align, control), seed)
        flags = ["--control", control] if control else []
        merge.main([*map(str, (target, source)), "--lam", "0.3", "--align", align, *flags, "--vae",
                    "exact", "--seed", str(seed), "-o", str(output), "--force", "--quiet"])
        written = load_file(output)
        assert set(written) == set(grid.tensors)
        for name, w in grid.model(pairs, transported, 0.3).state_dict().items():
            # equal but for the size of the codec's batches, which float32 sums see
            torch.testing.assert_close(w, written[name], rtol=1e-4, atol=1e-6)


def likeness(grid, pairs, how):
    """The mean cosine of what was transported and the target's own latents."""
    return np.mean([torch.cosine_similarity(z.flatten(), target.z_NZ.flatten(), 0).item()
                    for z, (_, target, _) in zip(grid.transported(pairs, how), pairs)])


def test_carried_noise_shows_what_sinkhorn_borrows(tmp_path):
    """The finding behind the fourth control: the plan finds, for each slot, what resembles it, in
    pure noise as well."""
    target = write(tmp_path / "target.safetensors", teacher(1))
    grid = Grid(target, Codec.load("exact"))
    noise = [(number, mine, grids.noise_parent(theirs, torch.Generator().manual_seed(0)))
             for number, mine, theirs in grid.pairs(target, "depth")]
    assert abs(likeness(grid, noise, Alignment("mean"))) < 0.03
    assert abs(likeness(grid, noise, Alignment("gaussian"))) < 0.03
    assert likeness(grid, noise, Alignment("sinkhorn")) > 0.1


# --- The maps of coordinates.py -------------------------------------------------------------------
def disguised(tensors, seed=3, heads=2, units=48):
    """The same function in other coordinates: stream rotated, units permuted and flipped, heads
    permuted and turned."""
    generator, layers = torch.Generator().manual_seed(seed), {}
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    shuffle = functools.partial(torch.randperm, generator=generator)
    for number in range(2):
        layers[number] = coordinates.LayerMap(
            units=shuffle(units), signs=draw(units).sign(), heads=shuffle(heads),
            values=torch.linalg.qr(draw(heads, 32, 32)).Q, phases=draw(heads, 16))
    hidden = tensors["model.embed_tokens.weight"].shape[1]
    mapping = coordinates.Map(torch.linalg.qr(draw(hidden, hidden)).Q, layers, [0, 1])
    return coordinates.carried(tensors, mapping)


@pytest.mark.parametrize("points", ["weights", "text"])
def test_a_disguised_model_is_recovered(points):
    """Every freedom the map claims, used at once and undone: the target's own weights come back."""
    target = coordinates.folded(teacher(4))
    text = torch.randint(256, (24, 64), generator=torch.Generator().manual_seed(0))
    source = disguised(target)
    mapping = coordinates.fit(target, source, text if points == "text" else None)
    result = coordinates.cut(coordinates.carried(source, mapping), mapping, target)
    assert len(result) == 2 * 7
    for name, w in result.items():                # float32 activations under the fit by text
        torch.testing.assert_close(w, target[name], rtol=1e-6,
                                   atol=1e-6 if points == "weights" else 2e-3)


def test_the_map_keeps_the_sources_function():
    """Other depth, other width, no kinship: whatever the fit chose, the whole source must still
    compute the same."""
    target, source = teacher(4), teacher(5, hidden=96, layers=3)
    source |= {name: torch.linspace(0.5, 2, len(w)) for name, w in source.items()
               if w.dim() == 1}                                     # gains that matter
    target, source = coordinates.folded(target), coordinates.folded(source)
    documents = [bytes(range(start, start + 60)) for start in (0, 60, 120)]
    before, after = coordinates.own_loss(source, coordinates.fit(target, source), documents)
    assert after == pytest.approx(before, rel=1e-5)


def test_a_flip_without_its_partner_is_another_function():
    """What the check of the map is there to see."""
    intact, broken = (disguised(coordinates.folded(teacher(4))) for _ in range(2))
    broken["model.layers.0.mlp.up_proj.weight"][0] *= -1
    documents = [bytes(range(start, start + 60)) for start in (0, 60, 120)]
    losses = [bits_per_byte(coordinates.Untied(tensors, tensors["model.embed_tokens.weight"]),
                            documents).mean() for tensors in (intact, broken)]
    assert abs(losses[0] - losses[1]) > 1e-3
