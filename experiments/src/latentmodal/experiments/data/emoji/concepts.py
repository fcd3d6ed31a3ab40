"""Things: the concrete, drawable, nameable part of the emoji, and which of them are held out."""

import random
from dataclasses import dataclass
from itertools import zip_longest
from typing import Final, Literal

from latentmodal.experiments.data.emoji import vocabulary
from latentmodal.experiments.data.emoji.drawings import Entry, read_entries

# Clock faces differ by a hand's angle; nobody names them from a small picture.
_CLOCK_FACES: Final = ("o'clock", "-thirty")
_LARGE_UNSEEN: Final = 60

Selection = Literal["eight", "tiny", "default", "large"]
_FEW: Final = {"eight": 8, "tiny": 12}


@dataclass(frozen=True)
class Thing:
    """A nameable thing.

    ``category`` is its Unicode subgroup; ``kind`` a noun that is true of it; ``has_colour`` says
    whether the colour of its drawing may be called the colour of the thing.
    """

    name: str
    code: str
    category: str
    group: str
    kind: str | None
    has_colour: bool
    aliases: tuple[str, ...]


def concrete_things() -> tuple[Thing, ...]:
    """Every concrete thing both vector sources draw, in Unicode order: about 750."""
    return tuple(
        _thing(entry)
        for entry in read_entries()
        if entry.subgroup in vocabulary.SUBGROUPS
        and entry.name not in vocabulary.EXCLUDED
        and not entry.name.endswith(_CLOCK_FACES)
    )


def select_things(selection: Selection) -> tuple[tuple[Thing, ...], tuple[Thing, ...]]:
    """(known things, unseen things) of a selection; the same on every machine.

    ``default`` is 150 + 20 chosen by eye. ``tiny`` takes 12 + 4 of them, spread over the kinds, and
    ``eight`` the first 8 + 4 of those.
    ``large`` is everything concrete, of which the 20 and 40 more drawn by lot are unseen.
    """
    by_name = {thing.name: thing for thing in concrete_things()}
    default = [name for names in vocabulary.DEFAULT_THINGS.values() for name in names]
    unseen = list(vocabulary.UNSEEN_THINGS)
    if selection in _FEW:
        # One of each shelf in turn, so that even a dozen things are of many kinds.
        rounds = zip_longest(*vocabulary.DEFAULT_THINGS.values())
        known = [name for each in rounds for name in each if name is not None][: _FEW[selection]]
        unseen = unseen[:4]
    elif selection == "default":
        known = default
    else:
        lot = random.Random("unseen things")
        others = [name for name in by_name if name not in {*default, *unseen}]
        unseen += sorted(lot.sample(others, _LARGE_UNSEEN - len(unseen)))
        known = [name for name in by_name if name not in unseen]
    return tuple(by_name[name] for name in known), tuple(by_name[name] for name in unseen)


def _thing(entry: Entry) -> Thing:
    kind = vocabulary.KINDS.get(entry.subgroup)
    return Thing(
        name=entry.name,
        code=entry.code,
        category=entry.subgroup,
        group=entry.group,
        kind=None if entry.name in vocabulary.NOT_OF_THEIR_KIND else kind,
        has_colour=(
            entry.subgroup != "drink" and entry.name not in vocabulary.COLOUR_OF_SOMETHING_ELSE
        ),
        aliases=entry.aliases,
    )
