"""A Hugging Face causal language model that gives log-probabilities and entropies of packed rows, without whole logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import is_flash_attn_2_available

from miles_core.batch import Batch
from miles_core.errors import ConfigError
from miles_kernels.ops.linear_logprob import LinearLogprob, linear_logprob

from .layouts import LAYOUTS

LOADED = ("tokens", "targets", "positions", "temperatures")
"""Batch columns that ``CausalLM.logprobs`` reads."""


def load_model(path: Path, dtype: torch.dtype, device: torch.device, attention: str | None = None) -> PreTrainedModel:
    """The model in ``path`` with all its weights, in evaluation mode: dropout would make log-probabilities random.

    ``attention`` None leaves the implementation to transformers: sdpa, or eager where a model has no other.
    Raises ConfigError if there is no model or weights are missing (transformers would make them up).
    """
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} has no config.json; a model's path is a Hugging Face directory")
    model, info = AutoModelForCausalLM.from_pretrained(  # ty: ignore[not-iterable]
        path, dtype=dtype, attn_implementation=attention, local_files_only=True, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(f"{path} lacks {len(missing)} weights of {type(model).__name__}, the first is {missing[0]!r}; export it again")
    return model.to(device).eval()


class CausalLM:
    """The model, and the one way it is asked for numbers.

    Attributes:
        hf: The transformers model.
        vocab_size: Token ids are below it.
    """

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device, layout: Literal["padded", "packed"]) -> None:
        flash = layout == "packed" and device.type == "cuda" and dtype == torch.bfloat16 and is_flash_attn_2_available()
        self.hf = load_model(path, dtype, device, "flash_attention_2" if flash else None)
        self.device = device
        self._layout = LAYOUTS[layout]
        self._head = _output_projection(self.hf)
        self.vocab_size = self._head.weight.shape[0]
        if layout == "packed":
            _check_packing(self.hf)

    def logprobs(self, batch: Batch, rows: np.ndarray) -> LinearLogprob:
        """Log-probability of the predicted token at its temperature, and entropy of that distribution, for some rows.

        Args:
            batch: With the columns ``LOADED``.
            rows: int64 [R], rows that predict a token.

        Returns:
            Two differentiable tensors [R], float32 (float64 for a float64 model).
        """
        inputs, where = self._layout(batch)
        hidden = self.hf.base_model(**{n: self.tensor(x) for n, x in inputs.items()}, use_cache=False).last_hidden_state
        return linear_logprob(
            hidden.flatten(0, 1).index_select(0, self.tensor(where[rows])),
            self._head.weight,
            self.tensor(batch.array("targets")[rows].astype(np.int64)),
            temperature=self.tensor(batch.array("temperatures")[rows]),
            bias=self._head.bias,
        )

    def tensor(self, array: np.ndarray) -> Tensor:
        """An array on the model's device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every weight as ``export`` writes it: the checkpoint's own names, tied weights once.

        The names differ from the modules' where transformers fuses weights on loading: experts of an MoE layer come one by
        one, as copies or views of the fused tensors.
        """
        weights, seen = {}, set()
        for name, weight in self.hf.state_dict(keep_vars=True).items():
            if id(weight) not in seen:
                seen.add(id(weight))
                weights[name] = weight.detach()
        yield from revert_weight_conversion(self.hf, weights).items()


@torch.no_grad()
def _output_projection(model: PreTrainedModel) -> nn.Linear:
    """The head, once it is known that logits are exactly hidden @ weight.T (+ bias).

    The head's output is made 100 times larger on the way, so that a soft cap, nearly the identity on the small logits of an
    untrained model, shows as clearly as a scale.
    """
    head, name = model.get_output_embeddings(), type(model).__name__
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"{name} has no linear output projection; the torch trainer takes causal language models with an lm_head")
    tokens = torch.arange(4, device=model.device)[None] % head.out_features
    hook = head.register_forward_hook(lambda module, inputs, output: 100 * output)
    logits = model(tokens, use_cache=False).logits
    hook.remove()
    expected = 100 * head(model.base_model(tokens, use_cache=False).last_hidden_state)
    if not _close(logits, expected):
        raise ConfigError(
            f"the logits of {name} are not hidden @ lm_head.weight.T: it scales or caps them (logit_scale, logits_scaling, "
            "final_logit_softcapping …), and the torch trainer's log-probabilities would be wrong. Use another model."
        )
    return head


@torch.no_grad()
def _check_packing(model: PreTrainedModel) -> None:
    """The same tokens twice in one row must give the same hidden states twice, or samples see each other."""
    tokens = torch.arange(8, device=model.device)[None] % 4 % model.get_output_embeddings().weight.shape[0]
    positions = torch.arange(8, device=model.device)[None] % 4
    hidden = model.base_model(tokens, position_ids=positions, use_cache=False).last_hidden_state
    if not _close(hidden[:, :4], hidden[:, 4:]):
        raise ConfigError(
            f"{type(model).__name__} lets packed samples see each other (a recurrent state, or its own masks); use layout: padded"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding: both come from the same operations on the same numbers."""
    tolerance = 5e-3 if a.dtype == torch.bfloat16 else 1e-4
    return torch.allclose(a, b, rtol=0, atol=tolerance * float(b.abs().max()))
