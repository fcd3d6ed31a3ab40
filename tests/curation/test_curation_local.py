"""Refining by a model on this machine: a tiny random one, read from a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from latentmodal.experiments.curation.ledger import Ledger
from latentmodal.experiments.curation.local import LocalConfig
from latentmodal.experiments.curation.refining import check_answer, refine_ledger
from latentmodal.experiments.errors import UserError

WORDS = ["<pad>", "</s>", "<unk>", "system", "user", "assistant", "a", "brown", "dog", "sits", "."]
CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}assistant "


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """A folder with a tiny random chat model."""
    folder = tmp_path / "model"
    rust = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=rust,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(WORDS),
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


TEXTS = [("a", "a dog ."), ("b", "a brown brown dog sits . a dog"), ("c", "dog")]


def test_a_batch_answers_as_one_by_one(chat_model: Path) -> None:
    def refined(batch_size: int) -> dict[str, object]:
        config = LocalConfig(
            model=str(chat_model), instruction="dog", batch_size=batch_size, max_new_tokens=9
        )
        return dict(config.build().refine(TEXTS))

    together = refined(3)
    assert together == refined(1) == refined(2)
    assert list(together) == ["a", "b", "c"]
    assert len(set(together.values())) > 1  # it does read the texts


def test_the_prompt_is_the_chat_template_s(chat_model: Path) -> None:
    refiner = LocalConfig(model=str(chat_model), instruction="a dog").build()
    ids = refiner._prompt("brown")
    assert [WORDS[i] for i in ids] == "system a dog </s> user brown </s> assistant".split()  # noqa: SIM905


def test_what_it_says_is_checked_and_recorded(
    chat_model: Path, described: Callable[..., Ledger]
) -> None:
    ledger = described(3)
    refiner = LocalConfig(model=str(chat_model), batch_size=2, max_new_tokens=5).build()
    said = dict(refiner.refine([(record.id, record.text) for record in ledger]))
    tally = refine_ledger(ledger, refiner)
    assert tally.refined + tally.refused == 3
    for record in ledger:
        answer = said[record.id]
        assert isinstance(answer, str)
        checked = check_answer(record.generated, answer)
        if isinstance(checked, str):
            assert record.refined == checked
        else:
            assert record.refused == checked.reason
        assert record.by == "model"


def test_models_that_do_not_serve_are_one_line(chat_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--local"):
        LocalConfig(model=str(tmp_path / "absent.gguf")).build()
    (chat_model / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        LocalConfig(model=str(chat_model)).build()


@pytest.mark.parametrize("name", ["batch_size", "max_new_tokens"])
def test_bad_settings_of_a_local_model(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        LocalConfig(model="m", **{name: 0})
