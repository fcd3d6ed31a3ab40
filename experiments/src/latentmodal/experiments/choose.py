"""Choosing a component by its exact name: the mechanism behind every `name:` key of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

Table = Mapping[str, type]


def choice(table: Table, **kwargs: Any) -> Any:
    """A dataclass field holding one component of `table`, chosen in YAML by its `name`."""
    return dataclasses.field(metadata={"table": table}, **kwargs)


def choices(table: Table, *, keyed: bool, **kwargs: Any) -> Any:
    """A dataclass field holding several components: a mapping (`keyed`) or a list of them."""
    return dataclasses.field(
        metadata={"table": table, "many": "map" if keyed else "list"}, **kwargs
    )


def nearest(name: str, known: list[str]) -> str:
    """A hint naming the nearest known name, and all of them when none is near."""
    match = get_close_matches(name, known, n=1, cutoff=0.6)
    if match:
        return f"did you mean '{match[0]}'?"
    return f"choose from {', '.join(sorted(known))}"


def pick(table: Table, name: Any, key: str) -> type:
    """The config class called `name`.

    Raises:
        ValueError: no such name; the message lists the nearest or all names.
    """
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{key}: unknown name '{name}'; {nearest(str(name), list(table))}")
    return table[name]


def name_in(table: Table, config: object) -> str:
    """The name under which `config`'s class stands in `table`."""
    return next(name for name, cls in table.items() if cls is type(config))
