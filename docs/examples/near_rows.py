"""ratio_correction: what to do about tokens that the trainer finds much more or less likely than the engine that sampled them did.

In a recipe:

    models: {policy: {corrections: {near: {use: "near_rows:near_rows", nats: 0.5}}}}
"""

from miles_core.protocols import CorrectionOutputs


def near_rows(inputs, *, nats: float = 0.5):
    """Rows [N] that are too far leave the batch and its denominators. ``weights`` would scale them instead."""
    far = (inputs.trainer - inputs.rollout).abs() > nats
    dropped = (far & inputs.ops.mask).sum() / max(inputs.ops.tokens, 1)
    return CorrectionOutputs(keep=~far, metrics={"dropped": float(dropped)})
