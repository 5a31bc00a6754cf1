"""How machines go wrong: signals, full disks, closed streams, processes that fail. An
old output stays as it was (bytes, mode, time), and nothing is left behind. Then what
any output must be. (What is refused at once: test_refusals.py.)"""
import ast
import json
import math
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import chunking as ck
import merge
import train
from conftest import (A, B, BIG, ROOT, assert_equal, check_line, ended, forked, save,
                      sharded, snapshot, two_processes)

KINDS = pytest.mark.parametrize("kind", ["file", "folder"])


@pytest.fixture
def box(desk, tmp_path_factory):
    """A desk with two models, and old results in out/. What hangs fails."""
    desk.log = tmp_path_factory.mktemp("log") / "log"
    desk.a = desk.put(A, "a")
    desk.b = desk.put(B, "b")
    desk.out = desk / "out/m.safetensors"
    (desk / "out/merged").mkdir(parents=True)
    desk.out.write_text("old")
    (desk / "out/merged/model.safetensors").write_text("old")
    os.symlink("out/m.safetensors", desk / "link.safetensors")
    os.chmod(desk.out, 0o640)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(120)
    yield desk
    signal.alarm(0)


def said(box, kind="err"):
    return box.log.with_suffix(f".{kind}").read_text()


def merge_of(box, kind):
    """The command that replaces an old file, by a link; or folder, spelled oddly."""
    if kind == "file":
        return [box.a, box.b, "-o", box / "link.safetensors", "--force"]
    target = sharded(box / "model", A)
    return [target, box.b, "-o", f"{box.folder}//out/merged//", "--force"]


# --- A process that is stopped, or finds no room --------------------------------------
def slowly(pipe):
    """For the child: every piece that is written is announced and takes its time."""
    real = ck.Output.put

    def put(*arguments):
        real(*arguments)
        os.write(pipe, b"x")
        time.sleep(0.1)
    ck.Output.put = put


@KINDS
@pytest.mark.parametrize("sent, expected", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_while_writing(box, kind, sent, expected):
    """The old result stays, nothing is left; what SIGKILL leaves the next run names."""
    arguments = merge_of(box, kind)
    before = snapshot(box.folder)
    ear, mouth = os.pipe()
    pid = forked(box.log, arguments, lambda: slowly(mouth))
    os.close(mouth)                     # a child that has failed then ends our reading
    assert os.read(ear, 1) == b"x" and snapshot(box.folder).keys() > before.keys()
    os.kill(pid, sent)
    time.sleep(0.05)
    os.kill(pid, signal.SIGTERM)            # a second one does not disturb the clean-up
    assert ended(pid) == expected
    after = snapshot(box.folder)
    left = after.keys() - before.keys()
    assert {path: after[path] for path in before} == before
    if sent != signal.SIGKILL:
        assert not left and said(box).count("\n") <= 1
        return
    assert left and all(f".lsmerge-{pid}-" in path for path in left)
    assert ended(forked(box.log, arguments)) == 0
    assert f"note: {os.path.basename(min(left))}, beside" in said(box, "out")
    assert snapshot(box.folder).keys() >= left


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_signal_after_a_rename_leaves_a_whole_result(box, monkeypatch, sent, moment):
    """Of an old folder that is replaced: the old one or the new one, and no litter."""
    arguments = merge_of(box, "folder")
    expected, _ = box.merged(*arguments[:2], out="once")
    renamed = []

    def strike(rename, *paths):
        rename(*paths)
        renamed.append(paths)
        if len(renamed) == moment:
            os.kill(os.getpid(), sent)
    for name in ("rename", "replace", "link"):
        monkeypatch.setattr(os, name, partial(strike, getattr(os, name)))
    code, _, _ = box.run(*arguments)
    assert code in (130, 143) or code == 0 and len(renamed) < moment
    file = box / "out/merged/model.safetensors"
    if file.read_bytes() != b"old":
        assert_equal(load_file(file), expected)
    assert not [*box.folder.rglob(".lsmerge*")]


small_files = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
little_memory = partial(resource.setrlimit, resource.RLIMIT_AS, (8 << 30, 8 << 30))


@KINDS
def test_a_limit_on_the_size_of_files(box, kind):
    arguments = merge_of(box, kind)
    before = snapshot(box.folder)
    assert ended(forked(box.log, arguments, small_files)) == 1
    assert snapshot(box.folder) == before
    check_line(said(box), [box / "out", "too large"])


def test_too_little_memory(box):
    """The allocator of torch raises no MemoryError."""
    before = snapshot(box.folder)
    arguments = [box.a, "-o", box.out, "--force", "--width", 65536]
    assert ended(forked(box.log, arguments, little_memory, train.main)) == 1
    assert snapshot(box.folder) == before
    check_line(said(box), ["out of memory"])


def test_an_input_that_shrinks_under_the_run(box, monkeypatch):
    """After the codec was checked, before anything is merged."""
    def check_then_cut(run):
        os.truncate(box.b, 3000)
        return [], {"nmse": None}
    monkeypatch.setattr(merge, "check_codec", check_then_cut)
    before = snapshot(box / "out")
    code, _, error = box.run(*merge_of(box, "file"))
    assert code == 1 and snapshot(box / "out") == before
    check_line(error, [box.b, "tensor '", "shrank"])


def into_nothing(kind):
    sys.stdout = None
    if kind == "closed, both":
        sys.stderr = None
    elif kind == "full":
        sys.stdout = open("/dev/full", "w")
    elif kind == "gone":
        ear, mouth = os.pipe()
        os.close(ear)
        sys.stdout = open(mouth, "w")


@pytest.mark.parametrize("kind", ["gone", "closed", "closed, both", "full"])
def test_a_reader_that_has_gone_is_no_error(box, kind):
    """`merge.py ... | head -0`, `>&-`; but a full disk is an error."""
    code = ended(forked(box.log, merge_of(box, "file"), lambda: into_nothing(kind)))
    assert load_file(box.out)
    if kind == "full":
        assert code == 1
        check_line(said(box), ["No space left"])
    else:
        assert (code, said(box)) == (0, "")


@pytest.mark.parametrize("error, words", [
    (OSError(28, "No space left", "x"), "x: No space left"),
    (OSError(28, "No space left"), "No space left"),
    (MemoryError(), "out of memory"), (RuntimeError("memory format"), None)])
def test_how_a_command_ends(desk, error, words):
    def main(argv):
        raise error
    if words:
        desk.refuse(main=main, words=[words])
    else:
        with pytest.raises(RuntimeError):
            desk.run(main=main)


UNIX_ONLY = ("preadv", "pwritev", "pread", "pwrite", "posix_fallocate", "statvfs",
             "sched_getaffinity", "geteuid", "fchmod", "chown", "posix_fadvise")


def as_on_windows(rename, source, target):
    """It fails while a file below the path is open."""
    for number in os.listdir("/proc/self/fd"):
        there = os.path.realpath(f"/proc/self/fd/{number}")
        if there.startswith(os.path.realpath(source)):
            raise PermissionError(13, "is open", str(source))
    rename(source, target)


@KINDS
def test_no_call_of_one_platform(box, monkeypatch, kind):
    arguments = merge_of(box, kind)
    expected, _ = box.merged(*arguments[:2])
    for name in UNIX_ONLY:
        monkeypatch.delattr(os, name, raising=False)
    for name in ("rename", "replace", "link"):
        monkeypatch.setattr(os, name, partial(as_on_windows, getattr(os, name)))
    new = {"file": "again.safetensors", "folder": "again"}[kind]
    for _ in range(2):                                      # new, then replaced
        got, _ = box.merged(*arguments[:2], out=new)
        assert_equal(got, expected)


OWN_PROCESS = """
import os, sys
os.environ["WORLD_SIZE"] = "100"
import merge
del os.environ["WORLD_SIZE"]
from chunking import command
try:
    command(lambda: merge.main(["--help"]))
except SystemExit:
    pass
sys.exit(command(lambda: merge.main(sys.argv[1:])))
"""


def test_a_process_of_its_own_in_a_poor_environment(box):
    """python -OO; LC_ALL=C, and a folder whose name is no ASCII; a reader that has
    gone, also at the interpreter's exit. Nothing of a launcher is read at import."""
    poor = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    ear, mouth = os.pipe()
    os.close(ear)
    target, source = merge_of(box, "folder")[:2]
    arguments = [target, source, "-o", box / "mergé", "--vae", "exact"]
    done = subprocess.run([sys.executable, "-OO", "-c", OWN_PROCESS, *arguments],
                          stdout=mouth, stderr=subprocess.PIPE, cwd=ROOT, env=poor,
                          timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    expected, _ = box.merged(target, source, "--vae", "exact")
    assert_equal(load_file(box / "mergé/model.safetensors"), expected)
    (box / "mergé/README.md").read_text(encoding="utf-8")


def test_integrity_rests_on_no_assert():
    for name in ("lsmerge", "chunking", "vae", "align", "train", "merge"):
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def test_modes_links_and_other_names(box):
    """Modes are the umask's, links are written through, no input is written to."""
    os.link(box.b, box / "alias.safetensors")
    source = box.b.read_bytes()
    target, _ = merge_of(box, "folder")[:2]
    old = os.umask(0o027)
    try:
        box.merged(box.a, box.b, out="link.safetensors")
        box.merged(target, box.b, out="new")
        box.merged(box.a, box.b, out="alias.safetensors")
        none = ["--init", "pca", "--steps1", 0, "--steps2", 0]
        assert box.run(box.a, "-o", box / "v", *none, main=train.main)[0] == 0
    finally:
        os.umask(old)
    for name in ("out/m.safetensors", "new/model.safetensors", "new/config.json",
                 "new/README.md", "v", "report.json"):
        assert stat.S_IMODE((box / name).stat().st_mode) == 0o640, name
    assert stat.S_IMODE((box / "new").stat().st_mode) == 0o750
    assert (box / "link.safetensors").is_symlink() and load_file(box.out)
    assert box.b.read_bytes() == source != (box / "alias.safetensors").read_bytes()


def test_equal_bytes_from_elsewhere_and_later(box, models):
    target = merge_of(box, "folder")[0]
    found = []
    for where in (box / "here", box / "there"):
        source = save(where / "source.safetensors", B)
        vae = shutil.copyfile(models["vae"], where / "vae.safetensors")
        os.utime(vae, (5e8, 5e8))
        box.merged(target, source, "--vae", vae, "--samples", 2, out=where / "m")
        found.append((where / "m/model.safetensors").read_bytes())
    facts = json.dumps(ck.Checkpoint(where / "m").metadata)
    assert str(box.folder) not in facts and time.strftime("%Y-") not in facts
    assert found[0] == found[1]


# --- Several processes ----------------------------------------------------------------
def test_two_processes_give_the_bytes_of_one(box):
    source = box.put(BIG, "big")
    way = [merge_of(box, "folder")[0], source, "--align", "sinkhorn", "--samples", 2]
    _, one = box.merged(*way, out="one")
    outputs = ["-o", box / "two", "--report", box / "two.json"]
    codes, text, errors = two_processes(box.log, *way, *outputs)
    assert codes == [0, 0], errors
    assert [part.count("wrote ") for part in text] == [1, 0]
    first, second = (box / f"{k}/model.safetensors" for k in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    two = json.loads((box / "two.json").read_text())
    for key in one.keys() - {"seconds", "output"}:
        assert one[key] == two[key], key


@pytest.mark.parametrize("place, value", [(0, math.nan), (1, 3e5)])
def test_a_fault_in_one_of_two_processes(box, place, value):
    """Found as the weights are read, or as they are merged (it does not fit): one line
    of the process that finds it; nothing of the other, nor on the disk."""
    target = box.put({name: w.half() for name, w in A.items()}, "t")
    entries = sorted(ck.StateDict(A).entries.values(), key=lambda e: -e.numel)
    name = entries[place].name          # the largest go to the processes in turn
    source = box.put(A | {name: torch.full_like(A[name], value)}, "s")
    before = snapshot(box.folder)
    codes, _, errors = two_processes(box.log, target, source, "--force", "-o", box.out)
    assert snapshot(box.folder) == before
    assert codes == [1, 1]
    check_line(errors[place].splitlines(keepends=True)[-1], [repr(name)])
    assert "error" not in errors[1 - place]


def test_a_full_disk_of_two_processes(box):
    before = snapshot(box.folder)
    way = merge_of(box, "file")
    codes, _, errors = two_processes(box.log, *way, prepare=small_files)
    assert snapshot(box.folder) == before and codes == [1, 1]
    check_line(errors[0], [box / "out", "too large"])
    assert not errors[1], errors[1]
