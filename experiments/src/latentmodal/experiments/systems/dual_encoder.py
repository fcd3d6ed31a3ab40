"""Two towers and a contrastive head: the model behind CLIP, SigLIP and LiT.

Legend: B images, M texts, D tower width, E embedding width, C H W pixels, T text length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from latentmodal.bridges import ContrastiveHead, ContrastiveOutput
from latentmodal.bridges.gradient_cache import encode_in_chunks
from latentmodal.encoders import ImageEncoder, TextEncoder
from latentmodal.experiments.training.freeze import is_frozen


class DualEncoder(nn.Module):
    """An image tower, a text tower, and the head that makes them comparable.

    Args:
        chunk_size: encode this many pairs at a time and recompute them in the backward pass, so
            that a large contrastive batch needs the memory of a small one (GradCache, Gao et al.
            2021); None encodes the batch at once.
    """

    fsdp_forward_methods = ("encode_image", "encode_text")

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        head: ContrastiveHead,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.head = head
        self.chunk_size = chunk_size

    @property
    def fsdp_units(self) -> tuple[type[nn.Module], ...]:
        """Module classes sharded and recomputed as one piece."""
        return (*self.image_encoder.fsdp_units, *self.text_encoder.fsdp_units)

    @property
    def fp32_modules(self) -> tuple[nn.Module, ...]:
        """The head: rounding its temperature to bf16 would move every logit."""
        return (self.head,)

    def forward(self, pixels_BCHW: Tensor, ids_MT: Tensor, mask_MT: Tensor) -> ContrastiveOutput:
        """Embed pictures and captions; both embeddings come back normalised."""
        image_BD = self._encode(self._pool_image, self.image_encoder, pixels_BCHW)
        text_MD = self._encode(self._pool_text, self.text_encoder, ids_MT, mask_MT)
        return self.head(image_BD, text_MD)

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """Normalised embeddings (B, E) of pictures."""
        return self.head.embed_image(self._pool_image(pixels_BCHW))

    def encode_text(self, ids_MT: Tensor, mask_MT: Tensor) -> Tensor:
        """Normalised embeddings (M, E) of captions."""
        return self.head.embed_text(self._pool_text(ids_MT, mask_MT))

    def _pool_image(self, pixels_BCHW: Tensor) -> Tensor:
        return self.image_encoder(pixels_BCHW).pooled_BD

    def _pool_text(self, ids_MT: Tensor, mask_MT: Tensor) -> Tensor:
        return self.text_encoder(ids_MT, mask_MT).pooled_BD

    def _encode(self, pool: Callable[..., Tensor], tower: nn.Module, *inputs: Tensor) -> Tensor:
        if is_frozen(tower):
            with torch.no_grad():
                return pool(*inputs)
        if self.chunk_size is None or not torch.is_grad_enabled():
            return pool(*inputs)
        return encode_in_chunks(pool, inputs, self.chunk_size)
