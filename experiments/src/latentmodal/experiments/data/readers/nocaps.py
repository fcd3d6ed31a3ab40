"""NoCaps (Agrawal et al. 2019, arXiv 1812.08658): ``nocaps_val_4500_captions.json``.

COCO's caption layout over Open Images: ``{images: [{id, file_name, open_images_id, domain}],
annotations: [{image_id, caption}]}``. The test captions are not published.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from latentmodal.experiments.data.readers.annotations import Document
from latentmodal.experiments.data.readers.grouping import coco_style, is_coco_style
from latentmodal.experiments.data.readers.reader import AnnotatedImage, Reader


@dataclass(frozen=True, kw_only=True)
class NocapsReader(Reader):
    """The whole file; ``split`` is a name only."""

    @classmethod
    def recognises(cls, document: Document) -> bool:
        return is_coco_style(document) and "open_images_id" in document.first("images")

    def images(self) -> Iterator[AnnotatedImage]:
        assert self.annotations is not None
        for image, captions in coco_style(self.annotations):
            yield AnnotatedImage(
                image_id=f"nocaps/{image.label('id')}",
                files=(image.text("file_name"),),
                captions=captions,
                domain=image.text("domain"),
            )
