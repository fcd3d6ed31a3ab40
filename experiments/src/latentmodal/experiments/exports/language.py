"""Language models beside BLIP-2: their configuration, weights, and a token for the picture."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from latentmodal.experiments.exports.blip2 import LanguagePart, State

IMAGE_TOKEN = "<image>"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "spiece.model", "tokenizer.model",
)  # fmt: skip

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def language_part(name: str) -> LanguagePart:
    """The configuration of a hub name; of a folder the weights and the tokenizer, too.

    Raises:
        ValueError: there is no such model, or its weights cannot be read.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return LanguagePart(_read(AutoConfig, name, "configuration"), {})
    config = _read(AutoConfig, folder, "configuration")
    state: State = {}
    if any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        state = _read(auto_class(config), folder, "weights", dtype="auto").state_dict()
    return LanguagePart(config, state, local_tokenizer(folder))


def auto_class(config: Any) -> Any:
    """What builds a language model of this configuration."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def local_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; None where it has none."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return _read(AutoTokenizer, folder, "tokenizer")


class ImageToken(NamedTuple):
    """Where transformers is to put the soft tokens, and what had to be made for it."""

    number: int | None
    tokenizer: Any
    state: dict[str, Tensor]
    vocab_size: int


def with_image_token(llm: LanguagePart, model: Any) -> ImageToken:
    """Give the vocabulary a token that no text has, as BLIP-2's checkpoints on the hub do.

    It is the tokenizer's own, or takes a row of the embeddings that no token has, or else a row
    more: the mean of the others, which the model hardly ever says.

    Args:
        model: the language model of `llm.config`, without data.
    """
    state = dict(llm.state)
    vocab_size = int(model.get_input_embeddings().num_embeddings)
    if llm.tokenizer is None:
        return ImageToken(None, None, state, vocab_size)
    tokenizer = copy.deepcopy(llm.tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    index = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    if index >= vocab_size and state:
        for name in _vocabulary(model):
            if name in state:
                rows = state[name]
                mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
                state[name] = torch.cat(
                    [rows, mean.expand(index + 1 - vocab_size, *mean.shape[1:])]
                )
        vocab_size = index + 1
    return ImageToken(index if index < vocab_size else None, tokenizer, state, vocab_size)


def single_token(text: str | None, tokenizer: Any) -> int | None:
    """The id of text that is one token; None where it is several, or nothing is known."""
    if text is None or tokenizer is None:
        return None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(ids[0]) if len(ids) == 1 else None


def without_ties(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Without the names that `model` makes of others by itself."""
    tied = model.all_tied_weights_keys
    return {
        name: tensor
        for name, tensor in state.items()
        if not (name in tied and tied[name] in state and torch.equal(tensor, state[tied[name]]))
    }


def _vocabulary(model: Any) -> list[str]:
    """Names of all weights with a row for each token."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    rows = {id(p) for table in tables if table is not None for p in table.parameters()}
    return [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in rows]


def _read(kind: Any, source: str | Path, what: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{source}: its {what} cannot be read ({line})") from error
