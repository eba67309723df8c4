"""Time of GAE on ragged packed rows beside loops over time steps, on the CPU.

    uv run --locked python benchmarks/gae.py

Each gets packed rows (rewards a sample, values a row, the loss mask) and gives packed advantages and returns, without whitening; 1,000
trajectories of 1 to 4,096 tokens, a tenth of them injected in runs. Padding and unpadding are part of the loops' work. Two loops:
`loop` pads to [S, T] and masks injected tokens step by step, the form that is common in frameworks; `loop_time_major` is the fastest we
could write: injected tokens are taken out first, errors come from whole tensors, time is the outer axis and a step is one operation.
Ratios are loop / gae: above 1 gae wins. Results are compared with each other and, for some samples, with a plain Python loop.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from _machine import ROOT, interleave, median_ratio, summary, write_result
from miles_core.algorithms.gae import gae
from miles_core.algorithms.segments import SegmentOps
from miles_core.batch import Batch
from miles_core.protocols import AdvantageInputs
from miles_core.refs import SampleRef
from miles_core.sample import Sample, SampleId

GAMMA, LAM = 0.99, 0.95
Columns = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """What all of them start from: rewards [S], float64 values [N], where rows belong."""

    inputs: AdvantageInputs
    segment: Tensor
    positions: Tensor
    longest: int

    @staticmethod
    def of(samples: int, tokens: int, shortest: int) -> Case:
        rng = np.random.default_rng(0)
        refs = []
        for i in range(samples):
            length = int(rng.integers(shortest, tokens + 1)) if i else tokens
            injected = np.repeat(rng.random(length) < 0.1, rng.integers(1, 40, length))[:length]
            mask = np.concatenate([[False], ~injected])
            id = SampleId("benchmark", "policy", f"p{i // 8}", f"g{i // 8}", i % 8)
            refs.append(SampleRef.of(Sample.of(id, np.zeros(length + 1, np.int32), loss_mask=mask, reward=float(rng.normal()))))
        batch = Batch.of(refs, ("loss_mask", "positions"))
        values = torch.from_numpy(rng.normal(size=batch.n_rows))
        inputs = AdvantageInputs(torch.from_numpy(batch.rewards), {"values": values}, SegmentOps.of(batch))
        return Case(inputs, inputs.ops.segment, torch.from_numpy(batch.array("positions")).long(), int(batch.lengths.max()))


def packed(case: Case) -> Columns:
    """What Miles does."""
    columns = gae(case.inputs, gamma=GAMMA, lam=LAM, whiten=False)
    return columns["advantages"], columns["returns"]


def loop(case: Case) -> Columns:
    """[S, T], one column after another from the end, injected tokens masked at every step."""
    ops, rows, n_samples = case.inputs.ops, (case.segment, case.positions), len(case.inputs.rewards)
    values, rewards, mask = (torch.zeros(n_samples, case.longest, dtype=torch.float64) for _ in range(3))
    values[rows], mask[rows] = case.inputs.columns["values"], ops.mask.double()
    last = torch.where(mask > 0, torch.arange(case.longest), 0).amax(1)
    rewards[torch.arange(n_samples), last] = case.inputs.rewards
    value = advantage = torch.zeros(n_samples, dtype=torch.float64)
    reverse = []
    for t in reversed(range(case.longest)):
        error = rewards[:, t] + GAMMA * value - values[:, t]
        here = error + GAMMA * LAM * advantage
        value = values[:, t] * mask[:, t] + (1 - mask[:, t]) * value
        advantage = here * mask[:, t] + (1 - mask[:, t]) * advantage
        reverse.append(advantage)
    advantages = torch.stack(reverse[::-1], dim=1)
    return (advantages * mask)[rows], ((advantages + values) * mask)[rows]


def loop_time_major(case: Case) -> Columns:
    """[T, S] of trained tokens alone; a step is one multiply-add in place."""
    ops, n_samples = case.inputs.ops, len(case.inputs.rewards)
    rows = ops.mask.nonzero().squeeze(1)
    segment, lengths = case.segment.index_select(0, rows), ops.sequence_tokens
    step = torch.arange(len(rows)) - (lengths.cumsum(0) - lengths).index_select(0, segment)
    places, longest = step * n_samples + segment, int(lengths.max())
    own = case.inputs.columns["values"].index_select(0, rows)
    values = torch.zeros((longest + 1) * n_samples, dtype=torch.float64).scatter_(0, places, own).view(longest + 1, n_samples)
    advantages = values[1:] * GAMMA - values[:-1]
    trained = lengths > 0
    advantages[lengths[trained] - 1, trained.nonzero().squeeze(1)] += case.inputs.rewards[trained]
    for t in reversed(range(longest - 1)):
        advantages[t].add_(advantages[t + 1], alpha=GAMMA * LAM)
    found = advantages.view(-1).index_select(0, places)
    nothing = torch.zeros(len(ops.mask), dtype=torch.float64)
    return nothing.scatter(0, rows, found), nothing.scatter(0, rows, found + own)


def plain(case: Case, sample: int) -> Columns:
    """A Python loop over the tokens of one sample."""
    rows = (case.segment == sample).nonzero().squeeze(1)
    mask, values = case.inputs.ops.mask[rows].tolist(), case.inputs.columns["values"][rows].tolist()
    advantages, returns = [0.0] * len(rows), [0.0] * len(rows)
    value, advantage, reward = 0.0, 0.0, float(case.inputs.rewards[sample])
    for t in reversed(range(len(rows))):
        if mask[t]:
            advantage = reward + GAMMA * value - values[t] + GAMMA * LAM * advantage
            value, reward = values[t], 0.0
            advantages[t], returns[t] = advantage, advantage + value
    return torch.tensor(advantages, dtype=torch.float64), torch.tensor(returns, dtype=torch.float64)


VARIANTS: dict[str, Callable[[Case], Columns]] = {"gae": packed, "loop": loop, "loop_time_major": loop_time_major}


def largest_difference(case: Case, found: Columns, compared: int) -> float:
    """To both loops on everything, and to the plain one on some samples."""
    others = [loop(case), loop_time_major(case)]
    differences = [float((a - b).abs().max()) for other in others for a, b in zip(found, other, strict=True)]
    for sample in range(min(compared, len(case.inputs.rewards))):
        rows = case.segment == sample
        differences += [float((a[rows] - b).abs().max()) for a, b in zip(found, plain(case, sample), strict=True)]
    return max(differences)


def seconds(variant: str, case: Case) -> float:
    start = time.perf_counter()
    VARIANTS[variant](case)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, object] = {"benchmark": "gae", **vars(args), "gamma": GAMMA, "lam": LAM, "dtype": "float64"}
    wrong = False
    for name, shortest in (("ragged", 1), ("all_full", args.tokens)):
        case = Case.of(args.samples, args.tokens, shortest)
        difference = largest_difference(case, packed(case), compared=20)
        wrong = wrong or difference > 1e-10
        times = interleave({v: partial(seconds, v, case) for v in VARIANTS}, args.repeats)
        ratios = {v: round(median_ratio(times[v], times["gae"]), 2) for v in VARIANTS if v != "gae"}
        result[name] = {
            "rows": len(case.segment),
            "trained_tokens": case.inputs.ops.tokens,
            "seconds": {v: summary(values) for v, values in times.items()},
            "time_ratio": ratios,
            "largest_difference": difference,
        }
        against = ", ".join(f"{v} takes {r:.1f} ×" for v, r in ratios.items())
        print(f"{name}: gae {summary(times['gae'])['median'] * 1e3:.0f} ms; {against}; largest difference {difference:.1e}")
    if wrong:
        print("the results differ by more than 1e-10; nothing is written", file=sys.stderr)
        return 1
    print(f"written to {write_result('gae', result, ('torch', 'miles-core')).relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
