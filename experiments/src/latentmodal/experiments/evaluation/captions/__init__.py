"""Caption metrics: COCO's, with and without Java, and the naming of known things."""

from latentmodal.experiments.evaluation.captions.metrics import caption_metrics
from latentmodal.experiments.evaluation.captions.naming import (
    FormFinder,
    NameFinder,
    NamingResult,
    named_things,
)
from latentmodal.experiments.evaluation.captions.tokenize import one_line, tokenize

__all__ = [
    "FormFinder",
    "NameFinder",
    "NamingResult",
    "caption_metrics",
    "named_things",
    "one_line",
    "tokenize",
]
