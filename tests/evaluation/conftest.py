"""Small embeddings with structure, shared by the evaluation tests."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor


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
