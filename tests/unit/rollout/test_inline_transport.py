"""Weights by the inline transport: they arrive, and what did not arrive is found."""

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from miles_core.digests import digests
from miles_core.errors import RunError
from miles_core.plugins import config_class


class Source:
    """A trainer of two tensors."""

    def __init__(self) -> None:
        self.weights = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.bfloat16)}

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.items()


class Sink(Source):
    """An engine that holds them, after ``spoil`` had its way."""

    def __init__(self, spoil: Any = lambda weights: None) -> None:
        self.weights, self.version, self.spoil = {}, 0, spoil
        self.state = "serving"

    @asynccontextmanager
    async def syncing(self) -> AsyncIterator[None]:
        self.state = "failed"
        yield
        self.state = "serving"

    async def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.weights = {name: tensor.clone() for name, tensor in weights}
        self.version = version
        self.spoil(self.weights)


def transport(tiny: Any) -> Any:
    return config_class("weight_transport", "inline").model_validate({"use": "inline"}).build(tiny.context())


async def test_every_sink_gets_the_weights(tiny: Any):
    source, sinks = Source(), [Sink(), Sink()]
    metrics = await transport(tiny).publish(source, sinks, 4)
    for sink in sinks:
        assert sink.version == 4 and all(torch.equal(sink.weights[n], t) for n, t in source.weights.items())
    assert metrics["bytes"] == 2 * (6 * 4 + 4 * 2) and metrics["seconds"] > 0


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda w: w["b.bias"].mul_(1.01), r"engine 1 \(Sink\).*version 4.*'b\.bias' was sent it has another 'b\.bias'"),
        (lambda w: w.update({"a.weight": w["a.weight"].reshape(3, 2)}), r"'a\.weight' was sent it has another"),
        (lambda w: w.update({"a.weight": w["a.weight"].view(torch.int32)}), r"'a\.weight' was sent it has another"),
        (lambda w: w.pop("b.bias"), r"'b\.bias' was sent it has 'nothing'"),
        (lambda w: w.update({"c": torch.zeros(1)}), r"'nothing' was sent it has 'c'"),
    ],
)
async def test_a_sink_that_holds_something_else_is_named(spoil: Any, message: str, tiny: Any):
    with pytest.raises(RunError, match=message):
        await transport(tiny).publish(Source(), sinks := [Sink(), Sink(spoil)], 4)
    assert [sink.state for sink in sinks] == ["failed", "failed"]


async def test_to_a_local_engine(tiny: Any):
    engine = tiny.engine()
    weights = {name: weight + 0.5 for name, weight in engine.named_weights()}
    source = Source()
    source.weights = weights
    await transport(tiny).publish(source, [engine], 7)
    assert engine.version == 7 and all(torch.equal(held, weights[name]) for name, held in engine.named_weights())
    await engine.close()


def test_digests_see_every_bit_and_no_layout():
    x = torch.arange(12.0).reshape(3, 4)
    same = digests([("x", x)])
    assert digests([("x", x.t().contiguous().t())]) == same == digests([("x", torch.nn.Parameter(x))])
    y = x.clone()
    y[2, 3] = torch.nextafter(y[2, 3], torch.tensor(99.0))
    for other in (("x", y), ("y", x), ("x", x.reshape(4, 3)), ("x", x.double())):
        assert digests([other])[0][1] != same[0][1]
    assert digests([("s", torch.tensor(1.0))]) != digests([("s", torch.tensor(2.0))])
