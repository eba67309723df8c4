"""Routing replay in megatron-core on two gloo ranks, against transformers with routers of the test's own, one sample at a time."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.ranks import run_ranks
from fixtures.trainers import forced_routing, routed_batch
from fixtures.training import MODELS, write_model

from miles_core.batch import Batch
from miles_train.ranks.layout import Layout

MODEL: dict[str, Any] = MODELS["moe"] | dict(num_experts=8, num_hidden_layers=4, mlp_only_layers=[1])
"""A dense layer among MoE layers: stages of a pipeline have different numbers of them."""
SHAPE = {"layers": 3, "experts": 8, "k": 2}
LAYOUTS = {
    "one rank": Layout(),
    "EP2": Layout(expert=2, data=2),
    "TP2": Layout(tensor=2),
    "CP2": Layout(context=2),
    "PP2": Layout(pipeline=2),
    "TP2 EP2": Layout(tensor=2, expert=2),
    "CP2 EP2": Layout(context=2, expert=2),
}
LOADED = ("tokens", "targets", "positions", "temperatures", "routing")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("moe") / "model", **MODEL)


def batch() -> Batch:
    """12 ragged samples, the eighth without any record; ``advantages`` holds the coefficient of each row's log-probability."""
    rows = routed_batch(**SHAPE)
    rows.refs[7].get().columns["routing"][:] = 255
    rows = rows.load(LOADED)
    random = np.random.default_rng(1).standard_normal(rows.n_rows).astype(np.float32) * ~rows.ends
    return rows.with_columns({"advantages": random})


def micro_batches(rows: Batch) -> list[np.ndarray]:
    """Sample indices of four of different sizes; one is a single sample, of which nothing is recorded."""
    return np.split(np.arange(len(rows)), [5, 7, 8])


@pytest.fixture(scope="module")
def reference(path: Path) -> dict[str, Any]:
    """logprobs [N], gradients by name in the checkpoint, and of how many (row, layer) pairs the routers would have chosen otherwise."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    own: list[np.ndarray] = []
    hooks = [
        module.register_forward_hook(lambda m, inputs, output: own.append(output[0].topk(m.top_k, -1).indices.numpy()))
        for module in model.modules()
        if type(module).__name__ == "Qwen3MoeTopKRouter"
    ]
    assert len(hooks) == 3
    rows, logprobs, differs, replayed = batch(), [], 0, 0
    for ref in rows.refs:
        sample, given = ref.get(), ref.get().columns["routing"]
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))
        own.clear()
        with forced_routing(model, given):
            logits = model(tokens[None], use_cache=False).logits[0, :-1]
        logp = torch.log_softmax(logits / torch.from_numpy(sample.temperatures()[1:, None]), -1)
        logprobs += [logp.gather(1, tokens[1:, None])[:, 0], torch.zeros(1)]
        known = given[:, 0, 0] != 255
        differs += int((np.sort(np.stack(own, 1), -1) != np.sort(given, -1)).any(-1)[known].sum())
        replayed += 3 * int(known.sum())
    logprob = torch.cat(logprobs)
    (torch.from_numpy(rows.array("advantages")) * logprob).sum().backward()
    gradients = revert_weight_conversion(model, {n: p.grad for n, p in model.named_parameters()})
    counts = {"differs": differs, "replayed": replayed, "rows": 3 * rows.n_rows}
    return {"logprobs": logprob.detach().numpy(), "gradients": {n: g.numpy() for n, g in gradients.items()}, "counts": counts}


def on_ranks(rank: int, size: int, path: str, sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    """All micro-batches through megatron's own schedule, with and without recomputation: results, and what each router took."""
    from miles_train.megatron.model import initialize

    layout = Layout(**sizes)
    initialize(layout, timeout_s=60)
    return {recompute: once(rank, path, layout, recompute) for recompute in (False, True)}


def once(rank: int, path: str, layout: Layout, recompute: bool) -> dict[str, Any]:
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.moe.router import TopKRouter

    from miles_train.megatron import inputs, specs, weights
    from miles_train.megatron.model import build
    from miles_train.megatron.replay import MegatronReplay

    here = layout.coordinates(rank)
    model = build(Path(path), specs.model_spec(specs.read_config(Path(path))), layout, torch.float32, replay=True, recompute=recompute)
    replay = MegatronReplay(model)
    assert asdict(replay.shape) == SHAPE
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    model.config.finalize_model_grads_func = lambda models, tokens, **kwargs: finalize_model_grads(models)
    rows = batch()
    mine = micro_batches(rows)[here.data :: layout.data]
    results: list[tuple[np.ndarray, np.ndarray]] = []
    taken: list[tuple[int, np.ndarray]] = []
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(lambda m, i, output: taken.append((m.layer_number - 1, output[1].numpy().copy())))

    def step(iterator: Any, module: Any) -> Any:
        samples = next(iterator)
        micro = inputs.micro_inputs(rows.select(samples), layout, here.context)
        with replay.micro_batch(micro.batch, micro.tokens.shape[1]):
            hidden = inputs.forward(module, micro)

        def loss(hidden: Any) -> Any:
            part = micro.batch
            logprobs = inputs.outputs(model, hidden, micro, np.flatnonzero(~part.ends))["logprobs"]
            results.append((held(rows, samples, layout, here), logprobs.detach().numpy()))
            return (torch.from_numpy(part.array("advantages")) * logprobs).sum(), torch.tensor(0, dtype=torch.int), {}

        return hidden, loss

    def run(*, forward_only: bool) -> None:
        get_forward_backward_func()(
            forward_step_func=step, data_iterator=iter(mine), model=[wrapped], num_microbatches=len(mine), seq_length=1,
            micro_batch_size=1, forward_only=forward_only,
        )  # fmt: skip

    wrapped.zero_grad_buffer()
    with torch.no_grad():
        run(forward_only=True)
    annotated, evaluated = list(results), replay.finish()
    results.clear()
    taken.clear()
    run(forward_only=False)
    counts = replay.finish()
    gradients = {n: g.numpy() for bucket in weights.export(model, 4096, of=lambda p: p.main_grad) for n, g in bucket}  # ty: ignore[missing-attribute]
    # What every local router must have taken in each of its calls: [rows of this rank, K] by layer and micro-batch.
    expected = {layer: [given(rows, samples, layout, here)[:, i] for samples in mine] for i, layer in enumerate((0, 2, 3))}
    return {
        "annotated": annotated,
        "results": results,
        "counts": counts,
        "evaluated": evaluated,
        "gradients": gradients,
        "taken": [(layer, chosen) for layer, chosen in taken],
        "expected": expected,
    }


def held(rows: Batch, samples: np.ndarray, layout: Layout, here: Any) -> np.ndarray:
    """Which rows of the batch a rank's results are of."""
    index = rows.rows_of(samples)
    return index if layout.context == 1 else index[rows.select(samples).context_rows(here.context, layout.context)]


def given(rows: Batch, samples: np.ndarray, layout: Layout, here: Any) -> np.ndarray:
    """uint8 [rows that a rank's routers see, L, K], 255 in padding."""
    own = rows.array("routing")[held(rows, samples, layout, here)]
    most = max(len(held(rows, samples, layout, other)) for other in (layout.coordinates(r) for r in range(layout.world_size)))
    padding = np.full((-(-most // layout.tensor) * layout.tensor - len(own), *own.shape[1:]), 255, np.uint8)
    return np.split(np.concatenate([own, padding]), layout.tensor)[here.tensor]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equal_to_transformers(runs: dict[str, list[dict[str, Any]]], reference: dict[str, Any], name: str, recompute: bool):
    """Log-probabilities, every gradient (the gates' too), the counts, and each router's experts in forward and recomputation."""
    ranks = [rank[recompute] for rank in runs[name]]
    for column in ("annotated", "results"):
        seen = np.zeros(len(reference["logprobs"]), int)
        for index, values in (result for rank in ranks for result in rank[column]):
            seen[index] += 1
            np.testing.assert_allclose(values, reference["logprobs"][index], atol=1e-5, rtol=0)
        assert (seen > 0).all()
    differences = {n: np.linalg.norm(ranks[0]["gradients"][n] - g) / np.linalg.norm(g) for n, g in reference["gradients"].items()}
    assert {n: d for n, d in differences.items() if not d <= 1e-5} == {}
    assert sum("mlp.gate.weight" in n for n in differences) == 3

    for counted in ("counts", "evaluated"):
        assert {n: sum(rank[counted][n] for rank in ranks) for n in reference["counts"]} == reference["counts"]

    for rank in ranks:
        assert rank["taken"]
        for layer in {layer for layer, _ in rank["taken"]}:
            calls = [chosen for at, chosen in rank["taken"] if at == layer]
            assert len(calls) == (2 if recompute else 1) * len(rank["expected"][layer])
        check_order(rank["taken"], rank["expected"], twice=recompute)


def check_order(taken: list[tuple[int, np.ndarray]], expected: dict[int, list[np.ndarray]], *, twice: bool) -> None:
    """Every micro-batch's experts were taken by every layer: once, and as often again in the same order where it is computed again.

    Forward passes and recomputations of a layer come in some order that the schedule chooses; each of both goes through the
    micro-batches in theirs.
    """
    for layer in {layer for layer, _ in taken}:
        want = [rows for rows in expected[layer]]
        queues = [list(want), list(want)] if twice else [list(want)]
        for chosen in (chosen for at, chosen in taken if at == layer):
            fitting = [queue for queue in queues if queue and fits(chosen, queue[0])]
            assert fitting, f"layer {layer}: a call took experts of no micro-batch whose turn it is"
            max(fitting, key=len).pop(0)
        assert not any(queues)


def fits(chosen: np.ndarray, given: np.ndarray) -> bool:
    """Whether bool [rows, E] takes exactly the experts of uint8 [rows, K] in the rows that have some, and K everywhere."""
    if len(chosen) != len(given) or (chosen.sum(1) != given.shape[1]).any():
        return False
    known = given[:, 0] != 255
    return bool(np.take_along_axis(chosen[known], given[known].astype(np.int64), 1).all())


@pytest.fixture(scope="module")
def runs(path: Path) -> dict[str, list[dict[str, Any]]]:
    """What the ranks of each layout returned, when it is asked for."""

    class Runs(dict[str, list[dict[str, Any]]]):
        def __missing__(self, name: str) -> list[dict[str, Any]]:
            self[name] = run_ranks(on_ranks, LAYOUTS[name].world_size, str(path), asdict(LAYOUTS[name]))
            return self[name]

    return Runs()


# What goes wrong


def faults(rank: int, size: int, path: str) -> dict[str, str]:
    """What is said of each fault, on one rank."""
    import torch
    from megatron.core.transformer.moe.router import TopKRouter

    from miles_core.errors import MilesError
    from miles_train.megatron import inputs, specs
    from miles_train.megatron.model import build, initialize
    from miles_train.megatron.replay import MegatronReplay

    layout = Layout()
    initialize(layout, timeout_s=60)
    spec = specs.model_spec(specs.read_config(Path(path)))
    rows = batch()
    micro = inputs.micro_inputs(rows, layout, 0)
    told = {}

    def attempt(name: str, change: Any) -> None:
        model = build(Path(path), spec, layout, torch.float32, replay=True, recompute=True)
        try:
            change(model)
            told[name] = "nothing"
        except MilesError as error:
            told[name] = f"{type(error).__name__}: {error}"

    def forward(model: Any, replay: Any, n_rows: int | None = None) -> Any:
        with replay.micro_batch(micro.batch, n_rows or micro.tokens.shape[1]):
            return inputs.forward(model, micro)

    def unhooked(model: Any) -> None:
        replay = MegatronReplay(model)
        next(m for m in model.modules() if isinstance(m, TopKRouter)).router_replay = None
        forward(model, replay)

    def other_rows(model: Any) -> None:
        forward(model, MegatronReplay(model), micro.tokens.shape[1] + 4)

    def not_all_recomputed(model: Any) -> None:
        replay = MegatronReplay(model)
        forward(model, replay).sum().backward()
        forward(model, replay)
        replay.finish()

    def outside(model: Any) -> None:
        replay = MegatronReplay(model)
        forward(model, replay).sum().backward()
        inputs.forward(model, micro)

    def fused(model: Any) -> None:
        model.config.moe_router_fusion = True
        MegatronReplay(model)

    def fine(model: Any) -> None:
        """And the routers choose for themselves again afterwards, and in a micro-batch that says so."""
        alone = inputs.forward(model, micro)
        replay = MegatronReplay(model)
        forward(model, replay).sum().backward()
        assert replay.finish()["replayed"] > 0
        assert torch.equal(inputs.forward(model, micro), alone)
        with replay.micro_batch(None, micro.tokens.shape[1]):
            assert torch.equal(inputs.forward(model, micro), alone)
        assert replay.finish() == {"differs": 0.0, "replayed": 0.0, "rows": 0.0}

    for fault in (unhooked, other_rows, not_all_recomputed, outside, fused, fine):
        attempt(fault.__name__, fault)
    return told


def test_routing_that_is_not_consumed_is_an_error(path: Path):
    told = run_ranks(faults, 1, str(path))[0]
    assert told["unhooked"].startswith("RunError: the router of MoE layer 0 chose 0 times in one forward pass")
    assert told["other_rows"].startswith("RunError: the router of MoE layer 0 makes choices of shape")
    assert told["not_all_recomputed"].startswith("RunError: a router was computed again for 1 of 2 micro-batches")
    assert told["outside"].startswith("RunError: the router of MoE layer 0 ran outside of a micro-batch's forward pass")
    assert told["fused"].startswith("ConfigError: megatron's moe_router_fusion does not go with routing replay")
    assert told["fine"] == "nothing"
