"""greedy_soup.py: merge the models that help, and only those, by a score of your own.

    python experiments/tools/greedy_soup.py --eval CMD MODEL MODEL ... [options]

In:    two or more models, the first is merge.py's TARGET; a command that prints
       a score last, higher is better, when the path of a checkpoint is appended; behind
       the models any of merge.py's options (--vae FILE, --space weight, ...).
Out:   the uniform soup of the models that are kept, as merge.py writes it.
Paper: Sec. 3.3 and Table 3: the greedy soup as a choice of the lambda_i; Recipe 1 of
       Wortsman et al. 2022, "Model soups".
ours:  a candidate is what would be written: merged by merge.py, codec and all, scored
       as a file. A model alone is its round trip. Score on validation data, not on the
       data that is reported.

Example:
    python experiments/tools/greedy_soup.py a.safetensors b.safetensors c.safetensors \\
        --space weight --eval "python evaluate.py --split validation --score code"
"""
import contextlib
import io
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import merge
from chunking import Checkpoint, Parser, check_output, command, need, say

# Options of merge.py that the soup decides, and those that train a VAE every time.
TAKEN = ("--lam", "--lambda", "--operator", "--base", "--roundtrip", "--dry-run",
         "--init", "--save-vae")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(nan|inf)", re.I)


def greedy_soup(count, score):
    """The best model, then, in order of their scores, each that makes the soup's score
    better.

    Args:     count models; score: [index, ...] -> that of their uniform soup, higher is
              better
    Returns:  sorted indices of those kept, after 2 count - 1 calls of score
    differs:  Recipe 1 keeps a model that leaves the score as it was; the authors' code
              does not
    """
    alone = [score([index]) for index in range(count)]
    order = sorted(range(count), key=lambda index: -alone[index])
    kept = order[:1]
    best = alone[order[0]]
    for index in order[1:]:
        reached = score(sorted([*kept, index]))
        if reached > best:
            kept.append(index)
            best = reached
    return sorted(kept)


def evaluate(line, path):
    """The last number that a command prints, given a checkpoint's path."""
    done = subprocess.run([*shlex.split(line), path], capture_output=True, text=True,
                          errors="replace")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    need(done.returncode == 0, "--eval",
         f"{line!r} failed, exit code {done.returncode}: {last}",
         "run it by hand on one of the models")
    # Whole words only: the digits of a path are no score.
    words = re.split(r"[\s=:,;()\[\]{}%]+", done.stdout)
    numbers = [float(word) for word in words if NUMBER.fullmatch(word)]
    need(numbers and math.isfinite(numbers[-1]), "--eval",
         f"{line!r} printed no number last", "print the score last")
    return numbers[-1]


def merge_arguments(models, kept):
    """What merge.py is told for the uniform soup of the kept models.

    The first model stays TARGET, so that names and dtypes never change; its weight is 0
    where it is not kept. A soup of it alone needs some source, of weight 0.
    Example:  of a b c kept [1, 2] -> a b c --lam 0.5,0.5;  kept [0] -> a b --lam 0.0
    """
    sources = [index for index in kept if index > 0] or [1]
    lam = []
    for index in sources:
        lam.append(1 / len(kept) if index in kept else 0.0)
    names = [models[index] for index in sources]
    return [models[0], *names, "--lam", ",".join(map(str, lam))]


def silently(told):
    """merge.py without its prints: the last merge says it all."""
    unheard = io.StringIO()
    with contextlib.redirect_stdout(unheard), contextlib.redirect_stderr(unheard):
        merge.main(told)


class Scorer:
    """Merges a soup into a scratch file, scores it, says so, and forgets it."""

    def __init__(self, models, options, line, output, quiet):
        self.models = models
        self.options = options
        self.line = line
        self.output = output
        self.bar = tqdm(total=2 * len(models) - 1, unit="soup", leave=False,
                        disable=quiet or None)

    def __call__(self, kept):
        beside = os.path.dirname(os.path.realpath(self.output))     # room for a model
        with tempfile.TemporaryDirectory(prefix=".lsmerge-", suffix=".tmp",
                                         dir=beside) as scratch:
            name = os.path.basename(os.path.normpath(self.output))
            path = os.path.join(scratch, name)
            told = merge_arguments(self.models, kept)
            silently([*told, *self.options, "-o", path, "--quiet"])
            score = evaluate(self.line, path)
        self.bar.update()
        names = ", ".join(self.models[index] for index in kept)
        self.bar.clear()
        say(f"soup of {names}: {score:.6g}")
        return score


def check(a, models, options):
    """The output's path; refuses before the first evaluation what the last merge would
    refuse."""
    parents = [Checkpoint(model) for model in models]
    inputs = [file for parent in parents for file in parent.files]
    result = merge.Destination(parents[0], a.output)
    check_output(result.path, inputs, a.force, folder=result.files)
    if a.report:
        check_output(a.report, [*inputs, result.path], a.force, "--report")
    everybody = merge_arguments(models, range(len(models)))
    with contextlib.redirect_stdout(io.StringIO()):
        merge.main([*everybody, *options, "--dry-run"])     # warnings are heard once
    return result.path


def parse(argv):
    """(arguments of this command, models, options for merge.py)"""
    parser = Parser(
        prog="greedy_soup.py",
        usage="greedy_soup.py --eval CMD MODEL MODEL ... [-o OUT] [merge.py options]",
        description="Merge the models that help, and only those, by your own score.",
        epilog="All other options are merge.py's, and come behind the models.")
    add = parser.add_argument
    add("--eval", required=True, metavar="CMD", help="run with a checkpoint's path "
        "appended; the last number that it prints is the score, higher is better")
    add("-o", "--output", metavar="PATH",
        help="(merged.safetensors; merged/ if the first MODEL is a folder)")
    add("--report", metavar="FILE", help="merge.py's JSON report of the final soup")
    add("--force", action="store_true", help="overwrite an existing output")
    add("--quiet", action="store_true", help="no progress bars")
    a, rest = parser.parse_known_args(argv)
    options = []
    models = list(rest)
    for i, word in enumerate(rest):
        if word.startswith("-"):
            models = rest[:i]
            options = rest[i:]
            break
    if len(models) < 2:
        parser.error("give two or more models, then merge.py's options")
    for word in options:
        if word.split("=")[0] in TAKEN:
            parser.error(f"{word} has no place in a greedy soup (train.py trains VAEs)")
    try:
        empty = not shlex.split(a.eval)
    except ValueError as error:
        parser.error(f"--eval: {error}")
    if empty:
        parser.error("--eval is empty")
    return a, models, options


def main(argv=None):
    a, models, options = parse(argv)
    output = check(a, models, options)
    scorer = Scorer(models, options, a.eval, output, a.quiet)
    kept = greedy_soup(len(models), scorer)
    scorer.bar.close()
    names = ", ".join(models[index] for index in kept)
    say(f"kept {len(kept)} of {len(models)}: {names}")
    told = [*merge_arguments(models, kept), *options, "-o", output]
    if a.report:
        told += ["--report", a.report]
    if a.force:
        told.append("--force")
    if a.quiet:
        told.append("--quiet")
    return merge.main(told)


if __name__ == "__main__":
    sys.exit(command(main))
