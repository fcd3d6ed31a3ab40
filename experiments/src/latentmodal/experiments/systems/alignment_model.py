"""A frozen image encoder, a Q-Former and its heads: the model of BLIP-2's first stage.

Legend: B pairs, M queries, N feature tokens, D width, T text length, R rows to match, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentmodal.bridges import AlignmentHead, ImageKeys, QFormer, fetch_rows, rank, world_size
from latentmodal.bridges.distributed import all_gather
from latentmodal.bridges.losses import (
    grounded_generation,
    image_text_contrastive,
    image_text_matching,
    sample_hard_negatives,
)
from latentmodal.encoders import ImageEncoder
from latentmodal.experiments.training.freeze import is_frozen


@dataclass(frozen=True, kw_only=True)
class ObjectiveWeights:
    """How much each objective counts; 0 switches it off, and its parameters are not built."""

    itc: float = 1.0
    itm: float = 1.0
    itg: float = 1.0
    label_smoothing: float = 0.1
    """Of the contrastive and the captioning objective."""

    def __post_init__(self) -> None:
        for name in ("itc", "itm", "itg"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 (off) or more")
        if self.itc + self.itm + self.itg == 0:
            raise ValueError("itc, itm and itg are all 0; leave one of them on")


class AlignmentLosses(NamedTuple):
    """The weighted sum, and what TensorBoard shows apart."""

    total: Tensor
    parts: dict[str, Tensor]
    """Each objective's own loss, ITM accuracy and the similarity of the negatives drawn."""


class AlignmentModel(nn.Module):
    """`forward` gives the training losses; the methods below serve evaluation."""

    fsdp_forward_methods = ("encode_image", "encode_text", "match", "likelihood", "caption")

    def __init__(
        self,
        image_encoder: ImageEncoder,
        bridge: QFormer,
        head: AlignmentHead,
        weights: ObjectiveWeights,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.bridge = bridge
        self.head = head
        self.weights = weights

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """What pictures pass before texts come in; a frozen tower's output may be cached."""
        return (self.image_encoder,)

    @property
    def fsdp_units(self) -> tuple[type[nn.Module], ...]:
        """Module classes sharded and recomputed as one piece."""
        return (*self.image_encoder.fsdp_units, *self.bridge.fsdp_units)

    @property
    def fsdp_parts(self) -> tuple[nn.Module, ...]:
        """The tower, which is frozen more often than not."""
        return (self.image_encoder,)

    @property
    def fp32_modules(self) -> tuple[nn.Module, ...]:
        """The head for its temperature; the norm over the features as in BLIP-2."""
        norm = self.bridge.input_norm
        return (self.head,) if norm is None else (self.head, norm)

    def forward(
        self,
        pixels_BCHW: Tensor,
        ids_BT: Tensor,
        mask_BT: Tensor,
        image_ids_B: Tensor | None,
        num_targets: int | None,
        seed: int,
        features_BND: Tensor | None = None,
    ) -> AlignmentLosses:
        """All objectives that are on.

        Args:
            pixels_BCHW: pictures.
            ids_BT: their captions, padded on the right.
            mask_BT: True where a token is not padding.
            image_ids_B: int64; pairs of one id are no negatives of one another. None: all differ.
            num_targets: tokens after the first of each caption, counted by the loader.
            seed: draws the hard negatives; the same on every rank.
            features_BND: the encoder's tokens where they are cached; the pictures are not read.
        """
        if features_BND is None:
            features_BND = self.features(pixels_BCHW)
        image = self.bridge.image_keys(features_BND)
        states = self.bridge.encode_queries(image)
        parts: dict[str, Tensor] = {}
        weights = self.weights
        total = features_BND.new_zeros((), dtype=torch.float32)
        if image_ids_B is None:
            batch = len(ids_BT)
            image_ids_B = torch.arange(batch, device=ids_BT.device) + rank() * batch

        # Without the contrastive objective every wrong pair is as good a negative as any other.
        similarity_BN = total.new_zeros(len(ids_BT), len(ids_BT) * world_size())
        similarities = (similarity_BN, similarity_BN)
        if weights.itc:
            out = self.head(states.hidden_BMD, self.bridge.encode_text(ids_BT, mask_BT)[:, 0])
            result = image_text_contrastive(
                out.image_BME, out.text_BE, out.temperature, ids_B=image_ids_B,
                label_smoothing=weights.label_smoothing,
            )  # fmt: skip
            similarities = (result.image_to_text_BN.detach(), result.text_to_image_BN.detach())
            parts |= {"itc": result.loss, "temperature": out.temperature.detach().squeeze()}
            total = total + weights.itc * result.loss
        if weights.itg:
            hidden_BTD = self.bridge.caption_hidden(ids_BT, states.cache)
            parts["itg"] = grounded_generation(
                hidden_BTD, self.bridge.caption_logits, ids_BT, mask_BT,
                label_smoothing=weights.label_smoothing, num_targets=num_targets,
            )  # fmt: skip
            total = total + weights.itg * parts["itg"]
        if not weights.itc and not weights.itm:
            # Captioning reads the caches only; every parameter must have a gradient.
            total = total + 0.0 * states.hidden_BMD.sum()
        if weights.itm:
            matching = self._matching(
                features_BND, image, ids_BT, mask_BT, image_ids_B, similarities, seed
            )
            if weights.itc:  # as a cosine, not over the temperature
                matching["negative_similarity"] *= parts["temperature"]
            parts |= matching
            total = total + weights.itm * matching["itm"]
        return AlignmentLosses(total, parts)

    def _matching(
        self,
        features_BND: Tensor,
        image: ImageKeys,
        ids_BT: Tensor,
        mask_BT: Tensor,
        image_ids_B: Tensor,
        similarities: tuple[Tensor, Tensor],
        seed: int,
    ) -> dict[str, Tensor]:
        """ITM over three kinds of rows: true pairs, text with a wrong image, image with wrong text.

        A wrong picture costs its features' journey when it lies on another rank; its text stays.
        """
        image_to_text_BN, text_to_image_BN = similarities
        texts = sample_hard_negatives(image_to_text_BN, image_ids_B, seed=2 * seed)
        images = sample_hard_negatives(text_to_image_BN, image_ids_B, seed=2 * seed + 1)
        if world_size() == 1:
            wrong_image = image.select(images.index_B)
        else:
            wrong_image = self.bridge.image_keys(fetch_rows(features_BND, images.index_B))
        ids_BT, mask_BT = _equally_long(ids_BT, mask_BT)
        tokens_B2T = torch.stack([ids_BT, mask_BT.to(ids_BT.dtype)], dim=1)
        wrong_B2T = fetch_rows(tokens_B2T, texts.index_B)

        rows = self.bridge.match(
            ImageKeys.cat(image, wrong_image, image),
            torch.cat([ids_BT, ids_BT, wrong_B2T[:, 0]]),
            torch.cat([mask_BT, mask_BT, wrong_B2T[:, 1].bool()]),
        )
        assert rows.query_BMD is not None and rows.text_BTD is not None
        logits_R2 = self.head.match_logits(rows.query_BMD)
        labels_R = torch.zeros(len(logits_R2), dtype=torch.int64, device=ids_BT.device)
        labels_R[: len(ids_BT)] = 1
        valid_R = torch.cat([torch.ones_like(images.valid_B), images.valid_B, texts.valid_B])
        loss = image_text_matching(logits_R2, labels_R, valid_R)
        if not self.weights.itc and not self.weights.itg:
            # Nothing else reads the last text rows; every parameter must have a gradient.
            loss = loss + 0.0 * rows.text_BTD.sum()
        right_R = (logits_R2.argmax(dim=1) == labels_R) & valid_R
        drawn_B = image_to_text_BN.gather(1, texts.index_B[:, None]).squeeze(1)
        counted_B = texts.valid_B.to(drawn_B.dtype)
        return {
            "itm": loss,
            "itm_accuracy": right_R.sum() / valid_R.sum().clamp(min=1),
            "negative_similarity": (drawn_B * counted_B).sum() / counted_B.sum().clamp(min=1),
        }

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """The encoder's tokens (B, N, D); without autograd when it is frozen."""
        if is_frozen(self.image_encoder):
            with torch.no_grad():
                return self.image_encoder(pixels_BCHW).tokens_BND
        return self.image_encoder(pixels_BCHW).tokens_BND

    def encode_image(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, N, D) for `match`, and unit rows (B, M, E) where retrieval is trained."""
        features_BND = self.features(pixels_BCHW)
        if self.head.image_proj is None:
            return features_BND, None
        states = self.bridge.encode_queries(self.bridge.image_keys(features_BND))
        return features_BND, self.head.embed_image(states.hidden_BMD)

    def encode_text(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Unit rows (B, E)."""
        return self.head.embed_text(self.bridge.encode_text(ids_BT, mask_BT)[:, 0])

    def match(self, features_BND: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """How much text i fits image i: the logit of "fits" (B,)."""
        rows = self.bridge.match(self.bridge.image_keys(features_BND), ids_BT, mask_BT)
        assert rows.query_BMD is not None
        return self.head.match_logits(rows.query_BMD)[:, 1]

    def likelihood(self, features_BND: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Log-likelihood (B,) of text i given image i, as the captioning objective has it."""
        cache = self.bridge.encode_queries(self.bridge.image_keys(features_BND)).cache
        hidden_BTD = self.bridge.caption_hidden(ids_BT, cache)
        logits_BTV = self.bridge.caption_logits(hidden_BTD[:, :-1]).float()
        log_p_BTV = logits_BTV.log_softmax(dim=-1)
        log_p_BT = log_p_BTV.gather(2, ids_BT[:, 1:, None]).squeeze(2)
        return (log_p_BT * mask_BT[:, 1:]).sum(dim=1)

    def caption(self, pixels_BCHW: Tensor, end_id: int, max_tokens: int) -> Tensor:
        """What the Q-Former itself says of each image, word by word: ids (B, max_tokens).

        Greedy; everything from `end_id` on is `end_id`.
        """
        image = self.bridge.image_keys(self.features(pixels_BCHW))
        cache = self.bridge.encode_queries(image).cache
        ids_BT = torch.full((len(pixels_BCHW), 1), end_id, device=pixels_BCHW.device)
        ended_B = torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
        for _ in range(max_tokens):
            hidden_BD = self.bridge.caption_hidden(ids_BT, cache)[:, -1]
            next_B = self.bridge.caption_logits(hidden_BD).argmax(dim=1)
            next_B = next_B.masked_fill(ended_B, end_id)
            ended_B = ended_B | (next_B == end_id)
            ids_BT = torch.cat([ids_BT, next_B[:, None]], dim=1)
        return ids_BT[:, 1:]


def _equally_long(ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Padded to the longest text of all ranks, for rows that are to change places."""
    if world_size() == 1:
        return ids_BT, mask_BT
    # The host waits for the lengths here. It does so in `fetch_rows` around this as well, so that a
    # way around this one alone (padding every text to the full context) would only cost work.
    lengths_W = all_gather(torch.tensor([ids_BT.shape[1]], device=ids_BT.device))
    extra = int(lengths_W.max()) - ids_BT.shape[1]
    return F.pad(ids_BT, (0, extra)), F.pad(mask_BT, (0, extra), value=False)
