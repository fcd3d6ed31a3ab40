import json
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from latentmodal.encoders import (
    Tokenizer,
    TransformersTokenizer,
    TransformersTokenizerConfig,
    WordTokenizerConfig,
    train_word_tokenizer,
)

CAPTIONS = ["A red apple, left of a dog.", "a dog", "two red dogs!"]
WEIRD = [
    "",
    "   ",
    "\r\n\t",
    "line\u2028separator\u2029",
    "\U0001f34e\U0001f1e9\U0001f1ea\u200d",
    "lone \ud83c surrogate \udf4e",
    "\x00null",
    "[EOT] [PAD] <|endoftext|>",
    "word " * 5000,
    "x" * 20_000,
    "Ünïcödé ﬁ ①",
]


@pytest.fixture
def word_file(tmp_path: Path) -> Path:
    return train_word_tokenizer(CAPTIONS, tmp_path / "sub" / "tokenizer.json")


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A CLIP tokenizer whose vocabulary is bytes, bytes at a word's end, and one merge."""
    symbols = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list(",.!")
    vocab = [*symbols, *(f"{s}</w>" for s in symbols), "do", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(vocab)}), encoding="utf-8"
    )
    (tmp_path / "merges.txt").write_text("#version: 0.2\nd o\n", encoding="utf-8")
    CLIPTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture(params=["word", "clip"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "word":
        path = request.getfixturevalue("word_file")
        return WordTokenizerConfig(path=str(path), context_length=12).build()
    folder = request.getfixturevalue("clip_folder")
    return TransformersTokenizerConfig(model=str(folder), context_length=12).build()


def test_rows_begin_and_end_with_special_tokens(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer(["a dog", "two red dogs! " * 9, ""])
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    for row, valid in zip(ids, mask, strict=True):
        assert row[0] == tokenizer.bos_id
        assert row[valid][-1] == tokenizer.eot_id
        assert (row[~valid] == tokenizer.pad_id).all()
        assert valid.int().diff().le(0).all(), "padding comes last"
    assert mask.sum(dim=1).tolist()[1:] == [12, 2], "cut to the context, end-of-text kept"


def test_decoding_gives_the_caption_back(tokenizer: Tokenizer) -> None:
    captions = ["a red apple, left of a dog.", "two red dogs!", ""]
    tokenizer.context_length = 40
    if hasattr(tokenizer.tokenizer, "enable_truncation"):
        tokenizer.tokenizer.enable_truncation(40)
    ids = tokenizer(captions).ids_BT.tolist()
    if isinstance(tokenizer, TransformersTokenizer):  # its pieces do not say where spaces were
        captions = [
            text.replace(",", " ,").replace(".", " .").replace("!", " !") for text in captions
        ]
    assert tokenizer.decode(ids) == captions


def test_decoding_stops_at_the_end_and_drops_what_is_no_word(tokenizer: Tokenizer) -> None:
    dog = tokenizer(["a dog"]).ids_BT[0].tolist()
    words = dog[1 : dog.index(tokenizer.eot_id)]
    rows = [
        [*words, tokenizer.eot_id, *words],
        [*words, tokenizer.vocab_size, tokenizer.eot_id],
        [tokenizer.bos_id, *words],
        [tokenizer.eot_id, *words],
        [],
    ]
    assert tokenizer.decode(rows) == ["a dog", "a dog", "a dog", "", ""]


def test_decoded_words_close_up_around_punctuation(tmp_path: Path) -> None:
    caption = "the man's t-shirt (red): nice."
    path = train_word_tokenizer([caption], tmp_path / "tokenizer.json")
    tokenizer = WordTokenizerConfig(path=str(path)).build()
    assert tokenizer.decode(tokenizer([caption]).ids_BT.tolist()) == [caption]


def test_trimming_shortens_to_a_multiple_of_eight(tokenizer: Tokenizer) -> None:
    tokenizer.context_length = 40
    if hasattr(tokenizer.tokenizer, "enable_truncation"):
        tokenizer.tokenizer.enable_truncation(40)
    assert tokenizer([""]).ids_BT.shape == (1, 8)
    assert tokenizer(["a " * 7]).ids_BT.shape == (1, 16)
    assert tokenizer(["a " * 6, "a"]).ids_BT.shape == (2, 8)
    assert tokenizer(["a " * 500]).ids_BT.shape == (1, 40)
    trimmed = tokenizer(CAPTIONS)
    tokenizer.trim = False
    full = tokenizer(CAPTIONS)
    assert full.ids_BT.shape == (3, 40)
    length = trimmed.ids_BT.shape[1]
    assert torch.equal(full.ids_BT[:, :length], trimmed.ids_BT)
    assert torch.equal(full.mask_BT[:, :length], trimmed.mask_BT)
    assert not full.mask_BT[:, length:].any()


def test_weird_text_never_crashes(tokenizer: Tokenizer) -> None:
    batch = tokenizer(WEIRD)
    assert batch.ids_BT.shape[0] == len(WEIRD)
    assert batch.ids_BT.min() >= 0
    assert batch.ids_BT.max() < tokenizer.vocab_size
    ends = [row[mask][-1].item() for row, mask in zip(*batch, strict=True)]
    assert ends == [tokenizer.eot_id] * len(WEIRD)
    assert tokenizer([]).ids_BT.shape[0] == 0


@pytest.mark.parametrize("value", [None, 3, b"bytes"])
def test_what_is_not_text_is_named(tokenizer: Tokenizer, value: Any) -> None:
    with pytest.raises(ValueError, match=type(value).__name__):
        tokenizer(["fine", value])


def test_tokenizers_travel_to_spawned_workers(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301
    assert torch.equal(copy(CAPTIONS).ids_BT, tokenizer(CAPTIONS).ids_BT)


def test_words_and_punctuation(word_file: Path) -> None:
    tokenizer = WordTokenizerConfig(path=str(word_file.parent)).build()
    vocab = tokenizer.tokenizer.get_vocab()
    assert [vocab[t] for t in ("[PAD]", "[BOS]", "[EOT]", "[UNK]")] == [0, 1, 2, 3]
    assert tokenizer.vocab_size == len(vocab) == 4 + 11
    (row,) = tokenizer(["A RED dog, unheard-of"]).ids_BT
    words = [tokenizer.tokenizer.id_to_token(i) for i in row.tolist()]
    assert words[:9] == ["[BOS]", "a", "red", "dog", ",", "[UNK]", "[UNK]", "of", "[EOT]"]


def test_special_tokens_cannot_be_written_into_a_caption(word_file: Path) -> None:
    tokenizer = WordTokenizerConfig(path=str(word_file)).build()
    (row,) = tokenizer(["dog [EOT] dog [PAD]"]).ids_BT
    assert (row == tokenizer.eot_id).sum() == 1
    assert row[0] == tokenizer.bos_id


def test_training_does_not_depend_on_the_order(tmp_path: Path) -> None:
    captions = [f"w{i % 7} v{i % 11} u{i}" for i in range(60)]
    first = train_word_tokenizer(captions, tmp_path / "a.json", max_vocab=30)
    second = train_word_tokenizer(iter(captions[::-1]), tmp_path / "b.json", max_vocab=30)
    assert first.read_text() == second.read_text()
    assert WordTokenizerConfig(path=str(first)).build().vocab_size == 30
    train_word_tokenizer([], tmp_path / "empty.json")
    assert WordTokenizerConfig(path=str(tmp_path / "empty.json")).build().vocab_size == 4


def test_transformers_reads_the_word_file(word_file: Path) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(word_file))
    ours = WordTokenizerConfig(path=str(word_file)).build()
    batch = ours(["a red dog!"])
    assert theirs("a red dog!")["input_ids"] == batch.ids_BT[batch.mask_BT].tolist()


def test_lower_casing_is_optional(clip_folder: Path, word_file: Path) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(word_file))
    theirs.backend_tokenizer.normalizer = None
    theirs.save_pretrained(clip_folder / "cased")
    cased, lower = (
        TransformersTokenizerConfig(model=str(clip_folder / "cased"), lower=x).build()
        for x in (False, True)
    )
    assert cased(["A"]).ids_BT[0, 1] == 3
    assert lower(["A"]).ids_BT[0, 1] == cased(["a"]).ids_BT[0, 1] != 3


def test_clip_ids_equal_open_clips(tmp_path: Path) -> None:
    reference = open_clip.SimpleTokenizer()
    # The same vocabulary; the two projects spell the start and end tokens differently.
    vocab = [*list(reference.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(vocab)}), encoding="utf-8"
    )
    merges = sorted(reference.bpe_ranks, key=reference.bpe_ranks.__getitem__)
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges), encoding="utf-8"
    )
    CLIPTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "clip")
    tokenizer = TransformersTokenizerConfig(model=str(tmp_path / "clip"), trim=False).build()
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (49408, 49407)
    texts = [*CAPTIONS, "A photo of a Dalmatian, running!", "naïve café 123", "two red dogs " * 60]
    ids, mask = tokenizer(texts)
    assert torch.equal(torch.where(mask, ids, 0), reference(texts))


def test_mistakes_are_named(tmp_path: Path, word_file: Path) -> None:
    with pytest.raises(ValueError, match="train_word_tokenizer"):
        WordTokenizerConfig(path=str(tmp_path)).build()
    with pytest.raises(ValueError, match="context_length=2"):
        WordTokenizerConfig(path=str(word_file), context_length=2).build()
    PreTrainedTokenizerFast(tokenizer_file=str(word_file))
    stranger = json.loads(word_file.read_text())
    stranger["model"]["vocab"] = {"[UNK]": 0}
    stranger["added_tokens"], stranger["post_processor"] = [], None
    word_file.write_text(json.dumps(stranger), encoding="utf-8")
    with pytest.raises(ValueError, match=r"\[PAD\]"):
        WordTokenizerConfig(path=str(word_file)).build()
