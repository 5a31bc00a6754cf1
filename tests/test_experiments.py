"""The small models of experiments/, their scores and baselines, against forms written
differently. Sizes are small for testing. Oracles: complex numbers and explicit loops
for the forward pass, 8 bits a byte for a model that knows nothing, examples by hand,
closed forms, statistics with a margin, the function itself, matrices by index."""
import functools
import math
import sys

import numpy as np
import pytest
import torch

import evaluate
import make_models
import real
import tiny_lm
from baselines import dare, dare_ties, noise_average, soup, ties
from conftest import generator

DOCUMENTS = [b"a" * 5 + b"bc", b"x = 1\n" * 9, b"12+34=46\n"]
TINY = dict(hidden=32, layers=1, heads=1, mlp=16)


@pytest.fixture
def model():
    """Four query heads on two key heads; gains away from 1, to be seen."""
    torch.manual_seed(0)
    lm = tiny_lm.TinyLM(hidden=48, layers=2, heads=4, mlp=40, kv_heads=2).eval()
    for weight in lm.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.2)
    return lm


def norm(x, gain):
    return x / np.sqrt((x * x).mean() + 1e-5) * gain


def turn(vector, position):
    """32 numbers are 16 complex ones: first the real halves."""
    angle = position * 10_000.0 ** (-np.arange(16) / 16)
    z = (vector[:16] + 1j * vector[16:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag])


def oracle_head(q, keys, values):
    """What one query, the last, takes from the values up to it."""
    scores = np.array([q @ turn(key, s) for s, key in enumerate(keys)]) / np.sqrt(32)
    share = np.exp(scores - scores.max())
    return sum(p * value for p, value in zip(share / share.sum(), values))


def oracle_logits(tensors, text):
    """The same network in float64 numpy, one query at a time."""
    w = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    xs = [w["model.embed_tokens.weight"][byte] for byte in text]
    for layer in range(2):
        prefix, suffix = f"model.layers.{layer}.", ".weight"
        m = {name[len(prefix):-len(suffix)]: value for name, value in w.items()
             if name.startswith(prefix)}
        normed = [norm(x, m["input_layernorm"]) for x in xs]
        q, k, v = ([(m[f"self_attn.{name}_proj"] @ x).reshape(-1, 32) for x in normed]
                   for name in "qkv")
        for t in range(len(xs)):
            heads = []
            for h in range(4):
                keys = [key[h // 2] for key in k[:t + 1]]
                values = [value[h // 2] for value in v[:t + 1]]
                heads.append(oracle_head(turn(q[t][h], t), keys, values))
            xs[t] = xs[t] + m["self_attn.o_proj"] @ np.concatenate(heads)
            y = norm(xs[t], m["post_attention_layernorm"])
            gate = m["mlp.gate_proj"] @ y
            up = gate / (1 + np.exp(-gate)) * (m["mlp.up_proj"] @ y)
            xs[t] = xs[t] + m["mlp.down_proj"] @ up
    embed = w["model.embed_tokens.weight"]
    return np.array([embed @ norm(x, w["model.norm.weight"]) for x in xs])


def test_logits_match_the_oracle(model):
    text = b"def f(x):"
    logits = model(torch.tensor([list(text)]))[0].detach().double()
    expected = torch.from_numpy(oracle_logits(model.state_dict(), text))
    # float32 against float64 through two layers; logits are near 10
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_uniform_model_costs_eight_bits_a_byte(model):
    torch.nn.init.zeros_(model.model.norm.weight)       # all logits are 0
    # float32 log-softmax: log(256) to 1 part in 1e7
    np.testing.assert_allclose(evaluate.bits_per_byte(model, DOCUMENTS), 8, rtol=1e-6)


def test_exact_match_counts_whole_answers():
    '''"122" as the start of "1223" is wrong; operands do not count.'''
    text = b"100+22=122\n900+99=999\n"
    # no answer holds the "+"
    right = np.array([byte in b"=0123456789\n" for byte in text[1:]])
    assert evaluate.exact_match([text], [(None, right)])[0] == 1.0
    shares = {0: 1.0, 6: 1.0, 7: 0.5, 9: 0.5, 10: 0.5, 11: 1.0, 17: 1.0, 21: 0.5}
    for position, expected in shares.items():
        wrong = right.copy()
        wrong[max(position - 1, 0)] = False  # hit[i] is about byte i + 1
        share = evaluate.exact_match([text], [(None, wrong)])[0]
        assert share == expected, f"byte {position}, {text[position:position + 1]}"


def test_no_text_stands_on_two_sides():
    sums = {}
    for split in evaluate.SPLITS:
        lines = b"".join(evaluate.arithmetic_documents(split).values()).split()
        for line in lines:
            question, answer = line.split(b"=")
            a, b = map(int, question.split(b"+"))
            assert a + b == int(answer)
            assert sums.setdefault((min(a, b), max(a, b)), split) == split
    names = {split: set(evaluate.code_documents(split)) for split in evaluate.SPLITS}
    assert not names["train"] & (names["test"] | names["validation"])
    assert not names["test"] & names["validation"]
    paragraphs = {}
    for split in evaluate.SPLITS:
        paragraphs[split] = [paragraph.strip()
                             for text in evaluate.prose_documents(split).values()
                             for paragraph in set(text.split(b"\n\n"))]
    found = {split: set(held) - {b""} for split, held in paragraphs.items()}
    assert not found["train"] & (found["test"] | found["validation"])
    assert not found["test"] & found["validation"]
    scored = [paragraph for paragraph in paragraphs["test"] if paragraph]
    assert len(scored) == len(found["test"]), "a paragraph is scored twice"


def flat_scores(model, split):
    """In the place of evaluate: two documents of each domain."""
    return {name: np.array([1.0, 3.0]) for name in ("code", "prose", "arithmetic")}


def test_an_expert_stands_on_the_line_from_its_parent(tmp_path, monkeypatch):
    monkeypatch.setattr(make_models, "BATCH", 2)
    monkeypatch.setattr(make_models, "WINDOW", 16)
    monkeypatch.setattr(make_models, "evaluate", flat_scores)
    row = functools.partial(make_models.Spec, seed=5, steps=8, lr=1e-1,
                            mixture=(0, 0, 1))
    monkeypatch.setattr(make_models, "SPECS", {
        "parent": row(shape=TINY), "whole": row(parent="parent"),
        "part": row(parent="parent", share=0.25)})
    texts = [np.frombuffer(b"print('abc')\n" * 50, dtype=np.uint8)] * 3
    records = [make_models.make(name, tmp_path, texts, quiet=True)
               for name in make_models.SPECS]
    assert records[0]["test"]["code"] == {"mean": 2.0, "error": 1.0}
    assert records[0]["tokens"] == 8 * 2 * 16
    parent, whole, part = (tiny_lm.load(tmp_path / f"{name}.safetensors").state_dict()
                           for name in make_models.SPECS)
    for name in parent:
        assert not torch.equal(parent[name], whole[name])
        expected = parent[name] + 0.25 * (whole[name] - parent[name])
        # bfloat16 keeps 8 bits: half a unit in the last place of each of the two files
        # compared
        atol = 2**-9 * float(whole[name].abs().max())
        torch.testing.assert_close(part[name], expected, rtol=2**-7, atol=atol)


def test_the_score_of_a_command(model, tmp_path, monkeypatch, capsys):
    """As greedy_soup.py asks for it. (The tables: by the README's commands.)"""
    make_models.save(model, tmp_path / "a.safetensors")
    sums = tuple(DOCUMENTS[2:] * 3)
    monkeypatch.setattr(evaluate, "held_out", lambda domain, split: sums)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "a.safetensors"),
                                      "--score", "code"])
    assert evaluate.main() == 0
    found = tiny_lm.load(tmp_path / "a.safetensors")
    bits = evaluate.bits_per_byte(found, DOCUMENTS[2:])
    assert float(capsys.readouterr().out) == pytest.approx(-bits[0])


# --- real.py: what is cut, its order --------------------------------------------------
@pytest.fixture
def tensors():
    """Six heads on two groups; gains away from 1, to be seen."""
    torch.manual_seed(0)
    lm = tiny_lm.TinyLM(hidden=64, layers=4, heads=6, mlp=96, kv_heads=2)
    for weight in lm.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.2)
    return {name: weight.detach().clone() for name, weight in lm.state_dict().items()}


def logits(tensors):
    text = torch.arange(24).view(2, 12) * 7 % 256
    return tiny_lm.TinyLM.from_state_dict(tensors)(text).detach()


def test_another_order_is_the_same_function(tensors):
    stream, layers = real.random_order(tensors, range(4), 96, tiny_lm.HEAD_DIM, seed=1)
    moved = make_models.cut(tensors, stream, layers)
    for name in ("q", "k", "v", "o"):   # the seed moves heads and groups, too
        key = f"model.layers.0.self_attn.{name}_proj.weight"
        assert not torch.equal(moved[key], tensors[key])
    # float32; the order of sums differs, and logits are near 10
    torch.testing.assert_close(logits(moved), logits(tensors), rtol=1e-4, atol=1e-4)


# --- baselines.py ---------------------------------------------------------------------
def numbers(**tensors):
    """x=[1, 2] -> {"x": tensor([1., 2.])}"""
    return {name: torch.tensor(values).double() for name, values in tensors.items()}


def close(ours, **expected):
    """1e-12: a handful of float64 operations on numbers near 1."""
    assert list(ours) == list(expected)
    for name, values in expected.items():
        expected = torch.as_tensor(values, dtype=torch.float64)
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-12)


BASE = numbers(x=[1, 1], y=[[2], [0]])
# Their deltas: (1, 0; 0, 4) and (-1, 2; 1, 2).
A = numbers(x=[2, 1], y=[[2], [4]])
B = numbers(x=[0, 3], y=[[3], [2]])


def test_ties_by_hand():
    """Three models, five entries, density 0.6: three stay.
    deltas  ( 5,  1, -2,  3, 0.5)  ->  ( 5, 0, -2, 3, 0)
            (-3,  4,  1, -4,   0)  ->  (-3, 4,  0,-4, 0)
            (-1, -6, -4,  0,   2)  ->  ( 0,-6, -4, 0, 2)
    totals                               2 -2  -6 -1  2   elect + - - - +
    means of those who agree             5 -6  -3 -4  2   times lam = 0.5"""
    base = numbers(x=[10, 10, 10], y=[10, 10])
    deltas = [[5, 1, -2, 3, 0.5], [-3, 4, 1, -4, 0], [-1, -6, -4, 0, 2]]
    models = []
    for d in deltas:
        models.append(numbers(x=[10 + v for v in d[:3]], y=[10 + v for v in d[3:]]))
    close(ties(base, models, 0.6, 0.5), x=[12.5, 7, 8.5], y=[8, 11])
    # nothing trimmed: totals 1, -1, -5, -1, 2.5; means 5, -6, (-2 - 4) / 2, -4, (0.5 +
    # 2) / 2
    close(ties(base, models, 1.0), x=[15, 4, 7], y=[6, 11.25])


def test_ties_at_its_corners():
    """Half of four, over the whole model, are both of x. 2 against -2: the base stays.
    3, 0, 0: the mean is over the one voter."""
    found = ties(numbers(x=[0, 0], y=[0, 0]), [numbers(x=[10, 9], y=[1, 0.5])], 0.5)
    close(found, x=[10, 9], y=[0, 0])
    models = [numbers(w=[9, 10]), numbers(w=[5, 7]), numbers(w=[7, 7])]
    close(ties(numbers(w=[7, 7]), models, 1), w=[7, 10])


def test_soup_and_dare_without_dropping_by_hand():
    close(soup([A, B]), x=[1, 2], y=[[2.5], [3]])
    close(dare(BASE, [A, B], 0, generator=generator()), **soup([A, B]))
    # half of (1 - 1, 0 + 2; 0 + 1, 4 + 2)
    close(dare(BASE, [A, B], 0, 0.5, generator=generator()), x=[1, 2], y=[[2.5], [3]])
    # 1 - 1 is a draw; 2, 1, (4 + 2) / 2
    found = dare_ties(BASE, [A, B], 0, 0.5, generator=generator())
    close(found, x=[1, 2], y=[[2.5], [1.5]])


def test_dare_is_unbiased():
    """An entry is (1 - p) often delta / (1 - p), else 0: mean delta, variance delta^2 p
    / (1 - p). 40,000 draws are a tensor of that many equal entries; five standard
    errors, so that one seed in a million fails by chance."""
    n, p, delta = 40_000, 0.9, 3.0
    base = {"w": torch.ones(n).double(), "v": torch.zeros(n).double()}
    tuned = {"w": base["w"] + delta, "v": base["v"] + delta}
    moved = dare(base, [tuned], p, 1, generator=generator())
    for name in base:
        moves = moved[name] - base[name]
        assert set(moves.round(decimals=9).tolist()) == {0.0, 30.0}       # 3 / 0.1
        error = math.sqrt(delta ** 2 * p / (1 - p) / n)
        assert abs(moves.mean().item() - delta) < 5 * error
    # Each entry of each tensor and model is drawn on its own: both survive with
    # probability 0.01.
    within = 5 * math.sqrt(0.01 * 0.99 / n)
    both = ((moved["w"] > 1) & (moved["v"] > 0)).double().mean().item()
    assert abs(both - 0.01) < within
    pair = dare(base, [tuned, tuned], p, 1, generator=generator(1))["v"]
    twice = (pair == pair.max()).double().mean().item()
    assert abs(twice - 0.01) < within and pair.max() > 59


def test_noise_has_the_norm_it_was_given():
    """One copy lies exactly relative * norm away, per tensor; k copies about 1 /
    sqrt(k) of that: the squared length of a mean of k independent unit vectors in n
    dimensions is 1 / k on average, with a relative spread below sqrt(2 / n)."""
    g = generator(5)
    n = 10_000
    w = {"small": torch.randn(n, generator=g, dtype=torch.float64) * 1e-3,
         "large": torch.full((100, 100), 7.0, dtype=torch.float64)}
    for name, mine in w.items():
        one, mean = (noise_average(w, k, 0.03, g)[name] - mine for k in (1, 4))
        assert (one.norm() / mine.norm()).item() == pytest.approx(0.03, rel=1e-9)
        squared = (mean.norm() / mine.norm()).item() ** 2
        assert abs(squared / (0.03 ** 2 / 4) - 1) < 5 * math.sqrt(2 / n)
    # Isotropic: n entries of variance 49, mean 0.
    noise = noise_average(w, 1, 1.0, g)["large"] - 7
    assert abs(noise.mean().item()) < 5 * 7 / math.sqrt(n)
    assert abs(noise[:50].square().mean().item() / 49 - 1) < 5 * math.sqrt(4 / n)
    close(noise_average(w, 3, 0.0, g), **w)
