"""Everything said of a picture is read back and checked against its boxes."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from latentmodal.experiments.data.emoji import EmojiConfig, EmojiData, ensure_emoji, grammar
from latentmodal.experiments.data.emoji.concepts import select_things

KNOWN, UNSEEN = select_things("tiny")
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
RELATION = re.compile(r" (to the left of|to the right of|above|below) ")
WHERE = {"top": (None, 0), "bottom": (None, 1), "left": (0, None), "right": (1, None)}


@pytest.fixture(scope="module")
def tiny(emoji_cache: Path) -> EmojiData:
    return ensure_emoji(EmojiConfig(preset="tiny"), progress=False)


@pytest.fixture(scope="module")
def samples(tiny: EmojiData) -> list[dict[str, Any]]:
    read = []
    for shards in tiny.splits.values():
        for shard in shards:
            with tarfile.open(shard) as tar:
                for member in tar:
                    if member.name.endswith(".json"):
                        stream = tar.extractfile(member)
                        assert stream is not None
                        read.append(json.load(stream))
    return read


def phrases() -> dict[str, tuple[str, int, str | None]]:
    """Every noun phrase that may occur -> (name, count, colour said)."""
    table: dict[str, tuple[str, int, str | None]] = {}
    for thing in (*KNOWN, *UNSEEN):
        for colour in (None, *COLOURS):
            for count in (1, 2, 3, 4) if grammar.countable(thing.name) else (1,):
                phrase = grammar.noun_phrase(thing.name, count, colour)
                table[phrase] = (thing.name, count, colour)
    return table


PHRASES = phrases()


def centre(box: list[int]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def holds(a: list[int], how: str, b: list[int]) -> bool:
    """The relation by plain geometry: wholly beyond, and further along than across."""
    (ax, ay), (bx, by) = centre(a), centre(b)
    along_x = abs(bx - ax) > abs(by - ay)
    return {
        "to the left of": a[2] < b[0] and along_x,
        "to the right of": b[2] < a[0] and along_x,
        "above": a[3] < b[1] and not along_x,
        "below": b[3] < a[1] and not along_x,
    }[how]


def tally(sample: dict[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in sample["objects"]:
        counts[item["name"]] = counts.get(item["name"], 0) + 1
    return counts


def box_of(sample: dict[str, Any], name: str) -> list[int]:
    (box,) = (item["box"] for item in sample["objects"] if item["name"] == name)
    return box


def strip_frame(caption: str, sample: dict[str, Any]) -> str:
    """The statement without "a picture of", "there is" and the background."""
    caption = re.sub(r"^(a picture of|a drawing of|there is|there are) ", "", caption)
    match = re.search(r" on a (\w+) background$", caption)
    if match:
        assert match[1] == sample["background"]
        caption = caption[: match.start()]
    return caption


def check_phrase(phrase: str, sample: dict[str, Any]) -> str:
    name, count, colour = PHRASES[phrase]
    assert tally(sample)[name] == count
    if colour is not None:
        assert {item["color"] for item in sample["objects"] if item["name"] == name} == {colour}
    return name


def related(statement: str, sample: dict[str, Any]) -> bool:
    """Whether "A relation B" is true; A and B indefinite or definite."""
    first, how, second = RELATION.split(statement)
    if first.startswith("the "):
        names = [re.sub(r"^the | (is|are)$", "", side) for side in (first, second)]
    else:
        names = [check_phrase(side, sample) for side in (first, second)]
    return holds(box_of(sample, names[0]), how, box_of(sample, names[1]))


def test_every_caption_is_true(samples: list[dict[str, Any]]) -> None:
    stated = 0
    for sample in samples:
        assert len(set(sample["captions"])) == len(sample["captions"])
        assert 3 <= len(sample["captions"]) <= 5
        for caption in sample["captions"]:
            statement = strip_frame(caption, sample)
            if RELATION.search(statement):
                assert related(statement, sample), (caption, sample["objects"])
                stated += 1
            else:
                parts = re.split(r", | and ", statement)
                assert {check_phrase(part, sample) for part in parts} == set(tally(sample))
    assert stated > 200


def test_swapped_captions_are_false_and_differ_in_one_respect(
    samples: list[dict[str, Any]],
) -> None:
    pairs = 0
    for sample in samples:
        canonical, swaps = sample["captions"][0], sample["negatives"]
        if len(sample["objects"]) != 2 or len(tally(sample)) != 2:
            assert swaps == {"relation_swap": None, "noun_swap": None}
            continue
        pairs += 1
        assert related(canonical, sample)
        assert not related(swaps["relation_swap"], sample)
        assert not related(swaps["noun_swap"], sample)
        first, how, second = RELATION.split(canonical)
        assert RELATION.split(swaps["noun_swap"]) == [second, how, first]
        other = RELATION.split(swaps["relation_swap"])
        assert [other[0], other[2]] == [first, second]
        assert other[1] != how
    assert pairs > 80


def test_a_pair_told_from_either_side_is_one_fact(samples: list[dict[str, Any]]) -> None:
    turned, order = {}, set()
    for sample in samples:
        canonical, fact = sample["captions"][0], sample["fact"]
        if sample["negatives"]["noun_swap"] is None:
            assert fact == canonical
            continue
        assert related(fact, sample)
        assert fact in sample["captions"][:2]
        assert fact not in sample["negatives"].values()
        order.add(fact == canonical)
        assert turned.setdefault(frozenset(sample["captions"][:2]), fact) == fact
    assert order == {True, False}


def test_descriptions_are_three_to_six_true_sentences(samples: list[dict[str, Any]]) -> None:
    for sample in samples:
        sentences = re.findall(r"[^.]+\.", sample["description"])
        assert 3 <= len(sentences) <= 6
        assert f"on a plain {sample['background']} background" in sentences[0]
        listed = sentences[0].rstrip(".").split(": ")[1]
        assert {PHRASES[part][0] for part in re.split(r", | and ", listed)} == set(tally(sample))
        for sentence in sentences[1:]:
            statement = sentence.strip().rstrip(".").replace("The ", "the ", 1)
            mostly = re.fullmatch(r"the (.+) (?:is|are) mostly (\w+)", statement)
            if mostly:
                colours = {i["color"] for i in sample["objects"] if i["name"] == mostly[1]}
                assert colours == {mostly[2]}
            elif RELATION.search(statement):
                assert related(statement, sample)


def check_position(answer: str, box: list[int], size: int) -> None:
    where = {"top", "bottom", "left", "right"} & set(answer.split())
    for word in where:
        right, low = WHERE[word]
        x, y = (value / size for value in centre(box))
        if right is not None:
            assert (x > 0.6) == bool(right) and (x < 0.4) != bool(right)
        if low is not None:
            assert (y > 0.6) == bool(low) and (y < 0.4) != bool(low)
    if not where:
        assert answer == "in the middle"
        assert all(0.4 < value / size < 0.6 for value in centre(box))


def check_answer(question: str, answer: str, kind: str, sample: dict[str, Any]) -> None:
    counts, by_name = tally(sample), {thing.name: thing for thing in KNOWN}
    if kind == "background":
        assert answer == sample["background"]
    elif kind == "name":
        parts = re.split(r", | and ", answer)
        assert {check_phrase(part, sample) for part in parts} == set(counts)
    elif kind == "count" and "things" in question:
        assert COUNTS[answer] == len(sample["objects"])
    elif kind == "count":
        asked = re.fullmatch(r"How many (.+) are there\?", question)
        assert asked
        (name,) = (
            name
            for name in counts
            if grammar.countable(name) and grammar.bare_plural(name) == asked[1]
        )
        assert COUNTS[answer] == counts[name]
    elif kind == "presence":
        asked = re.fullmatch(r"(?:Is|Are) there (.+) in the picture\?", question)
        assert asked
        there = [name for name in counts if asked[1] in (grammar.noun_phrase(name), f"any {name}")]
        assert answer == ("yes" if there else "no")
    elif kind == "relation" and question.startswith("What"):
        asked = re.fullmatch(r"What is (.+)\?", question)
        assert asked and related(f"the {PHRASES[answer][0]} is {asked[1]}", sample)
    elif kind == "relation":
        statement = re.sub(r"^(Is|Are) |\?$", "", question)
        assert related(statement, sample) == (answer == "yes")
    else:
        asked = re.search(r"(?:is|are) the (.+)\?", question)
        assert asked
        name = asked[1]
        if kind == "position":
            check_position(answer, box_of(sample, name), 48)
        elif kind == "colour":
            assert {i["color"] for i in sample["objects"] if i["name"] == name} == {answer}
        else:
            assert kind == "kind"
            thing = by_name.get(name) or next(each for each in UNSEEN if each.name == name)
            assert thing.kind is not None and answer == grammar.noun_phrase(thing.kind)


def test_every_answer_is_right(samples: list[dict[str, Any]]) -> None:
    kinds = set()
    for sample in samples:
        assert 3 <= len(sample["questions"]) <= 7
        for item in sample["questions"]:
            check_answer(item["question"], item["answer"], item["kind"], sample)
            kinds.add(item["kind"])
    assert kinds == {
        *("background", "name", "count", "presence", "relation", "position", "colour", "kind")
    }


def test_colours_are_never_said_of_line_drawings(samples: list[dict[str, Any]]) -> None:
    drawn = [sample for sample in samples if sample["style"] in ("openmoji_line", "noto_mono")]
    assert drawn
    assert all(item["color"] is None for sample in drawn for item in sample["objects"])
