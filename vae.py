"""vae.py: the transformer VAE on weight chunks.                                    (read third, after chunking.py)

    x_BTC --embed--> h_BTD --blocks--> h_BTD --neck--> mu_BTZ, logvar_BTZ                     encode, q(z | w)
    z_BTZ --widen--> h_BTD --blocks--> h_BTD --unembed--> x_BTC                               decode, p(w | z)

Paper: Sec. 3.2, Eq. 1 and the two-stage curriculum. Stage 1 is the network without its neck: a deterministic
autoencoder whose latent is the D numbers of the stream per chunk (high capacity). Stage 2 inserts the neck, D -> Z.
Letters as in lsmerge.py: B windows, T chunks per window, C weights per chunk, D width, Z latent numbers per chunk.

Why the whole thing can start out exact (ours: `init="pca"`): a pre-norm transformer is  x + f_1(x) + f_2(x) + ...;
with the last matrix of every f at zero it is the identity, so the stream carries the embedded chunk untouched. If
the embedding is an isometry (D >= C) and the neck holds the Z leading principal directions, then the untrained
network IS the best linear autoencoder (Eckart-Young): exact at r = C / Z <= 1, PCA at r > 1, and below PCA where each
tensor has a neck of its own (`own_neck`): knowing where a chunk comes from is worth more than training. Three things would
break this and are therefore absent: positions added to the stream (they enter by rotation, inside attention),
a final norm on the stream, and a nonlinearity in the heads.

Not tried or not kept: token down-sampling, learned positions, dropout, companding, Huber loss, pooled latents.
"""
import functools, json, math
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class VAEConfig:
    chunk: int = 64             # C, weights per chunk. paper: 640. ours: small, so that a tensor of 16,384 weights
    #                             gives n = 256 >= 4 d samples for the d x d statistics of Sec. 3.3
    tokens: int = 16            # T, chunks per window: attention sees T C = 1,024 weights of one tensor
    ratio: float = 1.0          # r = C / Z, weights per latent number. paper: 1.6, 2, 4; its release: 1.0
    width: int = 128            # D, numbers per chunk inside the network. paper's release: 768
    blocks: int = 2             # in the encoder, and again in the decoder. paper: 6; its release: 4
    heads: int = 2              # paper's release: 4
    init: str = "pca"           # "pca" (ours, see above) or "random" (the paper's)
    beta: float = 1e-4          # weight of the KL in Eq. 1: a posterior deviation near sqrt(beta) = 1 % of the weights'
    necks: str = "tensor"       # "tensor": where r > 1, each layer, role and shape of the training files has a neck of its own; "one":
    #                             all share one
    places: tuple = ()          # those tensors (`TensorSlot.key`); filled in by the training

    def __post_init__(self):
        for name in ("chunk", "tokens", "width", "blocks", "heads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < (0 if name == "blocks" else 1):
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be a positive whole number")
        if self.init not in ("pca", "random"):
            raise ValueError(f"init is {self.init!r}, must be 'pca' or 'random'")
        if self.necks not in ("tensor", "one"):
            raise ValueError(f"necks is {self.necks!r}, must be 'tensor' or 'one'")
        if not isinstance(self.places, tuple) or not all(isinstance(key, str) for key in self.places) or len(set(self.places)) < len(self.places):
            raise ValueError("places must be different names")
        if not (math.isfinite(self.ratio) and self.ratio >= 0.01 and self.latent >= 1):
            raise ValueError(f"ratio is {self.ratio!r}, must be at least 0.01 and at most the chunk size {self.chunk}")
        if max(self.chunk, self.tokens, self.width) > 2 ** 16:
            raise ValueError("chunk, tokens and width must not exceed 65,536")
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(f"beta is {self.beta!r}, must be 0 or more")
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of 2 x heads = {2 * self.heads} (rotation needs pairs)")
        if self.init == "pca" and self.width < self.chunk:
            raise ValueError(f"width {self.width} is below chunk {self.chunk}: init 'pca' needs room for a whole chunk")

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


class Loss(NamedTuple):
    """Eq. 1 and its parts, each a mean: `total` per weight in nats, `kl` per latent number in nats."""
    total: torch.Tensor
    mse: torch.Tensor           # mean squared error per real weight, standardised: the NMSE
    kl: torch.Tensor


class Block(nn.Module):
    """Pre-norm transformer block: h + Attention(norm h), then h + SwiGLU(norm h)."""

    def __init__(self, D, heads):
        super().__init__()
        hidden = -(-8 * D // 3 // 8) * 8                   # 8/3 D: as many numbers as a plain MLP of 4 D
        self.heads, self.idle = heads, False               # idle: see `skip_idle`
        self.norm_attention, self.norm_mlp = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.gate_up = nn.Linear(D, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)

    def forward(self, h_BTD, cos_T1K, sin_T1K, keys_B11T):
        B, T, D = h_BTD.shape
        qkv = self.qkv(self.norm_attention(h_BTD)).view(B, T, 3 * self.heads, D // self.heads)
        q, k = rotate(qkv[:, :, :2 * self.heads], cos_T1K, sin_T1K).transpose(1, 2).chunk(2, dim=1)    # 2 x (B, H, T, K)
        mixed = F.scaled_dot_product_attention(q, k, qkv[:, :, 2 * self.heads:].transpose(1, 2), attn_mask=keys_B11T)
        h_BTD = h_BTD + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        gate, up = self.gate_up(self.norm_mlp(h_BTD)).chunk(2, dim=-1)
        return h_BTD + self.down(F.silu(gate) * up)


@functools.lru_cache(maxsize=8)      # two small tables, but for every block and batch anew they cost a fiftieth of the time
@torch.inference_mode(False)         # made within a merge, they must still serve a training
def rotation(T, K, device, dtype, base=10_000.0):
    """cos and sin of RoPE, each (T, 1, K / 2): pair p of position t turns by t / base^(2 p / K).  paper's release: RoPE."""
    angle_TK = torch.outer(torch.arange(T), base ** (-torch.arange(0, K, 2) / K))[:, None]
    return angle_TK.cos().to(device, dtype), angle_TK.sin().to(device, dtype)


def rotate(q_BTHK, cos_T1K, sin_T1K):
    """Turn each pair (q[p], q[p + K / 2]) by its angle."""
    left, right = q_BTHK.chunk(2, dim=-1)
    return torch.cat([torch.addcmul(left * cos_T1K, right, sin_T1K, value=-1),
                      torch.addcmul(right * cos_T1K, left, sin_T1K)], dim=-1)


class VAE(nn.Module):
    """Encoder, neck and decoder. Every method takes `real_BT` (bool, 1 = chunk with weights, 0 = padding) or None
    for windows without padding, which spares the attention its mask; encode and decode also `place`: which tensor the
    windows come from, as a number that `place_of` gives (one for all, or (B,) of them); None, the shared neck."""

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        C, D, Z = config.chunk, config.width, config.latent
        self.embed, self.unembed = nn.Linear(C, D, bias=False), nn.Linear(D, C, bias=False)
        self.encoder = nn.ModuleList(Block(D, config.heads) for _ in range(config.blocks))
        self.decoder = nn.ModuleList(Block(D, config.heads) for _ in range(config.blocks))
        self.neck_mu, self.neck_logvar, self.widen = nn.Linear(D, Z, bias=False), nn.Linear(D, Z), nn.Linear(Z, D)
        self.own_mu = nn.Parameter(torch.zeros(len(config.places), Z, D))          # what a tensor's neck adds to the shared one
        self.own_widen = nn.Parameter(torch.zeros(len(config.places), D, Z))
        self.reset(generator)

    def place_of(self, key):
        return self.config.places.index(key) if key in self.config.places else None

    @torch.no_grad()
    def reset(self, generator=None):
        """Draw all weights from `generator` (never from the global state): N(0, 1 / inputs) for each matrix.

        init="pca": then the embedding becomes an isometry, orthonormal columns, its transpose the unembedding, and
        the last matrix of each branch zero. That already makes stage 1 exact; `set_neck` does the rest.
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

    def skip_idle(self):
        """From now on pass over blocks that add exactly nothing (both last matrices zero: the warm start, where training had
        nothing to learn), until training goes on. What is left of the exact codec are embedding and neck: small products."""
        for block in [*self.encoder, *self.decoder]:
            block.idle = not (block.out.weight.any() or block.down.weight.any())
        return self

    def train(self, mode=True):
        for block in [*self.encoder, *self.decoder] if mode else []:
            block.idle = False
        return super().train(mode)

    def _run(self, blocks, h_BTD, real_BT):
        T, K = h_BTD.shape[1], self.config.width // self.config.heads
        cos_T1K, sin_T1K = rotation(T, K, h_BTD.device, h_BTD.dtype)
        keys_B11T = None if real_BT is None else real_BT[:, None, None, :]      # nobody looks at a padding chunk
        for block in blocks:
            if not block.idle:
                h_BTD = block(h_BTD, cos_T1K, sin_T1K, keys_B11T)
        return h_BTD

    def encode_stream(self, x_BTC, real_BT=None):
        """Stage 1's latent, (B, T, D)."""
        return self._run(self.encoder, self.embed(x_BTC), real_BT)

    def decode_stream(self, h_BTD, real_BT=None):
        return self.unembed(self._run(self.decoder, h_BTD, real_BT))

    def encode(self, x_BTC, real_BT=None, place=None):
        """paper: z = E(X_emb), token-wise.  Deterministic: the posterior's parameters, never a sample of it."""
        h_BTD = self.encode_stream(x_BTC, real_BT)
        neck_ZD = self.neck_mu.weight if place is None else self.neck_mu.weight + self.own_mu[place]       # or (B, Z, D)
        return Posterior((h_BTD - self.widen.bias) @ neck_ZD.mT, self.neck_logvar(h_BTD))

    def decode(self, z_BTZ, real_BT=None, place=None):
        """paper: W^ = D(z).  (B, T, Z) -> (B, T, C)."""
        widen_DZ = self.widen.weight if place is None else self.widen.weight + self.own_widen[place]
        return self.decode_stream(z_BTZ @ widen_DZ.mT + self.widen.bias, real_BT)

    def _principal(self, cov_DD):
        """(D, Z) leading eigenvectors. Latent numbers beyond D (r < 1) stay unused."""
        embed_DC, trace, D = self.embed.weight.double().cpu(), cov_DD.diagonal().sum(), self.config.width
        # A trace of white noise, as seen through the embedding, ranks the directions that these data leave empty
        # (few or constant chunks): r = 1 then stays exact for any weights, not only for those seen here.
        cov_DD = cov_DD.double() + (1e-9 * trace + 1e-12) / D * embed_DC @ embed_DC.T
        directions_DZ = torch.linalg.eigh(cov_DD).eigenvectors.flip(1)[:, :self.config.latent]
        return F.pad(directions_DZ, (0, self.config.latent - directions_DZ.shape[1]))

    @torch.no_grad()
    def set_neck(self, mean_D, cov_DD):
        """Start stage 2: the neck takes the Z leading principal directions U of the stage-1 latents,

            mu = U^T (h - mean),   h^ = U mu + mean,   sigma^2 = beta / (1 + beta)          (mean: the bias of `widen`, for both)

        the best linear code of Z numbers for this encoder (Eckart-Young), and with it the posterior variance that
        is optimal for Eq. 1 where the code keeps unit variance and the decoder is linear:
        d/ds [s / 2 + beta (s - 1 - log s) / 2] = 0.
        """
        directions_DZ = self._principal(cov_DD)
        sigma2 = max(self.config.beta, 1e-12) / (1 + self.config.beta)
        self.neck_mu.weight.copy_(directions_DZ.T)
        self.widen.weight.copy_(directions_DZ)
        self.widen.bias.copy_(mean_D)
        self.neck_logvar.weight.zero_()
        self.neck_logvar.bias.fill_(math.log(sigma2))
        self.own_mu.zero_()
        self.own_widen.zero_()

    @torch.no_grad()
    def own_neck(self, here, everywhere, strength=1):
        """What a tensor's own neck, the principal directions of its own latents, adds to the shared one: (D, Z) float64.

        here, everywhere: align.Moments of the stage-1 latents of this tensor and of all. After `set_neck`.
        ours: shrunk towards all tensors as if strength x C more chunks had come from anywhere, as few chunks memorise their directions;
        and turned, within the space that they span, as near as possible to the shared directions (orthogonal Procrustes):
        a latent number then means the same in every tensor as far as it can, and at r = 1 nothing would be added.
        """
        share, shift_D = here.n / (here.n + strength * self.config.chunk), here.mean_Z - everywhere.mean_Z
        second_DD = here.cov_ZZ + torch.outer(shift_D, shift_D)
        directions_DZ = self._principal(share * second_DD + (1 - share) * everywhere.cov_ZZ)
        shared_DZ = self.widen.weight.double().cpu()      # moments are gathered there
        left_ZZ, _, right_ZZ = torch.linalg.svd(directions_DZ.T @ shared_DZ)
        return directions_DZ @ left_ZZ @ right_ZZ - shared_DZ

    @torch.no_grad()
    def set_own_necks(self, own_GDZ):
        """G necks in the order of `config.places`."""
        self.own_mu.copy_(own_GDZ.mT)
        self.own_widen.copy_(own_GDZ)

    def to_file(self, record):
        """(tensors, header metadata) for a safetensors file. `record`: JSON-able facts of the training."""
        return dict(self.state_dict()), {"lsmerge.vae": json.dumps(asdict(self.config)), "lsmerge.training": json.dumps(record)}

    @classmethod
    def from_file(cls, tensors, metadata):
        """Inverse of to_file: (vae, record).  Raises ValueError where the file is not a VAE or does not fit itself."""
        try:
            config = json.loads(metadata["lsmerge.vae"])
            record = json.loads(metadata.get("lsmerge.training", "{}"))
        except (KeyError, ValueError, RecursionError):
            raise ValueError("not a VAE of this project (no configuration in the header)") from None
        known = {field.name for field in fields(VAEConfig)}
        if not isinstance(config, dict) or set(config) != known:
            raise ValueError(f"its configuration is not {sorted(known)}")
        try:
            vae = cls(VAEConfig(**config | {"places": tuple(config["places"]) if isinstance(config["places"], list) else None}))
        except TypeError:
            raise ValueError("its configuration holds values of the wrong type") from None
        expected = {name: tuple(t.shape) for name, t in vae.state_dict().items()}
        for name in sorted(set(expected) ^ set(tensors)):
            raise ValueError(f"tensor {name!r} is " + ("missing" if name in expected else "not part of the configured network"))
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"tensor {name!r} has shape {tuple(tensors[name].shape)}, its configuration needs {shape}")
            if not torch.isfinite(tensors[name].float()).all():
                raise ValueError(f"tensor {name!r} holds NaN or Inf")
        vae.load_state_dict(tensors)
        return vae, record


def sample(posterior, generator, rank=0, size=1):
    """z = mu + sigma eps, eps ~ N(0, I): the only place where the codec is random, and only through a generator.

    rank, size: these windows are every size-th, from the rank-th on, of a batch that several processes share; each draws
    the noise of the whole batch, so that the generators stay in step with each other and with that of one process alone.
    """
    B, T, Z = posterior.mu_BTZ.shape
    eps_BTZ = torch.randn((B * size, T, Z), generator=generator, device=generator.device)[rank::size]
    return posterior.mu_BTZ + (0.5 * posterior.logvar_BTZ).exp() * eps_BTZ.to(posterior.mu_BTZ)


def masked_mse(x_BTC, target_BTC, real_BTC):
    """Mean squared error per real weight: padding counts neither above nor below the fraction line."""
    return (x_BTC[real_BTC] - target_BTC[real_BTC]).square().mean()


def kl_divergence(posterior, real_BT):
    """KL(q(z | w) || N(0, I)) in nats, mean per latent number of real chunks.

        KL = (mu^2 + sigma^2 - 1 - log sigma^2) / 2
    """
    mu, logvar = (part[real_BT] for part in posterior)     # selected, not multiplied by 0: 0 x Inf would be NaN
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()


def vae_loss(decoded_BTC, posterior, x_BTC, real_BTC, beta, ratio, weights=1.0, chunks=1.0):
    """paper: Eq. 1,  -E_q[log p(w | z)] + beta KL(q(z | w) || N(0, I)).

    ours: p(w | z) is a Gaussian of unit variance on standardised weights; divided by the number of weights, and up to
    a constant, Eq. 1 is  mse / 2 + (beta / r) kl,  as there are 1 / r latent numbers per weight.
    weights, chunks: the fractions of a shared batch that are here (`train.stage_loss`).
    """
    mse = masked_mse(decoded_BTC, x_BTC, real_BTC)
    kl = kl_divergence(posterior, real_BTC.any(dim=-1))
    return Loss(weights * mse / 2 + chunks * beta / ratio * kl, mse, kl)
