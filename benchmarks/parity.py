"""Whether two sides compute the same: nothing is timed before this is settled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file


class Result(NamedTuple):
    """A loss, and a safetensors file of the gradient of every parameter."""

    loss: float
    gradients: Path


class Error(NamedTuple):
    """How far a side is from the reference."""

    loss: float
    """Relative."""
    gradient: float
    """Largest max |a - b| / max |b| of a tensor."""
    worst: str
    """Whose gradient that is."""


def compare(result: Result, reference: Result) -> Error:
    """Relative errors of the loss and the worst gradient.

    Raises:
        ValueError: the parameters that got gradients are not the same ones.
    """
    grads, expected = load_file(result.gradients), load_file(reference.gradients)
    if grads.keys() != expected.keys():
        different = ", ".join(sorted(grads.keys() ^ expected.keys())[:5])
        raise ValueError(f"only one side has gradients of {different}")
    errors = {}
    for name, b in expected.items():
        difference = (grads[name] - b).abs().max().item()
        # A NaN on either side is no small difference.
        difference = difference if math.isfinite(difference) else math.inf
        errors[name] = difference / max(b.abs().max().item(), 1e-30)
    worst = max(errors, key=errors.__getitem__)
    loss = abs(result.loss - reference.loss) / abs(reference.loss)
    return Error(loss, errors[worst], worst)


def require(name: str, error: Error, tolerance: float) -> None:
    """Raise SystemExit unless both errors are within `tolerance`."""
    if not (error.loss <= tolerance and error.gradient <= tolerance):
        raise SystemExit(
            f"{name} computes something else: the loss is off by {error.loss:.1e} and the gradient "
            f"of {error.worst} by {error.gradient:.1e}; nothing is timed"
        )
