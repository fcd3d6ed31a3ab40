"""Layouts: inside the canvas, apart from one another, in relations nobody could doubt."""

import random

import numpy as np
import pytest

from latentmodal.experiments.data.emoji.concepts import Thing, select_things
from latentmodal.experiments.data.emoji.drawings import STYLES, Sprites
from latentmodal.experiments.data.emoji.palette import BACKGROUNDS, dominant_colour
from latentmodal.experiments.data.emoji.scenes import (
    INVERSE,
    RELATIONS,
    Box,
    Picture,
    compose,
    relation,
    render,
)

KNOWN, _ = select_things("tiny")


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def draw(count: int, size: int, style: str, sprites: Sprites, seed: int) -> tuple:
    rng = random.Random(seed)
    things: tuple[Thing, ...] = tuple(rng.sample(KNOWN, count))
    return render(compose(things, style, size, sprites, rng), sprites)


@pytest.mark.parametrize("size", [48, 96, 224])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_boxes_lie_in_the_canvas_and_apart(size: int, count: int) -> None:
    sprites = Sprites(size)
    for seed in range(40):
        _, picture = draw(count, size, "openmoji", sprites, seed)
        boxes = [seen.box for seen in picture.objects]
        assert len(boxes) == count
        for index, box in enumerate(boxes):
            assert 0 <= box[0] < box[2] <= size
            assert 0 <= box[1] < box[3] <= size
            assert not any(overlap(box, other) for other in boxes[:index])


@pytest.mark.parametrize("size", [48, 96, 224])
def test_two_things_always_stand_in_a_clear_relation(size: int) -> None:
    sprites = Sprites(size)
    met = []
    for seed in range(150):
        _, picture = draw(2, size, "twemoji", sprites, seed)
        a, b = (seen.box for seen in picture.objects)
        how = relation(a, b, size)
        assert how is not None
        assert relation(b, a, size) == INVERSE[how]
        met.append(how)
    assert all(met.count(each) > 15 for each in RELATIONS)


@pytest.mark.parametrize(
    ("b", "expected"),
    [
        ((60, 10, 80, 30), "to the left of"),
        ((60, 40, 80, 60), None),  # slanting: to the right, but as much below
        ((10, 60, 30, 80), "above"),
        ((31, 10, 50, 30), None),  # too near
    ],
)
def test_relation_is_said_only_when_clear(b: Box, expected: str | None) -> None:
    assert relation((10, 10, 30, 30), b, 96) == expected


@pytest.mark.parametrize("style", STYLES)
def test_boxes_are_tight_around_what_is_drawn(style: str) -> None:
    sprites = Sprites(96)
    for seed in range(6):
        image, picture = draw(3, 96, style, sprites, seed)
        assert isinstance(picture, Picture)
        pixels = np.asarray(image).astype(int)
        drawn = np.abs(pixels - BACKGROUNDS[picture.background]).sum(-1) > 0
        for x0, y0, x1, y1 in (seen.box for seen in picture.objects):
            inside = drawn[y0:y1, x0:x1]
            assert inside[:, 0].any() or inside[:, 1].any()
            assert inside[0].any() or inside[1].any()
            drawn[y0:y1, x0:x1] = False
        assert not drawn.any()


def test_styles_are_different_drawings() -> None:
    sprites = Sprites(64)
    for thing in KNOWN:
        looks = {sprites.upright(thing.code, style).resize((8, 8)).tobytes() for style in STYLES}
        assert len(looks) == len(STYLES)


def test_line_art_has_no_colour() -> None:
    sprites = Sprites(64)
    for thing in KNOWN:
        pixels = np.asarray(sprites.upright(thing.code, "openmoji_line")).astype(int)
        ink = pixels[pixels[..., 3] > 200][:, :3]
        assert len(ink) > 20
        assert (ink.max(-1) - ink.min(-1)).max() <= 8


@pytest.mark.parametrize(
    ("code", "style", "colour"),
    [
        ("1F34E", "openmoji", "red"),
        ("1F34E", "twemoji", "red"),
        ("1F438", "openmoji", "green"),
        ("1F346", "twemoji", "purple"),
        ("26BD", "openmoji", None),
        ("1F308", "twemoji", None),
    ],
)
def test_dominant_colours(code: str, style: str, colour: str | None) -> None:
    assert dominant_colour(Sprites(96).upright(code, style)) == colour


def test_no_object_vanishes_in_its_background() -> None:
    sprites = Sprites(48)
    for seed in range(60):
        image, picture = draw(2, 48, "twemoji", sprites, seed)
        pixels = np.asarray(image).astype(int)
        distance = np.abs(pixels - BACKGROUNDS[picture.background]).sum(-1)
        for x0, y0, x1, y1 in (seen.box for seen in picture.objects):
            assert (distance[y0:y1, x0:x1] > 40).mean() > 0.1
