"""Random numbers named by their purpose, so that a place in the stream needs no generator state."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_BITS = 63


def derive_seed(*parts: int | str) -> int:
    """A 63-bit number that depends on nothing but ``parts``, the same on every machine."""
    text = "\x1f".join(map(str, parts))
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def derive_uniform(*parts: int | str) -> float:
    """A number in [0, 1) that depends on nothing but ``parts``."""
    return derive_seed(*parts) / 2.0**_BITS


def permutation(n: int, *parts: int | str) -> list[int]:
    """A permutation of ``range(n)`` that depends on nothing but ``n`` and ``parts``."""
    order = list(range(n))
    random.Random(derive_seed(*parts)).shuffle(order)
    return order


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python's and torch's CPU generators inside the block and puts both back afterwards.

    Restoring matters when there are no worker processes: the model's dropout draws from the same
    torch generator and must not depend on which pictures came by.
    """
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
