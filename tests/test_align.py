"""align.py against oracles: names by hand; scipy's LP, assignment, sqrtm; loops."""
import math
import re

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

import align
import chunking as ck
from align import Moments
from conftest import generator, overlap_matrix, textbook_plan, transport_of


def close(got, expected, atol=0.0, rtol=0.0):
    torch.testing.assert_close(got, expected, atol=atol, rtol=rtol)


def cloud(n, d, seed=0, kind="isotropic"):
    g = generator(seed)
    z = torch.randn(n, d, generator=g, dtype=torch.float64)
    if kind == "anisotropic":
        z = z * torch.logspace(0, -2, d, dtype=torch.float64) + 0.3
    if kind == "heavy":  # Student t with 3 degrees of freedom, one scale per point
        shape = torch.full((n, 1), 1.5, dtype=torch.float64)
        z = z / (torch._standard_gamma(shape, generator=g) / 1.5).sqrt()
    return z


# --- Line 1: names --------------------------------------------------------------------
# A model is {what a tensor means: its name}. The table of pairs must hold the names of
# what two models have in common, and nothing else.
def model(stack, parts, meaning="text", layers=3, **outside):
    """parts: {meaning: the name behind a layer's number}; outside: of other tensors."""
    names = {part: f"{name}.weight" for part, name in outside.items()}
    for i in range(layers):
        for part, name in parts.items():
            end = "" if part.endswith("bias") else ".weight"
            names[f"{meaning} {i} {part}"] = f"{stack}.{i}.{name}{end}"
    return names


LLAMA = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "o": "self_attn.o_proj",
         "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
         "ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
VISION = {"q": "self_attn.q_proj", "q bias": "self_attn.q_proj.bias",
          "o": "self_attn.out_proj", "up": "mlp.fc1", "down": "mlp.fc2",
          "ln1": "layer_norm1"}
BERT = {"q": "attention.self.query", "q bias": "attention.self.query.bias",
        "o": "attention.output.dense", "up": "intermediate.dense",
        "down": "output.dense", "ln1": "attention.output.LayerNorm"}
GPT2 = {"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc",
        "down": "mlp.c_proj", "ln1": "ln_1"}
MASKS = GPT2 | {"mask bias": "attn.bias", "minus bias": "attn.masked_bias"}
T5 = {"q": "layer.0.SelfAttention.q", "ln": "layer.0.layer_norm",
      "wi": "layer.1.DenseReluDense.wi_0"}
T5_DECODER = {"q": "layer.0.SelfAttention.q", "cross": "layer.1.EncDecAttention.q",
              "wi": "layer.2.DenseReluDense.wi_0"}
EXPERTS = {"q": LLAMA["q"], "ln1": LLAMA["ln1"], "router": "block_sparse_moe.gate",
           "expert 0": "block_sparse_moe.experts.0.w1",
           "expert 1": "block_sparse_moe.experts.1.w1"}


def llama(lead="model.", parts=LLAMA, **head):
    return model(lead + "layers", parts, embed=lead + "embed_tokens",
                 norm=lead + "norm", **head)


def clip_vision(lead):
    """4 layers, beside 3 of text: by depth they would meet."""
    return model(lead + "encoder.layers", VISION, "vision", 4, pre=lead + "pre_norm",
                 patch=lead + "embeddings.patch_embedding")


def bert(lead="bert."):
    return model(lead + "encoder.layer", BERT, pooler=lead + "pooler.dense",
                 embed=lead + "embeddings.word_embeddings",
                 position=lead + "embeddings.position_embeddings")


def gpt2(lead="transformer.", parts=GPT2):
    return model(lead + "h", parts, embed=lead + "wte", position=lead + "wpe",
                 norm=lead + "ln_f")


def wrapped(names, lead="", inside=""):
    """Every name behind `lead`, and with `inside` behind a layer's number."""
    return {meaning: lead + re.sub(r"(layers\.\d+\.)", rf"\1{inside}", name)
            for meaning, name in names.items()}


LM = llama(head="lm_head")
LLAVA = llama("language_model.model.", head="language_model.lm_head",
              projector="multi_modal_projector.linear_1")
LLAVA |= clip_vision("vision_tower.vision_model.")
T5_ENCODER = model("encoder.block", T5, "encoder", embed="shared",
                   norm="encoder.final_layer_norm")
T5_BOTH = T5_ENCODER | model("decoder.block", T5_DECODER, "decoder",
                             last="decoder.final_layer_norm")
BART = model("model.encoder.layers", VISION, "encoder")
BART |= model("model.decoder.layers", VISION, "decoder")
FSDP = "_fsdp_wrapped_module."
NAMES = {
    "Llama, itself": (LM, LM),
    "the bare model": (LM, llama("")),
    "LLaVA and a text model": (LLAVA, LM),
    "LLaVA and its tower": (LLAVA, clip_vision("vision_model.")),
    "another lead": (LM, llama("model.language_model.", head="lm_head")),
    "a wrapper": (LM, wrapped(LM, "module.")),
    "FSDP's, inside": (LM, wrapped(LM, FSDP, FSDP)),
    "checkpointing's": (LM, wrapped(LM, inside="_checkpoint_wrapped_module.")),
    "BERT and its encoder": (bert(), bert("")),
    "T5 and its encoder": (T5_BOTH, T5_ENCODER),
    "both stacks and a decoder": (BART, model("decoder.layers", VISION, "decoder")),
    "GPT-2, with masks and without": (gpt2(parts=MASKS), gpt2("")),
    "a mixture of experts": (llama(parts=EXPERTS, head="lm_head"), llama("", EXPERTS)),
    "a mixture and a dense model": (llama(parts=EXPERTS, head="lm_head"), LM),
}


def paired(mine, theirs):
    return align.pair_names(ck.parse_names(mine.values()),
                            ck.parse_names(theirs.values()))


@pytest.mark.parametrize("case", NAMES)
def test_who_meets_whom_both_ways(case):
    for mine, theirs in (NAMES[case], NAMES[case][::-1]):
        expected = {mine[m]: theirs[m] for m in mine.keys() & theirs.keys()}
        assert paired(mine, theirs) == expected


ROLES = {"q", "o", "up", "down"}


@pytest.mark.parametrize("one, roles", [(bert(), ROLES), (gpt2(), ROLES - {"q"})])
def test_of_other_families_roles_meet(one, roles):
    """BERT's query is Llama's q_proj; norms and embeddings say nothing."""
    common = [f"text {i} {role}" for i in range(3) for role in roles]
    for mine, theirs in ((one, LM), (LM, one)):
        assert paired(mine, theirs) == {mine[each]: theirs[each] for each in common}


def test_what_is_ambiguous_meets_nobody():
    one = model("model.layers", LLAMA, "x")
    two = model("a.layers", LLAMA, "x") | model("b.layers", LLAMA, "y")
    assert paired(one, two) == paired(two, one) == {}
    target = {"up": "layers.0.mlp.up_proj.weight"}
    source = {"1": "layers.0.mlp.fc1.weight", "2": "layers.0.mlp.w3.weight"}
    assert paired(target, source) == paired(source, target) == {}
    norm = {"norm": "layers.0.norm1.weight"}            # models place them differently
    assert paired(norm, {"norm": "layers.0.input_layernorm.weight"}) == {}
    for lead in ("a.", ""):
        assert paired({"w": "b.weight"}, {"w": f"{lead}weight"}) == {}
    # of stacks whose names fit equally well, those that hold the same tensors meet
    two = one | model("b.layers", BERT, "y")
    three = model("c.layers", LLAMA, "x")
    assert paired(two, three) == {two[meaning]: three[meaning] for meaning in three}
    scores = {("a", "x"): 2, ("a", "y"): 1, ("b", "y"): 1}
    assert align.best_pairs(scores) == {"a": "x", "b": "y"}
    assert align.best_pairs(dict.fromkeys(scores, 1)) == {}


def test_layers_pair_by_depth_or_by_index_as_algorithm_1_reads():
    for n_s in range(1, 40):
        for n_t in range(2, 40):
            step = (n_s - 1) / (n_t - 1)            # halves go up
            exact = [math.floor(j * step + 0.5 + 1e-9) for j in range(n_t)]
            assert align.pair_layers(n_s, n_t) == exact
    assert [align.pair_layers(n, 1) for n in (1, 3, 5)] == [[0], [1], [2]]
    assert align.pair_layers(2, 4, by="index") == [0, 1]
    pairs = align.partners_by_depth({3: 0, 5: 0, 7: 0}, {2: 0, 4: 0}, "index")
    assert pairs == {3: 2, 5: 4}
    for arguments in [(0, 3), (3, 0), (3, 3, "name")]:
        with pytest.raises(ValueError, match="cannot pair"):
            align.pair_layers(*arguments)


# --- Line 3: projection ---------------------------------------------------------------
@pytest.mark.parametrize("n_s, n_t", [(1, 1), (1, 5), (5, 1), (3, 2), (2, 3), (12, 5),
                                      (64, 48), (200, 37), (37, 200)])
@pytest.mark.parametrize("step", [1, 3, 50])
def test_projection_is_the_overlap_matrix_whole_and_in_pieces(n_s, n_t, step):
    z = cloud(n_s, 2) + 100
    whole = overlap_matrix(n_s, n_t) @ z
    close(align.project(z, n_t), whole, rtol=1e-12)
    assert torch.equal(align.project(z, n_s), z)
    for j0 in range(0, n_t, step):
        j1 = min(j0 + step, n_t)
        i0, i1 = align.source_range(j0, j1, n_s, n_t)
        part = align.project_rows(z[i0:i1], i0, n_s, j0, j1, n_t)
        close(part, whole[j0:j1], rtol=1e-12)


# --- Line 4: Sinkhorn -----------------------------------------------------------------
def check_plan(solution, cost, epsilon, bound):
    """Plan and marginals again, from the potentials."""
    potentials = solution.f_I[:, None] + solution.g_J
    plan = ((potentials - cost) / (epsilon * cost.max())).exp()
    # potentials of some 100 epsilon and one exp: relative rounding of about 1e-13
    close(solution.plan_IJ, plan, rtol=1e-11, atol=1e-16)
    I, J = cost.shape
    for each in (plan, solution.plan_IJ):
        errors = [(each.sum(1) - 1 / I).abs().sum(), (each.sum(0) - 1 / J).abs().sum()]
        assert max(errors) <= bound
    assert solution.error == max(errors)


def lp_cost(cost, plan):
    n, m = cost.shape
    sums = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    result = scipy.optimize.linprog(cost.flatten().numpy(), A_eq=sums,
                                    b_eq=sums @ plan.flatten().numpy(), method="highs")
    assert result.success
    return result.fun


@pytest.mark.parametrize("n, m", [(1, 1), (1, 7), (7, 1), (12, 9), (9, 14), (15, 15)])
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_cost_against_the_linear_programme(n, m, epsilon):
    """LP <= transport cost <= LP + epsilon max(cost) (entropy of the plan - that of the
    LP's plan); a plan's entropy is at most that of a b^T, and the LP's at least 0."""
    cost = align.squared_cost(cloud(n, 3), cloud(m, 3, 2))
    solution = align.sinkhorn(cost, epsilon=epsilon, tolerance=1e-9)
    check_plan(solution, cost, epsilon, 1e-9)
    optimum = lp_cost(cost, torch.full((n, m), 1 / (n * m), dtype=torch.float64))
    reached = (solution.plan_IJ * cost).sum()
    most = optimum + epsilon * cost.max() * math.log(n * m)
    # marginals off by 1e-9 can undercut the optimum by that much
    assert optimum - 1e-8 * cost.max() <= reached <= most + 1e-8


CLOUDS = {
    "isotropic": (cloud(96, 16, 1), cloud(96, 16, 2)),
    "anisotropic": (cloud(60, 16, 1, "anisotropic"), cloud(140, 16, 2, "anisotropic")),
    "heavy": (cloud(140, 16, 1, "heavy"), cloud(60, 16, 2, "heavy")),
    # the hard ones: many nearly separate pairs, where plain steps stall
    "pairs": (cloud(512, 8, 1), cloud(512, 8, 1).flip(0) + 0.05 * cloud(512, 8, 2))}


@pytest.mark.parametrize("kind", CLOUDS)
def test_marginals_at_every_epsilon(kind):
    """On both sides, in few steps (of the pairs 14, 125 and 320 when written)."""
    cost = align.squared_cost(*CLOUDS[kind])
    for epsilon, bound, most in [(0.5, 1e-9, 60), (0.05, 1e-9, 60), (0.01, 1e-6, 200),
                                 (0.005, 1e-6, 600)]:
        solution = align.sinkhorn(cost, epsilon=epsilon, tolerance=bound)
        check_plan(solution, cost, epsilon, bound)
        assert solution.iterations <= most


def test_kernel_is_rebuilt_when_potentials_move_far():
    """A far cluster at tiny epsilon: potentials move by thousands of log units."""
    x, y = cloud(8, 2, 1), cloud(8, 2, 2)
    y[:3] += 40.0
    cost = align.squared_cost(x, y)
    solution = align.sinkhorn(cost, epsilon=2e-4)
    check_plan(solution, cost, 2e-4, 1e-6)
    rows, columns = scipy.optimize.linear_sum_assignment(cost.numpy())
    assert solution.plan_IJ[rows, columns].sum() > 0.5
    for bad in (math.nan, -1.0, math.inf):
        with pytest.raises(ValueError):
            align.sinkhorn(torch.tensor([[0.0, bad]]))


@pytest.mark.parametrize("epsilon", [1e-4, 1e-6, 1e-9, 1e-15, 1e-200, 1e-320])
def test_tiny_epsilon_is_right_or_refused_but_never_a_zero_plan(epsilon):
    cost = align.squared_cost(cloud(30, 4, 1), cloud(30, 4, 2))
    try:
        plan = align.sinkhorn(cost, epsilon=epsilon, max_iterations=300).plan_IJ
    except ValueError as error:
        assert "did not converge" in str(error)
        return
    assert abs(plan.sum() - 1) < 1e-5
    optimum = lp_cost(cost, plan)
    most = optimum + epsilon * cost.max() * 2 * math.log(30)
    assert optimum - 1e-9 <= (plan * cost).sum() <= most + 1e-9


def test_squared_cost_against_differences():
    """Far from the origin too, where |x|^2 + |y|^2 - 2 x.y would be off by 1e-4."""
    z = 1e3 * cloud(60, 33)
    assert align.squared_cost(z, z).min() >= 0      # rounding makes some zeros negative
    for offset in [0.0, 1e6]:
        x, y = cloud(40, 5, 1) + offset, cloud(30, 5, 2) + offset
        brute = (x[:, None] - y).square().sum(2)
        close(align.squared_cost(x, y), brute, rtol=1e-9, atol=1e-12)


# --- Moments and the Gaussian map -----------------------------------------------------
def test_moments_in_batches_equal_numpy():
    z = cloud(100, 5) + 1e4
    moments = Moments()
    for part in z.split([1, 0, 40, 59]):
        moments.add(part)
    close(moments.mean_Z, z.mean(0), rtol=1e-14)
    # mean 1e4, variance 1: raw sums of squares would be off by 1e-8
    close(moments.cov_ZZ, torch.from_numpy(np.cov(z.numpy().T, bias=True)), atol=1e-11)
    assert moments.n == 100 and Moments().n == 0
    assert abs(moments.std - (z - z.mean(0)).square().mean().sqrt()) < 1e-11
    assert Moments.of(z.float()).cov_ZZ.dtype == torch.float64


def gaussian(source, target):
    """(A, the mapped source): z~ = mu_t + A (z - mu_s)."""
    of_source, of_target = Moments.of(source), Moments.of(target)
    A = align.gaussian_map(of_source, of_target)
    return A, of_target.mean_Z + (source.double() - of_source.mean_Z) @ A.T


def mixed(n, d, seed):
    """Correlated, off the origin: condition number of the covariance 1e3."""
    turn, _ = torch.linalg.qr(cloud(d, d, seed + 50))
    mixer = turn * torch.logspace(0, -1.5, d, dtype=torch.float64)
    return cloud(n, d, seed) @ mixer.T + seed


def test_square_root_and_gaussian_map_are_scipys():
    source = mixed(500, 12, 1)
    target = mixed(700, 12, 2)
    S = np.cov(source.numpy().T, bias=True)
    expected = torch.from_numpy(scipy.linalg.sqrtm(S).real)
    close(align.sqrtm(torch.from_numpy(S)), expected, atol=1e-12)
    found, mapped = gaussian(source, target)
    # condition number 1e3, roots of 1e-16
    close(found, transport_of(source, target), atol=1e-9)
    assert align.wasserstein2(Moments.of(mapped), Moments.of(target)) < 1e-12
    # the distance before: of the means, and Bures' of the covariances
    T = np.cov(target.numpy().T, bias=True)
    root = expected.numpy()
    bures = np.trace(S + T - 2 * scipy.linalg.sqrtm(root @ T @ root).real)
    shift = (source.mean(0) - target.mean(0)).square().sum().item()
    apart = align.wasserstein2(Moments.of(source), Moments.of(target))
    assert apart == pytest.approx((shift + bures) / 12, abs=1e-9)


@pytest.mark.parametrize("n, m, d", [
    (5, 9, 32), (9, 200, 32), (200, 9, 32), (1, 1, 8), (1, 50, 8), (50, 1, 8),
    (40, 30, 1), (1, 1, 1), (2, 2, 300)])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_gaussian_map_is_finite_and_bounded(n, m, d, scale):
    """|A| <= sqrt(Z / FLOOR); the mapped covariance never exceeds the target's."""
    source, target = scale * cloud(n, d, 1), cloud(m, d, 2)
    A, mapped = gaussian(source, target)
    assert mapped.isfinite().all()
    assert torch.linalg.matrix_norm(A, 2) <= 1.01 * math.sqrt(d / align.FLOOR)
    S_t = torch.cov(target.T, correction=0).reshape(d, d)
    excess = torch.cov(mapped.T, correction=0).reshape(d, d) - S_t
    largest = torch.linalg.eigvalsh(excess).max()
    assert largest <= 1e-5 * S_t.diagonal().mean() + 1e-12
    close(mapped.mean(0), target.mean(0), atol=1e-4)    # A up to 1e6 times the rounding


@pytest.mark.parametrize("n_source, n_target", [(30, 20), (20, 30), (25, 25)])
def test_every_aligner_by_its_definition(n_source, n_target):
    source = mixed(n_source, 3, 1)
    target = mixed(n_target, 3, 2)
    projected = overlap_matrix(n_source, n_target) @ source
    m = align.Meeting(source, projected, target, Moments.of(projected),
                      Moments.of(target), 0.05)
    assert list(align.ALIGNERS) == ["auto", "none", "mean", "gaussian", "sinkhorn"]
    found = {name: aligner(m) for name, aligner in align.ALIGNERS.items()}
    assert found["none"].z_JZ is projected
    shifted = projected - projected.mean(0) + target.mean(0)
    close(found["mean"].z_JZ, shifted, atol=1e-13)
    mapped = found["gaussian"].z_JZ
    close(mapped.mean(0), target.mean(0), atol=1e-12)
    close(torch.cov(mapped.T), torch.cov(target.T), atol=1e-8)
    # Sinkhorn moves the points as they are, not projected: uniform masses, its own plan
    cost = (source[:, None] - target).square().sum(2)
    moved = n_target * textbook_plan(cost, 0.05).T @ source
    close(found["sinkhorn"].z_JZ, moved, atol=1e-4)             # tolerance 1e-6
    assert found["sinkhorn"].iterations > 0
    assert found["sinkhorn"].error <= align.TOLERANCE
    for name in ("none", "mean", "gaussian"):
        assert (found[name].iterations, found[name].error) == (0, 0)


def test_controls_have_the_targets_shape_and_statistics():
    z = mixed(20_000, 3, 2)
    state = torch.get_rng_state()
    moments = Moments.of(z)

    def draw(kind, seed=1):
        return align.control_latents(kind, z, moments, generator(seed))

    assert torch.equal(draw("zero"), moments.mean_Z.expand(20_000, 3))
    noise, shuffled = draw("noise"), draw("shuffled")
    # four standard errors: of a mean std / sqrt(20000) < 0.008, of a variance 0.01
    close(noise.mean(0), z.mean(0), atol=0.03)
    close(torch.cov(noise.T), torch.cov(z.T), atol=0.04)
    assert not torch.equal(shuffled, z)
    assert torch.equal(shuffled.sort(0).values, z.sort(0).values)
    assert (shuffled[:50, None] == z).all(2).any(1).all()       # chunks move as wholes
    for kind in ("noise", "shuffled"):
        assert torch.equal(draw(kind), draw(kind))
        assert not torch.equal(draw(kind), draw(kind, seed=2))
    assert torch.equal(state, torch.get_rng_state())            # no global randomness
