"""GRPO by Miles and by TRL's GRPOTrainer: the same checkpoint, prompts, group size, reward and optimizer, one process each.

    uv run --locked --with trl==1.16.0 python benchmarks/against_trl.py [--threads 1] [--steps 40] [--seeds 3] [--large]

The checkpoint is the quick start's after its SFT; the task is its first half in a single turn: one point for a completion that begins
with a call of the calculator on the first two numbers, `<call> 47 + 58 </call>`. 16 prompts × 16 completions of up to 24 tokens a step, one
optimizer step on all of them (AdamW 3e-4, clip .2 / .28, token mean, no KL, temperature 1). `--large`: an untrained Qwen3 of 30 M
parameters, 4 × 8 completions of 512 tokens, nothing to learn.

TRL's fastest settings here: the whole batch in one forward pass, no reference model, no checkpointing, no logging of completions, its
static padding; its continuous batching was ten times slower on a CPU. Ours twice: every sample trained
(`skip_zero_advantages: false`), and as it comes.

Runs take turns, seed by seed. Compared are samples a second of wall time and of processor time, over all steps but the first two, and the
mean reward of the last five steps. The ratios are ours / TRL; the bounds are 1.5 with every sample trained, 2 as it comes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _machine import ROOT, summary, write_result

PREFIX = "RESULT "
CALL = re.compile(r"\s*<call> (\d+ [+-] \d+) </call>")
SKIPPED_STEPS = 2
LAST_STEPS = 5


def points(prompt: str, completion: str) -> float:
    """The task's reward."""
    call = CALL.match(completion)
    return float(call is not None and prompt.startswith(call[1] + " "))


class Clock:
    """Marks of wall and processor time, one a step."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []

    def mark(self) -> None:
        self.wall.append(time.perf_counter())
        self.processor.append(time.process_time())

    def result(self, samples: int, rewards: list[float]) -> dict[str, Any]:
        """Samples a second by both clocks, and what was learned."""

        def rate(marks: list[float]) -> float:
            return samples * (len(marks) - 1 - SKIPPED_STEPS) / (marks[-1] - marks[SKIPPED_STEPS])

        return {
            "samples_per_second": rate(self.wall),
            "samples_per_processor_second": rate(self.processor),
            "first": statistics.mean(rewards[:LAST_STEPS]),
            "last": statistics.mean(rewards[-LAST_STEPS:]),
            "rewards": [round(r, 3) for r in rewards],
        }


# ---- the two sides, each a process of its own --------------------------------------------------------------------------


def with_miles(model: Path, task: dict[str, Any], seed: int, skip: bool) -> dict[str, Any]:
    """Our loop, local engine and torch trainer."""
    import asyncio

    import yaml

    from miles_core.config import resolve
    from miles_core.observer import Observer
    from miles_core.runner import Run

    clock, rewards = Clock(), []

    class Watch(Observer):
        def step(self, row: Any) -> None:
            clock.mark()
            rewards.append(row["reward"])

    with tempfile.TemporaryDirectory() as directory:
        trainer = {"use": "torch", "lr": 3e-4, "warmup_steps": 5, "betas": [0.9, 0.95], "weight_decay": 0.0, "max_grad_norm": 1.0}
        recipe = {
            "name": "ours",
            "seed": seed,
            "device": "cpu",
            "runs_dir": directory,
            "import_from": [str(Path(__file__).parent)],
            "trackers": {},
            "models": {
                "policy": {
                    "path": str(model),
                    "engine": {"use": "local"},
                    "trainer": trainer
                    | {"micro_batch_tokens": task["micro_batch_tokens"]}
                    | ({} if skip else {"skip_zero_advantages": False}),
                    "advantage": {"use": "grpo"},
                    "losses": {"ppo": {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.28, "old": "current"}},
                }
            },
            "data": {"use": "calculator_problems", "size": 1000000, "seed": 1},
            "shuffle": False,
            "stages": {
                "rl": {
                    "steps": task["steps"],
                    "groups": task["groups"],
                    "rollout": {
                        "use": "trajectories",
                        "group_size": task["group_size"],
                        "sampling": {"max_tokens": task["max_tokens"], "temperature": 1.0},
                    },
                    "rewards": {"call": {"use": "against_trl:score"}},
                    "every": {"trajectories": 0, "checkpoint": 0},
                }
            },
        }
        path = Path(directory) / "ours.yaml"
        path.write_text(yaml.safe_dump(recipe))
        config = resolve(str(path), [])
        clock.mark()
        asyncio.run(Run(config, Watch()).start())
    return clock.result(task["groups"] * task["group_size"], rewards)


def score(sample: Any) -> float:
    """The reward in Miles' form."""
    return points(sample.prompt, sample.metadata["response"])


def with_trl(model: Path, task: dict[str, Any], seed: int) -> dict[str, Any]:
    """TRL's trainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock = Clock()

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.mark()

    with tempfile.TemporaryDirectory() as directory:
        samples = task["groups"] * task["group_size"]
        config = GRPOConfig(
            output_dir=directory,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=samples,
            num_generations=task["group_size"],
            max_completion_length=task["max_tokens"],
            max_steps=task["steps"],
            learning_rate=3e-4,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            weight_decay=0.0,
            adam_beta1=0.9,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            beta=0.0,
            epsilon=0.2,
            epsilon_high=0.28,
            loss_type="dapo",
            temperature=1.0,
            shuffle_dataset=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            seed=seed,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            reward_funcs=lambda prompts, completions, **_: [points(p, c) for p, c in zip(prompts, completions, strict=True)],
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts(task["groups"] * task["steps"])}),
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[Watch()],
        )
        clock.mark()
        trainer.train()
    return clock.result(samples, [row["reward"] for row in trainer.state.log_history if "reward" in row])


def prompts(count: int) -> list[str]:
    """The problems in the order of both."""
    from miles_agents.plugins import CalculatorProblems
    from miles_core.protocols import BuildContext

    source = CalculatorProblems(use="calculator_problems", size=1000000, seed=1).build(BuildContext(Path(), "benchmark", 0))
    return [source[i].text for i in range(count)]


# ---- the comparison ----------------------------------------------------------------------------------------------------


def checkpoint(directory: Path) -> Path:
    """The quick start's policy after its SFT."""
    import yaml

    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    del recipe["stages"]["rl"]
    path = directory / "sft.yaml"
    path.write_text(yaml.safe_dump(recipe | {"name": "sft", "runs_dir": str(directory)}, sort_keys=False))
    subprocess.run([sys.executable, "-m", "miles_core.cli", "run", str(path)], check=True, stdout=subprocess.DEVNULL)
    return directory / "sft" / "models" / "final" / "policy"


def untrained(directory: Path, small: Path) -> Path:
    """A Qwen3 of 30 M parameters with the small one's tokenizer."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(small)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=9,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory / "large")
    tokenizer.save_pretrained(directory / "large")
    return directory / "large"


def side(name: str, model: Path, task: dict[str, Any], seed: int, threads: int) -> dict[str, Any]:
    """One run of one side."""
    command = [sys.executable, __file__, "--side", name, "--model", str(model), "--task", json.dumps(task), "--seed", str(seed)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(PREFIX)]
    if done.returncode or not lines:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[0].removeprefix(PREFIX))


SIDES = {"every sample": "miles-every", "as it comes": "miles", "TRL": "trl"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--large", action="store_true")
    for hidden in ("--side", "--model", "--task"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        model, task = Path(args.model), json.loads(args.task)
        run = with_trl(model, task, args.seed) if args.side == "trl" else with_miles(model, task, args.seed, args.side == "miles")
        print(PREFIX + json.dumps(run))
        return 0
    task: dict[str, Any] = {"steps": args.steps, "groups": 16, "group_size": 16, "max_tokens": 24, "micro_batch_tokens": 8192}
    if args.large:
        task |= {"groups": 4, "group_size": 8, "max_tokens": 512}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as directory:
        model = checkpoint(Path(directory))
        if args.large:
            model = untrained(Path(directory), model)
        for seed in range(args.seeds):
            for name, which in SIDES.items():
                runs[name].append(run := side(which, model, task, seed, args.threads))
                print(f"seed {seed}, {name}: " + ", ".join(f"{k} {run[k]:.3g}" for k in list(run)[:4]), flush=True)
    result: dict[str, Any] = {"benchmark": "against_trl", "threads": args.threads, "task": task, "runs": runs, "ratios": {}}
    for clock in ("samples_per_second", "samples_per_processor_second"):
        for name in list(SIDES)[:2]:
            ratios = [ours[clock] / theirs[clock] for ours, theirs in zip(runs[name], runs["TRL"], strict=True)]
            result["ratios"][f"{name}, {clock}"] = summary(ratios)
            print(f"{name}, {clock}: {statistics.median(ratios):.2f} × TRL ({min(ratios):.2f} to {max(ratios):.2f})")
    name = f"against_trl_{'30m_' if args.large else ''}{args.threads}_thread{'s' if args.threads > 1 else ''}"
    path = write_result(name, result, ("torch", "transformers", "trl", "miles-core", "miles-rollout", "miles-train"))
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
