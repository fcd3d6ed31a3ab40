"""Layer-wise learning-rate decay: layers near the input, pretrained longest, move the least."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from latentmodal.experiments.training.freeze import plain_parameters

# The outermost numbered part of a name, as timm, transformers and our own encoders spell it.
_NUMBERED = re.compile(r"(?P<stack>(?:^|.*?\.)(?:blocks|layers|layer))\.(?P<layer>\d+)\.")


def layer_multipliers(module: nn.Module, decays: Mapping[str, float]) -> dict[str, float]:
    """The learning-rate multiplier of every parameter a pattern of `decays` matches.

    A pattern (`fnmatch` style; the first that matches decides) selects one stack of numbered layers
    and what stands around it. As in BEiT and LAVIS, `depth` layers make `num_layers = depth + 1`
    steps, and layer i is scaled by decay ** (num_layers - i): i = 0 is what comes before the stack
    (patch and position embeddings, class token, a norm before the first block), i = n + 1 is block
    n, and what comes after it (final norm, pooling) is not scaled. The last block therefore gets
    decay, the first decay ** depth, the embeddings decay ** (depth + 1). Before and after are told
    apart by the order in which the module lists its parameters.

    Raises:
        ValueError: a pattern matches no parameter, nothing that trains, no numbered layer, or
            layers of more than one stack.
    """
    parameters = dict(plain_parameters(module))
    multipliers: dict[str, float] = {}
    for pattern, decay in decays.items():
        names = [n for n in parameters if n not in multipliers and fnmatchcase(n, pattern)]
        if not names:
            raise ValueError(f"optim.layer_decay: '{pattern}' matches no parameter that is left")
        if not any(parameters[name].requires_grad for name in names):
            raise ValueError(f"optim.layer_decay: everything '{pattern}' matches is frozen")
        layer_of = _layers(list(parameters), _stack_of(names, pattern))
        top = max(layer_of.values())
        multipliers |= {name: decay ** (top - layer_of[name]) for name in names}
    return multipliers


def _stack_of(names: list[str], pattern: str) -> str:
    stacks = sorted({match["stack"] for name in names if (match := _NUMBERED.match(name))})
    if len(stacks) != 1:
        found = (
            f"layers of {', '.join(stacks)}: give each its own" if stacks else "no numbered layer"
        )
        raise ValueError(f"optim.layer_decay: '{pattern}' matches {found}")
    return stacks[0]


def _layers(names: list[str], stack: str) -> dict[str, int]:
    """Layer i of every name, of which only those around `stack` mean anything."""
    blocks = {
        name: int(match["layer"])
        for name in names
        if (match := _NUMBERED.match(name)) and match["stack"] == stack
    }
    top = max(blocks.values()) + 2  # num_layers: block n is layer n + 1
    first = names.index(next(iter(blocks)))
    return {
        name: blocks[name] + 1 if name in blocks else (0 if position < first else top)
        for position, name in enumerate(names)
    }
