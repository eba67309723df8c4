"""What the shell offers after a Tab: recipes, run directories and plug-points. Nothing heavy is imported for it."""

from __future__ import annotations

from pathlib import Path


def recipes(incomplete: str) -> list[tuple[str, str]]:
    """Bundled recipes with what they do, and YAML files."""
    from ..recipe import bundled_recipes
    from .show import first_comment

    bundled = [(name, first_comment(path)) for name, path in bundled_recipes().items() if name.startswith(incomplete)]
    return bundled + [(path, "") for path in _paths(incomplete) if path.endswith(("/", ".yaml", ".yml"))]


def runs(incomplete: str) -> list[str]:
    """Run directories, those in ``runs/`` too while nothing is typed, and directories on the way to one."""
    found = [p for p in _paths(incomplete) if p.endswith("/")]
    found += [f"runs/{p.parent.name}" for p in Path("runs").glob("*/config.yaml") if f"runs/{p.parent.name}".startswith(incomplete)]
    whole = [p.rstrip("/") for p in found if Path(p, "config.yaml").is_file()]
    return sorted({*whole, *(p for p in found if p.rstrip("/") not in whole)})


def points(incomplete: str) -> list[tuple[str, str]]:
    """Plug-points with what they are."""
    from ..plugins import POINTS

    return [(name, point.doc) for name, point in POINTS.items() if name.startswith(incomplete)]


def _paths(incomplete: str) -> list[str]:
    """Files, and directories with a slash, that begin so; hidden ones only if asked for."""
    head, _, tail = incomplete.rpartition("/")
    base = Path(f"{head}/" if "/" in incomplete else ".")
    if not base.is_dir():
        return []
    prefix = f"{head}/" if "/" in incomplete else ""
    names = [p for p in base.iterdir() if p.name.startswith(tail) and (tail or not p.name.startswith("."))]
    return sorted(prefix + p.name + ("/" if p.is_dir() else "") for p in names)
