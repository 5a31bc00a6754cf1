"""Merging in weight space: the baselines that the tables hold latent merging against.

In:    state dicts of equal names and shapes, name -> tensor.
Out:   a state dict in the order of the first: every float tensor (embeddings and norms
       too) merged, in float64; whatever is no float is the first one's.
Paper: Sec. 4, Tables 3 and 4. delta_i = W_i - W_base is the task vector of model i.
    soup             Wortsman et al. 2022, "Model soups", Recipe 1:  W = mean_i W_i
    ties             Yadav et al. 2023, "TIES-Merging", Algorithm 1:  W = W_base + lam
                     tau, tau from trim, elect, merge
    dare, dare_ties  Yu et al. 2023, "Language Models are Super Mario":
                     delta^ = m delta / (1 - p), m ~ Bernoulli(1 - p)
    noise_average    ours: the control of self-merging, which averages k samples around
                     one model
differs: TIES. The authors' code breaks a drawn election by the majority of all elected
       signs; here, as Algorithm 1 reads, a draw leaves the base. mergekit trims each
       tensor to the same density; here, as in the paper, one threshold holds for the
       whole model.
differs: DARE-TIES. Dropping takes the place of trimming, as in mergekit (which then
       adds where we average, as TIES does).
Left out on purpose: lerp, slerp and task arithmetic of weights (merge.py --space
       weight); checks of what comes in. Next: merging.py.
"""
import torch


def float_names(model):
    return [name for name, tensor in model.items() if tensor.is_floating_point()]


def task_vectors(base, models):
    """[{name: W_i - W_base}] of the float tensors, float64."""
    deltas = []
    for model in models:
        delta = {}
        for name in float_names(base):
            delta[name] = model[name].double() - base[name].double()
        deltas.append(delta)
    return deltas


def plus(base, update, lam=1.0):
    """base + lam update in float64 where there is an update; the rest of base as it
    is."""
    moved = dict(base)
    for name, change in update.items():
        moved[name] = base[name].double() + lam * change
    return moved


def soup(models):
    """The uniform soup, mean_i W_i."""
    merged = dict(models[0])
    for name in float_names(models[0]):
        merged[name] = sum(model[name].double() for model in models) / len(models)
    return merged


# --- Sparse task vectors ------------------------------------------------------------
def trim(delta, density):
    """Zero all but the share `density` of one model's entries, the largest of the whole
    model by magnitude. At least one stays, and all that equal the smallest one kept: no
    order among tensors decides."""
    magnitudes_L = torch.cat([w.abs().flatten() for w in delta.values()])
    keep = max(1, round(density * len(magnitudes_L)))
    threshold = magnitudes_L.kthvalue(len(magnitudes_L) - keep + 1).values
    return {name: w * (w.abs() >= threshold) for name, w in delta.items()}


def elect_and_merge(deltas):
    """The sign of larger total magnitude wins an entry: the mean of those who have it,
    0 after a draw or if nobody moved it."""
    merged = {}
    for name in deltas[0]:
        parts = torch.stack([delta[name] for delta in deltas])      # (N, *shape)
        agrees = parts.sign() == parts.sum(0).sign()    # after a draw: zeros, if any
        voters = agrees.sum(0).clamp(min=1)             # 0 / 0 where nobody voted
        merged[name] = (parts * agrees).sum(0) / voters
    return merged


def ties(base, models, density=0.2, lam=1.0):
    """W_base + lam tau:  trim each task vector to its largest entries, elect signs,
    average those that agree.  density: of a model's entries, over all float tensors;
    the paper's, without validation data: 0.2 and lam = 1"""
    trimmed = [trim(delta, density) for delta in task_vectors(base, models)]
    return plus(base, elect_and_merge(trimmed), lam)


def drop(deltas, p, generator):
    """m delta / (1 - p): each entry stays with probability 1 - p, and the mean over
    draws is delta. Models are drawn in their order, tensors in the base's."""
    dropped = []
    for delta in deltas:
        kept = {}
        for name, w in delta.items():
            stays = torch.rand(w.shape, generator=generator, dtype=w.dtype) >= p
            kept[name] = w * stays / (1 - p)
        dropped.append(kept)
    return dropped


def dare(base, models, p=0.9, lam=None, *, generator):
    """W_base + lam sum_i delta^_i, entries dropped with probability p; its mean over
    draws is that of p = 0.  lam: None: 1 / N, the soup of the dropped models"""
    deltas = drop(task_vectors(base, models), p, generator)
    if lam is None:
        lam = 1 / len(models)
    update = {name: sum(delta[name] for delta in deltas) for name in deltas[0]}
    return plus(base, update, lam)


def dare_ties(base, models, p=0.9, lam=1.0, *, generator):
    """W_base + lam tau, where dropping takes the place of TIES' trimming.

    Not unbiased: the mean runs over those whose entry survived, so that N equal task
    vectors give delta (1 - p^N) / (1 - p) in the mean, 1.9 delta for N = 2 at p = 0.9.
    """
    dropped = drop(task_vectors(base, models), p, generator)
    return plus(base, elect_and_merge(dropped), lam)


# --- The control of self-merging ----------------------------------------------------
def noise(w, relative, generator):
    """A random direction, `relative` times as long as the tensor."""
    g = torch.randn(w.shape, generator=generator, dtype=torch.float64)
    return g * (relative * w.double().norm() / g.norm())


def noise_average(model, k, relative, generator):
    """The mean of k copies of a model, each tensor moved by `relative` times its norm
    in a random direction: in all, by about relative / sqrt(k)."""
    moves = {}
    for name in float_names(model):
        moves[name] = sum(noise(model[name], relative, generator) for _ in range(k)) / k
    return plus(model, moves)
