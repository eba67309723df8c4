"""Your own environment: the world that answers the policy. Half a minute: ``uv run python docs/tutorials/3_your_environment.py``

In the quick start a calculator works out what it is asked, for nothing. Here somebody on the phone tells the answer to the whole problem,
whatever is asked, and each call costs a tenth of a point. The policy finds out that calling pays all the same.
"""

import asyncio
import re
from pathlib import Path

import numpy as np

import miles_core as miles
from miles_core.run_dir import RunDir
from miles_core.sample_io import load_samples

SFT, RL = 150, 20  # steps
SHORT = [f"stages.sft.steps={SFT}", f"stages.rl.steps={RL}", "stages.rl.groups=8"]


class Hotline:
    """One trajectory's world; an instance is made for each. Keyword-only arguments are its options."""

    def __init__(self, *, price: float = 0.1):
        self.price, self.calls = price, 0

    async def reset(self, prompt: miles.Prompt) -> miles.Observation:
        """What the policy reads first, and the text at which its turn pauses."""
        self.answer = prompt.label
        return miles.Observation(prompt.text, stop=("</call>",))

    async def step(self, action: str) -> miles.Observation:
        """Answer to what the policy wrote since then. The text is injected: context for the policy, never trained."""
        if action.endswith("</call>"):
            self.calls += 1
            return miles.Observation(f" <res> {self.answer} </res>", reward=-self.price, stop=("</call>",))
        said = re.search(r" ans (-?\d+)", action)
        right = said is not None and int(said[1]) == self.answer
        return miles.Observation(done=True, reward=float(right), metadata={"calls": self.calls})  # rewards of a trajectory add up


def main():
    here = Path(__file__)
    overrides = [
        "name=my_environment",
        *SHORT,
        f"import_from=[{here.parent}]",  # where the class is found, also when the run is resumed
        f"stages.rl.rollout.environment={{use: '{here.stem}:Hotline', price: 0.1}}",
    ]
    outcome = asyncio.run(miles.Run(miles.resolve("quickstart", overrides)).start())
    for path in sorted(RunDir(outcome.run_dir).trajectories.glob("step-*.safetensors")):  # what was sampled and trained, a file a step
        samples = load_samples(path)
        reward, calls = np.mean([s.reward for s in samples]), np.mean([s.metadata.get("calls", 0) for s in samples])
        print(f"{path.stem}: {calls:.1f} calls, reward {reward:.2f}")


if __name__ == "__main__":
    main()
