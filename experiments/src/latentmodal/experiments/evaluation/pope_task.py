"""POPE as a task of a recipe: on things listed in the samples' json, or on published questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from latentmodal.experiments.choose import choice
from latentmodal.experiments.data.collate import Batch
from latentmodal.experiments.data.emoji.questions import presence_question
from latentmodal.experiments.data.module import SOURCES
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.asking import ask, check_answers
from latentmodal.experiments.evaluation.objects import objects_in
from latentmodal.experiments.evaluation.pope import (
    SAMPLINGS,
    Answer,
    PopeResult,
    parse_published,
    parse_yes_no,
    pope_metrics,
    pope_probes,
)
from latentmodal.experiments.evaluation.report import Metric
from latentmodal.experiments.evaluation.sets import EvaluationSet
from latentmodal.llm import GenerationSettings, PromptTemplate

PARSERS: Final[dict[str, Callable[[str], Answer | None]]] = {
    "strict": parse_yes_no,
    "published": parse_published,
}
_PARSED: Final = {
    "strict": "first sentence with yes or no, else unparsed and wrong",
    "published": "POPE's parser, which takes all but no and not for yes",
}
_PUBLISHED = "pope/"
"""Begins the `kind` of imported questions; the file they are from follows."""


@dataclass(frozen=True)
class Asked:
    """A question about the picture in row ``row`` of the set."""

    row: int
    question: str
    label: str


@dataclass(frozen=True, kw_only=True)
class PopeTask:
    """Is there such a thing in the picture? Metrics for every sampling, or every published file.

    Attributes:
        samplings: how the things that are not there are chosen, where the samples' json lists
            `objects`; imported POPE questions stand for themselves.
        per_picture: things asked for that are there, and as many that are not.
        seed: of the draws.
        parser: `strict` counts answers that say neither yes nor no apart; `published` is POPE's.
        prompt, generation: other ones than the system's.
    """

    source: Any = choice(SOURCES)
    samplings: tuple[str, ...] = SAMPLINGS
    per_picture: int = 3
    seed: int = 0
    parser: str = "strict"
    prompt: PromptTemplate | None = None
    generation: GenerationSettings | None = None
    reads_features: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for sampling in self.samplings:
            if sampling not in SAMPLINGS:
                raise ValueError(f"samplings has '{sampling}'; choose from {', '.join(SAMPLINGS)}")
        if not self.samplings:
            raise ValueError("samplings is empty; name at least one")
        if self.parser not in PARSERS:
            raise ValueError(f"parser is '{self.parser}'; choose from {', '.join(PARSERS)}")
        if self.per_picture < 1:
            raise ValueError(f"per_picture is {self.per_picture}; give 1 or more")

    def check(self, system: Any) -> None:
        """A system with a language model is needed."""
        check_answers(system, self.prompt)

    def run(self, system: Any, data: EvaluationSet) -> tuple[dict[str, Metric], list[Any]]:
        """Ask every question once, each rank those about its share, and score file by file."""
        # What is asked of a picture depends on all of them, so one pass goes before. Where a sample
        # is unusable, its number in the set is left out, and rows and numbers differ.
        numbers = data.each(lambda batch: batch.index_B.tolist())
        row_of = {number: row for row, number in enumerate(numbers)}
        metas = data.samples.meta
        files = _published(metas) or self._made(metas)
        questions: list[set[str]] = [set() for _ in metas]
        for asked in files.values():
            for one in asked:
                questions[one.row].add(one.question)

        def read(batch: Batch) -> list[dict[str, str]]:
            rows = [row_of[number] for number in batch.index_B.tolist()]
            pairs = [
                (place, text) for place, row in enumerate(rows) for text in sorted(questions[row])
            ]
            said = ask(
                system, batch.pixels_BCHW, pairs, prompt=self.prompt, settings=self.generation
            )
            answers: list[dict[str, str]] = [{} for _ in rows]
            for (place, text), answer in zip(pairs, said, strict=True):
                answers[place][text] = answer
            return answers

        said = data.each(read)
        parse = PARSERS[self.parser]
        section: dict[str, Metric] = {}
        for name, asked in files.items():
            predicted = [parse(said[one.row][one.question]) for one in asked]
            result = pope_metrics(predicted, [one.label for one in asked])
            section |= pope_section(name, result, _PARSED[self.parser])
        return section, []

    def _made(self, metas: Sequence[dict[str, Any]]) -> dict[str, list[Asked]]:
        objects = [objects_in(meta) for meta in metas]
        if not any(objects):
            raise UserError("no sample has objects or imported POPE questions in its json")
        made: dict[str, list[Asked]] = {}
        for sampling in self.samplings:
            probes = pope_probes(objects, sampling, per_picture=self.per_picture, seed=self.seed)
            made[sampling] = [
                Asked(row, presence_question(probe.name), probe.answer)
                for row, own in enumerate(probes)
                for probe in own
            ]
        return made


def _published(metas: Sequence[dict[str, Any]]) -> dict[str, list[Asked]]:
    """Imported questions by the file they are from."""
    files: dict[str, list[Asked]] = {}
    for row, meta in enumerate(metas):
        for question in meta.get("questions", []):
            kind = str(question.get("kind", ""))
            if kind.startswith(_PUBLISHED):
                one = Asked(row, question["question"], question["answer"])
                files.setdefault(kind.removeprefix(_PUBLISHED), []).append(one)
    return files


def pope_section(name: str, result: PopeResult, parsed: str) -> dict[str, Metric]:
    """POPE's five metrics and the share of unparsed answers, as ``<name>/<metric>``.

    Args:
        name: the sampling, or the file of the questions.
        result: from `pope_metrics`.
        parsed: how answers were read, in words.
    """
    total, due, said = result.total, result.num_positive, result.num_predicted_yes
    share = due / total
    protocol = f"POPE ({name}), {due} of {total} questions to be answered yes; {parsed}"
    always = f"{protocol}; chance is yes to every question"
    error = (result.accuracy * (1 - result.accuracy) / total) ** 0.5
    metrics = {
        "accuracy": Metric(
            value=result.accuracy, n=total, chance=share, standard_error=error, protocol=always
        ),
        "precision": Metric(value=result.precision, n=said, chance=share, protocol=always),
        "recall": Metric(value=result.recall, n=due, chance=1.0 if due else None, protocol=always),
        "F1": Metric(value=result.f1, n=total, chance=2 * share / (1 + share), protocol=always),
        "yes_ratio": Metric(value=result.yes_ratio, n=total, protocol=protocol),
        "unparsed": Metric(value=result.unparsed, n=total, protocol=protocol),
    }
    return {f"{name}/{metric}": value for metric, value in metrics.items()}
