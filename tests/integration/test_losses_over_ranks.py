"""Loss terms that reduce over a sequence or a pair give the same loss and gradient when two ranks hold parts of every sequence."""

from __future__ import annotations

import numpy as np
import pytest
from fixtures.losses import Case, built, evaluate, pack
from fixtures.ranks import run_ranks
from fixtures.samples import random_samples

TERMS = {
    "ppo_clip": ("ppo_clip", {}),
    "gspo": ("gspo", {"clip_low": 0.1, "clip_high": 0.1}),
    "gspo_token": ("gspo", {"clip_low": 0.1, "clip_high": 0.1, "token_advantages": True}),
    "gmpo": ("gmpo", {}),
    "dpo": ("dpo", {}),
    "ipo": ("ipo", {}),
    "bradley_terry": ("bradley_terry", {}),
}


def whole_case() -> Case:
    """Pairs of trajectories of one to three samples; NaN wherever nothing is trained, but for values."""
    rng = np.random.default_rng(0)
    batch = pack(random_samples(5, shape=[[[4, 7], [9]], [[3], [6, 2, 8]], [[5], [5]]]))
    batch = batch.with_columns({"positions": np.concatenate([np.arange(n, dtype=np.int32) for n in batch.lengths])})
    mask = batch.array("loss_mask")
    sign = np.array([1.0 if r.id.trajectory == 0 else -1.0 for r in batch.refs])[batch.segment]
    numbers = {n: np.where(mask, -rng.exponential(size=batch.n_rows), np.nan) for n in ("logprobs", "old_logprobs", "ref_logprobs")}
    columns = {"old_logprobs": numbers["old_logprobs"], "ref_logprobs": numbers["ref_logprobs"], "advantages": np.where(mask, sign, np.nan)}
    return Case(batch, {"logprobs": numbers["logprobs"], "values": rng.normal(size=batch.n_rows)}, columns)


def on_a_rank(rank: int, size: int) -> dict[str, tuple[float, dict[str, np.ndarray]]]:
    """Each term on this rank's rows: its share, and its gradients [N] with 0 on the other ranks' rows."""
    import torch.distributed as dist

    case = whole_case()
    rows = case.batch.context_rows(rank, size)
    outputs, columns = ({n: x[rows] for n, x in d.items()} for d in (case.outputs, case.columns))
    shard = Case(case.batch.context_shard(rank, size), outputs, columns)
    found = {}
    for name, (use, options) in TERMS.items():
        got = evaluate(built("loss", use, **options), shard, "sequence_mean", cp=dist.group.WORLD)
        gradients = {n: np.zeros(case.batch.n_rows) for n in got.gradients}
        for n, gradient in got.gradients.items():
            gradients[n][rows] = gradient
        found[name] = (got.value, gradients)
    return found


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, tuple[float, dict[str, np.ndarray]]]]:
    pytest.importorskip("torch")
    return run_ranks(on_a_rank, 2)


@pytest.mark.parametrize("name", TERMS)
def test_split_over_context_parallel_ranks(name, two_ranks):
    use, options = TERMS[name]
    whole = evaluate(built("loss", use, **options), whole_case(), "sequence_mean")
    assert sum(rank[name][0] for rank in two_ranks) == pytest.approx(whole.value, abs=1e-12)
    assert all(rank[name][0] != 0 for rank in two_ranks)
    for output, gradient in whole.gradients.items():
        np.testing.assert_allclose(sum(rank[name][1][output] for rank in two_ranks), gradient, atol=1e-12)
