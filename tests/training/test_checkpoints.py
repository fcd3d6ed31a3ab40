"""Checkpoints are whole or absent, verified before they are read, and never run code."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from bomb import Bomb
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.files import write_atomically, write_text_atomically
from latentmodal.experiments.recipe import load_recipe
from latentmodal.experiments.training.callbacks import Checkpoints
from latentmodal.experiments.training.checkpoints import (
    VerifiedCheckpointIO,
    digest_path,
    file_digest,
    is_intact,
    latest_checkpoint,
    read_checkpoint,
    step_of,
)
from latentmodal.experiments.training.fit import build_system
from latentmodal.experiments.training.run_folder import RunFolder

STATE = {"state_dict": {"w": torch.arange(6.0)}, "global_step": 3}


def save(folder: Path, step: int, content: Any = STATE) -> Path:
    path = folder / f"step={step:08d}.ckpt"
    VerifiedCheckpointIO().save_checkpoint(content, path)
    return path


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full_disk(file: BinaryIO, *_: Any) -> None:
    file.write(b"the first half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.bin"
    write_text_atomically(path, "old")
    with pytest.raises(UserError) as caught:
        write_atomically(path, full_disk)
    assert str(caught.value) == (
        f"{path}: could not be written (No space left on device); "
        "free space or choose another run_dir, then go on with resume=true"
    )
    assert path.read_text() == "old"
    assert names(path.parent) == ["file.bin"]


def test_an_unnamed_failure_is_still_a_line(tmp_path: Path) -> None:
    def fail(_file: BinaryIO) -> None:
        raise RuntimeError

    with pytest.raises(UserError, match=r"could not be written \(RuntimeError\)"):
        write_atomically(tmp_path / "file", fail)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="could not be written"):
        write_text_atomically(tmp_path / "taken" / "recipe.yaml", "text")


def test_a_checkpoint_cut_short_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 3)
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", lambda _content, file: full_disk(file))
        for again in (3, 4):
            with pytest.raises(UserError, match="No space left on device"):
                save(tmp_path, again, {"state_dict": {}})
    assert path.read_bytes() == before
    assert latest_checkpoint(tmp_path) == path
    assert names(tmp_path) == [path.name, digest_path(path).name]


def test_saved_and_read_again(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert is_intact(path) and step_of(path) == 12
    assert digest_path(path).read_text().strip() == file_digest(path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["w"], STATE["state_dict"]["w"])
    save(tmp_path, 12, {"state_dict": {"w": torch.zeros(1)}})
    assert len(read_checkpoint(path)["state_dict"]["w"]) == 1
    VerifiedCheckpointIO().remove_checkpoint(path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("damage", ["byte", "cut", "empty", "no digest", "gone"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save(tmp_path, 9), save(tmp_path, 10)
    match damage:
        case "byte":
            flip_a_byte(newer)
        case "cut":
            newer.write_bytes(newer.read_bytes()[:-100])
        case "empty":
            newer.write_bytes(b"")
        case "no digest":
            digest_path(newer).unlink()
        case "gone":
            newer.unlink()
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == older
    warned = [record.getMessage() for record in caplog.records]
    if damage == "gone":
        assert warned == []
        with pytest.raises(UserError, match="no such checkpoint"):
            read_checkpoint(newer)
    else:
        assert warned == [f"{newer} is damaged or incomplete; trying the checkpoint before it"]
        with pytest.raises(UserError, match="damaged, its SHA-256 does not match"):
            read_checkpoint(newer)


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        save(tmp_path, step)
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and step_of(latest) == 100_000_000
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_a_pickle_bomb_with_a_valid_digest_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    path = save(tmp_path, 1, {"state_dict": {}, "extra": Bomb(mark)})
    assert is_intact(path)
    with pytest.raises(UserError, match="refused, it holds more than tensors and plain values"):
        read_checkpoint(path)
    with pytest.raises(UserError, match="refused"):
        VerifiedCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not mark.exists()


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    paths = [save(tmp_path, step) for step in (2, 4, 6)]
    Checkpoints(tmp_path, every=2, keep=keep)._prune()
    kept = paths[-keep:]
    assert names(tmp_path) == sorted(p.name for k in kept for p in (k, digest_path(k)))


def test_what_a_run_keeps(finished_run: Path) -> None:
    folder = finished_run / "checkpoints"
    steps = [step_of(path) for path in sorted(folder.glob("*.ckpt"))]
    assert steps == [4, 6]
    assert len(names(folder)) == 4
    content = read_checkpoint(folder / "step=00000006.ckpt")
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops", "rng"} <= content.keys()
    assert content["frozen_fingerprint"] == ""


def test_going_on_from_the_one_before_a_damaged_one(
    fit: Callable[..., str], finished_run: Path
) -> None:
    """The last two steps are trained again, and come out the same."""
    newest = finished_run / "checkpoints" / "step=00000006.ckpt"
    expected = read_checkpoint(newest)["state_dict"]
    flip_a_byte(newest)
    (finished_run / "finished.json").unlink()
    printed = fit(resume=True)
    assert f"going on from {finished_run / 'checkpoints' / 'step=00000004.ckpt'}" in printed
    again = read_checkpoint(newest)["state_dict"]
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("system.text_encoder.depth=2", "holds unknown ['model.text_encoder.blocks.1."),
        ("system.text_encoder.width=16", "size mismatch for model.text_encoder"),
    ],
)
def test_a_checkpoint_of_another_recipe(
    fit: Callable[..., str],
    finished_run: Path,
    tmp_path: Path,
    override: str,
    reason: str,
) -> None:
    other = tmp_path / "other"
    fit(override, f"run_dir={other}", "trainer.max_steps=2", "evaluation={tasks: null}")
    (finished_run / "finished.json").unlink()
    for path in (finished_run / "checkpoints").iterdir():
        path.unlink()
    for path in (other / "checkpoints").iterdir():
        shutil.copy(path, finished_run / "checkpoints")
    with pytest.raises(UserError) as caught:
        fit(resume=True)
    assert "the checkpoint does not fit this recipe" in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_frozen_weights_are_left_out_but_remembered(
    fit: Callable[..., str], tiny_recipe: Path, tmp_path: Path
) -> None:
    locked = ("freeze[image_encoder.*]=frozen", "trainer.max_steps=2", "trainer.checkpoint_every=1")
    fit(*locked, "evaluation={tasks: null}", "trainer.activation_checkpointing=true")
    run = RunFolder(tmp_path / "run")
    content = read_checkpoint(run.checkpoint())
    parameters = {
        name for name, _ in build_system(load_recipe(str(run.recipe_file)), run).named_parameters()
    }
    saved = parameters & content["state_dict"].keys()
    assert saved == {name for name in parameters if "image_encoder" not in name}
    assert len(content["frozen_fingerprint"]) == 64

    run.finished_file.unlink()
    run.checkpoint().unlink()
    resumed = (*locked, "evaluation={tasks: null}", "trainer.activation_checkpointing=true")
    assert "step=00000001.ckpt" in fit(*resumed, resume=True)

    run.finished_file.unlink()
    content["frozen_fingerprint"] = "0" * 64
    VerifiedCheckpointIO().save_checkpoint(content, run.checkpoint())
    with pytest.raises(UserError, match="the frozen weights are not the ones this checkpoint"):
        fit(*resumed, resume=True)
