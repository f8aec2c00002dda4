"""Puts every page of this folder into the navigation of the site."""

from pathlib import Path
from typing import Any

FIRST = ("sff.md", "ff.md", "cwc.md", "scff.md", "pff.md", "backprop.md", "localnet.md")


def on_config(config: Any) -> Any:
    """Called by mkdocs before it reads the pages."""
    pages = sorted(path.name for path in Path(__file__).parent.glob("*.md"))
    pages.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    for section in config["nav"]:
        if "Methods" in section:
            section["Methods"] = [f"methods/{name}" for name in pages]
    return config
