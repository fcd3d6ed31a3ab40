"""A trained bridge as a folder of its own, which `latentmodal.bridges.load` opens anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError

from latentmodal.bridges import Bridge, hub
from latentmodal.bridges.component import CONFIG_FILE, WEIGHTS_FILE
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.report import EvalReport
from latentmodal.experiments.evaluation.run import find_checkpoint, load_system
from latentmodal.experiments.exports.bridge_card import bridge_card
from latentmodal.experiments.training.checkpoints import step_of
from latentmodal.experiments.training.run_folder import RunFolder

CARD_FILE = "README.md"
FILES = (CARD_FILE, CONFIG_FILE, WEIGHTS_FILE)


def export_bridge(source: Path, target: Path | None = None) -> Path:
    """Write the bridge of a run: weights, configuration, and a card that says where it is from.

    It maps what the run's image encoder gives to what its language model reads, a chain as a whole.

    Args:
        source: a run's folder (its newest checkpoint), or one of the checkpoints in it.
        target: the folder; `bridge` in that of the run where None. An export of before is
            replaced, at once, when the new one is complete.

    Returns:
        The folder.

    Raises:
        UserError: no such run, no checkpoint in it, no bridge, or a target that holds something
            else or cannot be written.
    """
    run, checkpoint = find_checkpoint(source)
    folder = target if target is not None else run.path / "bridge"
    _check_target(folder)
    system, recipe = load_system(run, checkpoint)
    bridge = getattr(system.model, "bridge", None)
    if not isinstance(bridge, Bridge):
        raise UserError(
            f"{source}: {type(system).__name__} trains no bridge; "
            + (
                "two towers and their head go by latentmodal convert"
                if hasattr(system.model, "head")
                else "give a run that trains one"
            )
        )
    step = step_of(checkpoint)
    card = bridge_card(folder.resolve().name, recipe, system.model, step, _report(run, step))
    try:
        _write(folder.resolve(), bridge, card)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({error}); choose another folder") from error
    return folder


def check_address(address: str) -> None:
    """Raise UserError unless it can be the name of a repository on the hub."""
    try:
        hub.split_address(address)
    except ValueError as error:
        raise UserError(str(error)) from error


def push_folder(folder: Path, address: str, *, private: bool) -> str:
    """Put an exported folder on the Hugging Face hub.

    Returns:
        Where to look at it.

    Raises:
        UserError: not an address, `huggingface_hub` is not installed, or the hub refuses.
    """
    try:
        return hub.upload(folder, address, private=private, message="Upload bridge")
    except ValueError as error:
        raise UserError(f"{error}; the export itself is in {folder}") from error


def _report(run: RunFolder, step: int) -> EvalReport | None:
    """What was measured at this step, if anything was."""
    for file in (run.path / "eval.json", run.evaluation_file(step)):
        if file.is_file():
            report = EvalReport.read_json(file)
            if report.context.get("step") == step:
                return report
    return None


def _write(folder: Path, bridge: Bridge, card: str) -> None:
    """Write beside `folder`, then take its place."""
    new, old = (folder.with_name(f".{folder.name}.{state}") for state in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    try:
        bridge.save_pretrained(new)
        (new / CARD_FILE).write_text(card, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _check_target(folder: Path) -> None:
    """Raise UserError unless it is absent, empty, or an export."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder to write")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not (names <= set(FILES) and _is_export(folder / CONFIG_FILE)):
        raise UserError(f"{folder}: holds files that are no export; give a new folder")


def _is_export(config: Path) -> bool:
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and {"bridge", "format_version"} <= fields.keys()
