"""What a code keeps of the weights, on what it was trained on and elsewhere; how two
stages learn it; and what they find. By the commands themselves: train.py makes a VAE,
merge.py --roundtrip sends a model through it.

    python experiments/codec.py --table                 # Tables 7 and 8
    python experiments/codec.py --unseen MODEL ...      # the reference VAE on any model
    python experiments/codec.py --curves                # one stage, two stages
    python experiments/codec.py --linear                # what training finds at r = 1

In:    the models of make_models.py; with --unseen any others.
Out:   rows of results/ (codec, vae, curves, linear), each written as soon as it is
       measured, and the section.
Paper: Sec. 5.4, Tables 7 and 8; Fig. 2; the abstract's two stages.
Previous: shapes.py. Next: real.py.
"""
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from compare import (MODELS, Claim, collect, command_line, difference, find, grouped,
                     lossless, machine, pm_of, printed, several, short, stacked,
                     summary, table)
import merge
import train
from chunking import Checkpoint
from evaluate import DOMAINS, score
from lsmerge import Codec
from train import LEARNING_RATES, STAGE2_RATE
from vae import VAE, VAEConfig, generator_for

FAMILY = ("code", "prose")      # what the codecs are trained on
UNSEEN = ("arithmetic", "base-seed2", "large")
# 64 / 63: one number less per chunk, the least that compresses.
RATIOS = (1.0, 64 / 63, 1.25, 1.6, 2.0, 4.0)
SEEDS = 3
# From the best start there is for a code that compresses: PCA's, whose streams are
# exact. Stage 1 has nothing to learn.
FROM_PCA = ("--init", "pca", "--steps1", 0, "--steps2", 400)


def path_of(name):
    return MODELS / f"{name}.safetensors"


def train_code(folder, models, ratio, seed=0):
    """A VAE file of one compression ratio, by train.py."""
    vae = Path(folder) / "vae.safetensors"
    printed(train.main, *models, "-o", vae, "--ratio", ratio, "--seed", seed, *FROM_PCA,
            "--force", "--quiet")
    return vae


def round_trip(folder, model, vae):
    """(the decoded model's path, {nmse, worst}) of merge.py, whatever the VAE loses. A
    folder stays a folder."""
    out = Path(folder) / f"decoded{Path(model).suffix}"
    report = Path(folder) / "report.json"
    printed(merge.main, model, "--roundtrip", "--vae", vae, "--max-nmse", 2, "-o", out,
            "--report", report, "--force", "--quiet")
    return out, json.loads(report.read_text())["roundtrip"]


def read_model(path):
    file = Checkpoint(path)
    return {name: file.read_tensor(name) for name in file.entries}


def change_of(row):
    """Of the loss, as a share of it."""
    return row["loss"] / row["loss_before"] - 1


# --- Tables 7 and 8 -----------------------------------------------------------------
def measure_codec():
    """Yields a row per ratio and model: the NMSE (squared relative error), and the
    paired difference of the decoded model to the model as it was."""
    paths = {name: path_of(name) for name in (*FAMILY, *UNSEEN)}
    before = {name: score(read_model(path)) for name, path in paths.items()}
    for ratio in RATIOS:
        after = {name: [] for name in paths}
        nmse = {name: [] for name in paths}
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(SEEDS if ratio > 1 else 1):
                vae = train_code(folder, [paths[name] for name in FAMILY], ratio, seed)
                for name, path in paths.items():
                    decoded, trip = round_trip(folder, path, vae)
                    after[name].append(score(read_model(decoded)))
                    nmse[name].append(trip["nmse"])
        for name in paths:
            found = difference(stacked(after[name]), before[name])
            yield {"model": name, "ratio": VAEConfig(ratio=ratio).true_ratio,
                   "nmse": float(np.mean(nmse[name])), "difference": found.record(),
                   "before": summary(before[name]),
                   "documents": before[name][DOMAINS[0]].shape[1], **machine()}


def section_codec(rows):
    """A line per ratio, a column per model."""
    lines = []
    for (ratio,), group in grouped(rows, "ratio").items():
        lines.append([f"{ratio:.4g}", short(group[0]["nmse"]),
                      short(group[-1]["nmse"]), f"{1 - 1 / ratio:.3f}",
                      *[pm_of(row["difference"]) for row in group]])
    names = [row["model"] for row in group]
    head = ["r", f"NMSE: {names[0]}", names[-1], "1 - 1/r", f"bits lost: {names[0]}",
            *names[1:]]
    return table(head, lines)


def claims_of_codec(rows):
    section = "Tables 7 and 8: what the codec keeps"
    for name, r, claim, paper, meaning in (
            ("base-seed2", 1.6, "a VAE serves unseen models at r = 1.6",
             "MMLU 40.8 → 40.0", "all models break, the fitted ones too"),
            ("code", 2.0, "a VAE keeps what it was trained on, r = 2",
             "MMLU 41.4 → 39.8", "")):
        for row in find(rows, model=name, ratio=r):
            d = row["difference"]
            verdict = lossless(d["mean"] / row["before"]["pooled"])
            yield Claim(claim, paper, f"{pm_of(d)} bits lost", verdict, section,
                        meaning)
    for row in find(rows, model="code", ratio=4.0):
        noise = 1 - 1 / 4       # what any linear code loses of white noise
        few = row["nmse"] < 0.95 * noise
        yield Claim("weights fill few dimensions", "Fig. 2",
                    f"a quarter of them leaves {row['nmse']:.2f}, of noise {noise:.2f}",
                    "holds" if few else "not reproduced", section)


# --- The reference VAE on any model -------------------------------------------------
def bits(model):
    """Bits per byte of one of our models, None of any other."""
    embedding = model.get("model.embed_tokens.weight")
    if embedding is None or len(embedding) != 256:      # bytes: what evaluate.py scores
        return None
    return summary(score(model))["pooled"]


def measure_vae(path):
    """The row of one model."""
    with tempfile.TemporaryDirectory() as folder:
        decoded, trip = round_trip(folder, path, merge.REFERENCE)
        after = bits(read_model(decoded))
    name = Path(path).resolve().name.removesuffix(".safetensors")
    trained_on = Codec.load(merge.REFERENCE).record["trained_on"]
    return {"model": name, "seen": f"{name}.safetensors" in trained_on, **trip,
            "loss_before": bits(read_model(path)), "loss": after, **machine()}


def section_vae(rows):
    lines = []
    for row in rows:
        seen = "yes" if row["seen"] else "no"
        lost = "" if row["loss"] is None else f"{change_of(row):+.2%}"
        lines.append([f"`{row['model']}`", seen, short(row["nmse"]),
                      short(row["worst"]["nmse"]), lost])
    return table(["model", "trained on it", "NMSE", "worst tensor",
                  "change of the loss"], lines)


# --- One stage, two stages ----------------------------------------------------------
# One stage: the KL counts from the first step, for as many steps, at the rate of the
# other's first stage.
TWO = ("--steps1", 1000, "--steps2", 400)
ONE = ("--steps1", 0, "--steps2", 1400, "--lr", LEARNING_RATES["random"] / STAGE2_RATE)
RECIPES = {"two stages": TWO, "one stage": ONE,
           "one stage, beta 1": (*ONE, "--beta", 1),
           "two stages, beta 1": (*TWO, "--beta", 1),
           "one stage, beta 0.1": (*ONE, "--beta", 0.1),
           "two stages, beta 0.1": (*TWO, "--beta", 0.1)}


def measure_curves():
    """Yields a row per training: its last check on held-out windows."""
    for seed in range(SEEDS):
        for name, flags in RECIPES.items():
            with tempfile.TemporaryDirectory() as folder:
                log = Path(folder) / "log.jsonl"
                printed(train.main, *map(path_of, FAMILY), "-o", Path(folder) / "vae",
                        *flags, "--seed", seed, "--log", log, "--quiet")
                last = json.loads(log.read_text().splitlines()[-1])
            yield {"name": name, "seed": seed, "nmse": last["nmse"], "kl": last["kl"],
                   **machine()}


def section_curves(rows):
    lines = []
    for (name,), group in grouped(rows, "name").items():
        nmse = several([row["nmse"] for row in group])
        kl = several([row["kl"] for row in group], "{:.2f}".format)
        lines.append([name, len(group), nmse, kl])
    return table(["recipe", "seeds", "last NMSE", "KL per latent number"], lines)


def claims_of_curves(rows):
    """At beta 1 one stage must lose most of the variance, two less than a quarter."""
    ends = []
    for name in ("one stage, beta 1", "two stages, beta 1"):
        ends.append(np.mean([row["nmse"] for row in find(rows, name=name)]))
    holds = ends[0] > 0.5 and ends[1] < 0.25
    yield Claim("one stage collapses, two do not", "abstract",
                f"beta 1: NMSE {ends[0]:.2f}, two stages {ends[1]:.2f}",
                "holds" if holds else "not reproduced", "One stage or two",
                "at beta 1 an empty code is best; stage 2 stays short of it")


# --- What training finds at r = 1 ---------------------------------------------------
@torch.no_grad()
def linearity(vae, x_BTC):
    """How far a VAE is from a linear code, on windows of one tensor:

    share:         what the encoder's blocks add to its stream, |out - in| / |in|
    nonlinearity:  |E((a + b) / 2) - (E(a) + E(b)) / 2| / |E(a)|, a and b halves of x
    """
    embedded_BTD = vae.embed(x_BTC)
    added_BTD = vae.encode_stream(x_BTC) - embedded_BTD
    a_BTC, b_BTC = x_BTC.chunk(2)
    middle = vae.encode_mean((a_BTC + b_BTC) / 2)
    ends = (vae.encode_mean(a_BTC) + vae.encode_mean(b_BTC)) / 2
    away = (middle - ends).norm() / vae.encode_mean(a_BTC).norm()
    error_BTC = vae.decode(vae.encode_mean(x_BTC)) - x_BTC
    return {"nmse": error_BTC.square().mean().item(),
            "share": (added_BTD.norm() / embedded_BTD.norm()).item(),
            "nonlinearity": away.item()}


def measure_linear():
    """Yields a row of the reference VAE's random start, and one of itself."""
    name = "model.layers.0.mlp.up_proj.weight"
    w = Checkpoint(path_of("grown")).read_tensor(name).float()      # not trained on
    config = VAEConfig()
    x_BTC = ((w - w.mean()) / w.std()).view(-1, config.tokens, config.chunk)
    start = VAE(config).start(generator_for(0))
    reference = Codec.load(merge.REFERENCE).vae
    for label, vae in (("its random start", start), ("reference", reference)):
        yield {"vae": label, **linearity(vae, x_BTC), **machine()}


def section_linear(rows):
    lines = []
    for row in rows:
        lines.append([row["vae"], f"{row['nmse']:.1e}", f"{row['share']:.1e}",
                      f"{row['nonlinearity']:.1e}"])
    return table(["VAE", "NMSE", "share that the blocks add", "nonlinearity"], lines)


# --- Claims and the command ---------------------------------------------------------
def claims(records):
    yield from claims_of_codec(records["codec"])
    if records["curves"]:
        yield from claims_of_curves(records["curves"])
    unseen = find(records["vae"], seen=False)
    changes = [change_of(row) for row in unseen if row["loss"] is not None]
    if changes:
        nmse = max(row["nmse"] for row in unseen)
        yield Claim("a VAE serves unseen models at r = 1", "",
                    f"NMSE at most {nmse:.1e}, loss {max(changes, key=abs):+.2%}",
                    "ours", "The reference VAE",
                    "training finds an exact code by itself")


def main():
    parser = command_line(__doc__)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--unseen", nargs="+", default=[], metavar="MODEL")
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--linear", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(section_codec(collect("codec", measure_codec(), args)))
    if args.unseen:
        rows = (measure_vae(path) for path in args.unseen)
        print(section_vae(collect("vae", rows, args)))
    if args.curves:
        print(section_curves(collect("curves", measure_curves(), args)))
    if args.linear:
        print(section_linear(collect("linear", measure_linear(), args)))


if __name__ == "__main__":
    main()
