"""Finds what ships beside the code: cfg/ and export/."""

from __future__ import annotations

from pathlib import Path


def bundled_folder(folder: str) -> Path:
    """The folder `cfg` or `export`: inside the package in a wheel, beside it in a checkout or an editable install.

    >>> (shipped("cfg") / "default.yaml").is_file()
    True
    """
    package = Path(__file__).resolve().parents[1]
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder
