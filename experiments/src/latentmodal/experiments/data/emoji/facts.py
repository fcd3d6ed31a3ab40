"""What can be said of a picture beyond doubt: its things, their colours, places and relations.

Where the truth could be argued about (a slanting relation, a colour of half a drawing, an object
between two regions), there is no fact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from latentmodal.experiments.data.emoji import grammar
from latentmodal.experiments.data.emoji.concepts import Thing
from latentmodal.experiments.data.emoji.palette import COLOUR_WORDS
from latentmodal.experiments.data.emoji.scenes import Box, Picture, Relation, Seen, relation


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


def where(place: str) -> str:
    return {"top": "at the top", "bottom": "at the bottom"}.get(
        place, ("on the " if place in ("left", "right") else "in the ") + place
    )


def listing(groups: Sequence[Group], *, with_colour: bool = False) -> str:
    return grammar.join_and([group.phrase(with_colour=with_colour) for group in groups])


def clear_relations(
    picture: Picture, groups: Sequence[Group]
) -> list[tuple[Group, Group, Relation]]:
    """Ordered pairs of things that occur once each and stand in a clear relation."""
    once = [group for group in groups if group.count == 1]
    found = []
    for a in once:
        for b in once:
            if a is not b:
                how = relation(a.members[0].box, b.members[0].box, picture.size)
                if how is not None:
                    found.append((a, b, how))
    return found
