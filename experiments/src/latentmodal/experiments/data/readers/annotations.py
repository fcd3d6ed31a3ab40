"""Annotation files as readers see them: JSON whose every missing or odd value has an address."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentmodal.experiments.errors import UserError


@dataclass(frozen=True, slots=True)
class Entry:
    """A JSON object, and where it stands (``captions.json: images[3]``) for messages.

    Every method raises `UserError` for a key that is missing or holds something else.
    """

    value: dict[str, Any]
    where: str

    def __contains__(self, key: str) -> bool:
        return self.value.get(key) is not None

    def text(self, key: str) -> str:
        """A string."""
        return self._typed(key, str, "a string")

    def label(self, key: str) -> str:
        """A number or a string that names something, as a string."""
        return str(self.name(key))

    def name(self, key: str) -> int | str:
        """A number or a string that names something, as it is."""
        return self._typed(key, (int, str), "a number or a string")

    def texts(self, key: str) -> tuple[str, ...]:
        """A string or a list of them, without the blank ones."""
        found = self._typed(key, (str, list), "a string or a list of strings")
        listed = [found] if isinstance(found, str) else found
        if not all(isinstance(text, str) for text in listed):
            raise UserError(f"{self.where}: '{key}' must hold strings only")
        return tuple(text for text in listed if text.strip())

    def entry(self, key: str) -> Entry:
        """An object."""
        return Entry(self._typed(key, dict, "an object"), self._place(key))

    def entries(self, key: str) -> Iterator[Entry]:
        """The objects of a list."""
        return _objects(self._typed(key, list, "a list"), self._place(key))

    def items(self) -> Iterator[tuple[str, Entry]]:
        """Its values, all of them objects, by key."""
        for key, value in self.value.items():
            yield key, _object(value, self._place(key))

    def _place(self, key: str) -> str:
        joint = "." if ": " in self.where else ": "
        return f"{self.where}{joint}{key}"

    def _typed(self, key: str, kinds: type | tuple[type, ...], meaning: str) -> Any:
        if key not in self.value:
            raise UserError(f"{self.where} has no key '{key}'")
        value = self.value[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UserError(f"{self.where}: '{key}' is {_shown(value)}, not {meaning}")
        return value


@dataclass(frozen=True)
class Document:
    """A parsed annotation file: JSON, or a list as JSON lines whatever the file is called.

    The pictures stream; the annotations of all of them are held.
    """

    path: Path
    content: Any

    @classmethod
    def load(cls, path: Path) -> Document:
        """Raises `UserError` when the file cannot be read or is not JSON."""
        try:
            data = path.read_bytes()
            try:
                return cls(path, json.loads(data))
            except ValueError:
                if (lines := _json_lines(data)) is None:
                    raise
                return cls(path, lines)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON: {error}") from error

    def entry(self) -> Entry:
        """The object the file holds."""
        return _object(self.content, self.path.name)

    def entries(self) -> Iterator[Entry]:
        """The objects of the list the file holds."""
        if not isinstance(self.content, list):
            raise UserError(f"{self.path.name} holds {_shown(self.content)}, not a list")
        return _objects(self.content, f"{self.path.name}: entry")

    def first(self, key: str | None = None) -> dict[str, Any]:
        """The first object of the list the file holds (under `key`), ``{}`` where there is none.

        For telling layouts apart, so it never raises.
        """
        listed = self.content
        if key is not None:
            listed = listed.get(key) if isinstance(listed, dict) else None
        if isinstance(listed, list) and listed and isinstance(listed[0], dict):
            return listed[0]
        return {}


def _json_lines(data: bytes) -> list[Any] | None:
    """The values of a file of JSON lines; None where its first line is no value of its own.

    Raises:
        ValueError: a later line is none.
    """
    values: list[Any] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if not values:
                return None
            raise ValueError(f"line {number}: {error}") from error
    return values


def _objects(listed: list[Any], where: str) -> Iterator[Entry]:
    for number, value in enumerate(listed):
        yield _object(value, f"{where}[{number}]")


def _object(value: Any, where: str) -> Entry:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {_shown(value)}, not an object")
    return Entry(value, where)


def _shown(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__}"
    return repr(value)[:60]
