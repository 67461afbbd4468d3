"""Where a deployment writes: deploy.csv, deploy.png and the folder `deploy` with the exported files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from yolokd.errors import UserError
from yolokd.runtime.files import check_output_folder, check_project

CURE = "move it away, or give another save_dir="


def run_of(model: Path) -> Path:
    """Return the folder of a checkpoint's run: that above `weights`, or that of the checkpoint itself."""
    folder = model.absolute().parent
    return folder.parent if folder.name == "weights" else folder


@dataclass(frozen=True)
class Places:
    """The files of a deployment in `folder`: that of the model's run, unless the user gave another."""

    folder: Path

    @classmethod
    def of(cls, model: Path, save_dir: str | None) -> Places:
        """Return the places for a model. Raises UserError for what is in the way there."""
        places = cls(check_project(save_dir or run_of(model), "save_dir"))
        for path in (places.csv, places.plot, places.exports):
            if path.is_symlink():
                raise UserError(str(path), "is a link, which could lead elsewhere", CURE)
        check_output_folder(places.exports, "save_dir")
        if not places.csv.exists() and places.exports.exists() and any(places.exports.iterdir()):
            raise UserError(str(places.exports), "holds files, but there is no deploy.csv that names them", CURE)
        return places

    @property
    def csv(self) -> Path:
        """Return the file with a row for each format."""
        return self.folder / "deploy.csv"

    @property
    def plot(self) -> Path:
        """Return the plot."""
        return self.folder / "deploy.png"

    @property
    def exports(self) -> Path:
        """Return the folder of the exported files."""
        return self.folder / "deploy"
