"""train.py: the two-stage curriculum.                                                (read fifth)

    python train.py CHECKPOINT [CHECKPOINT ...] [-o vae.safetensors] [options]

the network    --chunk, --tokens, --width, --blocks, --heads, --ratio, --beta: VAEConfig in vae.py
               --init NAME     pca (warm start, the default), random (the paper's), or a VAE file
the stages     --steps1, --steps2, --lr, --batch, --holdout: see Schedule below
               --select REGEX  which tensors (floats of two or more dimensions in numbered layers)
output         -o, --output PATH, --log FILE (a JSON line per validation), --force (overwrite)
machine        --device auto|cpu|cuda, --dtype float32|bfloat16 (of the products), --seed, --quiet

Paper: abstract, Sec. 3.2. Stage 1 trains a deterministic, high-capacity autoencoder (KL off); stage
2 turns the KL on, for the compact code. Why two (paper): with the KL from scratch a VAE collapses
before it has learnt anything. Here one stage ends worse, but collapses only if Eq. 1 asks for it.
    stage 1   mse / 2                      latent = the neck's mean; at r > 1 the stream, D numbers
    stage 2   mse / 2 + (beta / r) kl      latent = one sample from q(z | w), Z = C / r numbers
ours: at r <= 1 the neck has room for a chunk, so both stages go through it, and stage 2 refines, at
a tenth of the rate (a cut by PCA between them cost a factor 10 to 30 in NMSE); at r > 1 PCA cuts,
and stage 2 learns anew. No stage ends for want of progress: it recovers late. Leaves: a VAE file.
differs: no distillation (measured, it lost). Ctrl-C keeps the best state so far.
"""
if __name__ == "__main__":      # Ctrl-C during the imports: end without a traceback
    import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)
import argparse, atexit, bisect, copy, datetime, itertools, json, math, os, re, sys, time, zlib
from functools import partial
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from torch import distributed
from tqdm import tqdm

from align import Moments
from chunking import (Checkpoint, Parser, check_output, chunk, command, is_selected, measure, need,
                      standardise, to_windows, write_tensors)
from lsmerge import Codec
from vae import VAE, Loss, VAEConfig, generator_for, masked_mse, sample, vae_loss


def rank_and_size(): return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Schedule:
    steps1: int = 400           # stage 1, at most: it ends where it has converged
    steps2: int = 400           # stage 2; both together take a minute on two cores
    lr: float = 0.0             # stage 1's peak; 0: 1e-4 (paper), random start 8e-3 (by trial)
    batch: int = 64             # windows per step: 1,024 chunks, where a CPU multiplies fastest
    holdout: float = 0.1        # fraction of windows kept for validation
    warmup: float = 0.1         # fraction of a stage in which the rate rises: AdamW starts blind
    weight_decay: float = 1e-5  # paper: AdamW, 1e-5
    clip: float = 1.0           # paper: gradient clipping, no value given
    checks: int = 20            # validations per stage; the best state is kept
    seed: int = 0               # of everything random: windows, noise, the random start
    device: str = "cpu"         # or cuda:N
    dtype: str = "float32"      # of the products; the weights and the optimiser stay float32
    quiet: bool = True          # no progress bars

    def __post_init__(self):
        if not (min(self.steps1, self.steps2) >= 0 and self.batch >= rank_and_size()[1]
                and 0 <= self.holdout < 1 and 0 <= self.lr < math.inf and 0 <= self.seed < 2 ** 32):
            raise ValueError("needed: steps, lr, seed >= 0, 0 <= holdout < 1, a window per process")


CONVERGED = 1e-8            # NMSE at which nothing is left to learn; float32 rounding lies at 1e-13
MAX_NMSE = 1e-3     # of a codec that merge.py takes: 3 % of error; beyond it a loss is seen to rise
STAGE2_RATE = 0.1           # of stage 1's peak, where nothing was cut off (see above)
NECK_WINDOWS = 8192         # for the neck's covariance: 131,072 chunks for 128 x 128 numbers
VALIDATION_WINDOWS = 256    # at most, in one batch: 262,144 weights


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then paper: cosine to zero."""
    ramp = max(1, round(warmup * steps))
    done = max(0, step - ramp) / max(1, steps - ramp)       # of the way down, 0 to 1
    return peak * min((step + 1) / ramp, 0.5 * (1 + math.cos(math.pi * done)))


class Windows:
    """All windows of the selected tensors of some checkpoints: numbered, and read when asked for,
    so that files may be larger than memory.  parents: [(checkpoint, [TensorSlot, ...]), ...]"""

    def __init__(self, parents, config, schedule):
        self.C, self.T, self.device = config.chunk, config.tokens, schedule.device
        self.tensors = [(checkpoint, slot) for checkpoint, slots in parents for slot in slots]
        counts = [-(-slot.n_chunks(self.C) // self.T) for _, slot in self.tensors]
        self.starts = [0, *itertools.accumulate(counts)]
        # Held out by name and position, so in all parents at once: two experts of one base agree
        # to a few per cent at the same position, and a window of one would give its twin away.
        seeds = [[schedule.seed, zlib.crc32(slot.name.encode())] for _, slot in self.tensors]
        draws = [np.random.default_rng(seed).random(n) for seed, n in zip(seeds, counts)]
        order = np.random.default_rng(schedule.seed).permutation(self.starts[-1])
        held = (np.concatenate(draws) < schedule.holdout)[order]
        self.training = order if held.all() else order[~held]       # if one is empty: all windows
        self.validation = self.read((order[held] if held.any() else order)[:VALIDATION_WINDOWS])

    def read(self, numbers):
        """(x_BTC standardised float32, real_BTC bool) of these windows."""
        pairs = []
        for number in numbers:
            tensor = bisect.bisect(self.starts, number) - 1         # whose window it is
            (checkpoint, slot), w = self.tensors[tensor], int(number) - self.starts[tensor]
            flat_L = checkpoint.read(slot.name, w * self.T * self.C, (w + 1) * self.T * self.C)
            pairs.append(to_windows(*chunk(standardise(flat_L, slot), self.C), self.T))
        return [torch.cat(part).to(self.device) for part in zip(*pairs)]


@torch.no_grad()
def start_neck(vae, windows, batch):
    """Between the stages: the neck starts in the principal directions of stage 1's latents."""
    moments, chosen = Moments(), windows.training[:NECK_WINDOWS]
    for numbers in np.array_split(chosen, -(-len(chosen) // batch)):
        x_BTC, real_BTC = windows.read(numbers)
        real_BT = real_BTC.any(dim=-1)
        moments.add(vae.encode_stream(x_BTC, real_BT)[real_BT].cpu())
    vae.set_neck(moments.mean_Z.float(), moments.cov_ZZ)


def stage_loss(vae, stage, x_BTC, real_BTC, generator):
    """(loss, mse, kl): stage 1 mse / 2; stage 2 Eq. 1, with one sample of each code."""
    real_BT = real_BTC.any(dim=-1)
    if stage == 1 and vae.config.true_ratio > 1:                        # not through the neck
        decoded_BTC = vae.decode_stream(vae.encode_stream(x_BTC, real_BT), real_BT)
    else:
        posterior = vae.encode(x_BTC, real_BT)                          # q(z | w)
        z_BTZ = sample(posterior, generator) if stage == 2 else posterior.mu_BTZ
        decoded_BTC = vae.decode(z_BTZ, real_BT)                        # p(w | z)
    if stage == 1:
        mse = masked_mse(decoded_BTC, x_BTC, real_BTC)
        return Loss(mse / 2, mse, torch.zeros(()))                      # no KL
    return vae_loss(decoded_BTC, posterior, x_BTC, real_BTC, vae.config.beta, vae.config.true_ratio)


@torch.no_grad()
def validate(vae, windows, stage):
    """Figures on held-out windows: `objective`, the stage's loss; `nmse` of the mean code; in stage
    2 `kl` per latent number in nats, `sigma`, the mean posterior deviation, and `active`, the share
    of latent numbers whose variance is above 0.01 (Burda et al. 2016)."""
    x_BTC, real_BTC = windows.validation
    loss, mse, kl = stage_loss(vae, stage, x_BTC, real_BTC, torch.Generator().manual_seed(0))
    figures = {"objective": loss, "nmse": mse}          # stage 1 has no more
    if stage == 2:
        real_BT = real_BTC.any(dim=-1)
        mu_BTZ, logvar_BTZ = vae.encode(x_BTC, real_BT)
        figures["nmse"] = masked_mse(vae.decode(mu_BTZ, real_BT), x_BTC, real_BTC)
        figures |= {"kl": kl, "sigma": (0.5 * logvar_BTZ[real_BT]).exp().mean()}
        figures["active"] = (mu_BTZ[real_BT].var(dim=0, correction=0) > 0.01).float().mean()
    return {key: value.item() for key, value in figures.items()}        # numbers, for JSON


def train_step(vae, windows, schedule, stage, optimiser, picks, generator):
    """One batch, one step of AdamW. Under torchrun each process takes its part of the batch."""
    rank, size = rank_and_size()
    chosen = picks.integers(len(windows.training), size=schedule.batch)[rank::size]
    x_BTC, real_BTC = windows.read(windows.training[chosen])
    with torch.autocast(x_BTC.device.type, torch.bfloat16, enabled=schedule.dtype == "bfloat16"):
        loss = stage_loss(vae, stage, x_BTC, real_BTC, generator)[0]    # in nats per weight
    optimiser.zero_grad(set_to_none=True)
    loss.backward()                             # float32, whatever the products were
    for parameter in vae.parameters() if size > 1 else []:
        if parameter.grad is not None:      # data-parallel: the mean of all processes' gradients
            distributed.all_reduce(parameter.grad.div_(size))
    torch.nn.utils.clip_grad_norm_(vae.parameters(), schedule.clip)
    optimiser.step()        # AdamW


def run_stage(vae, windows, schedule, stage, steps, peak, log):
    """One stage, to its best held-out state, the start included: no training leaves a codec worse.
    Returns its record; `ended`: converged, steps, or interrupted (Ctrl-C)."""
    decay, warmup, rank = schedule.weight_decay, schedule.warmup, rank_and_size()[0]
    optimiser = torch.optim.AdamW(vae.parameters(), peak, (0.9, 0.95), weight_decay=decay)
    picks = np.random.default_rng((schedule.seed, stage))       # the same in every process
    generator = generator_for(schedule.seed, stage, rank)       # noise of its own
    best, state, ended, began = {}, None, "", time.perf_counter()
    bar = tqdm(range(steps + 1), f"stage {stage}", leave=False, disable=schedule.quiet or None)
    try:
        for step in bar:
            rate = optimiser.param_groups[0]["lr"] = learning_rate(step, steps, peak, warmup)
            if step % max(1, steps // schedule.checks) == 0 or step == steps:
                figures, seconds = validate(vae, windows, stage), time.perf_counter() - began
                need(math.isfinite(figures["objective"]), "training", "infinite loss", "lower --lr")
                log({"stage": stage, "step": step, "seconds": seconds, "lr": rate, **figures})
                bar.set_postfix(NMSE=f"{figures['nmse']:.1e}", KL=f"{figures.get('kl', 0):.2f}")
                if not best or figures["objective"] < best["objective"]:
                    best, state = {**figures, "best_step": step}, copy.deepcopy(vae.state_dict())
                if figures["nmse"] < CONVERGED or step == steps:
                    ended = "converged" if figures["nmse"] < CONVERGED else "steps"
                    break           # before the step: `best` has seen this state
            train_step(vae, windows, schedule, stage, optimiser, picks, generator)
    except KeyboardInterrupt:       # Ctrl-C: the best state so far is worth keeping
        need(best, "training", "interrupted before its first check", "run it again")
        ended = "interrupted"
    vae.load_state_dict(state)              # the best, not the last
    return {**best, "stage": stage, "steps": step, "lr": peak, "ended": ended, "seconds": seconds}


def train_vae(parents, config, schedule=Schedule(), log=lambda record: None, start=None):
    """The whole curriculum: (vae, [record of each stage]).  parents: as for Windows, with one VAE
    for all.  start: a trained VAE, which goes on in stage 2.  An infinite loss is an error."""
    gather(None)        # under torchrun: the processes meet
    vae = copy.deepcopy(start or VAE(config, generator_for(schedule.seed))).to(schedule.device)
    windows, stages = Windows(parents, vae.config, schedule), []
    peak = schedule.lr or (8e-3 if vae.config.init == "random" and not start else 1e-4)
    if not start:
        stages.append(run_stage(vae, windows, schedule, 1, schedule.steps1, peak, log))
        if vae.config.true_ratio > 1:
            start_neck(vae, windows, schedule.batch)    # the cut from D to Z numbers
        else:
            peak *= STAGE2_RATE                         # nothing was cut off: to refine
    if start or stages[0]["ended"] != "interrupted":
        stages.append(run_stage(vae, windows, schedule, 2, schedule.steps2, peak, log))
    vae.ready = True                # its codes mean something now
    return vae.eval(), stages       # at its best


def save_vae(path, vae, stages, **facts):
    """The VAE file. Wall times stay out of it: same inputs and seed, same bytes."""
    record = [{key: value for key, value in stage.items() if key != "seconds"} for stage in stages]
    write_tensors(path, *vae.to_file({"stages": record, **facts}))


def describe_stage(record):
    parts = ", ".join(f"{key} {record[key]:.4g}" for key in (
        "nmse", "kl", "sigma", "active", "steps", "best_step", "seconds") if key in record)
    return f"stage {record['stage']}: held-out {parts}; ended: {record['ended']}"


# --- What both commands share ---------------------------------------------------------------------
def gather(value):
    """[value of process 0, of process 1, ...], in every process of a torchrun; alone, [value]."""
    values = [value] * rank_and_size()[1]       # to be filled in
    if len(values) > 1 and not distributed.is_initialized():    # a day: one has the largest tensor
        distributed.init_process_group("gloo", timeout=datetime.timedelta(days=1))
        atexit.register(distributed.destroy_process_group)      # else an exit may abort
    try:
        if len(values) > 1:
            distributed.all_gather_object(values, value)
        return values
    except RuntimeError:        # another process has gone, and has said why
        raise SystemExit(1) from None


def pick_device(name):
    """"auto", "cpu" or "cuda" -> a torch device; under torchrun each process takes its own GPU."""
    found, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    need(found or name != "cuda", "--device cuda", "torch finds no CUDA device", "use --device cpu")
    return f"cuda:{local % torch.cuda.device_count()}" if found and name != "cpu" else "cpu"


def regex(text):
    try:        # argparse then names the flag
        return re.compile(text).pattern
    except re.error:
        raise ValueError from None


def start_parser(name, doc, texts, switches=""):
    """(parser, its add) with the flags of both commands; --help prints the module's docstring."""
    parser = Parser(prog=name, usage=argparse.SUPPRESS, description=doc,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = partial(parser.add_argument, help=argparse.SUPPRESS)
    add("--select", type=regex)
    add("--seed", type=int, default=0)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    for flag in texts.split():
        add("--" + flag)
    for flag in ["force", "quiet", *switches.split()]:
        add("--" + flag, action="store_true")
    if rank_and_size()[0]:      # under torchrun the first process speaks for all
        sys.stdout = open(os.devnull, "w")
        parser.set_defaults(quiet=True)
    return parser, add


def parse(argv):
    """(arguments, VAEConfig, Schedule)."""
    parser, add = start_parser("train.py", __doc__, "log")
    add("checkpoints", nargs="+")
    add("-o", "--output", default="vae.safetensors")
    add("--init", default="pca")
    add("--width", type=int, default=argparse.SUPPRESS)     # as large as --chunk needs
    for name in "chunk tokens blocks heads ratio beta steps1 steps2 lr batch holdout".split():
        default = getattr(VAEConfig, name, None) or getattr(Schedule, name)
        add(f"--{name}", type=type(default), default=default)
    a = parser.parse_intermixed_args(argv)
    pairs = 2 * max(1, a.heads)         # for each head's rotation
    roomy = -(-max(VAEConfig.width, a.chunk) // pairs) * pairs      # room for a chunk
    given = {"width": roomy, **vars(a), "device": pick_device(a.device)}
    if a.init not in ("pca", "random"):
        given["init"] = VAEConfig.init
        if any(given[field.name] != field.default for field in fields(VAEConfig)):
            parser.error("--init FILE brings its network: drop the network's flags")
    try:
        return [a, *(kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})
                     for kind in (VAEConfig, Schedule))]
    except ValueError as error:
        parser.error(str(error))


def main(argv=None):
    a, config, schedule = parse(argv)
    codec = None if a.init in ("pca", "random") else Codec.load(a.init)
    checkpoints = [Checkpoint(path) for path in a.checkpoints]
    inputs = [file for reader in [*checkpoints, *filter(None, [codec])] for file in reader.files]
    check_output(a.output, inputs, a.force)
    if a.log:       # it may exist: it is appended to
        check_output(a.log, [*inputs, a.output], force=True)
    parents = []
    for checkpoint in checkpoints:
        entries = [e for e in checkpoint.entries.values() if is_selected(e, a.select)]
        need(entries, checkpoint.path, "no tensor is selected", "change --select")
        parents.append((checkpoint, [measure(checkpoint, entry.name) for entry in entries]))
        print(f"{checkpoint.path}: {len(entries)} tensors")
    first = rank_and_size()[0] == 0     # under torchrun only the first process writes
    with open(a.log if a.log and first else os.devnull, "a") as stream:
        vae, stages = train_vae(parents, config, schedule, lambda record: print(
            json.dumps(record), file=stream, flush=True), codec and codec.vae)
    print(*map(describe_stage, stages), sep="\n")
    if first:
        save_vae(a.output, vae, stages, trained_on=[*map(os.path.basename, a.checkpoints)],
                 select=a.select, schedule=asdict(schedule))
        print(f"wrote {a.output}: r = {vae.config.true_ratio:g}")
    if stages[-1]["nmse"] > MAX_NMSE:
        print(f"note: no merge will take it, as its NMSE is above {MAX_NMSE:g}: lower --ratio?")
    return 130 if stages[-1]["ended"] == "interrupted" else 0       # as shells expect


if __name__ == "__main__":
    sys.exit(command(main))
