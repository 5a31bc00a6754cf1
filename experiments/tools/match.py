"""match.py: relatives of another shape, or of another order, made mergeable.

    python experiments/tools/match.py TARGET SOURCE                 # are they related?
    python experiments/tools/match.py TARGET SOURCE -o OUT          # then write SOURCE
    python experiments/tools/match.py TARGET BASE EXPERT -o FOLDER  # one match for both

A chunk of a flattened matrix means nothing outside its own model's order of hidden
units. Shuffle the neurons of an MLP, the heads of an attention, the positions of the
residual stream: the model computes the same function, and yet its weights, read as they
stand, have nothing in common with what they were. A pruned or a grown model is shuffled
in this sense, too: behind each missing neuron everything has moved. So, before chunks
are encoded or weights are averaged, somebody must say which unit is which. Of relatives
(one was made from the other, or both from a third) the weights say it, since they still
resemble each other. Between strangers there is nothing to say.

    match    weights -> which layer, neuron and head of the source is which of the target
               match_stream     the order of the residual stream, from the embeddings
               compare_layers   how alike are two layers, and how alike are strangers?
               match_layers     the best source layer of each target layer: the verdict
               match_units      neurons and heads of each pair of layers
    write    the source's numbers in the target's order, shapes, names and dtypes
               plan_tensors     which tensor is brought, with which rows and columns
               read_matched     its rows; where nobody is a partner, the target's own

What is written merges with the target by merge.py, or by any other tool.

Paper: Sec. 3.3 merges across shapes by chunks alone. ours: weights are matched first, of
       relatives only. To find one order of units from another is known for equal shapes
       (Ainsworth et al. 2022, "Git Re-Basin"). Here either side may have more units, and
       layers may be missing, repeat, or stand in another order.
Not here: mixtures of experts and fused projections (refused by name); vision towers (they
       stay the target's); another order of the numbers within a head; activations.
"""
if __name__ == "__main__":      # Ctrl-C during the imports: end without a traceback
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import scipy.sparse
import torch
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch.nn.functional import normalize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from align import pair_names, pair_stacks, stacks_of
from chunking import (PIECE, Checkpoint, Parser, appear, cast, check_output, command,
                      create, measure, need, say, spans)
from merge import RELATED, companions, equal, mean_cosine

VERSION = 1             # of the report

# All that is known of architectures: the axes of each role's rows and columns.
#   stream    the residual stream, which all layers share: one order for a whole model
#   neurons   of the MLP
#   heads     rows of the query heads
#   groups    rows of the key and value heads; several query heads may share one
AXES = {
    "q": ("heads", "stream"), "k": ("groups", "stream"), "v": ("groups", "stream"),
    "o": ("stream", "heads"),
    "gate": ("neurons", "stream"), "up": ("neurons", "stream"),
    "down": ("stream", "neurons")}
NEEDED = ("q", "k", "v", "o", "up", "down")     # an MLP without a gate is fine
# A norm scales the stream, unless its name says otherwise.
NORM_AXES = [("heads", r"q_(layer_?)?norm|attn_sub_norm"),
             ("groups", r"k_(layer_?)?norm"),
             ("neurons", r"ffn_sub_norm")]

# A cosine up to this is no evidence. Among the models of experiments/models the best
# partner of a neuron has at most 0.33 between strangers, at least 0.94 between relatives.
SLACK = 0.3
# Neurons of a layer that tell which layer is which: their mean is right to 0.01.
SAMPLE = 32
# Tokens of the vocabulary that tell which position of the stream is which.
TOKENS = 4096
# Positions of the stream at which units are compared. From three matrices a neuron then
# has 768 numbers. The cosines of strangers have a spread of 1 / sqrt(768) = 0.036: among
# all pairs of 14,336 neurons the largest is 0.2.
POSITIONS = 256
# Rows of a head that come into question, the largest first.
HEAD_SIZES = range(256, 7, -1)
# Neurons that are compared with all others at a time: 59 MB for 14,336 others.
BLOCK = 1024
OTHER = "match models whose q, k, v, o, up and down are matrices of their own"


def quiet(things, label):
    """The progress bar of a library function: none."""
    return things


# === Match ============================================================================
# --- What a model is, for matching ----------------------------------------------------
class Layers:
    """The numbered layers of a checkpoint, with their matrices by role.

    numbers    of the layers, as they stand in the names
    entries    {number: {role: Entry}}, the matrices that have a line in AXES
    named      {number: {(rest of the name, role): name}}, all tensors of the layers
    stream     width of the residual stream
    embedding  the Entry of the embedding of words
    tied       names of the tensors that equal it, itself among them
    Raises:    CheckpointError, by file and tensor, for what cannot be matched
    """

    def __init__(self, checkpoint, stack):
        self.checkpoint = checkpoint
        self.stack = stack
        self.named = stacks_of(places_of(checkpoint))[stack]
        self.numbers = sorted(self.named)
        self.entries = {}
        for number in self.numbers:
            entries = [checkpoint.entries[name] for name in self.named[number].values()]
            self.entries[number] = matrices_by_role(checkpoint, number, entries)
        self.stream = self.entries[self.numbers[0]]["q"].shape[1]
        self.embedding = word_embedding(checkpoint, self.stream)
        self.tied = []
        for name, entry in checkpoint.entries.items():
            outside = entry.place.layer is None
            if outside and equal(checkpoint, name, checkpoint, self.embedding.name):
                self.tied.append(name)
        check_shapes(self)

    def __len__(self): return len(self.numbers)

    def sizes(self, number):
        """{axis: its length} in a layer."""
        entries = self.entries[number]
        return {"stream": self.stream, "neurons": entries["up"].shape[0],
                "heads": entries["q"].shape[0], "groups": entries["k"].shape[0]}

    def rows(self, number, axis):
        """{role: matrix} of a layer, with this axis as rows and the stream as columns.
        Example:  of the neurons: gate, up, and the transpose of down"""
        found = {}
        for role, entry in self.entries[number].items():
            if AXES[role][0] == axis:
                found[role] = self.checkpoint.read_tensor(entry.name)
            elif AXES[role][1] == axis:
                found[role] = self.checkpoint.read_tensor(entry.name).T
        return found


def places_of(checkpoint):
    """{name: Place}, as the functions of align.py that pair names ask for it."""
    return {name: entry.place for name, entry in checkpoint.entries.items()}


def role_of(entry):
    """The role of a weight, or of the bias that goes with it: 'q.bias' -> 'q'."""
    return entry.place.role.removesuffix(".bias")


def matrices_by_role(checkpoint, number, entries):
    """{role: Entry} of the matrices that AXES knows, among the entries of one layer."""
    found = {}
    for entry in entries:
        role = entry.place.role
        if role in AXES and entry.is_float and len(entry.shape) == 2:
            need(role not in found, entry.file, f"is the second {role} of its layer",
                 OTHER, entry.name)
            found[role] = entry
    lacking = [role for role in NEEDED if role not in found]
    if lacking:
        # If some tensor holds what is lacking, it is the one to name.
        for entry in entries:
            role, _, mark = entry.place.role.partition(".")
            fused = role in ("qkv", "gate_up")
            several = role in AXES and mark not in ("", "bias")
            need(not fused, entry.file, "is a fused projection", OTHER, entry.name)
            need(not several, entry.file, "is one of several in its layer (experts, or "
                 "cross-attention)", OTHER, entry.name)
    need(not lacking, checkpoint.path, f"layer {number} has no matrix for "
         f"{', '.join(lacking)}", OTHER)
    return found


def word_embedding(checkpoint, stream):
    """The Entry of the largest embedding: that of words, not of positions. It must be as
    wide as the stream: through a projection between them no order can be followed."""
    found = []
    for entry in checkpoint.entries.values():
        outside = entry.place.layer is None
        if outside and entry.place.role == "embed" and entry.is_float:
            found.append(entry)
    need(found, checkpoint.path, "has no embedding, which would tell the order of the "
         "residual stream", OTHER)
    largest = max(found, key=lambda entry: entry.numel)
    matrix = len(largest.shape) == 2 and largest.numel > 0
    need(matrix, largest.file, f"is an embedding of shape {largest.shape}", OTHER,
         largest.name)
    need(largest.shape[1] == stream, largest.file, f"is {largest.shape[1]} wide, but the "
         f"residual stream {stream}", OTHER, largest.name)
    return largest


def check_shapes(layers):
    """Refuse matrices that do not fit together, before any of them is read."""
    for number, entries in layers.entries.items():
        sizes = layers.sizes(number)
        for role, entry in entries.items():
            row, column = AXES[role]
            expected = (sizes[row], sizes[column])
            need(entry.shape == expected and entry.numel > 0, entry.file,
                 f"has shape {entry.shape}; {expected} would go with its layer", OTHER,
                 entry.name)
        need(sizes["heads"] % sizes["groups"] == 0, entries["k"].file, f"its rows cannot "
             f"be shared by {sizes['heads']} rows of q", OTHER, entries["k"].name)


def open_layers(target, source):
    """(target Layers, source Layers) of two Checkpoints. Of the stacks of layers that pair
    by name, it is the one that holds the most weights of the target."""
    pairs = pair_stacks(stacks_of(places_of(target)), stacks_of(places_of(source)))
    need(pairs, source.path, "has no layers that pair by name with those of "
         f"{target.path}", OTHER)
    weights = dict.fromkeys(pairs, 0)
    for entry in target.entries.values():
        if entry.place.stack in pairs:
            weights[entry.place.stack] += entry.numel
    stack = max(weights, key=weights.get)
    return Layers(target, stack), Layers(source, pairs[stack])


def check_finite(layers, progress=quiet):
    """Refuse NaN and Inf in whatever may be compared or brought: a cosine with them is
    NaN, and so no evidence of anything. What is only copied need not be finite (GPT-NeoX
    keeps a mask of -inf)."""
    checkpoint = layers.checkpoint
    for entry in progress(list(checkpoint.entries.values()), "check"):
        inside = entry.place.stack in ("", layers.stack)
        known = role_of(entry) in (*AXES, "norm", "embed", "head")
        if inside and known and entry.is_float:
            measure(checkpoint, entry.name)     # raises, and names file and tensor


# --- Cosines, and one-to-one partners -------------------------------------------------
class Positions(NamedTuple):
    """Where on the residual stream two models are compared: the p-th position of the one
    is the p-th of the other."""
    target: torch.Tensor        # (P,)
    source: torch.Tensor        # (P,)


def unit_vectors(rows, positions_P, roles, size=1):
    """A vector of length 1 for each unit (a neuron, a head). The product of two of them is
    the mean of their cosines, matrix by matrix.

    Equation:  u_n . v_m = mean over roles of cos(rows of unit n, rows of unit m)
    Args:      rows         {role: (N size, stream)}, as Layers.rows gives it
               positions_P  of the stream: these columns are compared
               roles        that both sides have
               size         rows of a unit: 1 for a neuron, more for a head
    Returns:   (N, U) float32, with U = roles size P
    ours:      each matrix counts alike, however large its weights are
    """
    parts = []
    for role in roles:
        part = rows[role][:, positions_P].float()           # (N size, P)
        part = part.reshape(len(part) // size, -1)          # (N, size P)
        parts.append(normalize(part, dim=1))                # a unit of zeros stays zero
    return torch.cat(parts, dim=1) / math.sqrt(len(roles))


def keep_above(cosine_JI, slack):
    """The cosines above the slack, as a sparse matrix. All others are no evidence, and
    what they are does not matter."""
    j, i = (cosine_JI > slack).nonzero(as_tuple=True)
    return scipy.sparse.csr_matrix((cosine_JI[j, i], (j, i)), cosine_JI.shape)


def strong_cosines(unit_JU, unit_IU, slack):
    """`keep_above` of the cosines of all pairs, block by block: of 14,336 neurons with as
    many they would take 0.8 GB, and a few per row remain."""
    parts = []
    for start in range(0, len(unit_JU), BLOCK):
        cosine_BI = unit_JU[start:start + BLOCK] @ unit_IU.T        # (BLOCK, I)
        parts.append(keep_above(cosine_BI, slack))
    return scipy.sparse.vstack(parts, format="csr")                 # (J, I)


def assign(strong_JI, slack):
    """One-to-one partners.

    Equation:  max over injections i of  sum_j max(cosine[j, i(j)], slack)
    Args:      strong_JI   the cosines above the slack, as keep_above gives them
    Returns:   (J,): the source's index of each of the target's, or -1
    ours:      an assignment and not the transport of Eq. 2, which would blend units: it
               is exact, and fast where few pairs come into question (14,336: 0.7 s)
    Example:   cosines [[.9, .8], [.7, .1]]
               slack .3:   [1, 0], as .8 + .7 is more than .9 + .3
               slack .75:  [0, -1], as .9 + .75 is more than .8 + .75
    """
    J, I = strong_JI.shape
    # Each j may also stay alone, at the price of the slack: a column of its own stands
    # for that. So there always is an assignment of all j.
    alone_JJ = slack * scipy.sparse.identity(J)
    cost = scipy.sparse.hstack([strong_JI, alone_JJ], format="csr")     # (J, I + J)
    cost.data = 2 - cost.data       # the solver minimises, and takes 0 for no pair
    _, column_J = min_weight_full_bipartite_matching(cost)
    index_J = torch.from_numpy(column_J).long()
    return index_J.masked_fill(index_J >= I, -1)


# --- The residual stream --------------------------------------------------------------
def match_stream(embedding_VJ, embedding_VI):
    """The order of the residual stream: tokens are the same in both models, so what a
    position holds of them tells which it is.

    Args:      embeddings of the same V tokens, the target's and the source's
    Returns:   (J,): the source's position of each of the target's, or -1
    ours:      cosines of columns, after every token has got length 1 and every column
               mean 0. Tokens that were never trained share one large vector, which
               drifts: with these two steps 128 of 128 positions are found, without 111
    """
    columns = []
    for embedding in (embedding_VJ, embedding_VI):
        token = normalize(embedding.float(), dim=1)
        columns.append(normalize(token - token.mean(0), dim=0))
    target_VJ, source_VI = columns
    return assign(strong_cosines(target_VJ.T, source_VI.T, SLACK), SLACK)


def some_tokens(layers, vocabulary):
    """(V, stream): at most TOKENS rows of the embedding, evenly spread over the first
    `vocabulary` ones, read one by one."""
    width = layers.stream
    tokens = []
    for row in range(0, vocabulary, -(-vocabulary // TOKENS)):
        begin = row * width
        token = layers.checkpoint.read(layers.embedding.name, begin, begin + width)
        tokens.append(token)
    return torch.stack(tokens)


# --- Layers, and the verdict ----------------------------------------------------------
def compare_layers(target, source, positions, seed=0, progress=quiet):
    """How alike is every layer of the target to every layer of the source?

    Equation:  similarity[j, i] = mean over SAMPLE neurons of the one layer of their best
                                  cosine with a neuron of the other
               null             = the same of shuffled neurons, each in an order of its
                                  own: what strangers of these shapes have
    Returns:   similarity_JI, and null, the mean over all pairs of layers
    ours:      the best of many cosines grows with their number, and is never 0. So it is
               held against that of strangers. The sample is of the model with fewer
               neurons: there each one can have a partner
    """
    if target.sizes(target.numbers[0])["neurons"] <= (
            source.sizes(source.numbers[0])["neurons"]):
        return best_cosines(target, source, positions.target, positions.source, seed,
                            progress)
    similarity_IJ, null = best_cosines(source, target, positions.source,
                                       positions.target, seed, progress)
    return similarity_IJ.T, null


def best_cosines(fewer, more, positions_fewer, positions_more, seed, progress):
    """(similarity_FM, null): F layers of the model with fewer neurons, M of the other."""
    roles = []
    for role in ("gate", "up", "down"):
        entries = [*fewer.entries.values(), *more.entries.values()]
        if all(role in found for found in entries):
            roles.append(role)
    real = sample_neurons(fewer, positions_fewer, roles)
    generator = torch.Generator().manual_seed(seed)
    shuffled = {}
    for role in roles:
        order = torch.rand(real[role].shape, generator=generator).argsort(1)
        shuffled[role] = real[role].gather(1, order)        # each row by itself
    every = torch.arange(len(positions_fewer))
    real_NU = unit_vectors(real, every, roles)              # N = F SAMPLE
    shuffled_NU = unit_vectors(shuffled, every, roles)

    similarity_FM = torch.zeros(len(fewer), len(more))
    null_FM = torch.zeros(len(fewer), len(more))
    for m, number in enumerate(progress(more.numbers, "compare layers")):
        unit_KU = unit_vectors(more.rows(number, "neurons"), positions_more, roles)
        best_N = (real_NU @ unit_KU.T).amax(1)
        similarity_FM[:, m] = best_N.view(len(fewer), SAMPLE).mean(1)
        best_N = (shuffled_NU @ unit_KU.T).amax(1)
        null_FM[:, m] = best_N.view(len(fewer), SAMPLE).mean(1)
    return similarity_FM, null_FM.mean().item()


def sample_neurons(layers, positions_P, roles):
    """{role: (layers SAMPLE, P)}: some neurons of each layer, evenly spread."""
    found = {role: [] for role in roles}
    for number in layers.numbers:
        rows = layers.rows(number, "neurons")
        some = torch.linspace(0, len(rows["up"]) - 1, SAMPLE).long()
        for role in roles:
            found[role].append(rows[role][some][:, positions_P].float())
    return {role: torch.cat(parts) for role, parts in found.items()}


def match_layers(similarity_JI, slack):
    """The most similar source layer of each target layer, or None if it is not above the
    slack. Layers may repeat and stand in any order: models are made by stacking, too.
    Example:   [[.9, .1], [.1, .8], [.9, .1], [.2, .1]], slack .3: [0, 1, 0, None]"""
    layers = []
    for row_I in similarity_JI:
        i = row_I.argmax().item()
        if row_I[i] <= slack:
            i = None
        layers.append(i)
    return layers


class Kinship(NamedTuple):
    """Whether two models are related, and how layers and stream of the one stand in the
    other."""
    related: bool               # half of the layers that could have a partner have one
    layers: dict                # {number of a target layer: of its source layer, or None}
    similarity: list            # per target layer: cosine with its partner, or the best
    null: float                 # the cosine that strangers of these shapes have
    slack: float                # a cosine up to this is no evidence
    stream_J: torch.Tensor      # the source's position of each of the target's, or -1
    same_tokens: bool           # both embeddings are of the same tokens
    similarity_JI: torch.Tensor     # of every pair of layers


def find_kinship(target, source, seed=0, progress=quiet, first=None):
    """The Kinship of two models, from weights alone.

    Args:     target, source: Layers
              first   the Kinship of another source, whose order is this one's, too: then
                      only the cosines are measured
    ours:     where embeddings show no order (half of the positions find nobody), the
              stream is compared as it stands. So a relative with a new vocabulary is
              found, and strangers are strangers in any order
    """
    if first:
        stream_J = first.stream_J
        same_tokens = first.same_tokens
    else:
        vocabulary = min(target.embedding.shape[0], source.embedding.shape[0])
        stream_J = match_stream(some_tokens(target, vocabulary),
                                some_tokens(source, vocabulary))
        met = (stream_J >= 0).sum().item()
        same_tokens = met >= min(target.stream, source.stream) / 2
        if not same_tokens:
            stream_J = common_index(target.stream, source.stream)

    positions = compared_positions(stream_J)
    similarity_JI, null = compare_layers(target, source, positions, seed, progress)
    slack = max(SLACK, 2 * null)
    if first:
        layers = first.layers
    else:
        layers = {}
        for number, i in zip(target.numbers, match_layers(similarity_JI, slack)):
            layers[number] = None
            if i is not None:
                layers[number] = source.numbers[i]

    similarity = []
    met = 0
    for row_I, partner in zip(similarity_JI, layers.values()):
        value = row_I.max().item()
        if partner is not None:
            value = row_I[source.numbers.index(partner)].item()
            met += value > slack
        similarity.append(value)
    related = met >= min(len(target), len(source)) / 2
    return Kinship(related, layers, similarity, null, slack, stream_J, same_tokens,
                   similarity_JI)


def compared_positions(stream_J):
    """At most POSITIONS of those that have a partner, evenly spread."""
    known = (stream_J >= 0).nonzero()[:, 0]
    some = torch.linspace(0, len(known) - 1, min(len(known), POSITIONS)).long()
    return Positions(known[some], stream_J[known[some]])


def common_index(J, I):
    """(J,): the same index as far as the source goes, then -1.
    Example:   J = 3, I = 2: [0, 1, -1]"""
    index_J = torch.arange(J)
    return index_J.masked_fill(index_J >= I, -1)


# --- Neurons and heads of a pair of layers --------------------------------------------
def match_neurons(target_rows, source_rows, positions, slack):
    """(J,): the source's neuron of each of the target's, or -1.
    Args:      {role: rows} of both layers, as Layers.rows gives them"""
    roles = [role for role in target_rows if role in source_rows]
    unit_JU = unit_vectors(target_rows, positions.target, roles)
    unit_IU = unit_vectors(source_rows, positions.source, roles)
    return assign(strong_cosines(unit_JU, unit_IU, slack), slack)


def match_heads(target_rows, source_rows, positions, size, slack):
    """Partners of heads, if a head has `size` rows. First groups, by their keys, values
    and heads; then heads within a pair of groups, as they read the keys of their group.

    Args:      {"heads": {role: rows}, "groups": {role: rows}} of both layers
    Returns:   {"heads": index of rows, "groups": index of rows}, -1 for none; and the
               mean score of the groups
    Example:   size 2; of two heads the source's second is the target's first, and the
               other way round: rows [2, 3, 0, 1]
    """
    cosine_of = {}
    for axis in ("heads", "groups"):
        roles = list(target_rows[axis])
        unit_JU = unit_vectors(target_rows[axis], positions.target, roles, size)
        unit_IU = unit_vectors(source_rows[axis], positions.source, roles, size)
        cosine_of[axis] = unit_JU @ unit_IU.T
    J, I = cosine_of["groups"].shape
    H = cosine_of["heads"].shape[0] // J        # heads that share a group of the target
    K = cosine_of["heads"].shape[1] // I        # and of the source
    head_JHIK = cosine_of["heads"].view(J, H, I, K)

    # Each head's best partner in the other group, on average over the heads. On the side
    # with fewer heads, where all can have a partner, it is the larger number.
    by_target_JI = head_JHIK.amax(3).mean(1)
    by_source_JI = head_JHIK.amax(1).mean(2)
    by_heads_JI = torch.maximum(by_target_JI, by_source_JI)
    score_JI = (cosine_of["groups"] + by_heads_JI) / 2
    group_J = assign(keep_above(score_JI, slack), slack)

    head_JH = torch.full((J, H), -1)
    total = 0.0
    for j, i in enumerate(group_J.tolist()):
        if i >= 0:
            inner_H = assign(keep_above(head_JHIK[j, :, i], slack), slack)
            head_JH[j] = torch.where(inner_H >= 0, i * K + inner_H, -1)
            total += score_JI[j, i].item()
    rows = {"heads": blocks(head_JH.flatten(), size), "groups": blocks(group_J, size)}
    return rows, total / min(J, I)


def blocks(index, size):
    """The rows of whole heads.
    Example:   heads [1, -1, 0] of size 2: rows [2, 3, -1, -1, 0, 1]"""
    rows = index[:, None] * size + torch.arange(size)               # (heads, size)
    return rows.masked_fill(index[:, None] < 0, -1).flatten()


def match_attention(target_rows, source_rows, positions, slack):
    """`match_heads` for the size that a head has. No weights file says it: it is the
    largest that matches about as well as the best. A smaller one would cut heads apart;
    a larger one takes two for one, and they match only where they stand together."""
    lengths = []
    for side in (target_rows, source_rows):
        lengths += [len(side["heads"]["q"]), len(side["groups"]["k"])]
    shared = math.gcd(*lengths)
    sizes = [size for size in HEAD_SIZES if shared % size == 0] or [shared]
    tried = []
    for size in sizes:
        tried.append(match_heads(target_rows, source_rows, positions, size, slack))
    best = max(value for _, value in tried)
    for rows, value in tried:               # the largest size first
        if value >= 0.99 * best:
            return rows


def match_units(target, source, kinship, progress=quiet):
    """Neurons, heads and groups of every pair of layers.

    Returns:   {number of a target layer: {axis: index of rows, -1 for none}}, without
               the layers that have no partner
    Memory:    that of a pair of layers
    """
    positions = compared_positions(kinship.stream_J)
    units = {}
    for mine, theirs in progress(list(kinship.layers.items()), "match units"):
        if theirs is None:
            continue
        neurons = match_neurons(target.rows(mine, "neurons"),
                                source.rows(theirs, "neurons"), positions, kinship.slack)
        here = {axis: target.rows(mine, axis) for axis in ("heads", "groups")}
        there = {axis: source.rows(theirs, axis) for axis in ("heads", "groups")}
        rows = match_attention(here, there, positions, kinship.slack)
        units[mine] = {"neurons": neurons, **rows}
    return units


# === Write ============================================================================
# --- Which tensor, with which rows and columns ----------------------------------------
class Brought(NamedTuple):
    """How a tensor of the target is read from the source. Both are matrices here; what is
    a vector is a matrix of one row.
    Equation:  W~[j, k] = W_source[row[j], column[k]], where neither is -1"""
    source: str                 # its name there
    width: int                  # its columns there
    row_J: torch.Tensor
    column_K: torch.Tensor

    @property
    def whole(self):
        """Nothing in it is the target's own."""
        return bool((self.row_J >= 0).all() and (self.column_K >= 0).all())


def pair_tensors(target, source, layers):
    """{target name: source name}, with layers paired as they were matched: `layers` of a
    Kinship. Other stacks (a vision tower) were not matched, and meet nobody."""
    def partners_of(target_stack, source_stack):
        if target_stack != target.named:
            return {}
        return {mine: theirs for mine, theirs in layers.items() if theirs is not None}

    pairs = pair_names(places_of(target.checkpoint), places_of(source.checkpoint),
                       partners_of)
    for name in target.tied:            # the embedding, and a head that repeats it
        pairs[name] = source.embedding.name
    return pairs


def axes_of(entry, layers):
    """What a tensor's rows and columns stand for, by its role. None: nobody knows.

    Returns:  a tuple of axes: those of AXES; tokens, the vocabulary; fixed, what stands
              in one order in every model (positions, classes, the numbers in a head)
    Example:  q_proj.weight -> (heads, stream);  q_proj.bias -> (heads,)
              embed_tokens.weight -> (tokens, stream);  input_layernorm -> (stream,)
    """
    role = role_of(entry)
    shape = entry.shape
    sizes = {"stream": layers.stream, "tokens": layers.embedding.shape[0]}
    inside = entry.place.layer is not None
    if inside:
        sizes |= layers.sizes(entry.place.layer)

    if entry.name in layers.tied:
        axes = ("tokens", "stream")
    elif role == "norm":
        shape = (entry.numel,)          # some are stored as (heads, numbers in a head)
        axes = (norm_axis(entry, sizes),)
    elif role in AXES and inside:
        axes = AXES[role]
    elif role in ("embed", "head") and shape[0] == sizes["tokens"]:
        axes = ("tokens", "stream")
    elif role in ("embed", "head"):
        axes = ("fixed", "stream")
    else:
        return None
    axes = axes[:len(shape)]            # a bias goes with its matrix's rows
    for axis, length in zip(axes, shape):
        if sizes.get(axis, length) != length:
            return None
    return axes


def norm_axis(entry, sizes):
    """What a norm scales. A norm of queries or keys may hold the gains of one head, which
    all heads share."""
    for axis, pattern in NORM_AXES:
        if re.search(pattern, entry.place.rest) and axis in sizes:
            if axis != "neurons" and entry.numel != sizes[axis]:
                return "fixed"
            return axis
    return "stream"


def plan_tensors(target, source, kinship, units):
    """What happens to each tensor of the target.

    Args:     target, source: Layers. The source was matched, with these results of
              find_kinship and match_units, or stands in the order of one that was
    Returns:  {name: Brought}; and {name: why it stays as it is} for all others
    ours:     norms are brought where widths are equal. The gains of a grown model differ
              by a factor, since its mean square is over more numbers
    """
    pairs = pair_tensors(target, source, kinship.layers)
    brought = {}
    own = {}
    for name, entry in target.checkpoint.entries.items():
        other = source.checkpoint.entries.get(pairs.get(name))
        if other is None or not (entry.is_float and other.is_float):
            own[name] = "without a partner"
            continue
        axes = axes_of(entry, target)
        if axes is None or axes != axes_of(other, source):
            own[name] = "of unknown order"
        elif role_of(entry) == "norm" and entry.shape != other.shape:
            own[name] = "norms of another width"
        elif axes[0] == "fixed" and entry.shape[0] != other.shape[0]:
            own[name] = "of another number of rows"
        elif axes[0] == "tokens" and not kinship.same_tokens:
            own[name] = "of another vocabulary"
        else:
            index = {"stream": kinship.stream_J, **units.get(entry.place.layer, {})}
            brought[name] = order_of(entry, other, axes, index)
    return brought, own


def order_of(entry, other, axes, index):
    """The Brought of one tensor. index: {axis: the source's index of each of the
    target's}; an axis that is not in it (tokens) is the same in both, as far as it goes."""
    if len(axes) == 1:
        one_row = torch.zeros(1, dtype=torch.long)
        column_K = index.get(axes[0], common_index(entry.numel, other.numel))
        return Brought(other.name, other.numel, one_row, column_K)
    row_J = index.get(axes[0], common_index(entry.shape[0], other.shape[0]))
    column_K = index[axes[1]]
    return Brought(other.name, other.shape[1], row_J, column_K)


# --- Reading and writing, in pieces of rows -------------------------------------------
def read_matched(target, source, name, brought, start, stop):
    """Rows [start, stop) of a tensor of the target, with the source's numbers where row
    and column have a partner.

    Args:     target, source: Checkpoints; brought: of this tensor
    Returns:  (stop - start, K) float64, in which every stored float is exact
    Example:  row [1, -1], column [0, -1]; source [[1], [2]], target [[7, 8], [4, 5]]:
              [[2, 8], [4, 5]]
    """
    K = len(brought.column_K)
    width = brought.width
    row_J = brought.row_J[start:stop]
    rows_JK = target.read(name, start * K, stop * K).double().view(-1, K)   # its own
    j_R = (row_J >= 0).nonzero()[:, 0]                  # rows that have a partner
    k_S = (brought.column_K >= 0).nonzero()[:, 0]       # columns that have one
    rows = []
    for i in row_J[j_R].tolist():
        rows.append(source.read(brought.source, i * width, (i + 1) * width))
    if rows:
        theirs_RS = torch.stack(rows)[:, brought.column_K[k_S]]
        rows_JK[j_R[:, None], k_S] = theirs_RS.double()
    return rows_JK


def write_matched(output, target, source, brought, progress=quiet):
    """Fill an Output that has the target's entries: with what is brought (the names in
    `brought`), and with the target's own. target, source: Checkpoints."""
    for name, entry in progress(list(target.entries.items()), "write"):
        if name not in brought:
            for start, stop in spans(entry.numel):
                output.put(name, start, target.read(name, start, stop))
            continue
        J = len(brought[name].row_J)
        K = len(brought[name].column_K)
        for start, stop in spans(J, max(1, PIECE // K)):
            rows_JK = read_matched(target, source, name, brought[name], start, stop)
            output.put(name, start * K, cast(rows_JK.view(-1), entry))


# --- Several sources by one match -----------------------------------------------------
def check_same_order(first, other, first_brought, other_brought, force):
    """Refuse a further source whose units do not stand as the first one's do: by the
    first one's match its numbers would come into disorder.

    Args:     first, other: Layers; what is brought of both, as plan_tensors says
              force   look at the shapes only
    """
    one = first.checkpoint
    two = other.checkpoint
    alone = f"match it by itself: the order of {one.path} says nothing of it"
    for name in first_brought:
        if name not in other_brought:
            continue
        mine = one.entries[first_brought[name].source]
        theirs = two.entries[other_brought[name].source]
        need(mine.shape == theirs.shape, theirs.file, f"has shape {theirs.shape}, where "
             f"{one.path} has {mine.shape}", alone, theirs.name)
        if role_of(mine) in AXES and not force:
            value = mean_cosine(one, two, [(mine.name, theirs.name)])
            need(not value <= RELATED, theirs.file, "does not stand in the "
                 f"order of {one.path}", alone, theirs.name)


# === The command ======================================================================
def stem(path):
    """A model's name: that of its file or folder, without an ending."""
    name = os.path.basename(os.path.normpath(path))
    return name.removesuffix(".index.json").removesuffix(".safetensors")


def parse(argv):
    """The arguments; what the command line alone decides is refused here."""
    parser = Parser(prog="match.py", description="Bring relatives of "
                    "another shape, or another order of hidden units, to the target.")
    add = parser.add_argument
    add("target", metavar="TARGET", help="gives order, shapes, names and dtypes")
    add("sources", metavar="SOURCE", nargs="+", help="what is brought there; the first "
        "one's match serves all")
    add("-o", "--output", metavar="OUT", help="with one source a .safetensors file, or "
        "a folder if TARGET is one; with several a folder of STEM.safetensors. Without "
        "it the kinship of each source is told, and nothing is brought")
    add("--report", metavar="FILE", help="a JSON report")
    add("--seed", type=int, default=0, help="of the strangers to compare with")
    add("--force", action="store_true", help="write even strangers, and replace OUT")
    add("--quiet", action="store_true", help="no progress bars")
    a = parser.read(argv)
    stems = [stem(path) for path in a.sources]
    repeated = [name for name in stems if stems.count(name) > 1]
    several = a.output and len(a.sources) > 1
    if not 0 <= a.seed < 2 ** 32:
        parser.error("--seed must be from 0 to 2^32 - 1")
    if a.force and not (a.output or a.report):
        parser.error("nothing is written: drop --force")
    if several and a.output.endswith(".safetensors"):
        parser.error("several sources go into a folder: give -o the name of one")
    if several and repeated:
        parser.error(f"two sources would become {repeated[0]}.safetensors: rename one")
    return a


def check_outputs(a, target, sources):
    """Refuse what cannot be written, before any work. Returns the companions that go into
    a result folder, as paths relative to the target; None: the result is no such one."""
    along = None
    held = None
    if a.output and len(sources) > 1:
        held = [f"{stem(source.path)}.safetensors" for source in sources]
    elif a.output and target.folder and not a.output.endswith(".safetensors"):
        along, _ = companions(target.folder)
        held = ["model.safetensors", *along]
    elif a.output:
        need(a.output.endswith(".safetensors"), a.output, "is no name of a .safetensors "
             f"file, and {target.path} is no folder", "end it in .safetensors")
    others = list(target.files)
    for source in sources:
        others += source.files
    if a.output:
        check_output(a.output, others, a.force, folder=held)
        others.append(a.output)
    if a.report:
        check_output(a.report, others, a.force, "--report")
    return along


def print_kinship(target, source, kinship):
    """Related or not, and a line per layer: target <- source, and their cosine."""
    verdict = "no relative of"
    if kinship.related:
        verdict = "related to"
    met = [partner for partner in kinship.layers.values() if partner is not None]
    say(f"{stem(source.checkpoint.path)} is {verdict} {stem(target.checkpoint.path)}: "
        f"{len(met)} of {len(target)} layers have a partner (cosine of strangers: "
        f"{kinship.null:.3f})")
    for (mine, theirs), value in zip(kinship.layers.items(), kinship.similarity):
        if theirs is None:
            theirs = "none"
        say(f"  layer {mine} <- {theirs}  {value:.3f}")


def print_plan(target, source, kinship, brought, own):
    """What was brought along, and what was not."""
    partly = [name for name in brought if not brought[name].whole]
    say(f"{stem(source.checkpoint.path)}: {len(brought)} of "
        f"{len(target.checkpoint.entries)} tensors are brought, {len(partly)} in part")
    for why in dict.fromkeys(own.values()):
        names = [name for name in own if own[name] == why]
        say(f"  the target's own, {why}: {len(names)}, the first is {names[0]}")
    used = {each.source for each in brought.values()}
    unused = []
    for number in source.numbers:
        if number not in kinship.layers.values():
            unused.append(f"layer {number}")
    for name, entry in source.checkpoint.entries.items():
        if entry.place.layer is None and name not in used:
            unused.append(name)
    if unused:
        say(f"  not used of the source: {', '.join(unused)}")


def write_report(a, pairs, kinships):
    """--report: kinship, one record per source. Keys are stable, numbers finite."""
    records = []
    for (_, source), kinship in zip(pairs, kinships):
        records.append({
            "source": stem(source.checkpoint.path), "related": kinship.related,
            "layers": list(kinship.layers.values()), "similarity": kinship.similarity,
            "null": kinship.null})
    report = {"version": VERSION, "target": stem(a.target), "kinship": records}
    with appear(a.report, a.force) as path:
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(report, file, indent=1, allow_nan=False)


def write_all(a, along, pairs, plans, progress):
    """Every source in the target's order: one file, one folder with companions, or a
    folder of files. It appears whole, or not at all."""
    target = pairs[0][0].checkpoint
    entries = target.entries.values()
    if len(pairs) > 1:
        with appear(a.output, a.force) as folder:
            os.mkdir(folder)
            for (_, source), (brought, _) in zip(pairs, plans):
                name = f"{stem(source.checkpoint.path)}.safetensors"
                with create(os.path.join(folder, name), entries) as output:
                    write_matched(output, target, source.checkpoint, brought, progress)
        return
    source = pairs[0][1].checkpoint
    brought, _ = plans[0]
    with create(a.output, entries, folder=along is not None, force=a.force) as output:
        for file in along or []:
            copy = os.path.join(os.path.dirname(output.path), file)
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            shutil.copyfile(os.path.join(target.folder, file), copy)
        write_matched(output, target, source, brought, progress)


def main(argv=None):
    a = parse(argv)
    target = Checkpoint(a.target)
    sources = [Checkpoint(path) for path in a.sources]
    along = check_outputs(a, target, sources)
    pairs = [open_layers(target, source) for source in sources]

    def progress(things, label):
        return tqdm(things, desc=label, leave=False, disable=a.quiet or None)

    # Who is related? With -o, the first one's match serves all.
    check_finite(pairs[0][0], progress)
    kinships = []
    for pair in pairs:
        first = None
        if a.output and kinships:
            first = kinships[0]
            need(len(pair[1]) == len(pairs[0][1]), pair[1].checkpoint.path, "has another "
                 f"number of layers than {a.sources[0]}", "match it by itself")
        check_finite(pair[1], progress)
        kinships.append(find_kinship(*pair, a.seed, progress, first))
        print_kinship(*pair, kinships[-1])
    if a.report and not a.output:
        write_report(a, pairs, kinships)
    judged = kinships
    if not a.output:
        judged = kinships[:1]
    for path, kinship in zip(a.sources, judged):
        need(kinship.related or a.force, path, f"is no relative of {a.target}: cosine "
             f"{max(kinship.similarity):.3f}, of strangers {kinship.null:.3f}", "give a "
             "model that was made from it, or from the same one")
    if not a.output:
        return

    units = match_units(*pairs[0], kinships[0], progress)
    plans = []
    for pair, kinship in zip(pairs, kinships):
        plans.append(plan_tensors(*pair, kinship, units))
        check_same_order(pairs[0][1], pair[1], plans[0][0], plans[-1][0], a.force)
    for pair, kinship, plan in zip(pairs, kinships, plans):
        print_plan(*pair, kinship, *plan)
    write_all(a, along, pairs, plans, progress)
    if a.report:
        write_report(a, pairs, kinships)
    say(f"wrote {a.output}")


if __name__ == "__main__":
    # On a machine that is not idle, two threads took four times as long as one.
    torch.set_num_threads(1)
    sys.exit(command(main))
