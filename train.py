"""train.py: the two-stage curriculum.                                 (read fifth)

    python train.py CHECKPOINT [CHECKPOINT ...] -o vae.safetensors

Paper: abstract, Sec. 3.2. Stage 1 trains a deterministic, high-capacity autoencoder,
with the KL off. Stage 2 turns the KL on, for the compact code. Why two (paper): with
the KL from scratch a VAE collapses before it has learnt anything. A code that says
nothing costs no KL, and the decoder then learns to do without it.

    stage 1   mse / 2                   the code is the mean of q(z | w); at r > 1 it is
                                        the stream, D numbers for each chunk
    stage 2   mse / 2 + (beta / r) kl   the code is one sample of q(z | w), Z = C / r

ours:     at r <= 1 the bottleneck has room for a whole chunk. Both stages go through
          it, and stage 2 goes on from stage 1, at a fiftieth of the rate: a cut by PCA
          between them cost a factor of 10 to 30 in NMSE. At r > 1 PCA cuts, and stage 2
          learns anew
ours:     what stage 2 costs. It minimises Eq. 1 and no longer the error alone: for a
          sharp posterior, whose KL is finite, it gives up some NMSE (3e-8 before it,
          3e-7 after it)
ours:     either stage runs all of its steps, as recovery comes late, and keeps its
          best state on held-out windows, the start included
differs:  no distillation, which lost when measured

In this order: the curriculum on one screen; what it calls; the windows; the command;
and at the end all that several processes need. Ctrl-C keeps the best state so far.
Not here: a resumption to the step (a stage is short, and --init FILE goes on).
"""
if __name__ == "__main__":      # Ctrl-C during the imports: end without a traceback
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import argparse
import atexit
import copy
import datetime
import json
import math
import os
import random
import re
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields
from os.path import basename, exists, normpath

import torch
from torch import distributed
from tqdm import tqdm

from align import Moments
from chunking import (Checkpoint, Parser, appear, check_output, command, is_selected,
                      keep_freed_memory, measure, need, say, spans, standardise,
                      write_tensors)
from lsmerge import Codec
from vae import VAE, Loss, VAEConfig, generator_for, masked_mse, sample, vae_loss


@dataclass(frozen=True)
class Schedule:
    """How long, on what and where is trained. What is trained: vae.VAEConfig."""
    steps1: int = 700           # of stage 1
    steps2: int = 250           # of stage 2; both take half a minute on two cores, and
                                # end at an NMSE of 3e-7, whatever the model
    lr: float = 0.0             # stage 1's peak; 0: the start's own, see LEARNING_RATES
    batch: int = 64             # windows per step: 1,024 chunks, where a CPU is fastest
    holdout: float = 0.1        # fraction of windows kept for validation
    seed: int = 0               # of everything random: windows, noise, the start
    device: str = "cpu"         # or cuda:N
    dtype: str = "float32"      # of the products; weights and optimiser stay float32
    quiet: bool = True          # no progress bars

    def __post_init__(self):
        least = min(self.steps1, self.steps2, self.seed, self.batch - 1)
        fits = 0 <= self.lr < math.inf and 0 <= self.holdout < 1        # no NaN does
        if least < 0 or self.seed >= 2 ** 32 or not fits:
            raise ValueError("--steps1, --steps2 and --lr must be 0 or more, --batch 1 "
                             "or more, --holdout 0 or more and below 1, --seed from 0 "
                             "to 2^32 - 1")


# The peak for each start, by trial; paper: 1e-4. A random start must go far; the warm
# start is at its goal for r <= 1, and a high rate would only lead away from it.
LEARNING_RATES = {"random": 8e-3, "pca": 1e-4}
# Of stage 1's peak, at r <= 1: stage 2 starts at its goal, and only the noise of its
# own steps can harm it. By trial, with 400 steps: NMSE 3.4e-7 at 0.1, 1.7e-7 at 0.02;
# with 1,000 at 0.02: 0.9e-7.
STAGE2_RATE = 0.02
# Share of a stage in which the rate rises. (Not 0.1: of 10 rounds, torch's schedule
# would divide by 0.1 * 10 - 1 = 0.)
WARMUP = 0.11
WEIGHT_DECAY = 1e-5         # paper: AdamW, 1e-5
CLIP = 1.0                  # paper: gradient clipping, no value given
CHECKS = 20                 # validations per stage, evenly spread
CUT_WINDOWS = 8192          # for the cut's covariance: 131,072 chunks
VALIDATION_WINDOWS = 256    # at most, in one batch: 262,144 weights
GOLDEN = 0.6180339887       # (sqrt 5 - 1) / 2, for the held-out windows
MAX_NMSE = 1e-3             # that merge.py accepts: an error of 3 %, whose harm shows


# --- The curriculum -------------------------------------------------------------------
def train_vae(parents, config, schedule=Schedule(), log=lambda figures: None,
              start=None):
    """The whole curriculum: (vae, [record of each stage]).

    parents:  [(checkpoint, [TensorStats, ...]), ...]: one VAE for all of them
    log:      called with the figures of each validation
    start:    a trained VAE, which goes on in stage 2; its configuration holds
    Returns:  the VAE in its best state; a record tells the steps, the peak of the
              learning rate, the best step, its figures (see `validate`), and how the
              stage ended
    Raises:   CheckpointError where the loss is not finite; KeyboardInterrupt if it was
              interrupted before its first check
    """
    keep_freed_memory()
    gather(None)        # under torchrun: the processes meet
    size = rank_and_size()[1]
    need(schedule.batch >= size, "--batch", f"is smaller than the {size} processes",
         "give each a window")
    if start:
        vae = copy.deepcopy(start)
    else:
        vae = VAE(config).start(generator_for(schedule.seed))
    vae.to(schedule.device)
    windows = Windows(parents, vae.config, schedule)
    peak = schedule.lr or LEARNING_RATES[vae.config.init]
    stages = []
    try:
        if not start:
            run_stage(vae, windows, schedule, 1, schedule.steps1, peak, stages, log)
            cut(vae, windows, schedule)
        if vae.config.true_ratio <= 1:      # stage 2 begins at its goal, or nearly so
            peak *= STAGE2_RATE
        run_stage(vae, windows, schedule, 2, schedule.steps2, peak, stages, log)
    except KeyboardInterrupt:           # Ctrl-C; a second one is not heard
        if not stages:                  # nothing was checked yet: nothing to keep
            raise
        stages[-1]["ended"] = "interrupted"
        if len(stages) == 1 and not start:
            # Stage 1 alone has not set the bottleneck, which merge.py goes through.
            cut(vae, windows, schedule)
    return vae.eval(), stages


def run_stage(vae, windows, schedule, stage, steps, peak, stages, log):
    """One stage, to its best held-out state.

    Its record is appended to `stages` with the first check, at step 0: then there is a
    state to keep, whatever interrupts the rest. The start counts as well, so that no
    stage leaves its own objective worse than it was.
    """
    # paper: AdamW. ours: it remembers the squares of 20 gradients (0.95) and not of
    # 1000 (0.999, the default), as a stage has only some hundred steps.
    optimiser = torch.optim.AdamW(vae.parameters(), peak, betas=(0.9, 0.95),
                                  weight_decay=WEIGHT_DECAY)
    # ours: a rise to the peak first, while AdamW's averages are of few gradients and
    # its steps nearly random. Without it one seed of two ended at an NMSE of 1e-4, with
    # it both at 3.5e-7 (default schedule, two experts). Then paper: cosine to 0.
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, steps + 1,
                                                pct_start=WARMUP, cycle_momentum=False)
    # Every process draws the same batch, and takes its share; the noise is its own.
    picks = random.Random(f"{schedule.seed} {stage}")
    noise = generator_for(schedule.seed, stage, rank_and_size()[0])
    record = {"stage": stage, "steps": steps, "lr": peak, "objective": math.inf}
    state = vae.state_dict()
    began = time.perf_counter()
    try:
        # One round more than steps: the last one only checks.
        # disable=None: no bar where there is no terminal.
        for step in tqdm(range(steps + 1), f"stage {stage}",
                         disable=schedule.quiet or None):
            if step % max(1, steps // CHECKS) == 0 or step == steps:
                figures = validate(vae, windows, stage)
                need(math.isfinite(figures["objective"]), "training", "the loss is "
                     "infinite", "lower --lr, or use --dtype float32")
                log({"stage": stage, "step": step,
                     "seconds": time.perf_counter() - began, **figures})
                if figures["objective"] < record["objective"]:
                    record.update(figures, best_step=step)
                    state = copy.deepcopy(vae.state_dict())
                if step == 0:
                    stages.append(record)
            if step < steps:
                train_step(vae, windows, schedule, stage, optimiser, picks, noise)
                rates.step()
        record["ended"] = "all steps"
    finally:                            # after Ctrl-C as well
        vae.load_state_dict(state)      # the best, not the last


def train_step(vae, windows, schedule, stage, optimiser, picks, noise):
    """One batch, one step of AdamW.

    paper:    gradients are clipped: their norm over all parameters is at most CLIP
    ours:     --dtype bfloat16 is of the products only. Weights, gradients and the
              optimiser stay float32: a step of 1e-4 of a weight would be lost in the 8
              bits of a bfloat16
    Under torchrun each process takes its share of the batch: windows rank, rank + size,
    ... Example, 64 windows and 2 processes: the even and the odd ones.
    """
    rank, size = rank_and_size()
    chosen = picks.choices(windows.training, k=schedule.batch)
    x_BTC, real_BTC = windows.read(chosen[rank::size])
    with torch.autocast(x_BTC.device.type, torch.bfloat16,
                        enabled=schedule.dtype == "bfloat16"):
        loss = stage_loss(vae, stage, x_BTC, real_BTC, noise)
    optimiser.zero_grad()
    loss.total.backward()
    average_gradients(vae)
    torch.nn.utils.clip_grad_norm_(vae.parameters(), CLIP)
    optimiser.step()


def stage_loss(vae, stage, x_BTC, real_BTC, noise):
    """The loss of one batch, as vae.Loss(total, mse, kl).

    Stage 1:  mse / 2, the Gaussian log-likelihood, without noise and KL
    Stage 2:  Eq. 1, with one sample of each code
    ours:     in stage 1 at r > 1 the loss passes by the bottleneck, which is not set
              yet. Encoder and decoder learn with D numbers for each chunk, and `cut`
              then finds the Z directions that hold most of them
    """
    real_BT = real_BTC.any(dim=-1)      # a chunk is real if any number of it is
    config = vae.config
    if stage == 2:
        posterior = vae.encode(x_BTC, real_BT)                          # q(z | w)
        decoded_BTC = vae.decode(sample(posterior, noise), real_BT)     # p(w | z)
        return vae_loss(decoded_BTC, posterior, x_BTC, real_BTC, config.beta,
                        config.true_ratio)
    if config.true_ratio > 1:
        decoded_BTC = vae.decode_stream(vae.encode_stream(x_BTC, real_BT), real_BT)
    else:
        decoded_BTC = vae.decode(vae.encode_mean(x_BTC, real_BT), real_BT)
    mse = masked_mse(decoded_BTC, x_BTC, real_BTC)
    return Loss(mse / 2, mse, torch.zeros_like(mse))


@torch.no_grad()
def cut(vae, windows, schedule):
    """Between the stages, at r > 1: the bottleneck takes the Z leading principal
    directions of stage 1's latents, the best linear code of Z numbers (Eckart-Young;
    see vae.set_bottleneck). At r <= 1 nothing is cut.

    Example:  C = 64, r = 2, D = 64: of the 64 numbers for each chunk, the 32 directions
              with the largest variance stay
    """
    if vae.config.true_ratio <= 1:
        return
    moments = Moments()
    chosen = windows.training[:CUT_WINDOWS]     # their order is random: a fair sample
    for start, stop in spans(len(chosen), schedule.batch):
        x_BTC, real_BTC = windows.read(chosen[start:stop])
        real_BT = real_BTC.any(dim=-1)
        h_BTD = vae.encode_stream(x_BTC, real_BT)
        moments.add(h_BTD[real_BT].cpu())                   # (real chunks, D)
    vae.set_bottleneck(moments.mean_Z, moments.cov_ZZ)


@torch.no_grad()
def validate(vae, windows, stage):
    """Figures on held-out windows. The noise is the same at each check, so that checks
    differ by what was learnt alone.

    objective:  the stage's loss, by which the best state is chosen
    nmse:       of the mean code, which merge.py uses: the squared error over the
                variance. 1 is to predict the mean, 1e-3 an error of 3 %
    kl:         per latent number, in nats; 0 in stage 1, where it is off
    sigma:      the mean deviation of the posterior, in stage 2. 1, with a kl of 0, is a
                collapsed posterior, which says nothing of the weights; near
                sqrt(beta) = 0.01 it is nearly as sharp as the mean code
    """
    x_BTC, real_BTC = windows.validation
    loss = stage_loss(vae, stage, x_BTC, real_BTC, generator_for(0))
    figures = {"objective": loss.total, "nmse": loss.mse, "kl": loss.kl}
    if stage == 2:
        real_BT = real_BTC.any(dim=-1)
        mu_BTZ, logvar_BTZ = vae.encode(x_BTC, real_BT)
        figures["nmse"] = masked_mse(vae.decode(mu_BTZ, real_BT), x_BTC, real_BTC)
        figures["sigma"] = (0.5 * logvar_BTZ[real_BT]).exp().mean()
    return {key: value.item() for key, value in figures.items()}        # for JSON


class Windows:
    """All windows of some tensors, read when they are asked for, as the files may be
    larger than memory. A window is T C neighbouring weights of one tensor.

    parents:      as for train_vae
    training:     [(checkpoint, TensorStats, start, stop), ...], in random order
    validation:   (x_BTC, real_BTC) of held-out windows
    Example:      576 x 1536 weights, T C = 1,024: 864 windows, of which about 86 are
                  held out at 0.1
    """

    def __init__(self, parents, config, schedule):
        self.shape = (-1, config.tokens, config.chunk)      # (B, T, C)
        self.width = config.tokens * config.chunk           # weights per window
        self.device = schedule.device
        self.training = []
        held_out = []
        for checkpoint, many in parents:
            for stats in many:
                for i, span in enumerate(spans(stats.numel, self.width)):
                    # ours: held out by layer and position, so in all parents at once.
                    # Two experts of one base nearly agree there, and the one would
                    # give the other away. Multiples of the golden ratio fill the
                    # interval from 0 to 1 evenly (Weyl): of any run of windows about
                    # the share `holdout` is below it.
                    # Example, from 1 on: 0.62 0.24 0.85 0.47 0.09: at 0.1 the fifth
                    number = schedule.seed + (stats.place.layer or 0) + i + 1
                    turn = GOLDEN * number % 1
                    chosen = self.training
                    if turn < schedule.holdout:
                        chosen = held_out
                    chosen.append((checkpoint, stats, *span))
        # Too few to hold any out, or to keep any: then the same for both.
        held_out = held_out or self.training
        self.training = self.training or held_out
        shuffle = random.Random(schedule.seed).shuffle
        shuffle(self.training)
        shuffle(held_out)
        self.validation = self.read(held_out[:VALIDATION_WINDOWS])

    def read(self, windows):
        """(x_BTC standardised float32, real_BTC bool) of these windows, B of them.

        What the last window of a tensor lacks is padding: zeros in x, false in real.
        These are the windows of chunking.chunk and chunking.to_windows, without a pass
        over the whole tensor.
        """
        x_BL = torch.zeros(len(windows), self.width, device=self.device)
        real_BL = torch.zeros_like(x_BL, dtype=torch.bool)
        for i, (checkpoint, stats, start, stop) in enumerate(windows):
            flat_L = checkpoint.read(stats.name, start, stop)
            x_BL[i, :len(flat_L)] = standardise(flat_L, stats)
            real_BL[i, :len(flat_L)] = True
        return x_BL.view(self.shape), real_BL.view(self.shape)  # (B, T C) -> (B, T, C)


def learn(path, checkpoints, flags, config, schedule, *more):
    """Measure what would be encoded, train, and write the VAE file: (vae, stages).

    path:   of the file; None: it is not kept
    flags:  of the command: .select and .force
    more:   as for train_vae

    The file holds the weights and, as JSON in its header, the configuration and how it
    was trained. No pickle, and nothing of the run: same inputs and seed, same bytes.
    """
    parents = []
    for checkpoint in checkpoints:
        selected = [measure(checkpoint, entry.name)
                    for entry in checkpoint.entries.values()
                    if is_selected(entry, flags.select)]
        need(selected, checkpoint.path, "no tensor is selected", "change --select")
        parents.append((checkpoint, selected))
    vae, stages = train_vae(parents, config, schedule, *more)
    say(*map(describe_stage, stages))
    if path and rank_and_size()[0] == 0:    # under torchrun only one process writes
        said = asdict(schedule)
        del said["quiet"], said["device"]
        names = [basename(normpath(checkpoint.path)) for checkpoint in checkpoints]
        record = {"stages": stages, "schedule": said, "trained_on": names,
                  "select": flags.select}
        write_tensors(path, *vae.to_file(record), flags.force)
    return vae, stages


def describe_stage(record):
    """A line for people on what a stage did. The KL of stage 1 is 0, as it is off."""
    return ("stage {stage}: {steps} steps ({ended}); the best state, of step "
            "{best_step}: held-out NMSE {nmse:.2g}, KL {kl:.3g} nats per latent number"
            ).format(**record)


# --- The command line, and what merge.py shares of it --------------------------------
# Each flag is written once: those of both commands in `start_parser`, those of the
# network and of the schedule in the dataclasses that they fill.
def start_parser(name, description):
    """A parser with the flags of both commands: which tensors, how repeatable, where
    and how wide it computes, what it may overwrite, what it shows."""
    parser = Parser(prog=name, description=description)
    add = parser.add_argument
    add("--select", type=regex,
        help="only tensors whose name it finds (floats of 2 or more dimensions)")
    add("--seed", type=int, default=0, help="of everything random (%(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="float32", choices=("float32", "bfloat16"),
        help="of the network (%(default)s); in training of its products alone")
    add("--force", action="store_true", help="overwrite an output (never an input)")
    add("--quiet", action="store_true", help="no progress bars")
    return parser


def regex(value):
    """The type of --select: what cannot be compiled is a usage error.
    Example:  'a{99999999999}' is an OverflowError, 3000 brackets a RecursionError
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")      # '[[:alpha:]]' is no class in Python
            re.compile(value)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise argparse.ArgumentTypeError(f"is no pattern: {error}") from None
    return value


def pick_device(name):
    """"auto", "cpu" or "cuda" -> torch's name. Under torchrun each process has a GPU.
    Example:  rank 5 of two machines of 4 GPUs: cuda:1 of the second"""
    if name == "cpu" or not torch.cuda.is_available():
        need(name != "cuda", "--device cuda", "torch finds no GPU", "use --device cpu")
        return "cpu"
    return f"cuda:{rank_and_size()[0] % torch.cuda.device_count()}"


# The flags that fill VAEConfig and Schedule: their types, defaults and reasons stand
# there, so that the command and Python cannot differ.
FLAGS = {
    "ratio": "r, weights per latent number", "chunk": "C, weights per chunk",
    "tokens": "T, chunks per window", "width": "D, of the network",
    "blocks": "of the encoder, and of the decoder", "heads": "of attention",
    "beta": "weight of the KL", "steps1": "of stage 1", "steps2": "of stage 2",
    "lr": "stage 1's peak, 0: by the start; stage 2 at r <= 1 takes a fiftieth",
    "batch": "windows per step", "holdout": "share of windows to validate on"}


def parse(argv):
    """(arguments, VAEConfig, Schedule).

    --init FILE becomes arguments.start, a VAE file to go on from. It brings its own
    network: flags of the network beside it would change nothing, and are refused.
    """
    parser = start_parser("train.py", "Train a VAE on checkpoints, in two stages.")
    add = parser.add_argument
    add("checkpoints", nargs="+", help="files or folders")
    add("-o", "--output", default="vae.safetensors", help="the VAE (%(default)s)")
    add("--log", help="a file for a JSON line of each validation")
    add("--init", default="random",
        help="the start: random (the default), pca, or a VAE file that goes on in "
        "stage 2")
    for field in (*fields(VAEConfig), *fields(Schedule)):
        if field.name in FLAGS:
            add(f"--{field.name}", type=field.type, default=field.default,
                help=f"{FLAGS[field.name]} (%(default)s)")
    a = parser.read(argv)
    a.device = pick_device(a.device)
    a.start = None
    if a.init not in LEARNING_RATES:        # it is no start of ours, so a file
        need(exists(a.init), a.init, "is no start and no file", "give --init "
             "random, pca, or a VAE file")
        if a.steps1 != Schedule.steps1:
            parser.error("--init FILE goes on in stage 2: drop --steps1")
        a.steps1 = 0                        # its stage 1 lies behind it
        a.start = a.init
        a.init = VAEConfig.init
    try:
        config = filled(VAEConfig, a)
        schedule = filled(Schedule, a)
    except ValueError as error:
        parser.error(error)
    if a.start and config != VAEConfig():
        parser.error("--init FILE brings its network: drop the network's flags")
    return a, config, schedule


def filled(cls, a):
    """A dataclass, of the arguments that bear its fields' names.
    Example:  filled(VAEConfig, a) is VAEConfig(chunk=a.chunk, tokens=a.tokens, ...)"""
    return cls(**{field.name: getattr(a, field.name) for field in fields(cls)})


def main(argv=None):
    """Open the checkpoints, train, write. All that can be refused without training is
    refused before it. Returns the exit code."""
    only_the_first_speaks()
    a, config, schedule = parse(argv)
    start = None
    inputs = []
    if a.start:
        codec = Codec.load(a.start)
        start = codec.vae
        inputs += codec.files
    checkpoints = [Checkpoint(path) for path in a.checkpoints]
    for checkpoint in checkpoints:
        inputs += checkpoint.files
    check_output(a.output, inputs, a.force)
    if a.log:
        check_output(a.log, [*inputs, a.output], a.force, "--log")

    # The log appears with the VAE, in one piece: a run that fails leaves neither.
    figures = []
    vae, stages = learn(a.output, checkpoints, a, config, schedule, figures.append,
                        start)
    if a.log and rank_and_size()[0] == 0:
        with appear(a.log, a.force) as path, open(path, "w") as file:
            print(*map(json.dumps, figures), sep="\n", file=file)
    say(f"wrote {a.output}: r = {vae.config.true_ratio:g}")
    if stages[-1]["ended"] == "interrupted":
        return 130                          # as shells expect
    return 0


# --- Under torchrun: several processes, one result ------------------------------------
# The only place that reads the environment, and only when it is asked: torchrun sets
# RANK, WORLD_SIZE and the address of process 0 for each process that it starts.
def rank_and_size():
    """(number of this process, number of all): (0, 1) unless a launcher has set both.
    One of them alone, or numbers that make no sense, are left over from something else:
    a job that has ended, or a shell that was started by one."""
    try:
        rank = int(os.environ["RANK"])
        size = int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1
    if 0 <= rank < size:
        return rank, size
    return 0, 1


def only_the_first_speaks():
    """All processes would print the same lines. Errors, on stderr, are each one's
    own."""
    if rank_and_size()[0] > 0:
        sys.stdout = open(os.devnull, "w")


def gather(value):
    """[value of process 0, of process 1, ...], in every process; alone, [value]. Each
    process must call it equally often, and waits there for the others."""
    size = rank_and_size()[1]
    if size == 1:
        return [value]
    values = [None] * size
    try:
        if not distributed.is_initialized():
            # A day: one process may have the largest tensor, for which all wait.
            distributed.init_process_group("gloo", timeout=datetime.timedelta(days=1))
            atexit.register(distributed.destroy_process_group)      # an exit may abort
        distributed.all_gather_object(values, value)
    except ValueError as error:         # the launcher's environment is not whole
        need(False, "torchrun", error, "unset RANK and WORLD_SIZE")
    except RuntimeError:                # another process has gone, and has said why
        raise SystemExit(1) from None
    return values


def average_gradients(vae):
    """Data parallel: the mean of all processes' gradients. Where shares are of equal
    size, it is the gradient of the whole batch, as the loss is a mean over it."""
    size = rank_and_size()[1]
    for parameter in vae.parameters():
        if size > 1 and parameter.grad is not None:
            distributed.all_reduce(parameter.grad.div_(size))       # in place: the sum


if __name__ == "__main__":
    sys.exit(command(main))
