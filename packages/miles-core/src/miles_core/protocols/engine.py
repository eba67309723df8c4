"""Engines that sample tokens, and the weights that reach them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from ..sample import SamplingSpan

if TYPE_CHECKING:  # torch is an extra; protocols only name its Tensor
    from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 leave the support unrestricted; temperature 0 is greedy.

    Attributes:
        max_tokens: Most tokens one call may generate.
        stop: Texts that end generation once they appear in what was generated (they stay part of it).
        stop_token_ids: Ids that end generation (they stay part of it); the end-of-text id is always one.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def span(self, start: int, end: int) -> SamplingSpan:
        """The record of these settings on a Sample."""
        return SamplingSpan(start, end, self.temperature, self.top_p, self.top_k, self.min_p)


@dataclass(frozen=True)
class GenerateRequest:
    """Continue a token sequence.

    Attributes:
        session: The trajectory's name; an engine may keep its KV cache under it until ``release``.
        tokens: int32 [T], the WHOLE context, T ≥ 1: earlier turns and injected tokens included.
        sampling: How to draw.
        key: 64-bit randomness key; the token at index t is drawn with ``uniform(key, t)``.
        routing_start: Routing rows before this one are already recorded and not wanted again.
    """

    session: str
    tokens: np.ndarray
    sampling: SamplingParams
    key: int
    routing_start: int = 0


@dataclass(frozen=True)
class Generation:
    """What was sampled after ``request.tokens``.

    Attributes:
        tokens: int32 [n].
        logprobs: float32 [n], under the distribution each was sampled from (temperature and support applied).
        versions: int32 [n], weight version that sampled each.
        finish: ``stop`` (end of text, a stop id or text), ``length`` (max_tokens or the context limit), ``abort``.
        routing: uint8 / uint16 [T + n − 1 − routing_start, L, K], or None for dense models; row r belongs to the token at index
            ``routing_start + r`` as an input.
        support: For each sampled token the ids it could be drawn from, where sampling was restricted; else None.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish: Literal["stop", "length", "abort"]
    routing: np.ndarray | None = None
    support: list[list[int]] | None = None


class WeightSource(Protocol):
    """Gives weights: a trainer."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) of every weight, in a fixed order, in the dtype the forward pass uses. Tied weights once. Where an
        adapter is trained (``BuildContext.lora``) it is the weights of that alone, by the names in PEFT's files.

        Taken from lazily and in a thread: it may wait for other processes, and need never hold all weights at a time.
        """
        ...

    async def export(self, directory: Path) -> None:
        """Write the weights as a Hugging Face directory (config, safetensors, tokenizer)."""
        ...


@runtime_checkable
class SharesMemory(Protocol):
    """A weight source that can keep its weights where an engine of its process reads them, so that a publish copies nothing."""

    def share_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Use these tensors, by Hugging Face name and with the values it has, as the memory of its weights from now on.

        Those that it holds in another form stay where they are. What it trains then changes under the engine: nothing may be sampled
        between a step and the publish after it.
        """
        ...


class WeightSink(Protocol):
    """Takes weights: an engine, or several that serve the same policy."""

    version: int
    """Version of the weights it serves."""

    def syncing(self) -> AbstractAsyncContextManager[None]:
        """Around all of a publish: what is sent, and what proves that it arrived.

        While the block runs nothing is sampled: requests wait. At its end the weights that arrived in it are stamped with their version
        and served. If it raises after weights changed, the engine serves nothing until another block succeeds. ``update_weights`` and
        ``load_weights`` are blocks of their own, and parts of the one they are called in (by its task or one that it started).
        """
        ...

    async def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights in place; tokens sampled from here on carry ``version``. ``weights`` is gone through once, in a thread.

        Raises:
            DataError: A name is unknown or missing, or a shape or dtype does not fit. The engine serves what it had, or nothing at all
                until an update succeeds; never a mixture.
        """
        ...

    async def load_weights(self, directory: Path, version: int) -> None:
        """The same from a Hugging Face directory on a disk that the engine can read."""
        ...

    async def checksum(self) -> str:
        """Digest of the weights it holds; equal on engines of one kind and layout that hold the same."""
        ...


class TakesBroadcasts(Protocol):
    """A weight sink whose processes can be in a process group with the run's."""

    async def broadcast_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """``WeightSink.update_weights`` through the group, which is made where there is none and anew after a failure."""
        ...


class WeightTransport(Protocol):
    """Carries weights from a trainer to engines and proves that they arrived."""

    async def publish(self, source: WeightSource, sinks: list[Any], version: int) -> dict[str, float]:
        """Give every sink the source's weights as ``version``, verify, and return metrics (bytes, seconds).

        Raises RunError naming the sink when what it holds differs from what was sent.
        """
        ...


class RolloutEngine(WeightSink, Protocol):
    """Samples tokens from a policy. Calls run concurrently; the engine batches them."""

    async def start(self) -> None:
        """Get ready: boot servers, connect. Called once, before anything but ``close``.

        Raises:
            ConfigError: It cannot be had as configured (missing environment, another version); says what to do.
            RunError: It did not come up; says where its log is.
        """
        ...

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample a continuation.

        Raises:
            DataError: A token id is outside the vocabulary, the context is empty, or it is longer than the engine takes.
            InfrastructureFailure: A server died or did not answer; the trajectory is issued again.
            RunError: No server is left, or an update of the weights failed.
        """
        ...

    async def release(self, session: str) -> None:
        """Forget a session's cache. Unknown sessions are fine."""
        ...

    async def close(self) -> None:
        """Stop; processes, threads and memory are gone afterwards, even if ``start`` failed or was never called."""
        ...
