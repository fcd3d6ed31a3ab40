"""Samples to a batch.

Shapes: B batch, C channels, H/W pixels, N feature tokens, D width, T text length, M texts (B x
captions per image).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from latentmodal.experiments.data.faults import Fault
from latentmodal.experiments.data.sample import Sample
from latentmodal.experiments.data.seeding import derive_seed
from latentmodal.experiments.errors import UserError


class TextTensors(NamedTuple):
    """Token ids (int64) and which of them are text rather than padding (bool), one row per text."""

    ids_BT: Tensor
    mask_BT: Tensor


class Movable(Protocol):
    """Tensors that travel together, such as the prompts of a language model."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any: ...

    def pin_memory(self) -> Any: ...


class HasTokens(Protocol):
    """What a tokenizer returns."""

    @property
    def ids_BT(self) -> Tensor: ...

    @property
    def mask_BT(self) -> Tensor: ...


TextTransform = Callable[[list[str]], HasTokens]
PromptTransform = Callable[[Sequence[Sample]], Movable]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A training or evaluation batch.

    Attributes:
        pixels_BCHW: uint8; (B, 3, 0, 0) where there are features instead.
        features_BND: what the frozen part of the model makes of the pictures, in the dtype of the
            cache it was read from.
        text: tokens of ``captions``; T is 0 without a tokenizer.
        num_text_tokens: how many of them are not padding, counted here so that no accelerator
            has to be asked.
        prompts: what a language model reads, where the system has one.
        keys: labels of the samples, for messages.
        captions: the caption chosen for each image.
        all_captions: every caption of each image.
        meta: the json of each sample.
        index_B: int64, the number of each sample in an evaluation set (padding repeats one); zeros
            in training.
        image_ids_B, text_ids_M: int64; text j is a positive of image i where they are equal. None:
            each row with its own.
        draws: the random number of each visit (`Sample.draw`), below 2**63; zeros in evaluation.
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
    num_text_tokens: int = 0
    prompts: Any = None
    draws: list[int] = field(default_factory=list)
    faults: tuple[Fault, ...] = ()
    features_BND: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with every tensor on ``device``."""
        return self._map(lambda tensors: tensors.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch with every tensor in page-locked memory; torch's loader calls this."""
        return self._map(lambda tensors: tensors.pin_memory())

    def _map(self, change: Callable[[Any], Any]) -> Batch:
        return replace(
            self,
            pixels_BCHW=change(self.pixels_BCHW),
            features_BND=None if self.features_BND is None else change(self.features_BND),
            text=TextTensors(change(self.text.ids_BT), change(self.text.mask_BT)),
            index_B=change(self.index_B),
            image_ids_B=None if self.image_ids_B is None else change(self.image_ids_B),
            text_ids_M=None if self.text_ids_M is None else change(self.text_ids_M),
            prompts=None if self.prompts is None else change(self.prompts),
        )


@dataclass(frozen=True)
class Collate:
    """Stacks samples, tokenizes their captions and writes prompts, in the worker."""

    text_transform: TextTransform | None = None
    prompt_transform: PromptTransform | None = None
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
        elif self.match == "image":
            # A name that includes its data set: plain numbers of two sets would collide.
            images = [str(sample.meta.get("image_id", sample.key)) for sample in samples]
            image_ids_B = text_ids_M = torch.tensor([derive_seed(name) for name in images])
        elif self.match == "fact":
            facts = [str(sample.meta.get("fact", sample.caption)) for sample in samples]
            image_ids_B = text_ids_M = torch.tensor([derive_seed(fact) for fact in facts])
        tokens = self._tokens(texts)
        features = [sample.features for sample in samples if sample.features is not None]
        return Batch(
            pixels_BCHW=torch.stack([sample.image for sample in samples]),
            features_BND=None if not features else torch.stack(features),
            text=tokens,
            num_text_tokens=int(tokens.mask_BT.sum()),
            prompts=None if self.prompt_transform is None else self.prompt_transform(samples),
            keys=[sample.key for sample in samples],
            captions=captions,
            all_captions=[sample.captions for sample in samples],
            meta=[sample.meta for sample in samples],
            index_B=torch.tensor([sample.index for sample in samples]),
            image_ids_B=image_ids_B,
            text_ids_M=text_ids_M,
            draws=[sample.draw for sample in samples],
            faults=tuple(fault for sample in samples for fault in sample.faults),
        )

    def _texts(self, sample: Sample) -> list[str]:
        """The chosen caption and the ones after it, round the list; "" where there is none.

        Raises:
            UserError: there is none, and the system reads captions.
        """
        if not sample.captions:
            if self.text_transform is not None:
                raise UserError(f"sample {sample.key} has no caption; this system trains on them")
            return [sample.caption] * self.captions_per_image
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
