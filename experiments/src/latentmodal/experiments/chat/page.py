"""The conversation's page: a conversation per browser tab, one answer at a time for all."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, Final

import gradio as gr

from latentmodal.experiments.chat.opening import Speaker
from latentmodal.experiments.chat.session import ChatSession
from latentmodal.experiments.errors import UserError
from latentmodal.llm import GenerationSettings

Message = dict[str, Any]

TYPES: Final = [".jpg", ".jpeg", ".png", ".webp"]
MAX_ANSWER: Final = 512
"""Right end of the slider, unless the recipe's own answers are longer."""
_GREETING: Final = "Add a picture with the clip and ask about it."

STYLE: Final = """
.gradio-container > main { max-width: 1160px !important; width: 100%; margin: 0 auto !important; }
#title h1 { font-size: 1.25rem; margin: 0; font-weight: 600; }
#title p { margin: 0.15rem 0 0; color: var(--body-text-color-subdued); font-size: 0.9rem; }
#talk { height: calc(100vh - 220px) !important; min-height: 420px; }
#talk .message { font-size: 1rem; }
#talk img { max-height: 200px; width: auto; border-radius: 8px; }
#talk button[aria-label="Clear"], #talk button[aria-label="Share"] { display: none; }
#side .block { padding: 10px 14px; }
#side .head { align-items: center; }
#deeds { flex-wrap: nowrap; gap: 8px; }
#deeds button { min-width: 0; }
footer { display: none !important; }
"""


class Talk:
    """One browser tab's conversation, and what of it is shown."""

    def __init__(self, speaker: Speaker, settings: GenerationSettings, lock: Lock) -> None:
        self._session = ChatSession(speaker.system, settings)
        self._lock = lock
        self._stopped = Event()
        self._busy = Lock()
        self.shown: list[Message] = []

    def ask(
        self, text: str, files: list[str], settings: GenerationSettings
    ) -> Iterator[list[Message]]:
        """The conversation as shown, again after every piece of the answer.

        The model speaks in a thread of its own: a tab that is closed half-way leaves the lock to
        whoever is next.

        Raises:
            UserError: a bad picture, or what the session refuses; nothing is shown then.
        """
        if not self._busy.acquire(blocking=False):
            raise UserError("an answer is under way; stop it first")
        pieces: SimpleQueue[str | UserError | Exception | None] = SimpleQueue()
        try:
            self._add_pictures(files)
            self._session.settings = settings
            self._stopped.clear()
            before = list(self.shown)
            Thread(target=self._speak, args=(text, pieces), name="talk", daemon=True).start()
        except BaseException:
            self._session.forget_waiting()
            self._busy.release()
            raise
        asked: list[Message] = [{"role": "user", "content": {"path": path}} for path in files]
        if text:
            asked.append({"role": "user", "content": _as_text(text)})
        said = ""
        self.shown = [*before, *asked]
        yield self.shown
        while (piece := pieces.get()) is not None:
            if isinstance(piece, Exception):
                self.shown = before
                raise piece
            said += piece
            self.shown = [*before, *asked, {"role": "assistant", "content": _as_text(said)}]
            yield self.shown
        if not said:  # the session does not remember the question either
            self.shown = before
            raise UserError("no answer came; ask in other words")

    def _add_pictures(self, files: list[str]) -> None:
        for file in files:
            try:
                self._session.add_picture(Path(file))
            except UserError as error:
                # Where uploads lie on this machine is nobody's business.
                raise UserError(str(error).replace(file, Path(file).name)) from error

    def _speak(self, text: str, pieces: SimpleQueue[Any]) -> None:
        try:
            with self._lock:
                answer = self._session.say(text)
                for piece in answer:
                    pieces.put(piece)
                    if self._stopped.is_set():
                        answer.close()
                        break
        except Exception as error:
            pieces.put(error)
        finally:
            self._session.forget_waiting()
            self._busy.release()
            pieces.put(None)

    def stop(self) -> None:
        """End the answer under way, if any, after its next piece."""
        self._stopped.set()

    def undo(self) -> list[Message]:
        """What is shown without the last question and answer."""
        self._wait()
        if self._session.undo():
            while self.shown and self.shown.pop()["role"] == "assistant":
                pass
            while self.shown and self.shown[-1]["role"] == "user":
                self.shown.pop()
        return self.shown

    def reset(self) -> list[Message]:
        """Nothing: the conversation begins anew."""
        self._wait()
        self._session.reset()
        self.shown = []
        return self.shown

    def _wait(self) -> None:
        """Until nothing is under way."""
        self.stop()
        with self._busy:
            pass


def _as_text(said: str) -> str:
    """What the chat box shows as it was said, whose HTML it would obey."""
    return html.escape(said, quote=False)


class Desk:
    """All conversations under way, by the session of a tab."""

    def __init__(self, speaker: Speaker, settings: GenerationSettings) -> None:
        self._speaker, self._settings = speaker, settings
        self._lock = Lock()
        self._talks: dict[str, Talk] = {}

    def talk(self, request: gr.Request) -> Talk:
        """The conversation of a request's tab."""
        key = str(request.session_hash)
        made = self._talks.get(key)
        if made is None:
            made = self._talks.setdefault(key, Talk(self._speaker, self._settings, self._lock))
        return made

    def send(
        self,
        message: dict[str, Any],
        temperature: float,
        top_p: float,
        max_new_tokens: float,
        repetition_penalty: float,
        request: gr.Request,
    ) -> Iterator[tuple[Any, Any]]:
        """The conversation as it grows; the box is emptied once the question is taken."""
        text, files = (message["text"] or "").strip(), list(message["files"] or [])
        if not text and not files:
            raise gr.Error(
                "Type something, or add a picture.", title="Nothing to say", print_exception=False
            )
        samples = temperature > 0
        emptied: Any = None
        try:
            settings = replace(
                self._settings,
                do_sample=samples,
                temperature=temperature if samples else self._settings.temperature,
                top_p=top_p,
                max_new_tokens=int(max_new_tokens),
                min_new_tokens=min(self._settings.min_new_tokens, int(max_new_tokens)),
                repetition_penalty=repetition_penalty,
            )
            for shown in self.talk(request).ask(text, files, settings):
                yield shown, emptied or gr.MultimodalTextbox(value=None)
                emptied = gr.skip()
        except ValueError as error:
            yield self.talk(request).shown, message
            raise gr.Error(
                html.escape(str(error)), title="Not said", print_exception=False
            ) from error

    def stop(self, request: gr.Request) -> None:
        """End this tab's answer."""
        self.talk(request).stop()

    def undo(self, request: gr.Request) -> list[Message]:
        """This tab's conversation without its last question."""
        return self.talk(request).undo()

    def reset(self, request: gr.Request) -> list[Message]:
        """This tab's conversation begun anew."""
        return self.talk(request).reset()

    def leave(self, request: gr.Request) -> None:
        """Forget the conversation of a tab that was closed."""
        if talk := self._talks.pop(str(request.session_hash), None):
            talk.stop()


def theme() -> Any:
    """Colours, and the fonts of the reader's own machine."""
    return gr.themes.Default(
        primary_hue="indigo",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )


def build_page(speaker: Speaker, settings: GenerationSettings) -> gr.Blocks:
    """The page of a speaker, its controls at `settings`."""
    desk = Desk(speaker, settings)
    with gr.Blocks(
        title=f"{speaker.name}: Latent Modal",
        analytics_enabled=False,
        delete_cache=(3600, 86400),
        fill_width=True,
    ) as page:
        gr.HTML(
            f"<h1>{html.escape(speaker.name)}</h1>"
            f"<p>conversation style {html.escape(speaker.system.writer.template.style)}</p>",
            elem_id="title",
        )
        with gr.Row():
            with gr.Column(scale=4):
                chat = gr.Chatbot(
                    show_label=False,
                    elem_id="talk",
                    render_markdown=False,  # what is said is text, whoever says it
                    placeholder=_GREETING,
                    buttons=[],
                    feedback_options=None,
                    layout="bubble",
                )
                box = gr.MultimodalTextbox(
                    show_label=False,
                    placeholder="Ask about a picture",
                    file_types=TYPES,
                    file_count="multiple",
                    sources=["upload"],
                    autofocus=True,
                    elem_id="box",
                )
            with gr.Column(scale=1, min_width=280, elem_id="side"):
                with gr.Row(elem_id="deeds"):
                    stop = gr.Button("Stop", elem_id="stop", size="sm")
                    undo = gr.Button("Undo", elem_id="undo", size="sm")
                    reset = gr.Button("Reset", elem_id="reset", size="sm")
                controls = _controls(settings)
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        box.submit(desk.send, [box, *controls], [chat, box], concurrency_limit=None, **hidden)
        stop.click(desk.stop, queue=False, **hidden)
        undo.click(desk.undo, outputs=chat, concurrency_limit=None, **hidden)
        reset.click(desk.reset, outputs=chat, concurrency_limit=None, **hidden)
        chat.clear(desk.reset, outputs=chat, **hidden)
        page.load(desk.reset, outputs=chat, **hidden)
        page.unload(desk.leave)
    return page


def _controls(settings: GenerationSettings) -> list[gr.Slider]:
    """Temperature, top-p, tokens and repetition penalty, in the order `Desk.send` takes them."""
    temperature = settings.temperature if settings.do_sample else 0.0
    longest = max(MAX_ANSWER, settings.max_new_tokens)
    return [
        gr.Slider(
            0,
            max(2, temperature),
            temperature,
            step=0.05,
            label="Temperature",
            info="0 takes the likeliest word",
            elem_id="temperature",
        ),
        gr.Slider(0.05, 1, settings.top_p, step=0.05, label="Top-p", elem_id="top_p"),
        gr.Slider(
            1,
            longest,
            settings.max_new_tokens,
            step=1,
            label="Longest answer",
            info="in tokens",
            elem_id="max_new_tokens",
        ),
        gr.Slider(
            0.5,
            max(2, settings.repetition_penalty),
            settings.repetition_penalty,
            step=0.05,
            label="Repetition penalty",
            info="above 1 says less again",
            elem_id="repetition_penalty",
        ),
    ]
