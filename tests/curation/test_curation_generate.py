"""Describing pictures into a ledger, by a model that only pretends to look."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from latentmodal.experiments.curation.generating import (
    CONTINUE,
    INSTRUCTION,
    GenerateConfig,
    generate,
    parse_source,
)
from latentmodal.experiments.curation.ledger import Ledger
from latentmodal.experiments.data.config import ShardSourceConfig
from latentmodal.experiments.data.module import EmojiSourceConfig
from latentmodal.experiments.data.shard_writer import write_shards
from latentmodal.experiments.errors import UserError
from latentmodal.llm import GenerationSettings, Turn


class Pretender:
    """Says the mean colour of what it sees, and notes what it was asked."""

    name = "pretender"

    takes_words = True

    def __init__(self, stop_after: int | None = None, sampled: bool = False) -> None:
        self.asked: list[tuple[list[int], list[list[tuple[str, str]]]]] = []
        self.stop_after = stop_after
        self.sampled = sampled

    def image_transform(self, image: Image.Image) -> Tensor:
        values = torch.tensor(list(image.resize((2, 2)).tobytes()), dtype=torch.uint8)
        return values.view(2, 2, 3).permute(2, 0, 1)

    def describe(
        self,
        pixels_BCHW: Tensor,
        conversations: Sequence[Sequence[Turn]],
        settings: GenerationSettings,
    ) -> list[str]:
        assert len(pixels_BCHW) == len(conversations)
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        reds = pixels_BCHW[:, 0, 0, 0].tolist()
        turns = [[(turn.role, turn.text) for turn in one] for one in conversations]
        self.asked.append((reds, turns))
        draw = f" {torch.rand(()).item()}" if self.sampled else ""
        # Even reds are talkative at once.
        return [
            f"red {red}{draw} " + ("and more " * 5 if red % 2 == 0 and len(one) == 1 else "more")
            for red, one in zip(reds, turns, strict=True)
        ]

    def count_tokens(self, text: str) -> int:
        return len(text.split())


def _png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _shards(folder: Path, reds: Sequence[int]) -> ShardSourceConfig:
    samples: list[dict[str, Any]] = [
        {"__key__": f"{place:03d}", "png": _png(red), "txt": f"red {red}", "json": {"n": place}}
        for place, red in enumerate(reds)
    ]
    write_shards(samples, folder, samples_per_shard=3)
    return ShardSourceConfig(urls=str(folder))


def _config(**options: Any) -> GenerateConfig:
    return GenerateConfig(**{"batch_size": 2, "min_tokens": 5, **options})


def test_short_answers_go_on_in_the_same_conversation(tmp_path: Path) -> None:
    source = _shards(tmp_path / "shards", [10, 11, 12])
    ledger, model = Ledger(tmp_path / "out" / "ledger.jsonl"), Pretender()
    counted: list[int] = []
    assert generate(ledger, model, source, _config(), on_progress=counted.append) == 3
    assert counted == [2, 1]

    first = ("user", f"<image> {INSTRUCTION}")
    assert model.asked == [
        ([10, 11], [[first], [first]]),
        ([11], [[first, ("assistant", "red 11 more"), ("user", CONTINUE)]]),
        ([12], [[first]]),
    ]
    records = list(ledger)
    long = " and more" * 5 + " "
    assert [record.generated.rstrip() for record in records] == [
        f"red 10{long}".rstrip(),
        "red 11 more red 11 more",
        f"red 12{long}".rstrip(),
    ]
    for place, (record, red) in enumerate(zip(records, [10, 11, 12], strict=True)):
        assert (ledger.folder / record.image).read_bytes() == _png(red)
        assert record.image == f"images/{record.id}.png"
        assert record.meta == {"key": f"{place:03d}", "n": place, "captions": [f"red {red}"]}
        assert (record.by, record.instruction) == ("pretender", INSTRUCTION)


def test_zero_never_asks_to_go_on(tmp_path: Path) -> None:
    model = Pretender()
    source = _shards(tmp_path / "shards", [11])
    generate(Ledger(tmp_path / "out" / "l.jsonl"), model, source, _config(min_tokens=0))
    assert len(model.asked) == 1


def test_a_model_that_takes_no_words_is_asked_nothing(tmp_path: Path) -> None:
    model, ledger = Pretender(), Ledger(tmp_path / "out" / "l.jsonl")
    model.takes_words = False
    generate(ledger, model, _shards(tmp_path / "shards", [11]), _config())
    assert model.asked == [([11], [[("user", "<image>")]])]
    assert next(iter(ledger)).instruction == ""


def test_what_is_in_the_ledger_is_not_described_again(tmp_path: Path) -> None:
    reds = [2, 4, 6, 8, 10, 12, 14]
    source = _shards(tmp_path / "shards", reds)
    ledger = Ledger(tmp_path / "out" / "ledger.jsonl")
    with pytest.raises(KeyboardInterrupt):
        generate(ledger, Pretender(stop_after=2, sampled=True), source, _config())
    assert len(ledger) == 4

    moved = (tmp_path / "shards").rename(tmp_path / "moved")
    model = Pretender(sampled=True)
    assert generate(ledger, model, ShardSourceConfig(urls=str(moved)), _config()) == 3
    assert [red for seen, _ in model.asked for red in seen] == [10, 12, 14]

    whole = Ledger(tmp_path / "whole" / "ledger.jsonl")
    generate(whole, Pretender(sampled=True), ShardSourceConfig(urls=str(moved)), _config())
    assert [r.generated for r in whole] == [r.generated for r in ledger]  # sampled alike
    other = Ledger(tmp_path / "other" / "ledger.jsonl")
    moved_source = ShardSourceConfig(urls=str(moved))
    generate(other, Pretender(sampled=True), moved_source, _config(seed=1))
    assert [r.generated for r in other] != [r.generated for r in ledger]


def test_the_limit_counts_what_is_there_and_pictures_come_once(tmp_path: Path) -> None:
    source = _shards(tmp_path / "shards", [1, 1, 3, 5, 7, 9])
    ledger = Ledger(tmp_path / "out" / "l.jsonl")
    assert generate(ledger, Pretender(), source, _config(limit=2)) == 2
    assert generate(ledger, Pretender(), source, _config(limit=2)) == 0
    assert generate(ledger, Pretender(), source, _config(limit=4)) == 2
    assert generate(ledger, Pretender(), source, _config()) == 1
    assert [record.meta["captions"] for record in ledger] == [
        [f"red {red}"] for red in (1, 3, 5, 7, 9)
    ]


def test_bad_samples_are_passed_over_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples: list[dict[str, Any]] = [
        {"__key__": "good", "png": _png(9)},
        {"__key__": "bad", "jpg": b"not a picture", "txt": "x"},
        {"__key__": "none", "json": {"captions": ["x"]}},
    ]
    write_shards(samples, tmp_path / "shards")
    ledger = Ledger(tmp_path / "out" / "l.jsonl")
    source = ShardSourceConfig(urls=str(tmp_path / "shards"))
    assert generate(ledger, Pretender(), source, _config()) == 1
    assert "2 samples were left out" in caplog.text
    assert ":: bad" in caplog.text


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("emoji", EmojiSourceConfig()),
        ("emoji:unseen_pairs", EmojiSourceConfig(split="unseen_pairs")),
        ("emoji:seen:tiny:3", EmojiSourceConfig(split="seen", preset="tiny", seed=3)),
        ("a/{00..09}.tar", ShardSourceConfig(urls="a/{00..09}.tar")),
        ("s3://bucket/x.tar", ShardSourceConfig(urls="s3://bucket/x.tar")),
    ],
)
def test_sources_are_written_in_one_word(spec: str, source: object) -> None:
    assert parse_source(spec) == source


@pytest.mark.parametrize("spec", ["emoji:", "emoji:a:b:c:d", "emoji:a:tiny:x"])
def test_bad_sources_are_one_line(spec: str) -> None:
    with pytest.raises(UserError, match=f"--source {spec}: "):
        parse_source(spec)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"min_tokens": -1}, {"limit": 0}])
def test_bad_settings_of_generate(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        GenerateConfig(**options)  # type: ignore[arg-type]


def test_emoji_pictures_keep_what_is_known_of_them(tmp_path: Path, emoji_cache: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    source = parse_source("emoji:unseen_things:tiny")
    assert generate(ledger, Pretender(), source, _config(limit=3)) == 3
    for record in ledger:
        assert record.meta["objects"]
        assert record.meta["description"]
        json.dumps(dict(record.meta))
