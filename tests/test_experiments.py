"""The small models of experiments/ and their scores, against forms written differently.
Sizes are small for testing. Oracles: complex numbers and explicit loops for the forward
pass, 8 bits a byte for a model that knows nothing, examples by hand, the function
itself."""
import functools
import sys

import numpy as np
import pytest
import torch

import evaluate
import make_models
import tiny_lm

DOCUMENTS = [b"a" * 5 + b"bc", b"x = 1\n" * 9, b"12+34=46\n"]
TINY = dict(hidden=32, layers=1, heads=1, mlp=16)


@pytest.fixture
def model():
    """Gains away from 1, to be seen."""
    torch.manual_seed(0)
    lm = tiny_lm.TinyLM(hidden=48, layers=2, heads=4, mlp=40).eval()
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
                keys = [key[h] for key in k[:t + 1]]
                values = [value[h] for value in v[:t + 1]]
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
    bits, _ = evaluate.read(model, DOCUMENTS)
    np.testing.assert_allclose(bits, 8, rtol=1e-6)


def test_exact_match_counts_whole_answers():
    '''"122" as the start of "1223" is wrong; operands do not count.'''
    text = b"100+22=122\n900+99=999\n"
    # no answer holds the "+"
    right = np.array([byte in b"=0123456789\n" for byte in text[1:]])
    assert evaluate.exact_match([text], [right])[0] == 1.0
    shares = {0: 1.0, 6: 1.0, 7: 0.5, 9: 0.5, 10: 0.5, 11: 1.0, 17: 1.0, 21: 0.5}
    for position, expected in shares.items():
        wrong = right.copy()
        wrong[max(position - 1, 0)] = False  # hit[i] is about byte i + 1
        share = evaluate.exact_match([text], [wrong])[0]
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
    make_models.write(model.state_dict(), tmp_path / "a.safetensors")
    sums = tuple(DOCUMENTS[2:] * 3)
    monkeypatch.setattr(evaluate, "held_out", lambda domain, split: sums)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "a.safetensors"),
                                      "--score", "code"])
    evaluate.main()
    found = tiny_lm.load(tmp_path / "a.safetensors")
    bits, _ = evaluate.read(found, DOCUMENTS[2:])
    assert float(capsys.readouterr().out) == pytest.approx(-bits[0])


def test_another_order_is_the_same_function(model):
    tensors = model.state_dict()
    moved = make_models.cut(tensors, *make_models.random_order(tensors, seed=1))
    for name in ("q", "k", "v", "o"):
        key = f"model.layers.0.self_attn.{name}_proj.weight"
        assert not torch.equal(moved[key], tensors[key])
    text = torch.arange(24).view(2, 12) * 7 % 256
    again = tiny_lm.TinyLM.from_state_dict(moved)(text)
    # float32; the order of sums differs, and logits are near 10
    torch.testing.assert_close(again, model(text), rtol=1e-4, atol=1e-4)
