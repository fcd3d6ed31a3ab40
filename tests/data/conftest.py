"""Shards whose pictures say which caption belongs to them."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from latentmodal.experiments.data.readers.importing import import_dataset
from latentmodal.experiments.data.shard_writer import write_shards
from published_layouts import read_shards


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


@pytest.fixture
def put(tmp_path, encode_image):
    """Writes files under `tmp_path`: JSON for an object, or pictures for names."""

    def write(*names: str, content: Any = None) -> Path:
        for number, name in enumerate(names):
            (path := tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.write_bytes(encode_image((number, 9, 9), fmt="JPEG", size=(8, 8)))
            else:
                path.write_text(json.dumps(content))
        return tmp_path / names[0]

    return write


@pytest.fixture
def run(tmp_path, put):
    """Imports the given files into ``tmp_path/out``; returns what was done and the samples."""

    def do(layout, annotations=None, questions=None, split="val", **options):
        given = {"annotations": annotations, "questions": questions}
        files = {
            role: None if content is None else put(f"{role}.json", content=content)
            for role, content in given.items()
        }
        (tmp_path / "images").mkdir(exist_ok=True)
        settings = {"images": tmp_path / "images", "out": tmp_path / "out", **options}
        done = import_dataset(layout, split=split, **files, **settings)
        return done, read_shards(settings["out"])

    return do
