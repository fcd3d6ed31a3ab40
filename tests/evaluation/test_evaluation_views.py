"""What a Q-Former says and where it looks: sheets, and the views an evaluation leaves."""

import io
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard.writer import SummaryWriter

from latentmodal.experiments.data.config import ShardSourceConfig
from latentmodal.experiments.evaluation import sheets, tensorboard
from latentmodal.experiments.evaluation.run import Evaluator
from latentmodal.experiments.evaluation.tasks import EvaluationConfig, RetrievalTask, ToldApartTask


@pytest.mark.parametrize(("tokens", "side"), [(16, 4), (17, 4), (1, 1), (2, 1)])
def test_square_grids_with_and_without_a_class_token(tokens, side):
    attention_BMN = torch.arange(float(tokens)).expand(2, 3, tokens)
    grid_BMGG = sheets.token_grid(attention_BMN)
    assert grid_BMGG.shape == (2, 3, side, side)
    assert grid_BMGG[0, 0, -1, -1] == tokens - 1
    assert grid_BMGG[0, 0, 0, 0] == tokens - side * side


@pytest.mark.parametrize("tokens", [15, 18, 7])
def test_what_is_no_square_is_left_out_with_a_line_in_the_log(tokens, tmp_path, caplog):
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8)]
    with SummaryWriter(str(tmp_path)) as writer, caplog.at_level(logging.INFO):
        tensorboard.query_attention(writer, images, torch.ones(1, 2, tokens), step=0)
    assert f"{tokens} tokens of a picture are no square grid" in caplog.text
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["images"] == []


def redness(tile_HW3: np.ndarray) -> np.ndarray:
    return tile_HW3[..., 0].astype(int) - tile_HW3[..., 2]


def test_colour_lies_where_the_query_looks_and_even_attention_stays_pale():
    image = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    peaked, even = torch.zeros(8, 8), torch.full((8, 8), 1 / 64)
    peaked[1, 6] = 1.0
    picture = np.array(sheets.query_attention_picture([image], torch.stack([peaked, even])[None]))
    left, top, tile = 2 * sheets.PAD + 96, sheets.HEADER, 96
    looked = picture[top + 2 : top + tile - 2, left + 2 : left + tile - 2]
    row, column = np.unravel_index(redness(looked).argmax(), looked.shape[:2])
    assert (row * 8 // tile, column * 8 // tile) == (1, 6)
    assert redness(looked)[tile // 2 :].max() == 0
    second = left + tile + 6
    pale = redness(picture[top + 2 : top + tile - 2, second + 2 : second + tile - 2])
    assert pale.max() == pale.min() < redness(looked).max()


@pytest.mark.parametrize("queries", [1, 8, 9, 32])
def test_sheets_of_any_number_of_queries(queries):
    images = [torch.zeros(3, 20, 30, dtype=torch.uint8)] * 2
    picture = sheets.query_attention_picture(images, torch.rand(2, queries, 5, 5))
    assert 500 < picture.width < 1200


@pytest.mark.parametrize("count", [1, 4, 5])
def test_captions_sheet_takes_awkward_texts(count):
    images = [torch.zeros(3, 20, 30, dtype=torch.uint8)] * count
    captions = ["", "w" * 500, "many words " * 99, "émoji 🍎", "one"][:count]
    picture = sheets.captions_picture(images, captions, captions[::-1])
    assert picture.width > 400


def images_of(folder, tag):
    events = EventAccumulator(str(folder)).Reload()
    return [
        (event.step, Image.open(io.BytesIO(event.encoded_image_string)))
        for event in events.Images(tag)
    ]


def views_of(folder):
    return set(EventAccumulator(str(folder)).Reload().Tags()["images"])


SPACE = {"views/similarity", "views/retrieved/by_caption", "views/retrieved/by_picture"}
ATTENTION, CAPTIONS = "views/query_attention", "views/captions"


@pytest.mark.parametrize(
    ("off", "by", "views"),
    [
        (None, "similarity", {*SPACE, ATTENTION, CAPTIONS}),
        ("itg", "itm", {*SPACE, ATTENTION}),
    ],
)
def test_views_of_an_alignment_system(alignment_case, alignment_folder, tmp_path, off, by, views):
    system = alignment_case.build_system(alignment_folder, **({off: 0.0} if off else {}))
    source = ShardSourceConfig(urls=str(alignment_folder / "shards"))
    task = ToldApartTask(source=source, negatives=("relation_swap",), by=by)
    config = EvaluationConfig(batch_size=4, tasks={"swap": task})
    with SummaryWriter(str(tmp_path)) as writer:
        evaluator = Evaluator(config, system, {}, writer)
        evaluator.run(1)
        evaluator.run(2, last=True)
    assert views_of(tmp_path) == views
    (first_step, first), (second_step, second) = images_of(tmp_path, ATTENTION)
    assert (first_step, second_step) == (1, 2)
    assert np.array_equal(np.array(first), np.array(second)), "the same samples at every step"
    assert list(tmp_path.rglob("metadata.tsv"))


class Speaker:
    """A system that only speaks: no embeddings, no Q-Former."""

    device = torch.device("cpu")

    def __init__(self, preprocess, target):
        image_encoder = SimpleNamespace(preprocess=preprocess)
        self.model = SimpleNamespace(image_encoder=image_encoder, bridge=torch.nn.Linear(1, 1))
        self.config = SimpleNamespace(target=target)

    def caption_images(self, pixels_BCHW):
        return ["a thing"] * len(pixels_BCHW)


class SpeakTask:
    """A task that reads batches itself."""

    reads_features = False

    def __init__(self, source):
        self.source = source

    def check(self, system):
        assert hasattr(system, "caption_images")

    def run(self, system, data):
        said = data.each(lambda batch: system.caption_images(batch.pixels_BCHW))
        assert len(said) == len(data.samples.captions) == 11
        return {}, []


@pytest.mark.parametrize(("target", "views"), [("caption", {CAPTIONS}), ("answer", set())])
def test_views_of_a_system_without_embeddings(
    alignment_case, alignment_folder, tmp_path, target, views
):
    preprocess = alignment_case.build_system(alignment_folder).model.image_encoder.preprocess
    source = ShardSourceConfig(urls=str(alignment_folder / "shards"))
    config = EvaluationConfig(batch_size=4, tasks={"speak": SpeakTask(source)})
    with SummaryWriter(str(tmp_path)) as writer:
        Evaluator(config, Speaker(preprocess, target), {}, writer).run(0, last=True)
    assert views_of(tmp_path) == views


def test_ranks_without_a_writer_take_part(alignment_case, alignment_folder):
    """Under FSDP a rank that did not run the model would leave the others waiting."""
    system = alignment_case.build_system(alignment_folder)
    source = ShardSourceConfig(urls=str(alignment_folder / "shards"))
    calls = []
    said = system.caption_images
    system.caption_images = lambda pixels: calls.append(len(pixels)) or said(pixels)
    config = EvaluationConfig(batch_size=4, tasks={"itc": RetrievalTask(source=source)})
    Evaluator(config, system, {}, writer=None).run(0)
    assert calls == [11]
