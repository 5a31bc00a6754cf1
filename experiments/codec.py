"""What a code keeps of the weights, on what it was trained on and elsewhere; and how it
is learnt.

    python experiments/codec.py --table 7 --table 8 [--quick]
    python experiments/codec.py --unseen experiments/models/vae.safetensors MODEL ...
    python experiments/codec.py --curves [--paper]      # both stages over seconds
    python experiments/codec.py --learning              # what training finds at r = 1
    python experiments/codec.py --search MODEL ...      # width, blocks, steps

In:    the models of make_models.py; with --unseen and --search any others.
Out:   rows of results/ (table7, table8, vae, curves, learning, search), each written as
       soon as it is measured, and the section.
Paper: Sec. 5.4, Tables 7 and 8; the abstract's two stages.
ours:  the noise of equal size beside a code, the white-noise line, the curves.
Previous: shapes.py. Next: real.py.
"""
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

from compare import (MODELS, QUICK, Claim, collect, command_line, difference,
                     find, grouped, lossless, machine, pm_of, pooled, several, short,
                     stacked, summary, table)
import train
from chunking import (Checkpoint, chunk, is_selected, measure, standardise,
                      unstandardise)
from evaluate import DOMAINS, held_out, score
from lsmerge import Codec
from make_models import VAE_MODELS
from merge import REFERENCE
from train import LEARNING_RATES, STAGE2_RATE, Schedule, train_vae
from vae import VAEConfig

FAMILY = ("code", "prose")      # what the codecs of Tables 7 and 8 are fitted on
UNSEEN = ("arithmetic", "base-seed2", "large")
# 64 / 63: one number less per chunk, the least that compresses.
RATIOS = (1.0, 64 / 63, 1.25, 1.6, 2.0, 4.0)
# From the best start there is for a code that compresses: PCA's, whose streams are
# exact. Stage 1 has nothing to learn.
SCHEDULE = Schedule(steps1=0, steps2=400)


def config_of(ratio):
    return VAEConfig(ratio=ratio, init="pca")


# --- A model and its ways through a code --------------------------------------------
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
        total = 0.0
        for stats in self.stats:
            weights_L = self.file.read(stats.name).double()
            decoded_L = way(weights_L, stats).double()
            error_L = (decoded_L - weights_L) / stats.scale
            errors[stats.name] = error_L.square().mean().item()
            total += errors[stats.name] * stats.numel
            tensors[stats.name] = decoded_L.to(stats.dtype).reshape(stats.shape)
        return tensors, total / self.weights, errors


def small(name):
    """One of the models of make_models.py."""
    return Model.open(MODELS / f"{name}.safetensors")


def pca(fit_NC, Z):
    """(mean, the Z leading principal directions (C, Z)): the best linear code
    (Eckart-Young)."""
    mean_C = fit_NC.mean(0)
    spread_CC = (fit_NC - mean_C).T @ (fit_NC - mean_C)
    directions_CC = torch.linalg.eigh(spread_CC).eigenvectors       # smallest first
    return mean_C, directions_CC[:, fit_NC.shape[1] - Z:]


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
        z_NZ = self.codec.encode(weights_L, stats)
        return self.codec.decode(z_NZ, stats, stats.numel)


class ThroughNoise:
    """errors: {tensor: NMSE that its noise is to have}"""

    def __init__(self, errors, seed):
        self.errors = errors
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, weights_L, stats):
        noise_L = torch.randn(stats.numel, generator=self.generator,
                              dtype=torch.float64)
        return weights_L + stats.scale * self.errors[stats.name] ** 0.5 * noise_L


# --- Tables 7 and 8 -----------------------------------------------------------------
# Per ratio r, checkpoint and method, a row: NMSE (squared relative error), bits per
# byte of the decoded model, and the paired difference to the model as it was.
#   VAE     from the principal directions, then stage 2; all seeds in a row
#   PCA     the best linear code of C weights into C / r numbers, fitted on the family
#   noise   Gaussian, of the VAE's NMSE per tensor: is the VAE's error kinder?
def effective(ratio, weights, numbers):
    """Weights per number that has to be kept, the codec's own numbers included."""
    if numbers is None:
        return None
    return weights / (weights / ratio + numbers)


class Judged:
    """A model, its scores, and what becomes of them through a code."""

    def __init__(self, model, documents):
        self.model = model
        self.documents = documents
        self.before = score(model.tensors(), documents=documents)

    def row(self, ratio, method, ways, effective_ratio):
        """(row, errors per tensor of the first way); a way per seed."""
        scores = []
        nmse = []
        errors = []
        for way in ways:
            tensors, total, each = self.model.rebuilt(way)
            scores.append(score(tensors, documents=self.documents))
            nmse.append(total)
            errors.append(each)
        after = stacked(scores)
        row = {"checkpoint": self.model.name, "ratio": ratio, "method": method,
               "nmse": float(np.mean(nmse)), "nmse_per_seed": nmse,
               "white_noise": max(0.0, 1 - 1 / ratio),
               "effective_ratio": effective_ratio, "before": summary(self.before),
               "test": summary(after), "per_seed": pooled(after).tolist(),
               "difference": difference(after, self.before).record(),
               "documents": after[DOMAINS[0]].shape[1], "family": FAMILY,
               "schedule": asdict(SCHEDULE), **machine()}
        return row, errors[0]


def measure_ratio(ratio, family, judged, seeds):
    """Yields the rows of all methods at one ratio."""
    vaes = []
    stages = []
    parents = [model.parent for model in family]
    for seed in range(seeds if ratio > 1 else 1):
        vae, records = train_vae(parents, config_of(ratio),
                                 replace(SCHEDULE, seed=seed))
        vaes.append(vae)
        stages.append(records)
    config = vaes[0].config
    r = config.true_ratio
    fitted = sum(model.weights for model in family)
    numbers = sum(p.numel() for p in vaes[0].parameters())
    basis = pca(torch.cat([model.chunks(config.chunk) for model in family]),
                min(config.chunk, config.latent))
    for one in judged:
        ways = [ThroughCodec(Codec(vae)) for vae in vaes]
        row, errors = one.row(r, "VAE", ways, effective(r, fitted, numbers))
        yield row | {"stages": stages}
        if r > 1:
            noises = [ThroughNoise(errors, seed) for seed in range(seeds)]
            yield one.row(r, "noise", noises, None)[0]
            kept = basis[1].numel() + config.chunk
            yield one.row(r, "PCA", [ThroughPCA(*basis)], effective(r, fitted, kept))[0]


def measure_table(number, seeds=3, documents=None, quick=False):
    """Yields the rows of Table 7 (models that the codec has not seen) or 8 (its
    own)."""
    if quick:
        seeds = 1
        documents = QUICK
    family = [small(name) for name in FAMILY]
    models = family
    if number == "7":
        models = [small(name) for name in UNSEEN]
    judged = [Judged(model, documents) for model in models]
    for ratio in (1.0, 2.0) if quick else RATIOS:
        yield from measure_ratio(ratio, family, judged, seeds)


def linear_optimum(rows, beta):
    """NMSE of the linear VAE at r = 1 that minimises Eq. 1 on the family's chunks.

    Equation:  per component of variance v: beta^2 / v where v > beta, else v; the mean
               over all components
    Source:    it shrinks a component by 1 - beta / v (Lucas et al. 2019, "Don't blame
               the ELBO!"); the variances are the steps of PCA's NMSE from r to r
    """
    curve = [(0.0, 1.0)]
    for (ratio,), group in grouped(find(rows, method="PCA"), "ratio").items():
        curve.append((1 / ratio, float(np.mean([row["nmse"] for row in group]))))
    curve = [*sorted(curve), (1.0, 0.0)]
    total = 0.0
    for (kept, nmse), (more, less) in zip(curve, curve[1:]):
        share = more - kept
        v = (nmse - less) / share
        total += share * (beta ** 2 / v if v > beta else v)
    return total


def section_codec(rows):
    """Tables 7 and 8 together: what the VAE loses, a column per model."""
    names = list(dict.fromkeys(row["checkpoint"] for row in rows))
    lines = []
    for (ratio,), group in grouped(find(rows, method="VAE"), "ratio").items():
        found = {row["checkpoint"]: row for row in group}
        line = [f"{ratio:.4g}", short(found[names[0]]["nmse"]),
                short(found[names[-1]]["nmse"]), f"{1 - 1 / ratio:.3f}"]
        for name in names:
            d = found[name]["difference"]
            line.append(pm_of(d))
        lines.append(line)
    over = {"PCA": [], "noise": []}
    for row in find(rows, method="VAE"):
        for method, shares in over.items():
            same = find(rows, checkpoint=row["checkpoint"], ratio=row["ratio"],
                        method=method)
            if same and row["ratio"] > 1.2:
                shares.append(same[0]["difference"]["mean"] / row["difference"]["mean"])
    text = ""
    for method, shares in over.items():
        text += (f"At r > 1.2 {method} loses {several(shares, '{:.2f}'.format)} of the "
                 "bits that the VAE loses.\n")
    fitted = [row for row in rows if row["checkpoint"] in FAMILY]
    if fitted:
        text += ("The best linear VAE at r = 1 and beta 1 would have an NMSE of "
                 f"{linear_optimum(fitted, 1.0):.2f} on these weights.\n")
    text += "\n"
    head = ["r", f"NMSE: {names[0]}", names[-1], "1 - 1/r",
            f"bits lost: {names[0]}", *names[1:]]
    return text + table(head, lines)


# --- A trained VAE on any model -----------------------------------------------------
def real_texts(documents):
    """Texts of prose and code, for models with a tokenizer."""
    found = []
    for domain in ("prose", "code"):
        for text in held_out(domain, "test")[:documents]:
            found.append(text.decode(errors="replace"))
    return found


class RealModel:
    """A transformers model whose encoded tensors can be replaced; everything else
    stays."""

    def __init__(self, folder, documents=48):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        self.model = Model.open(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.lm = lm.eval()
        self.tokens = []
        for text in real_texts(documents):
            ids = tokenizer(text, return_tensors="pt").input_ids
            if ids.shape[1] > 1:
                self.tokens.append(ids)
        self.before = self.loss()

    @torch.no_grad()
    def loss(self):
        """Mean nats per token after the first of each text."""
        total = 0.0
        count = 0
        for ids in self.tokens:
            predicted = ids.shape[1] - 1
            total += self.lm(input_ids=ids, labels=ids).loss.item() * predicted
            count += predicted
        return total / count

    def after(self, way):
        """(loss, NMSE, NMSE per tensor) with every encoded tensor sent through a
        code."""
        tensors, nmse, errors = self.model.rebuilt(way)
        for stats in self.model.stats:
            self.lm.get_parameter(stats.name).data.copy_(tensors[stats.name])
        return self.loss(), nmse, errors


def lost_by(path, way):
    """(model, NMSE, NMSE per tensor, loss before, loss after); the losses None where
    the file is no language model that can be judged here."""
    if (Path(path) / "tokenizer.json").exists():
        real = RealModel(path)
        after, nmse, errors = real.after(way)
        return real.model, nmse, errors, real.before, after
    model = Model.open(path)
    tensors, nmse, errors = model.rebuilt(way)
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None or len(embedding) != 256:      # bytes: what evaluate.py scores
        return model, nmse, errors, None, None
    before = summary(score(model.tensors()))["pooled"]
    after = summary(score(tensors))["pooled"]
    return model, nmse, errors, before, after


def measure_unseen(vae, path, dtype):
    """The row of one VAE on one model."""
    began = time.perf_counter()
    codec = Codec.load(vae, dtype=getattr(torch, dtype))
    model, nmse, errors, before, after = lost_by(path, ThroughCodec(codec))
    worst = max(errors, key=errors.get)
    seen = [Path(name).stem for name in codec.record["trained_on"]]
    name = f"of {' and '.join(seen)}"
    if Path(vae).resolve() == Path(REFERENCE).resolve():
        name = "reference"
    return {"vae": name, "model": model.name, "seen": model.name in seen,
            "weights": model.weights, "nmse": nmse,
            "worst": {"name": worst, "nmse": errors[worst]}, "dtype": dtype,
            "loss_before": before, "loss": after,
            "seconds": time.perf_counter() - began, **machine()}


def change_of(row):
    """Of the loss, as a share of it; None where there is none."""
    if row.get("loss") is None or row.get("loss_before") is None:
        return None
    return row["loss"] / row["loss_before"] - 1


def section_unseen(rows):
    lines = []
    for row in find(rows, dtype="float32"):
        change = change_of(row)
        seen = "yes" if row["seen"] else "no"
        lost = "" if change is None else f"{change:+.2%}"
        lines.append([row["vae"], f"`{row['model']}`", seen, f"{row['nmse']:.1e}",
                      f"{row['worst']['nmse']:.1e}", lost])
    text = table(["VAE", "model", "trained on it", "NMSE", "worst tensor",
                  "change of the loss"], lines)
    rounded = [row["nmse"] for row in find(rows, dtype="bfloat16")]
    if rounded:
        text += (f"\nWith products in bfloat16: NMSE {several(rounded)}, their "
                 "rounding.\n")
    return text


# --- Which network for the reference VAE --------------------------------------------
WIDTHS = (64, 96, 128)
DEPTHS = (1, 2)                         # blocks of encoder and decoder each
LENGTHS = ((750, 200), (1500, 1000))    # steps of both stages


def measure_search(paths, widths=WIDTHS, depths=DEPTHS, lengths=LENGTHS):
    """Yields a row per network, schedule and unseen model."""
    family = [small(name) for name in VAE_MODELS]
    unseen = [Model.open(path) for path in paths]
    for steps1, steps2 in lengths:
        for width in widths:
            for blocks in depths:
                config = VAEConfig(width=width, blocks=blocks)
                schedule = Schedule(steps1=steps1, steps2=steps2)
                # Of the processor, not of the clock: other programs do not count.
                began = time.process_time()
                vae, _ = train_vae([model.parent for model in family], config, schedule)
                seconds = time.process_time() - began
                for model in unseen:
                    _, nmse, errors = model.rebuilt(ThroughCodec(Codec(vae)))
                    yield {"width": width, "blocks": blocks, "steps": steps1 + steps2,
                           "model": model.name, "nmse": nmse,
                           "worst": max(errors.values()), "seconds": seconds,
                           "numbers": sum(p.numel() for p in vae.parameters()),
                           "family": VAE_MODELS, **machine()}


def section_search(rows):
    lines = []
    for (steps, width, blocks), group in grouped(rows, "steps", "width",
                                                 "blocks").items():
        nmse = [row["nmse"] for row in group]
        worst = max(row["worst"] for row in group)
        lines.append([width, blocks, steps, f"{group[0]['numbers'] / 1e3:.0f} k",
                      f"{group[0]['seconds']:.0f}", several(nmse, "{:.1e}".format),
                      f"{worst:.1e}"])
    return table(["width", "blocks", "steps", "numbers", "seconds of training",
                  "NMSE on unseen models", "worst tensor"], lines)


# --- Both stages over seconds -------------------------------------------------------
# Somewhat longer than train.py's own, so that the curves have come to their ends.
TWO_STAGES = Schedule(steps1=1000, steps2=400)
STEPS = TWO_STAGES.steps1 + TWO_STAGES.steps2


class Recipe(NamedTuple):
    config: VAEConfig
    schedule: Schedule


# One stage: the KL counts from the first step, for as many steps, at the rate of the
# other's first stage.
ONE_STAGE = Schedule(steps1=0, steps2=STEPS, lr=LEARNING_RATES["random"] / STAGE2_RATE)
RECIPES = {
    "two stages": Recipe(VAEConfig(), TWO_STAGES),
    "one stage": Recipe(VAEConfig(), ONE_STAGE),
    "one stage, beta 1": Recipe(VAEConfig(beta=1.0), ONE_STAGE),
    "two stages, beta 1": Recipe(VAEConfig(beta=1.0), TWO_STAGES),
    "one stage, beta 0.1": Recipe(VAEConfig(beta=0.1), ONE_STAGE),
    "two stages, beta 0.1": Recipe(VAEConfig(beta=0.1), TWO_STAGES)}
# Its network and its rate, for as many steps as one core does in four minutes.
PAPER = {"the paper's configuration": Recipe(
    VAEConfig(chunk=640, width=768, blocks=4, heads=4),
    Schedule(steps1=120, steps2=60, lr=1e-4, batch=16))}


def point(figures):
    """What is kept of a check, to five digits."""
    kept = {}
    for key in ("stage", "step", "seconds", "nmse", "kl"):
        value = figures.get(key)
        kept[key] = float(f"{value:.5g}") if isinstance(value, float) else value
    if figures["stage"] == 1:
        kept["kl"] = None       # it has none
    return kept


def measure_recipe(name, recipe, models, seed):
    """The row of one training: its checks. Seconds count from the start of a stage."""
    schedule = replace(recipe.schedule, seed=seed)
    points = []

    def log(figures):
        # a stage of no steps has no curve
        if figures["stage"] == 2 or schedule.steps1 > 0:
            points.append(point(figures))
    train_vae([model.parent for model in models], recipe.config, schedule, log)
    return {"name": name, "model": " + ".join(model.name for model in models),
            "seed": seed, "points": points, "config": asdict(recipe.config),
            "schedule": asdict(schedule), **machine()}


def measure_curves(seeds=3, paper=False, names=RECIPES):
    """Yields a row per training: recipes in turns, seed by seed, so that load hits all
    alike."""
    models = [small(name) for name in FAMILY]
    for seed in range(seeds):
        for name in names:
            yield measure_recipe(name, RECIPES[name], models, seed)
    for name, recipe in (PAPER if paper else {}).items():
        yield measure_recipe(name, recipe, models, 0)


def shifted(points):
    """(seconds, NMSE, index of stage 2's first point): stage 2 goes on where stage 1
    ended."""
    first = [one for one in points if one["stage"] == 1]
    second = [one for one in points if one["stage"] == 2]
    end = first[-1]["seconds"] if first else 0
    seconds = [one["seconds"] for one in first]
    seconds += [end + one["seconds"] for one in second]
    nmse = [one["nmse"] for one in first + second]
    return seconds, nmse, len(first) if first and second else None


def section_curves(rows):
    lines = []
    for (name,), group in grouped(rows, "name").items():
        ends = [row["points"][-1] for row in group]
        seconds = [shifted(row["points"])[0][-1] for row in group]
        lines.append([name, len(group), several([end["nmse"] for end in ends]),
                      several([end["kl"] for end in ends], "{:.2f}".format),
                      several(seconds, "{:.0f}".format)])
    return table(["recipe", "seeds", "last NMSE", "KL per latent number", "seconds"],
                 lines)


# --- What training finds at r = 1 ---------------------------------------------------
def blocks_share(vae, x_BTC, real_BT):
    """How much the blocks add to the residual stream: the larger of encoder's and
    decoder's |out - in| / |in|."""
    shares = []
    h_BTD = vae.embed(x_BTC)
    z_BTZ = vae.encode_mean(x_BTC, real_BT)
    for blocks, before in ((vae.encoder, h_BTD),
                           (vae.decoder, vae.up(z_BTZ) + vae.mean)):
        added = vae.run(blocks, before, real_BT) - before
        shares.append((added.norm() / before.norm()).item())
    return max(shares)


def nonlinearity(vae, x_BTC):
    """|E((a + b) / 2) - (E(a) + E(b)) / 2| / |E(a)|, a and b the halves of a batch."""
    half = len(x_BTC) // 2
    a_BTC = x_BTC[:half]
    b_BTC = x_BTC[half:2 * half]
    middle = vae.encode_mean((a_BTC + b_BTC) / 2)
    ends = (vae.encode_mean(a_BTC) + vae.encode_mean(b_BTC)) / 2
    return ((middle - ends).norm() / vae.encode_mean(a_BTC).norm()).item()


def measure_learning(width, seed, models, schedule=TWO_STAGES):
    """The row of one training at r = 1: at each check, what the network is like."""
    points = []
    plain = train.validate

    @torch.no_grad()
    def look(vae, windows, stage):
        figures = plain(vae, windows, stage)
        x_BTC, real_BTC = windows.validation
        whole = real_BTC.all(dim=(1, 2))        # windows without padding
        real_BT = real_BTC.any(dim=-1)
        points.append({"stage": stage, "nmse": figures["nmse"],
                       "share": blocks_share(vae, x_BTC, real_BT),
                       "nonlinearity": nonlinearity(vae, x_BTC[whole])})
        return figures

    def log(figures):
        points[-1]["step"] = figures["step"]
    with mock.patch.object(train, "validate", look):
        train_vae([model.parent for model in models], VAEConfig(width=width),
                  replace(schedule, seed=seed), log)
    return {"width": width, "seed": seed, "points": points,
            "schedule": asdict(schedule), **machine()}


def section_learning(rows):
    lines = []
    for row in rows:
        first = row["points"][0]
        last = row["points"][-1]
        cells = [row["width"], row["seed"]]
        for key in ("nmse", "share", "nonlinearity"):
            cells.append(f"{first[key]:.1e} → {last[key]:.1e}")
        lines.append(cells)
    return table(["width", "seed", "NMSE, first → last check",
                  "share that the blocks add", "nonlinearity of the code"], lines)


# --- Claims -------------------------------------------------------------------------
CODES = "Tables 7 and 8: what the codec keeps"


def claims_of_codes(rows):
    for name, r, claim, paper, meaning in (
            ("base-seed2", 1.6, "a VAE serves unseen models at r = 1.6",
             "MMLU 40.8 → 40.0", "all models break, the fitted ones too"),
            ("code", 2.0, "a VAE keeps what it was trained on, r = 2",
             "MMLU 41.4 → 39.8", "")):
        for row in find(rows, checkpoint=name, ratio=r, method="VAE"):
            d = row["difference"]
            yield Claim(claim, paper, f"{pm_of(d)} bits lost",
                        lossless(d["mean"] / row["before"]["pooled"]), CODES, meaning)
    for row in find(rows, checkpoint="code", ratio=4.0, method="PCA"):
        few = row["nmse"] < 0.95 * row["white_noise"]
        yield Claim("weights fill few dimensions", "Fig. 2",
                    f"a quarter of them leaves {row['nmse']:.2f}, of noise "
                    f"{row['white_noise']:.2f}", "holds" if few else "not reproduced",
                    CODES)


def claims(records):
    found = list(claims_of_codes(records["table7"] + records["table8"]))
    ends = {}
    for (name,), group in grouped(records["curves"], "name").items():
        ends[name] = np.mean([row["points"][-1]["nmse"] for row in group])
    if "one stage, beta 1" in ends and "two stages, beta 1" in ends:
        # One stage must lose most of the variance, two less than a quarter.
        one = ends["one stage, beta 1"]
        two = ends["two stages, beta 1"]
        found.append(Claim(
            "one stage collapses, two do not", "abstract",
            f"beta 1: NMSE {one:.2f}, two stages {two:.2f}",
            "holds" if one > 0.5 and two < 0.25 else "not reproduced",
            "Training curves", "stage 2, slow, stays short of Eq. 1's empty optimum"))
    unseen = find(records["vae"], seen=False, dtype="float32")
    changes = [change_of(row) for row in unseen if change_of(row) is not None]
    if changes:
        nmse = max(row["nmse"] for row in unseen)
        found.append(Claim(
            "a VAE serves unseen models at r = 1", "",
            f"NMSE at most {nmse:.1e}, loss {max(changes, key=abs):+.2%}", "ours",
            "The reference VAE", "training finds an exact code by itself"))
    return found


# --- The command --------------------------------------------------------------------
def parse():
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--table", action="append", default=[], choices=("7", "8"))
    add("--unseen", nargs="+", metavar=("VAE", "MODEL"), help="a VAE on any models")
    add("--dtype", nargs="+", default=["float32"], help="of --unseen's products")
    add("--curves", action="store_true")
    add("--paper", action="store_true", help="and the paper's network, with one seed")
    add("--recipe", action="append", choices=RECIPES, help="of --curves (all)")
    add("--learning", action="store_true")
    add("--search", nargs="+", metavar="MODEL", help="unseen models, to judge by")
    add("--seeds", type=int, default=3)
    add("--documents", type=int, help="per domain, at most")
    add("--quick", action="store_true",
        help=f"{QUICK} documents per domain; nothing is kept")
    return parser.parse_args()


def main():
    args = parse()
    for number in args.table:
        rows = measure_table(number, args.seeds, args.documents, args.quick)
        print(section_codec(collect(f"table{number}", rows, args)))
    if args.unseen:
        vae, *models = args.unseen
        rows = (measure_unseen(vae, path, dtype)
                for path in models for dtype in args.dtype)
        print(section_unseen(collect("vae", rows, args)))
    if args.curves:
        rows = measure_curves(args.seeds, args.paper, args.recipe or RECIPES)
        print(section_curves(collect("curves", rows, args)))
    if args.learning:
        models = [small(name) for name in FAMILY]
        rows = (measure_learning(width, seed, models)
                for width in (64, 128) for seed in range(2))
        print(section_learning(collect("learning", rows, args)))
    if args.search:
        print(section_search(collect("search", measure_search(args.search), args)))


if __name__ == "__main__":
    main()
