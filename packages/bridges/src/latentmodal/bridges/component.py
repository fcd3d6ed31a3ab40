"""What saves and loads: a frozen config, the module it builds, and the folder both live in.

A saved component is a folder with two files and no pickle in it:

    config.json        {"format_version": "1.2.0", "bridge": "linear", "in_dim": 768, ...}
    model.safetensors  the state dict
"""

import dataclasses
import difflib
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, get_type_hints

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentmodal.bridges import hub
from latentmodal.bridges.format_version import FORMAT_VERSION, check_version
from latentmodal.bridges.saved_files import (
    check_tensors,
    first_line,
    fits,
    in_words,
    read_json_object,
    read_tensors,
)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComponentConfig(ABC):
    """Plain fields (numbers, strings, None) that say everything needed to build one component."""

    name: ClassVar[str]
    """The exact name that tables, recipes and `config.json` use for this component."""

    @abstractmethod
    def build(self) -> "Component":
        """Make the module, freshly initialised."""

    def to_fields(self) -> dict[str, Any]:
        """The fields as `config.json` holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_fields(
        cls, fields: Mapping[str, Any], table: Mapping[str, "type[ComponentConfig]"]
    ) -> "ComponentConfig":
        """Undo `to_fields`; `table` has the components that fields may name.

        Raises:
            ValueError: unknown field, missing field, or a value the config refuses.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        for key in fields:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
                raise ValueError(f"bridge {cls.name!r} has no field {key!r}; {hint}")
        missing = [
            key
            for key, field in known.items()
            if field.default is field.default_factory is dataclasses.MISSING and key not in fields
        ]
        if missing:
            raise ValueError(f"bridge {cls.name!r} needs {', '.join(missing)}")
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        hints = get_type_hints(cls)
        for key, value in plain.items():
            if not fits(value, hints[key]):
                raise ValueError(f"{key} is {fields[key]!r}; it must be {in_words(hints[key])}")
        return cls(**plain)


class Component(nn.Module, ABC):
    """A module that carries its config and can be saved to, and loaded from, a folder."""

    config_class: ClassVar[type[ComponentConfig]]

    def __init__(self, config: ComponentConfig) -> None:
        super().__init__()
        self.config = config

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config and weights to `folder`, made if absent.

        Both files are complete on disk before either takes its final name, so an interrupted save
        leaves the previous one readable.

        Raises:
            ValueError: a weight is sharded over ranks or has no data (meta device).
        """
        folder = Path(folder)
        tensors = {name: _plain(name, value) for name, value in self.state_dict().items()}
        header = {"format_version": FORMAT_VERSION, "bridge": self.config.name}
        text = json.dumps(header | self.config.to_fields(), indent=2) + "\n"

        folder.mkdir(parents=True, exist_ok=True)
        weights_tmp = folder / f".{WEIGHTS_FILE}.{os.getpid()}.tmp"
        config_tmp = folder / f".{CONFIG_FILE}.{os.getpid()}.tmp"
        try:
            save_file(tensors, weights_tmp)
            config_tmp.write_text(text, encoding="utf-8")
            weights_tmp.chmod(config_tmp.stat().st_mode)  # safetensors lets the owner alone read it
            for path in (weights_tmp, config_tmp):
                _flush_to_disk(path)
            weights_tmp.replace(folder / WEIGHTS_FILE)
            config_tmp.replace(folder / CONFIG_FILE)
        finally:
            weights_tmp.unlink(missing_ok=True)
            config_tmp.unlink(missing_ok=True)

    def push_to_hub(
        self, address: str, *, private: bool = False, message: str = "Upload bridge"
    ) -> str:
        """Save to a repository of the Hugging Face hub; needs `huggingface_hub` and its login.

        Args:
            address: `owner/name`, `hf://owner/name`, or either with `@revision` behind it.
            private: for a repository that is not there yet.
            message: of the commit.

        Returns:
            Where to look at what was written.

        Raises:
            ValueError: not an address, `huggingface_hub` is not installed, or the hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload(folder, address, private=private, message=message)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Load what is known to hold this class; `latentmodal.bridges.load` takes any of them.

        Args:
            folder: written by `save_pretrained`, or `hf://owner/name` on the Hugging Face hub.

        Raises:
            ValueError: see `load_component`.
        """
        module = load_component(folder, {cls.config_class.name: cls.config_class})
        assert isinstance(module, cls)
        return module


def load_component(
    folder: str | os.PathLike[str], table: Mapping[str, type[ComponentConfig]]
) -> Component:
    """Rebuild what `save_pretrained` wrote, on the CPU, in the dtype it was saved in.

    Raises:
        ValueError: one line naming the file and what is wrong with it: absent or unreadable file,
            format newer than this package, name not in `table`, unknown or missing config field,
            or one of another type, unknown, missing or wrongly shaped weight.
    """
    if hub.is_address(folder):
        folder = hub.download(str(folder), [CONFIG_FILE, WEIGHTS_FILE])
    config_path, weights_path = Path(folder) / CONFIG_FILE, Path(folder) / WEIGHTS_FILE
    config = _read_config(config_path, table)

    # Built without data: no time spent on, and no random numbers drawn for, values that the file
    # replaces.
    try:
        with torch.device("meta"):
            module = config.build()
    except (ValueError, TypeError, RuntimeError) as error:  # of sizes beyond all measure, too
        raise ValueError(f"{config_path}: {first_line(error)}") from error
    tensors = read_tensors(weights_path)
    check_tensors(weights_path, module.state_dict(), tensors)
    module.load_state_dict(tensors, assign=True)
    assert not any(buffer.is_meta for buffer in module.buffers()), "buffers must be persistent"
    return module


def _read_config(path: Path, table: Mapping[str, type[ComponentConfig]]) -> ComponentConfig:
    fields = read_json_object(path)
    newer = None
    try:
        newer = check_version(fields.pop("format_version", None))
        return make_config(fields.pop("bridge", None), fields, table)
    except (ValueError, RecursionError) as error:
        hint = f" ({newer})" if newer else ""
        raise ValueError(f"{path}: {error}{hint}") from error


def make_config(
    name: object, fields: Mapping[str, Any], table: Mapping[str, type[ComponentConfig]]
) -> ComponentConfig:
    """Look `name` up in `table` and fill its config from `fields`.

    Raises:
        ValueError: unknown name, unknown field, missing field, or a value the config refuses.
    """
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"bridge {name!r} is unknown; choose from {', '.join(sorted(table))}")
    return table[name].from_fields(fields, table)


def require_positive_int(config: ComponentConfig, *names: str) -> None:
    """Raise ValueError unless each named field of `config` is an int of at least 1."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")


def _plain(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta or type(tensor) is not Tensor:
        state = "has no data (meta device)" if tensor.is_meta else "is sharded over ranks"
        raise ValueError(
            f"cannot save: weight {name!r} {state}; save from a module that holds the full weights "
            "(torch.distributed.checkpoint.state_dict gathers them with full_state_dict=True)"
        )
    return tensor.contiguous()


def _flush_to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
