"""Plug-ins: declared torch-free, with their options; checked when built. ``plugin_finding`` finds them.

A recipe names a plug-in with ``use`` and gives its options beside it::

    advantage: {use: grpo, scale: none}          # entry point "grpo" in the group miles.advantage
    reward: {use: my_rewards:brevity, limit: 40} # a function or class in an importable module or a file my_rewards.py

What is registered is either a ``PluginConfig`` (options, what it needs and gives, and ``target``: what to import when it
is built, so that ``miles check`` needs no torch) or a plain function or class, whose keyword-only arguments are its options.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_type_hints

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PydanticUserError, SerializeAsAny, create_model

from . import protocols
from .errors import MilesError, PluginError
from .plugin_finding import did_you_mean, find_all, import_advice, import_object, origin_of
from .protocol_check import check_protocol
from .protocols import BuildContext, Unit

if TYPE_CHECKING:
    from .batch import Batch


class PluginConfig(BaseModel):
    """Options of a plug-in. Subclass it for built-ins; plain functions and classes get one made from their signature."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    point: ClassVar[str] = ""
    target: ClassVar[str] = ""
    """``module:attribute`` that ``build`` imports: a function (gets the options as keyword arguments) or a class
    (gets this config and the BuildContext; at a ``per_use`` point the options, for each use anew)."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Columns it reads that somebody else must give."""
    gives: ClassVar[frozenset[str]] = frozenset()
    """Columns it adds."""

    use: str

    def options(self) -> dict[str, Any]:
        """The plug-in's own options, without ``use`` and what the point itself adds."""
        skip = {"use", *POINTS[self.point].config_base.model_fields}
        return {name: getattr(self, name) for name in type(self).model_fields if name not in skip}

    def built_options(self, context: BuildContext) -> dict[str, Any]:
        """``options``, those that are plug-ins built."""
        return {n: v.build(context) if isinstance(v, PluginConfig) else v for n, v in self.options().items()}

    def nested(self) -> list[PluginConfig]:
        """This one and every plug-in that is an option of it, or a value of an option that is a mapping by name."""
        options = (getattr(self, name) for name in type(self).model_fields)
        values = (v for option in options for v in (option.values() if isinstance(option, dict) else [option]))
        return [self, *(inner for v in values if isinstance(v, PluginConfig) for inner in v.nested())]

    def required(self) -> frozenset[str]:
        """What it needs with these options; ``needs`` unless they matter."""
        return self.needs

    def provided(self) -> frozenset[str]:
        """What it gives with these options; ``gives`` unless they matter."""
        return self.gives

    def problems(self, stage: Any) -> list[str]:
        """What is wrong with these options in this ``StageConfig``, each a sentence. Called by ``miles check``, torch-free."""
        return []

    def missing(self) -> list[str]:
        """What this machine lacks for it, each a sentence that says how to get it. A run asks before it begins, ``miles check`` as a note:
        a recipe may be checked on another machine than it runs on. Torch-free."""
        return []

    def build(self, context: BuildContext) -> Any:
        """Import the target, bind the options and check the result against the point's Protocol."""
        point, origin = POINTS[self.point], f"{self.point} {self.use!r} of {origin_of(self.point, self.use)}, target {self.target},"
        try:
            target = import_object(self.target)
        except MilesError:
            raise
        except Exception as error:
            raise PluginError(f"{origin} does not import: {import_advice(error)}") from error
        if point.per_use:
            return factory(target, self.built_options(context), point, origin)
        try:
            built = target(self, context) if inspect.isclass(target) else functools.partial(target, **self.built_options(context))
        except ModuleNotFoundError as error:  # a library that the target imports only now
            raise PluginError(f"{origin} cannot be built: {import_advice(error)}") from error
        check_protocol(built, point.protocol, point.name, origin)
        return built


class ModelPart(PluginConfig):
    """What trainers and engines have in common."""

    takes_lora: ClassVar[bool] = False
    """Whether it can train or serve an adapter beside frozen weights (``BuildContext.lora``)."""

    def bitwise_problems(self) -> list[str]:
        """Why it cannot give a token the same bits in any batch (``numerics: bitwise``); empty if it can."""
        return ["cannot do numerics: bitwise; engine local and trainer torch can"]


class TrainerConfig(ModelPart):
    """What every trainer has beside its own options."""

    brings_weights: ClassVar[bool] = False
    """Whether it has its model and loss itself (``@miles.update``), so that the recipe names neither."""
    knows_old_logprobs: ClassVar[bool] = False
    """Whether, in a batch's only optimizer step, losses find ``old_logprobs`` in its own pass where nobody annotated them."""


class EngineConfig(ModelPart):
    """What every rollout engine has beside its own options."""

    in_process: ClassVar[bool] = True
    """Whether it is in the run's process, so that tensors can be handed to it and looked at there."""

    def broadcast_problems(self) -> list[str]:
        """Why no process group can hold it and the run's process (``TakesBroadcasts``); empty if one can."""
        return ["takes no weights from one"]


class TransportConfig(PluginConfig):
    """What every weight transport has beside its own options."""

    within_process: ClassVar[bool] = False
    """Whether it only reaches engines of the same process."""
    broadcasts: ClassVar[bool] = False
    """Whether it only reaches engines that take weights from a process group (``TakesBroadcasts``)."""


class AdvantageConfig(PluginConfig):
    """What every advantage has beside its own options."""

    gives: ClassVar[frozenset[str]] = frozenset({"advantages"})
    per_token: ClassVar[bool] = False
    """Whether tokens of one trajectory get different advantages."""

    def varies(self) -> bool:
        """``per_token`` with these options."""
        return self.per_token


class LossConfig(PluginConfig):
    """What every loss term has beside its own options."""

    unit: ClassVar[Unit] = "token"
    """What the loss is a function of; packing and sharding never split one."""
    head: ClassVar[str] = "language"
    """What it reads of the model that learns: ``language`` (logprobs, entropy) or ``scalar`` (values)."""
    proportional_to_advantage: ClassVar[bool] = False
    """Whether value and gradient of a row are 0 wherever the advantages of its whole sample are: such samples may be skipped."""

    coefficient: float = 1.0
    """Factor of this term in the sum of terms."""

    def required_before(self) -> frozenset[str]:
        """Columns that must be there before the step, even if its own pass tells ``old_logprobs``; ``required`` unless that is enough."""
        return self.required()

    def columns_from(self, batch: Batch, seed: int) -> dict[str, np.ndarray]:
        """Columns [N] that the term reads and that are a matter of the whole batch, after advantages and corrections; none here."""
        return {}


class RewardConfig(PluginConfig):
    """What every reward has beside its own options."""

    unit: ClassVar[str] = "sample"
    """``sample``, ``group`` or ``batch``: what it is called with."""
    keeps_time: ClassVar[bool] = False
    """Whether it holds ``timeout_s`` itself, because calls wait for each other in it and that wait is not theirs."""

    weight: float = Field(1.0, allow_inf_nan=False)
    """Its part in the sum of rewards."""
    timeout_s: float = Field(60.0, gt=0)
    """Deadline of one call, in seconds; past it the run stops and says which sample."""

    def called_with(self) -> str:
        """``unit`` with these options."""
        return self.unit


@dataclass(frozen=True)
class Point:
    """A plug-point: its name, the Protocol of what is built, and the options every plug-in of it has."""

    name: str
    protocol: type
    doc: str
    config_base: type[PluginConfig] = PluginConfig
    per_use: bool = False
    """Whether ``build`` gives a factory that is called once for each use (environments: one a trajectory)."""


POINTS: dict[str, Point] = {
    p.name: p
    for p in (
        Point("data_source", protocols.DataSource, "prompts by index"),
        Point("rollout", protocols.Rollout, "a whole group: from a prompt to its samples"),
        Point("generate", protocols.Generate, "one trajectory"),
        Point("environment", protocols.Environment, "one trajectory's world", per_use=True),
        Point("reward", protocols.Reward, "scores a sample, a group or a batch", RewardConfig),
        Point("group_filter", protocols.GroupFilter, "drops groups"),
        Point("sample_filter", protocols.SampleFilter, "takes samples out of training"),
        Point("advantage", protocols.Advantage, "advantages of a batch", AdvantageConfig),
        Point("loss", protocols.Loss, "one term of the loss", LossConfig),
        Point("kl", protocols.Kl, "estimates a KL divergence"),
        Point("ratio_correction", protocols.Correction, "weights or drops rows that the engine sampled differently"),
        Point("aggregation", protocols.Aggregation, "how rows add up to the loss"),
        Point("rollout_engine", protocols.RolloutEngine, "samples tokens from a policy", EngineConfig),
        Point("trainer", protocols.Trainer, "holds weights and optimizer", TrainerConfig),
        Point("cluster", protocols.Cluster, "starts the processes that a model is spread over"),
        Point("weight_transport", protocols.WeightTransport, "carries weights to engines", TransportConfig),
        Point("tracker", protocols.Tracker, "takes metrics somewhere"),
        Point("evaluator", protocols.Evaluator, "measures a policy on data of its own"),
        Point("hook", object, "called at moments of the loop (miles_core.hooks)"),
    )
}


def config_class(point: str, use: str) -> type[PluginConfig]:
    """The options class of the plug-in that ``use`` names.

    Raises:
        PluginError: It is not registered, does not import, or is registered for another point. Names package, version, reason, fix.
    """
    if ":" in use:
        origin, load = origin_of(point, use), functools.partial(import_object, use)
    else:
        known = find_all(point)
        if use not in known:
            raise PluginError(
                f"no {point} is called {use!r}.{did_you_mean(use, list(known))} Known: {', '.join(sorted(known)) or 'none'}. "
                "Install the package that has it, or name a function as module:attribute."
            )
        origin, load = known[use].origin, known[use].load
    try:
        obj = load()
    except MilesError:
        raise
    except Exception as error:
        fix = "" if ":" in use else ". Update that package, or uninstall it"
        raise PluginError(f"{point} {use!r} of {origin} does not import: {import_advice(error, fix)}") from error
    if inspect.isclass(obj) and issubclass(obj, PluginConfig):
        if obj.point != point:
            raise PluginError(f"{use!r} of {origin} is a {obj.point or 'plug-in without a point'}, not a {point}; use it there")
        if not issubclass(obj, base := POINTS[point].config_base):
            raise PluginError(f"{point} {use!r} of {origin}: its options {obj.__name__} must derive from {base.__module__}.{base.__name__}")
        return obj
    if not (inspect.isroutine(obj) or inspect.isclass(obj)):
        raise PluginError(f"{point} {use!r} of {origin} is a {type(obj).__name__}; expected a function, a class or a PluginConfig")
    return _config_from_signature(point, use, obj)


def _config_from_signature(point: str, use: str, obj: Callable[..., Any]) -> type[PluginConfig]:
    """Options from the keyword-only arguments of a plain function or class."""
    base = _PlainConfig.of(POINTS[point].config_base)
    options = [p for p in inspect.signature(obj).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option.name in base.model_fields or hasattr(base, option.name) or option.name.startswith("_"):
            raise PluginError(f"{point} {use!r}: its option {option.name!r} has a name that is taken (or private); rename the argument")
    types = _option_types(point, use, obj, options)
    fields: dict[str, Any] = {p.name: (types.get(p.name, Any), ... if p.default is p.empty else p.default) for p in options}
    declared = getattr(obj, "__miles__", {})
    try:
        made = create_model(f"{use}_config", __base__=base, **fields)
    except PydanticUserError as error:
        raise PluginError(f"{point} {use!r}: the type of one of its options is not one a recipe can hold: {error}") from error
    made.point, made.plain = point, staticmethod(obj)  # ty: ignore
    for name, value in declared.items():
        allowed = DECLARED.get((point, name))
        if name not in ("needs", "gives") and allowed is None:
            takes = ["name", "needs", "gives", *(n for p, n in DECLARED if p == point)]
            raise PluginError(f"{point} {use!r} declares {name!r}; a decorator takes {', '.join(takes)}")
        if allowed is not None and value not in allowed:
            raise PluginError(f"{point} {use!r} declares {name} {value!r}; expected {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}")
        setattr(made, name, value if allowed is not None else frozenset(value))
    return made


DECLARED: dict[tuple[str, str], tuple] = {
    ("reward", "unit"): ("sample", "group", "batch"),
    ("loss", "unit"): ("token", "sequence", "pair", "group"),
    ("loss", "head"): ("language", "scalar"),
    ("advantage", "per_token"): (True, False),
    ("trainer", "brings_weights"): (True, False),
}
"""What a decorator may declare beside needs and gives, by point, and the values it may have."""


def _option_types(point: str, use: str, obj: Callable[..., Any], options: list[inspect.Parameter]) -> dict[str, Any]:
    """Types of the options alone: what else the signature names may exist for type checkers only."""
    function = inspect.unwrap(obj.__init__ if inspect.isclass(obj) else obj)
    annotated = SimpleNamespace(__annotations__={p.name: p.annotation for p in options if p.annotation is not p.empty})
    try:
        return get_type_hints(annotated, globalns=getattr(function, "__globals__", {}), include_extras=True)
    except NameError as error:
        raise PluginError(
            f"{point} {use!r}: the type of one of its options cannot be read ({error}); import it outside TYPE_CHECKING"
        ) from None


class _PlainConfig:
    """Builds a plain function or class instead of importing a target."""

    @staticmethod
    def of(base: type[PluginConfig]) -> type[PluginConfig]:
        class Plain(base):  # ty: ignore[unsupported-base]
            plain: ClassVar[Any] = None

            def build(self, context: BuildContext) -> Any:
                obj, point = type(self).plain, POINTS[self.point]
                origin = f"{self.point} {self.use!r} of {origin_of(self.point, self.use)} ({obj.__module__}:{obj.__qualname__})"
                if point.per_use:
                    return factory(obj, self.built_options(context), point, origin)
                options = self.built_options(context)
                built = obj(**options) if inspect.isclass(obj) else functools.partial(obj, **options)
                check_protocol(built, point.protocol, point.name, origin)
                return built

        return Plain


def factory(obj: Any, options: dict[str, Any], point: Point, origin: str) -> Callable[[], Any]:
    """Makes a new one for each use, from a class that keeps the point's Protocol."""
    if not inspect.isclass(obj):
        raise PluginError(f"{origin} is a {type(obj).__name__}; expected a class, an instance is made for each use")
    check_protocol(obj, point.protocol, point.name, origin)
    return functools.partial(obj, **options)


def plug(point: str) -> Any:
    """The pydantic type of a recipe field that names a plug-in of ``point``: a name, or a mapping with ``use`` and options."""

    def parse(value: Any) -> Any:
        if isinstance(value, PluginConfig):
            return value
        if isinstance(value, str):
            value = {"use": value}
        if not isinstance(value, dict) or not isinstance(value.get("use"), str):
            raise ValueError(f"expected the name of a {point}, or a mapping with 'use' and its options; found {value!r}")
        return config_class(point, value["use"]).model_validate(value)

    return Annotated[SerializeAsAny[PluginConfig], BeforeValidator(parse)]
