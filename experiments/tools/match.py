"""match.py: relatives of another shape, or of another order, made mergeable.

    python experiments/tools/match.py TARGET SOURCE                 # are they related?
    python experiments/tools/match.py TARGET SOURCE -o OUT          # then write SOURCE
    python experiments/tools/match.py TARGET BASE EXPERT -o FOLDER  # one match for both

A chunk of a flattened matrix means nothing outside its own model's order of hidden
units. Shuffle the neurons of an MLP, the heads of an attention, the positions of the
residual stream: the model computes the same function, and yet its weights, read as
they stand, have nothing in common with what they were. A pruned or a grown model is
shuffled in this sense, too: behind each missing neuron everything has moved. So,
before chunks are encoded or weights are averaged, somebody must say which unit is
which. Of relatives (one was made from the other, or both from a third) the weights
say it, since they still resemble each other. Between strangers there is nothing to say.

    match    weights -> which unit of the source is which of the target
               find_stream      the order of the residual stream, from the embeddings
               compare_layers   how alike are two layers, and how alike are strangers?
               find_kinship     the best source layer of each target layer; the verdict
               match_units      neurons and heads of each pair of layers
    write    the source's numbers in the target's order, shapes, names and dtypes
               plan_tensors     which tensor is brought, with which rows and columns
               read_matched     its rows; where nobody is a partner, the target's own

What is written merges with the target by merge.py, or by any other tool, as equal
shapes do. An example,
with neurons as rows (there are two in the source, three in the target):

    source  b [5 1]      target  a [2 9]      written  a [2 9]    nobody's: the target's
            c [0 7]              c [1 8]               c [0 7]
                                 b [4 1]               b [5 1]

Exit code 0: done. 1: the source is no relative (nothing is written, --force writes all
the same), or something is wrong with a file. 2: something is wrong with the command.
Cost, with one thread: 135 M weights 15 s, 0.5 B weights 35 s. Memory is that of a pair
of layers: 1.9 GB in all for one of 14,336 neurons and a stream of 4,096.

Suffixes of names: J of the target and I of the source, be it layers, neurons, groups or
positions; H and K heads in a group; P compared positions of the stream; U numbers that
stand for a unit; V tokens. In `write`, J and K are rows and columns of a tensor.

Paper: Sec. 3.3 merges across shapes by chunks alone. ours: weights are matched first,
       of relatives only. To find one order of units from another is known for equal
       shapes (Ainsworth et al. 2022, "Git Re-Basin"). Here either side may have more
       units, and layers may be missing, repeat, or stand in another order.
Not here: mixtures of experts and fused projections (refused by name); vision towers
       (they stay the target's); another order of the numbers within a head (rotary
       positions fix it in q and k); what only activations would show.
"""
if __name__ == "__main__":      # Ctrl-C during the imports: end without a traceback
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import json
import math
import os
import re
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
from chunking import (PIECE, Checkpoint, Parser, appear, check_output, command,
                      create, need, say, spans, wide)
from merge import RELATED, Destination, digest, mean_cosine

VERSION = 1             # of the report

# All that is known of architectures: the axes of each role's rows and columns. A fork
# adds a line.
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

# A cosine up to this is no evidence. In the models of experiments/models a neuron has
# with its best partner 0.17 between strangers (0.33 at most), 0.99 between relatives.
SLACK = 0.3
# Neurons of a layer that tell which layer is which. Those of a relative have a partner
# each, so that few are enough.
SAMPLE = 32
# Tokens of the vocabulary that tell which position of the stream is which: by chance,
# columns of 4096 random numbers have cosines of 0.016.
TOKENS = 4096
# Positions of the stream at which units are compared. Three matrices then give a neuron
# 768 numbers. The cosines of strangers have a spread of 1 / sqrt(768) = 0.036; of all
# pairs of 14,336 neurons the largest is about 0.2. Twice as many take twice the time.
POSITIONS = 256
# Rows of a head that come into question: multiples of eight, the largest first.
HEAD_SIZES = range(256, 7, -8)
# Neurons that are compared with all others at a time: 59 MB for 14,336 others.
BLOCK = 1024
OTHER = "match models whose q, k, v, o, up and down are matrices of their own"


def quiet(things, label):
    """The progress bar of a library function: none. The command passes one that draws.
    Args:     things to go through; label: what is being done"""
    return things


# === Match ==========================================================================
# --- What a model is, for matching --------------------------------------------------
# An embedding, and layers of q, k, v, o and an MLP. Names and shapes stand in the
# header of a file, so that all that does not fit is refused before any layer is read,
# and by the name of the file and the tensor that is to blame.
class Layers:
    """The numbered layers of a checkpoint, with their matrices by role.

    numbers    of the layers, as they stand in the names
    entries    {number: {role: Entry}}, the matrices that have a line in AXES
    named      {number: {(rest of the name, role): name}}, all tensors of the layers
    stream     width of the residual stream
    embedding  the Entry of the embedding of words
    tied       names of the tensors that equal it, itself among them
    foreign    how the names of other towers (a vision tower) begin
    Raises:    CheckpointError, by file and tensor, for what cannot be matched
    """

    def __init__(self, checkpoint, stack):
        """checkpoint: a Checkpoint, or a StateDict.  stack: what stands before the
        number of a layer, 'model.layers'."""
        self.checkpoint = checkpoint
        self.stack = stack
        stacks = stacks_of(places_of(checkpoint))
        self.named = stacks.pop(stack)
        self.foreign = tuple(apart(stack, other) for other in stacks)
        self.numbers = sorted(self.named)
        self.entries = {}
        for number, names in self.named.items():
            entries = [checkpoint.entries[name] for name in names.values()]
            self.entries[number] = matrices_by_role(checkpoint, number, entries)
        # q reads the stream: it is as wide as q has columns.
        self.stream = self.entries[self.numbers[0]]["q"].shape[1]
        self.embedding = word_embedding(checkpoint, self.stream)
        check_shapes(self)
        self.tied = []
        own = digest(checkpoint, self.embedding)
        for name, entry in checkpoint.entries.items():
            if entry.place.layer is None and digest(checkpoint, entry) == own:
                self.tied.append(name)

    def __len__(self): return len(self.numbers)

    def sizes(self, number):
        """{axis: its length} in a layer. Layers may differ.
        Example:  SmolLM2-135M: stream 576, neurons 1536, heads 576, groups 192"""
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
    """{name: Place}, as the functions of align.py that pair names ask for it.
    Example:  'model.layers.3.mlp.up_proj.weight' -> stack 'model.layers', layer 3,
              role 'up', rest 'mlp.up_proj.weight'"""
    return {name: entry.place for name, entry in checkpoint.entries.items()}


def apart(stack, other):
    """How the names of the tower of another stack begin: with what both stacks have in
    common, and one part more.
    Example:  'model.language_model.layers' and 'model.visual.blocks'
              -> 'model.visual.', and so 'model.visual.norm.weight' is of that tower"""
    parts = other.split(".")
    common = os.path.commonprefix([stack.split("."), parts])
    return ".".join(parts[:len(common) + 1]) + "."


def role_of(entry):
    """The role of a weight, or of the bias that goes with it.
    Example:  'q.bias' -> 'q'"""
    return entry.place.role.removesuffix(".bias")


def matrices_by_role(checkpoint, number, entries):
    """{role: Entry} of the matrices that AXES knows, among the entries of one layer.

    Raises:   CheckpointError if one of NEEDED is lacking. If some tensor holds what is
              lacking (a fused projection, experts), that is the one to name
    Example:  with q_proj.weight (576, 576): 'q' -> its Entry; with qkv_proj.weight, or
              with experts.0.up_proj.weight: refused
    """
    found = {}
    for entry in entries:
        role = entry.place.role
        if role in AXES and entry.is_float and len(entry.shape) == 2:
            need(role not in found, entry.file, f"is the second {role} of its layer",
                 OTHER, entry.name)
            found[role] = entry
    lacking = [role for role in NEEDED if role not in found]
    for entry in entries:
        role, _, mark = entry.place.role.partition(".")
        if lacking and len(entry.shape) > 1:
            need(role not in ("qkv", "gate_up"), entry.file, "is a fused projection",
                 OTHER, entry.name)
            need(role not in AXES or not mark, entry.file, "is one of several in its "
                 "layer (experts, cross-attention)", OTHER, entry.name)
    need(not lacking, checkpoint.path, f"layer {number} has no matrix for "
         f"{', '.join(lacking)}", OTHER)
    return found


def word_embedding(checkpoint, stream):
    """The Entry of the largest embedding: that of words, not of positions.

    Raises:   CheckpointError if it is not a matrix as wide as the stream: through a
              projection between the two (OPT-350m) no order can be followed
    """
    found = []
    for entry in checkpoint.entries.values():
        outside = entry.place.layer is None     # of the numbered layers
        if outside and entry.place.role == "embed" and entry.is_float:
            found.append(entry)
    need(found, checkpoint.path, "has no embedding, which would tell the order of the "
         "residual stream", OTHER)
    largest = max(found, key=lambda entry: entry.numel)
    fits = largest.numel > 0 and largest.shape[1:] == (stream,)
    need(fits, largest.file, f"has shape {largest.shape}; the layers ask for "
         f"{stream} columns", OTHER, largest.name)
    return largest


def check_shapes(layers):
    """Refuse matrices that do not fit together, before any of them is read.
    Example:  up (1536, 576) with down (576, 1408): which of the two is wrong nobody
              knows, but one of them is named. q of 9 heads with k of 2: 9 / 2 is not
              whole, so that no head knows which keys are its own"""
    for number, entries in layers.entries.items():
        sizes = layers.sizes(number)
        for role, entry in entries.items():
            row, column = AXES[role]
            expected = (sizes[row], sizes[column])
            need(entry.shape == expected and entry.numel > 0, entry.file,
                 f"has shape {entry.shape}; {expected} would go with its layer", OTHER,
                 entry.name)
        key = entries["k"]
        need(sizes["heads"] % sizes["groups"] == 0, key.file, "has rows that the "
             f"{sizes['heads']} rows of q cannot share", OTHER, key.name)


def open_layers(target, source):
    """(target Layers, source Layers) of two Checkpoints.

    Raises:   CheckpointError if no stacks of layers pair by name, or as Layers does
    ours:     of those that pair, it is the one that holds the most weights of the
              target. Others (a vision tower) are not matched
    """
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
    NaN, and so no evidence of anything. What is only copied need not be finite
    (GPT-NeoX keeps a mask of -inf).

    Args:     layers: Layers, of whose checkpoint every such tensor is read once
    Raises:   CheckpointError, by file and tensor
    """
    checkpoint = layers.checkpoint
    for entry in progress(list(checkpoint.entries.values()), "check"):
        if not entry.is_float or axes_of(entry, layers) is None:
            continue
        for start, stop in spans(entry.numel):
            piece_L = checkpoint.read(entry.name, start, stop).float()
            # In one sum every NaN and Inf shows, and so does what has no square in
            # float32: its cosines would be 0.
            fine = piece_L.dot(piece_L).isfinite()
            need(fine, entry.file, "holds NaN, Inf or a number above 1e16 in elements "
                 f"{start} to {stop}", "repair or re-export it", entry.name)


# --- Cosines, and one-to-one partners -----------------------------------------------
# A unit is known by its weights: a neuron by its rows of gate and up and its column of
# down, a head by its rows of q and its columns of o. Two units are compared by the
# cosine of these, at positions of the stream that both models have. So the stream comes
# first, then layers, then what is in them.
class Positions(NamedTuple):
    """Where on the residual stream two models are compared: the p-th position of the
    one is the p-th of the other."""
    target: torch.Tensor        # (P,)
    source: torch.Tensor        # (P,)


def unit_vectors(rows, positions_P, roles, size=1):
    """A vector of length 1 for each unit (a neuron, a head). The product of two of them
    is the mean of their cosines, matrix by matrix.

    Equation:  u_n . v_m = mean over roles of cos(rows of unit n, rows of unit m)
    Args:      rows         {role: (N size, stream)}, as Layers.rows gives it
               positions_P  of the stream: these columns are compared
               roles        that both sides have
               size         rows of a unit: 1 for a neuron, more for a head
    Returns:   (N, U) float32, with U = roles size P
    ours:      each matrix counts alike, however large its weights are
    Example:   one role, one neuron [3, 4]: [.6, .8]
    """
    parts = []
    for role in roles:
        part = rows[role][:, positions_P].float()           # (N size, P)
        part = part.reshape(len(part) // size, -1)          # (N, size P)
        parts.append(normalize(part, dim=1))                # a unit of zeros stays zero
    return torch.cat(parts, dim=1) / math.sqrt(len(roles))


def keep_above(cosine_JI, slack):
    """The cosines above the slack, as a sparse (J, I) matrix. All others are no
    evidence, and what exactly they are does not matter: a unit that has no better
    partner stays alone.
    Example:   [[.9, .2], [.1, .5]], slack .3: .9 at (0, 0) and .5 at (1, 1)"""
    j, i = (cosine_JI > slack).nonzero(as_tuple=True)
    return scipy.sparse.csr_matrix((cosine_JI[j, i], (j, i)), cosine_JI.shape)


def strong_cosines(unit_JU, unit_IU, slack):
    """`keep_above` of the cosines of all pairs, sparse (J, I).
    Memory:    block by block. All cosines of 14,336 neurons with as many would take
               0.8 GB, of which a few numbers per row remain"""
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
    ours:      an assignment and not the transport of Eq. 2, which would blend units. It
               is exact, and fast where few pairs come into question (14,336: 0.6 s)
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


# --- The residual stream ------------------------------------------------------------
# All layers read and write it, in one order of positions for the whole model, and so
# does the embedding. There the order shows, without any layer: each token writes to all
# of the positions, and tokens have the same numbers in both models.
def match_stream(embedding_VJ, embedding_VI):
    """The order of the residual stream, from embeddings of the same V tokens (the
    target's, the source's): what a position holds of all tokens tells which it is.

    Returns:   (J,): the source's position of each of the target's, or -1
    ours:      cosines of columns, after every token has got length 1 and every column
               mean 0. Tokens that were never trained share one large vector, which
               drifts: with these two steps 128 of 128 positions are found, without 111
    """
    columns = []
    for embedding in (embedding_VJ, embedding_VI):
        # Scaled by its length no token outweighs others; centred, a column no longer
        # holds what all tokens share.
        token = normalize(embedding.float(), dim=1)
        columns.append(normalize(token - token.mean(0), dim=0))
    target_VJ, source_VI = columns
    return assign(strong_cosines(target_VJ.T, source_VI.T, SLACK), SLACK)


def find_stream(target, source):
    """`match_stream` of two models (Layers), by the tokens that both have.

    Returns:   (J,), and whether the embeddings show it, so that tokens are the same
    ours:      if half of the positions find nobody, they do not. The stream is then
               taken as it stands: a relative with a new vocabulary is found, and
               strangers are strangers in any order
    """
    vocabulary = min(target.embedding.shape[0], source.embedding.shape[0])
    stream_J = match_stream(some_tokens(target, vocabulary),
                            some_tokens(source, vocabulary))
    met = (stream_J >= 0).sum().item()
    if met >= min(target.stream, source.stream) / 2:
        return stream_J, True
    return common_index(target.stream, source.stream), False


def some_tokens(layers, vocabulary):
    """Some rows of the embedding, evenly spread over the first `vocabulary` ones, which
    both models have.
    Returns:   (V, stream), V at most TOKENS
    Example:   49,152 tokens: every twelfth"""
    width = layers.stream
    tokens = []
    for row in range(0, vocabulary, -(-vocabulary // TOKENS)):
        begin = row * width
        token = layers.checkpoint.read(layers.embedding.name, begin, begin + width)
        tokens.append(token)
    return torch.stack(tokens)


def common_index(J, I):
    """(J,): the same index as far as the source goes, then -1.
    Example:   J = 3, I = 2: [0, 1, -1]"""
    index_J = torch.arange(J)
    return index_J.masked_fill(index_J >= I, -1)


def compared_positions(stream_J):
    """The Positions at which units are compared: of those that have a partner at most
    POSITIONS, evenly spread.
    Example:   stream_J = [2, -1, 0]: target (0, 2), source (2, 0)"""
    known = (stream_J >= 0).nonzero()[:, 0]
    some = torch.linspace(0, len(known) - 1, min(len(known), POSITIONS)).long()
    return Positions(known[some], stream_J[known[some]])


# --- Layers, and the verdict --------------------------------------------------------
# Which layer is which? Its neurons tell: each has a partner in the relative's like
# layer, and almost nothing in common with the neurons of any other. If hardly any layer
# finds a partner, the models are strangers.
def compare_layers(target, source, positions, seed=0, progress=quiet):
    """How alike is every layer of the target to every layer of the source?

    Equation:  similarity[j, i] = mean over SAMPLE neurons of the one layer of their
                                  best cosine with a neuron of the other
               null             = the same of shuffled neurons, each in an order of its
                                  own: what strangers of these shapes have
    Returns:   similarity_JI, and null, the mean over all pairs of layers
    ours:      neurons and not whole matrices, since these stand in unknown orders. The
               best of many cosines grows with their number and is never 0, so it is
               held against that of strangers. The sample is of the model with fewer
               neurons: there each one can have a partner
    """
    # By the first layer: most models have equal layers, and if not, it is a matter of
    # how far the numbers lie apart, not of the verdict.
    mine = target.sizes(target.numbers[0])["neurons"]
    theirs = source.sizes(source.numbers[0])["neurons"]
    if mine <= theirs:
        return best_cosines(target, source, positions.target, positions.source, seed,
                            progress)
    similarity_IJ, null = best_cosines(source, target, positions.source,
                                       positions.target, seed, progress)
    return similarity_IJ.T, null


def best_cosines(fewer, more, positions_fewer, positions_more, seed, progress):
    """compare_layers, of F layers with fewer neurons and M layers with more.

    Returns:   (F, M), and null
    ours:      shuffling a neuron's numbers keeps how large and how uneven they are, and
               so what their best cosine is by chance. Each layer is read once
    """
    roles = []
    for role in ("gate", "up", "down"):
        entries = [*fewer.entries.values(), *more.entries.values()]
        if all(role in found for found in entries):
            roles.append(role)
    # The sample, twice: as it is, and shuffled. Its columns are the compared positions
    # only, so that `every` one of them counts.
    real = sample_neurons(fewer, positions_fewer, roles)
    generator = torch.Generator().manual_seed(seed)
    shuffled = {}
    for role in roles:
        order = torch.rand(real[role].shape, generator=generator).argsort(1)
        shuffled[role] = real[role].gather(1, order)        # each row by itself
    every = torch.arange(len(positions_fewer))
    real_NU = unit_vectors(real, every, roles)              # N = F SAMPLE
    shuffled_NU = unit_vectors(shuffled, every, roles)

    # Each neuron's best cosine in each layer of the other model. The mean over the
    # neurons of a layer is how alike the two layers are.
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
    """Neurons of each layer, evenly spread over it, layer after layer.
    Returns:   {role: (layers SAMPLE, P)} float32. Some neurons come twice where a layer
               has fewer than SAMPLE"""
    found = {role: [] for role in roles}
    for number in layers.numbers:
        rows = layers.rows(number, "neurons")
        some = torch.linspace(0, len(rows["up"]) - 1, SAMPLE).long()
        for role in roles:
            found[role].append(rows[role][some][:, positions_P].float())
    return {role: torch.cat(parts) for role, parts in found.items()}


def match_layers(similarity_JI, slack):
    """The most similar source layer of each target layer, as an index; None if it is
    not above the slack.
    ours:      layers may repeat and stand in any order: models are made by stacking the
               layers of others, too
    Example:   three layers on two: [[.9, .1], [.1, .8], [.9, .1]]: [0, 1, 0]
               one that is new: [[.9, .1], [.2, .1]], slack .3: [0, None]"""
    layers = []
    for row_I in similarity_JI:
        i = row_I.argmax().item()
        if row_I[i] <= slack:
            i = None
        layers.append(i)
    return layers


class Kinship(NamedTuple):
    """Whether two models are related, and how layers and stream of the one stand in the
    other. Layers are called by their numbers in the names.
    Example:  see find_kinship"""
    related: bool           # half of the layers that could have a partner have one
    layers: dict            # {target layer: its source layer, or None}
    similarity: list        # per target layer: the cosine with the best source layer
    null: float             # the cosine that strangers of these shapes have
    slack: float            # a cosine up to this is no evidence
    stream_J: torch.Tensor  # the source's position of each of the target's, or -1
    same_tokens: bool       # both embeddings are of the same tokens
    similarity_JI: torch.Tensor     # of every pair of layers: for pictures


def find_kinship(target, source, seed=0, progress=quiet):
    """The Kinship of two models, from weights alone.

    Args:     target, source: Layers; seed: of the shuffled neurons
    Source:   ours. Strangers of these shapes have the cosine `null`; twice that, and at
              least SLACK, is what a relative must exceed
    Example:  `base` and `grown` of experiments/models, which put two new layers among
              the four of base: related, layers {0: 0, 1: 1, 2: 3, 3: 4}, similarity
              0.998 each, null 0.155. `base` and `large`, trained apart: at most 0.19
    """
    # Where on the stream can layers be compared, and how alike are they there?
    stream_J, same_tokens = find_stream(target, source)
    positions = compared_positions(stream_J)
    similarity_JI, null = compare_layers(target, source, positions, seed, progress)
    slack = max(SLACK, 2 * null)
    # From indices to the layers' numbers in the names.
    layers = {}
    for number, i in zip(target.numbers, match_layers(similarity_JI, slack)):
        layers[number] = None
        if i is not None:
            layers[number] = source.numbers[i]
    # Half, and not all: a relative may have been made of parts of several models.
    met = len(layers) - list(layers.values()).count(None)
    related = met >= min(len(target), len(source)) / 2
    similarity = similarity_JI.amax(1).tolist()
    return Kinship(related, layers, similarity, null, slack, stream_J, same_tokens,
                   similarity_JI)


# --- Neurons and heads of a pair of layers ------------------------------------------
# Within a pair of layers every unit gets one partner at most. Neurons are independent
# of one another. Heads are not: the query heads of a group share its keys and values,
# so a head may only move with its group, or within it.
#
#     rows of q   [head 0] [head 1] [head 2] [head 3]      two groups of two heads each,
#     rows of k   [    group 0    ] [    group 1    ]      as in grouped-query attention
def match_neurons(target_rows, source_rows, positions, slack):
    """(J,): the source's neuron of each of the target's, or -1.

    Args:      target_rows, source_rows   {role: (neurons, stream)} of both layers
               positions   of the stream, as compared_positions gives them
               slack       of the Kinship
    """
    roles = [role for role in target_rows if role in source_rows]
    unit_JU = unit_vectors(target_rows, positions.target, roles)
    unit_IU = unit_vectors(source_rows, positions.source, roles)
    return assign(strong_cosines(unit_JU, unit_IU, slack), slack)


def match_heads(target_rows, source_rows, positions, size, slack):
    """Partners of heads, if a head has `size` rows, as of whole units: rotary positions
    tie the numbers within a head together. First groups, by their keys, values
    and heads; then heads within a pair of groups, as they read the keys of their group.

    Args:      {"heads": {role: rows}, "groups": {role: rows}} of both layers
    Returns:   {"heads": index of rows, "groups": index of rows}, -1 for none; and the
               mean score of the groups, from 0 to 1
    Example:   size 2; the target's first of two heads is the source's second, and the
               other way round: rows [2, 3, 0, 1]
    """
    cosine_of = {}
    for axis in ("heads", "groups"):
        roles = list(target_rows[axis])
        unit_JU = unit_vectors(target_rows[axis], positions.target, roles, size)
        unit_IU = unit_vectors(source_rows[axis], positions.source, roles, size)
        cosine_of[axis] = unit_JU @ unit_IU.T
    # As [group, head in it] of both sides: J groups of H heads, I groups of K.
    J, I = cosine_of["groups"].shape
    H = cosine_of["heads"].shape[0] // J
    K = cosine_of["heads"].shape[1] // I
    head_JHIK = cosine_of["heads"].view(J, H, I, K)

    # Each head's best partner in the other group, on average over the heads. On the
    # side with fewer heads, where all can have a partner, it is the larger number.
    by_target_JI = head_JHIK.amax(3).mean(1)
    by_source_JI = head_JHIK.amax(1).mean(2)
    by_heads_JI = torch.maximum(by_target_JI, by_source_JI)
    score_JI = (cosine_of["groups"] + by_heads_JI) / 2
    group_J = assign(keep_above(score_JI, slack), slack)

    # Within a pair of groups: head h of group j is head k of group i, counted i K + k.
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
    """`match_heads` for the size that a head has, which no weights file says.

    Args:      as match_heads
    Returns:   {"heads": index of rows, "groups": index of rows}
    ours:      it is the largest that matches as well as the best. A smaller one would
               cut heads apart. A larger one takes two for one, and they match only
               where they happen to stand together. (SmolLM2-135M against itself in
               another order, sizes 192, 96, 64, 32: scores 0.2, 0.2, 1.0, 0.8)
    """
    # A size must divide the rows of q and of k, in both models.
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
    """Neurons, heads and groups of every pair of layers. Only now is it decided who is
    who; until here samples were enough. A layer that repeats (a source layer that two
    target layers have as their partner) is matched twice, as its units may stand in
    another order each time.

    Args:      target, source: Layers, and their Kinship
    Returns:   {target layer: {axis: index of rows, -1 for none}}, without the layers
               that have no partner
    Memory:    that of a pair of layers
    Example:   {0: {"neurons": (1536,), "heads": (576,), "groups": (192,)}, ...}
    """
    positions = compared_positions(kinship.stream_J)
    units = {}
    for mine, theirs in progress(list(kinship.layers.items()), "match units"):
        if theirs is None:
            continue
        # Three matrices of each side are in memory, then four. A head has so many rows
        # that a quarter of the positions is enough to know it, and takes less time.
        neurons = match_neurons(target.rows(mine, "neurons"),
                                source.rows(theirs, "neurons"), positions,
                                kinship.slack)
        here = {axis: target.rows(mine, axis) for axis in ("heads", "groups")}
        there = {axis: source.rows(theirs, axis) for axis in ("heads", "groups")}
        some = Positions(positions.target[::4], positions.source[::4])
        rows = match_attention(here, there, some, kinship.slack)
        units[mine] = {"neurons": neurons, **rows}
    return units


# === Write ==========================================================================
# --- Which tensor, with which rows and columns --------------------------------------
# Everything follows the units: a bias the rows of its matrix, a norm the stream, an
# embedding and a head the stream by their columns, the common vocabulary by their rows.
# What is not known to follow stays the target's, and is named: better a number that is
# not merged than one that is merged with a stranger.
class Brought(NamedTuple):
    """How a tensor of the target is read from the source. Both are matrices here; what
    is a vector is a matrix of one row.
    Equation:  W~[j, k] = W_source[row[j], column[k]], where neither is -1
    Example:   a bias of 3 neurons, of which the source has two: width 2, row [0],
               column [1, 0, -1]"""
    source: str             # its name there
    width: int              # its columns there
    row_J: torch.Tensor
    column_K: torch.Tensor

    @property
    def whole(self):
        """Nothing in it is the target's own."""
        return bool((self.row_J >= 0).all() and (self.column_K >= 0).all())


def pair_tensors(target, source, layers):
    """{target name: source name}.

    Args:     target, source: Layers; layers: of their Kinship
    Example:  with layers {0: 0, 1: None, 2: 1}:
              model.layers.2.mlp.up_proj.weight -> model.layers.1.mlp.up_proj.weight
              Layer 1 is not in it, nor are other stacks of layers: they meet nobody
    """
    # pair_names asks this for any two stacks of layers that pair by name.
    def partners_of(target_stack, source_stack):
        if target_stack != target.named:
            return {}
        return {mine: theirs for mine, theirs in layers.items() if theirs is not None}

    pairs = pair_names(places_of(target.checkpoint), places_of(source.checkpoint),
                       partners_of)
    # The embedding; and a head that repeats it, which must go on doing so.
    for name in target.tied:
        pairs[name] = source.embedding.name
    return pairs


def axes_of(entry, layers):
    """What a tensor's rows and columns stand for, by its role. None: it is not known.

    Returns:  a tuple of axes: those of AXES; tokens, the vocabulary; fixed, what stands
              in one order in every model (positions, classes, the numbers in a head)
    Example:  q_proj.weight -> (heads, stream);  q_proj.bias -> (heads,)
              embed_tokens.weight -> (tokens, stream);  input_layernorm -> (stream,)
    """
    role = role_of(entry)
    shape = entry.shape
    sizes = {"stream": layers.stream, "tokens": layers.embedding.shape[0]}
    inside = entry.place.stack == layers.stack and entry.place.layer is not None
    if inside:
        sizes |= layers.sizes(entry.place.layer)
    elif entry.place.layer is not None or entry.place.rest.startswith(layers.foreign):
        return None                     # of another tower, with a stream of its own

    # First the roles: which axes should this tensor have?
    if entry.name in layers.tied:
        axes = ("tokens", "stream")
    elif role == "norm":
        shape = (entry.numel,)          # some are stored as (heads, numbers in a head)
        axes = (norm_axis(entry, sizes),)
    elif role in AXES and inside:
        axes = AXES[role]
    elif role in ("embed", "head") and shape[:1] == (sizes["tokens"],):
        axes = ("tokens", "stream")
    elif role in ("embed", "head"):
        axes = ("fixed", "stream")
    else:
        return None
    if not 1 <= len(shape) <= 2:
        return None
    # Then the shape: does it have them? A bias has the first one, its matrix's rows.
    axes = axes[:len(shape)]
    for axis, length in zip(axes, shape):
        if sizes.get(axis, length) != length:
            return None
    return axes


def norm_axis(entry, sizes):
    """What a norm scales: one of AXES, or `fixed`, the numbers in a head.

    Args:     sizes   {axis: its length} in the norm's layer
    Example:  input_layernorm, and the last norm of a model: the stream
              q_norm: all heads (OLMo-2), or one, whose gains all heads share (Qwen3)
    """
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
    ours:     norms are brought where widths are equal. The gains of a grown model
              differ by a factor, since its mean square is over more numbers
    """
    pairs = pair_tensors(target, source, kinship.layers)
    brought = {}
    own = {}
    for name, entry in target.checkpoint.entries.items():
        other = source.checkpoint.entries.get(pairs.get(name))
        if other is None or not (entry.is_float and other.is_float):
            own[name] = "without a partner"
            continue
        # What has a partner is brought, unless one of these speaks against it.
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
    """The Brought of one tensor.

    Args:     entry, other   of the target and of the source
              axes           of both, as axes_of says
              index          {axis: the source's index of each of the target's}. An axis
                             that is not in it (tokens, fixed) stands in the same order
                             in both: it is common as far as the source goes
    """
    # A vector: its only axis is that of the columns, of one row.
    if len(axes) == 1:
        one_row = torch.zeros(1, dtype=torch.long)
        column_K = index.get(axes[0], common_index(entry.numel, other.numel))
        return Brought(other.name, other.numel, one_row, column_K)
    row_J = index.get(axes[0], common_index(entry.shape[0], other.shape[0]))
    column_K = index[axes[1]]
    return Brought(other.name, other.shape[1], row_J, column_K)


# --- Reading and writing ------------------------------------------------------------
# The target's numbers are read, the source's are put over them, and what results is
# written in the target's dtype: matrix by matrix in the layers, and the vocabulary in
# pieces of rows. So memory does not depend on the number of layers or of tokens.
def read_matched(target, source, name, brought, start, stop):
    """Rows [start, stop) of a tensor of the target, with the source's numbers where row
    and column have a partner.

    Args:     target, source: Checkpoints; the Brought of this tensor
    Returns:  (stop - start, K), in the arithmetic of the target's dtype
    Example:  row [1, -1], column [0, -1]; source [[1], [2]], target [[7, 8], [4, 5]]:
              [[2, 8], [4, 5]]
    """
    K = len(brought.column_K)
    width = brought.width
    exact = wide(target.entries[name].dtype)        # all that it can store is in it
    own_JK = target.read(name, start * K, stop * K).to(exact).view(-1, K)
    # Which rows have a partner, and so are read from the source?
    row_J = brought.row_J[start:stop]
    known_J = row_J >= 0
    if not known_J.any():
        return own_JK
    # All rows from the first to the last of these are read. In a layer this is most of
    # the matrix, in the vocabulary just what is asked for.
    first = row_J[known_J].min().item()
    last = row_J.max().item()
    block = source.read(brought.source, first * width, (last + 1) * width)
    block = block.to(exact).view(-1, width)         # (last + 1 - first, width)
    # Where nobody is a partner, any row and column will do: it is not used.
    rows = block.index_select(0, (row_J - first).clamp(min=0))
    theirs_JK = rows.index_select(1, brought.column_K.clamp(min=0))
    known_JK = known_J[:, None] & (brought.column_K >= 0)
    return torch.where(known_JK, theirs_JK, own_JK)


def write_matched(output, target, source, brought, progress=quiet):
    """Fill an Output that has the target's entries.

    Args:     target, source   Checkpoints
              brought          {name: Brought}; all other tensors are the target's own
    Raises:   CheckpointError if a number does not fit the target's dtype: never an Inf
    """
    for name, entry in progress(list(target.entries.items()), "write"):
        # The target's own: byte for byte, whatever its dtype.
        if name not in brought:
            for start, stop in spans(entry.numel):
                output.put(name, start, target.read(name, start, stop))
            continue
        J = len(brought[name].row_J)
        K = len(brought[name].column_K)
        step = J                        # rows at a time: a whole matrix,
        if entry.place.layer is None:
            step = max(1, PIECE // K)   # or a piece of the vocabulary
        for start, stop in spans(J, step):
            rows_JK = read_matched(target, source, name, brought[name], start, stop)
            piece_L = rows_JK.to(entry.dtype).view(-1)
            # 70,000 does not fit float16, which ends at 65,504.
            fits = piece_L.double().sum().isfinite()
            need(fits, source.path, "has numbers that do not "
                 f"fit the target's {entry.dtype}", "store the target wider", name)
            output.put(name, start * K, piece_L)


# --- Several sources by one match ---------------------------------------------------
# An expert has drifted from its base, and by itself might match the target a little
# differently. If both are to be compared afterwards (task arithmetic merges their
# difference), they must be brought by one and the same match: that of the base.
#
#     python experiments/tools/match.py pruned base expert -o matched
#     python merge.py pruned matched/expert.safetensors --operator task-arithmetic \
#         --base matched/base.safetensors
def check_same_order(first, other, force):
    """Refuse a further source whose units do not stand as the first one's do: by the
    first one's match its numbers would come into disorder.

    Args:     first, other: Layers; force: look at the shapes only
    Raises:   CheckpointError, by the first matrix that has no like, or is not alike
    ours:     the cosine of each matrix with its like: 0.9 for experts of one base, 0 if
              anything stands in another order. Each matrix is judged by itself: among
              many that are alike, one layer of shuffled neurons would not show
    """
    # The same layers, in each the same matrices, and these alike as they stand.
    alone = f"match it by itself: {first.checkpoint.path} says nothing of its order"
    need(other.numbers == first.numbers, other.checkpoint.path, "has other layers than "
         f"{first.checkpoint.path}", alone)
    for number, entries in other.entries.items():
        for role, entry in entries.items():
            like = first.entries[number].get(role)
            need(like and like.shape == entry.shape, entry.file, "has no like of its "
                 f"shape in {first.checkpoint.path}", alone, entry.name)
            value = mean_cosine(first.checkpoint, other.checkpoint,
                                [(like.name, entry.name)])
            same = force or not value <= RELATED
            need(same, entry.file, "does not stand in the order of "
                 f"{first.checkpoint.path}", alone, entry.name)


# === The command ====================================================================
def stem(path):
    """A model's name: that of its file or folder, without an ending.
    Example:  'models/base.safetensors' -> 'base'
              'SmolLM2-135M/' -> 'SmolLM2-135M'"""
    name = os.path.basename(os.path.normpath(path))
    return name.removesuffix(".index.json").removesuffix(".safetensors")


def parse(argv):
    """The arguments. What the command line alone decides is refused here, with exit
    code 2; what depends on files, by all that follows, with exit code 1."""
    parser = Parser(prog="match.py", description="Bring relatives of another shape, or "
                    "of another order of hidden units, to the target.")
    # Of the contract: what each flag promises is in the text that --help prints.
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
    # What is wrong without a look at any file.
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
    """Refuse what cannot be written, before any work.

    Returns:  the Destination of one source's result; None for several, and for none
    Raises:   CheckpointError if an output exists (--force replaces it), is an input, or
              cannot be made
    """
    result = None
    held = None
    if a.output and len(sources) > 1:
        held = [f"{stem(source.path)}.safetensors" for source in sources]
    elif a.output:
        result = Destination(target, a.output)
        held = result.files
    # No output may be an input, nor stand in another output's way.
    others = list(target.files)
    for source in sources:
        others += source.files
    if a.output:
        check_output(a.output, others, a.force, folder=held)
        others.append(a.output)
    if a.report:
        check_output(a.report, others, a.force, "--report")
    return result


def print_kinship(target, source, kinship):
    """Related or not, and a line per layer: target <- source, and their cosine.
    Example:
        pruned is related to base: 3 of 4 layers have a partner (cosine of strangers:
        0.147)
          layer 0 <- 0  0.994
          layer 1 <- 1  0.993
          layer 2 <- 2  0.991
          layer 3 <- none  0.243
    """
    # The verdict, with how many layers it rests on; then each layer's own evidence.
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
    """What was brought along, and what was not: of the target, and of the source.
    Example:
        grown: 29 of 38 tensors are brought, 0 in part
          the target's own, norms of another width: 9, the first is model.norm.weight
          not used of the source: layer 2, layer 5, model.norm.weight
    """
    # Of the target: how much is brought, and why the rest is not.
    partly = [name for name in brought if not brought[name].whole]
    say(f"{stem(source.checkpoint.path)}: {len(brought)} of "
        f"{len(target.checkpoint.entries)} tensors are brought, {len(partly)} in part")
    for why in dict.fromkeys(own.values()):
        names = [name for name in own if own[name] == why]
        say(f"  the target's own, {why}: {len(names)}, the first is {names[0]}")
    # Of the source: what found no place in the target.
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
    """--report: kinship, one record per source. Keys are stable, numbers finite, and
    there are no paths, which mean nothing elsewhere.
    Example:
        {"version": 1, "target": "base", "kinship": [
         {"source": "pruned", "related": true, "layers": [0, 1, 2, null],
          "similarity": [0.994, 0.993, 0.991, 0.243], "null": 0.147}]}
    """
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


def write_all(a, result, pairs, plans, progress):
    """Every source in the target's order. It appears whole, or not at all.

    Args:     result  the Destination, for one source
              pairs   (target Layers, source Layers) of each source; with several the
                      result is a folder with a file for each
              plans   of plan_tensors, one for each
    """
    target = pairs[0][0].checkpoint
    entries = target.entries.values()
    # Several sources: a file for each, in a folder that appears when all are written.
    # What does not come to its end (a full disk, Ctrl-C) leaves nothing behind.
    if len(pairs) > 1:
        with appear(a.output, a.force) as folder:
            os.mkdir(folder)
            for (_, source), (brought, _) in zip(pairs, plans):
                name = f"{stem(source.checkpoint.path)}.safetensors"
                with create(os.path.join(folder, name), entries) as output:
                    write_matched(output, target, source.checkpoint, brought, progress)
        return
    # One source: a file, or a folder in which the target's companions lie beside it.
    source = pairs[0][1].checkpoint
    brought, _ = plans[0]
    card = (f"`{stem(source.path)}` in the order, shapes and names of "
            f"`{stem(target.path)}`, by `experiments/tools/match.py` of lsmerge.\n")
    with create(result.path, entries, inside=result.weights, force=a.force) as output:
        result.fill(os.path.dirname(output.path), card)
        write_matched(output, target, source, brought, progress)


def main(argv=None):
    """The command, straight down: open and check; who is related; match; write.

    With -o the first source's match serves all. Without, each source is looked at by
    itself, and may have any shape. A stranger as the first source ends the run: with -o
    nothing at all is written then; without, the report is, as it was asked for.
    """
    a = parse(argv)
    # Open, and refuse what headers and paths show.
    target = Checkpoint(a.target)
    sources = [Checkpoint(path) for path in a.sources]
    result = check_outputs(a, target, sources)
    pairs = [open_layers(target, source) for source in sources]

    def progress(things, label):
        return tqdm(things, desc=label, leave=False, disable=a.quiet or None)

    # Who is related, and which layer is which. What holds for one match of several
    # sources is the first one's order; the cosines are each one's own.
    check_finite(pairs[0][0], progress)
    first = None
    kinships = []
    for pair in pairs:
        one_match = a.output and first          # for all
        if one_match:
            check_same_order(pairs[0][1], pair[1], a.force)
        check_finite(pair[1], progress)
        kinship = find_kinship(*pair, a.seed, progress)
        if one_match:
            kinship = kinship._replace(layers=first.layers, stream_J=first.stream_J,
                                       same_tokens=first.same_tokens)
        print_kinship(*pair, kinship)
        kinships.append(kinship)
        first = first or kinship
    if a.report and not a.output:
        write_report(a, pairs, kinships)
    need(first.related or a.force, a.sources[0], f"is no relative of {a.target}: its "
         f"cosine is {max(first.similarity):.3f}, that of strangers {first.null:.3f}",
         "give a model that was made from it, or from the same one")
    if not a.output:
        return

    # The units of the first source; and with them all tensors of every source.
    units = match_units(*pairs[0], first, progress)
    plans = []
    for pair, kinship in zip(pairs, kinships):
        plans.append(plan_tensors(*pair, kinship, units))
        print_plan(*pair, kinship, *plans[-1])
    write_all(a, result, pairs, plans, progress)
    if a.report:
        write_report(a, pairs, kinships)
    say(f"wrote {a.output}")


if __name__ == "__main__":
    # On a machine that is not idle, two threads took four times as long as one.
    torch.set_num_threads(1)
    sys.exit(command(main))
