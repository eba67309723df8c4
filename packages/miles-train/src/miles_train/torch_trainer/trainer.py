"""`trainer: torch`: the loop over optimizer steps and micro-batches, in one process.

A micro-batch's loss is its exact share of the optimizer step's loss (SegmentOps.share), so gradients add up to the same sum
however the step was cut up, padded or packed. Renormalisation over a recorded support, attachments and several processes are not
here yet; samples that need one of them are refused.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from miles_core.batch import Batch
from miles_core.errors import ConfigError, RunError, StepRefused
from miles_core.moe import experts
from miles_core.plan import unit_of_all, units_of
from miles_core.protocols import BuildContext, StepReport, Unit

from ..gates import check_gates
from ..mismatch import fresh_rows, mismatch_of
from ..plugins import TorchTrainerConfig
from ..routing import load_routing, own_routing
from ..schedule import learning_rate
from ..steps import load_checked, step_metrics
from . import checkpoint
from .causal_lm import CausalLM
from .model import PackedModel, compute_dtype
from .objective import shares
from .optimizer import MasterAdamW
from .routing_replay import RoutingReplay
from .scalar_model import ScalarModel

P = ParamSpec("P")
R = TypeVar("R")

MODELS: dict[str, type[PackedModel]] = {"critic": ScalarModel, "reward": ScalarModel}
"""What a model of a role is; all others are language models."""
ENOUGH = 1024
"""Tokens of the present weights of which the mismatch is known well enough; samples without advantage help out up to there."""


class TorchTrainer:
    """A Hugging Face model that is trained, or only asked for columns (no losses in its context). Critics and reward models have a
    scalar head, all others are language models.

    Heavy work runs in one thread of the trainer's own, so that the event loop stays alive and calls wait for each other.

    Attributes:
        version: Version of the weights, as published. The loop sets it after each publish.
        optimizer_steps: Optimizer steps taken since the model's starting weights.
        unit: Samples of one unit share a micro-batch: those of a trajectory, or of a group where a loss is a function of pairs or groups.
        model: The model.
    """

    def __init__(self, config: TorchTrainerConfig, context: BuildContext) -> None:
        if context.model_path is None:
            raise ConfigError("trainer 'torch' was given no model; set the model's path to a Hugging Face directory")
        if context.losses and context.aggregation is None:
            raise ConfigError(f"model {context.model!r} has losses but no aggregation; set one, e.g. token_mean")
        if context.losses and config.schedule != "constant" and context.total_steps < 1:
            raise ConfigError(
                f"schedule: {config.schedule} ends with the stage, but the stage's number of steps is not known; use constant"
            )
        self.config = config
        self.context = context
        self.version = 0
        self.optimizer_steps = 0
        self.unit: Unit = unit_of_all(loss.unit for loss in context.losses.values())
        device = torch.device(context.device)
        self._dtype = compute_dtype(config.dtype, device)
        self.model = MODELS.get(context.role, CausalLM)(context.model_path, self._dtype, device, config.layout, context.bitwise)
        if config.recompute and context.losses:
            self.model.recompute()
        if config.routing_replay and context.role == "policy" and experts(self.model.hf):
            self.model.replay = RoutingReplay(self.model.hf)
        self._skips = config.skip_zero_advantages and all(loss.proportional_to_advantage for loss in context.losses.values())
        self._optimizer = self._new_optimizer(context.model_path) if context.losses else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"trainer-{context.model}")

    async def start(self) -> None:
        """Ready as it is built."""

    def _new_optimizer(self, path: Path) -> MasterAdamW:
        own = self._dtype != torch.float32  # read again: a checkpoint may hold more digits than the forward pass uses
        masters = self.model.load(path, torch.float32, self.model.device) if own else self.model.hf
        return MasterAdamW(self.model.hf, dict(masters.named_parameters()), self.config)

    async def annotate(self, batch: Batch, columns: frozenset[str]) -> Batch:
        """Add what the model says under the present weights.

        Args:
            batch: Any samples.
            columns: Of a language model ``old_logprobs``, ``ref_logprobs`` and ``teacher_logprobs``: log-probabilities at the
                temperatures the tokens were sampled at, each the same float32 [N], NaN where there is nothing to say: on the last
                row of a sample, and where the token was taken greedily. Of a critic or reward model ``values``: float32 [N], a
                number on every row.

        Raises:
            ConfigError: Another column is asked for.
            DataError: A token id is outside the vocabulary, or a sample's routing cannot be replayed.
        """
        if strange := sorted(columns - self.model.gives):
            raise ConfigError(
                f"a {self.context.role} of trainer 'torch' cannot give {strange[0]!r}, only {', '.join(sorted(self.model.gives))}; "
                "take it from another model"
            )
        if not columns:
            return batch
        annotated = await self._in_thread(self._annotate, batch)
        return batch.with_columns({name: annotated for name in sorted(columns)})

    async def step(self, batch: Batch) -> StepReport:
        """Train on ``batch.optimizer_steps()`` in order; a step in which no token is trained is passed over.

        Metrics: ``loss`` and ``loss/<term>``, ``entropy`` or ``values`` (mean over trained tokens), ``grad_norm`` (before clipping)
        and what the losses report (means over trained tokens), all averaged over the optimizer steps; ``tokens``, trained in all
        of them; ``lr`` of the last; ``seconds/forward_backward``; and of language models what ``mismatch_of`` says of the
        first optimizer step's trained tokens, before any update. ``gates`` bound the latter. Where samples without advantage may be
        skipped, ``skipped`` is the share of the trained tokens that were; losses are of all of them, means of the others, and the
        mismatch of the others and as many of the skipped as it takes to compare ``ENOUGH`` fresh tokens (in bitwise mode all).

        A batch for one optimizer step needs no ``old_logprobs``: where they are not annotated, they are what this pass says. They
        are reported as a column.

        The schedule counts optimizer steps; it ends at ``context.total_steps`` × the optimizer steps of this call.

        Raises:
            ConfigError: The model has no loss.
            DataError: A token id is outside the vocabulary, or a sample needs what this trainer cannot do.
            StepRefused: Loss or gradient is not finite (names the sample) or a gate is out of bounds in the first optimizer step,
                or no token is trained: nothing has changed.
            RunError: Loss or gradient is not finite in a later one; the weights are those before that optimizer step.
        """
        return await self._in_thread(self._step, batch)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name as in the exported checkpoint, detached tensor in the compute dtype), tied weights once."""
        return self.model.named_weights()

    def share_memory(self, memory: Mapping[str, Tensor]) -> None:
        """See SharesMemory. Weights that the checkpoint names otherwise than the modules (fused experts) stay where they are."""
        for name, parameter in self.model.hf.named_parameters():
            place = memory.get(name)
            if place is not None and (place.shape, place.dtype, place.device) == (parameter.shape, parameter.dtype, parameter.device):
                parameter.data = place

    async def save(self, directory: Path) -> None:
        """Write master weights, AdamW's state and counters as safetensors and JSON."""
        counters = {"optimizer_steps": self.optimizer_steps, "version": self.version}
        await self._in_thread(checkpoint.save_state, directory, self._trained(), counters)

    async def load(self, directory: Path) -> None:
        """Go on from what ``save`` wrote: on one thread, to the bit. CheckpointError where it does not fit; nothing has changed then."""
        counters = await self._in_thread(checkpoint.load_state, directory, self._trained(), self.model.device)
        self.optimizer_steps, self.version = counters["optimizer_steps"], counters["version"]

    async def export(self, directory: Path) -> None:
        """Write a Hugging Face directory: config, weights in the compute dtype, the starting model's tokenizer files."""
        assert self.context.model_path is not None
        await self._in_thread(checkpoint.export, directory, self.model, self.context.model_path)

    async def close(self) -> None:
        """Give the model's memory and the thread back; the trainer cannot be used afterwards."""
        await asyncio.to_thread(self._worker.shutdown)  # a call that was given up may still be running
        del self.model, self._optimizer
        if self.context.device == "cuda":
            torch.cuda.empty_cache()

    async def _in_thread(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._worker, partial(function, *args, **kwargs))

    def _trained(self) -> MasterAdamW:
        if self._optimizer is None:
            raise ConfigError(f"model {self.context.model!r} has no loss, so it is not trained; give it one")
        return self._optimizer

    def _loaded(self, batch: Batch) -> Batch:
        """The batch with the columns the model reads, checked."""
        batch = load_checked(batch, self.model.reads, self.model.unsupported, self.model.vocab_size, "torch")
        return load_routing(batch, self.model.replay.shape) if self.model.replay else batch

    def _micro_batches(self, batch: Batch, units: np.ndarray) -> list[np.ndarray]:
        return self.model.micro_batches(batch, units, self.config.micro_batch_tokens)

    @torch.no_grad()
    def _annotate(self, batch: Batch) -> np.ndarray:
        batch = self._loaded(batch)
        column = np.full(batch.n_rows, np.nan, np.float32)
        for samples in self._micro_batches(batch, np.arange(len(batch))):
            micro = batch.select(samples)
            rows = self.model.rows_to_annotate(micro)
            column[batch.rows_of(samples)[rows]] = self.model.outputs(micro, rows)[self.model.annotated].cpu().numpy()[rows]
        return column

    def _step(self, batch: Batch) -> StepReport:
        optimizer, batch = self._trained(), self._loaded(batch)
        total = self.context.total_steps * len(batch.steps)
        reports: list[dict[str, float]] = []
        mismatch: dict[str, float] = {}
        seconds = 0.0
        if self.model.replay:
            self.model.replay.reset()
        logprobs = np.full(batch.n_rows, np.nan, np.float32)
        for samples, minibatch in zip(batch.steps, batch.optimizer_steps(), strict=True):
            if minibatch.segments.tokens == 0:
                continue
            start = time.perf_counter()
            kept = self._kept(minibatch)
            part = minibatch.select(kept)
            try:
                report, said = self._forward_backward(part, once=len(batch.steps) == 1)
                if not reports and said is not None:
                    logprobs[batch.rows_of(samples[kept])] = np.where(part.array("loss_mask"), said, np.nan)
                    compared, said = self._with_fresh(minibatch, kept, said)
                    mismatch = mismatch_of(compared, said, self.version)
                    check_gates(mismatch, self.config.gates, str(self._dtype).removeprefix("torch."), self.context.bitwise)
                    if self.model.replay and self.config.compare_routing:
                        mismatch |= self._own_routing(compared, self.model.replay)
                norm = optimizer.gradient_norm()
                report |= {"grad_norm": float(norm), "lr": learning_rate(self.config, self.optimizer_steps, total)}
                seconds += time.perf_counter() - start
                if not norm.isfinite():
                    raise RunError(f"the gradient's norm is {float(norm)}, though the loss is finite{self._origin(part)}")
                optimizer.step(report["lr"], norm, self.config.max_grad_norm)
            except RunError as error:
                refusal = RunError if reports else StepRefused
                raise refusal(f"optimizer step {self.optimizer_steps + 1}: {error}. The weights are those before it.") from error
            finally:
                optimizer.zero_grad()
            self.optimizer_steps += 1
            reports.append(report | {"tokens": minibatch.segments.tokens})
        metrics = step_metrics(reports, seconds)
        routing = self.model.replay.finish() if self.model.replay else {}
        known = len(batch.steps) == 1 and self.model.annotated == "logprobs"
        return StepReport(metrics | mismatch | routing, len(reports), {"old_logprobs": logprobs} if known else {})

    def _kept(self, minibatch: Batch) -> np.ndarray:
        """int64: the samples that go through the model. Those that train nothing stay out, and where every loss is proportional to the
        advantage those in whose unit all advantages are 0.

        If that is all of them, one unit stays: its gradient of 0 is what AdamW's moments and weight decay wait for.
        """
        trained = minibatch.segments.sequence_tokens > 0
        if not self._skips:
            return np.flatnonzero(trained)
        units = units_of(minibatch, self.unit)
        counts = minibatch.array("loss_mask") & (minibatch.array("advantages") != 0)
        moves = np.isin(units, units[minibatch.segment[counts]])
        if not moves.any():
            moves = units == units[np.where(trained, minibatch.lengths, np.iinfo(np.int64).max).argmin()]
        return np.flatnonzero(trained & moves)

    def _with_fresh(self, minibatch: Batch, kept: np.ndarray, said: np.ndarray) -> tuple[Batch, np.ndarray]:
        """The samples whose mismatch is looked at, and their log-probabilities [N] of trained rows: those that are ``kept`` (int64 [S];
        ``said`` of them), and of the skipped ones as many as it takes to compare ``ENOUGH`` tokens of these weights, in bitwise mode all.
        """
        rows = fresh_rows(minibatch, self.version)
        fresh = np.bincount(minibatch.segment[rows], minlength=len(minibatch))
        skipped = np.setdiff1d(np.flatnonzero(fresh), kept)
        before = fresh[kept].sum() + np.cumsum(fresh[skipped]) - fresh[skipped]
        more = skipped if self.context.bitwise else skipped[before < ENOUGH]
        compared = np.sort(np.r_[kept, more])
        logprobs = np.full(minibatch.n_rows, np.nan)
        logprobs[minibatch.rows_of(kept)] = said
        if len(more):
            logprobs[minibatch.rows_of(more)] = self._logprobs(minibatch.select(more))
        return minibatch.select(compared), logprobs[minibatch.rows_of(compared)]

    def _forward_backward(self, part: Batch, *, once: bool) -> tuple[dict[str, float], np.ndarray | None]:
        """Gradients of one optimizer step; its metrics, and a language model's log-probabilities, float64 [N], of the trained rows.

        Args:
            part: The samples of the step that go through the model.
            once: Whether it is the batch's only optimizer step: ``old_logprobs`` that nobody annotated are then what this pass says.
        """
        logprobs = np.full(part.n_rows, np.nan) if self.model.annotated == "logprobs" else None
        sums: dict[str, Tensor] = {}
        for samples in self._micro_batches(part, units_of(part, self.unit)):
            outputs, parts = self._add_gradient(part.select(samples), once=once)
            for name, x in parts.items():
                sums[name] = sums[name] + x if name in sums else x
            if logprobs is not None:
                logprobs[part.rows_of(samples)] = outputs["logprobs"].detach().cpu().numpy()
        metrics = {name: float(x) for name, x in sums.items()}
        if not self._skips:
            return metrics, logprobs
        share = part.segments.sequence_tokens.sum() / part.segments.tokens
        means = {name: x if name.split("/")[0] == "loss" else x / share for name, x in metrics.items()}
        return means | {"skipped": 1.0 - share}, logprobs

    @torch.no_grad()
    def _logprobs(self, part: Batch) -> np.ndarray:
        """float64 [N]: log-probabilities of the trained rows, without gradients."""
        logprobs = np.full(part.n_rows, np.nan)
        for samples in self._micro_batches(part, np.arange(len(part))):
            micro = part.select(samples)
            outputs = self.model.outputs(micro, np.flatnonzero(micro.array("loss_mask")))
            logprobs[part.rows_of(samples)] = outputs["logprobs"].cpu().numpy()
        return logprobs

    def _own_routing(self, part: Batch, replay: RoutingReplay) -> dict[str, float]:
        """The mismatch without replay, named ``mismatch_own_routing/…``, by another forward pass."""
        with replay.off():
            return own_routing(mismatch_of(part, self._logprobs(part), self.version))

    def _add_gradient(self, micro: Batch, *, once: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add a micro-batch's gradient to what there is; the model's outputs, and the metrics' parts. ``once`` as above."""
        assert self.context.aggregation is not None
        outputs = self.model.outputs(micro, np.flatnonzero(micro.array("loss_mask")))
        if once and "logprobs" in outputs and "old_logprobs" not in micro.columns:
            micro = micro.with_columns({"old_logprobs": outputs["logprobs"].detach().cpu().numpy()})
        loss, parts, complaint = shares(micro, outputs, self.context.losses, self.context.aggregation)
        if complaint:
            raise RunError(complaint)
        loss.backward()
        return outputs, parts

    def _origin(self, part: Batch) -> str:
        """Whose gradient is not finite. Every unit is computed again, alone: only a step that is refused pays for that."""
        optimizer = self._trained()
        for samples in self.model.micro_batches(part, units_of(part, self.unit), 1):
            optimizer.zero_grad()
            self._add_gradient(part.select(samples), once=True)
            if not optimizer.gradient_norm().isfinite():
                ids = [str(part.refs[s].id) for s in samples]
                return f"; it comes from {'sample' if len(ids) == 1 else 'one of the samples'} {', '.join(ids)}"
        return ", and so is each sample's own gradient: only their sum is not"
