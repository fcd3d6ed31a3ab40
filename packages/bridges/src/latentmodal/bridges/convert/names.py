"""The names of a Q-Former's weights: ours, LAVIS', and transformers' (its BLIP-2 classes).

One table, read in both directions. An entry is a module, whose `weight` and `bias` keep their
names, or a parameter. `{i}` stands for the number of a layer; `{j}` counts the layers that have
cross-attention: keys and values of the image live inside those layers elsewhere and in a list of
their own here.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Names(NamedTuple):
    """What one thing is called; None where it has no place."""

    ours: str
    lavis: str
    hf: str | None


LAVIS_PROJECTIONS = ("opt_proj", "t5_proj", "llm_proj")
"""One thing under three names, after the language model it leads to."""

LAVIS_WORDS = "Qformer.bert.embeddings.word_embeddings.weight"
LAVIS_DECODER = "Qformer.cls.predictions.decoder.weight"
"""The word embedding once more, as the last map of the caption head."""
LAVIS_CAPTION_BIAS = "Qformer.cls.predictions.bias"
LAVIS_DECODER_BIAS = "Qformer.cls.predictions.decoder.bias"
"""`LAVIS_CAPTION_BIAS` once more."""

_WHOLE = (
    Names("bridge.queries", "query_tokens", "query_tokens"),
    Names("bridge.input_norm", "ln_vision", "vision_model.post_layernorm"),
    Names("bridge.norm", "Qformer.bert.embeddings.LayerNorm", "qformer.layernorm"),
    Names(
        "bridge.word_embed",
        "Qformer.bert.embeddings.word_embeddings",
        "embeddings.word_embeddings",
    ),
    Names(
        "bridge.position_embed",
        "Qformer.bert.embeddings.position_embeddings",
        "embeddings.position_embeddings",
    ),
    Names("bridge.caption_head.dense", "Qformer.cls.predictions.transform.dense", None),
    Names("bridge.caption_head.norm", "Qformer.cls.predictions.transform.LayerNorm", None),
    Names("bridge.caption_head.bias", LAVIS_CAPTION_BIAS, None),
    *(Names("bridge.proj", name, "language_projection") for name in LAVIS_PROJECTIONS),
    Names("head.image_proj", "vision_proj", "vision_projection"),
    Names("head.text_proj", "text_proj", "text_projection"),
    Names("head.itm_head", "itm_head", "itm_head"),
    Names("head.temperature", "temp", None),
)

_IN_LAYER = {
    "layers.{i}.attention.query": "attention.self.query",
    "layers.{i}.attention.key": "attention.self.key",
    "layers.{i}.attention.value": "attention.self.value",
    "layers.{i}.attention.out": "attention.output.dense",
    "layers.{i}.attention.norm": "attention.output.LayerNorm",
    "layers.{i}.cross_attention.query": "crossattention.self.query",
    "feature_kv.{j}.key": "crossattention.self.key",
    "feature_kv.{j}.value": "crossattention.self.value",
    "layers.{i}.cross_attention.out": "crossattention.output.dense",
    "layers.{i}.cross_attention.norm": "crossattention.output.LayerNorm",
    "layers.{i}.text_mlp.up": "intermediate.dense",
    "layers.{i}.text_mlp.down": "output.dense",
    "layers.{i}.text_mlp.norm": "output.LayerNorm",
    "layers.{i}.query_mlp.up": "intermediate_query.dense",
    "layers.{i}.query_mlp.down": "output_query.dense",
    "layers.{i}.query_mlp.norm": "output_query.LayerNorm",
}

TABLE = (
    *_WHOLE,
    *(
        Names(
            f"bridge.{ours}",
            f"Qformer.bert.encoder.layer.{{i}}.{theirs}",
            f"qformer.encoder.layer.{{i}}.{theirs.replace('.self.', '.attention.')}",
        )
        for ours, theirs in _IN_LAYER.items()
    ),
)

LAVIS_TO_OURS = {names.lavis: names.ours for names in TABLE}
HF_TO_OURS = {names.hf: names.ours for names in TABLE if names.hf is not None}
OURS_TO_HF = {ours: hf for hf, ours in HF_TO_OURS.items()}


def ours_to_lavis(projection: str) -> dict[str, str]:
    """The table towards LAVIS, with `projection` as the name of the projection."""
    others = set(LAVIS_PROJECTIONS) - {projection}
    return {names.ours: names.lavis for names in TABLE if names.lavis not in others}


_NUMBER = re.compile(r"\.(layers?|feature_kv)\.(\d+)\.")


def rename(keys: Iterable[str], table: Mapping[str, str]) -> dict[str, str]:
    """{key: its name on the other side}, without the keys that the table does not know."""
    found = [parsed for key in keys if (parsed := _parse(key, table)) is not None]
    crossing = sorted({parsed.number for parsed in found if "{i}.cross" in parsed.source})
    renamed = {}
    for parsed in found:
        number = _renumber(parsed, crossing)
        if number is not None:
            renamed[parsed.key] = parsed.target.format(i=number, j=number) + parsed.leaf
    return renamed


class _Parsed(NamedTuple):
    key: str
    source: str
    target: str
    number: int
    """Of the layer, or place among those with cross-attention; 0 outside layers."""
    leaf: str
    """".weight", ".bias", or nothing where the entry is a parameter."""


def _parse(key: str, table: Mapping[str, str]) -> _Parsed | None:
    match = _NUMBER.search(key)
    template, number = key, 0
    if match is not None:
        place = "{j}" if match[1] == "feature_kv" else "{i}"
        template, number = f"{key[: match.start(2)]}{place}{key[match.end(2) :]}", int(match[2])
    if template in table:
        return _Parsed(key, template, table[template], number, "")
    module, _, leaf = template.rpartition(".")
    if module in table and leaf in ("weight", "bias"):
        return _Parsed(key, module, table[module], number, f".{leaf}")
    return None


def _renumber(parsed: _Parsed, crossing: Sequence[int]) -> int | None:
    """From the place among crossing layers to the layer, or back; None: there is no such layer."""
    if "{j}" in parsed.source:
        return crossing[parsed.number] if parsed.number < len(crossing) else None
    return crossing.index(parsed.number) if "{j}" in parsed.target else parsed.number
