"""What an image encoder and a text encoder promise to the rest of the house.

Shapes: B batch, C channels, H/W pixels, N tokens, T text length, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from latentmodal.encoders.activations import Activation
from latentmodal.encoders.features import Features
from latentmodal.encoders.preprocess import Preprocess

FeatureLayer = Literal["last", "penultimate"]


class ImageEncoder(nn.Module, ABC):
    """Pixels in, features out.

    Pixels are uint8 in 0..255 or float in [0, 1]; normalisation happens inside, on the device, so
    loaders ship a quarter of the bytes and nobody can normalise twice.

    A subclass builds its model, sets `activation` and `fsdp_units`, and calls `_measure()` last.

    Attributes:
        width: D of the tokens.
        pooled_width: width of the pooled feature.
        num_tokens: N in evaluation mode (patch dropout shortens it in training).
        fsdp_units: classes that make good sharding units, usually the transformer block.
        preprocess: how a PIL image becomes pixels.
        activation: the MLP activation when it is one of the three that checkpoints disagree about.
    """

    width: int
    pooled_width: int
    num_tokens: int
    fsdp_units: tuple[type[nn.Module], ...]
    activation: Activation | None
    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        self.preprocess = preprocess
        mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
        self.register_buffer("mean_C11", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("std_C11", std.view(-1, 1, 1), persistent=False)

    @abstractmethod
    def forward(self, pixels_BCHW: Tensor) -> Features:
        """Encode a batch of preprocessed pictures of `preprocess.size` pixels a side."""

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass instead of keeping them."""

    def normalise(self, pixels_BCHW: Tensor) -> Tensor:
        """Pixels to normalised floats of the parameters' dtype.

        The arithmetic stays in float32 or wider even for bf16 weights; the cast comes last, so that
        mixed precision applied from outside (FSDP casts parameters, not uint8 inputs) just works.
        """
        dtype = torch.promote_types(self.mean_C11.dtype, torch.float32)
        x_BCHW = pixels_BCHW.to(dtype)
        if pixels_BCHW.dtype == torch.uint8:
            x_BCHW = x_BCHW / 255
        x_BCHW = (x_BCHW - self.mean_C11) / self.std_C11
        return x_BCHW.to(next(self.parameters()).dtype)

    def pooling_parameters(self) -> list[str]:
        """Names of the parameters that the tokens do not depend on, only the pooled feature.

        Whoever trains on the tokens freezes them: they never get a gradient, and DDP waits for one.
        """
        state = {
            name: torch.empty_like(parameter, device="meta", requires_grad=True)
            for name, parameter in self.named_parameters()
        }
        with torch.enable_grad():
            tokens_1ND = self._run_on_meta(state).tokens_BND
            grads = torch.autograd.grad(tokens_1ND.sum(), list(state.values()), allow_unused=True)
        return [name for name, grad in zip(state, grads, strict=True) if grad is None]

    @torch.no_grad()
    def _measure(self) -> None:
        """Read widths and token count off a forward pass over shapes alone (meta tensors)."""
        features = self._run_on_meta(
            {name: torch.empty_like(p, device="meta") for name, p in self.named_parameters()}
        )
        _, self.num_tokens, self.width = features.tokens_BND.shape
        self.pooled_width = features.pooled_BD.shape[-1]

    def _run_on_meta(self, parameters: dict[str, Tensor]) -> Features:
        size, modes = self.preprocess.size, [(m, m.training) for m in self.modules()]
        buffers = {name: torch.empty_like(b, device="meta") for name, b in self.named_buffers()}
        pixels_1CHW = torch.empty(1, 3, size, size, device="meta")
        self.eval()
        features: Features = functional_call(self, {**parameters, **buffers}, (pixels_1CHW,))
        for module, training in modes:  # parts may be frozen, and in eval mode
            module.training = training
        return features


class TextEncoder(nn.Module, ABC):
    """Token ids in, features out.

    Attributes:
        width: D of the tokens and of the pooled feature.
        num_tokens: the longest text it takes (its context length); shorter batches are welcome.
        vocab_size: ids are below this.
        fsdp_units: classes that make good sharding units.
        activation: as for `ImageEncoder`.
    """

    width: int
    num_tokens: int
    vocab_size: int
    fsdp_units: tuple[type[nn.Module], ...]
    activation: Activation | None

    @property
    def pooled_width(self) -> int:
        return self.width

    @abstractmethod
    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Features:
        """Encode token ids; `mask_BT` is True where a token is not padding."""

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass instead of keeping them."""


def check_features(features: str) -> None:
    """Raise ValueError unless `features` is a `FeatureLayer`."""
    if features not in get_args(FeatureLayer):
        choices = ", ".join(get_args(FeatureLayer))
        raise ValueError(f"features={features!r} is unknown; choose from {choices}.")


def repeated_block_types(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """The class of the blocks a model is made of, for use as sharding units.

    Of all sequences of two or more children of one class, the one with most parameters decides:
    `Block` for a timm ViT, `CLIPEncoderLayer` for CLIP in transformers, a stage for a ConvNeXt.
    A single-block model has no such sequence; then sequences of one count too.
    """
    for least in (2, 1):
        sequences = [s for s in _uniform_sequences(model) if len(s) >= least]
        if sequences:
            biggest = max(sequences, key=lambda s: sum(p.numel() for p in s.parameters()))
            return (type(biggest[0]),)
    return ()


def _uniform_sequences(model: nn.Module) -> Iterator[nn.Sequential | nn.ModuleList]:
    for module in model.modules():
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(module) > 0:
            classes = {type(child) for child in module}
            if len(classes) == 1 and any(True for _ in module.parameters()):
                yield module
