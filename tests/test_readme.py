"""README.md: its commands parse, its Python runs, its numbers are those of experiments/results."""
import json
import math
import re
import shlex
import statistics

import pytest
import torch

import chunking
import merge
import train
from conftest import ROOT, llama_tensors

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "experiments" / "results"


def block(name):
    return re.search(f"<!-- {name}: begin -->\n(.*?)<!-- {name}: end -->", README, re.S)[1]


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")][2:]


def lines(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def test_the_two_commands_stand_there_and_ci_runs_them():
    install = "pip install -r requirements.txt && python merge.py experiments/models/code.safetensors experiments/models/prose.safetensors"
    assert install in README and "    python -m pytest\n" in README
    run = (ROOT / ".ci" / "run").read_text()
    assert "pip install" in run and install.split("&& ")[1] in run and "python -m pytest" in run


def test_every_merge_and_train_command_parses():
    joined = README.replace("\\\n", " ")
    commands = [shlex.split(c, comments=True)[2:] for c in re.findall(r"^ {4}(?:.*&& )?(python merge\.py experiments.*)$", joined, re.M)]
    assert len(commands) >= 5
    for arguments in commands:
        merge.parse(arguments)


def test_every_named_function_exists():
    import align, lsmerge, vae
    modules = {"align": align, "chunking": chunking, "lsmerge": lsmerge, "merge": merge, "train": train, "vae": vae}
    named = re.findall(r"`(\w+)\.(\w+)(?:\.(\w+))?`", README)
    assert len(named) > 15
    for module, name, attribute in named:
        if module in modules and name != "py":
            assert hasattr(getattr(modules[module], name), attribute) if attribute else hasattr(modules[module], name), f"{module}.{name}"


def test_table_of_the_merge_is_the_recorded_result():
    recorded = {r["file"].removesuffix(".safetensors"): r["scores"] for r in lines("merge.jsonl")}
    table = rows(block("merge"))
    assert len(table) >= 6
    for name, *cells in table:
        scores = recorded[name.strip("`")]
        assert cells == [f"{scores[k]['mean']:.4f} +- {scores[k]['error']:.4f}" for k in ("code", "prose", "arithmetic", "accuracy")], name


def small(value): return f"{value:.1e}" if value < 1e-3 else f"{value:.3f}"


def plus_minus(d): return f"{d['mean']:+.3f} +- {d['se']:.3f}"


def test_table_of_the_codec_is_the_recorded_result():
    """Tables 7 and 8: seen and unseen weights; NMSE and the bits that each code costs."""
    records = {(r["checkpoint"], f"{r['ratio']:.4g}", r["method"]): r for table in "78" for r in lines(f"table{table}.jsonl")}
    found = rows(block("codec"))
    assert len(found) >= 24
    for ratio, white, name, *cells, effective in found:
        get = lambda method: records.get((name.strip("`"), ratio, method))
        vae, lost = get("VAE"), lambda method: plus_minus(get(method)["difference"]) if get(method) else ""
        nmse = lambda method: small(get(method)["nmse"]) if get(method) else ""
        assert cells == [nmse("VAE"), nmse("PCA"), lost("VAE"), lost("PCA"), lost("noise"), nmse("PCA, c = 1024"), lost("PCA, c = 1024")], (name, ratio)
        assert white == f"{max(0, 1 - 1 / vae['ratio']):.3f}" and effective == f"{vae['effective_ratio']:.2f}"


def test_table_of_the_ablation_is_the_recorded_result():
    records, found = lines("ablation.jsonl"), rows(block("ablation"))
    assert len(found) == len(records) >= 20
    for r, (group, variant, *cells) in zip(records, found):
        assert (group, variant) == (r["group"], r["variant"]) and len(r["runs"]) >= 3
        mean = lambda names, key: statistics.mean(run["checkpoints"][n][key] for run in r["runs"] for n in names)
        expected = [value for names in (("code", "prose"), ("arithmetic", "base-seed2"))
                    for value in (small(mean(names, "nmse")), f"{mean(names, 'difference'):+.3f}")]
        d = r["difference"]
        said = "" if d["se"] == 0 else " ties" if abs(d["mean"]) <= 2 * d["se"] else " beats" if d["mean"] < 0 else " loses"
        assert cells == [*expected, plus_minus(d) + said], (group, variant)


def test_table_of_the_real_model_is_the_recorded_result():
    records, found = lines("real.jsonl"), rows(block("real"))
    assert len(found) == len(records) >= 10
    for r, cells in zip(records, found):
        show = lambda value, form: "" if value is None else form(value)
        assert cells == [f"{r['ratio']:.4g}", f"{r['white_noise']:.3f}", r["method"], small(r["nmse"]), f"{r['loss']:.3f}", f"{r['loss'] / r['loss_before'] - 1:+.1%}",
                         show(r["effective_ratio"], lambda v: f"{v:.2f}"), show(r["unseen_nmse"], small)], cells
    kept = [r["ratio"] for r in records if r["method"] == "VAE" and abs(r["loss"] / r["loss_before"] - 1) <= 0.01]
    least = min((r for r in records if r["method"] == "VAE" and r["ratio"] > 1), key=lambda r: r["ratio"])
    first_screen = README[:README.index("## Results")]
    assert max(kept) == 1 and "**only r <= 1**" in first_screen
    assert f"rises by {least['loss'] / least['loss_before'] - 1:.0%}".replace("%", " %") in re.sub(r"\s+", " ", first_screen)


def test_table_across_shapes_is_the_recorded_result():
    """Difference to the base; seeds averaged, error = sqrt(SE_text^2 + SE_seeds^2)."""
    keys = "source", "align", "pairing", "lam", "control", "seed"
    records = {tuple(r[key] for key in keys): r for r in lines("figure4.jsonl")}.values()     # the last counts
    table = rows(block("cross"))
    assert len(table) >= 10
    for source, method, *cells in table:
        kind = {"noise through the same Sinkhorn": "carried"}.get(method, source if source in ("zero", "noise", "shuffled") else None)
        expected = []
        for lam in (0.02, 0.1, 0.5, 1.0):
            group = [r["difference"]["base"] for r in records if r["lam"] == lam and r["control"] == kind
                     and (kind in ("zero", "noise", "shuffled") or (r["source"] == source.strip("`") and r["pairing"] == "depth"))
                     and (kind is not None or r["align"] == method)]
            assert group, (source, method, lam)
            means = [d["mean"] for d in group]
            se = (statistics.mean(d["se_text"] for d in group) ** 2
                  + (statistics.variance(means) / len(means) if len(means) > 1 else 0)) ** 0.5
            expected.append(f"{statistics.mean(means):+.4f} +- {se:.4f}")
        assert cells == expected, (source, method)


@pytest.mark.parametrize("table", ["2", "3", "4", "6"])
def test_tables_of_experts_are_the_recorded_rows(table):
    records = {r["row"]: r for r in lines(f"table{table}.jsonl")}             # the last line of a row counts
    found = rows(block(f"table{table}"))
    assert len(found) >= 6
    for name, pooled, compared in found:
        record = records[name]
        assert pooled == f"{record['test']['pooled']:.4f}", name
        assert compared == "; ".join(f"{other} {d['mean']:+.4f} +- {d['se']:.4f} {d['verdict']}" for other, d in record["difference"].items()), name
        for d in record["difference"].values():                              # the verdict follows from the numbers beside it
            beyond = abs(d["mean"]) > 2 * d["se"] and abs(d["mean"]) >= 1e-4
            assert d["verdict"] == ("ties" if not beyond else "beats" if d["mean"] < 0 else "loses"), name


def test_table_of_the_search_is_the_recorded_result():
    records, found = lines("codec-search.jsonl"), rows(block("search"))
    assert len(found) == len({(r["setting"], *r["pair"]) for r in records}) >= 10
    for name, pair, nmse, *cells in found:
        expected = []
        for residual in (False, True):
            group = [r for r in records if (r["setting"], " + ".join(r["pair"]), r["residual"]) == (name, pair, residual)]
            assert len(group) == 3 or "random" not in name
            means = [r["difference"] for r in group]
            se = math.hypot(statistics.mean(r["se_text"] for r in group), statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0)
            expected += [f"{statistics.mean(r['to_average'] for r in group):.4f}", f"{statistics.mean(means):+.4f} +- {se:.4f}"]
        assert cells == expected and nmse == f"{group[0]['round_trip']:.1e}", name


def bench_rows():
    """The bench table as its records say it; of a part's records the newest of each kind count."""
    def newest(name, *keys):
        found = {}
        for r in lines(name):
            found.setdefault(tuple(r.get(key) for key in keys), []).append(r)
        return found
    peer = lines("bench-peer.jsonl")[-1]

    def spread(values, form=".2f"):
        middle, low, high = (format(value, form) for value in values)
        return f"{middle} [{low}, {high}]"
    for name, what in (("exact", "latent merge, exact codec"), ("weight", "`--space weight`")):
        yield [f"{what} over {peer['peer']}'s linear merge, 0.5 B bfloat16: time",
               f"{spread(peer['ratios'][name])}: {peer['seconds'][name][0]:.1f} s over "
               f"{peer['seconds']['mergekit'][0]:.1f} s"]
        yield [f"{what}: anonymous memory", f"{spread(peer['memory_ratios'][name])}: "
               f"{peer['peak_mib'][name][0]:.0f} MiB over {peer['peak_mib']['mergekit'][0]:.0f} MiB"]
    for (dtype, network), group in newest("bench-merge.jsonl", "dtype", "network").items():
        group = sorted(group[-3:], key=lambda r: r["ratio"])
        if "load" in group[0]:
            middle = {key: statistics.median(r[key] for r in group) for key in ("seconds", "least")}
            yield [f"126 M weights, {dtype}, {network} network: whole run over its arithmetic and bytes",
                   f"{spread([group[1]['ratio'], group[0]['ratio'], group[2]['ratio']])}: "
                   f"{middle['seconds']:.0f} s over {middle['least']:.1f} s"]
    for (size, network), group in newest("bench-memory.jsonl", "bytes", "network").items():
        if "bound_mib" in group[-1]:
            yield [f"{size / 1e9:.2f} GB per checkpoint, one tensor of 500 MB, {network} network: peak "
                   "anonymous memory", f"{group[-1]['peak_mib']:.0f} MiB"]
    keys = "dtype", "width", "device", "part", "network"
    for (dtype, width, *kind), group in newest("bench-codec.jsonl", *keys).items():
        if kind == ["cpu", "network", "full"]:
            r = group[-1]
            yield [f"codec, {dtype}, width {width}: fraction of the matrix-multiply rate",
                   f"{r['fraction']:.2f}: {r['weights_per_s'] / 1e6:.1f} M weights/s"]
    for (recipe,), group in newest("bench-training.jsonl", "recipe").items():
        if recipe in ("release", "curriculum", "warm"):
            seconds, final = sorted(r["seconds"] for r in group), sorted(r["final"] for r in group)
            reached = f"after {seconds[1]:.1f} s [{seconds[0]:.1f}, {seconds[-1]:.1f}]"
            if not all(r["reached"] for r in group):
                reached = (f"not within {max(r['budget'] for r in group)} steps, {seconds[1]:.0f} s: last "
                           f"NMSE {final[1]:.2f} [{final[0]:.2f}, {final[-1]:.2f}]")
            yield [f"time to NMSE 1e-2, {recipe}", reached]


def test_bench_is_the_recorded_result():
    assert rows(block("bench")) == list(bench_rows()) and len(rows(block("bench"))) >= 15


def test_the_python_example_merges_two_state_dicts():
    a, b = llama_tensors(1), llama_tensors(2)
    names = {"a": a, "b": b}
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], names)
    assert set(names["merged"]) == set(a)
    for name, got in names["merged"].items():
        encoded = "layers" in name and a[name].ndim == 2
        torch.testing.assert_close(got, (a[name] + b[name]) / 2 if encoded else a[name])
