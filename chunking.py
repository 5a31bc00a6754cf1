"""chunking.py: a tensor <-> standardised chunks, and the files around them.      (read second)

    file --read--> flat_L --standardise----> x_L --chunk----> chunks_NC --to_windows----> x_BTC
    file <--put--- flat_L <--unstandardise-- x_L <--unchunk-- chunks_NC <--from_windows-- x_BTC

Every arrow has its inverse beside it. Paper: Sec. 3.2, "layer-aware chunking".

A worked example: a tensor of 7 weights with C = 4 gives N = 2 chunks; the last holds one padding
number, and `real` marks what is a weight (1) and what is padding (0):

    flat_L [a b c d e f g]  ->  chunks_NC [[a b c d] [e f g 0]],  real_NC [[1 1 1 1] [1 1 1 0]]

The first half of this file is that picture. The second half is files, read and written in pieces:
memory depends neither on the model nor on its largest tensor. Not here: pickles (they run code) and
memory maps (a file that shrinks under one kills the process).
"""
import argparse, contextlib, json, math, os, re, secrets, shutil, signal, sys, threading
from collections import namedtuple
from dataclasses import dataclass, replace

import torch
from safetensors import SafetensorError, safe_open

PIECE = 1 << 18     # weights at a time: 1 MB in float32, so that a piece fits into a core's cache


# --- Names. All that is known of architectures is this table: a fork adds a line, not a branch. ---
# (role, pattern); the pattern is searched in the dotted name behind the layer's number (outside the
# layers: in the whole name), the first match wins. Llama, BERT, GPT-2, GPT-NeoX, ViT, torch.nn.
ROLES = [
    ("norm",    r"norm|(^|\.)ln_?\d|(^|\.)ln_f"),
    ("router",  r"router|\bmlp\.gate$|block_sparse_moe\.gate$"),       # mixtures of experts
    ("qkv",     r"c_attn|qkv(_proj)?$|query_key_value|in_proj"),        # fused: GPT-2, NeoX
    ("q",       r"(q_proj|query|q_lin|wq|to_q)$"),                      # Llama, BERT, T5, ...
    ("k",       r"(k_proj|key|k_lin|wk|to_k)$"),
    ("v",       r"(v_proj|value|v_lin|wv|to_v)$"),
    ("o",       r"(o_proj|out_proj|out_lin|wo|att\w*\.(output\.dense|dense|c_proj|proj))$"),
    ("gate_up", r"gate_up_proj$"),                                      # fused: Phi-3
    ("gate",    r"(gate_proj|w1)$"),
    ("up",      r"(up_proj|w3|intermediate\.dense|c_fc|fc1|lin1|dense_h_to_4h)$"),
    ("down",    r"(down_proj|w2|output\.dense|mlp\.c_proj|fc2|lin2|dense_4h_to_h)$"),
    ("embed",   r"embed|(^|\.)wte$|(^|\.)wpe$"),                        # words, positions, types
    ("head",    r"lm_head|(^|\.)score$|classifier|embed_out"),
]

# Where a tensor sits: its layer (None outside the numbered ones), and its role (q, k, v, o, ...).
Place = namedtuple("Place", "layer role")


def place(name):
    """Layer and role of a tensor, read from its name.
    Example:  'model.layers.3.self_attn.q_proj.weight' -> Place(3, 'q')
    ours:     the layer is the first number that is a whole dotted part. Later numbers (experts of
              a mixture) and `bias` stay in the role, so that they only pair with their like. An
              unknown name is its own role: it still pairs with the same spelling elsewhere.
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if re.fullmatch("[0-9]{1,9}", part)]
    layer, rest = (int(parts[numbers[0]]), parts[numbers[0] + 1:]) if numbers else (None, parts)
    extra = [part for part in rest if part.isdigit() or part == "bias"]
    stem = ".".join(part for part in rest if part not in ("weight", "bias"))
    role = next((role for role, pattern in ROLES if re.search(pattern, stem, re.I)), stem or name)
    return Place(layer, ".".join([role, *extra]))


def natural_key(name):
    """Sort key that reads digits as numbers: layers.2 before layers.10, as depth demands."""
    parts = re.split("([0-9]+)", name)      # text, digits, text, digits, ...
    return [(i % 2, len(part.lstrip("0")) if i % 2 else 0, part.lstrip("0") if i % 2 else part)
            for i, part in enumerate(parts)]


def is_selected(entry, pattern=None):
    """Whether a tensor is encoded.
    ours:  floats of two or more dimensions inside numbered layers: attention and MLP (paper: Table
           6). Norms and biases are out (paper: Sec. 3.2) because they are vectors; a bias of two
           dimensions (fused experts) is in. With a pattern: all such floats whose name it finds."""
    named = place(entry.name).layer is not None if not pattern else re.search(pattern, entry.name)
    return bool(named) and entry.is_float and len(entry.shape) >= 2 and entry.numel > 0


# --- Tensors and their statistics: the record that makes chunks invertible ------------------------
@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `start` counts bytes from the beginning of the file."""
    name: str
    dtype: torch.dtype
    shape: tuple
    file: str = ""          # named in every error
    start: int = 0          # only where it comes from a file

    @property
    def numel(self): return math.prod(self.shape)       # L

    @property
    def is_float(self): return self.dtype.is_floating_point


@dataclass(frozen=True)
class TensorSlot(Entry):
    """An entry with its statistics: all that is needed to turn chunks back into this tensor."""
    mean: float = 0.0       # of the raw weights
    scale: float = 1.0      # their standard deviation (1/n); 1 where that is 0

    def n_chunks(self, C): return -(-self.numel // C)       # N = ceil(L / C)


def spans(numel, step=PIECE):
    """[(0, step), (step, 2 step), ...] over numel elements; one empty span for an empty tensor."""
    return [(start, min(start + step, numel)) for start in range(0, max(numel, 1), step)]


def measure(checkpoint, name):
    """TensorSlot of a tensor: mean and standard deviation in float64; refuses NaN and Inf.
    Equation:  M2 += M2_piece + (mean_piece - mean)^2 n n_piece / (n + n_piece)   (Chan et al. 1979)
               where M2 is the sum of squares about the mean. E[w^2] - E[w]^2 would cancel for a
               small spread around a large mean.
    """
    entry, count, mean, m2 = checkpoint.entries[name], 0, 0.0, 0.0
    for start, stop in spans(entry.numel):
        piece = checkpoint.read(name, start, stop).double()
        n, total = len(piece), piece.sum().item()
        need(math.isfinite(total), entry.file, f"NaN or Inf in elements {start} to {stop}",
             "repair or re-export the checkpoint", name)      # one sum shows every NaN and Inf
        if n:
            piece, delta = piece.sub_(total / n), total / n - mean      # piece: centred
            m2 += piece.dot(piece).item() + delta * delta * count * n / (count + n)
            mean, count = mean + delta * n / (count + n), count + n
    std = math.sqrt(m2 / count) if count else 0.0
    # float32 ends at 3e38, and squares and sums must fit as well.
    need(std + abs(mean) < 1e30, entry.file, "too large for float32 arithmetic", "rescale it", name)
    scale = std if std > 1e-12 * abs(mean) else 1.0     # else: the rounding of a constant tensor
    return TensorSlot(**vars(entry), mean=mean, scale=scale)


def standardise(flat_L, slot):
    """x = (w - mean) / scale, float32: mean 0 and variance 1 under the slot's statistics."""
    return flat_L.to(torch.float32, copy=True).sub_(slot.mean).div_(slot.scale)


def unstandardise(flat_L, slot):
    """The inverse, float32 again; the result is rounded once more, to the stored dtype."""
    return flat_L.float().mul(slot.scale).add_(slot.mean)


def cast(flat_L, slot):
    """The one rounding to the stored dtype; a value that does not fit is an error, never an Inf."""
    result = flat_L.to(slot.dtype)
    # One sum shows every NaN and Inf, ten times faster than a look at each weight.
    fits = result.float().sum().isfinite() or result.float().isfinite().all()
    need(fits, "result", f"does not fit {slot.dtype}", "lower --lam, or store it wider", slot.name)
    return result


# --- Chunks and windows (paper: Sec. 3.2) ---------------------------------------------------------
def chunk(flat_L, C):
    """paper: w in R^L, padded with zeros to L_p = ceil(L/c) c, cut into n = L_p / c chunks.
    Returns:  chunks_NC, and real_NC bool (1 = weight, 0 = padding). N = 0 for an empty tensor.
    """
    L, = flat_L.shape
    N = -(-L // C)      # ceil(L / C)
    if L == N * C:      # nothing to pad, nothing to copy
        return flat_L.reshape(N, C), flat_L.new_ones((), dtype=torch.bool).expand(N, C)
    chunks_NC = torch.cat([flat_L, flat_L.new_zeros(N * C - L)]).reshape(N, C)
    return chunks_NC, (torch.arange(N * C, device=flat_L.device) < L).reshape(N, C)


def unchunk(chunks_NC, L):
    """The inverse: (N, C) -> (L,), without the padding."""
    return chunks_NC.reshape(-1)[:L]


def to_windows(chunks_NC, real_NC, T):
    """T neighbouring chunks of ONE tensor form a window; the last is filled up with padding chunks.
    differs: the release concatenates all tensors and pads once; its windows straddle tensors."""
    N, C = chunks_NC.shape
    if fill := -N % T:
        chunks_NC = torch.cat([chunks_NC, chunks_NC.new_zeros(fill, C)])
        real_NC = torch.cat([real_NC, real_NC.new_zeros(fill, real_NC.shape[1])])
    return chunks_NC.reshape(-1, T, C), real_NC.reshape(-1, T, real_NC.shape[1])


def from_windows(x_BTC, N):
    """The inverse, for weights (last axis C) as for latents (last axis Z)."""
    return x_BTC.reshape(-1, x_BTC.shape[-1])[:N]       # (B, T, C) -> (N, C)


# === Files. From here on nothing is specific to the paper. ========================================
class CheckpointError(ValueError):
    """A file is not what it should be. One line: file, tensor, what is wrong, what to do."""

    def __init__(self, file, what, fix, tensor=None):
        where = f"{file}: " if tensor is None else f"{file}: tensor {tensor!r}: "
        line = f"{where}{what}; fix: {fix}"
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))


AGAIN = "the file is damaged or incomplete: fetch or write it again"
CONVERT = "convert it to safetensors; pickles run code"


def need(condition, file, what, fix=AGAIN, tensor=None):
    if not condition:
        raise CheckpointError(file, what, fix, tensor)


# safetensors' names of dtypes, wide ones first: in this order every tensor of a file is aligned.
DTYPES = {"U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "F32": torch.float32,
          "U32": torch.uint32, "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16,
          "U16": torch.uint16, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn,
          "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
DTYPE_NAMES = {dtype: code for code, dtype in DTYPES.items()}
# What people pass by mistake, told by its first bytes.
MAGIC = [(b"PK\x03\x04", "a zip archive (a torch .bin/.pt or an .npz)", CONVERT),
         (b"\x80", "a pickle (an old torch .bin/.pt)", CONVERT),
         (b"GGUF", "a GGUF file", "de-quantise it to safetensors or use the original checkpoint"),
         (b"version https://git-lfs", "a git-lfs pointer, not the weights", "run `git lfs pull`"),
         (b"<", "a web page or XML, not the weights", "download the file itself")]
# Side tensors of GPTQ, AWQ, bitsandbytes, fp8, compressed-tensors: their integers are no weights.
QUANTISED = re.compile(r"\.(qweight|SCB|weight_scale(_inv)?|weight_packed)$|quant_state|scales$")


def read_header(path):
    """([Entry, ...], metadata) of one safetensors file.
    The library opens it first: that is the audited check of lengths, offsets, overlaps and shapes.
    What it accepts is sound, and the header is then plain JSON behind eight bytes of its length.
    """
    need(os.path.isfile(path), path, "is no regular file", "pass a .safetensors file, or a folder")
    with open(path, "rb") as file:
        head = file.read(32)            # eight bytes of length, then the header's beginning
        try:
            with safe_open(path, framework="pt"):       # reads the header, not the weights
                pass
        except SafetensorError as error:
            for magic, what, fix in MAGIC if head[8:9] != b"{" else ():     # it is one, damaged
                need(not head.startswith(magic), path, f"not a safetensors file but {what}", fix)
            raise CheckpointError(path, f"not a safetensors file: {error}", AGAIN) from None
        base = 8 + int.from_bytes(head[:8], "little")
        file.seek(8)
        header = json.loads(file.read(base - 8))
    metadata, entries = header.pop("__metadata__", None) or {}, []
    need(header, path, "holds no tensors", "pass a checkpoint with weights")
    for name, record in header.items():
        need(not QUANTISED.search(name), path, "belongs to a quantised checkpoint",
             "use the original 16- or 32-bit checkpoint", name)
        # The library takes a list for an object, too; nobody writes one.
        need(isinstance(record, dict) and isinstance(record["dtype"], str), path,
             "is written in an unusual way", "load and save it with safetensors", name)
        need(record["dtype"] in DTYPES, path, f"dtype {record['dtype']} is not supported",
             f"use one of {', '.join(DTYPES)}", name)
        entries.append(Entry(name, DTYPES[record["dtype"]], tuple(record["shape"]), path,
                             base + record["data_offsets"][0]))
    return entries, metadata


def read_index(path):
    """{tensor name: path of its shard}. No shard lies outside the folder of the index."""
    try:
        with open(path, "rb") as file:
            table, folder = json.loads(file.read())["weight_map"], os.path.dirname(path)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(path, f"no index with weight_map: {error}"[:300], AGAIN) from None
    need(isinstance(table, dict) and table, path, "has no weight_map", "pass a checkpoint's index")
    shards = {n: os.path.join(folder, os.path.basename(str(shard))) for n, shard in table.items()}
    for name, shard in shards.items():
        need(os.path.isfile(shard), shard, f"is missing, {path} names it", "fetch it", name)
    return shards


def locate(path):
    """The one file that a user means: weights or an index of shards. In a folder the index comes
    first: a model.safetensors beside it may be a stale one."""
    need(os.path.lexists(path), path, "no such file or folder", "check the path")
    if not os.path.isdir(path):
        return path
    names = sorted(name for name in os.listdir(path) if name[0] != ".")
    need("adapter_config.json" not in names, path, "is an adapter, not a whole model",
         f"fold it first: python experiments/lora.py fold BASE {path} -o EXPERT")
    for end in (".safetensors.index.json", ".safetensors"):
        found = [name for name in names if name.endswith(end)]
        if "model" + end in found or len(found) == 1:
            return os.path.join(path, "model" + end if "model" + end in found else found[0])
    held = (found or names or ["it is empty"])[:5]
    what = f"holds {len(found) or 'no'} .safetensors files: {', '.join(held)}"
    raise CheckpointError(path, what, "pass one of them or an index; pickles must be converted")


STOP = threading.Event()    # merge.py sets it to give a run up: `read` then raises in its threads


class Checkpoint:
    """A checkpoint opened for reading: a .safetensors file, an index of shards, or a folder.

    entries: name -> Entry, layers in natural order.  files: all that is read.  folder: or None.
    metadata: of the first file's header.
    """

    def __init__(self, path):
        self.path, found = os.fspath(path), locate(os.fspath(path))
        self.folder = self.path if os.path.isdir(self.path) else None
        shards = read_index(found) if found.endswith(".json") else {}
        shard_files = sorted(set(shards.values()), key=natural_key) or [found]
        headers = [read_header(file) for file in shard_files]
        entries = [entry for part, _ in headers for entry in part]
        differ = {(e.name, e.file) for e in entries} ^ set(shards.items()) if shards else ()
        for name, file in sorted(differ):       # the first: both must say the same, both ways
            raise CheckpointError(found, f"index and {os.path.basename(file)} differ", AGAIN, name)
        self.entries = {e.name: e for e in sorted(entries, key=lambda e: natural_key(e.name))}
        self.metadata, self.files = headers[0][1], sorted({found, *shard_files})    # and the index
        self._open = {file: open(file, "rb") for file in shard_files}       # closed with the object

    def read(self, name, start=0, stop=None):
        """Elements [start, stop) of the flattened tensor, in the stored dtype: (stop - start,)."""
        entry = self.entries[name]
        stop = entry.numel if stop is None else min(stop, entry.numel)
        if STOP.is_set():
            raise InterruptedError      # the run was given up
        if stop <= start:       # beyond the end, or an empty tensor
            return torch.empty(0, dtype=entry.dtype)
        width = entry.dtype.itemsize
        data, handle = bytearray((stop - start) * width), self._open[entry.file].fileno()
        got = os.preadv(handle, [data], entry.start + start * width)     # no shared file position
        need(got == len(data), entry.file, "the file shrank while it was read", "run again", name)
        return torch.frombuffer(data, dtype=entry.dtype)

    def read_tensor(self, name):
        """A whole tensor, in its shape."""
        entry = self.entries[name]      # in pieces: one read of the system gives 2 GiB at most
        return torch.cat([self.read(name, *span) for span in spans(entry.numel)]).view(entry.shape)


class StateDict(Checkpoint):
    """Tensors in memory, read as a checkpoint is."""

    def __init__(self, tensors, name="state dict"):
        self.path, self.tensors, self.files = name, tensors, []
        self.entries = {key: Entry(key, tensors[key].dtype, tuple(tensors[key].shape), name)
                        for key in sorted(tensors, key=natural_key)}

    def read(self, name, start=0, stop=None):
        return self.tensors[name].detach().reshape(-1)[start:stop].cpu()    # a view, not a copy


class Layers:
    """A model layer by layer: {role: matrix} of the known roles, read when it is asked for."""

    def __init__(self, model, roles):
        self.model, named = model, {}           # named: {layer: {role: name}}
        for entry in model.entries.values():
            layer, role = place(entry.name)
            if layer is not None and role in roles and len(entry.shape) == 2 and entry.is_float:
                first = named.setdefault(layer, {}).setdefault(role, entry.name)    # its only one?
                need(first == entry.name, model.path, f"layer {layer} has two of role {role}",
                     "hidden units cannot be matched: give another --align", entry.name)
        self.names = [named[layer] for layer in sorted(named)]

    def __len__(self): return len(self.names)

    def __getitem__(self, j):
        return {role: self.model.read_tensor(name) for role, name in self.names[j].items()}


class Matched:
    """A source as if its layers and hidden units stood in the target's order. It holds what the two
    have in common; the target's own numbers stand where the source has no such unit.

    match: says which layer is which (layers), and which rows and columns (index), -1 for none."""

    def __init__(self, source, target, match, roles):
        self.source, self.target, self.path, self.files = source, target, source.path, source.files
        here, there = Layers(target, roles).names, Layers(source, roles).names
        self.entries, self.parts = {}, {}       # parts: name -> the source's entry, row, column
        for j, i in enumerate(match.layers):
            for role in here[j].keys() & there[i].keys() if i is not None else ():
                entry, other = target.entries[here[j][role]], source.entries[there[i][role]]
                self.entries[entry.name] = entry
                self.parts[entry.name] = other, *match.index(j, role)

    def read(self, name, start=0, stop=None):
        """As Checkpoint.read, float32: W~[j, k] = W_source[row(j), column(k)], read row by row.
        Example: row [1, -1], column [0]: source [[1], [2]], target [[7], [8]] -> [[2], [8]]"""
        other, row_J, column_K = self.parts[name]
        K, width, numel = len(column_K), other.shape[1], self.entries[name].numel
        start, stop = min(start, numel), min(numel if stop is None else stop, numel)
        j0, j1 = start // K, -(-stop // K)      # the rows of this piece
        merged_JK = self.target.read(name, j0 * K, j1 * K).float().view(-1, K)  # at first its own
        j_R, k_S = (row_J[j0:j1] >= 0).nonzero()[:, 0], (column_K >= 0).nonzero()[:, 0]
        rows = [self.source.read(other.name, i * width, (i + 1) * width)
                for i in row_J[j0 + j_R].tolist()]
        if rows:
            merged_JK[j_R[:, None], k_S] = torch.stack(rows)[:, column_K[k_S]].float()
        return merged_JK.view(-1)[start - j0 * K:stop - j0 * K]


# --- Writing. The library's save_file wants all tensors in memory at once. ------------------------
class Output:
    """A safetensors file of known layout, open for writing: pieces come in any order, from any
    thread or process, each element exactly once. Use `create`, which checks and renames it too."""

    def __init__(self, path, entries, metadata=None, new=False):
        """entries: names, dtypes, shapes. new: make the file; else another process has made it."""
        # By dtype, then by name, as the library orders them: equal inputs give equal bytes.
        ordered = sorted(entries, key=lambda e: ([*DTYPES].index(DTYPE_NAMES[e.dtype]), e.name))
        header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0  # as from torch
        for entry in ordered:
            start, end = end, end + entry.numel * entry.dtype.itemsize
            header[entry.name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape),
                                  "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)             # aligned, as the format asks for
        self.path, self.written, self.size = path, [], 8 + len(text) + end
        self.entries = {e.name: replace(e, start=8 + len(text) + header[e.name]["data_offsets"][0])
                        for e in ordered}
        self.file = open(path, "x+b" if new else "r+b", buffering=0)
        if new:
            if hasattr(os, "posix_fallocate"):      # a full disk says so now, not after an hour
                os.posix_fallocate(self.file.fileno(), 0, self.size)
            self.file.write(len(text).to_bytes(8, "little") + text)

    def put(self, name, start, piece):
        """Elements [start, start + len(piece)) of a flattened tensor, in its declared dtype."""
        entry = self.entries[name]
        assert piece.dtype == entry.dtype, f"{name}: {piece.dtype}, declared {entry.dtype}"
        if len(piece):
            data = memoryview(piece.contiguous().view(torch.uint8).numpy())
            done = os.pwrite(self.file.fileno(), data, entry.start + start * entry.dtype.itemsize)
            need(done == len(data), self.path, "the disk is full", "free some space, or another -o")
        self.written.append(len(piece))         # appending is atomic: threads need no lock

    def check(self):
        """All pieces are there, and the library's own reader, which others will use, opens it."""
        os.fsync(self.file)
        whole = sum(entry.numel for entry in self.entries.values())
        assert sum(self.written) == whole, "pieces are missing"
        with safe_open(self.path, framework="pt") as file:
            assert {*file.keys()} == {*self.entries}


@contextlib.contextmanager
def appear(path):
    """A path to write a file or a folder to, which takes the name `path` at the end, whole. What is
    raised in between removes it, and leaves what was there before."""
    path = os.path.realpath(path)       # a link is written through, not replaced
    partial = os.path.join(os.path.dirname(path), f".lsmerge-{secrets.token_hex(4)}.tmp")
    aside = partial + ".old"
    try:
        yield partial
        if os.path.isdir(partial) and os.path.exists(path):
            # Killed between the two renames, a run leaves both folders whole; the next one says so.
            os.rename(path, aside)
        os.replace(partial, path)       # in one step
    except OSError as error:            # a full disk has no name, and nobody knows the partial one
        if str(error.filename or partial).startswith(partial):
            error.filename = path
        raise
    finally:
        if os.path.exists(aside) and not os.path.exists(path):      # the second rename failed
            os.rename(aside, path)
        for rest in filter(os.path.exists, (partial, aside)):
            shutil.rmtree(rest) if os.path.isdir(rest) else os.unlink(rest)


@contextlib.contextmanager
def create(path, entries, metadata=None, folder=False):
    """An Output that appears at `path`, complete and checked; folder: as its model.safetensors,
    beside which others may put files (output.path)."""
    with appear(path) as partial:
        if folder:                      # its permissions, and a file's: as the umask says
            os.mkdir(partial)
        output = Output(os.path.join(partial, "model.safetensors") if folder else partial,
                        entries, metadata, new=True)
        yield output
        output.check()                  # whatever is wrong is found before anybody sees the file


def write_tensors(path, tensors, metadata):
    """A small file from whole tensors."""
    with create(path, StateDict(tensors).entries.values(), metadata) as output:
        for name, tensor in tensors.items():
            output.put(name, 0, tensor.detach().cpu().reshape(-1))


def check_output(path, inputs, force, folder=None):
    """Refuse, before any work, an output that is an input, exists, or cannot be made.
    inputs: all files that the run reads. folder: the names in a result folder; None: a file."""
    real, fix = os.path.realpath(path), "choose another -o"
    for file in inputs:     # where it lies, and where it is said to lie (a cache may be all links)
        said = os.path.join(os.path.realpath(os.path.dirname(file)), os.path.basename(file))
        for where in (os.path.realpath(file), said):
            need(not (where + os.sep).startswith(real + os.sep), path, f"is the input {file}", fix)
    need(not os.path.exists(real) or os.path.isdir(real) == (folder is not None), path,
         "a file does not replace a folder, nor a folder a file", fix)
    held = os.listdir(real) if os.path.isdir(real) else [""] * os.path.exists(real)     # "": a file
    need(force or not held, path, "the output exists", fix + ", or pass --force")
    others = sorted({*held} - {*(folder or [""])})
    need(not others, path, f"the folder also holds {', '.join(others[:5])}", "move that away")
    folder_of = os.path.join(os.path.dirname(real), "")         # with a slash at its end: no file
    need(os.access(folder_of, os.W_OK), path, "its folder is missing or not writable", fix)


def companions(folder):
    """Files of a model folder that go with the weights, relative to it."""
    kept = r"^[^.].*\.(json|txt|model|jinja|py)$|^(LICEN[CS]E|NOTICE)"
    lost = r"index\.json$|^(optimizer|scheduler|trainer_state|adapter_config)"
    names = [n for n in sorted(os.listdir(folder)) if re.search(kept, n) and not re.search(lost, n)]
    return [n for n in names if os.path.isfile(os.path.join(folder, n))]


def say(*lines):
    """Print lines, for commands."""
    for line in lines:
        print(line)


# --- What all commands share: how they fail -------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """argparse with this project's contract: one line on stderr, exit code 2."""

    def error(self, message):
        print(f"error: {self.prog}: {message}; fix: see --help", file=sys.stderr)
        raise SystemExit(2)             # argparse's own prints the usage as well


def command(run):
    """Run a command's main. What a file, a disk or the data can cause is one line on stderr and
    exit code 1; 130 interrupted, 143 terminated. Signals unwind, so that `create` cleans up."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))     # SystemExit
    sys.stdout.reconfigure(errors="backslashreplace")       # a path may hold bytes that are no text
    try:
        code = run() or 0
        sys.stdout.flush()              # here: at the interpreter's exit nobody could catch it
        return code
    except CheckpointError as error:
        line = error
    except BrokenPipeError:             # the reader of our output has gone (| head): no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        line = CheckpointError(error.filename or "I/O", error.strerror or error, "check the path, "
                               "permissions and free space")
    except (MemoryError, RuntimeError) as error:        # torch's allocators raise RuntimeErrors
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        line = "out of memory; fix: smaller --chunk, --tokens, --width or --batch"
    except KeyboardInterrupt:           # Ctrl-C
        print("error: interrupted, no output was written; fix: run it again", file=sys.stderr)
        return 130
    print(f"error: {line}", file=sys.stderr)
    return 1
