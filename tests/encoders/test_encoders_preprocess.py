import pickle

import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from torchvision.transforms.functional import pil_to_tensor, resized_crop

from latentmodal.encoders import Preprocess


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = torch.randint(
        256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return Image.fromarray(pixels.numpy(), "RGB").convert(mode)


@pytest.mark.parametrize("size", [(97, 64), (64, 97), (50, 50), (31, 300), (20, 13)])
def test_centre_crop_agrees_with_the_usual_two_steps(size: tuple[int, int]) -> None:
    image = noise(*size).filter(ImageFilter.GaussianBlur(1))
    expected = pil_to_tensor(CenterCrop(32)(Resize(32, InterpolationMode.BICUBIC)(image)))
    got = Preprocess(size=32).eval()(image)
    difference = (got.int() - expected.int()).abs()
    assert difference.max() <= 1, "more than a rounding step apart"


def test_squash_shows_the_whole_picture() -> None:
    image = noise(60, 20)
    expected = pil_to_tensor(image.resize((16, 16), Image.Resampling.BILINEAR))
    got = Preprocess(size=16, resize="squash", interpolation="bilinear").eval()(image)
    assert torch.equal(got, expected)


def test_train_transform_agrees_with_crop_then_resize() -> None:
    image = Image.radial_gradient("L").convert("RGB")
    transform = Preprocess(size=32).train(scale=(0.3, 0.9))
    for seed in range(5):
        torch.manual_seed(seed)
        got = transform(image).float()
        torch.manual_seed(seed)
        box = _torchvision_box(image)
        expected = pil_to_tensor(
            resized_crop(image, *box, [32, 32], InterpolationMode.BICUBIC)
        ).float()
        # The border reads the picture beyond the crop instead of repeating the crop's own edge.
        assert (got - expected).abs()[:, 2:-2, 2:-2].max() <= 1
        assert (got - expected).abs().mean() < 0.5


def _torchvision_box(image: Image.Image) -> tuple[int, int, int, int]:
    from torchvision.transforms import RandomResizedCrop

    return RandomResizedCrop.get_params(image, [0.3, 0.9], [3 / 4, 4 / 3])


def test_train_transform_follows_torchs_generator() -> None:
    image, transform = noise(64, 48), Preprocess(size=16).train(scale=(0.2, 0.8))
    torch.manual_seed(3)
    first, second = transform(image), transform(image)
    torch.manual_seed(3)
    assert torch.equal(transform(image), first)
    state = torch.get_rng_state()
    torch.set_rng_state(state)
    assert torch.equal(transform(image), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_mode_gives_contiguous_uint8(mode: str) -> None:
    preprocess = Preprocess(size=24)
    for transform in (preprocess.train(), preprocess.eval()):
        pixels = transform(noise(40, 30, "L" if mode == "LA" else mode).convert(mode))
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (3, 24, 24)
        assert pixels.is_contiguous()


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_extreme_shapes(size: tuple[int, int], resize: str) -> None:
    preprocess = Preprocess(size=224, resize=resize)
    for transform in (preprocess.train(scale=(0.05, 1.0)), preprocess.eval()):
        assert transform(Image.new("RGB", size, (10, 20, 30)))[:, 100, 100].tolist() == [10, 20, 30]


def test_transforms_travel_to_spawned_workers() -> None:
    image = noise(40, 30)
    for transform in (Preprocess(size=8).train(), Preprocess(size=8).eval()):
        copy = pickle.loads(pickle.dumps(transform))  # noqa: S301
        torch.manual_seed(0)
        expected = transform(image)
        torch.manual_seed(0)
        assert torch.equal(copy(image), expected)


@pytest.mark.parametrize(
    "fields", [{"size": 0}, {"size": 8, "interpolation": "box"}, {"size": 8, "resize": "pad"}]
)
def test_bad_settings_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=list(fields)[-1]):
        Preprocess(**fields)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.9, 0.5), (0.5, 1.5)])
def test_bad_scale_is_refused(scale: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="scale"):
        Preprocess(size=8).train(scale=scale)
