"""Training pictures as a recipe's `data.augment` has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from latentmodal.encoders import Features, ImageEncoder, Preprocess
from latentmodal.experiments.data.augment import AugmentConfig
from latentmodal.experiments.systems.base import System
from latentmodal.experiments.training.config import OptimConfig, TrainerConfig
from latentmodal.experiments.training.freeze import FreezePlan


class Blind(ImageEncoder):
    """An encoder of which only the preprocessing counts."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.scale = nn.Parameter(torch.ones(1))
        self.preprocess = Preprocess(size=8)

    def forward(self, pixels_BCHW: torch.Tensor) -> Features:
        raise AssertionError("nobody encodes here")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        raise AssertionError("nobody encodes here")


def system() -> System:
    model = nn.Module()
    model.image_encoder = Blind()
    return System(model, FreezePlan({}), OptimConfig(), TrainerConfig(max_steps=1))


def left_is_dark(pixels_CHW: torch.Tensor) -> bool:
    return bool(pixels_CHW[:, :, 0].float().mean() < pixels_CHW[:, :, -1].float().mean())


@pytest.fixture
def halves() -> Image.Image:
    """The left half black, the right half white."""
    picture = Image.new("RGB", (32, 32))
    picture.paste((255, 255, 255), (16, 0, 32, 32))
    return picture


@pytest.mark.parametrize(("flip", "fewest", "most"), [(False, 200, 200), (True, 70, 130)])
def test_half_of_the_pictures_are_mirrored_or_none(
    halves: Image.Image, flip: bool, fewest: int, most: int
) -> None:
    torch.manual_seed(0)
    transform = system().image_transform(AugmentConfig(scale=(0.9, 1.0), flip=flip))
    assert fewest <= sum(left_is_dark(transform(halves)) for _ in range(200)) <= most


def test_pictures_are_never_mirrored_in_evaluation(halves: Image.Image) -> None:
    assert left_is_dark(Preprocess(size=8).eval()(halves))


def test_the_scale_reaches_the_crop(halves: Image.Image) -> None:
    whole = system().image_transform(AugmentConfig(scale=(1.0, 1.0)))
    crops = system().image_transform(AugmentConfig(scale=(0.2, 0.3)))
    torch.manual_seed(0)
    assert len({bytes(whole(halves).numpy()) for _ in range(9)}) == 1
    assert len({bytes(crops(halves).numpy()) for _ in range(9)}) > 5


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.9, 0.5), (0.5, 1.5)])
def test_impossible_crops_are_refused(scale: Any) -> None:
    with pytest.raises(ValueError, match=r"scale is .*; give two shares"):
        AugmentConfig(scale=scale)
