"""How well does a checkpoint predict text it has not seen?

    python experiments/evaluate.py FILE FILE ...
    python experiments/evaluate.py FILE --score code --split validation

In:    safetensors files of models that tiny_lm.py can rebuild, or adapters' folders.
Out:   a row per file: bits per byte of each domain with standard errors over documents,
       exact-match accuracy for sums; below, the paired difference to the first file.
Paper: Sec. 4 reports MMLU, GSM8k and others. differs: models this small know only
       bytes: source code, reference prose and sums, which every Python has.
Previous: tiny_lm.py. Next: make_models.py.
"""
import argparse
import functools
import hashlib
import os
import platform
import sys
import sysconfig
from collections import defaultdict
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from tiny_lm import TinyLM, load      # it finds the modules above
from chunking import command

DOMAINS = ("code", "prose", "arithmetic")
SPLITS = {"test": 15, "validation": 15, "train": 70}    # percent; the strictest first
EXCERPTS = 96           # per domain and split: a standard error near 0.05 bits
EXCERPT_BYTES = 256     # as in training; rotary angles beyond it would be new
BATCH = 8               # documents at a time, whose activations fit into a cache
SUMS_PER_DOCUMENT = 8
SUMS_SEED = 20260101
# Tests, tables and generated files read unlike code; pydoc_data is the prose.
NOT_CODE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib",
            "lib2to3", "turtledemo", "encodings", "pydoc_data", "__phello__"}


# --- The text -----------------------------------------------------------------------
def side(name):
    """test, validation or train, from a hash of the name alone: the same for ever."""
    percent = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    for split, share in SPLITS.items():
        if percent < share:
            return split
        percent -= share


def code_documents(split):
    """Source files of the standard library, name -> bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = {}
    for folder, folders, files in os.walk(root):
        # In place, which is how os.walk is told to stay out.
        folders[:] = [name for name in folders if name not in NOT_CODE]
        for file in files:
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            if file.endswith(".py") and side(f"code/{name}") == split:
                documents[name] = path.read_bytes()
    return dict(sorted(documents.items()))


def strictness(topic):
    """Topics in this order: the strictest side first, then by name."""
    return list(SPLITS).index(side(f"prose/{topic}")), topic


def prose_documents(split):
    """Topics of Python's help(), name -> bytes. Two fifths of this text stands in more
    than one: a shared paragraph goes to the strictest side that has it, and there to
    the first topic, since what is scored should not count twice."""
    owner = {}
    for topic in sorted(topics, key=strictness):
        for paragraph in topics[topic].split("\n\n"):
            owner.setdefault(paragraph.strip(), topic)
    documents = {}
    for topic in sorted(topics):
        if side(f"prose/{topic}") == split:
            kept = []
            for paragraph in topics[topic].split("\n\n"):
                first = owner[paragraph.strip()]
                # In training a repetition does no harm.
                repeated = split == "train" and side(f"prose/{first}") == split
                if first == topic or repeated:
                    kept.append(paragraph)
            documents[topic] = "\n\n".join(kept).encode()
    return documents


def arithmetic_documents(split, documents=EXCERPTS):
    """Sums of three-digit numbers, eight lines a document: b"371+852=1223\\n..."."""
    generator = np.random.default_rng([SUMS_SEED, list(SPLITS).index(split)])
    lines = []
    while len(lines) < documents * SUMS_PER_DOCUMENT:
        a, b = generator.integers(100, 1000, size=2)
        # The unordered pair decides: 852+371 must not teach a held-out 371+852.
        if side(f"arithmetic/{min(a, b)}+{max(a, b)}") == split:
            lines.append(f"{a}+{b}={a + b}\n")
    found = {}
    for start in range(0, len(lines), SUMS_PER_DOCUMENT):
        text = "".join(lines[start:start + SUMS_PER_DOCUMENT])
        found[f"sums {start}"] = text.encode()
    return found


DOCUMENTS = {"code": code_documents, "prose": prose_documents,
             "arithmetic": arithmetic_documents}


@functools.cache  # the tables score hundreds of models on the same text
def held_out(domain, split):
    """The scored documents of a domain: at most EXCERPTS byte strings of 64 to
    EXCERPT_BYTES bytes. They are dealt round by round, one of each file or topic before
    a second of any: standard errors take them for independent."""
    rounds = defaultdict(list)
    for text in DOCUMENTS[domain](split).values():
        pieces = [text[i:i + EXCERPT_BYTES] for i in range(0, len(text), EXCERPT_BYTES)]
        pieces = [piece for piece in pieces if len(piece) >= 64]
        # Anywhere in the file: its start is mostly licence and imports.
        np.random.default_rng(len(text)).shuffle(pieces)
        for number, piece in enumerate(pieces):
            rounds[number].append(piece)
    dealt = []
    for number in sorted(rounds):
        dealt += rounds[number]
    return tuple(dealt[:EXCERPTS])


# --- Scores -------------------------------------------------------------------------
@torch.no_grad()
def read(model, documents):
    """(bits per byte of each document, after its first byte, float64; for each of its
    bytes after the first whether argmax names it)"""
    bits = []
    hits = []
    for start in range(0, len(documents), BATCH):
        group = documents[start:start + BATCH]
        longest = max(map(len, group))
        # Padding stands at the end, where causal attention cannot see it.
        bytes_BT = torch.tensor([list(text.ljust(longest, b"\0")) for text in group])
        logits = model(bytes_BT[:, :-1]).float()
        nats = F.cross_entropy(logits.transpose(1, 2), bytes_BT[:, 1:],
                               reduction="none")
        hit = logits.argmax(-1) == bytes_BT[:, 1:]
        for i, text in enumerate(group):
            own = nats[i, :len(text) - 1].double().numpy() / np.log(2)
            bits.append(own.mean())
            hits.append(hit[i, :len(text) - 1].numpy())
    return np.array(bits), hits


def score(tensors, split="test"):
    """{domain: (1, documents) bits per byte} of a model's tensors, for compare.py."""
    model = TinyLM.from_state_dict(tensors)
    found = {}
    for domain in DOMAINS:
        bits, _ = read(model, held_out(domain, split))
        found[domain] = bits[None]
    return found


def exact_match(documents, hits):
    """(documents,) float64: the share of sums whose answer greedy decoding would write,
    which is right where every argmax is right under the true prefix. The newline
    counts: "122" must not pass as the start of "1223"."""
    shares = []
    for text, hit in zip(documents, hits):
        right = []
        start = 0
        for line in text.splitlines(keepends=True):
            answer = start + line.index(b"=") + 1
            end = start + len(line)
            right.append(hit[answer - 1:end - 1].all())  # hit[i] judges byte i + 1
            start = end
        shares.append(np.mean(right))
    return np.array(shares)


def evaluate(model, split):
    """{domain: bits per byte of each document, "accuracy": exact-match share of each
    document of sums}"""
    columns = {}
    for domain in DOMAINS:
        columns[domain], hits = read(model, held_out(domain, split))
    columns["accuracy"] = exact_match(held_out("arithmetic", split), hits)
    return columns


def mean_and_error(values):
    """Mean and standard error of the mean, over documents."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


# --- The command --------------------------------------------------------------------
def print_line(label, cells, width):
    print(f"{label:{width}}", *(f"{cell:>18}" for cell in cells))


def print_table(files, results, split):
    """A row per file; below, each file's paired difference to the first: how hard a
    document is cancels."""
    counts = ", ".join(f"{len(held_out(domain, split))} {domain}" for domain in DOMAINS)
    print("bits per byte (lower is better) and exact-match accuracy (higher), +- "
          f"standard error over documents;\n{split} split ({counts} documents) of "
          f"Python {platform.python_version()}'s own text\n")
    width = max(len(file.name) for file in files)
    print_line("", results[0], width)
    for file, scores in zip(files, results):
        cells = []
        for values in scores.values():
            mean, error = mean_and_error(values)
            cells.append(f"{mean:.4f} +- {error:.4f}")
        print_line(file.name, cells, width)
    if len(files) > 1:
        print(f"\ndifference to {files[0].name} (in standard errors of the paired "
              "difference)\n")
    for file, scores in zip(files[1:], results[1:]):
        cells = []
        for column, values in scores.items():
            mean, error = mean_and_error(values - results[0][column])
            cells.append(f"{mean:+.4f} ({mean / error if error else 0:+.1f})")
        print_line(file.name, cells, width)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--split", choices=("test", "validation"), default="test",
                        help="choose anything by validation, report test (the default)")
    parser.add_argument("--score", choices=DOMAINS,
                        help="of one FILE one number, higher is better: minus its bits")
    args = parser.parse_args()
    results = []
    for file in args.files:
        try:
            results.append(evaluate(load(file), args.split))
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise SystemExit(f"error: {file}: {error}; fix: give one of models/, or a "
                             "merge of them")
    if args.score:
        print(-results[0][args.score].mean())
    else:
        print_table(args.files, results, args.split)


if __name__ == "__main__":
    sys.exit(command(main))
