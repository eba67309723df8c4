"""Publishing weights by value to a SGLang server, beside a bare copy of the same bytes through the same HTTP stack.

    uv run --locked python benchmarks/publish.py [--interpreter PYTHON]

A random Qwen3 model in bfloat16 (about 200 MB). Taking turns in one run:

- `tensor`: what `weight_transport: tensor` asks of the engine, the whole of `SglangEngine.update_weights`: requests held, every weight
  checked, packed, sent and loaded, version stamped.
- `collective`: the same by `broadcast_weights`, where the bytes go through a process group (made in the round that is thrown away).
- `disk`: what `weight_transport: disk` makes of it where trainer and server share a machine: the weights saved, `load_weights`, deleted.
- `bare`: the same bytes in requests of the same size as those of `tensor` by the same httpx, to FastAPI on uvicorn in SGLang's own
  environment, which reads each body and answers. Nothing is encoded, parsed or loaded.
- `necessary`: what SGLang's interface makes of these bytes at the least, in this process and one after the other: base64 and JSON written
  and read by the calls that both ends use (`base64.b64encode`, `json.loads`, `base64.b64decode(validate=True)`), without any transport.

The numbers are megabytes of weights a second of wall time. Ratios are to `bare`: the bound is 0.5. Beside them stands what one
round cost each process in seconds of processor time; where cores are few or busy, the sums say what the wall clock cannot.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import httpx
import psutil
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from _machine import ROOT, interleave, median_ratio, summary, write_result
from miles_core.protocols import BuildContext
from miles_rollout.plugins import SglangEngineConfig
from miles_rollout.sglang import updates
from miles_rollout.sglang.environment import find

BARE = """
import sys, uvicorn
from fastapi import FastAPI, Request
app = FastAPI()
@app.post("/copy")
async def copy(request: Request):
    return {"bytes": len(await request.body())}
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", loop="uvloop")
"""
START_SECONDS = 60.0
BY_VALUE = {"tensor": updates.IN_REQUESTS, "collective": updates.THROUGH_GROUPS}
BY_TRANSPORT = (*BY_VALUE, "disk")


def save_model(directory: Path, layers: int) -> Path:
    """Untrained, tied embeddings; 25 MB a layer."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory / "model")
    return directory / "model"


class Copying:
    """The ways to hand the weights on; each returns megabytes of weights a second."""

    def __init__(self, model: Path, interpreter: Path, directory: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.model = model
        self.weights = load_file(model / "model.safetensors")
        self.bytes = sum(t.numel() * t.element_size() for t in self.weights.values())
        config = SglangEngineConfig(use="sglang", interpreter=str(interpreter), dtype="bfloat16")
        self.engine = config.build(BuildContext(directory, "benchmark", 0, model_path=model))
        self.version = 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.server = subprocess.Popen([str(interpreter), "-c", BARE, str(port)])
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        flat = torch.cat([t.reshape(-1).view(torch.uint8) for t in self.weights.values()])
        self.pieces = [piece.numpy().tobytes() for piece in flat.split(updates.IN_REQUESTS.bucket_bytes)]

    def start(self) -> None:
        self.loop.run_until_complete(self.engine.start())
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                self.loop.run_until_complete(self.client.post("/copy", content=b""))
                return
            except httpx.ConnectError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)

    def processor_time(self, way: str) -> dict[str, float]:
        """Seconds of processor time that one round costs each process, by name."""
        processes = {p.pid: p for p in (psutil.Process(), *psutil.Process().children(recursive=True))}
        before = {pid: sum(p.cpu_times()[:2]) for pid, p in processes.items()}
        getattr(self, way)()
        spent = {pid: sum(p.cpu_times()[:2]) - before[pid] for pid, p in processes.items()}
        return {" ".join(processes[pid].cmdline())[-60:].strip(): round(s, 2) for pid, s in spent.items() if s > 0.05}

    def _rate(self, began: float) -> float:
        return self.bytes / 1e6 / (time.perf_counter() - began)

    def tensor(self) -> float:
        self.version += 1
        began = time.perf_counter()
        self.loop.run_until_complete(self.engine.update_weights(self.weights.items(), self.version))
        return self._rate(began)

    def collective(self) -> float:
        self.version += 1
        began = time.perf_counter()
        self.loop.run_until_complete(self.engine.broadcast_weights(self.weights.items(), self.version))
        return self._rate(began)

    def disk(self) -> float:
        self.version += 1
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            shutil.copy(self.model / "config.json", directory)
            save_file(self.weights, Path(directory) / "model.safetensors", {"format": "pt"})
            self.loop.run_until_complete(self.engine.load_weights(Path(directory), self.version))
        return self._rate(began)

    def bare(self) -> float:
        async def send() -> None:
            for piece in self.pieces:
                answer = await self.client.post("/copy", content=piece)
                assert answer.json()["bytes"] == len(piece)

        began = time.perf_counter()
        self.loop.run_until_complete(send())
        return self._rate(began)

    def necessary(self) -> float:
        began = time.perf_counter()
        for piece in self.pieces:
            body = b'{"weights":["' + base64.b64encode(piece) + b'"]}'
            base64.b64decode(json.loads(body)["weights"][0], validate=True)
        return self._rate(began)

    def close(self) -> None:
        self.loop.run_until_complete(self.engine.close())
        self.loop.run_until_complete(self.client.aclose())
        self.loop.close()
        self.server.terminate()
        self.server.wait(START_SECONDS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpreter", type=Path, help="Python of SGLang's environment (default: the installed sglang-cpu)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    interpreter = args.interpreter or find("sglang-cpu")
    with tempfile.TemporaryDirectory() as directory:
        ways = Copying(save_model(Path(directory), args.layers), interpreter, Path(directory))
        try:
            ways.start()
            rates = interleave({way: partial(getattr(ways, way)) for way in (*BY_TRANSPORT, "bare", "necessary")}, args.repeats)
            spent = {way: ways.processor_time(way) for way in (*BY_TRANSPORT, "bare")}
        finally:
            ways.close()
    ratios = {way: round(median_ratio(rates[way], rates["bare"]), 3) for way in (*BY_TRANSPORT, "necessary")}
    result = {
        "benchmark": "publish",
        "unit": "MB of weights per second of wall time",
        "weights_mb": round(ways.bytes / 1e6),
        "bucket_mb": {way: how.bucket_bytes / 1e6 for way, how in BY_VALUE.items()},
        "in_flight": {way: how.in_flight for way, how in BY_VALUE.items()},
        "repeats": args.repeats,
        "rates": {way: summary(r) for way, r in rates.items()},
        "processor_seconds": spent,
        "ratios": ratios,
    }
    for way, values in rates.items():
        print(f"{way}: {summary(values)['median']:.0f} MB/s ({min(values):.0f} to {max(values):.0f})")
    for way, by_process in spent.items():
        print(f"{way}: {sum(by_process.values()):.2f} s of processor time: {by_process}")
    print("to bare: " + ", ".join(f"{way} {ratio:.2f}" for way, ratio in ratios.items()) + " (bound 0.5)")
    path = write_result("publish", result, ("torch", "transformers", "httpx", "miles-rollout"))
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
