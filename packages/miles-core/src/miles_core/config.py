"""The configuration: one typed tree. A recipe says what differs from these defaults; an unknown key is an error.

``RunConfig`` is a run: a list of stages, each with everything it needs (``StageConfig``). Validation needs no torch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from .config_errors import sentences
from .errors import ConfigError
from .plugin_finding import add_import_directories, import_module
from .plugins import LossConfig, PluginConfig, plug
from .recipe import Recipe, load_recipe, merge
from .tokenizers import TokenizerConfig

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Of a stage, model or evaluator: part of file names, and of override keys, in which dots separate."""


def named(type_: Any) -> Any:
    """The pydantic type of a mapping by name; what is set to null is left out, as if it had never been named."""
    return Annotated[
        dict[Name, type_], BeforeValidator(lambda v: {k: x for k, x in v.items() if x is not None} if isinstance(v, dict) else v)
    ]


class Tree(BaseModel):
    """Base of every node: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class KlReward(Tree):
    """Every trained token earns −coefficient · kl(old policy, reference)."""

    estimator: plug("kl") = Field(default={"use": "k1"}, validate_default=True)  # ty: ignore
    coefficient: float = Field(gt=0)


class LoraConfig(Tree):
    """A low-rank adapter beside frozen weights (Hu et al. 2021, arXiv:2106.09685): y = W x + alpha / rank · B A x; A and B learn."""

    rank: int | None = Field(None, gt=0)
    """Rows of A and columns of B. None: 16."""
    alpha: int | None = Field(None, gt=0)
    """What B A x is multiplied with, times the rank. None: twice the rank."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] | None = None
    """Modules that get one, by the last part of their names, such as ``[q_proj, v_proj]``. None: all-linear, all linear modules of the
    layers; the fused experts of a mixture are not among them."""
    path: str | None = None
    """PEFT directory or hub id of an adapter of this very model to begin with; it brings rank, alpha and targets with it."""

    @model_validator(mode="after")
    def _one_description(self) -> Self:
        if self.path is not None and self.described:
            raise ValueError(f"the adapter in path brings its own {', '.join(self.described)}; leave that out")
        return self

    @property
    def described(self) -> list[str]:
        """The keys that say what a new adapter is like, as far as they are given."""
        return [name for name in ("rank", "alpha", "targets") if getattr(self, name) is not None]


class ModelConfig(Tree):
    """One model of a run and its part in it."""

    role: Literal["policy", "critic", "reference", "teacher", "reward"] = "policy"
    """policy: samples and learns. critic: gives ``values`` and learns. reference: gives ``ref_logprobs``, teacher:
    ``teacher_logprobs``; both stay as they are. reward: a reward model that learns from what the rollout reads."""
    of: str | None = None
    """The policy that a critic, reference or teacher belongs to; may be left out if there is only one. Without a path the model
    starts as that one."""
    path: str | None = None
    """Hugging Face directory or hub id with weights and tokenizer; or of an adapter (PEFT), beside the model that it names."""
    config: dict[str, Any] | None = None
    """Hugging Face config fields (with ``model_type``) of a model built from scratch, where ``path`` is not given."""
    tokenizer: TokenizerConfig | None = None
    """Tokenizer of a model built from scratch."""
    lora: LoraConfig | None = None
    """Train an adapter, and nothing else, of a policy. Null: all weights."""
    trainer: plug("trainer")  # ty: ignore
    engine: plug("rollout_engine") | None = None  # ty: ignore
    transport: plug("weight_transport") = Field(default={"use": "inline"}, validate_default=True)  # ty: ignore
    advantage: plug("advantage") | None = None  # ty: ignore
    losses: named(plug("loss")) = {}  # ty: ignore
    """Loss terms by name; they add up."""
    kl_reward: KlReward | None = None
    """A KL penalty in the reward of each token; or put a ``kl`` term into the losses, never both."""
    corrections: named(plug("ratio_correction")) = {}  # ty: ignore
    """For the distance between rollout and trainer log-probabilities, by name, in this order; weights multiply."""
    aggregation: plug("aggregation") = Field(default={"use": "token_mean"}, validate_default=True)  # ty: ignore
    frozen_steps: int = Field(0, ge=0)
    """Steps of the stage before it begins to learn (a policy that waits for its critic)."""

    @property
    def learns(self) -> bool:
        """Whether the loop trains it."""
        return self.role in ("policy", "critic", "reward")

    @property
    def has_samples(self) -> bool:
        """Whether samples carry its name; the other roles serve one that has."""
        return self.role in ("policy", "reward")

    def algorithms(self) -> list[PluginConfig]:
        """Everything its loss is made of, nested plug-ins too."""
        kl = [self.kl_reward.estimator] if self.kl_reward else []
        parts = [self.advantage, *self.losses.values(), *self.corrections.values(), *kl, self.aggregation]
        return [inner for part in parts if part is not None for inner in part.nested()]

    def required(self, optimizer_steps: int) -> frozenset[str]:
        """Columns that its algorithms need before the step.

        Args:
            optimizer_steps: That a batch is used for. In an only one a trainer may know ``old_logprobs`` itself.
        """
        kl = frozenset({"old_logprobs", "ref_logprobs"}) if self.kl_reward else frozenset()
        corrected = frozenset({"old_logprobs", "logprobs"}) if self.corrections else frozenset()
        known = self.trainer.knows_old_logprobs and optimizer_steps == 1
        parts = (a.required_before() if known and isinstance(a, LossConfig) else a.required() for a in self.algorithms())
        return kl.union(corrected, *parts)


class Deadlines(Tree):
    """Seconds after which a wait is an error that says who waited for what. Every wait of the loop has one."""

    start: float = Field(900, gt=0)
    """One engine or trainer to get ready: servers to boot, ranks to load the model."""
    rollout: float = Field(1800, gt=0)
    """One step's groups."""
    group: float = Field(900, gt=0)
    """One group, from prompt to last reward."""
    train: float = Field(1800, gt=0)
    """Annotating, or one call of step."""
    publish: float = Field(600, gt=0)
    """Weights to all engines of a model."""
    evaluate: float = Field(1800, gt=0)
    """One evaluator."""
    close: float = Field(60, gt=0)
    """Giving up one engine or trainer at the end."""


class Every(Tree):
    """How often, in steps. 0: never (but see each)."""

    evaluate: int = Field(10, ge=0)
    """Evaluators; also before the first and after the last step of a stage."""
    checkpoint: int = Field(50, ge=0)
    """Cuts; also at the end, at Ctrl-C and before an error ends the run."""
    trajectories: int = Field(1, ge=0)
    """Samples to disk."""


class StageConfig(Tree):
    """One stage: a loop of ``steps`` steps, starting from the weights of the stage before."""

    steps: int = Field(ge=0)
    """Steps of the loop."""
    groups: int = Field(gt=0)
    """Groups (prompts) a step trains on."""
    models: named(ModelConfig)  # ty: ignore
    """By name; single-policy recipes call theirs ``policy``."""
    data: plug("data_source")  # ty: ignore
    shuffle: bool = True
    """Whether each epoch goes through the data in a seeded random order."""
    rollout: plug("rollout")  # ty: ignore
    rewards: named(plug("reward")) = {}  # ty: ignore
    """By name; the trajectory's reward is the environment's plus the weighted sum of these."""
    environment_weight: float = 1.0
    """Weight of the environment's own part in the reward; 0 leaves it to be looked at."""
    group_filters: named(plug("group_filter")) = {}  # ty: ignore
    """By name; a group that one of them drops is replaced."""
    sample_filters: named(plug("sample_filter")) = {}  # ty: ignore
    """By name; a sample that one of them takes out is not trained on."""
    epochs: int = Field(1, gt=0)
    """How often each batch is gone through."""
    minibatches: int = Field(1, gt=0)
    """Optimizer steps an epoch."""
    max_staleness: int = Field(0, ge=0)
    """Versions by which training data may be old. 0: exact alternation of rollout and training."""
    evaluators: named(plug("evaluator")) = {}  # ty: ignore
    every: Every = Every()
    deadlines: Deadlines = Deadlines()

    def owners(self) -> list[str]:
        """Names of the models that samples are of: policies, or the reward models that learn."""
        return [name for name, model in self.models.items() if model.has_samples]


class RunConfig(Tree):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run and its directory: letters, digits, ``.``, ``_``, ``-``."""
    seed: int = Field(0, ge=0)
    runs_dir: Path = Path("runs")
    """Where run directories are made."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    numerics: Literal["default", "bitwise"] = "default"
    """bitwise: engine and trainer give a token the same log-probability to the last bit, whatever it is batched with, and a resumed run
    goes on exactly as if it had not been interrupted. On a CPU, in float32, with engine local and trainer torch; slower
    (docs/numerics.md)."""
    cluster: plug("cluster") = Field(default={"use": "processes"}, validate_default=True)  # ty: ignore
    """Where the ranks of models that are spread over several processes run."""
    trackers: named(plug("tracker")) = Field(default={"tensorboard": {"use": "tensorboard"}}, validate_default=True)  # ty: ignore
    """By name, beside ``metrics.jsonl``, which is always written."""
    hooks: named(plug("hook")) = {}  # ty: ignore
    keep_checkpoints: int = Field(2, gt=0)
    """Newest cuts that are kept."""
    import_from: list[Path] = []
    """Directories in which plug-in modules are found (the recipe's own is added)."""
    import_modules: list[str] = []
    """Modules that are imported before plug-ins are looked for, because they decorate some."""
    stages: named(StageConfig)  # ty: ignore
    _as_written: bool = PrivateAttr(False)  # read from a run's config.yaml, where every key stands that its Miles had

    def to_yaml(self) -> str:
        """The resolved configuration; ``from_resolved`` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)

    def fingerprint(self) -> str:
        """Hash of what a run computes; who watches, where, how often and how long it may take can change between lives of a run.

        Of a configuration that ``from_resolved`` has read it is a hash of what ``config.yaml`` says: a key that only a later Miles has is
        not there, and does not make another configuration of it.
        """
        where = {
            "urls",
            "key_variable",
            "servers",
            "interpreter",
            "environment",
            "boot_timeout_s",
            "generate_timeout_s",
            "control_timeout_s",
        }
        # A run that a gate stopped may go on with a wider one, and any on another number of ranks of trainer: torch.
        models = {"__all__": {"trainer": {"gates", "ranks"}, "engine": where}}
        asked: dict[str, Any] = dict.fromkeys(("timeout_s", "url", "base_url", "attempts", "concurrency", "key_variable"), True)
        asked["parts"] = {"__all__": asked}  # a weighted_sum may hold another
        rewards = {"__all__": asked}
        evaluators = {"__all__": {"rewards": rewards}}
        how_long = {"rewards": rewards, "evaluators": evaluators, "deadlines": True, "every": True, "models": models}
        aside = dict.fromkeys(("runs_dir", "cluster", "trackers", "hooks", "keep_checkpoints", "import_from", "import_modules"), True)
        data = self.model_dump(mode="json", exclude=aside | {"stages": {"__all__": how_long}}, exclude_unset=self._as_written)
        return hashlib.blake2b(yaml.safe_dump(data).encode(), digest_size=8).hexdigest()

    @staticmethod
    def from_mapping(data: dict[str, Any]) -> RunConfig:
        """Validate a mapping as a whole run. Raises ConfigError as ``resolve`` does."""
        prepare_imports(data)
        return _validate(Recipe(data, {(): "the configuration"}), data)

    @staticmethod
    def from_resolved(path: Path) -> RunConfig:
        """Read a run's ``config.yaml``. Plug-ins are found where the run found them."""
        try:
            data = yaml.safe_load(path.read_text())
        except OSError as error:
            raise ConfigError(f"{path.parent} is no run directory: {path.name} cannot be read ({error.strerror})") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path} holds a {type(data).__name__}; a resolved configuration is a mapping")
        prepare_imports(data)
        config = _validate(Recipe(data, {(): str(path)}), data)
        config._as_written = True
        return config


RUN_KEYS = frozenset(RunConfig.model_fields)


def resolve(name: str, overrides: list[str] | None = None) -> RunConfig:
    """Read, merge and validate a recipe.

    Raises:
        ConfigError: With one line for each wrong key: where it was set, what is wrong, the nearest right key.
        PluginError: A plug-in is missing or does not import.
    """
    recipe = load_recipe(name, overrides)
    common = {k: v for k, v in recipe.data.items() if k not in RUN_KEYS}
    run = {k: v for k, v in recipe.data.items() if k in RUN_KEYS and k != "stages"}
    stages = recipe.data.get("stages") or {"main": {}}
    run["stages"] = {stage: merge(common, overlay) for stage, overlay in stages.items()}
    given = run.get("import_from") or []
    if isinstance(given, list):  # else validation says what it is
        run["import_from"] = [*given, *map(str, recipe.directories)]
        prepare_imports(run)
    return _validate(recipe, run)


def prepare_imports(run: dict[str, Any]) -> None:
    """Let plug-ins be found: directories first, then the modules that decorate some."""
    add_import_directories(run.get("import_from", []))
    for name in run.get("import_modules") or []:
        import_module(name)


def _validate(recipe: Recipe, data: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(sentences(error, recipe, RunConfig, data)))) from None
