"""Chunked encoding: exact gradients, dropout replayed, one chunk of activations at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentmodal.bridges import ContrastiveHeadConfig, encode_in_chunks, info_nce

ROWS = 10


class Towers(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 5))
        self.text = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 6))
        self.head = ContrastiveHeadConfig(image_dim=5, text_dim=6, embed_dim=4).build()

    def encode(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(images), self.text(texts)

    def loss(self, image_BD: Tensor, text_BD: Tensor) -> Tensor:
        out = self.head(image_BD, text_BD)
        return info_nce(out.image_BE, out.text_BE, out.logit_scale)


@pytest.fixture
def towers(request: pytest.FixtureRequest) -> Towers:
    torch.manual_seed(0)
    return Towers(request.param).double()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(ROWS, 4, generator=generator, dtype=torch.float64),
        torch.randn(ROWS, 3, generator=generator, dtype=torch.float64),
    )


def take_gradients(module: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    return grads


def assert_all_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("towers", [0.0], indirect=True)
@pytest.mark.parametrize("chunk_size", [1, 3, 5, ROWS, 99])  # 3 leaves a remainder of one row
def test_equals_full_batch(towers: Towers, batch: tuple[Tensor, Tensor], chunk_size: int) -> None:
    towers.loss(*towers.encode(*batch)).backward()
    expected = take_gradients(towers)
    towers.loss(*encode_in_chunks(towers.encode, batch, chunk_size)).backward()
    assert_all_close(take_gradients(towers), expected)


@pytest.mark.parametrize("towers", [0.5], indirect=True)
def test_dropout_is_replayed(towers: Towers, batch: tuple[Tensor, Tensor]) -> None:
    """Against the two passes of GradCache, written out with the generator rewound by hand."""
    chunks = list(zip(*(x.split(3) for x in batch), strict=True))
    torch.manual_seed(7)
    states, features = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(torch.get_rng_state())
            features.append(towers.encode(*chunk))
    image, text = (torch.cat(parts).requires_grad_() for parts in zip(*features, strict=True))
    towers.loss(image, text).backward()
    after = torch.get_rng_state()
    start = 0
    for chunk, state in zip(chunks, states, strict=True):
        torch.set_rng_state(state)
        again, rows = towers.encode(*chunk), slice(start, start + len(chunk[0]))
        torch.autograd.backward(again, (image.grad[rows], text.grad[rows]))
        start = rows.stop
    expected = take_gradients(towers)

    torch.manual_seed(7)
    found_image, found_text = encode_in_chunks(towers.encode, batch, 3)
    torch.testing.assert_close(found_image, image.detach(), check_stride=False)
    towers.loss(found_image, found_text).backward()
    assert_all_close(take_gradients(towers), expected)
    # Replaying must not disturb the random numbers of whatever comes next.
    assert torch.equal(torch.get_rng_state(), after)


class Marked(torch.autograd.Function):
    """Identity that notes when the gradient of its chunk has come all the way down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[str], label: str) -> Tensor:
        ctx.log, ctx.label = log, label
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.log.append(f"done {ctx.label}")
        return grad, None, None


def test_backward_holds_one_chunk_at_a_time() -> None:
    log: list[str] = []
    weight = torch.ones(1, requires_grad=True)

    def encode(x: Tensor) -> Tensor:
        label = str(int(x[0]))
        log.append(f"encode {label}")
        return torch.sin(Marked.apply(x * weight, log, label)).exp()

    out = encode_in_chunks(encode, (torch.arange(3.0),), 1)
    assert log == ["encode 0", "encode 1", "encode 2"]
    log.clear()
    out.square().sum().backward()
    assert log == ["encode 2", "done 2", "encode 1", "done 1", "encode 0", "done 0"]


def test_forward_keeps_no_activations() -> None:
    layer = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 2))
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        encode_in_chunks(layer, (torch.randn(ROWS, 4),), 2)
    assert sum(kept) < ROWS * 100


def test_single_tensor_and_frozen_encoder(batch: tuple[Tensor, Tensor]) -> None:
    layer = nn.Linear(4, 2).double().requires_grad_(False)
    out = encode_in_chunks(layer, (batch[0],), 4)
    torch.testing.assert_close(out, layer(batch[0]))
    assert not out.requires_grad


@pytest.mark.parametrize(
    ("rows", "chunk_size", "message"),
    [((4, 4), 0, "chunk_size is 0"), ((4, 3), 2, r"\[4, 3\] rows"), ((), 2, "at least one")],
)
def test_arguments_are_checked(rows: tuple[int, ...], chunk_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_in_chunks(lambda *x: x, tuple(torch.zeros(n) for n in rows), chunk_size)
