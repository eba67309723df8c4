"""megatron-core's GPTModel as a policy: rows of packed samples in, hidden states out, never logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from miles_core.errors import ConfigError

from ..ranks.layout import Coordinates, Layout
from . import bridge, fitting, layers
from .specs import ModelSpec, read_config

bridge.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.moe.experts import SequentialMLP  # noqa: E402
from megatron.core.transformer.moe.router_replay import RouterReplay  # noqa: E402

ACTIVATIONS = {"silu": F.silu}
"""What a spec may name as ``activation_func``."""


def initialize(layout: Layout, *, seed: int = 0, timeout_s: float = 600.0) -> None:
    """Make megatron's process groups (``parallel_state``) and seed its random states. Collective; torch.distributed is initialised.

    Args:
        layout: Of as many ranks as there are processes.
        seed: Of dropout and initialisation, neither of which is used by Miles.
        timeout_s: Deadline of each collective in these groups, rounded up to minutes.

    Raises:
        ConfigError: The layout is not of as many ranks as there are.
    """
    if layout.world_size != dist.get_world_size():
        raise ConfigError(f"{layout} is of {layout.world_size} ranks, but there are {dist.get_world_size()}")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
        create_gloo_process_groups=torch.cuda.is_available(),  # else the groups are gloo anyway
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def destroy() -> None:
    """Take back what ``initialize`` and ``build`` did to the process, so that another layout can be initialised in it."""
    parallel_state.destroy_model_parallel()
    RouterReplay.clear_global_router_replay_instances()


class PolicyModel(GPTModel):
    """One pipeline stage of a model on this rank.

    Attributes:
        spec: Its table.
        hf_config: The config.json it was built from.
        layout: How it is cut.
        coordinates: Where this rank stands in it.
        real_vocab_size: Token ids are below it. megatron's ``vocab_size`` is padded to a multiple of the tensor-parallel size.
        first_layer: Index in the whole model of the first layer here.
    """

    def __init__(self, spec: ModelSpec, hf_config: Mapping[str, Any], layout: Layout, config: TransformerConfig) -> None:
        arguments = spec.model(hf_config)
        coordinates = layout.coordinates(dist.get_rank())
        count = config.num_layers // layout.pipeline
        first = count * coordinates.pipeline
        super().__init__(
            config,
            layers.block_spec(config, first, count),  # ty: ignore[invalid-argument-type], a block's spec is taken too
            pre_process=coordinates.pipeline == 0,
            post_process=coordinates.pipeline == layout.pipeline - 1,
            position_embedding_type="rope",
            **arguments | {"vocab_size": -(-arguments["vocab_size"] // layout.tensor) * layout.tensor},
        )
        self.spec, self.hf_config, self.layout = spec, hf_config, layout
        self.coordinates: Coordinates = coordinates
        self.real_vocab_size: int = arguments["vocab_size"]
        self.first_layer = first
        for module in self.modules():
            if isinstance(module, SequentialMLP):
                # One rank for all experts is no expert parallelism to megatron: it would then add up their gradients over the ranks
                # of data × context only, though tensor-parallel ranks put different rows through them.
                for parameter in module.parameters():
                    parameter.allreduce = False  # ty: ignore[missing-attribute]

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple:  # ty: ignore[incompatible-method-override]
        """Embeddings on the first stage, and the rotary angles of the positions that were given, on every one."""
        embedded = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        angles = torch.outer(position_ids[0].float(), self.rotary_pos_emb.inv_freq.to(position_ids.device))
        return embedded, torch.cat((angles, angles), -1)[:, None, None, :], None, None, None, None

    def _postprocess(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # ty: ignore[incompatible-method-override]
        """Hidden states: as the next stage takes them, or [R, H] whole on the last."""
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # Each rank puts in the whole gradient (linear_logprob adds it up), so that going back a rank only takes its rows of it.
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        return hidden_states.squeeze(1)

    def head(self) -> tuple[Tensor, int]:
        """The rows [V_local, H] of the output projection that this rank holds, without padding, and the token id of the first.

        A differentiable view of the parameter. Only on the last pipeline stage.
        """
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        assert isinstance(weight, Tensor), "only the last pipeline stage has an output projection"
        start = self.coordinates.tensor * len(weight)
        return weight[: self.real_vocab_size - start], start


def build(path: Path, spec: ModelSpec, layout: Layout, dtype: torch.dtype, *, replay: bool = False, recompute: bool = False) -> PolicyModel:
    """This rank's part of the model in a Hugging Face directory, weights loaded, in training mode without dropout. Collective.

    Parameters are of ``dtype`` and need gradients; wrap the result in megatron's DistributedDataParallel to train it.
    ``model.config`` is the TransformerConfig (variable_seq_lengths, calculate_per_token_loss … set as Miles needs them).

    Args:
        path: Hugging Face directory.
        spec: ``model_spec(read_config(path))``.
        layout: The one that was initialised.
        dtype: Of parameters and compute; router and log-probabilities compute in float32.
        replay: Routers record and replay their choices (``replay.RouterReplay``).
        recompute: Whether the backward pass computes each layer again.

    Raises:
        ConfigError: The model does not divide by the layout, or the checkpoint does not hold what the table says.
    """
    from .weights import load  # knows PolicyModel

    hf_config = read_config(path)
    if problems := fitting.problems(layout, hf_config):
        raise ConfigError(f"{path} does not fit {layout}: " + "; ".join(problems))
    model = PolicyModel(spec, hf_config, layout, transformer_config(spec, hf_config, layout, dtype, replay=replay, recompute=recompute))
    load(model, path)
    return model


def transformer_config(
    spec: ModelSpec, hf_config: Mapping[str, Any], layout: Layout, dtype: torch.dtype, *, replay: bool, recompute: bool
) -> TransformerConfig:
    """megatron's own config: the model's part by the table, the rest as Miles computes."""
    fields = spec.transformer(hf_config)
    moe: dict[str, Any] = {
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_enable_routing_replay": replay,
    }
    recomputed = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1} if recompute else {}
    varying: dict[str, Any] = fields | {"activation_func": ACTIVATIONS[fields["activation_func"]]} | recomputed
    if fields.get("num_moe_experts"):
        varying |= moe
    return TransformerConfig(
        **varying,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=layout.sequence_parallel,
        variable_seq_lengths=layout.pipeline > 1,  # micro-batches differ in rows
        moe_token_dispatcher_type="alltoall",  # of dense models too: the other one is refused with variable lengths
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,  # gradients are sums: Miles divides by the step's denominators in the loss
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],
    )


def _leave(weight: Tensor) -> Tensor:
    """Initialise nothing: every parameter is loaded. megatron marks its parameters only where it initialises them."""
    return weight
