"""Opening a trained run, or a recipe over released weights, to talk with it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.run import load_system
from latentmodal.experiments.recipe import find_recipe, load_recipe
from latentmodal.experiments.systems.generation import GenerationConfig
from latentmodal.experiments.training.fit import build_system
from latentmodal.experiments.training.run_folder import RunFolder
from latentmodal.llm import ConversationTemplate, ConversationWriter

logger = logging.getLogger(__name__)

DEFAULT_STYLE: Final = "vicuna_v0"
"""How a system is spoken to that was trained without words of a user."""


@dataclass(frozen=True)
class Speaker:
    """A generation system in eval mode, and who it is in a title."""

    system: Any
    name: str

    @property
    def takes_words(self) -> bool:
        """Whether it converses, and the user's part is more than pictures."""
        writer = self.system.writer
        return isinstance(writer, ConversationWriter) and not writer.style.speechless


def open_speaker(
    run: str, overrides: Sequence[str] = (), style: str | None = None, *, converse: bool = True
) -> Speaker:
    """The generation system of a run or recipe.

    Args:
        run: folder of a trained run, whose newest checkpoint is read; or a shipped recipe or
            recipe file, built as it is: for released weights that the recipe names.
        overrides: `key=value` of the recipe.
        style: of the conversation; None: the one of the recipe where it takes words, or else
            `vicuna_v0`, with a warning.
        converse: False keeps a system without words as it was trained, unless `style` is given.

    Raises:
        UserError: no such run or recipe, one of another system, or a style it cannot take.
    """
    if style is not None:
        template_in(ConversationTemplate(), style)  # a wrong name before anything is loaded
    folder = Path(run)
    speaker = open_run(folder, overrides) if folder.is_dir() else _open_recipe(run, overrides)
    system, own = speaker.system, speaker.system.config.conversation
    if style is None and not speaker.takes_words:
        if not converse:
            return speaker
        style = DEFAULT_STYLE
        logger.warning(
            "%s was trained on captions alone: it is spoken to in the style %s, which it has "
            "never seen (--style names another)",
            speaker.name,
            style,
        )
    if style is None or (own is not None and own.style == style):
        converse_in(system, own, style or own.style)
    else:
        # The text before a conversation belongs to its style.
        other = replace(own or ConversationTemplate(), system=None)
        converse_in(system, template_in(other, style), style)
    return speaker


def open_run(folder: Path, overrides: Sequence[str] = ()) -> Speaker:
    """The newest checkpoint of a run of the system `generation`.

    Raises:
        UserError: no such run, or one of another system.
    """
    run = RunFolder(folder)
    _check_speaks(run.recipe().system, str(folder))
    system, recipe = load_system(run, run.checkpoint(), overrides)
    return Speaker(system, f"{recipe.name} (seed {recipe.seed})")


def _open_recipe(name: str, overrides: Sequence[str]) -> Speaker:
    try:
        find_recipe(name)
    except UserError as error:
        raise UserError(f"{name}: no folder of a run; {error}") from error
    recipe = load_recipe(name, overrides)
    _check_speaks(recipe.system, name)
    if recipe.system.projection is None and recipe.system.pretrained is None:
        logger.warning("%s: names no weights of a bridge: it speaks untrained", name)
    system = build_system(recipe, RunFolder(Path(recipe.run_dir)))
    device = "cuda" if torch.cuda.is_available() and recipe.trainer.accelerator != "cpu" else "cpu"
    return Speaker(system.to(device).eval(), recipe.name)


def _check_speaks(system: Any, where: str) -> None:
    if not isinstance(system, GenerationConfig):
        raise UserError(f"{where}: is no run of the system generation, which alone speaks")


def template_in(own: ConversationTemplate, style: str) -> ConversationTemplate:
    """The same template in another style.

    Raises:
        UserError: an unknown style.
    """
    try:
        return replace(own, style=style)
    except ValueError as error:
        raise UserError(f"--style: {error}") from error


def converse_in(system: Any, template: ConversationTemplate, style: str) -> ConversationWriter:
    """Let a system converse by a template from now on, its own answers read back whole.

    Args:
        system: a generation system; its writer is replaced.
        template: what to write conversations by.
        style: as the user named it, for the error.

    Raises:
        UserError: the model's tokenizer cannot write the style.
    """
    # In training answers may have been cut; what was said is read back as it was said.
    whole = replace(template, max_text_tokens=template.max_context_tokens)
    try:
        system.writer = system.write_conversations(whole)
    except ValueError as error:
        raise UserError(f"--style {style}: {error}") from error
    writer: ConversationWriter = system.writer
    return writer
