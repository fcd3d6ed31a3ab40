"""The data half of a recipe: which sources feed training, how they are loaded and augmented."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from latentmodal.experiments.choose import choices
from latentmodal.experiments.data.addresses import open_shard
from latentmodal.experiments.data.augment import AugmentConfig
from latentmodal.experiments.data.config import LoaderConfig, ShardSourceConfig
from latentmodal.experiments.data.decode import Texts, decode_texts
from latentmodal.experiments.data.emoji import EmojiConfig, EmojiData, emoji_captions, ensure_emoji
from latentmodal.experiments.data.faults import BadSampleError
from latentmodal.experiments.data.loader import open_sources
from latentmodal.experiments.data.tar_reader import read_samples
from latentmodal.experiments.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EmojiSourceConfig:
    """A split of the embedded emoji scenes; built on first use."""

    preset: str = "default"
    seed: int = 0
    split: str = "train"
    weight: float = 1.0
    caption: str = "random"

    def __post_init__(self) -> None:
        # The same rules as for shards, checked when the recipe is read.
        ShardSourceConfig(urls="emoji", weight=self.weight, caption=self.caption)

    def data(self) -> EmojiData:
        """The data set this split belongs to."""
        return ensure_emoji(EmojiConfig(preset=self.preset, seed=self.seed))

    def resolve(self) -> ShardSourceConfig:
        """The shards of this split.

        Raises:
            UserError: no such split.
        """
        data = self.data()
        if self.split not in data.splits:
            raise UserError(
                f"the emoji scenes have no split '{self.split}'; "
                f"choose from {', '.join(data.splits)}"
            )
        return ShardSourceConfig(
            urls=data.splits[self.split],
            weight=self.weight,
            caption=self.caption,
            num_samples=data.meta["counts"][self.split],
        )


SOURCES: dict[str, type] = {"shards": ShardSourceConfig, "emoji": EmojiSourceConfig}


def resolve_source(source: Any) -> ShardSourceConfig:
    """Any source as shards, the one road all data take."""
    return source.resolve() if isinstance(source, EmojiSourceConfig) else source


def training_captions(source: Any, limit: int = 100_000) -> Iterator[str]:
    """Captions to learn words from: all of the emoji scenes', the first `limit` of shards."""
    if isinstance(source, EmojiSourceConfig):
        yield from emoji_captions(source.data().folder)
    else:
        found = (caption for texts in _shard_texts(source) for caption in texts.captions)
        yield from islice(found, limit)


def training_questions(source: Any, limit: int = 100_000) -> Iterator[Mapping[str, Any]]:
    """The first `limit` questions in a source's json: `question`, `answer` or `answers`, `kind`."""
    found = (
        entry
        for texts in _shard_texts(resolve_source(source))
        for entry in texts.meta.get("questions", ())
    )
    yield from islice(found, limit)


def _shard_texts(source: ShardSourceConfig) -> Iterator[Texts]:
    longest = LoaderConfig().max_caption_chars
    for shard in open_sources([source])[0].shards:
        with open_shard(shard) as stream:
            for raw in read_samples(stream, shard, lambda _fault: None):
                with suppress(BadSampleError):  # training skips and counts it
                    yield decode_texts(raw, longest)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What training reads, and how."""

    train: tuple[Any, ...] = choices(SOURCES, keyed=False)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    features: str | None = None
    """Train from frozen features, not pictures: `auto`, or the folder `latentmodal cache` made."""

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("train is empty; name at least one source")
