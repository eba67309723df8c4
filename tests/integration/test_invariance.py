"""The same loss and the same gradient however a step is cut up: DESIGN §6, in float64 to 1e-10, for every registered algorithm.

Every case goes the way of the loop: ``Learner.prepare`` (shared prefixes, optimizer steps), columns as models would give them, then
``Learner.advantages`` (advantage, corrections, what losses select) on the whole batch. A *step* is one optimizer step of it, an
*outcome* the loss under every aggregation, its gradient by each number that the model gives at each row, and the metrics. Parts of a
step (micro-batches, ranks) must add up to the step as one. What is registered is found, not listed: a new algorithm is tested here
without an edit, unless it reads a column that ``COLUMNS`` lacks or has an option without a default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from fixtures.ranks import run_ranks
from fixtures.samples import random_samples

from miles_core.batch import Batch
from miles_core.config import StageConfig
from miles_core.learner import Learner
from miles_core.plan import balanced_shards, micro_batches, units_of
from miles_core.plugin_finding import find_all
from miles_core.plugins import LossConfig, config_class
from miles_core.protocols import BuildContext, LossInputs
from miles_core.randomness import generator, key, uniform
from miles_core.refs import SampleRef
from miles_core.sample import Sample

torch = pytest.importorskip("torch")

TOLERANCE = 1e-10
COLUMNS = ("ref_logprobs", "teacher_logprobs", "values", "returns")
"""What models give beside ``old_logprobs``; ``returns`` where the advantage gives none."""
OUTPUTS = {"language": ("logprobs", "entropy"), "scalar": ("values",)}
REQUIRED_OPTIONS = {("aggregation", "constant"): {"length": 7}, ("advantage", "pass_at_k"): {"k": 2}}
VARIANTS = {
    "ppo_clip": [{"dual_clip": 1.5}, {"old": "rollout"}, {"old": "current"}],
    "gspo": [{"clip_low": 0.2, "clip_high": 0.2}, {"token_advantages": True, "clip_low": 0.2, "clip_high": 0.2}],
    "dppo": [{"divergence": "kl"}],
    "kl": [{"unbiased": True}, {"estimator": "low_variance"}],
    "clip_cov": [{"fraction": 0.1, "low": 0.01}],
    "kl_cov": [{"fraction": 0.1}],
    "value_clip": [{"clip": None}],
    "dpo": [{"label_smoothing": 0.2}],
}
"""Losses with options that change what is reduced."""
PLAIN_REWARDS = ("maxrl", "pass_at_k", "gdpo", "preference")
"""Advantages that take the rewards as they are, without a KL penalty."""
CORRECTIONS = {"tis": {"use": "tis", "high": 1.2}, "veto": {"use": "veto", "threshold": 0.6}}


def options_of(point: str, use: str) -> dict[str, Any]:
    return {"use": use} | REQUIRED_OPTIONS.get((point, use), {})


@cache  # every look-up reads what is installed
def plugin(point: str, options: tuple[tuple[str, Any], ...]) -> tuple[Any, Any]:
    found = config_class(point, dict(options)["use"]).model_validate(dict(options))
    return found, found.build(BuildContext(None, "invariance", 0))


def config(point: str, options: Mapping[str, Any]) -> Any:
    """What a recipe says."""
    return plugin(point, tuple(options.items()))[0]


def function(point: str, options: Mapping[str, Any]) -> Any:
    """What a recipe gets."""
    return plugin(point, tuple(options.items()))[1]


def of_ours(point: str) -> list[str]:
    """Names of a point's plug-ins; not those that other tests decorated in this process."""
    return sorted(name for name, found in find_all(point).items() if not found.origin.startswith("decorated"))


ADVANTAGES, AGGREGATIONS = of_ours("advantage"), of_ours("aggregation")
LOSSES = [options_of("loss", use) | variant for use in of_ours("loss") for variant in ({}, *VARIANTS.get(use, []))]

Case = tuple[str, dict[str, Any]]
"""An advantage and the options of a loss."""


def fitting(loss: dict[str, Any]) -> str:
    """An advantage that gives what the loss reads."""
    found = config("loss", loss)
    return "preference" if found.unit in ("pair", "group") else "gae" if "returns" in found.required() else "grpo"


def cases() -> Iterator[Case]:
    """Every loss once, and every advantage with losses that read it by token, by sequence and by pair."""
    yield from ((fitting(loss), loss) for loss in LOSSES)
    for advantage in ADVANTAGES:
        token_advantages = {"use": "gspo", "token_advantages": True, "clip_low": 0.2, "clip_high": 0.2}
        losses = [{"use": "ppo_clip"}, token_advantages, {"use": "cispo"}] if advantage != "preference" else []
        yield from ((advantage, loss) for loss in losses)


CASES = list(cases())
NAMES = ["-".join([advantage, *(str(v) for v in loss.values())]) for advantage, loss in CASES]


# ---- from samples to optimizer steps, as in the loop ---------------------------------------------------------------------


def rows(): ...
def trainer(): ...
def wire(): ...
async def play(prompt, context): ...
def brevity(sample): ...


GROUPS = [[[4, 3], [5], [6, 2]], [[3], [1, 5, 2], [2], [7]], [[6], [4]], [[3, 3]], [[2], [5], [9]]]
PAIRS = [[[4, 3], [5]], [[6], [2]], [[3], [1, 5, 2]], [[7], [4]], [[2], [8]], [[5], [5]], [[4], [9]], [[2, 7], [3]]]
"""Of each group, of each of its trajectories, of each of its samples: how many tokens follow the prefix."""


def samples_of(advantage: str, seed: int = 3) -> list[Sample]:
    """Ragged samples with branches that share prefixes, injected tokens and samples that train nothing; rewards 0 or 1, in two parts."""
    samples = random_samples(seed, shape=PAIRS if advantage == "preference" else GROUPS)
    for sample in samples:
        place = sample.id.group, sample.id.trajectory
        group = int(sample.id.group.removeprefix("g"))
        right = float(group != 3 and (group + sample.id.trajectory) % 2)  # all wrong in group 3
        short = generator("short", *place).normal() if advantage == "gdpo" else 0.0
        sample.rewards = {"environment": right, "brevity": short}
        sample.reward = right + 0.5 * short
    return samples


def learner(case: Case, **stage: Any) -> Learner:
    """What stands between buffer and trainer, with corrections, and a KL penalty in the reward where the advantage takes one."""
    advantage, loss = case
    here = f"{__name__}:"
    model = {"path": "x", "trainer": here + "trainer", "transport": here + "wire", "losses": {"loss": loss}}
    tree = {"steps": 1, "groups": 2, "data": here + "rows", "rollout": here + "play", "models": {"policy": model}}
    rewards = {"brevity": {"use": here + "brevity", "weight": 0.5}}
    options = options_of("advantage", advantage)
    return Learner(
        "policy",
        StageConfig.model_validate(tree | {"rewards": rewards} | stage),
        {"policy": None},  # ty: ignore[invalid-argument-type]
        function("advantage", options),
        {},
        seed=0,
        corrections={name: function("ratio_correction", options) for name, options in CORRECTIONS.items()},
        kl_reward=(function("kl", {"use": "k1"}), 0.05) if advantage not in PLAIN_REWARDS else None,
    )


def numbers(name: str, batch: Batch) -> np.ndarray:
    """float64 [N], of mean 0 and variance 1; like a model's, a row's is a function of what it has read and what it predicts."""
    keys, places = [], []
    for ref in batch.refs:
        tokens = ref.get().tokens.tolist()
        keys += [key(name, ref.id.group, ref.id.trajectory, *tokens[: place + 2]) for place in range(ref.length)]
        places += range(ref.length)
    return (uniform(np.array(keys, np.uint64), np.array(places)) - 0.5) * 12**0.5


def learned(case: Case, samples: list[Sample], **stage: Any) -> Batch:
    """The whole batch with all columns and its optimizer steps."""
    return advantages_of(learner(case, **stage), samples)


def advantages_of(learns: Learner, samples: list[Sample]) -> Batch:
    batch = learns.prepare([SampleRef.of(s) for s in samples], step=0)
    old = batch.array("logprobs") + 0.3 * numbers("old", batch)
    given = {name: numbers(name, batch) + (old if name.endswith("logprobs") else 0) for name in COLUMNS} | {"old_logprobs": old}
    columns = {name: x.astype(np.float32) for name, x in given.items()}
    return learns.advantages(batch.with_columns(columns)).load(("positions",))


def outputs_of(step: Batch, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """float64 [N] each: what the model says under its current weights; language models nothing outside the mask."""
    given = {
        "logprobs": step.array("old_logprobs").astype(np.float64) + 0.3 * numbers("new", step),
        "entropy": np.abs(numbers("entropy", step)),
        "values": numbers("new values", step),
    }
    return {name: given[name] if name == "values" else np.where(step.array("loss_mask"), given[name], np.nan) for name in names}


# ---- outcomes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Under one aggregation: the loss, its gradients [N] by name, and the metrics' means over the step's trained tokens."""

    loss: float
    gradients: dict[str, np.ndarray]
    metrics: dict[str, float]

    def __add__(self, other: Outcome) -> Outcome:
        gradients = {n: g + other.gradients[n] for n, g in self.gradients.items()}
        return Outcome(self.loss + other.loss, gradients, {n: m + other.metrics[n] for n, m in self.metrics.items()})


def outcomes(step: Batch, loss: dict[str, Any], part: Batch, rows: np.ndarray, **of: Any) -> dict[str, Outcome]:
    """By aggregation, of a part of the step that holds these of its rows."""
    from miles_core.algorithms.segments import SegmentOps

    ops = SegmentOps.of(part, **of)
    given = outputs_of(step, OUTPUTS[config("loss", loss).head])
    leaves = {name: torch.from_numpy(x[rows]).requires_grad_() for name, x in given.items()}
    term = function("loss", loss)(LossInputs(leaves, part.tensors(), ops))
    metrics = {name: float(ops.sum(x.detach(), "global") / max(step.segments.tokens, 1)) for name, x in term.metrics.items()}
    found = {}
    for name in AGGREGATIONS:
        share = ops.share(term.loss, function("aggregation", options_of("aggregation", name))(ops))
        slopes = torch.autograd.grad(share, list(leaves.values()), retain_graph=True, allow_unused=True)
        gradients = {leaf: np.zeros(step.n_rows) for leaf in leaves}
        for leaf, slope in zip(leaves, slopes, strict=True):
            if slope is not None:
                gradients[leaf][rows] = slope.numpy()
        found[name] = Outcome(share.item(), gradients, metrics)
    return found


def together(parts: list[dict[str, Outcome]]) -> dict[str, Outcome]:
    """The outcomes of parts, added up."""
    total = parts[0]
    for part in parts[1:]:
        total = {name: outcome + part[name] for name, outcome in total.items()}
    return total


def cut(step: Batch, loss: dict[str, Any], parts: list[np.ndarray]) -> dict[str, Outcome]:
    """Outcomes of parts of the step, each some of its samples, added up."""
    return together([outcomes(step, loss, step.select(samples), step.rows_of(samples)) for samples in parts])


@cache
def whole(case: int) -> tuple[Batch, dict[str, Outcome]]:
    """One optimizer step over everything, and its outcomes as one."""
    batch = learned(CASES[case], samples_of(CASES[case][0]))
    [step] = batch.optimizer_steps()
    return step, cut(step, CASES[case][1], [np.arange(len(step))])


def check(found: dict[str, Outcome], expected: dict[str, Outcome]) -> None:
    for name, outcome in expected.items():
        assert found[name].loss == pytest.approx(outcome.loss, rel=TOLERANCE, abs=TOLERANCE), name
        for leaf, gradient in outcome.gradients.items():
            np.testing.assert_allclose(found[name].gradients[leaf], gradient, rtol=TOLERANCE, atol=TOLERANCE, err_msg=f"{name} {leaf}")
        assert found[name].metrics == pytest.approx(outcome.metrics, rel=TOLERANCE, abs=TOLERANCE), name


# ---- in one process ------------------------------------------------------------------------------------------------------

every_case = pytest.mark.parametrize("case", range(len(CASES)), ids=NAMES)


@every_case
def test_there_is_something_to_cut(case: int) -> None:
    """Every loss has a value and a gradient, on several sequences; corrections dropped rows; some samples train nothing."""
    step, expected = whole(case)
    weights = step.array("correction_weights")[step.array("loss_mask")]
    assert len(np.unique(weights)) > 5 and weights.max() == np.float32(1.2)
    before = Batch.of(step.refs)
    assert step.segments.tokens < before.segments.tokens
    assert step.segments.sequences > 5 and (step.segments.sequence_tokens == 0).any()
    assert step.segments.trajectories < step.segments.sequences
    for outcome in expected.values():
        assert np.isfinite(outcome.loss) and outcome.loss != 0
        gradient = sum(np.abs(g) for g in outcome.gradients.values())
        assert np.isfinite(gradient).all() and np.count_nonzero(gradient) > 5


@every_case
@pytest.mark.parametrize("max_tokens", [1, 25, 60])
def test_micro_batches(case: int, max_tokens: int) -> None:
    """As the trainer plans them: units stay together."""
    step, expected = whole(case)
    loss = CASES[case][1]
    plan = micro_batches(step.lengths, units_of(step, config("loss", loss).unit), max_tokens)
    assert len(plan) > 1
    check(cut(step, loss, plan), expected)


@every_case
def test_order_within_the_step(case: int) -> None:
    """The samples of a step, packed in another order."""
    step, expected = whole(case)
    check(cut(step, CASES[case][1], [np.random.default_rng(1).permutation(len(step))]), expected)


def by_sample(batch: Batch, outcome: dict[str, Outcome]) -> dict[str, Outcome]:
    """The same with rows in the order of sample ids."""
    order = batch.rows_of(np.array(sorted(range(len(batch)), key=lambda s: str(batch.refs[s].id))))
    return {name: replace(o, gradients={leaf: g[order] for leaf, g in o.gradients.items()}) for name, o in outcome.items()}


@every_case
@pytest.mark.parametrize("seed", range(2))
def test_order_of_the_whole_batch(case: int, seed: int) -> None:
    """From the buffer on: advantages, corrections, selections and prefixes do not depend on who stands where."""
    samples = samples_of(CASES[case][0])
    np.random.default_rng(seed).shuffle(samples)  # ty: ignore[invalid-argument-type]
    [step] = learned(CASES[case], samples).optimizer_steps()
    found = cut(step, CASES[case][1], [np.arange(len(step))])
    check(by_sample(step, found), by_sample(*whole(case)))


DENOMINATORS = {"token_mean": "tokens", "sequence_mean": "sequences", "sequence_mean_token_sum": "sequences", "constant": "sequences"}
DENOMINATORS |= {"trajectory_mean": "trajectories"}


def denominator(batch: Batch, aggregation: str) -> int:
    """Counted here: trained tokens, or sequences or trajectories that have any; 1 for a sum."""
    trained = [batch.segment[row] for row in np.flatnonzero(batch.array("loss_mask"))]
    places = {s: (batch.refs[s].id.group, batch.refs[s].id.trajectory) for s in trained}
    counts = {"tokens": len(trained), "sequences": len(places), "trajectories": len(set(places.values()))}
    return counts[DENOMINATORS[aggregation]] if aggregation in DENOMINATORS else 1


@every_case
def test_epochs_and_mini_batches(case: int) -> None:
    """Each optimizer step has denominators of its own and is the same however it is packed; an epoch's add up to the whole batch.

    At fixed weights, that is: the sum over an epoch's steps of loss · denominator is that of the batch as one step.
    """
    advantage, loss = CASES[case]
    batch = learned(CASES[case], samples_of(advantage), epochs=2, minibatches=3)
    unit = config("loss", loss).unit
    steps = list(batch.optimizer_steps())
    assert len(steps) == 6 and len({tuple(sorted(s.tolist())) for s in batch.steps}) > 3
    found = []
    for step in steps:
        found.append(cut(step, loss, [np.arange(len(step))]))
        check(cut(step, loss, micro_batches(step.lengths, units_of(step, unit), 1)), found[-1])
    for epoch in (slice(0, 3), slice(3, 6)):
        np.testing.assert_array_equal(np.sort(np.concatenate(batch.steps[epoch])), np.arange(len(batch)))
        for name, outcome in whole(case)[1].items():
            total = sum(o[name].loss * denominator(step, name) for o, step in zip(found[epoch], steps[epoch], strict=True))
            assert total == pytest.approx(outcome.loss * denominator(batch, name), rel=TOLERANCE, abs=TOLERANCE), name


@every_case
def test_samples_that_train_nothing_may_be_left_out(case: int) -> None:
    """As the trainer does: it computes nothing for them."""
    step, expected = whole(case)
    check(cut(step, CASES[case][1], [np.flatnonzero(step.segments.sequence_tokens)]), expected)


# ---- a trajectory with several samples counts once -----------------------------------------------------------------------


def branched(samples: list[Sample], how: str) -> list[Sample]:
    """Every second trajectory of one sample has another branch: a ``copy`` (every row is shared), the same tokens sampled ``again``
    by other weights (no trained row is shared), or ``other`` tokens."""
    alone = [s for s in samples if sum(s.id.group == o.id.group and s.id.trajectory == o.id.trajectory for o in samples) == 1]
    more = []
    for sample in alone[::2]:
        columns = {"versions": np.where(sample.versions < 0, -1, 9).astype(np.int32)} if how == "again" else {}
        columns |= {"tokens": sample.tokens + 50} if how == "other" else {}
        more.append(replace(sample, id=replace(sample.id, branch=9), columns=sample.columns | columns))
    return samples + more


def original(batch: Batch) -> np.ndarray:
    """The samples that were there without ``branched``."""
    return np.array([s for s, ref in enumerate(batch.refs) if ref.id.branch != 9])


def one_step(case: Case, samples: list[Sample], *, kl_reward: bool = False) -> tuple[Batch, dict[str, Outcome]]:
    """The only optimizer step, and its outcomes."""
    learns = learner(case)
    [step] = advantages_of(learns if kl_reward else replace(learns, kl_reward=None), samples).optimizer_steps()
    return step, cut(step, case[1], [np.arange(len(step))])


def check_copies(case: Case, **kwargs: Any) -> None:
    step, expected = one_step(case, samples_of(case[0]), **kwargs)
    copied, found = one_step(case, branched(samples_of(case[0]), "copy"), **kwargs)
    assert len(copied) > len(step) and copied.segments.sequences == step.segments.sequences
    rows = copied.rows_of(original(copied))
    check({name: replace(o, gradients={n: g[rows] for n, g in o.gradients.items()}) for name, o in found.items()}, expected)


@every_case
def test_a_branch_that_is_a_copy_changes_nothing(case: int) -> None:
    """Its rows are trained once; baselines, lengths and means over sequences do not see it."""
    check_copies(CASES[case])


@pytest.mark.parametrize("advantage", sorted(set(ADVANTAGES) - set(PLAIN_REWARDS)))
def test_a_branch_that_is_a_copy_is_not_penalised_again(advantage: str) -> None:
    """With a KL penalty in the reward: a shared row's counts once."""
    check_copies((advantage, {"use": "ppo_clip"}), kl_reward=True)


BY_TOKENS = {"opo"} | {name for name in ADVANTAGES if config("advantage", options_of("advantage", name)).per_token}
"""Advantages that are a function of all trained tokens, so that more tokens are another advantage."""


@pytest.mark.parametrize("advantage", sorted(set(ADVANTAGES) - BY_TOKENS))
def test_baselines_count_a_trajectory_once(advantage: str) -> None:
    """Another sample of a trajectory, with tokens of its own, leaves everybody's advantage as it was."""
    before, _ = one_step((advantage, {"use": "nll"}), samples_of(advantage))
    after, _ = one_step((advantage, {"use": "nll"}), branched(samples_of(advantage), "other"))
    assert np.abs(before.array("advantages")).max() > 0.1 and after.segments.sequences > before.segments.sequences
    np.testing.assert_array_equal(after.array("advantages")[after.rows_of(original(after))], before.array("advantages"))


BY_TRAJECTORY = [
    loss
    for loss in LOSSES
    if config("loss", loss).unit in ("token", "sequence")
    and config("loss", loss).head == "language"
    and type(config("loss", loss)).columns_from is LossConfig.columns_from  # what selects tokens sees that there are more
]


@pytest.mark.parametrize("loss", BY_TRAJECTORY, ids=lambda loss: "-".join(map(str, loss.values())))
def test_trajectory_mean_counts_a_trajectory_once(loss: dict[str, Any]) -> None:
    """A second sample that says the same as the first: the trajectory weighs as before; as a sequence it weighs twice."""
    case = ("grpo", loss)
    before, expected = one_step(case, samples_of("grpo"))
    after, found = one_step(case, branched(samples_of("grpo"), "again"))
    assert after.segments.sequences > before.segments.sequences and after.segments.trajectories == before.segments.trajectories
    assert found["trajectory_mean"].loss == pytest.approx(expected["trajectory_mean"].loss, rel=TOLERANCE, abs=TOLERANCE)
    assert found["sequence_mean"].loss != pytest.approx(expected["sequence_mean"].loss, rel=1e-3)
    rows = after.rows_of(original(after))
    for leaf, gradient in expected["trajectory_mean"].gradients.items():
        halves = np.where(np.isin(before.segment, alone_and_branched(before, after)), 0.5, 1.0)
        np.testing.assert_allclose(found["trajectory_mean"].gradients[leaf][rows], halves * gradient, rtol=TOLERANCE, atol=TOLERANCE)


def alone_and_branched(before: Batch, after: Batch) -> list[int]:
    """Samples of ``before`` that have a second one beside them in ``after``."""
    again = {(ref.id.group, ref.id.trajectory) for ref in after.refs if ref.id.branch == 9}
    return [s for s, ref in enumerate(before.refs) if (ref.id.group, ref.id.trajectory) in again]


# ---- over ranks ----------------------------------------------------------------------------------------------------------


def on_a_rank(rank: int, size: int) -> list[dict[str, dict[str, Any]]]:
    """Outcomes of this rank's part of every case, split over data-parallel and over context-parallel ranks."""
    import torch.distributed as dist

    world, found = dist.group.WORLD, []
    for advantage, loss in CASES:
        [step] = learned((advantage, loss), samples_of(advantage)).optimizer_steps()
        shard = balanced_shards(step.lengths, units_of(step, config("loss", loss).unit), size)[rank]
        n_trajectories = int(step.segments.trajectory.max()) + 1
        data = outcomes(step, loss, step.select(shard), step.rows_of(shard), dp=world, n_trajectories=n_trajectories)
        context = outcomes(step, loss, step.context_shard(rank, size), step.context_rows(rank, size), cp=world)
        found.append({split: {n: asdict(o) for n, o in by_name.items()} for split, by_name in (("data", data), ("context", context))})
    return found


@pytest.fixture(scope="module")
def two_ranks() -> list[list[dict[str, dict[str, Any]]]]:
    return run_ranks(on_a_rank, 2, timeout_s=280)


@every_case
@pytest.mark.parametrize("split", ["data", "context"])
def test_ranks(case: int, split: str, two_ranks: list) -> None:
    """Losses and gradients of the ranks add up; metrics are complete on each of them."""
    _, expected = whole(case)
    parts = [{name: Outcome(**o) for name, o in rank[case][split].items()} for rank in two_ranks]
    total = {name: replace(o, metrics=parts[0][name].metrics) for name, o in together(parts).items()}
    check(total, expected)
    assert all(part[name].metrics == total[name].metrics for part in parts for name in total)
    held = [
        np.isfinite(sum(o["gradients"].values())) & (sum(np.abs(g) for g in o["gradients"].values()) > 0)
        for o in (rank[case][split]["token_sum"] for rank in two_ranks)
    ]
    assert not (held[0] & held[1]).any(), "a row is on one rank only"
