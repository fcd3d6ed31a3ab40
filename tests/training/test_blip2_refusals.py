"""What a system of BLIP-2 refuses to be built of, and what it does with the recipe's seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from latentmodal.encoders import TimmImageConfig, TransformersTokenizerConfig, WordTokenizerConfig
from latentmodal.encoders import train_word_tokenizer as train_words
from latentmodal.experiments.data.collate import Batch, Collate
from latentmodal.experiments.data.sample import Sample
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.systems.alignment import AlignmentConfig, AlignmentSystem
from latentmodal.experiments.systems.alignment_model import AlignmentLosses
from latentmodal.experiments.systems.generation import GenerationConfig, GenerationSystem
from latentmodal.experiments.systems.parts import BRIDGE_CHOICES
from latentmodal.experiments.systems.vision_language import VisionLanguageModel
from latentmodal.experiments.training.config import OptimConfig, TrainerConfig
from latentmodal.experiments.training.freeze import FreezePlan
from latentmodal.llm import CausalConfig, LoraConfig, PromptWriter

TRAINER = TrainerConfig(max_steps=9, accelerator="cpu")  # nothing is logged before the last
FROZEN = {"image_encoder.*": "frozen", "llm.*": "frozen"}
SIGLIP = "vit_base_patch16_siglip_224"  # its pooling is attention with weights of its own
CAPTIONS = ["a red dog", "two blue cats", "a red cat", "two dogs"]


def tower(model: str = "vit_tiny_patch16_224") -> TimmImageConfig:
    kwargs = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8}
    return TimmImageConfig(model=model, image_size=16, model_kwargs=kwargs)


def bridge() -> Any:
    return BRIDGE_CHOICES["qformer"](
        num_queries=3, width=16, layers=2, heads=2, mlp_dim=32, max_positions=16, dropout=0.0
    )


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer."""
    return train_words(CAPTIONS, tmp_path_factory.mktemp("words") / "tokenizer.json").parent


def aligned(words: Path, plan: dict[str, Any], model: str = "vit_tiny_patch16_224") -> Any:
    torch.manual_seed(0)
    config = AlignmentConfig(
        image_encoder=tower(model), bridge=bridge(), tokenizer=None, embed_dim=8
    )
    tokenizer = WordTokenizerConfig(path=str(words), context_length=12).build()
    return config.build(FreezePlan(plan), OptimConfig(), TRAINER, tokenizer)


def speaking(
    words: Path, plan: dict[str, Any], model: str = "vit_tiny_patch16_224", **llm: Any
) -> GenerationSystem:
    file = str(words / "tokenizer.json")
    names = {"bos_token": "[BOS]", "eos_token": "[EOT]", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_file=file, **names).save_pretrained(words / "fast")
    fields = {
        "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16,
    }  # fmt: skip
    config = GenerationConfig(
        image_encoder=tower(model),
        bridge=bridge(),
        llm=CausalConfig(config=fields, tokenizer=str(words / "fast"), **llm),
    )
    torch.manual_seed(0)
    return config.build(FreezePlan(plan), OptimConfig(), TRAINER)


def samples(captions: list[str]) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(
            key=str(row),
            image=torch.randint(256, (3, 16, 16), generator=generator, dtype=torch.uint8),
            captions=[text] if text else [],
            caption=text,
        )
        for row, text in enumerate(captions)
    ]


def batch_for(system: Any) -> Batch:
    return Collate(system.text_transform, system.prompt_transform)(samples(CAPTIONS))


@pytest.mark.parametrize("make", [aligned, speaking])
@pytest.mark.parametrize("model", [SIGLIP, "vit_tiny_patch16_224"])
def test_everything_that_trains_gets_a_gradient(words: Path, make: Any, model: str) -> None:
    """Under DDP a parameter without one ends the run at its second step."""
    system = make(words, {"llm.*": "frozen"} if make is speaking else {}, model).train()
    tower_of = dict(system.model.image_encoder.named_parameters())
    pooling = {name for name, p in tower_of.items() if not p.requires_grad}
    assert len(pooling) < len(tower_of)
    assert all("attn_pool" in name for name in pooling) and (model == SIGLIP) == bool(pooling)
    system.training_step(batch_for(system), 0).backward()
    lacking = [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []
    assert not any(p.grad is not None for p in system.parameters() if not p.requires_grad)


def test_adapters_that_are_frozen_with_their_model(words: Path) -> None:
    with pytest.raises(ValueError, match=r"^freeze: the adapters of system.llm.lora are frozen"):
        speaking(words, FROZEN, lora=LoraConfig(rank=2))
    system = speaking(words, {"*lora_*": 1.0, **FROZEN}, lora=LoraConfig(rank=2))
    assert any(p.requires_grad for p in system.model.llm.parameters())


@pytest.mark.parametrize("template", ["$A [EOT]", "$A"])
def test_a_tokenizer_that_begins_with_a_word(words: Path, tmp_path: Path, template: str) -> None:
    tokenizer = WordTokenizerConfig(path=str(words), context_length=12).build()
    raw = tokenizer.tokenizer
    raw.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("[EOT]", 2)]
    )
    names = {"eos_token": "[EOT]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(tmp_path)
    wordy = TransformersTokenizerConfig(model=str(tmp_path), context_length=12).build()
    config = AlignmentConfig(image_encoder=tower(), bridge=bridge(), tokenizer=None)
    with pytest.raises(ValueError, match=r"^system.tokenizer: texts begin with a word, and the"):
        config.build(FreezePlan({}), OptimConfig(), TRAINER, wordy)


def test_a_sample_without_a_caption(words: Path) -> None:
    system = aligned(words, {})
    with pytest.raises(UserError, match=r"^sample 1 has no caption; this system trains on them"):
        Collate(system.text_transform)(samples(["a dog", ""]))


class Spy(nn.Module):
    """Stands for the model and notes the seeds of the negatives."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds: list[int] = []

    def forward(self, *arguments: Any) -> AlignmentLosses:
        self.seeds.append(arguments[5])
        return AlignmentLosses(torch.zeros(()), {})


def test_runs_of_other_seeds_draw_other_negatives(
    words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, spy = aligned(words, {}), Spy()
    batch = batch_for(system)
    system.model = spy
    for system.seed in (0, 1, 0):
        for step in (0, 1):
            monkeypatch.setattr(AlignmentSystem, "global_step", step)
            system.training_step(batch, step)
    first, second, again = (spy.seeds[start : start + 2] for start in (0, 2, 4))
    assert first == again and len({*first, *second}) == 4
    # Two draws are made of each, and torch takes 64 bits.
    torch.Generator().manual_seed(2 * max(spy.seeds) + 1)
    torch.Generator().manual_seed(2 * (2**63 - 1) + 1)


def test_texts_to_evaluate_on_are_cleaned_like_those_of_training(words: Path) -> None:
    system = aligned(words, {}).eval()
    features_2ND = torch.randn(2, 5, 16)

    def read(texts: list[str]) -> list[Tensor]:
        scores = (system.match_scores, system.caption_scores)
        return [system.embed_captions(texts), *(score(features_2ND, texts) for score in scores)]

    raw, clean = ["A (red) dog!", "Two: blue cats."], ["a red dog", "two blue cats"]
    expected = read(clean)
    assert not any(torch.equal(a, b) for a, b in zip(read(raw), expected, strict=True))
    system.clean = "blip"
    assert all(torch.equal(a, b) for a, b in zip(read(raw), expected, strict=True))


def test_questions_are_cleaned_like_those_of_training(
    words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = speaking(words, FROZEN)
    asked: list[Any] = []
    ask = PromptWriter.ask

    def noted(writer: PromptWriter, fields: Any) -> Any:
        asked.append(fields)
        return ask(writer, fields)

    monkeypatch.setattr(PromptWriter, "ask", noted)
    monkeypatch.setattr(VisionLanguageModel, "generate", lambda *_: ["yes"])
    fields = [{"question": "Is it No. 1?", "other": "A."}]
    for system.clean in ("none", "blip"):
        assert system.answer(torch.zeros(1, 3, 16, 16), fields) == ["yes"]
    assert asked == [fields, [{"question": "is it no 1?", "other": "A."}]]
