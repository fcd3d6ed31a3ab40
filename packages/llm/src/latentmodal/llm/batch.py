"""What prompts become for a language model: padded tensors, and the counts known before padding.

Shapes: B samples, T positions of the prompt, S positions of the decoder.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from latentmodal.llm.answers import IGNORE_INDEX

Side = Literal["left", "right"]


class TensorBatch:
    """A dataclass whose tensors move together; numbers and lists stay as they are."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The batch on ``device``; ``non_blocking`` helps only from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The batch in page-locked memory, for `to` with ``non_blocking=True``."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Any) -> Self:
        values = vars(self).items()
        moved = {name: move(value) for name, value in values if isinstance(value, Tensor)}
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class PromptBatch(TensorBatch):
    """A padded batch, and the counts that spare the model every look at its masks.

    Attributes:
        ids_BT: token ids; any id at slot positions.
        mask_BT: true where there is no padding.
        slot_mask_BT: true where a soft token goes.
        labels_BT: ids where there is a target, `IGNORE_INDEX` elsewhere; not shifted.
        slot_counts: slot positions of each sample.
        image_counts: pictures of each sample.
        num_targets: labels that are not ignored, the first column aside.
        side: where the padding is.
        end: text that ends an answer in place of the tokenizer's EOS.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    slot_mask_BT: Tensor
    labels_BT: Tensor
    slot_counts: list[int]
    image_counts: list[int]
    num_targets: int
    side: Side = "right"
    end: str | None = None

    def count_tokens(self) -> Tensor:
        """Positions without padding, on the batch's device."""
        return self.mask_BT.sum()


@dataclass(frozen=True)
class Seq2SeqBatch(TensorBatch):
    """A padded batch for an encoder-decoder: the prompt it reads, the answers it is to say.

    Attributes:
        ids_BT, mask_BT, slot_mask_BT, slot_counts, image_counts, end: as in `PromptBatch`.
        labels_BS: ids of the answers, `IGNORE_INDEX` at padding; position s is predicted from the
            labels before it.
        num_targets: labels that are not ignored.
        is_padded: whether ``mask_BT`` has a false anywhere.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    slot_mask_BT: Tensor
    labels_BS: Tensor
    slot_counts: list[int]
    image_counts: list[int]
    num_targets: int
    is_padded: bool
    end: str | None = None

    def count_tokens(self) -> Tensor:
        """Positions without padding that encoder and decoder read, on the batch's device."""
        return self.mask_BT.sum() + (self.labels_BS != IGNORE_INDEX).sum()
