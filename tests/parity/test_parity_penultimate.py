"""Penultimate features equal BLIP-2's EVA and CLIP's hidden_states[-2] in transformers."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Blip2VisionConfig, Blip2VisionModel, CLIPVisionConfig, CLIPVisionModel

from latentmodal.encoders import HfImageConfig, ImageEncoder, TimmImageConfig
from latentmodal.encoders.convert import (
    Converted,
    eva_from_hf_blip2,
    eva_from_lavis,
    eva_to_hf_blip2,
    eva_to_lavis,
    from_hf_clip,
    to_hf_clip,
)

SIZE, WIDTH, MLP = 32, 32, 140
TINY = {"patch_size": 8, "embed_dim": WIDTH, "num_heads": 2, "mlp_ratio": MLP / WIDTH}
HF_TINY = {
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 8,
}


def shaken(model: nn.Module, seed: int) -> nn.Module:
    """In double, no parameter zero or one, which would hide a missing bias or norm."""
    torch.manual_seed(seed)
    for parameter in model.double().parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def eva(**fields: object) -> ImageEncoder:
    config = TimmImageConfig(
        model="eva_giant_patch14_clip_224",
        image_size=SIZE,
        features="penultimate",
        model_kwargs={**TINY, "depth": 3},
        **fields,  # type: ignore[arg-type]
    )
    encoder = shaken(config.build(), 0)
    assert isinstance(encoder, ImageEncoder)
    return encoder


def blip2(layers: int = 2) -> Blip2VisionModel:
    return Blip2VisionModel(Blip2VisionConfig(num_hidden_layers=layers, **HF_TINY))


def inputs(encoder: ImageEncoder) -> tuple[Tensor, Tensor]:
    """Pixels as ours takes them, and normalised as theirs takes them."""
    generator = torch.Generator().manual_seed(2)
    pixels_BCHW = torch.rand(2, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return pixels_BCHW, encoder.double().normalise(pixels_BCHW)


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def stripped(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def grads(model: nn.Module, tokens_BND: Tensor) -> dict[str, Tensor]:
    weight = torch.linspace(-1, 1, tokens_BND.numel(), dtype=tokens_BND.dtype)
    (tokens_BND.sin().flatten() * weight).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_eva_equals_the_vision_tower_of_blip2() -> None:
    ours, theirs = eva(), shaken(blip2(), 1)
    state, unmatched = eva_to_hf_blip2(ours.trunk.state_dict())
    assert not unmatched
    missing = theirs.load_state_dict(stripped(state, "vision_model."), strict=False)
    assert missing.missing_keys == ["post_layernorm.weight", "post_layernorm.bias"]
    assert not missing.unexpected_keys

    pixels_BCHW, normalised_BCHW = inputs(ours)
    their_BND = theirs(pixel_values=normalised_BCHW).last_hidden_state
    norm = theirs.post_layernorm
    our_BND = F.layer_norm(
        ours(pixels_BCHW).tokens_BND, (WIDTH,), norm.weight, norm.bias, eps=norm.eps
    )
    torch.testing.assert_close(our_BND, their_BND, rtol=1e-10, atol=1e-10)

    our_grads = eva_to_hf_blip2(grads(ours.trunk, our_BND)).state
    norm.zero_grad()  # ours went through it too
    their_grads = prefixed(grads(theirs, their_BND), "vision_model.")
    rest = {n: g for n, g in their_grads.items() if "post_layernorm" not in n}
    assert our_grads.keys() == rest.keys()
    for name, grad in rest.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(our_grads[name], grad, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("to", "back"), [(eva_to_lavis, eva_from_lavis), (eva_to_hf_blip2, eva_from_hf_blip2)]
)
def test_eva_names_go_there_and_back(
    to: Callable[[dict[str, Tensor]], Converted], back: Callable[[dict[str, Tensor]], Converted]
) -> None:
    state = eva().trunk.state_dict()
    there, unmatched = to(state)
    assert not unmatched
    again, unmatched = back(there)
    assert not unmatched and again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_blip2_names_go_there_and_back_but_for_the_norm() -> None:
    theirs = prefixed(blip2().state_dict(), "vision_model.")
    state, unmatched = eva_from_hf_blip2(theirs)
    assert unmatched == ["vision_model.post_layernorm.bias", "vision_model.post_layernorm.weight"]
    again = eva_to_hf_blip2(state).state
    assert again.keys() == theirs.keys() - set(unmatched)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.items())


def test_lavis_names_and_what_is_none_of_them() -> None:
    names = {
        *("visual_encoder.cls_token", "visual_encoder.pos_embed"),
        *(f"visual_encoder.patch_embed.proj.{kind}" for kind in ("weight", "bias")),
        "visual_encoder.blocks.1.attn.qkv.weight",
        *(f"visual_encoder.blocks.1.attn.{part}_bias" for part in "qv"),
        *(
            f"visual_encoder.blocks.1.{part}.{kind}"
            for part in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
            for kind in ("weight", "bias")
        ),
    }
    others = {
        *("Qformer.bert.embeddings.position_ids", "ln_vision.weight", "query_tokens"),
        *("visual_encoder.conv1.weight", "visual_encoder.norm.weight", "blocks.1.norm1.weight"),
    }
    state, unmatched = eva_from_lavis({name: torch.zeros(1) for name in names | others})
    assert unmatched == sorted(others)
    assert state.keys() == {name.removeprefix("visual_encoder.") for name in names}
    whole = {n.replace("blocks.1.", "blocks.0.") for n in eva().trunk.state_dict()}
    assert whole == {name.replace("blocks.1.", "blocks.0.") for name in state}


def test_a_key_bias_is_refused() -> None:
    theirs = prefixed(blip2().state_dict(), "vision_model.")
    name = "vision_model.encoder.layers.1.self_attn.qkv.bias"
    theirs[name][WIDTH + 3] = 0.5
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.qkv\.bias.*reaches 0\.5"):
        eva_from_hf_blip2(theirs)
    theirs[name][WIDTH + 3] = 1e-7  # rounding
    assert not eva_from_hf_blip2(theirs).state["blocks.1.attn.q_bias"].any()


def test_a_file_in_lavis_own_names_is_a_weights_file(tmp_path: object) -> None:
    """eva_vit_g.pth: no prefix, one block fewer than EVA has, no final norm."""
    source = eva()
    file = f"{tmp_path}/eva.safetensors"
    save_file(source.trunk.state_dict(), file)
    config = TimmImageConfig(
        model="eva_giant_patch14_clip_224",
        weights=file,
        image_size=SIZE,
        features="penultimate",
        model_kwargs={**TINY, "depth": 3},
    )
    encoder = config.build().double().eval()
    pixels_BCHW, _ = inputs(source)
    torch.testing.assert_close(
        encoder(pixels_BCHW).tokens_BND, source(pixels_BCHW).tokens_BND, rtol=1e-4, atol=1e-5
    )


def test_eva_on_larger_pictures(tmp_path: object) -> None:
    """Positions loaded at another size are those transformers interpolates, and LAVIS did."""
    theirs = blip2()
    state = eva_from_hf_blip2(prefixed(theirs.state_dict(), "vision_model.")).state
    file, larger = f"{tmp_path}/eva.safetensors", SIZE + 24
    save_file(state, file)
    encoder = TimmImageConfig(
        model="eva_giant_patch14_clip_224",
        weights=file,
        image_size=larger,
        features="penultimate",
        model_kwargs={**TINY, "depth": 3},
    ).build()
    tokens_1ND = torch.zeros(1, 1 + (larger // 8) ** 2, WIDTH)
    expected = theirs.embeddings.interpolate_pos_encoding(tokens_1ND, larger, larger)
    torch.testing.assert_close(encoder.trunk.pos_embed, expected)
    assert torch.equal(encoder.trunk.pos_embed[:, :1], state["pos_embed"][:, :1])


@pytest.mark.parametrize("source", ["timm", "transformers"])
def test_clip_equals_hidden_states_minus_two(source: str, tmp_path: object) -> None:
    theirs = shaken(CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=3, **HF_TINY)), 1)
    if source == "transformers":
        theirs.save_pretrained(str(tmp_path))
        config = HfImageConfig(model=str(tmp_path), features="penultimate")
        ours: ImageEncoder = config.build().double().eval()
        ours.model.load_state_dict(  # the folder was read in single precision
            {name: theirs.state_dict()[name] for name in ours.model.state_dict()}
        )
        to_theirs = {name: name for name in ours.model.state_dict()}
    else:
        ours = TimmImageConfig(
            model="vit_base_patch16_clip_224.openai",
            image_size=SIZE,
            features="penultimate",
            activation="quick_gelu",
            model_kwargs={**TINY, "depth": 3},
        ).build()
        state = from_hf_clip(prefixed(theirs.state_dict(), "vision_model.")).state
        trunk = stripped(state, "image_encoder.trunk.")
        ours.double().eval().trunk.load_state_dict(
            {name: trunk[name] for name in ours.trunk.state_dict()}
        )
        to_theirs = {}
    pixels_BCHW, normalised_BCHW = inputs(ours)
    output = theirs(pixel_values=normalised_BCHW, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    our_BND, their_BND = ours(pixels_BCHW).tokens_BND, output.hidden_states[-2]
    torch.testing.assert_close(our_BND, their_BND, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours(pixels_BCHW).pooled_BD, their_BND[:, 0], rtol=1e-10, atol=1e-10)

    their_grads = grads(theirs, their_BND)
    if to_theirs:
        our_grads = grads(ours.model, our_BND)
    else:
        converted = to_hf_clip(prefixed(grads(ours.trunk, our_BND), "image_encoder.trunk."))
        our_grads = stripped(converted.state, "vision_model.")
    assert our_grads.keys() == their_grads.keys()
    for name, grad in their_grads.items():
        assert grad.abs().max() > 0 or "k_proj.bias" in name, name
        torch.testing.assert_close(our_grads[name], grad, rtol=1e-8, atol=1e-10, msg=name)
