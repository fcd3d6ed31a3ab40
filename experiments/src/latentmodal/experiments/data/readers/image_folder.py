"""Finding pictures that an annotation file names, inside their folder and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PureWindowsPath

from latentmodal.experiments.errors import UserError


def find_image(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of `names` that is a file under `folder`.

    Links inside the folder are the user's own and are followed; the names are a stranger's.

    Raises:
        UserError: a name leads out of the folder (absolute, on another drive, or through ``..``),
            or the system refuses to look.
    """
    for name in names:
        # Windows' rules are the wider ones: both slashes, drives, and everything POSIX has.
        path = PureWindowsPath(name)
        if path.anchor or ".." in path.parts or not path.parts or not name.isprintable():
            raise UserError(
                f"the image name {name!r} leads out of the image folder {folder}; refused: "
                "names must be relative and without '..'"
            )
        try:
            if (found := folder / name).is_file():
                return found
        except OSError as error:  # no permission, or a name too long for the file system
            raise UserError(f"{folder / name} cannot be read: {error.strerror}") from error
    return None
