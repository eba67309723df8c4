"""The servers of an engine: started or reached, and looked at before anything is sampled from them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from miles_core.errors import InfrastructureFailure, RunError
from miles_core.protocols import BuildContext

from ..plugins import SglangEngineConfig
from .answers import ServerInfo
from .client import Deadlines, SglangClient
from .fitting import check_server
from .group import Group
from .server import Launch, ServerProcess
from .shape import ModelShape

T = TypeVar("T")

LIVENESS_SECONDS = 10.0
"""Deadline of a server that failed to say that it is there."""

CLEAN_UP_SECONDS = 5.0
"""For servers to hear that an update failed, or that a group ends; one that does not listen will be found out by the next."""


@dataclass(eq=False)
class Server:
    """One of the engine's servers.

    Attributes:
        name: For messages.
        client: Calls it.
        process: Runs it; None if it was not started here.
        ranks: Tensor-parallel ranks it has.
        group: Through which these take weights; None while they are in none.
    """

    name: str
    client: SglangClient
    process: ServerProcess | None
    ranks: int = 1
    group: Group | None = None

    async def join_group(self, seconds: float) -> None:
        """Be in a group, all of whose steps have this deadline. Raises as ``Group.join`` does."""
        if self.group is None:
            self.group = Group(self.client, self.ranks, seconds)
            await self.group.join()

    async def leave_group(self) -> None:
        """Be in none."""
        group, self.group = self.group, None
        if group is not None:
            await group.leave(CLEAN_UP_SECONDS)

    async def close(self) -> None:
        """Leave its group and close the connections to it; its process is stopped by who started it."""
        await self.leave_group()
        await self.client.close()

    async def gone(self) -> bool:
        """Whether it ended, or does not say that it is there when it is asked twice. A scheduler that hangs is found by its silence."""
        if self.process is not None and not self.process.alive():
            return True
        return not (await self.client.alive(LIVENESS_SECONDS) or await self.client.alive(LIVENESS_SECONDS))


@dataclass(frozen=True)
class Setup:
    """How an engine's servers are had, and what they must be like.

    Attributes:
        config, context: Of the engine.
        model_path: The Hugging Face directory they serve.
        model: What is in it.
        dtype: Of the weights.
    """

    config: SglangEngineConfig
    context: BuildContext
    model_path: Path
    model: ModelShape
    dtype: str

    def reach(self, index: int, url: str, key: str | None) -> Server:
        """A server that runs already; nothing is asked yet."""
        name = f"SGLang server {index} ({url})"
        return Server(name, self._client(name, url, key, lambda: "Its log is where it was started."), None)

    async def boot(self, index: int, interpreter: Path, started: list[ServerProcess]) -> Server:
        """Start a server and wait until it answers; its process is in ``started`` as soon as there is one."""
        launch = Launch(
            interpreter=interpreter,
            model_path=self.model_path,
            dtype=self.dtype,
            device=self.context.device,
            arguments={"sampling_mask_max_tokens": self.model.vocab_size, **self.config.arguments},
            environment=self.config.environment,
            log=self.context.run_dir / "logs" / f"sglang-{self.context.model or 'model'}-{index}.log",
            boot_seconds=self.config.boot_timeout_s,
        )
        process = ServerProcess(launch)
        started.append(process)
        await process.start()
        name = f"SGLang server {index} ({process.url})"
        return Server(name, self._client(name, process.url, process.token, lambda: _log_of(process)), process)

    def _client(self, name: str, url: str, key: str | None, log: Callable[[], str]) -> SglangClient:
        deadlines = Deadlines(self.config.generate_timeout_s, self.config.control_timeout_s)
        return SglangClient(name, url, key, self.model, deadlines, log)

    async def inspect(self, server: Server) -> ServerInfo:
        """See that a server is what we need, and give its weights version 0.

        Raises:
            ConfigError: It does not fit; see ``check_server``.
            RunError: It does not answer.
        """
        info = await _started(server.client.info())
        _, held = await _started(server.client.checksum())
        check_server(server.name, info, held, self.model, self.model_path, self.dtype)
        await _started(server.client.set_version(0))
        server.ranks = info.ranks
        return info


async def _started(call: Awaitable[T]) -> T:
    """A call without which nothing goes on: who does not answer it is no matter of one trajectory."""
    try:
        return await call
    except InfrastructureFailure as failure:
        raise RunError(str(failure)) from failure


def _log_of(process: ServerProcess) -> str:
    """What an error says of a server that was started here."""
    if not process.alive():
        return process.describe_death()
    return f"The end of its log, {process.launch.log}:\n{process.log_tail(8)}"
