"""greedy_soup.py: merge the models that help, and only those, by a score of your own.

    python experiments/tools/greedy_soup.py --eval CMD MODEL MODEL ... [options]

CMD prints a score last, higher is better, when the path of a checkpoint is appended.
Behind the models come any of merge.py's options (--vae FILE, --space weight, ...). A
candidate is what would be written: merged by merge.py, codec and all, scored as a file.

Paper: Sec. 3.3 and Table 3: the greedy soup as a choice of the lambda_i; Recipe 1 of
       Wortsman et al. 2022, "Model soups".
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
from itertools import takewhile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import merge
from chunking import Checkpoint, Parser, check_output, command, need, say

# What the soup decides, and what would be written for every candidate.
TAKEN = ("--lam", "--lambda", "--operator", "--base", "--roundtrip", "--dry-run",
         "--init", "--save-vae", "--report")


def greedy_soup(count, score):
    """The best model, then, in order of their scores, each that makes the soup's score
    better: sorted indices.  score: [index, ...] -> that of their uniform soup
    differs:  Recipe 1 keeps a model that leaves the score as it was; the authors' code
              does not"""
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
    """The last number that a command (its words) prints, given a checkpoint's path."""
    done = subprocess.run([*line, path], stdout=subprocess.PIPE, text=True,
                          errors="replace")
    told = shlex.join(line)
    need(done.returncode == 0, "--eval", f"{told} failed, exit code {done.returncode}",
         "run it by hand on one of the models")
    numbers = [math.nan]
    for word in re.split(r"[\s=:,;()\[\]{}%]+", done.stdout):     # no digits of a path
        with contextlib.suppress(ValueError):
            numbers.append(float(word))
    need(math.isfinite(numbers[-1]), "--eval", f"{told} printed no number last",
         "print the score last")
    return numbers[-1]


def merge_arguments(models, kept):
    """What merge.py is told for the uniform soup of the kept models. The first model
    stays TARGET; its weight is 0 where it is not kept.
    Example:  of a b c kept [1, 2] -> a b c --lam 0.5,0.5;  kept [0] -> a b --lam 0.0"""
    sources = [index for index in kept if index > 0] or [1]
    lam = 1 / len(kept)
    if kept == [0]:             # a soup of it alone needs some source
        lam = 0.0
    names = [models[index] for index in sources]
    return [models[0], *names, "--lam", ",".join([str(lam)] * len(sources))]


def main(argv=None):
    parser = Parser(prog="greedy_soup.py", usage="greedy_soup.py --eval CMD MODEL MODEL"
                    " ... [-o OUT] [--force] [merge.py options]")
    parser.add_argument("--eval", required=True, type=shlex.split, help="gives a score")
    parser.add_argument("-o", "--output", help="(merged.safetensors, or merged/)")
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    a, rest = parser.parse_known_args(argv)
    models = list(takewhile(lambda word: not word.startswith("-"), rest))
    options = rest[len(models):]
    if len(models) < 2:
        parser.error("give two or more models, then merge.py's options")
    for word in options:
        if word.split("=")[0] in TAKEN:
            parser.error(f"{word} has no place in a greedy soup")
    if not a.eval or a.output == "":
        parser.error("--eval or -o is empty")
    # What the last merge would refuse is refused before the first evaluation.
    output = merge.Destination(Checkpoint(models[0]), a.output)
    inputs = [file for model in models for file in Checkpoint(model).files]
    check_output(output.path, inputs, a.force, folder=output.files)
    everybody = merge_arguments(models, range(len(models)))
    with contextlib.redirect_stdout(io.StringIO()):
        merge.main([*everybody, *options, "--dry-run"])

    def score(kept):
        told = [*merge_arguments(models, kept), *options, "--quiet", "-o"]
        beside = Path(output.path).resolve().parent         # there is room for a model
        prefix = f".lsmerge-{os.getpid()}-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=beside) as scratch:
            path = os.path.join(scratch, Path(output.path).name)
            with contextlib.redirect_stdout(io.StringIO()):     # warnings are heard
                merge.main([*told, path])
            reached = evaluate(a.eval, path)
        say(f"soup of {', '.join(models[index] for index in kept)}: {reached:.6g}")
        return reached

    kept = greedy_soup(len(models), score)
    names = ", ".join(models[index] for index in kept)
    say(f"kept {len(kept)} of {len(models)}: {names}")
    told = [*merge_arguments(models, kept), *options, "-o", output.path]
    if a.force:
        told.append("--force")
    return merge.main(told)


if __name__ == "__main__":
    sys.exit(command(main))
