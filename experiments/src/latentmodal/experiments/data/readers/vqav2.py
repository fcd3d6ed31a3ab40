"""VQAv2 (Goyal et al. 2017, arXiv 1612.00837).

``v2_OpenEnded_mscoco_train2014_questions.json``: ``{data_subtype, questions: [{question_id,
image_id, question}]}``; ``v2_mscoco_train2014_annotations.json``: ``{annotations: [{question_id,
multiple_choice_answer, answers: [{answer}], answer_type}]}``. Tests come without annotations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from latentmodal.experiments.data.readers.annotations import Document, Entry
from latentmodal.experiments.data.readers.reader import AnnotatedImage, Reader
from latentmodal.experiments.errors import UserError


@dataclass(frozen=True, kw_only=True)
class VqaV2Reader(Reader):
    """The whole file; ``split`` is a name only."""

    needs: ClassVar[tuple[str, ...]] = ("questions",)
    takes: ClassVar[tuple[str, ...]] = ("questions", "annotations")

    @classmethod
    def recognises(cls, document: Document) -> bool:
        return any("question_id" in document.first(key) for key in ("questions", "annotations"))

    def images(self) -> Iterator[AnnotatedImage]:
        assert self.questions is not None
        root = self.questions.entry()
        # The questions of test-dev are about a part of the pictures of test.
        subtype = root.text("data_subtype").replace("-dev", "")
        answers = self._answers()
        by_image: dict[int, list[dict[str, Any]]] = {}
        for entry in root.entries("questions"):
            by_image.setdefault(_coco_number(entry), []).append(self._question(entry, answers))
        for number, questions in by_image.items():
            name = f"COCO_{subtype}_{number:012d}.jpg"
            yield AnnotatedImage(
                image_id=f"coco/{number}",
                files=(f"{subtype}/{name}", name),
                questions=tuple(questions),
            )

    def _answers(self) -> dict[int | str, Entry] | None:
        if self.annotations is None:
            return None
        listed = self.annotations.entry().entries("annotations")
        return {entry.name("question_id"): entry for entry in listed}

    def _question(self, entry: Entry, answers: dict[int | str, Entry] | None) -> dict[str, Any]:
        number = entry.name("question_id")
        asked = {"question": entry.text("question"), "question_id": number}
        if answers is None:
            return asked
        if number not in answers:
            assert self.annotations is not None
            raise UserError(
                f"{entry.where}: {self.annotations.path.name} has no answers to question {number}; "
                "are the two files of the same split?"
            )
        annotation = answers[number]
        given = [answer.text("answer") for answer in annotation.entries("answers")]
        return {**asked, **self._answered(annotation, given)}

    def _answered(self, annotation: Entry, given: list[str]) -> dict[str, Any]:
        return {
            "answer": annotation.text("multiple_choice_answer"),
            "answers": given,
            "kind": annotation.text("answer_type"),
        }


def _coco_number(entry: Entry) -> int:
    number = entry.name("image_id")
    if not isinstance(number, int):
        raise UserError(f"{entry.where}: image_id '{number}' is not the number of a COCO image")
    return number
