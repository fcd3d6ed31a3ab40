"""Checkpoints of other projects to ours and back."""

from latentmodal.encoders.convert.checkpoint import (
    FORMATS,
    Activations,
    load_dual_encoder_weights,
    save_dual_encoder_weights,
)
from latentmodal.encoders.convert.dual_encoders import (
    from_hf_clip,
    from_hf_siglip,
    from_open_clip,
    from_timm,
    to_hf_clip,
    to_hf_siglip,
    to_open_clip,
    to_timm,
)
from latentmodal.encoders.convert.eva import (
    eva_from_hf_blip2,
    eva_from_lavis,
    eva_to_hf_blip2,
    eva_to_lavis,
    resize_positions,
)
from latentmodal.encoders.convert.files import read_state_dict
from latentmodal.encoders.convert.rules import Converted

__all__ = [
    "FORMATS",
    "Activations",
    "Converted",
    "eva_from_hf_blip2",
    "eva_from_lavis",
    "eva_to_hf_blip2",
    "eva_to_lavis",
    "from_hf_clip",
    "from_hf_siglip",
    "from_open_clip",
    "from_timm",
    "load_dual_encoder_weights",
    "read_state_dict",
    "resize_positions",
    "save_dual_encoder_weights",
    "to_hf_clip",
    "to_hf_siglip",
    "to_open_clip",
    "to_timm",
]
