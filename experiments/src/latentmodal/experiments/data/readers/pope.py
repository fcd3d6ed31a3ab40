"""POPE's questions (Li et al. 2023, arXiv 2305.10355): ``coco_pope_random.json`` and its siblings.

JSON lines ``{question_id, image, text, label}`` over COCO's pictures of val2014. Every file is
imported on its own; a source whose ``urls`` lists the folders is evaluated file by file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar

from latentmodal.experiments.data.readers.annotations import Document, Entry
from latentmodal.experiments.data.readers.reader import AnnotatedImage, Reader
from latentmodal.experiments.errors import UserError

_COCO_FILE = re.compile(r"COCO_([a-z]+\d+)_(\d+)\.[a-z]+$")


@dataclass(frozen=True, kw_only=True)
class PopeReader(Reader):
    """The whole file; ``split`` is a name only. Questions are of the kind ``pope/<file>``."""

    needs: ClassVar[tuple[str, ...]] = ("questions",)
    takes: ClassVar[tuple[str, ...]] = ("questions",)

    @classmethod
    def recognises(cls, document: Document) -> bool:
        return {"question_id", "image", "text", "label"} <= document.first().keys()

    def images(self) -> Iterator[AnnotatedImage]:
        assert self.questions is not None
        kind = f"pope/{self.questions.path.stem}"
        by_image: dict[str, list[dict[str, Any]]] = {}
        for entry in self.questions.entries():
            by_image.setdefault(entry.text("image"), []).append(_question(entry, kind))
        for image, questions in by_image.items():
            coco = _COCO_FILE.search(image)
            folder = (f"{coco[1]}/{PurePosixPath(image).name}",) if coco else ()
            yield AnnotatedImage(
                image_id=f"coco/{int(coco[2])}" if coco else f"pope/{image}",
                files=tuple(dict.fromkeys((image, *folder))),
                questions=tuple(questions),
            )


def _question(entry: Entry, kind: str) -> dict[str, Any]:
    label = entry.text("label")
    if label not in ("yes", "no"):
        raise UserError(f"{entry.where}: label is '{label}'; it must be yes or no")
    return {
        "question": entry.text("text"),
        "question_id": entry.name("question_id"),
        "answer": label,
        "kind": kind,
    }
