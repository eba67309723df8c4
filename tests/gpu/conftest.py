"""Tests of this folder need a CUDA device; all of them are marked ``gpu``. ``.ci/gpu`` says how they get to a machine that has one."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no CUDA device here")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
