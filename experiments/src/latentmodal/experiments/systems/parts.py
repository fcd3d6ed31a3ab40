"""What recipes choose from, beyond the packages' tables: bridges without widths, runs' towers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from latentmodal.bridges import BRIDGES, BridgeConfig
from latentmodal.encoders import IMAGE_ENCODERS, ImageEncoder
from latentmodal.experiments.errors import UserError

SHAPE_FIELDS = ("in_dim", "out_dim", "num_input_tokens", "vocab_size")
"""Fields of a bridge that follow from its neighbours; a recipe never states them."""


def without_shapes(config_class: type[BridgeConfig]) -> type:
    """The recipe's side of a bridge config: all its fields but the `SHAPE_FIELDS`.

    Its `complete(**shapes)` makes the config; shapes the bridge does not know are left out.
    """
    hints = get_type_hints(config_class)
    own = dataclasses.fields(config_class)
    shapes = {field.name: field for field in own if field.name in SHAPE_FIELDS}
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
        return config_class(**dataclasses.asdict(self), **known)

    def check(self: Any) -> None:
        complete(self, **dict.fromkeys(shapes, 1))  # what is wrong without widths is wrong now

    return dataclasses.make_dataclass(
        config_class.__name__,
        kept,
        frozen=True,
        kw_only=True,
        namespace={"complete": complete, "__post_init__": check},
    )


BRIDGE_CHOICES: Mapping[str, type] = {
    name: without_shapes(config) for name, config in BRIDGES.items()
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunImageConfig:
    """The image tower of a run of this project, with its trained weights.

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
            UserError: no such run, or a change that does not fit its weights.
        """
        # Both read recipes, whose schema names the systems: imported above they make a circle.
        from latentmodal.experiments.training.checkpoints import read_checkpoint
        from latentmodal.experiments.training.run_folder import RunFolder

        run = RunFolder(Path(self.path))
        try:
            config = run.recipe().system.image_encoder
        except AttributeError as error:
            raise UserError(f"system.image_encoder.path: {self.path} has no image tower") from error
        except UserError as error:
            raise UserError(f"system.image_encoder.path: {error}; train that run first") from error
        if self.model_kwargs:
            merged = {**getattr(config, "model_kwargs", {}), **self.model_kwargs}
            config = dataclasses.replace(config, model_kwargs=merged)
        encoder: ImageEncoder = config.build()
        state = read_checkpoint(run.checkpoint())["state_dict"]
        prefix = "model.image_encoder."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        # Of a frozen tower only statistics are in the checkpoint: it is what its config builds.
        if any(name in own for name, _ in encoder.named_parameters()):
            try:
                encoder.load_state_dict(own)
            except RuntimeError as error:
                reason = " ".join(str(error).split()[:30])
                raise UserError(f"{self.path}: its tower does not fit: {reason} …") from error
        return encoder


IMAGE_TOWERS: Mapping[str, type] = {**IMAGE_ENCODERS, "run": RunImageConfig}
