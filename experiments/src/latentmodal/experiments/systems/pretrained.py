"""Where a bridge starts from: another run, a saved bridge, LAVIS, transformers, or BERT."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from timm.models.eva import Eva
from torch import Tensor, nn

from latentmodal.bridges import AlignmentHead, QFormer, load
from latentmodal.bridges.convert import qformer_from_bert, qformer_from_hf, qformer_from_lavis
from latentmodal.encoders.convert import eva_from_hf_blip2, eva_from_lavis, resize_positions
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.tensor_files import read_tensors
from latentmodal.experiments.training.config import check_choice
from latentmodal.experiments.training.fingerprints import unlike

log = logging.getLogger(__name__)

FORMATS = ("run", "latentmodal", "lavis", "hf", "bert")

_TOWER, _TRUNK = "image_encoder.", "image_encoder.trunk."
# What only the first stage has; the second leaves it behind.
_TEXT_BRANCH = ("word_embed.", "position_embed.", "caption_head.", ".text_mlp.")
_MAY_BE_NEW = ("bridge.proj.", "head.")


@dataclass(frozen=True)
class Found:
    """What a source holds, under `bridge.`, `head.` and `image_encoder.`.

    `heads` is the number of attention heads its Q-Former was trained with, where the source says;
    `absent` names weights that its format never has; `frozen_tower` says what the frozen part of
    the tower was that it was trained on, see `tower_digests`.
    """

    state: Mapping[str, Tensor]
    heads: int | None = None
    absent: list[str] = field(default_factory=list)
    frozen_tower: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """Weights a bridge (and its heads, where the model has them) starts from.

    A source with a single bridge fills the first part of a chain; the rest of it starts new.

    Attributes:
        path: a run's folder; a folder as `latentmodal convert --to latentmodal` writes it; a LAVIS
            file; a folder or file of transformers weights; a BERT as transformers names it or as
            a folder.
        format: run, latentmodal, lavis, hf or bert.
    """

    path: str
    format: str = "run"

    def __post_init__(self) -> None:
        check_choice("format", self.format, FORMATS)

    def load_into(self, model: nn.Module) -> None:
        """Fill `model.bridge`; `model.head` and `model.image_encoder` where the source has them.

        A projection onto a language model and a head may be new, and so may what the format never
        has; a text branch may be left behind. Anything else must fit.

        Raises:
            UserError: nothing there, names and shapes that do not fit, or a run on another tower.
        """
        found = self._read(model)
        tower = model.image_encoder
        assert isinstance(tower, nn.Module)
        if strange := unlike(tower, found.frozen_tower):
            raise UserError(
                f"pretrained: {self.path} was trained on another image tower than the recipe's "
                f"({strange[0]} differs): name the tower of that run, "
                f"system.image_encoder={{name: run, path: {self.path}}}"
            )
        reader = _reader(model) if not _is_chain(found.state) else model.bridge
        assert isinstance(reader, nn.Module)
        bridge = {k: v for k, v in found.state.items() if not k.startswith(_TOWER)}
        towers = {k: v for k, v in found.state.items() if k.startswith(_TOWER)}
        if towers.keys() <= dict(model.named_buffers()).keys():
            towers = {}  # a run keeps a frozen tower's statistics, but the recipe brings the tower
        wanted = _prefixed("bridge.", reader.state_dict()) | {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name.startswith(("head.",) + ((_TOWER,) if towers else ()))
        }
        state = bridge | self._fit_tower(towers, model)
        new = [name for name in wanted if name not in state]
        problems = _problems(state, wanted, found.absent)
        heads = getattr(getattr(reader, "config", None), "heads", None)
        if not problems and found.heads not in (None, heads):
            problems = [f"bridge.heads is {found.heads} there and {heads} in the recipe"]
        if problems:
            raise UserError(
                f"pretrained: {self.path} does not fit the recipe: {_shortened(problems)}"
            )
        if new:
            log.warning("%s has nothing for %s: it starts new", self.path, _shortened(_parts(new)))
        state = {k: v for k, v in state.items() if k in wanted}
        rest = {name: tensor for name, tensor in state.items() if not name.startswith("bridge.")}
        own = {k.removeprefix("bridge."): v for k, v in state.items() if k not in rest}
        reader.load_state_dict(own, strict=False)
        model.load_state_dict(rest, strict=False)

    def _read(self, model: nn.Module) -> Found:
        """The source's weights, as far as the model's Q-Former has a place for them."""
        if self.format == "run":
            return _of_run(Path(self.path).expanduser())
        try:
            if self.format == "latentmodal":
                return _of_folder(Path(self.path).expanduser())
            reader = _reader(model)
            if not isinstance(reader, QFormer):
                raise ValueError(f"format {self.format} fills a qformer; name it as the bridge")
            if self.format == "bert":
                return _of_bert(self.path, reader)
            return _of_blip2(Path(self.path).expanduser(), self.format, model)
        except (OSError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            where = "" if self.path in line else f"{self.path}: "
            raise UserError(f"pretrained: {where}{_shortened(line.split('; '))}") from error

    def _fit_tower(self, towers: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Learned positions of EVA for the recipe's size of pictures."""
        fitted = dict(towers)
        trunk = _trunk(model)
        positions = fitted.get(f"{_TRUNK}pos_embed")
        if positions is not None and isinstance(trunk, Eva):
            prefix = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
            fitted[f"{_TRUNK}pos_embed"] = resize_positions(
                positions, trunk.patch_embed.grid_size, num_prefix_tokens=prefix
            )
        return fitted


def _reader(model: nn.Module) -> nn.Module:
    """What reads the tower: the bridge, or the first part of a chain."""
    bridge = model.bridge
    assert isinstance(bridge, nn.Module)
    parts = getattr(bridge, "parts", None)
    return parts[0] if isinstance(parts, nn.ModuleList) else bridge


def _is_chain(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("bridge.parts.") for name in state)


def _problems(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], absent: list[str]
) -> list[str]:
    problems = [
        f"{name} is missing"
        for name in wanted
        if name not in state and name not in absent and not name.startswith(_MAY_BE_NEW)
    ]
    problems += [
        f"the recipe has no {name}"
        for name in state
        if name not in wanted and not _may_be_left(name)
    ]
    problems += [
        f"{name} is {tuple(state[name].shape)}, the recipe's is {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    return problems


def _may_be_left(name: str) -> bool:
    """What a first stage holds and a second has no use for."""
    return name.startswith(_MAY_BE_NEW) or any(part in name for part in _TEXT_BRANCH)


def _parts(names: list[str]) -> list[str]:
    """`bridge.proj` of `bridge.proj.weight` and `bridge.proj.bias`."""
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))


def _shortened(problems: list[str], most: int = 4) -> str:
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def _of_run(folder: Path) -> Found:
    # Both read recipes, whose schema names the systems: imported above they make a circle.
    from latentmodal.experiments.training.checkpoints import read_checkpoint
    from latentmodal.experiments.training.run_folder import RunFolder

    run = RunFolder(folder)
    bridge = getattr(run.recipe().system, "bridge", None)
    if bridge is None:
        raise UserError(f"pretrained: {folder} is a run without a bridge; give one of alignment")
    checkpoint = read_checkpoint(run.checkpoint())
    state = checkpoint["state_dict"]
    parts = ("model.bridge.", "model.head.", "model.image_encoder.")
    own = {k.removeprefix("model."): v for k, v in state.items() if k.startswith(parts)}
    frozen: dict[str, str] = checkpoint.get("frozen_tower", {})
    if "frozen_tower" not in checkpoint:  # as checkpoints were before they noted it
        log.warning("%s does not say what tower it read: see that the recipe's is the same", folder)
    absent = [_TOWER + name for name in frozen]  # of a tower that trained in parts
    return Found(own, getattr(bridge, "heads", None), absent, frozen)


def _of_folder(folder: Path) -> Found:
    bridge = load(folder)
    state = _prefixed("bridge.", bridge.state_dict())
    if (folder / "head").is_dir():
        state |= _prefixed("head.", load(folder / "head").state_dict())
    if (folder / "image_encoder").is_dir():
        state |= _prefixed(_TRUNK, read_tensors(folder / "image_encoder"))
    return Found(state, getattr(bridge.config, "heads", None))


def _of_blip2(path: Path, form: str, model: nn.Module) -> Found:
    """LAVIS' or transformers' weights; the language model is the recipe's own affair."""
    bridge, head = _reader(model), getattr(model, "head", None)
    assert isinstance(bridge, QFormer)
    head_config = head.config if isinstance(head, AlignmentHead) else None
    lavis = form == "lavis"
    state = read_tensors(path, without=("language_model.",))
    tower = _tower_of(state, lavis)
    if tower and not isinstance(trunk := _trunk(model), Eva):
        kind = type(model.image_encoder if trunk is None else trunk).__name__
        raise ValueError(
            f"it holds an EVA tower, which its Q-Former reads; the recipe's image_encoder is a "
            f"{kind}: name timm's eva_giant_patch14_clip_224 with features=penultimate"
        )
    convert = qformer_from_lavis if lavis else qformer_from_hf
    converted = convert(state, bridge.config, head_config)
    heads = None if lavis else _heads_beside(path)
    return Found({**converted.state, **tower}, heads, converted.absent)


def _tower_of(state: Mapping[str, Tensor], lavis: bool) -> dict[str, Tensor]:
    """The image tower of a LAVIS file or a transformers folder, where it is in there."""
    prefix = "visual_encoder." if lavis else "vision_model."
    norm = "vision_model.post_layernorm."  # the bridge's, though transformers keeps it in the tower
    inside = {
        name: tensor
        for name, tensor in state.items()
        if name.startswith(prefix) and not name.startswith(norm)
    }
    converted = eva_from_lavis(inside) if lavis else eva_from_hf_blip2(inside)
    if converted.unmatched:
        raise ValueError(
            f"its image tower is no EVA ({converted.unmatched[0]}), and only EVA is read; name "
            f"that tower as image_encoder and leave {prefix}* out of the file"
        )
    return _prefixed(_TRUNK, converted.state)


def _trunk(model: nn.Module) -> nn.Module | None:
    """The timm model of the tower, where it is one."""
    trunk = getattr(model.image_encoder, "trunk", None)
    return trunk if isinstance(trunk, nn.Module) else None


def _heads_beside(path: Path) -> int | None:
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    heads = config.get("qformer_config", {}).get("num_attention_heads")
    return heads if isinstance(heads, int) else None


def _of_bert(source: str, bridge: QFormer) -> Found:
    """BERT where the Q-Former has a counterpart; the rest as it was initialised."""
    from transformers import AutoModelForMaskedLM

    folder = Path(source).expanduser()
    name = str(folder) if folder.is_dir() else source
    bert = AutoModelForMaskedLM.from_pretrained(name, trust_remote_code=False)
    converted = qformer_from_bert(bert.state_dict(), bridge.state_dict())
    return Found(converted.state, bert.config.num_attention_heads)


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}
