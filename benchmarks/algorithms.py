"""Time of advantage and loss of 1 M tokens (grpo, ppo_clip, token mean; forward and backward) beside the shortest torch expression.

    uv run --locked python benchmarks/algorithms.py

The expression gives the same numbers, which is checked first: a group-relative advantage by a view of [groups, members], the clipped
surrogate as a minimum, a mean over the mask. Measured without metrics and with those that ppo_clip reports (it computes their rows in
any case; the trainer takes their means). Both get the same packed float32 columns: answers of one length, a prompt before each. One
thread, in turns; ratios are miles / expression of the same round: below 1 miles is faster. Target: at most 1.2.

`whole step` adds what the expression does not need, and a trainer does once a micro-batch: SegmentOps of a Batch, columns as tensors.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from _machine import interleave, median_ratio, summary, write_result
from miles_core.algorithms.advantages import grpo
from miles_core.algorithms.aggregations import token_mean
from miles_core.algorithms.losses import ppo_clip
from miles_core.algorithms.segments import SegmentOps
from miles_core.batch import Batch
from miles_core.protocols import AdvantageInputs, LossInputs
from miles_core.refs import SampleRef
from miles_core.sample import Sample, SampleId, SamplingSpan

CLIP_LOW, CLIP_HIGH = 0.2, 0.28


@dataclass
class Data:
    """A packed batch of groups × members answers; float32 columns."""

    batch: Batch
    ops: SegmentOps
    rewards: Tensor
    members: int
    logprobs: Tensor
    columns: dict[str, Tensor]


def data(groups: int, members: int, prompt: int, answer: int) -> Data:
    """Random log-probabilities near the old ones, random rewards."""
    rng = np.random.default_rng(0)
    refs = []
    for group in range(groups):
        for member in range(members):
            sampled = np.arange(prompt + answer) >= prompt
            sample = Sample.of(
                SampleId("benchmark", "policy", f"p{group}", f"g{group}", member),
                np.zeros(prompt + answer, np.int32),
                versions=np.where(sampled, 0, -1),
                loss_mask=sampled,
                logprobs=np.where(sampled, -1.0, np.nan),
                spans=[SamplingSpan(prompt, prompt + answer)],
                reward=float(rng.random()),
            )
            refs.append(SampleRef.of(sample))
    batch = Batch.of(refs)
    old = -rng.exponential(size=batch.n_rows).astype(np.float32)
    new = torch.from_numpy(old + 0.2 * rng.normal(size=batch.n_rows).astype(np.float32))
    batch = batch.with_columns({"old_logprobs": old})
    return Data(batch, SegmentOps.of(batch), torch.from_numpy(batch.rewards), members, new, {"old_logprobs": torch.from_numpy(old)})


def miles(d: Data, logprobs: Tensor, ops: SegmentOps, columns: dict[str, Tensor], metrics: bool) -> tuple[Tensor, ...]:
    """What learner and trainer do."""
    advantages = grpo(AdvantageInputs(d.rewards, columns, ops))
    assert isinstance(advantages, Tensor)
    given = ppo_clip(
        LossInputs({"logprobs": logprobs}, columns | {"advantages": advantages.to(torch.float32)}, ops),
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
    )
    loss = ops.share(given.loss, token_mean(ops))
    loss.backward()
    return (loss, *(ops.sum(x.detach(), "global") / ops.tokens for x in given.metrics.values())) if metrics else (loss,)


def expression(d: Data, logprobs: Tensor, ops: SegmentOps, columns: dict[str, Tensor], metrics: bool) -> tuple[Tensor, ...]:
    """The same, written for equal groups and for nothing else."""
    r = d.rewards.view(-1, d.members)
    advantages = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)).flatten().float()[ops.segment]
    log_ratio = logprobs - columns["old_logprobs"]
    ratio = log_ratio.exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages
    loss = -(torch.minimum(plain, clipped) * ops.mask).sum() / ops.tokens
    loss.backward()
    if not metrics:
        return (loss,)
    with torch.no_grad():
        return loss, ((clipped < plain) * ops.mask).sum() / ops.tokens, ((ratio - 1 - log_ratio) * ops.mask).sum() / ops.tokens


def seconds(d: Data, function: Callable[..., tuple[Tensor, ...]], metrics: bool, whole: bool = False) -> float:
    """Of one call, with fresh log-probabilities to take the gradient."""
    logprobs = d.logprobs.clone().requires_grad_()
    start = time.perf_counter()
    ops, columns = d.ops, d.columns
    if whole:
        ops = SegmentOps.of(d.batch)
        columns = {n: torch.from_numpy(c) for n, c in d.batch.columns.items() if isinstance(c, np.ndarray)}
    function(d, logprobs, ops, columns, metrics)
    return time.perf_counter() - start


def check(d: Data) -> None:
    """Both give the same loss, metrics and gradient."""
    a, b = (d.logprobs.clone().requires_grad_() for _ in range(2))
    torch.testing.assert_close(
        miles(d, a, d.ops, d.columns, True), expression(d, b, d.ops, d.columns, True), rtol=1e-4, atol=1e-6, check_dtype=False
    )
    assert a.grad is not None and b.grad is not None
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-12)


def main() -> None:
    """Measure in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    d = data(groups=128, members=8, prompt=100, answer=1000)
    check(d)
    cases = {
        "expression": lambda: seconds(d, expression, False),
        "miles": lambda: seconds(d, miles, False),
        "expression, metrics": lambda: seconds(d, expression, True),
        "miles, metrics": lambda: seconds(d, miles, True),
        "miles, metrics, whole step": lambda: seconds(d, miles, True, whole=True),
    }
    measured = interleave(cases, arguments.repeats, warmup=3)
    ratios = {
        "without metrics": median_ratio(measured["miles"], measured["expression"]),
        "with metrics": median_ratio(measured["miles, metrics"], measured["expression, metrics"]),
        "with metrics, whole step": median_ratio(measured["miles, metrics, whole step"], measured["expression, metrics"]),
    }
    result = {"seconds": {name: summary(x) for name, x in measured.items()}, "ratios": ratios, "target_ratio": 1.2}
    sizes = {"rows": d.batch.n_rows, "trained_tokens": d.ops.tokens, "samples": len(d.batch)}
    for name, x in result["seconds"].items():
        print(f"{name:28} {1e3 * x['median']:7.1f} ms")
    print(ratios)
    print(write_result("algorithms", {"sizes": sizes, **result}, ("miles-core", "torch")))


if __name__ == "__main__":
    main()
