"""Filling a cache of frozen features: every picture of a recipe's training sources once.

Shapes: B pictures, R samples, V views, N tokens, D width.
"""

from __future__ import annotations

import fcntl
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from latentmodal.experiments.data.config import LoaderConfig
from latentmodal.experiments.data.eval_stream import count_keys
from latentmodal.experiments.data.features.key import shard_identity
from latentmodal.experiments.data.features.pictures import (
    Part,
    Pictures,
    PictureStream,
    picture_loader,
)
from latentmodal.experiments.data.features.store import DTYPES, FeatureStore, Manifest
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.feature_cache.opening import (
    augments,
    feature_key,
    frozen_stages,
    training_shards,
)
from latentmodal.experiments.schema import Recipe
from latentmodal.experiments.systems.frozen_prefix import probe, run_prefix, same_features
from latentmodal.experiments.training.fit import build_system
from latentmodal.experiments.training.run_folder import RunFolder

log = logging.getLogger(__name__)

_CHUNK_BYTES = 256 << 20
"""About the most features held in memory before they are written."""
UPTO = ("frozen", "encoder")


def cache_features(
    recipe: Recipe,
    *,
    views: int | None = None,
    dtype: str = "bfloat16",
    folder: Path | None = None,
    upto: str = "frozen",
    console: Console,
) -> Path:
    """Encode the pictures of every training source of `recipe` once, and keep what comes out.

    What is there already is left alone, so that the same command goes on after it was stopped.

    Args:
        views: augmented versions of each picture; None where the recipe does not augment.
        dtype: of the numbers on disk, one of `DTYPES`.
        folder: where to write; None is where training looks with `data.features: auto`.
        upto: "frozen" runs through all frozen parts of the bridge, "encoder" stops before it.

    Returns:
        The folder.

    Raises:
        UserError: nothing to cache, no space, a folder with other features, …
    """
    for name, value, allowed in (("dtype", dtype, tuple(DTYPES)), ("upto", upto, UPTO)):
        if value not in allowed:
            raise UserError(f"--{name} {value}: choose from {', '.join(allowed)}")
    if views is None and augments(recipe.data.augment):
        raise UserError(
            "data.augment shows another part of a picture on each visit: give --views K to keep K "
            "of them, or data.augment.scale=[1,1] data.augment.flip=false"
        )
    pl.seed_everything(recipe.seed, workers=True, verbose=False)  # random weights as fit draws them
    with tempfile.TemporaryDirectory() as scratch:
        system = build_system(recipe, RunFolder(Path(scratch)))
    stages = frozen_stages(system.model)
    stages = stages[:1] if upto == "encoder" else stages
    probe_ND = probe(stages)
    key = feature_key(recipe, stages, probe_ND)
    folder = key.default_folder if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    with _one_writer(folder):
        manifest = Manifest(key=key, views=views or 1, dtype=dtype)
        store = FeatureStore.create(folder, manifest, probe_ND)
        if not same_features(stages, probe_ND, store.probe_ND):
            raise UserError(
                f"{folder}: the same weights gave other features when it was made, by an "
                "activation or a stride; give another --folder"
            )
        parts = _missing(store, training_shards(recipe))
        if parts:
            samples = _reserve(store, parts)
            _fill(store, parts, samples, system, recipe, stages, console)
        else:
            log.info("%s: holds every sample already", store.folder)
    return folder


def _missing(store: FeatureStore, shards: Sequence[str]) -> list[Part]:
    """Shards that are not in the store to their end, and where they go on; equal ones once."""
    parts: dict[str, Part] = {}
    for shard in shards:
        identity = shard_identity(shard)
        chunks = store.chunks(identity)
        if not chunks or not chunks[-1].complete:
            parts[identity] = Part(shard, identity, chunks[-1].stop if chunks else 0)
    return list(parts.values())


def _reserve(store: FeatureStore, parts: Sequence[Part]) -> int:
    """How many samples are to come; says what they need and refuses where the disk lacks it."""
    samples = count_keys([part.address for part in parts]) - sum(part.first for part in parts)
    need = samples * store.manifest.sample_bytes
    free = shutil.disk_usage(store.folder).free
    log.info(
        "%s: %d samples to encode, %s on disk (%s are free)",
        *(store.folder, samples, _size(need), _size(free)),
    )
    if need > free:
        raise UserError(
            f"{store.folder}: needs {_size(need)} of disk and {_size(free)} are free; "
            "free space, choose another --folder, or a smaller --dtype or --views"
        )
    return samples


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """A second process stops at once; the system lets go of the lock when a writer is killed."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder}: another process writes here; wait for it to end") from error
        yield


def _fill(
    store: FeatureStore,
    parts: Sequence[Part],
    samples: int,
    system: Any,
    recipe: Recipe,
    stages: Sequence[nn.Module],
    console: Console,
) -> None:
    config: LoaderConfig = recipe.data.loader
    use_gpu = recipe.trainer.accelerator != "cpu" and torch.cuda.is_available()
    device = "cuda" if use_gpu else "cpu"
    encode = _Encode(stages, device, recipe.trainer.precision, config.batch_size)
    transform = system.image_transform(recipe.data.augment)
    stream = PictureStream(parts, transform, config, store.manifest.views)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("encoding", total=samples)
        writer: _ShardWriter | None = None
        done = 0
        for pictures in picture_loader(stream, config.workers):
            part = parts[pictures.part]
            if writer is None or writer.part is not part:
                if writer is not None:
                    writer.close()
                writer = _ShardWriter(store, part)
            writer.add(pictures, encode)
            tenths = done * 10 // max(1, samples)
            done += len(pictures.ordinals) + len(pictures.faults)
            progress.update(task, completed=done)
            if not console.is_terminal and done * 10 // max(1, samples) > tenths:
                log.info("%d of %d samples", done, samples)
        if writer is not None:
            writer.close()


@dataclass
class _Encode:
    """Pixels to features, on the device and in the precision of the recipe."""

    stages: Sequence[nn.Module]
    device: str
    precision: str
    batch_size: int

    def __post_init__(self) -> None:
        for stage in self.stages:
            stage.eval().to(self.device)

    @torch.no_grad()
    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        """Features (B, N, D), on the device."""
        fast = self.precision == "bf16"
        with torch.autocast(self.device, torch.bfloat16) if fast else nullcontext():
            batches = pixels_BCHW.split(self.batch_size)  # with views there are several
            return torch.cat([run_prefix(self.stages, p.to(self.device)) for p in batches])


class _ShardWriter:
    """Gathers the features of one shard and writes them in files of bounded size."""

    def __init__(self, store: FeatureStore, part: Part) -> None:
        self.part = part
        self._store = store
        self._number = len(store.chunks(part.identity))
        self._limit = max(1, _CHUNK_BYTES // store.manifest.sample_bytes)
        self._begin(part.first)

    def _begin(self, first: int) -> None:
        self._first = self._stop = first
        self._features: list[Tensor] = []
        self._ordinals: list[int] = []
        self._faults: dict[int, str] = {}

    def add(self, pictures: Pictures, encode: _Encode) -> None:
        """Encodes some more samples; writes a file when enough have gathered.

        Raises:
            UserError: a feature is not finite in the dtype of the cache.
        """
        manifest = self._store.manifest
        if pictures.ordinals:
            features_BND = encode(pictures.pixels_RCHW).to(DTYPES[manifest.dtype]).cpu()
            if not torch.isfinite(features_BND).all():
                raise UserError(
                    f"{self.part.address}: features of samples {pictures.ordinals[0]} to "
                    f"{pictures.ordinals[-1]} are not finite in {manifest.dtype}; "
                    "give --dtype bfloat16 or float32, or look at the tower's weights"
                )
            self._features.append(features_BND.unflatten(0, (-1, manifest.views)))
            self._ordinals += pictures.ordinals
        self._faults |= pictures.faults
        self._stop = max(self._stop, *(n + 1 for n in (*pictures.ordinals, *pictures.faults)), 0)
        if len(self._ordinals) >= self._limit:
            self._write(complete=False)

    def close(self) -> None:
        """Writes what is left; the shard is complete."""
        self._write(complete=True)

    def _write(self, complete: bool) -> None:
        key, views = self._store.manifest.key, self._store.manifest.views
        empty = torch.empty(0, views, key.num_tokens, key.width).to(
            DTYPES[self._store.manifest.dtype]
        )
        self._store.write(
            self.part.identity,
            self._number,
            features_RVND=torch.cat([empty, *self._features]),
            ordinals=self._ordinals,
            faults=self._faults,
            span=(self._first, self._stop),
            complete=complete,
            address=self.part.address,
        )
        self._number += 1
        self._begin(self._stop)
