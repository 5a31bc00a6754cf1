"""A real model, by hand: which compression does it survive? Needs transformers.

    python experiments/real.py FOLDER

In:    a folder in the Hugging Face layout with its tokenizer.
Out:   results/real.jsonl, and the section: for each ratio r the NMSE of a VAE trained
       on this model, and the loss (nats per token of evaluate.py's test text) before
       and after.
Paper: Tables 7 and 8, on models of billions of weights.
Previous: codec.py. Next: bench.py.
"""
import tempfile
from pathlib import Path

import numpy as np
import torch

from compare import Claim, collect, command_line, find, lossless, machine, short, table
from codec import RATIOS, change_of, round_trip, train_code
from evaluate import held_out
from vae import VAEConfig

DOCUMENTS = 24          # per domain


def tokens_of(folder):
    """The tokens of each text: prose and code."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for domain in ("prose", "code"):
        for text in held_out(domain, "test")[:DOCUMENTS]:
            text = text.decode(errors="replace")
            found.append(tokenizer(text, return_tensors="pt").input_ids)
    return found


@torch.no_grad()
def loss_of(folder, tokens):
    """Mean nats per token after the first of each text."""
    from transformers import AutoModelForCausalLM
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = [lm(input_ids=ids, labels=ids).loss.item() for ids in tokens]
    predicted = [ids.shape[1] - 1 for ids in tokens]
    return float(np.average(losses, weights=predicted))


def measure_real(model):
    """Yields a row per ratio."""
    tokens = tokens_of(model)
    before = loss_of(model, tokens)
    for ratio in RATIOS:
        with tempfile.TemporaryDirectory() as folder:
            vae = train_code(folder, [model], ratio)
            decoded, trip = round_trip(folder, model, vae)
            after = loss_of(decoded, tokens)
        yield {"model": model.resolve().name, "nmse": trip["nmse"], "loss": after,
               "ratio": VAEConfig(ratio=ratio).true_ratio, "loss_before": before,
               "documents": DOCUMENTS, **machine()}


def section_real(rows):
    lines = []
    for row in rows:
        lines.append([row["model"], f"{row['ratio']:.4g}", short(row["nmse"]),
                      f"{1 - 1 / row['ratio']:.3f}", f"{row['loss']:.2f}",
                      f"{change_of(row):+.0%}"])
    return table(["model", "r", "NMSE", "1 - 1/r", "loss", "change"], lines)


def claims(records):
    # The least that compresses.
    for row in find(records["real"], model="smollm2_hf", ratio=64 / 63):
        here = f"SmolLM2-135M, r = {row['ratio']:.3g}: loss {change_of(row):+.0%}"
        yield Claim("a real model survives r > 1", "up to r = 4", here,
                    lossless(change_of(row)), "A real model",
                    "63 numbers for 64 weights are too few")


def main():
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    print(section_real(collect("real", measure_real(args.folder), args)))


if __name__ == "__main__":
    main()
