"""Put soft tokens where a prompt left room for them.

The collator has already expanded every image slot to as many placeholder positions as the bridge
gives soft tokens (`latentmodal.llm.prompt`), so sequence lengths are known before the forward and
splicing is one indexed copy: no loop over samples, no concatenation, no change of shape.

Shapes: B samples, T positions, E embedding width, M soft tokens of a picture, K pictures in the
batch, S slot positions in the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def splice_soft_tokens(
    embeds_BTE: Tensor,
    slot_mask_BT: Tensor,
    soft_tokens: Tensor | Sequence[Tensor],
    *,
    slot_counts: Sequence[int] | None = None,
    image_counts: Sequence[int] | None = None,
) -> Tensor:
    """Return ``embeds_BTE`` with the soft tokens in place of the slot positions.

    Pictures are taken in reading order: sample by sample, and from left to right within a sample.
    Gradients reach both the soft tokens and the embeddings of all other positions.

    A batch without any picture must still touch the bridge on every rank: otherwise the ranks
    that do have pictures wait for ever for gradients (DDP) or weight gathers (FSDP) the others
    never take part in. Run the bridge on any one picture and pass ``bridge(features)[:0]``: the
    zero-length result adds nothing, stays in the graph, and gives every bridge weight a zero
    gradient.

    Args:
        embeds_BTE: token embeddings; what stands at slot positions is overwritten.
        slot_mask_BT: bool, true at slot positions.
        soft_tokens: ``(K, M, E)``, or one ``(M_i, E)`` per picture. Cast to the dtype of
            ``embeds_BTE``.
        slot_counts: slot positions of each sample, counted by the collator on the CPU
            (`PromptBatch.slot_counts`). With it an accelerator is never waited for; without it
            the mask is counted here, which costs one synchronisation when it is not on the CPU.
        image_counts: pictures of each sample (`PromptBatch.image_counts`). None: one picture for
            every sample that has slots.

    Raises:
        ValueError: the shapes do not fit, or a sample has another number of slot positions than
            its pictures have soft tokens; names that sample and both numbers.
    """
    _check_shapes(embeds_BTE, slot_mask_BT)
    counted_on_cpu = slot_mask_BT.device.type == "cpu"
    slots = list(slot_counts) if slot_counts is not None else _count(slot_mask_BT)
    if slot_counts is not None and counted_on_cpu and slots != _count(slot_mask_BT):
        raise ValueError(
            f"slot_counts={slots} but slot_mask_BT has {_count(slot_mask_BT)} slot positions per "
            "sample: count them after the last cut of the sequence"
        )
    pictures = list(image_counts) if image_counts is not None else [int(n > 0) for n in slots]
    if isinstance(soft_tokens, Tensor):
        soft_counts = [soft_tokens.shape[1]] * soft_tokens.shape[0]
    else:
        soft_counts = [len(tokens_ME) for tokens_ME in soft_tokens]
    _check_counts(slots, pictures, soft_counts)

    soft_SE = _flatten(soft_tokens, embeds_BTE)
    if soft_SE.shape[-1] != embeds_BTE.shape[-1]:
        raise ValueError(
            f"soft tokens have width {soft_SE.shape[-1]}, the language model's embeddings "
            f"{embeds_BTE.shape[-1]}: give the bridge out_dim={embeds_BTE.shape[-1]}"
        )
    # Because the number of positions is known here, finding them needs no synchronisation.
    index_S = torch.nonzero_static(slot_mask_BT.flatten(), size=sum(slots)).squeeze(1)
    index_S = index_S.to(embeds_BTE.device, non_blocking=True)
    return embeds_BTE.flatten(0, 1).index_copy(0, index_S, soft_SE).view_as(embeds_BTE)


def _count(slot_mask_BT: Tensor) -> list[int]:
    counts: list[int] = slot_mask_BT.sum(dim=1).tolist()
    return counts


def _flatten(soft_tokens: Tensor | Sequence[Tensor], like: Tensor) -> Tensor:
    """All soft tokens of the batch in reading order, ``(S, E)``."""
    if isinstance(soft_tokens, Tensor):
        return soft_tokens.flatten(0, 1).to(like.dtype)
    if not soft_tokens:
        return like.new_zeros(0, like.shape[-1])
    return torch.cat(list(soft_tokens)).to(like.dtype)


def _check_shapes(embeds_BTE: Tensor, slot_mask_BT: Tensor) -> None:
    if embeds_BTE.ndim != 3 or slot_mask_BT.shape != embeds_BTE.shape[:2]:
        raise ValueError(
            f"slot_mask_BT of shape {tuple(slot_mask_BT.shape)} does not fit embeds_BTE of shape "
            f"{tuple(embeds_BTE.shape)}: both need the same (batch, length)"
        )
    if slot_mask_BT.dtype != torch.bool:
        raise ValueError(f"slot_mask_BT has dtype {slot_mask_BT.dtype}: make it torch.bool")


def _check_counts(slots: list[int], pictures: list[int], soft_counts: list[int]) -> None:
    """Every sample must have as many slot positions as its pictures have soft tokens."""
    if len(pictures) != len(slots):
        raise ValueError(f"image_counts has {len(pictures)} entries for {len(slots)} samples")
    first = 0
    for sample, (num_slots, num_pictures) in enumerate(zip(slots, pictures, strict=True)):
        counts = soft_counts[first : first + num_pictures]
        if len(counts) != num_pictures or sum(counts) != num_slots:
            raise ValueError(
                f"sample {sample} has {num_slots} slot positions but {sum(counts)} soft tokens "
                f"(from {len(counts)} of its {num_pictures} pictures): expand each slot to the "
                "bridge's num_output_tokens and do not cut the prompt inside a picture"
            )
        first += num_pictures
    # A zero-length list entry is how a batch without pictures keeps the bridge in the graph.
    unused = [n for n in soft_counts[first:] if n > 0]
    if unused:
        raise ValueError(
            f"{len(soft_counts)} pictures were given but the {len(slots)} samples have slots for "
            f"{first}: sample {len(slots) - 1} is the last, {sum(unused)} soft tokens are left over"
        )
