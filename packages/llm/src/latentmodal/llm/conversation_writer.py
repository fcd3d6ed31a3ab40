"""Writes conversations as padded batches: one function for training and for asking.

Shapes: B samples, T positions.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from latentmodal.llm.batch import PromptBatch
from latentmodal.llm.conversation import (
    CHAT_TEMPLATE,
    CONVERSATION_STYLES,
    IMAGE_TAG,
    Conversation,
    ConversationStyle,
    ConversationTemplate,
    Turn,
    check_conversation,
)
from latentmodal.llm.conversation_marks import Mark, make_marks
from latentmodal.llm.prompt import IMAGE, Answer, Prompt, PromptIds, collate_prompts

Part = Any  # text, the id of a control token, `IMAGE`, or `Answer`


class ConversationWriter:
    """Writes conversations in a template's style, in loader workers; can be pickled.

    `ask` of the first turns of a conversation is, id by id, the beginning of `train` of the whole,
    given the same draw and a context that holds it all.

    Only marks hold control tokens: names of special tokens in what is said are text, and so is
    `<image>` in an answer. Text between pictures, control tokens and answers is tokenised in one
    piece, answers and what ends them apart. Styles that mark turns by text alone, such as
    `###Human:`, cannot tell their marks from the same text typed by a user.
    """

    def __init__(
        self,
        template: ConversationTemplate,
        tokenizer: Any,
        kind: Literal["causal", "seq2seq"] = "causal",
        num_image_tokens: int = 1,
    ) -> None:
        """
        Args:
            template: the style and its limits.
            tokenizer: of transformers (`LanguageModel.tokenizer`).
            kind: of the model (`LanguageModel.kind`): "causal".
            num_image_tokens: soft tokens of one picture (`Bridge.num_output_tokens`).

        Raises:
            ValueError: the tokenizer or model cannot take this style, or the instructions cannot
                be read.
        """
        if kind != "causal":
            raise ValueError(
                f"kind={kind!r} cannot hold a conversation; use a causal model, or a prompt"
            )
        self.template = template
        self.tokenizer = tokenizer
        self.kind = kind
        self.num_image_tokens = num_image_tokens
        self.instructions = template.read_instructions()
        named = template.style != CHAT_TEMPLATE
        self.style = CONVERSATION_STYLES[template.style] if named else ConversationStyle()
        self.marks = make_marks(template, tokenizer)
        self.end = self.marks.end_text
        self.end_ids = tuple(self._ids(self.marks.end))
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id = next(int(token) for token in pads if token is not None)
        # How the tokenizer writes a word after a space, and one at the start of a text.
        spaced, bare = (self._first_token(text) for text in (" x", "x"))
        self._takes_space = spaced.startswith("Ġ")
        self._writes_space = bare.startswith("▁")

    def train(self, conversations: Sequence[Conversation], draws: Sequence[int]) -> PromptBatch:
        """Conversations that end with an answer; all answers and their ends are targets.

        Args:
            conversations: of each sample.
            draws: of each sample, a random number of at least 0 that chooses the instruction.

        Raises:
            ValueError: a conversation that ends otherwise, whose roles do not alternate, whose
                turns the style cannot write, or that is too long.
        """
        rows = []
        for conversation, draw in zip(conversations, draws, strict=True):
            check_conversation(conversation, "assistant")
            rows.append(self._fit(conversation, draw))
        return collate_prompts(rows, self.pad_id)

    def ask(
        self, conversations: Sequence[Conversation], draws: Sequence[int] | None = None
    ) -> PromptBatch:
        """Conversations that end with a question, and the open mark of the assistant.

        Args:
            conversations: of each sample.
            draws: as in `train`; None: the first instruction for all.

        Raises:
            ValueError: as in `train`.
        """
        rows = []
        draws = [0] * len(conversations) if draws is None else draws
        for conversation, draw in zip(conversations, draws, strict=True):
            check_conversation(conversation, "user")
            rows.append(self._fit(conversation, draw))
        return collate_prompts(rows, self.pad_id, side="left", end=self.end)

    def _fit(self, conversation: Conversation, draw: int) -> PromptIds:
        """The conversation laid out, the oldest questions without a picture left out if need be."""
        turns = [self._instructed(conversation[0], draw), *conversation[1:]]
        limit = self.template.max_context_tokens
        while len((row := self._render(turns)).ids) > limit:
            spare = (i for i in range(0, len(turns) - 2, 2) if IMAGE_TAG not in turns[i].text)
            if (oldest := next(spare, None)) is None:
                raise ValueError(
                    f"a conversation takes {len(row.ids)} positions, {row.num_images} pictures "
                    f"among them, and max_context_tokens is {limit}: raise it, or shorten the text"
                )
            del turns[oldest : oldest + 2]
        return row

    def _render(self, turns: Sequence[Turn]) -> PromptIds:
        """Ids, slots and labels of ``turns``; a last question is followed by the open mark."""
        parts: list[Part] = []
        marks = self.marks.before(len(turns) + len(turns) % 2)
        for index, turn in enumerate(turns):
            mark, lead = self._give_space(marks[index]) if index % 2 else (marks[index], "")
            parts += mark
            if turn.role == "user":
                parts += self._said(turn.text)
                continue
            answer = self._encode(lead + turn.text)[: self.template.max_text_tokens]
            parts += [Answer(tuple(answer)), Answer(self.end_ids)]
        if len(turns) % 2:
            parts += self._give_space(marks[-1])[0]
        prompt = Prompt(tuple(self._tokenised(parts)))
        return prompt.lay_out(self._encode, self.num_image_tokens, self.pad_id)

    def _tokenised(self, parts: Iterable[Part]) -> list[Part]:
        """Parts with text as ids, text that stands side by side in one piece."""
        out: list[Part] = []
        run: list[str | int] = []
        for part in (*parts, None):
            if isinstance(part, str | int):
                run.append(part)
                continue
            out.append(tuple(self._ids(run)))
            run = []
            if part is not None:
                out.append(part)
        return out

    def _ids(self, run: Iterable[str | int]) -> list[int]:
        """Ids of text and of control tokens, which are ids already."""
        ids: list[int] = []
        text = ""
        for part in (*run, -1):
            if isinstance(part, str):
                text += part
                continue
            ids += self._encode(text) if text else []
            ids += [part] if part >= 0 else []
            text = ""
        return ids

    def _encode(self, text: str) -> list[int]:
        """Ids of text; a special token's name in it is text like any other."""
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        ids: list[int] = encoded["input_ids"]
        return ids

    def _said(self, text: str) -> list[Part]:
        """What a user says, with its pictures in their wrapping."""
        first, *others = text.split(IMAGE_TAG)
        parts: list[Part] = [first]
        for other in others:
            parts += [self.style.image_open, IMAGE, self.style.image_close + other]
        if self.style.speechless:
            if text.replace(IMAGE_TAG, "").strip():
                raise ValueError(
                    f"style={self.template.style!r} takes pictures without words, the user says "
                    f"{text[:40]!r}: choose another style, or leave the words out"
                )
            parts = [part for part in parts if part is IMAGE]
        return [part for part in parts if part != ""]

    def _instructed(self, turn: Turn, draw: int) -> Turn:
        """A first turn that says nothing, with one of the instructions."""
        if self.style.speechless or turn.text.replace(IMAGE_TAG, "").strip():
            return turn
        instruction = self.instructions[draw % len(self.instructions)]
        pictures = turn.text.count(IMAGE_TAG)
        if IMAGE_TAG not in instruction:
            return Turn("user", f"{turn.text} {instruction}".strip())
        if instruction.count(IMAGE_TAG) != pictures:
            raise ValueError(
                f"the instruction {instruction!r} is for {instruction.count(IMAGE_TAG)} pictures, "
                f"the sample has {pictures}: write {IMAGE_TAG} once for each, or leave it out"
            )
        return Turn("user", instruction)

    def _give_space(self, mark: Mark) -> tuple[Mark, str]:
        """A mark without its last spaces and the spaces, where they belong to the answer."""
        if not (mark and isinstance(mark[-1], str) and mark[-1].endswith(" ")):
            return mark, ""
        if not (self._takes_space or self.style.joins_space):
            return mark, ""
        bare = mark[-1].rstrip(" ")
        lead = "" if self._writes_space else mark[-1][len(bare) :]
        return (*mark[:-1], bare) if bare else mark[:-1], lead

    def _first_token(self, text: str) -> str:
        ids = self._encode(text)
        return str(self.tokenizer.convert_ids_to_tokens(ids[0])) if ids else ""
