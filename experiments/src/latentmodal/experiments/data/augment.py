"""How training pictures differ from visit to visit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Training pictures are random crops of this share of their area, resized for the encoder."""

    scale: tuple[float, float] = (0.9, 1.0)
    flip: bool = False
    """Mirror half of the pictures; wrong where captions know left from right."""

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale is {list(self.scale)}; give two shares, 0 < low <= high <= 1")
