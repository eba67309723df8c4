"""The trajectories of a run, one line each: found by reading the lists of their files and two columns, whatever else is recorded."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError, DataError
from ..run_dir import RunDir
from ..sample import Sample
from ..sample_io import load_samples, read_headers

NAMES = re.compile(r"(?:step|eval-(?P<evaluator>[A-Za-z0-9][A-Za-z0-9_.-]*))-(?P<step>\d+)\.safetensors")
ADDRESS = re.compile(r"(?:(?P<evaluator>.+)@)?(?P<step>\d+):(?P<number>\d+)")
TRAIN = "(train)"
"""The source of what was trained: no evaluator can be called so, since names have no parentheses."""


class Facts(NamedTuple):
    """One sample of a trajectory, without its tokens.

    Attributes:
        address: What ``miles inspect RUN ADDRESS`` shows in full: ``STEP:NUMBER``, or ``STAGE.EVALUATOR@STEP:NUMBER``.
        step: The step that trained it, or after which it was evaluated.
        source: ``(train)``, or stage and name of the evaluator: ``rl.held_out``.
        policy, prompt_id, group, trajectory, branch, attempt: Its id.
        prompt: As text; messages as JSON.
        reward: The trajectory's, None if it has none (SFT).
        rewards: Its named parts.
        status: How it ended.
        turns: Spoken by anyone.
        length: Tokens in all.
        sampled: Tokens that the policy sampled.
        trained: Tokens under the loss mask.
        oldest, newest: Weight versions that sampled it; −1 if none did.
    """

    address: str
    step: int
    source: str
    policy: str
    prompt_id: str
    group: str
    trajectory: int
    branch: int
    attempt: int
    prompt: str
    reward: float | None
    rewards: dict[str, float]
    status: str
    turns: int
    length: int
    sampled: int
    trained: int
    oldest: int
    newest: int


@dataclass(frozen=True)
class TrajectoryFile:
    """A file of ``trajectories/``."""

    path: Path
    step: int
    source: str

    def address(self, number: int) -> str:
        """Of its sample ``number``."""
        return f"{self.step}:{number}" if self.source == TRAIN else f"{self.source}@{self.step}:{number}"

    def facts(self) -> list[Facts]:
        """One for each sample, in the file's order. Raises DataError if it cannot be read."""
        headers, columns = read_headers(self.path, ("versions", "loss_mask"))
        starts = np.cumsum([0] + [h["length"] for h in headers])[:-1]
        versions, sampled = columns["versions"], columns["versions"] >= 0
        none = np.iinfo(versions.dtype).max
        reduced = zip(
            headers,
            np.add.reduceat(sampled, starts, dtype=np.int64).tolist(),
            np.add.reduceat(columns["loss_mask"], starts, dtype=np.int64).tolist(),
            np.minimum.reduceat(np.where(sampled, versions, none), starts).tolist(),
            np.maximum.reduceat(versions, starts).tolist(),
            strict=True,
        )
        return [self._facts(i, h, n, m, old if n else -1, new) for i, (h, n, m, old, new) in enumerate(reduced)]

    def samples(self, wanted: Sequence[Facts]) -> list[Sample]:
        """The samples of these facts, whole. Raises DataError if the file cannot be read, or holds others now than when it was listed."""
        samples = load_samples(self.path)
        found = []
        for f in wanted:
            number = int(f.address.rpartition(":")[2])
            sample = samples[number] if number < len(samples) else None
            if sample is None or _identity(sample) != (f.policy, f.prompt_id, f.group, f.trajectory, f.branch, f.attempt, f.length):
                raise DataError(f"{self.path}: another file now than when it was listed: {f.address} is not in it. Look again")
            found.append(sample)
        return found

    def _facts(self, number: int, header: dict[str, Any], sampled: int, trained: int, oldest: int, newest: int) -> Facts:
        id = header["id"]
        return Facts(
            address=self.address(number),
            step=self.step,
            source=self.source,
            policy=id["policy"],
            prompt_id=id["prompt"],
            group=id["group"],
            trajectory=id["trajectory"],
            branch=id["branch"],
            attempt=id["attempt"],
            prompt=prompt_text(header["prompt"]),
            reward=header["reward"],
            rewards=header["rewards"],
            status=header["status"],
            turns=len(header["turns"]),
            length=header["length"],
            sampled=sampled,
            trained=trained,
            oldest=oldest,
            newest=newest,
        )


def trajectory_files(run: RunDir) -> list[TrajectoryFile]:
    """The run's files of trajectories, oldest step first, a step's training before its evaluations."""
    found = []
    for path in run.trajectories.glob("*.safetensors"):
        if name := NAMES.fullmatch(path.name):
            found.append(TrajectoryFile(path, int(name["step"]), name["evaluator"] or TRAIN))
    return sorted(found, key=lambda f: (f.step, f.source != TRAIN, f.source))


def files_of_steps(run: RunDir, wanted: Container[int] | None = None) -> list[TrajectoryFile]:
    """Files of the steps in ``wanted`` (all if None).

    Raises:
        ConfigError: The run has no trajectories yet, or none of these steps.
    """
    files = trajectory_files(run)
    if not files:
        done = sum(1 for _ in run.rows())
        raise ConfigError(
            f"{run.path} has no trajectories yet ({done} rows of metrics). A stage writes them every so many steps "
            "(every.trajectories, in config.yaml; 0 is never), and each evaluation writes its own."
        )
    chosen = [f for f in files if wanted is None or f.step in wanted]
    if not chosen:
        raise ConfigError(f"{run.path} has no trajectories of that step. It has those of {_listed([f.step for f in files])}.")
    return chosen


def sample_at(run: RunDir, address: str) -> tuple[Facts, Sample]:
    """One trajectory, whole.

    Raises:
        ConfigError: There is none at this address.
        DataError: Its file is damaged.
    """
    found = ADDRESS.fullmatch(address)
    if not found:
        raise ConfigError(f"{address!r} is no trajectory's address; expected STEP:NUMBER or STAGE.EVALUATOR@STEP:NUMBER, as in the list")
    step, source, number = int(found["step"]), found["evaluator"] or TRAIN, int(found["number"])
    of_step = files_of_steps(run, (step,))
    file = next((f for f in of_step if f.source == source), None)
    if file is None:
        raise ConfigError(f"{run.path} has no trajectories of {source!r} at step {step}, only of {', '.join(f.source for f in of_step)}")
    facts = file.facts()
    if number >= len(facts):
        raise ConfigError(
            f"{run.path} has no trajectory {address}: those of step {step} are {file.address(0)} to {file.address(len(facts) - 1)}"
        )
    return facts[number], file.samples([facts[number]])[0]


def prompt_text(prompt: Any) -> str:
    """A prompt for people: text as it is, messages as ``role: content`` lines, anything else as JSON."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt):
        return "\n".join(f"{m.get('role', '?')}: {m['content']}" for m in prompt)
    return "" if prompt is None else json.dumps(prompt, ensure_ascii=False)


def _identity(sample: Sample) -> tuple[Any, ...]:
    """Id and length, as ``Facts`` have them."""
    id = sample.id
    return id.policy, id.prompt, id.group, id.trajectory, id.branch, id.attempt, len(sample)


def _listed(steps: list[int]) -> str:
    """``steps 1, 2, 5``; many as the first, the last and their number."""
    distinct = sorted(set(steps))
    if len(distinct) <= 8:
        return f"step{'s' * (len(distinct) > 1)} {', '.join(map(str, distinct))}"
    return f"{len(distinct)} steps from {distinct[0]} to {distinct[-1]}"
