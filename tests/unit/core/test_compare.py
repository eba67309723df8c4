"""Metrics of runs side by side, against what was written."""

from __future__ import annotations

import json

import pytest

from miles_core.errors import ConfigError
from miles_core.inspection.compare import RunMetrics, chosen_metrics, differences, draw, flat, labels
from miles_core.run_dir import RunDir


def run_of(tmp_path, name: str, config: str, rows: list[dict]) -> RunMetrics:
    run = RunDir.create(tmp_path, name)
    run.config.write_text(config)
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunMetrics.read(run)


def test_final_best_and_at_a_step(tmp_path):
    rewards = [0.1, 0.9, 0.9, 0.4]
    rows = [{"step": 1, "stage": "rl", "version": 0, "eval/held_out/avg@1": 0.2}]  # the evaluation before the first step
    rows += [{"step": n, "stage_step": n, "reward": r, "loss": r - 1, "entropy": r} for n, r in enumerate(rewards, 1)]
    rows[1]["loss"] = float("nan")
    run = run_of(tmp_path, "a", "name: a\n", rows)
    assert run.steps == 4 and set(run.series) == {"eval/held_out/avg@1", "reward", "loss", "entropy"}
    assert run.final("reward") == (4, 0.4) and run.best("reward") == (2, 0.9) and run.at("reward", 3) == 0.9
    assert run.best("loss") == (4, -0.6)  # the lowest; a NaN is none
    assert run.best("entropy") is None  # neither more nor less is better
    assert run.at("reward", 9) is None and run.final("kl") is None and run.best("kl") is None


def test_only_of_what_is_success_more_is_better(tmp_path):
    more = ("reward", "tokens_per_second", "eval/held_out/avg@4", "eval/held_out/pass@16", "eval/held_out/reward")
    neither = (
        "eval/held_out/length",
        "eval/held_out/truncated",
        "eval/held_out/avg@4/std",
        "reward/std",
        "rewards/judge/unscored",
        "entropy",
    )
    less = ("loss", "seconds", "mismatch/mean_abs", "truncated")
    run = run_of(tmp_path, "a", "name: a\n", [{"step": n} | dict.fromkeys(more + neither + less, v) for n, v in enumerate((0.5, 0.9, 0.1))])
    found = {name: run.best(name) for name in run.series}
    assert found == dict.fromkeys(more, (1, 0.9)) | dict.fromkeys(neither) | dict.fromkeys(less, (2, 0.1))


def test_a_step_that_was_logged_twice_counts_with_what_came_last(tmp_path):
    rows = [{"step": 3, "loss": 1.0}, {"step": 3, "eval/x/avg@1": 0.5}, {"step": 3, "loss": 2.0}]
    run = run_of(tmp_path, "a", "name: a\n", rows)
    assert run.series == {"loss": [(3, 2.0)], "eval/x/avg@1": [(3, 0.5)]}


def test_only_keys_that_differ_are_shown(tmp_path):
    a = run_of(tmp_path, "a", "name: a\nseed: 0\nstages: {rl: {steps: 4, rewards: {}, models: {policy: {path: x}}}}\n", [])
    b = run_of(tmp_path, "b", "name: b\nseed: 1\nstages: {rl: {steps: 4, rewards: {f1: {use: f1}}, models: {policy: {path: x}}}}\n", [])
    assert differences([a, b]) == {
        "seed": [0, 1],
        "stages.rl.rewards": [{}, "<not set>"],
        "stages.rl.rewards.f1.use": ["<not set>", "f1"],
    }
    assert differences([a, a]) == {} and a.steps == 0
    assert flat({"a": {"b": [1, {"c": 2}], "d": {}}}) == {"a.b": [1, {"c": 2}], "a.d": {}}


def test_metrics_are_chosen_by_name_or_by_the_beginning_of_it(tmp_path):
    run = run_of(tmp_path, "a", "name: a\n", [{"step": 1, "reward": 1, "eval/x/avg@1": 1, "eval/x/length": 3, "lr": 0.1, "time/train": 1}])
    assert chosen_metrics([run], []) == ["reward", "eval/x/avg@1", "eval/x/length"]
    assert chosen_metrics([run], ["lr", "time/"]) == ["lr", "time/train"]
    with pytest.raises(ConfigError, match=r"none of the runs has a metric 'rewards'. Did you mean 'reward'\?"):
        chosen_metrics([run], ["rewards"])


def test_runs_of_one_name_are_told_apart_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"step": n, "reward": n / 3} for n in range(3)]
    runs = [run_of(tmp_path / d, "mini", "name: mini\n", rows) for d in ("x", "y")]
    assert labels(runs) == [str(tmp_path / "x" / "mini"), str(tmp_path / "y" / "mini")] and labels(runs[:1]) == ["mini"]
    draw(runs, ["reward"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="the plot cannot be written"):
        draw(runs, ["reward"], tmp_path / "no" / "plot.png")


@pytest.mark.parametrize("text", ["a: [", "- 1\n", ""])
def test_a_configuration_that_is_none_is_a_sentence(tmp_path, text):
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        run_of(tmp_path, "a", text, [])
