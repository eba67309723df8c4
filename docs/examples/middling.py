"""group_filter: which groups are trained on; a dropped one is replaced by a new prompt.

In a recipe:

    group_filters: {middling: {use: "middling:middling", low: 0.1, high: 0.9}}
"""

import numpy as np


def middling(group, *, low: float = 0.1, high: float = 0.9):
    """None keeps a group, a text drops it and says why. A trajectory's reward counts once, however many samples it has."""
    mean = np.mean(group.rewards()["policy"])
    if mean < low:
        return "too hard"
    return "too easy" if mean > high else None
