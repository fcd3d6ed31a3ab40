"""POPE on sets small enough to choose, ask and count by hand."""

from __future__ import annotations

import pytest
import torch

from latentmodal.experiments.data.config import ShardSourceConfig
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation import asking
from latentmodal.experiments.evaluation.pope import (
    Probe,
    parse_published,
    parse_yes_no,
    pope_metrics,
    pope_probes,
)
from latentmodal.experiments.evaluation.pope_task import PopeTask, pope_section
from latentmodal.llm import PromptTemplate

OBJECTS = [
    ["cat", "dog", "cat"],
    ["cat", "sofa"],
    ["dog", "ball"],
    ["dog", "ball"],
    ["sofa"],
    ["dog", "kite"],
]
# How often: dog 4, ball 2, cat 2, sofa 2, kite 1.
# In one picture: dog and ball twice; cat and dog, cat and sofa, dog and kite once.
QUESTION = PromptTemplate(text="Question: {question} Answer: {answer}")


def absent(row: int, sampling: str, **options: int) -> list[str]:
    return [probe.name for probe in pope_probes(OBJECTS, sampling, **options)[row][1::2]]


def test_popular_negatives_are_the_most_frequent_that_are_not_there():
    assert absent(0, "popular") == ["ball", "sofa"]
    assert absent(1, "popular") == ["dog", "ball"]
    assert absent(4, "popular") == ["dog"]
    assert absent(5, "popular") == ["ball", "cat"]


def test_adversarial_negatives_are_those_most_often_beside_the_positive():
    asked = [[probe.name for probe in own] for own in pope_probes(OBJECTS, "adversarial")]
    # Beside a sofa was a cat, once; "popular" would ask for the dog.
    assert asked[4] == ["sofa", "cat"]
    assert sorted(zip(asked[0][::2], asked[0][1::2], strict=True)) == [
        ("cat", "sofa"),
        ("dog", "ball"),
    ]
    # Beside a kite was nothing but the dog: of the rest the most frequent. What is taken is taken.
    assert asked[5] in (["dog", "ball", "kite", "cat"], ["kite", "ball", "dog", "cat"])
    # A cat and a kite were beside a dog, once each: the more frequent, or the one that is left.
    assert asked[2] in (["dog", "cat", "ball", "sofa"], ["ball", "cat", "dog", "kite"])


@pytest.mark.parametrize("sampling", ["random", "popular", "adversarial"])
def test_probes_are_balanced_true_and_the_same_again(sampling):
    asked = pope_probes(OBJECTS, sampling, seed=3)
    assert asked == pope_probes([sorted(own) for own in OBJECTS], sampling, seed=3)
    for own, probes in zip(OBJECTS, asked, strict=True):
        assert len(probes) == 2 * len(set(own)) and len(set(probes)) == len(probes)
        assert [probe.answer for probe in probes] == ["yes", "no"] * len(set(own))
        assert all((probe.name in own) == (probe.answer == "yes") for probe in probes)
    one = pope_probes(OBJECTS, sampling, per_picture=1, seed=3)
    assert {len(probes) for probes in one} == {2}


def test_positives_are_those_of_all_samplings_and_draws_depend_on_the_seed():
    samplings = ("random", "popular", "adversarial")
    there = [[own[::2] for own in pope_probes(OBJECTS, s, per_picture=1)] for s in samplings]
    assert there[0] == there[1] == there[2]
    drawn = {str(pope_probes(OBJECTS, "random", seed=seed)) for seed in range(20)}
    assert len(drawn) > 10


def test_a_picture_of_everything_is_asked_nothing():
    assert pope_probes([["cat", "dog"], ["cat"], []], "random") == [
        [],
        [Probe("cat", "yes"), Probe("dog", "no")],
        [],
    ]


@pytest.mark.parametrize(
    ("objects", "options", "message"),
    [
        (OBJECTS, {"sampling": "hard"}, "choose from random, popular, adversarial"),
        (OBJECTS, {"sampling": "random", "per_picture": 0}, "per_picture is 0"),
        ([["cat"], ["cat"]], {"sampling": "random"}, "no picture has a thing to ask for"),
        ([], {"sampling": "random"}, "no picture has a thing to ask for"),
    ],
)
def test_probes_refuse(objects, options, message):
    with pytest.raises(UserError, match=message):
        pope_probes(objects, **options)


@pytest.mark.parametrize(
    ("text", "strict", "published"),
    [
        ("Yes.", "yes", "yes"),
        ("yes, there is a dog. No cat.", "yes", "yes"),
        ("No", "no", "no"),
        ("no, there is none", "no", "no"),
        ("NO!", "no", "yes"),
        ("There is no dog in the picture.", "no", "no"),
        ("There isn’t a dog", "no", "yes"),
        ("There is not a dog. Yes", "no", "no"),
        ("The answer is yes", "yes", "yes"),
        ("Yes, there is no doubt", "yes", "no"),
        ("No\nyes", "no", "yes"),
        ("Either yes or no", None, "no"),
        ("There is a dog", None, "yes"),
        ("I cannot see it", None, "yes"),
        ("I am not sure", None, "no"),
        ("nobody knows", None, "yes"),
        ("", None, "yes"),
        ("  ", None, "yes"),
    ],
)
def test_parsers(text, strict, published):
    assert parse_yes_no(text) == strict
    assert parse_published(text) == published


def test_metrics_by_hand():
    #            TP     TP     FN    unparsed FP    TN    TN   unparsed
    predicted = ["yes", "yes", "no", None, "yes", "no", "no", None]
    labels = ["yes", "yes", "yes", "yes", "no", "no", "no", "no"]
    result = pope_metrics(predicted, labels)
    assert (result.accuracy, result.precision, result.recall) == (4 / 8, 2 / 3, 2 / 4)
    assert result.f1 == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert (result.yes_ratio, result.unparsed, result.total) == (3 / 8, 2 / 8, 8)
    section = pope_section("random", result, "strict")
    assert {name: (metric.value, metric.n) for name, metric in section.items()} == {
        "random/accuracy": (0.5, 8),
        "random/precision": (2 / 3, 3),
        "random/recall": (0.5, 4),
        "random/F1": (result.f1, 8),
        "random/yes_ratio": (3 / 8, 8),
        "random/unparsed": (2 / 8, 8),
    }
    always_yes = pope_metrics(["yes"] * 8, labels)
    for name in ("accuracy", "precision", "recall", "F1"):
        value = getattr(always_yes, name.lower())
        assert section[f"random/{name}"].chance == pytest.approx(value)
    assert "4 of 8 questions" in section["random/F1"].protocol


@pytest.mark.parametrize(
    ("predicted", "labels", "precision", "recall", "f1"),
    [
        (["no", "no"], ["yes", "no"], None, 0.0, 0.0),
        (["yes", "no"], ["no", "no"], 0.0, None, 0.0),
        (["no", None], ["no", "no"], None, None, None),
        ([None, None], ["yes", "yes"], None, 0.0, 0.0),
    ],
)
def test_a_share_of_nothing_is_none(predicted, labels, precision, recall, f1):
    result = pope_metrics(predicted, labels)
    assert (result.precision, result.recall, result.f1) == (precision, recall, f1)
    assert pope_section("x", result, "")["x/precision"].value == precision


@pytest.mark.parametrize(
    ("predicted", "labels", "message"),
    [
        (["yes"], ["yes", "no"], "1 answers to 2 questions"),
        ([], [], "check that the split is not empty"),
        (["yes"], ["maybe"], "'maybe', not yes or no"),
    ],
)
def test_metrics_refuse(predicted, labels, message):
    with pytest.raises(UserError, match=message):
        pope_metrics(predicted, labels)


def test_task_asks_everything_once_and_reports_each_sampling(talker, scenes):
    folder = scenes([{"objects": [{"name": name} for name in own]} for own in OBJECTS])
    asked: list[tuple[int, str]] = []

    def answer(row: int, question: str) -> str:
        asked.append((row, question))
        named = next(n for n in ("cat", "dog", "sofa", "ball", "kite") if f" {n} " in question)
        return "Yes, there is." if named in OBJECTS[row] else "No."

    task = PopeTask(source=ShardSourceConfig(urls=str(folder)), prompt=QUESTION)
    section = talker(answer).evaluate(task, batch_size=4)
    assert {name.partition("/")[0] for name in section} == {"random", "popular", "adversarial"}
    for sampling in ("random", "popular", "adversarial"):
        assert section[f"{sampling}/accuracy"].value == 1.0
        assert section[f"{sampling}/yes_ratio"].value == 0.5
        assert section[f"{sampling}/accuracy"].n == 2 * sum(len(set(own)) for own in OBJECTS)
    assert (5, "Is there a kite in the picture?") in asked
    # The first question of a batch stands in where a rank runs out; here no rank does.
    assert len(set(asked)) == len(asked)


def test_an_unusable_sample_shifts_no_question_to_another_picture(talker, scenes):
    metas = [{"objects": [{"name": name} for name in own]} for own in OBJECTS]
    metas[1]["broken"] = True
    heard: set[tuple[int, str]] = set()

    def answer(row: int, question: str) -> str:
        heard.add((row, question))
        return "Yes" if any(f" {name} " in question for name in OBJECTS[row]) else "No"

    source = ShardSourceConfig(urls=str(scenes(metas)))
    section = talker(answer).evaluate(PopeTask(source=source, prompt=QUESTION), batch_size=4)
    assert {section[f"{s}/accuracy"].value for s in ("random", "popular", "adversarial")} == {1.0}
    assert {row for row, _ in heard} == {0, 2, 3, 4, 5}


def test_ranks_ask_equally_often(talker, monkeypatch):
    calls: list[tuple[int, str]] = []

    def answer(row: int, question: str) -> str:
        calls.append((row, question))
        return f"{row} {question}"

    monkeypatch.setattr(asking, "gather_objects", lambda mine: [mine, 3])
    pixels_BCHW = torch.arange(2)[:, None, None, None].expand(2, 3, 1, 1)
    pairs = [(1, "a"), (0, "b"), (1, "c")]
    said = asking.ask(talker(answer), pixels_BCHW, pairs)
    assert said == ["1 a", "0 b", "1 c"]
    assert calls == [*pairs, (0, "")]
    assert asking.ask(talker(answer), pixels_BCHW, []) == []
    assert calls[4:] == [(0, "")] * 3


def test_published_questions_are_reported_file_by_file(talker, scenes):
    def asked(label: str, name: str, file: str) -> dict[str, str]:
        return {"question": f"Is there a {name} in the image?", "answer": label, "kind": file}

    folder = scenes(
        [
            {"questions": [asked("yes", "cat", "pope/coco_pope_random")], "objects": []},
            {
                "questions": [
                    asked("no", "dog", "pope/coco_pope_popular"),
                    asked("yes", "sofa", "pope/coco_pope_popular"),
                    {"question": "What is it?", "answer": "a sofa", "kind": "other"},
                ]
            },
        ]
    )
    source = ShardSourceConfig(urls=str(folder))
    system = talker(lambda row, question: "I cannot tell" if "sofa" in question else "Yes")
    section = system.evaluate(PopeTask(source=source, prompt=QUESTION))
    shown = {name: metric.value for name, metric in section.items() if "recall" not in name}
    assert shown == {
        "coco_pope_random/accuracy": 1.0,
        "coco_pope_random/precision": 1.0,
        "coco_pope_random/F1": 1.0,
        "coco_pope_random/yes_ratio": 1.0,
        "coco_pope_random/unparsed": 0.0,
        "coco_pope_popular/accuracy": 0.0,
        "coco_pope_popular/precision": 0.0,
        "coco_pope_popular/F1": 0.0,
        "coco_pope_popular/yes_ratio": 0.5,
        "coco_pope_popular/unparsed": 0.5,
    }
    published = system.evaluate(PopeTask(source=source, prompt=QUESTION, parser="published"))
    assert published["coco_pope_popular/accuracy"].value == 0.5
    assert published["coco_pope_popular/unparsed"].value == 0.0
    assert "POPE's parser" in published["coco_pope_popular/accuracy"].protocol


def test_a_system_that_converses_is_asked_in_a_turn(talker, scenes):
    folder = scenes([{"objects": [{"name": "cat"}]}, {"objects": [{"name": "grapes"}]}])
    heard: list[str] = []

    def answer(row: int, said: str) -> str:
        heard.append(said)
        return "Yes" if ("cat", "grapes")[row] in said else "No"

    task = PopeTask(source=ShardSourceConfig(urls=str(folder)), samplings=("popular",))
    section = talker(answer, conversation=True).evaluate(task)
    assert section["popular/accuracy"].value == 1.0
    assert set(heard) == {
        "<image> Is there a cat in the picture?",
        "<image> Are there any grapes in the picture?",
    }


def test_tasks_refuse_what_they_cannot_do(talker, scenes):
    source = ShardSourceConfig(urls=str(scenes([{"captions": ["a cat"]}])))
    system = talker(lambda row, question: "Yes")
    with pytest.raises(UserError, match="has the fields none, this task fills question"):
        PopeTask(source=source).check(system)
    with pytest.raises(UserError, match=r"this one has system\.conversation"):
        PopeTask(source=source, prompt=QUESTION).check(talker(lambda *_: "", conversation=True))
    with pytest.raises(UserError, match="no sample has objects or imported POPE questions"):
        system.evaluate(PopeTask(source=source, prompt=QUESTION))
    for options, message in (
        ({"samplings": ("hard",)}, "samplings has 'hard'"),
        ({"samplings": ()}, "samplings is empty"),
        ({"parser": "lenient"}, "choose from strict, published"),
        ({"per_picture": 0}, "per_picture is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            PopeTask(source=source, **options)
