"""One evaluation: named metrics beside chance, as JSON, as a table, and in TensorBoard."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import pvariance
from typing import Any, Literal

from rich import box
from rich.table import Table
from torch.utils.tensorboard.writer import SummaryWriter

from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.captions.naming import NamingResult
from latentmodal.experiments.evaluation.choices import ChoiceResult
from latentmodal.experiments.evaluation.retrieval import RetrievalResult
from latentmodal.experiments.evaluation.vqa import VqaResult
from latentmodal.experiments.evaluation.zero_shot import ZeroShotResult
from latentmodal.experiments.files import write_text_atomically

FORMAT_VERSION = 1

SCORES = {
    "similarity": "cosine",
    "itm": "matching logit",
    "itg": "log-likelihood of the whole caption",
}
"""What a picture and a caption may be compared by, in words."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number and what is needed to read it.

    ``value`` is None where it is a share of nothing, such as the precision of an answer that was
    never given; it is stored as null and shown as a dash.

    ``n`` is the number of queries, images or pairs; ``protocol`` says in words how it was taken,
    since equal names under different protocols must not be compared. A ``score`` is no share, but
    shown 100-fold as one is: CIDEr-D's 1.216 is the 121.6 of papers. A ``count`` is a mean
    number of things.
    """

    value: float | None
    n: int
    protocol: str
    unit: Literal["share", "score", "rank", "count"] = "share"
    chance: float | None = None
    standard_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """Metrics by section (a task on a split), and what they were measured on.

    ``context`` holds plain JSON values: run, checkpoint, step, recipe and the like.
    ``confusions`` lists, by section, (true class, chosen class, times), most frequent first.
    """

    sections: dict[str, dict[str, Metric]]
    context: dict[str, str | int | float | None] = field(default_factory=dict)
    confusions: dict[str, list[tuple[str, str, int]]] = field(default_factory=dict)

    def write_json(self, path: Path) -> None:
        """Write so that a reader finds the old file or the new one, never a part."""
        payload = {"format_version": FORMAT_VERSION, **asdict(self)}
        text = json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_text_atomically(path, text)

    @classmethod
    def read_json(cls, path: Path) -> "EvalReport":
        """Read what `write_json` wrote.

        Raises:
            UserError: the file is of another format, or broken.
        """
        try:
            return cls._read(path, json.loads(path.read_text(encoding="utf-8")))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: is broken ({error}); run latentmodal eval again") from error

    @classmethod
    def _read(cls, path: Path, payload: dict[str, Any]) -> "EvalReport":
        if payload.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version is {payload.get('format_version')}, this version reads "
                f"{FORMAT_VERSION}: run the evaluation again"
            )
        sections = {
            section: {name: Metric(**metric) for name, metric in metrics.items()}
            for section, metrics in payload["sections"].items()
        }
        confusions = {
            section: [(true, chosen, times) for true, chosen, times in pairs]
            for section, pairs in payload["confusions"].items()
        }
        return cls(sections=sections, context=payload["context"], confusions=confusions)

    def table(self) -> Table:
        """A rich table, one block of rows per section: metric, value, chance, n."""
        title = "  ".join(f"{key} {value}" for key, value in self.context.items())
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for column in ("task", "metric"):
            table.add_column(column, no_wrap=True)
        for column in ("value", "chance", "n"):
            table.add_column(column, justify="right", no_wrap=True)
        for section, metrics in self.sections.items():
            table.add_section()
            for row, (name, metric) in enumerate(metrics.items()):
                table.add_row(
                    f"[cyan]{section}" if row == 0 else "",
                    name,
                    f"[bold]{shown(metric.value, metric)}{_shown_error(metric)}",
                    "" if metric.chance is None else shown(metric.chance, metric),
                    str(metric.n),
                )
        return table

    def log(self, writer: SummaryWriter, step: int) -> None:
        """Write each metric as the scalar ``eval/<section>/<name>``, shares in [0, 1]; no None."""
        for section, metrics in self.sections.items():
            for name, metric in metrics.items():
                if metric.value is not None:
                    writer.add_scalar(f"eval/{section}/{name}", metric.value, step)


def retrieval_section(result: RetrievalResult) -> dict[str, Metric]:
    """Recall at each K and the median rank, both ways."""
    to_text = f"any own caption among {result.num_texts} texts; ties against the model"
    to_image = f"own image among {result.num_images} images; ties against the model"
    section = {}
    for k, value in result.image_to_text.items():
        section[f"image_to_text_R@{k}"] = Metric(
            value=value,
            chance=result.chance_image_to_text[k],
            n=result.num_queries,
            protocol=to_text,
        )
    for k, value in result.text_to_image.items():
        section[f"text_to_image_R@{k}"] = Metric(
            value=value,
            chance=result.chance_text_to_image[k],
            n=result.num_texts,
            protocol=to_image,
        )
    section["image_to_text_median_rank"] = Metric(
        value=result.median_rank_image_to_text, unit="rank", n=result.num_queries, protocol=to_text
    )
    section["text_to_image_median_rank"] = Metric(
        value=result.median_rank_text_to_image, unit="rank", n=result.num_texts, protocol=to_image
    )
    return section


def itm_retrieval_section(result: RetrievalResult, top_k: int) -> dict[str, Metric]:
    """Recall at each K, both ways, after re-ranking; median ranks beyond the candidates mean none.

    Args:
        result: from `reranked_metrics`.
        top_k: as it was given.
    """
    note = f"the {top_k} best by cosine ordered by matching logit + cosine, all others below"
    return {
        name: replace(metric, protocol=f"{note}; {metric.protocol}")
        for name, metric in retrieval_section(result).items()
        if metric.unit == "share"
    }


def zero_shot_section(result: ZeroShotResult, templates: str) -> dict[str, Metric]:
    """Top-1, top-5 when there is one, and mean per-class recall.

    Args:
        result: from `zero_shot_metrics`.
        templates: the name of the template set, for the protocol.
    """
    protocol = f"{result.num_classes} classes, templates '{templates}'; ties against the model"
    n = result.num_images
    section = {"acc1": Metric(value=result.acc1, chance=result.chance_acc1, n=n, protocol=protocol)}
    if result.acc5 is not None:
        section["acc5"] = Metric(
            value=result.acc5, chance=result.chance_acc5, n=n, protocol=protocol
        )
    section["mean_per_class_recall"] = Metric(
        value=result.mean_per_class_recall, chance=result.chance_acc1, n=n, protocol=protocol
    )
    return section


def choices_section(
    results: Mapping[str, ChoiceResult], by: str = "similarity"
) -> dict[str, Metric]:
    """The share of each kind of false caption told apart from the true one.

    Args:
        results: from `told_apart` or `preferred`.
        by: the score compared; a key of `SCORES`.
    """
    return {
        kind: Metric(
            value=result.share,
            chance=result.chance,
            n=result.num_pairs,
            standard_error=result.standard_error,
            protocol=f"true caption scores above the false one by {SCORES[by]}; "
            "ties against the model",
        )
        for kind, result in results.items()
    }


def captions_section(
    values: Mapping[str, float],
    references: Sequence[Sequence[str]],
    *,
    with_java: bool = False,
) -> dict[str, Metric]:
    """COCO's caption metrics.

    Args:
        values: from `caption_metrics`.
        references: those it was given.
        with_java: as it was given.
    """
    fewest, most = (f(map(len, references)) for f in (min, max))
    count = str(fewest) if fewest == most else f"{fewest} to {most}"
    tokenizer = "Stanford PTBTokenizer 3.4.1" if with_java else "Java-free PTB-like tokeniser"
    noun = "reference" if most == 1 else "references"
    protocol = f"COCO caption evaluation; {tokenizer}; {count} {noun} per picture"
    idf = f"IDF from the references of these {len(references)} pictures; papers give 100 times this"
    section = {}
    for name, value in values.items():
        is_cider = name == "CIDEr-D"
        section[name] = Metric(
            value=value,
            n=len(references),
            unit="score" if is_cider else "share",
            protocol=f"{protocol}; {idf}" if is_cider else protocol,
        )
    return section


def naming_section(result: NamingResult) -> dict[str, Metric]:
    """Whether captions name the things of their pictures: exact set, precision, recall."""
    protocol = (
        f"{result.num_known} known names, of which those in the caption, longest first, are "
        "compared with those of the picture"
    )
    mentioned, true = f"{result.num_mentioned} names mentioned", f"{result.num_true} true names"
    return {
        "names_exact": Metric(
            value=result.exact,
            n=result.num_pictures,
            standard_error=_binomial_error(result.exact, result.num_pictures),
            protocol=f"{protocol}; equal as sets",
        ),
        "names_precision": Metric(
            value=result.precision, n=result.num_pictures, protocol=f"{protocol}; {mentioned}"
        ),
        "names_recall": Metric(
            value=result.recall, n=result.num_pictures, protocol=f"{protocol}; {true}"
        ),
    }


def vqa_section(result: VqaResult, kinds: Sequence[str] | None = None) -> dict[str, Metric]:
    """The mean over questions under the metric's own name and, with kinds, that of each kind.

    Args:
        result: from `vqa_accuracy`, `exact_match` or `gqa_accuracy`.
        kinds: the kind of each question, such as ``"count"``.

    Raises:
        UserError: not as many kinds as questions.
    """
    scores_of = {result.name: list(result.scores)}
    if kinds is not None:
        if len(kinds) != len(result.scores):
            raise UserError(f"{len(kinds)} kinds for {len(result.scores)} questions")
        for kind in sorted(set(kinds)):
            pairs = zip(kinds, result.scores, strict=True)
            scores_of[f"{result.name}/{kind}"] = [score for own, score in pairs if own == kind]
    return {
        name: Metric(
            value=sum(scores) / len(scores),
            n=len(scores),
            standard_error=(pvariance(scores) / len(scores)) ** 0.5,
            protocol=result.protocol,
        )
        for name, scores in scores_of.items()
    }


def _binomial_error(share: float, n: int) -> float:
    return (share * (1 - share) / n) ** 0.5


def shown(number: float | None, metric: Metric) -> str:
    """A number in the unit of `metric`, as tables have it."""
    if number is None:
        return "–"
    match metric.unit:
        case "share":
            return f"{100 * number:.1f} %"
        case "score":
            return f"{100 * number:.1f}"
        case "rank":
            return f"{number:g}"
        case "count":
            return f"{number:.1f}"


def _shown_error(metric: Metric) -> str:
    if metric.standard_error is None:
        return ""
    return f" ± {100 * metric.standard_error:.1f}"
