"""SegmentOps give the same numbers and gradients packed, split over ranks or samples or rows, and in micro-batches.

First against NumPy loops and finite differences, unsplit. Then every split against the unsplit one, in float64 to 1e-12: the
loss is the sum of the parts' shares, the gradient the sum over parts of the gradients of one parameter for each row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fixtures.ranks import run_ranks
from fixtures.samples import random_samples

from miles_core.batch import Batch
from miles_core.plan import balanced_shards, micro_batches, units_of
from miles_core.refs import SampleRef

if TYPE_CHECKING:
    from torch import Tensor

    from miles_core.algorithms.segments import SegmentOps

SEED = 5
PER = ("sequence", "trajectory", "global")


@cache
def whole_batch() -> Batch:
    """Groups with branches, empty samples and injected tokens; ``positions`` numbers the rows of the whole batch."""
    batch = Batch.of([SampleRef.of(s) for s in random_samples(SEED, groups=4)])
    return batch.with_columns({"positions": np.arange(batch.n_rows, dtype=np.int32)})


@cache
def row_values(name: str) -> np.ndarray:
    """float64 [N] of the whole batch: a parameter, old logprobs or advantages. Rows that nobody trains hold NaN in ``x``."""
    batch = whole_batch()
    values = np.random.default_rng(["parameter", "old", "advantages", "x"].index(name)).normal(size=batch.n_rows)
    return np.where(batch.array("loss_mask"), values, np.nan) if name == "x" else values


# ---- the losses in question -----------------------------------------------------------------------------------------


def token_mean(ops: SegmentOps, difference: Tensor, advantages: Tensor) -> Tensor:
    """Mean over the step's tokens of ratio · advantage."""
    weights = difference.new_full(difference.shape, 1 / ops.tokens)
    return ops.share(difference.exp() * advantages, weights)


def sequence_mean(ops: SegmentOps, difference: Tensor, advantages: Tensor) -> Tensor:
    """Mean over sequences of the mean over their tokens."""
    return ops.share(difference.exp() * advantages, ops.spread(1 / ops.sequence_tokens.double() / ops.sequences))


def trajectory_mean(ops: SegmentOps, difference: Tensor, advantages: Tensor) -> Tensor:
    """Mean over trajectories of the mean over their tokens, whichever sample holds them."""
    return ops.share(difference.exp() * advantages, ops.spread(1 / ops.trajectory_tokens.double() / ops.trajectories))


def gspo(ops: SegmentOps, difference: Tensor, advantages: Tensor) -> Tensor:
    """Sequence-level ratio exp(mean of the log-ratio) (Zheng et al. 2025, arXiv:2507.18071), on every row of the sequence."""
    ratio = ops.spread(ops.mean(difference, "sequence").exp())
    return ops.share(ratio * advantages, ops.spread(1 / ops.sequence_tokens.double() / ops.sequences))


def trajectory_ratio(ops: SegmentOps, difference: Tensor, advantages: Tensor) -> Tensor:
    """The same at the level of trajectories: rows of several samples enter one nonlinearity."""
    ratio = ops.spread(ops.mean(difference, "trajectory").exp()[ops.trajectory])
    return ops.share(ratio * advantages, difference.new_full(difference.shape, 1 / ops.tokens))


def global_ratio(ops: SegmentOps, difference: Tensor, advantages: Tensor) -> Tensor:
    """All rows of the step in one nonlinearity."""
    return ops.share(ops.mean(difference, "global").exp() * advantages, difference.new_full(difference.shape, 1 / ops.tokens))


Loss = Callable[["SegmentOps", "Tensor", "Tensor"], "Tensor"]
LOSSES: dict[str, Loss] = {f.__name__: f for f in (token_mean, sequence_mean, trajectory_mean, gspo, trajectory_ratio, global_ratio)}


@dataclass(frozen=True)
class Outcome:
    """What one part, or all of them added up, gives: reductions of ``x``, and each loss with its gradient [N]."""

    reductions: dict[str, np.ndarray]
    losses: dict[str, float]
    gradients: dict[str, np.ndarray]


def outcome(batch: Batch, losses: dict[str, Loss] = LOSSES, **of: Any) -> Outcome:
    """Of a part of the batch."""
    import torch

    from miles_core.algorithms.segments import SegmentOps

    ops = SegmentOps.of(batch, **of)
    rows = torch.from_numpy(batch.array("positions").astype(np.int64))

    def local(name: str) -> Tensor:
        return torch.from_numpy(row_values(name))[rows]

    x = local("x")
    reductions = {f"{kind} {per}": getattr(ops, kind)(x, per).numpy() for kind in ("sum", "mean") for per in PER}
    shares, gradients = {}, {}
    for name, loss in losses.items():
        parameter = torch.from_numpy(row_values("parameter")).requires_grad_()
        share = loss(ops, parameter[rows] - local("old"), local("advantages"))
        share.backward()
        assert parameter.grad is not None
        shares[name], gradients[name] = share.item(), parameter.grad.numpy()
    return Outcome(reductions, shares, gradients)


@pytest.fixture(scope="module")
def unsplit() -> Outcome:
    return outcome(whole_batch())


def check_sum(parts: list[Outcome], unsplit: Outcome, losses: dict[str, Loss] = LOSSES) -> None:
    """Shares and gradients of the parts add up to those of the whole."""
    for name in losses:
        assert sum(p.losses[name] for p in parts) == pytest.approx(unsplit.losses[name], abs=1e-12), name
        np.testing.assert_allclose(sum(p.gradients[name] for p in parts), unsplit.gradients[name], atol=1e-12, err_msg=name)


# ---- unsplit: NumPy loops and finite differences ---------------------------------------------------------------------


@cache
def trained_rows(per: str) -> list[np.ndarray]:
    """Trained rows of each sequence, of each trajectory in order of appearance, or of all."""
    batch = whole_batch()
    names = {
        "sequence": list(range(len(batch))),
        "trajectory": [(r.id.group, r.id.trajectory) for r in batch.refs],
        "global": [0] * len(batch),
    }
    rows: dict[Any, list[int]] = {}
    for s, name in enumerate(names[per]):
        own = range(int(batch.cu_seqlens[s]), int(batch.cu_seqlens[s + 1]))
        rows.setdefault(name, []).extend(r for r in own if batch.array("loss_mask")[r])
    return [np.array(r, int) for r in rows.values()]


def test_the_batch_is_hard_enough() -> None:
    batch = whole_batch()
    assert (batch.segments.sequence_tokens == 0).any() and (batch.segments.sequence_tokens > 3).any()
    assert len(trained_rows("trajectory")) < len(batch), "some trajectories have several samples"
    assert any(len(r) == 0 for r in trained_rows("trajectory")), "and some train nothing"


@pytest.mark.parametrize("per", PER)
def test_reductions_against_numpy(per: str, unsplit: Outcome) -> None:
    """NaN in untrained rows does not spread; what has no trained row sums and averages to 0."""
    x = row_values("x")
    sums = np.array([x[r].sum() for r in trained_rows(per)])
    means = np.array([x[r].mean() if len(r) else 0 for r in trained_rows(per)])
    np.testing.assert_allclose(unsplit.reductions[f"sum {per}"], sums.squeeze() if per == "global" else sums, atol=1e-12)
    np.testing.assert_allclose(unsplit.reductions[f"mean {per}"], means.squeeze() if per == "global" else means, atol=1e-12)


def numpy_loss(name: str, parameter: np.ndarray) -> float:
    """The losses as plain loops over trained rows."""
    difference, advantages = parameter - row_values("old"), row_values("advantages")
    [everything] = trained_rows("global")
    sequences, trajectories = ([r for r in trained_rows(per) if len(r)] for per in ("sequence", "trajectory"))
    per_token = np.exp(difference) * advantages
    formulas: dict[str, Callable[[], float]] = {
        "token_mean": lambda: np.mean(per_token[everything]),
        "sequence_mean": lambda: np.mean([per_token[r].mean() for r in sequences]),
        "trajectory_mean": lambda: np.mean([per_token[r].mean() for r in trajectories]),
        "gspo": lambda: np.mean([np.exp(difference[r].mean()) * advantages[r].mean() for r in sequences]),
        "trajectory_ratio": lambda: sum(np.exp(difference[r].mean()) * advantages[r].sum() for r in trajectories) / len(everything),
        "global_ratio": lambda: np.exp(difference[everything].mean()) * advantages[everything].mean(),
    }
    return float(formulas[name]())


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_against_numpy(name: str, unsplit: Outcome) -> None:
    """Values by loops, gradients by central differences."""
    parameter, step = row_values("parameter"), 1e-6
    assert unsplit.losses[name] == pytest.approx(numpy_loss(name, parameter), abs=1e-12)
    for row in range(0, len(parameter), 3):
        moved = np.eye(len(parameter))[row] * step
        slope = (numpy_loss(name, parameter + moved) - numpy_loss(name, parameter - moved)) / (2 * step)
        assert unsplit.gradients[name][row] == pytest.approx(slope, abs=1e-8)


def test_untrained_rows_leave_no_trace_in_a_gradient() -> None:
    """Whatever stands there, NaN and infinite weights too (1 / 0 tokens of an empty sample)."""
    import torch

    from miles_core.algorithms.segments import SegmentOps

    ops = SegmentOps.of(whole_batch())
    x = torch.from_numpy(row_values("x")).requires_grad_()
    weights = ops.spread(1 / ops.sequence_tokens)
    assert not weights.isfinite().all()
    for total in (ops.share(x, weights), ops.sum(x, "global"), ops.mean(x).sum(), ops.mean(x, "trajectory").sum()):
        [gradient] = torch.autograd.grad(total, x)
        assert total.isfinite() and (gradient[~ops.mask] == 0).all() and (gradient[ops.mask] != 0).all()


def test_data_parallel_ranks_must_agree_on_the_trajectories() -> None:
    from miles_core.algorithms.segments import SegmentOps

    with pytest.raises(ValueError, match="n_trajectories"):
        SegmentOps.of(whole_batch(), dp=object())  # ty: ignore[invalid-argument-type]


# ---- split ----------------------------------------------------------------------------------------------------------


def parts_of(batch: Batch, split: str, size: int) -> list[Batch]:
    """Data-parallel shards that keep trajectories together, ones that do not, or context-parallel zig-zag rows."""
    if split == "context":
        return [batch.context_shard(rank, size) for rank in range(size)]
    units = units_of(batch, "token") if split == "data" else np.arange(len(batch))
    return [batch.select(samples) for samples in balanced_shards(batch.lengths, units, size)]


def on_a_rank(rank: int, size: int) -> dict[str, dict[str, Any]]:
    """Every split over all ranks."""
    import torch.distributed as dist

    batch, world = whole_batch(), dist.group.WORLD
    n_trajectories = int(batch.segments.trajectory.max()) + 1
    outcomes = {
        "data": outcome(parts_of(batch, "data", size)[rank], dp=world, n_trajectories=n_trajectories),
        "data, trajectories apart": outcome(parts_of(batch, "apart", size)[rank], dp=world, n_trajectories=n_trajectories),
        "context": outcome(parts_of(batch, "context", size)[rank], cp=world),
    }
    return {split: asdict(o) for split, o in outcomes.items()}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Outcome]]:
    return [{split: Outcome(**o) for split, o in outcomes.items()} for outcomes in run_ranks(on_a_rank, 2)]


@pytest.mark.parametrize("split", ["data", "data, trajectories apart", "context"])
def test_losses_and_gradients_split_over_ranks(split: str, two_ranks: list[dict[str, Outcome]], unsplit: Outcome) -> None:
    check_sum([rank[split] for rank in two_ranks], unsplit)


@pytest.mark.parametrize("split", ["data", "data, trajectories apart"])
def test_reductions_over_data_parallel_ranks(split: str, two_ranks: list[dict[str, Outcome]], unsplit: Outcome) -> None:
    """A rank has its own sequences; trajectories and totals are everybody's."""
    units = units_of(whole_batch(), "token") if split == "data" else np.arange(len(whole_batch()))
    shards = balanced_shards(whole_batch().lengths, units, 2)
    for rank, samples in zip(two_ranks, shards, strict=True):
        for name, expected in unsplit.reductions.items():
            wanted = expected[samples] if name.endswith("sequence") else expected
            np.testing.assert_allclose(rank[split].reductions[name], wanted, atol=1e-12, err_msg=name)


def test_reductions_over_context_parallel_ranks(two_ranks: list[dict[str, Outcome]], unsplit: Outcome) -> None:
    """Every rank has a part of every sequence, and the sums of all."""
    for rank in two_ranks:
        for name, expected in unsplit.reductions.items():
            np.testing.assert_allclose(rank["context"].reductions[name], expected, atol=1e-12, err_msg=name)


def test_trajectories_do_lie_apart() -> None:
    """The second split is harder than the first: branches of one trajectory are on different ranks."""
    first, second = parts_of(whole_batch(), "apart", 2)
    assert set(first.segments.trajectory.tolist()) & set(second.segments.trajectory.tolist())


@pytest.mark.parametrize("max_tokens", [1, 20, 60])
def test_micro_batches_add_up(max_tokens: int, unsplit: Outcome) -> None:
    """Units keep trajectories together, so what a loss reduces over lies in one micro-batch; only the whole step does not."""
    batch = whole_batch()
    parts = [batch.select(p) for p in micro_batches(batch.lengths, units_of(batch, "token"), max_tokens)]
    assert len(parts) > 1
    losses = {n: f for n, f in LOSSES.items() if f is not global_ratio}
    outcomes = [outcome(p, losses) for p in parts]
    check_sum(outcomes, unsplit, losses)
    sequences = micro_batches(batch.lengths, units_of(batch, "token"), max_tokens)
    for part, samples in zip(outcomes, sequences, strict=True):
        for kind in ("sum", "mean"):
            np.testing.assert_allclose(part.reductions[f"{kind} sequence"], unsplit.reductions[f"{kind} sequence"][samples], atol=1e-12)
    assert sum(p.reductions["sum global"] for p in outcomes) == pytest.approx(unsplit.reductions["sum global"], abs=1e-12)


def test_micro_batches_of_context_shards_are_parts_too(unsplit: Outcome) -> None:
    """First micro-batches, then zig-zag rows, shares only: what needs no communication needs no process group."""
    batch = whole_batch()
    linear = {n: LOSSES[n] for n in ("token_mean", "sequence_mean", "trajectory_mean")}
    plan = micro_batches(batch.lengths, units_of(batch, "token"), 30)
    parts = [batch.select(p).context_shard(rank, 3) for p in plan for rank in range(3)]
    check_sum([outcome(p, linear) for p in parts], unsplit, linear)
