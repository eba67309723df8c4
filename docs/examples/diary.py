"""hook: called at moments of the loop. Here each gets a line; ``loop.request_stop()`` would end the run in good order.

In a recipe:

    hooks: {diary: {use: "diary:Diary", file: diary.txt}}
"""


class Diary:
    """Methods are named after moments (``miles_core.hooks.MOMENTS``), may be async, and are given the loop."""

    def __init__(self, *, file: str = "diary.txt"):
        self.file = file

    def write(self, loop, text):
        with (loop.run_dir.logs / self.file).open("a") as diary:
            diary.write(f"{loop.name}, step {loop.version}: {text}\n")

    def on_start(self, loop):
        self.write(loop, "began")

    def after_step(self, loop):
        self.write(loop, f"loss {loop.row['loss']:.3f}")

    async def after_publish(self, loop):
        self.write(loop, "engines have the weights")

    def on_failure(self, loop):
        self.write(loop, "something went wrong")
