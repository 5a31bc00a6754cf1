"""lsmerge.py: LS-Merge on one screen.                                      (read first)

    checkpoint -> chunks -> latents -> projected, transported -> merged latents -> weights
        W           X         z               z~                   z_lambda          W^

`ls_merge` is the method for one tensor: encode, align, merge, decode. `tour` (run this
file: python lsmerge.py) shows it in numbers. The arrows are made in chunking.py, vae.py
and align.py; which tensors meet is decided in merge.py.

Dimension key (a suffix names a tensor's axes):
    L  weights of a tensor          C  weights per chunk         N  chunks of a tensor
    T  chunks per window            B  windows in a batch        D  width of the network
    Z  latent numbers per chunk     I  source chunks             J  target chunks

Paper                           here                                   where
    w in R^L, c, n = L_p / c    flat_L, C, N; padding in real_NC       chunking.chunk
    X in R^{B x n x c}; d; z_d  x_BTC (this n is T); D; Z              chunking.to_windows
    E, D (encoder, decoder)     Codec.encode, Codec.decode             below, and vae.py
    q(z | w); Eq. 1, beta       Posterior; vae_loss, VAEConfig.beta    vae.py
    lambda                      lam: the weight of a SOURCE; 0 is the target's round trip
    z_s, z_t, z~, z_lambda      z_source, z_target, z_aligned, z_merged
    r, the compression ratio    VAEConfig.ratio = C / Z
    r of Algorithm 1, line 3    never formed: project takes both sizes
    T*, A of Eq. 2              gaussian_map; sinkhorn, barycentric_map    align.py
    Algorithm 1                 line 1: align.pair_names; lines 2 to 6: ls_merge, below

Example: a q_proj of 128 x 128 has L = 16,384 weights, N = 256 chunks of C = 64, B = 16
windows of T = 16, and Z = 64 at r = 1.
"""
import copy
import math
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable, NamedTuple

import torch

import align as ot
from chunking import (PIECE, Checkpoint, CheckpointError, Parser, TensorStats, cast, chunk,
                      command, from_windows, is_selected, measure, need, pool, say, spans,
                      standardise, to_windows, unchunk, unstandardise, wide)
from vae import VAE, Posterior, VAEConfig, generator_for, sample


# --- The method -------------------------------------------------------------------------
def ls_merge(target, sources, coefficients, residual=False):
    """LS-Merge of one tensor (paper: Algorithm 1, lines 2 to 6).

    Args:     target: a Parent; sources: Parents or Transports, from `as_source` (none: the
              target's round trip); coefficients: c_k of z_lambda = sum_k c_k z_k, the
              target's first
              residual (ours): add back what the codec lost of each unaligned parent,
              W^ = D(z_lambda) + sum_k c_k (W_k - D(E(W_k)))
    Yields:   (start, weights in the target's dtype), piece by piece: memory stays bounded
    """
    C = target.codec.C
    stats = target.stats
    step = min(parent.per_piece for parent in sources or [target])
    for j0, j1 in spans(target.N, step):
        start = j0 * C
        stop = min(j1 * C, stats.numel)
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
                if isinstance(parent, Parent):          # it entered unaligned
                    merged_L = merged_L + c * parent.codec_error(j0, j1)
        yield start, cast(merged_L, stats)


# --- E and D ----------------------------------------------------------------------------
BATCH = 32      # windows that the network takes at a time: 512 chunks, by timing


class Codec:
    """E and D on the chunks of one tensor: a VAE with its device and arithmetic."""

    def __init__(self, vae, device="cpu", dtype=torch.float32, record=None, files=()):
        self.vae = vae                      # as it was trained, for train.py
        self.device = device
        self.dtype = dtype
        self.record = record or {}          # of its training
        self.files = list(files)            # that it was read from
        self.C = vae.config.chunk
        self.T = vae.config.tokens
        self.Z = vae.config.latent
        self.net = copy.deepcopy(vae).to(device, dtype).eval().requires_grad_(False)

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """A codec from a VAE file; or "exact" (ours): the network without blocks, exact at
        r = 1. With it LS-Merge is plain averaging, the null model of the method."""
        if path == "exact":
            vae = VAE(VAEConfig(blocks=0, init="pca"))
            return cls(vae.start(generator_for(0)), device, dtype)
        file = Checkpoint(path)
        tensors = {name: file.read_tensor(name) for name in file.entries}
        try:
            vae, record = VAE.from_file(tensors, file.metadata)
        except ValueError as error:
            raise CheckpointError(path, error, "pass a file that train.py wrote") from None
        return cls(vae, device, dtype, record, file.files)

    def batches(self, rows_NX, real_NX):
        """Batches of windows, (B, T, X), and which of their chunks are real, (B, T); None
        in its place if all are."""
        x_BTX, real_BTX = to_windows(rows_NX, real_NX, self.T)
        for start, stop in spans(len(x_BTX), BATCH):
            real_BT = real_BTX[start:stop].any(dim=-1)
            if real_BT.all():
                real_BT = None
            yield x_BTX[start:stop].to(self.dtype), real_BT

    @torch.inference_mode()
    def encode(self, flat_L, stats, draw=None):
        """z = E(w), (N, Z) float32: the mean of q(z | w), or what `draw` makes of q.
        draw: (Posterior, number of the batch) -> (B, T, Z)"""
        x_L = standardise(flat_L.to(self.device), stats)
        chunks_NC, real_NC = chunk(x_L, self.C)
        parts = []
        for number, (x_BTC, real_BT) in enumerate(self.batches(chunks_NC, real_NC)):
            if draw is None:
                parts.append(self.net.encode_mean(x_BTC, real_BT))
            else:
                parts.append(draw(self.net.encode(x_BTC, real_BT), number))
        return from_windows(torch.cat(parts), len(chunks_NC)).float()

    @torch.inference_mode()
    def decode(self, z_NZ, stats, L):
        """W^ = D(z): the first L weights, (L,), in the tensor's own unit."""
        parts = []
        for z_BTZ, real_BT in self.batches(z_NZ, torch.ones_like(z_NZ, dtype=torch.bool)):
            parts.append(self.net.decode(z_BTZ, real_BT))
        x_L = unchunk(from_windows(torch.cat(parts), len(z_NZ)), L)
        return unstandardise(x_L, stats)


def self_merge(posterior, K, generator):
    """Self-merging: the mean of K codes drawn from one model's posterior.
    paper: Sec. 3.3,  z = (1/K) sum_k z_k,  z_k ~ q(z | w)"""
    z_BTZ = torch.zeros_like(posterior.mu_BTZ)
    for _ in range(K):
        z_BTZ += sample(posterior, generator) / K
    return z_BTZ


@dataclass(frozen=True)
class Parent:
    """One tensor of one model: how to read it, its statistics, its codec."""
    read: Callable              # (start, stop) -> those elements of the flattened tensor
    stats: TensorStats
    codec: Codec
    samples: int = 0            # K draws of self-merging; 0: the posterior's mean
    seed: tuple = (0,)          # of those draws
    prior: bool = False         # draw from N(0, I) instead: for the experiments

    @property
    def N(self): return self.stats.n_chunks(self.codec.C)

    @property
    def per_piece(self):
        """Chunks of a piece: whole batches of windows."""
        batch = BATCH * self.codec.T
        return max(1, PIECE // (self.codec.C * batch)) * batch

    def latents(self, first, last):
        """z of chunks [first, last), (last - first, Z). Encoded are the whole batches
        around them: a chunk's window, and its noise, are the same whoever asks."""
        C = self.codec.C
        batch = BATCH * self.codec.T
        begin = first // batch * batch
        end = -(-last // batch) * batch

        def draw(posterior, number):
            generator = generator_for(*self.seed, begin // batch + number)
            if self.prior:
                posterior = Posterior(*map(torch.zeros_like, posterior))
            return self_merge(posterior, max(1, self.samples), generator)

        flat_L = self.read(begin * C, end * C)
        draws = draw if self.samples or self.prior else None
        z_NZ = self.codec.encode(flat_L, self.stats, draws)
        return z_NZ[first - begin:last - begin]

    def align(self, z_target_JZ, j0, j1):
        """A source of the target's shape enters as it is: chunk j meets chunk j."""
        return self.latents(j0, j1)

    def codec_error(self, j0, j1):
        """W - D(E(W)) of chunks [j0, j1), by the posterior's mean."""
        flat_L = self.read(j0 * self.codec.C, j1 * self.codec.C).to(self.codec.device)
        plain = replace(self, samples=0, prior=False)
        decoded_L = self.codec.decode(plain.latents(j0, j1), self.stats, len(flat_L))
        return flat_L.to(decoded_L.dtype) - decoded_L


def share_statistics(parents):
    """Parents of the target's shape share pooled statistics; the others keep their own.

    ours:     then the exact codec is plain averaging. D(E(w)) = w, and both are affine
              maps, the same for all of these parents: so D(sum c_k E(w_k)) = sum c_k w_k,
              wherever the c_k sum to 1 (slerp's do not).
    """
    shape = parents[0].stats.shape
    mean, std = pool([parent.stats for parent in parents if parent.stats.shape == shape])
    shared = []
    for parent in parents:
        if parent.stats.shape == shape:
            parent = replace(parent, stats=replace(parent.stats, mean=mean, std=std))
        shared.append(parent)
    return shared


# --- Operators: the coefficients c_k of z_lambda = sum_k c_k z_k ------------------------
def convex_coefficients(lam):
    """A convex barycentre: [lambda_1, ...] -> [1 - sum, lambda_1, ...].
    paper: Sec. 3.3,  z_lambda = (1 - lambda) z_a + lambda z_b.  ValueError otherwise."""
    # So put, NaN is refused too; ten times 0.1 rounds.
    if not (all(value >= 0 for value in lam) and sum(lam) <= 1 + 1e-9):
        raise ValueError("each lambda must be 0 or more, and their sum at most 1")
    return [max(0.0, 1 - sum(lam)), *lam]


def task_coefficients(lam):
    """Task arithmetic (Ilharco et al. 2023; paper: Table 4): z_t + sum_i lambda_i (z_i -
    z_base). The base stands last."""
    if not all(abs(value) <= 10 for value in lam):      # beyond: surely a typing error
        raise ValueError("each lambda must be from -10 to 10")
    return [1.0, *lam, -sum(lam)]


def slerp_coefficients(lam, dot, norm_a, norm_b):
    """Spherical interpolation (Shoemake 1985), with cos t = <a, b> / (|a| |b|):
    c_a = sin((1 - lambda) t) / sin t,   c_b = sin(lambda t) / sin t"""
    cosine = 1.0
    if norm_a * norm_b > 0:
        cosine = max(-1.0, min(1.0, dot / (norm_a * norm_b)))
    t = math.acos(cosine)
    if math.sin(t) < 1e-6:      # parallel, opposite or zero vectors: undefined, so lerp
        return [1 - lam, lam]
    return [math.sin((1 - lam) * t) / math.sin(t), math.sin(lam * t) / math.sin(t)]


def inner(pairs):
    """(<a, b>, |a|, |b|) of two long vectors that arrive in pieces, in float64."""
    dot = aa = bb = 0.0
    for a, b in pairs:
        a = a.reshape(-1).double()
        b = b.reshape(-1).double()
        dot += a.dot(b).item()
        aa += a.dot(a).item()
        bb += b.dot(b).item()
    return dot, math.sqrt(aa), math.sqrt(bb)


def combine(raw, coefficients, entry):
    """sum_k c_k W_k of a piece of the parents' weights, rounded once to the target's dtype:
    what the exact codec gives. The target's own bits where nothing else enters."""
    target_L, *others = raw
    if not any(coefficients[1:]):
        return target_L
    merged_L = coefficients[0] * target_L.to(wide(entry.dtype))
    for c, other_L in zip(coefficients[1:], others):
        merged_L.add_(other_L.to(merged_L.dtype), alpha=c)
    return cast(merged_L, entry)


def weight_merge(readers, coefficients, entry):
    """The baseline without a codec, in pieces as `ls_merge` gives them."""
    for start, stop in spans(entry.numel):
        raw = [read(start, stop) for read in readers]
        yield start, combine(raw, coefficients, entry)


# --- Alignment: Algorithm 1, lines 3 and 4 ----------------------------------------------
class Alignment(NamedTuple):
    """How a source is brought to the target."""
    method: str = "auto"            # a name in align.ALIGNERS; auto: none between equal
                                    # shapes, gaussian between others
    control: str | None = None      # a null control in the source's place
    epsilon: float = ot.EPSILON     # Sinkhorn's


def as_source(target, source, alignment=Alignment(), seed=(0,)):
    """The source as `ls_merge` takes it: itself where chunk j meets chunk j, or a
    Transport. seed: of a control's noise."""
    same = source.stats.shape == target.stats.shape
    if same and alignment.method in ("auto", "none") and not alignment.control:
        return source
    if alignment.method == "auto":
        alignment = alignment._replace(method="gaussian")
    return Transport(target, source, alignment, seed)


class Transport:
    """z~ of one source, piece by piece. Before, a first pass takes the mean and covariance
    of the target's chunks and of the source's projected ones, over the WHOLE tensor."""

    def __init__(self, target, source, alignment, seed=(0,)):
        self.target = target
        self.source = source
        self.alignment = alignment
        self.generator = generator_for(*seed)
        self.iterations = 0
        self.error = 0.0
        self.of_target = ot.Moments()
        self.of_source = ot.Moments()
        self.of_aligned = ot.Moments()
        for j0, j1 in spans(target.N, self.per_piece):
            self.of_target.add(target.latents(j0, j1))
            self.of_source.add(self.overlapping(j0, j1)[1])

    @property
    def per_piece(self):
        """Target chunks of a piece, so that it holds at most a piece of either model, and
        all are of one size. A piece is one problem of Sinkhorn's: no mass crosses its
        border (ours: memory forces it, above 4,096 x 4,096 chunks)."""
        share = max(1.0, self.source.N / self.target.N)     # source per target chunk
        pieces = math.ceil(self.target.N * share / self.target.per_piece)
        return math.ceil(self.target.N / pieces)

    def overlapping(self, j0, j1):
        """The source latents that overlap target chunks [j0, j1): (I, Z), and projected,
        (J, Z).  Algorithm 1, line 3."""
        I = self.source.N
        J = self.target.N
        i0, i1 = ot.source_range(j0, j1, I, J)
        z_IZ = self.source.latents(i0, i1)
        z_IZ = ot.project(z_IZ, len(z_IZ), self.target.codec.Z)     # if two VAEs differ
        if I == J:
            return z_IZ, z_IZ
        return z_IZ, ot.project_rows(z_IZ, i0, I, j0, j1, J)

    def align(self, z_target_JZ, j0, j1):
        """z~ for target chunks [j0, j1), or a null control in its place."""
        if self.alignment.control:
            z_JZ = ot.control_latents(self.alignment.control, z_target_JZ, self.of_target,
                                      self.generator)
        else:
            z_IZ, z_projected_JZ = self.overlapping(j0, j1)                 # line 3
            meeting = ot.Meeting(z_IZ, z_projected_JZ, z_target_JZ, self.of_source,
                                 self.of_target, self.alignment.epsilon)
            try:
                found = ot.ALIGNERS[self.alignment.method](meeting)         # line 4
            except ValueError as error:
                raise CheckpointError("alignment", error, "raise --epsilon",
                                      self.target.stats.name) from None
            z_JZ = found.z_JZ
            self.iterations += found.iterations
            self.error = max(self.error, found.error)
        self.of_aligned.add(z_JZ)
        return z_JZ.float()

    def report(self):
        """What the report says of this transport, after the last piece."""
        place = self.target.stats.place
        goal = self.of_target
        return {"layer": place.layer, "role": place.role,
                "source_layer": self.source.stats.place.layer,
                "iterations": self.iterations, "marginal_error": self.error,
                "cost_before": ot.wasserstein2(self.of_source, goal),
                "cost_after": ot.wasserstein2(self.of_aligned, goal),
                "std_ratio": self.of_aligned.std / (goal.std or 1.0),
                "n_over_d": min(self.target.N, self.source.N) / self.target.codec.Z}


# --- The tour: python lsmerge.py [TARGET SOURCE] ----------------------------------------
def tour(argv=None):
    """Algorithm 1 on one tensor of each of two models, in one piece: the calls that
    `ls_merge` makes. Step through it with python -m pdb."""
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "experiments/models/")
    parser = Parser(prog="lsmerge.py", description=tour.__doc__)
    parser.add_argument("target", nargs="?", default=folder + "base.safetensors")
    parser.add_argument("source", nargs="?", default=folder + "large.safetensors")
    paths = parser.parse_args(argv)
    models = [Checkpoint(paths.target), Checkpoint(paths.source)]
    codec = Codec.load(folder + "vae.safetensors")

    places = []
    for model in models:
        chosen = filter(is_selected, model.entries.values())
        places.append({entry.name: entry.place for entry in chosen})
    pairs = ot.pair_names(*places)
    need(pairs, paths.source, "no tensor meets one of the target", "see chunking.ROLES")
    names = min(pairs.items(), key=lambda pair: places[0][pair[0]].role != "q")
    parents = [Parent(partial(model.read, name), measure(model, name), codec)
               for model, name in zip(models, names)]
    target, source = share_statistics(parents)

    def show(line, symbol, axes, x, note, where):
        shape = f"{axes}: {' x '.join(map(str, x.shape))}"
        x = x.double()
        say(f"{line:8}{symbol:10}{shape:18}{x.mean():10.2e}{x.std():10.2e}  {note:24}{where}")

    say("paper   symbol    axes: shape             mean       std" + " " * 26 + "function")
    for k, parent in zip("ts", (target, source)):
        stats = parent.stats
        say(f"line 1  {os.path.basename(stats.file)}: {stats.name} {list(stats.shape)}")
        w_L = parent.read(0, stats.numel)
        x_NC, real_NC = chunk(standardise(w_L, stats), codec.C)
        x_BTC, _ = to_windows(x_NC, real_NC, codec.T)
        z_NZ = parent.latents(0, parent.N)
        nmse = (parent.codec_error(0, parent.N) / stats.scale).square().mean()
        padding = f"N = {parent.N}, padding {x_BTC.numel() - len(w_L)}"
        show("line 2", f"w_{k}", "L", w_L, "", "chunking.measure")
        show("", f"X_{k}", "BTC", x_BTC, padding, "chunking.to_windows")
        show("", f"z_{k}", "NZ", z_NZ, f"D(z_{k}): NMSE {nmse:.1e}", "lsmerge.Codec.encode")

    J = target.N
    transport = Transport(target, source, Alignment("gaussian"))
    z_target_JZ = target.latents(0, J)
    z_projected_JZ = transport.overlapping(0, J)[1]
    show("line 3", "z_s", "JZ", z_projected_JZ, f"from I = {source.N}", "align.project_rows")
    z_aligned_JZ = transport.align(z_target_JZ, 0, J)
    cost = "W2^2 {cost_before:.3f} to {cost_after:.3f}".format(**transport.report())
    show("line 4", "z~", "JZ", z_aligned_JZ, cost, "align.gaussian_map")
    z_merged_JZ = 0.9 * z_target_JZ + 0.1 * z_aligned_JZ
    show("line 5", "z_lambda", "JZ", z_merged_JZ, "0.9 z_t + 0.1 z~", "lsmerge.ls_merge")
    w_L = target.read(0, target.stats.numel)
    merged_L = cast(codec.decode(z_merged_JZ, target.stats, len(w_L)), target.stats)
    far = (merged_L.double() - w_L.double()).norm() / w_L.double().norm()
    show("line 6", "W^", "L", merged_L, f"|W^-W_t|/|W_t| {far:.4f}", "lsmerge.Codec.decode")


if __name__ == "__main__":
    sys.exit(command(tour))
