"""What a SGLang server is started with: its options and its variables, on a CPU and on a GPU."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from miles_core.errors import ConfigError

Scalar = str | int | float | bool

SHIM = Path(__file__).parent / "shim"
HOST = "127.0.0.1"
LEFT_OUT = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
"""Variables of our environment that say where OUR Python looks; and compiled once, SGLang starts in a third of the time."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # the model is a directory; nothing is asked of the network
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",  # /health answers at once instead of sampling a token
    "SGLANG_RETURN_ORIGINAL_LOGPROB": "0",  # log-probabilities are of the distribution a token came from
    "NO_PROXY": HOST,  # its own requests to itself
    "GLOO_SOCKET_IFNAME": "lo",  # its ranks listen for each other, and for weights, on loopback
    "PYTHONUNBUFFERED": "1",  # the log holds what was said before a death
}
CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(SHIM)}
CPU_ARGUMENTS: dict[str, Scalar] = {
    "attention_backend": "torch_native",
    "mem_fraction_static": 0.1,
    "max_total_tokens": 8192,
    "max_running_requests": 16,
    "skip_server_warmup": True,  # there are no kernels to compile
}
ARGUMENTS: dict[str, Scalar] = {"sleep_on_idle": True, "log_level_http": "warning"}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""How model configs call the number of routed experts."""


@dataclass(frozen=True)
class Launch:
    """How to start one server."""

    interpreter: Path
    """Python that has sglang; ``environment.find`` gives one."""
    model_path: Path
    """Hugging Face directory of the weights it starts with."""
    dtype: str
    """Of the weights: float32, bfloat16 or float16."""
    device: str
    """``cpu`` or ``cuda``."""
    arguments: Mapping[str, Scalar]
    """Options of ``sglang.launch_server`` by name, with underscores; True is a bare flag, False leaves one of ours out."""
    environment: Mapping[str, str]
    """Variables for its process, above ours."""
    log: Path
    """File that its output is appended to."""
    boot_seconds: float
    """Deadline of its start."""

    def __post_init__(self) -> None:
        """Raises ConfigError when the device is neither ``cpu`` nor ``cuda``."""
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"a SGLang server runs on 'cpu' or 'cuda', not on {self.device!r}")

    def flags(self) -> list[str]:
        """Every option of the server but its address and key, as on a command line; the user's go above ours.

        Raises ConfigError when the model is not a directory with a readable config.json.
        """
        ours: dict[str, Scalar] = {"model_path": str(self.model_path), "dtype": self.dtype, "device": self.device, **ARGUMENTS}
        if self.device == "cpu":
            ours |= CPU_ARGUMENTS
        if routes_experts(self.model_path):
            ours["enable_return_routed_experts"] = True
        arguments = ours | {name.replace("-", "_"): value for name, value in self.arguments.items()}
        flags: list[str] = []
        for name, value in arguments.items():
            if value is not False:
                flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return flags

    def variables(self, scratch: Path) -> dict[str, str]:
        """The environment of its process, whose temporary directory is ``scratch``."""
        inherited = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
        cpu = CPU_ENVIRONMENT if self.device == "cpu" else {}
        given = dict(self.environment)
        if "PYTHONPATH" in given and "PYTHONPATH" in cpu:
            given["PYTHONPATH"] = f"{cpu['PYTHONPATH']}{os.pathsep}{given['PYTHONPATH']}"
        return {**inherited, **ENVIRONMENT, **cpu, "TMPDIR": str(scratch), **given}


def routes_experts(model_path: Path) -> bool:
    """Whether a model has routed experts, by its config.json. Raises ConfigError when that cannot be read."""
    path = model_path / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{model_path} has no config.json; a SGLang server needs a Hugging Face directory") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    return any((part.get(key) or 0) > 1 for part in (config, config.get("text_config") or {}) for key in EXPERTS)
