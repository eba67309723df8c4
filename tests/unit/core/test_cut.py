"""A cut counts when it is whole: killed at any moment, or damaged afterwards, the one before it is used and that is said."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict

import numpy as np
import pytest
from fixtures.samples import HARD_CASES, random_samples

from miles_core import cut
from miles_core.buffer import Counts
from miles_core.errors import CheckpointError
from miles_core.refs import GroupRef
from miles_core.sample import Group

WEIGHTS = b"weights of step "


def state(step, *, config_hash="abc", **fields):
    given = {"stage": "rl", "step": step, "global_step": step, "position": 4 * step, "in_flight": [], "counts": asdict(Counts())}
    return cut.CutState(**{**given, "config_hash": config_hash, **fields})


def ready_groups():
    """Groups of one and of several samples, with every kind of column."""
    cases = [HARD_CASES[name]() for name in ("tool_turn", "two_branches", "shared_image", "ragged", "moe")]
    return [GroupRef.of(Group(f"g{i}", samples), 10 + i) for i, samples in enumerate(cases)]


def take_cut(checkpoints, step, *, ready=(), keep=9, **fields):
    with cut.begin(checkpoints, step) as partial:
        (partial / "models" / "policy").mkdir(parents=True)
        (partial / "models" / "policy" / "weights.bin").write_bytes(WEIGHTS + str(step).encode())
        described = [(g.id, g.position, len(g.refs)) for g in ready]
        final = cut.commit(partial, state(step, ready=described, **fields), list(ready))
    cut.prune(final, keep)
    return final


def weights_of(directory):
    return (directory / "models" / "policy" / "weights.bin").read_bytes()


# ---- what comes back -----------------------------------------------------------------------------------------------------


def test_state_and_files_come_back(tmp_path):
    counts = Counts(started=9, dropped=2, taken=6, version=3, reasons={"dull": 2})
    directory = take_cut(tmp_path, 3, in_flight=[7, 9], counts=asdict(counts))
    found, read, passed_over = cut.newest(tmp_path, "abc")
    assert found == directory == tmp_path / "step-000003" and passed_over == []
    assert read == state(3, in_flight=[7, 9], counts=asdict(counts))
    assert read.buffer_counts() == counts
    assert weights_of(found) == WEIGHTS + b"3"
    assert cut.read_ready(found, read) == []


def test_groups_that_were_ready_come_back_as_they_were(tmp_path):
    ready = ready_groups()
    directory = take_cut(tmp_path, 1, ready=ready)
    _, read, _ = cut.newest(tmp_path, "abc")
    back = cut.read_ready(directory, read)
    assert [(g.id, g.position, len(g.refs)) for g in back] == [(g.id, g.position, len(g.refs)) for g in ready]
    for was, now in zip(ready, back, strict=True):
        for a, b in zip(was.refs, now.refs, strict=True):
            assert (a.id, a.length, a.sampled, a.trained, a.reward, a.versions, a.status) == (
                b.id, b.length, b.sampled, b.trained, b.reward, b.versions, b.status,
            )  # fmt: skip
            assert a.get().columns.keys() == b.get().columns.keys()
            np.testing.assert_array_equal(a.get().logprobs, b.get().logprobs)
            assert (a.get().spans, a.get().turns, a.get().rewards) == (b.get().spans, b.get().turns, b.get().rewards)


@pytest.mark.parametrize("seed", range(3))
def test_random_groups_come_back(tmp_path, seed):
    by_group = {}
    for sample in random_samples(seed, groups=4):
        by_group.setdefault(sample.id.group, []).append(sample)
    ready = [GroupRef.of(Group(g, samples), i) for i, (g, samples) in enumerate(by_group.items())]
    directory = take_cut(tmp_path, 1, ready=ready)
    back = cut.read_ready(directory, cut.newest(tmp_path, "abc")[1])
    assert [r.id for g in back for r in g.refs] == [r.id for g in ready for r in g.refs]
    assert all(
        np.array_equal(a.get().tokens, b.get().tokens)
        for x, y in zip(ready, back, strict=True)
        for a, b in zip(x.refs, y.refs, strict=True)
    )


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        take_cut(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000010"]


def test_newest_goes_by_number_and_looks_at_cuts_only(tmp_path):
    take_cut(tmp_path, 999_999)
    take_cut(tmp_path, 1_000_000)
    shutil.copytree(tmp_path / "step-999999", tmp_path / "step-999999-copy-of-mine")
    assert cut.newest(tmp_path, "abc")[1].step == 1_000_000
    take_cut(tmp_path, 1_000_001, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1000001", "step-999999-copy-of-mine"]


def test_a_cut_of_the_same_step_is_replaced(tmp_path):
    take_cut(tmp_path, 2, in_flight=[1])
    take_cut(tmp_path, 2, in_flight=[5])
    assert cut.newest(tmp_path, "abc")[1].in_flight == [5]


# ---- what is refused -----------------------------------------------------------------------------------------------------


def test_no_cut_at_all(tmp_path):
    assert not cut.any_finished(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no complete cut: no step was saved .* Start the run anew"):
        cut.newest(tmp_path, "abc")


def test_a_cut_of_another_configuration_is_refused(tmp_path):
    take_cut(tmp_path, 3, config_hash="other")
    with pytest.raises(CheckpointError, match=r"step-000003 was written by another configuration \(hash other, config\.yaml has abc\)"):
        cut.newest(tmp_path, "abc")
    manifest = tmp_path / "step-000003" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"miles": "7.1"}))  # whose defaults may be others
    with pytest.raises(CheckpointError, match=r"another configuration .* Resume it with Miles 7\.1, which wrote it, or start a new run"):
        cut.newest(tmp_path, "abc")


def test_a_cut_of_another_version_is_refused_with_both_versions(tmp_path):
    manifest = take_cut(tmp_path, 3) / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"format": "miles-cut-9", "miles": "7.1"}))
    said = r"step-000003 has the format 'miles-cut-9', written by Miles 7\.1; Miles \S+ reads 'miles-cut-1'\. Resume .* wrote it"
    with pytest.raises(CheckpointError, match=said):
        cut.newest(tmp_path, "abc")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "weights truncated": lambda d: truncate(d / "models" / "policy" / "weights.bin"),
    "weights flipped": lambda d: flip(d / "models" / "policy" / "weights.bin"),
    "weights gone": lambda d: (d / "models" / "policy" / "weights.bin").unlink(),
    "buffer flipped": lambda d: flip(d / "buffer.safetensors"),
    "manifest truncated": lambda d: truncate(d / "manifest.json"),
    "manifest gone": lambda d: (d / "manifest.json").unlink(),
    "manifest empty": lambda d: (d / "manifest.json").write_text(""),
    "manifest is a list": lambda d: (d / "manifest.json").write_text("[]"),
    "manifest without a state": lambda d: (d / "manifest.json").write_text('{"format": "miles-cut-1", "files": {}}'),
    "empty": lambda d: [shutil.rmtree(d), d.mkdir()],
}


SAID = {
    "weights truncated": "models/policy/weights.bin has 16 bytes; the manifest says 17",
    "weights flipped": "models/policy/weights.bin has the hash ",
    "weights gone": "models/policy/weights.bin is missing; the manifest says 17 bytes",
    "buffer flipped": "buffer.safetensors has the hash ",
    "manifest gone": "manifest.json is missing",
}
"""What was found and what was expected; of other damage, only which file it is in."""


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cut_is_passed_over_and_named(tmp_path, damage):
    take_cut(tmp_path, 2)
    newer = take_cut(tmp_path, 3, ready=ready_groups())
    DAMAGE[damage](newer)
    found, read, passed_over = cut.newest(tmp_path, "abc")
    assert read.step == 2 and weights_of(found) == WEIGHTS + b"2"
    assert len(passed_over) == 1 and passed_over[0].startswith("step-000003 is damaged (")
    assert SAID.get(damage, "manifest.json") in passed_over[0], passed_over

    shutil.rmtree(found)
    with pytest.raises(CheckpointError, match=r"no complete cut: step-000003 is damaged"):
        cut.newest(tmp_path, "abc")


def test_a_damaged_newer_cut_does_not_push_out_the_good_ones(tmp_path):
    """The run goes on from step 2; its next cuts are older by number than the damaged one."""
    take_cut(tmp_path, 2)
    truncate(take_cut(tmp_path, 9) / "models" / "policy" / "weights.bin")
    take_cut(tmp_path, 3, keep=1)
    assert cut.newest(tmp_path, "abc")[1].step == 3
    assert not (tmp_path / "step-000002").exists()


# ---- killed --------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing after it is done."""


def boundaries(monkeypatch, kill_at):
    """Count what ``commit`` does to the disk; die instead of the ``kill_at``-th thing."""
    done = []

    def watched(module, name):
        function = getattr(module, name)

        def call(*arguments, **options):
            if len(done) == kill_at:
                raise Killed
            done.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    for module, name in (
        (cut, "save_samples"),
        (cut, "_describe"),
        (cut, "write_whole"),
        (os, "fsync"),
        (os, "replace"),
        (shutil, "rmtree"),
    ):
        watched(module, name)
    return done


def test_killed_before_any_of_its_steps_the_cut_before_is_there(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    with monkeypatch.context() as patch:
        take_cut(whole, 1)
        take_cut(whole, 2)
        done = boundaries(patch, kill_at=-1)
        take_cut(whole, 3, ready=ready_groups(), keep=2)
    assert {"save_samples", "_describe", "write_whole", "fsync", "replace", "rmtree"} <= set(done)

    outcomes = []
    for kill_at in range(len(done)):
        checkpoints = tmp_path / f"killed-{kill_at}"
        take_cut(checkpoints, 1)
        take_cut(checkpoints, 2)
        with monkeypatch.context() as patch:
            boundaries(patch, kill_at)
            with pytest.raises(Killed):
                take_cut(checkpoints, 3, ready=ready_groups(), keep=2)
        found, read, passed_over = cut.newest(checkpoints, "abc")
        assert weights_of(found) == WEIGHTS + str(read.step).encode()
        assert len(cut.read_ready(found, read)) == len(read.ready)
        if read.step == 2:
            assert passed_over == ["step-000003.partial was not finished and was passed over"]
        outcomes.append(read.step)

        take_cut(checkpoints, 4, keep=2)  # the next life goes on, and clears up
        assert cut.newest(checkpoints, "abc")[1:] == (state(4), [])
        assert weights_of(checkpoints / f"step-{read.step:06d}") == WEIGHTS + str(read.step).encode()  # the one before it is kept
        assert not list(checkpoints.glob("*.partial"))
    assert outcomes == sorted(outcomes) and {2, 3} == set(outcomes)  # first the old one, from one moment on the new one


def test_killed_while_it_replaces_a_cut_of_the_same_step_one_of_them_is_there(tmp_path, monkeypatch):
    """A stage that is stopped before its first step is cut at the step at which the stage before it was."""
    with monkeypatch.context() as patch:
        take_cut(tmp_path / "whole", 2, keep=1)
        done = boundaries(patch, kill_at=-1)
        take_cut(tmp_path / "whole", 2, keep=1, in_flight=[5])
    outcomes = []
    for kill_at in range(len(done)):
        checkpoints = tmp_path / f"killed-{kill_at}"
        take_cut(checkpoints, 2, keep=1)
        with monkeypatch.context() as patch:
            boundaries(patch, kill_at)
            with pytest.raises(Killed):
                take_cut(checkpoints, 2, keep=1, in_flight=[5])
        outcomes.append(cut.newest(checkpoints, "abc")[1].in_flight)
    assert outcomes == sorted(outcomes) and outcomes[0] == [] and outcomes[-1] == [5]


def test_killed_in_the_middle_of_a_file(tmp_path, monkeypatch):
    take_cut(tmp_path, 2)

    fsync = os.fsync

    def half(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("manifest.json.partial"):
            os.ftruncate(descriptor, 40)
            raise Killed
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", half)
        with pytest.raises(Killed):
            take_cut(tmp_path, 3)
    assert cut.newest(tmp_path, "abc")[1].step == 2


def test_trainers_files_are_in_place_before_the_manifest(tmp_path, monkeypatch):
    """The manifest is the last thing written: whatever it lists was there, with these bytes, before it."""
    write, looked = cut.write_whole, []

    def look(path, text):
        manifest = json.loads(text)
        directory = tmp_path / "step-000001.partial"
        for name, described in manifest["files"].items():
            assert (directory / name).stat().st_size == described["bytes"]
        assert sorted(manifest["files"]) == ["buffer.safetensors", "models/policy/weights.bin"]
        looked.append(path.name)
        write(path, text)

    monkeypatch.setattr(cut, "write_whole", look)
    take_cut(tmp_path, 1, ready=ready_groups())
    assert looked == ["manifest.json"]


# ---- on the disk itself --------------------------------------------------------------------------------------------------


def test_files_and_directories_are_on_the_disk_before_the_manifest_and_the_manifest_before_the_name(tmp_path, monkeypatch):
    """The order of fsync and rename is what a power cut leaves whole."""
    order = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        order.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        fsync(descriptor)

    def note_replace(source, target):
        order.append(f"→ {os.path.relpath(target, tmp_path)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    take_cut(tmp_path, 1, ready=ready_groups())
    cut_ = "step-000001.partial"
    named = order.index(f"→ {cut_}/manifest.json")
    files = {f"{cut_}/buffer.safetensors", f"{cut_}/models/policy/weights.bin"}
    directories = {f"{cut_}/models/policy", f"{cut_}/models", cut_}
    assert files | directories | {f"{cut_}/manifest.json.partial"} <= set(order[:named])
    assert order[named + 1 :] == [cut_, "→ step-000001", "."]


@pytest.fixture
def small_disk(tmp_path):
    """A directory on a file system of 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and CAP_SYS_ADMIN")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def write_weights(partial, size):
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(size // 4, np.float32)}, partial / "weights.safetensors")  # its error is safetensors' own


@pytest.mark.parametrize("where", ["trainer", "buffer"])
def test_a_full_disk_names_path_and_room_and_leaves_the_cut_before_it(small_disk, where):
    good = take_cut(small_disk, 1)
    (small_disk / "filler").write_bytes(bytes(100_000))
    sizes = sum(p.stat().st_size for p in good.rglob("*") if p.is_file())
    large = [GroupRef.of(Group(f"g{i}", random_samples(i, groups=1)), i) for i in range(400)] if where == "buffer" else []
    with pytest.raises(cut.CutNotWritten) as found, cut.begin(small_disk, 2) as partial:
        write_weights(partial, 1_000 if where == "buffer" else 200_000)
        cut.commit(partial, state(2), large)
    said = str(found.value)
    assert said.startswith(f"the cut of step 2 cannot be written: the disk of {small_disk} is full (No space left on device")
    assert "Make room, or lower keep_checkpoints. The last good cut, step-000001, takes " in said
    free, room = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes", said))
    assert room == sizes and free == shutil.disk_usage(small_disk).free
    assert sorted(p.name for p in small_disk.iterdir()) == ["filler", "step-000001"]  # what was written of it takes no room
    assert cut.newest(small_disk, "abc")[1] == state(1)
    (small_disk / "filler").unlink()
    take_cut(small_disk, 2)
    assert cut.newest(small_disk, "abc")[1] == state(2)


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.EDQUOT, "Make room, or lower keep_checkpoints"), (errno.EIO, "Look at the system's log for it")]
)
def test_a_quota_and_a_broken_disk_are_sentences_too(tmp_path, monkeypatch, code, advice):
    take_cut(tmp_path, 1)

    def fails(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(cut.CutNotWritten, match=rf"the cut of step 2 cannot be written: .*{os.strerror(code)}.*{advice}.*step-000001"):
        take_cut(tmp_path, 2)
    assert cut.newest(tmp_path, "abc")[1].step == 1


def test_another_error_goes_on_as_it_is_and_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="ranks are gone"), cut.begin(tmp_path, 1):
        raise CheckpointError("ranks are gone")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "damaged"), [(errno.EIO, True), (errno.EACCES, False), (errno.EMFILE, False), (errno.ESTALE, False)])
def test_what_cannot_be_read_just_now_is_not_damaged(tmp_path, monkeypatch, number, damaged):
    """Going on from the cut before would undo steps; only what the disk lost is passed over."""
    for step in (1, 2):
        take_cut(tmp_path, step)
    digest = cut._digest

    def fails(path):
        if "step-000002" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return digest(path)

    monkeypatch.setattr(cut, "_digest", fails)
    if damaged:
        found, _, passed_over = cut.newest(tmp_path, "abc")
        assert found.name == "step-000001" and "step-000002 is damaged" in passed_over[0] and "weights.bin cannot be read" in passed_over[0]
        return
    for read in (lambda: cut.newest(tmp_path, "abc"), lambda: cut.read(tmp_path / "step-000002")):
        with pytest.raises(CheckpointError, match=rf"weights\.bin cannot be read: {os.strerror(number)}\. That is no damage: see to it"):
            read()
