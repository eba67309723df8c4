"""What is wrong with a configuration, in sentences: where a key was written, what was found, and the nearest right one."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from .plugins import config_class
from .recipe import KeyPath, Recipe


def sentences(error: ValidationError, recipe: Recipe, model: type[BaseModel], data: Any, prefix: KeyPath = ()) -> list[str]:
    """One sentence for each problem: where, which key, what was found, what was expected.

    Args:
        error: What validation found.
        recipe: Where keys were written.
        model: Of the whole tree.
        data: What was validated.
        prefix: Where in the tree ``error`` was raised.
    """
    out = []
    for problem in error.errors(include_url=False):
        nested = problem.get("ctx", {}).get("error")
        path = (*prefix, *(str(p) for p in problem["loc"]))
        if isinstance(nested, ValidationError):
            out += sentences(nested, recipe, model, data, path)
            continue
        written = _written(path, recipe)
        key, where = ".".join(written), recipe.origin(written)
        if problem["type"] == "extra_forbidden":
            known = _known_keys(model, path[:-1], data)
            out.append(f"{where}: unknown key {key!r}. {_hint(path, written, known, set(model.model_fields))}")
        elif problem["type"] == "missing":
            out.append(f"{where}: key {key!r} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            secret = isinstance(problem["input"], str) and "://" in problem["input"]  # addresses may hold keys
            found = "" if secret or isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
            emptied = problem["type"] == "dict_type" and problem["input"] is None  # as a stage is left out; entries are, one by one
            hint = f". To leave out what is inherited, null its entries: {key}: {{NAME: null}}" if emptied else ""
            out.append(f"{where}: {key}: {message[0].lower()}{message[1:]}{found}{hint}")
    return out


def _written(path: KeyPath, recipe: Recipe) -> KeyPath:
    """Where a key of a stage was written: there, or at the top of the recipe, from which stages inherit."""
    if path[:1] != ("stages",):
        return path
    in_stage, above = recipe.known_depth(path) - 2, recipe.known_depth(path[2:])
    return path if in_stage >= above else path[2:]


def _hint(path: KeyPath, written: KeyPath, known: list[str], of_run: set[str]) -> str:
    """The nearest right key; ``of_run``: those of the whole run."""
    of_stage = len(path) == 3 and path[0] == "stages"
    near = difflib.get_close_matches(path[-1], [*known, *sorted(of_run)] if of_stage else known, n=1, cutoff=0.5)
    if near and near[0] in of_run and of_stage and written == path:
        return f"{near[0]!r} belongs to the whole run: write it at the top of the recipe."
    return f"Did you mean {near[0]!r}?" if near else f"Known here: {', '.join(known)}."


def _known_keys(model: Any, path: KeyPath, data: Any) -> list[str]:
    """Keys that are allowed in the mapping at ``path``."""
    for depth, part in enumerate(path):
        data = data.get(part, {}) if isinstance(data, dict) else {}
        if isinstance(data, dict) and "use" in data and (point := _point_of(path[: depth + 1])):
            model = config_class(point, data["use"])
        elif hasattr(model, "model_fields") and part in model.model_fields:
            model = _inner_model(model.model_fields[part].annotation)
    return list(getattr(model, "model_fields", {}))


def _inner_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_inner_model, get_args(annotation)) if m is not None), None)


def _point_of(path: KeyPath) -> str | None:
    singular = {"rewards": "reward", "losses": "loss", "group_filters": "group_filter", "sample_filters": "sample_filter"}
    singular |= {"corrections": "ratio_correction"}
    singular |= {"evaluators": "evaluator", "trackers": "tracker", "hooks": "hook"}
    own = {"data": "data_source", "engine": "rollout_engine", "transport": "weight_transport", "estimator": "kl", "base": "advantage"}
    names = ("rollout", "trainer", "advantage", "aggregation", "generate", "environment", "cluster")
    last = path[-1]
    if len(path) > 1 and path[-2] in singular:
        return singular[path[-2]]
    return own.get(last) or (last if last in names else None)
