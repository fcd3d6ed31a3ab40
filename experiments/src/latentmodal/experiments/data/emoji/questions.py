"""Questions about a picture, each with its one right answer."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

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
from latentmodal.experiments.data.emoji.scenes import INVERSE, Picture

_MAX_QUESTIONS: Final = 7


@dataclass(frozen=True)
class Question:
    question: str
    answer: str
    kind: str


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


def presence_question(name: str) -> str:
    """Whether a thing of that name is there: Is there a fox, any bread; Are there any grapes."""
    number = grammar.number_of(name)
    verb = "Are" if number == "plural" else "Is"
    phrase = f"any {name}" if number in ("plural", "mass") else grammar.noun_phrase(name)
    return f"{verb} there {phrase} in the picture?"


def _identity_questions(picture: Picture, groups: Sequence[Group]) -> list[Question]:
    if len(picture.objects) == 1:
        return [Question("What is this?", groups[0].phrase(), "name")]
    return [Question("What is in the picture?", listing(groups), "name")]


def _presence_questions(
    groups: Sequence[Group], things: Sequence[Thing], rng: random.Random
) -> list[Question]:
    def ask(thing: Thing, answer: str) -> Question:
        return Question(presence_question(thing.name), answer, "presence")

    present = rng.choice(groups).thing
    questions = [ask(present, "yes")]
    absent = _absent_thing(groups, things, rng)
    if absent is not None:
        questions.append(ask(absent, "no"))
    return questions


def _absent_thing(
    groups: Sequence[Group], things: Sequence[Thing], rng: random.Random
) -> Thing | None:
    """A thing nobody could take for one that is there.

    It is of another category and shares no word with any: a dog face may be called a dog.
    """
    categories = {group.thing.category for group in groups}
    words = {word for group in groups for word in group.thing.name.split()}
    for thing in rng.sample(things, min(20, len(things))):
        if thing.category not in categories and words.isdisjoint(thing.name.split()):
            return thing
    return None


def _relation_questions(
    picture: Picture, groups: Sequence[Group], rng: random.Random
) -> list[Question]:
    stated = clear_relations(picture, groups)
    if not stated:
        return []
    a, b, how = rng.choice(stated)
    asked = how if rng.random() < 0.5 else INVERSE[how]
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
            asked = f"Where in the picture {verb} {grammar.definite(name)}?"
            found.append(Question(asked, where(place), "position"))
        if group.colour:
            colour = f"What colour {verb} {grammar.definite(name)}?"
            found.append(Question(colour, group.colour, "colour"))
        if group.thing.kind:
            kind = f"What kind of thing {verb} {grammar.definite(name)}?"
            answer = grammar.noun_phrase(group.thing.kind)
            found.append(Question(kind, answer, "kind"))
    return found
