"""Look into a run: metrics, samples, tokens. After the first tutorial: ``uv run python docs/tutorials/7_look_into_a_run.py runs/first``

Reading needs numpy and no torch, and works while a run goes on. From the shell: ``miles inspect runs/first`` (docs/inspect.md).
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from miles_core.run_dir import RunDir
from miles_core.sample_io import load_samples


def main(path: str) -> None:
    run = RunDir.open(Path(path))

    # One row a step; what a stage does not have, its rows do not have.
    rows = [row for row in run.rows() if "reward" in row]
    print(f"reward: {rows[0]['reward']:.2f} at step {rows[0]['step']}, {rows[-1]['reward']:.2f} at step {rows[-1]['step']}")
    print(f"engine and trainer differ by at most {max(row['mismatch/max_abs'] for row in rows):.1e} nats on any token")

    # What was sampled and trained, a file a step; what evaluations sampled is in eval-STAGE.NAME-STEP.safetensors.
    samples = load_samples(max(run.trajectories.glob("step-*.safetensors")))
    groups = defaultdict(list)
    for sample in samples:
        groups[sample.prompt].append(sample.reward)
    for prompt, rewards in groups.items():
        print(f"{prompt:16} {np.mean(rewards):.2f} right of {len(rewards)}")

    # A sample is columns over all its tokens. The mask says which were trained: neither the prompt, nor what the environment said.
    best = max(samples, key=lambda sample: sample.reward)
    print(f"\n{best.prompt}{best.metadata['response']}")
    for turn in best.turns:
        print(f"  tokens {turn.start} to {turn.end - 1}: {turn.role}, {best.loss_mask[turn.start : turn.end].sum()} trained")
    trained = best.loss_mask
    print(f"  weights of version {set(best.versions[trained].tolist())}, advantage {best.columns['advantages'][trained][0]:.2f}")
    print(f"  least likely token: {np.exp(best.logprobs[trained].min()):.1%}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/first")
