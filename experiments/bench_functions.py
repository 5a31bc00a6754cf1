"""The parts of bench.py that time functions in this process: --align, --codec,
--training.

--align: align.py's Sinkhorn beside three solvers of POT (Python Optimal Transport), its
Gaussian map beside POT's. Every solver gets the iterations it needs for the same
*measured* marginal error, the larger L1 error of both sides of the plan it returns:
1e-9 at epsilon 0.05, 1e-6 below. POT's own threshold is a 2-norm of one side, so it is
not used: its solvers are all the plain iteration, whose steps are counted beforehand.
Times include the plan. Ratios are ours / POT's: below 1 is faster. On a busy machine
set OMP_NUM_THREADS=1, or threads wait for each other.

--codec: encoding and decoding of weights that lie in memory, as in merge.py (one thread
per core, each with a tensor of its own), in weights per second and as a fraction of the
rate at which the same threads multiply 1024 x 1024 matrices. `network`: encode and
decode alone; `whole`: Codec, with scaling and windows. `full`: every block computes;
`exact`: no blocks, the codec of --vae exact.

--training: seconds and steps to a held-out NMSE from the same files, checks included.
`release`: the recipe of the paper's release, one stage (Huber, MMD, KL, lr 1e-4) of
--budget steps at most; `curriculum`: `train_vae` from the same random start. What
counts is a VAE: a check of stage 2 after a step with the KL on. Not reached: `reached`
is false, and the time is that of the whole budget.
"""
import itertools
import math
import os
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

import align
import chunking
import lsmerge
import merge
import train
from bench_models import MODELS, full_network
from codec_tables import FAMILY, Model
from records import machine
from vae import VAE, VAEConfig, generator_for, kl_divergence, sample


def conditions():
    """What a time depends on, and the code does not say."""
    return machine() | {"load": round(os.getloadavg()[0], 2)}


def interleaved(runs, rounds):
    """{name: function} -> {name: (median seconds, result)}, in rounds: load hits all
    alike."""
    seconds = {name: [] for name in runs}
    results = {}
    for _ in range(rounds):
        for name, run in runs.items():
            if seconds[name] and seconds[name][0] > SLOW:
                continue
            start = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(seconds[name]), results[name]) for name in runs}


# --- --align --------------------------------------------------------------------------
SIZES = [(512, 512), (1024, 1536), (2048, 1024)]
CLOUDS = ("isotropic", "anisotropic", "heavy-tailed")
LATENT = 32                 # numbers per point
# POT stops here at the latest: its ratio is then an upper bound
MOST_PLAIN = 3000
SLOW = 10.0                 # seconds; what takes longer is timed once, not ROUNDS times
ROUNDS = 5
SOLVERS = ("sinkhorn", "sinkhorn_stabilized", "sinkhorn_log")       # of POT


def cloud(n, kind, generator):
    """(n, LATENT) float64 points of one of CLOUDS."""
    z = torch.randn(n, LATENT, generator=generator, dtype=torch.float64)
    if kind == "anisotropic":
        return z * torch.logspace(0, -2, LATENT, dtype=torch.float64)
    # Student t, 3 degrees of freedom, one scale per point
    if kind == "heavy-tailed":
        half = torch.full((n, 1), 1.5, dtype=torch.float64)
        return z / (torch._standard_gamma(half, generator=generator) / 1.5).sqrt()
    return z


def plain_iterations(cost_IJ, epsilon, tolerance):
    """How many plain Sinkhorn iterations (v, then u, like POT) reach the tolerance, in
    tens."""
    I, J = cost_IJ.shape
    kernel = (cost_IJ / (-epsilon * cost_IJ.max())).exp()
    u = torch.full((I,), 1 / I, dtype=torch.float64)
    for iteration in range(1, MOST_PLAIN + 1):
        v = 1 / J / (kernel.T @ u)
        u = 1 / I / (kernel @ v)
        error = (v * (kernel.T @ u) - 1 / J).abs().sum()
        if iteration % 10 == 0 and error <= tolerance:
            return iteration
    return MOST_PLAIN


def marginal_error(plan):
    """The larger L1 error of a plan's two sides, against uniform masses."""
    plan = torch.as_tensor(plan)
    n, m = plan.shape
    rows = (plan.sum(1) - 1 / n).abs().sum().item()
    columns = (plan.sum(0) - 1 / m).abs().sum().item()
    return max(rows, columns)


def sinkhorn_cell(ot, n, m, kind, epsilon, rounds):
    """One row: sizes, iterations, seconds, measured errors and ratios of ours and POT's
    solvers."""
    generator = torch.Generator().manual_seed(n + m)
    cost = align.squared_cost(cloud(n, kind, generator), cloud(m, kind, generator))
    tolerance = 1e-9 if epsilon >= 0.05 else 1e-6
    plain = plain_iterations(cost, epsilon, tolerance)
    M = (cost / cost.max()).numpy()
    options = dict(reg=epsilon, numItermax=plain, stopThr=0.0, warn=False)
    solve = ot.bregman
    timed = interleaved({
        "ours": lambda: align.sinkhorn(cost, epsilon, tolerance).plan_IJ,
        "sinkhorn": lambda: solve.sinkhorn_knopp([], [], M, **options),
        "sinkhorn_stabilized": lambda: solve.sinkhorn_stabilized([], [], M, tau=1e6,
                                                                 **options),
        "sinkhorn_log": lambda: solve.sinkhorn_log([], [], M, **options)}, rounds)
    seconds = {name: one for name, (one, _) in timed.items()}
    return {"what": "sinkhorn", "n": n, "m": m, "kind": kind, "latent": LATENT,
            "epsilon": epsilon, "tolerance": tolerance, "plain_iterations": plain,
            "iterations": align.sinkhorn(cost, epsilon, tolerance).iterations,
            "seconds": {name: round(one, 5) for name, one in seconds.items()},
            "errors": {name: float(f"{marginal_error(plan):.2g}")
                       for name, (_, plan) in timed.items()},
            "ratios": {name: round(seconds["ours"] / seconds[name],
                                   3) for name in SOLVERS}}


def our_gaussian_map(x, y):
    return align.gaussian_map(align.Moments.of(x), align.Moments.of(y))


def gaussian_cell(ot, n, d, rounds):
    """Fit of the Gaussian map, from two clouds to the matrix."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = y * torch.linspace(0.5, 2, d, dtype=torch.float64)
    theirs = ot.gaussian.empirical_bures_wasserstein_mapping
    timed = interleaved({"ours": partial(our_gaussian_map, x, y),
                         "pot": partial(theirs, x.numpy(), y.numpy(), reg=1e-9)},
                         rounds)
    (ours, A_ZZ), (pot, (their_A_ZZ, _)) = timed["ours"], timed["pot"]
    difference = (A_ZZ - torch.as_tensor(their_A_ZZ)).abs().max().item()
    return {"what": "gaussian_map", "n": n, "latent": d, "rounds": rounds,
            "seconds": {"ours": round(ours, 5), "pot": round(pot, 5)},
            "ratios": {"pot": round(ours / pot, 3)},
            "difference": float(f"{difference:.2g}")}


def bench_align(quick):
    """Yields one row per cell."""
    import ot               # pip install POT
    rounds = 2 if quick else ROUNDS
    facts = conditions() | {"pot": ot.__version__, "rounds": rounds}
    sizes = SIZES[:1] if quick else SIZES
    cells = itertools.product(sizes, CLOUDS, (0.05, 0.01, 0.005))
    for (n, m), kind, epsilon in cells:
        yield facts | sinkhorn_cell(ot, n, m, kind, epsilon, rounds)
    yield facts | gaussian_cell(ot, *(512, 64) if quick else (4096, 384), 5 * rounds)


# --- --codec --------------------------------------------------------------------------
# side of the matrices whose products give the rate
MATRIX = {"cpu": 1024, "cuda": 4096}


def half_operations(config, blocks, *others):
    """Multiplications and additions, both counted, of one half of the network on one
    window. Each token meets every matrix once, and T tokens twice."""
    matrices = 0
    for part in (*blocks, *others):
        matrices += sum(p.numel() for p in part.parameters() if p.dim() == 2)
    attention = len(blocks) * 2 * config.tokens * config.width
    return 2 * config.tokens * (matrices + attention)


def window_operations(codec):
    """(encode, decode) of one window, as a merge calls them: the mean of the posterior
    alone."""
    vae = codec.vae
    return (half_operations(vae.config, vae.encoder, vae.embed, vae.to_mu),
            half_operations(vae.config, vae.decoder, vae.up, vae.unembed))


def codec_operations(codec, entries, parents):
    """Operations of a merge: all parents are encoded, the result is decoded, and a
    sample of each parent goes both ways for the gate."""
    encode, decode = window_operations(codec)
    window = codec.C * codec.T
    windows = 0
    seen = 0
    for entry in entries:
        windows += -(-entry.numel // window)
        seen += -(-min(entry.numel, merge.GATE_WEIGHTS) // window)
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
    for part_BTC in x_BTC.split(lsmerge.BATCH):
        codec.net.decode(codec.net.encode_mean(part_BTC))
    wait_for(codec.device)


def whole_codec(codec, weights_L, stats):
    codec.decode(codec.encode(weights_L, stats), stats, len(weights_L))
    wait_for(codec.device)


def on_all(pool, count, run):
    """`run` on `count` threads at once."""
    for job in [pool.submit(run) for _ in range(count)]:
        job.result()


def codec_cell(dtype, width, device, rounds):
    """Rows of one width and arithmetic; everything in turns, each thread at work on its
    own."""
    side = MATRIX[device]
    threads = torch.get_num_threads()
    count = threads if device == "cpu" else 1
    weights_L = 0.02 * torch.randn(chunking.PIECE, generator=generator_for(0))
    stats = chunking.TensorStats("w", torch.float32, (chunking.PIECE,), std=0.02)
    square = torch.ones(side, side, dtype=getattr(torch, dtype), device=device)
    runs = {"rate": partial(multiply, square)}
    operations = {}
    for kind, config in (("full", VAEConfig(width=width, init="pca")),
                         ("exact", VAEConfig(width=width, init="pca", blocks=0))):
        codec = lsmerge.Codec(full_network(config), device, square.dtype)
        x_L = chunking.standardise(weights_L, stats)
        x_BTC = x_L.reshape(-1, codec.T, codec.C).to(device, square.dtype)
        operations[kind] = len(x_BTC) * sum(window_operations(codec))
        runs[kind, "network"] = partial(network_alone, codec, x_BTC)
        runs[kind, "whole"] = partial(whole_codec, codec, weights_L, stats)
    torch.set_num_threads(max(1, threads // count))
    with ThreadPoolExecutor(count) as pool:
        timed = interleaved({name: partial(on_all, pool, count, run)
                             for name, run in runs.items()}, rounds)
    torch.set_num_threads(threads)
    rate = count * 4 * 2 * side ** 3 / timed.pop("rate")[0]
    for (kind, part), (seconds, _) in timed.items():
        yield {"what": "codec", "device": device, "dtype": dtype, "width": width,
               "network": kind, "part": part, "workers": count,
               "gflops": round(rate / 1e9, 1),
               "weights_per_s": round(count * chunking.PIECE / seconds),
               "fraction": round(count * operations[kind] / seconds / rate, 3)}


def bench_codec(quick):
    """Yields a row per device, width, dtype, network (full, exact) and part (network,
    whole)."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    widths = (VAEConfig().width, 256)
    cells = itertools.product(devices, widths, ("float32", "bfloat16"))
    for device, width, dtype in cells:
        facts = conditions()
        for row in codec_cell(dtype, width, device, 2 if quick else 25):
            yield facts | row


# --- --training -----------------------------------------------------------------------
REACH = 1e-2                # held-out NMSE
# reaches it from every seed
CURRICULUM = train.Schedule(steps1=250, steps2=150, batch=16)


def mmd(z_NZ, generator, most=512):
    """Squared maximum mean discrepancy to N(0, I); Gaussian kernels whose variance is
    1/2, 1 and 2 times that of Z unit numbers."""
    z_NZ = z_NZ[torch.randperm(len(z_NZ), generator=generator)[:most]]
    both = torch.cat([z_NZ, torch.randn(z_NZ.shape, generator=generator)])
    # A product: the gradient of torch.cdist takes longer than the network's.
    square = both.square().sum(1)
    n = len(both) // 2
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


def train_release(parents, config, schedule, log):
    """The release's recipe, called as train_vae is: one stage of `steps2` steps, or
    until REACH. Its rate falls as a cosine from 1e-4."""
    noise = generator_for(schedule.seed)
    vae = VAE(config).start(noise)
    picks = random.Random(schedule.seed)
    windows = train.Windows(parents, config, schedule)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1e-4, weight_decay=1e-5)
    budget = schedule.steps2
    began = time.perf_counter()
    for step in range(budget + 1):
        if step % 25 == 0 or step == budget:
            figures = train.validate(vae, windows, 2)
            log({"stage": 2, "step": step, "seconds": time.perf_counter() - began,
                 **figures})
            if figures["nmse"] <= REACH or step == budget:
                return
        chosen = picks.choices(windows.training, k=schedule.batch)
        loss = release_loss(vae, *windows.read(chosen), noise)
        cosine = (1 + math.cos(math.pi * step / budget)) / 2
        optimiser.param_groups[0]["lr"] = 1e-4 * cosine
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()


def arrival(checks):
    """When a training first had REACH, the KL on; else its end. checks: all that it has
    logged."""
    before = [check for check in checks if check["stage"] == 1][-1:]
    second = [check for check in checks if check["stage"] == 2]
    there = [check for check in second if check["step"] > 0 and check["nmse"] <= REACH]
    found = (there or second[-1:])[0]
    return {"reached": len(there) > 0,
            "seconds": round(found["seconds"] + sum(one["seconds"] for one in before),
                             2),
            "steps": found["step"] + sum(one["step"] for one in before),
            "nmse": float(f"{found['nmse']:.3g}"),
            "final": float(f"{second[-1]['nmse']:.3g}")}


def bench_training(quick, budget):
    """Yields a row per recipe and seed; recipes in turns, seed by seed."""
    parents = [Model.open(MODELS / f"{name}.safetensors").parent for name in FAMILY]
    if quick:
        budget = min(budget, 50)
    recipes = {"release": (train_release, train.Schedule(steps1=0, steps2=budget)),
               "curriculum": (train.train_vae, CURRICULUM)}
    for seed, name in itertools.product(range(1 if quick else 3), recipes):
        facts = conditions() | {"budget": budget}
        run, schedule = recipes[name]
        checks = []
        run(parents, VAEConfig(), replace(schedule, seed=seed), checks.append)
        yield facts | {"what": "training", "recipe": name,
                       "seed": seed} | arrival(checks)
