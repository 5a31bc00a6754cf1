"""What does the codec keep at each compression ratio? NMSE beside PCA and white noise, and the decoded model's loss.

In:    checkpoints to train on, one that the VAE never sees, the ratios.
Out:   a table, and JSON lines in results/codec.jsonl: per ratio the NMSE of PCA (fitted on the training checkpoints' own
       chunks), of the warm start before any training, and of the trained VAE, on the training checkpoints and on the
       held-out one; the white-noise line 1 - 1/r; the effective ratio, which counts the codec's parameters as well; and
       bits per byte of each training checkpoint before and after the round trip.
Paper: Sec. 5.4, Tables 7 and 8, in the unit of this project (NMSE = squared relative error).
"""
import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from chunking import Checkpoint, chunk, is_selected, measure, scale
from evaluate import DOMAINS, bits_per_byte, held_out
from lsmerge import Codec, Parent
from tiny_lm import TinyLM
from train import Schedule, train_vae
from vae import VAEConfig


def parents_of(path):
    file = Checkpoint(path)
    return file, [measure(file, entry.name) for entry in file.entries.values() if is_selected(entry)]


def chunks_of(parents, C):
    """All chunks of all encoded tensors, standardised, (N, C) float64; padding as zeros, as the codec sees it."""
    return torch.cat([chunk(scale(file.read(slot.name), slot), C)[0] for file, slots in parents for slot in slots]).double()


def pca_nmse(fit_NC, applied_NC, Z):
    """Squared error of projecting on the Z leading principal directions of `fit_NC`, per weight."""
    mean = fit_NC.mean(0)
    directions = torch.linalg.eigh((fit_NC - mean).T @ (fit_NC - mean)).eigenvectors[:, -Z:]
    centred = applied_NC - mean
    return (centred - centred @ directions @ directions.T).square().mean().item()


def decoded_tensors(codec, file, slots):
    """The checkpoint with every encoded tensor sent through the codec, and the NMSE averaged over encoded weights."""
    tensors, squares, count = {name: file.read_tensor(name) for name in file.entries}, 0.0, 0
    for slot in slots:
        parent = Parent(lambda a, b: file.read(slot.name, a, b), slot, codec)
        weights_L = parent.read(0, slot.numel).double()
        decoded_L = codec.decode(parent.latents(0, parent.N), slot, slot.numel)
        squares, count = squares + ((decoded_L - weights_L) / slot.scale).square().sum().item(), count + slot.numel
        tensors[slot.name] = decoded_L.to(slot.dtype).reshape(slot.shape)
    return tensors, squares / count


def losses(tensors, split):
    """Mean bits per byte per domain."""
    model = TinyLM.from_state_dict(tensors)
    return {domain: float(bits_per_byte(model, held_out(domain, split)).mean()) for domain in DOMAINS}


def run(paths, unseen, ratio, schedule, seed, init):
    """One ratio: everything the table prints, as one record."""
    training, held = [parents_of(path) for path in paths], parents_of(unseen)
    config = VAEConfig(ratio=ratio, init=init)
    fit, other = chunks_of(training, config.chunk), chunks_of([held], config.chunk)
    record = {"ratio": config.true_ratio, "white_noise": max(0.0, 1 - 1 / config.true_ratio),
              "pca_training": pca_nmse(fit, fit, config.latent), "pca_unseen": pca_nmse(fit, other, config.latent)}
    for name, steps in (("start", Schedule(steps1=0, steps2=0)), ("trained", schedule)):
        began = time.perf_counter()
        vae, stages = train_vae(training, config, steps, seed)
        codec = Codec(vae)
        seconds = time.perf_counter() - began
        results = [decoded_tensors(codec, *parent) for parent in training]
        record |= {f"{name}_training": sum(nmse for _, nmse in results) / len(results), f"{name}_unseen": decoded_tensors(codec, *held)[1]}
    weights = sum(slot.numel for _, slots in training for slot in slots)
    parameters = sum(p.numel() for p in vae.parameters())
    record |= {"effective_ratio": weights / (weights / config.true_ratio + parameters), "stages": stages, "train_seconds": seconds}
    record["loss"] = {Path(path).stem: {"before": losses({n: f.read_tensor(n) for n in f.entries}, "test"), "after": losses(tensors, "test")}
                      for path, (f, _), (tensors, _) in zip(paths, training, results)}
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = HERE / "models"
    parser.add_argument("checkpoints", nargs="*", default=[models / "code.safetensors", models / "prose.safetensors"])
    parser.add_argument("--unseen", default=models / "base-seed2.safetensors", help="a checkpoint the VAE is not trained on")
    parser.add_argument("--ratios", default="1,1.6,2,4")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--init", choices=("pca", "random"), default=VAEConfig().init)
    parser.add_argument("--steps2", type=int, default=Schedule().steps2)
    parser.add_argument("--lr", type=float, default=Schedule().lr)
    parser.add_argument("--record", default=HERE / "results" / "codec.jsonl", help="append to this file (%(default)s)")
    a = parser.parse_args()
    schedule = Schedule(steps2=a.steps2, lr=a.lr)
    print(f"{'':>5} {'white':>7} | {'training checkpoints: NMSE':^29} | {'unseen checkpoint: NMSE':^29} | {'effective':>9} | bits per byte after / before")
    print(f"{'r':>5} {'noise':>7} | {'PCA':>9}{'start':>10}{'trained':>10} | {'PCA':>9}{'start':>10}{'trained':>10} | {'r':>9} |")
    for ratio in map(float, a.ratios.split(",")):
        for seed in map(int, a.seeds.split(",")):
            r = run(a.checkpoints, a.unseen, ratio, schedule, seed, a.init)
            show = lambda key: f"{r[key]:.2e}" if r[key] < 1e-3 else f"{r[key]:.4f}"
            own = ", ".join(f"{name}: {pair['after'][name]:.3f} / {pair['before'][name]:.3f}" for name, pair in r["loss"].items() if name in DOMAINS)
            print(f"{r['ratio']:>5g} {r['white_noise']:>7.3f} | " + " | ".join(
                f"{show(f'pca_{where}'):>9}{show(f'start_{where}'):>10}{show(f'trained_{where}'):>10}" for where in ("training", "unseen"))
                + f" | {r['effective_ratio']:>9.2f} | {own}", flush=True)
            with open(a.record, "a") as stream:
                print(json.dumps({"seed": seed, "checkpoints": [Path(p).name for p in a.checkpoints], "unseen": Path(a.unseen).name,
                                  "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(),
                                  "steps2": a.steps2, "lr": a.lr, "init": a.init, **r}, allow_nan=False), file=stream)


if __name__ == "__main__":
    main()
