"""How files, folders, values, options and machines go wrong: a table of faults. Each is one line that names the culprit,
leaves the old output as it was (bytes, mode, time), and leaves nothing behind. Then what folders and shards must give."""
import hashlib, io, json, math, os, pickle, random, resource, shutil, signal, stat, subprocess, sys, time, traceback

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import chunking as ck
import merge
from conftest import ROOT, llama_tensors

UP, NORM, EMBED, HEAD = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"


def run(*arguments): return ck.command(lambda: merge.main([*map(str, arguments), "--quiet"]))


def snapshot(folder):
    """All that lies below a folder: kind and mode, and of what is no folder time and content."""
    state = {}
    for path in folder.rglob("*"):
        info = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() and info.st_size < 1e7 else None
        state[str(path)] = info.st_mode, path.is_dir() or (info.st_mtime_ns, info.st_size, content)
    return state


class Box:
    """A folder with inputs and, in out/, an old result that no fault may touch."""

    def __init__(self, folder, models):
        self.folder, self.vae, self.bad, self.out = folder, folder / "vae.safetensors", folder / "bad.safetensors", folder / "out/m.safetensors"
        for name in ("a", "b", "vae"):
            shutil.copyfile(models[name], folder / f"{name}.safetensors")
        self.a, self.b, self.codec = folder / "a.safetensors", folder / "b.safetensors", ["--vae", self.vae]
        self.out.parent.mkdir()
        self.out.write_bytes(b"old")
        os.chmod(self.out, 0o640), os.utime(self.out, (1e9, 1e9))

    def tensors(self, **changes):
        return load_file(self.a) | changes

    def save(self, tensors, name="bad.safetensors", **metadata):
        save_file(tensors, self.folder / name, {"format": "pt", **metadata})
        return self.folder / name

    def shards(self, name="model", tensors=None, **changes):
        """A model folder of two shards and an index; `changes` to its weight map (None: left out)."""
        (folder := self.folder / name).mkdir()
        tensors = tensors or self.tensors()
        parts, names = [f"model-{i + 1:05}-of-00002.safetensors" for i in range(2)], sorted(tensors)
        places = {n: parts[i * 2 // len(names)] for i, n in enumerate(names)}
        for part in parts:
            save_file({n: tensors[n] for n in names if places[n] == part}, folder / part)
        places = {n: shard for n, shard in (places | changes).items() if shard is not None}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}))
        (folder / "config.json").write_text('{"num_hidden_layers": 2}\n')
        return folder

    def old_folder(self, *names):
        """An old result folder that holds these files, too."""
        (folder := self.folder / "out/merged").mkdir()
        for name in ("model.safetensors", *names):
            (folder / name).write_text("old")
        return folder


@pytest.fixture
def box(models, tmp_path, monkeypatch):
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs")), signal.alarm(60)
    yield Box(tmp_path, models)
    signal.alarm(0), signal.signal(signal.SIGALRM, signal.SIG_DFL)


def check_refusal(error, words):
    assert error.startswith("error: ") and error.count("\n") == 1 and error[:-1].isprintable() and "; fix: " in error, error[:500]
    assert all(str(word) in error for word in words), (error[:500], words)


def check_fault(box, capsys, arguments, words, force=True):
    before = snapshot(box.folder)
    capsys.readouterr()
    output = [] if "-o" in arguments else ["-o", box.out]
    codec = [] if {"--vae", "--space"} & set(map(str, arguments)) else box.codec
    assert run(*arguments, *output, *codec, *["--force"] * force) == 1
    check_refusal(capsys.readouterr().err, words)
    assert snapshot(box.folder) == before


# --- files: what bad.safetensors holds, and words of the error line ------------------------------------------------------
GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
W = "layers.0.w"


def packed(header, data=bytes(16)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def written(save, *arguments):
    save(stream := io.BytesIO(), *arguments)
    return stream.getvalue()


def w(data=bytes(16), **changes):
    return packed({W: {key: value for key, value in (GOOD | changes).items() if value is not None}}, data)


FILES = {
    "empty": (b"", "0 bytes"), "short": (b"\1\2\3", "3 bytes"), "eight zeros": (bytes(8), "header"), "header beyond the file": ((99).to_bytes(8, "little") + b"{}", "99"),
    "header of 2^63": ((2 ** 63).to_bytes(8, "little") + b"{}", 2 ** 63), "header of 2^64 - 1": (b"\xff" * 8 + b"{}", 2 ** 64 - 1),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"), "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "XML": (b"<?xml version='1.0'?><Error/>", "XML"), "pickle": (pickle.dumps({"w": [1.0]}), "pickle"), "torch zip": (written(lambda s: torch.save({}, s)), "zip", "pickles run code"),
    "old torch pickle": (written(lambda s: torch.save({}, s, _use_new_zipfile_serialization=False)), "pickle"), "npz": (written(np.savez, np.ones(3)), ".npz"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(40), "GGUF"), "index under another name": (b'{"metadata": {}, "weight_map": {}}', "JSON"),
    "not JSON": (packed(b"{nope"), "JSON"), "not UTF-8": (packed(b'{"\xff": 1}'), "JSON", "utf-8"), "a list": (packed([1]), "object"), "a string": (packed("x"), "object"),
    "nesting bomb": (packed(b"[" * 200_000), "JSON"), "nesting bomb of objects": (packed(b'{"a":' * 200_000), "JSON"), "NaN literal": (packed(b'{"w": NaN}'), "NaN"),
    "Infinity literal": (packed(b'{"w": {"shape": [-Infinity]}}'), "Infinity"), "endless integer": (packed(b'{"w": ' + b"9" * 9999 + b"}"), "JSON"),
    "two tensors of one name": (packed(b'{"%s": %s, "%s": %s}' % ((W.encode(), json.dumps(GOOD).encode()) * 2)), repr(W), "2 times"),
    "dtype twice": (packed(b'{"w": {"dtype": "F32", "dtype": "I32", "shape": [4], "data_offsets": [0, 16]}}'), "'dtype'"), "record is no object": (packed({W: [1]}), repr(W)),
    "no tensors": (packed({"__metadata__": {"format": "pt"}}, b""), "no tensors"), "metadata not strings": (packed({"__metadata__": {"n": 1}, W: GOOD}), "__metadata__"),
    "metadata a list": (packed({"__metadata__": ["x"], W: GOOD}), "__metadata__"), "metadata nested": (packed({"__metadata__": {"a": {"b": "c"}}, W: GOOD}), "__metadata__"),
    **{f"no {key}": (w(**{key: None}), repr(W)) for key in GOOD},
    **{f"dtype {code!r}": (w(dtype=code), repr(W), repr(code), "BF16") for code in ("f32", "", "F4", "F8_E8M0", "C64", "F128", 5, [])},
    **{f"offsets {offsets}": (w(data_offsets=offsets), repr(W)) for offsets in ([0, 8, 16], [16], [-16, 0], [0.0, 16.0], [False, 16], [16, 0], "0,16", None, [0, 2 ** 64])},
    **{f"shape {str(shape)[:30]}": (w(shape=shape), repr(W)) for shape in ([-2, -2], [2.0, 2], [True, 4], [[4]], "4", {}, [2], [2 ** 32, 2 ** 32], [2 ** 61] * 2, [2 ** 61] * 300)},
    "hole before": (packed({W: GOOD | {"data_offsets": [4, 20]}}, bytes(20)), repr(W)), "hole between": (packed({W: GOOD, "v": GOOD | {"data_offsets": [20, 36]}}, bytes(36)), "'v'"),
    "overlap": (packed({W: GOOD, "v": GOOD | {"data_offsets": [12, 28]}}, bytes(28)), "'v'"), "twice the same bytes": (packed({W: GOOD, "v": GOOD}), "expected"),
    "trailing bytes": (w(bytes(17)), "describes"), "truncated": (w(bytes(15)), "describes"), "no name": (packed({"": GOOD}), "''"), "half a character": (packed({"\ud800": GOOD}), "\\ud800"),
    **{f"quantised: {mark}": (packed({f"layers.0.q.{mark}": GOOD}), f"'layers.0.q.{mark}'", "quantised") for mark in
       ("qweight", "qzeros", "scales", "g_idx", "SCB", "weight_scale", "weight_scale_inv", "weight_packed", "absmax", "weight.quant_state.bitsandbytes__nf4")},
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_checkpoint(box, capsys, case):
    data, *words = FILES[case]
    box.bad.write_bytes(data)
    check_fault(box, capsys, random.Random(case).choice([[box.bad, box.b], [box.a, box.bad], [box.a, box.b, "--vae", box.bad]]), [box.bad, *words])


# --- values: changes to a good model's tensors, and the tensor that the error must name ---------------------------------
def spoilt(name, value, index=0, like=None):
    """tensors -> the same with one value in one tensor (made first, if `like` is given)."""
    def spoil(tensors):
        tensors[name] = (tensors[name] if like is None else like()).clone()
        tensors[name].view(-1)[index] = value
        return tensors, [repr(name), *[f"1 NaN or Inf, the first at element {range(tensors[name].numel())[index]};"] * (not math.isfinite(value))]
    return spoil


VALUES = {
    "NaN": spoilt(UP, math.nan, 7), "NaN in a norm": spoilt(NORM, math.nan, -1), "Inf": spoilt(UP, math.inf, 7), "-Inf in the embedding": spoilt(EMBED, -math.inf, 99),
    "NaN at the end of a large tensor": spoilt(UP, math.nan, -1, lambda: torch.ones(2 * ck.PIECE + 5, 1)), "float16 Inf": spoilt(NORM, math.inf, 0, lambda: torch.ones(64).half()),
    "float8 NaN": spoilt(NORM, math.nan, 0, lambda: torch.ones(64).to(torch.float8_e4m3fn)), "bfloat16 NaN": spoilt(NORM, math.nan, 0, lambda: torch.ones(64).bfloat16()),
    "float8 with scales": lambda t: (t | {UP: t[UP].to(torch.float8_e4m3fn), UP + "_scale": torch.ones(1)}, [repr(UP + "_scale"), "quantised"]),
    "bitsandbytes": lambda t: (t | {UP.replace("weight", "SCB"): torch.ones(1)}, ["SCB", "quantised"]), "complex": lambda t: (t | {"c": torch.ones(1, dtype=torch.cfloat)}, ["'c'", "C64"]),
    "float64 too large": spoilt(UP, 1e300, 0, lambda: torch.ones(96, 64).double()),
    **{f"NaN in {name[:12]!r}": spoilt(name, math.nan, 0, lambda: torch.ones(2)) for name in ("a\nb", "a\0b", "../x", "/etc/x", "x" * 10_000, "é\u2028\x1b[2J", "__class__", "²", "layers." + "9" * 5000)},
}


@pytest.mark.parametrize("side", ["target", "source"])
@pytest.mark.parametrize("case", VALUES)
def test_a_value_that_would_spoil_the_result(box, capsys, case, side):
    tensors, words = VALUES[case](box.tensors())
    other = box.save({n: torch.ones(t.shape) for n, t in tensors.items() if not ck.QUANTISED.search(n)}, "good.safetensors")
    bad = box.save(tensors)
    check_fault(box, capsys, [bad, other] if side == "target" else [other, bad], [bad, *words])


def test_a_value_that_does_not_fit_the_targets_dtype(box, capsys):
    target, source = box.save({k: t.half() for k, t in box.tensors().items()}, "t.safetensors"), box.tensors()
    source[NORM][:] = 3e5
    check_fault(box, capsys, [target, box.save(source)], [repr(NORM), "float16"])


# --- folders and indexes: builders that return (what the user names, words) ---------------------------------------------
def texted(text, name=INDEX): return lambda box: ((folder := box.shards()).joinpath(name).write_text(text), (folder, [folder / name]))[1]


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
            save_file(content, folder / name) if isinstance(content, dict) else (folder / name).write_text(content)
        return folder, [folder, *words]
    return build


def twice(box):
    part = (folder := box.shards()) / "model-00002-of-00002.safetensors"
    save_file(load_file(part) | {EMBED: torch.ones(40, 64)}, part)
    return folder, [repr(EMBED), "model-00001-of-00002"]


def lost(box):
    folder = box.shards()
    for part in folder.glob("model-0*"):
        part.unlink()
    return folder, [INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def configured(**settings): return texted(json.dumps(settings), "config.json")


def link(box, to):
    os.symlink(to, box.bad)
    return box.bad, [box.bad]


TINY = {W: torch.ones(2, 2)}
FOLDERS = {
    "index is no JSON": texted("{"), "index is a list": texted("[]"), "no weight_map": texted("{}"),
    "empty weight_map": texted('{"weight_map": {}}'), "weight_map a list": texted('{"weight_map": ["w"]}'),
    "nesting bomb": texted("[" * 200_000), "a name twice": texted('{"weight_map": {"w": "a", "w": "b"}}'),
    "value is no string": mapped(UP, 5), "value is a list": mapped(UP, ["x"]), "traversal": mapped(UP, "../a.safetensors", repr(UP)), "absolute": mapped(UP, "/etc/passwd", repr(UP)),
    "the folder itself": mapped(UP, ".", repr(UP)), "its parent": mapped(UP, "..", repr(UP)), "empty file name": mapped(UP, "", repr(UP)), "NUL": mapped(UP, "a\0.safetensors", repr(UP)),
    "newline in a shard's name": mapped(UP, "a\nb.safetensors", "missing"), "odd digit as a shard's name": mapped(UP, "²", "missing"), "missing shards, all listed": lost,
    "ghost name": mapped("ghost.weight", "model-00001-of-00002.safetensors", "'ghost.weight'"), "tensor that the index lacks": mapped(UP, None, repr(UP), "nothing"),
    "mapped to the wrong shard": mapped(EMBED, "model-00002-of-00002.safetensors", repr(EMBED), "model-00001-of-00002"), "a tensor in two shards": twice,
    "third of two shards": mapped("x", "model-00003-of-00002.safetensors", "3 shards of 2", make=lambda f: save_file({"x": torch.ones(1)}, f / "model-00003-of-00002.safetensors")),
    "a shard is a pipe": mapped("x", "pipe.safetensors", "pipe.safetensors", make=lambda f: os.mkfifo(f / "pipe.safetensors")),
    "a shard is a folder": mapped("x", "sub", "sub", make=lambda f: (f / "sub").mkdir()), "an empty folder": folder_with({}, "none"), "only a configuration": folder_with({"config.json": "{}"}, "none"),
    "several files": folder_with({"a.safetensors": TINY, "b.safetensors": TINY}, "a.safetensors, b.safetensors"), "only pickles": folder_with({"model.bin": "x"}, "model.bin", "convert"),
    "several indexes": folder_with({"x.safetensors.index.json": "{}", "y.safetensors.index.json": "{}"}), "quantised": configured(quantization_config={"bits": 4}),
    "untied head absent": configured(architectures=["LlamaForCausalLM"], tie_word_embeddings=False), "configuration is a list": texted("[]", "config.json"),
    "configuration is no JSON": texted("{,}", "config.json"),
    "no such file": lambda box: (box.folder / "a.safetensor", ["did you mean", "a.safetensors"]), "no such folder": lambda box: (box.folder / "x/y/z", ["x/y/z"]),
    "a file as folder": lambda box: (box.a / "x", ["a.safetensors/x"]), "a pipe": lambda box: (os.mkfifo(box.bad), (box.bad, [box.bad, "regular"]))[1],
    "a dangling link": lambda box: link(box, "nowhere"), "a link to itself": lambda box: link(box, "bad.safetensors"), "a device": lambda box: ("/dev/zero", ["/dev/zero"]),
    "newline in a near name": lambda box: (box.save(TINY, "x\ny.safetensors"), (box.folder / "xy.safetensors", ["did you mean"]))[1],
    "header beyond the format's limit": lambda box: (box.bad.write_bytes((10 ** 8 + 1).to_bytes(8, "little")), os.truncate(box.bad, 10 ** 8 + 99), (box.bad, [box.bad]))[2],
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_path_or_folder_that_is_no_model(box, capsys, case):
    path, words = FOLDERS[case](box)
    check_fault(box, capsys, [box.a, path] if len(case) % 2 else [path, box.b, "--space", "weight"], words)


# --- pairs, options, environment: builders that return (arguments, words) ------------------------------------------------
def hard_link(box):
    box.out.unlink()
    os.link(box.b, box.out)
    return [box.a, box.b], [box.out, "input"]


def soft_link(box, to):
    box.out.unlink()
    os.symlink(to, box.out)
    return [box.a, box.b], [box.out]


def spoilt_vae(change, **metadata):
    """A VAE file with other tensors or metadata. change: tensors -> (tensors, words)."""
    def build(box):
        file = ck.Checkpoint(box.vae)
        tensors, words = change({name: file.read_tensor(name) for name in file.entries})
        return [box.a, box.b, "--vae", box.save(tensors, **(file.metadata | metadata))], words if "gate failed" in words else [*words, box.bad]
    return build


def strangers(*names, make=None):
    def build(box):
        folder = box.old_folder(*names)
        if make:
            (folder / make).mkdir(), (folder / make / "precious").write_text("precious")
        return [box.shards(), box.b, "-o", folder], [folder, *names]
    return build


OPTIONS = {
    "nothing pairs": lambda box: ([box.a, box.save({"layers.0.zebra.weight": torch.ones(8, 8)})], [box.bad, "pairs"]),
    "weight space across shapes": lambda box: ([box.a, box.save(llama_tensors(1, hidden=32)), "--space", "weight"], ["--space weight"]),
    "a vector where the target has a matrix": lambda box: ([box.a, box.save(box.tensors(**{UP: torch.ones(5)})), "--space", "weight"], ["--space weight"]),
    "output is the target": lambda box: ([box.a, box.b, "-o", box.a], [box.a, "input"]), "output is the VAE": lambda box: ([box.a, box.b, "-o", box.vae], [box.vae, "input"]),
    "output is a source in other words": lambda box: ([box.a, box.b, "-o", f"{box.folder}/out/..//b.safetensors"], ["input", box.b]),
    "output is a link to a source": lambda box: soft_link(box, "../b.safetensors"), "output is a hard link to a source": hard_link,
    "output is the target's folder": lambda box: ([(f := box.shards()), box.b, "-o", f"{f}/"], [f, "input"]),
    "output holds a source": lambda box: ([box.shards(), box.b, "-o", box.folder], [box.folder, "input"]),
    "output is a shard": lambda box: ([(f := box.shards()), box.b, "-o", f / "model-00001-of-00002.safetensors"], ["input", f]),
    "output is a link to the target's folder": lambda box: (os.symlink(f := box.shards(), g := box.folder / "g"), ([f, box.b, "-o", g], [g, "input"]))[1],
    "report is the target": lambda box: ([box.a, box.b, "--report", box.a], [box.a, "input"]), "report is the output": lambda box: ([box.a, box.b, "--report", box.out], [box.out, "two"]),
    "report within the result": lambda box: ([box.shards(), box.b, "-o", (f := box.old_folder()), "--report", f / "r.json"], ["r.json"]),
    "VAE kept within the result": lambda box: ([box.shards(), box.b, "--space", "latent", "-o", (f := box.old_folder()), "--save-vae", f / "vae.safetensors"], ["vae.safetensors"]),
    "no folder for the output": lambda box: ([box.a, box.b, "-o", box.folder / "x/m.safetensors"], ["x/m.safetensors", "does not exist"]),
    "a file for a folder": lambda box: ([box.a, box.b, "-o", box.a / "m.safetensors"], [box.a / "m.safetensors", "does not exist"]),
    "output is a folder": lambda box: ([box.a, box.b, "-o", box.out.parent], [box.out.parent, "regular file"]),
    "a folder where a file is": lambda box: ([box.shards(), box.b, "-o", (box.folder / "out/x").write_text("x") and box.folder / "out/x"], ["out/x", "no folder"]),
    "strangers in the result folder": strangers("thesis.tex", "notes.txt"), "a folder of one's own in it": strangers(make="data"), "one called like a tokenizer's file": strangers(make="tokenizer_data"),
    "VAE missing": lambda box: ([box.a, box.b, "--vae", box.folder / "nae.safetensors"], ["nae.safetensors"]), "VAE is a model": lambda box: ([box.a, box.b, "--vae", box.b], [box.b, "VAE"]),
    "VAE is a pipe": lambda box: (os.mkfifo(box.bad), ([box.a, box.b, "--vae", box.bad], [box.bad]))[1],
    "NaN in the VAE": spoilt_vae(lambda t: (spoilt(n := sorted(t)[0], math.nan)(t)[0], [repr(n), "NaN"])), "a VAE of another size": spoilt_vae(lambda t: (t | {(n := sorted(t)[0]): t[n][:1].clone()}, [repr(n)])),
    "a VAE that lacks a tensor": spoilt_vae(lambda t: ({n: t[n] for n in sorted(t)[1:]}, [repr(sorted(t)[0]), "missing"])), "a VAE in float8": spoilt_vae(lambda t: ({n: v.to(torch.float8_e4m3fn) for n, v in t.items()}, ["gate failed"])),
    "an untrained VAE": spoilt_vae(lambda t: ({n: v * 0 for n, v in t.items()}, ["gate failed"])), "a VAE without configuration": spoilt_vae(lambda t: (t, ["configuration"]), **{"lsmerge.vae": "{}"}),
    "a nesting bomb in the VAE": spoilt_vae(lambda t: (t, ["VAE"]), **{"lsmerge.vae": "[" * 100_000}), "a huge VAE": spoilt_vae(lambda t: (t, ["65,536"]), **{"lsmerge.vae": json.dumps(
        dict(chunk=64, tokens=16, ratio=1.0, width=10 ** 9, blocks=2, heads=2, init="pca", beta=1e-4, necks="tensor", places=[]))}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_be_followed(box, capsys, case):
    arguments, words = OPTIONS[case](box)
    check_fault(box, capsys, arguments, words)


@pytest.mark.parametrize("folder", [False, True])
def test_an_existing_output_needs_force(box, capsys, folder):
    out, target = (box.old_folder(), box.shards()) if folder else (box.out, box.a)
    check_fault(box, capsys, [target, box.b, "-o", out], [out, "--force"], force=False)


def replaced(source): os.replace(shutil.copyfile(source, f"{source}.new"), source)


@pytest.mark.parametrize("act, words", [(lambda s: os.truncate(s, 3000), ["tensor '", "shrank"]), (replaced, ["changed"]), (os.unlink, ["No such file"]),
                                        (lambda s: os.utime(s, (1, 1)), ["changed"])], ids=["cut short", "replaced", "deleted", "touched"])
def test_an_input_that_changes_under_the_run(box, capsys, monkeypatch, act, words):
    """After it was checked, before it is merged."""
    source, real, seen = box.folder / "b.safetensors", merge.get_codecs, {}
    monkeypatch.setattr(merge, "get_codecs", lambda *a: (act(source), seen.update(snapshot(box.folder)), real(*a))[2])
    assert run(box.a, source, "-o", box.out, *box.codec, "--force") == 1
    check_refusal(capsys.readouterr().err, [source, *words])
    assert snapshot(box.folder) == seen


@pytest.fixture
def small_disk(box):
    """A mounted file system of 200 kB; skipped where one may not mount."""
    (folder := box.folder / "disk").mkdir()
    mount = lambda *flags: subprocess.run(["mount", "-t", "tmpfs", *flags, "none", folder], capture_output=True).returncode == 0
    if os.geteuid() or not shutil.which("mount") or not mount("-o", "size=200k"):
        pytest.skip("no right to mount: RLIMIT_FSIZE and chmod stand in")
    yield folder, mount
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("kind", ["file", "folder", "report"])
def test_a_full_disk(box, capsys, small_disk, kind):
    disk, _ = small_disk
    target, out = (box.shards(), disk / "merged") if kind == "folder" else (box.a, disk / "m.safetensors")
    if kind == "folder":
        out.mkdir()
    (out / "model.safetensors" if kind == "folder" else out).write_bytes(b"old")
    if kind == "report":
        (disk / "big").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    check_fault(box, capsys, [target, box.b, *["--report", disk / "r.json"] * (kind == "report"), "-o", box.out if kind == "report" else out], [disk, "No space left"])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_folder_that_may_not_be_written(box, capsys, request, kind):
    """By its mode; for root, whom no mode holds, by a read-only mount."""
    if os.geteuid() == 0:
        parent, mount = request.getfixturevalue("small_disk")
        mount("-o", "remount,ro")
    else:
        (parent := box.folder / "disk").mkdir(0o555)
    out = parent / ("merged" if kind == "folder" else "m.safetensors")
    check_fault(box, capsys, [box.shards() if kind == "folder" else box.a, box.b, "-o", out], [out, "not writable"])


# --- faults that need a process of their own: forked, so that nothing is imported anew ----------------------------------
def forked(log, arguments, prepare=lambda: None):
    """Start the command; its process number. stdout and stderr go to log.out and log.err, as a terminal's encodings are."""
    if pid := os.fork():
        return pid
    try:
        sys.stdout, sys.stderr = open(f"{log}.out", "w", encoding="utf-8"), open(f"{log}.err", "w", encoding="utf-8", errors="backslashreplace")
        prepare()
        code = run(*arguments)
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        code = traceback.print_exc() or 99
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def ended(pid, seconds=60):
    for _ in range(seconds * 100):
        if (found := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(found[1])
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)
    pytest.fail("the command hangs")


def slowly(pipe, seconds=0.1):
    """For the child: every piece is announced and takes its time."""
    real = ck.TensorFile.put
    ck.TensorFile.put = lambda *a: (real(*a), os.write(pipe, b"x"), time.sleep(seconds))


def inputs_of(box, kind): return (box.shards(), box.old_folder("config.json")) if kind == "folder" else (box.a, box.out)


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_writing(box, tmp_path_factory, kind, sent, code):
    log, (ear, mouth) = tmp_path_factory.mktemp("log") / "log", os.pipe()
    target, out = inputs_of(box, kind)
    before = snapshot(box.folder)
    pid = forked(log, [target, box.b, *box.codec, "--force", "-o", out], lambda: slowly(mouth))
    assert os.read(ear, 1) == b"x" and len(snapshot(box.folder)) > len(before)      # a temporary file lies there
    os.kill(pid, sent)
    assert ended(pid) == code and snapshot(box.folder) == before
    error = log.with_suffix(".err").read_text()
    assert error.count("\n") <= 1 and (error.startswith("error: interrupted") or sent == signal.SIGTERM)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_limit_on_the_size_of_files(box, tmp_path_factory, kind):
    log, (target, out) = tmp_path_factory.mktemp("log") / "log", inputs_of(box, kind)
    before = snapshot(box.folder)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    assert ended(forked(log, [target, box.b, *box.codec, "--force", "-o", out], limit)) == 1 and snapshot(box.folder) == before
    check_refusal(log.with_suffix(".err").read_text(), [box.out.parent, "too large"])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_two_runs_into_one_output(box, tmp_path_factory, kind):
    log, (ear, mouth) = tmp_path_factory.mktemp("log"), os.pipe()
    target, out = inputs_of(box, kind)
    alone = []
    for lam in (0.25, 0.75):
        single = box.folder / "out" / ("s" if kind == "folder" else "s.safetensors")
        assert run(target, box.b, *box.codec, "--force", "-o", single, "--lam", lam) == 0
        alone.append((single / "model.safetensors" if kind == "folder" else single).read_bytes())
    shutil.rmtree(single) if kind == "folder" else single.unlink()
    pids = [forked(log / str(lam), [target, box.b, *box.codec, "--force", "-o", out, "--lam", lam], lambda: slowly(mouth, 0.01)) for lam in (0.25, 0.75)]
    assert [ended(pid) for pid in pids] == [0, 0]
    assert (out / "model.safetensors" if kind == "folder" else out).read_bytes() in alone
    assert {p.name for p in box.out.parent.iterdir()} == {"m.safetensors", out.name}


def test_a_path_that_is_not_utf8(box, tmp_path_factory):
    log, out = tmp_path_factory.mktemp("log") / "log", os.fsdecode(os.fsencode(box.folder) + b"/out/\xff.safetensors")
    assert ended(forked(log, [box.a, box.b, *box.codec, "-o", out])) == 0, log.with_suffix(".err").read_text()
    assert os.path.isfile(out) and not log.with_suffix(".err").read_text()


def test_what_a_killed_run_left_is_named_and_not_touched(box, capsys):
    (box.folder / "out/.lsmerge-x.tmp").write_bytes(b"half")
    assert run(box.a, box.b, *box.codec, "--force", "-o", box.out) == 0
    assert ".lsmerge-x.tmp" in capsys.readouterr().out and (box.folder / "out/.lsmerge-x.tmp").read_bytes() == b"half"


# --- what must work ------------------------------------------------------------------------------------------------------
def good(*arguments):
    assert run(*arguments) == 0
    return load_file(out if os.path.isfile(out := arguments[arguments.index("-o") + 1]) else f"{out}/model.safetensors")


def equal(one, two): return list(one) == list(two) and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


@pytest.mark.parametrize("space", ["latent", "weight"])
def test_shards_are_the_file_they_were_cut_from(box, space):
    folder, flags = box.shards(), box.codec if space == "latent" else ["--space", "weight"]
    whole = good(box.a, box.b, *flags, "--force", "-o", box.out)
    for path in (folder, folder / INDEX):
        assert equal(good(path, box.b, *flags, "--force", "-o", box.folder / "out/1.safetensors"), whole)
    swapped = good(box.b, box.a, *flags, "-o", box.folder / "out/2.safetensors")
    assert equal(good(box.b, folder, *flags, "-o", box.folder / "out/3.safetensors"), swapped)


def test_a_folder_gives_a_folder(box, capsys):
    """Weights, and the target's companions byte for byte; no index, nothing of a training, no pickle, no subfolder."""
    folder = box.shards()
    companions = {"config.json": b'{"num_hidden_layers": 2}\n', "tokenizer.json": bytes(range(256)), "LICENSE": b"L\r\n", "chat_template.jinja": b"{{ x }}", "modeling_x.py": b"#"}
    others = ["pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "model.gguf", ".hidden", "pytorch_model.bin.index.json"]
    for name, content in [*companions.items(), *((n, b"x") for n in others)]:
        (folder / name).write_bytes(content)
    (folder / "checkpoint-1").mkdir()
    old = box.old_folder(INDEX, "model-00001-of-00002.safetensors", "generation_config.json")
    os.chmod(old, 0o750)
    got = good(folder, box.b, *box.codec, "--force", "-o", old)
    assert equal(got, good(box.a, box.b, *box.codec, "--force", "-o", box.out)) and "5 companions" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in old.iterdir() if p.name != "model.safetensors"} == companions
    assert stat.S_IMODE(old.stat().st_mode) == 0o750 and {p.name for p in old.parent.iterdir()} == {"merged", "m.safetensors"}
    assert set(ck.Checkpoint(old).entries) == set(got)


def test_contradictions_that_are_the_users_to_judge(box, capsys):
    folder = box.shards()
    (folder / "config.json").write_text('{"num_hidden_layers": 3, "vocab_size": 41, "hidden_size": 64, "architectures": 5, "text_config": 5}')
    save_file(TINY, folder / "model.safetensors")
    good(folder, box.b, *box.codec, "--force", "-o", box.out)
    out = capsys.readouterr().out
    assert "num_hidden_layers is 3, the weights have 2" in out and "vocab_size is 41, the weights have 40" in out and "hidden_size" not in out
    assert f"{folder / 'model.safetensors'}: ignored" in out


@pytest.mark.parametrize("source_head", [True, False])
@pytest.mark.parametrize("target_head", ["absent", "tied", "untied"])
def test_a_head_stays_as_the_target_has_it(box, target_head, source_head):
    a, b = box.tensors(), load_file(box.b)
    target = a | ({} if target_head == "absent" else {HEAD: a[EMBED].clone() if target_head == "tied" else torch.randn(40, 64)})
    source = b | ({HEAD: torch.randn(40, 64)} if source_head else {})
    got = good(box.save(target, "t.safetensors"), box.save(source, "s.safetensors"), "--space", "weight", "--lam", 0.25, "--force", "-o", box.out)
    assert set(got) == set(target) and torch.equal(got[EMBED], (0.75 * a[EMBED].double() + 0.25 * b[EMBED].double()).float())
    if target_head == "tied":
        assert torch.equal(got[HEAD], got[EMBED])
    elif target_head == "untied":
        assert torch.equal(got[HEAD], (0.75 * target[HEAD].double() + 0.25 * source[HEAD].double()).float() if source_head else target[HEAD])


@pytest.mark.parametrize("mine, theirs", [(40, 42), (42, 40)])
@pytest.mark.parametrize("flags", [["--space", "weight"], []])
def test_vocabularies_of_two_sizes(box, capsys, mine, theirs, flags):
    """Common rows are interpolated, the rest is the target's."""
    make = lambda rows, seed: llama_tensors(seed, vocab=rows) | {HEAD: torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))}
    target, source = make(mine, 5), make(theirs, 6)
    got = good(box.save(target, "t.safetensors"), box.save(source, "s.safetensors"), *(flags or box.codec), "--lam", 0.25, "--force", "-o", box.out)
    for name in (EMBED, HEAD):
        assert torch.equal(got[name][:40], (0.75 * target[name][:40].double() + 0.25 * source[name][:40].double()).float())
        assert torch.equal(got[name][40:], target[name][40:]) and len(got[name]) == mine
    assert (f"40 of {mine} rows are common" in capsys.readouterr().out) == (mine == 42)


@pytest.mark.parametrize("mine, theirs", [("model.", ""), ("", "model."), ("model.", "model.language_model."), ("base.", "transformer.")])
def test_names_that_differ_in_their_prefix(box, mine, theirs):
    named = lambda tensors, prefix, name: box.save({prefix + n.removeprefix("model."): t for n, t in tensors.items()}, name)
    report = box.folder / "r.json"
    got = good(named(box.tensors(), mine, "t.safetensors"), named(load_file(box.b), theirs, "s.safetensors"), *box.codec, "--report", report, "--force", "-o", box.out)
    expected = good(box.a, box.b, *box.codec, "--force", "-o", box.out)
    assert {n.removeprefix(mine) for n in got} == {n.removeprefix("model.") for n in expected}
    assert all(torch.equal(got[mine + n.removeprefix("model.")], t) for n, t in expected.items())
    assert json.loads(report.read_text())["kind"] == "same-shape" and json.loads(report.read_text())["tensors"]["averaged"] == 6


@pytest.mark.parametrize("known", [True, False])
def test_odd_tensors_pass_through(box, known):
    """Names are never paths; scalars, empty tensors and integers keep name, shape and dtype, in the source or not."""
    odd = {"a\nb": torch.ones(2), "a\0b": torch.ones(1), "../../x": torch.ones(2), "/etc/x": torch.tensor(3.5), "x" * 10_000: torch.ones(2).bfloat16(), "ids": torch.arange(3),
           "empty": torch.zeros(0, 4), "layers.0.empty": torch.zeros(4, 0), "wide": torch.ones([1] * 60)}
    names = lambda: {*box.folder.rglob("*"), *box.folder.parent.iterdir()}
    before = names()
    target, source = box.save(expected := box.tensors() | odd, "t.safetensors"), box.save(load_file(box.b) | (odd if known else {}), "s.safetensors")
    got = good(target, source, *box.codec, "--force", "-o", box.out)
    assert {n: (t.shape, t.dtype) for n, t in got.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    assert all(torch.equal(got[n], t) for n, t in odd.items()) and names() - before == {target, source}


def test_modes_and_links(box):
    """A new file's mode is the umask's, an old one's stays; a link is written through."""
    link, folder = box.folder / "link.safetensors", box.shards()
    link.symlink_to(box.out)
    old = os.umask(0o027)
    try:
        good(box.a, box.b, *box.codec, "--force", "-o", link), good(box.a, box.b, *box.codec, "-o", box.folder / "new.safetensors")
        good(folder, box.b, *box.codec, "-o", box.folder / "new")
    finally:
        os.umask(old)
    modes = {name: stat.S_IMODE((box.folder / name).stat().st_mode) for name in ("out/m.safetensors", "new.safetensors", "new", "new/model.safetensors", "new/config.json")}
    assert modes == dict.fromkeys(modes, 0o640) | {"new": 0o750} and link.is_symlink() and load_file(link)
    os.chmod(box.out, 0o604)
    good(box.a, box.b, *box.codec, "--force", "-o", link)
    assert stat.S_IMODE(box.out.stat().st_mode) == 0o604


def test_provenance_and_equal_bytes(box):
    """Digests of the inputs; no path and no time: from elsewhere and later, the same bytes."""
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    folder = box.shards()
    good(folder, box.b, *box.codec, "--lam", 0.25, "--force", "-o", box.out)
    facts = ck.Checkpoint(box.out).metadata
    assert facts["lsmerge.sha256.target"] == ",".join(digest(p) for p in sorted(folder.glob("*.safetensors")))
    assert facts["lsmerge.sha256.source1"] == digest(box.b) and facts["lsmerge.sha256.vae"] == digest(box.vae) and facts["lsmerge.lambda"] == "0.25"
    assert not any(str(word) in json.dumps(facts) for word in (box.folder, box.folder.name, "safetensors", time.strftime("%Y-")))
    (box.folder / "elsewhere").mkdir()
    moved = [shutil.move(path, box.folder / "elsewhere" / f"x{i}{path.suffix}") for i, path in enumerate((folder, box.b, box.vae))]
    os.utime(moved[1], (5e8, 5e8))
    good(*moved[:2], "--vae", moved[2], "--lam", 0.25, "-o", box.folder / "again.safetensors")
    assert (box.folder / "again.safetensors").read_bytes() == box.out.read_bytes()


def test_the_order_within_a_file_does_not_matter(box):
    tensors = list(box.tensors().items())
    random.Random(0).shuffle(tensors)
    header, data = {}, b""
    for name, tensor in tensors:
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + tensor.nbytes]}
        data += tensor.numpy().tobytes()
    box.bad.write_bytes(packed(header, data))
    one, two = good(box.a, box.b, *box.codec, "--force", "-o", box.out), good(box.bad, box.b, *box.codec, "-o", box.folder / "2.safetensors")
    facts = [ck.Checkpoint(path).metadata for path in (box.out, box.folder / "2.safetensors")]
    assert equal(one, two) and {key for key in facts[0] if facts[0][key] != facts[1].get(key)} == {"lsmerge.sha256.target"}
    swapped = lambda facts, path: path.read_bytes().replace(facts["lsmerge.sha256.target"].encode(), b"")
    assert swapped(facts[0], box.out) == swapped(facts[1], box.folder / "2.safetensors")


# --- fuzz ----------------------------------------------------------------------------------------------------------------
NASTY = [None, True, -1, 0, 1, 1.5, 16, 2 ** 31, 2 ** 61, 2 ** 64, "", "F32", "BOOL", "F4", [], {}, [[]], [0], [4], [0, 16], [0, 0], [2 ** 32, 2 ** 32, 0], [0, 2 ** 61], [2 ** 61] * 300,
         [1] * 100, "²", "9" * 5000, "a\nb", "\ud800", "\0", "..", "/", "x" * 9999, "model-00001-of-00002.safetensors", "model-٣-of-00002.safetensors", "__metadata__", "weight_map", "dtype"]


def edited(table, rng):
    """One change somewhere in a JSON value: a key or a value taken away, doubled or made nasty."""
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


def mutated(text, rng):
    if rng.random() < 0.5:
        return json.dumps(edited(json.loads(text), rng)).encode()
    data = bytearray(text)
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(len(data)), rng.random()
        data[at:at + (kind < 0.7)] = bytes([rng.choice(b'0123456789-.,:[]{}"\\ eE\xff\0') if rng.random() < 0.7 else rng.randrange(256)]) * (kind < 0.4 or kind > 0.7)
    return bytes(data)


@pytest.mark.parametrize("what, rounds", [("header", 3000), ("index", 1000)])
def test_no_mutation_crashes_hangs_or_writes(box, what, rounds):
    rng, folder = random.Random(0), box.shards(tensors={f"layers.{i}.w": torch.full((2, 2), float(i)) for i in range(4)} | {"ids": torch.arange(2), "empty": torch.zeros(0)})
    save_file(load_file(folder / "model-00001-of-00002.safetensors"), box.bad, {"format": "pt"})
    good_file, index = box.bad.read_bytes(), (folder / INDEX).read_bytes()
    size, crashes, count = 8 + int.from_bytes(good_file[:8], "little"), {}, {True: 0, False: 0}
    before, path = sorted(os.listdir(folder)), folder / INDEX if what == "index" else box.bad
    for _ in range(rounds):
        text = mutated(index if what == "index" else good_file[8:size], rng)
        path.unlink()                                      # not truncated: some file systems then wait for the disk
        path.write_bytes(text if what == "index" else packed(text, good_file[size:]))
        try:
            file = ck.Checkpoint(folder if what == "index" else box.bad)
            count[all(file.read_tensor(name).shape == entry.shape for name, entry in file.entries.items())] += 1
        except (ck.CheckpointError, OSError) as error:
            count[False] += 1
            if not str(error).encode("ascii", "replace").decode().isprintable():
                crashes["the error is not one line"] = text[:300]
        except Exception as error:
            crashes[f"{type(error).__name__}: {error}"[:80]] = text[:300]
    assert not crashes, crashes
    assert count[True] > rounds / 50 and count[False] > rounds / 2 and sorted(os.listdir(folder)) == before


# --- several processes ---------------------------------------------------------------------------------------------------
def test_two_processes_give_the_bytes_of_one(box):
    signal.alarm(300)
    torchrun = lambda *arguments: subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", ROOT / "merge.py",
                                                  *map(str, arguments), *box.codec, "--force", "--quiet"], capture_output=True, text=True, timeout=120)
    good(box.a, box.b, *box.codec, "--lam", 0.25, "--force", "-o", box.out)
    done = torchrun(box.a, box.b, "--lam", 0.25, "-o", box.folder / "two.safetensors")
    assert done.returncode == 0, done.stderr
    assert (box.folder / "two.safetensors").read_bytes() == box.out.read_bytes() and done.stdout.count("wrote ") == 1
    tensors, words = spoilt(UP, math.nan)(box.tensors())
    bad, before = box.save(tensors), snapshot(box.folder)
    done = torchrun(box.a, bad, "-o", box.out)
    assert done.returncode != 0 and [line for line in done.stderr.splitlines() if line.startswith("error: ") and str(bad) in line and words[0] in line]
    assert snapshot(box.folder) != {} and snapshot(box.folder) == before
