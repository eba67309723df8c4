"""A calculator that computes what a policy writes, and nothing else: numbers, ``+ - * / //``, percent and brackets."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

LONGEST = 100
DECIMALS = 6

_WRITTEN = re.compile(r"[0-9+\-*/().% ]+")
_PERCENT = re.compile(r"(\d+\.?\d*|\.\d+)%")
_OPERATORS: dict[type[ast.operator], Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_SIGNS: dict[type[ast.unaryop], Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def evaluate(expression: str) -> Fraction:
    """The exact value of e.g. ``(2+3)*.5``; ``20%`` is 0.2.

    Raises:
        ValueError: It is longer than 100 characters, divides by zero, or is anything else (names, ``**``, unbalanced brackets).
    """
    if len(expression) > LONGEST or not _WRITTEN.fullmatch(expression):
        raise ValueError(f"not arithmetic of at most {LONGEST} characters: {expression[:LONGEST]!r}")
    try:
        return _value(ast.parse(_PERCENT.sub(r"(\1/100)", expression.strip()), mode="eval").body)
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(f"cannot compute {expression!r}: {error}") from None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))  # through its text: .1 is one tenth, not the nearest binary number
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return Fraction(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        return _SIGNS[type(node.op)](_value(node.operand))
    raise ValueError(f"{ast.unparse(node)!r} is not arithmetic")


def written(value: Fraction) -> str:
    """A number as people write it: ``24``, ``-0.5``, ``1.25``; at most 6 decimals, no zeros at the end."""
    rounded = round(value, DECIMALS)
    whole, rest = divmod(abs(rounded), 1)
    decimals = f"{int(rest * 10**DECIMALS):0{DECIMALS}d}".rstrip("0")
    return ("-" if rounded < 0 else "") + str(int(whole)) + ("." + decimals if decimals else "")
