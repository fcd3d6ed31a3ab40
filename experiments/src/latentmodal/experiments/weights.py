"""A trained run's towers and head under the names of another library, ready for it to load.

What a state dict does not show (heads, activation, epsilons, pooling, pixels) goes into the other
library's configuration beside the weights; a tower it cannot describe is refused, never bent.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save

from latentmodal.encoders.convert import Activations, save_dual_encoder_weights
from latentmodal.experiments.choose import nearest
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.run import load_system
from latentmodal.experiments.exports import EXPORTS
from latentmodal.experiments.files import write_atomically, write_text_atomically
from latentmodal.experiments.systems.dual_encoder import DualEncoder
from latentmodal.experiments.training.checkpoints import SUFFIX
from latentmodal.experiments.training.run_folder import RunFolder

_REMEDY = "free space or choose another target"


def convert_run(source: Path, target: Path, to: str) -> None:
    """Write the two towers and the head of a run for another library.

    Args:
        source: a run's folder (its newest checkpoint), or one of the checkpoints in it.
        target: a `.safetensors` file for the weights alone, or a folder for weights and
            configuration, which `CLIPModel.from_pretrained`, `SiglipModel.from_pretrained` or
            open_clip's `local-dir:` then reads.
        to: `open_clip`, `hf_clip`, `hf_siglip`, or `latentmodal` for `system.weights` of a recipe.

    Raises:
        UserError: no such run, unknown `to`, or towers the other library has no place for.
    """
    if to not in EXPORTS and to != "latentmodal":
        raise UserError(f"--to {to}: unknown; {nearest(to, [*EXPORTS, 'latentmodal'])}")
    single = target.suffix == ".safetensors"
    if not single and (target.is_file() or target.suffix in (".pt", ".pth", ".bin", SUFFIX)):
        raise UserError(f"{target}: give a folder, or a file that ends in .safetensors")
    model = _load_model(source)
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


def _load_model(source: Path) -> DualEncoder:
    if source.suffix == SUFFIX:
        run, checkpoint = RunFolder(source.parent.parent), source
        run.recipe()
    else:
        run = RunFolder(source)
        run.recipe()
        checkpoint = run.checkpoint()
    system, _ = load_system(run, checkpoint)
    if not isinstance(system.model, DualEncoder):
        raise UserError(f"{source}: holds no pair of image and text tower; only those convert")
    return system.model


def _write_ours(path: Path, model: DualEncoder) -> None:
    activations = Activations(model.image_encoder.activation, model.text_encoder.activation)

    def write(file: BinaryIO) -> None:
        try:
            save_dual_encoder_weights(file.name, model.state_dict(), activations=activations)
        except SafetensorError as error:  # its way of passing on what the disk said
            raise OSError(str(error)) from error

    write_atomically(path, write, _REMEDY)
