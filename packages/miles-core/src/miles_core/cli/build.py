"""``miles check --load``: build and start every part of a recipe's first stage in a temporary directory, then let go of it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..assembly import Origin, assemble, close, start
from ..config import RunConfig
from ..hooks import Hooks
from ..observer import Observer
from ..protocols import BuildContext
from ..run_dir import RunDir


async def build_once(config: RunConfig) -> None:
    """Raise the MilesError of the first part that cannot be built."""
    with tempfile.TemporaryDirectory(prefix="miles-check-") as directory:
        run_dir = RunDir.create(Path(directory), config.name)
        context = BuildContext(run_dir.path, config.name, config.seed)
        hooks = Hooks({n: h.build(context) for n, h in config.hooks.items()})
        cluster = config.cluster.build(context)
        origin = Origin(next(iter(config.stages)), 0)
        loop = await assemble(config, run_dir, origin, [], hooks, Observer(), cluster)
        try:
            await start(loop, origin)
        finally:
            await close(loop)
            await cluster.close()
