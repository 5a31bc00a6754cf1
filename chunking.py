"""chunking.py: a tensor <-> standardised chunks, and the files around them.
                                                                         (read second)

    file --read--> flat_L --standardise--> x_L --chunk--> chunks_NC --to_windows--> x_BTC
    file <--put-- flat_L <-unstandardise- x_L <-unchunk- chunks_NC <-from_windows- x_BTC

Every arrow has its inverse beside it. Paper: Sec. 3.2, "layer-aware chunking".

A worked example: a tensor of 7 weights with C = 4 gives N = 2 chunks. The last one holds
one number of padding, and `real` marks what is a weight (1) and what is padding (0):

    flat_L  [a b c d e f g]   ->   chunks_NC  [a b c d]      real_NC  [1 1 1 1]
                                              [e f g 0]               [1 1 1 0]

In this order: names, statistics, chunks and windows; then files. Files are read and
written in pieces, so that memory depends neither on the model nor on its largest tensor.
Not here: pickles (they run code) and memory maps (a file that shrinks under one kills
the process).
"""
import argparse
import contextlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import sys
import threading
from dataclasses import dataclass, replace
from typing import NamedTuple

from os.path import (basename, dirname, exists, isdir, isfile, join, lexists, realpath,
                     relpath)

import torch
from safetensors import SafetensorError, safe_open

# Weights that are read at a time: 1 MB in float32, so that a piece fits into a core's cache.
PIECE = 1 << 18


# --- Names: where a tensor sits in its model ---------------------------------------------
# All that is known of architectures is this table: a fork adds a line, not a branch. The
# pattern is searched in the dotted name behind the layer's number, without `weight` or
# `bias`; the first match wins. Covered: Llama, BERT, GPT-2, GPT-NeoX, T5, ViT, torch.nn.
ROLES = [
    ("norm", r"norm|(^|\.)ln_?\d|(^|\.)ln_f"),
    ("router", r"router|\bmlp\.gate$|block_sparse_moe\.gate$"),         # of experts
    ("qkv", r"c_attn|qkv(_proj)?$|query_key_value|in_proj_weight$"),    # fused
    ("q", r"(\bq|q_proj|query|q_lin|wq|to_q)$"),
    ("k", r"(\bk|k_proj|key|k_lin|wk|to_k)$"),
    ("v", r"(\bv|v_proj|value|v_lin|wv|to_v)$"),
    ("o", r"(o_proj|out_proj|out_lin)$"),
    ("o", r"att\w*\.(output\.dense|dense|c_proj|proj|wo|o)$"),
    ("gate_up", r"(gate_up_proj|mlp\.wi)$"),                            # fused
    ("gate", r"(gate_proj|w1|wi_0)$"),
    ("up", r"(up_proj|w3|wi_1|wi|intermediate\.dense|c_fc|fc1|lin1|dense_h_to_4h)$"),
    ("down", r"(down_proj|w2|wo|output\.dense|c_proj|fc2|lin2|dense_4h_to_h)$"),
    ("head", r"lm_head|embed_out|(^|\.)score$|classifier"),
    ("embed", r"embed|(^|\.)wte$|(^|\.)wpe$|^shared$"),                 # words, positions
]
# Dotted parts that a training framework puts around a module. They say nothing about it.
WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module",
            "_checkpoint_wrapped_module"}


class Place(NamedTuple):
    """Where a tensor sits: the four things that its name says."""
    stack: str          # what stands before the layer's number; "" outside the layers
    layer: int | None   # None outside the numbered layers
    role: str           # q, k, v, o, up, down, norm, ...
    rest: str           # the name behind the number; outside the layers the whole name


def parse_name(name, leading=False):
    """The Place of a tensor, read from its dotted name.

    Example:  'module.model.layers.3.self_attn.q_proj.weight'
              -> stack 'model.layers', layer 3, role 'q', rest 'self_attn.q_proj.weight'
    ours:     the layer is the first number that is a whole dotted part. A number that begins
              the name is none (sentence-transformers count modules: '0.auto_model...'),
              unless `leading` is given.
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    for i, part in enumerate(parts):
        if re.fullmatch("[0-9]{1,9}", part) and (i > 0 or leading):
            rest = ".".join(parts[i + 1:])
            return Place(".".join(parts[:i]), int(part), role_of(rest), rest)
    rest = ".".join(parts)
    return Place("", None, role_of(rest), rest)


def role_of(rest):
    """The role of a tensor within its layer. An unknown name is a role of its own: it still
    pairs with the same spelling elsewhere.

    ours:     numbers (experts of a mixture, T5's sublayers), `bias` and cross-attention are
              kept, so that a tensor only pairs with its like: 'experts.3.w1' -> 'gate.3'
    """
    parts = rest.split(".")
    stem = ".".join(part for part in parts if part not in ("weight", "bias"))
    marks = [part for part in parts if part.isdigit() or part == "bias"]
    if re.search("cross|encoder_attn|encdec", stem, re.IGNORECASE):
        marks.append("cross")
    for role, pattern in ROLES:
        if re.search(pattern, stem, re.IGNORECASE):
            return ".".join([role, *marks])
    return ".".join([stem, *marks])


def parse_names(names):
    """{name: Place} of one model. Where no name has a layer otherwise, a number at its very
    beginning is one (a torch.nn.Sequential: '0.weight', '2.weight')."""
    places = {name: parse_name(name) for name in names}
    if all(place.layer is None for place in places.values()):
        places = {name: parse_name(name, leading=True) for name in names}
    return places


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, without its numbers."""
    name: str
    dtype: torch.dtype
    shape: tuple
    file: str = ""              # the file that holds it; named in every error
    start: int = 0              # its first byte there
    place: Place = Place("", None, "", "")

    @property
    def numel(self): return math.prod(self.shape)       # L

    @property
    def is_float(self): return self.dtype.is_floating_point


def is_selected(entry, pattern=None):
    """Whether a tensor is encoded.

    paper:    attention and MLP (Table 6); norms and biases are left out (Sec. 3.2)
    ours:     floats of two or more dimensions inside numbered layers. Norms and biases are
              vectors; biases of fused experts have two dimensions and are in; a `bias` of
              more (GPT-2's causal mask) is no weight. With a pattern: all such floats whose
              name it finds, in a layer or not.
    """
    dimensions = len(entry.shape)
    mask = entry.name.endswith("bias") and dimensions > 2
    if not entry.is_float or dimensions < 2 or entry.numel == 0 or mask:
        return False
    if pattern is not None:
        return re.search(pattern, entry.name) is not None
    return entry.place.layer is not None


# --- Statistics: the record that makes chunks invertible ----------------------------------
@dataclass(frozen=True)
class TensorStats(Entry):
    """An entry with the statistics that turn its chunks back into weights."""
    mean: float = 0.0       # of the raw weights
    std: float = 0.0        # their standard deviation (1/n)

    @property
    def constant(self):
        """All weights are equal, but for the rounding of their sum."""
        return self.std <= 1e-12 * abs(self.mean)

    @property
    def scale(self):
        """What a weight is divided by; a constant tensor has no unit of its own."""
        if self.constant:
            return 1.0
        return self.std

    def n_chunks(self, C): return -(-self.numel // C)       # N = ceil(L / C)


def spans(numel, step=PIECE):
    """[(0, step), (step, 2 step), ...] over numel elements; one empty span if there is none."""
    return [(start, min(start + step, numel)) for start in range(0, max(numel, 1), step)]


def measure(checkpoint, name):
    """TensorStats of a tensor, in float64; NaN and Inf are refused.

    Equation:  M2 += M2_piece + (mean_piece - mean)^2 n n_piece / (n + n_piece)
    Source:    Chan et al. 1979. M2 is the sum of squares about the mean. The shorter
               E[w^2] - E[w]^2 would cancel for a small spread around a large mean.
    """
    entry = checkpoint.entries[name]
    mean = 0.0
    m2 = 0.0
    for start, stop in spans(entry.numel):
        n = stop - start
        if n == 0:
            break                                   # an empty tensor
        piece_L = checkpoint.read(name, start, stop).double()
        variance, piece_mean = map(float, torch.var_mean(piece_L, correction=0))
        need(math.isfinite(variance), entry.file, "holds NaN or Inf",
             "repair or re-export the checkpoint", name)
        delta = piece_mean - mean
        m2 += variance * n + delta ** 2 * start * n / stop      # start: n so far
        mean += delta * n / stop
    std = math.sqrt(m2 / max(1, entry.numel))
    # float32 ends at 3e38, and squares and sums must fit as well.
    need(std + abs(mean) < 1e30, entry.file, "too large for float32 arithmetic",
         "rescale it", name)
    return TensorStats(**vars(entry), mean=mean, std=std)


def pool(parents):
    """(mean, std) that parents of one shape share: each of them weighs the same.

    Equation:  mean = average of mean_k,  std^2 = average of std_k^2 + (mean_k - mean)^2
    Example:   means 0 and 2, both std 1: mean 1, std sqrt(2)
    ours:      symmetric in the parents; and a target near zero does not set the unit for
               a source that is not
    """
    n = len(parents)
    mean = sum(parent.mean for parent in parents) / n
    square = sum(parent.std ** 2 + (parent.mean - mean) ** 2 for parent in parents) / n
    return mean, math.sqrt(square)


def wide(dtype):
    """The arithmetic of a stored dtype: float64 keeps its own, all others take float32."""
    if dtype == torch.float64:
        return torch.float64
    return torch.float32


def standardise(flat_L, stats):
    """x = (w - mean) / scale, float32 (paper: weights are standardised first). The mean is
    taken off before float64 weights are rounded: a small spread survives."""
    x_L = flat_L.to(wide(flat_L.dtype), copy=True)
    return x_L.sub_(stats.mean).div_(stats.scale).float()


def unstandardise(x_L, stats):
    """The inverse: w = scale x + mean, in the arithmetic of the stored dtype."""
    return x_L.to(wide(stats.dtype)).mul(stats.scale).add_(stats.mean)


def cast(flat_L, entry):
    """The one rounding to the stored dtype. A value that does not fit is an error, never an
    Inf."""
    result_L = flat_L.to(entry.dtype)
    # One sum shows every NaN and Inf, ten times faster than a look at each weight; only if
    # the sum itself overflows must each be looked at.
    fits = result_L.double().sum().isfinite() or result_L.double().isfinite().all()
    need(fits, "result", f"does not fit {entry.dtype}", "lower --lam, or store it wider",
         entry.name)
    return result_L


# --- Chunks and windows (paper: Sec. 3.2) -------------------------------------------------
def chunk(flat_L, C):
    """Cut a flattened tensor into chunks.

    paper:    w in R^L, padded with zeros to L_p = ceil(L / c) c, cut into n = L_p / c chunks
    Returns:  chunks_NC, and real_NC bool (1 = weight, 0 = padding); N = 0 if L = 0
    """
    L, = flat_L.shape
    N = -(-L // C)                                                  # ceil(L / C)
    padded = torch.cat([flat_L, flat_L.new_zeros(N * C - L)])       # (N C,)
    real = torch.arange(N * C, device=flat_L.device) < L            # (N C,)
    return padded.view(N, C), real.view(N, C)


def unchunk(chunks_NC, L):
    """The inverse: (N, C) -> (L,), without the padding."""
    return chunks_NC.reshape(-1)[:L]


def to_windows(chunks_NC, real_NC, T):
    """T neighbouring chunks of ONE tensor form a window, what attention sees at a time; the
    last window is filled up with padding chunks.

    Returns:  x_BTC and real_BTC, with B = ceil(N / T)
    differs:  the paper's release concatenates all tensors and pads once, so that its windows
              straddle tensors
    """
    N, C = chunks_NC.shape
    fill = -N % T
    x_NC = torch.cat([chunks_NC, chunks_NC.new_zeros(fill, C)])
    real_NC = torch.cat([real_NC, real_NC.new_zeros(fill, C)])
    return x_NC.view(-1, T, C), real_NC.view(-1, T, C)              # (N, C) -> (B, T, C)


def from_windows(x_BTC, N):
    """The inverse, for weights (last axis C) as for latents (last axis Z)."""
    return x_BTC.reshape(-1, x_BTC.shape[-1])[:N]                   # (B, T, C) -> (N, C)


# === Files. From here on nothing is specific to the paper. ==============================
class CheckpointError(ValueError):
    """What a file, the data or the disk is to blame for, as one line: file, tensor, what
    is wrong, what to do."""

    def __init__(self, file, what, fix, tensor=None):
        where = f"{file}: "
        if tensor is not None:
            where += f"tensor {tensor!r}: "
        line = f"{where}{what}; fix: {fix}"
        # A name may hold line breaks and control characters: they are shown as codes.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))


AGAIN = "the file is damaged or incomplete: fetch or write it again"
ORIGINAL = "use the original 16- or 32-bit checkpoint"


def need(condition, file, what, fix=AGAIN, tensor=None):
    """Raise a CheckpointError unless the condition holds."""
    if not condition:
        raise CheckpointError(file, what, fix, tensor)


# safetensors' names of dtypes, wide ones first: in this order every tensor is aligned.
DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "F32": torch.float32,
    "U32": torch.uint32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
DTYPE_NAMES = {dtype: code for code, dtype in DTYPES.items()}
# What people pass by mistake, told by its first bytes; and what to do.
MAGIC = [
    (b"PK\x03\x04", "a zip archive (a torch .bin/.pt or an .npz)", "convert it"),
    (b"\x80", "a pickle (an old torch .bin/.pt)", "convert it: pickles run code"),
    (b"GGUF", "a GGUF file", "de-quantise it to safetensors or use the original"),
    (b"version https://git-lfs", "a git-lfs pointer, no weights", "run `git lfs pull`"),
    (b"<", "a web page or XML, not the weights", "download the file itself")]
# Numbers that mean a weight only together with a scale. (int64 is for indices.)
PACKED = {torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint32,
          torch.float8_e4m3fn, torch.float8_e5m2}
SCALES = re.compile(r"scale|absmax|quant|qzeros|\bscb\b", re.IGNORECASE)


def read_header(path):
    """([Entry, ...], metadata) of one safetensors file.

    The library opens it: that is the audited check of lengths, offsets, overlaps and
    shapes. What it accepts has no holes, so that the tensors lie one behind the other.
    """
    need(isfile(path), path, "is no regular file", "pass a .safetensors file")
    with open(path, "rb") as file:
        head = file.read(32)
    for magic, what, fix in MAGIC:
        mistaken = head.startswith(magic) and head[8:9] != b"{"
        need(not mistaken, path, f"not a safetensors file but {what}", fix)
    start = 8 + int.from_bytes(head[:8], "little")      # eight bytes, then the header
    entries = []
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                record = file.get_slice(name)           # reads no weights
                code = record.get_dtype()
                need(code in DTYPES, path, f"dtype {code} is not supported",
                     "load it and save it as float32", name)
                entry = Entry(name, DTYPES[code], tuple(record.get_shape()), path, start)
                entries.append(entry)
                start += entry.numel * entry.dtype.itemsize
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(path, f"no safetensors file: {error}", AGAIN) from None
    need(entries, path, "holds no tensors", "pass a checkpoint with weights")
    return entries, metadata


def refuse_quantised(entries, folder):
    """Integers or float8 beside their scales are no weights, whatever their names: a
    merge of them would be noise.
    Example:  'q_proj.weight' in float8 beside 'q_proj.weight_scale'"""
    scaled = set()              # modules (and bitsandbytes' weights) that have a scale
    for name in entries:
        module, _, leaf = name.rpartition(".")
        if SCALES.search(leaf):
            scaled.add(module)
    for name, entry in entries.items():
        packed = entry.dtype in PACKED and len(entry.shape) >= 2
        owner = {name, name.rpartition(".")[0]}
        need(not (packed and owner & scaled), entry.file,
             f"is quantised: {entry.dtype} beside its scales", ORIGINAL, name)
    for name in ("config.json", "hf_quant_config.json"):
        config = join(folder, name)
        if isfile(config):
            with open(config, "rb") as file:
                said = re.search(rb'"(quantization|compression)(_config)?"\s*:\s*\{\s*"',
                                 file.read())
            need(not said, config, "says that the checkpoint is quantised", ORIGINAL)


def read_index(path):
    """{tensor name: path of its shard}; empty if no shard is there, as the index is stale.
    A shard may lie in a sub-folder, but not outside the folder of the index."""
    folder = dirname(os.path.abspath(path))
    shards = {}
    try:
        with open(path, "rb") as file:
            table = json.loads(file.read())["weight_map"]
        for name, shard in table.items():
            shards[name] = os.path.normpath(join(folder, shard))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        what = f"no index with a weight_map: {error}"[:300]
        raise CheckpointError(path, what, AGAIN) from None
    present = [shard for shard in shards.values() if isfile(shard)]
    for name, shard in shards.items():
        need(is_inside(shard, folder), path, f"{shard} is outside its folder",
             "move the shard here", name)
        need(shard in present or not present, shard, f"is missing; {path} names it",
             "fetch it", name)
    if present:
        return shards
    return {}


def locate(path):
    """(file, shards): the weights that a path means, a file and {}, or an index and its
    map."""
    need(lexists(path), path, "no such file or folder",
         "check the path; nothing is downloaded: fetch a hub's model first")
    if isdir(path):
        path = choose(path)
    if not path.endswith(".json"):
        return path, {}
    shards = read_index(path)
    need(shards, path, "none of its shards is there", "fetch them")
    return path, shards


def choose(folder):
    """The index or the weights file of a folder. An index comes first; a stale one, none of
    whose shards is there, yields to model.safetensors. Ambiguity is refused."""
    names = sorted(name for name in os.listdir(folder) if name[0] != ".")
    names = [name for name in names if not name.startswith("adapter_model")]
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    files = [name for name in names if name.endswith(".safetensors")]
    if "model.safetensors.index.json" in indexes:
        indexes = ["model.safetensors.index.json"]
    if "model.safetensors" in files:
        files = ["model.safetensors"]
    if len(indexes) == 1 and (files != ["model.safetensors"]
                              or read_index(join(folder, indexes[0]))):
        return join(folder, indexes[0])
    if len(files) == 1:
        return join(folder, files[0])
    need(files or "adapter_config.json" not in names, folder, "is an adapter, no model",
         "fold it: python experiments/tools/lora.py fold BASE ADAPTER -o EXPERT")
    held = ", ".join((files or names or ["nothing"])[:5])
    raise CheckpointError(folder, f"holds {len(files)} .safetensors files, not one: {held}",
                          "pass one of them or an index; pickles must be converted")


STOP = threading.Event()    # set to give a run up: `read` then raises in its threads


class Checkpoint:
    """A checkpoint opened for reading: a .safetensors file, an index of shards, a folder.

    entries: {name: Entry}, in the order of `in_order`.  files: all that is read.
    folder: of the model, or None for a file.            metadata: of the last header.
    """

    def __init__(self, path):
        self.path = os.fspath(path)
        self.folder = None
        if isdir(self.path):
            self.folder = self.path
        file, shards = locate(self.path)
        shard_files = sorted({*shards.values()} or {file})
        entries = []
        for shard_file in shard_files:
            held, self.metadata = read_header(shard_file)
            for entry in held:      # the index says what is read from where, and no more
                if not shards or shards.get(entry.name) == shard_file:
                    entries.append(entry)
        self.entries = in_order(entries)
        for name, shard_file in shards.items():
            need(name in self.entries, shard_file, f"lacks what {file} says", AGAIN, name)
        refuse_quantised(self.entries, dirname(file))
        self.files = [file, *shard_files]
        self._handles = {name: open(name, "rb") for name in shard_files}
        self._lock = threading.Lock()       # a handle has one position for all threads

    def read(self, name, start=0, stop=None):
        """Elements [start, stop) of the flattened tensor, in the stored dtype, as a copy
        that the caller may write to: (stop - start,)."""
        if STOP.is_set():
            raise InterruptedError          # the run was given up
        entry = self.entries[name]
        stop = min(stop or entry.numel, entry.numel)
        if stop <= start:                   # beyond the end, or an empty tensor
            return torch.empty(0, dtype=entry.dtype)
        width = entry.dtype.itemsize        # bytes
        data = bytearray((stop - start) * width)
        file = self._handles[entry.file]
        with self._lock:
            file.seek(entry.start + start * width)
            got = file.readinto(data)
        need(got == len(data), entry.file, "shrank while it was read", "run again", name)
        return torch.frombuffer(data, dtype=entry.dtype)

    def read_tensor(self, name):
        """A whole tensor, in its shape."""
        return self.read(name).view(self.entries[name].shape)


def in_order(entries):
    """{name: Entry} with the Place of each: what stands outside the layers, then each
    stack, layer by layer (layers.2 before layers.10)."""
    places = parse_names([entry.name for entry in entries])
    placed = [replace(entry, place=places[entry.name]) for entry in entries]
    placed.sort(key=lambda e: (e.place.stack, -1 if e.place.layer is None else
                               e.place.layer, e.name))
    return {entry.name: entry for entry in placed}


class StateDict(Checkpoint):
    """Tensors in memory, read as a checkpoint is."""

    def __init__(self, tensors, name="state dict"):
        self.path = name
        self.folder = None
        self.files = []
        self.tensors = tensors
        self.entries = in_order([Entry(key, tensor.dtype, tuple(tensor.shape), name)
                                 for key, tensor in tensors.items()])

    def read(self, name, start=0, stop=None):
        flat_L = self.tensors[name].detach().reshape(-1)[start:stop]
        return flat_L.to("cpu", copy=True)


# --- Writing. The library's save_file wants all tensors in memory at once. --------------
class Output:
    """A safetensors file of known layout, open for writing. Pieces come in any order, from
    any thread or process, each element exactly once. `create` checks and names it."""

    def __init__(self, path, entries, metadata=None, new=False):
        """entries: names, dtypes, shapes. new: make the file; else another process has."""
        self.path = path
        self.entries = sorted(entries, key=lambda e: (-e.dtype.itemsize, e.name))   # aligned
        self.written = []                   # elements of each piece: appending is atomic
        header = {"__metadata__": {"format": "pt", **(metadata or {})}}
        end = 0
        for entry in self.entries:
            start = end
            end += entry.numel * entry.dtype.itemsize
            header[entry.name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape,
                                  "data_offsets": [start, end]}
        packed = json.dumps(header, ensure_ascii=False).encode("utf-8", "replace")
        packed += b" " * (-len(packed) % 8)             # the format asks for it
        need(len(packed) <= 100_000_000, path, "its header is longer than any reader takes",
             "merge a checkpoint of fewer tensors")
        self.starts = {name: 8 + len(packed) + header[name]["data_offsets"][0]
                       for name in header if name != "__metadata__"}
        if new:
            with open(path, "xb") as file:
                file.write(len(packed).to_bytes(8, "little") + packed)
                file.truncate(8 + len(packed) + end)

    def put(self, name, start, piece_L):
        """Elements [start, start + len(piece_L)) of a flattened tensor, in its dtype."""
        data = piece_L.contiguous().view(torch.uint8).numpy()
        # A handle of its own: no shared position, and nothing is open at the renaming.
        with open(self.path, "r+b") as file:
            file.seek(self.starts[name] + start * piece_L.dtype.itemsize)
            file.write(data)
        self.written.append(len(piece_L))

    def check(self):
        """The file is whole: by count, and for the library's own reader, which others will
        use. Not an assert: `python -O` would pass over it."""
        whole = sum(entry.numel for entry in self.entries)
        with safe_open(self.path, framework="pt") as file:
            complete = sum(self.written) == whole and len(file.keys()) == len(self.entries)
        need(complete, self.path, "was not written completely", "run it again")


@contextlib.contextmanager
def appear(path, force=False):
    """A path to write a file or a folder to, which takes the name `path` at the end, whole.
    What is raised in between removes it, and leaves what was there before."""
    path = realpath(path)       # a link is written through, not replaced
    # The number of the process tells the next run whose unfinished work this is.
    name = f".lsmerge-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    partial = join(dirname(path), name)
    old = partial + ".old"
    try:
        yield partial
        if force and exists(path):
            os.rename(path, old)        # killed here, a run leaves both of them whole
        rename_new(partial, path)
    except OSError as error:
        # A full disk names no file, and nobody knows the partial one.
        if str(error.filename or partial).startswith(partial):
            error.filename = path
        raise
    finally:
        if exists(old) and not exists(path):
            os.rename(old, path)        # the new one did not come
        for rest in (partial, old):
            if isdir(rest):
                shutil.rmtree(rest)
            elif exists(rest):
                os.unlink(rest)


def rename_new(partial, path):
    """Rename, in one step that fails where the name was taken meanwhile."""
    try:
        if isdir(partial):
            os.rename(partial, path)    # fails where a folder holds anything
        else:
            os.link(partial, path)      # `appear` then removes the other name
    except OSError:
        need(not lexists(path), path, "was made by another program meanwhile",
             "choose another -o, or pass --force")
        os.rename(partial, path)        # a file system that knows no links


@contextlib.contextmanager
def create(path, entries, metadata=None, folder=False, force=False):
    """An Output that appears at `path`, complete and checked. folder: as the
    model.safetensors of a folder, beside which others may put files (output.path)."""
    with appear(path, force) as partial:
        file = partial
        if folder:
            os.mkdir(partial)           # its permissions, and a file's: as the umask says
            file = join(partial, "model.safetensors")
        output = Output(file, entries, metadata, new=True)
        yield output
        output.check()                  # what is wrong is found before anybody sees it


def write_tensors(path, tensors, metadata, force=False):
    """A small file from whole tensors."""
    model = StateDict(tensors)
    with create(path, model.entries.values(), metadata, force=force) as output:
        for name in tensors:
            output.put(name, 0, model.read(name))


def is_inside(path, folder):
    """Whether a path is a folder, or lies in it."""
    return (path + os.sep).startswith(folder + os.sep)


def check_output(path, others, force, flag="-o", folder=None):
    """Refuse, before any work, an output that cannot or must not be written.

    others: the files that the run reads, and its other outputs: none may be this one, lie
    in it or hold it.  folder: the files of a result folder; None: the result is a file.
    """
    real = realpath(path)
    fix = f"choose another {flag}"
    for other in others:
        # Where it lies, and where it is said to lie (a cache may be all links).
        said = realpath(dirname(other))
        said = join(said, basename(other))
        for where in (realpath(other), said):
            apart = not is_inside(where, real) and not is_inside(real, where)
            need(apart, path, f"and {other} are in each other's way", fix)
    there = exists(real)
    is_folder = isdir(real)
    need(not there or is_folder or isfile(real), path, "is no regular file", fix)
    need(not there or is_folder == (folder is not None), path,
         "a file does not replace a folder, nor a folder a file", fix)
    held = set()
    for where, _, names in os.walk(real):
        held |= {relpath(join(where, name), real) for name in names}
    need(force or not there or is_folder and not held, path, "the output exists",
         fix + ", or pass --force")
    foreign = sorted(held - set(folder or []))
    need(not foreign, path, f"the folder also holds {', '.join(foreign[:5])}", "move that")
    parent = join(dirname(real), "")    # with a slash at its end: no file
    need(os.access(parent, os.W_OK), path, "its folder is missing or not writable", fix)


# --- What all commands share: how they read, speak and fail -----------------------------
class Parser(argparse.ArgumentParser):
    """argparse with this project's contract: one line on stderr, exit code 2; and no
    abbreviations, whose meaning a later flag could change."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def read(self, argv):
        """The arguments; options and files in any order. An empty value is an unset shell
        variable, and never means "not given"."""
        found = self.parse_intermixed_args(argv)
        for name, value in vars(found).items():
            if value == "" or isinstance(value, list) and "" in value:
                self.error(f"the value of {name} is empty")
        return found

    def print_help(self, file=None):
        say(self.format_help(), stream=file)

    def error(self, message):
        say(f"error: {self.prog}: {message}; fix: see --help", stream=sys.stderr)
        raise SystemExit(2)             # argparse's own prints the usage as well


def say(*lines, stream=None):
    """Print lines. A reader that has gone (`| head`) is no error; the work goes on."""
    stream = stream or sys.stdout
    try:
        print(*lines, sep="\n", file=stream, flush=True)
    except OSError as error:
        # What was not taken goes nowhere: at its exit the interpreter would try again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not isinstance(error, BrokenPipeError):
            raise                       # the disk is full


def interrupt(number, frame):
    """The first signal unwinds the run, so that `appear` cleans up; later ones must not
    disturb it at that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def command(run):
    """Run a command's main, and return its exit code. What a file, a disk or the data can
    cause is one line on stderr and code 1; 130 interrupted, 143 terminated."""
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:              # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        # A path may hold bytes that are no text, and a terminal may know only ASCII.
        getattr(sys, name).reconfigure(errors="backslashreplace")
    code = 1
    try:
        return run() or 0
    except CheckpointError as error:
        line = error
    except OSError as error:
        line = CheckpointError(error.filename or "output", error.strerror or error,
                               "check the path, permissions and free space")
    except (MemoryError, RuntimeError) as error:
        # torch's allocator for the CPU raises a plain RuntimeError, told by its text.
        if not re.search("can't allocate|out of memory|^$", str(error)):
            raise
        line = "out of memory; fix: set OMP_NUM_THREADS=1, or take a larger machine"
    except KeyboardInterrupt:
        code = 130
        line = "interrupted; fix: run it again"
    with contextlib.suppress(OSError):              # nobody is left to be told
        say(f"error: {line}", stream=sys.stderr)
    return code
