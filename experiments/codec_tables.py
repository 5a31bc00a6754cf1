"""Tables 7 and 8 in miniature: what a code keeps of the weights, on what it was fitted
on and else.

    python experiments/paper_tables.py --table 7 --table 8

In:    a family the codec is fitted on (code, prose), and what it has never seen:
       another expert of the same base (arithmetic), another seed (base-seed2), another
       size (large).
Out:   per compression ratio r, checkpoint and method: NMSE (squared relative error),
       bits per byte of the decoded model, the paired difference to the model as it was;
       one row each.

       VAE               from the principal directions, then stage 2; all seeds in a row
       PCA               the best linear code of C weights into C / r numbers, fitted on
                         the family
       PCA of its own    the same, fitted on the checkpoint itself: the best that one
                         basis can do
       PCA, c = 1024     chunks as long as a window: has as many numbers as the family
                         has weights
       noise             Gaussian, of the VAE's NMSE per tensor: is the VAE's error
                         kinder?

       Beside r the white-noise line 1 - 1/r, what PCA would lose if weights were noise,
       and the effective ratio, weights / (latent numbers + the codec's own numbers).
Paper: Sec. 5.4, Table 7 (a VAE of Gemma-3-4B on other models), Table 8 (beside PCA).
Previous: merging_tables.py. Next: curriculum.py.
"""
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from chunking import Checkpoint, chunk, is_selected, measure, standardise, unstandardise
from evaluate import DOMAINS
from lsmerge import Codec
from records import machine
from scores import QUICK, difference, pooled, score, stacked, summary
from train import Schedule, train_vae
from vae import VAEConfig

FAMILY = ("code", "prose")
UNSEEN = ("arithmetic", "base-seed2", "large")
# 64 / 63: one number less per chunk, the least that compresses.
RATIOS = (0.5, 1.0, 64 / 63, 1.25, 1.6, 2.0, 4.0)
LONG = 1024                                             # weights in a window
# Stage 1 has nothing to learn: the streams of this start are exact.
SCHEDULE = Schedule(steps1=0)


def config_of(ratio):
    """The best start there is for a code that compresses: PCA's."""
    return VAEConfig(ratio=ratio, init="pca")


@dataclass(frozen=True)
class Model:
    """A checkpoint with the statistics of its encoded tensors."""
    name: str
    file: Checkpoint
    stats: list

    @classmethod
    def open(cls, path):
        file = Checkpoint(path)
        chosen = filter(is_selected, file.entries.values())
        stats = [measure(file, entry.name) for entry in chosen]
        return cls(Path(path).resolve().stem, file, stats)

    @property
    def parent(self):
        return self.file, self.stats

    @property
    def weights(self):
        return sum(stats.numel for stats in self.stats)

    def tensors(self):
        return {name: self.file.read_tensor(name) for name in self.file.entries}

    def chunks(self, C, every=1):
        """All chunks of all encoded tensors, standardised, (N, C) float64, or one in
        `every` of each tensor; padding as zeros, as the codec sees it."""
        parts = []
        for stats in self.stats:
            x_L = standardise(self.file.read(stats.name), stats)
            parts.append(chunk(x_L, C)[0][::every].double())
        return torch.cat(parts)

    def rebuilt(self, way):
        """(tensors, NMSE, NMSE per tensor) after each encoded tensor went `way`, a
        function (its weights in float64, stats) -> others."""
        tensors = self.tensors()
        errors = {}
        for stats in self.stats:
            weights_L = self.file.read(stats.name).double()
            decoded_L = way(weights_L, stats).double()
            error_L = (decoded_L - weights_L) / stats.scale
            errors[stats.name] = error_L.square().mean().item()
            tensors[stats.name] = decoded_L.to(stats.dtype).reshape(stats.shape)
        nmse = sum(errors[stats.name] * stats.numel
                   for stats in self.stats) / self.weights
        return tensors, nmse, errors


def pca(fit_NC, Z):
    """(mean, the Z leading principal directions (C, Z)): the best linear code
    (Eckart-Young)."""
    mean_C = fit_NC.mean(0)
    spread_CC = (fit_NC - mean_C).T @ (fit_NC - mean_C)
    directions_CC = torch.linalg.eigh(spread_CC).eigenvectors       # smallest first
    return mean_C, directions_CC[:, max(0, fit_NC.shape[1] - Z):]


# --- Ways through a code: callables for Model.rebuilt ---------------------------------
@dataclass
class ThroughPCA:
    mean_C: torch.Tensor
    directions_CZ: torch.Tensor

    def __call__(self, weights_L, stats):
        chunks_NC, _ = chunk(standardise(weights_L, stats), len(self.mean_C))
        z_NZ = (chunks_NC.double() - self.mean_C) @ self.directions_CZ
        decoded_NC = self.mean_C + z_NZ @ self.directions_CZ.T
        return unstandardise(decoded_NC.reshape(-1)[:stats.numel], stats)


@dataclass
class ThroughCodec:
    codec: Codec

    def __call__(self, weights_L, stats):
        return self.codec.decode(self.codec.encode(weights_L, stats), stats,
                                 stats.numel)


class ThroughNoise:
    """errors: tensor name -> NMSE that its noise is to have."""

    def __init__(self, errors, seed):
        self.errors = errors
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, weights_L, stats):
        noise_L = torch.randn(stats.numel, generator=self.generator,
                              dtype=torch.float64)
        return weights_L + stats.scale * self.errors[stats.name] ** 0.5 * noise_L


# --- Rows -----------------------------------------------------------------------------
def effective(ratio, weights, numbers):
    """Weights per number that has to be kept, the codec's own included; None without
    those."""
    return numbers and weights / (weights / ratio + numbers)


class Sheet:
    """Everything measured so far; `before` holds each model's own scores."""

    def __init__(self, family, models, seeds, documents, bar):
        self.family = family
        self.models = models
        self.seeds = seeds
        self.documents = documents
        self.bar = bar
        self.rows = []
        self.before = {}
        for model in models:
            self.before[model.name] = score(model.tensors(), documents=documents)

    def add(self, model, ratio, method, ways, numbers, **facts):
        """One row: a way per seed. `numbers`: those of the codec itself, None where it
        has none. Returns the errors of each way."""
        found = [model.rebuilt(way) for way in ways]
        after = stacked([score(tensors, documents=self.documents) for tensors, _,
                         _ in found])
        before = self.before[model.name]
        nmse = [error for _, error, _ in found]
        fitted = sum(m.weights for m in self.family)
        self.rows.append({
            "checkpoint": model.name, "ratio": ratio, "method": method,
            "nmse": float(np.mean(nmse)), "nmse_per_seed": nmse,
            "white_noise": max(0.0, 1 - 1 / ratio),
            "effective_ratio": effective(ratio, fitted, numbers),
            "before": summary(before), "test": summary(after),
            "per_seed": pooled(after).tolist(),
            "difference": difference(after, before).record(), **facts})
        self.bar.update()
        return [errors for _, _, errors in found]

    def measure(self, ratio):
        """All methods at one ratio."""
        vaes = []
        stages = []
        for seed in range(self.seeds if ratio > 1 else 1):
            schedule = Schedule(**asdict(SCHEDULE) | {"seed": seed})
            parents = [model.parent for model in self.family]
            vae, records = train_vae(parents, config_of(ratio), schedule)
            vaes.append(vae)
            stages.append(records)
        C = vaes[0].config.chunk
        Z = vaes[0].config.latent
        r = vaes[0].config.true_ratio
        numbers = sum(p.numel() for p in vaes[0].parameters())
        bases = {}
        for length in (C, LONG) if r > 1 else ():
            fit_NC = torch.cat([model.chunks(length) for model in self.family])
            bases[length] = pca(fit_NC, round(length / r))
        for model in self.models:
            ways = [ThroughCodec(Codec(vae)) for vae in vaes]
            errors = self.add(model, r, "VAE", ways, numbers, stages=stages)
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
    """The rows of Table 7 or 8."""
    began = time.perf_counter()
    family = [Model.open(models / f"{name}.safetensors") for name in FAMILY]
    judged = family
    if table == "7":
        judged = [Model.open(models / f"{name}.safetensors") for name in UNSEEN]
    if quick:
        seeds = 1
        documents = QUICK
    with tqdm(desc=f"table {table}", unit="row", disable=quiet) as bar:
        sheet = Sheet(family, judged, seeds, documents, bar)
        for ratio in (1.0, 2.0) if quick else RATIOS:
            sheet.measure(ratio)
    before = sheet.before[judged[0].name]
    facts = {"family": FAMILY, "documents": before[DOMAINS[0]].shape[1],
             "seconds_of_table": round(time.perf_counter() - began),
             "schedule": asdict(SCHEDULE), **machine()}
    return [row | facts for row in sheet.rows]
