"""Tensors of any checkpoint on this disk, also of folders that spread them over several files."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentmodal.encoders.convert import read_state_dict

_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_tensors(path: str | Path, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Name to tensor, on the CPU, as `read_state_dict` has it; nothing stored there is run.

    Args:
        path: a weight file, or a folder as transformers writes it, in one file or in shards.
        without: prefixes of names to leave out; in safetensors these are not even read.

    Raises:
        ValueError: no such file, no weight file, or one that needs code to be unpickled.
    """
    path = Path(path).expanduser()
    state: dict[str, Tensor] = {}
    for file in _files(path):
        if file.suffix == ".safetensors":
            state |= _read_safetensors(file, without)
        else:
            state |= {k: v for k, v in read_state_dict(file).items() if not k.startswith(without)}
    return state


def _files(path: Path) -> list[Path]:
    whole = path / "model.safetensors"
    if path.is_dir() and not whole.is_file():
        for index in (path / name for name in _INDICES):
            if index.is_file():
                return _shards(index)
    return [whole] if path.is_dir() and whole.is_file() else [path]


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index}: is no index of weight files; fetch the folder again") from error
    for name in names:
        if Path(str(name)).name != name:
            raise ValueError(f"{index}: names {name!r}, which is no file of its folder")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent / name}: missing; fetch the folder again")
    return [index.parent / name for name in names]


def _read_safetensors(file: Path, without: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {
                name: opened.get_tensor(name)
                for name in opened.keys()  # noqa: SIM118 (it is no mapping)
                if not name.startswith(without)
            }
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is no whole safetensors file: {error}") from error
