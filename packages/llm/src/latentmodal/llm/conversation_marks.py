"""What a style writes between the turns of a conversation, apart from what is said in them.

A mark is a tuple of text and of ids of control tokens. Marks never hold anything a user typed, so
that nothing typed can become a control token.
"""

import re
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from latentmodal.llm.conversation import CHAT_TEMPLATE, CONVERSATION_STYLES, ConversationTemplate

Mark = tuple[str | int, ...]

# Private-use characters: no chat template writes or trims them.
_HOLE = "\ue000{}\ue001"
_ANY_HOLE = re.compile("\ue000\\d+\ue001")


@dataclass(frozen=True)
class StyleMarks:
    """Marks of a named style for one tokenizer.

    Attributes:
        first: before the first question.
        next: before any other question.
        assistant: before an answer.
        end: after an answer; a target.
        end_text: `end` as text; None: EOS.
    """

    first: Mark
    next: Mark
    assistant: Mark
    end: Mark
    end_text: str | None

    def before(self, num_turns: int) -> list[Mark]:
        """The mark before each turn; end texts are not in them."""
        marks = [self.first if index == 0 else self.next for index in range(0, num_turns, 2)]
        pairs = [(mark, self.assistant) for mark in marks]
        return [mark for pair in pairs for mark in pair][:num_turns]


class ChatTemplateMarks:
    """Marks found in what a tokenizer's own chat template writes.

    The template is given a placeholder for everything that is said, and the text it writes is
    split at the placeholders. Marks depend on the number of turns alone, and are kept.
    """

    def __init__(self, tokenizer: Any, system: str | None) -> None:
        """
        Raises:
            ValueError: the tokenizer has no chat template, or one that writes a conversation in
                another way once it has gone on.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "style='chat_template': the tokenizer has no chat template; choose from "
                f"{', '.join(CONVERSATION_STYLES)}"
            )
        self.tokenizer = tokenizer
        self.system = system or ""
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        special.sort(key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special else None
        self._kept: dict[int, list[Mark]] = {}
        self.end_text = self._find_end()
        self.end = self._mark(self.end_text)

    def before(self, num_turns: int) -> list[Mark]:
        """The mark before each turn; end texts are not in them."""
        num_turns += num_turns % 2
        if num_turns not in self._kept:
            self._kept[num_turns] = [self._mark(text) for text in self._texts(num_turns)]
            if self.system:
                self._kept[num_turns][:2] = [
                    (*self._kept[num_turns][0], self.system, *self._kept[num_turns][1])
                ]
        return self._kept[num_turns]

    def _texts(self, num_turns: int) -> list[str]:
        """Texts before everything that is said, the system text included.

        Checked: what is asked is, at every turn, what was trained on up to there.
        """
        written = self._written(num_turns)
        said = len(written) - 1 - num_turns  # 1 with a system text
        for turns in range(1, num_turns, 2):
            asked = self._written(turns, opened=True)
            if asked != written[: said + turns + 1]:
                raise ValueError(
                    f"the tokenizer's chat template writes {asked[-1]!r} when it asks for an "
                    f"answer, but {written[said + turns]!r} before an answer given: choose another "
                    "style"
                )
        for after in range(said + 2, len(written), 2):
            if not written[after].startswith(self.end_text):
                raise ValueError(
                    f"the tokenizer's chat template ends answers by {self.end_text!r}, but also "
                    f"by {written[after]!r}: choose another style"
                )
            written[after] = written[after][len(self.end_text) :]
        return written[:-1]

    def _find_end(self) -> str:
        """What ends an answer: all up to the last control token, or else text."""
        tail = self._written(2)[-1]
        found = list(self._special.finditer(tail)) if self._special is not None else []
        end = tail[: found[-1].end()] if found else tail.rstrip()
        if not end:
            raise ValueError(
                "the tokenizer's chat template writes nothing after an answer, so that none would "
                f"end: choose from {', '.join(CONVERSATION_STYLES)}"
            )
        return end

    def _written(self, num_turns: int, opened: bool = False) -> list[str]:
        """The template's text around the placeholders of system text and turns."""
        roles = ["system"] if self.system else []
        roles += [("user", "assistant")[index % 2] for index in range(num_turns)]
        holes = [_HOLE.format(index) for index in range(len(roles))]
        messages = [{"role": r, "content": hole} for r, hole in zip(roles, holes, strict=True)]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=opened
            )
        except TemplateError as error:
            raise ValueError(
                f"the tokenizer's chat template refuses {', '.join(roles[:3])} ({error}): "
                "leave system out, or choose another style"
            ) from error
        if _ANY_HOLE.findall(text) != holes:
            raise ValueError(
                "the tokenizer's chat template leaves out, repeats or reorders what is said: "
                "choose another style"
            )
        return _ANY_HOLE.split(text)

    def _mark(self, text: str) -> Mark:
        """Control tokens as ids, the rest as text."""
        mark: list[str | int] = []
        at = 0
        for match in self._special.finditer(text) if self._special is not None else ():
            token = int(self.tokenizer.convert_tokens_to_ids(match.group()))
            mark += [text[at : match.start()], token]
            at = match.end()
        return tuple(part for part in (*mark, text[at:]) if part != "")


def make_marks(template: ConversationTemplate, tokenizer: Any) -> StyleMarks | ChatTemplateMarks:
    """The marks of ``template.style``.

    Raises:
        ValueError: the tokenizer lacks what the style needs.
    """
    if template.style == CHAT_TEMPLATE:
        return ChatTemplateMarks(tokenizer, template.system)
    style = CONVERSATION_STYLES[template.style]
    if style.end is None and tokenizer.eos_token_id is None:
        raise ValueError(f"style={template.style!r} ends answers by EOS, the tokenizer has none")
    bos: Mark = () if tokenizer.bos_token_id is None else (int(tokenizer.bos_token_id),)
    system = style.system if template.system is None else template.system
    opening = style.opening.replace("{system}", system) if system else style.opening_without_system
    return StyleMarks(
        first=(*bos, opening),
        next=(*(bos if style.bos == "each" else ()), style.user),
        assistant=(style.user_end + style.assistant,),
        end=(int(tokenizer.eos_token_id),) if style.end is None else (style.end,),
        end_text=style.end,
    )
