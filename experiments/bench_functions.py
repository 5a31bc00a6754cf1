"""The parts of bench.py that time functions in this process: --align, --codec, --training.

--align: align.py's Sinkhorn beside three solvers of POT (Python Optimal Transport), its Gaussian
map beside POT's. Every solver gets the iterations it needs for the same *measured* marginal error,
the larger L1 error of both sides of the plan it returns: 1e-9 at epsilon 0.05, 1e-6 below. POT's
own threshold is a 2-norm of one side, so it is not used: its solvers are all the plain iteration,
whose steps are counted beforehand. Times include the plan. Ratios are ours / POT's: below 1 is
faster. On a busy machine set OMP_NUM_THREADS=1, or threads wait for each other.

--codec: encoding and decoding of weights that lie in memory, as in merge.py (one thread per core,
each with a tensor of its own), in weights per second and as a fraction of the rate at which the
same threads multiply 1024 x 1024 matrices. `network`: encode and decode alone; `whole`: Codec, with
scaling and windows. `full`: every block computes; `exact`: the codec of --vae exact. Only what is
computed counts as operations. What limits the full one: at width 128 a matrix product does 128
multiplications per number that it reads, and the passes between (LayerNorm, rotation, attention
over 16, SiLU, sums) take a fifth of the time in float32, two fifths in bfloat16, whose products are
twice as fast and whose passes are not.

--training: seconds and steps to a held-out NMSE from the same files, without the checks' own time.
`release`: the recipe of the paper's release, one stage (Huber, MMD, KL, lr 1e-4) of --budget steps
at most; `curriculum`: `train_vae` from the same random start. What counts is a VAE: a check of
stage 2 after a step with the KL on. Not reached: the last NMSE is printed, the ratio is a lower
bound.
"""
import itertools
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import align
import chunking
import lsmerge
import merge
import train
from bench_models import full_network
from vae import VAE, Folded, VAEConfig, generator_for, kl_divergence, sample


def machine():
    """What a figure depends on and the code does not say."""
    return dict(python=platform.python_version(), torch=torch.__version__,
                threads=torch.get_num_threads(), load=round(os.getloadavg()[0], 2))


def interleaved(runs, rounds):
    """{name: function} -> {name: (median seconds, result)}, in rounds: load hits all alike."""
    seconds, results = {name: [] for name in runs}, {}
    for _ in range(rounds):
        for name, run in runs.items():
            if seconds[name] and seconds[name][0] > SLOW:
                continue
            start = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(seconds[name]), results[name]) for name in runs}


# --- --align -------------------------------------------------------------------------------------
SIZES = [(512, 512), (1024, 1536), (2048, 1024)]
CLOUDS = ("isotropic", "anisotropic", "heavy-tailed")
LATENT = 32                 # numbers per point
MOST_PLAIN = 3000           # POT stops here at the latest: a ratio is then an upper bound, marked <
SLOW = 10.0                 # seconds; what takes longer is timed once, not ROUNDS times
ROUNDS = 5
# POT solver -> what our time over its time should reach where plain iteration needs < 300 steps,
# and >= 300; whether the worst cell must reach it or the median
TARGETS = {"sinkhorn_log": (0.2, 0.2, "worst"), "sinkhorn_stabilized": (1.0, 1.0, "median"),
           "sinkhorn": (1.7, 0.5, "worst")}


def cloud(n, kind, generator):
    """(n, LATENT) float64 points of one of CLOUDS."""
    z = torch.randn(n, LATENT, generator=generator, dtype=torch.float64)
    if kind == "anisotropic":
        return z * torch.logspace(0, -2, LATENT, dtype=torch.float64)
    if kind == "heavy-tailed":      # Student t, 3 degrees of freedom, one scale per point
        half = torch.full((n, 1), 1.5, dtype=torch.float64)
        return z / (torch._standard_gamma(half, generator=generator) / 1.5).sqrt()
    return z


def plain_iterations(cost_IJ, epsilon, tolerance):
    """How many plain Sinkhorn iterations (v, then u, like POT) reach the tolerance, in tens."""
    I, J = cost_IJ.shape
    kernel = (cost_IJ / (-epsilon * cost_IJ.max())).exp()
    u = torch.full((I,), 1 / I, dtype=torch.float64)
    for iteration in range(1, MOST_PLAIN + 1):
        v = 1 / J / (kernel.T @ u)
        u = 1 / I / (kernel @ v)
        if iteration % 10 == 0 and (v * (kernel.T @ u) - 1 / J).abs().sum() <= tolerance:
            return iteration
    return MOST_PLAIN


def marginal_error(plan):
    """The larger L1 error of a plan's two sides, against uniform masses."""
    plan = torch.as_tensor(plan)
    n, m = plan.shape
    sides = plan.sum(1) - 1 / n, plan.sum(0) - 1 / m
    return max(side.abs().sum().item() for side in sides)


def sinkhorn_cell(ot, n, m, kind, epsilon, rounds):
    """One row: sizes, iterations, seconds, measured errors and ratios of ours and POT's solvers."""
    generator = torch.Generator().manual_seed(n + m)
    cost = align.squared_cost(cloud(n, kind, generator), cloud(m, kind, generator))
    tolerance = 1e-9 if epsilon >= 0.05 else 1e-6
    plain = plain_iterations(cost, epsilon, tolerance)
    runs = {"ours": partial(align.sinkhorn, cost, epsilon=epsilon, tolerance=tolerance)}
    if ot is not None:
        M = (cost / cost.max()).numpy()
        options = dict(reg=epsilon, numItermax=plain, stopThr=0.0, warn=False)
        runs |= {"sinkhorn": partial(ot.bregman.sinkhorn_knopp, [], [], M, **options),
                 "sinkhorn_stabilized": partial(ot.bregman.sinkhorn_stabilized, [], [], M, tau=1e6,
                                                **options),
                 "sinkhorn_log": partial(ot.bregman.sinkhorn_log, [], [], M, **options)}
    timed = interleaved(runs, rounds)
    ours = timed["ours"][1]
    plans = {name: result for name, (_, result) in timed.items()} | {"ours": ours.plan_IJ}
    return dict(what="sinkhorn", n=n, m=m, kind=kind, latent=LATENT, epsilon=epsilon,
                tolerance=tolerance, iterations=ours.iterations, plain_iterations=plain,
                capped=plain == MOST_PLAIN,
                seconds={name: round(s, 5) for name, (s, _) in timed.items()},
                errors={name: float(f"{marginal_error(plan):.2g}") for name, plan in plans.items()},
                ratios={name: round(timed["ours"][0] / timed[name][0], 3)
                        for name in TARGETS if name in timed})


def our_gaussian_map(x, y):
    return align.gaussian_map(align.Moments.of(x), align.Moments.of(y)).matrix_ZZ


def gaussian_cell(ot, n, d, rounds):
    """Fit of the Gaussian map, from two clouds to the matrix."""
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    y = y * torch.linspace(0.5, 2, d, dtype=torch.float64)
    runs = {"ours": partial(our_gaussian_map, x, y)}
    if ot is not None:
        runs["pot"] = partial(ot.gaussian.empirical_bures_wasserstein_mapping, x.numpy(), y.numpy(),
                              reg=1e-9)
    timed = interleaved(runs, rounds)
    row = dict(what="gaussian_map", n=n, latent=d, rounds=rounds,
               seconds={name: round(timed[name][0], 5) for name in timed})
    if ot is not None:
        difference = timed["ours"][1] - torch.as_tensor(timed["pot"][1][0])
        row["ratios"] = {"pot": round(timed["ours"][0] / timed["pot"][0], 3)}
        row["difference"] = float(f"{difference.abs().max().item():.2g}")
    return row


def print_cell(row):
    limit = "<" if row["capped"] else " "
    print(f"{row['n']:5} x {row['m']:<5} {row['kind']:12} {row['epsilon']:<6} "
          f"{row['iterations']:5} {row['plain_iterations']:6}{'+' if row['capped'] else ' '} "
          f"{1e3 * row['seconds']['ours']:9.1f}  {row['errors']['ours']:.0e}"
          + "".join(f"  {limit}{ratio:5.2f} ({row['errors'][name]:.0e})"
                    for name, ratio in row["ratios"].items()), flush=True)


def print_ratio(name, ratios, target, judged):
    if ratios:
        median, worst = statistics.median(ratios), max(ratios)
        passed = (worst if judged == "worst" else median) <= target
        print(f"  {name:40} median {median:5.2f}  worst {worst:5.2f}  of {len(ratios):2}  "
              f"target {target} ({judged})  {'pass' if passed else 'MISS'}")


def print_verdict(rows, gaussian):
    print("ours / POT over the cells, with the target beside it:")
    easy = [row for row in rows if row["plain_iterations"] < 300]
    hard = [row for row in rows if row["plain_iterations"] >= 300]
    for name, (easy_target, hard_target, judged) in TARGETS.items():
        for label, group, target in (("< 300", easy, easy_target), (">= 300", hard, hard_target)):
            ratios = [row["ratios"][name] for row in group]
            print_ratio(f"{name}, plain needs {label}", ratios, target, judged)
    name = f"gaussian map {gaussian['n']} x {gaussian['latent']}"
    print_ratio(name, [gaussian["ratios"]["pot"]], 0.6, "median")


def bench_align(quick):
    """Yields one row per cell, prints the table and the verdict."""
    try:
        import ot
    except ImportError:
        ot = None
        print("POT is not installed: only our own times, no ratios; fix: pip install POT")
    facts = machine() | dict(pot=getattr(ot, "__version__", None), rounds=2 if quick else ROUNDS)
    print(f"{facts}\nsize          cloud        eps    iter.  plain    ours ms  error"
          + "".join(f"  {name[9:] or 'plain':14}" for name in TARGETS if ot))
    rows = []
    cells = itertools.product(SIZES[:1] if quick else SIZES, CLOUDS, (0.05, 0.01, 0.005))
    for (n, m), kind, epsilon in cells:
        rows.append(sinkhorn_cell(ot, n, m, kind, epsilon, facts["rounds"]))
        print_cell(rows[-1])
        yield facts | rows[-1]
    gaussian = gaussian_cell(ot, 4096, 384, 5 * facts["rounds"])
    yield facts | gaussian
    print(f"gaussian map {gaussian['n']} x {gaussian['latent']}: {gaussian['seconds']} s")
    if ot is not None:
        print_verdict(rows, gaussian)


# --- --codec -------------------------------------------------------------------------------------
# Fraction of the matrix-multiply rate, full network at the default width, on the CPU.
CODEC_TARGETS = {"float32": 0.85, "bfloat16": 0.70}
MATRIX = {"cpu": 1024, "cuda": 8192}        # rows and columns of the products that are the measure


def half_operations(config, blocks, *others):
    """Multiplications and additions, both counted, of one half of the network on one window. Each
    token meets every matrix once, and T tokens twice."""
    weights = [p for part in (*blocks, *others) for p in part.parameters()]
    matrices = sum(p.numel() for p in weights if p.dim() == 2)
    return 2 * config.tokens * (matrices + len(blocks) * 2 * config.tokens * config.width)


def window_operations(codec):
    """(to encode, to decode) one window; the exact codec is one matrix each way."""
    vae, c = codec.vae, codec.vae.config
    if isinstance(codec.net, Folded):
        return (2 * c.tokens * c.chunk * c.latent,) * 2
    return (half_operations(c, vae.encoder, vae.embed, vae.neck_mu, vae.neck_logvar),
            half_operations(c, vae.decoder, vae.widen, vae.unembed))


def codec_operations(codec, entries, parents):
    """Operations of a merge: all parents are encoded, the result is decoded, and a sample of each
    parent goes both ways for the gate."""
    encode, decode = window_operations(codec)
    windows = sum(-(-entry.numel // (codec.C * codec.T)) for entry in entries)
    seen = sum(-(-min(e.numel, merge.GATE_WEIGHTS) // (codec.C * codec.T)) for e in entries)
    return parents * (windows + seen) * encode + (windows + parents * seen) * decode


def wait_for(device):
    """Until the device has done what it was told; a CPU has."""
    if device == "cuda":
        torch.cuda.synchronize()


def multiply(square):
    for _ in range(4):
        square @ square
    wait_for(square.device.type)


@torch.inference_mode()
def network_alone(codec, x_BTC):
    """Windows through encoder and decoder, in merge.py's batches."""
    for part_BTC in x_BTC.split(lsmerge.BATCH_CHUNKS // codec.T):
        codec.net.decode(codec.net.encode(part_BTC).mu_BTZ)
    wait_for(codec.device)


def whole_codec(codec, weights_L, slot):
    codec.decode(codec.encode(weights_L, slot), slot, len(weights_L))
    wait_for(codec.device)


def on_all(pool, count, run):
    """`run` on `count` threads at once."""
    for job in [pool.submit(run) for _ in range(count)]:
        job.result()


def codec_cell(dtype, width, device, rounds):
    """Rows of one width and arithmetic; everything in turns, each thread at work on its own."""
    side, threads = MATRIX[device], torch.get_num_threads()
    count = threads if device == "cpu" else 1
    weights_L = 0.02 * torch.randn(chunking.PIECE, generator=torch.Generator().manual_seed(0))
    slot = chunking.TensorSlot("w", torch.float32, (chunking.PIECE,), mean=0.0, scale=0.02)
    square = torch.ones(side, side, dtype=getattr(torch, dtype), device=device)
    runs, operations = {"rate": partial(multiply, square)}, {}
    for kind, vae in (("full", full_network(VAEConfig(width=width))),
                      ("exact", VAE(VAEConfig(width=width)))):
        codec = lsmerge.Codec(vae, device, square.dtype)
        x_BTC = chunking.standardise(weights_L, slot).reshape(-1, codec.T, codec.C)
        operations[kind] = len(x_BTC) * sum(window_operations(codec))
        runs[kind, "network"] = partial(network_alone, codec, x_BTC.to(device, square.dtype))
        runs[kind, "whole"] = partial(whole_codec, codec, weights_L, slot)
    torch.set_num_threads(max(1, threads // count))
    with ThreadPoolExecutor(count) as pool:
        timed = interleaved({name: partial(on_all, pool, count, run) for name, run in runs.items()},
                            rounds)
    torch.set_num_threads(threads)
    rate = count * 4 * 2 * side ** 3 / timed.pop("rate")[0]
    for (kind, part), (seconds, _) in timed.items():
        yield dict(what="codec", device=device, dtype=dtype, width=width, network=kind, part=part,
                   workers=count, gflops=round(rate / 1e9, 1),
                   weights_per_s=round(count * chunking.PIECE / seconds),
                   fraction=round(count * operations[kind] / seconds / rate, 3))


def print_codec(row):
    kind = row["device"], row["width"], row["network"], row["part"]
    verdict = ""
    if kind == ("cpu", VAEConfig().width, "full", "network"):
        target = CODEC_TARGETS[row["dtype"]]
        verdict = f"  target {target}  {'pass' if row['fraction'] >= target else 'MISS'}"
    print(f"{row['device']} {row['dtype']:8} width {row['width']} {row['network']:5} "
          f"{row['part']:7} {row['weights_per_s'] / 1e6:8.2f} M weights/s  "
          f"{row['fraction']:.3f} of {row['gflops']:.0f} GFLOP/s{verdict}", flush=True)


def bench_codec(quick):
    """Yields a row per device, width, dtype, network (full, exact) and part (network, whole)."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device, width, dtype in itertools.product(devices, (VAEConfig().width, 256), CODEC_TARGETS):
        facts = machine()
        for row in codec_cell(dtype, width, device, 3 if quick else 25):
            print_codec(row)
            yield facts | row
    if "cuda" not in devices:
        print("GPU: not run")


# --- --training ----------------------------------------------------------------------------------
REACH = 1e-2                # held-out NMSE
REACHES = (1e-1, 1e-2, 1e-3, 1e-4)      # whose times are recorded as well
# Reaches it from every seed tried, and soon.
CURRICULUM = train.Schedule(steps1=250, steps2=150, batch=16, checks=15)


def mmd(z_NZ, generator, most=512):
    """Squared maximum mean discrepancy to N(0, I); Gaussian kernels whose variance is 1/2, 1 and 2
    times that of Z unit numbers."""
    z_NZ = z_NZ[torch.randperm(len(z_NZ), generator=generator)[:most]]
    both = torch.cat([z_NZ, torch.randn(z_NZ.shape, generator=generator)])
    # A product: the gradient of torch.cdist takes longer than the network's.
    square, n = both.square().sum(1), len(both) // 2
    wide = ((2 * both @ both.T - square - square[:, None]) / (4 * both.shape[1])).exp()
    kernel = wide + wide ** 2 + wide ** 4
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def release_loss(vae, x_BTC, real_BTC, generator):
    """The release's objective, on a sample from the first step on."""
    real_BT = real_BTC.any(dim=-1)
    posterior = vae.encode(x_BTC, real_BT)
    z_BTZ = sample(posterior, generator)
    huber = F.huber_loss(vae.decode(z_BTZ, real_BT)[real_BTC], x_BTC[real_BTC])
    return (1000 * huber + 0.1 * 100 * mmd(z_BTZ[real_BT], generator)
            + 1e-4 * kl_divergence(posterior, real_BT))


def train_release(parents, seed, budget, log):
    """The release's recipe: one stage. Ends at REACH or after `budget` steps."""
    schedule, noise = train.Schedule(seed=seed), generator_for(seed)
    vae, picks = VAE(VAEConfig(init="random"), noise), np.random.default_rng(seed)
    windows = train.Windows(parents, vae.config, schedule)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1e-4, weight_decay=1e-5)
    for step in range(budget + 1):
        if step % 25 == 0 or step == budget:
            figures = train.validate(vae, windows, 2)
            log({"stage": 2, "step": step, **figures})
            if figures["nmse"] <= REACH or step == budget:
                return
        chosen = picks.integers(len(windows.training), size=schedule.batch)
        loss = release_loss(vae, *windows.read(windows.training[chosen]), noise)
        optimiser.param_groups[0]["lr"] = train.learning_rate(step, budget, 1e-4, 0.0)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()


def train_curriculum(parents, seed, budget, log):
    """This repository's two stages, from the same kind of start; `budget` is the release's."""
    train.train_vae(parents, VAEConfig(init="random"), replace(CURRICULUM, seed=seed), log)


RECIPES = {"release": train_release, "curriculum": train_curriculum}


class Curve:
    """(stage, step, seconds, NMSE) at the checks of a training, the checks' own time left out."""

    def __init__(self, recipe, *arguments):
        self.points, self.spent, self.check = [], 0.0, train.validate
        self.began = time.perf_counter()
        with mock.patch.object(train, "validate", self.validate):
            recipe(*arguments, self.log)

    def validate(self, *arguments):
        start = time.perf_counter()
        figures = self.check(*arguments)
        self.spent += time.perf_counter() - start
        return figures

    def log(self, record):
        seconds = time.perf_counter() - self.began - self.spent
        self.points.append((record["stage"], record["step"], seconds, record["nmse"]))

    def first(self, reach):
        """The first check at which a VAE had this NMSE, or None: in stage 2, the KL on."""
        for stage, step, seconds, nmse in self.points:
            if stage == 2 and step and nmse <= reach:
                return stage, step, seconds, nmse
        return None


def arrival(curve):
    """When a training first had REACH, else its end; seconds to each of REACHES, or null."""
    before = max((step for stage, step, *_ in curve.points if stage == 1), default=0)
    found = curve.first(REACH)
    _, step, seconds, nmse = found or curve.points[-1]
    times = {f"{reach:.0e}": curve.first(reach) for reach in REACHES}
    return dict(reached=found is not None, seconds=round(seconds, 2), steps=before + step,
                nmse=float(f"{nmse:.3g}"), final=float(f"{curve.points[-1][3]:.3g}"),
                seconds_to={reach: point and round(point[2], 2) for reach, point in times.items()})


def training_verdict(rows):
    """Prints medians and ranges, and the ratio. Returns its row."""
    medians, all_reached = {}, {}
    for name in RECIPES:
        mine = [row for row in rows if row["recipe"] == name]
        seconds = [row["seconds"] for row in mine]
        medians[name] = statistics.median(seconds)
        all_reached[name] = all(row["reached"] for row in mine)
        print(f"{name:10} median {medians[name]:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
              f"reached in {sum(row['reached'] for row in mine)} of {len(mine)}")
    ratio, bound = medians["release"] / medians["curriculum"], not all_reached["release"]
    passed = ratio >= 3 and all_reached["curriculum"]
    print(f"release / curriculum: {'at least ' * bound}{ratio:.1f}  target 3  "
          f"{'pass' if passed else 'MISS'}")
    return dict(what="training ratio", ratio=round(ratio, 2), lower_bound=bound, medians=medians)


def bench_training(quick, budget):
    """Yields a row per recipe and seed, then one with the ratio; recipes in turns, seed by seed."""
    folder, parents, rows = Path(__file__).resolve().parent / "models", [], []
    budget = min(budget, 50) if quick else budget
    for name in ("code", "prose"):
        checkpoint = chunking.Checkpoint(folder / f"{name}.safetensors")
        chosen = [e.name for e in checkpoint.entries.values() if chunking.is_selected(e)]
        parents.append((checkpoint, [chunking.measure(checkpoint, name) for name in chosen]))
    for seed, (name, recipe) in itertools.product(range(1 if quick else 3), RECIPES.items()):
        facts = machine() | dict(budget=budget)
        curve = Curve(recipe, parents, seed, budget)
        rows.append(dict(what="training", recipe=name, seed=seed, **arrival(curve)))
        print(" ".join(f"{key} {value}" for key, value in rows[-1].items() if key != "what"),
              flush=True)
        yield facts | rows[-1]
    yield facts | training_verdict(rows)
