"""The loop with roles: two policies that play one episode together, and a critic of one of them (DESIGN §3).

The models are tables of logits, so that everything but the loop's own work fits on a page; losses, advantages, batches, the
buffer and the cut are the real ones.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from contextlib import asynccontextmanager

import numpy as np
import pytest

ACTIONS = 4
"""Token 0 is the prompt; an episode is [0, alice's token, bob's token]."""


class TableEngine:
    """Samples one token from a softmax over ``logits`` [ACTIONS]."""

    def __init__(self):
        self.logits, self.version = np.zeros(ACTIONS), -1

    async def generate(self, request):
        from miles_core.protocols import Generation
        from miles_core.randomness import uniform

        p = np.exp(self.logits - self.logits.max())
        p /= p.sum()
        u = uniform(np.array([request.key], np.uint64), np.array([len(request.tokens)]))[0]
        token = min(int(np.searchsorted(p.cumsum(), u, side="right")), ACTIONS - 1)
        return Generation(np.array([token], np.int32), np.log(p[[token]]).astype(np.float32), np.array([self.version], np.int32), "stop")

    async def update_weights(self, weights, version):
        self.logits, self.version = dict(weights)["logits"].numpy().copy(), version

    async def start(self):
        pass

    @asynccontextmanager
    async def syncing(self):
        yield

    async def load_weights(self, directory, version):
        raise AssertionError("this transport brings tensors")

    async def checksum(self):
        return str(self.logits.tolist())

    async def release(self, session):
        pass

    async def close(self):
        pass


class InlineTransport:
    async def publish(self, source, sinks, version):
        for sink in sinks:
            await sink.update_weights(source.named_weights(), version)
        return {}


class TableTrainer:
    """SGD on one parameter [ACTIONS] through a built-in loss and aggregation, or (critic) on one value by squared error."""

    def __init__(self, role, log, lr):
        import torch

        self.role, self.log, self.version, self.lr = role, log, -1, lr
        self.parameter = torch.zeros(ACTIONS if role == "policy" else 1, dtype=torch.float64, requires_grad=True)

    async def start(self):
        self.log.append((self.role, "start"))

    async def annotate(self, batch, columns):
        self.log.append((self.role, "annotate", sorted(columns)))
        if columns == {"values"}:
            return batch.with_columns({"values": np.full(batch.n_rows, self.parameter.item(), np.float32)})
        targets = batch.load(["targets"]).array("targets")
        logprobs = self.parameter.log_softmax(0).detach().numpy()[targets]
        return batch.with_columns({"old_logprobs": logprobs.astype(np.float32)})

    async def step(self, batch):
        import torch

        from miles_core.algorithms import aggregations, losses
        from miles_core.algorithms.segments import SegmentOps
        from miles_core.protocols import LossInputs, StepReport

        self.log.append((self.role, "step", len(batch.steps)))
        for part in batch.optimizer_steps():
            part = part.load(["targets"])
            ops = SegmentOps.of(part)
            columns = {n: torch.from_numpy(c) for n, c in part.columns.items()}
            if self.role == "policy":
                logprobs = self.parameter.log_softmax(0)[columns["targets"].long()]
                loss = losses.ppo_clip(LossInputs({"logprobs": logprobs}, columns, ops)).loss
            else:
                loss = (columns["returns"].double() - self.parameter) ** 2
            ops.share(loss, aggregations.token_mean(ops)).backward()
            with torch.no_grad():
                self.parameter -= self.lr * self.parameter.grad
                self.parameter.grad = None
        return StepReport({"loss": 0.0}, len(batch.steps))

    def named_weights(self):
        yield "logits", self.parameter.detach()

    async def save(self, directory):
        (directory / "parameter.json").write_text(json.dumps(self.parameter.tolist()))

    async def load(self, directory):
        import torch

        self.parameter = torch.tensor(json.loads((directory / "parameter.json").read_text()), dtype=torch.float64, requires_grad=True)

    async def export(self, directory):
        raise AssertionError("the loop does not export; the run does")

    async def close(self):
        pass


async def play(prompt, context):
    """Four episodes: alice moves, bob sees her move and moves; alice wants token 1, bob wants token 2."""
    from miles_core.protocols import GenerateRequest, SamplingParams
    from miles_core.randomness import key
    from miles_core.sample import Sample, SampleId, SamplingSpan

    samples = []
    for t in range(4):
        tokens, moves = [0], {}
        for policy in context.policies:
            request_key = key(context.seed, policy, context.epoch, prompt.id, t)
            request = GenerateRequest(f"{context.group}-{t}", np.array(tokens, np.int32), SamplingParams(1), request_key)
            moves[policy] = (len(tokens), await context.engines[policy].generate(request))
            tokens.append(int(moves[policy][1].tokens[0]))
        for policy, wanted in zip(context.policies, (1, 2), strict=True):
            at, generation = moves[policy]
            own = np.arange(3) == at
            samples.append(
                Sample.of(
                    SampleId(context.run, policy, prompt.id, context.group, t),
                    tokens,
                    versions=np.where(own, generation.versions[0], -1),
                    loss_mask=own,
                    logprobs=np.where(own, generation.logprobs[0], np.nan),
                    spans=[SamplingSpan(at, at + 1)],
                    rewards={"environment": float(tokens[at] == wanted)},
                )
            )
    return samples


class Numbers:
    """A data source of bare prompts."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        from miles_core.protocols import Prompt

        return Prompt(str(index), "")


def minus_value(inputs):
    """Advantage of a critic's baseline, and the critic's target."""
    reward = inputs.ops.spread(inputs.rewards)
    return {"advantages": reward - inputs.columns["values"], "returns": reward}


@pytest.fixture
def make_loop(tmp_path):
    def make(steps, log, *, epochs=1, minibatches=1, max_staleness=0, cut_from=None):
        from miles_core import cut
        from miles_core.algorithms.advantages import grpo
        from miles_core.buffer import Buffer
        from miles_core.config import StageConfig
        from miles_core.cursor import Cursor
        from miles_core.hooks import Hooks
        from miles_core.learner import Learner
        from miles_core.loop import Loop
        from miles_core.observer import Observer
        from miles_core.producer import Producer
        from miles_core.protocols import BuildContext, Players
        from miles_core.run_dir import RunDir
        from miles_core.scoring import Scorer
        from miles_core.trackers import JsonlTracker

        loss = {"ppo": {"use": "ppo_clip"}}
        module = f"{__name__}:"
        own = {"path": "unused", "trainer": module + "TableTrainer", "transport": module + "InlineTransport"}
        policy = own | {"engine": module + "TableEngine", "losses": loss}
        stage = StageConfig.model_validate(
            {
                "steps": steps,
                "groups": 4,
                "models": {
                    "alice": policy | {"advantage": module + "minus_value"},
                    "bob": policy | {"advantage": "grpo"},
                    "judge": own | {"role": "critic", "of": "alice"},
                },
                "data": module + "Numbers",
                "rollout": module + "play",
                "epochs": epochs,
                "minibatches": minibatches,
                "max_staleness": max_staleness,
            }
        )
        # What an entry point would say of the function: the critic's column is needed.
        type(stage.models["alice"].advantage).needs = frozenset({"values"})
        engines = {"alice": TableEngine(), "bob": TableEngine()}
        trainers = {n: TableTrainer("critic" if n == "judge" else "policy", log[n], 0.5 if n == "judge" else 4.0) for n in stage.models}
        players = Players("toy", 0, ("alice", "bob"), engines, {}, {"alice": ACTIONS, "bob": ACTIONS})
        run_dir = RunDir(tmp_path)
        for directory in (run_dir.trajectories, run_dir.checkpoints):
            directory.mkdir(exist_ok=True)
        buffer = Buffer(4, max_staleness, steps)
        scorer = Scorer({}, BuildContext(tmp_path, "toy", 0))
        producer = Producer(buffer, Cursor(Numbers(), 0, True), play, players, scorer, {}, 60.0)
        loop = Loop(
            name="main",
            stage=stage,
            run_dir=run_dir,
            first_step=0,
            players=players,
            learners=[
                Learner("alice", stage, {"alice": trainers["alice"], "judge": trainers["judge"]}, minus_value, {}, 0),
                Learner("bob", stage, {"bob": trainers["bob"]}, grpo, {}, 0),
            ],
            trainers=trainers,
            transports={"alice": InlineTransport(), "bob": InlineTransport()},
            buffer=buffer,
            producer=producer,
            evaluators={},
            trackers=[JsonlTracker(run_dir.metrics)],
            hooks=Hooks({}),
            observer=Observer(),
            config_hash="toy",
            keep=2,
        )
        if cut_from is not None:
            directory, state, _ = cut.newest(cut_from, "toy")
            buffer.counts, producer.position, producer.reissue = state.buffer_counts(), state.position, list(state.in_flight)
            loop.step = loop.saved_step = state.step
            loop.directory_to_load = directory
        return loop

    return make


async def test_two_policies_and_a_critic_learn_in_one_loop(make_loop):
    log = defaultdict(list)
    loop = make_loop(12, log, epochs=2, minibatches=2)
    await loop.run()

    final = {n: t.parameter.softmax(0).tolist() if n != "judge" else t.parameter.item() for n, t in loop.trainers.items()}
    assert final["alice"][1] > 0.9
    assert final["bob"][2] > 0.9
    assert 0.6 < final["judge"] < 1.05  # follows alice's rising mean reward
    # The critic annotates and trains on alice's batches only; each policy recomputes its own old logprobs.
    assert set(map(str, log["judge"])) == {str(("critic", "annotate", ["values"])), str(("critic", "step", 4))}
    assert ("policy", "annotate", ["old_logprobs"]) in log["bob"] and len(log["bob"]) == len(log["alice"]) == len(log["judge"]) == 24
    assert loop.version == 12 and {e.version for e in loop.players.engines.values()} == {12}
    rows = [json.loads(line) for line in loop.run_dir.metrics.read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert rows[0]["trajectories"] == 32 and rows[-1]["reward"] > rows[0]["reward"] + 0.4


async def test_each_policy_trains_on_its_own_tokens_of_the_episode(make_loop):
    from miles_core.sample_io import load_samples

    loop = make_loop(2, defaultdict(list))
    await loop.run()
    samples = load_samples(loop.run_dir.trajectories / "step-000002.safetensors")
    by_policy = defaultdict(list)
    for sample in samples:
        by_policy[sample.id.policy].append(sample)
    assert {n: len(s) for n, s in by_policy.items()} == {"alice": 16, "bob": 16}
    assert all(s.loss_mask.tolist() == [False, True, False] and s.versions.tolist() == [-1, 1, -1] for s in by_policy["alice"])
    assert all(s.loss_mask.tolist() == [False, False, True] and s.versions.tolist() == [-1, -1, 1] for s in by_policy["bob"])
    # Both saw the same tokens, and bob's group-relative advantages sum to 0 in each group (NumPy, from the rewards alone).
    for group in {s.id.group for s in samples}:
        ours = [s for s in by_policy["bob"] if s.id.group == group]
        rewards = np.array([s.reward for s in ours])
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        np.testing.assert_allclose([s.columns["advantages"][2] for s in ours], expected, atol=1e-5)


async def test_trajectories_hold_the_mask_that_filters_left_and_what_the_trainer_saw(make_loop):
    from miles_core.protocols import StepReport
    from miles_core.sample_io import load_samples

    loop = make_loop(1, defaultdict(list))
    loop.learners[1].filters = {"odd": lambda sample: "odd" if sample.id.trajectory % 2 else None}
    step = loop.trainers["bob"].step

    async def seeing(batch):
        report = await step(batch)
        rows = np.arange(batch.n_rows, dtype=np.float32)
        return StepReport(report.metrics, report.optimizer_steps, {"values": rows, "old_logprobs": rows})

    loop.trainers["bob"].step = seeing
    await loop.run()
    samples = [s for s in load_samples(loop.run_dir.trajectories / "step-000001.safetensors") if s.id.policy == "bob"]
    for number, sample in enumerate(samples):
        assert sample.loss_mask.tolist() == [False, False, sample.id.trajectory % 2 == 0]
        np.testing.assert_array_equal(sample.columns["values"], [np.nan, 3 * number, 3 * number + 1])  # row p speaks of token p + 1
        assert sample.columns["old_logprobs"][2] < 0  # annotated before the step: that stays


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
async def test_the_one_knob_bounds_the_age_of_what_is_trained(make_loop, max_staleness):
    loop = make_loop(8, defaultdict(list), max_staleness=max_staleness)
    ages = []
    take = loop.buffer.take

    async def watched(seconds):
        admitted = min(32, (loop.version + max_staleness + 1) * 4)
        async with asyncio.timeout(100):  # training takes no time here: rollout shall come as far as it may
            while loop.buffer.counts.taken + len(loop.buffer.ready) < admitted:
                await asyncio.sleep(0)
        groups = await take(seconds)
        ages.extend(loop.version - r.versions[0] for g in groups for r in g.refs)
        return groups

    loop.buffer.take = watched
    await loop.run()
    assert len(ages) == 8 * 4 * 8
    assert max(ages) == max_staleness and min(ages) == 0
    assert loop.buffer.counts.started == loop.buffer.counts.taken == 32


async def test_a_cut_goes_on_to_the_same_weights(make_loop, tmp_path):
    undisturbed = make_loop(6, defaultdict(list))
    await undisturbed.run()
    expected = {n: t.parameter.tolist() for n, t in undisturbed.trainers.items()}
    for old in (tmp_path / "checkpoints").glob("step-*"):
        (old / "manifest.json").unlink()

    first = make_loop(6, defaultdict(list))
    step = first.producer.on_group

    def stop_after_three(group):
        if first.step == 2:
            first.request_stop()
        step(group)

    first.producer.on_group = stop_after_three
    await first.run()
    assert first.step == 3

    second = make_loop(6, defaultdict(list), cut_from=tmp_path / "checkpoints")
    for name, trainer in second.trainers.items():
        await trainer.load(second.directory_to_load / "models" / name)
    await second.run()
    assert {n: t.parameter.tolist() for n, t in second.trainers.items()} == expected
