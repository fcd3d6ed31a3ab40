"""Image encoders from transformers: CLIPVisionModel, SiglipVisionModel, Dinov2Model, ViTModel ...

Shapes: B batch, C channels, H/W pixels, N tokens, D width.
"""

import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig
from transformers.image_processing_base import ImageProcessingMixin

from latentmodal.encoders.activations import activation_of
from latentmodal.encoders.encoder import (
    FeatureLayer,
    ImageEncoder,
    check_features,
    repeated_block_types,
)
from latentmodal.encoders.features import Features
from latentmodal.encoders.hf_source import (
    build_model,
    check_source,
    hub_or_folder,
    resolve_config,
    set_grad_checkpointing,
)
from latentmodal.encoders.preprocess import CLIP_MEAN, CLIP_STD, Interpolation, Preprocess

logger = logging.getLogger(__name__)

_PIL_BILINEAR = 2  # `resample` in preprocessor_config.json is PIL's filter number


@dataclass(frozen=True, kw_only=True)
class HfImageConfig:
    """A vision model of transformers.

    Attributes:
        model: hub name or local folder; of a dual encoder such as CLIP the vision half is taken.
        config: the configuration itself (`model_type` and fields), for a model without weights.
        random_init: keep the named model's architecture, but start from random weights.
        mean, std: for pixels in [0, 1]. None takes them from the model's
            preprocessor_config.json, or CLIP's where there is none.
        features: "last", or "penultimate" for CLIP's tower without its last block and final norm,
            as BLIP-2 and LLaVA read it.
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    random_init: bool = False
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    features: FeatureLayer = "last"

    def __post_init__(self) -> None:
        check_source(self.model, self.config)
        check_features(self.features)

    def build(self) -> "HfImageEncoder":
        return HfImageEncoder(self)


class HfImageEncoder(ImageEncoder):
    """A transformers vision model under the attribute `model`.

    Tokens are its `last_hidden_state` (CLIP's come before the final LayerNorm, as BLIP-2 and LLaVA
    read them); the pooled feature is its `pooler_output`, or the first token where it has none.
    With features="penultimate" it is CLIP's class token, without a norm.
    """

    def __init__(self, config: HfImageConfig) -> None:
        hf_config = resolve_config(config.model, config.config, "vision_config")
        super().__init__(_preprocess(config, hf_config))
        self.config = config
        if getattr(hf_config, "use_mask_token", False):
            hf_config.use_mask_token = False  # DINOv2's, for masked pretraining: nothing reads it
        bypass: tuple[str, ...] = ()
        if config.features == "penultimate":
            _leave_out_last_block(hf_config)
            bypass = ("post_layernorm",)
        self.model = build_model(
            config.model, hf_config, random_init=config.random_init, bypass=bypass
        )
        self.activation = activation_of(self.model)
        self.fsdp_units = repeated_block_types(self.model)
        self._measure()

    def forward(self, pixels_BCHW: Tensor) -> Features:
        """Encode pictures; see `ImageEncoder.forward`."""
        output = self.model(pixel_values=self.normalise(pixels_BCHW))
        tokens_BND = output.last_hidden_state
        pooled_BD = getattr(output, "pooler_output", None)
        return Features(tokens_BND, tokens_BND[:, 0] if pooled_BD is None else pooled_BD)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        set_grad_checkpointing(self.model, enable)


def _leave_out_last_block(hf_config: Any) -> None:
    """Neither built nor loaded then; the rest of the model cannot tell."""
    if not isinstance(hf_config, CLIPVisionConfig):
        raise ValueError(
            f"features='penultimate' needs a CLIP vision model; this one is configured by "
            f"{type(hf_config).__name__}: use features='last'."
        )
    if hf_config.num_hidden_layers < 2:
        raise ValueError("features='penultimate' needs two blocks or more; the model has one.")
    hf_config.num_hidden_layers -= 1


def _preprocess(config: HfImageConfig, hf_config: Any) -> Preprocess:
    image_size = getattr(hf_config, "image_size", None)
    if not isinstance(image_size, int):
        raise ValueError(f"{type(hf_config).__name__} has no square image_size; set one in config.")
    processor = _processor_config(config.model) if config.model is not None else {}
    interpolation: Interpolation = (
        "bilinear" if processor.get("resample") == _PIL_BILINEAR else "bicubic"
    )
    size = processor.get("size")
    squashes = isinstance(size, dict) and "height" in size
    crops = processor.get("do_center_crop", not squashes)
    return Preprocess(
        size=image_size,
        mean=config.mean or tuple(processor.get("image_mean", CLIP_MEAN)),
        std=config.std or tuple(processor.get("image_std", CLIP_STD)),
        interpolation=interpolation,
        resize="crop" if crops else "squash",
    )


def _processor_config(model: str) -> dict[str, Any]:
    try:
        processor: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(
            hub_or_folder(model)
        )[0]
    except OSError:
        logger.info("%s has no preprocessor_config.json: CLIP's mean and std are used", model)
        return {}
    return processor
