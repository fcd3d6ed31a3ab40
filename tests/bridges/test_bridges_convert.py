"""LAVIS' and BERT's names to ours and back, what is left over, and what is refused."""

from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from latentmodal.bridges import AlignmentHeadConfig, QFormer, QFormerConfig
from latentmodal.bridges.convert import (
    Converted,
    qformer_config_of,
    qformer_from_bert,
    qformer_from_hf,
    qformer_from_lavis,
    qformer_to_hf,
    qformer_to_lavis,
)

IN_DIM, WIDTH, MLP, VOCAB, POSITIONS, QUERIES, EMBED, LLM = 6, 8, 12, 20, 10, 3, 5, 7
TOKENS = VOCAB - 1  # BERT does not know [DEC]

State = dict[str, Tensor]


def bert_names(layers: int, cross: tuple[int, ...] = (), query: bool = False) -> dict[str, Any]:
    """Shapes of BERT's modules under BERT's names, for LAVIS with its additions."""
    shapes: dict[str, Any] = {}

    def linear(name: str, out: int, inside: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, inside), (out,)

    def norm(name: str, width: int = WIDTH) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    norm("bert.embeddings.LayerNorm")
    for number in range(layers):
        layer = f"bert.encoder.layer.{number}"
        for attention, keys in (("attention", WIDTH), ("crossattention", IN_DIM)):
            if attention == "attention" or number in cross:
                linear(f"{layer}.{attention}.self.query", WIDTH, WIDTH)
                linear(f"{layer}.{attention}.self.key", WIDTH, keys)
                linear(f"{layer}.{attention}.self.value", WIDTH, keys)
                linear(f"{layer}.{attention}.output.dense", WIDTH, WIDTH)
                norm(f"{layer}.{attention}.output.LayerNorm")
        for suffix in ("", "_query") if query else ("",):
            linear(f"{layer}.intermediate{suffix}.dense", MLP, WIDTH)
            linear(f"{layer}.output{suffix}.dense", WIDTH, MLP)
            norm(f"{layer}.output{suffix}.LayerNorm")
    return shapes


def text_names(vocab: int) -> dict[str, Any]:
    return {
        "bert.embeddings.word_embeddings.weight": (vocab, WIDTH),
        "bert.embeddings.position_embeddings.weight": (POSITIONS, WIDTH),
        "cls.predictions.bias": (vocab,),
        "cls.predictions.transform.dense.weight": (WIDTH, WIDTH),
        "cls.predictions.transform.dense.bias": (WIDTH,),
        "cls.predictions.transform.LayerNorm.weight": (WIDTH,),
        "cls.predictions.transform.LayerNorm.bias": (WIDTH,),
    }


def filled(shapes: dict[str, Any], prefix: str = "", seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {f"{prefix}{k}": torch.randn(shape, generator=generator) for k, shape in shapes.items()}


def lavis(stage: int, cross: tuple[int, ...] = (0, 2), layers: int = 4) -> State:
    shapes = bert_names(layers, cross, query=True)
    if stage == 1:
        shapes |= text_names(VOCAB)
    else:
        shapes = {
            name: shape
            for name, shape in shapes.items()
            if ".intermediate.dense" not in name
            and ("attention." in name or ".output." not in name)
        }
    state = filled(shapes, "Qformer.")
    whole = {
        "query_tokens": (1, QUERIES, WIDTH),
        "ln_vision.weight": (IN_DIM,),
        "ln_vision.bias": (IN_DIM,),
    }
    if stage == 1:
        for head, size in (("vision_proj", EMBED), ("text_proj", EMBED), ("itm_head", 2)):
            whole |= {f"{head}.weight": (size, WIDTH), f"{head}.bias": (size,)}
        words = "Qformer.bert.embeddings.word_embeddings.weight"
        state["Qformer.cls.predictions.decoder.weight"] = state[words].clone()
        state["Qformer.cls.predictions.decoder.bias"] = state[
            "Qformer.cls.predictions.bias"
        ].clone()
        state["temp"] = torch.tensor(0.05)
    else:
        whole |= {"opt_proj.weight": (LLM, WIDTH), "opt_proj.bias": (LLM,)}
    return state | filled(whole, seed=1)


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(
        found[key].shape == value.shape and torch.equal(found[key], value)
        for key, value in expected.items()
    )


def part(converted: Converted, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in converted.state.items() if k.startswith(prefix)}


@pytest.mark.parametrize("cross", [(0, 2), (0, 1, 2, 3), (0, 3), (0,)])
def test_first_stage_of_lavis_round_trip(cross: tuple[int, ...]) -> None:
    theirs = lavis(1, cross)
    rest = {"visual_encoder.cls_token": torch.ones(1, 1, IN_DIM)}
    ids = {"Qformer.bert.embeddings.position_ids": torch.arange(POSITIONS)[None]}
    converted = qformer_from_lavis(theirs | rest | ids)
    assert same(converted.rest, rest)
    assert converted.unused == [*ids] and not converted.absent

    configs = qformer_config_of(converted.state, heads=2)
    assert configs.head == AlignmentHeadConfig(width=WIDTH, embed_dim=EMBED)
    assert configs.bridge == QFormerConfig(
        in_dim=IN_DIM, num_queries=QUERIES, width=WIDTH, layers=4, heads=2, mlp_dim=MLP,
        cross_attention_every=cross[1] if len(cross) > 1 else 4, vocab_size=VOCAB,
        max_positions=POSITIONS,
    )  # fmt: skip
    configs.bridge.build().load_state_dict(part(converted, "bridge."))
    configs.head.build().load_state_dict(part(converted, "head."))
    assert converted.state["head.temperature"].shape == (1,)

    back = qformer_to_lavis(converted.state | converted.rest)
    assert same(back.state, theirs) and same(back.rest, rest)
    assert not back.unused and not back.absent
    save(back.state)  # no two names share memory
    assert same(qformer_from_lavis(back.state).state, converted.state)


def test_keys_and_values_follow_their_layer() -> None:
    theirs = lavis(1, (0, 3))
    converted = qformer_from_lavis(theirs).state
    for number, layer in enumerate((0, 3)):
        for name in ("key.weight", "value.bias"):
            key = f"Qformer.bert.encoder.layer.{layer}.crossattention.self.{name}"
            assert converted[f"bridge.feature_kv.{number}.{name}"] is theirs[key]


@pytest.mark.parametrize("projection", ["opt_proj", "t5_proj", "llm_proj"])
def test_second_stage_of_lavis_round_trip(projection: Any) -> None:
    theirs = {key.replace("opt_proj", projection): value for key, value in lavis(2).items()}
    rest = {f"{projection[:-5]}_model.lm_head.weight": torch.ones(2)}
    converted = qformer_from_lavis(theirs | rest)
    configs = qformer_config_of(converted.state, heads=2)
    assert configs.head is None and configs.bridge.vocab_size is None
    assert (configs.bridge.out_dim, configs.bridge.max_positions) == (LLM, 512)
    configs.bridge.build().load_state_dict(part(converted, "bridge."))
    back = qformer_to_lavis(converted.state, projection)
    assert same(back.state | converted.rest, theirs | rest)


def test_projection_needs_its_name_in_lavis() -> None:
    converted = qformer_from_lavis(lavis(2)).state
    with pytest.raises(ValueError, match="projection='opt_proj' or 't5_proj' or 'llm_proj'"):
        qformer_to_lavis(converted)
    with pytest.raises(ValueError, match="projection is 'other'; choose from opt_proj"):
        qformer_to_lavis(converted, "other")  # type: ignore[arg-type]


def test_first_stage_begins_a_second() -> None:
    """Without text branch and heads in the config, theirs are left out and listed."""
    theirs = lavis(1)
    config = QFormerConfig(
        in_dim=IN_DIM, num_queries=QUERIES, width=WIDTH, layers=4, heads=2, mlp_dim=MLP
    )
    converted = qformer_from_lavis(theirs, config)
    config.build().load_state_dict(part(converted, "bridge."))
    taken = {id(value) for value in converted.state.values()}
    decoder = "Qformer.cls.predictions.decoder."
    left = {k for k, v in theirs.items() if id(v) not in taken and not k.startswith(decoder)}
    assert set(converted.unused) == left
    assert {"temp", "itm_head.bias", "Qformer.cls.predictions.bias"} < left
    assert "Qformer.bert.encoder.layer.3.output.LayerNorm.bias" in left
    onto_llm = QFormerConfig(**{**vars(config), "out_dim": LLM})
    onwards = qformer_from_lavis(theirs, onto_llm)
    assert same(onwards.state, converted.state)
    assert onwards.absent == ["bridge.proj.weight", "bridge.proj.bias"]
    with pytest.raises(ValueError, match=r"opt_proj\.bias is missing"):
        qformer_from_lavis(theirs | {"opt_proj.weight": torch.ones(LLM, WIDTH)}, onto_llm)


def test_transformers_and_lavis_meet_in_ours() -> None:
    """To transformers and back, only caption head and temperature are lost, and said to be."""
    ours = qformer_from_lavis(lavis(1)).state
    there = qformer_to_hf(ours)
    lost = {k for k in ours if "caption_head" in k or "temperature" in k}
    assert set(there.unused) == lost and len(lost) == 6
    back = qformer_from_hf(there.state)
    assert back.absent == ["head.temperature"]
    with pytest.raises(ValueError, match=r"caption_head.bias is missing.*temperature is missing"):
        qformer_to_lavis(back.state)
    completed = back.state | {key: ours[key] for key in lost}
    assert same(qformer_to_lavis(completed).state, lavis(1))

    configs = qformer_config_of(ours, heads=2)
    wanted = qformer_from_hf(there.state, *configs)
    assert set(wanted.absent) == lost and same(wanted.state, back.state)
    assert "qformer.encoder.layer.2.crossattention.attention.key.weight" in there.state


def without(*keys: str) -> Any:
    return lambda state: {k: v for k, v in state.items() if k not in keys}


def plus(**tensors: Tensor) -> Any:
    return lambda state: state | {k.replace("__", "."): v for k, v in tensors.items()}


LAYER = "Qformer.bert.encoder.layer"


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (plus(other=torch.ones(1)), ["other is unknown"]),
        (plus(Qformer__bert__pooler__weight=torch.ones(1)), ["Qformer.bert.pooler.weight is unk"]),
        (without("ln_vision.bias", "temp"), ["ln_vision.bias is missing", "temp is missing"]),
        (
            without(f"{LAYER}.2.crossattention.self.key.bias"),
            [f"{LAYER}.2.crossattention.self.key.bias is missing"],
        ),
        (
            plus(temp=torch.ones(2), vision_proj__bias=torch.ones(1)),
            [r"temp has shape \(2,\), expected \(1,\)", r"vision_proj.bias has shape \(1,\), exp"],
        ),
        (plus(Qformer__cls__predictions__decoder__weight=torch.ones(VOCAB, WIDTH)), ["be tied"]),
        (plus(opt_proj__weight=torch.ones(2, 8), t5_proj__weight=torch.ones(2, 8)), ["same thing"]),
        (without("query_tokens"), ["no weights of a Q-Former: bridge.queries missing"]),
        (lambda state: lavis(1, (0, 1, 3)), ["layers 0, 1, 3 of 4 have cross-attention"]),
        (lambda state: lavis(1, (1, 3)), ["layers 1, 3 of 4 have"]),
    ],
)
def test_lavis_that_does_not_fit(damage: Any, messages: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        qformer_from_lavis(damage(lavis(1)))
    for message in messages:
        assert caught.match(message)
    assert "\n" not in str(caught.value)


def test_fewer_layers_than_the_file_has_are_refused() -> None:
    config = qformer_config_of(qformer_from_lavis(lavis(2, layers=3)).state, heads=2).bridge
    with pytest.raises(ValueError, match=f"{LAYER}.3.attention.output.LayerNorm.bias is unknown"):
        qformer_from_lavis(lavis(2), config)


def test_one_bias_of_the_caption_head_is_enough() -> None:
    theirs = lavis(1)
    expected = qformer_from_lavis(theirs).state
    for keys in (  # safetensors keeps one of two names that share memory
        ("Qformer.cls.predictions.bias",),
        ("Qformer.cls.predictions.decoder.bias", "Qformer.cls.predictions.decoder.weight"),
    ):
        assert same(qformer_from_lavis(without(*keys)(theirs)).state, expected)


@pytest.mark.parametrize("convert", [qformer_to_hf, qformer_to_lavis])
def test_ours_that_has_no_place_there(convert: Any) -> None:
    ours = qformer_from_lavis(lavis(1)).state
    for damage, message in (
        (plus(bridge__input_positions=torch.ones(1, 4, IN_DIM)), "input_positions has no place th"),
        (
            plus(bridge__feature_kv__7__key__bias=torch.ones(8)),
            "feature_kv.7.key.bias has no place",
        ),
        (plus(bridge__other=torch.ones(1)), "bridge.other has no place there"),
        (
            without("bridge.norm.bias", "head.itm_head.weight"),
            "norm.bias is missing; head.itm",
        ),
        (
            plus(head__itm_head__bias=torch.ones(3)),
            r"itm_head.bias has shape \(3,\), exp",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            convert(damage(ours))


def test_heads_are_given_or_64_wide() -> None:
    ours = qformer_from_lavis(lavis(2)).state
    with pytest.raises(ValueError, match="width 8 does not divide into heads of 64; give heads"):
        qformer_config_of(ours)
    with torch.device("meta"):
        state = QFormerConfig(in_dim=1408, vocab_size=30523).build().state_dict()
    configs = qformer_config_of({f"bridge.{key}": value for key, value in state.items()})
    assert configs == (QFormerConfig(in_dim=1408, vocab_size=30523), None)


def test_input_positions_show_in_the_config() -> None:
    config = QFormerConfig(
        in_dim=6, width=8, heads=2, layers=2, mlp_dim=4, num_input_positions=5, input_norm=False
    )
    state = {f"bridge.{key}": value for key, value in config.build().state_dict().items()}
    assert qformer_config_of(state, heads=2).bridge == config


def bert(*, head: bool = True, layers: int = 4) -> State:
    text = text_names(TOKENS)
    if not head:
        text = {key: shape for key, shape in text.items() if not key.startswith("cls.")}
    return filled(bert_names(layers) | text, seed=2)


def fresh(**fields: Any) -> QFormer:
    torch.manual_seed(3)
    return QFormerConfig(
        in_dim=IN_DIM, num_queries=QUERIES, width=WIDTH, layers=4, heads=2, mlp_dim=MLP,
        **{"vocab_size": VOCAB, "max_positions": POSITIONS} | fields,
    ).build()  # fmt: skip


EXTRA = {
    "bert.embeddings.token_type_embeddings.weight": torch.ones(2, WIDTH),
    "bert.embeddings.position_ids": torch.arange(POSITIONS)[None],
    "bert.pooler.dense.weight": torch.ones(WIDTH, WIDTH),
    "cls.seq_relationship.bias": torch.ones(2),
}


def test_bert_begins_a_first_stage() -> None:
    bridge, theirs = fresh(), bert()
    before = {key: value.clone() for key, value in bridge.state_dict().items()}
    converted = qformer_from_bert(theirs | EXTRA, bridge.state_dict())
    assert same(bridge.state_dict(), before)
    assert converted.unused == sorted(EXTRA)
    state = part(converted, "bridge.")
    bridge.load_state_dict(state)
    save(state)  # no two names share memory: the two feed-forwards go apart from here
    own = ("queries", "input_norm.", "feature_kv.", "cross_attention.")
    assert {key.removeprefix("bridge.") for key in converted.absent} == {
        key for key in before if any(name in key for name in own)
    }
    for key in converted.absent:
        assert torch.equal(converted.state[key], before[key.removeprefix("bridge.")])
    words = theirs["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(state["word_embed.weight"][:TOKENS], words)
    assert torch.equal(state["word_embed.weight"][TOKENS], before["word_embed.weight"][TOKENS])
    assert torch.equal(state["caption_head.bias"][:TOKENS], theirs["cls.predictions.bias"])
    for mlp in ("text_mlp", "query_mlp"):
        up = theirs["bert.encoder.layer.3.intermediate.dense.weight"]
        assert torch.equal(state[f"layers.3.{mlp}.up.weight"], up)
        norm = theirs["bert.encoder.layer.1.output.LayerNorm.bias"]
        assert torch.equal(state[f"layers.1.{mlp}.norm.bias"], norm)


def test_bert_under_other_names_is_the_same() -> None:
    expected = qformer_from_bert(bert(head=False), fresh().state_dict())
    assert {"bridge.caption_head.bias", "bridge.queries"} < set(expected.absent)
    for change in (
        lambda key: key.removeprefix("bert."),
        lambda key: key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"),
    ):
        renamed = {change(key): value for key, value in bert(head=False).items()}
        assert same(qformer_from_bert(renamed, fresh().state_dict()).state, expected.state)


def test_bert_begins_a_q_former_without_text() -> None:
    converted = qformer_from_bert(bert(), fresh(vocab_size=None).state_dict())
    fresh(vocab_size=None).load_state_dict(part(converted, "bridge."))
    assert set(converted.unused) == set(text_names(TOKENS))
    up = bert()["bert.encoder.layer.2.intermediate.dense.weight"]
    assert torch.equal(converted.state["bridge.layers.2.query_mlp.up.weight"], up)


@pytest.mark.parametrize(
    ("theirs", "fields", "message"),
    [
        (bert(layers=5), {}, "bert.encoder.layer.4.attention.output.LayerNorm.bias is unknown"),
        (bert(layers=3), {}, "nothing becomes layers.3.attention.key.bias"),
        (bert() | {"bert.other": torch.ones(1)}, {}, "bert.other is unknown"),
        (
            bert(),
            {"vocab_size": TOKENS},
            r"word_embed.weight takes \(18, 8\), all but the last",
        ),
        (bert(), {"max_positions": 4}, r"position_embed.weight takes \(4, 8\), BERT has \(10, 8\)"),
        (
            without("cls.predictions.transform.dense.bias")(bert()),
            {},
            "nothing becomes caption_head.dense.bias",
        ),
        (bert() | {"cls.predictions.decoder.weight": torch.ones(TOKENS, WIDTH)}, {}, "be tied"),
    ],
)
def test_bert_that_does_not_fit(theirs: State, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        qformer_from_bert(theirs, fresh(**fields).state_dict())
    assert "\n" not in str(caught.value)
