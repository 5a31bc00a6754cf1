"""lsmerge.py: LS-Merge on one screen.                                             (read first)

    checkpoint -> chunks -> latents -> projected, transported -> merged latents -> chunks -> weights
        W           X         z               z~                     z_lambda         X^        W^

`ls_merge` is the method for one tensor: encode, align, merge, decode; `tour` (python lsmerge.py)
shows it in numbers. Which tensors meet is decided in merge.py; the arrows are made in chunking.py,
vae.py and align.py.

Dimension key (a suffix names a tensor's axes):
    L  weights of a tensor          C  weights per chunk        N  chunks of a tensor
    T  chunks per window            B  windows in a batch       D  width of the network
    Z  latent numbers per chunk     I  source chunks            J  target chunks

Paper                           here                                    where
    w in R^L, c, n = L_p / c    flat_L, C, N; padding in real_NC        chunking.chunk
    X in R^{B x n x c}; d; z_d  x_BTC (this n is T); D; Z               chunking.to_windows
    E, D (encoder, decoder)     Codec.encode, Codec.decode              below; the network in vae.py
    q(z | w); Eq. 1, beta       Posterior; vae_loss, VAEConfig.beta     vae.py
    lambda                      lam: the weight of a SOURCE; 0 is the target's round trip
    z_s, z_t, z~, z_lambda      z_source, z_target, z_aligned, z_merged
    r, the compression ratio    VAEConfig.ratio = C / Z
    r of Algorithm 1, line 3    never formed: project takes both sizes  align.project
    T*, A of Eq. 2              gaussian_map; entropic: sinkhorn, barycentric_map       align.py
    Algorithm 1                 line 1: merge.plan_merge; lines 2 to 6: ls_merge, below

Example: a q_proj of 128 x 128 has L = 16,384 weights, N = 256 chunks of C = 64, B = 16 windows of
T = 16, and Z = 64 at r = 1. For bounded memory a tensor is merged in pieces of 2^18 weights.
"""
import copy, math, os, sys
from functools import partial
from typing import Callable, NamedTuple

import torch

import align as ot
from chunking import (PIECE, Checkpoint, CheckpointError, Parser, TensorSlot, cast, chunk, command,
                      from_windows, is_selected, measure, need, place, spans, standardise,
                      to_windows, unchunk, unstandardise)
from vae import VAE, Folded, Posterior, VAEConfig, generator_for, sample


class Codec:
    """E and D on the chunks of one tensor: a VAE with its device and arithmetic."""

    def __init__(self, vae, device="cpu", dtype=torch.float32, record=None, files=()):
        if not vae.ready:
            raise ValueError("the VAE was never trained: do that first (train.train_vae)")
        self.vae, self.record, self.files = vae, record or {}, [*files]     # vae: for train.py
        self.device, self.dtype = device, dtype
        self.C, self.T, self.Z = vae.config.chunk, vae.config.tokens, vae.config.latent
        net = Folded(vae) if Folded.possible(vae) else copy.deepcopy(vae)   # where no block adds
        self.net = net.to(device, dtype).eval().requires_grad_(False)

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """A codec from a VAE file. "exact" (ours): the untrained network, exact at r = 1: with it
        LS-Merge is plain averaging (why: see `combine`), the null model of the method."""
        if path == "exact":
            return cls(VAE(VAEConfig(), torch.Generator().manual_seed(0)), device, dtype)
        file = Checkpoint(path)
        try:
            vae, info = VAE.from_file({n: file.read_tensor(n) for n in file.entries}, file.metadata)
        except (ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(path, " ".join(str(error).split()), "pass a VAE file") from None
        return cls(vae, device, dtype, info, file.files)

    def _batches(self, rows, real_N1):
        """Batches of windows, (B, T, C or Z), and their mask (B, T): None if there is no padding"""
        x_BTX, real_BT1 = to_windows(rows, real_N1, self.T)
        step = len(x_BTX) if isinstance(self.net, Folded) else 512 // self.T    # both by timing
        for start, stop in spans(len(x_BTX), max(1, step)):
            real_BT = real_BT1[start:stop, :, 0]
            yield x_BTX[start:stop].to(self.dtype), None if real_BT.all() else real_BT

    @torch.inference_mode()
    def encode(self, flat_L, slot, samples=0, generator=None, prior=False):
        """z = E(w): (N, Z) float32, the posterior mean; with `samples` the mean of so many draws
        from q(z | w) (paper: self-merging), with `prior` of draws from N(0, I)."""
        chunks_NC, real_NC = chunk(standardise(flat_L.to(self.device), slot), self.C)
        parts = []
        for x_BTC, real_BT in self._batches(chunks_NC, real_NC[:, :1]):     # a chunk begins real
            q = self.net.encode(x_BTC, real_BT)
            q = Posterior(*(torch.zeros_like(part) for part in q)) if prior else q
            drawn = sum(sample(q, generator) for _ in range(samples))       # no more memory than 1
            parts.append(drawn / samples if samples else q.mu_BTZ)
        return from_windows(torch.cat(parts), len(chunks_NC)).float()

    @torch.inference_mode()
    def decode(self, z_NZ, slot, L):
        """W^ = D(z): the first L weights, (L,) float32, in the slot's unit: scale D(z) + mean."""
        ones_N1 = torch.ones(len(z_NZ), 1, dtype=torch.bool, device=z_NZ.device)
        parts = [self.net.decode(z_BTZ, real_BT) for z_BTZ, real_BT in self._batches(z_NZ, ones_N1)]
        return unstandardise(unchunk(from_windows(torch.cat(parts), len(z_NZ)), L), slot)


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
    def per_piece(self):        # chunks of a piece: whole windows, as attention sees them
        return max(1, PIECE // (self.codec.C * self.codec.T)) * self.codec.T

    def latents(self, first, last):
        """z of chunks [first, last): (last - first, Z), encoded in the whole windows around them"""
        C, T = self.codec.C, self.codec.T
        begin = first // T * T
        flat_L = self.read(begin * C, -(-last // T) * T * C)
        draws = self.samples, generator_for(*self.seed, begin), self.prior
        return self.codec.encode(flat_L, self.slot, *draws)[first - begin:last - begin]

    def align(self, z_target_JZ, j0, j1):       # a source of the target's shape enters as it is
        return self.latents(j0, j1)

    def codec_error(self, j0, j1):
        """W - D(E(W)) of chunks [j0, j1), by the posterior mean: encoded again, without draws."""
        flat_L = self.read(j0 * self.codec.C, j1 * self.codec.C)
        z_JZ = self._replace(samples=0).latents(j0, j1)
        return flat_L.to(z_JZ.device).float() - self.codec.decode(z_JZ, self.slot, len(flat_L))


# --- Operators: z_lambda = sum_i c_i z_i over the parents' latents. They differ in the c_i. -------
def combine(parts, coefficients):
    """sum_i c_i z_i.  paper: Sec. 3.3, z_lambda = (1 - lambda) z_a + lambda z_b; a barycentre of N.

    Why the exact codec is plain averaging: if the parents share their statistics, D(E(w)) = w and D
    is affine: D(sum c_i E(w_i)) = sum c_i w_i, wherever the c_i sum to 1 (slerp's do not)."""
    merged = coefficients[0] * parts[0]
    for c, part in zip(coefficients[1:], parts[1:]):
        merged.add_(part, alpha=c)
    return merged


def convex_coefficients(lam):
    """[lambda_1, ...] -> [1 - sum, lambda_1, ...].  ValueError beyond the simplex."""
    if not all(0 <= value <= 1 for value in lam) or sum(lam) > 1 + 1e-9:    # ten times 0.1 rounds
        raise ValueError(f"lambda {', '.join(map(str, lam))}: each must be in [0, 1], the sum too")
    return [max(0.0, 1 - sum(lam)), *lam]


def task_coefficients(lam):
    """Task arithmetic (Ilharco et al. 2023; Table 4): z_t + sum_i lambda_i (z_i - z_base)."""
    if not all(-10 <= value <= 10 for value in lam):        # beyond: surely a typing error
        raise ValueError(f"lambda {', '.join(map(str, lam))}: each must be in [-10, 10]")
    return [1.0, *lam, -sum(lam)]       # the base stands last


def slerp_coefficients(lam, dot, norm_a, norm_b):
    """Spherical interpolation (Shoemake 1985), with cos t = <a, b> / (|a| |b|), from `inner`:
    c_a = sin((1 - lambda) t) / sin t,  c_b = sin(lambda t) / sin t."""
    cosine = max(-1.0, min(1.0, dot / (norm_a * norm_b))) if norm_a * norm_b > 0 else 1.0
    t = math.acos(cosine)
    if math.sin(t) < 1e-6:      # parallel, opposite or zero vectors: undefined, so lerp
        return [1 - lam, lam]
    return [math.sin((1 - lam) * t) / math.sin(t), math.sin(lam * t) / math.sin(t)]


def inner(pairs):
    """(<a, b>, |a|, |b|) of two long vectors that arrive in pieces, in float64."""
    rows = (torch.stack([part.reshape(-1).double() for part in pair]) for pair in pairs)
    (aa, ab), (_, bb) = sum(rows_2L @ rows_2L.T for rows_2L in rows).tolist()
    return ab, math.sqrt(aa), math.sqrt(bb)


# --- Alignment: a source's latents before they meet the target's (Algorithm 1, lines 3 and 4) -----
class Alignment(NamedTuple):
    method: str = "none"            # a name in align.ALIGNERS
    control: str | None = None      # a null control in the source's place
    epsilon: float = ot.EPSILON     # Sinkhorn's


def as_source(target, source, how=Alignment(), seed=(0,)):
    """The source as `ls_merge` takes it: itself, or (another shape or codec, an alignment, a null
    control) through a Transport.  seed: of a control's noise."""
    alike = source.slot.shape == target.slot.shape and source.codec is target.codec
    plain = alike and how.method == "none" and not how.control
    return source if plain else Transport(target, source, how, seed)


class Transport:
    """z~ of one source, piece by piece. A first pass: mean and covariance of the target's chunks
    and of the source's projected ones, over the WHOLE tensor (n chunks of d = Z numbers)."""

    def __init__(self, target, source, how, seed=(0,)):
        self.target, self.source, self.how = target, source, how
        self.of_target, self.of_source, self.of_aligned = ot.Moments(), ot.Moments(), ot.Moments()
        self.iterations, self.error, self.generator = 0, 0.0, generator_for(*seed)
        for j0, j1 in spans(target.N, self.per_piece):
            self.of_target.add(target.latents(j0, j1))
            self.of_source.add(self.overlapping(j0, j1)[1])

    @property
    def per_piece(self):
        """Target chunks of a piece; it meets the source chunks that it overlaps. For Sinkhorn it is
        one transport problem, no mass crosses its border: so it is as large as its cost matrix,
        8 J (share J) bytes, may be (ours: memory forces it, above 5,792 x 5,792 chunks)."""
        share, T = self.source.N / self.target.N, self.target.codec.T   # source per target chunk
        most = self.target.per_piece / max(1.0, share)
        if self.how.method == "sinkhorn":       # pieces of equal size
            most = self.target.N / math.ceil(self.target.N / math.sqrt(ot.LIMIT_BYTES / 8 / share))
        return max(1, math.ceil(most / T)) * T

    def overlapping(self, j0, j1):
        """Source latents that overlap target chunks [j0, j1): (I, Z), and projected (J, Z)."""
        I, J, Z = self.source.N, self.target.N, self.target.codec.Z
        i0, i1 = ot.source_range(j0, j1, I, J)
        z_IZ = ot.project(self.source.latents(i0, i1), i1 - i0, Z)      # only Z: to the target's
        return z_IZ, ot.project_rows(z_IZ, i0, I, j0, j1, J) if I != J else z_IZ     # line 3

    def align(self, z_target_JZ, j0, j1):
        """z~ for target chunks [j0, j1): lines 3 and 4, or a null control instead of both."""
        if self.how.control:
            z_JZ = ot.control_latents(self.how.control, z_target_JZ, self.of_target, self.generator)
        else:
            meeting = ot.Meeting(*self.overlapping(j0, j1), z_target_JZ, self.of_source,
                                 self.of_target, self.how.epsilon)
            try:
                z_JZ, iterations, error = ot.ALIGNERS[self.how.method](meeting)     # line 4
            except ValueError as failed:
                need(False, "alignment", failed, "raise --epsilon", self.target.slot.name)
            self.iterations, self.error = self.iterations + iterations, max(self.error, error)
        self.of_aligned.add(z_JZ)
        return z_JZ.float()

    def report(self):
        """What the report says of this transport, after the last piece."""
        (layer, role), goal = place(self.target.slot.name), self.of_target
        return {"layer": layer, "role": role, "source_layer": place(self.source.slot.name).layer,
                "iterations": self.iterations, "marginal_error": self.error,
                "cost_before": ot.wasserstein2(self.of_source, goal),
                "cost_after": ot.wasserstein2(self.of_aligned, goal),
                "std_ratio": self.of_aligned.spread / (goal.spread or 1.0),
                "n_over_d": min(self.target.N, self.source.N) / self.target.codec.Z}


# --- The method -----------------------------------------------------------------------------------
def ls_merge(target, sources, coefficients, residual=False):
    """LS-Merge of one tensor (paper: Algorithm 1, lines 2 to 6): yields (start, weights in the
    target's dtype), piece by piece.  target: a Parent;  sources: from `as_source`, none: the round
    trip;  coefficients: the c_i, the target's first;  residual (ours): adds back what the codec
    lost of each unaligned parent,  W^ = sum_k c_k W_k + (D(z_lambda) - sum_k c_k D(z_k))."""
    C, slot, parents = target.codec.C, target.slot, [target, *sources]
    for j0, j1 in spans(target.N, min(parent.per_piece for parent in sources or [target])):
        start, stop = j0 * C, min(j1 * C, slot.numel)
        z_target_JZ = target.latents(j0, j1)                                            # line 2
        z_aligned = [source.align(z_target_JZ, j0, j1) for source in sources]           # lines 3, 4
        z_merged_JZ = combine([z_target_JZ, *z_aligned], coefficients)                  # line 5
        # Decoded with the target's statistics. A source of another shape was encoded with its own:
        # its pattern enters, at the target's scale.
        merged_L = target.codec.decode(z_merged_JZ, slot, stop - start)                 # line 6
        if residual:
            for c, parent in zip(coefficients, parents):
                if isinstance(parent, Parent):      # not through a Transport: it entered unaligned
                    merged_L = merged_L + c * parent.codec_error(j0, j1)
        yield start, cast(merged_L, slot)


def weight_merge(readers, coefficients, entry):
    """The baseline: sum_i c_i W_i, in pieces; the target's bytes where its c is the only one."""
    wide = torch.float64 if entry.dtype == torch.float64 else torch.float32
    for start, stop in spans(entry.numel):
        if any(coefficients[1:]):
            raw = [read(start, stop).to(wide) for read in readers]
            yield start, cast(combine(raw, coefficients), entry)
        else:
            yield start, readers[0](start, stop)


# --- The tour: python lsmerge.py [TARGET SOURCE]; step through it with python -m pdb --------------
def tour(argv=None):
    """Algorithm 1 on one tensor of each of two models, in one piece: the calls of `ls_merge`."""
    folder, parser = os.path.dirname(__file__) + "/experiments/models/", Parser(prog="lsmerge.py")
    for model, default in (("TARGET", "base"), ("SOURCE", "large")):
        parser.add_argument(model, nargs="?", default=f"{folder}{default}.safetensors")
    models = [Checkpoint(path) for path in vars(parser.parse_args(argv)).values()]
    codec, rows = Codec.load(folder + "vae.safetensors"), []
    pairs = ot.pair_places(*({entry.name: place(entry.name) for entry in model.entries.values()
                              if is_selected(entry)} for model in models))
    need(pairs, models[1].path, "no tensor pairs with one of the target", "see chunking.ROLES")
    pair = min(pairs.items(), key=lambda names: place(names[0]).role != "q")    # a q_proj, if any
    target, source = (Parent(partial(model.read, name), measure(model, name), codec)
                      for model, name in zip(models, pair))
    for k, parent in zip("ts", (target, source)):
        w_L, slot, N = parent.read().float(), parent.slot, parent.N
        print(f"line 1  l_{k} {os.path.basename(slot.file)} {slot.name} {list(slot.shape)}  "
              "align.pair_places")
        x_BTC, _ = to_windows(*chunk(standardise(w_L, slot), codec.C), codec.T)
        z_NZ, nmse = parent.latents(0, N), (parent.codec_error(0, N) / slot.scale).square().mean()
        padding = x_BTC.numel() - len(w_L)      # in the last chunk, and in the last window
        rows += [("line 2", f"w_{k}", "L", w_L, "", "chunking.measure"),
                 ("", f"X_{k}", "BTC", x_BTC, f"N = {N}, padding {padding}", "chunking.to_windows"),
                 ("", f"z_{k}", "NZ", z_NZ, f"D(z_{k}): NMSE {nmse:.1e}", "lsmerge.Codec.encode")]
    transport, J = as_source(target, source, Alignment("gaussian")), target.N
    z_target_JZ, z_projected_JZ = target.latents(0, J), transport.overlapping(0, J)[1]      # line 3
    z_aligned_JZ = transport.align(z_target_JZ, 0, J)                                       # line 4
    z_merged_JZ = combine([z_target_JZ, z_aligned_JZ], convex_coefficients([0.1]))          # line 5
    merged_L = cast(codec.decode(z_merged_JZ, target.slot, target.slot.numel), target.slot).float()
    cost = "W2^2 {cost_before:.3f} to {cost_after:.3f}".format(**transport.report())
    far = (merged_L - target.read().float()).norm() / target.read().float().norm()
    rows += [("line 3", "z_s", "JZ", z_projected_JZ, f"from I = {source.N}", "align.project_rows"),
             ("line 4", "z~", "JZ", z_aligned_JZ, cost, "align.gaussian_map"),
             ("line 5", "z_lambda", "JZ", z_merged_JZ, "0.9 z_t + 0.1 z~", "lsmerge.combine"),
             ("line 6", "W^", "L", merged_L, f"|W^-W_t|/|W_t| {far:.4f}", "lsmerge.Codec.decode")]
    print("paper   symbol    axes: shape             mean       std" + " " * 24 + "function")
    for line, symbol, axes, x, note, where in rows:
        shape = f"{axes}: {' x '.join(map(str, x.shape))}"
        print(f"{line:8}{symbol:10}{shape:18}{x.mean():10.2e}{x.std():10.2e}  {note:22}{where}")


if __name__ == "__main__":
    sys.exit(command(tour))
