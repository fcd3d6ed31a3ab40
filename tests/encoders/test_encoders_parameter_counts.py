"""Whole models have exactly as many parameters as the published ones."""

import pytest
import torch
from torch import nn

from latentmodal.encoders import TextTransformerConfig, TimmImageConfig

CLIP_BASE = TextTransformerConfig()
CLIP_LARGE = TextTransformerConfig(width=768, heads=12)
SIGLIP_BASE = TextTransformerConfig(
    vocab_size=32000,
    context_length=64,
    width=768,
    heads=12,
    causal=False,
    pooling="last",
    activation="gelu",
    layer_norm_eps=1e-6,
    pad_id=1,
    eot_id=1,
)


@pytest.mark.parametrize(
    ("image", "text", "embed", "total"),
    [
        ("vit_base_patch32_clip_224.openai", CLIP_BASE, 512, 151_277_313),
        ("vit_base_patch16_clip_224.openai", CLIP_BASE, 512, 149_620_737),
        ("vit_large_patch14_clip_224.openai", CLIP_LARGE, 768, 427_616_513),
        ("vit_base_patch16_siglip_224", SIGLIP_BASE, None, 203_155_970),
    ],
)
def test_counts(image: str, text: TextTransformerConfig, embed: int | None, total: int) -> None:
    with torch.device("meta"):
        image_encoder = TimmImageConfig(model=image).build()
        text_encoder = text.build()
        if embed is None:  # SigLIP: no image projection, a biased text one, scale and bias
            head = nn.ModuleList([nn.Linear(text_encoder.width, image_encoder.pooled_width)])
            scalars = 2
        else:
            widths = (image_encoder.pooled_width, text_encoder.width)
            head = nn.ModuleList(nn.Linear(width, embed, bias=False) for width in widths)
            scalars = 1
    modules = (image_encoder, text_encoder, head)
    assert sum(p.numel() for m in modules for p in m.parameters()) + scalars == total
