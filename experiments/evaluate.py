"""How well does a checkpoint predict text it has not seen? A row per file, a column per
domain.

In:    safetensors files of models that tiny_lm.py can rebuild (any sizes).
Out:   bits per byte per domain with standard errors over documents, exact-match
       accuracy for sums, and the paired difference to the first file; as a table or
       as one number (--score).
Paper: Sec. 4 reports MMLU, HellaSwag, GSM8k and others. differs: models this small know
       only bytes, so the three domains are source code, reference prose and sums, all
       of which every Python installation has.
Left out on purpose: downloads, sampling of text, a leaderboard.
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
from tqdm import tqdm

from compare import machine
from tiny_lm import TinyLM, load

DOMAINS = ("code", "prose", "arithmetic")
# percent of documents; the strictest first
SPLITS = {"test": 15, "validation": 15, "train": 70}
# per domain and split: a standard error near 0.05 bits, in about a second
EXCERPTS = 96
# the length the models are trained on; rotary angles beyond it would be new
EXCERPT_BYTES = 256
SUMS_PER_DOCUMENT = 8
SUMS_SEED = 20260101
# Tests, tables of characters and generated files read unlike code; pydoc_data is the
# prose.
NOT_CODE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib",
            "lib2to3", "turtledemo", "encodings", "pydoc_data", "__phello__"}


def side(name):
    """test, validation or train, from a hash of the name alone: the same everywhere,
    for ever."""
    percent = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    for split, share in SPLITS.items():
        if percent < share:
            return split
        percent -= share


def code_documents(split):
    """Source files of the standard library, name -> bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = []
    for folder, folders, files in os.walk(root):
        # In place, which is how os.walk is told to stay out: site-packages can be the
        # larger part.
        folders[:] = [name for name in folders if name not in NOT_CODE]
        names += [Path(folder, name).relative_to(root).as_posix()
                  for name in files if name.endswith(".py")]
    return {name: (root / name).read_bytes() for name in sorted(names)
            if side(f"code/{name}") == split}


def strictness(topic):
    """A topic of prose as something to sort by: the strictest side first, then by
    name."""
    return list(SPLITS).index(side(f"prose/{topic}")), topic


def prose_documents(split):
    """Topics of Python's help(), name -> bytes; a paragraph stands on one side only."""
    # Two fifths of this text stands in more than one topic ("for" is also a part of
    # "compound"). Splitting by topic alone would train on much of the test, so a shared
    # paragraph goes to the strictest side that has it; there, to the first topic, since
    # what is scored should not count twice. In training a repetition does no harm.
    owner = {}
    for name, text in topics.items():
        for paragraph in text.split("\n\n"):
            known = owner.get(paragraph.strip(), strictness(name))
            owner[paragraph.strip()] = min(known, strictness(name))
    documents = {}
    for name, text in sorted(topics.items()):
        if side(f"prose/{name}") == split:
            # On the training side only the side has to agree, elsewhere side and topic.
            compared = 1 if split == "train" else 2
            own = strictness(name)[:compared]
            kept = [paragraph for paragraph in text.split("\n\n")
                    if owner[paragraph.strip()][:compared] == own]
            documents[name] = "\n\n".join(kept).encode()
    return documents


def arithmetic_documents(split, documents=EXCERPTS):
    """Seeded sums of three-digit numbers, eight lines a document:
    b"371+852=1223\\n..."."""
    generator = np.random.default_rng([SUMS_SEED, list(SPLITS).index(split)])
    lines = []
    while len(lines) < documents * SUMS_PER_DOCUMENT:
        a, b = generator.integers(100, 1000, size=2)
        # The unordered pair decides: 852+371 must not teach the answer to a held-out
        # 371+852.
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
    EXCERPT_BYTES bytes, always the same.

    ours: excerpts are dealt round by round, one of each file or topic before a second
    of any, so that few are neighbours: a standard error over them takes them for
    independent, which those of one topic are not quite.
    """
    rounds = defaultdict(list)
    for name, text in DOCUMENTS[domain](split).items():
        pieces = [text[i:i + EXCERPT_BYTES] for i in range(0, len(text), EXCERPT_BYTES)]
        # Anywhere in the file rather than its start, mostly licence and imports; no
        # stumps.
        pieces = [piece for piece in pieces if len(piece) >= 64]
        np.random.default_rng(len(text)).shuffle(pieces)
        for number, piece in enumerate(pieces):
            rounds[number].append(piece)
    dealt = []
    for number in sorted(rounds):
        dealt += rounds[number]
    return tuple(dealt[:EXCERPTS])


@torch.no_grad()
def byte_scores(model, documents, batch=32):
    """Per document: bits (n - 1,) float64 spent on each byte after the first, and
    whether argmax names that byte."""
    scores = []
    for start in range(0, len(documents), batch):
        group = documents[start:start + batch]
        longest = max(map(len, group))
        # Padding stands at the end: causal attention cannot see it, its predictions are
        # cut off.
        bytes_BT = torch.tensor([list(text.ljust(longest, b"\0")) for text in group])
        logits = model(bytes_BT[:, :-1]).float()
        nats = F.cross_entropy(logits.transpose(1, 2), bytes_BT[:, 1:],
                               reduction="none")
        bits = nats.double().numpy() / np.log(2)
        hit = logits.argmax(-1) == bytes_BT[:, 1:]
        for i, text in enumerate(group):
            scores.append((bits[i, :len(text) - 1], hit[i, :len(text) - 1].numpy()))
    return scores


def bits_per_byte(model, documents, batch=32):
    """float64 array: each document's bits over the bytes predicted (all but the first,
    which has no context)."""
    return np.array([bits.mean() for bits, _ in byte_scores(model, documents, batch)])


def score(model, split="test", documents=None):
    """{domain: (1, documents) bits per byte} of a TinyLM, or of the tensors of one: the
    form in which compare.py takes scores.  documents: at most so many per domain"""
    if not isinstance(model, torch.nn.Module):
        model = TinyLM.from_state_dict(model)
    scores = {}
    for domain in DOMAINS:
        # Eight at a time: their activations fit into a cache, which saves a fifth.
        texts = held_out(domain, split)[:documents]
        scores[domain] = bits_per_byte(model, texts, batch=8)[None]
    return scores


def exact_match(documents, scores):
    """float64 array: the share of each document's sums whose answer, and its end, the
    model would write itself.

    Greedy decoding goes wrong where its first argmax is wrong, so "every argmax right
    under the true prefix" is the same event, and the forward pass of byte_scores has
    already decided it. The newline counts: "122" must not pass as the start of "1223".
    """
    shares = []
    for text, (_, hit) in zip(documents, scores):
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
    """domain -> bits per byte of each document, and "accuracy" -> exact-match share of
    each arithmetic document."""
    columns = {}
    for domain in DOMAINS:
        scores = byte_scores(model, held_out(domain, split))
        columns[domain] = np.array([bits.mean() for bits, _ in scores])
        if domain == "arithmetic":
            columns["accuracy"] = exact_match(held_out(domain, split), scores)
    return columns


def mean_and_error(values):
    """Mean and standard error of the mean, over documents."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def print_table(files, results, split):
    """A row per file; below, if there are several, each file's paired difference to the
    first."""
    counts = ", ".join(f"{len(held_out(domain, split))} {domain}" for domain in DOMAINS)
    print("bits per byte (lower is better) and exact-match accuracy (higher), +- "
          f"standard error over documents;\n{split} split ({counts} documents) of "
          f"Python {platform.python_version()}'s own text\n")
    width = max(len(file.name) for file in files)
    print(" " * width, *(f"{column:>18}" for column in results[0]))
    for file, scores in zip(files, results):
        cells = ["{:.4f} +- {:.4f}".format(*mean_and_error(values))
                 for values in scores.values()]
        print(f"{file.name:{width}}", *(f"{cell:>18}" for cell in cells))
    if len(files) == 1:
        return
    # Paired: both files read the same documents, and how hard a document is cancels.
    print(f"\ndifference to {files[0].name} (in standard errors of the paired "
          "difference)\n")
    for file, scores in zip(files[1:], results[1:]):
        cells = []
        for column, values in scores.items():
            mean, error = mean_and_error(values - results[0][column])
            cells.append(f"{mean:+.4f} ({mean / error if error else 0:+.1f})")
        print(f"{file.name:{width}}", *(f"{cell:>18}" for cell in cells))


def row_of(file, scores, split):
    """A row about a file: numbers, and what they depend on. No path: it would mean
    nothing elsewhere."""
    columns = {}
    for column, values in scores.items():
        mean, error = mean_and_error(values)
        columns[column] = {"mean": mean, "error": error, "documents": len(values)}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"file": file.name, "sha256": digest, "split": split, "scores": columns,
            **machine()}


def parse():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE",
                        help="safetensors file; the others are compared with the first")
    parser.add_argument("--split", choices=("test", "validation"), default="test",
                        help="choose anything by validation, report test (the default)")
    parser.add_argument("--score", choices=(*DOMAINS, "accuracy"), metavar="DOMAIN",
                        help="print one number for one FILE, higher is better: minus "
                        f"the bits per byte of {', '.join(DOMAINS)}, or the accuracy")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    if args.score and len(args.files) > 1:
        parser.error("--score takes one FILE: its output is one number")
    return args


def main():
    args = parse()
    results = []
    alone = len(args.files) == 1
    for file in tqdm(args.files, desc="evaluate", unit="file",
                     disable=args.quiet or alone):
        try:
            results.append(evaluate(load(file), args.split))
        except (OSError, ValueError, SafetensorError) as error:
            print(f"error: {file}: {error}; fix: give one of models/, or a merge of "
                  "them: a .safetensors file of a Llama-type model over bytes",
                  file=sys.stderr)
            return 1
    if args.score:
        score = results[0][args.score].mean()
        print(score if args.score == "accuracy" else -score)
    else:
        print_table(args.files, results, args.split)
    return 0


if __name__ == "__main__":
    sys.exit(main())
