"""What is wrong with published files, or missing beside them, is named in one line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from latentmodal.experiments.data.readers.importing import import_dataset
from latentmodal.experiments.errors import UserError
from published_layouts import (
    COCO,
    COCO_LIST,
    FLAT_FILES,
    GQA,
    KARPATHY_COCO,
    NOCAPS,
    OKVQA_ANNOTATIONS,
    VG_FILES,
    VG_LIST,
    VG_REGIONS,
    VQA,
    VQA_ANNOTATIONS,
    karpathy_image,
    questions,
    sentences,
)


def test_missing_pictures_are_counted_by_cause_or_stop_the_import(run, put, tmp_path):
    content = {"dataset": "coco", "images": [karpathy_image(n, "val", "a") for n in range(8)]}
    content["images"][5]["sentences"] = sentences(" ")
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
        ("gqa", "questions", questions("val2014"), "it looks like vqav2 or okvqa$"),
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
