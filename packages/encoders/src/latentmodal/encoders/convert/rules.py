"""A small language for two-way renaming of state dicts.

A rule says which tensors of theirs make up which tensors of ours, and how: by name alone, by a
transpose, or by cutting and joining. Rules are read in both directions, so a converter cannot drift
from its inverse. Every operation is linear, hence gradients convert by the same rules.

Names are templates: `{i}` stands for a layer number, `{rest}` for the remainder of a name.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

StateDict = Mapping[str, Tensor]
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Op:
    """How tensors change shape on the way: `to_ours` and its exact inverse `to_theirs`."""

    to_ours: Callable[[Tensors], Tensors]
    to_theirs: Callable[[Tensors], Tensors]


def _same(tensors: Tensors) -> Tensors:
    return tensors


def _transpose(tensors: Tensors) -> Tensors:
    return (tensors[0].t().contiguous(),)


def _cut(tensors: Tensors, *parts: int) -> Tensors:
    """Cut along the rows in the given proportions; copies, as safetensors stores no views."""
    row = len(tensors[0]) // sum(parts)
    return tuple(piece.clone() for piece in tensors[0].split([row * part for part in parts]))


def _join(tensors: Tensors) -> Tensors:
    return (torch.cat(tensors),)


SAME = Op(_same, _same)
TRANSPOSE = Op(_transpose, _transpose)
CLASS_TOKEN = Op(lambda t: (t[0].reshape(1, 1, -1),), lambda t: (t[0].reshape(-1),))
POSITIONS = Op(lambda t: (t[0].unsqueeze(0),), lambda t: (t[0].squeeze(0),))
# A scalar parameter has shape () in most checkpoints and (1,) here: FSDP2 shards no scalars.
SCALAR = Op(lambda t: (t[0].reshape(1),), lambda t: (t[0].reshape(()),))
JOIN_QKV = Op(_join, lambda t: _cut(t, 1, 1, 1))
SPLIT_Q_KV = Op(lambda t: _cut(t, 1, 2), _join)


@dataclass(frozen=True)
class Rule:
    """`theirs` and `ours` are one name template or several."""

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    op: Op = SAME


class Converted(NamedTuple):
    """A converted state dict and the source keys no rule took."""

    state: dict[str, Tensor]
    unmatched: list[str]


def convert(state: StateDict, rules: Sequence[Rule], to: Literal["ours", "theirs"]) -> Converted:
    """Apply rules; a key is taken by the first rule whose names are all present."""
    result: dict[str, Tensor] = {}
    used: set[str] = set()
    for rule in rules:
        theirs, ours = _names(rule.theirs), _names(rule.ours)
        sources, targets = (theirs, ours) if to == "ours" else (ours, theirs)
        apply = rule.op.to_ours if to == "ours" else rule.op.to_theirs
        pattern = _pattern(sources[0])
        for key in state:
            match = None if key in used else pattern.fullmatch(key)
            if match is None:
                continue
            keys = [source.format_map(match.groupdict()) for source in sources]
            if any(name in used or name not in state for name in keys):
                continue
            tensors = apply(tuple(state[name] for name in keys))
            names = [target.format_map(match.groupdict()) for target in targets]
            result.update(zip(names, tensors, strict=True))
            used.update(keys)
    return Converted(result, sorted(set(state) - used))


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


@cache
def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    return re.compile(
        escaped.replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{rest\}", r"(?P<rest>.+)")
    )
