"""LLaVA's conversations (Liu et al. 2023, arXiv 2304.08485): ``llava_instruct_150k.json``.

``[{id, image?, conversations: [{from: human or gpt, value}, …]}]``, where ``<image>`` marks the
picture in a turn of the human's. An entry is a sample: a picture talked about in several of them
is written as often.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from latentmodal.experiments.data.readers.annotations import Document, Entry
from latentmodal.experiments.data.readers.reader import AnnotatedImage, Reader
from latentmodal.experiments.errors import UserError

logger = logging.getLogger(__name__)

_ROLES = {"human": "user", "gpt": "assistant"}
_IMAGE = "<image>"
_COCO_STEM = re.compile(r"(?:COCO_[a-z]+\d+_)?(\d{12})$")


@dataclass(frozen=True, kw_only=True)
class LlavaReader(Reader):
    """The whole file; ``split`` is a name only.

    Entries without a picture are left out, and how many is logged: a sample is a picture with its
    texts. Where no turn marks the picture, it stands before the first one.
    """

    @classmethod
    def recognises(cls, document: Document) -> bool:
        turns = document.first().get("conversations")
        first = turns[0] if isinstance(turns, list) and turns else None
        return isinstance(first, dict) and {"from", "value"} <= first.keys()

    def images(self) -> Iterator[AnnotatedImage]:
        assert self.annotations is not None
        text_only = 0
        for entry in self.annotations.entries():
            if "image" not in entry:
                text_only += 1
                continue
            name = entry.text("image")
            yield AnnotatedImage(
                image_id=_image_id(name),
                files=tuple(dict.fromkeys((name, PurePosixPath(name).name))),
                conversation=_conversation(entry),
            )
        if text_only:
            logger.info("left out %d entries without a picture", text_only)


def _image_id(name: str) -> str:
    """COCO's pictures are known by their twelve digits; the others keep their name."""
    coco = _COCO_STEM.match(PurePosixPath(name).stem)
    return f"coco/{int(coco[1])}" if coco else f"llava/{name}"


def _conversation(entry: Entry) -> tuple[dict[str, str], ...]:
    turns = [_turn(turn) for turn in entry.entries("conversations")]
    roles = [turn["role"] for turn in turns]
    if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
        raise UserError(
            f"{entry.where}: the turns are {', '.join(roles) or 'none'}; they must be pairs of "
            "human and gpt"
        )
    marks = [turn["text"].count(_IMAGE) for turn in turns]
    if sum(marks) == 0:
        turns[0]["text"] = f"{_IMAGE}\n{turns[0]['text']}"
    elif sum(marks) > 1 or any(marks[1::2]):
        raise UserError(
            f"{entry.where}: {_IMAGE} must stand once, in a turn of the human's; it has one picture"
        )
    return tuple(turns)


def _turn(entry: Entry) -> dict[str, str]:
    speaker = entry.text("from")
    if speaker not in _ROLES:
        raise UserError(f"{entry.where}: 'from' is '{speaker}'; known are {', '.join(_ROLES)}")
    return {"role": _ROLES[speaker], "text": entry.text("value")}
