"""What of a model is frozen from the pictures on, and so gives the same features for ever.

Legend: B pictures, N feature tokens, D width, C H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import takewhile

import torch
from torch import Tensor, nn

from latentmodal.encoders import ImageEncoder
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.training.freeze import is_frozen

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""How far the same weights on another machine may be off, relative to the features' norm."""


def frozen_prefix(model: nn.Module) -> list[nn.Module]:
    """The modules a picture passes one after the other before the first that trains.

    Empty where the image tower trains. A model that can train on features declares `stages`:
    its image encoder, then modules from features to features.
    """
    stages: Iterable[nn.Module] = getattr(model, "stages", ())
    return list(takewhile(is_frozen, stages))


def run_prefix(stages: Sequence[nn.Module], pixels_BCHW: Tensor) -> Tensor:
    """The features (B, N, D) after the last of ``stages``, the first being an image encoder.

    Raises:
        UserError: the encoder masks some of its tokens, for which a cache has no place.
    """
    features = stages[0](pixels_BCHW)
    if features.mask_BN is not None:
        raise UserError("data.features: this image encoder masks tokens; train from pixels")
    tokens_BND: Tensor = features.tokens_BND
    for stage in stages[1:]:
        tokens_BND = stage(tokens_BND)
    return tokens_BND


def prefix_digest(stages: Sequence[nn.Module]) -> str:
    """SHA-256 over names and values of all parameters and buffers, statistics included."""
    digest = hashlib.sha256()
    for number, stage in enumerate(stages):
        for name, tensor in [*stage.named_parameters(), *stage.named_buffers()]:
            digest.update(f"{number}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(plain.numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def probe(stages: Sequence[nn.Module]) -> Tensor:
    """Features (N, D), in float32, of a test picture.

    Weights do not say everything: an activation or a stride that is no parameter shows here.
    """
    encoder = stages[0]
    assert isinstance(encoder, ImageEncoder)
    modes = [(module, module.training) for stage in stages for module in stage.modules()]
    for stage in stages:
        stage.eval()
    features_1ND = run_prefix(stages, _test_picture(encoder.preprocess.size))
    for module, training in modes:
        module.training = training
    return features_1ND[0].float()


def same_features(stages: Sequence[nn.Module], now_ND: Tensor, then_ND: Tensor) -> bool:
    """Whether two probes agree as well as two machines do."""
    if now_ND.shape != then_ND.shape:
        return False
    tolerance = _TOLERANCE[next(stages[0].parameters()).dtype]
    return bool((now_ND - then_ND).norm() <= tolerance * then_ND.norm())


def _test_picture(size: int) -> Tensor:
    """Waves of several lengths, uint8 (1, 3, size, size)."""
    c_C11 = torch.arange(3)[:, None, None]
    y_H1, x_W = torch.arange(size)[:, None], torch.arange(size)
    pixels_CHW = (c_C11 * 85 + y_H1 * 3 + x_W * 5 + (y_H1 // 7) * (x_W // 5) * 11) % 256
    return pixels_CHW.to(torch.uint8)[None]
