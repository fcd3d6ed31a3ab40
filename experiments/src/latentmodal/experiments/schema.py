"""The typed shape of a recipe. Every key a recipe file may hold is a field of one of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from latentmodal.experiments.choose import choice, name_in
from latentmodal.experiments.data.module import DataConfig
from latentmodal.experiments.evaluation.tasks import EvaluationConfig
from latentmodal.experiments.systems import SYSTEMS
from latentmodal.experiments.systems.contrastive import ContrastiveConfig
from latentmodal.experiments.training.config import OptimConfig, TrainerConfig
from latentmodal.experiments.training.freeze import FreezePlan


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One experiment, wholly described: model, objective, freezing, data, training, evaluation."""

    name: str
    description: str = ""
    seed: int = 0
    run_dir: str = "runs/{name}/seed{seed}"
    """Where the run is kept; `{name}` and `{seed}` are filled in."""
    system: Any = choice(SYSTEMS)
    freeze: dict[str, Any] = field(default_factory=dict)
    """Parameter-name patterns, in order, to `frozen` or a learning-rate multiplier."""
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        FreezePlan(self.freeze)
        count = self.data.loader.captions_per_image
        if count > 1 and not isinstance(self.system, ContrastiveConfig):
            raise ValueError(
                f"data.loader.captions_per_image: is {count}, and {name_in(SYSTEMS, self.system)} "
                "reads one caption of each picture; leave it at 1"
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give 0 or more")

    @property
    def folder(self) -> str:
        """`run_dir` with name and seed filled in."""
        return self.run_dir.replace("{name}", self.name).replace("{seed}", str(self.seed))
