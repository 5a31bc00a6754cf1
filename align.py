"""align.py: bring a source to its target: layers, hidden units, latents.           (read fourth)

Paper: Sec. 3.3, Algorithm 1. Enters: names, weights and latents of both; a row of latents is a
chunk, I of the source, J of the target, Z numbers each. Leaves: the source in the target's slots.

    line 1   pair_layers, pair_places    names -> which layer and tensor meets which, by depth
    ours     match_models                weights -> which hidden unit is which (Match)
    line 3   project                     latents z_IZ -> z_JZ, by overlap in order
    line 4   ALIGNERS                    name -> function; a fork adds a function and a line
             sinkhorn, barycentric_map   transport of points, from unprojected latents
             gaussian_map                transport of moments, fitted on projected latents
    report   wasserstein2, Moments.spread; control_latents: what a source without content would do

Hidden units come before chunks: a chunk of a flattened matrix means nothing outside its own model's
order of hidden units. chunking.Matched reads a source by a Match: then shapes agree.
Pure functions on any device, latents in float64. Not here: unbalanced transport.
"""
import math, operator, re
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize

# Sinkhorn's regularisation, over the largest cost. At 0.05 / 0.01 / 0.001 two Gaussian clouds (500
# and 400 points, Z = 64) keep 17 / 63 / 80 % of their spread, after 5 / 22 / 133 steps.
EPSILON = 0.01
TOLERANCE = 1e-6       # L1 error of a marginal; masses sum to 1
MAX_ITERATIONS = 2000  # six times what the hardest problem tried takes at epsilon 0.005
MEMORY, PERIOD = 8, 3  # extrapolation: steps it looks back on, and steps from one to the next
MAX_MOVE = 50.0        # log units a potential moves before the kernel is rebuilt (exp: below 709)
FLOOR = 1e-9           # smallest eigenvalue of a source covariance, over the mean eigenvalue
LIMIT_BYTES = 2 ** 28  # of one cost matrix: 5792 x 5792; sinkhorn adds one of that size, the kernel
CONTROLS = "zero", "noise", "shuffled"


# --- Line 1: which layer, which tensor ------------------------------------------------------------
def pair_layers(n_source: int, n_target: int, by: str = "depth") -> list[int | None]:
    """The source layer of each target layer j; None = no partner, the target's own stays.
    ours:     "depth": floor(j (L_s - 1) / (L_t - 1) + 1/2), ends to ends; L_t = 1: the middle
    paper:    "index": Algorithm 1, line 1, literally: the first min(L_s, L_t) layers, in order
    Example:  n_source = 6, n_target = 4 by depth: layers 0, 2, 3, 5"""
    if min(n_source, n_target) < 1 or by not in ("depth", "index"):
        raise ValueError(f"cannot pair {n_source} with {n_target} layers by {by!r}")
    if by == "index":
        return [j if j < n_source else None for j in range(n_target)]
    if n_target == 1:
        return [n_source // 2]
    twice = 2 * (n_target - 1)  # in integers: floating point can put a half on either side
    return [(2 * j * (n_source - 1) + n_target - 1) // twice for j in range(n_target)]


def same_names(target, source, encoded) -> dict:
    """{target name: the same tensor's name in the source, or None}: equal, or with another leading
    part ('model.', or a wrapper's), as the first encoded tensor shows it."""
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
    mine, theirs = (sorted({layer for layer, _ in group} - {None}) for group in groups)
    found = pair_layers(len(theirs), len(mine), by) if mine and theirs else []
    partner = {None: None} | {at: theirs[i] for at, i in zip(mine, found) if i is not None}
    pairs = {}
    for (layer, role), names in groups[0].items():
        match = groups[1].get((partner[layer], role), []) if layer in partner else []
        if len(names) == len(match) == 1:
            pairs[names[0]] = match[0]
    return pairs


# --- Before chunks (ours): layers, heads and MLP units of two models, matched by their weights ----
# Related models hold the same hidden units in some order. Axes of each role's rows and columns; a
# fork adds a line. "groups": keys and values, which heads may share. Norms stay the target's: a
# grown model's gains differ by a factor, as its mean square has more numbers.
AXES = {
    "q": ("heads", "stream"), "k": ("groups", "stream"), "v": ("groups", "stream"),
    "gate": ("units", "stream"), "up": ("units", "stream"), "down": ("stream", "units"),
    "o": ("stream", "heads")}
NEEDED = "q", "k", "v", "o", "up", "down"  # fused matrices and experts show by what they lack
SLACK = 0.3    # a cosine that is no evidence: units of strangers reach 0.33, of relatives pass 0.94
SAMPLE = 32    # units per layer that tell which layer is which
PLACES = 1024  # of the stream that are compared: at 4096 all would take four times as long


class Match(NamedTuple):
    """Which of the source's layers and units is which of the target's: per index of the target the
    source's, or -1 (a layer: None) where it has none and the target keeps its own numbers."""
    layers: list                # source layer of each target layer
    units: list                 # per target layer {"units", "heads", "groups": index of rows}
    stream_J: torch.Tensor      # one order for the whole model
    similarity: list            # per target layer: cosine with its partner (if none: the best one)
    null: float                 # the cosine that strangers of these shapes have
    related: bool               # half of the layers that could have a partner have one
    similarity_JI: torch.Tensor = None      # of every pair of layers: for pictures

    def index(self, layer: int, role: str) -> list:
        """[row, column]: W~[j, l] = W_source[row[j], column[l]], where neither is -1."""
        known = {"stream": self.stream_J} | self.units[layer]
        return [known[axis] for axis in AXES[role]]


def assign(cosine_JI, slack: float = SLACK):
    """One-to-one partners, (J,): the source's index of each of the target's, or -1; the cosines.
    Equation:  max over injections i of  sum_j max(cosine[j, i(j)], slack)
    ours:      not Sinkhorn: for 1536 units with partners at cosine 0.3 it takes 3.2 s, this 0.06 s
    Example:   [[.9, .8], [.7, .1]] -> [1, 0], for .8 + .7 > .9 + .1; with slack .75: [0, -1]"""
    cost_JI = cosine_JI.to(torch.float64, copy=True).clamp_(min=slack).neg_()
    rows, columns = map(torch.from_numpy, linear_sum_assignment(cost_JI.numpy()))
    index_J, value_J = torch.full((len(cosine_JI),), -1), cosine_JI.new_zeros(len(cosine_JI))
    index_J[rows], value_J[rows] = columns, cosine_JI[rows, columns]
    real_J = value_J > slack
    return index_J.masked_fill(~real_J, -1), value_J * real_J


def match_stream(embed_source_VI, embed_target_VJ):
    """(J,): the source's place of each place of the target's residual stream, or -1.
    Args:      embeddings with the same V tokens in both; a few thousand are enough
    ours:      the cosine of columns. Tokens count alike, columns are centred: tokens never trained
               share one large vector that drifts (128 places of 128 found; without both, 111)"""
    tokens = [normalize(embed.float(), dim=1) for embed in (embed_target_VJ, embed_source_VI)]
    target_VJ, source_VI = (normalize(token - token.mean(0), dim=0) for token in tokens)
    cosine_JI = (target_VJ.T @ source_VI).cpu()
    index_J = assign(cosine_JI)[0]
    strangers = 2 * (index_J >= 0).sum() < min(cosine_JI.shape)  # kinship is to say so, of all
    return assign(cosine_JI, slack=-1.0)[0] if strangers else index_J


def rows_of(layer, axis: str) -> dict:
    """{role: matrix with this axis as rows, the stream as columns}. Units: gate, up, and down^T."""
    return {role: layer[role] if axes[0] == axis else layer[role].T
            for role, axes in AXES.items() if axis in axes and role in layer}


def cosines(source, target, places, size: int = 1):
    """All pairs of units, (J, I), by what `rows_of` gives; of heads: blocks of `size` rows.
    Equation:  c[j, i] = mean over roles of cos(W_source[i, places[0]], W_target[j, places[1]])
    Args:      places: the matched places of the stream, the source's and the target's"""
    roles, sides = [role for role in target if role in source], []
    for rows, at in zip((source, target), places):
        parts = [rows[role][:, at].float().unflatten(0, (-1, size)).flatten(1) for role in roles]
        sides.append(torch.cat([normalize(part, dim=1) for part in parts], 1))
    return (sides[1] @ sides[0].T).div_(len(roles)).cpu()


def kinship(source, target, places, seed: int = 0):
    """How alike is every pair of layers, (J, I), and how alike would strangers be?
    Equation:  similarity[j, i] = mean over SAMPLE units of one layer of their best cosine in the
               other; null = the same with each of these units shuffled by itself, all pairs"""
    if len(source[0]["up"]) < len(target[0]["up"]):  # only the fewer units can all have a partner
        similarity_IJ, null = kinship(target, source, places[::-1], seed)
        return similarity_IJ.T, null
    sample, generator = {}, torch.Generator().manual_seed(seed)
    for layer in target:
        for role, rows in rows_of(layer, "units").items():
            some = rows[torch.linspace(0, len(rows) - 1, SAMPLE).long()]
            order = torch.rand(some.shape, generator=generator).argsort(1).to(some.device)
            sample.setdefault(role, []).append(torch.stack([some, some.gather(1, order)]))
    sample = {role: torch.cat(parts, 1).flatten(0, 1) for role, parts in sample.items()}
    best = [cosines(rows_of(layer, "units"), sample, places).amax(1) for layer in source]
    best = torch.stack(best, 1).view(2, len(target), SAMPLE, len(source)).mean(2)
    return best[0], best[1].mean().item()


def match_layers(similarity_JI, slack: float = SLACK) -> list[int | None]:
    """The source layer of each target layer, or None: the best pairing that keeps their order.
    Equation:  best[j, i] = max(best[j-1, i], best[j, i-1], best[j-1, i-1] + similarity - slack)
    Example:   [[.9, .1, .1], [.1, .1, .9]] -> [0, 2]"""
    best = [(0.0, {})] * (similarity_JI.shape[1] + 1)  # (total, {target: source}) up to layer j
    for j, gain_I in enumerate((similarity_JI.double() - slack).tolist()):
        above, best = best, best[:1]
        for i, gain in enumerate(gain_I):
            pair = above[i][0] + gain, above[i][1] | {j: i}
            best.append(max(above[i + 1], best[i], pair, key=operator.itemgetter(0)))
    return [best[-1][1].get(j) for j in range(len(similarity_JI))]


def match_heads(source, target, places, size: int, slack: float = SLACK):
    """Heads as blocks of `size` rows: groups by their keys, values and heads, then heads in them.
    Returns:   mean cosine of the groups, heads' rows, groups' rows
    Example:   size 2, of two heads the second is the target's first: rows [2, 3, 0, 1]"""
    head, group = (cosines(rows_of(source, axis), rows_of(target, axis), places, size)
                   for axis in ("heads", "groups"))
    t, s = (a // b for a, b in zip(head.shape, group.shape))  # heads per group
    inner = head.unflatten(0, (-1, t)).unflatten(2, (-1, s))  # [group, head, group, head]
    # of each head its best, on the side with fewer: there all can have a partner
    group = (group + torch.maximum(inner.amax(3).mean(1), inner.amax(1).mean(2))) / 2
    groups, value = assign(group, slack)
    met = (groups[:, None] == torch.arange(group.shape[1])).repeat_interleave(t, 0)
    heads = assign(head.where(met.repeat_interleave(s, 1), -1.0), slack)[0]
    rows = [torch.where(of[:, None] >= 0, of[:, None] * size + torch.arange(size), -1).flatten()
            for of in (heads, groups)]
    return value.sum().item() / min(group.shape), *rows


def match_units(source, target, places, slack: float = SLACK) -> dict:
    """Units and heads of one pair of layers: {"units", "heads", "groups": index of rows}. How many
    rows a head has no file says: the most that match about as well as the best."""
    units = assign(cosines(rows_of(source, "units"), rows_of(target, "units"), places), slack)[0]
    shared = math.gcd(*(len(layer[role]) for layer in (source, target) for role in "qk"))
    sizes = [n for n in range(256, 7, -1) if shared % n == 0] or [shared]
    found = [match_heads(source, target, places, n, slack) for n in sizes]
    best = max(value for value, _, _ in found)
    _, heads, groups = next(of for of in found if of[0] >= 0.9 * best)
    return {"units": units, "heads": heads, "groups": groups}


def match_models(source, target, embed_source_VI, embed_target_VJ, seed=0) -> Match:
    """From weights alone: the stream, kinship, layers, and the units of each pair of layers.
    Args:      source, target: sequences of layers {role: matrix (out, in)}; one that reads when it
               is indexed keeps memory to a pair. Embeddings: the same tokens, row by row
    Raises:    ValueError where a layer lacks a role of NEEDED"""
    for which, layers in (("source", source), ("target", target)):
        if lacking := sorted(set(NEEDED) - set(layers[0])):
            raise ValueError(f"a {which} layer has no matrix of its own for {', '.join(lacking)}")
    stream_J = match_stream(embed_source_VI, embed_target_VJ)
    have = (stream_J >= 0).nonzero()[:PLACES, 0]
    places = stream_J[have], have
    similarity_JI, null = kinship(source, target, places, seed)
    slack = max(SLACK, 2 * null)
    layers, units, similarity = match_layers(similarity_JI, slack), [], []
    for j, i in enumerate(layers):
        units.append(i if i is None else match_units(source[i], target[j], places, slack))
        similarity.append(similarity_JI[j, slice(None) if i is None else i].max().item())
    related = 2 * (len(layers) - layers.count(None)) >= min(similarity_JI.shape)
    return Match(layers, units, stream_J, similarity, null, related, similarity_JI)


# --- Line 3: proportional projection --------------------------------------------------------------
def source_range(j0: int, j1: int, n_source: int, n_target: int) -> tuple[int, int]:
    """The source rows [i0, i1) under the slots [j0, j1): what project_rows needs."""
    return j0 * n_source // n_target, -(-j1 * n_source // n_target)


def project_rows(z_slice_IZ, i0: int, n_source: int, j0: int, j1: int, n_target: int):
    """Slots [j0, j1) of the projection, (j1 - j0, Z); ValueError if the slice lacks a row for one.
    Equation:  z[j] = sum_i P[j, i] z_source[i],  P[j, i] = n_t |[j, j+1) / n_t  n  [i, i+1) / n_s|
    Source:    ours: the paper only says "proportional". Overlap keeps constants and the mean;
               n_s > n_t averages, which shrinks the spread, n_s < n_t repeats and blends
    Example:   n_s = 3, n_t = 2:  (2 z0 + z1) / 3,  (z1 + 2 z2) / 3"""
    first, last = source_range(j0, j1, n_source, n_target)
    if not (0 <= j0 < j1 <= n_target and i0 <= first < last <= i0 + len(z_slice_IZ)):
        raise ValueError(f"slots [{j0}, {j1}) need rows [{first}, {last}), not {len(z_slice_IZ)}")
    # In units of 1 / (n_s n_t) every border is an integer; between neighbouring borders lie one
    # slot and one source row. That is at most I + J segments; P itself would be J x I.
    slot_J = torch.arange(j0, j1 + 1, device=z_slice_IZ.device) * n_source
    row_I = torch.arange(first + 1, last, device=z_slice_IZ.device) * n_target
    inside_I = row_I[(row_I > slot_J[0]) & (row_I < slot_J[-1])]
    border = torch.cat([slot_J, inside_I]).unique()     # sorted
    start, length = border[:-1], border.diff()
    # embedding_bag: weighted sums over runs of rows; index_add_ would not be deterministic
    return torch.nn.functional.embedding_bag(
        start // n_target - i0, z_slice_IZ.double(), torch.searchsorted(start, slot_J[:-1]),
        mode="sum", per_sample_weights=length.double() / n_source)


def project(z_IZ, n_target: int, z_target: int | None = None):
    """The whole projection, (n_target, z_target); the identity, bit for bit, if sizes agree.
    ours:      also of latent numbers between two VAEs: a stand-in, as their axes share no order"""
    z = z_IZ.double()
    if len(z) != n_target:
        z = project_rows(z, 0, len(z), 0, n_target, n_target)
    if z_target in (None, z.shape[1]):
        return z
    return project(z.T.contiguous(), z_target).T.contiguous()


# --- Line 4: optimal transport --------------------------------------------------------------------
def squared_cost(z_source_IZ, z_target_JZ):
    """cost[i, j] = |z_source[i] - z_target[j]|^2, (I, J), the cost of Eq. 2."""
    if z_source_IZ.shape[1] != z_target_JZ.shape[1]:
        raise ValueError(f"latent sizes {z_source_IZ.shape[1]} and {z_target_JZ.shape[1]}: project")
    shift_Z = z_target_JZ.double().mean(0)  # |x|^2 + |y|^2 - 2 x.y cancels far from the origin
    x, y = z_source_IZ.double() - shift_Z, z_target_JZ.double() - shift_Z
    cost = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return cost.addmm_(x, y.T, alpha=-2).clamp_(min=0)


class Sinkhorn(NamedTuple):
    """An entropic plan = exp((f + g - cost) / (epsilon max cost)), and the evidence for it."""
    plan_IJ: torch.Tensor
    f_I: torch.Tensor       # source potential, in units of the cost
    g_J: torch.Tensor       # target potential, centred
    iterations: int
    error: float            # of the returned plan: the larger sum |marginal - mass| of both sides


def sinkhorn(cost_IJ, epsilon=EPSILON, tolerance=TOLERANCE, max_iterations=MAX_ITERATIONS):
    """Entropic optimal transport of I points, of mass 1/I each, to J, of mass 1/J each.
    Equation:  min over such P >= 0 of  sum_ij P_ij (cost_ij + epsilon max(cost) log P_ij)
    Source:    paper: Sec. 3.3, Eq. 2, by "an existing OT library"; ours: written out, to be read
    Raises:    ValueError unless cost_IJ is finite and >= 0, and both marginals are met
    Example:   cost [[0, 1], [1, 0]], epsilon 1: [[p, p/e], [p/e, p]], p = 1 / (2 + 2/e) = 0.3655"""
    cost = cost_IJ.detach().double()
    if cost.ndim != 2 or not min(epsilon, tolerance, max_iterations, cost.numel()) > 0:
        raise ValueError(f"need a cost matrix, got shape {tuple(cost.shape)}, epsilon, tolerance "
                         f"and max_iterations > 0, got {epsilon}, {tolerance}, {max_iterations}")
    a, b = (torch.full_like(side, 1 / len(side)) for side in (cost[:, 0], cost[0]))
    low, high = (bound.item() for bound in cost.aminmax())  # NaN shows in both
    if not 0 <= low <= high < torch.inf:
        raise ValueError(f"cost must be finite and >= 0, got values from {low} to {high}")
    unit, plan = epsilon * (high or 1.0), torch.empty_like(cost)  # plan: first the loop's kernel
    f, g, iterations = _potentials(cost, unit, plan, a, b, tolerance, max_iterations)
    # the plan, and so its error, from the potentials that are returned, not from the loop
    torch.add(f[:, None], cost, alpha=-1 / unit, out=plan).add_(g).exp_()
    error = max((plan.sum(1) - a).abs().sum().item(), (plan.sum(0) - b).abs().sum().item())
    if not error <= tolerance:  # so put, NaN is refused too: it is in both sums
        raise ValueError(f"Sinkhorn did not converge: marginal error {error:.1e} above "
                         f"{tolerance:.1e} after {iterations} iterations; raise epsilon "
                         f"({epsilon}) or max_iterations")
    return Sinkhorn(plan, f * unit, g * unit, iterations, error)


def _rebuild(kernel_IJ, cost, unit, g):
    """Write K = exp(f0 + g0 - cost / unit) around g: at any epsilon 1 is the largest entry of each
    row and column. Return f0, g0, and g, raised where it is far below g0."""
    f0 = -torch.add(g, cost, alpha=-1 / unit, out=kernel_IJ).amax(1)
    g0 = -torch.add(f0[:, None], cost, alpha=-1 / unit, out=kernel_IJ).amax(0)
    kernel_IJ.add_(g0).exp_()
    return f0, g0, torch.maximum(g, g0 - MAX_MOVE)


def _potentials(cost, unit, kernel, a, b, tolerance, max_iterations):
    """Sinkhorn's fixed point: f_I, g_J in that unit; exp(f + g - cost / unit) has marginals a, b.
    The textbook loop, after which the plan is u_i K_ij v_j, and f = log u, g = log v:

        K = exp(-cost / unit);  v = 1
        repeat:  u = a / (K v);  v = b / (K^T u)    the plan's rows sum to a, its columns to b

    Two additions, for small epsilon:
    - absorption: K is built around (f0, g0); v = exp(g - g0), what g moved since, cannot overflow
    - extrapolation (Anderson): from the last MEMORY steps, by least squares, the point where the
      step would vanish. 512 planted pairs in 8 dimensions, epsilon 0.005: plain steps are off by
      4e-6 after 5000; extrapolating every third step takes 320 to 1e-6, every step 2715.
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


def barycentric_map(plan_IJ, z_source_IZ):
    """Source latents on the target's slots, (J, Z), blurred; ValueError if a column is empty.
    Equation:  z~[j] = sum_i plan[i, j] z_source[i] / sum_i plan[i, j]: by the TARGET's mass
    Source:    differs: usually target points are averaged, so that nothing of the source stays
    Example:   plan [[.25, .25], [0, .5]]: z~ = z0, (z0 + 2 z1) / 3"""
    mass_J = plan_IJ.double().sum(0)
    if not (mass_J > 0).all():
        raise ValueError("a column of the plan is empty; raise epsilon")
    return plan_IJ.double().T @ z_source_IZ.double() / mass_J[:, None]


class Moments:
    """Mean and covariance (1/n) in one pass, by centred batches: raw squares would cancel."""
    n, mean_Z, cov_ZZ = 0, 0.0, 0.0

    @classmethod
    def of(cls, z_NZ): return cls().add(z_NZ)

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
        """Root mean square about the mean, per latent number."""
        return self.cov_ZZ.diagonal().mean().sqrt().item()

    @property
    def factor_ZZ(self):
        """R = V w^{1/2} from cov = V w V^T, so that cov = R R^T."""
        w_Z, V_ZZ = torch.linalg.eigh(self.cov_ZZ)
        return V_ZZ * w_Z.clamp(min=0).sqrt()


class Affine(NamedTuple):
    """z~ = mu_target + (z - mu_source) A, A symmetric: fitted once, applied to slices."""
    mu_source_Z: torch.Tensor
    mu_target_Z: torch.Tensor
    matrix_ZZ: torch.Tensor

    def apply(self, z_NZ):
        return self.mu_target_Z + (z_NZ.double() - self.mu_source_Z) @ self.matrix_ZZ


def gaussian_map(source: Moments, target: Moments) -> Affine:
    """Optimal transport between two Gaussians; the mapped cloud has the target's moments.
    Equation:  z~ = mu_t + A (z - mu_s),   A = S_s^{-1/2} (S_s^{1/2} S_t S_s^{1/2})^{1/2} S_s^{-1/2}
    Source:    paper: Sec. 3.3, Eq. 2 under a Gaussian model
    Example:   in one dimension A = sigma_t / sigma_s; in general A S_s A = S_t
    ours:      if an eigenvalue of S_s is below FLOOR times the larger cloud's mean one, that is
               added to all: |A| <= sqrt(Z / FLOOR), but what hardly varies may vary too little"""
    floor = FLOOR * max(source.spread, target.spread) ** 2 or 1.0  # both constant: A = 0
    floor_ZZ = floor * torch.eye(len(source.cov_ZZ)).to(source.cov_ZZ)
    too_low = torch.linalg.cholesky_ex(source.cov_ZZ - floor_ZZ).info.item() != 0
    R_ZZ = torch.linalg.cholesky(source.cov_ZZ + too_low * floor_ZZ)
    # any R with S_s = R R^T gives A = R^{-T} (R^T S_t R)^{1/2} R^{-1}; triangular: accurate
    m_Z, U_ZZ = torch.linalg.eigh(R_ZZ.T @ target.cov_ZZ @ R_ZZ)
    half_ZZ = torch.linalg.solve_triangular(R_ZZ.T, U_ZZ, upper=True)
    return Affine(source.mean_Z, target.mean_Z, (half_ZZ * m_Z.clamp(min=0).sqrt()) @ half_ZZ.T)


def wasserstein2(source: Moments, target: Moments) -> float:
    """Squared 2-Wasserstein distance of the Gaussian fits, per latent number; 0 after gaussian_map
    if n > Z: (|mu_s - mu_t|^2 + tr S_s + tr S_t - 2 tr (S_s^{1/2} S_t S_s^{1/2})^{1/2}) / Z."""
    # that trace is a sum of singular values; roots of eigenvalues would keep half the digits
    cross = torch.linalg.svdvals(source.factor_ZZ.T @ target.factor_ZZ).mean().item()
    shift = (source.mean_Z - target.mean_Z).square().mean().item()
    return max(0.0, shift + source.spread ** 2 + target.spread ** 2 - 2 * cross)


def control_latents(kind: str, z_target_JZ, target: Moments, generator=None):
    """Null controls (ours) for a slice of the target. zero: its mean, pure shrinkage; noise: its
    mean and covariance, Gaussian; shuffled: its latents in random order. Two need the generator."""
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


def align_mean(m: Meeting) -> Aligned:      # ours: does the covariance matter at all?
    return Aligned(m.z_projected_JZ.double() + m.target.mean_Z - m.source.mean_Z)


def align_gaussian(m: Meeting) -> Aligned:
    return Aligned(gaussian_map(m.source, m.target).apply(m.z_projected_JZ))


def align_sinkhorn(m: Meeting) -> Aligned:
    found = sinkhorn(squared_cost(m.z_source_IZ, m.z_target_JZ), epsilon=m.epsilon)
    return Aligned(barycentric_map(found.plan_IJ, m.z_source_IZ), found.iterations, found.error)


ALIGNERS = {"none": align_none, "mean": align_mean, "gaussian": align_gaussian,
            "sinkhorn": align_sinkhorn}
