"""Tiny checkpoints with Llama's names, written by the safetensors library itself (an
independent writer). Small for testing."""
import os
import signal
import socket
import time
import traceback

# Before torch: neither a pool of threads nor MKL's record of who owns which memory
# would survive a fork.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_DISABLE_FAST_MM": "1"}
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments"), str(ROOT / "experiments/tools")]
torch.set_num_threads(1)    # the matrices here are tiny: a second thread only waits


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def llama_tensors(seed, hidden=64, layers=2, mlp=96, vocab=40, dtype=torch.float32,
                  kv=None):
    """A state dict with Hugging Face's names. The spread differs by role, as in real
    models."""
    g = generator(seed)

    def w(*shape, std=0.05, mean=0.0):
        return (mean + torch.randn(*shape, generator=g) * std).to(dtype)

    tensors = {"model.embed_tokens.weight": w(vocab, hidden, std=0.5),
               "model.norm.weight": w(hidden, mean=1.0)}
    for i in range(layers):
        p = f"model.layers.{i}."
        tensors |= {p + "self_attn.q_proj.weight": w(hidden, hidden, std=0.04),
                    p + "self_attn.k_proj.weight": w(kv or hidden, hidden),
                    p + "self_attn.v_proj.weight": w(kv or hidden, hidden, std=0.02),
                    p + "self_attn.o_proj.weight": w(hidden, hidden),
                    p + "mlp.gate_proj.weight": w(mlp, hidden),
                    p + "mlp.up_proj.weight": w(mlp, hidden, std=0.03),
                    p + "mlp.down_proj.weight": w(hidden, mlp),
                    p + "input_layernorm.weight": w(hidden, mean=1.0),
                    p + "post_attention_layernorm.weight": w(hidden, mean=1.0)}
    return tensors


def relative(tensors, seed, part=0.3):
    """A fine-tune: every float moved by a share of its own spread."""
    g = generator(seed)
    moved = {}
    for name, w in tensors.items():
        noise = torch.randn(w.shape, generator=g).to(w.dtype)
        moved[name] = w + part * w.std(correction=0) * noise
    return moved


def save(path, tensors):
    save_file(tensors, path, {"format": "pt"})
    return path


MODELS = {"a": dict(seed=1), "half": dict(seed=3, dtype=torch.bfloat16),
          "big": dict(seed=4, hidden=96, layers=3, mlp=160, kv=48)}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Paths: a; b, its relative (float32); half, a stranger of that shape (bfloat16);
    big, a deeper and wider stranger; vae, exact at r = 1; lossy, PCA at r = 4, which
    loses three quarters of white noise. Neither VAE is trained."""
    import train
    import vae
    folder = tmp_path_factory.mktemp("models")
    names = [*MODELS, "b", "vae", "lossy"]
    paths = {name: folder / f"{name}.safetensors" for name in names}
    for name, options in MODELS.items():
        save(paths[name], llama_tensors(**options))
    save(paths["b"], relative(llama_tensors(**MODELS["a"]), 2))
    exact = vae.VAE(vae.VAEConfig(blocks=0, init="pca")).start(vae.generator_for(0))
    train.save_vae(paths["vae"], exact, [], False, trained_on=["nothing"])
    flags = "--init pca --blocks 0 --ratio 4 --steps1 0 --steps2 0 --quiet"
    files = [str(paths["a"]), "-o", str(paths["lossy"])]
    assert train.main([*files, *flags.split()]) == 0
    return paths


@pytest.fixture(autouse=True)
def exact(monkeypatch, models):
    """Where a test names no VAE, its codec is not the matter: an exact one is the
    fastest. (The reference VAE is tried where it is named, and by the README's
    commands.)"""
    import merge
    monkeypatch.setattr(merge, "REFERENCE", str(models["vae"]))


# --- Commands in processes of their own: forked, so that nothing is imported anew -----
def forked(log, arguments, prepare=lambda: None, main=None):
    """Start merge.py, or another main; its process number. stdout and stderr go to
    log.out and log.err."""
    import chunking
    import merge
    if pid := os.fork():
        return pid
    code = 99
    try:
        sys.stdout = open(f"{log}.out", "w", encoding="utf-8")
        sys.stderr = open(f"{log}.err", "w", encoding="utf-8")
        prepare()
        argv = [*map(str, arguments), "--quiet"]
        code = chunking.command(lambda: (main or merge.main)(argv))
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid, seconds=60):
    for _ in range(seconds * 100):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the command hangs")


def two_processes(log, *arguments, prepare=lambda: None, main=None):
    """(exit codes, stdouts, stderrs) of a command in two processes, started as torchrun
    does: who fails ends the other one (SIGTERM; torchrun sends SIGKILL after 30 s)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    facts = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def start(rank):
        os.environ.update(facts, RANK=str(rank))
        prepare()
    pids = [forked(f"{log}{rank}", arguments, lambda rank=rank: start(rank), main)
            for rank in range(2)]
    codes, until = {}, time.monotonic() + 60
    while len(codes) < 2 and time.monotonic() < until:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.1)             # torchrun looks from time to time, too
        elif any(codes.values()):
            for other in {*pids} - {*codes}:
                os.kill(other, signal.SIGTERM)
        time.sleep(0.01)
    for other in {*pids} - {*codes}:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    texts = [[open(f"{log}{rank}.{kind}").read() for rank in range(2)]
             for kind in ("out", "err")]
    assert len(codes) == 2, ("one does not end", *texts)
    return [codes[pid] for pid in pids], *texts
