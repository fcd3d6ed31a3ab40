"""A published data set on the local disk to shards: every picture once, with all its texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentmodal.experiments.choose import pick
from latentmodal.experiments.data.faults import BadSamples, Cause, Fault
from latentmodal.experiments.data.readers import READERS, AnnotatedImage, Reader
from latentmodal.experiments.data.readers.annotations import Document
from latentmodal.experiments.data.readers.image_folder import find_image
from latentmodal.experiments.data.sample import IMAGE_EXTENSIONS
from latentmodal.experiments.data.shard_writer import write_shards
from latentmodal.experiments.errors import UserError

MAX_MISSING = 0.05
"""Above this share of unusable pictures nothing is written; training stops at the same share."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was written, and what was left out (``3 x no image (…)``; empty where nothing was)."""

    folder: Path
    samples: int
    captions: int
    questions: int
    conversations: int
    shards: int
    skipped: str

    @property
    def recipe_line(self) -> str:
        """An item for ``data.train`` of a recipe."""
        urls = json.dumps(str(self.folder.resolve()), ensure_ascii=False)
        return f"- {{name: shards, urls: {urls}, num_samples: {self.samples}}}"


def import_dataset(
    layout: str,
    *,
    annotations: Path | None,
    questions: Path | None,
    images: Path,
    split: str,
    out: Path,
    max_missing: float = MAX_MISSING,
) -> Imported:
    """Write the data set as shards into `out`, which appears only when it is whole.

    The same files give the same bytes. Pictures are copied as they are, one at a time.

    Raises:
        UserError: an unknown, missing or unfit file; more than `max_missing` of the pictures
            missing or unusable; a picture's name that leads out of `images`; `out` in use.
    """
    if not images.is_dir():
        raise UserError(f"--images {images} is not a folder")
    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise UserError(f"--out {out} exists and is not an empty folder; name another one")
    if not 0 <= max_missing <= 1:
        raise UserError(f"--max-missing {max_missing} must lie in 0 to 1")
    if not split:
        raise UserError("--split is empty; name the split, such as train")
    reader = _open(layout, {"annotations": annotations, "questions": questions}, split)
    found, tally = _locate(reader.images(), images)
    _check(tally, max_missing)
    shards = _write(found, reader.split_name, out)
    return Imported(
        folder=out,
        samples=len(found),
        captions=sum(len(image.captions) for image, _ in found),
        questions=sum(len(image.questions) for image, _ in found),
        conversations=sum(bool(image.conversation) for image, _ in found),
        shards=shards,
        skipped=tally.summary(top=len(Cause)),
    )


def _open(layout: str, files: dict[str, Path | None], split: str) -> Reader:
    try:
        reader: type[Reader] = pick(READERS, layout, "format")
    except ValueError as error:
        raise UserError(str(error)) from None
    documents: dict[str, Document] = {}
    for role, path in files.items():
        if path is None and role in reader.needs:
            raise UserError(f"{layout} needs --{role} FILE")
        if path is None:
            continue
        if role not in reader.takes:
            takes = " and ".join(f"--{name}" for name in reader.takes)
            raise UserError(f"{layout} does not take --{role}; it takes {takes}")
        documents[role] = _recognised(Document.load(path), layout, reader)
    return reader(split=split, **documents)


def _recognised(document: Document, layout: str, reader: type[Reader]) -> Document:
    if reader.recognises(document):
        return document
    alike = [name for name, other in READERS.items() if other.recognises(document)]
    advice = f"it looks like {' or '.join(alike)}" if alike else "nor any other known here"
    raise UserError(f"{document.path} is not in the layout '{layout}'; {advice}")


def _locate(
    images: Iterable[AnnotatedImage], folder: Path
) -> tuple[list[tuple[AnnotatedImage, Path]], BadSamples]:
    """Every picture that can be used, with its file; and how many cannot, by cause."""
    found: list[tuple[AnnotatedImage, Path]] = []
    tally = BadSamples()
    on_disk = False
    for image in images:
        path = find_image(folder, image.files)
        on_disk = on_disk or path is not None
        cause = _unusable(image, path)
        if path is not None and cause is None:
            found.append((image, path))
            tally.add(1, ())
        else:
            assert cause is not None
            tally.add(0, [Fault(cause, str(path or folder / image.files[0]))])
    if tally.bad and not on_disk:
        example = next(iter(tally.examples.values()))
        raise UserError(
            f"none of the {tally.bad} pictures is in {folder} (looked for {example}); "
            "give the folder that holds them as --images"
        )
    return found, tally


def _unusable(image: AnnotatedImage, path: Path | None) -> Cause | None:
    if path is None:
        return Cause.NO_IMAGE
    if path.suffix[1:].lower() not in IMAGE_EXTENSIONS:
        return Cause.IMAGE_FORMAT
    if path.stat().st_size == 0:
        return Cause.ZERO_BYTE_IMAGE
    if not image.captions and not image.questions and not image.conversation:
        return Cause.NO_CAPTION
    return None


def _check(tally: BadSamples, max_missing: float) -> None:
    if tally.fraction > max_missing:
        raise UserError(
            f"{tally.bad} of {tally.good + tally.bad} pictures cannot be used "
            f"({tally.fraction:.1%}, --max-missing allows {max_missing:.1%}): "
            f"{tally.summary()}; complete the data or raise --max-missing"
        )
    if tally.good == 0:
        raise UserError("the annotations hold no usable picture; nothing was written")


def _write(found: list[tuple[AnnotatedImage, Path]], split: str, out: Path) -> int:
    """Write into a hidden folder beside `out`, then rename it; returns the number of shards."""
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of an import that was killed
    try:
        shards = write_shards(_samples(found, split), partial)
        partial.replace(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{out} could not be written: {error}") from error
    return len(shards)


def _samples(
    found: list[tuple[AnnotatedImage, Path]], split: str
) -> Iterator[dict[str, bytes | str | dict[str, Any]]]:
    for number, (image, path) in enumerate(found):
        meta: dict[str, Any] = {
            "captions": list(image.captions),
            "image_id": image.image_id,
            "split": split,
        }
        if image.questions:
            meta["questions"] = list(image.questions)
        if image.domain is not None:
            meta["domain"] = image.domain
        if image.description is not None:
            meta["description"] = image.description
        if image.conversation:
            meta["conversation"] = list(image.conversation)
        # A number, since an id from a stranger's file may hold anything a tar key must not.
        yield {
            "__key__": f"{number:08d}",
            path.suffix[1:].lower(): path.read_bytes(),
            "json": meta,
        }
