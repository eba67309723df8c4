"""Settings of the whole suite. Shared material is in ``fixtures`` (importable: ``pythonpath`` in the root pyproject)."""

import os
import sys

# Tests start many processes that import torch: without bytecode on disk each compiles all of it again, for 10 s instead of 2.
os.environ["PYTHONDONTWRITEBYTECODE"] = ""
# Before torch is imported: tests compute on tiny tensors, on which a second thread costs more than it brings.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from typing import Any

import pytest
from fixtures.sglang import sglang_dense_server, sglang_interpreter, sglang_moe_server  # noqa: F401 — session fixtures
from hypothesis import settings

sys.dont_write_bytecode = False  # read from the variable when Python started

# Machines are shared: no deadline per example. MILES_HYPOTHESIS=thorough draws 500 of each.
settings.register_profile("miles", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=500, derandomize=True)
settings.load_profile(os.environ.get("MILES_HYPOTHESIS", "miles"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """``cluster: processes``: one for the session, so that what a worker's module imports is imported once and ranks are forked from it."""
    import asyncio

    from miles_core.clusters import ProcessesConfig
    from miles_core.protocols import BuildContext

    built = ProcessesConfig(use="processes").build(BuildContext(tmp_path_factory.mktemp("cluster"), "test", 0))
    yield built
    asyncio.run(built.close())
