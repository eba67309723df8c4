"""Run it from Python: the quick start, shortened. Half a minute: ``uv run python docs/tutorials/1_run_from_python.py``

A recipe becomes a configuration, a configuration becomes a run, a run leaves a directory. The model is made from scratch, learns from
demonstrations to write sums and answers (stage ``sft``), then finds out by reinforcement that calling its calculator pays (stage ``rl``).
"""

import asyncio

import miles_core as miles
from miles_core.observer import Observer

SFT, RL = 150, 20  # steps


class Curve(Observer):
    """Who watches a run: here we only print the reward of a step, and what an evaluation found."""

    def step(self, row):
        if "reward" in row:
            print(f"step {row['step']}: reward {row['reward']:.2f}, {row['length/sampled']:.0f} tokens an answer")
        if "eval/held_out/avg@1" in row:
            print(f"after step {row['step']}: {row['eval/held_out/avg@1']:.0%} of held-out problems solved")

    def note(self, text):
        print(text)


def main():
    # Read a recipe and say what differs; a wrong key is a sentence here, before anything is loaded.
    config = miles.resolve("quickstart", ["name=first", f"stages.sft.steps={SFT}", f"stages.rl.steps={RL}", "stages.rl.groups=8"])
    policy = config.stages["rl"].models["policy"]  # the whole tree is typed
    print(f"stages {', '.join(config.stages)}; rl: {policy.advantage.use} and {policy.losses['ppo'].use}, lr {policy.trainer.lr}")

    run = miles.Run(config, Curve())
    outcome = asyncio.run(run.start())  # in a notebook: await run.start()
    print(f"{outcome.steps} steps; everything is in {outcome.run_dir}, the model in {outcome.run_dir}/models/final/policy")


if __name__ == "__main__":
    main()
