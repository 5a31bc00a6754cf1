"""Records, paired differences, one vocabulary of verdicts, tables in Markdown: what all
experiments share. Nothing is measured here.

scores: {domain: (S, documents)} bits per byte, S seeds (1 where nothing is random)
rows:   dicts that JSON can hold, in results/NAME.jsonl
Paper:  it reports benchmarks without errors or controls. ours: all of this.
"""
import argparse
import contextlib
import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
# So that whoever imports this file first finds the project's modules and the tools.
sys.path[:0] = [str(HERE.parent), str(HERE / "tools")]
MODELS = HERE / "models"
RESULTS = HERE / "results"
FLOOR = 1e-4            # bits per byte; rounding makes 1e-6, in all documents alike
LOSSLESS = 0.01         # of the loss: what still counts as the same model


# --- Records ------------------------------------------------------------------------
# What names a row. A new row replaces the one of the same name.
NAMES = ("name", "file", "row", "vae", "model", "ratio", "source", "align", "lam",
         "control", "seed", "bytes", "network")


def git(*arguments):
    """What git says of this repository, "" without it."""
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def machine():
    """What a number depends on besides its inputs. A + behind the commit: code differs
    from it."""
    commit = git("rev-parse", "--short", "HEAD")
    if commit and git("status", "--porcelain", "--", ":(top)*.py"):
        commit += "+"
    return {"python": platform.python_version(), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "commit": commit or None}


def read(name, folder=RESULTS):
    """The rows of NAME.jsonl, [] without the file."""
    path = Path(folder) / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def name_of(row):
    return tuple(str(row.get(key)) for key in NAMES)


def keep(name, rows, folder=RESULTS):
    """Write rows to NAME.jsonl, in the places of those of the same name."""
    known = {}
    for row in [*read(name, folder), *rows]:
        known[name_of(row)] = row
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in known.values()]
    path = Path(folder) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(lines))
    os.replace(partial, path)


def collect(name, rows, args):
    """The rows of a measurement, each kept at once."""
    found = []
    for row in rows:
        keep(name, [row], args.results)
        found.append(row)
    return found


def find(rows, **fields):
    """The rows that have all these values."""
    found = []
    for row in rows:
        if all(row.get(key) == value for key, value in fields.items()):
            found.append(row)
    return found


def grouped(rows, *keys):
    """{values of these keys: the rows that have them}"""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def printed(command, *words):
    """What a command of the project prints, run in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as heard:
        code = command([str(word) for word in words])
    if code:
        raise RuntimeError(f"{command.__module__}.py ended with {code}")
    return heard.getvalue()


def command_line(doc):
    """The parser of an experiment; its help is the text at the head of its file."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form)
    parser.add_argument("--results", type=Path, default=RESULTS,
                        help="folder of the records")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


# --- Differences --------------------------------------------------------------------
def stacked(scores):
    """Scores of some seeds each -> of all of them."""
    first = scores[0]
    return {domain: np.concatenate([one[domain] for one in scores]) for domain in first}


def pooled(scores, domains=None):
    """(S,) each seed's bits per byte. Every domain has the same weight, or else the
    one with the longest texts would decide."""
    return np.mean([scores[domain].mean(1) for domain in domains or scores], axis=0)


def text_error(scores):
    """Standard error of the pooled mean over documents; documents of different domains
    are independent."""
    total = 0.0
    for one in scores.values():
        values = one.mean(0)
        total += values.var(ddof=1) / values.size
    return math.sqrt(total) / len(scores)


def summary(scores):
    """Means over seeds and documents; the error over documents."""
    means = {domain: float(values.mean()) for domain, values in scores.items()}
    return {"pooled": float(pooled(scores).mean()), "se": text_error(scores), **means}


class Difference(NamedTuple):
    """Ours minus the other's, bits per byte: negative is better."""
    mean: float
    se_text: float              # over documents, paired: how hard a document is cancels
    se_seeds: float             # over the seeds of whatever is random on either side

    @property
    def se(self):
        return math.hypot(self.se_text, self.se_seeds)

    def record(self):
        return {**self._asdict(), "se": self.se}


def difference(ours, other, domains=None):
    """Paired over documents.

    Equation:  D = mean over domains of the mean over documents of (ours - other),
               seeds averaged first;  se^2 = se_text^2 + se_seeds^2
    """
    paired = {}
    for domain in domains or ours:
        paired[domain] = (ours[domain].mean(0) - other[domain].mean(0))[None]
    spread = 0.0
    for scores in (ours, other):
        values = pooled(scores, domains)
        if values.size > 1:
            spread += values.var(ddof=1) / values.size
    return Difference(float(pooled(paired)[0]), text_error(paired), math.sqrt(spread))


def over_seeds(differences):
    """(mean, standard error) of one difference measured with several seeds.

    Equation:  se^2 = (mean se_text)^2 + var / S
    """
    means = [d["mean"] for d in differences]
    text = statistics.mean(d.get("se_text", d.get("se")) for d in differences)
    if len(means) == 1:
        return means[0], text
    spread = statistics.variance(means) / len(means)
    return statistics.mean(means), math.hypot(text, math.sqrt(spread))


# --- Verdicts -----------------------------------------------------------------------
def sign(mean, se):
    """-1 better, 1 worse, 0 neither. Exactly two standard errors are neither, less
    than FLOOR always is."""
    if abs(mean) < FLOOR or abs(mean) <= 2 * se:
        return 0
    return -1 if mean < 0 else 1


def gain(differences):
    """What becomes of a claimed gain. differences: (mean, se) to what was there
    before, then to every control.

    holds            better than before, and than every control
    ties             better than before, but no better than a control
    not reproduced   no better than before, or worse than a control
    """
    signs = [sign(*d) for d in differences]
    if all(one < 0 for one in signs):
        return "holds"
    if signs[0] < 0 and max(signs) == 0:
        return "ties"
    return "not reproduced"


def lossless(change):
    """The verdict of a code that is to keep a model; change: of its loss."""
    return "holds" if abs(change) <= LOSSLESS else "not reproduced"


class Claim(NamedTuple):
    """A row of the table of claims. A claim with a meaning stands in the README."""
    claim: str
    paper: str                  # its number; "" where the claim is ours
    here: str
    verdict: str                # holds, ties, not reproduced; or ours
    section: str                # heading of RESULTS.md
    meaning: str = ""


# --- Text ---------------------------------------------------------------------------
def pm(mean, se, signed=True):
    """+0.0566 ± 0.0034: two digits of the error, but at most 4 decimals."""
    decimals = 4
    if se > 0:
        decimals = min(4, max(0, 1 - math.floor(math.log10(se))))
    text = f"{mean:+.{decimals}f}"
    if float(text) == 0 or (not signed and mean > 0):
        text = text[1:]
    return f"{text} ± {se:.{decimals}f}"


def pm_of(d):
    return pm(d["mean"], d["se"])


def cell(d):
    """A difference in a table, bold where it is better by more than two errors."""
    if d is None:
        return ""
    text = pm_of(d)
    return f"**{text}**" if sign(d["mean"], d["se"]) < 0 else text


def short(value):
    """5.1e-14, 0.008, 0.353"""
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3f}"


def several(values, form=short):
    """4.5e-04 to 0.007, or one of them where they look alike."""
    ends = dict.fromkeys([form(min(values)), form(max(values))])
    return " to ".join(ends)


def table(head, rows):
    """Markdown, with an empty line behind it."""
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in [head, *rows]]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines) + "\n"


def tally(rows, label):
    """How often rows are better, neither, worse than `label`"""
    signs = []
    for row in rows:
        if label in row["difference"]:
            d = row["difference"][label]
            signs.append(sign(d["mean"], d["se"]))
    return (f"{signs.count(-1)} better, {signs.count(0)} equal within two errors, "
            f"{signs.count(1)} worse")
