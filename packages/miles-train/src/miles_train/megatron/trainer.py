"""`trainer: megatron`: the controller's side. It cuts optimizer steps into shards, sends each rank its own, and decides on what they say.

The loop over optimizer steps is the torch trainer's: a micro-batch's loss is its exact share of the step's, gradients are sums over
micro-batches and ranks, and nothing is changed before loss, gradient and gates were looked at.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles_core import errors
from miles_core.batch import Batch
from miles_core.config import Deadlines
from miles_core.errors import ConfigError, RanksLost, RunError, StepRefused
from miles_core.plan import micro_batches, unit_of_all, units_of
from miles_core.plugins import PluginConfig
from miles_core.protocols import BuildContext, Ranks, StepReport, Unit

from ..gates import check_gates
from ..mismatch import mismatch_of
from ..plugins import MegatronTrainerConfig
from ..routing import MoeShape, load_routing, own_routing, routing_metrics
from ..schedule import learning_rate
from ..steps import load_checked, step_metrics
from . import checkpoint
from .layout import Layout
from .messages import READS, Bucket, Gradients, RankOptions
from .sharding import Cut
from .specs import model_spec, read_config

WORKER = "miles_train.megatron.worker:Worker"
GIVES = MegatronTrainerConfig.gives
UNSUPPORTED = ("support", "images", "audio")
"""Sample columns without which the numbers would be wrong; they are not used yet."""
BEFORE = 0.95
"""Part of a stage's deadline that the ranks get, so that it is the error which names the rank that comes."""


class MegatronTrainer:
    """A language model over the ranks of the run's cluster, trained, or only asked for columns (no losses in its context).

    Attributes:
        version: Version of the weights, as published. The loop sets it after each publish.
        optimizer_steps: Optimizer steps taken since the model's starting weights.
        unit: Samples of one unit share a micro-batch: those of a trajectory, or of a group where a loss is a function of pairs or groups.
        layout: Over how many ranks the model is spread, and how.
    """

    def __init__(self, config: MegatronTrainerConfig, context: BuildContext) -> None:
        if context.model_path is None:
            raise ConfigError("trainer 'megatron' was given no model; set the model's path to a Hugging Face directory")
        if context.role in ("critic", "reward"):
            raise ConfigError(f"trainer 'megatron' has no scalar head yet, which a {context.role} needs; use trainer: torch for it")
        if context.losses and context.aggregation is None:
            raise ConfigError(f"model {context.model!r} has losses but no aggregation; set one, e.g. token_mean")
        if context.losses and config.schedule != "constant" and context.total_steps < 1:
            raise ConfigError(
                f"schedule: {config.schedule} ends with the stage, but the stage's number of steps is not known; use constant"
            )
        if context.losses and context.stage is None:
            raise ConfigError("trainer 'megatron' builds its losses on every rank, from the stage's configuration; it was given no stage")
        self.config = config
        self.context = context
        self.version = 0
        self.optimizer_steps = 0
        self.unit: Unit = unit_of_all(loss.unit for loss in context.losses.values())
        self.layout = Layout(**config.parallel.model_dump())
        hf_config = read_config(context.model_path)
        if problems := self.layout.problems(hf_config):
            raise ConfigError(f"model {context.model!r} does not fit trainer.parallel: {'; '.join(problems)}")
        spec = model_spec(hf_config)
        self._vocab_size: int = spec.model(hf_config)["vocab_size"]
        self._replayed: MoeShape | None = None
        if config.routing_replay and context.role == "policy" and (layers := spec.moe_layers(hf_config)):
            megatron = spec.transformer(hf_config)
            self._replayed = MoeShape(len(layers), megatron["moe_router_topk"], megatron["num_moe_experts"])
        self._reads = (*READS, "routing") if self._replayed else READS
        self._dtype = config.dtype or ("float32" if context.device == "cpu" else "bfloat16")
        self._deadlines: Deadlines = context.stage.deadlines if context.stage is not None else Deadlines()
        self._ranks: Ranks | None = None
        self._end = 0.0

    async def start(self) -> None:
        """Start the ranks; each loads its part of the model.

        Raises:
            ConfigError: The run has no cluster, or a checkpoint does not hold what the model's architecture says.
            RunError: A rank died or did not get ready; says where its log is.
        """
        if self.context.cluster is None:
            raise ConfigError("trainer 'megatron' runs on the ranks of a cluster, and there is none; set cluster: processes")
        options = self._options()
        self._ranks = await self.context.cluster.start(
            WORKER,
            self.layout.world_size,
            [(options,)] * self.layout.world_size,
            name=f"trainer-{self.context.model}",
            log_dir=self.context.run_dir / "logs",
            seconds=BEFORE * self._deadlines.start,
        )

    async def annotate(self, batch: Batch, columns: frozenset[str]) -> Batch:
        """Add what the model says under the present weights.

        Args:
            batch: Any samples.
            columns: ``old_logprobs``, ``ref_logprobs``, ``teacher_logprobs``: log-probabilities at the temperatures the tokens were
                sampled at, each the same float32 [N], NaN where there is nothing to say: on the last row of a sample, and where the
                token was taken greedily.

        Raises:
            ConfigError: Another column is asked for.
            DataError: A token id is outside the vocabulary, or a sample's routing cannot be replayed.
        """
        if strange := sorted(columns - GIVES):
            raise ConfigError(
                f"a {self.context.role} of trainer 'megatron' cannot give {strange[0]!r}, only {', '.join(sorted(GIVES))}; "
                "take it from another model"
            )
        if not columns:
            return batch
        self._within_deadline()
        loaded = await asyncio.to_thread(self._loaded, batch)
        annotated = await self._logprobs(loaded, own_routing=False)
        return batch.with_columns({name: annotated for name in sorted(columns)})

    async def step(self, batch: Batch) -> StepReport:
        """Train on ``batch.optimizer_steps()`` in order; a step in which no token is trained is passed over.

        Metrics: ``loss`` and ``loss/<term>``, ``entropy`` (mean over trained tokens), ``grad_norm`` (before clipping) and what the
        losses report (means over trained tokens), all averaged over the optimizer steps; ``tokens``, trained in all of them; ``lr`` of
        the last; ``seconds/forward_backward``; and what ``mismatch_of`` says of the first optimizer step's trained tokens, before
        any update. ``gates`` bound the latter. Of a mixture of experts also what ``routing_metrics`` says, and with ``compare_routing``
        the mismatch without replay.

        The schedule counts optimizer steps; it ends at ``context.total_steps`` × the optimizer steps of this call.

        Raises:
            ConfigError: The model has no loss.
            DataError: A token id is outside the vocabulary, or a sample needs what this trainer cannot do.
            StepRefused: Loss or gradient is not finite (names the sample) or a gate is out of bounds in the first optimizer step,
                or no token is trained: nothing has changed.
            RunError: Loss or gradient is not finite in a later one; the weights are those before that optimizer step.
            RanksLost: A rank died, failed or was silent.
        """
        self._check_trained()
        self._within_deadline()
        batch = await asyncio.to_thread(self._loaded, batch)
        total = self.context.total_steps * len(batch.steps)
        reports: list[dict[str, float]] = []
        mismatch: dict[str, float] = {}
        counts: Counter[str] = Counter()
        seconds = 0.0
        for minibatch in batch.optimizer_steps():
            if minibatch.segments.tokens == 0:
                continue
            start = time.perf_counter()
            try:
                report, logprobs = await self._gradients(minibatch, counts)
                if not reports:
                    mismatch = mismatch_of(minibatch, logprobs, self.version)
                    check_gates(mismatch, self.config.gates, self._dtype)
                    if self._replayed and self.config.compare_routing:
                        mismatch |= own_routing(mismatch_of(minibatch, await self._logprobs(minibatch, own_routing=True), self.version))
                report["lr"] = learning_rate(self.config, self.optimizer_steps, total)
                seconds += time.perf_counter() - start
                if not np.isfinite(report["grad_norm"]):
                    origin = await self._origin(minibatch)
                    raise RunError(f"the gradient's norm is {report['grad_norm']}, though the loss is finite{origin}")
            except RanksLost:
                raise
            except RunError as error:
                refusal = RunError if reports else StepRefused
                raise refusal(f"optimizer step {self.optimizer_steps + 1}: {error}. The weights are those before it.") from error
            await self._call("step", [(report["lr"], report["grad_norm"])] * self._size, "an optimizer step")
            self.optimizer_steps += 1
            reports.append(report | {"tokens": minibatch.segments.tokens})
        metrics = step_metrics(reports, seconds)
        routing = routing_metrics(counts["differs"], counts["replayed"], counts["rows"]) if self._replayed else {}
        return StepReport(metrics | mismatch | routing, len(reports))

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name as in the exported checkpoint, tensor in the compute dtype), tied weights once. To be taken from in a thread."""
        for bucket in self._buckets(self._deadlines.publish):
            yield from bucket

    async def save(self, directory: Path) -> None:
        """Write master weights, AdamW's state and counters as safetensors and JSON; each rank its own part, into a directory that all
        of them reach."""
        self._check_trained()
        self._within_deadline()
        directory.mkdir(parents=True, exist_ok=True)
        counters = {"optimizer_steps": self.optimizer_steps, "version": self.version}
        await self._call("save", [(directory.resolve(), counters)] * self._size, f"the checkpoint in {directory}")

    async def load(self, directory: Path) -> None:
        """Go on from what ``save`` wrote, to the bit. CheckpointError where it does not fit (another layout): nothing has changed."""
        self._check_trained()
        self._within_deadline()
        headers = await self._call("load", [(directory.resolve(),)] * self._size, f"the checkpoint in {directory} to be read")
        self.optimizer_steps, self.version = headers[0]["optimizer_steps"], headers[0]["version"]

    async def export(self, directory: Path) -> None:
        """Write a Hugging Face directory: config, weights in the compute dtype, the starting model's tokenizer files."""
        buckets = self._buckets(self._deadlines.train)
        assert self.context.model_path is not None
        await asyncio.to_thread(checkpoint.export, directory, buckets, self.context.model_path, self._dtype)

    async def close(self) -> None:
        """End the ranks; the trainer cannot be used afterwards."""
        if self._ranks is not None:
            await self._ranks.close()

    # ---- ranks

    @property
    def _size(self) -> int:
        return self.layout.world_size

    def _started(self) -> Ranks:
        if self._ranks is None:
            raise RunError(f"the trainer of {self.context.model!r} was asked for something before it was started")
        return self._ranks

    async def _call(self, method: str, arguments: Sequence[tuple], what: str) -> list[Any]:
        return await self._started().call(method, arguments, seconds=max(self._end - time.monotonic(), 0.1), what=what)

    def _within_deadline(self) -> None:
        """From here on the ranks have as long as the loop waits for one call of this trainer, but for a little."""
        self._end = time.monotonic() + BEFORE * self._deadlines.train

    def _buckets(self, seconds: float) -> Iterator[list[tuple[str, Tensor]]]:
        arguments = [(self.config.bucket_bytes,)] * self._size
        for bucket in self._started().stream("weights", arguments, seconds=BEFORE * seconds, what="the next bucket of weights"):
            yield _tensors(bucket)

    def _options(self) -> RankOptions:
        model = self.context.stage.models[self.context.model] if self.context.losses else None
        plugins: list[PluginConfig] = [*model.losses.values(), model.aggregation] if model else []
        return RankOptions(
            config=self.config,
            layout=self.layout,
            dtype=self._dtype,
            context=replace(self.context, tokenizer=None, losses={}, aggregation=None, stage=None, cluster=None),
            losses={name: loss.model_dump() for name, loss in model.losses.items()} if model else {},
            aggregation=model.aggregation.model_dump() if model else {},
            modules=_modules([inner for plugin in plugins for inner in plugin.nested()]),
            replay=self._replayed is not None,
            timeout_s=self._deadlines.train,
        )

    # ---- steps

    def _check_trained(self) -> None:
        if not self.context.losses:
            raise ConfigError(f"model {self.context.model!r} has no loss, so it is not trained; give it one")

    def _loaded(self, batch: Batch) -> Batch:
        """The batch with the columns the model reads, checked."""
        batch = load_checked(batch, READS, UNSUPPORTED, self._vocab_size, "megatron")
        return load_routing(batch, self._replayed) if self._replayed else batch

    def _cut(self, batch: Batch, units: np.ndarray, last: Sequence[str]) -> tuple[Cut, list[tuple]]:
        """A loaded batch in micro-batches, and what each rank is sent of it."""
        cut = Cut.of(batch, self.layout, units, self.config.micro_batch_tokens)
        return cut, list(cut.for_ranks(self._reads, last))

    async def _logprobs(self, batch: Batch, *, own_routing: bool) -> np.ndarray:
        """float32 [N] of a loaded batch: log-probability of each predicted token that was not taken greedily, NaN elsewhere."""
        cut, arguments = await asyncio.to_thread(self._cut, batch, np.arange(len(batch)), ())
        results = await self._call("annotate", [(*a, own_routing) for a in arguments], f"{len(batch)} samples to be annotated")
        return cut.gather(results)

    async def _gradients(self, minibatch: Batch, counts: Counter[str]) -> tuple[dict[str, float], np.ndarray]:
        """Gradients of one optimizer step, left on the ranks; its metrics, and float32 [N], log-probabilities of the trained rows.
        What routing replay counted is added to ``counts``."""
        kept = np.flatnonzero(minibatch.segments.sequence_tokens)
        trained = minibatch.select(kept)
        cut, arguments = await asyncio.to_thread(self._cut, trained, units_of(trained, self.unit), tuple(trained.columns))
        results: list[Gradients] = await self._call("gradients", arguments, f"the gradients of optimizer step {self.optimizer_steps + 1}")
        for kind, sentence in (r.complaint for r in results if r.complaint):
            raise getattr(errors, kind)(sentence)
        for result in results:
            counts.update(result.routing)
        report: dict[str, float] = {}
        for name, part in (item for r in results for item in r.parts.items()):
            report[name] = report.get(name, 0.0) + part
        logprobs = np.full(minibatch.n_rows, np.nan, np.float32)
        logprobs[minibatch.rows_of(kept)] = cut.gather([r.logprobs for r in results])
        return report | {"grad_norm": results[0].norm}, logprobs

    async def _origin(self, minibatch: Batch) -> str:
        """Whose gradient is not finite. Every unit is computed again, alone: only a step that is refused pays for that."""
        trained = minibatch.select(np.flatnonzero(minibatch.segments.sequence_tokens))
        for samples in micro_batches(trained.lengths, units_of(trained, self.unit), 1):
            arguments = Cut.alone(trained, self.layout, samples).for_ranks(self._reads, tuple(trained.columns))
            results: list[Gradients] = await self._call("gradients", arguments, "the gradient of one sample")
            if not np.isfinite(results[0].norm):
                ids = [str(trained.refs[s].id) for s in samples]
                return f"; it comes from {'sample' if len(ids) == 1 else 'one of the samples'} {', '.join(ids)}"
        return ", and so is each sample's own gradient: only their sum is not"


def _tensors(bucket: Bucket) -> list[tuple[str, Tensor]]:
    return [(name, torch.from_numpy(raw).view(getattr(torch, dtype)).view(shape)) for name, dtype, shape, raw in bucket]


def _modules(plugins: Sequence[PluginConfig]) -> list[str]:
    """Modules that ranks must import first, because plug-ins are decorated there: those that a name without a colon may stand for."""
    modules = []
    for plugin in plugins:
        module = getattr(type(plugin), "plain", type(plugin)).__module__
        if ":" in plugin.use:
            continue
        if module == "__main__":
            raise ConfigError(
                f"{plugin.point} {plugin.use!r} is decorated in the script that was started, which the ranks of trainer 'megatron' cannot "
                "import; move it into a module beside it and name it module:attribute"
            )
        modules.append(module)
    return sorted(set(modules))
