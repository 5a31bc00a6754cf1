"""lora.py: LoRA adapters to whole checkpoints, and back.

    python experiments/lora.py fold BASE ADAPTER -o expert.safetensors
    python experiments/lora.py extract MODEL BASE --rank 8 -o adapter/

In:    fold: a base and an adapter, a folder as PEFT saves it (adapter_config.json,
       adapter_model.safetensors).  extract: a model, the base it was trained from, a rank.
Out:   fold: W + s B A in the base's names, shapes and dtypes, with s = alpha / r (alpha / sqrt(r)
       under use_rslora); a folder where BASE is one.  extract: the folder of an adapter whose B A
       are, matrix by matrix, the nearest ones of that rank to MODEL - BASE.
Paper: Sec. 4, Table 3 merges ten LoRA experts (Hu et al. 2022); how, it does not say.
ours:  experts are merged as whole models, which is all that merge.py knows: their products are
       what counts. Factors of independent trainings have nothing in common, and the mean of ten B
       times the mean of ten A is hardly more than nothing (our Table 3 measures it).
Left out on purpose: whatever is more than W + s B A (DoRA, PiSSA, biases, embeddings,
       convolutions, saved modules). It is refused by name.
"""
import json, math, os, re, shutil, sys, tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from chunking import (AGAIN, PIECE, Checkpoint, CheckpointError, Parser, check_output, command,
                      create, is_selected, need, place, spans, write_tensors)
from merge import companions

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLAIN = "use a plain LoRA adapter"
# Settings of PEFT 0.21 that make an adapter more than W + s B A: any value but none is refused.
FOREIGN = ("use_dora", "modules_to_save", "lora_bias", "use_qalora", "target_parameters",
           "trainable_token_indices", "layer_replication", "alora_invocation_tokens",
           "arrow_config", "use_bdlora", "kasa_config", "monteclora_config")
# Starts of A and B that leave the base as it is. PiSSA, OLoRA and their like subtract the start
# from the base: then W + s B A is not the model that was trained.
STARTS = ("gaussian", "eva", "orthogonal", "mica")
MUCH = 0.1      # of the difference's norm (1 % of its square): a larger loss is a warning
ROUNDED = 0.01  # of the products' norm: if fold's rounding moves the result by more, it says so


# --- Reading an adapter ---------------------------------------------------------------------------
class Factors(NamedTuple):
    """What an adapter adds to one matrix, s B A, by the names of its two tensors."""
    A: str          # (r, inputs)
    B: str          # (outputs, r)
    s: float


class Adapter:
    """A plain LoRA adapter, opened. added: name of a tensor of the base -> Factors."""

    def __init__(self, folder):
        self.path = os.fspath(folder)
        self.config_file = os.path.join(self.path, CONFIG)
        need(os.path.isfile(self.config_file), self.path, f"holds no {CONFIG}: it is no adapter",
             "pass a folder as PEFT saves it")
        self.config = read_config(self.config_file)
        self.file = Checkpoint(os.path.join(self.path, WEIGHTS))
        self.files = [*self.file.files, self.config_file]
        # PEFT's word for a base that stores its matrices as (inputs, outputs), as GPT-2 does.
        self.transposed = bool(self.config.get("fan_in_fan_out"))
        pairs = {}
        for name, entry in self.file.entries.items():
            found = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", name)
            need(found and entry.is_float and len(entry.shape) == 2 and entry.numel, entry.file,
                 "is no factor of a linear map (DoRA, a bias, an embedding, a convolution or a "
                 "saved module)", PLAIN, name)
            pairs.setdefault(found[1], {})[found[2]] = entry
        self.added = {f"{module}.weight": self._factors(module, pair)
                      for module, pair in pairs.items()}

    def _factors(self, module, pair):
        """The factors of one module, checked, and s."""
        name = next(iter(pair.values())).name
        need(len(pair) == 2, self.path, "its other factor is missing", tensor=name)
        rank = by_pattern(self.config.get("rank_pattern"), module, self.config.get("r"))
        alpha = by_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha"))
        usable = type(rank) is int and rank > 0 and type(alpha) in (int, float)
        need(usable and math.isfinite(alpha) and alpha, self.config_file,
             f"r {rank!r} or lora_alpha {alpha!r} is not a usable number", tensor=name)
        A, B = pair["A"], pair["B"]
        need(A.shape[0] == B.shape[1] == rank, self.path,
             f"factors {list(B.shape)} and {list(A.shape)} are not of rank {rank}", tensor=name)
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return Factors(A.name, B.name, scale)

    def shape(self, name):
        """That of the matrix to which the product is added, as the base stores it."""
        A, B, _ = self.added[name]
        outputs, inputs = self.file.entries[B].shape[0], self.file.entries[A].shape[1]
        return (inputs, outputs) if self.transposed else (outputs, inputs)

    def sides(self, name):
        """(left, right, s), float64, with s left @ right = s B A as the base stores the matrix."""
        A, B, s = self.added[name]
        for factor in (A, B):
            check_finite(self.file.read(factor), self.file.path, factor)
        A, B = (self.file.read_tensor(factor).double() for factor in (A, B))
        return (A.T, B.T, s) if self.transposed else (B, A, s)


def read_json(path):
    """The JSON object of a small file beside the weights."""
    try:
        with open(path, "rb") as file:
            table = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not valid JSON: {error}"[:300], AGAIN) from None
    need(isinstance(table, dict), path, "is not a JSON object")
    return table


def read_config(path):
    """adapter_config.json, refused by name where it asks for more than is understood here."""
    config = read_json(path)
    kind, start = config.get("peft_type"), config.get("init_lora_weights")
    need(kind == "LORA", path, f"the adapter is a {kind!r}, not a LORA", PLAIN)
    foreign = [key for key in FOREIGN if config.get(key)]
    foreign += ["bias"] if config.get("bias") not in (None, "none") else []
    need(not foreign, path, f"{', '.join(foreign)} is set, which is not supported", PLAIN)
    need(not isinstance(start, str) or start in STARTS, path,
         f"init_lora_weights {start!r} changes the base", "convert it to a plain LoRA with PEFT")
    for key in ("rank_pattern", "alpha_pattern"):
        table = config.get(key) or {}
        need(isinstance(table, dict) and all(map(is_regex, table)), path,
             f"{key} is no table of regular expressions")
    return config


def is_regex(text):
    try:
        return bool(re.compile(text))
    except re.error:
        return False


def by_pattern(table, module, default):
    """PEFT's rule: the value of the first key that, as a regular expression, matches whole dotted
    parts at the end of the module's name; the default where none does."""
    for key, value in (table or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def check_finite(piece, file, name, what="holds NaN or Inf", fix="repair or re-export it"):
    sound = not piece.is_floating_point() or bool(piece.double().isfinite().all())
    need(sound, file, what, fix, name)


# --- fold: adapter -> checkpoint ------------------------------------------------------------------
def open_both(base, adapter):
    """(base, Adapter) of paths; a base that is open already (a Checkpoint, a StateDict) is taken
    as it is. An adapter of another base is refused."""
    base, adapter = base if hasattr(base, "entries") else Checkpoint(base), Adapter(adapter)
    fix = "pass the base that the adapter was trained on"
    for name in adapter.added:
        need(name in base.entries, adapter.path, f"{base.path} has no such tensor", fix, name)
        found, wanted = base.entries[name], adapter.shape(name)
        need(found.shape == wanted and found.is_float, adapter.path,
             f"adds {list(wanted)}, the base has {list(found.shape)} of {found.dtype}", fix, name)
    return base, adapter


def folded(base, adapter, name):
    """One tensor of the folded model, as (start, piece, squares) of whole rows.

    Equation:  W + s B A: product and sum in float64, then one rounding to the base's dtype
    squares:   |rounding|^2 and |s B A|^2 of the piece
    """
    entry, changes = base.entries[name], name in adapter.added
    rows, columns = entry.shape if changes else (entry.numel, 1)
    left, right, s = adapter.sides(name) if changes else (None, None, None)
    for first, last in spans(rows, max(1, PIECE // columns)):
        piece = base.read(name, first * columns, last * columns)
        check_finite(piece, entry.file, name)
        squares = 0.0, 0.0
        if changes:
            product = s * (left[first:last] @ right).reshape(-1)
            total = piece.double() + product
            piece = total.to(entry.dtype)
            check_finite(piece, adapter.path, name, f"the sum does not fit {entry.dtype}",
                         "store the base in float32")
            squares = tuple(x.square().sum().item() for x in (piece.double() - total, product))
        yield first * columns, piece, squares


def folded_tensors(base, adapter):
    """The folded model in memory, name -> tensor, for tables and scores.

    Args:     base: a path, or what is open already. The result has its dtypes; to keep what an
              adapter adds to a bfloat16 base, pass a chunking.StateDict of a float32 copy.
    Example:  TinyLM.from_state_dict(folded_tensors("base.safetensors", "lora-code-a"))
    """
    base, adapter = open_both(base, adapter)
    tensors = {}
    for name, entry in base.entries.items():
        pieces = [piece for _, piece, _ in folded(base, adapter, name)]
        tensors[name] = torch.cat(pieces).reshape(entry.shape)
    return tensors


def fold(base, adapter, output, force=False, quiet=True):
    """Write the folded model, tensor by tensor.  base, adapter, output: paths; force: overwrite.

    Returns:  {"folded": number of matrices that change, "rounding": how far the rounding to the
              base's dtype moves them, over the norm of what the adapter adds, "notes": [...]}
    """
    (base, adapter), output = open_both(base, adapter), os.fspath(output)
    folder = base.folder is not None and not output.endswith(".safetensors")
    copies = companions(base.folder) if folder else []
    names = {"model.safetensors", "README.md", *map(os.path.basename, copies)} if folder else None
    check_output(output, [*base.files, *adapter.files, *copies], force, names)
    facts = {"lsmerge.base": called(base.path), "lsmerge.adapter": called(adapter.path)}
    rounding = added = 0.0
    with create(output, base.entries.values(), facts, folder) as file:
        for copy in copies:
            shutil.copyfile(copy, Path(file.path).with_name(os.path.basename(copy)))
        if folder:
            line = f"`{facts['lsmerge.adapter']}` folded into it: W + s B A."
            Path(file.path).with_name("README.md").write_text(card("fold", called(base.path), line))
        for name in tqdm(base.entries, unit="tensor", leave=False, disable=quiet or None):
            for start, piece, squares in folded(base, adapter, name):
                file.put(name, start, piece)
                rounding, added = rounding + squares[0], added + squares[1]
    share = math.sqrt(rounding / added) if added else 0.0
    return {"folded": len(adapter.added), "rounding": share,
            "notes": fold_notes(base, adapter, share)}


def fold_notes(base, adapter, rounding):
    """What is not wrong, but may not be what was meant."""
    notes = []
    rest = [place(name).role for name, entry in base.entries.items()
            if is_selected(entry) and len(entry.shape) == 2 and name not in adapter.added]
    if rest:
        notes.append(f"the adapter has nothing for {len(rest)} matrices of the base's layers "
                     f"({', '.join(dict.fromkeys(rest))}): there the difference is zero")
    wanted, found = called(adapter.config.get("base_model_name_or_path")), own_name(base)
    if wanted and found and wanted != found:
        notes.append(f"the adapter names {wanted!r} as its base, this one is {found!r}")
    if rounding > ROUNDED:
        notes.append(f"rounding to the base's dtype moves the result by {percent(rounding)} of "
                     "what the adapter adds; a float32 copy of the base would keep it")
    return notes


def called(path):
    """The last part of a path or of a hub's name: 'org/Llama-2-7b' -> 'Llama-2-7b'."""
    return os.path.basename(os.path.normpath(str(path))) if path else ""


def own_name(base):
    """What a base calls itself: `_name_or_path` of its config.json, or the name of its one file.
    '' where that says nothing: new configurations have none, and any file may be `model`."""
    if base.folder:
        return called(model_config(base).get("_name_or_path"))
    stem = called(base.path).removesuffix(".safetensors")
    return "" if stem.startswith("model") else stem


def model_config(checkpoint):
    """config.json of a model's folder; {} where there is none."""
    path = os.path.join(checkpoint.folder or "", "config.json")
    return read_json(path) if checkpoint.folder and os.path.isfile(path) else {}


# --- extract: checkpoint -> adapter ---------------------------------------------------------------
def is_linear(entry):
    """Whether plain factors can stand beside it: a matrix of a numbered layer, or a head."""
    matrix = entry.is_float and len(entry.shape) == 2 and entry.name.endswith(".weight")
    return matrix and (is_selected(entry) or place(entry.name).role == "head")


def best_factors(delta, rank):
    """The nearest product of a rank to a matrix, and what it leaves.

    Equation:  U S V^T = delta, to the first R terms;  B = U sqrt(S), A = sqrt(S) V^T
    Source:    Eckart and Young 1936: no B A of rank R is nearer in the Frobenius norm
    Args:      delta (outputs, inputs) float64
    Returns:   A (R, inputs), B (outputs, R), float64, and |delta - B A|^2; zeros beyond the
               number of singular values
    """
    outputs, inputs = delta.shape
    U, S, Vt = torch.linalg.svd(delta, full_matrices=False)
    kept, root = min(rank, len(S)), S[:rank].sqrt()
    A, B = delta.new_zeros(rank, inputs), delta.new_zeros(outputs, rank)
    A[:kept], B[:, :kept] = root[:, None] * Vt[:rank], U[:, :rank] * root
    return A, B, S[rank:].square().sum().item()


def squared_difference(model, base, name):
    """|model - base|^2 of one tensor, float64, piece by piece."""
    total = 0.0
    for start, stop in spans(base.entries[name].numel):
        pieces = [checkpoint.read(name, start, stop) for checkpoint in (model, base)]
        for checkpoint, piece in zip((model, base), pieces):
            check_finite(piece, checkpoint.entries[name].file, name)
        total += (pieces[0].double() - pieces[1].double()).square().sum().item()
    return total


def check_pair(model, base):
    """Both hold the same names in the same shapes."""
    fix = "pass the base that the model was trained from"
    for one, other in ((model, base), (base, model)):
        for name in one.entries:
            need(name in other.entries, one.path, f"{other.path} has no such tensor", fix, name)
    for name, entry in model.entries.items():
        found, wanted = list(entry.shape), list(base.entries[name].shape)
        need(found == wanted, model.path, f"has shape {found}, the base {wanted}", fix, name)


def is_transposed(checkpoint):
    """Whether matrices are stored as (inputs, outputs), as GPT-2 does: then its c_fc, the map from
    the stream to the wider MLP, is itself wider than tall."""
    return any(re.search(r"\bc_fc\.weight$", name) and entry.shape[0] < entry.shape[-1]
               for name, entry in checkpoint.entries.items())


def factorise(model, base, rank, quiet=True):
    """MODEL - BASE as factors.

    Returns:  {tensor name of the adapter: float32 factor}, and a record:
              lost       share of the difference's Frobenius norm that the factors do not hold
              worst      (matrix, share of its own norm that is lost), the largest one
              left_out   names of changed tensors that plain factors cannot hold (norms, biases,
                         embeddings); left_out_share of the norm, part of `lost`
    ours:     float32 whatever the models are, so that the rank alone limits the factors
    """
    factors, shares, left_out, whole, cut, outside = {}, {}, [], 0.0, 0.0, 0.0
    for name in tqdm(base.entries, unit="tensor", leave=False, disable=quiet or None):
        square = squared_difference(model, base, name)
        whole += square
        if square and is_linear(base.entries[name]):
            delta = model.read_tensor(name).double() - base.read_tensor(name).double()
            A, B, rest = best_factors(delta.T if is_transposed(base) else delta, rank)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = A.float()
            factors[f"{module}.lora_B.weight"] = B.float()
            cut, shares[name] = cut + rest, math.sqrt(rest / square)
        elif square:
            left_out.append(name)
            outside += square
    need(factors, model.path, "no matrix of a layer differs from the base's",
         "pass another model, or another base")
    worst = max(shares, key=shares.get)
    return factors, {
        "rank": rank, "matrices": len(shares), "lost": math.sqrt((cut + outside) / whole),
        "worst": (worst, shares[worst]), "left_out": left_out,
        "left_out_share": math.sqrt(outside / whole)}


def extract(model, base, rank, output, force=False, quiet=True):
    """Write the adapter of a rank that is nearest to a model over its base. One matrix and the
    factors are in memory.

    Args:     model, base, output: paths; force: overwrite
    Returns:  the record of `factorise`
    """
    model, base, output = Checkpoint(model), Checkpoint(base), os.fspath(output)
    check_pair(model, base)
    check_output(output, [*model.files, *base.files], force, {CONFIG, WEIGHTS, "README.md"})
    factors, record = factorise(model, base, rank, quiet)
    config, lost = peft_config(base, rank, factors), percent(record["lost"])
    text = card("extract", called(config["base_model_name_or_path"]),
                f"Rank {rank} of `{called(model.path)}`; lost {lost} of the difference's norm.")
    facts = {"lsmerge.model": called(model.path), "lsmerge.lost": f"{record['lost']:.6g}"}
    path = os.path.realpath(output)
    with tempfile.TemporaryDirectory(prefix=".lsmerge-", suffix=".tmp",
                                     dir=os.path.dirname(path)) as scratch:
        os.mkdir(new := os.path.join(scratch, "new"))
        write_tensors(os.path.join(new, WEIGHTS), factors, facts)
        Path(new, CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        Path(new, "README.md").write_text(text)
        if os.path.exists(path):
            os.rename(path, os.path.join(scratch, "old"))
        os.rename(new, path)    # all of it or nothing
    return record


def peft_config(base, rank, factors):
    """adapter_config.json. alpha = r, so that s = 1; modules are named in full, so that none is
    meant that has no factors."""
    modules = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in factors}
    config = model_config(base)
    causal = "CausalLM" in str(config.get("architectures"))
    name = config.get("_name_or_path") or called(base.path).removesuffix(".safetensors")
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM" if causal else None,
            "base_model_name_or_path": name, "r": rank, "lora_alpha": rank,
            "target_modules": sorted(modules), "lora_dropout": 0.0, "bias": "none",
            "fan_in_fan_out": is_transposed(base), "use_rslora": False, "use_dora": False,
            "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
            "inference_mode": True}


# --- The command ----------------------------------------------------------------------------------
def card(verb, base, line):
    """README.md of a result folder: what it is; no time, no path."""
    library = ["library_name: peft"] if verb == "extract" else []
    head = ["---", f"base_model: {json.dumps(base)}", *library, "tags: [lora, lsmerge]", "---"]
    made = f"Made by `experiments/lora.py {verb}` of lsmerge."
    return "\n".join([*head, f"# `{base}` and a LoRA adapter", "", f"Base `{base}`. {line}", "",
                      made, ""])


def percent(share):
    """Two digits: '63 %', '3.1 %', '0.0012 %'."""
    return f"{100 * share:.2g} %" if share < 0.995 else "100 %"


def parse(argv):
    parser = Parser(prog="lora.py",
                    description="LoRA adapters to whole checkpoints, and back (PEFT's rules).")
    commands = parser.add_subparsers(dest="verb", required=True)
    into = commands.add_parser("fold", help="BASE + s B A as a checkpoint")
    into.add_argument("base", metavar="BASE")
    into.add_argument("adapter", metavar="ADAPTER", help="a folder as PEFT saves it")
    back = commands.add_parser("extract", help="MODEL - BASE as an adapter")
    back.add_argument("model", metavar="MODEL")
    back.add_argument("base", metavar="BASE")
    back.add_argument("--rank", type=int, required=True, metavar="R", help="of every matrix")
    for sub in (into, back):
        sub.add_argument("-o", "--output", required=True, metavar="PATH", help="the result")
        sub.add_argument("--force", action="store_true", help="overwrite an existing output")
        sub.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    if arguments.verb == "extract" and not 0 < arguments.rank <= 65536:
        parser.error("--rank must lie between 1 and 65536")
    return arguments


def print_loss(a, record):
    """What the factors do not hold; plainly, where that is much."""
    lost, (worst, share) = percent(record["lost"]), record["worst"]
    print(f"rank {a.rank}, {record['matrices']} matrices: lost {lost} of the difference between "
          f"{a.model} and {a.base} (Frobenius norm)")
    print(f"worst matrix: {worst}, {percent(share)} of its own difference")
    if record["left_out"]:
        print(f"note: an adapter cannot hold {len(record['left_out'])} of the tensors that differ "
              f"({', '.join(record['left_out'][:3])}): {percent(record['left_out_share'])} of the "
              "difference's norm")
    if record["lost"] > MUCH:
        print(f"warning: lost {lost} of the difference; fix: raise --rank, or keep the whole model")


def main(argv=None):
    a = parse(argv)
    if a.verb == "fold":
        record = fold(a.base, a.adapter, a.output, a.force, a.quiet)
        for note in record["notes"]:
            print(f"note: {note}")
        print(f"added s B A to {record['folded']} matrices of {a.base}")
    else:
        print_loss(a, extract(a.model, a.base, a.rank, a.output, a.force, a.quiet))
    print(f"wrote {a.output}")


if __name__ == "__main__":
    sys.exit(command(main))
