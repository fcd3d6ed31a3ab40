"""Draw a planned data set once and keep it as WebDataset shards.

::

    {root}/{preset}-{fingerprint}/
        train/00000.tar …          {key}.png, {key}.txt (the first caption), {key}.json
        seen/ unseen_pairs/ style_seen/ unseen_style/ unseen_things/ arrangements/
        captions.txt               every distinct training caption, one a line
        meta.json                  things, held-out pairs, counts, templates, versions
        ATTRIBUTION.md             whose drawings these are, and on which terms

Every sample has its own random stream, named by seed, split and index, and every shard is
written whole by one process: the bytes do not depend on how many processes there are. A folder
appears under its name only when complete; a file lock lets one builder in at a time.
"""

import fcntl
import io
import json
import logging
import os
import random
import shutil
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

from PIL import Image
from rich.console import Console
from rich.progress import Progress

from latentmodal.experiments.data.emoji.attribution import ATTRIBUTION
from latentmodal.experiments.data.emoji.concepts import Thing
from latentmodal.experiments.data.emoji.config import (
    DATA_VERSION,
    EmojiConfig,
    EmojiPreset,
    source_versions,
)
from latentmodal.experiments.data.emoji.drawings import Sprites
from latentmodal.experiments.data.emoji.grammar import noun_phrase
from latentmodal.experiments.data.emoji.language import TEMPLATES, annotate
from latentmodal.experiments.data.emoji.palette import BACKGROUNDS
from latentmodal.experiments.data.emoji.scenes import compose, render
from latentmodal.experiments.data.emoji.splits import DatasetPlan, plan_dataset

logger = logging.getLogger(__name__)

_MANY: Final = 2_000  # scenes, from which on starting processes pays
_MAX_WORKERS: Final = 8


@dataclass(frozen=True)
class EmojiData:
    """A built data set: its folder, the shards of each split in order, and ``meta.json``."""

    folder: Path
    splits: dict[str, list[str]]
    meta: dict[str, Any]


@dataclass(frozen=True)
class _Job:
    """One shard: samples ``start`` to ``stop`` of a split."""

    split: str
    number: int
    start: int
    stop: int


def ensure_emoji(config: EmojiConfig, progress: bool = True) -> EmojiData:
    """The data set of ``config``, built now unless a complete one is there.

    ``progress`` shows a bar on stderr when that is a terminal. Raises ``UserError`` naming the
    pip package when a source is not installed.
    """
    folder = config.folder
    if not _is_complete(folder, config.fingerprint):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _one_builder(folder):
            if not _is_complete(folder, config.fingerprint):
                _build(config, folder, _default_workers(config.settings), progress)
    return open_emoji(folder)


def build_emoji(
    root: str | Path,
    preset: str = "default",
    seed: int = 0,
    *,
    workers: int | None = None,
    progress: bool = False,
) -> EmojiData:
    """Build (or find) a data set under ``root`` with an explicit number of processes."""
    config = EmojiConfig(preset=preset, seed=seed, root=Path(root))
    folder = config.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _one_builder(folder):
        if not _is_complete(folder, config.fingerprint):
            _build(config, folder, workers or _default_workers(config.settings), progress)
    return open_emoji(folder)


def open_emoji(folder: Path) -> EmojiData:
    """Read a complete data set's ``meta.json`` and list its shards."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    splits = {
        split: [str(path) for path in sorted((folder / split).glob("*.tar"))]
        for split in meta["counts"]
    }
    return EmojiData(folder=folder, splits=splits, meta=meta)


def emoji_captions(folder: str | Path) -> Iterator[str]:
    """Every distinct training caption, for a tokenizer to learn its words from."""
    with (Path(folder) / "captions.txt").open(encoding="utf-8") as lines:
        for line in lines:
            yield line.rstrip("\n")


def _is_complete(folder: Path, fingerprint: str) -> bool:
    # meta.json is written last, before the folder gets its name.
    meta = folder / "meta.json"
    if not meta.is_file():
        return False
    return bool(json.loads(meta.read_text(encoding="utf-8")).get("fingerprint") == fingerprint)


@contextmanager
def _one_builder(folder: Path) -> Iterator[None]:
    """Others wait; the system lets go of the lock when a builder is killed."""
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _default_workers(settings: EmojiPreset) -> int:
    if settings.train_scenes < _MANY:
        return 1
    if hasattr(os, "sched_getaffinity"):  # Linux: respects containers and taskset
        return min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
    return min(_MAX_WORKERS, os.cpu_count() or 1)


def _build(config: EmojiConfig, folder: Path, workers: int, progress: bool) -> None:
    """Write everything into a hidden folder beside the final one, then rename it."""
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a builder that was killed
    shutil.rmtree(folder, ignore_errors=True)
    plan = plan_dataset(config.settings, config.seed)
    jobs = _jobs(config.settings, plan)
    for split in plan.splits:
        (partial / split).mkdir(parents=True)
    logger.info("building %s with %d process(es)", folder, workers)
    captions = _write_shards(config, jobs, partial, workers, progress)
    (partial / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    (partial / "ATTRIBUTION.md").write_text(ATTRIBUTION, encoding="utf-8")
    (partial / "meta.json").write_text(
        json.dumps(_meta(config, plan), ensure_ascii=False, indent=1), encoding="utf-8"
    )
    partial.rename(folder)


def _jobs(settings: EmojiPreset, plan: DatasetPlan) -> list[_Job]:
    step = settings.samples_per_shard
    return [
        _Job(split, number, start, min(start + step, len(plans)))
        for split, plans in plan.splits.items()
        for number, start in enumerate(range(0, len(plans), step))
    ]


def _write_shards(
    config: EmojiConfig, jobs: list[_Job], folder: Path, workers: int, progress: bool
) -> list[str]:
    """All shards, in any order of completion; returns the distinct training captions in order."""
    total = sum(job.stop - job.start for job in jobs)
    captions: dict[_Job, list[str]] = {}
    bar = Progress(console=Console(stderr=True), disable=not (progress and sys.stderr.isatty()))
    # A fresh interpreter per process: forking one that has loaded torch may hang.
    pool: Executor | None = None
    if workers > 1:
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    with bar, pool or nullcontext():
        task = bar.add_task("Drawing emoji scenes", total=total)
        if pool is None:
            for job in jobs:
                captions[job] = _write_shard(config, job, folder)
                bar.advance(task, job.stop - job.start)
        else:
            futures = {pool.submit(_write_shard, config, job, folder): job for job in jobs}
            for future in as_completed(futures):
                job = futures[future]
                captions[job] = future.result()
                bar.advance(task, job.stop - job.start)
    ordered = (caption for job in jobs if job.split == "train" for caption in captions[job])
    return list(dict.fromkeys(ordered))


@lru_cache(maxsize=1)
def _planned(config: EmojiConfig) -> tuple[DatasetPlan, Sprites]:
    """Per process: the whole plan (cheap) and the drawings rendered so far."""
    return plan_dataset(config.settings, config.seed), Sprites(config.settings.image_size)


def _write_shard(config: EmojiConfig, job: _Job, folder: Path) -> list[str]:
    """Draw and write one shard; returns its captions."""
    plan, sprites = _planned(config)
    captions: list[str] = []
    path = folder / job.split / f"{job.number:05d}.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(job.start, job.stop):
            key = f"{job.split}-{index:06d}"
            image, facts = _draw_sample(config, plan, sprites, job.split, index)
            captions += facts["captions"]
            text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
            _add(tar, f"{key}.png", _encode(image))
            _add(tar, f"{key}.txt", facts["captions"][0].encode())
            _add(tar, f"{key}.json", text.encode())
    return captions


def _draw_sample(
    config: EmojiConfig, plan: DatasetPlan, sprites: Sprites, split: str, index: int
) -> tuple[Image.Image, dict[str, Any]]:
    rng = random.Random(f"{config.seed}/{split}/{index}")
    planned = plan.splits[split][index]
    scene = compose(planned.things, planned.style, sprites.size, sprites, rng)
    image, picture = render(scene, sprites)
    return image, annotate(picture, plan.known, split, rng)


def _encode(image: Image.Image) -> bytes:
    # Measured at 96 pixels: PNG decodes in 0.12 ms. Lossless WebP needs 0.13 to 0.19 ms and, where
    # it is the faster of these, fifteen times as long to write.
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # time 0 and no owner: the same bytes every time
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _meta(config: EmojiConfig, plan: DatasetPlan) -> dict[str, Any]:
    return {
        "fingerprint": config.fingerprint,
        "data_version": DATA_VERSION,
        "preset": config.preset,
        "seed": config.seed,
        "image_size": config.settings.image_size,
        "counts": {split: len(plans) for split, plans in plan.splits.items()},
        "things": [_describe(thing) for thing in plan.known],
        "unseen_things": [_describe(thing) for thing in plan.unseen],
        "held_out_pairs": plan.reserved,
        "backgrounds": BACKGROUNDS,
        "templates": TEMPLATES,
        "versions": source_versions(),
        "licence": "CC-BY-SA-4.0 when shared; see ATTRIBUTION.md",
    }


def _describe(thing: Thing) -> dict[str, Any]:
    return {
        "name": thing.name,
        "phrase": noun_phrase(thing.name),
        "code": thing.code,
        "category": thing.category,
        "group": thing.group,
        "kind": thing.kind,
        "aliases": list(thing.aliases),
    }
