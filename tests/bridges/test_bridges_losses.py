"""The losses on one process, against open_clip and against formulas written out."""

import math

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from latentmodal.bridges import info_nce, sigmoid_loss
from latentmodal.bridges.losses import sigmoid

EMBED = 6


def unit_rows(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, EMBED, generator=generator, dtype=torch.float64)
    return F.normalize(x, dim=-1).requires_grad_()


def leaves(images: int = 7, texts: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale = torch.tensor([9.0], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    return unit_rows(images, 0), unit_rows(texts, 1), scale, bias


def assert_same_loss_and_gradients(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * theirs, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_info_nce_equals_open_clip() -> None:
    image, text, scale, _ = leaves()
    theirs = open_clip.loss.ClipLoss()(image, text, scale)
    assert_same_loss_and_gradients(info_nce(image, text, scale), theirs, [image, text, scale])


def test_sigmoid_equals_open_clip() -> None:
    image, text, scale, bias = leaves()
    theirs = open_clip.loss.SigLipLoss()(image, text, scale, bias)
    ours = sigmoid_loss(image, text, scale, bias)
    assert_same_loss_and_gradients(ours, theirs, [image, text, scale, bias])


def test_label_smoothing_spreads_its_share() -> None:
    image, text, scale, _ = leaves()
    target = 0.8 * torch.eye(7, dtype=torch.float64) + 0.2 / 7
    logits = scale * image @ text.T
    rows, columns = logits.log_softmax(1), logits.log_softmax(0)
    theirs = -(target * (rows + columns)).sum() / 14
    ours = info_nce(image, text, scale, label_smoothing=0.2)
    assert_same_loss_and_gradients(ours, theirs, [image, text, scale])


# Image 0 and 3 are the same picture; picture 4 has no caption here; caption 9 no picture.
IMAGE_IDS = torch.tensor([5, 2, 7, 5, 4])
TEXT_IDS = torch.tensor([5, 5, 2, 7, 7, 7, 9, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_info_nce_shares_the_target_among_captions(smoothing: float) -> None:
    image, text, scale, _ = leaves(5, 8)
    logits = scale * image @ text.T
    theirs = torch.zeros((), dtype=torch.float64)
    for table, row_ids, column_ids in (
        (logits, IMAGE_IDS.tolist(), TEXT_IDS.tolist()),
        (logits.T, TEXT_IDS.tolist(), IMAGE_IDS.tolist()),
    ):
        for row, row_id in zip(table, row_ids, strict=True):
            right = [j for j, column_id in enumerate(column_ids) if column_id == row_id]
            log_p = row.log_softmax(0)
            for j in right:
                theirs = theirs - (1 - smoothing) * log_p[j] / len(right) / len(table) / 2
            if right:
                theirs = theirs - smoothing * log_p.mean() / len(table) / 2
    ours = info_nce(
        image, text, scale, image_ids_B=IMAGE_IDS, text_ids_M=TEXT_IDS, label_smoothing=smoothing
    )
    assert_same_loss_and_gradients(ours, theirs, [image, text, scale])


@pytest.mark.parametrize("chunk_pairs", [1, 20, sigmoid.CHUNK_PAIRS])
def test_sigmoid_with_ids_equals_loop(chunk_pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sigmoid, "CHUNK_PAIRS", chunk_pairs)
    image, text, scale, bias = leaves(5, 8)
    theirs = torch.zeros((), dtype=torch.float64)
    for i, image_id in enumerate(IMAGE_IDS.tolist()):
        for t, text_id in enumerate(TEXT_IDS.tolist()):
            sign = 1 if image_id == text_id else -1
            logit = scale[0] * (image[i] @ text[t]) + bias[0]
            theirs = theirs + torch.log1p(torch.exp(-sign * logit)) / len(IMAGE_IDS)
    ours = sigmoid_loss(image, text, scale, bias, image_ids_B=IMAGE_IDS, text_ids_M=TEXT_IDS)
    assert_same_loss_and_gradients(ours, theirs, [image, text, scale, bias])


@pytest.mark.parametrize("chunk_pairs", [1, 20])
def test_sigmoid_diagonal_survives_chunks(
    chunk_pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, text, scale, bias = leaves()
    whole = sigmoid_loss(image, text, scale, bias)
    monkeypatch.setattr(sigmoid, "CHUNK_PAIRS", chunk_pairs)
    chunked = sigmoid_loss(image, text, scale, bias)
    assert_same_loss_and_gradients(chunked, whole, [image, text, scale, bias])


def test_ids_that_pair_rows_equal_no_ids() -> None:
    image, text, scale, bias = leaves()
    ids = torch.tensor([3, 1, 4, 15, 9, 2, 6])
    pairs = {"image_ids_B": ids, "text_ids_M": ids}
    torch.testing.assert_close(info_nce(image, text, scale, **pairs), info_nce(image, text, scale))
    torch.testing.assert_close(
        sigmoid_loss(image, text, scale, bias, **pairs), sigmoid_loss(image, text, scale, bias)
    )


@pytest.mark.parametrize("frozen", range(4))
def test_sigmoid_with_a_frozen_input(frozen: int) -> None:
    inputs = list(leaves())
    expected = torch.autograd.grad(sigmoid_loss(*inputs), inputs)
    inputs[frozen] = inputs[frozen].detach()
    sigmoid_loss(*inputs).backward()
    for i, (leaf, value) in enumerate(zip(inputs, expected, strict=True)):
        if i == frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, value)


class LargestOutput(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns, and counts products."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_sigmoid_never_holds_a_full_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sigmoid, "CHUNK_PAIRS", 512)
    image, text, scale, bias = leaves(64, 64)
    with LargestOutput() as watch:
        sigmoid_loss(image, text, scale, bias).backward()
    assert watch.numel == 512 > 64 * EMBED
    assert watch.products == 3 * 8


def test_sigmoid_without_grad_takes_no_gradients() -> None:
    image, text, scale, bias = leaves()
    with torch.no_grad(), LargestOutput() as watch:
        sigmoid_loss(image, text, scale, bias)
    assert watch.products == 1


def test_losses_are_computed_in_float32_under_autocast() -> None:
    image, text, scale, bias = (x.detach().float() for x in leaves())
    expected = info_nce(image, text, scale), sigmoid_loss(image, text, scale, bias)
    with torch.autocast("cpu", torch.bfloat16):
        found = info_nce(image, text, scale), sigmoid_loss(image, text, scale, bias)
    assert [x.dtype for x in found] == [torch.float32] * 2
    assert found == expected


def test_half_precision_features_get_half_precision_gradients() -> None:
    image, text, scale, bias = leaves()
    for loss in (
        lambda i, t: info_nce(i, t, scale.float()),
        lambda i, t: sigmoid_loss(i, t, scale.float(), bias.float()),
    ):
        low = [x.detach().bfloat16().requires_grad_() for x in (image, text)]
        high = [x.detach().float().requires_grad_() for x in low]
        loss(*low).backward()
        loss(*high).backward()
        for a, b in zip(low, high, strict=True):
            torch.testing.assert_close(a.grad, b.grad.bfloat16())


def test_sigmoid_stays_finite_at_extreme_logits() -> None:
    image = torch.eye(2, requires_grad=True)
    scale = torch.tensor([1e4], requires_grad=True)
    loss = sigmoid_loss(image, -torch.eye(2), scale, torch.zeros(1))
    loss.backward()
    assert loss.item() == pytest.approx(1e4 + math.log(2))
    assert image.grad.isfinite().all() and scale.grad.isfinite().all()


def test_compiles() -> None:
    image, text, scale, bias = leaves()
    expected = sigmoid_loss(image, text, scale, bias)
    compiled = torch.compile(sigmoid_loss, backend="aot_eager")(image, text, scale, bias)
    assert_same_loss_and_gradients(compiled, expected, [image, text, scale, bias])


@pytest.mark.parametrize("loss", [info_nce, sigmoid_loss])
@pytest.mark.parametrize(
    ("image", "text", "ids", "message"),
    [
        ((4, 3), (4, 5), {}, "same embed_dim"),
        ((4, 3), (6, 3), {}, "pass image_ids_B and text_ids_M"),
        ((4, 3), (4, 3), {"text_ids_M": torch.arange(4)}, "image_ids_B is missing"),
        ((4, 3), (4, 3), {"image_ids_B": torch.arange(4)}, "text_ids_M is missing"),
        (
            (4, 3),
            (6, 3),
            {"image_ids_B": torch.arange(4), "text_ids_M": torch.arange(4)},
            r"text_ids_M is torch.int64 of shape \(4,\)",
        ),
        (
            (4, 3),
            (4, 3),
            {"image_ids_B": torch.ones(4), "text_ids_M": torch.arange(4)},
            "image_ids_B is torch.float32",
        ),
    ],
)
def test_arguments_that_do_not_fit(loss, image, text, ids, message) -> None:  # type: ignore[no-untyped-def]
    rest = (torch.ones(1),) if loss is info_nce else (torch.ones(1), torch.zeros(1))
    with pytest.raises(ValueError, match=message):
        loss(torch.randn(image), torch.randn(text), *rest, **ids)


def test_smoothing_and_bias_are_checked() -> None:
    image, text, scale, _ = leaves()
    with pytest.raises(ValueError, match="label_smoothing is 1"):
        info_nce(image, text, scale, label_smoothing=1.0)
    with pytest.raises(ValueError, match="init_logit_bias"):
        sigmoid_loss(image, text, scale, None)
