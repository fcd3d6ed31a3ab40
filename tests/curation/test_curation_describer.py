"""Describing by a real system, tiny and untrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from latentmodal.encoders import TimmImageConfig, train_word_tokenizer
from latentmodal.experiments.curation.describer import RunDescriber, describer_of
from latentmodal.experiments.curation.generating import GenerateConfig, generate, parse_source
from latentmodal.experiments.curation.ledger import Ledger
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.systems.generation import GenerationConfig, GenerationSystem
from latentmodal.experiments.systems.parts import BRIDGE_CHOICES
from latentmodal.experiments.training.config import OptimConfig, TrainerConfig
from latentmodal.experiments.training.freeze import FreezePlan
from latentmodal.llm import (
    CausalConfig,
    ConversationTemplate,
    GenerationSettings,
    PromptTemplate,
    Turn,
)

LLAMA = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
}
TEXTS = ["describe this image in detail . human : assistant ### say everything you see continue"]
SETTINGS = GenerationSettings(num_beams=1, max_new_tokens=6, min_new_tokens=4)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer that can chat."""
    file = train_word_tokenizer(TEXTS, tmp_path_factory.mktemp("words") / "tokenizer.json")
    PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        bos_token="[BOS]",
        eos_token="[EOT]",
        pad_token="[PAD]",
        chat_template="{% for m in messages %}human {{ m.content }} {% if not loop.last %}"
        "[EOT]{% endif %}{% endfor %}{% if add_generation_prompt %} assistant {% endif %}",
    ).save_pretrained(file.parent / "fast")
    return file.parent / "fast"


def _system(words: Path, **fields: Any) -> GenerationSystem:
    torch.manual_seed(0)
    config = GenerationConfig(
        image_encoder=TimmImageConfig(
            model="vit_tiny_patch16_224",
            image_size=16,
            model_kwargs={"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
        ),
        bridge=BRIDGE_CHOICES["linear"](),
        llm=CausalConfig(config=LLAMA, tokenizer=str(words)),
        **fields,
    )
    trainer = TrainerConfig(max_steps=1, accelerator="cpu")
    return config.build(FreezePlan({}), OptimConfig(), trainer).eval()


def _pixels(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("style", ["vicuna_v0", "run"])
def test_a_batch_is_described_as_one_by_one(words: Path, style: str) -> None:
    conversation = ConversationTemplate(style="vicuna_v0", max_text_tokens=2)
    describer = RunDescriber(_system(words, conversation=conversation), "tiny", style)
    assert describer.takes_words
    asked = [Turn("user", "<image> describe this image")]
    longer = [*asked, Turn("assistant", "image see say"), Turn("user", "continue")]
    pixels_BCHW = _pixels(3)
    conversations = [asked, longer, asked]
    together = describer.describe(pixels_BCHW, conversations, SETTINGS)
    alone = [
        describer.describe(pixels_BCHW[row : row + 1], [conversations[row]], SETTINGS)[0]
        for row in range(3)
    ]
    assert together == alone
    assert describer.count_tokens("describe this image") == 3


def test_an_answer_to_be_continued_is_read_whole(words: Path) -> None:
    system = _system(words, conversation=ConversationTemplate(max_text_tokens=1))
    RunDescriber(system, "tiny", "run")
    turns = [Turn("user", "see"), Turn("assistant", "say everything you see"), Turn("user", "say")]
    ids = system.writer.ask([turns]).ids_BT[0].tolist()
    assert "say everything you see" in system.model.llm.tokenizer.decode(ids)


@pytest.mark.parametrize(
    "fields",
    [
        {"conversation": ConversationTemplate(style="plain")},
        {"prompt": PromptTemplate(text="{image}{answer}{eos}")},
    ],
)
def test_a_run_that_knows_only_captions_is_asked_nothing(
    words: Path, fields: dict[str, Any], tmp_path: Path, emoji_cache: Path
) -> None:
    describer = RunDescriber(_system(words, **fields), "tiny", "run")
    assert not describer.takes_words
    ledger = Ledger(tmp_path / "ledger.jsonl")
    config = GenerateConfig(batch_size=2, limit=3, settings=SETTINGS)
    assert generate(ledger, describer, parse_source("emoji:seen:tiny"), config) == 3
    assert all(record.instruction == "" for record in ledger)


def test_a_run_with_a_prompt_converses_in_a_named_style(
    words: Path, tmp_path: Path, emoji_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = _system(words)
    asked: list[int] = []
    converse = system.converse

    def note(pixels_BCHW: torch.Tensor, conversations: Any, settings: Any) -> list[str]:
        asked.extend(len(turns) for turns in conversations)
        return converse(pixels_BCHW, conversations, settings)

    monkeypatch.setattr(system, "converse", note)
    describer = RunDescriber(system, "tiny", "vicuna_v0")
    ledger = Ledger(tmp_path / "ledger.jsonl")
    config = GenerateConfig(batch_size=2, limit=3, settings=SETTINGS)
    assert generate(ledger, describer, parse_source("emoji:seen:tiny"), config) == 3
    said = [record.generated for record in ledger]
    assert sorted(asked) == [1] * 3 + [3] * sum(map(bool, said))  # whoever spoke went on
    assert any(said)


def test_what_cannot_be_written_is_one_line(words: Path) -> None:
    with pytest.raises(UserError, match=r"--style: .*vicuna_v9.*, or run"):
        describer_of(Path("nowhere"), "vicuna_v9")
    with pytest.raises(UserError, match="nowhere: no run here"):
        describer_of(Path("nowhere"), "vicuna_v0")
    short = _system(words, conversation=ConversationTemplate(max_context_tokens=3))
    with pytest.raises(UserError, match="max_context_tokens is 3"):
        RunDescriber(short, "tiny", "run").describe(
            _pixels(1), [[Turn("user", "<image> describe")]], SETTINGS
        )
    prompt = PromptTemplate(text="{image}{question}{answer}{eos}")
    fielded = _system(words, prompt=prompt, target="answer")
    with pytest.raises(UserError, match="needs the field 'question'"):
        RunDescriber(fielded, "tiny", "run").describe(
            _pixels(1), [[Turn("user", "<image>")]], SETTINGS
        )
