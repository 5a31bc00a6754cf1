"""What the tests share: tiny checkpoints with Llama's names, written by the safetensors
library itself (an independent writer); a desk, on which commands run in this process;
and processes, for what only a process can show."""
import json
import os
import signal
import socket
import time
import traceback
import zlib

# Before torch: neither a pool of threads nor MKL's record of who owns which memory
# would survive a fork.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_DISABLE_FAST_MM": "1"}
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments"), str(ROOT / "experiments/tools")]
torch.set_num_threads(1)    # the matrices here are tiny: a second thread only waits
import chunking
import merge
import train
import vae

INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def llama_tensors(seed, hidden=64, layers=2, mlp=96, vocab=40, dtype=torch.float32,
                  kv=None):
    """A state dict with Hugging Face's names. The spread differs by role."""
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
    """A fine-tune: floats move by a part of their spread and a little, others by 1."""
    g = generator(seed)
    moved = {}
    for name, w in tensors.items():
        move = torch.ones(w.shape)
        if w.is_floating_point():
            spread = w.double().std(correction=0) + 0.01
            move = part * spread * torch.randn(w.shape, generator=g)
        moved[name] = (w.double() + move).to(w.dtype)
    return moved


# Two experts of one base; two strangers, of which one is deeper and wider.
A = llama_tensors(1)
B = relative(A, 2)
HALF = llama_tensors(3, dtype=torch.bfloat16)
BIG = llama_tensors(4, hidden=96, layers=3, mlp=160, kv=48)


def save(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = torch.contiguous_format                 # the library writes no views
    held = {name: w.clone(memory_format=whole) for name, w in tensors.items()}
    save_file(held, path, {"format": "pt"})
    return path


def sharded(folder, tensors, changes=(), where=""):
    names = sorted(tensors)
    table = {}
    for k, shard in enumerate(SHARDS):
        part = {name: tensors[name] for name in names[k::2]}
        save(folder / where / shard, part)
        table |= dict.fromkeys(part, where + shard)
    text = json.dumps({"metadata": {}, "weight_map": table | dict(changes)})
    (folder / INDEX).write_text(text)
    (folder / "config.json").write_text('{"num_hidden_layers": 2}\n')
    return folder


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        mine = got[name].reshape(-1).view(torch.uint8)
        assert torch.equal(mine, tensor.reshape(-1).view(torch.uint8)), name


def assert_near(got, expected, rtol=1e-6):
    """Relative to a tensor's largest weight, or to half a step of a narrower dtype."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        if not tensor.is_floating_point():
            assert torch.equal(got[name], tensor), name
            continue
        wide = tensor.double()
        most = max(rtol, torch.finfo(got[name].dtype).eps / 2)
        error = (got[name].double() - wide).abs().max()
        assert error <= most * wide.abs().max(), f"{name}: {error}"


# --- Oracles that several files need --------------------------------------------------
def overlap_matrix(n_s, n_t):
    """P of Algorithm 1, line 3, by its definition, interval by interval:
    P[j, i] = n_t |[j/n_t, (j+1)/n_t) n [i/n_s, (i+1)/n_s)|"""
    P = torch.zeros(n_t, n_s, dtype=torch.float64)
    for j in range(n_t):
        for i in range(n_s):
            left = max(j * n_s, i * n_t)
            right = min((j + 1) * n_s, (i + 1) * n_t)
            P[j, i] = max(0, right - left) / n_s
    return P


def transport_of(source, target):
    """A of the Gaussian map, (Z, Z) by scipy, from two clouds of latents."""
    S, T = (np.cov(np.asarray(z).T, bias=True) for z in (source, target))
    root = scipy.linalg.sqrtm(S).real
    inverse = np.linalg.inv(root)
    middle = scipy.linalg.sqrtm(root @ T @ root).real
    return torch.from_numpy(inverse @ middle @ inverse)


def textbook_plan(cost, epsilon):
    """Sinkhorn's loop in the log domain, run to its end. Masses are uniform."""
    I, J = cost.shape
    score = -np.asarray(cost, dtype=float) / (epsilon * cost.max().item())
    g = np.zeros(J)
    for _ in range(600):
        f = -np.log(I) - scipy.special.logsumexp(score + g, axis=1)
        g = -np.log(J) - scipy.special.logsumexp(score + f[:, None], axis=0)
    return torch.from_numpy(np.exp(score + f[:, None] + g))


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Paths of these, and of two VAEs: vae, exact at r = 1; lossy, PCA at r = 4, which
    loses three quarters of white noise."""
    folder = tmp_path_factory.mktemp("models")
    names = ("a", "b", "half", "big", "vae", "lossy")
    paths = {name: folder / f"{name}.safetensors" for name in names}
    for name, tensors in zip(names, (A, B, HALF, BIG)):
        save(paths[name], tensors)
    exact = vae.VAE(vae.VAEConfig(blocks=0, init="pca")).start(vae.generator_for(0))
    chunking.write_tensors(paths["vae"], *exact.to_file({"trained_on": ["none"]}))
    flags = "--init pca --blocks 0 --ratio 4 --steps1 0 --steps2 0 --quiet"
    files = [str(paths["a"]), "-o", str(paths["lossy"])]
    assert train.main([*files, *flags.split()]) == 0
    return paths


@pytest.fixture(autouse=True)
def exact(monkeypatch, models):
    """Where a test names no VAE, it is an exact one: the fastest."""
    monkeypatch.setattr(merge, "REFERENCE", str(models["vae"]))


# --- Commands in this process ---------------------------------------------------------
def snapshot(folder):
    """All below a folder: mode, and of files time, size, names and contents."""
    state = {}
    for path in folder.rglob("*"):
        info = path.lstat()
        facts = [info.st_mode]
        if path.is_symlink():
            facts.append(os.readlink(path))
        elif not path.is_dir():
            facts += [info.st_mtime_ns, info.st_size, info.st_nlink]
        if path.is_file():
            facts.append(zlib.crc32(path.read_bytes()))
        state[str(path)] = facts
    return state


def check_line(error, words):
    """What stderr says is one line, which names its culprit and a remedy."""
    assert error.startswith("error: ") and error.count("\n") == 1, error[:2000]
    assert "; fix: " in error and error[:-1].isprintable(), error[:500]
    for word in words:
        assert str(word) in error, (word, error[:500])


class Desk:
    """A folder to work in: tensors go in, a command runs, its result comes out."""

    def __init__(self, folder, capsys):
        self.folder = folder
        self.capsys = capsys

    def __truediv__(self, name):
        return self.folder / name

    def put(self, tensors, name):
        return save(self.folder / f"{name}.safetensors", tensors)

    def written(self, arguments):
        """A command's words. The k-th, if a state dict, is written as k.safetensors."""
        words = []
        for k, argument in enumerate(arguments):
            if isinstance(argument, dict):
                argument = self.put(argument, k)
            words.append(str(argument))
        return words

    def model(self, tensors, name="T", **texts):
        """A model folder, with companions: name -> text."""
        save(self.folder / name / "model.safetensors", tensors)
        for file, text in {"config.json": '{"model_type": "x"}', **texts}.items():
            path = self.folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return self.folder / name

    def run(self, *arguments, main=merge.main):
        argv = self.written(arguments)
        self.capsys.readouterr()
        try:
            code = chunking.command(partial(main, argv))
        except SystemExit as ended:
            code = ended.code
        said = self.capsys.readouterr()
        return code, said.out, said.err

    def merged(self, *arguments, out="m.safetensors"):
        """(tensors, report) of a merge; what it said is in desk.said and desk.err."""
        path = self.folder / out
        report = self.folder / "report.json"
        outputs = ["-o", path, "--report", report, "--force"]
        code, self.said, self.err = self.run(*arguments, *outputs)
        assert code == 0, self.err
        if path.is_dir():
            path = path / "model.safetensors"
        return load_file(path), json.loads(report.read_text())

    def refuse(self, *arguments, words=(), code=1, main=merge.main):
        """Refused in one line that holds the words; nothing on the disk has changed."""
        arguments = self.written(arguments)
        before = snapshot(self.folder)
        found, _, error = self.run(*arguments, main=main)
        assert found == code, (found, error)
        *warnings, line = error.splitlines(keepends=True)
        assert all(each.startswith("warning: ") for each in warnings), error
        check_line(line, words)
        assert snapshot(self.folder) == before


@pytest.fixture
def desk(tmp_path, capsys):
    return Desk(tmp_path, capsys)


# --- Commands in processes of their own: forked, so that nothing is imported anew -----
def forked(log, arguments, prepare=lambda: None, main=merge.main):
    """Start a command; its process number. Its streams go to log.out and log.err."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        sys.stdout = open(f"{log}.out", "w", encoding="utf-8")
        sys.stderr = open(f"{log}.err", "w", encoding="utf-8")
        prepare()
        argv = [str(argument) for argument in arguments]
        code = chunking.command(partial(main, argv))
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid):
    """Its exit code. What hangs for a minute fails."""
    for _ in range(6000):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the command hangs")


def two_processes(log, *arguments, prepare=lambda: None, main=merge.main):
    """(exit codes, stdouts, stderrs) of two that torchrun starts, and that both end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    facts = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def start(rank):
        os.environ.update(facts, RANK=str(rank))
        prepare()
    pids = [forked(f"{log}{rank}", arguments, partial(start, rank), main)
            for rank in range(2)]
    codes = [ended(pid) for pid in pids]
    texts = [[open(f"{log}{rank}.{kind}").read() for rank in range(2)]
             for kind in ("out", "err")]
    return codes, *texts
