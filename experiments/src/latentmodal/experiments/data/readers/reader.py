"""What a reader makes of its files: pictures with their texts, in the order of the file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from latentmodal.experiments.data.readers.annotations import Document


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatedImage:
    """One picture and all its texts.

    Attributes:
        image_id: ``"<data set>/<id>"``, where the data set is the one the *picture* comes from:
            COCO's captions and VQAv2's questions about one picture carry the same id.
        files: names under the image folder; the first that exists is the picture.
        captions: as published.
        questions: ``question``, and where known ``answer``, ``answers``, ``question_id``, ``kind``.
        domain: of NoCaps: in-domain, near-domain or out-domain.
        description: a long one.
        conversation: turns ``{role, text}`` of user and assistant; ``<image>`` marks the picture.
    """

    image_id: str
    files: tuple[str, ...]
    captions: tuple[str, ...] = ()
    questions: tuple[dict[str, Any], ...] = ()
    domain: str | None = None
    description: str | None = None
    conversation: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reader(ABC):
    """One published file layout.

    Attributes:
        annotations: the file of captions or answers.
        questions: the file of questions, where the layout has one.
        split: the split to call the samples by; some layouts also select by it.
    """

    annotations: Document | None = None
    questions: Document | None = None
    split: str

    needs: ClassVar[tuple[str, ...]] = ("annotations",)
    """Which files must be given."""

    takes: ClassVar[tuple[str, ...]] = ("annotations",)
    """Which files may be given."""

    @classmethod
    @abstractmethod
    def recognises(cls, document: Document) -> bool:
        """Whether a file is in this layout, as far as its first entry tells."""

    @abstractmethod
    def images(self) -> Iterator[AnnotatedImage]:
        """Every picture once. Raises `UserError` naming the entry that cannot be used."""

    @property
    def split_name(self) -> str:
        """What the samples are called by."""
        return self.split
