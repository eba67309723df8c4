"""docs/configuration.md says what the code reads."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from miles_core.plugin_finding import find_all
from miles_core.plugins import POINTS, config_class

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_configuration", DOCS / "make_configuration.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "configuration.md").read_text() == module.page(), "run: uv run --locked python docs/make_configuration.py"


def test_the_page_names_every_key_of_every_plug_in():
    page = (DOCS / "configuration.md").read_text()
    points = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    for point in POINTS:
        sections = dict(re.findall(r"^### (\S+)\n(.*?)(?=^### |\Z)", points.get(point, ""), re.M | re.S))
        for name, found in find_all(point).items():
            if found.origin.startswith("miles-"):
                keys = set(config_class(point, name).model_fields) - {"use"}
                missing = {key for key in keys if f"| `{key}` |" not in sections.get(name, "")}
                assert not missing, f"{point} {name}: {missing}"
