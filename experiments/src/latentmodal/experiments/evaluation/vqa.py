"""Scores of answers to questions about pictures: VQA accuracy in three variants, exact match, GQA.

The variants give different figures for the same answers, since they disagree about what is
normalised before answers are compared; a figure without its variant says little.
"""

import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from latentmodal.experiments.errors import UserError

Variant = Literal["official", "lavis", "mmf"]
"""``official``: VQA's own script since 2021, which normalises prediction and answers only where
the ten answers differ. ``lavis``: as before 2021 and in LAVIS, the prediction always, the answers
only their punctuation and only where they differ. ``mmf``: as in MMF, EvalAI and LLaVA, all."""

NUM_ANSWERS: Final = 10
"""Annotators of a question of VQA, VQAv2, OK-VQA."""

_PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER: Final = re.compile(r"\d,\d")
_PERIOD: Final = re.compile(r"\.(?!\d)")
_MAX_PERIODS: Final = 32
"""The scripts pass a flag where the greatest number of replacements goes; its value is 32."""
_ARTICLES: Final = frozenset({"a", "an", "the"})
_NUMBER_WORDS: Final = "zero one two three four five six seven eight nine ten"
_NUMBERS: Final = {"none": "0"} | {
    word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())
}
_CONTRACTED: Final = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""
"""What the scripts put an apostrophe into, where exactly one is missing. It is no list of English:
"im" stays as it is, for the scripts look for "Im" in lower-case text."""
_CONTRACTIONS: Final = {
    form[:place] + form[place + 1 :]: form
    for form in _CONTRACTED.split()
    for place, letter in enumerate(form)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


@dataclass(frozen=True, kw_only=True)
class VqaResult:
    """``scores`` in [0, 1], one for each question; ``protocol`` says how they were taken."""

    name: str
    protocol: str
    scores: tuple[float, ...]

    @property
    def value(self) -> float:
        """Mean over questions."""
        return sum(self.scores) / len(self.scores)


def vqa_accuracy(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    variant: Variant = "mmf",
    lemmatize: Callable[[str], str] | None = None,
) -> VqaResult:
    """VQA accuracy: mean over the ten annotators of min(1, other annotators who agree / 3).

    One, two, three, and four or more equal answers are worth 0.3, 0.6, 0.9 and 1. Annotators are
    told apart by their place in the list: the published scripts compare whole records and score
    ten equal answers without ``answer_id`` as 0.

    Args:
        predictions: one for each question.
        answers: the ten of each question.
        variant: see `Variant`.
        lemmatize: applied to predictions first, as BLIP-2 does for OK-VQA; see
            `okvqa_lemmatizer`.

    Raises:
        UserError: the two differ in length, are empty, a question has not ten answers, or no such
            variant.
    """
    _check(predictions, answers)
    if variant not in get_args(Variant):
        raise UserError(f"variant='{variant}': choose from {', '.join(get_args(Variant))}")
    for row, own in enumerate(answers):
        if len(own) != NUM_ANSWERS:
            raise UserError(
                f"answers[{row}] has {len(own)} answers, VQA accuracy is over {NUM_ANSWERS}: "
                "take exact_match"
            )
    if lemmatize is not None:
        predictions = [lemmatize(prediction) for prediction in predictions]
    scores = tuple(
        _leave_one_out(*_comparable(prediction, own, variant))
        for prediction, own in zip(predictions, answers, strict=True)
    )
    protocol = f"variant {variant}; {NUM_ANSWERS} answers, each annotator left out in turn"
    if lemmatize is not None:
        protocol += "; predictions lemmatised"
    return VqaResult(name=f"vqa_accuracy_{variant}", protocol=protocol, scores=scores)


def exact_match(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> VqaResult:
    """Share of predictions equal to any of their answers, however many; all normalised (mmf).

    Raises:
        UserError: the two differ in length, are empty, or a question has no answer.
    """
    _check(predictions, answers)
    scores = tuple(
        float(normalize_mmf(prediction) in {normalize_mmf(answer) for answer in own})
        for prediction, own in zip(predictions, answers, strict=True)
    )
    protocol = "equal to any answer after VQA's normalisation (mmf) of both"
    return VqaResult(name="exact_match", protocol=protocol, scores=scores)


def gqa_accuracy(predictions: Sequence[str], answers: Sequence[str]) -> VqaResult:
    """Share of predictions equal to the one answer; both normalised (mmf).

    Raises:
        UserError: the two differ in length or are empty.
    """
    result = exact_match(predictions, [[answer] for answer in answers])
    protocol = "equal to the answer after VQA's normalisation (mmf) of both"
    return VqaResult(name="gqa_accuracy", protocol=protocol, scores=result.scores)


def normalize_answer(text: str) -> str:
    """The published rules: punctuation, case, number words, articles, contractions."""
    return _plain_words(_without_punctuation(_stripped(text)))


def normalize_mmf(text: str) -> str:
    """`normalize_answer` after MMF's own step: no commas or question marks, "'s" a word."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize_answer(text)


def okvqa_lemmatizer(model: str = "en_core_web_sm") -> Callable[[str], str]:
    """Nouns and verbs to their dictionary form, by spaCy, as BLIP-2 does for OK-VQA.

    Args:
        model: an installed spaCy pipeline.

    Raises:
        UserError: spaCy or the pipeline is not installed.
    """
    for package in ("spacy", model):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"lemmatising answers needs {package}: pip install spacy, then "
                f"python -m spacy download {model}"
            )
    pipeline = importlib.import_module("spacy").load(model)

    def lemmatize(text: str) -> str:
        return " ".join(
            token.lemma_ if token.pos_ in ("NOUN", "VERB") else token.text
            for token in pipeline(text)
        )

    return lemmatize


def _comparable(
    prediction: str, answers: Sequence[str], variant: Variant
) -> tuple[str, Sequence[str]]:
    """Prediction and answers as the variant compares them."""
    match variant:
        case "mmf":
            return normalize_mmf(prediction), [normalize_mmf(answer) for answer in answers]
        case "lavis":
            if len(set(answers)) > 1:
                answers = [_without_punctuation(answer) for answer in answers]
            return normalize_answer(prediction), answers
        case "official":
            prediction, answers = _stripped(prediction), [_stripped(answer) for answer in answers]
            if len(set(answers)) > 1:
                answers = [normalize_answer(answer) for answer in answers]
                prediction = normalize_answer(prediction)
            return prediction, answers


def _leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    agreeing = sum(answer == prediction for answer in answers)
    others = (agreeing - (answer == prediction) for answer in answers)
    return sum(min(1.0, count / 3) for count in others) / len(answers)


def _stripped(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Delete a sign that stands beside a space anywhere in ``text``; else make it a space.

    With a comma between digits anywhere, every sign is deleted.
    """
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if beside_space or in_number else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


def _plain_words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _check(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(answers):
        raise UserError(
            f"{len(predictions)} predictions for the answers of {len(answers)} questions"
        )
    if not predictions:
        raise UserError("no answers to score: check that the split is not empty")
    for row, own in enumerate(answers):
        if isinstance(own, str):
            raise UserError(f"answers[{row}] is a text: give the list of its answers")
        if not own:
            raise UserError(f"answers[{row}] is empty: every question needs an answer")
