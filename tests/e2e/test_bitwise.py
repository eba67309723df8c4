"""``numerics: bitwise``: engine and trainer give every sampled token the same log-probability, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from miles_core.sample_io import load_samples

BITWISE = """
extends: quickstart
name: bitwise
numerics: bitwise
trackers: {}
models: {policy: {config: %s, trainer: {skip_zero_advantages: false, micro_batch_tokens: 14}}}
stages:
  sft: {steps: 4, groups: 8, models: {policy: {trainer: {warmup_steps: 0}}}}
  rl:
    steps: 4
    groups: 3
    rollout: {group_size: 5, sampling: {temperature: 0.8, max_tokens: 24}}
    evaluators: {held_out: null}
"""
MODELS = {
    "qwen3": "{hidden_size: 40, intermediate_size: 100, head_dim: 10}",
    "llama": "{model_type: llama, hidden_size: 48, intermediate_size: 120, head_dim: 12}",
    "qwen3_moe": "{model_type: qwen3_moe, hidden_size: 48, num_experts: 6, num_experts_per_tok: 2, moe_intermediate_size: 36, "
    "decoder_sparse_step: 1}",
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_token_has_the_same_bits_in_engine_and_trainer(kind: str, miles, tmp_path: Path):
    (tmp_path / "bitwise.yaml").write_text(BITWISE % MODELS[kind])
    said = miles("run", "bitwise.yaml", "runs_dir=runs")
    assert said.code == 0, said.sentence
    rows = [json.loads(line) for line in (tmp_path / "runs" / "bitwise" / "metrics.jsonl").read_text().splitlines()]
    assert [row["mismatch/max_abs"] for row in rows if row["stage"] == "rl"] == [0.0] * 4
    compared = 0
    for file in sorted((tmp_path / "runs" / "bitwise" / "trajectories").glob("step-*.safetensors")):
        for sample in load_samples(file):
            if "old_logprobs" not in sample.columns:
                continue  # of the SFT stage
            trained = sample.loss_mask
            np.testing.assert_array_equal(sample.columns["old_logprobs"][trained], sample.logprobs[trained], str(sample.id))
            compared += int(trained.sum())
    assert compared > 100


@pytest.mark.parametrize(
    "override, said",
    [
        ("device=cuda", "numerics: bitwise is for a CPU so far; set device: cpu"),
        ("models.policy.trainer.dtype=bfloat16", "trainer 'torch' computes in bfloat16; numerics: bitwise needs dtype: float32"),
        ("stages.rl.models.policy.engine.dtype=bfloat16", "engine 'local' computes in bfloat16; numerics: bitwise needs dtype: float32"),
        ("models.policy.trainer.layout=packed", "has layout: packed, in which sums are cut otherwise than in the engine"),
        ("stages.rl.models.policy.engine=sglang", "engine 'sglang' cannot do numerics: bitwise; engine local and trainer torch can"),
    ],
)
def test_what_cannot_be_bitwise_is_refused(override: str, said: str, miles):
    answer = miles("check", "mini.yaml", "numerics=bitwise", override)
    assert answer.code != 0
    assert said in answer.sentence


def test_a_machine_on_which_numbers_depend_on_their_company_is_refused(miles, monkeypatch: pytest.MonkeyPatch):
    """With heads of 10 that are not widened this machine is one."""
    monkeypatch.setattr("miles_kernels.invariant.attention.WIDTH", 1)
    (Path.cwd() / "bitwise.yaml").write_text(BITWISE % MODELS["qwen3"])
    answer = miles("run", "bitwise.yaml", "runs_dir=runs")
    assert answer.code != 0
    assert "numerics: bitwise cannot be had with this Qwen3ForCausalLM on this machine" in answer.sentence


@pytest.mark.parametrize("skip", ["true", "false"])
def test_skipped_samples_are_compared_too(skip: str, miles, tmp_path: Path):
    """As it comes: whatever is skipped, every fresh token that could be trained is looked at."""
    (tmp_path / "bitwise.yaml").write_text(BITWISE % MODELS["qwen3_moe"])
    said = miles("run", "bitwise.yaml", "runs_dir=runs", f"models.policy.trainer.skip_zero_advantages={skip}", "stages.rl.steps=2")
    assert said.code == 0, said.sentence
    rows = [json.loads(line) for line in (tmp_path / "runs" / "bitwise" / "metrics.jsonl").read_text().splitlines()]
    assert [row["mismatch/max_abs"] for row in rows if row["stage"] == "rl"] == [0.0, 0.0]
    assert [row["mismatch/tokens"] for row in rows if row["stage"] == "rl"] == [
        row["sampled_tokens"] for row in rows if row["stage"] == "rl"
    ]


def test_attention_sinks_are_not_lost(tmp_path: Path):
    """gpt-oss has numbers in its attention that plain scaled dot products do not."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    from miles_core.errors import ConfigError
    from miles_train.torch_trainer.causal_lm import CausalLM

    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_local_experts=16, num_experts_per_tok=2,
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"numerics: bitwise cannot be had with this GptOssForCausalLM: .*attention with s_aux"):
        CausalLM(tmp_path, torch.float32, torch.device("cpu"), "auto", True)
