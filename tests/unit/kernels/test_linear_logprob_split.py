"""linear_logprob split over the vocabulary on two ranks, against the same op on the whole weight in one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fixtures.ranks import run_ranks

ROWS, WIDTH, VOCAB = 37, 12, 103
DTYPES = ("float64", "float32", "bfloat16", "float16")
CUTS = {"even": 52, "uneven": 90, "nothing on rank 1": VOCAB, "nothing on rank 0": 0}
"""Token ids from here on are rank 1's."""


def inputs(dtype: str, *, bias: bool, per_row: bool) -> dict[str, Any]:
    import torch

    g = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(getattr(torch, dtype))

    return {
        "hidden": normal(ROWS, WIDTH),
        "weight": normal(VOCAB, WIDTH),
        "bias": normal(VOCAB) if bias else None,
        "targets": torch.randint(VOCAB, (ROWS,), generator=g),
        "temperature": 0.5 + torch.rand(ROWS, generator=g) if per_row else 0.8,
    }


def evaluate(given: dict[str, Any], which: str, **options: Any) -> dict[str, np.ndarray]:
    """Results and gradients, in float64, of a sum in which every row has a weight of its own."""
    import torch

    from miles_kernels.ops.linear_logprob import linear_logprob

    leaves = {n: given[n].clone().requires_grad_() for n in ("hidden", "weight", "bias") if given[n] is not None}
    logprob, entropy = linear_logprob(**given | leaves, **options)
    a = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    terms = {"logprob": (a * logprob).sum(), "entropy": ((1 - 0.5 * a) * entropy).sum()}
    loss = sum(terms.values()) if which == "both" else terms[which]
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert all(d.dtype == x.dtype for d, x in zip(gradients, leaves.values(), strict=True))
    found = {"logprob": logprob, "entropy": entropy} | {f"d{n}": d for n, d in zip(leaves, gradients, strict=True)}
    return {n: x.detach().double().numpy() for n, x in found.items()}


CASES = [(dtype, cut, True, True, "both") for dtype in DTYPES for cut in CUTS] + [
    ("float64", "uneven", False, False, which) for which in ("logprob", "entropy")
]


def on_a_rank(rank: int, size: int) -> tuple[list[dict[str, np.ndarray]], tuple[list[int], list[int]], list[str]]:
    """Everything that two ranks are started for."""
    return cases(rank), traffic(rank, size), refusals(rank)


def cases(rank: int) -> list[dict[str, np.ndarray]]:
    """Every case on this rank's rows of the vocabulary, in chunks that differ from rank to rank."""
    import torch.distributed as dist

    found = []
    for dtype, cut, bias, per_row, which in CASES:
        given = inputs(dtype, bias=bias, per_row=per_row)
        rows = slice(0, CUTS[cut]) if rank == 0 else slice(CUTS[cut], VOCAB)
        given |= {n: given[n][rows] for n in ("weight", "bias") if given[n] is not None}
        found.append(evaluate(given, which, chunk=10 + 7 * rank, group=dist.group.WORLD, vocab_start=rows.start))
    return found


@pytest.fixture(scope="module")
def two_ranks() -> list[Any]:
    return run_ranks(on_a_rank, 2)


VALUE = {"float64": 1e-12, "float32": 1.2e-5, "bfloat16": 1.2e-5, "float16": 1.2e-5}
"""Log-probabilities here are as large as 45, where float32 has steps of 3.8e-6."""
GRADIENT = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2**-9, "float16": 2**-12}
"""Half formats round the gradients themselves; a number that is nearly between two of them may go either way."""


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, c)) for c in CASES])
def test_results_and_gradients_are_those_of_the_whole_weight(two_ranks: list[Any], index: int):
    dtype, _, bias, per_row, which = CASES[index]
    want = evaluate(inputs(dtype, bias=bias, per_row=per_row), which, chunk=15)
    first, second = (found[index] for found, _, _ in two_ranks)
    for name in ("logprob", "entropy", "dhidden"):
        assert np.array_equal(first[name], second[name]), name
    got = first | {n: np.concatenate([first[n], second[n]]) for n in first if n in ("dweight", "dbias")}
    for name in ("logprob", "entropy"):
        np.testing.assert_allclose(got[name], want[name], atol=VALUE[dtype], rtol=0)
    for name in ("dhidden", "dweight", "dbias") if bias else ("dhidden", "dweight"):
        assert np.linalg.norm(got[name] - want[name]) <= GRADIENT[dtype] * np.linalg.norm(want[name]), name
        assert np.linalg.norm(want[name]) > 0.1


# What travels


def traffic(rank: int, size: int, rows: int = 50, vocab: int = 301) -> tuple[list[int], list[int]]:
    """Elements of each all-reduce of a forward and of a backward pass."""
    import torch
    import torch.distributed as dist

    from miles_kernels.ops.linear_logprob import linear_logprob

    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, 4, generator=g).requires_grad_(), torch.randn(vocab, 4, generator=g)[rank::size].requires_grad_()
    start = sum(len(range(r, vocab, size)) for r in range(rank))
    result = linear_logprob(hidden, weight, torch.zeros(rows, dtype=torch.int64), group=dist.group.WORLD, vocab_start=start)
    forward = list(sent)
    sent.clear()
    (result.logprob.sum() + result.entropy.sum()).backward()
    dist.all_reduce = all_reduce
    return forward, sent


def test_no_logits_travel(two_ranks: list[Any]):
    for _, (forward, backward), _ in two_ranks:
        assert sum(forward) == 4 * 50 + 4  # and first id and number of rows of two shares
        assert backward == [4 * 50]  # the gradient of hidden


# Refusals


def refusals(rank: int) -> list[str]:
    """What each rank is told, in turn, about targets outside, shares that overlap, that leave a gap, and that are all empty."""
    import torch
    import torch.distributed as dist

    from miles_kernels.ops.linear_logprob import linear_logprob

    told = []
    for target, start, rows in [(9, 5 * rank, (5, 4)), (0, 4 * rank, (5, 4)), (0, 6 * rank, (5, 4)), (0, 0, (0, 0)), (8, 5 * rank, (5, 4))]:
        hidden, weight, targets = torch.ones(3, 2), torch.ones(rows[rank], 2), torch.tensor([0, target, 0])
        try:
            told.append(str(linear_logprob(hidden, weight, targets, group=dist.group.WORLD, vocab_start=start).logprob[1].item()))
        except ValueError as error:
            told.append(str(error))
    return told


def test_every_rank_is_told_the_same(two_ranks: list[Any]):
    first, second = (told for _, _, told in two_ranks)
    assert first == second
    outside, overlap, gap, empty, fine = first
    assert "targets[1] is 9, outside the vocabulary [0, V = 9)" in outside
    assert "[0, 5), [4, 8)" in overlap and "vocab_start" in overlap
    assert "[0, 5), [6, 10)" in gap and "vocab_start" in gap
    assert "the vocabulary is empty" in empty
    assert float(fine) == pytest.approx(-np.log(9))
