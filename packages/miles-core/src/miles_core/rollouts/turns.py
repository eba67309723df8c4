"""``generate: turns``: policy and environment take turns until one of them is done. Without an environment: one turn."""

from __future__ import annotations

import time
from dataclasses import replace

from ..builder import SampleBuilder, encode
from ..errors import DataError, InfrastructureFailure
from ..protocols import GenerateRequest, Generation, Observation, SamplingParams, Trajectory
from ..sample import Sample, Status


async def turns(trajectory: Trajectory, *, max_turns: int = 16) -> list[Sample]:
    """Play one trajectory; injected tokens are never trained.

    It is completed when the environment says so or the policy ends its text, truncated at ``max_turns``, at
    ``sampling.max_tokens`` sampled tokens or at ``max_length`` tokens in all.

    Returns:
        One sample; ``rewards["environment"]`` is the sum of what an environment gave, 0 if it gave nothing.

    Raises:
        DataError: The prompt alone is as long as ``max_length``.
        InfrastructureFailure: The engine gave up.
    """
    policy = trajectory.id.policy
    engine, tokenizer = trajectory.engines[policy], trajectory.tokenizers[policy]
    builder = SampleBuilder(trajectory.id, tokenizer)
    environment = trajectory.environment() if trajectory.environment else None
    observation = await environment.reset(trajectory.prompt) if environment else Observation(trajectory.prompt.text)
    builder.inject(observation.text, role="user")
    limit = trajectory.max_length
    if limit is not None and len(builder.tokens) >= limit:
        raise DataError(
            f"prompt {trajectory.prompt.id} has {len(builder.tokens)} tokens, max_length is {limit}; raise it or take the prompt out"
        )
    seen = [observation]
    status, seconds = Status.TRUNCATED, {"generate": 0.0, "environment": 0.0}
    try:
        for _ in range(max_turns):
            sampling = _remaining(trajectory, builder, observation)
            if sampling is None:
                break
            start = len(builder.tokens)
            began = time.perf_counter()
            request = GenerateRequest(str(trajectory.id), builder.tokens, sampling, trajectory.key, builder.routing_rows)
            generation = await engine.generate(request)
            seconds["generate"] += time.perf_counter() - began
            if generation.finish == "abort":
                raise InfrastructureFailure(f"generation of {trajectory.id} was aborted")
            builder.append(generation, sampling)
            said = builder.text(start)
            ended = generation.finish == "stop" and (
                builder.tokens[-1] == tokenizer.eos_token_id or not _stopped_as_asked(sampling, generation, said)
            )
            if environment:
                began = time.perf_counter()
                observation = await environment.step(said)
                seconds["environment"] += time.perf_counter() - began
                seen.append(observation)
                ended = ended or observation.done
            if ended or (environment is None and generation.finish == "stop"):
                status = Status.COMPLETED
                break
            if environment is None or generation.finish == "length":
                break
            answer = encode(tokenizer, observation.text, add_special_tokens=False)
            if limit is not None and len(builder.tokens) + len(answer) >= limit:
                break
            builder.inject_ids(answer, role="environment")
    finally:
        await engine.release(str(trajectory.id))
    return [builder.finish(status, **_facts(trajectory, seen), timings=seconds)]


def _stopped_as_asked(sampling: SamplingParams, generation: Generation, said: str) -> bool:
    """Whether a generation that stopped did so at an id or text of its settings. Else the policy ended its text: models have several ids
    for that, tokenizers name one."""
    last = generation.tokens[-1:].tolist()
    return any(id in sampling.stop_token_ids for id in last) or any(text in said for text in sampling.stop)


def _remaining(trajectory: Trajectory, builder: SampleBuilder, observation: Observation) -> SamplingParams | None:
    """The settings of the next turn within what is left of the token budgets; None if nothing is left."""
    sampling = trajectory.sampling
    left = sampling.max_tokens - builder.sampled
    if trajectory.max_length is not None:
        left = min(left, trajectory.max_length - len(builder.tokens))
    return replace(sampling, max_tokens=left, stop=(*sampling.stop, *observation.stop)) if left > 0 else None


def _facts(trajectory: Trajectory, seen: list[Observation]) -> dict:
    metadata = {k: v for o in seen for k, v in o.metadata.items()}
    rewards = {"environment": float(sum(o.reward for o in seen if o.reward is not None))} if trajectory.environment else {}
    prompt = trajectory.prompt
    return {"prompt": prompt.text, "label": prompt.label, "rewards": rewards, "metadata": dict(prompt.metadata) | metadata}
