"""How files, folders, values, options and machines go wrong: tables of faults. Each is one line
that names the culprit, leaves the old output as it was (bytes, mode, time), and leaves nothing
behind. Then what folders and shards must give. The oracle of what a file may hold is the
safetensors library: what it accepts is accepted, and read the same; what it refuses is refused."""
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import traceback
import zlib

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import load_file, save_file

import chunking as ck
import merge
import train
from conftest import ROOT, llama_tensors

UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-{i + 1:05}-of-00002.safetensors" for i in range(2)]


def run(*arguments, main=merge.main):
    return ck.command(lambda: main([*map(str, arguments), "--quiet"]))


def snapshot(folder):
    """All below a folder: kind and mode, and of what is no folder time, size and digest."""
    state = {}
    for path in folder.rglob("*"):
        info, content = path.lstat(), None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file() and info.st_size < 1e7:
            content = zlib.crc32(path.read_bytes())
        state[str(path)] = info.st_mode, path.is_dir() or (info.st_mtime_ns, info.st_size, content)
    return state


class Box:
    """A folder with inputs and, in out/, an old result that no fault may touch."""

    def __init__(self, folder, models):
        self.folder, self.bad = folder, folder / "bad.safetensors"
        self.out = folder / "out/m.safetensors"
        self.a, self.b, self.vae = (folder / f"{name}.safetensors" for name in ("a", "b", "vae"))
        for path in (self.a, self.b, self.vae):
            shutil.copyfile(models[path.stem], path)
        self.out.parent.mkdir()
        self.out.write_bytes(b"old")
        os.chmod(self.out, 0o640)
        os.utime(self.out, (1e9, 1e9))

    def tensors(self, **changes):
        return load_file(self.a) | changes

    def save(self, tensors, name="bad.safetensors", **metadata):
        save_file(tensors, self.folder / name, {"format": "pt", **metadata})
        return self.folder / name

    def shards(self, tensors=None, **changes):
        """A model folder of two shards and an index; `changes` to its map (None: left out)."""
        (folder := self.folder / "model").mkdir()
        tensors = tensors or self.tensors()
        names = sorted(tensors)
        places = {n: SHARDS[i * 2 // len(names)] for i, n in enumerate(names)}
        for shard in SHARDS:
            save_file({n: tensors[n] for n in names if places[n] == shard}, folder / shard)
        places = {n: shard for n, shard in (places | changes).items() if shard is not None}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
        (folder / "config.json").write_text('{"num_hidden_layers": 2}\n')
        return folder

    def old_folder(self, *names):
        """An old result folder that holds these files, too."""
        (folder := self.folder / "out/merged").mkdir()
        for name in ("model.safetensors", *names):
            (folder / name).write_text("old")
        return folder


@pytest.fixture
def box(models, tmp_path):
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(120)
    yield Box(tmp_path, models)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def check_refusal(error, words):
    assert error.startswith("error: ") and error.count("\n") == 1, error[:2000]
    assert error[:-1].isprintable() and "; fix: " in error, error[:500]
    assert all(str(word) in error for word in words), (error[:500], words)


def check_fault(box, capsys, arguments, words, force=True, main=merge.main):
    before = snapshot(box.folder)
    capsys.readouterr()
    output = [] if "-o" in arguments else ["-o", box.out]
    assert run(*arguments, *output, *["--force"] * force, main=main) == 1
    check_refusal(capsys.readouterr().err, words)
    assert snapshot(box.folder) == before


# --- Files: what bad.safetensors holds, and words of the error line -------------------------------
W = "layers.0.w"
GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
TEXT = json.dumps(GOOD).encode()


def packed(header, data=bytes(range(16))):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def w(data=bytes(range(16)), **changes):
    """A file of one tensor; None leaves a key out."""
    return packed({W: {k: v for k, v in (GOOD | changes).items() if v is not None}}, data)


def two(data, *offsets):
    return packed({W: GOOD, "v": GOOD | {"data_offsets": [*offsets]}}, data)


def written(save, *arguments):
    save(stream := io.BytesIO(), *arguments)
    return stream.getvalue()


def cut_short(length):
    """A download that broke off within its header; the first byte is length % 256."""
    return length.to_bytes(8, "little") + b'{"a":' + b" " * (length // 2)


MISTAKES = {        # real files that are no checkpoints: the line says what they are
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                        "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "XML": (b"<?xml version='1.0'?><Error/>", "XML"),
    "pickle": (pickle.dumps({"w": [1.0]}), "pickle"),
    "torch zip": (written(lambda s: torch.save({}, s)), "zip", "pickles run code"),
    "old torch pickle": (written(lambda s: torch.save({}, s, _use_new_zipfile_serialization=False)),
                         "pickle"),
    "npz": (written(np.savez, np.ones(3)), ".npz"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(40), "GGUF"),
    "index under another name": (b'{"metadata": {}, "weight_map": {}}',),
    **{f"cut short, header of {n}": (cut_short(n), "fetch") for n in (60, 80, 128, 89984)},
}
DAMAGED = {         # what the library refuses
    "empty": b"", "short": b"\1\2\3", "eight zeros": bytes(8),
    "header beyond the file": (99).to_bytes(8, "little") + b"{}",
    "header of 2^63": (2 ** 63).to_bytes(8, "little") + b"{}",
    "header of 2^64 - 1": b"\xff" * 8 + b"{}", "not JSON": packed(b"{nope"),
    "not UTF-8": packed(b'{"\xff": 1}'), "a list": packed([1]), "a string": packed("x"),
    "byte order mark": packed(b"\xef\xbb\xbf" + json.dumps({W: GOOD}).encode()),
    "nesting bomb": packed(b"[" * 200_000), "nesting bomb of objects": packed(b'{"a":' * 200_000),
    "NaN literal": packed(b'{"w": NaN}'), "Infinity": packed(b'{"w": {"shape": [-Infinity]}}'),
    "endless integer": packed(b'{"w": ' + b"9" * 9999 + b"}"),
    "dtype twice": packed(b'{"w": {"dtype": "F32", ' + TEXT[1:] + b"}"),
    "metadata twice": packed(b'{"__metadata__": {}, "__metadata__": {}, "w": ' + TEXT + b"}"),
    "record is no object": packed({W: [1]}),
    "metadata a list": packed({"__metadata__": ["x"], W: GOOD}),
    "metadata not strings": packed({"__metadata__": {"n": 1}, W: GOOD}),
    "metadata nested": packed({"__metadata__": {"a": {"b": "c"}}, W: GOOD}),
    **{f"no {key}": w(**{key: None}) for key in GOOD},
    **{f"dtype {code!r}": w(dtype=code) for code in ("f32", "", "F128", 5, [])},
    **{f"offsets {offsets}": w(data_offsets=offsets) for offsets in (
        [0, 8, 16], [16], [-16, 0], [-0.0, 16], [0.0, 16.0], [False, 16], [16, 0], "0,16",
        [0, 2 ** 64])},
    **{f"shape {str(shape)[:30]}": w(shape=shape) for shape in (
        [-2, -2], [2.0, 2], [True, 4], [[4]], "4", {}, [2], [2 ** 32, 2 ** 32], [2 ** 61] * 2,
        [2 ** 61] * 300)},
    "hole before": packed({W: GOOD | {"data_offsets": [4, 20]}}, bytes(20)),
    "hole between": two(bytes(36), 20, 36), "overlap": two(bytes(28), 12, 28),
    "twice the same bytes": two(bytes(16), 0, 16), "trailing bytes": w(bytes(17)),
    "truncated": w(bytes(15)), "half a character": packed({"\ud800": GOOD}),
}
OURS = {            # what the library accepts, and we do not
    "no tensors": (packed({"__metadata__": {"format": "pt"}}, b""), "no tensors"),
    "dtype C64": (w(dtype="C64", shape=[2]), repr(W), "C64", "BF16"),
    "dtype F4": (w(dtype="F4", shape=[32]), repr(W), "F4"),
    "dtype F8_E8M0": (w(dtype="F8_E8M0", shape=[16]), repr(W), "F8_E8M0"),
    "a record as a list": (packed({W: [*GOOD.values()]}), repr(W)),
    "a dtype as an object": (w(dtype={"F32": None}), repr(W)),
    **{f"quantised: {mark}": (packed({f"q.{mark}": GOOD}), f"'q.{mark}'", "quantised")
       for mark in ("qweight", "scales", "SCB", "weight_scale", "weight_packed", "weight_scale_inv",
                    "weight.quant_state.bitsandbytes__nf4")},
}
ACCEPTED = {        # odd, but the library reads it: so must we, and the same
    "one tensor": w(), "no name": packed({"": GOOD}),
    "spaces": packed(b"  " + json.dumps({W: GOOD}).encode()),
    "two of one name": packed(
        b'{"w": ' + TEXT.replace(b"[2, 2]", b"[4]") + b', "w": ' + TEXT + b"}"),
    "the first of two is wrong": packed(
        b'{"w": ' + TEXT.replace(b"16", b"8") + b', "w": ' + TEXT + b"}"),
    "unknown keys": w(note="x", deep=[[[[]]]], long=10 ** 300),
    "metadata null": packed({"__metadata__": None, W: GOOD}),
    "a key of the metadata twice": packed(
        b'{"__metadata__": {"a": "1", "a": "2"}, "w": ' + TEXT + b"}"),
    "no bytes, huge shape": w(b"", shape=[0, 2 ** 61, 9], data_offsets=[0, 0]),
    "sixty dimensions": w(shape=[1] * 60 + [4]),
    "bytes that are not aligned": packed(
        {W: GOOD | {"data_offsets": [1, 17]},
         "b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, bytes(range(17))),
    "names": packed({f"{c}/..": GOOD | {"data_offsets": [16 * i, 16 * i + 16]}
                     for i, c in enumerate(("a\nb", "\0", "é\u2028", "²"))}, bytes(64)),
}



def library(data):
    """{name: (dtype, shape, bytes)} as the library reads them from memory; None: it refuses."""
    try:
        found = deserialize(data)
    except SafetensorError:
        return None
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found}


def ours(checkpoint):
    return {name: (ck.DTYPE_NAMES[entry.dtype], entry.shape,
                   checkpoint.read(name).view(torch.uint8).numpy().tobytes())
            for name, entry in checkpoint.entries.items()}


def places(box, case):
    """The bad file as target, source or VAE: arguments of a merge. By chance, always the same."""
    return random.Random(case).choice(
        [[box.bad, box.b], [box.a, box.bad], [box.a, box.b, "--vae", box.bad]])


@pytest.mark.parametrize("case", [*MISTAKES, *DAMAGED])
def test_a_file_that_the_library_refuses(box, capsys, case):
    data, *words = MISTAKES.get(case) or (DAMAGED[case], "fetch")
    box.bad.write_bytes(data)
    assert library(data) is None
    check_fault(box, capsys, places(box, case), [box.bad, *words])


@pytest.mark.parametrize("case", OURS)
def test_a_file_that_only_we_refuse(box, capsys, case):
    data, *words = OURS[case]
    box.bad.write_bytes(data)
    assert library(data) is not None
    check_fault(box, capsys, places(box, case), [box.bad, *words])


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_file_that_the_library_accepts(box, case):
    box.bad.write_bytes(ACCEPTED[case])
    assert ours(ck.Checkpoint(box.bad)) == library(ACCEPTED[case]) is not None


# --- Values: changes to a good model's tensors, and the tensor that the error must name -----------
def spoilt(name, value, index=0, like=None):
    """tensors -> (the same with one value in one tensor, made first if `like` is given; words)"""
    def spoil(tensors):
        tensors[name] = (tensors[name] if like is None else like()).clone()
        tensors[name].view(-1)[index] = value
        return tensors, [repr(name), *["NaN or Inf"] * (not math.isfinite(value))]
    return spoil


def ones_of(dtype):
    return lambda: torch.ones(64).to(dtype)


NAMES = ("a\nb", "a\0b", "../x", "/etc/x", "x" * 10_000, "é\u2028\x1b[2J", "__class__", "²")
VALUES = {
    "NaN": spoilt(UP, math.nan, 7), "NaN in a norm": spoilt(NORM, math.nan, -1),
    "Inf": spoilt(UP, math.inf, 7), "-Inf in the embedding": spoilt(EMBED, -math.inf, 99),
    "NaN at the end of a large tensor": spoilt(
        UP, math.nan, -1, lambda: torch.ones(2 * ck.PIECE + 5, 1)),
    "float16 Inf": spoilt(NORM, math.inf, 0, ones_of(torch.half)),
    "float8 NaN": spoilt(NORM, math.nan, 0, ones_of(torch.float8_e4m3fn)),
    "bfloat16 NaN": spoilt(NORM, math.nan, 0, ones_of(torch.bfloat16)),
    "float64 too large": spoilt(UP, 1e300, 0, lambda: torch.ones(96, 64).double()),
    **{f"NaN in {n[:12]!r}": spoilt(n, math.nan, 0, lambda: torch.ones(2)) for n in NAMES},
}


@pytest.mark.parametrize("side", ["target", "source"])
@pytest.mark.parametrize("case", VALUES)
def test_a_value_that_would_spoil_the_result(box, capsys, case, side):
    tensors, words = VALUES[case](box.tensors())
    other = box.save({n: torch.ones(t.shape) for n, t in tensors.items()}, "good.safetensors")
    bad = box.save(tensors)
    check_fault(box, capsys, [bad, other] if side == "target" else [other, bad], [bad, *words])


def test_a_value_that_does_not_fit_the_targets_dtype(box, capsys):
    target = box.save({k: t.half() for k, t in box.tensors().items()}, "t.safetensors")
    source = box.tensors()
    source[NORM][:] = 3e5
    check_fault(box, capsys, [target, box.save(source)], [repr(NORM), "float16"])


# --- Folders and indexes: builders that return (what the user names, words) -----------------------
def texted(text, name=INDEX):
    def build(box):
        (folder := box.shards()).joinpath(name).write_text(text)
        return folder, [folder / name]
    return build


def mapped(name, shard, *words, make=None):
    def build(box):
        folder = box.shards(**{name: shard})
        if make:
            make(folder)
        return folder, [INDEX, *words]
    return build


def folder_with(files, *words):
    """A folder of these files: name -> text or tensors."""
    def build(box):
        (folder := box.folder / "model").mkdir()
        for name, content in files.items():
            if isinstance(content, dict):
                save_file(content, folder / name)
            else:
                (folder / name).write_text(content)
        return folder, [folder, *words]
    return build


def twice(box):
    """A tensor stands in both shards, in one of them not by the index."""
    part = (folder := box.shards()) / SHARDS[1]
    save_file(load_file(part) | {EMBED: torch.ones(40, 64)}, part)
    return folder, [repr(EMBED), INDEX]


def without_shards(box):
    folder = box.shards()
    for shard in SHARDS:
        (folder / shard).unlink()
    return folder, [INDEX, SHARDS[0], "missing"]


def special(make):
    """The path bad.safetensors, made by `make`: no regular file."""
    def build(box):
        make(box.bad)
        return box.bad, [box.bad]
    return build


def beyond_the_limit(path):
    """A header of more than the 100 MB that the format allows."""
    path.write_bytes((10 ** 8 + 1).to_bytes(8, "little"))
    os.truncate(path, 10 ** 8 + 99)


TINY = {W: torch.ones(2, 2)}
OUTSIDE = ("../a.safetensors", "/etc/passwd", ".", "..", "", "\0", "sub/x.safetensors")
FOLDERS = {
    "index is no JSON": texted("{"), "index is a list": texted("[]"), "no weight_map": texted("{}"),
    "empty weight_map": texted('{"weight_map": {}}'),
    "weight_map a list": texted('{"weight_map": ["w"]}'), "nesting bomb": texted("[" * 200_000),
    "value is no string": mapped(UP, 5, repr(UP)), "value is a list": mapped(UP, ["x"], repr(UP)),
    **{f"shard {shard!r}": mapped(UP, shard, repr(UP)) for shard in OUTSIDE},
    "NUL": mapped(UP, "a\0.safetensors", "missing"), "newline": mapped(UP, "a\nb", "missing"),
    "odd digit": mapped(UP, "²", "missing"), "half a character": mapped(UP, "\ud800", "missing"),
    "missing shards": without_shards, "a tensor in two shards": twice,
    "ghost name": mapped("ghost.weight", SHARDS[0], "'ghost.weight'"),
    "tensor that the index lacks": mapped(UP, None, repr(UP)),
    "mapped to the wrong shard": mapped(EMBED, SHARDS[1], repr(EMBED)),
    "a shard is a pipe": mapped("x", "pipe", "pipe", make=lambda f: os.mkfifo(f / "pipe")),
    "a shard is a folder": mapped("x", "sub", "sub", make=lambda f: (f / "sub").mkdir()),
    "a shard is no safetensors file": lambda box: (
        box.shards(x="config.json"), ["config.json", "safetensors"]),
    "an empty folder": folder_with({}, "no .safetensors"),
    "only a configuration": folder_with({"config.json": "{}"}, "no .safetensors", "config.json"),
    "only pickles": folder_with({"model.bin": "x"}, "model.bin", "convert"),
    "several files": folder_with({"a.safetensors": TINY, "b.safetensors": TINY},
                                 "a.safetensors, b.safetensors"),
    "several indexes": folder_with({f"{n}.safetensors.index.json": "{}" for n in "xy"}),
    "an adapter": folder_with({"adapter_config.json": "{}", "adapter_model.safetensors": TINY},
                              "adapter", "experiments/lora.py fold"),
    "an adapter beside weights": folder_with(
        {"adapter_config.json": "{}", "model.safetensors": TINY}, "experiments/lora.py fold"),
    "no such file": lambda box: (box.folder / "a.safetensor", ["a.safetensor:", "no such"]),
    "no such folder": lambda box: (box.folder / "x/y/z", ["x/y/z"]),
    "a file as folder": lambda box: (box.a / "x", ["a.safetensors/x"]),
    "a device": lambda box: ("/dev/zero", ["/dev/zero", "regular"]), "a pipe": special(os.mkfifo),
    "a dangling link": special(lambda path: os.symlink("nowhere", path)),
    "a link to itself": special(lambda path: os.symlink(path.name, path)),
    "header beyond the format's limit": special(beyond_the_limit),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_path_or_folder_that_is_no_model(box, capsys, case):
    path, words = FOLDERS[case](box)
    arguments = [box.a, path] if len(case) % 2 else [path, box.b, "--space", "weight"]
    check_fault(box, capsys, arguments, words)


# --- Pairs, options, environment: builders that return (arguments, words) -------------------------
def made(folder):
    folder.mkdir()
    return folder


def linked(path, to):
    os.symlink(to, path)
    return path


def link(box):
    """The output is a link to a source."""
    box.out.unlink()
    linked(box.out, "../b.safetensors")
    return [box.a, box.b], [box.out, "input"]


def report_is_a_link_to_the_output(box):
    report = linked(box.folder / "r.json", box.out)
    return [box.a, box.b, "--report", report], [report, box.out]


def pipe_as_vae(box):
    os.mkfifo(box.bad)
    return [box.a, box.b, "--vae", box.bad], [box.bad]


def into(name, *words):
    """The output lies there."""
    return lambda box: ([box.a, box.b, "-o", f"{box.folder}/{name}"], [*words])


def folder_into(name, *words):
    return lambda box: ([box.shards(), box.b, "-o", f"{box.folder}/{name}"], [*words])


def linked_folder(box):
    folder, out = box.shards(), linked(box.folder / "link", box.folder / "model")
    return [folder, box.b, "-o", out], [out, "input"]


def folder_of_links(box):
    """A folder whose weights are links into a cache, as the hub's downloads are."""
    (folder := box.folder / "snapshot").mkdir()
    linked(folder / "model.safetensors", box.a)
    return [folder, box.b, "-o", folder], [folder, "input"]


def strangers(*names, make=None):
    def build(box):
        folder = box.old_folder(*names)
        if make:
            (folder / make).mkdir()
            (folder / make / "precious").write_text("precious")
        return [box.shards(), box.b, "-o", folder], [folder, *names]
    return build


def file_for_a_folder(box):
    (path := box.folder / "out/x").write_text("x")
    return [box.shards(), box.b, "-o", path], [path, "nor a folder a file"]


def spoilt_vae(change, *words, **metadata):
    """A VAE file with other tensors or metadata."""
    def build(box):
        file = ck.Checkpoint(box.vae)
        tensors = change({name: file.read_tensor(name) for name in file.entries})
        bad = box.save(tensors, **(file.metadata | metadata))
        return [box.a, box.b, "--vae", bad], words if "loses" in words else [bad, *words]
    return build


def first(change):
    """Changes the first tensor of a VAE."""
    return lambda tensors: tensors | {(name := sorted(tensors)[0]): change(tensors[name].clone())}


def same(tensors): return tensors


HUGE = dict(chunk=64, tokens=16, ratio=1.0, width=10 ** 9, blocks=2, heads=2, init="pca", beta=0.1)
OPTIONS = {
    "nothing pairs": lambda box: (
        [box.a, box.save({"layers.0.zebra.weight": torch.ones(8, 8)})], [box.bad, "pairs"]),
    "weight space across shapes": lambda box: (
        [box.a, box.save(llama_tensors(1, hidden=32)), "--space", "weight"], ["--space weight"]),
    "a vector where the target has a matrix": lambda box: (
        [box.a, box.save(box.tensors(**{UP: torch.ones(5)})), "--space", "weight"],
        ["--space weight"]),
    "nothing is selected": lambda box: ([box.a, box.b, "--select", "zebra"], [box.a, "--select"]),
    "output is the target": into("a.safetensors", "a.safetensors", "input"),
    "output is the VAE": lambda box: (
        [box.a, box.b, "--vae", box.vae, "-o", box.vae], [box.vae, "input"]),
    "output is a source in other words": into("out/..//b.safetensors", "b.safetensors", "input"),
    "output is a link to a source": link,
    "output is what a source links to": lambda box: (
        [box.a, linked(box.folder / "l", box.b), "-o", box.b], [box.b, "input", "/l;"]),
    "output is the target's folder": folder_into("model/", "model", "input"),
    "output is a link to the target's folder": linked_folder,
    "output is a folder of links to the target": folder_of_links,
    "output holds a source": folder_into("", "input"),
    "output is a shard": folder_into(f"model/{SHARDS[0]}", "input"),
    "output is the target's index": folder_into(f"model/{INDEX}", "input"),
    "report is the target": lambda box: ([box.a, box.b, "--report", box.a], [box.a, "input"]),
    "report is the output": lambda box: ([box.a, box.b, "--report", box.out], [box.out]),
    "report is a link to the output": report_is_a_link_to_the_output,
    "the VAE is kept in the target": lambda box: (
        [box.a, box.b, "--init", "random", "--save-vae", box.a], [box.a, "input"]),
    "no folder for the output": into("x/m.safetensors", "x/m.safetensors", "its folder"),
    "no folder for the report": lambda box: (
        [box.a, box.b, "--report", box.folder / "x/r.json"], ["x/r.json", "its folder"]),
    "a file for a folder": into("a.safetensors/m.safetensors", "m.safetensors", "its folder"),
    "output is a folder": into("out", "out", "does not replace a folder"),
    "output is an empty folder": lambda box: (
        [box.a, box.b, "-o", made(box.folder / "empty")], ["empty", "does not replace a folder"]),
    "a folder where a file is": file_for_a_folder,
    "strangers in the result folder": strangers("notes.txt", "thesis.tex"),
    "a folder of one's own in it": strangers(make="data"),
    "one called like a tokenizer's file": strangers(make="tokenizer_data"),
    "VAE missing": lambda box: ([box.a, box.b, "--vae", box.folder / "nae"], ["nae", "no such"]),
    "VAE is a model": lambda box: ([box.a, box.b, "--vae", box.b], [box.b, "VAE"]),
    "VAE is a pipe": pipe_as_vae,
    "NaN in the VAE": spoilt_vae(first(lambda t: t.fill_(math.nan)), "NaN"),
    "a VAE of another size": spoilt_vae(first(lambda t: t[:1].clone()), "size mismatch"),
    "a VAE that lacks a tensor": spoilt_vae(lambda t: dict(sorted(t.items())[1:]), "Missing key"),
    "a VAE in float8": spoilt_vae(lambda t: {n: v.to(torch.float8_e4m3fn) for n, v in t.items()}),
    "a VAE of zeros": spoilt_vae(lambda t: {n: v * 0 for n, v in t.items()}, "loses"),
    "a VAE without configuration": spoilt_vae(same, "train.py", **{"lsmerge.vae": "{}"}),
    "a VAE whose configuration is null": spoilt_vae(same, **{"lsmerge.vae": "null"}),
    "a VAE whose configuration is no JSON": spoilt_vae(same, **{"lsmerge.vae": "{"}),
    "a VAE whose record is no JSON": spoilt_vae(same, **{"lsmerge.training": "{"}),
    "a nesting bomb in the VAE": spoilt_vae(same, **{"lsmerge.vae": "[" * 100_000}),
    "a huge VAE": spoilt_vae(same, "65,536", **{"lsmerge.vae": json.dumps(HUGE)}),
    "a number of a VAE that is text": spoilt_vae(
        same, **{"lsmerge.vae": json.dumps(HUGE | {"width": 128, "ratio": "1"})}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_be_followed(box, capsys, case):
    arguments, words = OPTIONS[case](box)
    check_fault(box, capsys, arguments, words)


@pytest.mark.parametrize("folder", [False, True])
def test_an_existing_output_needs_force(box, capsys, folder):
    out, target = (box.old_folder(), box.shards()) if folder else (box.out, box.a)
    check_fault(box, capsys, [target, box.b, "-o", out], [out, "--force"], force=False)


def test_a_wrong_vae_is_noticed_before_weights_are_read(box, capsys):
    """The models are as wrong as can be, and the line names the VAE."""
    tensors, _ = spoilt(UP, math.nan)(box.tensors())
    target = box.save(tensors)
    check_fault(box, capsys, [target, "nowhere", "--vae", box.b], [box.b, "VAE"])
    check_fault(box, capsys, [target, "--init", box.b], [box.b, "VAE"], main=train.main)
    check_fault(box, capsys, [target, box.b], [target, "NaN"], main=train.main)


def test_a_file_does_not_give_a_folder(box, capsys):
    check_fault(box, capsys, [box.a, box.b, "-o", f"{box.out.parent / 'folder'}/"],
                ["folder", "is a file"])


def replaced(path):
    os.replace(shutil.copyfile(path.with_name("a.safetensors"), f"{path}.new"), path)


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


@pytest.mark.parametrize("act", [os.unlink, replaced])
def test_an_input_that_is_deleted_or_replaced_under_the_run(box, monkeypatch, act):
    """Open files stay what they were."""
    expected = good(box.a, box.b, out=box.out)
    acting(monkeypatch, lambda: act(box.b))
    assert equal(good(box.a, box.b, out=box.out), expected)


# --- Disks ----------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(box):
    """A mounted file system of 200 kB; skipped where one may not mount."""
    (folder := box.folder / "disk").mkdir()

    def mount(*flags):
        done = subprocess.run(["mount", "-t", "tmpfs", *flags, "none", folder], capture_output=True)
        return done.returncode == 0
    if os.geteuid() or not shutil.which("mount") or not mount("-o", "size=200k"):
        pytest.skip("no right to mount: RLIMIT_FSIZE and chmod stand in")
    yield folder, mount
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk):
    (disk / "big").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk(box, capsys, small_disk, kind):
    disk, _ = small_disk
    if kind == "folder":
        target, out = box.shards(), disk / "merged"
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"old")
    else:
        target, out = box.a, disk / "m.safetensors"
        out.write_bytes(b"old")
    check_fault(box, capsys, [target, box.b, "-o", out], [disk, "No space left"])


def test_no_room_for_the_report(box, capsys, small_disk):
    """The result stands by then; the line says what is missing, and no half report lies about."""
    disk, _ = small_disk
    fill(disk)
    assert run(box.a, box.b, "-o", box.out, "--force", "--report", disk / "r.json") == 1
    check_refusal(capsys.readouterr().err, [disk, "No space left"])
    assert os.listdir(disk) == ["big"] and load_file(box.out)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_folder_that_may_not_be_written(box, capsys, request, kind):
    """By its mode; for root, whom no mode holds, by a read-only mount."""
    if os.geteuid() == 0:
        parent, mount = request.getfixturevalue("small_disk")
        mount("-o", "remount,ro")
    else:
        (parent := box.folder / "disk").mkdir(0o555)
    out = parent / ("merged" if kind == "folder" else "m.safetensors")
    target = box.shards() if kind == "folder" else box.a
    check_fault(box, capsys, [target, box.b, "-o", out], [out, "its folder"])


# --- Faults that need a process of their own: forked, so that nothing is imported anew ------------
def forked(log, arguments, prepare=lambda: None, main=merge.main):
    """Start the command; its process number. stdout and stderr go to log.out and log.err."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        sys.stdout = open(f"{log}.out", "w", encoding="utf-8")
        sys.stderr = open(f"{log}.err", "w", encoding="utf-8", errors="backslashreplace")
        prepare()
        code = run(*arguments, main=main)
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
        if (found := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(found[1])
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the command hangs")


@pytest.fixture
def log(tmp_path_factory): return tmp_path_factory.mktemp("log") / "log"


def slowly(pipe, seconds=0.1):
    """For the child: every piece that is written is announced and takes its time."""
    real = ck.Output.put

    def put(*arguments):
        real(*arguments)
        os.write(pipe, b"x")
        time.sleep(seconds)
    ck.Output.put = put


def inputs_of(box, kind):
    """(target, an old result of its kind)"""
    return (box.shards(), box.old_folder("config.json")) if kind == "folder" else (box.a, box.out)


KINDS = pytest.mark.parametrize("kind", ["file", "folder"])
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}


@KINDS
@pytest.mark.parametrize("sent", SIGNALS)
def test_a_signal_while_writing(box, log, kind, sent):
    """The old result stays, nothing is left; a SIGKILL's temporary is named by the next run."""
    (target, out), (ear, mouth) = inputs_of(box, kind), os.pipe()
    before = snapshot(box.folder)
    pid = forked(log, [target, box.b, "--force", "-o", out], lambda: slowly(mouth))
    assert os.read(ear, 1) == b"x" and len(snapshot(box.folder)) > len(before)
    os.kill(pid, sent)
    assert ended(pid) == SIGNALS[sent]
    error, after = log.with_suffix(".err").read_text(), snapshot(box.folder)
    left = {path for path in after if path not in before}
    assert {path: after[path] for path in before} == before
    if sent == signal.SIGKILL:
        assert left and all(".lsmerge-" in path for path in left)
        assert ended(forked(log, [target, box.b, "--force", "-o", out])) == 0
        assert f"{min(left)} is of an unfinished run" in log.with_suffix(".out").read_text()
        assert set(snapshot(box.folder)) >= left
    else:
        assert not left and error.count("\n") <= 1
        assert error.startswith("error: interrupted") or sent != signal.SIGINT


@pytest.mark.parametrize("sent", SIGNALS)
def test_a_signal_between_the_two_renames_of_a_folder(box, log, sent):
    """No moment at which neither the old folder nor the new one is there in whole."""
    target, out = inputs_of(box, "folder")
    before = snapshot(out)

    def prepare():
        real = os.rename

        def rename(*paths):
            os.rename = real            # once
            real(*paths)
            os.kill(os.getpid(), sent)
            time.sleep(0.1)
        os.rename = rename
    assert ended(forked(log, [target, box.b, "--force", "-o", out], prepare)) == SIGNALS[sent]
    if sent == signal.SIGKILL:
        old, new = sorted(out.parent.glob(".lsmerge-*"), key=lambda path: path.suffix)
        assert {f"{out}{path[len(str(old)):]}" for path in snapshot(old)} == set(before)
        assert load_file(new / "model.safetensors") and not out.exists()
    else:
        assert snapshot(out) == before and not list(out.parent.glob(".lsmerge-*"))


def small_files(): resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@KINDS
def test_a_limit_on_the_size_of_files(box, log, kind):
    target, out = inputs_of(box, kind)
    before = snapshot(box.folder)

    assert ended(forked(log, [target, box.b, "--force", "-o", out], small_files)) == 1
    assert snapshot(box.folder) == before
    check_refusal(log.with_suffix(".err").read_text(), [box.out.parent, "too large"])


def test_too_little_memory(box, log):
    """The allocator of torch raises no MemoryError."""
    before = snapshot(box.folder)

    def prepare(): resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    arguments = [box.a, "-o", box.out, "--force", "--width", 65536]
    assert ended(forked(log, arguments, prepare, main=train.main)) == 1
    assert snapshot(box.folder) == before
    check_refusal(log.with_suffix(".err").read_text(), ["out of memory", "--width"])


@KINDS
def test_two_runs_into_one_output(box, log, kind):
    """Whole is the one or the other; a run that finds its place taken says so."""
    (target, out), (_, mouth) = inputs_of(box, kind), os.pipe()
    single, alone = box.folder / "out" / ("s" if kind == "folder" else "s.safetensors"), []
    for lam in (0.25, 0.75):
        assert run(target, box.b, "--force", "-o", single, "--lam", lam) == 0
        alone.append((single / "model.safetensors" if kind == "folder" else single).read_bytes())
    shutil.rmtree(single) if kind == "folder" else single.unlink()
    pids = {lam: forked(f"{log}{lam}", [target, box.b, "--force", "-o", out, "--lam", lam],
                        lambda: slowly(mouth, 0.005)) for lam in (0.25, 0.75)}
    codes = {lam: ended(pid) for lam, pid in pids.items()}
    assert 0 in codes.values()
    for lam, code in codes.items():
        if code:
            check_refusal(open(f"{log}{lam}.err").read(), [out.parent])
    assert (out / "model.safetensors" if kind == "folder" else out).read_bytes() in alone
    assert {path.name for path in box.out.parent.iterdir()} == {"m.safetensors", out.name}


def test_a_path_that_is_not_utf8(box, log):
    out = os.fsdecode(os.fsencode(box.folder) + b"/out/\xff.safetensors")
    code = ended(forked(log, [box.a, box.b, "-o", out]))
    assert code == 0 and os.path.isfile(out) and not log.with_suffix(".err").read_text()


def raising(error):
    def main(argv):
        raise error
    return main


ENDS = {"our own": (ck.CheckpointError("x", "y", "z"), 1, "x: y; fix: z"),
        "the disk's": (OSError(28, "No space left on device", "x"), 1, "x: No space left"),
        "one without a name": (OSError(28, "No space left on device"), 1, "No space left"),
        "no memory": (MemoryError(), 1, "out of memory"),
        "Ctrl-C": (KeyboardInterrupt(), 130, "interrupted")}


@pytest.mark.parametrize("case", ENDS)
def test_how_a_command_ends(capsys, case):
    error, code, words = ENDS[case]
    assert run(main=raising(error)) == code
    check_refusal(capsys.readouterr().err, [words])


@pytest.mark.parametrize("buffering", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "not"])
def test_a_reader_that_has_gone_is_no_error(box, buffering):
    """`merge.py ... | head -0`, in an ordinary environment as in one without buffers: the lines
    that nobody reads are left out, and nothing is said of it."""
    ear, mouth = os.pipe()
    os.close(ear)
    ordinary = {key: os.environ[key] for key in ("HOME", "PATH") if key in os.environ}
    done = subprocess.run([sys.executable, ROOT / "merge.py", box.a, box.b, "--dry-run"],
                          stdout=mouth, stderr=subprocess.PIPE, timeout=60,
                          env=ordinary | buffering)
    assert (done.returncode, done.stderr) == (0, b"")


# --- What must work -------------------------------------------------------------------------------
def good(*arguments, out):
    """The merge's tensors, as the library reads them."""
    assert run(*arguments, "--force", "-o", out) == 0
    return load_file(out if os.path.isfile(out) else out / "model.safetensors")


def equal(one, two):
    return list(one) == list(two) and all(
        torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


@pytest.mark.parametrize("flags", [[], ["--space", "weight"]])
def test_shards_are_the_file_they_were_cut_from(box, flags):
    folder, out = box.shards(), box.folder / "out/1.safetensors"
    whole = good(box.a, box.b, *flags, out=box.out)
    for path in (folder, folder / INDEX):
        assert equal(good(path, box.b, *flags, out=out), whole)
    swapped = good(box.b, box.a, *flags, out=box.out)
    assert equal(good(box.b, folder, *flags, out=out), swapped)


def test_a_folder_gives_a_folder(box, capsys):
    """Weights, a card of its own, and the target's companions byte for byte; no index, nothing of a
    training, no pickle, no subfolder."""
    folder = box.shards()
    companions = {"config.json": b'{"num_hidden_layers": 2}\n', "tokenizer.json": bytes(range(256)),
                  "LICENSE": b"L\r\n", "chat_template.jinja": b"{{ x }}", "modeling_x.py": b"#"}
    others = ["pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", ".hidden",
              "trainer_state.json", "training_args.bin", "model.gguf", "README.md",
              "pytorch_model.bin.index.json"]
    for name, content in [*companions.items(), *((n, b"x") for n in others)]:
        (folder / name).write_bytes(content)
    (folder / "checkpoint-1").mkdir()
    old = box.old_folder("config.json", "tokenizer.json", "README.md")
    got = good(folder, box.b, out=old)
    assert equal(got, good(box.a, box.b, out=box.out))
    found = {path.name: path.read_bytes() for path in old.iterdir()}
    card = found.pop("README.md").decode()
    assert found.pop("model.safetensors") and found == companions
    assert card.startswith("---\nbase_model:\n") and "- lsmerge\n" in card
    assert str(box.folder) not in card
    assert {path.name for path in old.parent.iterdir()} == {"merged", "m.safetensors"}
    assert "5 companions" in capsys.readouterr().out and set(ck.Checkpoint(old).entries) == set(got)


def test_an_index_comes_before_a_stale_file(box):
    folder = box.shards()
    save_file(TINY, folder / "model.safetensors")
    assert set(ck.Checkpoint(folder).entries) == set(box.tensors())


def test_an_input_is_not_its_hard_link(box):
    """The output is another name of a source's bytes: it gets its own, the source keeps these."""
    box.out.unlink()
    os.link(box.b, box.out)
    before = box.b.read_bytes()
    assert good(box.a, box.b, out=box.out) and box.b.read_bytes() == before != box.out.read_bytes()


PREFIXES = [("model.", ""), ("", "model."), ("model.", "model.language_model.")]


@pytest.mark.parametrize("mine, theirs", PREFIXES)
def test_names_that_differ_in_their_prefix(box, mine, theirs):
    def renamed(tensors, prefix):
        return {prefix + name.removeprefix("model."): t for name, t in tensors.items()}
    target = box.save(renamed(box.tensors(), mine), "t.safetensors")
    source = box.save(renamed(load_file(box.b), theirs), "s.safetensors")
    report = box.folder / "r.json"
    got = good(target, source, "--report", report, out=box.out)
    assert equal(got, renamed(good(box.a, box.b, out=box.out), mine))
    facts = json.loads(report.read_text())
    assert facts["kind"] == "same-shape" and facts["tensors"]["averaged"] == 6


@pytest.mark.parametrize("known", [True, False])
def test_odd_tensors_pass_through(box, known):
    """Names are never paths; scalars, empty tensors and integers keep name, shape and dtype, in the
    source or not."""
    odd = {"a\nb": torch.ones(2), "a\0b": torch.ones(1), "../../x": torch.ones(2),
           "/etc/x": torch.tensor(3.5), "x" * 10_000: torch.ones(2).bfloat16(),
           "ids": torch.arange(3), "empty": torch.zeros(0, 4), "layers.0.empty": torch.zeros(4, 0),
           "wide": torch.ones([1] * 60)}
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
    link, folder = box.folder / "link.safetensors", box.shards()
    link.symlink_to(box.out)
    old = os.umask(0o027)
    try:
        good(box.a, box.b, out=link)
        good(folder, box.b, out=box.folder / "new")
    finally:
        os.umask(old)
    names = "out/m.safetensors", "new", "new/model.safetensors", "new/config.json", "new/README.md"
    modes = {name: stat.S_IMODE((box.folder / name).stat().st_mode) for name in names}
    assert modes == dict.fromkeys(names, 0o640) | {"new": 0o750}
    assert link.is_symlink() and load_file(link)


def test_equal_bytes_from_elsewhere_and_later(box):
    """No path and no time in a result."""
    folder, again = box.shards(), box.folder / "again.safetensors"
    good(folder, box.b, "--vae", box.vae, "--samples", 2, "--lam", 0.25, out=box.out)
    facts = json.dumps(ck.Checkpoint(box.out).metadata)
    assert '"lsmerge.lambda": "0.25"' in facts
    assert not any(word in facts for word in (str(box.folder), "safetensors", time.strftime("%Y-")))
    (elsewhere := box.folder / "elsewhere").mkdir()
    moved = [shutil.move(path, elsewhere / f"x{path.suffix}{i}")
             for i, path in enumerate((folder, box.b, box.vae))]
    os.utime(moved[1], (5e8, 5e8))
    good(*moved[:2], "--vae", moved[2], "--samples", 2, "--lam", 0.25, out=again)
    assert again.read_bytes() == box.out.read_bytes()


def test_the_order_within_a_file_does_not_matter(box):
    tensors, header, data = list(box.tensors().items()), {}, b""
    random.Random(0).shuffle(tensors)
    for name, tensor in tensors:
        header[name] = {"dtype": "F32", "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + tensor.nbytes]}
        data += tensor.numpy().tobytes()
    box.bad.write_bytes(packed(header, data))
    good(box.a, box.b, out=box.out)
    good(box.bad, box.b, out=box.folder / "2.safetensors")
    assert (box.folder / "2.safetensors").read_bytes() == box.out.read_bytes()


# --- Fuzz: the library is the oracle --------------------------------------------------------------
NASTY = [None, True, -1, 0, 1, 1.5, 16, 2 ** 31, 2 ** 61, 2 ** 64, "", "F32", "BOOL", "F4", [], {},
         [[]], [0], [4], [0, 16], [0, 0], [2 ** 32, 2 ** 32, 0], [0, 2 ** 61], [2 ** 61] * 300,
         "²", "9" * 5000, "a\nb", "\ud800", "\0", "..", "/", "x" * 9999, SHARDS[0], "__metadata__",
         "weight_map", "dtype", "w.scales", {"F32": None}, ["F32", [2, 2], [0, 16]]]


def edited(table, rng):
    """One change somewhere in a JSON value: a key or a value taken away, renamed or made nasty."""
    keys = list(table) if isinstance(table, dict) else list(range(len(table)))
    if not keys:
        return table
    key, other = rng.choice(keys), rng.choice(NASTY)
    if isinstance(table[key], (dict, list)) and rng.random() < 0.75:
        edited(table[key], rng)
    elif isinstance(table, dict) and rng.random() < 0.4:
        value = table.pop(key)
        if rng.random() < 0.7:
            table[str(other)] = value
    else:
        table[key] = other
    return table


JSON_BYTES = b'0123456789-.,:[]{}"\\ eE\xff\0'


def mutated(text, rng):
    """A change to the JSON value, or up to three bytes replaced, taken away or put in."""
    if rng.random() < 0.5:
        return json.dumps(edited(json.loads(text), rng)).encode()
    data = bytearray(text)
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(len(data)), rng.random()
        byte = rng.choice(JSON_BYTES if rng.random() < 0.7 else range(256))
        data[at:at + (kind < 0.7)] = bytes([byte]) * (kind < 0.4 or kind > 0.7)
    return bytes(data)


FUZZED = {f"layers.{i}.w": torch.full((2, 2), float(i)) for i in range(4)} | {
    "ids": torch.arange(2), "empty": torch.zeros(0)}
OWN_REASONS = ("is not supported", "holds no tensors", "quantised", "unusual")


def opened(path):
    """(what we read of a path, the line that refuses it). Any other exception is a crash."""
    try:
        return ours(ck.Checkpoint(path)), ""
    except (ck.CheckpointError, OSError) as error:
        assert str(error).isprintable(), error
        return None, str(error)


def test_no_mutation_of_a_header_is_read_otherwise_than_by_the_library(box):
    rng, count = random.Random(0), {True: 0, False: 0}
    start = box.save(FUZZED).read_bytes()
    size = 8 + int.from_bytes(start[:8], "little")
    for _ in range(12_000):
        data = packed(mutated(start[8:size], rng), start[size:])
        box.bad.unlink()            # not truncated: some file systems then wait for the disk
        box.bad.write_bytes(data)
        theirs, (mine, line) = library(data), opened(box.bad)
        own = mine is None and any(reason in line for reason in OWN_REASONS)
        assert (mine == theirs or own) is True, (data, line)
        count[mine is not None] += 1
    assert count[True] > 1000 and count[False] > 6_000, count


def test_no_mutation_of_an_index_crashes(box):
    """What is accepted holds the tensors of the shards, each from where they are."""
    rng, count, folder = random.Random(0), {True: 0, False: 0}, box.shards(FUZZED)
    text, expected = (folder / INDEX).read_bytes(), ours(ck.Checkpoint(folder))
    for _ in range(4_000):
        (folder / INDEX).unlink()
        (folder / INDEX).write_bytes(mutated(text, rng))
        mine, _ = opened(folder)
        assert mine in (None, expected)
        count[mine is not None] += 1
    assert count[True] > 500 and count[False] > 2_000, count
    assert sorted(os.listdir(folder)) == sorted([*SHARDS, INDEX, "config.json"])


# --- Several processes ----------------------------------------------------------------------------
def two_processes(log, *arguments, prepare=lambda: None):
    """(exit codes, stdouts, stderrs) of a command in two processes, started as torchrun does: who
    fails ends the other one (SIGTERM; torchrun sends SIGKILL only after 30 s)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    facts = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    pids = [forked(f"{log}{n}", arguments,
                   lambda n=n: (os.environ.update(facts, RANK=str(n)), prepare()))
            for n in range(2)]
    codes, until = {}, time.monotonic() + 20
    while len(codes) < 2 and time.monotonic() < until:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.3)             # torchrun looks from time to time, too
        elif any(codes.values()):
            for other in {*pids} - {*codes}:
                os.kill(other, signal.SIGTERM)
        time.sleep(0.01)
    for other in {*pids} - {*codes}:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    texts = [[open(f"{log}{n}.{kind}").read() for n in range(2)] for kind in ("out", "err")]
    assert len(codes) == 2, ("one does not end", *texts)
    return [codes[pid] for pid in pids], *texts


@KINDS
def test_two_processes_give_the_bytes_of_one(box, log, kind):
    target, out = inputs_of(box, kind)
    single = box.folder / "out" / ("one" if kind == "folder" else "one.safetensors")
    good(target, box.b, "--samples", 2, out=single)
    codes, said, errors = two_processes(log, target, box.b, "--samples", 2, "--force", "-o", out)
    assert codes == [0, 0], errors
    weights = [path / "model.safetensors" if kind == "folder" else path for path in (single, out)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert [text.count("wrote ") for text in said] == [1, 0]


@pytest.mark.parametrize("value", [math.nan, 3e5], ids=["read", "merge"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_fault_in_one_of_two_processes(box, log, place, value):
    """Found as the weights are read, or as they are merged (it does not fit the target's dtype):
    one line of the process that finds it; the other ends without a word; nothing is left."""
    tensors = box.tensors()
    name = sorted(tensors, key=lambda n: (-tensors[n].numel(), ck.natural_key(n)))[place]
    target = box.save({n: t.half() for n, t in tensors.items()}, "t.safetensors")
    bad = box.save(spoilt(name, value)(tensors)[0])
    before = snapshot(box.folder)
    codes, _, errors = two_processes(log, target, bad, "--vae", "exact", "--force", "-o", box.out)
    assert snapshot(box.folder) == before and codes[place] == 1 and codes[1 - place]
    check_refusal(errors[place], [repr(name)])
    assert not errors[1 - place]


def test_a_full_disk_of_two_processes(box, log):
    """The first one makes the file, and fails; the other one waits for it."""
    before = snapshot(box.folder)
    arguments = box.a, box.b, "--force", "-o", box.out
    codes, _, errors = two_processes(log, *arguments, prepare=small_files)
    assert snapshot(box.folder) == before and codes[0] == 1 and codes[1]
    check_refusal(errors[0], [box.out.parent, "too large"])
    assert not errors[1], errors[1]
