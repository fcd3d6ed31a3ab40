"""Samples out of a tar stream, one key at a time, with nothing believed that the bytes do not say.

A tar file is a chain of 512-byte headers, each followed by its member's data padded to 512 bytes,
closed by a block of zeros. A shard that ends without that block was cut off, and the key being read
may lack members even if every byte of those at hand arrived; so a sample is given out only when the
next key or the closing block has been seen. Keys of different shards never meet.

The standard library's reader is not used: it takes a damaged header in mid-file for the end of the
archive and says nothing. Only the fields that shards use are understood: regular members, and the
two ways (GNU and POSIX) of writing long names.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Callable, Iterator
from lzma import LZMAError
from pathlib import PurePosixPath
from typing import IO, NamedTuple

from latentmodal.experiments.data.faults import Cause, Fault, place
from latentmodal.experiments.data.sample import IMAGE_EXTENSIONS, TEXT_EXTENSIONS, RawSample
from latentmodal.experiments.errors import UserError

logger = logging.getLogger(__name__)

BLOCK = 512
_ZEROS = bytes(BLOCK)
_REGULAR = (b"0", b"\0", b"7")
_MAX_EXTENDED_HEADER = 1 << 20
_SKIP_CHUNK = 1 << 20
_MAX_TEXT_BYTES = 1 << 20
_WANTED = frozenset(IMAGE_EXTENSIONS + TEXT_EXTENSIONS)
_PICKLED = frozenset(("pyd", "pkl", "pickle", "pth", "pt", "ckpt", "joblib", "dill", "cloudpickle"))
_OBJECT_ARRAY = re.compile(rb"""['"]descr['"]\s*:\s*['"][|<>=]?O""")
_READ_ERRORS = (OSError, EOFError, zlib.error, LZMAError)


class _Damaged(Exception):  # noqa: N818 - an outcome of reading, never seen outside this file
    """The shard cannot be followed further."""

    def __init__(self, cause: Cause) -> None:
        self.cause = cause


class _Member(NamedTuple):
    name: str
    size: int


def is_tar_header(block: bytes) -> bool:
    """Whether ``block`` is a tar header with a right checksum, or the end of an empty archive."""
    return block == _ZEROS or (len(block) == BLOCK and _checksum_holds(block))


def split_key(name: str) -> tuple[str, str]:
    """``folder/0001.txt`` to ``("folder/0001", "txt")``; no extension gives ``""``."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def read_samples(
    stream: IO[bytes],
    shard: str,
    on_fault: Callable[[Fault], None],
    *,
    wanted: Callable[[int], bool] = lambda _ordinal: True,
    max_member_bytes: int = 64 << 20,
    images: bool = True,
) -> Iterator[RawSample]:
    """The samples of one shard whose ordinal is ``wanted``; members of the others are passed over.

    Without ``images`` those are passed over as well, and their members are empty.
    Faults that lose a sample are reported to ``on_fault``, by whoever wants that ordinal. Raises
    `UserError` for a pickled member: those run code when decoded, and no shard needs one.
    """
    reader = _TarStream(stream)
    seen: set[str] = set()
    ordinal = -1
    key = ""
    members: dict[str, bytes] = {}
    cause: Cause | None = None  # why the current key is unusable

    def finished() -> RawSample | None:
        if ordinal < 0 or not wanted(ordinal):
            return None
        if cause is not None:
            on_fault(Fault(cause, place(shard, key)))
            return None
        return RawSample(shard, key, ordinal, members)

    try:
        while (member := reader.next_member()) is not None:
            member_key, extension = split_key(member.name)
            if not extension or PurePosixPath(member_key).name == "":
                continue
            _refuse_pickles(member, extension, shard, reader)
            if extension not in _WANTED:
                continue
            if member_key != key or ordinal < 0:
                if (sample := finished()) is not None:
                    yield sample
                ordinal += 1
                key, members = member_key, {}
                cause = Cause.DUPLICATE_KEY if key in seen else None
                seen.add(key)
            if not wanted(ordinal):
                continue
            if extension in members:
                cause = Cause.DUPLICATE_KEY
            limit = _MAX_TEXT_BYTES if extension in TEXT_EXTENSIONS else max_member_bytes
            if member.size > min(limit, max_member_bytes):
                cause = cause or Cause.HUGE_MEMBER
            elif extension in IMAGE_EXTENSIONS and not images:
                members[extension] = b""
            else:
                members[extension] = reader.read_data()
    except _Damaged as damage:
        ordinal = max(ordinal, 0)
        if wanted(ordinal):
            where = place(shard, key or "(start)")
            logger.warning("%s: %s", damage.cause, where)
            on_fault(Fault(damage.cause, where))
        return
    if (sample := finished()) is not None:
        yield sample


def _refuse_pickles(member: _Member, extension: str, shard: str, reader: _TarStream) -> None:
    kind = extension.rpartition(".")[2]
    pickled = kind in _PICKLED
    if kind == "npy":
        pickled = _OBJECT_ARRAY.search(reader.peek_data(BLOCK)) is not None
    if pickled:
        raise UserError(
            f"shard {shard} holds the pickled member {member.name!r}; pickles can run code and are "
            "refused: write the shard without it"
        )


class _TarStream:
    """Walks the members of an uncompressed tar stream, forwards only."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._seekable = stream.seekable()
        self._size = 0  # of the current member's data
        self._unread = 0  # bytes before the next header
        self._peeked = b""

    def next_member(self) -> _Member | None:
        """The next regular member, or None at the closing block."""
        long_name: str | None = None
        long_size: int | None = None
        while True:
            self._skip(self._unread)
            header = self._read(BLOCK)
            if header == _ZEROS:
                return None
            if not _checksum_holds(header):
                raise _Damaged(Cause.CORRUPT_SHARD)
            kind = header[156:157]
            self._size = _number(header[124:136])
            if long_size is not None and kind in _REGULAR:
                self._size = long_size
            self._unread = -(-self._size // BLOCK) * BLOCK
            if kind in (b"L", b"x") and self._size > _MAX_EXTENDED_HEADER:
                raise _Damaged(Cause.CORRUPT_SHARD)
            if kind == b"L":
                long_name = _text(self.read_data())
            elif kind == b"x":
                records = _pax_records(self.read_data())
                long_name = records.get("path", long_name)
                if "size" in records:
                    long_size = _decimal(records["size"])
            elif kind in _REGULAR:
                return _Member(_text(_name(header)) if long_name is None else long_name, self._size)
            else:  # folders, links, global comments
                long_name, long_size = None, None

    def read_data(self) -> bytes:
        """The data of the current member, once."""
        data = self._peeked + self._read(self._unread)
        self._unread, self._peeked = 0, b""
        return data[: self._size]

    def peek_data(self, length: int) -> bytes:
        """The first bytes of the current member; `read_data` will still give them."""
        self._peeked = self._read(min(length, self._unread))
        self._unread -= len(self._peeked)
        return self._peeked

    def _read(self, length: int) -> bytes:
        with _reading():
            data = self._stream.read(length)
            # A short answer is allowed to mean "ask again"; only an empty one is the end.
            while len(data) < length:
                more = self._stream.read(length - len(data))
                if not more:
                    raise _Damaged(Cause.TRUNCATED_SHARD)
                data += more
        return data

    def _skip(self, length: int) -> None:
        self._unread, self._peeked = 0, b""
        if length and self._seekable:
            with _reading():
                # Landing beyond the end shows as a truncated shard at the next header.
                self._stream.seek(length, 1)
            return
        while length > 0:
            length -= len(self._read(min(length, _SKIP_CHUNK)))


class _reading:  # noqa: N801 - reads as a with-statement, and costs less than a generator
    """Turns what a store or an unpacker raises into `_Damaged`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _READ_ERRORS):
            cut = isinstance(error, EOFError)
            raise _Damaged(Cause.TRUNCATED_SHARD if cut else Cause.CORRUPT_SHARD) from error


def _checksum_holds(header: bytes) -> bool:
    try:
        stated = int(header[148:156].strip(b" \0") or b"-1", 8)
    except ValueError:
        return False
    # The sum of all bytes with the checksum field itself counted as eight spaces.
    return sum(header) - sum(header[148:156]) + 8 * 32 == stated


def _number(field: bytes) -> int:
    """A size: octal digits, or big-endian binary where the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        size = int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        size = -1
    if size < 0:
        raise _Damaged(Cause.CORRUPT_SHARD)
    return size


def _decimal(text: str) -> int:
    if not text.isdecimal():
        raise _Damaged(Cause.CORRUPT_SHARD)
    return int(text)


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "replace")


def _pax_records(data: bytes) -> dict[str, str]:
    """``"<length> <key>=<value>\\n"`` repeated, the length counting the whole record."""
    records: dict[str, str] = {}
    while data:
        length_text, _, _ = data.partition(b" ")
        if not length_text.isdigit() or not 0 < int(length_text) <= len(data):
            raise _Damaged(Cause.CORRUPT_SHARD)
        length = int(length_text)
        key, _, value = data[len(length_text) + 1 : length - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        data = data[length:]
    return records
