"""What does a trained VAE lose of models that it has never seen? One row per model.

    python experiments/round_trips.py VAE MODEL [MODEL ...] \\
        [--record experiments/results/vae.jsonl]

In:    a VAE file of train.py, whose header names what it was trained on; checkpoints.
Out:   per model: NMSE over its encoded weights and of the worst tensor; the loss before
       and behind it, in bits per byte of the experiments' own models, in nats per token
       of a language model in a folder (needs transformers; prose and code of
       evaluate.py); of other files none.
Paper: Table 7, "a VAE of one model on another": the claim that the encoder generalises.
Previous: real_model.py. Next: learning_curves.py.
"""
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "tools")]
import sections
from codec_tables import Model, ThroughCodec
from lsmerge import Codec
from merge import REFERENCE
from real_model import RealModel
from records import Results, command_line, keep, machine
from scores import score, summary

DOCUMENTS = 48      # of each domain of a real model's text


def lost_by(path, way):
    """(model, NMSE, NMSE per tensor, loss before, loss after); the losses None where
    the file is no language model that can be judged here."""
    if (Path(path) / "tokenizer.json").exists():
        real = RealModel(path, DOCUMENTS)
        after, nmse, errors = real.after(way)
        return real.model, nmse, errors, real.before, after
    model = Model.open(path)
    tensors, nmse, errors = model.rebuilt(way)
    if "model.embed_tokens.weight" not in tensors:
        return model, nmse, errors, None, None
    before = summary(score(model.tensors()))["pooled"]
    after = summary(score(tensors))["pooled"]
    return model, nmse, errors, before, after


def measure_model(path, vae, dtype):
    began = time.perf_counter()
    codec = Codec.load(vae, dtype=getattr(torch, dtype))
    model, nmse, errors, before, after = lost_by(path, ThroughCodec(codec))
    worst = max(errors, key=errors.get)
    seen = [Path(name).stem for name in codec.record["trained_on"]]
    name = f"of {' and '.join(seen)}"
    if Path(vae).resolve() == Path(REFERENCE).resolve():
        name = "reference"
    return {"vae": name, "model": model.name, "seen": model.name in seen,
            "weights": model.weights, "nmse": nmse,
            "worst": {"name": worst, "nmse": errors[worst]}, "dtype": dtype,
            "loss_before": before, "loss": after,
            "seconds": time.perf_counter() - began,
            "command": "python experiments/round_trips.py VAE MODEL ...", **machine()}


def main():
    parser = command_line(__doc__)
    parser.add_argument("vae", help="a file of train.py")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--record", type=Path, help="file of the rows")
    args = parser.parse_args()
    rows = []
    for path in args.models:
        for dtype in args.dtype:
            rows.append(measure_model(path, args.vae, dtype))
            if args.record:
                keep(args.record, rows)
    sections.show(sections.vae, Results(given={"vae": rows}))


if __name__ == "__main__":
    main()
