"""What linear_logprob promises besides its numbers: memory, only the gradients asked for, layouts, autocast, refusals."""

import importlib
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miles_kernels.ops.linear_logprob import linear_logprob, reference


class Allocations(TorchDispatchMode):
    """Elements of the largest storage made by an operation, most bytes alive at a time, and the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.operations: list[str] = []
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        existing = {t.untyped_storage()._cdata for t in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        self.operations.append(func.overloadpacket.__name__)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in existing and key not in self._seen:
                self._seen.add(key)
                self.largest = max(self.largest, size // tensor.element_size())
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._free, key, size)
        return result

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def make(rows: int = 6, width: int = 4, vocab: int = 9, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, width, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (rows,), generator=g)


# Memory


def test_allocations_sees_whole_logits():
    """The measure itself: plain torch does make T × V elements, and two such tensors are alive at once."""
    hidden, weight, _ = make(64, 8, 500)
    with Allocations() as seen:
        torch.log_softmax(hidden @ weight.T, -1)
    assert seen.largest == 64 * 500
    assert seen.peak == 2 * 64 * 500 * 4
    assert seen.alive == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_never_whole(dtype: torch.dtype):
    """Nor is the weight cast whole; its gradient is what is largest."""
    rows, width, vocab, chunk = 256, 64, 2000, 48
    hidden, weight, targets = make(rows, width, vocab, dtype)
    with Allocations() as seen:
        logprob, entropy = linear_logprob(hidden, weight, targets, chunk=chunk, temperature=0.9)
        (logprob.sum() + entropy.sum()).backward()
    assert seen.largest == vocab * width
    gradients = 4 * (rows * width + vocab * width) + weight.grad.nbytes
    assert seen.peak <= 4 * chunk * vocab + gradients + 20 * 4 * rows  # a chunk of logits, the gradients, and some vectors [T]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [16, 48, 256])
def test_log_probabilities_take_no_more_memory_than_one_chunk_of_logits(dtype: torch.dtype, chunk: int):
    rows, width, vocab = 1024, 16, 2000
    hidden, weight, targets = make(rows, width, vocab, dtype)
    with Allocations() as seen, torch.no_grad():
        linear_logprob(hidden, weight, targets, chunk=chunk)
    results = 4 * (4 * rows)  # logprob, entropy, logsumexp, temperature
    assert 4 * chunk * vocab / 2 < seen.peak - results <= 4 * chunk * vocab


@pytest.mark.parametrize(("least", "buffer"), [(1, 7), (64, 20)], ids=["bytes", "rows"])
def test_default_chunk_follows_the_budget(monkeypatch: pytest.MonkeyPatch, least: int, buffer: int):
    """A buffer has 5/16 of the rows: of 24 that fit in the bytes, of 64 that it should have at least."""
    monkeypatch.setattr(reference, "CHUNK_BYTES", 4 * 100 * 24)
    monkeypatch.setattr(reference, "CHUNK_ROWS", least)
    hidden, weight, targets = make(50, 4, 100)
    with Allocations() as seen, torch.no_grad():
        linear_logprob(hidden, weight, targets)
    assert seen.largest == buffer * 100


# Only what is needed


def test_no_weight_gradient_unless_asked_for():
    hidden, weight, targets = make(4, 300, 200)
    weight.requires_grad_(False)
    with Allocations() as seen:
        linear_logprob(hidden, weight, targets, chunk=2).logprob.sum().backward()
    assert seen.largest < weight.numel()
    assert hidden.grad is not None and weight.grad is None


def test_no_hidden_gradient_unless_asked_for():
    hidden, weight, targets = make()
    linear_logprob(hidden.detach(), weight, targets).entropy.sum().backward()
    assert hidden.grad is None and weight.grad is not None


def test_backward_without_entropy_skips_its_maths():
    def operations(name: str) -> list[str]:
        hidden, weight, targets = make()
        value = getattr(linear_logprob(hidden, weight, targets), name).sum()
        with Allocations() as seen:
            value.backward()
        return seen.operations

    assert len(operations("logprob")) < len(operations("entropy"))
    assert "exp_" in operations("logprob") and "exp_" not in operations("entropy")  # in place: log p is not needed


def test_no_gradient_of_gradients():
    hidden, weight, targets = make()
    (gradient,) = torch.autograd.grad(linear_logprob(hidden, weight, targets).logprob.sum(), hidden, create_graph=True)
    assert not gradient.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


# Layouts, dtypes, edges


def test_no_rows():
    hidden, weight, targets = make(0)
    logprob, entropy = linear_logprob(hidden, weight, targets)
    assert logprob.shape == entropy.shape == (0,) and logprob.dtype == torch.float32
    (logprob.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, 4)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_views_give_what_contiguous_tensors_give():
    hidden, weight, targets = make(8, 5, 11, torch.float64)
    views = [
        (hidden.detach().T.contiguous().T, weight.detach().T.contiguous().T, targets),
        (torch.stack([hidden.detach()] * 2, 1)[:, 1], torch.cat([weight.detach()] * 2, 1)[:, :5], torch.stack([targets] * 2, 1)[:, 0]),
    ]
    want = linear_logprob(hidden, weight, targets, chunk=3)
    (want.logprob + want.entropy).sum().backward()
    for h, w, y in views:
        assert not h.is_contiguous() and not w.is_contiguous()
        got = linear_logprob(h.requires_grad_(), w.requires_grad_(), y, chunk=3)
        (got.logprob + got.entropy).sum().backward()
        for ours, theirs in [(got.logprob, want.logprob), (got.entropy, want.entropy), (h.grad, hidden.grad), (w.grad, weight.grad)]:
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_autocast_changes_nothing():
    """bf16 matmuls under autocast would be off by about 1e-2; here not one bit."""
    hidden, weight, targets = make(16, 32, 50)
    want = linear_logprob(hidden, weight, targets)
    gradients = torch.autograd.grad(want.logprob.sum(), (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_logprob(hidden, weight, targets)
        under = torch.autograd.grad(got.logprob.sum(), (hidden, weight))
    assert torch.equal(got.logprob, want.logprob) and torch.equal(got.entropy, want.entropy)
    assert all(torch.equal(a, b) for a, b in zip(gradients, under, strict=True))


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_a_weight_cast_in_blocks_gives_what_a_whole_one_gives(chunk: int):
    hidden, weight, targets = make(40, 64, 30, torch.bfloat16)  # a buffer of 1, 2 or 6 rows: blocks of 1 or 2 rows of the weight

    def run(chunk: int) -> list[Tensor]:
        got = linear_logprob(hidden, weight, targets, chunk=chunk)
        return [*got, *torch.autograd.grad(got.logprob.sum() + got.entropy.sum(), (hidden, weight))]

    for ours, theirs in zip(run(chunk), run(10_000), strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=1e-5, rtol=2**-7)


def test_mixed_dtypes():
    """bf16 activations on float32 master weights: the maths is float32, each gradient has the dtype of its input."""
    hidden, weight, targets = make(8, 16, 30)
    half = hidden.detach().bfloat16().requires_grad_()
    got = linear_logprob(half, weight, targets)
    assert torch.equal(got.logprob, linear_logprob(half.float(), weight, targets).logprob)
    got.logprob.sum().backward()
    assert half.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_one_word_vocabulary_is_certain():
    hidden, weight, targets = make(3, 4, 1)
    logprob, entropy = linear_logprob(hidden, weight, targets)
    assert torch.equal(logprob, torch.zeros(3)) and torch.equal(entropy, torch.zeros(3))


# Refusals

H, W, Y = make()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"targets": torch.tensor([0, 1, 9, 2, -1, 3])}, r"targets\[2\] is 9, outside the vocabulary \[0, V = 9\)"),
        ({"targets": torch.tensor([0, 1, 2, 3, -100, 3])}, r"targets\[4\] is -100"),
        ({"targets": Y.int()}, r"targets must be int64 \[6\].*torch.int32 \[6\]"),
        ({"targets": Y[:5]}, r"targets must be int64 \[6\].*\[5\]"),
        ({"hidden": H[None]}, r"hidden must be \[T, D\].*\[1, 6, 4\] and \[9, 4\]"),
        ({"weight": W[:, :3]}, r"with one D.*\[6, 4\] and \[9, 3\]"),
        ({"weight": W[:0]}, "the vocabulary is empty"),
        ({"weight": W.to(torch.int8)}, "weight must be bfloat16.*torch.int8"),
        ({"hidden": H.detach().to(torch.float8_e4m3fn)}, "hidden must be bfloat16.*torch.float8_e4m3fn"),
        ({"hidden": H.to("meta")}, "weight is on cpu, hidden on meta"),
        ({"bias": torch.zeros(8)}, r"bias must be \[9\].*\[8\]"),
        ({"bias": torch.zeros(9, dtype=torch.int64)}, "bias must be bfloat16.*torch.int64"),
        ({"temperature": 0.0}, "temperature must be positive and finite; it is 0.0"),
        ({"temperature": -1}, "it is -1"),
        ({"temperature": float("nan")}, "it is nan"),
        ({"temperature": torch.tensor([1, 1, 1, 0.0, 1, -1])}, "positive and finite; for row 3 it is 0.0"),
        ({"temperature": torch.tensor([1, float("inf"), 1, 1, 1, 1])}, "for row 1 it is inf"),
        ({"temperature": torch.ones(5)}, r"float tensor \[6\].*\[5\]"),
        ({"temperature": torch.ones(6, dtype=torch.int64)}, r"float tensor \[6\].*int64"),
        ({"temperature": torch.ones(6, requires_grad=True)}, "temperature requires grad"),
        ({"chunk": 0}, "chunk is a number of rows, at least 1; it is 0"),
        ({"chunk": 2.5}, "it is 2.5"),
        ({"vocab_start": 4}, "vocab_start is 4, but without a group"),
    ],
)
def test_bad_input_is_a_sentence(change: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        linear_logprob(**{"hidden": H, "weight": W, "targets": Y, **change})


def test_works_without_triton(monkeypatch: pytest.MonkeyPatch):
    """Imported afresh where `import triton` fails."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "miles_kernels"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    op = importlib.import_module("miles_kernels.ops.linear_logprob")
    assert op.linear_logprob is not linear_logprob
    assert torch.equal(op.linear_logprob(H, W, Y).logprob, linear_logprob(H, W, Y).logprob)
