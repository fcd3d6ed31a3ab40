"""Sheets of a few fixed pictures: where the model looks, and what it says.

Shapes: B pictures, M queries, N tokens of a picture in a grid of G x G, C channels, H/W pixels.
"""

from collections.abc import Sequence
from math import isqrt

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from latentmodal.experiments.evaluation.pictures import (
    GREY,
    HEADER,
    IMAGE_POINT,
    INK,
    LIGHT,
    WHITE,
    font,
    page,
    thumbnail,
    wrap,
)

PAD = 12
COOL, HOT = np.array([253.0, 224.0, 71.0]), np.array([217.0, 48.0, 37.0])


def token_grid(attention_BMN: Tensor) -> Tensor | None:
    """Attention by place, (B, M, G, G), without a class token in front; None if no square fits."""
    tokens = attention_BMN.shape[2]
    side = isqrt(tokens)
    if tokens - side * side not in (0, 1):
        return None
    return attention_BMN[:, :, tokens - side * side :].unflatten(2, (side, side))


def query_attention_picture(images: Sequence[Tensor], attention_BMGG: Tensor) -> Image.Image:
    """Each picture, and beside it once more for each query, coloured by where that one looks.

    A query's colours reach from no attention to its own strongest place, or to four times the mean
    where it looks everywhere alike: even attention must not look like a pattern.
    """
    num_queries, side = attention_BMGG.shape[1], attention_BMGG.shape[2]
    tile, gap = 96, 6
    columns = min(num_queries, 8)
    lines = -(-num_queries // columns)
    left = 2 * tile if lines > 1 else tile
    block = max(left, lines * (tile + gap) - gap)
    width = max(PAD + left + PAD + columns * (tile + gap) - gap + PAD, 520)
    canvas, draw = page(
        width,
        len(images) * (block + 2 * PAD) + 24,
        f"{num_queries} queries on {side} x {side} tokens: mean attention of heads and layers",
    )
    for row, image_CHW in enumerate(images):
        y = HEADER + row * (block + 2 * PAD)
        canvas.paste(thumbnail(image_CHW, left), (PAD, y))
        draw.rectangle((PAD, y, PAD + left - 1, y + left - 1), outline=LIGHT)
        for query, heat_GG in enumerate(attention_BMGG[row]):
            line, column = divmod(query, columns)
            x = PAD + left + PAD + column * (tile + gap)
            at = (x, y + line * (tile + gap))
            canvas.paste(_overlay(image_CHW, heat_GG, tile), at)
            draw.rectangle((*at, at[0] + tile - 1, at[1] + tile - 1), outline=LIGHT)
    _draw_heat(canvas, (PAD + left + PAD, canvas.height - 28))
    return canvas


def captions_picture(
    images: Sequence[Tensor], captions: Sequence[str], generated: Sequence[str], columns: int = 4
) -> Image.Image:
    """Each picture, a true caption in grey, and the generated one below it."""
    tile, line, width = 200, 21, 232
    columns = min(columns, len(images))
    true_lines, said_lines = 2, 3
    height = tile + (true_lines + said_lines) * line + 3 * PAD + 4
    rows = -(-len(images) // columns)
    canvas, draw = page(
        max(columns * (width + PAD) + PAD, 420),
        rows * (height + PAD),
        "true caption in grey, generated caption in blue",
    )
    face = font(17)
    for place, (image_CHW, caption, said) in enumerate(
        zip(images, captions, generated, strict=True)
    ):
        row, column = divmod(place, columns)
        x, y = PAD + column * (width + PAD), HEADER + row * (height + PAD)
        draw.rounded_rectangle((x, y, x + width - 1, y + height - 1), 6, outline=LIGHT)
        canvas.paste(thumbnail(image_CHW, tile), (x + (width - tile) // 2, y + PAD))
        at = y + tile + 2 * PAD - 2
        for text in wrap(caption, face, width - 2 * PAD, true_lines):
            draw.text((x + PAD, at), text, GREY, face)
            at += line
        at += 4
        shown = said if said.strip() else "(nothing)"
        for text in wrap(shown, face, width - 2 * PAD, said_lines):
            draw.text((x + PAD, at), text, IMAGE_POINT if said.strip() else INK, face)
            at += line
    return canvas


def side_by_side_picture(
    image: Image.Image, references: Sequence[str], said: Sequence[tuple[str, str]]
) -> Image.Image:
    """One picture, what is true of it in grey, and below what each of several models says.

    Args:
        image: the picture.
        references: true captions.
        said: name of a model, and its caption.
    """
    width, line, face, small = 460, 22, font(17), font(14)
    room = width - image.width - 3 * PAD
    true = [text for own in references for text in wrap(own, face, room, 2)]
    texts = [
        (name, wrap(own.strip() or "(nothing)", face, width - 2 * PAD, 2)) for name, own in said
    ]
    top = max(image.height, len(true) * line) + 2 * PAD
    canvas = Image.new(
        "RGB", (width, top + sum((len(own) + 1) * line for _, own in texts) + PAD), WHITE
    )
    draw = ImageDraw.Draw(canvas)
    canvas.paste(image, (PAD, PAD))
    for row, text in enumerate(true):
        draw.text((image.width + 2 * PAD, PAD + row * line), text, GREY, face)
    for name, lines in texts:
        draw.text((PAD, top), name, GREY, small)
        for row, text in enumerate(lines, 1):
            draw.text((PAD, top + row * line - 4), text, IMAGE_POINT, face)
        top += (len(lines) + 1) * line
    return canvas


def _overlay(image_CHW: Tensor, heat_GG: Tensor, size: int) -> Image.Image:
    """The picture in grey under the colours of one query's attention."""
    heat_GG = heat_GG.detach().float().cpu()
    heat_GG = heat_GG / torch.maximum(heat_GG.max(), 4 * heat_GG.mean()).clamp(min=1e-12)
    smooth = Image.fromarray(heat_GG.numpy()).resize((size, size), Image.Resampling.BILINEAR)
    # Faded and without colour of its own, so that all colour is attention.
    grey = thumbnail(image_CHW, size).convert("L").convert("RGB")
    faded = Image.blend(grey, Image.new("RGB", grey.size, WHITE), 0.35)
    return _heated(faded, np.clip(np.array(smooth), 0, 1))


def _heated(picture: Image.Image, heat_HW: np.ndarray) -> Image.Image:
    """Over the picture a layer that turns from yellow to red, and opaque, as heat goes to 1."""
    heat_HW1 = heat_HW[:, :, None]
    colour_HW3 = COOL + (HOT - COOL) * heat_HW1
    opacity_HW1 = 0.8 * np.sqrt(heat_HW1)
    mixed_HW3 = np.array(picture) * (1 - opacity_HW1) + colour_HW3 * opacity_HW1
    return Image.fromarray(np.rint(mixed_HW3).astype(np.uint8))


def _draw_heat(canvas: Image.Image, at: tuple[int, int]) -> None:
    x, y = at
    draw = ImageDraw.Draw(canvas)
    draw.text((x, y), "none", GREY, font(15))
    ramp_HW = np.tile(np.linspace(0, 1, 160), (14, 1))
    canvas.paste(_heated(Image.new("RGB", (160, 14), WHITE), ramp_HW), (x + 44, y + 3))
    draw.rectangle((x + 43, y + 2, x + 204, y + 17), outline=LIGHT)
    draw.text((x + 212, y), "where this query looks most", GREY, font(15))
