"""Small embeddings with structure, shared by the evaluation tests."""

import importlib.util
import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentmodal.experiments.data.config import LoaderConfig
from latentmodal.experiments.data.shard_writer import write_shards
from latentmodal.experiments.evaluation.report import Metric
from latentmodal.experiments.evaluation.sets import EvaluationSet
from latentmodal.llm import GenerationSettings, PromptTemplate


@dataclass
class Gallery:
    """Seven pictures, the last without caption, and texts that are noisy copies of theirs."""

    images: list[Tensor]
    captions: list[str]
    image_NE: Tensor
    text_ME: Tensor
    text_to_image_M: Tensor


@pytest.fixture
def gallery() -> Gallery:
    generator = torch.Generator().manual_seed(3)
    owner_M = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5])
    image_NE = torch.randn(7, 6, generator=generator)
    noise_ME = torch.randn(len(owner_M), 6, generator=generator)
    images = [
        torch.randint(256, (3, 12 + row, 20), generator=generator, dtype=torch.uint8)
        for row in range(7)
    ]
    captions = [f"caption {row} of\tpicture {owner}" for row, owner in enumerate(owner_M.tolist())]
    return Gallery(images, captions, image_NE, image_NE[owner_M] + 1.2 * noise_ME, owner_M)


@pytest.fixture(scope="session")
def alignment_case() -> ModuleType:
    """The module `alignment_case.py`, which ranks run as a script too."""
    path = Path(__file__).with_name("alignment_case.py")
    spec = importlib.util.spec_from_file_location("alignment_case", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def alignment_folder(alignment_case: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its set and its tokenizer."""
    folder = tmp_path_factory.mktemp("alignment")
    alignment_case.write_set(folder)
    return folder


class Talker:
    """A system that says what it is told to of a picture, by prompt or in conversation.

    Pictures are of one shade, which is the number of their row.
    """

    device = torch.device("cpu")

    def __init__(self, say: Callable[[int, str], str], conversation: bool) -> None:
        self._say = say
        self.settings: list[GenerationSettings | None] = []
        self.config = SimpleNamespace(
            conversation=object() if conversation else None,
            prompt=PromptTemplate(text="{answer}"),
            generation=GenerationSettings(),
        )
        preprocess = SimpleNamespace(eval=lambda: _to_pixels)
        self.model = SimpleNamespace(
            image_encoder=SimpleNamespace(preprocess=preprocess),
            llm=SimpleNamespace(tokenizer=_tokenize),
        )

    def answer(self, pixels_BCHW, fields, *, prompt=None, settings=None) -> list[str]:
        assert self.config.conversation is None
        return self._said(pixels_BCHW, [one.get("question", "") for one in fields], settings)

    def converse(self, pixels_BCHW, conversations, settings) -> list[str]:
        assert self.config.conversation is not None
        assert all([turn.role for turn in turns] == ["user"] for turns in conversations)
        return self._said(pixels_BCHW, [turns[0].text for turns in conversations], settings)

    def caption_images(self, pixels_BCHW) -> list[str]:
        raise AssertionError("a system with a language model is asked")

    def evaluate(self, task: Any, batch_size: int = 16) -> dict[str, Metric]:
        """The section of a task that the system passes the check of."""
        task.check(self)
        loader = LoaderConfig(batch_size=batch_size, workers=0, max_bad_fraction=0.5)
        data = EvaluationSet(self, task.source, loader)
        section, confusions = task.run(self, data)
        assert confusions == []
        return section

    def _said(self, pixels_BCHW, texts, settings) -> list[str]:
        assert len(pixels_BCHW) == len(texts)
        self.settings.append(settings)
        rows = pixels_BCHW[:, 0, 0, 0].tolist()
        return [self._say(row, text) for row, text in zip(rows, texts, strict=True)]


def _tokenize(text: str, add_special_tokens: bool) -> SimpleNamespace:
    assert not add_special_tokens
    return SimpleNamespace(input_ids=text.split())


def _to_pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.fixture
def talker() -> Callable[..., Talker]:
    """Makes a system of what it says: of (row of the picture, question) a text."""
    return lambda say, conversation=False: Talker(say, conversation)


@pytest.fixture
def scenes(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    """Writes samples of the given json, one picture each, into a folder of their own.

    The picture of a `broken` one cannot be read.
    """
    numbers = itertools.count()

    def write(metas: list[dict[str, Any]]) -> Path:
        samples = []
        for row, meta in enumerate(metas):
            buffer = io.BytesIO()
            Image.new("RGB", (4, 4), (row, 0, 0)).save(buffer, "PNG")
            texts = {"captions": [f"picture {row}"], **meta}
            picture = b"" if meta.get("broken") else buffer.getvalue()
            samples.append({"__key__": f"{row:03d}", "png": picture, "json": texts})
        folder = tmp_path / f"scenes{next(numbers)}"
        write_shards(samples, folder)
        return folder

    return write
