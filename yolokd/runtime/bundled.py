"""Location of the folders that ship with the code: cfg/ and export/."""

from __future__ import annotations

from pathlib import Path


def bundled_folder(folder: str) -> Path:
    """Return the folder `cfg` or `export`: in the package of a wheel, beside it in a checkout or editable install.

    >>> (bundled_folder("cfg") / "default.yaml").is_file()
    True
    """
    package = Path(__file__).resolve().parents[1]
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder
