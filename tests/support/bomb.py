"""A pickle that does something."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Bomb:
    """Pickles into a call; to unpickle it without care would leave the file `target` behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)
