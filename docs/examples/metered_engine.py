"""What ``metered.py`` names: imported when the engine is built."""

import json
from collections import Counter

from miles_rollout.local.engine import LocalEngine


class MeteredEngine(LocalEngine):
    """Counts what was asked for. An engine of another make has these methods, and no base class: see ``protocols.RolloutEngine``."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.file, self.counts = context.run_dir / "logs" / config.file, Counter()

    async def generate(self, request):
        """Calls run concurrently; the engine batches them."""
        generation = await super().generate(request)
        self.counts.update(calls=1, read=len(request.tokens), sampled=len(generation.tokens))
        return generation

    async def close(self):
        """Called once at the end, even where starting failed."""
        await super().close()
        self.file.write_text(json.dumps(self.counts))
