"""Tables 7 and 8 in miniature: what a code keeps of the weights, on what it was fitted on and else.

    python experiments/paper_tables.py --table 7 --table 8

In:    a family the codec is fitted on (code, prose), and what it has never seen: another expert of
       the same base (arithmetic), another seed (base-seed2), another size (large).
Out:   per compression ratio r, checkpoint and method: NMSE (squared relative error), bits per byte
       of the decoded model, the paired difference to the model as it was; one record each.

       VAE               as train.py makes it, warm start and curriculum; one row per seed
       PCA               the best linear code of C weights into C / r numbers, fitted on the family
       PCA of its own    the same, fitted on the checkpoint itself: the best that one basis can do
       PCA, c = 1024     chunks as long as a window: has as many numbers as the family has weights
       noise             Gaussian, of the VAE's NMSE per tensor: is its error kinder than noise?

       Beside r the white-noise line 1 - 1/r, what PCA would lose if weights were noise, and the
       effective ratio, weights / (latent numbers + the codec's own numbers).
Paper: Sec. 5.4, Table 7 (a VAE of Gemma-3-4B on other models), Table 8 (beside PCA).
ours:  one neck for all tensors. The records of commit 7a067b4 are of a VAE with a neck of its own
       per tensor (`VAEConfig.necks`), which kept more of the family than PCA at every r > 1, and
       cannot be run any more.
Previous: merging_tables.py. Next: curriculum.py.
"""
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from chunking import Checkpoint, chunk, is_selected, measure, standardise, unstandardise
from evaluate import DOMAINS
from lsmerge import Codec
from scores import QUICK, difference, machine, pooled, score, stacked, summary
from train import Schedule, train_vae
from vae import VAEConfig

FAMILY = ("code", "prose")
UNSEEN = ("arithmetic", "base-seed2", "large")
# 64 / 63: one number less per chunk, the least that compresses.
RATIOS = (0.5, 1.0, 64 / 63, 1.25, 1.6, 2.0, 4.0)
LONG = 1024                                             # weights in a window
# The paper's MMLU (%), for orientation: Table 8, Gemma-3-1B, 41.44 before; Table 7, the same model
# by a VAE of another, 40.76 before.
PAPER = {"8": {1.6: "PCA 25.5, VAE 39.9", 2.0: "PCA 24.1, VAE 39.8", 4.0: "PCA 24.1, VAE 39.8"},
         "7": {1.6: "VAE 40.0", 4.0: "VAE 25.0"}}


@dataclass(frozen=True)
class Model:
    """A checkpoint with the statistics of its encoded tensors."""
    name: str
    file: Checkpoint
    slots: list

    @classmethod
    def open(cls, path):
        file = Checkpoint(path)
        chosen = [entry.name for entry in file.entries.values() if is_selected(entry)]
        return cls(Path(path).resolve().stem, file, [measure(file, name) for name in chosen])

    @property
    def parent(self):
        return self.file, self.slots

    @property
    def weights(self):
        return sum(slot.numel for slot in self.slots)

    def tensors(self):
        return {name: self.file.read_tensor(name) for name in self.file.entries}

    def chunks(self, C):
        """All chunks of all encoded tensors, standardised, (N, C) float64; padding as zeros, as the
        codec sees it."""
        parts = [standardise(self.file.read(slot.name), slot) for slot in self.slots]
        return torch.cat([chunk(part, C)[0] for part in parts]).double()

    def rebuilt(self, way):
        """(tensors, NMSE, NMSE per tensor) after each encoded tensor went `way`, a function
        (its weights in float64, slot) -> others."""
        tensors, errors = self.tensors(), {}
        for slot in self.slots:
            weights_L = self.file.read(slot.name).double()
            decoded_L = way(weights_L, slot).double()
            errors[slot.name] = ((decoded_L - weights_L) / slot.scale).square().mean().item()
            tensors[slot.name] = decoded_L.to(slot.dtype).reshape(slot.shape)
        nmse = sum(errors[slot.name] * slot.numel for slot in self.slots) / self.weights
        return tensors, nmse, errors


def pca(fit_NC, Z):
    """(mean, the Z leading principal directions (C, Z)): the best linear code (Eckart-Young)."""
    mean_C = fit_NC.mean(0)
    spread_CC = (fit_NC - mean_C).T @ (fit_NC - mean_C)
    return mean_C, torch.linalg.eigh(spread_CC).eigenvectors[:, max(0, fit_NC.shape[1] - Z):]


# --- Ways through a code: callables for Model.rebuilt ---------------------------------------------
@dataclass
class ThroughPCA:
    mean_C: torch.Tensor
    directions_CZ: torch.Tensor

    def __call__(self, weights_L, slot):
        chunks_NC, _ = chunk(standardise(weights_L, slot), len(self.mean_C))
        z_NZ = (chunks_NC.double() - self.mean_C) @ self.directions_CZ
        decoded_NC = self.mean_C + z_NZ @ self.directions_CZ.T
        return unstandardise(decoded_NC.reshape(-1)[:slot.numel], slot)


@dataclass
class ThroughCodec:
    codec: Codec

    def __call__(self, weights_L, slot):
        return self.codec.decode(self.codec.encode(weights_L, slot), slot, slot.numel)


class ThroughNoise:
    """errors: tensor name -> NMSE that its noise is to have."""

    def __init__(self, errors, seed):
        self.errors, self.generator = errors, torch.Generator().manual_seed(seed)

    def __call__(self, weights_L, slot):
        noise_L = torch.randn(slot.numel, generator=self.generator, dtype=torch.float64)
        return weights_L + slot.scale * self.errors[slot.name] ** 0.5 * noise_L


# --- Rows -----------------------------------------------------------------------------------------
def effective(ratio, weights, numbers):
    """Weights per number that has to be kept, the codec's own included."""
    return weights / (weights / ratio + numbers)


class Sheet:
    """Everything measured so far; `before` holds each model's own scores."""

    def __init__(self, models, seeds, documents, bar):
        self.family, self.unseen = ([Model.open(models / f"{name}.safetensors") for name in names]
                                    for names in (FAMILY, UNSEEN))
        self.seeds, self.documents, self.bar, self.rows = seeds, documents, bar, []
        self.before = {model.name: score(model.tensors(), documents=documents)
                       for model in (*self.family, *self.unseen)}

    def add(self, model, ratio, method, ways, numbers, **facts):
        """One row: a way per seed. `numbers`: those of the codec itself, None where it has none."""
        found = [model.rebuilt(way) for way in ways]
        after = stacked([score(tensors, documents=self.documents) for tensors, _, _ in found])
        before, nmse = self.before[model.name], [error for _, error, _ in found]
        fitted = sum(m.weights for m in self.family)
        self.rows.append({
            "checkpoint": model.name, "ratio": ratio, "method": method,
            "nmse": float(np.mean(nmse)), "nmse_per_seed": nmse,
            "white_noise": max(0.0, 1 - 1 / ratio),
            "effective_ratio": numbers and effective(ratio, fitted, numbers),
            "before": summary(before), "test": summary(after),
            "per_seed": pooled(after).tolist(), "difference": difference(after, before).record(),
            **facts})
        self.bar.update()
        return [errors for _, _, errors in found]

    def measure(self, ratio, models):
        """All methods at one ratio, on the family (Table 8) or on unseen models (Table 7)."""
        parents = [model.parent for model in self.family]
        trained = [train_vae(parents, VAEConfig(ratio=ratio), Schedule(seed=seed))
                   for seed in range(self.seeds if ratio > 1 else 1)]
        vaes, stages = zip(*trained)
        C, Z, r = vaes[0].config.chunk, vaes[0].config.latent, vaes[0].config.true_ratio
        numbers = sum(p.numel() for p in vaes[0].parameters())
        bases = {}
        for length in (C, LONG) if r > 1 else ():
            fit_NC = torch.cat([model.chunks(length) for model in self.family])
            bases[length] = pca(fit_NC, round(length / r))
        for model in models:
            errors = self.add(model, r, "VAE", [ThroughCodec(Codec(vae)) for vae in vaes], numbers,
                              stages=list(stages))
            if r > 1:
                noises = [ThroughNoise(errors[0], seed) for seed in range(self.seeds)]
                self.add(model, r, "noise", noises, None)
                for length, basis in bases.items():
                    name = "PCA" if length == C else f"PCA, c = {length}"
                    kept = basis[1].numel() + length
                    self.add(model, r, name, [ThroughPCA(*basis)], kept)
                own = ThroughPCA(*pca(model.chunks(C), Z))
                self.add(model, r, "PCA of its own", [own], (Z + 1) * C)


def measure_codec(table, models, seeds=3, documents=None, quick=False, quiet=False):
    """The records of Table 7 or 8."""
    began = time.perf_counter()
    with tqdm(desc=f"table {table}", unit="row", disable=quiet) as bar:
        sheet = Sheet(models, 1 if quick else seeds, QUICK if quick else documents, bar)
        for ratio in (1.0, 2.0) if quick else RATIOS:
            sheet.measure(ratio, sheet.family if table == "8" else sheet.unseen)
    facts = {"table": table, "family": FAMILY,
             "documents": sheet.before[FAMILY[0]][DOMAINS[0]].shape[1],
             "seconds_of_table": round(time.perf_counter() - began), "schedule": vars(Schedule()),
             **machine()}
    return [row | facts for row in sheet.rows]


def print_codec(table, rows):
    title = ("weights that the codec was fitted on" if table == "8" else
             f"weights that the codec of {' and '.join(FAMILY)} has not seen")
    print(f"\nTable {table} in miniature, {title}: NMSE, bits per byte on test text and what the "
          "code cost, ± standard error")
    print(f"{'r':>7} {'1 - 1/r':>8}  {'checkpoint':<12}{'method':<16}{'NMSE':>10}"
          f"{'effective r':>13}{'bits':>9}{'minus before':>20}")
    for row in rows:
        d, effective_ratio = row["difference"], row["effective_ratio"]
        orient = PAPER[table].get(row["ratio"], "") if row["method"] == "VAE" else ""
        print(f"{row['ratio']:>7.4g} {row['white_noise']:>8.3f}  {row['checkpoint']:<12}"
              f"{row['method']:<16}{row['nmse']:>10.2e}"
              f"{'' if effective_ratio is None else format(effective_ratio, '.2f'):>13}"
              f"{row['test']['pooled']:>9.4f}{d['mean']:>+12.4f} ± {d['se']:.4f}"
              + (f"   paper: {orient}" if orient else ""))
