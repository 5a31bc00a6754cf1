"""Can anything be carried over between two models that share no weights? Three attempts beyond Table 5, same controls.

    python experiments/explore_transfer.py [rows|map|delta ...] [--quick]

rows      chunks that follow rows: a chunk is one row of a matrix (c = 128), so that a latent is a neuron's whole input.
map       before chunking, the source is brought into the target's coordinates: the residual stream by orthogonal
          Procrustes, semi-orthogonal where widths differ; MLP units and heads by `linear_sum_assignment`; what is free
          inside a head in closed form. Fitted twice: on *weights* (the 256 shared points are the byte embeddings) and on
          *text* (the points are activations on training text, which OT fusion calls activation based).
delta     not the weights but a difference: source fine-tuned on code minus source, carried over by the map on text.
In:    models/ (base, base-seed2, large, code). For `delta` base-seed2 and large are fine-tuned on code here, briefly.
Out:   a table per attempt, and JSON lines appended to results/transfer.jsonl.
ours:  in the spirit of OT fusion and git re-basin; nothing of this is in the paper. Every map is checked before it is
       used: the source in its new coordinates must have the loss that it had. The control *carried* is Gaussian noise in
       the place of the source's matrices, sent through the same fit: a fit looks at the target, and may copy from it.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from align import pair_layers, project
from evaluate import DOMAINS, EXCERPT_BYTES, bits_per_byte, held_out
from make_models import Spec, batch, save, train, training_text
from paper_tables import CONTROLS, HEAD, QUICK, Grid, append, facts_of, find, mean_control, records, row_text, trained_codec
from tiny_lm import HEAD_DIM, TinyLM, load, rotary_angles
from train import Schedule
from vae import VAEConfig

LAMBDAS = (0.05, 0.1, 0.5, 1.0)
DELTA_LAMBDAS = (0.2, 0.5, 1.0)
HALF = HEAD_DIM // 2
READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")  # of the stream
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
FIT_WINDOWS = 2         # batches of 16 training windows of 256 bytes: 8192 points for maps of at most 192 x 192 numbers


def layer(tensors, number):
    """Short name -> matrix of one block, e.g. "mlp.up_proj"."""
    return {kind: tensors[f"model.layers.{number}.{kind}.weight"] for kind in READERS + WRITERS}


def depth(tensors):
    return 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))


def folded(tensors):
    """The same function with every RMSNorm gain inside the blocks moved into the matrices behind it, in float64: a
    rotation of the stream commutes with the norm only without gains. The last norm and the tied embedding stay."""
    result = {name: tensor.double() for name, tensor in tensors.items()}
    for number in range(depth(tensors)):
        for norm, kinds in (("input_layernorm", READERS[:3]), ("post_attention_layernorm", READERS[3:])):
            gain = f"model.layers.{number}.{norm}.weight"
            for kind in kinds:
                result[f"model.layers.{number}.{kind}.weight"] *= result[gain]
            result[gain] = torch.ones_like(result[gain])
    return result


# --- The map: which rotation, which unit, which head -----------------------------------------------------------------
class LayerMap(NamedTuple):
    """How one source layer enters the target's coordinates. Orders list source indices, the partners first."""
    units: torch.Tensor         # (I,) order of the MLP units
    signs: torch.Tensor         # (I,) +-1: up and down may flip together
    heads: torch.Tensor         # order of the heads
    values: torch.Tensor        # (heads, HEAD_DIM, HEAD_DIM) orthogonal: v and o may turn together
    phases: torch.Tensor        # (heads, HALF) angles: all that RoPE allows between q and k


class Map(NamedTuple):
    stream: torch.Tensor        # (h_s, h_s) orthogonal; its first h_t rows are the semi-orthogonal map
    layers: dict                # source layer -> LayerMap
    pairs: list                 # source layer of each target layer


def procrustes(target_PH, source_PH):
    """Orthogonal R with R[:h_t] = argmax sum_p <target_p, R source_p>: Schoenemann's U V^T, its rows completed."""
    U, _, Vh = torch.linalg.svd(target_PH.T @ source_PH, full_matrices=True)
    return torch.cat([U @ Vh[:U.shape[0]], Vh[U.shape[0]:]])


def order(score_JI):
    """Source indices in the order of their target partners, then those left over."""
    _, chosen = linear_sum_assignment(-score_JI.numpy())
    return torch.tensor([*chosen, *sorted(set(range(score_JI.shape[1])) - set(chosen))])


def unit(matrix):
    return F.normalize(matrix, dim=-1)


def pairs_of(matrix):
    """(heads * HEAD_DIM, h) -> (heads, HALF, h) complex: RoPE turns dimension i with i + HALF, as a complex number."""
    heads = matrix.reshape(-1, 2, HALF, matrix.shape[1])
    return torch.complex(heads[:, 0], heads[:, 1])


def fit_units(target, source, width, activity):
    """(order, signs). Score: the inner products of a unit's input and output weights, or the correlation of what the
    two units do on text; the sign of (up, down) is free."""
    if activity is None:
        cut = lambda side: [unit(part[:, :width]) for part in (side["mlp.gate_proj"], side["mlp.up_proj"], side["mlp.down_proj"].T)]
        (gate, up, down), (gate_s, up_s, down_s) = cut(target), cut(source)
        signed, plain = up @ up_s.T + down @ down_s.T, gate @ gate_s.T
    else:
        mine, theirs = (unit((part - part.mean(0)).T) for part in (activity[0]["units"], activity[1]["units"]))
        signed, plain = mine @ theirs.T, 0.0
    units, signs = order(plain + signed.abs()), torch.ones(signed.shape[1], dtype=torch.float64)
    signs[:len(signed)] = signed[torch.arange(len(signed)), units[:len(signed)]].sign()
    return units, signs


def fit_heads(target, source, width, activity):
    """(order, values, phases): for every pair of heads the best turn of each kind has a closed form; its gain is the score."""
    phase = sum(torch.einsum("aph,bph->abp", pairs_of(target[kind]), pairs_of(source[kind][:, :width]).conj())
                for kind in READERS[:2])                                    # (J, I, HALF) complex
    if activity is None:
        split = lambda side, kind: side[kind].reshape(-1, HEAD_DIM, side[kind].shape[1])[:, :, :width]
        turned = {"v": target["self_attn.v_proj"], "o": target["self_attn.o_proj"].T.contiguous()}
        theirs = {"v": source["self_attn.v_proj"], "o": source["self_attn.o_proj"].T.contiguous()}
        cross = sum(torch.einsum("akh,blh->abkl", split(turned, kind), split(theirs, kind)) for kind in "vo")
    else:
        mine, theirs = (part["heads"].reshape(len(part["heads"]), -1, HEAD_DIM) for part in activity)
        cross = torch.einsum("pak,pbl->abkl", mine, theirs)
    U, S, Vh = torch.linalg.svd(cross)
    scale = lambda score: score / score.mean()                              # q, k and v, o count alike
    heads, J = order(scale(phase.abs().sum(-1)) + scale(S.sum(-1))), len(cross)
    values, phases = torch.eye(HEAD_DIM).double().repeat(len(heads), 1, 1), torch.zeros(len(heads), HALF).double()
    values[:J] = (U @ Vh)[torch.arange(J), heads[:J]]
    phases[:J] = phase.angle()[torch.arange(J), heads[:J]]
    return heads, values, phases


@torch.no_grad()
def activities(tensors, bytes_BT):
    """What a model does on text, (points, numbers) float64: "stream" per layer border, "units" and "heads" per layer."""
    model, seen = TinyLM.from_state_dict(tensors), {}
    keep = lambda key, part: seen.__setitem__(key, part.reshape(-1, part.shape[-1]).double())
    for number, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda _, inputs, n=number: keep(("stream", n), inputs[0]))
        block.mlp.down_proj.register_forward_pre_hook(lambda _, inputs, n=number: keep(("units", n), inputs[0]))
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs, n=number: keep(("heads", n), inputs[0]))
    model.model.norm.register_forward_pre_hook(lambda _, inputs: keep(("stream", len(model.model.layers)), inputs[0]))
    model(bytes_BT)
    return seen


def fit(target, source, bytes_BT=None):
    """The Map of a folded source to a folded target: from weights, or with text from activations."""
    key, chosen = "model.embed_tokens.weight", pair_layers(depth(source), depth(target))
    if bytes_BT is None:
        stream, seen = procrustes(target[key], source[key]), None
    else:
        seen = [activities(side, bytes_BT) for side in (target, source)]
        # one rotation for all layers, since the residual sum links them; in front of each block and at the end
        borders = [*enumerate(chosen), (depth(target), depth(source))]
        stacked = [torch.cat([unit(part["stream", pair[side]]) for pair in borders]) for side, part in enumerate(seen)]
        stream = procrustes(*stacked)
    turned, layers, width = rotated(source, stream), {}, target[key].shape[1]
    for j, i in enumerate(chosen):
        activity = seen and [{what: part[what, n] for what in ("units", "heads")} for part, n in zip(seen, (j, i))]
        mine, theirs = layer(target, j), layer(turned, i)
        theirs |= {kind: theirs[kind][:width] for kind in WRITERS}
        layers[i] = LayerMap(*fit_units(mine, theirs, width, activity), *fit_heads(mine, theirs, width, activity))
    return Map(stream, layers, chosen)


def rotated(tensors, stream):
    """The residual stream in other coordinates: x -> R x, so W -> W R^T where it is read, R W where it is written."""
    turn = lambda name, w: (stream @ w if any(kind in name for kind in WRITERS) else
                            w @ stream.T if w.dim() == 2 else w)
    return {name: turn(name, w) for name, w in tensors.items()}


def rearranged(block, m):
    """One block with its units and heads in the map's order, sign, turn and phase: the same function."""
    heads_of = lambda w: w.reshape(-1, HEAD_DIM, w.shape[1])[m.heads]
    flat = lambda w: w.reshape(-1, w.shape[-1])
    def phase(w):
        z = pairs_of(w)[m.heads] * torch.polar(torch.ones_like(m.phases), m.phases)[..., None]
        return flat(torch.stack([z.real, z.imag], 1))
    return {"self_attn.q_proj": phase(block["self_attn.q_proj"]), "self_attn.k_proj": phase(block["self_attn.k_proj"]),
            "self_attn.v_proj": flat(m.values @ heads_of(block["self_attn.v_proj"])),
            "self_attn.o_proj": flat(m.values @ heads_of(block["self_attn.o_proj"].T)).T,
            "mlp.gate_proj": block["mlp.gate_proj"][m.units], "mlp.up_proj": m.signs[:, None] * block["mlp.up_proj"][m.units],
            "mlp.down_proj": block["mlp.down_proj"][:, m.units] * m.signs}


def carried(source, mapping):
    """The whole folded source in the map's coordinates: all of it, so still the same function (see `own_loss`)."""
    result = rotated(source, mapping.stream)
    for number, m in mapping.layers.items():
        result |= {f"model.layers.{number}.{kind}.weight": w for kind, w in rearranged(layer(result, number), m).items()}
    return result


def cut(source, mapping, target):
    """Target names -> the carried source's leading part in the target's shapes: what partners the target's units."""
    return {f"model.layers.{j}.{kind}.weight": w[:mine.shape[0], :mine.shape[1]] for j, i in enumerate(mapping.pairs)
            for (kind, mine), w in zip(layer(target, j).items(), layer(source, i).values())}


class Untied(torch.nn.Module):
    """A TinyLM whose head is not its embedding: what a rotated model needs, as the last gain stays with the head."""

    def __init__(self, tensors, head):
        super().__init__()
        self.lm, self.head = TinyLM.from_state_dict(tensors | {"model.norm.weight": torch.ones(head.shape[1])}), head.float()

    def forward(self, bytes_BT):
        angles, x = rotary_angles(bytes_BT.shape[1]), self.lm.model.embed_tokens(bytes_BT)
        for block in self.lm.model.layers:
            x = block(x, *angles)
        return F.linear(self.lm.model.norm(x), self.head)


def own_loss(source, mapping, documents):
    """Bits per byte of the source before and after the map: equal, or the map is wrong."""
    head = source["model.embed_tokens.weight"] * source["model.norm.weight"]
    return [float(bits_per_byte(Untied(tensors, turned), documents).mean()) for tensors, turned in
            ((source, head), (carried(source, mapping), head @ mapping.stream.T))]


# --- The attempts -----------------------------------------------------------------------------------------------------
def rescaled(tensors, target):
    """Each matrix with the standard deviation of its partner, as z-scoring does across shapes."""
    return {name: w * (target[name].std() / w.std()) for name, w in tensors.items()}


def noise_like(tensors, seed):
    """The blocks' matrices replaced by Gaussian noise of their spread; embedding and norms stay the source's."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda w: torch.randn(w.shape, generator=generator, dtype=w.dtype) * w.std()
    return {name: draw(w) if name.endswith("proj.weight") else w for name, w in tensors.items()}


def write(folder, name, tensors):
    path = Path(folder, f"{name}.safetensors")
    save_file({key: w.float().contiguous() for key, w in tensors.items()}, path)
    return path


def exact_codec(target, chunk):
    """r = 1 without blocks: an exact linear codec, so that nothing but the attempt is measured."""
    config = VAEConfig(chunk=chunk, width=max(128, chunk), blocks=0)
    return trained_codec(target, [target], config, Schedule(steps1=0, steps2=0))


def explore_rows(models, folder, args, _):
    """Whole rows as chunks. The large model's rows are projected to the target's length first (by overlap)."""
    codec, stages = exact_codec(models["base"], 128)
    grid = Grid(models["base"], codec, args.documents)
    grid.score("base", grid.tensors, ("validation", "test"))
    narrow = lambda w: w if w.dim() < 2 else project(w.T.contiguous(), w.shape[1] * 2 // 3).T
    large = write(folder, "large-rows", {name: narrow(w) for name, w in load_file(models["large"]).items() if name.endswith("proj.weight")})
    for source in (large, models["base-seed2"]):
        grid.measure_source(source, ("gaussian", "sinkhorn"), "depth", LAMBDAS)
        grid.measure_carried(source, "sinkhorn", "depth", LAMBDAS, args.seeds)
    grid.measure_controls(large, LAMBDAS, args.seeds)
    return [(grid, facts_of(codec, stages, models.values()), DOMAINS)]


def explore_map(models, folder, args, bytes_BT):
    """The source in the target's coordinates, then the plain latent interpolation: shapes now agree."""
    target = folded(load_file(models["base"]))
    base = write(folder, "base-folded", target)
    codec, stages = exact_codec(base, 64)
    grid, losses = Grid(base, codec, args.documents), {}
    grid.score("base", grid.tensors, ("validation", "test"))
    for model, points in ((model, points) for model in ("large", "base-seed2") for points in ("weights", "text")):
        name, text = f"{model} by {points}", bytes_BT if points == "text" else None
        source = folded(load_file(models[model]))
        mapping = fit(target, source, text)
        losses[name] = own_loss(source, mapping, held_out("code", "validation")[:QUICK])
        assert abs(losses[name][0] - losses[name][1]) < 1e-4, f"{name}: the map changes the source's own loss: {losses[name]}"
        place = lambda side, how: write(folder, name, rescaled(cut(carried(side, how), how, target), target))
        grid.measure_source(place(source, mapping), ("none",), "depth", LAMBDAS)
        for seed in range(args.seeds):
            noise = noise_like(source, seed)
            grid.measure_source(place(noise, fit(target, noise, text)), ("none",), "depth", LAMBDAS, control="carried", seed=seed)
    grid.measure_controls(base, LAMBDAS, args.seeds)
    return [(grid, facts_of(codec, stages, models.values()) | {"own_loss": losses}, DOMAINS)]


def fine_tuned(path, folder, steps):
    """The model after a short training on code alone, as the experts of make_models.py."""
    model, texts = load(path).train(), [training_text(domain) for domain in DOMAINS]
    train(model, Spec(seed=21, steps=steps, lr=1e-3, mixture=(1, 0, 0)), texts, range_bar(steps))
    save(model, out := Path(folder, f"{path.stem}-code.safetensors"))
    return out


class range_bar(list):
    """The steps, with the method that make_models.train calls on its progress bar."""
    def __init__(self, steps): super().__init__(range(steps))
    def set_postfix(self, **_): pass


def scrambled(delta, seed, how):
    """A delta without content: Gaussian of each matrix's spread, or its own chunks of 64 in random order."""
    generator = torch.Generator().manual_seed(seed)
    if how == "noise":
        return {name: torch.randn(w.shape, generator=generator, dtype=w.dtype) * w.std() for name, w in delta.items()}
    return {name: w.reshape(-1, 64)[torch.randperm(w.numel() // 64, generator=generator)].reshape(w.shape) for name, w in delta.items()}


def explore_delta(models, folder, args, bytes_BT):
    """target + lambda (expert - its base), the difference carried over. Scored on code. The base's own expert, whose
    delta needs no map, is the positive control: a verdict that could not say yes to it would be worth nothing."""
    target = folded(load_file(models["base"]))
    base, found = write(folder, "base-folded", target), []
    codec, stages = exact_codec(base, 64)
    for name in ("base", "base-seed2", "large"):
        expert_file = models["code"] if name == "base" else fine_tuned(models[name], folder, args.steps)
        source, expert = folded(load_file(models[name])), folded(load_file(expert_file))
        mapping = fit(target, source, bytes_BT) if name != "base" else None
        place = lambda side: cut(carried(side, mapping), mapping, target) if mapping else side
        delta = {key: (w - place(source)[key]) * (target[key].std() / place(source)[key].std())
                 for key, w in place(expert).items() if key.endswith("proj.weight")}
        grid = Grid(base, codec, args.documents)
        grid.score("base", grid.tensors, ("validation", "test"))
        full = lambda part: {key: target[key] + part[key] for key in part}
        grid.measure_source(write(folder, f"{name}-code-delta", full(delta)), ("none",), "depth", DELTA_LAMBDAS)
        for control in ("noise", "shuffled"):
            for seed in range(args.seeds):
                grid.measure_source(write(folder, "control", full(scrambled(delta, seed, control))), ("none",), "depth", DELTA_LAMBDAS,
                                    f"{name}-code-delta", control, seed)
        own = {d: [float(bits_per_byte(load(f), held_out(d, "test")[:args.documents]).mean()) for f in (models[name], expert_file)] for d in DOMAINS}
        found.append((grid, facts_of(codec, stages, [*models.values(), expert_file]) | {"own_loss": own}, ("code",)))
    return found


def report(attempt, grid, facts, domains, results):
    """Print one table, choose by validation text, append the rows."""
    rows = [{**row, "method": attempt} for row in records(grid, facts, domains)]
    print(f"\n{attempt}, scored on {' + '.join(domains)}; base {find(rows, row='base')[0]['test']['pooled']:.4f}"
          + (f"; own loss before and after: {facts['own_loss']}" if "own_loss" in facts else "") + f"\n{HEAD}")
    for row in find(rows, row="cell"):
        print(row_text(f"{row['source']}, {row['align']}, lambda {row['lam']:g}", row))
    for control, *like, lam in dict.fromkeys((r["control"], r["source"], r["align"], r["pairing"], r["lam"]) for r in rows if r["control"]):
        r = mean_control(rows, control, lam, tuple(like))
        print(row_text(f"control {control} {like[0]} lambda {lam:g}", r, r["seeds"]))
    for source in dict.fromkeys(r["source"] for r in find(rows, row="cell")):
        chosen = find(rows, **grid.choose(source, domains)._asdict())[0]
        chosen["chosen"] = True
        print(row_text(f"chosen: {source}, {chosen['align']}, {chosen['lam']:g}", chosen, chosen["verdict"]), flush=True)
    if results:
        append(results, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    attempts = ("rows", "map", "delta")
    parser.add_argument("attempts", nargs="*", metavar="ATTEMPT", help=f"from {', '.join(attempts)}; all by default")
    parser.add_argument("--models", type=Path, default=HERE / "models", help="folder of the checkpoints")
    parser.add_argument("--results", type=Path, default=HERE / "results/transfer.jsonl", help="JSON lines, appended to")
    parser.add_argument("--seeds", type=int, default=5, help="for whatever is random (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="of fine-tuning on code, for delta (%(default)s)")
    parser.add_argument("--documents", type=int, help="per domain and split, at most; fewer is faster and less sure (all)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} documents per domain; nothing is written")
    args = parser.parse_args()
    if unknown := set(args.attempts) - set(attempts):
        parser.error(f"no such attempt: {', '.join(sorted(unknown))}; there are {', '.join(attempts)}")
    args.documents = QUICK if args.quick else args.documents
    models = {name: args.models / f"{name}.safetensors" for name in ("base", "large", "base-seed2", "code")}
    texts, generator = [training_text(domain) for domain in DOMAINS], np.random.default_rng(0)
    bytes_BT = torch.cat([batch(texts, (1 / 3, 1 / 3, 1 / 3), generator) for _ in range(FIT_WINDOWS)])[:, :EXCERPT_BYTES]
    run = {"rows": explore_rows, "map": explore_map, "delta": explore_delta}
    for attempt in args.attempts or attempts:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            for grid, facts, domains in run[attempt](models, folder, args, bytes_BT):
                report(attempt, grid, facts, domains, None if args.quick else args.results)
        print(f"{attempt}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
