"""train.py: the two-stage curriculum.                                                 (read fifth, after align.py)

    python train.py CHECKPOINT [CHECKPOINT ...] -o vae.safetensors [options]

Paper: abstract, Sec. 3.2. Stage 1 trains a deterministic, high-capacity autoencoder (KL off); stage 2 inserts the
compact neck and turns the KL on. Why two: weights have heavy tails and a small variance, and a VAE trained
from scratch with the KL collapses before it has learnt anything worth regularising.

    stage 1   mse / 2                                          latent = the stream, D numbers per chunk
    stage 2   mse / 2 + (beta_t / r) kl                        latent = the neck, Z = C / r numbers per chunk
              (+ mse to stage 1's output / 2, with distillation)

Between them the neck is set: the principal directions of stage 1's latents, and at r > 1 those of each tensor on its own
(`set_necks`). What enters: windows of standardised weights, read from the files as they are needed (a batch is all that is
held in float32). What leaves: a VAE file (safetensors; configuration and training record in its header).
"""
import atexit, bisect, contextlib, copy, hashlib, itertools, json, math, os, sys, time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta

import torch
from torch import distributed
from tqdm import tqdm

from align import Moments
from chunking import (Checkpoint, CheckpointError, Parser, check_output, chunk, command, is_selected,
                      measure, natural_key, open_checkpoint, scale, to_windows, write_tensors)
from vae import VAE, VAEConfig, masked_mse, sample, vae_loss


@dataclass(frozen=True)
class Schedule:
    steps1: int = 1000          # stage 1, at most: it ends where it has converged
    steps2: int = 200           # stage 2
    lr: float | None = None     # peak; None: 1e-4 (paper), but 8e-3 from a random start, best of 1e-3 to 2e-2 at width 128 (a wider
    #                             network wants less)
    batch: int = 64             # windows per step (64 x 16 chunks: the size at which a CPU multiplies fastest)
    holdout: float = 0.1        # fraction of windows kept for validation
    warmup: float = 0.1         # fraction of each stage: learning rate from 0, and in stage 2 twice that for beta
    distil: bool = False        # stage 2 also matches stage 1's output. paper: "distilling to a compact code". ours: off, because on
    #                             the same steps the code without it has the lower held-out loss (experiments/curriculum.py)
    weight_decay: float = 1e-5  # paper: AdamW, 1e-5
    clip: float = 1.0           # paper: gradient clipping, no value given
    checks: int = 20            # validations per stage; the best state is kept
    patience: int = 8           # a stage ends after this many checks without a better one: a new neck is at first worse than
    #                             its start, and from a random network needed a third of the stage to pass it

    def __post_init__(self):
        for name in ("steps1", "steps2"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}, must be 1 or more")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout is {self.holdout}, must be at least 0 and below 1")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr is {self.lr}, must be above 0")


# NMSE at which a stage has nothing left to learn (float32 rounding lies at 1e-13). Stage 2 as well: an exact neck comes with the
# posterior variance that is optimal for Eq. 1 (`set_neck`), and no run of it has left a better state than its start.
CONVERGED = 1e-8
NECK_WINDOWS = 8192             # windows for the shared neck's covariance at most: 131,072 chunks for 64 x 64 numbers
PLACE_WINDOWS = 512             # and for a single tensor's
STRENGTHS = 1, 4, 16, 64        # of the shrinkage of a tensor's own neck: the first that held-out windows stand is taken
TOLERATED = 1.01                # their NMSE, over that with one neck for all
VALIDATION_WINDOWS = 256        # at most, per check


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then paper: cosine to zero."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def beta_at(step, steps, beta, warmup):
    """ours: beta rises linearly over the first 2 x warmup of stage 2, so that the new neck can settle first."""
    return beta * min(1.0, (step + 1) / max(1, round(2 * warmup * steps)))


class Windows:
    """All windows of the selected tensors of some checkpoints, read on demand and in any order: files may be larger than
    memory, as one byte per window is all that is kept.

    parents: list of (Checkpoint, [TensorSlot, ...]). Windows are numbered through the tensors; each is read with one call
    and scaled with its slot's statistics. places: the slots' keys that have a neck of their own.
    """

    def __init__(self, parents, config, holdout, generator):
        self.C, self.T = config.chunk, config.tokens
        self.tensors = [(checkpoint, slot) for checkpoint, slots in parents for slot in slots]
        self.places = [config.places.index(slot.key) if config.places else None for _, slot in self.tensors]
        counts = [-(-slot.n_chunks(self.C) // self.T) for _, slot in self.tensors]
        self.starts = [0, *itertools.accumulate(counts)]
        # Held out by place, in all parents at once: two experts of one base agree to a few per cent at the same place,
        # so a window of one would give its twin in the other away.
        longest = {}
        for (_, slot), count in zip(self.tensors, counts):
            longest[slot.name] = max(count, longest.get(slot.name, 0))
        total = sum(longest.values())
        held = torch.zeros(total, dtype=torch.bool)
        held[torch.randperm(total, generator=generator)[:min(round(holdout * total), total - 1)]] = True
        held = dict(zip(longest, held.split(list(longest.values()))))
        self.held = torch.cat([held[slot.name][:count] for (_, slot), count in zip(self.tensors, counts)])
        seen = self.held.nonzero()[:, 0] if self.held.any() else torch.arange(len(self.held))
        self.validation = seen[torch.randperm(len(seen), generator=generator)[:VALIDATION_WINDOWS]].tolist()

    def draw(self, count, generator):
        """Training windows at random, with replacement."""
        picks = torch.randint(len(self.held), (count,), generator=generator)
        while (held := self.held[picks]).any():
            picks[held] = torch.randint(len(self.held), (int(held.sum()),), generator=generator)
        return picks.tolist()

    def some(self, count, tensors, generator):
        """At most `count` different training windows of the tensors with these numbers, in random order."""
        numbers = torch.cat([torch.arange(self.starts[i], self.starts[i + 1]) for i in tensors])
        numbers = numbers[~self.held[numbers]]
        return numbers[torch.randperm(len(numbers), generator=generator)[:count]].tolist()

    def read(self, numbers):
        """x_BTC standardised float32, real_BTC bool (1 = weight), place: (B,) for `VAE.encode`, or None."""
        pairs, places = [], []
        for number in numbers:
            tensor = bisect.bisect(self.starts, number) - 1
            (checkpoint, slot), w = self.tensors[tensor], number - self.starts[tensor]
            flat_L = checkpoint.read(slot.name, w * self.T * self.C, (w + 1) * self.T * self.C)
            pairs.append(to_windows(*chunk(scale(flat_L, slot), self.C), self.T))
            places.append(self.places[tensor])
        x, real = zip(*pairs)
        return torch.cat(x), torch.cat(real), None if None in places else torch.tensor(places)

    def batches(self, numbers, size, device):
        for start in range(0, len(numbers), size):
            yield [part if part is None else part.to(device) for part in self.read(numbers[start:start + size])]


@torch.no_grad()
def set_necks(vae, windows, batch, device):
    """The neck's start, from stage-1 latents of training windows: one neck for all, then one for each place, shrunk towards
    the former no more than held-out windows ask for, but all the way where they ask for it: where tensors are alike, few
    chunks have only their noise to add."""
    def moments(numbers):
        total = Moments()
        for x_BTC, real_BTC, _ in windows.batches(numbers, batch, device):
            real_BT = real_BTC.any(dim=-1)
            total.add(vae.encode_stream(x_BTC, real_BT)[real_BT].cpu())
        return total
    generator = torch.Generator().manual_seed(0)
    everywhere = moments(windows.some(NECK_WINDOWS, range(len(windows.tensors)), generator))
    vae.set_neck(everywhere.mean_Z.float(), everywhere.cov_ZZ)
    own = {strength: [] for strength in STRENGTHS if vae.config.places}
    for place in range(len(vae.config.places)):
        here = moments(windows.some(PLACE_WINDOWS, [number for number, its in enumerate(windows.places) if its == place], generator))
        for strength in own:
            own[strength].append(vae.own_neck(here, everywhere, strength).float())
    shared = validate(vae, windows, 2, batch, device)["nmse"] if own else None
    for necks in own.values():
        vae.set_own_necks(torch.stack(necks))
        if validate(vae, windows, 2, batch, device)["nmse"] <= TOLERATED * shared:
            return
    vae.set_own_necks(torch.zeros_like(vae.own_widen))


@torch.no_grad()
def validate(vae, windows, stage, batch, device):
    """Figures on held-out windows (on any where the holdout is empty): `nmse` of the mean code, `objective`
    = Eq. 1 with one sample per code, `kl` per latent number in nats, `active` = share of latent numbers whose posterior
    mean varies by more than 0.01 (Burda et al., active units), `sigma` = mean posterior standard deviation."""
    generator = torch.Generator().manual_seed(0)           # the same noise at every check: objectives are comparable
    squares, weights, kl, objective, sigma, means = 0.0, 0, 0.0, 0.0, 0.0, []
    for x_BTC, real_BTC, place_B in windows.batches(windows.validation, batch, device):
        real_BT, count = real_BTC.any(dim=-1), int(real_BTC.sum())
        if stage == 1:
            decoded_BTC = vae.decode_stream(vae.encode_stream(x_BTC, real_BT), real_BT)
            objective += masked_mse(decoded_BTC, x_BTC, real_BTC).item() / 2 * count
        else:
            posterior = vae.encode(x_BTC, real_BT, place_B)
            decoded_BTC = vae.decode(posterior.mu_BTZ, real_BT, place_B)
            noisy_BTC = vae.decode(sample(posterior, generator), real_BT, place_B)
            loss = vae_loss(noisy_BTC, posterior, x_BTC, real_BTC, vae.config.beta, vae.config.true_ratio)
            objective, kl = objective + loss.total.item() * count, kl + loss.kl.item() * count
            sigma += (0.5 * posterior.logvar_BTZ[real_BT]).exp().mean().item() * count
            means.append(posterior.mu_BTZ[real_BT])
        squares, weights = squares + masked_mse(decoded_BTC, x_BTC, real_BTC).item() * count, weights + count
    figures = {"nmse": squares / weights, "objective": objective / weights}
    if stage == 2:
        active = (torch.cat(means).var(dim=0) > 0.01).float().mean().item() if sum(map(len, means)) > 1 else 0.0
        figures.update(kl=kl / weights, sigma=sigma / weights, active=active)
    return figures


def stage_loss(vae, teacher, stage, batch, beta, generator, ours=(1.0, 1.0), rank=0, size=1):
    """The loss of one batch: (total, mse, kl). Stage 1 never touches the neck, so the neck gets no gradient there.

    ours: the fraction of the whole batch's weights and chunks that this process holds: the processes' totals then add up to
    the means over the whole batch, however the padding falls.
    """
    x_BTC, real_BTC, place_B = batch
    real_BT, (weights, chunks) = real_BTC.any(dim=-1), ours
    if stage == 1:
        mse = masked_mse(vae.decode_stream(vae.encode_stream(x_BTC, real_BT), real_BT), x_BTC, real_BTC)
        return weights * mse / 2, mse, torch.zeros(())
    posterior = vae.encode(x_BTC, real_BT, place_B)
    decoded_BTC = vae.decode(sample(posterior, generator, rank, size), real_BT, place_B)
    loss = vae_loss(decoded_BTC, posterior, x_BTC, real_BTC, beta, vae.config.true_ratio, weights, chunks)
    if teacher is None:
        return loss
    with torch.no_grad():
        taught_BTC = teacher.decode_stream(teacher.encode_stream(x_BTC, real_BT), real_BT)
    return loss._replace(total=loss.total + weights * masked_mse(decoded_BTC, taught_BTC, real_BTC) / 2)


@dataclass
class Run:
    """What the stages share. `state`: file that is rewritten at every check, so that a run can go on where it stopped."""
    vae: VAE
    windows: Windows
    schedule: Schedule
    generator: torch.Generator
    device: str
    autocast: object
    quiet: bool
    log: object
    state: str | None = None
    plan: str = ""              # what the state must agree with: configuration, schedule, seed, data

    def keep(self, progress, optimiser, best_state, teacher):
        """Write everything that the rest of the run depends on; a full disk leaves the last state as it was."""
        parts = {"vae": self.vae.state_dict(), "best": best_state, "teacher": teacher.state_dict() if teacher else {}}
        tensors = {f"{part}.{name}": tensor for part, group in parts.items() for name, tensor in group.items()}
        tensors |= {f"adam.{i}.{key}": value for i, group in optimiser.state_dict()["state"].items() for key, value in group.items()}
        write_tensors(self.state, tensors | {"generator": self.generator.get_state()},
                      {"lsmerge.state": json.dumps(progress), "lsmerge.plan": self.plan})

    def load(self):
        """(progress, best state, teacher, Adam's moments) of the last check; the network and the generator take theirs."""
        file = Checkpoint(self.state)
        if file.metadata.get("lsmerge.plan") != self.plan or "lsmerge.state" not in file.metadata:
            raise CheckpointError(self.state, "is of another run (inputs, flags or seed differ)", "give the same command, or drop --resume")
        parts = {}
        for name in file.entries:
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = file.read_tensor(name)
        self.vae.load_state_dict(parts["vae"])
        self.generator.set_state(parts["generator"][""])
        teacher = copy.deepcopy(self.vae).requires_grad_(False) if "teacher" in parts else None
        if teacher:
            teacher.load_state_dict(parts["teacher"])
        moments = {}
        for name, value in parts.get("adam", {}).items():
            moments.setdefault(int(name.split(".")[0]), {})[name.split(".")[1]] = value
        return json.loads(file.metadata["lsmerge.state"]), parts["best"], teacher, moments


def check_held_out(run, stage, step, best):
    """Figures of `validate`, logged; a loss that is no number ends the run."""
    figures = validate(run.vae, run.windows, stage, run.schedule.batch, run.device)
    if not math.isfinite(figures["objective"]):
        raise FloatingPointError(f"stage {stage}: the held-out loss is {figures['objective']} at step {step}, the last good "
                                 f"NMSE was {best['nmse'] if best else math.nan:.3e}; fix: lower --lr")
    run.log({"stage": stage, "step": step, **figures})
    return figures


def train_step(run, stage, teacher, step, steps, optimiser, best):
    """One batch, one step of AdamW: warm-up and cosine, clipping. Under torchrun each process takes its part of the batch."""
    schedule, (rank, size) = run.schedule, rank_and_size()
    (batch,) = run.windows.batches(run.windows.draw(schedule.batch, run.generator)[rank::size], schedule.batch, run.device)
    counts = gather((int(batch[1].sum()), int(batch[1].any(dim=-1).sum())))
    ours = [mine / sum(every) for mine, every in zip(counts[rank], zip(*counts))]
    with run.autocast:
        beta = beta_at(step, steps, run.vae.config.beta, schedule.warmup)
        loss = stage_loss(run.vae, teacher, stage, batch, beta, run.generator, ours, rank, size)
    if not math.isfinite(loss[0].item()):
        raise FloatingPointError(f"stage {stage}: the loss is {loss[0].item()} at step {step}, the last good held-out "
                                 f"NMSE was {best['nmse']:.3e}; fix: lower --lr")
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(step, steps, schedule.lr, schedule.warmup)
    optimiser.zero_grad(set_to_none=True)
    loss[0].backward()
    for parameter in run.vae.parameters() if size > 1 else []:
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
    torch.nn.utils.clip_grad_norm_(run.vae.parameters(), schedule.clip)
    optimiser.step()


def run_stage(run, stage, teacher, first=None, resumed=None):
    """One stage; the state with the best held-out objective is kept, the start included, so that training can never
    leave a codec worse than it found it. Returns the stage's record. `resumed`: what Run.load returned."""
    vae, schedule, steps, began = run.vae, run.schedule, (run.schedule.steps1, run.schedule.steps2)[stage - 1], time.perf_counter()
    optimiser = torch.optim.AdamW(vae.parameters(), lr=schedule.lr, betas=(0.9, 0.95), weight_decay=schedule.weight_decay)
    start, best, best_state, stale, every = 0, None, None, 0, max(1, steps // schedule.checks)
    if resumed:
        (_, start, best, stale, _), best_state, _, moments = resumed
        optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    bar = tqdm(range(start, steps + 1), desc=f"stage {stage}", disable=True if run.quiet else None, leave=False)
    for step in bar:
        if (step % every == 0 or step == steps) and not (resumed and step == start):
            figures = check_held_out(run, stage, step, best)
            bar.set_postfix(NMSE=f"{figures['nmse']:.2e}", KL=f"{figures.get('kl', 0):.3f}")
            better = best is None or figures["objective"] < best["objective"]
            if better:
                best, best_state = {**figures, "best_step": step}, copy.deepcopy(vae.state_dict())
            stale = 0 if better else stale + 1
            if step == steps or stale == schedule.patience or figures["nmse"] < CONVERGED:
                break
            if run.state and rank_and_size()[0] == 0:
                run.keep((stage, step, best, stale, first), optimiser, best_state, teacher)
        train_step(run, stage, teacher, step, steps, optimiser, best)
    vae.load_state_dict(best_state)
    return {**best, "stage": stage, "steps": step, "lr": schedule.lr, "seconds": round(time.perf_counter() - began, 2)}


def train_vae(parents, config, schedule=Schedule(), seed=0, device="cpu", dtype=torch.float32, quiet=True, log=lambda record: None,
              state=None, resume=False):
    """The curriculum, whole. Returns (vae, list of the stages' records).

    parents: list of (Checkpoint, [TensorSlot, ...]); several checkpoints share one VAE.
    state:   a file for the state at the last check; with `resume` the run goes on from there, to the same bits
    Raises:  FloatingPointError (non-finite loss), CheckpointError
    """
    if schedule.lr is None:
        schedule = replace(schedule, lr=1e-4 if config.init == "pca" else 8e-3)
    keys = {slot.key for _, slots in parents for slot in slots} if config.necks == "tensor" and config.latent < config.chunk else ()
    config = replace(config, places=tuple(sorted(keys, key=natural_key)))
    generator = torch.Generator().manual_seed(seed)
    vae = VAE(config, generator).to(device)
    windows = Windows(parents, config, schedule.holdout, generator)
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16) if dtype == torch.bfloat16 else contextlib.nullcontext()
    data = [[(slot.name, slot.shape, slot.mean, slot.scale) for slot in slots] for _, slots in parents]
    plan = json.dumps([asdict(config), asdict(schedule), seed, str(dtype), hashlib.sha256(repr(data).encode()).hexdigest()])
    run = Run(vae, windows, schedule, generator, device, autocast, quiet, log, state, plan)
    resumed = run.load() if resume else None
    if resumed and resumed[0][0] == 2:
        first, teacher = resumed[0][4], resumed[2]
    else:
        first = run_stage(run, 1, None, resumed=resumed)   # stage 1: KL off, deterministic, full capacity
        resumed = None
        # An exact stage 1 (init="pca") teaches what the reconstruction term already does; an untrained network, nothing.
        useful = schedule.distil and schedule.steps1 > 0 and first["nmse"] >= CONVERGED
        teacher = copy.deepcopy(vae).requires_grad_(False) if useful else None
        set_necks(vae, windows, schedule.batch, device)
    second = run_stage(run, 2, teacher, first, resumed)    # stage 2: compact neck, KL on
    return vae.eval(), [first, second]


def add_codec_arguments(parser):
    """The VAE's and the schedule's flags, defaults taken from their dataclasses."""
    c, s = VAEConfig(), Schedule()
    parser.add_argument("--ratio", type=float, default=c.ratio, help="compression r = weights / latent numbers (%(default)s)")
    parser.add_argument("--chunk", type=int, default=c.chunk, help="weights per chunk (%(default)s)")
    parser.add_argument("--tokens", type=int, default=c.tokens, help="chunks per window (%(default)s)")
    parser.add_argument("--width", type=int, help=f"width of the network ({c.width}, or enough for the chunk)")
    parser.add_argument("--blocks", type=int, default=c.blocks, help="blocks in the encoder, and in the decoder (%(default)s)")
    parser.add_argument("--heads", type=int, default=c.heads, help="attention heads (%(default)s)")
    parser.add_argument("--init", choices=("pca", "random"), default=c.init, help="warm start, or the paper's (%(default)s)")
    parser.add_argument("--beta", type=float, default=c.beta, help="weight of the KL term (%(default)s)")
    parser.add_argument("--steps1", type=int, default=s.steps1, help="steps of stage 1 at most (%(default)s)")
    parser.add_argument("--steps2", type=int, default=s.steps2, help="steps of stage 2 (%(default)s)")
    parser.add_argument("--lr", type=float, default=s.lr, help="peak learning rate (1e-4; from a random start 8e-3)")
    parser.add_argument("--batch", type=int, default=s.batch, help="windows per step (%(default)s)")
    parser.add_argument("--holdout", type=float, default=s.holdout, help="fraction of windows for validation (%(default)s)")


def describe_stage(record):
    """One printed line per stage."""
    line = f"stage {record['stage']}: {record['steps']} steps, {record['seconds']:.1f} s, held-out NMSE {record['nmse']:.2e}"
    if record["stage"] == 2:
        line += f", KL {record['kl']:.3f} nats, active {record['active']:.0%}, sigma {record['sigma']:.4f}, best at step {record['best_step']}"
    return line + (" (nothing to learn: the warm start is exact)" if record["steps"] == 0 and record["nmse"] < CONVERGED else "")


def codec_settings(arguments, parser):
    """(VAEConfig, Schedule) from the flags; a value that is wrong on its face is a usage error (exit code 2)."""
    pairs = 2 * max(1, arguments.heads)                    # a width that no flag gives is rounded up to fit the heads
    given = vars(arguments) | {"width": -(-max(VAEConfig().width, arguments.chunk) // pairs) * pairs if arguments.width is None else arguments.width}
    try:
        return [kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given}) for kind in (VAEConfig, Schedule)]
    except ValueError as error:
        parser.error(str(error))


def seed(text):
    if not 0 <= int(text) < 2 ** 32:
        raise ValueError
    return int(text)


def add_machine_arguments(parser):
    parser.add_argument("--seed", type=seed, default=0, help="seed of everything random, below 2^32 (%(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute type (%(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite an existing output (never an input)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def pick_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("--device cuda", "this torch finds no CUDA device", "use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


# --- Several processes (torchrun). Alone, each of these is what its name says for one. --------------------------------
def rank_and_size(): return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def gather(value):
    """[value of process 0, of process 1, ...], in every process."""
    size = rank_and_size()[1]
    if size == 1:
        return [value]
    if not distributed.is_initialized():
        # Days: the others wait where one evaluates, or has the largest tensor.
        distributed.init_process_group("gloo", timeout=timedelta(days=7))
        atexit.register(distributed.destroy_process_group)     # else its threads may abort the interpreter's end
    values = [None] * size
    distributed.all_gather_object(values, value)
    return values


def agree(work):
    """work(), where it succeeds in every process; an error of one is everybody's, so that nobody waits for ever."""
    value, problem = None, None
    try:
        value = work()
    except (CheckpointError, OSError, FloatingPointError) as error:
        problem = error
    for other in gather(problem):
        if other:
            raise other
    return value


def vae_file(vae, stages, **facts):
    """(tensors, metadata) of the VAE file. Wall times stay out of it: same inputs and seed, same bytes."""
    return vae.to_file({"stages": [{key: value for key, value in stage.items() if key != "seconds"} for stage in stages], **facts})


def main(argv=None):
    parser = Parser(description="Train the VAE of LS-Merge on the weights of one or more checkpoints.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("-o", "--output", default="vae.safetensors", help="the VAE file (%(default)s)")
    parser.add_argument("--select", metavar="REGEX", help="which tensors (default: floats of >= 2 dimensions in numbered layers)")
    parser.add_argument("--log", metavar="FILE.jsonl", help="append one JSON line per validation")
    parser.add_argument("--resume", action="store_true", help="go on from the last state beside the output (OUTPUT.state), to the same bits")
    add_codec_arguments(parser)
    add_machine_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    config, schedule = codec_settings(arguments, parser)
    parser.check_select(arguments.select)
    device, first = pick_device(arguments.device), rank_and_size()[0] == 0
    checkpoints = [open_checkpoint(path) for path in arguments.checkpoints]
    inputs = [file for checkpoint in checkpoints for file in checkpoint.files]
    check_output(arguments.output, inputs, arguments.force)
    state = arguments.output + ".state"
    if os.path.exists(state) and not arguments.resume:
        check_output(state, inputs, arguments.force)       # the state of an unfinished run is an output, too
    if arguments.log:
        check_output(arguments.log, [*inputs, *filter(os.path.exists, [arguments.output])], force=True)
    parents = [(c, [measure(c, e.name) for e in c.entries.values() if is_selected(e, arguments.select)]) for c in checkpoints]
    for checkpoint, slots in parents:
        if not slots:
            raise CheckpointError(checkpoint.path, "no tensor is selected", "give --select a pattern that matches its names")
        print(f"{checkpoint.path}: {len(slots)} tensors, {sum(s.numel for s in slots):,} weights")
    print(f"r = {config.true_ratio:g}: {config.chunk} weights -> {config.latent} latent numbers")
    if schedule.batch % rank_and_size()[1]:
        parser.error(f"--batch {schedule.batch} cannot be shared by {rank_and_size()[1]} processes")
    with open(arguments.log, "a") if arguments.log and first else contextlib.nullcontext() as stream:
        def log(record):
            if stream:
                print(json.dumps(record, allow_nan=False), file=stream, flush=True)
        vae, stages = train_vae(parents, config, schedule, arguments.seed, device, getattr(torch, arguments.dtype),
                                arguments.quiet, log, state, arguments.resume)
    for record in stages:
        print(describe_stage(record))
    if not first:
        return
    write_tensors(arguments.output, *vae_file(vae, stages, seed=arguments.seed, select=arguments.select, schedule=asdict(schedule)))
    if os.path.exists(state):
        os.unlink(state)
    print(f"wrote {arguments.output} ({sum(p.numel() for p in vae.parameters()):,} parameters)")


if __name__ == "__main__":
    sys.exit(command(main))
