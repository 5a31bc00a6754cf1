"""align.py against oracles: scipy's LP, assignment and sqrtm, loops, closed forms, by hand."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

import align
from align import Moments

SIZES = [(1, 1), (1, 5), (5, 1), (3, 2), (2, 3), (7, 7), (12, 5), (5, 12), (64, 48)]


def close(got, expected, atol=0.0, rtol=0.0):
    torch.testing.assert_close(got, expected, atol=atol, rtol=rtol)


def cloud(n, d, seed=0, kind="isotropic"):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if kind == "anisotropic":
        z = z * torch.logspace(0, -2, d, dtype=torch.float64) + 0.3
    if kind == "heavy":  # Student t with 3 degrees of freedom, one scale per point
        shape = torch.full((n, 1), 1.5, dtype=torch.float64)
        z = z / (torch._standard_gamma(shape, generator=generator) / 1.5).sqrt()
    return z


def uniform(n):
    return torch.full((n,), 1 / n, dtype=torch.float64)


# --- layers and projection ------------------------------------------------------------------------

def test_layers_pair_by_depth():
    for n_s in range(1, 40):
        for n_t in range(2, 40):
            step = (n_s - 1) / (n_t - 1)
            exact = [math.floor(j * step + 0.5 + 1e-9) for j in range(n_t)]  # halves go up
            pairs = align.pair_layers(n_s, n_t)
            assert pairs == exact and pairs[0] == 0 and pairs[-1] == n_s - 1
    assert align.pair_layers(6, 6) == list(range(6))
    assert [align.pair_layers(n, 1) for n in (1, 3, 5)] == [[0], [1], [2]]


def test_layers_pair_by_index_as_algorithm_1_reads():
    assert align.pair_layers(2, 4, by="index") == [0, 1, None, None]
    assert align.pair_layers(4, 2, by="index") == [0, 1]
    for arguments in [(0, 3), (3, 0), (3, 3, "name")]:
        with pytest.raises(ValueError, match="cannot pair"):
            align.pair_layers(*arguments)


def overlap_matrix(n_s, n_t):
    """The definition, interval by interval."""
    P = torch.zeros(n_t, n_s, dtype=torch.float64)
    for j in range(n_t):
        for i in range(n_s):
            shared = min((j + 1) * n_s, (i + 1) * n_t) - max(j * n_s, i * n_t)
            P[j, i] = max(0, shared) / n_s
    return P


@pytest.mark.parametrize("n_s, n_t", SIZES)
def test_projection_is_the_overlap_matrix(n_s, n_t):
    z = cloud(n_s, 3)
    # another order of additions
    close(align.project(z, n_t), overlap_matrix(n_s, n_t) @ z, atol=1e-14)
    constant = align.project(torch.full((n_s, 3), 0.7), n_t)
    close(constant, torch.full((n_t, 3), 0.7).double(), atol=1e-15)
    close(align.project(z, n_t).mean(0), z.mean(0), atol=1e-14)


def test_projection_by_hand_and_identity():
    z0, z1, z2 = z = cloud(3, 4)
    close(align.project(z, 2), torch.stack([(2 * z0 + z1) / 3, (z1 + 2 * z2) / 3]), atol=1e-15)
    z[0, 0] = -0.0
    assert align.project(z, 3, 4).numpy().tobytes() == z.numpy().tobytes()  # -0.0 too
    assert torch.equal(align.project_rows(z, 0, 3, 0, 3, 3), z)  # streamed: also bit for bit


def test_projection_of_columns_between_two_latent_sizes():
    z = cloud(6, 5)
    expected = overlap_matrix(6, 4) @ z @ overlap_matrix(5, 8).T
    close(align.project(z, 4, 8), expected, atol=1e-14)
    assert align.project(cloud(6, 1), 6, 40).shape == (6, 40)
    strided = cloud(5, 6).T
    assert torch.equal(align.project(strided, 4), align.project(strided.contiguous(), 4))
    with pytest.raises(ValueError, match="need rows"):
        align.project(torch.zeros(0, 3), 2)


@pytest.mark.parametrize("n_s, n_t", SIZES + [(1000, 37), (37, 1000)])
@pytest.mark.parametrize("step", [1, 3, 50])
def test_streamed_projection_equals_the_whole(n_s, n_t, step):
    z, whole = cloud(n_s, 2), align.project(cloud(n_s, 2), n_t)
    for j0 in range(0, n_t, step):
        j1 = min(j0 + step, n_t)
        i0, i1 = align.source_range(j0, j1, n_s, n_t)
        part = align.project_rows(z[i0:i1], i0, n_s, j0, j1, n_t)
        assert torch.equal(part, whole[j0:j1])  # the same sums in the same order
        if i1 - i0 > 1:
            with pytest.raises(ValueError, match="need rows"):
                align.project_rows(z[i0:i1 - 1], i0, n_s, j0, j1, n_t)


# --- Sinkhorn -------------------------------------------------------------------------------------

def check_plan(solution, cost, a, b, epsilon, bound):
    """Plan and both marginals again, from the potentials: a solver can fool its own measure."""
    plan = ((solution.f_I[:, None] + solution.g_J - cost) / (epsilon * cost.max())).exp()
    # potentials of some 100 epsilon and one exp: relative rounding of about 1e-13
    close(solution.plan_IJ, plan, rtol=1e-11, atol=1e-16)
    assert (plan.sum(1) - a).abs().sum() <= bound and (plan.sum(0) - b).abs().sum() <= bound
    assert abs(solution.g_J.mean()) <= 1e-12 * solution.g_J.abs().max() + 1e-300  # centred
    errors = [(solution.plan_IJ.sum(1) - a).abs().sum(), (solution.plan_IJ.sum(0) - b).abs().sum()]
    assert solution.error == max(errors) <= bound


def lp_cost(cost, a, b):
    n, m = cost.shape
    rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    result = scipy.optimize.linprog(cost.flatten().numpy(), A_eq=np.vstack([rows, columns]),
                                    b_eq=np.concatenate([a.numpy(), b.numpy()]), method="highs")
    assert result.success
    return result.fun


def test_two_by_two_by_hand():
    """The docstring's example: K = [[1, 1/e], [1/e, 1]] is doubly stochastic up to one factor."""
    solution = align.sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), epsilon=1.0, tolerance=1e-12)
    p = 1 / (2 + 2 / math.e)
    expected = torch.tensor([[p, p / math.e], [p / math.e, p]], dtype=torch.float64)
    close(solution.plan_IJ, expected, atol=1e-12)
    assert round(p, 4) == 0.3655


@pytest.mark.parametrize("n, m", [(1, 1), (1, 7), (7, 1), (12, 9), (9, 14), (15, 15)])
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_cost_against_the_linear_programme(n, m, epsilon):
    """LP <= transport cost <= LP + epsilon max(cost) (entropy of the plan - that of the LP's plan);
    a plan's entropy is at most that of a b^T, and the LP's at least 0."""
    cost, a, b = align.squared_cost(cloud(n, 3, 1), cloud(m, 3, 2)), uniform(n), uniform(m)
    solution = align.sinkhorn(cost, epsilon=epsilon, tolerance=1e-9)
    check_plan(solution, cost, a, b, epsilon, 1e-9)
    optimum, reached = lp_cost(cost, a, b), (solution.plan_IJ * cost).sum().item()
    entropy = -(a * a.log()).sum().item() - (b * b.log()).sum().item()
    # marginals off by 1e-9 can undercut the optimum by that much
    assert reached >= optimum - 1e-8 * cost.max()
    assert reached <= optimum + epsilon * cost.max().item() * entropy + 1e-8


def test_planted_permutation_is_recovered_like_the_assignment():
    z = cloud(60, 8)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(5))
    cost = align.squared_cost(z, z[order] + 0.05 * cloud(60, 8, 9))
    solution = align.sinkhorn(cost, epsilon=0.002)
    rows, columns = scipy.optimize.linear_sum_assignment(cost.numpy())
    assert solution.plan_IJ.argmax(0).tolist() == order.tolist()
    assert [columns[i] for i in order] == list(range(60)) and (rows == np.arange(60)).all()
    assert solution.plan_IJ[order, torch.arange(60)].sum() > 0.9  # and it is nearly a permutation


@pytest.mark.parametrize("kind", ["isotropic", "anisotropic", "heavy"])
@pytest.mark.parametrize("n, m", [(96, 96), (60, 140), (140, 60)])
def test_marginals_at_every_epsilon(kind, n, m):
    """1e-9 at epsilon >= 0.05, 1e-6 at 0.01 and 0.005, on both sides, in few steps."""
    cost = align.squared_cost(cloud(n, 16, 1, kind), cloud(m, 16, 2, kind))
    a, b = uniform(n), uniform(m)
    for epsilon, bound, most in [(0.5, 1e-9, 60), (0.05, 1e-9, 60), (0.01, 1e-6, 100),
                                 (0.005, 1e-6, 250)]:
        solution = align.sinkhorn(cost, epsilon=epsilon, tolerance=bound)
        check_plan(solution, cost, a, b, epsilon, bound)
        assert solution.iterations <= most


@pytest.mark.parametrize("epsilon, bound", [(0.05, 1e-9), (0.01, 1e-6), (0.005, 1e-6)])
def test_marginals_of_planted_problems(epsilon, bound):
    """The hard ones: many nearly separate pairs. Plain steps stall here."""
    x = cloud(512, 8, 1)
    cost = align.squared_cost(x, x.flip(0) + 0.05 * cloud(512, 8, 2))
    a = uniform(512)
    solution = align.sinkhorn(cost, epsilon=epsilon, tolerance=bound)
    check_plan(solution, cost, a, a, epsilon, bound)
    assert solution.iterations <= 600  # 14, 125, 320 when written; far below the limit of 2000


def test_extrapolating_every_third_step_beats_every_step(monkeypatch):
    x = cloud(512, 8, 1)
    cost = align.squared_cost(x, x.flip(0) + 0.05 * cloud(512, 8, 2))
    for period in (1, 10 ** 9):  # after each step; never
        monkeypatch.setattr(align, "PERIOD", period)
        with pytest.raises(ValueError, match="did not converge"):
            align.sinkhorn(cost, epsilon=0.005, max_iterations=700)


def textbook_plan(cost, a, b, epsilon):
    """Sinkhorn's loop in numpy, in the log domain, run to its end: the same unique plan."""
    score, g = -cost.numpy() / (epsilon * cost.max().item()), np.zeros(len(b))
    for _ in range(3000):
        f = np.log(a.numpy()) - scipy.special.logsumexp(score + g, axis=1)
        g = np.log(b.numpy()) - scipy.special.logsumexp(score + f[:, None], axis=0)
    return torch.from_numpy(np.exp(score + f[:, None] + g))


def test_against_the_textbook_loop():
    cost = align.squared_cost(cloud(9, 2, 1), cloud(13, 2, 2))
    found = align.sinkhorn(cost, epsilon=0.05, tolerance=1e-11)
    close(found.plan_IJ, textbook_plan(cost, uniform(9), uniform(13), 0.05), atol=1e-10)


def test_kernel_is_rebuilt_when_potentials_move_far():
    """A far cluster at tiny epsilon: potentials move by thousands of log units, exp(-cost) is 0."""
    x, y = cloud(8, 2, 1), cloud(8, 2, 2)
    y[:3] += 40.0
    cost = align.squared_cost(x, y)
    solution = align.sinkhorn(cost, epsilon=2e-4)
    check_plan(solution, cost, uniform(8), uniform(8), 2e-4, 1e-6)
    rows, columns = scipy.optimize.linear_sum_assignment(cost.numpy())
    assert solution.plan_IJ[rows, columns].sum() > 0.5


def test_a_constant_on_the_cost_changes_nothing():
    """epsilon is relative to the largest cost, so it is adjusted; the plan must not change."""
    cost = align.squared_cost(cloud(20, 3, 1), cloud(31, 3, 2))
    shifted = cost + 5.0
    plan = align.sinkhorn(cost, epsilon=0.02, tolerance=1e-10).plan_IJ
    epsilon = 0.02 * (cost.max() / shifted.max()).item()
    close(align.sinkhorn(shifted, epsilon=epsilon, tolerance=1e-10).plan_IJ, plan, atol=1e-9)


def test_permuted_points_permute_the_plan_and_scale_does_not_matter():
    cost = align.squared_cost(cloud(20, 3, 1), cloud(31, 3, 2))
    plan = align.sinkhorn(cost, tolerance=1e-10).plan_IJ
    p = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    close(align.sinkhorn(cost[p], tolerance=1e-10).plan_IJ, plan[p], atol=1e-9)
    close(align.sinkhorn(cost * 1e-12, tolerance=1e-10).plan_IJ, plan, atol=1e-9)


def test_zero_cost_and_single_points():
    close(align.sinkhorn(torch.zeros(4, 6)).plan_IJ, uniform(4).outer(uniform(6)), atol=1e-15)
    close(align.sinkhorn(torch.tensor([[3.0]])).plan_IJ, uniform(1)[None], atol=1e-12)
    close(align.sinkhorn(torch.rand(1, 6)).plan_IJ[0], uniform(6), atol=1e-12)
    close(align.sinkhorn(torch.rand(4, 1)).plan_IJ[:, 0], uniform(4), atol=1e-12)


@pytest.mark.parametrize("epsilon", [1e-4, 1e-6, 1e-9, 1e-15, 1e-200, 1e-320])
def test_tiny_epsilon_is_right_or_refused_but_never_a_zero_plan(epsilon):
    cost = align.squared_cost(cloud(30, 4, 1), cloud(30, 4, 2))
    try:
        plan = align.sinkhorn(cost, epsilon=epsilon, max_iterations=300).plan_IJ
    except ValueError as error:
        for part in ("did not converge", "raise epsilon", "max_iterations"):
            assert part in str(error)
        return
    assert abs(plan.sum() - 1) < 1e-5
    optimum = lp_cost(cost, plan.sum(1), plan.sum(0))
    most = optimum + epsilon * cost.max() * 2 * math.log(30)
    assert optimum - 1e-9 <= (plan * cost).sum() <= most + 1e-9


def test_the_refusal_names_the_error_that_was_reached():
    """After one iteration from v = 1 the rows are exact, the columns off by what a loop says."""
    cost = align.squared_cost(cloud(9, 2, 1), cloud(9, 2, 2))
    kernel = (-cost / (0.05 * cost.max())).exp()
    columns = sum(kernel[i] / kernel[i].sum() / 9 for i in range(9))
    error = sum(abs(column.item() - 1 / 9) for column in columns)
    words = f"marginal error {error:.1e} above 1.0e-06 after 1 iterations"
    with pytest.raises(ValueError, match=words):
        align.sinkhorn(cost, epsilon=0.05, max_iterations=1)


def test_bad_input_is_refused():
    cost = torch.rand(3, 4)
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="finite and >= 0"):
            align.sinkhorn(torch.tensor([[0.0, bad]]))
    for epsilon in [0.0, -1.0, math.nan]:
        with pytest.raises(ValueError, match="epsilon"):
            align.sinkhorn(cost, epsilon=epsilon)
    for shape in [(3,), (0, 4), (4, 0), (2, 2, 2)]:
        with pytest.raises(ValueError, match="cost matrix"):
            align.sinkhorn(torch.zeros(shape))
    with pytest.raises(ValueError, match="project"):
        align.squared_cost(cloud(3, 4), cloud(3, 5))


def test_arguments_are_not_changed_and_float32_is_upcast():
    cost = align.squared_cost(cloud(10, 2, 1).float(), cloud(12, 2, 2).float()).float()
    before = cost.clone()
    solution = align.sinkhorn(cost, epsilon=0.05, tolerance=1e-9)  # out of reach in float32
    assert solution.plan_IJ.dtype == torch.float64 and torch.equal(cost, before)
    z64, z32 = cloud(8, 3), cloud(8, 3).float()
    affine = align.gaussian_map(Moments.of(z32), Moments.of(z64))
    outputs = [align.squared_cost(z32, z32), align.project(z32, 3), Moments.of(z32).cov_ZZ,
               affine.apply(z32)]
    assert all(output.dtype == torch.float64 for output in outputs)


def test_squared_cost_against_differences():
    """Far from the origin too: |x|^2 + |y|^2 - 2 x.y without a shift would be off by 1e-4 there."""
    z = 1e3 * cloud(60, 33)
    assert align.squared_cost(z, z).min() >= 0  # rounding alone makes some of the zeros negative
    for offset in [0.0, 1e6]:
        x, y = cloud(7, 5, 1) + offset, cloud(9, 5, 2) + offset
        brute = (x[:, None] - y).square().sum(2)
        close(align.squared_cost(x, y), brute, rtol=1e-9, atol=1e-12)


# --- the barycentric map --------------------------------------------------------------------------

@pytest.mark.parametrize("n, m", [(6, 3), (3, 6), (5, 5)])
def test_barycentric_map_divides_by_the_targets_mass(n, m):
    z, generator = cloud(n, 4), torch.Generator().manual_seed(1)
    plan = torch.rand(n, m, generator=generator, dtype=torch.float64) + 0.1     # any two marginals
    plan /= plan.sum()
    a, b = plan.sum(1), plan.sum(0)
    moved = align.barycentric_map(plan, z)
    expected = torch.stack([sum(plan[i, j] * z[i] for i in range(n)) / b[j] for j in range(m)])
    close(moved, expected, atol=1e-13)
    close(b @ moved, a @ z, atol=1e-13)  # the source's mean is kept
    constant = align.barycentric_map(plan, torch.full((n, 4), 2.5))
    close(constant, torch.full((m, 4), 2.5).double(), atol=1e-13)


def test_barycentric_map_by_hand_and_its_error():
    z0, z1 = z = cloud(2, 3)
    close(align.barycentric_map(torch.eye(2) / 2, z), z, atol=0)
    plan = torch.tensor([[0.25, 0.25], [0.0, 0.5]])
    close(align.barycentric_map(plan, z), torch.stack([z0, (z0 + 2 * z1) / 3]), atol=1e-15)
    with pytest.raises(ValueError, match="empty"):
        align.barycentric_map(torch.tensor([[0.5, 0.0], [0.5, 0.0]]), z)


def test_blur_at_the_default_epsilon_is_what_its_comment_says():
    z = cloud(500, 64, 1)
    cost = align.squared_cost(z, cloud(400, 64, 2))
    for epsilon, kept, most in [(0.05, 0.17, 5), (align.EPSILON, 0.63, 22), (0.001, 0.80, 133)]:
        solution = align.sinkhorn(cost, epsilon=epsilon)
        moved = align.barycentric_map(solution.plan_IJ, z)
        ratio = Moments.of(moved).spread / Moments.of(z).spread
        # the comment's two digits; steps can differ a little with another machine's rounding
        assert abs(ratio - kept) < 0.006 and solution.iterations <= 1.2 * most


# --- moments and the Gaussian map -----------------------------------------------------------------

def test_moments_in_batches_equal_numpy():
    z = cloud(100, 5) + 1e4
    moments = Moments()
    for part in z.split([1, 0, 40, 59]):
        moments.add(part)
    close(moments.mean_Z, z.mean(0), rtol=1e-14, atol=0)
    # mean 1e4, variance 1: raw sums of squares would be off by 1e-8
    close(moments.cov_ZZ, torch.from_numpy(np.cov(z.numpy().T, bias=True)), atol=1e-11)
    assert moments.n == 100 and Moments().n == 0
    assert abs(moments.spread - (z - z.mean(0)).square().mean().sqrt()) < 1e-11
    close(moments.factor_ZZ @ moments.factor_ZZ.T, moments.cov_ZZ, atol=1e-13)
    with pytest.raises(ValueError, match="NaN"):
        Moments.of(torch.tensor([[1.0, math.nan]]))


def gaussian(source, target):
    affine = align.gaussian_map(Moments.of(source), Moments.of(target))
    return affine.matrix_ZZ, affine.apply(source)


def mixed(n, d, seed):
    """Correlated, anisotropic, off the origin: condition number of the covariance about 1e3."""
    turn, _ = torch.linalg.qr(cloud(d, d, seed + 50))
    mixer = turn * torch.logspace(0, -1.5, d, dtype=torch.float64)
    return cloud(n, d, seed) @ mixer.T + seed


@pytest.mark.parametrize("n, m", [(2000, 900), (900, 2000)])
def test_mapped_cloud_has_the_targets_moments(n, m):
    source, target = mixed(n, 24, 1), mixed(m, 24, 2)
    A, mapped = gaussian(source, target)
    close(mapped.mean(0), target.mean(0), atol=1e-12)
    close(torch.cov(mapped.T, correction=0), torch.cov(target.T, correction=0), atol=1e-8)
    close(A, A.T, atol=1e-12)
    assert torch.linalg.eigvalsh(A).min() > 0  # the gradient of a convex function: the optimal map
    assert align.wasserstein2(Moments.of(mapped), Moments.of(target)) < 1e-12


def test_gaussian_map_is_sqrtms_formula():
    source, target = mixed(500, 12, 1), mixed(700, 12, 2)
    S_s, S_t = (np.cov(z.numpy().T, bias=True) for z in (source, target))
    half = scipy.linalg.sqrtm(S_s)
    inverse = np.linalg.inv(half)
    expected = torch.from_numpy(np.real(inverse @ scipy.linalg.sqrtm(half @ S_t @ half) @ inverse))
    # condition number 1e3, roots of 1e-16
    close(gaussian(source, target)[0], expected, atol=1e-9)


@pytest.mark.parametrize("n", [400, 7])
def test_equal_clouds_are_left_alone(n):
    z = mixed(n, 12, 1)
    close(gaussian(z, z)[1], z, atol=1e-7)  # at n < d the map is I only on the cloud's own span
    assert align.wasserstein2(Moments.of(z), Moments.of(z)) < 1e-12


@pytest.mark.parametrize("n, m, d", [(5, 9, 32), (9, 200, 32), (200, 9, 32), (1, 1, 8), (1, 50, 8),
                                     (50, 1, 8), (40, 30, 1), (1, 1, 1), (2, 2, 600)])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_gaussian_map_is_finite_and_bounded(n, m, d, scale):
    """|A| <= sqrt(Z / FLOOR); the mapped covariance never exceeds the target's, up to rounding."""
    source, target = scale * cloud(n, d, 1), cloud(m, d, 2)
    A, mapped = gaussian(source, target)
    assert mapped.isfinite().all()
    assert torch.linalg.matrix_norm(A, 2) <= 1.01 * math.sqrt(d / align.FLOOR)
    S_t = torch.cov(target.T, correction=0).reshape(d, d)
    excess = torch.linalg.eigvalsh(torch.cov(mapped.T, correction=0).reshape(d, d) - S_t).max()
    assert excess <= 1e-5 * S_t.diagonal().mean() + 1e-12
    close(mapped.mean(0), target.mean(0), atol=1e-4)  # A up to 1e6 times the mean's rounding


def test_constant_clouds_and_one_dimension():
    z, flat = cloud(50, 4), torch.full((50, 4), 3.0).double()
    close(gaussian(flat, z)[1], z.mean(0).expand(50, 4), atol=1e-9)
    close(gaussian(z, flat)[1], flat, atol=1e-9)
    close(gaussian(flat, flat - 1)[1], flat - 1, atol=0)
    x, y = 2 * cloud(60, 1, 1) + 1, cloud(80, 1, 2)
    expected = y.mean() + (x - x.mean()) * y.std(correction=0) / x.std(correction=0)
    close(gaussian(x, y)[1], expected, atol=1e-12)


def test_with_few_samples_the_map_stays_in_the_targets_span():
    """n < Z makes the map a remix of the target's chunks: the range of A is the target's span."""
    source, target = cloud(20, 40, 1), cloud(15, 40, 2)
    mapped = gaussian(source, target)[1] - target.mean(0)
    centred = target - target.mean(0)
    outside = mapped - mapped @ torch.linalg.pinv(centred) @ centred
    assert outside.norm() < 1e-4 * mapped.norm()


def test_wasserstein_against_sqrtm_and_one_dimension():
    source, target = mixed(300, 8, 1), mixed(200, 8, 2)
    S_s, S_t = (np.cov(z.numpy().T, bias=True) for z in (source, target))
    half = scipy.linalg.sqrtm(S_s)
    bures = np.trace(S_s + S_t - 2 * np.real(scipy.linalg.sqrtm(half @ S_t @ half)))
    expected = ((source.mean(0) - target.mean(0)).square().sum().item() + bures) / 8
    assert abs(align.wasserstein2(Moments.of(source), Moments.of(target)) - expected) < 1e-9
    x, y = 3 * cloud(50, 1, 1), cloud(60, 1, 2) + 1
    by_hand = (x.mean() - y.mean()) ** 2 + (x.std(correction=0) - y.std(correction=0)) ** 2
    assert abs(align.wasserstein2(Moments.of(x), Moments.of(y)) - by_hand) < 1e-12


# --- line 4 as a table ----------------------------------------------------------------------------

def meeting(n_source, n_target, d=3, epsilon=0.05):
    z_source, z_target = mixed(n_source, d, 1), mixed(n_target, d, 2)
    projected = overlap_matrix(n_source, n_target) @ z_source
    return align.Meeting(z_source, projected, z_target, Moments.of(projected),
                         Moments.of(z_target), epsilon)


@pytest.mark.parametrize("n_source, n_target", [(30, 20), (20, 30), (25, 25)])
def test_every_aligner_by_its_definition(n_source, n_target):
    m = meeting(n_source, n_target)
    found = {name: aligner(m) for name, aligner in align.ALIGNERS.items() if name != "units"}
    projected, target = m.z_projected_JZ, m.z_target_JZ
    assert found["none"].z_JZ is projected
    close(found["mean"].z_JZ, projected - projected.mean(0) + target.mean(0), atol=1e-13)
    mapped = found["gaussian"].z_JZ
    close(mapped.mean(0), target.mean(0), atol=1e-12)
    close(torch.cov(mapped.T), torch.cov(target.T), atol=1e-8)
    # Sinkhorn moves the points as they are, not projected: uniform masses, its own plan
    cost = (m.z_source_IZ[:, None] - target).square().sum(2)
    plan = textbook_plan(cost, uniform(n_source), uniform(n_target), m.epsilon)
    close(found["sinkhorn"].z_JZ, n_target * plan.T @ m.z_source_IZ, atol=1e-4)    # tolerance 1e-6
    assert found["sinkhorn"].iterations > 0 and found["sinkhorn"].error <= align.TOLERANCE
    for name in ("none", "mean", "gaussian"):
        assert (found[name].iterations, found[name].error) == (0, 0)


def test_sinkhorn_takes_the_epsilon_of_the_meeting():
    moved = [align.ALIGNERS["sinkhorn"](meeting(30, 20, epsilon=e)).z_JZ for e in (0.5, 0.005)]
    assert Moments.of(moved[0]).spread < 0.5 * Moments.of(moved[1]).spread    # more blur


# --- null controls --------------------------------------------------------------------------------

def test_controls_have_the_targets_shape_and_statistics():
    z = mixed(20_000, 3, 2)
    moments = Moments.of(z)

    def draw(kind, seed=1):
        return align.control_latents(kind, z, moments, torch.Generator().manual_seed(seed))

    assert torch.equal(draw("zero"), moments.mean_Z.expand(20_000, 3))
    noise, shuffled = draw("noise"), draw("shuffled")
    # standard error of a mean is std / sqrt(20000) < 0.008, of a variance 0.01: four of them
    close(noise.mean(0), z.mean(0), atol=0.03)
    close(torch.cov(noise.T), torch.cov(z.T), atol=0.04)
    assert not torch.equal(shuffled, z) and torch.equal(shuffled.sort(0).values, z.sort(0).values)
    whole_rows = (shuffled[:50, None] == z).all(2).any(1)
    assert whole_rows.all()  # chunks move as wholes
    for kind in ("noise", "shuffled"):
        assert torch.equal(draw(kind), draw(kind))
        assert not torch.equal(draw(kind), draw(kind, seed=2))
        with pytest.raises(ValueError, match="generator"):
            align.control_latents(kind, z, moments)
    with pytest.raises(ValueError, match="control must be"):
        align.control_latents("nothing", z, moments, torch.Generator())


def test_global_random_state_is_untouched():
    z, state = cloud(5, 2), torch.get_rng_state()
    for kind in ("noise", "shuffled"):
        align.control_latents(kind, z, Moments.of(z), torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())
