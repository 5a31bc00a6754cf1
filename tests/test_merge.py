"""merge.py and lsmerge.py end to end: with an exact codec the pipeline is plain arithmetic, which the tests do by hand."""
import hashlib
import json
import math
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

import chunking as ck
import lsmerge
import merge
import train
from conftest import llama_tensors


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
    assert "14 encoded" in out


# --- refusals --------------------------------------------------------------------------------------------

USAGE = [["--lam", "2"], ["--lam", "-1"], ["--lam", "nan"], ["--lam", "x"], ["--lam", "0.1,0.2"], ["--operator", "mean"], ["--space", "weight", "--residual"],
         ["--space", "weight", "--max-nmse", "1"], ["--max-nmse", "0"], ["--max-nmse", "nan"], ["--select", "("], ["--roundtrip"], ["--bogus"],
         ["--vae", "v", "--save-vae", "w"], ["--device", "tpu"], ["--seed", "-1"], ["--seed", "99999999999999999999"], ["--dry-run", "--report", "r"],
         ["--space", "weight", "--dtype", "bfloat16"]]


@pytest.mark.parametrize("flags", USAGE)
def test_usage_errors(models, tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as caught:
        run(models["a"], models["b"], "-o", tmp_path / "m.safetensors", *flags)
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: ") and not list(tmp_path.iterdir())


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


def test_options_and_files_come_in_any_order(models, tmp_path):
    one, _ = merged(models, tmp_path, "--lam", 0.2, models["a"], "--seed", 1, models["b"], name="1.safetensors")
    two, _ = merged(models, tmp_path, models["a"], models["b"], "--seed", 1, "--lam", 0.2, name="2.safetensors")
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


# --- different shapes ------------------------------------------------------------------------------------

def cross(models, tmp_path, *flags):
    return merged(models, tmp_path, models["a"], models["big"], *flags)


def standardised(path, name):
    """(chunks of 64 of the standardised tensor, its scale, its mean), by hand."""
    w = load_file(path)[name].double()
    return ((w - w.mean()) / w.std(correction=0)).reshape(-1, 64), w.std(correction=0), w.mean()


def projection_matrix(n_source, n_target):
    """P[j, i] = n_t |[j/n_t, (j+1)/n_t) n [i/n_s, (i+1)/n_s)|, entry by entry."""
    return torch.tensor([[n_target * max(0.0, min((j + 1) / n_target, (i + 1) / n_source) - max(j / n_target, i / n_source))
                          for i in range(n_source)] for j in range(n_target)], dtype=torch.float64)


NAME, PARTNER = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"     # last layer to last layer


def test_cross_shape_report_pairs_and_bookkeeping(models, tmp_path):
    got, report = cross(models, tmp_path)
    target = load_file(models["a"])
    assert {k: (t.shape, t.dtype) for k, t in got.items()} == {k: (t.shape, t.dtype) for k, t in target.items()}
    assert report["kind"] == "cross-shape" and report["align"] == "gaussian" and report["lambda"] == [0.1]
    assert report["tensors"]["encoded"] == 14 and report["tensors"]["copied"] == 6 and report["tensors"]["averaged"] == 0
    assert {(r["layer"], r["source_layer"]) for r in report["alignment"]} == {(0, 0), (1, 2)} and len(report["alignment"]) == 14
    for record in report["alignment"]:
        assert set(record) >= {"layer", "role", "source_layer", "iterations", "marginal_error", "cost_before", "cost_after", "std_ratio", "n_over_d"}
        assert record["cost_after"] < 1e-6 < record["cost_before"] and record["std_ratio"] == pytest.approx(1, abs=1e-3)
    assert report["distance"]["to_source"] == [None] and report["distance"]["to_average"] is None
    assert [g["name"] for g in report["gates"]][:2] == ["round trip of target", "round trip of source 1"]
    for name, tensor in target.items():
        assert torch.equal(got[name], tensor) == (name not in {n for n in target if "layers" in n and tensor.ndim == 2})


@pytest.mark.parametrize("method", ["none", "mean", "gaussian"])
def test_cross_shape_against_the_formula_by_hand(models, tmp_path, method):
    """Chunks as latents (the codec is an orthogonal change of axes, which commutes with all three maps)."""
    z_t, scale, mean = standardised(models["a"], NAME)
    z_s, _, _ = standardised(models["big"], PARTNER)
    z = projection_matrix(len(z_s), len(z_t)) @ z_s
    if method != "none":
        z = z - z.mean(0) + z_t.mean(0)
    if method == "gaussian":
        import scipy.linalg
        S, T = (torch.cov(x.T, correction=0).numpy() for x in (z, z_t))
        root = scipy.linalg.sqrtm(S).real
        A = torch.tensor(__import__("numpy").linalg.inv(root) @ scipy.linalg.sqrtm(root @ T @ root).real @ __import__("numpy").linalg.inv(root))
        z = z_t.mean(0) + (z - z_t.mean(0)) @ A
    expected = (0.7 * z_t + 0.3 * z) * scale + mean
    got, report = cross(models, tmp_path, "--align", method, "--lam", 0.3)
    # float32 codec: 1e-6 of the largest weight; inverting the covariance of 96 points in 64 dimensions costs three digits
    torch.testing.assert_close(got[NAME].double().reshape(-1, 64), expected, rtol=0, atol=(1e-3 if method == "gaussian" else 1e-6) * expected.abs().max().item())


def test_sinkhorn_across_shapes_at_small_epsilon_is_an_assignment(models, tmp_path):
    """Equal shapes, source = the target with its chunks permuted: each slot must get its own chunk back."""
    source = load_file(models["a"])
    for name, t in source.items():
        if "layers" in name and t.ndim == 2:
            chunks = t.reshape(-1, 64)
            source[name] = chunks[torch.randperm(len(chunks), generator=torch.Generator().manual_seed(0))].reshape(t.shape).contiguous()
    save_file(source, tmp_path / "permuted.safetensors")
    got, report = merged(models, tmp_path, models["a"], tmp_path / "permuted.safetensors", "--align", "sinkhorn", "--epsilon", "0.01", "--lam", 1)
    assert_models_close({NAME: got[NAME]}, {NAME: load_file(models["a"])[NAME]}, rtol=1e-3)
    record = report["alignment"][0]
    assert record["iterations"] > 0 and 0 <= record["marginal_error"] < 1e-5 and report["kind"] == "same-shape"


def test_controls_hold_nothing_of_the_source(models, tmp_path):
    save_file(llama_tensors(11, hidden=96, layers=3, mlp=160, kv=48), tmp_path / "other.safetensors")
    z_t, scale, mean = standardised(models["a"], NAME)
    for kind in ("zero", "noise", "shuffled"):
        got, report = cross(models, tmp_path, "--control", kind, "--lam", 0.4)
        other, _ = merged(models, tmp_path, models["a"], tmp_path / "other.safetensors", "--control", kind, "--lam", 0.4)
        assert all(torch.equal(got[k], other[k]) for k in got) and report["control"] == kind
        z = (((got[NAME].double() - mean) / scale).reshape(-1, 64) - 0.6 * z_t) / 0.4
        if kind == "zero":
            torch.testing.assert_close(z, z_t.mean(0).expand_as(z), rtol=0, atol=1e-4)
        elif kind == "shuffled":                           # the target's own chunks, each once
            nearest = torch.cdist(z, z_t).argmin(1)
            assert sorted(nearest.tolist()) == list(range(len(z_t))) and torch.cdist(z, z_t).min(1).values.max() < 1e-3
        else:                                              # 96 x 64 numbers: five standard errors of a deviation of 1
            assert z.std().item() == pytest.approx(z_t.std().item(), abs=5 / (2 * z.numel()) ** 0.5)
        for source in "b", "half":                         # equal shapes: norms and embeddings stay the target's, too
            equal, _ = merged(models, tmp_path, models["a"], models[source], "--control", kind, "--lam", 0.4)
            assert all(torch.equal(equal[k], got[k]) for k in got)
        again, _ = cross(models, tmp_path, "--control", kind, "--lam", 0.4, "--seed", 1)
        assert torch.equal(again[NAME], got[NAME]) == (kind == "zero")


def test_residual_across_shapes_keeps_the_targets_share(models, tmp_path):
    """Only the target enters unaligned: W^ = (1 - lam) W_t + D(z) - (1 - lam) D(z_t)."""
    vae, lam = ["--vae", lossy_vae(models, tmp_path), "--max-nmse", 2, "--align", "gaussian"], 0.2
    with_, _ = merged(models, tmp_path, models["a"], models["big"], *vae, "--lam", lam, "--residual", vae=False)
    without, _ = merged(models, tmp_path, models["a"], models["big"], *vae, "--lam", lam, vae=False)
    trip, _ = merged(models, tmp_path, models["a"], "--roundtrip", *vae[:4], vae=False)
    w = load_file(models["a"])[NAME]
    torch.testing.assert_close(with_[NAME], without[NAME] + (1 - lam) * (w - trip[NAME]), rtol=0, atol=1e-6 * w.abs().max().item())


def test_two_vaes_of_different_latent_sizes(models, tmp_path):
    vaes = {}
    for name, flags in {"a": ["--chunk", "32", "--width", "64"], "big": ["--chunk", "64"]}.items():
        vaes[name] = tmp_path / f"{name}.safetensors"
        train.main([str(models[name]), "-o", str(vaes[name]), "--steps1", "0", "--steps2", "0", "--quiet", *flags])
    for method in ("gaussian", "sinkhorn"):
        got, report = cross(models, tmp_path, "--vae", vaes["a"], "--source-vae", vaes["big"], "--align", method)
        assert report["tensors"]["encoded"] == 14 and not torch.equal(got[NAME], load_file(models["a"])[NAME])


def test_roles_without_a_partner_are_copied_and_said(models, tmp_path, capsys):
    """Fused qkv against split projections, a mixture of experts, an unknown role."""
    target = load_file(models["a"])
    for i in range(2):
        p = f"model.layers.{i}."
        target[p + "mlp.experts.0.up_proj.weight"] = torch.randn(32, 64)
        target[p + "zebra.weight"] = torch.randn(64, 64)
        target[p + "self_attn.qkv_proj.weight"] = torch.cat([target.pop(p + f"self_attn.{k}_proj.weight") for k in "qkv"])
    save_file(target, tmp_path / "t.safetensors")
    got, report = merged(models, tmp_path, tmp_path / "t.safetensors", models["b"])
    out = capsys.readouterr().out
    assert report["kind"] == "cross-shape" and report["tensors"]["encoded"] == 8 and report["tensors"]["copied"] == len(target) - 8
    for word in ("'qkv'", "'zebra'", "'up.0'"):
        assert f"no source has a single partner for role {word}" in out
    assert torch.equal(got["model.layers.1.zebra.weight"], target["model.layers.1.zebra.weight"])


def test_nothing_in_common_is_an_error(models, tmp_path, capsys):
    save_file({"layers.0.zebra.weight": torch.randn(8, 8)}, tmp_path / "z.safetensors")
    assert run(models["a"], tmp_path / "z.safetensors", "--vae", models["vae"], "-o", tmp_path / "m.safetensors") == 1
    assert "z.safetensors" in capsys.readouterr().err
    assert run(models["a"], models["big"], "--space", "weight", "-o", tmp_path / "m.safetensors") == 1
    assert "--space weight" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--epsilon", "0.1"], ["--align", "sinkhorn", "--epsilon", "0"], ["--align", "sinkhorn", "--epsilon", "nan"],
                                   ["--source-vae", "v"], ["--align", "ot"], ["--control", "mean"], ["--space", "weight", "--align", "none"],
                                   ["--space", "weight", "--control", "zero"]])
def test_alignment_usage_errors(models, tmp_path, flags):
    with pytest.raises(SystemExit) as caught:
        run(models["a"], models["big"], "-o", tmp_path / "m.safetensors", *flags)
    assert caught.value.code == 2 and not list(tmp_path.iterdir())


def test_hopeless_epsilon_is_one_line(models, tmp_path, capsys):
    assert run(models["a"], models["big"], "--vae", models["vae"], "--align", "sinkhorn", "--epsilon", "1e-6", "-o", tmp_path / "m.safetensors") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "epsilon" in error and not list(tmp_path.iterdir())


# --- defects that were found once ------------------------------------------------------------------------

def test_a_deeper_source_of_the_same_width_is_cross_shape(models, tmp_path):
    """It once was averaged layer by layer from the bottom, and its upper layers vanished without a word."""
    save_file(llama_tensors(9, layers=4), tmp_path / "deep.safetensors")
    _, report = merged(models, tmp_path, models["a"], tmp_path / "deep.safetensors")
    assert report["kind"] == "cross-shape" and report["lambda"] == [0.1]
    assert {(r["layer"], r["source_layer"]) for r in report["alignment"]} == {(0, 0), (1, 3)}


def test_lambda_0_with_residual_is_the_target_across_shapes_too(models, tmp_path):
    got, report = cross(models, tmp_path, "--lam", 0, "--residual")
    assert all(torch.equal(got[k], t) for k, t in load_file(models["a"]).items()) and report["distance"]["to_target"] == 0


def test_the_gate_sees_the_end_of_a_large_tensor(models, tmp_path):
    """It once measured only the first 65,536 weights. The start of this tensor is easy at r = 4, its end is noise."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(1024, 256, generator=g)
    w[:512] = torch.randn(512, 256, generator=g)[:, :1] * torch.linspace(0.5, 1, 256)
    save_file({"layers.0.mlp.up_proj.weight": w}, tmp_path / "t.safetensors")
    train.main([str(tmp_path / "t.safetensors"), "-o", str(tmp_path / "v.safetensors"), "--ratio", "4", "--steps2", "0", "--quiet"])
    got, report = merged(models, tmp_path, tmp_path / "t.safetensors", "--roundtrip", "--vae", tmp_path / "v.safetensors", "--max-nmse", 1, vae=False)
    true = ((got["layers.0.mlp.up_proj.weight"] - w).double().square().mean() / w.double().var(correction=0)).item()
    assert report["roundtrip"]["nmse"] == pytest.approx(true, rel=1e-4) and true > 0.1


@pytest.mark.parametrize("flag", ["--report", "--save-vae"])
def test_no_output_destroys_an_input_or_another_output(models, tmp_path, flag, capsys):
    precious = tmp_path / "precious.safetensors"
    precious.write_bytes(models["a"].read_bytes())
    for other in (precious, tmp_path / "m.safetensors"):
        assert run(precious, models["b"], "-o", tmp_path / "m.safetensors", "--force", flag, other) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert precious.read_bytes() == models["a"].read_bytes() and os.listdir(tmp_path) == ["precious.safetensors"]


def test_an_output_that_is_no_regular_file_is_refused(models, tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    assert run(models["a"], models["b"], "--vae", models["vae"], "-o", tmp_path / "fifo", "--force") == 1
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode) and "regular file" in capsys.readouterr().err


def test_float8_is_merged_in_float32(models, tmp_path):
    target = {k: t.to(torch.float8_e4m3fn) for k, t in load_file(models["a"]).items()}
    save_file(target, tmp_path / "t.safetensors")
    got, _ = merged(models, tmp_path, tmp_path / "t.safetensors", models["b"], "--lam", 0)
    assert all(t.dtype == torch.float8_e4m3fn for t in got.values())


def test_an_input_that_changes_during_the_run_is_an_error(models, tmp_path, monkeypatch, capsys):
    source = tmp_path / "s.safetensors"
    source.write_bytes(models["b"].read_bytes())
    real = merge.merge_share
    def touched(*arguments):
        tallies = real(*arguments)
        os.utime(source, (1, 1))
        return tallies
    monkeypatch.setattr(merge, "merge_share", touched)
    assert run(models["a"], source, "--vae", models["vae"], "-o", tmp_path / "m.safetensors") == 1
    assert "changed" in capsys.readouterr().err and os.listdir(tmp_path) == ["s.safetensors"]


@pytest.mark.parametrize("method", ["none", "mean", "gaussian"])
def test_pieces_do_not_show_across_shapes(models, tmp_path, monkeypatch, method):
    whole, _ = cross(models, tmp_path, "--align", method, "--lam", 0.3)
    monkeypatch.setattr(lsmerge, "PIECE", 6144)
    cut, _ = cross(models, tmp_path, "--align", method, "--lam", 0.3)
    # Windows of the source begin elsewhere; with an exact codec only rounding may show, which a map of 96 points amplifies.
    assert_models_close(cut, whole, rtol=1e-3 if method == "gaussian" else 1e-5)


def test_a_tied_head_is_not_encoded_apart(models, tmp_path, capsys):
    tensors = load_file(models["a"])
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "t.safetensors")
    for pattern in ("lm_head", "weight", "embed"):
        assert run(tmp_path / "t.safetensors", models["b"], "--vae", models["vae"], "--select", pattern, "-o", tmp_path / "m.safetensors") == 1
        assert "tied" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["t.safetensors"]


def test_no_way_of_naming_an_input_lets_it_be_overwritten(models, tmp_path, capsys):
    """A folder of links, as the Hugging Face cache has it, and a VAE given as its folder."""
    (tmp_path / "blobs").mkdir(), (tmp_path / "snap").mkdir(), (tmp_path / "vae").mkdir()
    (tmp_path / "blobs/x").write_bytes(models["a"].read_bytes())
    (tmp_path / "snap/model.safetensors").symlink_to(tmp_path / "blobs/x")
    (tmp_path / "vae/vae.safetensors").write_bytes(models["vae"].read_bytes())
    for arguments in ([tmp_path / "snap", models["b"], "--vae", models["vae"], "-o", tmp_path / "snap"],
                      [models["a"], models["b"], "--vae", tmp_path / "vae", "-o", tmp_path / "vae/vae.safetensors"]):
        assert run(*arguments, "--force") == 1 and "input" in capsys.readouterr().err
    assert (tmp_path / "snap/model.safetensors").is_symlink()
    assert (tmp_path / "vae/vae.safetensors").read_bytes() == models["vae"].read_bytes()


def test_what_appears_in_the_result_folder_meanwhile_is_not_lost(models, tmp_path, monkeypatch, capsys):
    (tmp_path / "target").mkdir(), (tmp_path / "out").mkdir()
    (tmp_path / "target/model.safetensors").write_bytes(models["a"].read_bytes())
    (tmp_path / "out/model.safetensors").write_bytes(b"old")
    real = merge.merge_share
    def slowly(*arguments):
        (tmp_path / "out/eval_results.txt").write_text("mine")
        return real(*arguments)
    monkeypatch.setattr(merge, "merge_share", slowly)
    assert run(tmp_path / "target", models["b"], "--vae", models["vae"], "-o", tmp_path / "out", "--force") == 1
    assert "eval_results.txt" in capsys.readouterr().err and sorted(os.listdir(tmp_path)) == ["out", "target"]
    assert (tmp_path / "out/eval_results.txt").read_text() == "mine" and (tmp_path / "out/model.safetensors").read_bytes() == b"old"


def test_an_existing_report_needs_force(models, tmp_path, capsys):
    (tmp_path / "r.json").write_text("mine")
    assert run(models["a"], models["b"], "--vae", models["vae"], "-o", tmp_path / "m.safetensors", "--report", tmp_path / "r.json") == 1
    assert "--force" in capsys.readouterr().err and (tmp_path / "r.json").read_text() == "mine"


def test_two_sources_do_not_share_a_controls_noise(models, tmp_path):
    """lambda 1 on the one or the other source under the noise control: two draws."""
    save_file(llama_tensors(9), tmp_path / "c.safetensors")
    name, draws = "model.layers.0.mlp.gate_proj.weight", []
    for lam in ("1,0", "0,1"):
        got, _ = merged(models, tmp_path, models["a"], models["b"], tmp_path / "c.safetensors", "--control", "noise", "--lam", lam)
        draws.append(got[name].flatten())
    assert abs(torch.corrcoef(torch.stack(draws))[0, 1]) < 0.1
