"""Which things meet in which picture, decided for a whole data set before anything is drawn.

``train``         scenes of known things in the training styles
``seen``          fresh scenes of pairs that occur in training: how well it learned
``unseen_pairs``  two known things that never meet in any training scene: the headline
``arrangements``  the same pairs again and again, each time placed anew: what stands where
``style_seen``    known things alone, once per training style: naming
``unseen_style``  known things alone, in a style no training picture has
``unseen_things`` things that occur in no training picture, alone, once per training style
"""

import random
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from latentmodal.experiments.data.emoji.concepts import Thing, select_things
from latentmodal.experiments.data.emoji.config import EmojiPreset
from latentmodal.experiments.data.emoji.drawings import TRAIN_STYLES, UNSEEN_STYLE
from latentmodal.experiments.data.emoji.grammar import countable

SPLITS: Final = (
    "train",
    "seen",
    "unseen_pairs",
    "style_seen",
    "unseen_style",
    "unseen_things",
    "arrangements",
)
_STYLE_WEIGHTS: Final = (0.4, 0.4, 0.2)  # of TRAIN_STYLES

Pair = tuple[str, str]  # codes, sorted


@dataclass(frozen=True)
class Plan:
    """One picture to be drawn: what, how often, in which style."""

    things: tuple[Thing, ...]
    style: str


@dataclass(frozen=True)
class DatasetPlan:
    known: tuple[Thing, ...]
    unseen: tuple[Thing, ...]
    reserved: tuple[Pair, ...]
    splits: dict[str, tuple[Plan, ...]]


def pairs_of(things: tuple[Thing, ...]) -> set[Pair]:
    """Unordered pairs of different things that meet in a picture of these."""
    return set(combinations(sorted({thing.code for thing in things}), 2))


def plan_dataset(preset: EmojiPreset, seed: int) -> DatasetPlan:
    """Decide every picture of every split. The same for the same settings, on any machine."""
    known, unseen = select_things(preset.things)
    rng = random.Random(f"{seed}/plan")
    by_code = {thing.code: thing for thing in known}
    all_pairs = sorted(pairs_of(known))
    reserved = rng.sample(all_pairs, round(preset.reserved_share * len(all_pairs)))
    forbidden = frozenset(reserved)

    train = tuple(
        Plan(_draw_things(preset, known, forbidden, rng), _draw_style(rng))
        for _ in range(preset.train_scenes)
    )
    met = sorted({pair for plan in train for pair in pairs_of(plan.things)})
    splits = {
        "train": train,
        "seen": _pair_scenes(met, by_code, preset.eval_scenes, rng),
        "unseen_pairs": _pair_scenes(reserved, by_code, preset.eval_scenes, rng),
        "style_seen": _alone(known, TRAIN_STYLES),
        "unseen_style": _alone(known, (UNSEEN_STYLE,)),
        "unseen_things": _alone(unseen, TRAIN_STYLES),
        "arrangements": _arrangements(reserved, by_code, preset.eval_scenes, rng),
    }
    assert tuple(splits) == SPLITS
    return DatasetPlan(known, unseen, tuple(sorted(reserved)), splits)


def _draw_style(rng: random.Random) -> str:
    return rng.choices(TRAIN_STYLES, _STYLE_WEIGHTS)[0]


def _draw_things(
    preset: EmojiPreset, known: tuple[Thing, ...], forbidden: frozenset[Pair], rng: random.Random
) -> tuple[Thing, ...]:
    """One thing; one thing several times; several things of which one may repeat; or two."""
    lot = rng.random()
    if lot < preset.single_share:
        return (rng.choice(known),)
    lot -= preset.single_share
    if lot < preset.repeated_share:
        thing = rng.choice([thing for thing in known if countable(thing.name)])
        return (thing,) * rng.choice((2, 3, 4))
    lot -= preset.repeated_share
    if lot >= preset.several_share:
        return _draw_compatible(2, known, forbidden, rng)
    count = rng.choice((3, 4))
    different = rng.randint(2, count)
    things = _draw_compatible(different, known, forbidden, rng)
    repeatable = [thing for thing in things if countable(thing.name)] or None
    if repeatable is None:
        return things
    return things + (rng.choice(repeatable),) * (count - different)


def _draw_compatible(
    count: int, known: tuple[Thing, ...], forbidden: frozenset[Pair], rng: random.Random
) -> tuple[Thing, ...]:
    """Different things no two of which are a reserved pair.

    Drawn again as a whole until that holds, so every permitted set is equally likely. With a
    fifth of the pairs reserved, four things pass about one time in four.
    """
    while True:
        things = tuple(rng.sample(known, count))
        if not pairs_of(things) & forbidden:
            return things


def _pair_scenes(
    pairs: list[Pair], by_code: dict[str, Thing], limit: int, rng: random.Random
) -> tuple[Plan, ...]:
    """One scene per pair, so no caption of the split is true of another of its pictures."""
    chosen = rng.sample(pairs, min(limit, len(pairs)))
    return tuple(_pair_scene(pair, by_code, rng) for pair in chosen)


def _arrangements(
    pairs: list[Pair], by_code: dict[str, Thing], count: int, rng: random.Random
) -> tuple[Plan, ...]:
    """So many scenes of the pairs in turn: enough to judge placing where the pairs are few."""
    return tuple(_pair_scene(pairs[i % len(pairs)], by_code, rng) for i in range(count))


def _pair_scene(pair: Pair, by_code: dict[str, Thing], rng: random.Random) -> Plan:
    first, second = rng.sample(pair, 2)
    return Plan((by_code[first], by_code[second]), _draw_style(rng))


def _alone(things: tuple[Thing, ...], styles: tuple[str, ...]) -> tuple[Plan, ...]:
    return tuple(Plan((thing,), style) for style in styles for thing in things)
