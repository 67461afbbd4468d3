"""The HTML page of a report: one file that loads no other file, script or font."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from yolokd.runtime.files import atomic_path

TEMPLATES = Path(__file__).parent / "templates"
MAX_BYTES = 5 * 10**6  # of a page


def render(template: str, content: Mapping[str, Any]) -> str:
    """Return a page made by a template; text of the content is never read as HTML."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(content, style=style)


def write_page(html: str, path: Path) -> Path:
    """Write a page and return its path. Raises UserError if the file cannot be written."""
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="replace")
    return path
