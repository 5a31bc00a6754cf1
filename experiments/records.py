"""Records: one JSON line each, in results/NAME.jsonl; what a number depends on; looking
them up.

In:    rows: dicts that JSON can hold.
Out:   files in which each key of KEYS stands once: what is measured again replaces what
       was there.
Paper: none of it. Previous: tiny_lm.py. Next: evaluate.py.
"""
import argparse
import json
import math
import os
import platform
import statistics
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
# What names a row of NAME.jsonl. Rows of equal names replace each other.
KEYS = {
    "merge": ("file",), "main": ("name",), "tour": ("name",),
    "table2": ("row",), "table3": ("row",), "table4": ("row",), "table6": ("row",),
    "figure4": ("row", "source", "align", "pairing", "lam", "control", "seed", "few"),
    "table7": ("checkpoint", "ratio", "method"),
    "table8": ("checkpoint", "ratio", "method"),
    "real": ("model", "ratio", "method"), "vae": ("vae", "model", "dtype"),
    "ablation": ("group", "variant"), "curves": ("name", "model", "seed"),
    "clouds": ("align",), "spectra": ("model", "role"), "kinship": ("source", "target"),
    "pruned": ("row", "lam", "seed"), "sibling": ("row", "lam", "seed"),
    "bench-peer": ("what",), "bench-memory": ("bytes", "network"),
    "bench-merge": ("dtype", "network", "round"),
    "bench-codec": ("device", "dtype", "width", "network", "part"),
    "bench-training": ("what", "recipe", "seed"),
    "bench-align": ("what", "n", "m", "kind", "latent", "epsilon")}


def commit():
    """The commit of this repository, with + behind it if files differ; None without
    git."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True,
                              text=True)
    try:
        head = git("rev-parse", "--short", "HEAD").stdout.strip()
        changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except OSError:
        return None
    return head + "+" * bool(changed) or None


def machine():
    """What a number depends on besides its inputs."""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "commit": commit()}


def read(path):
    """The rows of a file, [] without it."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def key_of(name, row):
    """What a row of NAME.jsonl is called. Other files: each row is a key of its own."""
    if name not in KEYS:
        return json.dumps(row)
    return tuple(str(row.get(key)) for key in KEYS[name])


def keep(path, rows):
    """Write rows to a file; they take the places of those of equal keys."""
    path = Path(path)
    found = {key_of(path.stem, row): row for row in [*read(path), *rows]}
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in found.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(lines))
    # a run that is interrupted here leaves what was there
    os.replace(partial, path)


def command_line(doc):
    """The parser of a command; its help is the text at the head of its file."""
    return argparse.ArgumentParser(description=doc,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def find(rows, **fields):
    """The rows that have all these values."""
    return [row for row in rows if all(row.get(key) == value for key,
                                       value in fields.items())]


class Results:
    """The rows of one folder, as they are needed; or those given: {name: rows}."""

    def __init__(self, folder=None, given=None):
        self.folder = folder
        self.known = dict(given or {})

    def rows(self, name):
        """The rows of NAME.jsonl, [] without the file."""
        if name not in self.known:
            self.known[name] = read(Path(self.folder,
                                         f"{name}.jsonl")) if self.folder else []
        return self.known[name]


def grouped(rows, *keys):
    """{values of these keys: the rows that have them}"""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def over_seeds(differences):
    """(mean, standard error) of one difference measured with several seeds.

    Equation:  se^2 = (mean SE_text)^2 + var / S
    """
    means = [d["mean"] for d in differences]
    text = statistics.mean(d.get("se_text", d.get("se")) for d in differences)
    spread = statistics.variance(means) / len(means) if len(means) > 1 else 0.0
    return statistics.mean(means), math.hypot(text, math.sqrt(spread))


def cells(results, few=False):
    """The merges across shapes and their controls. few: with chunks so long that a
    tensor has fewer of them than a chunk has numbers."""
    return [row for row in results.rows("figure4") if bool(row["few"]) == few]


def curve(results, **fields):
    """[(lambda, mean, standard error)]: difference to the target, the seeds of a
    control taken together."""
    rows = find(cells(results), **{"control": None, **fields})
    return [(lam,
             *over_seeds([row["difference"]["base"] for row in rows
                          if row["lam"] == lam]))
            for lam in sorted({row["lam"] for row in rows} - {0.0})]
