"""Decoder-only language models: OPT, Llama, Vicuna, SmolLM2, Qwen and their like.

Shapes: B samples, T positions, D hidden width.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from latentmodal.llm.answers import answer_loss
from latentmodal.llm.batch import PromptBatch
from latentmodal.llm.config import LanguageModelConfig
from latentmodal.llm.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class CausalConfig(LanguageModelConfig):
    """A decoder-only language model."""

    def build(self) -> "CausalLM":
        """Load or make the model.

        Raises:
            ValueError: see `find_source`, `read_config`, `build_model` and `add_lora`.
        """
        return CausalLM(self)


class CausalLM(LanguageModel):
    """Any `AutoModelForCausalLM` that is a body and a head on its last hidden state."""

    kind = "causal"

    def __init__(self, config: CausalConfig) -> None:
        super().__init__(config)
        self._check_structure()
        parameters = inspect.signature(self.model.base_model.forward).parameters
        self._takes_positions = "position_ids" in parameters

    def forward(
        self,
        batch: PromptBatch,
        soft_tokens: Tensor | Sequence[Tensor] | None,
        *,
        denominator: Tensor | float | None = None,
    ) -> Tensor:
        """Mean cross-entropy over the answer tokens; see `LanguageModel.forward`."""
        return answer_loss(
            self.hidden_states(batch, self.embed(batch, soft_tokens)),
            self.model.get_output_embeddings(),
            batch.labels_BT,
            num_targets=batch.num_targets,
            denominator=denominator,
        )

    def hidden_states(self, batch: PromptBatch, embeds_BTE: Tensor) -> Tensor:
        """Last hidden states ``(B, T, D)``, from which the head makes logits.

        With padding on the right no mask is needed: what a causal model says at a position
        depends on nothing after it, and positions count from the first token. Attention then
        takes its fastest kernel, and no mask is looked at on the accelerator. (Models with rotary
        positions wait for it once all the same: transformers asks whether sequences are packed.)
        """
        inputs: dict[str, Tensor] = {}
        if batch.side == "left":
            inputs["attention_mask"] = batch.mask_BT.long()
            if self._takes_positions:
                counted_BT = batch.mask_BT.long().cumsum(dim=1) - 1
                inputs["position_ids"] = counted_BT.clamp(min=0)
        output = self.model.base_model(inputs_embeds=embeds_BTE, use_cache=False, **inputs)
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD

    def _check_askable(self, batch: PromptBatch) -> None:
        if batch.side != "left":
            raise ValueError(
                "this batch is padded on the right, for training: make it with PromptWriter.ask"
            )

    def _check_structure(self) -> None:
        """Body and head must be all there is, so that calling them apart loses nothing."""
        head = self.model.get_output_embeddings()
        parts = {id(self.model.base_model), id(head)}
        if {id(child) for child in self.model.children()} != parts:
            names = ", ".join(name for name, _ in self.model.named_children())
            raise ValueError(
                f"{type(self.model).__name__} is made of {names}, not of a body and a head: choose "
                "another model type, e.g. llama or opt"
            )
