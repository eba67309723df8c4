"""Whatever fails, and whenever: after resume the weights have been trained on every group of the data exactly once.

The model is the list of what it was trained on, saved and loaded with every cut, so that nothing can be lost or done twice
without the list showing it. Loop, producer, buffer, learner and cut are the real ones.
"""

from __future__ import annotations

import asyncio
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures.samples import answer

from miles_core import cut
from miles_core.buffer import Buffer
from miles_core.config import StageConfig
from miles_core.cursor import Cursor
from miles_core.errors import RunError, StepRefused
from miles_core.hooks import MOMENTS, Hooks
from miles_core.inspection.facts import sample_at, trajectory_files
from miles_core.learner import Learner
from miles_core.loop import Loop
from miles_core.observer import Observer
from miles_core.plugins import RewardConfig
from miles_core.producer import Producer
from miles_core.protocols import Evaluation, Players, Prompt, StepReport
from miles_core.run_dir import RunDir
from miles_core.sample import SampleId
from miles_core.scoring import Scorer
from miles_core.trackers import JsonlTracker

STEPS, GROUPS = 5, 3


class Failures:
    """Raises when a place is passed for the n-th time, once."""

    def __init__(self, place=None, nth=1):
        self.place, self.left = place, nth

    def pass_by(self, place):
        if place == self.place:
            self.left -= 1
            if self.left == 0:
                raise (StepRefused if place == "refuse" else RunError)(f"{place} failed")


class Stop:
    """Asks a loop to stop when any place is passed for the n-th time."""

    def __init__(self, nth):
        self.left = nth

    def pass_by(self, place):
        self.left -= 1
        if self.left == 0:
            self.loop.request_stop()


class Diary:
    """A trainer, an engine, a transport and an evaluator in one: weights are the ids of the groups they were trained on."""

    version = 0

    def __init__(self, failures, rng):
        self.failures, self.rng, self.read = failures, rng, []

    async def annotate(self, batch, columns):
        self.failures.pass_by("annotate")
        return batch.with_columns({c: np.zeros(batch.n_rows, np.float32) for c in columns})

    async def step(self, batch):
        self.failures.pass_by("refuse")
        self.failures.pass_by("step")
        self.read.append(list(dict.fromkeys(r.id.group for r in batch.refs)))
        self.failures.pass_by("end of step")
        return StepReport({"loss": 0.0}, 1)

    async def save(self, directory):
        self.failures.pass_by("save")
        await asyncio.sleep(0)
        (directory / "read.json").write_text(json.dumps(self.read))

    async def load(self, directory):
        self.read = json.loads((directory / "read.json").read_text())

    async def publish(self, source, sinks, version):
        self.failures.pass_by("publish")
        for sink in sinks:
            sink.version = version
        return {}

    async def evaluate(self, players):
        self.failures.pass_by("evaluate")
        return Evaluation({"avg@1": np.float32(0.5)})


class Prompts:
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return Prompt(str(index), "")


def rows(): ...


async def play(prompt, context): ...


def nothing(): ...


HERE = f"{__name__}:"
POLICY = {"path": "x", "trainer": HERE + "nothing", "transport": HERE + "nothing", "losses": {"ppo": "ppo_clip"}}


def life(directory, failures, *, seed=0, max_staleness=0, policies=("policy",), configs=None):
    """A loop in this run directory: new, or going on from its newest cut."""
    rng = random.Random(seed)
    models = dict.fromkeys(policies, POLICY)
    given = {"steps": STEPS, "groups": GROUPS, "models": models, "data": HERE + "rows", "rollout": HERE + "play"}
    stage = StageConfig.model_validate(given | {"every": {"checkpoint": 2, "evaluate": 2, "trajectories": 0}, "deadlines": {"rollout": 99}})
    run_dir = RunDir(directory)
    run_dir.checkpoints.mkdir(exist_ok=True, parents=True)
    diaries = {p: Diary(failures, rng) for p in policies}

    async def rollout(prompt, context):
        failures.pass_by("rollout")
        version = diaries[policies[0]].version
        for _ in range(rng.randrange(8)):
            await asyncio.sleep(0)
        ids = [SampleId("run", p, prompt.id, context.group, t) for p in policies for t in range(2)]
        return [answer(id, [5], [10, 11], version=version, reward=float(id.trajectory)) for id in ids]

    hook = type("Hook", (), {m: lambda self, loop, m=m: failures.pass_by(m) for m in MOMENTS})()
    buffer = Buffer(GROUPS, max_staleness, STEPS)
    players = Players("run", 0, tuple(policies), diaries, {}, dict.fromkeys(policies, 50))
    producer = Producer(buffer, Cursor(Prompts(), 0, False), rollout, players, Scorer(configs or {}, None), {}, 60.0)
    loop = Loop(
        name="main",
        stage=stage,
        run_dir=run_dir,
        first_step=0,
        players=players,
        learners=[Learner(p, stage, {p: diaries[p]}, None, {}, 0) for p in policies],
        trainers=diaries,
        transports=diaries,
        buffer=buffer,
        producer=producer,
        evaluators={"e": diaries[policies[0]]},
        trackers=[JsonlTracker(run_dir.metrics)],
        hooks=Hooks({"h": hook}),
        observer=Observer(),
        config_hash="toy",
        keep=2,
    )
    return loop


async def go_on(loop):
    """What ``assemble`` does with a cut, if there is one."""
    if not any(loop.run_dir.checkpoints.glob("step-*/manifest.json")):
        return loop
    directory, state, _ = cut.newest(loop.run_dir.checkpoints, "toy")
    for name, diary in loop.trainers.items():
        await diary.load(directory / "models" / name)
    loop.buffer.counts, loop.buffer.ready = state.buffer_counts(), cut.read_ready(directory, state)
    loop.producer.position, loop.producer.reissue = state.position, list(state.in_flight)
    loop.step = loop.saved_step = state.step
    loop.owes_evaluation = state.owes_evaluation
    return loop


def read_once(loop):
    """Whether the weights saw every group once, in steps of the right size."""
    read = next(iter(loop.trainers.values())).read
    return [len(step) for step in read] == [GROUPS] * STEPS and sorted(int(g[3:]) for step in read for g in step) == list(
        range(STEPS * GROUPS)
    )


PLACES = ["annotate", "refuse", "step", "end of step", "save", "publish", "evaluate", "rollout", *(m for m in MOMENTS if m != "on_failure")]


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("place", PLACES)
async def test_whatever_fails_every_group_is_trained_once(tmp_path, place, max_staleness):
    for nth in (1, 4):
        directory = tmp_path / str(nth)
        loop = life(directory, Failures(place, nth), seed=nth, max_staleness=max_staleness)
        try:
            await loop.run()
        except RunError as error:
            assert str(error) == f"{place} failed" or place == "save"
            loop = await go_on(life(directory, Failures(), seed=nth + 100, max_staleness=max_staleness))
            await loop.run()
        assert read_once(loop), (nth, next(iter(loop.trainers.values())).read)
        assert loop.buffer.counts.taken == loop.buffer.counts.started == STEPS * GROUPS


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("seed", range(5))
async def test_stopped_again_and_again_every_group_is_trained_once(tmp_path, seed, max_staleness):
    rng, lives = random.Random(seed), 0
    while True:
        stop = Stop(rng.randrange(1, 60))
        stop.loop = loop = await go_on(life(tmp_path, stop, seed=rng.random(), max_staleness=max_staleness))
        await loop.run()
        lives += 1
        if loop.step == STEPS:
            break
    assert read_once(loop), (lives, loop.trainers["policy"].read)


@pytest.mark.parametrize(
    ("place", "nth", "saved"),
    [
        ("annotate", 4, 3),
        ("before_step", 4, 3),
        ("publish", 5, 4),
        ("evaluate", 3, 4),
        ("step", 4, 2),
        ("refuse", 4, 3),
        ("rollout", 10, 3),
    ],
)
async def test_the_last_whole_step_is_saved_before_the_error_goes_on(tmp_path, place, nth, saved):
    """Regular cuts are taken every second step; a failure in the middle of an optimizer step cannot add one, a refused step can."""
    loop = life(tmp_path, Failures(place, nth))
    with pytest.raises(RunError, match=f"{place} failed") as found:
        await loop.run()
    assert cut.newest(loop.run_dir.checkpoints, "toy")[1].step == saved
    what = "What was learned until the last good cut" if loop.step > saved else "What was learned"
    assert found.value.__notes__ == [f"{what} is saved. Go on with: miles resume {tmp_path}"]


async def test_a_step_that_is_refused_after_another_policy_took_its_own_is_no_consistent_state(tmp_path):
    """The sixth refusal point is the second policy's in step 3: the first policy's weights have moved on already."""
    loop = life(tmp_path, Failures("refuse", 6), policies=("doctor", "patient"))
    with pytest.raises(StepRefused):
        await loop.run()
    assert cut.newest(loop.run_dir.checkpoints, "toy")[1].step == 2


async def test_before_the_first_step_there_is_nothing_to_save_and_nothing_is_promised(tmp_path):
    loop = life(tmp_path, Failures("annotate", 1))
    with pytest.raises(RunError) as found:
        await loop.run()
    assert not hasattr(found.value, "__notes__") and not list(loop.run_dir.checkpoints.iterdir())


async def test_a_hook_that_fails_at_the_failure_hides_nothing(tmp_path):
    loop = life(tmp_path, Failures("publish", 3))

    class Broken:
        def on_failure(self, loop):
            raise KeyError("mine")

    loop.hooks = Hooks({"broken": Broken()})
    with pytest.raises(RunError, match="publish failed") as found:
        await loop.run()
    assert found.value.__notes__[-1] == "on_failure of a hook failed too: KeyError: 'mine'"
    assert cut.newest(loop.run_dir.checkpoints, "toy")[1].step == 2


async def test_metrics_hold_the_rewards_of_the_batch_and_each_policy_under_its_name(tmp_path):
    class BatchReward(RewardConfig):
        point, unit = "reward", "batch"

        def build(self, context):
            return lambda samples: [10.0] * len(samples)

    loop = life(tmp_path, Failures(), policies=("doctor", "patient"), configs={"b": BatchReward(use="b", weight=2.0)})
    await loop.run()
    found = [row for row in loop.run_dir.rows() if "reward" in row]
    assert len(found) == STEPS and {row["reward"] for row in found} == {0.5 + 20.0}
    assert {"doctor/loss", "patient/loss"} <= found[0].keys() and "loss" not in found[0]
    assert found[-1]["eval/e/avg@1"] == 0.5


async def test_weights_are_exported_all_or_none(tmp_path):
    """A run whose last export was cut short is not finished: the directory is not there, or as it was."""
    from miles_core.runner import export

    class Exporter:
        def __init__(self, text, fails=False):
            self.text, self.fails = text, fails

        async def export(self, directory):
            directory.mkdir()
            (directory / "config.json").write_text(self.text)
            if self.fails:
                raise OSError("no space left")

    final = tmp_path / "final"
    with pytest.raises(OSError, match="no space left"):
        await export({"a": Exporter("1"), "b": Exporter("1", fails=True)}, final)
    assert not final.exists()
    for text in ("2", "3"):
        await export({"a": Exporter(text), "b": Exporter(text)}, final)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["final"]
        assert [(final / n / "config.json").read_text() for n in ("a", "b")] == [text, text]
    await export({"a": Exporter("4")}, final.with_name("next"), idle=[final / "b"])
    assert [(tmp_path / "next" / n / "config.json").read_text() for n in ("a", "b")] == ["4", "3"]  # handed on


async def test_an_evaluation_that_a_failure_took_is_made_by_the_next_life(tmp_path):
    """The step was trained and its weights saved; what they are worth must not stay unknown."""
    with pytest.raises(RunError, match="evaluate failed"):
        await life(tmp_path, Failures("evaluate", 3)).run()
    assert cut.newest(tmp_path / "checkpoints", "toy")[1].owes_evaluation
    loop = await go_on(life(tmp_path, Failures()))
    await loop.run()
    rows = [json.loads(line) for line in loop.run_dir.metrics.read_text().splitlines()]
    assert [row["stage_step"] for row in rows if "eval/e/avg@1" in row] == [0, 2, 4, 5]
    assert not cut.newest(tmp_path / "checkpoints", "toy")[1].owes_evaluation


@pytest.mark.parametrize("max_staleness", [0, 2])
async def test_a_batch_of_which_nothing_is_trained_is_dropped_and_replaced(tmp_path, max_staleness):
    """A trainer would refuse it, and again after every resume. The next groups are trained in its place, and it is counted."""
    loop = life(tmp_path, Failures(), max_staleness=max_staleness)
    empty = {f"e0-{number}" for number in range(GROUPS, 2 * GROUPS)}
    loop.learners[0].filters = {"none": lambda sample: "of no use" if sample.id.group in empty else None}
    loop.hooks, steps = Hooks({"h": SimpleNamespace(before_step=lambda loop: steps.append(loop.step + 1))}), []
    await loop.run()
    assert steps == [*range(1, STEPS + 1)]
    read = [group for step in next(iter(loop.trainers.values())).read for group in step]
    counts = loop.buffer.counts
    assert len(read) == len(set(read)) == STEPS * GROUPS and not empty & set(read)
    assert counts.taken == STEPS * GROUPS and counts.dropped == GROUPS and counts.started == (STEPS + 1) * GROUPS
    assert counts.reasons == {"no token of the whole batch is trained": GROUPS}


async def test_a_policy_with_nothing_to_train_waits_while_another_learns(tmp_path):
    loop = life(tmp_path, Failures(), policies=("one", "other"))
    empty = {f"e0-{number}" for number in range(GROUPS, 2 * GROUPS)}
    loop.learners[1].filters = {"none": lambda sample: "of no use" if sample.id.group in empty else None}
    await loop.run()
    assert len(loop.trainers["one"].read) == STEPS and len(loop.trainers["other"].read) == STEPS - 1
    assert not empty & {group for step in loop.trainers["other"].read for group in step} and loop.buffer.counts.dropped == 0
    rows = [json.loads(line) for line in loop.run_dir.metrics.read_text().splitlines()]
    assert [row["other/optimizer_steps"] for row in rows if row["stage_step"] and "seconds" in row] == [1, 0, 1, 1, 1]
    assert rows[2]["other/filtered/none"] == 1


async def test_a_run_in_which_nothing_is_ever_trained_ends(tmp_path):
    loop, notes = life(tmp_path, Failures()), []
    loop.observer.note = notes.append
    loop.learners[0].filters = {"none": lambda sample: "of no use"}
    with pytest.raises(RunError, match=r"groups were dropped \(no token of the whole batch is trained: \d+\)\. Relax the filter"):
        await loop.run()
    assert not next(iter(loop.trainers.values())).read
    assert notes[0].startswith(f"Step 1: filters, corrections or the rollout leave no token of its {GROUPS} groups to train on")


async def test_evaluations_of_two_stages_after_the_same_step_are_two_files(tmp_path):
    """The last one of a stage and the first one of the next are both of the step between them."""
    for name, first in (("one", 0), ("two", STEPS)):
        loop = life(tmp_path, Failures())
        loop.run_dir.trajectories.mkdir(exist_ok=True)
        loop.name, loop.first_step, loop.buffer.first_version = name, first, first

        async def evaluate(players, name=name):
            return Evaluation({"avg@1": 0.0}, [answer(SampleId(name, "policy", "p", "g", 0), [5], [10])])

        loop.evaluators = {"held-out": SimpleNamespace(evaluate=evaluate)}
        await loop.run()
    listed = {(f.step, f.source) for f in trajectory_files(RunDir(tmp_path))}
    assert {(5, "one.held-out"), (5, "two.held-out"), (10, "two.held-out")} <= listed
    for stage in ("one", "two"):
        assert sample_at(RunDir(tmp_path), f"{stage}.held-out@5:0")[1].id.run == stage
