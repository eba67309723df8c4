"""Numbers with the same bits in any company: attention, log-probabilities and whole models, beside torch's and transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from miles_core.moe import find_routers
from miles_kernels.invariant.attention import invariant_attention
from miles_kernels.invariant.model import first_difference, make_invariant
from miles_kernels.ops.linear_logprob import exponentials, linear_logprob, logprob_of_logits

SHAPES = [(4, 2, 24), (8, 8, 64), (6, 1, 16), (16, 4, 128), (4, 2, 10), (2, 2, 7)]
"""Heads, heads of keys, width of a head."""


def case(heads: int, kv: int, width: int, n: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads * width + length)
    shapes = ((n, heads, length, width), (n, kv, length, width), (n, kv, length, width))
    query, key, value = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return query, key, value


def causal(queries: Tensor, keys: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[1, 1, S, L] for queries at these positions."""
    sees = torch.arange(keys) <= queries[:, None]
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[None, None]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("length", [1, 5, 64, 130])
@pytest.mark.parametrize("heads, kv, width", SHAPES)
def test_values_and_gradients_are_those_of_torch(heads: int, kv: int, width: int, length: int):
    ours, theirs = ([x.requires_grad_() for x in case(heads, kv, width, 2, length, torch.float64)] for _ in range(2))
    weights = torch.randn(2, heads, length, width, dtype=torch.float64)
    out = invariant_attention(*ours, causal(torch.arange(length), length, torch.float64), width**-0.5)
    expected = F.scaled_dot_product_attention(theirs[0], theirs[1], theirs[2], is_causal=True, enable_gqa=True)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "heads, kv, width, length",
    [
        pytest.param(*shape, length, marks=pytest.mark.slow if length == 700 and shape != SHAPES[0] else ())
        for shape in SHAPES
        for length in (20, 150, 700)
    ],
)
def test_a_row_has_the_same_bits_in_any_company(heads: int, kv: int, width: int, length: int, threads: int):
    query, key, value = case(heads, kv, width, 3, length)
    scale = width**-0.5
    whole = invariant_attention(query, key, value, causal(torch.arange(length), length), scale)
    alone = invariant_attention(query[1:2], key[1:2], value[1:2], causal(torch.arange(length), length), scale)
    assert torch.equal(alone, whole[1:2])
    filler = torch.full((3, kv, 77, width), 9.0)
    more_keys, more_values = torch.cat([key, filler], dim=2), torch.cat([value, filler], dim=2)
    assert torch.equal(invariant_attention(query, more_keys, more_values, causal(torch.arange(length), length + 77), scale), whole)
    for position in range(0, length, 1 + length // 12):  # one token after another, as an engine samples
        one = query[:, :, position : position + 1]
        keys = min(length, position + 1 + position % 5)
        mask = causal(torch.tensor([position]), keys)
        assert torch.equal(invariant_attention(one, key[:, :, :keys], value[:, :, :keys], mask, scale)[:, :, 0], whole[:, :, position])


def test_torch_alone_does_not_keep_that():
    """Else all of this would be for nothing."""
    query, key, value = case(8, 8, 64, 3, 150)
    whole = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    last = F.scaled_dot_product_attention(query[:, :, -1:], key, value)
    assert not torch.equal(last, whole[:, :, -1:])


@pytest.mark.parametrize("vocab", [38, 77, 1000])
def test_log_probabilities_have_the_same_bits_in_any_company(vocab: int, threads: int):
    generator = torch.Generator().manual_seed(vocab)
    hidden, weight = torch.randn(300, 48, generator=generator), torch.randn(vocab, 48, generator=generator)
    targets, temperature = torch.randint(vocab, (300,), generator=generator), torch.rand(300, generator=generator) + 0.5
    whole = linear_logprob(hidden, weight, targets, temperature=temperature).logprob
    torch.testing.assert_close(whole, torch.log_softmax(hidden @ weight.T / temperature[:, None], -1)[torch.arange(300), targets])
    logits = F.linear(hidden, weight) / temperature[:, None]
    for n in (1, 2, 3, 5, 15, 16, 17, 100, 241):
        assert torch.equal(linear_logprob(hidden[:n], weight, targets[:n], temperature=temperature[:n]).logprob, whole[:n])
        assert torch.equal(logprob_of_logits(logits[:n], targets[:n], *exponentials(logits[:n])), whole[:n])


COMMON: dict[str, Any] = {
    "vocab_size": 38,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "max_position_embeddings": 128,
}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"hidden_size": 96, "intermediate_size": 288, "head_dim": 24}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"hidden_size": 72, "intermediate_size": 250}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"hidden_size": 64, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 72},
    ),
}


def model_of(name: str) -> PreTrainedModel:
    config_class, model_class, fields = MODELS[name]
    torch.manual_seed(0)
    return model_class(config_class(**COMMON, **fields)).eval()


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_a_model_decodes_with_the_bits_of_its_whole_forward_pass(name: str):
    """One token after another over transformers' own cache, ever fewer sequences; and the numbers are still the model's."""
    model = model_of(name)
    tokens = torch.randint(38, (9, 70), generator=torch.Generator().manual_seed(1))
    own = model(tokens, use_cache=False).logits
    make_invariant(model, find_routers(model))
    assert first_difference(model, 38) is None
    whole = model(tokens, use_cache=False).logits
    torch.testing.assert_close(whole, own, rtol=0, atol=1e-5)
    cache, n = DynamicCache(config=model.config), 9
    for start, end in ((0, 7), *((t, t + 1) for t in range(7, 70))):
        if start in (20, 40, 60):  # some sequences are done
            n //= 2
            cache.batch_select_indices(torch.arange(n))
        mask = causal(torch.arange(start, end), end).expand(n, -1, -1, -1)
        positions = torch.arange(start, end).expand(n, -1)
        logits = model(tokens[:n, start:end], position_ids=positions, attention_mask=mask, past_key_values=cache).logits
        assert torch.equal(logits, whole[:n, start:end]), start


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_such_a_model_are_its_own(name: str):
    plain, invariant = model_of(name).double(), model_of(name).double()
    if routers := find_routers(invariant):
        plain.set_experts_implementation("eager")  # the default takes no float64
    make_invariant(invariant, routers)
    tokens = torch.randint(38, (3, 20), generator=torch.Generator().manual_seed(2))
    for model in (plain, invariant):
        model(tokens, use_cache=False).logits.pow(2).sum().backward()
    for (which, a), b in zip(plain.named_parameters(), invariant.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-12, msg=which)


def test_what_company_changes_is_said():
    """transformers' own model, but for the form of its masks."""
    assert "other bits" in (first_difference(model_of("qwen3"), 38) or "")


def test_a_model_whose_attention_is_more_than_scaled_products_is_refused():
    config = Gemma2Config(**COMMON, hidden_size=32, intermediate_size=64, head_dim=8, attn_logit_softcapping=2.0)
    model = Gemma2ForCausalLM(config).eval()
    make_invariant(model)
    with pytest.raises(ValueError, match="attention with softcap"):
        model(torch.arange(5)[None])
