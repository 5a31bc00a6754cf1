"""lsmerge.py: LS-Merge on one screen.                                                 (read first)

    checkpoint -> chunks -> latents -> projected, transported -> merged latents -> chunks -> checkpoint
        W           X         z               z~                     z_lambda         X^         W^

`ls_merge` at the end of this file is the method, for one tensor: encode, project, transport, interpolate, decode. It
works piece by piece, so that memory depends neither on the model nor on its largest tensor. Which tensors meet is
decided in merge.py (`plan_merge`), the arrows are made in chunking.py, vae.py and align.py.

Dimension key (a suffix names a tensor's axes):
    L  weights of a tensor          C  weights per chunk        N  chunks of a tensor
    T  chunks per window            B  windows in a batch       D  width of the network
    Z  latent numbers per chunk     I  source chunks            J  target chunks

Paper                           here                                where
    w in R^L, c, n = L_p / c    flat_L, C, N; padding in real_NC    chunking.chunk, unchunk
    E, D (encoder, decoder)     Codec.encode, Codec.decode          below; the networks in vae.py
    q(z | w)                    Posterior(mu_BTZ, logvar_BTZ)       vae.VAE.encode
    Eq. 1, beta                 vae_loss, VAEConfig.beta            vae.py
    lambda                      lam: the weight of a SOURCE; lam = 0 is the target's round trip
    z_s, z_t, z~, z_lambda      z_source, z_target, z_aligned, z_merged
    r = n_t N_t / (n_s N_s)     (a ratio of sizes; never formed: project takes both sizes)   align.project
    r (compression)             VAEConfig.ratio = C / Z
    T*, A of Eq. 2              align.gaussian_map; entropic: align.sinkhorn, barycentric_map
    Algorithm 1, line 1         align.pair_layers, merge.plan_merge
    Algorithm 1, lines 2 to 6   ls_merge
"""
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Callable, NamedTuple

import numpy as np
import torch

import align as ot
from chunking import PIECE, CheckpointError, TensorSlot, chunk, from_windows, need, scale, spans, to_windows, unscale
from vae import Posterior, sample

BATCH_CHUNKS = 512              # chunks per forward pass: large enough for the matrix units, small enough for a core's cache
GATE_WINDOWS = 256              # of a tensor and parent, evenly spread, that the gate decodes (a smaller tensor whole): 2^18 weights


class Codec:
    """E and D on the chunks of one tensor: a VAE with its device and arithmetic."""

    def __init__(self, vae, device="cpu", dtype=torch.float32):
        self.vae, self.device, self.dtype = vae.to(device, dtype).eval().requires_grad_(False).skip_idle(), device, dtype
        self.C, self.T, self.Z = vae.config.chunk, vae.config.tokens, vae.config.latent

    def _batches(self, rows_NX, real_N):
        """Windows of T rows, BATCH_CHUNKS at a time; the mask only where a window is not full."""
        x_BTX, real_BTX = to_windows(rows_NX, real_N[:, None].expand_as(rows_NX), self.T)
        for x, real in zip(x_BTX.split(max(1, BATCH_CHUNKS // self.T)), real_BTX.split(max(1, BATCH_CHUNKS // self.T))):
            real_BT = real[:, :, 0]
            yield x.to(self.device, self.dtype), None if real_BT.all() else real_BT.to(self.device)

    @torch.inference_mode()
    def encode(self, flat_L, slot, samples=0, generator=None, prior=False, key=None):
        """z = E(w): (N, Z) float64.  flat_L: raw weights, a whole number of windows or a tensor's end.

        samples = 0: the posterior mean; K: the mean of K draws from q(z | w) (paper: self-merging), or from N(0, I).
        key: the neck of the tensor with that `TensorSlot.key`, where a code is to meet those of another place; None: its own.
        """
        chunks_NC, real_NC = chunk(scale(flat_L, slot), self.C)
        parts, place = [], self.vae.place_of(key or slot.key)
        for x, real in self._batches(chunks_NC, real_NC[:, 0]):
            q = self.vae.encode(x, real, place)
            q = Posterior(torch.zeros_like(q.mu_BTZ), torch.zeros_like(q.mu_BTZ)) if prior else q
            z_BTZ = sum(sample(q, generator) for _ in range(samples)) / samples if samples else q.mu_BTZ
            parts.append(z_BTZ.double().cpu())
        return from_windows(torch.cat(parts), len(chunks_NC))

    @torch.inference_mode()
    def decode(self, z_NZ, slot, L, key=None):
        """W^ = D(z): (L,) float64 in the slot's own unit.  The inverse way of encode."""
        place = self.vae.place_of(key or slot.key)
        parts = [self.vae.decode(z, real, place).double().cpu() for z, real in self._batches(z_NZ, torch.ones(len(z_NZ), dtype=bool))]
        return unscale(from_windows(torch.cat(parts), len(z_NZ)).reshape(-1)[:L], slot)


class Parent(NamedTuple):
    """One tensor of one model: how to read it, its statistics, its codec."""
    read: Callable              # (start, stop) -> those elements of the flattened tensor
    slot: TensorSlot
    codec: Codec
    index: int = 0              # 0 the target, i the i-th source: the tally's key
    samples: int = 0            # K draws from the posterior, averaged; 0: its mean
    seed: int = 0               # of those draws
    prior: bool = False         # draws from N(0, I) instead: an argument for the experiments
    key: str | None = None      # whose neck it goes through, if not its own: a source's code must mean what the target's does

    @property
    def N(self): return self.slot.n_chunks(self.codec.C)

    def latents(self, first, last):
        """Latents of chunks [first, last): whole windows are encoded, since attention sees whole windows."""
        C, T = self.codec.C, self.codec.T
        begin = first // T * T
        # Seeded by the place, so that the same draw comes back whenever these chunks are asked for again.
        # (Mixed by numpy, since torch's generator looks at the low 32 bits of a seed only.)
        mixed = np.random.SeedSequence([self.seed, self.index, begin]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(mixed)) if self.samples else None
        z_NZ = self.codec.encode(self.read(begin * C, -(-last // T) * T * C), self.slot, self.samples, generator, self.prior, self.key)
        return z_NZ[first - begin:last - begin]


# --- Operators. Each is z = sum_i c_i z_i over the parents' codes, on latents as on raw weights; they differ in the c_i. ---
def lerp(parents, weights):
    """paper: Sec. 3.3, z_lambda = (1 - lambda) z_a + lambda z_b; for N models the barycentre sum_i lambda_i z_i.

    weights: the target's first (`convex_weights`, `task_weights`, `slerp_weights`).
    """
    merged = weights[0] * parents[0]
    for weight, parent in zip(weights[1:], parents[1:]):
        merged.add_(parent, alpha=weight)
    return merged


def convex_weights(lam):
    """[lambda_1, ...] of the sources -> [1 - sum, lambda_1, ...].  Raises ValueError beyond the simplex."""
    if not all(math.isfinite(value) and 0 <= value <= 1 for value in lam) or sum(lam) > 1 + 1e-9:
        raise ValueError(f"lambda {', '.join(map(str, lam))}: each must lie in [0, 1] and their sum must not exceed 1")
    return [max(0.0, 1 - sum(lam)), *lam]


def task_weights(lam):
    """Task arithmetic (Ilharco et al. 2023; paper: Table 4): z = z_target + sum_i lambda_i (z_i - z_base), the base last."""
    if not all(math.isfinite(value) and 0 <= value <= 1 for value in lam):
        raise ValueError(f"lambda {', '.join(map(str, lam))}: each must lie in [0, 1]")
    return [1.0, *lam, -sum(lam)]


def slerp_weights(lam, dot, norm_a, norm_b):
    """Spherical interpolation (Shoemake 1985): sin((1 - lambda) W) / sin W and sin(lambda W) / sin W, cos W = <a, b> / |a| |b|.

    Takes the angle's ingredients, not the vectors: they are a whole tensor long. lerp where the angle says nothing
    (parallel, opposed or zero vectors).
    """
    cosine = max(-1.0, min(1.0, dot / (norm_a * norm_b))) if norm_a * norm_b > 0 else 1.0
    angle = math.acos(cosine)
    if math.sin(angle) < 1e-6:
        return [1 - lam, lam]
    return [math.sin((1 - lam) * angle) / math.sin(angle), math.sin(lam * angle) / math.sin(angle)]


def inner(pairs):
    """(<a, b>, |a|, |b|) of two long vectors that arrive in pieces."""
    sums = [0.0, 0.0, 0.0]
    for a, b in pairs:
        a, b = a.reshape(-1), b.reshape(-1)
        sums = [total + torch.dot(*two).item() for total, two in zip(sums, ((a, b), (a, a), (b, b)))]
    return sums[0], math.sqrt(sums[1]), math.sqrt(sums[2])


def greedy_soup(count, score):
    """Greedy soup (Wortsman et al. 2022): the best model, then in order of score each that makes the soup's score better.

    Args:     count   models; score: [index, ...] -> score of their uniform soup, higher is better (2 count - 1 calls)
    Returns:  sorted indices of those kept
    """
    alone = [score([index]) for index in range(count)]
    order = sorted(range(count), key=lambda index: -alone[index])
    kept, best = order[:1], alone[order[0]]
    for index in order[1:]:
        if (reached := score(sorted([*kept, index]))) > best:
            kept, best = [*kept, index], reached
    return sorted(kept)


# --- Transport: what happens to a source's latents before they meet the target's (paper: Sec. 3.3, Algorithm 1, lines 3, 4) ---
@dataclass(frozen=True)
class Alignment:
    """How sources are brought to the target: `method` of --align; `control` of --control; `epsilon` of Sinkhorn."""
    method: str = "none"
    control: str | None = None
    epsilon: float = ot.EPSILON


def projected(source, target, j0, j1):
    """Line 3: the source's latents on the target's slots [j0, j1), (J, Z). The identity where all sizes agree."""
    def rows(k0, k1, n):
        i0, i1 = ot.source_range(k0, k1, source.N, n)
        return ot.project_rows(source.latents(i0, i1), i0, source.N, k0, k1, n)
    # Under a slot may lie more of a huge source than a piece: then the mean of m equal parts of the slot, one at a time.
    m = -(-source.N * (j1 - j0) * source.codec.C // (target.N * PIECE))
    z_JZ = rows(j0, j1, target.N) if m == 1 else torch.cat(
        [sum(rows(k, k + 1, target.N * m) for k in range(j * m, j * m + m)) / m for j in range(j0, j1)])
    return ot.project(z_JZ, j1 - j0, target.codec.Z)


class Transport:
    """z~ for one tensor and one source. Built by one pass over both clouds where a map has to be fitted; then called
    piece by piece. Also gathers what the report says about it."""

    def __init__(self, target, source, how, step, generator):
        self.target, self.source, self.how, self.generator = target, source, how, generator
        self.before, self.goal, self.after = ot.Moments(), ot.Moments(), ot.Moments()
        self.iterations, self.error, self.blocks = 0, 0.0, 0
        if not self.plain:
            for j0, j1 in spans(target.N, step):
                self.goal.add(target.latents(j0, j1))
                self.before.add(projected(source, target, j0, j1))
        fit = {"mean": ot.mean_map, "gaussian": ot.gaussian_map}.get(how.method)
        self.affine = fit(self.before, self.goal) if fit else None

    @property
    def plain(self):
        """Nothing happens to the latents: same shape, no map, no control."""
        return self.source.slot.shape == self.target.slot.shape and self.how.method == "none" and not self.how.control

    def __call__(self, z_target_JZ, j0, j1):
        """Lines 3 and 4 for the slots [j0, j1)."""
        if self.plain:
            return self.source.latents(j0, j1)
        if self.how.control:
            z_aligned_JZ = ot.control_latents(self.how.control, z_target_JZ, self.goal, self.generator)
        elif self.how.method == "sinkhorn":
            z_source_IZ = self.source.latents(*ot.source_range(j0, j1, self.source.N, self.target.N))
            z_source_IZ = ot.project(z_source_IZ, len(z_source_IZ), self.target.codec.Z)
            try:
                plan = ot.sinkhorn(ot.squared_cost(z_source_IZ, z_target_JZ), epsilon=self.how.epsilon)
            except ValueError as error:
                raise CheckpointError("alignment", str(error), "raise --epsilon", self.target.slot.name) from None
            z_aligned_JZ = ot.barycentric_map(plan.plan_IJ, z_source_IZ, plan.plan_IJ.sum(0))
            self.iterations, self.blocks = self.iterations + plan.iterations, self.blocks + 1
            self.error = max(self.error, plan.source_error, plan.target_error)
        else:
            z_aligned_JZ = projected(self.source, self.target, j0, j1)
            z_aligned_JZ = ot.apply_affine(self.affine, z_aligned_JZ) if self.affine else z_aligned_JZ
        self.after.add(z_aligned_JZ)
        return z_aligned_JZ

    def record(self):
        here, there = self.target.slot.place, self.source.slot.place
        return {"layer": here.layer, "role": here.role, "source": self.source.index, "source_layer": there.layer,
                "iterations": self.iterations, "marginal_error": self.error, "blocks": self.blocks,
                "cost_before": ot.wasserstein2(self.before, self.goal), "cost_after": ot.wasserstein2(self.after, self.goal),
                "std_ratio": self.after.spread / (self.goal.spread or 1.0), "n_over_d": self.target.N / self.target.codec.Z}


# --- The method ------------------------------------------------------------------------------------------------------
@dataclass
class Tally:
    """Sums over the encoded tensors, from which the report is made. Distances are sums of squares."""
    squares: Counter = field(default_factory=Counter)   # "target", "to_average", and parent index -> distance to that parent
    errors: dict = field(default_factory=dict)      # (parent index, name) -> [sum of squared errors / scale^2, weights]
    alignment: list = field(default_factory=list)   # Transport.record of each tensor and source

    def add_error(self, parent, decoded_L, weights_L):
        error = self.errors.setdefault((parent.index, parent.slot.name), [0.0, 0])
        apart_L = decoded_L - weights_L
        error[0] += torch.dot(apart_L, apart_L).item() / parent.slot.scale ** 2
        need(math.isfinite(error[0]), "codec", "the round trip is not finite", "use another VAE", parent.slot.name)
        error[1] += len(weights_L)

    def absorb(self, other):
        """Add the sums of other tensors."""
        self.squares.update(other.squares)
        self.errors |= other.errors
        self.alignment += other.alignment

    def add_distances(self, merged_L, raw, weights):
        """raw: parent index -> weights, for the target and the sources of its shape; weights: those of the same operator in
        weight space."""
        def square(other):
            apart_L = merged_L.double() - other.double()
            return torch.dot(apart_L, apart_L).item()
        self.squares.update({"target": torch.dot(raw[0], raw[0]).item(), **{index: square(w) for index, w in raw.items()}})
        if len(raw) == len(weights):
            self.squares["to_average"] += square(lerp(list(raw.values()), weights).to(merged_L.dtype))    # as it would be stored


def cast(flat_L, slot):
    """The one rounding to the stored dtype; a value that does not fit is an error, never an Inf in a file."""
    result = flat_L.to(slot.dtype)
    if not torch.isfinite(result.float()).all():
        raise CheckpointError("result", f"{flat_L.abs().max():.3g} does not fit {slot.dtype}",
                              "lower --lam, or store the target in float32 or bfloat16", slot.name)
    return result


def gate_step(parent):
    """The gate decodes every so-many-th window of a tensor: from its first to its last stretch, about GATE_WINDOWS of them."""
    return max(1, -(-parent.N // parent.codec.T) // GATE_WINDOWS)


def round_trip(parent, tally):
    """Enter D(E(w)) of a parent into the tally, for a parent whose own codes are not at hand."""
    width, few = parent.codec.T * parent.codec.C, PIECE // (parent.codec.T * parent.codec.C) or 1
    windows = range(0, -(-parent.slot.numel // width), gate_step(parent))
    for first in range(0, len(windows), few):
        flat_L = torch.cat([parent.read(w * width, (w + 1) * width) for w in windows[first:first + few]])
        z_NZ = parent.codec.encode(flat_L, parent.slot, key=parent.key)
        tally.add_error(parent, parent.codec.decode(z_NZ, parent.slot, len(flat_L), parent.key), flat_L.double())


def check_codes(parent, z_NZ, weights_L, j0, tally):
    """The same from the latents of the chunks from j0 on, as far as the gate looks at them."""
    chunks_NC, real_NC = chunk(weights_L, parent.codec.C)
    seen_N = torch.arange(j0, j0 + len(z_NZ)) // parent.codec.T % gate_step(parent) == 0
    if seen_N.any():
        flat_L = chunks_NC[seen_N][real_NC[seen_N]]
        tally.add_error(parent, parent.codec.decode(z_NZ[seen_N], parent.slot, len(flat_L), parent.key), flat_L)


def piece_chunks(target, sources, how):
    """Target chunks per piece, whole windows: at most PIECE weights of the target, and of a source unless it is so much
    larger that one window meets more. With Sinkhorn a piece is one transport problem (`align.blocks`: small enough for
    memory; no mass crosses its border)."""
    T, most = target.codec.T, PIECE // target.codec.C
    for source in sources:
        most = min(most, PIECE // source.codec.C * target.N // source.N)
    if how.method == "sinkhorn" and sources:
        most = min(-(-target.N // len(ot.blocks(source.N, target.N))) for source in sources)
    return max(T, -(-most // T) * T)


def ls_merge(target, sources, weights, slerp=False, how=Alignment(), residual=False, seed=0, tally=None):
    """LS-Merge of one tensor (paper: Algorithm 1, lines 2 to 6), as a stream of (start, piece in the target's dtype).

    Args:      target, sources   Parent; a source may have any shape (then its latents are projected)
               weights           of all parents, the target's first (`convex_weights`, `task_weights`)
               slerp             two parents: along the arc between their codes, each tensor one vector
               residual          W^ = sum_k w_k W_k + (D(z_lambda) - sum_k w_k D(z_k)), over the target and every source
                                 whose latents entered as they are: what the codec cannot express is added back
               seed              of a control's noise
               tally             a Tally that gathers the round trips and distances (None: nobody asks)
    Returns:   an iterator; the caller's last piece ends the tensor.  With no sources: the target's round trip.
    """
    C, L, slot, tally = target.codec.C, target.slot.numel, target.slot, Tally() if tally is None else tally
    step, parents = piece_chunks(target, sources, how), [target, *sources]
    begin = lambda: [Transport(target, s, how, step, torch.Generator().manual_seed((seed + i * 0x9E3779B1) % 2 ** 32))
                     for i, s in enumerate(sources)]

    def codes(j0, j1):
        z_target_JZ = target.latents(j0, j1)                                                # line 2
        return [z_target_JZ, *(transport(z_target_JZ, j0, j1) for transport in transports)]      # lines 3, 4
    transports, in_weights = begin(), weights
    direct = [True, *(transport.plain for transport in transports)]     # whose latents enter as they are
    if slerp:
        weights = slerp_weights(weights[1], *inner(codes(*span) for span in spans(target.N, step)))
        transports = begin()                               # as new: the same noise, sums that count each piece once
        if sources[0].slot.shape == slot.shape:
            in_weights = slerp_weights(in_weights[1], *inner((target.read(*s).double(), sources[0].read(*s).double()) for s in spans(L)))
    alone = sum(weight != 0 for weight in weights) == 1
    for j0, j1 in spans(target.N, step):
        start, stop = j0 * C, min(j1 * C, L)
        raw = {p.index: p.read(start, stop).double() for p in parents if p.slot.shape == slot.shape}
        z_parents = codes(j0, j1)
        merged_L = target.codec.decode(lerp(z_parents, weights), slot, stop - start)        # lines 5, 6
        for parent, weight, z_JZ, enters in zip(parents, weights, z_parents, direct):
            if residual and enters:
                z_JZ = parent._replace(samples=0).latents(j0, j1) if parent.samples else z_JZ
                decoded_L = target.codec.decode(z_JZ, slot, stop - start)
                tally.add_error(parent, decoded_L, raw[parent.index])
                merged_L = merged_L + weight * (raw[parent.index] - decoded_L)
            elif not enters or parent.samples:             # its own codes are not what is at hand
                round_trip(parent._replace(samples=0), tally) if start == 0 else None
            elif alone and weight:                         # decoded whole, as the result
                tally.add_error(parent, merged_L, raw[parent.index])
            else:
                check_codes(parent, z_JZ, raw[parent.index], j0, tally)
        merged_L = cast(merged_L, slot)
        tally.add_distances(merged_L, raw, in_weights)
        yield start, merged_L
    tally.alignment += [transport.record() for transport in transports if not transport.plain]
