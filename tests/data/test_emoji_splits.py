"""The splits are what they say: read back from the shards, and planned for the default size."""

import json
import tarfile
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from latentmodal.experiments.data.emoji import (
    PRESETS,
    SPLITS,
    TRAIN_STYLES,
    UNSEEN_STYLE,
    EmojiConfig,
    EmojiData,
    ensure_emoji,
)
from latentmodal.experiments.data.emoji.splits import pairs_of, plan_dataset


@pytest.fixture(scope="module")
def tiny(emoji_cache: Path) -> EmojiData:
    return ensure_emoji(EmojiConfig(preset="tiny"), progress=False)


def read(tiny: EmojiData, split: str) -> list[dict[str, Any]]:
    facts = []
    for shard in tiny.splits[split]:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    facts.append(json.load(stream))
    return facts


def met(sample: dict[str, Any]) -> set[tuple[str, str]]:
    return set(combinations(sorted({item["code"] for item in sample["objects"]}), 2))


def test_no_unseen_pair_occurs_in_any_training_picture(tiny: EmojiData) -> None:
    trained = set().union(*(met(sample) for sample in read(tiny, "train")))
    unseen = [met(sample) for sample in read(tiny, "unseen_pairs")]
    assert unseen and all(len(pairs) == 1 for pairs in unseen)
    assert not trained & set().union(*unseen)
    assert not trained & {tuple(pair) for pair in tiny.meta["held_out_pairs"]}


def test_unseen_pairs_are_of_trained_things_one_picture_each(tiny: EmojiData) -> None:
    samples = read(tiny, "unseen_pairs")
    trained = {item["code"] for sample in read(tiny, "train") for item in sample["objects"]}
    assert all(len(sample["objects"]) == 2 for sample in samples)
    assert {item["code"] for sample in samples for item in sample["objects"]} <= trained
    captions = [caption for sample in samples for caption in sample["captions"]]
    assert len(set(captions)) == len(captions)


def test_arrangements_place_the_unseen_pairs_again_and_again(tiny: EmojiData) -> None:
    samples = read(tiny, "arrangements")
    pairs = [tuple(sorted(met(sample))) for sample in samples]
    reserved = {tuple(pair) for pair in tiny.meta["held_out_pairs"]}
    assert len(samples) == PRESETS["tiny"].eval_scenes > len(reserved)
    assert {pair for (pair,) in pairs} == reserved
    assert len({sample["captions"][0] for sample in samples}) > len(reserved)
    assert all(sample["negatives"] for sample in samples)


def test_seen_pairs_were_trained(tiny: EmojiData) -> None:
    trained = set().union(*(met(sample) for sample in read(tiny, "train")))
    seen = [met(sample) for sample in read(tiny, "seen")]
    assert set().union(*seen) <= trained
    assert len(set().union(*seen)) == len(seen)


def test_unseen_things_and_style_are_in_no_training_picture_or_text(tiny: EmojiData) -> None:
    train = read(tiny, "train")
    unseen = {thing["code"]: thing["name"] for thing in tiny.meta["unseen_things"]}
    assert {sample["style"] for sample in train} == set(TRAIN_STYLES)
    assert not unseen.keys() & {item["code"] for sample in train for item in sample["objects"]}
    text = json.dumps(train)
    assert not [name for name in unseen.values() if name in text]
    shown = {item["code"] for sample in read(tiny, "unseen_things") for item in sample["objects"]}
    assert shown == unseen.keys()


def test_naming_splits_show_every_known_thing_alone(tiny: EmojiData) -> None:
    codes = sorted(thing["code"] for thing in tiny.meta["things"])
    mono, coloured = read(tiny, "unseen_style"), read(tiny, "style_seen")
    assert {sample["style"] for sample in mono} == {UNSEEN_STYLE}
    assert sorted(sample["objects"][0]["code"] for sample in mono) == codes
    for style in TRAIN_STYLES:
        shown = [sample for sample in coloured if sample["style"] == style]
        assert sorted(sample["objects"][0]["code"] for sample in shown) == codes
    assert all(len(sample["objects"]) == 1 for sample in (*mono, *coloured))


def test_counts_and_members_match_the_shards(tiny: EmojiData) -> None:
    assert tuple(tiny.splits) == SPLITS
    for split, shards in tiny.splits.items():
        names = []
        for shard in shards:
            with tarfile.open(shard) as tar:
                names += tar.getnames()
        keys = list(dict.fromkeys(name.split(".")[0] for name in names))
        assert names == [f"{key}.{kind}" for key in keys for kind in ("png", "txt", "json")]
        assert len(keys) == tiny.meta["counts"][split]
        assert all(sample["split"] == split for sample in read(tiny, split))


@pytest.mark.parametrize("seed", [0, 7])
def test_the_default_plan_is_honest(seed: int) -> None:
    preset = PRESETS["default"]
    plan = plan_dataset(preset, seed)
    trained = set().union(*(pairs_of(each.things) for each in plan.splits["train"]))
    unseen = [pairs_of(each.things) for each in plan.splits["unseen_pairs"]]
    assert len(plan.splits["train"]) == 30_000
    assert len(plan.reserved) == round(0.2 * 150 * 149 / 2)
    assert len(unseen) == len(set().union(*unseen)) == 400
    assert not trained & set(plan.reserved)
    assert set().union(*unseen) <= set(plan.reserved)
    held_out = {thing.code for thing in plan.unseen}
    drawn = {thing.code for each in plan.splits["train"] for thing in each.things}
    assert not drawn & held_out
    assert drawn == {thing.code for thing in plan.known}
    single = sum(len(each.things) == 1 for each in plan.splits["train"]) / 30_000
    assert 0.23 < single < 0.27
