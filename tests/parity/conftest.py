"""A tiny dual encoder of ours, and the comparison every parity test makes."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentmodal.encoders import TextTransformerConfig, TimmImageConfig

BATCH, SIZE, VOCAB, CONTEXT, EMBED = 3, 32, 60, 10, 24
EOT = VOCAB - 1


class PlainHead(nn.Module):
    """Projections and scalars under the names that checkpoints are converted to."""

    def __init__(
        self, image_width: int | None, text_width: int, *, text_bias: bool, logit_bias: bool
    ) -> None:
        super().__init__()
        self.image_proj = (
            nn.Identity() if image_width is None else nn.Linear(image_width, EMBED, bias=False)
        )
        text_out = text_width if image_width is None else EMBED
        self.text_proj = nn.Linear(text_width, text_out, bias=text_bias)
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))
        if logit_bias:
            self.logit_bias = nn.Parameter(torch.tensor([-3.0]))


class DualEncoder(nn.Module):
    def __init__(
        self, image: TimmImageConfig, text: TextTransformerConfig, *, siglip: bool
    ) -> None:
        super().__init__()
        self.image_encoder = image.build()
        self.text_encoder = text.build()
        image_width = None if siglip else self.image_encoder.pooled_width
        self.head = PlainHead(
            image_width, self.text_encoder.width, text_bias=siglip, logit_bias=siglip
        )

    def forward(self, pixels_BCHW: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        image_BE = self.head.image_proj(self.image_encoder(pixels_BCHW).pooled_BD)
        text_BE = self.head.text_proj(self.text_encoder(ids_BT).pooled_BD)
        return F.normalize(image_BE, dim=-1), F.normalize(text_BE, dim=-1)


class Batch(NamedTuple):
    """Pixels as ours takes them, the same normalised by hand as theirs takes them, and ids."""

    pixels_BCHW: Tensor
    normalised_BCHW: Tensor
    ids_BT: Tensor


@pytest.fixture
def make_dual_encoder() -> Callable[..., DualEncoder]:
    def make(*, siglip: bool, activation: str, seed: int = 0) -> DualEncoder:
        torch.manual_seed(seed)
        image = TimmImageConfig(
            model="vit_base_patch16_siglip_224" if siglip else "vit_base_patch16_clip_224.openai",
            image_size=SIZE,
            activation=activation,
            model_kwargs={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        )
        text = TextTransformerConfig(
            vocab_size=VOCAB,
            context_length=CONTEXT,
            width=32 if siglip else 16,
            depth=2,
            heads=2,
            causal=not siglip,
            pooling="last" if siglip else "eot",
            activation=activation,
            layer_norm_eps=1e-6 if siglip else 1e-5,
            eot_id=EOT,
        )
        model = DualEncoder(image, text, siglip=siglip).double()
        for parameter in model.parameters():  # zeros and ones would hide a missing bias or norm
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def batch() -> Callable[[DualEncoder], Batch]:
    def make(model: DualEncoder) -> Batch:
        generator = torch.Generator().manual_seed(1)
        pixels = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
        preprocess = model.image_encoder.preprocess
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (preprocess.mean, preprocess.std))
        ids = torch.randint(1, EOT, (BATCH, CONTEXT), generator=generator)
        for row, eot in enumerate((CONTEXT - 1, 4, 6)):
            ids[row, eot] = EOT
            ids[row, eot + 1 :] = 0
        return Batch(pixels, (pixels - mean) / std, ids)

    return make


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Outputs agree, and so do the gradients of every parameter once renamed to theirs."""

    def check(
        ours: DualEncoder,
        our_outputs: tuple[Tensor, Tensor],
        theirs: nn.Module,
        their_outputs: tuple[Tensor, Tensor],
        to_theirs: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        unused: tuple[str, ...],
    ) -> None:
        for our, their in zip(our_outputs, their_outputs, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-9)
        for model, (image_BE, text_BE) in ((ours, our_outputs), (theirs, their_outputs)):
            weight = torch.linspace(-1, 1, image_BE.numel(), dtype=image_BE.dtype)
            loss = F.cross_entropy(9 * image_BE @ text_BE.T, torch.arange(len(image_BE)))
            (loss + (image_BE.flatten() * weight).sum()).backward()
            assert loss.isfinite(), type(model).__name__
        our_grads = to_theirs(
            {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
        )
        their_grads = {name: p.grad for name, p in theirs.named_parameters() if name not in unused}
        assert our_grads.keys() == their_grads.keys()
        for name, their_grad in their_grads.items():
            assert their_grad is not None, name
            assert their_grad.abs().max() > 0 or "k_proj.bias" in name, name
            torch.testing.assert_close(our_grads[name], their_grad, rtol=1e-7, atol=1e-9, msg=name)

    return check
