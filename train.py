"""train.py: the two-stage curriculum.                                             (read fifth)

    python train.py CHECKPOINT [CHECKPOINT ...] -o vae.safetensors [options]

Paper: abstract, Sec. 3.2. Stage 1 trains a deterministic, high-capacity autoencoder (KL off); stage 2
inserts the compact neck and turns the KL on. Why two: weights have heavy tails and a small variance;
a VAE trained from scratch with the KL collapses before it has learnt anything worth regularising.

    stage 1   mse / 2                        latent = the stream, D numbers per chunk
    stage 2   mse / 2 + (beta_t / r) kl      latent = the neck, Z = C / r numbers per chunk

Enters: windows of standardised weights, read from the files as they are needed. Leaves: a VAE file,
with its configuration and training record in the header.
differs: the paper's stage 2 also distils, it matches stage 1's output. Measured, that lost: not here.
"""
if __name__ == "__main__":      # Ctrl-C during the imports: end without a traceback
    import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)
import bisect, contextlib, copy, datetime, itertools, json, math, os, re, sys, time, zlib
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from torch import distributed
from tqdm import tqdm

from align import Moments
from chunking import (Checkpoint, Parser, check_output, chunk, command, is_selected, measure, need, scale,
                      to_windows, write_tensors)
from lsmerge import Codec, generator
from vae import VAE, VAEConfig, masked_mse, sample, vae_loss


@dataclass(frozen=True)
class Schedule:
    steps1: int = 1000          # stage 1, at most: it ends where it has converged
    steps2: int = 200           # stage 2
    lr: float = 0.0             # peak; 0: 1e-4 (paper), but 8e-3 from a random start, the best of 1e-3
    #                             to 2e-2 at width 128 (a wider network wants less)
    batch: int = 64             # windows per step: 1,024 chunks, where a CPU multiplies fastest
    holdout: float = 0.1        # fraction of windows kept for validation
    warmup: float = 0.1         # fraction of a stage in which the rate rises; beta takes twice that
    weight_decay: float = 1e-5  # paper: AdamW, 1e-5
    clip: float = 1.0           # paper: gradient clipping, no value given
    checks: int = 20            # validations per stage; the best state is kept
    patience: int = 8           # a stage ends after so many checks without a better one: a new neck is
    #                             at first worse than its start
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"      # of the products; the weights and the optimiser stay float32
    quiet: bool = True          # no progress bars

    def __post_init__(self):
        if not (min(self.steps1, self.steps2) >= 0 and self.batch >= 1 and 0 <= self.holdout < 1
                and 0 <= self.lr < math.inf):
            raise ValueError("needed: steps >= 0, batch >= 1, holdout in [0, 1), a finite lr >= 0")


CONVERGED = 1e-8            # NMSE at which nothing is left to learn; float32 rounding lies at 1e-13
NECK_WINDOWS = 8192         # for the neck's covariance: 131,072 chunks for 128 x 128 numbers
VALIDATION_WINDOWS = 256    # at most, in one batch: 262,144 weights


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then paper: cosine to zero."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def beta_at(step, steps, beta, warmup):
    """ours: beta rises linearly over the first 2 x warmup of stage 2: the new neck settles first."""
    return beta * min(1.0, (step + 1) / max(1, round(2 * warmup * steps)))


class Windows:
    """All windows of the selected tensors of some checkpoints: numbered, and read when asked for, so
    that files may be larger than memory.  parents: [(checkpoint, [TensorSlot, ...]), ...]"""

    def __init__(self, parents, config, schedule):
        self.C, self.T, self.device = config.chunk, config.tokens, schedule.device
        self.tensors = [(checkpoint, slot) for checkpoint, slots in parents for slot in slots]
        counts = [-(-slot.n_chunks(self.C) // self.T) for _, slot in self.tensors]
        self.starts = [0, *itertools.accumulate(counts)]
        # Held out by name and position, so in all parents at once: two experts of one base agree to a
        # few per cent at the same position, and a window of one would give its twin away.
        names = [zlib.crc32(slot.name.encode()) for _, slot in self.tensors]
        draws = [np.random.default_rng([schedule.seed, name]).random(n) for name, n in zip(names, counts)]
        order = np.random.default_rng(schedule.seed).permutation(self.starts[-1])
        held = (np.concatenate(draws) < schedule.holdout)[order]
        self.training = order if held.all() else order[~held]
        self.validation = self.read((order[held] if held.any() else order)[:VALIDATION_WINDOWS])

    def read(self, numbers):
        """(x_BTC standardised float32, real_BTC bool) of these windows."""
        pairs = []
        for number in numbers:
            tensor = bisect.bisect(self.starts, number) - 1
            (checkpoint, slot), w = self.tensors[tensor], int(number) - self.starts[tensor]
            flat_L = checkpoint.read(slot.name, w * self.T * self.C, (w + 1) * self.T * self.C)
            pairs.append(to_windows(*chunk(scale(flat_L, slot), self.C), self.T))
        return [torch.cat(part).to(self.device) for part in zip(*pairs)]


@torch.no_grad()
def start_neck(vae, windows, batch):
    """Between the stages: the neck starts in the principal directions of stage 1's latents."""
    moments, count = Moments(), min(NECK_WINDOWS, len(windows.training))
    for first in range(0, count, batch):
        x_BTC, real_BTC = windows.read(windows.training[first:min(first + batch, count)])
        real_BT = real_BTC.any(dim=-1)
        moments.add(vae.encode_stream(x_BTC, real_BT)[real_BT].cpu())
    vae.set_neck(moments.mean_Z.float(), moments.cov_ZZ)


def stage_loss(vae, stage, x_BTC, real_BTC, beta, noise):
    """(loss, mse, kl): stage 1 mse / 2; stage 2 Eq. 1, with one sample of each code (`noise`)."""
    real_BT = real_BTC.any(dim=-1)
    if stage == 1:
        decoded_BTC = vae.decode_stream(vae.encode_stream(x_BTC, real_BT), real_BT)
        mse = masked_mse(decoded_BTC, x_BTC, real_BTC)
        return mse / 2, mse, torch.zeros(())
    posterior = vae.encode(x_BTC, real_BT)
    decoded_BTC = vae.decode(sample(posterior, noise), real_BT)
    return vae_loss(decoded_BTC, posterior, x_BTC, real_BTC, beta, vae.config.true_ratio)


@torch.no_grad()
def validate(vae, windows, stage):
    """Figures on held-out windows: `objective`, the stage's loss at full beta; `nmse` of the mean code;
    in stage 2 `kl` per latent number in nats, `sigma`, the mean posterior deviation, `active`, the share
    of latent numbers whose posterior mean varies by more than 0.01 (Burda et al., active units)."""
    (x_BTC, real_BTC), noise = windows.validation, torch.Generator().manual_seed(0)
    loss, mse, kl = stage_loss(vae, stage, x_BTC, real_BTC, vae.config.beta, noise)
    figures = {"objective": loss, "nmse": mse}
    if stage == 2:
        real_BT = real_BTC.any(dim=-1)
        mu_BTZ, logvar_BTZ = vae.encode(x_BTC, real_BT)
        figures["nmse"] = masked_mse(vae.decode(mu_BTZ, real_BT), x_BTC, real_BTC)
        figures |= {"kl": kl, "sigma": (0.5 * logvar_BTZ[real_BT]).exp().mean()}
        figures["active"] = (mu_BTZ[real_BT].var(dim=0, correction=0) > 0.01).float().mean()
    return {key: value.item() for key, value in figures.items()}


def train_step(vae, windows, schedule, stage, optimiser, beta, picks, noise):
    """One batch, one step of AdamW. Under torchrun each process takes its part of the batch."""
    rank, size = rank_and_size()
    chosen = picks.integers(len(windows.training), size=schedule.batch)[rank::size]
    x_BTC, real_BTC = windows.read(windows.training[chosen])
    with torch.autocast(x_BTC.device.type, torch.bfloat16, enabled=schedule.dtype == "bfloat16"):
        loss = stage_loss(vae, stage, x_BTC, real_BTC, beta, noise)[0]
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    for parameter in vae.parameters() if size > 1 else []:
        if parameter.grad is not None:          # data-parallel: the mean of the processes' gradients
            distributed.all_reduce(parameter.grad.div_(size))
    torch.nn.utils.clip_grad_norm_(vae.parameters(), schedule.clip)
    optimiser.step()


def run_stage(vae, windows, schedule, stage, steps, peak, log):
    """One stage, to its best held-out state, the start included: training never leaves a codec worse
    than it found it. Returns its record; `ended` says why: converged, no better (patience), steps, or
    interrupted (Ctrl-C)."""
    optimiser = torch.optim.AdamW(vae.parameters(), peak, (0.9, 0.95), weight_decay=schedule.weight_decay)
    # Every process picks the same windows and draws noise of its own.
    picks = np.random.default_rng([schedule.seed, stage])
    noise, began = generator(schedule.seed, stage, rank_and_size()[0]), time.perf_counter()
    best, state, stale, ended = {}, None, 0, ""
    bar = tqdm(range(steps + 1), desc=f"stage {stage}", disable=schedule.quiet or None, leave=False)
    try:
        for step in bar:
            rate = optimiser.param_groups[0]["lr"] = learning_rate(step, steps, peak, schedule.warmup)
            if step % max(1, steps // schedule.checks) == 0 or step == steps:
                figures, seconds = validate(vae, windows, stage), round(time.perf_counter() - began, 2)
                if not math.isfinite(figures["objective"]):
                    raise FloatingPointError(f"stage {stage}: no finite loss at step {step}; fix: lower --lr")
                log({"stage": stage, "step": step, "seconds": seconds, "lr": rate, **figures})
                bar.set_postfix(NMSE=f"{figures['nmse']:.1e}", KL=f"{figures.get('kl', 0):.2f}")
                stale += 1
                if not best or figures["objective"] < best["objective"]:
                    best, state, stale = {**figures, "best_step": step}, copy.deepcopy(vae.state_dict()), 0
                ended = ("converged" if figures["nmse"] < CONVERGED else "steps" if step == steps else
                         "no better" if stale == schedule.patience else "")
                if ended:
                    break
            beta = beta_at(step, steps, vae.config.beta, schedule.warmup)
            train_step(vae, windows, schedule, stage, optimiser, beta, picks, noise)
    except KeyboardInterrupt:
        need(best, "training", "interrupted before its first check", "run it again")
        ended = "interrupted"
    vae.load_state_dict(state)
    seconds = round(time.perf_counter() - began, 2)
    return {**best, "stage": stage, "steps": step, "lr": peak, "ended": ended, "seconds": seconds}


def train_vae(parents, config, schedule=Schedule(), log=lambda record: None, start=None):
    """The curriculum, whole. Returns (vae, [record of each stage]).

    parents: [(checkpoint, [TensorSlot, ...]), ...], which share one VAE.  start: a trained VAE, which
    goes on in stage 2.  Raises FloatingPointError (a loss that is no number), CheckpointError.
    """
    gather(None)                            # under torchrun: the processes meet
    vae = (copy.deepcopy(start) if start else VAE(config, generator(schedule.seed))).to(schedule.device)
    windows = Windows(parents, vae.config, schedule)
    peak, stages = schedule.lr or (8e-3 if vae.config.init == "random" else 1e-4), []
    if not start:
        stages.append(run_stage(vae, windows, schedule, 1, schedule.steps1, peak, log))     # KL off
        start_neck(vae, windows, schedule.batch)
    if start or stages[0]["ended"] != "interrupted":
        stages.append(run_stage(vae, windows, schedule, 2, schedule.steps2, peak, log))     # KL on
    return vae.eval(), stages


def save_vae(path, vae, stages, **facts):
    """The VAE file. Wall times stay out of it: same inputs and seed, same bytes."""
    record = [{key: value for key, value in stage.items() if key != "seconds"} for stage in stages]
    write_tensors(path, *vae.to_file({"stages": record, **facts}))


def describe_stage(record):
    """One printed line per stage."""
    keys = [key for key in ("nmse", "kl", "sigma", "active", "steps", "best_step", "seconds") if key in record]
    parts = ", ".join(f"{key} {record[key]:.4g}" for key in keys)
    return f"stage {record['stage']}: held-out {parts}; ended: {record['ended']}"


# --- What both commands share ---------------------------------------------------------------------
def rank_and_size(): return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def gather(value):
    """[value of process 0, of process 1, ...], in every process of a torchrun; alone, [value]."""
    values = [value] * rank_and_size()[1]
    if len(values) > 1:
        if not distributed.is_initialized():    # a day: the others wait for the largest tensor
            distributed.init_process_group("gloo", timeout=datetime.timedelta(days=1))
        distributed.all_gather_object(values, value)
    return values


def pick_device(name):
    """"auto", "cpu" or "cuda" -> a torch device; under torchrun each process takes its own GPU."""
    found = torch.cuda.is_available()
    need(found or name != "cuda", "--device cuda", "this torch finds no CUDA device", "use --device cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    return f"cuda:{local % torch.cuda.device_count()}" if found and name != "cpu" else "cpu"


def regex(text):
    try:
        return re.compile(text).pattern
    except re.error:
        raise ValueError from None


def add_common_arguments(add):
    add("--select", metavar="REGEX", type=regex, help="which tensors (floats of >= 2 dimensions in layers)")
    add("--seed", type=int, default=0, help="of everything random (%(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(%(default)s)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute type (%(default)s)")
    add("--force", action="store_true", help="overwrite an existing output (never an input)")
    add("--quiet", action="store_true", help="no progress bars")


def parse(argv):
    """(arguments, VAEConfig, Schedule); a value that is wrong on its face is a usage error."""
    parser = Parser(description="Train the VAE of LS-Merge on the weights of one or more checkpoints.")
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT")
    add("-o", "--output", default="vae.safetensors", help="the VAE file (%(default)s)")
    add("--init", default="pca", metavar="pca|random|FILE", help="warm start, the paper's random start, "
        "or a VAE to go on from, in stage 2 (%(default)s)")
    add("--log", metavar="FILE.jsonl", help="append one JSON line per validation")
    for kind, names in ((VAEConfig, ("ratio", "chunk", "tokens", "width", "blocks", "heads", "beta")),
                        (Schedule, ("steps1", "steps2", "lr", "batch", "holdout"))):
        for name in names:
            default = getattr(kind, name)
            add(f"--{name}", type=type(default), default=default, help=f"{kind.__name__}.{name} ({default})")
    add_common_arguments(add)
    a = parser.parse_intermixed_args(argv)
    pairs = 2 * max(1, a.heads)     # the width is raised where a chunk or the heads need more
    given = vars(a) | {"width": -(-max(a.width, a.chunk) // pairs) * pairs, "device": pick_device(a.device),
                       "init": a.init if a.init in ("pca", "random") else "random"}
    try:
        return [a, *(kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})
                     for kind in (VAEConfig, Schedule))]
    except ValueError as error:
        parser.error(str(error))


def main(argv=None):
    a, config, schedule = parse(argv)
    rank, size = rank_and_size()
    need(a.batch % size == 0, "--batch", f"{a.batch} cannot be shared by {size} processes", "change it")
    start = None if a.init in ("pca", "random") else Codec.load(a.init).vae
    checkpoints = [Checkpoint(path) for path in a.checkpoints]
    inputs = [file for checkpoint in checkpoints for file in checkpoint.files] + [a.init] * bool(start)
    check_output(a.output, inputs, a.force)
    parents = [(c, [measure(c, e.name) for e in c.entries.values() if is_selected(e, a.select)])
               for c in checkpoints]
    for checkpoint, slots in parents:
        need(slots, checkpoint.path, "no tensor is selected", "give --select a pattern that matches")
        print(f"{checkpoint.path}: {len(slots)} tensors, {sum(s.numel for s in slots):,} weights")
    config = start.config if start else config
    print(f"r = {config.true_ratio:g}: {config.chunk} weights -> {config.latent} latent numbers")
    with open(a.log, "a") if a.log and not rank else contextlib.nullcontext() as stream:
        vae, stages = train_vae(parents, config, schedule, lambda record: stream and print(
            json.dumps(record), file=stream, flush=True), start)
    print(*map(describe_stage, stages), sep="\n")
    if rank == 0:
        save_vae(a.output, vae, stages, select=a.select, schedule=asdict(schedule))
        print(f"wrote {a.output} ({sum(p.numel() for p in vae.parameters()):,} parameters)")
    return 130 if stages[-1]["ended"] == "interrupted" else 0


if __name__ == "__main__":
    sys.exit(command(main))
