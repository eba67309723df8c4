"""The quick start in ``numerics: bitwise``, killed by SIGKILL at seeded moments of every phase: after ``miles resume`` it is the
undisturbed run, metrics (but for clocks), weights and trajectories.

Default mode promises that nothing is lost and nothing done twice, not that numbers are equal to the last bit (DESIGN §6); on one thread
they were in all runs so far (``MILES_KILL_OVERRIDES=numerics=default``). ``MILES_KILLS=200 pytest -m slow tests/chaos`` kills more often;
``MILES_KILL_OVERRIDES`` has the overrides of every run, separated by blanks.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from fixtures.kills import KILLED, PHASES, Aim, Warm, assert_same, plan, start

KILLS = int(os.environ.get("MILES_KILLS", "20"))


def killed_and_resumed(warm: Warm, directory: Path, aims: list[Aim]) -> Path:
    """The run, killed at each aim, and resumed after the last until it is done. A late kill may come when all is done already."""
    run, said = directory / "runs" / "run", directory / "out.txt"
    assert start(warm, directory, aim=aims[0]) == -9, said.read_text()
    for aim in [*aims[1:], None]:
        code = warm.miles(directory, "resume", "runs/run", aim=aim)
        if code == 0 or (code == 1 and "runs/run is finished (8 steps)" in said.read_text()):
            return run
        assert code == -9, said.read_text()
    raise AssertionError(f"killed without an aim: {said.read_text()}")


def check(warm: Warm, undisturbed: Path, directory: Path, seed: int, places: list[str]) -> None:
    aims = plan(seed, undisturbed, places)
    try:
        assert_same(killed_and_resumed(warm, directory, aims), undisturbed)
    except AssertionError as error:
        error.add_note(f"seed {seed}: {aims}; it was killed like this:\n{(directory / KILLED).read_text()}")
        raise
    shutil.rmtree(directory)


def test_killed_four_times_it_is_the_undisturbed_run(warm, undisturbed, tmp_path):
    check(warm, undisturbed, tmp_path, 7, ["reward", "train", "save", "resume"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_in_any_phase_it_is_the_undisturbed_run(warm, undisturbed, tmp_path, seed):
    place = PHASES[seed % len(PHASES)]
    check(warm, undisturbed, tmp_path, seed, ["rollout", "resume"] if place == "resume" else [place])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 100 + KILLS // 10))
def test_killed_in_every_phase_it_is_the_undisturbed_run(warm, undisturbed, tmp_path, seed):
    check(warm, undisturbed, tmp_path, seed, list(PHASES))


BROKEN = """
from pathlib import Path

class Broken:
    def after_publish(self, loop):
        if loop.version == 6 and not Path("failed").exists():
            Path("failed").touch()
            raise OSError("the room with the rewards is on fire")
"""


def test_a_step_after_which_something_failed_is_whole_after_resume(warm, undisturbed, tmp_path):
    """The cut that is taken at a failure counts the step as done, so nobody would write its row and trajectories later."""
    (tmp_path / "broken.py").write_text(BROKEN)
    assert start(warm, tmp_path, "hooks.broken.use=broken:Broken") == 70  # an error that is not ours goes on as it is
    said = (tmp_path / "out.txt").read_text()
    assert "the room with the rewards is on fire" in said and "What was learned is saved" in said
    assert warm.miles(tmp_path, "resume", "runs/run") == 0
    assert_same(tmp_path / "runs" / "run", undisturbed)


def test_a_run_that_somebody_writes_to_is_not_resumed(warm, undisturbed, tmp_path):
    from miles_core.run_dir import RunDir

    shutil.copytree(undisturbed, tmp_path / "run")
    with RunDir.open(tmp_path / "run").writing():
        assert warm.miles(tmp_path, "resume", "run") == 1
    assert f"run is in use: process {os.getpid()} on " in (tmp_path / "out.txt").read_text()
