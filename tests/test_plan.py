"""Models that look alike and are not, and what only one of them has: every such merge
is right, says so on stderr, or is refused. What is right is computed here, in float64.
"""
import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import chunking
import lsmerge
import merge
import train
from conftest import llama_tensors, relative, save, sharded

REFERENCE = merge.REFERENCE     # before the fixture `exact` puts another in its place
Q = "model.layers.0.self_attn.q_proj.weight"
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@pytest.fixture
def merged(tmp_path, capsys):
    """merged(target, source, ..., *flags) -> (exit code, result, stderr)."""
    def run(*inputs):
        argv = ["-o", str(tmp_path / "out.safetensors"), "--quiet", "--force"]
        for k, each in enumerate(inputs):
            if isinstance(each, dict):
                path = tmp_path / f"{k}.safetensors"
                save(path, {name: t.contiguous() for name, t in each.items()})
                each = path
            argv.append(str(each))
        capsys.readouterr()
        code = chunking.command(lambda: merge.main(argv))
        errors = capsys.readouterr().err
        out = tmp_path / "out.safetensors"
        result = None
        if code == 0:
            result = load_file(out)
        return code, result, errors
    return run


def is_average(result, *tensors):
    mean = sum(t.double() for t in tensors) / len(tensors)
    scale = mean.abs().max()
    return bool((result.double() - mean).abs().max() < 1e-5 * scale)


# --- Another order --------------------------------------------------------------------
def pairs_to_halves(tensor, heads):
    """Rows of q or k from the order of RoPE over neighbours (Meta) to that over halves
    (Hugging Face)."""
    rows, columns = tensor.shape
    by_pair = tensor.view(heads, rows // heads // 2, 2, columns)
    return by_pair.transpose(1, 2).reshape(rows, columns)


@pytest.mark.parametrize("hidden, heads", [(64, 4), (128, 4), (256, 8)])
def test_rows_in_the_order_of_another_library_are_told(merged, hidden, heads):
    a = llama_tensors(1, hidden=hidden)
    b = relative(a, 2, part=0.1)
    for name in b:
        if "q_proj" in name or "k_proj" in name:
            b[name] = pairs_to_halves(b[name], heads)
    _, _, errors = merged(a, b)
    assert "strangers in" in errors and "q (2)" in errors and "k (2)" in errors
    assert "v (" not in errors and "up (" not in errors


def test_a_wide_matrix_is_looked_at_all_over(merged):
    """2,816 weights would be a third of its first row."""
    name = "model.layers.0.self_attn.q_proj.weight"
    g = torch.Generator().manual_seed(0)
    w = torch.randn(64, 8192, generator=g)
    other = torch.cat([w[:1], w[1:].flip(0)])
    _, _, errors = merged({name: w}, {name: other})
    assert "strangers in q (1)" in errors
    other = w + 0.5 * torch.randn(64, 8192, generator=g)
    _, _, errors = merged({name: w}, {name: other})
    assert not errors


@pytest.mark.parametrize("gone", [29, 30, 31])
def test_a_layer_that_was_removed(merged, gone):
    """Layers before it are averaged; those behind it meet no wrong one."""
    a = llama_tensors(1, hidden=16, layers=32, mlp=24)
    moved = relative(a, 2)
    b = {}
    for name, tensor in moved.items():
        found = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if found and int(found[1]) == gone:
            continue
        if found and int(found[1]) > gone:
            name = f"model.layers.{int(found[1]) - 1}.{found[2]}"
        b[name] = tensor
    code, result, _ = merged(a, b)
    assert code == 0
    for layer in range(32):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        if layer < gone:
            assert is_average(result[name], a[name], b[name])
        else:
            assert torch.equal(result[name], a[name])


# --- What one of them lacks -----------------------------------------------------------
@pytest.mark.parametrize("rest, shape", [("self_attn.q_proj.bias", [64]),
                                         ("self_attn.q_norm.weight", [16]),
                                         ("mlp.extra_proj.weight", [64, 64])])
def test_what_only_the_source_has_in_a_layer_is_told(merged, rest, shape):
    a = llama_tensors(1)
    b = relative(a, 2) | {f"model.layers.{i}.{rest}": torch.ones(shape) for i in (0, 1)}
    _, _, errors = merged(a, b)
    assert "2 tensors of" in errors and "left out" in errors
    assert f"model.layers.0.{rest}" in errors


def test_a_whole_tower_or_layer_of_the_source_is_no_warning(merged):
    a = llama_tensors(1)
    b = relative(a, 2) | {"vision.layers.0.self_attn.q_proj.weight": torch.ones(8, 8),
                          "model.layers.2.eh_proj.weight": torch.ones(8, 8)}
    code, _, errors = merged(a, b)
    assert code == 0 and not errors


def test_half_a_model_that_is_left_out_is_told(merged):
    a = llama_tensors(1)
    b = relative(llama_tensors(1, layers=4), 2) | a
    code, result, errors = merged(a, b)
    assert code == 0 and "18 tensors" in errors and "left out (49% of" in errors
    assert is_average(result[Q], a[Q])


def test_few_that_met_are_told(merged):
    """Two stacks, and neither fits: only the head is averaged."""
    a = {HEAD: torch.randn(40, 16)}
    for stack in ("model.layers", "mtp.layers"):
        a |= {f"{stack}.{i}.mlp.up_proj.weight": torch.randn(16, 64) for i in (0, 1)}
    b = {HEAD: a[HEAD] + 0.01, "transformer.h.0.attn.c_attn.weight": torch.randn(8, 8)}
    code, _, errors = merged(a, b)
    assert code == 0 and "of the target's weights met no partner" in errors


def test_a_base_that_lacks_most_is_told(merged, tmp_path):
    a = llama_tensors(1, mlp=256)
    base = {name: t for name, t in a.items() if "mlp" not in name}
    path = save(tmp_path / "base.safetensors", base)
    _, _, errors = merged(a, relative(a, 2), "--operator", "task-arithmetic", "--base",
                          path, "--lam", "1")
    assert "of the target's weights met no partner" in errors


def test_another_tokenizer_of_the_same_size_is_told(merged):
    a = llama_tensors(1)
    b = relative(a, 2)
    b[EMBED] = b[EMBED].flip(0)
    _, _, errors = merged(a, b)
    assert "strangers in embed (1)" in errors


def test_strangers_without_layers_are_told(merged):
    a, b = ({f"fc{i}.weight": torch.randn(32, 32, generator=torch.Generator().manual_seed(
        10 * seed + i)) for i in (1, 2)} for seed in (1, 2))
    _, _, errors = merged(a, b)
    assert "strangers in" in errors


@pytest.mark.parametrize("flags", [["--align", "mean"], ["--align", "none"]])
def test_strangers_in_what_is_selected_are_told(merged, flags):
    _, _, errors = merged(llama_tensors(1), llama_tensors(2), "--select", "embed", *flags)
    assert "strangers in embed (1)" in errors


def test_frequencies_of_rope_are_the_targets(merged):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    a = llama_tensors(1) | {name: 1e4 ** -torch.linspace(0, 1, 8)}
    b = relative(llama_tensors(1), 2) | {name: 1e6 ** -torch.linspace(0, 1, 8)}
    code, result, _ = merged(a, b)
    assert code == 0 and torch.equal(result[name], a[name])


def test_a_head_without_a_place_is_told(merged):
    a = llama_tensors(1)
    _, _, errors = merged(a, relative(a, 2) | {HEAD: torch.ones(40, 64)})
    assert "left out" in errors and HEAD in errors


def test_a_task_vector_of_those_that_have_it(merged, tmp_path):
    """W_t + sum over the sources that have the tensor of lambda (W_i - W_base)."""
    base = llama_tensors(1)
    target = relative(base, 2)
    first = relative(base, 3)
    second = relative(base, 4)
    only = "model.layers.1.mlp.up_proj.weight"
    del second[only]
    path = save(tmp_path / "base.safetensors", base)
    code, result, _ = merged(target, first, second, "--operator", "task-arithmetic",
                             "--base", path, "--lam", "0.5,0.25", "--vae", "exact")
    assert code == 0
    want = target[only].double() + 0.5 * (first[only].double() - base[only].double())
    assert (result[only].double() - want).abs().max() < 1e-5
    want = (target[Q].double() + 0.5 * (first[Q].double() - base[Q].double())
            + 0.25 * (second[Q].double() - base[Q].double()))
    assert (result[Q].double() - want).abs().max() < 1e-5


# --- Nothing to merge -----------------------------------------------------------------
NOTHING = {
    "no name in common": ({"x.0.a.weight": torch.ones(8, 8)},
                          {"y.0.b.weight": torch.zeros(8, 8)}),
    "whole numbers": ({"x.0.a": torch.ones(8, 8, dtype=torch.int64)},) * 2,
    "empty tensors": ({"x.0.a.weight": torch.ones(0, 8)},) * 2}


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_to_merge_is_an_error(merged, case):
    code, _, errors = merged(*NOTHING[case])
    assert code == 1 and "nothing would be merged" in errors


@pytest.mark.parametrize("flags", [["--space", "weight"], ["--vae", "exact"]])
def test_a_selection_that_finds_nothing(merged, flags):
    a = llama_tensors(1)
    code, _, errors = merged(a, relative(a, 2), "--select", "nosuch", *flags)
    assert code == 1 and "nothing would be merged" in errors


def test_a_source_without_a_weight_is_met_by_nobody(merged):
    a = llama_tensors(1)
    b = relative(a, 2) | {Q: torch.ones(0, 64)}
    code, result, _ = merged(a, b)
    assert code == 0 and torch.equal(result[Q], a[Q])


ADAPTERS = [
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "model.layers.0.self_attn.q_proj.lora_B.default.weight",
    "lora_unet_down_blocks_0_attentions_0_to_q.lora_up.weight",
    "unet.down_blocks.0.attentions.0.to_q.lora.down.weight",
    "lycoris_layers_0_q_proj.hada_w1_a", "layers.0.q_proj.lokr_w1",
    "model.layers.0.self_attn.q_proj.base_layer.weight"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_factors_of_an_adapter_are_refused(merged, name):
    g = torch.Generator().manual_seed(0)
    files = [{name: torch.randn(8, 64, generator=g)} for _ in range(2)]
    code, _, errors = merged(*files)
    assert code == 1 and "adapter" in errors and "lora.py fold" in errors


def test_whole_numbers_for_an_expert_are_quantised(merged):
    name = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    a = llama_tensors(1) | {name: torch.ones(64, 64, dtype=torch.int8)}
    code, _, errors = merged(a, a)
    assert code == 1 and "quantised" in errors and name in errors


@pytest.mark.parametrize("scale", ["q_proj_s", "q_proj.s", "q_proj.weight.d"])
def test_whole_numbers_for_a_matrix_are_quantised(merged, scale):
    a = llama_tensors(1)
    a[Q] = torch.ones(64, 64, dtype=torch.int8)
    a[f"model.layers.0.self_attn.{scale}"] = torch.ones(64)
    code, _, errors = merged(a, a)
    assert code == 1 and "quantised" in errors


def test_masks_of_bytes_are_no_quantised_weights(merged):
    a = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8) for i in (0, 1)}
    a["h.0.attn.c_attn.weight"] = torch.randn(32, 96)
    code, _, _ = merged(a, relative({"h.0.attn.c_attn.weight":
                                     a["h.0.attn.c_attn.weight"]}, 2))
    assert code == 0


# --- Ties and masks -------------------------------------------------------------------
def test_equal_by_accident_is_not_tied(merged):
    """A model and its moving average are equal at the start. In a source they are
    not."""
    start = torch.randn(40, 64)
    a = llama_tensors(1) | {"net.table": start, "ema.table": start.clone()}
    b = relative(a, 2)
    code, result, _ = merged(a, b)
    assert code == 0
    for name in ("net.table", "ema.table"):
        assert is_average(result[name], a[name], b[name])


@pytest.mark.parametrize("has", [True, False])
def test_a_redundant_head_stays_tied(merged, has):
    a = llama_tensors(1)
    a[HEAD] = a[EMBED].clone()
    b = relative(a, 2)
    b[HEAD] = b[EMBED].clone()
    if not has:
        del b[HEAD]
    code, result, _ = merged(a, b)
    assert code == 0 and torch.equal(result[HEAD], result[EMBED])
    assert is_average(result[EMBED], a[EMBED], b[EMBED])


def test_a_head_of_the_sources_own_is_told(merged):
    a = llama_tensors(1)
    a[HEAD] = a[EMBED].clone()
    b = relative(a, 2)                      # moves both, each by itself
    code, result, errors = merged(a, b)
    assert code == 0 and torch.equal(result[HEAD], result[EMBED])
    assert HEAD in errors and "left out" in errors


def test_a_mask_of_minus_infinity_in_two_dtypes(merged):
    mask = torch.full((8, 8), float("-inf")).triu(1)
    a = llama_tensors(1) | {"model.mask": mask}
    b = relative(llama_tensors(1), 2) | {"model.mask": mask.bfloat16()}
    code, result, _ = merged(a, b)
    assert code == 0 and torch.equal(result["model.mask"], mask)


def test_a_mask_of_floats_in_a_layer_is_the_targets(merged):
    """Zeros and ones have no spread that a codec could keep."""
    mask = {"model.layers.0.attn.mask": torch.ones(32, 32).tril()}
    a = llama_tensors(1)
    code, result, _ = merged(a | mask, relative(a, 2) | mask, "--vae", REFERENCE)
    assert code == 0 and torch.equal(result["model.layers.0.attn.mask"], *mask.values())


# --- Numbers --------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [["--align", "gaussian"], ["--samples", "1"]])
def test_only_the_codecs_own_error_is_called_that(merged, flags):
    """What transport or noise add is not lost by the codec, and no flag that is advised
    would bring it back."""
    a = llama_tensors(1)
    _, _, errors = merged(a, relative(a, 2, part=1e-4), "--vae", REFERENCE, *flags)
    assert "exceeds" not in errors
    _, _, errors = merged(a, relative(a, 2, part=1e-5), "--vae", REFERENCE)
    assert "exceeds" in errors


def test_a_target_too_small_for_its_unit_is_refused_at_lambda_0(merged):
    """At lambda 0 the result is the target: an error of 1e-4 of the source is all of
    it. At lambda 0.5 it is nothing."""
    a = llama_tensors(1)
    b = relative(a, 2)
    a[Q] = 1e-5 * a[Q]
    code, _, errors = merged(a, b, "--lam", "0", "--vae", REFERENCE)
    assert code == 1 and "typical error" in errors and Q in errors
    code, result, _ = merged(a, b, "--lam", "0.5", "--vae", REFERENCE)
    mean = (a[Q].double() + b[Q].double()) / 2
    assert code == 0
    assert (result[Q].double() - mean).norm() < 2e-3 * mean.norm()
    code, result, _ = merged(a, b, "--lam", "0", "--vae", REFERENCE, "--residual")
    assert code == 0 and torch.equal(result[Q], a[Q])


# --- Folders --------------------------------------------------------------------------
def folder(path, tensors, config, name="model.safetensors"):
    path.mkdir()
    save_file(tensors, path / name, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("key, mine, theirs", [
    ("num_attention_heads", 4, 8), ("rope_theta", 1e4, 1e6), ("n_head", 2, 4),
    ("hidden_act", "silu", "gelu"), ("num_key_value_heads", 4, 2)])
def test_configs_that_contradict_each_other_are_told(merged, tmp_path, key, mine, theirs):
    a = llama_tensors(1)
    one = folder(tmp_path / "one", a, {"text_config": {key: mine}})
    two = folder(tmp_path / "two", relative(a, 2), {key: theirs})
    _, _, errors = merged(one, two)
    assert "config.json" in errors and key in errors
    if isinstance(mine, float):
        mine = int(mine)                        # 10000 is 10000.0
    same = folder(tmp_path / "same", relative(a, 2), {key: mine})
    _, _, errors = merged(one, same)
    assert not errors


def test_the_config_beside_a_file_counts_too(merged, tmp_path):
    a = llama_tensors(1)
    one = folder(tmp_path / "one", a, {"rotary_pct": 1.0, "text_config": None})
    two = folder(tmp_path / "two", relative(a, 2), {"rotary_pct": 0.5})
    _, _, errors = merged(one / "model.safetensors", two / "model.safetensors")
    assert "rotary_pct" in errors


def test_a_shard_without_its_index_is_no_model(tmp_path, capsys):
    one = folder(tmp_path / "one", llama_tensors(1), {}, "model-00001-of-00002.safetensors")
    argv = [str(one), "-o", str(tmp_path / "out")]
    assert chunking.command(lambda: merge.main(argv)) == 1
    assert "index is missing" in capsys.readouterr().err


@pytest.mark.parametrize("flag, name", [("--report", "config.json"), ("-o", "m.safetensors"),
                                        ("--report", "new.json")])
def test_no_file_is_written_into_a_model(tmp_path, capsys, flag, name):
    one = folder(tmp_path / "one", llama_tensors(1), {"a": 1})
    argv = [str(one), "--force", "-o", str(tmp_path / "out"), flag, str(one / name)]
    assert chunking.command(lambda: merge.main(argv)) == 1
    assert "lies in the folder" in capsys.readouterr().err
    assert sorted(os.listdir(one)) == ["config.json", "model.safetensors"]


def test_a_folder_of_diffusers_keeps_its_name(tmp_path, capsys):
    name = "diffusion_pytorch_model.safetensors"
    a = {"blocks.0.to_q.weight": torch.randn(64, 64)}
    one = folder(tmp_path / "one", a, {}, name)
    two = folder(tmp_path / "two", relative(a, 2), {}, name)
    merge.main([str(one), str(two), "-o", str(tmp_path / "out"), "--quiet"])
    assert (tmp_path / "out" / name).is_file()


def test_links_to_folders_and_pipes_are_named_and_stay(tmp_path, capsys):
    one = folder(tmp_path / "one", llama_tensors(1), {})
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", one / "assets")
    os.mkfifo(one / "pipe")
    merge.main([str(one), "-o", str(tmp_path / "out"), "--quiet"])
    said = capsys.readouterr().out
    assert "assets" in said and "pipe" in said
    assert not (tmp_path / "out/pipe").exists()


@pytest.mark.parametrize("name", ["out.bin", "out", "out.safetensors.bak"])
def test_the_result_of_a_file_is_a_safetensors_file(models, tmp_path, capsys, name):
    argv = [str(models["a"]), str(models["b"]), "-o", str(tmp_path / name)]
    assert chunking.command(lambda: merge.main(argv)) == 1
    assert ".safetensors" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


# --- Training, from Python, and from a launcher ---------------------------------------
def test_a_vae_does_not_hang_on_what_is_shown(models, tmp_path, capsys):
    files = []
    for flags in (["--quiet"], []):
        files.append(tmp_path / f"{len(flags)}.safetensors")
        argv = [str(models["a"]), "-o", str(files[-1]), "--steps1", "1", "--steps2", "1"]
        train.main(argv + flags)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_record_does_not_claim_a_stage_that_never_ran(models, tmp_path, capsys):
    path = tmp_path / "v.safetensors"
    argv = [str(models["a"]), "-o", str(path), "--init", str(models["vae"]), "--quiet"]
    train.main(argv + ["--steps2", "1"])
    record = json.loads(chunking.Checkpoint(path).metadata["lsmerge.training"])
    assert record["schedule"]["steps1"] == 0
    assert [stage["stage"] for stage in record["stages"]] == [2]


def test_a_piece_of_a_transport_is_whole_windows(models):
    """A chunk is decoded in the window in which it was encoded."""
    codec = lsmerge.Codec.load("exact")
    stats = [chunking.TensorStats(str(n), torch.float32, (n, 64), std=1.0)
             for n in (13824, 38400)]
    parents = [lsmerge.Parent(None, each, codec) for each in stats]
    transport = object.__new__(lsmerge.Transport)
    transport.target, transport.source = parents
    assert transport.per_piece % codec.T == 0
    assert transport.per_piece * 38400 / 13824 <= parents[0].per_piece + 64


def test_merge_state_dicts_with_a_base_and_with_a_wrong_flag():
    base = llama_tensors(1)
    a = relative(base, 2)
    b = relative(base, 3)
    result = merge.merge_state_dicts(a, b, base=base, operator="task-arithmetic",
                                     lam=0.5, vae="exact")
    want = a[Q].double() + 0.5 * (b[Q].double() - base[Q].double())
    assert (result[Q].double() - want).abs().max() < 1e-5
    with pytest.raises(ValueError):
        merge.merge_state_dicts(a, b, lam=2)
    for odd in (None, torch.zeros(2, dtype=torch.complex64), torch.eye(3).to_sparse(),
                torch.zeros(3, device="meta")):
        with pytest.raises(chunking.CheckpointError, match="no dense tensor"):
            merge.merge_state_dicts(a | {"odd": odd}, b)


@pytest.mark.parametrize("rank, size", [("0", "0"), ("3", "2"), ("-1", "2"), ("x", "2")])
def test_a_launchers_environment_that_means_nothing(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    assert train.rank_and_size() == (0, 1)


def test_a_pattern_that_python_reads_otherwise(models, capsys):
    with pytest.raises(SystemExit) as leaving:
        merge.main([str(models["a"]), "--select", "[[:alpha:]]"])
    assert leaving.value.code == 2
    assert "is no pattern" in capsys.readouterr().err


def test_an_argument_with_a_line_break_makes_one_line(capsys):
    with pytest.raises(SystemExit):
        merge.main(["a", "--operator", "one\ntwo"])
    assert capsys.readouterr().err.count("\n") == 1


def test_experts_that_have_changed_places_are_told(merged):
    """A quarter of them: the cosine of all is still 0.75."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    a = llama_tensors(1) | {name: torch.randn(8, 64, 96)}
    b = relative(a, 2, part=0.1)
    _, _, errors = merged(a, b)
    assert not errors
    b[name][[1, 5]] = b[name][[5, 1]]
    _, _, errors = merged(a, b)
    assert "strangers" in errors and "gate_up" in errors


@pytest.mark.parametrize("mine, theirs, key", [
    ({"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1e6}}, None),
    ({"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1e4}}, "rope_theta"),
    ({"rope_theta": 1e6}, {}, "rope_theta"),
    ({"rope_theta": 1e4, "rope_scaling": None}, {"n": 1}, None),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"n": 1}, "factor")])
def test_rope_is_read_wherever_it_is_said(merged, tmp_path, mine, theirs, key):
    """In one place by transformers 4, in another by 5; 10,000 where nobody says."""
    a = llama_tensors(1)
    one = folder(tmp_path / "one", a, mine)
    two = folder(tmp_path / "two", relative(a, 2), theirs)
    _, _, errors = merged(one, two)
    assert bool(errors) == bool(key)
    assert (key or "") in errors


def test_a_tied_head_of_the_source_is_not_lost(merged):
    """The target has none, as it computes with its embedding: so does the source."""
    a = llama_tensors(1)
    a.pop(HEAD, None)
    b = relative(a, 2)
    _, _, errors = merged(a, b | {HEAD: b[EMBED].clone()})
    assert not errors


def test_the_mask_of_an_older_library_is_the_targets(merged):
    """-1e4 in one version of transformers, -inf in another."""
    name = "h.0.attn.masked_bias"
    a = llama_tensors(1)
    code, result, _ = merged(a | {name: torch.tensor(-1e4)},
                             relative(a, 2) | {name: torch.tensor(-torch.inf)})
    assert code == 0 and result[name] == -1e4


def test_a_logit_scale_scales_no_bytes(merged):
    a = llama_tensors(1)
    more = {"logit_scale": torch.ones(()), "mask": torch.ones(8, 8, dtype=torch.uint8)}
    code, _, errors = merged(a | more, relative(a, 2) | more)
    assert code == 0, errors


def test_a_part_with_weights_of_its_own_is_told(tmp_path, capsys):
    """sentence-transformers: a dense layer in a folder of its own."""
    a = llama_tensors(1)
    one = folder(tmp_path / "one", a, {})
    save(one / "2_Dense" / "model.safetensors", {"linear.weight": torch.ones(4, 4)})
    two = folder(tmp_path / "two", relative(a, 2), {})
    code = chunking.command(lambda: merge.main(
        [str(one), str(two), "-o", str(tmp_path / "out"), "--quiet"]))
    assert code == 0 and "2_Dense" in capsys.readouterr().err
    assert (tmp_path / "out/2_Dense/model.safetensors").is_file()


def test_how_far_a_source_is_does_not_hang_on_the_others(merged, tmp_path):
    """The first source is the target itself, the second a stranger."""
    a = llama_tensors(1)
    b = llama_tensors(9)
    report = tmp_path / "r.json"
    _, _, errors = merged(a, dict(a), b, "--space", "weight", "--report", report)
    assert "source 2 is" in errors and "source 1 is" not in errors
    name = "model.layers.0.mlp.up_proj.weight"
    encoded = [n for n in a if "layers" in n and a[n].dim() > 1]
    apart = sum((a[n].double() - b[n].double()).square().sum() for n in encoded)
    norm = sum(a[n].double().square().sum() for n in encoded)
    found = json.loads(report.read_text())["distance"]["source_to_target"]
    assert name in encoded
    assert found == [0, pytest.approx((apart / norm).sqrt().item(), rel=1e-6)]


def test_a_head_stays_tied_to_an_embedding_that_nobody_changed(merged):
    """The source has trained its head alone."""
    a = llama_tensors(1)
    a[HEAD] = a[EMBED].clone()
    b = relative(a, 2)
    b[EMBED] = a[EMBED].clone()
    code, result, errors = merged(a, b)
    assert code == 0 and torch.equal(result[HEAD], result[EMBED])
    assert HEAD in errors and "left out" in errors
    b[HEAD] = b[EMBED].clone()
    code, result, errors = merged(a, b)
    assert code == 0 and torch.equal(result[HEAD], a[EMBED]) and not errors


def test_shards_of_the_model_itself_are_not_left_behind(tmp_path, capsys, monkeypatch):
    """Whether its path is relative or not."""
    a = llama_tensors(1)
    sharded(tmp_path / "one", a)
    sharded(tmp_path / "two", relative(a, 2))
    monkeypatch.chdir(tmp_path)
    for path in ("one", str(tmp_path / "one")):
        merge.main([path, "two", "--dry-run"])
        said = capsys.readouterr().out
        assert "not taken along: none" in said
        assert said.startswith("same-shape")


@pytest.mark.parametrize("flags", [{"output": "x"}, {"dry_run": True}])
def test_from_python_the_result_is_returned(flags):
    a = llama_tensors(1)
    with pytest.raises(ValueError, match="returned"):
        merge.merge_state_dicts(a, relative(a, 2), **flags)
