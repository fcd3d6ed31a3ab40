"""Which things are in the pictures of a set, by the json of its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentmodal.experiments.data.module import EmojiSourceConfig


def objects_in(meta: Mapping[str, Any]) -> list[str]:
    """The names in a sample's ``objects``, a list of names or of ``{name, …}``."""
    listed = meta.get("objects", [])
    return [thing if isinstance(thing, str) else str(thing["name"]) for thing in listed]


def known_names(source: Any, objects: Sequence[Sequence[str]]) -> list[str]:
    """All names of the data set: a wrong one is seen even where no picture of the split has it.

    Of the embedded scenes these are the things of every split; of other sources the names that
    occur in the one given.

    Args:
        source: the source of a task.
        objects: the names in each of its pictures.
    """
    names = {name for own in objects for name in own}
    if isinstance(source, EmojiSourceConfig):
        meta = source.data().meta
        listed = (*meta["things"], *meta["unseen_things"])
        names.update(thing["name"] for thing in listed)
    return sorted(names)
