"""`latentmodal convert`: a run's towers in another library give the embeddings they gave here."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPModel, SiglipModel

from finished_runs import model_of
from latentmodal.experiments import weights
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.exports import EXPORTS
from latentmodal.experiments.weights import convert_run

Train = Callable[..., Path]
CNN = (
    "system.image_encoder={model: test_resnet, image_size: null, activation: null, "
    "model_kwargs: null}"
)
PIXELS_BCHW = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS_BT = torch.tensor([[4, 19, 0, 0, 0, 0, 0, 0], [5, 6, 7, 19, 0, 0, 0, 0], [9] * 7 + [19]])


@torch.no_grad()
def assert_same_embeddings(model: Any, image: Callable[..., Any], text: Callable[..., Any]) -> None:
    """The other library takes normalised pixels; ours normalises inside."""
    normalised = model.image_encoder.normalise(PIXELS_BCHW)
    for ours, theirs in (
        (model.encode_image(PIXELS_BCHW), image(normalised)),
        (model.encode_text(IDS_BT, IDS_BT != 0), text(IDS_BT)),
    ):
        torch.testing.assert_close(ours, F.normalize(theirs, dim=-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "to", "library"),
    [("clip", "hf_clip", CLIPModel), ("siglip", "hf_siglip", SiglipModel)],
)
def test_transformers_loads_the_folder(
    trained: Train, tmp_path: Path, kind: str, to: str, library: Any
) -> None:
    run = trained(kind)
    convert_run(run, tmp_path / "out", to)
    theirs, report = library.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ours = model_of(run)
    assert_same_embeddings(
        ours,
        lambda pixels: theirs.get_image_features(pixels).pooler_output,
        lambda ids: theirs.get_text_features(ids).pooler_output,
    )
    torch.testing.assert_close(theirs.logit_scale.reshape(1), ours.head.logit_scale.detach())

    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    picture = (PIXELS_BCHW[0] * 255).to(torch.uint8)
    processed = processor(picture, return_tensors="pt")["pixel_values"][0]
    expected = ours.image_encoder.normalise(picture[None])[0]
    torch.testing.assert_close(processed, expected, atol=1e-5, rtol=1e-5)


def test_open_clip_loads_the_folder(trained: Train, tmp_path: Path) -> None:
    run = trained("clip")
    convert_run(run, tmp_path / "out", "open_clip")
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    theirs.eval()
    ours = model_of(run)
    assert_same_embeddings(ours, theirs.encode_image, theirs.encode_text)
    normalise = transform.transforms[-1]
    assert tuple(normalise.mean) == pytest.approx(ours.image_encoder.preprocess.mean)


def test_open_clip_takes_a_timm_tower(trained: Train, tmp_path: Path) -> None:
    """Its SigLIP layout, with a tower timm builds by name alone (a CNN of the smallest kind)."""
    run = trained(
        "clip",
        CNN,
        "system.text_encoder.activation=gelu",
    )
    convert_run(run, tmp_path / "out", "open_clip")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    ours = model_of(run)
    state = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert any(name.startswith("visual.trunk.") for name in state)
    pixels = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image = theirs.encode_image(ours.image_encoder.normalise(pixels), normalize=True)
        torch.testing.assert_close(image, ours.encode_image(pixels), atol=1e-6, rtol=1e-5)
        text = theirs.encode_text(IDS_BT, normalize=True)
        torch.testing.assert_close(text, ours.encode_text(IDS_BT, IDS_BT != 0))


@pytest.mark.parametrize(("kind", "to"), [("clip", "hf_clip"), ("siglip", "open_clip")])
def test_a_file_holds_the_weights_alone(trained: Train, tmp_path: Path, kind: str, to: str) -> None:
    target = tmp_path / "deep" / "out.safetensors"
    convert_run(trained(kind), target, to)
    assert [path.name for path in target.parent.iterdir()] == ["out.safetensors"]
    names = load_file(target)
    assert ("logit_bias" in names) == (kind == "siglip")


def test_one_of_the_checkpoints(trained: Train, tmp_path: Path) -> None:
    run = trained("clip", "trainer.checkpoint_every=1")
    first, last = sorted((run / "checkpoints").glob("*.ckpt"))
    for source, name in ((first, "first"), (last, "last"), (run, "newest")):
        convert_run(source, tmp_path / f"{name}.safetensors", "latentmodal")
    states = {name: load_file(tmp_path / f"{name}.safetensors") for name in ("first", "last")}
    newest = load_file(tmp_path / "newest.safetensors")
    assert all(torch.equal(newest[name], tensor) for name, tensor in states["last"].items())
    assert any(not torch.equal(newest[name], tensor) for name, tensor in states["first"].items())


@pytest.mark.parametrize(
    ("kind", "overrides", "to", "reason"),
    [
        ("siglip", (), "hf_clip", "pooled by 'map' (it reads the class token), a bidirectional"),
        ("clip", (), "hf_siglip", "pooled by 'token' (it pools by attention), a causal text tower"),
        (
            "clip",
            (CNN,),
            "hf_clip",
            "CLIPModel has no place for a ResNet as image_encoder",
        ),
        (
            "clip",
            ("system.head.image_bias=true",),
            "hf_clip",
            "CLIPModel has no place for visual_projection.bias",
        ),
        (
            "clip",
            ("system.head={image_projection: none, embed_dim: 32}",),
            "hf_clip",
            "CLIPModel needs visual_projection.weight, which this model lacks",
        ),
        (
            "clip",
            ("system.image_encoder.model_kwargs.reg_tokens=2",),
            "hf_clip",
            "CLIPModel has no place for image_encoder.trunk.reg_token",
        ),
        ("siglip", (), "open_clip", "open_clip builds vit_base_patch16_siglip_224 only as timm"),
        (
            "clip",
            ("system.text_encoder.activation=gelu",),
            "open_clip",
            "one activation for both towers, but the image tower uses quick_gelu and the text",
        ),
        (
            "clip",
            ("system.text_encoder={pooling: mean}",),
            "open_clip",
            "open_clip has no place for texts pooled by 'mean'",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    trained: Train, tmp_path: Path, kind: str, overrides: tuple[str, ...], to: str, reason: str
) -> None:
    run = trained(kind, *overrides)
    with pytest.raises(UserError) as caught:
        convert_run(run, tmp_path / "out", to)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_id_2_is_refused_where_it_means_something_else(trained: Train) -> None:
    """transformers pools a CLIP text tower of eos_token_id 2 at its highest id instead."""
    model = model_of(trained("clip"))
    config = model.text_encoder.config
    object.__setattr__(config, "eot_id", 2)
    with pytest.raises(ValueError, match="an end-of-text token of id 2"):
        EXPORTS["hf_clip"](model, True)


def test_bad_targets_and_sources(trained: Train, tmp_path: Path) -> None:
    run = trained("clip")
    with pytest.raises(UserError, match=r"--to hf_clp: unknown; did you mean 'hf_clip'\?"):
        convert_run(run, tmp_path / "out", "hf_clp")
    with pytest.raises(UserError, match=r"out\.pt: give a folder, or a file that ends in .safet"):
        convert_run(run, tmp_path / "out.pt", "hf_clip")
    with pytest.raises(UserError, match="no run here"):
        convert_run(tmp_path, tmp_path / "out", "hf_clip")
    with pytest.raises(UserError, match="no such checkpoint"):
        convert_run(run / "checkpoints" / "step=9.ckpt", tmp_path / "out", "hf_clip")


@pytest.mark.parametrize("to", ["hf_clip", "latentmodal"])
def test_a_full_disk_is_one_line(
    trained: Train, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("clip")

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "save", full)
    monkeypatch.setattr(weights, "save_dual_encoder_weights", full)
    target = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=r"No space left on device\); free space or choose another"):
        convert_run(run, target, to)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(trained: Train, tmp_path: Path, latentmodal: Any) -> None:
    done = latentmodal("convert", trained("clip"), tmp_path / "out", "--to", "hf_clip")
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'out'}" in done.stdout.replace("\n", "")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["CLIPModel"]
