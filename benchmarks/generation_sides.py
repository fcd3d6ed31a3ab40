"""The two sides of `generation_step.py`: transformers' BLIP-2 class with labels, and ours.

Legend: B pairs, N feature tokens, F width of the features, M soft tokens, T text length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
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
from transformers import Blip2Config, Blip2ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from latentmodal.bridges import QFormerConfig
from latentmodal.bridges.convert import qformer_to_hf
from latentmodal.experiments.systems.vision_language import VisionLanguageModel
from latentmodal.experiments.training.freeze import FROZEN, FreezePlan
from latentmodal.llm import IGNORE_INDEX, CausalConfig, PromptBatch
from latentmodal.llm.prompt import IMAGE, Answer, Prompt, collate_prompts

PAD_ID, START_ID, END_ID = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all sides of a comparison share."""

    shape: QFormerShape
    llm: dict[str, Any]
    """transformers' configuration of the language model."""
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


def our_model(setup: Setup) -> VisionLanguageModel:
    """Without dropout, which would be random on each side."""
    shape, llm = setup.shape, CausalConfig(config=setup.llm).build()
    bridge = QFormerConfig(
        in_dim=shape.in_dim,
        out_dim=llm.width,
        num_queries=shape.num_queries,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        mlp_dim=shape.mlp_dim,
        dropout=0.0,
    )
    return VisionLanguageModel(given_features(), bridge.build(), llm)


def write_weights(setup: Setup) -> None:
    """Initialise our model and put its weights where `setup` says."""
    torch.manual_seed(0)
    write_parameters(our_model(setup), setup.weights)


class GivenVision(nn.Module):
    """transformers' vision tower without its blocks: the pictures are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.post_layernorm = nn.LayerNorm(width)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        tokens_BNF = self.post_layernorm(pixel_values)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens_BNF, pooler_output=tokens_BNF[:, 0]
        )


def their_model(setup: Setup) -> Any:
    """`Blip2ForConditionalGeneration` as it is, without vision blocks and dropout."""
    shape = setup.shape
    config = Blip2Config(
        vision_config={
            "hidden_size": shape.in_dim,
            "num_attention_heads": 1,
            "num_hidden_layers": 0,
            "image_size": 14,
        },
        qformer_config={
            "hidden_size": shape.width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "intermediate_size": shape.mlp_dim,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config=setup.llm,
        num_query_tokens=shape.num_queries,
        image_token_index=setup.llm["vocab_size"] - 1,
    )
    model: Any = Blip2ForConditionalGeneration(config)
    model.vision_model = GivenVision(shape.in_dim)
    return model


def to_theirs(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients under transformers' names."""
    converted = qformer_to_hf(ours)
    assert not converted.unused, converted.unused
    llm = {
        name.replace("llm.model.", "language_model.", 1): x for name, x in converted.rest.items()
    }
    return converted.state | llm


def draw_prompts(setup: Setup, side: Side) -> PromptBatch:
    """Soft tokens, then a caption from its first token to its end: all of it is to be said."""
    vocab_size, batch = setup.llm["vocab_size"], side.batch
    generator = torch.Generator().manual_seed(2)
    samples = []
    for length in caption_lengths(batch).tolist():
        words = torch.randint(END_ID + 1, vocab_size - 1, (length - 2,), generator=generator)
        prompt = Prompt((IMAGE, Answer((START_ID, *words.tolist(), END_ID))))
        samples.append(prompt.lay_out(lambda text: [], setup.shape.num_queries))
    prompts = collate_prompts(samples, PAD_ID)
    if side.tokens == "trimmed":
        return prompts
    missing = setup.shape.num_queries + setup.shape.text_length - prompts.ids_BT.shape[1]
    fill = {"ids_BT": PAD_ID, "mask_BT": 0, "slot_mask_BT": 0, "labels_BT": IGNORE_INDEX}
    longer = {
        name: nn.functional.pad(getattr(prompts, name), (0, missing), value=value)
        for name, value in fill.items()
    }
    return PromptBatch(**(vars(prompts) | longer))


class GenerationStep(TrainingStep):
    """The bridge trains; the language model is frozen and, on a GPU, in bf16."""

    def __init__(self, setup: Setup, side: Side) -> None:
        torch.set_num_threads(setup.threads)
        self.side = side
        prompts = draw_prompts(setup, side).to(setup.device)
        features = draw_features(setup.shape, side.batch).to(setup.device)
        if side.library == "transformers":
            work = self._theirs(setup, features, prompts)
            plan = FreezePlan({"language_model.*": FROZEN})
        else:
            ours = our_model(setup)
            read_parameters(ours, load_file(setup.weights))
            ours.to(setup.device)
            given = (features, prompts.ids_BT, prompts.labels_BT)
            work = Work(ours, lambda: ours(features, prompts), given)
            plan = FreezePlan({"llm.*": FROZEN})
        super().__init__(work, setup.device, plan)

    @staticmethod
    def _theirs(setup: Setup, features: Tensor, prompts: PromptBatch) -> Work:
        model = their_model(setup)
        read_parameters(model, to_theirs(load_file(setup.weights)))
        model.to(setup.device)
        image_id = setup.llm["vocab_size"] - 1
        given = {
            "pixel_values": features,
            "input_ids": prompts.ids_BT.masked_fill(prompts.slot_mask_BT, image_id),
            "attention_mask": prompts.mask_BT.long(),
            "labels": prompts.labels_BT,
        }
        return Work(model, lambda: model(**given).loss, tuple(given.values()))

    def named_gradients(self, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Under transformers' names."""
        return join_attention_biases(own if self.side.library == "transformers" else to_theirs(own))

    def prepare(self) -> None:
        if self.fast:
            name = "language_model" if self.side.library == "transformers" else "llm"
            self.model.get_submodule(name).to(torch.bfloat16)
