"""Does a caption name the things in the picture, all of them and no others?"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from latentmodal.experiments.data.emoji import grammar
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.captions.tokenize import one_line


@dataclass(frozen=True, kw_only=True)
class NamingResult:
    """Shares in [0, 1]; precision and recall over all names of all pictures together.

    ``precision`` is 0 when no caption names anything.
    """

    precision: float
    recall: float
    exact: float
    """Share of captions that name just the things of their picture."""
    num_pictures: int
    num_mentioned: int
    num_true: int
    num_known: int
    """Names in the vocabulary, of which a caption may say wrong ones."""


def named_things(
    candidates: Sequence[str], names: Sequence[Sequence[str]], vocabulary: Sequence[str]
) -> NamingResult:
    """Compare the things each caption names with those in the picture, as sets.

    How many there are of a thing, of which colour and where, is not looked at.

    Args:
        candidates: the generated caption of each picture.
        names: the names of the things in each picture, repeated or not.
        vocabulary: all names there are; what else a caption says is not seen.

    Raises:
        UserError: the two differ in length, are empty, or a true name is not in the vocabulary.
    """
    if len(candidates) != len(names):
        raise UserError(f"{len(candidates)} captions for the names of {len(names)} pictures")
    if not candidates:
        raise UserError("no captions to look for names in: check that the split is not empty")
    true_sets = [set(own) for own in names]
    if strange := set().union(*true_sets) - set(vocabulary):
        raise UserError(f"{sorted(strange)[0]!r} is the name of a thing but not in the vocabulary")
    finder = NameFinder(vocabulary)
    found_sets = [finder.find(candidate) for candidate in candidates]
    pairs = list(zip(found_sets, true_sets, strict=True))
    right = sum(len(found & true) for found, true in pairs)
    mentioned, num_true = (sum(map(len, sets)) for sets in (found_sets, true_sets))
    return NamingResult(
        precision=right / mentioned if mentioned else 0.0,
        recall=right / num_true if num_true else 0.0,
        exact=sum(found == true for found, true in pairs) / len(pairs),
        num_pictures=len(pairs),
        num_mentioned=mentioned,
        num_true=num_true,
        num_known=len(finder.names),
    )


class FormFinder:
    """Finds known forms in text: whole words, the longest first, whatever their case.

    Args:
        name_of_form: what each form (a word or several) names; "" where it names nothing, and
            only keeps a shorter one inside it from being found.

    Raises:
        UserError: no forms.
    """

    def __init__(self, name_of_form: Mapping[str, str]) -> None:
        if not name_of_form:
            raise UserError("the vocabulary is empty: give the names to look for")
        self._name_of_form = {form.lower(): name for form, name in name_of_form.items()}
        longest_first = sorted(self._name_of_form, key=len, reverse=True)
        forms = "|".join(map(re.escape, longest_first))
        self._pattern = re.compile(rf"(?<![\w-])(?:{forms})(?![\w-])")

    @property
    def names(self) -> frozenset[str]:
        """Everything that can be found."""
        return frozenset(filter(None, self._name_of_form.values()))

    def forms(self, text: str) -> list[str]:
        """The forms in ``text`` in lower case and reading order, as often as they are said."""
        return self._pattern.findall(one_line(text).lower())

    def mentions(self, text: str) -> list[str]:
        """What the forms in ``text`` name, in reading order, as often as it is said."""
        return [name for form in self.forms(text) if (name := self._name_of_form[form])]

    def find(self, text: str) -> set[str]:
        """The names in ``text``."""
        return set(self.mentions(text))


class NameFinder(FormFinder):
    """Finds names in the singular or the plural.

    "two tropical fish" holds a tropical fish and no fish; a sunflower is no sun.

    Args:
        vocabulary: the names, as `latentmodal.experiments.data.emoji.grammar` counts them.

    Raises:
        UserError: no names.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        forms = {name.lower(): name for name in vocabulary}
        for name in vocabulary:
            if grammar.number_of(name) == "singular":
                # A name keeps its own form, even where it is the plural of another.
                forms.setdefault(grammar.plural(name).lower(), name)
        super().__init__(forms)
