"""Captions that stand one by one, put together by image; shared by several layouts."""

from __future__ import annotations

from collections.abc import Iterator

from latentmodal.experiments.data.readers.annotations import Document, Entry
from latentmodal.experiments.errors import UserError


def coco_style(document: Document) -> Iterator[tuple[Entry, tuple[str, ...]]]:
    """``{images: [{id, …}], annotations: [{image_id, caption}]}``: each image and its captions."""
    root = document.entry()
    images = {image.name("id"): image for image in root.entries("images")}
    captions: dict[int | str, list[str]] = {number: [] for number in images}
    for annotation in root.entries("annotations"):
        number = annotation.name("image_id")
        if number not in captions:
            raise UserError(f"{annotation.where} is about image {number}, which 'images' lacks")
        captions[number].extend(annotation.texts("caption"))
    for number, image in images.items():
        yield image, tuple(captions[number])


def is_coco_style(document: Document) -> bool:
    """Whether the file holds images and captions of them, as far as the first ones tell."""
    return "caption" in document.first("annotations") and "id" in document.first("images")


def caption_list(document: Document) -> Iterator[tuple[Entry, tuple[str, ...]]]:
    """``[{image, caption}]`` (LAVIS): the first entry of each image, and all its captions."""
    first: dict[str, Entry] = {}
    captions: dict[str, list[str]] = {}
    for entry in document.entries():
        name = entry.text("image")
        first.setdefault(name, entry)
        captions.setdefault(name, []).extend(entry.texts("caption"))
    for name, entry in first.items():
        yield entry, tuple(captions[name])


def is_caption_list(document: Document) -> bool:
    """Whether the file is a list of image names with captions, as far as the first one tells."""
    return {"image", "caption"} <= document.first().keys()
