"""The builder grows a sample whose columns say who made which token, whatever turns there were."""

from __future__ import annotations

import numpy as np
import pytest
from fixtures.samples import sample_id
from hypothesis import given
from hypothesis import strategies as st

from miles_core.builder import SampleBuilder
from miles_core.errors import DataError
from miles_core.protocols import Generation, SamplingParams
from miles_core.sample import SamplingSpan, Status, Turn

BOS = 1


class Letters:
    """One token a letter, and a token at the start of a text."""

    eos_token_id = 2

    def encode(self, text, *, add_special_tokens=True):
        return [BOS] * add_special_tokens + [ord(c) for c in text]

    def decode(self, token_ids):
        return "".join("^" if t == BOS else "$" if t == self.eos_token_id else chr(t) for t in token_ids)


def said(text, *, version=3, **fields):
    n = len(text)
    logprobs = -np.arange(1, n + 1, dtype=np.float32) / 8
    return Generation(np.array([ord(c) for c in text], np.int32), logprobs, np.full(n, version, np.int32), "stop", **fields)


@pytest.fixture
def builder():
    return SampleBuilder(sample_id(), Letters())


def test_a_text_that_comes_again_is_tokenised_once():
    """A group's prompt; by each tokenizer, and with and without special tokens, for itself."""

    class Counting(Letters):
        __hash__ = None  # as of a dataclass: no key of a table
        calls = 0

        def __eq__(self, other):
            return True

        def encode(self, text, *, add_special_tokens=True):
            self.calls += 1
            return [self.eos_token_id] * (self.calls > 2) + super().encode(text, add_special_tokens=add_special_tokens)

    one, other = Counting(), Counting()
    for tokenizer in (one, one, other):
        started = SampleBuilder(sample_id(), tokenizer)
        started.inject("ab", role="user")
        started.inject("ab", role="user")
        assert started.tokens.tolist() == [BOS, ord("a"), ord("b"), ord("a"), ord("b")]
    assert (one.calls, other.calls) == (2, 2)


def test_a_conversation_with_a_tool(builder):
    builder.inject("Q?", role="user")
    builder.append(said("ab", version=3), SamplingParams(8, temperature=0.5))
    builder.inject("R", role="tool")
    builder.append(said("c", version=4), SamplingParams(6))
    sample = builder.finish(Status.COMPLETED, prompt="Q?", label=7, metadata={"seed": 1})

    assert sample.tokens.tolist() == [BOS, ord("Q"), ord("?"), ord("a"), ord("b"), ord("R"), ord("c")]
    assert sample.versions.tolist() == [-1, -1, -1, 3, 3, -1, 4]
    assert sample.loss_mask.tolist() == [False, False, False, True, True, False, True]
    nan = np.nan
    np.testing.assert_array_equal(sample.logprobs, np.array([nan, nan, nan, -0.125, -0.25, nan, -0.125], np.float32))
    assert sample.turns == [Turn("user", 0, 3), Turn("assistant", 3, 5), Turn("tool", 5, 6), Turn("assistant", 6, 7)]
    assert sample.spans == [SamplingSpan(3, 5, 0.5), SamplingSpan(6, 7)]
    assert (sample.prompt, sample.label, sample.status) == ("Q?", 7, Status.COMPLETED)
    assert sample.metadata == {"response": "abRc", "seed": 1}
    assert builder.sampled == sample.n_sampled == 3
    sample.validate(vocab_size=128)


def test_text_is_a_view_of_the_tokens(builder):
    builder.inject("Q?", role="user")
    builder.append(said("ab"), SamplingParams(8))
    assert builder.text() == "^Q?ab" and builder.text(3) == "ab"
    assert builder.tokens.dtype == np.int32 and builder.tokens.tolist() == Letters().encode("Q?ab")


def test_a_demonstration_is_trained_though_nobody_sampled_it(builder):
    builder.inject("Q", role="user")
    builder.inject("ab", role="assistant", trained=True)
    sample = builder.finish(Status.COMPLETED)
    assert sample.loss_mask.tolist() == [False, False, True, True] and sample.versions.tolist() == [-1] * 4
    assert not sample.spans
    sample.validate(rl=False)
    with pytest.raises(DataError, match="not sampled"):
        sample.validate()


def test_nothing_said_and_nothing_injected_leave_no_turn(builder):
    builder.inject("Q", role="user")
    builder.append(said(""), SamplingParams(8))
    builder.inject_ids([], role="tool")
    sample = builder.finish(Status.TRUNCATED)
    assert sample.turns == [Turn("user", 0, 2)] and sample.spans == [] and sample.metadata["response"] == ""
    sample.validate()


def test_another_part_of_metadata_may_be_called_response(builder):
    builder.inject("Q", role="user")
    assert builder.finish(Status.COMPLETED, metadata={"response": "mine"}).metadata == {"response": "mine"}


def test_the_support_of_restricted_sampling_is_recorded_at_the_tokens_it_belongs_to(builder):
    builder.inject("Q", role="user")
    builder.append(said("ab", support=[[97, 5], [98]]), SamplingParams(8, top_k=2))
    builder.inject("R", role="tool")
    builder.append(said("c", support=[[99, 7, 8]]), SamplingParams(8, top_k=3))
    sample = builder.finish(Status.COMPLETED)
    support = sample.columns["support"]
    assert [support.values[s:e].tolist() for s, e in zip(support.offsets, support.offsets[1:], strict=False)] == [
        [], [], [97, 5], [98], [], [99, 7, 8],
    ]  # fmt: skip
    sample.validate(vocab_size=128)


def routed(text, context, start):
    """A generation with the routing rows an engine gives: rows ``start`` to T + n − 2; the row of token t holds t (and t + 1)."""
    rows = np.arange(start, context + len(text) - 1)
    return said(text, routing=np.stack([rows, rows + 1], axis=-1)[:, None, :].astype(np.uint8))


@pytest.mark.parametrize("last_injection", ["", "RR"])
def test_routing_rows_belong_to_the_token_that_was_the_input(builder, last_injection):
    builder.inject("Q?", role="user")
    assert builder.routing_rows == 0
    builder.append(routed("ab", 3, 0), SamplingParams(8))
    assert builder.routing_rows == 4  # tokens 0 to 3 were inputs
    builder.inject("xyz", role="tool")
    builder.append(routed("c", 8, 4), SamplingParams(8))
    builder.inject(last_injection, role="tool")
    sample = builder.finish(Status.COMPLETED)
    routing = sample.columns["routing"]
    assert routing.shape == (len(sample), 1, 2) and routing.dtype == np.uint8
    assert routing[:8, 0].tolist() == [[t, t + 1] for t in range(8)]
    assert (routing[8:] == 255).all()  # token 8 ("c") and what follows never were inputs
    sample.validate(vocab_size=128)


turns = st.lists(st.tuples(st.booleans(), st.text("abc", max_size=4)), max_size=8)


@given(st.text("xyz", min_size=1, max_size=3), turns)
def test_whatever_the_turns_the_columns_agree_with_who_spoke(prompt, turns):
    builder, owner, text = SampleBuilder(sample_id(), Letters()), [-1] * (1 + len(prompt)), prompt
    builder.inject(prompt, role="user")
    for version, (by_policy, piece) in enumerate(turns):
        if by_policy:
            builder.append(said(piece, version=version), SamplingParams(9))
        else:
            builder.inject(piece, role="tool")
        owner += [version if by_policy else -1] * len(piece)
        text += piece
    sample = builder.finish(Status.COMPLETED)
    sample.validate(vocab_size=128)
    assert Letters().decode(sample.tokens.tolist()) == "^" + text
    assert sample.versions.tolist() == owner
    assert sample.loss_mask.tolist() == [v >= 0 for v in owner] == (~np.isnan(sample.logprobs)).tolist()
    assert sum(t.end - t.start for t in sample.turns) == len(sample)
    assert sum(s.end - s.start for s in sample.spans) == builder.sampled == sum(v >= 0 for v in owner)
