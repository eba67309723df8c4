"""Routing replay in `trainer: torch` against plain transformers with routers of the test's own, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.trainers import forced_routing, routed_batch
from fixtures.training import COMMON, MODELS, build_trainer, gradient, norms_in_full_precision, ragged_batch, same, weights, write_model

from miles_core.batch import Batch
from miles_core.errors import ConfigError, DataError, RunError, StepRefused
from miles_core.protocols import LossInputs, LossOutputs

MOE = {"layers": 2, "experts": 4, "k": 2}
LAYOUTS = [("padded", 1), ("padded", 60), ("padded", 10_000), ("packed", 50), ("packed", 10_000)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("moe") / "model", **MODELS["moe"])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("dense") / "model", **MODELS["dense"])


def nll(inputs: LossInputs) -> LossOutputs:
    return LossOutputs(-inputs.logprobs)


class Plain:
    """A transformers model: log-probabilities [N] of one sample after another, with or without the recorded experts."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()

    def logprobs(self, batch: Batch, *, routed: bool = True) -> Any:
        """NaN on last rows."""
        import torch

        found = []
        for sample in (ref.get() for ref in batch.refs):
            tokens = torch.from_numpy(sample.tokens.astype(np.int64))
            with forced_routing(self.model, sample.columns["routing"] if routed else None):
                logits = self.model(tokens[None], use_cache=False).logits[0, :-1]
            logp = torch.log_softmax(logits / torch.from_numpy(sample.temperatures()[1:, None]), -1)
            found += [logp.gather(1, tokens[1:, None])[:, 0], torch.full((1,), torch.nan)]
        return torch.cat(found)

    def gradient(self, batch: Batch) -> Any:
        """Of the mean of −logprob over trained tokens, parameters in the order of their names."""
        import torch

        self.model.zero_grad()
        (-self.logprobs(batch)[torch.from_numpy(batch.array("loss_mask"))].mean()).backward()
        return torch.cat([p.grad.flatten() for _, p in sorted(self.model.named_parameters())])


@pytest.mark.parametrize("layout, micro_batch_tokens", LAYOUTS)
async def test_log_probabilities_with_the_recorded_experts(path: Path, layout: str, micro_batch_tokens: int):
    batch, plain = routed_batch(**MOE), Plain(path)
    trainer = build_trainer(path, routing_replay=True, layout=layout, micro_batch_tokens=micro_batch_tokens)
    ours = (await trainer.annotate(batch, frozenset({"old_logprobs"}))).array("old_logprobs")
    np.testing.assert_allclose(ours, plain.logprobs(batch).detach().numpy(), atol=1e-5, rtol=0, equal_nan=True)
    alone = plain.logprobs(batch, routed=False).detach().numpy()
    assert np.nanmax(np.abs(ours - alone)) > 0.1  # the experts do matter


@pytest.mark.parametrize("layout, micro_batch_tokens", LAYOUTS)
async def test_gradients_with_the_recorded_experts(path: Path, tmp_path: Path, layout: str, micro_batch_tokens: int):
    batch, plain = routed_batch(**MOE), Plain(path)
    options: dict[str, Any] = dict(layout=layout, micro_batch_tokens=micro_batch_tokens, losses={"nll": nll}, routing_replay=True)
    ours, theirs = await gradient(path, tmp_path, batch, "float32", **options), plain.gradient(batch)
    assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


async def test_metrics_and_what_the_routers_would_have_done(path: Path):
    """Over two optimizer steps; the mismatch without replay is what a trainer that does not replay reports."""
    batch, plain = routed_batch(**MOE, steps=2), Plain(path)
    options: dict[str, Any] = dict(lr=1e-12, micro_batch_tokens=60)
    trainer = build_trainer(path, routing_replay=True, compare_routing=True, **options)
    alone = build_trainer(path, routing_replay=False, **options)
    trainer.version = alone.version = 3
    metrics, without = [(await t.step(batch)).metrics for t in (trainer, alone)]

    differs, replayed, rows = 0, 0, 0
    for sample in (ref.get() for ref in batch.refs if ref.get().loss_mask.any()):
        given = sample.columns["routing"]
        known = given[:, 0, 0] != 255
        own = own_choice(plain, sample)
        differs += int((np.sort(own, -1) != np.sort(given, -1)).any(-1)[known].sum())
        rows, replayed = rows + len(given), replayed + int(known.sum())
    assert metrics["routing/differs"] == pytest.approx(differs / (2 * replayed), abs=1e-12)
    assert metrics["routing/replayed"] == pytest.approx(replayed / rows, abs=1e-12)
    assert 0 < differs < 2 * replayed and replayed < rows

    for name in ("mean_abs", "max_abs", "k3", "ess"):
        assert metrics[f"mismatch_own_routing/{name}"] == pytest.approx(without[f"mismatch/{name}"], rel=1e-5)
        assert metrics[f"mismatch_own_routing/{name}"] != metrics[f"mismatch/{name}"]
    assert not any(name.startswith(("routing/", "mismatch_own")) for name in without)


def own_choice(plain: Plain, sample: Any) -> np.ndarray:
    """[T, L, K] that the routers would have taken, each layer fed by layers that were made to take the recorded ones."""
    import torch

    found: list[np.ndarray] = []

    def look(router: Any, inputs: Any, output: Any) -> None:
        found.append(output[0].topk(router.top_k, -1).indices.numpy())

    hooks = [m.register_forward_hook(look) for m in plain.model.modules() if type(m).__name__ == "Qwen3MoeTopKRouter"]
    with torch.no_grad(), forced_routing(plain.model, sample.columns["routing"]):
        plain.model(torch.from_numpy(sample.tokens.astype(np.int64))[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return np.stack(found, 1)


async def test_replaying_the_own_choice_changes_nothing(path: Path):
    """Down to the bit, and nothing is counted as different."""
    batch, plain = routed_batch(**MOE), Plain(path)
    for sample in (ref.get() for ref in batch.refs):
        sample.columns["routing"][:] = 255
        sample.columns["routing"][:-1] = own_choice(plain, sample)[:-1]
    options: dict[str, Any] = dict(micro_batch_tokens=60)
    replaying, alone = build_trainer(path, routing_replay=True, **options), build_trainer(path, **options)
    columns = [(await t.annotate(batch, frozenset({"old_logprobs"}))).array("old_logprobs") for t in (replaying, alone)]
    np.testing.assert_array_equal(*columns)
    assert (await replaying.step(batch)).metrics["routing/differs"] == 0


async def test_refused_before_anything_is_lost(path: Path):
    trainer = build_trainer(path, routing_replay=True)
    before = weights(trainer)
    for batch, sentence in [
        (ragged_batch(), "has no routing recorded"),
        (routed_batch(layers=3, experts=4, k=2), "3 MoE layers .* the model has 2"),
        (routed_batch(layers=2, experts=9, k=2), "does not exist; the model has 4"),
    ]:
        with pytest.raises(DataError, match=sentence):
            await trainer.step(batch)
        with pytest.raises(DataError, match=sentence):
            await trainer.annotate(batch, frozenset({"old_logprobs"}))
    assert same(weights(trainer), before)


async def test_nothing_to_replay(path: Path, dense: Path):
    """A dense model, a reference, a batch that nobody sampled: as without the option."""
    unsampled = ragged_batch()
    unsampled = unsampled.with_columns({"versions": np.full(unsampled.n_rows, -1, np.int32)})
    for model, role, batch in [(dense, "policy", ragged_batch()), (path, "reference", routed_batch(**MOE)), (path, "policy", unsampled)]:
        columns = []
        for replay in (True, False):
            trainer = build_trainer(model, role=role, losses={} if role == "reference" else None, routing_replay=replay)
            columns.append((await trainer.annotate(batch, frozenset({"old_logprobs"}))).array("old_logprobs"))
        np.testing.assert_array_equal(*columns)


def run_twice(layer: Any, own: Callable) -> Callable:
    return lambda x: (layer.gate(x.flatten(0, 1)), own(x))[1]


def not_at_all(layer: Any, own: Callable) -> Callable:
    return lambda x: x


@pytest.mark.parametrize("fault, times", [(run_twice, 2), (not_at_all, 0)])
async def test_rows_that_are_not_consumed_once_are_an_error(path: Path, fault: Callable, times: int):
    trainer = build_trainer(path, routing_replay=True)
    before = weights(trainer)
    layer = trainer.model.hf.model.layers[1].mlp
    layer.forward = fault(layer, layer.forward)
    with pytest.raises(StepRefused, match=f"MoE layer 1 of Qwen3MoeForCausalLM chose {times} times"):
        await trainer.step(routed_batch(**MOE))
    assert same(weights(trainer), before)


def test_a_router_that_goes_its_own_way_is_an_error(path: Path):
    """At the start it does what it is told; later it names other experts than topk gave it. One that does so from the start is refused."""
    import torch

    from miles_train.torch_trainer.causal_lm import CausalLM
    from miles_train.torch_trainer.routing_replay import RoutingReplay

    model = CausalLM(path, torch.float32, torch.device("cpu"), "padded")
    router, shift = model.hf.model.layers[1].mlp.gate, [0]
    own = router.forward

    def shifted(hidden: Any) -> Any:
        logits, weights, chosen = own(hidden)
        return logits, weights, (chosen + shift[0]) % 4

    router.forward = shifted
    model.replay = RoutingReplay(model.hf)
    batch = routed_batch(**MOE).load(("tokens", "targets", "positions", "temperatures", "routing"))
    (micro,) = model.micro_batches(batch, np.arange(len(batch)), 10_000)
    model.hidden(micro, np.arange(3))
    shift[0] = 1
    with pytest.raises(RunError, match="rows of Qwen3MoeForCausalLM went to other experts than the recorded ones"):
        model.hidden(micro, np.arange(3))
    router.forward = shifted
    with pytest.raises(ConfigError, match="changes what topk gave it"):
        RoutingReplay(model.hf)


def test_recomputation_takes_the_same_experts(path: Path):
    """Layers whose activations are computed again in the backward pass: the gradient is the same to the bit."""
    import torch

    from miles_train.torch_trainer.causal_lm import CausalLM
    from miles_train.torch_trainer.layouts import MicroBatch
    from miles_train.torch_trainer.routing_replay import RoutingReplay

    batch = routed_batch(**MOE).load(("tokens", "targets", "positions", "temperatures", "routing"))
    gradients, counted = [], []
    for recompute in (False, True):
        model = CausalLM(path, torch.float32, torch.device("cpu"), "padded")
        model.replay = RoutingReplay(model.hf)
        calls: list[int] = []
        model.hf.model.layers[0].mlp.gate.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if recompute:
            model.hf.gradient_checkpointing_enable()
            model.hf.train()  # transformers computes again only in training mode; there is no dropout
        for samples in ([0, 3, 4], [1, 2]):
            micro = MicroBatch.of(batch, np.array(samples), "padded")
            model.outputs(micro, np.flatnonzero(micro.batch.array("loss_mask")))["logprobs"].sum().backward()
        assert len(calls) == (4 if recompute else 2)
        gradients.append({n: p.grad for n, p in model.hf.named_parameters()})
        counted.append(model.replay.finish())
    assert same(*gradients)
    assert counted[0] == counted[1] and 0 < counted[0]["differs"] < counted[0]["rows"]


# Other architectures


SMALL: dict[str, Any] = {k: v for k, v in COMMON.items() if k not in ("head_dim", "initializer_range")} | dict(
    moe_intermediate_size=16, num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
DEEPSEEK: dict[str, Any] = dict(
    n_routed_experts=8, n_group=4, topk_group=2, first_k_dense_replace=1,
    q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
)  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=4),  # normalises the weights in place
    "gpt_oss": dict(num_local_experts=4, head_dim=8),  # softmax after the choice
    "deepseek_v3": DEEPSEEK,  # a choice of groups first, a bias for the choice only, a dense layer
    "minimax_m2": dict(num_local_experts=4, head_dim=8),  # routers take the bias as an argument
    "ernie4_5_moe": dict(moe_num_experts=4, moe_k=2, moe_layer_start_index=1),
}


def build(model_type: str, fields: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL | fields)).eval()
    for name, parameter in model.named_parameters():
        if "gate" in name or "router" in name:
            torch.nn.init.normal_(parameter, std=0.5)  # so that experts are told apart
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_routers_of_every_kind_take_what_they_are_given(name: str):
    import torch

    from miles_core.moe import chosen_experts, find_routers
    from miles_train.torch_trainer.routing_replay import RoutingReplay

    model = build(name, ARCHITECTURES[name])
    batch = ragged_batch().select([0, 1]).load(("tokens", "positions"))
    taken: list[Any] = []
    for router in find_routers(model):
        router.register_forward_hook(lambda module, inputs, output: taken.append((chosen_experts(module, output).clone(), output)))

    def run(batch: Batch) -> Any:
        taken.clear()
        tokens = torch.from_numpy(batch.array("tokens")[None].astype(np.int64))
        with torch.no_grad(), replay.forward(batch, np.arange(batch.n_rows), batch.n_rows):
            return model.base_model(tokens, use_cache=False).last_hidden_state

    replay = RoutingReplay(model)
    layers, k, experts = replay.shape.layers, replay.shape.k, replay.shape.experts
    assert (layers, k, experts) == (len(find_routers(model)), 2, ARCHITECTURES[name].get("n_routed_experts", 4))
    nothing = np.full((batch.n_rows, layers, k), 255, np.uint8)
    alone = run(batch.with_columns({"routing": nothing}))
    own = np.stack([chosen.numpy() for chosen, _ in taken], 1).astype(np.uint8)
    assert torch.equal(run(batch.with_columns({"routing": own})), alone)

    rng = np.random.default_rng(0)
    given = np.argsort(rng.random((batch.n_rows, layers, experts)), -1)[..., :k].astype(np.uint8)
    given[::3] = 255
    different = run(batch.with_columns({"routing": given}))
    for layer, (chosen, output) in enumerate(taken):
        assert (chosen.numpy() == given[:, layer])[given[:, layer] != 255].all()
        assert all((part != 0).all() for part in output if part.is_floating_point() and part.shape == chosen.shape)
    assert not torch.allclose(different[1:], alone[1:]) if len(different) > 1 else not torch.allclose(different, alone)


@pytest.mark.parametrize(
    "name, fields, sentence",
    [
        ("deepseek_v2", DEEPSEEK | dict(topk_method="group_limited_greedy"), "gives no weight to experts outside the groups"),
        ("phimoe", dict(num_local_experts=4), "chooses by 0 calls of torch.topk"),
        ("jamba", dict(num_experts=4), "neither be recorded nor replayed|routing cannot be replayed"),
    ],
)
def test_models_whose_routing_cannot_be_replayed_are_refused(name: str, fields: dict[str, Any], sentence: str):
    from miles_train.torch_trainer.routing_replay import RoutingReplay

    with pytest.raises(ConfigError, match=sentence):
        RoutingReplay(build(name, fields))


def test_gate_gradients_by_finite_differences():
    """GPT-OSS computes its routing in the model's dtype, here float64; central differences of every gate weight of both layers."""
    import torch

    from miles_core.moe import find_routers
    from miles_train.torch_trainer.routing_replay import RoutingReplay

    model = build("gpt_oss", ARCHITECTURES["gpt_oss"]).double()
    model.set_experts_implementation("eager")
    replay = RoutingReplay(model)
    batch = ragged_batch().select([0]).load(("tokens",))
    n = batch.n_rows
    given = np.argsort(np.random.default_rng(1).random((n, 2, 4)), -1)[..., :2].astype(np.uint8)
    given[-2:] = 255
    batch = batch.with_columns({"routing": given})
    tokens = torch.from_numpy(batch.array("tokens")[None].astype(np.int64))
    weight = torch.randn(n, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss() -> Any:
        with replay.forward(batch, np.arange(n), n):
            return (model.base_model(tokens, use_cache=False).last_hidden_state[0] * weight).sum()

    with norms_in_full_precision(model):
        loss().backward()
        for router in find_routers(model):
            analytic, step = router.weight.grad, 1e-6
            numeric = torch.zeros_like(analytic)
            with torch.no_grad():
                for i in range(router.weight.numel()):
                    flat = router.weight.view(-1)
                    before = float(flat[i])
                    values = []
                    for sign in (1, -1):
                        flat[i] = before + sign * step
                        values.append(float(loss()))
                    flat[i] = before
                    numeric.view(-1)[i] = (values[0] - values[1]) / (2 * step)
            assert float(analytic.norm()) > 1e-3
            assert float((numeric - analytic).norm()) <= 1e-6 * float(analytic.norm())
