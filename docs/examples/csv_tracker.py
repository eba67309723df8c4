"""tracker: takes metrics somewhere. ``metrics.jsonl`` is always written; here a few of them go into a table.

In a recipe:

    trackers: {table: {use: "csv_tracker:Table", path: rewards.csv, columns: [step, reward]}}
"""

import csv
from pathlib import Path


class Table:
    """Keyword-only arguments are options."""

    def __init__(self, *, path: str, columns: list[str]):
        self.path, self.columns = Path(path), columns

    def log(self, step, metrics):
        """One row a step. A resumed run goes on with the file."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, extrasaction="ignore", restval="").writerow({"step": step, **metrics})

    def close(self):
        """Nothing is open between rows."""
