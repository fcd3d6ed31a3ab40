import math
from typing import Any

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel

from latentmodal.encoders import (
    HfTextConfig,
    TextEncoder,
    TextTransformerConfig,
)
from latentmodal.encoders.text_transformer import TextBlock

EOT, LENGTH = 39, 16


def config(**fields: Any) -> TextTransformerConfig:
    fields = {
        "vocab_size": 40,
        "context_length": LENGTH,
        "width": 32,
        "depth": 2,
        "heads": 2,
        "eot_id": EOT,
        **fields,
    }
    return TextTransformerConfig(**fields)


BERT = {
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def captions(lengths: tuple[int, ...], padded: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(len(lengths), padded, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        ids[row, : length - 1] = torch.randint(1, EOT, (length - 1,), generator=generator)
        ids[row, length - 1] = EOT
        mask[row, :length] = True
    return ids, mask


def outputs(encoder: TextEncoder, ids: torch.Tensor, mask: torch.Tensor | None) -> Any:
    return encoder.double().eval()(ids, mask)


@pytest.mark.parametrize(
    "fields",
    [
        {"causal": True, "pooling": "eot"},
        {"causal": False, "pooling": "eot", "mask_padding": True},
        {"causal": False, "pooling": "mean", "mask_padding": True},
        {"causal": False, "pooling": "first", "mask_padding": True},
    ],
)
@pytest.mark.parametrize("pass_mask", [True, False])
def test_trimmed_batch_equals_padded_batch(fields: dict[str, Any], pass_mask: bool) -> None:
    torch.manual_seed(0)
    encoder = config(**fields).build()
    ids, mask = captions((3, 8, 5), LENGTH)
    full = outputs(encoder, ids, mask if pass_mask else None)
    trimmed = outputs(encoder, ids[:, :8], mask[:, :8] if pass_mask else None)
    torch.testing.assert_close(trimmed.pooled_BD, full.pooled_BD, rtol=1e-12, atol=1e-12)
    valid = mask[:, :8]
    torch.testing.assert_close(
        trimmed.tokens_BND[valid], full.tokens_BND[:, :8][valid], rtol=1e-12, atol=1e-12
    )
    assert torch.equal(full.mask_BN, mask)
    assert torch.equal(trimmed.mask_BN, valid)


def test_last_pooling_reads_padding_so_trimming_would_change_it() -> None:
    torch.manual_seed(0)
    encoder = config(causal=False, pooling="last").build()
    ids, _ = captions((3, 8), LENGTH)
    full, trimmed = outputs(encoder, ids, None), outputs(encoder, ids[:, :8], None)
    assert torch.equal(full.pooled_BD, full.tokens_BND[:, -1])
    assert not torch.allclose(full.pooled_BD, trimmed.pooled_BD)


def test_the_first_end_of_text_counts() -> None:
    """CLIP in transformers pads with the end-of-text id itself; open_clip pads with 0."""
    encoder = config().build()
    zeros, _ = captions((4, 9), LENGTH)
    repeated = torch.where(zeros == 0, EOT, zeros)
    assert torch.equal(
        outputs(encoder, zeros, None).pooled_BD, outputs(encoder, repeated, None).pooled_BD
    )


def test_causal_tokens_do_not_see_the_future() -> None:
    ids, _ = captions((LENGTH,), LENGTH)
    changed = ids.clone()
    changed[0, 10] = 1 + changed[0, 10] % 30
    for causal in (True, False):
        encoder = config(causal=causal).build()
        before, after = (outputs(encoder, x, None).tokens_BND for x in (ids, changed))
        assert torch.equal(before[:, :10], after[:, :10]) == causal
        assert not torch.equal(before[:, 10:], after[:, 10:])


def test_initialisation_is_clips() -> None:
    torch.manual_seed(0)
    width, depth = 128, 3
    encoder = config(width=width, depth=depth, vocab_size=2000, context_length=64).build()
    residual = width**-0.5 * (2 * depth) ** -0.5
    expected = {
        "token_embed.weight": 0.02,
        "pos_embed": 0.01,
        "blocks.1.attn.qkv.weight": width**-0.5,
        "blocks.1.attn.proj.weight": residual,
        "blocks.1.mlp.fc1.weight": (2 * width) ** -0.5,
        "blocks.1.mlp.fc2.weight": residual,
    }
    parameters = dict(encoder.named_parameters())
    for name, std in expected.items():
        tolerance = 4 * std / math.sqrt(2 * parameters[name].numel())
        assert parameters[name].std().item() == pytest.approx(std, abs=tolerance), name
        assert abs(parameters[name].mean().item()) < 4 * std / math.sqrt(parameters[name].numel())
    assert parameters["blocks.1.attn.qkv.bias"].abs().max() == 0


@pytest.mark.parametrize(
    "build",
    [config, lambda: HfTextConfig(config=BERT), lambda: HfTextConfig(config=BERT, pooling="mean")],
)
def test_checkpointing_and_gradients(build: Any) -> None:
    torch.manual_seed(0)
    encoder = build().build()
    assert encoder.training
    ids, mask = captions((3, 8), LENGTH)

    def gradients() -> dict[str, torch.Tensor]:
        encoder.zero_grad()
        features = encoder(ids, mask)
        (features.pooled_BD.square().sum() + features.tokens_BND.sum()).backward()
        return {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}

    plain = gradients()
    assert set(plain) == {name for name, _ in encoder.named_parameters()}
    encoder.set_grad_checkpointing(True)
    torch.testing.assert_close(gradients(), plain)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_bert_equals_transformers(pooling: str) -> None:
    torch.manual_seed(0)
    encoder = HfTextConfig(config=BERT, pooling=pooling).build()
    fields = {name: value for name, value in BERT.items() if name != "model_type"}
    reference = BertModel(BertConfig(**fields), add_pooling_layer=False)
    reference.load_state_dict(encoder.model.state_dict())
    reference.double().eval()
    ids, mask = captions((3, 8, 5), 8)
    features = outputs(encoder, ids, mask)
    tokens = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(features.tokens_BND, tokens)
    expected = tokens[:, 0]
    if pooling == "mean":
        expected = torch.stack([t[m].mean(0) for t, m in zip(tokens, mask, strict=True)])
    torch.testing.assert_close(features.pooled_BD, expected)
    alone = torch.stack(
        [outputs(encoder, ids[i : i + 1, : mask[i].sum()], None).pooled_BD[0] for i in range(3)]
    )
    torch.testing.assert_close(features.pooled_BD, alone)


def test_bert_from_a_local_folder(tmp_path: Any) -> None:
    torch.manual_seed(0)
    source = AutoModel.from_config(
        BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"})
    )
    source.save_pretrained(tmp_path)
    encoder = HfTextConfig(model=str(tmp_path)).build()
    assert (encoder.width, encoder.num_tokens, encoder.vocab_size) == (32, LENGTH, 40)
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_roberta_counts_positions_after_padding() -> None:
    roberta = {**BERT, "model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 18}
    encoder = HfTextConfig(config=roberta).build()
    assert encoder.num_tokens == 16
    encoder(torch.full((1, 16), 5))


def test_descriptions_and_meta() -> None:
    with torch.device("meta"):
        ours, bert = config().build(), HfTextConfig(config=BERT).build()
    assert all(t.is_meta for m in (ours, bert) for t in [*m.parameters(), *m.buffers()])
    assert ours.fsdp_units == (TextBlock,)
    assert [c.__name__ for c in bert.fsdp_units] == ["BertLayer"]
    assert (ours.width, ours.pooled_width, ours.num_tokens, ours.vocab_size) == (32, 32, LENGTH, 40)
    assert (ours.activation, bert.activation) == ("quick_gelu", "gelu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 5}, "multiple of heads=5"),
        ({"pooling": "max"}, "pooling='max'"),
        ({"eot_id": 40}, "eot_id=40"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"mask_padding": True}, "mask_padding"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_too_long_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="context_length=16"):
        config().build()(torch.ones(1, 17, dtype=torch.int64))


@pytest.mark.parametrize("fields", [{}, {"causal": False, "mask_padding": True, "pooling": "mean"}])
def test_one_graph_without_host_syncs(fields: dict[str, Any]) -> None:
    """A graph break here means a Python branch on tensor values, which stalls the device."""
    encoder = config(**fields).build().eval()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    ids, mask = captions((3, 8), 8)
    torch.testing.assert_close(compiled(ids, mask).pooled_BD, encoder(ids, mask).pooled_BD)
