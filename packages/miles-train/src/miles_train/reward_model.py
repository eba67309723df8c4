"""``reward: reward_model``: what a trained reward model says of prompt and answer."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miles_core.batch import Batch
from miles_core.errors import ConfigError, DataError
from miles_core.models import materialize
from miles_core.protocols import BuildContext
from miles_core.refs import SampleRef
from miles_core.rewards.texts import ends_of_text
from miles_core.sample import Sample
from miles_core.tokenizers import load_tokenizer

from .plugins import RewardModelConfig
from .torch_trainer.model import compute_dtype
from .torch_trainer.scalar_model import ScalarModel


class RewardModel:
    """Scores each sample with the value on its last token.

    What it reads: the sample's own tokens, where the policy's tokenizer has the reward model's vocabulary; else prompt and
    ``metadata["response"]`` as text, put through its own tokenizer. In text the policy's end of text at the very end becomes the
    reward model's; any other markup (a chat template's) stays as it is written.

    It computes in float32 on a CPU and in bfloat16 on a GPU, without a gradient, one group at a time. With ``numerics: bitwise`` a score
    has the same bits whatever else is in the group.

    Args:
        config: Which model.
        context: Of the policy that is scored: its name and tokenizer, the device, and the run's directory.

    Raises:
        ConfigError: There is no such model, it has no scalar head that was trained, or no tokenizer.
    """

    def __init__(self, config: RewardModelConfig, context: BuildContext) -> None:
        path = directory_of(config, context)
        device = torch.device(context.device)
        self._model = ScalarModel(path, compute_dtype(None, device), device, "auto", context.bitwise)
        if not self._model.score.weight.any():
            raise ConfigError(f"reward model {path} gives 0 to everything: its head was never trained. Train it with role: reward")
        self._model.hf.requires_grad_(False)
        self._tokenizer = load_tokenizer(path)
        self._micro_batch_tokens = config.micro_batch_tokens
        self._policy = context.model
        self._shares_tokens = _same_vocabulary(self._tokenizer, context.tokenizer)
        self._policy_ends = ends_of_text(context)
        self._one_at_a_time = threading.Lock()

    @torch.no_grad()
    def __call__(self, samples: list[Sample]) -> list[float]:
        """A score for each. Raises DataError, naming the sample, if it has no text to read or a token outside the vocabulary."""
        with self._one_at_a_time:  # for the memory, and because a tokenizer is not made for several threads
            read = [Sample.of(replace(s.id, policy=""), self._tokens(s)) for s in samples]
            batch = Batch.of([SampleRef.of(s) for s in read]).load(self._model.reads)
            scores = np.zeros(len(batch))
            for micro in self._model.micro_batches(batch, np.arange(len(batch)), self._micro_batch_tokens):
                values = self._model.outputs(micro, self._model.rows_to_annotate(micro.batch))["values"]
                scores[micro.samples] = values.cpu().numpy()[micro.batch.cu_seqlens[1:] - 1]
            return scores.tolist()

    def _tokens(self, sample: Sample) -> np.ndarray:
        """int32, what the reward model reads of a sample."""
        same = self._shares_tokens and sample.id.policy == self._policy
        tokens = sample.tokens if same else np.array(self._encode(sample), np.int32)
        if not len(tokens):
            raise DataError(f"sample {sample.id} has no token that the reward model could read")
        bad = tokens[(tokens < 0) | (tokens >= self._model.vocab_size)]
        if len(bad):
            raise DataError(f"sample {sample.id} holds token id {bad[0]}; the reward model's ids are 0 to {self._model.vocab_size - 1}")
        return tokens

    def _encode(self, sample: Sample) -> list[int]:
        response = sample.metadata.get("response")
        if not isinstance(sample.prompt, str) or not isinstance(response, str):
            raise DataError(
                f"sample {sample.id}: the reward model has another vocabulary than the policy and reads text, but "
                f"{'metadata has no response' if isinstance(sample.prompt, str) else 'its prompt is no text'}; the rollout sets both"
            )
        text, end = sample.prompt + response, self._tokenizer.eos_token_id
        ending = next((ending for ending in self._policy_ends if text.endswith(ending)), "") if end is not None else ""
        try:
            tokens = self._tokenizer.encode(text.removesuffix(ending))
        except Exception as error:  # tokenizers raises nothing narrower
            raise DataError(f"sample {sample.id}: the reward model's tokenizer cannot write {text!r}: {error}") from error
        return [*tokens, end] if ending else tokens


def directory_of(config: RewardModelConfig, context: BuildContext) -> Path:
    """Where the reward model lies. Raises ConfigError if it is not there."""
    if config.path is not None:
        return materialize(config.path, None, None, (), context.run_dir, context.seed)
    trained = context.run_dir / "models" / context.stage_name
    path = trained / str(config.model)
    if not (path / "config.json").is_file():
        known = sorted(d.parent.name for d in trained.glob("*/config.json"))
        raise ConfigError(
            f"reward model {config.model!r}: no stage before {context.stage_name!r} trained a model of that name "
            f"(trained: {', '.join(known) or 'none'}); train one with role: reward, or give its path"
        )
    return path


def _same_vocabulary(own: Any, other: Any) -> bool:
    """Whether token ids mean the same to both; a tokenizer that cannot list its vocabulary counts as another."""
    listed = getattr(other, "get_vocab", None)
    return listed is not None and listed() == own.get_vocab()
