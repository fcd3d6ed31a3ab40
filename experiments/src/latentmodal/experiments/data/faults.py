"""Bad samples: what can be wrong, how often it was, and when it is too often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, NamedTuple

from latentmodal.experiments.errors import UserError

MIN_BAD = 20
"""Never stop a run over fewer bad samples than this: 1 of the first 2 is 50 % and means nothing."""


class Cause(StrEnum):
    """Why a sample was lost, or what was mended in one that was kept."""

    CORRUPT_IMAGE = "corrupt image"
    ZERO_BYTE_IMAGE = "zero-byte image"
    IMAGE_FORMAT = "unsupported image format"
    IMAGE_MODE = "unsupported image mode"
    HUGE_IMAGE = "huge image"
    NO_IMAGE = "no image"
    NO_CAPTION = "no caption"
    BAD_JSON = "unreadable json"
    DUPLICATE_KEY = "duplicate key"
    HUGE_MEMBER = "oversized member"
    TRUNCATED_SHARD = "truncated shard"
    CORRUPT_SHARD = "corrupt shard"
    UNREADABLE_SHARD = "unreadable shard"
    CAPTION_CUT = "caption cut"

    @property
    def loses_sample(self) -> bool:
        """Whether the sample was skipped; otherwise it was mended and used."""
        return self is not Cause.CAPTION_CUT


class Fault(NamedTuple):
    """One thing that went wrong, and where (``shard :: key``)."""

    cause: Cause
    where: str


class BadSampleError(Exception):
    """Raised while decoding a sample that must be skipped."""

    def __init__(self, cause: Cause, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else str(cause))
        self.cause = cause


def place(shard: str, key: str) -> str:
    """``shard :: key`` for messages; control characters of a hostile key are escaped."""
    return f"{shard} :: {key if key.isprintable() else repr(key)}"


class BadSamples:
    """Counts of good and bad samples of one rank, by cause, with the first example of each.

    Workers send their faults along with the samples (`Batch.faults`), so the counts are those of
    the batches handed out, and resuming from a checkpoint neither loses nor repeats any.
    """

    def __init__(self) -> None:
        self.good = 0
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, good: int, faults: Iterable[Fault]) -> None:
        """Adds ``good`` usable samples and the faults met on the way to them."""
        self.good += good
        for fault in faults:
            self.counts[fault.cause.value] += 1
            self.examples.setdefault(fault.cause.value, fault.where)

    @property
    def bad(self) -> int:
        """Samples skipped (a truncated or corrupt shard counts as one)."""
        return sum(n for cause, n in self.counts.items() if Cause(cause).loses_sample)

    @property
    def fraction(self) -> float:
        """Skipped share of all samples seen; 0 before the first."""
        seen = self.good + self.bad
        return self.bad / seen if seen else 0.0

    def check(self, max_fraction: float, min_bad: int = MIN_BAD) -> None:
        """Raises `UserError` once at least ``min_bad`` and more than ``max_fraction`` are bad."""
        if self.bad >= min_bad and self.fraction > max_fraction:
            raise UserError(
                f"{self.bad} of {self.good + self.bad} samples were unusable "
                f"({self.fraction:.1%}, max_bad_fraction allows {max_fraction:.1%}): "
                f"{self.summary()}; mend the shards or raise max_bad_fraction"
            )

    def summary(self, top: int = 3) -> str:
        """The commonest losses with an example each: ``12 x corrupt image (a.tar :: 0007)``."""
        losses = [(c, n) for c, n in self.counts.most_common() if Cause(c).loses_sample]
        return ", ".join(f"{n} x {cause} ({self.examples[cause]})" for cause, n in losses[:top])

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, loadable with ``weights_only=True``."""
        return {"good": self.good, "counts": dict(self.counts), "examples": dict(self.examples)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.good = state["good"]
        self.counts = Counter(state["counts"])
        self.examples = dict(state["examples"])
