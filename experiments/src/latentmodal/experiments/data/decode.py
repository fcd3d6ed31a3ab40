"""Bytes of a sample to a picture and its captions; the only decoder data from shards ever meets.

Shapes: H/W pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from latentmodal.experiments.data.faults import BadSampleError, Cause, Fault
from latentmodal.experiments.data.sample import RawSample, Sample
from latentmodal.experiments.data.seeding import derive_seed, derive_uniform, seeded

FORMATS = ("JPEG", "PNG", "WEBP")
WHITE = (255, 255, 255)
_EXIF_ORIENTATION = 0x0112
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_PLAIN = ("L", "1", "P", "CMYK", "YCbCr")
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La", "RGBX")
# Space that str.split() leaves alone: control characters, and halves of surrogate pairs, which no
# text encoding can write.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SCAN_FACTOR = 4  # characters looked at per character kept, so that padding costs bounded time


def decode_image(
    data: bytes,
    *,
    max_pixels: int,
    draft_side: int | None = None,
    background: tuple[int, int, int] = WHITE,
) -> Image.Image:
    """An RGB picture, upright, transparent parts over ``background``; the first frame of several.

    Raises `BadSampleError` for anything that is not a whole JPEG, PNG or WebP of at most
    ``max_pixels``. With ``draft_side`` a JPEG may be decoded smaller (never below it on any side).
    """
    if not data:
        raise BadSampleError(Cause.ZERO_BYTE_IMAGE)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        # Another library may have switched this on; half an image would train as grey.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise BadSampleError(Cause.HUGE_IMAGE, f"{image.width} x {image.height} pixels")
        if draft_side is not None and image.format == "JPEG":
            image.draft("RGB", _draft_size(image.size, draft_side))
        image.load()
        if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            ImageOps.exif_transpose(image, in_place=True)
    except UnidentifiedImageError as error:
        raise BadSampleError(Cause.IMAGE_FORMAT) from error
    except Image.DecompressionBombError as error:
        raise BadSampleError(Cause.HUGE_IMAGE) from error
    except BadSampleError:
        raise
    except Exception as error:
        # Damaged bytes make Pillow's plugins raise almost anything (struct.error, KeyError, ...).
        raise BadSampleError(Cause.CORRUPT_IMAGE, str(error)) from error
    return _to_rgb(image, background)


def _draft_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size to ask libjpeg for, which answers with the next scale that is not smaller."""
    scale = min(1.0, side / min(size))
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT:
        # Pillow's own conversion clips at 255; 65535 must become 255.
        array_HW = np.asarray(image).astype(np.float64)
        array_HW = np.rint(np.clip(array_HW, 0, 65535) / 257)
        return Image.fromarray(array_HW.astype(np.uint8), "L").convert("RGB")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        backdrop = Image.new("RGB", image.size, background)
        backdrop.paste(rgba, mask=rgba.getchannel("A"))
        return backdrop
    if image.mode in _PLAIN:
        return image.convert("RGB")
    raise BadSampleError(Cause.IMAGE_MODE, image.mode)


def clean_caption(text: str, max_chars: int) -> tuple[str, bool]:
    """One line without stray white space, at most ``max_chars`` long; and whether it was cut."""
    looked_at = text[: _SCAN_FACTOR * max_chars]
    clean = " ".join(_CONTROL.sub(" ", looked_at).split())
    clean = _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", clean)
    cut = len(clean) > max_chars or len(looked_at) < len(text.rstrip())
    return clean[:max_chars].rstrip(), cut


class Texts(NamedTuple):
    """What a sample's txt and json say."""

    captions: list[str]
    meta: dict[str, Any]
    cut: bool


def decode_texts(raw: RawSample, max_chars: int) -> Texts:
    """Captions from json ``captions``, else the txt, else json ``caption``; empty ones are dropped.

    Raises `BadSampleError` when the json cannot be read, or when no caption is left and the json
    holds no ``questions`` and no ``conversation`` to learn from instead.
    """
    meta = _read_json(raw.members["json"]) if "json" in raw.members else {}
    listed = meta.get("captions")
    if isinstance(listed, list) and listed:
        found = [text for text in listed if isinstance(text, str)]
    elif "txt" in raw.members:
        found = [raw.members["txt"].decode("utf-8", "replace")]
    else:
        single = meta.get("caption")
        found = [single] if isinstance(single, str) else []
    cleaned = [clean_caption(text, max_chars) for text in found]
    captions = [text for text, _ in cleaned if text]
    if not captions and not _has_other_texts(meta):
        raise BadSampleError(Cause.NO_CAPTION)
    return Texts(captions, meta, any(cut for _, cut in cleaned))


def _has_other_texts(meta: dict[str, Any]) -> bool:
    found = (meta.get(key) for key in ("questions", "conversation"))
    return any(isinstance(texts, list) and texts for texts in found)


def _read_json(data: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(Cause.BAD_JSON, str(error)) from error
    if not isinstance(meta, dict):
        raise BadSampleError(Cause.BAD_JSON, f"holds a {type(meta).__name__}, not an object")
    return meta


class FeatureSource(Protocol):
    """Cached features by shard and place in it."""

    def read(self, shard: str, ordinal: int, seed: int) -> Tensor:
        """Features (N, D); raises `BadSampleError` where the picture could not be decoded."""


def decode_sample(
    raw: RawSample,
    image_transform: Callable[[Image.Image], Tensor],
    *,
    max_pixels: int,
    max_caption_chars: int,
    draft_side: int | None = None,
    caption: str = "first",
    seed: int = 0,
    index: int = 0,
    features: FeatureSource | None = None,
) -> Sample:
    """The whole of it: texts, picture, augmentation, choice of caption.

    ``seed`` names this visit to this sample; it decides the augmentation and the caption, so that
    they do not depend on any state. With ``features`` the picture is left alone, and what the model
    makes of it is read there. Raises `BadSampleError`.
    """
    if raw.image is None:
        raise BadSampleError(Cause.NO_IMAGE)
    texts = decode_texts(raw, max_caption_chars)
    if features is None:
        image = decode_image(raw.image, max_pixels=max_pixels, draft_side=draft_side)
        with seeded(seed):
            pixels_CHW = image_transform(image)
    else:
        pixels_CHW = torch.empty(3, 0, 0, dtype=torch.uint8)
    chosen = 0
    if caption == "random" and len(texts.captions) > 1:
        chosen = int(derive_uniform(seed, "caption") * len(texts.captions))
    captions = texts.captions or [""]
    return Sample(
        key=raw.key,
        image=pixels_CHW,
        captions=texts.captions,
        caption=captions[chosen],
        meta=texts.meta,
        index=index,
        faults=(Fault(Cause.CAPTION_CUT, raw.where),) if texts.cut else (),
        features=None if features is None else features.read(raw.shard, raw.ordinal, seed),
    )


def visit_seed(seed: int, source: int, epoch: int, raw: RawSample) -> int:
    """Names one visit to one sample, whichever rank or worker makes it, wherever the data lie."""
    shard = PurePosixPath(raw.shard).name
    return derive_seed(seed, "visit", source, epoch, shard, raw.ordinal)
