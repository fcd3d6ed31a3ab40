"""Metrics as pure functions on embeddings, the report that holds them, and TensorBoard views."""

from latentmodal.experiments.evaluation.captions import (
    NamingResult,
    caption_metrics,
    named_things,
)
from latentmodal.experiments.evaluation.choices import (
    ChoiceResult,
    preferred,
    told_apart,
)
from latentmodal.experiments.evaluation.matching import reranked_metrics
from latentmodal.experiments.evaluation.report import (
    EvalReport,
    Metric,
    captions_section,
    choices_section,
    itm_retrieval_section,
    naming_section,
    retrieval_section,
    vqa_section,
    zero_shot_section,
)
from latentmodal.experiments.evaluation.retrieval import RetrievalResult, retrieval_metrics, top_k
from latentmodal.experiments.evaluation.vqa import (
    VqaResult,
    exact_match,
    gqa_accuracy,
    vqa_accuracy,
)
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
    "NamingResult",
    "RetrievalResult",
    "VqaResult",
    "ZeroShotResult",
    "caption_metrics",
    "captions_section",
    "choices_section",
    "class_embeddings",
    "exact_match",
    "gqa_accuracy",
    "itm_retrieval_section",
    "named_things",
    "naming_section",
    "preferred",
    "reranked_metrics",
    "retrieval_metrics",
    "retrieval_section",
    "told_apart",
    "top_k",
    "vqa_accuracy",
    "vqa_section",
    "zero_shot_metrics",
    "zero_shot_section",
]
