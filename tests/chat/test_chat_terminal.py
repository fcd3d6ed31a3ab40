"""`latentmodal chat` through a pipe, and what it opens."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from command_line import main
from latentmodal.experiments.chat.cli import _settings
from latentmodal.experiments.chat.opening import open_speaker
from latentmodal.experiments.chat.session import ChatSession
from latentmodal.experiments.chat.terminal import _Loop
from latentmodal.experiments.errors import UserError
from latentmodal.llm import GenerationSettings

Talk = Callable[..., list[str]]


@pytest.fixture
def talk(
    tiny_runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Talk:
    """What the command prints for some lines of input."""

    def run(*lines: str, options: tuple[object, ...] = ()) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        assert main("chat", tiny_runs / "talks", *options) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_lines_from_a_pipe_are_answered(talk: Talk, picture: Path) -> None:
    title, shown, answer, second, undone, *rest = talk(
        f"/image {picture}", "What is it?", "", "And now?", "/undo", "/quit", "Unheard"
    )
    assert title.startswith("talks (seed 0).")
    assert shown == f"{picture} goes with what you say next"
    assert len(answer) == len(second) == 12
    assert undone == "taken back"
    assert rest == []


def test_sampling_is_repeated_by_its_seed(talk: Talk) -> None:
    options = ("--temperature", "1.5", "--top-p", "1.0", "--max-new-tokens", "20")
    said = [talk("Hello", options=(*options, "--seed", seed))[-1] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    assert 12 < len(said[0]) <= 20  # bytes that are no letters together make one sign


def test_a_mistake_does_not_end_the_talk(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"no picture")
    printed = talk(
        f"/image {tmp_path}/no.png",
        "/image absent.png",
        "/image ~nobody-of-this-name/x.png",
        "/image",
        "/images",
        "x" * 3000,
        "/undo",
        "Hello",
        "/reset",
        "/undo",
        "/settings",
        "/help",
    )
    errors = [line for line in printed if line.startswith("error: ")]
    wanted = ("no.png", "absent.png", "nobody", "give the path", "no such command", "positions")
    assert len(errors) == len(wanted)
    for error, part in zip(errors, wanted, strict=True):
        assert part in error
    assert printed[7] == "there is nothing to take back"
    assert len(printed[8]) == 12
    assert printed[9:11] == ["begun anew", "there is nothing to take back"]
    assert "max_new_tokens: 12" in printed
    assert any(line.startswith("/quit") for line in printed)


def test_ctrl_c_stops_the_answer_only(tiny_runs: Path) -> None:
    from rich.console import Console

    out = io.StringIO()
    session = ChatSession(open_speaker(str(tiny_runs / "talks")).system)
    console = Console(file=out)
    spoken = iter(["abc", KeyboardInterrupt()])

    def interrupted(piece: str, **_: object) -> None:
        if isinstance(next(spoken, None), KeyboardInterrupt):
            raise KeyboardInterrupt
        out.write(piece)

    console.out = interrupted  # type: ignore[method-assign, assignment]
    assert _Loop(session, console).take("Hello")
    assert "[stopped]" in out.getvalue()
    assert 0 < len(session.turns[-1].text) < 12


def test_a_run_of_captions_is_spoken_to_with_a_warning(
    tiny_runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tiny_runs / "captions")
    with caplog.at_level(logging.WARNING):
        speaker = open_speaker(folder)
    assert "vicuna_v0" in caplog.text
    assert speaker.takes_words
    assert speaker.system.writer.template.style == "vicuna_v0"
    assert not open_speaker(folder, converse=False).takes_words
    assert open_speaker(folder, style="llama2_chat").system.writer.template.style == "llama2_chat"


def test_a_recipe_is_built_without_a_checkpoint(tiny_runs: Path) -> None:
    recipe = str(tiny_runs / "talks.yaml")
    speaker = open_speaker(recipe, ["system.generation.max_new_tokens=20"])
    assert speaker.system.config.generation.max_new_tokens == 20
    trained = open_speaker(str(tiny_runs / "talks"))
    session = ChatSession(trained.system)
    session.add_picture(Image.new("RGB", (8, 8)))
    with torch.inference_mode():
        assert "".join(session.say("What?"))
    template = trained.system.writer.template
    assert template.max_text_tokens == template.max_context_tokens, "answers are read back whole"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no folder of a run; "),
        (["RUNS/talks", "--style", "vicuna"], "style='vicuna' is unknown"),
        (["RUNS/talks", "--style", "chat_template"], "no chat template"),
        (["RUNS/talks", "--top-p", "1.5"], "--top-p is 1.5"),
        (["RUNS/talks", "--greedy", "--temperature", "1"], "--greedy: samples nothing"),
        (["clip/emoji"], "is no run of the system generation"),
    ],
)
def test_a_user_error_is_one_line(
    tiny_runs: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    capsys.readouterr()
    assert main("chat", *(text.replace("RUNS", str(tiny_runs)) for text in arguments)) == 2
    printed = capsys.readouterr().err
    assert message in printed.splitlines()[-1]
    assert "Traceback" not in printed


def test_options_change_the_recipes_settings() -> None:
    own = GenerationSettings(num_beams=5, min_new_tokens=8, max_new_tokens=30)
    settings = _settings(own, 4, None, None, False, 1.2)
    assert (settings.num_beams, settings.min_new_tokens, settings.max_new_tokens) == (1, 4, 4)
    assert settings.repetition_penalty == 1.2
    assert not settings.do_sample
    assert _settings(own, None, 0.7, None, False, None).do_sample
    assert not _settings(own, None, 0.0, None, False, None).do_sample
    assert _settings(own, None, None, None, False, None, keep_beams=True).num_beams == 5
    with pytest.raises(UserError, match="--repetition-penalty is -1"):
        _settings(own, None, None, None, False, -1.0)
