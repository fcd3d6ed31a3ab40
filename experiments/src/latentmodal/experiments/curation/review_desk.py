"""What the review page asks for and does, without the web: look at a record, decide, undo.

Every decision names the version of the record that the person saw. A record that changed since is
not decided on unseen, so two tabs cannot overwrite one another.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, cast, get_args

from latentmodal.experiments.curation.differences import mark_versions
from latentmodal.experiments.curation.ledger import IMAGES, Decision, Ledger, Record, Reviewed

State = Literal["open", "kept", "edited", "dropped", "rule"]
"""Where a record stands; `rule`: the rules dropped it and nobody has decided otherwise."""

Step = Literal["here", "next", "previous"]

STATES: Final[tuple[State, ...]] = get_args(State)
STEPS: Final[tuple[Step, ...]] = get_args(Step)
ALL: Final = "all"
MAX_TEXT_CHARACTERS: Final = 20_000
MEDIA_TYPES: Final = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
}
"""Files that are shown as pictures, and as what."""

_UPCOMING = 3  # pictures that the page loads ahead
_REVIEWED: dict[Decision, State] = {"keep": "kept", "edit": "edited", "drop": "dropped"}


class UnknownRecordError(LookupError):
    """No record has this id."""

    def __init__(self, record_id: str) -> None:
        super().__init__(f"record '{record_id}': not in the ledger")


class StaleError(Exception):
    """The record is no longer as the person saw it; `record` is how it is now."""

    def __init__(self, record: Record) -> None:
        super().__init__(record.id)
        self.record = record


def state_of(record: Record) -> State:
    """Where a record stands."""
    if record.review is not None:
        return _REVIEWED[record.review]
    return "open" if record.rule is None else "rule"


def version_of(record: Record) -> str:
    """A short name of exactly this content; any event changes it."""
    return hashlib.sha256(repr(record).encode()).hexdigest()[:16]


class Desk:
    """One reviewer at one ledger. Threads may share it.

    Args:
        ledger: where decisions go; this desk is its only writer.
        by: the reviewer's name, written into each decision.
    """

    def __init__(self, ledger: Ledger, by: str) -> None:
        self.ledger = ledger
        self.by = by
        self._guard = threading.Lock()
        self._before: dict[str, Record] = {}  # the version a decision made -> what it replaced

    def show(
        self, state: str = ALL, record_id: str | None = None, step: str = "here"
    ) -> dict[str, Any]:
        """The record at, after or before `record_id` among those in `state`, ready for JSON.

        `here` shows the record whatever its state, and the first in `state` where none is named.
        Open records go round: after the last come those skipped before. `record` is None where
        there is nothing more in that direction.

        Raises:
            ValueError: no such state or step.
            UnknownRecordError: no such record.
            UserError: the ledger cannot be read.
        """
        if state not in (*STATES, ALL):
            raise ValueError(f"state '{state}': choose from {', '.join((*STATES, ALL))}")
        if step not in STEPS:
            raise ValueError(f"step '{step}': choose from {', '.join(STEPS)}")
        records = list(self.ledger)
        states = [state_of(record) for record in records]
        matching = [at for at, own in enumerate(states) if state in (own, ALL)]
        at = self._find(records, matching, record_id, step, around=state == "open")
        here = -1 if at is None else at
        upcoming = [other for other in matching if other > here][:_UPCOMING]
        counts = Counter(states)
        return {
            "record": None if at is None else {**self.view(records[at]), "number": at + 1},
            "counts": {own: counts[own] for own in STATES},
            "total": len(records),
            "upcoming": [records[other].id for other in upcoming],
            "by": self.by,
            "ledger": str(self.ledger.path),
        }

    def view(self, record: Record) -> dict[str, Any]:
        """What the page shows of a record: its versions oldest first, differences marked."""
        versions = {
            "generated": record.generated,
            "refined": record.refined,
            "edited": record.edited,
        }
        present = {kind: text for kind, text in versions.items() if text is not None}
        return {
            "id": record.id,
            "version": version_of(record),
            "state": state_of(record),
            "image": record.image,
            "text": record.text,
            "texts": [
                {"kind": kind, "pieces": pieces}
                for kind, pieces in zip(present, mark_versions(list(present.values())), strict=True)
            ],
            "rule": record.rule,
            "refused": record.refused,
            "reviewed_by": record.reviewed_by,
            "time": record.time,
        }

    def decide(
        self, record_id: str, version: str, decision: str, text: str | None = None
    ) -> Record:
        """Write a decision; when this returns it is on the disk.

        An edit that changes nothing keeps the text. The same decision sent twice, as after a lost
        answer, is written once.

        Raises:
            ValueError: no such decision, or a text that is missing, empty, too long or no Unicode.
            UnknownRecordError: no such record.
            StaleError: the record changed since the person saw it.
            UserError: the ledger could not be written; nothing was decided.
        """
        text = None if text is None else _clean(text)
        event = Reviewed(id=record_id, by=self.by, decision=cast(Decision, decision), text=text)
        with self._guard:
            before = self._record(record_id)
            if version != version_of(before):
                if (before.review, before.reviewed_by) == (decision, self.by) and text in (
                    None,
                    before.edited,
                ):
                    return before
                raise StaleError(before)
            if decision == "edit" and before.edited is None and text == before.text:
                event = Reviewed(id=record_id, by=self.by, decision="keep")
            after = self._write(record_id, [event])
            self._before[version_of(after)] = before
            return after

    def undo(self, record_id: str, version: str) -> Record:
        """Write events that bring back what held before the newest decision on a record.

        A decision made before this desk opened is taken back: the record is open again.

        Raises:
            ValueError: there is no decision to undo.
            UnknownRecordError, StaleError, UserError: as in `decide`.
        """
        with self._guard:
            now = self._record(record_id)
            if version != version_of(now):
                raise StaleError(now)
            if now.review is None:
                raise ValueError(f"record '{record_id}': no decision to undo")
            before = self._before.get(version)
            after = self._write(record_id, self._back(now, before))
            earlier = None if before is None else self._before.get(version_of(before))
            if earlier is not None:
                self._before[version_of(after)] = earlier
            return after

    def picture(self, record_id: str) -> Path | None:
        """The file of a record's picture; None unless it is one inside the pictures' folder.

        Raises:
            UnknownRecordError: no such record.
            UserError: the ledger cannot be read.
        """
        folder = (self.ledger.folder / IMAGES).resolve()
        path = (self.ledger.folder / self._record(record_id).image).resolve()
        if not path.is_relative_to(folder) or path.suffix.lower() not in MEDIA_TYPES:
            return None
        return path if path.is_file() else None

    def _record(self, record_id: str) -> Record:
        record = self.ledger.records().get(record_id)
        if record is None:
            raise UnknownRecordError(record_id)
        return record

    def _write(self, record_id: str, events: Sequence[Reviewed]) -> Record:
        self.ledger.append(*events)
        return self._record(record_id)

    def _back(self, now: Record, before: Record | None) -> list[Reviewed]:
        """Events after which a record is decided on, and edited, as it was before."""

        def event(decision: Decision | None, text: str | None = None) -> Reviewed:
            return Reviewed(id=now.id, by=self.by, decision=decision, text=text)

        if before is None or before.review is None:
            return [event(None)]
        if before.review == "edit":
            return [event("edit", before.edited)]
        if before.edited == now.edited:
            return [event(before.review)]
        first = event(None) if before.edited is None else event("edit", before.edited)
        return [first, event(before.review)]

    @staticmethod
    def _find(
        records: Sequence[Record],
        matching: Sequence[int],
        record_id: str | None,
        step: str,
        *,
        around: bool,
    ) -> int | None:
        """Position of the record to show."""
        if record_id is None:
            return next(iter(matching), None)
        here = next((at for at, record in enumerate(records) if record.id == record_id), None)
        if here is None:
            raise UnknownRecordError(record_id)
        if step == "here":
            return here
        earlier = [at for at in matching if at < here]
        later = [at for at in matching if at > here]
        ahead = later if step == "next" else earlier[::-1]
        behind = earlier if step == "next" else later[::-1]
        return next(iter(ahead + behind if around else ahead), None)


def _clean(text: str) -> str:
    """Line ends as on Unix, no blanks around.

    Raises:
        ValueError: empty, too long, or not encodable.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not text:
        raise ValueError("text: is empty; drop the picture instead")
    if len(text) > MAX_TEXT_CHARACTERS:
        raise ValueError(f"text: {len(text)} characters; write at most {MAX_TEXT_CHARACTERS}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("text: holds half a character (a lone surrogate); type it anew") from error
    return text
