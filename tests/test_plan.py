"""Models that look alike and are not, and what only one of them has: every such merge
is right, says so on stderr, or is refused. What is right is computed here, in float64.
(What is refused at once: test_refusals.py.)"""
import re

import pytest
import torch
from safetensors.torch import load_file

import chunking
import lsmerge
import merge
from conftest import A, B, generator, llama_tensors, relative, save, sharded

REFERENCE = merge.REFERENCE     # before the fixture `exact` puts another in its place
Q = "model.layers.0.self_attn.q_proj.weight"
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@pytest.fixture
def merged(desk):
    """merged(target, source, ..., *flags) -> (exit code, result, stderr)."""
    def run(*inputs):
        output = ["-o", desk / "out.safetensors", "--quiet", "--force"]
        code, _, errors = desk.run(*inputs, *output)
        result = None
        if code == 0:
            result = load_file(desk / "out.safetensors")
        return code, result, errors
    return run


def is_average(result, *tensors):
    mean = sum(t.double() for t in tensors) / len(tensors)
    scale = mean.abs().max()
    return bool((result.double() - mean).abs().max() < 1e-5 * scale)


# --- Strangers: told by role, before anything is merged and again at the end ----------
def rope_of_meta(hidden, heads):
    """A relative whose rows of q and k pair neighbours (Meta's order), not halves."""
    a = llama_tensors(1, hidden=hidden)
    b = relative(a, 2, part=0.1)
    for name, tensor in b.items():
        if "q_proj" in name or "k_proj" in name:
            rows, columns = tensor.shape
            by_pair = tensor.view(heads, rows // heads // 2, 2, columns)
            b[name] = by_pair.transpose(1, 2).reshape(rows, columns)
    return a, b


def other_neurons():
    b = relative(A, 2, part=0.01)
    for name, tensor in b.items():
        order = torch.randperm(96, generator=generator(int("layers.1" in name)))
        if "gate_proj" in name or "up_proj" in name:
            b[name] = tensor[order]
        elif "down_proj" in name:
            b[name] = tensor[:, order]
    return A, b


def experts(order):
    """Of eight experts a quarter may have changed places: the cosine of all is 0.75."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    a = A | {name: torch.randn(8, 64, 96, generator=generator())}
    b = relative(a, 2, part=0.1)
    b[name] = b[name][order]
    return a, b


FLAT = [{f"fc{i}.weight": torch.randn(32, 32, generator=generator(10 * seed + i))
         for i in (1, 2)} for seed in (1, 2)]
LONG = torch.randn(64, 8192, generator=generator())     # a row is thrice 2,816 weights
MOVED = torch.cat([LONG[:1], LONG[1:].flip(0)])
STRANGER = llama_tensors(77)
ALL = "down, embed, gate, k, o, q, up, v"
FLIPPED = B | {EMBED: B[EMBED].flip(0)}
STRANGERS = {           # (the two models, flags, the roles that are told)
    "experts in place": (experts(range(8)), "", ""),
    "experts that changed places": (experts([0, 5, 2, 3, 4, 1, 6, 7]), "", "gate_up"),
    "RoPE, 4 heads of 16": (rope_of_meta(64, 4), "", "k, q"),
    "RoPE, 4 heads of 32": (rope_of_meta(128, 4), "", "k, q"),
    "RoPE, 8 heads of 32": (rope_of_meta(256, 8), "", "k, q"),
    "neurons": (other_neurons(), "", "down, gate, up"),
    "only one row is new": (({Q: LONG}, {Q: LONG.clone().index_fill(
        0, torch.tensor([0]), 1.0)}), "", ""),
    "only the first row is in place": (({Q: LONG}, {Q: MOVED}), "", "q"),
    "another tokenizer": ((A, FLIPPED), "", "embed"),
    "no layers": (FLAT, "", "down, up"),
    "trained apart": ((A, STRANGER), "", ALL),
    "the other sign": ((A, {name: -w for name, w in A.items()}), "", ALL),
    "what is selected": ((A, STRANGER), "--select embed", "embed"),
    "what is aligned": ((A, STRANGER), "--align mean", ALL.replace("embed, ", "")),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_strangers_are_told(merged, case):
    """And nothing else but, of the result, how far away they are."""
    pair, flags, roles = STRANGERS[case]
    code, _, errors = merged(*pair, *flags.split())
    lines = [line for line in errors.splitlines() if "norm away" not in line]
    assert code == 0 and len(lines) == 2 * bool(roles), errors
    words = f"1.safetensors and the target are strangers in {roles}. {merge.HARM}; "
    assert all(re.match(r"warning: \S+/", line) and words in line for line in lines)


def test_another_shape_is_told(merged):
    """The embedding and five norms of either side have no partner of their shape."""
    code, _, errors = merged(A, llama_tensors(77, hidden=96))
    assert code == 0 and errors.count(f"like {EMBED} (6 in all)") == 4
    assert errors.count("warning: shapes differ. ") == 2 and errors.count("\n") == 6


def test_a_layer_that_was_removed(merged):
    """Layers before it are averaged; those behind it meet no wrong one."""
    gone = 29
    a = llama_tensors(1, hidden=16, layers=32, mlp=24)
    b = {}
    for name, tensor in relative(a, 2).items():
        found = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if found and int(found[1]) > gone:
            name = f"model.layers.{int(found[1]) - 1}.{found[2]}"
        if not found or int(found[1]) != gone:
            b[name] = tensor
    _, result, _ = merged(a, b)
    for layer in range(32):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        if layer < gone:
            assert is_average(result[name], a[name], b[name])
        else:
            assert torch.equal(result[name], a[name])


# --- What one of them lacks -----------------------------------------------------------
def in_both_layers(rest, *shape):
    return {f"model.layers.{i}.{rest}": torch.ones(shape) for i in (0, 1)}


DEEPER = {name: w for name, w in llama_tensors(1, layers=4).items() if name not in A}
EXTRA = {               # what the source has besides
    "biases": in_both_layers("self_attn.q_proj.bias", 64),
    "norms of heads": in_both_layers("self_attn.q_norm.weight", 16),
    "matrices": in_both_layers("mlp.extra.weight", 64, 64),
    "a head": {HEAD: torch.ones(40, 64)},
    "half a model": DEEPER,
    "a tower and a draft layer": {
        "vision.layers.0.self_attn.q_proj.weight": torch.ones(8, 8),
        "model.layers.2.eh_proj.weight": torch.ones(8, 8)},
    "a tensor without a weight": {"norm.weight": torch.ones(0)},
}


def share(some, of):
    lost, total = (sum(w.numel() for w in each.values()) for each in (some, of))
    return f"{lost / total:.1%}"


@pytest.mark.parametrize("case", EXTRA)
def test_what_the_target_has_no_place_for_is_told(merged, case):
    extra = EXTRA[case]
    code, result, errors = merged(A, B | extra)
    assert code == 0 and is_average(result[Q], A[Q], B[Q])
    line = (f"1.safetensors: {share(extra, B | extra)} of its weights, tensors like "
            f"{min(extra)} ({len(extra)} in all), are left out")
    told = 2 * (case != "a tensor without a weight")
    assert errors.count(line) == errors.count("\n") == told, errors


def test_a_target_most_of_which_met_nobody_is_told(merged, tmp_path):
    """Two stacks, of which neither fits; and a base that lacks the MLPs."""
    a = {HEAD: torch.randn(40, 16)}
    for stack in ("model.layers", "mtp.layers"):
        a |= {f"{stack}.{i}.mlp.up_proj.weight": torch.randn(16, 64) for i in (0, 1)}
    b = {HEAD: a[HEAD] + 0.01, "transformer.h.0.attn.c_attn.weight": torch.randn(8, 8)}
    code, _, errors = merged(a, b)
    up = "model.layers.0.mlp.up_proj.weight"
    line = f"/0.safetensors: 86.5% of its weights, tensors like {up} (4 in all), take "
    assert code == 0 and errors.count(line) == 2
    a = llama_tensors(1, mlp=256)
    mlps = {name: w for name, w in a.items() if "mlp" in name}
    base = {name: w for name, w in a.items() if name not in mlps}
    path = save(tmp_path / "base.safetensors", base)
    _, _, errors = merged(a, relative(a, 2), "--operator", "task-arithmetic", "--base",
                          path, "--lam", "1")
    assert f"/0.safetensors: {share(mlps, a)} of its weights, tensors like " in errors
    assert f"{min(mlps)} (6 in all), take nothing of {path}: " in errors


def test_what_stays_the_targets(merged):
    """RoPE's frequencies, an empty partner, a mask of -inf in two dtypes."""
    frequency = "model.layers.0.self_attn.rotary_emb.inv_freq"
    mask = torch.full((8, 8), float("-inf")).triu(1)
    own = {frequency: 1e4 ** -torch.linspace(0, 1, 8), "model.mask": mask}
    theirs = {frequency: 1e6 ** -torch.linspace(0, 1, 8), "model.mask": mask.bfloat16(),
              Q: torch.ones(0, 64)}
    code, result, _ = merged(A | own, B | theirs)
    assert code == 0
    for name, tensor in (own | {Q: A[Q]}).items():
        assert torch.equal(result[name], tensor), name


def test_a_target_too_small_for_its_unit_is_refused_at_lambda_0(merged):
    """Where the result is the target: 1e-4 of the source is all of it."""
    a = A | {Q: 1e-5 * A[Q]}
    code, _, errors = merged(a, B, "--lam", "0", "--vae", REFERENCE)
    assert code == 1 and "typical error" in errors and Q in errors
    code, result, _ = merged(a, B, "--lam", "0.5", "--vae", REFERENCE)
    mean = (a[Q].double() + B[Q].double()) / 2
    assert code == 0 and (result[Q].double() - mean).norm() < 2e-3 * mean.norm()


def test_a_piece_of_a_transport_is_whole_windows():
    codec = lsmerge.Codec.load("exact")
    stats = [chunking.TensorStats(str(n), torch.float32, (n, 64), std=1.0)
             for n in (13824, 38400)]
    parents = [lsmerge.Parent(None, each, codec) for each in stats]
    transport = object.__new__(lsmerge.Transport)
    transport.target, transport.source = parents
    assert transport.per_piece % codec.T == 0
    assert transport.per_piece * 38400 / 13824 <= parents[0].per_piece + 64


def test_a_tied_head_of_the_source_is_told(merged):
    """The target has none, as it computes with its embedding."""
    a = llama_tensors(1)
    a.pop(HEAD, None)
    b = relative(a, 2)
    _, result, errors = merged(a, b | {HEAD: b[EMBED].clone()})
    assert is_average(result[EMBED], a[EMBED], b[EMBED])
    assert HEAD in errors and "(1 in all), are left out" in errors


def test_the_mask_of_an_older_library_is_the_targets(merged):
    """-1e4 in one version of transformers, -inf in another."""
    name = "h.0.attn.masked_bias"
    inputs = [A | {name: torch.tensor(-1e4)}, B | {name: torch.tensor(-torch.inf)}]
    assert merged(*inputs)[1][name] == -1e4


def test_a_head_stays_tied_to_an_embedding_that_nobody_changed(merged):
    """A source's own head is left out, which is told; one that is tied, too, is not."""
    a = A | {HEAD: A[EMBED].clone()}
    b = relative(a, 2) | {EMBED: A[EMBED]}
    for head in (b[HEAD], A[EMBED].clone()):
        code, result, errors = merged(a, b | {HEAD: head})
        told = f"{HEAD} is left out" in errors
        assert code == 0 and told != torch.equal(head, A[EMBED])
        assert torch.equal(result[HEAD], A[EMBED])
        assert torch.equal(result[EMBED], A[EMBED])


@pytest.mark.parametrize("where", ["", "1/"])
def test_shards_of_the_model_itself_are_no_companions(desk, monkeypatch, where):
    """Also in a numbered folder; a checkpoint beside them stays behind as a whole."""
    one = sharded(desk / "one", A, where=where)
    state = desk / "one/checkpoint-500"
    save(state / "model.safetensors", {"w": torch.ones(2, 2)})
    save(state / "1_Pooling/x", {"w": torch.ones(2, 2)})
    monkeypatch.chdir(desk.folder)
    for path in ("one", one):
        code, said, errors = desk.run(path, B, "--dry-run")
        assert code == 0 and "goes along" not in errors
        assert "weights: README.md, config.json\nnot taken along: checkpoi" in said
        assert said.count("checkpoint-500") == 1


def test_a_longer_vocabulary_is_told(merged):
    """Added words: the embedding and the head stay the target's."""
    a = llama_tensors(1)
    b = relative(a, 2)
    b[EMBED] = torch.cat([b[EMBED], b[EMBED][:8]])
    code, result, errors = merged(a, b)
    assert code == 0 and errors.count(f"like {EMBED} (1 in all)") == 4
    assert torch.equal(result[EMBED], a[EMBED])
    assert is_average(result[Q], a[Q], b[Q])
    # Of three models two agree.
    c = relative(a, 3)
    code, result, errors = merged(a, b, c)
    assert code == 0 and errors.count(f"like {EMBED} (1 in all), are left out") == 2
    assert is_average(result[EMBED], a[EMBED], a[EMBED], c[EMBED])


def test_the_codecs_error_is_told_of_task_vectors_too(merged, tmp_path):
    close = relative(A, 2, part=1e-4)
    base = save(tmp_path / "base.safetensors", A)
    flags = ("--base", base, "--operator", "task-arithmetic", "--lam", "0.3")
    for more in (("--vae", REFERENCE), ("--vae", "exact", "--dtype", "bfloat16")):
        _, _, errors = merged(A, close, *flags, *more)
        assert "codec's error" in errors
    _, _, errors = merged(A, close, *flags, "--vae", "exact")
    assert not errors


def test_a_task_vector_below_the_targets_steps(merged, tmp_path):
    """1.003 is 1.0 in bfloat16; five times the difference is not."""
    norm = "model.norm.weight"
    a = {name: tensor.bfloat16() for name, tensor in A.items()}
    base = {name: tensor.float() for name, tensor in a.items()}
    base[norm] = torch.ones(64)
    a[norm] = torch.ones(64).bfloat16()
    source = base | {norm: torch.full((64,), 1.003)}
    path = save(tmp_path / "base.safetensors", base)
    code, result, _ = merged(a, source, "--base", path, "--operator", "task-arithmetic",
                             "--lam=5", "--space", "weight")
    assert code == 0
    assert torch.equal(result[norm], torch.full((64,), 1.015).bfloat16())


@pytest.mark.parametrize("names", [("online.weight", "ema.weight"),
                                   ("classifier1.weight", "classifier2.weight")])
def test_what_is_equal_by_accident_stays_the_targets(merged, names):
    """The source has only one of the two, or has trained both."""
    start = torch.randn(8, 64)
    a = llama_tensors(1) | {name: start.clone() for name in names}
    b = relative(a, 2)
    _, result, _ = merged(a, b)
    for name in names:
        assert is_average(result[name], a[name], b[name])
    del b[names[1]]
    _, result, _ = merged(a, b)
    assert torch.equal(result[names[1]], start)


def test_buffers_of_the_source_alone_are_not_lost(merged):
    a = {f"h.{i}.attn.c_attn.weight": torch.randn(64, 96) for i in (0, 1)}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in (0, 1)}
    _, _, errors = merged(a, relative(a, 2) | masks)
    assert not errors


def test_distances_that_no_number_can_hold(desk):
    tiny = {name: 1e-160 * w.double() for name, w in A.items()}
    _, report = desk.merged(tiny, A, "--space", "weight")
    assert report["distance"]["to_source"] == [None]


def test_a_name_cannot_break_a_line(merged):
    name = "odd\nname.weight"
    _, _, errors = merged(A | {name: torch.ones(30, 8)}, B | {name: torch.ones(38, 8)})
    assert errors and all(line.startswith("warning: ") for line in errors.splitlines())
