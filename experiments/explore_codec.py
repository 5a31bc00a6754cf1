"""Is there a codec whose nonlinearity earns its keep? A search over its settings, for two experts.

    python experiments/explore_codec.py [--quick] [--seeds 3]

With the exact linear codec (r = 1, warm start) the latent merge IS the plain average. Whatever else
a latent merge could do must come from the curvature of encoder and decoder. So, per setting:

    as it is      W^ = D(mean z), judged against the plain average: what latent merging gains in all
    --residual    W^ = plain average + D(mean z) - mean D(z): the codec's error is out, only its
                  curvature is left
    curvature     |D(mean z) - mean D(z)| / |W_a - W_b|, the size of what can be gained or lost

In:    models code, arithmetic and prose, stored as float32 (rounding a result to bfloat16 moves it
       by 1 % of the distance between parents, as much as some settings do); merges
       code + arithmetic and code + prose at lambda = 1/2.
Out:   a table, and a JSON line per merge in results/codec-search.jsonl: all settings, also those
       that lose.
ours:  nothing of this is in the paper, which merges with whatever codec it has trained.
Previous: explore_transfer.py. Next: real_model.py.
"""
import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import merge
import train
from evaluate import DOMAINS, held_out
from lsmerge import Codec
from scores import (QUICK, Difference, append, difference, find, machine, pooled, score,
                    verdict)
from tiny_lm import load

EXPERTS = ("code", "arithmetic", "prose")
PAIRS = (("code", "arithmetic"), ("code", "prose"))
RANDOM = ["--init", "random", "--lr", "1e-3", "--steps1", "600", "--steps2", "300", "--batch", "32"]
# name -> flags of train.py. A random start is what makes a codec nonlinear at all: the warm start
# is a linear map, and training, which has nothing to gain at r = 1, leaves it one.
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


def silently(command, *flags):
    with contextlib.redirect_stdout(io.StringIO()):
        command([*map(str, flags), "--quiet", "--force"])


class Search:
    """The experts as float32 files in a folder, and what every setting is held against."""

    def __init__(self, models, folder, documents):
        self.folder, self.documents, self.average, self.apart = folder, documents, {}, {}
        for name in EXPERTS:
            tensors = load_file(models / f"{name}.safetensors")
            save_file({key: w.float() for key, w in tensors.items()}, self.file(name))
        for pair in PAIRS:
            report, self.average[pair] = self.merged(pair, "--space", "weight")
            self.apart[pair] = report["distance"]["to_target"] * 2      # the average lies half-way

    def file(self, name):
        return self.folder / f"{name}.safetensors"

    def merged(self, pair, *flags):
        """(report, scores on test text) of one run of merge.py."""
        out, report = self.file("merged"), self.folder / "report.json"
        silently(merge.main, *map(self.file, pair), "-o", out, "--report", report, *flags)
        return json.loads(report.read_text()), score(load(out), documents=self.documents)

    def measure(self, setting, seed):
        """Rows of one setting and seed: both pairs, with and without the residual."""
        vae, flags = self.file("vae"), SETTINGS[setting]
        silently(train.main, *map(self.file, EXPERTS), "-o", vae, "--seed", seed, *flags)
        facts = {"setting": setting, "flags": flags, "seed": seed,
                 "nmse": Codec.load(vae).record["stages"][-1]["nmse"]}
        for pair in PAIRS:
            for residual in (False, True):
                how = ["--residual"] if residual else ["--max-nmse", 10]
                report, scores = self.merged(pair, "--vae", vae, *how)
                yield facts | {"pair": list(pair), "residual": residual} | self.row(
                    pair, report, scores)

    def row(self, pair, report, scores):
        far, found = report["distance"], difference(scores, self.average[pair])
        return {"round_trip": report["roundtrip"]["nmse"],
                "to_average": far["to_average"] / self.apart[pair],
                "between_merge_and_parents": far["to_target"] + far["to_source"][0],
                "pooled": float(pooled(scores)[0]), "difference": found.mean,
                "se_text": found.se_text, **{d: float(scores[d].mean()) for d in DOMAINS}}


def over_seeds(group):
    """(distance to the average, Difference to it) of one setting, pair and residual."""
    means = [row["difference"] for row in group]
    seeds = np.std(means, ddof=1) / len(means) ** 0.5 if len(means) > 1 else 0.0
    text = np.mean([row["se_text"] for row in group])
    return np.mean([row["to_average"] for row in group]), Difference(np.mean(means), text, seeds)


def print_table(rows):
    print(f"\n{'setting':<40}{'pair':<20}{'NMSE':>9} |{'as it is: distance':>20}"
          f"{'bits - average':>22} |{'curvature':>11}{'bits - average':>22}  verdict")
    for setting, pair in dict.fromkeys((row["setting"], tuple(row["pair"])) for row in rows):
        both = find(rows, setting=setting, pair=list(pair))
        line = f"{setting:<40}{' + '.join(pair):<20}{both[0]['round_trip']:>9.1e} |"
        cells, verdicts = [], []
        for residual, width in ((False, 20), (True, 11)):
            far, found = over_seeds(find(both, residual=residual))
            cells.append(f"{far:>{width}.4f}{f'{found.mean:+.4f} ± {found.se:.4f}':>22}")
            verdicts.append(verdict(found))
        print(line + " |".join(cells) + f"  {' / '.join(verdicts)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=HERE / "models")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--seeds", type=int, default=3, help="of each training (%(default)s)")
    parser.add_argument("--documents", type=int, help="per domain, at most (all)")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=SETTINGS,
                        metavar="NAME")
    parser.add_argument("--quick", action="store_true",
                        help=f"{QUICK} documents, one seed, two settings; nothing is written")
    args = parser.parse_args()
    if args.quick:
        args.documents, args.seeds, args.settings = QUICK, 1, args.settings[:2]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        search = Search(args.models, Path(folder), args.documents)
        for setting in args.settings:
            # A codec that no draw enters is the same for every seed.
            for seed in range(args.seeds if "random" in setting else 1):
                rows += search.measure(setting, seed)
            print_table(find(rows, setting=setting))
    if not args.quick:
        facts = {"documents": args.documents or len(held_out(DOMAINS[0], "test")), **machine()}
        append(args.results / "codec-search.jsonl", [row | facts for row in rows])


if __name__ == "__main__":
    main()
