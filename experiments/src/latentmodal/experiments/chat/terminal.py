"""Talking with a run in the terminal, or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Final

from rich.console import Console

from latentmodal.experiments.chat.opening import Speaker
from latentmodal.experiments.chat.session import ChatSession
from latentmodal.experiments.errors import UserError
from latentmodal.llm import GenerationSettings

HELP: Final = """\
/image PATH  show a picture with what is said next
/undo        take back the last question and answer
/reset       begin anew
/settings    how answers are made
/help        this
/quit        leave (so does Ctrl-D); Ctrl-C stops an answer"""


def talk(speaker: Speaker, settings: GenerationSettings) -> None:
    """Read lines and answer them until `/quit` or the end of the input."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    session = ChatSession(speaker.system, settings)
    console.print(f"{speaker.name}. /image PATH shows it a picture, /help says more.", style="dim")
    loop = _Loop(session, console)
    for line in _lines(console):
        if not loop.take(line.strip()):
            return


class _Loop:
    def __init__(self, session: ChatSession, console: Console) -> None:
        self._session = session
        self._console = console
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/undo": self._undo,
            "/reset": self._reset,
            "/settings": self._settings,
            "/help": lambda _: self._note(HELP),
        }

    def take(self, line: str) -> bool:
        """Do what a line says; False to leave."""
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return False
        try:
            if command := self._commands.get(word):
                command(rest.strip())
            elif word.startswith("/"):
                raise UserError(f"{word}: no such command; /help lists them")
            elif line or self._session.waiting:
                self._answer(line)
        except UserError as error:
            self._console.print(f"error: {error}", style="red")
        return True

    def _answer(self, line: str) -> None:
        answer, said = self._session.say(line), False
        try:
            for piece in answer:
                said = True
                self._console.out(piece, end="", highlight=False)
                self._console.file.flush()
        except KeyboardInterrupt:
            self._console.out(" [stopped]", end="", style="dim")
        finally:
            answer.close()
        self._console.out("" if said else "[no answer]")

    def _image(self, path: str) -> None:
        if not path:
            raise UserError("/image: give the path of a picture")
        try:
            file = Path(path.strip("'\"")).expanduser()
        except RuntimeError as error:  # somebody's home who is not known here
            raise UserError(f"{path}: {error}") from error
        self._session.add_picture(file)
        self._note(f"{path} goes with what you say next")

    def _undo(self, _: str) -> None:
        self._note("taken back" if self._session.undo() else "there is nothing to take back")

    def _reset(self, _: str) -> None:
        self._session.reset()
        self._note("begun anew")

    def _settings(self, _: str) -> None:
        values = asdict(self._session.settings).items()
        self._note("\n".join(f"{name}: {value}" for name, value in values))

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim")


def _lines(console: Console) -> Iterator[str]:
    """What is typed, or comes through a pipe; Ctrl-C at the prompt clears the line."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  (its import gives `input` history and editing)

    while True:
        try:
            yield input("> ")
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
