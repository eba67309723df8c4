"""Low-rank adapters in transformers models: put in by PEFT, read and written as its files (``lora.py``). PEFT is loaded where one is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, DataError, PluginError
from .lora import BASE_DIGEST, CONFIG, WEIGHTS, Lora, base_digest, check_base, lacks_peft, read_config, tokenizer_of
from .tokenizers import TOKENIZER_FILES

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

NAME = "default"
"""PEFT's name for a model's only adapter."""
PREFIX = "base_model.model."
"""What PEFT's files put before a model's own names."""


class Adapter:
    """A model's low-rank adapter; the model's own weights are frozen.

    Attributes:
        parameters: By the model's own names, in its order.
        lora: What it was made of.
    """

    def __init__(self, model: PreTrainedModel, lora: Lora, source: Path) -> None:
        """Put it in. Its numbers are those it begins with: of a new one B is 0, so that the model's are as they were.

        Args:
            model: In evaluation mode; its linear modules are replaced by PEFT's, in its dtype.
            lora: Which.
            source: Hugging Face directory that the model was read from.

        Raises:
            ConfigError: It has no such modules, or they are of a kind that gets none here.
            DataError: The adapter to begin with belongs to another model.
            PluginError: PEFT is not installed.
        """
        if lacking := lacks_peft():
            raise PluginError(lacking)
        import torch

        self.lora = lora
        self._source = source
        self._digest = base_digest(source)
        self._config = _peft_config(model, lora)
        saved = None if lora.directory is None else read_tensors(lora.directory)
        if lora.directory is not None:
            self.check_base(lora.directory)
        with torch.random.fork_rng():
            torch.manual_seed(lora.seed)
            self._tuner = _inject(model, self._config, lora)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names = {name: PREFIX + name.replace(f".{NAME}.", ".") for name in self.parameters}
        if saved is not None:
            self._take(saved)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """(name in adapter_model.safetensors, detached tensor) of every weight."""
        yield from self.in_file({name: parameter.detach() for name, parameter in self.parameters.items()}).items()

    def in_file(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same by their names in adapter_model.safetensors."""
        return {self._names[name]: tensor for name, tensor in weights.items()}

    def own_names(self) -> dict[str, str]:
        """The model's own name of each weight by that in the file."""
        return {theirs: own for own, theirs in self._names.items()}

    def check_base(self, directory: Path) -> None:
        """Raise a DataError if the adapter in a PEFT directory says that it was trained beside other weights than these."""
        check_base(directory, self._source, self._digest)

    @contextmanager
    def noisy(self) -> Generator[None]:
        """B is noise meanwhile: what is compared then has an adapter that does something. A new one's is 0."""
        import torch

        generator = torch.Generator().manual_seed(0)
        before = {name: p.detach().clone() for name, p in self.parameters.items() if ".lora_B." in name}
        with torch.no_grad():
            for name in before:
                p = self.parameters[name]
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in before.items():
                    self.parameters[name].copy_(tensor)

    def masters(self) -> dict[str, nn.Parameter]:
        """float32 copies of the parameters; of an adapter that was read, with all digits of its file."""
        import torch

        saved = {} if self.lora.directory is None else read_tensors(self.lora.directory)
        return {
            name: torch.nn.Parameter(saved.get(self._names[name], p.detach()).to(p.device, torch.float32, copy=True))
            for name, p in self.parameters.items()
        }

    def write(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """A PEFT directory and the tokenizer's files; once adapter_config.json is there, all is.

        ``weights``: by the model's own names, where those that count are elsewhere."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(tokenizer_of(self.lora.directory, self._source), directory)
        tensors = {name: tensor.contiguous() for name, tensor in (self.named() if weights is None else self.in_file(weights).items())}
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt", BASE_DIGEST: self._digest})
        fields = self._config.to_dict() | {"base_model_name_or_path": self.lora.base, "revision": None, "inference_mode": True}
        said = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
        (directory / CONFIG).write_text(json.dumps(said, indent=2, sort_keys=True))

    def merge(self) -> PreTrainedModel:
        """The model with the adapter added to its weights; this object is of no use afterwards."""
        return self._tuner.merge_and_unload()

    def _take(self, saved: dict[str, Tensor]) -> None:
        import torch

        kind = type(self._tuner.model).__name__
        wrong = f"the adapter in {self.lora.directory} belongs to another model than this {kind} ({self._source})"
        own = self.own_names()
        if strange := sorted(saved.keys() ^ own.keys()):
            has = "has" if strange[0] in saved else "lacks"
            raise DataError(f"{wrong}: it {has} {strange[0]!r} ({len(strange)} such). Give the model that it was trained on")
        with torch.no_grad():
            for name, tensor in saved.items():
                place = self.parameters[own[name]]
                if place.shape != tensor.shape:
                    raise DataError(
                        f"{wrong}: its {name!r} is {list(tensor.shape)}, this model needs {list(place.shape)}. "
                        "Give the model that it was trained on"
                    )
                if not tensor.isfinite().all():
                    raise DataError(f"the adapter in {self.lora.directory} holds NaN or infinity in {name!r}; use an earlier one")
                place.copy_(tensor)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The weights of a PEFT directory. Raises DataError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        pickled = (
            " (a pickled adapter_model.bin is not read: save it as safetensors)" if (directory / "adapter_model.bin").is_file() else ""
        )
        raise DataError(f"{directory / WEIGHTS} cannot be read: {error}{pickled}") from error


def merge(adapter: Path, base: Path, directory: Path) -> None:
    """Write the model in ``base`` with the adapter added to its weights as a Hugging Face directory, in the base's dtype.

    Raises ConfigError or DataError where they do not belong together, or the base lacks weights or holds NaN.
    """
    from transformers import AutoModelForCausalLM

    from .model_files import read_model, refuse_missing, refuse_not_finite

    directory.parent.mkdir(parents=True, exist_ok=True)
    model, missing = read_model(AutoModelForCausalLM, base, dtype="auto")
    refuse_missing(model, base, missing)
    refuse_not_finite(model.named_parameters(), base)
    beside = Adapter(model.eval(), Lora(str(base), adapter), base)
    for name, tensor in beside.masters().items():
        beside.parameters[name].data = tensor.data  # the sum is rounded once
    whole = beside.merge()
    with TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        written = Path(scratch) / "model"
        whole.save_pretrained(written)
        copy_tokenizer(tokenizer_of(adapter, base), written)
        written.rename(directory)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Take the tokenizer's files of a model over."""
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, directory / file.name)


def _peft_config(model: PreTrainedModel, lora: Lora) -> Any:
    """PEFT's LoraConfig. Dropout is 0: the numbers of engine and trainer must be the same."""
    from dataclasses import fields

    from peft import LoraConfig

    if lora.directory is not None:
        known = {field.name for field in fields(LoraConfig)}
        options: dict[str, Any] = {key: value for key, value in read_config(lora.directory).items() if key in known}
        options |= {"lora_dropout": 0.0, "inference_mode": False}
        return LoraConfig(**options)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets or _linear_names(model)), task_type="CAUSAL_LM"
    )
    if lora.targets is None:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        # Of a mixture PEFT takes some names for those of the experts, which transformers fuses; what it leaves are linear modules.
        converted = deepcopy(config)
        convert_peft_config_for_transformers(converted, model, None)
        config.target_modules = converted.target_modules
    return config


def _linear_names(model: PreTrainedModel) -> set[str]:
    """Last parts of the names of linear modules but the output projection (PEFT's all-linear, in the short form that others read too)."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linear = (torch.nn.Linear, Conv1D)
    return {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, linear) and module is not head}


def _inject(model: PreTrainedModel, config: Any, lora: Lora) -> Any:
    """PEFT's tuner, its layers put in, once it is known that all of them are linear layers within the model's body."""
    from peft import LoraModel
    from peft.tuners.lora import Linear

    names = sorted(_linear_names(model))
    try:
        tuner = LoraModel(model, config, NAME)
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        where = f"the adapter in {lora.directory}" if lora.directory else "lora"
        raise ConfigError(f"{where} does not fit {type(model).__name__}, whose linear modules are {', '.join(names)}: {reason}") from error
    found = tuner.targeted_module_names
    for target in lora.targets or ():
        if not any(name == target or name.endswith(f".{target}") for name in found):
            raise ConfigError(f"lora.targets: {type(model).__name__} has no linear module {target!r}; it has {', '.join(names)}")
    if fused := tuner.targeted_parameter_names:
        raise ConfigError(f"an adapter of {fused[0]!r}, experts that are fused, is not served: linear modules get one ({', '.join(names)})")
    ends = [module for module in (model.get_output_embeddings(), model.get_input_embeddings()) if module is not None]
    for name, module in ((name, model.get_submodule(name)) for name in found):
        if not isinstance(module, Linear) or module in ends:
            raise ConfigError(
                f"an adapter at {name!r} ({type(module).__name__}) is not served: linear modules of layers get one ({', '.join(names)}), "
                "embeddings and output projection do not"
            )
    return tuner
