"""Every example in docs/rewards.md is a recipe that passes ``miles check``, and gives what the page says."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from fixtures.rewards import PLACES, config, responded, scorer

from miles_core.check import check
from miles_core.config import RunConfig, resolve
from miles_core.plugins import config_class

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "rewards.md").read_text()
RECIPES = [yaml.safe_load(block)["rewards"] for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
SCRIPTS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def named(reward):
    """The same by module and attribute, sums too."""
    parts = {"parts": {n: named(p) for n, p in reward["parts"].items()}} if "parts" in reward else {}
    use = reward["use"]
    return reward | parts | {"use": f"miles_core.rewards.{PLACES[use]}" if use in PLACES else use}


def example(name):
    """The first reward of this name on the page, validated."""
    reward = next(named(rewards[name]) for rewards in RECIPES if name in rewards)
    return config_class("reward", reward["use"]).model_validate(reward)


@pytest.fixture(scope="module", autouse=True)
def my_rewards():
    """The page's module."""
    module = ModuleType("my_rewards")
    exec(SCRIPTS[1], module.__dict__)
    sys.modules["my_rewards"] = module
    yield
    del sys.modules["my_rewards"]


@pytest.mark.parametrize("rewards", RECIPES, ids=lambda r: "-".join(r))
def test_an_example_is_a_recipe(rewards):
    data = resolve("quickstart").model_dump(mode="json")
    data["stages"]["rl"]["rewards"] = {name: named(reward) for name, reward in rewards.items()}
    check(RunConfig.from_mapping(data))


@pytest.mark.parametrize(
    ("name", "response", "label", "expected"),
    [
        ("right", "<call> 1 + 1 </call> <res> 2 </res> ans 2", 2, 1.0),
        ("form", "so ans 2", 2, 0.1),
        ("form", "ans 2.", 2, 0.1),
        ("form", "ans 2 or 3", 2, 0.0),
        ("capital", "Hm. Answer: PARIS!", ["Paris", "Lutetia"], 1.0),
        ("capital", "PARIS!", ["Paris", "Lutetia"], 0.0),
        ("overlap", "I'd say Paris. Answer: the old Paris", "Paris", 2 / 3),
        ("thinks", "<think>2\n</think> <answer>2</answer>", None, 1.0),
        ("brief", "two tokens", None, -0.018),
        ("quality", "ans 2", "ans 2", 0.3 * (0.2 + 1.0)),
        ("polite", "please", None, 1.0),
        ("shortest", "two tokens", None, 1.0),
    ],
)
async def test_what_an_example_gives(name, response, label, expected):
    sample = responded(response, label)
    await scorer(it=example(name)).score_group([sample])
    assert sample.reward == pytest.approx(expected, abs=1e-12)


async def test_the_service_answers():
    from http.server import ThreadingHTTPServer

    written = {"__name__": "service"}
    exec(SCRIPTS[0], written)
    handler = type("Quiet", (written["Score"],), {"log_message": lambda *arguments: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        samples = [responded(" 4", 4), responded("five", 5, trajectory=1)]
        await scorer(tests=config("http", url=f"http://127.0.0.1:{server.server_address[1]}/score")).score_group(samples)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert [s.rewards for s in samples] == [{"tests": 1.0, "tests/characters": 2.0}, {"tests": 0.0, "tests/characters": 4.0}]
