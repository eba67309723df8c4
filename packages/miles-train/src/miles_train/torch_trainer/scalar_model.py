"""A Hugging Face model with a scalar head (critic, reward model): one number at every row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from miles_core.batch import Batch
from miles_core.errors import ConfigError
from miles_core.lora import Lora
from miles_core.model_files import check_files, refuse_missing, sentences

from .layouts import MicroBatch
from .model import Choice, PackedModel, close, read

HEAD = "score.weight"
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the names of transformers' language models end."""


class ScalarModel(PackedModel):
    """A critic or reward model: transformers' model for sequence classification with one label, whose head ``score`` is a linear
    map without bias. Output: ``values`` = score(hidden) at every row.

    Row p has read the tokens up to and including p. For a critic that is the state in which the token predicted at p is chosen;
    a reward model's score of a sample is the value of its last row. Temperatures and supports do not matter to it.

    The head is applied in float32: a bfloat16 product would round a value to 8 bits.

    Attributes:
        score: The head.
    """

    gives = frozenset({"values"})
    annotated = "values"
    reads = ("tokens", "positions")
    unsupported = ("images", "audio")

    def __init__(
        self, path: Path, dtype: torch.dtype, device: torch.device, layout: Choice, bitwise: bool = False, lora: Lora | None = None
    ) -> None:
        if lora is not None:
            raise ConfigError("a model with a scalar head has no adapter (lora); train all of its weights")
        super().__init__(path, dtype, device, layout, bitwise)
        self.score, self._bitwise = _head(self.hf), bitwise
        _check_output(self.hf, self.score)

    @staticmethod
    def load(path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The model in ``path``: a critic or reward model that was saved before, or a causal language model.

        A language model lacks the head's weight, and only that. It starts at 0, so that all values do; the head learns from
        its first step on (its gradient is made of hidden states), the layers below it from the second.

        Raises ConfigError as ``PackedModel.load`` does, and if transformers has no such model with a scalar head, the saved one
        has several labels, or it is of a third kind (a head of another make would be dropped without a word).
        """
        check_files(path)
        with sentences(path):
            config = AutoConfig.from_pretrained(path, local_files_only=True)
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise ConfigError(f"transformers has no {config.model_type} model with a scalar head; a critic or reward model needs another")
        saved_as = (config.architectures or ["ForCausalLM"])[0]  # few leave it out, all of them language models
        scalar = saved_as.endswith("ForSequenceClassification")
        if not scalar and not saved_as.endswith(LANGUAGE_MODELS):
            raise ConfigError(f"{path} holds a {saved_as}; a critic or reward model is made of a ForCausalLM or ForSequenceClassification")
        if scalar and config.num_labels != 1:
            raise ConfigError(f"{path} classifies into {config.num_labels} labels; a critic or reward model has one")
        model, missing = read(AutoModelForSequenceClassification, path, dtype, device, num_labels=1)
        head = _head(model)
        if HEAD in missing and not scalar:
            missing.remove(HEAD)
            nn.init.zeros_(head.weight)
        refuse_missing(model, path, missing)
        return model

    def outputs(self, micro: MicroBatch, rows: np.ndarray) -> dict[str, Tensor]:
        """See ``PackedModel.outputs``; a value stands on every row, whatever ``rows`` are: reward models read a sample's last."""
        hidden = self.hidden(micro, self.rows_to_annotate(micro.batch))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        hidden, weight = hidden.to(wide), self.score.weight.to(wide)
        if self._bitwise:  # a product with one column has other bits for other numbers of rows; a sum over each row has not
            return {"values": (hidden * weight).sum(-1)}
        return {"values": F.linear(hidden, weight).squeeze(-1)}

    def rows_to_annotate(self, batch: Batch) -> np.ndarray:
        """All of them."""
        return np.arange(batch.n_rows)


def _head(model: PreTrainedModel) -> nn.Linear:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or head.out_features != 1:
        raise ConfigError(f"{type(model).__name__} has no scalar head 'score' without bias; a critic or reward model needs another model")
    return head


@torch.no_grad()
def _check_output(model: PreTrainedModel, head: nn.Linear) -> None:
    """The model's output must be exactly the head's on the last hidden state.

    On the way the head's output is replaced by the first number of what it reads: its own may be 0 throughout.
    """
    tokens = torch.tensor([[t for t in range(5) if t != model.config.get_text_config().pad_token_id][:4]], device=model.device)
    read: list[Tensor] = []  # before any other hook makes more rows of them (``numerics: bitwise``)
    hooks = [
        head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]), prepend=True),
        head.register_forward_hook(lambda module, inputs, output: read[-1][..., :1]),
    ]
    logits = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    expected = model.base_model(tokens, use_cache=False).last_hidden_state[:, -1, :1]
    if logits.shape != expected.shape or not close(logits, expected):
        name = type(model).__name__
        raise ConfigError(f"the output of {name} is not score(hidden) of the last token; a critic or reward model needs another model")
