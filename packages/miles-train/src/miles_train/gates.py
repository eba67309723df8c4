"""Bounds on the mismatch between trainer and rollout engine, past which a step is refused before it changes a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping

from miles_core.errors import RunError

from .plugins import Gates

MISMATCH = {"float32": 5e-3, "bfloat16": 0.1}
"""Default bound of ``mismatch/mean_abs`` by the dtype of the trainer's forward pass, in nats.

float32: one engine for both gives 1e-6 to 5e-5 (our own runs); two engines 2e-3 (root mean square, Fast-LLM against vLLM,
ServiceNow/Fast-LLM#525); a bfloat16 engine under a float32 trainer would give about 1e-2, which is not what was asked for.
bfloat16: 0.011 is usual for a dense 4B model (vLLM and SGLang against Megatron, vllm-project/vime#64), 0.04 was seen for a large MoE
and 0.067 with FP8 (radixark/miles#2722); NeMo-RL's tests ask for a mean of exp |d| below 1.05, some below 1.1. Where something was
broken, 0.2 and more were reported (Gen-Verse/OpenClaw-RL#69)."""

WHERE_TO_LOOK = (
    "The engine gave other log-probabilities to tokens that it sampled with these very weights. Look at: the weight sync (did every "
    "tensor arrive, quantised as the trainer thinks?); dtype and numerics of engine and trainer; whether temperature and top_p, top_k "
    "or min_p were what the samples say."
)


def check_gates(metrics: Mapping[str, float], gates: Gates, dtype: str, bitwise: bool = False) -> None:
    """Raise a RunError if the mismatch is out of bounds.

    Policy drift (older tokens) never matters here. Without a fresh token there is nothing to compare, and nothing is raised. What is
    not a number is out of bounds.

    Args:
        metrics: Of ``mismatch_metrics``.
        gates: The bounds.
        dtype: Of the trainer's forward pass, e.g. ``float32``.
        bitwise: Whether engine and trainer promised the same bits: then any difference is out of bounds.
    """
    if "mismatch/mean_abs" not in metrics:
        return
    if bitwise and metrics["mismatch/max_abs"] != 0:
        raise RunError(
            f"mismatch/max_abs is {metrics['mismatch/max_abs']:.3g} nats, and numerics: bitwise promises 0. Did every weight arrive, and "
            "does the engine serve this model? Then it is a bug in Miles, or this machine changes its mind (threads, kernels)"
        )
    bound = MISMATCH[dtype] if gates.mismatch is None else gates.mismatch
    mean_abs, ess = metrics["mismatch/mean_abs"], metrics["mismatch/ess"]
    if bound < math.inf and not mean_abs <= bound:
        worst = metrics["mismatch/max_abs"]
        raise RunError(
            f"mismatch/mean_abs is {mean_abs:.3g} nats (largest: {worst:.3g}), more than the bound {bound:g} of a {dtype} trainer. "
            f"{WHERE_TO_LOOK} Where this is meant to be so, set trainer.gates.mismatch higher (.inf: no bound)"
        )
    if gates.ess > 0 and not ess >= gates.ess:
        raise RunError(
            f"mismatch/ess is {ess:.3g}, less than the bound {gates.ess:g}: a few tokens carry the weight of all. "
            f"{WHERE_TO_LOOK} Where this is meant to be so, set trainer.gates.ess lower (0: no bound)"
        )
