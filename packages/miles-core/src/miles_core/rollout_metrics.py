"""What the samples of a step were like, as numbers of its row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .refs import SampleRef
from .sample import Status


def rollout_metrics(refs: Sequence[SampleRef]) -> dict[str, float | int | str]:
    """What a step's samples were like; rewards once a trajectory."""
    rewards = list({(r.id.policy, r.id.group, r.id.trajectory): r.reward for r in refs if r.reward is not None}.values())
    out: dict[str, float | int | str] = {
        "trajectories": len({(r.id.policy, r.id.group, r.id.trajectory) for r in refs}),
        "sampled_tokens": sum(r.sampled for r in refs),
        "length/mean": float(np.mean([r.length for r in refs])),
        "length/sampled": float(np.mean([r.sampled for r in refs])),
        "truncated": float(np.mean([r.status == Status.TRUNCATED for r in refs])),
    }
    if rewards:
        out |= {"reward": float(np.mean(rewards)), "reward/std": float(np.std(rewards))}
    parts: dict[str, list[float]] = {}
    for trajectory in {(r.id.policy, r.id.group, r.id.trajectory): r.rewards for r in refs}.values():
        for name, value in trajectory.items():
            parts.setdefault(name, []).append(value)
    return out | {f"rewards/{name}": float(np.mean(values)) for name, values in parts.items()}
