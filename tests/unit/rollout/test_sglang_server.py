"""SGLang's server process. What can go wrong is shown with small programs in the interpreter's place; the rest with a real server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from fixtures.sglang import launch, running

from miles_core.errors import ConfigError, RunError
from miles_rollout.sglang import probe as probe_module
from miles_rollout.sglang.launch import SHIM, Launch
from miles_rollout.sglang.probe import Versions, probe
from miles_rollout.sglang.server import ServerProcess

VERSIONS = {"python": "3.11.7", "sglang": "0.5.23", "torch": "2.14.1", "transformers": "5.19.0"}
INTERPRETER = """\
#!{python}
import json, os, sys, time
if "-c" in sys.argv:
    {answer}
    sys.exit()
def option(name):
    return sys.argv[sys.argv.index(name) + 1]
json.dump([sys.argv[1:], dict(os.environ)], open({seen!r}, "w"))
{behaviour}
"""
SERVES = """
from http.server import BaseHTTPRequestHandler, HTTPServer
key = json.load(open(option("--config")))["api-key"] if {key} is None else {key}
class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.path == "/health" or self.headers["Authorization"] == "Bearer " + key
        self.send_response(200 if known else 401)
        self.end_headers()
    def log_message(self, *_): pass
HTTPServer(("127.0.0.1", int(option("--port"))), Answers).serve_forever()
"""
CHILD = "import subprocess; print('child', subprocess.Popen(['sleep', '1000']).pid, flush=True)\n"


@pytest.fixture
def model(tmp_path) -> Path:
    """As much of a model directory as is read before a server has it."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "qwen3"}')
    return path


@pytest.fixture
def fake(tmp_path) -> Callable[..., Path]:
    """A program in the interpreter's place: what it does as a server, and what it answers to the probe."""

    def write(behaviour: str = "", answer: str = f"print(json.dumps({VERSIONS}))") -> Path:
        path = tmp_path / "python"
        path.write_text(INTERPRETER.format(python=sys.executable, answer=answer, behaviour=behaviour, seen=str(tmp_path / "seen")))
        path.chmod(0o755)
        return path

    return write


@pytest.fixture
def server(tmp_path, model):
    """A ServerProcess with an interpreter; whatever it left running is ended, and that is a failure."""
    made: list[ServerProcess] = []

    def make(
        interpreter: Path, boot_seconds: float = 120.0, device: str = "cpu", environment: dict | None = None, **arguments
    ) -> ServerProcess:
        log = tmp_path / "logs" / "server.log"
        made.append(ServerProcess(Launch(interpreter, model, "float32", device, arguments, environment or {}, log, boot_seconds)))
        return made[-1]

    yield make
    for process in made:
        assert not process.alive()


def ended(pids: list[int]) -> bool:
    """Whether processes end, or have ended."""
    end = time.monotonic() + 60
    while any(runs(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(runs(pid) for pid in pids)


def runs(pid: int) -> bool:
    """A zombie does not: it waits for whoever is its parent by now."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def child_of(process: ServerProcess) -> int:
    """What ``CHILD`` said."""
    found = re.search(r"^child (\d+)$", process.log_tail(100), re.MULTILINE)
    assert found is not None, process.log_tail(100)
    return int(found[1])


def scratch_of(seen: Path) -> Path:
    return Path(json.loads(seen.read_text())[1]["TMPDIR"])


# ---- the probe --------------------------------------------------------------------------------------------------------------


def test_probe_of_a_good_one(fake):
    assert probe(fake()) == Versions(**VERSIONS)


@pytest.mark.parametrize(
    "answer, sentence",
    [
        (f"print(json.dumps({VERSIONS | {'sglang': '0.5.18'}}))", r"has sglang 0\.5\.18; Miles speaks to 0\.5\.23\. `miles engine install"),
        (f"print(json.dumps({VERSIONS | {'sglang': None, 'torch': None}}))", "has no sglang and no torch"),
        ("sys.exit('Fatal Python error: init_fs_encoding')", "did not say its versions; it said: Fatal Python error"),
        ("print('[1]')", "did not say its versions"),
        ("pass", "it said: nothing"),
    ],
)
async def test_probe_refuses(fake, server, answer, sentence):
    process = server(fake(SERVES, answer))
    with pytest.raises(ConfigError, match=sentence):
        await process.start()
    assert process.pid is None


def test_probe_of_what_does_not_answer(fake, monkeypatch):
    monkeypatch.setattr(probe_module, "SECONDS", 0.3)
    with pytest.raises(ConfigError, match=r"did not say its versions within 0\.3 s"):
        probe(fake(answer="time.sleep(100)"))


def test_probe_of_no_interpreter(tmp_path, fake):
    with pytest.raises(ConfigError, match=r"no-such-python is not an executable file.*miles engine install sglang-cpu"):
        probe(tmp_path / "no-such-python")
    broken = fake()
    broken.write_text("#!/nowhere/python\n")
    with pytest.raises(ConfigError, match="cannot be run: No such file"):
        probe(broken)


# ---- what is asked of the server --------------------------------------------------------------------------------------------


async def test_key_is_in_no_command_line_and_goes_with_the_server(fake, server, tmp_path):
    process = server(fake(SERVES.format(key=None)))
    await process.start()
    try:
        (child,) = psutil.Process(process.pid).children()
        assert process.token not in " ".join([*child.cmdline(), *psutil.Process(process.pid).cmdline()])
        assert process.launch.log.stat().st_mode & 0o077 == 0
        scratch = scratch_of(tmp_path / "seen")
        assert scratch.stat().st_mode & 0o077 == 0 and (scratch / "keys.yaml").exists()
        assert process.alive() and httpx.get(f"{process.url}/health", trust_env=False).status_code == 200
    finally:
        await process.stop()
    assert not scratch.exists() and not process.alive() and "was stopped" in process.describe_death()
    await process.stop()  # twice is fine


async def test_options_and_variables(fake, server, tmp_path, monkeypatch, model):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (model / "config.json").write_text('{"model_type": "qwen3_moe", "num_local_experts": 8}')
    process = server(
        fake("sys.exit(3)"),
        environment={"OMP_NUM_THREADS": "2", "PYTHONPATH": "/theirs"},
        max_total_tokens=99,
        sleep_on_idle=False,
        tp_size=2,
    )
    with pytest.raises(RunError, match="with exit code 3"):
        await process.start()
    arguments, variables = json.loads((tmp_path / "seen").read_text())
    assert arguments[:2] == ["-m", "sglang.launch_server"]
    options = " ".join(arguments) + " "
    for expected in (
        "--host 127.0.0.1",
        "--dtype float32",
        "--device cpu",
        "--max-total-tokens 99",
        "--tp-size 2",
        f"--model-path {model}",
    ):
        assert f"{expected} " in options
    assert "--enable-return-routed-experts " in options and "--sleep-on-idle" not in options and "--max-total-tokens 8192" not in options
    assert variables["PYTHONPATH"] == f"{SHIM}:/theirs" and variables["OMP_NUM_THREADS"] == "2"
    assert "PYTHONDONTWRITEBYTECODE" not in variables and "VIRTUAL_ENV" not in variables


async def test_on_a_gpu_nothing_of_the_cpu_is_asked(fake, server, tmp_path):
    with pytest.raises(RunError):
        await server(fake("sys.exit(3)"), device="cuda").start()
    arguments, variables = json.loads((tmp_path / "seen").read_text())
    assert "PYTHONPATH" not in variables and "SGLANG_USE_CPU_ENGINE" not in variables
    assert "--attention-backend" not in arguments and "--enable-return-routed-experts" not in arguments


def test_what_cannot_be_asked(fake, server, model):
    with pytest.raises(ConfigError, match="on 'cpu' or 'cuda', not on 'tpu'"):
        server(fake(), device="tpu")
    (model / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        server(fake())
    (model / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        server(fake())


# ---- how it can fail --------------------------------------------------------------------------------------------------------


async def test_dies_with_a_traceback(fake, server, tmp_path):
    says = "print(open(option('--config')).read())\nprint('ValueError: head_dim does not divide: 5')"
    dies = f"{says}\nfor i in range(20): print('then', i)\nraise RuntimeError('scheduler died')"
    process = server(fake(dies))
    with pytest.raises(RunError) as caught:
        await process.start()
    said = str(caught.value)
    assert "with exit code 1" in said and str(process.launch.log) in said
    assert "ValueError: head_dim does not divide: 5" in said and "RuntimeError: scheduler died" in said and "then 3\n" not in said
    assert process.token not in process.log_tail(100) and process.token in process.launch.log.read_text()
    assert not scratch_of(tmp_path / "seen").exists()


async def test_only_this_starts_log_is_told(fake, server, tmp_path):
    log = tmp_path / "logs" / "server.log"
    log.parent.mkdir()
    log.write_text("OldError: of yesterday\n")
    with pytest.raises(RunError, match="wrote nothing to its log"):
        await server(fake("sys.exit(1)")).start()
    assert log.read_text().startswith("OldError")


async def test_says_nothing(fake, server, tmp_path, monkeypatch):
    process = server(fake(f"print('loading', flush=True)\n{CHILD}time.sleep(1000)"), boot_seconds=0.1)
    answers = process._answers

    def answers_once_it_runs() -> bool:
        while "child" not in process.log_tail(1) and process.alive():
            time.sleep(0.02)
        return answers()

    monkeypatch.setattr(process, "_answers", answers_once_it_runs)
    with pytest.raises(RunError, match=r"Waited 0\.1 s for the SGLang server on port \d+ \(.*/model\) to answer") as caught:
        await process.start()
    assert "loading" in str(caught.value)
    assert ended([child_of(process)]) and not scratch_of(tmp_path / "seen").exists()


async def test_somebody_elses_server_is_not_taken_for_ours(fake, server):
    with pytest.raises(RunError, match="Waited 1 s"):
        await server(fake(SERVES.format(key="'another'")), boot_seconds=1.0).start()


async def test_port_that_was_taken_meanwhile(fake, server, tmp_path):
    once = f"marker = {str(tmp_path / 'tried')!r}\nif not os.path.exists(marker):\n    open(marker, 'w').write(option('--port'))\n"
    process = server(fake(f"{once}    sys.exit('[Errno 98] Address already in use')\n{SERVES.format(key=None)}"))
    await process.start()
    assert process.alive() and process.port != int((tmp_path / "tried").read_text())
    await process.stop()


async def test_ports_that_are_always_taken(fake, server):
    with pytest.raises(RunError, match="Address already in use"):
        await server(fake("sys.exit('[Errno 98] Address already in use')")).start()


async def test_start_that_is_cancelled_leaves_nothing(fake, server, tmp_path):
    process = server(fake(f"{CHILD}time.sleep(1000)"))
    task = asyncio.ensure_future(process.start())
    while "child" not in process.log_tail(1):
        await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not process.alive() and ended([child_of(process)])


async def test_dies_later(fake, server):
    process = server(fake(CHILD + SERVES.format(key=None)))
    await process.start()
    (main,) = psutil.Process(process.pid).children()
    main.kill()
    while process.alive():
        await asyncio.sleep(0.02)
    assert ended([child_of(process)])
    await process.stop()
    assert "by signal SIGKILL (its own, after an error, or the kernel's, out of memory)" in process.describe_death()


async def test_guard_dies(fake, server, tmp_path):
    process = server(fake(SERVES.format(key=None)))
    await process.start()
    (main,) = psutil.Process(process.pid).children()
    psutil.Process(process.pid).kill()
    assert ended([main.pid])
    while process.alive():
        await asyncio.sleep(0.02)
    await process.stop()
    assert not scratch_of(tmp_path / "seen").exists()


async def test_server_is_started_once(fake, server):
    process = server(fake(SERVES.format(key=None)))
    await process.start()
    with pytest.raises(RunError, match="was started already"):
        await process.start()
    await process.stop()


@pytest.mark.parametrize("victim", ["us", "the guard"])
def test_nothing_outlives_us(fake, model, tmp_path, victim):
    """Whoever is killed with SIGKILL, we or the process that guards the server: the server ends."""
    interpreter = fake(SERVES.format(key=None))
    program = (
        "import asyncio, sys, time\nfrom pathlib import Path\nfrom miles_rollout.sglang.server import Launch, ServerProcess\n"
        "s = ServerProcess(Launch(Path(sys.argv[1]), Path(sys.argv[2]), 'float32', 'cpu', {}, {}, Path(sys.argv[3]), 120.0))\n"
        "asyncio.run(s.start())\nprint(s.pid, flush=True)\ntime.sleep(1000)\n"
    )
    command = [sys.executable, "-c", program, interpreter, model, tmp_path / "log"]
    us = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path)})
    try:
        assert us.stdout is not None
        guard = int(us.stdout.readline())
        family = [guard, *(child.pid for child in psutil.Process(guard).children(recursive=True))]
        assert len(family) == 2
        os.kill(us.pid if victim == "us" else guard, signal.SIGKILL)
        assert ended(family[1:] if victim == "the guard" else family)
        assert victim == "the guard" or not scratch_of(tmp_path / "seen").exists()
    finally:
        us.kill()
        us.communicate()


def test_shim_refuses_another_sglang(tmp_path):
    info = tmp_path / "sglang-0.5.24.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.24\n")
    program = "from importlib.metadata import entry_points\n[e] = entry_points(group='sglang.srt.plugins')\ne.load()()"
    variables = {"PYTHONPATH": f"{tmp_path}:{SHIM}", "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "shim is written for sglang 0.5.23, and this is 0.5.24" in done.stderr


# ---- a real one -------------------------------------------------------------------------------------------------------------


def post(server: ServerProcess, path: str, **body) -> dict:
    key = {"Authorization": f"Bearer {server.token}"}
    response = httpx.post(f"{server.url}{path}", json=body, headers=key, timeout=60, trust_env=False)
    assert response.status_code == 200, response.text
    return response.json()


def test_real_server_scores_as_transformers_does(sglang_moe_server):
    """Through the shim: raw logprobs of given tokens (T = 1) within 1e-5 of a plain forward pass in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    path = sglang_moe_server.model_path
    tokens = np.random.default_rng(0).integers(3, 21, 40)
    post(sglang_moe_server, "/update_weights_from_disk", model_path=str(path))  # another test may have changed them
    sampling = {"max_new_tokens": 0}
    answer = post(
        sglang_moe_server, "/generate", input_ids=tokens.tolist(), sampling_params=sampling, return_logprob=True, logprob_start_len=0
    )
    scored = np.array([row[0] for row in answer["meta_info"]["input_token_logprobs"][1:]])
    reference = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    with torch.no_grad():
        logprobs = reference(torch.from_numpy(tokens)[None]).logits[0].log_softmax(-1).numpy()
    np.testing.assert_allclose(scored, logprobs[np.arange(39), tokens[1:]], atol=1e-5)


def test_real_server_wants_its_key(sglang_moe_server):
    for method, path in (
        ("GET", "/model_info"),
        ("POST", "/generate"),
        ("POST", "/abort_request"),
        ("POST", "/update_weights_from_tensor"),
    ):
        assert httpx.request(method, f"{sglang_moe_server.url}{path}", json={}, trust_env=False).status_code == 401
    assert sglang_moe_server.versions.sglang == "0.5.23"


@pytest.mark.slow
@pytest.mark.parametrize("who", ["scheduler", "detokenizer"])
def test_real_server_ends_when_one_of_its_processes_is_killed(sglang_interpreter, tmp_path, tmp_path_factory, who):
    from fixtures.engines import model_path

    with running(launch(sglang_interpreter, model_path("dense", tmp_path_factory), tmp_path)) as server:
        family = psutil.Process(server.pid).children(recursive=True)
        assert len(family) >= 3
        held = {Path(m.path) for p in family for m in p.memory_maps() if m.path.startswith("/dev/shm/sglang_loads_")}
        assert held  # of a random name: only who maps it knows
        [victim] = [p for p in family if who in " ".join(p.cmdline())]
        victim.kill()
        assert ended([p.pid for p in family])
        while server.alive():
            time.sleep(0.02)
        assert "ended" in server.describe_death() and who in server.describe_death()
    assert not [path for path in held if path.exists()]


@pytest.mark.slow
def test_real_server_says_what_it_did_not_understand(sglang_interpreter, tmp_path, tmp_path_factory):
    from fixtures.engines import model_path

    with pytest.raises(RunError, match=r"(?s)with exit code 2.*unrecognized arguments: --no-such-option"):
        with running(launch(sglang_interpreter, model_path("dense", tmp_path_factory), tmp_path, no_such_option=1)):
            pass
