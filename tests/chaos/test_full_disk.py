"""The quick start on a disk that gets full: it ends with a sentence and with what it has, and goes on once there is room."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.kills import Warm, assert_same, start


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB; ``remount`` makes it another size."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and CAP_SYS_ADMIN")
    yield place
    subprocess.run(["umount", place], check=True)


def remount(place: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", place], check=True)


def used(place: Path) -> int:
    """KiB."""
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize // 1024


def test_a_disk_that_gets_full_again_and_again(warm: Warm, undisturbed: Path, disk: Path, tmp_path: Path) -> None:
    """Each life gets a little more room than what is there; after the last the run is the undisturbed one."""
    run, said = disk / "run", tmp_path / "out.txt"
    remount(disk, 500)
    often = [f"stages.{stage}.every.checkpoint=1" for stage in ("sft", "rl")]
    code, lives = start(warm, tmp_path, f"runs_dir={disk}", "keep_checkpoints=9", *often), 1
    while code != 0 and lives < 30:
        last = said.read_text().rsplit("error", 1)[-1]
        assert code == 1 and "Traceback" not in last, said.read_text()
        sentence = " ".join(last.split())
        assert str(disk) in sentence and "No space left on device" in sentence, sentence
        assert re.search(r"[\d,]+ bytes are free|Is there room on the disk\?", sentence), sentence
        assert f"Go on with: miles resume {run}" in sentence
        assert not list(run.glob("checkpoints/*.partial"))
        remount(disk, used(disk) + 900)
        said.unlink()
        code, lives = warm.miles(tmp_path, "resume", str(run)), lives + 1
    assert code == 0 and lives > 2, said.read_text()
    assert_same(run, undisturbed)
