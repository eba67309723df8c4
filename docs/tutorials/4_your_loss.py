"""Your own loss: how advantages become a gradient. Half a minute: ``uv run python docs/tutorials/4_your_loss.py``

A loss term is a function of the rows of a micro-batch: row p speaks of the token that is predicted there. It gives a loss for each row;
which rows count, how they add up to the loss of a step, and the coefficient are not its business. So it is right however a batch is cut.
"""

import asyncio
from pathlib import Path

import torch

import miles_core as miles
from miles_core.protocols import LossInputs, LossOutputs
from miles_core.run_dir import RunDir

SFT, RL = 150, 20  # steps
SHORT = [f"stages.sft.steps={SFT}", f"stages.rl.steps={RL}", "stages.rl.groups=8"]


@miles.loss(needs={"advantages", "logprobs"})
def tethered(inputs: LossInputs, *, strength: float = 0.1) -> LossOutputs:
    """The policy gradient of a ratio ρ, on a rubber band: ``−A·ρ + strength/2·(log ρ)²``, with ρ = π / π_rollout."""
    rollout = inputs.columns["logprobs"]  # as sampled: NaN where nothing was, so look at trained rows only
    log_ratio = torch.where(inputs.ops.mask, inputs.logprobs - rollout, 0.0)  # inputs.logprobs: the model's, differentiable
    gain = inputs.columns["advantages"] * log_ratio.exp()
    return LossOutputs(strength / 2 * log_ratio.square() - gain, metrics={"tether": log_ratio.detach().square()})


def main():
    here = Path(__file__)
    overrides = [
        "name=my_loss",
        *SHORT,
        f"import_from=[{here.parent}]",
        # Out with the recipe's term, in with ours; two optimizer steps a batch, so that the ratio has something to say.
        f"stages.rl.models.policy.losses={{ppo: null, tethered: {{use: '{here.stem}:tethered', strength: 0.5}}}}",
        "stages.rl.minibatches=2",
    ]
    outcome = asyncio.run(miles.Run(miles.resolve("quickstart", overrides)).start())
    for row in RunDir(outcome.run_dir).rows():
        if "reward" in row:
            print(f"step {row['step']}: reward {row['reward']:.2f}, tether {row['tether']:.2e}, gradient {row['grad_norm']:.2f}")


if __name__ == "__main__":
    main()
