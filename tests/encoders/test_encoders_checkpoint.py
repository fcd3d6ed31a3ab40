"""Reading and writing dual-encoder checkpoints: wrappers, refusals, activations."""

import argparse
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from bomb import Bomb
from latentmodal.encoders.convert import (
    Activations,
    load_dual_encoder_weights,
    read_state_dict,
    save_dual_encoder_weights,
)

QUICK = Activations("quick_gelu", "quick_gelu")
ERF = Activations("gelu", "gelu")
TANH = Activations("gelu_tanh", "gelu_tanh")
TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TEXT = {
    **TINY,
    "vocab_size": 20,
    "max_position_embeddings": 6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {**TINY, "image_size": 16, "patch_size": 8}
OPEN_CLIP_MODEL = {
    "embed_dim": 8,
    "vision_cfg": {
        "image_size": 16,
        "layers": 1,
        "width": 16,
        "head_width": 8,
        "patch_size": 8,
    },
    "text_cfg": {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}


def open_clip_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return open_clip.CLIP(**OPEN_CLIP_MODEL).state_dict()


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes_are_stripped(
    tmp_path: Path, wrapper: str | None, prefix: str
) -> None:
    state = {"a.weight": torch.ones(2), "module.inner": torch.zeros(1)}
    saved: dict[str, Any] = {prefix + name: tensor for name, tensor in state.items()}
    if wrapper is not None:
        saved = {"epoch": 3, wrapper: saved, "optimizer": {"state": {}}}
    torch.save(saved, tmp_path / "weights.pt")
    read = read_state_dict(tmp_path / "weights.pt")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_objects_are_refused_by_name(tmp_path: Path, legacy: bool) -> None:
    file, mark = tmp_path / "bad.pt", tmp_path / "executed"
    torch.save({"args": argparse.Namespace(lr=1)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"argparse\.Namespace"):
        read_state_dict(file)
    torch.save({"x": Bomb(mark)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="refused"):
        read_state_dict(file)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:.*TorchScript archive")
def test_torchscript_is_refused_with_the_way_out(tmp_path: Path) -> None:
    module = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    module.save(tmp_path / "ViT-B-32.pt")
    with pytest.raises(ValueError, match=r"TorchScript.*safetensors"):
        read_state_dict(tmp_path / "ViT-B-32.pt")


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04broken"])
def test_rubbish_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.pt"):
        read_state_dict(tmp_path / "file.pt")
    (tmp_path / "file.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.safetensors"):
        read_state_dict(tmp_path / "file.safetensors")


def test_a_tensor_alone_is_no_state_dict(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="holds a Tensor"):
        read_state_dict(tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        read_state_dict(tmp_path / "nowhere")


def test_openai_weights_need_quick_gelu(tmp_path: Path) -> None:
    file = tmp_path / "ViT-B-32.safetensors"
    save_file({**open_clip_state(), "input_resolution": torch.tensor(16)}, file)
    state = load_dual_encoder_weights(file, "openai", activations=QUICK)
    assert state["image_encoder.trunk.pos_embed"].shape == (1, 5, 16)
    assert state["head.logit_scale"].shape == (1,)
    with pytest.raises(ValueError, match=r"'quick_gelu' in its image tower, ours has 'gelu'"):
        load_dual_encoder_weights(file, "openai", activations=ERF)
    with pytest.raises(ValueError, match="text tower"):
        load_dual_encoder_weights(file, "openai", activations=Activations("quick_gelu", "gelu"))
    # A tower without one of the three activations, such as a ResNet, has nothing to disagree about.
    load_dual_encoder_weights(file, "openai", activations=Activations(None, "quick_gelu"))


@pytest.mark.parametrize(
    ("model", "trained_with"),
    [
        ({}, ERF),
        ({"quick_gelu": True}, QUICK),
        (
            {"text_cfg": {**OPEN_CLIP_MODEL["text_cfg"], "act_kwargs": {"approximate": "tanh"}}},
            Activations("gelu", "gelu_tanh"),
        ),
        (
            {"vision_cfg": {"timm_model_name": "vit_base_patch32_clip_quickgelu_224"}},
            Activations("quick_gelu", "gelu"),
        ),
    ],
)
def test_open_clip_folder_states_its_activation(
    tmp_path: Path, model: dict[str, Any], trained_with: Activations
) -> None:
    save_file(open_clip_state(), tmp_path / "open_clip_model.safetensors")
    config = {"model_cfg": {**OPEN_CLIP_MODEL, **model}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    load_dual_encoder_weights(tmp_path, "open_clip", activations=trained_with)
    for other in {ERF, QUICK, TANH} - {trained_with}:
        with pytest.raises(ValueError, match="trained with activation"):
            load_dual_encoder_weights(tmp_path, "open_clip", activations=other)


def test_a_bare_file_needs_the_activation_stated(tmp_path: Path) -> None:
    file = tmp_path / "epoch_3.pt"
    torch.save({"epoch": 3, "state_dict": open_clip_state()}, file)
    with pytest.raises(ValueError, match="checkpoint_activations"):
        load_dual_encoder_weights(file, "open_clip", activations=ERF)
    load_dual_encoder_weights(file, "open_clip", activations=ERF, checkpoint_activations=ERF)
    with pytest.raises(ValueError, match="ours has 'gelu'"):
        load_dual_encoder_weights(file, "open_clip", activations=ERF, checkpoint_activations=QUICK)


@pytest.mark.parametrize("stated", [True, False])
def test_hf_folders_state_their_activation(tmp_path: Path, stated: bool) -> None:
    clip = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))
    siglip = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))
    for name, model, right in (("hf_clip", clip, QUICK), ("hf_siglip", siglip, TANH)):
        folder = tmp_path / name
        model.save_pretrained(folder)
        if not stated:  # older configs leave defaults out
            config = json.loads((folder / "config.json").read_text())
            for tower in ("vision_config", "text_config"):
                del config[tower]["hidden_act"]
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        state = load_dual_encoder_weights(folder, name, activations=right)
        assert any(key.startswith("text_encoder.blocks.0.") for key in state)
        with pytest.raises(ValueError, match="trained with activation"):
            load_dual_encoder_weights(folder, name, activations=ERF)


def test_an_activation_no_tower_of_ours_has(tmp_path: Path) -> None:
    save_file({"logit_scale": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = {"vision_config": {"hidden_act": "relu"}, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        load_dual_encoder_weights(tmp_path, "hf_clip", activations=QUICK)


def test_our_own_files_remember_their_activation(tmp_path: Path) -> None:
    file = tmp_path / "ours.safetensors"
    state = {"image_encoder.trunk.x": torch.ones(2), "head.logit_scale": torch.ones(1)}
    save_dual_encoder_weights(file, state, activations=QUICK)
    read = load_dual_encoder_weights(file, "latentmodal", activations=QUICK)
    assert read.keys() == state.keys()
    with pytest.raises(ValueError, match="set the image encoder's activation"):
        load_dual_encoder_weights(file, "latentmodal", activations=ERF)
    save_dual_encoder_weights(file, state, activations=Activations(None, None))
    load_dual_encoder_weights(file, "latentmodal", activations=ERF)


def test_strange_keys_and_formats_are_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({**open_clip_state(), "visual.layer1.0.conv1.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"1 keys.*visual\.layer1\.0\.conv1\.weight"):
        load_dual_encoder_weights(file, "openai", activations=QUICK)
    with pytest.raises(ValueError, match="choose from openai, open_clip, hf_clip"):
        load_dual_encoder_weights(file, "clip", activations=QUICK)
