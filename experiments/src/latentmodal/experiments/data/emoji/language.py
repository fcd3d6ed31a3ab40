"""Sentences about a picture, true (or, as negatives, false) by construction.

Everything is derived from a ``Picture``: the names, boxes and colours of what was drawn. Where
the truth could be argued about (a slanting relation, a colour that is half of a drawing, an
object between two regions), nothing is said.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from latentmodal.experiments.data.emoji import grammar
from latentmodal.experiments.data.emoji.concepts import Thing
from latentmodal.experiments.data.emoji.palette import COLOUR_WORDS
from latentmodal.experiments.data.emoji.scenes import INVERSE, Box, Picture, Seen, relation

# Zero-shot templates: sentences of the shapes that training captions of single objects have.
TEMPLATES: Final = ("{}", "a picture of {}", "a drawing of {}", "there is {}")

_STYLE_SENTENCE: Final = {
    "openmoji": "It is drawn in colour with black outlines.",
    "twemoji": "It is drawn in flat colours.",
    "openmoji_line": "It is drawn in black lines.",
    "noto_mono": "It is drawn in black.",
}
_MAX_QUESTIONS: Final = 7
_LARGER: Final = 1.7  # by area of the boxes, before a difference in size is mentioned


@dataclass(frozen=True)
class Question:
    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Group:
    """All objects of one thing in a picture."""

    thing: Thing
    members: tuple[Seen, ...]

    @property
    def count(self) -> int:
        return len(self.members)

    @property
    def colour(self) -> str | None:
        """Worth saying: the drawing has one, and the name does not already speak of colour."""
        words = set(self.thing.name.lower().split())
        return None if words & COLOUR_WORDS else self.members[0].colour

    def phrase(self, *, with_colour: bool = False) -> str:
        adjective = self.colour if with_colour else None
        return grammar.noun_phrase(self.thing.name, self.count, adjective)


def group_objects(picture: Picture) -> list[Group]:
    """Objects by thing, in the order of first appearance."""
    members: dict[str, list[Seen]] = {}
    for seen in picture.objects:
        members.setdefault(seen.thing.code, []).append(seen)
    return [Group(each[0].thing, tuple(each)) for each in members.values()]


def position(box: Box, size: int) -> str | None:
    """Where a box lies on the canvas: "top left", "middle" …; None near a border of regions."""
    words = []
    for centre, low, high in (
        ((box[1] + box[3]) / (2 * size), "top", "bottom"),
        ((box[0] + box[2]) / (2 * size), "left", "right"),
    ):
        if centre < 0.38:
            words.append(low)
        elif centre > 0.62:
            words.append(high)
        elif 0.45 <= centre <= 0.55:
            words.append("")
        else:
            return None
    return " ".join(word for word in words if word) or "middle"


def _where(place: str) -> str:
    return {"top": "at the top", "bottom": "at the bottom"}.get(
        place, ("on the " if place in ("left", "right") else "in the ") + place
    )


def _listing(groups: Sequence[Group], *, with_colour: bool = False) -> str:
    return grammar.join_and([group.phrase(with_colour=with_colour) for group in groups])


def _there(groups: Sequence[Group]) -> str:
    first = groups[0]
    return f"there {grammar.is_are_indefinite(first.thing.name, first.count)} {_listing(groups)}"


def captions(picture: Picture, rng: random.Random) -> list[str]:
    """Three to five different true captions; the first is the canonical one.

    Canonical: the noun phrase of a single object ("a red apple"), the counted things of a
    repeated or larger scene ("two owls and a door"), the relation of a pair ("a red apple to
    the left of a dog face").
    """
    groups = group_objects(picture)
    ground = f"on a {picture.background} background"
    if len(picture.objects) == 2 and len(groups) == 2:
        return _pair_captions(picture, groups, ground, rng)
    shuffled = rng.sample(groups, len(groups))
    plain = _listing(groups)
    coloured = _listing(shuffled, with_colour=True)
    others = [
        f"a {rng.choice(('picture', 'drawing'))} of {_listing(shuffled)}",
        f"{_listing(shuffled)} {ground}",
        _there(shuffled),
    ]
    if coloured != _listing(shuffled):
        others.append(coloured)
    if len(picture.objects) > 1:
        stated = _clear_relations(picture, groups)
        if stated:
            a, b, how = rng.choice(stated)
            others.append(_clause(a, b, how))
    return _distinct([plain, *rng.sample(others, min(4, len(others)))])


def _pair_captions(
    picture: Picture, groups: list[Group], ground: str, rng: random.Random
) -> list[str]:
    a, b = groups
    how = relation(a.members[0].box, b.members[0].box, picture.size)
    assert how is not None, "two things always stand in a clear relation"
    said = f"{a.phrase()} {how} {b.phrase()}"
    turned = f"{b.phrase()} {INVERSE[how]} {a.phrase()}"
    coloured = f"{a.phrase(with_colour=True)} {how} {b.phrase(with_colour=True)}"
    verb = grammar.is_are_indefinite(a.thing.name)
    others = [
        f"{rng.choice((said, turned))} {ground}",
        f"there {verb} {a.phrase()} {how} {b.phrase()}",
        f"a {rng.choice(('picture', 'drawing'))} of {_listing(rng.sample(groups, 2))}",
    ]
    chosen = [said, turned, *rng.sample(others, 2)]
    return _distinct([*chosen, coloured] if coloured != said else chosen)


def _distinct(sentences: list[str]) -> list[str]:
    return list(dict.fromkeys(sentences))


def _clear_relations(picture: Picture, groups: Sequence[Group]) -> list[tuple[Group, Group, str]]:
    """Ordered pairs of things that occur once each and stand in a clear relation."""
    once = [group for group in groups if group.count == 1]
    found = []
    for a in once:
        for b in once:
            if a is not b:
                how = relation(a.members[0].box, b.members[0].box, picture.size)
                if how is not None:
                    found.append((a, b, str(how)))
    return found


def _clause(a: Group, b: Group, how: str) -> str:
    name_a, name_b = a.thing.name, b.thing.name
    return f"{grammar.definite(name_a)} {grammar.is_are(name_a)} {how} {grammar.definite(name_b)}"


def negatives(picture: Picture) -> dict[str, str | None]:
    """The canonical caption of a pair made false: its relation inverted, its nouns exchanged.

    Both are None for scenes whose canonical caption states no relation.
    """
    groups = group_objects(picture)
    if len(picture.objects) != 2 or len(groups) != 2:
        return {"relation_swap": None, "noun_swap": None}
    a, b = groups
    how = relation(a.members[0].box, b.members[0].box, picture.size)
    assert how is not None, "two things always stand in a clear relation"
    return {
        "relation_swap": f"{a.phrase()} {INVERSE[how]} {b.phrase()}",
        "noun_swap": f"{b.phrase()} {how} {a.phrase()}",
    }


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def description(picture: Picture) -> str:
    """Three to six sentences: what there is, where, in which colour and manner."""
    groups = group_objects(picture)
    number = grammar.NUMBER_WORDS[len(picture.objects)]
    things = "thing" if len(picture.objects) == 1 else "things"
    ground = f"a plain {picture.background} background"
    sentences = [_sentence(f"the picture shows {number} {things} on {ground}: {_listing(groups)}")]
    placed = [group for group in groups if group.count == 1]
    for group in placed[:2]:
        place = position(group.members[0].box, picture.size)
        name = group.thing.name
        if place:
            sentences.append(
                _sentence(f"{grammar.definite(name)} {grammar.is_are(name)} {_where(place)}")
            )
    stated = _clear_relations(picture, groups)
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


def questions(picture: Picture, things: Sequence[Thing], rng: random.Random) -> list[Question]:
    """Up to seven questions with their one right answer, of different kinds as far as possible.

    ``things`` are the names to draw from for asking after something that is not there.
    """
    groups = group_objects(picture)
    asked = [
        *_identity_questions(picture, groups),
        *_presence_questions(groups, things, rng),
        *_relation_questions(picture, groups, rng),
        *_attribute_questions(picture, groups),
    ]
    asked.append(
        Question("What colour is the background?", picture.background, "background"),
    )
    total = grammar.NUMBER_WORDS[len(picture.objects)]
    asked.append(Question("How many things are in the picture?", total, "count"))
    rng.shuffle(asked)
    seen_kinds: dict[str, int] = {}
    ranked = []
    for order, question in enumerate(asked):
        seen_kinds[question.kind] = seen_kinds.get(question.kind, 0) + 1
        ranked.append((seen_kinds[question.kind], order, question))
    return [question for _, _, question in sorted(ranked, key=lambda r: r[:2])[:_MAX_QUESTIONS]]


def _identity_questions(picture: Picture, groups: Sequence[Group]) -> list[Question]:
    if len(picture.objects) == 1:
        return [Question("What is this?", groups[0].phrase(), "name")]
    return [Question("What is in the picture?", _listing(groups), "name")]


def _presence_questions(
    groups: Sequence[Group], things: Sequence[Thing], rng: random.Random
) -> list[Question]:
    def ask(thing: Thing, answer: str) -> Question:
        verb = "Are" if grammar.number_of(thing.name) == "plural" else "Is"
        phrase = grammar.noun_phrase(thing.name)
        if grammar.number_of(thing.name) in ("plural", "mass"):
            phrase = f"any {thing.name}"
        return Question(f"{verb} there {phrase} in the picture?", answer, "presence")

    present = rng.choice(groups).thing
    questions = [ask(present, "yes")]
    # Absent things are of other categories and share no word with what is there, so that a
    # dog face is never argued to be a dog.
    categories = {group.thing.category for group in groups}
    words = {word for group in groups for word in group.thing.name.split()}
    absent = [
        thing
        for thing in things
        if thing.category not in categories and not words & set(thing.name.split())
    ]
    if absent:
        questions.append(ask(rng.choice(absent), "no"))
    return questions


def _relation_questions(
    picture: Picture, groups: Sequence[Group], rng: random.Random
) -> list[Question]:
    stated = _clear_relations(picture, groups)
    if not stated:
        return []
    a, b, how = rng.choice(stated)
    asked = how if rng.random() < 0.5 else INVERSE[how]  # type: ignore[index]
    verb = grammar.is_are(a.thing.name).capitalize()
    name_a, name_b = grammar.definite(a.thing.name), grammar.definite(b.thing.name)
    found = [
        Question(f"{verb} {name_a} {asked} {name_b}?", "yes" if asked == how else "no", "relation")
    ]
    if len(picture.objects) == 2:
        found.append(Question(f"What is {how} {name_b}?", a.phrase(), "relation"))
    return found


def _attribute_questions(picture: Picture, groups: Sequence[Group]) -> list[Question]:
    found = []
    for group in groups:
        name = group.thing.name
        verb = grammar.is_are(name)
        if grammar.countable(name):
            how_many = f"How many {grammar.bare_plural(name)} are there?"
            found.append(Question(how_many, grammar.NUMBER_WORDS[group.count], "count"))
        if group.count > 1:
            continue
        place = position(group.members[0].box, picture.size)
        if place:
            where = f"Where in the picture {verb} {grammar.definite(name)}?"
            found.append(Question(where, _where(place), "position"))
        if group.colour:
            colour = f"What colour {verb} {grammar.definite(name)}?"
            found.append(Question(colour, group.colour, "colour"))
        if group.thing.kind:
            kind = f"What kind of thing {verb} {grammar.definite(name)}?"
            answer = grammar.noun_phrase(group.thing.kind)
            found.append(Question(kind, answer, "kind"))
    return found


def annotate(
    picture: Picture, things: Sequence[Thing], split: str, rng: random.Random
) -> dict[str, Any]:
    """The JSON that goes beside a picture."""
    return {
        "captions": captions(picture, rng),
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
        "questions": [asdict(question) for question in questions(picture, things, rng)],
        "style": picture.style,
        "background": picture.background,
        "split": split,
    }
