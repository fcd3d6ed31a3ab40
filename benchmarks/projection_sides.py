"""The sides of `projection_step.py`: MiniGPT-4's first stage as transformers gives it, and ours.

Legend: B pairs, N soft tokens, D width of what the projection reads, T text length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from bridge_inputs import QFormerShape, caption_lengths, given_features
from torch import Tensor, nn
from training_step import TrainingStep, Work
from transformers import AutoConfig, AutoModelForCausalLM
from turns import Turn

from latentmodal.bridges import Bridge, ChainConfig, LinearProjectionConfig, QFormerConfig
from latentmodal.encoders import ImageEncoder, TimmImageConfig
from latentmodal.experiments.systems.vision_language import VisionLanguageModel
from latentmodal.experiments.training.freeze import FROZEN, FreezePlan
from latentmodal.llm import IGNORE_INDEX, CausalConfig, LanguageModel, PromptBatch
from latentmodal.llm.prompt import IMAGE, Answer, Prompt, collate_prompts

PAD_ID, START_ID, END_ID = 1, 2, 3
PLAN = {"image_encoder.*": FROZEN, "qformer.*": FROZEN, "bridge.parts.0.*": FROZEN, "llm.*": FROZEN}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all sides of a comparison share; weights are equal by their seeds."""

    shape: QFormerShape
    """The frozen Q-Former's, and how long texts may be."""
    llm: dict[str, Any]
    """transformers' configuration of the language model."""
    dtype: Literal["float32", "bfloat16"]
    """The language model's, from the start."""
    tower: dict[str, Any]
    """Fields of a `TimmImageConfig`."""
    device: str
    threads: int
    weights: str
    """Where gradients may be left for the comparison: a path in a folder of its own."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One row of the table."""

    name: str
    library: Literal["transformers", "ours"]
    batch: int
    images: Literal["random", "pixels", "cached"] = "random"
    """Random features; pictures; or what the frozen stages make of those pictures."""
    tokens: Literal["padded", "trimmed"] = "trimmed"
    """Texts as long as they may be, or as the batch's longest."""


def draw_texts(setup: Setup, batch: int) -> list[list[int]]:
    """Captions, each with its end."""
    generator = torch.Generator().manual_seed(2)
    low, high = END_ID + 1, setup.llm["vocab_size"]
    return [
        [*torch.randint(low, high, (length - 1,), generator=generator).tolist(), END_ID]
        for length in caption_lengths(batch).tolist()
    ]


def draw_prompts(setup: Setup, batch: int) -> PromptBatch:
    """The first token, soft tokens, and a caption that is to be said."""
    samples = []
    for text in draw_texts(setup, batch):
        prompt = Prompt(((START_ID,), IMAGE, Answer(tuple(text))))
        samples.append(prompt.lay_out(lambda _: [], setup.shape.num_queries))
    return collate_prompts(samples, PAD_ID)


def frozen_stages(setup: Setup) -> tuple[ImageEncoder, Bridge]:
    """Tower and Q-Former, the same modules on every side: they are not what is compared."""
    torch.manual_seed(0)
    tower = TimmImageConfig(**setup.tower).build()
    return tower, qformer_config(setup, tower.width).build()


def qformer_config(setup: Setup, in_dim: int) -> QFormerConfig:
    """Without dropout, of which a frozen Q-Former has none."""
    shape = setup.shape
    return QFormerConfig(
        in_dim=in_dim,
        num_queries=shape.num_queries,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        mlp_dim=shape.mlp_dim,
        dropout=0.0,
    )


def draw_pixels(tower: ImageEncoder, batch: int) -> Tensor:
    """Noise (B, C, H, W) of the size the tower reads."""
    size = tower.preprocess.size
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def cached_features(setup: Setup, batch: int) -> Tensor:
    """What a cache of tower and Q-Former holds for `draw_pixels`: (B, N, D)."""
    tower, qformer = frozen_stages(setup)
    pixels = draw_pixels(tower, batch).to(setup.device)
    features = tower.eval().to(setup.device)(pixels)
    return cast(Tensor, qformer.eval().to(setup.device)(features.tokens_BND))


def random_features(setup: Setup, batch: int) -> Tensor:
    """(B, N, D), as if a Q-Former had written them."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(batch, setup.shape.num_queries, setup.shape.width, generator=generator)


class PlainMiniGPT4(nn.Module):
    """The first stage as MiniGPT-4 writes it: embeddings joined, a mask, labels, all logits."""

    def __init__(self, setup: Setup, from_pixels: bool) -> None:
        super().__init__()
        self.image_encoder: ImageEncoder | None = None
        self.qformer: Bridge | None = None
        if from_pixels:
            self.image_encoder, self.qformer = frozen_stages(setup)
        torch.manual_seed(1)
        with torch.device(setup.device):
            config = AutoConfig.for_model(**setup.llm)
            dtype = getattr(torch, setup.dtype)
            self.llm: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        torch.manual_seed(2)
        self.proj = nn.Linear(setup.shape.width, self.llm.config.hidden_size)

    def forward(self, images: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The loss.

        Args:
            images: pixels, or the features (B, N, D) where there is no tower.
            ids_BT: captions, padded.
            mask_BT: 1 where they are not.
        """
        if self.image_encoder is not None and self.qformer is not None:
            with torch.no_grad():
                images = self.qformer(self.image_encoder(images).tokens_BND)
        embed = self.llm.get_input_embeddings()
        words = embed(ids_BT)
        soft = self.proj(images).to(words.dtype)
        start = embed(ids_BT.new_full((len(ids_BT), 1), START_ID))
        prefix = (len(ids_BT), 1 + soft.shape[1])
        labels = ids_BT.masked_fill(mask_BT == 0, IGNORE_INDEX)
        output = self.llm(
            inputs_embeds=torch.cat([start, soft, words], dim=1),
            attention_mask=torch.cat([mask_BT.new_ones(prefix), mask_BT], dim=1),
            labels=torch.cat([labels.new_full(prefix, IGNORE_INDEX), labels], dim=1),
        )
        loss: Tensor = output.loss
        return loss


def our_model(setup: Setup, from_pixels: bool) -> VisionLanguageModel:
    """A `VisionLanguageModel` with the same weights."""
    tower, qformer = frozen_stages(setup) if from_pixels else (given_features(), None)
    torch.manual_seed(1)
    with torch.device(setup.device):
        llm: LanguageModel = CausalConfig(config=setup.llm, dtype=setup.dtype).build()
    shape = setup.shape
    linear = LinearProjectionConfig(
        in_dim=shape.width, out_dim=llm.width, num_input_tokens=shape.num_queries
    )
    torch.manual_seed(2)
    if qformer is None:
        return VisionLanguageModel(tower, linear.build(), llm)
    projection = linear.build()
    bridge = ChainConfig(parts=(qformer_config(setup, tower.width), linear)).build()
    bridge.parts[0], bridge.parts[1] = qformer, projection
    return VisionLanguageModel(tower, bridge, llm)


class ProjectionStep(TrainingStep):
    """The projection trains; tower, Q-Former and language model are frozen."""

    def __init__(self, setup: Setup, side: Side) -> None:
        torch.set_num_threads(setup.threads)
        from_pixels = side.images == "pixels"
        build = PlainMiniGPT4 if side.library == "transformers" else our_model
        model: nn.Module = build(setup, from_pixels)
        if side.images == "random":
            images = random_features(setup, side.batch)
        elif from_pixels:
            images = draw_pixels(cast(ImageEncoder, model.image_encoder), side.batch)
        else:
            images = cached_features(setup, side.batch)
        model.to(setup.device)
        images = images.to(setup.device)
        if side.library == "transformers":
            ids_BT, mask_BT = _pad(draw_texts(setup, side.batch), setup, side)
            given = (images, ids_BT.to(setup.device), mask_BT.to(setup.device))
            work = Work(model, lambda: model(*given), given)
        else:
            assert side.tokens == "trimmed"
            prompts = draw_prompts(setup, side.batch).to(setup.device)
            given = (images, prompts.ids_BT, prompts.labels_BT)
            work = Work(model, lambda: model(images, prompts), given)
        # Names of parts that a side lacks would be refused as typing errors.
        names = {name for name, _ in model.named_parameters()}
        plan = {p: v for p, v in PLAN.items() if any(n.startswith(p[:-1]) for n in names)}
        super().__init__(work, setup.device, FreezePlan(plan))
        self._loaded = 0

    def named_gradients(self, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The projection's alone, wherever a side keeps it."""
        assert len(own) == 2, sorted(own)
        return {name.rpartition(".")[2]: grad for name, grad in own.items()}

    def prepare(self) -> None:
        if self.fast:
            self.model.get_submodule("llm").to(torch.bfloat16)
            self._loaded = torch.cuda.memory_allocated()

    def turn(self) -> Turn:
        """On a GPU a step that is not timed comes first, and no memory is held afterwards.

        Sides with a language model of some billions of weights do not fit it side by side with
        what their allocators would keep.
        """
        if not self.fast:
            return super().turn()
        self.step()
        turn = super().turn()
        self._leave_room()
        return turn

    def memory(self) -> int | None:
        """Peak bytes beyond the loaded model, on either device."""
        peak = super().memory()
        return None if peak is None else peak - self._loaded


def _pad(texts: list[list[int]], setup: Setup, side: Side) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T)."""
    longest = max(map(len, texts))
    length = setup.shape.text_length if side.tokens == "padded" else longest
    ids = [[*text, *[PAD_ID] * (length - len(text))] for text in texts]
    mask = [[int(i < len(text)) for i in range(length)] for text in texts]
    return torch.tensor(ids), torch.tensor(mask)
