"""The verdict's arithmetic by hand; planted cases in which it must say yes and no; the maps of coordinates.py."""
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import coordinates
import grid as grids
import scores as scoring
from chunking import Checkpoint
from lsmerge import Alignment, Codec
from merge import Job, measure_slots, merge_tensor, plan_merge
from evaluate import DOMAINS, bits_per_byte
from grid import Cell, Grid
from scores import Difference, difference, judge, pooled
from tiny_lm import TinyLM
from vae import VAE, VAEConfig


def scores(code, prose, arithmetic):
    return {d: np.array(v, dtype=float) for d, v in zip(DOMAINS, (code, prose, arithmetic))}


BASE = scores([[1, 2, 3]], [[2, 2, 2]], [[5, 4]])


def test_difference_by_hand():
    ours = scores([[1.1, 2.2, 3.3]], [[2, 2, 2.3]], [[5.3, 4.3]])
    d = difference(ours, BASE)
    # code: 0.1, 0.2, 0.3, mean 0.2, variance 0.01; prose: 0, 0, 0.3, mean 0.1, variance 0.03; arithmetic: 0.3 twice
    assert d.mean == pytest.approx((0.2 + 0.1 + 0.3) / 3)          # equal weight per domain, though one has fewer documents
    assert d.se_text == pytest.approx(math.sqrt(0.01 / 3 + 0.03 / 3 + 0) / 3) and d.se_seeds == 0
    only = difference(ours, BASE, ("prose",))
    assert (only.mean, only.se_text) == (pytest.approx(0.1), pytest.approx(0.1))


def test_seeds_enter_the_error():
    """Two seeds 0.3 and 0.9 above the base everywhere: mean 0.6, and SE_seeds = sd / sqrt(2) = 0.3; text adds nothing."""
    control = {d: np.concatenate([v + 0.3, v + 0.9]) for d, v in BASE.items()}
    d = difference(BASE, control)
    assert d.mean == pytest.approx(-0.6) and d.se_seeds == pytest.approx(0.3) and d.se == pytest.approx(0.3)
    assert not d.better                                            # exactly two standard errors are not more than two
    assert Difference(0, 0.3, 0.4).se == pytest.approx(0.5)


@pytest.mark.parametrize("gain, beats, verdict", [
    ({"base": 1, "zero": 1, "noise": 1}, True, "transfers"),
    ({"base": -1, "zero": 1, "noise": 1}, True, "not reproduced"),     # less harm than noise is no transfer
    ({"base": 1, "zero": 1, "noise": 0}, False, "not reproduced"),     # every control, not most
    ({"base": 1}, False, "not reproduced")])                           # nothing to hold it against
def test_verdict(gain, beats, verdict):
    others = {name: {d: v + value + np.linspace(-0.1, 0.1, v.shape[1]) for d, v in BASE.items()} for name, value in gain.items()}
    base = others.pop("base")
    found, beaten, said = judge(BASE, base, others)
    assert (beaten, said) == (beats, verdict) and set(found) == {"base", *others}


# --- Planted models -----------------------------------------------------------------------------------------------
def teacher(seed=0, hidden=64, layers=2, scale=0.3):
    """A random model whose blocks matter: its own samples are the text, so that no other model predicts them better."""
    generator = torch.Generator().manual_seed(seed)
    lm = TinyLM(hidden, layers, hidden // 32, 48)
    return {name: torch.ones_like(w) if w.dim() == 1 else torch.randn(w.shape, generator=generator) * scale
            for name, w in lm.state_dict().items()}


@torch.no_grad()
def samples(tensors, count, length=48):
    lm, generator = TinyLM.from_state_dict(tensors), torch.Generator().manual_seed(1)
    text_BT = torch.randint(256, (count, 1), generator=generator)
    for _ in range(length):
        p = lm(text_BT)[:, -1].softmax(-1)
        text_BT = torch.cat([text_BT, torch.multinomial(p, 1, generator=generator)], 1)
    return [bytes(row) for row in text_BT.tolist()]


def noisy(tensors, share, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {name: (1 - share) * w + share * torch.randn(w.shape, generator=generator) * w.std() if name.endswith("proj.weight") else w
            for name, w in tensors.items()}


def exact_codec():
    """r = 1 without blocks, its neck set by hand: train_vae would first import the optimiser for some seconds."""
    vae = VAE(VAEConfig(blocks=0), torch.Generator().manual_seed(0))
    vae.set_neck(torch.zeros(vae.config.width), vae.embed.weight @ vae.embed.weight.T)
    return Codec(vae)


def write(path, tensors):
    save_file({name: w.float().contiguous() for name, w in tensors.items()}, path)
    return path


def test_planted_source_transfers_and_noise_does_not(tmp_path, monkeypatch):
    """The target is a damaged copy of the source, the text the source's own: the source must help, noise must not."""
    truth = teacher()
    text = samples(truth, 36)
    monkeypatch.setattr(scoring, "held_out", lambda domain, split: tuple(
        text[DOMAINS.index(domain) * 12 + (0 if split == "test" else 6):][:6]))
    target = write(tmp_path / "target.safetensors", noisy(truth, 0.4))
    sources = [write(tmp_path / "helps.safetensors", truth), write(tmp_path / "nothing.safetensors", noisy(truth, 1.0, 6))]
    grid = Grid(target, exact_codec())
    grid.measure_base(sources[0])
    for source in sources:
        grid.measure_source(source, ("none",), "depth", (0.2, 0.5))
    grid.measure_controls(sources[0], (0.2, 0.5), 2)
    base = grid.scores["base", "test"]
    np.testing.assert_allclose(pooled(grid.scores["round trip", "test"]), pooled(base), rtol=1e-4)   # the codec is exact
    verdicts = {}
    for source in ("helps", "nothing"):
        cell = grid.choose(source)
        controls = grid.controls(cell)
        assert {c: len(s["code"]) for c, s in controls.items()} == {"zero": 1, "noise": 2, "shuffled": 2}
        verdicts[source] = judge(grid.scores[cell, "test"], base, controls)[2]
    assert verdicts == {"helps": "transfers", "nothing": "not reproduced"}
    rows = grids.records(grid, {})
    assert [r["verdict"] for r in rows if r["row"] == "cell" and r["lam"] == 0.5] == ["transfers", "not reproduced"]


def test_a_cell_is_what_the_command_writes(tmp_path):
    """Encoding once and keeping the transport changes nothing: the same tensors as merge.py's own stream."""
    target = write(tmp_path / "target.safetensors", teacher(1))
    source = write(tmp_path / "source.safetensors", teacher(2, hidden=96, layers=3))
    codec = exact_codec()
    grid, files = Grid(target, codec), [Checkpoint(target), Checkpoint(source)]
    tasks = measure_slots(plan_merge(files[0], files[1:], align="mean")[2], files[0], files[1:])
    pairs = grid.pairs(source, "depth")
    for how, seed in ((Alignment("none"), 0), (Alignment("gaussian"), 0), (Alignment("sinkhorn"), 0), (Alignment(control="noise"), 3)):
        mine = grid.model(pairs, grid.transported(pairs, how, seed), 0.3).state_dict()
        job = Job(files[0], files[1:], tasks, [0.3], how=how, seed=seed)
        def put(name, start, piece):
            # equal but for the size of the codec's batches, which float32 sums see
            torch.testing.assert_close(mine[name].reshape(-1)[start:start + len(piece)], piece, rtol=1e-4, atol=1e-6)
        for number in range(len(tasks)):
            merge_tensor(job, [codec, codec], number, put)


def test_carried_noise_shows_what_sinkhorn_borrows(tmp_path):
    """The finding behind the fourth control: the plan finds, for each slot, what resembles it, in pure noise as well."""
    target = write(tmp_path / "target.safetensors", teacher(1))
    grid = Grid(target, exact_codec())
    pairs = grid.pairs(target, "depth")
    noise = [(n, t, grids.noise_parent(s, torch.Generator().manual_seed(0))) for n, t, s in pairs]
    cosine = lambda how: np.mean([torch.cosine_similarity(z.flatten(), t.z_NZ.flatten(), 0).item()
                                  for z, (_, t, _) in zip(grid.transported(noise, how), noise)])
    assert abs(cosine(Alignment("mean"))) < 0.03 and abs(cosine(Alignment("gaussian"))) < 0.03
    assert cosine(Alignment("sinkhorn")) > 0.1


# --- The maps of coordinates.py --------------------------------------------------------------------------------
def disguised(tensors, seed=3):
    """The same function in other coordinates: stream rotated, units permuted and flipped, heads permuted and turned."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    hidden, heads, units = tensors["model.embed_tokens.weight"].shape[1], 2, 48
    layers = {i: coordinates.LayerMap(torch.randperm(units, generator=generator), draw(units).sign(),
                                           torch.randperm(heads, generator=generator), torch.linalg.qr(draw(heads, 32, 32)).Q, draw(heads, 16))
              for i in range(2)}
    mapping = coordinates.Map(torch.linalg.qr(draw(hidden, hidden)).Q, layers, [0, 1])
    return coordinates.carried(tensors, mapping), mapping


@pytest.mark.parametrize("points", ["weights", "text"])
def test_a_disguised_model_is_recovered(points):
    """Every freedom the map claims, used at once and undone: the target's own weights come back."""
    target = coordinates.folded(teacher(4))
    text = torch.randint(256, (24, 64), generator=torch.Generator().manual_seed(0)) if points == "text" else None
    source, _ = disguised(target)
    mapping = coordinates.fit(target, source, text)
    result = coordinates.cut(coordinates.carried(source, mapping), mapping, target)
    for name, w in result.items():                                # float32 activations under the fit by text
        torch.testing.assert_close(w, target[name], rtol=1e-6, atol=1e-6 if text is None else 2e-3)


def test_the_map_keeps_the_sources_function():
    """Other depth, other width, no kinship: whatever the fit chose, the whole source must still compute the same."""
    target, source = teacher(4), teacher(5, hidden=96, layers=3)
    source |= {name: torch.linspace(0.5, 2, len(w)) for name, w in source.items() if w.dim() == 1}     # gains that matter
    target, source = coordinates.folded(target), coordinates.folded(source)
    documents = [bytes(range(start, start + 60)) for start in (0, 60, 120)]
    before, after = coordinates.own_loss(source, coordinates.fit(target, source), documents)
    assert after == pytest.approx(before, rel=1e-5)
    broken, mapping = disguised(coordinates.folded(teacher(4)))
    broken["model.layers.0.mlp.up_proj.weight"][0] *= -1           # a flip without its partner is another function
    head = broken["model.embed_tokens.weight"]
    loss = lambda tensors: bits_per_byte(coordinates.Untied(tensors, head), documents).mean()
    intact, _ = disguised(coordinates.folded(teacher(4)))
    assert abs(loss(broken) - loss(intact)) > 1e-3
