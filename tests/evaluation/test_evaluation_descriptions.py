"""Descriptions judged by hand: what repeats, what breaks off, what is not in the picture."""

from __future__ import annotations

import json

import pytest

from latentmodal.experiments.curation.rules import Rules
from latentmodal.experiments.data.config import ShardSourceConfig
from latentmodal.experiments.data.module import EmojiSourceConfig
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.answers import CaptionsTask
from latentmodal.experiments.evaluation.descriptions import DescriptionsTask, text_section
from latentmodal.experiments.evaluation.report import EvalReport
from latentmodal.llm import GenerationSettings

GOOD = "A cat sits on a chair. The chair is red."
TEXTS = [
    GOOD,  # 10 words, 2 sentences
    "a dog dog dog runs.",  # a word three times in succession
    "It is a red ball. It is a red ball.",  # a sentence twice, 2 of 7 4-grams twice
    "The picture shows a",  # stops
]


def test_texts_by_hand():
    section = text_section(TEXTS, Rules(min_words=3), [GOOD], lambda text: len(text))
    values = {name: metric.value for name, metric in section.items()}
    assert values == {
        "words": (10 + 5 + 10 + 4) / 4,
        "tokens": sum(map(len, TEXTS)) / 4,
        "repeats_word": 1 / 4,
        "repeats_4-gram": 1 / 4,
        "repeats_sentence": 1 / 4,
        "repeats": 2 / 4,
        "rep-4": pytest.approx((0 + 0 + 2 / 7 + 0) / 4),
        "unfinished": 1 / 4,
        "broken_sentences": 1 / 6,
        "kept_by_rules": 1 / 4,
    }
    assert (section["words"].unit, section["words"].n) == ("count", 4)
    assert section["broken_sentences"].n == 6
    assert "true ones have 10.0" in section["words"].protocol
    assert "more than 0.25 of the 4-grams" in section["repeats_4-gram"].protocol
    assert section["repeats"].standard_error == pytest.approx((0.25 / 4) ** 0.5)


def test_empty_descriptions_are_unfinished_and_have_no_sentences():
    section = text_section(["", " "], Rules())
    assert "tokens" not in section
    assert section["unfinished"].value == 1.0
    assert section["broken_sentences"].value is None
    with pytest.raises(UserError, match="check that the split is not empty"):
        text_section([], Rules())


def test_a_value_that_is_none_is_kept_shown_and_left_out_of_tensorboard(tmp_path):
    report = EvalReport(sections={"said": text_section([""], Rules())})
    report.write_json(tmp_path / "eval.json")
    assert EvalReport.read_json(tmp_path / "eval.json") == report
    values = next(column for column in report.table().columns if column.header == "value")
    assert "[bold]–" in list(values.cells)
    assert "[bold]0.0" in list(values.cells)  # a count has no percent sign
    written: list[str] = []

    class Writer:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            written.append(tag)

    report.log(Writer(), 1)
    assert "eval/said/words" in written and "eval/said/broken_sentences" not in written


def test_task_finds_names_that_no_picture_of_the_set_has_only_if_the_data_set_is_known(
    talker, scenes, emoji_cache
):
    """The embedded scenes have names beyond those of a split; the shards' own are all there are."""
    emoji = EmojiSourceConfig(preset="tiny", split="unseen_things")
    system = talker(lambda row, said: "There is a rooster. A fox is beside it.")
    section = system.evaluate(DescriptionsTask(source=emoji))
    # Of 12 pictures of 4 unseen things each shows one: 3 show a fox; a rooster is in none.
    assert section["mentions"].value == 2.0
    assert section["CHAIRi"].value == pytest.approx(21 / 24)
    assert section["CHAIRs"].value == 1.0
    assert section["object_recall"].value == pytest.approx(3 / 12)
    assert "16 names of the data set" in section["CHAIRi"].protocol
    names = system.evaluate(CaptionsTask(source=emoji))["names_precision"]
    assert names.value == pytest.approx(3 / 24) and names.protocol.startswith("16 known names")
    folder = scenes([{"captions": ["a fox"], "objects": [{"name": "fox"}]}])
    known = system.evaluate(DescriptionsTask(source=ShardSourceConfig(urls=str(folder))))
    assert (known["CHAIRi"].value, known["CHAIRi"].n) == (0.0, 1)


def test_task_without_objects_judges_the_text_alone(talker, scenes):
    folder = scenes([{"captions": ["a cat"]}, {"captions": ["a dog"], "description": "A dog."}])
    section = talker(lambda row, said: GOOD).evaluate(
        DescriptionsTask(source=ShardSourceConfig(urls=str(folder)))
    )
    assert "CHAIRi" not in section and section["repeats"].value == 0.0
    assert "true ones have 2.0" in section["words"].protocol
    assert section["tokens"].value == len(GOOD.split())


def test_a_system_that_converses_is_told_what_to_say(talker, scenes):
    source = ShardSourceConfig(urls=str(scenes([{"captions": ["a cat"]}])))
    told: list[str] = []

    def answer(row: int, said: str) -> str:
        told.append(said)
        return GOOD

    system = talker(answer, conversation=True)
    settings = GenerationSettings(max_new_tokens=7)
    for instruction in ("Describe it.", None):
        task = DescriptionsTask(source=source, instruction=instruction, generation=settings)
        assert system.evaluate(task)["words"].value == 10.0
    assert told == ["<image> Describe it.", "<image>"]
    assert system.settings == [settings, settings]
    with pytest.raises(UserError, match="instruction is for a system that has"):
        DescriptionsTask(source=source, instruction="x").check(talker(answer))


def test_coco_layout(talker, scenes, tmp_path):
    (tmp_path / "synonyms.txt").write_text("person, man\ndog, puppy\ndining table, table\n")
    instances = {
        "categories": [{"id": 1, "name": "dining table"}],
        "annotations": [{"image_id": 42, "category_id": 1}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    folder = scenes(
        [
            {"captions": ["a man eats"], "image_id": "coco/42"},
            {"captions": ["a dog"], "image_id": "coco/7"},
        ]
    )
    source = ShardSourceConfig(urls=str(folder))
    system = talker(lambda row, said: "A man at a table with a puppy.")
    files = {name: str(tmp_path / name) for name in ("synonyms.txt", "instances.json")}
    task = DescriptionsTask(
        source=source, synonyms=files["synonyms.txt"], instances=files["instances.json"]
    )
    section = system.evaluate(task)
    # The puppy is wrong in the first picture; the man and the table are in the second.
    assert (section["CHAIRi"].value, section["CHAIRi"].n) == (3 / 6, 6)
    assert (section["CHAIRs"].value, section["object_recall"].value) == (1.0, 1.0)
    assert "truth from instances.json and the reference captions" in section["CHAIRi"].protocol
    alone = system.evaluate(DescriptionsTask(source=source, synonyms=files["synonyms.txt"]))
    assert alone["CHAIRi"].value == 4 / 6
    with pytest.raises(UserError, match=r"nowhere\.txt is not a file"):
        DescriptionsTask(source=source, synonyms="nowhere.txt").check(system)
    with pytest.raises(ValueError, match="instances is given without synonyms"):
        DescriptionsTask(source=source, instances="i.json")
    other = ShardSourceConfig(urls=str(scenes([{"captions": ["a"], "image_id": "vg/1"}])))
    task = DescriptionsTask(
        source=other, synonyms=files["synonyms.txt"], instances=files["instances.json"]
    )
    with pytest.raises(UserError, match="image_id 'vg/1' is no COCO picture"):
        system.evaluate(task)
