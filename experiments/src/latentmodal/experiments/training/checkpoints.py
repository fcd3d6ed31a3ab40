"""Checkpoint files that are either whole or absent.

A checkpoint is written beside its final name, flushed to disk and renamed; its SHA-256 stands in a
file next to it and is verified before anything is read. Reading is always `weights_only`, so a
checkpoint can never run code.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from latentmodal.experiments.errors import UserError
from latentmodal.experiments.files import write_atomically, write_text_atomically

log = logging.getLogger(__name__)

SUFFIX = ".ckpt"
_STEP = re.compile(r"step=(\d+)\.ckpt$")


def digest_path(path: Path) -> Path:
    """Where the SHA-256 of checkpoint `path` stands."""
    return path.with_name(f"{path.name}.sha256")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(path: Path) -> bool:
    """Whether checkpoint `path` exists with the digest written beside it."""
    digest = digest_path(path)
    return path.is_file() and digest.is_file() and digest.read_text().strip() == file_digest(path)


def step_of(path: Path) -> int:
    """The optimiser step in a checkpoint's file name, -1 when it has none."""
    match = _STEP.search(path.name)
    return int(match.group(1)) if match else -1


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest intact checkpoint in `folder`; damaged ones are passed over with a warning."""
    for path in sorted(folder.glob(f"*{SUFFIX}"), key=step_of, reverse=True):
        if is_intact(path):
            return path
        log.warning("%s is damaged or incomplete; trying the checkpoint before it", path)
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU after verifying it.

    Raises:
        UserError: missing, damaged, or holding anything but tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    if not is_intact(path):
        raise UserError(
            f"{path}: damaged, its SHA-256 does not match {digest_path(path).name}; use another"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused, it holds more than tensors and plain values") from error
    assert isinstance(checkpoint, dict)
    return checkpoint


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's door to the functions above."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        target = Path(path)
        staged = target.with_name(f"{target.name}.new")
        write_atomically(staged, lambda file: torch.save(checkpoint, file))
        write_text_atomically(digest_path(target), file_digest(staged) + "\n")
        staged.replace(target)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        Path(path).unlink(missing_ok=True)
        digest_path(Path(path)).unlink(missing_ok=True)
