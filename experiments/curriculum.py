"""Which parts of the curriculum earn their place? One change at a time, at equal compute.

    python experiments/paper_tables.py --ablation curriculum          # printed from there

In:    the experts code and prose, on which every variant of the codec is trained; arithmetic (another expert of their base)
       and base-seed2 (another seed), which it never sees.
Out:   per variant and seed: NMSE and decoded bits per byte minus the model's own, on seen and unseen checkpoints; KL per latent
       number, active units, posterior sigma; seconds. JSON lines in results/ablation.jsonl.
       "One stage": the KL counts and codes are sampled from the first step of the random network; what stays of the curriculum
       is the rise of beta over the first fifth of the steps, and the neck's start in the network's principal directions.
       A variant is judged by decoded bits on unseen checkpoints, paired per document, against its group's first row.
Equal compute: the same number of steps of the same number of chunks through the same network. Pooling adds matrices of its
       own; only the warm start ends early, having nothing to learn.
Paper: abstract and Sec. 3.2 (two stages, and the collapse without them). ours: everything else here.
Previous: codec_tables.py. Next: real_model.py.
"""
import contextlib
import dataclasses
import math
import platform
import time
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import lsmerge
import train
from chunking import TensorSlot, scale, unscale
from codec_tables import FAMILY, Model, scores, through_codec
from evaluate import DOMAINS
from lsmerge import Codec
from paper_tables import difference, summary
from train import Schedule
from vae import VAE, Posterior, VAEConfig, kl_divergence, sample

UNSEEN = ("arithmetic", "base-seed2")
STEPS1, STEPS2, BATCH = 400, 200, 32                   # with windows of 16 chunks: 307,200 chunks, six times all there are
RANDOM = dict(init="random"), dict(lr=1e-3, distil=True)    # the paper's start and distillation; its rate (1e-4) learns nothing in these steps


# --- Changes that the core does not offer ------------------------------------------------------------------------------
class RoleSlot(TensorSlot):
    """One neck per role (all q, all up, ...) instead of one per tensor."""
    key = property(lambda self: str(self.place.role))


class PooledVAE(VAE):
    """paper: Sec. 3.2, z in R^{B x z_d}: one code per window. The code's numbers are kept as T rows of Z, so that r and all
    that follows stay as they are, but each depends on the whole window."""

    def __init__(self, config, generator=None):
        super().__init__(config, generator)
        T, D, Z = config.tokens, config.width, config.latent
        self.pool, self.unpool = nn.Linear(T * D, T * Z), nn.Linear(T * Z, T * D)
        for module in (self.pool, self.unpool):
            nn.init.normal_(module.weight, 0, module.in_features ** -0.5, generator=generator)
            nn.init.zeros_(module.bias)

    def encode(self, x_BTC, real_BT=None, place=None):
        h_BTD = self.encode_stream(x_BTC, real_BT)
        flat_BX = (h_BTD if real_BT is None else h_BTD * real_BT[..., None]).flatten(1)
        return Posterior(self.pool(flat_BX).view(*h_BTD.shape[:2], -1), self.neck_logvar(h_BTD))

    def decode(self, z_BTZ, real_BT=None, place=None):
        return self.decode_stream(self.unpool(z_BTZ.flatten(1)).view(*z_BTZ.shape[:2], -1), real_BT)


def huber_loss(vae, teacher, stage, batch, beta, generator, *_):
    """train.stage_loss with Huber's loss (delta = 1 standard deviation) in the place of the squared error / 2."""
    x_BTC, real_BTC, place_B = batch
    real_BT = real_BTC.any(dim=-1)
    error = lambda a, b: F.huber_loss(a[real_BTC], b[real_BTC])
    if stage == 1:
        loss = error(vae.decode_stream(vae.encode_stream(x_BTC, real_BT), real_BT), x_BTC)
        return loss, loss, torch.zeros(())
    posterior = vae.encode(x_BTC, real_BT, place_B)
    decoded_BTC = vae.decode(sample(posterior, generator), real_BT, place_B)
    with torch.no_grad():
        taught_BTC = x_BTC if teacher is None else teacher.decode_stream(teacher.encode_stream(x_BTC, real_BT), real_BT)
    kl, taught = kl_divergence(posterior, real_BT), 0.0 if teacher is None else error(decoded_BTC, taught_BTC)
    loss = error(decoded_BTC, x_BTC)
    return loss + taught + beta / vae.config.true_ratio * kl, loss, kl


SPREAD = 0.623                                         # standard deviation of sign(x) log(1 + |x|) for x ~ N(0, 1)
def companded(flat_L, slot):
    x = scale(flat_L, slot)
    return x.sign() * x.abs().log1p() / SPREAD


def expanded(flat_L, slot):
    y = flat_L.double() * SPREAD
    return unscale(y.sign() * y.abs().clamp(max=20).expm1(), slot)


@contextlib.contextmanager
def changed(change):
    """The core with one of its parts replaced, for the time of a training and of the codec's use after it."""
    parts = {"huber": [(train, "stage_loss", huber_loss)], "pooled": [(train, "VAE", PooledVAE)],
             "companding": [(train, "scale", companded), (lsmerge, "scale", companded), (lsmerge, "unscale", expanded)]}
    with contextlib.ExitStack() as stack:
        for where, name, what in parts.get(change, []):
            stack.enter_context(mock.patch.object(where, name, what))
        yield


def slots_of(model, change):
    """The statistics that a variant goes by."""
    if change == "one scale":
        count = model.weights
        mean = sum(s.mean * s.numel for s in model.slots) / count
        spread = math.sqrt(sum((s.scale ** 2 + (s.mean - mean) ** 2) * s.numel for s in model.slots) / count)
        return [dataclasses.replace(s, mean=mean, scale=spread) for s in model.slots]
    if change == "role":
        return [RoleSlot(**{f.name: getattr(s, f.name) for f in dataclasses.fields(s)}) for s in model.slots]
    return model.slots


# --- Variants: group -> name -> (configuration, schedule, change); the first of a group is what the others are held against ---
def variants():
    config, schedule = RANDOM
    at = lambda change=None, steps1=STEPS1, steps2=STEPS2, batch=BATCH, distil=True, **more: (
        config | more, schedule | dict(steps1=steps1, steps2=steps2, batch=batch, distil=distil), change)
    windows = {f"windows of {T}": at(tokens=T, batch=16 * BATCH // T) for T in (1, 64)}
    warm = lambda change=None, steps2=STEPS2, batch=BATCH, **more: (dict(ratio=2.0) | more, dict(steps2=steps2, batch=batch), change)
    return {
        "r = 1, random start": {
            "two stages": at(), "one stage": at(steps1=0, steps2=STEPS1 + STEPS2), "no distillation": at(distil=False),
            "one scale for all tensors": at("one scale"), "Huber": at("huber"), "companding": at("companding"), **windows,
            "pooled": at("pooled"), "warm start": ({}, dict(batch=BATCH), None)},
        "r = 1, random start, beta 1e-2": {"two stages": at(beta=1e-2), "one stage": at(steps1=0, steps2=STEPS1 + STEPS2, beta=1e-2)},
        "r = 1, random start, beta 1": {"two stages": at(beta=1.0), "one stage": at(steps1=0, steps2=STEPS1 + STEPS2, beta=1.0)},
        "r = 2": {
            "warm start, a neck per tensor": warm(), "a neck per role": warm("role"), "one neck": warm(necks="one"),
            "not trained": warm(steps2=0), "windows of 1": warm(tokens=1, batch=16 * BATCH), "windows of 64": warm(tokens=64, batch=BATCH // 4),
            "companding": warm("companding"), "one scale for all tensors": warm("one scale"),
            "random start": at(ratio=2.0), "random start, no distillation": at(distil=False, ratio=2.0), "random start, one neck": at(ratio=2.0, necks="one"),
            "random start, one stage": at(steps1=0, steps2=STEPS1 + STEPS2, ratio=2.0), "random start, pooled": at("pooled", ratio=2.0)},
        "r = 1/2, random start": {"two stages": at(ratio=0.5)}}


def run_variant(variant, seed, models, before, documents):
    """Train one codec; its figures and, per checkpoint, the scores of the decoded model."""
    config, schedule, change = variant
    found, began = {}, time.perf_counter()
    with changed(change):
        parents = [(models[name].file, slots_of(models[name], change)) for name in FAMILY]
        vae, stages = train.train_vae(parents, VAEConfig(**config), Schedule(**schedule), seed)
        seconds, way = time.perf_counter() - began, through_codec(Codec(vae))
        for name, model in models.items():
            tensors, nmse, _ = dataclasses.replace(model, slots=slots_of(model, change)).rebuilt(way)
            after = scores(tensors, documents)
            d = difference(after, before[name])
            found[name] = {"nmse": nmse, "test": summary(after), "difference": d.mean, "se": d.se, "scores": after}
    return {"seconds": seconds, "stages": stages, "parameters": sum(p.numel() for p in vae.parameters()), "checkpoints": found}


def compare(ours, other):
    """Decoded bits on unseen checkpoints, ours minus the other's: means over checkpoints, errors from texts and seeds."""
    def joined(rows):
        pick = lambda name, domain: np.concatenate([r["checkpoints"][name]["scores"][domain] for r in rows])
        return {f"{name}, {domain}": pick(name, domain) for name in UNSEEN for domain in DOMAINS}
    ours, other = joined(ours), joined(other)
    return difference(ours, other, tuple(ours))


def measure_ablation(models, seeds=3, documents=None, quick=False, quiet=False):
    """One record per variant: its seeds' figures, and how it does against the first of its group."""
    seeds, documents = (1, 8) if quick else (seeds, documents)
    models = {name: Model.open(models / f"{name}.safetensors") for name in (*FAMILY, *UNSEEN)}
    before = {name: scores({n: m.file.read_tensor(n) for n in m.file.entries}, documents) for name, m in models.items()}
    rows, groups = [], {g: dict(list(v.items())[:2]) for g, v in variants().items()} if quick else variants()
    with tqdm(total=seeds * sum(map(len, groups.values())), desc="ablation", disable=quiet) as bar:
        for group, members in groups.items():
            first = None
            for name, variant in members.items():
                runs = []
                for seed in range(seeds):
                    runs.append(run_variant(variant, seed, models, before, documents))
                    bar.update()
                first = first or runs
                d = compare(runs, first)
                rows.append({"group": group, "variant": name, "config": variant[0], "schedule": variant[1], "change": variant[2],
                             "difference": {**d._asdict(), "se": d.se}, "runs": runs, "documents": len(next(iter(before[FAMILY[0]].values()))[0]),
                             "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()})
    for run in (run for row in rows for run in row["runs"]):
        for checkpoint in run["checkpoints"].values():
            del checkpoint["scores"]                       # arrays, and too many of them for a record
    return rows


def print_ablation(rows):
    print("\nAblation of the curriculum: decoded NMSE and bits per byte minus the model's own, means over seeds, on the experts that the codec was\n"
          "trained on and on unseen checkpoints; then against the first row of the group (unseen bits, ± standard error)")
    print(f"{'':<36}{'seen: NMSE':>12}{'bits':>9}{'unseen: NMSE':>14}{'bits':>9}{'KL':>8}{'active':>8}{'sigma':>8}{'seconds':>9}")
    for previous, row in zip([None, *rows], rows):
        mean = lambda pick: float(np.mean([pick(run) for run in row["runs"]]))
        over = lambda names, key: mean(lambda run: np.mean([run["checkpoints"][n][key] for n in names]))
        last, d = (lambda key: mean(lambda run: run["stages"][-1][key])), row["difference"]
        if previous is None or previous["group"] != row["group"]:
            print(row["group"])
        print(f"  {row['variant']:<34}{over(FAMILY, 'nmse'):>12.2e}{over(FAMILY, 'difference'):>+9.3f}{over(UNSEEN, 'nmse'):>14.2e}{over(UNSEEN, 'difference'):>+9.3f}"
              f"{last('kl'):>8.3f}{last('active'):>8.0%}{last('sigma'):>8.3f}{mean(lambda run: run['seconds']):>9.1f}   {d['mean']:+.4f} ± {d['se']:.4f}")
