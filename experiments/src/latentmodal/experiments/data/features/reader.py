"""Features of a sample by its place in its shard.

Shapes: R samples, V views, N tokens, D width.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from latentmodal.experiments.data.faults import BadSampleError, Cause
from latentmodal.experiments.data.features.key import shard_identity
from latentmodal.experiments.data.features.store import (
    Chunk,
    FeatureStore,
    chunk_facts,
    open_chunk,
)
from latentmodal.experiments.data.seeding import derive_uniform
from latentmodal.experiments.errors import UserError

_MAX_OPEN = 64


class _Open(NamedTuple):
    """A memory-mapped chunk."""

    features_RVND: Any
    ordinals_R: np.ndarray
    faults: Mapping[str, str]


class FeatureReader:
    """Reads any sample of the shards it was made for; cheap to send to worker processes."""

    def __init__(self, shards: Mapping[str, Sequence[Chunk]], views: int) -> None:
        self._shards = dict(shards)
        self._views = views
        self._open: dict[Path, _Open] = {}

    @classmethod
    def of_shards(cls, store: FeatureStore, shards: Sequence[str]) -> FeatureReader:
        """A reader of all samples of ``shards``.

        Raises:
            UserError: a shard is not in the store, or not to its end.
        """
        found: dict[str, list[Chunk]] = {}
        for shard in shards:
            chunks = store.chunks(shard_identity(shard))
            if not chunks or not chunks[-1].complete:
                what = "changed or was never cached" if not chunks else "is cached in part only"
                raise UserError(
                    f"data.features: {store.folder}: source shard {shard} {what}; "
                    "run latentmodal cache with this recipe and overrides"
                )
            found[shard] = chunks
        return cls(found, store.manifest.views)

    def read(self, shard: str, ordinal: int, seed: int) -> Tensor:
        """Features (N, D) of one sample; ``seed`` names the visit and draws the view.

        Raises:
            BadSampleError: its picture could not be decoded when the cache was made.
        """
        chunks = self._shards[shard]
        at = bisect.bisect_right(chunks, ordinal, key=lambda chunk: chunk.first) - 1
        chunk = self._opened(chunks[at].path)
        row = int(np.searchsorted(chunk.ordinals_R, ordinal))
        if row == len(chunk.ordinals_R) or chunk.ordinals_R[row] != ordinal:
            if cause := chunk.faults.get(str(ordinal)):
                raise BadSampleError(Cause(cause))
            raise UserError(
                f"{chunks[at].path}: lacks sample {ordinal} of {shard}; "
                "remove it and run latentmodal cache again"
            )
        view = int(derive_uniform(seed, "view") * self._views) if self._views > 1 else 0
        rows: Tensor = chunk.features_RVND[row : row + 1, view : view + 1]
        return rows[0, 0]

    def _opened(self, path: Path) -> _Open:
        if path not in self._open:
            if len(self._open) >= _MAX_OPEN:
                del self._open[next(iter(self._open))]
            file = open_chunk(path)
            self._open[path] = _Open(
                file.get_slice("features"),
                file.get_tensor("ordinals").numpy(),
                chunk_facts(path, file)["faults"],
            )
        return self._open[path]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a mapping of memory stays in its process
