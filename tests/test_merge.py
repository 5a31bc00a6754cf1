"""merge.py and lsmerge.py end to end. With an exact codec the pipeline is plain arithmetic, which
the tests do by hand; what the codec loses, what the aligners move, what a file says, likewise."""
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import align
import chunking as ck
import lsmerge
import merge
import train
from conftest import ROOT, llama_tensors
from lsmerge import Alignment, Codec, Parent, as_source, ls_merge

INDEX = "model.safetensors.index.json"
NAME = "model.layers.1.mlp.up_proj.weight"          # the last layer of the target ...
PARTNER = "model.layers.2.mlp.up_proj.weight"       # ... and of the deeper source
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def run(*arguments):
    return ck.command(lambda: merge.main([*map(str, arguments), "--quiet"]))


def merged(models, tmp_path, *arguments, vae=True, name="m.safetensors"):
    """(tensors, report) of a run that must succeed."""
    codec = ["--vae", models["vae"]] if vae else []
    report = tmp_path / "r.json"
    assert run(*arguments, *codec, "-o", tmp_path / name, "--report", report, "--force") == 0
    return load_file(tmp_path / name), json.loads(report.read_text())


def save(path, tensors):
    save_file(tensors, path, {"format": "pt"})
    return path


def combination(coefficients, tensors):
    """sum_i c_i w_i of every tensor, in float64, in the dtype of the first."""
    return {name: sum(c * t[name].double() for c, t in zip(coefficients, tensors)).to(first.dtype)
            for name, first in tensors[0].items()}


def assert_models_close(got, expected, rtol=1e-6):
    """Relative to each tensor's largest weight: float32 algebra of some 20 steps."""
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        wide = tensor.double()
        torch.testing.assert_close(got[name].double(), wide, rtol=0, msg=lambda m: f"{name}: {m}",
                                   atol=rtol * wide.abs().max().item())


def assert_equal(got, expected):
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def is_encoded(name, tensor):
    return "layers" in name and tensor.ndim == 2


# --- Equal shapes ---------------------------------------------------------------------------------
@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("vae", [True, False])
def test_an_exact_codec_gives_plain_averaging(models, tmp_path, lam, vae):
    """A VAE file at r = 1, and the one that needs none; NMSE of the round trip below 1e-12."""
    a, b = load_file(models["a"]), load_file(models["b"])
    exact = [] if vae else ["--vae", "exact"]
    got, report = merged(models, tmp_path, models["a"], models["b"], "--lam", lam, *exact, vae=vae)
    assert_models_close(got, combination([1 - lam, lam], [a, b]))
    assert report["kind"] == "same-shape" and report["lambda"] == [lam]
    assert report["align"] == "none" and report["ratio"] == 1
    assert [gate["name"] for gate in report["gates"]] == [
        "round trip of target", "round trip of source 1"]
    for nmse in (report["roundtrip"]["nmse"], *(gate["value"] for gate in report["gates"])):
        assert nmse < 1e-12
    assert report["distance"]["to_average"] < 1e-6


def test_two_state_dicts_in_ten_lines(models):
    a, b = load_file(models["a"]), load_file(models["b"])

    target, source, result = ck.StateDict(a), ck.StateDict(b), {}
    codec = Codec.load("exact")
    for name in a:
        slot = ck.measure(target, name)
        parents = [Parent(partial(m.read, name), slot, codec) for m in (target, source)]
        pieces = ls_merge(parents[0], parents[1:], [0.7, 0.3])
        result[name] = torch.cat([piece for _, piece in pieces]).reshape(slot.shape)

    assert_models_close(result, combination([0.7, 0.3], [a, b]))


def test_n_models_and_the_default_lambda_is_the_uniform_share(models, tmp_path):
    tensors = [load_file(models["a"]), load_file(models["b"]), llama_tensors(7)]
    parents = models["a"], models["b"], save(tmp_path / "c.safetensors", tensors[2])
    got, report = merged(models, tmp_path, *parents)
    assert_models_close(got, combination([1 / 3] * 3, tensors))
    assert report["lambda"] == pytest.approx([1 / 3, 1 / 3])
    for lam, coefficients in (("0.5,0.2", [0.3, 0.5, 0.2]), ("0.25", [0.5, 0.25, 0.25])):
        got, _ = merged(models, tmp_path, *parents, "--lambda", lam)
        assert_models_close(got, combination(coefficients, tensors))


def test_weight_space_is_exact_arithmetic(models, tmp_path):
    a, b = load_file(models["a"]), load_file(models["b"])
    got, report = merged(models, tmp_path, models["a"], models["b"], "--space", "weight", vae=False)
    assert_equal(got, combination([0.5, 0.5], [a, b]))
    assert report["distance"]["to_average"] == 0 and report["ratio"] is None
    assert report["gates"] == [] and report["roundtrip"]["nmse"] is None


def test_statistics_are_the_targets_where_shapes_are_equal(models, tmp_path):
    """A source with another mean and spread meets the target in the target's unit: were each scaled
    by its own, the merge would not be an average."""
    a, shifted = load_file(models["a"]), {}
    for name, w in load_file(models["b"]).items():
        shifted[name] = 3 * w + 0.5
    source = save(tmp_path / "s.safetensors", shifted)
    got, report = merged(models, tmp_path, models["a"], source, "--lam", 0.4)
    assert_models_close(got, combination([0.6, 0.4], [a, shifted]), rtol=1e-5)
    target, other = ck.Checkpoint(models["a"]), ck.Checkpoint(source)
    kind, tasks = merge.plan_merge(target, [other])
    for task in tasks:
        first, second = merge.measure_task([target, other], task).slots
        assert (first.mean, first.scale) == (second.mean, second.scale)
        assert first.mean == pytest.approx(a[task.name].double().mean().item(), abs=1e-12)


def test_select_leaves_everything_else_the_targets(models, tmp_path):
    a, average = load_file(models["a"]), merged(models, tmp_path, models["a"], models["b"])[0]
    for pattern, count in [("mlp", 6), ("self_attn", 8), ("embed", 1), (r"layers\.1\..*_proj", 7)]:
        got, report = merged(models, tmp_path, models["a"], models["b"], "--select", pattern)
        assert report["tensors"]["encoded"] == count and report["tensors"]["averaged"] == 0
        chosen = {name for name in a if re.search(pattern, name)}
        assert_equal({n: t for n, t in got.items() if n not in chosen},
                     {n: t for n, t in a.items() if n not in chosen})
        assert_models_close({n: got[n] for n in chosen}, {n: average[n] for n in chosen})


def test_the_target_decides_dtypes_and_integers_stay(models, tmp_path):
    half, a = load_file(models["half"]), load_file(models["a"])
    extra = {"position_ids": torch.arange(5), "mask": torch.tensor([True, False])}
    target = save(tmp_path / "t.safetensors", half | extra)
    other = {"position_ids": torch.arange(5) + 1, "mask": torch.tensor([False, False])}
    source = save(tmp_path / "s.safetensors", a | other)
    got, report = merged(models, tmp_path, target, source)
    assert_equal({name: got.pop(name) for name in extra}, extra)
    # bf16 keeps 8 bits: half a unit in the last place is 2^-9 of the weight.
    assert_models_close(got, combination([0.5, 0.5], [half, a]), rtol=2 ** -8)
    assert report["tensors"]["copied"] == 2


def test_float8_is_merged_in_float32(models, tmp_path):
    target = {k: t.to(torch.float8_e4m3fn) for k, t in load_file(models["a"]).items()}
    path = save(tmp_path / "t.safetensors", target)
    got, _ = merged(models, tmp_path, path, models["b"], "--lam", 0)
    assert all(torch.equal(got[k].float(), t.float()) for k, t in target.items())
    assert all(t.dtype == torch.float8_e4m3fn for t in got.values())


# --- What the codec loses: residual, round trip, the gate -----------------------------------------
@pytest.fixture(scope="module")
def lossy(models, tmp_path_factory):
    """A VAE at r = 4: on white noise it loses three quarters."""
    path = tmp_path_factory.mktemp("lossy") / "lossy.safetensors"
    assert train.main([str(models["a"]), "-o", str(path), "--ratio", "4", "--steps1", "0",
                       "--steps2", "0", "--quiet"]) == 0
    return path


@pytest.mark.parametrize("source", ["b", "half", "big", None])
def test_residual_at_lambda_0_is_the_target_bit_for_bit_whatever_the_vae(models, tmp_path, source,
                                                                         lossy):
    way = ["--roundtrip"] if source is None else [models[source], "--lam", 0]
    for name in ("a", "half"):
        for codec in (lossy, models["vae"], "exact"):
            got, report = merged(models, tmp_path, models[name], *way, "--vae", codec, "--residual",
                                 vae=False)
            assert_equal(got, load_file(models[name]))
            assert report["distance"]["to_target"] == 0


def test_residual_follows_its_formula(models, tmp_path, lossy):
    """W^ = sum w W + D(z_lambda) - sum w D(z): by hand from the outputs of runs without it."""
    a, b = load_file(models["a"]), load_file(models["b"])
    way, found = [models["a"], models["b"], "--vae", lossy], {}
    for lam in (0.3, 0, 1):
        flags = ["--max-nmse", 2, "--lam", lam]
        found[lam], _ = merged(models, tmp_path, *way, *flags, vae=False)
    got, report = merged(models, tmp_path, *way, "--lam", 0.3, "--residual", vae=False)
    d_z, d_a, d_b = (found[lam][NAME] for lam in (0.3, 0, 1))
    expected = 0.7 * a[NAME] + 0.3 * b[NAME] + d_z - 0.7 * d_a - 0.3 * d_b
    atol = 1e-6 * a[NAME].abs().max().item()
    torch.testing.assert_close(got[NAME], expected, rtol=0, atol=atol)
    assert (got[NAME] - d_z).abs().max() > 0.01 * a[NAME].abs().max()
    assert report["gates"] == []            # whoever enters unaligned gets back what was lost


def test_residual_across_shapes_keeps_the_targets_share(models, tmp_path, lossy):
    """Only the target enters unaligned: W^ = (1 - lam) W_t + D(z) - (1 - lam) D(z_t)."""
    vae = ["--vae", lossy, "--max-nmse", 2]
    way = [models["a"], models["big"], "--vae", lossy, "--align", "gaussian", "--lam", 0.2]
    without, _ = merged(models, tmp_path, *way, "--max-nmse", 2, vae=False)
    trip, _ = merged(models, tmp_path, models["a"], "--roundtrip", *vae, vae=False)
    assert run(*way, "--residual", "-o", tmp_path / "x.safetensors") == 1   # the source is broken
    # what is lost of the target comes back: only the source's codec must carry its weights
    two = [*way, "--source-vae", "exact", "--residual", "-o", tmp_path / "x.safetensors"]
    assert run(*two) == 0
    w = load_file(models["a"])[NAME]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "MAX_NMSE", 2)
        got, _ = merged(models, tmp_path, *way, "--residual", vae=False)
    expected = without[NAME] + 0.8 * (w - trip[NAME])
    atol = 1e-6 * w.abs().max().item()
    torch.testing.assert_close(got[NAME], expected, rtol=0, atol=atol)


def test_the_round_trip_reports_the_codecs_error(models, tmp_path, lossy):
    way = ["--roundtrip", "--vae", lossy, "--max-nmse", 1]
    got, report = merged(models, tmp_path, models["a"], *way, vae=False)
    a, nmse = load_file(models["a"]), {}
    for name, tensor in a.items():
        if is_encoded(name, tensor):
            lost = (got[name] - tensor).double().square().mean()
            nmse[name] = (lost / tensor.double().var(correction=0)).item()
        else:
            assert torch.equal(got[name], tensor)
    total = sum(nmse[name] * a[name].numel() for name in nmse)
    mean, worst = total / sum(a[name].numel() for name in nmse), max(nmse, key=nmse.get)
    assert report["roundtrip"] == {"nmse": pytest.approx(mean, rel=1e-4), "worst": {
        "name": worst, "nmse": pytest.approx(nmse[worst], rel=1e-4)}}
    assert report["gates"] == [{"name": "round trip of target", "passed": True, "bound": 1,
                                "value": report["roundtrip"]["nmse"]}]
    assert report["kind"] == "self" and report["lambda"] == [] and report["samples"] == 0


def test_the_gate_refuses_before_anything_is_merged(models, tmp_path, lossy, monkeypatch, capsys):
    (tmp_path / "m.safetensors").write_bytes(b"old")
    monkeypatch.setattr(merge, "merge_tensor", lambda *_: pytest.fail("it merges"))
    monkeypatch.setattr(merge, "create", lambda *_, **__: pytest.fail("it writes"))
    for inputs in ([models["a"], "--roundtrip"], [models["a"], models["b"]]):
        assert run(*inputs, "--vae", lossy, "-o", tmp_path / "m.safetensors", "--force", "--report",
                   tmp_path / "r.json") == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "; fix: " in error
        assert re.search(r"loses \d\d\.\d% of the variance", error) and "0.001" in error
    assert (tmp_path / "m.safetensors").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_the_gate_sees_the_end_of_a_large_tensor(tmp_path):
    """It once measured only the first 65,536 weights. The start of this tensor is easy at r = 4,
    its end is noise: the sample, spread evenly, finds what the whole tensor loses."""
    g, name = torch.Generator().manual_seed(0), "layers.0.mlp.up_proj.weight"
    w = torch.randn(1024, 256, generator=g)
    w[:512] = torch.randn(512, 256, generator=g)[:, :1] * torch.linspace(0.5, 1, 256)
    path, vae = save(tmp_path / "t.safetensors", {name: w}), tmp_path / "v.safetensors"
    train.main([str(path), "-o", str(vae), "--ratio", "4", "--steps1", "0", "--steps2", "0",
                "--quiet"])
    way = ["--roundtrip", "--vae", vae, "--max-nmse", 1]
    got, report = merged(None, tmp_path, path, *way, vae=False)
    true = (got[name] - w).double().square().mean().item() / w.double().var(correction=0).item()
    # 64 of 256 windows: their mean is off by 5 % at most, where half of them have the double error
    assert report["roundtrip"]["nmse"] == pytest.approx(true, rel=0.05) and true > 0.1


# --- Report, bytes, threads, processes ------------------------------------------------------------
def test_report_counts_and_distances(models, tmp_path):
    a, b = load_file(models["a"]), load_file(models["b"])
    got, report = merged(models, tmp_path, models["a"], models["b"], "--lam", 0.25, "--seed", 3)
    encoded = [name for name, tensor in a.items() if is_encoded(name, tensor)]
    assert report["tensors"] == {
        "encoded": 14, "averaged": 6, "copied": 0, "total": 20,
        "weights_encoded": sum(a[name].numel() for name in encoded),
        "weights_total": sum(tensor.numel() for tensor in a.values())}

    def flat(tensors):
        return torch.cat([tensors[name].double().reshape(-1) for name in encoded])

    for value, other in [(report["distance"]["to_target"], a),
                         (report["distance"]["to_source"][0], b)]:
        expected = (flat(got) - flat(other)).norm() / flat(a).norm()
        assert value == pytest.approx(expected.item(), rel=1e-5)
    assert set(report) == {
        "version", "inputs", "output", "seed", "samples", "kind", "ratio", "lambda", "operator",
        "space", "align", "control", "tensors", "roundtrip", "distance", "alignment", "kinship",
        "gates", "seconds"}
    assert report["inputs"] == ["a.safetensors", "b.safetensors"] and report["seed"] == 3
    assert report["output"] == "m.safetensors" and report["version"] == merge.VERSION
    assert report["alignment"] == [] and report["kinship"] is None and report["control"] is None
    assert all(gate["passed"] and gate["value"] <= gate["bound"] for gate in report["gates"])


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


CASES = {"equal shapes": ["b"], "across shapes": ["big"], "draws": ["b", "--samples", "2"],
         "sinkhorn": ["big", "--align", "sinkhorn"], "noise": ["big", "--control", "noise"]}


@pytest.mark.parametrize("case", CASES)
def test_same_command_same_bytes_whatever_the_threads(models, tmp_path, case):
    source, *flags = CASES[case]
    threads, sums = torch.get_num_threads(), {}
    try:
        for name, count in (("x", 1), ("y", 1), ("z", 3)):
            torch.set_num_threads(count)
            merged(models, tmp_path, models["a"], models[source], *flags, name=name)
            sums[name] = digest(tmp_path / name)
    finally:
        torch.set_num_threads(threads)
    assert len(set(sums.values())) == 1
    got, _ = merged(models, tmp_path, models["a"], models[source], *flags, "--seed", 1)
    same = torch.equal(got[NAME], load_file(tmp_path / "x")[NAME])
    assert same == (case not in ("draws", "noise"))         # the seed decides all noise


def test_two_processes_give_the_bytes_of_one(models, tmp_path):
    """torchrun splits the tensors; the report counts them all, whatever process merged them."""
    (tmp_path / "t").mkdir()
    target = save(tmp_path / "t/model.safetensors", load_file(models["a"])).parent
    (target / "config.json").write_text("{}")
    flags = [target, models["big"], "--vae", models["vae"], "--quiet", "--force"]
    for name, start in {"one": [], "two": ["-m", "torch.distributed.run", "--standalone",
                                           "--nproc_per_node=2"]}.items():
        line = [sys.executable, *start, ROOT / "merge.py", *flags, "-o", tmp_path / name,
                "--report", tmp_path / f"{name}.json"]
        done = subprocess.run(line, check=True, capture_output=True, text=True)
        assert done.stdout.count("wrote") == 1
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    for key in set(one) - {"seconds", "output"}:
        assert one[key] == two[key], key
    assert digest(tmp_path / "one/model.safetensors") == digest(tmp_path / "two/model.safetensors")
    assert {p.name for p in tmp_path.iterdir()} == {"t", "one", "two", "one.json", "two.json"}


def test_the_header_says_what_was_done(models, tmp_path):
    merged(models, tmp_path, models["a"], models["big"], "--lam", 0.3, "--seed", 5)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts["format"] == "pt" and facts["lsmerge.lambda"] == "0.3"
    assert facts["lsmerge.align"] == "gaussian" and facts["lsmerge.seed"] == "5"
    assert not any(str(tmp_path) in value for value in facts.values())


def test_pieces_do_not_show(models, tmp_path, monkeypatch):
    """A tensor in many pieces equals one merged whole, but for the last bits of a product."""
    whole, _ = merged(models, tmp_path, models["a"], models["b"], "--lam", 0.3)
    monkeypatch.setattr(lsmerge, "PIECE", 2048)
    monkeypatch.setattr(ck.spans, "__defaults__", (1000,))
    cut, report = merged(models, tmp_path, models["a"], models["b"], "--lam", 0.3)
    assert_models_close(cut, whole)
    assert report["roundtrip"]["nmse"] < 1e-12


def test_dry_run_writes_nothing(models, tmp_path, capsys):
    way = ["--dry-run", "-o", tmp_path / "m.safetensors"]
    assert run(models["a"], models["b"], *way) == run(models["a"], models["big"], *way) == 0
    out = capsys.readouterr().out
    assert "14 encoded" in out and "6 averaged" in out and not list(tmp_path.iterdir())
    size = sum(t.nbytes for t in load_file(models["a"]).values())
    assert f"{size:,} bytes" in out and re.search(f"{NAME} .*{PARTNER}", out)


def test_options_and_files_come_in_any_order(models, tmp_path):
    merged(models, tmp_path, "--lam", 0.2, models["a"], "--seed", 1, models["b"], name="x")
    merged(models, tmp_path, models["a"], models["b"], "--seed", 1, "--lam", 0.2, name="y")
    assert digest(tmp_path / "x") == digest(tmp_path / "y")


# --- Training on the fly --------------------------------------------------------------------------
@dataclass(frozen=True)
class Short(train.Schedule):
    steps1: int = 4
    steps2: int = 2
    batch: int = 4


def test_init_random_trains_on_the_inputs_and_may_keep_it(models, tmp_path, monkeypatch, capsys):
    """The training is seeded; the VAE that is kept gives the same bytes; the gate judges it."""
    monkeypatch.setattr(merge, "Schedule", Short)
    kept, inputs = tmp_path / "v.safetensors", [models["a"], models["b"], "--max-nmse", 9]
    for name, flags in [("x", ["--init", "random", "--save-vae", kept]),
                        ("y", ["--init", "random"]), ("z", ["--vae", kept])]:
        merged(models, tmp_path, *inputs, *flags, vae=False, name=name)
    assert digest(tmp_path / "x") == digest(tmp_path / "y") == digest(tmp_path / "z")
    out = capsys.readouterr().out
    assert "stage 1: held-out nmse" in out and "stage 2: held-out nmse" in out
    assert Codec.load(kept).vae.config.init == "random"
    assert run(*inputs[:2], "--init", "random", "-o", tmp_path / "n") == 1      # hardly trained
    assert "variance" in capsys.readouterr().err and not (tmp_path / "n").exists()


def test_ctrl_c_in_such_a_training_writes_nothing(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(merge, "Schedule", Short)
    monkeypatch.setattr(train, "train_step", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run(models["a"], models["b"], "--init", "random", "-o", tmp_path / "m") == 130
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


# --- The command line -----------------------------------------------------------------------------
@pytest.mark.parametrize("module", [merge, train])
def test_every_flag_stands_in_the_help_and_the_other_way_round(module, monkeypatch, capsys):
    parsers = []

    class Seen(ck.Parser):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            parsers.append(self)

    monkeypatch.setattr(train, "Parser", Seen)
    with pytest.raises(SystemExit) as caught:
        module.parse(["--help"])
    shown, parser = capsys.readouterr().out, parsers[0]
    assert caught.value.code == 0 and module.__doc__.strip() in shown
    known = set(parser._option_string_actions) - {"-h", "--help"}
    assert known == set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*\b", module.__doc__))
    for action in parser._actions:
        for choice in set(action.choices or []) - {action.default}:
            assert re.search(rf"(?<![\w-]){choice}\b", module.__doc__), choice


def test_defaults_in_the_help_are_those_of_the_code():
    for value in (merge.SAMPLES, merge.MAX_NMSE, align.EPSILON):
        assert f"({value:g}" in merge.__doc__


WITHOUT_EFFECT = {      # the lines of that table in the help, and how each case comes about
    "without SOURCE": ["a"], "with --roundtrip": ["a", "--roundtrip"],
    "with --space weight": ["a", "b", "--space", "weight"],
    "with slerp": ["a", "b", "--operator", "slerp"], "with soup": ["a", "b", "--operator", "soup"],
    "with --dry-run": ["a", "b", "--dry-run"], "with --init": ["a", "b", "--init", "random"],
    "with --residual": ["a", "b", "--residual"], "without --init": ["a", "b"],
    "without sinkhorn": ["a", "b", "--align", "gaussian"], "without task-arithmetic": ["a", "b"]}
VALUES = {"--align": "mean", "--control": "zero", "--operator": "soup", "--space": "weight",
          "--init": "random", "--dtype": "bfloat16", "--device": "cpu", "--residual": None,
          "--roundtrip": None}


def test_the_help_says_which_flags_would_change_nothing(models, tmp_path, capsys):
    """What it refuses is refused, flag by flag."""
    lines = merge.__doc__.split("would change nothing:\n")[1].split("\n\n")[0].splitlines()
    table = [re.split("  +", line.strip()) for line in lines]
    assert {case for case, _ in table} == set(WITHOUT_EFFECT)
    for case, flags in table:
        for flag in re.findall(r"--[a-z-]+", flags):
            value = VALUES.get(flag, "0.5" if flag in ("--lam", "--max-nmse", "--epsilon") else "2")
            way = [models.get(part, part) for part in WITHOUT_EFFECT[case]]
            way += [flag] if value is None else [flag, value]
            with pytest.raises(SystemExit) as caught:
                run(*way, "-o", tmp_path / "m.safetensors")
            assert caught.value.code == 2 and flag in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


USAGE = [
    ["--lam", "2"], ["--lam", "-1"], ["--lam", "nan"], ["--lam", "x"], ["--lam", "0.1,0.2"],
    ["--lam", ""], ["--operator", "mean"], ["--space", "weight", "--residual"],
    ["--space", "weight", "--max-nmse", "1"], ["--space", "weight", "--vae", "exact"],
    ["--space", "weight", "--dtype", "bfloat16"], ["--space", "weight", "--align", "mean"],
    ["--space", "weight", "--control", "zero"], ["--max-nmse", "0"], ["--max-nmse", "nan"],
    ["--residual", "--max-nmse", "1"], ["--select", "("], ["--roundtrip"], ["--bogus"],
    ["--vae", "v", "--init", "random"], ["--save-vae", "w"], ["--init", "pca"],
    ["--device", "tpu"], ["--dtype", "float16"], ["--seed", "-1"], ["--seed", "x"],
    ["--dry-run", "--report", "r"], ["--epsilon", "0.1"],
    ["--align", "sinkhorn", "--epsilon", "0"], ["--align", "sinkhorn", "--epsilon", "nan"],
    ["--align", "gaussian", "--epsilon", "0.1"], ["--align", "ot"], ["--control", "mean"],
    ["--samples", "-1"], ["--eval", "true"], ["--resume"]]


@pytest.mark.parametrize("flags", USAGE, ids=" ".join)
def test_what_the_command_line_alone_decides_exits_2(models, tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as caught:
        run(models["a"], models["b"], "-o", tmp_path / "m.safetensors", *flags)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert "; fix: " in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [
    ["--lam", "0.5"], ["--operator", "soup"], ["--space", "weight"], ["--align", "mean"],
    ["--roundtrip", "--samples", "3"], ["--control", "zero"], ["--source-vae", "v"]], ids=" ".join)
def test_what_needs_a_source_exits_2_without_one(models, tmp_path, flags):
    with pytest.raises(SystemExit) as caught:
        run(models["a"], "-o", tmp_path / "m.safetensors", *flags)
    assert caught.value.code == 2 and not list(tmp_path.iterdir())


def broken(models, tmp_path, kind):
    """(arguments, words of the error line)"""
    a, bad = load_file(models["a"]), tmp_path / "bad.safetensors"
    two = [models["a"], models["b"]]
    if kind == "missing":
        return [models["a"], bad], [bad]
    if kind == "pickle":
        torch.save(a, bad)
        return [models["a"], bad], [bad, "pickle"]
    if kind == "truncated":
        bad.write_bytes(models["a"].read_bytes()[:-100])
        return [bad, models["a"]], [bad]
    if kind in ("nan", "inf"):
        a[NAME][3, 4] = float(kind)
        return [models["a"], save(bad, a)], [bad, NAME]
    if kind == "nan in a norm":
        a[NORM][0] = math.nan
        return [save(bad, a), models["b"]], [bad, NORM]
    if kind == "output is an input":
        (tmp_path / "out.safetensors").symlink_to(models["b"])
        return [*two, "--force"], ["input"]
    if kind == "output exists":
        (tmp_path / "out.safetensors").write_bytes(b"old")
        return two, ["--force"]
    if kind == "report exists":
        (tmp_path / "r.json").write_text("mine")
        return [*two, "--report", tmp_path / "r.json"], ["r.json", "--force"]
    if kind == "vae is a model":
        return [*two, "--vae", models["b"]], [models["b"], "VAE", "train.py"]
    if kind == "nothing selected":
        return [*two, "--select", "zebra"], ["--select"]
    if kind == "two outputs in one place":
        return [*two, "--report", tmp_path / "out.safetensors"], ["out.safetensors"]
    if kind == "across shapes in weight space":
        return [models["a"], models["big"], "--space", "weight"], ["--space weight"]
    if kind == "nothing in common":
        save(bad, {"layers.0.zebra.weight": torch.randn(8, 8)})
        return [models["a"], bad], [bad, "role"]
    if kind == "a second VAE for equal shapes":
        return [*two, "--vae", "exact", "--source-vae", models["vae"]], ["--source-vae"]
    if kind == "hopeless epsilon":
        return [models["a"], models["big"], "--align", "sinkhorn", "--epsilon", "1e-6"], ["epsilon"]
    if kind == "an adapter":
        (tmp_path / "lora").mkdir()
        (tmp_path / "lora/adapter_config.json").write_text("{}")
        return [models["a"], tmp_path / "lora"], ["lora", "experiments/lora.py fold"]


@pytest.mark.parametrize("kind", [
    "missing", "pickle", "truncated", "nan", "inf", "nan in a norm", "output is an input",
    "output exists", "report exists", "vae is a model", "nothing selected",
    "two outputs in one place", "across shapes in weight space", "nothing in common",
    "a second VAE for equal shapes", "hopeless epsilon", "an adapter"])
def test_bad_input_is_one_line_and_leaves_everything_alone(models, tmp_path, kind, capsys):
    arguments, words = broken(models, tmp_path, kind)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(*arguments, "-o", tmp_path / "out.safetensors") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "; fix: " in error and error.count("\n") == 1
    assert all(str(word) in error for word in words), error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_wrong_vae_is_noticed_before_any_weight_is_read(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(merge, "measure", lambda *_: pytest.fail("weights are read"))
    assert run(models["a"], models["b"], "--vae", models["b"], "-o", tmp_path / "m") == 1
    assert "VAE" in capsys.readouterr().err


# --- Different shapes -----------------------------------------------------------------------------
def cross(models, tmp_path, *flags):
    return merged(models, tmp_path, models["a"], models["big"], *flags)


def standardised(path, name):
    """(chunks of 64 of the standardised tensor, its scale, its mean), by hand."""
    w = load_file(path)[name].double()
    return ((w - w.mean()) / w.std(correction=0)).reshape(-1, 64), w.std(correction=0), w.mean()


def projection_matrix(n_source, n_target):
    """P[j, i] = n_t |[j/n_t, (j+1)/n_t) n [i/n_s, (i+1)/n_s)|, entry by entry."""
    P = torch.zeros(n_target, n_source, dtype=torch.float64)
    for j in range(n_target):
        for i in range(n_source):
            shared = min((j + 1) / n_target, (i + 1) / n_source) - max(j / n_target, i / n_source)
            P[j, i] = n_target * max(0.0, shared)
    return P


def test_report_pairs_and_bookkeeping_across_shapes(models, tmp_path):
    got, report = cross(models, tmp_path)
    target = load_file(models["a"])
    assert report["kind"] == "cross-shape" and report["align"] == "gaussian"
    assert report["lambda"] == [0.1]
    counts = report["tensors"]
    assert (counts["encoded"], counts["averaged"], counts["copied"]) == (14, 0, 6)
    records = report["alignment"]
    assert {(r["layer"], r["source_layer"]) for r in records} == {(0, 0), (1, 2)}
    assert len(records) == 14 and {r["role"] for r in records} == {
        "q", "k", "v", "o", "gate", "up", "down"}
    for r in records:
        assert set(r) >= {"iterations", "marginal_error", "n_over_d"}
        assert r["cost_after"] < 1e-6 < r["cost_before"]
        assert r["std_ratio"] == pytest.approx(1, abs=1e-3)
    assert report["distance"]["to_source"] == [None] and report["distance"]["to_average"] is None
    assert [gate["name"] for gate in report["gates"]] == [
        "round trip of target", "round trip of source 1"]
    for name, tensor in target.items():
        assert got[name].shape == tensor.shape and got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor) != is_encoded(name, tensor)


@pytest.mark.parametrize("method", ["none", "mean", "gaussian"])
def test_across_shapes_against_the_formula_by_hand(models, tmp_path, method):
    """Chunks as latents: the codec is a rigid change of axes, which commutes with these maps."""
    z_t, scale, mean = standardised(models["a"], NAME)
    z_s, _, _ = standardised(models["big"], PARTNER)
    z = projection_matrix(len(z_s), len(z_t)) @ z_s
    if method != "none":
        z = z - z.mean(0) + z_t.mean(0)
    if method == "gaussian":
        S, T = (torch.cov(x.T, correction=0).numpy() for x in (z, z_t))
        root = scipy.linalg.sqrtm(S).real
        inverse, middle = np.linalg.inv(root), scipy.linalg.sqrtm(root @ T @ root).real
        z = z_t.mean(0) + (z - z_t.mean(0)) @ torch.from_numpy(inverse @ middle @ inverse)
    expected = (0.7 * z_t + 0.3 * z) * scale + mean
    got, _ = cross(models, tmp_path, "--align", method, "--lam", 0.3)
    # float32; inverting the covariance of 96 points in 64 dimensions costs three digits
    atol = (1e-3 if method == "gaussian" else 1e-6) * expected.abs().max().item()
    found = got[NAME].double().reshape(-1, 64)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_sinkhorn_gives_each_slot_its_own_chunk_back(models, tmp_path):
    """The source is the target with its chunks permuted; at small epsilon: an assignment."""
    source = load_file(models["a"])
    for name, t in source.items():
        if is_encoded(name, t):
            order = torch.randperm(t.numel() // 64, generator=torch.Generator().manual_seed(0))
            source[name] = t.reshape(-1, 64)[order].reshape(t.shape).contiguous()
    path = save(tmp_path / "permuted.safetensors", source)
    way = ["--align", "sinkhorn", "--epsilon", "0.01", "--lam", 1]
    got, report = merged(models, tmp_path, models["a"], path, *way)
    assert_models_close({NAME: got[NAME]}, {NAME: load_file(models["a"])[NAME]}, rtol=1e-3)
    record = report["alignment"][0]
    assert record["iterations"] > 0 and 0 <= record["marginal_error"] < 1e-5
    assert report["kind"] == "same-shape" and report["tensors"]["averaged"] == 0


def test_an_aligner_of_a_fork_works_from_the_command_line(models, tmp_path, monkeypatch):
    """A function and a line in the table: here one that doubles what was projected."""
    def doubled(m):
        return align.Aligned(2 * m.z_projected_JZ, iterations=7, error=0.25)

    monkeypatch.setitem(align.ALIGNERS, "double", doubled)
    way = ["--align", "double", "--lam", 0.3, "--vae", "exact"]     # z: a rotation of the chunk
    got, report = merged(models, tmp_path, models["a"], models["big"], *way, vae=False)
    z_t, scale, mean = standardised(models["a"], NAME)
    z_s, _, _ = standardised(models["big"], PARTNER)
    z = 0.7 * z_t + 0.3 * 2 * projection_matrix(len(z_s), len(z_t)) @ z_s
    expected = (z * scale + mean).float().reshape(got[NAME].shape)
    atol = 1e-6 * expected.abs().max().item()
    torch.testing.assert_close(got[NAME], expected, rtol=0, atol=atol)
    assert report["align"] == "double" and report["alignment"][0]["iterations"] == 7
    assert report["alignment"][0]["marginal_error"] == 0.25


def test_unknown_aligners_and_controls_are_refused():
    zeros, slot = torch.zeros(2048), ck.TensorSlot("w", torch.float32, (2048,))
    parent = Parent(lambda start, stop: zeros[start:stop], slot, Codec.load("exact"))
    for wrong in (dict(method="ot"), dict(control="nothing")):
        with pytest.raises((ValueError, KeyError), match="ot|nothing"):
            list(ls_merge(parent, [as_source(parent, parent, Alignment(**wrong))], [0.5, 0.5]))
    assert Alignment("sinkhorn", "zero").epsilon == align.EPSILON


def test_controls_hold_nothing_of_the_source(models, tmp_path):
    z_t, scale, mean = standardised(models["a"], NAME)
    other = llama_tensors(11, hidden=96, layers=3, mlp=160, kv=48)
    others = [save(tmp_path / "other.safetensors", other), models["b"], models["half"]]
    for kind in ("zero", "noise", "shuffled"):
        got, report = cross(models, tmp_path, "--control", kind, "--lam", 0.4)
        assert report["control"] == kind
        for source in others:       # of equal shapes, too: norms and embeddings stay the target's
            flags = ["--control", kind, "--lam", 0.4]
            found, _ = merged(models, tmp_path, models["a"], source, *flags)
            assert_equal(found, got)
        z = (((got[NAME].double() - mean) / scale).reshape(-1, 64) - 0.6 * z_t) / 0.4
        if kind == "zero":
            torch.testing.assert_close(z, z_t.mean(0).expand_as(z), rtol=0, atol=1e-4)
        elif kind == "shuffled":                           # the target's own chunks, each once
            near = torch.cdist(z, z_t).min(1)
            assert sorted(near.indices.tolist()) == list(range(len(z_t)))
            assert near.values.max() < 1e-3
        else:                       # 96 x 64 numbers: five standard errors of a deviation of 1
            spread = 5 / (2 * z.numel()) ** 0.5
            assert z.std().item() == pytest.approx(z_t.std().item(), abs=spread)
        again, _ = cross(models, tmp_path, "--control", kind, "--lam", 0.4, "--seed", 1)
        assert torch.equal(again[NAME], got[NAME]) == (kind == "zero")


def test_two_sources_do_not_share_a_controls_noise(models, tmp_path):
    """lambda 1 on the one or the other source under the noise control: two draws."""
    parents = models["a"], models["b"], save(tmp_path / "c.safetensors", llama_tensors(9))
    draws = []
    for lam in ("1,0", "0,1"):
        got, _ = merged(models, tmp_path, *parents, "--control", "noise", "--lam", lam)
        draws.append(got[NAME].flatten())
    assert abs(torch.corrcoef(torch.stack(draws))[0, 1]) < 0.1


def encoded(vae, model, name):
    """(codec, its latents of a whole tensor)."""
    codec, file = Codec.load(vae), ck.Checkpoint(model)
    return codec, codec.encode(file.read(name), ck.measure(file, name))


def test_two_vaes_of_different_latent_sizes(models, tmp_path):
    vaes = {}
    for name, flags in {"a": ["--chunk", "32", "--width", "64"], "big": ["--chunk", "64"]}.items():
        vaes[name] = tmp_path / f"{name}.safetensors"
        train.main([str(models[name]), "-o", str(vaes[name]), "--steps1", "0", "--steps2", "0",
                    "--quiet", *flags])
    before, way = load_file(models["a"])[NAME], ["--vae", vaes["a"], "--source-vae", vaes["big"]]
    results = []
    for method in ("gaussian", "sinkhorn"):
        got, report = merged(models, tmp_path, models["a"], models["big"], *way, "--align", method,
                             vae=False)
        assert report["tensors"]["encoded"] == 14 and not torch.equal(got[NAME], before)
        results.append(got[NAME])
    assert not torch.equal(*results)
    way = [models["a"], models["big"], *way]
    got, _ = merged(models, tmp_path, *way, "--align", "none", vae=False)
    (mine, z_t), (theirs, z_s) = (encoded(vaes[key], models[key], name) for key, name in (
        ("a", NAME), ("big", PARTNER)))
    z = projection_matrix(len(z_s), len(z_t)) @ z_s.double() @ projection_matrix(64, 32).T
    slot = ck.measure(ck.Checkpoint(models["a"]), NAME)
    decoded = mine.decode((0.9 * z_t + 0.1 * z).float(), slot, slot.numel).reshape(slot.shape)
    atol = 1e-6 * before.abs().max().item()
    torch.testing.assert_close(got[NAME], decoded, rtol=0, atol=atol)
    assert run(*way, "--residual", "--lam", 0, "-o", tmp_path / "m", "--force") == 0
    assert torch.equal(load_file(tmp_path / "m")[NAME], before)


def test_several_sources_of_different_shapes(models, tmp_path):
    """One of the target's shape, one larger: each has its own share and its own record."""
    parents = [models[name] for name in ("a", "b", "big")]
    got, report = merged(models, tmp_path, *parents, "--align", "mean")
    z_t, scale, mean = standardised(models["a"], NAME)
    z_b = (load_file(models["b"])[NAME].double().reshape(-1, 64) - mean) / scale
    z_s, _, _ = standardised(models["big"], PARTNER)
    z = projection_matrix(len(z_s), len(z_t)) @ z_s
    moved = [part - part.mean(0) + z_t.mean(0) for part in (z_b, z)]
    expected = ((0.9 * z_t + 0.05 * moved[0] + 0.05 * moved[1]) * scale + mean).reshape(-1)
    atol = 1e-6 * expected.abs().max().item()
    torch.testing.assert_close(got[NAME].double().reshape(-1), expected, rtol=0, atol=atol)
    assert report["lambda"] == [0.05, 0.05] and len(report["alignment"]) == 28
    assert {r["source"] for r in report["alignment"]} == {1, 2}
    assert report["distance"]["to_source"][1] is None or report["kind"] == "cross-shape"


def test_roles_without_a_partner_are_copied_and_said(models, tmp_path, capsys):
    """Fused qkv against split projections, a mixture of experts, an unknown role."""
    target = load_file(models["a"])
    for i in range(2):
        p = f"model.layers.{i}."
        target[p + "mlp.experts.0.up_proj.weight"] = torch.randn(32, 64)
        target[p + "zebra.weight"] = torch.randn(64, 64)
        parts = [target.pop(p + f"self_attn.{k}_proj.weight") for k in "qkv"]
        target[p + "self_attn.qkv_proj.weight"] = torch.cat(parts)
    path = save(tmp_path / "t.safetensors", target)
    got, report = merged(models, tmp_path, path, models["b"])
    out = capsys.readouterr().out
    assert report["kind"] == "cross-shape" and report["tensors"]["encoded"] == 8
    assert report["tensors"]["copied"] == len(target) - 8
    assert "no source has one partner of its role: 6" in out    # qkv, zebra, up.0 of two layers
    name = "model.layers.1.zebra.weight"
    assert torch.equal(got[name], target[name])


def test_a_deeper_source_of_the_same_width_is_cross_shape(models, tmp_path):
    """It once was averaged layer by layer from the bottom, and its upper layers vanished unsaid."""
    deep = save(tmp_path / "deep.safetensors", llama_tensors(9, layers=4))
    _, report = merged(models, tmp_path, models["a"], deep)
    assert report["kind"] == "cross-shape" and report["lambda"] == [0.1]
    assert {(r["layer"], r["source_layer"]) for r in report["alignment"]} == {(0, 0), (1, 3)}


@pytest.mark.parametrize("method", ["none", "mean", "gaussian"])
def test_pieces_do_not_show_across_shapes(models, tmp_path, monkeypatch, method):
    whole, _ = cross(models, tmp_path, "--align", method, "--lam", 0.3)
    monkeypatch.setattr(lsmerge, "PIECE", 6144)
    cut, _ = cross(models, tmp_path, "--align", method, "--lam", 0.3)
    # Only rounding may show, which a map of 96 points raises.
    assert_models_close(cut, whole, rtol=1e-3 if method == "gaussian" else 1e-5)


def test_sinkhorn_is_cut_into_problems_that_fit_the_memory(models, tmp_path, monkeypatch):
    """By hand: target and source in as many equal parts, each its own transport problem."""
    monkeypatch.setattr(align, "LIMIT_BYTES", 8 * 60 * 80)      # a cost matrix of 60 x 80 numbers
    source = {name: 2 * t for name, t in llama_tensors(5).items()}
    path = save(tmp_path / "s.safetensors", source)
    way = ["--align", "sinkhorn", "--epsilon", "0.1", "--lam", 1]
    got, report = merged(models, tmp_path, models["a"], path, *way)
    z_t, scale, mean = standardised(models["a"], NAME)
    z_s = (source[NAME].double().reshape(-1, 64) - mean) / scale
    parts = []
    for j in range(0, 96, 48):      # 96 x 96 chunks do not fit, 48 x 48 do: whole windows of 16
        cost = (z_s[j:j + 48, None] - z_t[j:j + 48]).square().sum(2)
        f, g, kernel = torch.zeros(48), torch.zeros(48), -cost / (0.1 * cost.max())
        for _ in range(500):
            f = -math.log(48) - torch.logsumexp(kernel + g, 1)
            g = -math.log(48) - torch.logsumexp(kernel + f[:, None], 0)
        parts.append(48 * (kernel + f[:, None] + g).exp().T @ z_s[j:j + 48])
    expected = (torch.cat(parts) * scale + mean).float().reshape(got[NAME].shape)
    atol = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(got[NAME], expected, rtol=0, atol=atol)
    assert all(r["marginal_error"] < 1e-5 for r in report["alignment"])


# --- Names, vocabularies, heads, folders ----------------------------------------------------------
@pytest.mark.parametrize("mine, theirs", [("model.", ""), ("", "model."), ("model.", "net.model.")])
def test_names_may_differ_in_their_prefix(models, tmp_path, mine, theirs):
    a, b = load_file(models["a"]), load_file(models["b"])
    paths = []
    for prefix, tensors in ((mine, a), (theirs, b)):
        tensors = {prefix + n.removeprefix("model."): t for n, t in tensors.items()}
        paths.append(save(tmp_path / f"{len(paths)}.safetensors", tensors))
    got, report = merged(models, tmp_path, *paths)
    found = {"model." + n.removeprefix(mine): t for n, t in got.items()}
    assert_models_close(found, combination([0.5, 0.5], [a, b]))
    assert report["kind"] == "same-shape" and all(n.startswith(mine) for n in got)


@pytest.mark.parametrize("mine, theirs", [(40, 44), (44, 40)])
def test_of_two_vocabularies_the_target_keeps_its_own(models, tmp_path, capsys, mine, theirs):
    a, b = llama_tensors(1, vocab=mine), llama_tensors(2, vocab=theirs)
    paths = [save(tmp_path / f"{n}.safetensors", t) for n, t in (("a", a), ("b", b))]
    got, report = merged(models, tmp_path, *paths)
    assert torch.equal(got[EMBED], a[EMBED])
    del got[EMBED], a[EMBED]
    assert_models_close(got, combination([0.5, 0.5], [a, b]))
    assert report["kind"] == "same-shape" and report["tensors"]["averaged"] == 5
    assert f"copied, no such float in every source: 1, the first is {EMBED}" in (
        capsys.readouterr().out)


@pytest.mark.parametrize("target_head, source_head", [(True, True), (True, False), (False, True)])
def test_tied_heads(models, tmp_path, target_head, source_head):
    """A model without a head is tied. Where one is, the target keeps what it has; the embeddings
    meet all the same."""
    a, b = load_file(models["a"]), load_file(models["b"])
    heads = [torch.randn(40, 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    mine = a | ({HEAD: heads[0]} if target_head else {})
    theirs = b | ({HEAD: heads[1]} if source_head else {})
    paths = [save(tmp_path / f"{n}.safetensors", t) for n, t in (("a", mine), ("b", theirs))]
    got, report = merged(models, tmp_path, *paths)
    assert set(got) == set(mine) and report["kind"] == "same-shape"
    if target_head:
        expected = (heads[0] + heads[1]) / 2 if source_head else heads[0]
        assert_models_close({HEAD: got[HEAD]}, {HEAD: expected})
    assert_models_close({EMBED: got[EMBED]}, {EMBED: (a[EMBED] + b[EMBED]) / 2})


def model_folder(folder, tensors, shards=0, **files):
    """A Hugging Face folder: one file, or shards and an index."""
    folder.mkdir()
    names = sorted(tensors)
    if not shards:
        save(folder / "model.safetensors", tensors)
    where = {}
    for i in range(shards):
        part = names[i::shards]
        where |= {name: f"model-{i + 1:05}-of-{shards:05}.safetensors" for name in part}
        save(folder / where[part[0]], {name: tensors[name] for name in part})
    if shards:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.mark.parametrize("shards", [0, 3])
def test_a_folder_gives_a_folder_with_companions_and_a_card(models, tmp_path, shards, capsys):
    files = {"config__json": '{"num_hidden_layers": 2}', "tokenizer__json": "{}", "LICENSE": "free"}
    left = {"README__md": "the target's own", "pytorch_model__bin": "no", "training_args__bin": "x",
            "optimizer__pt": "no", "__gitattributes": "no"}
    a, b = load_file(models["a"]), load_file(models["b"])
    target = model_folder(tmp_path / "target", a, shards, **files, **left)
    out = tmp_path / "my merge"
    assert run(target, models["b"], "--vae", models["vae"], "-o", out) == 0
    assert sorted(os.listdir(out)) == sorted(
        ["LICENSE", "README.md", "config.json", "model.safetensors", "tokenizer.json"])
    for name, text in files.items():
        assert (out / name.replace("__", ".")).read_text() == text
    assert_models_close(load_file(out / "model.safetensors"), combination([0.5, 0.5], [a, b]))
    card = (out / "README.md").read_text()
    header = card.split("---\n")[1]
    assert header == 'base_model:\n- "target"\n- "b.safetensors"\ntags:\n- merge\n- lsmerge\n'
    assert "# my merge" in card and "| lambda | 0.5 |" in card and "| operator | lerp |" in card
    assert "round trip of target" in card and str(tmp_path) not in card and "own" not in card
    # again, over itself: the folder is the result of a run, and is replaced whole
    capsys.readouterr()
    assert run(target, models["b"], "--vae", models["vae"], "-o", out) == 1
    assert "--force" in capsys.readouterr().err
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    assert run(target, models["b"], "--vae", models["vae"], "-o", out, "--force") == 0
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before
    assert sorted(os.listdir(tmp_path)) == ["my merge", "target"]


def test_a_folder_as_the_target_can_give_a_file(models, tmp_path):
    target = model_folder(tmp_path / "t", load_file(models["a"]), config__json="{}")
    got, _ = merged(models, tmp_path, target, models["b"])
    assert_equal(got, merged(models, tmp_path, models["a"], models["b"], name="x")[0])


def test_a_result_folder_that_holds_something_else_is_left_alone(models, tmp_path, capsys):
    target = model_folder(tmp_path / "t", load_file(models["a"]), config__json="{}")
    out = model_folder(tmp_path / "out", load_file(models["b"]), thesis__txt="mine")
    assert run(target, models["b"], "--vae", "exact", "-o", out, "--force") == 1
    error = capsys.readouterr().err
    assert "thesis.txt" in error and error.count("\n") == 1
    assert sorted(os.listdir(out)) == ["model.safetensors", "thesis.txt"]


@pytest.mark.parametrize("flag", ["--report", "--save-vae"])
def test_no_output_destroys_an_input_or_another_output(models, tmp_path, flag, capsys):
    precious = tmp_path / "precious.safetensors"
    precious.write_bytes(models["a"].read_bytes())
    init = ["--init", "random"] if flag == "--save-vae" else []
    for other in (precious, tmp_path / "m.safetensors"):
        assert run(precious, models["b"], "-o", tmp_path / "m.safetensors", "--force", *init, flag,
                   other) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert precious.read_bytes() == models["a"].read_bytes()
    assert os.listdir(tmp_path) == ["precious.safetensors"]


def test_no_way_of_naming_an_input_lets_it_be_overwritten(models, tmp_path, capsys):
    """A folder of links, as the Hugging Face cache has it, and a VAE given as its folder."""
    (tmp_path / "blobs").mkdir(), (tmp_path / "snap").mkdir(), (tmp_path / "vae").mkdir()
    (tmp_path / "blobs/x").write_bytes(models["a"].read_bytes())
    (tmp_path / "snap/model.safetensors").symlink_to(tmp_path / "blobs/x")
    vae = tmp_path / "vae/vae.safetensors"
    vae.write_bytes(models["vae"].read_bytes())
    for arguments in ([tmp_path / "snap", models["b"], "-o", tmp_path / "snap"],
                      [models["a"], models["b"], "--vae", tmp_path / "vae", "-o", vae]):
        assert run(*arguments, "--force") == 1 and "input" in capsys.readouterr().err
    assert (tmp_path / "snap/model.safetensors").is_symlink()
    assert vae.read_bytes() == models["vae"].read_bytes()
