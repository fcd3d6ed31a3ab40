"""What a trained system says of a few fixed pictures, as a small file beside its metrics.

Shapes: C channels, H/W pixels.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

from PIL import Image
from torch import Tensor

from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.pictures import thumbnail
from latentmodal.experiments.files import write_text_atomically

SAMPLES_FILE: Final = "samples.json"
FORMAT_VERSION = 1

_SIZE: Final = 144
_MAX_REFERENCES: Final = 5
_MAX_CHARACTERS: Final = 600
"""Of a text: the file stays below 200 KB, whatever a model that never stops says."""


@dataclass(frozen=True, kw_only=True)
class CaptionedSample:
    """A picture (JPEG in base64), what is true of it, and what was said."""

    picture: str
    references: tuple[str, ...]
    caption: str

    def image(self) -> Image.Image:
        """The picture, opened."""
        return Image.open(BytesIO(base64.b64decode(self.picture)))


def write_samples(
    path: Path,
    images: Sequence[Tensor],
    references: Sequence[Sequence[str]],
    captions: Sequence[str],
) -> None:
    """Write them as JSON.

    Args:
        path: of the file.
        images: uint8 pictures CHW.
        references: true captions of each; the first few are kept.
        captions: the system's.
    """
    samples = [
        CaptionedSample(
            picture=_jpeg(image_CHW),
            references=tuple(text[:_MAX_CHARACTERS] for text in own[:_MAX_REFERENCES]),
            caption=caption[:_MAX_CHARACTERS],
        )
        for image_CHW, own, caption in zip(images, references, captions, strict=True)
    ]
    payload = {"format_version": FORMAT_VERSION, "samples": [asdict(sample) for sample in samples]}
    write_text_atomically(path, json.dumps(payload, indent=1, ensure_ascii=False) + "\n")


def read_samples(path: Path) -> list[CaptionedSample]:
    """Read what `write_samples` wrote; empty where the run left none.

    Raises:
        UserError: the file is broken, or of another format.
    """
    if not path.is_file():
        return []
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
        if payload["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version is {payload['format_version']}")
        return [
            CaptionedSample(
                picture=own["picture"], references=tuple(own["references"]), caption=own["caption"]
            )
            for own in payload["samples"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is broken ({error}); run latentmodal eval again") from error


def _jpeg(image_CHW: Tensor) -> str:
    data = BytesIO()
    thumbnail(image_CHW, _SIZE).save(data, "JPEG", quality=85)
    return base64.b64encode(data.getvalue()).decode("ascii")
