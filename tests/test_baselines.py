"""Weight-space baselines against examples by hand, closed forms and statistics with a
margin."""
import math

import pytest
import torch

from baselines import dare, dare_ties, noise_average, soup, ties


def model(dtype=torch.float64, **tensors):
    """x=[1, 2] -> {"x": tensor([1., 2.])}"""
    return {name: torch.tensor(values, dtype=dtype) for name, values in tensors.items()}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def close(ours, **expected):
    """1e-12: a handful of float64 operations on numbers near 1."""
    assert list(ours) == list(expected)
    for name, values in expected.items():
        expected = torch.as_tensor(values, dtype=torch.float64)
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-12)


BASE = model(x=[1, 1], y=[[2], [0]])
# Their deltas: (1, 0; 0, 4) and (-1, 2; 1, 2).
A, B = model(x=[2, 1], y=[[2], [4]]), model(x=[0, 3], y=[[3], [2]])


def test_soup_by_hand():
    close(soup([A, B]), x=[1, 2], y=[[2.5], [3]])
    close(soup([A]), **A)


# --- TIES -----------------------------------------------------------------------------------------
def test_ties_by_hand():
    """Three models, five entries, density 0.6: three stay.
    deltas  ( 5,  1, -2,  3, 0.5)  ->  ( 5, 0, -2, 3, 0)
            (-3,  4,  1, -4,   0)  ->  (-3, 4,  0,-4, 0)
            (-1, -6, -4,  0,   2)  ->  ( 0,-6, -4, 0, 2)
    totals                               2 -2  -6 -1  2   elect + - - - +
    means of those who agree             5 -6  -3 -4  2   times lam = 0.5"""
    base = model(x=[10, 10, 10], y=[10, 10])
    deltas = [[5, 1, -2, 3, 0.5], [-3, 4, 1, -4, 0], [-1, -6, -4, 0, 2]]
    models = [model(x=[10 + v for v in d[:3]], y=[10 + v for v in d[3:]]) for d in deltas]
    close(ties(base, models, 0.6, 0.5), x=[12.5, 7, 8.5], y=[8, 11])
    # nothing trimmed: totals 1, -1, -5, -1, 2.5; means 5, -6, (-2 - 4) / 2, -4, (0.5 +
    # 2) / 2
    close(ties(base, models, 1.0), x=[15, 4, 7], y=[6, 11.25])


def test_ties_trims_over_the_whole_model():
    """Half of four: both of x, none of y. Per tensor it would be (10, 0) and (1, 0)."""
    close(ties(model(x=[0, 0], y=[0, 0]), [model(x=[10, 9], y=[1, 0.5])], 0.5), x=[10, 9], y=[0, 0])


def test_a_drawn_election_leaves_the_base():
    """2 against -2: nobody wins. 3, 0, 0: one voter, and the mean is over that one."""
    base = model(w=[7, 7])
    close(ties(base, [model(w=[9, 10]), model(w=[5, 7]), model(w=[7, 7])], 1), w=[7, 10])


# --- DARE -----------------------------------------------------------------------------------------
def test_dare_without_dropping_by_hand():
    close(dare(BASE, [A, B], 0, generator=seeded()), **soup([A, B]))
    # half of (1 - 1, 0 + 2; 0 + 1, 4 + 2)
    close(dare(BASE, [A, B], 0, 0.5, generator=seeded()), x=[1, 2], y=[[2.5], [3]])
    # 1 - 1 is a draw; 2, 1, (4 + 2) / 2
    close(dare_ties(BASE, [A, B], 0, 0.5, generator=seeded()), x=[1, 2], y=[[2.5], [1.5]])


def test_dare_is_unbiased():
    """An entry is (1 - p) often delta / (1 - p), else 0: mean delta, variance delta^2 p
    / (1 - p). 40,000 draws are a tensor of that many equal entries; five standard
    errors, so that one seed in a million fails by chance."""
    n, p, delta = 40_000, 0.9, 3.0
    base = {"w": torch.ones(n, dtype=torch.float64), "v": torch.zeros(n, dtype=torch.float64)}
    tuned = {"w": base["w"] + delta, "v": base["v"] + delta}
    moved = dare(base, [tuned], p, 1, generator=seeded())
    for name in base:
        moves = moved[name] - base[name]
        assert set(moves.round(decimals=9).tolist()) == {0.0, 30.0}       # 3 / 0.1
        assert abs(moves.mean().item() - delta) < 5 * math.sqrt(delta ** 2 * p / (1 - p) / n)
    # Each entry of each tensor and model is drawn on its own: both survive with
    # probability 0.01.
    within = 5 * math.sqrt(0.01 * 0.99 / n)
    both = ((moved["w"] > 1) & (moved["v"] > 0)).double().mean().item()
    assert abs(both - 0.01) < within
    pair = dare(base, [tuned, tuned], p, 1, generator=seeded(1))["v"]
    twice = (pair == pair.max()).double().mean().item()
    assert abs(twice - 0.01) < within and pair.max() > 59


# --- The control of self-merging ------------------------------------------------------------------
def test_noise_has_the_norm_it_was_given():
    """One copy lies exactly relative * norm away, per tensor; k copies about 1 /
    sqrt(k) of that: the squared length of a mean of k independent unit vectors in n
    dimensions is 1 / k on average, with a relative spread below sqrt(2 / n)."""
    generator, n = seeded(5), 10_000
    w = {"small": torch.randn(n, generator=generator, dtype=torch.float64) * 1e-3,
         "large": torch.full((100, 100), 7.0, dtype=torch.float64)}
    for name, mine in w.items():
        one, mean = (noise_average(w, k, 0.03, generator)[name] - mine for k in (1, 4))
        assert (one.norm() / mine.norm()).item() == pytest.approx(0.03, rel=1e-9)
        squared = (mean.norm() / mine.norm()).item() ** 2
        assert abs(squared / (0.03 ** 2 / 4) - 1) < 5 * math.sqrt(2 / n)
    # Isotropic: n entries of variance 49, mean 0.
    noise = noise_average(w, 1, 1.0, generator)["large"] - 7
    assert abs(noise.mean().item()) < 5 * 7 / math.sqrt(n)
    assert abs(noise[:50].square().mean().item() / 49 - 1) < 5 * math.sqrt(4 / n)
    close(noise_average(w, 3, 0.0, generator), **w)
