"""Speed and memory, measured beside what they are to be held against; medians of interleaved runs.

    python experiments/bench.py --align [--quick] [--record experiments/results/bench-align.jsonl]
    python experiments/bench.py --merge --record experiments/results/bench-merge.jsonl
    python experiments/bench.py --memory --record experiments/results/bench-memory.jsonl
    python experiments/bench.py --codec [--quick] [--record experiments/results/bench-codec.jsonl]
    python experiments/bench.py --training [--budget STEPS] [--quick] [--record experiments/results/bench-training.jsonl]

--align: align.py's Sinkhorn beside three solvers of POT (Python Optimal Transport), its Gaussian map beside
POT's. Every solver gets the iterations it needs for the same *measured* marginal error, the larger L1 error
of both sides of the plan it returns: 1e-9 at epsilon 0.05, 1e-6 below. POT's own threshold is a 2-norm of one
side, so it is not used: its solvers are all the plain iteration, whose steps are counted beforehand. Times
include the plan. Ratios are ours / POT's: below 1 is faster. On a busy machine set OMP_NUM_THREADS=1, or
threads wait for each other; the number of threads is printed and recorded.

--merge: merge.py as a process, given a VAE, on two synthetic checkpoints of 100 M weights, over the time that the same
codec operations take at the matrix-multiply rate of all cores (measured before and after, same dtype) plus
the bytes at the disk's measured copy rate; with the full network and with the warm start's (see --codec).

--memory: the same command on pairs of 0.75 and 3 GB, each with one tensor of 500 MB: the peak of anonymous memory
must not depend on the size; beside it what --dry-run predicts. Needs 10 GB of disk. A small network (width 64, one block),
so that 3 GB take minutes.

--codec: encoding and decoding of windows that lie in memory, as in merge.py (one thread per core, each with a tensor of its
own), in weights per second and as a fraction of the rate at which the same threads multiply 1024 x 1024 matrices. `network`:
encode and decode alone; `whole`: Codec, with scaling and float64. `full`: every block computes; `warm`: the exact start,
whose blocks are passed over; only what is computed counts as operations. What limits it: at width 128 a matrix product does
128 multiplications per number that it reads, and the passes between (LayerNorm, rotation, attention over 16, SiLU, sums) take
a fifth of the time in float32, two fifths in bfloat16, whose products are twice as fast and whose passes are not; besides, an
intermediate of 1.4 MB does not fit a core's cache, so that the products alone run at nine tenths. Width 256 halves the passes' share.

--training: seconds and steps to a held-out NMSE of 1e-2 from the same files, without the time of the checks. `release`: the
recipe of the paper's release, one stage (Huber, MMD, KL, lr 1e-4) of --budget steps at most; `curriculum`: `train_vae` from
the same random start, with a schedule found for it (CURRICULUM); `warm`: from ours. What counts is a VAE: a check of stage 2 after a step with the KL on (the warm
start, which ends at once, has none). Not reached: the last NMSE is printed, and the ratio of the times is a lower bound.
"""

import argparse
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import align
import chunking
import lsmerge
import merge
import train
from align import Moments
from vae import VAE, VAEConfig, kl_divergence, sample

SIZES = [(512, 512), (1024, 1536), (2048, 1024)]
LATENT = 32                # numbers per point
MOST_PLAIN = 3000          # POT stops here at the latest: a ratio is then an upper bound, marked <
SLOW = 10.0                # seconds; what takes longer is timed once, not ROUNDS times
ROUNDS = 5
# POT solver -> what our time over its time should reach where plain iteration needs < 300 steps, and >= 300;
# whether the worst cell must reach it or the median
TARGETS = {"sinkhorn_log": (0.2, 0.2, "worst"), "sinkhorn_stabilized": (1.0, 1.0, "median"),
           "sinkhorn": (1.7, 0.5, "worst")}


def cloud(n, kind, generator):
    z = torch.randn(n, LATENT, generator=generator, dtype=torch.float64)
    if kind == "anisotropic":
        return z * torch.logspace(0, -2, LATENT, dtype=torch.float64)
    if kind == "heavy-tailed":  # Student t, 3 degrees of freedom, one scale per point
        chi = torch._standard_gamma(torch.full((n, 1), 1.5, dtype=torch.float64), generator=generator) / 1.5
        return z / chi.sqrt()
    return z


def plain_iterations(cost, epsilon, tolerance):
    """How many plain Sinkhorn iterations (v, then u, like POT) reach the tolerance, looking at every 10th."""
    kernel = (cost / (-epsilon * cost.max())).exp()
    u = torch.full((len(cost),), 1 / len(cost), dtype=torch.float64)
    b = 1 / cost.shape[1]
    for iteration in range(1, MOST_PLAIN + 1):
        v = b / (kernel.T @ u)
        u = 1 / len(cost) / (kernel @ v)
        if iteration % 10 == 0 and (v * (kernel.T @ u) - b).abs().sum() <= tolerance:
            return iteration
    return MOST_PLAIN


def interleaved(runs, rounds):
    """{name: function} -> {name: (median seconds, result)}. A round runs each once: load hits all alike."""
    seconds, results = {name: [] for name in runs}, {}
    for _ in range(rounds):
        for name, run in runs.items():
            if seconds[name] and seconds[name][0] > SLOW:
                continue
            start = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(seconds[name]), results[name]) for name in runs}


def marginal_error(plan):
    plan = torch.as_tensor(plan)
    n, m = plan.shape
    return max((plan.sum(1) - 1 / n).abs().sum().item(), (plan.sum(0) - 1 / m).abs().sum().item())


def sinkhorn_cell(ot, n, m, kind, epsilon, rounds):
    """One row: sizes, iterations, seconds, measured errors and ratios of ours and POT's solvers."""
    generator = torch.Generator().manual_seed(n + m)
    cost = align.squared_cost(cloud(n, kind, generator), cloud(m, kind, generator))
    tolerance = 1e-9 if epsilon >= 0.05 else 1e-6
    plain = plain_iterations(cost, epsilon, tolerance)
    runs = {"ours": lambda: align.sinkhorn(cost, epsilon=epsilon, tolerance=tolerance)}
    if ot is not None:
        M = (cost / cost.max()).numpy()
        options = dict(reg=epsilon, numItermax=plain, stopThr=0.0, warn=False)
        runs["sinkhorn"] = lambda: ot.bregman.sinkhorn_knopp([], [], M, **options)
        runs["sinkhorn_stabilized"] = lambda: ot.bregman.sinkhorn_stabilized([], [], M, tau=1e6, **options)
        runs["sinkhorn_log"] = lambda: ot.bregman.sinkhorn_log([], [], M, **options)
    timed = interleaved(runs, rounds)
    ours = timed["ours"][1]
    plans = {name: ours.plan_IJ if name == "ours" else result for name, (_, result) in timed.items()}
    return dict(what="sinkhorn", n=n, m=m, kind=kind, latent=LATENT, epsilon=epsilon, tolerance=tolerance,
                iterations=ours.iterations, plain_iterations=plain, capped=plain == MOST_PLAIN,
                seconds={name: round(s, 5) for name, (s, _) in timed.items()},
                errors={name: float(f"{marginal_error(plan):.2g}") for name, plan in plans.items()},
                ratios={name: round(timed["ours"][0] / timed[name][0], 3)
                        for name in TARGETS if name in timed})


def gaussian_cell(ot, n, d, rounds):
    """Fit of the Gaussian map, from two clouds to the matrix."""
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    y = y * torch.linspace(0.5, 2, d, dtype=torch.float64)
    runs = {"ours": lambda: align.gaussian_map(Moments.of(x), Moments.of(y)).matrix_ZZ}
    if ot is not None:
        runs["pot"] = lambda: torch.as_tensor(
            ot.gaussian.empirical_bures_wasserstein_mapping(x.numpy(), y.numpy(), reg=1e-9)[0])
    timed = interleaved(runs, rounds)
    row = dict(what="gaussian_map", n=n, latent=d, rounds=rounds,
               seconds={name: round(timed[name][0], 5) for name in timed})
    if ot is not None:
        row["ratios"] = {"pot": round(timed["ours"][0] / timed["pot"][0], 3)}
        row["difference"] = float(f"{(timed['ours'][1] - timed['pot'][1]).abs().max().item():.2g}")
    return row


def print_cell(row):
    limit = "<" if row["capped"] else " "
    ratios = [f"{limit}{ratio:5.2f} ({row['errors'][name]:.0e})" for name, ratio in row["ratios"].items()]
    print(f"{row['n']:5} x {row['m']:<5} {row['kind']:12} {row['epsilon']:<6} {row['iterations']:5} "
          f"{row['plain_iterations']:6}{'+' if row['capped'] else ' '} {1e3 * row['seconds']['ours']:9.1f}  "
          f"{row['errors']['ours']:.0e}  " + "  ".join(ratios), flush=True)


def print_verdict(rows, gaussian):
    print("ours / POT over the cells, with the target beside it:")
    easy = [row for row in rows if row["plain_iterations"] < 300]
    hard = [row for row in rows if row["plain_iterations"] >= 300]
    for name, (*targets, judged) in TARGETS.items():
        for label, group, target in zip(("plain needs < 300", "plain needs >= 300"), (easy, hard), targets):
            print_ratio(f"{name}, {label}", [row["ratios"][name] for row in group], target, judged)
    name = f"gaussian map {gaussian['n']} x {gaussian['latent']}"
    print_ratio(name, [gaussian["ratios"]["pot"]], 0.6, "median")


def print_ratio(name, ratios, target, judged):
    if ratios:
        median, worst = statistics.median(ratios), max(ratios)
        passed = (worst if judged == "worst" else median) <= target
        print(f"  {name:40} median {median:5.2f}  worst {worst:5.2f}  of {len(ratios):2}  target {target} "
              f"({judged})  {'pass' if passed else 'MISS'}")


def bench_align(quick):
    """Yields one row per cell, prints the table and the verdict."""
    try:
        import ot
    except ImportError:
        ot = None
        print("POT is not installed: only our own times, no ratios; fix: pip install POT")
    versions = dict(python=platform.python_version(), torch=torch.__version__,
                    pot=getattr(ot, "__version__", None), threads=torch.get_num_threads(),
                    rounds=2 if quick else ROUNDS)
    print(f"{versions}\n{'size':13} {'cloud':12} {'eps':6} {'iter.':>5} {'plain':>6}  {'ours ms':>9}  error"
          + "".join(f"  {name[9:] or 'plain':14}" for name in TARGETS if ot))
    rows = []
    for n, m in SIZES[:1] if quick else SIZES:
        for kind in ("isotropic", "anisotropic", "heavy-tailed"):
            for epsilon in (0.05, 0.01, 0.005):
                rows.append(sinkhorn_cell(ot, n, m, kind, epsilon, versions["rounds"]))
                print_cell(rows[-1])
                yield versions | rows[-1]
    gaussian = gaussian_cell(ot, 4096, 384, 5 * versions["rounds"])
    yield versions | gaussian
    print(f"gaussian map {gaussian['n']} x {gaussian['latent']}: {gaussian['seconds']} s")
    if ot is not None:
        print_verdict(rows, gaussian)


# --- merge.py as a whole ---------------------------------------------------------------------------------------------
MERGE = Path(__file__).resolve().parent.parent / "merge.py"


def synthetic(path, seed, layers, hidden, mlp, vocab, big=0):
    """A Llama-shaped bfloat16 checkpoint of random weights; `big`: rows of one more matrix in layer 0. Written tensor by
    tensor, like everything here: 3 GB need not fit into memory."""
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {p + f"self_attn.{r}_proj.weight": (hidden, hidden) for r in "qkvo"}
        shapes |= {p + f"mlp.{r}_proj.weight": (mlp, hidden) for r in ("gate", "up")} | {p + "mlp.down_proj.weight": (hidden, mlp)}
    if big:
        shapes["model.layers.0.mlp.big_proj.weight"] = (big, hidden)
    entries = [chunking.Entry(name, torch.bfloat16, shape, "", 0) for name, shape in shapes.items()]
    def fill(file):
        for number, entry in enumerate(entries):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            for start, stop in chunking.spans(entry.numel):
                file.put(entry.name, start, (0.02 * torch.randn(stop - start, generator=generator)).bfloat16())
    chunking.write_checkpoint(path, entries, fill, {})
    return [e for e in entries if chunking.is_selected(e)]


def matmul_rate(dtype, seconds=6.0):
    """Operations per second of all cores on 1024 x 1024 matrices: the median over some seconds, as a core that has rested
    is faster at first than it can remain."""
    x, rates, began = torch.ones(1024, 1024, dtype=dtype), [], time.perf_counter()
    while time.perf_counter() - began < seconds or len(rates) < 5:
        start = time.perf_counter()
        for _ in range(4):
            x @ x
        rates.append(4 * 2 * 1024 ** 3 / (time.perf_counter() - start))
    return statistics.median(rates)


def copy_rate(path, scratch):
    """Bytes per second of reading a file and writing it anew, to the disk and not only to its cache."""
    start = time.perf_counter()
    with open(path, "rb") as source, open(scratch, "wb") as target:
        shutil.copyfileobj(source, target, 2 ** 20)
        os.fsync(target.fileno())
    seconds = time.perf_counter() - start
    scratch.unlink()
    return path.stat().st_size / seconds


def window_operations(vae):
    """Multiplications and additions, both counted, to encode and to decode a window. A token meets every matrix of its half
    once, and T tokens twice; idle blocks (`skip_idle`) compute nothing."""
    c = vae.config
    def half(blocks, *others):
        busy = [block for block in blocks if not block.idle]
        matrices = sum(p.numel() for part in (*busy, *others) for p in part.parameters() if p.dim() == 2)
        return 2 * c.tokens * (matrices + len(busy) * 2 * c.tokens * c.width)
    return half(vae.encoder, vae.embed, vae.neck_mu, vae.neck_logvar), half(vae.decoder, vae.widen, vae.unembed)


def codec_operations(vae, entries, parents):
    """Operations of a merge: every parent is encoded, the result decoded, and of each parent the windows that the gate looks at."""
    (encoder, decoder), operations = window_operations(vae), 0
    for entry in entries:
        windows = -(-entry.numel // (vae.config.chunk * vae.config.tokens))
        seen = -(-windows // max(1, windows // lsmerge.GATE_WINDOWS))
        operations += parents * windows * encoder + (windows + parents * seen) * decoder
    return operations


def untrained(config, branches=True):
    """A VAE with a neck. branches: small random ones, as after training: the warm start's zeros would be passed over."""
    vae, generator = VAE(config, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    vae.set_neck(torch.zeros(config.width), torch.eye(config.width))
    for block in [*vae.encoder, *vae.decoder] if branches else []:
        for last in (block.out, block.down):
            torch.nn.init.normal_(last.weight, std=1e-3, generator=generator)
    return vae


def run_merge(folder, *flags):
    """(seconds of the whole process, its report, its output) of merging a and b in the folder."""
    command = [sys.executable, MERGE, folder / "a.safetensors", folder / "b.safetensors", "--vae", folder / "vae.safetensors",
               "-o", folder / "merged.safetensors", "--quiet", "--force", *flags]
    report = [] if "--dry-run" in flags else ["--report", folder / "report.json"]
    start = time.perf_counter()
    done = subprocess.run([*map(str, command), *map(str, report)], check=True, capture_output=True, text=True)
    return time.perf_counter() - start, json.loads((folder / "report.json").read_text()) if report else None, done.stdout


def prepare(folder, config, **sizes):
    """Checkpoints a and b and an untrained VAE; returns the encoded entries."""
    entries = [synthetic(folder / f"{name}.safetensors", seed, **sizes) for seed, name in enumerate("ab")][0]
    chunking.write_tensors(folder / "vae.safetensors", *untrained(config).to_file({}))
    return entries


def bench_merge(quick):
    """Whole-run time over what the arithmetic and the bytes alone would take."""
    config, facts = VAEConfig(), dict(python=platform.python_version(), torch=torch.__version__, threads=torch.get_num_threads())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entries = prepare(folder, config, layers=1 if quick else 10, hidden=1024, mlp=2752, vocab=256)
        weights, files = sum(e.numel for e in entries), [folder / "a.safetensors", folder / "b.safetensors"]
        for dtype, (network, branches) in itertools.product(("float32", "bfloat16"), (("full", True), ("warm", False))):
            vae = untrained(config, branches)
            chunking.write_tensors(folder / "vae.safetensors", *vae.to_file({}))
            operations = codec_operations(vae.skip_idle(), entries, 2)
            for _ in range(1 if quick else 3):
                before, disk = matmul_rate(getattr(torch, dtype)), copy_rate(files[0], folder / "copy")
                seconds, report, _ = run_merge(folder, "--dtype", dtype, "--max-nmse", "1")
                rate = statistics.mean([before, matmul_rate(getattr(torch, dtype))])
                # A copy reads and writes its bytes: both parents are read, one result is written.
                least = operations / rate + (sum(f.stat().st_size for f in files) + (folder / "merged.safetensors").stat().st_size) / 2 / disk
                row = dict(what="merge", weights=weights, dtype=dtype, network=network, seconds=round(seconds, 2), least=round(least, 2),
                           ratio=round(seconds / least, 3), gflops=round(rate / 1e9, 1), copy_mb_s=round(disk / 1e6), stages=report["seconds"])
                print(f"merge {weights / 1e6:.0f} M weights, {dtype}, {network} network: {seconds:.1f} s, {row['ratio']:.2f} times the {least:.1f} s of "
                      f"arithmetic ({rate / 1e9:.0f} GFLOP/s) and bytes ({disk / 1e6:.0f} MB/s)", flush=True)
                yield facts | row


def bench_memory(quick):
    """Peak anonymous memory at two sizes, and what --dry-run says beforehand."""
    facts = dict(python=platform.python_version(), torch=torch.__version__, threads=torch.get_num_threads())
    for layers in (1, 2) if quick else (10, 100):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepare(folder, VAEConfig(width=64, blocks=1), layers=layers, hidden=1024, mlp=2752, vocab=256, big=2048 if quick else 250_000)
            plan = run_merge(folder, "--dry-run")[2]
            predicted = [int(re.search(pattern, plan)[1].replace(",", "")) for pattern in (r"memory: (\d+) MiB", r"([\d,]+) bytes")]
            seconds, report, _ = run_merge(folder, "--max-nmse", "1")
            size = (folder / "merged.safetensors").stat().st_size
            row = dict(what="memory", bytes=size, bytes_predicted=predicted[1], peak_mib=round(report["peak_anonymous_mib"], 1),
                       predicted_mib=predicted[0], seconds=round(seconds, 1))
            print(f"{size / 1e9:.2f} GB per checkpoint: peak {row['peak_mib']:.0f} MiB anonymous (--dry-run: {predicted[0]} MiB), "
                  f"output {'as predicted to the byte' if size == predicted[1] else f'{size} bytes, predicted {predicted[1]}'}, {seconds:.0f} s", flush=True)
            yield facts | row


# --- The codec alone -------------------------------------------------------------------------------------------------
CODEC_TARGETS = {"float32": 0.85, "bfloat16": 0.70}        # fraction of the matrix-multiply rate, full network at the default width


def codec_runs(vae, dtype, device):
    """{name: function} to encode and decode PIECE weights, and what these are in operations."""
    codec, weights_L = lsmerge.Codec(vae, device, dtype), 0.02 * torch.randn(chunking.PIECE, generator=torch.Generator().manual_seed(0))
    slot = chunking.TensorSlot("w", (chunking.PIECE,), torch.float32, 0.0, 0.02, chunking.place("w"))
    x_BTC = chunking.scale(weights_L, slot).reshape(-1, codec.T, codec.C).to(device, dtype)
    @torch.inference_mode()
    def network():
        for x in x_BTC.split(lsmerge.BATCH_CHUNKS // codec.T):
            codec.vae.decode(codec.vae.encode(x).mu_BTZ)
        return torch.cuda.synchronize() if device == "cuda" else None
    whole = lambda: codec.decode(codec.encode(weights_L, slot), slot, len(weights_L))
    return {"network": network, "whole": whole}, len(x_BTC) * sum(window_operations(codec.vae))


def codec_cell(dtype, width, device, rounds):
    """Rows of one width and arithmetic; everything in turns, each thread at work on its own."""
    side, count = (1024, min(torch.get_num_threads(), merge.WORKERS)) if device == "cpu" else (8192, 1)
    square, runs, operations = torch.ones(side, side, dtype=getattr(torch, dtype), device=device), {}, {}
    def multiply():
        for _ in range(4):
            square @ square
        return torch.cuda.synchronize() if device == "cuda" else None
    for kind, branches in (("full", True), ("warm", False)):
        vae = untrained(VAEConfig(width=width), branches)
        pair, operations[kind] = codec_runs(vae, square.dtype, device)
        runs |= {(kind, part): run for part, run in pair.items()}
    with merge.workers(count) as pool:
        together = lambda run: lambda: list(pool.map(lambda _: run(), range(count)))
        timed = interleaved({name: together(run) for name, run in {"rate": multiply, **runs}.items()}, rounds)
    rate = count * 4 * 2 * side ** 3 / timed.pop("rate")[0]
    for (kind, part), (seconds, _) in timed.items():
        yield dict(what="codec", device=device, dtype=dtype, width=width, network=kind, part=part, workers=count, gflops=round(rate / 1e9, 1),
                   weights_per_s=round(count * chunking.PIECE / seconds), fraction=round(count * operations[kind] / seconds / rate, 3))


def bench_codec(quick):
    """Yields a row per dtype, width, network (full, warm) and part (network, whole)."""
    facts = dict(python=platform.python_version(), torch=torch.__version__, threads=torch.get_num_threads())
    for device in ("cpu", *["cuda"] * torch.cuda.is_available()):
        for width in (VAEConfig().width, 256):
            for dtype, target in CODEC_TARGETS.items():
                for row in codec_cell(dtype, width, device, 3 if quick else 25):
                    judged = device == "cpu" and width == VAEConfig().width and (row["network"], row["part"]) == ("full", "network")
                    verdict = f"  target {target}  {'pass' if row['fraction'] >= target else 'MISS'}" if judged else ""
                    print(f"{device} {dtype:8} width {width} {row['network']} {row['part']:7} {row['weights_per_s'] / 1e6:8.2f} M weights/s  "
                          f"{row['fraction']:.3f} of {row['gflops']:.0f} GFLOP/s{verdict}", flush=True)
                    yield facts | row
    if not torch.cuda.is_available():
        print("GPU: not run")


# --- Training --------------------------------------------------------------------------------------------------------
REACH = 1e-2                                               # held-out NMSE
CURRICULUM = train.Schedule(steps1=250, steps2=150, batch=16, checks=15)    # reaches it from every seed tried, and soon


def mmd(z_NZ, generator, most=512):
    """Squared maximum mean discrepancy to N(0, I); Gaussian kernels whose variance is 1/2, 1 and 2 times that of Z unit numbers."""
    z_NZ = z_NZ[torch.randperm(len(z_NZ), generator=generator)[:most]]
    both = torch.cat([z_NZ, torch.randn(z_NZ.shape, generator=generator)])
    square, n = both.square().sum(1), len(both) // 2       # a product: the gradient of torch.cdist takes longer than the network's
    wide = ((2 * both @ both.T - square - square[:, None]) / (4 * both.shape[1])).exp()
    kernel = wide + wide ** 2 + wide ** 4
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def train_release(parents, seed, budget, log):
    """The release's recipe: one stage, samples from the first step. Ends at REACH or after `budget` steps."""
    config, generator, batch = VAEConfig(init="random"), torch.Generator().manual_seed(seed), 64
    vae, windows = VAE(config, generator), train.Windows(parents, config, train.Schedule().holdout, generator)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1e-4, weight_decay=1e-5)
    for step in range(budget + 1):
        if step % 25 == 0 or step == budget:
            figures = train.validate(vae, windows, 2, batch, "cpu")
            log({"stage": 2, "step": step, **figures})
            if figures["nmse"] <= REACH or step == budget:
                return
        ((x_BTC, real_BTC, _),) = windows.batches(windows.draw(batch, generator), batch, "cpu")
        real_BT = real_BTC.any(dim=-1)
        posterior = vae.encode(x_BTC, real_BT)
        z_BTZ = sample(posterior, generator)
        loss = (1000 * F.huber_loss(vae.decode(z_BTZ, real_BT)[real_BTC], x_BTC[real_BTC]) + 0.1 * 100 * mmd(z_BTZ[real_BT], generator)
                + 1e-4 * kl_divergence(posterior, real_BT))
        optimiser.param_groups[0]["lr"] = train.learning_rate(step, budget, 1e-4, 0.0)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()


def curve_of(training):
    """[(stage, step, seconds, NMSE), ...] at the checks of a training, a function of `log`; the checks' own time left out."""
    validate, curve, spent, began = train.validate, [], 0.0, time.perf_counter()
    def timed(*arguments):
        nonlocal spent
        start = time.perf_counter()
        figures = validate(*arguments)
        spent += time.perf_counter() - start
        return figures
    train.validate = timed
    try:
        training(lambda record: curve.append((record["stage"], record["step"], time.perf_counter() - began - spent, record["nmse"])))
    finally:
        train.validate = validate
    return curve


def arrival(curve):
    """When a VAE first had REACH, else the end: a dict of seconds, steps, NMSE there and at the end, and whether it was reached."""
    first = max((step for stage, step, *_ in curve if stage == 1), default=0)
    ends = [point for point in curve if point[0] == 2 and point[3] <= REACH and (point[1] or point is curve[-1])]
    _, step, seconds, nmse = (ends or curve[-1:])[0]
    return dict(reached=bool(ends), seconds=round(seconds, 2), steps=first + step, nmse=float(f"{nmse:.3g}"), final=float(f"{curve[-1][3]:.3g}"))


def bench_training(quick, budget):
    """Yields a row per recipe and seed, then one with the ratio; the recipes take turns, seed by seed."""
    folder, budget = Path(__file__).resolve().parent / "models", min(budget, 50) if quick else budget
    checkpoints = [chunking.open_checkpoint(str(folder / f"{name}.safetensors")) for name in ("code", "prose")]
    parents = [(c, [chunking.measure(c, e.name) for e in c.entries.values() if chunking.is_selected(e)]) for c in checkpoints]
    recipes = {"release": lambda seed, log: train_release(parents, seed, budget, log),
               "curriculum": lambda seed, log: train.train_vae(parents, VAEConfig(init="random"), CURRICULUM, seed, log=log),
               "warm": lambda seed, log: train.train_vae(parents, VAEConfig(), seed=seed, log=log)}
    facts, rows = dict(python=platform.python_version(), torch=torch.__version__, threads=torch.get_num_threads(), budget=budget), []
    for seed in range(1 if quick else 3):
        for name, recipe in recipes.items():
            rows.append(dict(what="training", recipe=name, seed=seed, **arrival(curve_of(lambda log: recipe(seed, log)))))
            print(" ".join(f"{key} {value}" for key, value in rows[-1].items() if key != "what"), flush=True)
            yield facts | rows[-1]
    medians = {name: statistics.median(row["seconds"] for row in rows if row["recipe"] == name) for name in recipes}
    for name, median in medians.items():
        mine = [row for row in rows if row["recipe"] == name]
        low, high = (pick(row["seconds"] for row in mine) for pick in (min, max))
        print(f"{name:10} median {median:.2f} s ({low:.2f} to {high:.2f}), reached in {sum(row['reached'] for row in mine)} of {len(mine)}")
    ratio, bound = medians["release"] / medians["curriculum"], not all(row["reached"] for row in rows if row["recipe"] == "release")
    good = ratio >= 3 and all(row["reached"] for row in rows if row["recipe"] == "curriculum")
    print(f"release / curriculum: {'at least ' * bound}{ratio:.1f}  target 3  {'pass' if good else 'MISS'}")
    yield facts | dict(what="training ratio", ratio=round(ratio, 2), lower_bound=bound, medians=medians)


# A section is a generator of rows.
SECTIONS = {"align": bench_align, "merge": bench_merge, "memory": bench_memory, "codec": bench_codec, "training": bench_training}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in SECTIONS:
        parser.add_argument(f"--{name}", action="store_true", help=f"run the section {name!r}")
    parser.add_argument("--quick", action="store_true", help="smallest size, two rounds")
    parser.add_argument("--budget", type=int, default=4000, metavar="STEPS", help="of the release's recipe at most (%(default)s)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append each row to FILE as JSON")
    arguments = parser.parse_args()
    chosen = [name for name in SECTIONS if getattr(arguments, name)]
    if not chosen:
        parser.error("choose a section: " + ", ".join(f"--{name}" for name in SECTIONS))
    for name in chosen:
        for row in SECTIONS[name](arguments.quick, *[arguments.budget] * (name == "training")):
            if arguments.record:
                with arguments.record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"section": name} | row, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
