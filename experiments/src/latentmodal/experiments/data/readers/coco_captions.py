"""COCO captions (Chen et al. 2015, arXiv 1504.00325).

The official ``captions_train2014.json``: ``{images: [{id, file_name}], annotations: [{image_id,
caption}]}``; and LAVIS' ``coco_karpathy_train.json``: ``[{image, caption, image_id?}]``, one entry
per caption in training, one per image with a list of captions in val and test.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from latentmodal.experiments.data.readers.annotations import Document, Entry
from latentmodal.experiments.data.readers.grouping import (
    caption_list,
    coco_style,
    is_caption_list,
    is_coco_style,
)
from latentmodal.experiments.data.readers.reader import AnnotatedImage, Reader
from latentmodal.experiments.errors import UserError

_COCO_FILE = re.compile(r"COCO_[a-z]+\d+_0*(\d+)\.[a-z]+$")
_COCO_LABEL = re.compile(r"coco_(\d+)$")


@dataclass(frozen=True, kw_only=True)
class CocoCaptionsReader(Reader):
    """The whole file; ``split`` is a name only."""

    @classmethod
    def recognises(cls, document: Document) -> bool:
        if is_caption_list(document):
            return _coco_number(document.first()) is not None
        return is_coco_style(document) and "open_images_id" not in document.first("images")

    def images(self) -> Iterator[AnnotatedImage]:
        assert self.annotations is not None
        if isinstance(self.annotations.content, list):
            for entry, captions in caption_list(self.annotations):
                yield AnnotatedImage(
                    image_id=f"coco/{_listed_number(entry)}",
                    files=_with_bare_name(entry.text("image")),
                    captions=captions,
                )
        else:
            for image, captions in coco_style(self.annotations):
                yield AnnotatedImage(
                    image_id=f"coco/{image.label('id')}",
                    files=(image.text("file_name"),),
                    captions=captions,
                )


def _with_bare_name(name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((name, name.rpartition("/")[2])))


def _listed_number(entry: Entry) -> str:
    number = _coco_number(entry.value)
    if number is None:
        raise UserError(
            f"{entry.where}: neither image '{entry.text('image')}' nor image_id says which COCO "
            "image it is (COCO_val2014_000000000042.jpg, coco_42)"
        )
    return number


def _coco_number(entry: dict[str, object]) -> str | None:
    for key, pattern in (("image", _COCO_FILE), ("image_id", _COCO_LABEL)):
        if match := pattern.search(str(entry.get(key, ""))):
            return match[1]
    return None
