"""The LightningModules, one per family of objectives."""

from latentmodal.experiments.systems.contrastive import ContrastiveConfig, ContrastiveSystem

SYSTEMS: dict[str, type] = {"contrastive": ContrastiveConfig}

__all__ = ["SYSTEMS", "ContrastiveConfig", "ContrastiveSystem"]
