"""Data for JSON, which knows no NaN and no infinity."""

from __future__ import annotations

import math
from typing import Any


def finite(data: Any) -> Any:
    """The same data with None for each float that is not finite, however deep it lies; tuples become lists."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    return [finite(value) for value in data] if isinstance(data, list | tuple) else data
