"""``rollout_engine: sglang``: SGLang servers that are started here or reached at their URLs, as one engine."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from miles_core.errors import ConfigError, InfrastructureFailure, RunError
from miles_core.protocols import BuildContext, GenerateRequest, Generation
from miles_core.waiting import gather

from ..fleet import Fleet
from ..gate import Gate
from ..local.stops import Stops
from ..plugins import SglangEngineConfig
from ..requests import check_request
from .answers import Generated, ServerInfo
from .client import SglangClient, Silence
from .continuation import Continuation
from .environment import find
from .fitting import check_alike
from .server import ServerProcess
from .servers import CLEAN_UP_SECONDS, Server, Setup
from .shape import ModelShape
from .updates import IN_REQUESTS, THROUGH_GROUPS, send_weights

T = TypeVar("T")

INTERRUPT_SECONDS = 0.2
"""How long a server may take to hand back what is aborted before it is told again; a request may have been on its way to it."""


class SglangEngine:
    """A RolloutEngine over SGLang servers of one policy.

    Versions, log-probabilities and routing of a token are those it was sampled with. For a change of weights running requests are
    taken back with what they have sampled, and go on under the new weights where they stopped: their context is run again, what was
    recorded of it stays as it was.

    SGLang draws from one generator a server, in the order in which its batches happen to be: a request's ``key`` is not honoured, and
    two runs differ. Its ``sampling_seed`` is read only with ``--enable-deterministic-inference``, which needs a GPU. Where ``top_k`` and
    ``top_p`` are both given, ``top_p`` counts over the whole distribution, not over what ``top_k`` leaves; the support says what was left.
    """

    def __init__(self, config: SglangEngineConfig, context: BuildContext) -> None:
        """Nothing is started or asked yet.

        Raises:
            ConfigError: There is no model, or the variable of the API key is not set.
        """
        if context.model_path is None:
            raise ConfigError("the sglang engine serves a model, and its context names none (model_path)")
        if config.key_variable is not None and config.key_variable not in os.environ:
            raise ConfigError(f"the sglang engine's key_variable names {config.key_variable}, which is not set in the environment")
        self._config, self._context, self._model_path = config, context, context.model_path
        self._dtype = config.dtype or ("float32" if context.device == "cpu" else "bfloat16")
        self.version = 0
        self.max_length = 0
        self._fleet: Fleet[Server] = Fleet([])
        self._servers: list[Server] = []
        self._processes: list[ServerProcess] = []
        self._running: set[asyncio.Task[Generated]] = set()
        self._gate = Gate("sglang", "it was not started")
        self._closed = False

    # ---- start and end ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Read what the model is like, boot or reach all servers at once, and see that they fit it and each other; see RolloutEngine."""
        self._model = await asyncio.to_thread(ModelShape.read, self._model_path)
        own = self._context.tokenizer.eos_token_id if self._context.tokenizer is not None else None
        self._ends = self._model.end_of_text | ({own} if own is not None else set())
        self._stops = Stops(self._context.tokenizer, frozenset(self._ends), self._model.vocab_size)
        setup = Setup(self._config, self._context, self._model_path, self._model, self._dtype)
        if self._config.urls:
            key = os.environ[self._config.key_variable] if self._config.key_variable else None
            servers = [setup.reach(i, url, key) for i, url in enumerate(self._config.urls)]
        else:
            interpreter = Path(self._config.interpreter) if self._config.interpreter else await asyncio.to_thread(find, "sglang-cpu")
            servers = await gather(setup.boot(i, interpreter, self._processes) for i in range(self._config.servers))
        self._servers, self._fleet = servers, Fleet(servers)
        infos = await gather(setup.inspect(server) for server in servers)
        check_alike({server.name: info.layout for server, info in zip(servers, infos, strict=True)})
        self.max_length = _max_length(self._config.max_length, infos)
        await self.checksum()
        self._gate.unusable = None

    async def close(self) -> None:
        """Stop the servers that were started here and close the connections to the others. Twice is fine."""
        self._closed = True
        self._gate.shut("it was closed")
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(set(self._running))
        servers, self._servers = self._servers, []
        processes, self._processes = self._processes, []
        closed = [server.close() for server in servers] + [process.stop() for process in processes]
        failures = [r for r in await asyncio.gather(*closed, return_exceptions=True) if isinstance(r, BaseException)]
        if failures:
            raise failures[0]

    # ---- generation ---------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample a continuation; see RolloutEngine. Not with ``request.key``: see the class.

        Raises:
            DataError: The request is malformed, names a token outside the vocabulary, fills the context already, or a server refuses it.
            InfrastructureFailure: A server died, did not answer in time or answered what cannot be right, and others are left.
            RunError: No server is left, or an update of the weights failed.
        """
        await self._gate.passed()
        check_request(request, self._model.vocab_size, self.max_length)
        continuation = Continuation(request, self._model, self._stops, self.max_length)
        while not continuation.ended:
            await self._gate.passed()
            segment = asyncio.ensure_future(self._segment(continuation))
            self._running.add(segment)
            try:
                generated = await segment
            except asyncio.CancelledError:
                if self._closed and not _cancelled_from_outside():
                    raise InfrastructureFailure("the sglang engine was closed while it generated") from None
                raise
            finally:
                self._running.discard(segment)
            continuation.add(generated, resumes=self._gate.is_closed)
        return continuation.result()

    async def release(self, session: str) -> None:
        """Nothing to forget: SGLang keeps what it has room for, by content."""

    async def _segment(self, continuation: Continuation) -> Generated:
        """One request of one server."""
        with self._fleet.lease() as server:
            return await self._using(
                server,
                server.client.generate(
                    continuation.tokens,
                    continuation.sampling,
                    continuation.room,
                    routing_start=continuation.routing_start,
                    end_of_text=tuple(self._ends),
                ),
            )

    async def _using(self, server: Server, call: Awaitable[T]) -> T:
        """Await a call; if it fails and the server is gone, leave that out from here on. Raises RunError if it was the last."""
        try:
            return await call
        except InfrastructureFailure as failure:
            if isinstance(failure, Silence) or await server.gone():
                await self._lose(server, failure)
                self._fleet.require_living()
            raise

    async def _lose(self, server: Server, why: InfrastructureFailure) -> None:
        """Leave a server out from here on; one that was started here is stopped, lest it go on for nobody."""
        self._fleet.lose(server, str(why))
        if server.process is not None:
            await server.process.stop()
        await server.leave_group()

    # ---- weights ------------------------------------------------------------------------------------------------------

    async def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights by value on every server; see WeightSink.

        Raises:
            DataError: A name is unknown or missing, or a shape or dtype does not fit. Names and shapes are compared with the model's
                directory bucket by bucket, before each is sent: the engine serves what it had if that was found in the first, else nothing.
            RunError: A server refuses, none is left, or one does not hold the version afterwards; the engine serves nothing then.
        """
        checked = self._model.checked(weights, self._dtype)
        async with self.syncing():
            await send_weights(checked, self._on_all, lambda: self._changing(version), IN_REQUESTS)

    async def broadcast_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """The same through a process group with every server; see TakesBroadcasts. Servers must be on this machine.

        Raises:
            DataError, RunError: As ``update_weights``, or a server did not come to the group. The next call makes new groups.
        """
        checked = self._model.checked(weights, self._dtype)
        async with self.syncing():
            try:
                await self._on_all(lambda server: server.join_group(self._config.control_timeout_s))
                await send_weights(checked, self._on_all, lambda: self._changing(version), THROUGH_GROUPS)
            except BaseException:
                await gather(server.leave_group() for server in self._servers)
                raise

    async def load_weights(self, directory: Path, version: int) -> None:
        """Replace the weights by those of a Hugging Face directory that the servers can read; see WeightSink."""
        found = await asyncio.to_thread(ModelShape.read, directory)
        self._model.check_same(found, directory)
        async with self.syncing():
            self._changing(version)
            await self._on_all(lambda server: server.client.load_from_disk(directory.absolute()))

    async def checksum(self) -> str:
        """Digest of the parameters that every server holds.

        Raises:
            RunError: They differ; names the servers.
        """
        digests_by_server: dict[str, str] = {}

        async def ask(server: Server) -> None:
            digests_by_server[server.name], _ = await server.client.checksum()

        await self._on_all(ask)
        servers = [server for server in self._servers if server.name in digests_by_server]
        digests = [digests_by_server[server.name] for server in servers]
        if different := [server.name for server, digest in zip(servers, digests, strict=True) if digest != digests[0]]:
            raise RunError(
                f"{', '.join(different)} does not hold the same weights as {servers[0].name} (checksums {digests}); publish them again"
            )
        return digests[0]

    def syncing(self) -> AbstractAsyncContextManager[None]:
        """Running requests are taken back, they and new ones wait; servers that others use too are paused. See WeightSink."""
        return self._gate.closed(self._hold, self._serve, self._resume_after_failure)

    async def _hold(self) -> None:
        if self._servers == []:
            self._gate.require_usable()
        await self._take_back()
        await self._on_all(_pause_others)

    def _changing(self, version: int) -> None:
        self._gate.changing = version

    async def _serve(self, version: int | None) -> None:
        """Verified, then stamped, and only then asked for tokens."""
        if version is not None:
            await self._on_all(lambda server: server.client.set_version(version))
            await self._on_all(lambda server: _expect_version(server.client, version))
        await self._on_all(_continue_others)
        if version is not None:
            self.version = version

    async def _on_all(self, call: Callable[[Server], Awaitable[None]]) -> None:
        """A call of every living server at once; those that are found gone are left out from here on.

        Raises:
            RunError: None is left, or one that is there does not do what it should.
        """

        async def on_one(server: Server) -> None:
            try:
                await call(server)
            except InfrastructureFailure as failure:
                if not isinstance(failure, Silence) and not await server.gone():
                    raise RunError(str(failure)) from failure
                await self._lose(server, failure)

        await gather(on_one(server) for server in self._fleet.require_living())
        self._fleet.require_living()

    async def _take_back(self) -> None:
        """Until no request is running: each returns what it has, and waits in ``generate``."""
        began = time.monotonic()
        while running := {task for task in self._running if not task.done()}:
            if time.monotonic() - began > self._config.control_timeout_s:
                raise RunError(
                    f"the sglang engine waited {self._config.control_timeout_s:g} s for {len(running)} aborted requests to come back from "
                    f"its servers, before an update of the weights; outstanding: {self._fleet.outstanding}"
                )
            await self._on_all(lambda server: server.client.abort())
            await asyncio.wait(running, timeout=INTERRUPT_SECONDS)

    async def _resume_after_failure(self) -> None:
        """So that a later update finds the servers as this one did. Who does not answer will be found out then."""
        calls = [_continue_others(server) for server in self._fleet.living]
        await asyncio.wait({asyncio.ensure_future(asyncio.gather(*calls, return_exceptions=True))}, timeout=CLEAN_UP_SECONDS)


def _cancelled_from_outside() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _pause_others(server: Server) -> None:
    """Our own requests were taken back; a server that was not started here may have others. A paused one keeps a core busy waiting."""
    if server.process is None:
        await server.client.pause("retract")


async def _continue_others(server: Server) -> None:
    if server.process is None:
        await server.client.continue_()


async def _expect_version(client: SglangClient, version: int) -> None:
    held = await client.version()
    if held != str(version):
        raise RunError(f"{client.name} says that it serves version {held} of the weights after version {version} was published")


def _max_length(asked: int | None, infos: list[ServerInfo]) -> int:
    least = min(info.max_length for info in infos)
    if asked is not None and asked > least:
        raise ConfigError(
            f"the engine's max_length is {asked}, but its servers take sequences of {least} tokens: the model's positions less six, and no "
            "more than --max-total-tokens; lower the one or raise the other"
        )
    return asked or least
