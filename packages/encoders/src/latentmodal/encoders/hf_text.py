"""BERT-style text encoders from transformers.

Shapes: B batch, T text length, D width.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from latentmodal.encoders.activations import activation_of
from latentmodal.encoders.encoder import TextEncoder, repeated_block_types
from latentmodal.encoders.features import Features
from latentmodal.encoders.hf_source import (
    build_model,
    check_source,
    resolve_config,
    set_grad_checkpointing,
)
from latentmodal.encoders.text_transformer import masked_mean


@dataclass(frozen=True, kw_only=True)
class HfTextConfig:
    """An encoder-only text model of transformers (BERT, RoBERTa, DistilBERT, MPNet ...).

    Attributes:
        model: hub name or local folder.
        config: the configuration itself (`model_type` and fields), for a model without weights.
        random_init: keep the named model's architecture, but start from random weights.
        pooling: "cls" first token, before any pooler layer; "mean" of the valid tokens.
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    random_init: bool = False
    pooling: Literal["cls", "mean"] = "cls"

    def __post_init__(self) -> None:
        check_source(self.model, self.config)
        if self.pooling not in ("cls", "mean"):
            raise ValueError(f"pooling={self.pooling!r} is unknown; choose cls or mean.")

    def build(self) -> "HfTextEncoder":
        return HfTextEncoder(self)


class HfTextEncoder(TextEncoder):
    """A transformers text model under the attribute `model`; padding is hidden from attention."""

    def __init__(self, config: HfTextConfig) -> None:
        super().__init__()
        hf_config = resolve_config(config.model, config.config, "text_config")
        self.config = config
        self.model = build_model(
            config.model, hf_config, random_init=config.random_init, without=("pooler",)
        )
        self.pad_id = hf_config.pad_token_id or 0
        self.width = int(hf_config.hidden_size)
        self.num_tokens = int(hf_config.max_position_embeddings) - _position_offset(hf_config)
        self.vocab_size = int(hf_config.vocab_size)
        self.activation = activation_of(self.model)
        self.fsdp_units = repeated_block_types(self.model)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Features:
        """Encode token ids; without a mask, tokens other than the padding id are valid."""
        valid_BT = ids_BT != self.pad_id if mask_BT is None else mask_BT.bool()
        output = self.model(input_ids=ids_BT, attention_mask=valid_BT.long())
        tokens_BTD = output.last_hidden_state
        if self.config.pooling == "cls":
            return Features(tokens_BTD, tokens_BTD[:, 0], valid_BT)
        return Features(tokens_BTD, masked_mean(tokens_BTD, valid_BT), valid_BT)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        set_grad_checkpointing(self.model, enable)


def _position_offset(hf_config: Any) -> int:
    """RoBERTa counts positions from pad_id + 1, so its table is that much longer than its texts."""
    offset_types = ("roberta", "xlm-roberta", "camembert", "mpnet")
    return hf_config.pad_token_id + 1 if hf_config.model_type in offset_types else 0
