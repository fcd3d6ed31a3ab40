"""From a PIL image to uint8 pixels, in one resampling pass.

Cropping and resizing are one call of `Image.resize(box=...)`: no intermediate picture exists, so a
1 x 10000 strip costs no more than any other image. Randomness comes from torch's generator, which
is the one that data loader workers seed and that checkpoints restore.

Shapes: C channels, H/W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tvf

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Interpolation = Literal["bicubic", "bilinear"]
Resize = Literal["crop", "squash"]

_RESAMPLING: dict[str, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
_ASPECT_RATIOS = [3 / 4, 4 / 3]


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an encoder wants its pictures.

    Attributes:
        size: side of the square it reads, in pixels.
        mean, std: per channel, for pixels in [0, 1]; applied by the encoder, not here.
        interpolation: resampling filter, antialiased.
        resize: in evaluation, "crop" scales the shortest side to `size` and keeps the centre;
            "squash" scales both sides to `size`.
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: Interpolation = "bicubic"
    resize: Resize = "crop"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1 pixel.")
        if self.interpolation not in _RESAMPLING:
            raise ValueError(
                f"interpolation={self.interpolation!r} is unknown; choose bicubic or bilinear."
            )
        if self.resize not in ("crop", "squash"):
            raise ValueError(f"resize={self.resize!r} is unknown; choose crop or squash.")

    def train(
        self, scale: tuple[float, float] = (0.9, 1.0), *, flip: bool = False
    ) -> Callable[[Image.Image], Tensor]:
        """A random crop of `scale` of the area, aspect ratio 3/4 to 4/3, resized to the square.

        With `flip`, mirrored half of the time: not for captions that know left from right.
        """
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale={scale} must be two fractions of the area, low then high.")
        return TrainTransform(self, (scale[0], scale[1]), flip)

    def eval(self) -> Callable[[Image.Image], Tensor]:
        """The deterministic transform described under `resize`."""
        return EvalTransform(self)


@dataclass(frozen=True)
class TrainTransform:
    """PIL image -> random resized crop, mirrored or not, uint8 (3, size, size)."""

    preprocess: Preprocess
    scale: tuple[float, float]
    flip: bool = False

    def __call__(self, image: Image.Image) -> Tensor:
        top, left, height, width = RandomResizedCrop.get_params(
            image, list(self.scale), _ASPECT_RATIOS
        )
        pixels_CHW = _resize(image, (left, top, left + width, top + height), self.preprocess)
        # No draw without flips: pictures of runs made before there were any stay the same.
        return pixels_CHW.flip(-1) if self.flip and torch.rand(()) < 0.5 else pixels_CHW


@dataclass(frozen=True)
class EvalTransform:
    """PIL image -> centre crop or squashed picture, uint8 (3, size, size)."""

    preprocess: Preprocess

    def __call__(self, image: Image.Image) -> Tensor:
        if self.preprocess.resize == "squash":
            box = (0.0, 0.0, float(image.width), float(image.height))
        else:
            box = _centre_box(image.width, image.height, self.preprocess.size)
        return _resize(image, box, self.preprocess)


def _centre_box(width: int, height: int, size: int) -> tuple[float, float, float, float]:
    """The source region that "resize the shortest side, then crop the centre" ends up reading.

    The usual two steps round the long side and the crop's offset to whole pixels of the resized
    picture; the same rounding here keeps the result within a rounding step of theirs on pictures
    (Pillow may swap its horizontal and vertical pass, which only pure noise reveals).
    """
    short = min(width, height)
    left, right = _centre_span(width, int(size * width / short), size)
    top, bottom = _centre_span(height, int(size * height / short), size)
    return left, top, right, bottom


def _centre_span(length: int, resized: int, size: int) -> tuple[float, float]:
    offset = round((resized - size) / 2)
    pixel = length / resized
    return offset * pixel, min((offset + size) * pixel, float(length))


def _resize(
    image: Image.Image, box: tuple[float, float, float, float], preprocess: Preprocess
) -> Tensor:
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    square = rgb.resize(
        (preprocess.size, preprocess.size), _RESAMPLING[preprocess.interpolation], box=box
    )
    pixels_CHW: Tensor = tvf.pil_to_tensor(square)
    return pixels_CHW.contiguous(memory_format=torch.contiguous_format)
