"""Speed, measured beside the libraries that people would otherwise use; medians of interleaved runs.

    python experiments/bench.py --align [--quick] [--record experiments/results/bench-align.jsonl]

--align: align.py's Sinkhorn beside three solvers of POT (Python Optimal Transport), its Gaussian map beside
POT's. Every solver gets the iterations it needs for the same *measured* marginal error, the larger L1 error
of both sides of the plan it returns: 1e-9 at epsilon 0.05, 1e-6 below. POT's own threshold is a 2-norm of one
side, so it is not used: its solvers are all the plain iteration, whose steps are counted beforehand. Times
include the plan. Ratios are ours / POT's: below 1 is faster. On a busy machine set OMP_NUM_THREADS=1, or
threads wait for each other; the number of threads is printed and recorded.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import align
from align import Moments

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


SECTIONS = {"align": bench_align}  # a further section is a generator of rows, named here


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in SECTIONS:
        parser.add_argument(f"--{name}", action="store_true", help=f"run the section {name!r}")
    parser.add_argument("--quick", action="store_true", help="smallest size, two rounds")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append each row to FILE as JSON")
    arguments = parser.parse_args()
    chosen = [name for name in SECTIONS if getattr(arguments, name)]
    if not chosen:
        parser.error("choose a section: " + ", ".join(f"--{name}" for name in SECTIONS))
    for name in chosen:
        for row in SECTIONS[name](arguments.quick):
            if arguments.record:
                with arguments.record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"section": name} | row, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
