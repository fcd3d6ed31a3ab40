"""VQA accuracy in three variants, exact match and GQA, by hand."""

import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace

import pytest

from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation import vqa
from latentmodal.experiments.evaluation.answers import UsualAnswers
from latentmodal.experiments.evaluation.report import vqa_section
from latentmodal.experiments.evaluation.vqa import (
    exact_match,
    gqa_accuracy,
    normalize_answer,
    normalize_mmf,
    okvqa_lemmatizer,
    vqa_accuracy,
)

VARIANTS = ("official", "lavis", "mmf")


def ten(*counted: tuple[str, int]) -> list[str]:
    answers = [answer for answer, times in counted for _ in range(times)]
    return answers + [f"other{number}" for number in range(10 - len(answers))]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("matches", "expected"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (5, 1.0), (9, 1.0), (10, 1.0)],
)
def test_matches_are_worth(matches, expected, variant):
    result = vqa_accuracy(["dog"], [ten(("dog", matches))], variant=variant)
    assert result.value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answers", "official", "lavis", "mmf"),
    [
        # Ten equal answers: the official script compares them raw, capitals and all.
        ("Yes", ["yes"] * 10, 0.0, 1.0, 1.0),
        ("two", ["2"] * 10, 0.0, 1.0, 1.0),
        # Ten equal answers with an article: LAVIS strips it from the prediction only.
        ("a dog", ["a dog"] * 10, 1.0, 0.0, 1.0),
        # Answers that differ: LAVIS takes their punctuation, not their articles or number words.
        ("two", ten(("two", 9), ("3", 1)), 1.0, 0.0, 1.0),
        ("the dog!", ten(("dog.", 5)), 1.0, 1.0, 1.0),
        # A comma between letters is a space, but MMF deletes commas beforehand.
        ("red,blue", ten(("red blue", 5)), 1.0, 1.0, 0.0),
        ("what's", ten(("what 's", 5)), 0.0, 0.0, 1.0),
        # Only the official script strips ends and tabs of answers that stay as they are.
        (" dog\n", [" dog "] * 10, 1.0, 0.0, 1.0),
    ],
)
def test_variants_disagree(prediction, answers, official, lavis, mmf):
    values = [vqa_accuracy([prediction], [answers], variant=variant).value for variant in VARIANTS]
    assert values == [official, lavis, mmf]


def test_default_is_mmf_and_is_named():
    result = vqa_accuracy(["dog", "cat"], [["dog"] * 10, ten(("cat", 1))])
    assert result.name == "vqa_accuracy_mmf"
    assert result.scores == pytest.approx((1.0, 0.3))
    assert result.value == pytest.approx(0.65)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The  Dog\tand\na cat", "dog and cat"),
        ("none", "0"),
        ("ten zero", "10 0"),
        ("1,000 dogs", "1000 dogs"),
        ("1.5", "1.5"),
        ("1.", "1"),
        ("St. John.", "st john"),
        ("black/white", "black white"),
        ("black/ white", "black white"),
        ("a-b", "b"),  # the sign becomes a space, then the article goes
        ("yes/no -maybe", "yes no maybe"),
        ("t-shirt - red", "tshirt red"),  # one sign beside a space: all of its kind are deleted
        ("7-11, 1,000", "711 1000"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # two apostrophes missing are not mended
        ("couldn'tve", "couldn't've"),
        ("im", "im"),
        ("Im", "im"),
        ("somebody'd", "somebodyd"),
        ("o'clock", "o'clock"),
        ("3:30 & more", "3:30 & more"),  # colon and ampersand are no punctuation here
        ("." * 40, "." * 8),  # the scripts delete 32 periods at most
        ("the", ""),
        ("", ""),
    ],
)
def test_published_normalisation(answer, expected):
    assert normalize_answer(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Man's dog?", "man 's dog"), ("red,blue", "redblue"), ("1,000", "1000"), ("Two.", "2")],
)
def test_mmf_normalisation(answer, expected):
    assert normalize_mmf(answer) == expected


def test_exact_match_has_its_own_name():
    result = exact_match(["A dog.", "two", "cat"], [["dog"], ["2", "3"], ["dog", "bird", "fox"]])
    assert (result.name, result.scores) == ("exact_match", (1.0, 1.0, 0.0))


def test_gqa_normalises_both():
    result = gqa_accuracy(["The table.", "left"], ["table", "right"])
    assert (result.name, result.value) == ("gqa_accuracy", 0.5)


@pytest.mark.parametrize(
    ("predictions", "answers", "message"),
    [
        (["a"], [], "1 predictions for the answers of 0 questions"),
        ([], [], "no answers to score"),
        (["a"], ["dog"], r"answers\[0\] is a text"),
        (["a"], [[]], r"answers\[0\] is empty"),
    ],
)
@pytest.mark.parametrize("metric", [vqa_accuracy, exact_match])
def test_what_does_not_fit_is_refused(metric, predictions, answers, message):
    with pytest.raises(UserError, match=message):
        metric(predictions, answers)


def test_accuracy_needs_ten_answers_and_a_known_variant():
    with pytest.raises(UserError, match=r"answers\[1\] has 1 answers.*take exact_match"):
        vqa_accuracy(["dog", "dog"], [["dog"] * 10, ["dog"]])
    with pytest.raises(UserError, match="variant='llava': choose from official, lavis, mmf"):
        vqa_accuracy(["dog"], [["dog"] * 10], variant="llava")
    with pytest.raises(UserError, match="1 predictions for the answers of 2"):
        gqa_accuracy(["dog"], ["dog", "cat"])


def test_lemmas_are_of_the_prediction_only():
    answers = [ten(("dog", 3), ("dogs", 4))]
    assert vqa_accuracy(["dogs"], answers).value == 1.0
    result = vqa_accuracy(["dogs"], answers, lemmatize=lambda text: text.removesuffix("s"))
    assert result.value == pytest.approx(0.9)
    assert "predictions lemmatised" in result.protocol


@pytest.fixture
def only_spacy_is_missing(monkeypatch):
    monkeypatch.setattr(vqa.importlib.util, "find_spec", lambda _: None)


@pytest.mark.usefixtures("only_spacy_is_missing")
def test_missing_spacy_is_named():
    with pytest.raises(UserError, match=r"needs spacy: pip install spacy.*en_core_web_sm"):
        okvqa_lemmatizer()


def test_lemmatiser_changes_nouns_and_verbs(monkeypatch):
    def pipeline(text: str) -> list[SimpleNamespace]:
        kinds = {"dogs": ("NOUN", "dog"), "running": ("VERB", "run"), "better": ("ADJ", "good")}
        return [
            SimpleNamespace(text=word, pos_=kinds[word][0], lemma_=kinds[word][1])
            for word in text.split()
        ]

    spacy = ModuleType("spacy")
    monkeypatch.setattr(spacy, "load", lambda model: pipeline, raising=False)
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    found = importlib.machinery.ModuleSpec("spacy", None)
    monkeypatch.setattr(vqa.importlib.util, "find_spec", lambda _: found)
    assert okvqa_lemmatizer()("better dogs running") == "better dog run"


def test_section_by_kind():
    result = exact_match(["2", "red", "3"], [["two"], ["red"], ["four"]])
    section = vqa_section(result, kinds=["count", "colour", "count"])
    assert {name: (metric.value, metric.n) for name, metric in section.items()} == {
        "exact_match": (pytest.approx(2 / 3), 3),
        "exact_match/colour": (1.0, 1),
        "exact_match/count": (0.5, 2),
    }
    # The spread of two scores, 0 and 1, over the root of their number.
    assert section["exact_match/count"].standard_error == pytest.approx(0.5 / 2**0.5)
    assert "mmf" in section["exact_match"].protocol
    assert list(vqa_section(result)) == ["exact_match"]
    with pytest.raises(UserError, match="1 kinds for 3 questions"):
        vqa_section(result, kinds=["count"])


def test_usual_answers_are_those_to_the_question_then_to_its_kind_then_to_any():
    usual = UsualAnswers(
        [
            {"question": "Is it red?", "answer": "no", "kind": "colour"},
            {"question": "Is it blue?", "answers": ["yes", "yes", "no"], "kind": "colour"},
            {"question": "How many?", "answer": "two", "kind": "count"},
            {"question": "How many?", "answer": "two", "kind": "count"},
            {"question": "How many?", "answer": "one", "kind": "count"},
            {"question": "How many?", "answer": "two", "kind": "count"},
        ]
    )
    assert usual.to({"question": "Is it blue?", "kind": "colour"}) == "yes"
    assert usual.to({"question": "Is it red?", "kind": "colour"}) == "no"
    # Two and two: the first in the alphabet.
    assert usual.to({"question": "Is it green?", "kind": "colour"}) == "no"
    assert usual.to({"question": "How many cats?", "kind": "count"}) == "two"
    assert usual.to({"question": "Who?"}) == "two"
    with pytest.raises(UserError, match="source has no questions"):
        UsualAnswers([])
