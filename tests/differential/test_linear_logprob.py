"""linear_logprob against the same numbers from whole logits: torch in float64, and the formula written out in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miles_kernels.ops.linear_logprob import linear_logprob
from miles_kernels.ops.linear_logprob.spec import BACKENDS, GRADIENT_TOLERANCE, LOGPROB_TOLERANCE, SMALL_CASES, Case

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[name for name, usable in BACKENDS.items() if usable(torch.device("cpu"))], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILES_KERNEL_LINEAR_LOGPROB", request.param)


def inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor | float | int | None]:
    """Arguments of linear_logprob with logits of a few units; leaves that require grad."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "hidden": normal(case.rows, case.width).to(dtype).requires_grad_(),
        "weight": (normal(case.vocab, case.width) * (3 / case.width**0.5)).to(dtype).requires_grad_(),
        "targets": torch.randint(case.vocab, (case.rows,), generator=g),
        "temperature": case.temperature or 0.5 + torch.rand(case.rows, generator=g, dtype=torch.float32),
        "bias": normal(case.vocab).to(dtype).requires_grad_() if case.bias else None,
        "chunk": case.chunk,
    }


def whole_logits(hidden, weight, targets, temperature, bias, chunk=None) -> tuple[Tensor, Tensor]:
    """logprob and entropy by log_softmax of all the logits, in float64."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logp = torch.log_softmax(logits / torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1), dim=-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def numpy_formula(hidden, weight, targets, temperature, bias, chunk=None) -> tuple[np.ndarray, np.ndarray]:
    """z = (h Wᵀ + b) / τ;  log p = z − log Σ exp z;  H = −Σ p log p."""
    h, w = (x.detach().double().numpy() for x in (hidden, weight))
    z = (h @ w.T + (0 if bias is None else bias.detach().double().numpy())) / np.asarray(temperature, dtype=np.float64).reshape(-1, 1)
    logp = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return logp[np.arange(len(h)), targets.numpy()], -(np.exp(logp) * logp).sum(axis=1)


def gradients(function, arguments: dict) -> list[Tensor]:
    """Gradients of hidden, weight (and bias) of a sum of logprobs and entropies in which every row has weights of its own."""
    logprob, entropy = function(**arguments)
    a = torch.linspace(-1, 2, len(logprob), dtype=torch.float64)
    leaves = [arguments[k] for k in ("hidden", "weight", "bias") if arguments[k] is not None]
    return list(torch.autograd.grad((a * logprob).sum() + ((1 - 0.5 * a) * entropy).sum(), leaves))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_values_are_those_of_whole_logits(case: Case, dtype: torch.dtype):
    arguments = inputs(case, dtype)
    got = linear_logprob(**arguments)
    tolerance = LOGPROB_TOLERANCE[dtype]
    for ours, torch_, numpy_ in zip(got, whole_logits(**arguments), numpy_formula(**arguments), strict=True):
        assert ours.shape == (case.rows,)
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(ours.double(), torch_, atol=tolerance, rtol=0)
        torch.testing.assert_close(ours.detach().double(), torch.from_numpy(numpy_), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_gradients_are_those_of_whole_logits(case: Case, dtype: torch.dtype):
    arguments = inputs(case, dtype)
    for ours, theirs in zip(gradients(linear_logprob, arguments), gradients(whole_logits, arguments), strict=True):
        assert ours.dtype == dtype
        difference = torch.linalg.vector_norm(ours.double() - theirs.double())
        assert difference <= GRADIENT_TOLERANCE[dtype] * torch.linalg.vector_norm(theirs.double()) + 1e-12


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(1, 6), st.integers(1, 17), st.integers(1, 11), st.booleans(), st.sampled_from([0.3, 1.0, None]))
def test_ragged_shapes_do_not_depend_on_the_chunk(rows: int, width: int, vocab: int, chunk: int, bias: bool, temperature: float | None):
    arguments = inputs(Case(rows, width, vocab, None, temperature, bias), torch.float64, seed=rows + 10 * vocab)
    chunked = {**arguments, "chunk": chunk}
    for ours, whole, reference in zip(linear_logprob(**chunked), linear_logprob(**arguments), whole_logits(**arguments), strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-12, rtol=0)
        torch.testing.assert_close(ours, reference, atol=1e-12, rtol=0)
    for ours, whole in zip(gradients(linear_logprob, chunked), gradients(linear_logprob, arguments), strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", [0.7, None], ids=["number", "tensor"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_gradcheck(bias: bool, temperature: float | None):
    arguments = inputs(Case(5, 3, 7, chunk=2, temperature=temperature, bias=bias), torch.float64)
    leaves = [k for k in ("hidden", "weight", "bias") if arguments[k] is not None]
    assert torch.autograd.gradcheck(
        lambda *values: tuple(linear_logprob(**{**arguments, **dict(zip(leaves, values, strict=True))})),
        tuple(arguments[k] for k in leaves),
    )


def test_large_logits_neither_overflow_nor_lose_the_tail():
    """Logits of ±1000: exp of them is not representable, their differences are."""
    hidden, weight, targets = torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0], [0.99]]), torch.tensor([1])
    got = linear_logprob(hidden, weight, targets)
    want = whole_logits(hidden, weight, targets, 1.0, None)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-7)
