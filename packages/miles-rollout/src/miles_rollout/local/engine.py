"""``rollout_engine: local``: concurrent requests, one serving task, one thread that runs the model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from miles_core.adapters import Adapter
from miles_core.digests import checksum
from miles_core.errors import ConfigError, DataError, InfrastructureFailure, MilesError, RunError
from miles_core.model_files import ends_of_text
from miles_core.protocols import BuildContext, GenerateRequest, Generation

from ..gate import Gate
from ..plugins import LocalEngineConfig
from ..requests import check_request
from .model import SlotModel, load_model
from .scheduler import Call, Release, Scheduler
from .stops import Stops
from .weights import Weights, read_weights

T = TypeVar("T")

GATHERING = 0.001
"""Seconds for which an engine that was idle waits for one more request before it begins."""


class LocalEngine:
    """A RolloutEngine over a Hugging Face model in this process.

    Everything that touches the model runs in one thread, one thing at a time: the event loop stays alive, and an update of the
    weights happens between two steps. Sequences that were running go on under the new weights from the next token on, with their
    context run again; tokens already sampled keep logprob and version.

    A failure in a step is raised in every call that waits; the engine forgets all sessions and can be used again.
    """

    def __init__(self, config: LocalEngineConfig, context: BuildContext) -> None:
        """Load the model.

        Raises:
            ConfigError: There is no model, its kind is not supported, or ``max_length`` is more than it has positions.
            DataError: An adapter belongs to another model.
        """
        if context.model_path is None:
            raise ConfigError("the local engine samples from a model, and its context names none (model_path)")
        dtype = config.dtype or ("float32" if context.device == "cpu" else "bfloat16")
        model = load_model(context.model_path, getattr(torch, dtype), torch.device(context.device))
        self.max_length = _max_length(config.max_length, model)
        self._adapter = Adapter(model, context.lora, context.model_path) if context.lora else None
        with self._adapter.noisy() if self._adapter else nullcontext():
            self._model = SlotModel(model, context.bitwise)
        self._weights = Weights(model, self._adapter)
        self._stops = Stops(context.tokenizer, ends_of_text(context.model_path, context.tokenizer), self._model.vocab_size)
        self._max_batch = config.max_batch
        self._scheduler = Scheduler(self._model, self._stops, config.max_batch, self.max_length)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="miles-local-engine")
        self._inbox: list[Call | Release] = []
        self._calls: dict[str, Call] = {}
        self._wake = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None
        self._gate = Gate("local")
        self._closed = False

    async def start(self) -> None:
        """Ready as it is built."""

    @property
    def version(self) -> int:
        """Version of the weights it samples with."""
        return self._scheduler.version

    def stats(self) -> dict[str, float]:
        """Since the start: ``generated_tokens``, ``prefill_tokens``, ``decode_steps``, ``seconds_busy``; and ``fused``: 1 where decoding
        is one fused step (``fused.FAMILIES``), 0 where the model runs module by module."""
        return {name: float(value) for name, value in asdict(self._scheduler.stats).items()} | {"fused": float(self._model.fused)}

    # ---- generation ---------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample a continuation; see RolloutEngine.

        Raises:
            DataError: The request is malformed, names a token outside the vocabulary or fills the context already, or its session
                has another call running.
            InfrastructureFailure: A step failed, or the engine was closed meanwhile.
            RunError: It was closed before, or an update of the weights failed.
        """
        self._check(request)
        call = Call(request, self._stops.may_end(request.sampling), asyncio.get_running_loop().create_future())
        self._calls[request.session] = call
        self._post(call)
        try:
            return await call.reply
        except asyncio.CancelledError:
            self._post(Release(request.session))
            raise
        finally:
            if self._calls.get(request.session) is call:
                del self._calls[request.session]

    async def release(self, session: str) -> None:
        """Forget a session's cache. Unknown sessions are fine. Raises DataError while a call of it runs: cancel that first."""
        if session in self._calls:
            raise DataError(f"session {session!r} is released while its call still runs; cancel the call first")
        self._post(Release(session))

    def _check(self, request: GenerateRequest) -> None:
        if self._closed:
            raise RunError(f"session {request.session!r} asks for a generation of an engine that is closed")
        if request.session in self._calls:
            raise DataError(f"session {request.session!r} has a call running already; a session generates one continuation at a time")
        check_request(request, self._model.vocab_size, self.max_length)

    def _post(self, message: Call | Release) -> None:
        """To the serving task, which takes messages in order."""
        self._inbox.append(message)
        if isinstance(message, Call) and (self._serving is None or self._serving.done()):
            self._wake = asyncio.Event()
            self._serving = asyncio.get_running_loop().create_task(self._serve(), name="miles-local-engine")
        self._wake.set()

    async def _serve(self) -> None:
        while True:
            try:
                await self._serve_some()
            except Exception as error:
                self._fail_all(error)
                await self._in_worker(self._scheduler.reset)

    async def _serve_some(self) -> None:
        """Wait for something to do, run steps until one finishes something, and hand that back."""
        if self._scheduler.idle:
            if not self._inbox:
                self._wake.clear()
                await self._wake.wait()
            await self._until_all_are_here()
        await self._gate.passed()
        inbox, self._inbox = self._inbox, []
        for call, generation in await self._in_worker(self._steps, inbox):
            if not call.reply.done():
                call.reply.set_result(generation)
        await asyncio.sleep(0)  # callers whose next request is ready at once get into the next step

    async def _until_all_are_here(self) -> None:
        """Whoever samples many sequences sends one after the other; steps that begin without them cost as much as with them."""
        seen = 0
        while seen < len(self._inbox) < self._max_batch:
            seen = len(self._inbox)
            await asyncio.sleep(GATHERING)

    def _steps(self, inbox: list[Call | Release]) -> list[tuple[Call, Generation]]:
        """In the worker: going back to the event loop costs about as much as 10 rows, so not after every step."""
        finished = self._scheduler.step(inbox)
        while not (finished or self._inbox or self._gate.is_closed or self._closed or self._scheduler.idle):
            finished = self._scheduler.step([])
        return finished

    def _fail_all(self, error: Exception) -> None:
        """Every caller that waits gets an error of its own."""
        self._inbox.clear()
        for call in self._calls.values():
            if isinstance(error, MilesError | InfrastructureFailure):
                failure: Exception = type(error)(*error.args)
            else:
                failure = InfrastructureFailure(f"the local engine failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            if not call.reply.done():
                call.reply.set_exception(failure)

    async def _in_worker(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    # ---- weights ------------------------------------------------------------------------------------------------------

    def syncing(self) -> AbstractAsyncContextManager[None]:
        """The step in progress ends, then nothing is sampled while the block runs. See WeightSink."""
        return self._gate.closed(self._hold, self._serve_version)

    async def _hold(self) -> None:
        if self._closed:
            raise RunError("new weights came to an engine that is closed")
        await self._in_worker(lambda: None)

    async def _serve_version(self, version: int | None) -> None:
        if version is not None:
            self._scheduler.version = version

    async def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights between two steps; see WeightSink. Raises DataError; nothing was changed then."""
        async with self.syncing():
            before, self._gate.changing = self._gate.changing, version
            try:
                await self._in_worker(self._replace, weights)
            except Exception:  # all or nothing; who was cancelled does not know
                self._gate.changing = before
                raise

    def _replace(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._weights.replace(weights)
        self._scheduler.drop_caches()

    async def load_weights(self, directory: Path, version: int) -> None:
        """Replace the weights by those of a Hugging Face directory (an adapter's: PEFT); see WeightSink. Raises DataError, too where an
        adapter was trained beside other weights than the engine's; nothing was changed then."""
        if self._adapter is not None:
            self._adapter.check_base(directory)
        await self.update_weights(read_weights(directory), version)

    async def checksum(self) -> str:
        """Digest of the weights it holds."""
        return await self._in_worker(lambda: checksum(self.named_weights()))

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, view of what the model holds) of every weight, tied weights once; of an adapter its weights alone."""
        yield from self._weights.views.items()

    # ---- the end ------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Stop: the step in progress ends, calls that still wait fail, the thread is gone afterwards. Twice is fine."""
        if self._closed:
            return
        self._closed = True
        if self._serving is not None and not self._serving.done():
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        self._fail_all(InfrastructureFailure("the engine was closed"))
        await self._in_worker(self._scheduler.reset)
        self._worker.shutdown()
        self._weights.views.clear()
        self._model.close()


def _max_length(asked: int | None, model: PreTrainedModel) -> int:
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = asked or positions
    if length is None:
        raise ConfigError(f"{type(model).__name__} does not say how many positions it has; give the engine max_length")
    if positions is not None and length > positions:
        raise ConfigError(f"the engine's max_length is {length}, but the model has {positions} positions; lower it")
    return length
