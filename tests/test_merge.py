"""merge.py and lsmerge.py end to end: with an exact codec the pipeline is plain arithmetic, which the tests do by hand."""
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import chunking as ck
import lsmerge
import merge
import train
from conftest import ROOT, llama_tensors


def run(*arguments):
    return ck.command(lambda: merge.main([*map(str, arguments), "--quiet"]))


def merged(models, tmp_path, *arguments, vae=True, name="m.safetensors"):
    report = tmp_path / "r.json"
    codec = ["--vae", models["vae"]] if vae else []
    assert run(*arguments, *codec, "-o", tmp_path / name, "--report", report, "--force") == 0
    return load_file(tmp_path / name), json.loads(report.read_text())


def average(*tensors, weights):
    return {k: sum(w * t[k].double() for w, t in zip(weights, tensors)).to(tensors[0][k].dtype) for k in tensors[0]}


def assert_models_close(got, expected, rtol=1e-6):
    """Relative to each tensor's largest weight: float32 algebra of about 20 operations per weight."""
    assert list(got) == list(expected) or set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        torch.testing.assert_close(got[name].double(), tensor.double(), rtol=0, atol=rtol * tensor.double().abs().max().item(), msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_an_exact_codec_gives_plain_interpolation(models, tmp_path, lam):
    a, b = load_file(models["a"]), load_file(models["b"])
    got, report = merged(models, tmp_path, models["a"], models["b"], "--lam", lam)
    assert_models_close(got, average(a, b, weights=[1 - lam, lam]))
    assert report["kind"] == "same-shape" and report["lambda"] == [lam] and report["align"] == "none"


def test_default_lambda_is_the_uniform_share(models, tmp_path):
    tensors = [load_file(models[k]) for k in "ab"] + [llama_tensors(7)]
    save_file(tensors[2], tmp_path / "c.safetensors")
    got, report = merged(models, tmp_path, models["a"], models["b"], tmp_path / "c.safetensors")
    assert_models_close(got, average(*tensors, weights=[1 / 3] * 3))
    assert report["lambda"] == pytest.approx([1 / 3, 1 / 3])
    got, _ = merged(models, tmp_path, models["a"], models["b"], tmp_path / "c.safetensors", "--lam", "0.5,0.2")
    assert_models_close(got, average(*tensors, weights=[0.3, 0.5, 0.2]))


def test_weight_space_is_exact_arithmetic(models, tmp_path):
    a, b = load_file(models["a"]), load_file(models["b"])
    got, report = merged(models, tmp_path, models["a"], models["b"], "--space", "weight", vae=False)
    for name, tensor in average(a, b, weights=[0.5, 0.5]).items():
        assert torch.equal(got[name], tensor)
    assert report["distance"]["to_average"] == 0 and report["ratio"] is None


def lossy_vae(models, tmp_path):
    path = tmp_path / "lossy.safetensors"
    train.main([str(models["a"]), "-o", str(path), "--ratio", "4", "--steps1", "0", "--steps2", "0", "--quiet", "--force"])
    return path


def test_residual_at_lambda_0_is_the_target_bit_for_bit_whatever_the_vae(models, tmp_path):
    vae = lossy_vae(models, tmp_path)
    for name in ("a", "half"):
        got, report = merged(models, tmp_path, models[name], models["b"], "--vae", vae, "--residual", "--lam", 0, vae=False)
        assert all(torch.equal(got[k], t) for k, t in load_file(models[name]).items())
        assert report["distance"]["to_target"] == 0
    got, _ = merged(models, tmp_path, models["a"], "--vae", vae, "--residual", "--roundtrip", vae=False)
    assert all(torch.equal(got[k], t) for k, t in load_file(models["a"]).items())


def test_residual_follows_its_formula(models, tmp_path):
    """W^ = sum w W + D(z_lambda) - sum w D(z): by hand from the outputs of runs without it."""
    vae = ["--vae", lossy_vae(models, tmp_path), "--max-nmse", 2]
    a, b = load_file(models["a"]), load_file(models["b"])
    d_z, _ = merged(models, tmp_path, models["a"], models["b"], *vae, "--lam", 0.3, vae=False)
    d_a, _ = merged(models, tmp_path, models["a"], models["b"], *vae, "--lam", 0, vae=False)
    d_b, _ = merged(models, tmp_path, models["a"], models["b"], *vae, "--lam", 1, vae=False)
    got, _ = merged(models, tmp_path, models["a"], models["b"], *vae, "--lam", 0.3, "--residual", vae=False)
    name = "model.layers.1.mlp.up_proj.weight"
    expected = 0.7 * a[name] + 0.3 * b[name] + d_z[name] - 0.7 * d_a[name] - 0.3 * d_b[name]
    torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-6 * a[name].abs().max().item())
    assert (got[name] - d_z[name]).abs().max() > 0.01 * a[name].abs().max()


def test_round_trip_reports_the_codecs_error_and_the_gate_refuses(models, tmp_path, capsys):
    vae = lossy_vae(models, tmp_path)
    got, report = merged(models, tmp_path, models["a"], "--roundtrip", "--vae", vae, "--max-nmse", 1, vae=False)
    a, total, weights = load_file(models["a"]), 0.0, 0
    nmse = {}
    for name, tensor in a.items():
        if "layers" in name and tensor.ndim == 2:
            nmse[name] = ((got[name] - tensor).double().square().mean() / tensor.double().var(correction=0)).item()
            total, weights = total + nmse[name] * tensor.numel(), weights + tensor.numel()
        else:
            assert torch.equal(got[name], tensor)
    assert report["roundtrip"]["nmse"] == pytest.approx(total / weights, rel=1e-4)
    worst = max(nmse, key=nmse.get)
    assert report["roundtrip"]["worst"] == {"name": worst, "nmse": pytest.approx(nmse[worst], rel=1e-4)}
    (tmp_path / "m.safetensors").write_bytes(b"old")
    capsys.readouterr()
    assert run(models["a"], "--roundtrip", "--vae", vae, "-o", tmp_path / "m.safetensors", "--force", "--report", tmp_path / "r.json") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "gate" in error and error.count("\n") == 1
    assert (tmp_path / "m.safetensors").read_bytes() == b"old" and not json.loads((tmp_path / "r.json").read_text())["gates"][0]["passed"]


def test_report_counts_and_distances(models, tmp_path):
    a, b = load_file(models["a"]), load_file(models["b"])
    got, report = merged(models, tmp_path, models["a"], models["b"], "--lam", 0.25)
    encoded = [n for n, t in a.items() if "layers" in n and t.ndim == 2]
    assert report["tensors"] == {"encoded": 14, "averaged": 6, "copied": 0, "total": 20, "weights_encoded": sum(a[n].numel() for n in encoded),
                                 "weights_total": sum(t.numel() for t in a.values())}
    flat = lambda t: torch.cat([t[n].double().reshape(-1) for n in encoded])
    norm = flat(a).norm()
    for value, other in [(report["distance"]["to_target"], a), (report["distance"]["to_source"][0], b)]:
        assert value == pytest.approx(((flat(got) - flat(other)).norm() / norm).item(), rel=1e-5)
    assert report["distance"]["to_average"] < 1e-6
    assert set(report) == {"kind", "ratio", "lambda", "operator", "space", "align", "control", "tensors", "roundtrip", "distance", "alignment",
                           "gates", "seconds", "peak_anonymous_mib"}
    assert all(gate["passed"] for gate in report["gates"])


def test_select_decides_what_is_encoded(models, tmp_path):
    for pattern, count in [("mlp", 6), ("self_attn", 8), ("embed", 1)]:
        _, report = merged(models, tmp_path, models["a"], models["b"], "--select", pattern)
        assert report["tensors"]["encoded"] == count and report["tensors"]["averaged"] == 20 - count


def test_target_decides_dtypes_and_integers_stay(models, tmp_path):
    target = load_file(models["half"]) | {"position_ids": torch.arange(5), "mask": torch.tensor([True, False])}
    source = load_file(models["a"]) | {"position_ids": torch.arange(5) + 1, "mask": torch.tensor([False, False])}
    save_file(target, tmp_path / "t.safetensors"), save_file(source, tmp_path / "s.safetensors")
    got, report = merged(models, tmp_path, tmp_path / "t.safetensors", tmp_path / "s.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in got.items()} == {k: (v.dtype, v.shape) for k, v in target.items()}
    assert torch.equal(got["position_ids"], target["position_ids"]) and torch.equal(got["mask"], target["mask"])
    assert report["tensors"]["copied"] == 2
    # bf16 keeps 8 bits: half a unit in the last place is 2^-9 of the weight.
    assert_models_close({k: v for k, v in got.items() if v.is_floating_point()},
                        {k: v for k, v in average(load_file(models["half"]), load_file(models["a"]), weights=[0.5, 0.5]).items()}, rtol=2 ** -8)


def test_same_command_same_bytes_and_training_on_the_fly(models, tmp_path):
    """Also with no VAE given: the training is seeded. --save-vae keeps it, and --vae with it gives the same result."""
    sums = []
    for name, flags in [("x", ["--save-vae", tmp_path / "v.safetensors"]), ("y", []), ("z", ["--vae", tmp_path / "v.safetensors"])]:
        merged(models, tmp_path, models["a"], models["b"], *flags, vae=False, name=name)
        sums.append(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(set(sums)) == 1
    file = ck.Checkpoint(tmp_path / "x")
    assert file.metadata["format"] == "pt" and "lsmerge.lambda" in file.metadata


def test_pieces_do_not_show(models, tmp_path, monkeypatch):
    """A tensor read and merged in many pieces equals one merged whole, but for the last bits of a matrix product."""
    whole, _ = merged(models, tmp_path, models["a"], models["b"], "--lam", 0.3)
    monkeypatch.setattr(lsmerge, "PIECE", 2048)
    monkeypatch.setattr(ck.spans, "__defaults__", (1000,))
    cut, report = merged(models, tmp_path, models["a"], models["b"], "--lam", 0.3)
    assert_models_close(cut, whole, rtol=1e-6)
    assert report["roundtrip"]["nmse"] < 1e-10


def test_dry_run_writes_nothing(models, tmp_path, capsys):
    assert run(models["a"], models["b"], "--dry-run", "-o", tmp_path / "m.safetensors") == 0
    out = capsys.readouterr().out
    assert "q_proj" in out and not list(tmp_path.iterdir())
    assert str(14) in out


# --- refusals --------------------------------------------------------------------------------------------

USAGE = [["--lam", "2"], ["--lam", "-1"], ["--lam", "nan"], ["--lam", "x"], ["--lam", "0.1,0.2"], ["--operator", "mean"], ["--space", "weight", "--residual"],
         ["--space", "weight", "--max-nmse", "1"], ["--max-nmse", "0"], ["--max-nmse", "nan"], ["--select", "("], ["--roundtrip"], ["--bogus"],
         ["--vae", "v", "--save-vae", "w"], ["--device", "tpu"]]


@pytest.mark.parametrize("flags", USAGE)
def test_usage_errors(models, tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as caught:
        run(models["a"], models["b"], "-o", tmp_path / "m.safetensors", *flags)
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: ") and not list(tmp_path.iterdir())


def test_no_source_is_a_usage_error(models):
    with pytest.raises(SystemExit) as caught:
        run(models["a"])
    assert caught.value.code == 2


def broken(models, tmp_path, kind):
    """(arguments, words of the error line)"""
    a, path = load_file(models["a"]), tmp_path / "bad.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    if kind == "missing":
        return [models["a"], path], [str(path)]
    if kind == "pickle":
        torch.save(a, path)
        return [models["a"], path], [str(path), "pickle"]
    if kind == "truncated":
        path.write_bytes(models["a"].read_bytes()[:-100])
        return [path, models["a"]], [str(path)]
    if kind in ("nan", "inf"):
        a[name][3, 4] = float(kind)
        save_file(a, path)
        return [models["a"], path], [str(path), name, str(3 * a[name].shape[1] + 4)]
    if kind == "nan in a norm":
        a["model.norm.weight"][0] = math.nan
        save_file(a, path)
        return [path, models["b"]], [str(path), "model.norm.weight"]
    if kind == "output is an input":
        (tmp_path / "out.safetensors").symlink_to(models["b"])
        return [models["a"], models["b"], "--force"], ["input"]
    if kind == "output exists":
        (tmp_path / "out.safetensors").write_bytes(b"old")
        return [models["a"], models["b"]], ["--force"]
    if kind == "vae is a model":
        return [models["a"], models["b"], "--vae", models["b"]], [str(models["b"]), "VAE"]
    if kind == "nothing selected":
        return [models["a"], models["b"], "--select", "zebra"], ["--select"]


@pytest.mark.parametrize("kind", ["missing", "pickle", "truncated", "nan", "inf", "nan in a norm", "output is an input", "output exists",
                                  "vae is a model", "nothing selected"])
def test_bad_input_is_one_line_and_leaves_the_output_alone(models, tmp_path, kind, capsys):
    arguments, words = broken(models, tmp_path, kind)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(*arguments, "-o", tmp_path / "out.safetensors") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "; fix: " in error and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_no_litter(models, tmp_path, sent, code):
    (tmp_path / "m.safetensors").write_bytes(b"old")
    slow = ("import sys, time; sys.path.insert(0, sys.argv[1]); import chunking, merge; real = merge.merged_pieces\n"
            "def slowly(*a):\n    for piece in real(*a):\n        yield piece\n        print('piece', flush=True); time.sleep(0.2)\n"
            "merge.merged_pieces = slowly; sys.exit(chunking.command(lambda: merge.main(sys.argv[2:])))")
    process = subprocess.Popen([sys.executable, "-c", slow, ROOT, models["a"], models["b"], "--vae", models["vae"], "--force", "--quiet",
                                "-o", tmp_path / "m.safetensors"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("piece")
    assert len(list(tmp_path.iterdir())) == 2              # the temporary file is there
    process.send_signal(sent)
    assert process.wait(20) == code
    assert os.listdir(tmp_path) == ["m.safetensors"] and (tmp_path / "m.safetensors").read_bytes() == b"old"


def test_a_full_disk_is_one_line(models, tmp_path):
    """RLIMIT_FSIZE stands in for it: the write fails with EFBIG."""
    limited = ("import resource, signal, sys; sys.path.insert(0, sys.argv[1]); import chunking, merge\n"
               "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
               "sys.exit(chunking.command(lambda: merge.main(sys.argv[2:])))")
    done = subprocess.run([sys.executable, "-c", limited, ROOT, models["a"], models["b"], "--vae", models["vae"], "--quiet",
                           "-o", tmp_path / "m.safetensors"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_float16_overflow_is_an_error(models, tmp_path, capsys):
    a, b = llama_tensors(1, dtype=torch.float16), llama_tensors(2)
    b["model.norm.weight"][:] = 3e5
    save_file(a, tmp_path / "a.safetensors"), save_file(b, tmp_path / "b.safetensors")
    assert run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--vae", models["vae"], "-o", tmp_path / "m.safetensors") == 1
    assert "model.norm.weight" in capsys.readouterr().err


def test_every_module_flag_is_documented_and_order_does_not_matter(models, tmp_path):
    one, _ = merged(models, tmp_path, "--lam", 0.2, models["a"], "--seed", 1, models["b"], name="1.safetensors")
    two, _ = merged(models, tmp_path, models["a"], models["b"], "--seed", 1, "--lam", 0.2, name="2.safetensors")
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
