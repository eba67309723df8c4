"""A cut: everything a run needs to go on exactly, taken between optimizer steps, the manifest written last (DESIGN §6).

A cut without a manifest, or with a file that its manifest does not describe, does not count: the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from .buffer import Counts
from .disk import BROKEN, os_error, sync, sync_one, trouble, write_whole
from .errors import CheckpointError, RunError
from .refs import GroupRef
from .sample import Group
from .sample_io import load_samples, save_samples

FORMAT = "miles-cut-1"
MANIFEST = "manifest.json"
_committing = threading.Lock()
"""A commit that nobody waits for any more (Ctrl-C twice) still runs in its thread; the next cut waits for it."""


class CutNotWritten(RunError):
    """A cut could not be written; those before it are as they were."""


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
        owes_evaluation: An evaluation was due after this step and has not been made.
    """

    stage: str
    step: int
    global_step: int
    position: int
    in_flight: list[int]
    counts: dict[str, Any]
    ready: list[tuple[str, int, int]] = field(default_factory=list)
    config_hash: str = ""
    owes_evaluation: bool = False

    def buffer_counts(self) -> Counts:
        """The counts as the buffer keeps them."""
        return Counts(**self.counts)


@contextmanager
def begin(checkpoints: Path, global_step: int) -> Generator[Path]:
    """An empty directory to write a cut's files into, for as long as that takes, ``commit`` included.

    What was written is removed if writing fails, so that a full disk is no fuller than before, and so are unfinished cuts of an
    earlier life.

    Raises:
        CutNotWritten: The disk takes no more. Says how much the cut before needed and how much is free.
    """
    partial = checkpoints / f"step-{global_step:06d}.partial"
    try:
        with _committing:
            for unfinished in checkpoints.glob("step-*.partial"):
                shutil.rmtree(unfinished)
            partial.mkdir(parents=True)
        yield partial
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if (cause := os_error(error)) is None:
            raise
        raise CutNotWritten(_not_written(checkpoints, global_step, cause)) from error


def commit(partial: Path, state: CutState, ready: list[GroupRef]) -> Path:
    """Write the buffer and the manifest (last), and give the cut its name, which is returned.

    Everything is on the disk itself, not only with the operating system, before the next thing that relies on it is done.
    """
    with _committing:
        if ready:
            save_samples(partial / "buffer.safetensors", [s for g in ready for s in g.get().samples])
        sync(partial)
        manifest = {"format": FORMAT, "miles": _version(), "state": asdict(state), "files": _describe(partial)}
        write_whole(partial / MANIFEST, json.dumps(manifest, indent=1))
        return _give_name(partial)


def prune(newest: Path, keep: int) -> None:
    """Remove all cuts but ``newest`` and the ``keep`` − 1 before it. One of a later step is damaged, or the run had gone on from there."""
    with _committing:
        cuts = _newest_first(newest.parent)
        for old in cuts[cuts.index(newest) + keep :]:
            shutil.rmtree(old)


def newest(checkpoints: Path, expected_hash: str) -> tuple[Path, CutState, list[str]]:
    """The newest complete cut of this configuration. One that only lacked its name gets it.

    Returns:
        Its directory, its state, and a sentence for each one that was passed over: unfinished, or newer and damaged.

    Raises:
        CheckpointError: There is none, it cannot be read though nothing says that it is damaged, or it belongs to another configuration or
            version of Miles.
    """
    passed_over: list[str] = []
    for partial in sorted(checkpoints.glob("step-*.partial")):
        if (partial / MANIFEST).is_file():  # killed between its last two moments
            _give_name(partial)
        else:
            passed_over.append(f"{partial.name} was not finished and was passed over")
    for directory in _newest_first(checkpoints):
        try:
            state, writer = _read(directory)
        except _Damaged as error:
            passed_over.append(f"{directory.name} is damaged ({error}) and was passed over")
            continue
        if state.config_hash != expected_hash:
            fix = "Put the run's own config.yaml back" if writer == _version() else f"Resume it with Miles {writer}, which wrote it"
            raise CheckpointError(
                f"{directory} was written by another configuration (hash {state.config_hash}, config.yaml has {expected_hash}). {fix}, "
                "or start a new run."
            )
        return directory, state, passed_over
    details = "; ".join(passed_over) or "no step was saved before the run ended"
    raise CheckpointError(f"{checkpoints} holds no complete cut: {details}. Start the run anew with miles run.")


def any_finished(checkpoints: Path) -> bool:
    """Whether a cut was ever finished, be it damaged since."""
    return bool(_newest_first(checkpoints)) or any(checkpoints.glob(f"step-*.partial/{MANIFEST}"))


def read(directory: Path) -> CutState:
    """What one cut says, once all its files are found to be what it says of them; nothing is changed, so that a run may go on meanwhile.

    Raises:
        CheckpointError: It is damaged, or another version of Miles wrote it.
    """
    try:
        return _read(directory)[0]
    except _Damaged as error:
        raise CheckpointError(f"{directory} is damaged: {error}. Use another step's.") from error


def read_ready(directory: Path, state: CutState) -> list[GroupRef]:
    """The groups that were complete in the buffer."""
    if not state.ready:
        return []
    samples = iter(load_samples(directory / "buffer.safetensors"))
    return [GroupRef.of(Group(id, [next(samples) for _ in range(n)]), position) for id, position, n in state.ready]


def _give_name(partial: Path) -> Path:
    """Make a complete cut one that counts, in place of one of the same step. Killed in between, ``newest`` does it again."""
    final = partial.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    sync_one(final.parent)
    return final


def _newest_first(checkpoints: Path) -> list[Path]:
    cuts = {int(found[1]): p for p in checkpoints.glob("step-*") if (found := re.fullmatch(r"step-(\d+)", p.name))}
    return [cuts[step] for step in sorted(cuts, reverse=True)]


class _Damaged(Exception):
    """A cut is not what its manifest says."""


def _check_format(directory: Path, manifest: dict[str, Any]) -> None:
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{directory} has the format {manifest['format']!r}, written by Miles {manifest['miles']}; Miles "
            f"{_version()} reads {FORMAT!r}. Resume the run with the version that wrote it."
        )


def _describe(directory: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): {"bytes": p.stat().st_size, "blake2b": _digest(p)} for p in files}


def _verify(directory: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, wanted in files.items():
        path = directory / name
        if not path.is_file():
            raise _Damaged(f"{name} is missing; the manifest says {wanted['bytes']} bytes")
        if path.stat().st_size != wanted["bytes"]:
            raise _Damaged(f"{name} has {path.stat().st_size} bytes; the manifest says {wanted['bytes']}")
        if (found := _digest(path)) != wanted["blake2b"]:
            raise _Damaged(f"{name} has the hash {found}; the manifest says {wanted['blake2b']}")


def _read(directory: Path) -> tuple[CutState, str]:
    """What a cut says once all its files are what it says of them, and the version of Miles that wrote it.

    Raises:
        _Damaged: They are not.
        CheckpointError: Another version of Miles wrote it; or the system does not let us read it, which is no damage: going on from an
            older cut would undo steps for nothing.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        _check_format(directory, manifest)
        _verify(directory, manifest["files"])
        return CutState(**manifest["state"]), manifest["miles"]
    except FileNotFoundError as error:
        raise _Damaged(f"{MANIFEST} is missing") from error
    except OSError as error:
        if error.errno in BROKEN:
            raise _Damaged(f"{error.filename or directory} cannot be read: {error.strerror}") from error
        raise CheckpointError(
            f"{error.filename or directory} cannot be read: {error.strerror or error}. That is no damage: see to it, then do this again."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"{MANIFEST} cannot be read: {type(error).__name__}: {error}") from error


def _not_written(checkpoints: Path, step: int, error: OSError) -> str:
    """The sentence of a cut that could not be written."""
    before = next(iter(_newest_first(checkpoints)), None)
    size = sum(p.stat().st_size for p in before.rglob("*") if p.is_file()) if before else 0
    last = f"The last good cut, {before.name}, takes {size:,} bytes" if before else "There is no cut before it"
    return f"the cut of step {step} cannot be written: {trouble(checkpoints, error)} {last}."


def _version() -> str:
    return metadata.version("miles-core")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
