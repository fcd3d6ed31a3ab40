"""Saying something about many pictures.

Legend: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Final

import torch
from torch import Tensor

from latentmodal.experiments.chat.opening import Speaker
from latentmodal.experiments.chat.session import read_picture
from latentmodal.experiments.errors import UserError
from latentmodal.llm import IMAGE_TAG, GenerationSettings, Turn

logger = logging.getLogger(__name__)

SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp")


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """Files as given, and all pictures below folders, sorted by name; each once.

    Raises:
        UserError: a path that is not there, or a folder without pictures.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"{path}: holds no picture ({', '.join(SUFFIXES)})")
            found.update(dict.fromkeys(inside))
        elif path.exists():
            found[path] = None
        else:
            raise UserError(f"{path}: no such file or folder")
    return list(found)


def describe_files(
    speaker: Speaker,
    files: Sequence[Path],
    settings: GenerationSettings,
    *,
    prompt: str | None = None,
    batch_size: int = 8,
    out: Path | None = None,
) -> int:
    """Write `{"image": ..., "text": ...}` for each picture; the number of bad ones.

    Args:
        speaker: who says it.
        files: pictures; those that `out` has a line of already are passed over.
        settings: how texts are made.
        prompt: what is asked; None: captioned as the system was trained.
        batch_size: pictures at a time.
        out: lines are appended here; None: to stdout.

    Raises:
        UserError: `out` cannot be read or written, or the prompt cannot be.
    """
    done = _done(out)
    todo = [file for file in files if str(file) not in done]
    if len(todo) < len(files):
        logger.info("%d pictures are in %s already", len(files) - len(todo), out)
    bad = 0
    with nullcontext(sys.stdout) if out is None else _append(out) as lines:
        for start in range(0, len(todo), batch_size):
            names = todo[start : start + batch_size]
            pictures = dict(_read(speaker, names))
            bad += len(names) - len(pictures)
            if not pictures:
                continue
            texts = _say(speaker, torch.stack(list(pictures.values())), settings, prompt)
            for name, text in zip(pictures, texts, strict=True):
                record = {"image": str(name), "text": text}
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            lines.flush()
    if bad:
        logger.warning("%d of %d pictures could not be read", bad, len(todo))
    return bad


def _say(
    speaker: Speaker, pixels_BCHW: Tensor, settings: GenerationSettings, prompt: str | None
) -> list[str]:
    system, count = speaker.system, len(pixels_BCHW)
    texts: list[str]
    try:
        if prompt is None:
            texts = system.caption_images(pixels_BCHW, settings)
        else:
            turns = [Turn("user", f"{IMAGE_TAG} {prompt.replace(IMAGE_TAG, '').strip()}")]
            texts = system.converse(pixels_BCHW, [turns] * count, settings)
    except ValueError as error:
        raise UserError(str(error)) from error
    return texts


def _read(speaker: Speaker, names: Sequence[Path]) -> Iterator[tuple[Path, Tensor]]:
    """The pictures that can be read; the others are a line each."""
    preprocess = speaker.system.model.image_encoder.preprocess.eval()
    for name in names:
        try:
            yield name, preprocess(read_picture(name))
        except UserError as error:
            logger.warning("%s", error)


def _done(out: Path | None) -> set[str]:
    """Pictures that a file has lines of; half a line at its end, left by a crash, is cut off."""
    if out is None or not out.exists():
        return set()
    try:
        data = out.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        names = {str(json.loads(line)["image"]) for line in whole.splitlines()}
        if len(whole) < len(data):
            with out.open("r+b") as file:
                file.truncate(len(whole))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--out {out}: is no file of generated lines ({error}); name another"
        ) from error
    return names


def _append(out: Path) -> IO[str]:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return out.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
