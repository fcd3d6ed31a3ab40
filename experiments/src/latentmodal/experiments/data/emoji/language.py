"""Sentences about a picture, true (or, as negatives, false) by construction.

Everything is derived from the facts of a ``Picture``: the names, boxes and colours of what was
drawn, and nothing beyond them.
"""

import random
from collections.abc import Sequence
from typing import Any, Final

from latentmodal.experiments.data.emoji import grammar
from latentmodal.experiments.data.emoji.concepts import Thing
from latentmodal.experiments.data.emoji.facts import (
    Group,
    clear_relations,
    group_objects,
    listing,
    position,
    where,
)
from latentmodal.experiments.data.emoji.questions import questions
from latentmodal.experiments.data.emoji.scenes import INVERSE, Picture, Relation, Seen, relation

# Zero-shot templates: sentences of the shapes that training captions of single objects have.
TEMPLATES: Final = ("{}", "a picture of {}", "a drawing of {}")

_STYLE_SENTENCE: Final = {
    "openmoji": "It is drawn in colour with black outlines.",
    "twemoji": "It is drawn in flat colours.",
    "openmoji_line": "It is drawn in black lines.",
    "noto_mono": "It is drawn in black.",
}
_LARGER: Final = 1.7  # by area of the boxes, before a difference in size is mentioned


def _there(groups: Sequence[Group]) -> str:
    first = groups[0]
    return f"there {grammar.is_are_indefinite(first.thing.name, first.count)} {listing(groups)}"


def captions(picture: Picture, rng: random.Random) -> list[str]:
    """Three to five different true captions; the first is the canonical one.

    Canonical: the noun phrase of a single object ("a red apple"), the counted things of a
    repeated or larger scene ("two owls and a door"), the relation of a pair ("a red apple to
    the left of a dog face").
    """
    groups = group_objects(picture)
    ground = f"on a {picture.background} background"
    if pair := _pair(picture):
        return _pair_captions(*pair, ground, rng)
    shuffled = rng.sample(groups, len(groups))
    plain = listing(groups)
    coloured = listing(shuffled, with_colour=True)
    others = [
        f"a {rng.choice(('picture', 'drawing'))} of {listing(shuffled)}",
        f"{listing(shuffled)} {ground}",
        _there(shuffled),
    ]
    if coloured != listing(shuffled):
        others.append(coloured)
    if len(picture.objects) > 1:
        stated = clear_relations(picture, groups)
        if stated:
            a, b, how = rng.choice(stated)
            others.append(_clause(a, b, how))
    return _distinct([plain, *rng.sample(others, min(4, len(others)))])


def _pair(picture: Picture) -> tuple[Group, Relation, Group] | None:
    """The two things of a pair and what the first is to the second; None for other scenes."""
    groups = group_objects(picture)
    if len(picture.objects) != 2 or len(groups) != 2:
        return None
    a, b = groups
    how = relation(a.members[0].box, b.members[0].box, picture.size)
    assert how is not None, "two things always stand in a clear relation"
    return a, how, b


def _pair_captions(a: Group, how: Relation, b: Group, ground: str, rng: random.Random) -> list[str]:
    said = f"{a.phrase()} {how} {b.phrase()}"
    turned = f"{b.phrase()} {INVERSE[how]} {a.phrase()}"
    coloured = f"{a.phrase(with_colour=True)} {how} {b.phrase(with_colour=True)}"
    verb = grammar.is_are_indefinite(a.thing.name)
    others = [
        f"{rng.choice((said, turned))} {ground}",
        f"there {verb} {a.phrase()} {how} {b.phrase()}",
        f"a {rng.choice(('picture', 'drawing'))} of {listing(rng.sample([a, b], 2))}",
    ]
    chosen = [said, turned, *rng.sample(others, 2)]
    return _distinct([*chosen, coloured] if coloured != said else chosen)


def _distinct(sentences: list[str]) -> list[str]:
    return list(dict.fromkeys(sentences))


def _clause(a: Group, b: Group, how: str) -> str:
    name_a, name_b = a.thing.name, b.thing.name
    return f"{grammar.definite(name_a)} {grammar.is_are(name_a)} {how} {grammar.definite(name_b)}"


def negatives(picture: Picture) -> dict[str, str | None]:
    """The canonical caption of a pair made false: its relation inverted, its nouns exchanged.

    Both are None for scenes whose canonical caption states no relation.
    """
    pair = _pair(picture)
    if pair is None:
        return {"relation_swap": None, "noun_swap": None}
    a, how, b = pair
    return {
        "relation_swap": f"{a.phrase()} {INVERSE[how]} {b.phrase()}",
        "noun_swap": f"{b.phrase()} {how} {a.phrase()}",
    }


def fact(picture: Picture) -> str:
    """What the canonical caption says, in the same words for every picture it is true of.

    A pair may be told from either side ("a above b", "b below a"): two sentences, one fact.
    """
    pair = _pair(picture)
    if pair is None:
        return listing(group_objects(picture))
    a, how, b = pair
    said = f"{a.phrase()} {how} {b.phrase()}"
    return min(said, f"{b.phrase()} {INVERSE[how]} {a.phrase()}")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def description(picture: Picture) -> str:
    """Three to six sentences: what there is, where, in which colour and manner."""
    groups = group_objects(picture)
    number = grammar.NUMBER_WORDS[len(picture.objects)]
    things = "thing" if len(picture.objects) == 1 else "things"
    ground = f"a plain {picture.background} background"
    sentences = [_sentence(f"the picture shows {number} {things} on {ground}: {listing(groups)}")]
    placed = [group for group in groups if group.count == 1]
    for group in placed[:2]:
        place = position(group.members[0].box, picture.size)
        name = group.thing.name
        if place:
            sentences.append(
                _sentence(f"{grammar.definite(name)} {grammar.is_are(name)} {where(place)}")
            )
    stated = clear_relations(picture, groups)
    if stated:
        sentences.append(_sentence(_clause(*stated[0])))
    coloured = [group for group in placed if group.colour]
    if coloured:
        name, colour = coloured[0].thing.name, coloured[0].colour
        sentences.append(
            _sentence(f"{grammar.definite(name)} {grammar.is_are(name)} mostly {colour}")
        )
    sizes = _size_clause(placed)
    if sizes and len(sentences) < 5:
        sentences.append(_sentence(sizes))
    sentences.append(_STYLE_SENTENCE[picture.style])
    if len(sentences) < 3:
        sentences.insert(1, _sentence("there is nothing else in the picture"))
    return " ".join(sentences)


def _area(seen: Seen) -> int:
    x0, y0, x1, y1 = seen.box
    return (x1 - x0) * (y1 - y0)


def _size_clause(groups: Sequence[Group]) -> str | None:
    if len(groups) != 2:
        return None
    small, large = sorted(groups, key=lambda group: _area(group.members[0]))
    if _area(large.members[0]) < _LARGER * _area(small.members[0]):
        return None
    return _clause(large, small, "larger than")


def annotate(
    picture: Picture, things: Sequence[Thing], split: str, rng: random.Random
) -> dict[str, Any]:
    """The JSON that goes beside a picture."""
    return {
        "captions": captions(picture, rng),
        "fact": fact(picture),
        "description": description(picture),
        "objects": [
            {
                "name": seen.thing.name,
                "category": seen.thing.category,
                "color": seen.colour,
                "code": seen.thing.code,
                "box": list(seen.box),
            }
            for seen in picture.objects
        ],
        "negatives": negatives(picture),
        "questions": [vars(question) for question in questions(picture, things, rng)],
        "style": picture.style,
        "background": picture.background,
        "split": split,
    }
