"""Weights under the names of another library, ready for it to load, and theirs under ours.

What a state dict does not show (heads, activation, epsilons, pooling, pixels) goes into the other
library's configuration beside the weights; a tower it cannot describe is refused, never bent. A
run of two towers goes to open_clip and to the CLIP classes of transformers; BLIP-2, run or file,
goes between LAVIS, transformers and this project.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save

from latentmodal.encoders.convert import Activations, save_dual_encoder_weights
from latentmodal.experiments.choose import nearest
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.run import find_checkpoint, load_system
from latentmodal.experiments.exports import EXPORTS
from latentmodal.experiments.exports.blip2 import Account, Blip2Weights, Options, shortened
from latentmodal.experiments.exports.blip2_hf import read_hf, write_hf
from latentmodal.experiments.exports.blip2_lavis import SUFFIXES, read_lavis, write_lavis
from latentmodal.experiments.exports.blip2_ours import of_model, read_ours, write_ours
from latentmodal.experiments.files import write_atomically, write_text_atomically
from latentmodal.experiments.systems.alignment_model import AlignmentModel
from latentmodal.experiments.systems.dual_encoder import DualEncoder
from latentmodal.experiments.systems.vision_language import VisionLanguageModel
from latentmodal.experiments.training.checkpoints import SUFFIX

BLIP2_SOURCES: Mapping[str, Callable[[Path, Options], Blip2Weights]] = {
    "lavis": read_lavis,
    "hf_blip2": read_hf,
    "latentmodal": read_ours,
}
BLIP2_TARGETS: Mapping[str, Callable[[Blip2Weights, Path, Options, str], Account]] = {
    "lavis": write_lavis,
    "hf_blip2": write_hf,
    "latentmodal": write_ours,
}

_REMEDY = "free space or choose another target"


def convert(
    source: Path, target: Path, to: str, *, form: str = "run", options: Options | None = None
) -> list[str]:
    """Write `source` in another format.

    Args:
        source: a run's folder (its newest checkpoint), or one of the checkpoints in it; for
            another `form` the file or folder.
        target: the file or folder to write.
        to: a key of `EXPORTS` or `BLIP2_TARGETS`.
        form: "run", or a key of `BLIP2_SOURCES`.
        options: what the source does not say.

    Returns:
        What was taken and what was not, a line each; nothing for a run of two towers.

    Raises:
        UserError: nothing to read, an unknown format, or something the target has no place for.
    """
    if form == "run":
        return convert_run(source, target, to, options)
    if form not in BLIP2_SOURCES:
        raise UserError(f"--from {form}: unknown; {nearest(form, ['run', *BLIP2_SOURCES])}")
    if to not in BLIP2_TARGETS:
        raise UserError(f"--to {to}: {form} converts to {', '.join(BLIP2_TARGETS)}")
    if form == to:
        raise UserError(f"--from {form} --to {to}: that is a copy; choose another --to")
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    _check_blip2_target(target, to)
    chosen = options or Options()
    weights = _explained(source, lambda: BLIP2_SOURCES[form](source, chosen))
    return _write_blip2(source, weights, target, to, chosen)


def convert_run(source: Path, target: Path, to: str, options: Options | None = None) -> list[str]:
    """Write the weights of a run for another library.

    Args:
        source: a run's folder (its newest checkpoint), or one of the checkpoints in it.
        target: two towers: a `.safetensors` file for the weights alone, or a folder for weights
            and configuration, which `CLIPModel.from_pretrained`, `SiglipModel.from_pretrained` or
            open_clip's `local-dir:` then reads. BLIP-2: a `.pth` file for LAVIS, else a folder.
        to: `open_clip`, `hf_clip`, `hf_siglip`; `lavis`, `hf_blip2`; `latentmodal`.
        options: for BLIP-2; see `Options`.

    Raises:
        UserError: no such run, unknown `to`, or parts the other library has no place for.
    """
    if to not in EXPORTS and to not in BLIP2_TARGETS:
        raise UserError(f"--to {to}: unknown; {nearest(to, [*EXPORTS, *BLIP2_TARGETS])}")
    if to in ("lavis", "hf_blip2"):
        _check_blip2_target(target, to)
    elif target.suffix != ".safetensors" and (
        target.is_file() or target.suffix in (".pt", ".pth", ".bin", SUFFIX)
    ):
        raise UserError(f"{target}: give a folder, or a file that ends in .safetensors")
    system = _load(source)
    model = system.model
    if isinstance(model, DualEncoder):
        if to in ("lavis", "hf_blip2"):
            raise UserError(f"{source}: holds two towers; give --to {', '.join(EXPORTS)}")
        _write_dual_encoder(source, target, to, model)
        return []
    if to in EXPORTS:
        raise UserError(
            f"{source}: holds no pair of image and text tower; only those convert to {to}: give "
            f"--to {', '.join(BLIP2_TARGETS)}"
        )
    _check_blip2_target(target, to)
    end = getattr(getattr(system.config, "prompt", None), "end", None)
    weights = _explained(source, lambda: of_model(model, end))
    return _write_blip2(source, weights, target, to, options or Options())


def _write_blip2(
    source: Path, weights: Blip2Weights, target: Path, to: str, options: Options
) -> list[str]:
    account = _explained(source, lambda: BLIP2_TARGETS[to](weights, target, options, _REMEDY))
    return account.lines()


def _check_blip2_target(target: Path, to: str) -> None:
    if to == "lavis":
        if target.suffix not in SUFFIXES:
            raise UserError(f"{target}: LAVIS reads a file; end its name in .pth")
    elif target.is_file() or target.suffix in (*SUFFIXES, ".safetensors", ".bin"):
        raise UserError(f"{target}: give a folder to write")
    elif target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target}: holds files already; give a new folder")


def _explained(source: Path, step: Callable[[], Any]) -> Any:
    """A refusal as one line that names the source."""
    try:
        return step()
    except UserError:
        raise
    except (OSError, ValueError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        where = "" if str(source) in line else f"{source}: "
        raise UserError(f"{where}{shortened(line.split('; '))}") from error


def _write_dual_encoder(source: Path, target: Path, to: str, model: DualEncoder) -> None:
    single = target.suffix == ".safetensors"
    if to == "latentmodal":
        _write_ours(target if single else target / "model.safetensors", model)
        return
    try:
        export = EXPORTS[to](model, not single)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    path = target if single else target / export.weights_name
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in export.state.items()}
    # transformers insists on the note saying that a PyTorch program wrote the file.
    write_atomically(path, lambda file: file.write(save(tensors, {"format": "pt"})), _REMEDY)
    for name, text in export.configs.items():
        if not single:
            write_text_atomically(target / name, text, _REMEDY)


def _load(source: Path) -> Any:
    system, _ = load_system(*find_checkpoint(source))
    if not isinstance(system.model, DualEncoder | AlignmentModel | VisionLanguageModel):
        raise UserError(f"{source}: holds neither two towers nor a bridge; only those convert")
    return system


def _write_ours(path: Path, model: DualEncoder) -> None:
    activations = Activations(model.image_encoder.activation, model.text_encoder.activation)

    def write(file: BinaryIO) -> None:
        try:
            save_dual_encoder_weights(file.name, model.state_dict(), activations=activations)
        except SafetensorError as error:  # its way of passing on what the disk said
            raise OSError(str(error)) from error

    write_atomically(path, write, _REMEDY)
