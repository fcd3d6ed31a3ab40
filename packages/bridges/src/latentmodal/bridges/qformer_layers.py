"""The layers of a Q-Former: BERT's (post-norm), with one feed-forward for queries and one for text.

Shape suffixes: B batch, M queries, T text tokens, S = M + T rows of a pass, P prefix rows, K keys a
row may look at, N feature tokens, D width, H heads, C width of one head.
"""

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-12  # BERT's


class KeyValue(NamedTuple):
    """Keys and values, split into heads: (B, H, K, C) each."""

    key: Tensor
    value: Tensor

    def select(self, index_R: Tensor) -> "KeyValue":
        """Rows of the batch, in the order of `index_R`."""
        return KeyValue(self.key.index_select(0, index_R), self.value.index_select(0, index_R))


def split_heads(x_BKD: Tensor, heads: int) -> Tensor:
    """(B, K, D) to (B, H, K, C)."""
    return x_BKD.unflatten(-1, (heads, -1)).transpose(1, 2)


class FeatureKeyValue(nn.Module):
    """Keys and values of the image features for one cross-attention.

    Apart from the layer, because one picture is looked at in several passes (contrastive, matching,
    generating) and by far the most work of a small Q-Former is done here: once is enough.
    """

    def __init__(self, in_dim: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.key = nn.Linear(in_dim, width)
        self.value = nn.Linear(in_dim, width)

    def forward(self, features_BND: Tensor) -> KeyValue:
        return KeyValue(
            split_heads(self.key(features_BND), self.heads),
            split_heads(self.value(features_BND), self.heads),
        )


class _Attention(nn.Module):
    """What both attentions share: the query, the way out, and the norm over the sum."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def attend(self, x_BSD: Tensor, keys: KeyValue, mask_BHSK: Tensor | None) -> Tensor:
        drop = self.dropout if self.training else 0.0
        query_BHSC = split_heads(self.query(x_BSD), self.heads)
        y_BHSC = F.scaled_dot_product_attention(
            query_BHSC, keys.key, keys.value, attn_mask=mask_BHSK, dropout_p=drop
        )
        y_BSD = self.out(y_BHSC.transpose(1, 2).flatten(2))
        return self.norm(x_BSD + F.dropout(y_BSD, self.dropout, self.training))


class SelfAttention(_Attention):
    """Rows look at one another, and at the rows of an earlier pass where one is given."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__(width, heads, dropout)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(
        self, x_BSD: Tensor, mask: Tensor | None, prefix: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        own = KeyValue(
            split_heads(self.key(x_BSD), self.heads), split_heads(self.value(x_BSD), self.heads)
        )
        seen = own
        if prefix is not None:
            seen = KeyValue(
                torch.cat([prefix.key, own.key], dim=2), torch.cat([prefix.value, own.value], dim=2)
            )
        return self.attend(x_BSD, seen, mask), own


class CrossAttention(_Attention):
    """Query rows look at the image features, whose keys and values are ready-made."""

    def forward(self, x_BMD: Tensor, keys: KeyValue, mask: Tensor | None) -> Tensor:
        return self.attend(x_BMD, keys, mask)


class FeedForward(nn.Module):
    """Two linear maps with a GELU between them, added to their input and normalised."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD = self.down(F.gelu(self.up(x_BSD)))
        return self.norm(x_BSD + F.dropout(y_BSD, self.dropout, self.training))


class Rows(NamedTuple):
    """What one pass carries from layer to layer; either part may be absent."""

    query_BMD: Tensor | None
    text_BTD: Tensor | None


class QFormerLayer(nn.Module):
    """Self-attention over queries and text; cross-attention for queries; a feed-forward for each.

    A pass is decided by its arguments alone: which rows there are, who may look at whom
    (`self_mask`), and what of an earlier pass is looked at too (`prefix`).
    """

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float, *, cross: bool, text: bool
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads, dropout)
        self.cross_attention = CrossAttention(width, heads, dropout) if cross else None
        self.query_mlp = FeedForward(width, hidden, dropout)
        self.text_mlp = FeedForward(width, hidden, dropout) if text else None

    def forward(
        self,
        rows: Rows,
        self_mask: Tensor | None,
        prefix: KeyValue | None,
        features: KeyValue | None,
        feature_mask: Tensor | None,
    ) -> tuple[Rows, KeyValue]:
        """One layer.

        Args:
            rows: queries (B, M, D) and text (B, T, D).
            self_mask: bool, True where row S may look at key K, broadcastable to (B, H, S, P + S);
                None: everywhere.
            prefix: keys and values of P rows of an earlier pass through this layer.
            features: keys and values of the image, where this layer has cross-attention.
            feature_mask: bool (B, 1, 1, N), True where a feature token is valid.

        Returns:
            The rows after this layer, and their keys and values in its self-attention.
        """
        parts = [part for part in rows if part is not None]
        x_BSD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        x_BSD, own = self.attention(x_BSD, self_mask, prefix)
        # A split costs the backward pass one concatenation, a slice a whole tensor of zeros.
        parts = list(x_BSD.split([part.shape[1] for part in parts], dim=1))
        query_BMD = None if rows.query_BMD is None else parts.pop(0)
        text_BTD = None if rows.text_BTD is None else parts.pop(0)
        if query_BMD is not None:
            if self.cross_attention is not None and features is not None:
                query_BMD = self.cross_attention(query_BMD, features, feature_mask)
            query_BMD = self.query_mlp(query_BMD)
        if text_BTD is not None:
            assert self.text_mlp is not None
            text_BTD = self.text_mlp(text_BTD)
        return Rows(query_BMD, text_BTD), own


class CaptionHead(nn.Module):
    """BERT's language-model head; its last map is the word embedding itself.

    `forward` takes the embedding as an argument, so that one parameter has one owner.
    """

    fsdp_units: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden_AD: Tensor, word_embed_VD: Tensor) -> Tensor:
        """Hidden states (A, D) to logits (A, V)."""
        return F.linear(self.norm(F.gelu(self.dense(hidden_AD))), word_embed_VD, self.bias)
