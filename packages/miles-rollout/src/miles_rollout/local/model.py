"""The model of the local engine: forward passes over rows of different length, after checks that its numbers are the model's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from miles_core.errors import ConfigError, MilesError
from miles_core.model_files import read_model, refuse_missing, refuse_not_finite
from miles_core.moe import find_routers
from miles_kernels.invariant import model as invariant

from . import attention
from .cache import Aim, SlotCache
from .fused import fused_step
from .routing import RoutingRecorder

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.3}
"""Largest mean difference from the model's own logits, in standard deviations of these. Wrong masks or positions give 0.5 and more,
rounding in float32 less than 1e-5. In half precision a router may choose another expert (up to 0.3 in deep untrained models), so that
only gross errors are found there."""


def load_model(path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model in a Hugging Face directory, ready to be sampled from.

    Raises:
        ConfigError: There is none, weights are missing (transformers would make them up), or are not finite.
    """
    model, missing = read_model(AutoModelForCausalLM, path, dtype=dtype)
    refuse_missing(model, path, missing)
    model = model.to(device).eval().requires_grad_(False)
    refuse_not_finite(model.named_parameters(), path)
    return model


class SlotModel:
    """A causal language model over a slot cache.

    Attributes:
        hf: The transformers model.
        cache: Keys and values by slot.
        fused: Whether decoding is one fused step; elsewhere the model's modules run.
        vocab_size: Token ids are below it.
        device: Where it runs.
    """

    def __init__(self, model: PreTrainedModel, bitwise: bool = False) -> None:
        """Take a model.

        Args:
            model: As it was loaded.
            bitwise: Whether a token's logits must have the same bits in any batch.

        Raises:
            ConfigError: The model is of a kind whose numbers would be wrong here, or not bitwise the same; the sentence says which.
        """
        name = type(model).__name__
        _check_layers(model.config, name)
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ConfigError(f"{name} has no linear output projection (lm_head); the local engine takes causal language models")
        self.hf = model
        self.device = model.device
        self.cache = SlotCache(model.config.get_text_config().num_hidden_layers, self.device)
        self.vocab_size = head.out_features
        tokens = np.arange(2 * 12).reshape(2, 12) * 7919 % self.vocab_size
        own = self._own_logits(tokens)
        if bitwise:
            invariant.make_invariant(model, find_routers(model))
        if model.config._attn_implementation == "sdpa":  # it says that plain scaled dot-product attention is all it does
            model.set_attn_implementation(attention.NAME)
        self._routing = RoutingRecorder(model)
        self._wanted = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._columns = torch.arange(0, device=self.device)
        # Masks are added to the scores: floats (bools would be added as 0 and 1), and not −∞, which gives NaN where nothing is seen.
        self._seen = torch.zeros((), dtype=model.dtype, device=self.device)
        self._unseen = torch.full_like(self._seen, torch.finfo(model.dtype).min)
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0][self._wanted, -1:],), prepend=True)  # only where asked for
        self._fused = None if bitwise else fused_step(model)
        self._check_against(own, tokens)
        if bitwise and (why := invariant.first_difference(model, self.vocab_size)):
            raise ConfigError(f"numerics: bitwise cannot be had with this {name} on this machine: {why}")
        self.cache.clear()

    @property
    def fused(self) -> bool:
        return self._fused is not None

    def close(self) -> None:
        """Give the memory of weights and cache back, whoever still holds the model."""
        self.cache.clear()
        self._fused = None
        self.hf.to("meta")

    @torch.inference_mode()
    def forward(self, slots: np.ndarray, tokens: np.ndarray, positions: np.ndarray, wanted: np.ndarray) -> tuple[Tensor, np.ndarray | None]:
        """Run S tokens of n sequences; their keys and values go to the cache.

        Args:
            slots: int64 [n], slot of each row.
            tokens: int64 [n, S]. Columns that a shorter row does not need may hold any token, at positions after its last:
                what they leave in the cache is overwritten before it is seen.
            positions: int64 [n, S]. A token sees all positions up to its own.
            wanted: int64 [m], rising: rows whose logits after the last column are wanted.

        Returns:
            Logits [m, V] and the routing [n, S, L, K], None for dense models.
        """
        length = int(positions.max()) + 1
        positions_t = self._tensor(positions)
        leading = np.array_equal(slots, np.arange(len(slots)))
        if self._fused is not None and leading and tokens.shape[1] == 1:
            some = None if len(wanted) == len(slots) else self._tensor(wanted)
            return self._fused(self.cache, self._tensor(tokens[:, 0]), positions_t[:, 0], length, some), None
        if length > len(self._columns):
            self._columns = torch.arange(self.cache.length, device=self.device)
        self.cache.aim = Aim(self._tensor(slots), positions_t, length, leading)
        self._wanted = self._tensor(wanted)
        self._routing.start()
        visible = self._columns[:length] <= positions_t[..., None]
        mask = torch.where(visible, self._seen, self._unseen)
        logits = self.hf(
            input_ids=self._tensor(tokens),
            position_ids=positions_t,
            attention_mask=mask[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return logits[:, -1], self._routing.take(*tokens.shape)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    @torch.inference_mode()
    def _own_logits(self, tokens: np.ndarray) -> Tensor:
        """[n, S, V] by the model as transformers runs it."""
        return self.hf(input_ids=self._tensor(tokens), use_cache=False).logits

    def _check_against(self, own: Tensor, tokens: np.ndarray) -> None:
        """Raise a ConfigError unless the logits, one token after another, are the model's own, [2, S, V]."""
        name = type(self.hf).__name__
        try:
            differences = self._differences(own, tokens)
        except MilesError:
            raise
        except Exception as error:  # whatever a model does with positions, masks or caches of a form it does not know
            sentence = f"{name} does not run with its cache in slots ({type(error).__name__}: {error}). Use another engine for it."
            raise ConfigError(sentence) from error
        error, spread = float(differences.mean()), float(own.float().std())
        if not error <= TOLERANCE[self.hf.dtype] * spread:
            raise ConfigError(
                f"with its cache in slots {name} gives other logits than by itself (mean difference {error:.2g}, standard deviation "
                f"{spread:.2g}): it treats positions or masks in a way that the local engine does not know. Use another engine for it."
            )

    def _differences(self, own: Tensor, tokens: np.ndarray) -> Tensor:
        """Prefill two rows, the second with three tokens too many, then go on from 7 and 4 one by one."""
        n, length = tokens.shape
        self.cache.grow(n, length)
        rows, differences = np.arange(n), []
        self.forward(rows, tokens[:, :7], np.tile(np.arange(7), (n, 1)), rows[:0])
        for step in range(length - 4):
            positions = np.minimum([[7 + step], [4 + step]], length - 1)  # the first row ends early: its last token is run again
            logits, _ = self.forward(rows, np.take_along_axis(tokens, positions, 1), positions, rows)
            differences.append((logits.float() - own[rows, positions[:, 0]].float()).abs())
        return torch.stack(differences)


def _check_layers(config: PreTrainedConfig, name: str) -> None:
    """Raise a ConfigError for caches that are not plain keys and values of all positions, and for positions that depend on the batch."""
    text = config.get_text_config()
    kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers if type(layer) is not DynamicLayer}
    if kinds:
        raise ConfigError(
            f"{name} has layers that are not full attention (transformers caches them in {', '.join(sorted(kinds))}); "
            "the local engine keeps keys and values of all positions. Use another engine for this model."
        )
    rope = getattr(text, "rope_parameters", None) or {}
    rope_types = {rope.get("rope_type"), *(r.get("rope_type") for r in rope.values() if isinstance(r, dict))}
    if changing := rope_types & {"dynamic", "longrope"}:
        raise ConfigError(
            f"{name} has {changing.pop()!r} rotary positions, which depend on the longest sequence of a batch; the local engine "
            "would give a sequence other numbers in other company. Use another engine for this model."
        )
