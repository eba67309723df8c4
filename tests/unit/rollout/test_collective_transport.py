"""``weight_transport: collective``: the SGLang engine in process groups with fake servers that misbehave, and what `miles check` says.

The fakes are real ranks of gloo groups; that SGLang's own meet ours is among the tests of the engine over real servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.fake_sglang import DROP, SILENCE, FakeServer, serving
from torch import Tensor

from miles_core.check import check
from miles_core.config import RunConfig
from miles_core.digests import checksum
from miles_core.errors import ConfigError, DataError, InfrastructureFailure, RunError
from miles_core.protocols import GenerateRequest, SamplingParams
from miles_rollout.local.weights import read_weights
from miles_rollout.sglang.client import Deadlines, SglangClient, Silence
from miles_rollout.sglang.group import Group
from miles_rollout.sglang.payload import Bucket, buckets
from miles_rollout.sglang.shape import ModelShape

JOIN, UPDATE = "/init_weights_update_group", "/update_weights_from_distributed"


def weights_of(tiny: Any) -> dict[str, Tensor]:
    return dict(read_weights(tiny.path))


async def versions(engine: Any) -> list[int]:
    """Of four tokens it samples."""
    generation = await engine.generate(GenerateRequest("s", np.array([1, 2, 4], np.int32), SamplingParams(4), key=1))
    return generation.versions.tolist()


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles_rollout.sglang.updates.buckets", lambda weights, _: buckets(weights, 1 << 14))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """Numbers of the servers that are given half a second only to meet or to take weights. All others have as long as they need."""
    servers: dict[str, set[int]] = {JOIN: set(), UPDATE: set()}

    class Hasty(Group):
        def _hurry(self, path: str) -> None:
            self._seconds = 0.5 if int(self._client.name.split()[2]) in servers[path] else 60

        async def join(self) -> None:
            self._hurry(JOIN)
            await super().join()

        async def send(self, bucket: Bucket) -> None:
            self._hurry(UPDATE)
            await super().send(bucket)

    monkeypatch.setattr("miles_rollout.sglang.servers.Group", Hasty)
    return servers


# ---- the engine -------------------------------------------------------------------------------------------------------


async def test_every_server_gets_the_weights_through_a_group_of_its_own(tiny: Any, small_buckets: None):
    fakes = FakeServer(), FakeServer()
    async with serving(tiny, *fakes) as engine:
        for version in (5, 6):
            for fake in fakes:
                fake.seen.clear()
                fake.received.clear()
            await engine.broadcast_weights(weights_of(tiny).items(), version)
            assert engine.version == version and await versions(engine) == [version] * 4
            for fake in fakes:
                assert fake.version == str(version) and not fake.paused and not fake.open_update and len(fake.peers) == 1
                assert checksum(sorted(fake.received.items())) == checksum(sorted(weights_of(tiny).items()))
                calls = [path for path in fake.paths() if path not in ("/model_info", "/generate")]
                joins = [JOIN] if version == 5 else []  # made once
                assert calls[0] == "/pause_generation" and calls[1 : 1 + len(joins)] == joins
                assert calls.count(UPDATE) > 1 and calls[-3:] == ["/end_weight_update", "/update_weight_version", "/continue_generation"]
        assert set(fakes[0].peers).isdisjoint(fakes[1].peers)
        await engine.close()
        assert [fake.peers for fake in fakes] == [{}, {}]


async def test_a_refused_group_changes_nothing(tiny: Any):
    fakes = FakeServer(), FakeServer()
    async with serving(tiny, *fakes) as engine:
        fakes[1].overrides[JOIN] = 400, {"success": False, "message": "no gloo here"}
        with pytest.raises(RunError, match=rf"SGLang server 1 .*refuses {JOIN}.*: no gloo here"):
            await engine.broadcast_weights(weights_of(tiny).items(), 3)
        assert await versions(engine) == [0] * 4 and fakes[0].peers == {} and "/begin_weight_update" not in fakes[0].paths()
        fakes[1].overrides.clear()
        await engine.broadcast_weights(weights_of(tiny).items(), 4)
        assert await versions(engine) == [4] * 4


async def test_a_server_that_does_not_come_is_lost_and_named(tiny: Any, hasty: dict[str, set[int]]):
    fakes = FakeServer(), FakeServer()
    async with serving(tiny, *fakes) as engine:
        fakes[0].overrides[JOIN] = SILENCE
        hasty[JOIN].add(0)
        await engine.broadcast_weights(weights_of(tiny).items(), 1)  # by the one that is left
        assert fakes[1].version == "1" and fakes[0].version == "0"
        await engine._servers[1].leave_group()
        fakes[1].overrides[JOIN] = SILENCE
        hasty[JOIN].add(1)
        met = r"server {} .*did not meet the trainer at 127.0.0.1:\d+ .*it must run on this machine.* within 0.5 s"
        with pytest.raises(RunError, match=rf"no server is left of 2:\n- SGLang {met.format(0)}(.|\n)*{met.format(1)}"):
            await engine.broadcast_weights(weights_of(tiny).items(), 2)


@pytest.mark.parametrize(
    "path, answer, message",
    [
        (UPDATE, (400, {"success": False, "message": "Failed to receive"}), rf"server 1 .*refuses {UPDATE}.*Failed to receive"),
        (UPDATE, {"success": False, "message": "no room"}, rf"server 1 .*did not do {UPDATE}: no room"),
        (UPDATE, b'{"success": tr', rf"server 1 .*{UPDATE} with 14 bytes that are no JSON"),
        (
            "/end_weight_update",
            (400, {"success": False, "message": "none is open"}),
            r"server 1 .*refuses /end_weight_update.*none is open",
        ),
    ],
)
async def test_a_server_that_does_not_take_an_update(path: str, answer: Any, message: str, tiny: Any):
    """It never receives what was sent: the groups are of no use any more, the next update makes new ones."""
    fakes = FakeServer(), FakeServer()
    async with serving(tiny, *fakes) as engine:
        fakes[1].overrides[path] = answer
        with pytest.raises(RunError, match=message):
            await engine.broadcast_weights(weights_of(tiny).items(), 3)
        assert [fake.peers for fake in fakes] == [{}, {}]
        with pytest.raises(RunError, match="serves nothing: version 3 of its weights did not arrive whole"):
            await versions(engine)
        fakes[1].overrides.clear()
        fakes[1].open_update = False
        await engine.broadcast_weights(weights_of(tiny).items(), 4)
        assert await versions(engine) == [4] * 4 and [len(fake.peers) for fake in fakes] == [1, 1]


async def test_a_weight_that_does_not_fit_in_the_middle(tiny: Any, small_buckets: None):
    fake, weights = FakeServer(), weights_of(tiny)
    del weights["model.norm.weight"]
    async with serving(tiny, fake) as engine:
        with pytest.raises(DataError, match=r"1 weights are missing, the first is 'model.norm.weight'"):
            await engine.broadcast_weights(weights.items(), 3)
        assert UPDATE in fake.paths() and fake.peers == {} and not fake.open_update and not fake.paused
        with pytest.raises(RunError, match="serves nothing: version 3"):
            await versions(engine)
        await engine.broadcast_weights(weights_of(tiny).items(), 4)
        assert await versions(engine) == [4] * 4


async def test_a_server_that_dies_in_an_update_is_lost_and_the_others_go_on(tiny: Any, small_buckets: None):
    fakes = FakeServer(), FakeServer()
    async with serving(tiny, *fakes) as engine:
        deaths = []

        def die(body: Any, usual: Any) -> Any:
            deaths.append(asyncio.ensure_future(fakes[0].die()))
            return DROP

        fakes[0].overrides[UPDATE] = die  # with the first bucket
        await engine.broadcast_weights(weights_of(tiny).items(), 3)
        await asyncio.gather(*deaths)
        assert checksum(sorted(fakes[1].received.items())) == checksum(sorted(weights_of(tiny).items()))
        assert await versions(engine) == [3] * 4 and fakes[0].version == "0"
        await fakes[1].die()
        with pytest.raises(RunError, match=r"no server is left of 2:\n- SGLang server 0 .*\n- SGLang server 1 "):
            await engine.broadcast_weights(weights_of(tiny).items(), 4)


async def test_silence_in_an_update_loses_the_server(tiny: Any, hasty: dict[str, set[int]]):
    fakes = FakeServer(), FakeServer()
    async with serving(tiny, *fakes) as engine:
        fakes[0].overrides[UPDATE] = SILENCE
        hasty[UPDATE].add(0)
        await engine.broadcast_weights(weights_of(tiny).items(), 3)
        assert await versions(engine) == [3] * 4
        assert [len(fake.peers) for fake in fakes] == [0, 1]  # it was told that nothing comes any more
        fakes[1].overrides[UPDATE] = SILENCE
        hasty[UPDATE].add(1)
        with pytest.raises(RunError, match=r"no server is left of 2:\n- SGLang server 0 .*did not take 251904 bytes .* within 0.5 s"):
            await engine.broadcast_weights(weights_of(tiny).items(), 4)


async def test_a_publish_that_is_given_up_leaves_the_groups(tiny: Any):
    fake = FakeServer()
    async with serving(tiny, fake) as engine:
        fake.overrides[UPDATE] = SILENCE
        publishing = asyncio.create_task(engine.broadcast_weights(weights_of(tiny).items(), 3))
        while UPDATE not in fake.paths():
            await asyncio.sleep(0.01)
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publishing
        assert fake.peers == {} and not fake.open_update
        fake.overrides.clear()
        await engine.broadcast_weights(weights_of(tiny).items(), 4)
        assert await versions(engine) == [4] * 4


# ---- one group --------------------------------------------------------------------------------------------------------


BUCKET = Bucket(torch.zeros(1 << 20, dtype=torch.uint8))
BUCKET.add("w", torch.zeros(1 << 18))


@contextlib.asynccontextmanager
async def group(tiny: Any, fake: FakeServer) -> AsyncIterator[Group]:
    """Joined, with a fake that is silent when it is to take weights."""
    async with fake.running():
        client = SglangClient("the server", fake.url, None, ModelShape.read(tiny.path), Deadlines(60, 60), lambda: "Its log.")
        group = Group(client, 1, 60)
        await group.join()
        fake.overrides[UPDATE] = SILENCE
        try:
            yield group
        finally:
            await group.leave(5)
            await client.close()


async def test_weights_that_nobody_takes(tiny: Any):
    async with group(tiny, FakeServer()) as sender:
        sender._seconds = 0.5  # not to meet
        with pytest.raises(
            Silence, match=r"the server did not take 1048576 bytes of weights through its process group within 0.5 s\. Its log"
        ):
            await sender.send(BUCKET)


async def test_a_connection_that_breaks_while_weights_are_sent(tiny: Any):
    fake = FakeServer()
    async with group(tiny, fake) as sender:
        sending = asyncio.create_task(sender.send(BUCKET))
        while UPDATE not in fake.paths():
            await asyncio.sleep(0.01)
        fake.peers.clear()
        assert not (await asyncio.wait({sending}, timeout=0.2))[0]  # the end of the request says more
        await fake.die()
        with pytest.raises(InfrastructureFailure, match=rf"the server broke off {UPDATE}: .*Its log") as caught:
            await sending
        assert not isinstance(caught.value, Silence)


async def test_a_connection_that_breaks_though_the_server_says_that_all_is_well(tiny: Any):
    fake = FakeServer()
    async with group(tiny, fake) as sender:
        fake.overrides[UPDATE] = {"success": True}
        fake.peers.clear()
        with pytest.raises(InfrastructureFailure, match=r"the server did not take 1048576 bytes .* the connection broke\. Its log"):
            await sender.send(BUCKET)


async def test_leaving_ends_the_wait_for_ranks_that_nobody_sends(tiny: Any, monkeypatch: pytest.MonkeyPatch):
    """Else a thread would sit in torch until the deadline, and abort the whole process if that ends meanwhile."""
    fake, met = FakeServer(), threading.Event()
    meet = Group._meet

    def meets(group: Group, listener: Any) -> None:
        try:
            meet(group, listener)
        finally:
            met.set()

    monkeypatch.setattr(Group, "_meet", meets)
    async with fake.running():
        client = SglangClient("the server", fake.url, None, ModelShape.read(tiny.path), Deadlines(60, 60), lambda: "Its log.")
        fake.overrides[JOIN] = 400, {"success": False, "message": "no gloo here"}
        group = Group(client, 1, 3600)
        with pytest.raises(RunError, match="no gloo here"):
            await group.join()
        assert not met.is_set()
        await group.leave(60)
        assert await asyncio.to_thread(met.wait, 60)
        await client.close()


# ---- what is refused beforehand ---------------------------------------------------------------------------------------


def rows(): ...


def reward(sample): ...


@pytest.mark.parametrize(
    "engine, complaint",
    [
        ({"use": "local"}, "'local' takes no weights from one; use transport: inline"),
        (
            {"use": "sglang", "urls": ["http://10.0.0.7:30000"], "key_variable": "KEY"},
            "'sglang' has a server at http://10.0.0.7:30000, on another machine; use transport: tensor",
        ),
        ({"use": "sglang", "arguments": {"dp-size": 2}}, "'sglang' has dp-size: 2, and SGLang groups only tensor-parallel ranks; use"),
        ({"use": "sglang", "arguments": {"tp_size": 2, "pp_size": 1}}, None),
        ({"use": "sglang", "urls": ["http://127.0.0.1:30000"]}, None),
    ],
)
def test_engines_that_cannot_be_in_a_group_are_refused_by_check(engine: dict[str, Any], complaint: str | None):
    policy = {"path": "m", "trainer": {"use": "torch"}, "engine": engine, "transport": "collective", "advantage": "grpo"}
    stage = {
        "steps": 1,
        "groups": 2,
        "data": f"{__name__}:rows",
        "rollout": {"use": "trajectories", "group_size": 4, "sampling": {"max_tokens": 8}},
        "rewards": {"r": f"{__name__}:reward"},
        "models": {"policy": policy | {"losses": {"ppo": {"use": "ppo_clip"}}}},
    }
    config = RunConfig.model_validate({"name": "x", "trackers": {}, "stages": {"main": stage}})
    if complaint is None:
        check(config)
        return
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert f"transport 'collective' sends through a process group on this machine, but engine {complaint}" in str(caught.value)
