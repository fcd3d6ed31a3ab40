"""CHAIR counted by hand, on plain names and on COCO's synonyms in their published layout."""

from __future__ import annotations

import json

import pytest

from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.captions import NameFinder
from latentmodal.experiments.evaluation.chair import (
    chair_metrics,
    coco_instances,
    coco_vocabulary,
    with_references,
)
from latentmodal.experiments.evaluation.descriptions import chair_section

SYNONYMS = """\
person, girl, man, woman, people, child, baby, passenger
airplane, jetliner, plane, jet
train, locomotive
traffic light, street light, traffic signal, stop light, streetlight
stop sign, street sign
bird, ostrich
dog, puppy, doggie
bear, panda
tie, bow, bow tie
wine glass
knife, pocketknife
hot dog
cake,  cheesecake
chair, seat, stool
dining table, table, desk
toilet, urinal

teddy bear, teddybear
"""


@pytest.fixture
def coco(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text(SYNONYMS)
    return coco_vocabulary(path)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Two men and a woman with children", ["person"] * 3),
        ("a man's puppy, two dogs", ["person", "dog", "dog"]),
        ("a baby", ["person"]),
        ("a baby bird beside adult bears", ["bird", "bear"]),
        ("a passenger train, a passenger", ["train", "person"]),
        ("passenger jets over a train", ["airplane", "train"]),
        ("a hot dog is no dog", ["hot dog", "dog"]),
        ("a teddy bear and a bear", ["teddy bear", "bear"]),
        ("train tracks", []),
        ("players at the home plate", []),
        ("a bow tie", ["tie"]),
        ("two wine glasses and knives", ["wine glass", "knife"]),
        ("street lights under a stop sign", ["traffic light", "stop sign"]),
        ("a street sign", []),  # no pair of the published list, and neither word alone
        ("a dining table, a desk", ["dining table", "dining table"]),
        ("the seat of a toilet", ["toilet"]),
        ("toilet seats", ["toilet"]),
        ("a seat at the table", ["chair", "dining table"]),
        ("a cheesecake", ["cake"]),
        ("a firefighter's doghouse", []),
        ("", []),
    ],
)
def test_coco_words(coco, caption, expected):
    assert coco.mentions(caption) == expected


def test_coco_names_are_the_classes(coco):
    assert len(coco.names) == 17
    assert {"wine glass", "dining table", "teddy bear"} <= coco.names


def test_chair_by_hand():
    vocabulary = NameFinder(["cat", "dog", "tropical fish", "fish", "sun"])
    captions = [
        "a cat, a cat and a dog",  # the dog is wrong
        "two dogs, and a dog",  # nothing is wrong; the sun is not found
        "two tropical fish",
        "suns above fish and fish",  # both fish are wrong
        "nothing known",
    ]
    objects = [["cat"], ["dog", "sun", "dog"], ["tropical fish"], ["sun"], ["cat"]]
    result = chair_metrics(captions, objects, vocabulary)
    assert (result.num_mentions, result.num_hallucinated) == (3 + 2 + 1 + 3, 1 + 2)
    assert (result.chair_i, result.chair_s) == (3 / 9, 2 / 5)
    assert (result.recall, result.num_true) == (4 / 6, 6)
    assert result.mean_mentions == 9 / 5
    section = chair_section(result, "5 names")
    assert {name: (metric.value, metric.n) for name, metric in section.items()} == {
        "object_recall": (4 / 6, 6),
        "CHAIRi": (3 / 9, 9),
        "CHAIRs": (2 / 5, 5),
        "mentions": (9 / 5, 5),
    }
    assert all("5 names" in metric.protocol for metric in section.values())


def test_nothing_mentioned_or_nothing_there_is_no_share():
    vocabulary = NameFinder(["cat"])
    silent = chair_metrics(["a thing"], [["cat"]], vocabulary)
    assert (silent.chair_i, silent.chair_s, silent.recall) == (None, 0.0, 0.0)
    empty = chair_metrics(["a cat"], [[]], vocabulary)
    assert (empty.chair_i, empty.chair_s, empty.recall) == (1.0, 1.0, None)


@pytest.mark.parametrize(
    ("captions", "objects", "message"),
    [
        (["a"], [], "1 captions for the objects of 0"),
        ([], [], "check that the split is not empty"),
        (["a"], [["dog"]], "'dog' is not in the vocabulary"),
    ],
)
def test_chair_refuses(captions, objects, message):
    with pytest.raises(UserError, match=message):
        chair_metrics(captions, objects, NameFinder(["cat"]))


def test_truth_is_what_is_annotated_and_what_the_references_mention(coco):
    truth = with_references(
        [["dining table", "wine glass"], []], [["a man"], ["Two puppies.", "no cat"]], coco
    )
    assert truth == [{"dining table", "wine glass", "person"}, {"dog"}]


def test_instances(tmp_path):
    path = tmp_path / "instances_val2014.json"
    content = {
        "images": [{"id": 42}, {"id": 73}],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {"id": 5, "image_id": 42, "category_id": 18},
            {"id": 6, "image_id": 42, "category_id": 18},
            {"id": 7, "image_id": 42, "category_id": 1},
        ],
    }
    path.write_text(json.dumps(content))
    assert coco_instances(path) == {42: {"dog", "person"}}
    content["annotations"].append({"id": 8, "image_id": 42, "category_id": 3})
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"annotations\[3\]: category_id 3 is not among"):
        coco_instances(path)


def test_synonyms_must_be_there(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt cannot be read"):
        coco_vocabulary(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="is empty; one class a line"):
        coco_vocabulary(tmp_path / "empty.txt")
