"""Which compression does a real model survive? For any causal language model of Hugging
Face, by hand.

    python experiments/real_model.py FOLDER [--unseen CHECKPOINT] \\
        --record experiments/results/real.jsonl         # needs transformers

In:    a folder with model, configuration and tokenizer; optionally a checkpoint that
       the codec is not fitted on.
Out:   per compression ratio r and method (the VAE of codec_tables.py, trained on this
       model; PCA; noise of the VAE's NMSE): NMSE, the model's loss on test text (nats
       per token) before and after, and its relative change. Of the unseen checkpoint
       the NMSE alone: it may be no language model.
Paper: Tables 7 and 8, on Gemma-3 models. The text is that of evaluate.py, prose and
       code, in the model's own tokens.
Previous: curriculum.py. Next: round_trips.py.
"""
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "tools")]
import sections
from codec_tables import (SCHEDULE, Model, ThroughCodec, ThroughNoise, ThroughPCA,
                          config_of,
                          effective, pca)
from evaluate import held_out
from lsmerge import Codec
from records import Results, command_line, keep, machine
from train import train_vae
from vae import VAEConfig

RATIOS = (1.0, 64 / 63, 1.25, 1.6, 2.0, 4.0)
# at most, evenly spread over each tensor: in float64 a quarter of a GB
PCA_CHUNKS = 500_000


def texts(documents):
    found = []
    for domain in ("prose", "code"):
        for text in held_out(domain, "test")[:documents]:
            found.append(text.decode(errors="replace"))
    return found


@torch.no_grad()
def loss(lm, tokens):
    """Mean nats per token after the first of each text."""
    total = 0.0
    count = 0
    for ids in tokens:
        total += lm(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


class RealModel:
    """A transformers model whose encoded tensors can be replaced; everything else
    stays."""

    def __init__(self, folder, documents):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        self.model = Model.open(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.lm = AutoModelForCausalLM.from_pretrained(folder,
                                                       dtype=torch.float32).eval()
        ids = [tokenizer(text,
                         return_tensors="pt").input_ids for text in texts(documents)]
        self.tokens = [text for text in ids if text.shape[1] > 1]
        self.before = loss(self.lm, self.tokens)

    def after(self, way):
        """(loss, NMSE, NMSE per tensor) with every encoded tensor sent through a
        code."""
        tensors, nmse, errors = self.model.rebuilt(way)
        for stats in self.model.stats:
            self.lm.get_parameter(stats.name).data.copy_(tensors[stats.name])
        return loss(self.lm, self.tokens), nmse, errors


def measure_ratio(real, unseen, ratio, fit_NC):
    """Rows of one ratio."""
    began = time.perf_counter()
    vae, stages = train_vae([real.model.parent], config_of(ratio), SCHEDULE)
    seconds = time.perf_counter() - began
    r = vae.config.true_ratio
    weights = real.model.weights
    through = ThroughCodec(Codec(vae))
    after, nmse, errors = real.after(through)
    found = [("VAE", through, sum(p.numel() for p in vae.parameters()), after, nmse)]
    if r > 1:
        basis = pca(fit_NC, vae.config.latent)
        for method, way, numbers in (("PCA", ThroughPCA(*basis), basis[1].numel()),
                                     ("noise", ThroughNoise(errors, SCHEDULE.seed),
                                      None)):
            after, nmse, _ = real.after(way)
            found.append((method, way, numbers, after, nmse))
    for method, way, numbers, after, nmse in found:
        unseen_nmse = None
        if unseen and method != "noise":
            unseen_nmse = unseen.rebuilt(way)[1]
        yield {"model": real.model.name, "weights": weights, "ratio": r,
               "method": method,
               "nmse": nmse, "loss_before": real.before, "loss": after,
               "change": after / real.before - 1,
               "effective_ratio": effective(r, weights, numbers),
               "white_noise": max(0.0, 1 - 1 / r), "unseen": unseen and unseen.name,
               "unseen_nmse": unseen_nmse, "seed": SCHEDULE.seed,
               "seconds_of_training": seconds, "stages": stages,
               "schedule": asdict(SCHEDULE),
               "documents": len(real.tokens), **machine()}


def main():
    parser = command_line(__doc__)
    parser.add_argument("folder",
                        help="a model in the Hugging Face layout, with its tokenizer")
    parser.add_argument("--unseen", help="a checkpoint that the codec is not fitted on")
    parser.add_argument("--documents", type=int, default=48,
                        help="excerpts of prose and of code (%(default)s each)")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--record", type=Path, help="file of the rows")
    args = parser.parse_args()
    real = RealModel(args.folder, args.documents)
    unseen = Model.open(args.unseen) if args.unseen else None
    C = VAEConfig().chunk
    every = max(1, -(-real.model.weights // C // PCA_CHUNKS))
    fit_NC = real.model.chunks(C, every)
    rows = []
    for ratio in args.ratios:
        rows += measure_ratio(real, unseen, ratio, fit_NC)
        print(f"r = {rows[-1]['ratio']:.4g} measured", file=sys.stderr, flush=True)
        if args.record:
            keep(args.record, rows)
    sections.show(sections.real, Results(given={"real": rows}))


if __name__ == "__main__":
    main()
