"""Prompts as a recipe writes them, and the writer that fills them in the data loader.

Shapes: B samples, T positions of the prompt, S positions of the decoder.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from latentmodal.llm.answers import IGNORE_INDEX
from latentmodal.llm.batch import PromptBatch, Seq2SeqBatch
from latentmodal.llm.prompt import IMAGE, Answer, Prompt, PromptIds, collate_prompts

_RESERVED = ("image", "bos", "eos", "answer")

Part = Any  # of `Prompt.parts`


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """The text a language model sees around its pictures, and what of it it is to say.

    `text` is taken literally but for fields in braces: `{image}`, `{bos}`, `{eos}`, `{answer}`,
    and any other name, such as `{question}`, which each sample fills. Twice a brace is a brace.
    Special tokens may be written out (`<|im_start|>user`). The answer and what ends it are the
    targets. What stands before `{answer}` is what the model is asked; an encoder-decoder reads it
    in the encoder, with EOS behind it. A tokenizer without BOS leaves `{bos}` away.

    Attributes:
        text: the prompt; `{answer}` once, with nothing but `{eos}` after it.
        label_bos: BOS is a target too, as in BLIP-2's loss with OPT.
        end: text that takes the place of `{eos}`; BLIP-2 ends OPT's captions by a line break.
        prefix_split: encoder-decoders only: the first words of the answer, at least one and at
            most half of them, go to the encoder, and the rest is the target.
        max_text_tokens: longer answers are cut; never the prompt, a picture or the end.
    """

    text: str = "{image}{bos}{answer}{eos}"
    label_bos: bool = False
    end: str | None = None
    prefix_split: bool = False
    max_text_tokens: int = 32

    def __post_init__(self) -> None:
        names = [name for _, name in self.pieces() if name is not None]
        if names.count("answer") != 1:
            raise ValueError(
                f"text={self.text!r} has {names.count('answer')} {{answer}} fields; write one"
            )
        _, after = self.split()
        if any(literal or name not in (None, "eos") for literal, name in after):
            raise ValueError(f"text={self.text!r}: only {{eos}} may stand after {{answer}}")
        if self.end == "":
            raise ValueError("end is empty; give the text that ends an answer, or None for EOS")
        if self.max_text_tokens < 1:
            raise ValueError(f"max_text_tokens is {self.max_text_tokens}; it must be at least 1")

    @property
    def fields(self) -> tuple[str, ...]:
        """Names that samples must fill, `answer` aside."""
        names = dict.fromkeys(name for _, name in self.pieces() if name is not None)
        return tuple(name for name in names if name not in _RESERVED)

    def pieces(self) -> list[tuple[str, str | None]]:
        """Literal text, and the name of the field after it if there is one, in reading order.

        Raises:
            ValueError: braces that do not pair, or hold something else than a name.
        """
        try:
            parsed = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise ValueError(f"text={self.text!r}: {error}; write {{{{ for a brace") from error
        for _, name, spec, conversion in parsed:
            if name is not None and (not name.isidentifier() or spec or conversion):
                raise ValueError(
                    f"text={self.text!r}: fields are plain names, such as {{question}}"
                )
        return [(literal, name) for literal, name, _, _ in parsed]

    def split(self) -> tuple[list[tuple[str, str | None]], list[tuple[str, str | None]]]:
        """Pieces up to the answer, whose own name is dropped, and those after it."""
        pieces = self.pieces()
        at = next(i for i, (_, name) in enumerate(pieces) if name == "answer")
        return [*pieces[:at], (pieces[at][0], None)], pieces[at + 1 :]


class PromptWriter:
    """Fills a template and makes padded batches, in loader workers; can be pickled.

    Text between pictures, BOS and the answer is tokenised in one piece, the answer apart. A
    byte-level tokenizer puts a space into the word that follows it, so a space before `{answer}`
    goes with the answer; other tokenizers get it as it is written.
    """

    def __init__(
        self,
        template: PromptTemplate,
        tokenizer: Any,
        kind: Literal["causal", "seq2seq"],
        num_image_tokens: int,
    ) -> None:
        """
        Args:
            template: the prompt.
            tokenizer: of transformers (`LanguageModel.tokenizer`).
            kind: of the model (`LanguageModel.kind`).
            num_image_tokens: soft tokens of one picture (`Bridge.num_output_tokens`).

        Raises:
            ValueError: the template needs what the tokenizer or this kind of model lacks.
        """
        if kind not in ("causal", "seq2seq"):
            raise ValueError(f"kind={kind!r} is unknown; choose causal or seq2seq")
        if template.prefix_split and kind == "causal":
            raise ValueError(
                "prefix_split needs a seq2seq model: a causal one reads and says alike"
            )
        ends = kind == "seq2seq" or ("{eos}" in template.text and template.end is None)
        if ends and tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token: set end to a text that ends answers")
        self.template = template
        self.tokenizer = tokenizer
        self.kind = kind
        self.num_image_tokens = num_image_tokens
        self.before, self.after = template.split()
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id = next(int(token) for token in pads if token is not None)
        self.lead = self._take_space_before_answer()

    def train(
        self, fields: Sequence[Mapping[str, str]], draws: Sequence[int]
    ) -> PromptBatch | Seq2SeqBatch:
        """Prompts with their answers, padded on the right.

        Args:
            fields: of each sample, `answer` and whatever else the template names.
            draws: of each sample, a random number of at least 0, which decides where
                `prefix_split` splits.

        Raises:
            ValueError: a sample lacks a field.
        """
        if self.kind == "causal":
            return collate_prompts([self._causal(f) for f in fields], self.pad_id)
        pairs = [self._seq2seq(f, draw) for f, draw in zip(fields, draws, strict=True)]
        return self._pad_pairs(pairs)

    def ask(self, fields: Sequence[Mapping[str, str]]) -> PromptBatch | Seq2SeqBatch:
        """Everything before the answer, for `LanguageModel.generate`.

        Raises:
            ValueError: a sample lacks a field.
        """
        end = self.template.end
        if self.kind == "causal":
            asked = [self._lay_out(self._parts(f)) for f in fields]
            return collate_prompts(asked, self.pad_id, side="left", end=end)
        return self._pad_pairs([(self._encoder(self._parts(f)), []) for f in fields])

    def _causal(self, fields: Mapping[str, str]) -> PromptIds:
        answer = self._answer_ids(self.lead + self._field(fields, "answer"))
        return self._lay_out((*self._parts(fields), Answer(answer), Answer(self._end_ids())))

    def _seq2seq(self, fields: Mapping[str, str], draw: int) -> tuple[PromptIds, list[int]]:
        words = self._field(fields, "answer").split()
        at = 1 + draw % (len(words) // 2) if self.template.prefix_split and len(words) > 1 else 0
        prefix, target = " ".join(words[:at]), " ".join(words[at:])
        if not self.template.prefix_split:
            target = self._field(fields, "answer")
        prompt = self._encoder(self._parts(fields, prefix))
        return prompt, [*self._answer_ids(self.lead + target), *self._end_ids()]

    def _parts(self, fields: Mapping[str, str], prefix: str = "") -> tuple[Part, ...]:
        """What stands before the answer, and `prefix`, the part of it that is given away."""
        parts: list[Part] = []
        text = ""
        for literal, name in self.before:
            text += literal
            if name is None:
                continue
            if name not in _RESERVED:
                text += self._field(fields, name)
                continue
            parts.append(text)
            text = ""
            parts.append(IMAGE if name == "image" else self._special(name))
        parts.append(text + self.lead + prefix if prefix else text)
        return tuple(part for part in parts if part != "" and part != ())

    def _special(self, name: str) -> Part:
        token = self.tokenizer.bos_token_id if name == "bos" else self.tokenizer.eos_token_id
        ids = () if token is None else (int(token),)
        labelled = name == "bos" and self.template.label_bos and self.kind == "causal" and ids
        return Answer(ids) if labelled else ids

    def _encoder(self, parts: tuple[Part, ...]) -> PromptIds:
        return self._lay_out((*parts, (int(self.tokenizer.eos_token_id),)))

    def _lay_out(self, parts: tuple[Part, ...]) -> PromptIds:
        return Prompt(parts).lay_out(self._encode, self.num_image_tokens, self.pad_id)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _answer_ids(self, text: str) -> tuple[int, ...]:
        """Ids of an answer, cut; a special token's name in it is text like any other."""
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return tuple(encoded["input_ids"][: self.template.max_text_tokens])

    def _end_ids(self) -> tuple[int, ...]:
        if all(name != "eos" for _, name in self.after):
            return ()
        if self.template.end is not None:
            return tuple(self._encode(self.template.end))
        return (int(self.tokenizer.eos_token_id),)

    def _field(self, fields: Mapping[str, str], name: str) -> str:
        if name not in fields:
            raise ValueError(
                f"the prompt {self.template.text!r} needs the field {name!r}, the sample has "
                f"{', '.join(fields) or 'none'}: correct the prompt or the data"
            )
        return fields[name]

    def _take_space_before_answer(self) -> str:
        """Cut the spaces off the text before the answer, and return them, where that is right."""
        literal, name = self.before[-1]
        assert name is None
        spaces = literal[len(literal.rstrip(" ")) :]
        token = self.tokenizer.convert_ids_to_tokens(self._encode(" x"))[0]
        if not spaces or not token.startswith("Ġ"):
            return ""
        self.before[-1] = (literal.rstrip(" "), None)
        return spaces

    def _pad_pairs(self, pairs: Sequence[tuple[PromptIds, list[int]]]) -> Seq2SeqBatch:
        read = collate_prompts([prompt for prompt, _ in pairs], self.pad_id)
        length = max(len(target) for _, target in pairs)
        labels = [[*target, *[IGNORE_INDEX] * (length - len(target))] for _, target in pairs]
        return Seq2SeqBatch(
            ids_BT=read.ids_BT,
            mask_BT=read.mask_BT,
            slot_mask_BT=read.slot_mask_BT,
            labels_BS=torch.tensor(labels, dtype=torch.int64).view(len(pairs), length),
            slot_counts=read.slot_counts,
            image_counts=read.image_counts,
            num_targets=sum(len(target) for _, target in pairs),
            is_padded=len({len(prompt.ids) for prompt, _ in pairs}) > 1,
            end=self.template.end,
        )
