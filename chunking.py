"""chunking.py: a tensor <-> standardised chunks, and the files around them.
                                                                    (read second)

    file -read-> flat_L --standardise--> x_L --chunk--> chunks_NC --to_windows--> x_BTC
    file <-put- flat_L <-unstandardise- x_L <-unchunk- chunks_NC <-from_windows- x_BTC

Every arrow has its inverse beside it. Paper: Sec. 3.2, "layer-aware chunking".

A worked example: a tensor of 7 weights with C = 4 gives N = 2 chunks. The last one
holds one number of padding; `real` marks what is a weight (1) and what is padding (0):

    flat_L  [a b c d e f g]   ->   chunks_NC  [a b c d]      real_NC  [1 1 1 1]
                                              [e f g 0]               [1 1 1 0]

In this order: names, statistics, chunks and windows; then files. Files are read and
written in pieces, so that memory depends neither on the model nor on its largest
tensor. Not here: pickles (they run code) and memory maps (a file that shrinks under one
kills the process).
"""
import argparse
import contextlib
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from glob import glob
from os.path import (abspath, basename, dirname, exists, isdir, isfile, join, lexists,
                     realpath)
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

# Weights that are read at a time: 1 MB in float32, so that a piece stays in the cache
# of a core while it is converted, standardised and encoded.
PIECE = 1 << 18


# --- Names: where a tensor sits in its model ------------------------------------------
# All that is known of architectures is this table: a fork adds a line, not a branch.
# The pattern is searched in the dotted name behind the layer's number, without `weight`
# or `bias`; the first match wins, so that special names stand before general ones.
# `wo` is the output of attention in one model and of the MLP in another: behind `att`
# it is the one, otherwise the other.
# Covered: Llama, BERT, GPT-2, GPT-NeoX, T5, ViT, torch.nn.
ROLES = [
    ("norm", r"norm|(^|\.)ln_?\d|(^|\.)ln_f"),
    ("router", r"router|\bmlp\.gate$|block_sparse_moe\.gate$"),         # of experts
    ("qkv", r"c_attn|qkv(_proj)?$|query_key_value|in_proj_weight$"),    # fused
    ("q", r"(\bq|q_proj|query|q_lin|wq|to_q)$"),
    ("k", r"(\bk|k_proj|key|k_lin|wk|to_k)$"),
    ("v", r"(\bv|v_proj|value|v_lin|wv|to_v)$"),
    ("o", r"(o_proj|out_proj|out_lin|att\w*\.(output\.dense|dense|c_proj|proj|wo|o))$"),
    ("gate_up", r"(gate_up_proj|mlp\.wi)$"),                            # fused
    ("gate", r"(gate_proj|w1|wi_0)$"),
    ("up", r"(up_proj|w3|wi_1|wi|intermediate\.dense|c_fc|fc1|lin1|dense_h_to_4h)$"),
    ("down", r"(down_proj|w2|wo|output\.dense|c_proj|fc2|lin2|dense_4h_to_h)$"),
    ("head", r"lm_head|embed_out|(^|\.)score$|classifier|^output$|decoder$"),
    ("embed", r"embed|(^|\.)wte$|(^|\.)wpe$|^shared$"),       # of words, of positions
]
# Dotted parts that a training framework puts around a module, anywhere in a name. They
# say nothing about it.  Example: 'module.h.0._orig_mod.attn' is 'h.0.attn'.
WRAPPERS = (r"(?<![^.])(module|_orig_mod|_forward_module|_fsdp_wrapped_module|"
            r"_checkpoint_wrapped_module)\.")
# A name with a layer: what stands before the number, the number, what stands behind it.
# The number is the first whole dotted part of digits. At most nine of them: nobody has
# more layers, and any integer type holds them.
LAYER = r"(?s)(.+?)\.([0-9]{1,9})(?:\.(.*))?"


class Place(NamedTuple):
    """Where a tensor sits: the four things that its name says."""
    stack: str          # what stands before the layer's number; "" outside the layers
    layer: int | None   # None outside the numbered layers
    role: str           # q, k, v, o, up, down, norm, ...
    rest: str           # the name behind the number; outside the layers the whole name


def parse_name(name):
    """The Place of a tensor, read from its dotted name.

    Example:  'module.model.layers.3.self_attn.q_proj.weight'
              -> stack 'model.layers', layer 3, role 'q', rest 'self_attn.q_proj.weight'
    ours:     a number that begins the name is no layer: sentence-transformers count
              modules, '0.auto_model.encoder.layer.3.output.dense.weight' is of layer 3
    """
    name = re.sub(WRAPPERS, "", name)
    found = re.fullmatch(LAYER, name)
    if found is None:
        return Place("", None, role_of(name), name)
    stack, layer, rest = found.groups("")
    return Place(stack, int(layer), role_of(rest), rest)


def role_of(rest):
    """The role of a tensor within its layer. An unknown name is a role of its own: it
    still pairs with the same spelling elsewhere.

    ours:     numbers (experts of a mixture, T5's sublayers), `bias` and the mark of
              cross-attention are kept, so that a tensor only pairs with its like
    Example:  'block_sparse_moe.experts.3.w1.weight' -> 'gate.3'
    """
    stem = re.sub(r"(^|\.)(weight|bias)$", "", rest)
    marks = re.findall(r"\b\d+\b|\bbias$|cross|encoder_attn|encdec", rest.lower())
    for role, pattern in ROLES:
        if re.search(pattern, stem, re.IGNORECASE):
            return ".".join([role, *marks])
    return ".".join([stem, *marks])


def parse_names(names):
    """{name: Place} of one model. Where no name has a layer otherwise, a number at its
    very beginning is one, of a stack that we call 'model'.

    Example:  a torch.nn.Sequential, '0.weight' and '2.weight': layers 0 and 2
    """
    places = {name: parse_name(name) for name in names}
    if all(place.layer is None for place in places.values()):
        for name in names:
            place = parse_name(f"model.{name}")
            if place.layer is not None:
                places[name] = place
    return places


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, without its numbers: all that a header says of it."""
    name: str
    dtype: torch.dtype
    shape: tuple
    file: str = ""              # the file that holds it; named in every error
    start: int = 0              # its first byte there
    place: Place = None         # given by `in_order`

    @property
    def numel(self): return math.prod(self.shape)       # L

    @property
    def nbytes(self): return self.numel * self.dtype.itemsize


def is_selected(entry, pattern=None):
    """Whether a tensor is encoded, to be merged in latent space.

    paper:    attention and MLP (Table 6); norms and biases are left out (Sec. 3.2)
    ours:     floats of two or more dimensions inside numbered layers. Norms and biases
              are vectors; biases of fused experts have two dimensions and are in. With
              a pattern: all such floats whose name it finds, in a layer or not
    """
    if not is_weight(entry) or len(entry.shape) < 2:
        return False
    if pattern is not None:
        return re.search(pattern, entry.name) is not None
    return entry.place.layer is not None


def is_weight(entry):
    """Whether it holds weights at all, and no whole numbers; nor a table that was never
    trained: a mask, among them GPT-2's causal one, which is called `bias` and has four
    dimensions; or RoPE's frequencies."""
    if not entry.dtype.is_floating_point or entry.numel == 0:
        return False
    if entry.name.endswith(("attn.bias", "attention.bias")) and len(entry.shape) > 2:
        return False
    return not entry.name.endswith(("mask", "masked_bias", "inv_freq"))


# --- Statistics: the record that makes chunks invertible ------------------------------
@dataclass(frozen=True)
class TensorStats(Entry):
    """An entry with the statistics that turn its chunks back into weights.

    ours:     one mean and one deviation for a whole tensor. The codec is trained on
              weights of mean 0 and std 1, and can then carry tensors of any spread: in
              experiments/models/base, 0.03 (v_proj) to 0.26 (the embedding)
    """
    mean: float = 0.0       # of the raw weights
    std: float = 0.0        # their standard deviation (1/n)

    @property
    def constant(self): return self.std == 0

    @property
    def scale(self):
        """What a weight is divided by; a constant tensor has no unit of its own."""
        return self.std or 1.0


def spans(numel, step=PIECE):
    """[(start, stop), ...]: the pieces of `numel` elements, the last one shorter.
    Example:  9 elements in steps of 4 -> (0, 4), (4, 8), (8, 9)"""
    return [(start, min(start + step, numel)) for start in range(0, numel, step)]


def keep_freed_memory():
    """Once, before many pieces pass. The C library of Linux gives a large block back to
    the system as soon as it is freed, until it has seen a block of that size freed;
    from then on it keeps such blocks, up to 32 MB. So we free one of 31 MB. Without
    this, to take every piece's memory page by page costs three times what is computed.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def measure(checkpoint, name):
    """TensorStats of a tensor, in float64; NaN and Inf are refused.

    Equation:  M2 += M2_piece + delta^2 n n_piece / (n + n_piece)
               mean += delta n_piece / (n + n_piece),   delta = mean_piece - mean
    Source:    Chan et al. 1979. M2 is the sum of squares about the mean. The shorter
               E[w^2] - E[w]^2 would cancel for a small spread around a large mean: at
               mean 1 and std 1e-9 nothing of the variance is left in float64
    """
    entry = checkpoint.entries[name]
    mean = 0.0
    m2 = 0.0
    for start, stop in spans(entry.numel):
        n_piece = stop - start          # and n = start, n + n_piece = stop
        piece_L = checkpoint.read(name, start, stop).double()
        piece_mean = piece_L.mean().item()
        delta = piece_mean - mean
        piece_L -= piece_mean           # in place, as `read` returns a copy
        m2 += piece_L.dot(piece_L).item() + delta * delta * start * n_piece / stop
        mean += delta * n_piece / stop
    std = math.sqrt(m2 / max(1, entry.numel))
    # A deviation below the rounding of the mean, which each step may move by 2^-53 =
    # 1e-16 of itself: then all weights are equal.
    if std <= 1e-12 * abs(mean):
        std = 0.0
    # float32 ends at 3e38, and sums of many weights must fit as well. A NaN among the
    # weights makes both a NaN, which fails every comparison; an Inf fails this one.
    need(std + abs(mean) < 1e30, entry.file, "holds NaN or Inf, or numbers too large "
         "for float32", "repair, rescale or re-export the checkpoint", name)
    return TensorStats(**vars(entry), mean=mean, std=std)


def pool(many):
    """(mean, std) that tensors of one shape share, from the TensorStats of each: all
    weigh the same.

    Equation:  mean = average of mean_k,  std^2 = average of std_k^2 + (mean_k - mean)^2
    Example:   means 0 and 2, both std 1: mean 1, std sqrt(2)
    ours:      symmetric in the parents; and a target near zero does not set the unit
               for a source that is not
    """
    mean = fmean(each.mean for each in many)
    variance = fmean(each.std ** 2 + (each.mean - mean) ** 2 for each in many)
    return mean, math.sqrt(variance)


def wide(dtype):
    """The arithmetic of a stored dtype: float64 keeps its own, others take float32."""
    if dtype == torch.float64:
        return torch.float64
    return torch.float32


def standardise(flat_L, stats):
    """x = (w - mean) / scale, in float32.

    paper:    weights are standardised before they are cut into chunks
    ours:     the mean is taken off before float64 weights are rounded to float32. At
              mean 1 and std 1e-9 the other order would leave nothing: float32 has
              steps of 1e-7 there
    """
    wide_L = flat_L.to(wide(flat_L.dtype))
    return ((wide_L - stats.mean) / stats.scale).float()


def unstandardise(x_L, stats):
    """The inverse: w = scale x + mean, in the arithmetic of the stored dtype."""
    return x_L.to(wide(stats.dtype)) * stats.scale + stats.mean


def cast(flat_L, entry):
    """The one rounding to the stored dtype. A value that does not fit is an error,
    never an Inf.  Example: 70000 in float16, which ends at 65504."""
    result_L = flat_L.to(entry.dtype)
    # One sum shows every NaN and Inf, in half the time of a look at each weight. It
    # does not overflow by itself: weights are below 1e30, and float64 ends at 1e308.
    need(result_L.double().sum().isfinite(), "result", f"does not fit {entry.dtype}",
         "lower --lam, or store it wider", entry.name)
    return result_L


# --- Chunks and windows (paper: Sec. 3.2) ---------------------------------------------
def chunk(flat_L, C):
    """Cut a flattened tensor into chunks.

    paper:    w in R^L, padded with zeros to L_p = ceil(L / c) c, cut into n = L_p / c
              chunks
    Returns:  chunks_NC, and real_NC bool (1 = weight, 0 = padding); N = 0 if L = 0
    Example:  L = 7, C = 4: N = 2 chunks, one number of padding (see the top)
    ours:     rows of a matrix follow one another, so that a chunk holds neighbours of
              one row, the weights of one output. A row of 576 is 9 chunks of 64
    """
    L, = flat_L.shape
    N = -(-L // C)                                                  # ceil(L / C)
    padded = F.pad(flat_L, (0, N * C - L))                          # (N C,)
    real = torch.arange(N * C, device=flat_L.device) < L            # (N C,)
    return padded.view(N, C), real.view(N, C)


def unchunk(chunks_NC, L):
    """The inverse: (N, C) -> (L,), without the padding."""
    return chunks_NC.reshape(-1)[:L]


def to_windows(chunks_NC, real_NC, T):
    """T neighbouring chunks of ONE tensor form a window, what attention sees at a time;
    the last window is filled up with padding chunks.

    Returns:  x_BTC and real_BTC, with B = ceil(N / T)
    Example:  N = 5 chunks, T = 4: B = 2 windows, the second with 3 chunks of padding
    differs:  the release of the paper concatenates all tensors and pads once, so that
              its chunks straddle tensors (the paper itself pads each)
    """
    N, C = chunks_NC.shape
    fill = (0, 0, 0, -N % T)                        # B T - N chunks, behind the last
    x_NC = F.pad(chunks_NC, fill)
    real_NC = F.pad(real_NC, fill)
    return x_NC.view(-1, T, C), real_NC.view(-1, T, C)          # (N, C) -> (B, T, C)


def from_windows(x_BTC, N):
    """The inverse, for weights (last axis C) as for latents (last axis Z)."""
    return x_BTC.reshape(-1, x_BTC.shape[-1])[:N]               # (B, T, C) -> (N, C)


# === Files. From here on nothing is specific to the paper. ===========================
class CheckpointError(ValueError):
    """What a file, the data or the disk is to blame for, as one line:
    FILE: tensor 'NAME': what is wrong; fix: what to do. Other exceptions are our own
    faults, and keep their traceback."""

    def __init__(self, file, what, fix, tensor=None):
        if tensor is not None:
            what = f"tensor '{tensor}': {what}"
        super().__init__(one_line(f"{file}: {what}; fix: {fix}"))


def one_line(text):
    """A text with codes for what would break its line, or command a terminal: names may
    hold it.  Example: a line break becomes a backslash and an n"""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]",
                  lambda found: repr(found[0])[1:-1], text)


# What to do, where several errors need the same.
AGAIN = "the file is damaged or incomplete: fetch or write it again"
ORIGINAL = "use the original 16- or 32-bit checkpoint"


def need(condition, file, what, fix=AGAIN, tensor=None):
    """Raise a CheckpointError unless the condition holds. No assert: `python -O` would
    pass over it, and a damaged file would be taken for a whole one."""
    if not condition:
        raise CheckpointError(file, what, fix, tensor)


# safetensors' names of the dtypes that torch has as well.
DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "F32": torch.float32,
    "U32": torch.uint32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
DTYPE_NAMES = dict(zip(DTYPES.values(), DTYPES))
# What people pass by mistake: files that are damaged, pointers, other formats.
OTHER = ("fetch it again, with `git lfs pull` if it is a pointer of some 130 bytes; "
         "convert a pickle, .bin, .pt, .npz or GGUF file to safetensors first")
# Numbers that mean a weight only together with a scale. (int64 is for indices.)
PACKED = {"I8", "U8", "I16", "I32", "U32", "F8_E4M3", "F8_E5M2"}
# How their scales are called, in the last dotted part of a name.
# (A name without a dot, as 'logit_scale', stands alone: it scales no module.)
SCALES = r"(?i)\.[^.]*(scale|absmax|quant|qzeros|\bscb\b)[^.]*$"


def read_header(path):
    """({name: Entry}, metadata) of one safetensors file.

    The format: eight bytes with the length of the header, the header in JSON, then the
    numbers of all tensors. The library opens it: that is the audited check of lengths,
    offsets, overlaps and shapes. What it accepts has no holes, so that the tensors lie
    one behind the other.
    """
    need(isfile(path), path, "is no regular file", "pass a .safetensors file")
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    entries = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for name in file.offset_keys():             # in the order of their offsets
                record = file.get_slice(name)           # reads no weights
                code = record.get_dtype()
                need(code in DTYPES, path, f"dtype {code} is not supported",
                     "load it and save it as float32", name)
                entries[name] = Entry(name, DTYPES[code], tuple(record.get_shape()),
                                      path, start)
                start += entries[name].nbytes
    except SafetensorError as error:
        raise CheckpointError(path, f"no safetensors file: {error}", OTHER) from None
    return entries, metadata


def refuse_quantised(entries, folder):
    """Integers or float8 beside their scales are no weights, whatever their names: a
    weight is their product, and an average of the integers alone would be noise.

    Example:  'q_proj.weight' in float8 beside 'q_proj.weight_scale'; in bitsandbytes'
              files beside 'q_proj.weight.absmax', whose module is the weight itself
    """
    scaled = {name.rpartition(".")[0] for name in entries if re.search(SCALES, name)}
    for name, entry in entries.items():
        if DTYPE_NAMES[entry.dtype] in PACKED and len(entry.shape) >= 2:
            beside = {name, name.rpartition(".")[0]} & scaled
            # Scales may have other names; but such whole numbers are weights, if they
            # are neither masks nor indices.
            other = name.endswith(("bias", "mask", "index", "ids"))
            packed = not entry.dtype.is_floating_point and not other
            need(not beside and not packed, entry.file,
                 f"is quantised: {entry.dtype}", ORIGINAL, name)
    # Configurations say so as well. With {} or null they do not.
    for config in Path(folder).glob("*config.json"):
        said = re.search(rb'"(quantization|compression)(_config)?"\s*:\s*\{\s*"',
                         config.read_bytes())
        need(not said, config, "says that the checkpoint is quantised", ORIGINAL)


def locate(path):
    """The weights file or the index that a path means: itself, or the one in a folder.

    The names that transformers writes come first, and an index before a file. A stale
    index, none of whose shards is there, yields to model.safetensors: the model was
    saved again, in one file. Of other names there must be one: nothing is guessed.
    """
    need(lexists(path), path, "no such file or folder",
         "check the path; nothing is downloaded: fetch a hub's model first")
    if not isdir(path):
        return path
    for name in ("model.safetensors.index.json", "model.safetensors"):
        file = join(path, name)
        if isfile(file) and read_shards(file):
            return file
    need(not exists(join(path, "adapter_config.json")), path, "is an adapter, no model",
         "fold it: python experiments/tools/lora.py fold BASE ADAPTER -o EXPERT")
    found = (glob("*.safetensors.index.json", root_dir=path)
             or glob("*.safetensors", root_dir=path))
    need(len(found) == 1, path, f"holds {len(found)} .safetensors files, not one",
         "pass one of them or an index; pickles must be converted")
    # 'model-00001-of-00002.safetensors' is a part of a model.
    need(not re.search(r"-of-0*([2-9]|1\d)", found[0]), path, f"{found[0]} is one of "
         "several shards, and their index is missing", "fetch the index and all shards")
    return join(path, found[0])


def read_shards(file):
    """{path: names of the tensors that are read from it} of an index; or of a weights
    file, which stands for itself, with None: all are read.

    A stale index, of whose shards none is there, gives {}. A shard may lie in a
    sub-folder, but not outside the folder of the index: what was downloaded must not
    make us read other files.

    Example:  'weight_map': {'a': '1.safetensors', 'b': '2.safetensors',
              'c': '1.safetensors'}  ->  {'.../1.safetensors': {'a', 'c'},
              '.../2.safetensors': {'b'}}
    """
    if not file.endswith(".json"):
        return {file: None}
    folder = dirname(abspath(file))
    shards = {}
    try:
        weight_map = json.loads(Path(file).read_bytes())["weight_map"]
        for name, shard in weight_map.items():
            shards.setdefault(abspath(join(folder, shard)), set()).add(name)
    except Exception as bad:
        # No JSON, no weight_map, no map, a shard that is no text, ...
        raise CheckpointError(file, f"no index with a weight_map: {bad}",
                              AGAIN) from None
    if not any(map(isfile, shards)):
        return {}
    for shard, names in shards.items():
        need(isfile(shard) and Path(shard).is_relative_to(folder), shard,
             f"is missing, or outside the folder of {file}", "fetch it", min(names))
    return shards


STOP = threading.Event()    # set to give a run up: `read` then raises in its threads


class Checkpoint:
    """A checkpoint opened for reading: a .safetensors file, an index of shards, or a
    folder. Opening reads headers only; weights are read when they are asked for.

    entries:  {name: Entry}, in the order of `in_order`
    files:    all files that are read, the index among them
    folder:   of the model, or None for a file
    metadata: of the last header; a model's says little, a VAE's holds its configuration
    """

    folder = None
    files = ()

    def __init__(self, path):
        self.path = os.fspath(path)
        if isdir(self.path):
            self.folder = self.path
        file = locate(self.path)
        shards = read_shards(file)
        need(shards, file, "none of its shards is there", "fetch them")
        entries = {}
        for shard, names in shards.items():
            held, self.metadata = read_header(shard)
            if names is None:
                names = held
            for name in names:              # the index decides what is read from where
                need(name in held, shard, f"lacks what {file} says", AGAIN, name)
                entries[name] = held[name]
        self.entries = in_order(entries)
        refuse_quantised(self.entries, dirname(file))
        self.files = [abspath(file), *map(abspath, shards)]
        # Opened once: what is read stays the same file, even if its name is given away.
        self.handles = {shard: open(shard, "rb") for shard in shards}
        self.lock = threading.Lock()        # a handle has one position for all threads

    def read(self, name, start=0, stop=None):
        """Elements [start, stop) of the flattened tensor, in the stored dtype, as a
        copy that the caller may write to: (stop - start,), less beyond the end.

        Not by a memory map: what is read is counted, so that a file that shrinks while
        the run goes on is an error with a name, and not the end of the process.
        """
        if STOP.is_set():
            raise InterruptedError          # the run was given up
        entry = self.entries[name]
        wanted = range(entry.numel)[start:stop]
        piece_L = torch.empty(len(wanted), dtype=entry.dtype)
        data = piece_L.view(torch.uint8).numpy()            # the same memory, as bytes
        file = self.handles[entry.file]
        with self.lock:
            file.seek(entry.start + wanted.start * entry.dtype.itemsize)
            got = file.readinto(data)
        need(got == len(data), entry.file, "shrank while it was read", "run it again",
             name)
        return piece_L

    def read_tensor(self, name):
        """A whole tensor, in its shape."""
        return self.read(name).view(self.entries[name].shape)


def in_order(entries):
    """{name: Entry} with the Place of each: what stands outside the layers, then each
    stack, layer by layer. (The library sorts names as text: layers.10 before layers.2.)
    """
    places = parse_names(entries)
    names = sorted(places, key=lambda n: (places[n].stack, places[n].layer or 0, n))
    return {name: replace(entries[name], place=places[name]) for name in names}


class StateDict(Checkpoint):
    """Tensors in memory, read as a checkpoint is."""

    def __init__(self, tensors, name="state dict"):
        self.path = name
        # Each flat: views, where it is contiguous.
        self.tensors = {key: tensor.detach().reshape(-1)
                        for key, tensor in tensors.items()}
        self.entries = in_order({key: Entry(key, tensor.dtype, tensor.shape, name)
                                 for key, tensor in tensors.items()})

    def read(self, name, start=0, stop=None):
        return self.tensors[name][start:stop].to("cpu", copy=True)


# --- Writing. The library's save_file wants all tensors in memory at once. ------------
def make_file(path, entries, metadata):
    """A new file for the names, dtypes and shapes of these entries: its header, and
    room for the numbers.

    Wide dtypes come first: then every tensor starts at a multiple of its dtype's size,
    as readers that map a file into memory want it.
    Example:  float32 [3] and float16 [5] take bytes 0 to 12 and 12 to 22; the other way
              round, the float32 would start at 10
    """
    header = {"__metadata__": dict(metadata, format="pt")}
    end = 0
    # By dtype, then by name: the order of the library's own writer.
    for entry in sorted(entries, key=lambda e: (-e.dtype.itemsize, e.name)):
        start = end
        end += entry.nbytes
        header[entry.name] = {"dtype": DTYPE_NAMES[entry.dtype],
                              "shape": entry.shape, "data_offsets": [start, end]}
    # A path in the metadata may hold bytes that are no text: they become "?".
    packed = json.dumps(header, ensure_ascii=False).encode("utf-8", "replace")
    packed += b" " * (-len(packed) % 8)         # the data begins at a multiple of 8
    packed = len(packed).to_bytes(8, "little") + packed
    with open(path, "xb") as file:
        file.write(packed)
        file.truncate(len(packed) + end)


class Output:
    """A safetensors file of known layout, open for writing. Pieces come in any order,
    from any thread or process, each element exactly once. `create` checks and names it.
    So a merge holds a few pieces in memory, however large the model is.
    """

    def __init__(self, path):
        """The file has been made by `make_file`, here or in another process."""
        self.path = path
        self.entries, _ = read_header(path)     # the library says what is where
        self.written = []                       # elements of each piece

    def put(self, name, start, piece_L):
        """Elements [start, start + len(piece_L)) of a flattened tensor, in the stored
        dtype. The inverse of Checkpoint.read."""
        # A handle of its own: no shared position, and nothing is open at the renaming.
        with open(self.path, "r+b") as file:
            file.seek(self.entries[name].start + start * piece_L.dtype.itemsize)
            file.write(piece_L.view(torch.uint8).numpy())       # as bytes
        self.written.append(len(piece_L))


@contextlib.contextmanager
def appear(path, force=False):
    """A path to write a file or a folder to, which takes the name `path` at the end,
    whole. What is raised in between removes it, and leaves what was there before.

    It is made in a hidden folder beside `path`: on the same disk, where a rename is one
    step. The folder's name tells the next run whose unfinished work it is.
    """
    path = realpath(path)       # a link is written through, not replaced
    prefix = f".lsmerge-{os.getpid()}-"
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=dirname(path)) as work:
            new = join(work, "new")
            old = join(work, "old")
            try:
                yield new
                if force and isdir(path):
                    os.rename(path, old)    # killed here, a run leaves both whole
                rename(new, path, force)
            finally:
                if isdir(old) and not lexists(path):
                    os.rename(old, path)    # the new one did not come
    except OSError as error:
        # A full disk names no file, and nobody knows the hidden one.
        if error.filename is None or prefix in str(error.filename):
            error.filename = path
        raise


def rename(new, path, force):
    """Give a file or a folder its name, in one step. Without `force` it fails where the
    name was taken meanwhile: two runs do not replace each other's result."""
    take = os.link                          # fails where there is anything
    if force or isdir(new):
        take = os.replace                   # a folder replaces only an empty one
    try:
        take(new, path)
    except OSError:
        need(not lexists(path), path, "was made by another program meanwhile, or "
             "belongs to another user", "choose another -o, or pass --force")
        os.replace(new, path)               # a file system that knows no links


@contextlib.contextmanager
def create(path, entries, metadata=(), inside=None, force=False):
    """An Output that appears at `path`, complete and checked. inside: its name in a
    folder `path`, beside which others may put files (output.path)."""
    with appear(path, force) as file:
        if inside:
            os.mkdir(file)
            file = join(file, inside)
        make_file(file, entries, metadata)
        output = Output(file)
        yield output
        # Whole, by count: what is wrong is found before anybody sees it.
        numel = sum(entry.numel for entry in output.entries.values())
        need(sum(output.written) == numel, path, "was not written completely",
             "run it again")


def write_tensors(path, tensors, metadata, force=False):
    """A small file from whole tensors."""
    model = StateDict(tensors)
    with create(path, model.entries.values(), metadata, force=force) as output:
        for name in tensors:
            output.put(name, 0, model.read(name))


def check_output(path, others, force, flag="-o", folder=None):
    """Refuse, before any work, an output that cannot or must not be written.

    others:   the files that the run reads, and its other outputs: none may be this one,
              lie in it or hold it
    folder:   the files of a result folder; None: the result is a file
    """
    real = Path(realpath(path))     # links are followed: two names may be one file
    fix = f"choose another {flag}"
    for other in others:
        # Where it lies, and where it is said to lie: the files of a downloaded model
        # may all be links into a cache.
        said = join(realpath(dirname(other)), basename(other))
        for where in map(Path, (realpath(other), said)):
            within = where.is_relative_to(real) or real.is_relative_to(where)
            need(not within, path, f"is (or holds, or lies in) {other}, which this run "
                 "reads or writes as well", fix)
    need(force or not exists(real), path, "the output exists",
         fix + ", or pass --force")
    fits = isfile
    if folder is not None:
        fits = isdir
    need(fits(real) or not exists(real), path, "a regular file does not replace a "
         "folder or a device, nor a folder a file", fix)
    held = {str(p.relative_to(real)) for p in real.rglob("*") if not p.is_dir()}
    foreign = sorted(held - set(folder or []))
    need(not foreign, path, f"the folder also holds {foreign[:5]}", "move that")
    # With a slash at its end the parent must be a folder.
    need(os.access(join(real.parent, ""), os.W_OK), path,
         "its folder is missing or not writable", fix)


# --- What all commands share: how they read, speak and fail ---------------------------
class Parser(argparse.ArgumentParser):
    """argparse with this project's contract: one line on stderr, exit code 2."""

    def __init__(self, **settings):
        # `--lam` must not change its meaning when `--lamp` is added.
        super().__init__(allow_abbrev=False, **settings)

    def read(self, argv):
        """The arguments; options and files in any order. An empty value is an unset
        shell variable (`--vae "$VAE"`), and never means "not given"."""
        found = self.parse_intermixed_args(argv)
        for value in vars(found).values():
            if value == "" or isinstance(value, list) and "" in value:
                self.error("a value is empty")
        return found

    def print_help(self, file=None):
        say(self.format_help(), stream=file)

    def error(self, message):
        # argparse's own prints the usage as well.
        self.exit(2, one_line(f"error: {self.prog}: {message}; fix: see --help") + "\n")


def say(*lines, stream=None):
    """Print lines, for commands; library functions print nothing. A reader that has
    gone (`| head`) is no error; the work goes on."""
    try:
        print(*lines, sep="\n", file=stream, flush=True)
    except OSError as error:
        # What was not taken goes nowhere: at its exit the interpreter would try again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())
        if not isinstance(error, BrokenPipeError):
            raise                       # the disk is full


def interrupt(number, frame):
    """The first signal unwinds the run as an exception, so that `appear` cleans up, and
    a training keeps its best state. Later ones must not disturb it at that."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def command(run):
    """Run a command's main, and return its exit code: 0 done, 1 what a file, a disk or
    the data caused, as one line on stderr; 130 interrupted, 143 terminated. Any other
    exception is a fault of this program, and keeps its traceback.

    130 and 143 are what shells expect: 128 and the number of the signal.
    """
    before = {number: signal.signal(number, interrupt)
              for number in (signal.SIGINT, signal.SIGTERM)}
    for name in ("stdout", "stderr"):
        # None: closed by whoever started us.
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")
        # A path may hold bytes that are no text, and a terminal may know only ASCII.
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)
    code = 1
    line = None
    try:
        code = run() or 0
    except CheckpointError as error:
        line = error
    except OSError as error:
        line = CheckpointError(error.filename or "output", error.strerror or error,
                               "check the path, permissions and free space")
    except (MemoryError, RuntimeError) as error:
        # torch's allocator for the CPU raises a plain RuntimeError, told by its text.
        if not re.search("can't allocate|(out of|enough) memory|^$", str(error)):
            raise
        line = "out of memory; fix: set OMP_NUM_THREADS=1, or take a larger machine"
    except KeyboardInterrupt:
        code = 130
        line = "interrupted; fix: run it again"
    if line:
        say(f"error: {line}", stream=sys.stderr)
    # As they were: an exception while the interpreter ends would be a traceback.
    for number, handler in before.items():
        signal.signal(number, handler)
    return code
