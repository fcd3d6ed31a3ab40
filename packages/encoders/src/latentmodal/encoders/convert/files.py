"""Weights off the disk, never running what is stored there.

safetensors files hold tensors and nothing else. Torch files are pickles, a program in disguise, so
they are read with `weights_only=True`, always: a file that needs more is refused, by name.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

_NAMES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def find_weights(path: str | Path) -> Path:
    """The weight file itself, or the one of a known name in a folder."""
    path = Path(path).expanduser()
    if path.is_file():
        return path
    for name in _NAMES:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path} holds no weights; expected a file, or a folder with one of {_NAMES}.")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Name to tensor, on the CPU, without wrappers ({"state_dict": ...}, `module.`, `_orig_mod.`).

    Raises:
        ValueError: there is no such file, it is no weight file, or it needs code to be unpickled.
    """
    file = find_weights(path)
    if file.suffix == ".safetensors":
        try:
            return _strip_prefixes(load_file(file))
        except SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file: {error}") from error
    content = _load_torch_file(file)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a dict of tensors.")
    return _strip_prefixes({k: v for k, v in content.items() if isinstance(v, Tensor)})


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of a safetensors file; empty for other files."""
    file = find_weights(path)
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def _load_torch_file(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = re.findall(r"GLOBAL ([\w.]+)", str(error))
        needs = f"it would run {blocked[0]}" if blocked else "it is not a plain dict of tensors"
        raise ValueError(
            f"{file} is refused: {needs} on loading. If you trust its source, load it yourself, "
            "keep the tensors and save them as safetensors."
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        if "TorchScript" not in str(error):
            raise ValueError(f"{file} cannot be read as weights: {error}") from error
        raise ValueError(
            f"{file} is a TorchScript archive, which is code. If you trust its source, save "
            "torch.jit.load(file).state_dict() as safetensors and load that."
        ) from error


def _strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DDP and torch.compile prefix every key, sometimes both, in either order."""
    stripped = dict(state)
    while stripped and (
        prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in stripped)), None)
    ):
        stripped = {key.removeprefix(prefix): tensor for key, tensor in stripped.items()}
    return stripped
