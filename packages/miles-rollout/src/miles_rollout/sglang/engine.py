"""``rollout_engine: sglang``: SGLang servers that are started here or reached at their URLs, as one engine."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from miles_core.errors import ConfigError, InfrastructureFailure, RunError
from miles_core.protocols import BuildContext, GenerateRequest, Generation
from miles_core.waiting import gather

from ..fleet import Fleet
from ..local.stops import Stops
from ..plugins import SglangEngineConfig
from ..requests import check_request
from .answers import Generated, ServerInfo
from .client import Deadlines, SglangClient
from .continuation import Continuation
from .environment import find
from .probe import SGLANG
from .server import Launch, ServerProcess
from .shape import ModelShape
from .updates import send_weights

T = TypeVar("T")

INTERRUPT_SECONDS = 0.2
"""How long a server may take to hand back what is aborted before it is told again; a request may have been on its way to it."""

LIVENESS_SECONDS = 10.0
"""Deadline of a server that failed to say that it is there."""


@dataclass(eq=False)
class Server:
    """One of the engine's servers.

    Attributes:
        name: For messages.
        client: Calls it.
        process: Runs it; None if it was not started here.
        ranks: Tensor-parallel ranks it has.
    """

    name: str
    client: SglangClient
    process: ServerProcess | None
    ranks: int = 1

    async def gone(self) -> bool:
        """Whether it ended, or does not say that it is there."""
        return (self.process is not None and not self.process.alive()) or not await self.client.alive(LIVENESS_SECONDS)


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
        self._serving = asyncio.Event()
        self._updating = asyncio.Lock()
        self._unusable: str | None = "it was not started"
        self._closed = False

    # ---- start and end ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Read what the model is like, boot or reach all servers at once, and see that they fit it and each other; see RolloutEngine."""
        self._model = await asyncio.to_thread(ModelShape.read, self._model_path)
        self._stops = Stops(self._context.tokenizer, frozenset(), self._model.vocab_size)
        if self._config.urls:
            key = os.environ[self._config.key_variable] if self._config.key_variable else None
            servers = [self._reach(i, url, key) for i, url in enumerate(self._config.urls)]
        else:
            interpreter = Path(self._config.interpreter) if self._config.interpreter else await asyncio.to_thread(find, "sglang-cpu")
            servers = await gather(self._boot(i, interpreter) for i in range(self._config.servers))
        self._servers, self._fleet = servers, Fleet(servers)
        infos = await gather(self._inspect(server) for server in servers)
        self.max_length = _max_length(self._config.max_length, infos)
        await self.checksum()
        self._unusable = None
        self._serving.set()

    async def close(self) -> None:
        """Stop the servers that were started here and close the connections to the others. Twice is fine."""
        self._closed, self._unusable = True, "it was closed"
        self._serving.set()  # who waits is told
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(set(self._running))
        servers, self._servers = self._servers, []
        processes, self._processes = self._processes, []
        closed = [server.client.close() for server in servers] + [process.stop() for process in processes]
        failures = [r for r in await asyncio.gather(*closed, return_exceptions=True) if isinstance(r, BaseException)]
        if failures:
            raise failures[0]

    def _reach(self, index: int, url: str, key: str | None) -> Server:
        name = f"SGLang server {index} ({url})"
        return Server(name, self._client(name, url, key, lambda: "Its log is where it was started."), None)

    async def _boot(self, index: int, interpreter: Path) -> Server:
        launch = Launch(
            interpreter=interpreter,
            model_path=self._model_path,
            dtype=self._dtype,
            device=self._context.device,
            arguments={"sampling_mask_max_tokens": self._model.vocab_size, **self._config.arguments},
            environment=self._config.environment,
            log=self._context.run_dir / "logs" / f"sglang-{self._context.model or 'model'}-{index}.log",
            boot_seconds=self._config.boot_timeout_s,
        )
        process = ServerProcess(launch)
        self._processes.append(process)
        await process.start()
        name = f"SGLang server {index} ({process.url})"
        return Server(name, self._client(name, process.url, process.token, lambda: _log_of(process)), process)

    def _client(self, name: str, url: str, key: str | None, log: Callable[[], str]) -> SglangClient:
        deadlines = Deadlines(self._config.generate_timeout_s, self._config.control_timeout_s)
        return SglangClient(name, url, key, self._model, deadlines, log)

    async def _inspect(self, server: Server) -> ServerInfo:
        """See that a server is what we need, and give its weights version 0."""
        info = await _started(server.client.info())
        if info.release != SGLANG:
            raise ConfigError(f"{server.name} is SGLang {info.release}; Miles speaks to {SGLANG}")
        if info.dtype not in (self._dtype, "auto"):
            raise ConfigError(f"{server.name} serves {info.dtype} weights, the engine's dtype is {self._dtype}; make them the same")
        if self._model.moe_layers and not info.records_routing:
            raise ConfigError(f"{server.name} does not record routed experts; start it with --enable-return-routed-experts")
        _, held = await _started(server.client.checksum())
        self._check_layers(server, held)
        self._check_output(server, held)
        await _started(server.client.set_version(0))
        server.ranks = info.ranks
        return info

    def _check_output(self, server: Server, held: Mapping[str, str]) -> None:
        """SGLang gives some models an output projection of their own although it is the embedding; it stays as it was drawn."""
        own = held.get("lm_head.weight")
        if self._model.tied and own is not None and own != held.get("model.embed_tokens.weight"):
            raise ConfigError(
                f"{self._model_path}/config.json ties the output projection to the embedding, but {server.name} has one of its own, which "
                f"no checkpoint fills: SGLang {SGLANG} does not run this model as it was made. Set tie_word_embeddings: false in a model "
                "built from scratch, else use another engine for it."
            )

    def _check_layers(self, server: Server, names: Iterable[str]) -> None:
        """SGLang builds experts into every layer of some models, whatever their config says; such a model's numbers are wrong."""
        held = {int(part) for name in names if ".experts." in name for part in name.split(".") if part.isdecimal()}
        if held != set(self._model.moe_layers):
            raise ConfigError(
                f"{server.name} has experts in layers {sorted(held)}, where {self._model_path}/config.json declares them in "
                f"{list(self._model.moe_layers)}: SGLang {SGLANG} does not run this model as it was made. Use another engine for it."
            )

    # ---- generation ---------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample a continuation; see RolloutEngine. Not with ``request.key``: see the class.

        Raises:
            DataError: The request is malformed, names a token outside the vocabulary, fills the context already, or a server refuses it.
            InfrastructureFailure: A server died, did not answer in time or answered what cannot be right, and others are left.
            RunError: No server is left, or an update of the weights failed.
        """
        self._require_usable()
        check_request(request, self._model.vocab_size, self.max_length)
        continuation = Continuation(request, self._model, self._stops, self.max_length)
        while not continuation.ended:
            await self._serving.wait()
            self._require_usable()
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
            taken_back = not self._serving.is_set()
            continuation.add(generated, resumes=taken_back)
        return continuation.result()

    async def release(self, session: str) -> None:
        """Nothing to forget: SGLang keeps what it has room for, by content."""

    async def _segment(self, continuation: Continuation) -> Generated:
        """One request of one server."""
        with self._fleet.lease() as server:
            end_of_text = () if self._context.tokenizer is None else (self._context.tokenizer.eos_token_id,)
            return await self._using(
                server,
                server.client.generate(
                    continuation.tokens,
                    continuation.sampling,
                    continuation.room,
                    routing_start=continuation.routing_start,
                    end_of_text=tuple(i for i in end_of_text if i is not None),
                ),
            )

    async def _using(self, server: Server, call: Awaitable[T]) -> T:
        """Await a call; if it fails and the server is gone, leave that out from here on. Raises RunError if it was the last."""
        try:
            return await call
        except InfrastructureFailure as failure:
            if await server.gone():
                self._fleet.lose(server, str(failure))
                self._fleet.require_living()
            raise

    def _require_usable(self) -> None:
        if self._unusable is not None:
            raise RunError(f"the sglang engine serves nothing: {self._unusable}")

    # ---- weights ------------------------------------------------------------------------------------------------------

    async def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights by value on every server; see WeightSink.

        Raises:
            DataError: A name is unknown or missing, or a shape or dtype does not fit. Names and shapes are compared with the model's
                directory bucket by bucket, before each is sent: the engine serves what it had if that was found in the first, else nothing.
            RunError: A server refuses, none is left, or one does not hold the version afterwards; the engine serves nothing then.
        """
        checked = self._model.checked(weights, self._dtype)
        async with self._update(version) as begin:
            await send_weights(checked, sorted({s.ranks for s in self._fleet.living}), self._on_all, begin)

    async def load_weights(self, directory: Path, version: int) -> None:
        """Replace the weights by those of a Hugging Face directory that the servers can read; see WeightSink."""
        found = await asyncio.to_thread(ModelShape.read, directory)
        self._model.check_same(found, directory)
        async with self._update(version) as begin:
            begin()
            await self._on_all(lambda server: server.client.load_from_disk(directory.absolute(), version))

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

    @asynccontextmanager
    async def _update(self, version: int) -> AsyncGenerator[Callable[[], None]]:
        """Around a change of weights: take running requests back, pause, and let them go on only if all servers hold ``version``.

        Yields a function to call right before the first change. A failure after that leaves the engine unusable until an update succeeds.
        """
        async with self._updating:
            if self._servers == []:
                self._require_usable()
            began = False

            def begin() -> None:
                nonlocal began
                began = True
                self._unusable = f"version {version} of its weights did not arrive whole"

            self._serving.clear()
            try:
                await self._take_back()
                await self._on_all(_pause_others)
                yield begin
                await self._on_all(lambda server: server.client.set_version(version))
                await self._on_all(lambda server: _expect_version(server.client, version))
                await self._on_all(_continue_others)
                self.version, self._unusable = version, None
            except BaseException as error:
                if began:
                    self._unusable = f"version {version} of its weights did not arrive whole ({error or type(error).__name__})"
                await self._resume_after_failure()
                raise
            finally:
                self._serving.set()

    async def _on_all(self, call: Callable[[Server], Awaitable[None]]) -> None:
        """A call of every living server at once; those that are found gone are left out from here on.

        Raises:
            RunError: None is left, or one that is there does not do what it should.
        """

        async def on_one(server: Server) -> None:
            try:
                await call(server)
            except InfrastructureFailure as failure:
                if not await server.gone():
                    raise RunError(str(failure)) from failure
                self._fleet.lose(server, str(failure))

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
        await asyncio.shield(asyncio.gather(*calls, return_exceptions=True))


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


async def _started(call: Awaitable[T]) -> T:
    """A call without which nothing goes on: who does not answer it is no matter of one trajectory."""
    try:
        return await call
    except InfrastructureFailure as failure:
        raise RunError(str(failure)) from failure


def _max_length(asked: int | None, infos: list[ServerInfo]) -> int:
    least = min(info.max_length for info in infos)
    if asked is not None and asked > least:
        raise ConfigError(
            f"the engine's max_length is {asked}, but its servers take sequences of {least} tokens: the model's positions less six, and no "
            "more than --max-total-tokens; lower the one or raise the other"
        )
    return asked or least


def _log_of(process: ServerProcess) -> str:
    """What an error says of a server that was started here."""
    if not process.alive():
        return process.describe_death()
    return f"The end of its log, {process.launch.log}:\n{process.log_tail(8)}"
