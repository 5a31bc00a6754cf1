"""Which parts of the curriculum earn their place? One change at a time, at equal compute.

    python experiments/paper_tables.py --ablation curriculum

In:    the experts code and prose, on which every variant of the codec is trained; arithmetic
       (another expert of their base) and base-seed2 (another seed), which it never sees.
Out:   per variant and seed: NMSE and decoded bits per byte minus the model's own, on seen and
       unseen checkpoints; KL per latent number, active units, posterior sigma; seconds. A record
       per variant. It is judged by decoded bits on unseen checkpoints, paired per document,
       against its group's first row.
       "One stage": the KL counts and codes are sampled from the first step of the random network,
       for as many steps as both stages have, at the first one's rate. (At r > 1 the neck starts in
       the principal directions of the untrained network.)
Equal compute: the same number of steps of the same number of chunks through the same network.
       Pooling adds matrices of its own; the warm start ends early, having nothing to learn.
Paper: abstract and Sec. 3.2 (two stages, and the collapse without them). ours: everything else.
       "Distillation" (paper: "distilling to a compact code"): stage 2 also matches stage 1's
       output. Commit 7a067b4 measured it in the core, as part of every random start, and more:
       a neck of its own per tensor or per role (`VAEConfig.necks`). Those records stay in
       results/ablation.jsonl; the variants cannot be run any more.
Previous: codec_tables.py. Next: explore_transfer.py.
"""
import contextlib
import copy
import dataclasses
import math
import time
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import lsmerge
import train
from chunking import standardise, unstandardise
from codec_tables import FAMILY, Model, ThroughCodec
from evaluate import DOMAINS
from lsmerge import Codec
from scores import QUICK, difference, machine, score, stacked, summary
from train import STAGE2_RATE, Schedule
from vae import VAE, Posterior, VAEConfig, kl_divergence, masked_mse, sample, vae_loss

UNSEEN = ("arithmetic", "base-seed2")
STEPS1, STEPS2 = Schedule.steps1, Schedule.steps2
CHUNKS = 512                    # per step: 409,600 in all, eight times as many as there are
SPREAD = 0.623                  # standard deviation of sign(x) log(1 + |x|) for x ~ N(0, 1)


# --- Changes that the core does not offer ---------------------------------------------------------
class PooledVAE(VAE):
    """paper: Sec. 3.2, z in R^{B x z_d}: one code per window. The code's numbers are kept as T rows
    of Z, so that r and all that follows stay as they are, but each depends on the whole window."""

    def __init__(self, config, generator=None):
        super().__init__(config, generator)
        T, D, Z = config.tokens, config.width, config.latent
        self.pool, self.unpool = nn.Linear(T * D, T * Z), nn.Linear(T * Z, T * D)
        for module in (self.pool, self.unpool):
            nn.init.normal_(module.weight, 0, module.in_features ** -0.5, generator=generator)
            nn.init.zeros_(module.bias)

    def encode(self, x_BTC, real_BT=None):
        h_BTD = self.encode_stream(x_BTC, real_BT)
        seen_BTD = h_BTD if real_BT is None else h_BTD * real_BT[..., None]
        mu_BTZ = self.pool(seen_BTD.flatten(1)).view(*h_BTD.shape[:2], -1)
        return Posterior(mu_BTZ, self.neck_logvar(h_BTD))

    def decode(self, z_BTZ, real_BT=None):
        h_BTD = self.unpool(z_BTZ.flatten(1)).view(*z_BTZ.shape[:2], -1)
        return self.decode_stream(h_BTD, real_BT)


def through_streams(vae, x_BTC, real_BT):
    """Stage 1: the network without its neck."""
    return vae.decode_stream(vae.encode_stream(x_BTC, real_BT), real_BT)


def huber_loss(vae, stage, x_BTC, real_BTC, noise):
    """train.stage_loss with Huber's loss (delta = 1 standard deviation), not the squared error."""
    real_BT = real_BTC.any(dim=-1)
    if stage == 1:
        decoded_BTC, kl = through_streams(vae, x_BTC, real_BT), torch.zeros(())
    else:
        posterior = vae.encode(x_BTC, real_BT)
        decoded_BTC = vae.decode(sample(posterior, noise), real_BT)
        kl = kl_divergence(posterior, real_BT)
    loss = F.huber_loss(decoded_BTC[real_BTC], x_BTC[real_BTC])
    return loss + vae.config.beta / vae.config.true_ratio * kl, loss, kl


class Distillation:
    """train.stage_loss; in stage 2 also half the squared distance to stage 1's output."""

    def __init__(self):
        self.plain, self.teacher = train.stage_loss, None

    def __call__(self, vae, stage, x_BTC, real_BTC, noise):
        if stage == 1:
            return self.plain(vae, stage, x_BTC, real_BTC, noise)
        if self.teacher is None:            # at the first batch: the streams as stage 1 left them
            self.teacher = copy.deepcopy(vae).requires_grad_(False)
        real_BT = real_BTC.any(dim=-1)
        posterior = vae.encode(x_BTC, real_BT)
        decoded_BTC = vae.decode(sample(posterior, noise), real_BT)
        loss = vae_loss(decoded_BTC, posterior, x_BTC, real_BTC, vae.config.beta,
                        vae.config.true_ratio)
        with torch.no_grad():
            taught_BTC = through_streams(self.teacher, x_BTC, real_BT)
        return loss._replace(total=loss.total + masked_mse(decoded_BTC, taught_BTC, real_BTC) / 2)


def companded(flat_L, slot):
    """scale, then sign(x) log(1 + |x|), of standard deviation 1 again."""
    x = standardise(flat_L, slot)
    return x.sign() * x.abs().log1p() / SPREAD


def expanded(flat_L, slot):
    """Inverse of companded."""
    y = flat_L * SPREAD
    return unstandardise(y.sign() * y.abs().clamp(max=20).expm1(), slot)


def replacements(change):
    """[(module, name there, what takes its place)]"""
    if change == "huber":
        return [(train, "stage_loss", huber_loss)]
    if change == "distillation":
        return [(train, "stage_loss", Distillation())]
    if change == "pooled":
        return [(train, "VAE", PooledVAE)]
    if change == "companding":
        return [(train, "standardise", companded), (lsmerge, "standardise", companded),
                (lsmerge, "unstandardise", expanded)]
    return []


@contextlib.contextmanager
def changed(change):
    """The core with a part replaced, for the time of a training and of the codec's use after it."""
    with contextlib.ExitStack() as stack:
        for replacement in replacements(change):
            stack.enter_context(mock.patch.object(*replacement))
        yield


def slots_of(model, change):
    """The statistics that a variant goes by: each tensor's own, or one scale for all."""
    if change != "one scale":
        return model.slots
    mean = sum(slot.mean * slot.numel for slot in model.slots) / model.weights
    second = sum((slot.scale ** 2 + (slot.mean - mean) ** 2) * slot.numel for slot in model.slots)
    spread = math.sqrt(second / model.weights)
    return [dataclasses.replace(slot, mean=mean, scale=spread) for slot in model.slots]


# --- Variants -------------------------------------------------------------------------------------
def cold(change=None, stages=2, tokens=16, **config):
    """From the random network, the paper's start. Its rate (1e-4) would learn nothing here."""
    steps = (STEPS1, STEPS2) if stages == 2 else (0, STEPS1 + STEPS2)
    schedule = dict(lr=8e-3, steps1=steps[0], steps2=steps[1], batch=CHUNKS // tokens)
    if stages == 1 and config.get("ratio", 1.0) <= 1:
        schedule["lr"] /= STAGE2_RATE       # so that the only stage runs at the first one's rate
    return dict(init="random", tokens=tokens, **config), schedule, change


def warm(change=None, steps2=STEPS2, tokens=16, **config):
    """From the best linear codec."""
    return dict(tokens=tokens, **config), dict(steps2=steps2, batch=CHUNKS // tokens), change


def variants():
    """group -> name -> (configuration, schedule, change); the first of a group is what the others
    are held against."""
    return {
        "r = 1, random start": {
            "two stages": cold(), "one stage": cold(stages=1),
            "distillation": cold("distillation"), "Huber": cold("huber"),
            "one scale for all tensors": cold("one scale"), "companding": cold("companding"),
            "windows of 1": cold(tokens=1), "windows of 64": cold(tokens=64),
            "pooled": cold("pooled"), "warm start": warm()},
        "r = 1, random start, beta 1e-2": {
            "two stages": cold(beta=1e-2), "one stage": cold(stages=1, beta=1e-2)},
        "r = 1, random start, beta 1": {
            "two stages": cold(beta=1.0), "one stage": cold(stages=1, beta=1.0)},
        "r = 2": {
            "warm start": warm(ratio=2.0), "not trained": warm(steps2=0, ratio=2.0),
            "windows of 1": warm(tokens=1, ratio=2.0),
            "windows of 64": warm(tokens=64, ratio=2.0),
            "companding": warm("companding", ratio=2.0),
            "one scale for all tensors": warm("one scale", ratio=2.0),
            "random start": cold(ratio=2.0),
            "random start, distillation": cold("distillation", ratio=2.0),
            "random start, one stage": cold(stages=1, ratio=2.0),
            "random start, pooled": cold("pooled", ratio=2.0)},
        "r = 1/2, random start": {"two stages": cold(ratio=0.5)}}


# --- Measuring ------------------------------------------------------------------------------------
def run_variant(variant, seed, models, before, documents):
    """Train one codec; its figures and, per checkpoint, the scores of the decoded model."""
    config, schedule, change = variant
    found, began = {}, time.perf_counter()
    with changed(change):
        parents = [(models[name].file, slots_of(models[name], change)) for name in FAMILY]
        vae, stages = train.train_vae(parents, VAEConfig(**config),
                                      Schedule(**schedule, seed=seed))
        seconds, way = time.perf_counter() - began, ThroughCodec(Codec(vae))
        for name, model in models.items():
            as_seen = dataclasses.replace(model, slots=slots_of(model, change))
            tensors, nmse, _ = as_seen.rebuilt(way)
            after = score(tensors, documents=documents)
            d = difference(after, before[name])
            found[name] = {"nmse": nmse, "test": summary(after), "difference": d.mean, "se": d.se,
                           "scores": after}
    return {"seconds": seconds, "stages": stages,
            "parameters": sum(p.numel() for p in vae.parameters()), "checkpoints": found}


def unseen_scores(runs):
    """All seeds' decoded bits on unseen checkpoints: "checkpoint, domain" -> (S, documents)."""
    joined = {}
    for name in UNSEEN:
        scores = stacked([run["checkpoints"][name]["scores"] for run in runs])
        joined |= {f"{name}, {domain}": values for domain, values in scores.items()}
    return joined


def compare(ours, other):
    """Ours minus the other's: means over checkpoints, errors from texts and seeds."""
    ours, other = unseen_scores(ours), unseen_scores(other)
    return difference(ours, other, tuple(ours))


def measure_group(group, members, seeds, models, before, documents, bar):
    """The records of one group; the first member is what all are held against."""
    rows, first = [], None
    for name, variant in members.items():
        runs = []
        for seed in range(seeds):
            runs.append(run_variant(variant, seed, models, before, documents))
            bar.update()
        first = first or runs
        config, schedule, change = variant
        rows.append({"group": group, "variant": name, "config": config, "schedule": schedule,
                     "change": change, "difference": compare(runs, first).record(), "runs": runs,
                     "documents": before[FAMILY[0]][DOMAINS[0]].shape[1], **machine()})
    return rows


def measure_ablation(models, seeds=3, documents=None, quick=False, quiet=False):
    """The records of one group after another: per variant its seeds' figures, and how it does
    against the first of its group."""
    groups = variants()
    if quick:
        seeds, documents = 1, QUICK
        groups = {group: dict(list(members.items())[:2]) for group, members in groups.items()}
    models = {name: Model.open(models / f"{name}.safetensors") for name in (*FAMILY, *UNSEEN)}
    before = {name: score(model.tensors(), documents=documents) for name, model in models.items()}
    with tqdm(total=seeds * sum(map(len, groups.values())), desc="ablation", disable=quiet) as bar:
        for group, members in groups.items():
            rows = measure_group(group, members, seeds, models, before, documents, bar)
            for checkpoint in (c for row in rows for run in row["runs"]
                               for c in run["checkpoints"].values()):
                del checkpoint["scores"]                # arrays, and too many of them for a record
            yield rows


# --- Printing -------------------------------------------------------------------------------------
def mean_over(row, names, key):
    """The mean of a figure over seeds and checkpoints."""
    return float(np.mean([run["checkpoints"][name][key] for run in row["runs"] for name in names]))


def print_ablation(rows):
    print("\nAblation of the curriculum: decoded NMSE and bits per byte minus the model's own, "
          "means over seeds, on the experts that the codec was\ntrained on and on unseen "
          "checkpoints; then against the first row of the group (unseen bits, ± standard error)")
    print(f"{'':<36}{'seen: NMSE':>12}{'bits':>9}{'unseen: NMSE':>14}{'bits':>9}{'KL':>8}"
          f"{'active':>8}{'sigma':>8}{'seconds':>9}")
    group = None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            print(group)
        last = {key: np.mean([run["stages"][-1][key] for run in row["runs"]])
                for key in ("kl", "active", "sigma")}
        seconds, d = np.mean([run["seconds"] for run in row["runs"]]), row["difference"]
        print(f"  {row['variant']:<34}{mean_over(row, FAMILY, 'nmse'):>12.2e}"
              f"{mean_over(row, FAMILY, 'difference'):>+9.3f}"
              f"{mean_over(row, UNSEEN, 'nmse'):>14.2e}"
              f"{mean_over(row, UNSEEN, 'difference'):>+9.3f}"
              f"{last['kl']:>8.3f}{last['active']:>8.0%}{last['sigma']:>8.3f}{seconds:>9.1f}"
              f"   {d['mean']:+.4f} ± {d['se']:.4f}")
