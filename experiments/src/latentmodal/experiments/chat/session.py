"""One conversation with a generation system.

Legend: K pictures, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

from latentmodal.experiments.data.decode import decode_image
from latentmodal.experiments.data.faults import BadSampleError
from latentmodal.experiments.errors import UserError
from latentmodal.llm import IMAGE_TAG, GenerationSettings, Turn

MAX_PIXELS: Final = 50_000_000


class ChatSession:
    """Holds the turns and pictures of one conversation.

    Args:
        system: a generation system whose writer is a `ConversationWriter`.
        settings: how answers are searched for; None: the recipe's, without its beams.
    """

    def __init__(self, system: Any, settings: GenerationSettings | None = None) -> None:
        self._system = system
        self._preprocess = system.model.image_encoder.preprocess.eval()
        self.settings = settings or replace(system.config.generation, num_beams=1)
        self.reset()

    def reset(self) -> None:
        """Forget all turns and pictures."""
        self.turns: list[Turn] = []
        self._pictures: list[Tensor] = []
        self._waiting: list[Tensor] = []

    def add_picture(self, picture: Path | Image.Image) -> None:
        """Show a picture with the next thing said.

        Raises:
            UserError: a file that cannot be read, or holds no whole picture of a sane size.
        """
        if isinstance(picture, Path):
            picture = read_picture(picture)
        self._waiting.append(self._preprocess(picture.convert("RGB")))

    @property
    def waiting(self) -> int:
        """Pictures that go with the next thing said."""
        return len(self._waiting)

    def forget_waiting(self) -> None:
        """Forget the pictures that nothing was said with."""
        self._waiting = []

    def say(self, text: str) -> Generator[str, None, None]:
        """The answer, piece by piece; closing the iterator keeps what was said until then.

        Raises:
            UserError: a conversation that the style cannot write, or that is too long; the
                session is then as before.
        """
        spoken = text.replace(IMAGE_TAG, "")  # typed by hand, it would stand for no picture
        asked = Turn("user", " ".join([*[IMAGE_TAG] * len(self._waiting), spoken]).strip())
        pictures = [*self._pictures, *self._waiting]
        pixels_KCHW = torch.stack(pictures) if pictures else torch.empty(0, 3, 1, 1)
        pieces: list[str] = []
        try:
            for piece in self._system.stream(pixels_KCHW, [*self.turns, asked], self.settings):
                pieces.append(piece)
                yield piece
        except ValueError as error:
            pieces.clear()
            raise UserError(str(error)) from error
        finally:
            if pieces:
                self.turns += [asked, Turn("assistant", "".join(pieces))]
                self._pictures, self._waiting = pictures, []

    def undo(self) -> bool:
        """Forget the last question and answer, and its pictures; False where there is none."""
        if not self.turns:
            return False
        count = len(self._pictures) - self.turns[-2].text.count(IMAGE_TAG)
        del self.turns[-2:], self._pictures[count:]
        return True


def read_picture(path: Path) -> Image.Image:
    """A whole picture of a sane size, upright, in RGB.

    Raises:
        UserError: the file cannot be read, or holds no such picture.
    """
    try:
        return decode_image(path.read_bytes(), max_pixels=MAX_PIXELS)
    except (OSError, BadSampleError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read as a picture; {reason}") from error
