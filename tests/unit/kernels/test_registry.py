"""The choice of a backend: best usable first, overridden by name, said once."""

import logging
from types import SimpleNamespace

import pytest
import torch

from miles_kernels import registry
from miles_kernels.ops.linear_logprob import reference, spec

CPU = torch.device("cpu")
VARIABLE = "MILES_KERNEL_LINEAR_LOGPROB"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    registry._choose.cache_clear()
    yield
    registry._choose.cache_clear()


def test_reference_is_chosen_and_said_once(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="miles_kernels.registry"):
        assert registry.backend("linear_logprob", CPU) is reference
        assert registry.backend("linear_logprob", CPU) is reference
    assert [record.message for record in caplog.records] == ["linear_logprob on cpu: reference"]


def test_override_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv(VARIABLE, "reference")
    with caplog.at_level(logging.INFO, logger="miles_kernels.registry"):
        assert registry.backend("linear_logprob", CPU) is reference
    assert [record.message for record in caplog.records] == [f"linear_logprob on cpu: reference (by {VARIABLE})"]


def test_empty_override_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "")
    assert registry.backend("linear_logprob", CPU) is reference


def test_unknown_override_is_an_error_that_lists_the_backends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match=f"{VARIABLE}=fast: linear_logprob has no such backend; it has reference"):
        registry.backend("linear_logprob", CPU)


def test_best_usable_first(monkeypatch: pytest.MonkeyPatch):
    """A backend is asked whether it can run here, and only the chosen module is imported."""
    modules = {
        "miles_kernels.ops.linear_logprob.spec": SimpleNamespace(
            BACKENDS={"gpu_only": lambda device: device.type == "cuda", "reference": lambda _: True}
        ),
        "miles_kernels.ops.linear_logprob.gpu_only": "the gpu module",
        "miles_kernels.ops.linear_logprob.reference": "the reference module",
    }
    monkeypatch.setattr(registry, "import_module", modules.__getitem__)
    assert registry.backend("linear_logprob", torch.device("cuda:0")) == "the gpu module"
    assert registry.backend("linear_logprob", CPU) == "the reference module"
    monkeypatch.setenv(VARIABLE, "gpu_only")
    with pytest.raises(ValueError, match="this backend cannot run on cpu; here linear_logprob has reference"):
        registry.backend("linear_logprob", CPU)


def test_no_usable_backend_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spec, "BACKENDS", {"reference": lambda _: False})
    with pytest.raises(ValueError, match=r"linear_logprob cannot run on cpu: none of its backends \(reference\) can"):
        registry.backend("linear_logprob", CPU)
