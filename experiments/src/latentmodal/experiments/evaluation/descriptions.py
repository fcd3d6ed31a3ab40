"""Long descriptions: how long, how often repetitive or broken, and how true to their pictures.

The defects are those for which MiniGPT-4 (Zhu et al. 2023, arXiv 2304.10592, section 3.2) has a
second stage; the rules that find them are those that its data are filtered by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from latentmodal.experiments.choose import choice
from latentmodal.experiments.curation.rules import (
    Rules,
    broken_sentences,
    find_fault,
    is_unfinished,
    repeated_ngrams,
    repeated_sentences,
    sentences,
    word_repetition,
    words,
)
from latentmodal.experiments.data.collate import Batch
from latentmodal.experiments.data.module import SOURCES
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.asking import check_describes, converses, describe
from latentmodal.experiments.evaluation.captions.naming import NameFinder
from latentmodal.experiments.evaluation.chair import (
    ChairResult,
    chair_metrics,
    coco_instances,
    coco_vocabulary,
    with_references,
)
from latentmodal.experiments.evaluation.objects import known_names, objects_in
from latentmodal.experiments.evaluation.report import Metric
from latentmodal.experiments.evaluation.sets import EvaluationSet
from latentmodal.llm import GenerationSettings, PromptTemplate

Section = dict[str, Metric]

read_instances = lru_cache(maxsize=1)(coco_instances)  # evaluated again and again, the same file


@dataclass(frozen=True, kw_only=True)
class DescriptionsTask:
    """A description of every picture: length, repetition, broken sentences, objects and CHAIR.

    The objects are those in the samples' json, by the names of the data set; or COCO's, where
    `synonyms` is given. Where there are none, only the text itself is judged.

    Attributes:
        instruction: what a system that converses is told; None is its own instruction.
        prompt, generation: other ones than the system's.
        rules: from which measure on a text counts as repetitive.
        synonyms: CHAIR's ``synonyms.txt``; the truth is then the union of the annotated objects
            and those that the reference captions mention.
        instances: COCO's ``instances_*.json``, for pictures imported under COCO's numbers; without
            it the objects are those in the samples' json.
    """

    source: Any = choice(SOURCES)
    instruction: str | None = None
    prompt: PromptTemplate | None = None
    generation: GenerationSettings | None = None
    rules: Rules = field(default_factory=Rules)
    synonyms: str | None = None
    instances: str | None = None
    reads_features: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.instances is not None and self.synonyms is None:
            raise ValueError("instances is given without synonyms; give CHAIR's synonyms.txt too")

    def check(self, system: Any) -> None:
        """A system that says something of a picture is needed, and CHAIR's files where named."""
        check_describes(system, self.prompt, self.generation)
        if self.instruction is not None and not converses(system):
            raise UserError("instruction is for a system that has system.conversation")
        for path in (self.synonyms, self.instances):
            if path is not None and not Path(path).is_file():
                raise UserError(f"{path} is not a file")

    def run(self, system: Any, data: EvaluationSet) -> tuple[Section, list[Any]]:
        """Describe every picture, each rank its share, and judge."""

        def read(batch: Batch) -> list[str]:
            return describe(
                system,
                batch.pixels_BCHW,
                instruction=self.instruction,
                prompt=self.prompt,
                settings=self.generation,
            )

        said = data.each(read)
        metas, references = data.samples.meta, data.samples.captions
        true = [str(meta["description"]) for meta in metas if meta.get("description")]
        section = text_section(said, self.rules, true, _token_counter(system))
        if self.synonyms is not None:
            section |= self._coco_section(said, metas, references, Path(self.synonyms))
        elif all("objects" in meta for meta in metas):
            objects = [objects_in(meta) for meta in metas]
            finder = NameFinder(known_names(self.source, objects))
            note = f"{len(finder.names)} names of the data set; truth from its object lists"
            section |= chair_section(chair_metrics(said, objects, finder), note)
        return section, []

    def _coco_section(
        self,
        said: Sequence[str],
        metas: Sequence[dict[str, Any]],
        references: Sequence[Sequence[str]],
        synonyms: Path,
    ) -> Section:
        vocabulary = coco_vocabulary(synonyms)
        objects = [objects_in(meta) for meta in metas]
        annotated = "objects in the samples"
        if self.instances is not None:
            instances = read_instances(Path(self.instances))
            objects = [sorted(instances.get(_coco_number(meta), ())) for meta in metas]
            annotated = Path(self.instances).name
        truth = with_references(objects, references, vocabulary)
        note = (
            f"words of {synonyms.name} for {len(vocabulary.names)} classes, CHAIR's rules; "
            f"truth from {annotated} and the reference captions"
        )
        return chair_section(chair_metrics(said, truth, vocabulary), note)


def text_section(
    texts: Sequence[str],
    rules: Rules,
    references: Sequence[str] = (),
    count_tokens: Callable[[str], int] | None = None,
) -> Section:
    """Length, repetition and broken sentences of descriptions, whatever they describe.

    Args:
        texts: the descriptions.
        rules: from which measure on a text is repetitive, as in curation.
        references: true descriptions, whose length is stated beside.
        count_tokens: the number of a text's tokens, where there is a tokenizer.

    Raises:
        UserError: no texts.
    """
    if not texts:
        raise UserError("no descriptions to judge: check that the split is not empty")
    n, limit = len(texts), rules.ngram
    beside = (
        f"; true ones have {fmean(len(words(t)) for t in references):.1f}" if references else ""
    )
    section = {"words": _mean([len(words(text)) for text in texts], f"mean words{beside}")}
    if count_tokens is not None:
        counts = [count_tokens(text) for text in texts]
        section["tokens"] = _mean(counts, "mean tokens of the system's language model")
    repeats = {
        "repeats_word": (
            [word_repetition(text) > rules.max_word_run for text in texts],
            f"a word more than {rules.max_word_run} times in succession",
        ),
        f"repeats_{limit}-gram": (
            [repeated_ngrams(text, limit) > rules.max_ngram_share for text in texts],
            f"more than {rules.max_ngram_share:g} of the {limit}-grams said before",
        ),
        "repeats_sentence": (
            [repeated_sentences(text) > rules.max_repeated_sentences for text in texts],
            f"more than {rules.max_repeated_sentences} sentences said before, word for word",
        ),
    }
    for name, (flags, meaning) in repeats.items():
        section[name] = _share(flags, f"descriptions with {meaning}")
    flags = [any(own) for own in zip(*(flags for flags, _ in repeats.values()), strict=True)]
    section["repeats"] = _share(flags, "descriptions that repeat a word, an n-gram or a sentence")
    section[f"rep-{limit}"] = Metric(
        value=fmean(repeated_ngrams(text, limit) for text in texts),
        n=n,
        protocol=f"mean share of {limit}-grams of words said before in the same description",
    )
    unfinished = [is_unfinished(text) for text in texts]
    section["unfinished"] = _share(unfinished, "descriptions that stop within a sentence, or empty")
    total = sum(len(sentences(text)) for text in texts)
    broken = sum(len(broken_sentences(text)) for text in texts)
    section["broken_sentences"] = Metric(
        value=broken / total if total else None,
        n=total,
        protocol="sentences without an end mark or ending in a word that asks for another",
    )
    kept = [find_fault(text, rules) is None for text in texts]
    section["kept_by_rules"] = _share(kept, "descriptions in which curation's rules find no fault")
    return section


def chair_section(result: ChairResult, note: str) -> Section:
    """Object recall, CHAIR of mentions and of captions, and mentions per caption.

    Args:
        result: from `chair_metrics`.
        note: which names are known, and where the truth is from.
    """
    mentions, n = result.num_mentions, result.num_captions
    hallucinating = result.chair_s
    return {
        "object_recall": Metric(
            value=result.recall,
            n=result.num_true,
            protocol=f"different objects of a picture that are mentioned; {note}",
        ),
        "CHAIRi": Metric(
            value=result.chair_i,
            n=mentions,
            protocol=f"mentions of objects not in the picture, duplicates count; {note}",
        ),
        "CHAIRs": Metric(
            value=hallucinating,
            n=n,
            standard_error=(hallucinating * (1 - hallucinating) / n) ** 0.5,
            protocol=f"captions with at least one such mention; {note}",
        ),
        "mentions": Metric(
            value=result.mean_mentions,
            n=n,
            unit="count",
            protocol=f"mean mentions of objects in a caption; {note}",
        ),
    }


def _mean(numbers: Sequence[int], protocol: str) -> Metric:
    return Metric(value=fmean(numbers), n=len(numbers), unit="count", protocol=protocol)


def _share(flags: Sequence[bool], protocol: str) -> Metric:
    value, n = fmean(flags), len(flags)
    error = (value * (1 - value) / n) ** 0.5
    return Metric(value=value, n=n, standard_error=error, protocol=protocol)


def _token_counter(system: Any) -> Callable[[str], int] | None:
    tokenizer = getattr(getattr(system.model, "llm", None), "tokenizer", None)
    if tokenizer is None:
        return None
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


def _coco_number(meta: dict[str, Any]) -> int:
    image = str(meta.get("image_id", ""))
    data_set, _, number = image.partition("/")
    if data_set != "coco" or not number.isdecimal():
        raise UserError(
            f"image_id '{image}' is no COCO picture (coco/42), so instances says nothing of it"
        )
    return int(number)
