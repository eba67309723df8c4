"""Reading recipes: YAML with ``extends``, ``key=value`` overrides and stages, merged into plain mappings.

Every key remembers the file and line it came from, so that an error can say where. What the keys mean is ``config.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError
from .plugins import did_you_mean

KeyPath = tuple[str, ...]
Mapping = dict[str, Any]


@dataclass
class Recipe:
    """A merged recipe before validation.

    Attributes:
        data: The mapping.
        origins: Where each key was last set: ``file:line`` or ``override key=value``.
        directory: Where the recipe file lies (plug-ins beside it can be imported).
    """

    data: Mapping
    origins: dict[KeyPath, str] = field(default_factory=dict)
    directory: Path = field(default_factory=Path)

    def origin(self, path: KeyPath) -> str:
        """Where a key, or the nearest mapping around it, was set."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, "the recipe")


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
            raise ConfigError(f"no recipe file {path}.{did_you_mean(path.stem, list(bundled))}")
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
    for override in overrides or []:
        _override(recipe, override)
    return recipe


def merge(base: Any, overlay: Any) -> Any:
    """Overlay onto base, mapping by mapping. A mapping that names another plug-in (``use``) replaces the old one whole."""
    if not (isinstance(base, dict) and isinstance(overlay, dict)):
        return overlay
    if "use" in overlay and overlay["use"] != base.get("use"):
        return dict(overlay)
    return base | {k: merge(base[k], v) if k in base else v for k, v in overlay.items()}


def _read(path: Path, seen: tuple[Path, ...]) -> Recipe:
    if path in seen:
        raise ConfigError(f"recipes extend each other in a circle: {' → '.join(map(str, (*seen, path)))}")
    try:
        node = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
        data = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}; a recipe is a mapping of keys")
    recipe = Recipe(data, {}, path.parent)
    _note_lines(node, (), path, recipe.origins)
    parent = data.pop("extends", None)
    if parent is None:
        return recipe
    beside = path.parent / parent
    below = _read(beside.resolve() if beside.is_file() else find_recipe(parent), (*seen, path))
    return Recipe(merge(below.data, data), below.origins | recipe.origins, path.parent)


def _note_lines(node: yaml.Node | None, path: KeyPath, file: Path, origins: dict[KeyPath, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in origins and origins[here].startswith(f"{file}:"):
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
        owners = [name for name, stage in stages.items() if _sets(stage, path)]
        if owners:
            stages_say = f"{'stage' if len(owners) == 1 else 'stages'} {', '.join(owners)}"
            choices = " or ".join(f"stages.{o}.{'.'.join(path)}={raw}" for o in owners)
            raise ConfigError(f"override {text!r}: {key} is set by {stages_say}; say {choices}")
    elif len(path) < 3 or path[1] not in stages:
        raise ConfigError(f"override {text!r}: expected stages.NAME.key, the recipe's stages are {', '.join(stages) or 'none'}")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: {raw!r} is not a YAML value: {error}") from error
    if isinstance(value, str):
        value = _number(value)
    recipe.data = merge(recipe.data, _nest(path, value))
    recipe.origins[path] = f"override {text}"


def _number(text: str) -> str | float:
    """YAML reads 1e-4 (without a dot) as text; people mean a number."""
    try:
        return float(text) if any(c.isdigit() for c in text) else text
    except ValueError:
        return text


def _sets(mapping: Any, path: KeyPath) -> bool:
    for key in path:
        if not isinstance(mapping, dict) or key not in mapping:
            return False
        mapping = mapping[key]
    return True


def _nest(path: KeyPath, value: Any) -> Mapping:
    for key in reversed(path):
        value = {key: value}
    return value
