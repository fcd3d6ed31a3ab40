"""Exporting what was kept, and the command line around the ledger."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentmodal.experiments.curation.exporting import export_ledger
from latentmodal.experiments.curation.ledger import Event, Filtered, Generated, Ledger, Reviewed
from latentmodal.experiments.data.addresses import open_shard
from latentmodal.experiments.data.decode import decode_sample
from latentmodal.experiments.data.readers.importing import import_dataset
from latentmodal.experiments.data.tar_reader import read_samples
from latentmodal.experiments.errors import UserError

META: dict[str, dict[str, Any]] = {
    "keep": {"key": "000/1", "captions": ["a cat"], "description": "A cat, truly.", "style": "s"},
    "edit": {"key": "2"},
}


def _image(form: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (6, 4), (200, 30, 20, 0)[: len(mode)]).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def reviewed(tmp_path: Path) -> Ledger:
    """One record of every fate."""
    ledger = Ledger(tmp_path / "curated" / "ledger.jsonl")
    names = {"keep": "png", "edit": "jpg", "drop": "png", "rule": "png", "unseen": "png"}
    (tmp_path / "curated" / "images").mkdir(parents=True)
    events: list[Event] = []
    for name, extension in names.items():
        path = f"images/{name}.{extension}"
        data = _image("JPEG") if extension == "jpg" else _image("PNG", "RGBA")
        (tmp_path / "curated" / path).write_bytes(data)
        text = f"It is {name}."
        events.append(Generated(id=name, by="m", image=path, text=text, meta=META.get(name, {})))
    events += [
        Filtered(id="rule", by="r", reason="too_short: 1"),
        Reviewed(id="keep", by="p", decision="keep"),
        Reviewed(id="edit", by="p", decision="edit", text="Edited: café."),
        Reviewed(id="drop", by="p", decision="drop"),
    ]
    with ledger:
        ledger.append(*events)
    return ledger


def _samples(folder: Path) -> dict[str, Any]:
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with open_shard(str(shard)) as stream:
            for raw in read_samples(stream, str(shard), pytest.fail):
                found[raw.key] = raw
    return found


@pytest.mark.parametrize(
    ("unreviewed", "names"), [(False, ["keep", "edit"]), (True, ["keep", "edit", "unseen"])]
)
def test_shards_hold_what_was_kept(
    reviewed: Ledger, tmp_path: Path, unreviewed: bool, names: list[str]
) -> None:
    out = tmp_path / "deep" / "out"
    assert export_ledger(reviewed, "shards", out, unreviewed=unreviewed) == len(names)
    samples = _samples(out)
    assert list(samples) == names
    kept = json.loads(samples["keep"].members["json"])
    assert kept == {
        **META["keep"],
        "description": "It is keep.",
        "source_description": "A cat, truly.",
        "curated": True,
    }
    edited = json.loads(samples["edit"].members["json"])
    assert edited == {
        "key": "2",
        "captions": ["Edited: café."],
        "description": "Edited: café.",
        "curated": True,
    }
    assert samples["edit"].members["jpg"] == _image("JPEG")
    for raw in samples.values():  # as training reads them
        decode_sample(raw, lambda image: image.size, max_pixels=100, max_caption_chars=99)  # type: ignore[arg-type,return-value]


def test_the_second_stage_layout(reviewed: Ledger, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export_ledger(reviewed, "cc_sbu_align", out, unreviewed=False) == 2
    assert sorted(path.name for path in out.iterdir()) == ["filter_cap.json", "image"]
    assert json.loads((out / "filter_cap.json").read_text(encoding="utf-8")) == {
        "annotations": [
            {"image_id": "keep", "caption": "It is keep."},
            {"image_id": "edit", "caption": "Edited: café."},
        ]
    }
    assert (out / "image" / "edit.jpg").read_bytes() == _image("JPEG")
    with Image.open(out / "image" / "keep.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (6, 4))
        assert min(image.getpixel((1, 1))) > 250  # transparency over white


def test_nothing_is_overwritten_or_left_half_done(reviewed: Ledger, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="is there already"):
        export_ledger(reviewed, "shards", out, unreviewed=False)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]

    (reviewed.folder / "images" / "edit.jpg").unlink()
    for layout in ("shards", "cc_sbu_align"):
        with pytest.raises(UserError, match=r"edit\.jpg: the picture of 'edit' cannot be read"):
            export_ledger(reviewed, layout, tmp_path / "other", unreviewed=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curated", "out"]

    stale = tmp_path / ".other.part"
    stale.mkdir()
    (stale / "99999.tar").write_text("of an interrupted export")
    reviewed.append(Reviewed(id="edit", by="p", decision="drop"))
    assert export_ledger(reviewed, "shards", tmp_path / "other", unreviewed=False) == 1
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["00000.tar"]


def test_nothing_kept_says_what_to_do(described: Callable[..., Ledger], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no description is kept; .*--unreviewed keep"):
        export_ledger(described(2), "shards", tmp_path / "out", unreviewed=False)
    with pytest.raises(UserError, match="--to tar: unknown layout; choose from shards"):
        export_ledger(described(2), "tar", tmp_path / "out", unreviewed=True)


def test_the_command_line_filters_and_exports(
    reviewed: Ledger, tmp_path: Path, latentmodal: Any
) -> None:
    done = latentmodal("curate", "filter", reviewed.folder, "--min-words", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "kept", "3", "reviewed"]
    out = tmp_path / "out"
    done = latentmodal(
        "curate", "export", reviewed.path, "--to", "shards", "--out", out, "--unreviewed", "keep"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 of 5 descriptions in ")
    assert list(_samples(out)) == ["keep", "edit", "rule", "unseen"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{}", "--to", "shards", "--out", "{}"], "is there already"),
        (["export", "{}", "--to", "shards", "--out", "o", "--unreviewed", "maybe"], "keep or drop"),
        (["filter", "nowhere"], "no such ledger"),
        (["filter", "{}", "--ngram", "0"], "ngram is 0"),
        (["refine", "{}"], "give one of --endpoint MODEL, --local MODEL and --tidy"),
        (["refine", "{}", "--tidy", "--local", "m"], "give one of --endpoint MODEL, --local MODEL"),
        (["refine", "{}", "--endpoint", "m"], "OPENAI_API_KEY is not set"),
        (["refine", "{}", "--endpoint", "m", "--attempts", "0"], "attempts is 0"),
        (["refine", "{}", "--endpoint", "m", "--instruction-file", "none"], "cannot be read"),
    ],
)
def test_mistakes_are_one_line(
    reviewed: Ledger, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    from latentmodal.experiments import cli

    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    told = [argument.format(reviewed.folder) for argument in arguments]
    monkeypatch.setattr("sys.argv", ["latentmodal", "curate", *told])
    with pytest.raises(UserError, match=message) as caught:
        cli.app(standalone_mode=False)
    assert "\n" not in str(caught.value)


def test_the_second_stage_layout_is_read_back(reviewed: Ledger, tmp_path: Path) -> None:
    out = tmp_path / "cc_sbu_align"
    export_ledger(reviewed, "cc_sbu_align", out, unreviewed=True)
    done = import_dataset(
        "cc_sbu_align",
        annotations=out / "filter_cap.json",
        questions=None,
        images=out,
        split="train",
        out=tmp_path / "shards",
        max_missing=0,
    )
    assert done.samples == 3
    found = [json.loads(raw.members["json"]) for raw in _samples(tmp_path / "shards").values()]
    assert [meta["description"] for meta in found] == [
        "It is keep.",
        "Edited: café.",
        "It is unseen.",
    ]
