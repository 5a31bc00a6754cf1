"""align.py: bring a source to its target.                                (read fourth)

Paper: Sec. 3.3, Algorithm 1. A row of latents is a chunk: I rows of the source, J of
the target, Z numbers each. In the order of Algorithm 1:

    line 1   pair_names, pair_layers     names -> which tensor meets which
    line 3   project_rows                latents z_IZ -> z_JZ, by overlap in order
    line 4   gaussian_map                transport of moments: the paper's formula
             sinkhorn, barycentric_map   transport of points
             ALIGNERS                    name -> function; a fork adds one, and a line
    ours     control_latents             what a source without content would do
             wasserstein2                how far apart two clouds are

Pure functions on any device; latents in float64. Not here: unbalanced transport; hidden
units (experiments/tools/match.py puts related models into one order of units, before
there are chunks).
"""
import math
from collections import deque
from typing import NamedTuple

import torch


# --- Line 1: who meets whom -----------------------------------------------------------
def pair_layers(n_source, n_target, by="depth"):
    """[source layer of target layer 0, of 1, ...].

    ours:     "depth": layer j meets floor(j (L_s - 1) / (L_t - 1) + 1/2), so that the
              ends meet; for L_t = 1 the middle one
    paper:    "index": Algorithm 1 read literally, the first min(L_s, L_t) in order; the
              target's other layers have no partner
    Example:  6 source layers and 4 target layers, by depth: 0, 2, 3, 5; by index:
              0, 1, 2, 3
    Raises:   ValueError for fewer than one layer, or another word
    """
    if min(n_source, n_target) < 1 or by not in ("depth", "index"):
        raise ValueError("cannot pair: need one layer or more, by depth or index")
    if by == "index":
        return [*range(min(n_source, n_target))]
    if n_target == 1:
        return [n_source // 2]
    partners = []
    for j in range(n_target):
        # One division of whole numbers: so a half is exactly a half, and goes up.
        partners.append(math.floor(j * (n_source - 1) / (n_target - 1) + 0.5))
    return partners


def partners_by_depth(target_stack, source_stack, by="depth"):
    """{target layer: source layer} of two stacks, whose layers are its keys.
    Example:  layers 3, 5, 7 and 2, 4, by index: {3: 2, 5: 4}"""
    layers = sorted(source_stack)
    partners = pair_layers(len(source_stack), len(target_stack), by)
    return {j: layers[i] for j, i in zip(sorted(target_stack), partners)}


def pair_names(target, source, partners_of=partners_by_depth):
    """{target name: source name}: who meets whom, decided tensor by tensor.

    Args:     target, source: {name: chunking.Place}
              partners_of(target stack, source stack) -> {target layer: source layer}; a
              stack is {layer: {(the name behind its number, its role): the name}}
    Example:  a vision-language model meets a language model

        target                                             source
        model.language_model.layers.7.mlp.up_proj.weight   model.layers.7.mlp.up_proj...
        model.language_model.norm.weight                   model.norm.weight
        lm_head.weight                                     lm_head.weight
        model.visual.blocks.7.attn.qkv.weight              (nobody)

              Stacks of layers first: 'model.language_model.layers' has an end in
              common with 'model.layers', 'model.visual.blocks' has none. Within this
              pair layers meet, and in them tensors. The pair also says that
              'model.language_model.' is 'model.' in the source: so the norm, which
              stands outside the layers, is found.
    ours:     the paper pairs whole models. What stays ambiguous meets nobody.
    """
    mine = stacks_of(target)
    theirs = stacks_of(source)
    stacks = pair_stacks(mine, theirs)
    pairs = pair_outside_layers(target, source, stacks)
    for t, s in stacks.items():
        for j, i in partners_of(mine[t], theirs[s]).items():
            pairs |= pair_within_layer(mine[t][j], theirs[s][i])
    return pairs


def stacks_of(places):
    """{stack: {layer: {(rest, role): name}}} of a model's numbered layers, where `rest`
    is the name behind the number.
    Example:  model.layers.7.mlp.up_proj.weight
              -> {'model.layers': {7: {('mlp.up_proj.weight', 'up'): that name}}}"""
    stacks = {}
    for name, place in places.items():
        if place.layer is not None:
            layer = stacks.setdefault(place.stack, {}).setdefault(place.layer, {})
            layer.setdefault((place.rest, place.role), name)    # the first of equals
    return stacks


def best_pairs(scores):
    """{t: s}, one to one, from scores {(t, s): score}. The highest score is settled
    first, then the highest of those that are left. Candidates that are equally good for
    the same t or s leave it without a partner.
    Example:  {(a, x): 2, (a, y): 1, (b, y): 1} -> a: x, b: y
              {(a, x): 2, (a, y): 2} -> nothing: a has no best partner"""
    pairs = {}
    while scores:
        best = max(scores.values())
        level = [pair for pair in scores if scores[pair] == best]
        ts, ss = zip(*level)
        for t, s in level:
            if ts.count(t) == ss.count(s) == 1:
                pairs[t] = s
        scores = {(t, s): score for (t, s), score in scores.items()
                  if t not in ts and s not in ss}
    return pairs


def common_end(one, other):
    """The longest end, in dotted parts, that two names have in common; and what stands
    before it in each of them.
    Example:  'model.text.layers' and 'text.layers' -> 'text.layers', ('model.', '')"""
    parts = one.split(".")
    while parts and parts != other.split(".")[-len(parts):]:
        parts = parts[1:]
    end = ".".join(parts)
    return end, (one.removesuffix(end), other.removesuffix(end))


def pair_stacks(mine, theirs):
    """{target stack: source stack}: equal names, then the longest common end of names,
    then the share of tensors that both hold. Without a common end ('transformer.h' and
    'model.layers') only where neither side has another stack."""
    scores = {}
    for t in mine:
        for s in theirs:
            held_t = set().union(*mine[t].values())         # (rest, role) in any layer
            held_s = set().union(*theirs[s].values())
            share = len(held_t & held_s) / len(held_t | held_s)
            end, _ = common_end(t, s)
            if end or len(mine) == len(theirs) == 1:
                scores[t, s] = (t == s, len(end), share)
    return best_pairs(scores)


def pair_within_layer(target_layer, source_layer):
    """{target name: source name} of two layers, {(rest, role): name} each: equal names,
    then equal roles (BERT's `query`, Llama's `q_proj`). Norms do not pair by role, as
    models place them differently."""
    scores = {}
    for (rest, role), t in target_layer.items():
        for (other_rest, other_role), s in source_layer.items():
            if rest == other_rest:
                scores[t, s] = 2
            elif role == other_role and not role.startswith("norm"):
                scores[t, s] = 1
    return best_pairs(scores)


def pair_outside_layers(target, source, stacks):
    """{target name: source name} of embeddings, final norms and heads. Two names meet

    - if they are equal, wrappers included
    - as their stacks do: if 'model.language_model.layers' meets 'model.layers', then
      'model.language_model.norm.weight' meets 'model.norm.weight'. The longest leading
      parts first
    - if they are equal without wrappers
    - if one is the end of the other: 'model.projector.weight', 'projector.weight'. An
      end of a single part ('weight') says nothing
    """
    leads = {("", "")}                              # of equal names
    for t, s in stacks.items():
        leads.add(common_end(t, s)[1])
    outside = [name for name in target if target[name].layer is None]
    others = [name for name in source if source[name].layer is None]
    scores = {}
    for t in outside:
        for s in others:
            end, lead = common_end(target[t].rest, source[s].rest)
            if lead in leads:           # as they stand, or as their stacks do
                scores[t, s] = (t == s, len("".join(lead)))
            elif "." in end and "" in lead:     # one is the end of the other: the last
                scores[t, s] = (False, -1)
    return best_pairs(scores)


# --- Line 3: proportional projection --------------------------------------------------
def source_range(j0, j1, n_source, n_target):
    """The source rows [i0, i1) under the slots [j0, j1): what project_rows needs."""
    return j0 * n_source // n_target, -(-j1 * n_source // n_target)


def project_rows(z_IZ, i0, n_source, j0, j1, n_target):
    """Slots [j0, j1) of the projection, (j1 - j0, Z), from rows i0, i0 + 1, ... of the
    source, which must hold those of `source_range`.

    Equation:  z[j] = sum_i P[j, i] z_source[i],
               P[j, i] = n_t |[j, j+1) / n_t  n  [i, i+1) / n_s|
    Source:    ours: the paper only says "proportional". Overlap keeps constants and the
               mean; n_s > n_t averages, which shrinks the spread, n_s < n_t blends
    Example:   n_s = 3, n_t = 2:  (2 z0 + z1) / 3,  (z1 + 2 z2) / 3
    """
    z = z_IZ.double()
    if n_source == n_target:
        return z
    # The source is a function that is constant along each of its rows. A slot holds the
    # mean of that function over the slot: the difference of its integral at the slot's
    # two borders, over their distance.
    integral = torch.cat([z.new_zeros(1, z.shape[1]), z.cumsum(0)])     # (rows + 1, Z)
    # In units of 1 / (n_s n_t) all borders of slots are whole numbers. Between the two
    # edges of a row the integral is a straight line.
    border = torch.arange(j0, j1 + 1, device=z.device) * n_source       # (slots + 1,)
    below = border // n_target - i0                     # the edge of a row before it
    above = -(-border // n_target) - i0                 # behind it; may be the same
    part = (border % n_target).to(z) / n_target         # of the way between them
    at_border = integral[below].lerp(integral[above], part[:, None])
    return at_border.diff(dim=0) * n_target / n_source


def project(z_IZ, n_target, z_target=None):
    """The whole projection, (n_target, z_target), float64; the identity, bit for bit,
    where sizes agree. Latent numbers too are projected, if two VAEs differ (ours: a
    stand-in, as their axes share no order)."""
    z = project_rows(z_IZ, 0, len(z_IZ), 0, n_target, n_target)
    if z_target in (None, z.shape[1]):
        return z
    return project(z.T, z_target).T


# --- Line 4: the Gaussian map ---------------------------------------------------------
# Eigenvalues of the source's covariance are at least FLOOR times the mean eigenvalue of
# the wider cloud. With fewer chunks than latent numbers some are 0, and have no
# inverse. With the floor no direction is stretched by more than sqrt(Z / FLOOR).
FLOOR = 1e-9


class Moments:
    """Mean and covariance (1/n) of latents that come in pieces, in one pass.

    n: rows so far;  mean_Z: (Z,);  cov_ZZ: (Z, Z), both float64
    """

    def __init__(self):
        self.n = 0
        self.mean_Z = 0.0
        self.cov_ZZ = 0.0

    @classmethod
    def of(cls, z_NZ): return cls().add(z_NZ)

    def add(self, z_NZ):
        """Take in more rows, (N, Z); the whole need not fit into memory.

        Equation:  mean' = (n mean + sum z) / n',  with n' rows after, n before;
                   cov' = (n (cov + m m^T) + sum (z - mean') (z - mean')^T) / n',
                   where m = mean - mean' is how far the mean has moved
        Example:   rows 0 and 2, then 7: mean 1, cov 1; then mean 3, m = -2,
                   cov = (2 (1 + 4) + 16) / 3 = 26 / 3
        """
        z = z_NZ.double()
        total = self.n + len(z)
        mean_Z = (self.n * self.mean_Z + z.sum(0)) / total
        moved_Z = self.mean_Z - mean_Z
        z = z - mean_Z
        before_ZZ = self.n * (self.cov_ZZ + moved_Z.outer(moved_Z))
        self.cov_ZZ = (before_ZZ + z.T @ z) / total
        self.mean_Z = mean_Z
        self.n = total
        return self

    @property
    def std(self):
        """Root mean square about the mean, per latent number."""
        return self.cov_ZZ.diagonal().mean().sqrt().item()


def sqrtm(cov_ZZ, floor=0.0):
    """S^{1/2} = V w^{1/2} V^T of a covariance S = V w V^T. Its eigenvalues w are taken
    as at least `floor` (rounding makes some of them negative).
    Example:  [[4, 0], [0, 9]] -> [[2, 0], [0, 3]]"""
    w_Z, V_ZZ = torch.linalg.eigh(cov_ZZ)
    return V_ZZ * w_Z.clamp(min=floor).sqrt() @ V_ZZ.T


def gaussian_map(source, target):
    """A, (Z, Z), of the optimal transport between two Gaussians, Moments both.

    Equation:  z~ = mu_t + A (z - mu_s),
               A = S_s^{-1/2} (S_s^{1/2} S_t S_s^{1/2})^{1/2} S_s^{-1/2}
    Source:    paper: Sec. 3.3, Eq. 2 under a Gaussian model
    Example:   in one dimension A = sigma_t / sigma_s; in general A S_s A = S_t, so that
               the mapped cloud has the target's covariance
    ours:      regularised by FLOOR: where the source hardly varies, z~ may vary less
               than the target
    """
    floor = FLOOR * max(source.std, target.std) ** 2
    # If both clouds are single points, z - mu_s is 0, and any A will do.
    root = sqrtm(source.cov_ZZ, floor or 1.0)
    inverse = torch.linalg.inv(root)
    return inverse @ sqrtm(root @ target.cov_ZZ @ root) @ inverse


def wasserstein2(source, target):
    """Squared 2-Wasserstein distance of the Gaussian fits, per latent number.

    Equation:  |mu_s - mu_t|^2 + tr S_s + tr S_t - 2 tr (S_s^{1/2} S_t S_s^{1/2})^{1/2}
    Source:    ours, for the report. After gaussian_map it is 0, if there are more
               chunks than latent numbers
    Example:   in one dimension  (mu_s - mu_t)^2 + (sigma_s - sigma_t)^2
    """
    root = sqrtm(source.cov_ZZ)
    cross = sqrtm(root @ target.cov_ZZ @ root).diagonal().mean().item()
    shift = (source.mean_Z - target.mean_Z).square().mean().item()
    return max(0.0, shift + source.std ** 2 + target.std ** 2 - 2 * cross)


# --- Line 4: transport of points ------------------------------------------------------
# Sinkhorn's regularisation, over the largest cost. A small one blurs less and takes
# longer: at 0.05 / 0.01 / 0.001 two Gaussian clouds (500 and 400 points, Z = 64) keep
# 17 / 63 / 80 % of their standard deviation, after 5 / 22 / 133 iterations.
EPSILON = 0.01
TOLERANCE = 1e-6            # L1 error of a marginal; masses sum to 1
MAX_ITERATIONS = 2000       # the hardest problem tried, at epsilon 0.005, took 330
MAX_MOVE = 50.0             # log units a scaling may move; exp overflows at 709
# Iterations that an extrapolation looks back on: 16 were no better.
MEMORY = 8
# Iterations from one extrapolation to the next: with one at each, eight times as many
# were needed.
PERIOD = 3


def squared_cost(z_source_IZ, z_target_JZ):
    """cost[i, j] = |z_source[i] - z_target[j]|^2, (I, J), the cost of Eq. 2.
    Example:  points 0 and 3 to point 1: [[1], [4]]"""
    # cdist takes |x|^2 + |y|^2 - 2 x.y, which cancels far from the origin: so move the
    # origin into the target.
    shift_Z = z_target_JZ.double().mean(0)
    return torch.cdist(z_source_IZ - shift_Z, z_target_JZ - shift_Z).square()


class Sinkhorn(NamedTuple):
    """An entropic plan, exp((f + g - cost) / (epsilon max(cost))), and its evidence."""
    plan_IJ: torch.Tensor
    f_I: torch.Tensor       # source potential, in units of the cost
    g_J: torch.Tensor       # target potential
    iterations: int
    error: float            # the larger sum |marginal - mass| of the two sides


def sinkhorn(cost_IJ, epsilon=EPSILON, tolerance=TOLERANCE,
             max_iterations=MAX_ITERATIONS):
    """Entropic optimal transport of I points, of mass 1/I each, to J, of mass 1/J each.

    Equation:  min over plans P of  sum_ij P_ij (cost_ij + epsilon max(cost) log P_ij)
    Source:    paper: Sec. 3.3, Eq. 2, by "an existing OT library"; ours: written out
    Returns:   Sinkhorn, whose plan_IJ sums to 1/I along each row, 1/J down each column
    Raises:    ValueError unless epsilon > 0, cost >= 0, and both marginals are met
               (which a cost that holds infinity never does)
    Example:   cost [[0, 1], [1, 0]], epsilon 1: the plan is [[p, p/e], [p/e, p]] with
               p = 1 / (2 + 2/e) = 0.3655

    The textbook: the plan is u_i K_ij v_j with K = exp(-cost / unit). In turn,
    u = a / (K v) makes its rows sum to a, and v = b / (K^T u) its columns to b.

    Two additions, for a small epsilon: `absorb`, against overflow, and `extrapolate`,
    for speed. With them the state of the loop is the potential g = g0 + log v. Not
    better when tried: epsilon scaling, fixed over-relaxation, restarts.
    """
    cost = cost_IJ.double()
    if not (epsilon > 0 and cost.min() >= 0):       # as "not good": NaN is refused
        raise ValueError("epsilon must be above 0, and the cost at least 0")
    unit = epsilon * (cost.max().item() or 1.0)
    I, J = cost.shape
    a = cost.new_full((I,), 1 / I)
    b = cost.new_full((J,), 1 / J)

    g = torch.zeros_like(b)
    K, f0, g0 = absorb(cost, unit, g)
    trail = deque(maxlen=MEMORY + 1)        # (potential before, potential after)
    for iteration in range(1, max_iterations + 1):
        v = (g - g0).exp()
        u = a / (K @ v)
        v_next = b / (K.T @ u)
        # The rows of u K v are exact now; its columns sum to v (K^T u) = b v / v_next.
        error = (b * v / v_next - b).abs().sum().item()
        # Half of the tolerance, as the plan's own rounding is added. NaN ends it, too.
        if not error > tolerance / 2:
            break
        g_next = g0 + v_next.log()
        trail.append((g, g_next))
        g = g_next
        if iteration % PERIOD == 0:
            g = extrapolate(trail)
        if (g - g0).abs().max() > MAX_MOVE:
            K, f0, g0 = absorb(cost, unit, g)

    plan_IJ = u[:, None] * K * v
    row_error = (plan_IJ.sum(1) - a).abs().sum()
    column_error = (plan_IJ.sum(0) - b).abs().sum()
    error = max(row_error, column_error).item()
    if not error <= tolerance:                          # NaN too
        raise ValueError(f"Sinkhorn did not converge: marginal error {error:.1e} above "
                         f"{tolerance:.1e} after {iteration} iterations")
    return Sinkhorn(plan_IJ, (f0 + u.log()) * unit, (g0 + v.log()) * unit, iteration,
                    error)


def absorb(cost, unit, g):
    """Take the scalings into the kernel: K = exp(f0 + g0 - cost / unit), around the
    potential g = g0 + log v. So u and v begin near 1 again, and do not overflow.

    Returns:  K, f0, g0. In each row and column of K the largest entry is 1, at any
              epsilon; and K v is at least 1, although v may vanish in places
    """
    cost = cost / unit
    f0 = (cost - g).amin(1)
    g0 = (cost - f0[:, None]).amin(0)
    return (f0[:, None] - cost).add_(g0).exp_(), f0, g0


def extrapolate(trail):
    """Anderson's acceleration. A trail holds the last M iterations, each as the
    potential before and after it. Of these, the combination whose step would vanish, by
    least squares.
    Example:  512 pairs in 8 dimensions at epsilon 0.005: plain iterations are off by
              4e-6 after 5000; with this 1e-6 is reached after 320."""
    before, after = zip(*trail)
    after_JM = torch.stack(after, dim=1)                            # (J, M)
    steps_JM = after_JM - torch.stack(before, dim=1)
    # pinv: neighbouring steps may be parallel, and on a GPU lstsq would need full rank.
    share_M = torch.linalg.pinv(steps_JM.diff(dim=1), rtol=1e-12) @ steps_JM[:, -1]
    return after_JM[:, -1] - after_JM.diff(dim=1) @ share_M


def barycentric_map(plan_IJ, z_source_IZ):
    """Source latents on the target's slots, (J, Z), blurred by the plan.

    Equation:  z~[j] = sum_i plan[i, j] z_source[i] / sum_i plan[i, j]
    Source:    differs: usually target points are averaged at source positions, so that
               nothing of the source would stay. Divided by the TARGET's mass.
    Example:   plan [[.25, .25], [0, .5]]: z~ = z0, (z0 + 2 z1) / 3
    Raises:    ValueError if a column of the plan is empty
    """
    mass_J = plan_IJ.double().sum(0)
    if not (mass_J > 0).all():
        raise ValueError("a column of the plan is empty; raise epsilon")
    return plan_IJ.double().T @ z_source_IZ.double() / mass_J[:, None]


# --- Line 4 as a table ----------------------------------------------------------------
class Meeting(NamedTuple):
    """A source and the target over a stretch of J slots: all an aligner may look at. A
    large tensor is several such stretches: a map that is to be one for the whole tensor
    hangs on the moments only. All in float64."""
    z_source_IZ: torch.Tensor       # the source's latents under these slots
    z_projected_JZ: torch.Tensor    # the same, projected (line 3)
    z_target_JZ: torch.Tensor
    source: Moments                 # of all projected latents of this tensor
    target: Moments                 # of all target latents of this tensor
    epsilon: float = EPSILON


class Aligned(NamedTuple):
    """What an aligner returns; the last two are evidence for the report. It is to be
    finite, also where all chunks are equal, so that a std is 0."""
    z_JZ: torch.Tensor
    iterations: int = 0
    error: float = 0.0              # the larger of both sides' marginal errors


def align_none(m):
    """Line 3 alone: what has another shape must at least be projected."""
    return Aligned(m.z_projected_JZ)


def align_mean(m):
    """ours: z~ = z + mu_t - mu_s. Does the covariance matter at all?"""
    return Aligned(m.z_projected_JZ - m.source.mean_Z + m.target.mean_Z)


def align_gaussian(m):
    """paper: z~ = mu_t + A (z - mu_s). Moments compare slot by slot: so of projected
    latents."""
    A_ZZ = gaussian_map(m.source, m.target)
    centred_JZ = m.z_projected_JZ - m.source.mean_Z
    return Aligned(m.target.mean_Z + centred_JZ @ A_ZZ)             # A is symmetric


def align_sinkhorn(m):
    """paper: Eq. 2 by an OT library. Here points find their own slots: so from latents
    that are not projected, as projecting would average them first."""
    found = sinkhorn(squared_cost(m.z_source_IZ, m.z_target_JZ), m.epsilon)
    z_JZ = barycentric_map(found.plan_IJ, m.z_source_IZ)
    return Aligned(z_JZ, found.iterations, found.error)


# lsmerge.Transport.align calls them, with the name that --align gives. "auto": pairs of
# equal shape do not get here.
ALIGNERS = {"auto": align_gaussian, "none": align_none, "mean": align_mean,
            "gaussian": align_gaussian, "sinkhorn": align_sinkhorn}


# --- ours: null controls --------------------------------------------------------------
CONTROLS = ("zero", "noise", "shuffled")


def control_latents(kind, z_target_JZ, target, generator):
    """What a source without content would contribute, for a slice of the target.

    zero:      the target's mean latent: pure shrinkage
    noise:     Gaussian, with the target's mean and covariance
    shuffled:  the target's own latents in random order (within this slice)
    """
    z = z_target_JZ.double()
    if kind == "zero":
        return target.mean_Z.expand_as(z)
    if kind == "shuffled":
        return z[torch.randperm(len(z), generator=generator)]
    if kind != "noise":
        raise ValueError(f"control must be zero, noise or shuffled, not {kind!r}")
    noise = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z)
    return target.mean_Z + noise @ sqrtm(target.cov_ZZ)
