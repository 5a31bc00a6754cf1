"""Which compression does a real model survive? Any causal language model in the Hugging Face layout, by hand.

    python experiments/real_model.py FOLDER [--unseen CHECKPOINT] --record experiments/results/real.jsonl     # needs: pip install transformers

In:    a folder with model, configuration and tokenizer; optionally a checkpoint that the codec is not fitted on.
Out:   per compression ratio r and method (the VAE as train.py makes it on this model; PCA; noise of the VAE's NMSE): NMSE, the
       model's loss on test text (nats per token) before and after, and its relative change; the largest r within 1 % of the loss.
       Of the unseen checkpoint the NMSE alone: it may be no language model.
Paper: Tables 7 and 8, on Gemma-3 models. The text is that of evaluate.py, prose and code, in the model's own tokens.
Previous: curriculum.py.
"""
import argparse
import platform
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from chunking import chunk, scale
from codec_tables import Model, effective, pca, through_codec, through_noise, through_pca
from evaluate import held_out
from lsmerge import Codec
from paper_tables import append
from train import Schedule, train_vae
from vae import VAEConfig

RATIOS = (1.0, 64 / 63, 1.25, 1.6, 2.0, 4.0)
PCA_CHUNKS = 500_000                                    # at most, evenly spread over each tensor: float64 of 64 each is a quarter of a GB


def some_chunks(model, C):
    step = max(1, -(-model.weights // C // PCA_CHUNKS))
    return torch.cat([chunk(scale(model.file.read(slot.name), slot), C)[0][::step].double() for slot in model.slots])


def texts(documents):
    return [text.decode(errors="replace") for domain in ("prose", "code") for text in held_out(domain, "test")[:documents]]


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
        self.tokens = [ids for text in texts(documents) if (ids := tokenizer(text, return_tensors="pt").input_ids).shape[1] > 1]
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
    vae, stages = train_vae([real.model.parent], VAEConfig(ratio=ratio), seed=seed)
    seconds, r, codec = time.perf_counter() - began, vae.config.true_ratio, Codec(vae)
    found = real.after(through_codec(codec))
    basis = pca(fit_NC, vae.config.latent)
    ways = {"VAE": (through_codec(codec), sum(p.numel() for p in vae.parameters()), found), "PCA": (through_pca(*basis), basis[1].numel(), None),
            "noise": (through_noise(found[2], seed), None, None)}
    for method, (way, numbers, known) in ways.items() if r > 1 else [("VAE", ways["VAE"])]:
        after, nmse, _ = known or real.after(way)
        yield {"model": real.model.name, "weights": real.model.weights, "ratio": r, "method": method, "nmse": nmse, "loss_before": real.before, "loss": after,
               "change": after / real.before - 1, "effective_ratio": numbers and effective(r, real.model.weights, numbers),
               "white_noise": max(0.0, 1 - 1 / r), "unseen": unseen and unseen.name,
               "unseen_nmse": unseen.rebuilt(way)[1] if unseen and method != "noise" else None, "seed": seed, "seconds_of_training": seconds,
               "stages": stages, "schedule": vars(Schedule()), "documents": len(real.tokens), "python": platform.python_version(), "torch": torch.__version__}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a model in the Hugging Face layout, with its tokenizer")
    parser.add_argument("--unseen", help="a checkpoint that the codec is not fitted on")
    parser.add_argument("--documents", type=int, default=48, help="excerpts of prose and of code (%(default)s each)")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--record", type=Path, help=f"append to this file, for example {HERE.name}/results/real.jsonl")
    args = parser.parse_args()
    real, unseen, rows = RealModel(args.folder, args.documents), args.unseen and Model.open(args.unseen), []
    fit_NC = some_chunks(real.model, VAEConfig().chunk)
    print(f"{real.model.name}: {real.model.weights:,} encoded weights, loss {real.before:.4f} nats per token\n"
          f"{'r':>7} {'1 - 1/r':>8}  {'method':<8}{'NMSE':>10}{'effective r':>13}{'loss':>9}{'change':>9}{'unseen NMSE':>13}")
    for ratio in args.ratios:
        new = []
        for row in measure_ratio(real, unseen, ratio, fit_NC):
            new.append(row)
            show = lambda value, form: "" if value is None else format(value, form)
            print(f"{row['ratio']:>7.4g} {row['white_noise']:>8.3f}  {row['method']:<8}{row['nmse']:>10.2e}{show(row['effective_ratio'], '.2f'):>13}"
                  f"{row['loss']:>9.4f}{row['change']:>+9.2%}{show(row['unseen_nmse'], '.2e'):>13}", flush=True)
        rows += new
        if args.record:
            append(args.record, new)
    kept = [row["ratio"] for row in rows if row["method"] == "VAE" and abs(row["change"]) <= 0.01]
    print(f"largest r within 1 % of the loss: {max(kept):g}" if kept else "no r tried stays within 1 % of the loss")


if __name__ == "__main__":
    main()
