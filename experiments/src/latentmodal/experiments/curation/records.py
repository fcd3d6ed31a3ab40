"""What happens to a description, event by event, and what holds of it after them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final, Literal, get_args

Decision = Literal["keep", "edit", "drop"]
DECISIONS: Final[tuple[Decision, ...]] = get_args(Decision)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to one record.

    Attributes:
        id: which record.
        by: a person's name, or the model or command that did it.
        time: UTC in ISO 8601; the ledger fills it in.
    """

    name: ClassVar[str]

    id: str
    by: str
    time: str = ""


@dataclass(frozen=True, kw_only=True)
class Generated(Event):
    """A model described a picture; the record begins here, or begins anew.

    Attributes:
        image: path of the picture, relative to the ledger's folder.
        text: what the model said.
        instruction: what it was asked.
        meta: what the sample held besides: its key, captions, objects.
    """

    name: ClassVar[str] = "generated"

    image: str
    text: str
    instruction: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Refined(Event):
    """The text was mended. Rules that had judged the former text judge again."""

    name: ClassVar[str] = "refined"

    text: str


@dataclass(frozen=True, kw_only=True)
class Refused(Event):
    """A language model gave no usable text; the text stays as it is."""

    name: ClassVar[str] = "refused"

    reason: str


@dataclass(frozen=True, kw_only=True)
class Filtered(Event):
    """The rules judged the text: dropped for a reason, or not dropped (None)."""

    name: ClassVar[str] = "filtered"

    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Reviewed(Event):
    """A person decided; `None` takes the decision (and the edited text) back.

    Attributes:
        text: the text as edited; given with "edit" and only then.
    """

    name: ClassVar[str] = "reviewed"

    decision: Decision | None
    text: str | None = None

    def __post_init__(self) -> None:
        if self.decision is not None and self.decision not in DECISIONS:
            raise ValueError(f"decision '{self.decision}': choose from {', '.join(DECISIONS)}")
        if (self.decision == "edit") != (self.text is not None):
            raise ValueError(f"decision '{self.decision}': a text belongs to 'edit' and only to it")


EVENTS: Final[dict[str, type[Event]]] = {
    kind.name: kind for kind in (Generated, Refined, Refused, Filtered, Reviewed)
}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One picture and its text, as all events so far leave them.

    Attributes:
        image: path of the picture, relative to the ledger's folder.
        generated: what the stage-1 model said.
        refined: that, mended by a language model.
        refused: why the newest attempt to mend it failed; None after a success.
        edited: the text as a person edited it.
        filtered: whether the rules have judged the text.
        rule: the reason for which they dropped it, if they did.
        review: what a person decided.
        reviewed_by: who that was.
        by, time: who did what happened last, and when.
    """

    id: str
    image: str
    generated: str
    instruction: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    refined: str | None = None
    refused: str | None = None
    edited: str | None = None
    filtered: bool = False
    rule: str | None = None
    review: Decision | None = None
    reviewed_by: str | None = None
    by: str
    time: str

    @property
    def text(self) -> str:
        """The newest text; a person's stands above a model's."""
        texts = (self.edited, self.refined, self.generated)
        return next(text for text in texts if text is not None)

    @property
    def dropped(self) -> str | None:
        """The rules' reason to drop it, unless a person decided to keep it."""
        return None if self.review in ("keep", "edit") else self.rule

    def kept(self, *, unreviewed: bool) -> bool:
        """Whether it goes into the curated data; `unreviewed` decides what nobody has looked at."""
        if self.dropped is not None:
            return False
        return unreviewed if self.review is None else self.review != "drop"


def fold(record: Record | None, event: Event) -> Record:
    """What holds of a record after one more event.

    Raises:
        ValueError: the event is about a record that was never generated.
    """
    if isinstance(event, Generated):
        return Record(
            id=event.id,
            image=event.image,
            generated=event.text,
            instruction=event.instruction,
            meta=event.meta,
            by=event.by,
            time=event.time,
        )
    if record is None:
        raise ValueError(f"'{event.id}' is {event.name}, but was never generated")
    record = replace(record, by=event.by, time=event.time)
    match event:
        case Refined():
            return replace(record, refined=event.text, refused=None, filtered=False, rule=None)
        case Refused():
            return replace(record, refused=event.reason)
        case Filtered():
            return replace(record, filtered=True, rule=event.reason)
        case Reviewed():
            # "keep" and "drop" are said of the text as it is: an earlier edit stays.
            edited = event.text if event.decision == "edit" else record.edited
            return replace(
                record,
                review=event.decision,
                reviewed_by=None if event.decision is None else event.by,
                edited=None if event.decision is None else edited,
            )
    raise AssertionError(f"{type(event).__name__} has no meaning")
