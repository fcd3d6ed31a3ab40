"""Tiny files of the published layouts, through the import command's road, to batches."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import webdataset
from typer.testing import CliRunner

from latentmodal.experiments import cli
from latentmodal.experiments.data.config import LoaderConfig, ShardSourceConfig
from latentmodal.experiments.data.loader import EvalLoader, TrainLoader
from latentmodal.experiments.data.readers import READERS
from latentmodal.experiments.data.readers.importing import import_dataset
from latentmodal.experiments.errors import UserError


def _sentences(*texts: str) -> list[dict]:
    return [{"tokens": t.lower().split(), "raw": t, "imgid": 0, "sentid": 0} for t in texts]


def _karpathy_image(number: int, split: str, *texts: str) -> dict:
    return {
        "filepath": "val2014",
        "filename": f"COCO_val2014_{number:012d}.jpg",
        "imgid": number + 1000,
        "cocoid": number,
        "split": split,
        "sentences": _sentences(*texts),
        "sentids": [],
    }


KARPATHY_COCO = {
    "dataset": "coco",
    "images": [
        _karpathy_image(42, "train", "A cat.", "One cat "),
        _karpathy_image(73, "restval", "A dog."),
        _karpathy_image(74, "test", "A bird."),
    ],
}
KARPATHY_FLICKR = {
    "dataset": "flickr30k",
    "images": [
        {
            "filename": "1000092795.jpg",
            "imgid": 0,
            "split": "test",
            "sentences": _sentences("Two young guys."),
        }
    ],
}
COCO = {
    "info": {},
    "images": [
        {"id": 42, "file_name": "COCO_val2014_000000000042.jpg", "height": 1},
        {"id": 73, "file_name": "COCO_val2014_000000000073.jpg", "height": 1},
    ],
    "annotations": [
        {"id": 1, "image_id": 73, "caption": "A dog."},
        {"id": 2, "image_id": 42, "caption": "A cat."},
        {"id": 3, "image_id": 42, "caption": "One cat"},
    ],
}
COCO_LIST = [
    {"image": "val2014/COCO_val2014_000000000042.jpg", "caption": "A cat.", "image_id": "coco_42"},
    {"image": "val2014/COCO_val2014_000000000073.jpg", "caption": "A dog.", "image_id": "coco_73"},
    {"image": "val2014/COCO_val2014_000000000042.jpg", "caption": "One cat", "image_id": "coco_42"},
]
COCO_LIST_EVAL = [
    {"image": "val2014/COCO_val2014_000000000042.jpg", "caption": ["A cat.", "One cat"]},
    {"image": "val2014/COCO_val2014_000000000073.jpg", "caption": ["A dog."]},
]
VG_REGIONS = [
    {
        "id": 1,
        "regions": [
            {"region_id": 5, "image_id": 1, "phrase": "A cat.", "x": 0, "width": 3},
            {"region_id": 6, "image_id": 1, "phrase": "One cat", "x": 0, "width": 3},
        ],
    },
    {"id": 2, "regions": [{"region_id": 7, "image_id": 2, "phrase": "A dog."}]},
]
VG_LIST = [
    {"image": "VG_100K/1.jpg", "caption": ["A cat.", "One cat"]},
    {"image": "VG_100K/2.jpg", "caption": "A dog."},
]
NOCAPS = {
    "images": [
        {
            "id": 0,
            "open_images_id": "0013ea2087020901",
            "file_name": "0013ea2087020901.jpg",
            "domain": "near-domain",
        }
    ],
    "annotations": [{"id": 0, "image_id": 0, "caption": "A baby."}],
}


def _questions(subtype: str) -> dict:
    asked = [(1, 42, "What is it?"), (2, 73, "Is it red?"), (3, 42, "How many?")]
    return {
        "task_type": "Open-Ended",
        "data_subtype": subtype,
        "questions": [
            {"question_id": number, "image_id": image, "question": text}
            for number, image, text in asked
        ],
    }


def _answers(*texts: str) -> list[dict]:
    return [
        {"answer": text, "answer_confidence": "yes", "answer_id": i + 1}
        for i, text in enumerate(texts)
    ]


VQA_ANNOTATIONS = {
    "data_subtype": "val2014",
    "annotations": [
        {
            "question_id": number,
            "image_id": image,
            "question_type": "what",
            "answer_type": kind,
            "multiple_choice_answer": answer,
            "answers": _answers(*[answer] * 9, "else"),
        }
        for number, image, kind, answer in [
            (3, 42, "number", "2"),
            (1, 42, "other", "cat"),
            (2, 73, "yes/no", "no"),
        ]
    ],
}
OKVQA_ANNOTATIONS = {
    "question_types": {"four": "Sports and Recreation"},
    "annotations": [
        {
            "question_id": number,
            "image_id": image,
            "question_type": "four",
            "answer_type": "other",
            "confidence": 3,
            "answers": [
                {**a, "raw_answer": a["answer"]}
                for a in _answers("race", "race", "ride", "ride", "ride")
            ],
        }
        for number, image in [(1, 42), (2, 73), (3, 42)]
    ],
}
GQA = {
    "02930152": {
        "imageId": "2354786",
        "question": "Is the sky dark?",
        "answer": "yes",
        "fullAnswer": "Yes, the sky is dark.",
        "types": {"structural": "verify", "semantic": "global", "detailed": "verify"},
    },
    "07333408": {"imageId": "n161313", "question": "What is on the wall?"},
    "07333409": {"imageId": "2354786", "question": "Which color?", "answer": "gray"},
}
COCO_CAPTIONS = {"coco/42": ["A cat.", "One cat"], "coco/73": ["A dog."]}
VG_CAPTIONS = {"vg/1": ["A cat.", "One cat"], "vg/2": ["A dog."]}


CC_SBU_ALIGN = {
    "annotations": [
        {"image_id": "2", "caption": "A long text. It goes on."},
        {"image_id": 10, "caption": "Another one."},
    ]
}


def _talk(*texts: str) -> list[dict]:
    roles = ("human", "gpt")
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


LLAVA = [
    {
        "id": "42",
        "image": "coco/train2017/000000000042.jpg",
        "conversations": _talk("<image>\nWhat is it?", "A cat.", "Where?", "Here."),
    },
    {"id": "x", "conversations": _talk("Hello", "Hi")},
    {"id": "1", "image": "vg/VG_100K/1.jpg", "conversations": _talk("Describe it.", "A dog.")},
]
POPE = [
    {"question_id": 1, "image": "COCO_val2014_000000000042.jpg", "text": "A cat?", "label": "yes"},
    {"question_id": 2, "image": "COCO_val2014_000000000073.jpg", "text": "A dog?", "label": "no"},
    {"question_id": 3, "image": "COCO_val2014_000000000042.jpg", "text": "A bus?", "label": "no"},
]


@pytest.fixture
def put(tmp_path, encode_image):
    """Writes files under `tmp_path`: JSON for an object, or pictures for names."""

    def write(*names: str, content: Any = None) -> Path:
        for number, name in enumerate(names):
            (path := tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.write_bytes(encode_image((number, 9, 9), fmt="JPEG", size=(8, 8)))
            else:
                path.write_text(json.dumps(content))
        return tmp_path / names[0]

    return write


@pytest.fixture
def run(tmp_path, put):
    """Imports the given files into ``tmp_path/out``; returns what was done and the samples."""

    def do(layout, annotations=None, questions=None, split="val", **options):
        given = {"annotations": annotations, "questions": questions}
        files = {
            role: None if content is None else put(f"{role}.json", content=content)
            for role, content in given.items()
        }
        (tmp_path / "images").mkdir(exist_ok=True)
        settings = {"images": tmp_path / "images", "out": tmp_path / "out", **options}
        done = import_dataset(layout, split=split, **files, **settings)
        return done, _written(settings["out"])

    return do


def _written(folder: Path) -> list[dict]:
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    samples = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    return [{**sample, "json": json.loads(sample["json"])} for sample in samples]


COCO_FILES = [f"images/val2014/COCO_val2014_{n:012d}.jpg" for n in (42, 73, 74)]
FLAT_FILES = [f"images/COCO_val2014_{n:012d}.jpg" for n in (42, 73)]
VG_FILES = ["images/VG_100K/1.jpg", "images/VG_100K_2/2.jpg"]


@pytest.mark.parametrize(
    ("layout", "content", "files", "expected"),
    [
        ("karpathy", KARPATHY_COCO, COCO_FILES, {"coco/42": ["A cat.", "One cat "]}),
        ("karpathy", KARPATHY_COCO, FLAT_FILES, {"coco/42": ["A cat.", "One cat "]}),
        ("coco_captions", COCO, FLAT_FILES, COCO_CAPTIONS),
        ("coco_captions", COCO_LIST, COCO_FILES, COCO_CAPTIONS),
        ("coco_captions", COCO_LIST_EVAL, FLAT_FILES, COCO_CAPTIONS),
        ("vg_captions", VG_REGIONS, VG_FILES, VG_CAPTIONS),
        ("vg_captions", VG_LIST, VG_FILES, VG_CAPTIONS),
        ("nocaps", NOCAPS, ["images/0013ea2087020901.jpg"], {"nocaps/0": ["A baby."]}),
    ],
)
def test_captions(run, put, tmp_path, layout, content, files, expected):
    put(*files)
    done, samples = run(layout, content, split="train")
    assert {s["json"]["image_id"]: s["json"]["captions"] for s in samples} == expected
    assert [s["json"]["image_id"] for s in samples] == list(expected)
    assert {s["json"]["split"] for s in samples} == {"train"}
    assert done.samples == len(expected) and done.shards == 1 and done.questions == 0
    assert done.captions == sum(map(len, expected.values())) and done.skipped == ""
    originals = {(tmp_path / name).read_bytes() for name in files}
    assert len({s["jpg"] for s in samples} & originals) == len(samples)
    assert samples[0]["jpg"] == (tmp_path / files[0]).read_bytes()
    assert [s["json"].get("domain") for s in samples] == (
        ["near-domain"] if layout == "nocaps" else [None] * len(samples)
    )


def test_karpathy_splits(run, put, tmp_path, caplog):
    put(*COCO_FILES)
    with caplog.at_level("INFO"):
        run("karpathy", KARPATHY_COCO, split="train")
    assert "1 images of split restval" in caplog.text
    caplog.clear()
    _, samples = run("karpathy", KARPATHY_COCO, split="train+restval", out=tmp_path / "both")
    assert [s["json"]["image_id"] for s in samples] == ["coco/42", "coco/73"]
    assert {s["json"]["split"] for s in samples} == {"train"} and "restval" not in caplog.text
    with pytest.raises(UserError, match=r"no split 'val'; choose from restval, test, train"):
        run("karpathy", KARPATHY_COCO, split="val", out=tmp_path / "none")
    put("images/1000092795.jpg")
    _, (flickr,) = run("karpathy", KARPATHY_FLICKR, split="test", out=tmp_path / "flickr")
    assert flickr["json"]["image_id"] == "flickr30k/0"


@pytest.mark.parametrize("files", [COCO_FILES, FLAT_FILES])
def test_vqav2(run, put, files):
    put(*files)
    done, samples = run("vqav2", VQA_ANNOTATIONS, _questions("val2014"))
    assert (done.samples, done.captions, done.questions) == (2, 0, 3)
    first, second = (s["json"] for s in samples)
    assert first["image_id"] == "coco/42" and first["captions"] == []
    assert first["questions"] == [
        {
            "question": "What is it?",
            "question_id": 1,
            "answer": "cat",
            "answers": ["cat"] * 9 + ["else"],
            "kind": "other",
        },
        {
            "question": "How many?",
            "question_id": 3,
            "answer": "2",
            "answers": ["2"] * 9 + ["else"],
            "kind": "number",
        },
    ]
    assert [q["question_id"] for q in second["questions"]] == [2]


def test_vqav2_tests_have_no_answers_and_test_dev_shares_the_pictures(run, put):
    put(*(f"images/test2015/COCO_test2015_{n:012d}.jpg" for n in (42, 73)))
    _, samples = run("vqav2", None, _questions("test-dev2015"), split="test-dev")
    asked = [q for s in samples for q in s["json"]["questions"]]
    assert [set(q) for q in asked] == [{"question", "question_id"}] * 3


def test_okvqa_takes_the_commonest_answer(run, put):
    put(*FLAT_FILES)
    _, samples = run("okvqa", OKVQA_ANNOTATIONS, _questions("val2014"))
    question = samples[1]["json"]["questions"][0]
    assert question["answer"] == "ride" and len(question["answers"]) == 5
    assert question["kind"] == "Sports and Recreation"


def test_gqa(run, put):
    put("images/2354786.jpg", "images/n161313.jpg")
    done, samples = run("gqa", None, GQA)
    assert done.questions == 3
    assert [s["json"]["image_id"] for s in samples] == ["vg/2354786", "gqa/n161313"]
    assert samples[0]["json"]["questions"] == [
        {
            "question": "Is the sky dark?",
            "question_id": "02930152",
            "answer": "yes",
            "kind": "verify",
        },
        {"question": "Which color?", "question_id": "07333409", "answer": "gray"},
    ]


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
    first, second = (s["json"] for s in _written(tmp_path / "out"))
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
        ("pope", "questions", _questions("val2014"), r"it looks like vqav2 or okvqa$"),
        ("pope", "questions", [{**POPE[0], "label": "maybe"}], r"entry\[0\]: label is 'maybe'"),
        (
            "llava",
            "annotations",
            _turned(conversations=_talk("<image> a", "b", "c")),
            r"entry\[0\]: the turns are user, assistant, user; they must be pairs",
        ),
        (
            "llava",
            "annotations",
            _turned(conversations=_talk("<image> a", "b", "<image> c", "d")),
            r"entry\[0\]: <image> must stand once",
        ),
        (
            "llava",
            "annotations",
            _turned(conversations=_talk("a", "<image> b")),
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


def test_the_same_files_give_the_same_bytes(run, put, tmp_path):
    put(*COCO_FILES)
    for name in ("a", "b"):
        run("coco_captions", COCO_LIST, out=tmp_path / name)
    assert (tmp_path / "a/00000.tar").read_bytes() == (tmp_path / "b/00000.tar").read_bytes()


def test_shards_are_served_by_both_loaders(run, put, tmp_path, to_pixels):
    put(*COCO_FILES)
    run("coco_captions", COCO_LIST, out=tmp_path / "captions")
    run("vqav2", VQA_ANNOTATIONS, _questions("val2014"), out=tmp_path / "vqa")
    sources = [ShardSourceConfig(urls=str(tmp_path / name)) for name in ("captions", "vqa")]
    config = LoaderConfig(batch_size=2, workers=0, shuffle_window=4)
    (first, second) = EvalLoader(sources, config, image_transform=to_pixels)
    assert first.all_captions == [["A cat.", "One cat"], ["A dog."]]
    assert first.captions == ["A cat.", "A dog."] and first.draws == [0, 0]
    assert second.captions == ["", ""] and second.all_captions == [[], []]
    assert [m["image_id"] for m in first.meta] == [m["image_id"] for m in second.meta]
    assert second.meta[1]["questions"][0]["answer"] == "no"
    train = TrainLoader(sources, config, steps=8, seed=0, image_transform=to_pixels)
    seen = set(chain.from_iterable(batch.captions for batch in train))
    assert seen == {"A cat.", "One cat", "A dog.", ""}
    paired = LoaderConfig(batch_size=2, workers=0, captions_per_image=2)
    (batch,) = TrainLoader(sources[1:], paired, steps=1, seed=0, image_transform=to_pixels)
    assert batch.captions == ["", ""] and len(batch.text_ids_M) == 4


def test_missing_pictures_are_counted_by_cause_or_stop_the_import(run, put, tmp_path):
    content = {"dataset": "coco", "images": [_karpathy_image(n, "val", "a") for n in range(8)]}
    content["images"][5]["sentences"] = _sentences(" ")
    put(*(f"images/val2014/COCO_val2014_{n:012d}.jpg" for n in range(7)))
    (tmp_path / "images/val2014/COCO_val2014_000000000003.jpg").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        run("karpathy", content)
    message = str(caught.value)
    assert "3 of 8 pictures cannot be used (37.5%, --max-missing allows 5.0%)" in message
    for cause in ("1 x no image (", "1 x zero-byte image (", "1 x no caption ("):
        assert cause in message
    assert "000000000007.jpg" in message and not (tmp_path / "out").exists()
    done, samples = run("karpathy", content, max_missing=0.375)
    assert done.samples == len(samples) == 5 and "1 x no image (" in done.skipped


def test_no_picture_at_all_names_the_folder(run, tmp_path):
    with pytest.raises(UserError) as caught:
        run("coco_captions", COCO, max_missing=1.0)
    assert "none of the 2 pictures is in" in str(caught.value)
    assert str(tmp_path / "images/COCO_val2014_000000000042.jpg") in str(caught.value)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        run("coco_captions", COCO, images=tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name",
    ["../secret.jpg", "a/../../secret.jpg", "/etc/secret.jpg", "C:\\secret.jpg", "..\\s.jpg", ""],
)
@pytest.mark.parametrize("layout", ["nocaps", "coco_captions"])
def test_names_that_leave_the_image_folder_are_refused(run, put, tmp_path, layout, name):
    put("secret.jpg")
    content = json.loads(json.dumps({"nocaps": NOCAPS, "coco_captions": COCO}[layout]))
    content["images"][0]["file_name"] = name
    with pytest.raises(UserError, match="leads out of the image folder"):
        run(layout, content)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layout", "role", "content", "alike"),
    [
        ("coco_captions", "annotations", KARPATHY_COCO, "it looks like karpathy$"),
        ("coco_captions", "annotations", NOCAPS, "it looks like nocaps$"),
        ("nocaps", "annotations", COCO, "it looks like coco_captions$"),
        ("vg_captions", "annotations", COCO_LIST, "it looks like coco_captions$"),
        ("coco_captions", "annotations", VG_LIST, "it looks like vg_captions$"),
        ("karpathy", "annotations", VG_REGIONS, "it looks like vg_captions$"),
        ("vqav2", "questions", GQA, "it looks like gqa$"),
        ("gqa", "questions", _questions("val2014"), "it looks like vqav2 or okvqa$"),
        ("karpathy", "annotations", {"categories": []}, "nor any other known here$"),
        ("gqa", "questions", [], "nor any other known here$"),
    ],
)
def test_another_layout_is_recognised(run, layout, role, content, alike):
    with pytest.raises(UserError, match=rf"{role}\.json is not in the layout '{layout}'; {alike}"):
        run(layout, **{role: content})


def _without(content: Any, *path: Any) -> Any:
    """A copy that lacks one key."""
    copy = json.loads(json.dumps(content))
    target = copy
    for step in path[:-1]:
        target = target[step]
    del target[path[-1]]
    return copy


VQA = _questions("val2014")


@pytest.mark.parametrize(
    ("layout", "annotations", "questions", "message"),
    [
        (
            "karpathy",
            _without(KARPATHY_COCO, "images", 0, "sentences", 1, "raw"),
            None,
            r"annotations\.json: images\[0\]\.sentences\[1\] has no key 'raw'",
        ),
        ("karpathy", _without(KARPATHY_COCO, "dataset"), None, r"annotations\.json has no key 'da"),
        ("coco_captions", _without(COCO, "images", 1, "file_name"), None, r"images\[1\] has no "),
        ("coco_captions", _without(COCO, "images", 1), None, r"annotations\[0\] is about image 73"),
        ("coco_captions", [*COCO_LIST, 3], None, r"annotations\.json: entry\[3\] is 3, not an obj"),
        ("coco_captions", [COCO_LIST[0], VG_LIST[0]], None, r"entry\[1\]: neither image 'VG_100K"),
        ("vg_captions", _without(VG_REGIONS, 1, "regions"), None, r"entry\[1\] has no key 'reg"),
        ("nocaps", _without(NOCAPS, "images", 0, "domain"), None, "has no key 'domain'"),
        ("vqav2", VQA_ANNOTATIONS, _without(VQA, "data_subtype"), "no key 'data_subtype'"),
        (
            "vqav2",
            _without(VQA_ANNOTATIONS, "annotations", 1),
            VQA,
            r"questions\.json: questions\[0\]: annotations\.json has no answers to question 1;",
        ),
        ("vqav2", OKVQA_ANNOTATIONS, VQA, "has no key 'multiple_choice_answer'"),
        ("vqav2", VQA_ANNOTATIONS, None, "vqav2 needs --questions FILE"),
        ("vqav2", VQA_ANNOTATIONS, VQA_ANNOTATIONS, r"questions\.json has no key 'questions'"),
        ("gqa", GQA, GQA, "gqa does not take --annotations; it takes --questions"),
        (
            "gqa",
            None,
            _without(GQA, "07333408", "question"),
            r"json: 07333408 has no key 'question",
        ),
        ("coco", COCO, None, "unknown name 'coco'"),
    ],
)
def test_what_is_wrong_is_named(run, put, layout, annotations, questions, message):
    put(*FLAT_FILES, *VG_FILES, "images/2354786.jpg", "images/0013ea2087020901.jpg")
    with pytest.raises(UserError, match=message) as caught:
        run(layout, annotations, questions, split="train")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(run, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "half.json").write_text('{"images": [')
    options = {"images": tmp_path / "images", "out": tmp_path / "out", "split": "val"}
    for name, message in (("half.json", "is not JSON"), ("none.json", "cannot be read: No such")):
        with pytest.raises(UserError, match=message):
            import_dataset("karpathy", annotations=tmp_path / name, questions=None, **options)


def test_a_used_folder_is_left_alone_and_an_empty_one_taken(run, put, tmp_path):
    put(*FLAT_FILES)
    (tmp_path / "out").mkdir()
    run("coco_captions", COCO)
    before = (tmp_path / "out/00000.tar").read_bytes()
    with pytest.raises(UserError, match="is not an empty folder"):
        run("coco_captions", COCO)
    assert (tmp_path / "out/00000.tar").read_bytes() == before
    assert not list(tmp_path.glob(".out*"))


def test_command_line(put, tmp_path, monkeypatch, capsys):
    put(*FLAT_FILES)
    files = {"--questions": VQA, "--annotations": VQA_ANNOTATIONS}
    paths = {o: str(put(f"{o[2:]}.json", content=c)) for o, c in files.items()}
    common = ["--images", str(tmp_path / "images"), "--split", "val", "--out", str(tmp_path / "o")]
    command = ["data", "import", "vqav2", *chain.from_iterable(paths.items()), *common]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert "2 samples, 0 captions, 3 questions, 1 shards in " in result.stdout
    expected = f'- {{name: shards, urls: "{tmp_path / "o"}", num_samples: 2}}'
    assert result.stdout.splitlines()[-1].strip() == expected
    monkeypatch.setattr("sys.argv", ["latentmodal", *command])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: --out ")


def test_the_command_lists_every_reader():
    shown = CliRunner().invoke(cli.app, ["data", "import", "--help"], env={"COLUMNS": "200"}).output
    assert all(name in shown for name in READERS)
