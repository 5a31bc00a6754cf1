"""train.py: schedules, what each stage moves, seeds, Ctrl-C, going on, processes."""
import json
import random
import signal
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import chunking as ck
import train
from conftest import A, B, HALF, generator, two_processes
from lsmerge import Codec
from vae import VAE, VAEConfig

TINY = VAEConfig(chunk=16, tokens=8, width=32)              # small for testing
WARM = replace(TINY, init="pca")
R2 = replace(TINY, ratio=2.0)
FLAGS = ["--chunk", 16, "--tokens", 8, "--width", 32, "--batch", 4]


def parent(tensors):
    model = ck.StateDict(tensors)
    names = [entry.name for entry in model.entries.values() if ck.is_selected(entry)]
    return model, [ck.measure(model, name) for name in names]


def windows_of(config=TINY, tensors=A, **schedule):
    return train.Windows([parent(tensors)], config, train.Schedule(**schedule))


def fit(config=TINY, start=None, log=None, **schedule):
    """(vae, [stage records]) of a training on A."""
    schedule = train.Schedule(**dict(batch=4) | schedule)
    log = [] if log is None else log
    return train.train_vae([parent(A)], config, schedule, log.append, start)


def run(*flags):
    return ck.command(lambda: train.main([*map(str, flags), "--quiet"]))


def load(path):
    codec = Codec.load(path)
    return codec.vae, codec.record


def logged(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def equal(vae, other):
    return all(torch.equal(p, q) for p, q in zip(vae.parameters(), other.parameters()))


def started(config=TINY):
    return VAE(config).start(generator())


def close(found, expected, rtol, atol=0.0):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("steps", [1, 2, 9, 100])
def test_the_rate_rises_then_falls_along_a_cosine(monkeypatch, steps):
    """For any number of steps: up in the first tenth, half-way down the half of it."""
    rates = []

    def train_step(vae, windows, schedule, stage, optimiser, picks, noise):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
    monkeypatch.setattr(train, "train_step", train_step)
    fit(WARM, steps1=steps, steps2=0, lr=2.0)
    assert len(rates) == steps and max(rates) <= 2.0 and min(rates) >= 0
    top = rates.index(max(rates))
    assert top <= 0.1 * steps + 1 and rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if steps == 100:
        found = [rates[top], rates[(top + 100) // 2], rates[-1]]
        assert found == pytest.approx([2.0, 1.0, 0.0], abs=0.05)


def standardised(names):
    wide = (A[name].double() for name in names)
    return [(w - w.mean()) / w.std(correction=0) for w in wide]


def test_windows_are_the_tensors_in_order():
    windows = windows_of(replace(TINY, tokens=9), holdout=0.0)
    names = [each.name for each in parent(A)[1]]
    order = sorted(windows.training, key=lambda w: (names.index(w[1].name), w[2]))
    x_BTC, real_BTC = windows.read(order)
    rows = [w.reshape(-1) for w in standardised(names)]
    expected = torch.cat(rows).float()
    assert x_BTC.shape[1:] == (9, 16) and not x_BTC[~real_BTC].any()
    close(x_BTC[real_BTC], expected, 1e-5, 1e-6)


def test_windows_are_held_out_by_place_so_in_all_parents_at_once():
    parents = [parent(A), parent({f"net.{name}": w for name, w in B.items()})]
    windows = train.Windows(parents, TINY, train.Schedule(holdout=0.2))
    everything = train.Windows(parents, TINY, train.Schedule(holdout=0.0))
    places = {parents[0][0]: set(), parents[1][0]: set()}
    for file, stats, start, _ in windows.training:
        places[file].add((stats.name.removeprefix("net."), start))
    one, two = places.values()
    assert one == two and len(one) + len(two) == len(windows.training)
    share = len(windows.training) / len(everything.training)
    assert share == pytest.approx(0.8, abs=0.02)
    rest = [w for w in everything.training if w not in windows.training]
    held, checked = windows.read(rest)[0], windows.validation[0]
    assert sorted(x.tolist() for x in held) == sorted(x.tolist() for x in checked)
    again = train.Windows(parents, TINY, train.Schedule(holdout=0.2, seed=1))
    assert any(w not in windows.training for w in again.training)
    assert len(everything.validation[0]) > 0            # nothing is held out: the same


def read(config):
    """A VAE at its start, four windows, and what of them is real."""
    windows = windows_of(config)
    return started(config), *windows.read(windows.training[:4])


@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_stage_1_goes_through_the_bottleneck_where_it_has_room(ratio):
    """r <= 1: through the posterior's mean; r > 1: through the stream. No KL yet."""
    vae, x, real = read(replace(TINY, ratio=ratio))
    real_BT = real.any(-1)
    loss, mse, kl = train.stage_loss(vae, 1, x, real, None)
    loss.backward()
    assert loss == mse / 2 and kl == 0 and vae.to_logvar.weight.grad is None
    bottleneck = [vae.to_mu.weight, vae.up.weight]
    assert all((weight.grad is None) == (ratio > 1) for weight in bottleneck)
    h = vae.encode_stream(x, real_BT)
    if ratio == 1:
        h = vae.up(vae.to_mu(h - vae.mean)) + vae.mean
    close(mse, (vae.decode_stream(h, real_BT) - x).square().mean(), 1e-6)


def test_stage_2_is_eq_1_of_one_sample():
    vae, x, real = read(replace(R2, beta=0.3))
    mu, logvar = vae.encode(x, real.any(-1))
    q = Normal(mu, (logvar / 2).exp())
    z = q.loc + q.scale * torch.randn(mu.shape, generator=generator(5))
    kl = kl_divergence(q, Normal(0.0, 1.0)).mean()
    mse = (vae.decode(z, real.any(-1)) - x).square().mean()
    found = train.stage_loss(vae, 2, x, real, generator(5))
    for part, expected in zip(found, (mse / 2 + 0.15 * kl, mse, kl)):
        close(part, expected, 1e-4)


def test_a_step_is_adamws_of_a_clipped_gradient(monkeypatch):
    """By hand: the gradient's sign times the rate, less the decay."""
    monkeypatch.setattr(train, "CLIP", 1e-3)
    vae = started()
    optimiser = torch.optim.AdamW(vae.parameters(), 5e-4, (0.9, 0.95), weight_decay=0.1)
    before = vae.embed.weight.detach().clone()
    train.train_step(vae, windows_of(), train.Schedule(batch=4), 1,
                     optimiser, random.Random(0), None)
    grads = [p.grad for p in vae.parameters() if p.grad is not None]
    norm = sum(grad.square().sum() for grad in grads).sqrt()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    grad = vae.embed.weight.grad
    expected = before * (1 - 5e-4 * 0.1) - 5e-4 * grad / (grad.abs() + 1e-8)
    close(vae.embed.weight.detach(), expected, 1e-5, 1e-8)


def test_from_a_random_start_it_learns_and_the_seed_decides():
    """NMSE 1 is to predict the mean. Both stages keep the best state that was seen."""
    _, config, schedule = train.parse(["x"])
    assert config == VAEConfig(init="random") and min(schedule.steps1, schedule.steps2)
    log, options = [], dict(steps1=60, steps2=20, lr=8e-3, batch=12)
    vae, (first, second) = fit(log=log, **options)
    assert first["nmse"] < 0.3 and second["nmse"] < 0.3
    assert second["kl"] > 0 and 0 < second["sigma"] < 0.5 and first["kl"] == 0
    for stage, steps in ((first, 60), (second, 20)):
        seen = [r for r in log if r["stage"] == stage["stage"]]
        assert stage["objective"] == min(r["objective"] for r in seen)
        assert stage["ended"] == "all steps" and seen[-1]["step"] == steps
        assert seen[0]["step"] == 0 and not vae.training
    again, _ = fit(**options)
    other, _ = fit(**options | dict(steps1=1, steps2=1), seed=1)
    assert equal(vae, again) and not torch.equal(vae.embed.weight, other.embed.weight)


def test_a_warm_start_is_never_left_worse():
    config = replace(WARM, ratio=2.0)
    start, _ = fit(config, steps1=0, steps2=0)
    end, stages = fit(config, steps1=0, steps2=4, lr=0.1)
    assert stages[1]["best_step"] == 0 and equal(start, end)


def test_above_r_1_it_starts_as_pca():
    file, stats = parent(A)
    config = replace(WARM, ratio=2.0)
    codec = Codec(fit(config, steps1=0, steps2=0, holdout=0.0)[0])
    lost = 0.0
    for each in stats:
        flat_L = file.read(each.name)
        back_L = codec.decode(codec.encode(flat_L, each), each, each.numel)
        lost += ((back_L - flat_L) / each.scale).double().square().sum().item()
    x = standardised([each.name for each in stats])
    rows = torch.cat([w.reshape(-1, 16) for w in x])
    values = torch.linalg.svdvals(rows - rows.mean(0)) ** 2
    assert lost == pytest.approx(values[8:].sum().item(), rel=1e-3)


@pytest.mark.parametrize("config, lr, first, second", [
    (TINY, 1e-3, 1e-3, 1e-3 * train.STAGE2_RATE), (R2, 1e-3, 1e-3, 1e-3),
    (TINY, 0.0, 8e-3, 8e-3 * train.STAGE2_RATE),
    (WARM, 0.0, 1e-4, 1e-4 * train.STAGE2_RATE)])
def test_the_rates_of_the_stages(config, lr, first, second):
    """At r <= 1, and from a trained VAE, stage 2 refines, at a part of the rate."""
    vae, stages = fit(config, lr=lr, steps1=1, steps2=1)
    assert [stage["lr"] for stage in stages] == pytest.approx([first, second])
    _, stages = fit(start=vae, lr=lr, steps2=1)
    assert [stage["lr"] for stage in stages] == pytest.approx([second])


def test_command(models, tmp_path, capsys):
    flags = "--ratio 2 --chunk 32 --select mlp --steps1 4 --steps2 2 --batch 4".split()
    way = [models["a"], models["big"], "-o", tmp_path / "v", *flags]
    assert run(*way, "--log", tmp_path / "log.jsonl") == 0
    out = capsys.readouterr().out
    assert "stage 1: 4 steps" in out and "stage 2: 2 steps" in out and "r = 2" in out
    records = logged(tmp_path / "log.jsonl")
    assert [r["step"] for r in records] == [*range(5), *range(3)]
    first = (tmp_path / "v").read_bytes()
    vae, record = load(tmp_path / "v")
    assert vae.config.true_ratio == 2 and vae.config.chunk == 32
    assert record["trained_on"] == ["a.safetensors", "big.safetensors"]
    assert record["schedule"]["seed"] == 0 and record["select"] == "mlp"
    assert not record["schedule"].keys() & {"quiet", "device"}
    assert str(tmp_path).encode() not in first and b"seconds" not in first
    assert run(*way) == 1 and "--force" in capsys.readouterr().err
    assert run(*way, "--force") == 0 and (tmp_path / "v").read_bytes() == first


def test_it_goes_on_from_a_file(models, tmp_path):
    """--init FILE: stage 2 only, from that state and its network, on another model."""
    flags = ["--lr", 1e-3, "--steps2", 10, "--batch", 4]
    first = [*FLAGS, *flags, "--steps1", 20]
    assert run(models["a"], "-o", tmp_path / "first", *first) == 0
    more = ["--init", tmp_path / "first", *flags, "--log", tmp_path / "log"]
    assert run(models["half"], "-o", tmp_path / "again", *more) == 0
    start, _ = load(tmp_path / "first")
    vae, record = load(tmp_path / "again")
    assert vae.config == start.config and record["schedule"]["steps1"] == 0
    stage, = record["stages"]
    windows = windows_of(start.config, HALF)
    expected = train.validate(start, windows, 2)["objective"]
    assert logged(tmp_path / "log")[0]["objective"] == pytest.approx(expected)
    assert stage["stage"] == 2 and stage["objective"] < expected


@pytest.mark.parametrize("ratio, stage, step",
                         [(1, 1, 1), (2, 1, 9), (1, 2, 0), (2, 2, 7)])
def test_ctrl_c_keeps_the_best_state_so_far(models, tmp_path, monkeypatch, capsys,
                                            ratio, stage, step):
    """Exit code 130, and a VAE that works: in stage 1 its bottleneck is cut first."""
    real = train.train_step
    taken = []

    def train_step(vae, windows, schedule, where, *rest):
        if taken.count(stage) == step and where == stage:
            signal.raise_signal(signal.SIGINT)
        taken.append(where)
        return real(vae, windows, schedule, where, *rest)
    monkeypatch.setattr(train, "train_step", train_step)
    flags = ["--lr", 1e-3, "--steps1", 12, "--steps2", 12, "--ratio", ratio, *FLAGS]
    way = [models["a"], "-o", tmp_path / "v", *flags, "--log", tmp_path / "log"]
    assert run(*way) == 130 and "interrupted" in capsys.readouterr().out
    vae, record = load(tmp_path / "v")
    assert record["stages"][-1]["ended"] == "interrupted"
    assert [s["stage"] for s in record["stages"]] == [1, 2][:stage]
    file, stats = parent(A)
    z_NZ = Codec(vae).encode(file.read(stats[0].name), stats[0])
    assert z_NZ.isfinite().all() and z_NZ.std() > 0.1
    # the state that is kept is the best that was seen
    seen = [r["objective"] for r in logged(tmp_path / "log") if r["stage"] == stage]
    windows = windows_of(vae.config)
    kept = train.validate(vae, windows, stage)["objective"]
    assert kept == pytest.approx(min(seen), rel=1e-5)


@pytest.mark.parametrize("name", ["validate", "cut"])
def test_ctrl_c_between_the_stages_keeps_stage_1(monkeypatch, name):
    real = getattr(train, name)

    def once(vae, windows, what):
        if what == 2 or name == "cut":
            monkeypatch.setattr(train, name, real)
            raise KeyboardInterrupt
        return real(vae, windows, what)
    monkeypatch.setattr(train, name, once)
    log = []
    vae, (stage,) = fit(R2, lr=8e-3, steps1=60, steps2=9, log=log)
    assert stage["ended"] == "interrupted"
    windows = windows_of(R2)
    kept = train.validate(vae, windows, 1)["objective"]
    assert kept == pytest.approx(min(r["objective"] for r in log), rel=1e-5)
    assert train.validate(vae, windows, 2)["nmse"] < 0.9


@pytest.mark.parametrize("rank, size, expected", [
    ("", "", (0, 1)), ("1", "", (0, 1)), ("", "2", (0, 1)), ("x", "2", (0, 1)),
    ("3", "2", (0, 1)), ("-1", "2", (0, 1)), ("1", "2", (1, 2))])
def test_a_launchers_environment_is_whole_or_none(monkeypatch, rank, size, expected):
    for key, value in (("RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.delenv(key, raising=False)
        if value:
            monkeypatch.setenv(key, value)
    assert train.rank_and_size() == expected


def test_two_processes_train_as_one(models, tmp_path):
    """Up to the order of sums and stage 2's draws; what is said is said once."""
    flags = [models["a"], "--lr=1e-3", "--steps1=12", "--steps2=4", "--ratio=2", *FLAGS]
    assert run(*flags, "-o", tmp_path / "one", "--log", tmp_path / "one.jsonl") == 0
    flags += ["-o", tmp_path / "two", "--log", tmp_path / "two.jsonl"]
    codes, said, errors = two_processes(tmp_path / "said", *flags, main=train.main)
    assert codes == [0, 0], errors
    assert [text.count("wrote") for text in said] == [1, 0]
    ones, twos = logged(tmp_path / "one.jsonl"), logged(tmp_path / "two.jsonl")
    assert len(ones) == len(twos) == 13 + 5
    for one, two in zip(ones, twos):
        # stage 2 has taken a few steps along gradients of other draws
        near = 1e-4 if one["stage"] == 1 or one["step"] == 0 else 0.05
        for key in ("objective", "nmse"):
            assert one[key] == pytest.approx(two[key], rel=near)
    assert load(tmp_path / "two")[0].config == load(tmp_path / "one")[0].config


def test_a_batch_has_a_window_for_each_process(monkeypatch):
    monkeypatch.setattr(train, "gather", lambda value: [value])
    monkeypatch.setattr(train, "rank_and_size", lambda: (0, 3))
    with pytest.raises(ck.CheckpointError, match="processes"):
        fit(batch=2)
