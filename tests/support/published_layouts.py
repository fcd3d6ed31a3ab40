"""Tiny files in the layouts that data sets are published in."""

from __future__ import annotations

import json
from pathlib import Path

import webdataset


def sentences(*texts: str) -> list[dict]:
    return [{"tokens": t.lower().split(), "raw": t, "imgid": 0, "sentid": 0} for t in texts]


def karpathy_image(number: int, split: str, *texts: str) -> dict:
    return {
        "filepath": "val2014",
        "filename": f"COCO_val2014_{number:012d}.jpg",
        "imgid": number + 1000,
        "cocoid": number,
        "split": split,
        "sentences": sentences(*texts),
        "sentids": [],
    }


KARPATHY_COCO = {
    "dataset": "coco",
    "images": [
        karpathy_image(42, "train", "A cat.", "One cat "),
        karpathy_image(73, "restval", "A dog."),
        karpathy_image(74, "test", "A bird."),
    ],
}


KARPATHY_FLICKR = {
    "dataset": "flickr30k",
    "images": [
        {
            "filename": "1000092795.jpg",
            "imgid": 0,
            "split": "test",
            "sentences": sentences("Two young guys."),
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


def questions(subtype: str) -> dict:
    asked = [(1, 42, "What is it?"), (2, 73, "Is it red?"), (3, 42, "How many?")]
    return {
        "task_type": "Open-Ended",
        "data_subtype": subtype,
        "questions": [
            {"question_id": number, "image_id": image, "question": text}
            for number, image, text in asked
        ],
    }


def answers(*texts: str) -> list[dict]:
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
            "answers": answers(*[answer] * 9, "else"),
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
                for a in answers("race", "race", "ride", "ride", "ride")
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


def talk(*texts: str) -> list[dict]:
    roles = ("human", "gpt")
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


LLAVA = [
    {
        "id": "42",
        "image": "coco/train2017/000000000042.jpg",
        "conversations": talk("<image>\nWhat is it?", "A cat.", "Where?", "Here."),
    },
    {"id": "x", "conversations": talk("Hello", "Hi")},
    {"id": "1", "image": "vg/VG_100K/1.jpg", "conversations": talk("Describe it.", "A dog.")},
]


POPE = [
    {"question_id": 1, "image": "COCO_val2014_000000000042.jpg", "text": "A cat?", "label": "yes"},
    {"question_id": 2, "image": "COCO_val2014_000000000073.jpg", "text": "A dog?", "label": "no"},
    {"question_id": 3, "image": "COCO_val2014_000000000042.jpg", "text": "A bus?", "label": "no"},
]


def read_shards(folder: Path) -> list[dict]:
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    samples = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    return [{**sample, "json": json.loads(sample["json"])} for sample in samples]


COCO_FILES = [f"images/val2014/COCO_val2014_{n:012d}.jpg" for n in (42, 73, 74)]


FLAT_FILES = [f"images/COCO_val2014_{n:012d}.jpg" for n in (42, 73)]


VG_FILES = ["images/VG_100K/1.jpg", "images/VG_100K_2/2.jpg"]


VQA = questions("val2014")
