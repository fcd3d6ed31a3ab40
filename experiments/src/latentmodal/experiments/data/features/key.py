"""What decides a cached feature: the frozen weights, what they read, and which shard it is in."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from latentmodal.experiments.data.addresses import is_local, local_path
from latentmodal.experiments.errors import UserError

_SAMPLED_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class FeatureKey:
    """Two caches of equal keys are one cache; shards are told apart inside of it.

    Attributes:
        weights: digest of the names and values of the frozen modules.
        depth: parts of the bridge that the features have passed; 0 is the encoder's output.
        num_tokens, width: of one picture's features.
        precision: what they were computed in, as `trainer.precision` has it.
        preprocessing: everything between a file's bytes and the pixels that were encoded.
    """

    weights: str
    depth: int
    num_tokens: int
    width: int
    precision: str
    preprocessing: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def default_folder(self) -> Path:
        """``$LATENTMODAL_CACHE/features/FINGERPRINT``, or under ``~/.cache/latentmodal``."""
        cache = Path(os.environ.get("LATENTMODAL_CACHE") or "~/.cache/latentmodal")
        return cache.expanduser() / "features" / self.fingerprint

    def changes(self, now: FeatureKey) -> list[str]:
        """What is different ``now``, in words."""
        changed = []
        for field in fields(self):
            old, new = getattr(self, field.name), getattr(now, field.name)
            if isinstance(old, Mapping):
                names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
                changed += [
                    f"{field.name} {name} was {old.get(name)}, is {new.get(name)}" for name in names
                ]
            elif field.name == "weights" and old != new:
                changed.append("weights")
            elif old != new:
                changed.append(f"{field.name} was {old}, is {new}")
        return changed


def shard_identity(address: str) -> str:
    """Sixteen hexadecimal digits that follow a shard when it is moved, and change when it does.

    Of a local file: its size, and samples of its start, middle and end. Of another: address and
    size, since opening thousands of them would take minutes.

    Raises:
        UserError: there is no such shard.
    """
    digest = hashlib.sha256()
    try:
        if is_local(address):
            path = local_path(address)
            size = path.stat().st_size
            with path.open("rb") as file:
                for start in (0, size // 2, size - _SAMPLED_BYTES):
                    file.seek(max(0, start))
                    digest.update(file.read(_SAMPLED_BYTES))
        else:
            system, place = url_to_fs(address)
            size = system.info(place).get("size")
            digest.update(address.encode())
    except OSError as error:
        raise UserError(f"shard {address} cannot be read: {error}; check urls") from error
    digest.update(str(size).encode())
    return digest.hexdigest()[:16]
