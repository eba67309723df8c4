"""A cut: everything a run needs to go on exactly, taken between optimizer steps, the manifest written last (DESIGN §6).

A cut without a manifest, or with a file that its manifest does not describe, does not count: the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .buffer import Counts
from .errors import CheckpointError
from .refs import GroupRef
from .sample import Group
from .sample_io import load_samples, save_samples

FORMAT = "miles-cut-1"


@dataclass(frozen=True)
class CutState:
    """What a cut says beside the trainers' files.

    Attributes:
        stage: Name of the stage.
        step: Steps of that stage that are done.
        global_step: Steps of the run that are done; also the weight version.
        position: Next position in the stage's data.
        in_flight: Positions that had been started and not trained; they are issued again.
        counts: The buffer's counts without those in flight.
        ready: (id, position, number of samples) of each complete group in the buffer.
        config_hash: ``RunConfig.fingerprint``, what ties a cut to its configuration.
    """

    stage: str
    step: int
    global_step: int
    position: int
    in_flight: list[int]
    counts: dict[str, Any]
    ready: list[tuple[str, int, int]] = field(default_factory=list)
    config_hash: str = ""

    def buffer_counts(self) -> Counts:
        """The counts as the buffer keeps them."""
        return Counts(**self.counts)


def begin(checkpoints: Path, global_step: int) -> Path:
    """An empty directory to write a cut's files into; unfinished ones of an earlier life go."""
    for unfinished in checkpoints.glob("step-*.partial"):
        shutil.rmtree(unfinished)
    partial = checkpoints / f"step-{global_step:06d}.partial"
    partial.mkdir(parents=True)
    return partial


def commit(partial: Path, state: CutState, ready: list[GroupRef], keep: int) -> Path:
    """Write the buffer and the manifest (last), give the cut its name, remove all but it and the ``keep`` − 1 before it."""
    if ready:
        save_samples(partial / "buffer.safetensors", [s for g in ready for s in g.get().samples])
    manifest = {"format": FORMAT, "state": asdict(state), "files": _describe(partial)}
    temporary = partial / "manifest.json.partial"
    with temporary.open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, partial / "manifest.json")
    final = partial.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    cuts = _newest_first(final.parent)  # one of a later step is damaged, or the run would have gone on from there
    for old in cuts[cuts.index(final) + keep :]:
        shutil.rmtree(old)
    return final


def newest(checkpoints: Path, expected_hash: str) -> tuple[Path, CutState, list[str]]:
    """The newest complete cut of this configuration.

    Returns:
        Its directory, its state, and a sentence for each one that was passed over: unfinished, or newer and damaged.

    Raises:
        CheckpointError: There is none, or it belongs to another configuration.
    """
    passed_over = [f"{p.name} was not finished and was passed over" for p in sorted(checkpoints.glob("step-*.partial"))]
    for directory in _newest_first(checkpoints):
        try:
            manifest = json.loads((directory / "manifest.json").read_text())
            if manifest.get("format") != FORMAT:
                raise CheckpointError(f"format {manifest.get('format')!r}, expected {FORMAT!r}")
            _verify(directory, manifest["files"])
            state = CutState(**manifest["state"])
        except (OSError, ValueError, KeyError, TypeError, CheckpointError) as error:
            passed_over.append(f"{directory.name} is damaged ({error}) and was passed over")
            continue
        if state.config_hash != expected_hash:
            raise CheckpointError(
                f"{directory} was written by another configuration (hash {state.config_hash}, config.yaml has {expected_hash}). "
                "Put the run's own config.yaml back, or start a new run."
            )
        return directory, state, passed_over
    details = "; ".join(passed_over) or "no step was saved before the run ended"
    raise CheckpointError(f"{checkpoints} holds no complete cut: {details}. Start the run anew with miles run.")


def read_ready(directory: Path, state: CutState) -> list[GroupRef]:
    """The groups that were complete in the buffer."""
    if not state.ready:
        return []
    samples = iter(load_samples(directory / "buffer.safetensors"))
    return [GroupRef.of(Group(id, [next(samples) for _ in range(n)]), position) for id, position, n in state.ready]


def _newest_first(checkpoints: Path) -> list[Path]:
    cuts = {int(found[1]): p for p in checkpoints.glob("step-*") if (found := re.fullmatch(r"step-(\d+)", p.name))}
    return [cuts[step] for step in sorted(cuts, reverse=True)]


def _describe(directory: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): {"bytes": p.stat().st_size, "blake2b": _digest(p)} for p in files}


def _verify(directory: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, wanted in files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{name} is missing")
        if path.stat().st_size != wanted["bytes"]:
            raise CheckpointError(f"{name} has {path.stat().st_size} bytes, the manifest says {wanted['bytes']}")
        if _digest(path) != wanted["blake2b"]:
            raise CheckpointError(f"{name} holds other bytes than the manifest says")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
