"""A Hugging Face causal language model that gives log-probabilities and entropies, without whole logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from miles_core.batch import Batch
from miles_core.errors import ConfigError
from miles_core.lora import Lora
from miles_core.model_files import refuse_missing
from miles_kernels.ops.linear_logprob import linear_logprob

from .layouts import MicroBatch
from .model import Choice, PackedModel, close, read


class CausalLM(PackedModel):
    """A policy, reference or teacher. Outputs: ``logprobs`` of the predicted tokens at their temperatures, and ``entropy`` of the
    distributions they come from, in nats."""

    gives = frozenset({"old_logprobs", "ref_logprobs", "teacher_logprobs"})
    annotated = "logprobs"
    reads = ("tokens", "targets", "positions", "temperatures")
    unsupported = ("support", "images", "audio")

    def __init__(
        self, path: Path, dtype: torch.dtype, device: torch.device, layout: Choice, bitwise: bool = False, lora: Lora | None = None
    ) -> None:
        super().__init__(path, dtype, device, layout, bitwise, lora)
        self._head = _output_projection(self.hf)
        self.vocab_size = self._head.weight.shape[0]

    @staticmethod
    def load(path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """See ``PackedModel.load``."""
        model, missing = read(AutoModelForCausalLM, path, dtype, device)
        refuse_missing(model, path, missing)
        return model

    def outputs(self, micro: MicroBatch, rows: np.ndarray) -> dict[str, Tensor]:
        """See ``PackedModel.outputs``; only ``rows`` are put through the head."""
        batch = micro.batch
        result = linear_logprob(
            self.hidden(micro, rows),
            self._head.weight,
            self.tensor(batch.array("targets")[rows].astype(np.int64)),
            temperature=self.tensor(batch.array("temperatures")[rows]),
            bias=self._head.bias,
        )
        index = self.tensor(rows)
        return {"logprobs": _spread(result.logprob, index, batch.n_rows), "entropy": _spread(result.entropy, index, batch.n_rows)}

    def rows_to_annotate(self, batch: Batch) -> np.ndarray:
        """Rows that predict a token which was not taken greedily."""
        predicts = batch.array("temperatures") > 0
        predicts[batch.cu_seqlens[1:] - 1] = False
        return np.flatnonzero(predicts)


def _spread(values: Tensor, index: Tensor, n_rows: int) -> Tensor:
    """Values [R] of some rows → [N], 0 elsewhere. No gradient comes back from elsewhere, not even the NaN of 0 · NaN."""
    return values.new_zeros(n_rows).index_copy(0, index, values)


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
    if not close(logits, expected):
        raise ConfigError(
            f"the logits of {name} are not hidden @ lm_head.weight.T: it scales or caps them (logit_scale, logits_scaling, "
            "final_logit_softcapping …), and the torch trainer's log-probabilities would be wrong. Use another model."
        )
    return head
