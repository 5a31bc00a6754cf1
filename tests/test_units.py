"""Hidden units matched by weights: against brute force, known permutations, known relatives."""
import itertools

import make_models
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import align
import tiny_lm
from chunking import Matched, StateDict, place

MODELS = tiny_lm.MODELS
SIZE = 8  # rows of a head in the models made here: small for testing
EVERY = torch.arange(48), torch.arange(48)  # places of their streams, in order


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator)


def made(seed, layers=3, hidden=48, heads=6, groups=3, units=40, vocabulary=200, gate=True):
    """(embedding, layers) of Gaussian weights; groups of heads share keys and values."""
    g = torch.Generator().manual_seed(seed)
    rows = {"q": heads * SIZE, "k": groups * SIZE, "v": groups * SIZE, "up": units}
    rows |= {"gate": units} if gate else {}
    made = []
    for _ in range(layers):
        layer = {role: normal(g, n, hidden) for role, n in rows.items()}
        layer |= {"o": normal(g, hidden, heads * SIZE), "down": normal(g, hidden, units)}
        made.append(layer)
    return normal(g, vocabulary, hidden), made


def blocks(index, size=SIZE):
    return (index[:, None] * size + torch.arange(size)).flatten()


def taken(model, stream, places):
    """The named parts of a model, in that order: per layer (old layer, units, heads, groups)."""
    embed, layers = model
    new = []
    for old, units, heads, groups in places:
        order = {"q": blocks(heads), "k": blocks(groups), "v": blocks(groups), "gate": units,
                 "up": units, "o": blocks(heads), "down": units}
        layer = {}
        for role, matrix in layers[old].items():
            if role in ("o", "down"):
                layer[role] = matrix[stream][:, order[role]]
            else:
                layer[role] = matrix[order[role]][:, stream]
        new.append(layer)
    return embed[:, stream], new


def orders(seed, layers=(0, 1, 2), hidden=48, heads=6, groups=3, units=40):
    """A random order of everything; heads stay with their group, in any order within it."""
    g = torch.Generator().manual_seed(seed)
    places = []
    for layer in layers:
        group = torch.randperm(groups, generator=g)
        each = heads // groups
        head = torch.cat([i * each + torch.randperm(each, generator=g) for i in group.tolist()])
        places.append((layer, torch.randperm(units, generator=g), head, group))
    return torch.randperm(hidden, generator=g), places


def noisy(model, seed, share):
    """The same with noise of this share of every matrix's norm."""
    g = torch.Generator().manual_seed(seed)
    embed = model[0] + share * model[0].std() * normal(g, *model[0].shape)
    layers = []
    for layer in model[1]:
        layers.append({role: matrix + share * matrix.std() * normal(g, *matrix.shape)
                       for role, matrix in layer.items()})
    return embed, layers


def cosines(source, target, places, axis, size=1):
    """Of two layers; places of the stream: the source's, the target's."""
    units = align.rows_of(source, axis), align.rows_of(target, axis)
    return align.cosines(*units, places, size)


def matched(source, target, **more):
    return align.match_models(source[1], target[1], source[0], target[0], **more)


# --- assignment -----------------------------------------------------------------------------------

def best_injection(cosine, slack):
    """All injections, by brute force: the largest total, pairs at the slack being none."""
    J, I = cosine.shape
    totals = []
    for pick in itertools.product(*[[*range(I), -1]] * J):
        used = [i for i in pick if i >= 0]
        if len(used) == len(set(used)):
            worth = [cosine[j, i].item() if i >= 0 else slack for j, i in enumerate(pick)]
            totals.append((sum(worth), pick))
    return max(totals)


@pytest.mark.parametrize("J, I", [(1, 1), (3, 3), (2, 4), (4, 2), (4, 4), (5, 3)])
def test_assignment_is_the_best_of_all_injections(J, I):
    for seed in range(20):
        cosine = torch.rand(J, I, generator=torch.Generator().manual_seed(seed))
        for slack in (-1.0, 0.3, 0.6, 1.0):
            total, pick = best_injection(cosine, slack)
            index, value = align.assign(cosine, slack)
            assert index.tolist() == list(pick)
            expected = [cosine[j, i].item() if i >= 0 else 0.0 for j, i in enumerate(pick)]
            torch.testing.assert_close(value, torch.tensor(expected), rtol=0, atol=0)


def test_assignment_by_hand():
    cosine = torch.tensor([[0.9, 0.8], [0.7, 0.1]])
    assert align.assign(cosine)[0].tolist() == [1, 0]
    assert align.assign(cosine, 0.75)[0].tolist() == [0, -1]
    assert align.assign(cosine, 0.95)[0].tolist() == [-1, -1]


# --- layers ---------------------------------------------------------------------------------------

def best_pairing(similarity, slack):
    """Every monotone pairing: as many source as target layers picked, in order."""
    I, J = similarity.shape
    totals = []
    for n in range(min(I, J) + 1):
        for some in itertools.combinations(range(I), n):
            for others in itertools.combinations(range(J), n):
                pairs = zip(some, others)
                totals.append(sum(similarity[i, j].item() - slack for i, j in pairs))
    return max(totals)


@pytest.mark.parametrize("I, J", [(1, 1), (4, 4), (2, 5), (6, 3), (5, 6)])
def test_layers_pair_as_the_best_of_all_monotone_pairings(I, J):
    for seed in range(20):
        similarity = torch.from_numpy(np.random.default_rng(seed).random((I, J)))
        for slack in (0.0, 0.3, 0.7):
            layers = align.match_layers(similarity.T, slack)
            pairs = [(i, j) for j, i in enumerate(layers) if i is not None]
            assert [i for i, _ in pairs] == sorted({i for i, _ in pairs})  # in order, none twice
            total = sum(similarity[i, j].item() - slack for i, j in pairs)
            assert total == pytest.approx(best_pairing(similarity, slack), abs=1e-12)
            assert all(similarity[i, j] > slack for i, j in pairs)


def test_layers_are_found_where_depth_guesses_wrong():
    similarity = torch.full((6, 4), 0.1)
    for j, i in enumerate([0, 1, 3, 4]):
        similarity[i, j] = 0.9
    assert align.match_layers(similarity.T) == [0, 1, 3, 4]
    assert align.match_layers(similarity) == [0, 1, None, 2, 3, None]
    assert align.match_layers(torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.1, 0.9]])) == [0, 2]
    assert align.match_layers(torch.full((3, 2), 0.2)) == [None, None, None]


# --- stream, units, heads -------------------------------------------------------------------------

@pytest.mark.parametrize("I, J", [(48, 48), (48, 42), (42, 48)])
def test_stream_is_found_beside_tokens_that_were_never_trained(I, J):
    """Those hold one large vector, which drifts: plain cosines of columns hang on it alone."""
    g = torch.Generator().manual_seed(0)
    wide = normal(g, 300, 48)
    wide[100:] += 20 * normal(g, 48)
    order = torch.randperm(48, generator=g)
    source = wide[:, order][:, :I] + 0.3 * normal(g, 300, I)
    source[100:] += 12 * normal(g, I)
    place_of = {place: i for i, place in enumerate(order[:I].tolist())}
    found = align.match_stream(source, wide[:, :J])
    assert found.tolist() == [place_of.get(j, -1) for j in range(J)]


def test_cosines_are_means_over_matrices():
    """Against torch's own cosine, pair by pair, over a stream that is matched in part."""
    source, target = made(1)[1][0], made(2)[1][0]
    stream = torch.arange(48).roll(5)
    stream[::3] = -1
    have, there = (stream >= 0).nonzero()[:, 0], stream[stream >= 0]
    cos = lambda a, b: torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    found = cosines(source, target, (there, have), "units")
    for j, i in [(0, 0), (3, 17), (39, 5)]:
        parts = [cos(target[role][j, have], source[role][i, there]) for role in ("gate", "up")]
        parts.append(cos(target["down"][have, j], source["down"][there, i]))
        torch.testing.assert_close(found[j, i], torch.stack(parts).mean())
    heads = cosines(source, target, (there, have), "heads", SIZE)
    groups = cosines(source, target, (there, have), "groups", SIZE)
    assert heads.shape == (6, 6) and groups.shape == (3, 3)
    rows = lambda n: slice(n * SIZE, (n + 1) * SIZE)
    parts = [cos(target["q"][rows(4)][:, have], source["q"][rows(1)][:, there]),
             cos(target["o"][have, rows(4)], source["o"][there, rows(1)])]
    torch.testing.assert_close(heads[4, 1], torch.stack(parts).mean())
    parts = [cos(target[role][rows(2)][:, have], source[role][rows(0)][:, there]) for role in "kv"]
    torch.testing.assert_close(groups[2, 0], torch.stack(parts).mean())


def test_a_long_stream_is_compared_at_some_places(monkeypatch):
    target, stranger = made(3), made(30)
    source = taken(target, *orders(0))
    monkeypatch.setattr(align, "PLACES", 16)
    known = matched(source, target).stream_J
    for layer in source[1]:  # what lies beyond the first 16 may be anything
        for role in ("gate", "up"):
            layer[role][:, known[16:]] = stranger[1][0][role][:, known[16:]]
    match = matched(source, target)
    assert match.layers == [0, 1, 2] and min(match.similarity) > 0.99
    assert (match.stream_J >= 0).all()  # and yet all of it is matched


def carry(source, target, row, column):
    """W~[j, l] = W_source[row(j), column(l)]; where either is -1, W_target[j, l]."""
    known = (row >= 0)[:, None] & (column >= 0)
    return torch.where(known, source[row][:, column], target)


def carried(match, source, target):
    """Every matrix of the target with the source's numbers, as merge.py reads them."""
    layers = []
    for j, layer in enumerate(target[1]):
        new = {}
        for role, matrix in layer.items():
            new[role] = carry(source[1][match.layers[j]][role], matrix, *match.index(j, role))
        layers.append(new)
    return layers


@pytest.mark.parametrize("groups, gate", [(6, True), (3, True), (1, True), (6, False)])
def test_a_permuted_copy_is_read_back_bit_for_bit(groups, gate):
    target = made(3, groups=groups, gate=gate)
    for seed in range(3):
        stream, places = orders(seed, groups=groups)
        source = taken(target, stream, places)
        match = matched(source, target)
        assert match.layers == [0, 1, 2] and match.related
        assert torch.equal(match.stream_J, stream.argsort())
        for rows, (_, units, heads, group) in zip(match.units, places):
            assert torch.equal(rows["units"], units.argsort())
            assert torch.equal(rows["heads"], blocks(heads.argsort()))
            assert torch.equal(rows["groups"], blocks(group.argsort()))
        for new, old in zip(carried(match, source, target), target[1]):
            assert all(torch.equal(new[role], old[role]) for role in old)


def test_a_grown_model_is_matched_by_construction_both_ways():
    """Wider, deeper, permuted, a third of noise: old parts are found, new ones have nobody."""
    large = made(4, layers=5, hidden=64, heads=8, groups=4, units=56)
    kept = [(layer, torch.arange(40), torch.arange(6), torch.arange(3)) for layer in (0, 1, 3)]
    small = taken(large, torch.arange(48), kept)
    stream, places = orders(5, layers=range(5), hidden=64, heads=8, groups=4, units=56)
    grown = noisy(taken(large, stream, places), 6, 1 / 3)
    match, back = matched(grown, small), matched(small, grown)
    assert match.layers == [0, 1, 3] and back.layers == [0, 1, None, 2, None]
    assert match.related and back.related and min(match.similarity) > 0.9
    assert torch.equal(match.stream_J, stream.argsort()[:48])
    assert torch.equal(back.stream_J, torch.where(stream < 48, stream, -1))
    for j, i in enumerate(match.layers):
        _, units, heads, groups = places[i]
        assert torch.equal(match.units[j]["units"], units.argsort()[:40])
        assert torch.equal(match.units[j]["heads"], blocks(heads.argsort()[:6]))
        assert torch.equal(match.units[j]["groups"], blocks(groups.argsort()[:3]))
        units = torch.where(units < 40, units, -1)
        assert torch.equal(back.units[i]["units"], units)
        heads = torch.where(blocks(heads) < 6 * SIZE, blocks(heads), -1)
        assert torch.equal(back.units[i]["heads"], heads)
    assert back.units[2] is None


def test_heads_of_a_group_may_be_fewer():
    target = made(7, heads=6, groups=3)
    every = torch.arange(48), torch.arange(40)
    heads, groups = torch.tensor([4, 0, 3]), torch.tensor([2, 0, 1])  # one head of each is left
    source = taken(target, every[0], [(layer, every[1], heads, groups) for layer in range(3)])
    for rows in matched(source, target).units:
        assert rows["groups"][::SIZE].tolist() == [8, 16, 0]
        assert rows["heads"][::SIZE].tolist() == [8, -1, -1, 16, 0, -1]


def test_all_heads_count_that_can_have_a_partner():
    """One of two heads in each group is left: the other is matched as well as its keys are."""
    target = made(7, layers=1)
    every = torch.arange(48), torch.arange(40)
    few = taken(target, every[0], [(0, every[1], torch.tensor([1, 2, 5]), torch.arange(3))])
    for one, other in ((few, target), (target, few)):
        value, _, _ = align.match_heads(one[1][0], other[1][0], EVERY, SIZE)
        assert value == pytest.approx(1.0, abs=1e-5)


def test_heads_stay_with_their_group():
    """What was a head of group 1 is found in group 0, where other keys and values serve it."""
    target, stranger = made(31, layers=1), made(32, layers=1)
    source = taken(target, torch.arange(48), [
        (0, torch.arange(40), torch.tensor([0, 2, 1, 3, 4, 5]), torch.arange(3))])
    part = slice(2 * SIZE, 3 * SIZE)
    source[1][0]["q"][part] = stranger[1][0]["q"][part]
    source[1][0]["o"][:, part] = stranger[1][0]["o"][:, part]
    _, heads, groups = align.match_heads(source[1][0], target[1][0], EVERY, SIZE)
    assert groups[::SIZE].tolist() == [0, 8, 16]
    assert heads[::SIZE].tolist() == [0, -1, -1, 24, 32, 40]


def test_of_sizes_that_match_the_largest_is_taken():
    """Heads of 16 rows whose halves are the same: halves alone could be taken for each other."""
    target = made(33, layers=1, groups=6)
    for role in "qkvo":
        matrix = target[1][0][role].T if role == "o" else target[1][0][role]
        halves = matrix.unflatten(0, (3, 2, SIZE))  # a view
        halves[:, 1] = halves[:, 0]
    order = torch.tensor([4, 5, 0, 1, 2, 3])  # whole heads of two halves
    source = taken(target, torch.arange(48), [(0, torch.arange(40), order, order)])
    rows = matched(noisy(source, 34, 0.2), target).units[0]
    assert torch.equal(rows["heads"], blocks(order.argsort()))
    assert torch.equal(rows["groups"], blocks(order.argsort()))


def test_groups_with_the_same_keys_and_values_are_told_apart_by_their_heads():
    target = made(21, layers=1)
    for role in "kv":
        target[1][0][role] = target[1][0][role][:SIZE].repeat(3, 1)
    stream, places = orders(22, layers=(0,))
    _, _, heads, groups = places[0]
    rows = matched(taken(target, stream, places), target).units[0]
    assert torch.equal(rows["groups"], blocks(groups.argsort()))
    assert torch.equal(rows["heads"], blocks(heads.argsort()))


def test_what_two_relatives_grew_apart_has_no_partner():
    """Ten new places in each of two streams of 48: strangers, whoever is left for them."""
    target, other = made(23), made(24)
    order, places = orders(25)
    embed, source = taken(target, order, places)
    embed[:, -10:] = other[0][:, -10:]
    match = matched((embed, source), target)
    assert (match.stream_J[order[-10:]] == -1).all()
    assert torch.equal(match.stream_J[order[:-10]], torch.arange(38))


def test_a_unit_that_nobody_is_close_to_has_no_partner():
    target = made(8)
    source = taken(target, *orders(9))
    new = made(10)[1][1]
    for role in ("gate", "up"):
        target[1][1][role][:20] = new[role][:20]
    target[1][1]["down"][:, :20] = new["down"][:, :20]
    rows = matched(source, target).units[1]["units"]
    assert (rows[:20] == -1).all() and (rows[20:] >= 0).all()


# --- kinship --------------------------------------------------------------------------------------

def shuffled_rows(layer, seed):
    """Every row of a layer with its columns in an order of its own."""
    generator = np.random.default_rng(seed)
    order = {"down": 0}
    return {role: torch.from_numpy(generator.permuted(matrix.numpy(), axis=order.get(role, 1)))
            for role, matrix in layer.items()}


@pytest.mark.parametrize("units", [(40, 40), (40, 70), (70, 40)])
def test_strangers_are_at_the_null(units):
    source, target = made(11, layers=4, units=units[0]), made(12, layers=3, units=units[1])
    similarity, null = align.kinship(source[1], target[1], EVERY)
    assert similarity.shape == (3, 4)
    assert 0.9 * null < similarity.mean() < 1.1 * null and similarity.max() < 1.5 * null
    match = matched(source, target)
    assert match.layers == [None] * 3 and match.units == [None] * 3 and not match.related


@pytest.mark.parametrize("units", [(40, 40), (40, 70), (70, 40)])
def test_the_null_is_that_of_shuffled_rows(units):
    """Some large columns, as real models have: strangers have these in common, the null not."""
    source, target = made(11, layers=4, units=units[0]), made(12, layers=3, units=units[1])
    for layer in (*source[1], *target[1]):
        for role in ("gate", "up"):
            layer[role][:, 7:19] += 2
        layer["down"][7:19] += 2
    similarity, null = align.kinship(source[1], target[1], EVERY)
    assert similarity.min() > 1.5 * null
    fewer, more = sorted((target[1], source[1]), key=lambda layers: len(layers[0]["up"]))
    best = []
    for seed, one, other in itertools.product(range(5), fewer, more):
        cosine = cosines(other, shuffled_rows(one, seed), EVERY, "units")
        best.append(cosine.amax(1).mean().item())
    assert null == pytest.approx(np.mean(best), rel=0.05)


def test_kinship_is_the_mean_of_best_cosines():
    """Few units: the sample is all of them, some twice where they are fewer than the sample."""
    source, target = made(13, layers=2, units=align.SAMPLE), made(14, layers=3, units=align.SAMPLE)
    similarity, _ = align.kinship(source[1], target[1], EVERY)
    for i, j in itertools.product(range(2), range(3)):
        best = cosines(source[1][i], target[1][j], EVERY, "units").amax(1).mean()
        torch.testing.assert_close(similarity[j, i], best)


def test_matching_is_deterministic_and_reads_layers_by_number():
    class Reader:
        def __init__(self, layers):
            self.layers, self.reads = layers, []

        def __len__(self):
            return len(self.layers)

        def __getitem__(self, i):
            self.reads.append(i)
            return self.layers[i]

    target = made(15)
    source = noisy(taken(target, *orders(16)), 17, 0.2)
    first = matched(source, target)
    readers = Reader(source[1]), Reader(target[1])
    second = matched((source[0], readers[0]), (target[0], readers[1]))
    assert first.null == second.null and first.similarity == second.similarity
    for one, other in zip(first.units, second.units):
        assert all(torch.equal(one[axis], other[axis]) for axis in one)
    for reader in readers:  # two passes, and looks at the first layer
        assert max(reader.reads.count(i) for i in range(1, 3)) <= 2


@pytest.mark.parametrize("units", [(40, 70), (70, 40)])
def test_strangers_without_a_gate_are_compared_by_what_both_have(units):
    plain, gated = made(28, gate=False, units=units[0]), made(29, units=units[1])
    for match in (matched(plain, gated), matched(gated, plain)):
        assert not match.related and max(match.similarity) < 1.5 * match.null


@pytest.mark.parametrize("common, related", [(1, False), (2, True)])
def test_half_of_the_layers_make_a_relative(common, related):
    target, other = made(26, layers=4), made(27, layers=4)
    source = target[1][:common] + other[1][common:]
    assert matched((target[0], source), target).related == related


@pytest.mark.parametrize("lacking", ["q", "up"])
def test_fused_projections_are_refused(lacking):
    source, target = made(18), made(18)
    for layer in source[1]:
        layer["fused"] = layer.pop(lacking)
    with pytest.raises(ValueError, match=f"a source layer has no matrix of its own for {lacking}"):
        matched(source, target)


# --- reading a source in the target's coordinates -------------------------------------------------

def test_matched_reads_by_hand():
    """The source's numbers where both axes have a partner, the target's own elsewhere."""
    name, tensor = "layers.0.mlp.down_proj.weight", torch.tensor
    match = align.Match([0], [{"units": tensor([-1, 2, 0])}], tensor([0, -1]), [1.0], 0.0, True)
    source = StateDict({name: tensor([[1.0, 2, 3]])})
    target = StateDict({name: tensor([[7.0, 8, 9], [4, 5, 6]])})
    found = Matched(source, target, match, align.AXES)
    assert found.read(name).tolist() == [7, 3, 1, 4, 5, 6]
    for start, stop in itertools.combinations(range(8), 2):     # as any piece, and beyond the end
        assert found.read(name, start, stop).tolist() == [7, 3, 1, 4, 5, 6][start:stop]
    assert Matched(source, target, match._replace(layers=[None]), align.AXES).entries == {}


def test_each_role_is_indexed_by_its_axes():
    target = made(19)
    match = matched(taken(target, *orders(20)), target)
    expected = {"q": ("heads", "stream"), "k": ("groups", "stream"), "o": ("stream", "heads"),
                "up": ("units", "stream"), "down": ("stream", "units")}
    known = match.units[1] | {"stream": match.stream_J}
    for role, axes in expected.items():
        index = match.index(1, role)
        assert all(torch.equal(i, known[axis]) for i, axis in zip(index, axes, strict=True))


# --- the committed models -------------------------------------------------------------------------

def opened(name):
    tensors = load_file(MODELS / f"{name}.safetensors")
    layers = {}
    for key, tensor in tensors.items():
        where = place(key)
        if where.layer is not None and tensor.dim() == 2:
            layers.setdefault(where.layer, {})[where.role] = tensor
    return tensors["model.embed_tokens.weight"], [layers[i] for i in sorted(layers)]


def rows(heads):
    return blocks(heads, tiny_lm.HEAD_DIM)


def test_grown_is_matched_with_its_base():
    spec = make_models.SPECS["grown"]
    grown = make_models.grow(tiny_lm.load(MODELS / "base.safetensors"), spec)
    _, (stream, order) = make_models.scramble(grown.state_dict(), spec.seed)
    match = matched(opened("grown"), opened("base"))
    assert match.layers == list(spec.places) and min(match.similarity) > 0.9 and match.related
    assert torch.equal(match.stream_J, stream.argsort()[:128])
    for found, i in zip(match.units, match.layers):
        _, heads, units = order[i]
        assert (found["units"] == units.argsort()[:384]).float().mean() >= 0.99
        assert torch.equal(found["heads"], rows(heads.argsort()[:4]))
        assert torch.equal(found["groups"], rows(heads.argsort()[:4]))
    back = matched(opened("base"), opened("grown"))
    assert back.layers == [0, 1, None, 2, 3, None]
    assert torch.equal(back.stream_J, torch.where(stream < 128, stream, -1))


def test_pruned_is_matched_with_its_base():
    base = tiny_lm.load(MODELS / "base.safetensors").state_dict()
    match = matched(opened("base"), opened("pruned"))
    assert match.layers == [0, 1, 2] and min(match.similarity) > 0.9 and match.related
    for found, layer in zip(match.units, match.layers):
        heads, units = make_models.strongest(base, layer, 3, 288)
        assert (found["units"] == units).float().mean() >= 0.99
        assert torch.equal(found["heads"], rows(heads))


def test_only_relatives_are_related():
    """All pairs of committed models: descendants of one base, and others from another start."""
    family = "base", "code", "prose", "arithmetic", "grown", "pruned"
    strangers = "base-seed2", "large"
    models = {name: opened(name) for name in (*family, *strangers)}
    for a, b in itertools.permutations(models, 2):
        match = matched(models[a], models[b])
        assert match.related == (a in family and b in family), (a, b)
        paired = [value for i, value in zip(match.layers, match.similarity) if i is not None]
        fewer = min(len(models[a][1]), len(models[b][1]))  # of relatives: every layer that can
        assert len(paired) == (fewer if match.related else 0), (a, b)
        assert min(paired, default=1.0) > 0.9, (a, b)
        assert paired or max(match.similarity) < 1.5 * match.null, (a, b)


# --- how they are made ----------------------------------------------------------------------------

def tiny(seed=0):
    shape = dict(hidden=32, layers=2, heads=2, mlp=24)
    return make_models.new_model(make_models.Spec(seed=seed, steps=1, lr=0.0, shape=shape)).eval()


@torch.no_grad()
def test_growing_keeps_the_function_and_adds_no_twins():
    parent = tiny()
    for weight in parent.parameters():
        weight.mul_(8 if weight.dim() == 2 else 1)  # outputs that depend on every layer
    shape = dict(hidden=64, layers=4, heads=3, mlp=40)
    spec = make_models.Spec(seed=1, steps=1, lr=0.0, shape=shape, places=(0, 2))
    grown, text = make_models.grow(parent, spec).eval(), torch.randint(0, 256, (2, 30))
    for module in grown.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.eps *= 32 / 64  # the mean square is over twice as many numbers, half of them 0
    torch.testing.assert_close(grown(text), parent(text), rtol=1e-4, atol=1e-4)
    mixed, _ = make_models.scramble(grown.state_dict(), 2)
    assert not torch.equal(mixed["model.norm.weight"], grown.state_dict()["model.norm.weight"])
    mixed = tiny_lm.TinyLM.from_state_dict(mixed)
    for module in mixed.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.eps *= 32 / 64
    torch.testing.assert_close(mixed(text), parent(text), rtol=1e-4, atol=1e-4)
    new = grown.model.layers[0].mlp.up_proj.weight
    every = torch.arange(64), torch.arange(64)
    assert cosines({"up": new[:24]}, {"up": new[24:]}, every, "units").max() < 0.6
    for layer in (1, 3):  # new ones write nothing, until they are trained
        assert not grown.model.layers[layer].self_attn.o_proj.weight.any()
        assert not grown.model.layers[layer].mlp.down_proj.weight.any()


@torch.no_grad()
def test_pruning_drops_what_matters_least(monkeypatch):
    monkeypatch.setattr(make_models, "WINDOW", 16)
    parent = tiny()
    parent.model.layers[0].mlp.down_proj.weight.zero_()
    parent.model.layers[0].self_attn.o_proj.weight.zero_()  # the layer that does nothing
    parent.model.layers[1].mlp.down_proj.weight[:, 3:11] = 0
    parent.model.layers[1].self_attn.o_proj.weight[:, :32] = 0  # the first of its heads
    spec = make_models.Spec(seed=1, steps=1, lr=0.0, mixture=(1, 0, 0), parent="x",
                            shape=dict(hidden=32, layers=1, heads=1, mlp=16))
    texts = [np.random.default_rng(0).integers(0, 256, 400, dtype=np.uint8)] * 3
    pruned, (_, places) = make_models.prune(parent, spec, texts)
    (layer, heads, units), = places
    assert layer == 1 and heads.tolist() == [1] and units.tolist() == [0, 1, 2, *range(11, 24)]
    text = torch.randint(0, 256, (2, 30))
    torch.testing.assert_close(pruned(text), parent(text), rtol=1e-4, atol=1e-4)
