"""Image encoders from timm: any model of its catalogue, vision transformers and CNNs alike.

Shapes: B batch, C channels, H/W pixels, N tokens, D width.
"""

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from latentmodal.encoders.activations import activation_class, activation_of
from latentmodal.encoders.convert.eva import resize_positions
from latentmodal.encoders.convert.files import read_state_dict
from latentmodal.encoders.encoder import (
    FeatureLayer,
    ImageEncoder,
    check_features,
    repeated_block_types,
)
from latentmodal.encoders.features import Features
from latentmodal.encoders.preprocess import Interpolation, Preprocess, Resize

_POOLS = {"cls": "token", "avg": "avg", "avgmax": "avgmax", "max": "max", "map": "map"}


@dataclass(frozen=True, kw_only=True)
class TimmImageConfig:
    """An image tower named as timm names it.

    Attributes:
        model: timm's name, e.g. "vit_base_patch32_clip_224"; a tag after a dot picks the
            pretrained configuration (weights, mean and std).
        pretrained: fetch the tag's weights from the hub.
        weights: a local file or folder of weights in timm's names instead of the hub's.
        image_size: pixels a side; None is the model's own.
        pool: "cls", "avg", "max", "avgmax" or "map" (attention pooling); None is the model's own.
        activation: "gelu", "quick_gelu" or "gelu_tanh"; None is the model's own.
        resize: "crop" or "squash" in evaluation, see `Preprocess`; None is the model's own. SigLIP
            squashes, though timm's configuration says crop.
        drop_path: stochastic depth rate, growing linearly to this value at the last block.
        patch_drop_rate: share of patches left out in training (FLIP).
        features: "last", or "penultimate" for a ViT or EVA without its last block and final norm,
            as BLIP-2 and LLaVA read them. `weights` may still hold those parts, or lack them as
            LAVIS' eva_vit_g.pth does; EVA's position grid is resized as LAVIS does, not timm.
            Pooling "map", which has weights of its own, gives way to the mean.
        model_kwargs: anything else timm's constructor takes: embed_dim, depth, patch_size ...
    """

    model: str
    pretrained: bool = False
    weights: str | None = None
    image_size: int | None = None
    pool: str | None = None
    activation: str | None = None
    resize: Resize | None = None
    drop_path: float = 0.0
    patch_drop_rate: float = 0.0
    features: FeatureLayer = "last"
    model_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pool is not None and self.pool not in _POOLS:
            raise ValueError(f"pool={self.pool!r} is unknown; choose from {', '.join(_POOLS)}.")
        if self.pretrained and self.weights is not None:
            raise ValueError("pretrained=true and weights are two sources; set only one of them.")
        check_features(self.features)
        if self.features == "penultimate" and self.pool == "map":
            raise ValueError(
                "pool='map' reads the final norm; with features='penultimate' use avg."
            )

    def build(self) -> "TimmImageEncoder":
        return TimmImageEncoder(self)


class TimmImageEncoder(ImageEncoder):
    """A timm model without its classifier, under the attribute `trunk`.

    Tokens are timm's `forward_features` (prefix tokens first; a CNN's map flattened row by row);
    the pooled feature is what timm's classifier would have read.
    """

    def __init__(self, config: TimmImageConfig) -> None:
        trunk = _create(config)
        if config.features == "penultimate":
            _drop_last_block(trunk, config.model)
        super().__init__(_preprocess(trunk, config))
        self.config = config
        self.trunk = trunk
        self.activation = activation_of(trunk)
        self.fsdp_units = repeated_block_types(trunk)
        self._maps_are_nhwc = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        self._is_cnn = not hasattr(trunk, "patch_embed")
        self._measure()

    def forward(self, pixels_BCHW: Tensor) -> Features:
        """Encode pictures; see `ImageEncoder.forward`."""
        x_BCHW = self.normalise(pixels_BCHW)
        if self._is_cnn:  # convolutions run up to twice as fast on this memory layout
            x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        features = self.trunk.forward_features(x_BCHW)
        pooled_BD = self.trunk.forward_head(features, pre_logits=True)
        return Features(self._as_tokens(features), pooled_BD)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.trunk.set_grad_checkpointing(enable)

    def _as_tokens(self, features: Tensor) -> Tensor:
        if features.ndim == 3:
            return features
        if self._maps_are_nhwc:
            return features.flatten(1, 2)
        return features.flatten(2).transpose(1, 2)


def _create(config: TimmImageConfig) -> Any:
    if not timm.is_model(config.model):
        near = ", ".join(timm.list_models(f"*{config.model.split('.')[0]}*")[:5])
        hint = f"near names: {near}" if near else "timm.list_models() lists them"
        raise ValueError(f"model={config.model!r} is not a timm model; {hint}.")
    options: dict[str, Any] = dict(config.model_kwargs)
    fixed_size = timm.get_pretrained_cfg(config.model).fixed_input_size  # CNNs take any size
    if config.image_size is not None and fixed_size:
        options["img_size"] = config.image_size
    if config.pool is not None:
        options["global_pool"] = _POOLS[config.pool]
    if config.activation is not None:
        options["act_layer"] = activation_class(config.activation)
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    if config.patch_drop_rate:
        options["patch_drop_rate"] = config.patch_drop_rate
    if config.weights is not None:
        state = read_state_dict(config.weights)
    elif config.pretrained and _resizes_unlike_timm(config, options):
        own = {name: value for name, value in options.items() if name != "img_size"}
        state = _create_trunk(config.model, pretrained=True, **own).state_dict()
    else:
        return _create_trunk(config.model, pretrained=config.pretrained, **options)
    overlay = {"state_dict": _fit_weights(state, config, options), "num_classes": 0}
    return _create_trunk(config.model, pretrained=True, pretrained_cfg_overlay=overlay, **options)


def _create_trunk(model: str, **options: Any) -> Any:
    try:
        return timm.create_model(model, num_classes=0, **options)
    except OSError as error:
        raise ValueError(
            f"model={model!r}: its pretrained weights could not be fetched "
            f"({str(error).splitlines()[0]}); set weights to a local file, or go online once."
        ) from error
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"timm could not build model={model!r}: {error}") from error


def _resizes_unlike_timm(config: TimmImageConfig, options: dict[str, Any]) -> bool:
    """Whether the hub's weights are EVA's for another size of pictures, see `features`."""
    native = timm.get_pretrained_cfg(config.model).input_size[-1]
    if config.features == "last" or options.get("img_size", native) == native:
        return False
    with torch.device("meta"):
        return isinstance(_create_trunk(config.model, **options), Eva)


def _fit_weights(
    state: dict[str, Tensor], config: TimmImageConfig, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Weights as timm takes them, which resizes other position grids and loads strictly.

    Strictly only when the classifier is already gone and no classes are announced: otherwise timm
    drops it itself and from then on overlooks missing keys. Parts that are dropped after loading
    need not be in the file; zeros stand in for them, so that all other keys stay accounted for.
    """
    classifiers = timm.get_pretrained_cfg(config.model).classifier or ()
    names = (classifiers,) if isinstance(classifiers, str) else classifiers
    classifier_keys = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    state = {name: tensor for name, tensor in state.items() if name not in classifier_keys}
    if config.features == "last":
        return state
    with torch.device("meta"):
        trunk = _create_trunk(config.model, **options)
    if isinstance(trunk, Eva) and trunk.pos_embed is not None and "pos_embed" in state:
        prefix = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
        grid = trunk.patch_embed.grid_size
        state["pos_embed"] = resize_positions(state["pos_embed"], grid, num_prefix_tokens=prefix)
    whole = trunk.state_dict()
    _drop_last_block(trunk, config.model)
    dropped = {name: whole[name].shape for name in whole.keys() - trunk.state_dict().keys()}
    # timm gives the final norm one of two names, by the pooling; the file may use the other.
    spare = {f"{norm}.{kind}" for norm in ("norm", "fc_norm") for kind in ("weight", "bias")}
    kept = {name: tensor for name, tensor in state.items() if name in whole or name not in spare}
    return {name: torch.zeros(()).expand(shape) for name, shape in dropped.items()} | kept


def _drop_last_block(trunk: Any, model: str) -> None:
    """Remove the last block, the final norm, and attention pooling, which reads that norm."""
    if not isinstance(trunk, VisionTransformer | Eva):
        raise ValueError(
            f"features='penultimate' needs a ViT or EVA of timm; {model!r} is a "
            f"{type(trunk).__name__}: use features='last'."
        )
    if len(trunk.blocks) < 2:
        raise ValueError(f"features='penultimate' needs two blocks or more; {model!r} has one.")
    trunk.blocks = trunk.blocks[:-1]
    trunk.norm, trunk.fc_norm = nn.Identity(), nn.Identity()
    if trunk.attn_pool is not None:
        trunk.attn_pool, trunk.global_pool = None, "avg"


def _preprocess(trunk: Any, config: TimmImageConfig) -> Preprocess:
    """timm's data configuration, with the whole picture used (crop_pct 1) as CLIP models do."""
    data = resolve_model_data_config(trunk)
    interpolation: Interpolation = "bilinear" if data["interpolation"] == "bilinear" else "bicubic"
    resize: Resize = "squash" if data["crop_mode"] == "squash" else "crop"
    return Preprocess(
        size=config.image_size or _input_side(trunk, data),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=interpolation,
        resize=config.resize or resize,
    )


def _input_side(trunk: Any, data: dict[str, Any]) -> int:
    embed_size = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    height, width = embed_size if embed_size is not None else data["input_size"][1:]
    if height != width:
        raise ValueError(
            f"the timm model reads {height}x{width} pixels; set image_size to make it square."
        )
    return int(height)
