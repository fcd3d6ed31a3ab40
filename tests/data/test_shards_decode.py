"""Each way a picture or caption can be bad ends in its own cause; each odd but good one is read."""

from __future__ import annotations

import io
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from latentmodal.experiments.data.decode import clean_caption, decode_image, decode_sample
from latentmodal.experiments.data.faults import BadSampleError, Cause
from latentmodal.experiments.data.sample import RawSample

LIMIT = 10_000


def _encoded(image: Image.Image, fmt: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def _noise(size=(32, 24)) -> Image.Image:
    array = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(array)


def _pixel(data: bytes, at=(0, 0)) -> tuple[int, ...]:
    image = decode_image(data, max_pixels=LIMIT)
    assert image.mode == "RGB"
    return image.getpixel(at)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", Cause.ZERO_BYTE_IMAGE),
        (b"<html>not found</html>", Cause.IMAGE_FORMAT),
        (_encoded(_noise(), "GIF"), Cause.IMAGE_FORMAT),
        (_encoded(_noise(), "EPS"), Cause.IMAGE_FORMAT),
        (_encoded(Image.new("F", (4, 4), 0.7), "TIFF"), Cause.IMAGE_FORMAT),
        (_encoded(_noise(), "JPEG")[:-200], Cause.CORRUPT_IMAGE),
        (_encoded(_noise(), "PNG")[:-200], Cause.CORRUPT_IMAGE),
        (_encoded(_noise(), "WEBP")[:-100], Cause.CORRUPT_IMAGE),
        (_encoded(Image.new("RGB", (101, 100)), "PNG"), Cause.HUGE_IMAGE),
    ],
)
def test_bad_images_have_a_cause(data, cause):
    with pytest.raises(BadSampleError) as caught:
        decode_image(data, max_pixels=LIMIT)
    assert caught.value.cause is cause


def test_half_a_jpeg_is_refused_even_if_another_library_allows_it(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(BadSampleError):
        decode_image(_encoded(_noise(), "JPEG")[:-200], max_pixels=LIMIT)


def test_huge_image_is_refused_before_its_pixels_are_allocated():
    bomb = _encoded(Image.new("1", (9000, 9000)), "PNG")
    tracemalloc.start()
    with pytest.raises(BadSampleError, match="9000 x 9000"):
        decode_image(bomb, max_pixels=1_000_000)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(("value", "expected"), [(300, 1), (65535, 255), (32896, 128), (0, 0)])
def test_sixteen_bit_png_is_rescaled_not_clipped(value, expected):
    grey = Image.fromarray(np.full((3, 3), value, dtype=np.uint16))
    assert _pixel(_encoded(grey, "PNG")) == (expected,) * 3


def test_transparent_pixels_take_the_background_not_their_hidden_colour():
    assert _pixel(_encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "PNG")) == (255, 255, 255)
    assert _pixel(_encoded(Image.new("LA", (2, 2), (0, 0)), "PNG")) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 3)
    palette.putpalette([9, 8, 7] * 256)
    assert _pixel(_encoded(palette, "PNG", transparency=3)) == (255, 255, 255)
    assert _pixel(_encoded(palette, "PNG")) == (9, 8, 7)
    red = _encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "PNG")
    on_blue = decode_image(red, max_pixels=LIMIT, background=(0, 0, 255))
    assert on_blue.getpixel((0, 0)) == (0, 0, 255)


def test_cmyk_grey_and_bilevel_become_rgb():
    cyan = _pixel(_encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG"))
    assert cyan[0] < 10 < 245 < min(cyan[1:])
    assert _pixel(_encoded(Image.new("L", (8, 8), 77), "PNG")) == (77, 77, 77)
    assert _pixel(_encoded(Image.new("1", (8, 8), 1), "PNG")) == (255, 255, 255)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to view
    image = decode_image(_encoded(_noise((32, 24)), "JPEG", exif=exif), max_pixels=LIMIT)
    assert image.size == (24, 32)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_shapes_are_read(size):
    assert decode_image(_encoded(Image.new("RGB", size), "PNG"), max_pixels=LIMIT).size == size


def test_first_frame_of_an_animation_is_used():
    frames = [Image.new("RGB", (4, 4), (200, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 200))]
    data = _encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert _pixel(data) == (200, 0, 0)


def test_png_with_a_text_bomb_is_skipped_in_bounded_memory():
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * 20_000_000, zip=True)
    with pytest.raises(BadSampleError) as caught:
        decode_image(_encoded(Image.new("RGB", (2, 2)), "PNG", pnginfo=info), max_pixels=LIMIT)
    assert caught.value.cause is Cause.CORRUPT_IMAGE


@pytest.mark.parametrize("side", [100, 101, 200, 201, 400, 900])
def test_draft_never_decodes_below_the_asked_side(side):
    data = _encoded(_noise((1000, 800)), "JPEG")
    image = decode_image(data, max_pixels=10**6, draft_side=side)
    assert min(image.size) >= min(side, 800)
    if side == 100:
        assert image.size == (125, 100)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a\r\nred\x0b\x0capple\u2028on a\u00a0table\t", "a red apple on a table"),
        ("a\x00b\x85c\x7fd", "a b c d"),
        ("half \ud83d pair", "half � pair"),
        ("שלום 👍🏽 مرحبا", "שלום 👍🏽 مرحبا"),
        (" \n\u2029 ", ""),
    ],
)
def test_captions_become_one_writable_line(text, clean):
    assert clean_caption(text, 100) == (clean, False)
    clean.encode("utf-8")


def test_long_captions_are_cut_in_bounded_time():
    assert clean_caption("word " * 20_000, 12) == ("word word wo", True)
    started = time.perf_counter()
    clean_caption(" " * 50_000_000 + "x", 100)
    assert time.perf_counter() - started < 1.0


def _decode(members: dict[str, bytes], **options):
    raw = RawSample("a.tar", "0001", 0, members)
    options = {"max_pixels": LIMIT, "max_caption_chars": 20, **options}
    return decode_sample(raw, lambda image: image, **options)


PNG = _encoded(Image.new("RGB", (2, 2)), "PNG")


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ({"txt": b"a cat"}, Cause.NO_IMAGE),
        ({"png": PNG}, Cause.NO_CAPTION),
        ({"png": PNG, "txt": b""}, Cause.NO_CAPTION),
        ({"png": PNG, "txt": " \r\n\u2028 ".encode()}, Cause.NO_CAPTION),
        ({"png": PNG, "json": b'{"captions": ["", " "]}'}, Cause.NO_CAPTION),
        ({"png": PNG, "json": b'{"caption": null}'}, Cause.NO_CAPTION),
        ({"png": PNG, "txt": b"a cat", "json": b'{"half'}, Cause.BAD_JSON),
        ({"png": PNG, "txt": b"a cat", "json": b"[1]"}, Cause.BAD_JSON),
        ({"png": PNG, "txt": b"a cat", "json": b"[" * 100_000}, Cause.BAD_JSON),
        ({"png": b"", "txt": b"a cat"}, Cause.ZERO_BYTE_IMAGE),
    ],
)
def test_bad_samples_have_a_cause(members, cause):
    with pytest.raises(BadSampleError) as caught:
        _decode(members)
    assert caught.value.cause is cause


def test_captions_come_from_json_list_then_txt_then_json_caption():
    both = b'{"captions": ["x", "", "y"], "caption": "z", "url": "u"}'
    assert _decode({"png": PNG, "txt": b"t", "json": both}).captions == ["x", "y"]
    assert _decode({"png": PNG, "txt": b"t", "json": both}).meta["url"] == "u"
    assert _decode({"png": PNG, "txt": b"t", "json": b'{"caption": "z"}'}).captions == ["t"]
    assert _decode({"png": PNG, "json": b'{"caption": "z"}'}).captions == ["z"]


def test_questions_make_up_for_missing_captions():
    meta = b'{"captions": [], "questions": [{"question": "q", "answer": "a"}]}'
    sample = _decode({"png": PNG, "json": meta}, caption="random", seed=3)
    assert sample.captions == [] and sample.caption == ""
    assert sample.meta["questions"][0]["answer"] == "a"
    assert _decode({"png": PNG, "txt": b"t", "json": meta}).captions == ["t"]


def test_a_conversation_makes_up_for_missing_captions():
    meta = b'{"conversation": [{"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}]}'
    sample = _decode({"png": PNG, "json": meta})
    assert sample.captions == [] and sample.meta["conversation"][1]["text"] == "a"
    with pytest.raises(BadSampleError, match="no caption"):
        _decode({"png": PNG, "json": b'{"conversation": []}'})


def test_a_sample_of_img2dataset_without_txt_has_the_caption_of_its_json():
    meta = b'{"caption": "a cat ", "url": "u", "key": "000000000", "status": "success", "width": 2}'
    sample = _decode({"jpg": PNG, "json": meta})
    assert (sample.captions, sample.caption) == (["a cat"], "a cat")


@pytest.mark.parametrize("questions", [b"[]", b"null", b"3", b'{"question": "q"}'])
def test_no_questions_do_not(questions):
    with pytest.raises(BadSampleError, match="no caption"):
        _decode({"png": PNG, "json": b'{"captions": [], "questions": ' + questions + b"}"})


def test_random_caption_depends_on_the_visit_only_and_reaches_all():
    members = {"png": PNG, "json": b'{"captions": ["a", "b", "c"]}'}
    chosen = [_decode(members, caption="random", seed=s).caption for s in range(40)]
    assert chosen == [_decode(members, caption="random", seed=s).caption for s in range(40)]
    assert set(chosen) == {"a", "b", "c"}
    assert {_decode(members, caption="first", seed=s).caption for s in range(5)} == {"a"}


def test_a_cut_caption_is_counted_but_keeps_its_sample():
    sample = _decode({"jpg": PNG, "txt": b"x" * 21})
    assert sample.caption == "x" * 20
    assert [fault.cause for fault in sample.faults] == [Cause.CAPTION_CUT]
    assert not Cause.CAPTION_CUT.loses_sample
