"""Encoder-decoder language models of the T5 family, FlanT5 among them.

Shapes: B samples, T positions of the encoder, S positions of the decoder, D hidden width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latentmodal.llm.answers import IGNORE_INDEX, target_loss
from latentmodal.llm.batch import Seq2SeqBatch
from latentmodal.llm.config import LanguageModelConfig
from latentmodal.llm.language_model import LanguageModel

_MASKED = -65504.0
"""A score that softmax makes 0; float16's lowest, so that every precision holds it."""


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig(LanguageModelConfig):
    """An encoder-decoder language model of type t5; not from a GGUF file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gguf is not None:
            raise ValueError(
                f"gguf={self.gguf!r}: only decoder-only models are read from GGUF; give an "
                "encoder-decoder as model (hub name or folder)"
            )

    def build(self) -> "Seq2SeqLM":
        """Load or make the model.

        Raises:
            ValueError: see `find_source`, `read_config`, `build_model` and `add_lora`.
        """
        return Seq2SeqLM(self)


class Seq2SeqLM(LanguageModel):
    """T5: the encoder reads pictures and prompt, the decoder says the answer."""

    kind = "seq2seq"
    _num_start_ids = 1

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__(config)
        hf_config = self.model.config
        start = getattr(hf_config, "decoder_start_token_id", None)
        pad = hf_config.pad_token_id
        self.pad_id = 0 if pad is None else int(pad)
        self.start_id = self.pad_id if start is None else int(start)
        self.model.generation_config.decoder_start_token_id = self.start_id
        # T5 v1.0 shares head and embeddings and scales between them; v1.1 and FlanT5 do neither.
        scales = getattr(hf_config, "scale_decoder_outputs", hf_config.tie_word_embeddings)
        self.head_scale = hf_config.d_model**-0.5 if scales else 1.0

    def forward(
        self,
        batch: Seq2SeqBatch,
        soft_tokens: Tensor | Sequence[Tensor] | None,
        *,
        denominator: Tensor | float | None = None,
    ) -> Tensor:
        """Mean cross-entropy over the answer tokens; see `LanguageModel.forward`."""
        return target_loss(
            self.hidden_states(batch, self.embed(batch, soft_tokens)),
            self._head,
            batch.labels_BS,
            num_targets=batch.num_targets,
            denominator=denominator,
        )

    def hidden_states(self, batch: Seq2SeqBatch, embeds_BTE: Tensor) -> Tensor:
        """Last hidden states of the decoder ``(B, S, D)`` when it is fed the labels."""
        mask = _additive_mask(batch, embeds_BTE.dtype)
        encoded = self.model.get_encoder()(inputs_embeds=embeds_BTE, attention_mask=mask)
        said_BS = F.pad(batch.labels_BS[:, :-1], (1, 0), value=self.start_id)
        decoded = self.model.get_decoder()(
            input_ids=said_BS.masked_fill(said_BS == IGNORE_INDEX, self.pad_id),
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=mask,
            use_cache=False,
        )
        hidden_BSD: Tensor = decoded.last_hidden_state
        return hidden_BSD

    def _head(self, hidden_AD: Tensor) -> Tensor:
        logits_AV: Tensor = self.model.get_output_embeddings()(hidden_AD * self.head_scale)
        return logits_AV


def _additive_mask(batch: Seq2SeqBatch, dtype: torch.dtype) -> Tensor | None:
    """(B, 1, 1, T) for attention scores: of four dimensions because transformers takes it as it is
    then, and does not wait for an accelerator to find out whether anything is masked.
    """
    if not batch.is_padded:
        return None
    mask_BT = torch.zeros(batch.mask_BT.shape, dtype=dtype, device=batch.mask_BT.device)
    return mask_BT.masked_fill(~batch.mask_BT, _MASKED)[:, None, None, :]
