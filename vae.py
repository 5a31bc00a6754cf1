"""vae.py: the transformer VAE on weight chunks.                           (read third)

    x_BTC --embed--> h_BTD --blocks--> h_BTD --to_mu, to_logvar--> mu_BTZ, logvar_BTZ
    z_BTZ --up-----> h_BTD --blocks--> h_BTD --unembed-----------> x_BTC

Paper: Sec. 3.2, Eq. 1. The first line is the encoder, q(z | w); the second the decoder,
p(w | z). h is the residual stream, with D numbers per chunk. The bottleneck, `to_mu` and
`to_logvar`, makes them Z, the compact code.
Letters: the dimension key of lsmerge.py; in attention K numbers per head, P = K / 2 pairs.
Example: 64 windows of 16 chunks of 64 weights are x (64, 16, 64), h (64, 16, 64) and, at
r = C / Z = 1, mu (64, 16, 64).

Two starts. "random" is the paper's. "pca" is ours: the network starts out as the best
linear autoencoder. A pre-norm transformer computes x + f_1(x) + f_2(x) + ...; with the
last matrix of every f at zero it is the identity, and the stream carries the embedded
chunk untouched. If the embedding is an isometry (D >= C) and the bottleneck holds the Z
leading principal directions, the untrained network IS the best linear code
(Eckart-Young): exact at r <= 1, PCA at r > 1. Three things would break this and are
absent: positions added to the stream (they enter by rotation, inside attention), a final
norm on the stream, a nonlinearity in the bottleneck. Without blocks it stays that code:
the *exact codec*.

Tried and not kept: pooled latents, companding, Huber loss, a bottleneck for each tensor.
Not tried: token down-sampling, learned positions, dropout.
"""
import json
import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class VAEConfig:
    chunk: int = 64         # C. paper: 640. ours: 16,384 weights then give 256 samples
    tokens: int = 16        # T: attention sees T C = 1,024 weights of one tensor
    ratio: float = 1.0      # r = C / Z. paper: 1.6, 2, 4; its release: 1.0
    width: int = 64         # D. paper's release: 768. By trial: 128 is no better at r = 1
    blocks: int = 1         # in the encoder, and again in the decoder. paper: 6
    heads: int = 2          # paper's release: 4
    init: str = "random"    # the start: "random" (paper) or "pca" (ours, see above)
    beta: float = 1e-4      # weight of the KL in Eq. 1: sigma is then near sqrt(beta)

    def __post_init__(self):
        sizes = (self.chunk, self.tokens, self.width, self.heads)
        if min(sizes) < 1 or max(sizes) > 65536:
            raise ValueError("--chunk, --tokens, --width, --heads must be 1 to 65536")
        if self.width % (2 * self.heads):                   # RoPE turns pairs
            raise ValueError("--width must be a multiple of twice --heads")
        if self.init not in ("random", "pca"):
            raise ValueError("--init must be random or pca")
        if self.init == "pca" and self.width < self.chunk:  # no room for an isometry
            raise ValueError("--init pca needs a --width of at least --chunk")
        if not 0.01 <= self.ratio <= self.chunk:
            raise ValueError("--ratio must be from 0.01 to --chunk")
        if not 0 <= self.blocks <= 1024 or not 0 <= self.beta < math.inf:
            raise ValueError("--blocks must be from 0 to 1024, --beta 0 or more")

    @property
    def latent(self):
        """Z, rounded to a whole number."""
        return round(self.chunk / self.ratio)

    @property
    def true_ratio(self):
        """r after that rounding: what is reported."""
        return self.chunk / self.latent


# --- The network ------------------------------------------------------------------------
class Block(nn.Module):
    """Pre-norm transformer block: h + Attention(norm(h)), then h + SwiGLU(norm(h))."""

    def __init__(self, D, heads):
        super().__init__()
        hidden = -(-8 * D // 3 // 8) * 8    # 8/3 D: as many numbers as a plain MLP of 4 D
        self.heads = heads
        self.norm_attention = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.norm_mlp = nn.LayerNorm(D)
        self.gate_up = nn.Linear(D, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)

    def forward(self, h_BTD, mask_B11T):
        B, T, D = h_BTD.shape
        by_head = (B, T, self.heads, D // self.heads)
        q, k, v = self.qkv(self.norm_attention(h_BTD)).split(D, dim=2)  # (B, T, D) each
        q = rotate(q.view(by_head).transpose(1, 2))                 # (B, heads, T, K)
        k = rotate(k.view(by_head).transpose(1, 2))                 # (B, heads, T, K)
        v = v.view(by_head).transpose(1, 2)                         # (B, heads, T, K)
        # softmax(q k^T / sqrt(K)) v, over the chunks that hold weights
        mixed = F.scaled_dot_product_attention(q, k, v, mask_B11T)
        mixed_BTD = mixed.transpose(1, 2).reshape(B, T, D)          # heads side by side
        h_BTD = h_BTD + self.out(mixed_BTD)
        gate, up = self.gate_up(self.norm_mlp(h_BTD)).chunk(2, dim=2)
        return h_BTD + self.down(F.silu(gate) * up)


def rotate(q_BHTK):
    """RoPE (paper's release): position enters as a rotation, so that the scores q k^T
    depend on how far apart two chunks are, not on where they are.

    Equation:  pair p of chunk t is (x, y) = (q[p], q[p + P]), with P = K / 2. It is turned
               by the angle t / 10000^(p / P), to (x cos - y sin, y cos + x sin)
    """
    T, K = q_BHTK.shape[2:]
    P = K // 2
    angle_TP = torch.outer(torch.arange(T), 10_000.0 ** -(torch.arange(P) / P))
    angle_TK = angle_TP.repeat(1, 2)                                # x and y of a pair
    x, y = q_BHTK.chunk(2, dim=-1)                                  # (B, heads, T, P) each
    turned_BHTK = torch.cat([-y, x], dim=-1)                        # by 90 degrees
    return q_BHTK * angle_TK.cos().to(q_BHTK) + turned_BHTK * angle_TK.sin().to(q_BHTK)


class Posterior(NamedTuple):
    """q(z | w) = N(mu, exp(logvar) I)."""
    mu_BTZ: torch.Tensor
    logvar_BTZ: torch.Tensor


class VAE(nn.Module):
    """Encoder, bottleneck and decoder, without values: see `start` and `from_file`.
    `real_BT` (1 = chunk with weights, 0 = padding) may be None if nothing is padding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.chunk
        D = config.width
        Z = config.latent
        self.embed = nn.Linear(C, D, bias=False)
        self.encoder = nn.ModuleList(Block(D, config.heads) for _ in range(config.blocks))
        self.to_mu = nn.Linear(D, Z, bias=False)
        self.to_logvar = nn.Linear(D, Z)
        self.up = nn.Linear(Z, D, bias=False)
        self.mean = nn.Parameter(torch.zeros(D))    # of the stream, where the code is cut
        self.decoder = nn.ModuleList(Block(D, config.heads) for _ in range(config.blocks))
        self.unembed = nn.Linear(D, C, bias=False)

    def run(self, blocks, h_BTD, real_BT):
        """The stream through some blocks; padding is not attended to."""
        mask_B11T = None
        if real_BT is not None:
            mask_B11T = real_BT[:, None, None]
        for block in blocks:
            h_BTD = block(h_BTD, mask_B11T)
        return h_BTD

    def encode_stream(self, x_BTC, real_BT=None):
        """(B, T, C) -> (B, T, D): the encoder, before the bottleneck."""
        return self.run(self.encoder, self.embed(x_BTC), real_BT)

    def decode_stream(self, h_BTD, real_BT=None):
        """(B, T, D) -> (B, T, C): the decoder, behind the bottleneck."""
        return self.unembed(self.run(self.decoder, h_BTD, real_BT))

    def encode(self, x_BTC, real_BT=None):
        """paper: z = E(X_emb), token-wise. The parameters of q(z | w)."""
        h_BTD = self.encode_stream(x_BTC, real_BT)
        return Posterior(self.to_mu(h_BTD - self.mean), self.to_logvar(h_BTD))

    def encode_mean(self, x_BTC, real_BT=None):
        """The mean of q(z | w) alone, (B, T, Z): all that a merge needs."""
        return self.to_mu(self.encode_stream(x_BTC, real_BT) - self.mean)

    def decode(self, z_BTZ, real_BT=None):
        """paper: W^ = D(z). (B, T, Z) -> (B, T, C)."""
        return self.decode_stream(self.up(z_BTZ) + self.mean, real_BT)

    # --- How it starts -----------------------------------------------------------------
    @torch.no_grad()
    def start(self, generator):
        """Fill in the values of config.init; returns the VAE itself.

        ours: "random": N(0, 1 / inputs) for every matrix, as the paper names no start. The
              last matrix of each branch is divided by the root of their number, so that
              all branches together add as much as the stream holds
        ours: "pca": that matrix is zero, and the unembedding the embedding's transpose
        ours: at r <= 1 the code has room for a whole chunk: the bottleneck is set now, to
              the columns of an isometry, and both stages go through it
        """
        for weight in self.parameters():
            if weight.ndim == 2:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
        last = []                       # of each branch: two in each block, both ways
        for block in [*self.encoder, *self.decoder]:
            last += [block.out.weight, block.down.weight]
        for weight in last:
            weight.mul_(len(last) ** -0.5)
        isometry_DC = torch.linalg.qr(self.embed.weight.double()).Q
        if self.config.init == "pca":
            for weight in last:
                weight.zero_()
            self.embed.weight.copy_(isometry_DC)
            self.unembed.weight.copy_(isometry_DC.T)
        if self.config.true_ratio <= 1:
            self.fill_bottleneck(isometry_DC)
        return self

    @torch.no_grad()
    def set_bottleneck(self, mean_D, cov_DD):
        """Between the stages, at r > 1: cut the stream to its Z leading principal
        directions U. By Eckart-Young the best linear code of Z numbers is
            mu = U^T (h - mean),   h^ = U mu + mean
        mean_D, cov_DD: the mean and covariance of stage 1's latents."""
        directions_DD = torch.linalg.eigh(cov_DD.double()).eigenvectors.flip(1)
        self.mean.copy_(mean_D)
        self.fill_bottleneck(directions_DD[:, :self.config.latent])

    @torch.no_grad()
    def fill_bottleneck(self, directions_DZ):
        """U, and the posterior variance s = sigma^2 that minimises Eq. 1 for a linear
        decoder. Per latent number (U is orthonormal: s in the code adds an error of s)
            d/ds [s / 2 + beta (s - 1 - log s) / 2] = 0    =>    s = beta / (1 + beta)
        Example:  beta 1e-4 -> sigma 0.01. For a latent number of variance 1 the KL is then
                  (1 + 1e-4 - 1 - log 1e-4) / 2 = 4.605 nats, which is -log sigma."""
        unused = self.config.latent - directions_DZ.shape[1]        # at r < 1: they stay 0
        directions_DZ = F.pad(directions_DZ, (0, unused))
        self.to_mu.weight.copy_(directions_DZ.T)
        self.up.weight.copy_(directions_DZ)
        self.to_logvar.weight.zero_()
        beta = max(self.config.beta, 1e-12)
        self.to_logvar.bias.fill_(math.log(beta / (1 + beta)))

    # --- Files -------------------------------------------------------------------------
    def to_file(self, record):
        """(tensors, metadata) for a safetensors file; record: facts that fit into JSON."""
        metadata = {"lsmerge.vae": json.dumps(asdict(self.config)),
                    "lsmerge.training": json.dumps(record)}
        return self.state_dict(), metadata

    @classmethod
    def from_file(cls, tensors, metadata):
        """The inverse: (vae, record). ValueError if anything does not fit.

        The network is first built without memory, so that a configuration that does not
        belong to these tensors cannot ask for any."""
        try:
            config = VAEConfig(**json.loads(metadata["lsmerge.vae"]))
            record = json.loads(metadata["lsmerge.training"])
            with torch.device("meta"):
                vae = cls(config)
            vae.load_state_dict(tensors, assign=True)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError("no VAE of this version, train one with train.py "
                             f"({' '.join(str(error).split())[:200]})") from None
        numbers = nn.utils.parameters_to_vector(vae.float().parameters())
        if not numbers.isfinite().all():
            raise ValueError("it holds NaN or Inf")
        return vae, record


def sample(posterior, generator):
    """z = mu + sigma eps, eps ~ N(0, I): the only place where the codec is random."""
    mu = posterior.mu_BTZ
    eps = torch.randn(mu.shape, generator=generator, device=generator.device)
    return mu + (0.5 * posterior.logvar_BTZ).exp() * eps.to(mu)


def generator_for(*key):
    """A source of noise for a key of whole numbers (seed, tensor, parent, ...): equal keys
    draw equal noise, in whatever order they are asked. The key is hashed, as torch uses
    only the low 32 bits of a seed."""
    seed = np.random.SeedSequence(key).generate_state(1)[0]
    return torch.Generator().manual_seed(int(seed))


# --- Eq. 1 ------------------------------------------------------------------------------
def masked_mse(decoded_BTC, x_BTC, real_BTC):
    """Mean squared error over real weights: padding is in neither the sum nor the count."""
    return (decoded_BTC[real_BTC] - x_BTC[real_BTC]).square().mean()


def kl_divergence(posterior, real_BT):
    """KL(q || N(0, I)) = (mu^2 + sigma^2 - 1 - log sigma^2) / 2: nats per latent number,
    over chunks that hold weights (selected, as 0 times Inf would be NaN)."""
    mu = posterior.mu_BTZ[real_BT]
    logvar = posterior.logvar_BTZ[real_BT]
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()


class Loss(NamedTuple):
    total: torch.Tensor     # Eq. 1, in nats per weight
    mse: torch.Tensor       # per standardised weight: the NMSE
    kl: torch.Tensor        # in nats per latent number


def vae_loss(decoded_BTC, posterior, x_BTC, real_BTC, beta, ratio):
    """paper: Eq. 1,   -E_q[log p(w | z)] + beta KL(q(z | w) || N(0, I))

    ours:     p(w | z) is a Gaussian of unit variance on standardised weights. Per weight,
              and up to a constant, Eq. 1 is then   mse / 2 + (beta / r) kl,   as there is
              1 / r of a latent number for each weight
    Example:  mse 0.02, kl 5, beta 1e-4, r = 1: 0.01 + 0.0005 = 0.0105
    """
    mse = masked_mse(decoded_BTC, x_BTC, real_BTC)
    kl = kl_divergence(posterior, real_BTC.any(dim=-1))
    return Loss(mse / 2 + beta / ratio * kl, mse, kl)
