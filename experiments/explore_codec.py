"""Is there a codec whose nonlinearity earns its keep? A search over its settings, for two experts of one base.

    python experiments/explore_codec.py [--quick] [--seeds 3]

With the exact linear codec (r = 1, warm start) the latent merge IS the plain average. Whatever else a latent merge could
do must come from the curvature of encoder and decoder. So for every setting below:

    as it is      W^ = D(mean z), judged against the plain average (what latent merging gains or costs in all)
    --residual    W^ = plain average + D(mean z) - mean D(z): the codec's error is out, only its curvature is left
    curvature     |D(mean z) - mean D(z)| / |W_a - W_b|, the size of what can be gained or lost

In:    models code, arithmetic and prose, stored as float32 (rounding a result to bfloat16 moves it by 1 % of the distance
       between parents, as much as some settings do); merges code + arithmetic and code + prose at lambda = 1/2.
Out:   a table, and a JSON line per merge in results/codec-search.jsonl: all settings, also those that lose.
ours:  nothing of this is in the paper, which merges with whatever codec it has trained.
Previous: curriculum.py.
"""
import argparse
import contextlib
import io
import json
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import merge
import train
from evaluate import DOMAINS, byte_scores, held_out
from paper_tables import append, difference, pooled
from tiny_lm import load

PAIRS = [("code", "arithmetic"), ("code", "prose")]
RANDOM = ["--init", "random", "--lr", "1e-3", "--steps1", "600", "--steps2", "300", "--batch", "32"]
# name -> flags of train.py. A random start is what makes a codec nonlinear at all: the warm start is a linear map, and
# training, which has nothing to gain at r = 1, leaves it one.
SETTINGS = {
    "warm start, r = 1": ["--steps1", "0", "--steps2", "0"],
    "warm start, r = 2": ["--ratio", "2", "--steps1", "0", "--steps2", "0"],
    "random, r = 1": RANDOM,
    "random, r = 1/2": [*RANDOM, "--ratio", "0.5"],
    "random, r = 2": [*RANDOM, "--ratio", "2"],
    "random, r = 1, beta 1e-2": [*RANDOM, "--beta", "1e-2"],
    "random, r = 1, beta 1e-1": [*RANDOM, "--beta", "1e-1"],
    "random, r = 1, four blocks": [*RANDOM, "--blocks", "4"],
    "random, r = 1, windows of one chunk": [*RANDOM, "--tokens", "1", "--batch", "512"],
}


def silently(run, *flags):
    with contextlib.redirect_stdout(io.StringIO()):
        run([*map(str, flags), "--quiet", "--force"])


def score(path, split, documents):
    """domain -> (1, documents) bits per byte."""
    model = load(path)
    return {d: np.array([[bits.mean() for bits, _ in byte_scores(model, held_out(d, split)[:documents])]]) for d in DOMAINS}


def merged(folder, models, pair, documents, *flags):
    """(report, scores on test text) of one run of merge.py."""
    out, report = folder / "merged.safetensors", folder / "report.json"
    silently(merge.main, *(models / f"{name}.safetensors" for name in pair), "-o", out, "--report", report, *flags)
    return json.loads(report.read_text()), score(out, "test", documents)


def measure(folder, models, name, seed, documents, average):
    """Rows of one setting and seed: both pairs, with and without the residual."""
    vae = folder / "vae.safetensors"
    silently(train.main, *(models / f"{n}.safetensors" for n in ("code", "arithmetic", "prose")), "-o", vae, "--seed", seed, *SETTINGS[name])
    nmse = merge.load_vae(vae)[1]["stages"][-1]["nmse"]
    for pair in PAIRS:
        for residual in (False, True):
            flags = ["--vae", vae, "--max-nmse", 10, *(["--residual"] if residual else [])]
            report, scores = merged(folder, models, pair, documents, *flags)
            apart = np.mean([report["distance"]["to_target"], report["distance"]["to_source"][0]]) * 2
            found = difference(scores, average[pair])
            yield {"setting": name, "flags": SETTINGS[name], "seed": seed, "pair": list(pair), "residual": residual, "nmse": nmse,
                   "round_trip": report["roundtrip"]["nmse"], "to_average": report["distance"]["to_average"] / average[pair, "apart"],
                   "between_merge_and_parents": apart, "pooled": float(pooled(scores)[0]), "difference": found.mean, "se_text": found.se_text,
                   **{d: float(scores[d].mean()) for d in DOMAINS}}


def print_table(rows):
    print(f"\n{'setting':<40}{'pair':<20}{'NMSE':>9} |{'as it is: distance':>20}{'bits - average':>22} |{'curvature':>11}{'bits - average':>22}  verdict")
    for name, pair in dict.fromkeys((r["setting"], tuple(r["pair"])) for r in rows):
        cells = []
        for residual in (False, True):
            group = [r for r in rows if (r["setting"], tuple(r["pair"]), r["residual"]) == (name, pair, residual)]
            mean, text = np.mean([r["difference"] for r in group]), np.mean([r["se_text"] for r in group])
            seeds = np.std([r["difference"] for r in group], ddof=1) / len(group) ** 0.5 if len(group) > 1 else 0.0
            cells.append((np.mean([r["to_average"] for r in group]), mean, float(np.hypot(text, seeds))))
        # Below a ten-thousandth of a bit float32 rounding decides, which standard errors over text do not know of.
        verdicts = ["beats" if m < -max(2 * se, 1e-4) else "loses" if m > max(2 * se, 1e-4) else "ties" for _, m, se in cells]
        print(f"{name:<40}{' + '.join(pair):<20}{group[0]['round_trip']:>9.1e} |" + " |".join(
            f"{d:>{width}.4f}{f'{m:+.4f} ± {se:.4f}':>22}" for width, (d, m, se) in zip((20, 11), cells)) + f"  {verdicts[0]} / {verdicts[1]}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=HERE / "models")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--seeds", type=int, default=3, help="of each training (%(default)s)")
    parser.add_argument("--documents", type=int, help="per domain, at most (all)")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=SETTINGS, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="8 documents, one seed, two settings; nothing is written")
    args = parser.parse_args()
    if args.quick:
        args.documents, args.seeds, args.settings = 8, 1, args.settings[:2]
    rows, average = [], {}
    facts = {"documents": args.documents or len(held_out(DOMAINS[0], "test")), "python": platform.python_version(), "torch": torch.__version__,
             "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as name:
        folder = models = Path(name)
        for expert in {name for pair in PAIRS for name in pair}:
            save_file({k: t.float() for k, t in load_file(args.models / f"{expert}.safetensors").items()}, folder / f"{expert}.safetensors")
        for pair in PAIRS:
            report, average[pair] = merged(folder, models, pair, args.documents, "--space", "weight")
            average[pair, "apart"] = report["distance"]["to_target"] * 2       # the average lies half-way
        for setting in args.settings:
            # A codec that no draw enters is the same for every seed.
            for seed in range(args.seeds if "random" in setting else 1):
                rows += measure(folder, models, setting, seed, args.documents, average)
            print_table([r for r in rows if r["setting"] == setting])
    if not args.quick:
        append(args.results / "codec-search.jsonl", [row | facts for row in rows])


if __name__ == "__main__":
    main()
