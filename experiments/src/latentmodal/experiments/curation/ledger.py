"""The ledger of a curation: one file of JSON lines, only ever appended to.

Each line is one event: what happened to which picture's text, by whom and when. What holds now is
the fold of all events, so that no step needs a file of its own and a crash loses no line that was
acknowledged. The pictures lie beside the ledger in `images/`.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final

from latentmodal.experiments.curation.records import (
    DECISIONS,
    EVENTS,
    Decision,
    Event,
    Filtered,
    Generated,
    Record,
    Refined,
    Refused,
    Reviewed,
    fold,
)
from latentmodal.experiments.errors import UserError

__all__ = [
    "DECISIONS",
    "IMAGES",
    "LEDGER_FILE",
    "Decision",
    "Event",
    "Filtered",
    "Generated",
    "Ledger",
    "Record",
    "Refined",
    "Refused",
    "Reviewed",
    "existing_ledger",
]

LEDGER_FILE: Final = "ledger.jsonl"
IMAGES: Final = "images"
"""The folder of the pictures, beside the ledger."""


class Ledger:
    """Reads a ledger at any time; writes it as the only writer, from the first `append` on.

    Threads may share one. Used as a context manager it takes the writer's lock at once and gives
    it back at the end; otherwise call `close`.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._records: dict[str, Record] = {}
        self._read_bytes = 0  # always the end of a whole line
        self._read_lines = 0
        self._guard = threading.RLock()
        self._lock_file: int | None = None
        self._file: int | None = None

    @property
    def folder(self) -> Path:
        """Where the ledger and its pictures lie."""
        return self.path.parent

    def records(self) -> dict[str, Record]:
        """What holds now, by id, in the order in which the records were first generated.

        Raises:
            UserError: a line is no event.
        """
        with self._guard:
            self._catch_up()
            return dict(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records().values())

    def __len__(self) -> int:
        return len(self.records())

    def __contains__(self, record_id: object) -> bool:
        return record_id in self.records()

    def append(self, *events: Event) -> None:
        """Write events; when this returns they are on the disk.

        Raises:
            UserError: another process is writing, or the disk refuses; then none is written.
            ValueError: an event is about a record that was never generated.
        """
        with self._guard:
            self.open()
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            stamped = [event if event.time else replace(event, time=now) for event in events]
            changed: dict[str, Record] = {}
            for event in stamped:
                before = changed.get(event.id, self._records.get(event.id))
                changed[event.id] = fold(before, event)
            self._write(b"".join(_line(event) for event in stamped))
            self._records |= changed
            self._read_lines += len(stamped)

    def open(self) -> None:
        """Become the writer: lock, read what is there, cut off a line that a crash left torn.

        Raises:
            UserError: another process is writing, or the folder cannot be written.
        """
        with self._guard:
            if self._file is not None:
                return
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock()
                self._catch_up()
                new = not self.path.exists()
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
                os.ftruncate(self._file, self._read_bytes)
                if new:
                    _sync_folder(self.folder)
            except OSError as error:
                self.close()
                raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error
            except UserError:
                self.close()
                raise

    def close(self) -> None:
        """Let others write."""
        with self._guard:
            for descriptor in (self._file, self._lock_file):
                if descriptor is not None:
                    os.close(descriptor)
            self._file = self._lock_file = None

    def __enter__(self) -> Ledger:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _lock(self) -> None:
        path = self.path.with_name(f"{self.path.name}.lock")
        self._lock_file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._lock_file, 200).decode(errors="replace").strip()
            raise UserError(
                f"{self.path}: is being written by {holder or 'another process'}; "
                "wait for it or end it"
            ) from error
        os.ftruncate(self._lock_file, 0)
        os.pwrite(self._lock_file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        end = self._read_bytes
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], end + written)
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, end)
            raise UserError(f"{self.path}: could not be written ({error.strerror})") from error
        self._read_bytes = end + len(data)

    def _catch_up(self) -> None:
        """Fold the lines that came since; bytes after the last newline are not there yet."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read_bytes)
                data = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                event = _event(line)
                self._records[event.id] = fold(self._records.get(event.id), event)
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{self.path}, line {self._read_lines + 1}: is no event of a ledger ({error})"
                ) from error
            self._read_lines += 1
            self._read_bytes += len(line)


def existing_ledger(path: Path) -> Ledger:
    """A ledger that must be there; its folder names it too.

    Raises:
        UserError: there is none.
    """
    file = path / LEDGER_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: no such ledger; `latentmodal curate generate` begins one")
    return Ledger(file)


def _line(event: Event) -> bytes:
    values = {"id": event.id, "event": event.name, **asdict(event)}
    # Halves of surrogate pairs, which a model may say, cannot be written.
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _event(line: bytes) -> Event:
    values = json.loads(line)
    kind = EVENTS[values.pop("event")]
    known = {item.name for item in fields(kind)}
    # A later version may say more; what it says besides does not change what we know.
    return kind(**{key: value for key, value in values.items() if key in known})


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
