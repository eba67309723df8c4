"""What tests and benchmarks of linear_logprob iterate over: its backends, small cases, tolerances, costs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

BACKENDS: dict[str, Callable[[torch.device], bool]] = {"reference": lambda device: True}
"""Name of the module → whether it runs on this device; best first."""

LOGPROB_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
"""Largest |difference| of logprob and entropy from full float64 logits of the same (already rounded) inputs."""

GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest ‖difference‖ / ‖gradient‖ of a gradient from the same; half formats round the result itself."""


@dataclass(frozen=True)
class Case:
    """T rows of width D over a vocabulary of V, `chunk` rows at a time."""

    rows: int
    width: int
    vocab: int
    chunk: int | None = None
    temperature: float | None = 1.0
    """None: a tensor with a value a row."""
    bias: bool = False


SMALL_CASES = (
    Case(1, 1, 1),
    Case(1, 3, 2, temperature=0.5),
    Case(7, 5, 11, chunk=3, bias=True),
    Case(33, 16, 257, chunk=8, temperature=0.7),
    Case(64, 32, 1000, chunk=64, temperature=None),
    Case(130, 24, 515, chunk=50, temperature=None, bias=True),
)

BENCHMARK_CASE = Case(1024, 512, 32768)


def flops(case: Case, backward: bool) -> int:
    """Multiply-adds of the matmuls, twice: the logits, and with `backward` the logits again, dhidden and dweight."""
    return 2 * case.rows * case.width * case.vocab * (4 if backward else 1)
