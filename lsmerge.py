"""lsmerge.py: LS-Merge on one screen.                                             (read first)

    checkpoint -> chunks -> latents -> projected, transported -> merged latents -> chunks -> weights
        W           X         z               z~                     z_lambda         X^         W^

`ls_merge`, at the end of this file, is the method for one tensor: encode, align, merge, decode.
Which tensors meet is decided in merge.py; the arrows are made in chunking.py, vae.py and align.py.

Dimension key (a suffix names a tensor's axes):
    L  weights of a tensor          C  weights per chunk        N  chunks of a tensor
    T  chunks per window            B  windows in a batch       D  width of the network
    Z  latent numbers per chunk     I  source chunks            J  target chunks

Paper                           here                                    where
    w in R^L, c, n = L_p / c    flat_L, C, N; padding in real_NC        chunking.chunk
    E, D (encoder, decoder)     Codec.encode, Codec.decode              below; the network in vae.py
    q(z | w)                    Posterior(mu_BTZ, logvar_BTZ)           vae.VAE.encode
    Eq. 1, beta                 vae_loss, VAEConfig.beta                vae.py
    lambda                      lam: the weight of a SOURCE; 0 is the target's round trip
    z_s, z_t, z~, z_lambda      z_source, z_target, z_aligned, z_merged
    r = n_t N_t / (n_s N_s)     (never formed: project takes both sizes)    align.project
    r (compression)             VAEConfig.ratio = C / Z
    T*, A of Eq. 2              align.gaussian_map; entropic: align.sinkhorn, barycentric_map
    Algorithm 1, line 1         align.pair_layers, merge.plan_merge
    Algorithm 1, lines 2 to 6   ls_merge

A worked example: a q_proj of 128 x 128 has L = 16,384 weights: with C = 64 these are N = 256
chunks, with T = 16 B = 16 windows; at r = 1 a chunk has Z = 64 latent numbers. All of it is one
piece: tensors are merged in pieces of 2^18 weights, so that memory does not depend on their size.
"""
import copy, math
from dataclasses import dataclass
from typing import Callable, NamedTuple

import numpy as np
import torch

import align as ot
from chunking import (PIECE, Checkpoint, CheckpointError, TensorSlot, chunk, from_windows, need,
                      scale, spans, to_windows, unchunk, unscale)
from vae import VAE, Folded, Posterior, VAEConfig, sample

BATCH_CHUNKS = 512      # per forward pass: many enough for the matrix units, few enough for a cache


class Codec:
    """E and D on the chunks of one tensor: a VAE with its device and arithmetic."""

    def __init__(self, vae, device="cpu", dtype=torch.float32, record=None, files=()):
        if not vae.ready:
            raise ValueError("the VAE was never trained: do that first (train.train_vae)")
        self.vae, self.record, self.files = vae, record or {}, [*files]    # vae: for train.py
        self.device, self.dtype = device, dtype
        self.C, self.T, self.Z = vae.config.chunk, vae.config.tokens, vae.config.latent
        self.linear = Folded.possible(vae)      # then two products, of any number of chunks at once
        net = Folded(vae) if self.linear else copy.deepcopy(vae)
        self.net = net.to(device, dtype).eval().requires_grad_(False)

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """A codec from a VAE file; "exact": the untrained network, exact at r = 1.

        ours: "exact" is the null model of the method. Its encoder and decoder are linear and each
        other's inverse, so that merging latents is merging weights: LS-Merge = plain averaging.
        """
        if path == "exact":
            return cls(VAE(VAEConfig(), torch.Generator().manual_seed(0)), device, dtype)
        file = Checkpoint(path)
        try:
            tensors = {name: file.read_tensor(name) for name in file.entries}
            vae, record = VAE.from_file(tensors, file.metadata)
        except (ValueError, TypeError, RuntimeError) as error:
            what = " ".join(str(error).split())
            raise CheckpointError(path, what, "pass a file that train.py wrote") from None
        return cls(vae, device, dtype, record, file.files)

    def _batches(self, rows_NX, real_N1):
        """Windows of T rows, some at a time; the mask only where a window is not full."""
        x_BTX, real_BT1 = to_windows(rows_NX, real_N1, self.T)
        step = len(x_BTX) if self.linear else BATCH_CHUNKS // self.T
        for start, stop in spans(len(x_BTX), max(1, step)):
            real_BT = real_BT1[start:stop, :, 0]
            yield x_BTX[start:stop].to(self.dtype), None if real_BT.all() else real_BT

    @torch.inference_mode()
    def encode(self, flat_L, slot, samples=0, generator=None, prior=False):
        """z = E(w): (N, Z) float32.  flat_L: raw weights, whole windows or a tensor's end.

        samples = 0: the posterior mean; K: the mean of K draws from q(z | w) (paper: self-merging),
        or, with `prior`, from N(0, I).
        """
        chunks_NC, real_NC = chunk(scale(flat_L.to(self.device), slot), self.C)
        parts = []
        for x_BTC, real_BT in self._batches(chunks_NC, real_NC[:, :1]):
            q = self.net.encode(x_BTC, real_BT)
            q = Posterior(*(torch.zeros_like(part) for part in q)) if prior else q
            drawn = sum(sample(q, generator) for _ in range(samples))   # K take no more memory
            parts.append(drawn / samples if samples else q.mu_BTZ)
        return from_windows(torch.cat(parts), len(chunks_NC)).float()

    @torch.inference_mode()
    def decode(self, z_NZ, slot, L):
        """W^ = D(z): the first L weights, (L,) float32, in the slot's unit: scale D(z) + mean."""
        ones_N1 = torch.ones(len(z_NZ), 1, dtype=torch.bool, device=z_NZ.device)
        parts = [self.net.decode(z_BTZ, real_BT) for z_BTZ, real_BT in self._batches(z_NZ, ones_N1)]
        return unscale(unchunk(from_windows(torch.cat(parts), len(z_NZ)), L), slot)


def generator_for(*key):
    """Noise by a key of whole numbers, mixed (torch looks at the low 32 bits of a seed only): the
    same place in the same run draws the same noise, whoever asks, in whatever order."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


class Parent(NamedTuple):
    """One tensor of one model: how to read it, its statistics, its codec."""
    read: Callable              # (start, stop) -> those elements of the flattened tensor
    slot: TensorSlot
    codec: Codec
    samples: int = 0            # K draws from the posterior, averaged; 0: its mean
    seed: tuple = (0,)          # of those draws
    prior: bool = False         # draws from N(0, I) instead: for the experiments

    @property
    def N(self): return self.slot.n_chunks(self.codec.C)

    @property
    def step(self):             # chunks at a time: whole windows, as attention sees them
        return max(1, PIECE // (self.codec.C * self.codec.T)) * self.codec.T

    def latents(self, first, last):
        """z of chunks [first, last): (last - first, Z), encoded in the whole windows around them"""
        C, T = self.codec.C, self.codec.T
        begin = first // T * T
        flat_L = self.read(begin * C, -(-last // T) * T * C)
        noise = generator_for(*self.seed, begin) if self.samples else None
        z_NZ = self.codec.encode(flat_L, self.slot, self.samples, noise, self.prior)
        return z_NZ[first - begin:last - begin]

    def codes(self, z_target_JZ, j0, j1):
        """As a source of the target's shape: it meets the target chunk by chunk, unaligned."""
        return self.latents(j0, j1)

    def lost(self, j0, j1):
        """What the codec loses of chunks [j0, j1): W - D(E(W)), of the posterior mean."""
        start, stop = j0 * self.codec.C, min(j1 * self.codec.C, self.slot.numel)
        z_JZ, flat_L = self._replace(samples=0).latents(j0, j1), self.read(start, stop)
        return flat_L.to(z_JZ.device).float() - self.codec.decode(z_JZ, self.slot, stop - start)


# --- Operators. Each is z = sum_i c_i z_i over the parents' codes; they differ in the c_i. --------
def combine(parts, weights):
    """sum_i c_i z_i.  paper: Sec. 3.3, z_lambda = (1 - lambda) z_a + lambda z_b; a barycentre of N.

    Why the exact codec is plain averaging: with statistics that the parents share D(E(w)) = w, and
    D is affine, so that for weights that sum to 1  D(sum c_i E(w_i)) = sum c_i w_i.
    """
    merged = weights[0] * parts[0]
    for weight, part in zip(weights[1:], parts[1:]):
        merged.add_(part, alpha=weight)
    return merged


def convex_weights(lam):
    """[lambda_1, ...] -> [1 - sum, lambda_1, ...].  ValueError beyond the simplex."""
    if not all(0 <= value <= 1 for value in lam) or sum(lam) > 1 + 1e-9:
        raise ValueError(f"lambda {', '.join(map(str, lam))}: each must be in [0, 1], the sum too")
    return [max(0.0, 1 - sum(lam)), *lam]


def task_weights(lam):
    """Task arithmetic (Ilharco et al. 2023; paper: Table 4): z_t + sum_i lambda_i (z_i - z_base);
    the base stands last. Beyond 1 it extrapolates, below 0 it takes a skill away."""
    if not all(-10 <= value <= 10 for value in lam):
        raise ValueError(f"lambda {', '.join(map(str, lam))}: each must be in [-10, 10]")
    return [1.0, *lam, -sum(lam)]


def slerp_weights(lam, dot, norm_a, norm_b):
    """Spherical interpolation (Shoemake 1985): with cos W = <a, b> / |a| |b|

        c_a = sin((1 - lambda) W) / sin W,   c_b = sin(lambda W) / sin W

    from what `inner` gives. lerp where the angle says nothing (parallel or zero vectors)."""
    cosine = max(-1.0, min(1.0, dot / (norm_a * norm_b))) if norm_a * norm_b > 0 else 1.0
    angle = math.acos(cosine)
    if math.sin(angle) < 1e-6:
        return [1 - lam, lam]
    return [math.sin((1 - lam) * angle) / math.sin(angle), math.sin(lam * angle) / math.sin(angle)]


def inner(pairs):
    """(<a, b>, |a|, |b|) of two long vectors that arrive in pieces, in float64."""
    sums = np.zeros(3)
    for a, b in pairs:
        a, b = a.reshape(-1).double(), b.reshape(-1).double()
        sums += a.dot(b).item(), a.dot(a).item(), b.dot(b).item()
    return sums[0], math.sqrt(sums[1]), math.sqrt(sums[2])


# --- Alignment: a source's latents before they meet the target's (Algorithm 1, lines 3 and 4) -----
@dataclass(frozen=True)
class Alignment:
    method: str = "none"            # a name in align.ALIGNERS
    control: str | None = None      # a null control in the source's place
    epsilon: float = ot.EPSILON     # Sinkhorn's

    def __post_init__(self):
        if self.method not in ot.ALIGNERS or self.control not in (None, *ot.CONTROLS):
            raise ValueError(f"{self.method!r}, {self.control!r}: not in align.ALIGNERS, CONTROLS")


def bring(target, source, how=Alignment(), seed=(0,)):
    """The source as `ls_merge` takes it: itself where shapes agree and nothing is asked for, else
    through a Transport.  seed: of a control's noise."""
    if source.slot.shape == target.slot.shape and how.method == "none" and not how.control:
        return source
    return Transport(target, source, how, seed)


class Transport:
    """z~ of one source, piece by piece.  Fitted first: mean and covariance of the target's chunks
    and of the source's projected ones, over the WHOLE tensor (n chunks of d = Z numbers)."""

    def __init__(self, target, source, how, seed=(0,)):
        self.target, self.source, self.how, self.noise = target, source, how, generator_for(*seed)
        self.found, self.goal, self.aligned = ot.Moments(), ot.Moments(), ot.Moments()
        self.iterations, self.error = 0, 0.0
        for j0, j1 in spans(target.N, self.step):
            self.goal.add(target.latents(j0, j1))
            self.found.add(self.under(j0, j1)[1])

    @property
    def step(self):
        """Slots at a time. A piece meets what of the source lies under it. For Sinkhorn a piece is
        one transport problem, as large as its cost matrix may be: no mass crosses its border.
        (ours: a change of the method, which memory forces from 5,792 x 5,792 chunks on.)"""
        share, T = self.source.N / self.target.N, self.target.codec.T       # source chunks per slot
        most = self.target.step / max(1.0, share)
        if self.how.method == "sinkhorn":
            count = math.ceil(self.target.N / math.sqrt(ot.LIMIT_BYTES / 8 / share))
            most = math.ceil(self.target.N / count)     # blocks of equal size
        return max(1, math.ceil(most / T)) * T

    def under(self, j0, j1):
        """The source's latents under slots [j0, j1): as they are (I, Z), and projected (J, Z)."""
        I, J, Z = self.source.N, self.target.N, self.target.codec.Z
        i0, i1 = ot.source_range(j0, j1, I, J)
        z_IZ = ot.project(self.source.latents(i0, i1), i1 - i0, Z)      # Z differs between two VAEs
        return z_IZ, ot.project_rows(z_IZ, i0, I, j0, j1, J) if I != J else z_IZ     # line 3

    def codes(self, z_target_JZ, j0, j1):
        """Lines 3 and 4 for the slots [j0, j1)."""
        if self.how.control:
            z_JZ = ot.control_latents(self.how.control, z_target_JZ, self.goal, self.noise)
        else:
            meeting = ot.Meeting(*self.under(j0, j1), z_target_JZ, self.found, self.goal,
                                 self.how.epsilon)
            try:
                z_JZ, iterations, error = ot.ALIGNERS[self.how.method](meeting)     # line 4
            except ValueError as failed:
                need(False, "alignment", failed, "raise --epsilon", self.target.slot.name)
            self.iterations, self.error = self.iterations + iterations, max(self.error, error)
        self.aligned.add(z_JZ)
        return z_JZ.float()

    def record(self):
        """What the report says of it, after the last piece."""
        here, there = self.target.slot.place, self.source.slot.place
        return {"layer": here.layer, "role": here.role, "source_layer": there.layer,
                "iterations": self.iterations, "marginal_error": self.error,
                "cost_before": ot.wasserstein2(self.found, self.goal),
                "cost_after": ot.wasserstein2(self.aligned, self.goal),
                "std_ratio": self.aligned.spread / (self.goal.spread or 1.0),
                "n_over_d": self.target.N / self.target.codec.Z}


# --- The method -----------------------------------------------------------------------------------
def cast(flat_L, slot):
    """The one rounding to the stored dtype; a value that does not fit is an error, never an Inf."""
    result = flat_L.to(slot.dtype)
    # One sum shows every NaN and Inf, ten times faster than a look at each weight.
    fits = result.float().sum().isfinite() or result.float().isfinite().all()
    need(fits, "result", f"does not fit {slot.dtype}", "lower --lam, or store it wider", slot.name)
    return result


def ls_merge(target, sources, weights, residual=False):
    """LS-Merge of one tensor (paper: Algorithm 1, lines 2 to 6), as a stream of pieces.

    Args:      target    a Parent;  sources: what `bring` made of theirs;  weights: all parents' c_i
               residual  add back what the codec lost of each parent that entered unaligned (ours):
                         W^ = sum_k c_k W_k + (D(z_lambda) - sum_k c_k D(z_k))
    Returns:   iterator of (start, weights in the target's dtype); no sources: the round trip
    """
    C, slot, parents = target.codec.C, target.slot, [target, *sources]
    for j0, j1 in spans(target.N, min(parent.step for parent in sources or [target])):
        start, stop = j0 * C, min(j1 * C, slot.numel)
        z_target_JZ = target.latents(j0, j1)                                            # line 2
        z_aligned = [source.codes(z_target_JZ, j0, j1) for source in sources]           # lines 3, 4
        z_merged_JZ = combine([z_target_JZ, *z_aligned], weights)                       # line 5
        # The target's statistics decode: a source of another shape entered by its own, and what it
        # brings is its pattern of weights, in the target's unit.
        merged_L = target.codec.decode(z_merged_JZ, slot, stop - start)                 # line 6
        if residual:
            for weight, parent in zip(weights, parents):
                if isinstance(parent, Parent):      # not through a Transport: it entered unaligned
                    merged_L = merged_L + weight * parent.lost(j0, j1)
        yield start, cast(merged_L, slot)


def weight_merge(readers, weights, entry):
    """The baseline: the operator on raw weights, in pieces; the target's bytes if it is alone."""
    wide = torch.float64 if entry.dtype == torch.float64 else torch.float32
    for start, stop in spans(entry.numel):
        if any(weights[1:]):
            raw = [read(start, stop).to(wide) for read in readers]
            yield start, cast(combine(raw, weights), entry)
        else:
            yield start, readers[0](start, stop)
