"""Evaluation of what a model says: captions and answers to questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

from latentmodal.experiments.choose import choice
from latentmodal.experiments.data.collate import Batch
from latentmodal.experiments.data.module import SOURCES, training_captions, training_questions
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.asking import (
    ask,
    check_answers,
    check_describes,
    describe,
)
from latentmodal.experiments.evaluation.captions import caption_metrics, named_things
from latentmodal.experiments.evaluation.objects import known_names, objects_in
from latentmodal.experiments.evaluation.report import (
    Metric,
    captions_section,
    naming_section,
    vqa_section,
)
from latentmodal.experiments.evaluation.sets import EvaluationSet
from latentmodal.experiments.evaluation.vqa import exact_match, gqa_accuracy, vqa_accuracy
from latentmodal.llm import GenerationSettings, PromptTemplate

Scoring = Literal["mmf", "official", "lavis", "exact", "gqa"]
SCORINGS: tuple[Scoring, ...] = get_args(Scoring)
Section = dict[str, Metric]


@dataclass(frozen=True, kw_only=True)
class CaptionsTask:
    """Captions of every picture against its references; on the embedded data also the names said.

    Where the json of samples has a `domain`, as NoCaps', CIDEr-D and SPICE are given for each too.

    Attributes:
        prompt, generation: other ones than the system's; for a system with a language model.
        with_java: COCO's own tokeniser, METEOR and, where its parts are present, SPICE.
        baseline: a training source; the metrics of its most frequent caption, said of every
            picture, stand in the column of chance.
    """

    source: Any = choice(SOURCES)
    prompt: PromptTemplate | None = None
    generation: GenerationSettings | None = None
    with_java: bool = False
    baseline: Any = choice(SOURCES, default=None)
    reads_features: ClassVar[bool] = False

    def check(self, system: Any) -> None:
        """A system that says captions is needed."""
        check_describes(system, self.prompt, self.generation)

    def run(self, system: Any, data: EvaluationSet) -> tuple[Section, list[Any]]:
        """Say something of every picture, each rank its share, and compare."""

        def read(batch: Batch) -> list[str]:
            return describe(system, batch.pixels_BCHW, prompt=self.prompt, settings=self.generation)

        said = data.each(read)
        references = data.samples.captions
        section = self._score(said, references, data.samples.meta)
        if self.baseline is not None:
            constant = [most_frequent_caption(self.baseline)] * len(said)
            floor = self._score(constant, references, data.samples.meta)
            note = f"chance is the most frequent training caption, '{constant[0]}'"
            section = _beside(section, floor, note)
        return section, []

    def _score(
        self, said: list[str], references: list[list[str]], meta: Sequence[Mapping[str, Any]]
    ) -> Section:
        values = caption_metrics(references, said, with_java=self.with_java)
        section = captions_section(values, references, with_java=self.with_java)
        names = [objects_in(sample) for sample in meta]
        if all(names):
            section |= naming_section(named_things(said, names, known_names(self.source, names)))
        return section | self._by_domain(said, references, meta)

    def _by_domain(
        self, said: list[str], references: list[list[str]], meta: Sequence[Mapping[str, Any]]
    ) -> Section:
        """NoCaps' in-domain, near-domain and out-domain, each as a set of its own."""
        domains = [str(sample.get("domain", "")) for sample in meta]
        section: Section = {}
        for domain in sorted(set(domains) - {""}):
            rows = [row for row, found in enumerate(domains) if found == domain]
            own_said, own = [said[row] for row in rows], [references[row] for row in rows]
            values = caption_metrics(own, own_said, with_java=self.with_java)
            shown = {k: value for k, value in values.items() if k in ("CIDEr-D", "SPICE")}
            metrics = captions_section(shown, own, with_java=self.with_java)
            section |= {f"{name} ({domain})": metric for name, metric in metrics.items()}
        return section


def _beside(section: Section, floor: Section, note: str) -> Section:
    """Each metric with what says nothing of the picture in the column of chance."""
    return {
        name: replace(metric, chance=floor[name].value, protocol=f"{metric.protocol}; {note}")
        for name, metric in section.items()
    }


@lru_cache(maxsize=8)
def most_frequent_caption(source: Any) -> str:
    """The caption said most often in a training source; of several the first in the alphabet."""
    counts = Counter(training_captions(source))
    if not counts:
        raise UserError("the baseline's source has no captions")
    return _most_frequent(counts)


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda text: (-counts[text], text))


@dataclass(frozen=True, kw_only=True)
class VqaTask:
    """Answers to the questions in each sample's json.

    Attributes:
        prompt, generation: other ones than the system's.
        scoring: `mmf`, `official` or `lavis` (VQA accuracy over ten people's answers), `gqa`, or
            `exact` for a single right answer.
        baseline: a training source; what its most frequent answers score, given without a look at
            the picture, stands in the column of chance.
    """

    source: Any = choice(SOURCES)
    prompt: PromptTemplate | None = None
    generation: GenerationSettings | None = None
    scoring: Scoring = "mmf"
    baseline: Any = choice(SOURCES, default=None)
    reads_features: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring is '{self.scoring}'; choose from {', '.join(SCORINGS)}")

    def check(self, system: Any) -> None:
        """A system with a language model is needed."""
        check_answers(system, self.prompt)

    def run(self, system: Any, data: EvaluationSet) -> tuple[Section, list[Any]]:
        """Ask every question of every picture, each rank its share, and score the answers."""

        def read(batch: Batch) -> list[list[str]]:
            asked = [
                (row, question["question"])
                for row, meta in enumerate(batch.meta)
                for question in meta.get("questions", [])
            ]
            said = ask(
                system, batch.pixels_BCHW, asked, prompt=self.prompt, settings=self.generation
            )
            answers: list[list[str]] = [[] for _ in batch.keys]
            for (row, _), answer in zip(asked, said, strict=True):
                answers[row].append(answer)
            return answers

        said = [answer for answers in data.each(read) for answer in answers]
        questions = [q for meta in data.samples.meta for q in meta.get("questions", [])]
        if not questions:
            raise UserError("no sample has questions in its json")
        section = self._score(said, questions)
        if self.baseline is not None:
            blind = usual_answers(self.baseline)
            floor = self._score([blind.to(question) for question in questions], questions)
            note = "chance is the most frequent training answer to a question, or to its kind"
            section = _beside(section, floor, note)
        return section, []

    def _score(self, said: list[str], questions: list[dict[str, Any]]) -> Section:
        kinds = [str(question.get("kind", "other")) for question in questions]
        shown_kinds = kinds if len(set(kinds)) > 1 else None
        if self.scoring == "gqa" or self.scoring == "exact":
            single = [str(question["answer"]) for question in questions]
            if self.scoring == "gqa":
                return vqa_section(gqa_accuracy(said, single), shown_kinds)
            return vqa_section(exact_match(said, [[answer] for answer in single]), shown_kinds)
        people = [list(question.get("answers", [])) for question in questions]
        return vqa_section(vqa_accuracy(said, people, variant=self.scoring), shown_kinds)


class UsualAnswers:
    """What is answered most often, whatever the picture: what a language model knows by itself.

    Args:
        entries: questions of training, each with `question`, `answer` or `answers`, and `kind`.

    Raises:
        UserError: no entry has an answer.
    """

    def __init__(self, entries: Iterable[Mapping[str, Any]]) -> None:
        counts: dict[tuple[str, str], Counter[str]] = {}
        for entry in entries:
            for answer in entry.get("answers") or [entry.get("answer")]:
                for key in _from_near_to_far(entry):
                    counts.setdefault(key, Counter())[str(answer)] += 1
        if not counts:
            raise UserError("the baseline's source has no questions")
        self._said = {key: _most_frequent(found) for key, found in counts.items()}

    def to(self, question: Mapping[str, Any]) -> str:
        """The usual answer to a question; one never asked has that of its kind, else of all."""
        return next(self._said[key] for key in _from_near_to_far(question) if key in self._said)


def _from_near_to_far(entry: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    question, kind = str(entry.get("question")), str(entry.get("kind", "other"))
    return ("question", question), ("kind", kind), ("any", "")


@lru_cache(maxsize=8)
def usual_answers(source: Any) -> UsualAnswers:
    """`UsualAnswers` of a training source."""
    return UsualAnswers(training_questions(source))
