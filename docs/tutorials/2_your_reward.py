"""Your own reward: what the policy is paid for. Half a minute: ``uv run python docs/tutorials/2_your_reward.py``

The quick start's environment pays 1 for the right answer. Here it pays nothing any more; two functions of this file do.
"""

import asyncio
import re
from pathlib import Path

import miles_core as miles
from miles_core.run_dir import RunDir

SFT, RL = 150, 20  # steps
SHORT = [f"stages.sft.steps={SFT}", f"stages.rl.steps={RL}", "stages.rl.groups=8"]


def right(sample):
    """Of one sample: 1 for the right answer. ``response`` is all that came after the prompt, what the calculator said included."""
    answer = re.search(r" ans (-?\d+)", sample.metadata["response"])
    return float(answer is not None and int(answer[1]) == sample.label)


@miles.reward(unit="group")
def brief(samples, *, per_token: float = 0.02):
    """Of all answers to one prompt: a price for each token more than the shortest right one. Keyword-only arguments are options."""
    lengths = [sample.n_sampled for sample in samples if right(sample)]
    return [-per_token * max(0, sample.n_sampled - min(lengths)) if lengths else 0.0 for sample in samples]


def main():
    here = Path(__file__)
    overrides = [
        "name=my_reward",
        *SHORT,
        f"import_from=[{here.parent}]",  # where functions are found, also when the run is resumed
        "stages.rl.environment_weight=0",  # the environment's own points are still reported, and count nothing
        f"stages.rl.rewards.right.use={here.stem}:right",  # module:function
        f"stages.rl.rewards.brief={{use: '{here.stem}:brief', per_token: 0.01, weight: 0.5}}",
    ]
    outcome = asyncio.run(miles.Run(miles.resolve("quickstart", overrides)).start())
    for row in RunDir(outcome.run_dir).rows():
        if "reward" in row:  # the sum, and its parts before their weights
            print(f"step {row['step']}: {row['reward']:.2f} = {row['rewards/right']:.2f} right + 0.5 · {row['rewards/brief']:.3f} brief")


if __name__ == "__main__":
    main()
