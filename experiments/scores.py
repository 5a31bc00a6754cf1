"""Scores of a model on held-out text, and what a difference between two says.

In:    models (or their tensors), the texts of evaluate.py.
Out:   scores: domain -> (S, documents) bits per byte, S seeds, 1 where nothing is
       random; differences with standard errors over documents and over seeds; "beats",
       "ties", "loses".
Paper: Sec. 4 reports benchmarks, without errors. ours: everything here.
Left out on purpose: what is merged and measured; the tables decide that.
Previous: make_models.py. Next: baselines.py.
"""
import math
from typing import NamedTuple

import numpy as np
import torch

from evaluate import DOMAINS, bits_per_byte, held_out
from tiny_lm import TinyLM

QUICK = 8           # documents per domain: enough to see that everything runs, no more
# bits per byte. ours: rounding alone makes 1e-6 in every document alike, so
FLOOR = 1e-4
#                     that its standard error is smaller still
# documents per pass: their activations fit into a cache, which saves a fifth
BATCH = 8


# --- Scores ---------------------------------------------------------------------------
def score(model, split="test", documents=None):
    """domain -> (1, documents) bits per byte of a TinyLM, or of the tensors of one."""
    if not isinstance(model, torch.nn.Module):
        model = TinyLM.from_state_dict(model)
    return {domain: bits_per_byte(model, held_out(domain, split)[:documents],
                                  BATCH)[None]
            for domain in DOMAINS}


def stacked(scores):
    """Scores of some seeds each -> of all of them: domain -> (S, documents)."""
    return {domain: np.concatenate([one[domain] for one in scores])
            for domain in scores[0]}


def pooled(scores, domains=DOMAINS):
    """(S,) each seed's bits per byte, equal weight per domain (else the longest would
    decide)."""
    return np.mean([scores[domain].mean(1) for domain in domains], axis=0)


def text_error(scores, domains=DOMAINS):
    """Standard error of the pooled mean over documents; the domains' documents are
    independent."""
    parts = [scores[domain].mean(0) for domain in domains]
    return math.sqrt(sum(part.var(ddof=1) / part.size for part in parts)) / len(parts)


# --- Differences and what they say ----------------------------------------------------
class Difference(NamedTuple):
    """Ours minus the other's, bits per byte: negative is better."""
    mean: float
    se_text: float              # over documents, paired: how hard a document is cancels
    se_seeds: float             # over the seeds of whatever is random on either side

    @property
    def se(self):
        return math.hypot(self.se_text, self.se_seeds)

    @property
    def better(self):
        return self.mean < -2 * self.se

    def record(self):
        return {**self._asdict(), "se": self.se}


def difference(ours, other, domains=DOMAINS):
    """Paired over documents.

    Equation:  D = mean over domains of mean over documents of (ours - other), seeds
               averaged first se^2 = SE_text^2 + SE_seeds^2
    Source:    ours
    """
    paired = {d: ours[d].mean(0)[None] - other[d].mean(0)[None] for d in domains}
    seeds = [pooled(ours, domains), pooled(other, domains)]
    spread = sum(values.var(ddof=1) / values.size for values in seeds
                 if values.size > 1)
    mean = float(pooled(paired, domains)[0])
    return Difference(mean, text_error(paired, domains), math.sqrt(spread))


def verdict(found):
    """What a Difference says. Exactly two standard errors are a tie, less than FLOOR
    always is."""
    if abs(found.mean) < FLOOR:
        return "ties"
    return "beats" if found.better else "loses" if found.mean > 2 * found.se else "ties"


# --- A summary ------------------------------------------------------------------------
def summary(scores, domains=DOMAINS):
    """Means over seeds and documents; the error over documents."""
    return {"pooled": float(pooled(scores, domains).mean()),
            "se": text_error(scores, domains),
            **{domain: float(scores[domain].mean()) for domain in DOMAINS}}
