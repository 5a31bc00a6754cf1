"""vae.py against torch.distributions, plain loops and Eckart-Young; its codec; its files."""
import json
import math
from dataclasses import asdict
from unittest import mock

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence as torch_kl

import chunking as ck
import vae as v
from lsmerge import Codec

SMALL = dict(chunk=8, tokens=4, width=16, blocks=2, heads=2)      # small for testing


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def config(**options):
    return v.VAEConfig(**SMALL | options)


def windows(B=6, T=4, C=8, seed=0):
    """Correlated chunks with padding: the last window has one half-filled and one empty chunk."""
    g = generator(seed)
    x = torch.randn(B, T, C, generator=g) @ torch.randn(C, C, generator=g)
    real = torch.ones(B, T, C, dtype=torch.bool)
    real[-1, -2, 3:] = real[-1, -1] = False
    return x * real, real


def warm(ratio, x, real, **options):
    """A VAE that starts from the statistics of x."""
    net = v.VAE(config(ratio=ratio, **options), generator())
    h = net.encode_stream(x, real.any(-1))[real.any(-1)].detach().double()
    net.set_neck(h.mean(0).float(), torch.cov(h.T, correction=0))
    return net


def wake(net):
    """Let every branch of a warm start speak."""
    for seed, block in enumerate([*net.encoder, *net.decoder]):
        torch.nn.init.normal_(block.out.weight, std=0.3, generator=generator(2 * seed))
        torch.nn.init.normal_(block.down.weight, std=0.3, generator=generator(2 * seed + 1))
    return net


def nmse(net, x):
    return ((net.decode(net.encode(x).mu_BTZ) - x).square().mean() / x.var()).item()


# --- Eq. 1 ----------------------------------------------------------------------------------------
def unit_normal(Z):
    return Normal(torch.zeros(Z), torch.ones(Z))


def test_kl_against_torch_distributions():
    x, real = windows()
    posterior = v.Posterior(*torch.randn(2, 6, 4, 5, generator=generator()).unbind())
    q = Normal(posterior.mu_BTZ, (posterior.logvar_BTZ / 2).exp())
    expected = torch_kl(q, unit_normal(5))[real.any(-1)].mean()
    found = v.kl_divergence(posterior, real.any(-1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_loss_is_eq_1_per_weight():
    """-log p(w | z) of a unit Gaussian, less its constant, plus beta KL, over the real weights."""
    x, real = windows()
    decoded = torch.randn(x.shape, generator=generator(1))
    posterior = v.Posterior(*torch.randn(2, 6, 4, 2, generator=generator(2)).unbind())
    logp = Normal(decoded, 1.0).log_prob(x) + math.log(2 * math.pi) / 2
    q = Independent(Normal(posterior.mu_BTZ, (posterior.logvar_BTZ / 2).exp()), 1)
    kl = torch_kl(q, Independent(unit_normal(2), 1))
    full = real.all(-1)                     # whole chunks only: then r weights per latent number
    expected = (-(logp[full].sum()) + 0.3 * kl[full].sum()) / (full.sum() * 8)
    whole = full[..., None].expand_as(x)
    loss = v.vae_loss(decoded, posterior, x, whole, beta=0.3, ratio=4.0)
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=0)


def test_posterior_variance_is_the_closed_form():
    """argmin over s of  s / 2 + beta (s - 1 - log s) / 2,  on a grid."""
    s = torch.linspace(1e-4, 0.1, 200_000, dtype=torch.float64)
    best = s[(s / 2 + 0.01 * (s - 1 - s.log()) / 2).argmin()].item()
    x, real = windows()
    for net in (warm(1.0, x, real, beta=0.01), v.VAE(config(beta=0.01), generator())):
        assert net.encode(x).logvar_BTZ.exp().mean().item() == pytest.approx(best, rel=1e-4)


def test_sampling_needs_a_generator_and_has_the_posteriors_moments():
    shape = 200, 50, 20
    posterior = v.Posterior(torch.full(shape, 3.0), torch.full(shape, math.log(0.25)))
    z = v.sample(posterior, generator())
    assert torch.equal(z, v.sample(posterior, generator()))
    assert not torch.equal(z, v.sample(posterior, generator(1)))
    # 200,000 draws of deviation 0.5: five standard errors of the mean, then of the deviation.
    assert z.mean().item() == pytest.approx(3.0, abs=0.0056)
    assert z.std().item() == pytest.approx(0.5, abs=0.004)


# --- The network ----------------------------------------------------------------------------------
@pytest.mark.parametrize("init", ["pca", "random"])
def test_padding_changes_neither_codes_nor_loss_nor_gradients(init):
    x, real = windows()
    net, results = wake(v.VAE(config(init=init), generator())), []
    real_BT = real.any(-1)
    for garbage in (0.0, 1e3):
        dirty = torch.where(real_BT[..., None], x, garbage)
        net.zero_grad()
        posterior = net.encode(dirty, real_BT)
        loss = v.vae_loss(net.decode(posterior.mu_BTZ, real_BT), posterior, x, real, 0.1, 1.0)
        loss.total.backward()
        results.append([loss.total.detach(), posterior.mu_BTZ[real_BT],
                        net.encoder[0].qkv.weight.grad.clone()])
    for clean, dirty in zip(*results):      # float32 sums of the same numbers
        torch.testing.assert_close(clean, dirty, rtol=1e-5, atol=1e-6)


def test_windows_do_not_see_each_other_but_chunks_of_a_window_do():
    x, _ = windows()
    net = v.VAE(config(init="random"), generator())
    order, z = torch.tensor([3, 1, 0, 2, 5, 4]), net.encode(x).mu_BTZ
    torch.testing.assert_close(net.encode(x[order]).mu_BTZ, z[order], rtol=1e-5, atol=1e-6)
    other = x.clone()
    other[0, 3] += 1
    assert (net.encode(other).mu_BTZ[0, 0] - z[0, 0]).abs().max() > 1e-3


def test_block_against_explicit_loops():
    """The same block written the slow way: complex-number rotation, one query at a time."""
    D, H, T = 8, 2, 5
    block = v.Block(D, H)
    h = torch.randn(1, T, D, generator=generator())
    cos, sin = v.rotation(T, D // H, h.device, h.dtype)
    x = torch.nn.functional.layer_norm(h[0], (D,))
    q, k, w = (block.qkv.weight @ x.T).T.reshape(T, 3, H, D // H).unbind(1)

    def turn(y, t):                         # pair (p, p + K/2) is one complex number
        angle = t * 10_000.0 ** (-torch.tensor([0, 2]) / 4)
        turned = torch.complex(y[:2], y[2:]) * torch.polar(torch.ones(2), angle)
        return torch.cat([turned.real, turned.imag])

    mixed = torch.zeros(T, H, D // H)
    for head in range(H):
        for t in range(T):
            scores = [turn(q[t, head], t) @ turn(k[s, head], s) for s in range(T)]
            mixed[t, head] = (torch.stack(scores) / (D // H) ** 0.5).softmax(0) @ w[:, head]
    y = h[0] + mixed.reshape(T, D) @ block.out.weight.T
    normed = torch.nn.functional.layer_norm(y, (D,))
    gate, up = (normed @ block.gate_up.weight.T).chunk(2, -1)
    expected = y + (gate * gate.sigmoid() * up) @ block.down.weight.T
    torch.testing.assert_close(block(h, cos, sin, None)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_batch_can_be_overfitted():
    """ratio 4, far beyond PCA's reach on white noise (error 0.75): the network has to memorise."""
    x = torch.randn(2, 4, 8, generator=generator())
    net = v.VAE(config(ratio=4.0, width=32, init="random"), generator())
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(300):
        optimiser.zero_grad()
        loss = v.masked_mse(net.decode(net.encode(x).mu_BTZ), x, torch.ones_like(x, dtype=bool))
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.02


# --- The warm start -------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.0])
def test_up_to_r_1_it_is_exact_as_built_and_after_its_neck_was_set(ratio):
    x, real = windows(B=40)
    other, _ = windows(B=5, seed=9)         # any weights, not only those it was set up with
    flat = torch.ones(3, 4, 8)              # constant chunks leave directions empty
    for net in (v.VAE(config(ratio=ratio), generator()), warm(ratio, x, real),
                warm(ratio, flat, flat.bool())):
        assert net.ready and max(nmse(net, x[:-1]), nmse(net, other[:-1])) < 1e-10


@pytest.mark.parametrize("ratio", [4 / 3, 2.0, 4.0])
def test_untrained_is_pca_above_r_1(ratio):
    """Eckart-Young: no linear code of Z numbers beats the Z leading principal directions; its error
    is the sum of the other eigenvalues."""
    x, real = windows(B=50)
    x, real = x[:-1], real[:-1]
    rows = x.reshape(-1, 8).double()
    values = torch.linalg.svdvals(rows - rows.mean(0)) ** 2
    net = warm(ratio, x, real)
    error = v.masked_mse(net.decode(net.encode(x).mu_BTZ), x, real).item() * x.numel()
    assert error == pytest.approx(values[round(8 / ratio):].sum().item(), rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moments_on_the_cpu_serve_a_network_on_a_gpu():
    net = v.VAE(config(ratio=2.0), generator()).cuda()
    net.set_neck(torch.zeros(16), torch.eye(16, dtype=torch.float64))
    x = torch.randn(2, 4, 8, generator=generator())
    z = net.encode(x.cuda()).mu_BTZ.cpu()
    torch.testing.assert_close(z, net.cpu().encode(x).mu_BTZ, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.8, 1.0, 2.0])
def test_folded_equals_the_full_network(ratio):
    x, real = windows(B=40)
    net = warm(ratio, x + 3, real)
    folded, z = v.Folded(net), net.encode(x)
    assert v.Folded.possible(net)
    found = [*folded.encode(x), folded.decode(z.mu_BTZ)]
    for mine, theirs in zip(found, [*z, net.decode(z.mu_BTZ)]):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["encoder.0.out", "encoder.1.down", "decoder.1.out",
                                  "neck_logvar"])
def test_what_is_not_linear_is_not_folded(part):
    net = v.VAE(config(), generator())
    assert v.Folded.possible(net) and isinstance(Codec(net).net, v.Folded)
    torch.nn.init.constant_(net.get_submodule(part).weight[-1:, -1:], 1e-3)
    assert not v.Folded.possible(net) and isinstance(Codec(net).net, v.VAE)


# --- The codec ------------------------------------------------------------------------------------
def slot_of(flat_L):
    return ck.measure(ck.StateDict({"w": flat_L}), "w")


def whole_net(net):
    """A codec that goes through all blocks, whether they speak or not."""
    with mock.patch.object(v.Folded, "possible", lambda _: False):
        return Codec(net)


@pytest.mark.parametrize("L", [1, 5, 32, 33, 1000])
def test_the_exact_codec_of_any_length_both_ways(L):
    """NMSE below 1e-12 in float32, folded and through the idle blocks, which agree."""
    flat_L = 0.02 * torch.randn(L, generator=generator()) + 0.3
    slot, net = slot_of(flat_L), v.VAE(config(), generator())
    found = []
    for codec in (Codec(net), whole_net(net), Codec.load("exact")):
        z_NZ = codec.encode(flat_L, slot)
        assert z_NZ.shape == (-(-L // codec.C), codec.Z) and z_NZ.dtype == torch.float32
        back = codec.decode(z_NZ, slot, L)
        apart = ((back - flat_L).double() / slot.scale).square().mean()
        assert back.dtype == torch.float32 and back.shape == (L,) and apart < 1e-12
        found.append(z_NZ)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_a_codec_is_its_network_on_windows():
    """A network that speaks; padding is masked; the codes of a tensor's parts are the tensor's."""
    net = wake(v.VAE(config(ratio=2.0), generator()))
    net.set_neck(torch.zeros(16), torch.eye(16, dtype=torch.float64))
    flat_L = torch.randn(8 * 4 * 3 + 13, generator=generator(1))
    slot, codec = slot_of(flat_L), Codec(net)
    z_NZ = codec.encode(flat_L, slot)
    x_L = (flat_L - flat_L.double().mean()) / flat_L.double().std(correction=0)
    x_BTC = torch.cat([x_L.float(), torch.zeros(19)]).reshape(4, 4, 8)
    real_BT = torch.arange(16).reshape(4, 4) < 14       # chunk 13 holds 5 weights
    with torch.no_grad():
        expected = net.encode(x_BTC, real_BT).mu_BTZ.reshape(16, 4)[:14]
        decoded = net.decode(net.encode(x_BTC, real_BT).mu_BTZ * real_BT[..., None], real_BT)
    torch.testing.assert_close(z_NZ, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(codec.encode(flat_L[64:], slot), z_NZ[8:], rtol=1e-4, atol=1e-5)
    whole_L = decoded.reshape(-1)[:109] * slot.scale + slot.mean
    torch.testing.assert_close(codec.decode(z_NZ, slot, 109), whole_L, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_the_arithmetic_not_the_result():
    flat_L = torch.randn(640, generator=generator())
    codec = Codec.load("exact", dtype=torch.bfloat16)
    z_NZ = codec.encode(flat_L, slot_of(flat_L))
    apart = (codec.decode(z_NZ, slot_of(flat_L), 640) - flat_L).square().mean()
    assert z_NZ.dtype == torch.float32 and 1e-7 < apart < 1e-3


def test_draws_from_the_posterior_and_from_the_prior():
    """The exact codec's posterior has sigma^2 = beta / (1 + beta); the prior is N(0, I)."""
    flat_L = torch.randn(2 ** 16, generator=generator())
    slot, codec = slot_of(flat_L), Codec.load("exact")
    mean_NZ = codec.encode(flat_L, slot)
    for samples in (1, 9):                  # 65,536 numbers: deviations within 1.5 %, 5 sigma
        draw = codec.encode(flat_L, slot, samples, generator(1))
        assert (draw - mean_NZ).std().item() * samples ** 0.5 == pytest.approx(0.01, rel=0.015)
        prior = codec.encode(flat_L, slot, samples, generator(1), prior=True)
        assert prior.std().item() * samples ** 0.5 == pytest.approx(1, rel=0.015)
        assert abs(torch.corrcoef(torch.stack([prior.flatten(), mean_NZ.flatten()]))[0, 1]) < 0.02


@pytest.mark.parametrize("options", [dict(ratio=2.0), dict(init="random"), dict(ratio=1.1)])
def test_a_codec_whose_neck_was_never_set_refuses_to_work(options):
    net = v.VAE(config(**options), generator())
    assert not net.ready
    with pytest.raises(ValueError, match="never trained"):
        Codec(net)
    net.set_neck(torch.zeros(16), torch.eye(16, dtype=torch.float64))
    assert Codec(net).Z == net.config.latent


# --- Files ----------------------------------------------------------------------------------------
def test_file_round_trip():
    net = wake(v.VAE(config(), generator()))
    back, record = v.VAE.from_file(*net.to_file({"seed": 3}))
    assert record == {"seed": 3} and back.config == net.config and back.ready
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), back.parameters()))


NAME, FACTS = "embed.weight", asdict(config())
BROKEN = {
    "a tensor is missing": ({NAME: None}, FACTS, NAME),
    "one too many": ({"extra": torch.ones(1)}, FACTS, "extra"),
    "another shape": ({NAME: torch.ones(3, 8)}, FACTS, r"\[3, 8\]"),
    "NaN": ({NAME: torch.full((16, 8), math.nan)}, FACTS, "NaN"),
    "no configuration": ({}, {}, "train.py"),
    "half a configuration": ({}, {"chunk": 8}, "train.py"),
    "a wrong type": ({}, FACTS | {"chunk": "8"}, "chunk"),
    "an impossible value": ({}, FACTS | {"width": 4}, "width"),
    "the earlier version": ({}, FACTS | {"places": ["a", "b"], "necks": "tensor"},
                            "earlier version.*train.py"),
    "the same at r = 1": ({}, FACTS | {"places": []}, "earlier version.*train.py"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_no_vae_is_one_line_with_the_remedy(tmp_path, case):
    changes, facts, words = BROKEN[case]
    tensors, _ = v.VAE(config(), generator()).to_file({})
    tensors = {name: t for name, t in (tensors | changes).items() if t is not None}
    path = tmp_path / "v.safetensors"
    ck.write_tensors(path, tensors, {"lsmerge.vae": json.dumps(facts)})
    with pytest.raises(ck.CheckpointError, match=words) as caught:
        Codec.load(path)
    line = str(caught.value)
    assert line.startswith(str(path)) and "; fix: " in line and "\n" not in line


@pytest.mark.parametrize("field, value", [
    ("chunk", 0), ("tokens", -1), ("ratio", 0.0), ("ratio", math.nan), ("ratio", 1e9), ("heads", 3),
    ("init", "zeros"), ("beta", -1.0), ("width", 4)])
def test_configuration_is_checked(field, value):
    with pytest.raises(ValueError, match=field):
        config(**{field: value})
