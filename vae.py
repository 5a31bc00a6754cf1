"""vae.py: the transformer VAE on weight chunks.                           (read third)

    x_BTC --embed--> h_BTD --blocks--> h_BTD --to_mu, to_logvar--> mu_BTZ, logvar_BTZ
    z_BTZ --up-----> h_BTD --blocks--> h_BTD --unembed-----------> x_BTC

Paper: Sec. 3.2, Eq. 1. The first line is the encoder, q(z | w); the second the decoder,
p(w | z). h is the residual stream, with D numbers per chunk. The bottleneck, `to_mu`
and `to_logvar`, makes them Z, the compact code.

Letters: the dimension key of lsmerge.py; in attention K numbers per head.
Example: 32 windows of 16 chunks of 64 weights, D = 128 and r = C / Z = 2 are
x (32, 16, 64), h (32, 16, 128), mu (32, 16, 32).

Two starts. "random" is the paper's. "pca" is ours: the network starts out as the best
linear autoencoder.

    A pre-norm transformer adds branches:  h_1 = x + f_1(x),  h_2 = h_1 + f_2(h_1), ...
    With the last matrix of every f at zero it is the identity: the stream carries the
    embedded chunk untouched. If the embedding is an isometry (D >= C), and the
    bottleneck holds the Z leading principal directions, then the untrained network IS
    the best linear code (Eckart-Young): exact at r <= 1, PCA at r > 1.

Three things would break this and are absent: positions added to the stream (they enter
by rotation, inside attention), a final norm on the stream, a nonlinearity in the
bottleneck. Without blocks the network stays that code: the *exact codec*.

Tried and not kept: pooled latents, companding, Huber loss, a bottleneck for each
tensor. Not tried: token down-sampling, learned positions, dropout.
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
    """The network's sizes, its start, and the beta of Eq. 1. ValueError where they do
    not fit together: it names the flag of train.py. (Its code: the paper's release.)"""
    chunk: int = 64         # C. its code: 640. ours: 16,384 weights give 256 samples
    tokens: int = 16        # T: attention sees T C = 1,024 weights of one tensor
    ratio: float = 1.0      # r = C / Z. paper: 1.6, 2, 4; its code: 1.0
    width: int = 64         # D. paper's release: 768. By trial 128 is no better
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
        if not 0 <= self.blocks <= 1024 or not 0 <= self.beta <= 1e6:
            raise ValueError("--blocks must be from 0 to 1024, --beta from 0 to 1e6")

    @property
    def latent(self):
        """Z, rounded to a whole number.  Example: C = 64, r = 3 -> Z = 21"""
        return round(self.chunk / self.ratio)

    @property
    def true_ratio(self):
        """r after that rounding: what is reported.  Example: 64 / 21 = 3.048"""
        return self.chunk / self.latent


# --- The network ----------------------------------------------------------------------
class Block(nn.Module):
    """A transformer block as in the paper's release: pre-norm, RoPE, SwiGLU.

    h = h + out(attention(norm(h)))                 the chunks of a window exchange
    h = h + down(silu(gate(n)) * up(n)), n = norm(h)        each chunk for itself
    """

    def __init__(self, D, heads):
        super().__init__()
        # 8/3 D, up to a multiple of 8: as many numbers as a plain MLP of 4 D.
        hidden = -(-8 * D // 3 // 8) * 8
        self.heads = heads
        self.norm_attention = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.norm_mlp = nn.LayerNorm(D)
        self.gate_up = nn.Linear(D, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)

    def forward(self, h_BTD, mask_B11T):
        """(B, T, D) -> (B, T, D). mask: 1 = attend to this chunk, 0 = padding."""
        B, T, D = h_BTD.shape
        by_head = (B, T, self.heads, D // self.heads)
        q, k, v = self.qkv(self.norm_attention(h_BTD)).split(D, dim=2)  # (B, T, D) each
        q = rotate(q.view(by_head).transpose(1, 2))                 # (B, heads, T, K)
        k = rotate(k.view(by_head).transpose(1, 2))                 # (B, heads, T, K)
        v = v.view(by_head).transpose(1, 2)                         # (B, heads, T, K)
        # softmax(q k^T / sqrt(K)) v, over the chunks that hold weights
        mixed = F.scaled_dot_product_attention(q, k, v, mask_B11T)  # (B, heads, T, K)
        mixed_BTD = mixed.transpose(1, 2).reshape(B, T, D)          # heads side by side
        h_BTD = h_BTD + self.out(mixed_BTD)
        gate, up = self.gate_up(self.norm_mlp(h_BTD)).chunk(2, dim=2)   # 8/3 D each
        return h_BTD + self.down(F.silu(gate) * up)


def rotate(q_BHTK):
    """RoPE (paper's release): positions enter as a rotation, so that the scores q k^T
    depend on how far apart two chunks are, not on where they are.

    Equation:  pair p of chunk t is (x, y) = (q[p], q[p + K/2]). It is turned by the
               angle t / 10000^(2p / K), to  (x cos - y sin, y cos + x sin)
    Example:   chunk 0 is not turned; pair 0 of chunk 3 is turned by 3 radians
    """
    T, K = q_BHTK.shape[2:]
    frequency = 10_000.0 ** -(torch.arange(0, K, 2) / K)            # (K/2,)
    angle_TK = torch.outer(torch.arange(T), frequency).repeat(1, 2) # for x, for y
    x, y = q_BHTK.chunk(2, dim=-1)                                  # (B, heads, T, K/2)
    turned_BHTK = torch.cat([-y, x], dim=-1)                        # by 90 degrees
    return q_BHTK * angle_TK.cos().to(q_BHTK) + turned_BHTK * angle_TK.sin().to(q_BHTK)


class Posterior(NamedTuple):
    """q(z | w) = N(mu, diag(sigma^2)), sigma^2 = exp(logvar), a row for each chunk."""
    mu_BTZ: torch.Tensor
    logvar_BTZ: torch.Tensor


class VAE(nn.Module):
    """Encoder, bottleneck and decoder. `start` or `from_file` gives its matrices their
    values; norms start at 1 and 0, `mean` at 0. `real_BT` (1 = chunk with weights, 0 =
    padding) may be None if nothing is padding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.width
        blocks = range(config.blocks)
        self.embed = nn.Linear(config.chunk, D, bias=False)             # C -> D
        self.encoder = nn.ModuleList(Block(D, config.heads) for _ in blocks)
        self.to_mu = nn.Linear(D, config.latent, bias=False)            # D -> Z
        self.to_logvar = nn.Linear(D, config.latent)                    # D -> Z
        self.up = nn.Linear(config.latent, D, bias=False)               # Z -> D
        self.mean = nn.Parameter(torch.zeros(D))        # see set_bottleneck
        self.decoder = nn.ModuleList(Block(D, config.heads) for _ in blocks)
        self.unembed = nn.Linear(D, config.chunk, bias=False)           # D -> C

    def run(self, blocks, h_BTD, real_BT):
        """The stream through some blocks; padding is not attended to."""
        mask_B11T = None
        if real_BT is not None:
            mask_B11T = real_BT[:, None, None]          # for all heads, all queries
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
        # Only mu is centred, as the inverse of `up`: a bias of logvar takes any mean.
        return Posterior(self.to_mu(h_BTD - self.mean), self.to_logvar(h_BTD))

    def encode_mean(self, x_BTC, real_BT=None):
        """The mean of q(z | w) alone, (B, T, Z): all that a merge needs."""
        return self.to_mu(self.encode_stream(x_BTC, real_BT) - self.mean)

    def decode(self, z_BTZ, real_BT=None):
        """paper: W^ = D(z). (B, T, Z) -> (B, T, C)."""
        return self.decode_stream(self.up(z_BTZ) + self.mean, real_BT)

    # --- How it starts ----------------------------------------------------------------
    @torch.no_grad()
    def start(self, generator):
        """Fill in the values of config.init; returns the VAE itself.

        ours: "random": N(0, 1 / inputs) for every matrix, as the paper names no start.
              The last matrix of each branch is divided by the root of their number, so
              that all branches together add as much as the stream holds
        ours: "pca": that matrix is zero; the embedding is an isometry, and the
              unembedding its transpose
        ours: at r <= 1 the code has room for a whole chunk: the bottleneck is set now,
              to the columns of an isometry, and both stages go through it. At r > 1
              stage 1 goes past it, and set_bottleneck cuts
        """
        pca = self.config.init == "pca"
        for weight in self.parameters():
            if weight.ndim == 2:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
        branches = 4 * self.config.blocks               # two in each block, both ways
        for block in [*self.encoder, *self.decoder]:
            for last in (block.out.weight, block.down.weight):
                last.mul_(branches ** -0.5)
                if pca:
                    last.zero_()
        isometry_DC = torch.linalg.qr(self.embed.weight.double()).Q     # Q^T Q = 1
        if pca:
            self.embed.weight.copy_(isometry_DC)
            self.unembed.weight.copy_(isometry_DC.T)
        if self.config.true_ratio <= 1:
            self.fill_bottleneck(isometry_DC)
        return self

    @torch.no_grad()
    def set_bottleneck(self, mean_D, cov_DD):
        """Between the stages, at r > 1: cut the stream to its Z leading principal
        directions U, (D, Z). By Eckart-Young the best linear code of Z numbers is
            mu = U^T (h - mean),   h^ = U mu + mean
        mean_D, cov_DD: the mean and covariance of stage 1's latents."""
        directions_DD = torch.linalg.eigh(cov_DD).eigenvectors.flip(1)
        self.mean.copy_(mean_D)
        self.fill_bottleneck(directions_DD[:, :self.config.latent])

    def fill_bottleneck(self, directions_DZ):
        """U, and the posterior variance s = sigma^2 that minimises Eq. 1 for a linear
        decoder. U is orthonormal: noise of variance s in the code adds an error of s.
        So, per latent number,
            d/ds [s / 2 + beta (s - 1 - log s) / 2] = 0    =>    s = beta / (1 + beta)
        Example:  beta 1e-4 -> sigma 0.01. For a latent number of variance 1 the KL is
                  then (1 + 1e-4 - 1 - log 1e-4) / 2 = 4.605 nats, which is -log sigma.
        """
        # At r < 1, or D < C, more latent numbers than directions: they stay 0.
        unused = self.config.latent - directions_DZ.shape[1]
        directions_DZ = F.pad(directions_DZ, (0, unused))
        self.to_mu.weight.copy_(directions_DZ.T)
        self.up.weight.copy_(directions_DZ)
        self.to_logvar.weight.zero_()
        beta = max(self.config.beta, 1e-12)
        self.to_logvar.bias.fill_(math.log(beta / (1 + beta)))

    # --- Files ------------------------------------------------------------------------
    def to_file(self, record):
        """(tensors, metadata) for a safetensors file. record: facts of its training,
        that fit into JSON. All metadata is text: nothing in the file can be run."""
        metadata = {"lsmerge.vae": json.dumps(asdict(self.config)),
                    "lsmerge.training": json.dumps(record)}
        return self.state_dict(), metadata

    @classmethod
    def from_file(cls, tensors, metadata):
        """The inverse: (vae in float32, record). ValueError if anything does not fit.

        The network is first built without memory ("meta"), so that a configuration that
        does not belong to these tensors cannot ask for any; then it takes the tensors.
        """
        try:
            config = VAEConfig(**json.loads(metadata["lsmerge.vae"]))
            record = json.loads(metadata["lsmerge.training"])
            with torch.device("meta"):
                vae = cls(config)
            vae.load_state_dict(tensors, assign=True)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError("no VAE of this version, train one with train.py "
                             f"({' '.join(str(error).split())})")
        numbers = nn.utils.parameters_to_vector(vae.float().parameters())
        if not numbers.isfinite().all():
            raise ValueError("it holds NaN or Inf")
        return vae, record


def sample(posterior, generator):
    """z = mu + sigma eps, eps ~ N(0, I), (B, T, Z): the only place where the codec is
    random. The noise is drawn on the CPU, so that it is the same for every device."""
    mu, logvar = posterior
    eps = torch.randn(mu.shape, generator=generator).to(mu)
    return mu + (0.5 * logvar).exp() * eps


def generator_for(*key):
    """A source of noise for a key of whole numbers (seed, tensor, parent, ...): equal
    keys draw equal noise, in whatever order they are asked. The key is hashed, as torch
    uses only the low 32 bits of a seed."""
    seed = np.random.SeedSequence(key).generate_state(1)[0]
    return torch.Generator().manual_seed(int(seed))


# --- Eq. 1 ----------------------------------------------------------------------------
def masked_mse(decoded_BTC, x_BTC, real_BTC):
    """Mean squared error over real weights: padding is neither summed nor counted.
    Example:  x [1, 2, (0)], decoded [1, 3, (9)], padding in brackets: 1 / 2"""
    return (decoded_BTC[real_BTC] - x_BTC[real_BTC]).square().mean()


def kl_divergence(posterior, real_BT):
    """KL(q || N(0, I)) = (mu^2 + sigma^2 - 1 - log sigma^2) / 2, in nats per latent
    number, over chunks that hold weights (selected, as 0 times Inf would be NaN).
    Example:  mu = 1, sigma = 1: half a nat"""
    mu = posterior.mu_BTZ[real_BT]
    logvar = posterior.logvar_BTZ[real_BT]
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()


class Loss(NamedTuple):
    total: torch.Tensor     # Eq. 1, in nats per weight
    mse: torch.Tensor       # per standardised weight: the NMSE
    kl: torch.Tensor        # in nats per latent number


def vae_loss(decoded_BTC, posterior, x_BTC, real_BTC, beta, ratio):
    """paper: Eq. 1,   -E_q[log p(w | z)] + beta KL(q(z | w) || N(0, I))

    ours:     p(w | z) is a Gaussian of unit variance on standardised weights, whose
              -log p(w | z) is (w - w^)^2 / 2 and a constant. There is 1 / r of a latent
              number for each weight: so Eq. 1 is, per weight,  mse / 2 + (beta / r) kl
    Example:  mse 0.02, kl 5, beta 1e-4, r = 1: 0.01 + 0.0005 = 0.0105
    """
    mse = masked_mse(decoded_BTC, x_BTC, real_BTC)
    kl = kl_divergence(posterior, real_BTC.any(dim=-1))
    return Loss(mse / 2 + beta / ratio * kl, mse, kl)
