"""What a recipe may evaluate: each task turns a trained system and a source into named metrics.

Legend: N images, M texts, E embedding width, P pairs, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from latentmodal.experiments.choose import choice, choices
from latentmodal.experiments.data.module import SOURCES
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.answers import CaptionsTask, VqaTask
from latentmodal.experiments.evaluation.choices import preferred, told_apart
from latentmodal.experiments.evaluation.descriptions import DescriptionsTask
from latentmodal.experiments.evaluation.matching import (
    PAIR_TIE,
    pair_score,
    reranked_metrics,
    score_pairs,
)
from latentmodal.experiments.evaluation.pope_task import PopeTask
from latentmodal.experiments.evaluation.report import (
    SCORES,
    Metric,
    choices_section,
    itm_retrieval_section,
    retrieval_section,
    zero_shot_section,
)
from latentmodal.experiments.evaluation.retrieval import retrieval_metrics
from latentmodal.experiments.evaluation.sets import EvaluationSet, require_similarity
from latentmodal.experiments.evaluation.zero_shot import (
    TEMPLATES,
    class_embeddings,
    zero_shot_metrics,
)

Confusions = list[tuple[str, str, int]]


class Task(Protocol):
    """What a recipe names under `evaluation.tasks`."""

    source: Any

    @property
    def reads_features(self) -> bool:
        """Whether `run` asks its set for `features`."""

    def check(self, system: Any) -> None:
        """Raise `UserError`, before any training, where the system lacks what `run` needs."""

    def run(self, system: Any, data: EvaluationSet) -> tuple[dict[str, Metric], Confusions]:
        """Metrics, and what was confused with what; a collective operation."""


@dataclass(frozen=True, kw_only=True)
class RetrievalTask:
    """Recall at K both ways, with `all` captions of each picture or the `first` alone."""

    source: Any = choice(SOURCES)
    ks: tuple[int, ...] = (1, 5, 10)
    captions: str = "all"
    reads_features: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_captions(self.captions)

    def check(self, system: Any) -> None:
        """A system that embeds pictures and captions is needed."""
        require_similarity(system)

    def run(self, system: Any, data: EvaluationSet) -> tuple[dict[str, Metric], Confusions]:
        """Rank every caption for every picture and the other way round."""
        image_NE = data.image_NE
        texts, owner_M = _gallery(data, self.captions)
        text_ME = system.embed_captions(texts)
        return retrieval_section(retrieval_metrics(image_NE, text_ME, owner_M, self.ks)), []


@dataclass(frozen=True, kw_only=True)
class ItmRetrievalTask:
    """Retrieval whose `top_k` by similarity are ordered anew by the matching head (BLIP-2)."""

    source: Any = choice(SOURCES)
    ks: tuple[int, ...] = (1, 5, 10)
    captions: str = "all"
    top_k: int = 128
    reads_features: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_captions(self.captions)
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; give 1 or more")

    def check(self, system: Any) -> None:
        """Both the contrastive and the matching objective are needed."""
        require_similarity(system)
        pair_score(system, "itm")

    def run(self, system: Any, data: EvaluationSet) -> tuple[dict[str, Metric], Confusions]:
        """Find candidates by similarity, score each with its query, rank by both."""
        scorer = pair_score(system, "itm")
        image_NE = data.image_NE
        texts, owner_M = _gallery(data, self.captions)

        def score(image_P: Tensor, text_P: Tensor) -> Tensor:
            return score_pairs(
                scorer, data.features, image_P, text_P, texts,
                batch_size=data.batch_size, device=data.device,
            )  # fmt: skip

        text_ME = system.embed_captions(texts)
        result = reranked_metrics(image_NE, text_ME, owner_M, score, ks=self.ks, top_k=self.top_k)
        return itm_retrieval_section(result, self.top_k), []


@dataclass(frozen=True, kw_only=True)
class ToldApartTask:
    """How often the true caption beats a false one that differs in one respect only."""

    source: Any = choice(SOURCES)
    negatives: tuple[str, ...] = ("relation_swap", "noun_swap")
    """Keys of `negatives` in each sample's json; a null there leaves the sample out."""
    by: str = "similarity"
    """The score compared: `similarity`, `itm` (the matching logit), `itg` (the likelihood)."""

    def __post_init__(self) -> None:
        if self.by not in SCORES:
            raise ValueError(f"by is '{self.by}'; choose from {', '.join(SCORES)}")

    @property
    def reads_features(self) -> bool:
        """All but the similarity look at the picture's features again, with the text."""
        return self.by != "similarity"

    def check(self, system: Any) -> None:
        """The objective that gives the score is needed."""
        if self.by == "similarity":
            require_similarity(system)
        else:
            pair_score(system, self.by)

    def run(self, system: Any, data: EvaluationSet) -> tuple[dict[str, Metric], Confusions]:
        """Score each picture with its first caption and with the false ones."""
        # The pass over the pictures first: it gives the captions too.
        if self.by == "similarity":
            image_NE = data.image_NE
            rows, true, false, kinds = self._pairs(data)
            positive_PE, negative_PE = map(system.embed_captions, (true, false))
            results = told_apart(image_NE[rows], positive_PE, negative_PE, kinds)
        else:
            held = data.features
            rows, true, false, kinds = self._pairs(data)
            score_P = score_pairs(
                pair_score(system, self.by), held, torch.tensor(rows * 2),
                torch.arange(2 * len(rows)), true + false,
                batch_size=data.batch_size, device=data.device,
            )  # fmt: skip
            true_P, false_P = score_P.chunk(2)
            results = preferred(true_P, false_P, kinds, tie=PAIR_TIE)
        return choices_section(results, self.by), []

    def _pairs(self, data: EvaluationSet) -> tuple[list[int], list[str], list[str], list[str]]:
        """Pictures by row, their true captions, false ones, and what is false in them."""
        samples = data.samples
        pairs = [
            (row, samples.captions[row][0], false, kind)
            for kind in self.negatives
            for row, meta in enumerate(samples.meta)
            if (false := meta.get("negatives", {}).get(kind)) and samples.captions[row]
        ]
        if not pairs:
            raise UserError(f"no sample has negatives of kind {', '.join(self.negatives)}")
        rows, true, false_captions, kinds = (list(column) for column in zip(*pairs, strict=True))
        return rows, true, false_captions, kinds


@dataclass(frozen=True, kw_only=True)
class ZeroShotTask:
    """Naming: each picture against one text embedding per class, averaged over prompt templates."""

    source: Any = choice(SOURCES)
    label: str = "label"
    """Where the class name stands in a sample's json; dots go deeper, as in `captions.0`."""
    templates: tuple[str, ...] = TEMPLATES["photo"]
    reads_features: ClassVar[bool] = False

    def check(self, system: Any) -> None:
        """A system that embeds pictures and captions is needed."""
        require_similarity(system)

    def run(self, system: Any, data: EvaluationSet) -> tuple[dict[str, Metric], Confusions]:
        """Embed every class name that occurs, then name every picture."""
        image_NE = data.image_NE
        labels = [_label(meta, self.label, row) for row, meta in enumerate(data.samples.meta)]
        names = sorted(set(labels))
        class_CE = class_embeddings(names, self.templates, system.embed_captions)
        index = {name: number for number, name in enumerate(names)}
        labels_N = torch.tensor([index[label] for label in labels])
        result = zero_shot_metrics(image_NE, class_CE, labels_N, names)
        return zero_shot_section(result, " | ".join(self.templates)), result.confusions


def _check_captions(captions: str) -> None:
    if captions not in ("all", "first"):
        raise ValueError(f"captions is '{captions}'; choose all or first")


def _gallery(data: EvaluationSet, captions: str) -> tuple[list[str], Tensor]:
    """The texts (M) to retrieve, and the row of the picture each belongs to."""
    kept = [texts[:1] if captions == "first" else texts for texts in data.samples.captions]
    if not any(kept):
        raise UserError("no sample has a caption to retrieve; name another source")
    owner_M = torch.tensor([row for row, texts in enumerate(kept) for _ in texts])
    return [text for texts in kept for text in texts], owner_M


def _label(meta: Mapping[str, Any], path: str, row: int) -> str:
    node: Any = meta
    for part in path.split("."):
        if isinstance(node, Mapping) and part in node:
            node = node[part]
        elif isinstance(node, Sequence) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            raise UserError(f"label='{path}' is not in the json of sample {row}; name another key")
    return str(node)


TASKS: dict[str, type] = {
    "retrieval": RetrievalTask,
    "itm_retrieval": ItmRetrievalTask,
    "told_apart": ToldApartTask,
    "zero_shot": ZeroShotTask,
    "captions": CaptionsTask,
    "vqa": VqaTask,
    "pope": PopeTask,
    "descriptions": DescriptionsTask,
}


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The tasks run every `trainer.eval_every` steps, at the end, and by `latentmodal eval`."""

    batch_size: int = 256
    workers: int = 0
    tasks: dict[str, Any] = choices(TASKS, keyed=True, default_factory=dict)
    at_start: bool = False
    """Also before the first step, for comparison with what was not trained."""
    views: str | None = None
    """The task whose pictures TensorBoard shows; None is the first."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; give 1 or more")
        if self.views is not None and self.views not in self.tasks:
            raise ValueError(
                f"views is '{self.views}', which is no task; choose from {', '.join(self.tasks)}"
            )
