"""Weights of the one part of a bridge that MiniGPT-4 trains: its last, onto the language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from latentmodal.bridges import Bridge, load
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.tensor_files import read_tensors
from latentmodal.experiments.training.config import check_choice

FORMATS = ("run", "latentmodal", "minigpt4")

_RELEASED = "llama_proj."


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """Where the last part of a bridge comes from, whatever the parts before it are.

    Attributes:
        path: a run's folder; a bridge's folder; a released MiniGPT-4 checkpoint.
        format: run, latentmodal or minigpt4. Of a MiniGPT-4 file only `llama_proj.*` is read:
            released ones also hold an optimiser and, some of them, buffers of the language model.
    """

    path: str
    format: str = "run"

    def __post_init__(self) -> None:
        check_choice("format", self.format, FORMATS)

    def load_into(self, bridge: Bridge) -> None:
        """Fill the bridge, or the last part of a chain.

        Raises:
            UserError: nothing there, or another projection than the recipe's; a width that does
                not fit names the language models it would fit.
        """
        last, prefix = last_part(bridge)
        path = Path(self.path).expanduser()
        try:
            if self.format == "minigpt4":
                state = _released(path, last)
            elif self.format == "latentmodal":
                state = last_part(_bridge_in(path))[0].state_dict()
            else:
                state = _of_run(path, prefix)
        except (OSError, ValueError) as error:
            raise UserError(f"projection: {path}: {str(error).splitlines()[0]}") from error
        _check(path, state, last)
        last.load_state_dict(state)


def last_part(bridge: nn.Module) -> tuple[nn.Module, str]:
    """The module next to the language model, and the prefix of its weights in the bridge."""
    parts = getattr(bridge, "parts", None)
    if isinstance(parts, nn.ModuleList):
        return parts[-1], f"parts.{len(parts) - 1}."
    return bridge, ""


def _bridge_in(folder: Path) -> Bridge:
    bridge = load(folder)
    if not isinstance(bridge, Bridge):
        raise ValueError(f"holds {bridge.config.name}, which is no bridge")
    return bridge


def _released(path: Path, last: nn.Module) -> Mapping[str, Tensor]:
    """`llama_proj.weight` and `.bias` under the names of the one linear map of `last`."""
    found = {
        name.removeprefix(_RELEASED): tensor
        for name, tensor in read_tensors(path).items()
        if name.startswith(_RELEASED)
    }
    if found.keys() != {"weight", "bias"}:
        raise ValueError("holds no llama_proj.weight and llama_proj.bias; give MiniGPT-4's file")
    linear = [name for name, module in last.named_modules() if isinstance(module, nn.Linear)]
    if len(linear) != 1:
        raise ValueError(
            f"llama_proj is one linear map, the last part of the bridge has {len(linear)}: name "
            "linear or token_merge there"
        )
    named = {f"{linear[0]}.{name}": tensor for name, tensor in found.items()}
    # A norm before it is frozen in MiniGPT-4 and never loaded: it stays as it begins.
    return {**last.state_dict(), **named}


def _of_run(folder: Path, prefix: str) -> Mapping[str, Tensor]:
    # Both read recipes, whose schema names the systems: imported above they make a circle.
    from latentmodal.experiments.training.checkpoints import read_checkpoint
    from latentmodal.experiments.training.run_folder import RunFolder

    state = read_checkpoint(RunFolder(folder).checkpoint())["state_dict"]
    whole = f"model.bridge.{prefix}"
    found = {k.removeprefix(whole): v for k, v in state.items() if k.startswith(whole)}
    if not found:
        raise ValueError("is a run that trained no such part; give one with the same bridge")
    return found


def _check(path: Path, state: Mapping[str, Tensor], last: nn.Module) -> None:
    wanted = last.state_dict()
    if strange := sorted(state.keys() ^ wanted.keys()):
        raise UserError(
            f"projection: {path} holds another kind of projection than the recipe names "
            f"({strange[0]}); name that kind as the last part of system.bridge"
        )
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"projection: {path}: its {name} is {tuple(tensor.shape)}, the recipe needs "
                f"{tuple(wanted[name].shape)}: {_reason(tensor, wanted[name])}"
            )


def _reason(found: Tensor, wanted: Tensor) -> str:
    """What a linear map of this shape belongs to."""
    if found.shape[0] != wanted.shape[0]:
        fits = {4096: " (a 7B Llama or Vicuna)", 5120: " (a 13B Llama or Vicuna)"}
        return (
            f"it speaks to a language model of width {found.shape[0]}"
            f"{fits.get(found.shape[0], '')}; name that one, or another file"
        )
    return "it reads other features; name the image tower and bridge it was trained with"
