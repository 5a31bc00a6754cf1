"""How files, folders, values and machines go wrong: tables of faults. Each is one line
that names the culprit, leaves the old output as it was (bytes, mode, time), and leaves
nothing behind. Then what folders and shards must give. The oracle of what a file may
hold is the safetensors library: what it accepts is accepted, and read the same; what it
refuses is refused. (Usage errors: test_merge.py, test_train.py; VAE files:
test_vae.py.)"""
import ast
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import zlib

import pytest
import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import load_file, save_file

import chunking as ck
import merge
import train
from conftest import ROOT, ended, forked, save, two_processes

UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
EMBED, INDEX = "model.embed_tokens.weight", "model.safetensors.index.json"
SHARDS = [f"model-{i + 1:05}-of-00002.safetensors" for i in range(2)]


def run(*arguments, main=merge.main):
    return ck.command(lambda: main([*map(str, arguments), "--quiet"]))


def good(*arguments, out):
    """The merge's tensors, as the library reads them."""
    assert run(*arguments, "--force", "-o", out) == 0
    return load_file(out if os.path.isfile(out) else out / "model.safetensors")


def equal(one, two):
    return list(one) == list(two) and all(
        torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


def made(folder):
    folder.mkdir()
    return folder


def linked(path, to):
    os.symlink(to, path)
    return path


def snapshot(folder):
    """All below a folder: kind and mode, and of what is no folder time, size and
    digest."""
    state = {}
    for path in folder.rglob("*"):
        info, content = path.lstat(), None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = zlib.crc32(path.read_bytes())
        rest = path.is_dir() or (info.st_mtime_ns, info.st_size, content)
        state[str(path)] = info.st_mode, rest
    return state


class Box:
    """A folder with inputs and, in out/, an old result that no fault may touch."""

    def __init__(self, folder, models):
        self.folder, self.bad = folder, folder / "bad.safetensors"
        self.out = folder / "out/m.safetensors"
        self.a, self.b, self.vae = (folder / f"{name}.safetensors"
                                    for name in ("a", "b", "vae"))
        for path in (self.a, self.b, self.vae):
            shutil.copyfile(models[path.stem], path)
        self.out.parent.mkdir()
        self.out.write_bytes(b"old")
        os.chmod(self.out, 0o640)
        os.utime(self.out, (1e9, 1e9))

    def tensors(self, **changes):
        return load_file(self.a) | changes

    def save(self, tensors, name="bad.safetensors"):
        return save(self.folder / name, tensors)

    def shards(self, tensors=None, **changes):
        """A model folder of two shards and an index; `changes` to its map."""
        folder, tensors = made(self.folder / "model"), tensors or self.tensors()
        names = sorted(tensors)
        places = {n: SHARDS[i * 2 // len(names)] for i, n in enumerate(names)}
        for shard in SHARDS:
            save(folder / shard, {n: tensors[n] for n in names if places[n] == shard})
        text = json.dumps({"metadata": {}, "weight_map": places | changes})
        (folder / INDEX).write_text(text)
        (folder / "config.json").write_text('{"num_hidden_layers": 2}\n')
        return folder

    def old_folder(self, *names):
        """An old result folder that holds these files, too."""
        folder = made(self.folder / "out/merged")
        for name in ("model.safetensors", *names):
            (folder / name).write_text("old")
        return folder


@pytest.fixture
def box(models, tmp_path):
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(120)
    yield Box(tmp_path, models)
    signal.alarm(0)


def check_refusal(error, words):
    assert error.startswith("error: ") and error.count("\n") == 1, error[:2000]
    assert error[:-1].isprintable() and "; fix: " in error, error[:500]
    assert all(str(word) in error for word in words), (error[:500], words)


def check_fault(box, capsys, arguments, words, force=True, main=merge.main):
    before = snapshot(box.folder)
    capsys.readouterr()
    output = [] if {"-o", "--output"} & {*map(str, arguments)} else ["-o", box.out]
    assert run(*arguments, *output, *["--force"] * force, main=main) == 1
    check_refusal(capsys.readouterr().err, words)
    assert snapshot(box.folder) == before


# --- Files: what bad.safetensors holds, and words of the error line -------------------
W = "layers.0.w"
GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def packed(header, data=bytes(range(16))):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def w(data=bytes(range(16)), **changes):
    return packed({W: GOOD | changes}, data)


def torch_file():
    torch.save({}, stream := io.BytesIO())
    return stream.getvalue()


REFUSED = {         # by the library, too; real files that are no checkpoints are named
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\nsize 1\n",
                        "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "pickle": (pickle.dumps({"w": [1.0]}), "pickle"), "empty": (b"", "fetch"),
    "torch zip": (torch_file(), "zip", "convert it"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(40), "GGUF"),
    "a header of 60, cut short": ((60).to_bytes(8, "little") + b'{"a":', "fetch"),
    "a header of 128, cut short": ((128).to_bytes(8, "little") + b'{"a":', "fetch"),
    "nesting bomb": (packed(b"[" * 200_000), "fetch"),
    "truncated": (w(bytes(15)), "fetch"), "trailing bytes": (w(bytes(17)), "fetch")}
OURS = {            # what the library accepts, and we do not
    "no tensors": (packed({"__metadata__": {"format": "pt"}}, b""), "no tensors"),
    "dtype F4": (w(dtype="F4", shape=[32]), repr(W), "F4")}
ACCEPTED = {        # odd, but the library reads it: so must we, and the same
    "no name": packed({"": GOOD}), "unknown keys": w(note="x", long=10 ** 300),
    "no bytes, huge shape": w(b"", shape=[0, 2 ** 61, 9], data_offsets=[0, 0]),
    "bytes that are not aligned": packed(
        {W: GOOD | {"data_offsets": [1, 17]},
         "b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, bytes(range(17))),
    "names": packed({f"{c}/..": GOOD | {"data_offsets": [16 * i, 16 * i + 16]}
                     for i, c in enumerate(("a\nb", "\0", "é\u2028", "²"))}, bytes(64))}


def library(data):
    """{name: (dtype, shape, bytes)} as the library reads them; None: it refuses."""
    try:
        found = deserialize(data)
    except SafetensorError:
        return None
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"]))
            for name, t in found}


def ours(checkpoint):
    return {name: (ck.DTYPE_NAMES[entry.dtype], entry.shape,
                   checkpoint.read(name).view(torch.uint8).numpy().tobytes())
            for name, entry in checkpoint.entries.items()}


@pytest.mark.parametrize("case", [*REFUSED, *OURS, *ACCEPTED])
def test_a_file_is_read_as_the_library_reads_it(box, capsys, case):
    """Or refused, as target, source or VAE."""
    data, *words = {**REFUSED, **OURS}.get(case) or [ACCEPTED[case]]
    box.bad.write_bytes(data)
    assert (library(data) is None) == (case in REFUSED)
    if case in ACCEPTED:
        assert ours(ck.Checkpoint(box.bad)) == library(data)
        return
    for way in ([box.bad, box.b], [box.a, box.bad], [box.a, box.b, "--vae", box.bad]):
        check_fault(box, capsys, way, [box.bad, *words])


# --- Values: a good model with one bad number, and what the error must name -----------
BIG = torch.ones(2 * ck.PIECE + 5, 1)
VALUES = {          # (tensor, number, at, the tensor it is put into)
    "NaN in a norm": (NORM, math.nan, -1, None),
    "NaN at the end of a large tensor": (UP, math.nan, -1, BIG),
    "float16 Inf": (NORM, math.inf, 0, torch.ones(64).half()),
    "float8 NaN": (NORM, math.nan, 0, torch.ones(64).to(torch.float8_e4m3fn)),
    "float64 too large": (UP, 1e300, 0, torch.ones(96, 64).double()),
    "an odd name": ("é\u2028\x1b[2J\n", math.nan, 0, torch.ones(2))}


@pytest.mark.parametrize("side", ["target", "source"])
@pytest.mark.parametrize("case", VALUES)
def test_a_value_that_would_spoil_the_result(box, capsys, case, side):
    name, number, at, tensor = VALUES[case]
    tensors = box.tensors()
    if tensor is not None:
        tensors[name] = tensor.clone()
    ones = {n: torch.ones(t.shape) for n, t in tensors.items()}
    tensors[name].view(-1)[at] = number
    bad, other = box.save(tensors), box.save(ones, "good.safetensors")
    words = [bad, repr(name), *["NaN or Inf"] * (not math.isfinite(number))]
    way = [bad, other] if side == "target" else [other, bad]
    capsys.readouterr()
    before = snapshot(box.folder)
    assert run(*way, "-o", box.out, "--force") == 1
    lines = capsys.readouterr().err.splitlines(keepends=True)
    check_refusal(lines[-1], words)             # (the constant model is a stranger)
    assert snapshot(box.folder) == before


def test_a_value_that_does_not_fit_the_targets_dtype(box, capsys):
    target = box.save({k: t.half() for k, t in box.tensors().items()}, "t.safetensors")
    source = box.tensors()
    source[NORM][:] = 3e5
    check_fault(box, capsys, [target, box.save(source)], [repr(NORM), "float16"])


# --- Folders and indexes: builders that return (what the user names, words) -----------
def mapped(name, shard, *words):
    """The index says that this tensor is there."""
    return lambda box: (box.shards(**{name: shard}), words)


def folder_with(files, *words):
    """A folder of these files: name -> text or tensors."""
    def build(box):
        folder = made(box.folder / "model")
        for name, content in files.items():
            if isinstance(content, dict):
                save_file(content, folder / name)
            else:
                (folder / name).write_text(content)
        return folder, [folder, *words]
    return build


def special(make):
    def build(box):
        make(box.bad)
        return box.bad, [box.bad]
    return build


def beyond_the_limit(path):
    """A header of more than the 100 MB that the format allows."""
    path.write_bytes((10 ** 8 + 1).to_bytes(8, "little"))
    os.truncate(path, 10 ** 8 + 99)


TINY = {W: torch.ones(2, 2)}
FOLDERS = {         # (where shards may lie, and stale indexes: test_kinds.py)
    **{f"an index {text[:20]}": folder_with({INDEX: text}, INDEX)
       for text in ("{", '{"weight_map": ["w"]}', "[" * 200_000)},
    "value is no string": mapped(UP, 5, INDEX), "a NUL": mapped(UP, "a\0.safetensors"),
    "half a character": mapped(UP, "\ud800", "missing"),
    "ghost name": mapped("ghost.weight", SHARDS[0], "'ghost.weight'", SHARDS[0]),
    "mapped to the wrong shard": mapped(EMBED, SHARDS[1], repr(EMBED), SHARDS[1]),
    "a shard is no file": mapped("x", "../model", "model"),
    "an empty folder": folder_with({}, "no", ".safetensors"),
    "only pickles": folder_with({"model.bin": "x"}, "model.bin", "convert"),
    "several files": folder_with({"a.safetensors": TINY, "b.safetensors": TINY},
                                 "a.safetensors, b.safetensors"),
    "a hub's name": lambda box: ("org/model", ["org/model", "nothing is downloaded"]),
    "a file as folder": lambda box: (box.a / "x", ["a.safetensors/x"]),
    "a device": lambda box: ("/dev/zero", ["/dev/zero", "regular"]),
    "a pipe": special(os.mkfifo),
    "a link to itself": special(lambda path: os.symlink(path.name, path)),
    "header beyond the format's limit": special(beyond_the_limit)}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_path_or_folder_that_is_no_model(box, capsys, case):
    path, words = FOLDERS[case](box)
    for arguments in ([box.a, path], [path, box.b, "--space", "weight"]):
        check_fault(box, capsys, arguments, words)


# --- Outputs and options: builders that return (arguments, words) ---------------------
def into(name, *words):
    """The output lies there; of a folder if the name ends in a slash."""
    def build(box):
        target = box.shards() if name.endswith("/") else box.a
        return [target, box.b, "-o", f"{box.folder}/{name}"], words
    return build


def two(*words, **flags):
    """a and b with these flags, of files in the box."""
    def build(box):
        way = [box.a, box.b]
        for flag, name in flags.items():
            way += [f"--{flag.replace('_', '-')}", box.folder / name]
        return way, words
    return build


def link(box):
    box.out.unlink()
    linked(box.out, "../b.safetensors")
    return [box.a, box.b], [box.out, "b.safetensors"]


def folder_of_links(box):
    """A folder whose weights are links into a cache, as the hub's downloads are."""
    folder = made(box.folder / "snapshot")
    linked(folder / "model.safetensors", box.a)
    return [folder, box.b, "-o", folder], [folder]


def foreign(box):
    """A file and a folder of the user's own in the result folder."""
    folder = box.old_folder("notes.txt")
    made(folder / "data").joinpath("precious").write_text("precious")
    return [box.shards(), box.b, "-o", folder], [folder, "notes.txt", "precious"]


def broken_and_wrong(box):
    """A wrong VAE is noticed before weights are read."""
    bad = box.save(box.tensors(**{UP: torch.full((96, 64), math.nan)}))
    return [bad, "nowhere", "--vae", box.b], [box.b, "VAE"]


def far_too_large(box):
    target = box.save({"layers.0.q_proj.weight": torch.ones(8, 8)}, "t.safetensors")
    source = box.save({"layers.0.q_proj.weight": torch.ones(1024, 257)})
    return [target, source], [source, "layers.0.q_proj", "4096"]


OPTIONS = {
    "the output is the target": into("a.safetensors", "a.safetensors"),
    "a source in other words": into("out/..//b.safetensors", "b.safetensors"),
    "a link to a source": link, "a folder of links to the target": folder_of_links,
    "what a source links to": lambda box: (
        [box.a, linked(box.folder / "l", box.b), "-o", box.b], [box.b]),
    "the target's folder": into("model/", "model"),
    "it holds a source": into("/", "in each other's way"),
    "no folder for it": into("x/m.safetensors", "x/m.safetensors", "its folder"),
    "a file for a folder": into("a.safetensors/m.safetensors", "m.safetensors"),
    "it is a folder": into("out", "does not replace a folder"),
    "a folder where a file is": into("model/../out/m.safetensors/", "m.safetensors"),
    "a folder from a file": lambda box: (
        [box.a, box.b, "-o", f"{box.out.parent}/new/"], ["new", "is a file"]),
    "others' files in the result folder": foreign,
    "no folder for the report": two("x/r.json", report="x/r.json"),
    "the VAE is the output": two("vae", vae="vae.safetensors",
                                 output="vae.safetensors"),
    "the VAE is missing": two("nae", vae="nae"),
    "a model": two("VAE", vae="b.safetensors"),
    "a second VAE for equal shapes": two("--source-vae", source_vae="vae.safetensors"),
    "a wrong VAE of a broken model": broken_and_wrong,
    "a source far too large": far_too_large,
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_be_followed(box, capsys, case):
    arguments, words = OPTIONS[case](box)
    check_fault(box, capsys, arguments, words)


@pytest.mark.parametrize("name", ["a.safetensors", "out/m.safetensors", "v"])
@pytest.mark.parametrize("flag", ["--report", "--save-vae"])
def test_no_output_replaces_an_input_or_another_output(
        box, capsys, monkeypatch, flag, name):
    monkeypatch.setattr(train, "train_vae", lambda *_: pytest.fail("it trains"))
    (box.folder / "v").write_bytes(b"old")
    way = [box.a, box.b, "--init", "random", "--save-vae", box.folder / "v"]
    if name == "v":
        flag = "--report"
    check_fault(box, capsys, [*way, flag, box.folder / name], [name])


@pytest.mark.parametrize("folder", [False, True])
def test_an_existing_output_needs_force(box, capsys, folder):
    out, target = (box.old_folder(), box.shards()) if folder else (box.out, box.a)
    words = [out, "-o, or pass --force"]
    check_fault(box, capsys, [target, box.b, "-o", out], words, force=False)
    (box.folder / "r.json").write_text("mine")
    way = [box.a, box.b, "-o", box.folder / "x", "--report", box.folder / "r.json"]
    check_fault(box, capsys, way, ["r.json", "--report, or"], force=False)


def acting(monkeypatch, act):
    """After the codec was checked, before anything is merged."""
    real = merge.check_codec

    def check_then_act(*arguments):
        found = real(*arguments)
        act()
        return found
    monkeypatch.setattr(merge, "check_codec", check_then_act)


def test_an_input_that_shrinks_under_the_run(box, capsys, monkeypatch):
    acting(monkeypatch, lambda: os.truncate(box.b, 3000))
    before = snapshot(box.out.parent)
    assert run(box.a, box.b, "-o", box.out, "--force") == 1
    check_refusal(capsys.readouterr().err, [box.b, "tensor '", "shrank"])
    assert snapshot(box.out.parent) == before


KINDS = pytest.mark.parametrize("kind", ["file", "folder"])


def inputs_of(box, kind):
    """(target, an old result of its kind)"""
    if kind == "folder":
        return box.shards(), box.old_folder("config.json")
    return box.a, box.out


# --- Faults that need a process of their own ------------------------------------------
@pytest.fixture
def log(tmp_path_factory): return tmp_path_factory.mktemp("log") / "log"


def said(log, kind="err"): return log.with_suffix(f".{kind}").read_text()


def slowly(pipe):
    """For the child: every piece that is written is announced and takes its time."""
    real = ck.Output.put

    def put(*arguments):
        real(*arguments)
        os.write(pipe, b"x")
        time.sleep(0.1)
    ck.Output.put = put


SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}


@KINDS
@pytest.mark.parametrize("sent", SIGNALS)
def test_a_signal_while_writing(box, log, kind, sent):
    """The old result stays, nothing is left; of a SIGKILL the rest is named by the next
    run, with the number of the process that left it."""
    (target, out), (ear, mouth) = inputs_of(box, kind), os.pipe()
    before = snapshot(box.folder)
    arguments = [target, box.b, "--force", "-o", out]
    pid = forked(log, arguments, lambda: slowly(mouth))
    assert os.read(ear, 1) == b"x" and len(snapshot(box.folder)) > len(before)
    os.kill(pid, sent)
    time.sleep(0.05)
    if sent != signal.SIGKILL:
        os.kill(pid, signal.SIGTERM)        # a second one does not disturb the clean-up
    assert ended(pid) == SIGNALS[sent]
    after = snapshot(box.folder)
    left = {path for path in after if path not in before}
    assert {path: after[path] for path in before} == before
    if sent == signal.SIGKILL:
        assert left and all(".lsmerge-" in path for path in left)
        assert ended(forked(log, arguments)) == 0
        assert f"{min(left)} is of process" in said(log, "out")
        assert str(pid) in min(left)
        assert set(snapshot(box.folder)) >= left
    else:
        assert not left and said(log).count("\n") <= 1


def small_files(): resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@KINDS
def test_a_limit_on_the_size_of_files(box, log, kind):
    target, out = inputs_of(box, kind)
    before = snapshot(box.folder)
    pid = forked(log, [target, box.b, "--force", "-o", out], small_files)
    assert ended(pid) == 1 and snapshot(box.folder) == before
    check_refusal(said(log), [box.out.parent, "too large"])


def test_too_little_memory(box, log):
    """The allocator of torch raises no MemoryError."""
    before = snapshot(box.folder)

    def prepare(): resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    arguments = [box.a, "-o", box.out, "--force", "--width", 65536]
    assert ended(forked(log, arguments, prepare, train.main)) == 1
    assert snapshot(box.folder) == before
    check_refusal(said(log), ["out of memory"])


def into_nothing(kind):
    """For the child: what stdout is."""
    if kind == "closed":
        sys.stdout = None
        return
    ear, full = os.pipe()
    if kind == "full":
        full = os.open("/dev/full", os.O_WRONLY)
    os.close(ear)
    os.dup2(full, 1)
    buffering = 0 if kind == "unbuffered" else -1
    sys.stdout = io.TextIOWrapper(open(1, "wb", buffering), write_through=not buffering)


@pytest.mark.parametrize("kind", ["gone", "unbuffered", "closed", "full"])
def test_a_reader_that_has_gone_is_no_error(box, log, kind):
    """`merge.py ... | head -0`, `>&-`: the lines that nobody reads are left out. A full
    disk is an error, one line. Nothing is left for the interpreter to flush."""
    code = ended(forked(log, [box.a, box.b, "-o", box.out, "--force"],
                        lambda: into_nothing(kind)))
    assert load_file(box.out)
    if kind == "full":
        assert code == 1
        check_refusal(said(log), ["No space left"])
    else:
        assert (code, said(log)) == (0, "")


def test_a_reader_that_has_gone_in_an_ordinary_environment(box):
    """At its exit the interpreter flushes what is left, and complains (exit 120); a
    variable of the machine that wrote this had hidden it."""
    ear, mouth = os.pipe()
    os.close(ear)
    ordinary = {key: os.environ[key] for key in ("HOME", "PATH") if key in os.environ}
    line = [sys.executable, ROOT / "merge.py", box.a, box.b, "--dry-run", "--vae",
            "exact"]
    done = subprocess.run(line, stdout=mouth, stderr=subprocess.PIPE, timeout=60,
                          env=ordinary)
    assert (done.returncode, done.stderr) == (0, b"")


def test_integrity_rests_on_no_assert():
    """python -O drops them: a file that lacked pieces was once published."""
    for name in ("lsmerge", "chunking", "vae", "align", "train", "merge"):
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def raising(error):
    def main(argv):
        raise error
    return main


ENDS = {"our own": (ck.CheckpointError("x", "y", "z"), 1, "x: y; fix: z"),
        "the disk's": (OSError(28, "No space left on device", "x"), 1,
                       "x: No space left"),
        "one without a name": (OSError(28, "No space left on device"), 1,
                               "No space left"),
        "no memory": (MemoryError(), 1, "out of memory"),
        "Ctrl-C": (KeyboardInterrupt(), 130, "interrupted")}


@pytest.mark.parametrize("case", ENDS)
def test_how_a_command_ends(capsys, case):
    error, code, words = ENDS[case]
    assert run(main=raising(error)) == code
    check_refusal(capsys.readouterr().err, [words])


def test_a_fault_of_ours_is_no_lack_of_memory():
    """Any RuntimeError with "memory" in its text once counted as that."""
    with pytest.raises(RuntimeError):
        run(main=raising(RuntimeError("memory format is not contiguous")))


def test_an_input_is_not_its_hard_link(box):
    """The output is another name of a source's bytes: it gets its own."""
    box.out.unlink()
    os.link(box.b, box.out)
    before = box.b.read_bytes()
    assert good(box.a, box.b, out=box.out)
    assert box.b.read_bytes() == before != box.out.read_bytes()


@pytest.mark.parametrize("known", [True, False])
def test_odd_tensors_pass_through(box, known):
    """Names are never paths; scalars, empty tensors and integers keep name, shape and
    dtype, in the source or not."""
    odd = {"a\nb": torch.ones(2), "a\0b": torch.ones(1), "../../x": torch.ones(2),
           "/etc/x": torch.tensor(3.5), "x" * 9_999: torch.ones(2).bfloat16(),
           "ids": torch.arange(3), "empty": torch.zeros(0, 4),
           "layers.0.empty": torch.zeros(4, 0), "wide": torch.ones([1] * 60)}
    target = box.save(box.tensors() | odd, "t.safetensors")
    source = box.save(load_file(box.b) | (odd if known else {}), "s.safetensors")
    before = {*box.folder.rglob("*"), *box.folder.parent.iterdir()}
    got = good(target, source, out=box.out)
    assert {*box.folder.rglob("*"), *box.folder.parent.iterdir()} == before
    expected = {n: (t.shape, t.dtype) for n, t in (box.tensors() | odd).items()}
    assert {n: (t.shape, t.dtype) for n, t in got.items()} == expected
    assert all(torch.equal(got[n], t) for n, t in odd.items())


def test_modes_and_links(box):
    """The mode is the umask's; a link is written through."""
    link, folder = linked(box.folder / "link.safetensors", box.out), box.shards()
    vae, report = box.folder / "v", box.folder / "r"
    old = os.umask(0o027)
    try:
        good(box.a, box.b, "--report", report, out=link)
        good(folder, box.b, out=box.folder / "new")
        none = ["--init", "pca", "--steps1", 0, "--steps2", 0]
        assert run(box.a, "-o", vae, *none, main=train.main) == 0
    finally:
        os.umask(old)
    names = ("out/m.safetensors", "new", "new/model.safetensors", "new/config.json",
             "new/README.md", "v", "r")
    modes = {name: stat.S_IMODE((box.folder / name).stat().st_mode) for name in names}
    assert modes == dict.fromkeys(names, 0o640) | {"new": 0o750}
    assert link.is_symlink() and load_file(link)


def test_equal_bytes_from_elsewhere_and_later(box):
    """No path and no time in a result; nor does the order within a file matter."""
    folder, again = box.shards(), box.folder / "again.safetensors"
    way = ["--samples", 2, "--lam", 0.25]
    good(folder, box.b, "--vae", box.vae, *way, out=box.out)
    facts = json.dumps(ck.Checkpoint(box.out).metadata)
    assert str(box.folder) not in facts and time.strftime("%Y-") not in facts
    tensors, header, data = list(load_file(box.b).items()), {}, b""
    random.Random(0).shuffle(tensors)
    for name, tensor in tensors:
        header[name] = {"dtype": "F32", "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + tensor.nbytes]}
        data += tensor.numpy().tobytes()
    elsewhere = made(box.folder / "elsewhere")
    source, vae = elsewhere / "x", shutil.move(box.vae, elsewhere / box.vae.name)
    source.write_bytes(packed(header, data))
    os.utime(vae, (5e8, 5e8))
    good(box.a, source, "--vae", vae, *way, out=again)
    assert again.read_bytes() == box.out.read_bytes()


# --- Fuzz: the library is the oracle --------------------------------------------------
NASTY = [json.dumps(value).encode() for value in (
    None, True, -1, 0, 1.5, 16, 2 ** 61, 2 ** 64, "", "F32", "BOOL", "F4", [], {}, [0],
    [4],
    [0, 16], [2 ** 32, 2 ** 32, 0], [2 ** 61] * 300, "²", "a\nb", "\ud800", "\0", "..",
    "/", SHARDS[0], "__metadata__", "weight_map", "dtype", "w.scales", {"F32": None})]
TOKEN = rb'"[^"]*"|-?[0-9.]+|\[[^\[\]]*\]|\{[^{}]*\}'
COMMON = b'0123456789-.,:[]{}"\\ eE\xff\0'


def mutated(text, rng):
    """One value of the JSON text exchanged or taken away, or up to three bytes
    replaced, taken away or put in."""
    if rng.random() < 0.5:
        spot = rng.choice([*re.finditer(TOKEN, text)])
        other = rng.choice([*NASTY, b""])
        return text[:spot.start()] + other + text[spot.end():]
    data = bytearray(text)
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(len(data)), rng.random()
        byte = rng.choice(COMMON if rng.random() < 0.7 else range(256))
        data[at:at + (kind < 0.7)] = bytes([byte]) * (kind < 0.4 or kind > 0.7)
    return bytes(data)


FUZZED = {f"layers.{i}.w": torch.full((2, 2), float(i)) for i in range(4)} | {
    "ids": torch.arange(2), "empty": torch.zeros(0)}
OWN_REASONS = ("is not supported", "holds no tensors", "quantised")


def opened(path):
    """(what we read of a path, the line that refuses it). All else is a crash."""
    try:
        return ours(ck.Checkpoint(path)), ""
    except (ck.CheckpointError, OSError) as error:
        assert str(error).isprintable(), error
        return None, str(error)


def test_no_mutation_of_a_header_is_read_otherwise_than_by_the_library(box):
    rng, count = random.Random(0), {True: 0, False: 0}
    start = box.save(FUZZED).read_bytes()
    size = 8 + int.from_bytes(start[:8], "little")
    for _ in range(2_000):
        data = packed(mutated(start[8:size], rng), start[size:])
        box.bad.unlink()            # not truncated: some file systems then wait
        box.bad.write_bytes(data)
        theirs, (mine, line) = library(data), opened(box.bad)
        own = mine is None and any(reason in line for reason in OWN_REASONS)
        assert mine == theirs or own, (data, line)
        count[mine is not None] += 1
    assert count[True] > 130 and count[False] > 1_000, count


# --- Several processes ----------------------------------------------------------------
@KINDS
def test_two_processes_give_the_bytes_of_one(box, log, kind, models):
    """torchrun splits the tensors; the report counts them all, whoever merged them."""
    target, out = inputs_of(box, kind)
    single = box.folder / "out" / ("one" if kind == "folder" else "one.safetensors")
    way = [target, models["big"], "--align", "sinkhorn", "--samples", 2, "--force"]
    reports = [box.folder / name for name in ("one.json", "two.json")]
    assert run(*way, "-o", single, "--report", reports[0]) == 0
    codes, text, errors = two_processes(log, *way, "-o", out, "--report", reports[1])
    assert codes == [0, 0], errors
    weights = [path / "model.safetensors" if kind == "folder" else path
               for path in (single, out)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert [part.count("wrote ") for part in text] == [1, 0]
    one, two = (json.loads(path.read_text()) for path in reports)
    for key in set(one) - {"seconds", "output"}:
        assert one[key] == two[key], key


@pytest.mark.parametrize("place, value", [(0, math.nan), (1, 3e5)])
def test_a_fault_in_one_of_two_processes(box, log, place, value):
    """Found as the weights are read, or as they are merged (it does not fit the
    target's dtype): one line of the process that finds it; nothing of the other, nor on
    the disk."""
    tensors = box.tensors()
    order = sorted(ck.StateDict(tensors).entries.values(), key=lambda e: -e.numel)
    name = order[place].name
    target = box.save({n: t.half() for n, t in tensors.items()}, "t.safetensors")
    tensors[name].view(-1)[0] = value
    bad = box.save(tensors)
    before = snapshot(box.folder)
    way = [target, bad, "--vae", "exact", "--force", "-o", box.out]
    codes, _, errors = two_processes(log, *way)
    assert snapshot(box.folder) == before and codes[place] == 1 and codes[1 - place]
    check_refusal(errors[place].splitlines(keepends=True)[-1], [repr(name)])
    assert "error" not in errors[1 - place]


def test_a_full_disk_of_two_processes(box, log):
    """The first one makes the file, and fails; the other one waits for it."""
    before = snapshot(box.folder)
    arguments = box.a, box.b, "--force", "-o", box.out
    codes, _, errors = two_processes(log, *arguments, prepare=small_files)
    assert snapshot(box.folder) == before and codes[0] == 1 and codes[1]
    check_refusal(errors[0], [box.out.parent, "too large"])
    assert not errors[1], errors[1]
