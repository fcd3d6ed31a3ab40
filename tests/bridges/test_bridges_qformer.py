"""The Q-Former: its passes against one pass with a written-out mask, its masks, sizes, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentmodal.bridges import (
    AlignmentHeadConfig,
    ImageKeys,
    QFormer,
    QFormerConfig,
    build_bridge,
    load,
)
from latentmodal.bridges.qformer_layers import Rows

BATCH, QUERIES, FEATURES, LENGTH, VOCAB = 3, 4, 5, 7, 30

SMALL: dict[str, Any] = {
    "in_dim": 6,
    "num_queries": QUERIES,
    "width": 8,
    "layers": 4,
    "heads": 2,
    "mlp_dim": 12,
    "dropout": 0.0,
}


def make(**fields: Any) -> QFormer:
    """In float64, every weight away from 0 and 1, so that none can be forgotten unnoticed."""
    torch.manual_seed(0)
    bridge = QFormerConfig(**{**SMALL, "vocab_size": VOCAB, "max_positions": 10, **fields}).build()
    bridge.double()
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return bridge


def draw(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def texts() -> tuple[Tensor, Tensor]:
    """Ids (B, T) and mask of texts of 7, 4 and 2 tokens."""
    ids_BT = torch.randint(
        1, VOCAB - 1, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2)
    )
    mask_BT = torch.arange(LENGTH) < torch.tensor([[7], [4], [2]])
    return ids_BT * mask_BT, mask_BT


def feature_mask() -> Tensor:
    return torch.arange(FEATURES) < torch.tensor([[5], [3], [1]])


def one_pass(bridge: QFormer, features: Tensor, ids: Tensor, mask: Tensor) -> Rows:
    """Queries and caption at once: queries see queries, text sees queries and earlier text."""
    sees_BSS = torch.zeros(BATCH, 1, QUERIES + LENGTH, QUERIES + LENGTH, dtype=torch.bool)
    for row in range(QUERIES + LENGTH):
        for key in range(QUERIES + LENGTH):
            text_row, text_key = row - QUERIES, key - QUERIES
            if text_key < 0:
                sees_BSS[:, 0, row, key] = True
            elif 0 <= text_key <= text_row:
                # A padded row may see itself, as a row that sees nothing has no softmax.
                sees_BSS[:, 0, row, key] = mask[:, text_key] | (text_key == text_row)
    started = ids.clone()
    started[:, 0] = VOCAB - 1
    image = bridge.image_keys(features, feature_mask())
    rows = Rows(bridge._query_rows(image), bridge._text_rows(started))
    return bridge._run(rows, sees_BSS, image=image)[0]


def grads_of(loss: Tensor, bridge: QFormer, features: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in bridge.named_parameters()]
    found = torch.autograd.grad(loss, [features, *bridge.parameters()], allow_unused=True)
    return {
        name: grad
        for name, grad in zip(["features", *names], found, strict=True)
        if grad is not None
    }


@pytest.mark.parametrize("every", [1, 2, 3])
def test_captioning_with_cache_equals_one_pass(every: int) -> None:
    bridge = make(cross_attention_every=every)
    ids_BT, mask_BT = texts()
    features = draw(BATCH, FEATURES, 6).requires_grad_()
    weight_BTD, weight_BMD = draw(BATCH, LENGTH, 8, seed=3), draw(BATCH, QUERIES, 8, seed=4)
    weight_BTD = weight_BTD * mask_BT[..., None]

    image = bridge.image_keys(features, feature_mask())
    states = bridge.encode_queries(image)
    text_BTD = bridge.caption_hidden(ids_BT, states.cache)
    expected = one_pass(bridge, features, ids_BT, mask_BT)
    assert expected.query_BMD is not None and expected.text_BTD is not None
    torch.testing.assert_close(states.hidden_BMD, expected.query_BMD, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(text_BTD[mask_BT], expected.text_BTD[mask_BT], rtol=1e-10, atol=0)

    losses = [
        (query * weight_BMD).sum()
        + (text * weight_BTD).sum()
        + bridge.caption_logits(text[mask_BT]).logsumexp(dim=-1).sum()
        for query, text in ((states.hidden_BMD, text_BTD), (expected.query_BMD, expected.text_BTD))
    ]
    ours, theirs = (grads_of(loss, bridge, features) for loss in losses)
    assert ours.keys() == theirs.keys() == {"features", *dict(bridge.named_parameters())}
    for name, grad in theirs.items():
        assert grad.abs().max() > 0 or name.endswith("key.bias"), name
        # A bias of keys shifts all logits of a row alike: its gradient is rounding and no more.
        torch.testing.assert_close(ours[name], grad, rtol=1e-8, atol=1e-12, msg=name)


def test_caption_alone_moves_queries_and_features() -> None:
    bridge, (ids_BT, mask_BT) = make(), texts()
    features = draw(BATCH, FEATURES, 6).requires_grad_()
    states = bridge.encode_queries(bridge.image_keys(features))
    loss = (bridge.caption_hidden(ids_BT, states.cache) * draw(BATCH, LENGTH, 8))[mask_BT].sum()
    grads = grads_of(loss, bridge, features)
    for name in ("features", "queries", "feature_kv.1.value.weight", "layers.0.query_mlp.up.bias"):
        assert grads[name].abs().max() > 1e-6, name
    # What queries do after their last keys and values does not reach the text.
    assert "layers.3.query_mlp.up.weight" not in grads


def test_caption_looks_back_only_and_starts_from_decode_id() -> None:
    bridge, (ids_BT, _) = make(), texts()
    cache = bridge.encode_queries(bridge.image_keys(draw(BATCH, FEATURES, 6))).cache
    before = bridge.caption_hidden(ids_BT, cache)
    for place in range(LENGTH):
        changed = ids_BT.clone()
        changed[:, place] = (changed[:, place] + 1) % (VOCAB - 1)
        moved = (bridge.caption_hidden(changed, cache) - before).abs().amax(dim=(0, 2)) > 1e-9
        # The first id is not looked at: it is replaced.
        assert moved.tolist() == [place > 0 and later >= place for later in range(LENGTH)]
    assert bridge.decode_id == VOCAB - 1


def padded_differently(ids: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Other ids under the padding; two columns of padding more."""
    longer = (nn.functional.pad(ids, (0, 2), value=5), nn.functional.pad(mask, (0, 2)))
    return [(torch.where(mask, ids, 9), mask), longer]


def test_padding_of_text_changes_nothing() -> None:
    bridge, (ids_BT, mask_BT) = make(), texts()
    image = bridge.image_keys(draw(BATCH, FEATURES, 6))
    cache = bridge.encode_queries(image).cache
    text, matched = bridge.encode_text(ids_BT, mask_BT), bridge.match(image, ids_BT, mask_BT)
    caption = bridge.caption_hidden(ids_BT, cache)
    assert matched.text_BTD is not None
    for ids, mask in padded_differently(ids_BT, mask_BT):
        again = bridge.match(image, ids, mask)
        assert again.text_BTD is not None
        pairs = [
            (again.query_BMD, matched.query_BMD),
            (again.text_BTD[mask], matched.text_BTD[mask_BT]),
            (bridge.encode_text(ids, mask)[mask], text[mask_BT]),
            (bridge.caption_hidden(ids, cache)[mask], caption[mask_BT]),
        ]
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    # What is compared does depend on the text that is not padding.
    ids_BT[2, 1] = (ids_BT[2, 1] + 1) % VOCAB
    moved = bridge.match(image, ids_BT, mask_BT).query_BMD
    assert moved is not None and matched.query_BMD is not None
    assert ((moved - matched.query_BMD).abs().amax(dim=(1, 2)) > 1e-9).tolist() == [False] * 2 + [
        True
    ]


def test_masked_features_change_nothing() -> None:
    bridge, (ids_BT, mask_BT) = make(), texts()
    features, mask_BN = draw(BATCH, FEATURES, 6), feature_mask()
    other = torch.where(mask_BN[..., None], features, 100.0)
    results = []
    for x in (features, other):
        image = bridge.image_keys(x, mask_BN)
        query_BMD = bridge.match(image, ids_BT, mask_BT).query_BMD
        assert query_BMD is not None
        results.append(torch.cat([bridge(x, mask_BN), query_BMD]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)
    for row, count in enumerate((5, 3, 1)):  # as if the masked ones had not been there
        alone = bridge(features[row : row + 1, :count])
        torch.testing.assert_close(results[0][row : row + 1], alone, rtol=1e-10, atol=1e-12)
    assert (bridge(features) - bridge(other)).abs().max() > 1e-3


def test_match_is_bidirectional() -> None:
    bridge, (ids_BT, mask_BT) = make(), texts()
    image = bridge.image_keys(draw(BATCH, FEATURES, 6))
    before = bridge.match(image, ids_BT, mask_BT)
    ids_BT[:, 1] = (ids_BT[:, 1] + 1) % (VOCAB - 1)
    after = bridge.match(image, ids_BT, mask_BT)
    for rows, changed in zip(before, after, strict=True):
        assert rows is not None and changed is not None
        moved_BS = (rows - changed).abs().amax(dim=2) > 1e-9
        assert moved_BS[:, 0].all()  # the first row of either looks at a later token


def test_without_text_branch_there_are_no_text_parameters() -> None:
    bridge, whole = make(vocab_size=None), make()
    names = set(whole.state_dict()) - set(bridge.state_dict())
    assert bridge.state_dict().keys() < whole.state_dict().keys()
    text_parts = ("word_embed.", "position_embed.", "caption_head.")
    assert names == {
        name for name in whole.state_dict() if name.startswith(text_parts) or ".text_mlp." in name
    }
    assert len(names) == 1 + 1 + 5 + 4 * 6
    features = draw(2, FEATURES, 6)
    whole.load_state_dict(bridge.state_dict(), strict=False)
    torch.testing.assert_close(bridge(features), whole(features), rtol=0, atol=0)
    ids_BT, mask_BT = texts()
    with pytest.raises(ValueError, match="no text branch; build it with vocab_size"):
        bridge.encode_text(ids_BT, mask_BT)
    without_captions = make(captioning=False)
    assert without_captions.caption_head is None and without_captions.word_embed is not None


@pytest.mark.parametrize("out_dim", [None, 11])
@pytest.mark.parametrize("text", [False, True])
def test_is_a_bridge(out_dim: int | None, text: bool, tmp_path: Path) -> None:
    fields = SMALL | {"out_dim": out_dim, "vocab_size": VOCAB if text else None}
    bridge = build_bridge("qformer", **fields)
    assert (bridge.in_dim, bridge.out_dim, bridge.num_output_tokens) == (6, out_dim or 8, QUERIES)
    features = draw(2, FEATURES, 6).float()
    tokens = bridge(features)
    assert tokens.shape == (2, QUERIES, out_dim or 8)
    bridge.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert isinstance(again, QFormer) and again.config == bridge.config
    assert torch.equal(again(features), tokens)


def test_materialises_after_meta() -> None:
    with torch.device("meta"):
        bridge = QFormerConfig(**SMALL, vocab_size=VOCAB, num_input_positions=3, out_dim=5).build()
    bridge.to_empty(device="cpu")
    for parameter in bridge.parameters():
        parameter.data.fill_(torch.nan)
    bridge.reset_parameters()
    for name, parameter in bridge.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert 0.01 < parameter.std() < 0.03, name


def test_dropout_is_for_training_only() -> None:
    bridge, (ids_BT, mask_BT) = make(dropout=0.5), texts()
    features = draw(BATCH, FEATURES, 6)
    assert not torch.equal(bridge(features), bridge(features))
    assert not torch.equal(bridge.encode_text(ids_BT, mask_BT), bridge.encode_text(ids_BT, mask_BT))
    bridge.eval()
    assert torch.equal(bridge(features), bridge(features))
    assert torch.equal(bridge(features), make().eval()(features))


def test_image_keys_select_and_cat_equal_recomputation() -> None:
    bridge, (ids_BT, mask_BT) = make(), texts()
    features, mask_BN = draw(BATCH, FEATURES, 6), feature_mask()
    image = bridge.image_keys(features, mask_BN)
    index_R = torch.tensor([2, 0, 0, 1])
    chosen = image.select(index_R)
    parts = ImageKeys.cat(image.select(index_R[:1]), image.select(index_R[1:]))
    anew = bridge.image_keys(features[index_R], mask_BN[index_R])
    ids, mask = ids_BT[index_R.flip(0)], mask_BT[index_R.flip(0)]
    expected = bridge.match(anew, ids, mask).query_BMD
    for keys in (chosen, parts):
        assert keys.mask_B11N is not None and torch.equal(keys.mask_B11N, anew.mask_B11N)
        torch.testing.assert_close(bridge.match(keys, ids, mask).query_BMD, expected)
    assert bridge.image_keys(features).select(index_R).mask_B11N is None
    assert ImageKeys.cat(*2 * [bridge.image_keys(features)]).pairs[0].key.shape[0] == 2 * BATCH


def test_input_positions_tell_features_apart() -> None:
    features, order = draw(2, FEATURES, 6), torch.tensor([3, 0, 4, 1, 2])
    plain, placed = make(), make(num_input_positions=FEATURES)
    torch.testing.assert_close(plain(features), plain(features[:, order]))
    assert (placed(features) - placed(features[:, order])).abs().max() > 1e-4
    assert plain.input_norm is not None and placed.input_positions is not None
    assert "input_positions" not in plain.state_dict()
    # Added to the normalised features: without a norm, they may as well be added outside.
    bare = make(num_input_positions=FEATURES, input_norm=False)
    assert bare.input_positions is not None
    outside = features + bare.input_positions
    inside = bare(features)
    bare.input_positions.data.zero_()
    torch.testing.assert_close(bare(outside), inside)


def test_positions_that_start_as_waves_say_how_near_tokens_are() -> None:
    waves = SMALL | {"in_dim": 32, "num_input_positions": 36, "input_position_init": "sincos"}
    bridge = QFormerConfig(**waves).build()
    assert bridge.input_positions is not None and bridge.input_positions.requires_grad
    places_ND = bridge.input_positions.detach()[0]
    # As strong as a normed feature: sine and cosine of an angle have squares that sum to one.
    torch.testing.assert_close(places_ND.pow(2).mean(1), torch.full((36,), 0.5))
    alike = (places_ND @ places_ND.T / places_ND.pow(2).sum(1)).view(6, 6, 6, 6)
    assert alike.flatten(2).flatten(0, 1).fill_diagonal_(0).max() < 0.95
    assert alike[2, 2, 2, 3] == pytest.approx(alike[2, 2, 3, 2])
    assert alike[2, 2, 2, 3] > alike[2, 2, 2, 4] > alike[2, 2, 4, 4]
    start = places_ND.clone()
    bridge.reset_parameters()
    assert torch.equal(start, bridge.input_positions[0])
    for shape in ({"num_input_positions": 35}, {"in_dim": 6}):
        with pytest.raises(ValueError, match=r"a square of tokens \(num_input_positions\)"):
            QFormerConfig(**waves | shape).build()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_position_init": "cosine"}, "'cosine' is unknown; choose normal or sincos"),
        ({"heads": 3}, "width=8 does not divide into heads=3"),
        ({"num_queries": 0}, "num_queries is 0; it must be a whole number of at least 1"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"num_input_positions": 1.5}, "num_input_positions is 1.5"),
        ({"out_dim": 0}, "out_dim is 0"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_bridge("qformer", **SMALL | fields)


def test_inputs_that_do_not_fit_are_named() -> None:
    bridge = make(num_input_positions=3)
    with pytest.raises(ValueError, match="features have width 7, this Q-Former reads in_dim=6"):
        bridge(draw(2, 3, 7))
    with pytest.raises(ValueError, match="5 feature tokens but num_input_positions is 3"):
        bridge(draw(2, 5, 6))
    with pytest.raises(ValueError, match="the text has 11 tokens, max_positions is 10"):
        bridge.encode_text(
            torch.ones(1, 11, dtype=torch.int64), torch.ones(1, 11, dtype=torch.bool)
        )


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("in_dim", "parameters"), [(1408, 186_705_470), (1024, 183_165_758)])
def test_first_stage_is_as_large_as_blip2s(in_dim: int, parameters: int) -> None:
    """What trains on ViT-g and ViT-L: 186.7 M and 183.2 M."""
    with torch.device("meta"):
        bridge = QFormerConfig(in_dim=in_dim, vocab_size=30523).build()
        head = AlignmentHeadConfig(width=768).build()
    assert count(bridge) + count(head) == parameters


@pytest.mark.parametrize(
    ("in_dim", "out_dim", "parameters"),
    [
        (1408, 2560, 107_133_696),  # OPT-2.7B
        (1408, 4096, 108_314_880),  # OPT-6.7B, FlanT5-XXL
        (1408, 2048, 106_739_968),  # FlanT5-XL
        (1024, 2560, 103_593_984),  # ViT-L, OPT-2.7B
    ],
)
def test_second_stage_is_as_large_as_blip2s(in_dim: int, out_dim: int, parameters: int) -> None:
    with torch.device("meta"):
        bridge = QFormerConfig(in_dim=in_dim, out_dim=out_dim).build()
    assert count(bridge) == parameters
