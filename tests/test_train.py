"""train.py: schedules at their corners, the stages keep to their parts of the network, seeds, refusals."""
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import chunking as ck
import merge
import train
from conftest import ROOT, llama_tensors
from lsmerge import Codec
from vae import VAE, VAEConfig

TINY = VAEConfig(chunk=16, tokens=8, width=32, blocks=1, heads=2)      # small for testing


def parents(path):
    file = ck.Checkpoint(path)
    return [(file, [ck.measure(file, e.name) for e in file.entries.values() if ck.is_selected(e)])]


def test_learning_rate_and_beta_at_their_corners():
    rates = [train.learning_rate(step, 100, 2.0, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0.0)          # half-way down the cosine
    assert max(rates) == pytest.approx(2.0) and all(a >= b for a, b in zip(rates[10:], rates[11:]))
    betas = [train.beta_at(step, 100, 0.5, 0.1) for step in range(100)]
    assert betas[0] == pytest.approx(0.025) and betas[19] == betas[99] == 0.5
    assert train.learning_rate(0, 1, 1.0, 0.1) == 1.0 and train.beta_at(0, 1, 1.0, 0.1) == 1.0


def test_windows_are_the_tensors_in_order(models):
    """Every weight of every selected tensor, once, standardised; against a plain reading of the file."""
    (file, slots), = parents(models["a"])
    windows = train.Windows([(file, slots)], TINY, 0.25, torch.Generator().manual_seed(0))
    total = windows.starts[-1]
    assert int(windows.held.sum()) == round(0.25 * total) == len(windows.validation) and all(windows.held[windows.validation])
    everything = range(len(windows.tensors))
    assert sorted(windows.some(total, everything, torch.Generator()) + windows.validation) == list(range(total))
    x, real, place = windows.read(range(total))
    assert place is None
    tensors = load_file(models["a"])
    expected = [((tensors[s.name].double() - tensors[s.name].double().mean()) / tensors[s.name].double().std(correction=0)).reshape(-1) for s in slots]
    torch.testing.assert_close(x[real], torch.cat(expected).float(), rtol=1e-5, atol=1e-6)
    assert x.shape[1:] == (8, 16)


def test_stage_1_leaves_the_neck_alone_and_stage_2_does_not(models):
    windows = train.Windows(parents(models["a"]), TINY, 0.1, torch.Generator().manual_seed(0))
    batch = x, real, _ = windows.read(windows.draw(4, torch.Generator().manual_seed(0)))
    vae = VAE(VAEConfig(**{**TINY.__dict__, "init": "random"}), torch.Generator().manual_seed(0))
    necks = [vae.neck_mu.weight, vae.neck_logvar.weight, vae.widen.weight]
    train.stage_loss(vae, None, 1, batch, 0.0, None)[0].backward()
    assert all(neck.grad is None for neck in necks) and vae.embed.weight.grad.abs().sum() > 0
    train.stage_loss(vae, None, 2, batch, 0.1, torch.Generator().manual_seed(0))[0].backward()
    assert all(neck.grad.abs().sum() > 0 for neck in necks)


def test_distillation_is_half_the_squared_distance_to_the_teacher(models):
    windows = train.Windows(parents(models["a"]), TINY, 0.1, torch.Generator().manual_seed(0))
    batch = x, real, _ = windows.read(windows.draw(4, torch.Generator().manual_seed(0)))
    vae, teacher = (VAE(VAEConfig(**{**TINY.__dict__, "init": "random"}), torch.Generator().manual_seed(s)) for s in (0, 1))
    alone, taught = (train.stage_loss(vae, t, 2, batch, 0.1, torch.Generator().manual_seed(0)).total for t in (None, teacher))
    posterior = vae.encode(x, real.any(-1))
    eps = torch.randn(posterior.mu_BTZ.shape, generator=torch.Generator().manual_seed(0))
    student = vae.decode(posterior.mu_BTZ + (posterior.logvar_BTZ / 2).exp() * eps, real.any(-1))
    output = teacher.decode_stream(teacher.encode_stream(x, real.any(-1)), real.any(-1))
    torch.testing.assert_close(taught - alone, ((student - output) ** 2 * real).sum() / real.sum() / 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize("schedule, taught", [(dict(distil=True), True), (dict(), False), (dict(distil=True, steps1=0), False)])
def test_the_teacher_is_a_trained_stage_1_where_one_is_wanted(models, schedule, taught, monkeypatch):
    """An untrained network would teach noise: without stage 1 there is no distillation, asked for or not."""
    seen, core = [], train.stage_loss
    monkeypatch.setattr(train, "stage_loss", lambda vae, teacher, stage, *rest: seen.append((stage, teacher is not None)) or core(vae, teacher, stage, *rest))
    config = VAEConfig(**{**TINY.__dict__, "init": "random"})
    train.train_vae(parents(models["a"]), config, train.Schedule(**dict(steps1=3, steps2=2, batch=2) | schedule), 0)
    assert {there for stage, there in seen if stage == 2} == {taught} and not any(there for stage, there in seen if stage == 1)


def test_curriculum_from_a_random_start_learns(models):
    """Stage 1 must beat predict-the-mean (NMSE 1) by far; r = 1 stage 2 must keep most of it with the KL on."""
    config = VAEConfig(chunk=16, tokens=8, width=32, blocks=1, heads=2, init="random")
    run = lambda seed: train.train_vae(parents(models["a"]), config, train.Schedule(steps1=150, steps2=50, lr=3e-3, batch=16), seed)
    vae, (first, second) = run(0)
    assert first["nmse"] < 0.3 and second["nmse"] < 0.3 and second["kl"] > 0 and 0 <= second["active"] <= 1
    again, _ = run(0)
    assert all(torch.equal(p, q) for p, q in zip(vae.parameters(), again.parameters()))
    other, _ = run(1)
    assert not torch.equal(vae.embed.weight, other.embed.weight)


def test_warm_start_is_never_left_worse(models):
    for ratio, bound in [(1.0, 1e-10), (2.0, 0.51)]:       # white noise at r = 2 loses half (the models are random)
        config = VAEConfig(chunk=16, tokens=8, width=32, blocks=1, heads=2, ratio=ratio)
        start, end = (train.train_vae(parents(models["a"]), config, train.Schedule(steps2=n), 0)[1][1] for n in (0, 40))
        assert start["nmse"] < bound and end["objective"] <= start["objective"]


def test_above_r_1_every_tensor_has_a_neck_and_it_beats_pca(tmp_path):
    """Tensors that differ in their covariance: below the error of the best linear code for all of them (by SVD), through
    the codec as merge.py uses it; a tensor of another place falls back to that code."""
    save_file({f"layers.{i}.mlp.up_proj.weight": torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) * torch.linspace(0.1, 2, 16).roll(5 * i)
               for i in range(3)}, tmp_path / "s.safetensors")
    (file, slots), = found = parents(tmp_path / "s.safetensors")
    chunks = [ck.scale(file.read(s.name), s).reshape(-1, 16) for s in slots]
    values = torch.linalg.svdvals(torch.cat(chunks) - torch.cat(chunks).mean(0)) ** 2
    pca = values[8:].sum().item() / sum(s.numel for s in slots)
    config = VAEConfig(**{**TINY.__dict__, "ratio": 2.0})
    error = {}
    for necks in ("tensor", "one"):
        vae, _ = train.train_vae(found, VAEConfig(**{**config.__dict__, "necks": necks}), train.Schedule(steps1=0, steps2=0, holdout=0), 0)
        codec = Codec(vae)
        decode = lambda slot, to: codec.decode(codec.encode(file.read(slot.name), to), to, slot.numel) - file.read(slot.name).double()
        error[necks] = sum((decode(s, s) / s.scale).square().sum().item() for s in slots) / sum(s.numel for s in slots)
        strange = replace(slots[0], place=ck.Place(9, "up"))
        error[necks, "elsewhere"] = (decode(slots[0], strange) / slots[0].scale).square().mean().item()
    assert error["one"] == pytest.approx(pca, rel=1e-3) and error["tensor"] < 0.6 * pca
    assert error["tensor", "elsewhere"] == pytest.approx(error["one", "elsewhere"], rel=1e-5)


def test_necks_that_held_out_windows_do_not_want_are_given_up(tmp_path, monkeypatch):
    """White noise, eight chunks per tensor: own directions fit it perfectly and nothing else. Tolerating nothing leaves the shared neck."""
    save_file({f"layers.{i}.mlp.up_proj.weight": torch.randn(16, 64, generator=torch.Generator().manual_seed(i)) for i in range(8)}, tmp_path / "s.safetensors")
    for tolerated, kept in ((9.0, True), (0.0, False)):
        monkeypatch.setattr(train, "TOLERATED", tolerated)
        vae, _ = train.train_vae(parents(tmp_path / "s.safetensors"), VAEConfig(**{**TINY.__dict__, "ratio": 2.0}), train.Schedule(steps1=0, steps2=0), 0)
        assert vae.own_mu.any() == vae.own_widen.any() == kept and len(vae.config.places) == 8


def test_a_source_goes_through_the_neck_of_the_target_s_place(tmp_path):
    """One layer meets the middle one of three. By SVD: the source's round trip is the error of *the target's* directions on it;
    the target's own stays what it is without a source."""
    layer = lambda i: torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) * torch.linspace(0.1, 2, 16).roll(5 * i)
    save_file({"layers.0.mlp.up_proj.weight": layer(0)}, tmp_path / "t.safetensors")
    save_file({f"layers.{i}.mlp.up_proj.weight": layer(i) for i in range(3)}, tmp_path / "s.safetensors")
    (file, slots), = found = parents(tmp_path / "s.safetensors")
    vae, _ = train.train_vae(found, VAEConfig(**{**TINY.__dict__, "ratio": 2.0}), train.Schedule(steps1=0, steps2=0, holdout=0), 0)
    ck.write_tensors(tmp_path / "v.safetensors", *vae.to_file({}))
    x = [ck.scale(file.read(s.name), s).reshape(-1, 16).double() for s in slots]
    mean, cov = torch.cat(x).mean(0), torch.cov(torch.cat(x).T, correction=0)
    directions = torch.linalg.eigh(((x[0] - mean).T @ (x[0] - mean) + 16 * cov) / (64 + 16)).eigenvectors[:, :8]        # those cut off
    met = ck.scale(file.read(slots[1].name), slots[0]).reshape(-1, 16).double()              # equal shapes share the target's statistics
    expected = [((part - mean) @ directions).square().sum().item() / part.numel() for part in (x[0], met)]
    assert expected[1] > 2 * expected[0]
    for source in ([], [tmp_path / "s.safetensors"]):
        merge.main([str(p) for p in (tmp_path / "t.safetensors", *source)] + ["--vae", str(tmp_path / "v.safetensors"), "--max-nmse", "9", "-o",
                   str(tmp_path / "o.safetensors"), "--force", "--quiet", "--report", str(tmp_path / "r.json")] + (["--align", "mean"] if source else ["--roundtrip"]))
        gates = [g["value"] for g in json.loads((tmp_path / "r.json").read_text())["gates"] if "round trip" in g["name"]]
        assert gates == [pytest.approx(e, rel=1e-3) for e in expected[:1 + len(source)]]


def test_a_non_finite_loss_stops_with_the_step(models):
    config = VAEConfig(chunk=16, tokens=8, width=32, blocks=1, heads=2, init="random")
    with pytest.raises(FloatingPointError, match=r"stage 1: .* at step \d+, the last good"):
        train.train_vae(parents(models["a"]), config, train.Schedule(steps1=200, lr=1e30), 0)


def test_command(models, tmp_path, capsys):
    run = lambda *flags: train.main([str(models["a"]), "-o", str(tmp_path / "v.safetensors"), "--quiet", "--steps2", "2", *flags])
    run("--log", str(tmp_path / "log.jsonl"), "--ratio", "2", "--chunk", "32")
    assert "NMSE" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {r["stage"] for r in records} == {1, 2} and all(math.isfinite(r["nmse"]) for r in records)
    first = (tmp_path / "v.safetensors").read_bytes()
    file = ck.Checkpoint(tmp_path / "v.safetensors")
    vae, record = VAE.from_file({n: file.read_tensor(n) for n in file.entries}, file.metadata)
    assert vae.config.true_ratio == 2 and vae.config.chunk == 32 and record["seed"] == 0
    with pytest.raises(ck.CheckpointError, match="--force"):
        run()
    run("--force", "--ratio", "2", "--chunk", "32")
    assert (tmp_path / "v.safetensors").read_bytes() == first


RANDOM = ["--init", "random", "--chunk", "16", "--tokens", "8", "--width", "32", "--blocks", "1", "--ratio", "2", "--lr", "1e-3",
          "--steps1", "12", "--steps2", "12", "--batch", "4"]


@pytest.mark.parametrize("stage, step", [(1, 1), (1, 12), (2, 0), (2, 7)])
def test_a_resumed_run_ends_with_the_same_bytes(models, tmp_path, monkeypatch, stage, step, capsys):
    """Interrupted at a check of either stage: the file is that of a run that was left alone, and the state is gone."""
    def run(name, *flags):
        return ck.command(lambda: train.main([str(models["a"]), "-o", str(tmp_path / name), "--quiet", *RANDOM, *flags]))
    assert run("whole") == 0
    real = train.check_held_out
    def stopped(run, at, step_of, best):
        if (at, step_of) == (stage, step):
            raise KeyboardInterrupt
        return real(run, at, step_of, best)
    monkeypatch.setattr(train, "check_held_out", stopped)
    assert run("cut") == 130 and not (tmp_path / "cut").exists() and (tmp_path / "cut.state").exists()
    monkeypatch.setattr(train, "check_held_out", real)
    assert run("cut") == 1 and "--force" in capsys.readouterr().err              # an unfinished run is not thrown away
    assert run("cut", "--resume", "--seed", "1") == 1 and "another run" in capsys.readouterr().err
    assert run("cut", "--resume") == 0
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes() and not (tmp_path / "cut.state").exists()


def test_the_teacher_comes_back_with_the_state(models, tmp_path, monkeypatch):
    """Distillation, interrupted in stage 2: same parameters as a run that was left alone."""
    config, schedule = VAEConfig(**{**TINY.__dict__, "init": "random", "ratio": 2.0}), train.Schedule(steps1=6, steps2=6, batch=2, distil=True, patience=99)
    run = lambda **more: train.train_vae(parents(models["a"]), config, schedule, 0, state=str(tmp_path / "state"), **more)[0]
    whole, real = run(), train.check_held_out
    def stopped(run, stage, step, best):
        if (stage, step) == (2, 3):
            raise KeyboardInterrupt
        return real(run, stage, step, best)
    monkeypatch.setattr(train, "check_held_out", stopped)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(train, "check_held_out", real)
    assert any(name.startswith("teacher.") for name in ck.Checkpoint(tmp_path / "state").entries)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), run(resume=True).parameters()))


def test_two_processes_train_as_one(models, tmp_path):
    """torchrun splits each batch: same losses, hence same weights, up to the order of sums. Tensors of 60 windows and 6."""
    command = lambda *start: [sys.executable, *start, ROOT / "train.py", models["a"], models["big"], "--quiet", "--seed", "3", *RANDOM]
    subprocess.run([*command(), "-o", tmp_path / "one"], check=True, capture_output=True)
    subprocess.run([*command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"), "-o", tmp_path / "two"], check=True, capture_output=True)
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    for name in one:
        # Absolute part: a thousandth of one step of Adam, which divides even a gradient of rounding noise by its own size.
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4 * one[name].abs().max().item() + 1e-6, msg=lambda m: f"{name}: {m}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_resume_without_a_state_is_one_line(models, tmp_path, capsys):
    assert ck.command(lambda: train.main([str(models["a"]), "-o", str(tmp_path / "v"), "--resume", "--quiet"])) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "v.state" in error and error.count("\n") == 1


def test_a_step_follows_its_schedule_and_clips(models):
    """One step of AdamW by hand on one parameter: the clipped gradient's sign times the warmed-up rate, less the decay."""
    config, schedule = VAEConfig(**{**TINY.__dict__, "init": "random"}), train.Schedule(steps1=100, lr=1e-3, batch=4, clip=1e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    vae = VAE(config, generator)
    windows = train.Windows(parents(models["a"]), config, 0.1, generator)
    run = train.Run(vae, windows, schedule, generator, "cpu", torch.enable_grad(), True, None)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    before = vae.embed.weight.detach().clone()
    train.train_step(run, 1, None, 4, 100, optimiser, None)
    norm = sum(p.grad.square().sum() for p in vae.parameters() if p.grad is not None).sqrt()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    rate, grad = 1e-3 * 5 / 10, vae.embed.weight.grad
    expected = before * (1 - rate * 0.1) - rate * grad / (grad.abs() + 1e-8)
    torch.testing.assert_close(vae.embed.weight.detach(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("flags", [["--ratio", "0"], ["--ratio", "nan"], ["--chunk", "0"], ["--heads", "3", "--width", "128"], ["--heads", "0"], ["--width", "32"], ["--batch", "0"],
                                   ["--steps1", "-1"], ["--holdout", "1"], ["--lr", "0"], ["--init", "zeros"], ["--select", "("]])
def test_usage_errors(models, tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main([str(models["a"]), "-o", str(tmp_path / "v.safetensors"), *flags])
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: ") and not list(tmp_path.iterdir())


def test_a_chunk_larger_than_a_tensor_is_padding_mostly(models, tmp_path):
    save_file({k: t for k, t in llama_tensors(5, hidden=8, layers=1, mlp=8).items()}, tmp_path / "s.safetensors")
    _, stages = train.train_vae(parents(tmp_path / "s.safetensors"), VAEConfig(chunk=100, tokens=4, width=128, blocks=1), train.Schedule(steps2=1), 0)
    assert stages[1]["nmse"] < 1e-10
