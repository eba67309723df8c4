"""The calculator computes exactly what Python's fractions compute, and refuses everything that is not arithmetic."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from fixtures.gsm8k import gsm8k
from hypothesis import given
from hypothesis import strategies as st

from miles_agents.arithmetic import evaluate, written

NUMBERS = st.decimals(0, 10**6, places=2).map(lambda d: f"{d:f}".rstrip("0").rstrip("."))
EXPRESSIONS = st.recursive(
    NUMBERS, lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})"), max_leaves=6
)


def exact(expression: str) -> Fraction:
    """Python's own evaluation, each number made a Fraction first."""
    return eval(re.sub(r"[\d.]+", r"Fraction('\g<0>')", expression), {"Fraction": Fraction})


@given(EXPRESSIONS)
def test_values_are_exact(expression: str) -> None:
    try:
        expected = exact(expression)
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="cannot compute"):
            evaluate(expression)
        return
    if len(expression) <= 100:
        assert evaluate(expression) == expected


@given(st.fractions())
def test_numbers_are_written_within_half_a_millionth(value: Fraction) -> None:
    text = written(value)
    assert re.fullmatch(r"-?\d+(\.\d{0,5}[1-9])?", text) and text != "-0"
    assert abs(Fraction(text) - value) <= Fraction(1, 2 * 10**6)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("47 + 58", "105"),
        ("12-58", "-46"),
        ("0.1+0.2", "0.3"),
        (".5*5", "2.5"),
        ("2+3*4", "14"),
        ("20*10%", "2"),
        ("560//10", "56"),
        ("10/3", "3.333333"),
        ("-(1-3)", "2"),
        (" 7 ", "7"),
    ],
)
def test_examples(expression: str, expected: str) -> None:
    assert written(evaluate(expression)) == expected


@pytest.mark.parametrize(
    "expression",
    [
        "",
        " ",
        "x",
        "2**3",
        "9**9**9",
        "1e9",
        "0x10",
        "1_0",
        "(1",
        "1)",
        "1 2",
        "(2)(3)",
        "1/0",
        "1//0",
        "()",
        "1,2",
        "5 % 3",
        "__import__('os')",
        "1\n+1",
    ]
    + ["1j", "not 1", "[1]", "1<2", "1if 1else 2", "9" * 101, "(" * 100, "007"],
)
def test_anything_else_is_refused(expression: str) -> None:
    with pytest.raises(ValueError):
        evaluate(expression)


def test_it_computes_every_annotation_of_gsm8k() -> None:
    """All 27,998 of them; one, ``3/4=3/4``, has a fraction where the others have a decimal number."""
    alike, count = 0, 0
    for split in ("train", "test"):
        for prompt in gsm8k(split):
            for before, result in zip(prompt.demonstration, prompt.demonstration[1:], strict=False):
                if not result.trained:
                    value = evaluate(before.text.rpartition("<<")[2].removesuffix("="))
                    text = result.text.removesuffix(">>")
                    assert value == Fraction(text), (prompt.id, before.text, text)
                    alike, count = alike + (written(value) == text), count + 1
    assert count == 27_998
    assert alike / count > 0.97  # the others are written 4.50 or .5
