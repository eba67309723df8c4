"""Your own dataset: prompts by index. Half a minute: ``uv run python docs/tutorials/5_your_dataset.py``

Anything with a length and an item at each index is a data source. The run shuffles it and remembers where it is, so resume is exact
without a line of yours. Files need no code at all: ``data={use: jsonl, path: rows.jsonl, prompt_field: …}``, see docs/data.md.
"""

import asyncio
from pathlib import Path

import numpy as np

import miles_core as miles
from miles_core.protocols import Passage
from miles_core.run_dir import RunDir

SFT, RL = 150, 20  # steps
SHORT = [f"stages.sft.steps={SFT}", f"stages.rl.steps={RL}", "stages.rl.groups=8"]


class Additions:
    """Sums of three numbers from 10 to 99; 256 of all 729,000 are held out. Three in ten demonstrations call the calculator."""

    def __init__(self, *, held_out: bool = False):
        shuffled = np.random.default_rng(0).permutation(90**3)  # always the same: where a run is in the data is only a number
        self.numbers = shuffled[:256] if held_out else shuffled[256:]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> miles.Prompt:
        a, b, c = (10 + int(digit) for digit in np.unravel_index(self.numbers[index], (90, 90, 90)))
        demonstration = [Passage(f" ans {a + b + c}", trained=True)]
        if index % 10 < 3:
            for expression, result in ((f"{a + b} + {c}", a + b + c), (f"{a} + {b}", a + b)):
                said = Passage(f" <res> {result} </res>", trained=False, role="environment")
                demonstration = [Passage(f" <call> {expression} </call>", trained=True), said, *demonstration]
        return miles.Prompt(
            id=f"{a}+{b}+{c}",  # stable and unique: randomness goes by it
            text=f"{a} + {b} + {c} ?",
            label=a + b + c,  # what the environment and rewards compare with
            demonstration=tuple(demonstration),  # what the stage sft trains on
        )


def main():
    source = f"{Path(__file__).stem}:Additions"
    overrides = [
        "name=my_dataset",
        *SHORT,
        f"import_from=[{Path(__file__).parent}]",
        f"stages.sft.data={{use: '{source}'}}",
        f"stages.rl.data={{use: '{source}'}}",
        f"stages.rl.evaluators.held_out.data={{use: '{source}', held_out: true}}",
    ]
    outcome = asyncio.run(miles.Run(miles.resolve("quickstart", overrides)).start())
    for row in RunDir(outcome.run_dir).rows():
        if "eval/held_out/avg@1" in row:
            print(f"after step {row['step']}: {row['eval/held_out/avg@1']:.0%} of the held-out sums are right")


if __name__ == "__main__":
    main()
