"""What TensorBoard is to show, drawn with Pillow: no plotting library to install or to configure.

Shapes: N images, M texts, E embedding width, C channels, H/W pixels, Q queries, K results.
"""

from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latentmodal.experiments.evaluation.retrieval import cosines, top_k, unit_rows

WHITE, INK, GREY, LIGHT = "#ffffff", "#202124", "#80868b", "#dadce0"
RIGHT, WRONG = "#1e8e3e", "#d93025"
IMAGE_POINT, TEXT_POINT = "#1a73e8", "#e8710a"

HEADER = 48

# Perceptually even from dark to bright, and readable for the colour-blind (viridis, sampled).
SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@cache
def font(size: int) -> Font:
    """Pillow's own font: the same on every machine."""
    return ImageFont.load_default(size)


def thumbnail(image_CHW: Tensor, size: int) -> Image.Image:
    """A uint8 picture, fitted into a white ``size`` x ``size`` square."""
    array_HWC = image_CHW.detach().cpu().permute(1, 2, 0).numpy()
    picture = Image.fromarray(array_HWC.squeeze(2) if array_HWC.shape[2] == 1 else array_HWC)
    picture = picture.convert("RGB")
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    square = Image.new("RGB", (size, size), WHITE)
    fitted = picture.resize((width, height), Image.Resampling.LANCZOS)
    square.paste(fitted, ((size - width) // 2, (size - height) // 2))
    return square


def wrap(text: str, face: Font, width: int, max_lines: int) -> list[str]:
    """Break at words to ``width`` pixels; what does not fit ends in dots."""
    # A letter takes a pixel at least; measuring what cannot fit would make long captions slow.
    text = " ".join(text[: 4 * width * max_lines].split())[: width * max_lines]
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if face.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    cut = len(lines) > max_lines
    lines = lines[:max_lines]
    while lines[-1] and (cut or face.getlength(lines[-1]) > width):
        if cut and face.getlength(lines[-1] + "...") <= width:
            lines[-1] += "..."
            break
        lines[-1], cut = lines[-1][:-1].rstrip(), True
    return lines


def similarity_picture(
    images: Sequence[Tensor], captions: Sequence[str], image_NE: Tensor, text_NE: Tensor
) -> Image.Image:
    """Cosines of N captions (rows) with N pictures (columns); caption i belongs to picture i.

    Each row's own picture is framed: green when it is the best of the row, red otherwise, with a
    dot on the cell that won.
    """
    cosines_NN = cosines(unit_rows(image_NE, "image"), unit_rows(text_NE, "text")).T.tolist()
    low, high = (f(map(f, cosines_NN)) for f in (min, max))
    count = len(captions)
    cell, left, pad = max(36, min(64, 800 // count)), 260, 12
    top = cell + 2 * pad
    canvas = Image.new("RGB", (left + count * cell + pad, top + count * cell + 56), WHITE)
    draw = ImageDraw.Draw(canvas)
    for column, image_CHW in enumerate(images):
        canvas.paste(thumbnail(image_CHW, cell - 4), (left + column * cell + 2, pad))
    for row, (caption, cosines_N) in enumerate(zip(captions, cosines_NN, strict=True)):
        y = top + row * cell
        face = font(18 if cell >= 48 else 15)
        lines = wrap(caption, face, left - 2 * pad, max_lines=2)
        draw.multiline_text(
            (left - pad, y + cell // 2),
            "\n".join(lines),
            INK,
            face,
            anchor="rm",
            align="right",
            spacing=2,
        )
        for column, cosine in enumerate(cosines_N):
            x = left + column * cell
            colour = _colour((cosine - low) / max(high - low, 1e-12))
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), colour)
            if cell >= 48:
                draw.text((x + cell / 2, y + cell / 2), _two(cosine), _on(colour), font(16), "mm")
        best = max(range(count), key=cosines_N.__getitem__)
        frame = RIGHT if best == row else WRONG
        x = left + row * cell
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=WHITE, width=5)
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=frame, width=4)
        if best != row:
            x, dot = left + best * cell + cell - 9, y + 9
            draw.circle((x, dot), 4, fill=WRONG, outline=WHITE)
    _draw_scale(draw, (left, top + count * cell + 16), low, high)
    return canvas


def retrieved_images_picture(
    images: Sequence[Tensor],
    captions: Sequence[str],
    image_NE: Tensor,
    text_ME: Tensor,
    text_to_image_M: Tensor,
    queries: Sequence[int],
    k: int = 5,
) -> Image.Image:
    """For each caption in ``queries``: its K best pictures, then its own with its rank."""
    cosines_QN, order_QN = top_k(text_ME[list(queries)], image_NE, len(image_NE))
    tile, pad, gap = 100, 12, 8
    own_x = pad + k * (tile + gap) + 2 * pad
    row_height, width = tile + 70, own_x + tile + pad
    canvas, draw = page(
        width, len(queries) * row_height, f"captions, their {k} best of {len(image_NE)} pictures"
    )
    draw.text((width - pad, pad), "own picture", GREY, font(18), anchor="ra")
    for row, query in enumerate(queries):
        y = HEADER + row * row_height
        (caption,) = wrap(captions[query], font(20), width - 2 * pad, max_lines=1)
        draw.text((pad, y), caption, INK, font(20))
        own, at = int(text_to_image_M[query]), y + 28
        order_N, cosines_N = order_QN[row].tolist(), cosines_QN[row].tolist()
        rank = order_N.index(own) + 1
        for column, (index, cosine) in enumerate(zip(order_N[:k], cosines_N, strict=False)):
            frame = RIGHT if index == own else LIGHT
            x = pad + column * (tile + gap)
            _draw_tile(canvas, images[index], (x, at), tile, frame, _two(cosine))
        found = RIGHT if rank <= k else WRONG
        _draw_tile(canvas, images[own], (own_x, at), tile, found, f"rank {rank}")
    return canvas


def retrieved_captions_picture(
    images: Sequence[Tensor],
    captions: Sequence[str],
    image_NE: Tensor,
    text_ME: Tensor,
    text_to_image_M: Tensor,
    queries: Sequence[int],
    k: int = 3,
) -> Image.Image:
    """For each picture in ``queries``: its K best captions, own ones in green.

    When none of its own is among them, the best of its own follows in red, with its rank.
    """
    cosines_QM, order_QM = top_k(image_NE[list(queries)], text_ME, len(text_ME))
    owners = text_to_image_M.tolist()
    tile, pad, line, width = 112, 12, 28, 700
    row_height, left = (k + 1) * line + 16, tile + 3 * pad
    canvas, draw = page(
        width, len(queries) * row_height, f"pictures, their {k} best of {len(text_ME)} captions"
    )
    for row, query in enumerate(queries):
        y = HEADER + row * row_height
        order_M, cosines_M = order_QM[row].tolist(), cosines_QM[row].tolist()
        own_ranks = [rank for rank, text in enumerate(order_M, 1) if owners[text] == query]
        found = bool(own_ranks) and own_ranks[0] <= k
        _draw_tile(canvas, images[query], (pad, y), tile, RIGHT if found else WRONG, "")
        lines = [
            (_two(cosine), text, RIGHT if owners[text] == query else INK)
            for text, cosine in zip(order_M[:k], cosines_M, strict=False)
        ]
        if own_ranks and not found:
            lines.append((f"#{own_ranks[0]}", order_M[own_ranks[0] - 1], WRONG))
        for place, (note, text, colour) in enumerate(lines):
            at = y + place * line
            (shown,) = wrap(captions[text], font(20), width - left - 64 - pad, max_lines=1)
            draw.text((left, at), note, GREY, font(20))
            draw.text((left + 64, at), shown, colour, font(20))
    return canvas


def point_sprite(image_CHW: Tensor, kind: str, size: int) -> Image.Image:
    """A projector point: the picture, framed in blue.

    A point of kind "text" is its picture faded and framed in orange, with a T in the corner.
    """
    sprite, colour = thumbnail(image_CHW, size), IMAGE_POINT
    if kind == "text":
        sprite, colour = Image.blend(sprite, Image.new("RGB", sprite.size, WHITE), 0.6), TEXT_POINT
    draw = ImageDraw.Draw(sprite)
    if kind == "text":
        draw.rectangle((0, 0, size * 0.36, size * 0.4), colour)
        draw.text((size * 0.2, size * 0.21), "T", WHITE, font(round(size * 0.36)), anchor="mm")
    draw.rectangle((0, 0, size - 1, size - 1), outline=colour, width=max(2, size // 16))
    return sprite


def page(width: int, height: int, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white sheet with a title, and what draws on it."""
    canvas = Image.new("RGB", (width, HEADER + height), WHITE)
    draw = ImageDraw.Draw(canvas)
    draw.text((12, 12), title, GREY, font(18))
    return canvas, draw


def _draw_tile(
    canvas: Image.Image, image_CHW: Tensor, at: tuple[int, int], size: int, frame: str, note: str
) -> None:
    x, y = at
    canvas.paste(thumbnail(image_CHW, size - 10), (x + 5, y + 5))
    draw = ImageDraw.Draw(canvas)
    width = 2 if frame == LIGHT else 5
    draw.rectangle((x, y, x + size - 1, y + size - 1), outline=frame, width=width)
    ink = GREY if frame == LIGHT else frame
    draw.text((x + size / 2, y + size + 4), note, ink, font(17), anchor="ma")


def _draw_scale(draw: ImageDraw.ImageDraw, at: tuple[int, int], low: float, high: float) -> None:
    x, y = at
    for step in range(160):
        draw.rectangle((x + 52 + step, y, x + 52 + step, y + 14), _colour(step / 159))
    draw.text((x + 44, y), f"{low:.2f}", INK, font(15), anchor="ra")
    draw.text((x + 220, y), f"{high:.2f} cosine", INK, font(15))


def _colour(share: float) -> tuple[int, int, int]:
    place = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    index = min(int(place), len(SCALE) - 2)
    mix = place - index
    red, green, blue = (
        round(a + (b - a) * mix) for a, b in zip(SCALE[index], SCALE[index + 1], strict=True)
    )
    return red, green, blue


def _on(colour: tuple[int, int, int]) -> str:
    red, green, blue = colour
    return INK if 0.3 * red + 0.6 * green + 0.1 * blue > 130 else WHITE


def _two(cosine: float) -> str:
    return f"{round(cosine, 2) + 0.0:.2f}"  # adding zero turns -0.00 into 0.00
