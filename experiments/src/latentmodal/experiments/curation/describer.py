"""A trained run as a `Describer`.

Legend: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from latentmodal.experiments.chat.opening import converse_in, open_run, template_in
from latentmodal.experiments.errors import UserError
from latentmodal.llm import ConversationTemplate, GenerationSettings, Turn

OWN_STYLE = "run"
"""The style the run was trained with."""


class RunDescriber:
    """Asks the model of a run, in a style of one's choice.

    Args:
        system: a generation system.
        name: who describes, for the ledger.
        style: of the conversation, or `run` for what the system was trained with.

    Raises:
        UserError: an unknown style, or one that the model's tokenizer cannot write.
    """

    def __init__(self, system: Any, name: str, style: str) -> None:
        self.name = name
        self.image_transform = system.model.image_encoder.preprocess.eval()
        self._system = system
        own: ConversationTemplate | None = system.config.conversation
        self._converses = own is not None or style != OWN_STYLE
        self.takes_words = False
        if self._converses:
            template = own or ConversationTemplate()
            if style != OWN_STYLE:
                template = _template(template, style)
            writer = converse_in(system, template, style)
            self.takes_words = not writer.style.speechless

    def describe(
        self,
        pixels_BCHW: Tensor,
        conversations: Sequence[Sequence[Turn]],
        settings: GenerationSettings,
    ) -> list[str]:
        """What the model says next in each conversation.

        Raises:
            UserError: a conversation that its style cannot write, or that is too long, or a
                prompt with fields that a picture alone does not fill.
        """
        said: list[str]
        try:
            if self._converses:
                said = self._system.converse(pixels_BCHW, conversations, settings)
            else:  # trained with a prompt, which asks by itself
                said = self._system.answer(
                    pixels_BCHW, [{}] * len(conversations), settings=settings
                )
        except ValueError as error:
            raise UserError(str(error)) from error
        return said

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, special ones aside."""
        tokenizer = self._system.model.llm.tokenizer
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def describer_of(folder: Path, style: str) -> RunDescriber:
    """The newest checkpoint of a run, ready to be asked.

    Raises:
        UserError: no such run, one of another system than generation, or a style it cannot take.
    """
    if style != OWN_STYLE:
        _template(ConversationTemplate(), style)  # a wrong name before anything is loaded
    speaker = open_run(folder)
    return RunDescriber(speaker.system, speaker.name, style)


def _template(own: ConversationTemplate, style: str) -> ConversationTemplate:
    """As the article asks its first stage: the request alone, no system text before it."""
    try:
        return template_in(replace(own, system=""), style)
    except UserError as error:
        raise UserError(f"{error}, or {OWN_STYLE} for the run's own") from error
