"""Reading a saved component's files, which may come from anywhere: nothing in them is trusted."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

MOST_CONFIG_BYTES = 1 << 20

_IN_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
}


def read_json_object(path: Path) -> dict[str, Any]:
    """The fields of a configuration.

    Raises:
        ValueError: one line: absent, no file of that folder, too long, or no JSON object.
    """
    _check_place(path)
    if path.stat().st_size > MOST_CONFIG_BYTES:
        raise ValueError(f"{path}: is longer than {MOST_CONFIG_BYTES} bytes, so no configuration")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Weights by name, on the CPU.

    Raises:
        ValueError: one line: absent, no file of that folder, or no safetensors.
    """
    _check_place(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from error


def check_tensors(path: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise ValueError, in one line, unless names, shapes and kinds are those wanted."""
    problems = [f"{key} is missing" for key in wanted if key not in found]
    problems += [f"{key} is unknown" for key in found if key not in wanted]
    for key, value in wanted.items():
        if key not in found:
            continue
        if found[key].shape != value.shape:
            problems.append(
                f"{key} has shape {tuple(found[key].shape)}, config.json says {tuple(value.shape)}"
            )
        elif found[key].is_floating_point() != value.is_floating_point():
            problems.append(f"{key} holds {found[key].dtype}, expected {value.dtype} or its like")
    if problems:
        raise ValueError(f"{path}: weights do not fit config.json: {_few(problems)}")


def fits(value: object, hint: Any) -> bool:
    """Whether a value read from JSON, its lists as tuples, is of the annotated type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        assert arguments[1:] == (...,), "a list in JSON has one type, and any length"
        return isinstance(value, tuple) and all(fits(part, arguments[0]) for part in value)
    return type(value) in ((int, float) if hint is float else (hint,))


def in_words(hint: Any) -> str:
    """What `fits` accepts, to a user."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(in_words, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"a list, each {in_words(arguments[0])}"
    return _IN_WORDS[hint]


def _check_place(path: Path) -> None:
    """Raise ValueError unless it is a regular file of its folder.

    A link may lead elsewhere in the folder, or to the neighbouring `blobs` that the hub's cache
    keeps its contents in. A folder from elsewhere could link to, say, a device or a private file.
    """
    try:
        there = path.is_file()
        reason = "it is no regular file" if path.exists() else "no such file"
    except OSError as error:
        there, reason = False, str(error.strerror)
    if not there:
        raise ValueError(
            f"{path}: cannot be read ({reason}); give a folder written by save_pretrained, or "
            "hf://owner/name"
        )
    folder, real = path.parent.resolve(), path.resolve()
    homes = (folder, folder.parent.parent / "blobs")
    if not any(real.is_relative_to(home) for home in homes):
        raise ValueError(f"{path}: is a link out of its folder; put the file itself there")


def _few(problems: list[str], most: int = 4) -> str:
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "; ".join(problems[:most] + more)


def first_line(error: Exception) -> str:
    """What it says, or its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
