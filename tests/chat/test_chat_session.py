"""What a session remembers, over a system that answers at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from latentmodal.experiments.chat.session import ChatSession
from latentmodal.experiments.errors import UserError
from latentmodal.llm import GenerationSettings


def _session() -> ChatSession:
    def stream(pixels_KCHW: torch.Tensor, turns: Any, _settings: Any) -> Iterator[str]:
        if "long" in turns[-1].text:
            raise ValueError("too long")
        assert sum(turn.text.count("<image>") for turn in turns) == len(pixels_KCHW)
        yield from ("a ", "dog")

    preprocess = SimpleNamespace(eval=lambda: lambda _image: torch.zeros(3, 4, 4))
    model = SimpleNamespace(image_encoder=SimpleNamespace(preprocess=preprocess))
    config = SimpleNamespace(generation=GenerationSettings())
    return ChatSession(SimpleNamespace(model=model, config=config, stream=stream))


def test_turns_and_pictures_come_and_go_together() -> None:
    session = _session()
    session.add_picture(Image.new("RGB", (8, 8)))
    assert list(session.say("What? <image>")) == ["a ", "dog"]
    assert [turn.text for turn in session.turns] == ["<image> What?", "a dog"]
    assert list(session.say("Sure?"))
    assert session.undo() and session.undo() and not session.undo()
    assert list(session.say("Again?"))


def test_a_refused_question_leaves_the_session_as_it_was() -> None:
    session = _session()
    with pytest.raises(UserError, match="too long"):
        list(session.say("long"))
    assert session.turns == []


def test_a_stopped_answer_is_kept_as_far_as_it_was_said() -> None:
    session = _session()
    answer = session.say("What?")
    assert next(answer) == "a "
    answer.close()
    assert session.turns[-1].text == "a "


def test_a_bad_picture_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    for name in ("x.png", "missing.png"):
        with pytest.raises(UserError, match=name):
            _session().add_picture(tmp_path / name)
