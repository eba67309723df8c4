"""Guard of uv.lock: only the public index, and nothing that exists on one machine alone.

`UV_FIND_LINKS=… uv lock` writes a local path into the lock without a word, and a mirror set in the environment writes its host. Such a
lock works for whoever made it and for nobody else, so CI and a unit test read it before anything is installed from it.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PUBLIC_HOSTS = frozenset({"pypi.org", "files.pythonhosted.org"})
LOCK = Path(__file__).resolve().parents[1] / "uv.lock"


def strings(node: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every string value below `node` with a path that a reader can find again; packages are called by name, not by number."""
    if isinstance(node, str):
        yield where, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from strings(value, f"{where}.{key}" if where else key)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            name = value.get("name", i) if isinstance(value, dict) else i
            yield from strings(value, f"{where}[{name}]")


def complaint(value: str) -> str | None:
    """What is wrong with one string of the lock, or None."""
    if value.startswith("file:"):
        return "is a file URL"
    if value.startswith(("/", "~", "..")):
        return "is a path outside the workspace"
    if "://" in value:
        url = urlsplit(value)
        if url.scheme != "https" or url.netloc not in PUBLIC_HOSTS:
            return f"is not on a public host ({', '.join(sorted(PUBLIC_HOSTS))})"
    return None


def problems(lock: dict[str, Any]) -> list[str]:
    """All sentences to say about a parsed lock; empty when it is good everywhere."""
    found = [f"{where} = {value!r} {why}" for where, value in strings(lock) if (why := complaint(value))]
    for package in lock.get("package", []):
        source = package.get("source", {})
        for kind, place in source.items():
            ours = (kind == "virtual" and place == ".") or (kind == "editable" and place.startswith("packages/"))
            if kind != "registry" and not ours:
                found.append(f"package {package.get('name')} comes from {kind} = {place!r}, neither the index nor the workspace")
    return found


def main() -> int:
    found = problems(tomllib.loads(LOCK.read_text(encoding="utf-8")))
    for line in found:
        print(f"uv.lock: {line}", file=sys.stderr)
    if found:
        print("Lock again with no UV_* variables set: env -u UV_FIND_LINKS -u UV_INDEX -u UV_DEFAULT_INDEX uv lock", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
