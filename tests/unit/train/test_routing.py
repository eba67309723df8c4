"""What the routing column must hold before it is replayed, which rows are, and what is said when it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as with_fields

import numpy as np
import pytest

from miles_core.batch import Batch
from miles_core.errors import DataError
from miles_core.refs import SampleRef
from miles_core.sample import Sample, SampleId
from miles_train.routing import MoeShape, experts_to_replay, load_routing, own_routing, recorded, routing_metrics

SHAPE = MoeShape(layers=2, k=2, experts=4)
SENTINEL = 255


def sample(trajectory: int = 0, *, routed: bool = True, sampled: bool = True, dtype: str = "uint8") -> Sample:
    """Tokens 0 to 6: prompt 0 to 2, answer 3 to 5 of which 4 is not trained, and 6 from the environment. Rows 2 to 4 must be recorded,
    or rather 2 and 4; recorded are rows 0 to 4."""
    answer = np.arange(7)
    versions = np.where((answer >= 3) & (answer <= 5) & sampled, 1, -1)
    made = Sample.of(
        SampleId("run", "policy", "p", "g", trajectory),
        answer,
        versions=versions,
        loss_mask=np.isin(answer, [3, 5]),
        logprobs=np.where(versions >= 0, -1.0, np.nan),
    )
    if routed:
        routing = np.array([[[t % 4, (t + 1) % 4], [(t + 2) % 4, t % 4]] for t in range(7)], dtype)
        routing[5:] = np.iinfo(routing.dtype).max
        made.columns["routing"] = routing
    return made


def batch(*samples: Sample) -> Batch:
    return Batch.of([SampleRef.of(s) for s in samples or (sample(),)])


def test_rows_are_replayed_where_they_were_recorded():
    """Row p is token p as an input: nothing is rolled. A sample without the column has rows of its own choice."""
    loaded = load_routing(batch(sample(0), sample(1, routed=False, sampled=False)), SHAPE)
    assert recorded(loaded).tolist() == [True] * 5 + [False] * 2 + [False] * 7
    given = experts_to_replay(loaded)
    assert given is not None and given.dtype == np.int64 and given.shape == (14, 2, 2)
    assert given[1].tolist() == [[1, 2], [3, 1]]
    assert (given[5:] == -1).all()
    assert experts_to_replay(loaded.select([1])) is None
    swapped = experts_to_replay(loaded.select([1, 0]))
    assert swapped is not None and (swapped[7:] == given[:7]).all()


def test_sixteen_bits():
    wide = sample(dtype="uint16")
    wide.columns["routing"][0, 0, 0] = 255  # an expert here, not the sentinel
    given = experts_to_replay(load_routing(batch(wide), MoeShape(2, 2, 300)))
    assert given is not None and given[0, 0].tolist() == [255, 1] and (given[5:] == -1).all()


def test_nobody_recorded_and_nobody_sampled():
    """SFT: the routers choose for themselves, and nothing is asked for."""
    loaded = load_routing(batch(sample(routed=False, sampled=False)), SHAPE)
    assert experts_to_replay(loaded) is None


def test_rows_that_predict_what_is_not_trained_may_be_missing():
    """Rows 0, 1 and 3 predict tokens 1, 2 (prompt) and 4 (not trained)."""
    made = sample()
    made.columns["routing"][[0, 1, 3]] = SENTINEL
    assert recorded(load_routing(batch(made), SHAPE)).tolist() == [False, False, True, False, True, False, False]


def test_rows_that_another_branch_trains_may_be_missing():
    """Rows 2 and 4 of the second branch are trained in the first."""
    second = sample(1)
    second.columns["routing"][[2, 4]] = SENTINEL
    both = batch(sample(0), second)
    owners = np.arange(14)
    owners[[9, 11]] = 2, 4
    assert recorded(load_routing(with_fields(both, owners=owners), SHAPE)).tolist() == [True] * 5 + [False] * 2 + [
        True, True, False, True, False, False, False,
    ]  # fmt: skip
    with pytest.raises(DataError, match=f"{second.id}.*token 2 has no routing recorded"):
        load_routing(both, SHAPE)


def put(row: int, value: object) -> Callable[[Sample], None]:
    return lambda s: s.columns["routing"].__setitem__(row, value)


def replace(**changes: np.ndarray | None) -> Callable[[Sample], None]:
    def change(s: Sample) -> None:
        for name, column in changes.items():
            s.columns.pop(name) if column is None else s.columns.__setitem__(name, column)

    return change


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            put(2, SENTINEL),
            "token 2 has no routing recorded, though the token after it was sampled and is trained. Let",
        ),
        (put(4, SENTINEL), "token 4 has no routing recorded"),
        (replace(routing=None), "token 2 has no routing recorded.*Let the rollout engine record routing"),
        (put(3, [[0, 1], [SENTINEL, SENTINEL]]), "token 3 has experts recorded in some MoE layers and not in others"),
        (put(0, [[0, 1], [4, 0]]), "token 0 took an expert that does not exist; the model has 4"),
        (put(1, [[0, 1], [3, 3]]), "token 1 took the same expert twice"),
        (
            replace(routing=np.zeros((7, 3, 2), np.uint8)),
            "routing of 3 MoE layers with 2 experts each; the model has 2 such layers",
        ),
        (replace(routing=np.zeros((7, 2, 1), np.uint8)), "routing of 2 MoE layers with 1 experts each; .* takes 2"),
    ],
)
def test_what_does_not_fit_is_a_sentence(change: Callable[[Sample], None], sentence: str):
    """It names the second sample, which is the wrong one."""
    wrong = sample(1)
    change(wrong)
    with pytest.raises(DataError, match=f"{wrong.id}.*{sentence}"):
        load_routing(batch(sample(0), wrong), SHAPE)


def test_shares():
    assert routing_metrics(differs=3, replayed=12, rows=24) == {"routing/replayed": 0.5, "routing/differs": 0.25}
    assert routing_metrics(differs=0, replayed=0, rows=24) == {"routing/replayed": 0.0}
    assert routing_metrics(differs=0, replayed=0, rows=0) == {}


def test_a_pass_without_replay_is_told_apart():
    assert own_routing({"mismatch/k3": 1.0, "drift/age_1/mean_abs": 2.0}) == {"mismatch_own_routing/k3": 1.0}
