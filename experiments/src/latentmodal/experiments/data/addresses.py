"""From what a recipe calls a source to a checked list of shards.

An address is a local path or ``scheme://…`` for a file system that fsspec knows. Nothing here (or
behind it) starts a shell; addresses that ask for one are refused by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
from braceexpand import braceexpand
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from latentmodal.experiments.data.tar_reader import BLOCK, is_tar_header
from latentmodal.experiments.errors import UserError

# Known to fsspec but not stores of files.
_RUN_PROGRAMS = ("dask", "git", "jlab", "jupyter", "pyscript", "reference")
_WRAP_ANOTHER = (
    *("arrow_hdfs", "async_wrapper", "asynclocal", "asyncwrapper", "blockcache", "cached", "data"),
    *("dir", "filecache", "generic", "libarchive", "simplecache", "tar", "zip"),
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):")
_SHELL = re.compile(r"[|`\n\r\0]|\$\(")
_CHECKS_IN_FLIGHT = 16


def expand_addresses(urls: Iterable[str]) -> list[str]:
    """Braces, wildcards and folders to a list of single shards, in a fixed order.

    Raises `UserError` for a refused or unknown scheme and for a pattern that matches nothing.
    """
    shards: list[str] = []
    for url in urls:
        check_scheme(url)
        for address in _expand_braces(url):
            shards.extend(_expand_wildcards(address))
    twice = [shard for shard, n in Counter(shards).items() if n > 1]
    if twice:
        raise UserError(f"shard {twice[0]} is named twice in urls; name it once, raise its weight")
    return shards


def check_scheme(address: str) -> None:
    """Raises `UserError` unless ``address`` is a local path or of an allowed scheme."""
    if _SHELL.search(address):
        raise UserError(f"address {address!r} looks like a shell command; those are never run")
    if "::" in address:
        raise UserError(f"address {address!r} chains file systems; give the plain address")
    match = _SCHEME.match(address)
    if match is None:
        return
    scheme = match[1].lower()
    if scheme == "pipe":
        raise UserError(
            f"address {address!r} would run a shell command, which is never done; "
            "give the file or an s3://, gs://, hf:// or https:// address"
        )
    if scheme not in known_implementations or scheme in _RUN_PROGRAMS + _WRAP_ANOTHER:
        raise UserError(
            f"address {address!r} has the scheme {scheme!r}, which is not a known file store; "
            "for a local file with a colon in its name write ./name"
        )


def is_local(address: str) -> bool:
    """Whether ``address`` is a path on this machine."""
    return _SCHEME.match(address) is None or address.startswith(("file://", "local://"))


def local_path(address: str) -> Path:
    """The path of a local address."""
    return Path(address.removeprefix("file://").removeprefix("local://")).expanduser()


def open_shard(address: str) -> IO[bytes]:
    """Opens a shard for reading; ``.tar.gz`` and the like are unpacked on the way."""
    if is_local(address) and address.endswith(".tar"):
        return local_path(address).open("rb", buffering=1 << 20)
    check_scheme(address)
    stream: IO[bytes] = fsspec.open(address, "rb", compression="infer").open()
    return stream


def check_shards(shards: list[str]) -> None:
    """Raises `UserError` naming the first shard that is missing, empty, or not a tar file.

    Remote shards are asked for their size only; what they hold shows when they are read.
    """
    for shard in filter(is_local, shards):
        _check_local(shard)
    remote = [shard for shard in shards if not is_local(shard)]
    if remote:
        with ThreadPoolExecutor(_CHECKS_IN_FLIGHT) as pool:
            for _ in pool.map(_check_remote, remote):
                pass


def _check_local(shard: str) -> None:
    path = local_path(shard)
    if not path.is_file():
        raise UserError(f"shard {shard} does not exist; check urls")
    if path.stat().st_size == 0:
        raise UserError(f"shard {shard} is empty (0 bytes); fetch it again or leave it out")
    if path.suffix != ".tar":
        return
    with path.open("rb") as stream:
        head = stream.read(BLOCK)
    if not is_tar_header(head):
        looks = "a web page" if head.lstrip()[:1] == b"<" else "something else"
        raise UserError(f"shard {shard} is not a tar file but {looks}; fetch it again")


def _check_remote(shard: str) -> None:
    with _store_errors(shard):
        system, path = url_to_fs(shard)
        info: dict[str, Any] = system.info(path)
    if info.get("size") == 0:
        raise UserError(f"shard {shard} is empty (0 bytes); upload it again or leave it out")


@contextmanager
def _store_errors(address: str) -> Iterator[None]:
    """What a store raises, as one line naming the address."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{address} needs another package: {_one_line(error)}") from error
    except OSError as error:
        raise UserError(f"{address} cannot be read: {_one_line(error)}; check urls") from error


def _expand_braces(url: str) -> list[str]:
    try:
        return list(braceexpand(url))
    except ValueError as error:
        raise UserError(f"address {url!r} has unbalanced braces; close them") from error


def _expand_wildcards(address: str) -> list[str]:
    if is_local(address) and local_path(address).is_dir():
        address = f"{address.rstrip('/')}/*.tar"
    # A question mark belongs to the query of a web address; elsewhere it is a wildcard.
    wild = "*[" if address.startswith(("http://", "https://")) else "*?["
    if not any(sign in address for sign in wild):
        return [address]
    if is_local(address):
        found = sorted(str(path) for path in _glob_local(local_path(address)))
    else:
        with _store_errors(address):
            system, pattern = url_to_fs(address)
            found = sorted(str(system.unstrip_protocol(path)) for path in system.glob(pattern))
    if not found:
        raise UserError(f"no shard matches {address}; check urls")
    return found


def _glob_local(pattern: Path) -> list[Path]:
    return list(Path(pattern.anchor or ".").glob(str(pattern.relative_to(pattern.anchor or ""))))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
