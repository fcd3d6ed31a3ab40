"""A folder of cached features.

::

    manifest.json                  the `FeatureKey`, views and dtype
    probe.safetensors              what the frozen modules made of a test picture
    {shard}-{00000..}.safetensors  features of a run of one shard's samples, in their order

`{shard}` is the shard's identity, so that one folder serves any mix of sources over the same frozen
modules and is added to by the next one. Every file is whole or absent: what is there after a kill
is right, and the shard goes on behind the last file of its own.

Shapes: R samples, V views, N tokens, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from latentmodal.experiments.data.features.key import FeatureKey
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.files import write_atomically, write_text_atomically

FORMAT_VERSION = 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
REMEDY = "free space or choose another --folder, then run the same command again"
_AGAIN = "remove it and run latentmodal cache again"


@dataclass(frozen=True)
class Chunk:
    """One file: the samples of a shard from ordinal ``first`` up to, not including, ``stop``."""

    path: Path
    first: int
    stop: int
    complete: bool
    """Whether the shard ends here."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder says about itself."""

    key: FeatureKey
    views: int
    dtype: str

    @property
    def sample_bytes(self) -> int:
        """Disk space of one sample."""
        numbers = self.views * self.key.num_tokens * self.key.width
        return numbers * DTYPES[self.dtype].itemsize


class FeatureStore:
    """A folder and its manifest; chunks are listed and written here, and read by `FeatureReader`.

    Raises:
        UserError: the folder's manifest cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder / "manifest.json")

    @classmethod
    def create(cls, folder: Path, manifest: Manifest, probe_ND: Tensor) -> FeatureStore:
        """Begins a folder, or goes on with one that was begun alike.

        Raises:
            UserError: the folder holds other features, or cannot be written.
        """
        path = folder / "manifest.json"
        if not path.exists():
            data = save({"features": probe_ND.contiguous()})
            write_atomically(folder / "probe.safetensors", lambda file: file.write(data), REMEDY)
            facts = {"format_version": FORMAT_VERSION, **asdict(manifest)}
            write_text_atomically(path, json.dumps(facts, indent=1) + "\n", REMEDY)
        store = cls(folder)
        changes = store.manifest.key.changes(manifest.key)
        for name in ("views", "dtype"):
            old, new = getattr(store.manifest, name), getattr(manifest, name)
            changes += [f"{name} was {old}, is {new}"] if old != new else []
        if changes:
            raise UserError(
                f"{folder}: holds other features ({'; '.join(changes)}); "
                "remove it or give another --folder"
            )
        return store

    @property
    def probe_ND(self) -> Tensor:
        """What the frozen modules made of the test picture, in float32."""
        return open_chunk(self.folder / "probe.safetensors").get_tensor("features")

    def chunks(self, shard: str) -> list[Chunk]:
        """The files of one shard (by its identity) without a gap, from its first sample on.

        Raises:
            UserError: one of them is damaged.
        """
        found: list[Chunk] = []
        while (path := self._path(shard, len(found))).exists():
            chunk = _describe(path)
            if chunk.first != (found[-1].stop if found else 0):
                break
            found.append(chunk)
            if chunk.complete:
                break
        return found

    def write(
        self,
        shard: str,
        number: int,
        *,
        features_RVND: Tensor,
        ordinals: list[int],
        faults: Mapping[int, str],
        span: tuple[int, int],
        complete: bool,
        address: str,
    ) -> None:
        """Writes file ``number`` of a shard.

        Args:
            ordinals: of the samples in ``features_RVND``, ascending.
            faults: why other samples of the span have no features.
            span: first ordinal, and the one after the last.
            address: where the shard was read, for people.
        """
        facts = {
            "address": address,
            "first": span[0],
            "stop": span[1],
            "complete": complete,
            "faults": faults,
        }
        tensors = {
            "features": features_RVND.contiguous(),
            "ordinals": torch.tensor(ordinals, dtype=torch.int64),
        }
        # As one text: safetensors writes several in an order that differs from time to time.
        data = save(tensors, {"facts": json.dumps(facts)})
        write_atomically(self._path(shard, number), lambda file: file.write(data), REMEDY)

    def _path(self, shard: str, number: int) -> Path:
        return self.folder / f"{shard}-{number:05d}.safetensors"


def open_chunk(path: Path) -> Any:
    """A memory-mapped safetensors file. Raises `UserError` unless it is whole."""
    try:
        return safe_open(path, framework="pt").__enter__()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is no whole file of features ({error}); {_AGAIN}") from error


def chunk_facts(path: Path, file: Any) -> dict[str, Any]:
    """What a chunk says beside its tensors. Raises `UserError` where it says nothing."""
    try:
        facts: dict[str, Any] = json.loads(file.metadata()["facts"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is no file of features; {_AGAIN}") from error
    return facts


def _describe(path: Path) -> Chunk:
    facts = chunk_facts(path, open_chunk(path))
    return Chunk(path, facts["first"], facts["stop"], facts["complete"])


def _read_manifest(path: Path) -> Manifest:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        version = facts.pop("format_version")
        if version == FORMAT_VERSION:
            key = FeatureKey(**facts.pop("key"))
            return Manifest(key=key, **facts)
    except OSError as error:
        raise UserError(
            f"{path.parent}: holds no cached features ({error.strerror}); "
            "make them with latentmodal cache RECIPE"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove its folder") from error
    raise UserError(f"{path}: has format_version {version}; this version reads {FORMAT_VERSION}")
