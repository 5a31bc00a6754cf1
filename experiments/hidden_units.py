"""Hidden units of two models, matched by their weights: the stream, the layers, the heads and MLP units.

In:    layers as {role: matrix}, and the two token embeddings.
Out:   a `Match`: which of the source's layers and units is which of the target's; kinship: the matched
       cosine beside that of strangers.
ours:  the paper transports chunks, which cannot see a permutation of hidden units. Not yet used by merge.py.
"""
import math
import operator
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize


# --- Hidden units (ours): layers, heads and neurons of two models, matched by their weights -------
# A chunk of a flattened matrix means nothing outside its own model's order of hidden units. Related
# models (pruned, grown, trained on) hold the same units in some order, and their weights tell it.
# The axes of each role's rows and columns (a vector: of its numbers); a fork adds a line. A bias
# ("q.bias") goes with its matrix's rows; "groups": keys and values, which several heads may share.
AXES = {
    "q": ("heads", "stream"), "k": ("groups", "stream"), "v": ("groups", "stream"),
    "o": ("stream", "heads"), "gate": ("units", "stream"), "up": ("units", "stream"),
    "down": ("stream", "units"), "norm": ("stream",),
    "embed": ("vocabulary", "stream"), "head": ("vocabulary", "stream")}
NEEDED = "q", "k", "v", "o", "up", "down"  # fused matrices and experts show by what they lack
SLACK = 0.3    # a cosine that is no evidence: strangers of 128 numbers reach 0.29, relatives 0.9
SAMPLE = 32    # units per layer that tell which layer is which
PLACES = 1024  # of the stream that are compared at most: a quarter of the work at 4096


class Match(NamedTuple):
    """Which of the source's layers and units is which of the target's: per index of the target the
    source's, or -1 (a layer: None) where it has none and the target keeps its own numbers."""
    layers: list                # source layer of each target layer
    units: list                 # per target layer {"units", "heads", "groups": index of rows}
    stream_J: torch.Tensor      # one order for the whole model
    vocabulary_J: torch.Tensor  # rows of the embedding
    similarity: list            # per target layer: cosine with its partner (if none: the best one)
    null: float                 # the cosine that strangers of these shapes have
    related: bool               # half of the layers that could have a partner have one

    def index(self, layer, role: str, source_shape, target_shape):
        """For `carry`: per axis of a target tensor the source's indices; None: it has no partner.
        An axis of another length than its role's (a norm inside a head) keeps its order."""
        axes = AXES.get(role.removesuffix(".bias"))
        if axes is None or (layer is not None and self.layers[layer] is None):
            return None
        known = {"stream": self.stream_J, "vocabulary": self.vocabulary_J}
        known |= {} if layer is None else self.units[layer]
        in_order = [torch.arange(n) for n in target_shape]
        in_order = [i.masked_fill(i >= n, -1) for i, n in zip(in_order, source_shape)]
        return [known[axis] if len(known.get(axis, ())) == len(i) else i
                for axis, i in zip(axes, in_order)]


def carry(source, target, index):
    """A vector or matrix of the source in the target's coordinates; one dtype, one device.
    Equation:  W~[j, l] = W_source[row(j), column(l)]; where either is -1, W_target[j, l]
    Example:   index [[1, -1], [0]]: source [[1], [2]], target [[7], [8]] -> [[2], [8]]"""
    index = index if len(index) == 1 else (index[0][:, None], index[1])  # each row, each column
    known = math.prod(i >= 0 for i in index) > 0
    return torch.where(known, source[tuple(index)], target)  # at -1 the last is read, and not used


def assign(cosine_JI, slack: float = SLACK):
    """One-to-one partners: for each target index its source index, or -1; and their cosines, or 0.
    Equation:  max over injections i of  sum_j max(cosine[j, i(j)], slack)
    Source:    ours: the assignment problem; the slack takes whoever nobody is close to. Sinkhorn
               with a slack target is slower, and no injection between strangers
    Example:   [[.9, .8], [.7, .1]] -> [1, 0], for .8 + .7 > .9 + .1; with slack .75: [0, -1]"""
    best_J, index_J = cosine_JI.max(1)
    index_J = index_J.masked_fill(best_J <= slack, -1)
    chosen = index_J[index_J >= 0]
    # Relatives end here: first choices that do not collide are the optimum, found in one pass.
    if len(chosen.unique()) < len(chosen):
        cost = cosine_JI.clamp(min=slack).double().neg_().cpu().numpy()
        rows, columns = (torch.from_numpy(of).to(index_J) for of in linear_sum_assignment(cost))
        index_J = torch.full_like(index_J, -1).index_put_((rows,), columns)
    value_J = cosine_JI.gather(1, index_J.clamp(min=0)[:, None])[:, 0]
    real_J = (index_J >= 0) & (value_J > slack)
    return index_J.masked_fill(~real_J, -1), value_J * real_J


def match_stream(embed_source_VI, embed_target_VJ):
    """The residual stream: columns of the two embeddings, by the cosine of their deviations.
    Args:      rows are the same V tokens in both; a few thousand are enough
    Returns:   (J,) the source's place of each of the target's, or -1
    ours:      tokens count alike, columns are centred: tokens never trained share one large vector
               that drifts (after 1000 steps: 128 places of 128 found; without both, 111)"""
    tokens = [normalize(embed.float(), dim=1) for embed in (embed_target_VJ, embed_source_VI)]
    target_VJ, source_VI = (normalize(token - token.mean(0), dim=0) for token in tokens)
    cosine_JI = target_VJ.T @ source_VI
    index_J = assign(cosine_JI)[0]
    if 2 * (index_J >= 0).sum() < min(cosine_JI.shape):  # strangers: kinship will say so, of all
        return assign(cosine_JI, slack=-1.0)[0]
    return index_J


def cosines(source, target, stream_J, axis: str, size: int = 1):
    """(J, I): all pairs of units of two layers {role: matrix}; of heads: blocks of `size` rows.
    Equation:  c[j, i] = mean over the matrices M with this axis of cos(M_target[j], M_source[i]),
               M[j]: row j (column, where the axis is the second) over the matched stream"""
    have = (stream_J >= 0).nonzero()[:, 0]
    have, total_JI = have[::-(-len(have) // PLACES) or 1], None
    roles = [role for role in AXES if axis in AXES[role] and role in source and role in target]
    for role in roles:
        part = []
        for layer, places in ((target, have), (source, stream_J[have])):
            rows = (layer[role] if AXES[role][0] == axis else layer[role].T)[:, places].float()
            part.append(normalize(rows.reshape(len(rows) // size, size * len(places)), dim=1))
        # in place: at 11008 units this matrix takes half a GB
        total_JI = part[0] @ part[1].T if total_JI is None else total_JI.addmm_(part[0], part[1].T)
    return total_JI.div_(len(roles))


def some_units(layers):
    """One layer that holds SAMPLE units of each of these, side by side."""
    few = {role: [] for role in ("gate", "up", "down") if role in layers[0]}
    for layer in layers:
        some = torch.linspace(0, len(layer["up"]) - 1, SAMPLE).long()
        for role, parts in few.items():
            parts.append(layer[role].index_select(AXES[role].index("units"), some))
    return {role: torch.cat(parts, AXES[role].index("units")) for role, parts in few.items()}


def kinship(source, target, stream_J, seed: int = 0):
    """How alike is every pair of layers, (source, target), and how alike would strangers be?
    Equation:  similarity[i, j] = mean over SAMPLE units of one layer of their best cosine in the
               other; null = the same with each unit of the other shuffled by itself, all pairs
    ours:      units of the model that has fewer, since only they can all have a partner"""
    fewer = len(source[0]["up"]) < len(target[0]["up"])
    few, many = (source, target) if fewer else (target, source)
    sample, best, generator = some_units(few), [], np.random.default_rng(seed)
    for layer in many:
        shared = {role: layer[role].float().numpy() for role in sample if role in layer}
        shuffled = {role: torch.from_numpy(generator.permuted(of, axis=AXES[role].index("stream")))
                    for role, of in shared.items()}
        for other in (layer, shuffled):
            pair = (sample, other) if fewer else (other, sample)
            best.append(cosines(*pair, stream_J, "units").amax(0 if fewer else 1))
    similarity, null = torch.stack(best).view(-1, 2, len(few), SAMPLE).mean(3).unbind(1)
    return similarity.T if fewer else similarity, null.mean().item()


def match_layers(similarity_IJ, slack: float = SLACK) -> list[int | None]:
    """The monotone pairing of layers with the largest total similarity beyond the slack.
    Equation:  best[i, j] = max(best[i-1, j], best[i, j-1], best[i-1, j-1] + similarity - slack)
    Returns:   the source layer of each target layer, or None"""
    best = [(0.0, {})] * (similarity_IJ.shape[1] + 1)  # (total, {target: source}) of a row of i
    for i, gain_J in enumerate((similarity_IJ.double() - slack).tolist()):
        above, best = best, best[:1]
        for j, gain in enumerate(gain_J):
            pair = above[j][0] + gain, above[j][1] | {j: i}
            best.append(max(above[j + 1], best[j], pair, key=operator.itemgetter(0)))
    return [best[-1][1].get(j) for j in range(similarity_IJ.shape[1])]


def match_heads(source, target, stream_J, size: int, slack: float = SLACK):
    """Heads as blocks of `size` rows. Where several share keys and values, groups are matched, and
    in every pair of groups its heads first. Returns (mean cosine, heads' rows, groups' rows)."""
    head, group = (cosines(source, target, stream_J, axis, size) for axis in ("heads", "groups"))
    t, s = (a // b for a, b in zip(head.shape, group.shape))  # heads per group
    inner = {}
    for j, i in np.ndindex(*group.shape):
        block, value = assign(head[j * t:(j + 1) * t, i * s:(i + 1) * s], slack)
        inner[j, i] = torch.where(block >= 0, block + i * s, -1)
        group[j, i] = (group[j, i] + value.sum()) / (1 + min(t, s))  # each the mean of two cosines
    groups, value = assign(group, slack)
    heads = [inner.get(pair, torch.full((t,), -1)) for pair in enumerate(groups.tolist())]
    rows = [torch.where(of[:, None] >= 0, of[:, None] * size + torch.arange(size), -1).flatten()
            for of in (torch.cat(heads), groups)]
    return value.sum().item() / min(group.shape), *rows


def match_units(source, target, stream_J, size: int | None = None, slack: float = SLACK):
    """Units and heads of one pair of layers: {"units", "heads", "groups": index of rows}.
    size: rows of a head; None: unknown, the largest that matches about as well as units do."""
    units, value = assign(cosines(source, target, stream_J, "units"), slack)
    shared = math.gcd(*(len(layer[role]) for layer in (source, target) for role in "qk"))
    if size and shared % size:
        raise ValueError(f"heads of {size} rows do not divide projections of {shared} rows")
    least = max(8, len(source["k"]) // 64, len(target["k"]) // 64)  # more groups take seconds
    sizes = [n for n in range(256, least - 1, -1) if shared % n == 0] or [shared]
    best = (-1.0,)
    for n in [size] if size else sizes:
        found = match_heads(source, target, stream_J, n, slack)
        best = max(best, found, key=operator.itemgetter(0))
        if best[0] > 0.9 * value[units >= 0].mean():
            break
    return {"units": units, "heads": best[1], "groups": best[2]}


def match_models(source, target, embed_source_VI, embed_target_VJ, vocabulary_J, size=None, seed=0):
    """From weights alone: the stream, kinship, layers, and the units of each pair of layers.
    Args:      source, target: sequences of layers {role: matrix (out, in)}; one that reads when it
               is indexed keeps memory to a pair. Embeddings: the same tokens, row by row
    Raises:    ValueError where a layer lacks a role of NEEDED"""
    for which, layers in (("source", source), ("target", target)):
        if lacking := [role for role in NEEDED if role not in layers[0]]:
            raise ValueError(f"a {which} layer has no matrix of its own for {', '.join(lacking)}")
    stream_J = match_stream(embed_source_VI, embed_target_VJ)
    similarity_IJ, null = kinship(source, target, stream_J, seed)
    slack = max(SLACK, 2 * null)
    layers, units, similarity = match_layers(similarity_IJ, slack), [], []
    for j, i in enumerate(layers):
        units.append(i if i is None else match_units(source[i], target[j], stream_J, size, slack))
        similarity.append(similarity_IJ[slice(None) if i is None else i, j].max().item())
    related = 2 * (len(layers) - layers.count(None)) >= min(similarity_IJ.shape)
    return Match(layers, units, stream_J, vocabulary_J, similarity, null, related)
