"""What a recipe may evaluate: each task turns a trained system and a source into named metrics.

Legend: N images, M texts, E embedding width, C H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from latentmodal.encoders import Preprocess
from latentmodal.experiments.choose import choice, choices
from latentmodal.experiments.data.config import LoaderConfig
from latentmodal.experiments.data.loader import EvalLoader, gather_objects
from latentmodal.experiments.data.module import SOURCES, resolve_source
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.choices import told_apart
from latentmodal.experiments.evaluation.report import (
    Metric,
    choices_section,
    retrieval_section,
    zero_shot_section,
)
from latentmodal.experiments.evaluation.retrieval import retrieval_metrics
from latentmodal.experiments.evaluation.zero_shot import (
    TEMPLATES,
    class_embeddings,
    zero_shot_metrics,
)

MAX_SHOWN = 512
"""Pictures kept of an evaluation set for the views; metrics need embeddings only."""

Confusions = list[tuple[str, str, int]]


class Embedder(Protocol):
    """What tasks need of a system: one latent space for pictures and captions."""

    def embed_images(self, pixels_BCHW: Tensor) -> Tensor: ...

    def embed_captions(self, captions: list[str]) -> Tensor: ...


@dataclass(frozen=True)
class EmbeddedSet:
    """An evaluation set, embedded once and shared by every task that reads it."""

    image_NE: Tensor
    pixels: list[Tensor]
    """Of the first `MAX_SHOWN` rows."""
    captions: list[list[str]]
    meta: list[dict[str, Any]]


def embed_set(
    system: Embedder,
    source: Any,
    preprocess: Preprocess,
    loader: LoaderConfig,
    device: torch.device,
) -> EmbeddedSet:
    """Embed every picture of `source`, each rank its share, and bring the rows together in order.

    A collective operation: every rank calls it and every rank gets the whole set.
    """
    batches = EvalLoader([resolve_source(source)], loader, image_transform=preprocess.eval())
    mine: dict[int, tuple[Tensor, Tensor | None, list[str], dict[str, Any]]] = {}
    for batch in batches:
        image_BE = system.embed_images(batch.pixels_BCHW.to(device)).cpu()
        for row, index in enumerate(batch.index_B.tolist()):
            # Clones: a view would travel between ranks with the whole batch it looks into.
            mine[index] = (
                image_BE[row].clone(),
                batch.pixels_BCHW[row].clone() if index < MAX_SHOWN else None,
                batch.all_captions[row],
                batch.meta[row],
            )
    everyone: dict[int, tuple[Tensor, Tensor | None, list[str], dict[str, Any]]] = {}
    for part in gather_objects(mine):
        everyone.update(part)
    rows = [everyone[index] for index in sorted(everyone)]
    return EmbeddedSet(
        image_NE=torch.stack([row[0] for row in rows]),
        pixels=[row[1] for row in rows[:MAX_SHOWN] if row[1] is not None],
        captions=[row[2] for row in rows],
        meta=[row[3] for row in rows],
    )


@dataclass(frozen=True, kw_only=True)
class RetrievalTask:
    """Recall at K both ways, with `all` captions of each picture or the `first` alone."""

    source: Any = choice(SOURCES)
    ks: tuple[int, ...] = (1, 5, 10)
    captions: str = "all"

    def __post_init__(self) -> None:
        if self.captions not in ("all", "first"):
            raise ValueError(f"captions is '{self.captions}'; choose all or first")

    def run(self, system: Embedder, data: EmbeddedSet) -> tuple[dict[str, Metric], Confusions]:
        """Rank every caption for every picture and the other way round."""
        kept = [texts[:1] if self.captions == "first" else texts for texts in data.captions]
        owner_M = torch.tensor([row for row, texts in enumerate(kept) for _ in texts])
        text_ME = system.embed_captions([text for texts in kept for text in texts])
        return retrieval_section(retrieval_metrics(data.image_NE, text_ME, owner_M, self.ks)), []


@dataclass(frozen=True, kw_only=True)
class ToldApartTask:
    """How often the true caption beats a false one that differs in one respect only."""

    source: Any = choice(SOURCES)
    negatives: tuple[str, ...] = ("relation_swap", "noun_swap")
    """Keys of `negatives` in each sample's json; a null there leaves the sample out."""

    def run(self, system: Embedder, data: EmbeddedSet) -> tuple[dict[str, Metric], Confusions]:
        """Score each picture with its first caption and with the false ones."""
        pairs = [
            (row, data.captions[row][0], false, kind)
            for kind in self.negatives
            for row, meta in enumerate(data.meta)
            if (false := meta.get("negatives", {}).get(kind))
        ]
        if not pairs:
            raise UserError(f"no sample has negatives of kind {', '.join(self.negatives)}")
        rows, true, false_captions, kinds = (list(column) for column in zip(*pairs, strict=True))
        results = told_apart(
            data.image_NE[rows],
            system.embed_captions(true),
            system.embed_captions(false_captions),
            kinds,
        )
        return choices_section(results), []


@dataclass(frozen=True, kw_only=True)
class ZeroShotTask:
    """Naming: each picture against one text embedding per class, averaged over prompt templates."""

    source: Any = choice(SOURCES)
    label: str = "label"
    """Where the class name stands in a sample's json; dots go deeper, as in `captions.0`."""
    templates: tuple[str, ...] = TEMPLATES["photo"]

    def run(self, system: Embedder, data: EmbeddedSet) -> tuple[dict[str, Metric], Confusions]:
        """Embed every class name that occurs, then name every picture."""
        labels = [_label(meta, self.label, row) for row, meta in enumerate(data.meta)]
        names = sorted(set(labels))
        class_CE = class_embeddings(names, self.templates, system.embed_captions)
        index = {name: number for number, name in enumerate(names)}
        labels_N = torch.tensor([index[label] for label in labels])
        result = zero_shot_metrics(data.image_NE, class_CE, labels_N, names)
        return zero_shot_section(result, " | ".join(self.templates)), result.confusions


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
    "told_apart": ToldApartTask,
    "zero_shot": ZeroShotTask,
}


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The tasks run every `trainer.eval_every` steps, at the end, and by `latentmodal eval`."""

    batch_size: int = 256
    workers: int = 0
    tasks: dict[str, Any] = choices(TASKS, keyed=True, default_factory=dict)
    views: str | None = None
    """The task whose pictures TensorBoard shows; None is the first."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; give 1 or more")
        if self.views is not None and self.views not in self.tasks:
            raise ValueError(
                f"views is '{self.views}', which is no task; choose from {', '.join(self.tasks)}"
            )
