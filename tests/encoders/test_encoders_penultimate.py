"""Penultimate features: what is left out, what is left, and which weight files fit."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from latentmodal.encoders import HfImageConfig, ImageEncoder, TimmImageConfig

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
VIT, EVA = "vit_base_patch16_clip_224.openai", "eva_giant_patch14_clip_224"
HF_TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def timm_config(model: str, **fields: Any) -> TimmImageConfig:
    fields = {"image_size": 32, "model_kwargs": TINY, "features": "penultimate", **fields}
    return TimmImageConfig(model=model, **fields)


def hf_config(**fields: Any) -> HfImageConfig:
    fields = {"config": {"model_type": "clip_vision_model", **HF_TINY}, **fields}
    return HfImageConfig(features="penultimate", **fields)


ENCODERS = {
    "timm-clip": timm_config(VIT),
    "timm-clip-avg": timm_config(VIT, pool="avg"),
    "timm-siglip": timm_config("vit_base_patch16_siglip_224"),
    "timm-eva": timm_config(EVA),
    "timm-eva-avg": timm_config(EVA, pool="avg"),
    "hf-clip": hf_config(),
}
MEAN_POOLED = {"timm-clip-avg", "timm-siglip", "timm-eva-avg"}


def pixels_for(encoder: ImageEncoder) -> Tensor:
    side = encoder.preprocess.size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=generator)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", ENCODERS)
def test_pooled_is_class_token_or_mean_and_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    encoder = ENCODERS[name].build()
    features = encoder(pixels_for(encoder))
    assert features.tokens_BND.shape == (2, encoder.num_tokens, 32)
    prefix = encoder.num_tokens - 16  # CLS where the model has one
    assert prefix == (0 if name == "timm-siglip" else 1)
    tokens = features.tokens_BND
    expected = tokens[:, prefix:].mean(1) if name in MEAN_POOLED else tokens[:, 0]
    torch.testing.assert_close(features.pooled_BD, expected)
    features.tokens_BND.square().mean().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert len(encoder.fsdp_units) == 1
    assert sum(isinstance(m, encoder.fsdp_units) for m in encoder.modules()) == 2


@pytest.mark.parametrize(
    ("config", "alone"),
    [
        *((config, set()) for config in ENCODERS.values()),
        (
            HfImageConfig(config={"model_type": "clip_vision_model", **HF_TINY}),
            {"model.post_layernorm.weight", "model.post_layernorm.bias"},
        ),
        (timm_config(VIT, features="last"), set()),
        (
            timm_config(VIT, features="last", pool="avg"),
            {"trunk.fc_norm.weight", "trunk.fc_norm.bias"},
        ),
        (TimmImageConfig(model="test_resnet"), set()),
    ],
)
def test_parameters_of_the_pooled_feature_alone(config: Any, alone: set[str]) -> None:
    encoder = config.build()
    encoder.requires_grad_(False)
    encoder.train()
    first = next(encoder.children()).eval()
    assert set(encoder.pooling_parameters()) == alone
    assert encoder.training and not first.training, "modes are left as they were"
    encoder.requires_grad_(True)
    encoder(pixels_for(encoder)).tokens_BND.square().mean().backward()
    assert {n for n, p in encoder.named_parameters() if p.grad is None} == alone


@pytest.mark.parametrize("name", ENCODERS)
def test_grad_checkpointing_changes_nothing_but_memory(name: str) -> None:
    torch.manual_seed(0)
    encoder = ENCODERS[name].build()
    grads = []
    for enable in (False, True):
        encoder.set_grad_checkpointing(enable)
        encoder.zero_grad()
        encoder(pixels_for(encoder)).tokens_BND.square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in encoder.parameters()])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("name", ENCODERS)
def test_builds_on_meta_with_the_same_description(name: str) -> None:
    real = ENCODERS[name].build()
    with torch.device("meta"):
        meta = ENCODERS[name].build()
    assert {n: p.shape for n, p in meta.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
    for attribute in ("num_tokens", "width", "pooled_width", "fsdp_units", "preprocess"):
        assert getattr(meta, attribute) == getattr(real, attribute)


@pytest.mark.parametrize(
    ("config", "blocks", "total"),
    [
        # LAVIS' eva_clip_g: 39 blocks. transformers' Blip2VisionModel has 39 x 1408 more, the key
        # biases that are always zero, and the 2816 of ln_vision.
        (timm_config(EVA, image_size=None, model_kwargs={}), 39, 985_894_528),
        (
            timm_config("vit_large_patch14_clip_224.openai", image_size=None, model_kwargs={}),
            23,
            290_581_504,
        ),
        (
            hf_config(
                config={
                    "model_type": "clip_vision_model",
                    "hidden_size": 1024,
                    "intermediate_size": 4096,
                    "num_hidden_layers": 24,
                    "num_attention_heads": 16,
                    "patch_size": 14,
                }
            ),
            23,
            290_581_504,
        ),
    ],
    ids=["eva-g", "timm-clip-l", "hf-clip-l"],
)
def test_counts_of_the_published_towers(config: Any, blocks: int, total: int) -> None:
    with torch.device("meta"):
        encoder = config.build()
    assert count(encoder) == total
    assert sum(isinstance(m, encoder.fsdp_units) for m in encoder.modules()) == blocks
    assert encoder.num_tokens == 257


def test_eva_is_the_tower_of_lavis() -> None:
    """As its configuration there says; the arithmetic is compared in the parity tests."""
    with torch.device("meta"):
        encoder = timm_config(EVA, image_size=364, model_kwargs={}, resize="squash").build()
    block = encoder.trunk.blocks[0]
    assert encoder.num_tokens == 677 and encoder.width == 1408
    assert block.attn.num_heads == 16 and block.mlp.fc1.out_features == 6144
    assert encoder.activation == "gelu" and block.norm1.eps == block.norm2.eps == 1e-6
    assert block.attn.qkv.bias is None and block.attn.q_bias is not None
    assert "k_bias" not in block.attn.state_dict()
    assert block.gamma_1 is None and encoder.trunk.rope is None
    assert isinstance(encoder.trunk.norm_pre, nn.Identity)
    preprocess = encoder.preprocess
    assert preprocess.mean == (0.48145466, 0.4578275, 0.40821073)
    assert preprocess.std == (0.26862954, 0.26130258, 0.27577711)
    assert (preprocess.size, preprocess.resize, preprocess.interpolation) == (
        364,
        "squash",
        "bicubic",
    )


def source(model: str, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    trunk = timm.create_model(model, img_size=32, **{**TINY, "num_classes": 5, **options})
    return {
        name: tensor + 0.01 * torch.randn_like(tensor)
        for name, tensor in trunk.state_dict().items()
    }


def without(state: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


@pytest.mark.parametrize("model", [VIT, EVA])
@pytest.mark.parametrize("pool", ["cls", "avg"])
@pytest.mark.parametrize("absent", [(), ("norm.", "head."), ("blocks.2.", "norm.", "head.")])
def test_whole_and_shortened_weight_files_load(
    tmp_path: Path, model: str, pool: str, absent: tuple[str, ...]
) -> None:
    state = without(source(model), *absent)
    save_file(state, tmp_path / "model.safetensors")
    encoder = timm_config(model, pool=pool, weights=str(tmp_path)).build()
    loaded = encoder.trunk.state_dict()
    assert loaded.keys() == without(state, "blocks.2.", "norm.", "head.").keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize("size", [16, 32, 48])
def test_the_hubs_eva_at_another_size_is_that_of_a_local_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """LAVIS and timm resize learned positions by different cubic kernels."""
    torch.manual_seed(1)
    native = timm.create_model(EVA, num_classes=5, **TINY).state_dict()  # of 224 pixels
    save_file(native, tmp_path / "model.safetensors")
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(native)
    )
    monkeypatch.setattr("timm.models._builder.has_hf_hub", lambda *_, **__: True)
    hub = timm_config(EVA, pretrained=True, image_size=size).build().trunk.state_dict()
    local = timm_config(EVA, weights=str(tmp_path), image_size=size).build().trunk.state_dict()
    assert hub.keys() == local.keys()
    assert all(torch.equal(tensor, local[name]) for name, tensor in hub.items())
    assert hub["pos_embed"].shape == (1, 1 + (size // 8) ** 2, 32)
    assert torch.equal(hub["blocks.0.mlp.fc1.weight"], native["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"blocks.1.mlp.fc1.weight": None}, r"blocks\.1\.mlp\.fc1\.weight"),
        ({"pos_embed": None}, "pos_embed"),
        ({"blocks.1.attn.rel_pos": torch.zeros(2)}, r"blocks\.1\.attn\.rel_pos"),
        ({"blocks.3.norm1.weight": torch.zeros(32)}, r"blocks\.3\.norm1\.weight"),
    ],
)
def test_other_keys_stay_accounted_for(
    tmp_path: Path, change: dict[str, Tensor | None], named: str
) -> None:
    state = without(source(EVA) | change, "norm.")
    kept = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=named):
        timm_config(EVA, weights=str(tmp_path)).build()


def test_hf_folder_whole_or_shortened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    whole = CLIPVisionModel(CLIPVisionConfig(**HF_TINY))
    whole.save_pretrained(tmp_path / "whole")
    short = CLIPVisionModel(CLIPVisionConfig(**HF_TINY))
    short.load_state_dict(whole.state_dict())
    short.save_pretrained(
        tmp_path / "short",
        state_dict={
            name: tensor
            for name, tensor in whole.state_dict().items()
            if "layers.2." not in name and "post_layernorm" not in name
        },
    )
    expected = {
        n: t for n, t in whole.state_dict().items() if "layers.2." not in n and "post_" not in n
    }
    for folder in ("whole", "short"):
        encoder = hf_config(config=None, model=str(tmp_path / folder)).build()
        torch.testing.assert_close(dict(encoder.model.state_dict()), expected, rtol=0, atol=0)
    assert "start random" not in caplog.text


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: timm_config(VIT, features="second"), "features='second'.*last, penultimate"),
        (lambda: HfImageConfig(model="x", features="first"), "features='first'"),
        (lambda: timm_config(VIT, pool="map"), "pool='map'.*use avg"),
        (
            lambda: TimmImageConfig(model="test_resnet", features="penultimate"),
            "needs a ViT or EVA",
        ),
        (lambda: timm_config(VIT, model_kwargs={**TINY, "depth": 1}), "two blocks or more"),
        (lambda: hf_config(config={**HF_TINY, "model_type": "vit"}), "needs a CLIP vision model"),
        (
            lambda: hf_config(
                config={**HF_TINY, "model_type": "clip_vision_model", "num_hidden_layers": 1}
            ),
            "two blocks or more",
        ),
    ],
)
def test_mistakes_are_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build().build()
    assert "\n" not in str(caught.value)
