"""vae.py: the loss against torch.distributions, the attention against plain loops, the warm start against Eckart-Young."""
import json
import math
from dataclasses import asdict
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch.distributions import Independent, Normal, kl_divergence as torch_kl

import vae as v
from align import Moments

SMALL = dict(chunk=8, tokens=4, width=16, blocks=2, heads=2)      # small for testing


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def windows(B=6, T=4, C=8, seed=0):
    """Correlated chunks with padding: the last window has one half-filled and one empty chunk."""
    g = generator(seed)
    x = torch.randn(B, T, C, generator=g) @ torch.randn(C, C, generator=g)
    real = torch.ones(B, T, C, dtype=torch.bool)
    real[-1, -2, 3:] = real[-1, -1] = False
    return x * real, real


def warm(ratio, x, real, **options):
    """A VAE that starts from the statistics of x."""
    net = v.VAE(v.VAEConfig(**SMALL | {"ratio": ratio} | options), generator())
    h = net.encode_stream(x, real.any(-1))[real.any(-1)].detach().double()
    net.set_neck(h.mean(0).float(), torch.cov(h.T, correction=0))
    return net


def test_kl_against_torch_distributions():
    x, real = windows()
    posterior = v.Posterior(*torch.randn(2, 6, 4, 5, generator=generator()).unbind())
    q = Normal(posterior.mu_BTZ, (posterior.logvar_BTZ / 2).exp())
    expected = torch_kl(q, Normal(torch.zeros(5), torch.ones(5)))[real.any(-1)].mean()
    torch.testing.assert_close(v.kl_divergence(posterior, real.any(-1)), expected, rtol=1e-5, atol=0)


def test_loss_is_eq_1_per_weight():
    """-log p(w | z) of a unit Gaussian, less its constant, plus beta KL in nats, over the number of real weights."""
    x, real = windows()
    decoded = torch.randn(x.shape, generator=generator(1))
    posterior = v.Posterior(*torch.randn(2, 6, 4, 2, generator=generator(2)).unbind())
    logp = Normal(decoded, 1.0).log_prob(x) + math.log(2 * math.pi) / 2
    kl = torch_kl(Independent(Normal(posterior.mu_BTZ, (posterior.logvar_BTZ / 2).exp()), 1), Independent(Normal(torch.zeros(2), 1.0), 1))
    full = real.all(-1)                                    # whole chunks only: then r weights per latent number exactly
    expected = (-(logp[full].sum()) + 0.3 * kl[full].sum()) / (full.sum() * 8)
    loss = v.vae_loss(decoded, posterior, x, full[..., None].expand_as(x), beta=0.3, ratio=4.0)
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("init", ["pca", "random"])
def test_padding_changes_neither_codes_nor_loss_nor_gradients(init):
    x, real = windows()
    net = v.VAE(v.VAEConfig(**SMALL, init=init), generator())
    for block in [*net.encoder, *net.decoder]:             # let every branch speak
        torch.nn.init.normal_(block.out.weight, std=0.3, generator=generator(1))
        torch.nn.init.normal_(block.down.weight, std=0.3, generator=generator(2))
    results = []
    for garbage in (0.0, 1e3):
        dirty = torch.where(real.any(-1, keepdim=True), x, garbage)
        net.zero_grad()
        posterior = net.encode(dirty, real.any(-1))
        loss = v.vae_loss(net.decode(posterior.mu_BTZ, real.any(-1)), posterior, x, real, 0.1, 1.0)
        loss.total.backward()
        results.append([loss.total.detach(), posterior.mu_BTZ[real.any(-1)], net.encoder[0].qkv.weight.grad.clone()])
    for clean, dirty in zip(*results):
        torch.testing.assert_close(clean, dirty, rtol=1e-5, atol=1e-6)      # float32 sums of the same numbers


def test_windows_do_not_see_each_other():
    x, _ = windows()
    net = v.VAE(v.VAEConfig(**SMALL, init="random"), generator())
    order = torch.tensor([3, 1, 0, 2, 5, 4])
    torch.testing.assert_close(net.encode(x[order]).mu_BTZ, net.encode(x).mu_BTZ[order], rtol=1e-5, atol=1e-6)


def test_block_against_explicit_loops():
    """The same block written the slow way: complex-number rotation, one query at a time."""
    D, H, T = 8, 2, 5
    block = v.Block(D, H)
    h = torch.randn(1, T, D, generator=generator())
    cos, sin = v.rotation(T, D // H, h.device, h.dtype)
    x = torch.nn.functional.layer_norm(h[0], (D,))
    q, k, w = (block.qkv.weight @ x.T).T.reshape(T, 3, H, D // H).unbind(1)
    def turn(y, t):                                        # pair (p, p + K/2) is one complex number
        turned = torch.complex(y[:2], y[2:]) * torch.polar(torch.ones(2), t * 10_000.0 ** (-torch.tensor([0, 2]) / 4))
        return torch.cat([turned.real, turned.imag])
    mixed = torch.zeros(T, H, D // H)
    for head in range(H):
        for t in range(T):
            scores = torch.stack([turn(q[t, head], t) @ turn(k[s, head], s) for s in range(T)]) / (D // H) ** 0.5
            mixed[t, head] = scores.softmax(0) @ w[:, head]
    y = h[0] + mixed.reshape(T, D) @ block.out.weight.T
    gate, up = (torch.nn.functional.layer_norm(y, (D,)) @ block.gate_up.weight.T).chunk(2, -1)
    expected = y + (gate * gate.sigmoid() * up) @ block.down.weight.T
    torch.testing.assert_close(block(h, cos, sin, None)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.0])
def test_untrained_and_exact_up_to_r_1(ratio):
    x, real = windows(B=40)
    net = warm(ratio, x, real)
    other, _ = windows(B=5, seed=9)                        # any weights, not only those it was set up with
    for sample in (x[:-1], other[:-1]):
        decoded = net.decode(net.encode(sample).mu_BTZ)
        assert ((decoded - sample).square().mean() / sample.var()).item() < 1e-10
    flat = torch.ones(3, 4, 8)
    torch.testing.assert_close(warm(ratio, flat, flat.bool()).decode(warm(ratio, flat, flat.bool()).encode(other).mu_BTZ), other,
                               rtol=1e-4, atol=1e-4)       # set up on constant chunks, exact elsewhere all the same


@pytest.mark.parametrize("ratio", [4 / 3, 2.0, 4.0])
def test_untrained_is_pca_above_r_1(ratio):
    """Eckart-Young: no linear code of Z numbers beats the Z leading principal directions; the sum of the other
    eigenvalues is its error."""
    x, real = windows(B=50)
    x, real = x[:-1], real[:-1]
    Z = round(8 / ratio)
    values = torch.linalg.svdvals((x.reshape(-1, 8) - x.reshape(-1, 8).mean(0)).double()) ** 2
    net = warm(ratio, x, real)
    error = v.masked_mse(net.decode(net.encode(x).mu_BTZ), x, real).item() * x.numel()
    assert error == pytest.approx(values[Z:].sum().item(), rel=1e-4)


def places(ratio, count=3, C=8):
    """A network with a neck per tensor, and the clouds they come from: chunks with a covariance of their own each."""
    clouds = [torch.randn(400, C, generator=generator(s), dtype=torch.float64) @ torch.randn(C, C, generator=generator(9 + s), dtype=torch.float64)
              + s for s in range(count)]
    net = v.VAE(v.VAEConfig(**SMALL | {"ratio": ratio}, places=tuple("abc"[:count])), generator())
    streams = [Moments.of(net.encode_stream(cloud.float()[:, None])[:, 0].detach()) for cloud in clouds]
    everywhere = Moments.of(net.encode_stream(torch.cat(clouds).float()[:, None])[:, 0].detach())
    net.set_neck(everywhere.mean_Z.float(), everywhere.cov_ZZ)
    net.set_own_necks(torch.stack([net.own_neck(here, everywhere) for here in streams]))
    return net, clouds


def test_a_tensor_s_own_neck_is_its_own_pca_shrunk_by_c_chunks():
    """By numpy: eigenvectors of (400 S_own + 8 S_all) / 408 about the common mean; one number for all windows or one for each."""
    net, clouds = places(2.0)
    union = np.concatenate([c.numpy() for c in clouds])
    mean, all_CC = union.mean(0), np.cov(union.T, bias=True)
    for place, cloud in enumerate(clouds):
        x = cloud.numpy() - mean
        values, vectors = np.linalg.eigh((x.T @ x + 8 * all_CC) / 408)
        expected = ((x - x @ vectors[:, 4:] @ vectors[:, 4:].T) ** 2).mean()
        windows_BTC = cloud.float().view(100, 4, 8)
        for where in (place, torch.full((100,), place)):
            decoded = net.decode(net.encode(windows_BTC, place=where).mu_BTZ, place=where)
            assert (decoded - windows_BTC).square().mean().item() == pytest.approx(expected, rel=1e-4)
        other = net.decode(net.encode(windows_BTC).mu_BTZ)                     # the shared neck is no better
        assert (other - windows_BTC).square().mean() > expected


def test_moments_on_the_cpu_serve_a_network_elsewhere():
    """The neck is computed where the moments are; a network on torch's "meta" device stands for one on a GPU."""
    net = v.VAE(v.VAEConfig(**SMALL | {"ratio": 2.0}), generator())
    asked, real = [], torch.Tensor.cpu
    with mock.patch.object(torch.Tensor, "cpu", lambda self: asked.append(self.shape) or real(self)):
        net.set_neck(torch.zeros(16), torch.eye(16, dtype=torch.float64))
        net.own_neck(Moments.of(torch.randn(9, 16, generator=generator())), Moments.of(torch.randn(9, 16, generator=generator(1))))
    assert {(16, 8), (16, 4)} <= {tuple(shape) for shape in asked}


def test_own_necks_are_turned_as_near_as_can_be_to_the_shared_one():
    net, _ = places(2.0)
    shared_DZ = net.widen.weight.detach().double().numpy()
    for own_DZ in net.own_widen.detach().double().numpy():
        turn, _ = orthogonal_procrustes(shared_DZ + own_DZ, shared_DZ)
        np.testing.assert_allclose(turn, np.eye(4), atol=1e-5)
    exact, _ = places(1.0)
    assert max(p.abs().max().item() for p in (exact.own_mu, exact.own_widen)) < 1e-5


def test_idle_blocks_are_passed_over_without_a_trace():
    x, real = windows()
    net = warm(2.0, x, real)
    torch.nn.init.normal_(net.decoder[1].down.weight, generator=generator())
    before = net.decode(net.encode(x).mu_BTZ)
    net.skip_idle()
    assert [block.idle for block in [*net.encoder, *net.decoder]] == [True, True, True, False]
    assert torch.equal(net.decode(net.encode(x).mu_BTZ), before)
    assert not any(block.idle for block in [*net.train().encoder, *net.decoder])             # training reaches them again


def test_posterior_variance_is_the_closed_form():
    """argmin over s of  s / 2 + beta (s - 1 - log s) / 2,  on a grid."""
    x, real = windows()
    net = warm(1.0, x, real, beta=0.01)
    s = torch.linspace(1e-4, 0.1, 200_000, dtype=torch.float64)
    best = s[(s / 2 + 0.01 * (s - 1 - s.log()) / 2).argmin()].item()
    assert net.encode(x).logvar_BTZ.exp().mean().item() == pytest.approx(best, rel=1e-4)


def test_sampling_needs_a_generator_and_has_the_posteriors_moments():
    posterior = v.Posterior(torch.full((200, 50, 20), 3.0), torch.full((200, 50, 20), math.log(0.25)))
    z = v.sample(posterior, generator())
    assert torch.equal(z, v.sample(posterior, generator())) and not torch.equal(z, v.sample(posterior, generator(1)))
    # 200,000 draws of deviation 0.5: five standard errors of the mean are 0.0056, of the deviation 0.004.
    assert z.mean().item() == pytest.approx(3.0, abs=0.0056) and z.std().item() == pytest.approx(0.5, abs=0.004)


def test_a_batch_can_be_overfitted():
    """ratio 4, far beyond PCA's reach on white noise (error 0.75): the network has to memorise."""
    x = torch.randn(2, 4, 8, generator=generator())
    net = v.VAE(v.VAEConfig(**SMALL | {"ratio": 4.0, "width": 32}, init="random"), generator())
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(300):
        optimiser.zero_grad()
        loss = v.masked_mse(net.decode(net.encode(x).mu_BTZ), x, torch.ones_like(x, dtype=torch.bool))
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.02


def test_file_round_trip_and_refusals():
    net = v.VAE(v.VAEConfig(**SMALL), generator())
    tensors, metadata = net.to_file({"seed": 3})
    back, record = v.VAE.from_file(tensors, metadata)
    assert record == {"seed": 3} and back.config == net.config
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), back.parameters()))
    name = "embed.weight"
    for broken, meta, word in [
            ({k: t for k, t in tensors.items() if k != name}, metadata, "missing"),
            (tensors | {"extra": torch.ones(1)}, metadata, "extra"),
            (tensors | {name: torch.ones(3, 8)}, metadata, r"\(3, 8\)"),
            (tensors | {name: tensors[name] * math.nan}, metadata, "NaN"),
            (tensors, {}, "not a VAE"),
            (tensors, {"lsmerge.vae": json.dumps(asdict(net.config) | {"chunk": "8"})}, "chunk"),
            *((tensors, {"lsmerge.vae": json.dumps(asdict(net.config) | {"places": bad})}, "places") for bad in ("a", {"a": 1}, None, 3, [1], ["a", "a"])),
            (tensors, {"lsmerge.vae": json.dumps({"chunk": 8})}, "configuration")]:
        with pytest.raises(ValueError, match=word):
            v.VAE.from_file(broken, meta)


@pytest.mark.parametrize("field, value", [("chunk", 0), ("tokens", -1), ("ratio", 0.0), ("ratio", math.nan), ("ratio", 1e9), ("heads", 3),
                                          ("init", "zeros"), ("beta", -1.0), ("width", 4)])
def test_configuration_is_checked(field, value):
    with pytest.raises(ValueError, match=field):
        v.VAEConfig(**SMALL | {field: value})
