"""MiniGPT-4's 3,500 curated descriptions (Zhu et al. 2023, arXiv 2304.10592, section 3.2).

``cc_sbu_align/filter_cap.json``: ``{annotations: [{image_id, caption}]}``, beside the folder
``image`` of ``<image_id>.jpg``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from latentmodal.experiments.data.readers.annotations import Document
from latentmodal.experiments.data.readers.grouping import is_coco_style
from latentmodal.experiments.data.readers.reader import AnnotatedImage, Reader


@dataclass(frozen=True, kw_only=True)
class CcSbuAlignReader(Reader):
    """The whole file; ``split`` is a name only. The first caption is the description too."""

    @classmethod
    def recognises(cls, document: Document) -> bool:
        told = {"image_id", "caption"} <= document.first("annotations").keys()
        return told and not is_coco_style(document)

    def images(self) -> Iterator[AnnotatedImage]:
        assert self.annotations is not None
        captions: dict[str, list[str]] = {}
        for entry in self.annotations.entry().entries("annotations"):
            captions.setdefault(entry.label("image_id"), []).extend(entry.texts("caption"))
        for image, texts in captions.items():
            yield AnnotatedImage(
                image_id=f"cc_sbu_align/{image}",
                files=(f"image/{image}.jpg", f"{image}.jpg"),
                captions=tuple(texts),
                description=texts[0] if texts else None,
            )
