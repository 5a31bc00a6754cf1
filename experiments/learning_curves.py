"""How well does a VAE reconstruct while it is still being trained? A curve per recipe
and seed.

    python experiments/learning_curves.py [--seeds 3] [--paper] \\
        [--record experiments/results/curves.jsonl]

In:    the experts code and prose: one VAE of both, from a random start.
Out:   per recipe and seed the checks of its training: stage, step, seconds, NMSE of the
       mean code on held-out windows, KL per latent number (null in stage 1, which has
       none). Seconds count from the start of their stage, checks included. The last
       point is where the training ended, not the best state, which is what train.py
       keeps.

       two stages                  train.py, as it comes
       one stage, beta 1           the KL counts from the first step, for as many
                                   steps, at the rate of the other's first stage
       two stages, beta 1          the same beta, after a first stage without it
       the same at beta 0.1        where Eq. 1 has its optimum far from the collapse:
                                   for white weights and r = 1 the mean code's NMSE is
                                   then beta^2
       the release's recipe        bench_functions.train_release: one stage as long
       the paper's configuration   its network and its rate (--paper, one seed), for as
                                   many steps as one core does in four minutes

Paper: abstract and Sec. 3.2: two stages, and the collapse without them.
ours:  the curves. With beta 1, Eq. 1 itself asks for a nearly empty code, whatever the
       start: the best linear VAE at r = 1 leaves an error of 1 / l in a principal
       direction of variance l > 1, and all of the variance of the others. (Lucas et al.
       2019, "Don't blame the ELBO!")
Previous: round_trips.py. Next: pictures.py.
"""
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Callable, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "tools")]
from bench_functions import train_release
from codec_tables import FAMILY, Model
from records import command_line, keep, machine
from train import LEARNING_RATES, STAGE2_RATE, Schedule, train_vae
from vae import VAEConfig

STEPS = Schedule.steps1 + Schedule.steps2
KEYS = ("stage", "step", "seconds", "nmse", "kl")           # of a point


class Recipe(NamedTuple):
    config: VAEConfig
    schedule: Schedule
    train: Callable = train_vae


# Stage 2 alone, at stage 1's rate.
ONE_STAGE = Schedule(steps1=0, steps2=STEPS, lr=LEARNING_RATES["random"] / STAGE2_RATE)
# What train_release does, in the words of a Schedule: it has these numbers written out.
RELEASE = Schedule(steps1=0, steps2=STEPS, lr=1e-4)
# four minutes of one core
LARGE = Schedule(steps1=120, steps2=60, lr=1e-4, batch=16)
RECIPES = {
    "two stages": Recipe(VAEConfig(), Schedule()),
    "one stage, beta 1": Recipe(VAEConfig(beta=1.0), ONE_STAGE),
    "two stages, beta 1": Recipe(VAEConfig(beta=1.0), Schedule()),
    "one stage, beta 0.1": Recipe(VAEConfig(beta=0.1), ONE_STAGE),
    "two stages, beta 0.1": Recipe(VAEConfig(beta=0.1), Schedule()),
    "the release's recipe": Recipe(VAEConfig(), RELEASE, train_release)}
PAPER = {"the paper's configuration": Recipe(
    VAEConfig(chunk=640, width=768, blocks=4, heads=4), LARGE)}


def point(figures):
    """What is kept of a check, to five digits, which is more than a picture shows."""
    kept = {}
    for key in KEYS:
        value = figures.get(key)
        kept[key] = float(f"{value:.5g}") if isinstance(value, float) else value
    if figures["stage"] == 1:
        kept["kl"] = None       # it has none
    return kept


def measure_recipe(name, recipe, models, seed, command=""):
    """The row of one training."""
    schedule = replace(recipe.schedule, seed=seed)
    points = []

    def log(figures):
        # a stage of no steps has no curve
        if figures["stage"] == 2 or schedule.steps1 > 0:
            points.append(point(figures))
    recipe.train([model.parent for model in models], recipe.config, schedule, log)
    return {"name": name, "model": " + ".join(model.name for model in models),
            "seed": seed,
            "points": points, "config": asdict(recipe.config),
            "schedule": asdict(schedule),
            **machine(), "command": command}


def trainings(seeds, paper, names):
    """[(name, recipe, seed)]: recipes in turns, seed by seed, so that load hits all
    alike."""
    runs = []
    for seed in range(seeds):
        runs += [(name, RECIPES[name], seed) for name in names]
    if paper:
        runs += [(name, recipe, 0) for name, recipe in PAPER.items()]
    return runs


def main():
    parser = command_line(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipe", action="append", choices=RECIPES,
                        help="may be given again")
    parser.add_argument("--paper", action="store_true",
                        help="the paper's configuration as well, with one seed")
    parser.add_argument("--record", type=Path, help="file of the rows")
    args = parser.parse_args()
    command = shlex.join(["python", "experiments/learning_curves.py", *sys.argv[1:]])
    models = [Model.open(HERE / "models" / f"{name}.safetensors") for name in FAMILY]
    for name, recipe, seed in trainings(args.seeds, args.paper, args.recipe or RECIPES):
        row = measure_recipe(name, recipe, models, seed, command)
        last = row["points"][-1]
        print(f"{name:<26} seed {seed}   NMSE {last['nmse']:.1e}   "
              f"KL {last['kl']:7.4f}   "
              f"{last['seconds']:4.0f} s of its last stage", flush=True)
        if args.record:
            keep(args.record, [row])


if __name__ == "__main__":
    main()
