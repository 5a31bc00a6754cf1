"""How well does a VAE reconstruct while it is still being trained? A curve per recipe and seed.

    python experiments/learning_curves.py [--seeds 3] [--paper] \\
        [--record experiments/results/curves.jsonl]

In:    the experts code and prose: one VAE of both, from a random start.
Out:   per recipe and seed the checks of its training: stage, step, seconds, NMSE of the mean code
       on held-out windows, KL per latent number (null in stage 1, which has none), learning rate.
       Seconds count from the start of their stage, checks included. The last point is where the
       training ended, not the best state, which is what train.py keeps.

       two stages                  train.py --init random, as it comes
       one stage, beta 1           the KL counts from the first step, for as many steps, at the rate
                                   of the other's first stage
       two stages, beta 1          the same weight of the KL, after a first stage without it
       the same at beta 0.1        where Eq. 1 has its optimum far from the collapse: for white
                                   weights and r = 1 the mean code's NMSE is then beta^2
       the release's recipe        bench_functions.train_release: one stage of the same length
       the paper's configuration   its network and its rate (--paper, one seed), for as many steps
                                   as one core does in four minutes: what it reaches in that time

Paper: abstract and Sec. 3.2: two stages, and the collapse without them.
ours:  the curves. With beta 1, Eq. 1 itself asks for a nearly empty code, whatever the start: the
       best linear VAE at r = 1 leaves an error of 1 / l in a principal direction of variance l > 1,
       and all of the variance of the others. (Lucas et al. 2019, "Don't blame the ELBO!")
Previous: round_trips.py. Next: pictures.py.
"""
import argparse
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Callable, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from bench_functions import train_release
from codec_tables import FAMILY, Model
from scores import append, machine
from train import STAGE2_RATE, Schedule, learning_rate, train_vae
from vae import VAEConfig

STEPS = Schedule.steps1 + Schedule.steps2
RATE = 8e-3             # train.py's first stage, from a random start
KEYS = "stage", "step", "seconds", "nmse", "kl", "lr"       # of a point


# --- Recipes --------------------------------------------------------------------------------------
class Recipe(NamedTuple):
    config: VAEConfig
    schedule: Schedule
    train: Callable = train_vae


def release(parents, config, schedule, log):
    """train_release, called as train_vae is; the configuration is its own, a default one."""
    train_release(parents, schedule.seed, schedule.steps2, log)


ONE_STAGE = Schedule(steps1=0, steps2=STEPS, lr=RATE / STAGE2_RATE)     # stage 2 at stage 1's rate
# What train_release does, in the words of a Schedule: it has these numbers written out.
RELEASE = Schedule(steps1=0, steps2=STEPS, lr=1e-4, warmup=0.0, checks=STEPS // 25)
LARGE = Schedule(steps1=120, steps2=60, lr=1e-4, batch=16, checks=10)    # four minutes of one core
RECIPES = {
    "two stages": Recipe(VAEConfig(init="random"), Schedule()),
    "one stage, beta 1": Recipe(VAEConfig(init="random", beta=1.0), ONE_STAGE),
    "two stages, beta 1": Recipe(VAEConfig(init="random", beta=1.0), Schedule()),
    "one stage, beta 0.1": Recipe(VAEConfig(init="random", beta=0.1), ONE_STAGE),
    "two stages, beta 0.1": Recipe(VAEConfig(init="random", beta=0.1), Schedule()),
    "the release's recipe": Recipe(VAEConfig(init="random"), RELEASE, release)}
PAPER = {"the paper's configuration": Recipe(
    VAEConfig(init="random", chunk=640, width=768, blocks=4, heads=4), LARGE)}


# --- Measuring ------------------------------------------------------------------------------------
def short(value):
    """A float to five digits, which is more than a picture shows."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


class Curve:
    """The log of one training."""

    def __init__(self, schedule):
        self.schedule, self.points, self.began = schedule, [], time.perf_counter()

    def log(self, record):
        """A check. Those of train_release have neither time nor rate."""
        s = self.schedule
        if record["stage"] == 1 and s.steps1 == 0:
            return              # a stage of no steps has no curve
        own = {"seconds": time.perf_counter() - self.began, "kl": None,
               "lr": learning_rate(record["step"], s.steps2, s.lr, s.warmup)}
        self.points.append({key: short({**own, **record}[key]) for key in KEYS})


def measure_recipe(name, recipe, models, seed, command=""):
    """The record of one training."""
    schedule, parents = replace(recipe.schedule, seed=seed), [model.parent for model in models]
    curve = Curve(schedule)
    recipe.train(parents, recipe.config, schedule, curve.log)
    return {"name": name, "model": " + ".join(model.name for model in models), "seed": seed,
            "points": curve.points, "config": asdict(recipe.config), "schedule": asdict(schedule),
            **machine(), "command": command}


def trainings(seeds, paper, names):
    """[(name, recipe, seed)]: recipes in turns, seed by seed, so that load hits all alike."""
    runs = [(name, RECIPES[name], seed) for seed in range(seeds) for name in names]
    return runs + [(name, recipe, 0) for name, recipe in PAPER.items() if paper]


def show(row):
    last = row["points"][-1]
    seconds = sum(max(point["seconds"] for point in row["points"] if point["stage"] == stage)
                  for stage in {point["stage"] for point in row["points"]})
    print(f"{row['name']:<26} seed {row['seed']}   NMSE {last['nmse']:.1e}   "
          f"KL {last['kl']:7.4f}   {seconds:4.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="may be given again")
    parser.add_argument("--paper", action="store_true",
                        help="the paper's configuration as well, with one seed")
    parser.add_argument("--record", type=Path, help="append to this file")
    args = parser.parse_args()
    command = shlex.join(["python", "experiments/learning_curves.py", *sys.argv[1:]])
    models = [Model.open(HERE / "models" / f"{name}.safetensors") for name in FAMILY]
    for name, recipe, seed in trainings(args.seeds, args.paper, args.recipe or RECIPES):
        row = measure_recipe(name, recipe, models, seed, command)
        show(row)
        if args.record:
            append(args.record, [row])


if __name__ == "__main__":
    main()
