"""A cache of frozen features as training reads it, checked against the model it stands in for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latentmodal.experiments.data.augment import AugmentConfig
from latentmodal.experiments.data.features.key import FeatureKey
from latentmodal.experiments.data.features.reader import FeatureReader
from latentmodal.experiments.data.features.store import FeatureStore
from latentmodal.experiments.data.loader import open_sources
from latentmodal.experiments.data.module import resolve_source
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.schema import Recipe
from latentmodal.experiments.systems.frozen_prefix import (
    frozen_prefix,
    prefix_digest,
    probe,
    same_features,
)


def open_features(recipe: Recipe, system: Any) -> FeatureReader | None:
    """What the loader reads in place of pictures; None where the recipe wants pixels.

    The model is told how deep the features are, as `cached_parts`.

    Raises:
        UserError: no such cache, one of other weights or preprocessing, or one that lacks shards.
    """
    if recipe.data.features is None:
        return None
    stages = frozen_stages(system.model)
    if recipe.data.features == "auto":
        store = _find(recipe, stages)
    else:
        store = FeatureStore(Path(recipe.data.features).expanduser())
    key = store.manifest.key
    stages = stages[: key.depth + 1]
    probe_ND = probe(stages)
    changes = key.changes(feature_key(recipe, stages, probe_ND))
    if not changes and not same_features(stages, probe_ND, store.probe_ND):
        changes = ["the same weights give other features, by an activation or a stride"]
    if changes:
        raise UserError(
            f"data.features: {store.folder} was made for something else: {'; '.join(changes)}; "
            "make another with latentmodal cache, this recipe and overrides"
        )
    if recipe.trainer.parallelism == "fsdp" and key.depth > 0:
        raise UserError(
            "data.features: fsdp shards a bridge as a whole, but these features enter behind its "
            "frozen part; make a cache with --upto encoder"
        )
    system.model.cached_parts = key.depth
    return FeatureReader.of_shards(store, training_shards(recipe))


def frozen_stages(model: nn.Module) -> list[nn.Module]:
    """`frozen_prefix`, which must not be empty.

    Raises:
        UserError: the system reads pictures only, or its image tower trains.
    """
    if not hasattr(model, "stages"):
        raise UserError("data.features: this system reads pictures only; leave data.features out")
    stages = frozen_prefix(model)
    if not stages:
        raise UserError(
            "data.features: the image tower trains, so its features change with every step; "
            "freeze it (freeze: {'image_encoder.*': frozen}) or leave data.features out"
        )
    return stages


def _find(recipe: Recipe, stages: Sequence[nn.Module]) -> FeatureStore:
    """The deepest features there are in a default folder."""
    folders = []
    for depth in range(len(stages), 0, -1):
        folder = feature_key(recipe, stages[:depth], probe(stages[:depth])).default_folder
        if (folder / "manifest.json").is_file():
            return FeatureStore(folder)
        folders.append(folder)
    views = " and --views K" if augments(recipe.data.augment) else ""
    raise UserError(
        f"data.features: no features of this tower and preprocessing in {folders[0]}; "
        f"make them with latentmodal cache, this recipe and overrides{views}"
    )


def feature_key(recipe: Recipe, stages: Sequence[nn.Module], probe_ND: Tensor) -> FeatureKey:
    """What decides the features of `recipe` after `stages`, whose `probe` gives their shape."""
    loader, augment = recipe.data.loader, recipe.data.augment
    encoder: Any = stages[0]
    preprocessing = {
        **_plain(dataclasses.asdict(encoder.preprocess)),
        "scale": list(augment.scale),
        "flip": augment.flip,
        "draft_side": loader.draft_side,
        "max_pixels": loader.max_pixels,
        "max_member_mb": loader.max_member_mb,
    }
    return FeatureKey(
        weights=prefix_digest(stages),
        depth=len(stages) - 1,
        num_tokens=probe_ND.shape[0],
        width=probe_ND.shape[1],
        precision=recipe.trainer.precision,
        preprocessing=preprocessing,
    )


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}


def training_shards(recipe: Recipe) -> list[str]:
    """Every shard of the training sources once."""
    sources = open_sources([resolve_source(source) for source in recipe.data.train])
    return list(dict.fromkeys(shard for source in sources for shard in source.shards))


def augments(augment: AugmentConfig) -> bool:
    """Whether pictures look different on each visit."""
    return tuple(augment.scale) != (1.0, 1.0) or augment.flip
