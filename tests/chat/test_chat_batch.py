"""`latentmodal generate` on files and folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from command_line import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures, one below, beside a file that is none."""
    made = tmp_path / "pictures"
    (made / "below").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.jpg", "c.webp", "d.PNG", "below/e.jpeg")):
        Image.new("RGB", (20, 20 + number), (50 * number, 90, 90)).save(made / name)
    (made / "notes.txt").write_text("not looked at")
    return made


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_picture_is_one_line(
    tiny_runs: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    asked = ("--prompt", "What is it?", "--batch-size", 2)
    assert main("generate", tiny_runs / "talks", folder, folder / "a.png", *asked) == 0
    together = lines(capsys.readouterr().out)
    assert [Path(line["image"]).name for line in together] == [
        "a.png", "b.jpg", "e.jpeg", "c.webp", "d.PNG",
    ]  # fmt: skip
    assert all(len(line["text"]) == 12 for line in together)
    assert main("generate", tiny_runs / "talks", folder / "b.jpg", *asked) == 0
    assert lines(capsys.readouterr().out) == [together[1]]


def test_a_run_of_captions_captions(
    tiny_runs: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    run = tiny_runs / "captions"
    assert main("generate", run, folder / "a.png", "--max-new-tokens", 5) == 0
    printed = capsys.readouterr()
    assert len(lines(printed.out)[0]["text"]) == 5
    assert "vicuna" not in printed.err
    assert main("generate", run, folder / "a.png", "--prompt", "What?") == 0
    assert "vicuna_v0" in capsys.readouterr().err


def test_it_goes_on_where_it_was(tiny_runs: Path, folder: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "deep" / "broken.jsonl"
    assert main("generate", tiny_runs / "talks", folder, "--out", whole) == 0
    data = whole.read_bytes()
    broken.parent.mkdir()
    second = data.index(b"\n", data.index(b"\n") + 1) + 1
    broken.write_bytes(data[: second + 15])  # two lines and a half
    assert main("generate", tiny_runs / "talks", folder, "--out", broken) == 0
    assert broken.read_bytes() == data
    assert main("generate", tiny_runs / "talks", folder, "--out", broken) == 0
    assert broken.read_bytes() == data


def test_bad_pictures_are_counted(
    tiny_runs: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "a.png").write_bytes(b"")
    (folder / "b.jpg").write_bytes(b"no picture")
    out = tmp_path / "out.jsonl"
    capsys.readouterr()
    run = ("generate", tiny_runs / "talks", folder, "--out", out, "--batch-size", 1)
    assert main(*run) == 1
    printed = " ".join(capsys.readouterr().err.split())
    assert "2 of 5 pictures could not be read" in printed
    assert printed.count("cannot be read as a picture") == 2
    assert len(lines(out.read_text())) == 3
    Image.new("RGB", (9, 9)).save(folder / "a.png")
    (folder / "b.jpg").unlink()
    assert main(*run) == 0
    assert len(lines(out.read_text())) == 4


def test_user_errors(tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.jsonl").write_text("[1]\n")
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    for arguments, message in (
        ([tmp_path / "absent.png"], "absent.png: no such file or folder"),
        ([tmp_path / "empty"], "holds no picture"),
        ([tmp_path / "x.png", "--out", tmp_path / "other.jsonl"], "is no file of generated lines"),
    ):
        capsys.readouterr()
        assert main("generate", tiny_runs / "talks", *arguments) == 2
        assert message in capsys.readouterr().err
