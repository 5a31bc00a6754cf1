"""match.py: relatives of another shape, or of another order, made mergeable.

    python experiments/tools/match.py TARGET SOURCE                 # are they related?
    python experiments/tools/match.py TARGET SOURCE -o OUT          # then write SOURCE
    python experiments/tools/match.py TARGET BASE EXPERT -o FOLDER  # one match for both

Shuffle the neurons of an MLP, the heads of an attention, the positions of the residual
stream: the model computes the same function, and yet its weights, read as they stand,
have nothing in common with what they were. In a pruned or a grown model, too, behind
each missing or new neuron everything has moved. Of relatives (one was made from the
other, or both from a third) the weights tell which unit is which; between strangers
there is nothing to tell. An example, with neurons as rows:

    source  b [5 1]      target  a [2 9]      written  a [2 9]    nobody's: the target's
            c [0 7]              c [1 8]               c [0 7]
                                 b [4 1]               b [5 1]

Suffixes of names: J of the target and I of the source (layers, neurons, positions); H
and K heads in a group; P compared positions of the stream; N units; V tokens. index_J:
the source's index of each of the target's, or -1: [-1, 1, 0] in the example.

Paper: Sec. 3.3 merges across shapes by chunks alone. ours: weights are matched first;
       for equal shapes this is known (Ainsworth et al. 2022, "Git Re-Basin").
Not here: mixtures of experts and fused projections (refused by name); another order of
       the numbers within a head, as rotary positions have in other libraries.
"""
import collections
import functools
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from align import pair_names, pair_stacks, stacks_of
from chunking import (Checkpoint, Parser, appear, check_output, command, create, need,
                      say)
from lora import called, listed
from merge import RELATED, Destination, weight_places

# The axes of each role's rows (what it writes) and columns (what it reads).
#   stream    the residual stream: one order for a whole model
#   neurons   of the MLP
#   heads     rows of the query heads
#   groups    rows of the key and value heads; several query heads may share one
AXES = {
    "q": ("heads", "stream"), "k": ("groups", "stream"), "v": ("groups", "stream"),
    "gate": ("neurons", "stream"), "up": ("neurons", "stream"),
    "o": ("stream", "heads"), "down": ("stream", "neurons")}
NEEDED = ("q", "k", "v", "o", "up", "down")     # an MLP without a gate is fine
# A norm scales the stream, unless its name says otherwise (Qwen3, Phi, BitNet).
NORM_AXES = {"heads": r"q_(layer_?)?norm|attn_sub_norm|inner_attn",
             "groups": r"k_(layer_?)?norm",
             "neurons": r"ffn_sub_norm"}

# A cosine up to this is no evidence. In experiments/models a neuron has with its best
# partner 0.17 between strangers (0.33 at most), 0.99 between relatives.
SLACK = 0.3
SAMPLE = 32             # neurons of a layer that tell which layer is which
TOKENS = 4096           # that tell which position of the stream is which
# Positions of the stream at which units are compared. Three matrices then give a neuron
# 768 numbers, and cosines of strangers a spread of 1 / sqrt(768) = 0.036.
POSITIONS = 256
HEAD_SIZES = range(256, 7, -1)      # rows of a head that come into question
OTHER = "match models whose q, k, v, o, up and down are matrices of their own"


# === Match ==========================================================================
# --- What a model is, for matching --------------------------------------------------
class Layers:
    """An embedding, and numbered layers of q, k, v, o and an MLP.

    stack      what stands before a layer's number: 'model.layers'
    named      {number: {(rest, role): name}}, all their tensors, as align.stacks_of
    entries    {number: {role: Entry}}, their matrices that have a line in AXES
    alone      there is no other stack (of a vision tower)
    stream     width of the residual stream
    embedding  the Entry of the embedding of words
    """

    def __init__(self, checkpoint, stack):
        self.checkpoint = checkpoint
        self.stack = stack
        stacks = stacks_of(weight_places(checkpoint))
        self.named = stacks[stack]
        self.alone = len(stacks) == 1
        self.numbers = sorted(self.named)
        self.entries = {}
        for number, names in self.named.items():
            self.entries[number] = matrices_by_role(checkpoint, number, names.values())
        self.stream = self.entries[self.numbers[0]]["q"].shape[1]   # what q reads
        self.embedding = word_embedding(checkpoint, self.stream)
        check_shapes(self)

    def sizes(self, number=None):
        """{axis: its length} outside the layers, or in one; layers may differ."""
        found = {"tokens": self.embedding.shape[0], "stream": self.stream}
        if number is not None:
            for axis, role in (("neurons", "up"), ("heads", "q"), ("groups", "k")):
                found[axis] = self.entries[number][role].shape[0]
        return found

    def rows(self, number, axis, positions_P):
        """{role: (N, P)} of a layer: its matrices with this axis as rows, and of the
        stream these positions as columns. Of the neurons: gate, up, down transposed."""
        found = {}
        for role, entry in self.entries[number].items():
            if axis in AXES[role]:
                matrix = read_finite(self.checkpoint, entry.name)
                if AXES[role][1] == axis:
                    matrix = matrix.T
                found[role] = matrix[:, positions_P].float()
        return found


def matrices_by_role(checkpoint, number, names):
    """{role: Entry} of the matrices that AXES knows, among the tensors of one layer. If
    one is lacking, another matrix (a fused projection, an expert's) is named for it."""
    found = {}
    other = None            # a matrix that AXES does not know
    for name in names:
        entry = checkpoint.entries[name]
        role = entry.place.role
        if role in AXES and len(entry.shape) == 2:
            need(role not in found, entry.file, f"is the second {role} of its layer",
                 OTHER, name)
            found[role] = entry
        elif len(entry.shape) > 1:
            other = name
    lacking = ", ".join(role for role in NEEDED if role not in found)
    need(not lacking, checkpoint.path, f"layer {number} has no matrix of its own for "
         f"{lacking}", OTHER, other)
    return found


def word_embedding(checkpoint, stream):
    """The Entry of the largest embedding: of words, not of positions. It must be as
    wide as the stream: through a projection between them no order can be followed."""
    places = weight_places(checkpoint)
    found = [checkpoint.entries[name] for name, place in places.items()
             if place.layer is None and place.role == "embed"]
    need(found, checkpoint.path, "has no embedding to tell the stream's order", OTHER)
    largest = max(found, key=lambda entry: entry.numel)
    fits = largest.shape[1:] == (stream,)
    what = f"has shape {largest.shape}; the layers ask for {stream} columns"
    need(fits, largest.file, what, OTHER, largest.name)
    return largest


def check_shapes(layers):
    """Refuse matrices that do not fit together, as up (1536, 576), down (576, 1408)."""
    for number, entries in layers.entries.items():
        sizes = layers.sizes(number)
        for role, entry in entries.items():
            expected = tuple(sizes[axis] for axis in AXES[role])
            what = f"has shape {entry.shape}; {expected} would go with its layer"
            need(entry.shape == expected, entry.file, what, OTHER, entry.name)
        # Query heads share key heads evenly: else none would know its own keys.
        whole = sizes["heads"] % sizes["groups"] == 0
        need(whole, layers.checkpoint.path, "has rows that those of q cannot share",
             OTHER, entries["k"].name)


def open_layers(target, source):
    """(target Layers, source Layers) of two Checkpoints: of the stacks of layers that
    pair by name, the one that holds the most weights of the target."""
    mine = stacks_of(weight_places(target))
    pairs = pair_stacks(mine, stacks_of(weight_places(source)))
    need(pairs, source.path, f"no layers pair by name with {target.path}", OTHER)
    weights = collections.Counter()
    for entry in target.entries.values():
        weights[entry.place.stack] += entry.numel
    stack = max(pairs, key=weights.get)
    return Layers(target, stack), Layers(source, pairs[stack])


def read_finite(checkpoint, name, dtype=None):
    """A whole tensor; a cosine with NaN would be no evidence of anything."""
    tensor = checkpoint.read_tensor(name).to(dtype=dtype)
    # In one sum every NaN and Inf shows.
    need(tensor.sum(dtype=torch.float64).isfinite(), checkpoint.entries[name].file,
         f"holds NaN or Inf, or what does not fit {tensor.dtype}",
         "repair it, or store the target wider", name)
    return tensor


# --- Cosines, and one-to-one partners -----------------------------------------------
# A unit is known by its weights: a neuron by its rows of gate and up and its column of
# down, a head by its rows of q and its columns of o. They are compared at positions of
# the stream that both models have: so the stream comes first, then layers, then units.
def unit_cosines(one, other, size=1):
    """The cosine of each unit (a neuron, a head) of the one with each of the other: the
    mean over their matrices, so that each counts alike, however large its weights are.

    Args:      one, other   {role: (N size, P)}, as Layers.rows gives them
               size         rows of a unit: 1 for a neuron, more for a head
    Example:   gate [3, 4] and up [0, 2] with gate [4, 3] and up [0, 7]: cosines .96 of
               gate and 1 of up, together .98
    """
    cosines = []
    for role in [role for role in one if role in other]:    # gate may be lacking
        units = []
        for rows in (one[role], other[role]):
            units.append(normalize(rows.reshape(len(rows) // size, -1)))
        cosines.append(units[0] @ units[1].T)
    return sum(cosines) / len(cosines)


def assign(cosine_JI, slack):
    """One-to-one partners, (J,): the source's index of each of the target's; -1 for
    those whose cosine is not above the slack.

    Equation:  max over injections i of  sum_j max(cosine[j, i(j)], slack)
    ours:      an assignment and not the transport of Eq. 2, which would blend units
    Example:   cosines [[.9, .8], [.7, .1]]
               slack .3:   [1, 0], as .8 + .7 is more than .9 + .3
               slack .75:  [0, -1], as .9 + .75 is more than .8 + .75
    """
    j, i = linear_sum_assignment(cosine_JI.clamp(min=slack), maximize=True)
    i = torch.from_numpy(i)
    index_J = torch.full((len(cosine_JI),), -1)
    index_J[j] = torch.where(cosine_JI[j, i] > slack, i, -1)
    return index_J


# --- The residual stream ------------------------------------------------------------
# Its order shows in the embedding: tokens have the same numbers in both models.
def match_stream(embedding_VJ, embedding_VI):
    """The source's position of each of the target's, or -1, from embeddings of the same
    V tokens.

    Equation:  t = e / |e| for each row e;  cosine of the columns of t - mean of t
    ours:      tokens that were never trained share one large vector, which drifts: with
               these two steps 128 of 128 positions are found, without them 111
    """
    columns = []
    for embedding in (embedding_VJ, embedding_VI):
        token = normalize(embedding.float())                    # (V, stream)
        columns.append(normalize((token - token.mean(0)).T))    # (stream, V)
    target_JV, source_IV = columns
    return assign(target_JV @ source_IV.T, SLACK)


def find_stream(target, source):
    """`match_stream` of two models, and whether they share their tokens. If not, the
    stream is taken as it stands: strangers are strangers in any order."""
    V = min(target.embedding.shape[0], source.embedding.shape[0])
    tokens = []
    for layers in (target, source):
        embedding = read_finite(layers.checkpoint, layers.embedding.name)
        tokens.append(embedding[:V:math.ceil(V / TOKENS)])
    stream_J = match_stream(*tokens)
    # Half, and not all: a position may have drifted beyond recognition.
    if (stream_J >= 0).sum() >= min(target.stream, source.stream) / 2:
        return stream_J, True
    return common_index(target.stream, source.stream), False


def common_index(J, I):
    """(J,): the same index as far as the source goes, then -1."""
    index_J = torch.arange(J)
    return index_J.masked_fill(index_J >= I, -1)


def compared_positions(stream_J):
    """Positions of the target's stream, and of the source's, at which units are
    compared: of those that have a partner at most POSITIONS, evenly spread.
    Example:   stream_J = [2, -1, 0]: (0, 2) and (2, 0)"""
    known = (stream_J >= 0).nonzero()[:, 0]         # the target's that have a partner
    some = torch.linspace(0, len(known) - 1, min(len(known), POSITIONS)).long()
    return known[some], stream_J[known[some]]


# --- Layers, and the verdict --------------------------------------------------------
def compare_layers(target, source, positions, seed=0, progress=iter):
    """How alike is every layer of the target to every layer of the source? A neuron has
    a partner in the like layer, and almost nothing in common with any other one.

    Equation:  similarity[j, i] = mean over SAMPLE neurons of the one layer of their
                                  best cosine with a neuron of the other
               null             = the same of shuffled neurons, each in an order of its
                                  own: what strangers of these shapes have
    Returns:   similarity_JI, and null, the mean over all pairs of layers
    ours:      the best of many cosines is never 0: so it is held against strangers'
    """
    target_P, source_P = positions
    # The sample is of the model with fewer neurons: there each can have a partner.
    target_neurons = target.sizes(target.numbers[0])["neurons"]
    source_neurons = source.sizes(source.numbers[0])["neurons"]
    if target_neurons > source_neurons:
        turned = (source_P, target_P)
        similarity_IJ, null = compare_layers(source, target, turned, seed, progress)
        return similarity_IJ.T, null
    sample = {"gate": [], "up": [], "down": []}
    for number in target.numbers:
        for role, rows in target.rows(number, "neurons", target_P).items():
            some = torch.linspace(0, len(rows) - 1, SAMPLE).long()
            sample[role].append(rows[some])
    if len(sample["gate"]) < len(target.numbers):
        del sample["gate"]
    # Behind the sample it stands shuffled, row by row: strangers of the same numbers.
    generator = torch.Generator().manual_seed(seed)
    for role, parts in sample.items():
        real = torch.cat(parts)                                     # (J SAMPLE, P)
        order = torch.rand(real.shape, generator=generator).argsort(1)
        sample[role] = torch.cat([real, real.gather(1, order)])
    columns = []
    for number in progress(source.numbers):
        rows = source.rows(number, "neurons", source_P)
        best_N = unit_cosines(sample, rows).amax(1)                 # N = 2 J SAMPLE
        columns.append(best_N.view(2, -1, SAMPLE).mean(2))          # (2, J)
    similarity_JI, null_JI = torch.stack(columns, dim=2)            # (2, J, I)
    return similarity_JI, null_JI.mean().item()


class Kinship(NamedTuple):
    """Whether two models are related, and how the one stands in the other."""
    related: bool           # half of the layers that could have a partner have one
    layers: dict            # {target layer: its source layer, or None}
    similarity: list        # per target layer: the cosine with the best source layer
    null: float             # the cosine that strangers of these shapes have
    slack: float            # a cosine up to this is no evidence
    stream_J: torch.Tensor  # the source's position of each of the target's, or -1
    same_tokens: bool       # both embeddings are of the same tokens
    similarity_JI: torch.Tensor     # of every pair of layers: for pictures

    @property
    def met(self):
        """{target layer: source layer}, without those that have no partner."""
        return {j: i for j, i in self.layers.items() if i is not None}


def find_kinship(target, source, seed=0, progress=iter):
    """The Kinship of two models (Layers), from weights alone.

    Source:   ours. A relative exceeds SLACK, and twice the cosine `null` of strangers
    Example:  `base` and `grown` of experiments/models: layers {0: 0, 1: 1, 2: 3, 3: 4},
              similarity 0.998, null 0.155. `large`, trained apart: at most 0.19
    """
    stream_J, same_tokens = find_stream(target, source)
    positions = compared_positions(stream_J)
    similarity_JI, null = compare_layers(target, source, positions, seed, progress)
    slack = max(SLACK, 2 * null)
    # Layers may repeat: models are made by stacking the layers of others, too.
    layers = dict.fromkeys(target.numbers)          # None until one is found
    similarity, best = similarity_JI.max(1)
    for j, i in enumerate(best):
        if similarity[j] > slack:
            layers[target.numbers[j]] = source.numbers[i]
    # Half, and not all: a relative may have been made of parts of several models.
    met = (similarity > slack).sum().item()
    return Kinship(met >= min(similarity_JI.shape) / 2, layers, similarity.tolist(),
                   null, slack, stream_J, same_tokens, similarity_JI)


# --- Neurons and heads of a pair of layers ------------------------------------------
# Neurons are independent of one another. Heads are not: the query heads of a group
# share its keys and values, so a head may only move with its group, or within it.
#
#     rows of q   [head 0] [head 1] [head 2] [head 3]      two groups of two heads each,
#     rows of k   [    group 0    ] [    group 1    ]      as in grouped-query attention
def match_heads(mine, theirs, size, slack):
    """Partners of groups, by their keys and values, and of heads within a pair of
    groups, if a head has `size` rows.

    Args:      {axis: {role: rows}} of both layers
    Returns:   {axis: index of rows, -1 for none}; and a score, their mean cosine
    """
    group_JI = unit_cosines(mine["groups"], theirs["groups"], size)
    heads = unit_cosines(mine["heads"], theirs["heads"], size)
    # As [group, head in it] of both sides: with H = 2, head 3 is [1, 1].
    J, I = group_JI.shape
    H = heads.shape[0] // J
    K = heads.shape[1] // I
    head_JHIK = heads.view(J, H, I, K)
    group_J = assign(group_JI, slack)
    head_JH = torch.full((J, H), -1)
    total = 0.0
    for j, i in enumerate(group_J.tolist()):
        if i >= 0:
            inner_HK = head_JHIK[j, :, i]
            inner_H = assign(inner_HK, slack)
            head_JH[j] = torch.where(inner_H >= 0, i * K + inner_H, -1)
            # On the side with fewer heads, where all can have a partner, it is larger.
            best = max(inner_HK.amax(0).mean(), inner_HK.amax(1).mean())
            total += (group_JI[j, i] + best).item() / 2
    rows = {"heads": rows_of_heads(head_JH.flatten(), size),
            "groups": rows_of_heads(group_J, size)}
    return rows, total / min(J, I)


def rows_of_heads(index, size):
    """The rows of whole heads.  Example: [1, -1, 0] of size 2: [2, 3, -1, -1, 0, 1]"""
    rows = index[:, None] * size + torch.arange(size)               # (heads, size)
    return rows.masked_fill(index[:, None] < 0, -1).flatten()


def match_attention(mine, theirs, slack):
    """The rows of `match_heads` for the size of a head, which no weights file says.

    ours:      it is the largest that matches as well as the best. A smaller one would
               cut heads apart. A larger one takes two for one, and they match only
               where they happen to stand together
    """
    shared = math.gcd(len(mine["heads"]["q"]), len(mine["groups"]["k"]),
                      len(theirs["heads"]["q"]), len(theirs["groups"]["k"]))
    sizes = [size for size in HEAD_SIZES if shared % size == 0] or [shared]
    tried = [match_heads(mine, theirs, size, slack) for size in sizes]
    best = max(score for _, score in tried)
    for rows, score in tried:               # the largest size first
        if score >= 0.99 * best:            # as well as the best, but for noise
            return rows


def match_units(target, source, kinship, progress=iter):
    """{target layer: {axis: index of rows, -1 for none}} of layers with a partner.
    Example:   {0: {"neurons": (1536,), "heads": (576,), "groups": (192,)}, ...}"""
    target_P, source_P = compared_positions(kinship.stream_J)
    units = {}
    for j, i in progress(list(kinship.met.items())):
        mine = {}
        theirs = {}
        for axis in ("neurons", "heads", "groups"):
            mine[axis] = target.rows(j, axis, target_P)
            theirs[axis] = source.rows(i, axis, source_P)
        units[j] = match_attention(mine, theirs, kinship.slack)
        cosine_JI = unit_cosines(mine["neurons"], theirs["neurons"])
        units[j]["neurons"] = assign(cosine_JI, kinship.slack)
    return units


# === Write ==========================================================================
# --- Which tensor, with which rows and columns --------------------------------------
# A bias follows the rows of its matrix, a norm the stream. What is not known to follow
# stays the target's, and is named.
class Brought(NamedTuple):
    """How a tensor is read from the source; a vector is a matrix of one row.
    Equation:  W_written[j, k] = W_source[row[j], column[k]], and W_target[j, k] where
               one of the two is -1"""
    source: str             # its name there
    row_J: torch.Tensor     # the source's row of each row of the target, or -1
    column_K: torch.Tensor  # its column of each column, or -1


def pair_tensors(target, source, layers):
    """{target name: source name} of two Layers, by {target layer: source layer}. Other
    stacks of layers meet nobody."""
    def partners_of(target_stack, source_stack):
        if target_stack != target.named:
            return {}
        return layers

    pairs = pair_names(weight_places(target.checkpoint),
                       weight_places(source.checkpoint), partners_of)
    pairs[target.embedding.name] = source.embedding.name
    # A model without a head of its own reads words by its embedding.
    for name, entry in target.checkpoint.entries.items():
        if entry.place.role == "head" and entry.place.layer is None:
            pairs.setdefault(name, source.embedding.name)
    return pairs


def axes_of(entry, layers):
    """What a tensor's rows and columns stand for, by its role. None: it is not known.

    Returns:  a tuple of axes: those of AXES; tokens, the vocabulary; fixed, what stands
              in one order in every model (positions, classes, the numbers in a head)
    Example:  q_proj.weight -> (heads, stream);  q_proj.bias -> (heads,)
              q_norm -> (heads,), or (fixed,) if all heads share its gains (Qwen3)
    """
    place = entry.place
    sizes = layers.sizes()
    if place.stack == layers.stack:
        sizes = layers.sizes(place.layer)
    elif place.layer is not None:
        return None                     # of another tower, with a stream of its own
    # First the role: which axes should this tensor have?
    role = place.role.removesuffix(".bias")
    axes = ()
    if role in ("embed", "head"):
        axes = ("fixed", "stream")
        if entry.shape[:1] == (sizes["tokens"],):
            axes = ("tokens", "stream")
    elif role in AXES and place.layer is not None:
        axes = AXES[role]
    elif role == "norm":
        axes = ("stream",)
        for axis, pattern in NORM_AXES.items():
            if re.search(pattern, place.rest):
                axes = (axis,)
                if entry.shape != (sizes.get(axis),):
                    axes = ("fixed",)
    # Outside the layers, a name does not say of which tower it is.
    if place.layer is None and not layers.alone and axes[:1] != ("tokens",):
        return None
    # Then the shape: does it have them? A bias has the first one, its matrix's rows.
    axes = axes[:len(entry.shape)]
    lengths = [sizes.get(axis, length) for axis, length in zip(axes, entry.shape)]
    if not axes or lengths != list(entry.shape):
        return None
    return axes


def plan_tensors(target, source, kinship, units):
    """What happens to each tensor of the target.

    Args:     the Layers, what matched them; or a source in the order of one matched
    Returns:  {name: Brought}; and {name: why it stays as it is} for all others
    ours:     norms of another width stay: the gains of a grown model differ by a
              factor, since its mean square is over more numbers
    """
    pairs = pair_tensors(target, source, kinship.met)
    brought = {}
    own = {}
    for name, entry in target.checkpoint.entries.items():
        if name not in pairs:
            own[name] = "without a partner"
            continue
        other = source.checkpoint.entries[pairs[name]]
        axes = axes_of(entry, target)
        if axes is None or axes != axes_of(other, source):
            own[name] = "of unknown order"
            continue
        # Tokens and what is fixed stand in the same order, as far as the source goes.
        known = {"stream": kinship.stream_J, **units.get(entry.place.layer, {})}
        index = []
        for axis, J, I in zip(axes, entry.shape, other.shape):
            index.append(known.get(axis, common_index(J, I)))
        rigid = axes[0] == "fixed" or entry.place.role.startswith("norm")
        if rigid and entry.shape[0] != other.shape[0]:
            own[name] = "of another width"
        elif axes[0] == "tokens" and not kinship.same_tokens:
            own[name] = "of another vocabulary"
        elif any(index_N.max() < 0 for index_N in index):
            own[name] = "whose units found no partner"
        else:
            if len(axes) == 1:
                index.insert(0, torch.zeros(1, dtype=torch.long))
            brought[name] = Brought(other.name, *index)
    return brought, own


def write_matched(output, target, source, brought, progress=iter):
    """Fill an Output that has the target's entries. target, source: Checkpoints;
    brought: {name: Brought}. All other tensors are the target's own, byte for byte."""
    for name in progress(list(target.entries)):
        if name not in brought:
            output.put(name, 0, target.read(name))
            continue
        there, row_J, column_K = brought[name]
        own_JK = torch.atleast_2d(read_finite(target, name))
        theirs = torch.atleast_2d(read_finite(source, there, own_JK.dtype))
        known_JK = (row_J >= 0)[:, None] & (column_K >= 0)
        theirs_JK = theirs[row_J][:, column_K]          # where one is -1: not used
        output.put(name, 0, torch.where(known_JK, theirs_JK, own_JK).flatten())


def check_same_order(first, other):
    """Refuse a further source whose units do not stand as the first one's do: one match
    serves an expert and its base, whose difference task arithmetic merges.
    ours:     the cosine of each matrix with its like: 0.9 for experts of one base, 0 if
              anything stands in another order
    """
    alone = f"match it by itself: {first.checkpoint.path} says nothing of its order"
    for number, entries in first.entries.items():
        for role, entry in entries.items():
            like = other.entries.get(number, {}).get(role)
            need(like is not None and like.shape == entry.shape, other.checkpoint.path,
                 "has no like of its shape", alone, entry.name)
            mine_L = first.checkpoint.read(entry.name).double()
            theirs_L = other.checkpoint.read(like.name).double()
            cosine = torch.cosine_similarity(mine_L, theirs_L, dim=0)
            need(cosine > RELATED, like.file, "stands in another order", alone,
                 like.name)


# === The command ====================================================================
def parse(argv):
    """The arguments. What the command line alone decides is refused here."""
    parser = Parser(prog="match.py", description="Bring relatives to a target's shape.")
    add = parser.add_argument
    add("target", metavar="TARGET", help="gives order, shapes, names and dtypes")
    add("sources", metavar="SOURCE", nargs="+", help="brought, by the first's match")
    add("-o", "--output", metavar="OUT", help="a .safetensors file, or a folder if "
        "TARGET is one or there are several sources. Without it nothing is brought")
    add("--report", metavar="FILE", help="a JSON report")
    add("--seed", type=int, default=0, help="of the strangers to compare with")
    add("--force", action="store_true", help="write even strangers, and replace OUT")
    add("--quiet", action="store_true", help="no progress bars")
    a = parser.read(argv)
    if not 0 <= a.seed < 2 ** 32:
        parser.error("--seed must be from 0 to 2^32 - 1")
    if a.force and not (a.output or a.report):
        parser.error("nothing is written: drop --force")
    if a.output and len(a.sources) > 1:
        if a.output.endswith(".safetensors"):
            parser.error("several sources go into a folder: give -o the name of one")
        if len({called(path) for path in a.sources}) < len(a.sources):
            parser.error("two sources would become one file: rename one")
    return a


def check_outputs(a, target, sources):
    """Refuse what cannot be written. Returns the Destination of a single result."""
    result = None
    held = None             # the files of a result that is a folder
    if a.output and len(sources) > 1:
        held = [f"{called(source.path)}.safetensors" for source in sources]
    elif a.output:
        result = Destination(target, a.output)
        held = result.files
    others = [file for model in (target, *sources) for file in model.files]
    if a.output:
        check_output(a.output, others, a.force, folder=held)
        others.append(a.output)
    if a.report:
        check_output(a.report, others, a.force, "--report")
    return result


def print_kinship(target, source, kinship):
    """Related or not, with how many layers that rests on; then a line per layer."""
    verdict = ("no relative of", "related to")[kinship.related]
    say(f"{called(source.checkpoint.path)} is {verdict} "
        f"{called(target.checkpoint.path)}: {len(kinship.met)} of "
        f"{len(target.numbers)} layers have a partner "
        f"(cosine of strangers: {kinship.null:.3f})")
    for (j, i), cosine in zip(kinship.layers.items(), kinship.similarity):
        say(f"  layer {j} <- {i}  {cosine:.3f}")


def print_plan(source, plan):
    """How many tensors are brought, and which stay the target's."""
    brought, own = plan
    say(f"{called(source.checkpoint.path)}: {len(brought)} of "
        f"{len(brought) + len(own)} tensors are brought")
    for why in dict.fromkeys(own.values()):
        names = [name for name in own if own[name] == why]
        say(f"  the target's own, {why}: {listed(names)}")


def write_report(a, kinships):
    """--report: kinship, one record per source. Keys are stable, numbers finite."""
    records = []
    for path, kinship in zip(a.sources, kinships):
        records.append({
            "source": called(path), "related": kinship.related,
            "layers": list(kinship.layers.values()), "similarity": kinship.similarity,
            "null": kinship.null})
    report = {"version": 1, "target": called(a.target), "kinship": records}
    with appear(a.report, a.force) as path:
        with open(path, "w") as file:
            json.dump(report, file, indent=1, allow_nan=False)


def write_all(a, result, target, sources, plans, progress):
    """Every source in the target's order, by its plan: whole, or not at all."""
    entries = target.entries.values()
    if len(sources) > 1:
        with appear(a.output, a.force) as folder:
            Path(folder).mkdir()
            for source, (brought, _) in zip(sources, plans):
                name = f"{called(source.path)}.safetensors"
                with create(Path(folder) / name, entries) as output:
                    write_matched(output, target, source, brought, progress)
        return
    source = sources[0]
    card = (f"`{called(source.path)}` in the order, shapes and names of "
            f"`{called(target.path)}`, by `experiments/tools/match.py` of lsmerge.\n")
    with create(result.path, entries, inside=result.weights, force=a.force) as output:
        result.fill(Path(output.path).parent, card)
        write_matched(output, target, source, plans[0][0], progress)


def main(argv=None):
    """The command, straight down: open and check; who is related; match; write."""
    a = parse(argv)
    target = Checkpoint(a.target)
    sources = [Checkpoint(path) for path in a.sources]
    result = check_outputs(a, target, sources)
    pairs = [open_layers(target, source) for source in sources]
    # disable=None: no bar where stderr is no terminal.
    progress = functools.partial(tqdm, leave=False, disable=a.quiet or None)
    kinships = []
    for pair in pairs:
        kinship = find_kinship(*pair, a.seed, progress)
        print_kinship(*pair, kinship)
        kinships.append(kinship)
    first = kinships[0]
    if a.report and not a.output:       # of strangers, too: it was asked for
        write_report(a, kinships)
    need(first.related or a.force, a.sources[0], f"is no relative of {a.target}: its "
         f"cosine is {max(first.similarity):.3f}, that of strangers {first.null:.3f}",
         "give a model that was made from it, or from the same one")
    if not a.output:
        return
    for _, further in pairs[1:]:
        check_same_order(pairs[0][1], further)
    units = match_units(*pairs[0], first, progress)
    plans = []
    for pair in pairs:
        plan = plan_tensors(*pair, first, units)
        print_plan(pair[1], plan)
        plans.append(plan)
    write_all(a, result, target, sources, plans, progress)
    if a.report:
        write_report(a, kinships)
    say(f"wrote {a.output}")


if __name__ == "__main__":
    # On a machine that is not idle, two threads took four times as long as one.
    torch.set_num_threads(1)
    sys.exit(command(main))
