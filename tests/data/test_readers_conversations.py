"""Descriptions, conversations and presence questions in their published layouts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from latentmodal.experiments.data.config import LoaderConfig, ShardSourceConfig
from latentmodal.experiments.data.loader import EvalLoader
from latentmodal.experiments.data.readers.importing import import_dataset
from latentmodal.experiments.errors import UserError
from published_layouts import (
    CC_SBU_ALIGN,
    COCO,
    FLAT_FILES,
    LLAVA,
    POPE,
    questions,
    read_shards,
    talk,
)


@pytest.mark.parametrize("folder", ["images/image", "images"])
def test_cc_sbu_align(run, put, folder):
    put(f"{folder}/2.jpg", f"{folder}/10.jpg")
    done, samples = run("cc_sbu_align", CC_SBU_ALIGN, split="train")
    assert (done.samples, done.captions, done.conversations) == (2, 2, 0)
    assert [s["json"] for s in samples] == [
        {"captions": [text], "description": text, "image_id": image, "split": "train"}
        for image, text in [
            ("cc_sbu_align/2", "A long text. It goes on."),
            ("cc_sbu_align/10", "Another one."),
        ]
    ]


@pytest.mark.parametrize(
    "files",
    [
        ("images/coco/train2017/000000000042.jpg", "images/vg/VG_100K/1.jpg"),
        ("images/000000000042.jpg", "images/1.jpg"),
    ],
)
def test_llava(run, put, files, caplog):
    put(*files)
    with caplog.at_level("INFO"):
        done, samples = run("llava", LLAVA, split="train")
    assert (done.samples, done.captions, done.conversations) == (2, 0, 2)
    assert "left out 1 entries without a picture" in caplog.text and done.skipped == ""
    assert [s["json"]["image_id"] for s in samples] == ["coco/42", "llava/vg/VG_100K/1.jpg"]
    assert samples[0]["json"]["captions"] == []
    assert samples[0]["json"]["conversation"] == [
        {"role": "user", "text": "<image>\nWhat is it?"},
        {"role": "assistant", "text": "A cat."},
        {"role": "user", "text": "Where?"},
        {"role": "assistant", "text": "Here."},
    ]
    # Nothing marks the picture, so it stands first.
    assert samples[1]["json"]["conversation"][0]["text"] == "<image>\nDescribe it."


def test_llava_conversations_reach_a_batch(run, put, tmp_path, to_pixels):
    put("images/000000000042.jpg", "images/1.jpg")
    run("llava", LLAVA, split="train")
    sources = [ShardSourceConfig(urls=str(tmp_path / "out"))]
    config = LoaderConfig(batch_size=2, workers=0)
    (batch,) = EvalLoader(sources, config, image_transform=to_pixels)
    assert batch.captions == ["", ""]
    assert [meta["conversation"][1]["text"] for meta in batch.meta] == ["A cat.", "A dog."]


@pytest.mark.parametrize("indent", [None, "lines"])
def test_pope(run, put, tmp_path, indent):
    put(*FLAT_FILES)
    (tmp_path / "images").mkdir(exist_ok=True)
    path = tmp_path / "coco_pope_random.json"
    lines = "\n".join(json.dumps(question) for question in POPE)
    path.write_text(f"{lines}\n\n" if indent else json.dumps(POPE))
    done = import_dataset(
        "pope",
        annotations=None,
        questions=path,
        images=tmp_path / "images",
        split="val",
        out=tmp_path / "out",
    )
    assert (done.samples, done.captions, done.questions) == (2, 0, 3)
    first, second = (s["json"] for s in read_shards(tmp_path / "out"))
    assert (first["image_id"], second["image_id"]) == ("coco/42", "coco/73")
    kind = "pope/coco_pope_random"
    assert first["questions"] == [
        {"question": "A cat?", "question_id": 1, "answer": "yes", "kind": kind},
        {"question": "A bus?", "question_id": 3, "answer": "no", "kind": kind},
    ]


def test_a_broken_line_is_named(run, tmp_path):
    (tmp_path / "images").mkdir()
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(POPE[0]) + "\n" + json.dumps(POPE[1])[:-5])
    options = {"images": tmp_path / "images", "out": tmp_path / "out", "split": "val"}
    with pytest.raises(UserError, match=r"questions\.json is not JSON: line 2: "):
        import_dataset("pope", annotations=None, questions=path, **options)


def _turned(**changes: Any) -> list[dict]:
    return [{**LLAVA[0], **changes}]


@pytest.mark.parametrize(
    ("layout", "role", "content", "message"),
    [
        ("cc_sbu_align", "annotations", COCO, r"it looks like coco_captions$"),
        ("coco_captions", "annotations", CC_SBU_ALIGN, r"it looks like cc_sbu_align$"),
        ("karpathy", "annotations", LLAVA, r"it looks like llava$"),
        ("gqa", "questions", POPE, r"it looks like pope$"),
        ("pope", "questions", questions("val2014"), r"it looks like vqav2 or okvqa$"),
        ("pope", "questions", [{**POPE[0], "label": "maybe"}], r"entry\[0\]: label is 'maybe'"),
        (
            "llava",
            "annotations",
            _turned(conversations=talk("<image> a", "b", "c")),
            r"entry\[0\]: the turns are user, assistant, user; they must be pairs",
        ),
        (
            "llava",
            "annotations",
            _turned(conversations=talk("<image> a", "b", "<image> c", "d")),
            r"entry\[0\]: <image> must stand once",
        ),
        (
            "llava",
            "annotations",
            _turned(conversations=talk("a", "<image> b")),
            r"<image> must stand once, in a turn of the human's",
        ),
        (
            "llava",
            "annotations",
            _turned(conversations=[{"from": "system", "value": "x"}]),
            r"conversations\[0\]: 'from' is 'system'; known are human, gpt",
        ),
        ("llava", "annotations", _turned(image=["a.jpg", "b.jpg"]), r"'image' is a list, not a st"),
    ],
)
def test_what_is_wrong_with_conversations_is_named(run, put, layout, role, content, message):
    put(*FLAT_FILES, "images/000000000042.jpg")
    with pytest.raises(UserError, match=message) as caught:
        run(layout, **{role: content})
    assert "\n" not in str(caught.value)
