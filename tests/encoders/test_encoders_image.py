import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformerStage
from timm.models.vision_transformer import Block
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from latentmodal.encoders import (
    HfImageConfig,
    ImageEncoder,
    TimmImageConfig,
)
from latentmodal.encoders.encoder import repeated_block_types

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
HF_TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def timm_config(model: str = "vit_base_patch16_clip_224.openai", **fields: Any) -> TimmImageConfig:
    fields = {"image_size": 32, "model_kwargs": TINY, **fields}
    return TimmImageConfig(model=model, **fields)


def hf_config(model_type: str, **fields: Any) -> HfImageConfig:
    return HfImageConfig(config={"model_type": model_type, **HF_TINY, **fields})


ENCODERS = {
    "timm-clip": timm_config(),
    "timm-siglip": timm_config("vit_base_patch16_siglip_224"),
    "timm-avg": timm_config("vit_tiny_patch16_224", pool="avg"),
    "timm-cnn": TimmImageConfig(model="test_resnet", image_size=64),
    "hf-clip": hf_config("clip_vision_model"),
    "hf-siglip": hf_config("siglip_vision_model"),
    "hf-dinov2": hf_config("dinov2"),
    "hf-vit": hf_config("vit"),
}


def pixels_for(encoder: ImageEncoder, batch: int = 2) -> torch.Tensor:
    side = encoder.preprocess.size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", ENCODERS)
def test_contract(name: str) -> None:
    torch.manual_seed(0)
    encoder = ENCODERS[name].build()
    assert encoder.training
    pixels = pixels_for(encoder)
    features = encoder.eval()(pixels)
    assert features.tokens_BND.shape == (2, encoder.num_tokens, encoder.width)
    assert features.pooled_BD.shape == (2, encoder.pooled_width)
    assert features.mask_BN is None
    assert len(encoder.fsdp_units) == 1
    assert sum(isinstance(m, encoder.fsdp_units) for m in encoder.modules()) >= 2
    from_floats = encoder(pixels.float() / 255)
    torch.testing.assert_close(from_floats.tokens_BND, features.tokens_BND)
    torch.testing.assert_close(from_floats.pooled_BD, features.pooled_BD)


@pytest.mark.parametrize("name", ENCODERS)
def test_builds_on_meta_with_the_same_description(name: str) -> None:
    real = ENCODERS[name].build()
    with torch.device("meta"):
        meta = ENCODERS[name].build()
    assert all(t.is_meta for t in [*meta.parameters(), *meta.buffers()])
    for attribute in ("num_tokens", "width", "pooled_width", "fsdp_units", "preprocess"):
        assert getattr(meta, attribute) == getattr(real, attribute)


@pytest.mark.parametrize("name", [n for n in ENCODERS if n != "timm-cnn"])
def test_grad_checkpointing_changes_nothing_but_memory(name: str) -> None:
    torch.manual_seed(0)
    encoder = ENCODERS[name].build()
    plain = _gradients(encoder)
    encoder.set_grad_checkpointing(True)
    torch.testing.assert_close(_gradients(encoder), plain)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_learns(name: str) -> None:
    """Parameters that never get a gradient make DDP wait for ever."""
    torch.manual_seed(0)
    encoder = ENCODERS[name].build()
    assert set(_gradients(encoder)) == {name for name, _ in encoder.named_parameters()}


def _gradients(encoder: ImageEncoder) -> dict[str, torch.Tensor]:
    encoder.zero_grad()
    features = encoder(pixels_for(encoder))
    (features.pooled_BD.square().sum() + features.tokens_BND.square().mean()).backward()
    return {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


def test_normalisation_is_by_mean_and_std_and_follows_the_weights_dtype() -> None:
    encoder = timm_config().build()
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor(encoder.preprocess.mean)) / torch.tensor(encoder.preprocess.std)
    torch.testing.assert_close(encoder.normalise(white)[0, :, 5, 7], expected)
    encoder.bfloat16()
    assert encoder(white).pooled_BD.dtype == torch.bfloat16
    assert not any("mean" in key or "std" in key for key in encoder.state_dict())


def test_feature_maps_become_tokens_in_row_order() -> None:
    encoder = TimmImageConfig(model="test_resnet", image_size=96).build().eval()
    pixels = pixels_for(encoder)
    maps_BCHW = encoder.trunk.forward_features(encoder.normalise(pixels))
    width = maps_BCHW.shape[-1]
    # Close, not equal: the encoder convolves in channels-last memory, this call does not.
    torch.testing.assert_close(encoder(pixels).tokens_BND[:, width + 2], maps_BCHW[:, :, 1, 2])


def test_channels_last_feature_maps() -> None:
    config = TimmImageConfig(
        model="swin_tiny_patch4_window7_224",
        model_kwargs={"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 7},
        image_size=56,
    )
    encoder = config.build().eval()
    assert encoder.num_tokens == 49
    assert encoder.width == 32
    assert encoder.fsdp_units == (SwinTransformerStage,)
    pixels = pixels_for(encoder)
    maps_BHWC = encoder.trunk.forward_features(encoder.normalise(pixels))
    assert torch.equal(encoder(pixels).tokens_BND[:, 9], maps_BHWC[:, 1, 2])


def test_patch_dropout_shortens_training_only() -> None:
    encoder = timm_config(patch_drop_rate=0.5).build()
    assert encoder.num_tokens == 17
    pixels = pixels_for(encoder)
    assert encoder(pixels).tokens_BND.shape[1] == 9
    assert encoder.eval()(pixels).tokens_BND.shape[1] == 17


def test_drop_path_and_activation_reach_the_blocks() -> None:
    encoder = timm_config(drop_path=0.2, activation="quick_gelu").build()
    assert encoder.activation == "quick_gelu"
    assert encoder.trunk.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    assert timm_config().build().activation == "gelu"
    assert timm_config("vit_base_patch32_clip_quickgelu_224").build().activation == "quick_gelu"


def test_sharding_unit_of_one_and_many_blocks() -> None:
    assert timm_config().build().fsdp_units == (Block,)
    assert timm_config(model_kwargs={**TINY, "depth": 1}).build().fsdp_units == (Block,)
    assert repeated_block_types(torch.nn.Linear(2, 2)) == ()


@pytest.mark.parametrize("as_folder", [False, True])
def test_local_weights_are_loaded_and_positions_resized(tmp_path: Path, as_folder: bool) -> None:
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, **TINY)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    weights = str(tmp_path if as_folder else tmp_path / "model.safetensors")
    same = timm_config("vit_tiny_patch16_224", weights=weights).build()
    larger = timm_config("vit_tiny_patch16_224", weights=weights, image_size=64).build()
    for name, tensor in same.trunk.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name
    assert larger.trunk.pos_embed.shape[1] == 65
    assert torch.equal(larger.trunk.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY).state_dict()
    del source["blocks.1.mlp.fc1.weight"]
    save_file(source, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1\.weight"):
        timm_config("vit_tiny_patch16_224", weights=str(tmp_path)).build()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "vit_base_patch32_clipp_224"}, "not a timm model"),
        ({"model": "vit_tiny_patch16_224", "pool": "cls_token"}, "pool='cls_token'"),
        ({"model": "vit_tiny_patch16_224", "activation": "relu"}, "activation='relu'"),
        ({"model": "vit_tiny_patch16_224", "model_kwargs": {"widht": 3}}, "widht"),
        ({"model": "vit_tiny_patch16_224", "weights": "/nowhere"}, "holds no weights"),
        ({"model": "vit_tiny_patch16_224", "weights": "x", "pretrained": True}, "two sources"),
    ],
)
def test_timm_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimmImageConfig(**fields).build()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one"),
        ({"model": "a", "config": {"model_type": "vit"}}, "exactly one"),
        ({"config": {"hidden_size": 3}}, "model_type"),
    ],
)
def test_hf_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HfImageConfig(**fields).build()


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    text = {
        "vocab_size": 50,
        "max_position_embeddings": 8,
        "eos_token_id": 49,
        "bos_token_id": 48,
        "pad_token_id": 0,
    }
    sizes = {k: v for k, v in HF_TINY.items() if k not in ("image_size", "patch_size")}
    model = CLIPModel(
        CLIPConfig(text_config={**sizes, **text}, vision_config=HF_TINY, projection_dim=16)
    )
    model.half().save_pretrained(tmp_path)
    return tmp_path


def test_hf_folder_gives_the_vision_half_in_float32(clip_folder: Path) -> None:
    encoder = HfImageConfig(model=str(clip_folder)).build().eval()
    reference = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).eval()
    pixels = pixels_for(encoder)
    expected = reference.vision_model(pixel_values=encoder.normalise(pixels))
    torch.testing.assert_close(encoder(pixels).pooled_BD, expected.pooler_output)
    torch.testing.assert_close(encoder(pixels).tokens_BND, expected.last_hidden_state)
    assert encoder.activation == "quick_gelu"
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    fresh = HfImageConfig(model=str(clip_folder), random_init=True).build().eval()
    assert not torch.equal(fresh(pixels).pooled_BD, encoder(pixels).pooled_BD)


def test_hf_preprocess_comes_from_the_folder(clip_folder: Path) -> None:
    assert HfImageConfig(model=str(clip_folder)).build().preprocess.mean[0] == 0.48145466
    CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(
        clip_folder
    )
    preprocess = HfImageConfig(model=str(clip_folder)).build().preprocess
    assert preprocess.mean == (0.1, 0.2, 0.3)
    assert preprocess.std == (0.4, 0.5, 0.6)
    assert (preprocess.size, preprocess.resize, preprocess.interpolation) == (32, "crop", "bicubic")
    file = clip_folder / "preprocessor_config.json"
    siglip_like = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 2,
        "size": {"height": 32, "width": 32},
    }
    file.write_text(json.dumps(siglip_like), encoding="utf-8")
    preprocess = HfImageConfig(model=str(clip_folder)).build().preprocess
    assert (preprocess.resize, preprocess.interpolation) == ("squash", "bilinear")
