"""What a conversion of BLIP-2 refuses: one line, and nothing written."""

from __future__ import annotations

import argparse
import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from blip2_weights import CNN, OPT, TUNED, Train, lavis_of, refusal
from bomb import Bomb
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.weights import convert_run


@pytest.mark.parametrize("to", ["lavis", "hf_blip2", "latentmodal"])
def test_a_full_disk_is_one_line(
    aligned: Train, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = aligned()

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    for place in ("torch.save", "latentmodal.experiments.exports.blip2_hf.save_file"):
        monkeypatch.setattr(place, full)
    monkeypatch.setattr("latentmodal.bridges.component.save_file", full)
    target = tmp_path / ("out.pth" if to == "lavis" else "out")
    with pytest.raises(UserError, match=r"No space left on device.*; free space or choose another"):
        convert_run(run, target, to)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("content", ["namespace", "bomb"])
def test_pickled_objects_are_refused(aligned: Train, tmp_path: Path, content: str) -> None:
    convert_run(aligned(), tmp_path / "a.pth", "lavis")
    file, mark = tmp_path / "bad.pth", tmp_path / "executed"
    thing = argparse.Namespace(lr=1) if content == "namespace" else Bomb(mark)
    torch.save({"model": lavis_of(tmp_path / "a.pth"), "config": thing}, file)
    message = refusal(file, tmp_path / "out", "latentmodal", form="lavis", heads=2)
    assert f"{file} is refused: it would run" in message
    assert content == "bomb" or "argparse.Namespace" in message
    assert not mark.exists()


@pytest.mark.parametrize(
    ("overrides", "to", "reason"),
    [
        (
            (CNN, TUNED),
            "hf_blip2",
            "no place for this image tower: it is timm's ResNet, not its Eva",
        ),
        (("system.bridge.input_norm=false",), "hf_blip2", "post_layernorm.weight"),
        (("system.bridge.num_input_positions=17",), "lavis", "bridge.input_positions has no place"),
        (("system.objectives.itg=0",), "lavis", "bridge.caption_head"),
        (("system.objectives.itm=0",), "hf_blip2", "head.itm_head"),
        ((), "hf_clip", "holds no pair of image and text tower; only those convert to hf_clip"),
    ],
)
def test_a_run_that_has_no_place_there(
    aligned: Train, tmp_path: Path, overrides: tuple[str, ...], to: str, reason: str
) -> None:
    target = tmp_path / ("out.pth" if to == "lavis" else "out")
    assert reason in refusal(aligned(*overrides), target, to)


def test_what_is_refused_before_anything_is_read(
    aligned: Train, trained: Train, tmp_path: Path
) -> None:
    run, out = aligned(), tmp_path / "out"
    assert "end its name in .pth" in refusal(run, out, "lavis")
    assert "give a folder to write" in refusal(run, tmp_path / "out.pth", "hf_blip2")
    assert "did you mean 'lavis'?" in refusal(run, out, "latentmodal", form="lavi")
    assert "lavis converts to lavis, hf_blip2, latentm" in refusal(
        run, out, "hf_clip", form="lavis"
    )
    assert "that is a copy" in refusal(run, out, "latentmodal", form="latentmodal")
    assert "no such file or folder" in refusal(tmp_path / "x", out, "latentmodal", form="lavis")
    assert "holds two towers" in refusal(trained("clip"), tmp_path / "out.pth", "lavis")
    assert "not a 'blip-2'" in _foreign(tmp_path, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    with pytest.raises(UserError, match="holds files already; give a new folder"):
        convert_run(run, tmp_path / "full", "hf_blip2")


def _foreign(tmp_path: Path, out: Path) -> str:
    OPTForCausalLM(OPTConfig(**OPT)).save_pretrained(tmp_path / "opt")
    return refusal(tmp_path / "opt", out, "latentmodal", form="hf_blip2")


def test_heads_that_shapes_do_not_show(aligned: Train, tmp_path: Path) -> None:
    convert_run(aligned(), tmp_path / "a.pth", "lavis")
    message = refusal(tmp_path / "a.pth", tmp_path / "out", "latentmodal", form="lavis")
    assert "width 16 does not divide into heads of 64; give --heads" in message
    damaged = lavis_of(tmp_path / "a.pth")
    damaged = {k: v for k, v in damaged.items() if ".layer.1." not in k}
    torch.save({"model": damaged}, tmp_path / "b.pth")
    message = refusal(tmp_path / "b.pth", tmp_path / "out", "latentmodal", form="lavis", heads=2)
    assert " more" in message and len(message) < 600
