"""The two sides of `qformer_step.py`: BLIP-2's first stage out of transformers' parts, and ours.

Legend: B pairs, M queries, N feature tokens, F width of the features, D width, E embedding width,
T text length, S = M + T, R = 3B pairs to match, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from bridge_inputs import (
    QFormerShape,
    caption_lengths,
    draw_features,
    given_features,
    join_attention_biases,
    read_parameters,
    write_parameters,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from training_step import TrainingStep, Work
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.bert.modeling_bert import BertLMPredictionHead
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from latentmodal.bridges import AlignmentHeadConfig, QFormerConfig
from latentmodal.bridges.convert import qformer_to_hf
from latentmodal.bridges.losses import sample_hard_negatives
from latentmodal.experiments.systems.alignment_model import AlignmentModel, ObjectiveWeights

SEED = 0  # of the negatives
SMOOTHING = 0.1

# transformers' class for retrieval has neither a caption head nor a temperature.
OWN_NAMES = {
    "bridge.caption_head.dense.weight": "caption_head.transform.dense.weight",
    "bridge.caption_head.dense.bias": "caption_head.transform.dense.bias",
    "bridge.caption_head.norm.weight": "caption_head.transform.LayerNorm.weight",
    "bridge.caption_head.norm.bias": "caption_head.transform.LayerNorm.bias",
    "bridge.caption_head.bias": "caption_head.bias",
    "head.temperature": "temperature",
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all sides of a comparison share."""

    shape: QFormerShape
    device: str
    threads: int
    weights: str
    """Ours, as safetensors."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One row of the table."""

    name: str
    library: Literal["transformers", "ours"]
    batch: int
    tokens: Literal["padded", "trimmed"] = "padded"


def our_model(shape: QFormerShape) -> AlignmentModel:
    """Without dropout, which would be random on each side."""
    bridge = QFormerConfig(
        in_dim=shape.in_dim,
        num_queries=shape.num_queries,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        mlp_dim=shape.mlp_dim,
        dropout=0.0,
        vocab_size=shape.vocab_size,
    )
    head = AlignmentHeadConfig(width=shape.width, embed_dim=shape.embed_dim)
    weights = ObjectiveWeights(label_smoothing=SMOOTHING)
    return AlignmentModel(given_features(), bridge.build(), head.build(), weights)


def write_weights(setup: Setup) -> None:
    """Initialise our model and put its weights where `setup` says."""
    torch.manual_seed(0)
    write_parameters(our_model(setup.shape), setup.weights)


def to_theirs(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients under the names of `PlainAlignment`."""
    converted = qformer_to_hf(ours)
    assert set(converted.unused) == set(OWN_NAMES), converted.unused
    return converted.state | {theirs: ours[name] for name, theirs in OWN_NAMES.items()}


class PlainAlignment(nn.Module):
    """BLIP-2's three objectives, one pass of transformers' Q-Former after another.

    Modules are named as in `Blip2ForImageTextRetrieval`, whose image side and heads these are.
    """

    def __init__(self, shape: QFormerShape) -> None:
        super().__init__()
        config = Blip2QFormerConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.mlp_dim,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            encoder_hidden_size=shape.in_dim,
            use_qformer_text_input=True,
        )
        self.vision_model = nn.ModuleDict({"post_layernorm": nn.LayerNorm(shape.in_dim)})
        self.query_tokens = nn.Parameter(torch.empty(1, shape.num_queries, shape.width))
        self.embeddings = Blip2TextEmbeddings(config)
        self.qformer: Any = Blip2QFormerModel(config)
        self.vision_projection = nn.Linear(shape.width, shape.embed_dim)
        self.text_projection = nn.Linear(shape.width, shape.embed_dim)
        self.itm_head = nn.Linear(shape.width, 2)
        self.temperature = nn.Parameter(torch.empty(1))
        self.caption_head = BertLMPredictionHead(config)
        self.caption_head.decoder.weight = self.embeddings.word_embeddings.weight
        self.caption_head.decoder.bias = self.caption_head.bias
        self.decode_id = shape.vocab_size - 1

    def forward(self, features_BNF: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The sum of the three losses."""
        image_BNF = self.vision_model["post_layernorm"](features_BNF)
        similarity_BB = self._similarity(image_BNF, ids_BT, mask_BT)
        labels_B = torch.arange(len(ids_BT), device=ids_BT.device)
        contrastive = (
            F.cross_entropy(similarity_BB, labels_B, label_smoothing=SMOOTHING)
            + F.cross_entropy(similarity_BB.T, labels_B, label_smoothing=SMOOTHING)
        ) / 2
        matching = self._matching(image_BNF, ids_BT, mask_BT, similarity_BB.detach(), labels_B)
        return contrastive + matching + self._captioning(image_BNF, ids_BT, mask_BT)

    def _similarity(self, image_BNF: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Images against texts, over the temperature."""
        query_BMD = self._look(self._queries(len(ids_BT)), image_BNF)
        text_BTD = self.qformer(
            query_embeds=self.embeddings(input_ids=ids_BT), query_length=0, attention_mask=mask_BT
        ).last_hidden_state
        query_BME = F.normalize(self.vision_projection(query_BMD), dim=-1)
        text_BE = F.normalize(self.text_projection(text_BTD[:, 0]), dim=-1)
        similarity_BMB = (query_BME @ text_BE.T).float()
        return similarity_BMB.max(dim=1).values / self.temperature

    def _matching(
        self,
        image_BNF: Tensor,
        ids_BT: Tensor,
        mask_BT: Tensor,
        similarity_BB: Tensor,
        labels_B: Tensor,
    ) -> Tensor:
        # The draw is ours, so that both sides draw alike; LAVIS' has a loop that waits for the GPU.
        texts_B = sample_hard_negatives(similarity_BB, labels_B, seed=2 * SEED).index_B
        images_B = sample_hard_negatives(similarity_BB.T, labels_B, seed=2 * SEED + 1).index_B
        image_RNF = torch.cat([image_BNF, image_BNF[images_B], image_BNF])
        ids_RT = torch.cat([ids_BT, ids_BT, ids_BT[texts_B]])
        mask_RT = torch.cat([mask_BT, mask_BT, mask_BT[texts_B]])
        queries_RMD = self._queries(len(ids_RT))
        mask_RS = torch.cat([mask_RT.new_ones(queries_RMD.shape[:2]), mask_RT], dim=1)
        rows_RSD = self.embeddings(input_ids=ids_RT, query_embeds=queries_RMD)
        logits_RM2 = self.itm_head(self._look(rows_RSD, image_RNF, mask_RS))
        targets_R = torch.cat([torch.ones_like(labels_B), torch.zeros_like(labels_B).repeat(2)])
        return F.cross_entropy(logits_RM2.mean(dim=1).float(), targets_R)

    def _captioning(self, image_BNF: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Queries and text in one pass: transformers' Q-Former has no cache to read them from."""
        ids_BT = torch.cat([torch.full_like(ids_BT[:, :1], self.decode_id), ids_BT[:, 1:]], dim=1)
        queries_BMD = self._queries(len(ids_BT))
        num_queries, total = queries_BMD.shape[1], queries_BMD.shape[1] + ids_BT.shape[1]
        visible_SS = torch.ones(total, total, dtype=torch.bool, device=ids_BT.device).tril()
        visible_SS[:num_queries, :num_queries] = True
        seen_BS = torch.cat([mask_BT.new_ones(queries_BMD.shape[:2]), mask_BT], dim=1).bool()
        rows_BSD = self.qformer(
            query_embeds=self.embeddings(input_ids=ids_BT, query_embeds=queries_BMD),
            query_length=num_queries,
            attention_mask=visible_SS & seen_BS[:, None, None, :],
            encoder_hidden_states=image_BNF,
            encoder_attention_mask=_all_seen(image_BNF),
        ).last_hidden_state
        logits_BTV = self.caption_head(rows_BSD[:, num_queries:])
        targets_BT = ids_BT.masked_fill(mask_BT == 0, -100)
        return F.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1).float(),
            targets_BT[:, 1:].flatten(),
            label_smoothing=SMOOTHING,
        )

    def _look(self, rows: Tensor, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Query rows after a pass in which everyone sees everyone but padding."""
        num_queries = self.query_tokens.shape[1]
        hidden: Tensor = self.qformer(
            query_embeds=rows,
            query_length=num_queries,
            attention_mask=mask,
            encoder_hidden_states=image,
            encoder_attention_mask=_all_seen(image),
        ).last_hidden_state
        return hidden[:, :num_queries]

    def _queries(self, batch: int) -> Tensor:
        return self.query_tokens.expand(batch, -1, -1)


def _all_seen(image_BNF: Tensor) -> Tensor:
    return torch.ones(image_BNF.shape[:2], dtype=torch.int64, device=image_BNF.device)


class AlignmentStep(TrainingStep):
    """Ours clamps the temperature as in training; nobody else does."""

    def __init__(self, setup: Setup, side: Side) -> None:
        torch.set_num_threads(setup.threads)
        self.side = side
        shape, device = setup.shape, setup.device
        lengths_B = caption_lengths(side.batch)
        generator = torch.Generator().manual_seed(2)
        size = (side.batch, shape.text_length)
        ids_BT = torch.randint(1, shape.vocab_size - 1, size, generator=generator)
        mask_BT = torch.arange(shape.text_length) < lengths_B[:, None]
        ids_BT = ids_BT * mask_BT
        num_targets = int(lengths_B.sum()) - side.batch  # the loader counts them
        if side.tokens == "trimmed":  # what `Tokenizer` ships: rounded up to a multiple of 8
            length = -(-int(lengths_B.max()) // 8) * 8
            ids_BT, mask_BT = ids_BT[:, :length], mask_BT[:, :length]
        inputs = tuple(x.to(device) for x in (draw_features(shape, side.batch), ids_BT, mask_BT))
        features, ids, mask = inputs
        if side.library == "transformers":
            plain = PlainAlignment(shape)
            read_parameters(plain, to_theirs(load_file(setup.weights)))
            plain.to(device)
            as_int = mask.long()
            work = Work(plain, lambda: plain(features, ids, as_int), (*inputs, as_int))
        else:
            ours = our_model(shape)
            read_parameters(ours, load_file(setup.weights))
            ours.to(device)
            work = Work(
                ours, lambda: ours(features, ids, mask, None, num_targets, SEED).total, inputs
            )
        super().__init__(work, device)

    def named_gradients(self, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Under the names of `PlainAlignment`."""
        return join_attention_biases(own if self.side.library == "transformers" else to_theirs(own))

    def after_step(self) -> None:
        if isinstance(self.model, AlignmentModel):
            self.model.head.clamp_temperature_()
