"""BLIP-2 as transformers' `Blip2ForImageTextRetrieval` or `Blip2ForConditionalGeneration`.

Their norm over the features has eps 1e-6 where LAVIS and this project have 1e-5: outputs differ by
about as much.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
)

from latentmodal.bridges import QFormerConfig
from latentmodal.bridges.convert import qformer_config_of, qformer_from_hf, qformer_to_hf
from latentmodal.encoders.convert import eva_from_hf_blip2, eva_to_hf_blip2
from latentmodal.experiments.exports.blip2 import (
    Account,
    Blip2Weights,
    LanguagePart,
    Options,
    Tower,
    meta,
    plain,
    prefixed,
    require_qformer,
    shape_problems,
    shortened,
    without_prefix,
)
from latentmodal.experiments.exports.language import (
    auto_class,
    local_tokenizer,
    single_token,
    with_image_token,
    without_ties,
)
from latentmodal.experiments.files import write_atomically, write_text_atomically
from latentmodal.experiments.tensor_files import read_tensors

_VISION, _LANGUAGE, _NORM = "vision_model.", "language_model.", "vision_model.post_layernorm."


def read_hf(folder: Path, options: Options) -> Blip2Weights:
    """A folder of `Blip2Model`, `Blip2ForImageTextRetrieval` or `Blip2ForConditionalGeneration`.

    Raises:
        ValueError: no such folder, another model's, or weights that do not fit.
    """
    config = _read_config(folder)
    for name in ("heads", "vision", "vision_heads", "llm"):
        if getattr(options, name) is not None:
            flag = name.replace("_", "-")
            raise ValueError(f"{folder} says everything itself; leave --{flag} away")
    converted = qformer_from_hf(read_tensors(folder))
    qformer = config.qformer_config
    configs = qformer_config_of(converted.state, qformer.num_attention_heads)
    bridge = QFormerConfig(
        **{**vars(configs.bridge), "dropout": float(qformer.hidden_dropout_prob)}
    )
    vision_state = {k: v for k, v in converted.rest.items() if k.startswith(_VISION)}
    tower_state, strange = eva_from_hf_blip2(vision_state)
    vision = config.vision_config.to_dict()
    tower = Tower(tower_state, {name: vision[name] for name in _VISION_FIELDS})
    llm_state = without_prefix(converted.rest, _LANGUAGE)
    llm = None
    if llm_state:
        llm = LanguagePart(config.text_config, llm_state, local_tokenizer(folder))
    return Blip2Weights(
        bridge,
        configs.head,
        converted.state,
        tower,
        llm,
        _read_json(folder / "preprocessor_config.json"),
        frozenset({"image_encoder", "llm"} if llm else {"image_encoder"}),
        sorted([*converted.unused, *strange]),
        converted.absent,
    )


def write_hf(weights: Blip2Weights, target: Path, options: Options, remedy: str) -> Account:
    """Write what the class's `from_pretrained` loads; the class follows from the text branch.

    Raises:
        ValueError: transformers has no place for something, or needs something the source lacks.
    """
    bridge = require_qformer(weights, "transformers' BLIP-2")
    tower = _require_tower(weights)
    stage1 = bridge.vocab_size is not None
    kind = Blip2ForImageTextRetrieval if stage1 else Blip2ForConditionalGeneration
    if not stage1 and weights.llm is None:
        raise ValueError(f"{kind.__name__} needs a language model; give --llm, its name or folder")
    converted = _to_hf(weights, kind.__name__)
    parts: dict[str, dict[str, Tensor]] = {
        "bridge": {k: v for k, v in converted.state.items() if not _is_head(k)},
        "head": {k: v for k, v in converted.state.items() if _is_head(k)},
        "image_encoder": eva_to_hf_blip2(tower.state).state,
    }
    fields: dict[str, Any] = {}
    tokenizer = None
    if not stage1:
        assert weights.llm is not None
        model = meta(auto_class(weights.llm.config).from_config, weights.llm.config)
        image_token = with_image_token(weights.llm, model)
        text = {**weights.llm.config.to_dict(), "vocab_size": image_token.vocab_size}
        if (end_id := single_token(weights.llm.end, image_token.tokenizer)) is not None:
            text["eos_token_id"] = end_id
        fields = {"text_config": text, "image_token_index": image_token.number}
        tokenizer = image_token.tokenizer
        parts["llm"] = prefixed(image_token.state, _LANGUAGE)
    elif weights.head is not None:
        fields = {"image_text_hidden_size": weights.head.embed_dim}
    assert tower.vision is not None
    config = Blip2Config(
        vision_config=dict(tower.vision),
        qformer_config=_qformer_fields(bridge),
        num_query_tokens=bridge.num_queries,
        architectures=[kind.__name__],
        **fields,
    )
    state = {name: tensor for part in parts.values() for name, tensor in part.items()}
    absent = [*weights.absent, *_check(state, meta(kind, config), kind.__name__)]
    if not stage1 and config.image_token_index is None:
        absent.append(
            "image_token_index (no free id is known: choose one for the places of soft tokens)"
        )
    written = plain(without_ties(state, meta(kind, config)))
    _write(target, written, _texts(config, weights, tokenizer), remedy)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    taken = {name: len(part.keys() & written.keys()) for name, part in parts.items()}
    return Account(taken, [*weights.unused, *converted.unused], absent)


_VISION_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
    "patch_size", "hidden_act", "layer_norm_eps", "qkv_bias",
)  # fmt: skip


def _read_config(folder: Path) -> Blip2Config:
    content = _read_json(folder / "config.json")
    if content is None:
        raise ValueError(f"{folder} has no config.json; give a folder as transformers saves it")
    if content.get("model_type") != "blip-2":
        raise ValueError(f"{folder} holds a {content.get('model_type')!r} model, not a 'blip-2'")
    try:
        return Blip2Config.from_dict(content)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'}: {str(error).splitlines()[0]}") from error


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, expected an object")
    return content


def _require_tower(weights: Blip2Weights) -> Tower:
    if weights.tower is None:
        raise ValueError(
            "transformers' BLIP-2 needs the image tower, which the source lacks; give --vision, "
            "the file of its EVA weights"
        )
    strange = eva_to_hf_blip2(weights.tower.state).unmatched
    if weights.tower.vision is None or strange:
        reason = weights.tower.refusal or f"it has {shortened(strange)}"
        raise ValueError(f"transformers' BLIP-2 has no place for this image tower: {reason}")
    return weights.tower


def _to_hf(weights: Blip2Weights, kind: str) -> Any:
    try:
        return qformer_to_hf(weights.state)
    except ValueError as error:
        raise ValueError(f"{kind}: {shortened(str(error).split('; '))}") from error


def _is_head(name: str) -> bool:
    return name.startswith(("vision_projection.", "text_projection.", "itm_head."))


def _qformer_fields(bridge: QFormerConfig) -> dict[str, Any]:
    text = bridge.vocab_size is not None
    return {
        "hidden_size": bridge.width,
        "num_hidden_layers": bridge.layers,
        "num_attention_heads": bridge.heads,
        "intermediate_size": bridge.mlp_dim,
        "hidden_dropout_prob": bridge.dropout,
        "attention_probs_dropout_prob": bridge.dropout,
        "max_position_embeddings": bridge.max_positions,
        "cross_attention_frequency": bridge.cross_attention_every,
        "use_qformer_text_input": text,
        **({"vocab_size": bridge.vocab_size} if text else {}),
    }


def _check(state: dict[str, Tensor], model: Any, kind: str) -> list[str]:
    """Refuse what does not fit; the language model alone may be absent, and is named then."""
    tied = model.all_tied_weights_keys
    expected = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name in state or tied.get(name) not in state
    }
    lacking = [name for name in expected if name.startswith(_LANGUAGE) and name not in state]
    alone = not any(name.startswith(_LANGUAGE) for name in state)
    if alone:
        expected = {k: v for k, v in expected.items() if not k.startswith(_LANGUAGE)}
    if problems := shape_problems(state, expected):
        raise ValueError(f"{kind}: {problems}")
    return [f"{_LANGUAGE}* ({len(lacking)} tensors)"] if alone and lacking else []


def _texts(config: Blip2Config, weights: Blip2Weights, tokenizer: Any) -> dict[str, str]:
    texts = {"config.json": config.to_json_string()}
    whole = tokenizer is not None
    if weights.preprocess is not None:
        processor = {
            **weights.preprocess,
            **({"processor_class": "Blip2Processor"} if whole else {}),
        }
        texts["preprocessor_config.json"] = json.dumps(processor, indent=2)
    if whole:
        fields = {"num_query_tokens": config.num_query_tokens, "processor_class": "Blip2Processor"}
        texts["processor_config.json"] = json.dumps(fields, indent=2)
    return texts


def _write(target: Path, state: dict[str, Tensor], texts: dict[str, str], remedy: str) -> None:
    write_safetensors(target / "model.safetensors", state, remedy)
    for name, text in texts.items():
        write_text_atomically(target / name, text, remedy)


def write_safetensors(path: Path, state: dict[str, Tensor], remedy: str) -> None:
    """A file that transformers takes: it insists on the note that PyTorch wrote it."""

    def write(file: Any) -> None:
        try:
            save_file(state, file.name, {"format": "pt"})
        except SafetensorError as error:  # its way of passing on what the disk said
            raise OSError(str(error)) from error

    write_atomically(path, write, remedy)
