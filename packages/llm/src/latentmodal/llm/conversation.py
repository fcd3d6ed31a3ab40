"""Conversations about pictures, and the styles in which they are written out.

The styles are facts about what language models were trained on: MiniGPT-4 (Zhu et al. 2023, arXiv
2304.10592) on Vicuna v0 and Llama-2-chat, LLaVA (Liu et al. 2023, arXiv 2304.08485) on Vicuna v1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

IMAGE_TAG: Final = "<image>"
"""Marks the place of a picture in what a user says; in an answer it is text like any other."""

CHAT_TEMPLATE: Final = "chat_template"
"""The style that is whatever the tokenizer's own chat template writes."""

DESCRIBE_INSTRUCTIONS: Final = (
    "Give a thorough description of this picture.",
    "Study the picture and tell me everything you can see in it.",
    "Please write about this picture at length, with its details.",
    "What is shown in this picture? Describe all of it for me.",
)
"""Requests for a long description, drawn where a conversation brings none."""

_PUBLISHED_TAG = "<Img><ImageHere></Img>"  # of MiniGPT-4's instruction files


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: Literal["user", "assistant"]
    text: str

    def __post_init__(self) -> None:
        if self.role not in ("user", "assistant"):
            raise ValueError(f"role={self.role!r} is unknown; choose user or assistant")


Conversation = Sequence[Turn]
"""The user first, then by turns."""


def check_conversation(conversation: Conversation, last: Literal["user", "assistant"]) -> None:
    """Raise ValueError unless the user begins, roles alternate, and ``last`` speaks last."""
    for index, turn in enumerate(conversation):
        expected = "assistant" if index % 2 else "user"
        if turn.role != expected:
            raise ValueError(
                f"turn {index} of a conversation is the {turn.role}'s, not the {expected}'s: the "
                "user begins and roles alternate"
            )
    if not conversation or conversation[-1].role != last:
        raise ValueError(
            f"a conversation of {len(conversation)} turns does not end with the {last}'s: "
            + ("add the answer to learn" if last == "assistant" else "add the question to answer")
        )


@dataclass(frozen=True, kw_only=True)
class ConversationStyle:
    """How a conversation is written:

    `{bos}{opening}…{user_end}{assistant}…{end}{user}…{user_end}{assistant}…{end}`

    Attributes:
        opening: before the first question, `{system}` in it is the system text.
        opening_without_system: the same where there is no system text.
        system: the style's own system text.
        user: before any other question.
        user_end: after a question.
        assistant: before an answer.
        end: text that ends an answer, and is a target; None: EOS.
        bos: "once" at the start, or before "each" question.
        image_open, image_close: around every picture.
        joins_space: the space that ends `assistant` belongs to the answer's first word with every
            tokenizer. Otherwise only with byte-level ones, which write it there; one of the
            sentencepiece kind then reads it as a token of its own, and begins the answer by
            another, as in the prompts that MiniGPT-4 was trained on.
        speechless: the user shows pictures and says nothing.
    """

    opening: str = ""
    opening_without_system: str = ""
    system: str = ""
    user: str = ""
    user_end: str = ""
    assistant: str = ""
    end: str | None = None
    bos: Literal["once", "each"] = "once"
    image_open: str = ""
    image_close: str = ""
    joins_space: bool = False
    speechless: bool = False


CONVERSATION_STYLES: Final[dict[str, ConversationStyle]] = {
    # MiniGPT-4's first stage: pictures and captions, each on a line of its own.
    "plain": ConversationStyle(end="\n", speechless=True),
    # As MiniGPT-4 trained on Vicuna v0: without system text, and with a space before the
    # assistant's mark, which its demo leaves out.
    "vicuna_v0": ConversationStyle(
        opening="{system}###Human: ",
        opening_without_system="###Human: ",
        user="Human: ",
        user_end=" ###",
        assistant="Assistant: ",
        end="###",
        image_open="<Img>",
        image_close="</Img>",
    ),
    "vicuna_v1": ConversationStyle(
        opening="{system} USER: ",
        opening_without_system="USER: ",
        system=(
            "A chat between a curious user and an artificial intelligence assistant. The "
            "assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        user="USER: ",
        user_end=" ",
        assistant="ASSISTANT: ",
        joins_space=True,
    ),
    # BOS begins every question, as Llama-2-chat was trained; pictures as in MiniGPT-4.
    "llama2_chat": ConversationStyle(
        opening="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
        opening_without_system="[INST] ",
        user="[INST] ",
        user_end=" [/INST]",
        assistant=" ",
        bos="each",
        image_open="<Img>",
        image_close="</Img>",
    ),
}


@dataclass(frozen=True, kw_only=True)
class ConversationTemplate:
    """How a recipe wants conversations written.

    Attributes:
        style: a name of `CONVERSATION_STYLES`, or `chat_template` for the tokenizer's own.
        system: system text; None: the style's own, "": none (a tokenizer's chat template may
            still write its own).
        instructions: requests of which one is drawn for each sample whose first user turn says
            nothing; one that holds `<image>` says itself where the picture stands. None:
            `DESCRIBE_INSTRUCTIONS`.
        instructions_file: the same from a text file, one a line; MiniGPT-4's files can be read.
        max_text_tokens: longer answers are cut, before their end text.
        max_context_tokens: positions of a whole conversation, soft tokens included. The oldest
            questions without a picture are left out, with their answers, until it fits; a
            conversation that does not fit even so is refused. Pictures are never cut or left out.
    """

    style: str = "vicuna_v0"
    system: str | None = None
    instructions: tuple[str, ...] | None = None
    instructions_file: str | None = None
    max_text_tokens: int = 160
    max_context_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.style != CHAT_TEMPLATE and self.style not in CONVERSATION_STYLES:
            raise ValueError(
                f"style={self.style!r} is unknown; choose from "
                f"{', '.join((*CONVERSATION_STYLES, CHAT_TEMPLATE))}"
            )
        for name in ("max_text_tokens", "max_context_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.instructions is not None and self.instructions_file is not None:
            raise ValueError("instructions and instructions_file are both given; leave one out")
        if self.instructions is not None and not all(map(str.strip, self.instructions or ("",))):
            raise ValueError("instructions has an empty entry, or none: leave it out for our own")

    def read_instructions(self) -> tuple[str, ...]:
        """The instructions, from wherever they come.

        Raises:
            ValueError: `instructions_file` cannot be read, or is empty.
        """
        if self.instructions_file is None:
            return self.instructions or DESCRIBE_INSTRUCTIONS
        try:
            text = Path(self.instructions_file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"instructions_file={self.instructions_file!r} cannot be read ({error}): give a "
                "text file with one instruction a line"
            ) from error
        lines = (line.strip() for line in text.replace(_PUBLISHED_TAG, IMAGE_TAG).splitlines())
        instructions = tuple(line for line in lines if line)
        if not instructions:
            raise ValueError(
                f"instructions_file={self.instructions_file!r} is empty: write one instruction a "
                "line"
            )
        return instructions
