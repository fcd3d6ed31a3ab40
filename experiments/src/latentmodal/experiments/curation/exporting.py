"""Curated descriptions as training data: shards, or MiniGPT-4's own second-stage layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from latentmodal.experiments.curation.ledger import Ledger, Record
from latentmodal.experiments.data.config import LoaderConfig
from latentmodal.experiments.data.decode import decode_image
from latentmodal.experiments.data.faults import BadSampleError
from latentmodal.experiments.data.shard_writer import write_shards
from latentmodal.experiments.errors import UserError

_JPEG_QUALITY: Final = 95


def export_ledger(ledger: Ledger, layout: str, out: Path, *, unreviewed: bool) -> int:
    """Write every kept record into a new folder; how many there were.

    Args:
        ledger: read only.
        layout: a name in `LAYOUTS`.
        out: the folder; it appears only when it is whole.
        unreviewed: whether to keep what nobody has reviewed.

    Raises:
        UserError: unknown layout, the folder is there, nothing is kept, a picture is missing, or
            the disk refuses.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--to {layout}: unknown layout; choose from {', '.join(LAYOUTS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; choose another folder, or remove it")
    kept = [record for record in ledger if record.kept(unreviewed=unreviewed)]
    kept = [record for record in kept if record.text.strip()]
    if not kept:
        hint = "" if unreviewed else "; review it, or keep what nobody reviewed: --unreviewed keep"
        raise UserError(f"{ledger.path}: no description is kept{hint}")
    part = out.with_name(f".{out.name}.part")
    try:
        if part.exists():  # of an export that was interrupted
            shutil.rmtree(part)
        part.mkdir(parents=True)
        LAYOUTS[layout](ledger, kept, part)
        part.rename(out)
    except OSError as error:
        raise UserError(f"{out}: could not be written ({error.strerror or error})") from error
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(part)
    return len(kept)


def _write_shards(ledger: Ledger, records: list[Record], folder: Path) -> None:
    write_shards(_samples(ledger, records), folder)


def _samples(ledger: Ledger, records: list[Record]) -> Iterator[dict[str, Any]]:
    for record in records:
        extension = record.image.rpartition(".")[2]
        captions = record.meta.get("captions") or [record.text]
        meta = {
            **record.meta,
            "captions": captions,
            "description": record.text,
            "curated": True,
        }
        if "description" in record.meta:
            meta["source_description"] = record.meta["description"]
        yield {"__key__": record.id, extension: _picture(ledger, record), "json": meta}


def _write_cc_sbu_align(ledger: Ledger, records: list[Record], folder: Path) -> None:
    (folder / "image").mkdir()
    for record in records:
        (folder / "image" / f"{record.id}.jpg").write_bytes(_jpeg(_picture(ledger, record), record))
    notes = [{"image_id": record.id, "caption": record.text} for record in records]
    text = json.dumps({"annotations": notes}, ensure_ascii=False, indent=1)
    (folder / "filter_cap.json").write_text(text, encoding="utf-8")


def _picture(ledger: Ledger, record: Record) -> bytes:
    path = ledger.folder / record.image
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the picture of '{record.id}' cannot be read") from error


def _jpeg(data: bytes, record: Record) -> bytes:
    """The picture as it is if it is a JPEG, else written as one, transparency over white."""
    if data.startswith(b"\xff\xd8\xff"):
        return data
    try:
        image = decode_image(data, max_pixels=LoaderConfig().max_pixels)
    except BadSampleError as error:
        raise UserError(f"{record.image}: the picture of '{record.id}' is bad ({error})") from error
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


LAYOUTS: Final[dict[str, Callable[[Ledger, list[Record], Path], None]]] = {
    "shards": _write_shards,
    "cc_sbu_align": _write_cc_sbu_align,
}
