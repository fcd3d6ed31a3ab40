"""Karpathy's splits of COCO, Flickr30k and Flickr8k (Karpathy and Fei-Fei 2015, arXiv 1412.2306).

``dataset_coco.json`` and its siblings: ``{dataset, images: [{filepath?, filename, split, imgid,
cocoid?, sentences: [{raw, …}]}]}``. COCO's training split in the literature is *train + restval*.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from latentmodal.experiments.data.readers.annotations import Document, Entry
from latentmodal.experiments.data.readers.reader import AnnotatedImage, Reader
from latentmodal.experiments.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class KarpathyReader(Reader):
    """The images of ``split``; several splits are joined by ``+`` and called by the first."""

    @classmethod
    def recognises(cls, document: Document) -> bool:
        return "sentences" in document.first("images")

    @property
    def split_name(self) -> str:
        return self.split.partition("+")[0]

    def images(self) -> Iterator[AnnotatedImage]:
        assert self.annotations is not None
        document = self.annotations.entry()
        dataset = document.text("dataset")
        wanted = self.split.split("+")
        seen: Counter[str] = Counter()
        for image in document.entries("images"):
            split = image.text("split")
            seen[split] += 1
            if split in wanted:
                yield _annotated(image, dataset)
        if missing := [split for split in wanted if split not in seen]:
            raise UserError(
                f"{self.annotations.path.name} has no split '{missing[0]}'; choose from "
                f"{', '.join(sorted(seen))}, or join several by +"
            )
        if "train" in wanted and "restval" in seen and "restval" not in wanted:
            logger.info(
                "left out %d images of split restval, which published results train on too: "
                "--split train+restval takes them in",
                seen["restval"],
            )


def _annotated(image: Entry, dataset: str) -> AnnotatedImage:
    name = image.text("filename")
    in_folder = (f"{image.text('filepath')}/{name}",) if "filepath" in image else ()
    return AnnotatedImage(
        image_id=f"{dataset}/{image.label('cocoid' if 'cocoid' in image else 'imgid')}",
        files=(*in_folder, name),
        captions=tuple(
            text for sentence in image.entries("sentences") for text in sentence.texts("raw")
        ),
    )
