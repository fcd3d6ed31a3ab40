"""Layouts that say only one thing: where objects stand, how they relate, and their picture.

Coordinates are pixels, x to the right, y down; a box is (x0, y0, x1, y1), x1 and y1 exclusive.

A relation holds between two boxes only when nobody could doubt it: one lies wholly beyond the
other with a gap, and their centres differ at least twice as much along that axis as across it.
So of left, right, above and below at most one is true of two objects.
"""

import random
from dataclasses import dataclass
from typing import Final, Literal

from PIL import Image

from latentmodal.experiments.data.emoji.concepts import Thing
from latentmodal.experiments.data.emoji.drawings import Sprites
from latentmodal.experiments.data.emoji.palette import BACKGROUNDS

Relation = Literal["to the left of", "to the right of", "above", "below"]
Box = tuple[int, int, int, int]

INVERSE: Final[dict[Relation, Relation]] = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}
RELATIONS: Final = tuple(INVERSE)
TURNS: Final = (-12, -6, 0, 6, 12)  # degrees; few, so that turned drawings are reused

_PAD: Final = 0.02  # of the canvas, between any object and the edge
_GAP: Final = 0.04  # of the canvas, between objects
# Sides of the square an object is fitted into, as shares of the canvas.
_SINGLE_SIDE: Final = (0.42, 0.85)
_PAIR_SIDE: Final = (0.30, 0.44)
_SEVERAL_SIDE: Final = (0.27, 0.42)
# A drawing is fitted to its square in whole pixels, which moves its centre by up to a pixel;
# layouts keep this much of the permitted slant, relations are judged by all of it.
_SLANT: Final = 0.5
_SLANT_PLANNED: Final = 0.35


@dataclass(frozen=True)
class Placement:
    """One object: fitted into a square of ``side`` pixels around (x, y), turned by ``degrees``."""

    thing: Thing
    x: float
    y: float
    side: float
    degrees: int


@dataclass(frozen=True)
class Scene:
    size: int
    style: str
    background: str
    placements: tuple[Placement, ...]


@dataclass(frozen=True)
class Seen:
    """An object as it stands in the picture; ``colour`` None where none clearly dominates."""

    thing: Thing
    colour: str | None
    box: Box


@dataclass(frozen=True)
class Picture:
    """The facts of a rendered scene: all that language is made from."""

    size: int
    style: str
    background: str
    objects: tuple[Seen, ...]


def relation(a: Box, b: Box, size: int) -> Relation | None:
    """What ``a`` is to ``b`` on a canvas of ``size`` pixels, None where it is not clear-cut."""
    dx = (b[0] + b[2] - a[0] - a[2]) / 2
    dy = (b[1] + b[3] - a[1] - a[3]) / 2
    gap_x = max(b[0] - a[2], a[0] - b[2])
    gap_y = max(b[1] - a[3], a[1] - b[3])
    gap = max(1.0, _GAP * size - 1)
    if gap_x >= gap and abs(dy) <= _SLANT * abs(dx):
        return "to the left of" if dx > 0 else "to the right of"
    if gap_y >= gap and abs(dx) <= _SLANT * abs(dy):
        return "above" if dy > 0 else "below"
    return None


def compose(
    things: tuple[Thing, ...], style: str, size: int, sprites: Sprites, rng: random.Random
) -> Scene:
    """Lay out one to four objects. Two stand in a clear relation, drawn evenly from the four."""
    if len(things) == 1:
        squares = [_place_single(size, rng)]
    elif len(things) == 2:
        squares = _place_pair(size, rng.choice(RELATIONS), rng)
    else:
        squares = _place_several(len(things), size, rng)
    hidden = {name for thing in things for name in sprites.look(thing.code, style).hidden_on}
    return Scene(
        size=size,
        style=style,
        background=rng.choice([name for name in BACKGROUNDS if name not in hidden] or ["white"]),
        placements=tuple(
            Placement(thing, x, y, side, rng.choice(TURNS))
            for thing, (x, y, side) in zip(things, squares, strict=True)
        ),
    )


def _place_single(size: int, rng: random.Random) -> tuple[float, float, float]:
    side = size * rng.uniform(*_SINGLE_SIDE)
    low = size * _PAD + side / 2
    return rng.uniform(low, size - low), rng.uniform(low, size - low), side


def _place_pair(
    size: int, wanted: Relation, rng: random.Random
) -> list[tuple[float, float, float]]:
    """Two squares one after the other along an axis, then nearly level across it."""
    pad, gap = size * _PAD, size * _GAP
    sides = [size * rng.uniform(*_PAIR_SIDE) for _ in range(2)]
    slack = size - 2 * pad - gap - sum(sides)
    cuts = sorted(rng.uniform(0, slack) for _ in range(2))
    first = pad + cuts[0] + sides[0] / 2
    second = pad + cuts[1] + sides[0] + gap + sides[1] / 2
    lows = [pad + side / 2 for side in sides]
    across_first = rng.uniform(lows[0], size - lows[0])
    reach = _SLANT_PLANNED * (second - first)
    across_second = rng.uniform(
        max(lows[1], across_first - reach), min(size - lows[1], across_first + reach)
    )
    along = [(first, across_first, sides[0]), (second, across_second, sides[1])]
    if wanted in ("above", "below"):
        along = [(y, x, side) for x, y, side in along]
    return along if wanted in ("to the left of", "above") else along[::-1]


def _place_several(count: int, size: int, rng: random.Random) -> list[tuple[float, float, float]]:
    """Three or four squares, each somewhere in its own quarter of the canvas."""
    inner, outer = size * _GAP / 2, size * _PAD
    quarters = [(column, row) for row in (0, 1) for column in (0, 1)]
    squares = []
    for column, row in rng.sample(quarters, count):
        side = size * rng.uniform(*_SEVERAL_SIDE)
        low, high = outer + side / 2, size / 2 - inner - side / 2
        x, y = rng.uniform(low, high), rng.uniform(low, high)
        squares.append((size - x if column else x, size - y if row else y, side))
    return squares


def render(scene: Scene, sprites: Sprites) -> tuple[Image.Image, Picture]:
    """The RGB picture and the facts it shows; boxes are tight around what is drawn."""
    image = Image.new("RGB", (scene.size, scene.size), BACKGROUNDS[scene.background])
    seen = []
    for placement in scene.placements:
        code = placement.thing.code
        drawing = sprites.turned(code, scene.style, placement.degrees)
        scale = placement.side / max(drawing.size)
        width, height = (max(1, int(extent * scale)) for extent in drawing.size)
        drawing = drawing.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round(placement.x - width / 2), round(placement.y - height / 2)
        image.paste(drawing, (left, top), drawing)
        look = sprites.look(code, scene.style)
        colour = look.colour if placement.thing.has_colour else None
        seen.append(Seen(placement.thing, colour, (left, top, left + width, top + height)))
    return image, Picture(scene.size, scene.style, scene.background, tuple(seen))
