"""What recipes choose from, beyond the packages' tables: bridges without widths, runs' towers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch

from latentmodal.bridges import BRIDGES, BridgeConfig, ChainConfig
from latentmodal.encoders import IMAGE_ENCODERS, ImageEncoder
from latentmodal.experiments.choose import choices
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.training.fingerprints import unlike


def without_shapes(config_class: type[BridgeConfig]) -> type:
    """The recipe's side of a bridge config: all its fields but those its neighbours decide.

    Its `complete(**shapes)` makes the config; shapes the bridge does not know are left out. Its
    `output_width` is the config's.
    """
    hints = get_type_hints(config_class)
    own = dataclasses.fields(config_class)
    shapes = {field.name for field in own if field.name in config_class.shape_fields}
    kept = [
        (
            field.name,
            hints[field.name],
            dataclasses.field(default=field.default, default_factory=field.default_factory),
        )
        for field in own
        if field.name not in shapes
    ]

    def complete(self: Any, **given: int | None) -> BridgeConfig:
        known = {name: value for name, value in given.items() if name in shapes}
        config = config_class(**dataclasses.asdict(self), **known)
        come, read = given.get("num_input_tokens"), config.input_tokens
        if None not in (come, read) and come != read:
            raise ValueError(
                f"bridge {config.name!r} is to read {read} tokens, but {come} come in; correct "
                "its fields"
            )
        return config

    def check(self: Any) -> None:
        # What is wrong without shapes is wrong now; 1 stands for those that are not known yet.
        config_class(**dataclasses.asdict(self), **dict.fromkeys(shapes, 1))

    return dataclasses.make_dataclass(
        config_class.__name__,
        kept,
        frozen=True,
        kw_only=True,
        namespace={
            "complete": complete,
            "output_width": config_class.output_width,
            "__post_init__": check,
        },
    )


_SINGLE: Mapping[str, type] = {
    name: without_shapes(config) for name, config in BRIDGES.items() if config is not ChainConfig
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainChoice:
    """Bridges one after another, each named like a bridge of its own.

    The last that can change the width writes the one wanted; a part before it writes tokens as wide
    as it is by nature, else as wide as it reads them.
    """

    parts: Any = choices(_SINGLE, keyed=False)

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ValueError(f"parts has {len(self.parts)} bridges; a chain needs two or more")

    def complete(
        self,
        *,
        in_dim: int,
        out_dim: int,
        num_input_tokens: int,
        vocab_size: int | None = None,
    ) -> ChainConfig:
        """The config, each part's shapes following from its neighbours."""
        configs: list[BridgeConfig] = []
        maps = [i for i, part in enumerate(self.parts) if part.output_width != "kept"]
        for index, part in enumerate(self.parts):
            width: int | None = out_dim
            if maps and index < maps[-1]:
                width = None if part.output_width == "own" else in_dim
            config = part.complete(
                in_dim=in_dim,
                out_dim=width,
                num_input_tokens=num_input_tokens,
                vocab_size=vocab_size,
            )
            with torch.device("meta"):
                bridge = config.build()
            in_dim, num_input_tokens = bridge.out_dim, bridge.num_output_tokens
            configs.append(config)
        return ChainConfig(parts=tuple(configs))


BRIDGE_CHOICES: Mapping[str, type] = {**_SINGLE, ChainConfig.name: ChainChoice}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunImageConfig:
    """The image tower of a run of this project, as trained, or as frozen, there.

    Attributes:
        path: the run's folder; its newest checkpoint is read.
        model_kwargs: laid over the tower's own, where that changes no weight: `output_stride: 16`
            doubles the tokens a side of a CNN.
    """

    path: str
    model_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(self) -> ImageEncoder:
        """Build the tower and load it.

        Raises:
            UserError: no such run, frozen weights that are not what it was trained on any more,
                or a change that does not fit its weights.
        """
        # Both read recipes, whose schema names the systems: imported above they make a circle.
        from latentmodal.experiments.training.checkpoints import read_checkpoint
        from latentmodal.experiments.training.run_folder import RunFolder

        run = RunFolder(Path(self.path).expanduser())
        try:
            recipe = run.recipe()
        except UserError as error:
            raise UserError(f"system.image_encoder.path: {error}; train that run first") from error
        recipe = dataclasses.replace(recipe, system=self._with_kwargs(recipe.system))
        encoder: ImageEncoder = recipe.system.image_encoder.build()
        checkpoint = read_checkpoint(run.checkpoint())
        prefix = "model.image_encoder."
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in checkpoint["state_dict"].items()
            if name.startswith(prefix)
        }
        # What was frozen is not in there. Its config alone builds it, unless it came with the
        # weights of the whole system; of runs that noted nothing that is always looked into.
        frozen = [name for name, _ in encoder.named_parameters() if name not in own]
        noted: Mapping[str, str] = checkpoint.get("frozen_tower", {})
        if frozen and (any(name not in noted for name in frozen) or unlike(encoder, noted)):
            encoder = self._as_trained(recipe, run, checkpoint)
        try:
            strange = encoder.load_state_dict(own, strict=False).unexpected_keys
        except RuntimeError as error:
            reason = " ".join(str(error).split()[:30])
            raise UserError(f"{self.path}: its tower does not fit: {reason} …") from error
        if strange:
            raise UserError(f"{self.path}: its tower has no {strange[0]}; train that run anew")
        return encoder

    def _with_kwargs(self, system: Any) -> Any:
        """The run's system, `model_kwargs` laid over those of its tower."""
        config = getattr(system, "image_encoder", None)
        if config is None:
            raise UserError(f"system.image_encoder.path: {self.path} has no image tower")
        if not self.model_kwargs:
            return system
        if not hasattr(config, "model_kwargs"):
            raise UserError(
                f"system.image_encoder.model_kwargs: the tower of {self.path} takes none; only "
                "those of timm do"
            )
        merged = {**config.model_kwargs, **self.model_kwargs}
        return dataclasses.replace(
            system, image_encoder=dataclasses.replace(config, model_kwargs=merged)
        )

    def _as_trained(self, recipe: Any, run: Any, checkpoint: dict[str, Any]) -> ImageEncoder:
        """The tower of the run's whole system, once its frozen weights are known to be the same."""
        from latentmodal.experiments.training.fit import build_system

        system = build_system(recipe, run)
        try:
            system.on_load_checkpoint(checkpoint)
        except UserError as error:
            raise UserError(
                f"system.image_encoder.path: the frozen weights of {self.path} are not the ones "
                "it was trained on; put its weight files back, or name another run"
            ) from error
        encoder: ImageEncoder = system.model.image_encoder
        return encoder.requires_grad_(True).train()


IMAGE_TOWERS: Mapping[str, type] = {**IMAGE_ENCODERS, "run": RunImageConfig}
