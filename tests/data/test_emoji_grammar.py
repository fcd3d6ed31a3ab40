"""Articles, plurals and counting for every name the emoji scenes can use."""

import re

import pytest

from latentmodal.experiments.data.emoji import grammar
from latentmodal.experiments.data.emoji.concepts import concrete_things, select_things

NAMES = [thing.name for thing in concrete_things()]

# English singulars that end in s: anything else that does must be a pair, a plural or stuff.
SINGULAR_IN_S = re.compile(
    r"(?:glass|dress|compass|cactus|octopus|lotus|hibiscus|bus|rhinoceros|hippopotamus|abacus|biceps)$"
)


@pytest.mark.parametrize(
    ("name", "one"),
    [
        ("red apple", "a red apple"),
        ("elephant", "an elephant"),
        ("unicorn", "a unicorn"),
        ("ewe", "a ewe"),
        ("euro banknote", "a euro banknote"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("x-ray", "an x-ray"),
        ("umbrella", "an umbrella"),
        ("scissors", "a pair of scissors"),
        ("maracas", "a pair of maracas"),
        ("grapes", "some grapes"),
        ("popcorn", "some popcorn"),
    ],
)
def test_one_thing(name: str, one: str) -> None:
    assert grammar.noun_phrase(name) == one


@pytest.mark.parametrize(
    ("name", "two"),
    [
        ("cat face", "two cat faces"),
        ("mouse", "two mice"),
        ("maple leaf", "two maple leaves"),
        ("ear of corn", "two ears of corn"),
        ("sheaf of rice", "two sheaves of rice"),
        ("bow and arrow", "two bows and arrows"),
        ("fork and knife with plate", "two forks and knives with plate"),
        ("game die", "two game dice"),
        ("snowman", "two snowmen"),
        ("woman's hat", "two women's hats"),
        ("strawberry", "two strawberries"),
        ("toothbrush", "two toothbrushes"),
        ("key", "two keys"),
        ("tropical fish", "two tropical fish"),
        ("jeans", "two pairs of jeans"),
    ],
)
def test_two_things(name: str, two: str) -> None:
    assert grammar.noun_phrase(name, 2) == two


def test_adjectives_stand_before_the_noun_and_decide_the_article() -> None:
    assert grammar.noun_phrase("apple", 1, "orange") == "an orange apple"
    assert grammar.noun_phrase("umbrella", 1, "purple") == "a purple umbrella"
    assert grammar.noun_phrase("umbrella", 3, "purple") == "three purple umbrellas"
    assert grammar.noun_phrase("socks", 1, "red") == "a pair of red socks"
    assert grammar.noun_phrase("cherries", 1, "red") == "some red cherries"


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_counted_as_english_does(name: str) -> None:
    phrase = grammar.noun_phrase(name)
    head = re.split(r" (?:with|of|in) ", name)[0]
    if head.endswith("s") and not SINGULAR_IN_S.search(head):
        assert phrase in (f"a pair of {name}", f"some {name}")
        assert grammar.is_are(name) == "are"
    elif phrase.startswith(("a ", "an ")) and not phrase.startswith("a pair of"):
        vowel_letter = name[0].lower() in "aeiou"
        by_sound = {"unicorn": "a", "ewe": "a", "euro banknote": "a", "x-ray": "an"}
        by_sound["one-piece swimsuit"] = "a"
        assert phrase.split()[0] == by_sound.get(name, "an" if vowel_letter else "a")
        assert grammar.plural(name) != name or name.split()[-1] in (
            *("deer", "bison", "moose", "fish", "blowfish", "jellyfish", "shrimp", "squid"),
            *("moai", "biceps"),
        )


def test_uncountable_things_are_never_counted() -> None:
    with pytest.raises(AssertionError, match="popcorn"):
        grammar.noun_phrase("popcorn", 2)


@pytest.mark.parametrize(
    ("selection", "known", "unseen"), [("tiny", 12, 4), ("default", 150, 20), ("large", 686, 60)]
)
def test_selections_are_distinct_and_apart(selection: str, known: int, unseen: int) -> None:
    things, held_out = select_things(selection)  # type: ignore[arg-type]
    names = [thing.name for thing in (*things, *held_out)]
    assert (len(things), len(held_out)) == (known, unseen)
    assert len(set(names)) == len(names)
    assert len({thing.code for thing in (*things, *held_out)}) == len(names)
    assert all(re.fullmatch(r"[0-9A-F]{4,5}", thing.code) for thing in things)
