"""chunking.py: a checkpoint file <-> named tensors <-> standardised chunks.        (read second, after lsmerge.py)

    file --read--> flat_L --scale--> flat_L ~ (0, 1) --chunk--> chunks_NC, real_NC --to_windows--> x_BTC, real_BTC
    file <-write-- flat_L <-unscale- flat_L          <-unchunk- chunks_NC          <-from_windows- x_BTC

Every arrow has its inverse beside it, and each pair is bit-exact except scale/unscale (one float32 rounding).
Paper: Sec. 3.2 ("layer-aware chunking"), Table 1 and Fig. 2 (`python chunking.py CHECKPOINT`).

A worked example: a tensor of 7 weights with C = 4 gives N = 2 chunks, the last with one padding number:
    flat_L [a b c d e f g]  ->  chunks_NC [[a b c d] [e f g 0]],  real_NC [[1 1 1 1] [1 1 1 0]]   (1 = weight)

Owned here: the bytes on disk (no other module opens a checkpoint), what a tensor's name says about its role and
depth, and the statistics of a tensor. Absent on purpose: pickle, mmap (a file truncated under a live mapping
kills the process; a short `pread` is an error with a name), and any table of architectures: names are enough.
"""
import argparse, ctypes, difflib, hashlib, itertools, json, math, os, re, shutil, signal, stat, sys, tempfile, threading, warnings
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
from safetensors import SafetensorError, safe_open


class CheckpointError(ValueError):
    """A file is not what it should be. One line: file, tensor, what is wrong, what to do."""

    def __init__(self, file, what, fix, tensor=None):
        self.facts = (file, what, fix, tensor)
        line = f"{file}: " + (f"tensor {tensor!r}: " if tensor is not None else "") + f"{what}; fix: {fix}"
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))       # one line, whatever the names

    def __reduce__(self): return CheckpointError, self.facts               # it travels between processes


AGAIN = "the file is damaged or incomplete: fetch or write it again"


def need(condition, file, what, fix=AGAIN, tensor=None):
    if not condition:
        raise CheckpointError(file, what, fix, tensor)


# --- Names: role and depth. Architecture knowledge is this table; a fork adds a line, not a branch ------------------
# (role, pattern over the dotted name behind the layer number, or the whole name outside the layers); the first match
# wins. Spellings: Llama/Gemma/Qwen/Mistral, BERT, GPT-2 (c_*), GPT-NeoX/Falcon, ViT, torch.nn.
ROLES = [
    ("norm",    r"norm|(^|\.)ln_?\d|(^|\.)ln_f"),
    ("router",  r"router|\bmlp\.gate$|block_sparse_moe\.gate$"),
    ("qkv",     r"c_attn|qkv(_proj)?$|query_key_value|in_proj"),
    ("q",       r"(q_proj|query|q_lin|wq|to_q)$"),
    ("k",       r"(k_proj|key|k_lin|wk|to_k)$"),
    ("v",       r"(v_proj|value|v_lin|wv|to_v)$"),
    ("o",       r"(o_proj|out_proj|out_lin|wo|attention\.output\.dense|attn\.c_proj|attention\.dense|attn\.proj)$"),
    ("gate_up", r"gate_up_proj$"),
    ("gate",    r"(gate_proj|w1)$"),
    ("up",      r"(up_proj|w3|intermediate\.dense|c_fc|fc1|lin1|dense_h_to_4h)$"),
    ("down",    r"(down_proj|w2|output\.dense|mlp\.c_proj|fc2|lin2|dense_4h_to_h)$"),
    ("embed",   r"embed|(^|\.)wte$|(^|\.)wpe$"),
    ("head",    r"lm_head|(^|\.)score$|classifier|embed_out"),
]


def natural_key(name):
    """Sort key that reads digits as numbers: layers.2 before layers.10 (text order would scramble the depth)."""
    parts = re.split("([0-9]+)", name)
    # By length, then as text: as numbers, but for digits without end, which int() refuses.
    return [(1, 0, part) if i % 2 == 0 else (0, len(part.lstrip("0")), part.lstrip("0")) for i, part in enumerate(parts)]


@dataclass(frozen=True)
class Place:
    """Where a tensor sits. `layer` is None outside numbered layers; `role` joins tensors across architectures."""
    layer: int | None
    role: str


def place(name):
    """Role and depth of a tensor from its name.  'model.layers.3.self_attn.q_proj.weight' -> Place(3, 'q').

    ours: the layer is the first number that is a whole dotted part. Later numbers (experts of a mixture), the
    adapter's factor (PEFT's lora_A, lora_B) and `bias` stay in the role, so that they only pair with their like.
    An unknown name keeps its own spelling as role: it still pairs with the same spelling elsewhere.
    """
    parts = name.split(".")
    cut = next((i for i, part in enumerate(parts) if re.fullmatch("[0-9]{1,9}", part)), None)
    layer, rest = (None, parts) if cut is None else (int(parts[cut]), parts[cut + 1:])
    extra = [p for p in rest if p.isdigit() or p.startswith("lora_") or p == "bias"]
    stem = ".".join(p for p in rest if p not in ("weight", "bias", "base_layer", "default") and not p.startswith("lora_"))
    role = next((role for role, pattern in ROLES if re.search(pattern, stem, re.I)), None) or stem or name
    return Place(layer, ".".join([role, *extra]))


# --- Reading. The header is checked here, before any work: the library's own messages name neither file nor tensor. ---
# In the order of the library's writer: wide dtypes first, so that every tensor of a file is aligned.
DTYPES = {"U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "U32": torch.uint32,
          "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAGIC = [(b"PK\x03\x04", "a zip archive (a torch .bin/.pt or an .npz)", "convert it to safetensors; pickles run code"),
         (b"\x80", "a pickle (an old torch .bin/.pt)", "convert it to safetensors; pickles run code"),
         (b"GGUF", "a GGUF file", "de-quantise it to safetensors or use the original checkpoint"),
         (b"version https://git-lfs", "a git-lfs pointer, not the weights", "run `git lfs pull`"),
         (b"<", "a web page or XML, not the weights", "download the file itself"),
         (b"{", "JSON text, not the weights", "pass the .safetensors file")]
# Side tensors of GPTQ, AWQ, bitsandbytes, fp8 and compressed-tensors files: their integers are not weights.
QUANTISED = re.compile(r"\.(qweight|qzeros|g_idx|SCB|absmax|weight_scale(_inv)?|weight_packed|scales)$|\.quant_state\.")
HEADER_LIMIT = 100_000_000      # bytes; the format's own limit


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: where its bytes lie (`start` counts from the beginning of the file)."""
    name: str
    dtype: torch.dtype
    shape: tuple
    file: str
    start: int

    numel = property(lambda self: math.prod(self.shape))
    nbytes = property(lambda self: self.numel * self.dtype.itemsize)
    is_float = property(lambda self: self.dtype.is_floating_point)


def _unique(pairs):
    """object_pairs_hook that refuses a key given twice (the library silently takes the last)."""
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise ValueError(f"{name!r} stands there {count} times")
    return dict(pairs)


def _refuse_constant(text):
    raise ValueError(f"{text} is not JSON")


def parse_json(path, data, what):
    """A JSON object from bytes, strictly: no key twice, no NaN, no half characters."""
    try:
        table = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"{what} is not valid JSON: {error}"[:300], AGAIN) from None
    need(isinstance(table, dict), path, f"{what} is not a JSON object")
    return table


def read_header(path):
    """(entries, metadata) of a safetensors file, every byte accounted for.  Raises CheckpointError, OSError."""
    with open(path, "rb") as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(32)
        length = int.from_bytes(head[:8], "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            for magic, what, fix in MAGIC:
                need(not head.startswith(magic), path, f"not a safetensors file but {what}", fix)
            raise CheckpointError(path, f"not a safetensors file, or cut short ({size} bytes, header of {length})", AGAIN)
        file.seek(8)
        header = parse_json(path, file.read(length), "the header")
    metadata, position = header.pop("__metadata__", None), 8 + length
    metadata = {} if metadata is None else metadata
    need(isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()), path,
         "__metadata__ is not a table of strings")
    need(header, path, "holds no tensors", "pass a checkpoint with weights")
    entries = [_entry(path, name, record, position) for name, record in header.items()]
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.nbytes)):    # no holes, no overlaps, no rest
        need(entry.start == position, path, f"data begins at byte {entry.start}, expected {position}", tensor=entry.name)
        position += entry.nbytes
    need(position == size, path, f"{size} bytes, but the header describes {position}")
    return entries, metadata


def _entry(path, name, record, base):
    """One header record, checked."""
    check = lambda condition, what, fix=AGAIN: need(condition, path, what, fix, name)
    naturals = lambda value: isinstance(value, list) and len(value) <= 64 and all(type(v) is int and 0 <= v < 2 ** 62 for v in value)
    check(name and not re.search("[\ud800-\udfff]", name), "a tensor without a name, or with half a character in it")
    check(not QUANTISED.search(name), "belongs to a quantised checkpoint", "use the original 16- or 32-bit checkpoint")
    check(isinstance(record, dict) and {"dtype", "shape", "data_offsets"} <= set(record), "lacks dtype, shape or offsets")
    code, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    check(isinstance(code, str) and code in DTYPES, f"dtype {code!r} is not supported", "use one of " + ", ".join(DTYPES))
    check(naturals(shape) and naturals(offsets) and len(offsets) == 2, "shape or offsets are not natural numbers")
    check(math.prod(v or 1 for v in shape) < 2 ** 62, "the shape is beyond all memory")
    entry, given = Entry(name, DTYPES[code], tuple(shape), path, base + offsets[0]), offsets[1] - offsets[0]
    check(given == entry.nbytes, f"{given} bytes of data for shape {shape} of {code}, which takes {entry.nbytes}")
    return entry


def read_index(path):
    """(shard files, name -> file name) of an index. Its names are checked before a shard is opened: none leaves the folder."""
    need(os.path.isfile(path) and os.path.getsize(path) <= HEADER_LIMIT, path, "is no index of shards", AGAIN)
    with open(path, "rb") as file:
        places = parse_json(path, file.read(), "the index").get("weight_map")
    need(isinstance(places, dict) and places and all(isinstance(shard, str) for shard in places.values()), path,
         "has no weight_map of tensor and file names", "pass the index, the folder or a .safetensors file")
    for name, shard in places.items():
        need(shard not in ("", ".", "..") and shard == os.path.basename(shard) and "\0" not in shard, path,
             f"the shard {shard!r} is not the name of a file beside it", "name the shards only", name)
    shards = sorted(set(places.values()), key=natural_key)
    lost = [shard for shard in shards if not os.path.isfile(os.path.join(os.path.dirname(path), shard))]
    need(not lost, path, f"missing shards: {', '.join(lost)}", "fetch them")
    parts = {int(found[1]) for shard in shards if (found := re.search(r"-of-(\d{1,9})\.safetensors$", shard))}
    need(parts <= {len(shards)}, path, f"lists {len(shards)} shards of {max(parts, default=0)}")
    return [os.path.join(os.path.dirname(path), shard) for shard in shards], places


def check_index(path, places, entries):
    """Index and shards must say the same, in both directions."""
    seen = {}
    for entry in entries:
        need(entry.name not in seen, entry.file, f"stands in {seen.get(entry.name)} as well", AGAIN, entry.name)
        seen[entry.name] = os.path.basename(entry.file)
        need(places.get(entry.name) == seen[entry.name], path,
             f"is in {seen[entry.name]}, the index says {places.get(entry.name, 'nothing')}", AGAIN, entry.name)
    for name in places:
        need(name in seen, path, f"is not in {places[name]}", AGAIN, name)


def locate(path):
    """(index or None, weight files, the index's places) of what a user names: a file, an index or a folder. The index comes first:
    a `model.safetensors` beside it may be a stale one, and loaders disagree about which to take."""
    if not os.path.lexists(path):
        folder = os.path.dirname(path) or "."
        near = difflib.get_close_matches(os.path.basename(path), os.listdir(folder) if os.path.isdir(folder) else [])
        raise CheckpointError(path, "no such file or folder", f"did you mean {', '.join(near)}?" if near else "check the path")
    if not os.path.isdir(path):
        return (path, *read_index(path)) if path.endswith(".json") else (None, [path], {})
    names = sorted(os.listdir(path))
    if "adapter_config.json" in names and "adapter_model.safetensors" in names:
        return None, [os.path.join(path, "adapter_model.safetensors")], {}
    indexes, weights = ([n for n in names if n.endswith(end) and n[0] != "."] for end in (".safetensors.index.json", ".safetensors"))
    for found, first in ((indexes, "model.safetensors.index.json"), (weights, "model.safetensors")):
        if first in found or len(found) == 1:
            chosen = os.path.join(path, first if first in found else found[0])
            return (chosen, *read_index(chosen)) if found is indexes else (None, [chosen], {})
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf"))]
    need(not pickles or weights, path, f"holds no safetensors, only {', '.join(pickles[:3])}", "convert it to safetensors; pickles run code")
    raise CheckpointError(path, f"holds {len(weights)} weight files: {', '.join(weights[:10]) or 'none'}", "pass one of them, or an index")


def check_config(folder, entries):
    """What a folder's config.json says against its weights: [note, ...]. A quantised model, and a head that no file holds,
    are refused; other contradictions are the user's to judge."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        return []
    with open(path, "rb") as file:
        config = parse_json(path, file.read(), "the configuration")
    need(not config.get("quantization_config"), path, "the model is quantised", "use the original 16- or 32-bit checkpoint")
    config |= config["text_config"] if isinstance(config.get("text_config"), dict) else {}
    roles = {entry.name: place(entry.name) for entry in entries}
    causal = "CausalLM" in str(config.get("architectures"))
    need(not causal or config.get("tie_word_embeddings") is not False or any(p.role == "head" for p in roles.values()), path,
         "tie_word_embeddings is false, but the weights hold no head", "fetch the missing tensor, or correct the configuration")
    words = [e.shape for e in entries if roles[e.name].role == "embed" and re.search("tok|wte|word", e.name) and len(e.shape) == 2]
    seen = {"num_hidden_layers": len({p.layer for p in roles.values()} - {None}),
            "vocab_size": words[0][0] if words else 0, "hidden_size": words[0][1] if words else 0}
    return [f"{path}: {key} is {config[key]}, the weights have {value}" for key, value in seen.items()
            if value and isinstance(config.get(key), int) and config[key] != value]


STOP = threading.Event()        # set where a run is given up: the threads that read notice


def file_state(path):
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def file_sha256(path):
    """As `sha256sum` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while data := stream.read(PIECE):
            if STOP.is_set():
                raise InterruptedError
            digest.update(data)
    return digest.hexdigest()


class Checkpoint:
    """A checkpoint opened for reading: `entries` (name -> Entry, natural order), `metadata`, `read`; `folder` (or None);
    `notes`, what a user should know. path: a .safetensors file, an index of shards, or a folder that holds either."""

    def __init__(self, path):
        self.path = os.fspath(path)
        self.folder = self.path if os.path.isdir(self.path) else None
        index, files, places = locate(self.path)
        for file in files:                                 # to open a pipe is to wait for ever
            need(os.path.isfile(file), file, "is no regular file", "pass a .safetensors file, or a folder")
        self._open = {file: open(file, "rb") for file in files}
        self.seen = {file: file_state(file) for file in files}              # what decides the result, as it was
        self.files = [*files, *filter(None, [index])]                       # all that is read
        parts = [read_header(file) for file in files]
        entries, self.metadata = [entry for part, _ in parts for entry in part], parts[0][1]
        if index:
            check_index(index, places, entries)
        self.entries = {entry.name: entry for entry in sorted(entries, key=lambda entry: natural_key(entry.name))}
        self.stored = self.entries                                          # what a file of this kind holds
        self.notes = check_config(self.folder, entries) if self.folder else []
        if index and self.folder and os.path.isfile(stale := os.path.join(self.folder, "model.safetensors")) and stale not in files:
            self.notes.append(f"{stale}: ignored, the index beside it names other files")

    def read(self, name, start=0, stop=None):
        """Elements [start, stop) of the flattened tensor, in the stored dtype: (stop - start,)."""
        return self._read(self.entries[name], start, stop)

    def _read(self, entry, start=0, stop=None):
        stop = entry.numel if stop is None else min(stop, entry.numel)
        if STOP.is_set():
            raise InterruptedError
        if stop <= start:
            return torch.empty(0, dtype=entry.dtype)
        width, got = entry.dtype.itemsize, 0
        buffer = memoryview(bytearray((stop - start) * width))
        while got < len(buffer):                           # a read may return less than asked for (2 GiB at most)
            step = os.preadv(self._open[entry.file].fileno(), [buffer[got:]], entry.start + start * width + got)
            need(step, entry.file, "the file shrank while it was read", "keep inputs unchanged, run again", entry.name)
            got += step
        return torch.frombuffer(buffer, dtype=entry.dtype)

    def read_tensor(self, name): return self.read(name).reshape(self.entries[name].shape)

    def check_unchanged(self):
        """Raises if a file was replaced or rewritten since it was opened."""
        for file, then in self.seen.items():
            need(file_state(file) == then, file, "the file changed while it was read", "keep inputs unchanged, run again")


# --- LoRA adapters (Hu et al. 2022; PEFT's folders): W + s B A with s = alpha / r, rules as in PEFT --------------------
# Fields of adapter_config.json that change what an adapter does, beyond what is understood here.
FOREIGN = ("use_dora", "modules_to_save", "lora_bias", "use_qalora", "target_parameters", "trainable_token_indices", "layer_replication",
           "alora_invocation_tokens", "arrow_config", "use_bdlora")


def is_regex(text):
    try:
        return bool(re.compile(text))
    except re.error:
        return False


def is_adapter(path): return os.path.isfile(os.path.join(path, "adapter_config.json"))


def open_checkpoint(path): return (Adapter if is_adapter(path) else Checkpoint)(path)


class Adapter(Checkpoint):
    """A LoRA adapter, read as what it adds: `entries` are the products s B A (float32, under the base's names), `stored` the
    factors. ours: experts are merged by their products. Their A start out independent, so that the mean of ten B times the mean of
    ten A is hardly more than nothing (experiments' Table 3: it loses most of what the soup gains)."""

    def __init__(self, path):
        super().__init__(path)
        self._config, self._factors, parts = os.path.join(path, "adapter_config.json"), {}, {}
        with open(self._config, "rb") as file:
            config = parse_json(self._config, file.read(), "the configuration")
        need(config.get("peft_type") == "LORA", self._config, f"the adapter is a {config.get('peft_type')!r}, not a LORA", "merge plain LoRA adapters")
        bad = [key for key in FOREIGN if config.get(key)] + ["bias"] * (config.get("bias") not in (None, "none"))
        need(not bad, self._config, f"{bad[0] if bad else ''} is set, which is not supported", "merge plain LoRA adapters")
        # PiSSA, OLoRA and their like subtract their start from the base: W + s B A would not be the model that was trained.
        start = config.get("init_lora_weights")
        need(not isinstance(start, str) or start in ("gaussian", "eva", "orthogonal"), self._config, f"init_lora_weights {start!r} changes the base",
             "convert it to a plain LoRA with PEFT")
        patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
        need(all(isinstance(table, dict) and all(map(is_regex, table)) for table in patterns), self._config, "rank_pattern or alpha_pattern is no "
             "table of regular expressions", AGAIN)
        self.transposed = bool(config.get("fan_in_fan_out"))
        for name, entry in self.entries.items():
            found = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", name)
            need(found and entry.is_float and len(entry.shape) == 2 and entry.numel, entry.file, "is no factor of a linear map (DoRA, a bias, an embedding, "
                 "a convolution or a saved module)", "merge plain LoRA adapters", name)
            parts.setdefault(found[1], {})[found[2]] = entry
        for module, pair in parts.items():
            name = next(iter(pair.values())).name
            need(len(pair) == 2, self.path, "its other factor is missing", AGAIN, name)
            rank = self._pattern(patterns[0], module, config.get("r"))
            alpha = self._pattern(patterns[1], module, config.get("lora_alpha"))
            need(type(rank) is int and rank > 0 and isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha, self._config,
                 "r or lora_alpha is no number above 0", AGAIN, name)
            need(pair["A"].shape[0] == pair["B"].shape[1] == rank, self.path, f"factors {pair['B'].shape} and {pair['A'].shape} are not of rank {rank}", AGAIN, name)
            self._factors[module + ".weight"] = pair["A"], pair["B"], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        self.entries = {name: Entry(name, torch.float32, (b.shape[0], a.shape[1]), a.file, 0) for name, (a, b, _) in self._factors.items()}
        self.files.append(self._config)
        self.seen[self._config] = file_state(self._config)

    @staticmethod
    def _pattern(table, module, default):
        """The value of the first key that, as a regular expression, matches the end of the module's name."""
        return next((value for key, value in table.items() if re.match(rf"(.*\.)?({key})$", module)), default)

    def factors(self, name):
        """(B, A, s), float64, of a product."""
        a, b, scale = self._factors[name]
        return *(self._read(entry).double().reshape(entry.shape) for entry in (b, a)), scale

    def rank(self, name): return self._factors[name][0].shape[0]

    def read(self, name, start=0, stop=None, transposed=False):
        left, right, scale = self.factors(name)
        left, right = (right.T, left.T) if transposed else (left, right)
        columns, stop = right.shape[1], self.entries[name].numel if stop is None else min(stop, self.entries[name].numel)
        first = start // columns
        rows = scale * (left[first:-(-stop // columns)] @ right)           # whole rows around the piece
        return rows.reshape(-1)[start - first * columns:stop - first * columns].float()


class Folded(Checkpoint):
    """A base with an adapter folded in: W + s B A, in the base's names and dtypes."""

    def __init__(self, base, adapter):
        super().__init__(base)
        self.adapter = Adapter(adapter)
        for name, delta in self.adapter.entries.items():
            need(name in self.entries, self.adapter.path, f"{self.path} has no such tensor", "pass the base that the adapter was trained on", name)
            shape = delta.shape[::-1] if self.adapter.transposed else delta.shape
            need(self.entries[name].shape == shape, self.adapter.path, f"adds {shape}, the base has {self.entries[name].shape}",
                 "pass the base that the adapter was trained on", name)
        self.seen |= self.adapter.seen
        self.files += self.adapter.files

    def read(self, name, start=0, stop=None):
        own = super().read(name, start, stop)
        if name not in self.adapter.entries:
            return own
        return (own.double() + self.adapter.read(name, start, stop, self.adapter.transposed)).to(own.dtype)


class FactorFile:
    """Stands before a TensorFile: takes the pieces of merged products, writes factors of the target's rank.

    The best of them (Eckart-Young) within the span of all parents' B, where an affine merge lies anyway; so that a product
    M, however large, is never held, only Q^T M:   Q R = [B_1 B_2 ...],   U S V^T = Q^T M,   B = Q U sqrt(S) / s,   A = sqrt(S) V^T
    N adapters of rank r span up to N r directions: what is cut off is in `lost`, [(|cut|^2, |M|^2), ...].
    """

    def __init__(self, file, adapters, spanned):
        self.file, self.adapters, self.spanned, self.lost, self._open = file, adapters, spanned, [], {}

    def copy(self, name):
        """The target's own factors, bit for bit."""
        for entry in self.adapters[0]._factors[name][:2]:
            self.file.put(entry.name, 0, self.adapters[0]._read(entry))

    def put(self, name, start, piece):
        """Pieces of one product come in order, from one thread."""
        rows, columns = self.adapters[0].entries[name].shape
        if start == 0:                                     # across shapes nothing is known of the span
            known = [a.factors(name)[0] for a in self.adapters if name in a.entries]
            basis = torch.linalg.qr(torch.cat(known, 1)).Q if self.spanned else torch.eye(rows, dtype=torch.float64)
            self._open[name] = basis, torch.zeros(basis.shape[1], columns, dtype=torch.float64)
        basis, core = self._open[name]
        first, last = start // columns, -(-(start + len(piece)) // columns)
        block = torch.zeros((last - first) * columns, dtype=torch.float64)
        block[start - first * columns:][:len(piece)] = piece.double()
        core += basis[first:last].T @ block.reshape(-1, columns)
        if start + len(piece) == rows * columns:
            self._finish(name, *self._open.pop(name))

    def _finish(self, name, basis, core):
        a, b, scale = self.adapters[0]._factors[name]
        u, s, v = torch.linalg.svd(core, full_matrices=False)
        r, root = a.shape[0], s.sqrt()
        factor_b, factor_a = torch.zeros(b.shape, dtype=torch.float64), torch.zeros(a.shape, dtype=torch.float64)
        factor_b[:, :len(s)], factor_a[:len(s)] = (basis @ (u * root))[:, :r] / scale, (root[:, None] * v)[:r]
        self.lost.append((s[r:].square().sum().item(), s.square().sum().item()))
        for entry, factor in ((a, factor_a), (b, factor_b)):
            self.file.put(entry.name, 0, factor.reshape(-1).to(entry.dtype))


# --- Writing. The library's save_file wants all tensors at once, orders the metadata at random and ignores the umask. ---
def plan_file(entries, metadata):
    """(header bytes, name -> Entry with its final offset, size) of the file to be written.

    By dtype, then by name, as the library orders them: equal inputs give equal bytes. All shapes are known beforehand,
    so the header goes first and tensors may arrive in any order.
    """
    ordered = sorted(entries, key=lambda entry: (list(DTYPES).index(CODES[entry.dtype]), entry.name))
    ends = list(itertools.accumulate((entry.nbytes for entry in ordered), initial=0))
    header = {"__metadata__": {"format": "pt", **metadata}}
    header |= {entry.name: {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, stop]}
               for entry, start, stop in zip(ordered, ends, ends[1:])}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    placed = {entry.name: replace(entry, start=base + start) for entry, start in zip(ordered, ends)}
    return len(text).to_bytes(8, "little") + text, placed, base + ends[-1]


class TensorFile:
    """A file of known layout, open for writing: pieces may come in any order, from any thread or process."""

    def __init__(self, path, entries, metadata):
        self.path, (self.header, self.placed, self.size) = path, plan_file(entries, metadata)
        self.handle, self.written = os.open(path, os.O_RDWR), []

    def put(self, name, start, piece):
        """Write elements [start, start + len(piece)) of a flattened tensor; each element exactly once."""
        entry = self.placed[name]
        assert piece.dtype == entry.dtype, f"{name}: {piece.dtype} where {entry.dtype} is declared"
        data = memoryview(piece.contiguous().reshape(-1).view(torch.uint8).numpy()) if piece.numel() else b""
        self.pour(data, entry.start + start * piece.dtype.itemsize)
        self.written.append(piece.numel())                 # appending is atomic: no lock

    def pour(self, data, position):
        while len(data):                                   # a write may take less than it is given
            done = os.pwrite(self.handle, data, position)
            data, position = data[done:], position + done


def umask_mode(mode):
    """`mode` as the umask leaves it; it can only be read by setting it."""
    umask = os.umask(0); os.umask(umask)
    return mode & ~umask


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_checkpoint(path, entries, fill, metadata):
    """Write a safetensors file; the old one, if any, stays as it is until everything is right.

    Args:    entries   what the file shall hold (names, dtypes, shapes)
             fill      called with the open TensorFile: puts every element of every tensor; what it raises (a failed gate)
                       leaves the old file untouched
    Raises:  CheckpointError, OSError; on any exception the temporary file is removed
    """
    path = os.path.realpath(path)                          # a symbolic link is written through, not replaced
    handle, temporary = tempfile.mkstemp(prefix=".lsmerge-", suffix=".tmp", dir=os.path.dirname(path))
    try:
        file = TensorFile(temporary, entries, metadata)
        os.close(handle)
        handle = file.handle
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, file.size)       # a full disk says so now, not after an hour
        file.pour(file.header, 0)
        fill(file)
        assert sum(file.written) == sum(entry.numel for entry in entries), "pieces do not cover the file"
        os.fsync(handle)
        _reopen(temporary, path, entries)
        os.fchmod(handle, stat.S_IMODE(os.stat(path).st_mode) if os.path.exists(path) else umask_mode(0o666))
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename = error.filename or path        # a full disk has no name of its own
        raise
    finally:
        os.close(handle)
    sync(os.path.dirname(path))                            # the rename itself must survive a power cut


def _reopen(temporary, path, entries):
    """Self-check with the library's own reader, which is what others will use: names, shapes, dtypes, all floats finite."""
    try:
        with safe_open(temporary, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            seen = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
            need(seen == {entry.name: (entry.shape, CODES[entry.dtype]) for entry in entries}, path,
                 "self-check: names, shapes or dtypes differ from the plan", "report this")
            for entry in entries:
                flat = file.get_tensor(entry.name).reshape(-1) if entry.is_float else torch.empty(0)     # a map, not a copy
                for start, stop in spans(len(flat)):
                    part = flat[start:stop].float() if entry.dtype.itemsize == 1 else flat[start:stop]
                    need(torch.isfinite(part).all(), path, "self-check: NaN or Inf in the result", "report this", entry.name)
    except SafetensorError as error:
        raise CheckpointError(path, f"self-check: {error}", "report this") from None


def write_tensors(path, tensors, metadata):
    """A small file from whole tensors (a VAE)."""
    entries = [Entry(name, t.dtype, tuple(t.shape), str(path), 0) for name, t in tensors.items()]
    write_checkpoint(path, entries, lambda file: [file.put(name, 0, t.detach().cpu()) for name, t in tensors.items()], metadata)


def tensors_sha256(tensors, metadata):
    """SHA-256 of the file that write_tensors writes."""
    header, placed, _ = plan_file([Entry(name, t.dtype, tuple(t.shape), "", 0) for name, t in tensors.items()], metadata)
    digest = hashlib.sha256(header)
    for name in placed:
        digest.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# Not companions of a model: weights in any format and their indexes, the state of a training, hidden files.
NO_COMPANION = re.compile(r"^\.|\.(safetensors|bin|pt|pth|ckpt|gguf|onnx|h5|msgpack|npz|index\.json|tmp|lock)$"
                          r"|^(optimizer|scheduler|rng_state|trainer_state|training_args|events\.out)")
# What a result folder may be expected to hold, and --force may therefore replace.
MODEL_FILE = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|adapter_config\.json|(generation_|preprocessor_|processor_)?config\.json|tokenizer.*"
                        r"|(special_tokens_map|added_tokens|vocab|chat_template)\.json|(merges|vocab)\.txt|.*\.(jinja|model)")


def companions(folder):
    """Files of a model folder that go with the weights: configuration, tokenizer, templates, code, licence. No subfolders."""
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))
            if not NO_COMPANION.search(name) and os.path.isfile(os.path.join(folder, name))]


def write_folder(path, copies, write, name="model.safetensors"):
    """Make a folder as a whole: it is filled beside its place under a temporary name, then shown by one rename.

    Args:  copies   files that go into it byte for byte, before any work is done
           write    called with the path of the weights file to be written there
    """
    path = os.path.realpath(path)
    staging = tempfile.mkdtemp(prefix=".lsmerge-", suffix=".tmp", dir=os.path.dirname(path))
    try:
        for file in copies:
            shutil.copyfile(file, copy := os.path.join(staging, os.path.basename(file)))
            sync(copy)
        write(os.path.join(staging, name))
        if os.path.exists(old := os.path.join(path, name)):
            os.chmod(os.path.join(staging, name), stat.S_IMODE(os.stat(old).st_mode))
        os.chmod(staging, stat.S_IMODE(os.stat(path).st_mode) if os.path.exists(path) else umask_mode(0o777))
        refuse_strangers(path, os.listdir(staging))        # again: a run takes its time
        os.rename(staging, path) if not os.path.exists(path) else _exchange(staging, path)
    except OSError as error:
        error.filename = path if str(error.filename or staging).startswith(staging) else error.filename
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)         # after an exchange: the old folder
    sync(os.path.dirname(path))


def _exchange(new, old):
    """Swap two folders in one step (Linux: renameat2 with RENAME_EXCHANGE); where that is missing, in two renames."""
    swap = getattr(ctypes.CDLL(None), "renameat2", lambda *_: -1)
    if swap(-100, os.fsencode(new), -100, os.fsencode(old), 2) != 0:
        os.rename(old, aside := new + ".old")
        try:
            os.rename(new, old)
        except OSError:
            os.rename(aside, old)
            raise
        os.rename(aside, new)


def refuse_strangers(path, names):
    """A folder that holds anything but a model, and so more than a new result may replace."""
    held = sorted(os.listdir(path)) if os.path.isdir(path) else []
    others = [n for n in held if os.path.isdir(os.path.join(path, n)) or n not in names and not MODEL_FILE.fullmatch(n)]
    need(not others, path, f"the folder also holds {', '.join(others[:5])}", "move that away, or choose another -o")


def check_output(path, inputs, force, folder=None):
    """Refuse, before any work, an output that is an input under any spelling, exists, or cannot be made.

    inputs: every file that the run reads.  folder: names of the files a result folder will hold; None for a file.
    """
    real = os.path.realpath(path)
    parent, exists = os.path.dirname(real), os.path.exists(real)
    # Where an input lies, and where it is said to lie: a folder of links, as the Hugging Face cache has, leads elsewhere.
    places = lambda f: (os.path.realpath(f), os.path.join(os.path.realpath(os.path.dirname(f)), os.path.basename(f)))
    twins = [f for f in inputs if exists and (os.path.samefile(real, f) or any(p.startswith(real + os.sep) for p in places(f)))]
    need(not twins, path, f"the output is the input {', '.join(map(str, twins[:3]))}", "choose another -o")
    if folder is None:
        need(os.path.isfile(real) or not exists, path, "the output is no regular file", "give the name of a file")
    else:
        need(os.path.isdir(real) or not exists, path, "the output is no folder", "a folder as TARGET gives a folder: choose another -o")
        exists = exists and bool(os.listdir(real))
        if force:
            refuse_strangers(real, folder)
    need(force or not exists, path, "the output exists", "choose another -o, or pass --force")
    need(os.path.isdir(parent), path, "its folder does not exist", "create the folder first")
    need(os.access(parent, os.W_OK), path, "its folder is not writable", "choose another -o")


# --- Layout: which tensors are encoded, and the record that makes each one invertible. -------------------------------
@dataclass(frozen=True)
class TensorSlot:
    """Per-tensor record: everything needed to turn chunks back into this tensor."""
    name: str
    shape: tuple
    dtype: torch.dtype
    mean: float                 # of the raw weights
    scale: float                # their standard deviation (1/n); 1 where that is 0
    place: Place

    numel = property(lambda self: math.prod(self.shape))

    @property
    def key(self):
        """Where chunks come from, for the codec: tensors of one key (in several models) share a neck."""
        return f"{self.place.layer}.{self.place.role} {'x'.join(map(str, self.shape))}"

    def n_chunks(self, C): return -(-self.numel // C)


def is_selected(entry, pattern=None):
    """ours: by default floats of two or more dimensions inside numbered layers (attention and MLP, paper: Table 6);
    a pattern chooses among all floats of two or more dimensions by name. Norms and biases stay out (paper: Sec. 3.2)."""
    matrix = entry.is_float and len(entry.shape) >= 2 and entry.numel > 0
    return matrix and (place(entry.name).layer is not None if pattern is None else bool(re.search(pattern, entry.name)))


PIECE = 1 << 18                 # weights read at a time: memory does not depend on the size of a tensor


def spans(numel, step=PIECE):
    """[(0, step), (step, 2 step), ...] covering numel elements; one empty span for an empty tensor."""
    return [(start, min(start + step, numel)) for start in range(0, max(numel, 1), step)]


def measure(checkpoint, name):
    """TensorSlot of a tensor: mean and standard deviation in float64, piece by piece; refuses NaN and Inf.

    Pieces are joined by Chan's update, M2 += M2_piece + (mean_piece - mean)^2 n n_piece / (n + n_piece): exact for
    a tiny spread around a large mean, where E[w^2] - E[w]^2 cancels.
    """
    entry, count, mean, m2 = checkpoint.entries[name], 0, 0.0, 0.0
    for start, stop in spans(entry.numel):
        piece = checkpoint.read(name, start, stop).double()
        n, total = len(piece), piece.sum().item()
        if not math.isfinite(total):                       # a sum shows every NaN and Inf; the details only when there is one
            wrong = (~torch.isfinite(piece)).nonzero()
            need(not len(wrong), entry.file, f"{len(wrong)} NaN or Inf, the first at element {start + sum(wrong[:1].flatten().tolist())}",
                 "repair or re-export the checkpoint", name)
        if n:
            delta, piece = total / n - mean, piece.sub_(total / n)
            m2 += torch.dot(piece, piece).item() + delta * delta * count * n / (count + n)
            mean, count = mean + delta * n / (count + n), count + n
    std = math.sqrt(m2 / count) if count else 0.0
    need(math.isfinite(std) and std < 1e30, entry.file, "values too large for float32 arithmetic", "rescale the tensor", name)
    spread = std > 1e-12 * abs(mean)                       # below that it is the rounding of a constant tensor
    return TensorSlot(name, entry.shape, entry.dtype, float(mean), std if spread else 1.0, place(name))


# --- The way to chunks and back (paper: Sec. 3.2) --------------------------------------------------------------------
def scale(flat_L, slot):
    """(w - mean) / scale in float32: mean 0, variance 1 under the slot's statistics."""
    return (flat_L.double() - slot.mean).div_(slot.scale).float()


def unscale(flat_L, slot):
    """Inverse of scale, in float64: the caller casts once, to the stored dtype."""
    return flat_L.double() * slot.scale + slot.mean


def chunk(flat_L, C):
    """paper: w in R^L, padded with zeros to L_p = ceil(L/c) c, cut into n = L_p / c chunks.

    Returns: chunks_NC in the given dtype, real_NC bool (1 = weight, 0 = padding). N = 0 for an empty tensor.
    """
    L, = flat_L.shape
    N = -(-L // C)
    if L == N * C:                                         # nothing to pad, nothing to copy
        return flat_L.reshape(N, C), torch.ones((), dtype=torch.bool, device=flat_L.device).expand(N, C)
    chunks_NC = torch.zeros(N * C, dtype=flat_L.dtype, device=flat_L.device)
    chunks_NC[:L] = flat_L
    real_NC = torch.arange(N * C, device=flat_L.device) < L
    return chunks_NC.reshape(N, C), real_NC.reshape(N, C)


def unchunk(chunks_NC, shape):
    """Inverse of chunk: drops the padding and restores the shape (() for a scalar)."""
    return chunks_NC.reshape(-1)[:math.prod(shape)].reshape(shape)


def to_windows(chunks_NC, real_NC, T):
    """T neighbouring chunks of ONE tensor form a window; the last is filled up with padding chunks.

    ours: the release concatenates all tensors and pads once, so that its windows straddle tensors.
    """
    N, C = chunks_NC.shape
    x_BTC, fill = chunks_NC, -N % T
    if fill:
        x_BTC = torch.cat([chunks_NC, chunks_NC.new_zeros(fill, C)])
        real_NC = torch.cat([real_NC, real_NC.new_zeros(fill, C)])
    return x_BTC.reshape(-1, T, C), real_NC.reshape(-1, T, C)       # (N, C) -> (B, T, C)


def from_windows(x_BTC, N):
    """Inverse of to_windows, for weights (last axis C) as for latents (last axis Z)."""
    return x_BTC.reshape(-1, x_BTC.shape[-1])[:N]                   # (B, T, C) -> (N, C)


# --- python chunking.py CHECKPOINT: Table 1 and Fig. 2 for any file --------------------------------------------------
def moments(matrix):
    """paper: Table 1. mean, variance, skewness, excess kurtosis (0 for a Gaussian) of raw weights; float64.

    kurtosis_row: the mean over output rows of each row's own. Pooling rows of different scale inflates `kurtosis`
    (a scale mixture of Gaussians is heavy-tailed); the per-row figure is free of that. Constant rows count as 0.
    """
    from scipy import stats                                # here: importing it takes as long as a small merge
    flat = matrix.reshape(-1)
    with warnings.catch_warnings():                        # scipy warns of constant rows and returns NaN for them
        warnings.simplefilter("ignore", RuntimeWarning)
        rows = np.nan_to_num(stats.kurtosis(matrix, axis=1))
        figures = flat.mean(), flat.var(), stats.skew(flat), stats.kurtosis(flat), rows.mean()
    return dict(zip(MOMENTS, map(float, np.nan_to_num(figures))))


MOMENTS = ("mean", "variance", "skewness", "kurtosis", "kurtosis_row")
RANKS = (0.05, 0.1, 0.25, 0.5, 0.75)      # Fig. 2's curve is printed at these fractions of the components


def spectrum(matrix):
    """paper: Fig. 2. Explained variance of the leading 5, 10, 25, 50, 75 % of a matrix's principal components.

    Rows are the samples, centred; the eigenvalues are taken on the smaller side.
    """
    centred = matrix - matrix.mean(axis=0, keepdims=True)
    gram = centred @ centred.T if centred.shape[0] < centred.shape[1] else centred.T @ centred
    values = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)
    total = np.concatenate([[0.0], np.cumsum(values)]) / (values.sum() or 1.0)
    return [float(np.interp(rank * len(values), np.arange(len(values) + 1), total)) for rank in RANKS]


def describe(checkpoint):
    """One record per encoded tensor: layer, role, shape, moments, spectrum, and white noise of the same shape
    (the line to hold the spectrum against: a random matrix also has large and small components)."""
    noise, records = {}, []
    for entry in checkpoint.entries.values():
        if is_selected(entry):
            matrix = checkpoint.read_tensor(entry.name).double().numpy().reshape(entry.shape[0], -1)
            need(np.isfinite(matrix).all(), entry.file, "holds NaN or Inf", "repair or re-export the checkpoint", entry.name)
            if matrix.shape not in noise:
                noise[matrix.shape] = spectrum(np.random.default_rng(0).standard_normal(matrix.shape))
            where = place(entry.name)
            records.append({"name": entry.name, "layer": where.layer, "role": where.role, "shape": list(entry.shape),
                            **moments(matrix), "spectrum": spectrum(matrix), "spectrum_noise": noise[matrix.shape]})
    return records


def print_tables(records):
    print(f"{'role':<10}{'layer':>6}{'mean':>11}{'variance':>11}{'skewness':>10}{'kurtosis':>10}{'per row':>9}")
    groups = {role: [r for r in records if r["role"] == role] for role in dict.fromkeys(r["role"] for r in records)}
    for role, group in groups.items():
        for r in [*group, {"layer": "mean", **{key: np.mean([r[key] for r in group]) for key in MOMENTS}}]:
            print(f"{role:<10}{r['layer']:>6}{r['mean']:>11.2e}{r['variance']:>11.2e}"
                  f"{r['skewness']:>10.3f}{r['kurtosis']:>10.3f}{r['kurtosis_row']:>9.3f}")
    print("\nexplained variance of the leading components (in brackets: white noise of the same shape)")
    print(f"{'role':<10}" + "".join(f"{f'{rank:.0%} of them':>16}" for rank in RANKS))
    for role, group in groups.items():
        rows = np.mean([[r["spectrum"], r["spectrum_noise"]] for r in group], axis=0)
        print(f"{role:<10}" + "".join(f"{f'{seen:.3f} ({noise:.3f})':>16}" for seen, noise in rows.T))


class Parser(argparse.ArgumentParser):
    """argparse with this project's contract: one line on stderr, exit code 2."""

    def error(self, message):
        print(f"error: {self.prog}: {message}; fix: see --help", file=sys.stderr)
        raise SystemExit(2)

    def check_select(self, pattern):
        if not is_regex(pattern or ""):
            self.error(f"--select {pattern!r} is not a regular expression")


def command(run):
    """Run a command. What a file, a disk or the data can cause is one line on stderr and exit code 1; 130 interrupted,
    143 terminated. Signals unwind the stack, so that `write_checkpoint` removes its temporary file."""
    sys.stdout.reconfigure(errors="backslashreplace")      # a path may hold bytes that are no text
    for sent in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sent, lambda number, _: sys.exit(128 + number))
    if os.environ.get("RANK", "0") != "0":                 # under torchrun the first process speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        return run() or 0
    except (CheckpointError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
    except BrokenPipeError:                                # whoever read our output has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        line = CheckpointError(error.filename or "I/O", error.strerror or error, "check path, permissions and free space")
        print(f"error: {line}", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:           # torch's allocators raise RuntimeErrors
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(error):
            raise
        print("error: out of memory; fix: smaller --chunk, --tokens, --width or --batch, or another machine", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted, no output was written; fix: run it again (a training: with --resume)", file=sys.stderr)
        return 130
    return 1


def main(argv=None):
    parser = Parser(description="Table 1 (moments) and Fig. 2 (PCA spectrum) of the paper, for your file")
    parser.add_argument("checkpoint")
    parser.add_argument("--json", action="store_true", help="one JSON record per tensor instead of the tables")
    arguments = parser.parse_args(argv)
    records = describe(open_checkpoint(arguments.checkpoint))
    print(json.dumps(records, allow_nan=False)) if arguments.json else print_tables(records)


if __name__ == "__main__":
    sys.exit(command(main))
