"""aggregation: how rows add up to the loss of an optimizer step.

In a recipe:

    models: {policy: {aggregation: "root_length:root_length"}}
"""


def root_length(ops):
    """Between a mean over tokens and a mean over sequences: an answer weighs as the root of its length. Returns [N], a weight a row.

    Only ``ops`` knows the denominators of the whole step, so the gradient is the same however the step is cut up.
    """
    length = ops.spread(ops.sequence_tokens).double().clamp(min=1)
    return 1 / (length.sqrt() * max(ops.sequences, 1))
