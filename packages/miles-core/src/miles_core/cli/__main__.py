"""``python -m miles_core.cli`` is ``miles``."""

from .app import main

main()
