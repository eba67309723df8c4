"""How equal the backends are: every engine and every trainer layout beside plain transformers, on this machine, as two tables.

    uv run --locked miles engine install sglang-cpu
    OMP_NUM_THREADS=1 uv run --locked python benchmarks/equality.py [--no-sglang]

Tiny random models (2 layers; dense Qwen3 with tied embeddings, and Qwen3-MoE), float32, ragged packed batches, experts replayed where
there are any. The reference runs one sample at a time through whole logits and knows nothing of Miles' trainers; tests/fixtures holds it,
and `tests/differential/test_{engine,trainer}_conformance.py` hold the bounds in CI.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _machine import ROOT, write_result

sys.path.insert(0, str(ROOT / "tests"))

from fixtures.engines import MODELS as ENGINE_MODELS
from fixtures.engines import WORDS, Reference
from fixtures.trainers import TRAINERS, Plain, fits, make_trainer, routed_batch
from fixtures.training import MODELS, ragged_batch, weights, write_model

from miles_core.clusters import ProcessesConfig
from miles_core.models import materialize
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext, GenerateRequest, SamplingParams
from miles_core.tokenizers import TokenizerConfig, load_tokenizer

RATE = 100.0
"""lr / eps of AdamW with an eps far above every gradient: plain gradient descent at this rate."""


async def trainer_row(name: str, model: str, path: Path, run_dir: Path, cluster: Any) -> dict[str, float]:
    """Largest differences of one trainer from plain transformers."""
    replay = model == "moe"
    batch = routed_batch(layers=2, experts=4, k=2) if replay else ragged_batch()
    plain = Plain.of(path, routed=replay)

    ours = make_trainer(path, run_dir, name, cluster, micro_batch_tokens=60, lr=1e9, eps=1e7, max_grad_norm=float("inf"))
    await ours.start()
    annotated = await ours.annotate(batch, frozenset({"old_logprobs"}))
    before = weights(ours)
    await ours.step(batch)
    after = weights(ours)
    await ours.close()
    gradients = plain.gradients(batch)
    off = [float(((before[n] - after[n]) / RATE - g).norm() / g.norm()) for n, g in gradients.items()]
    expected = plain.outputs(batch)[0].detach().numpy()

    stepping = make_trainer(path, run_dir, name, cluster, micro_batch_tokens=60, lr=1e-2, eps=1e-3, max_grad_norm=0.5)
    await stepping.start()
    adamw = torch.optim.AdamW(plain.model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(3):
        loss = plain.loss(batch)
        losses.append(abs((await stepping.step(batch)).metrics["loss"] - float(loss.detach())))
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 0.5)
        adamw.step()
    await stepping.close()
    return {
        "logprobs": float(np.nanmax(np.abs(annotated.array("old_logprobs") - expected))),
        "gradients": max(off),
        "losses": max(losses),
    }


async def engine_row(kind: str, path: Path, run_dir: Path) -> dict[str, float]:
    """Largest difference of sampled log-probabilities from plain transformers, and the share of experts that are the same."""
    config = config_class("rollout_engine", kind).model_validate({"use": kind, "dtype": "float32"})
    engine = config.build(BuildContext(run_dir, "equality", 0, model="policy", model_path=path, tokenizer=load_tokenizer(path)))
    try:
        await engine.start()
        rng = np.random.default_rng(0)
        requests = [
            GenerateRequest(f"s{i}", rng.integers(1, 20, n).astype(np.int32), SamplingParams(40, (0.7, 1.0, 1.4)[i % 3]), i)
            for i, n in enumerate(rng.integers(1, 30, 32).tolist())
        ]
        generations = await asyncio.gather(*(engine.generate(r) for r in requests))
    finally:
        await engine.close()
    reference, worst, same, tokens = Reference(path), 0.0, [], 0
    for request, generation in zip(requests, generations, strict=True):
        worst = max(worst, float(np.abs(generation.logprobs - reference.logprobs(request, generation)).max()))
        tokens += len(generation.tokens)
        if generation.routing is not None:
            expected = reference.routing(np.concatenate([request.tokens, generation.tokens]))[: len(generation.routing)]
            same.append((np.sort(generation.routing, -1) == np.sort(expected, -1)).all(-1).mean())
    return {"logprobs": worst, "tokens": tokens} | ({"routing": float(np.mean(same))} if same else {})


async def measure(directory: Path, sglang: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"trainers": {}, "engines": {}}
    cluster = ProcessesConfig(use="processes").build(BuildContext(directory, "equality", 0))
    print(f"{'trainer':<18} {'model':<6} {'max |Δlogprob|':>15} {'max ‖Δg‖ / ‖g‖':>15} {'max |Δloss|, 3 steps':>21}")
    try:
        for model in ("dense", "moe"):
            path = write_model(directory / model, **MODELS[model])
            for name in (n for n in TRAINERS if fits(n, model)):
                row = await trainer_row(name, model, path, directory / "run", cluster)
                result["trainers"][f"{name}/{model}"] = row
                print(f"{name:<18} {model:<6} {row['logprobs']:>15.1e} {row['gradients']:>15.1e} {row['losses']:>21.1e}", flush=True)
    finally:
        await cluster.close()
    print(f"\n{'engine':<18} {'model':<6} {'max |Δlogprob|':>15} {'experts the same':>17} {'tokens':>8}")
    for kind in ("local", "sglang") if sglang else ("local",):
        for model, fields in ENGINE_MODELS.items():
            path = materialize(None, fields, TokenizerConfig(kind="words", words=WORDS), [], directory / f"engine-{model}", 7)
            row = await engine_row(kind, path, directory / "run")
            result["engines"][f"{kind}/{model}"] = row
            experts = f"{row['routing']:.2%}" if "routing" in row else "–"
            print(f"{kind:<18} {model:<6} {row['logprobs']:>15.1e} {experts:>17} {row['tokens']:>8}", flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-sglang", action="store_true", help="leave the servers out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        result = asyncio.run(measure(Path(directory), not args.no_sglang))
    path = write_result("equality", {"benchmark": "equality", **result}, ("torch", "transformers", "megatron-core", "sglang"))
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
