"""Can anything be carried over between two models that share no weights? Beyond Table 5.

    python experiments/explore_transfer.py [rows|map|delta ...] [--quick]

rows      chunks that follow rows: a chunk is one row of a matrix (c = 128), so that a latent is a
          neuron's whole input.
map       before chunking, the source is brought into the target's coordinates (coordinates.py),
          by a map fitted on weights, and by one fitted on training text.
delta     not the weights but a difference: source fine-tuned on code minus source, carried over by
          the map on text.
In:    models/ (base, base-seed2, large, code). For `delta` base-seed2 and large are fine-tuned on
       code here, briefly.
Out:   a table per attempt, and JSON lines appended to results/transfer.jsonl.
ours:  nothing of this is in the paper. The controls are Table 5's. Every map is checked before it
       is used: the source in its new coordinates must have the loss that it had. The control
       *carried* is Gaussian noise in the place of the source's matrices, sent through the same fit:
       a fit looks at the target, and may copy from it.
Previous: coordinates.py. Next: explore_codec.py.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from align import project
from coordinates import carried, cut, fit, folded, own_loss
from evaluate import DOMAINS, EXCERPT_BYTES, held_out
from grid import HEAD, Cell, Grid, facts_of, mean_control, records, row_text, trained_codec
from make_models import Spec, batch, save, train, training_text
from scores import QUICK, append, find, score
from tiny_lm import load
from train import Schedule
from vae import VAEConfig

LAMBDAS = (0.05, 0.1, 0.5, 1.0)
DELTA_LAMBDAS = (0.2, 0.5, 1.0)
FIT_WINDOWS = 2     # batches of 16 windows of 256 bytes: 8192 points for at most 192 x 192 numbers
MODELS = ("base", "large", "base-seed2", "code")


def write(folder, name, tensors):
    path = Path(folder, f"{name}.safetensors")
    save_file({key: w.float().contiguous() for key, w in tensors.items()}, path)
    return path


def exact_codec(target, chunk):
    """r = 1 without blocks: exact and linear, so that nothing but the attempt is measured."""
    config = VAEConfig(chunk=chunk, width=max(128, chunk), blocks=0)
    return trained_codec(target, [target], config, Schedule(steps1=0, steps2=0))


# --- rows -----------------------------------------------------------------------------------------
def narrowed(tensors):
    """The large model's matrices with rows projected (by overlap) to the target's length."""
    return {name: project(w.T.contiguous(), w.shape[1] * 2 // 3).T
            for name, w in tensors.items() if name.endswith("proj.weight")}


def explore_rows(models, folder, args, _):
    """Whole rows as chunks."""
    codec, stages = exact_codec(models["base"], 128)
    grid = Grid(models["base"], codec, args.documents)
    grid.measure_base()
    large = write(folder, "large-rows", narrowed(load_file(models["large"])))
    for source in (large, models["base-seed2"]):
        grid.measure_source(source, ("gaussian", "sinkhorn"), "depth", LAMBDAS)
        grid.measure_carried(source, "sinkhorn", "depth", LAMBDAS, args.seeds)
    grid.measure_controls(large, LAMBDAS, args.seeds)
    return [(grid, facts_of(codec, stages, models.values()), DOMAINS)]


# --- map ------------------------------------------------------------------------------------------
def placed(source, mapping, target):
    """What of the carried source partners the target's matrices, each with the standard deviation
    of its partner, as z-scoring does across shapes."""
    partners = cut(carried(source, mapping), mapping, target)
    return {name: w * (target[name].std() / w.std()) for name, w in partners.items()}


def noise_like(tensors, seed):
    """The blocks' matrices replaced by Gaussian noise of their spread; embedding and norms stay."""
    generator, result = torch.Generator().manual_seed(seed), dict(tensors)
    for name, w in tensors.items():
        if name.endswith("proj.weight"):
            result[name] = torch.randn(w.shape, generator=generator, dtype=w.dtype) * w.std()
    return result


def explore_map(models, folder, args, bytes_BT):
    """The source in the target's coordinates, then the plain latent interpolation: shapes agree."""
    target = folded(load_file(models["base"]))
    base = write(folder, "base-folded", target)
    codec, stages = exact_codec(base, 64)
    grid, losses = Grid(base, codec, args.documents), {}
    grid.measure_base()
    for model in ("large", "base-seed2"):
        source = folded(load_file(models[model]))
        for points, text in (("weights", None), ("text", bytes_BT)):
            name, mapping = f"{model} by {points}", fit(target, source, text)
            losses[name] = own_loss(source, mapping, held_out("code", "validation")[:QUICK])
            changed = abs(losses[name][0] - losses[name][1])
            assert changed < 1e-4, f"{name}: the map changes the source's own loss: {losses[name]}"
            file = write(folder, name, placed(source, mapping, target))
            grid.measure_source(file, ("none",), "depth", LAMBDAS)
            for seed in range(args.seeds):
                noise = noise_like(source, seed)
                file = write(folder, name, placed(noise, fit(target, noise, text), target))
                grid.measure_source(file, ("none",), "depth", LAMBDAS, None, "carried", seed)
    grid.measure_controls(base, LAMBDAS, args.seeds)
    return [(grid, facts_of(codec, stages, models.values()) | {"own_loss": losses}, DOMAINS)]


# --- delta ----------------------------------------------------------------------------------------
class Steps(list):
    """The steps, with the method that make_models.train calls on its progress bar."""
    def set_postfix(self, **_):
        pass


def fine_tuned(path, folder, steps):
    """The model after a short training on code alone, as the experts of make_models.py."""
    model, texts = load(path).train(), [training_text(domain) for domain in DOMAINS]
    train(model, Spec(seed=21, steps=steps, lr=1e-3, mixture=(1, 0, 0)), texts, Steps(range(steps)))
    save(model, out := Path(folder, f"{path.stem}-code.safetensors"))
    return out


def scrambled(delta, seed, how):
    """A delta without content: Gaussian of each matrix's spread, or its own chunks of 64 in random
    order."""
    generator, result = torch.Generator().manual_seed(seed), {}
    for name, w in delta.items():
        if how == "noise":
            result[name] = torch.randn(w.shape, generator=generator, dtype=w.dtype) * w.std()
        else:
            shuffled = torch.randperm(w.numel() // 64, generator=generator)
            result[name] = w.reshape(-1, 64)[shuffled].reshape(w.shape)
    return result


def carried_delta(target, source, expert, bytes_BT):
    """expert - source in the target's coordinates and spread; without text they are its own."""
    if bytes_BT is not None:
        mapping = fit(target, source, bytes_BT)
        source, expert = (cut(carried(side, mapping), mapping, target) for side in (source, expert))
    return {key: (w - source[key]) * (target[key].std() / source[key].std())
            for key, w in expert.items() if key.endswith("proj.weight")}


def own_losses(source_file, expert_file, documents):
    """domain -> mean bits per byte on test text of a source and of its expert."""
    both = [score(load(file), documents=documents) for file in (source_file, expert_file)]
    return {domain: [float(scores[domain].mean()) for scores in both] for domain in DOMAINS}


def explore_delta(models, folder, args, bytes_BT):
    """target + lambda (expert - its base), the difference carried over. Scored on code. The base's
    own expert, whose delta needs no map, is the positive control: a verdict that could not say yes
    to it would be worth nothing."""
    target = folded(load_file(models["base"]))
    base, found = write(folder, "base-folded", target), []
    codec, stages = exact_codec(base, 64)
    for name in ("base", "base-seed2", "large"):
        own = name == "base"
        expert_file = models["code"] if own else fine_tuned(models[name], folder, args.steps)
        source, expert = folded(load_file(models[name])), folded(load_file(expert_file))
        delta = carried_delta(target, source, expert, None if own else bytes_BT)
        grid, row = Grid(base, codec, args.documents), f"{name}-code-delta"
        grid.measure_base()
        file = write(folder, row, added(target, delta))
        grid.measure_source(file, ("none",), "depth", DELTA_LAMBDAS)
        for control in ("noise", "shuffled"):
            for seed in range(args.seeds):
                file = write(folder, "control", added(target, scrambled(delta, seed, control)))
                grid.measure_source(file, ("none",), "depth", DELTA_LAMBDAS, row, control, seed)
        losses = own_losses(models[name], expert_file, args.documents)
        facts = facts_of(codec, stages, [*models.values(), expert_file])
        found.append((grid, facts | {"own_loss": losses}, ("code",)))
    return found


def added(target, delta):
    return {key: target[key] + w for key, w in delta.items()}


# --- The command ----------------------------------------------------------------------------------
ATTEMPTS = {"rows": explore_rows, "map": explore_map, "delta": explore_delta}


def report(attempt, grid, facts, domains, results):
    """Print one table, choose by validation text, append the rows."""
    rows = [{**row, "method": attempt} for row in records(grid, facts, domains)]
    base = find(rows, row="base")[0]["test"]["pooled"]
    own = f"; own loss before and after: {facts['own_loss']}" if "own_loss" in facts else ""
    print(f"\n{attempt}, scored on {' + '.join(domains)}; base {base:.4f}{own}\n{HEAD}")
    cells, controls = find(rows, row="cell"), [Cell(*(row[key] for key in Cell._fields[:5]))
                                               for row in rows if row["control"]]
    for row in cells:
        print(row_text(f"{row['source']}, {row['align']}, lambda {row['lam']:g}", row))
    for cell in dict.fromkeys(controls):
        row = mean_control(rows, cell.control, cell.lam, cell.curve)
        name = f"control {cell.control} {cell.source} lambda {cell.lam:g}"
        print(row_text(name, row, row["seeds"]))
    for source in dict.fromkeys(row["source"] for row in cells):
        row = find(rows, **grid.choose(source, domains)._asdict())[0]
        row["chosen"] = True
        name = f"chosen: {source}, {row['align']}, {row['lam']:g}"
        print(row_text(name, row, row["verdict"]), flush=True)
    if results:
        append(results, rows)


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attempts", nargs="*", metavar="ATTEMPT",
                        help=f"from {', '.join(ATTEMPTS)}; all by default")
    parser.add_argument("--models", type=Path, default=HERE / "models",
                        help="folder of the checkpoints")
    parser.add_argument("--results", type=Path, default=HERE / "results/transfer.jsonl",
                        help="JSON lines, appended to")
    parser.add_argument("--seeds", type=int, default=5, help="for whatever is random (%(default)s)")
    parser.add_argument("--steps", type=int, default=150,
                        help="of fine-tuning on code, for delta (%(default)s)")
    parser.add_argument("--documents", type=int,
                        help="per domain and split, at most; fewer is faster and less sure (all)")
    parser.add_argument("--quick", action="store_true",
                        help=f"{QUICK} documents per domain; nothing is written")
    args = parser.parse_args()
    if unknown := set(args.attempts) - set(ATTEMPTS):
        parser.error(f"no such attempt: {', '.join(sorted(unknown))}; "
                     f"there are {', '.join(ATTEMPTS)}")
    args.documents = QUICK if args.quick else args.documents
    return args


def main():
    args = parse()
    models = {name: args.models / f"{name}.safetensors" for name in MODELS}
    texts, generator = [training_text(domain) for domain in DOMAINS], np.random.default_rng(0)
    windows = [batch(texts, (1 / 3, 1 / 3, 1 / 3), generator) for _ in range(FIT_WINDOWS)]
    bytes_BT = torch.cat(windows)[:, :EXCERPT_BYTES]
    for attempt in args.attempts or ATTEMPTS:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            for grid, facts, domains in ATTEMPTS[attempt](models, folder, args, bytes_BT):
                report(attempt, grid, facts, domains, None if args.quick else args.results)
        print(f"{attempt}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
