"""The Q-Former: learned queries read an image.

BLIP-2 (Li et al. 2023, arXiv 2301.12597), section 3.

One transformer, used in four ways that differ only in which rows take part and who sees whom:

    encode_queries  queries           all see all            soft tokens, retrieval's image side
    encode_text     text              all see all            retrieval's text side
    match           queries and text  all see all            does this text fit this image?
    caption_hidden  text              queries, earlier text  say what is in the image

Queries never see text while captioning, so their keys and values are those of `encode_queries`:
captioning reads them from there instead of running the queries once more.

Shape suffixes: B batch, M queries, T text tokens, N feature tokens, F width of the features, D
width of the Q-Former, E width of the soft tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentmodal.bridges.bridge import Bridge, BridgeConfig, OutputWidth
from latentmodal.bridges.component import require_positive_int
from latentmodal.bridges.grid import sincos_grid
from latentmodal.bridges.qformer_layers import (
    NORM_EPS,
    CaptionHead,
    FeatureKeyValue,
    KeyValue,
    QFormerLayer,
    Rows,
)


@dataclass(frozen=True, kw_only=True)
class QFormerConfig(BridgeConfig):
    """BLIP-2's sizes by default (BERT base with 32 queries).

    Without `vocab_size` there is no text branch: no text feed-forwards, embeddings or caption head,
    which is what the second stage needs. With it, its last id is the one captioning starts from
    (BLIP-2's `[DEC]`), so it is the tokenizer's size plus one.
    """

    name: ClassVar[str] = "qformer"
    shape_fields: ClassVar[tuple[str, ...]] = ("in_dim", "out_dim", "vocab_size")
    output_width: ClassVar[OutputWidth] = "own"

    in_dim: int
    out_dim: int | None = None
    """Width of the soft tokens, reached by a linear projection; None: the Q-Former's own width."""
    num_queries: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    cross_attention_every: int = 2
    """Layers 0, n, 2n, … look at the image."""
    dropout: float = 0.1
    vocab_size: int | None = None
    max_positions: int = 512
    input_norm: bool = True
    """A LayerNorm over the features, BLIP-2's `ln_vision`."""
    num_input_positions: int | None = None
    """Learned positions added to this many feature tokens, for encoders whose tokens carry none."""
    input_position_init: str = "normal"
    """Where they start: `normal` (as weak as `init_std`), or `sincos` (as strong as the normed
    features, a square grid: neighbours alike), which learns sooner what is where."""
    init_std: float = 0.02
    """Of all weight matrices and embeddings; BERT's, which a much narrower Q-Former may raise."""
    captioning: bool = True
    """False leaves the caption head away, for training without grounded generation."""

    def __post_init__(self) -> None:
        require_positive_int(
            self, "in_dim", "num_queries", "width", "layers", "heads", "mlp_dim",
            "cross_attention_every", "max_positions",
        )  # fmt: skip
        for field in ("out_dim", "vocab_size", "num_input_positions"):
            if getattr(self, field) is not None:
                require_positive_int(self, field)
        if self.width % self.heads:
            raise ValueError(f"width={self.width} does not divide into heads={self.heads}")
        start = self.input_position_init
        if start not in ("normal", "sincos"):
            raise ValueError(f"input_position_init={start!r} is unknown; choose normal or sincos")
        if self.init_std <= 0:
            raise ValueError(f"init_std is {self.init_std}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")

    @property
    def input_tokens(self) -> int | None:
        return self.num_input_positions

    def build(self) -> "QFormer":
        return QFormer(self)


class ImageKeys(NamedTuple):
    """A picture as all cross-attentions see it: keys and values, one pair per such layer."""

    pairs: tuple[KeyValue, ...]
    mask_B11N: Tensor | None

    def select(self, index_R: Tensor) -> "ImageKeys":
        """Rows of the batch, in the order of `index_R`."""
        mask = None if self.mask_B11N is None else self.mask_B11N.index_select(0, index_R)
        return ImageKeys(tuple(pair.select(index_R) for pair in self.pairs), mask)

    @staticmethod
    def cat(*parts: "ImageKeys") -> "ImageKeys":
        """One batch out of several."""
        pairs = tuple(
            KeyValue(torch.cat([p.key for p in layer]), torch.cat([p.value for p in layer]))
            for layer in zip(*(part.pairs for part in parts), strict=True)
        )
        masks = [part.mask_B11N for part in parts if part.mask_B11N is not None]
        assert len(masks) in (0, len(parts)), "all parts have a mask, or none"
        return ImageKeys(pairs, torch.cat(masks) if masks else None)


class QueryStates(NamedTuple):
    """The queries after reading an image, and what captioning needs of every layer."""

    hidden_BMD: Tensor
    cache: tuple[KeyValue, ...]


class QFormer(Bridge):
    """See the module's docstring. As a `Bridge` it gives `num_queries` soft tokens per image.

    Initialised as BERT is: normal of std `init_std`, zero biases; queries likewise.
    """

    config_class = QFormerConfig
    fsdp_units: ClassVar[tuple[type[nn.Module], ...]] = (QFormerLayer, FeatureKeyValue)

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__(config)
        self.config: QFormerConfig = config
        self.in_dim = config.in_dim
        self.out_dim = config.out_dim or config.width
        self.num_output_tokens = config.num_queries
        text = config.vocab_size is not None
        cross = [index % config.cross_attention_every == 0 for index in range(config.layers)]

        self.queries = nn.Parameter(torch.empty(1, config.num_queries, config.width))
        self.input_norm = nn.LayerNorm(config.in_dim) if config.input_norm else None
        self.input_positions: nn.Parameter | None = None
        if config.num_input_positions is not None:
            shape = (1, config.num_input_positions, config.in_dim)
            self.input_positions = nn.Parameter(torch.empty(shape))
        self.feature_kv = nn.ModuleList(
            FeatureKeyValue(config.in_dim, config.width, config.heads) for c in cross if c
        )
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.layers = nn.ModuleList(
            QFormerLayer(
                config.width, config.heads, config.mlp_dim, config.dropout, cross=c, text=text
            )
            for c in cross
        )
        self.word_embed: nn.Embedding | None = None
        self.position_embed: nn.Embedding | None = None
        self.caption_head: CaptionHead | None = None
        if config.vocab_size is not None:
            self.word_embed = nn.Embedding(config.vocab_size, config.width)
            self.position_embed = nn.Embedding(config.max_positions, config.width)
            if config.captioning:
                self.caption_head = CaptionHead(config.width, config.vocab_size)
        self.proj = nn.Linear(config.width, config.out_dim) if config.out_dim is not None else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise in place; also after `to_empty`."""
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, CaptionHead):
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.queries, std=std)
        if self.input_positions is not None:
            if self.config.input_position_init == "sincos":
                places_ND = sincos_grid(*self.input_positions.shape[1:])
                self.input_positions.copy_(places_ND.to(self.input_positions.device))
            else:
                nn.init.normal_(self.input_positions, std=std)

    @property
    def decode_id(self) -> int:
        """The id in first place when captioning, instead of the tokenizer's own."""
        assert self.config.vocab_size is not None
        return self.config.vocab_size - 1

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Map features (B, N, F) to soft tokens (B, M, E).

        Raises:
            ValueError: the features have another width, or another number of tokens than there are
                input positions.
        """
        hidden_BMD = self.encode_queries(self.image_keys(features_BND, mask_BN)).hidden_BMD
        return hidden_BMD if self.proj is None else self.proj(hidden_BMD)

    def image_keys(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> ImageKeys:
        """Keys and values of the features (B, N, F) for every cross-attention."""
        self._check(features_BND)
        if self.input_norm is not None:
            features_BND = self.input_norm(features_BND)
        if self.input_positions is not None:
            features_BND = features_BND + self.input_positions
        mask = None if mask_BN is None else mask_BN[:, None, None, :]
        return ImageKeys(tuple(project(features_BND) for project in self.feature_kv), mask)

    def encode_queries(self, image: ImageKeys) -> QueryStates:
        """Let the queries read the image, without any text."""
        rows, cache = self._run(Rows(self._query_rows(image), None), image=image)
        assert rows.query_BMD is not None
        return QueryStates(rows.query_BMD, cache)

    def encode_text(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Hidden states (B, T, D) of texts alone; the first token's stands for the whole."""
        self_mask_B11T = mask_BT[:, None, None, :]
        rows, _ = self._run(Rows(None, self._text_rows(ids_BT)), self_mask_B11T)
        assert rows.text_BTD is not None
        return rows.text_BTD

    def match(self, image: ImageKeys, ids_BT: Tensor, mask_BT: Tensor) -> Rows:
        """Queries (B, M, D) and text (B, T, D) after looking at one another and the image."""
        seen_BS = F.pad(mask_BT, (self.config.num_queries, 0), value=True)
        rows = Rows(self._query_rows(image), self._text_rows(ids_BT))
        return self._run(rows, seen_BS[:, None, None, :], image=image)[0]

    def caption_hidden(self, ids_BT: Tensor, cache: tuple[KeyValue, ...]) -> Tensor:
        """Hidden states (B, T, D) of captions, each token seeing queries and earlier tokens.

        Args:
            ids_BT: padded on the right, which spares a mask: no token looks ahead. The first id
                is replaced by `decode_id`.
            cache: of `encode_queries` on the same images.
        """
        decode_B1 = torch.full_like(ids_BT[:, :1], self.decode_id)
        text_BTD = self._text_rows(torch.cat([decode_B1, ids_BT[:, 1:]], dim=1))
        length = ids_BT.shape[1]
        causal_TT = torch.ones(length, length, dtype=torch.bool, device=ids_BT.device).tril()
        mask_TK = F.pad(causal_TT, (self.config.num_queries, 0), value=True)
        rows, _ = self._run(Rows(None, text_BTD), mask_TK, prefix=cache)
        assert rows.text_BTD is not None
        return rows.text_BTD

    def caption_logits(self, hidden_AD: Tensor) -> Tensor:
        """Logits (A, V) of the next word."""
        assert self.caption_head is not None and self.word_embed is not None
        logits: Tensor = self.caption_head(hidden_AD, self.word_embed.weight)
        return logits

    def _run(
        self,
        rows: Rows,
        self_mask: Tensor | None = None,
        *,
        prefix: tuple[KeyValue, ...] | None = None,
        image: ImageKeys | None = None,
    ) -> tuple[Rows, tuple[KeyValue, ...]]:
        cache = []
        for index, layer in enumerate(self.layers):
            crossing, rest = divmod(index, self.config.cross_attention_every)
            features = image.pairs[crossing] if image is not None and not rest else None
            rows, own = layer(
                rows,
                self_mask,
                None if prefix is None else prefix[index],
                features,
                None if image is None else image.mask_B11N,
            )
            cache.append(own)
        return rows, tuple(cache)

    def _query_rows(self, image: ImageKeys) -> Tensor:
        query_1MD = self.norm(self.queries)
        query_BMD = query_1MD.expand(image.pairs[0].key.shape[0], -1, -1)
        return F.dropout(query_BMD, self.config.dropout, self.training)

    def _text_rows(self, ids_BT: Tensor) -> Tensor:
        if self.word_embed is None or self.position_embed is None:
            raise ValueError("this Q-Former has no text branch; build it with vocab_size")
        length = ids_BT.shape[1]
        if length > self.config.max_positions:
            raise ValueError(
                f"the text has {length} tokens, max_positions is {self.config.max_positions}; "
                "shorten the tokenizer's context_length"
            )
        embed_BTD = self.word_embed(ids_BT) + self.position_embed.weight[:length]
        return F.dropout(self.norm(embed_BTD), self.config.dropout, self.training)

    def _check(self, features_BND: Tensor) -> None:
        if features_BND.shape[-1] != self.in_dim:
            raise ValueError(
                f"features have width {features_BND.shape[-1]}, this Q-Former reads "
                f"in_dim={self.in_dim}; set it to what the encoder gives"
            )
        positions = self.config.num_input_positions
        if positions is not None and features_BND.shape[1] != positions:
            raise ValueError(
                f"there are {features_BND.shape[1]} feature tokens but num_input_positions is "
                f"{positions}; make them equal"
            )
