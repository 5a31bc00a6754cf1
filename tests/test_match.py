"""experiments/tools/match.py: against brute force, planted orders, known relatives."""
import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import match
from chunking import Checkpoint, CheckpointError, StateDict
from conftest import ROOT, assert_equal

MODELS = ROOT / "experiments/models"
SIZE = 8        # rows of a head in the models made here: small for testing
EVERY = torch.arange(48)        # positions of their streams


# --- Models with a known order ------------------------------------------------------
def normal(generator, *shape):
    return torch.randn(*shape, generator=generator)


def made(seed, layers=3, stream=48, heads=6, groups=3, neurons=40, vocabulary=300,
         bias=False, gate=True):
    """A state dict with Llama's names, of Gaussian numbers. Heads share groups of keys
    and values. Norms, and biases if they are asked for, have numbers of their own."""
    g = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": normal(g, vocabulary, stream),
               "model.norm.weight": normal(g, stream),
               "lm_head.weight": normal(g, vocabulary, stream)}
    shapes = {"self_attn.q_proj": (heads * SIZE, stream),
              "self_attn.k_proj": (groups * SIZE, stream),
              "self_attn.v_proj": (groups * SIZE, stream),
              "self_attn.o_proj": (stream, heads * SIZE),
              "mlp.gate_proj": (neurons, stream), "mlp.up_proj": (neurons, stream),
              "mlp.down_proj": (stream, neurons)}
    if not gate:
        del shapes["mlp.gate_proj"]
    for layer in range(layers):
        for role, shape in shapes.items():
            tensors[f"model.layers.{layer}.{role}.weight"] = normal(g, *shape)
            if bias:
                tensors[f"model.layers.{layer}.{role}.bias"] = normal(g, shape[0])
        widths = {"input_layernorm": stream, "self_attn.q_norm": heads * SIZE,
                  "self_attn.k_norm": SIZE}
        for norm, width in widths.items():
            tensors[f"model.layers.{layer}.{norm}.weight"] = normal(g, width)
    return tensors


def rows_of(heads):
    return (heads[:, None] * SIZE + torch.arange(SIZE)).flatten()


def planted(tensors, seed, layers, stream=None, neurons=None, groups=None):
    """These layers of a model, each in a random order of its own, cut to so many
    positions, neurons and groups of heads.
    Returns (tensors, stream, [(layer, {axis: index}), ...])."""
    g = torch.Generator().manual_seed(seed)
    width = len(tensors["model.norm.weight"])
    stream = torch.randperm(width, generator=g)[:stream]
    new = {name: tensor[..., stream] for name, tensor in tensors.items()
           if ".layers." not in name}
    order = []
    for number, layer in enumerate(layers):
        part = {name.split(".", 3)[3]: tensor for name, tensor in tensors.items()
                if name.startswith(f"model.layers.{layer}.")}
        every = {name: len(part[f"{name}_proj.weight"])
                 for name in ("self_attn.q", "self_attn.k", "mlp.up")}
        group = torch.randperm(every["self_attn.k"] // SIZE, generator=g)[:groups]
        share = every["self_attn.q"] // every["self_attn.k"]
        heads = [i * share + torch.randperm(share, generator=g) for i in group.tolist()]
        index = {"heads": rows_of(torch.cat(heads)), "groups": rows_of(group),
                 "neurons": torch.randperm(every["mlp.up"], generator=g)[:neurons]}
        order.append((layer, index))
        of = {"q_proj": "heads", "q_norm": "heads", "k_proj": "groups",
              "v_proj": "groups", "gate_proj": "neurons", "up_proj": "neurons"}
        for rest, tensor in part.items():
            role = rest.split(".")[-2]
            if role != "k_norm":                    # the same for every head: not moved
                tensor = tensor[index.get(of.get(role), stream)]
            if tensor.dim() == 2:
                column = {"o_proj": index["heads"], "down_proj": index["neurons"]}
                tensor = tensor[:, column.get(role, stream)]
            new[f"model.layers.{number}.{rest}"] = tensor
    return {name: tensor.contiguous() for name, tensor in new.items()}, stream, order


def noisy(tensors, seed, share):
    """The same, with noise of this share of every tensor's spread."""
    g = torch.Generator().manual_seed(seed)
    return {name: tensor + share * tensor.std() * normal(g, *tensor.shape)
            for name, tensor in tensors.items()}


def matched(target, source):
    """(Kinship, units) of two state dicts."""
    pair = match.open_layers(StateDict(target, "target"), StateDict(source, "source"))
    kinship = match.find_kinship(*pair)
    return kinship, match.match_units(*pair, kinship)


@pytest.fixture
def files(tmp_path):
    """Write state dicts by name: files(a=tensors) -> {'a': path}."""
    def write(**models):
        paths = {}
        for name, tensors in models.items():
            paths[name] = tmp_path / f"{name}.safetensors"
            save_file(tensors, paths[name])
        return paths
    return write


def run(*argv):
    return match.main([str(argument) for argument in argv])


def brought(files, target, source):
    """The source as match.py writes it for the target."""
    paths = files(target=target, source=source)
    out = paths["target"].with_name("out.safetensors")
    assert not run(*paths.values(), "-o", out)
    return load_file(out)


def refused(*argv):
    """The message of a run that must fail."""
    with pytest.raises(CheckpointError) as error:
        run(*argv)
    return str(error.value)


# --- Assignment ---------------------------------------------------------------------
def best_injection(cosine, slack):
    """By brute force: the largest total over all injections; -1 counts as the slack."""
    J, I = cosine.shape
    totals = []
    for pick in itertools.product(*[[*range(I), -1]] * J):
        used = [i for i in pick if i >= 0]
        if len(used) == len(set(used)):
            total = sum(cosine[j, i].item() for j, i in enumerate(pick) if i >= 0)
            totals.append((total + pick.count(-1) * slack, pick))
    return max(totals)[1]


@pytest.mark.parametrize("J, I", [(1, 1), (3, 3), (2, 4), (4, 2), (4, 4)])
def test_assignment_is_the_best_of_all_injections(J, I):
    for seed in range(10):
        cosine = torch.rand(J, I, generator=torch.Generator().manual_seed(seed))
        for slack in (0.3, 0.6, 1.0):
            found = match.assign(cosine, slack)
            assert found.tolist() == list(best_injection(cosine, slack))


# --- What is compared, against torch's own cosine -----------------------------------
def best_cosine(fewer, more, shuffle=None):
    """The mean over the neurons of one layer of their best cosine in the other one."""
    cosine = 0
    for mine, theirs in zip(fewer.values(), more.values()):
        if shuffle:
            mine = torch.stack([row[torch.randperm(48, generator=shuffle)]
                                for row in mine])
        mine = torch.nn.functional.normalize(mine, dim=1)
        cosine = cosine + mine @ torch.nn.functional.normalize(theirs, dim=1).T / 3
    return cosine.amax(1).mean().item()


@pytest.mark.parametrize("neurons", [(32, 32), (32, 50), (50, 32)])
def test_similarity_and_null_of_strangers(neurons):
    """By brute force; the null is the same of rows whose columns are shuffled. Some
    large columns, as real models have them: strangers share these, the null does
    not."""
    sides = []
    for seed, number, layers in ((11, neurons[0], 2), (12, neurons[1], 3)):
        tensors = made(seed, layers=layers, neurons=number)
        for name, tensor in tensors.items():
            if "gate" in name or "up" in name:
                tensor[:, 7:19] += 2
            elif "down" in name:
                tensor[7:19] += 2
        sides.append(tensors)
    target, source = match.open_layers(*map(StateDict, sides))
    similarity_JI, null = match.compare_layers(target, source, (EVERY, EVERY))
    g = torch.Generator().manual_seed(5)
    nulls = []
    for j, i in itertools.product(range(2), range(3)):
        layers = [target.rows(j, "neurons", EVERY), source.rows(i, "neurons", EVERY)]
        if neurons[0] > neurons[1]:
            layers.reverse()
        # as many neurons as the sample: each is in it
        found = similarity_JI[j, i].item()
        assert found == pytest.approx(best_cosine(*layers), abs=1e-5)
        nulls += [best_cosine(*layers, g) for _ in range(5)]
    assert null == pytest.approx(sum(nulls) / len(nulls), rel=0.05)     # statistical
    assert similarity_JI.min() > 1.5 * null


@pytest.mark.parametrize("I, J", [(48, 48), (48, 42), (42, 48)])
def test_stream_is_found_beside_tokens_that_were_never_trained(I, J):
    """Those hold one large vector, which drifts: plain cosines hang on it."""
    g = torch.Generator().manual_seed(0)
    wide = normal(g, 300, 48)
    wide[100:] += 20 * normal(g, 48)
    order = torch.randperm(48, generator=g)
    source = wide[:, order][:, :I] + 0.3 * normal(g, 300, I)
    source[100:] += 12 * normal(g, I)
    place_of = {place: i for i, place in enumerate(order[:I].tolist())}
    found = match.match_stream(wide[:, :J], source)
    assert found.tolist() == [place_of.get(j, -1) for j in range(J)]


# --- Planted orders -----------------------------------------------------------------
@pytest.mark.parametrize("groups, more", [
    (6, {}), (3, {"bias": True}), (1, {"gate": False})])
def test_a_permuted_copy_comes_back_bit_for_bit(desk, groups, more):
    """Stream, neurons, heads and groups in another order; all tensors, biases and norms
    of heads among them. The types are the target's: bfloat16, from float32. A folder
    gets the target's companions."""
    target = {name: t.bfloat16() for name, t in made(3, groups=groups, **more).items()}
    source, _, _ = planted(target, 4, (0, 1, 2))
    source = {name: tensor.float() for name, tensor in source.items()}
    still = [name for name in target if source[name].bfloat16().equal(target[name])]
    assert len(still) < 0.2 * len(target)
    folder = desk.model(target, **{"1_Pooling/config.json": "[]"})
    assert not run(folder, desk.put(source, "source"), "-o", desk / "out")
    assert_equal(load_file(desk / "out/model.safetensors"), target)
    for companion in ("config.json", "1_Pooling/config.json"):
        copy = desk / "out" / companion
        assert copy.read_text() == (folder / companion).read_text()


def test_base_comes_back_bit_for_bit(files, monkeypatch):
    """A trained model, in all its 38 tensors."""
    monkeypatch.setitem(globals(), "SIZE", 32)
    base = load_file(MODELS / "base.safetensors")
    source, _, _ = planted(base, 7, (0, 1, 2, 3))
    assert not any(torch.equal(source[name], base[name]) for name in base)
    assert_equal(brought(files, base, source), base)


def test_a_cut_relative_is_found_exactly_both_ways():
    """Fewer layers, positions, neurons and groups, another order, a third of noise."""
    large = made(5, layers=5, stream=64, heads=8, groups=4, neurons=56)
    small, stream, order = planted(large, 6, (0, 3, 1), stream=48, neurons=40, groups=3)
    small = noisy(small, 7, 1 / 3)
    kinship, units = matched(small, large)
    assert kinship.related and list(kinship.layers.values()) == [0, 3, 1]
    assert torch.equal(kinship.stream_J, stream)
    for number, (_, index) in enumerate(order):
        for axis in index:
            assert torch.equal(units[number][axis], index[axis]), axis
    back, units = matched(large, small)
    assert back.related and back.layers == {0: 0, 1: 2, 2: None, 3: 1, 4: None}
    assert min(back.similarity[j] for j in (0, 1, 3)) > 0.9
    assert units.keys() == {0, 1, 3}
    for number, (layer, index) in enumerate(order):
        for axis, rows in index.items():
            expected = torch.full_like(units[layer][axis], -1)
            expected[rows] = torch.arange(len(rows))
            assert torch.equal(units[layer][axis], expected), axis


def test_layers_that_repeat_are_found():
    """A depth-upscaled relative, noisy and permuted; as target, and as source."""
    base = made(8, layers=4)
    stack = [0, 1, 2, 1, 2, 3]
    deep, _, _ = planted(base, 9, stack)
    deep = noisy(deep, 10, 0.3)
    kinship, _ = matched(deep, base)
    assert kinship.related and list(kinship.layers.values()) == stack
    back, _ = matched(base, deep)
    assert back.related and [stack[i] for i in back.layers.values()] == [0, 1, 2, 3]


def attention_of(tensors):
    """What match_heads takes of a model of one layer."""
    layers, _ = match.open_layers(StateDict(tensors), StateDict(tensors))
    return {axis: layers.rows(0, axis, EVERY) for axis in ("heads", "groups")}


def test_heads_stay_with_their_group():
    """What was a head of group 1 stands in group 0, with other keys and values."""
    target = made(31, layers=1)
    source = {name: tensor.clone() for name, tensor in target.items()}
    stranger = made(32, layers=1)
    order = rows_of(torch.tensor([0, 2, 1, 3, 4, 5]))
    q, o = (f"model.layers.0.self_attn.{role}_proj.weight" for role in "qo")
    source[q] = target[q][order]
    source[o] = target[o][:, order]
    alien = slice(2 * SIZE, 3 * SIZE)
    source[q][alien] = stranger[q][alien]
    source[o][:, alien] = stranger[o][:, alien]
    rows, _ = match.match_heads(attention_of(target), attention_of(source), SIZE,
                                match.SLACK)
    assert rows["groups"][::SIZE].tolist() == [0, 8, 16]
    assert rows["heads"][::SIZE].tolist() == [0, -1, -1, 24, 32, 40]


# --- What has no partner ------------------------------------------------------------
def test_what_the_source_lacks_is_the_targets(files):
    """Tensor by tensor against the planted order; with a vocabulary that the target
    extended, a mask of -inf, whole numbers, and a vision tower, even if its stream
    happens to be as wide, and its file says NaN."""
    large = made(5, layers=3, stream=64, heads=8, groups=4, neurons=56, bias=True)
    small, stream, order = planted(large, 6, (0, 2), stream=48, neurons=40, groups=3)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        small[name] = small[name][:250]
    large["model.layers.0.attention.masked_bias"] = torch.tensor(-torch.inf)
    large["model.steps"] = torch.tensor([1, 2, 3])
    mark = noisy(small, 7, 0.1)             # numbers that are told from the target's
    for tensors, number in ((large, math.nan), (mark, 7.0)):
        tensors["model.visual.blocks.0.attn.qkv.weight"] = torch.full((144, 64), number)
        tensors["model.visual.pos_embed.weight"] = torch.full((9, 64), number)
    expected = {name: tensor.clone() for name, tensor in large.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expected[name][:250, stream] = mark[name]
    for number, (layer, index) in enumerate(order):
        for role, (row, column) in match.AXES.items():
            part = "mlp" if "neurons" in (row, column) else "self_attn"
            known = {"stream": stream, **index}
            name = f"model.layers.{layer}.{part}.{role}_proj"
            theirs = f"model.layers.{number}.{part}.{role}_proj"
            expected[f"{name}.weight"][known[row][:, None], known[column]] = (
                mark[f"{theirs}.weight"])
            expected[f"{name}.bias"][known[row]] = mark[f"{theirs}.bias"]
        name = f"model.layers.{layer}.self_attn.k_norm.weight"      # of equal width
        expected[name] = mark[f"model.layers.{number}.self_attn.k_norm.weight"]
    assert_equal(brought(files, large, mark), expected)


def test_a_source_without_a_head_reads_words_by_its_embedding(files):
    target = made(3)
    target["lm_head.weight"] = target["model.embed_tokens.weight"].clone()
    source = noisy(planted(target, 4, (0, 1, 2))[0], 5, 0.1)
    del source["lm_head.weight"]
    result = brought(files, target, source)
    assert torch.equal(result["lm_head.weight"], result["model.embed_tokens.weight"])
    assert not torch.equal(result["lm_head.weight"], target["lm_head.weight"])


# --- Relatives and strangers --------------------------------------------------------
def test_no_wrong_verdict_among_the_committed_models():
    family = "base", "code", "prose", "arithmetic", "grown", "pruned"
    strangers = "base-seed2", "large"
    models = {name: Checkpoint(MODELS / f"{name}.safetensors")
              for name in family + strangers}
    for one, other in itertools.combinations(models, 2):
        target, source = match.open_layers(models[one], models[other])
        kinship = match.find_kinship(target, source)
        related = one in family and other in family
        assert kinship.related == related, (one, other)
        met = [i for i in kinship.layers.values() if i is not None]
        fewer = min(len(target.numbers), len(source.numbers))
        assert len(met) == related * fewer, (one, other)
        if not related:
            assert max(kinship.similarity) < 1.5 * kinship.null, (one, other)


@pytest.mark.parametrize("common, related", [(1, False), (2, True)])
def test_half_of_the_layers_make_a_relative(common, related):
    target = made(26, layers=4)
    source = made(27, layers=4)
    for name in target:
        if ".layers." not in name or int(name.split(".")[2]) < common:
            source[name] = target[name]
    kinship, _ = matched(target, source)
    assert kinship.related == related
    assert list(kinship.layers.values()) == [*range(common)] + [None] * (4 - common)


def test_strangers_are_refused_and_nothing_is_written(files):
    paths = files(target=made(1), source=made(2))
    here = paths["target"].parent
    way = [*paths.values(), "-o", here / "out.safetensors"]
    before = sorted(here.iterdir())
    found = refused(*way, "--report", here / "report.json")
    assert found.startswith(str(paths["source"])) and "no relative" in found
    assert sorted(here.iterdir()) == before
    # the paternity test: the report is what was asked for
    refused(*paths.values(), "--report", here / "report.json")
    kinship, = json.loads((here / "report.json").read_text())["kinship"]
    assert kinship["related"] is False and kinship["layers"] == [None] * 3
    assert max(kinship["similarity"]) < 1.5 * kinship["null"]
    # --force writes all the same, and replaces what is there
    for _ in range(2):
        assert not run(*way, "--force")
    result = load_file(here / "out.safetensors")
    assert torch.equal(result["model.norm.weight"], made(2)["model.norm.weight"])


# --- Several sources by one match ---------------------------------------------------
def test_one_match_serves_a_base_and_its_experts(files):
    """The expert stands in the base's order; its difference to the base is brought
    along, also in neurons that have changed beyond recognition."""
    target = made(3)
    base, _, _ = planted(target, 4, (0, 1, 2))
    expert = {name: tensor.clone() for name, tensor in base.items()}
    changed = [f"model.layers.1.mlp.{role}_proj.weight" for role in ("gate", "up")]
    for name in changed:
        expert[name][:10] = made(9)[name][:10]
    paths = files(target=target, base=base, expert=expert)
    out = paths["target"].with_name("out")
    report = out.with_name("report.json")
    assert not run(*paths.values(), "-o", out, "--report", report)
    assert_equal(load_file(out / "base.safetensors"), target)
    matched_expert = load_file(out / "expert.safetensors")
    for name in target:
        moved = (matched_expert[name] != target[name]).sum()
        assert moved == 10 * 48 * (name in changed), name
    for record in json.loads(report.read_text())["kinship"]:
        assert record["related"] and record["layers"] == [0, 1, 2]


@pytest.mark.parametrize("name", ["stranger", "again", "wider", "flatter"])
def test_a_further_source_in_another_order_is_refused(files, name):
    """By the first one's match it would come into disorder: a stranger, one that was
    permuted again, and those of other shapes."""
    target = made(3)
    base, _, _ = planted(target, 4, (0, 1, 2))
    further = {"stranger": made(5), "again": planted(base, 6, (0, 1, 2))[0],
               "wider": planted(target, 4, (0, 1, 2), neurons=30)[0],
               "flatter": planted(target, 4, (0, 1))[0]}
    paths = files(target=target, base=base, **{name: further[name]})
    out = paths["target"].with_name("out")
    found = refused(*paths.values(), "-o", out)
    assert found.startswith(str(paths[name])) and not out.exists()


# --- Files ----------------------------------------------------------------------------
def test_numbers_that_do_not_fit_the_targets_dtype_are_refused(files):
    target = made(3)
    source = {name: 1e5 * tensor for name, tensor in target.items()}
    half = {name: tensor.half() for name, tensor in target.items()}
    paths = files(target=half, source=source)
    out = paths["target"].with_name("out.safetensors")
    assert "float16" in refused(*paths.values(), "-o", out) and not out.exists()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("word", ["_proj.bias", "q_norm"])
def test_what_only_one_of_two_models_computes_with(files, word, turned):
    """In the source it is lost, in the target it stays."""
    target = made(3, bias=True)
    source = {name: tensor for name, tensor in target.items() if word not in name}
    if turned:
        target, source = source, target
    assert_equal(brought(files, target, planted(source, 4, (0, 1, 2))[0]), target)


def test_units_that_find_nobody_are_named(files, capsys):
    """The attention of one layer is a stranger's."""
    target = made(3)
    source = planted(target, 4, (0, 1, 2))[0]
    alien = made(9)
    for name in target:
        if "layers.1.self_attn" in name and "_proj" in name:
            source[name] = alien[name]
    assert_equal(brought(files, target, source), target)
    said = capsys.readouterr().out
    unfound = said.split("whose units found no partner: ")[1].split("\n")[0]
    assert unfound.count("(1)") == 5                        # q_norm as well


@pytest.mark.parametrize("size", [12, 20])
def test_heads_of_any_size_are_found(files, monkeypatch, size):
    """Not only of multiples of eight rows."""
    monkeypatch.setitem(globals(), "SIZE", size)
    target = made(3, stream=60)
    source, _, _ = planted(target, 4, (0, 1, 2))
    assert_equal(brought(files, target, source), target)
