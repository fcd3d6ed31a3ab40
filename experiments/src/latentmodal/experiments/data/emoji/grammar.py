"""English around a thing's name: articles, plurals, pairs, stuff that is not counted.

Names come as they stand in Unicode ("scissors", "ear of corn", "popcorn"); nothing in the data
says how they are counted, so the exceptions to the rules are listed here by hand.
"""

import re
from typing import Final, Literal

from latentmodal.experiments.data.emoji.vocabulary import names_in

Number = Literal["singular", "pair", "plural", "mass"]

NUMBER_WORDS: Final = ("no", "one", "two", "three", "four")

_PAIRS: Final = names_in(
    """
    ballet shoes|briefs|chopsticks|glasses|gloves|goggles|jeans|maracas|scissors|shorts|skis
    |socks|sunglasses
    """
)
_PLURALS: Final = names_in(
    """
    Japanese dolls|admission tickets|beans|blueberries|bookmark tabs|books|bubbles
    |card index dividers|chains|cherries|clinking beer mugs|clinking glasses|control knobs
    |crossed swords|eyes|film frames|fireworks|flower playing cards|french fries|grapes|houses
    |linked paperclips|lungs|musical notes|nesting dolls|pancakes|paw prints|peanuts|prayer beads
    |shopping bags|sparkles
    """
)
_MASS: Final = names_in(
    """
    bacon|baguette bread|bread|broccoli|bubble tea|butter|canned food|cooked rice|coral
    |curry rice|custard|dango|flatbread|garlic|ice|luggage|meat on bone|money with wings|oden
    |popcorn|sake|salt|shaved ice|soap|spaghetti|stuffed flatbread|sushi|thread|wood|yarn
    """
)
_IRREGULAR: Final = {
    "bison": "bison",
    "blowfish": "blowfish",
    "deer": "deer",
    "die": "dice",
    "fish": "fish",
    "jellyfish": "jellyfish",
    "scarf": "scarves",
    "mosquito": "mosquitoes",
    "man's": "men's",
    "woman's": "women's",
    "foot": "feet",
    "goose": "geese",
    "knife": "knives",
    "leaf": "leaves",
    "moai": "moai",
    "moose": "moose",
    "mouse": "mice",
    "ox": "oxen",
    "sheaf": "sheaves",
    "shrimp": "shrimp",
    "snowman": "snowmen",
    "squid": "squid",
    "tooth": "teeth",
    "wolf": "wolves",
    "biceps": "biceps",
    "mango": "mangoes",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "volcano": "volcanoes",
    "tornado": "tornadoes",
}
_BOTH_HEADS: Final = frozenset({"bow and arrow", "nut and bolt", "fork and knife"})
# The noun that is counted stands before these; "ear of corn", "house with garden".
_AFTER_HEAD: Final = re.compile(r"\s+(?:of|with|without|showing|in|behind|tilted)\s+")
_VOWEL_SOUND: Final = re.compile(r"(?:[aeiou]|hour|heir|honest|x-ray)", re.IGNORECASE)
_CONSONANT_SOUND: Final = re.compile(r"(?:uni|eu|ewe|one\b|one-|ufo|uku|use|uti)", re.IGNORECASE)


def number_of(name: str) -> Number:
    """How the thing of that name is counted."""
    if name in _PAIRS:
        return "pair"
    if name in _PLURALS:
        return "plural"
    return "mass" if name in _MASS else "singular"


def article(words: str) -> Literal["a", "an"]:
    """The indefinite article before ``words``, by sound: an apple, a unicorn, an x-ray."""
    sounds_vowel = _VOWEL_SOUND.match(words) and not _CONSONANT_SOUND.match(words)
    return "an" if sounds_vowel else "a"


def plural(name: str) -> str:
    """More than one of a singular thing: game dice, ears of corn, couches and lamps."""
    after = _AFTER_HEAD.search(name)
    head, rest = (name[: after.start()], name[after.start() :]) if after else (name, "")
    if " and " in head:
        return " and ".join(plural(part) for part in head.split(" and ")) + rest
    *before, noun = head.split(" ")
    before = [_IRREGULAR[word] if word.endswith("man's") else word for word in before]
    return " ".join([*before, _plural_noun(noun)]) + rest


def _plural_noun(noun: str) -> str:
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if re.search(r"(?:s|x|z|ch|sh)$", noun):
        return noun + "es"
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"


def noun_phrase(name: str, count: int = 1, adjective: str | None = None) -> str:
    """``count`` things of that name, indefinite: a red apple, two cats, a pair of scissors.

    Plurals and stuff are never counted ("some grapes"): ``count`` must then be 1.
    """
    described = f"{adjective} {name}" if adjective else name
    match number_of(name):
        case "plural" | "mass":
            assert count == 1, f"{name} cannot be counted"
            return f"some {described}"
        case "pair" if count == 1:
            return f"a pair of {described}"
        case "pair":
            return f"{NUMBER_WORDS[count]} pairs of {described}"
    if count == 1:
        return f"{article(described)} {described}"
    return f"{NUMBER_WORDS[count]} " + (f"{adjective} " if adjective else "") + plural(name)


def countable(name: str) -> bool:
    return number_of(name) in ("singular", "pair")


def definite(name: str) -> str:
    """The thing already named: the red apple, the scissors."""
    return f"the {name}"


def bare_plural(name: str) -> str:
    """After "how many": cats, pairs of scissors."""
    return f"pairs of {name}" if number_of(name) == "pair" else plural(name)


def is_are(name: str) -> Literal["is", "are"]:
    """The verb after ``definite(name)``."""
    return "are" if number_of(name) in ("pair", "plural") else "is"


def is_are_indefinite(name: str, count: int = 1) -> Literal["is", "are"]:
    """The verb before ``noun_phrase(name, count)``: there is a pair of scissors."""
    return "are" if count > 1 or number_of(name) == "plural" else "is"


def join_and(phrases: list[str]) -> str:
    """a, b and c."""
    if len(phrases) == 1:
        return phrases[0]
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]
