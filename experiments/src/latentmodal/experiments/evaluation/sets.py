"""An evaluation set as one system sees it: read in shares by the ranks, computed when asked for.

Shapes: N samples, B batch, V embeddings of a picture, E embedding width, L feature tokens, D their
width, C H W pixels, R rows.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from latentmodal.bridges.distributed import rank
from latentmodal.experiments.data.collate import Batch
from latentmodal.experiments.data.config import LoaderConfig
from latentmodal.experiments.data.loader import EvalLoader, gather_objects
from latentmodal.experiments.data.module import resolve_source
from latentmodal.experiments.errors import UserError

MAX_SHOWN = 512
"""Pictures kept of an evaluation set for the views; metrics need embeddings only."""

T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """What the set itself holds, in order."""

    pixels: list[Tensor]
    """uint8 CHW, of the first `MAX_SHOWN` samples."""
    captions: list[list[str]]
    meta: list[dict[str, Any]]


class FeatureFile:
    """Features of pictures in an unnamed temporary file, mapped into memory once it is read.

    Those of a whole set do not fit into memory: BLIP-2's of COCO's test set take 19 GB. The file
    lies where ``TMPDIR`` says and is gone with this object, or with the process.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the object
        self._shape: tuple[int, ...] = ()
        self._dtype = torch.float32
        self._count = 0

    def add(self, features_BLD: Tensor) -> int:
        """Append rows; the place of the first.

        Raises:
            UserError: the disk is full.
        """
        assert not self._count or self._shape == features_BLD.shape[1:]
        self._shape, self._dtype = tuple(features_BLD.shape[1:]), features_BLD.dtype
        data = features_BLD.detach().cpu().contiguous().view(torch.uint8).numpy().data
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"picture features could not be written to {tempfile.gettempdir()} "
                f"({error.strerror}): set TMPDIR to a disk with more room"
            ) from error
        first, self._count = self._count, self._count + len(features_BLD)
        return first

    def rows(self, places_R: Tensor) -> Tensor:
        """The features (R, L, D) at these places; call it after the last `add`."""
        return self._mapped.index_select(0, places_R)

    @cached_property
    def _mapped(self) -> Tensor:
        # Shared: a private mapping that may be written to would count as memory of its own, and
        # be refused where it is larger than the machine's.
        mapped = mmap.mmap(self._file.fileno(), 0)
        count = self._count * prod(self._shape)
        return torch.frombuffer(mapped, dtype=self._dtype, count=count).view(-1, *self._shape)


@dataclass(frozen=True)
class HeldFeatures:
    """The features of this rank's share of the pictures."""

    file: FeatureFile
    place_N: Tensor
    """int64, the place of each picture of the set in `file`; -1 where another rank holds it."""


class EvaluationSet:
    """One source and one system, shared by every task that reads the source.

    Nothing is computed before a task asks. Whatever reads pictures is a collective operation: every
    rank asks for it, and gets the results of the whole set.

    Args:
        system: reads pictures.
        source: a source of a recipe.
        loader: how many pictures at once, and workers.
        keep_features: whether the pass that embeds the pictures keeps their features too.
    """

    def __init__(
        self, system: Any, source: Any, loader: LoaderConfig, *, keep_features: bool = False
    ) -> None:
        self.system = system
        self.batch_size = loader.batch_size
        self.is_embedded = False
        self._loader_config = loader
        self._source = source
        self._keep_features = keep_features
        self._samples: Samples | None = None

    @property
    def device(self) -> torch.device:
        """Where the system's pictures go."""
        device: torch.device = self.system.device
        return device

    @property
    def samples(self) -> Samples:
        """Captions, json and first pictures; a by-product of the first pass, whatever asked it."""
        if self._samples is None:
            self.each(lambda batch: batch.keys)
        assert self._samples is not None
        return self._samples

    def each(self, read: Callable[[Batch], Sequence[T]]) -> list[T]:
        """One result for every sample, in order.

        Args:
            read: a batch of this rank's share, on the CPU, to one result per row. Every rank calls
                it equally often; results travel between ranks, so they own what they hold.
        """
        mine: dict[int, T] = {}
        kept: dict[int, tuple[Tensor | None, list[str], dict[str, Any]]] = {}
        for batch in self._loader:
            results = read(batch)
            for row, index in enumerate(batch.index_B.tolist()):
                mine[index] = results[row]
                if self._samples is None:
                    # A clone: a view would travel between ranks with the whole batch.
                    pixels = batch.pixels_BCHW[row].clone() if index < MAX_SHOWN else None
                    kept[index] = (pixels, batch.all_captions[row], batch.meta[row])
        if self._samples is None:
            rows = _in_order(kept)
            self._samples = Samples(
                pixels=[pixels for pixels, *_ in rows[:MAX_SHOWN] if pixels is not None],
                captions=[captions for _, captions, _ in rows],
                meta=[meta for *_, meta in rows],
            )
        return _in_order(mine)

    @property
    def image_NE(self) -> Tensor:
        """Embeddings (N, E) of all pictures, or (N, V, E), on the CPU.

        Raises:
            UserError: the system has no space that pictures and captions share.
        """
        require_similarity(self.system)
        image_NE = self._embedded[0]
        assert image_NE is not None
        return image_NE

    @property
    def features(self) -> HeldFeatures:
        """What the system's pair scores take; see `pair_score`."""
        held = self._embedded[1]
        assert held is not None, "the task did not say that it reads features"
        return held

    @cached_property
    def _embedded(self) -> tuple[Tensor | None, HeldFeatures | None]:
        """One pass over the pictures for both, so that none is encoded twice."""
        file = FeatureFile() if self._keep_features else None

        def read(batch: Batch) -> list[tuple[Tensor | None, int, int]]:
            pixels_BCHW, first = batch.pixels_BCHW.to(self.device), 0
            if file is None:
                image_BE = self.system.embed_images(pixels_BCHW)
            else:
                features_BLD, image_BE = self.system.read_images(pixels_BCHW)
                first = file.add(features_BLD)
            rows = [None] * len(batch) if image_BE is None else image_BE.cpu()
            return [
                (None if row is None else row.clone(), rank(), first + number)
                for number, row in enumerate(rows)
            ]

        rows = self.each(read)
        self.is_embedded = True
        embeddings = [row for row, *_ in rows if row is not None]
        image_NE = torch.stack(embeddings) if embeddings else None
        if file is None:
            return image_NE, None
        places = [place if owner == rank() else -1 for _, owner, place in rows]
        return image_NE, HeldFeatures(file, torch.tensor(places))

    @cached_property
    def _loader(self) -> EvalLoader:
        transform = self.system.model.image_encoder.preprocess.eval()
        source = resolve_source(self._source)
        return EvalLoader([source], self._loader_config, image_transform=transform)


def has_similarity(system: Any) -> bool:
    """Whether the system has one space for pictures and captions."""
    head = getattr(system.model, "head", None)
    return hasattr(system, "embed_images") and getattr(head, "image_proj", None) is not None


def require_similarity(system: Any) -> None:
    """Raise `UserError` unless `has_similarity`."""
    if not has_similarity(system):
        raise UserError(
            "retrieval, naming and similarity need a system that embeds pictures and captions "
            "(system.name=contrastive, or alignment with system.objectives.itc above 0)"
        )


def _in_order(mine: dict[int, T]) -> list[T]:
    """The rows of all ranks by their number; padding repeats a number, and is dropped here."""
    everyone: dict[int, T] = {}
    for part in gather_objects(mine):
        everyone.update(part)
    return [everyone[index] for index in sorted(everyone)]
