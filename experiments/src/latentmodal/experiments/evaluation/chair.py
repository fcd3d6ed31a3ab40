"""CHAIR: objects that a caption mentions and the picture lacks (Rohrbach et al. 2018, 1809.02156).

Which words mean an object is a `FormFinder`: names in the singular and plural (`NameFinder`), or
COCO's 80 classes with their synonyms (`coco_vocabulary`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from latentmodal.experiments.data.emoji import grammar
from latentmodal.experiments.data.readers.annotations import Document
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.captions.naming import FormFinder

# Two words that are one thing, or keep one of them from meaning another ("hot dog", "home plate").
_DOUBLE_WORDS: Final = (
    "air plane", "baseball bat", "baseball glove", "cell phone", "fire hydrant", "hair drier",
    "home plate", "hot dog", "laptop computer", "mobile phone", "motor bike", "motor cycle",
    "parking meter", "potted plant", "sports ball", "stop light", "stop sign", "street light",
    "suit case", "teddy bear", "tennis racket", "traffic light", "traffic signal", "train track",
    "wine glass",
)  # fmt: skip
# "baby" and "adult" alone mean a person, and so does "passenger".
_ANIMALS: Final = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "animal", "cub",
)  # fmt: skip
_VEHICLES: Final = ("jet", "train")
_PLURALS: Final = {"person": "people", "child": "children", "sheep": "sheep", "calf": "calves"}


@dataclass(frozen=True, kw_only=True)
class ChairResult:
    """Counts, and the metrics as they follow; a share of nothing is None."""

    num_captions: int
    num_hallucinating: int
    """Captions with at least one hallucinated mention."""
    num_mentions: int
    num_hallucinated: int
    num_true: int
    """Different objects of all pictures."""
    num_found: int
    """Those of them that their captions mention."""
    num_known: int
    """Names in the vocabulary."""

    @property
    def chair_i(self) -> float | None:
        """Hallucinated mentions among all; None where nothing is mentioned."""
        return self.num_hallucinated / self.num_mentions if self.num_mentions else None

    @property
    def chair_s(self) -> float:
        """Captions that hallucinate, among all."""
        return self.num_hallucinating / self.num_captions

    @property
    def recall(self) -> float | None:
        """Objects mentioned among those there are; None where there are none."""
        return self.num_found / self.num_true if self.num_true else None

    @property
    def mean_mentions(self) -> float:
        """Mentions per caption."""
        return self.num_mentions / self.num_captions


def chair_metrics(
    captions: Sequence[str], objects: Sequence[Collection[str]], vocabulary: FormFinder
) -> ChairResult:
    """Compare what captions mention with what is in their pictures.

    An object mentioned twice counts twice, whether it is there or not; how many of it there are,
    of which colour and where, is not looked at.

    Args:
        captions: one for each picture.
        objects: the names of the things in each picture, repeated or not.
        vocabulary: finds names in a text; what else a caption says is not seen.

    Raises:
        UserError: the two differ in length, are empty, or a true name is not in the vocabulary.
    """
    if len(captions) != len(objects):
        raise UserError(f"{len(captions)} captions for the objects of {len(objects)} pictures")
    if not captions:
        raise UserError("no captions to look for objects in: check that the split is not empty")
    true_sets = [set(own) for own in objects]
    if strange := set().union(*true_sets) - vocabulary.names:
        raise UserError(f"the object {min(strange)!r} is not in the vocabulary")
    mentioned = [vocabulary.mentions(caption) for caption in captions]
    pairs = list(zip(mentioned, true_sets, strict=True))
    wrong = [sum(name not in true for name in said) for said, true in pairs]
    return ChairResult(
        num_captions=len(captions),
        num_hallucinating=sum(count > 0 for count in wrong),
        num_mentions=sum(map(len, mentioned)),
        num_hallucinated=sum(wrong),
        num_true=sum(map(len, true_sets)),
        num_found=sum(len(true.intersection(said)) for said, true in pairs),
        num_known=len(vocabulary.names),
    )


def with_references(
    objects: Sequence[Collection[str]], references: Sequence[Sequence[str]], vocabulary: FormFinder
) -> list[set[str]]:
    """The truth of published CHAIR: annotated objects, and those the reference captions mention."""
    return [
        {name for word in own for name in vocabulary.mentions(word)}
        | {name for text in texts for name in vocabulary.mentions(text)}
        for own, texts in zip(objects, references, strict=True)
    ]


class CocoFinder(FormFinder):
    """COCO's classes; a toilet's seat, wherever it stands in the text, is no chair."""

    def forms(self, text: str) -> list[str]:
        """The forms in ``text``, without the seat of a toilet."""
        found = super().forms(text)
        if {"toilet", "toilets", "toilet seat", "toilet seats"}.isdisjoint(found):
            return found
        return [form for form in found if form not in ("seat", "seats")]


def coco_vocabulary(synonyms_file: Path) -> CocoFinder:
    """COCO's classes by the words of CHAIR's ``synonyms.txt``, under CHAIR's rules.

    One class a line, all words for it separated by commas, its name first. As published, of
    several words in a row only the listed pairs are one thing ("dining table" is found by its
    "table"); young and grown animals are animals and no persons, a passenger train is a train.

    Raises:
        UserError: the file cannot be read or is empty.
    """
    try:
        lines = synonyms_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{synonyms_file} cannot be read: {error}") from error
    classes = [words for line in lines if (words := _listed(line))]
    if not classes:
        raise UserError(
            f"{synonyms_file} is empty; one class a line is wanted, such as 'cat, kitty'"
        )
    class_of = {word: words[0] for words in classes for word in words}
    own = {word: name for word, name in class_of.items() if " " not in word}
    own |= {pair: class_of.get(meant, "") for pair, meant in _double_words().items()}
    plurals = {_plural(form): name for form, name in own.items() if _is_counted(form)}
    return CocoFinder(plurals | own)


def coco_instances(instances_file: Path) -> dict[int | str, set[str]]:
    """The classes in each picture by its number, from ``instances_val2014.json``.

    Pictures without any instance are not in it.

    Raises:
        UserError: the file cannot be read or is in another layout.
    """
    root = Document.load(instances_file).entry()
    names = {entry.name("id"): entry.text("name") for entry in root.entries("categories")}
    found: dict[int | str, set[str]] = {}
    for entry in root.entries("annotations"):
        number = entry.name("category_id")
        if number not in names:
            raise UserError(f"{entry.where}: category_id {number} is not among 'categories'")
        found.setdefault(entry.name("image_id"), set()).add(names[number])
    return found


def _listed(line: str) -> list[str]:
    return [word for part in line.split(",") if (word := part.strip().lower())]


def _double_words() -> dict[str, str]:
    """Words in a row, and the word whose class they are of."""
    meant = {pair: pair for pair in _DOUBLE_WORDS}
    meant |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS}
    meant |= {f"passenger {vehicle}": vehicle for vehicle in _VEHICLES}
    return meant | {"bow tie": "tie", "toilet seat": "toilet"}


def _is_counted(form: str) -> bool:
    return grammar.number_of(form) == "singular"


def _plural(form: str) -> str:
    before, space, noun = form.rpartition(" ")
    if noun.endswith("man"):
        return f"{before}{space}{noun[:-2]}en"
    return f"{before}{space}{_PLURALS[noun]}" if noun in _PLURALS else grammar.plural(form)
