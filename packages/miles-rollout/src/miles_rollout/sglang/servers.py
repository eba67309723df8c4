"""The servers of an engine: started or reached, and looked at before anything is sampled from them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from miles_core.errors import ConfigError, InfrastructureFailure, RunError
from miles_core.protocols import BuildContext

from ..plugins import SglangEngineConfig
from .answers import ServerInfo
from .client import Deadlines, SglangClient
from .probe import SGLANG
from .server import Launch, ServerProcess
from .shape import ModelShape

T = TypeVar("T")

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
            ConfigError: It is of another release or dtype, does not record routing, or does not run the model as it was made.
            RunError: It does not answer.
        """
        info = await _started(server.client.info())
        if info.release != SGLANG:
            raise ConfigError(f"{server.name} is SGLang {info.release}; Miles speaks to {SGLANG}")
        if info.dtype not in (self.dtype, "auto"):
            raise ConfigError(f"{server.name} serves {info.dtype} weights, the engine's dtype is {self.dtype}; make them the same")
        if self.model.moe_layers and not info.records_routing:
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
        if self.model.tied and own is not None and own != held.get("model.embed_tokens.weight"):
            raise ConfigError(
                f"{self.model_path}/config.json ties the output projection to the embedding, but {server.name} has one of its own, which "
                f"no checkpoint fills: SGLang {SGLANG} does not run this model as it was made. Set tie_word_embeddings: false in a model "
                "built from scratch, else use another engine for it."
            )

    def _check_layers(self, server: Server, names: Iterable[str]) -> None:
        """SGLang builds experts into every layer of some models, whatever their config says; such a model's numbers are wrong."""
        held = {int(part) for name in names if ".experts." in name for part in name.split(".") if part.isdecimal()}
        if held != set(self.model.moe_layers):
            raise ConfigError(
                f"{server.name} has experts in layers {sorted(held)}, where {self.model_path}/config.json declares them in "
                f"{list(self.model.moe_layers)}: SGLang {SGLANG} does not run this model as it was made. Use another engine for it."
            )


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
