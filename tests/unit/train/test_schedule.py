"""The learning rate, against transformers' schedules and by hand."""

from typing import Any

import pytest

from miles_train.plugins import TorchTrainerConfig
from miles_train.schedule import learning_rate


def rates(n: int, total: int, **options: Any) -> list[float]:
    config = TorchTrainerConfig(use="torch", **options)
    return [learning_rate(config, step, total) for step in range(n)]


def test_warm_up_rises_from_a_learning_first_step():
    assert rates(6, 100, lr=0.4, warmup_steps=4) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_is_that_of_transformers_after_the_warm_up(schedule: str, warmup: int):
    import torch
    from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_polynomial_decay_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    if schedule == "cosine":
        theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, 20, min_lr_rate=0.1)
    else:
        theirs = get_polynomial_decay_schedule_with_warmup(optimizer, warmup, 20, lr_end=0.03, power=1.0)
    expected = []
    for _ in range(20):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert rates(20, 20, lr=0.3, warmup_steps=warmup, schedule=schedule)[warmup:] == pytest.approx(expected[warmup:])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_ends_and_stays_at_the_final_ratio(schedule: str):
    assert rates(14, 10, lr=2.0, schedule=schedule, final_lr_ratio=0.25)[10:] == pytest.approx([0.5] * 4)


def test_a_constant_schedule_does_not_look_at_the_total():
    assert rates(5, 0, lr=0.7) == [0.7] * 5
