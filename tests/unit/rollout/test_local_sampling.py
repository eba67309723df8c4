"""Drawing tokens, against NumPy formulas."""

import numpy as np
import pytest
import torch

from miles_core.errors import RunError
from miles_rollout.local.sampling import Settings, draw


def settings(n: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> Settings:
    return Settings(np.full(n, temperature), np.full(n, top_p), np.full(n, top_k), np.full(n, min_p))


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


LOGITS = np.random.default_rng(0).normal(size=(500, 23)) * 2


def test_inverts_the_cumulative_distribution():
    u = np.random.default_rng(1).random(500)
    drawn = draw(torch.from_numpy(LOGITS).float(), settings(500, temperature=0.7), u)
    probs = softmax(LOGITS / 0.7)
    np.testing.assert_array_equal(drawn.tokens, (probs.cumsum(axis=1) < u[:, None]).sum(axis=1))
    np.testing.assert_allclose(drawn.logprobs, np.log(probs[np.arange(500), drawn.tokens]), atol=1e-5)
    assert drawn.support == {}


def test_a_row_does_not_depend_on_its_batch():
    u = np.random.default_rng(2).random(500)
    mixed = Settings(*(np.random.default_rng(3).choice(v, 500) for v in ([0.0, 0.5, 1.0], [0.7, 1.0], [0, 4], [0.0, 0.1])))
    together = draw(torch.from_numpy(LOGITS).float(), mixed, u)
    for i in range(0, 500, 25):
        one = Settings(mixed.temperature[i : i + 1], mixed.top_p[i : i + 1], mixed.top_k[i : i + 1], mixed.min_p[i : i + 1])
        alone = draw(torch.from_numpy(LOGITS[i : i + 1]).float(), one, u[i : i + 1])
        assert alone.tokens[0] == together.tokens[i] and alone.logprobs[0] == together.logprobs[i]
        assert alone.support.get(0) == together.support.get(i)


def test_the_ends_of_the_unit_interval():
    """0 gives the first token that is possible at all, the largest number below 1 the last; never one of probability 0."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).repeat(2, 1)
    assert draw(logits, settings(2), np.array([0.0, 1 - 2.0**-53])).tokens.tolist() == [1, 3]
    many = torch.from_numpy(np.tile(LOGITS[:1], (1000, 1))).float()
    many[:, -1] = -torch.inf
    near_one = 1 - 2.0**-53 * np.arange(1, 1001)
    assert (draw(many, settings(1000), near_one).tokens < 22).all()


def test_greedy_has_the_logprob_at_temperature_one_and_ignores_restrictions():
    drawn = draw(torch.from_numpy(LOGITS).float(), settings(500, temperature=0, top_k=2, top_p=0.3), np.zeros(500))
    np.testing.assert_array_equal(drawn.tokens, LOGITS.argmax(axis=1))
    np.testing.assert_allclose(drawn.logprobs, np.log(softmax(LOGITS).max(axis=1)), atol=1e-5)
    assert drawn.support == {}


@pytest.mark.parametrize(
    "restriction, expected",
    [
        ({"top_k": 2}, [1, 3]),
        ({"top_p": 0.39}, [1]),  # the smallest set whose mass reaches it
        ({"top_p": 0.41}, [1, 3]),
        ({"min_p": 0.49}, [1, 3, 4]),  # at least half as likely as the likeliest
        ({"top_k": 2, "top_p": 0.6}, [1, 3]),  # of what top_k left (4/7 and 3/7), one is not enough
        ({"top_k": 3, "min_p": 0.6}, [1, 3]),
        ({"top_p": 1e-9}, [1]),  # the likeliest always stays
    ],
)
def test_support_and_renormalisation(restriction: dict, expected: list[int]):
    probs = np.array([0.1, 0.4, 0.0, 0.3, 0.2])
    logits = torch.from_numpy(np.log(np.maximum(probs, 1e-30))).float().repeat(50, 1)
    u = (np.arange(50) + 0.5) / 50
    drawn = draw(logits, settings(50, **restriction), u)
    assert all(drawn.support[i] == expected for i in range(50))
    kept = np.where(np.isin(np.arange(5), expected), probs, 0) / probs[expected].sum()
    np.testing.assert_array_equal(drawn.tokens, (kept.cumsum() < u[:, None]).sum(axis=1))
    np.testing.assert_allclose(drawn.logprobs, np.log(kept[drawn.tokens]), atol=1e-5)


def test_ties_at_top_k_keep_the_lower_ids():
    assert draw(torch.zeros(1, 9), settings(1, top_k=4), np.array([0.99])).support[0] == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float):
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    with pytest.raises(RunError, match="not finite"):
        draw(logits, settings(3), np.array([0.1, 0.5, 0.9]))
