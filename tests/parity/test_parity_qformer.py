"""Our Q-Former equals transformers' BLIP-2 classes: outputs, gradients, conversions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    Blip2QFormerConfig,
    Blip2QFormerModel,
)

from latentmodal.bridges import AlignmentHead, QFormer, QFormerConfig
from latentmodal.bridges.convert import (
    qformer_config_of,
    qformer_from_bert,
    qformer_from_hf,
    qformer_to_hf,
)

BATCH, FEATURES, LENGTH, VOCAB, HEADS = 3, 5, 6, 40, 2  # an image of 2 x 2 patches has 5 tokens

QFORMER: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 12,
    "vocab_size": VOCAB,
}
VISION = {
    "hidden_size": 12,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
OPT = {
    "model_type": "opt", "vocab_size": 30, "hidden_size": 20, "num_hidden_layers": 1, "ffn_dim": 8,
    "num_attention_heads": 2, "max_position_embeddings": 32, "word_embed_proj_dim": 20,
    "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": 30, "d_model": 20, "d_kv": 4, "d_ff": 8, "num_layers": 1,
    "num_heads": 2, "decoder_start_token_id": 0,
}  # fmt: skip


def shaken(model: nn.Module) -> nn.Module:
    """In float64, every weight away from 0 and 1, so that none can be forgotten unnoticed."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise)
    return model


def blip2(kind: type[nn.Module], text: dict[str, Any], *, text_branch: bool, every: int = 2) -> Any:
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER
        | {"use_qformer_text_input": text_branch, "cross_attention_frequency": every},
        text_config=text,
        num_query_tokens=4,
        image_text_hidden_size=10,
    )
    model: Any = shaken(kind(config))
    # LAVIS and ours have 1e-5 here, transformers 1e-6.
    model.vision_model.post_layernorm.eps = 1e-5
    return model


def give(model: Any, features: Tensor) -> None:
    """Make `features` the output of the vision tower's blocks."""
    model.vision_model.post_layernorm.register_forward_pre_hook(
        lambda module, args: (features,) if args[0].dim() == 3 else None
    )


def ours_of(model: nn.Module) -> tuple[QFormer, AlignmentHead | None]:
    state = qformer_from_hf(model.state_dict()).state
    configs = qformer_config_of(state, heads=HEADS)
    modules = []
    for prefix, config in (("bridge.", configs.bridge), ("head.", configs.head)):
        if config is None:
            modules.append(None)
            continue
        module = config.build().double().eval()
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        missing, unexpected = module.load_state_dict(own, strict=False)
        assert not unexpected and set(missing) <= {"temperature"}
        modules.append(module)
    bridge, head = modules
    assert isinstance(bridge, QFormer) and (head is None or isinstance(head, AlignmentHead))
    return bridge, head


def draw(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_same_gradients(
    theirs: nn.Module, their_features: Tensor, ours: dict[str, nn.Module], our_features: Tensor
) -> None:
    torch.testing.assert_close(our_features.grad, their_features.grad, rtol=1e-8, atol=1e-11)
    our_grads = {
        f"{prefix}.{name}": parameter.grad
        for prefix, module in ours.items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    converted = qformer_to_hf(our_grads).state
    their_grads = {
        name: parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    assert converted.keys() == their_grads.keys()
    for name, grad in their_grads.items():
        assert grad.abs().max() > 0 or name.endswith("key.bias"), name
        torch.testing.assert_close(converted[name], grad, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_query_transformer(every: int) -> None:
    config = Blip2QFormerConfig(**QFORMER, encoder_hidden_size=12, cross_attention_frequency=every)
    theirs = shaken(Blip2QFormerModel(config))
    queries = nn.Parameter(draw(1, 4, 16, seed=2))
    state = {f"qformer.{key}": value for key, value in theirs.state_dict().items()}
    norm = {"weight": torch.ones(12), "bias": torch.zeros(12)}
    state |= {f"vision_model.post_layernorm.{key}": value.double() for key, value in norm.items()}
    converted = qformer_from_hf(state | {"query_tokens": queries.detach()}).state
    bridge = qformer_config_of(converted, heads=HEADS).bridge.build().double().eval()
    bridge.load_state_dict({k.removeprefix("bridge."): v for k, v in converted.items()})

    features = draw(BATCH, FEATURES, 12)
    mask = torch.arange(FEATURES) < torch.tensor([[5], [3], [1]])
    assert isinstance(bridge, QFormer) and bridge.input_norm is not None
    expected = theirs(
        query_embeds=queries.expand(BATCH, -1, -1),
        encoder_hidden_states=bridge.input_norm(features),
        encoder_attention_mask=mask.long(),
    ).last_hidden_state
    torch.testing.assert_close(bridge(features, mask), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("every", [1, 2])
def test_retrieval(every: int) -> None:
    """Contrastive similarities, verdicts on pairs, and the gradients of both together."""
    theirs = blip2(Blip2ForImageTextRetrieval, OPT, text_branch=True, every=every)
    bridge, head = ours_of(theirs)
    assert head is not None and bridge.caption_head is None
    mask = torch.arange(LENGTH) < torch.tensor([[6], [2], [4]])
    ids = torch.randint(1, VOCAB, mask.shape, generator=torch.Generator().manual_seed(3)) * mask
    pixels = torch.zeros(BATCH, 3, 8, 8, dtype=torch.float64)
    their_features = draw(BATCH, FEATURES, 12).requires_grad_()
    our_features = draw(BATCH, FEATURES, 12).requires_grad_()

    give(theirs, their_features)
    similarity, verdict = (
        theirs(pixels, ids, mask.long(), use_image_text_matching_head=matching).logits_per_image
        for matching in (False, True)
    )
    image = bridge.image_keys(our_features)
    query_BME = head.embed_image(bridge.encode_queries(image).hidden_BMD)
    text_BE = head.embed_text(bridge.encode_text(ids, mask)[:, 0])
    our_similarity = (query_BME @ text_BE.T).amax(dim=1)
    matched = bridge.match(image, ids, mask).query_BMD
    assert matched is not None
    our_verdict = head.match_logits(matched)
    torch.testing.assert_close(our_similarity, similarity, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(our_verdict, verdict, rtol=1e-9, atol=1e-10)

    for found, judged in ((similarity, verdict), (our_similarity, our_verdict)):
        losses = (found * draw(BATCH, BATCH, seed=4)).sum(), (judged * draw(BATCH, 2, seed=5)).sum()
        (losses[0] + losses[1]).backward()
    assert_same_gradients(theirs, their_features, {"bridge": bridge, "head": head}, our_features)


@pytest.mark.parametrize(
    ("kind", "text"),
    [(Blip2Model, OPT), (Blip2ForConditionalGeneration, OPT), (Blip2ForConditionalGeneration, T5)],
)
def test_soft_tokens(kind: type[nn.Module], text: dict[str, Any]) -> None:
    theirs = blip2(kind, text, text_branch=False)
    bridge, head = ours_of(theirs)
    assert head is None and bridge.word_embed is None
    assert (bridge.num_output_tokens, bridge.out_dim) == (4, 20)
    pixels = torch.zeros(BATCH, 3, 8, 8, dtype=torch.float64)
    their_features = draw(BATCH, FEATURES, 12).requires_grad_()
    our_features = draw(BATCH, FEATURES, 12).requires_grad_()

    give(theirs, their_features)
    image = theirs.vision_model(pixels).last_hidden_state
    queries = theirs.qformer(
        query_embeds=theirs.query_tokens.expand(BATCH, -1, -1), encoder_hidden_states=image
    ).last_hidden_state
    expected = theirs.language_projection(queries)
    if kind is Blip2Model:
        torch.testing.assert_close(theirs.get_qformer_features(pixels), queries)
    tokens = bridge(our_features)
    torch.testing.assert_close(tokens, expected, rtol=1e-9, atol=1e-10)

    for found in (expected, tokens):
        (found * draw(BATCH, 4, 20, seed=4)).sum().backward()
    assert_same_gradients(theirs, their_features, {"bridge": bridge}, our_features)


@pytest.mark.parametrize(
    ("kind", "text", "text_branch"),
    [
        (Blip2ForImageTextRetrieval, OPT, True),
        (Blip2Model, OPT, False),
        (Blip2ForConditionalGeneration, OPT, False),
        (Blip2ForConditionalGeneration, T5, False),
    ],
)
def test_round_trip_is_exact(
    kind: type[nn.Module], text: dict[str, Any], text_branch: bool
) -> None:
    theirs = blip2(kind, text, text_branch=text_branch)
    state = theirs.state_dict()
    converted = qformer_from_hf(state)
    assert not converted.unused
    assert converted.absent == (["head.temperature"] if text_branch else [])
    assert all(key.startswith(("vision_model.", "language_model.")) for key in converted.rest)
    assert "vision_model.post_layernorm.weight" not in converted.rest

    back = qformer_to_hf(converted.state)
    again = back.state | converted.rest
    assert again.keys() == state.keys() and not back.rest and not back.unused
    assert all(torch.equal(again[key], value) for key, value in state.items())
    theirs.load_state_dict(again)


def test_text_branch_begins_as_bert() -> None:
    """Texts are read, and words are told, as BERT does, which has token types on top."""
    bert = shaken(BertForMaskedLM(BertConfig(**QFORMER)))
    bert.bert.embeddings.token_type_embeddings.weight.data.zero_()
    bridge = QFormerConfig(
        in_dim=12, width=16, layers=3, heads=HEADS, mlp_dim=24, vocab_size=VOCAB + 1,
        max_positions=12, num_queries=4,
    ).build().double().eval()  # fmt: skip
    converted = qformer_from_bert(bert.state_dict(), bridge.state_dict())
    bridge.load_state_dict({k.removeprefix("bridge."): v for k, v in converted.state.items()})
    assert converted.unused == ["bert.embeddings.token_type_embeddings.weight"]

    mask = torch.arange(LENGTH) < torch.tensor([[6], [2], [4]])
    ids = torch.randint(1, VOCAB, mask.shape, generator=torch.Generator().manual_seed(3)) * mask
    expected = bert(ids, mask.long(), output_hidden_states=True)
    hidden = bridge.encode_text(ids, mask)
    torch.testing.assert_close(hidden, expected.hidden_states[-1], rtol=1e-9, atol=1e-10)
    logits = bridge.caption_logits(hidden)
    torch.testing.assert_close(logits[..., :VOCAB], expected.logits, rtol=1e-9, atol=1e-10)
