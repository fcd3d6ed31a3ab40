"""Metrics as pure functions on embeddings, the report that holds them, and TensorBoard views."""

from latentmodal.experiments.evaluation.captions import (
    NamingResult,
    caption_metrics,
    named_things,
)
from latentmodal.experiments.evaluation.chair import (
    ChairResult,
    chair_metrics,
    coco_instances,
    coco_vocabulary,
)
from latentmodal.experiments.evaluation.choices import (
    ChoiceResult,
    preferred,
    told_apart,
)
from latentmodal.experiments.evaluation.matching import reranked_metrics
from latentmodal.experiments.evaluation.pope import (
    PopeResult,
    Probe,
    parse_published,
    parse_yes_no,
    pope_metrics,
    pope_probes,
)
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
    "ChairResult",
    "ChoiceResult",
    "EvalReport",
    "Metric",
    "NamingResult",
    "PopeResult",
    "Probe",
    "RetrievalResult",
    "VqaResult",
    "ZeroShotResult",
    "caption_metrics",
    "captions_section",
    "chair_metrics",
    "choices_section",
    "class_embeddings",
    "coco_instances",
    "coco_vocabulary",
    "exact_match",
    "gqa_accuracy",
    "itm_retrieval_section",
    "named_things",
    "naming_section",
    "parse_published",
    "parse_yes_no",
    "pope_metrics",
    "pope_probes",
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
