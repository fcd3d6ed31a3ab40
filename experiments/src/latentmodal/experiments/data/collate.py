"""Samples to a batch.

Shapes: B batch, C channels, H/W pixels, T text length, M texts (B x captions per image).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from latentmodal.experiments.data.faults import Fault
from latentmodal.experiments.data.sample import Sample
from latentmodal.experiments.data.seeding import derive_seed


class TextTensors(NamedTuple):
    """Token ids (int64) and which of them are text rather than padding (bool), one row per text."""

    ids_BT: Tensor
    mask_BT: Tensor


class HasTokens(Protocol):
    """What a tokenizer returns."""

    @property
    def ids_BT(self) -> Tensor: ...

    @property
    def mask_BT(self) -> Tensor: ...


TextTransform = Callable[[list[str]], HasTokens]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A training or evaluation batch.

    Attributes:
        pixels_BCHW: uint8.
        text: tokens of ``captions``; T is 0 without a tokenizer.
        keys: labels of the samples, for messages.
        captions: the caption chosen for each image.
        all_captions: every caption of each image.
        meta: the json of each sample.
        index_B: int64, the number of each sample in an evaluation set (padding repeats one); zeros
            in training.
        image_ids_B, text_ids_M: int64; text j is a positive of image i where they are equal. None:
            each row with its own.
        faults: what was skipped or mended on the way to this batch.
    """

    pixels_BCHW: Tensor
    text: TextTensors
    keys: list[str]
    captions: list[str]
    all_captions: list[list[str]]
    meta: list[dict[str, Any]]
    index_B: Tensor
    image_ids_B: Tensor | None = None
    text_ids_M: Tensor | None = None
    faults: tuple[Fault, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with every tensor on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch with every tensor in page-locked memory; torch's loader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            pixels_BCHW=change(self.pixels_BCHW),
            text=TextTensors(change(self.text.ids_BT), change(self.text.mask_BT)),
            index_B=change(self.index_B),
            image_ids_B=None if self.image_ids_B is None else change(self.image_ids_B),
            text_ids_M=None if self.text_ids_M is None else change(self.text_ids_M),
        )


@dataclass(frozen=True)
class Collate:
    """Stacks samples and tokenizes their captions, in the worker."""

    text_transform: TextTransform | None = None
    match: str = "row"
    captions_per_image: int = 1

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        captions = [sample.caption for sample in samples]
        texts = [text for sample in samples for text in self._texts(sample)]
        image_ids_B = text_ids_M = None
        if self.captions_per_image > 1:
            names = [derive_seed(sample.key, *sample.captions) for sample in samples]
            image_ids_B = torch.tensor(names)
            text_ids_M = image_ids_B.repeat_interleave(self.captions_per_image)
        elif self.match == "caption":
            image_ids_B = text_ids_M = torch.tensor([derive_seed(text) for text in captions])
        return Batch(
            pixels_BCHW=torch.stack([sample.image for sample in samples]),
            text=self._tokens(texts),
            keys=[sample.key for sample in samples],
            captions=captions,
            all_captions=[sample.captions for sample in samples],
            meta=[sample.meta for sample in samples],
            index_B=torch.tensor([sample.index for sample in samples]),
            image_ids_B=image_ids_B,
            text_ids_M=text_ids_M,
            faults=tuple(fault for sample in samples for fault in sample.faults),
        )

    def _texts(self, sample: Sample) -> list[str]:
        """The chosen caption and the ones after it, round the list."""
        first, count = sample.captions.index(sample.caption), len(sample.captions)
        return [sample.captions[(first + i) % count] for i in range(self.captions_per_image)]

    def _tokens(self, captions: list[str]) -> TextTensors:
        if self.text_transform is None:
            empty = (len(captions), 0)
            return TextTensors(
                torch.zeros(empty, dtype=torch.int64), torch.zeros(empty, dtype=torch.bool)
            )
        tokens = self.text_transform(captions)
        return TextTensors(tokens.ids_BT, tokens.mask_BT)
