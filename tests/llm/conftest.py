"""A tiny tokenizer and tiny random language models over its vocabulary."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from latentmodal.llm import CausalConfig, CausalLM, LanguageModel, Seq2SeqConfig, Seq2SeqLM

WORDS = ["a", "photo", "of", "the", "cat", "sits", "on", "mat", "what", "is", "it", "red", "blue"]
WORDS += ["?", ":", "Question", "Answer", "big", "small", "dog", "runs"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "\n", "#"]

# Of the merges of the two subword tokenizers.
CORPUS = ["Human: Assistant: USER: ASSISTANT: system user assistant", "[INST] [/INST] <<SYS>>"]
CORPUS += ["what is the cat on the mat ?", "a cat sits on a red mat", "### Human: ### Assistant:"]
CONTROL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]

CONFIGS: dict[str, dict[str, Any]] = {
    "opt": {
        "model_type": "opt",
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 12,  # OPT-350m's kind: narrower embeddings than layers
        "max_position_embeddings": 64,
        "dropout": 0.0,
    },
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "t5": {
        "model_type": "t5",
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    },
}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words as single tokens: ids are positions in SPECIAL + WORDS; line breaks are tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    rust = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[\n#]"), "isolated"),
            pre_tokenizers.Split(Regex(" +"), "removed"),
        ]
    )
    rust.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    PreTrainedTokenizerFast(
        tokenizer_object=rust,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def bpe_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Subwords as GPT-2 and SmolLM2 make them ("byte"), and as Llama does ("metaspace")."""
    made = {}
    for name in ("byte", "metaspace"):
        rust = Tokenizer(models.BPE())
        if name == "byte":
            rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            rust.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
        else:
            rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
            rust.decoder = decoders.Metaspace()
            alphabet = ["\n", *map(chr, range(32, 127))]
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
        )
        rust.train_from_iterator(CORPUS * 20, trainer)
        made[name] = PreTrainedTokenizerFast(
            tokenizer_object=rust, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )
    return made


@pytest.fixture
def make_lm(tokenizer_folder: Path) -> Callable[..., LanguageModel]:
    """A tiny float64 model by name, in eval mode, with weights large enough to have opinions."""

    def make(name: str, seed: int = 0, **fields: Any) -> CausalLM | Seq2SeqLM:
        torch.manual_seed(seed)
        config = {
            **CONFIGS[name],
            "vocab_size": len(SPECIAL + WORDS),
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        config |= fields.pop("config", {})
        cls = Seq2SeqConfig if name == "t5" else CausalConfig
        lm = cls(config=config, tokenizer=str(tokenizer_folder), **fields).build().double()
        for parameter in lm.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        return lm.eval()

    return make
