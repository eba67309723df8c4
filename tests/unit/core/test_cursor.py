"""The cursor: a position is all there is to know about where a run is in its data."""

from __future__ import annotations

import pytest

from miles_core.cursor import Cursor
from miles_core.errors import DataError
from miles_core.protocols import Prompt


class Letters:
    def __init__(self, text):
        self.text = text

    def __len__(self):
        return len(self.text)

    def __getitem__(self, index):
        return Prompt(self.text[index], self.text[index])


def read(cursor, start, end):
    return "".join(cursor.prompt(p).id for p in range(start, end))


def test_unshuffled_it_goes_round():
    cursor = Cursor(Letters("abc"), seed=0, shuffle=False)
    assert read(cursor, 0, 7) == "abcabca"
    assert [cursor.epoch(p) for p in range(7)] == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("size", [1, 2, 5, 26])
def test_every_epoch_holds_every_prompt_once_in_an_order_of_its_own(size):
    letters = "abcdefghijklmnopqrstuvwxyz"[:size]
    cursor = Cursor(Letters(letters), seed=3, shuffle=True)
    epochs = [read(cursor, e * size, (e + 1) * size) for e in range(20)]
    assert all(sorted(e) == list(letters) for e in epochs)
    if size == 26:
        assert len(set(epochs)) == 20 and letters not in epochs


def test_the_order_depends_on_the_seed_alone():
    first, again = (Cursor(Letters("abcdefghij"), seed=3, shuffle=True) for _ in range(2))
    assert read(again, 13, 30) == read(first, 0, 30)[13:]  # it need not have been at the start
    assert read(Cursor(Letters("abcdefghij"), seed=4, shuffle=True), 0, 10) != read(first, 0, 10)


def test_no_data_is_an_error_at_once():
    with pytest.raises(DataError, match="the data source is empty"):
        Cursor(Letters(""), seed=0, shuffle=True)
