"""Tables 7 and 8 and the ablation: PCA against numpy's SVD, noise and statistics by hand, replaced
parts against their formulas."""
import dataclasses
import functools
import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import codec_tables as tables
import curriculum
import paper_tables
import train
from conftest import ROOT
from vae import VAE, VAEConfig, sample

MODELS = ROOT / "experiments" / "models"


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


def raw(model):
    return [model.file.read_tensor(slot.name).double().numpy() for slot in model.slots]


@pytest.mark.parametrize("Z", [1, 5, 16])
def test_pca_leaves_the_tail_of_the_singular_values(model, Z):
    x = np.concatenate([(w - w.mean()) / w.std() for w in raw(model)])
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    way = tables.ThroughPCA(*tables.pca(model.chunks(16), Z))
    tensors, nmse, errors = model.rebuilt(way)
    assert nmse == pytest.approx((values[Z:] ** 2).sum() / x.size, rel=1e-6, abs=1e-12)
    assert nmse == pytest.approx(np.mean(list(errors.values())))        # equal sizes
    assert torch.equal(tensors["norm.weight"], torch.ones(3))
    if Z == 16:
        name = model.slots[1].name
        torch.testing.assert_close(tensors[name], model.file.read_tensor(name))


def test_noise_has_the_error_that_it_is_given(model):
    """384 draws: the mean of their squares is within 5 sqrt(2 / 384) = 36 % of each tensor's."""
    asked = {slot.name: nmse for slot, nmse in zip(model.slots, (0.5, 0.01))}
    _, _, found = model.rebuilt(tables.ThroughNoise(asked, seed=1))
    assert found == {name: pytest.approx(nmse, rel=0.36) for name, nmse in asked.items()}
    assert found != model.rebuilt(tables.ThroughNoise(asked, seed=2))[2]


def test_effective_ratio_counts_the_codec():
    assert tables.effective(2.0, 100, 0) == 2
    assert tables.effective(2.0, 100, 50) == 1 and tables.effective(4.0, 100, 75) == 1


@pytest.mark.parametrize("table, names", [("7", tables.UNSEEN[:2])])
def test_tables_on_a_few_documents(table, names, monkeypatch, capsys):
    """Untrained codecs; every method at every r, and nothing in a record but JSON."""
    untrained = functools.partial(train.Schedule, steps1=0, steps2=0)
    monkeypatch.setattr(tables, "Schedule", untrained)
    monkeypatch.setattr(tables, "UNSEEN", tables.UNSEEN[:2])    # the small ones
    rows = tables.measure_codec(table, MODELS, quick=True, quiet=True)
    tables.print_codec(table, rows)
    printed = capsys.readouterr().out
    assert json.dumps(rows, allow_nan=False) and all(name in printed for name in names)
    found = {(row["ratio"], row["checkpoint"], row["method"]): row for row in rows}
    # The VAE at r = 1, five methods at r = 2.
    assert len(found) == len(rows) == len(names) * 6
    for name in names:
        exact = found[1.0, name, "VAE"]
        vae, pca, own = (found[2.0, name, method] for method in ("VAE", "PCA", "PCA of its own"))
        assert exact["nmse"] < 1e-10 and abs(exact["difference"]["mean"]) < 1e-4
        assert vae["white_noise"] == 0.5
        # The family's basis is fitted on more than this model.
        assert own["nmse"] <= pca["nmse"] * (1 + 1e-3)
        # Untrained, the VAE's one neck is the family's basis, but for chunks held out.
        assert vae["nmse"] == pytest.approx(pca["nmse"], rel=0.02)
        gone = pca["test"]["pooled"] - pca["before"]["pooled"]
        assert pca["difference"]["mean"] == pytest.approx(gone)


# --- curriculum.py --------------------------------------------------------------------------------
def test_companding_by_hand(model):
    """Standardised: 0, 3, -1."""
    slot = dataclasses.replace(model.slots[0], mean=0.5, scale=2.0)
    flat = torch.tensor([0.5, 6.5, -1.5])
    y = curriculum.companded(flat, slot)
    expected = np.array([0, np.log(4), -np.log(2)]) / curriculum.SPREAD
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    np.testing.assert_allclose(curriculum.expanded(y, slot), flat, rtol=1e-6)
    x = np.random.default_rng(0).standard_normal(400_000)
    spread = (np.sign(x) * np.log1p(abs(x))).std()
    assert spread == pytest.approx(curriculum.SPREAD, abs=0.002)


def test_one_scale_is_that_of_all_weights_together(model):
    every = np.concatenate([w.ravel() for w in raw(model)])
    for slot in curriculum.slots_of(model, "one scale"):
        assert slot.mean == pytest.approx(every.mean())
        assert slot.scale == pytest.approx(every.std())
    assert curriculum.slots_of(model, None) is model.slots


SMALL = dict(chunk=8, tokens=4, width=16, blocks=1, heads=2, init="random")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_pooled_code_sees_the_whole_window_but_no_padding():
    net = curriculum.PooledVAE(VAEConfig(**SMALL, ratio=2.0), seeded())
    x, real = torch.randn(2, 4, 8, generator=seeded(1)), torch.ones(2, 4, dtype=torch.bool)
    z = net.encode(x, real).mu_BTZ
    assert z.shape == (2, 4, 4) and net.decode(z, real).shape == x.shape
    # Without attention: the pooling alone carries a chunk everywhere.
    flat = curriculum.PooledVAE(VAEConfig(**SMALL | {"blocks": 0}, ratio=2.0), seeded())
    third = torch.tensor([0, 0, 1.0, 0])[:, None]
    moved = flat.encode(x + third, real).mu_BTZ - flat.encode(x, real).mu_BTZ
    assert (moved.abs() > 1e-6).all()
    real[1, 3] = False
    codes = [net.encode(torch.where(real[..., None], x, junk), real).mu_BTZ for junk in (0.0, 9.0)]
    torch.testing.assert_close(*codes, rtol=1e-5, atol=1e-6)


def test_huber_by_hand():
    """Everything is decoded to 0: the errors are x itself, 0, 1/2 (squared: 0.125) and 3 (2.5)."""
    class Zero:
        config = VAEConfig()

        def encode_stream(self, x_BTC, real_BT):
            return torch.zeros_like(x_BTC)
        decode_stream = encode_stream
    x = torch.tensor([[[0.0, 0.5, 3.0, 7.0]]])
    real = torch.tensor([[[True, True, True, False]]])
    loss = curriculum.huber_loss(Zero(), 1, x, real, None)[0]
    assert loss.item() == pytest.approx((0 + 0.125 + 2.5) / 3)


def test_distillation_adds_the_distance_to_stage_1():
    """The teacher is the network at the first batch of stage 2, and stays that."""
    vae = VAE(VAEConfig(**SMALL, ratio=2.0, beta=0.1), seeded())
    vae.set_neck(torch.zeros(16), torch.eye(16))
    x, real = torch.randn(2, 4, 8, generator=seeded(1)), torch.ones(2, 4, 8, dtype=torch.bool)
    taught, distillation = vae.decode_stream(vae.encode_stream(x)), curriculum.Distillation()
    for _ in range(2):
        found = distillation(vae, 2, x, real, seeded(2))
        decoded = vae.decode(sample(vae.encode(x), seeded(2)))
        plain = train.stage_loss(vae, 2, x, real, seeded(2))
        expected = plain[0] + (decoded - taught).square().mean() / 2
        torch.testing.assert_close(found[0], expected)
        torch.nn.init.normal_(vae.unembed.weight, generator=seeded(3))
    first = distillation(vae, 1, x, real, None)
    torch.testing.assert_close(first, train.stage_loss(vae, 1, x, real, None))


def test_every_variant_is_a_codec():
    """Configurations and schedules exist; equal compute; no two of all are the same."""
    groups = curriculum.variants()
    for members in groups.values():
        for config, schedule, _ in members.values():
            plan, still = train.Schedule(**schedule), config.get("init") != "random"
            assert VAEConfig(**config).tokens * plan.batch == 512
            assert still or plan.steps1 + plan.steps2 == 800
    flat = [json.dumps(variant) for members in groups.values() for variant in members.values()]
    assert len(set(flat)) == len(flat)


def test_ablation_on_a_few_documents(monkeypatch, capsys, tmp_path):
    """Two untrained variants, by the command: equal codecs differ by nothing, another r does."""
    still = dict(steps1=0, steps2=0)
    group = {"a": ({}, still, None), "r 2": (dict(ratio=2.0), still, "one scale")}
    monkeypatch.setattr(curriculum, "variants", lambda: {"g": group})
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", "--ablation", "curriculum", "--quick",
                                      "--quiet", "--results", str(tmp_path)])
    paper_tables.main()
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.endswith("+0.0000 ± 0.0000") and float(second.split()[-3]) > 1
    assert not list(tmp_path.iterdir())
