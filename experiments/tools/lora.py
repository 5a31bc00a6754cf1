"""lora.py: LoRA adapters to whole checkpoints, and back.

    python experiments/tools/lora.py fold BASE ADAPTER -o expert.safetensors
    python experiments/tools/lora.py extract MODEL BASE --rank 8 -o adapter/

fold:    W + s B A, s = alpha / r, in the base's names, shapes and dtypes. ADAPTER is a
         folder as PEFT saves it; what is more (DoRA, PiSSA, biases) is refused by name.
extract: an adapter that PEFT loads, whose B A are, matrix by matrix, the nearest ones
         of that rank to MODEL - BASE.
ours:    LoRA experts (paper: Table 3) are merged as whole models. Factors of
         independent trainings have nothing in common.

The arithmetic is in `folded` and `best_factors`. All else is names: which tensor of a
file is which module for PEFT.
"""
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from chunking import (Checkpoint, CheckpointError, Parser, appear, check_output,
                      command, create, is_weight, need, parse_name, say,
                      write_tensors)
from merge import Destination

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WRAPPED = "base_model.model."       # PEFT's two wrappers, in front of every name
PLAIN = "use a plain LoRA adapter"
OTHER_BASE = "pass the base that it was trained from"
NOISE = 2e-6    # of a matrix's norm: what float32 arithmetic leaves between equals


# --- Names: which tensor is which -----------------------------------------------------
def pair_names(wanted, names):
    """{name wanted: the one of `names` that is the same tensor}: equal names first, for
    the others the nearest that is left. What stays ambiguous has no partner.
    Example:  'transformer.h.0.attn.c_attn.weight' is 'h.0.attn.c_attn.weight'"""
    pairs = {name: name for name in wanted if name in names}
    free = defaultdict(list)        # what names of one tensor share -> the rest of each
    for name in names:
        if name not in pairs:
            key, parts = take_apart(name)
            free[key].append((name, parts))
    nearest = {}
    for name in wanted:
        if name in pairs:
            continue
        key, parts = take_apart(name)
        near = defaultdict(list)    # number of parts in one of the two only -> names
        for other, others in free[key]:
            # {'layers'} may be {'language_model', 'layers'}, no encoder a decoder.
            if parts <= others or others <= parts:
                near[len(parts ^ others)].append(other)
        if near and len(near[min(near)]) == 1:
            nearest[name] = near[min(near)][0]
    claims = Counter(nearest.values())
    unique = {name: other for name, other in nearest.items() if claims[other] == 1}
    return pairs | unique


def take_apart(name):
    """(what two names of one tensor share, parts that transformers adds and drops).
    Example:  'model.language_model.layers.3.mlp.up_proj.weight' gives
              (3, 'mlp.up_proj.weight'), {'language_model', 'layers'}"""
    place = parse_name(name)        # drops what wrappers add (module, _orig_mod)
    parts = place.rest.split(".")
    if place.layer is None:         # a head: its own name, and what it is
        return ".".join(parts[-2:]), set(parts) - {"model"}
    return (place.layer, place.rest), set(place.stack.split(".")) - {"model"}


def linear_modules(base):
    """{tensor of the base: name of its linear module}; None where that is not known.
    Transformers 5 builds the model for PEFT: ViT's `attention.query` is `q_proj` there.
    Example:  {'h.0.mlp.c_fc.weight': 'transformer.h.0.mlp.c_fc', ...}"""
    if not read_json(base.folder, "config.json").get("architectures"):
        return None
    try:
        import transformers
        from transformers.conversion_mapping import (
            _MODEL_TO_CONVERSION_PATTERN as FAMILIES, get_model_conversion_mapping)
        from transformers.core_model_loading import WeightConverter, rename_source_key
        from transformers.pytorch_utils import Conv1D
        # On the device `meta` tensors have shapes and no numbers: a model of any size
        # is built in a second or two. Code that comes with a model is not run.
        with torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(
                base.folder, trust_remote_code=False)
            model = getattr(transformers, config.architectures[0])(config)
    except Exception:       # not installed, too old or too new, a model of its own code
        return None
    linear = {name for name, module in model.named_modules()
              if type(module) in (torch.nn.Linear, Conv1D)}        # no subclasses
    # PEFT does not reach all of them. Mamba's kernels go round the module; in these
    # families it takes such names for those of experts, which are fused.
    refused = set()
    if re.search("mamba|falcon_h1|nemotron_h", config.model_type):
        refused = {"out_proj"}
    if FAMILIES.get(config.model_type, config.model_type) in ("mixtral", "qwen2_moe"):
        refused = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
    # A renaming gives the model's name; a converter changes values as well.
    steps = get_model_conversion_mapping(model)
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    renamings = [step for step in steps if not isinstance(step, WeightConverter)]
    expected = model.state_dict()
    modules = {}
    for name in base.entries:
        renamed, converter = rename_source_key(
            name, renamings, converters, model.base_model_prefix, expected)
        module = renamed.removesuffix(".weight")
        reached = module in linear and module.rpartition(".")[2] not in refused
        if reached and converter is None:
            modules[name] = module
    return modules


def listed(names):
    """Names with `*` for their numbers, each once: 'layers.*.mlp.fc1.weight (12)'."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def called(path):
    """A model's name: the end of its path, as text: a path may hold bytes."""
    name = os.path.basename(str(path or "").rstrip(os.sep))
    name = name.removesuffix(".index.json").removesuffix(".safetensors")
    return name.encode("utf-8", "backslashreplace").decode()


# --- What a checkpoint says about its matrices ----------------------------------------
# GPT-2's names of its Conv1D; in GPTBigCode and others those of ordinary linear maps.
CONV1D = r"\b(attn|crossattention|mlp)\.(c_attn|q_attn|c_proj|c_fc)\.weight$"
EMBEDDING = r"embed(?!_out)|\b(wte|wpe|shared)\."       # embed_out: GPT-NeoX's head
# (T5's relative_attention_bias is an embedding.)
NOT_LINEAR = EMBEDDING + r"|bias|position|norm|\bln_|conv|router|experts|\bgate\."


def is_linear(entry):
    """Whether a tensor is the matrix of a linear map, judged by its name."""
    if len(entry.shape) != 2 or not entry.name.endswith(".weight"):
        return False
    return is_weight(entry) and not re.search(NOT_LINEAR, entry.name)


def is_transposed(base, name):
    """Whether the base stores a matrix as (inputs, outputs), as Conv1D does. The base
    itself says it: c_attn (three maps in one) and c_fc have more outputs than inputs.
    Example: GPT-2: c_attn (768, 2304), so c_proj (768, 768) is transposed"""
    for other, entry in base.entries.items():
        if other.endswith(("c_attn.weight", "c_fc.weight")):
            wider = entry.shape[0] < entry.shape[-1]
            return wider and re.search(CONV1D, name) is not None
    return False


def is_tied(base, name):
    """Whether a head repeats an embedding bit for bit: a loader may read that alone."""
    head = base.entries[name]
    untied = read_json(base.folder, "config.json").get("tie_word_embeddings") is False
    if untied or head.place.layer is not None:
        return False
    for other, entry in base.entries.items():
        if other != name and entry.shape == head.shape and re.search(EMBEDDING, other):
            if torch.equal(base.read_tensor(name), base.read_tensor(other)):
                return True
    return False


def read_json(folder, name):
    """The JSON object of a small file in a folder; {} where there is none."""
    try:
        table = json.loads(Path(folder, name).read_bytes())
    except (OSError, TypeError):            # no such file; None is no folder
        return {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(folder, f"{name}: {error}", "fetch it again") from None
    need(isinstance(table, dict), folder, f"{name} is no JSON object")
    return table


# --- Reading an adapter ---------------------------------------------------------------
# What an adapter was trained with, and where: settings that leave it W + s B A. Any
# other that is set is refused, also one that only a later version of PEFT knows.
HARMLESS = set("""
    peft_version task_type auto_mapping base_model_name_or_path revision lora_dtype
    inference_mode runtime_config r lora_alpha use_rslora rank_pattern alpha_pattern
    fan_in_fan_out target_modules exclude_modules layers_pattern layers_to_transform
    lora_dropout eva_config megatron_config megatron_core qalora_group_size
    ensure_weight_tying lorap_lr_ratio lorap_emb_lr""".split())
# Starts of A and B that leave the base as it is. PiSSA, OLoRA and their like change it.
STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
ALLOWED = {"peft_type": ["LORA"], "bias": [None, "none"], "init_lora_weights": STARTS}
# Patterns with repeats of repeats or by the thousand, which may take years; with flags.
ODD = r"[*+}]\)+[*+{]|\d{4,}[,}]|\(\?[a-zA-Z]"
# `default` is PEFT's name of an adapter, which it leaves out when it saves.
FACTOR = r"(.+)\.lora_(A|B)(\.default)?\.weight"


class Adapter:
    """A plain LoRA adapter, in memory, with PEFT's names of the model's tensors.
    added:   {name: (A, B, s)}, A (r, inputs), B (outputs, r)
    copies:  {name: tensor}, what PEFT saved of the base itself (x.base_layer.weight)"""

    def __init__(self, folder):
        self.path = os.fspath(folder)
        self._read_config()
        file = Checkpoint(os.path.join(self.path, WEIGHTS))
        self.files = [*file.files, os.path.join(self.path, CONFIG)]
        pairs = defaultdict(dict)       # module -> {"A": tensor, "B": tensor}
        self.copies = {}
        for name in file.entries:
            tensor = file.read_tensor(name)
            inner = name.replace(WRAPPED, "")
            factor = re.fullmatch(FACTOR, inner)
            if factor:
                pairs[factor[1]][factor[2]] = tensor
                fits = tensor.is_floating_point() and tensor.dim() == 2
            else:
                self.copies[inner.replace(".base_layer.", ".")] = tensor
                fits = ".lora_" not in name and "modules_to_save" not in name
            self.need(fits, f"{[*tensor.shape]} is no factor of a linear map (DoRA, an "
                      "embedding, a convolution, a saved module)", name)
            self.need(tensor.double().isfinite().all(), "holds NaN or Inf", name)
        self.added = {}
        for module, pair in pairs.items():
            self.need(len(pair) == 2, "its other factor is missing", module)
            s = self._scale(module, **pair)
            self.added[f"{module}.weight"] = (pair["A"], pair["B"], s)

    def need(self, condition, what, tensor=None, fix=PLAIN):
        need(condition, self.path, what, fix, tensor)

    def _read_config(self):
        self.config = {"peft_type": None} | read_json(self.path, CONFIG)
        for key, value in self.config.items():
            fits = key in HARMLESS or not value         # unset: false, null or empty
            if key in ALLOWED:
                fits = value in ALLOWED[key]
            self.need(fits, f"{CONFIG}: {key[:40]} {value!r:.40} is not supported")

    def _scale(self, module, A, B):
        """s = alpha / r;  alpha / sqrt(r) under use_rslora (Kalajdzievski 2023)."""
        rank = self._setting("rank_pattern", module, "r")
        alpha = self._setting("alpha_pattern", module, "lora_alpha")
        # Not isinstance: True is an int, too. The limit refuses NaN and Inf.
        usable = type(alpha) in (int, float) and 0 < abs(alpha) < 1e30
        fits = type(rank) is int and 0 < rank == A.shape[0] == B.shape[1]
        self.need(usable and fits, f"{[*B.shape]} {[*A.shape]} are not of rank "
                  f"{rank!r:.40}, or lora_alpha {alpha!r:.40} is no number", module)
        if self.config.get("use_rslora"):
            return alpha / math.sqrt(rank)
        return alpha / rank

    def _setting(self, key, module, default):
        """PEFT's rule: the first pattern that matches whole dotted parts at a module's
        end.  Example:  'q_proj' matches 'layers.0.self_attn.q_proj'; 'proj' does not"""
        try:
            for text, value in (self.config.get(key) or {}).items():
                self.need(not re.search(ODD, text), f"{key} {text!r:.40} may match for "
                          "ever, or holds a flag")
                if re.match(rf"(.*\.)?({text})$", module):
                    return value
        except (re.error, AttributeError, OverflowError, RecursionError):
            self.need(False, f"{key}: {self.config[key]!r:.80} is no table of patterns")
        return self.config.get(default)


# --- fold: adapter -> checkpoint ------------------------------------------------------
def plan(base, adapter):
    """{tensor of the base: (A, B, s) whose s B A is added to it as it is stored}."""
    wanted = [*adapter.added, *adapter.copies]
    pairs = pair_names(wanted, base.entries)
    if len(pairs) < len(wanted):
        # Names that transformers has changed altogether (ViT, GPT-NeoX's head).
        for own, module in (linear_modules(base) or {}).items():
            if own not in pairs.values():
                pairs.setdefault(f"{module}.weight", own)
    for name in wanted:
        adapter.need(name in pairs, f"{base.path} has no such tensor, or several that "
                     "it may be", name, f"{OTHER_BASE}; a tied head has none")
    for name, copy in adapter.copies.items():
        ours = base.read_tensor(pairs[name])
        # The adapter may be stored wider or narrower than the base.
        same = torch.equal(copy.to(ours.dtype), ours)
        adapter.need(same or torch.equal(ours.to(copy.dtype), copy), "is not what the "
                     "base holds: it was trained or resized", name, OTHER_BASE)
    changes = {}
    for name, (A, B, s) in adapter.added.items():
        own = pairs[name]
        entry = base.entries[own]
        shape = (B.shape[0], A.shape[1])                        # (outputs, inputs)
        fits = entry.dtype.is_floating_point and entry.shape in (shape, shape[::-1])
        adapter.need(fits, f"adds {[*shape]}, the base has {[*entry.shape]} of "
                     f"{entry.dtype}", name, OTHER_BASE)
        adapter.need(not is_tied(base, own), "is tied to an embedding in the base, the "
                     "sum would not be", name, "set tie_word_embeddings: false there")
        # The shape says how the base stores it; of a square matrix its neighbours do.
        square = shape[0] == shape[1]
        turned = entry.shape != shape or square and is_transposed(base, own)
        changes[own] = (B.T, A.T, s) if turned else (A, B, s)   # (B A)^T = A^T B^T
    return changes


def folded(base, changes, name):
    """One tensor of the folded model: W + s B A in float64, rounded once."""
    tensor = base.read_tensor(name)
    if name not in changes:
        return tensor
    A, B, s = changes[name]
    total = tensor.double() + s * (B.double() @ A.double())
    result = total.to(tensor.dtype).contiguous()
    need(result.double().isfinite().all(), base.path, "here is NaN or Inf, or the sum "
         f"does not fit {tensor.dtype}", "repair it, or store it in float32", name)
    return result


def folded_tensors(base, adapter):
    """The folded model in memory, name -> tensor. base: a Checkpoint or a StateDict."""
    changes = plan(base, Adapter(adapter))
    return {name: folded(base, changes, name) for name in base.entries}


def fold(base, adapter, output, force=False):
    """Write the folded model, tensor by tensor. Returns the number of matrices that
    change, and on what base the adapter says that it was trained."""
    base = Checkpoint(base)
    adapter = Adapter(adapter)
    changes = plan(base, adapter)
    result = Destination(base, os.fspath(output))
    check_output(result.path, [*base.files, *adapter.files], force, folder=result.files)
    facts = {"lsmerge.base": called(base.path), "lsmerge.adapter": called(adapter.path)}
    card = f"A LoRA adapter folded into its base, by lora.py of lsmerge: {facts}\n"
    entries = base.entries.values()
    with create(result.path, entries, facts, result.weights, force) as file:
        result.fill(os.path.dirname(file.path), card)
        for name in tqdm(base.entries, "fold", leave=False, disable=None):
            file.put(name, 0, folded(base, changes, name).reshape(-1))
    return len(changes), adapter.config.get("base_model_name_or_path")


# --- extract: checkpoint -> adapter ---------------------------------------------------
def best_factors(delta, rank):
    """The nearest product of a rank to a matrix, and the square of what it leaves.
    Equation:  U S V^T = delta, to the first R terms;  B = U sqrt(S), A = sqrt(S) V^T
    Source:    Eckart and Young 1936: no B A of rank R is nearer in the Frobenius norm
    Example:   singular values 12, 4, 3 at rank 1: what is left is 4^2 + 3^2"""
    U, S, Vt = torch.linalg.svd(delta, full_matrices=False)     # S from large to small
    root = S.sqrt()
    more = rank - len(S)        # below 0 it cuts; above, it adds terms of zeros
    A = F.pad(root[:, None] * Vt, (0, 0, 0, more))              # (R, inputs)
    B = F.pad(U * root, (0, more))                              # (outputs, R)
    return A, B, S[rank:].square().sum().item()


def factorise(model, base, rank, modules):
    """MODEL - BASE as factors: {tensor of the adapter: float32 factor}; the share of
    the difference's Frobenius norm that they lose; {why: tensors that are left out}."""
    pairs = pair_names(base.entries, model.entries)
    met = set(pairs.values())
    left_out = defaultdict(list)
    left_out["only the model has it"] = [n for n in model.entries if n not in met]
    left_out["only the base has it"] = [n for n in base.entries if n not in pairs]
    factors = {}
    lost = 0.0          # squares: those of parts that do not overlap add up
    whole = 0.0
    for name in tqdm(pairs, "extract", leave=False, disable=None):
        new = model.read_tensor(pairs[name]).double()
        old = base.read_tensor(name).double()
        if torch.equal(new, old):
            continue
        if new.shape != old.shape:
            # Tokens were added: an embedding, a head or its bias has more rows.
            grown = base.entries[name].place.layer is None
            need(grown and new.shape[1:] == old.shape[1:], model.path,
                 f"has {[*new.shape]}, the base {[*old.shape]}", OTHER_BASE, name)
            left_out["the vocabularies differ in size"].append(name)
            continue
        delta = new - old
        square = delta.square().sum().item()
        need(math.isfinite(square), model.path, "here or in the base: NaN or Inf",
             "repair it", name)
        # Noise has full rank: no factors would hold it.
        if square <= NOISE ** 2 * old.square().sum().item():
            left_out["they differ by no more than rounding"].append(name)
            continue
        whole += square
        if name not in modules or is_tied(base, name):
            left_out["no linear map for PEFT, or tied to an embedding"].append(name)
            lost += square
            continue
        if is_transposed(base, name):
            delta = delta.T
        A, B, rest = best_factors(delta, rank)
        lost += rest
        factors[f"{WRAPPED}{modules[name]}.lora_A.weight"] = A.float()
        factors[f"{WRAPPED}{modules[name]}.lora_B.weight"] = B.float()
    need(factors, model.path, "no matrix of a linear map differs from the base's by "
         "more than rounding", "pass another model, or another base")
    return factors, math.sqrt(lost / whole), left_out


def extract(model, base, rank, output, force=False):
    """Write the adapter of a rank that is nearest to MODEL - BASE. Returns what is lost
    and left out, and whether PEFT is known to look for these names."""
    model = Checkpoint(model)
    base = Checkpoint(base)
    check_output(output, [*model.files, *base.files], force, folder=[CONFIG, WEIGHTS])
    modules = linear_modules(base)
    known = modules is not None
    if not known:
        linear = filter(is_linear, base.entries.values())
        modules = {entry.name: entry.name.removesuffix(".weight") for entry in linear}
    factors, lost, left_out = factorise(model, base, rank, modules)
    facts = {"lsmerge.model": called(model.path), "lsmerge.lost": f"{lost:.6g}"}
    # Named in full, so that no module is meant that has no factors.
    targets = {name.split(".lora_")[0].removeprefix(WRAPPED) for name in factors}
    transposed = any(is_transposed(base, name) for name in modules)
    built = read_json(base.folder, "config.json").get("architectures")
    task = None
    if re.search("CausalLM|LMHeadModel", str(built)):
        task = "CAUSAL_LM"
    config = {                                  # s = alpha / r = 1
        "peft_type": "LORA", "task_type": task,
        "base_model_name_or_path": called(base.path), "r": rank, "lora_alpha": rank,
        "target_modules": sorted(targets), "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": transposed, "use_rslora": False, "use_dora": False,
        "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
        "inference_mode": True}
    with appear(output, force) as folder:       # all of it or nothing
        os.mkdir(folder)
        write_tensors(os.path.join(folder, WEIGHTS), factors, facts)
        text = json.dumps(config, indent=2) + "\n"
        Path(folder, CONFIG).write_text(text, encoding="utf-8")
    return lost, left_out, known


def main(argv=None):
    parser = Parser(prog="lora.py", description="adapters to checkpoints, and back")
    parser.add_argument("verb", choices=["fold", "extract"])
    parser.add_argument("first", metavar="BASE|MODEL")
    parser.add_argument("second", metavar="ADAPTER|BASE")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="of extract")
    parser.add_argument("-o", "--output", required=True, metavar="PATH")
    parser.add_argument("--force", action="store_true", help="overwrite an output")
    a = parser.read(argv)
    if (a.verb == "extract") != (0 < a.rank <= 65536):
        parser.error("extract takes --rank R, 1 to 65536; an adapter has its own")
    if a.verb == "fold":
        count, trained = fold(a.first, a.second, a.output, a.force)
        say(f"added s B A to {count} matrices; the adapter was trained on {trained}")
    else:
        lost, left_out, known = extract(a.first, a.second, a.rank, a.output, a.force)
        for why, names in left_out.items():
            if names:
                say(f"left out, {why}: {listed(names)}")
        if not known:
            say("modules are called as in the base's file: if PEFT looks for others, "
                "pass the base's folder, and install transformers 5")
        say(f"lost {lost:.0%} of the difference (Frobenius norm)")
    say(f"wrote {a.output}")


if __name__ == "__main__":
    sys.exit(command(main))
