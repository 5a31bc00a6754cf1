"""lsmerge.py: LS-Merge on one screen.                                    (read first)

    checkpoint -> chunks -> latents -> projected, transported -> merged -> weights
        W           X         z                z~               z_lambda      W^

`ls_merge` is the method for one tensor: encode, align, merge, decode. `tour` (run this
file: python lsmerge.py) shows it in numbers. The arrows are made in chunking.py, vae.py
and align.py.

Dimension key (a suffix names a tensor's axes):
    L  weights of a tensor          C  weights per chunk        N  chunks of a tensor
    T  chunks per window            B  windows in a batch       D  width of the network
    Z  latent numbers per chunk     I  source chunks            J  target chunks

Paper                       here                                      where
    w in R^L, c, n = L_p / c    flat_L, C, N; padding: real_NC    (chunking.chunk)
    X in R^{B x n x c}          x_BTC; the paper writes n twice, this one is T
    d; z_d                      D; Z
    E, D (encoder, decoder)     Codec.encode, Codec.decode        (below, and vae.py)
    q(z | w); Eq. 1, beta       Posterior; vae_loss, VAEConfig.beta         (vae.py)
    lambda                      lam: weight of a SOURCE; 0: the target's round trip
    z_s, z_t, z~, z_lambda      z_source, z_target, z_aligned, z_merged
    r, the compression ratio    VAEConfig.true_ratio = C / Z (ratio: as asked for)
    r of Algorithm 1, line 3    never formed: align.project_rows takes both sizes
    A and T* of Eq. 2           gaussian_map; sinkhorn, barycentric_map   (align.py)
    Algorithm 1                 line 1: align.pair_names; lines 2 to 6: ls_merge

Example: a q_proj of 128 x 128 has L = 16,384 weights, N = 256 chunks of C = 64, B = 16
windows of T = 16, and Z = 64 at r = 1. A source of 192 x 192 has 576 chunks. Its 576
latents are projected to 256, transported, merged with the target's 256, and decoded to
16,384 weights.

Larger tensors pass in pieces: a *piece* is what is read at a time (262,144 weights), a
*batch* what the network takes of it (64 windows), a *window* what attention sees (T
chunks).

In this order: the method; E and D; operators; alignment; the tour. Not here: which
tensors meet, the command line and files of a whole run (merge.py).
"""
import copy
import math
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable, NamedTuple

import torch

import align as ot              # ours, not the POT library
from chunking import (PIECE, Checkpoint, CheckpointError, Parser, TensorStats, cast,
                      chunk, command, from_windows, is_selected, measure, need, pool,
                      say, spans, standardise, to_windows, unchunk, unstandardise, wide)
from vae import VAE, VAEConfig, generator_for, sample


# --- The method -----------------------------------------------------------------------
def ls_merge(target, sources, coefficients, residual=False):
    """LS-Merge of one tensor (paper: Algorithm 1, lines 2 to 6).

    Args:     target: a Parent (one tensor of one model: below), which has .latents
              sources: Parents, or Transports of another shape, which have .align; none:
              the round trip of the target, or self-merging, if it asks for samples
              coefficients: c_k of z_lambda = sum_k c_k z_k, the target's first
              residual (ours): add back what the codec lost of each unaligned parent,
              W^ = D(z_lambda) + sum_k c_k (W_k - D(E(W_k)))
    Yields:   (start, weights in the target's dtype), piece by piece: so memory does not
              depend on the size of the tensor
    Example:  coefficients [0.9, 0.1] are lambda = 0.1 with one source
    """
    stats = target.stats
    step = min(parent.per_piece for parent in [target, *sources])           # chunks
    for j0, j1 in spans(target.N, step):
        start = j0 * target.codec.C                         # the piece's first weight
        stop = min(j1 * target.codec.C, stats.numel)        # the last chunk is padded
        z_target_JZ = target.latents(j0, j1)                                # line 2
        z_merged_JZ = coefficients[0] * z_target_JZ
        for c, source in zip(coefficients[1:], sources):
            z_aligned_JZ = source.align(z_target_JZ, j0, j1)                # lines 3, 4
            z_merged_JZ += c * z_aligned_JZ                                 # line 5
        # With the target's statistics. A source of another shape was encoded with its
        # own: its pattern enters, at the target's scale.
        merged_L = target.codec.decode(z_merged_JZ, stats, stop - start)    # line 6
        if residual:
            for c, parent in zip(coefficients, [target, *sources]):
                if parent.unaligned:
                    merged_L = merged_L + c * parent.codec_error(j0, j1)
        yield start, cast(merged_L, stats)                  # the one rounding


# --- E and D --------------------------------------------------------------------------
def self_merge(posterior, K, generator):
    """Self-merging: the mean of K codes drawn from one model's posterior, (B, T, Z).
    paper: Sec. 3.3,  z = (1/K) sum_k z_k,  z_k ~ q(z | w)
    Example:  sigma 0.01 and K = 16: the noise of z is 0.01 / sqrt(16) = 0.0025"""
    z_BTZ = torch.zeros_like(posterior.mu_BTZ)          # (B, T, Z)
    for _ in range(K):
        z_BTZ += sample(posterior, generator) / K
    return z_BTZ


BATCH = 64      # windows that the network takes at a time: 1,024 chunks, by timing


class Codec:
    """E and D on the chunks of one tensor: a VAE with its device and arithmetic.
    Latents are float32; decoded weights too, or float64 where that is stored."""

    def __init__(self, vae, device="cpu", dtype=torch.float32, record=None, files=()):
        self.vae = vae                      # as it was trained, for train.py
        self.device = device                # where the network computes
        self.dtype = dtype                  # of the network; latents stay float32
        self.record = record                # of its training
        self.files = files                  # that it was read from
        self.C = vae.config.chunk           # weights per chunk
        self.T = vae.config.tokens          # chunks per window
        self.Z = vae.config.latent          # latent numbers per chunk
        self.batch = BATCH * self.T         # chunks that the network takes at a time
        self.net = copy.deepcopy(vae).to(device, dtype)

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """A codec from a VAE file; CheckpointError if it is none.

        ours:  "exact" is the network without blocks, exact at r = 1. With it LS-Merge
               is plain averaging, the null model of the method (see share_statistics)
        """
        if path == "exact":
            # The embedding turns a chunk, the bottleneck turns it back: z = x.
            vae = VAE(VAEConfig(blocks=0, init="pca"))
            return cls(vae.start(generator_for(0)), device, dtype)
        file = Checkpoint(path)
        tensors = {name: file.read_tensor(name) for name in file.entries}
        try:
            vae, record = VAE.from_file(tensors, file.metadata)
        except ValueError as error:
            raise CheckpointError(path, error, "pass a file that train.py wrote")
        return cls(vae, device, dtype, record, file.files)

    def batches(self, rows):
        """N chunks, (N, C), or latents, (N, Z), as batches of B windows, (B, T, C or
        Z); and which of their chunks are real, (B, T) bool: 1 = chunk with weights,
        0 = padding.
        Example:  260 chunks, T = 16: 17 windows, the last with 12 chunks of padding"""
        # All rows are real; to_windows fills up with rows that are not.
        real = torch.ones_like(rows, dtype=torch.bool)
        windows, real = to_windows(rows, real, self.T)      # (all windows, T, C or Z)
        for x, real_BT in zip(windows.split(BATCH), real[..., 0].split(BATCH)):
            yield x.to(self.dtype), real_BT                 # (B, T, C or Z), (B, T)

    @torch.inference_mode()
    def encode(self, flat_L, stats, samples=0, seed=(), first_batch=0):
        """z = E(w), (N, Z) float32.

        differs:  z is the mean of q(z | w), the same at every run; the paper samples
        samples:  K > 0: the mean of K samples, self-merging
        seed:     of their noise, with the number of the batch, which `first_batch` is
                  for the first one: so noise does not depend on where a piece begins
        """
        chunks_NC, _ = chunk(standardise(flat_L.to(self.device), stats), self.C)
        parts = []                                          # (B, T, Z) each
        batches = enumerate(self.batches(chunks_NC), first_batch)
        for number, (x_BTC, real_BT) in batches:
            if samples:
                posterior = self.net.encode(x_BTC, real_BT)             # q(z | w)
                z_BTZ = self_merge(posterior, samples, generator_for(*seed, number))
            else:
                z_BTZ = self.net.encode_mean(x_BTC, real_BT)
            parts.append(z_BTZ)
        # (B, T, Z) of all windows -> (N, Z), without the chunks of padding
        return from_windows(torch.cat(parts), len(chunks_NC)).float()

    @torch.inference_mode()
    def decode(self, z_NZ, stats, L):
        """W^ = D(z): the first L weights, (L,), in the tensor's own unit."""
        parts = [self.net.decode(z_BTZ, real_BT)
                 for z_BTZ, real_BT in self.batches(z_NZ)]  # (B, T, C) each
        chunks_NC = from_windows(torch.cat(parts), len(z_NZ))
        return unstandardise(unchunk(chunks_NC, L), stats)  # w = scale x + mean


@dataclass(frozen=True)
class Parent:
    """One tensor of one model: how to read it, its statistics, its codec. It stands for
    its latents: they are computed when they are asked for, a piece at a time."""
    read: Callable              # (start, stop) -> these weights of the flat tensor
    stats: TensorStats          # mean and standard deviation: what makes E invertible
    codec: Codec                # E and D
    samples: int = 0            # K draws of self-merging; 0: the posterior's mean
    seed: tuple = (0,)          # of those draws
    unaligned = True            # its latents enter as they are

    @property
    def N(self): return -(-self.stats.numel // self.codec.C)    # ceil(L / C)

    @property
    def per_piece(self):
        """Chunks of a piece: whole batches of PIECE weights in all, at least one batch.
        Example:  C = 64 and T = 16: 4 batches of 1,024 chunks, 262,144 weights"""
        batch = self.codec.batch
        return max(1, PIECE // (self.codec.C * batch)) * batch

    def latents(self, first, last):
        """z of chunks [first, last), (last - first, Z). Encoded are the whole batches
        around them: so a chunk's window, and its noise, are the same whoever asks.
        Example:  chunks 1000 to 1100, in batches of 1024: 0 to 2048 are encoded"""
        batch = self.codec.batch
        begin = first // batch * batch                      # rounded down,
        end = -(-last // batch) * batch                     # and up
        flat_L = self.read(begin * self.codec.C, end * self.codec.C)
        z_NZ = self.codec.encode(flat_L, self.stats, self.samples, self.seed,
                                 begin // batch)            # (end - begin, Z)
        return z_NZ[first - begin:last - begin]

    def align(self, z_target_JZ, j0, j1):
        """A source of the target's shape enters as it is: chunk j meets chunk j."""
        return self.latents(j0, j1)

    def codec_error(self, j0, j1):
        """W - D(E(W)), the weights of chunks [j0, j1): what the codec loses. Noise of
        samples is no loss: z is the posterior's mean here."""
        flat_L = self.read(j0 * self.codec.C, j1 * self.codec.C)
        plain = replace(self, samples=0)
        decoded_L = self.codec.decode(plain.latents(j0, j1), self.stats, len(flat_L))
        return flat_L.to(decoded_L) - decoded_L


def share_statistics(parents):
    """Parents of the target's shape (the first's) share pooled statistics; the others
    keep their own.

    ours:     then the exact codec is plain averaging. D(E(w)) = w, and both are affine
              maps, the same for all of these parents: so, wherever the c_k sum to 1
              (slerp's do not),  D(sum_k c_k E(w_k)) = sum_k c_k w_k
    Example:  means 0 and 2, std 1 each: all are encoded with mean 1 and std sqrt(2)
    """
    shape = parents[0].stats.shape              # the target's
    mean, std = pool([parent.stats for parent in parents
                      if parent.stats.shape == shape])
    shared = []
    for parent in parents:
        if parent.stats.shape == shape:
            # Same weights, read in another unit.
            parent = replace(parent, stats=replace(parent.stats, mean=mean, std=std))
        shared.append(parent)
    return shared


# --- Operators: the coefficients c_k of z_lambda = sum_k c_k z_k ----------------------
def convex_coefficients(lam):
    """A convex barycentre: [lambda_1, ...] -> [1 - sum, lambda_1, ...].
    paper:    Sec. 3.3,  z_lambda = (1 - lambda) z_a + lambda z_b
    Example:  [0.2, 0.5] -> [0.3, 0.2, 0.5]; a soup of three is [1/3, 1/3]
    Raises:   ValueError if one is negative, or their sum above 1"""
    # Written as "not good", so that NaN, for which no comparison is true, is refused
    # as well. Ten times 0.1 sums to a little more than 1.
    if not (min(lam, default=0) >= 0 and sum(lam) <= 1.000000001):
        raise ValueError("each lambda must be 0 or more, and their sum at most 1")
    return [max(0.0, 1 - sum(lam)), *lam]


def task_coefficients(lam):
    """Task arithmetic (Ilharco et al. 2023; paper: Table 4):
    z_t + sum_i lambda_i (z_i - z_base). The base stands last.
    Example:  [0.6, 0.3] -> [1, 0.6, 0.3, -0.9]
    Raises:   ValueError beyond 10, which is surely a typing error"""
    if not all(abs(value) <= 10 for value in lam):
        raise ValueError("each lambda must be from -10 to 10")
    return [1.0, *lam, -sum(lam)]


PARALLEL = 1 - 5e-13    # of |cos t|: sin t is then 1e-6


def slerp_coefficients(lam, dot, norm_a, norm_b):
    """Spherical interpolation (Shoemake 1985), with cos t = <a, b> / (|a| |b|):
    c_a = sin((1 - lambda) t) / sin t,   c_b = sin(lambda t) / sin t
    Example:  a and b at right angles, lambda = 1/2: both sin 45 / sin 90 = 0.7071"""
    norm = norm_a * norm_b
    # Parallel, opposite or zero vectors: undefined, so lerp.
    if abs(dot) >= PARALLEL * norm:
        return [1 - lam, lam]
    t = math.acos(dot / norm)           # the angle between a and b
    return [math.sin((1 - lam) * t) / math.sin(t), math.sin(lam * t) / math.sin(t)]


def inner(pairs):
    """(<a, b>, |a|, |b|) of two long vectors, in float64: what slerp needs of them.
    pairs: their pieces, one after the other"""
    dot = aa = bb = 0.0                 # <a, b>, <a, a> and <b, b> so far
    for a, b in pairs:
        a = a.double()
        b = b.double()
        dot += (a * b).sum()
        aa += a.square().sum()
        bb += b.square().sum()
    return float(dot), math.sqrt(aa), math.sqrt(bb)


def combine(raw, coefficients, entry):
    """sum_k c_k W_k of a piece of the parents' weights, rounded once to the target's
    dtype: what the exact codec gives. Where nothing else enters, the target's own bits.

    raw: the piece of each parent, (L,), the target's first; entry: of the target
    """
    target_L, *others = raw
    if not any(coefficients[1:]):
        return target_L
    # float32 for all dtypes but float64: one rounding, at the end
    merged_L = coefficients[0] * target_L.to(wide(entry.dtype))
    for c, other_L in zip(coefficients[1:], others):
        merged_L.add_(other_L.to(merged_L), alpha=c)
    return cast(merged_L, entry)


def weight_merge(readers, coefficients, entry):
    """The baseline without a codec, in pieces as `ls_merge` gives them.
    readers: of each parent, (start, stop) -> those weights; entry: of the target"""
    for start, stop in spans(entry.numel):
        raw = [read(start, stop) for read in readers]
        yield start, combine(raw, coefficients, entry)


# --- Alignment: Algorithm 1, lines 3 and 4 --------------------------------------------
class Alignment(NamedTuple):
    """How a source is brought to the target."""
    method: str = "auto"            # a name in align.ALIGNERS
    control: str = None             # a name in align.CONTROLS: a null control instead
    epsilon: float = ot.EPSILON     # Sinkhorn's


def as_source(target, source, alignment, seed=(0,)):
    """The source as `ls_merge` takes it: itself, where chunk j meets chunk j; or its
    Transport. seed: of a control's noise.
    Example:  by default a Parent of the target's shape enters as it is; one of another
              shape is projected, and transported by the Gaussian map"""
    same = source.stats.shape == target.stats.shape
    if same and alignment.method in ("auto", "none") and not alignment.control:
        return source
    return Transport(target, source, alignment, seed)


class Transport:
    """z~ of one source, piece by piece.

    Before, a first pass takes the mean and covariance of the target's latents and of
    the source's projected ones, over the WHOLE tensor: all pieces then go through one
    map.
    ours:     the paper does not say over which samples mu and S are taken. Here they
              are the chunks of the two tensors that meet.
    """

    unaligned = False

    def __init__(self, target, source, alignment, seed):
        self.target = target                        # a Parent
        self.source = source                        # a Parent
        self.alignment = alignment                  # an Alignment
        self.generator = generator_for(*seed)       # of a control's noise
        self.iterations = 0                         # Sinkhorn's, of all pieces
        self.error = 0.0                            # its largest marginal error
        self.of_target = ot.Moments()               # of z_t,
        self.of_source = ot.Moments()               # of z_s, projected,
        self.of_aligned = ot.Moments()              # and of z~
        # The first pass; `align` is the second.
        for j0, j1 in spans(target.N, self.per_piece):
            self.of_target.add(target.latents(j0, j1))
            self.of_source.add(self.overlapping(j0, j1)[1])

    @property
    def per_piece(self):
        """Target chunks of a piece, so that it holds about a piece of either model: all
        of one size, and of whole windows, as a chunk is decoded in the window in which
        it was encoded. A piece is one problem of Sinkhorn's: no mass crosses its border
        (ours: memory forces it, above some 4,096 x 4,096 chunks).
        Example:  6,000 target and 9,000 source chunks, T = 16: 3 pieces, of 2,000 and
                  3,000"""
        largest = max(self.target.N, self.source.N)
        pieces = math.ceil(largest / self.target.per_piece)
        T = self.target.codec.T
        return math.ceil(self.target.N / pieces / T) * T

    def overlapping(self, j0, j1):
        """The source latents that overlap target chunks [j0, j1): as they are, (I, Z),
        and projected, (J, Z).  Algorithm 1, line 3."""
        I = self.source.N                           # chunks of the source,
        J = self.target.N                           # and slots for them
        i0, i1 = ot.source_range(j0, j1, I, J)
        z_IZ = self.source.latents(i0, i1)
        # Two VAEs may have latents of two sizes; with one this changes nothing.
        z_IZ = ot.project(z_IZ, len(z_IZ), self.target.codec.Z)
        return z_IZ, ot.project_rows(z_IZ, i0, I, j0, j1, J)

    def align(self, z_target_JZ, j0, j1):
        """z~ for target chunks [j0, j1), (J, Z), or a null control in its place.
        CheckpointError where an aligner gives up, as Sinkhorn may."""
        if self.alignment.control:
            z_JZ = ot.control_latents(self.alignment.control, z_target_JZ,
                                      self.of_target, self.generator)
        else:
            z_IZ, z_projected_JZ = self.overlapping(j0, j1)                 # line 3
            # Transport is computed in float64.
            meeting = ot.Meeting(z_IZ.double(), z_projected_JZ, z_target_JZ.double(),
                                 self.of_source, self.of_target,
                                 self.alignment.epsilon)
            try:
                found = ot.ALIGNERS[self.alignment.method](meeting)         # line 4
            except ValueError as error:
                raise CheckpointError("alignment", error, "try another --align, or for "
                                      "Sinkhorn a larger --epsilon",
                                      self.target.stats.name)
            z_JZ = found.z_JZ                                           # (J, Z)
            self.iterations += found.iterations
            self.error = max(self.error, found.error)
        self.of_aligned.add(z_JZ)
        return z_JZ.float()

    def report(self):
        """What the report says of this transport, after the last piece. A cost is the
        squared 2-Wasserstein distance to the target, per latent number."""
        return {"layer": self.target.stats.place.layer,
                "role": self.target.stats.place.role,
                "source_layer": self.source.stats.place.layer,
                # Of Sinkhorn: 0 for the others.
                "iterations": self.iterations,
                "marginal_error": self.error,
                "cost_before": ot.wasserstein2(self.of_source, self.of_target),
                "cost_after": ot.wasserstein2(self.of_aligned, self.of_target),
                # Below 1 the aligned latents vary less than the target's: blurred.
                "std_ratio": self.of_aligned.std / (self.of_target.std or 1.0),
                # Below 1 there are fewer chunks than latent numbers: a covariance is
                # then singular, and the Gaussian map a remix of the target's chunks.
                "n_over_d": min(self.target.N, self.source.N) / self.target.codec.Z}


# --- The tour: python lsmerge.py [TARGET SOURCE] --------------------------------------
MODELS = os.path.join(os.path.dirname(__file__), "experiments/models/")


def show(label, x):
    """A row of the tour: a label; shape, mean and standard deviation of a tensor."""
    x = x.double()
    say(f"{label:52}{list(x.shape)!s:11}{x.mean():10.2e}{x.std():10.2e}")


def show_encoding(label, parent):
    """Lines 1 and 2: a tensor, its weights, chunks and latents; and what D(E) loses."""
    stats = parent.stats
    say(f"line 1  {label}: {stats.name} {list(stats.shape)}",
        "        tensor    axes   function                   "
        " shape           mean       std")
    w_L = parent.read(0, stats.numel)
    chunks_NC, _ = chunk(standardise(w_L, stats), parent.codec.C)
    z_NZ = parent.latents(0, parent.N)
    show("line 2  w         L      chunking.Checkpoint.read", w_L)
    show("        X         N x C  chunking.chunk", chunks_NC)
    show("        z = E(X)  N x Z  lsmerge.Codec.encode", z_NZ)
    lost_L = parent.codec_error(0, parent.N)
    show("        w - D(z)  L      lsmerge.Parent.codec_error", lost_L)


def tour(argv=None):
    """Algorithm 1 on one tensor of each of two models, in one piece: the calls that
    `ls_merge` makes where shapes differ. Step through it with python -m pdb.

    For each tensor it prints its shape, by the dimension key, its mean and its standard
    deviation; and the function where it is made."""
    parser = Parser(description=tour.__doc__)
    parser.add_argument("target", nargs="?", default=MODELS + "base.safetensors")
    parser.add_argument("source", nargs="?", default=MODELS + "large.safetensors")
    paths = parser.read(argv)
    codec = Codec.load(MODELS + "vae.safetensors")

    # Line 1: who meets whom. Of all pairs the first q_proj, or the first.
    models = [Checkpoint(paths.target), Checkpoint(paths.source)]
    places = [{name: entry.place for name, entry in model.entries.items()
               if is_selected(entry)} for model in models]
    pairs = list(ot.pair_names(*places).items())
    need(pairs, paths.source, "meets no tensor of the target", "see chunking.ROLES")
    names = max(pairs, key=lambda pair: "q_proj" in pair[0])

    # Line 2: flatten, chunk and encode both. Of equal shapes they share statistics.
    parents = [Parent(partial(model.read, name), measure(model, name), codec)
               for model, name in zip(models, names)]
    target, source = share_statistics(parents)
    show_encoding("target", target)
    show_encoding("source", source)
    # Line 3: the source's latents, projected to the number of the target's. From 576 to
    # 256 each is a mean of 2.25 latents, which shrinks the spread.
    z_target_JZ = target.latents(0, target.N)
    transport = Transport(target, source, Alignment("gaussian"), seed=())
    _, z_projected_JZ = transport.overlapping(0, target.N)
    show("line 3  z_s       J x Z  align.project_rows", z_projected_JZ)
    # Line 4: transported. Mean and standard deviation are now those of z_t.
    z_aligned_JZ = transport.align(z_target_JZ, 0, target.N)
    show("line 4  z~        J x Z  align.gaussian_map", z_aligned_JZ)
    # Line 5: merged, at lambda = 0.1. A mix of unrelated latents varies less than they.
    z_merged_JZ = 0.9 * z_target_JZ + 0.1 * z_aligned_JZ
    show("line 5  z_lambda  J x Z  lsmerge.ls_merge", z_merged_JZ)
    # Line 6: decoded, with the target's statistics.
    merged_L = codec.decode(z_merged_JZ, target.stats, target.stats.numel)
    show("line 6  W^        L      lsmerge.Codec.decode", merged_L)


if __name__ == "__main__":
    sys.exit(command(tour))
