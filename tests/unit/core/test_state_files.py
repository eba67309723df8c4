"""State dicts to files and back, without pickle."""

from __future__ import annotations

import pytest

from miles_core.errors import CheckpointError, DataError
from miles_core.state_files import load_state, save_state


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def equal(a, b, torch):
    """Same types, same structure, same bits."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k], torch) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(equal(x, y, torch) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def test_an_optimizer_comes_back_as_it_was(torch, tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for _ in range(3):
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        schedule.step()
    state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    save_state(state, tmp_path)
    assert equal(load_state(tmp_path), state, torch)

    fresh = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters(), lr=0.5)
    fresh.load_state_dict(load_state(tmp_path)["optimizer"])
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_shared_memory_odd_keys_and_empty_things(torch, tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3)
    state = {
        "a": tensor,
        "b": tensor.T,
        3: [(), [], {}, None, True, "x", 1.5],
        "n": {0: torch.tensor(7), "0": torch.tensor([1], dtype=torch.bfloat16)},
    }
    save_state(state, tmp_path)
    assert equal(load_state(tmp_path), state, torch)


@pytest.mark.parametrize(
    ("value", "where"), [(object(), "state.x is a object"), ({1, 2}, "state.x is a set"), ({(1, 2): 3}, r"state.x has the key \(1, 2\)")]
)
def test_what_would_need_pickle_is_named(torch, tmp_path, value, where):
    with pytest.raises(DataError, match=where):
        save_state({"x": value}, tmp_path)


@pytest.mark.parametrize("file", ["state.json", "state.safetensors"])
def test_a_file_that_is_missing_or_cut_is_a_sentence(torch, tmp_path, file):
    save_state({"x": torch.ones(100)}, tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:10])
    with pytest.raises(CheckpointError, match="The checkpoint is incomplete; use an earlier one"):
        load_state(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(tmp_path)
