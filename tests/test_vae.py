"""vae.py against torch.distributions, plain loops and Eckart-Young; its codec."""
import itertools
import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence as torch_kl

import chunking as ck
import vae as v
from conftest import generator
from lsmerge import Codec

SMALL = dict(chunk=8, tokens=4, width=16, blocks=2, heads=2)      # small for testing


def started(seed=0, **options):
    config = v.VAEConfig(**SMALL | dict(init="pca") | options)
    return v.VAE(config).start(generator(seed))


def close(found, expected, rtol=1e-5, atol=0.0):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def windows(B=6, T=4, C=8, seed=0):
    """Correlated chunks; the last window has one half-filled and one empty chunk."""
    g = generator(seed)
    x = torch.randn(B, T, C, generator=g) @ torch.randn(C, C, generator=g)
    real = torch.ones(B, T, C, dtype=torch.bool)
    real[-1, -2, 3:] = real[-1, -1] = False
    return x * real, real


def warm(ratio, x, real, **options):
    net = started(ratio=ratio, **options)
    h = net.encode_stream(x, real.any(-1))[real.any(-1)].detach().double()
    net.set_bottleneck(h.mean(0).float(), torch.cov(h.T, correction=0))
    return net


def wake(net):
    g = generator()
    for block in [*net.encoder, *net.decoder]:
        for last in (block.out.weight, block.down.weight):
            torch.nn.init.normal_(last, std=0.3, generator=g)
    return net


def nmse(net, x):
    return ((net.decode(net.encode(x).mu_BTZ) - x).square().mean() / x.var()).item()


# --- Eq. 1 ----------------------------------------------------------------------------
def test_kl_against_torch_distributions():
    real = windows()[1].any(-1)
    posterior = v.Posterior(*torch.randn(2, 6, 4, 5, generator=generator()).unbind())
    q = Normal(posterior.mu_BTZ, (posterior.logvar_BTZ / 2).exp())
    expected = torch_kl(q, Normal(torch.zeros(5), torch.ones(5)))[real].mean()
    close(v.kl_divergence(posterior, real), expected)
    posterior.mu_BTZ[~real] = math.inf                  # what stands in padding
    close(v.kl_divergence(posterior, real), expected)


def test_loss_is_eq_1_per_weight():
    """-log p(w | z), less its constant, plus beta KL, over real weights."""
    x, real = windows()
    decoded = torch.randn(x.shape, generator=generator(1))
    posterior = v.Posterior(*torch.randn(2, 6, 4, 2, generator=generator(2)).unbind())
    logp = Normal(decoded, 1.0).log_prob(x) + math.log(2 * math.pi) / 2
    q = Independent(Normal(posterior.mu_BTZ, (posterior.logvar_BTZ / 2).exp()), 1)
    kl = torch_kl(q, Independent(Normal(torch.zeros(2), torch.ones(2)), 1))
    full = real.all(-1)         # whole chunks only: then r weights per latent number
    expected = (-(logp[full].sum()) + 0.3 * kl[full].sum()) / (full.sum() * 8)
    whole = full[..., None].expand_as(x)
    close(v.vae_loss(decoded, posterior, x, whole, beta=0.3, ratio=4.0).total, expected)


def test_posterior_variance_is_the_closed_form():
    """argmin over s of  s / 2 + beta (s - 1 - log s) / 2,  on a grid."""
    s = torch.linspace(1e-4, 0.1, 200_000, dtype=torch.float64)
    best = s[(s / 2 + 0.01 * (s - 1 - s.log()) / 2).argmin()].item()
    x, real = windows()
    for net in (warm(2.0, x, real, beta=0.01), started(beta=0.01)):
        variance = net.encode(x).logvar_BTZ.exp().mean().item()
        assert variance == pytest.approx(best, rel=1e-4)


def test_every_key_has_noise_of_its_own():
    """torch looks at 32 bits of a seed: products once left a single one."""
    def draw(key):
        return torch.randn(1000, generator=v.generator_for(*key))
    keys = [*itertools.product((0, 1, 2 ** 31), range(3), range(2))]
    draws = torch.stack([draw(key) for key in keys])
    apart = torch.corrcoef(draws) - torch.eye(len(keys))
    assert apart.abs().max() < 0.2              # 1 / sqrt(1000) by chance, six times
    assert torch.equal(draw(keys[7]), draws[7])


# --- The network ----------------------------------------------------------------------
@pytest.mark.parametrize("init", ["pca", "random"])
def test_padding_changes_neither_codes_nor_loss_nor_gradients(init):
    x, real = windows()
    net, results = wake(started(init=init)), []
    real_BT = real.any(-1)
    for garbage in (0.0, 1e3):
        dirty = torch.where(real_BT[..., None], x, garbage)
        net.zero_grad()
        posterior = net.encode(dirty, real_BT)
        decoded = net.decode(posterior.mu_BTZ, real_BT)
        loss = v.vae_loss(decoded, posterior, x, real, 0.1, 1.0)
        loss.total.backward()
        results.append([loss.total.detach(), posterior.mu_BTZ[real_BT],
                        net.encoder[0].qkv.weight.grad.clone()])
    for clean, dirty in zip(*results):      # float32 sums of the same numbers
        close(clean, dirty, atol=1e-6)


def test_windows_do_not_see_each_other_but_chunks_of_a_window_do():
    x, _ = windows()
    net = started(init="random")
    order, z = torch.tensor([3, 1, 0, 2, 5, 4]), net.encode(x).mu_BTZ
    close(net.encode(x[order]).mu_BTZ, z[order], atol=1e-6)
    close(net.encode_mean(x), z, atol=1e-6)
    other = x.clone()
    other[0, 3] += 1
    assert (net.encode(other).mu_BTZ[0, 0] - z[0, 0]).abs().max() > 1e-3


def test_block_against_explicit_loops():
    """The slow way: rotation by complex numbers, one query at a time."""
    D, H, T = 8, 2, 5
    net = v.VAE(v.VAEConfig(chunk=8, width=D, heads=H, blocks=1)).start(generator())
    block, h = net.encoder[0], torch.randn(1, T, D, generator=generator())
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
            shares = (torch.stack(scores) / (D // H) ** 0.5).softmax(0)
            mixed[t, head] = shares @ w[:, head]
    y = h[0] + mixed.reshape(T, D) @ block.out.weight.T
    normed = torch.nn.functional.layer_norm(y, (D,))
    gate, up = (normed @ block.gate_up.weight.T).chunk(2, -1)
    expected = y + (gate * gate.sigmoid() * up) @ block.down.weight.T
    close(net.run([block], h, None)[0], expected, 1e-4, 1e-5)


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.0])
def test_the_pca_start_is_exact_up_to_r_1(ratio, blocks):
    x, _ = windows(B=40)
    assert nmse(started(ratio=ratio, blocks=blocks), x[:-1]) < 1e-10


def test_the_random_start_has_matrices_of_variance_1_over_inputs():
    net = started(init="random", width=128, blocks=2)
    for name, weight in net.state_dict().items():
        branch = name.endswith(("out.weight", "down.weight"))
        if weight.ndim == 2 and name.split(".")[0] in ("encoder", "decoder", "unembed"):
            expected = weight.shape[1] ** -0.5 / (8 ** 0.5 if branch else 1)
            assert weight.std().item() == pytest.approx(expected, rel=0.1)
    assert not torch.equal(net.embed.weight,
                           started(1, init="random", width=128).embed.weight)


def stats_of(flat_L):
    return ck.measure(ck.StateDict({"w": flat_L}), "w")


@pytest.mark.parametrize("L", [1, 5, 32, 33, 1000])
def test_the_exact_codec_of_any_length_both_ways(L):
    flat_L = 0.02 * torch.randn(L, generator=generator()) + 0.3
    stats = stats_of(flat_L)
    for codec in (Codec(started()), Codec.load("exact")):
        z_NZ = codec.encode(flat_L, stats)
        assert z_NZ.shape == (-(-L // codec.C), codec.Z) and z_NZ.dtype == torch.float32
        back = codec.decode(z_NZ, stats, L)
        apart = ((back - flat_L).double() / stats.scale).square().mean()
        assert back.dtype == torch.float32 and back.shape == (L,) and apart < 1e-12


def test_a_codec_is_its_network_on_windows():
    """Padding is masked; a part that begins with a window has the whole's codes."""
    x, real = windows(B=40)
    net = wake(warm(2.0, x, real))
    flat_L = torch.randn(8 * 4 * 3 + 13, generator=generator(1))
    stats, codec = stats_of(flat_L), Codec(net)
    z_NZ = codec.encode(flat_L, stats)
    x_L = (flat_L - flat_L.double().mean()) / flat_L.double().std(correction=0)
    x_BTC = torch.cat([x_L.float(), torch.zeros(19)]).reshape(4, 4, 8)
    real_BT = torch.arange(16).reshape(4, 4) < 14       # chunk 13 holds 5 weights
    with torch.no_grad():
        mu_BTZ = net.encode(x_BTC, real_BT).mu_BTZ
        decoded = net.decode(mu_BTZ * real_BT[..., None], real_BT)
    whole_L = decoded.reshape(-1)[:109] * stats.scale + stats.mean
    close(z_NZ, mu_BTZ.reshape(16, 4)[:14], 1e-4, 1e-5)
    close(codec.encode(flat_L[64:], stats), z_NZ[8:], 1e-4, 1e-5)
    close(codec.decode(z_NZ, stats, 109), whole_L, 1e-4, 1e-5)


def test_other_dtypes():
    """bfloat16 is a codec's arithmetic, not its result; files are read as float32."""
    flat_L = torch.randn(640, generator=generator())
    codec = Codec.load("exact", dtype=torch.bfloat16)
    z_NZ = codec.encode(flat_L, stats_of(flat_L))
    apart = (codec.decode(z_NZ, stats_of(flat_L), 640) - flat_L).square().mean()
    assert z_NZ.dtype == torch.float32 and 1e-7 < apart < 1e-3
    tensors, metadata = started().to_file({})
    back, _ = v.VAE.from_file({n: t.bfloat16() for n, t in tensors.items()}, metadata)
    assert all(p.dtype == torch.float32 for p in back.parameters())
