"""The views are written, hold what they claim, and survive awkward pictures and captions."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard.writer import SummaryWriter

from latentmodal.experiments.evaluation import pictures, tensorboard


def count_colour(picture: Image.Image, colour: str) -> int:
    return int((np.array(picture) == ImageColor.getrgb(colour)).all(axis=2).sum())


@pytest.fixture
def pairs(gallery):
    """One caption per picture, perfectly embedded: (images, captions, image_NE, text_NE)."""
    captions = [f"caption {row}" for row in range(7)]
    return gallery.images, captions, gallery.image_NE, gallery.image_NE


def test_similarity_frames_are_green_only_when_right(pairs):
    images, captions, image_NE, text_NE = pairs
    right = pictures.similarity_picture(images, captions, image_NE, text_NE)
    assert count_colour(right, pictures.RIGHT) > 0
    assert count_colour(right, pictures.WRONG) == 0
    wrong = pictures.similarity_picture(images, captions, image_NE, text_NE.roll(1, 0))
    assert count_colour(wrong, pictures.RIGHT) == 0
    assert count_colour(wrong, pictures.WRONG) > 0


def test_retrieved_frames(pairs):
    images, captions, image_NE, text_NE = pairs
    own_M = torch.arange(7)
    right = pictures.retrieved_images_picture(images, captions, image_NE, text_NE, own_M, [0, 3], 1)
    assert count_colour(right, pictures.WRONG) == 0
    assert count_colour(right, pictures.RIGHT) > 0
    opposite = -image_NE  # its own picture comes last
    wrong = pictures.retrieved_images_picture(images, captions, image_NE, opposite, own_M, [0], 5)
    assert count_colour(wrong, pictures.RIGHT) == 0
    by_picture = pictures.retrieved_captions_picture(
        images, captions, image_NE, opposite, own_M, [0], 3
    )
    assert count_colour(by_picture, pictures.RIGHT) == 0
    assert count_colour(by_picture, pictures.WRONG) > 0


@pytest.mark.parametrize(
    "text", ["", "one", "w" * 100_000, "several words " * 9_000, "émoji 🍎 苹果 \u2028x"]
)
@pytest.mark.parametrize("max_lines", [1, 2])
def test_wrapped_text_fits(text, max_lines):
    face = pictures.font(15)
    lines = pictures.wrap(text, face, 200, max_lines)
    assert 1 <= len(lines) <= max_lines
    assert all(face.getlength(line) <= 200 for line in lines)
    assert " ".join(lines) == " ".join(text.split()) or lines[-1].endswith("...")


@pytest.mark.parametrize("shape", [(3, 1, 300), (3, 300, 1), (1, 9, 9), (3, 64, 64)])
def test_thumbnail_of_any_shape(shape):
    assert pictures.thumbnail(torch.zeros(shape, dtype=torch.uint8), 40).size == (40, 40)


def test_views_reach_the_log(gallery, tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        captions = [gallery.captions[0]] * 7
        for step in (1, 2):
            tensorboard.similarity_matrix(
                writer, gallery.images, captions, gallery.image_NE, gallery.image_NE, step
            )
            tensorboard.retrieved_examples(
                writer,
                gallery.images,
                gallery.captions,
                gallery.image_NE,
                gallery.text_ME,
                gallery.text_to_image_M,
                step,
            )
        tensorboard.recipe_text(writer, "seed: 0\nmodel:\n  width: 8\n")
    events = EventAccumulator(str(tmp_path)).Reload()
    views = {"views/similarity", "views/retrieved/by_caption", "views/retrieved/by_picture"}
    assert set(events.Tags()["images"]) == views
    for tag in views:
        assert [event.step for event in events.Images(tag)] == [1, 2]
        encoded = events.Images(tag)[0].encoded_image_string
        assert min(Image.open(io.BytesIO(encoded)).size) > 200
    (event,) = events.Tensors("recipe/text_summary")
    assert event.tensor_proto.string_val[0] == b"```yaml\nseed: 0\nmodel:\n  width: 8\n```"


def test_projector_files_agree_line_by_line(gallery, tmp_path):
    splits = ["seen", "unseen"] * 3 + ["seen"]
    captions = ["tab\there", "line\nbreak", "u\u2028v", "", "plain", "e", "f"]
    with SummaryWriter(str(tmp_path)) as writer:
        tensorboard.embedding_projector(
            writer,
            gallery.images,
            captions,
            gallery.image_NE,
            2 * gallery.image_NE,
            splits,
            step=3,
        )
    (folder,) = [path.parent for path in tmp_path.rglob("metadata.tsv")]
    header, *metadata = (folder / "metadata.tsv").read_text(encoding="utf-8").split("\n")[:15]
    assert header == "kind\tcaption\tsplit"
    assert metadata[0] == "image\ttab here\tseen"
    assert metadata[7] == "text\ttab here\tseen"
    assert metadata[9] == "text\tu v\tseen"
    points = np.loadtxt(folder / "tensors.tsv", delimiter="\t")
    assert points.shape == (14, 6)
    np.testing.assert_allclose(points[:7], points[7:], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1.0, atol=1e-5)
    side = 4 * tensorboard.SPRITE  # 14 points in a 4 x 4 sheet
    assert Image.open(folder / "sprite.png").size == (side, side)


def test_projector_is_cut_to_max_pairs(gallery, tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        tensorboard.embedding_projector(
            writer,
            gallery.images,
            ["c"] * 7,
            gallery.image_NE,
            gallery.image_NE,
            ["seen"] * 7,
            step=0,
            max_pairs=2,
        )
    (tensors,) = tmp_path.rglob("tensors.tsv")
    assert len(np.loadtxt(tensors, delimiter="\t")) == 4
