"""Miles around a PyTorch loop of your own: ``@miles.rollout``, ``@miles.update`` and ``miles.run`` (docs/tutorials/pytorch_loop.py).

Model, loss and optimizer stay yours. What comes along: groups and advantages, the bound on staleness, metrics, trajectories,
a trace, cuts to resume from, deadlines. It is the same loop as every recipe's: ``@miles.update`` makes a trainer of your function.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from .config import RUN_KEYS, RunConfig
from .errors import ConfigError, DataError, MilesError, PluginError, StepRefused
from .plugin_finding import importing, register
from .protocols import StepReport
from .run_dir import RunDir
from .waiting import in_daemon_thread

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .batch import Batch
    from .runner import Outcome

F = TypeVar("F", bound=FunctionType)

LOADED = ("tokens", "targets", "positions")
"""Sample columns that an update function finds in its batch, beside the float columns."""


def update(*, state: Mapping[str, Any]) -> Callable[[F], F]:
    """Make a trainer of a function that takes one optimizer step on a packed batch.

    The function gets a ``miles_core.batch.Batch`` and gives metrics by name (numbers). Row p of every column speaks of the token
    predicted at p: ``batch.tensors()`` has ``tokens`` (read up to here), ``targets``, ``loss_mask``, ``advantages``, ``logprobs`` (as
    sampled) and ``versions``, all [N]; ``batch.cu_seqlens`` says where samples begin.

    Args:
        state: By name, everything that learns or remembers: objects with ``state_dict`` and ``load_state_dict`` (modules, optimizers,
            schedules). It is saved with every cut and put back by resume; the rollout finds copies of the modules, as published,
            at ``context.engines["policy"].weights``.

    Raises:
        ConfigError: An object in ``state`` has no ``state_dict`` and ``load_state_dict``.
    """
    for name, thing in state.items():
        if not (callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))):
            raise ConfigError(f"state {name!r}, a {type(thing).__name__}, has no state_dict and load_state_dict; leave it out or add them")

    def decorate(function: F) -> F:
        body = {"function": staticmethod(function), "state": dict(state), "__module__": function.__module__}
        trainer = type("Trainer", (UpdateTrainer,), body | {"__qualname__": f"{function.__qualname__}.trainer"})
        engine = type("Engine", (PublishedModules,), body | {"__qualname__": f"{function.__qualname__}.engine"})
        function.trainer, function.engine = trainer, engine  # ty: ignore[missing-attribute]
        register("trainer", function.__name__, trainer)
        register("rollout_engine", function.__name__, engine)
        return function

    return decorate


def run(
    rollout: FunctionType,
    update: FunctionType,
    *,
    data: Sequence[str],
    steps: int,
    groups: int,
    name: str = "run",
    advantage: str | Mapping[str, Any] | None = "grpo",
    resume: str | Path | None = None,
    **settings: Any,
) -> Outcome:
    """Run a loop of two decorated functions until its steps are done; Ctrl-C finishes the step, saves and ends.

    Args:
        rollout: ``@miles.rollout(gives=…)``: (prompt, context) → the samples of one group; plain or async.
        update: ``@miles.update(state=…)``: one optimizer step.
        data: Texts of the prompts.
        steps: Steps of the loop.
        groups: Groups a step trains on.
        name: Of the run and its directory.
        advantage: A plug-in's name, or with options; None if ``update`` makes its own of the rewards.
        resume: A run's directory to go on with, from its newest complete cut.
        settings: Any other key of the configuration: ``seed``, ``max_staleness``, ``rewards``, ``every``, ``runs_dir`` …

    Raises:
        MilesError: Whatever stops the run; what was learned until then is saved.
    """
    from .cli.drive import drive

    if importing():
        raise ConfigError(
            f"miles.run was called while {rollout.__module__} was imported for its functions; "
            "put the call under: if __name__ == '__main__':"
        )
    if taken := sorted(settings.keys() & {"models", "rollout", "stages"}):
        raise ConfigError(f"miles.run makes {taken[0]} of its two functions; leave {taken[0]} out")
    if not hasattr(update, "trainer"):
        raise PluginError(f"{update.__name__} is no update function; decorate it with @miles.update(state=…)")
    trainer, engine = _name_of(update, ".trainer"), _name_of(update, ".engine")
    transport = f"{__name__}:PublishCopies"
    policy = {"trainer": trainer, "engine": engine, "transport": transport, "advantage": advantage}
    stage = {k: v for k, v in settings.items() if k not in RUN_KEYS} | {
        "steps": steps,
        "groups": groups,
        "models": {"policy": policy},
        "data": {"use": "texts", "texts": tuple(data)},
        "rollout": _name_of(rollout),
    }
    whole = {k: v for k, v in settings.items() if k in RUN_KEYS} | {"name": name, "stages": {"main": stage}}
    found = {function: _directory_of(function) for function in (rollout, update)}
    whole["import_from"] = [*settings.get("import_from", []), *dict.fromkeys(d for d in found.values() if d is not None)]
    whole["import_modules"] = list(
        dict.fromkeys(_module_of(f) for f, d in found.items() if d is not None and "<locals>" not in f.__qualname__)
    )
    config = RunConfig.from_mapping(whole)
    return drive(config, None if resume is None else RunDir.open(Path(resume)))


class UpdateTrainer:
    """``trainer``: calls the user's function for each optimizer step, in a thread."""

    function: ClassVar[FunctionType]
    state: ClassVar[dict[str, Any]]
    __miles__: ClassVar[dict[str, Any]] = {"brings_weights": True}

    def __init__(self) -> None:
        from .state_files import take_apart

        self.version = 0
        take_apart({n: thing.state_dict() for n, thing in self.state.items()})  # what cannot be saved is said now, not at the first cut

    async def start(self) -> None:
        """The state is the user's; nothing to get ready."""

    async def annotate(self, batch: Batch, columns: frozenset[str]) -> Batch:
        """It can add none."""
        if columns:
            raise ConfigError(f"an update function gives no {', '.join(sorted(columns))}; compute that in the function itself")
        return batch

    async def step(self, batch: Batch) -> StepReport:
        """Metrics are the means over the optimizer steps that report them; one in which no token is trained is passed over.

        Raises:
            StepRefused: The function failed, gave something else than finite numbers, or no token is trained. The state is put back
                to what it was before the call.
        """
        name = type(self).function.__name__
        steps = [step for step in batch.load(LOADED).optimizer_steps() if step.segments.tokens]
        if not steps:
            raise StepRefused("the batch trains no token in any of its optimizer steps: every loss mask is empty")
        before = copy.deepcopy({n: thing.state_dict() for n, thing in self.state.items()})
        try:
            reports = [_metrics(await in_daemon_thread(type(self).function, step)) for step in steps]
        except Exception as error:
            for n, thing in self.state.items():
                thing.load_state_dict(before[n])
            reason = str(error) if isinstance(error, MilesError) else f"{type(error).__name__}: {error}"
            raise StepRefused(f"update function {name!r} failed: {reason}. The state is what it was before the step") from error
        names = dict.fromkeys(n for report in reports for n in report)
        return StepReport({n: float(np.mean([r[n] for r in reports if n in r])) for n in names}, len(reports))

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(module.name, tensor) of every module in the state."""
        for name, module in modules_of(self.state).items():
            yield from ((f"{name}.{key}", tensor.detach()) for key, tensor in module.state_dict().items())

    async def save(self, directory: Path) -> None:
        """Write the state dicts, and the version."""
        from .state_files import save_state

        save_state({"version": self.version, "state": {n: s.state_dict() for n, s in self.state.items()}}, directory)

    async def load(self, directory: Path) -> None:
        """Put the state dicts back."""
        from .state_files import load_state

        saved = load_state(directory)
        if saved["state"].keys() != self.state.keys():
            raise ConfigError(f"{directory} holds the state of {', '.join(saved['state'])}, the script has {', '.join(self.state)}")
        for name, thing in self.state.items():
            thing.load_state_dict(saved["state"][name])
        self.version = saved["version"]

    async def export(self, directory: Path) -> None:
        """Write the weights of the modules as ``MODULE.safetensors``, by their names."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        for name, module in modules_of(self.state).items():
            save_file({k: t.detach().cpu().clone() for k, t in module.state_dict().items()}, directory / f"{name}.safetensors")

    async def close(self) -> None:
        """The state is the user's; nothing to give back."""


@dataclass(frozen=True)
class Weights:
    """Copies of the modules as they were published: ``weights["policy"]``, and their version."""

    version: int
    modules: Mapping[str, nn.Module]

    def __getitem__(self, name: str) -> nn.Module:
        return self.modules[name]


class PublishedModules:
    """``rollout_engine``: what a rollout samples from: a copy of the modules, replaced whole at each publish."""

    state: ClassVar[dict[str, Any]]

    def __init__(self) -> None:
        self.weights = Weights(0, copy.deepcopy(modules_of(self.state)))
        """The newest. Take it once in a rollout: the next publish puts another in its place and leaves this one as it is."""

    async def start(self) -> None:
        """Nothing to get ready."""

    @property
    def version(self) -> int:
        """Of the newest weights."""
        return self.weights.version

    @asynccontextmanager
    async def syncing(self) -> AsyncGenerator[None]:
        """Nothing to hold back: who samples keeps the modules he took."""
        yield

    async def update_weights(self, weights: Any, version: int) -> None:
        """Copy the modules as they are now."""
        modules = copy.deepcopy(self.weights.modules)
        given = dict(weights)
        for name, module in modules.items():
            module.load_state_dict({k.removeprefix(f"{name}."): t for k, t in given.items() if k.startswith(f"{name}.")})
        self.weights = Weights(version, modules)

    async def load_weights(self, directory: Path, version: int) -> None:
        """Modules have no Hugging Face directory."""
        raise PluginError(f"version {version}: this engine takes its weights from the update function's modules, not from {directory}")

    async def checksum(self) -> str:
        """Digest of the newest."""
        from .digests import checksum

        named = ((f"{name}.{key}", t) for name, module in self.weights.modules.items() for key, t in module.state_dict().items())
        return checksum(named)

    async def generate(self, request: Any) -> Any:
        """A decorated rollout samples by itself."""
        raise PluginError("this engine generates nothing: take context.engines['policy'].weights and sample in the rollout function")

    async def release(self, session: str) -> None:
        """No sessions."""

    async def close(self) -> None:
        """Nothing to give back."""


class PublishCopies:
    """``weight_transport`` of these two, in one process."""

    async def publish(self, source: UpdateTrainer, sinks: list[PublishedModules], version: int) -> dict[str, float]:
        """Copies, which cannot differ from what they are copied from."""
        for sink in sinks:
            await sink.update_weights(source.named_weights(), version)
        return {}


def _metrics(given: Any) -> dict[str, float]:
    """What an update function gave, as finite numbers by name. Raises DataError when it is something else."""
    if not isinstance(given, Mapping) or any(isinstance(v, str) or not np.isscalar(v) for v in given.values()):
        raise DataError(f"it gave {given!r}; expected metrics, numbers by name")
    if odd := [name for name, value in given.items() if not np.isfinite(value)]:
        raise DataError(f"it gave {odd[0]} = {given[odd[0]]}; a metric is a finite number")
    return {str(name): float(value) for name, value in given.items()}


def modules_of(state: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The modules in a state, by name."""
    from torch import nn

    return {name: thing for name, thing in state.items() if isinstance(thing, nn.Module)}


def _name_of(function: FunctionType, attribute: str = "") -> str:
    """How a recipe names a function, so that ``miles resume`` finds it in another process; its bare name where none could."""
    if _directory_of(function) is None or "<locals>" in function.__qualname__:
        if not attribute:
            register("rollout", function.__name__, function)
        return function.__name__
    return f"{_module_of(function)}:{function.__qualname__}{attribute}"


def _module_of(function: FunctionType) -> str:
    """The module's name; a script's is its file's, and importing that gives the running script itself, not a second copy of its state."""
    if function.__module__ != "__main__":
        return function.__module__
    main = sys.modules["__main__"]
    stem = Path(inspect.getfile(main)).stem
    if sys.modules.setdefault(stem, main) is not main:
        raise ConfigError(f"the script's name, {stem}.py, is also that of an imported module; rename the script")
    return stem


def _directory_of(function: FunctionType) -> str | None:
    """Where a function's module is imported from; None in a notebook or an interpreter."""
    module = sys.modules[function.__module__]
    file = getattr(module, "__file__", None)
    if file is None:
        return None
    depth = function.__module__.count(".") + (Path(file).name == "__init__.py")
    return str(Path(file).resolve().parents[depth])
