"""Which parts of the curriculum earn their place? One change at a time, at equal
compute.

    python experiments/paper_tables.py --ablation curriculum --seeds 3 --documents 48

In:    the experts code and prose, on which every variant of the codec is trained;
       arithmetic (another expert of their base) and base-seed2 (another seed), which it
       never sees.
Out:   per variant: NMSE and decoded bits per byte minus the model's own, on seen and
       unseen checkpoints; KL per latent number; seconds. It is judged by decoded bits
       on unseen checkpoints, paired per document, against its group's first row.
       "One stage": the KL counts and codes are sampled from the first step of the
       random network, for as many steps as both stages have, at the first one's rate.
       (At r > 1 the bottleneck starts in the principal directions of the untrained
       network.)
Equal compute: the same number of steps of the same number of chunks through the same
network.
Paper: abstract and Sec. 3.2: two stages, and the collapse without them; "distilling to
       a compact code", here: stage 2 also matches stage 1's output. ours: everything
       else.
Previous: codec_tables.py. Next: real_model.py.
"""
import contextlib
import copy
import time
from unittest import mock

import torch
from tqdm import tqdm

import train
from codec_tables import FAMILY, Model, ThroughCodec
from evaluate import DOMAINS
from lsmerge import Codec
from records import machine
from scores import QUICK, difference, score, stacked, summary
from train import LEARNING_RATES, STAGE2_RATE, Schedule
from vae import VAEConfig, masked_mse, sample, vae_loss

UNSEEN = ("arithmetic", "base-seed2")
STEPS1 = Schedule.steps1
STEPS2 = Schedule.steps2
CHUNKS = 1024                   # per step, as train.py has them


# --- Distillation, which the core does not offer --------------------------------------
class Distillation:
    """train.stage_loss; in stage 2 also half the squared distance to stage 1's
    output."""

    def __init__(self):
        self.plain = train.stage_loss
        self.teacher = None

    def __call__(self, vae, stage, x_BTC, real_BTC, noise):
        if stage == 1:
            return self.plain(vae, stage, x_BTC, real_BTC, noise)
        # the first batch: the network as stage 1 left it
        if self.teacher is None:
            self.teacher = copy.deepcopy(vae).requires_grad_(False)
        real_BT = real_BTC.any(dim=-1)
        posterior = vae.encode(x_BTC, real_BT)
        decoded_BTC = vae.decode(sample(posterior, noise), real_BT)
        loss = vae_loss(decoded_BTC, posterior, x_BTC, real_BTC, vae.config.beta,
                        vae.config.true_ratio)
        with torch.no_grad():
            taught_BTC = stage1_output(self.teacher, x_BTC, real_BT)
        distance = masked_mse(decoded_BTC, taught_BTC, real_BTC)
        return loss._replace(total=loss.total + distance / 2)


def stage1_output(vae, x_BTC, real_BT):
    """What stage 1 has decoded: at r > 1 past the bottleneck."""
    if vae.config.true_ratio > 1:
        return vae.decode_stream(vae.encode_stream(x_BTC, real_BT), real_BT)
    return vae.decode(vae.encode_mean(x_BTC, real_BT), real_BT)


# --- Variants -------------------------------------------------------------------------
def two_stages(tokens=16, distil=False, **config):
    """(configuration, schedule, whether to distil). The start is the random one, the
    paper's."""
    schedule = {"steps1": STEPS1, "steps2": STEPS2, "batch": CHUNKS // tokens}
    return {"tokens": tokens, **config}, schedule, distil


def one_stage(**config):
    rate = LEARNING_RATES["random"]
    if config.get("ratio", 1.0) <= 1:
        # so that the only stage runs at the first one's
        rate = rate / STAGE2_RATE
    return config, {"steps1": 0, "steps2": STEPS1 + STEPS2, "lr": rate}, False


def from_pca(steps2=STEPS2, **config):
    """From the best linear code. Its streams are exact: stage 1 has nothing to
    learn."""
    return {"init": "pca", **config}, {"steps1": 0, "steps2": steps2}, False


# group -> name -> variant; the first of a group is what the others are held against.
VARIANTS = {
    "r = 1": {
        "two stages": two_stages(), "one stage": one_stage(),
        "distillation": two_stages(distil=True), "windows of 1": two_stages(tokens=1),
        "windows of 64": two_stages(tokens=64), "start from PCA": from_pca()},
    "r = 1, beta 1e-2": {"two stages": two_stages(beta=1e-2),
                         "one stage": one_stage(beta=1e-2)},
    "r = 1, beta 1": {"two stages": two_stages(beta=1.0),
                      "one stage": one_stage(beta=1.0)},
    "r = 2": {
        "start from PCA": from_pca(ratio=2.0), "not trained": from_pca(0, ratio=2.0),
        "two stages": two_stages(ratio=2.0), "one stage": one_stage(ratio=2.0),
        "distillation": two_stages(ratio=2.0, distil=True)}}


# --- Measuring ------------------------------------------------------------------------
def run_variant(variant, seed, models, before, documents):
    """Train one codec. Returns its figures, and the scores of each decoded model."""
    config, schedule, distil = variant
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if distil:
            stack.enter_context(mock.patch.object(train, "stage_loss", Distillation()))
        vae, stages = train.train_vae([models[name].parent for name in FAMILY],
                                      VAEConfig(**config),
                                      Schedule(**schedule, seed=seed))
    seconds = time.perf_counter() - began
    way = ThroughCodec(Codec(vae))
    checkpoints = {}
    scores = {}
    for name, model in models.items():
        tensors, nmse, _ = model.rebuilt(way)
        scores[name] = score(tensors, documents=documents)
        d = difference(scores[name], before[name])
        checkpoints[name] = {"nmse": nmse, "test": summary(scores[name]),
                             "difference": d.mean,
                             "se": d.se}
    return {"seconds": seconds, "stages": stages, "checkpoints": checkpoints}, scores


def unseen_scores(scores):
    """All seeds' decoded bits on unseen checkpoints: "checkpoint, domain" -> (S,
    documents)."""
    joined = {}
    for name in UNSEEN:
        for domain, values in stacked([one[name] for one in scores]).items():
            joined[f"{name}, {domain}"] = values
    return joined


def compare(ours, other):
    """Ours minus the other's: means over checkpoints, errors from texts and seeds."""
    ours = unseen_scores(ours)
    return difference(ours, unseen_scores(other), tuple(ours))


def measure_group(group, members, seeds, models, before, documents, bar):
    """The rows of one group; the first member is what all are held against."""
    rows = []
    first = None
    for name, variant in members.items():
        runs = []
        scores = []
        for seed in range(seeds):
            figures, found = run_variant(variant, seed, models, before, documents)
            runs.append(figures)
            scores.append(found)
            bar.update()
        first = first or scores
        config, schedule, distil = variant
        rows.append({"group": group, "variant": name, "config": config,
                     "schedule": schedule,
                     "distillation": distil,
                     "difference": compare(scores, first).record(),
                     "runs": runs, "documents": before[FAMILY[0]][DOMAINS[0]].shape[1],
                     **machine()})
    return rows


def measure_ablation(models, seeds=3, documents=None, quick=False, quiet=False):
    """The rows of one group after another: per variant its seeds' figures, and how it
    does against the first of its group."""
    groups = VARIANTS
    if quick:
        seeds = 1
        documents = QUICK
        groups = {"r = 2": dict(list(VARIANTS["r = 2"].items())[:2])}
    models = {name: Model.open(models / f"{name}.safetensors")
              for name in (*FAMILY, *UNSEEN)}
    before = {name: score(model.tensors(), documents=documents) for name,
              model in models.items()}
    total = seeds * sum(len(members) for members in groups.values())
    with tqdm(total=total, desc="ablation", disable=quiet) as bar:
        for group, members in groups.items():
            yield measure_group(group, members, seeds, models, before, documents, bar)
