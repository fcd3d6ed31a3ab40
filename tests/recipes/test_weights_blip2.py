"""BLIP-2's first stage between runs, LAVIS, transformers and folders: same outputs, exact ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2Model
from typer.testing import CliRunner

from blip2_weights import (
    EVA,
    IDS_BT,
    OPT,
    PIXELS_BCHW,
    T5,
    TUNED,
    Train,
    assert_same,
    blip2,
    lavis_of,
    refusal,
    same_epsilon,
)
from finished_runs import model_of
from latentmodal.bridges import AlignmentHead, QFormer, load
from latentmodal.encoders import TimmImageConfig
from latentmodal.experiments.cli import app
from latentmodal.experiments.exports.blip2 import Options
from latentmodal.experiments.weights import convert, convert_run


@torch.no_grad()
def test_transformers_loads_an_alignment_run(aligned: Train, tmp_path: Path) -> None:
    run = aligned()
    lines = convert_run(run, tmp_path / "hf", "hf_blip2")
    assert "head.temperature" in lines[1] and "bridge.caption_head" in lines[1]
    assert lines[2] == "absent  nothing"
    theirs, report = Blip2ForImageTextRetrieval.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    same_epsilon(theirs)
    ours = model_of(run)
    pixels, mask = ours.image_encoder.normalise(PIXELS_BCHW), IDS_BT != 0
    similarity, verdict = (
        theirs(pixels, IDS_BT, mask.long(), use_image_text_matching_head=head).logits_per_image
        for head in (False, True)
    )
    features, image_BME = ours.encode_image(PIXELS_BCHW)
    text_BE = ours.encode_text(IDS_BT, mask)
    our_similarity = (image_BME @ text_BE.T).amax(dim=1)
    torch.testing.assert_close(our_similarity, similarity, atol=1e-5, rtol=1e-4)
    judged = ours.match(features, IDS_BT, mask)
    torch.testing.assert_close(judged, verdict[:, 1], atol=1e-5, rtol=1e-4)

    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 32, "width": 32} and "crop_size" not in processor


def test_an_alignment_run_to_lavis_and_back(aligned: Train, tmp_path: Path) -> None:
    run = aligned()
    convert_run(run, tmp_path / "a.pth", "lavis")
    state = lavis_of(tmp_path / "a.pth")
    assert state["temp"].shape == ()
    assert not any(name.startswith("visual_encoder.") for name in state)
    assert torch.equal(
        state["Qformer.bert.embeddings.word_embeddings.weight"],
        state["Qformer.cls.predictions.decoder.weight"],
    )
    for form, way in (("latentmodal", tmp_path / "ours"), ("lavis", tmp_path / "b.pth")):
        source, back = (tmp_path / "a.pth", "lavis") if form == "latentmodal" else (
            tmp_path / "ours", "latentmodal"
        )  # fmt: skip
        convert(source, way, form, form=back, options=Options(heads=2 if back == "lavis" else None))
    assert_same(lavis_of(tmp_path / "b.pth"), state)

    ours = model_of(run)
    bridge, head = load(tmp_path / "ours"), load(tmp_path / "ours" / "head")
    assert isinstance(bridge, QFormer) and isinstance(head, AlignmentHead)
    assert bridge.config.heads == 2
    for module, own in ((bridge, ours.bridge), (head, ours.head)):
        assert_same(dict(module.state_dict()), dict(own.state_dict()))


def test_the_tower_goes_along_when_it_trained_or_is_asked_for(
    aligned: Train, tmp_path: Path
) -> None:
    convert_run(aligned(TUNED), tmp_path / "tuned.pth", "lavis")
    convert_run(aligned(), tmp_path / "asked.pth", "lavis", Options(with_vision=True))
    for file in ("tuned.pth", "asked.pth"):
        state = lavis_of(tmp_path / file)
        assert state["visual_encoder.blocks.1.attn.q_bias"].shape == (32,)
    source, options = tmp_path / "tuned.pth", Options(heads=2, vision_heads=2)
    convert(source, tmp_path / "ours", "latentmodal", form="lavis", options=options)
    convert(tmp_path / "ours", tmp_path / "again.pth", "lavis", form="latentmodal")
    assert_same(lavis_of(tmp_path / "again.pth"), lavis_of(source))
    # Its tower is one a recipe's `weights` can name.
    TimmImageConfig(**EVA, weights=str(tmp_path / "ours" / "image_encoder")).build()
    convert(source, tmp_path / "hf", "hf_blip2", form="lavis", options=options)
    loaded = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "hf")
    assert torch.equal(
        loaded.vision_model.embeddings.class_embedding, lavis_of(source)["visual_encoder.cls_token"]
    )


def test_a_file_of_the_tower_beside_a_lavis_file(aligned: Train, tmp_path: Path) -> None:
    run = aligned()
    convert_run(run, tmp_path / "a.pth", "lavis")
    trunk = dict(model_of(run).image_encoder.trunk.state_dict())
    torch.save(trunk, tmp_path / "eva.pth")
    options: dict[str, Any] = {"heads": 2, "vision_heads": 2}
    assert "give --vision, the file of its EVA weights" in refusal(
        tmp_path / "a.pth", tmp_path / "no", "hf_blip2", form="lavis", **options
    )
    chosen = Options(**options, vision=str(tmp_path / "eva.pth"))
    convert(tmp_path / "a.pth", tmp_path / "one", "hf_blip2", form="lavis", options=chosen)
    convert_run(run, tmp_path / "two", "hf_blip2")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert_same(first, second)
    # A whole EVA has a block and a norm that BLIP-2 does not read.
    trunk = {name: tensor.clone() for name, tensor in trunk.items()}
    whole = {"norm.weight": torch.ones(32), "norm.bias": torch.ones(32)}
    last = {k: v for k, v in trunk.items() if k.startswith("blocks.1.")}
    whole |= {k.replace("s.1.", "s.2."): v.clone() for k, v in last.items()}
    save_file({**trunk, **whole}, tmp_path / "whole.safetensors")
    chosen = Options(**options, vision=str(tmp_path / "whole.safetensors"))
    lines = convert(tmp_path / "a.pth", tmp_path / "3", "hf_blip2", form="lavis", options=chosen)
    assert "blocks.2." in lines[1] or "norm.weight" in lines[1]
    assert_same(load_file(tmp_path / "3" / "model.safetensors"), second)


@pytest.mark.parametrize("text", ["opt", "t5", None])
def test_transformers_to_ours_and_back(text: str | None, tmp_path: Path) -> None:
    if text is None:
        blip2(Blip2ForImageTextRetrieval, tmp_path / "hf")
    else:
        fields = {"model_type": text, **(OPT if text == "opt" else T5)}
        blip2(Blip2ForConditionalGeneration, tmp_path / "hf", fields)
    lines = convert(tmp_path / "hf", tmp_path / "ours", "latentmodal", form="hf_blip2")
    convert(tmp_path / "ours", tmp_path / "back", "hf_blip2", form="latentmodal")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), state)
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back")
    )
    for part in ("vision_config", "qformer_config"):
        for key in ("num_attention_heads", "hidden_size", "layer_norm_eps"):
            assert before[part][key] == after[part][key]
    if text is None:
        assert "head.temperature" in lines[2]
        assert load(tmp_path / "ours" / "head").state_dict()["temperature"].item() == (
            pytest.approx(0.07)
        )
        message = refusal(tmp_path / "ours", tmp_path / "a.pth", "lavis", form="latentmodal")
        assert "LAVIS" in message and "caption_head" in message
        return
    assert f"llm {sum(k.startswith('language_model.') for k in state)}" in lines[0]
    convert(tmp_path / "hf", tmp_path / "a.pth", "lavis", form="hf_blip2")
    assert f"{text}_proj.weight" in lavis_of(tmp_path / "a.pth")
    assert "visual_encoder.cls_token" in lavis_of(tmp_path / "a.pth")


def test_a_folder_in_shards(tmp_path: Path) -> None:
    model = blip2(Blip2Model, tmp_path / "hf")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    assert index.is_file()
    for name in ("hf", "shards"):
        convert(tmp_path / name, tmp_path / f"{name}.pth", "lavis", form="hf_blip2")
    assert_same(lavis_of(tmp_path / "hf.pth"), lavis_of(tmp_path / "shards.pth"))
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    content["weight_map"][first] = "../hf/model.safetensors"
    index.write_text(json.dumps(content))
    message = refusal(tmp_path / "shards", tmp_path / "no", "latentmodal", form="hf_blip2")
    assert "names '../hf/model.safetensors', which is no file of its folder" in message


def test_the_command_line(aligned: Train, tmp_path: Path, latentmodal: Any) -> None:
    arguments = ["convert", str(aligned()), str(tmp_path / "a.pth"), "--to", "lavis"]
    done = CliRunner().invoke(app, [*arguments, "--with-vision"])
    assert done.exit_code == 0, done.output
    groups = [line.split()[0] for line in done.output.splitlines()]
    assert groups[-4:] == ["taken", "unused", "absent", "wrote"]
    arguments = ["convert", str(tmp_path / "a.pth"), str(tmp_path / "out"), "--from", "lavis"]
    chosen = ["--to", "hf_blip2", "--heads", "2", "--vision-heads", "2"]
    assert CliRunner().invoke(app, [*arguments, *chosen]).exit_code == 0
    assert (tmp_path / "out" / "config.json").is_file()

    refused = latentmodal(*arguments[:2], tmp_path / "o", "--from", "lavis", "--to", "latentmodal")
    assert refused.returncode == 2
    last = refused.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "give --heads" in last
    assert "Traceback" not in refused.stderr
