"""From captions to padded token ids.

Two kinds: any tokenizer of transformers, and a word-level one trained from the captions of a small
data set. Both run on the CPU, in the loader's workers, and decide there how long a batch is.

Shapes: B batch, T text length.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer

from latentmodal.encoders.hf_source import hub_or_folder

PAD, BOS, EOT, UNK = "[PAD]", "[BOS]", "[EOT]", "[UNK]"

# Trimmed lengths are rounded up to this: matrix kernels like it, and compilers see fewer shapes.
_LENGTH_STEP = 8


class TextBatch(NamedTuple):
    """Token ids and which of them are not padding.

    Attributes:
        ids_BT: int64.
        mask_BT: bool.
    """

    ids_BT: Tensor
    mask_BT: Tensor


class Tokenizer:
    """Captions to a `TextBatch`; subclasses turn captions into lists of ids.

    Attributes:
        vocab_size: ids are below this.
        context_length: longer captions are cut, keeping the end-of-text token where there is one.
        trim: pad to the batch's longest caption, rounded up to a multiple of 8, instead of the
            full context. Exact for towers that never read padding: causal ones with end-of-text
            pooling, and those that mask padding. SigLIP reads padding: leave it off there.
        pad_id, bos_id, eot_id: special ids; None where the tokenizer has none.
    """

    vocab_size: int
    pad_id: int
    bos_id: int | None
    eot_id: int | None

    def __init__(self, context_length: int, *, trim: bool, lower: bool = False) -> None:
        self.context_length = context_length
        self.trim = trim
        self.lower = lower

    def __call__(self, texts: list[str]) -> TextBatch:
        """Tokenise a batch of captions; any text at all is accepted.

        Raises:
            ValueError: something in the list is not text.
        """
        rows = self._encode([self._clean(text) for text in texts])
        length = self.context_length
        if self.trim:
            longest = max((len(row) for row in rows), default=1)
            length = min(length, -(-longest // _LENGTH_STEP) * _LENGTH_STEP)
        ids_BT = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        mask_BT = torch.zeros(len(rows), length, dtype=torch.bool)
        for b, row in enumerate(rows):
            ids_BT[b, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask_BT[b, : len(row)] = True
        return TextBatch(ids_BT, mask_BT)

    def decode(self, ids: list[list[int]]) -> list[str]:
        """Texts of ids, as a model generates them.

        Each row is cut at its end-of-text token; special tokens, and ids beyond the vocabulary
        (which a model may have added for itself), are left out.
        """
        return self._decode([self._words(row) for row in ids])

    def _words(self, row: list[int]) -> list[int]:
        start = 1 if row and row[0] == self.bos_id else 0  # it may be the end-of-text id as well
        end = row.index(self.eot_id, start) if self.eot_id in row[start:] else len(row)
        return [index for index in row[start:end] if 0 <= index < self.vocab_size]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """One list of ids per text, with special tokens, of at most `context_length` ids."""
        raise NotImplementedError

    def _decode(self, rows: list[list[int]]) -> list[str]:
        """The text of each row, without its special tokens."""
        raise NotImplementedError

    def _clean(self, text: str) -> str:
        if not isinstance(text, str):
            raise ValueError(f"captions must be text, got {type(text).__name__}: {text!r:.40}.")
        text = _replace_lone_surrogates(text)
        return text.lower() if self.lower else text


@dataclass(frozen=True, kw_only=True)
class TransformersTokenizerConfig:
    """A tokenizer of transformers, adding the special tokens it usually adds.

    Attributes:
        model: hub name or local folder.
        context_length: 77 for CLIP, 64 for SigLIP.
        lower: lower-case the text first (CLIP's and SigLIP's tokenizers do so themselves).
        trim: see `Tokenizer`; turn off for SigLIP.
    """

    model: str
    context_length: int = 77
    lower: bool = False
    trim: bool = True

    def build(self) -> "TransformersTokenizer":
        return TransformersTokenizer(self)


class TransformersTokenizer(Tokenizer):
    """Wraps `AutoTokenizer`; the original is under the attribute `tokenizer`."""

    def __init__(self, config: TransformersTokenizerConfig) -> None:
        super().__init__(config.context_length, trim=config.trim, lower=config.lower)
        self.tokenizer = AutoTokenizer.from_pretrained(hub_or_folder(config.model))
        self.vocab_size = len(self.tokenizer)
        self.bos_id = _first(self.tokenizer.bos_token_id, self.tokenizer.cls_token_id)
        self.eot_id = _first(self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
        self.pad_id = _first(self.tokenizer.pad_token_id, self.eot_id, 0) or 0

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, truncation=True, max_length=self.context_length)
        rows: list[list[int]] = encoded["input_ids"]
        return rows

    def _decode(self, rows: list[list[int]]) -> list[str]:
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return [text.strip() for text in texts]


@dataclass(frozen=True, kw_only=True)
class WordTokenizerConfig:
    """A word-level tokenizer written by `train_word_tokenizer`.

    Attributes:
        path: the tokenizer.json, or the folder that holds it.
        context_length: ids per caption, special tokens included.
        trim: see `Tokenizer`.
    """

    path: str
    context_length: int = 32
    trim: bool = True

    def build(self) -> "WordTokenizer":
        return WordTokenizer(self)


class WordTokenizer(Tokenizer):
    """[BOS], lower-cased words and punctuation marks, [EOT]; unknown words are [UNK]."""

    def __init__(self, config: WordTokenizerConfig) -> None:
        super().__init__(config.context_length, trim=config.trim)
        path = Path(config.path).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"path={config.path!r} holds no tokenizer.json; "
                "train the run it is of first (latentmodal fit clip/emoji leaves one), or write "
                "one with train_word_tokenizer."
            )
        if config.context_length < 3:
            raise ValueError(f"context_length={config.context_length} leaves no room for a word.")
        self.tokenizer = RustTokenizer.from_file(str(path))
        self.tokenizer.enable_truncation(config.context_length)
        self.tokenizer.encode_special_tokens = True  # "[EOT]" inside a caption is just text
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.pad_id = self._special(PAD)
        self.bos_id = self._special(BOS)
        self.eot_id = self._special(EOT)
        self.unk_id = self._special(UNK)

    def _special(self, token: str) -> int:
        index: int | None = self.tokenizer.token_to_id(token)
        if index is None:
            raise ValueError(f"the tokenizer has no {token}; write it with train_word_tokenizer.")
        return index

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # One by one: encode_batch starts threads, which a forked loader worker must not inherit.
        return [self.tokenizer.encode(text).ids for text in texts]

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return [_close_up(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def train_word_tokenizer(
    captions: Iterable[str], path: str | Path, max_vocab: int = 10_000
) -> Path:
    """Write a word-level tokenizer.json (loadable by `PreTrainedTokenizerFast` too).

    Ids: [PAD]=0, [BOS]=1, [EOT]=2, [UNK]=3, then words by falling frequency, ties by spelling, so
    the same captions in any order give the same file.

    Args:
        captions: the training captions.
        path: the file to write; its folder is made if needed.
        max_vocab: special tokens included; rarer words become [UNK].

    Returns:
        The path written.
    """
    tokenizer = RustTokenizer(models.WordLevel(unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(
        vocab_size=max_vocab, special_tokens=[PAD, BOS, EOT, UNK], show_progress=False
    )
    tokenizer.train_from_iterator((_replace_lone_surrogates(text) for text in captions), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOT}", special_tokens=[(BOS, 1), (EOT, 2)]
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path


def _close_up(text: str) -> str:
    """Take back the spaces that splitting at punctuation leaves: "a man ' s t - shirt ." """
    text = re.sub(r" ?(['’-]) ?", r"\1", text)
    text = re.sub(r" ([.,:;!?)])", r"\1", text)
    return text.replace("( ", "(")


def _replace_lone_surrogates(text: str) -> str:
    """Halves of UTF-16 pairs, as broken JSON leaves them, become U+FFFD; whole pairs are joined."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _first(*candidates: int | None) -> int | None:
    return next((candidate for candidate in candidates if candidate is not None), None)
