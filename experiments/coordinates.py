"""A source model in a target's coordinates: which rotation, which hidden unit, which head.

In:    two models as dictionaries of tensors, norms folded (`folded`); optionally text.
Out:   a Map, fitted on weights or on activations; the source carried over by it (the same function,
       which `own_loss` checks); the part of it that partners the target's units.
Paper: nothing of this. ours, in the spirit of OT fusion and git re-basin: the residual stream turns
       by orthogonal Procrustes, semi-orthogonal where widths differ; MLP units and heads are paired
       by an assignment; what is free inside a head has a closed form. Fitted on *weights* (the 256
       shared points are the byte embeddings) or on *text* (the points are activations).
Left out on purpose: what is done with a carried model. Previous: paper_tables.py.
Next:  explore_transfer.py.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from align import pair_layers
from evaluate import bits_per_byte
from tiny_lm import HEAD_DIM, TinyLM, rotary_angles

HALF = HEAD_DIM // 2
READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",      # of the stream
           "mlp.gate_proj", "mlp.up_proj")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
EMBEDDING = "model.embed_tokens.weight"


def layer(tensors, number):
    """Short name -> matrix of one block, e.g. "mlp.up_proj"."""
    return {kind: tensors[f"model.layers.{number}.{kind}.weight"] for kind in READERS + WRITERS}


def depth(tensors):
    return 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))


def folded(tensors):
    """The same function with every RMSNorm gain inside the blocks moved into the matrices behind
    it, in float64: a rotation of the stream commutes with the norm only without gains. The last
    norm and the tied embedding stay."""
    result = {name: tensor.double() for name, tensor in tensors.items()}
    for number in range(depth(tensors)):
        for norm, kinds in (("input_layernorm", READERS[:3]),
                            ("post_attention_layernorm", READERS[3:])):
            gain = f"model.layers.{number}.{norm}.weight"
            for kind in kinds:
                result[f"model.layers.{number}.{kind}.weight"] *= result[gain]
            result[gain] = torch.ones_like(result[gain])
    return result


# --- The map --------------------------------------------------------------------------------------
class LayerMap(NamedTuple):
    """How one source layer enters the target's coordinates. Orders list source indices, the
    partners first."""
    units: torch.Tensor         # (I,) order of the MLP units
    signs: torch.Tensor         # (I,) +-1: up and down may flip together
    heads: torch.Tensor         # order of the heads
    values: torch.Tensor        # (heads, HEAD_DIM, HEAD_DIM) orthogonal: v and o may turn together
    phases: torch.Tensor        # (heads, HALF) angles: all that RoPE allows between q and k


class Map(NamedTuple):
    stream: torch.Tensor        # (h_s, h_s) orthogonal; its first h_t rows are semi-orthogonal
    layers: dict                # source layer -> LayerMap
    pairs: list                 # source layer of each target layer


def procrustes(target_PH, source_PH):
    """Orthogonal R with R[:h_t] = argmax sum_p <target_p, R source_p>: Schoenemann's U V^T, its
    rows completed."""
    U, _, Vh = torch.linalg.svd(target_PH.T @ source_PH, full_matrices=True)
    return torch.cat([U @ Vh[:U.shape[0]], Vh[U.shape[0]:]])


def order(score_JI):
    """Source indices in the order of their target partners, then those left over."""
    _, chosen = linear_sum_assignment(-score_JI.numpy())
    return torch.tensor([*chosen, *sorted(set(range(score_JI.shape[1])) - set(chosen))])


def unit(matrix):
    return F.normalize(matrix, dim=-1)


def pairs_of(matrix):
    """(heads * HEAD_DIM, h) -> (heads, HALF, h) complex: RoPE turns dimension i with i + HALF, as
    one complex number."""
    heads = matrix.reshape(-1, 2, HALF, matrix.shape[1])
    return torch.complex(heads[:, 0], heads[:, 1])


def unit_weights(side, width):
    """(gate, up, down) directions of each MLP unit in the first `width` numbers of the stream."""
    matrices = side["mlp.gate_proj"], side["mlp.up_proj"], side["mlp.down_proj"].T
    return [unit(matrix[:, :width]) for matrix in matrices]


def fit_units(target, source, width, activity):
    """(order, signs). Score: the inner products of a unit's input and output weights, or the
    correlation of what the two units do on text; the sign of (up, down) is free."""
    if activity is None:
        gate, up, down = unit_weights(target, width)
        gate_s, up_s, down_s = unit_weights(source, width)
        signed, plain = up @ up_s.T + down @ down_s.T, gate @ gate_s.T
    else:
        mine, theirs = (unit((part["units"] - part["units"].mean(0)).T) for part in activity)
        signed, plain = mine @ theirs.T, 0.0
    units, signs = order(plain + signed.abs()), torch.ones(signed.shape[1], dtype=torch.float64)
    signs[:len(signed)] = signed[torch.arange(len(signed)), units[:len(signed)]].sign()
    return units, signs


def split_heads(matrix, width):
    """(heads * HEAD_DIM, h) -> (heads, HEAD_DIM, width)"""
    return matrix.reshape(-1, HEAD_DIM, matrix.shape[1])[:, :, :width]


def head_products(target, source, width):
    """(J, I, HEAD_DIM, HEAD_DIM): for every pair of heads, what their v and o have in common."""
    v = [split_heads(side["self_attn.v_proj"], width) for side in (target, source)]
    o = [split_heads(side["self_attn.o_proj"].T, width) for side in (target, source)]
    return sum(torch.einsum("akh,blh->abkl", *pair) for pair in (v, o))


def fit_heads(target, source, width, activity):
    """(order, values, phases): for every pair of heads the best turn of each kind has a closed
    form; its gain is the score."""
    phase = sum(torch.einsum("aph,bph->abp", pairs_of(target[kind]),
                             pairs_of(source[kind][:, :width]).conj())
                for kind in READERS[:2])                                    # (J, I, HALF) complex
    if activity is None:
        cross = head_products(target, source, width)
    else:
        mine, theirs = (part["heads"].reshape(len(part["heads"]), -1, HEAD_DIM)
                        for part in activity)
        cross = torch.einsum("pak,pbl->abkl", mine, theirs)
    U, S, Vh = torch.linalg.svd(cross)
    by_phase, by_value = phase.abs().sum(-1), S.sum(-1)
    # q, k and v, o count alike.
    heads = order(by_phase / by_phase.mean() + by_value / by_value.mean())
    J = len(cross)
    values = torch.eye(HEAD_DIM).double().repeat(len(heads), 1, 1)
    phases = torch.zeros(len(heads), HALF).double()
    values[:J] = (U @ Vh)[torch.arange(J), heads[:J]]
    phases[:J] = phase.angle()[torch.arange(J), heads[:J]]
    return heads, values, phases


class Recorder:
    """A forward hook that keeps a module's input, (points, numbers) float64, under a key."""

    def __init__(self, seen, *key):
        self.seen, self.key = seen, key

    def __call__(self, module, inputs):
        self.seen[self.key] = inputs[0].reshape(-1, inputs[0].shape[-1]).double()


@torch.no_grad()
def activities(tensors, bytes_BT):
    """What a model does on text: ("stream", border), ("units", layer) and ("heads", layer) -> what
    it is there, (points, numbers) float64."""
    model, seen = TinyLM.from_state_dict(tensors), {}
    blocks = model.model.layers
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(Recorder(seen, "stream", number))
        block.mlp.down_proj.register_forward_pre_hook(Recorder(seen, "units", number))
        block.self_attn.o_proj.register_forward_pre_hook(Recorder(seen, "heads", number))
    model.model.norm.register_forward_pre_hook(Recorder(seen, "stream", len(blocks)))
    model(bytes_BT)
    return seen


def fit(target, source, bytes_BT=None):
    """The Map of a folded source to a folded target: from weights, or with text from activities."""
    chosen, width = pair_layers(depth(source), depth(target)), target[EMBEDDING].shape[1]
    if bytes_BT is None:
        seen, stream = None, procrustes(target[EMBEDDING], source[EMBEDDING])
    else:
        seen = [activities(side, bytes_BT) for side in (target, source)]
        # One rotation for all layers, since the residual sum links them; its points are those in
        # front of each block and at the end.
        borders = [*enumerate(chosen), (depth(target), depth(source))]
        stream = procrustes(*(torch.cat([unit(part["stream", pair[side]]) for pair in borders])
                              for side, part in enumerate(seen)))
    turned, layers = rotated(source, stream), {}
    for j, i in enumerate(chosen):
        activity = seen and [{what: part[what, n] for what in ("units", "heads")}
                             for part, n in zip(seen, (j, i))]
        mine, theirs = layer(target, j), layer(turned, i)
        theirs |= {kind: theirs[kind][:width] for kind in WRITERS}
        layers[i] = LayerMap(*fit_units(mine, theirs, width, activity),
                             *fit_heads(mine, theirs, width, activity))
    return Map(stream, layers, chosen)


# --- Carrying a model over ------------------------------------------------------------------------
def rotated(tensors, stream):
    """The residual stream in other coordinates, x -> R x: W R^T where it is read, R W where it is
    written."""
    result = {}
    for name, w in tensors.items():
        writes = any(kind in name for kind in WRITERS)
        result[name] = stream @ w if writes else w @ stream.T if w.dim() == 2 else w
    return result


def rearranged(block, m):
    """One block with its units and heads in the map's order, sign, turn and phase: the same
    function."""
    result = {"mlp.gate_proj": block["mlp.gate_proj"][m.units],
              "mlp.up_proj": m.signs[:, None] * block["mlp.up_proj"][m.units],
              "mlp.down_proj": block["mlp.down_proj"][:, m.units] * m.signs}
    for kind in READERS[:2]:
        turn = torch.polar(torch.ones_like(m.phases), m.phases)[..., None]
        z = pairs_of(block[kind])[m.heads] * turn
        result[kind] = torch.stack([z.real, z.imag], 1).reshape(-1, z.shape[-1])
    for kind, w in (("self_attn.v_proj", block["self_attn.v_proj"]),
                    ("self_attn.o_proj", block["self_attn.o_proj"].T)):
        turned = m.values @ w.reshape(-1, HEAD_DIM, w.shape[1])[m.heads]
        flat = turned.reshape(-1, w.shape[1])
        result[kind] = flat.T if kind in WRITERS else flat
    return result


def carried(source, mapping):
    """The whole folded source in the map's coordinates: all of it, so still the same function."""
    result = rotated(source, mapping.stream)
    for number, m in mapping.layers.items():
        for kind, w in rearranged(layer(result, number), m).items():
            result[f"model.layers.{number}.{kind}.weight"] = w
    return result


def cut(source, mapping, target):
    """Target names -> the carried source's leading part in the target's shapes: what partners the
    target's units."""
    result = {}
    for j, i in enumerate(mapping.pairs):
        theirs = layer(source, i)
        for kind, mine in layer(target, j).items():
            rows, columns = mine.shape
            result[f"model.layers.{j}.{kind}.weight"] = theirs[kind][:rows, :columns]
    return result


class Untied(torch.nn.Module):
    """A TinyLM whose head is not its embedding: what a rotated model needs, as the last gain stays
    with the head."""

    def __init__(self, tensors, head):
        super().__init__()
        no_gain = {"model.norm.weight": torch.ones(head.shape[1])}
        self.lm, self.head = TinyLM.from_state_dict(tensors | no_gain), head.float()

    def forward(self, bytes_BT):
        angles, x = rotary_angles(bytes_BT.shape[1]), self.lm.model.embed_tokens(bytes_BT)
        for block in self.lm.model.layers:
            x = block(x, *angles)
        return F.linear(self.lm.model.norm(x), self.head)


def own_loss(source, mapping, documents):
    """Bits per byte of the source before and after the map: equal, or the map is wrong."""
    head = source[EMBEDDING] * source["model.norm.weight"]
    sides = (source, head), (carried(source, mapping), head @ mapping.stream.T)
    return [float(bits_per_byte(Untied(*side), documents).mean()) for side in sides]
