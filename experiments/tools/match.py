"""match.py: relatives of another shape, or of another order, made mergeable.

    python experiments/tools/match.py TARGET SOURCE                 # are they related?
    python experiments/tools/match.py TARGET SOURCE -o OUT          # then write SOURCE
    python experiments/tools/match.py TARGET BASE EXPERT -o FOLDER  # one match for both

A chunk of a flattened matrix means nothing outside its own model's order of hidden
units. Shuffle the neurons of an MLP, the heads of an attention, the positions of the
residual stream: the model computes the same function, and yet its weights, read as
they stand, have nothing in common with what they were. For neurons, with a permutation
matrix S and an activation that works number by number:

    W_down S^T act(S W_up x) = W_down act(W_up x)

A pruned or a grown model is shuffled in this sense, too: behind each missing neuron
everything has moved. So, before weights are averaged, somebody must say which unit is
which. Of relatives (one was made from the other, or both from a third) the weights say
it, since they still resemble each other. Between strangers there is nothing to say.

    match    weights -> which unit of the source is which of the target
               find_stream      the order of the residual stream, from the embeddings
               compare_layers   how alike are two layers, and how alike are strangers?
               find_kinship     the best source layer of each target layer; the verdict
               match_units      neurons and heads of each pair of layers
    write    the source's numbers in the target's order, shapes, names and dtypes
               plan_tensors     which tensor is brought (written with the source's
                                numbers), and with which of its rows and columns
               read_matched     its rows; where nobody is a partner, the target's own
               doubts           what may make the result another function: warnings

What is written merges with the target by merge.py, or by any other tool, as equal
shapes do. An example, with neurons as rows:

    source  b [5 1]      target  a [2 9]      written  a [2 9]    nobody's: the target's
            c [0 7]              c [1 8]               c [0 7]
                                 b [4 1]               b [5 1]

Exit code 0: done. 1: the source is no relative (nothing is written, --force writes all
the same), or something is wrong with a file. 2: something is wrong with the command.
Cost, with one thread: 135 M weights 15 s, 0.5 B weights 35 s. Memory is that of a pair
of layers: 1.9 GB in all for one of 14,336 neurons and a stream of 4,096.

Suffixes of names: J of the target and I of the source, be it layers, neurons, groups or
positions; H and K heads in a group; P compared positions of the stream; U numbers that
stand for a unit; N units of either side, B a block of them; V tokens; L a flat piece.
In `write`, J and K are rows and columns of a tensor. An index_J holds the source's
index of each of the target's, -1 where there is none: [-1, 1, 0] in the example above.

Paper: Sec. 3.3 merges across shapes by chunks alone. ours: weights are matched first,
       of relatives only. To find one order of units from another is known for equal
       shapes (Ainsworth et al. 2022, "Git Re-Basin"). Here either side may have more
       units, and layers may be missing, repeat, or stand in another order.
Not here: mixtures of experts and fused projections (refused by name); vision towers
       (they stay the target's); another order of the numbers within a head, as rotary
       positions have in other libraries (a warning); what only activations would show.
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
# Of these, `need` raises a CheckpointError unless its condition holds; `spans` cuts a
# length into pieces; `wide` is the dtype to compute in, float32 or float64; `create`
# and `appear` give what is written its name only when it is complete; `called` is the
# name of a model without its path; `listed` puts * for the numbers of layers.
from align import pair_names, pair_stacks, stacks_of
from chunking import (PIECE, Checkpoint, Parser, appear, check_output, command,
                      create, need, say, spans, wide)
from lora import called, listed
from merge import RELATED, Destination, digest, float_places, mean_cosine

VERSION = 1             # of the report

# All that is known of architectures: the axes of each role's rows and columns. A fork
# adds a line. torch computes W x: rows are what a matrix writes, columns what it reads.
#   stream    the residual stream, which all layers share: one order for a whole model
#   neurons   of the MLP
#   heads     rows of the query heads
#   groups    rows of the key and value heads; several query heads may share one
# Example: SmolLM2-135M, with 9 query heads of 64 rows that share 3 key heads:
#   q, o (576, 576)   k, v (192, 576)   gate, up (1536, 576)   down (576, 1536)
AXES = {
    "q": ("heads", "stream"), "k": ("groups", "stream"), "v": ("groups", "stream"),
    "o": ("stream", "heads"),
    "gate": ("neurons", "stream"), "up": ("neurons", "stream"),
    "down": ("stream", "neurons")}
NEEDED = ("q", "k", "v", "o", "up", "down")     # an MLP without a gate is fine
# A norm scales the stream, unless its name says otherwise: Qwen3 and Phi have norms of
# queries and keys, BitNet has one before o and one before down.
NORM_AXES = [("heads", r"q_(layer_?)?norm|attn_sub_norm|inner_attn"),
             ("groups", r"k_(layer_?)?norm"),
             ("neurons", r"ffn_sub_norm")]

# A cosine up to this is no evidence. In the models of experiments/models a neuron has
# with its best partner 0.17 between strangers (0.33 at most), 0.99 between relatives.
# A few neurons above it make no relative: the mean over a layer has to exceed it.
SLACK = 0.3
# Neurons of a layer that tell which layer is which. Those of a relative have a partner
# each, so that few are enough.
SAMPLE = 32
# Rows that tell whether a matrix that is written is like the target's. The median of
# their cosines is that of most rows, whatever a few hold.
ROWS = 16
# Tokens of the vocabulary that tell which position of the stream is which: by chance,
# columns of 4096 random numbers have cosines of 0.016.
TOKENS = 4096
# Positions of the stream at which units are compared. Three matrices then give a neuron
# 768 numbers. The cosines of strangers have a spread of 1 / sqrt(768) = 0.036; of all
# pairs of 14,336 neurons the largest is about 0.2. Twice as many take twice the time.
POSITIONS = 256
# Rows of a head that come into question, the largest first. With less than eight, one
# unit would often be taken for another.
HEAD_SIZES = range(256, 7, -1)
# Neurons that are compared with all others at a time: 59 MB for 14,336 others.
BLOCK = 1024
OTHER = "match models whose q, k, v, o, up and down are matrices of their own"


def quiet(things, label):
    """No progress bar, for functions that are called from Python; the command passes
    one that draws. things: what a loop goes through; label: what the bar is called."""
    return things


# === Match ==========================================================================
# --- What a model is, for matching --------------------------------------------------
# An embedding, and layers of q, k, v, o and an MLP. Headers say so: what does not fit
# is refused before any layer is read, by file and tensor.
class Layers:
    """The numbered layers of a checkpoint, with their matrices by role.

    numbers    of the layers, as they stand in the names, sorted
    named      {number: {(rest of the name, role): name}}, all their tensors
    entries    {number: {role: Entry}}, their matrices that have a line in AXES
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
        # {stack: {number: {(rest of the name, role): name}}} of all that can be merged.
        stacks = stacks_of(float_places(checkpoint))
        self.named = stacks.pop(stack)
        # But for a stack around ours: 'model.0' beside 'model.layers.0'.
        self.foreign = tuple(apart(stack, other) for other in stacks
                             if not stack.startswith(f"{other}."))
        self.numbers = sorted(self.named)
        self.entries = {}
        for number, names in self.named.items():
            self.entries[number] = matrices_by_role(checkpoint, number, names.values())
        # q reads the stream: it is as wide as q has columns.
        self.stream = self.entries[self.numbers[0]]["q"].shape[1]
        self.embedding = word_embedding(checkpoint, self.stream)
        check_shapes(self)
        # A head that repeats the embedding has the same fingerprint.
        self.tied = []
        own = digest(checkpoint, self.embedding)
        for name, entry in checkpoint.entries.items():
            if entry.place.layer is None and digest(checkpoint, entry) == own:
                self.tied.append(name)

    def sizes(self, number=None):
        """{axis: its length} outside the layers, or in one; layers may differ.
        Example:  SmolLM2-135M: tokens 49152, stream 576, neurons 1536, heads 576,
                  groups 192"""
        found = {"tokens": self.embedding.shape[0], "stream": self.stream}
        if number is not None:
            for axis, role in (("neurons", "up"), ("heads", "q"), ("groups", "k")):
                found[axis] = self.entries[number][role].shape[0]
        return found

    def rows(self, number, axis):
        """{role: matrix} of a layer, with this axis as rows and the stream as columns.
        Example:  of the neurons: gate, up, and the transpose of down"""
        found = {}
        for role, entry in self.entries[number].items():
            if AXES[role][0] == axis:
                found[role] = self.checkpoint.read_tensor(entry.name)   # (N, stream)
            elif AXES[role][1] == axis:
                found[role] = self.checkpoint.read_tensor(entry.name).T     # turned so
        return found

    def holds(self, entry, numbers):
        """Whether a tensor is of one of these layers."""
        return entry.place.stack == self.stack and entry.place.layer in numbers


def apart(stack, other):
    """How the names of the tower of another stack begin: with what both stacks have in
    common, and one part more.
    Example:  'model.language_model.layers' and 'model.visual.blocks'
              -> 'model.visual.', and so 'model.visual.norm.weight' is of that tower"""
    parts = other.split(".")
    common = os.path.commonprefix([stack.split("."), parts])
    return ".".join(parts[:len(common) + 1]) + "."


def role_of(entry):
    """The role of a weight, or of the bias that goes with it: 'q.bias' -> 'q'."""
    return entry.place.role.removesuffix(".bias")


def matrices_by_role(checkpoint, number, names):
    """{role: Entry} of the matrices that AXES knows, among the tensors of one layer.

    Raises:   CheckpointError if one of NEEDED is lacking. If there is another matrix (a
              fused projection, an expert's), that is the one to name
    Example:  {'q': Entry of model.layers.0.self_attn.q_proj.weight, 'k': ...}
    """
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
    """The Entry of the largest embedding: that of words, not of positions.

    Raises:   CheckpointError if it is not a matrix as wide as the stream: through a
              projection between the two (OPT-350m) no order can be followed
    Example:  GPT-2: of words (50257, 768), not of positions (1024, 768)
    """
    found = []
    for entry in checkpoint.entries.values():
        outside = entry.place.layer is None     # of the numbered layers
        if outside and entry.place.role == "embed" and entry.is_float:
            found.append(entry)
    need(found, checkpoint.path, "has no embedding to tell the stream's order", OTHER)
    largest = max(found, key=lambda entry: entry.numel)
    fits = largest.numel > 0 and largest.shape[1:] == (stream,)
    what = f"has shape {largest.shape}; the layers ask for {stream} columns"
    need(fits, largest.file, what, OTHER, largest.name)
    return largest


def check_shapes(layers):
    """Refuse matrices that do not fit together, before any of them is read.
    Example:  up (1536, 576) with down (576, 1408): one of them is wrong, and named"""
    for number, entries in layers.entries.items():
        sizes = layers.sizes(number)
        for role, entry in entries.items():
            row, column = AXES[role]
            expected = (sizes[row], sizes[column])
            what = f"has shape {entry.shape}; {expected} would go with its layer"
            need(entry.shape == expected, entry.file, what, OTHER, entry.name)
        # Query heads share key heads evenly. Otherwise no head of q would know which
        # keys are its own. Example: 576 rows of q, 192 of k: three share one.
        whole = sizes["heads"] % sizes["groups"] == 0
        need(whole, layers.checkpoint.path, "has rows that those of q cannot share",
             OTHER, entries["k"].name)


def open_layers(target, source):
    """(target Layers, source Layers) of two Checkpoints.

    Raises:   CheckpointError if no stacks of layers pair by name, or as Layers does
    ours:     of those that pair, it is the one that holds the most weights of the
              target. Others (a vision tower) are not matched
    """
    mine = stacks_of(float_places(target))
    pairs = pair_stacks(mine, stacks_of(float_places(source)))
    need(pairs, source.path, f"no layers pair by name with those of {target.path}",
         OTHER)
    weights = dict.fromkeys(pairs, 0)
    for entry in target.entries.values():
        if entry.place.stack in pairs:
            weights[entry.place.stack] += entry.numel
    stack = max(weights, key=weights.get)
    return Layers(target, stack), Layers(source, pairs[stack])


def check_finite(layers, progress=quiet):
    """Refuse NaN and Inf in whatever may be compared or brought, by file and tensor: a
    cosine with them is NaN, and so no evidence of anything. What is only copied need
    not be finite (GPT-NeoX keeps a mask of -inf)."""
    checkpoint = layers.checkpoint
    for entry in progress(list(checkpoint.entries.values()), "check"):
        if not entry.is_float or axes_of(entry, layers) is None:
            continue
        need(entry.dtype.itemsize > 1, entry.file, f"is {entry.dtype}, with which "
             "torch hardly computes", "save it as bfloat16", entry.name)
        for start, stop in spans(entry.numel):
            piece_L = checkpoint.read(entry.name, start, stop).to(wide(entry.dtype))
            # In one sum every NaN and Inf shows.
            need(piece_L.sum().isfinite(), entry.file, "holds NaN or Inf, or numbers "
                 f"too large to add up, in elements {start} to {stop}",
                 "repair or re-export it", entry.name)


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


def directions(rows):
    """Every row divided by its length, in float32: two rows of it multiply to their
    cosine. A row of zeros stays zero.
    Equation:  d = r / |r|, for each row r; the shape stays
    ours:      by its largest number first: squares of 1e-30 are 0 in float32, those of
               1e30 are infinite
    Example:   [[3e30, 4e30]]: [[.6, .8]]"""
    exact = rows.to(wide(rows.dtype))
    largest = exact.abs().amax(1, keepdim=True)                     # (rows, 1)
    scaled = exact / largest.masked_fill(largest == 0, 1)           # now 1 at most
    return normalize(scaled.float(), dim=1)


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
    Example:   two neurons, P = 2: gate [3, 4] and up [0, 2]; gate [4, 3] and up [0, 7]
               [.6, .8, 0, 1] / sqrt(2)  and  [.8, .6, 0, 1] / sqrt(2)
               their product is 0.98, the mean of the cosines .96 of gate and 1 of up
    """
    parts = []
    for role in roles:
        part = rows[role][:, positions_P]                               # (N size, P)
        parts.append(directions(part.reshape(len(part) // size, -1)))   # (N, size P)
    # Each part has length 1: R of them have length sqrt(R), and 1 after the division.
    return torch.cat(parts, dim=1) / math.sqrt(len(roles))


def keep_above(cosine_JI, slack):
    """The cosines above the slack, as a sparse (J, I) matrix. All others are no
    evidence, and what exactly they are does not matter: a unit that has no better
    partner stays alone.
    Example:   [[.9, .2], [.1, .5]], slack .3: .9 at (0, 0) and .5 at (1, 1)"""
    j, i = (cosine_JI > slack).nonzero(as_tuple=True)       # where they stand
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
    # for that. So there always is an assignment of all j. For slack .3:
    #     [.9  .8 | .3   .]       a dot: no such pair
    #     [.7   . |  .  .3]
    alone_JJ = slack * scipy.sparse.identity(J)
    cost = scipy.sparse.hstack([strong_JI, alone_JJ], format="csr")     # (J, I + J)
    # The solver minimises, and takes 0 for no pair; 2 - cosine is never 0. All J are
    # assigned, so that the least sum, 2 J - sum of cosines, has the greatest cosines.
    cost.data = 2 - cost.data
    _, column_J = min_weight_full_bipartite_matching(cost)
    index_J = torch.from_numpy(column_J).long()
    return index_J.masked_fill(index_J >= I, -1)        # from I on: alone


# --- The residual stream ------------------------------------------------------------
# All layers read and write it, in one order of positions for the whole model, and so
# does the embedding. There the order shows, without any layer: each token writes to all
# of the positions, and tokens have the same numbers in both models.
def match_stream(embedding_VJ, embedding_VI):
    """The order of the residual stream, from embeddings of the same V tokens (the
    target's, the source's): what a position holds of all tokens tells which it is.

    Equation:  t = e / |e| for each row e;  cosine of the columns of t - mean of t
    Returns:   (J,): the source's position of each of the target's, or -1
    ours:      cosines of columns, after every token has got length 1 and every column
               mean 0. Tokens that were never trained share one large vector, which
               drifts: with these two steps 128 of 128 positions are found, without 111
    Example:   tokens [3, 4] and [4, 3] of the target, [4, 3] and [3, 4] of the source
               t: [.6, .8] and [.8, .6]; its columns less their mean: [-.1, .1], [.1,
               -.1]; the source has these two in the other order: [1, 0]
    """
    columns = []
    for embedding in (embedding_VJ, embedding_VI):
        # Scaled by its length no token outweighs others; centred, a column no longer
        # holds what all tokens share.
        token = directions(embedding)                           # (V, stream)
        columns.append(directions((token - token.mean(0)).T))   # (stream, V)
    target_JV, source_IV = columns
    return assign(strong_cosines(target_JV, source_IV, SLACK), SLACK)


def find_stream(target, source):
    """`match_stream` of two models (Layers), by the tokens that both have.

    Returns:   (J,), and whether the embeddings show it, so that tokens are the same
    ours:      if half of the positions find nobody, they do not. The stream is then
               taken as it stands: a relative with a new vocabulary is found, and
               strangers are strangers in any order
    """
    V = min(target.embedding.shape[0], source.embedding.shape[0])
    stream_J = match_stream(some_tokens(target, V), some_tokens(source, V))
    found = (stream_J >= 0).sum().item()
    # Half, and not all: a position may have drifted beyond recognition.
    if found >= min(target.stream, source.stream) / 2:
        return stream_J, True
    return common_index(target.stream, source.stream), False


def some_tokens(layers, vocabulary):
    """Some rows of the embedding, evenly spread over the first `vocabulary` ones, which
    both models have.
    Returns:   (V, stream), V at most TOKENS
    Example:   49,152 tokens: every twelfth"""
    width = layers.stream
    tokens = []
    step = math.ceil(vocabulary / TOKENS)
    for row in range(0, vocabulary, step):
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
    known = (stream_J >= 0).nonzero()[:, 0]         # the target's that have a partner
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
    Example:   three neurons with best cosines .9, 1 and .8: similarity .9. Shuffled,
               they find .2, .1 and .3: null .2
    """
    # By the first layer: most models have equal layers, and if not, it is a matter of
    # how far the numbers lie apart, not of the verdict.
    target_neurons = target.sizes(target.numbers[0])["neurons"]
    source_neurons = source.sizes(source.numbers[0])["neurons"]
    if target_neurons > source_neurons:
        turned = Positions(positions.source, positions.target)
        similarity_IJ, null = compare_layers(source, target, turned, seed, progress)
        return similarity_IJ.T, null
    # The matrices that every layer of both models has: gate may be lacking.
    roles = []
    for role in ("gate", "up", "down"):
        entries = [*target.entries.values(), *source.entries.values()]
        if all(role in found for found in entries):
            roles.append(role)
    # The sample as it is, and behind it shuffled, each row by itself. That keeps how
    # large and how uneven the numbers are, and so what their best cosine is by chance.
    generator = torch.Generator().manual_seed(seed)
    sample = sample_neurons(target, positions.target, roles)
    for role, real in sample.items():                               # (J SAMPLE, P)
        order = torch.rand(real.shape, generator=generator).argsort(1)
        sample[role] = torch.cat([real, real.gather(1, order)])     # (2 J SAMPLE, P)
    # The sample holds the compared positions only: all its columns are compared.
    all_P = torch.arange(len(positions.target))
    sample_NU = unit_vectors(sample, all_P, roles)                  # N = 2 J SAMPLE

    # Each neuron's best cosine in each layer of the other model. The mean over the
    # neurons of a layer is how alike the two layers are.
    columns = []
    for number in progress(source.numbers, "compare layers"):
        unit_KU = unit_vectors(source.rows(number, "neurons"), positions.source, roles)
        best_N = (sample_NU @ unit_KU.T).amax(1)                    # of K neurons
        columns.append(best_N.view(2, -1, SAMPLE).mean(2))          # (2, J)
    similarity_JI, null_JI = torch.stack(columns, dim=2)            # (2, J, I)
    return similarity_JI, null_JI.mean().item()


def sample_neurons(layers, positions_P, roles):
    """Neurons of each layer, evenly spread over it, layer after layer.
    Returns:   {role: (layers SAMPLE, P)}. Some neurons come twice where a layer has
               fewer than SAMPLE
    Example:   SmolLM2-135M: of 30 layers 32 neurons each (numbers 0, 49, 99, ..., 1535)
               at 256 positions, gate, up and down: (960, 256) each"""
    found = {role: [] for role in roles}
    for number in layers.numbers:
        rows = layers.rows(number, "neurons")
        some = torch.linspace(0, len(rows["up"]) - 1, SAMPLE).long()
        for role in roles:
            found[role].append(rows[role][some][:, positions_P])
    return {role: torch.cat(parts) for role, parts in found.items()}


class Kinship(NamedTuple):
    """Whether two models are related, and how layers and stream of the one stand in the
    other. Layers are called by their numbers in the names."""
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


def find_kinship(target, source, seed=0, progress=quiet, first=None):
    """The Kinship of two models, from weights alone.

    Args:     target, source: Layers; seed: of the shuffled neurons
              first: the Kinship of another source, in whose order this one stands: then
              its stream and its layers hold here, and only the cosines are measured
    Source:   ours. Strangers of these shapes have the cosine `null`; twice that, and at
              least SLACK, is what a relative must exceed
    Example:  `base` and `grown` of experiments/models, which put two new layers among
              the four of base: related, layers {0: 0, 1: 1, 2: 3, 3: 4}, similarity
              0.998 each, null 0.155. `base` and `large`, trained apart: at most 0.19
    """
    # Where on the stream can layers be compared, and how alike are they there?
    stream_J, same_tokens = find_stream(target, source)
    if first:
        stream_J = first.stream_J
    positions = compared_positions(stream_J)
    similarity_JI, null = compare_layers(target, source, positions, seed, progress)
    slack = max(SLACK, 2 * null)
    # The most similar source layer of each. Layers may repeat and stand in any order:
    # models are made by stacking the layers of others, too.
    layers = dict.fromkeys(target.numbers)          # None until one is found
    similarity = similarity_JI.amax(1).tolist()
    met = 0
    for number, best, i in zip(target.numbers, similarity, similarity_JI.argmax(1)):
        if best > slack:
            layers[number] = source.numbers[i]
            met += 1
    # Half, and not all: a relative may have been made of parts of several models.
    related = met >= min(len(target.numbers), len(source.numbers)) / 2
    if first:
        layers = first.layers
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
    """Partners of neurons: any neuron may be any other's.

    Args:      {role: rows} of both layers; gate is compared if both have it
    Returns:   (J,): the source's neuron of each of the target's, or -1
    """
    roles = [role for role in target_rows if role in source_rows]
    unit_JU = unit_vectors(target_rows, positions.target, roles)
    unit_IU = unit_vectors(source_rows, positions.source, roles)
    return assign(strong_cosines(unit_JU, unit_IU, slack), slack)


def match_heads(target_rows, source_rows, positions, size, slack):
    """Partners of heads, if a head has `size` rows, as of whole units: rotary positions
    tie the numbers within a head together. First groups, by their keys, values and
    heads; then heads within a pair of groups, as they read the keys of their group.

    Args:      {"heads": {role: rows}, "groups": {role: rows}} of both layers
    Equation:  score[j, i] = (cosine of the groups j and i in k and v
                              + mean over their heads of the best cosine in q and o) / 2
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
    # As [group, head in it] of both sides: J groups of H heads, I groups of K. Heads
    # are counted group after group: with H = 2, head 3 is [1, 1].
    J, I = cosine_of["groups"].shape
    H = cosine_of["heads"].shape[0] // J
    K = cosine_of["heads"].shape[1] // I
    head_JHIK = cosine_of["heads"].view(J, H, I, K)

    # Each head's best partner in the other group, on average over the heads. On the
    # side with fewer heads, where all can have a partner, it is the larger number.
    by_target_JI = head_JHIK.amax(3).mean(1)        # (J, H, I), then its mean over H
    by_source_JI = head_JHIK.amax(1).mean(2)        # (J, I, K), then its mean over K
    by_heads_JI = torch.maximum(by_target_JI, by_source_JI)
    score_JI = (cosine_of["groups"] + by_heads_JI) / 2
    group_J = assign(keep_above(score_JI, slack), slack)

    # Within a pair of groups: head h of group j is head k of group i, counted i K + k.
    head_JH = torch.full((J, H), -1)
    total = 0.0
    for j, i in enumerate(group_J.tolist()):
        if i >= 0:
            inner_H = assign(keep_above(head_JHIK[j, :, i], slack), slack)  # of (H, K)
            head_JH[j] = torch.where(inner_H >= 0, i * K + inner_H, -1)
            total += score_JI[j, i].item()
    rows = {"heads": rows_of_heads(head_JH.flatten(), size),
            "groups": rows_of_heads(group_J, size)}
    return rows, total / min(J, I)


def rows_of_heads(index, size):
    """The rows of whole heads.
    Example:   heads [1, -1, 0] of size 2: rows [2, 3, -1, -1, 0, 1]"""
    rows = index[:, None] * size + torch.arange(size)               # (heads, size)
    return rows.masked_fill(index[:, None] < 0, -1).flatten()


def match_attention(target_rows, source_rows, positions, slack):
    """`match_heads` for the size that a head has, which no weights file says. Args and
    Returns as there, without the score.

    ours:      it is the largest that matches as well as the best. A smaller one would
               cut heads apart. A larger one takes two for one, and they match only
               where they happen to stand together. (SmolLM2-135M against itself in
               another order, sizes 192, 96, 64, 32: scores 0.2, 0.2, 1.0, 0.8)
    """
    # A size must divide the rows of q and of k, in both models: 576 and 192, of which
    # 192 is the greatest common divisor, leave 192, 96, 64, 48, 32, 24, 16, 12 and 8.
    # If it has no divisor in question (a layer of 4 rows), it is taken itself.
    lengths = []
    for side in (target_rows, source_rows):
        lengths += [len(side["heads"]["q"]), len(side["groups"]["k"])]
    shared = math.gcd(*lengths)
    sizes = [size for size in HEAD_SIZES if shared % size == 0] or [shared]
    tried = []
    for size in sizes:
        tried.append(match_heads(target_rows, source_rows, positions, size, slack))
    best = max(score for _, score in tried)
    for rows, score in tried:               # the largest size first
        if score >= 0.99 * best:            # as well as the best, but for noise
            return rows


def match_units(target, source, kinship, progress=quiet):
    """Neurons, heads and groups of every pair of layers. Only now is it decided who is
    who; until here samples were enough. A layer that repeats (a source layer that two
    target layers have as their partner) is matched twice, as its units may stand in
    another order each time.

    Returns:   {target layer: {axis: index of rows, -1 for none}}, without the layers
               that have no partner
    Example:   {0: {"neurons": (1536,), "heads": (576,), "groups": (192,)}, ...}
    """
    positions = compared_positions(kinship.stream_J)
    # A head has so many rows that a quarter of the positions is enough to know it, and
    # takes less time.
    some = Positions(positions.target[::4], positions.source[::4])
    units = {}
    for j, i in progress(list(kinship.met.items()), "match units"):
        neuron_J = match_neurons(target.rows(j, "neurons"), source.rows(i, "neurons"),
                                 positions, kinship.slack)
        target_heads = {axis: target.rows(j, axis) for axis in ("heads", "groups")}
        source_heads = {axis: source.rows(i, axis) for axis in ("heads", "groups")}
        rows = match_attention(target_heads, source_heads, some, kinship.slack)
        units[j] = {"neurons": neuron_J, **rows}
    return units


# === Write ==========================================================================
# --- Which tensor, with which rows and columns --------------------------------------
# Everything follows the units: a bias the rows of its matrix, a norm the stream, an
# embedding and a head the stream by their columns, the common vocabulary by their rows.
# What is not known to follow stays the target's, and is named: better a number that is
# not merged than one that is merged with a stranger.
ALONE = "without a partner"
UNKNOWN = "of unknown order"
UNFOUND = "whose units found no partner"
# Norms may keep the target's gains. What stays as it is for one of these reasons makes
# its layer one of two models' matrices: a warning.
MIXED = (ALONE, UNKNOWN, UNFOUND)


class Brought(NamedTuple):
    """How a tensor of the target is read from the source. Both are matrices here; what
    is a vector is a matrix of one row.
    Equation:  W_written[j, k] = W_source[row[j], column[k]], and W_target[j, k] where
               one of the two is -1
    Example:   a bias of 3 neurons, of which the source has two: width 2, row [0],
               column [1, 0, -1]"""
    source: str             # its name there
    width: int              # its columns there
    row_J: torch.Tensor     # the source's row of each row of the target, or -1
    column_K: torch.Tensor  # its column of each column, or -1

    @property
    def whole(self):
        """Nothing in it is the target's own."""
        return bool((self.row_J >= 0).all() and (self.column_K >= 0).all())


def pair_tensors(target, source, layers):
    """{target name: source name}, of two Layers.

    Args:     layers: {target layer: source layer}
    Example:  with layers {0: 0, 2: 1}:
              model.layers.2.mlp.up_proj.weight -> model.layers.1.mlp.up_proj.weight
              Layer 1 is not in it, nor are other stacks of layers: they meet nobody
    """
    # pair_names asks this for any two stacks of layers that pair by name. The target's
    # stack is told by what it holds.
    def partners_of(target_stack, source_stack):
        if target_stack != target.named:
            return {}
        return layers

    pairs = pair_names(float_places(target.checkpoint), float_places(source.checkpoint),
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
    place = entry.place
    inside = layers.holds(entry, layers.numbers)
    foreign = place.layer is not None or place.rest.startswith(layers.foreign)
    if foreign and not inside:
        return None                     # of another tower, with a stream of its own
    sizes = layers.sizes(place.layer)
    # First the role: which axes should this tensor have?
    role = role_of(entry)
    shape = entry.shape
    of_words = role in ("embed", "head") and shape[:1] == (sizes["tokens"],)
    if of_words or entry.name in layers.tied:
        axes = ("tokens", "stream")
    elif role in ("embed", "head"):
        axes = ("fixed", "stream")
    elif role == "norm":
        shape = (entry.numel,)          # some are stored as (heads, numbers in a head)
        axes = (norm_axis(entry, sizes),)
    elif role in AXES and inside:
        axes = AXES[role]
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
              differ by a factor, since its mean square is over more numbers. Tables
              of labels or positions are brought where both models have as many: the
              first of three labels need not be the first of five
    Example:  {"model.layers.0.mlp.up_proj.weight": Brought(...), ...},
              {"model.norm.weight": "norms of another width", ...}
    """
    pairs = pair_tensors(target, source, kinship.met)
    brought = {}
    own = {}
    for name, entry in target.checkpoint.entries.items():
        if name not in pairs:
            own[name] = ALONE
            continue
        # What has a partner is brought, unless one of these speaks against it.
        other = source.checkpoint.entries[pairs[name]]
        axes = axes_of(entry, target)
        if axes is None or axes != axes_of(other, source):
            own[name] = UNKNOWN
        elif role_of(entry) == "norm" and entry.shape != other.shape:
            own[name] = "norms of another width"
        elif axes[0] == "fixed" and entry.shape[0] != other.shape[0]:
            own[name] = "of another number of rows"
        elif axes[0] == "tokens" and not kinship.same_tokens:
            own[name] = "of another vocabulary"
        else:
            index = {"stream": kinship.stream_J, **units.get(entry.place.layer, {})}
            plan = order_of(entry, other, axes, index)
            if plan.row_J.max() < 0 or plan.column_K.max() < 0:
                own[name] = UNFOUND
            else:
                brought[name] = plan
    return brought, own


def order_of(entry, other, axes, index):
    """The Brought of one tensor.

    Args:     entry, other   of the target and of the source
              axes           of both, as axes_of says
              index          {axis: the source's index of each of the target's}. An axis
                             that is not in it (tokens, fixed) stands in the same order
                             in both: it is common as far as the source goes
    Example:  stream [1, 0] and neurons [2, -1, 0]
              up               rows [2, -1, 0], columns [1, 0]
              down             rows [1, 0], columns [2, -1, 0]
              bias of up       row [0], columns [2, -1, 0]
              embedding        rows [0, 1, ...], one per token, columns [1, 0]
    """
    # A vector: its only axis is that of the columns, of one row.
    if len(axes) == 1:
        one_row = torch.zeros(1, dtype=torch.long)
        column_K = index.get(axes[0], common_index(entry.numel, other.numel))
        return Brought(other.name, other.numel, one_row, column_K)
    # A matrix: rows may be of an axis without an index, columns never are.
    row_J = index.get(axes[0], common_index(entry.shape[0], other.shape[0]))
    return Brought(other.name, other.shape[1], row_J, index[axes[1]])


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
    exact = wide(target.entries[name].dtype)        # holds all that the dtype can
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
    # Where nobody is a partner, any row and column will do (0, for -1): not used below.
    rows = block.index_select(0, (row_J - first).clamp(min=0))      # (J, width)
    theirs_JK = rows.index_select(1, brought.column_K.clamp(min=0))
    known_JK = known_J[:, None] & (brought.column_K >= 0)
    return torch.where(known_JK, theirs_JK, own_JK)


def write_matched(output, target, source, brought, progress=quiet):
    """Fill an Output that has the target's entries.

    Args:     target, source   Checkpoints
              brought          {name: Brought}; all other tensors are the target's own
    Raises:   CheckpointError if numbers do not fit the target's dtype: never an Inf
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
            piece_L = rows_JK.to(entry.dtype).view(-1)          # row after row
            # float16 ends at 65,504, and a model of 1e-10 would be one of zeros there.
            fits = piece_L.double().sum().isfinite()
            fits = fits and (piece_L.any() or not rows_JK.any())
            need(fits, source.path, "has numbers that do not "
                 f"fit the target's {entry.dtype}", "store the target wider", name)
            output.put(name, start * K, piece_L)


# --- What may make the result another function --------------------------------------
def doubts(target, source, kinship, plan):
    """Warnings: what one of the models computes with and the other has no like of, and
    what was brought and is unlike the target's.

    Args:     target, source: Layers; their Kinship; what plan_tensors returned
    Example:  biases of q, k and v, of which the target has none; rows of q and k in
              another order within each head
    """
    brought, own = plan
    # What does one of the two compute with, and the other not? Of the source it is what
    # pairs with nothing; of the target what stays as it is in a layer that is brought.
    paired = pair_tensors(target, source, kinship.met).values()
    alone = []
    for name in computed_with(source, kinship.met.values()):
        if name not in paired:
            alone.append(name)
    for name in computed_with(target, kinship.met):
        if own.get(name) in MIXED:
            alone.append(name)
    # Units were told by all their matrices together. One of these may yet stand in an
    # order of its own.
    unlike = []
    for name in brought:
        cosine = likeness(target.checkpoint, source.checkpoint, name, brought[name])
        if cosine <= kinship.slack:
            unlike.append(name)
    warnings = []
    if alone:
        warnings.append(f"{listed(alone)}: only one of the two models computes with "
                        "that, or its units found no partner; the result is as the "
                        "target")
    if unlike:
        warnings.append(f"{listed(unlike)}: brought, and yet no more alike than "
                        "strangers (q and k may be in the order of another library's "
                        "rotary positions)")
    return warnings


def computed_with(layers, numbers):
    """Names of what these layers compute with, and of a head of the model's own."""
    names = []
    for name in float_places(layers.checkpoint):
        entry = layers.checkpoint.entries[name]
        head = entry.place.role == "head" and name not in layers.tied
        if head or layers.holds(entry, numbers):
            names.append(name)
    return names


def likeness(target, source, name, brought):
    """The median cosine of ROWS rows of a matrix that is brought with the target's own,
    over what has a partner. NaN for vectors, and for rows of zeros."""
    if len(target.entries[name].shape) < 2:
        return math.nan
    known_K = brought.column_K >= 0
    K = len(known_K)
    known = (brought.row_J >= 0).nonzero()[:, 0]
    # Evenly spread over all, so that these rows do not stand at one place of the heads.
    some = torch.linspace(0, len(known) - 1, ROWS).long()
    cosines = []
    for row in known[some].tolist():
        own = target.read(name, row * K, (row + 1) * K).view(1, K)
        new = read_matched(target, source, name, brought, row, row + 1)     # (1, K)
        both = directions(torch.cat([own, new])[:, known_K])    # (2, columns known)
        if both.any(1).all():               # a row of zeros has no direction
            cosines.append(both[0].dot(both[1]).item())
    return torch.tensor(cosines).nanmedian().item()


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
    need(other.numbers == first.numbers, other.checkpoint.path, "has other layers",
         alone)
    for number, entries in other.entries.items():
        for role, entry in entries.items():
            like = first.entries[number].get(role)
            fits = like is not None and like.shape == entry.shape
            need(fits, entry.file, "has no like of its shape", alone, entry.name)
            value = mean_cosine(first.checkpoint, other.checkpoint,
                                [(like.name, entry.name)])
            # NaN (of zeros) is not below anything: it says nothing against the order.
            same = force or not value <= RELATED
            need(same, entry.file, "stands in another order", alone, entry.name)


def differing(first, other):
    """Names of tensors that only one of two sources brings, or each with other rows or
    columns. Of such a tensor the difference of the two results means nothing.
    Args:     {name: Brought} of both
    Example:  an expert without the base's biases: where the base's file has these, its
              own would have the target's, and their difference be that of two models"""
    names = []
    for name in first | other:
        one = first.get(name)
        two = other.get(name)
        same = one is not None and two is not None
        same = same and torch.equal(one.row_J, two.row_J)
        same = same and torch.equal(one.column_K, two.column_K)
        if not same:
            names.append(name)
    return names


# === The command ====================================================================
def parse(argv):
    """The arguments. What the command line alone decides is refused here, with exit
    code 2; what depends on files, by all that follows, with exit code 1."""
    parser = Parser(prog="match.py", description="Bring relatives of another shape or "
                    "order of hidden units to the target.")
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
    # What is wrong without a look at any file.
    if not 0 <= a.seed < 2 ** 32:
        parser.error("--seed must be from 0 to 2^32 - 1")
    if a.force and not (a.output or a.report):
        parser.error("nothing is written: drop --force")
    if a.output and len(a.sources) > 1:
        names = {called(path) for path in a.sources}
        if a.output.endswith(".safetensors"):
            parser.error("several sources go into a folder: give -o the name of one")
        if len(names) < len(a.sources):
            parser.error("two sources would become one file: rename one")
    return a


def check_outputs(a, target, sources):
    """Refuse what cannot be written, before any work: what exists (--force replaces
    it), is an input, or cannot be made.

    Returns:  the Destination of one source's result; None for several, and for none
    """
    result = None
    held = None
    if a.output and len(sources) > 1:
        held = [f"{called(source.path)}.safetensors" for source in sources]
    elif a.output:
        result = Destination(target, a.output)
        held = result.files
    # No output may be an input, nor stand in another output's way.
    others = [*target.files]
    for source in sources:
        others += source.files
    if a.output:
        check_output(a.output, others, a.force, folder=held)
        others.append(a.output)
    if a.report:
        check_output(a.report, others, a.force, "--report")
    return result


def print_kinship(target, source, kinship):
    """Related or not, with how many layers that rests on; then a line per layer.
    Example:
        base is related to grown: 4 of 6 layers have a partner (cosine of strangers:
        0.155)
          layer 0 <- 0  0.998
          layer 1 <- 1  0.998
          layer 2 <- none  0.173
    """
    verdict = "no relative of"
    if kinship.related:
        verdict = "related to"
    say(f"{called(source.checkpoint.path)} is {verdict} "
        f"{called(target.checkpoint.path)}: {len(kinship.met)} of "
        f"{len(target.numbers)} layers have a partner "
        f"(cosine of strangers: {kinship.null:.3f})")
    for (j, i), cosine in zip(kinship.layers.items(), kinship.similarity):
        partner = "none"
        if i is not None:
            partner = i
        say(f"  layer {j} <- {partner}  {cosine:.3f}")


def print_plan(target, source, kinship, plan):
    """What was brought along, and what was not: of the target, and of the source.
    Example:
        grown: 29 of 38 tensors are brought, 0 in part
          the target's own, norms of another width: model.norm.weight (1)
          not used of the source: layer 2, layer 5, model.norm.weight (1)
    """
    brought, own = plan
    partly = [name for name in brought if not brought[name].whole]
    say(f"{called(source.checkpoint.path)}: {len(brought)} of "
        f"{len(brought) + len(own)} tensors are brought, {len(partly)} in part")
    for why in dict.fromkeys(own.values()):
        names = [name for name in own if own[name] == why]
        say(f"  the target's own, {why}: {listed(names)}")
    # Of the source: what found no place in the target.
    used = {each.source for each in brought.values()}
    unused = []
    for number in source.numbers:
        if number not in kinship.met.values():
            unused.append(f"layer {number}")
            used |= set(source.named[number].values())
    rest = [name for name in source.checkpoint.entries if name not in used]
    if rest:
        unused.append(listed(rest))
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
            "source": called(source.checkpoint.path), "related": kinship.related,
            "layers": list(kinship.layers.values()), "similarity": kinship.similarity,
            "null": kinship.null})
    report = {"version": VERSION, "target": called(a.target), "kinship": records}
    with appear(a.report, a.force) as path:
        with open(path, "w") as file:
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
                name = f"{called(source.checkpoint.path)}.safetensors"
                with create(os.path.join(folder, name), entries) as output:
                    write_matched(output, target, source.checkpoint, brought, progress)
        return
    # One source: a file, or a folder in which the target's companions lie beside it.
    source = pairs[0][1].checkpoint
    brought, _ = plans[0]
    card = (f"`{called(source.path)}` in the order, shapes and names of "
            f"`{called(target.path)}`, by `experiments/tools/match.py` of lsmerge.\n")
    with create(result.path, entries, inside=result.weights, force=a.force) as output:
        result.fill(os.path.dirname(output.path), card)
        write_matched(output, target, source, brought, progress)


def relate(a, pairs, progress):
    """The Kinship of each source, printed as soon as it is known.

    With -o the first source's match serves all: a further one has to stand in the same
    order. It gets the first one's layers and stream, and keeps cosines of its own.
    Without -o each source is looked at by itself, and may have any shape.

    Args:     pairs   (target Layers, source Layers) of each source
    """
    kinships = []
    for target, source in pairs:
        first = None
        if a.output and kinships:
            first = kinships[0]
            check_same_order(pairs[0][1], source, a.force)
        check_finite(source, progress)
        kinship = find_kinship(target, source, a.seed, progress, first)
        print_kinship(target, source, kinship)
        kinships.append(kinship)
    return kinships


def main(argv=None):
    """The command, straight down: open and check; who is related; match; write.

    A stranger as the first source ends the run: with -o nothing at all is written then;
    without, the report is, as it was asked for.
    """
    a = parse(argv)
    # Open, and refuse what headers and paths show.
    target = Checkpoint(a.target)
    sources = [Checkpoint(path) for path in a.sources]
    result = check_outputs(a, target, sources)
    pairs = [open_layers(target, source) for source in sources]

    # disable=None: no bar where stderr is no terminal.
    def progress(things, label):
        return tqdm(things, desc=label, leave=False, disable=a.quiet or None)

    # Who is related, and which layer is which? The first source decides.
    check_finite(pairs[0][0], progress)
    kinships = relate(a, pairs, progress)
    first = kinships[0]
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
        plan = plan_tensors(*pair, kinship, units)
        plans.append(plan)
        print_plan(*pair, kinship, plan)
        warnings = doubts(*pair, kinship, plan)
        names = differing(plans[0][0], plan[0])
        if names:
            warnings.append(f"{listed(names)}: not brought as of {a.sources[0]}: there "
                            "the difference of the two is that of two models")
        for warning in warnings:
            say(f"warning: {pair[1].checkpoint.path}: {warning}", stream=sys.stderr)
    write_all(a, result, pairs, plans, progress)
    if a.report:
        write_report(a, pairs, kinships)
    say(f"wrote {a.output}")


if __name__ == "__main__":
    # On a machine that is not idle, two threads took four times as long as one.
    torch.set_num_threads(1)
    sys.exit(command(main))
