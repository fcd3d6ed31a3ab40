"""Long descriptions of pictures by a first-stage model, into a ledger.

Source: MiniGPT-4 (Zhu et al. 2023, arXiv 2304.10592), section 3.2.

Legend: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from PIL import Image
from torch import Tensor

from latentmodal.experiments.curation.ledger import IMAGES, Event, Generated, Ledger
from latentmodal.experiments.data.addresses import open_shard
from latentmodal.experiments.data.config import LoaderConfig, ShardSourceConfig
from latentmodal.experiments.data.decode import decode_image
from latentmodal.experiments.data.faults import BadSampleError, BadSamples, Cause, Fault
from latentmodal.experiments.data.loader import open_sources
from latentmodal.experiments.data.module import EmojiSourceConfig, resolve_source
from latentmodal.experiments.data.sample import IMAGE_EXTENSIONS, RawSample
from latentmodal.experiments.data.seeding import derive_seed
from latentmodal.experiments.data.tar_reader import read_samples
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.files import write_atomically
from latentmodal.llm import IMAGE_TAG, GenerationSettings, Turn

log = logging.getLogger(__name__)

INSTRUCTION: Final = (
    "Describe this image in detail. Give as many details as possible. Say everything you see."
)
CONTINUE: Final = "Continue"


class Describer(Protocol):
    """A model that talks about pictures."""

    name: str
    """Who described, for the ledger."""
    image_transform: Callable[[Image.Image], Tensor]
    """An RGB picture to uint8 CHW."""
    takes_words: bool
    """Whether it can be asked anything; otherwise it says what it says of a picture."""

    def describe(
        self,
        pixels_BCHW: Tensor,
        conversations: Sequence[Sequence[Turn]],
        settings: GenerationSettings,
    ) -> list[str]:
        """What the model says next in each conversation, one picture each."""
        ...

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, for the language model."""
        ...


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How pictures are described.

    Attributes:
        instruction: what the model is asked, if it takes words.
        min_tokens: an answer with fewer is asked to go on, once; 0 never asks.
        batch_size: pictures at a time.
        limit: describe so many at most, those in the ledger included; None: all.
        settings: how an answer is searched for.
        seed: decides what is sampled, with the pictures of a batch.
    """

    instruction: str = INSTRUCTION
    min_tokens: int = 80
    batch_size: int = 8
    limit: int | None = None
    settings: GenerationSettings = GenerationSettings(num_beams=1, max_new_tokens=300)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens is {self.min_tokens}; it must be at least 0")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1")


@dataclass(frozen=True)
class Picture:
    """A picture on its way into the ledger."""

    id: str
    image: str
    data: bytes
    pixels_CHW: Tensor
    meta: dict[str, Any]


def parse_source(spec: str) -> Any:
    """`emoji[:SPLIT[:PRESET[:SEED]]]`, or the address of shards as a recipe writes it.

    Raises:
        UserError: more or other parts than that.
    """
    name, *parts = spec.split(":")
    if name != "emoji":
        return ShardSourceConfig(urls=spec)
    if len(parts) > 3 or not all(parts):
        raise UserError(f"--source {spec}: write emoji:SPLIT, or emoji:SPLIT:PRESET:SEED")
    fields: dict[str, Any] = dict(zip(("split", "preset", "seed"), parts, strict=False))
    if "seed" in fields:
        if not fields["seed"].isdecimal():
            raise UserError(f"--source {spec}: the seed '{fields['seed']}' is no number")
        fields["seed"] = int(fields["seed"])
    try:
        return EmojiSourceConfig(**fields)
    except ValueError as error:
        raise UserError(f"--source {spec}: {error}") from error


def generate(
    ledger: Ledger,
    describer: Describer,
    source: Any,
    config: GenerateConfig,
    *,
    on_progress: Callable[[int], None] = lambda _described: None,
) -> int:
    """Describe every picture of `source` that is not in the ledger; how many those were.

    A picture is known by its bytes: where shards lie and how they are cut does not matter, and a
    picture that is there twice is described once.

    Raises:
        UserError: the source cannot be read, has too many bad samples, or another process writes
            the ledger.
    """
    if not describer.takes_words:
        log.info("%s takes no words: nothing is asked, and no answer continued", describer.name)
        config = replace(config, instruction="", min_tokens=0)
    described = 0
    tally = BadSamples()
    with ledger:
        for batch in _batches(_pictures(ledger, source, describer, config, tally), config):
            for picture in batch:
                _store(ledger.folder / picture.image, picture.data)
            torch.manual_seed(derive_seed(config.seed, *(picture.id for picture in batch)))
            texts = describe_batch(describer, batch, config)
            ledger.append(*_events(describer, batch, texts, config))
            described += len(batch)
            on_progress(len(batch))
    if tally.bad:
        log.warning("%d samples were left out: %s", tally.bad, tally.summary())
    return described


def describe_batch(
    describer: Describer, batch: Sequence[Picture], config: GenerateConfig
) -> list[str]:
    """A description of each picture; one that is too short is asked to go on."""
    pixels_BCHW = torch.stack([picture.pixels_CHW for picture in batch])
    asked = [Turn("user", f"{IMAGE_TAG} {config.instruction}".strip())]
    texts = describer.describe(pixels_BCHW, [asked] * len(batch), config.settings)
    short = [row for row, text in enumerate(texts) if _goes_on(describer, text, config)]
    if short:
        longer = [[*asked, Turn("assistant", texts[row]), Turn("user", CONTINUE)] for row in short]
        more = describer.describe(pixels_BCHW[short], longer, config.settings)
        for row, rest in zip(short, more, strict=True):
            texts[row] = f"{texts[row]} {rest}".strip()
    return texts


def _goes_on(describer: Describer, text: str, config: GenerateConfig) -> bool:
    # An empty answer gives a conversation nothing to go on from.
    return bool(text.strip()) and describer.count_tokens(text) < config.min_tokens


def _events(
    describer: Describer, batch: Sequence[Picture], texts: Sequence[str], config: GenerateConfig
) -> list[Event]:
    return [
        Generated(
            id=picture.id,
            by=describer.name,
            image=picture.image,
            text=text,
            instruction=config.instruction,
            meta=picture.meta,
        )
        for picture, text in zip(batch, texts, strict=True)
    ]


def _pictures(
    ledger: Ledger, source: Any, describer: Describer, config: GenerateConfig, tally: BadSamples
) -> Iterator[Picture]:
    """The pictures of a source that are not in the ledger, in order."""
    known = set(ledger.records())
    seen: set[str] = set()
    limits = LoaderConfig()

    def on_fault(fault: Fault) -> None:
        tally.add(0, [fault])
        tally.check(limits.max_bad_fraction)

    for raw in _raw_samples(source, on_fault, limits):
        try:
            picture_id, extension, data = _identify(raw)
            if picture_id in seen:
                continue
            if config.limit is not None and len(seen) >= config.limit:
                return
            if picture_id not in known:
                image = decode_image(data, max_pixels=limits.max_pixels)
                yield Picture(
                    picture_id,
                    f"{IMAGES}/{picture_id}.{extension}",
                    data,
                    describer.image_transform(image),
                    _meta(raw),
                )
            seen.add(picture_id)
            tally.add(1, ())
        except BadSampleError as error:
            on_fault(Fault(error.cause, raw.where))


def _raw_samples(
    source: Any, on_fault: Callable[[Fault], None], limits: LoaderConfig
) -> Iterator[RawSample]:
    for shard in open_sources([resolve_source(source)])[0].shards:
        try:
            stream = open_shard(shard)
        except OSError as error:
            raise UserError(f"shard {shard} cannot be read: {error}") from error
        with stream:
            yield from read_samples(
                stream, shard, on_fault, max_member_bytes=limits.max_member_mb << 20
            )


def _identify(raw: RawSample) -> tuple[str, str, bytes]:
    """Name, extension and bytes of a sample's picture; its key is no name: anyone wrote it."""
    for extension in IMAGE_EXTENSIONS:
        if data := raw.members.get(extension):
            return hashlib.sha256(data).hexdigest()[:16], extension, data
    raise BadSampleError(Cause.NO_IMAGE)


def _meta(raw: RawSample) -> dict[str, Any]:
    """What the sample says besides its picture; no caption is needed here."""
    meta: Any = {}
    if "json" in raw.members:
        try:
            meta = json.loads(raw.members["json"])
        except (ValueError, RecursionError) as error:
            raise BadSampleError(Cause.BAD_JSON, str(error)) from error
        if not isinstance(meta, dict):
            raise BadSampleError(Cause.BAD_JSON, f"holds a {type(meta).__name__}, not an object")
    if "txt" in raw.members and not meta.get("captions"):
        meta["captions"] = [raw.members["txt"].decode("utf-8", "replace").strip()]
    return {"key": raw.key, **meta}


def _batches(pictures: Iterator[Picture], config: GenerateConfig) -> Iterator[list[Picture]]:
    batch: list[Picture] = []
    for picture in pictures:
        batch.append(picture)
        if len(batch) == config.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _store(path: Path, data: bytes) -> None:
    if not path.exists():
        write_atomically(path, lambda file: file.write(data), "free space, then call it again")
