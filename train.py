"""train.py: the two-stage curriculum.                                     (read fifth)

    python train.py CHECKPOINT [CHECKPOINT ...] -o vae.safetensors

Paper: abstract, Sec. 3.2. Stage 1 trains a deterministic, high-capacity autoencoder, with
the KL off. Stage 2 turns the KL on, for the compact code. Why two (paper): with the KL from
scratch a VAE collapses before it has learnt anything.

    stage 1   mse / 2                   the code is the mean of q(z | w); at r > 1 it is
                                        the stream, D numbers for each chunk
    stage 2   mse / 2 + (beta / r) kl   the code is one sample of q(z | w), Z = C / r

ours: at r <= 1 the bottleneck has room for a whole chunk. Both stages go through it, and
stage 2 refines, at a tenth of the rate: a cut by PCA between them cost a factor of 10 to 30
in NMSE. At r > 1 PCA cuts, and stage 2 learns anew. Either stage runs all of its steps
(recovery comes late) and keeps its best state on held-out windows, the start included.
differs: no distillation, which lost when measured. Ctrl-C keeps the best state so far.
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
import re
import sys
import time
import zlib
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from torch import distributed
from tqdm import tqdm

from align import Moments
from chunking import (Checkpoint, Parser, check_output, chunk, command, is_selected, measure,
                      need, say, standardise, to_windows, write_tensors)
from lsmerge import Codec
from vae import VAE, Loss, VAEConfig, generator_for, masked_mse, sample, vae_loss


@dataclass(frozen=True)
class Schedule:
    steps1: int = 1000          # of stage 1
    steps2: int = 400           # of stage 2; both take half a minute on two cores
    lr: float = 0.0             # stage 1's peak; 0: the start's own, see LEARNING_RATES
    batch: int = 64             # windows per step: 1,024 chunks, where a CPU is fastest
    holdout: float = 0.1        # fraction of windows kept for validation
    seed: int = 0               # of everything random: windows, noise, the start
    device: str = "cpu"         # or cuda:N
    dtype: str = "float32"      # of the products; weights and optimiser stay float32
    quiet: bool = True          # no progress bars

    def __post_init__(self):
        if min(self.steps1, self.steps2) < 0 or not 0 <= self.lr < math.inf:
            raise ValueError("--steps1, --steps2 and --lr must be 0 or more")
        if self.batch < 1 or not 0 <= self.holdout < 1:
            raise ValueError("--batch must be 1 or more, --holdout at least 0 and below 1")
        if not 0 <= self.seed < 2 ** 32:
            raise ValueError("--seed must be from 0 to 2^32 - 1")


LEARNING_RATES = {"random": 8e-3, "pca": 1e-4}      # by trial; paper: 1e-4
STAGE2_RATE = 0.1           # of stage 1's peak, at r <= 1 (see above)
WARMUP = 0.1                # share of a stage in which the rate rises: AdamW starts blind
WEIGHT_DECAY = 1e-5         # paper: AdamW, 1e-5
CLIP = 1.0                  # paper: gradient clipping, no value given
CHECKS = 20                 # validations per stage
CUT_WINDOWS = 8192          # for the cut's covariance: 131,072 chunks
VALIDATION_WINDOWS = 256    # at most, in one batch: 262,144 weights
MAX_NMSE = 1e-3             # that merge.py accepts: 3 % of error, whose harm is measurable


# --- The curriculum ---------------------------------------------------------------------
def train_vae(parents, config, schedule=Schedule(), log=lambda record: None, start=None):
    """The whole curriculum: (vae, [record of each stage]).

    parents:  [(checkpoint, [TensorStats, ...]), ...]: one VAE for all of them
    log:      called with the figures of each validation
    start:    a trained VAE, which goes on in stage 2
    """
    gather(None)        # under torchrun: the processes meet
    need(schedule.batch >= rank_and_size()[1], "--batch", "is smaller than the number of "
         "processes", "raise it")
    vae = copy.deepcopy(start) or VAE(config).start(generator_for(schedule.seed))
    vae = vae.to(schedule.device)
    config = vae.config
    windows = Windows(parents, config, schedule)
    peak = schedule.lr or LEARNING_RATES[config.init]
    stages = []
    try:
        if not start:
            run_stage(vae, windows, schedule, 1, peak, stages, log)
            cut(vae, windows, schedule)
        if config.true_ratio <= 1:
            peak *= STAGE2_RATE
        run_stage(vae, windows, schedule, 2, peak, stages, log)
    except KeyboardInterrupt:           # Ctrl-C; a second one is not heard
        need(stages, "training", "interrupted before its first check", "run it again")
        stages[-1]["ended"] = "interrupted"
        if len(stages) == 1 and not start:
            cut(vae, windows, schedule)
    return vae.eval(), stages


def run_stage(vae, windows, schedule, stage, peak, stages, log):
    """One stage, to its best held-out state; its record is appended to `stages`."""
    steps = schedule.steps1 if stage == 1 else schedule.steps2
    optimiser = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.95),
                                  weight_decay=WEIGHT_DECAY)
    picks = np.random.default_rng((schedule.seed, stage))       # equal in every process
    noise = generator_for(schedule.seed, stage, rank_and_size()[0])
    record = {"stage": stage, "steps": steps, "lr": peak, "objective": math.inf}
    state = copy.deepcopy(vae.state_dict())
    began = time.perf_counter()
    bar = tqdm(total=steps, desc=f"stage {stage}", leave=False,
               disable=schedule.quiet or None)
    try:
        for step in range(steps + 1):
            if step % max(1, steps // CHECKS) == 0 or step == steps:
                figures = validate(vae, windows, stage)
                need(math.isfinite(figures["objective"]), "training", "the loss is infinite",
                     "lower --lr, or use --dtype float32")
                seconds = time.perf_counter() - began
                log({"stage": stage, "step": step, "seconds": seconds, **figures})
                bar.set_postfix(NMSE=f"{figures['nmse']:.1e}")
                if figures["objective"] < record["objective"]:
                    record.update(figures, best_step=step)
                    state = copy.deepcopy(vae.state_dict())
                record["seconds"] = seconds
                if record not in stages:
                    stages.append(record)
            if step < steps:
                rate = learning_rate(step, steps, peak)
                train_step(vae, windows, schedule, stage, optimiser, rate, picks, noise)
                bar.update()
        record["ended"] = "all steps"
    finally:
        bar.close()
        vae.load_state_dict(state)      # the best, not the last


def learning_rate(step, steps, peak):
    """Linear warm-up, then paper: cosine to zero."""
    ramp = max(1, round(WARMUP * steps))
    if step < ramp:
        return peak * (step + 1) / ramp
    done = (step - ramp) / max(1, steps - ramp)         # of the way down, 0 to 1
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def train_step(vae, windows, schedule, stage, optimiser, rate, picks, noise):
    """One batch, one step of AdamW. Under torchrun each process takes its share of it."""
    rank, size = rank_and_size()
    chosen = picks.integers(len(windows.training), size=schedule.batch)[rank::size]
    x_BTC, real_BTC = windows.read(windows.training[chosen])
    bfloat16 = schedule.dtype == "bfloat16"
    with torch.autocast(x_BTC.device.type, torch.bfloat16, enabled=bfloat16):
        loss = stage_loss(vae, stage, x_BTC, real_BTC, noise)
    optimiser.zero_grad(set_to_none=True)
    loss.total.backward()
    average_gradients(vae)
    torch.nn.utils.clip_grad_norm_(vae.parameters(), CLIP)
    optimiser.param_groups[0]["lr"] = rate
    optimiser.step()


def stage_loss(vae, stage, x_BTC, real_BTC, noise):
    """Stage 1: mse / 2. Stage 2: Eq. 1, with one sample of each code."""
    real_BT = real_BTC.any(dim=-1)
    if stage == 2:
        posterior = vae.encode(x_BTC, real_BT)                          # q(z | w)
        decoded_BTC = vae.decode(sample(posterior, noise), real_BT)     # p(w | z)
        config = vae.config
        return vae_loss(decoded_BTC, posterior, x_BTC, real_BTC, config.beta,
                        config.true_ratio)
    if vae.config.true_ratio > 1:                                       # past the bottleneck
        decoded_BTC = vae.decode_stream(vae.encode_stream(x_BTC, real_BT), real_BT)
    else:
        decoded_BTC = vae.decode(vae.encode_mean(x_BTC, real_BT), real_BT)
    mse = masked_mse(decoded_BTC, x_BTC, real_BTC)
    return Loss(mse / 2, mse, torch.zeros(()))


@torch.no_grad()
def cut(vae, windows, schedule):
    """Between the stages, at r > 1: the bottleneck takes the principal directions of stage
    1's latents."""
    if vae.config.true_ratio <= 1:
        return
    moments = Moments()
    chosen = windows.training[:CUT_WINDOWS]
    for numbers in np.array_split(chosen, -(-len(chosen) // schedule.batch)):
        x_BTC, real_BTC = windows.read(numbers)
        real_BT = real_BTC.any(dim=-1)
        moments.add(vae.encode_stream(x_BTC, real_BT)[real_BT].cpu())
    vae.set_bottleneck(moments.mean_Z.float(), moments.cov_ZZ)


@torch.no_grad()
def validate(vae, windows, stage):
    """Figures on held-out windows: `objective`, the stage's loss; `nmse` of the mean code;
    in stage 2 `kl` per latent number in nats, `sigma`, the mean posterior deviation, and
    `active`, the share of latent numbers whose variance is above 0.01 (Burda et al. 2016).
    """
    x_BTC, real_BTC = windows.validation
    loss = stage_loss(vae, stage, x_BTC, real_BTC, generator_for(0))
    figures = {"objective": loss.total, "nmse": loss.mse}
    if stage == 2:
        real_BT = real_BTC.any(dim=-1)
        mu_BTZ, logvar_BTZ = vae.encode(x_BTC, real_BT)
        figures["nmse"] = masked_mse(vae.decode(mu_BTZ, real_BT), x_BTC, real_BTC)
        figures["kl"] = loss.kl
        figures["sigma"] = (0.5 * logvar_BTZ[real_BT]).exp().mean()
        variance_Z = mu_BTZ[real_BT].var(dim=0, correction=0)
        figures["active"] = (variance_Z > 0.01).float().mean()
    return {key: value.item() for key, value in figures.items()}        # for JSON


class Windows:
    """All windows of some tensors, numbered, and read when they are asked for: the files
    may be larger than memory.  parents: as for train_vae."""

    def __init__(self, parents, config, schedule):
        self.C = config.chunk
        self.T = config.tokens
        self.device = schedule.device
        self.tensors = [(checkpoint, stats) for checkpoint, many in parents for stats in many]
        owner = []              # of each window: the number of its tensor,
        position = []           # its place there,
        held = []               # and whether it is held out
        for number, (_, stats) in enumerate(self.tensors):
            count = -(-stats.n_chunks(self.C) // self.T)
            # Held out by layer, name and place, so in all parents at once: two experts of
            # one base nearly agree there, and the one would give the other away.
            key = zlib.crc32(f"{stats.place.layer} {stats.place.rest}".encode())
            draws = np.random.default_rng([schedule.seed, key]).random(count)
            owner.append(np.full(count, number))
            position.append(np.arange(count))
            held.append(draws < schedule.holdout)
        self.owner = np.concatenate(owner)
        self.position = np.concatenate(position)
        held = np.concatenate(held)
        order = np.random.default_rng(schedule.seed).permutation(len(held))
        self.training = order[~held[order]]
        validation = order[held[order]]
        if len(self.training) == 0 or len(validation) == 0:     # too few to hold any out
            self.training = order
            validation = order
        self.validation = self.read(validation[:VALIDATION_WINDOWS])

    def read(self, numbers):
        """(x_BTC standardised float32, real_BTC bool) of these windows."""
        width = self.T * self.C
        x = []
        real = []
        for number in numbers:
            checkpoint, stats = self.tensors[self.owner[number]]
            start = int(self.position[number]) * width
            flat_L = checkpoint.read(stats.name, start, start + width)
            chunks_NC, real_NC = chunk(standardise(flat_L, stats), self.C)
            x_1TC, real_1TC = to_windows(chunks_NC, real_NC, self.T)
            x.append(x_1TC)
            real.append(real_1TC)
        return torch.cat(x).to(self.device), torch.cat(real).to(self.device)


def save_vae(path, vae, stages, force, **facts):
    """The VAE file. Wall times stay out of it: same inputs and seed, same bytes."""
    record = [{k: v for k, v in stage.items() if k != "seconds"} for stage in stages]
    write_tensors(path, *vae.to_file({"stages": record, **facts}), force)


def describe_stage(record):
    """A line for people on what a stage did."""
    said = f"stage {record['stage']}: {record['steps']} steps, {record['seconds']:.0f} s, "
    said += f"held-out NMSE {record['nmse']:.2g}"
    if "kl" in record:
        said += f", KL {record['kl']:.3g} nats and sigma {record['sigma']:.3g} per number"
    return f"{said} (the best state, of step {record['best_step']}); {record['ended']}"


# --- The command line, and what merge.py shares of it -----------------------------------
def start_parser(name, description):
    """A parser with the flags of both commands."""
    parser = Parser(prog=name, description=description,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--select", type=regex, metavar="REGEX",
        help="only tensors whose name it finds (floats of 2 or more dimensions)")
    add("--seed", type=int, default=0, help="of everything random")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help=" ")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of products")
    add("--force", action="store_true", help="overwrite an output (never an input)")
    add("--quiet", action="store_true", help="no progress bars")
    return parser


def regex(value):
    """The type of --select."""
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"is no pattern: {error}") from None
    return value


def pick_device(name):
    """"auto", "cpu" or "cuda" -> a torch device; under torchrun a GPU for each process."""
    found = torch.cuda.is_available()
    need(found or name != "cuda", "--device cuda", "torch finds no GPU", "use --device cpu")
    if not found or name == "cpu":
        return "cpu"
    return f"cuda:{rank_and_size()[0] % torch.cuda.device_count()}"


FLAGS = {
    "ratio": "r, weights per latent number", "chunk": "C, weights per chunk",
    "tokens": "T, chunks per window", "width": "D, of the network",
    "blocks": "of the encoder, and of the decoder", "heads": "of attention",
    "beta": "weight of the KL", "steps1": "of stage 1", "steps2": "of stage 2",
    "lr": "peak learning rate; 0: 8e-3 for random, 1e-4 for pca",
    "batch": "windows per step", "holdout": "share of windows to validate on"}


def parse(argv):
    """(arguments, VAEConfig, Schedule)."""
    parser = start_parser("train.py", "Train a VAE on checkpoints, in two stages.")
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="files or folders")
    add("-o", "--output", default="vae.safetensors", help="the VAE")
    add("--log", help="a JSON line for each validation is appended to this file")
    add("--init", default="random", help="the start: random, pca, or a VAE file to go on")
    known = {field.name: field for field in (*fields(VAEConfig), *fields(Schedule))}
    for name, what in FLAGS.items():
        add(f"--{name}", type=known[name].type, default=known[name].default, help=what)
    a = parser.read(argv)
    given = vars(a) | {"device": pick_device(a.device)}
    if a.init not in ("random", "pca"):
        given["init"] = VAEConfig.init
        if any(given[field.name] != field.default for field in fields(VAEConfig)):
            parser.error("--init FILE brings its network: drop the network's flags")
    try:
        config = VAEConfig(**{f.name: given[f.name] for f in fields(VAEConfig)})
        schedule = Schedule(**{f.name: given[f.name] for f in fields(Schedule)})
    except ValueError as error:
        parser.error(str(error))
    return a, config, schedule


def main(argv=None):
    a, config, schedule = parse(argv)
    start = None
    inputs = []
    if a.init not in ("random", "pca"):
        need(os.path.exists(a.init), a.init, "no such file", "--init takes random, pca or a "
             "VAE file")
        codec = Codec.load(a.init)
        start = codec.vae
        inputs += codec.files
    parents = []
    for path in a.checkpoints:
        checkpoint = Checkpoint(path)
        inputs += checkpoint.files
        entries = [e for e in checkpoint.entries.values() if is_selected(e, a.select)]
        need(entries, path, "no tensor is selected", "change --select")
        parents.append((checkpoint, [measure(checkpoint, entry.name) for entry in entries]))
        say(f"{path}: {len(entries)} tensors")
    check_output(a.output, inputs, a.force)
    first = rank_and_size()[0] == 0         # under torchrun only the first process writes
    lines = open(os.devnull, "w")
    if a.log and first:
        check_output(a.log, [*inputs, a.output], force=True, flag="--log")
        for file in inputs:                 # it is appended to in place: a hard link is read
            same = os.path.exists(a.log) and os.path.samefile(file, a.log)
            need(not same, a.log, f"is the input {file}", "choose another --log")
        lines = open(a.log, "a", encoding="utf-8")
    with lines:
        vae, stages = train_vae(parents, config, schedule, lambda record: print(
            json.dumps(record), file=lines, flush=True), start)
    say(*map(describe_stage, stages))
    if first:
        names = [os.path.basename(os.path.normpath(path)) for path in a.checkpoints]
        save_vae(a.output, vae, stages, a.force, trained_on=names, select=a.select,
                 schedule=asdict(schedule))
        say(f"wrote {a.output}: r = {vae.config.true_ratio:g}")
    if stages[-1]["nmse"] > MAX_NMSE:
        say(f"warning: merge.py refuses a codec whose NMSE is above {MAX_NMSE:g}: train for "
            "longer, or at a lower --ratio", stream=sys.stderr)
    if stages[-1]["ended"] == "interrupted":
        return 130                          # as shells expect
    return 0


# --- Under torchrun: several processes, one result. Nothing is read at import. ----------
def rank_and_size():
    """(number of this process, of all): (0, 1) unless a launcher has set both."""
    try:
        rank = int(os.environ["RANK"])
        size = int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1
    return rank, max(1, size)


def gather(value):
    """[value of process 0, of process 1, ...], in every process; alone, [value]."""
    size = rank_and_size()[1]
    if size == 1:
        return [value]
    values = [None] * size
    try:
        if not distributed.is_initialized():
            # Processes may wait for each other for long: one of them has the largest tensor.
            distributed.init_process_group("gloo", timeout=datetime.timedelta(days=1))
            atexit.register(distributed.destroy_process_group)      # an exit may abort
        distributed.all_gather_object(values, value)
    except ValueError as error:         # the launcher's environment is not whole
        need(False, "torchrun", " ".join(str(error).split()), "unset RANK and WORLD_SIZE")
    except RuntimeError:                # another process has gone, and has said why
        raise SystemExit(1) from None
    return values


def average_gradients(vae):
    """Data parallel: the mean of all processes' gradients."""
    size = rank_and_size()[1]
    for parameter in vae.parameters():
        if size > 1 and parameter.grad is not None:
            distributed.all_reduce(parameter.grad.div_(size))


if __name__ == "__main__":
    sys.exit(command(main))
