"""What a recipe may say about where samples come from and how they are served."""

from __future__ import annotations

import math
from dataclasses import dataclass

CAPTION_CHOICES = ("first", "random")
CLEAN_CHOICES = ("none", "blip")
MATCH_CHOICES = ("row", "caption", "image", "fact")


@dataclass(frozen=True, kw_only=True)
class ShardSourceConfig:
    """One set of WebDataset shards.

    Attributes:
        urls: an address, a folder of ``.tar`` files, or a list of them; each may hold braces
            (``s3://bucket/{00000..00999}.tar``) or, where the store can list, wildcards.
        weight: how often a sample is drawn from here, relative to the other sources.
        caption: of several captions, take the ``first`` or a ``random`` one on each visit.
        num_samples: how many samples the shards hold, where known; saves counting them.
    """

    urls: str | list[str]
    weight: float = 1.0
    caption: str = "random"
    num_samples: int | None = None

    def __post_init__(self) -> None:
        if not self.urls or not all(self.url_list):
            raise ValueError(
                f"urls={self.urls!r} names no shards; give an address or a list of them"
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(
                f"weight={self.weight} must be a positive number; drop the source to leave it out"
            )
        if self.caption not in CAPTION_CHOICES:
            raise ValueError(f"caption={self.caption!r} is unknown; choose first or random")
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(
                f"num_samples={self.num_samples} must be at least 1; leave it out to count"
            )

    @property
    def url_list(self) -> list[str]:
        """``urls`` as a list."""
        return [self.urls] if isinstance(self.urls, str) else list(self.urls)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How samples are read, checked and batched.

    Attributes:
        batch_size: samples per batch on each rank.
        workers: reading processes per rank; 0 reads in the training process.
        shuffle_window: samples each worker holds undecoded and shuffles among themselves; shards
            are shuffled too, once per epoch. 1 keeps the order inside a shard.
        max_bad_fraction: the run stops once more than this share of the samples had to be skipped.
        max_pixels: larger images are skipped before their pixels are allocated.
        max_caption_chars: longer captions are cut (and counted).
        max_member_mb: larger files inside a shard are skipped unread.
        draft_side: lets libjpeg decode at 1/2, 1/4 or 1/8 scale as long as both sides keep at least
            this many pixels. About 1.25 x the training size is safe for crops of 90 % of the area;
            None always decodes in full.
        match: which texts are positives of an image: its own ``row``, every text of the global
            batch that equals its ``caption`` word for word, or every text of the same ``image``
            (by ``image_id`` in its json, else by key), or every text whose picture shows the same
            ``fact`` (by ``fact`` in its json, else by caption), however it is worded.
        clean: ``blip`` rewrites captions and questions as BLIP and BLIP-2 do: lower case, most
            marks gone, at most 50 words; ``none`` leaves them. Evaluation rewrites what the model
            is to read likewise, and leaves answers and the references of caption metrics alone.
        captions_per_image: texts each image brings to the batch, all its positives; an image
            with fewer repeats some.
        prefetch: batches each worker prepares ahead.
    """

    batch_size: int = 64
    workers: int = 2
    shuffle_window: int = 1000
    max_bad_fraction: float = 0.05
    max_pixels: int = 50_000_000
    max_caption_chars: int = 2000
    max_member_mb: int = 64
    draft_side: int | None = None
    match: str = "row"
    clean: str = "none"
    captions_per_image: int = 1
    prefetch: int = 2

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "shuffle_window",
            "max_pixels",
            "max_caption_chars",
            "max_member_mb",
            "captions_per_image",
            "prefetch",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must be 0 (no processes) or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(
                f"max_bad_fraction={self.max_bad_fraction} must lie in 0 to 1 (1 never stops)"
            )
        if self.draft_side is not None and self.draft_side < 1:
            raise ValueError(f"draft_side={self.draft_side} must be at least 1 pixel, or null")
        if self.clean not in CLEAN_CHOICES:
            raise ValueError(f"clean={self.clean!r} is unknown; choose none or blip")
        if self.match not in MATCH_CHOICES:
            raise ValueError(f"match={self.match!r} is unknown; choose row, caption, image or fact")
        if self.captions_per_image > 1 and self.match != "row":
            raise ValueError(
                f"captions_per_image={self.captions_per_image} makes the texts of an image its "
                "positives; leave match at row"
            )

    @property
    def max_member_bytes(self) -> int:
        """``max_member_mb`` in bytes."""
        return self.max_member_mb * 2**20
