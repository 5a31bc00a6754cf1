"""align.py: carry a source model's latents onto a target's slots.                 (read fourth)

Paper: Sec. 3.3, Algorithm 1. Enters: the latents of one tensor of the source, z_source_IZ, and of
its partner in the target, z_target_JZ; a row is a chunk, I source chunks, J target chunks, Z latent
numbers each. Leaves: z_aligned_JZ, the source's content in the target's slots, to be interpolated.

    line 1   pair_layers, pair_places       which layer, which tensor, meets which of the target's
    line 3   project                        I x Z_source -> J x Z_target, by overlap in order
    line 4   ALIGNERS                       name -> function; a fork adds a function and a line
             sinkhorn -> barycentric_map    transport of points, from unprojected latents
             gaussian_map, mean_map         transport of moments, fitted on projected latents
    report   wasserstein2, Moments.spread;  control_latents: what a source without content would do

Pure functions on any device, in float64 (lower precisions are upcast). No transport of *chunks* can
see hidden units, which are known only up to a permutation. Not here: unbalanced transport.
"""
import re
from typing import NamedTuple

import torch

# Sinkhorn's regularisation, over the largest cost. At 0.05 / 0.01 / 0.001 the map between two
# Gaussian clouds (500 and 400 points of 64 numbers) keeps 17 / 63 / 80 % of the spread, and takes 5
# / 22 / 133 steps.
EPSILON = 0.01
TOLERANCE = 1e-6       # L1 error of a marginal; masses sum to 1
MAX_ITERATIONS = 2000  # six times what the hardest problem tried takes at epsilon 0.005
MEMORY, PERIOD = 8, 3  # extrapolation: steps it looks back on, and steps from one to the next
MAX_MOVE = 50.0        # log units a potential moves before the kernel is rebuilt (exp: below 709)
FLOOR = 1e-9           # smallest eigenvalue of a source covariance, over the mean eigenvalue
LIMIT_BYTES = 2 ** 28  # of one cost matrix: 5792 x 5792; sinkhorn adds one of that size, the kernel
CONTROLS = "zero", "noise", "shuffled"


def pair_layers(n_source: int, n_target: int, by: str = "depth") -> list[int | None]:
    """The source layer of each target layer j; None = no partner, the target's own stays.
    ours:     "depth": floor(j (L_s - 1) / (L_t - 1) + 1/2), first to first, last to last; L_t = 1:
              the middle
    paper:    "index": Algorithm 1, line 1, literally: the first min(L_s, L_t) layers, in order
    Example:  n_source = 6, n_target = 4 by depth: layers 0, 2, 3, 5"""
    if min(n_source, n_target) < 1 or by not in ("depth", "index"):
        raise ValueError(f"cannot pair {n_source} with {n_target} layers by {by!r}")
    if by == "index":
        return [j if j < n_source else None for j in range(n_target)]
    if n_target == 1:
        return [n_source // 2]
    # in integers: floating point can put a half on either side
    twice = 2 * (n_target - 1)
    return [(2 * j * (n_source - 1) + n_target - 1) // twice for j in range(n_target)]


def same_names(target, source, encoded) -> dict:
    """{target name: the same tensor's name in the source, or None}: equal, or with another leading
    part ('model.', or a wrapper's), as the first encoded tensor shows it.
    Args:     names of all tensors, and of those that are encoded"""
    first = next(iter(encoded))
    layers = re.search(r"[^.]+\.[0-9]+\..*|$", first).group() or first     # without what is before
    others = [name for name in source if name == layers or name.endswith("." + layers)]
    mine = first.removesuffix(layers)
    theirs = others[0].removesuffix(layers) if len(others) == 1 else mine
    moved = {name: theirs + name[len(mine):] for name in target if name.startswith(mine)}
    return {name: next((n for n in (name, moved.get(name)) if n in source), None)
            for name in target}


def pair_places(target: dict, source: dict, by: str = "depth") -> dict:
    """{target name: source name}: layers by `pair_layers`, roles with their like.
    Args:     names -> (layer or None, role). A role that stands twice in a layer has no partner"""
    groups = {}, {}
    for group, places in zip(groups, (target, source)):
        for name, where in places.items():
            group.setdefault(tuple(where), []).append(name)
    layers = [sorted({layer for layer, _ in group} - {None}) for group in groups]
    partner, pairs = {None: None}, {}
    if all(layers):
        found = pair_layers(len(layers[1]), len(layers[0]), by)
        partner |= {here: layers[1][j] for here, j in zip(layers[0], found) if j is not None}
    for (layer, role), names in groups[0].items():
        match = groups[1].get((partner[layer], role), []) if layer in partner else []
        if len(names) == len(match) == 1:
            pairs[names[0]] = match[0]
    return pairs


def source_range(j0: int, j1: int, n_source: int, n_target: int) -> tuple[int, int]:
    """The source rows [i0, i1) under the slots [j0, j1): what a streaming caller hands to
    project_rows."""
    return j0 * n_source // n_target, -(-j1 * n_source // n_target)


def project_rows(z_slice_IZ, i0: int, n_source: int, j0: int, j1: int, n_target: int):
    """Slots [j0, j1) of the proportional projection, from the source rows i0, i0 + 1, ... held by
    the caller.
    Equation:  z[j] = sum_i P[j, i] z_source[i],   P[j, i] = n_t |[j/n_t, (j+1)/n_t) n [i/n_s,
               (i+1)/n_s)|
    Source:    ours: the paper only says "proportional". Overlap keeps constants and the mean, and
               streams
    Returns:   (j1 - j0, Z); n_s > n_t averages and so shrinks the spread, n_s < n_t repeats and
               blends
    Example:   n_s = 3, n_t = 2:  (2 z0 + z1) / 3,  (z1 + 2 z2) / 3"""
    first, last = source_range(j0, j1, n_source, n_target)
    if not (0 <= j0 < j1 <= n_target and i0 <= first < last <= i0 + len(z_slice_IZ)):
        raise ValueError(f"slots [{j0}, {j1}) need rows [{first}, {last}), not {len(z_slice_IZ)}")
    # In units of 1 / (n_s n_t) every border is an integer; between two neighbouring ones lie one
    # slot and one source row. At most I + J such segments, so the memory is that of the slice (P
    # itself would be J x I).
    slot_J = torch.arange(j0, j1 + 1, device=z_slice_IZ.device) * n_source
    row_I = torch.arange(first + 1, last, device=z_slice_IZ.device) * n_target
    inside_I = row_I[(row_I > slot_J[0]) & (row_I < slot_J[-1])]
    border = torch.cat([slot_J, inside_I]).unique()     # sorted
    start, length = border[:-1], border.diff()
    # embedding_bag: weighted sums over runs of rows, not copied; and deterministic, which
    # index_add_ is not
    return torch.nn.functional.embedding_bag(
        start // n_target - i0, z_slice_IZ.double(), torch.searchsorted(start, slot_J[:-1]),
        mode="sum", per_sample_weights=length.double() / n_source)


def project(z_IZ, n_target: int, z_target: int | None = None):
    """The whole projection to (n_target, z_target): rows, and if two VAEs differ latent numbers too
    (ours; a
    stand-in: the axes of two latent spaces share no order). The identity, bit for bit, if sizes
              agree."""
    z = z_IZ.double()
    if len(z) != n_target:
        z = project_rows(z, 0, len(z), 0, n_target, n_target)
    if z_target in (None, z.shape[1]):
        return z
    return project(z.T.contiguous(), z_target).T.contiguous()


def squared_cost(z_source_IZ, z_target_JZ):
    """cost[i, j] = |z_source[i] - z_target[j]|^2, (I, J), the cost of Eq. 2."""
    if z_source_IZ.shape[1] != z_target_JZ.shape[1]:
        raise ValueError(f"latent sizes {z_source_IZ.shape[1]} and {z_target_JZ.shape[1]}: project")
    # |x|^2 + |y|^2 - 2 x.y cancels far from the origin; distances stay when both clouds are moved
    # to it
    shift_Z = z_target_JZ.double().mean(0)
    x, y = z_source_IZ.double() - shift_Z, z_target_JZ.double() - shift_Z
    cost = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return cost.addmm_(x, y.T, alpha=-2).clamp_(min=0)


class Sinkhorn(NamedTuple):
    """An entropic plan = exp((f + g - cost) / (epsilon max cost)), and the evidence for it."""
    plan_IJ: torch.Tensor
    f_I: torch.Tensor       # source potential, in units of the cost; -inf where a = 0
    g_J: torch.Tensor       # target potential, centred; -inf where b = 0
    iterations: int
    source_error: float     # sum_i |sum_j plan_ij - a_i|, measured on the returned plan
    target_error: float     # sum_j |sum_i plan_ij - b_j|, likewise
    converged: bool         # both <= tolerance: always True here, all else is raised


def sinkhorn(cost_IJ, a_I=None, b_J=None, epsilon: float = EPSILON, tolerance: float = TOLERANCE,
             max_iterations: int = MAX_ITERATIONS) -> Sinkhorn:
    """Entropic optimal transport from masses a to masses b (None: uniform). A zero cost gives the
    plan a b^T.
    Equation:  min over P >= 0, P 1 = a, P^T 1 = b of  sum_ij P_ij (cost_ij + epsilon max(cost) log
               P_ij)
    Source:    paper: Sec. 3.3, Eq. 2, solved with "an existing OT library"; ours: written out, to
               be read
    Args:      cost_IJ (I, J) finite, >= 0;  a_I (I,), b_J (J,) >= 0, sum 1 (points of mass 0 are
               left out)
    Raises:    ValueError for bad costs or masses, or if a marginal is off by more than tolerance at
               the end
    Example:   cost [[0, 1], [1, 0]], epsilon 1: plan [[p, q], [q, p]], p = 1 / (2 + 2/e) = 0.3655,
               q = p/e"""
    cost = cost_IJ.detach().double()
    if cost.ndim != 2 or not min(epsilon, tolerance, max_iterations, cost.numel()) > 0:
        raise ValueError(f"need a cost matrix, got shape {tuple(cost.shape)}, epsilon, tolerance "
                         f"and max_iterations > 0, got {epsilon}, {tolerance}, {max_iterations}")
    a, b = _masses("a", a_I, cost[:, 0]), _masses("b", b_J, cost[0])
    rows, columns = a.nonzero()[:, 0], b.nonzero()[:, 0]
    if len(rows) * len(columns) < cost.numel():
        part = sinkhorn(cost[rows][:, columns], a[rows], b[columns], epsilon, tolerance,
                        max_iterations)
        f, g = a.new_full(a.shape, -torch.inf), b.new_full(b.shape, -torch.inf)
        plan = torch.zeros_like(cost)
        f[rows], g[columns], plan[rows[:, None], columns] = part.f_I, part.g_J, part.plan_IJ
        return part._replace(plan_IJ=plan, f_I=f, g_J=g)
    low, high = (bound.item() for bound in cost.aminmax())  # NaN shows in both
    if not 0 <= low <= high < torch.inf:
        raise ValueError(f"cost must be finite and >= 0, got values from {low} to {high}")
    unit, plan = epsilon * (high or 1.0), torch.empty_like(cost)  # plan: first the loop's kernel
    f, g, iterations = _potentials(cost, unit, plan, a, b, tolerance, max_iterations)
    # the plan, and so both errors, from the potentials that are returned, not from the loop's
    # scalings
    torch.add(f[:, None], cost, alpha=-1 / unit, out=plan).add_(g).exp_()
    errors = (plan.sum(1) - a).abs().sum().item(), (plan.sum(0) - b).abs().sum().item()
    if not max(errors) <= tolerance:  # so put, NaN is refused too: it is in both errors
        raise ValueError(f"Sinkhorn did not converge: marginal error {max(errors):.1e} above "
                         f"{tolerance:.1e} after {iterations} iterations; raise epsilon "
                         f"({epsilon}) or max_iterations")
    return Sinkhorn(plan, f * unit, g * unit, iterations, *errors, True)


def _masses(name: str, mass_N, like_N):
    """Checked masses whose sum is 1 to the last digit, as the other side's is; None: uniform."""
    mass_N = torch.full_like(like_N, 1 / len(like_N)) if mass_N is None else mass_N.to(like_N)
    one = abs(mass_N.sum().item() - 1) <= 1e-6
    if mass_N.shape != like_N.shape or not (mass_N >= 0).all() or not one:
        raise ValueError(f"{name} must be {len(like_N)} finite masses >= 0 that sum to 1")
    return mass_N / mass_N.sum()


def _rebuild(kernel_IJ, cost, unit, g):
    """Write K = exp(f0 + g0 - cost / unit) around g; return f0, g0 and g, raised where it is far
    below g0. By maxima in the log domain, at any epsilon, each row and column of K has 1 as its
    largest entry: the first step gives each row a 1, whose column then has maximum 1, so that the
    second step leaves it there."""
    f0 = -torch.add(g, cost, alpha=-1 / unit, out=kernel_IJ).amax(1)
    g0 = -torch.add(f0[:, None], cost, alpha=-1 / unit, out=kernel_IJ).amax(0)
    kernel_IJ.add_(g0).exp_()
    return f0, g0, torch.maximum(g, g0 - MAX_MOVE)


def _potentials(cost, unit, kernel, a, b, tolerance, max_iterations):
    """Sinkhorn's fixed point: f_I, g_J in that unit, for which exp(f + g - cost / unit) has
    marginals a, b. The textbook loop is four lines; the plan is then u_i K_ij v_j, and f = log u, g
    = log v:

        K = exp(-cost / unit);  v = 1
        repeat:  u = a / (K v)          the rows of the plan sum to a
                 v = b / (K^T u)        its columns to b

    Here the same with two additions, for small epsilon:
    - absorption: K is built around (f0, g0), so v = exp(g - g0) is what g has moved since; nothing
                  overflows
    - extrapolation (Anderson): from the last MEMORY steps, by least squares, the point where the
      step would vanish. Plain steps alone stall: 512 planted pairs in 8 dimensions, epsilon 0.005,
      are off by 4e-6 after 5000. With an extrapolation every third step 1e-6 takes 320, after every
      single one 2715 (old steps then hardly differ). A check that the dual does not fall changed
      nothing: plain steps mend a bad leap.
    Not better when tried: epsilon scaling, fixed over-relaxation, restarts, memory beyond 8."""
    f0, g0, g = _rebuild(kernel, cost, unit, torch.zeros_like(b))
    points, steps = [], []
    for iteration in range(1, max_iterations + 1):
        if (g - g0).abs().max() > MAX_MOVE:
            f0, g0, g = _rebuild(kernel, cost, unit, g)
        v = (g - g0).exp()
        u = a / (kernel @ v)           # from here on the rows are exact: the columns must be judged
        column_J = v * (kernel.T @ u)
        error = (column_J - b).abs().sum().item()
        if not error > tolerance / 2 or iteration == max_iterations:  # half: the plan rounds
            break
        step = (b / column_J).log()
        step = step - (g + step).mean()  # (f + c, g - c) is the same plan: c must not drift
        points, steps = (points + [g])[-MEMORY - 1:], (steps + [step])[-MEMORY - 1:]
        g = g + step
        if iteration % PERIOD == 0 and len(steps) > 1:
            d_point, d_step = torch.stack(points, 1).diff(dim=1), torch.stack(steps, 1).diff(dim=1)
            # pinv: neighbouring steps may be parallel, and on a GPU lstsq would need full rank
            g = g - (d_point + d_step) @ (torch.linalg.pinv(d_step, rtol=1e-12) @ step)
    return f0 + u.log(), g, iteration


def barycentric_map(plan_IJ, z_source_IZ, b_J):
    """Carry source latents onto the target's slots.
    Equation:  z~[j] = sum_i plan[i, j] z_source[i] / b[j]
    Source:    differs: usually target points are averaged at source positions: nothing of the
               source stays
    Args:      b_J (J,) the plan's target masses: divide by THIS side, I != J is the normal case
    Returns:   (J, Z), a blurred cloud. A slot of mass 0 gets the source's mean
    Raises:    ValueError if a slot that has mass gets none"""
    plan, z, b = plan_IJ.double(), z_source_IZ.double(), b_J[:, None]
    if ((plan.sum(0) <= 0) & (b[:, 0] > 0)).any():
        raise ValueError("a column of the plan is empty although its slot has mass; raise epsilon")
    return torch.where(b > 0, plan.T @ z / b.where(b > 0, 1.0), plan.sum(1) @ z / plan.sum())


class Moments:
    """Mean and covariance (1/n) in one pass; batches are centred first: raw sums of squares would
    cancel."""
    n, mean_Z, cov_ZZ = 0, 0.0, 0.0

    @classmethod
    def of(cls, z_NZ):
        return cls().add(z_NZ)

    def add(self, z_NZ):
        if len(z_NZ):
            mean_Z, w = z_NZ.double().mean(0), len(z_NZ) / (self.n + len(z_NZ))  # w: its share
            if not mean_Z.isfinite().all():
                raise ValueError("latents hold NaN or infinity")
            centred_NZ, shift_Z = z_NZ.double() - mean_Z, mean_Z - self.mean_Z
            batch_ZZ = centred_NZ.T @ centred_NZ / len(z_NZ)
            between_ZZ = w * (1 - w) * shift_Z.outer(shift_Z)
            self.cov_ZZ = (1 - w) * self.cov_ZZ + w * batch_ZZ + between_ZZ
            self.mean_Z, self.n = self.mean_Z + w * shift_Z, self.n + len(z_NZ)
        return self

    @property
    def spread(self) -> float:
        """Root mean square about the mean, per latent number; std_ratio = aligned.spread /
        target.spread."""
        return self.cov_ZZ.diagonal().mean().sqrt().item()

    @property
    def factor_ZZ(self):
        """R = V w^{1/2} from cov = V w V^T, so that cov = R R^T."""
        w_Z, V_ZZ = torch.linalg.eigh(self.cov_ZZ)
        return V_ZZ * w_Z.clamp(min=0).sqrt()


class Affine(NamedTuple):
    """z~ = mu_target + (z - mu_source) A, A symmetric. Fitted once, applied to slices."""
    mu_source_Z: torch.Tensor
    mu_target_Z: torch.Tensor
    matrix_ZZ: torch.Tensor


def apply_affine(affine: Affine, z_NZ):
    return affine.mu_target_Z + (z_NZ.double() - affine.mu_source_Z) @ affine.matrix_ZZ


def mean_map(source: Moments, target: Moments) -> Affine:
    """z~ = z + mu_t - mu_s (ours: does the covariance matter at all?)."""
    return Affine(source.mean_Z, target.mean_Z, torch.eye(len(source.mean_Z)).to(source.mean_Z))


def gaussian_map(source: Moments, target: Moments) -> Affine:
    """Optimal transport between two Gaussians: the mapped cloud has the target's mean and
    covariance.
    Equation:  z~ = mu_t + A (z - mu_s),   A = S_s^{-1/2} (S_s^{1/2} S_t S_s^{1/2})^{1/2} S_s^{-1/2}
    Source:    paper: Sec. 3.3, Eq. 2 under a Gaussian model (silent about samples and
               regularisation)
    Example:   in one dimension A = sigma_t / sigma_s; in general A S_s A = S_t
    Floor:     ours: if an eigenvalue of S_s is below FLOOR times the larger cloud's mean
               eigenvalue, that is
               added to all: |A| <= sqrt(Z / FLOOR) even for n < Z, Z = 1, constant clouds. The
                             price: where
               the source hardly varies, the result varies less than the target"""
    floor = FLOOR * max(source.spread, target.spread) ** 2 or 1.0  # both constant: A = 0
    floor_ZZ = floor * torch.eye(len(source.cov_ZZ)).to(source.cov_ZZ)
    too_low = torch.linalg.cholesky_ex(source.cov_ZZ - floor_ZZ).info.item() != 0
    R_ZZ = torch.linalg.cholesky(source.cov_ZZ + too_low * floor_ZZ)
    # any R with S_s = R R^T gives A = R^{-T} (R^T S_t R)^{1/2} R^{-1}; a triangular one is cheap
    # and accurate
    m_Z, U_ZZ = torch.linalg.eigh(R_ZZ.T @ target.cov_ZZ @ R_ZZ)
    half_ZZ = torch.linalg.solve_triangular(R_ZZ.T, U_ZZ, upper=True)
    return Affine(source.mean_Z, target.mean_Z, (half_ZZ * m_Z.clamp(min=0).sqrt()) @ half_ZZ.T)


def wasserstein2(source: Moments, target: Moments) -> float:
    """Squared 2-Wasserstein distance of the Gaussian fits, per latent number; 0 after gaussian_map
    if n > Z: (|mu_s - mu_t|^2 + tr S_s + tr S_t - 2 tr (S_s^{1/2} S_t S_s^{1/2})^{1/2}) / Z."""
    # sum of singular values = that trace; roots of the product's eigenvalues would keep only half
    # the digits
    cross = torch.linalg.svdvals(source.factor_ZZ.T @ target.factor_ZZ).mean().item()
    shift = (source.mean_Z - target.mean_Z).square().mean().item()
    return max(0.0, shift + source.spread ** 2 + target.spread ** 2 - 2 * cross)


def control_latents(kind: str, z_target_JZ, target: Moments, generator=None):
    """Null controls (ours) in the shape of the target's latents, or of the slice at hand.
    zero: the target's mean, pure shrinkage; noise: Gaussian, the target's mean and covariance;
          shuffled: the
    target's own latents in random order. The last two need the generator; its device decides the
    numbers."""
    z = z_target_JZ.double()
    if kind == "zero":
        return target.mean_Z.repeat(len(z), 1)
    if kind not in ("noise", "shuffled") or generator is None:
        raise ValueError(f"control must be zero, noise or shuffled (with generator), got {kind!r}")
    if kind == "shuffled":
        return z[torch.randperm(len(z), generator=generator, device=generator.device).to(z.device)]
    noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=generator.device)
    return target.mean_Z + noise.to(z.device) @ target.factor_ZZ.T


# --- Line 4 as a table ----------------------------------------------------------------------------
class Meeting(NamedTuple):
    """A source and the target over a stretch of J slots: all that an aligner may look at."""
    z_source_IZ: torch.Tensor       # the source's latents under these slots
    z_projected_JZ: torch.Tensor    # the same, projected (line 3)
    z_target_JZ: torch.Tensor
    source: Moments                 # of all projected latents of this tensor
    target: Moments                 # of all target latents of this tensor
    epsilon: float = EPSILON


class Aligned(NamedTuple):
    """What an aligner returns; the last two are evidence for the report."""
    z_JZ: torch.Tensor
    iterations: int = 0
    error: float = 0.0              # the larger of both sides' marginal errors


def align_none(m: Meeting) -> Aligned:
    return Aligned(m.z_projected_JZ)


def align_mean(m: Meeting) -> Aligned:
    return Aligned(apply_affine(mean_map(m.source, m.target), m.z_projected_JZ))


def align_gaussian(m: Meeting) -> Aligned:
    return Aligned(apply_affine(gaussian_map(m.source, m.target), m.z_projected_JZ))


def align_sinkhorn(m: Meeting) -> Aligned:
    found = sinkhorn(squared_cost(m.z_source_IZ, m.z_target_JZ), epsilon=m.epsilon)
    z_JZ = barycentric_map(found.plan_IJ, m.z_source_IZ, found.plan_IJ.sum(0))
    return Aligned(z_JZ, found.iterations, max(found.source_error, found.target_error))


ALIGNERS = {"none": align_none, "mean": align_mean, "gaussian": align_gaussian,
            "sinkhorn": align_sinkhorn}
