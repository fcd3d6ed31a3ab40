"""Colour words: the plain backgrounds, and the one colour of a drawing where one dominates."""

from functools import cache
from typing import Final

import numpy as np
from PIL import Image

# Light enough for black line drawings, far enough apart to be told from one another.
BACKGROUNDS: Final[dict[str, tuple[int, int, int]]] = {
    "white": (255, 255, 255),
    "grey": (200, 200, 200),
    "yellow": (255, 238, 150),
    "green": (170, 222, 150),
    "blue": (160, 205, 245),
    "pink": (248, 185, 210),
}

# The fills the two colour styles actually use, sorted under plain words by eye. A generic
# palette fails here: it calls OpenMoji's greys pink.
_ANCHORS: Final[dict[str, tuple[str, ...]]] = {
    "red": ("ea5a47", "d22f27", "781e32", "dd2e44", "be1931", "a0041e"),
    "orange": ("e27022", "f4900c", "e7a100"),
    "amber": ("f4aa41", "ffac33"),  # some say yellow, some orange: said by nobody here
    "yellow": ("fcea2b", "f1b31c", "ffcc4d", "ffd983", "fdcb58"),
    "green": ("b1cc33", "5c9e31", "186648", "77b255", "5c913b", "3e721d", "a6d388", "c6e5b3"),
    "blue": ("92d3f5", "61b2e4", "1e50a0", "55acee", "226699", "3b88c3", "bbddf5", "88c9f9"),
    "purple": ("8967aa", "b399c8", "aa8dd8", "9266cc", "744eaa", "553788"),
    "pink": ("ffa7c0", "e67a94", "ea596e", "f4abba", "ffb2c4"),
    "brown": ("a57939", "6a462f", "c1694f", "662113", "8a4b38", "d99e82", "854836", "bf6952"),
    "beige": ("fadcbc", "debb90", "ffe8b6", "ffdbb5"),
    "grey": ("d0cfce", "9b9b9a", "99aab5", "ccd6dd", "66757f", "b2b2b2"),
    "white": ("ffffff", "f5f8fa", "e1e8ed"),
    "black": ("000000", "3f3f3f", "31373d", "292f33", "141414"),
}
COLOUR_WORDS: Final = frozenset(_ANCHORS)
_SAID: Final = frozenset({"red", "orange", "yellow", "green", "blue", "purple", "pink", "brown"})

_MIN_FILL: Final = 0.35  # of the opaque pixels; below it a drawing is mostly outline
_DOMINANT: Final = 0.62  # of the filled pixels
_LOOKS_ALIKE: Final = 0.09  # distance in OKLab, where white to black is 1
_MOSTLY: Final = 0.5


def _oklab(rgb_N3: np.ndarray) -> np.ndarray:
    """sRGB bytes to OKLab (Björn Ottosson, 2020), where near means looks alike."""
    srgb = rgb_N3.astype(np.float64) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ to_lms.T) @ to_lab.T


@cache
def _anchor_table() -> tuple[np.ndarray, tuple[str, ...]]:
    pairs = [(word, value) for word, values in _ANCHORS.items() for value in values]
    rgb = np.array([[int(value[i : i + 2], 16) for i in (0, 2, 4)] for _, value in pairs])
    return _oklab(rgb), tuple(word for word, _ in pairs)


def _opaque_colours(drawing_rgba: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Distinct opaque colours in OKLab, and how many pixels each has."""
    pixels = np.asarray(drawing_rgba).reshape(-1, 4)
    packed = pixels[pixels[:, 3] > 200, :3].astype(np.int64) @ (65536, 256, 1)
    colours, counts = np.unique(packed, return_counts=True)
    rgb = np.stack([colours >> 16, (colours >> 8) & 255, colours & 255], axis=1)
    return _oklab(rgb), counts


def dominant_colour(drawing_rgba: Image.Image) -> str | None:
    """The colour word of a drawing, or None where no colour clearly dominates.

    Every opaque pixel goes to the nearest fill of the two styles' palettes; black is outline and
    does not count. Grey, beige, white and black are never said: as the colour of a whole thing
    they are matters of taste in these drawings.
    """
    lab, counts = _opaque_colours(drawing_rgba)
    anchors_lab, words = _anchor_table()
    nearest = ((lab[:, None] - anchors_lab[None]) ** 2).sum(-1).argmin(1)
    pixels_of = dict.fromkeys(_ANCHORS, 0)
    for index, count in zip(nearest, counts, strict=True):
        pixels_of[words[index]] += int(count)
    filled = int(counts.sum()) - pixels_of.pop("black")
    best = max(pixels_of, key=lambda word: pixels_of[word])
    if filled < _MIN_FILL * counts.sum() or pixels_of[best] < _DOMINANT * filled:
        return None
    return best if best in _SAID else None


def hiding_backgrounds(drawing_rgba: Image.Image) -> frozenset[str]:
    """Backgrounds on which most of this drawing would hardly be seen."""
    lab, counts = _opaque_colours(drawing_rgba)
    hiding = set()
    for name, rgb in BACKGROUNDS.items():
        near = np.sqrt(((lab - _oklab(np.array([rgb]))) ** 2).sum(-1)) < _LOOKS_ALIKE
        if counts[near].sum() > _MOSTLY * counts.sum():
            hiding.add(name)
    return frozenset(hiding)
