"""Which compression does a real model survive? Any causal language model of Hugging Face, by hand.

    python experiments/real_model.py FOLDER [--unseen CHECKPOINT] \\
        --record experiments/results/real.jsonl                    # needs: pip install transformers

In:    a folder with model, configuration and tokenizer; optionally a checkpoint that the codec is
       not fitted on.
Out:   per compression ratio r and method (the VAE as train.py makes it on this model; PCA; noise of
       the VAE's NMSE): NMSE, the model's loss on test text (nats per token) before and after, and
       its relative change; the largest r within 1 % of the loss. Of the unseen checkpoint the NMSE
       alone: it may be no language model.
Paper: Tables 7 and 8, on Gemma-3 models. The text is that of evaluate.py, prose and code, in the
       model's own tokens.
Previous: explore_codec.py. Next: bench.py.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from chunking import chunk, standardise
from codec_tables import Model, ThroughCodec, ThroughNoise, ThroughPCA, effective, pca
from evaluate import held_out
from lsmerge import Codec
from scores import append, machine
from train import Schedule, train_vae
from vae import VAEConfig

RATIOS = (1.0, 64 / 63, 1.25, 1.6, 2.0, 4.0)
PCA_CHUNKS = 500_000    # at most, evenly spread over each tensor: in float64 a quarter of a GB


def some_chunks(model, C):
    step, parts = max(1, -(-model.weights // C // PCA_CHUNKS)), []
    for slot in model.slots:
        chunks_NC, _ = chunk(standardise(model.file.read(slot.name), slot), C)
        parts.append(chunks_NC[::step].double())
    return torch.cat(parts)


def texts(documents):
    return [text.decode(errors="replace") for domain in ("prose", "code")
            for text in held_out(domain, "test")[:documents]]


@torch.no_grad()
def loss(lm, tokens):
    """Mean nats per token after the first of each text."""
    total = count = 0
    for ids in tokens:
        total += lm(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


class RealModel:
    """A transformers model whose encoded tensors can be replaced; everything else stays."""

    def __init__(self, folder, documents):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        self.model, tokenizer = Model.open(folder), AutoTokenizer.from_pretrained(folder)
        self.lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = [tokenizer(text, return_tensors="pt").input_ids for text in texts(documents)]
        self.tokens = [text for text in ids if text.shape[1] > 1]
        self.before = loss(self.lm, self.tokens)

    def after(self, way):
        """(loss, NMSE, NMSE per tensor) with every encoded tensor sent through a code."""
        tensors, nmse, errors = self.model.rebuilt(way)
        for slot in self.model.slots:
            self.lm.get_parameter(slot.name).data.copy_(tensors[slot.name])
        return loss(self.lm, self.tokens), nmse, errors


def measure_ratio(real, unseen, ratio, fit_NC, seed=0):
    """Rows of one ratio."""
    began = time.perf_counter()
    vae, stages = train_vae([real.model.parent], VAEConfig(ratio=ratio), Schedule(seed=seed))
    seconds, r, weights = time.perf_counter() - began, vae.config.true_ratio, real.model.weights
    through = ThroughCodec(Codec(vae))
    found = real.after(through)
    basis, numbers = pca(fit_NC, vae.config.latent), sum(p.numel() for p in vae.parameters())
    ways = [("VAE", through, numbers)]
    if r > 1:
        ways += [("PCA", ThroughPCA(*basis), basis[1].numel()),
                 ("noise", ThroughNoise(found[2], seed), None)]
    for method, way, numbers in ways:
        after, nmse, _ = found if method == "VAE" else real.after(way)
        judged = unseen and method != "noise"
        yield {"model": real.model.name, "weights": weights, "ratio": r, "method": method,
               "nmse": nmse, "loss_before": real.before, "loss": after,
               "change": after / real.before - 1,
               "effective_ratio": numbers and effective(r, weights, numbers),
               "white_noise": max(0.0, 1 - 1 / r), "unseen": unseen and unseen.name,
               "unseen_nmse": unseen.rebuilt(way)[1] if judged else None, "seed": seed,
               "seconds_of_training": seconds, "stages": stages, "schedule": vars(Schedule()),
               "documents": len(real.tokens), **machine()}


def show(value, form):
    return "" if value is None else format(value, form)


def print_row(row):
    print(f"{row['ratio']:>7.4g} {row['white_noise']:>8.3f}  {row['method']:<8}{row['nmse']:>10.2e}"
          f"{show(row['effective_ratio'], '.2f'):>13}{row['loss']:>9.4f}{row['change']:>+9.2%}"
          f"{show(row['unseen_nmse'], '.2e'):>13}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a model in the Hugging Face layout, with its tokenizer")
    parser.add_argument("--unseen", help="a checkpoint that the codec is not fitted on")
    parser.add_argument("--documents", type=int, default=48,
                        help="excerpts of prose and of code (%(default)s each)")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--record", type=Path,
                        help=f"append to this file, for example {HERE.name}/results/real.jsonl")
    args = parser.parse_args()
    real, unseen = RealModel(args.folder, args.documents), args.unseen and Model.open(args.unseen)
    fit_NC, kept = some_chunks(real.model, VAEConfig().chunk), []
    print(f"{real.model.name}: {real.model.weights:,} encoded weights, loss {real.before:.4f} nats "
          f"per token\n{'r':>7} {'1 - 1/r':>8}  {'method':<8}{'NMSE':>10}{'effective r':>13}"
          f"{'loss':>9}{'change':>9}{'unseen NMSE':>13}")
    for ratio in args.ratios:
        rows = []
        for row in measure_ratio(real, unseen, ratio, fit_NC):
            rows.append(row)
            print_row(row)
        kept += [row["ratio"] for row in rows
                 if row["method"] == "VAE" and abs(row["change"]) <= 0.01]
        if args.record:
            append(args.record, rows)
    print(f"largest r within 1 % of the loss: {max(kept):g}" if kept
          else "no r tried stays within 1 % of the loss")


if __name__ == "__main__":
    main()
