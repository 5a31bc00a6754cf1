"""Merges across shapes, each beside the null controls that say what its number means:
Table 5, Figure 4, kinship, a pruned model; and relatives made mergeable by match.py.

    python experiments/shapes.py --figure 4 [--source grown] [--quick]
    python experiments/shapes.py --matched [--mergekit peer/bin/python]
    python experiments/shapes.py --kinship --pruned

In:    the models of make_models.py. Target: base. Sources: large (deeper and wider) and
       base-seed2 (equal shapes, another origin, so that nothing but the data is
       shared); and grown, a deeper and wider relative.
Out:   results/figure4, matched, kinship, pruned, and their sections. Every merge is one
       run of merge.py; the codec is the exact one: measured is the method.
Paper: Sec. 3.3, Table 5 (LLaMA-3.2-1B -> Gemma-3-1B) and Fig. 4 (Gemma 4B -> 1B):
       lambda curves with and without transport. differs: bits per byte.
ours:  the controls. *zero* (shrinkage towards the mean latent), *noise* and *shuffled*
       hold no content of the source at all, and enter after the transport. *carried* is
       Gaussian noise in the place of the source, sent through the same transport:
       Sinkhorn's plan pairs each slot of the target with whatever resembles it, so that
       what comes out resembles the target, whatever went in. Where units are matched,
       *neighbour* is the same match with every layer of the source one off.
       The merge reported for a source is chosen on validation text, judged on test.
Previous: merging.py. Next: codec.py.
"""
import itertools
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from compare import (MODELS, QUICK, Claim, cell, collect, command_line, difference,
                     find, gain, grouped, machine, over_seeds, pm_of, several, sign,
                     stacked, summary, table)
import match
import merge
from align import Moments, control_latents
from baselines import dare, ties
from chunking import (Checkpoint, StateDict, chunk, create, is_selected, measure,
                      standardise, unchunk, unstandardise)
from evaluate import DOMAINS, score
from make_models import gather, scramble
from merging import Sheet, run, seeded

LAMBDAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
ALIGNS = ("none", "mean", "gaussian", "sinkhorn")
# How layers meet: by depth (as the paper), or matched by their weights before.
PAIRINGS = {"large": ("depth",), "base-seed2": ("depth",),
            "grown": ("depth", "weights")}
ANYWHERE = ("zero", "noise", "shuffled")    # controls that hold nothing of any source
TABLE5 = (0.1, 1.0)         # the paper's lambdas: interpolation, transport only
C = 64                      # weights in a chunk of the exact codec
# Only what is encoded takes part, equal shapes or not: what is compared are the latents
# alone, and a control must not receive the source's embeddings.
ENCODED = ("--select", "mlp|self_attn")
LAM = 0.5                   # of the merges of relatives, and of their controls


# --- Sources that are made here -----------------------------------------------------
def neighbours(layers, numbers):
    """Every layer one off: the source's next one; after its last, the one before.

    layers:   {number of a target layer: of its source layer, or None}
    numbers:  of the source's layers
    Example:  {0: 0, 1: None, 2: 4} of 5 layers -> {0: 1, 1: None, 2: 3}
    """
    beside = dict(zip(numbers, [*numbers[1:], numbers[-2]]))
    return {mine: beside.get(theirs) for mine, theirs in layers.items()}


def write_in_order(path, target, source, neighbour=False, like=None):
    """A relative of another shape, in the order of the target's hidden units, as
    tools/match.py writes it. neighbour: the same order of units, but every layer one
    off.  like: the model whose match serves (the source's base); the source itself."""
    target = Checkpoint(target)
    matched = match.open_layers(target, Checkpoint(like or source))
    brought = match.open_layers(target, Checkpoint(source))
    kinship = match.find_kinship(*matched)
    units = match.match_units(*matched, kinship)
    if neighbour:
        beside = neighbours(kinship.layers, list(matched[1].numbers))
        kinship = kinship._replace(layers=beside)
    orders, _ = match.plan_tensors(*brought, kinship, units)
    with create(path, target.entries.values()) as output:
        match.write_matched(output, target, brought[1].checkpoint, orders)
    return path


def noise_like(source, seed):
    """A model without content: the encoded tensors' chunks are Gaussian, with the
    source's mean and covariance. {name: tensor}"""
    file = Checkpoint(source)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, entry in file.entries.items():
        tensors[name] = file.read_tensor(name)
        if is_selected(entry):
            stats = measure(file, name)
            chunks_NC, _ = chunk(standardise(file.read(name), stats), C)
            drawn_NC = control_latents("noise", chunks_NC, Moments.of(chunks_NC),
                                       generator)
            flat_L = unstandardise(unchunk(drawn_NC.float(), entry.numel), stats)
            tensors[name] = flat_L.reshape(entry.shape).to(entry.dtype)
    return tensors


# --- Figure 4 and Table 5: cells ----------------------------------------------------
# What names a cell, besides lam. seed: None where nothing is random.
NOTHING = {"source": "", "align": "", "pairing": "", "control": None, "seed": None}


class Grid:
    """Merged models of one target, their scores, and which control each has to beat. A
    cell is named by a dict: source, align, pairing, lam, control, seed."""

    def __init__(self, sheet):
        self.sheet = sheet
        self.cells = []         # (name of the cell, {split: scores})
        self.base = {}          # split -> scores of the target

    def measure_base(self):
        for split in ("validation", "test"):
            self.base[split] = self.sheet.scores([self.sheet.tensors("base")], split)
        self.cells.append(({"row": "base", **NOTHING, "lam": 0.0}, self.base))

    def measure(self, file, *flags, **fields):
        """Merge a file into the target, and score it. Validation chooses, test reports;
        no control is chosen."""
        named = NOTHING | fields
        pair = (self.sheet.file("base"), file)
        models, _ = self.sheet.merged(*pair, "--lam", named["lam"], *ENCODED, *flags,
                                      codec="exact", first=named["seed"] or 0)
        scores = {"test": self.sheet.scores(models)}
        if not named["control"]:
            scores["validation"] = self.sheet.scores(models, "validation")
        row = named["control"] or "cell"
        self.cells.append(({"row": row, **named}, scores))

    def measure_controls(self, file, lambdas, seeds):
        """Controls that hold nothing of any source, so that one set serves all."""
        for control in ANYWHERE:
            for seed in range(1 if control == "zero" else seeds):
                for lam in lambdas:
                    named = None if control == "zero" else seed
                    self.measure(file, "--control", control, lam=lam, control=control,
                                 seed=named)

    def measure_source(self, file, name, aligns, pairing, lambdas, **fields):
        """Every alignment of one source. A relative in the target's order is "units":
        matched already."""
        for align in aligns:
            how = "none" if align == "units" else align
            for lam in lambdas:
                self.measure(file, "--align", how, source=name, align=align,
                             pairing=pairing, lam=lam, **fields)

    def measure_carried(self, file, name, align, pairing, lambdas, seeds):
        """Noise in the place of this source, through this alignment."""
        for seed in range(seeds):
            drawn = self.sheet.write("carried", noise_like(file, seed))
            self.measure_source(drawn, name, [align], pairing, lambdas,
                                control="carried", seed=seed)

    def controls(self, named):
        """{control: test scores of all seeds} that this cell has to beat."""
        groups = {}
        for other, scores in self.cells:
            control = other.get("control")
            if control and other["lam"] == named["lam"]:
                own = all(other[key] == named[key]
                          for key in ("source", "align", "pairing"))
                if control in ANYWHERE or own:
                    groups.setdefault(control, []).append(scores["test"])
        return {control: stacked(group) for control, group in groups.items()}

    def rows(self):
        """A row per measured model: its scores, its differences to the target and to
        its controls."""
        rows = []
        for named, scores in self.cells:
            row = dict(named)
            for split, each in scores.items():
                row[split] = summary(each)
            held = {"base": self.base["test"]}
            if row["row"] == "cell":
                held |= self.controls(named)
            row["difference"] = {}
            for name, other in held.items():
                found = difference(scores["test"], other)
                row["difference"][name] = found.record()
            documents = self.base["test"][DOMAINS[0]].shape[1]
            rows.append(row | {"documents": documents, "sha256": self.sheet.digests,
                               **machine()})
        return rows


def measure_figure4(models, seeds=5, documents=None, quick=False, quiet=False,
                    names=tuple(PAIRINGS)):
    """Yields the rows of one source after another; the controls come with each."""
    with (tempfile.TemporaryDirectory() as folder,
          tqdm(desc="figure 4", unit="model", disable=quiet) as bar):
        sheet = Sheet(models, folder, None, seeds, documents, quick, bar)
        base = sheet.file("base")
        grid = Grid(sheet)
        grid.measure_base()
        grid.measure_controls(sheet.file(names[0]), LAMBDAS, seeds)
        shared = list(grid.cells)
        for name in names:
            source = sheet.file(name)
            grid.cells = list(shared)
            grid.measure_carried(source, name, "sinkhorn", "depth", LAMBDAS, seeds)
            grid.measure_source(source, name, ALIGNS, "depth", LAMBDAS)
            if "weights" in PAIRINGS[name]:
                file = write_in_order(sheet.scratch / "in order.safetensors", base,
                                      source)
                beside = write_in_order(sheet.scratch / "beside.safetensors", base,
                                        source, neighbour=True)
                grid.measure_carried(file, name, "units", "weights", LAMBDAS, seeds)
                grid.measure_source(beside, name, ["units"], "weights", LAMBDAS,
                                    control="neighbour")
                grid.measure_source(file, name, ["units"], "weights", LAMBDAS)
            yield from grid.rows()


def curve(rows, **fields):
    """[(lambda, mean, standard error)]: difference to the target, the seeds of a
    control taken together."""
    chosen = find(rows, **{"control": None, **fields})
    points = []
    for lam in sorted({row["lam"] for row in chosen} - {0.0, None}):
        same = [row["difference"]["base"] for row in find(chosen, lam=lam)]
        points.append((lam, *over_seeds(same)))
    return points


def chosen_cell(rows, source):
    """The cell of a source with the fewest bits on validation text."""
    found = find(rows, row="cell", source=source)
    return min(found, key=lambda row: row["validation"]["pooled"])


def cell_gain(row):
    """Against the target, then against every control."""
    return gain([(d["mean"], d["se"]) for d in row["difference"].values()])


def section_table5(rows):
    lines = []
    for row in find(rows, row="cell"):
        if row["lam"] in TABLE5:
            line = [f"{row['source']}: {row['align']}", f"{row['lam']:g}"]
            for label in ("base", "zero", "noise", "shuffled", "carried"):
                line.append(cell(row["difference"].get(label)))
            lines.append((row["lam"], line))
    lines.sort(key=lambda pair: pair[0])
    return table(["source: alignment", "lambda", "minus base", "zero", "noise",
                  "shuffled", "carried"], [line for _, line in lines])


def section_figure4(rows):
    chosen = [chosen_cell(rows, source) for source in PAIRINGS
              if find(rows, row="cell", source=source)]
    lines = []
    for row in chosen:
        differences = list(row["difference"].values())
        beaten = sum(sign(d["mean"], d["se"]) < 0 for d in differences[1:])
        lines.append([f"`{row['source']}`", row["align"], f"{row['lam']:g}",
                      cell(differences[0]), f"{beaten} of {len(differences) - 1}",
                      cell_gain(row)])
    return table(["source", "alignment", "lambda", "minus base", "controls beaten",
                  "verdict"], lines)


# --- Relatives, matched, then merged ------------------------------------------------
def mergekit_ties(python, sheet, base, matched):
    """mergekit's own TIES of a matched model with its relative's base, by its command
    line; {name: tensor}."""
    folders = {}
    shapes = Checkpoint(base).entries
    width = shapes["model.embed_tokens.weight"].shape[1]
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
              "hidden_size": width, "num_attention_heads": width // 32,
              "intermediate_size": shapes["model.layers.0.mlp.up_proj.weight"].shape[0],
              "num_hidden_layers": 4, "vocab_size": 256, "tie_word_embeddings": True,
              "torch_dtype": "float32"}
    for name, path in (("base", base), ("matched", matched)):
        folders[name] = sheet.scratch / f"mergekit-{name}"
        folders[name].mkdir()
        (folders[name] / "config.json").write_text(json.dumps(config))
        (folders[name] / "model.safetensors").symlink_to(Path(path).resolve())
    model = {"model": str(folders["matched"]),
             "parameters": {"density": 0.5, "weight": LAM}}
    recipe = sheet.scratch / "ties.yml"         # JSON is YAML
    recipe.write_text(json.dumps({
        "merge_method": "ties", "base_model": str(folders["base"]), "models": [model],
        "dtype": "float32", "parameters": {"normalize": False}}))
    out = sheet.scratch / "mergekit-out"
    subprocess.run([python, "-m", "mergekit.scripts.run_yaml", recipe, out], check=True,
                   capture_output=True)
    return load_file(out / "model.safetensors")


def measure_matched(models, save, seeds=5, documents=None, quick=False, quiet=False,
                    mergekit=None):
    """`grown` in base's order, shapes and names by match.py, then merged at LAM by
    merge.py, all that it has in common with base, the embedding too; beside controls of
    the same command, and beside other methods on the same pair."""
    with (tempfile.TemporaryDirectory() as folder,
          tqdm(desc="matched", unit="model", disable=quiet) as bar):
        sheet = Sheet(models, folder, save, seeds, documents, quick, bar)
        base = sheet.file("base")
        path = sheet.scratch / "grown-as-base.safetensors"
        run(match.main, base, sheet.file("grown"), "-o", path, "--quiet")
        own = load_file(path)
        sheet.add("base", "parent", [sheet.tensors("base")], {})
        half = (base, path, "--lam", LAM)
        against = {"base": "base"}
        for control in ANYWHERE:
            count = 1 if control == "zero" else seeds
            found, _ = sheet.merged(*half, "--control", control, codec="exact",
                                    seeds=count)
            sheet.add(control, "control", found)
            against[control] = control
        copies = {"matched, its units in random order": scramble(own, seed=1)[0],
                  "a stranger (base-seed2)": sheet.tensors("base-seed2")}
        for name, tensors in copies.items():
            other = sheet.write("other", tensors)
            found, _ = sheet.merged(base, other, "--lam", LAM, codec="exact")
            sheet.add(name, "control", found)
            against[name] = name
        found, report = sheet.merged(*half, codec="exact")
        sheet.add("grown, matched", "latent", found, against, report)
        # The merge is beaten if another method gains on it.
        other = {"base": "base", "lerp": "grown, matched"}
        start = sheet.tensors("base")
        sheet.add("TIES, density 0.5", "weight", [ties(start, [own], 0.5, LAM)], other)
        sheet.add("DARE, p 0.5", "weight",
                  seeded(dare, seeds, start, [own], 0.5, LAM), other)
        if mergekit:
            found = mergekit_ties(mergekit, sheet, base, path)
            sheet.add("mergekit's TIES, density 0.5", "weight", [found], other)
        return list(sheet.rows.values())


def section_matched(rows):
    ours = {}
    lines = []
    for row in find(rows, row="grown, matched"):
        ours = row["difference"]
    for row in rows[1:]:
        beaten = ours.get(row["row"])
        by_domain = [cell(row.get("domains", {}).get(domain)) for domain in DOMAINS]
        lines.append([row["row"], row["seeds"], cell(row["difference"]["base"]),
                      *by_domain, cell(beaten), cell(row["difference"].get("lerp"))])
    return table(["merged into base, lambda 0.5", "seeds", "minus base", *DOMAINS,
                  "grown, matched, minus this", "this minus grown, matched"], lines)


# --- Kinship ------------------------------------------------------------------------
NAMES = ("base", "code", "prose", "arithmetic", "base-seed2", "large", "grown",
         "pruned")
REPEATED = (0, 1, 2, 1, 2, 3)       # layers of a depth-upscaled relative
DRIFT = 0.3                         # its noise, over each matrix's deviation


def upscaled(tensors, seed=0):
    """A model whose middle layers stand twice, with noise on every matrix, its stream,
    heads and units in random order."""
    order = scramble(tensors, seed)[1]
    stream, own = order
    deeper = gather(tensors, stream, [own[layer] for layer in REPEATED])
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in deeper.items():
        if tensor.dim() == 2:
            drawn = torch.randn(tensor.shape, generator=generator)
            deeper[name] = tensor.float() + DRIFT * tensor.float().std() * drawn
    return deeper


def kinship_row(target, source, names):
    found = match.find_kinship(*match.open_layers(target, source))
    return {"source": names[1], "target": names[0], "related": found.related,
            "layers": list(found.layers.values()),
            "similarity": [round(value, 4) for value in found.similarity],
            "null": round(found.null, 4),
            "matrix": found.similarity_JI.T.numpy().round(3).tolist(), **machine()}


def measure_kinship(models):
    """Yields a row per ordered pair, and two of a depth-upscaled relative of base."""
    files = {name: Checkpoint(models / f"{name}.safetensors") for name in NAMES}
    tensors = load_file(models / "base.safetensors")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    deeper = StateDict(upscaled(tensors))
    for pair in (("upscaled", "base"), ("base", "upscaled")):
        both = files | {"upscaled": deeper}
        yield kinship_row(both[pair[0]], both[pair[1]], pair)
    for pair in itertools.permutations(NAMES, 2):
        yield kinship_row(files[pair[0]], files[pair[1]], pair)


def kin(row):
    """The mean cosine of the layers that have a partner, of strangers that of all."""
    matched = []
    for value, layer in zip(row["similarity"], row["layers"]):
        if layer is not None:
            matched.append(value)
    values = matched or row["similarity"]
    return sum(values) / len(values)


def section_kinship(rows):
    sides = []
    for related in (True, False):
        same = find(rows, related=related)
        sides.append(f"{len(same)} pairs {'related' if related else 'unrelated'}: "
                     f"cosine {several([kin(row) for row in same])}")
    text = "; ".join(sides) + ".\n"
    for row in rows:
        if "upscaled" in (row["source"], row["target"]):
            text += (f"`{row['source']}` as source of `{row['target']}`: layers "
                     f"{' '.join(map(str, row['layers']))}, cosine {kin(row):.3f}.\n")
    return text


# --- A pruned model and its bigger sibling's expert ---------------------------------
def generator_of(seed, number):
    return torch.Generator().manual_seed(1000 * seed + number)


def noise_change(change, seed):
    """A control: Gaussian, per tensor of the change's norm."""
    new = {}
    for number, (name, tensor) in enumerate(change.items()):
        drawn = torch.randn(tensor.shape, generator=generator_of(seed, number))
        new[name] = drawn * (tensor.norm() / drawn.norm())
    return new


def shuffled_change(change, seed):
    """A control: runs of C weights in random order, within each tensor; a shorter last
    one stays."""
    new = {}
    for number, (name, tensor) in enumerate(change.items()):
        flat = tensor.flatten().clone()
        runs = flat[:len(flat) // C * C].view(-1, C)
        order = torch.randperm(len(runs), generator=generator_of(seed, number))
        runs.copy_(runs[order])
        new[name] = flat.view(tensor.shape)
    return new


def neighbour_change(target, base, expert, lam):
    """A control: lam (expert - base), by the match of the base with every layer one
    off; what stands outside the layers is as in the difference itself. Paths."""
    sides = []
    with tempfile.TemporaryDirectory() as folder:
        for number, source in enumerate((expert, base)):
            path = Path(folder) / f"{number}.safetensors"
            write_in_order(path, target, source, neighbour=True, like=base)
            sides.append(load_file(path))
    change = {}
    for name, tensor in sides[0].items():
        change[name] = lam * (tensor.float() - sides[1][name].float())
    return change


def domain_changes(end, before):
    """{domain: mean, se, loss} of a model's difference to the target."""
    after = score(end)
    found = {}
    for domain in DOMAINS:
        d = difference(after, before, (domain,))
        found[domain] = {"mean": d.mean, "se": d.se,
                         "loss": float(after[domain].mean())}
    return found


def measure_pruned(models, seeds=5):
    """Yields rows of `pruned` + lambda (`code` - `base`), matched, at every lambda, and
    of the controls at LAM."""
    paths = [models / f"{name}.safetensors" for name in ("pruned", "base", "code")]
    start = {name: tensor.float() for name, tensor in load_file(paths[0]).items()}
    before = score(start)
    change = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(match.main, *paths, "-o", folder / "matched", "--quiet")
        base = folder / "matched" / "base.safetensors"
        expert = folder / "matched" / "code.safetensors"
        for lam in (0.3, LAM, 1.0):
            out = folder / "merged.safetensors"
            run(merge.main, paths[0], expert, "--base", base, "--operator",
                "task-arithmetic", f"--lam={lam}", "-o", out, "--force", "--quiet")
            end = load_file(out)
            yield {"row": "difference, matched", "lam": lam, "seed": 0,
                   "domains": domain_changes(end, before), **machine()}
            if lam == LAM:
                for key, tensor in start.items():
                    change[key] = end[key].float() - tensor
    controls = [("neighbour", 0, neighbour_change(*paths, LAM))]
    for seed in range(seeds):
        controls.append(("noise", seed, noise_change(change, seed)))
        controls.append(("shuffled", seed, shuffled_change(change, seed)))
    for row, seed, control in controls:
        end = {key: tensor + control[key] for key, tensor in start.items()}
        yield {"row": row, "lam": LAM, "seed": seed,
               "domains": domain_changes(end, before), **machine()}


def section_pruned(rows):
    """Of sibling.jsonl as well."""
    lines = []
    for (row, lam), group in grouped(rows, "row", "lam").items():
        line = [row, "" if lam is None else f"{lam:g}"]
        for domain in DOMAINS:
            mean, se = over_seeds([one["domains"][domain] for one in group])
            line.append(cell({"mean": mean, "se": se}))
        lines.append(line)
    return table(["added to the target", "lambda", *DOMAINS], lines)


# --- Claims -------------------------------------------------------------------------
def claims_of_figure4(rows):
    large = {"row": "cell", "source": "large", "pairing": "depth", "lam": 0.1}
    for row in find(rows, align="gaussian", **large):
        yield Claim("another shape gains at lambda 0.1", "WinoGrande 56.8 → 57.8",
                    f"{pm_of(row['difference']['base'])} to the target", cell_gain(row),
                    "Table 5: another architecture", "unrelated weights do harm")
        best = chosen_cell(rows, "large")
        yield Claim("another shape gains at the best lambda", "0.05 to 0.20",
                    f"{best['lam']:g}: {pm_of(best['difference']['base'])} to the "
                    "target", cell_gain(best), "Figure 4: lambda, alignment, controls")
    for row in find(rows, align="sinkhorn", **large):
        d = row["difference"]["carried"]
        word = "holds" if sign(d["mean"], d["se"]) < 0 else "not reproduced"
        yield Claim("transport makes the difference", "unstable without",
                    f"{pm_of(d)} to noise, same transport", word,
                    "Figure 4: lambda, alignment, controls")


def claims(records):
    found = list(claims_of_figure4(records["figure4"]))
    for row in find(records["matched"], row="grown, matched"):
        d = row["difference"]["base"]
        found.append(Claim(
            "a relative of another shape, matched, lambda 0.5", "",
            f"{pm_of(d)} to the target: {cell_gain(row)}", "ours",
            "A relative of another shape",
            "after match.py both together beat the target"))
    if records["kinship"]:
        sides = []
        for related in (True, False):
            same = [kin(row) for row in find(records["kinship"], related=related)]
            sides.append(several(same, "{:.2f}".format))
        found.append(Claim("kinship tells relatives from strangers", "",
                           f"cosine {sides[0]}; strangers {sides[1]}", "ours",
                           "Kinship", "who may be merged is known before"))
    for row in find(records["pruned"], row="difference, matched", lam=0.3):
        d = row["domains"]
        found.append(Claim("a pruned model + its sibling's expert, lambda 0.3", "",
                           f"code {pm_of(d['code'])}; arithmetic "
                           f"{pm_of(d['arithmetic'])}",
                           "ours", "A pruned model and its sibling's expert"))
    return found


# --- The command --------------------------------------------------------------------
def parse():
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--figure", choices=("4",), help="and Table 5")
    add("--source", action="append", choices=PAIRINGS, help="of Figure 4 (all)")
    add("--matched", action="store_true", help="grown, as base")
    add("--mergekit", metavar="PYTHON", help="that has mergekit: its TIES as well")
    add("--kinship", action="store_true")
    add("--pruned", action="store_true")
    add("--models", type=Path, default=MODELS)
    add("--seeds", type=int, default=5)
    add("--documents", type=int, help="per domain and split, at most")
    add("--quick", action="store_true",
        help=f"{QUICK} documents per domain; nothing is kept")
    args = parser.parse_args()
    if not (args.figure or args.matched or args.kinship or args.pruned):
        parser.error("nothing to do: give --figure, --matched, --kinship or --pruned")
    return args


def main():
    args = parse()
    how = (args.seeds, args.documents, args.quick, args.quiet)

    if args.figure:
        names = tuple(args.source or PAIRINGS)
        rows = collect("figure4", measure_figure4(args.models, *how, names), args)
        print(section_table5(rows), section_figure4(rows), sep="\n")
    if args.matched:
        def save(row):
            collect("matched", [row], args)
        rows = measure_matched(args.models, save, *how, args.mergekit)
        print(section_matched(rows))
    if args.kinship:
        print(section_kinship(collect("kinship", measure_kinship(args.models), args)))
    if args.pruned:
        print(section_pruned(collect("pruned", measure_pruned(args.models), args)))


if __name__ == "__main__":
    main()
