"""The LightningModules, one per family of objectives."""

from latentmodal.experiments.systems.alignment import AlignmentConfig, AlignmentSystem
from latentmodal.experiments.systems.contrastive import ContrastiveConfig, ContrastiveSystem
from latentmodal.experiments.systems.generation import GenerationConfig, GenerationSystem
from latentmodal.experiments.systems.language_model import (
    LanguageModelConfig,
    LanguageModelSystem,
)

SYSTEMS: dict[str, type] = {
    "contrastive": ContrastiveConfig,
    "alignment": AlignmentConfig,
    "generation": GenerationConfig,
    "language_model": LanguageModelConfig,
}

__all__ = [
    "SYSTEMS",
    "AlignmentConfig",
    "AlignmentSystem",
    "ContrastiveConfig",
    "ContrastiveSystem",
    "GenerationConfig",
    "GenerationSystem",
    "LanguageModelConfig",
    "LanguageModelSystem",
]
