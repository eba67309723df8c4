"""Backends of linear, and the shapes and tolerances that tests iterate over."""

from collections.abc import Callable

import torch


def _onednn(device: torch.device) -> bool:
    """oneDNN is there, with the op that torch's inductor uses, and knows this processor's AVX-512; where it has less, MKL is as fast."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return device.type == "cpu" and there and torch.backends.cpu.get_cpu_capability() == "AVX512"


BACKENDS: dict[str, Callable[[torch.device], bool]] = {"onednn": _onednn, "reference": lambda device: True}
"""Name of the module → whether it runs on this device; best first."""

CASES = ((1, 1, 1), (7, 5, 3), (0, 5, 4), (64, 96, 192), (200, 96, 577))
"""Rows, in and out."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest ‖difference‖ / ‖result‖ from float64 maths of the same inputs; half formats round the result itself."""
