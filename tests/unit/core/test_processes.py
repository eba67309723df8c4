"""`cluster: processes`: ranks that answer, die, raise, hang; nothing is left of them."""

from __future__ import annotations

import asyncio
import os
import selectors
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from miles_core.clusters import ProcessesConfig
from miles_core.clusters.exchange import RankTraceback
from miles_core.clusters.processes import LocalRanks, Processes
from miles_core.errors import DataError, PluginError, RanksLost, RunError, StepRefused
from miles_core.protocols import BuildContext

WORKER = '''
import os, sys, time
import numpy as np
from pathlib import Path
from miles_core.errors import DataError, StepRefused

IMPORTED = os.getpid()


class Worker:
    """Torch-free: files in a directory stand for collectives."""

    def __init__(self, place, directory, who="nobody"):
        self.place, self.directory, self.who = place, Path(directory), who
        if who == "late":
            raise ValueError("cannot be built")

    def whoami(self, word):
        return self.place.rank, self.place.size, self.who, word, os.getpid(), IMPORTED, os.environ["RANK"]

    def meet(self, name):
        """Wait until every rank is here."""
        (self.directory / f"{name}-{self.place.rank}").touch()
        while len(list(self.directory.glob(f"{name}-*"))) < self.place.size:
            time.sleep(0.002)

    def double(self, array):
        return {"twice": 2 * array, "rank": self.place.rank}

    def raises(self, ranks, kind, meet_first):
        if meet_first:
            self.meet("agree")
        if self.place.rank in ranks:
            raise {"value": ValueError, "data": DataError, "refused": StepRefused}[kind](f"no good on {self.place.rank}")
        self.meet("never")

    def dies(self, rank, how):
        if self.place.rank == rank:
            print("the last words", flush=True)
            os.kill(os.getpid(), 9) if how == "killed" else os._exit(3)
        self.meet("never")

    def hangs(self, rank):
        if self.place.rank == rank:
            print("not ill, only asleep", flush=True)
            time.sleep(600)

    def stalls(self):
        yield "the first"
        print("not ill, only asleep", flush=True)
        time.sleep(600)

    def unsendable(self):
        return lambda: None

    def count(self, n, fail_at=-1):
        self.produced = 0
        for i in range(n):
            self.meet(f"item{i}")
            if i == fail_at:
                raise DataError(f"item {i} is bad")
            self.produced += 1
            yield i, np.full(1000, i)

    def produced_so_far(self):
        return self.produced
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("workers")
    (directory / "tiny_worker.py").write_text(WORKER)
    (directory / "broken_worker.py").write_text("import a_module_that_is_not_there")
    sys.path.append(str(directory))
    yield "tiny_worker"
    sys.path.remove(str(directory))


@pytest_asyncio.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Processes]:
    made = Processes(ProcessesConfig(use="processes"), BuildContext(tmp_path, "test", 0))
    yield made
    await made.close()


Start = Callable[..., Any]


@pytest_asyncio.fixture
async def start(cluster: Processes, module: str, tmp_path: Path) -> Start:
    async def started(size: int = 2, *extra: str, name: str = "model", seconds: float = 60) -> LocalRanks:
        meeting = tmp_path / "meeting"
        meeting.mkdir(exist_ok=True)
        return await cluster.start(
            f"{module}:Worker", size, [(str(meeting), *extra)] * size, name=name, log_dir=tmp_path / "logs", seconds=seconds
        )

    return started


def children() -> set[int]:
    """Processes below this one, grandchildren too."""
    found, new = set(), {os.getpid()}
    while new:
        new = {int(p) for pid in new for task in _tasks(pid) for p in read(f"/proc/{pid}/task/{task}/children").split()} - found
        found |= new
    return found


def _tasks(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return []


def read(file: str) -> str:
    """Nothing of a process that is gone, or goes while this is read."""
    try:
        return Path(file).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def alive(pid: int) -> bool:
    """Whether it runs; zombies do not."""
    status = read(f"/proc/{pid}/status")
    return status != "" and "State:\tZ" not in status


def wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + 30
    while any(alive(p) for p in pids):
        assert time.monotonic() < end, f"{[p for p in pids if alive(p)]} are still there"
        time.sleep(0.01)


async def call(ranks: LocalRanks, method: str, *arguments: Any, seconds: float = 30) -> list[Any]:
    return await ranks.call(method, [arguments] * ranks.size, seconds=seconds, what="an answer")


async def test_every_rank_runs_the_method_with_its_own_arguments(start: Start):
    ranks = await start(3, "me")
    answers = await ranks.call("whoami", [("a",), ("b",), ("c",)], seconds=30, what="names")
    assert [a[:4] for a in answers] == [(0, 3, "me", "a"), (1, 3, "me", "b"), (2, 3, "me", "c")]
    assert [a[6] for a in answers] == ["0", "1", "2"]
    assert len({a[4] for a in answers} | {a[5] for a in answers}) == 4  # three ranks, and the one process that imported the module


async def test_ranks_run_at_the_same_time(start: Start):
    assert await call(await start(3), "meet", "here") == [None] * 3


async def test_a_second_group_shares_the_import(start: Start):
    first, second = await start(1, name="one"), await start(2, name="two")
    importers = {a[5] for ranks in (first, second) for a in await call(ranks, "whoami", "")}
    assert len(importers) == 1


async def test_large_arrays_go_both_ways(start: Start):
    ranks, big = await start(2), np.arange(8_000_000, dtype=np.float32)  # 32 MB: more than a socket holds
    answers = await ranks.call("double", [(big,), (big[::2],)], seconds=60, what="products")
    np.testing.assert_array_equal(answers[0]["twice"], 2 * big)
    np.testing.assert_array_equal(answers[1]["twice"], 2 * big[::2])
    answers[0]["twice"][0] = 1  # what comes back can be written to


async def test_closing_leaves_no_process(start: Start, cluster: Processes, tmp_path: Path):
    before = children()
    ranks = await start(2)
    pids = [a[4] for a in await call(ranks, "whoami", "")]
    assert set(pids) <= children() - before
    await ranks.close()
    await ranks.close()
    assert not any(alive(p) for p in pids)
    with pytest.raises(RunError, match=r"were ended before\. the ranks of model were closed"):
        await call(ranks, "whoami", "")
    await cluster.close()
    assert children() <= before
    assert (tmp_path / "logs/model-rank-1.log").read_text().startswith("----- rank 1 of 2, pid ")


# Failures


async def test_what_all_ranks_refuse_is_raised_and_they_go_on(start: Start):
    ranks = await start(2)
    with pytest.raises(StepRefused, match=r"^no good on [01]$") as refusal:
        await call(ranks, "raises", [0, 1], "refused", True)
    assert isinstance(refusal.value.__cause__, RankTraceback) and "in raises" in str(refusal.value.__cause__)
    assert len(await call(ranks, "whoami", "")) == 2


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks get half a second to answer once one has failed."""
    monkeypatch.setattr("miles_core.clusters.exchange.GRACE", 0.5)


async def test_a_refusal_of_one_rank_keeps_its_class_and_ends_all(start: Start, impatient: None):
    ranks = await start(2)
    pids = [a[4] for a in await call(ranks, "whoami", "")]
    with pytest.raises(DataError, match=r"rank 1 of 2 of model: no good on 1"):
        await call(ranks, "raises", [1], "data", False)
    assert not any(alive(p) for p in pids)
    with pytest.raises(
        RunError, match=r"asked for an answer \(whoami\): its ranks were ended before. Rank 1 failed in raises: no good on 1"
    ):
        await call(ranks, "whoami", "")


async def test_any_other_exception_brings_its_own_traceback(start: Start, impatient: None, tmp_path: Path):
    ranks = await start(2)
    with pytest.raises(
        RunError, match=r"rank 0 of 2 of model failed in raises: ValueError: no good on 0. Its log is .*model-rank-0.log"
    ) as e:
        await call(ranks, "raises", [0], "value", False)
    assert 'raise {"value": ValueError' in str(e.value.__cause__)
    assert "ValueError: no good on 0" in (tmp_path / "logs/model-rank-0.log").read_text()


@pytest.mark.parametrize(("how", "status"), [("killed", "signal SIGKILL"), ("exits", "exit status 3")])
async def test_a_rank_that_dies_is_named_with_its_log(start: Start, impatient: None, how: str, status: str):
    ranks = await start(2)
    pids = [a[4] for a in await call(ranks, "whoami", "")]
    with pytest.raises(
        RunError, match=rf"(?s)rank 1 of 2 of model died in dies \({status}\)\. .*model-rank-1.log, ends with:\n  the last words"
    ):
        await call(ranks, "dies", 1, how)
    assert not any(alive(p) for p in pids)


async def test_a_rank_that_died_between_calls_is_noticed(start: Start):
    ranks = await start(2)
    victim = (await call(ranks, "whoami", ""))[1][4]
    os.kill(victim, 9)
    with pytest.raises(RunError, match=r"rank 1 of 2 of model died in whoami \(signal SIGKILL\)"):
        await call(ranks, "whoami", "")


async def test_silence_shows_where_the_rank_hangs(start: Start):
    ranks = await start(2)
    pids = [a[4] for a in await call(ranks, "whoami", "")]
    with pytest.raises(RunError, match=r"(?s)waited 2 s for an answer: rank 1 of 2 of model did not answer hangs.*only asleep.* in hangs"):
        await call(ranks, "hangs", 1, seconds=2)  # in which rank 0 has to answer
    assert not any(alive(p) for p in pids)


async def test_a_result_that_cannot_be_sent_is_a_failure_of_its_rank(start: Start):
    with pytest.raises(RunError, match=r"failed in unsendable: .*pickle"):
        await call(await start(1), "unsendable")


async def test_an_argument_that_cannot_be_sent_reaches_no_rank(start: Start):
    ranks = await start(2)
    with pytest.raises(Exception, match="pickle"):
        await ranks.call("whoami", [("fine",), (lambda: None,)], seconds=30, what="names")
    assert len(await call(ranks, "whoami", "")) == 2


async def test_a_worker_that_cannot_be_built(start: Start, cluster: Processes):
    before = children()
    with pytest.raises(RunError, match="failed in tiny_worker:Worker: ValueError: cannot be built"):
        await start(2, "late")
    await cluster.close()
    assert children() <= before


async def test_a_module_that_does_not_import(cluster: Processes, module: str, tmp_path: Path):
    with pytest.raises(PluginError, match="broken_worker cannot be made ranks of: ModuleNotFoundError: No module named 'a_module_that"):
        await cluster.start("broken_worker:Worker", 1, [()], name="model", log_dir=tmp_path, seconds=60)


async def test_a_class_that_is_not_there(cluster: Processes, module: str, tmp_path: Path):
    with pytest.raises(PluginError, match="module 'tiny_worker' has no 'Nobody'"):
        await cluster.start(f"{module}:Nobody", 1, [()], name="model", log_dir=tmp_path, seconds=60)


# Calls that are given up


async def test_a_call_that_is_given_up_is_waited_for_by_the_next(start: Start, tmp_path: Path):
    ranks = await start(2)
    task = asyncio.create_task(call(ranks, "meet", "later"))
    end = time.monotonic() + 30
    while not (tmp_path / "meeting/later-0").exists():  # it runs
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
    task.cancel()
    answers = await call(ranks, "whoami", "mine")
    assert [a[3] for a in answers] == ["mine", "mine"]


async def test_a_start_that_is_given_up_leaves_nothing(start: Start, cluster: Processes):
    before = children()
    task = asyncio.create_task(start(2))
    while not children() - before:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await cluster.close()
    wait_until_gone(list(children() - before))


# Closing


async def until_asleep(log: Path) -> None:
    """Until a rank is in the middle of what it does not come out of."""
    end = time.monotonic() + 30
    while "asleep" not in log.read_text():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_closing_wakes_who_waits_for_an_answer(start: Start, tmp_path: Path):
    """And who waits for his turn; neither waits until his deadline."""
    ranks = await start(2)
    waiting = asyncio.create_task(call(ranks, "hangs", 0))
    await until_asleep(tmp_path / "logs/model-rank-0.log")
    behind = asyncio.create_task(call(ranks, "whoami", ""))
    await asyncio.sleep(0)
    await ranks.close()
    with pytest.raises(RanksLost) as woken:
        await waiting
    assert "30 s" not in str(woken.value)  # the deadline of the call
    for late in (behind, call(ranks, "whoami", "")):
        with pytest.raises(
            RanksLost, match=r"asked for an answer \(whoami\): its ranks were ended before\. the ranks of model were closed"
        ):
            await late


async def test_closing_wakes_who_waits_for_the_next_item(start: Start, tmp_path: Path):
    ranks = await start(2)
    items = ranks.stream("stalls", [()] * 2, seconds=30, what="words")
    assert await asyncio.to_thread(next, items) == "the first"
    waiting = asyncio.create_task(asyncio.to_thread(next, items))
    await until_asleep(tmp_path / "logs/model-rank-0.log")
    await ranks.close()
    with pytest.raises(RanksLost) as woken:
        await waiting
    assert "30 s" not in str(woken.value)


async def test_who_asks_while_silent_ranks_are_ended_is_told_so(start: Start):
    """A rank that sleeps is given two seconds to end by itself."""
    ranks = await start(1)
    silent = asyncio.create_task(call(ranks, "hangs", 0, seconds=0.5))
    end = time.monotonic() + 30
    while ranks.ended is None:
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
    with pytest.raises(RanksLost, match=r"its ranks were ended before\. rank 0 of 1 of model did not answer hangs within 0\.5 s"):
        await call(ranks, "whoami", "", seconds=0.2)
    with pytest.raises(RanksLost, match=r"did not answer hangs\. Its log"):
        await silent


async def test_ranks_that_end_just_when_somebody_turns_to_them(start: Start, monkeypatch: pytest.MonkeyPatch):
    """Their connections stay what they are until the call that uses them is done."""
    ranks = await start(1)
    register = selectors.DefaultSelector.register

    def ends_first(selector: Any, connection: Any, *how: Any) -> Any:
        if connection in ranks.connections and ranks.ended is None:
            ending = threading.Thread(target=ranks.end, args=("somebody was quicker",))
            ending.start()
            ending.join()
        return register(selector, connection, *how)

    monkeypatch.setattr(selectors.DefaultSelector, "register", ends_first)
    with pytest.raises(RanksLost, match=r"waited for an answer \(hangs\) when its ranks were ended\. somebody was quicker"):
        await call(ranks, "hangs", 0)
    assert [c.fileno() for c in ranks.connections] == [-1]


async def test_closing_while_a_start_has_no_process_yet(start: Start, cluster: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before, arrived, closed, mkdir = children(), threading.Event(), threading.Event(), Path.mkdir

    def waits(directory: Path, *how: Any, **options: Any) -> None:
        if directory == tmp_path / "logs":
            arrived.set()
            closed.wait(60)
        mkdir(directory, *how, **options)

    monkeypatch.setattr(Path, "mkdir", waits)
    starting = asyncio.create_task(start(1))
    await asyncio.to_thread(arrived.wait, 60)
    await cluster.close()
    closed.set()
    with pytest.raises(RanksLost, match="model cannot be started: the ranks of model were closed"):
        await starting
    assert children() <= before


BLOCKED = """
from pathlib import Path
(Path(__file__).parent / "begun").touch()
(Path(__file__).parent / "pipe").read_text()  # until somebody writes, which nobody does
"""


async def test_closing_does_not_wait_for_an_import(cluster: Processes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    before = children()
    (tmp_path / "blocked_worker.py").write_text(BLOCKED)
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.syspath_prepend(tmp_path)
    starting = asyncio.create_task(cluster.start("blocked_worker:Worker", 1, [()], name="model", log_dir=tmp_path, seconds=120))
    end = time.monotonic() + 30
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
    await asyncio.wait_for(cluster.close(), 15)
    with pytest.raises(RunError, match=r"the process that forks the ranks of blocked_worker is gone; its log is .*model-import.log"):
        await starting
    assert children() <= before


# Streams


def stream(ranks: LocalRanks, *arguments: Any, seconds: float = 30) -> Iterator[Any]:
    return ranks.stream("count", [arguments] * ranks.size, seconds=seconds, what="numbers")


async def test_a_stream_gives_rank_zeros_items_in_order(start: Start):
    ranks = await start(2)
    items = await asyncio.to_thread(lambda: list(stream(ranks, 5)))
    assert [i for i, _ in items] == list(range(5))
    assert all((array == i).all() for i, array in items)
    assert await call(ranks, "produced_so_far") == [5, 5]


async def test_no_rank_runs_ahead_of_who_takes(start: Start, tmp_path: Path):
    ranks = await start(2)
    items = stream(ranks, 100)
    await asyncio.to_thread(next, items)
    await asyncio.to_thread(next, items)
    assert not (tmp_path / "meeting/item3-0").exists()  # one is on its way at most
    items.close()  # ty: ignore[unresolved-attribute]
    assert await call(ranks, "produced_so_far") == [100, 100]  # the ranks went through the rest together


async def test_a_stream_that_was_left_does_not_keep_the_next_call_waiting(start: Start):
    """Its iterator lives on in a traceback, say."""
    ranks = await start(2)
    items = stream(ranks, 50)
    await asyncio.to_thread(next, items)
    assert await call(ranks, "produced_so_far") == [50, 50]
    with pytest.raises(RunError, match=r"cannot go on with numbers \(count\): a later call took its place"):
        await asyncio.to_thread(next, items)


async def test_a_failure_within_a_stream(start: Start):
    ranks = await start(2)
    items = stream(ranks, 5, 3)
    assert [(await asyncio.to_thread(next, items))[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"^item 3 is bad$"):
        await asyncio.to_thread(next, items)
    assert len(await call(ranks, "whoami", "")) == 2


# What becomes of the ranks when the run is gone

SCRIPT = """
import asyncio, os, sys, time
from pathlib import Path
from miles_core.clusters import ProcessesConfig
from miles_core.clusters.processes import Processes
from miles_core.protocols import BuildContext

async def main():
    here = Path(sys.argv[1])
    cluster = Processes(ProcessesConfig(use="processes"), BuildContext(here, "test", 0))
    ranks = await cluster.start("tiny_worker:Worker", 2, [(str(here),)] * 2, name="model", log_dir=here, seconds=60)
    print(*[a[4] for a in await ranks.call("whoami", [("",)] * 2, seconds=30, what="names")], flush=True)
    await ranks.call("hangs", [(0,)] * 2, seconds=600, what="nothing")

asyncio.run(main())  # no __main__ guard
"""


def test_ranks_end_when_the_run_is_killed(module: str, tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    path = os.pathsep.join(sys.path)
    run = subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})
    assert run.stdout is not None
    pids = [int(p) for p in run.stdout.readline().split()]
    assert len(pids) == 2 and all(alive(p) for p in pids)
    parents = [int(line.split()[1]) for p in pids for line in Path(f"/proc/{p}/status").read_text().splitlines() if line[:5] == "PPid:"]
    run.kill()
    run.wait()
    run.stdout.close()
    wait_until_gone([*pids, *parents])
