"""Reading recipes: YAML with ``extends``, ``key=value`` overrides and stages, merged into plain mappings.

Every key remembers the file and line it came from, so that an error can say where. What the keys mean is ``config.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError
from .plugin_finding import did_you_mean

KeyPath = tuple[str, ...]
Mapping = dict[str, Any]


class Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, as people mean it; YAML 1.1 reads text unless there is a dot and a sign."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


@dataclass
class Recipe:
    """A merged recipe before validation.

    Attributes:
        data: The mapping.
        origins: Where each key was last set: ``file:line`` or ``override key=value``; the file itself for ().
        directories: Where the recipe file and those it extends lie (plug-ins beside them can be imported).
    """

    data: Mapping
    origins: dict[KeyPath, str]
    directories: list[Path] = field(default_factory=list)

    def origin(self, path: KeyPath) -> str:
        """Where a key, or the nearest mapping around it, was set."""
        return self.origins[path[: self.known_depth(path)]]

    def known_depth(self, path: KeyPath) -> int:
        """How many of a path's parts were set somewhere."""
        return next((n for n in range(len(path), 0, -1) if path[:n] in self.origins), 0)


def bundled_recipes() -> dict[str, Path]:
    """Recipes that ship with miles-core, by name (``quickstart``, ``gsm8k/tiny``)."""
    root = Path(str(resources.files("miles_core") / "recipes"))
    return {str(p.relative_to(root).with_suffix("")): p for p in sorted(root.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A recipe by bundled name or by path."""
    path = Path(name).expanduser()
    bundled = bundled_recipes()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            beside = [str(p) for p in path.parent.glob("*.y*ml")]
            raise ConfigError(f"no recipe file {path}.{did_you_mean(str(path), beside) or did_you_mean(path.stem, list(bundled))}")
        return path.resolve()
    if name not in bundled:
        raise ConfigError(
            f"no recipe is called {name!r}.{did_you_mean(name, list(bundled))} Bundled: {', '.join(bundled)}. A file ends in .yaml."
        )
    return bundled[name]


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe with what it extends, apply overrides.

    Args:
        name: Bundled name or path of a YAML file.
        overrides: ``key.sub=value`` each, values in YAML; ``model.x`` stands for ``models.policy.x``.

    Raises:
        ConfigError: A file is missing or is no YAML mapping, an override has no ``=``, or is ambiguous between stages.
    """
    path = find_recipe(name)
    recipe = _read(path, seen=())
    recipe.data.setdefault("name", path.stem if path.stem != "tiny" else f"{path.parent.name}-tiny")
    _check_stages(recipe)
    # Plug-ins are chosen first: an option given before them is an option of theirs.
    for override in sorted(overrides or [], key=lambda o: not o.partition("=")[0].endswith(".use")):
        _override(recipe, override)
    return recipe


def merge(base: Any, overlay: Any) -> Any:
    """Overlay onto base, mapping by mapping. A mapping that names another plug-in (``use``) replaces the old one whole.

    Beside a mapping, a text is short for a plug-in without options: ``torch`` for ``{use: torch}``.
    """
    if isinstance(base, str) and isinstance(overlay, dict):
        base = {"use": base}
    if isinstance(base, dict) and isinstance(overlay, str):
        overlay = {"use": overlay}
    if not (isinstance(base, dict) and isinstance(overlay, dict)):
        return overlay
    if "use" in overlay and overlay["use"] != base.get("use"):
        return dict(overlay)
    return base | {k: merge(base[k], v) if k in base else v for k, v in overlay.items()}


def _read(path: Path, seen: tuple[Path, ...]) -> Recipe:
    if path in seen:
        raise ConfigError(f"recipes extend each other in a circle: {' → '.join(map(str, (*seen, path)))}")
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=Loader)
        data = yaml.load(text, Loader=Loader)  # a SafeLoader
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}; a recipe is a mapping of keys")
    recipe = Recipe(data, {(): str(path)}, [path.parent])
    _note_lines(node, (), path, recipe.origins)
    parent = data.pop("extends", None)
    if parent is None:
        _empty_stages_are_whole(data, ())
        return recipe
    below = _read(_find_parent(parent, path, recipe.origin(("extends",))), (*seen, path))
    _empty_stages_are_whole(data, below.data.get("stages") or ())
    merged = merge(below.data, data)
    if (
        isinstance(data.get("stages"), dict)
        and isinstance(below.data.get("stages"), dict)
        and below.data["stages"].keys() <= data["stages"].keys()
    ):
        merged["stages"] = {name: merged["stages"][name] for name in data["stages"]}  # it names them all: its order counts
    return Recipe(merged, below.origins | recipe.origins, recipe.directories + below.directories)


def _empty_stages_are_whole(data: Mapping, below: Any) -> None:
    """A stage of its own without any key is one of nothing but common settings; null leaves out what is inherited."""
    stages = data.get("stages")
    if isinstance(stages, dict):
        data["stages"] = {name: {} if stage is None and name not in below else stage for name, stage in stages.items()}


def _find_parent(parent: Any, path: Path, where: str) -> Path:
    """The recipe that ``extends`` names: a file, seen from the recipe that says so, or a bundled one."""
    if not isinstance(parent, str):
        raise ConfigError(f"{where}: extends is a {type(parent).__name__}; it names one recipe")
    try:
        return find_recipe(str(path.parent / Path(parent).expanduser()) if parent.endswith((".yaml", ".yml")) else parent)
    except ConfigError as error:
        raise ConfigError(f"{where}: extends {parent!r}: {error}") from None


def _check_stages(recipe: Recipe) -> None:
    stages = recipe.data.get("stages") or {}
    if not isinstance(stages, dict):
        where = recipe.origin(("stages",))
        raise ConfigError(f"{where}: stages is a {type(stages).__name__}; it maps a stage's name to what differs there")
    for name, stage in stages.items():
        if not isinstance(stage, dict | None):
            where = recipe.origin(("stages", str(name)))
            raise ConfigError(f"{where}: stage {name} is a {type(stage).__name__}; it is a mapping of what differs there")


def _note_lines(node: yaml.Node | None, path: KeyPath, file: Path, origins: dict[KeyPath, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in origins:
                raise ConfigError(f"{file}:{key.start_mark.line + 1}: key {'.'.join(here)!r} stands twice")
            origins[here] = f"{file}:{key.start_mark.line + 1}"
            _note_lines(value, here, file, origins)


def _override(recipe: Recipe, text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not of the form key=value, e.g. seed=3 or model.trainer.lr=1e-4")
    path = tuple(key.split("."))
    if path[0] == "model":
        path = ("models", "policy", *path[1:])
    stages = recipe.data.get("stages") or {}
    if path[0] != "stages":
        owners = [name for name, stage in stages.items() if _sets(stage or {}, path)]
        if owners:
            stages_say = f"{'stage' if len(owners) == 1 else 'stages'} {', '.join(owners)}"
            choices = " or ".join(f"stages.{o}.{'.'.join(path)}={raw}" for o in owners)
            raise ConfigError(f"override {text!r}: {key} is set by {stages_say}; say {choices}")
    elif len(path) < 3 or path[1] not in stages:
        raise ConfigError(f"override {text!r}: expected stages.NAME.key, the recipe's stages are {', '.join(stages) or 'none'}")
    try:
        value = yaml.load(raw, Loader=Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: {raw!r} is not a YAML value: {error}") from error
    recipe.data = merge(recipe.data, _nest(path, value))
    recipe.origins[path] = f"override {text}"


def _sets(mapping: Any, path: KeyPath) -> bool:
    """Whether a stage sets the key, or gives a whole value in which it would lie."""
    for key in path:
        if not isinstance(mapping, dict):
            return True
        if key not in mapping:
            return False
        mapping = mapping[key]
    return True


def _nest(path: KeyPath, value: Any) -> Mapping:
    for key in reversed(path):
        value = {key: value}
    return value
