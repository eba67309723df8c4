"""Writes docs/configuration.md, every key there is, from the classes that read them.

uv run --locked python docs/make_configuration.py
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from miles_core.config import Deadlines, Every, KlReward, ModelConfig, RunConfig, StageConfig
from miles_core.plugin_finding import find_all
from miles_core.plugins import POINTS, PluginConfig, config_class
from miles_core.tokenizers import TokenizerConfig

HEAD = """# Every key

Made by `docs/make_configuration.py` from the code that reads them; a test holds it to that. A recipe says what differs from the
defaults. Keys of a stage may also stand at the top of a recipe: there they are defaults for all of its stages. On the command line a
key is written with dots, `stages.rl.models.policy.trainer.lr=1e-4`.

A plug-in is written as its name (`engine: local`) or with options (`engine: {use: local, max_slots: 64}`); `use` may also be
`module:attribute`.
"""
TREE: list[tuple[str, type[BaseModel]]] = [
    ("The run", RunConfig),
    ("A stage (`stages.<name>`)", StageConfig),
    ("A model (`models.<name>`)", ModelConfig),
    ("`kl_reward` of a model", KlReward),
    ("`tokenizer` of a model built from scratch", TokenizerConfig),
    ("`every` of a stage", Every),
    ("`deadlines` of a stage", Deadlines),
]
DISTRIBUTIONS = ("miles-core", "miles-kernels", "miles-rollout", "miles-train", "miles-agents")


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, cls in TREE:
        parts.append(f"## {title}\n\n{_first(cls)}\n\n{_table(cls)}")
    for point in sorted(POINTS):
        names = [name for name, found in sorted(find_all(point).items()) if found.origin.split(" ")[0] in DISTRIBUTIONS]
        if names:
            parts.append(f"## {point}")
        parts += [f"### {name}\n\n{_first(cls)}\n\n{_table(cls)}" for name in names if (cls := config_class(point, name))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _first(cls: type) -> str:
    """What its docstring begins with; a plain function or class stands behind options made from its signature."""
    return " ".join((inspect.getdoc(getattr(cls, "plain", cls)) or "").split("\n\n")[0].split())


def _table(cls: type[BaseModel]) -> str:
    rows = [f"| `{name}` | {kind} | {default} | {text} |" for name, kind, default, text in _keys(cls)]
    return "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows]) if rows else "No options."


def _keys(cls: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """(name, kind, default, meaning) of each key, in the order of the classes from the base on."""
    written = {name: found for base in reversed(cls.__mro__) for name, found in _written(base).items()}
    for name, field in cls.model_fields.items():
        if name == "use" and issubclass(cls, PluginConfig):
            continue
        annotation, text = written.get(name, (_source(field.annotation), ""))
        yield name, _escaped(_kind(annotation, field.metadata)), _escaped(_default(field)), _escaped(text)
        for inner in (field.annotation, *get_args(field.annotation)):
            if inspect.isclass(inner) and issubclass(inner, BaseModel) and inner not in [c for _, c in TREE]:
                yield from ((f"{name}.{k}", kind, default, meaning) for k, kind, default, meaning in _keys(inner))


def _written(cls: type) -> dict[str, tuple[str, str]]:
    """Annotation and docstring of each field that a class body declares, as written."""
    if cls in (object, BaseModel) or not issubclass(cls, BaseModel):
        return {}
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except OSError:  # made of a function's signature
        return {}
    assert isinstance(body, ast.ClassDef)
    found = {}
    for statement, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = after.value if isinstance(after, ast.Expr) else None
            text = value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""
            found[statement.target.id] = (ast.unparse(statement.annotation), " ".join(text.split()))
    return found


def _source(annotation: Any) -> str:
    """A type as it would be written; of options that are a function's arguments."""
    return annotation.__name__ if inspect.isclass(annotation) else str(annotation).replace("typing.", "")


def _kind(annotation: str, metadata: list[Any]) -> str:
    """What may stand there, in words."""
    node = ast.parse(annotation, mode="eval").body
    bounds = [f"{sign} {getattr(m, name)}" for m in metadata for name, sign in SIGNS.items() if hasattr(m, name)]
    return ", ".join([_words(node), *bounds])


SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "at least"}
NAMES = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "Path": "path",
    "None": "null",
    "Any": "anything",
}


def _words(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=None):
            return "null"
        case ast.Constant(value=value):
            return f"`{value}`"
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return NAMES.get(name, name)
        case ast.BinOp(left=left, right=right):
            return f"{_words(left)} or {_words(right)}"
        case ast.Call(func=ast.Name(id="plug"), args=[ast.Constant(value=point)]):
            return f"[{point}](#{point})"
        case ast.Call(func=ast.Name(id="named"), args=[inner]):
            return f"name: {_words(inner)}"
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            return ", ".join(_words(c) for c in choices.elts) if isinstance(choices, ast.Tuple) else _words(choices)
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[inner, *_])):
            return _words(inner)
        case ast.Subscript(value=ast.Name(id="list" | "tuple" | "frozenset"), slice=inner):
            elements = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return "list of " + " and ".join(dict.fromkeys(_words(e) for e in elements if not _is_dots(e)))
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[_, inner])):
            return f"name: {_words(inner)}"
    return ast.unparse(node)


def _is_dots(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else field.default_factory()
    if isinstance(value, BaseModel):
        return "see there"
    if isinstance(value, dict) and set(value) == {"use"}:
        return f"`{value['use']}`"
    return "null" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(page())
