"""Files that are either whole or absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from latentmodal.experiments.errors import UserError

_RESUME = "free space or choose another run_dir, then go on with resume=true"


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], remedy: str = _RESUME
) -> None:
    """Call `write(file)` on a temporary neighbour of `path`, then rename it into place.

    Raises:
        UserError: the disk refuses (full, read-only, no permission); the old file is untouched.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        first = next(iter(reason.splitlines()), type(error).__name__)
        raise UserError(f"{path}: could not be written ({first}); {remedy}") from error


def write_text_atomically(path: Path, text: str, remedy: str = _RESUME) -> None:
    """`write_atomically` for text."""
    write_atomically(path, lambda file: file.write(text.encode()), remedy)
