"""vae.py: the transformer VAE on weight chunks.                                  (read third)

    x_BTC --embed--> h_BTD --blocks--> h_BTD --neck----> mu_BTZ, logvar_BTZ     encode, q(z | w)
    z_BTZ --widen--> h_BTD --blocks--> h_BTD --unembed-> x_BTC                  decode, p(w | z)

Paper: Sec. 3.2, Eq. 1 and the two-stage curriculum. Stage 1 is the network without its neck: a
deterministic autoencoder whose latent is the stream itself, D numbers per chunk (high capacity).
Stage 2 inserts the neck, D -> Z. Letters: B windows, T chunks per window, C weights per chunk, D
width, Z latent numbers per chunk. Example: 64 windows of 16 chunks of 64 weights are x (64, 16,
64), h (64, 16, 128) and at r = 1 mu (64, 16, 64).

Why the network can start out exact (ours: init="pca"). A pre-norm transformer computes
x + f_1(x) + f_2(x) + ...; with the last matrix of every f at zero it is the identity, and the stream
carries the embedded chunk untouched. If the embedding is an isometry (D >= C) and the neck holds
the Z leading principal directions, the untrained network IS the best linear autoencoder
(Eckart-Young): exact at r = C / Z <= 1, PCA at r > 1. Three things would break this and are
therefore absent: positions added to the stream (they enter by rotation, inside attention), a final
norm on the stream, a nonlinearity in the heads.

Not tried or not kept: token down-sampling, learned positions, dropout, companding, Huber loss,
pooled latents, a neck of its own for each tensor.
"""
import functools, json, math
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class VAEConfig:
    chunk: int = 64         # C, weights per chunk. paper: 640. ours: small, so that a tensor of 16,384
    #                         weights gives n = 256 >= 4 d samples for the statistics of Sec. 3.3
    tokens: int = 16        # T, chunks per window: attention sees T C = 1,024 weights of one tensor
    ratio: float = 1.0      # r = C / Z. paper: 1.6, 2, 4; its release: 1.0
    width: int = 128        # D, numbers per chunk inside the network. paper's release: 768
    blocks: int = 2         # in the encoder, and again in the decoder. paper: 6; its release: 4
    heads: int = 2          # paper's release: 4
    init: str = "pca"       # "pca" (ours, see above) or "random" (the paper's)
    beta: float = 1e-4      # weight of the KL in Eq. 1: a posterior deviation near sqrt(beta) = 1 %
    #                         of the weights'

    def __post_init__(self):
        for name in ("chunk", "tokens", "width", "heads", "blocks"):
            value, least = getattr(self, name), 0 if name == "blocks" else 1
            if not isinstance(value, int) or not least <= value <= 2 ** 16:
                raise ValueError(f"{name} is {value!r}, must be a whole number, {least} to 65,536")
        for right, what in (
                (self.init in ("pca", "random"), f"init is {self.init!r}, must be 'pca' or 'random'"),
                (0.01 <= self.ratio <= self.chunk, f"ratio {self.ratio}: must be 0.01 to chunk"),
                (0 <= self.beta < math.inf, f"beta is {self.beta}, must be 0 or more"),
                (self.width % (2 * self.heads) == 0, f"width {self.width} must be a multiple of 2 x "
                 f"heads = {2 * self.heads} (rotation needs pairs)"),
                (self.init == "random" or self.width >= self.chunk, f"width {self.width} is below chunk "
                 f"{self.chunk}: init 'pca' needs room for a whole chunk")):
            if not right:
                raise ValueError(what)

    @property
    def latent(self):           # Z, rounded to a whole number
        return round(self.chunk / self.ratio)

    @property
    def true_ratio(self):       # r after that rounding: what is reported
        return self.chunk / self.latent


class Posterior(NamedTuple):
    """q(z | w) = N(mu, exp(logvar)), diagonal."""
    mu_BTZ: torch.Tensor
    logvar_BTZ: torch.Tensor


class Block(nn.Module):
    """Pre-norm transformer block: h + Attention(norm h), then h + SwiGLU(norm h)."""

    def __init__(self, D, heads):
        super().__init__()
        hidden = -(-8 * D // 3 // 8) * 8        # 8/3 D: as many numbers as a plain MLP of 4 D
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.gate_up = nn.Linear(D, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)

    def forward(self, h_BTD, cos_T1K, sin_T1K, keys_B11T):
        B, T, D = h_BTD.shape
        qkv = self.qkv(self.norm_attention(h_BTD)).view(B, T, 3 * self.heads, D // self.heads)
        qk = rotate(qkv[:, :, :2 * self.heads], cos_T1K, sin_T1K).transpose(1, 2)
        q, k = qk.chunk(2, dim=1)                               # each (B, heads, T, K)
        v = qkv[:, :, 2 * self.heads:].transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys_B11T)
        h_BTD = h_BTD + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        gate, up = self.gate_up(self.norm_mlp(h_BTD)).chunk(2, dim=-1)
        return h_BTD + self.down(F.silu(gate) * up)


@functools.lru_cache(maxsize=8)     # two small tables; made anew for every block, they cost 2 % of the time
@torch.inference_mode(False)        # made within a merge, they must still serve a training
def rotation(T, K, device, dtype, base=10_000.0):
    """cos and sin of RoPE, each (T, 1, K / 2): pair p of position t turns by t / base^(2 p / K)."""
    angle_TK = torch.outer(torch.arange(T), base ** (-torch.arange(0, K, 2) / K))[:, None]
    return angle_TK.cos().to(device, dtype), angle_TK.sin().to(device, dtype)


def rotate(q_BTHK, cos_T1K, sin_T1K):
    """Turn each pair (q[p], q[p + K / 2]) by its angle. paper's release: RoPE."""
    left, right = q_BTHK.chunk(2, dim=-1)
    return torch.cat([torch.addcmul(left * cos_T1K, right, sin_T1K, value=-1),
                      torch.addcmul(right * cos_T1K, left, sin_T1K)], dim=-1)


class VAE(nn.Module):
    """Encoder, neck and decoder. Every method takes `real_BT` (bool, 1 = chunk with weights, 0 =
    padding), or None for windows without padding, which spares the attention its mask.

    ready: whether the neck has been set; before that a code means nothing.
    """

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        C, D, Z = config.chunk, config.width, config.latent
        self.embed, self.unembed = nn.Linear(C, D, bias=False), nn.Linear(D, C, bias=False)
        self.encoder = nn.ModuleList(Block(D, config.heads) for _ in range(config.blocks))
        self.decoder = nn.ModuleList(Block(D, config.heads) for _ in range(config.blocks))
        self.neck_mu, self.neck_logvar = nn.Linear(D, Z, bias=False), nn.Linear(D, Z)
        self.widen = nn.Linear(Z, D)
        self.ready = False
        self.reset(generator)

    @torch.no_grad()
    def reset(self, generator=None):
        """Draw all weights from `generator`: N(0, 1 / inputs) for each matrix.

        init="pca": then the embedding becomes an isometry (orthonormal columns), the unembedding its
        transpose, and the last matrix of each branch zero: stage 1 is exact. At r <= 1 any orthonormal
        basis of the embedded chunks is an exact neck, so that the embedding's own columns serve, and
        the codec is exact as built: z is the standardised chunk itself.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features ** -0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        if self.config.init == "pca":
            isometry_DC = torch.linalg.qr(self.embed.weight.double()).Q.float()
            self.embed.weight.copy_(isometry_DC)
            self.unembed.weight.copy_(isometry_DC.T)
            for block in [*self.encoder, *self.decoder]:
                block.out.weight.zero_()
                block.down.weight.zero_()
            if self.config.latent >= self.config.chunk:
                self._fill_neck(torch.zeros(self.config.width), isometry_DC)

    def _run(self, blocks, h_BTD, real_BT):
        T, K = h_BTD.shape[1], self.config.width // self.config.heads
        cos_T1K, sin_T1K = rotation(T, K, h_BTD.device, h_BTD.dtype)
        keys_B11T = None if real_BT is None else real_BT[:, None, None, :]      # nobody looks at padding
        for block in blocks:
            h_BTD = block(h_BTD, cos_T1K, sin_T1K, keys_B11T)
        return h_BTD

    def encode_stream(self, x_BTC, real_BT=None):
        """Stage 1's latent, (B, T, D)."""
        return self._run(self.encoder, self.embed(x_BTC), real_BT)

    def decode_stream(self, h_BTD, real_BT=None):
        """(B, T, D) -> (B, T, C)."""
        return self.unembed(self._run(self.decoder, h_BTD, real_BT))

    def encode(self, x_BTC, real_BT=None):
        """paper: z = E(X_emb), token-wise.  The posterior's parameters, never a sample of it."""
        h_BTD = self.encode_stream(x_BTC, real_BT)
        return Posterior(self.neck_mu(h_BTD - self.widen.bias), self.neck_logvar(h_BTD))

    def decode(self, z_BTZ, real_BT=None):
        """paper: W^ = D(z).  (B, T, Z) -> (B, T, C)."""
        return self.decode_stream(self.widen(z_BTZ), real_BT)

    @torch.no_grad()
    def set_neck(self, mean_D, cov_DD):
        """Start stage 2: the neck takes the Z leading principal directions U of stage 1's latents,

            mu = U^T (h - mean),   h^ = U mu + mean            (mean: the bias of `widen`, for both)

        the best linear code of Z numbers for this encoder (Eckart-Young).
        """
        embed_DC, D = self.embed.weight.double().cpu(), self.config.width
        # A trace of white noise, as seen through the embedding, ranks the directions that these data
        # leave empty (few or constant chunks): r = 1 then stays exact for any weights.
        noise_DD = (1e-9 * cov_DD.diagonal().sum() + 1e-12) / D * embed_DC @ embed_DC.T
        directions_DZ = torch.linalg.eigh(cov_DD.double() + noise_DD).eigenvectors.flip(1)
        self._fill_neck(mean_D, directions_DZ[:, :self.config.latent])

    @torch.no_grad()
    def _fill_neck(self, mean_D, directions_DZ):
        """Fill in U, and with it the posterior variance that is optimal for Eq. 1 where the code keeps
        unit variance and the decoder is linear:

            d/ds [s / 2 + beta (s - 1 - log s) / 2] = 0   =>   s = sigma^2 = beta / (1 + beta)

        Example:  beta 1e-4 -> sigma 0.01; per latent number of variance 1 the KL is then
                  (1 + 1e-4 - 1 - log 1e-4) / 2 = 4.605 nats, which is -log sigma.
        """
        unused = self.config.latent - directions_DZ.shape[1]        # at r < 1 some numbers stay unused
        directions_DZ = F.pad(directions_DZ, (0, max(0, unused)))
        self.neck_mu.weight.copy_(directions_DZ.T)
        self.widen.weight.copy_(directions_DZ)
        self.widen.bias.copy_(mean_D)
        self.neck_logvar.weight.zero_()
        self.neck_logvar.bias.fill_(math.log(max(self.config.beta, 1e-12) / (1 + self.config.beta)))
        self.ready = True

    def to_file(self, record):
        """(tensors, header metadata) for a safetensors file; `record`: JSON-able facts."""
        return dict(self.state_dict()), {"lsmerge.vae": json.dumps(asdict(self.config)),
                                         "lsmerge.training": json.dumps(record)}

    @classmethod
    def from_file(cls, tensors, metadata):
        """The inverse: (vae, record).  Raises ValueError where the file does not fit itself."""
        config = json.loads(metadata.get("lsmerge.vae", "{}"))
        if set(config) != {field.name for field in fields(VAEConfig)}:
            raise ValueError("not a VAE of this version: train one with train.py")
        vae = cls(VAEConfig(**config))
        try:
            vae.load_state_dict(tensors)
        except RuntimeError as error:       # its first line only says that there are errors
            raise ValueError(" ".join(str(error).split("\n")[1].split())) from None
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("it holds NaN or Inf")
        vae.ready = True
        return vae, json.loads(metadata.get("lsmerge.training", "{}"))


class Folded(nn.Module):
    """A VAE whose blocks all add exactly zero, as two products:

        mu = U (E x - mean)   and   x^ = V (W z + mean)     are     A x + a   and   B z + b
    """

    def __init__(self, vae):
        super().__init__()
        U, E, W, V, mean_D = (part.detach().double() for part in (
            vae.neck_mu.weight, vae.embed.weight, vae.widen.weight, vae.unembed.weight, vae.widen.bias))
        parts = U @ E, -U @ mean_D, V @ W, V @ mean_D, vae.neck_logvar.bias
        self.parts = nn.ParameterList(part.detach().float() for part in parts)

    @staticmethod
    def fits(vae):
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


def masked_mse(x_BTC, target_BTC, real_BTC):
    """Mean squared error per real weight: padding counts neither above nor below the fraction line."""
    return (x_BTC[real_BTC] - target_BTC[real_BTC]).square().mean()


def kl_divergence(posterior, real_BT):
    """KL(q(z | w) || N(0, I)) in nats, mean per latent number of real chunks.

        KL = (mu^2 + sigma^2 - 1 - log sigma^2) / 2
    """
    mu, logvar = (part[real_BT] for part in posterior)  # selected, not multiplied by 0: 0 x Inf is NaN
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()


class Loss(NamedTuple):
    """Eq. 1 and its parts, each a mean."""
    total: torch.Tensor     # per weight, in nats
    mse: torch.Tensor       # per real weight, standardised: the NMSE
    kl: torch.Tensor        # per latent number, in nats


def vae_loss(decoded_BTC, posterior, x_BTC, real_BTC, beta, ratio):
    """paper: Eq. 1,  -E_q[log p(w | z)] + beta KL(q(z | w) || N(0, I)).

    ours: p(w | z) is a Gaussian of unit variance on standardised weights. Divided by the number of
    weights, and up to a constant, Eq. 1 is  mse / 2 + (beta / r) kl:  1 / r latent numbers per weight.
    """
    mse = masked_mse(decoded_BTC, x_BTC, real_BTC)
    kl = kl_divergence(posterior, real_BTC.any(dim=-1))
    return Loss(mse / 2 + beta / ratio * kl, mse, kl)
