"""Who of several servers takes the next request."""

from dataclasses import dataclass

import pytest

from miles_core.errors import RunError
from miles_rollout.fleet import Fleet


@dataclass(frozen=True)
class Server:
    name: str


A, B, C = Server("a"), Server("b"), Server("c")


def test_the_one_with_the_fewest_outstanding_takes_it():
    fleet = Fleet([A, B, C])
    with fleet.lease() as first, fleet.lease() as second:
        assert (first, second) == (A, B)
        with fleet.lease() as third, fleet.lease() as fourth:
            assert (third, fourth) == (C, A)
            assert fleet.outstanding == {"a": 2, "b": 1, "c": 1}
        assert fleet.outstanding == {"a": 1, "b": 1, "c": 0}
        with fleet.lease() as next_one:
            assert next_one == C
    assert fleet.outstanding == {"a": 0, "b": 0, "c": 0}


def test_a_failure_gives_the_place_back():
    fleet = Fleet([A, B])
    with pytest.raises(ZeroDivisionError), fleet.lease():
        _ = 1 / 0
    assert fleet.outstanding == {"a": 0, "b": 0}


def test_the_lost_are_left_out_until_none_is_left():
    fleet = Fleet([A, B])
    with fleet.lease() as server:
        fleet.lose(server, "a was killed")
        fleet.lose(server, "a does not answer")
        with fleet.lease() as other, fleet.lease() as again:
            assert other == again == B
    assert fleet.living == [B]
    fleet.lose(B, "b ran out of memory")
    with pytest.raises(RunError, match=r"no server is left of 2:\n- a was killed\n- b ran out of memory"), fleet.lease():
        pass
