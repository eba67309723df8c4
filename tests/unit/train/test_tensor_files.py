"""What a checkpoint's tensors are held to before anything of them is used."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from miles_core.errors import CheckpointError
from miles_train.tensor_files import read_tensors

SHAPES = {"a": torch.Size([2, 3]), "b": torch.Size([])}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": torch.ones(3, 2)}, r"'a' is torch\.float32 \[3, 2\], this model needs float32 \[2, 3\]"),
        ({"a": torch.ones(2, 3).half()}, r"'a' is torch\.float16"),
        ({"c": torch.ones(1)}, r"holds 'c', which this model does not have: it belongs to another model"),
        ({"a": torch.tensor([[1.0, torch.nan, 3.0], [torch.inf, 5.0, 6.0]])}, r"2 of 6 numbers in 'a' are NaN or infinite"),
        ({"a": torch.ones(2, 3), "b": torch.tensor(-torch.inf)}, r"1 of 1 numbers in 'b' are NaN or infinite\. Use an earlier checkpoint"),
    ],
)
def test_a_tensor_that_does_not_belong_is_named_with_its_file(tmp_path, tensors, said):
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"weights.safetensors.*{said}"):
        read_tensors(path, SHAPES)


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(2, 3)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors cannot be read: .* use an earlier one"):
        read_tensors(path, SHAPES)


def test_what_belongs_comes_back(tmp_path):
    path = tmp_path / "weights.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2.0)}
    save_file(tensors, path)
    read = read_tensors(path, SHAPES)
    assert read.keys() == tensors.keys() and all(torch.equal(read[n], t) for n, t in tensors.items())
