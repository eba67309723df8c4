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


class Additions:
    """Sums of three numbers from 10 to 99; a thousand of all 729,000 are held out. Three in ten demonstrations call the calculator."""

    def __init__(self, *, held_out: bool = False):
        shuffled = np.random.default_rng(0).permutation(90**3)  # always the same: where a run is in the data is only a number
        self.numbers = shuffled[:1000] if held_out else shuffled[1000:]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> miles.Prompt:
        a, b, c = (10 + int(digit) for digit in np.unravel_index(self.numbers[index], (90, 90, 90)))
        steps = [(f"{a} + {b}", a + b), (f"{a + b} + {c}", a + b + c)]
        calls = [passage for step in steps for passage in called(*step)] if index % 10 < 3 else []
        return miles.Prompt(
            id=f"{a}+{b}+{c}",  # stable and unique: randomness goes by it
            text=f"{a} + {b} + {c} ?",
            label=a + b + c,  # what the environment and rewards compare with
            demonstration=(*calls, Passage(f" ans {a + b + c}", trained=True)),  # what the stage sft trains on
        )


def called(expression: str, result: int) -> list[Passage]:
    """A call, and what the environment says to it, which is not trained."""
    call = Passage(f" <call> {expression} </call>", trained=True)
    return [call, Passage(f" <res> {result} </res>", trained=False, role="environment")]


def main():
    here = Path(__file__)
    source = f"{here.stem}:Additions"
    config = miles.resolve(
        "quickstart",
        [
            "name=my_dataset",
            f"stages.sft.steps={SFT}",
            f"stages.rl.steps={RL}",
            "stages.rl.groups=8",
            f"import_from=[{here.parent}]",
            f"stages.sft.data={{use: '{source}'}}",
            f"stages.rl.data={{use: '{source}'}}",
            f"stages.rl.evaluators.held_out.data={{use: '{source}', held_out: true}}",
            "stages.rl.evaluators.held_out.prompts=256",
        ],
    )
    outcome = asyncio.run(miles.Run(config).start())
    for row in RunDir(outcome.run_dir).rows():
        if "eval/held_out/avg@1" in row:
            print(f"after step {row['step']}: {row['eval/held_out/avg@1']:.0%} of the held-out sums are right")


if __name__ == "__main__":
    main()
