"""The model's weights under the names of its checkpoint, as views that can be written to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from miles_core.adapters import Adapter
from miles_core.errors import ConfigError, DataError


class Weights:
    """Every weight of a model by its checkpoint name, tied weights once, in the order of an export.

    transformers fuses some weights on loading (the experts of a layer become one tensor), so that a checkpoint's tensor may be a
    part of a module's. Each is kept here as a view of the module's memory: reading shows what the model holds, writing changes it.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter | None = None) -> None:
        """Raises ConfigError if some weight of the checkpoint is not a regular part of one tensor of the model.

        Args:
            model: The model.
            adapter: All that is replaced, by the names in its file, where there is one: the model's own weights are frozen.
        """
        if adapter is not None:
            self.views, self._aliases = dict(adapter.named()), dict[str, str]()
            return
        state = model.state_dict(keep_vars=True)
        held: dict[int, str] = {}
        for name, tensor in state.items():
            held.setdefault(id(tensor), name)  # of tied weights the first
        own = {name: state[name].detach() for name in held.values()}
        self._aliases = {name: held[id(tensor)] for name, tensor in state.items() if held[id(tensor)] != name}
        shapes = {name: t.shape for name, t in revert_weight_conversion(model, {n: t.to("meta") for n, t in own.items()}).items()}
        found: dict[str, Tensor] = {}
        for name, tensor in own.items():
            found |= _parts(model, name, tensor)
        for name, shape in shapes.items():
            if name not in found or found[name].shape != shape:
                raise ConfigError(
                    f"weight {name!r} of {type(model).__name__} is put together from several; the local engine cannot replace it"
                )
        self.views = {name: found[name] for name in shapes}

    def replace(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy new values in, all or nothing. A tied weight may come under any of its names.

        What lies in the engine's own memory already, because its giver made ``views`` the memory of its parameters, is not copied:
        such weights are new as soon as their giver writes them, so that nothing may be sampled between that and this call.

        Raises:
            DataError: A name is unknown, comes twice or is missing, or a shape or dtype does not fit; nothing was changed.
        """
        given: dict[str, Tensor] = {}
        for name, tensor in weights:
            own_name = self._aliases.get(name, name)
            view = self.views.get(own_name)
            if view is None:
                raise DataError(
                    f"weight {name!r} is unknown to the engine's model; it has {len(self.views)}, such as {next(iter(self.views))!r}"
                )
            if own_name in given:
                raise DataError(f"weight {name!r} comes twice (tied weights are one)")
            if tensor.shape != view.shape or tensor.dtype != view.dtype:
                raise DataError(
                    f"weight {name!r} is {tensor.dtype} {list(tensor.shape)}, the engine holds {view.dtype} {list(view.shape)}; "
                    "give trainer and engine the same model and dtype"
                )
            given[own_name] = tensor
        if missing := [name for name in self.views if name not in given]:
            raise DataError(f"{len(missing)} weights are missing, the first is {missing[0]!r}; an update brings all of them")
        with torch.no_grad():
            for name, tensor in given.items():
                if tensor.data_ptr() != self.views[name].data_ptr() or tensor.stride() != self.views[name].stride():
                    self.views[name].copy_(tensor)


def read_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight in the safetensors files of a Hugging Face directory. Raises DataError where there are none."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise DataError(f"{directory} holds no safetensors files; export the model again")
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 — it is no mapping
                    yield name, weights.get_tensor(name)
        except SafetensorError as error:
            raise DataError(f"{file} cannot be read: {error}; export the model again") from error


def _parts(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A module's tensor as the checkpoint's tensors, all of them views of it."""
    parts = revert_weight_conversion(model, {name: tensor})
    if all(part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for part in parts.values()):
        return parts
    # Some are copies. Converting the tensor of element numbers shows where each came from.
    numbers = torch.arange(tensor.numel()).reshape(tensor.shape)
    return {part_name: _view(part_name, tensor, part) for part_name, part in revert_weight_conversion(model, {name: numbers}).items()}


def _view(name: str, tensor: Tensor, numbers: Tensor) -> Tensor:
    """The view of ``tensor`` whose elements have these numbers. Raises ConfigError if they do not lie in regular steps."""
    offset = int(numbers[(0,) * numbers.dim()])
    expected, strides = torch.tensor(offset), []
    for axis, size in enumerate(numbers.shape):
        stride = int(numbers.select(axis, 1)[(0,) * (numbers.dim() - 1)]) - offset if size > 1 else 1
        strides.append(stride)
        expected = expected.unsqueeze(-1) + stride * torch.arange(size)
    if not torch.equal(expected, numbers):
        raise ConfigError(f"weight {name!r} is rearranged when it is loaded, in a way that the local engine cannot undo")
    return tensor.as_strided(numbers.shape, strides, tensor.storage_offset() + offset)
