"""linear against float64 maths, for each backend that runs here."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from miles_kernels import registry
from miles_kernels.ops.linear.spec import BACKENDS, CASES, TOLERANCE

CPU = torch.device("cpu")
USABLE = [name for name, usable in BACKENDS.items() if usable(CPU)]


def near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    return float((found.double() - expected).norm()) <= TOLERANCE[dtype] * float(expected.norm())


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.fixture(params=USABLE)
def form(request, monkeypatch):
    form = import_module(f"miles_kernels.ops.linear.{request.param}")
    if request.param == "onednn":
        monkeypatch.setattr(form, "ENOUGH", 1)  # small products too
    return form


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_results_are_those_of_float64(form, with_bias, dtype):
    for n, inside, outside in CASES:
        x, weight, bias, residual = tensors((n, inside), (outside, inside), (outside,), (n, outside), dtype=dtype)
        expected = x.double() @ weight.double().t() + (bias.double() if with_bias else 0)
        given = bias if with_bias else None
        assert near(form.product(x, weight, given), expected, dtype)
        assert near(form.added(residual.clone(), x, weight, given), expected + residual.double(), dtype)


def test_parts_of_larger_tensors_do(form):
    """Weights that lie side by side are views, and so are columns of what they gave."""
    x, weight = tensors((6, 20), (30, 10))
    part, rows = x[:, 3:13], weight[5:20]
    assert near(form.product(part, rows), part.double() @ rows.double().t(), torch.float32)
    assert near(form.product(rows.t(), part.new_ones(7, 15)), rows.double().t() @ part.new_ones(15, 7).double(), torch.float32)


def test_without_the_op_of_torch_there_is_the_reference(monkeypatch):
    """It is torch's own matter, and may be gone with its next version."""
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not BACKENDS["onednn"](CPU)
    registry._choose.cache_clear()
    try:
        assert registry.backend("linear", CPU) is import_module("miles_kernels.ops.linear.reference")
    finally:
        registry._choose.cache_clear()
