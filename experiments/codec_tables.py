"""What a code keeps of the weights: the trained VAE beside PCA, noise and white noise, on weights it was fitted on and others.

    python experiments/paper_tables.py --table 7 --table 8          # these tables are printed from there

In:    a family the codec is fitted on (code, prose), and what it has never seen: another expert of the same base
       (arithmetic), another seed (base-seed2), another size (large).
Out:   per compression ratio r, checkpoint and method: NMSE (squared relative error), bits per byte of the decoded model, the
       paired difference to the model as it was; one JSON line each, in results/table7.jsonl and table8.jsonl.

       VAE                    as train.py makes it, warm start and curriculum; one row per seed
       PCA                    the best linear code of C weights into C / r numbers, fitted on the family's chunks
       PCA of its own         the same, fitted on the checkpoint itself: what one basis can do at best
       PCA, c = 1024          chunks as long as a window: has as many numbers of its own as the weights that it is fitted on
       noise                  Gaussian noise on the weights, of the VAE's NMSE in every tensor: is its error kinder than noise?

       Beside r the white-noise line 1 - 1/r, what PCA would lose if weights were noise, and the effective ratio,
       weights / (latent numbers + the codec's own numbers).
Paper: Sec. 5.4, Table 7 (a VAE of Gemma-3-4B on other models) and Table 8 (reconstruction beside PCA).
Previous: merging_tables.py. Next: curriculum.py.
"""
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from chunking import Checkpoint, chunk, is_selected, measure, open_checkpoint, scale, unscale
from evaluate import DOMAINS, bits_per_byte, held_out
from lsmerge import Codec, Parent
from paper_tables import difference, pooled, summary
from tiny_lm import TinyLM
from train import Schedule, train_vae
from vae import VAEConfig

FAMILY = ("code", "prose")
UNSEEN = ("arithmetic", "base-seed2", "large")
RATIOS = (0.5, 1.0, 64 / 63, 1.25, 1.6, 2.0, 4.0)       # 64 / 63: one number less per chunk, the least that compresses
LONG = 1024                                             # weights in a window
# The paper's MMLU (%), for orientation: Table 8, Gemma-3-1B 41.44 before; Table 7, the same model by a VAE of another, 40.76 before.
PAPER = {"8": {1.6: "PCA 25.5, VAE 39.9", 2.0: "PCA 24.1, VAE 39.8", 4.0: "PCA 24.1, VAE 39.8"}, "7": {1.6: "VAE 40.0", 4.0: "VAE 25.0"}}


@dataclass(frozen=True)
class Model:
    """A checkpoint with the statistics of its encoded tensors."""
    name: str
    file: Checkpoint
    slots: list

    @classmethod
    def open(cls, path):
        file = open_checkpoint(path)
        return cls(Path(path).resolve().stem, file, [measure(file, entry.name) for entry in file.entries.values() if is_selected(entry)])

    @property
    def parent(self): return self.file, self.slots

    @property
    def weights(self): return sum(slot.numel for slot in self.slots)

    def chunks(self, C):
        """All chunks of all encoded tensors, standardised, (N, C) float64; padding as zeros, as the codec sees it."""
        return torch.cat([chunk(scale(self.file.read(slot.name), slot), C)[0] for slot in self.slots]).double()

    def rebuilt(self, way):
        """(tensors, NMSE, NMSE per tensor) after each encoded tensor went `way`: (its weights in float64, slot) -> others."""
        tensors, errors = {name: self.file.read_tensor(name) for name in self.file.entries}, {}
        for slot in self.slots:
            weights_L = self.file.read(slot.name).double()
            decoded_L = way(weights_L, slot)
            errors[slot.name] = ((decoded_L - weights_L) / slot.scale).square().mean().item()
            tensors[slot.name] = decoded_L.to(slot.dtype).reshape(slot.shape)
        return tensors, sum(errors[s.name] * s.numel for s in self.slots) / self.weights, errors


def pca(fit_NC, Z):
    """(mean, the Z leading principal directions (C, Z)): the best linear code of Z numbers (Eckart-Young)."""
    mean_C = fit_NC.mean(0)
    return mean_C, torch.linalg.eigh((fit_NC - mean_C).T @ (fit_NC - mean_C)).eigenvectors[:, max(0, fit_NC.shape[1] - Z):]


# --- Ways through a code: functions for Model.rebuilt -----------------------------------------------------------------
def through_pca(mean_C, directions_CZ):
    def way(weights_L, slot):
        x_NC = chunk(scale(weights_L, slot), len(mean_C))[0].double() - mean_C
        return unscale((mean_C + x_NC @ directions_CZ @ directions_CZ.T).reshape(-1)[:slot.numel], slot)
    return way


def through_codec(codec):
    def way(weights_L, slot):
        parent = Parent(lambda start, stop: weights_L[start:stop], slot, codec)
        return codec.decode(parent.latents(0, parent.N), slot, slot.numel)
    return way


def through_noise(errors, seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda weights_L, slot: weights_L + slot.scale * errors[slot.name] ** 0.5 * torch.randn(slot.numel, generator=generator, dtype=torch.float64)


def scores(tensors, documents=None):
    """domain -> (1, documents) bits per byte on test text."""
    model = TinyLM.from_state_dict(tensors)
    return {domain: bits_per_byte(model, held_out(domain, "test")[:documents])[None] for domain in DOMAINS}


# --- Rows -------------------------------------------------------------------------------------------------------------
def effective(ratio, weights, numbers):
    """Weights per number that has to be kept, the codec's own included."""
    return weights / (weights / ratio + numbers)


class Sheet:
    """Everything measured so far; `before` holds each model's own scores."""

    def __init__(self, models, seeds, documents, bar):
        self.family, self.unseen = ([Model.open(models / f"{name}.safetensors") for name in names] for names in (FAMILY, UNSEEN))
        self.seeds, self.documents, self.bar, self.rows = seeds, documents, bar, []
        everyone = [*self.family, *self.unseen]
        self.before = {m.name: scores({n: m.file.read_tensor(n) for n in m.file.entries}, documents) for m in everyone}

    def add(self, model, ratio, method, ways, numbers, **facts):
        """One row: a way per seed."""
        found = [model.rebuilt(way) for way in ways]
        after = [scores(tensors, self.documents) for tensors, _, _ in found]
        after = {domain: np.concatenate([s[domain] for s in after]) for domain in DOMAINS}
        d, nmse = difference(after, self.before[model.name]), [error for _, error, _ in found]
        self.rows.append({"checkpoint": model.name, "ratio": ratio, "method": method, "nmse": float(np.mean(nmse)), "nmse_per_seed": nmse,
                          "white_noise": max(0.0, 1 - 1 / ratio), "effective_ratio": numbers and effective(ratio, sum(m.weights for m in self.family), numbers),
                          "before": summary(self.before[model.name]), "test": summary(after), "per_seed": pooled(after).tolist(),
                          "difference": {**d._asdict(), "se": d.se}, **facts})
        self.bar.update()
        return [errors for _, _, errors in found]

    def measure(self, ratio, models):
        """All methods at one ratio, on the family (Table 8) or on unseen models (Table 7)."""
        parents = [m.parent for m in self.family]
        trained = [train_vae(parents, VAEConfig(ratio=ratio), seed=seed) for seed in range(self.seeds if ratio > 1 else 1)]
        config, numbers = trained[0][0].config, sum(p.numel() for p in trained[0][0].parameters())
        stages = [stage for _, stage in trained]
        C, Z, r = config.chunk, config.latent, config.true_ratio
        fit = {length: torch.cat([m.chunks(length) for m in self.family]) for length in (C, LONG)}
        bases = {length: pca(fit_NC, round(length / r)) for length, fit_NC in fit.items()} if r > 1 else {}
        for model in models:
            errors = self.add(model, r, "VAE", [through_codec(Codec(vae)) for vae, _ in trained], numbers, stages=stages)
            if r <= 1:
                continue
            self.add(model, r, "noise", [through_noise(errors[0], seed) for seed in range(self.seeds)], None)
            for length, name in ((C, "PCA"), (LONG, f"PCA, c = {LONG}")):
                self.add(model, r, name, [through_pca(*bases[length])], bases[length][1].numel() + length)
            self.add(model, r, "PCA of its own", [through_pca(*pca(model.chunks(C), Z))], (Z + 1) * C)


def measure_codec(table, models, seeds=3, documents=None, quick=False, quiet=False):
    """The records of Table 7 or 8."""
    began = time.perf_counter()
    with tqdm(desc=f"table {table}", unit="row", disable=quiet) as bar:
        sheet = Sheet(models, 1 if quick else seeds, 8 if quick else documents, bar)
        for ratio in (1.0, 2.0) if quick else RATIOS:
            sheet.measure(ratio, sheet.family if table == "8" else sheet.unseen)
    facts = {"table": table, "family": FAMILY, "documents": sheet.before[FAMILY[0]][DOMAINS[0]].shape[1], "seconds_of_table": round(time.perf_counter() - began),
             "schedule": vars(Schedule()), "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    return [row | facts for row in sheet.rows]


def print_codec(table, rows):
    title = "weights that the codec was fitted on" if table == "8" else f"weights that the codec of {' and '.join(FAMILY)} has not seen"
    print(f"\nTable {table} in miniature, {title}: NMSE, bits per byte on test text and what the code cost, ± standard error")
    print(f"{'r':>7} {'1 - 1/r':>8}  {'checkpoint':<12}{'method':<16}{'NMSE':>10}{'effective r':>13}{'bits':>9}{'minus before':>20}")
    for row in rows:
        d, orient = row["difference"], PAPER[table].get(row["ratio"], "") if row["method"] == "VAE" else ""
        print(f"{row['ratio']:>7.4g} {row['white_noise']:>8.3f}  {row['checkpoint']:<12}{row['method']:<16}{row['nmse']:>10.2e}{'' if row['effective_ratio'] is None else format(row['effective_ratio'], '.2f'):>13}"
              f"{row['test']['pooled']:>9.4f}{d['mean']:>+12.4f} ± {d['se']:.4f}" + (f"   paper: {orient}" if orient else ""))
