"""Tables 7 and 8 and the ablation: PCA against numpy's SVD, noise and statistics by hand, replaced parts against their formulas."""
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
from chunking import TensorSlot, place
from conftest import ROOT
from vae import VAEConfig

MODELS = ROOT / "experiments" / "models"


@pytest.fixture
def model(tmp_path):
    """Two tensors of 24 chunks of 16 weights, correlated and of different scale, and one that is not encoded."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=g)
    save_file({"layers.0.mlp.up_proj.weight": torch.randn(24, 16, generator=g) @ mix, "norm.weight": torch.ones(3),
               "layers.1.mlp.up_proj.weight": 0.1 * torch.randn(24, 16, generator=g) @ mix + 0.2}, tmp_path / "m.safetensors")
    return tables.Model.open(tmp_path / "m.safetensors")


def standardised(model):
    raw = [model.file.read_tensor(slot.name).double().numpy() for slot in model.slots]
    return [(w - w.mean()) / w.std() for w in raw]


@pytest.mark.parametrize("Z", [1, 5, 16])
def test_pca_leaves_the_tail_of_the_singular_values(model, Z):
    x = np.concatenate(standardised(model))
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    tensors, nmse, errors = model.rebuilt(tables.ThroughPCA(*tables.pca(model.chunks(16), Z)))
    assert nmse == pytest.approx((values[Z:] ** 2).sum() / x.size, rel=1e-6, abs=1e-12)
    assert nmse == pytest.approx(np.mean(list(errors.values())))                     # equal sizes
    assert torch.equal(tensors["norm.weight"], torch.ones(3))
    if Z == 16:
        torch.testing.assert_close(tensors[model.slots[1].name], model.file.read_tensor(model.slots[1].name))


def test_noise_has_the_error_that_it_is_given(model):
    """768 draws: the mean of their squares is within 5 sqrt(2 / 384) = 36 % of each tensor's."""
    asked = {slot.name: nmse for slot, nmse in zip(model.slots, (0.5, 0.01))}
    _, _, found = model.rebuilt(tables.ThroughNoise(asked, seed=1))
    assert found == {name: pytest.approx(nmse, rel=0.36) for name, nmse in asked.items()}
    assert found != model.rebuilt(tables.ThroughNoise(asked, seed=2))[2]


def test_effective_ratio_counts_the_codec():
    assert tables.effective(2.0, 100, 0) == 2 and tables.effective(2.0, 100, 50) == 1 and tables.effective(4.0, 100, 75) == 1


@pytest.mark.parametrize("table, names", [("8", tables.FAMILY), ("7", tables.UNSEEN)])
def test_tables_on_a_few_documents(table, names, monkeypatch, capsys):
    """Untrained codecs; every method at every r, and nothing in a record but JSON."""
    monkeypatch.setattr(tables, "train_vae", functools.partial(train.train_vae, schedule=train.Schedule(steps1=0, steps2=0)))
    rows = tables.measure_codec(table, MODELS, quick=True, quiet=True)
    tables.print_codec(table, rows)
    out = capsys.readouterr().out
    assert json.dumps(rows, allow_nan=False) and all(name in out for name in names)
    methods = {(row["ratio"], row["checkpoint"], row["method"]): row for row in rows}
    assert len(methods) == len(rows) == len(names) * 6                               # VAE at r = 1, five methods at r = 2
    for name in names:
        exact, vae, pca, own = (methods[key] for key in ((1.0, name, "VAE"), *((2.0, name, m) for m in ("VAE", "PCA", "PCA of its own"))))
        assert exact["nmse"] < 1e-10 and abs(exact["difference"]["mean"]) < 1e-4 and vae["white_noise"] == 0.5
        assert own["nmse"] <= pca["nmse"] * (1 + 1e-3)                                # the family's basis is fitted on more than this model
        assert vae["nmse"] < 0.7 * pca["nmse"] if table == "8" else vae["nmse"] < 1.02 * pca["nmse"]
        assert pca["difference"]["mean"] == pytest.approx(pca["test"]["pooled"] - pca["before"]["pooled"])


# --- curriculum.py ----------------------------------------------------------------------------------------------------
def test_companding_by_hand():
    slot = TensorSlot("w", (3,), torch.float32, 0.5, 2.0, place("w"))
    flat = torch.tensor([0.5, 6.5, -1.5], dtype=torch.float64)                       # standardised: 0, 3, -1
    y = curriculum.companded(flat, slot)
    np.testing.assert_allclose(y, np.array([0, np.log(4), -np.log(2)]) / curriculum.SPREAD, rtol=1e-6)
    np.testing.assert_allclose(curriculum.expanded(y, slot), flat, rtol=1e-6)
    x = np.random.default_rng(0).standard_normal(400_000)
    assert (np.sign(x) * np.log1p(abs(x))).std() == pytest.approx(curriculum.SPREAD, abs=0.002)


def test_one_scale_is_that_of_all_weights_together(model):
    every = np.concatenate([model.file.read_tensor(s.name).double().numpy().ravel() for s in model.slots])
    for slot in curriculum.slots_of(model, "one scale"):
        assert (slot.mean, slot.scale) == (pytest.approx(every.mean()), pytest.approx(every.std()))


SMALL = dict(chunk=8, tokens=4, width=16, blocks=1, heads=2, init="random")


def test_a_pooled_code_sees_the_whole_window_but_no_padding():
    net = curriculum.PooledVAE(VAEConfig(**SMALL, ratio=2.0), torch.Generator().manual_seed(0))
    x, real = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)), torch.ones(2, 4, dtype=torch.bool)
    z = net.encode(x, real).mu_BTZ
    assert z.shape == (2, 4, 4) and net.decode(z, real).shape == x.shape
    no_blocks = curriculum.PooledVAE(VAEConfig(**SMALL | {"blocks": 0}, ratio=2.0), torch.Generator().manual_seed(0))
    moved = no_blocks.encode(x + torch.tensor([0, 0, 1.0, 0])[:, None], real).mu_BTZ - no_blocks.encode(x, real).mu_BTZ
    assert (moved.abs() > 1e-6).all()                      # without attention: the pooling alone carries a chunk everywhere
    real[1, 3] = False
    torch.testing.assert_close(*(net.encode(torch.where(real[..., None], x, junk), real).mu_BTZ for junk in (0.0, 9.0)), rtol=1e-5, atol=1e-6)


def test_huber_by_hand():
    x, real = torch.tensor([[[0.0, 0.5, 3.0, 7.0]]]), torch.tensor([[[True, True, True, False]]])
    class Zero:                                            # decodes everything to 0: the errors are x itself
        config = VAEConfig()
        encode_stream = decode_stream = lambda self, x_BTC, real_BT: torch.zeros_like(x_BTC)
    loss = curriculum.huber_loss(Zero(), None, 1, (x, real, None), 0.0, None)[0]
    assert loss.item() == pytest.approx((0 + 0.125 + 2.5) / 3)


def test_every_variant_is_a_codec():
    """Configurations and schedules exist; the first of a group is what it is held against; no two are the same."""
    groups = curriculum.variants()
    for members in groups.values():
        for config, schedule, _ in members.values():
            plan, still = train.Schedule(**schedule), config.get("init") != "random"
            assert VAEConfig(**config).tokens * plan.batch == 512 and (still or plan.steps1 + plan.steps2 == 600)      # equal compute
    flat = [json.dumps(variant) for members in groups.values() for variant in members.values()]
    assert len(set(flat)) == len(flat)


def test_ablation_on_a_few_documents(monkeypatch, capsys, tmp_path):
    """Two untrained variants through the command: equal codecs differ by nothing, another r does."""
    still = dict(steps1=0, steps2=0)
    monkeypatch.setattr(curriculum, "variants", lambda: {"g": {"a": ({}, still, None), "r 2": (dict(ratio=2.0), still, "one scale")}})
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", "--ablation", "curriculum", "--quick", "--quiet", "--results", str(tmp_path)])
    paper_tables.main()
    out = capsys.readouterr().out.splitlines()
    assert out[-2].endswith("+0.0000 ± 0.0000") and float(out[-1].split()[-3]) > 1 and not list(tmp_path.iterdir())
