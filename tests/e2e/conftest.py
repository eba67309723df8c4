"""A miniature of the quick start, and a way to call the command line as a user does, in this process (imports cost seconds)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from fixtures.runs import finish

MINIATURE = """
extends: quickstart
name: mini
trackers: {}
models: {policy: {config: {hidden_size: 32, intermediate_size: 64, head_dim: 8}}}
stages:
  sft: {steps: 2, groups: 8, models: {policy: {trainer: {warmup_steps: 0}}}}
  rl:
    steps: 3
    groups: 2
    rollout: {group_size: 4, sampling: {max_tokens: 8}}
    evaluators: {held_out: {prompts: 8}}
    every: {checkpoint: 1}
"""


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a miniature that ran to its end, for tests that read it; one that changes something copies it."""
    return finish(MINIATURE, tmp_path_factory.mktemp("finished"))


@dataclass(frozen=True)
class Said:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """What went to standard error, on one line."""
        return " ".join(self.err.split())


@pytest.fixture
def miles(monkeypatch, tmp_path, capsys):
    """``miles("run", "mini.yaml", "seed=1")`` in a directory of its own that holds ``mini.yaml``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", sys.path.copy())  # what a test puts beside its recipe is not there for the next one
    monkeypatch.setenv("COLUMNS", "200")
    Path("mini.yaml").write_text(MINIATURE)

    def call(*arguments: str) -> Said:
        from miles_core.cli import main

        for name in [n for n, m in sys.modules.items() if getattr(m, "__file__", None) and str(tmp_path.parent) in str(m.__file__)]:
            del sys.modules[name]

        monkeypatch.setattr("sys.argv", ["miles", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = 0 if exit_.code is None else exit_.code if isinstance(exit_.code, int) else 1
        out, err = capsys.readouterr()
        return Said(code, out, err)

    return call
