"""generate: one trajectory. Here it may take a few turns or many, so that the policy learns to be done in time.

In a recipe:

    rollout: {generate: {use: "random_budget:random_budget", most: 4}}
"""

from dataclasses import replace

from miles_core.randomness import generator
from miles_core.rollouts.turns import turns


async def random_budget(trajectory, *, most: int = 4):
    """The budget follows from the trajectory's key, so it is the same whenever and wherever it is played."""
    budget = int(generator("budget", trajectory.key).integers(1, most + 1))
    samples = await turns(trajectory, max_turns=budget)  # how trajectories are played by default
    return [replace(sample, metadata=sample.metadata | {"budget": budget}) for sample in samples]
