"""Visual Genome's region descriptions as captions (Krishna et al. 2016, arXiv 1602.07332).

The original ``region_descriptions.json``: ``[{id, regions: [{phrase, …}]}]``; and LAVIS'
``vg_caption.json``: ``[{image, caption}]``. The pictures come as two folders, VG_100K and
VG_100K_2, and are called by their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from latentmodal.experiments.data.readers.annotations import Document
from latentmodal.experiments.data.readers.coco_captions import CocoCaptionsReader
from latentmodal.experiments.data.readers.grouping import caption_list, is_caption_list
from latentmodal.experiments.data.readers.reader import AnnotatedImage, Reader

_FOLDERS = ("VG_100K", "VG_100K_2")


@dataclass(frozen=True, kw_only=True)
class VgCaptionsReader(Reader):
    """The whole file; ``split`` is a name only."""

    @classmethod
    def recognises(cls, document: Document) -> bool:
        if is_caption_list(document):
            numbered = PurePosixPath(str(document.first()["image"])).stem.isdecimal()
            return numbered and not CocoCaptionsReader.recognises(document)
        return "regions" in document.first()

    def images(self) -> Iterator[AnnotatedImage]:
        assert self.annotations is not None
        if is_caption_list(self.annotations):
            for entry, captions in caption_list(self.annotations):
                name = PurePosixPath(entry.text("image"))
                yield AnnotatedImage(
                    image_id=f"vg/{name.stem}",
                    files=tuple(dict.fromkeys((str(name), *_places(name.name)))),
                    captions=captions,
                )
        else:
            for image in self.annotations.entries():
                number = image.label("id" if "id" in image else "image_id")
                yield AnnotatedImage(
                    image_id=f"vg/{number}",
                    files=_places(f"{number}.jpg"),
                    captions=tuple(
                        text
                        for region in image.entries("regions")
                        for text in region.texts("phrase")
                    ),
                )


def _places(name: str) -> tuple[str, ...]:
    return (*(f"{folder}/{name}" for folder in _FOLDERS), name)
