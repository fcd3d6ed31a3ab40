"""Prompts with image slots, laid out on the collator's side of the data loader.

A `Prompt` is a tuple of parts: text, ready-made ids (BOS, EOS), `IMAGE`, and `Answer`. Tokenising
it leaves one `IMAGE_SLOT` sentinel per picture; expanding turns each sentinel into as many
placeholder positions as the bridge gives soft tokens. From then on all lengths are known, and the
model has only to copy soft tokens into place (`latentmodal.llm.splice`).

Shapes: B samples, T positions.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import torch

from latentmodal.llm.answers import IGNORE_INDEX, answer_labels
from latentmodal.llm.batch import PromptBatch, Side

IMAGE_SLOT: Final = -200
"""Stands for one whole picture in a list of ids; no vocabulary has it."""

Span = tuple[int, int]
"""Half-open range of positions, ``ids[start:stop]``."""


class _Image(enum.Enum):
    IMAGE = "image"


IMAGE: Final = _Image.IMAGE
"""The prompt part that stands for one picture."""


@dataclass(frozen=True)
class Answer:
    """What the model is to learn to say: text, or ready-made ids such as (EOS,)."""

    content: str | tuple[int, ...]


class ExpandedIds(NamedTuple):
    """Ids in which every picture has its final number of positions."""

    ids: list[int]
    slot_mask: list[bool]
    spans: list[Span]


@dataclass(frozen=True)
class PromptIds:
    """One laid-out sample; the three lists have equal length."""

    ids: list[int]
    slot_mask: list[bool]
    labels: list[int]
    num_images: int


@dataclass(frozen=True)
class Prompt:
    """Parts in reading order, each tokenised on its own.

    Spaces belong to the parts: nothing is put between them, and ``encode`` must not add special
    tokens of its own. BOS and EOS are parts made of ids.
    """

    parts: tuple[str | tuple[int, ...] | Answer | Literal[_Image.IMAGE], ...]

    def lay_out(
        self,
        encode: Callable[[str], list[int]],
        num_tokens_per_image: int | Sequence[int],
        placeholder_id: int = 0,
    ) -> PromptIds:
        """Tokenise, expand the slots, and label the answers.

        Args:
            encode: text to ids, without special tokens.
            num_tokens_per_image: see `expand_slots`.
            placeholder_id: see `expand_slots`.
        """
        ids: list[int] = []
        spans: list[Span] = []
        for part in self.parts:
            if part is IMAGE:
                ids.append(IMAGE_SLOT)
                continue
            content = part.content if isinstance(part, Answer) else part
            start = len(ids)
            ids.extend(encode(content) if isinstance(content, str) else content)
            if isinstance(part, Answer):
                spans.append((start, len(ids)))
        num_images = ids.count(IMAGE_SLOT)
        expanded = expand_slots(
            ids, num_tokens_per_image, placeholder_id=placeholder_id, spans=spans
        )
        labels = answer_labels(expanded.ids, expanded.spans)
        return PromptIds(expanded.ids, expanded.slot_mask, labels, num_images)


def expand_slots(
    ids: Sequence[int],
    num_tokens_per_image: int | Sequence[int],
    *,
    placeholder_id: int = 0,
    spans: Sequence[Span] = (),
) -> ExpandedIds:
    """Replace each `IMAGE_SLOT` by its picture's number of placeholder positions.

    Args:
        ids: token ids with one `IMAGE_SLOT` per picture.
        num_tokens_per_image: soft tokens of every picture, or one number for each.
        placeholder_id: any id of the vocabulary; its embedding is looked up and overwritten.
        spans: ranges over ``ids``, returned as ranges over the expanded ids.

    Raises:
        ValueError: the numbers do not match the slots, one is below 1, or a span is not within
            ``ids`` or holds a slot.
    """
    num_slots = list(ids).count(IMAGE_SLOT)
    if isinstance(num_tokens_per_image, int):
        counts = [num_tokens_per_image] * num_slots
    else:
        counts = list(num_tokens_per_image)
    if len(counts) != num_slots:
        raise ValueError(f"num_tokens_per_image has {len(counts)} entries for {num_slots} slots")
    if any(count < 1 for count in counts):
        raise ValueError(f"num_tokens_per_image={counts}: every picture needs at least 1 position")

    out_ids: list[int] = []
    slot_mask: list[bool] = []
    moved = [0]  # moved[i]: where ids[i] starts in the expanded ids
    remaining = iter(counts)
    for token in ids:
        is_slot = token == IMAGE_SLOT
        length = next(remaining) if is_slot else 1
        out_ids.extend([placeholder_id if is_slot else token] * length)
        slot_mask.extend([is_slot] * length)
        moved.append(len(out_ids))
    for start, stop in spans:
        if not 0 <= start <= stop <= len(ids):
            raise ValueError(f"span ({start}, {stop}) is not within the {len(ids)} ids")
        if IMAGE_SLOT in ids[start:stop]:
            raise ValueError(f"span ({start}, {stop}) holds an image slot: pictures are never said")
    return ExpandedIds(out_ids, slot_mask, [(moved[start], moved[stop]) for start, stop in spans])


def collate_prompts(
    samples: Sequence[PromptIds], pad_id: int, *, side: Side = "right", end: str | None = None
) -> PromptBatch:
    """Pad samples to the longest of them.

    Args:
        samples: laid-out prompts.
        pad_id: the id at padded positions, which ``mask_BT`` marks false.
        side: where padding goes; "left" for generating, so that all prompts end together.
        end: see `PromptBatch`.
    """
    length = max(len(sample.ids) for sample in samples)

    def pad(row: Sequence[int], value: int) -> list[int]:
        padding = [value] * (length - len(row))
        return [*row, *padding] if side == "right" else [*padding, *row]

    labels_BT = torch.tensor([pad(s.labels, IGNORE_INDEX) for s in samples])
    return PromptBatch(
        ids_BT=torch.tensor([pad(s.ids, pad_id) for s in samples]),
        mask_BT=torch.tensor([pad([1] * len(s.ids), 0) for s in samples], dtype=torch.bool),
        slot_mask_BT=torch.tensor([pad(s.slot_mask, 0) for s in samples], dtype=torch.bool),
        labels_BT=labels_BT,
        slot_counts=[sum(s.slot_mask) for s in samples],
        image_counts=[s.num_images for s in samples],
        num_targets=int((labels_BT[:, 1:] != IGNORE_INDEX).sum()),
        side=side,
        end=end,
    )
