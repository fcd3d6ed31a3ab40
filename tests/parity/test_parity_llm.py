"""Loss, gradients and answers equal transformers' own on the same embeddings, model by model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from latentmodal.llm import (
    CausalConfig,
    CausalLM,
    GenerationSettings,
    PromptTemplate,
    PromptWriter,
    Seq2SeqConfig,
    Seq2SeqLM,
)

VOCAB, M = 40, 3
SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
ATTENTION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
T5 |= {"dropout_rate": 0.0, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}

CONFIGS: dict[str, dict[str, Any]] = {
    "opt": {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0},
    "opt-350m": {
        "model_type": "opt",
        "ffn_dim": 32,
        "word_embed_proj_dim": 12,
        "do_layer_norm_before": False,
        "dropout": 0.0,
    },
    "llama": {"model_type": "llama", "intermediate_size": 32, "num_key_value_heads": 1},
    "llama-eager": {
        "model_type": "llama",
        "intermediate_size": 32,
        "attn_implementation": "eager",
    },
    "gpt2": {"model_type": "gpt2"},  # learned positions that ignore the mask
    "t5-tied": T5 | {"tie_word_embeddings": True},
    "flan-t5": T5 | {"tie_word_embeddings": False},
    "flan-t5-eager": T5 | {"tie_word_embeddings": False, "attn_implementation": "eager"},
}

FIELDS = [
    {"question": "w4 w5 w6", "answer": "w7 w8"},
    {"question": "w9", "answer": "w10"},
    {"question": "w11 w12 w13 w14 w15", "answer": "w16 w17 w18 w19"},
]

LM = CausalLM | Seq2SeqLM


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = SPECIAL | {f"w{index}": index for index in range(len(SPECIAL), VOCAB)}
    rust = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rust.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=rust, **names)


@pytest.fixture
def make_lm(tokenizer: PreTrainedTokenizerFast, tmp_path: Any) -> Callable[[str], LM]:
    tokenizer.save_pretrained(tmp_path)

    def make(name: str) -> LM:
        torch.manual_seed(0)
        ids = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        sizes = {} if "t5" in name else ATTENTION
        cls = Seq2SeqConfig if "t5" in name else CausalConfig
        lm = cls(config=CONFIGS[name] | sizes | ids, tokenizer=str(tmp_path)).build()
        for parameter in lm.double().parameters():  # zeros and ones would hide a missing part
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        return lm.eval()

    return make


def make_writer(lm: LM, tokenizer: PreTrainedTokenizerFast) -> PromptWriter:
    template = PromptTemplate(text="{image}{bos}{question}{answer}{eos}", label_bos=True)
    return PromptWriter(template, tokenizer, lm.kind, M)


def soft_tokens(lm: LM) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    soft_BME = torch.randn(len(FIELDS), M, lm.width, generator=generator, dtype=torch.float64)
    return soft_BME.requires_grad_()


def by_concatenation(lm: LM, ids_BT: Tensor, soft_BME: Tensor) -> Tensor:
    """The pictures come first in this template: embeddings put together in the plainest way."""
    return torch.cat([soft_BME, lm.model.get_input_embeddings()(ids_BT[:, M:])], dim=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients(make_lm, tokenizer, name):
    lm = make_lm(name)
    batch = make_writer(lm, tokenizer).train(FIELDS, [0] * len(FIELDS))
    ours, theirs = soft_tokens(lm), soft_tokens(lm)
    our_loss = lm(batch, ours)
    our_loss.backward()
    our_weights = {n: p.grad for n, p in lm.model.named_parameters()}
    lm.zero_grad()
    labels = batch.labels_BS if isinstance(lm, Seq2SeqLM) else batch.labels_BT
    their_loss = lm.model(
        inputs_embeds=by_concatenation(lm, batch.ids_BT, theirs),
        attention_mask=batch.mask_BT.long(),
        labels=labels,
    ).loss
    their_loss.backward()
    assert their_loss.item() > 1
    # transformers takes the loss of a causal model in float32.
    torch.testing.assert_close(our_loss, their_loss.double(), rtol=2e-6, atol=0)
    assert theirs.grad is not None and theirs.grad.abs().max() > 1e-3
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    for weight, parameter in lm.model.named_parameters():
        assert (parameter.grad is None) == (our_weights[weight] is None), weight
        torch.testing.assert_close(our_weights[weight], parameter.grad, rtol=1e-5, atol=1e-7)


# Eager attention of a padded float64 batch is NaN in transformers itself: softmax is in float32.
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"llama-eager"}))
def test_answers(make_lm, tokenizer, name, beams):
    lm = make_lm(name)
    settings = GenerationSettings(
        num_beams=beams,
        max_new_tokens=9,
        min_new_tokens=2,
        length_penalty=-1.0,
        repetition_penalty=1.2,
    )
    asked = make_writer(lm, tokenizer).ask(FIELDS)
    soft = soft_tokens(lm).detach()
    ours = lm.generate(asked, soft, settings)
    for i in range(len(FIELDS)):  # theirs without any padding
        ids_1T = asked.ids_BT[i][asked.mask_BT[i]][None]
        said = lm.model.generate(
            inputs_embeds=by_concatenation(lm, ids_1T, soft[i : i + 1]),
            attention_mask=torch.ones_like(ids_1T),
            generation_config=GenerationConfig(
                num_beams=beams,
                max_new_tokens=9,
                min_new_tokens=2,
                length_penalty=-1.0 if beams > 1 else None,
                repetition_penalty=1.2,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=0,
            ),
        )
        assert ours[i] == tokenizer.decode(said[0], skip_special_tokens=True).strip()
    assert len(set(ours)) > 1 and all(ours)


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2"])
def test_left_padded_logits(make_lm, tokenizer, name):
    """A padded sample's last logits are those of transformers without padding."""
    lm = make_lm(name)
    asked = make_writer(lm, tokenizer).ask(FIELDS)
    soft = soft_tokens(lm).detach()
    hidden_BTD = lm.hidden_states(asked, lm.embed(asked, soft))
    logits_BV = lm.model.get_output_embeddings()(hidden_BTD[:, -1])
    for i in range(len(FIELDS)):
        ids_1T = asked.ids_BT[i][asked.mask_BT[i]][None]
        alone = lm.model(inputs_embeds=by_concatenation(lm, ids_1T, soft[i : i + 1])).logits
        torch.testing.assert_close(logits_BV[i], alone[0, -1], rtol=1e-6, atol=1e-8)
