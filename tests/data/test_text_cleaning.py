"""BLIP's text normalisation, as the reference states it."""

from __future__ import annotations

import pytest
import torch

from latentmodal.experiments.data.sample import Sample
from latentmodal.experiments.data.text_cleaning import (
    clean_caption,
    clean_question,
    clean_sample,
)


@pytest.mark.parametrize(
    ("text", "caption", "question"),
    [
        ("A Dog.Runs!", "a dog runs", "a dogruns"),
        ('  "Two"  (2) *men* #1 a:b;c~d \n', "two 2 men 1 a b c d", "two 2 men 1 abcd"),
        ("What's the no. 1?", "what's the no 1?", "what's the no 1?"),
        ("a man, a plan - café", "a man, a plan - café", "a man, a plan - café"),
        ("...", "", ""),
    ],
)
def test_marks_go_and_the_rest_stays(text, caption, question):
    assert clean_caption(text) == caption
    assert clean_question(text) == question


@pytest.mark.parametrize("clean", [clean_caption, clean_question])
def test_length_is_counted_in_words(clean):
    text = " ".join(f"w{i}" for i in range(60))
    assert clean(text).split() == [f"w{i}" for i in range(50)]
    assert clean(text, max_words=2) == "w0 w1"
    with pytest.raises(ValueError, match="max_words=0"):
        clean(text, max_words=0)


def test_of_a_sample_captions_and_questions_are_cleaned_and_answers_are_not() -> None:
    questions = [{"question": "Is it No.1?", "answer": "No. 1!"}, {"answers": ["A."]}, "?"]
    sample = Sample(
        key="1",
        image=torch.zeros(3, 1, 1, dtype=torch.uint8),
        captions=["A Dog!", "Two"],
        caption="Two",
        meta={"questions": questions, "image_id": "A.1"},
    )
    clean = clean_sample(sample)
    assert (clean.captions, clean.caption) == (["a dog", "two"], "two")
    assert clean.meta == {
        "questions": [{"question": "is it no1?", "answer": "No. 1!"}, {"answers": ["A."]}, "?"],
        "image_id": "A.1",
    }
    assert sample.meta["questions"] is questions and questions[0] != clean.meta["questions"][0]
