"""Attention maps against a manual softmax, with masks, and leaving no trace in the model."""

import pytest
import torch

from latentmodal.bridges import QFormerConfig
from latentmodal.bridges.attention_maps import cross_attention_maps, record_cross_attention
from latentmodal.bridges.qformer_layers import CrossAttention


@pytest.fixture
def qformer():
    torch.manual_seed(0)
    model = QFormerConfig(
        in_dim=10, num_queries=4, width=12, layers=3, heads=3, mlp_dim=24, vocab_size=9
    ).build()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize("masked", [False, True])
def test_equals_a_manual_softmax(qformer, masked):
    features_BND = torch.randn(2, 5, 10)
    mask_BN = torch.tensor([[True] * 5, [True] * 3 + [False] * 2]) if masked else None
    entered = []
    layers = [m for m in qformer.modules() if isinstance(m, CrossAttention)]
    handles = [
        layer.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
        for layer in layers
    ]
    maps_BLMN = cross_attention_maps(qformer, features_BND, mask_BN)
    for handle in handles:
        handle.remove()

    assert maps_BLMN.shape == (2, 2, 4, 5)  # layers 0 and 2 look at the image
    torch.testing.assert_close(maps_BLMN.sum(-1), torch.ones(2, 2, 4))
    normed_BND = qformer.input_norm(features_BND)
    for number, (layer, x_BMD) in enumerate(zip(layers, entered, strict=True)):
        query_BMD, key_BND = layer.query(x_BMD), qformer.feature_kv[number].key(normed_BND)
        heads = []
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            scores_BMN = torch.einsum("bmc,bnc->bmn", query_BMD[..., part], key_BND[..., part]) / 2
            if mask_BN is not None:
                scores_BMN = scores_BMN + torch.where(mask_BN, 0.0, -1e30)[:, None]
            exponents = (scores_BMN - scores_BMN.amax(-1, keepdim=True)).exp()
            heads.append(exponents / exponents.sum(-1, keepdim=True))
        torch.testing.assert_close(maps_BLMN[:, number], torch.stack(heads).mean(0))
    if masked:
        assert (maps_BLMN[1, :, :, 3:] == 0).all()
    assert maps_BLMN.std() > 0.05, "uniform attention would prove nothing"


def test_recording_leaves_the_forward_pass_and_the_module_as_they_were(qformer):
    features_BND = torch.randn(2, 5, 10)
    plain = qformer(features_BND)
    with record_cross_attention(qformer) as maps:
        recorded = qformer(features_BND)
    assert torch.equal(plain, recorded)
    assert len(maps) == 2
    qformer(features_BND)
    assert len(maps) == 2
    recorded.sum().backward()
    assert not any(weights.requires_grad for weights in maps)


def test_passes_without_a_picture_are_not_recorded(qformer):
    ids_BT = torch.ones(2, 3, dtype=torch.int64)
    with record_cross_attention(qformer) as maps:
        qformer.encode_text(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))
    assert maps == []


def test_autocast_does_not_round_the_weights(qformer):
    with torch.autocast("cpu", torch.bfloat16):
        maps_BLMN = cross_attention_maps(qformer, torch.randn(2, 5, 10))
    assert maps_BLMN.dtype == torch.float32
    torch.testing.assert_close(maps_BLMN.sum(-1), torch.ones(2, 2, 4), atol=1e-6, rtol=0)
