"""GQA (Hudson and Manning 2019, arXiv 1902.09506): ``train_balanced_questions.json``.

``{question id: {imageId, question, answer?, types: {structural, …}}}``; the pictures are
``<imageId>.jpg``. They are Visual Genome's, and carry its ids, but for those whose id begins with
``n``, which only GQA has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from latentmodal.experiments.data.readers.annotations import Document, Entry
from latentmodal.experiments.data.readers.reader import AnnotatedImage, Reader


@dataclass(frozen=True, kw_only=True)
class GqaReader(Reader):
    """The whole file; ``split`` is a name only."""

    needs: ClassVar[tuple[str, ...]] = ("questions",)
    takes: ClassVar[tuple[str, ...]] = ("questions",)

    @classmethod
    def recognises(cls, document: Document) -> bool:
        if not isinstance(document.content, dict):
            return False
        first = next(iter(document.content.values()), None)
        return isinstance(first, dict) and {"imageId", "question"} <= first.keys()

    def images(self) -> Iterator[AnnotatedImage]:
        assert self.questions is not None
        by_image: dict[str, list[dict[str, Any]]] = {}
        for number, entry in self.questions.entry().items():
            by_image.setdefault(entry.label("imageId"), []).append(_question(number, entry))
        for image, questions in by_image.items():
            yield AnnotatedImage(
                image_id=f"{'vg' if image.isdecimal() else 'gqa'}/{image}",
                files=(f"{image}.jpg", f"images/{image}.jpg"),
                questions=tuple(questions),
            )


def _question(number: str, entry: Entry) -> dict[str, Any]:
    asked: dict[str, Any] = {"question": entry.text("question"), "question_id": number}
    if "answer" in entry:
        asked["answer"] = entry.text("answer")
    if "types" in entry and "structural" in (types := entry.entry("types")):
        asked["kind"] = types.text("structural")
    return asked
