"""Shards whose pictures say which caption belongs to them."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from latentmodal.experiments.data.shard_writer import write_shards


def _encode(colour: tuple[int, ...], mode: str, size: tuple[int, int], fmt: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour if len(colour) > 1 else colour[0]).save(buffer, fmt)
    return buffer.getvalue()


@pytest.fixture
def encode_image() -> Callable[..., bytes]:
    """``(colour, mode="RGB", size=(4, 4), fmt="PNG")`` -> bytes of a one-colour picture."""

    def encode(
        colour: tuple[int, ...], mode: str = "RGB", size: tuple[int, int] = (4, 4), fmt: str = "PNG"
    ) -> bytes:
        return _encode(colour, mode, size, fmt)

    return encode


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., list[Path]]:
    """``(shards, per_shard, source=0)`` -> tar files of numbered samples.

    Sample ``i`` of shard ``s`` of source ``t`` has the colour (t, s, i) and the caption "t s i";
    its key is only its number in the shard, so that keys repeat from shard to shard.
    """

    def make(shards: int, per_shard: int, source: int = 0, name: str = "") -> list[Path]:
        def samples() -> Iterator[dict[str, bytes | str | dict]]:
            for s, i in itertools.product(range(shards), range(per_shard)):
                image = _encode((source, s, i), "RGB", (2, 2), "PNG")
                yield {"__key__": f"{i:04d}", "png": image, "txt": f"{source} {s} {i}"}

        return write_shards(samples(), tmp_path / (name or f"source{source}"), per_shard)

    return make


@pytest.fixture
def to_pixels() -> Callable[[Image.Image], Tensor]:
    """The image transform that changes nothing."""
    return pil_to_tensor
