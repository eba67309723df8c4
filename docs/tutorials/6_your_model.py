"""Your own model: one of another size from scratch, then one from a directory. ``uv run python docs/tutorials/6_your_model.py``

From scratch, a model is the fields of a Hugging Face config and a tokenizer. From a directory (or ``owner/name`` on the hub) it is a
causal language model that transformers loads, with its own tokenizer. What a run leaves is such a directory.
"""

import asyncio
from pathlib import Path

import miles_core as miles
from miles_core.run_dir import RunDir

SFT, RL = 150, 10  # steps

FROM_SCRATCH = f"""
extends: quickstart
name: from_scratch
models:
  policy:
    config: {{num_hidden_layers: 3, hidden_size: 128, intermediate_size: 256, head_dim: 32}}  # what is not named stays: a Qwen3
stages:
  sft: {{steps: {SFT}}}
  rl: null              # leaves the recipe's stage out
"""

FROM_DIRECTORY = f"""
extends: quickstart
name: from_directory
models:
  policy: {{path: DIRECTORY, config: null, tokenizer: null}}  # the tokenizer lies beside the weights
stages:
  sft: null
  rl: {{steps: {RL}, groups: 8}}
"""


def run(name: str, recipe: str) -> RunDir:
    """A recipe may be a file, too: it says what differs from the one it extends."""
    Path(f"{name}.yaml").write_text(recipe)
    return RunDir(asyncio.run(miles.Run(miles.resolve(f"{name}.yaml")).start()).run_dir)


def main():
    taught = run("from_scratch", FROM_SCRATCH)
    print(f"loss of the demonstrations: {list(taught.rows())[-1]['loss']:.2f}")
    directory = str((taught.models / "final" / "policy").resolve())
    improved = run("from_directory", FROM_DIRECTORY.replace("DIRECTORY", directory))
    for row in improved.rows():
        if "eval/held_out/avg@1" in row:
            print(f"after step {row['step']}: {row['eval/held_out/avg@1']:.0%} of held-out problems solved")
    print(f"the model: {improved.models / 'final' / 'policy'}")


if __name__ == "__main__":
    main()
