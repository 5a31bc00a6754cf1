"""lora.py: LoRA adapters to whole checkpoints, and back.

    python experiments/tools/lora.py fold BASE ADAPTER -o expert.safetensors
    python experiments/tools/lora.py extract MODEL BASE --rank 8 -o adapter/

In:    fold: a base and an adapter, a folder as PEFT saves it (adapter_config.json,
       adapter_model.safetensors).  extract: a model, the base it was trained from,
       a rank.
Out:   fold: W + s B A in the base's names, shapes and dtypes, with s = alpha / r
       (alpha / sqrt(r) under use_rslora); a folder where BASE is one.  extract: an
       adapter that PEFT loads, whose B A are, matrix by matrix, the nearest ones of
       that rank to MODEL - BASE.
Paper: Sec. 4, Table 3 merges ten LoRA experts (Hu et al. 2022); how, it does not say.
ours:  experts are merged as whole models, which is all that merge.py knows: their
       products are what counts. Factors of independent trainings have nothing in
       common, and the mean of ten B times the mean of ten A is hardly more than
       nothing (our Table 3 measures it).
Left out on purpose: whatever is more than W + s B A (DoRA, PiSSA, biases, embeddings,
       convolutions, saved modules). It is refused by name.

Straight down: names (which tensor of a file is which module of PEFT's model), what a
base says about its matrices, the adapter's two files, fold, extract, the command. The
arithmetic is in `folded` (a sum) and `best_factors` (a singular value decomposition).
"""
import json
import math
import os
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from chunking import (AGAIN, PIECE, Checkpoint, CheckpointError, Entry, Parser, appear,
                      check_output, command, create, is_selected, need, parse_name, say,
                      spans, write_tensors)
from merge import Destination

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PLAIN = "use a plain LoRA adapter"
OTHER_BASE = "pass the base that it was trained from"
# Of the difference's norm (1 % of its square): a larger loss is a warning.
MUCH = 0.1
# Of the products' norm: fold says so if its rounding moves the result by more.
ROUNDED = 0.01
# Of a matrix's norm: what float32 arithmetic leaves between equals (some ten steps of
# 1.2e-7). No training moves a matrix by so little.
NOISE = 2e-6


# --- Names: which tensor is which -----------------------------------------------------
def pair_names(wanted, names, fits):
    """{name wanted: the one of `names` that is the same tensor}.

    Equal names first. The others take the nearest name that is left: as many parts in
    common as can be. Of several that are equally near they take the only one whose
    shape fits: fits(name wanted, name). A name that stays ambiguous, or that two want,
    has no partner.

    ours:     align.pair_names finds relatives; here both must be of one model. Names
              on disk and in memory differ in front of the layer's number: there
              transformers adds, drops and reorders parts. Behind it they are equal.
    Example:  'transformer.h.0.attn.c_attn.weight' is 'h.0.attn.c_attn.weight'
    """
    pairs = {name: name for name in wanted if name in names}
    groups = {}
    for name in names:
        if name not in pairs:
            key, parts = take_apart(name)
            groups.setdefault(key, []).append((name, parts))
    claims = {}         # name -> the names wanted whose nearest it is
    for name in wanted:
        if name in pairs:
            continue
        # Parts in one of the two only, for each name that it can be.
        key, parts = take_apart(name)
        distances = {}
        for other, others in groups.get(key, []):
            # {'layers'} and {'language_model', 'layers'} may be one, with distance 1;
            # {'encoder', 'block'} and {'decoder', 'block'} are two parts of a model.
            if parts <= others or others <= parts:
                distances[other] = len(parts ^ others)
        least = min(distances.values(), default=None)
        nearest = [other for other in distances if distances[other] == least]
        if len(nearest) > 1:
            nearest = [other for other in nearest if fits(name, other)]
        if len(nearest) == 1:
            claims.setdefault(nearest[0], []).append(name)
    for other, claimants in claims.items():
        if len(claimants) == 1:         # unique from both sides
            pairs[claimants[0]] = other
    return pairs


def take_apart(name):
    """(what two names of one tensor have in common, parts in which they may differ). Of
    the parts, one name must hold all of the other's, in any order; `model` means
    nothing. So an encoder never meets a decoder.

    Example:  'model.language_model.layers.3.mlp.up_proj.weight' and
              'language_model.model.layers.3.mlp.up_proj.weight' both give
              (3, 'mlp.up_proj.weight'), {'language_model', 'layers'}
    """
    place = parse_name(name)            # drops what wrappers add (module, _orig_mod)
    parts = place.rest.split(".")
    if place.layer is None:             # a head: its own name, and what it is
        return ".".join(parts[-2:]), set(parts) - {"model"}
    return (place.layer, place.rest), set(place.stack.split(".")) - {"model"}


# Linear maps that PEFT cannot reach by the last part of their names, by type of model:
# Mamba's kernels go round the module; of the others it takes the names for those of
# experts, which transformers 5 holds in one tensor.
KERNEL = {"out_proj"}
EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
PEFT_REFUSES = {"mamba": KERNEL, "mamba2": KERNEL, "falcon_mamba": KERNEL,
                "falcon_h1": KERNEL, "nemotron_h": KERNEL,
                "mixtral": EXPERTS, "qwen2_moe": EXPERTS}


def linear_modules(base):
    """{tensor of the base: name of its module} for all linear maps of the model that
    transformers builds; None where that cannot be known.

    PEFT looks for its modules there, and only transformers knows how it calls them
    today: GPT-2's `h.0` is `transformer.h.0`, ViT's `attention.query` is `q_proj`, and
    what was linear once may be one tensor of all experts. So it is asked, in its
    version 5, if the base has a config.json. (PEFT asks the same functions.)

    ours:     without it, names are those of the file, and a note says so: extract runs
              with the six packages of the core alone.
    Example:  {'h.0.mlp.c_fc.weight': 'transformer.h.0.mlp.c_fc', ...}, without wte
    """
    if not model_config(base).get("architectures"):
        return None
    try:
        import transformers
        from transformers.conversion_mapping import (
            _MODEL_TO_CONVERSION_PATTERN as FAMILIES, get_model_conversion_mapping)
        from transformers.core_model_loading import WeightConverter, rename_source_key
        from transformers.pytorch_utils import Conv1D
        loudness = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        # On the device `meta` tensors have shapes and no numbers: a model of any size
        # is built in a second or two. Code that comes with a model is not run.
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            config = transformers.AutoConfig.from_pretrained(
                base.folder, trust_remote_code=False)
            model = getattr(transformers, config.architectures[0])(config)
        transformers.logging.set_verbosity(loudness)
    except Exception:       # not installed, too old or too new, a model of its own code
        return None
    # PEFT's own table says which models name their experts as Mixtral or Qwen2 do.
    family = {"mixtral": "mixtral", **FAMILIES}.get(config.model_type)
    refused = PEFT_REFUSES.get(family) or PEFT_REFUSES.get(config.model_type, ())
    linear = {}
    for module, kind in model.named_modules():
        # Not isinstance: a subclass may use its weight in a way of its own, as the
        # output map of torch's MultiheadAttention does; a factor beside it is dead.
        known = type(kind) in (torch.nn.Linear, Conv1D)
        if known and module.rpartition(".")[2] not in refused:
            linear[f"{module}.weight"] = module
    # How transformers turns the names of a file into those of its model.
    steps = get_model_conversion_mapping(model)
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    renamings = [step for step in steps if not isinstance(step, WeightConverter)]
    expected = model.state_dict()
    modules = {}
    for name in base.entries:
        # A converter changes values as well: it splits, joins or permutes tensors.
        renamed, converter = rename_source_key(
            name, renamings, converters, model.base_model_prefix, expected)
        if converter is None and renamed in linear:
            modules[name] = linear[renamed]
    return modules


def listed(names):
    """Names with `*` for their numbers, each once: 'layers.*.mlp.fc1.weight (12)'."""
    counts = {}
    for name in names:
        general = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        counts[general] = counts.get(general, 0) + 1
    return ", ".join(f"{general} ({count})" for general, count in counts.items())


def called(path):
    """The last part of a path or of a hub's name: 'org/Llama-2-7b' -> 'Llama-2-7b'. As
    text: a path may hold bytes that are none."""
    name = os.path.basename(str(path or "").rstrip(os.sep)).removesuffix(".safetensors")
    return name.encode("utf-8", "backslashreplace").decode()


# --- What a checkpoint says about its matrices ----------------------------------------
# Names under which GPT-2 and its like hold matrices in transformers' Conv1D; other
# models (GPTBigCode, GPT-Neo) hold an ordinary linear map under the same ones.
CONV1D = re.compile(
    r"\b(attn|crossattention|mlp)\.(c_attn|q_attn|c_proj|c_fc)\.weight$")
EMBEDDING = re.compile(r"embed(?!_out)|\b(wte|wpe|shared)\.")
# Matrices that multiply nothing, or go round their module: relative_attention_bias
# (T5's, an embedding), routers, experts, convolutions. GPT-NeoX's head is embed_out.
NOT_LINEAR = re.compile(EMBEDDING.pattern + r"|bias|position|norm|\bln_|conv|router"
                        r"|experts|\bgate\.")


def is_transposed(base, name):
    """Whether the base stores a matrix as (inputs, outputs), as Conv1D does.

    ours:    the base itself says it, whatever the shape of this matrix: c_attn (two or
             three maps in one) and c_fc (the map into the wider MLP) of the same stack
             have more outputs than inputs.
    differs: PEFT's configuration has one flag for all, fan_in_fan_out. It holds what
             was true for the last matrix, and is not asked.
    Example: GPT-2: c_attn (768, 2304), so c_proj (768, 768) is transposed; its square
             classifier is not, as it has no such name. GPTBigCode: (2304, 768), so not.
    """
    if not CONV1D.search(name):
        return False
    stack = base.entries[name].place.stack
    for end in ("c_attn.weight", "c_fc.weight"):
        for other, entry in base.entries.items():
            if entry.place.stack == stack and other.endswith(end):
                return entry.shape[0] < entry.shape[-1]
    return False


def is_linear(entry):
    """Whether a tensor is the matrix of a linear map, judged by its name."""
    matrix = entry.is_float and len(entry.shape) == 2 and entry.name.endswith(".weight")
    return matrix and entry.numel > 0 and not NOT_LINEAR.search(entry.name)


def tied_to(base, name):
    """The embedding that a head repeats bit for bit; None if there is none.

    ours:  a loader may then read the embedding alone, and drop what stands in the head:
           what is added to it would be lost. config.json may say that it is no such
           head (tie_word_embeddings: false); what else it says depends on the version.
    """
    untied = model_config(base).get("tie_word_embeddings") is False
    entry = base.entries[name]
    if untied or entry.place.layer is not None:
        return None
    for other, twin in base.entries.items():
        if EMBEDDING.search(other) and other != name and twin.shape == entry.shape:
            pieces = spans(entry.numel)
            if all(torch.equal(base.read(name, *span).double(),
                               base.read(other, *span).double()) for span in pieces):
                return other
    return None


def model_config(checkpoint):
    """config.json of a model's folder; {} where there is none."""
    path = os.path.join(checkpoint.folder or "", "config.json")
    if not checkpoint.folder or not os.path.isfile(path):
        return {}
    return read_json(path)


def read_json(path):
    """The JSON object of a small file beside the weights."""
    try:
        with open(path, "rb") as file:
            table = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        what = f"is not valid JSON: {error}"
        raise CheckpointError(path, what[:300], AGAIN) from None
    need(isinstance(table, dict), path, "is not a JSON object")
    return table


def check_finite(piece, file, name, what="holds NaN or Inf", fix="repair it"):
    sound = not piece.is_floating_point() or bool(piece.double().isfinite().all())
    need(sound, file, what, fix, name)


# --- Reading an adapter ---------------------------------------------------------------
# Settings of PEFT's LoRA that leave an adapter W + s B A: what it was trained with, and
# where. Any other that is set is refused, also one that only a later version knows.
HARMLESS = set("""
    peft_type peft_version task_type auto_mapping base_model_name_or_path revision
    inference_mode runtime_config r lora_alpha use_rslora rank_pattern alpha_pattern
    fan_in_fan_out bias init_lora_weights target_modules exclude_modules layers_pattern
    layers_to_transform lora_dropout loftq_config eva_config corda_config lora_ga_config
    velora_config megatron_config megatron_core qalora_group_size ensure_weight_tying
    lora_dtype lorap_lr_ratio lorap_emb_lr""".split())
# Starts of A and B that leave the base as it is. PiSSA, OLoRA and their like subtract
# the start from the base: then W + s B A is not the model that was trained.
STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# Repeats of repeats and repeats by the thousand: a search may take years.
ENDLESS = re.compile(r"[*+}]\)+[*+{]|\d{4,}[,}]")
# `default` is PEFT's name of an adapter, which it leaves out when it saves.
FACTOR = re.compile(r"(.+)\.lora_(A|B)(\.default)?\.weight")


class Factors(NamedTuple):
    """What an adapter adds to one matrix: s B A, or its transpose.

    Source:  Hu et al. 2022: h = W x + s B A x, so B A has the shape (outputs, inputs)
             that a linear map of torch stores; to Conv1D's W^T, (B A)^T is added
    """
    A: Entry        # (r, inputs)
    B: Entry        # (outputs, r)
    s: float
    transposed: bool = False

    @property
    def shape(self): return self.B.shape[0], self.A.shape[1]    # (outputs, inputs)


class Adapter:
    """A plain LoRA adapter, opened.

    added:   {tensor of the model in which PEFT trained it: Factors}
    copies:  {tensor of that model: Entry of the adapter}, what PEFT saved of the base
             itself: a head or an embedding that was targeted or resized
    Example: of a file with these three tensors
                 base_model.model.lm_head.lora_A.weight            (8, 64)
                 base_model.model.lm_head.lora_B.weight            (100, 8)
                 base_model.model.lm_head.base_layer.weight        (100, 64)
             the first two are added['lm_head.weight'], the third is its copy
    Raises:  CheckpointError, by name, for what is more than W + s B A
    """

    def __init__(self, folder):
        self.path = os.fspath(folder)
        self.config_file = os.path.join(self.path, CONFIG)
        need(os.path.isfile(self.config_file), self.path,
             f"holds no {CONFIG}: it is no adapter", "pass a folder as PEFT saves it")
        self.config = read_config(self.config_file)
        self.ranks = read_patterns(self.config, "rank_pattern", self.config_file)
        self.alphas = read_patterns(self.config, "alpha_pattern", self.config_file)
        self.file = Checkpoint(os.path.join(self.path, WEIGHTS))
        self.files = [*self.file.files, self.config_file]
        pairs = {}          # module -> {"A": Entry, "B": Entry}
        self.copies = {}
        for name, entry in self.file.entries.items():
            # PEFT wraps the model twice: LoraModel has it as `model`, and PeftModel
            # has that as `base_model`.
            inner = re.sub(r"^(base_model\.model\.)+", "", name)
            factor = FACTOR.fullmatch(inner)
            if factor:
                place = pairs.setdefault(factor[1], {})
                key = factor[2]
                fits = entry.is_float and len(entry.shape) == 2 and entry.numel > 0
            else:
                place = self.copies
                key = inner.replace(".base_layer.", ".")
                fits = ".lora_" not in name and "modules_to_save" not in name
            need(fits, entry.file, f"{[*entry.shape]} is no factor of a linear map "
                 "(DoRA, an embedding, a convolution, a saved module)", PLAIN, name)
            need(key not in place, entry.file, "is there under two names", PLAIN, name)
            place[key] = entry
        need(pairs, self.path, "holds no factors", PLAIN)
        self.added = {}
        for module, pair in pairs.items():
            self.added[f"{module}.weight"] = self._factors(module, pair)

    def _factors(self, module, pair):
        """The factors of one module, checked, and s.

        Equation:  s = alpha / r;  alpha / sqrt(r) under use_rslora (Kalajdzievski 2023)
        Source:    PEFT: r and alpha may differ by module, in rank_pattern and
                   alpha_pattern
        """
        name = next(iter(pair.values())).name
        need(len(pair) == 2, self.path, "its other factor is missing", tensor=name)
        rank = by_pattern(self.ranks, module, self.config.get("r"))
        alpha = by_pattern(self.alphas, module, self.config.get("lora_alpha"))
        # Not isinstance: True is an int, too. The limit refuses NaN, Inf and integers
        # of hundreds of digits, which no float can hold.
        usable = type(rank) is int and rank > 0 and type(alpha) in (int, float)
        need(usable and 0 < abs(alpha) < 1e30, self.config_file,
             f"r {short(rank)} or lora_alpha {short(alpha)} is not a usable number",
             tensor=name)
        A = pair["A"]
        B = pair["B"]
        need(A.shape[0] == B.shape[1] == rank, self.path, f"factors {[*B.shape]} and "
             f"{[*A.shape]} are not of rank {short(rank)}", tensor=name)
        if self.config.get("use_rslora"):
            return Factors(A, B, alpha / math.sqrt(rank))
        return Factors(A, B, alpha / rank)

    def read(self, factor):
        tensor = self.file.read_tensor(factor.name)
        check_finite(tensor, factor.file, factor.name)
        return tensor.double()


def read_config(path):
    """adapter_config.json, refused by name where it asks for more than W + s B A."""
    config = read_json(path)
    kind = config.get("peft_type")
    start = config.get("init_lora_weights")
    need(kind == "LORA", path, f"the adapter is a {short(kind)}, not a LORA", PLAIN)
    # What is unset is false, null or empty there: {"use_dora": false}.
    foreign = [key for key, value in config.items() if value and key not in HARMLESS]
    if config.get("bias") not in (None, "none"):
        foreign.append("bias")
    need(not foreign, path, f"{', '.join(foreign)[:200]} is set, that is not supported",
         PLAIN)
    need(start in STARTS, path, "init_lora_weights "
         f"{short(start)} changes the base", "convert it to a plain LoRA with PEFT")
    return config


def read_patterns(config, key, path):
    """[(compiled pattern, value), ...] of rank_pattern or alpha_pattern.

    Source:   PEFT's rule: the first pattern that matches whole dotted parts at the end
              of a module's name
    Example:  'self_attn.q_proj' matches 'model.layers.0.self_attn.q_proj'; 'proj' does
              not
    """
    table = config.get(key) or {}
    need(isinstance(table, dict), path, f"{key} is no table of regular expressions")
    patterns = []
    for text, value in table.items():
        need(not ENDLESS.search(text), path, f"{key}: {short(text)} may match for ever",
             PLAIN)
        try:
            with warnings.catch_warnings():
                # Flags inside a pattern: Python 3.10 takes them, later ones do not.
                warnings.simplefilter("error")
                patterns.append((re.compile(rf"(.*\.)?({text})$"), value))
        except (re.error, OverflowError, RecursionError, Warning) as error:
            what = f"{key}: {short(text)} is no usable regular expression: {error}"
            raise CheckpointError(path, what[:300], PLAIN) from None
    return patterns


def by_pattern(patterns, module, default):
    """The value of the first pattern that matches; the default where none does."""
    for pattern, value in patterns:
        if pattern.match(module):
            return value
    return default


def short(value):
    """How an error shows a value of a file: at most 40 characters."""
    return repr(value)[:40]


# --- fold: adapter -> checkpoint ------------------------------------------------------
class Fold:
    """A base and an adapter of it, opened, and what is added to what.

    base:     a path, or what is open already (a Checkpoint, a StateDict)
    changes:  {tensor of the base: Factors}
    Raises:   CheckpointError where the adapter is of another base, where it holds more
              than factors, or where a sum would be lost (a tied head)
    """

    def __init__(self, base, adapter):
        if not hasattr(base, "entries"):
            base = Checkpoint(base)
        self.base = base
        self.adapter = Adapter(adapter)
        self._check_copies()
        self.changes = {}
        added = self.adapter.added
        for name, own in self._find(added).items():
            factors = added[name]
            self.changes[own] = factors._replace(transposed=self._turns(name, own))

    def _find(self, wanted):
        """{tensor of PEFT's model: tensor of the base}.  wanted: name -> what has a
        shape (as a linear map has it, which the base may store transposed)."""
        base = self.base

        def fits(name, own):
            return sorted(base.entries[own].shape) == sorted(wanted[name].shape)

        pairs = pair_names(wanted, base.entries, fits)
        if len(pairs) < len(wanted):
            # Names that transformers has changed altogether (ViT, GPT-NeoX's head).
            # What it adds can only turn a refusal into a result.
            for own, module in (linear_modules(base) or {}).items():
                if own not in pairs.values():
                    pairs.setdefault(f"{module}.weight", own)
        for name in wanted:
            fix = f"{OTHER_BASE}; a tied head has none"
            need(name in pairs, self.adapter.path, f"{base.path} has no such tensor, "
                 "or several that it may be", fix, name)
        return {name: pairs[name] for name in wanted}

    def _turns(self, name, own):
        """Whether the base stores its tensor `own` as (inputs, outputs). The shape says
        it, of a square matrix the base."""
        entry = self.base.entries[own]
        outputs, inputs = self.adapter.added[name].shape
        fits = entry.shape in ((outputs, inputs), (inputs, outputs))
        need(fits and entry.is_float, self.adapter.path, f"adds {[outputs, inputs]}, "
             f"the base has {[*entry.shape]} of {entry.dtype}", OTHER_BASE, name)
        twin = tied_to(self.base, own)
        need(not twin, self.adapter.path, f"is tied to {twin} in the base, the sum "
             "would not be", "untie the base first (tie_word_embeddings: false)", name)
        if outputs == inputs:
            return is_transposed(self.base, own)
        return entry.shape == (inputs, outputs)

    def _check_copies(self):
        """What the adapter holds of the base itself must say nothing new. PEFT saves a
        head and an embedding that are targeted, and both where tokens were added."""
        base = self.base
        copies = self.adapter.copies
        for name, own in self._find(copies).items():
            copy = copies[name]
            shape = base.entries[own].shape
            need(shape == copy.shape, copy.file, f"has shape {[*copy.shape]}, the base "
                 f"{[*shape]}: the vocabulary was resized",
                 "resize the base in the same way, save it, and pass that", copy.name)
            for start, stop in spans(copy.numel):
                ours = base.read(own, start, stop)
                theirs = self.adapter.file.read(copy.name, start, stop)
                # The adapter may be stored wider or narrower than the base.
                same = torch.equal(theirs.to(ours.dtype), ours)
                same = same or torch.equal(ours.to(theirs.dtype), theirs)
                need(same, copy.file, "is not what the base holds: it was trained as a "
                     "whole, or on another base", OTHER_BASE, copy.name)


def folded(plan, name):
    """One tensor of the folded model, as (start, piece, squares) of whole rows.

    Equation:  W + s B A: product and sum in float64, one rounding to the base's dtype
    squares:   |rounding|^2 and |s B A|^2 of the piece
    """
    base = plan.base
    entry = base.entries[name]
    if name not in plan.changes:
        for start, stop in spans(entry.numel):
            yield start, base.read(name, start, stop), (0.0, 0.0)
        return
    factors = plan.changes[name]
    left = plan.adapter.read(factors.B)             # (outputs, r)
    right = plan.adapter.read(factors.A)            # (r, inputs)
    if factors.transposed:
        left, right = right.T, left.T               # (B A)^T = A^T B^T
    rows, columns = entry.shape
    # Some rows at a time: the product is never whole in memory.
    for first, last in spans(rows, max(1, PIECE // columns)):
        start = first * columns
        piece = base.read(name, start, last * columns)
        check_finite(piece, entry.file, name)
        product = factors.s * (left[first:last] @ right).reshape(-1)    # as piece is
        total = piece.double() + product
        result = total.to(entry.dtype)
        check_finite(result, plan.adapter.path, name,
                     f"the sum does not fit {entry.dtype}", "store the base in float32")
        rounding = (result.double() - total).square().sum().item()
        yield start, result, (rounding, product.square().sum().item())


def folded_tensors(base, adapter):
    """The folded model in memory, name -> tensor, for tables and scores.

    Args:     base: a path, or what is open already. The result has its dtypes; to keep
              what an adapter adds to a bfloat16 base, pass a chunking.StateDict of a
              float32 copy.
    Example:  TinyLM.from_state_dict(folded_tensors("base.safetensors", "lora-code-a"))
    """
    plan = Fold(base, adapter)
    tensors = {}
    for name, entry in plan.base.entries.items():
        pieces = [torch.empty(0, dtype=entry.dtype)]        # of an empty tensor the only
        for _, piece_L, _ in folded(plan, name):
            pieces.append(piece_L)
        tensors[name] = torch.cat(pieces).reshape(entry.shape)
    return tensors


def fold(base, adapter, output, force=False, quiet=True):
    """Write the folded model, tensor by tensor.  base, adapter, output: paths; force:
    overwrite.

    Returns:  {"folded": number of matrices that change, "rounding": how far rounding to
              the base's dtype moves them, over the norm of what the adapter adds,
              "notes": [...]}
    """
    plan = Fold(base, adapter)
    base = plan.base
    result = Destination(base, os.fspath(output))
    inputs = [*base.files, *plan.adapter.files]
    for path in result.along:
        inputs.append(os.path.join(base.folder, path))
    check_output(result.path, inputs, force, folder=result.files)
    facts = {"lsmerge.base": called(base.path), "lsmerge.adapter": called(adapter)}
    rounding = 0.0
    added = 0.0
    card = card_of("fold", called(base.path),
                   f"`{called(adapter)}` folded into it: W + s B A.")
    with create(result.path, base.entries.values(), facts, result.weights,
                force) as file:
        result.fill(os.path.dirname(file.path), card)
        for name in tqdm(base.entries, "fold", leave=False, disable=quiet or None):
            for start, piece, squares in folded(plan, name):
                file.put(name, start, piece)
                rounding += squares[0]
                added += squares[1]
    # Where every B is zero, nothing is added and nothing rounded: 0 / 1e-300 is 0.
    share = math.sqrt(rounding / max(added, 1e-300))
    notes = fold_notes(plan, share)
    return {"folded": len(plan.changes), "rounding": share, "notes": notes}


def fold_notes(plan, rounding):
    """What is not wrong, but may not be what was meant."""
    notes = []
    rest = []
    for name, entry in plan.base.entries.items():
        if is_selected(entry) and len(entry.shape) == 2 and name not in plan.changes:
            rest.append(name)
    if rest:
        notes.append(f"the adapter has nothing for {len(rest)} matrices of the base's "
                     f"layers, there the difference is zero: {listed(rest)}")
    if plan.adapter.copies:
        notes.append("what the adapter holds of the base itself is equal to it: "
                     f"{listed(plan.adapter.copies)}")
    named = called(plan.adapter.config.get("base_model_name_or_path"))
    if named and named != called(plan.base.path):
        notes.append(f"the adapter says that it was trained on {named!r}")
    if rounding > ROUNDED:
        notes.append("rounding to the base's dtype moves the result by "
                     f"{percent(rounding)} of what the adapter adds; a float32 copy of "
                     "the base would keep it")
    return notes


# --- extract: checkpoint -> adapter ---------------------------------------------------
class Pair:
    """A model and the base that it was trained from, opened.

    partners:  {tensor of the base: tensor of the model}, of one shape
    modules:   {tensor of the base: name of the linear map that PEFT looks for}
    guessed:   whether these names are only those of the file
    skipped:   {why: [tensor, ...]} that is not extracted
    Raises:    CheckpointError where two matrices of one name differ in shape
    """

    def __init__(self, model, base):
        self.model = Checkpoint(model)
        self.base = Checkpoint(base)
        self.skipped = {}
        ours = self.model.entries
        theirs = self.base.entries

        def fits(name, other):
            return theirs[name].shape == ours[other].shape

        found = pair_names(theirs, ours, fits)
        self.partners = {}
        for name, other in found.items():
            if fits(name, other):
                self.partners[name] = other
                continue
            # Tokens were added: an embedding, a head or its bias has more rows.
            vocabulary = theirs[name].shape[1:] == ours[other].shape[1:]
            outside = theirs[name].place.layer is None
            need(vocabulary and outside, self.model.path, f"has shape "
                 f"{[*ours[other].shape]}, the base {[*theirs[name].shape]}",
                 OTHER_BASE, other)
            self.skip("as the vocabularies differ in size", name)
        # In one file only: heads, buffers, layers that predict further tokens.
        here = set(found.values())
        for one, paired in ((self.model, here), (self.base, found)):
            for name in one.entries:
                if name not in paired:
                    self.skip(f"as only {called(one.path)} has it", name)
        self.modules = linear_modules(self.base)
        self.guessed = self.modules is None
        if self.guessed:
            self.modules = {}
            for name, entry in theirs.items():
                if is_linear(entry):
                    self.modules[name] = name.removesuffix(".weight")

    def skip(self, why, name):
        self.skipped.setdefault(why, []).append(name)

    def difference(self, name):
        """|model - base|^2 and |base|^2 of one tensor, float64, piece by piece. Where
        the two differ, both must be finite."""
        difference = 0.0
        size = 0.0
        ours = self.model.entries[self.partners[name]]
        theirs = self.base.entries[name]
        for start, stop in spans(theirs.numel):
            old = self.base.read(name, start, stop).double()
            new = self.model.read(ours.name, start, stop).double()
            if not torch.equal(new, old):
                check_finite(old, theirs.file, name)
                check_finite(new, ours.file, ours.name)
                difference += (new - old).square().sum().item()
            size += old.square().sum().item()
        need(difference == 0 or math.isfinite(size), theirs.file, "holds Inf",
             "repair it", name)
        return difference, size


def best_factors(delta, rank):
    """The nearest product of a rank to a matrix, and what it leaves.

    Equation:  U S V^T = delta, to the first R terms;  B = U sqrt(S), A = sqrt(S) V^T
    Source:    Eckart and Young 1936: no B A of rank R is nearer in the Frobenius norm
    Args:      delta (outputs, inputs) float64
    Returns:   A (R, inputs), B (outputs, R), float64, and |delta - B A|^2; zeros beyond
               the number of singular values
    Example:   singular values 12, 4, 3 at rank 1: what is left is 4^2 + 3^2
    """
    outputs, inputs = delta.shape
    U, S, Vt = torch.linalg.svd(delta, full_matrices=False)     # S from large to small
    kept = min(rank, len(S))
    root = S[:kept].sqrt()
    A = delta.new_zeros(rank, inputs)
    B = delta.new_zeros(outputs, rank)
    A[:kept] = root[:, None] * Vt[:kept]
    B[:, :kept] = U[:, :kept] * root
    return A, B, S[kept:].square().sum().item()


def factorise(pair, rank, quiet=True):
    """MODEL - BASE as factors.

    Returns:  {tensor name of the adapter: float32 factor}, and a record:
              lost       share of the difference's Frobenius norm that the factors do
                         not hold
              worst      (matrix, that share, its share of the matrix's own difference):
                         the largest loss
              left_out   names of changed tensors that plain factors cannot hold (norms,
                         biases, embeddings, experts); left_out_share of the norm, part
                         of `lost`
    ours:     float32 whatever the models are, so that the rank alone limits the factors
    """
    factors = {}
    losses = {}         # matrix -> (square that is lost, square of its difference)
    left_out = []
    outside = 0.0
    for name in tqdm(pair.partners, "extract", leave=False, disable=quiet or None):
        square, size = pair.difference(name)
        if square == 0:
            continue
        linear = name in pair.modules
        # Noise has full rank: its best factors would hold next to nothing of it, and
        # the matrix would be called the worst.
        if linear and square <= NOISE ** 2 * size:
            pair.skip("as the two differ by no more than rounding", name)
            continue
        tied = linear and tied_to(pair.base, name)
        if tied or not linear:
            outside += square
            left_out.append(name)
            if tied:
                pair.skip(f"tied to {tied}", name)
            continue
        new = pair.model.read_tensor(pair.partners[name]).double()
        delta = new - pair.base.read_tensor(name).double()
        if is_transposed(pair.base, name):
            delta = delta.T
        A, B, rest = best_factors(delta, rank)
        stem = f"base_model.model.{pair.modules[name]}"
        factors[f"{stem}.lora_A.weight"] = A.float()
        factors[f"{stem}.lora_B.weight"] = B.float()
        losses[name] = (rest, square)
    need(factors, pair.model.path, "no matrix of a linear map differs from the base's "
         "by more than rounding", "pass another model, or another base")
    # Squares of parts that do not overlap add up.
    lost = outside + sum(rest for rest, _ in losses.values())
    whole = outside + sum(square for _, square in losses.values())
    worst = max(losses, key=losses.get)
    rest, square = losses[worst]
    return factors, {
        "rank": rank, "matrices": len(losses), "lost": math.sqrt(lost / whole),
        "worst": (worst, math.sqrt(rest / whole), math.sqrt(rest / square)),
        "left_out": left_out, "left_out_share": math.sqrt(outside / whole)}


def extract(model, base, rank, output, force=False, quiet=True):
    """Write the adapter of a rank that is nearest to a model over its base. One matrix
    and the factors are in memory.

    Args:     model, base, output: paths; force: overwrite
    Returns:  the record of `factorise`, and "notes"
    """
    pair = Pair(model, base)
    output = os.fspath(output)
    inputs = [*pair.model.files, *pair.base.files]
    check_output(output, inputs, force, folder=[CONFIG, WEIGHTS, "README.md"])
    factors, record = factorise(pair, rank, quiet)
    record["notes"] = extract_notes(pair, record)
    config = peft_config(pair, rank, factors)
    facts = {"lsmerge.model": called(model), "lsmerge.lost": f"{record['lost']:.6g}"}
    # All of it or nothing: an old adapter stays until the new one takes its name.
    with appear(output, force) as folder:
        os.mkdir(folder)
        write_tensors(os.path.join(folder, WEIGHTS), factors, facts)
        text = json.dumps(config, indent=2) + "\n"
        Path(folder, CONFIG).write_text(text, encoding="utf-8")
        card = card_of("extract", config["base_model_name_or_path"],
                       f"Rank {rank} of `{called(model)}`; lost "
                       f"{percent(record['lost'])} of the difference's norm.")
        Path(folder, "README.md").write_text(card, encoding="utf-8")
    return record


def extract_notes(pair, record):
    """What the adapter does not hold, and what its names rest on."""
    notes = []
    if record["left_out"]:
        notes.append(f"an adapter cannot hold {len(record['left_out'])} of the tensors "
                     f"that differ ({listed(record['left_out'])}): "
                     f"{percent(record['left_out_share'])} of the difference's norm")
    for why, names in pair.skipped.items():
        notes.append(f"left out, {why}: {listed(names)}")
    if pair.guessed:
        notes.append("the adapter has the names of the base's file. Whether PEFT looks "
                     "for others cannot be known: that takes the base's folder with "
                     "its config.json, and transformers 5")
    return notes


def peft_config(pair, rank, factors):
    """adapter_config.json. alpha = r, so that s = 1; modules are named in full, so that
    none is meant that has no factors."""
    modules = {name.split(".lora_")[0].removeprefix("base_model.model.")
               for name in factors}
    transposed = any(is_transposed(pair.base, name) for name in pair.modules)
    config = model_config(pair.base)
    task = None
    if re.search("CausalLM|LMHeadModel", str(config.get("architectures"))):
        task = "CAUSAL_LM"
    name = called(config.get("_name_or_path") or pair.base.path)
    return {"peft_type": "LORA", "task_type": task, "base_model_name_or_path": name,
            "r": rank, "lora_alpha": rank, "target_modules": sorted(modules),
            "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": transposed,
            "use_rslora": False, "use_dora": False, "rank_pattern": {},
            "alpha_pattern": {}, "modules_to_save": None, "inference_mode": True}


# --- The command ----------------------------------------------------------------------
def card_of(verb, base, line):
    """The text of a result folder's README.md: what it is; no time, no path."""
    lines = ["---", f"base_model: {json.dumps(base)}"]
    if verb == "extract":
        lines.append("library_name: peft")
    lines += ["tags: [lora, lsmerge]", "---", f"# `{base}` and a LoRA adapter", "",
              f"Base `{base}`. {line}", "",
              f"Made by `experiments/tools/lora.py {verb}` of lsmerge.", ""]
    return "\n".join(lines)


def percent(share):
    """Two digits: '63 %', '3.1 %', '0.0012 %'."""
    if share >= 0.995:
        return "100 %"
    return f"{100 * share:.2g} %"


def parse(argv):
    parser = Parser(prog="lora.py", description="LoRA adapters to whole checkpoints, "
                    "and back (PEFT's rules). fold: BASE ADAPTER; extract: MODEL BASE.")
    parser.add_argument("verb", choices=["fold", "extract"])
    parser.add_argument("base_or_model", metavar="BASE|MODEL")
    parser.add_argument("adapter_or_base", metavar="ADAPTER|BASE",
                        help="an adapter is a folder as PEFT saves it")
    parser.add_argument("--rank", type=int, metavar="R",
                        help="extract: of every matrix")
    parser.add_argument("-o", "--output", required=True, metavar="PATH")
    parser.add_argument("--force", action="store_true", help="overwrite an output")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    a = parser.read(argv)
    if a.verb == "fold" and a.rank is not None:
        parser.error("--rank is for extract: an adapter has its own")
    if a.verb == "extract" and not 0 < (a.rank or 0) <= 65536:
        parser.error("extract needs --rank R between 1 and 65536")
    return a


def main(argv=None):
    a = parse(argv)
    one = a.base_or_model
    other = a.adapter_or_base
    warning = None
    if a.verb == "fold":
        record = fold(one, other, a.output, a.force, a.quiet)
        say(f"added s B A to {record['folded']} matrices of {one}")
    else:
        record = extract(one, other, a.rank, a.output, a.force, a.quiet)
        lost = percent(record["lost"])
        name, share, own = record["worst"]
        say(f"rank {a.rank}, {record['matrices']} matrices: lost {lost} of the "
            f"difference between {one} and {other} (Frobenius norm)",
            f"largest loss: {percent(share)} in {name}, {percent(own)} of its own")
        if record["lost"] > MUCH:
            warning = f"lost {lost} of the difference: raise --rank, or keep the model"
    for note in record["notes"]:
        say(f"note: {note}")
    say(f"wrote {a.output}")
    if warning:
        say(f"warning: {warning}", stream=sys.stderr)


if __name__ == "__main__":
    sys.exit(command(main))
