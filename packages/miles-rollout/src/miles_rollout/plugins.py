"""Engines and weight transports that a recipe may name, and their options. No torch here: `miles check` reads this module."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, field_validator, model_validator

from miles_core.errors import ConfigError
from miles_core.plugins import EngineConfig, TransportConfig


class LocalEngineConfig(EngineConfig):
    """A batched sampler in this process over any Hugging Face causal language model with full attention."""

    point: ClassVar[str] = "rollout_engine"
    target: ClassVar[str] = "miles_rollout.local.engine:LocalEngine"
    takes_lora: ClassVar[bool] = True

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights; the trainer's compute dtype must be the same. None: float32 on a CPU, bfloat16 on a GPU."""
    max_batch: int = Field(256, gt=0)
    """Sequences that are held at a time; more requests wait. The cache takes memory for this many of the longest one."""
    max_length: int | None = Field(None, gt=1)
    """Most tokens of a sequence, context and generation together. None: as many as the model has positions."""

    def bitwise_problems(self) -> list[str]:
        """See ``ModelPart``."""
        return [] if self.dtype in (None, "float32") else [f"computes in {self.dtype}; numerics: bitwise needs dtype: float32"]


LOOPBACK = ("127.0.0.1", "localhost", "::1")
OURS = ("model_path", "dtype", "device", "host", "port", "api_key", "admin_api_key", "config")
"""Arguments of SGLang's server that follow from other options."""
NOT_GROUPED = ("dp_size", "data_parallel_size", "pp_size", "pipeline_parallel_size")
"""Arguments that give SGLang ranks which take no weights from a process group."""


def _port_of(parts: SplitResult) -> bool:
    try:
        return parts.port is not None
    except ValueError:
        return False


class SglangEngineConfig(EngineConfig):
    """SGLang servers: started here, or running already and reached at their URLs."""

    point: ClassVar[str] = "rollout_engine"
    target: ClassVar[str] = "miles_rollout.sglang.engine:SglangEngine"
    in_process: ClassVar[bool] = False

    servers: int = Field(1, gt=0)
    """How many to start; requests go to the one with the fewest outstanding. Not with ``urls``."""
    interpreter: str | None = None
    """Python of SGLang's environment. None: the one that `miles engine install sglang-cpu` made."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the servers, beside and before those that Miles sets."""
    arguments: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """More arguments of ``sglang.launch_server`` by name, such as ``max_running_requests: 32``; true gives a flag."""
    urls: tuple[str, ...] = ()
    """Servers that are running already, such as ``http://127.0.0.1:30000``; none are started then."""
    key_variable: str | None = None
    """Environment variable that holds the API key of the servers at ``urls``. None: they want none."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights; the trainer's compute dtype must be the same. None: float32 on a CPU, bfloat16 on a GPU."""
    max_length: int | None = Field(None, gt=1)
    """Most tokens of a sequence, context and generation together. None: as many as the servers take."""
    boot_timeout_s: float = Field(240, gt=0)
    """Deadline for a server to come up."""
    generate_timeout_s: float = Field(600, gt=0)
    """Deadline for one generation to end; past it the server counts as dead and the trajectory is issued again."""
    control_timeout_s: float = Field(120, gt=0)
    """Deadline for any other answer: a bucket of weights, a checksum, a pause."""

    def broadcast_problems(self) -> list[str]:
        """See ``EngineConfig``."""
        return [f"has a server at {url}, on another machine" for url in self.urls if urlsplit(url).hostname not in LOOPBACK][:1] + [
            f"has {name}: {self.arguments[name]}, and SGLang groups only tensor-parallel ranks"
            for name in self.arguments
            if name.replace("-", "_") in NOT_GROUPED and self.arguments[name] != 1
        ]

    def missing(self) -> list[str]:
        """SGLang's environment, where servers are to be started."""
        if self.urls:
            return []
        from .sglang.environment import find
        from .sglang.probe import probe

        try:
            if self.interpreter is None:
                find("sglang-cpu")
            else:
                probe(Path(self.interpreter))
        except ConfigError as error:
            return [str(error)]
        return []

    @field_validator("urls")
    @classmethod
    def _reachable(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or not _port_of(parts):
                raise ValueError(f"{url!r} is no address of a server; expected e.g. http://127.0.0.1:30000")
        if len({url.rstrip("/") for url in urls}) < len(urls):
            raise ValueError("a server is named twice; it would get every request and every weight twice")
        return urls

    @field_validator("arguments")
    @classmethod
    def _free(cls, arguments: dict[str, str | int | float | bool]) -> dict[str, str | int | float | bool]:
        if taken := [name for name in arguments if name.replace("-", "_") in OURS]:
            raise ValueError(f"argument {taken[0]!r} of SGLang cannot be given: Miles sets {', '.join(OURS)} itself")
        return arguments

    @model_validator(mode="after")
    def _started_or_reached(self) -> Self:
        of_a_start = ("servers", "interpreter", "environment", "arguments", "boot_timeout_s")
        defaults = type(self).model_fields
        if self.urls and (in_vain := [n for n in of_a_start if getattr(self, n) != defaults[n].get_default(call_default_factory=True)]):
            raise ValueError(f"servers at urls are not started here; leave {', '.join(in_vain)} out")
        if self.key_variable is not None and not self.urls:
            raise ValueError("key_variable is for servers at urls; those started here get a key of their own")
        if self.key_variable is None and (open_ := [u for u in self.urls if urlsplit(u).hostname not in LOOPBACK]):
            raise ValueError(f"{open_[0]} is not on this machine; a server that others reach too must want a key: set key_variable")
        return self


class InlineTransportConfig(TransportConfig):
    """Weights to engines of the same process, tensor by tensor."""

    point: ClassVar[str] = "weight_transport"
    target: ClassVar[str] = "miles_rollout.transports.inline:InlineTransport"
    within_process: ClassVar[bool] = True


class TensorTransportConfig(TransportConfig):
    """Weights by value over the engines' own interface, compared with weights loaded from disk now and then."""

    point: ClassVar[str] = "weight_transport"
    target: ClassVar[str] = "miles_rollout.transports.tensor:TensorTransport"

    verify_every: int = Field(100, ge=0)
    """At the first two publishes and every so many, an export on a disk that the engines can read is loaded and must have the same
    checksum. 0: never, where there is no such disk."""


class CollectiveTransportConfig(TensorTransportConfig):
    """Weights by value through process groups (gloo) with servers on this machine, compared with weights loaded from disk now and then."""

    target: ClassVar[str] = "miles_rollout.transports.collective:CollectiveTransport"
    broadcasts: ClassVar[bool] = True


class DiskTransportConfig(TransportConfig):
    """Weights through a Hugging Face directory on a disk that trainer and engines share."""

    point: ClassVar[str] = "weight_transport"
    target: ClassVar[str] = "miles_rollout.transports.disk:DiskTransport"
