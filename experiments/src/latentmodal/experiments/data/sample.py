"""A sample on its way: bytes out of a shard, then pixels and captions.

Shapes: C channels, H/W pixels, N feature tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from latentmodal.experiments.data.faults import Fault, place

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT_EXTENSIONS = ("txt", "json")


@dataclass(frozen=True, slots=True)
class RawSample:
    """The members of one key of one shard, undecoded.

    ``ordinal`` numbers the keys of a shard from 0, whether or not they are usable. The key is a
    label from an untrusted file: show it, never use it as a path.
    """

    shard: str
    key: str
    ordinal: int
    members: dict[str, bytes]

    @property
    def where(self) -> str:
        """For messages."""
        return place(self.shard, self.key)

    @property
    def image(self) -> bytes | None:
        """The bytes of the first image member in order of `IMAGE_EXTENSIONS`."""
        for extension in IMAGE_EXTENSIONS:
            if extension in self.members:
                return self.members[extension]
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One decoded sample.

    Attributes:
        key: the label it has in its shard.
        image: uint8, CHW; of no size where `features` stand in for it.
        features: what the frozen part of a model makes of the picture (N, D), where it is cached.
        captions: every caption, cleaned; none where the json asks questions instead.
        caption: the one chosen for this visit; "" where there is none.
        meta: what its json held.
        index: its number in an evaluation set; 0 in a training stream.
        draw: 63 random bits for this visit, for whoever chooses something about the sample later
            on; 0 in an evaluation set.
        faults: what went wrong on the way to this sample since the one before.
    """

    key: str
    image: Tensor
    captions: list[str]
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)
    index: int = 0
    draw: int = 0
    faults: tuple[Fault, ...] = ()
    features: Tensor | None = None
