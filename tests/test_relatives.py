"""merge.py across shapes: hidden units matched by weights, through the command line."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import chunking as ck
import merge
import tiny_lm
from make_models import cut, gather, scramble
from real_sibling import layer_count, random_order

MODELS = tiny_lm.MODELS


def model(name):
    return MODELS / f"{name}.safetensors"


def run(*flags):
    return ck.command(lambda: merge.main([*map(str, flags), "--quiet"]))


def merged(tmp_path, *flags, vae="exact"):
    """(tensors, report) of a run that must succeed."""
    out, report = tmp_path / "m.safetensors", tmp_path / "r.json"
    assert run(*flags, "--vae", vae, "-o", out, "--report", report, "--force") == 0
    return load_file(out), json.loads(report.read_text())


def save(path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def wide(name):
    return {key: tensor.float() for key, tensor in load_file(model(name)).items()}


def nmse(ours, theirs):
    """The worst tensor's squared error, over its mean square."""
    return max(((ours[n].double() - theirs[n].double()).square().mean()
                / theirs[n].double().square().mean()).item() for n in theirs)


def permuted_groups(tensors, size, seed):
    """Stream, MLP units and whole groups of heads in random order."""
    units = len(tensors["model.layers.0.mlp.up_proj.weight"])
    return cut(tensors, *random_order(tensors, range(layer_count(tensors)), units, size, seed))


def grouped(seed):
    """A made-up Llama whose 6 heads of 16 rows share 3 keys and values."""
    g, tensors = torch.Generator().manual_seed(seed), {}
    shapes = {"self_attn.q": (96, 64), "self_attn.k": (48, 64), "self_attn.v": (48, 64),
              "self_attn.o": (64, 96), "mlp.gate": (120, 64), "mlp.up": (120, 64),
              "mlp.down": (64, 120)}
    for layer in range(3):
        for role, shape in shapes.items():
            tensors[f"model.layers.{layer}.{role}_proj.weight"] = torch.randn(shape, generator=g)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.rand(64, generator=g)
    tensors["model.embed_tokens.weight"] = torch.randn(300, 64, generator=g)
    return tensors | {"model.norm.weight": torch.rand(64, generator=g)}


# --- One model in two orders ----------------------------------------------------------------------
def test_a_permuted_copy_merges_with_its_original_to_itself(tmp_path):
    """Also through the reference VAE."""
    reference = MODELS / "vae.safetensors"
    for number, (start, vae) in enumerate([
            (wide("code"), "exact"), (wide("pruned"), reference), (grouped(1), "exact")]):
        own = save(tmp_path / f"own{number}.safetensors", start)
        size = tiny_lm.HEAD_DIM if number < 2 else 16
        other = save(tmp_path / f"other{number}.safetensors", permuted_groups(start, size, number))
        end, report = merged(tmp_path, own, other, "--align", "units", "--lam", 0.5, vae=vae)
        assert nmse(end, start) < 1e-6
        assert report["align"] == "units" and report["kind"] == "same-shape"
        kin, = report["kinship"]
        assert kin["related"] and kin["layers"] == [*range(len(kin["layers"]))]
        assert min(kin["similarity"]) > 0.999 and kin["null"] < 0.5


def test_strangers_of_one_shape_are_told(tmp_path, capsys):
    """Another seed, or another order of the same units; an expert of one base is no stranger."""
    permuted = save(tmp_path / "p.safetensors", scramble(load_file(model("code")), 3)[0])
    for source, said in ((model("base-seed2"), True), (permuted, True), (model("prose"), False)):
        assert run(model("code"), source, "--dry-run") == 0
        out = capsys.readouterr().out
        assert ("strangers" in out) == said == ("--align units" in out)


# --- Across shapes --------------------------------------------------------------------------------
def test_relatives_are_found_and_merged_in_the_targets_order(tmp_path, capsys):
    """A scrambled cut of a model, merged at lambda 1, is the source in the target's order: every
    number by construction; layers without a partner keep the target's."""
    g, start = torch.Generator().manual_seed(0), wide("base")
    stream, layers = torch.arange(128), [
        (layer, torch.arange(3), torch.arange(288)) for layer in (0, 2, 3)]
    cut = gather(start, stream, layers)
    target = {name: tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=g)
              for name, tensor in cut.items()}
    source = scramble(start, 5)[0]
    paths = [save(tmp_path / f"{n}.safetensors", t) for n, t in (("t", target), ("s", source))]
    end, report = merged(tmp_path, *paths, "--lam", 1)
    for name, tensor in end.items():
        expected = cut[name] if ".layers." in name and "norm" not in name else target[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)
    assert (report["kind"], report["align"]) == ("cross-shape", "units")
    assert report["kinship"][0]["layers"] == [0, 2, 3]
    back, report = merged(tmp_path, *paths[::-1], "--lam", 1)       # the source may be smaller, too
    assert report["kinship"][0]["layers"] == [0, None, 1, 2]
    assert torch.equal(back["model.layers.1.mlp.up_proj.weight"],
                       source["model.layers.1.mlp.up_proj.weight"])
    assert not torch.equal(back["model.layers.2.mlp.up_proj.weight"],
                           source["model.layers.2.mlp.up_proj.weight"])


def test_strangers_go_by_chunks_with_a_warning(tmp_path, capsys):
    _, report = merged(tmp_path, model("base"), model("large"))
    assert "no relative" in capsys.readouterr().out
    assert (report["align"], report["lambda"]) == ("gaussian", [0.1])
    kin, = report["kinship"]
    assert not kin["related"] and kin["layers"] == [None] * 4
    assert max(kin["similarity"]) < 1.5 * kin["null"]


def test_kinship_is_reported_across_shapes_whatever_the_alignment(tmp_path):
    for align in ("gaussian", "none"):
        _, report = merged(tmp_path, model("base"), model("grown"), "--align", align)
        assert report["align"] == align and report["kinship"][0]["related"]
        assert report["kinship"][0]["layers"] == [0, 1, 3, 4]
    assert merged(tmp_path, model("base"), model("code"))[1]["kinship"] is None


def test_of_several_sources_the_stranger_is_named(tmp_path, capsys):
    assert run(model("base"), model("grown"), model("large"), "--dry-run") == 0
    note, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert "large" in note and "grown" not in note


def test_the_dry_run_prints_kinship(capsys):
    assert run(model("base"), model("grown"), "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("kinship"))
    assert [line.split(":")[0].split() for line in lines[at + 1:at + 5]] == [
        ["0", "<-", "0"], ["1", "<-", "1"], ["2", "<-", "3"], ["3", "<-", "4"]]


def test_task_arithmetic_across_shapes(tmp_path):
    """A difference made up for known units arrives at these, times lambda; nothing else moves."""
    base = wide("base")
    expert = {name: tensor.clone() for name, tensor in base.items()}
    moved = "model.layers.2.mlp.up_proj.weight"
    expert[moved][7] += 0.25
    target = gather(base, torch.arange(128), [
        (layer, torch.arange(4), torch.arange(288)) for layer in (0, 2, 3)])
    order = scramble(base, 9)
    both = [order[0], gather(expert, *order[1])]
    paths = [save(tmp_path / f"{n}.safetensors", tensors)
             for n, tensors in zip("tbe", [target, *both])]
    end, report = merged(tmp_path, paths[0], paths[2], paths[2], "--base", paths[1],
                         "--operator", "task-arithmetic", "--lam=0.5,-2")
    change = {name: end[name] - target[name] for name in end}
    row = change.pop("model.layers.1.mlp.up_proj.weight")
    torch.testing.assert_close(row[7], torch.full((128,), -1.5 * 0.25), rtol=1e-4, atol=1e-5)
    row[7] = 0
    assert max(part.abs().max() for part in [row, *change.values()]) < 1e-5
    assert len(report["kinship"]) == 3 and report["align"] == "units"


def test_names_that_nobody_knows_go_by_chunks_with_a_note(tmp_path, capsys):
    paths = [save(tmp_path / f"{name}.safetensors",
                  {key.replace("_proj", "_x"): tensor for key, tensor in wide(name).items()})
             for name in ("base", "grown")]
    _, report = merged(tmp_path, *paths)
    assert "no matrix for down, k, o, q, up, v" in capsys.readouterr().out
    assert report["align"] == "gaussian" and report["kinship"] is None


def renamed(name, old, new):
    return {key.replace(old, new): tensor for key, tensor in wide(name).items()}


@pytest.mark.parametrize("flags, said", [
    (["grown", "base", "--base", "large"], ["base", "differs in shape", "large"]),
    (["pruned", "code", "--base", "base-seed2"], ["code", "no relative", "base-seed2"]),
    (["pruned", "code", "--base", "base", "--align=gaussian"], ["--base", "--align units"]),
    (["pruned", "base-seed2", "--base", "base-seed2"], ["pruned", "no relative"]),
    (["base", "no-embedding"], ["no-embedding", "embedding", "--align"]),
    (["base", "hybrid"], ["hybrid", "no matrix for o", "--align"]),
    (["base", "odd"], ["odd", "--align"]),
    (["base", "fused"], ["fused", "no matrix for q", "--align"])], ids=" ".join)
def test_what_cannot_be_matched_is_one_line(tmp_path, capsys, flags, said):
    save(tmp_path / "no-embedding.safetensors", renamed("grown", "embed_tokens", "other"))
    save(tmp_path / "fused.safetensors", renamed("grown", "q_proj", "qkv_proj"))
    save(tmp_path / "hybrid.safetensors", renamed("grown", "layers.2.self_attn.o_proj", "o.2"))
    odd = renamed("grown", "?", "?")        # one layer reads another stream than the embedding's
    for name in [name for name in odd if ".2." in name and "norm" not in name]:
        odd[name] = odd[name][:100, :100]
    save(tmp_path / "odd.safetensors", odd)
    paths = [tmp_path / f"{flag}.safetensors" for flag in flags]
    flags = [path if path.exists() else flag if flag[0] == "-" else model(flag)
             for flag, path in zip(flags, paths)]
    more = ["--operator", "task-arithmetic"] if "--base" in flags else ["--align", "units"]
    assert run(*flags, *more, "-o", tmp_path / "m.safetensors") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in said), error
    assert not (tmp_path / "m.safetensors").exists()
