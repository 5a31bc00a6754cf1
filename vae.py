"""vae.py: the transformer VAE on weight chunks.                                      (read third)

    x_BTC --embed--> h_BTD --blocks--> h_BTD --neck----> mu_BTZ, logvar_BTZ       encode, q(z | w)
    z_BTZ --widen--> h_BTD --blocks--> h_BTD --unembed-> x_BTC                    decode, p(w | z)

Paper: Sec. 3.2, Eq. 1 and the two-stage curriculum. The stream h has D numbers per chunk, the neck
makes them Z, the compact code. At r = C / Z <= 1 it holds a whole chunk: it is set as the network
is built, and both stages go through it. At r > 1 stage 1 trains without the neck, its latent is the
stream (high capacity); `set_neck` then cuts that to Z numbers, and stage 2 goes through them.
Letters: the dimension key of lsmerge.py, and in attention K numbers per head, P = K / 2 pairs.
Example: 64 windows of 16 chunks of 64 weights are x (64, 16, 64), h (64, 16, 128), mu (64, 16, 64).

Why the network can start out exact (ours: init="pca"). A pre-norm transformer computes x + f_1(x)
+ f_2(x) + ...; with the last matrix of every f at zero it is the identity, and the stream carries
the embedded chunk untouched. If the embedding is an isometry (D >= C) and the neck holds the Z
leading principal directions, the untrained network IS the best linear autoencoder (Eckart-Young):
exact at r <= 1, PCA at r > 1. Three things would break this and are therefore absent: positions
added to the stream (they enter by rotation, inside attention), a final norm on the stream, a
nonlinearity in the heads. Tried and not kept: pooled latents, companding, Huber loss, a neck of its
own for each tensor. Not tried: token down-sampling, learned positions, dropout.
"""
import functools, json, math
from collections import namedtuple
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class VAEConfig:
    chunk: int = 64         # C. paper: 640. ours: 16,384 weights then give n = 256 >= 4 d samples
    tokens: int = 16        # T: attention sees T C = 1,024 weights of one tensor
    ratio: float = 1.0      # r = C / Z. paper: 1.6, 2, 4; its release: 1.0
    width: int = 128        # D. paper's release: 768
    blocks: int = 2         # in the encoder, and again in the decoder. paper: 6; its release: 4
    heads: int = 2          # paper's release: 4
    init: str = "pca"       # "pca" (ours, see above) or "random" (the paper's)
    beta: float = 1e-4      # weight of the KL in Eq. 1; sigma is then near sqrt(beta): _fill_neck

    def __post_init__(self):
        sizes = self.chunk, self.tokens, self.width, self.heads, self.blocks + 1
        if not (all(type(n) is int and 1 <= n <= 2 ** 16 for n in sizes)
                and self.width % (2 * self.heads) == 0 and 0 <= self.beta < math.inf
                and 0.01 <= self.ratio <= self.chunk and self.init in ("pca", "random")
                and (self.init == "random" or self.width >= self.chunk)):
            raise ValueError(f"{self}: needed: sizes of 1 to 65,536, beta >= 0, 0.01 <= ratio <= "
                             "chunk, width a multiple of 2 heads and, for init 'pca', >= chunk")

    @property
    def latent(self):           # Z, rounded to a whole number
        return round(self.chunk / self.ratio)

    @property
    def true_ratio(self):       # r after that rounding: what is reported
        return self.chunk / self.latent


Posterior = namedtuple("Posterior", "mu_BTZ logvar_BTZ")    # q(z | w) = N(mu, exp(logvar) I)


class Block(nn.Module):
    """Pre-norm transformer block: h + Attention(norm h), then h + SwiGLU(norm h)."""

    def __init__(self, D, heads):
        super().__init__()
        hidden = -(-8 * D // 3 // 8) * 8        # 8/3 D: as many numbers as a plain MLP of 4 D
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.gate_up = nn.Linear(D, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)

    def forward(self, h_BTD, cos_T1P, sin_T1P, mask_B11T):
        B, T, D = h_BTD.shape
        qkv = self.qkv(self.norm_attention(h_BTD)).view(B, T, 3 * self.heads, D // self.heads)
        qk = rotate(qkv[:, :, :2 * self.heads], cos_T1P, sin_T1P)
        q, k = qk.transpose(1, 2).chunk(2, dim=1)                   # each (B, heads, T, K)
        v = qkv[:, :, 2 * self.heads:].transpose(1, 2)              # (B, heads, T, K)
        mixed = F.scaled_dot_product_attention(q, k, v, mask_B11T)  # softmax(q k^T / sqrt K) v
        h_BTD = h_BTD + self.out(mixed.transpose(1, 2).reshape(B, T, D))    # heads side by side
        gate, up = self.gate_up(self.norm_mlp(h_BTD)).chunk(2, dim=-1)
        return h_BTD + self.down(F.silu(gate) * up)                 # SwiGLU


@functools.lru_cache(maxsize=8)     # made anew for every block, these tables cost 2 % of the time
@torch.inference_mode(False)        # made within a merge, they must still serve a training
def rotation(T, K, device, dtype, base=10_000.0):
    """cos and sin of RoPE, (T, 1, P), P = K / 2: at chunk t pair p turns by t / base^(2 p / K)."""
    angle_T1P = torch.outer(torch.arange(T), base ** (-torch.arange(0, K, 2) / K))[:, None]
    return angle_T1P.cos().to(device, dtype), angle_T1P.sin().to(device, dtype)


def rotate(q_BTHK, cos_T1P, sin_T1P):
    """Turn each pair (q[p], q[p + K / 2]) by its angle. paper's release: RoPE."""
    left, right = q_BTHK.chunk(2, dim=-1)
    return torch.cat([torch.addcmul(left * cos_T1P, right, sin_T1P, value=-1),
                      torch.addcmul(right * cos_T1P, left, sin_T1P)], dim=-1)


class VAE(nn.Module):
    """Encoder, neck and decoder. `real_BT` (1 = chunk with weights, 0 = padding) may be None for
    windows without padding.  ready: trained, or exact; before that a code means nothing."""

    def __init__(self, config, generator=None):
        super().__init__()
        self.config, self.ready = config, False
        C, D, Z = config.chunk, config.width, config.latent
        self.embed, self.unembed = nn.Linear(C, D, bias=False), nn.Linear(D, C, bias=False)
        self.encoder = nn.ModuleList(Block(D, config.heads) for _ in range(config.blocks))
        self.decoder = nn.ModuleList(Block(D, config.heads) for _ in range(config.blocks))
        self.neck_mu, self.neck_logvar = nn.Linear(D, Z, bias=False), nn.Linear(D, Z)
        self.widen = nn.Linear(Z, D)
        for module in self.modules():       # the paper's random start: N(0, 1 / inputs), biases 0
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, module.in_features ** -0.5, generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._start()

    @torch.no_grad()
    def _start(self):
        """"random" (paper), ours: the last matrix of each branch over the root of their number, so
        that all branches together add what the stream holds. "pca": that matrix zero, the embedding
        an isometry, the unembedding its transpose. At r <= 1 the neck is set now, in the columns
        of the embedding; with "pca" z is then the standardised chunk itself."""
        exact, blocks = self.config.init == "pca", [*self.encoder, *self.decoder]
        for matrix in [last for block in blocks for last in (block.out, block.down)]:
            matrix.weight.mul_(0 if exact else (2 * len(blocks)) ** -0.5)
        isometry_DC = torch.linalg.qr(self.embed.weight.double()).Q.float()
        if exact:           # exact, as V E = 1
            self.embed.weight.copy_(isometry_DC)
            self.unembed.weight.copy_(isometry_DC.T)
        if self.config.true_ratio <= 1:
            self._fill_neck(torch.zeros(self.config.width), isometry_DC)
            self.ready = exact

    def _run(self, blocks, h_BTD, real_BT):
        T, K = h_BTD.shape[1], self.config.width // self.config.heads       # K numbers per head
        cos_T1P, sin_T1P = rotation(T, K, h_BTD.device, h_BTD.dtype)
        mask_B11T = None if real_BT is None else real_BT[:, None, None]     # 1: attended to
        for block in blocks:
            h_BTD = block(h_BTD, cos_T1P, sin_T1P, mask_B11T)
        return h_BTD

    def encode_stream(self, x_BTC, real_BT=None):
        """Stage 1's latent, (B, T, D)."""
        return self._run(self.encoder, self.embed(x_BTC), real_BT)

    def decode_stream(self, h_BTD, real_BT=None):
        """(B, T, D) -> (B, T, C)."""
        return self.unembed(self._run(self.decoder, h_BTD, real_BT))

    def encode(self, x_BTC, real_BT=None):
        """paper: z = E(X_emb), token-wise: q's parameters. widen.bias: the stream's mean."""
        h_BTD = self.encode_stream(x_BTC, real_BT)
        return Posterior(self.neck_mu(h_BTD - self.widen.bias), self.neck_logvar(h_BTD))

    def decode(self, z_BTZ, real_BT=None):
        """paper: W^ = D(z). (B, T, Z) -> (B, T, C)."""
        return self.decode_stream(self.widen(z_BTZ), real_BT)

    @torch.no_grad()
    def set_neck(self, mean_D, cov_DD):
        """Start stage 2, at r > 1, with the Z leading principal directions U of stage 1's latents:
        mu = U^T (h - mean),  h^ = U mu + mean  is the best linear code of Z numbers (Eckart-Young);
        mean: the bias of `widen`, for both."""
        embed_DC, D = self.embed.weight.double().cpu(), self.config.width
        # A little white noise, as seen through the embedding, ranks the directions that these data
        # leave empty (few or constant chunks): those that a chunk can reach come first.
        noise_DD = (1e-9 * cov_DD.diagonal().sum() + 1e-12) / D * embed_DC @ embed_DC.T
        directions_DD = torch.linalg.eigh(cov_DD.double() + noise_DD).eigenvectors.flip(1)
        self._fill_neck(mean_D, directions_DD[:, :self.config.latent])      # the largest first
        self.ready = True

    @torch.no_grad()
    def _fill_neck(self, mean_D, directions_DZ):
        """U, and the posterior variance s = sigma^2 that minimises Eq. 1 for a linear decoder: per
        latent number (U is orthonormal, so s in the code adds a squared error of s to the chunk)
            d/ds [s / 2 + beta (s - 1 - log s) / 2] = 0    =>    s = beta / (1 + beta)
        Example:  beta 1e-4 -> sigma 0.01; for a latent number of variance 1 the KL is then
                  (1 + 1e-4 - 1 - log 1e-4) / 2 = 4.605 nats, which is -log sigma."""
        unused = self.config.latent - directions_DZ.shape[1]        # at r < 1: they stay at 0
        directions_DZ = F.pad(directions_DZ, (0, unused))
        self.neck_mu.weight.copy_(directions_DZ.T)      # mu = U^T (h - mean)
        self.widen.weight.copy_(directions_DZ)          # h^ = U mu + mean
        self.widen.bias.copy_(mean_D)
        self.neck_logvar.weight.zero_()
        self.neck_logvar.bias.fill_(math.log(max(self.config.beta, 1e-12) / (1 + self.config.beta)))

    def to_file(self, record):
        """(tensors, header metadata) for a safetensors file; `record`: JSON-able facts."""
        return dict(self.state_dict()), {"lsmerge.vae": json.dumps(asdict(self.config)),
                                         "lsmerge.training": json.dumps(record)}

    @classmethod
    def from_file(cls, tensors, metadata):
        """The inverse: (vae, record); ValueError, TypeError or RuntimeError if it does not fit."""
        config = json.loads(metadata.get("lsmerge.vae", "{}"))
        if set(config) != {field.name for field in fields(VAEConfig)}:
            raise ValueError("no VAE, or one of an earlier version: train one with train.py")
        vae = cls(VAEConfig(**config))
        vae.load_state_dict(tensors)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("it holds NaN or Inf")
        vae.ready = True
        return vae, json.loads(metadata.get("lsmerge.training", "{}"))


class Folded(nn.Module):
    """A VAE whose blocks all add zero, as two products (E embed, U neck_mu, W widen, V unembed):
    mu = U (E x - mean) = A x + a,   x^ = V (W z + mean) = B z + b.   parts: A, a, B, b, logvar."""

    def __init__(self, vae):
        super().__init__()
        layers = vae.neck_mu, vae.embed, vae.widen, vae.unembed
        U, E, W, V = (layer.weight.detach().double() for layer in layers)
        mean_D = vae.widen.bias.detach().double()       # float64: the products are rounded once
        parts = U @ E, -U @ mean_D, V @ W, V @ mean_D, vae.neck_logvar.bias.detach()
        self.parts = nn.ParameterList(part.float() for part in parts)

    @staticmethod
    def possible(vae):
        last = [m for block in [*vae.encoder, *vae.decoder] for m in (block.out, block.down)]
        return not any(matrix.weight.any() for matrix in [*last, vae.neck_logvar])

    def encode(self, x_BTC, real_BT=None):
        mu_BTZ = F.linear(x_BTC, self.parts[0], self.parts[1])
        return Posterior(mu_BTZ, self.parts[4].expand_as(mu_BTZ))

    def decode(self, z_BTZ, real_BT=None):
        return F.linear(z_BTZ, self.parts[2], self.parts[3])


def sample(posterior, generator):
    """z = mu + sigma eps, eps ~ N(0, I): the only place where the codec is random."""
    eps = torch.randn(posterior.mu_BTZ.shape, generator=generator, device=generator.device)
    return posterior.mu_BTZ + (0.5 * posterior.logvar_BTZ).exp() * eps.to(posterior.mu_BTZ)


def generator_for(*key):
    """A source of noise for a key (seed, tensor, parent, first chunk): equal keys draw equal noise,
    in whatever order they are asked. Hashed, as torch uses only the low 32 bits of a seed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def masked_mse(decoded_BTC, x_BTC, real_BTC):
    """Mean squared error over real weights: padding is in neither the sum nor the count."""
    return (decoded_BTC[real_BTC] - x_BTC[real_BTC]).square().mean()


def kl_divergence(posterior, real_BT):
    """KL(q || N(0, I)) = (mu^2 + sigma^2 - 1 - log sigma^2) / 2: nats per real latent number."""
    mu, logvar = (part[real_BT] for part in posterior)      # selected: 0 x Inf would be NaN
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()


# total: Eq. 1, nats per weight; mse: per standardised weight (the NMSE); kl: per latent number.
Loss = namedtuple("Loss", "total mse kl")


def vae_loss(decoded_BTC, posterior, x_BTC, real_BTC, beta, ratio):
    """paper: Eq. 1,  -E_q[log p(w | z)] + beta KL(q(z | w) || N(0, I)).
    ours: p(w | z) is a Gaussian of unit variance on standardised weights. Per weight, and up to a
    constant, Eq. 1 is then  mse / 2 + (beta / r) kl, with 1 / r latent numbers per weight."""
    mse = masked_mse(decoded_BTC, x_BTC, real_BTC)
    kl = kl_divergence(posterior, real_BTC.any(dim=-1))
    return Loss(mse / 2 + beta / ratio * kl, mse, kl)
