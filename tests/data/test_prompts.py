"""A language model's prompts, written in the loader from samples."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from latentmodal.experiments.data.config import LoaderConfig, ShardSourceConfig
from latentmodal.experiments.data.loader import TrainLoader
from latentmodal.experiments.data.prompts import WritePrompts, prompt_fields, sample_conversation
from latentmodal.experiments.data.sample import Sample
from latentmodal.experiments.data.shard_writer import write_shards
from latentmodal.experiments.errors import UserError
from latentmodal.llm import IMAGE_TAG, PromptTemplate, PromptWriter

WORDS = ["a", "cat", "dog", "what", "who", "sits", "Question", "Answer", ":", "?", "tabby", "tom"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
QUESTIONS = [
    {"question": "what sits ?", "answer": "cat", "answers": ["cat", "tabby", "tom"]},
    {"question": "who ?", "answer": "dog"},
]
ASKED = "{image}{bos}Question : {question} Answer : {answer}{eos}"


def writer(text: str = "{image}{bos}{answer}{eos}") -> PromptWriter:
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    return PromptWriter(PromptTemplate(text=text), tokenizer, "causal", num_image_tokens=2)


def sample(draw: int, questions: list[dict[str, Any]] | None = None, caption: str = "") -> Sample:
    return Sample(
        key="0001",
        image=torch.zeros(3, 1, 1, dtype=torch.uint8),
        captions=[caption] if caption else [],
        caption=caption,
        meta={} if questions is None else {"questions": questions},
        draw=draw,
    )


def test_the_caption_of_the_visit_is_the_answer() -> None:
    batch = WritePrompts(writer(), "caption")([sample(5, caption="a cat"), sample(6, caption="a")])
    cat, a = (SPECIAL + WORDS).index("cat"), (SPECIAL + WORDS).index("a")
    # Two slots of a picture, BOS, the caption, EOS.
    assert batch.ids_BT[:, 2:].tolist() == [[1, a, cat, 2], [1, a, 2, 0]]
    assert batch.num_targets == 5


def test_of_questions_and_several_peoples_answers_one_is_drawn() -> None:
    drawn = {tuple(prompt_fields(sample(draw, QUESTIONS), "answer").values()) for draw in range(99)}
    assert drawn == {
        ("what sits ?", "cat"),
        ("what sits ?", "tabby"),
        ("what sits ?", "tom"),
        ("who ?", "dog"),
    }


def test_the_same_draw_is_the_same_prompt_in_another_process_too() -> None:
    write = WritePrompts(writer(ASKED), "answer")
    samples = [sample(draw, QUESTIONS) for draw in (3, 2**62, 3)]
    batch, again = write(samples), pickle.loads(pickle.dumps(write))(samples)  # noqa: S301
    assert torch.equal(batch.ids_BT, again.ids_BT)
    assert torch.equal(batch.ids_BT[0], batch.ids_BT[2])
    alone = write([samples[0]])
    assert alone.ids_BT[0].tolist() == batch.ids_BT[0, : alone.ids_BT.shape[1]].tolist()


def test_all_questions_follow_one_another_and_the_first_has_the_picture() -> None:
    said = [sample_conversation(sample(draw, QUESTIONS), "answers") for draw in range(99)]
    assert sample_conversation(sample(7, QUESTIONS), "answers") == said[7]
    orders = set()
    for turns in said:
        assert [turn.role for turn in turns] == ["user", "assistant"] * 2
        assert turns[0].text.startswith(f"{IMAGE_TAG} ") and IMAGE_TAG not in turns[2].text
        asked = [turn.text.removeprefix(f"{IMAGE_TAG} ") for turn in turns[::2]]
        answered = dict(zip(asked, (turn.text for turn in turns[1::2]), strict=True))
        assert set(answered) == {"what sits ?", "who ?"} and answered["who ?"] == "dog"
        orders.add((*asked, answered["what sits ?"]))
    assert len(orders) == 6, "two orders, three people's answers"


@pytest.mark.parametrize("target", ["answer", "answers"])
def test_a_conversation_without_questions_is_named(target: str) -> None:
    with pytest.raises(UserError, match=f"has no questions in its json; system.target={target} "):
        sample_conversation(sample(1, caption="a cat"), target)


@pytest.mark.parametrize("questions", [None, []])
def test_a_sample_without_questions_is_named(questions: list[dict[str, Any]] | None) -> None:
    with pytest.raises(UserError, match=r"^sample 0001 has no questions in its json; "):
        WritePrompts(writer(ASKED), "answer")([sample(1, questions)])


def test_a_sample_without_a_caption_is_named() -> None:
    with pytest.raises(UserError, match=r"^sample 0001 has no caption; system.target=caption"):
        WritePrompts(writer(), "caption")([sample(1, QUESTIONS)])


@pytest.mark.parametrize(
    "entry", [{"question": "who ?"}, {"answer": "cat"}, {"answers": ["cat"]}, "?"]
)
def test_half_a_question_is_named(entry: Any) -> None:
    with pytest.raises(UserError, match=r"^sample 0001 has an entry in questions without") as found:
        WritePrompts(writer(ASKED), "answer")([sample(1, [entry])])
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_writes_the_prompts_of_its_own_draws(
    tmp_path: Any, encode_image: Any, to_pixels: Any, workers: int
) -> None:
    image = encode_image((1, 2, 3))
    paths = write_shards(
        ({"__key__": f"{i}", "png": image, "json": {"questions": QUESTIONS}} for i in range(8)),
        tmp_path,
        4,
    )
    write = WritePrompts(writer(ASKED), "answer")

    def batches() -> list[Any]:
        loader = TrainLoader(
            [ShardSourceConfig(urls=[str(path) for path in paths])],
            LoaderConfig(batch_size=4, workers=workers, shuffle_window=4),
            steps=6,
            seed=0,
            image_transform=to_pixels,
            prompt_transform=write,
        )
        return list(loader)

    first, second = batches(), batches()
    for batch, again in zip(first, second, strict=True):
        assert all(0 < draw < 2**63 for draw in batch.draws)
        expected = write([sample(draw, QUESTIONS) for draw in batch.draws])
        assert torch.equal(batch.prompts.ids_BT, expected.ids_BT)
        assert torch.equal(batch.prompts.ids_BT, again.prompts.ids_BT)
        assert batch.to("meta").prompts.ids_BT.is_meta
    visits = [draw for batch in first for draw in batch.draws]
    assert len(set(visits)) == len(visits) == 24, "visits to one sample differ from epoch to epoch"
