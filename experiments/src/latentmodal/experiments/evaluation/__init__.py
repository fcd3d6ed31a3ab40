"""Metrics as pure functions on embeddings, the report that holds them, and TensorBoard views."""

from latentmodal.experiments.evaluation.choices import ChoiceResult, told_apart
from latentmodal.experiments.evaluation.report import (
    EvalReport,
    Metric,
    choices_section,
    retrieval_section,
    zero_shot_section,
)
from latentmodal.experiments.evaluation.retrieval import RetrievalResult, retrieval_metrics, top_k
from latentmodal.experiments.evaluation.zero_shot import (
    TEMPLATES,
    ZeroShotResult,
    class_embeddings,
    zero_shot_metrics,
)

__all__ = [
    "TEMPLATES",
    "ChoiceResult",
    "EvalReport",
    "Metric",
    "RetrievalResult",
    "ZeroShotResult",
    "choices_section",
    "class_embeddings",
    "retrieval_metrics",
    "retrieval_section",
    "told_apart",
    "top_k",
    "zero_shot_metrics",
    "zero_shot_section",
]
