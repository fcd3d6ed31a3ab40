"""Fingerprints of frozen weights, which stand in checkpoints in place of the weights themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_POSITIONS = ("pos_embed", "position_embedding.weight", "position_embeddings")


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names and values of all frozen parameters; the empty string when none is."""
    frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
    if not frozen or frozen[0][1].is_meta:
        return ""
    digest = hashlib.sha256()
    for name, parameter in frozen:
        digest.update(name.encode())
        digest.update(_bytes(parameter))
    return digest.hexdigest()


def tower_digests(model: nn.Module) -> dict[str, str]:
    """Shape and digest of every frozen parameter of the image tower, by its name in the tower.

    Empty where there is no such tower, or it has no values (the meta device).
    """
    tower = getattr(model, "image_encoder", None)
    named = [] if tower is None else list(tower.named_parameters())
    return {name: _digest(p) for name, p in named if not (p.requires_grad or p.is_meta)}


def unlike(tower: nn.Module, digests: Mapping[str, str]) -> list[str]:
    """Names of `tower_digests` whose weights `tower` lacks, or has others of.

    Learned positions of another shape are those for another size of pictures, and pass.
    """
    own = dict(tower.named_parameters())
    return [
        name
        for name, expected in digests.items()
        if name not in own or not _alike(name, own[name], expected)
    ]


def _alike(name: str, parameter: Tensor, expected: str) -> bool:
    found = _digest(parameter)
    if name.endswith(_POSITIONS) and found.split(":")[0] != expected.split(":")[0]:
        return True
    return found == expected


def _digest(parameter: Tensor) -> str:
    shape = "x".join(map(str, parameter.shape))
    return f"{shape}:{hashlib.sha256(_bytes(parameter)).hexdigest()}"


def _bytes(parameter: Tensor) -> Any:
    return parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data
