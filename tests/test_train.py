"""train.py: schedules at their corners, what each stage moves, seeds, Ctrl-C, going on, faults."""
import json
import math
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence

import chunking as ck
import train
from conftest import ROOT, llama_tensors
from lsmerge import Codec
from vae import VAE, VAEConfig

TINY = VAEConfig(chunk=16, tokens=8, width=32, blocks=1, heads=2)      # small for testing
RANDOM = replace(TINY, init="random")
FLAGS = ["--chunk", 16, "--tokens", 8, "--width", 32, "--blocks", 1, "--batch", 4]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def parent(path):
    file = ck.Checkpoint(path)
    names = [entry.name for entry in file.entries.values() if ck.is_selected(entry)]
    return file, [ck.measure(file, name) for name in names]


def fit(path, config=TINY, start=None, log=None, **schedule):
    """(vae, [stage records]) of a training on one file."""
    schedule = train.Schedule(**dict(batch=4) | schedule)
    log = [] if log is None else log
    return train.train_vae([parent(path)], config, schedule, log.append, start)


def run(*flags):
    return ck.command(lambda: train.main([*map(str, flags), "--quiet"]))


def load(path):
    file = ck.Checkpoint(path)
    return VAE.from_file({name: file.read_tensor(name) for name in file.entries}, file.metadata)


def equal(vae, other):
    return all(torch.equal(p, q) for p, q in zip(vae.parameters(), other.parameters()))


# --- Parts ----------------------------------------------------------------------------------------
def test_learning_rate_at_its_corners():
    rates = [train.learning_rate(step, 100, 2.0, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0)   # down the cosine
    assert max(rates) == pytest.approx(2.0) and rates[10:] == sorted(rates[10:], reverse=True)
    assert train.learning_rate(0, 1, 1.0, 0.1) == 1.0


def standardised(path, names):
    tensors = load_file(path)
    return [(w - w.mean()) / w.std(correction=0) for w in (tensors[n].double() for n in names)]


def test_windows_are_the_tensors_in_order(models):
    """Every weight of every selected tensor, once; against a plain reading of the file."""
    file, slots = parent(models["a"])
    windows = train.Windows([(file, slots)], TINY, train.Schedule())
    x_BTC, real_BTC = windows.read(range(windows.starts[-1]))
    expected = standardised(models["a"], [slot.name for slot in slots])
    expected = torch.cat([w.reshape(-1) for w in expected]).float()
    assert x_BTC.shape[1:] == (8, 16)
    torch.testing.assert_close(x_BTC[real_BTC], expected, rtol=1e-5, atol=1e-6)


def test_windows_are_held_out_by_place_so_in_all_parents_at_once(models):
    """What is not trained on at one position of one expert is not trained on in any other."""
    parents = [parent(models[name]) for name in "ab"]
    windows = train.Windows(parents, TINY, train.Schedule(holdout=0.2))
    total, half = windows.starts[-1], windows.starts[-1] // 2
    trained = np.zeros(total, bool)
    trained[windows.training] = True
    assert len(set(windows.training)) == len(windows.training)
    assert (trained[:half] == trained[half:]).all()
    # five standard errors of a share of 1/5 of so many draws
    assert abs(trained.mean() - 0.8) < 5 * (0.2 * 0.8 / half) ** 0.5
    everything = windows.read(range(total))[0]
    held, checked = everything[~trained], windows.validation[0]
    assert sorted(x.tolist() for x in held) == sorted(x.tolist() for x in checked)
    other = train.Windows(parents, TINY, train.Schedule(holdout=0.2, seed=1))
    assert set(other.training) != set(windows.training)
    whole = train.Windows(parents, TINY, train.Schedule(holdout=0.0))
    assert sorted(whole.training) == list(range(total)) and len(whole.validation[0]) > 0


@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_stage_1_goes_through_the_neck_where_it_has_room(models, ratio):
    """r <= 1: through the posterior's mean; r > 1: through the stream, the neck stays as it is."""
    config = replace(RANDOM, ratio=ratio)
    windows = train.Windows([parent(models["a"])], config, train.Schedule())
    (x, real), vae = windows.read(range(4)), VAE(config, generator())
    necks = [vae.neck_mu.weight, vae.widen.weight]
    loss, mse, kl = train.stage_loss(vae, 1, x, real, None)
    loss.backward()
    assert loss == mse / 2 and kl == 0 and vae.neck_logvar.weight.grad is None
    assert all((neck.grad is None) == (ratio > 1) for neck in necks)
    assert vae.embed.weight.grad.abs().sum() > 0
    h = vae.encode_stream(x, real.any(-1))
    if ratio == 1:
        h = vae.widen(vae.neck_mu(h - vae.widen.bias))
    expected = (vae.decode_stream(h, real.any(-1)) - x).square().mean()
    torch.testing.assert_close(mse, expected)
    train.stage_loss(vae, 2, x, real, generator())[0].backward()
    assert all(neck.grad.abs().sum() > 0 for neck in [*necks, vae.neck_logvar.weight])


def test_stage_2_is_eq_1_of_one_sample(models):
    """By hand: the sample, its mean square error, beta KL by torch.distributions."""
    windows = train.Windows([parent(models["a"])], TINY, train.Schedule())
    (x, real), vae = windows.read(range(4)), VAE(replace(RANDOM, beta=0.3), generator())
    mu, logvar = vae.encode(x, real.any(-1))
    q = Normal(mu, (logvar / 2).exp())
    z = q.loc + q.scale * torch.randn(mu.shape, generator=generator(5))
    kl = kl_divergence(q, Normal(0.0, 1.0)).mean()
    mse = (vae.decode(z, real.any(-1)) - x).square().mean()
    found = train.stage_loss(vae, 2, x, real, generator(5))
    for part, expected in zip(found, (mse / 2 + 0.3 * kl, mse, kl)):
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=0)


def test_a_step_follows_its_schedule_and_clips(models):
    """One step of AdamW by hand: the clipped gradient's sign times the rate, less the decay."""
    schedule = train.Schedule(batch=4, clip=1e-3)
    windows = train.Windows([parent(models["a"])], RANDOM, schedule)
    vae = VAE(RANDOM, generator())
    optimiser = torch.optim.AdamW(vae.parameters(), 5e-4, (0.9, 0.95), weight_decay=0.1)
    before = vae.embed.weight.detach().clone()
    picks = np.random.default_rng(0)
    train.train_step(vae, windows, schedule, 1, optimiser, picks, None)
    norm = sum(p.grad.square().sum() for p in vae.parameters() if p.grad is not None).sqrt()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    grad = vae.embed.weight.grad
    expected = before * (1 - 5e-4 * 0.1) - 5e-4 * grad / (grad.abs() + 1e-8)
    torch.testing.assert_close(vae.embed.weight.detach(), expected, rtol=1e-5, atol=1e-8)


# --- The curriculum -------------------------------------------------------------------------------
def test_from_a_random_start_it_learns_and_the_seed_decides(models):
    """Stage 1 must beat predict-the-mean (NMSE 1) by far; stage 2 must keep most of it, KL on."""
    log, options = [], dict(config=RANDOM, steps1=150, steps2=50, lr=3e-3, batch=16)
    vae, (first, second) = fit(models["a"], log=log, **options)
    assert first["nmse"] < 0.3 and second["nmse"] < 0.3
    assert second["kl"] > 0 and 0 <= second["active"] <= 1 and second["sigma"] > 0
    for stage in (first, second):           # the best state that was seen is the one that is kept
        seen = [r["objective"] for r in log if r["stage"] == stage["stage"]]
        assert stage["objective"] == min(seen) and stage["ended"] == "steps"
    again, _ = fit(models["a"], **options)
    other, _ = fit(models["a"], **options | dict(steps1=1, steps2=1), seed=1)
    assert equal(vae, again) and not torch.equal(vae.embed.weight, other.embed.weight)
    assert vae.ready and not vae.training


def test_a_warm_start_is_never_left_worse(models):
    """White noise at r = 2 loses half; at r = 1 nothing is left to learn, and no step is taken."""
    for ratio, bound in [(1.0, 1e-10), (2.0, 0.53)]:
        config = replace(TINY, ratio=ratio)
        start, end = (fit(models["a"], config, steps2=steps)[1] for steps in (0, 20))
        assert start[1]["nmse"] < bound and end[1]["objective"] <= start[1]["objective"]
    assert fit(models["a"])[1][0]["ended"] == "converged"


def test_what_gets_worse_is_undone(models):
    """A rate far too high: the best state is the start, and that is what comes back."""
    config, log = replace(TINY, ratio=2.0), []
    start, _ = fit(models["a"], config, steps1=0, steps2=0)
    end, stages = fit(models["a"], config, steps1=0, steps2=4, lr=0.05, log=log)
    assert log[-1]["objective"] > log[1]["objective"] and stages[1]["best_step"] == 0
    assert equal(start, end)


def test_above_r_1_it_starts_as_pca(models):
    """The round trip through the codec is the error of the best linear code, by SVD."""
    file, slots = parent(models["a"])
    vae, _ = fit(models["a"], replace(TINY, ratio=2.0), steps1=0, steps2=0, holdout=0.0)
    codec, apart, total = Codec(vae), 0.0, 0
    for slot in slots:
        flat_L = file.read(slot.name)
        lost = codec.decode(codec.encode(flat_L, slot), slot, slot.numel) - flat_L
        apart, total = apart + (lost / slot.scale).double().square().sum(), total + slot.numel
    chunks = [w.reshape(-1, 16) for w in standardised(models["a"], [slot.name for slot in slots])]
    values = torch.linalg.svdvals(torch.cat(chunks) - torch.cat(chunks).mean(0)) ** 2
    assert (apart / total).item() == pytest.approx((values[8:].sum() / total).item(), rel=1e-3)


def test_stage_2_refines_at_a_tenth_of_the_rate_where_nothing_was_cut_off(models):
    """At r > 1 it starts from the cut, and at stage 1's rate."""
    for ratio, share in ((1.0, 0.1), (2.0, 1.0)):
        config = replace(RANDOM, ratio=ratio)
        _, stages = fit(models["a"], config, lr=1e-3, steps1=1, steps2=1)
        assert [stage["lr"] for stage in stages] == pytest.approx([1e-3, 1e-3 * share])


def test_a_loss_that_is_not_finite_ends_the_training_with_the_remedy(models, tmp_path, capsys):
    with pytest.raises(ck.CheckpointError, match="loss; fix: lower --lr"):
        fit(models["a"], RANDOM, steps1=20, lr=1e30)
    flags = ["--init", "random", "--lr", 1e30, "--steps1", 20, *FLAGS]
    assert run(models["a"], "-o", tmp_path / "v", *flags) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_chunk_larger_than_a_tensor_is_padding_mostly(tmp_path):
    save_file(llama_tensors(5, hidden=8, layers=1, mlp=8), tmp_path / "s.safetensors")
    config = VAEConfig(chunk=100, tokens=4, width=128, blocks=1)
    assert fit(tmp_path / "s.safetensors", config, steps2=1)[1][1]["nmse"] < 1e-10


def test_several_files_share_one_vae(models, tmp_path, capsys):
    assert run(models["a"], models["big"], "-o", tmp_path / "v", "--steps1", 0, "--steps2", 0) == 0
    out = capsys.readouterr().out
    assert "a.safetensors: 14 tensors" in out and "big.safetensors: 21 tensors" in out


# --- The command ----------------------------------------------------------------------------------
def test_command(models, tmp_path, capsys):
    flags = [models["a"], "-o", tmp_path / "v", "--ratio", 2, "--chunk", 32, "--steps2", 2]
    assert run(*flags, "--log", tmp_path / "log.jsonl") == 0
    out = capsys.readouterr().out
    assert "stage 1: held-out nmse" in out and "stage 2: held-out nmse" in out and "r = 2" in out
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {r["stage"] for r in records} == {1, 2}
    assert all(math.isfinite(r["nmse"]) for r in records)
    first = (tmp_path / "v").read_bytes()
    vae, record = load(tmp_path / "v")
    assert vae.config.true_ratio == 2 and vae.config.chunk == 32
    assert record["schedule"]["seed"] == 0 and [s["stage"] for s in record["stages"]] == [1, 2]
    assert run(*flags) == 1 and "--force" in capsys.readouterr().err
    assert run(*flags, "--force") == 0 and (tmp_path / "v").read_bytes() == first
    assert run(models["a"], "-o", models["a"], "--force") == 1
    assert "input" in capsys.readouterr().err


def test_select_decides_what_is_learnt(models, tmp_path, capsys):
    assert run(models["a"], "-o", tmp_path / "v", "--select", "mlp", "--steps2", 0) == 0
    assert ": 6 tensors" in capsys.readouterr().out and load(tmp_path / "v")[1]["select"] == "mlp"
    assert run(models["a"], "-o", tmp_path / "w", "--select", "zebra") == 1
    assert "--select" in capsys.readouterr().err and not (tmp_path / "w").exists()


@pytest.mark.parametrize("stage, step", [(1, 1), (1, 9), (2, 0), (2, 7)])
def test_ctrl_c_keeps_the_best_state_so_far(models, tmp_path, monkeypatch, capsys, stage, step):
    """Exit code 130, and a VAE file that works: in stage 1 its neck is set first."""
    flags = ["--init", "random", "--lr", 1e-3, "--steps1", 12, "--steps2", 12, *FLAGS]
    real, count = train.train_step, {1: 0, 2: 0}

    def interrupted(vae, windows, schedule, where, *rest):
        if (where, count[where]) == (stage, step):
            signal.raise_signal(signal.SIGINT)
        count[where] += 1
        return real(vae, windows, schedule, where, *rest)

    monkeypatch.setattr(train, "train_step", interrupted)
    assert run(models["a"], "-o", tmp_path / "v", *flags, "--log", tmp_path / "log") == 130
    said = capsys.readouterr()
    assert "interrupted" in said.out and "wrote" in said.out and not said.err
    vae, record = load(tmp_path / "v")
    assert record["stages"][-1]["ended"] == "interrupted"
    assert [s["stage"] for s in record["stages"]] == [1, 2][:stage] and count[stage] == step
    file, slots = parent(models["a"])
    z_NZ = Codec(vae).encode(file.read(slots[0].name), slots[0])
    assert z_NZ.isfinite().all() and z_NZ.std() > 0.1
    # the state that is kept is the best that was seen
    seen = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    best = min(r["objective"] for r in seen if r["stage"] == stage)
    windows = train.Windows([parent(models["a"])], vae.config, train.Schedule(batch=4))
    assert train.validate(vae, windows, stage)["objective"] == pytest.approx(best, rel=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "v"]


def test_it_goes_on_from_a_file(models, tmp_path, capsys):
    """--init FILE: stage 2 only, from that state and its configuration, also on another model."""
    flags = ["--lr", 1e-3, "--steps1", 20, "--steps2", 10, "--batch", 4]
    first, again = tmp_path / "first", tmp_path / "again"
    assert run(models["a"], "-o", first, "--init", "random", *FLAGS, *flags) == 0
    assert run(models["b"], "-o", again, "--init", first, *flags, "--log", tmp_path / "log") == 0
    start, (vae, record) = load(first)[0], load(again)
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    windows = train.Windows([parent(models["b"])], start.config, train.Schedule(batch=4))
    assert {r["stage"] for r in log} == {2} and [s["stage"] for s in record["stages"]] == [2]
    assert log[0]["objective"] == pytest.approx(train.validate(start, windows, 2)["objective"])
    assert record["stages"][0]["objective"] < log[0]["objective"] and vae.config == start.config
    assert not equal(vae, start)
    capsys.readouterr()
    assert run(models["a"], "-o", first, "--init", first, "--force", *flags) == 1
    assert "input" in capsys.readouterr().err and equal(load(first)[0], start)
    assert run(models["a"], "-o", tmp_path / "x", "--init", models["b"]) == 1
    assert "VAE" in capsys.readouterr().err


def test_a_vae_given_by_its_folder_is_not_overwritten(models, tmp_path, capsys):
    path = tmp_path / "v.safetensors"
    path.write_bytes(models["vae"].read_bytes())
    assert run(models["a"], "-o", path, "--init", tmp_path, "--force", "--steps2", 0) == 1
    assert "input" in capsys.readouterr().err
    assert path.read_bytes() == models["vae"].read_bytes()


@pytest.mark.parametrize("flag, value", [("--ratio", 2), ("--chunk", 32), ("--beta", 0.5),
                                         ("--blocks", 1), ("--width", 256)])
def test_flags_of_the_network_do_not_go_with_a_file(models, tmp_path, flag, value):
    """The file brings its network; a flag that would change nothing is refused."""
    with pytest.raises(SystemExit) as caught:
        run(models["a"], "-o", tmp_path / "v", "--init", models["vae"], flag, value)
    assert caught.value.code == 2 and not list(tmp_path.iterdir())


def test_two_processes_train_as_one(models, tmp_path):
    """torchrun splits each batch: the same figures, up to the order of sums and, in stage 2, the
    draws. What either prints and writes, it writes once."""
    flags = ["--init", "random", "--lr", "1e-3", "--steps1", "12", "--steps2", "4", "--quiet"]
    flags = [*map(str, FLAGS), *flags, "--ratio", "2"]
    # "--": torchrun would take --log for an abbreviation of a flag of its own
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    logs = {}
    for name, start in {"one": [], "two": torchrun}.items():
        line = [sys.executable, *start, ROOT / "train.py", models["a"], *flags, "-o",
                tmp_path / name, "--log", tmp_path / f"{name}.jsonl"]
        if start:
            subprocess.run(line, check=True, capture_output=True)
        else:       # in this process: torch takes seconds to import
            assert run(*line[2:]) == 0
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        logs[name] = [json.loads(line) for line in lines]
    assert len(logs["one"]) == len(logs["two"]) == 13 + 5
    for one, two in zip(logs["one"], logs["two"]):
        for key in ("objective", "nmse"):
            # stage 2 has taken a few steps along gradients of other draws
            near = 1e-4 if one["stage"] == 1 or one["step"] == 0 else 0.05
            assert one[key] == pytest.approx(two[key], rel=near)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "one.jsonl", "two", "two.jsonl"]
    assert load(tmp_path / "two")[0].config == load(tmp_path / "one")[0].config


@pytest.mark.parametrize("flags", [
    ["--ratio", "0"], ["--ratio", "nan"], ["--chunk", "0"], ["--heads", "0"], ["--batch", "0"],
    ["--steps1", "-1"], ["--holdout", "1"], ["--lr", "-1"],
    ["--lr", "inf"], ["--select", "("], ["--seed", "-1"], ["--resume"], ["--distil"]])
def test_usage_errors(models, tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as caught:
        run(models["a"], "-o", tmp_path / "v.safetensors", *flags)
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_going_on_from_a_file_neither_starts_blank_nor_takes_a_tenth(models):
    """It once went on at the rate of a random start, far too high for a VAE that has learnt."""
    vae, _ = fit(models["a"], RANDOM, steps1=2, steps2=2)
    for given, rate in ((0.0, 1e-4), (3e-4, 3e-4)):
        _, stages = fit(models["a"], start=vae, lr=given, steps2=1)
        assert [stage["lr"] for stage in stages] == pytest.approx([rate])


def test_it_goes_on_from_the_exact_codec_too(models, tmp_path):
    """--init exact once ended in a traceback: a codec of no file has an empty tuple of files."""
    assert run(models["a"], "-o", tmp_path / "v", "--init", "exact", "--steps2", 1) == 0
    assert load(tmp_path / "v")[0].config == VAEConfig()


def test_the_log_is_not_the_output(models, tmp_path, capsys):
    """The log was written, and then replaced by the VAE."""
    flags = [models["a"], "-o", tmp_path / "v", "--log", tmp_path / "v", "--steps2", 0]
    assert run(*flags) == 1 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flags", [
    ["--width", 32], ["--chunk", 256, "--width", 128], ["--init", "random", "--width", 100, "--heads", 8]])
def test_a_width_that_cannot_be_is_refused_not_changed(models, tmp_path, flags, capsys):
    """--width 32 once trained a network of width 64, without a word."""
    with pytest.raises(SystemExit) as caught:
        run(models["a"], "-o", tmp_path / "v", *flags)
    assert caught.value.code == 2 and "width" in capsys.readouterr().err


def test_a_width_that_is_not_given_has_room_for_a_chunk():
    assert train.parse(["x", "--chunk", "250", "--heads", "4"])[1].width == 256
    assert train.parse(["x"])[1] == VAEConfig()


def test_a_width_below_the_chunk_is_kept_for_a_random_start():
    config = train.parse(["x", "--init", "random", "--width", "32"])[1]
    assert (config.width, config.chunk) == (32, 64)


def test_a_batch_has_a_window_for_each_process(models, tmp_path, monkeypatch, capsys):
    """Under torchrun a process without a window ended in a traceback."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train.parse(["x", "--batch", "3"])[2].batch == 3
    with pytest.raises(SystemExit) as caught:
        train.parse(["x", "--batch", "2"])
    assert caught.value.code == 2 and "process" in capsys.readouterr().err


def test_it_says_when_no_merge_will_take_the_codec(models, tmp_path, capsys):
    import merge
    assert train.MAX_NMSE == merge.MAX_NMSE
    for ratio, refused in ((1, False), (4, True)):
        path = tmp_path / f"v{ratio}"
        assert run(models["a"], "-o", path, "--ratio", ratio, "--steps1", 0, "--steps2", 0) == 0
        assert ("no merge will take it" in capsys.readouterr().out) == refused
        flags = [models["a"], models["b"], "-o", tmp_path / f"m{ratio}", "--vae", path, "--quiet"]
        assert ck.command(lambda: merge.main([*map(str, flags)])) == refused
