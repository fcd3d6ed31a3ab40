"""Writes shards that this package, webdataset and img2dataset users read alike."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from webdataset import TarWriter


def write_shards(
    samples: Iterable[dict[str, bytes | str | dict[str, Any]]],
    folder: Path,
    samples_per_shard: int = 1000,
) -> list[Path]:
    """Writes ``00000.tar``, ``00001.tar`` … into ``folder`` and returns their paths.

    A sample is ``{"__key__": label, extension: content, …}``; text is written as UTF-8, a dict as
    JSON. The same samples give the same bytes: no clock, user or dictionary order goes in. A shard
    appears under its name only when it is whole.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard={samples_per_shard} must be at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    remaining = iter(samples)
    written: list[Path] = []
    while chunk := list(itertools.islice(remaining, samples_per_shard)):
        path = folder / f"{len(written):05d}.tar"
        partial = path.with_suffix(".tar.part")
        with (
            partial.open("wb") as file,
            TarWriter(file, encoder=False, user="", group="", mtime=0) as tar,
        ):
            for sample in chunk:
                tar.write(_encoded(sample))
        partial.rename(path)
        written.append(path)
    return written


def _encoded(sample: dict[str, bytes | str | dict[str, Any]]) -> dict[str, bytes | str]:
    encoded: dict[str, bytes | str] = {}
    for name, value in sample.items():
        if isinstance(value, dict):
            value = json.dumps(value, ensure_ascii=False, sort_keys=True)
        if isinstance(value, str) and name != "__key__":
            value = value.encode("utf-8")
        encoded[name] = value
    return encoded
