"""BLIP-2 in folders of this project, and out of its runs.

config.json, model.safetensors      the bridge, as `save_pretrained` writes it
head/                               the heads of the first stage, likewise
image_encoder/                      the tower under timm's names: `weights` of a recipe's tower
llm/                                the language model: `model` of a recipe's
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.models.eva import Eva
from torch import nn

from latentmodal.bridges import AlignmentHead, Bridge, BridgeConfig, load
from latentmodal.encoders import TimmImageEncoder
from latentmodal.encoders.convert import eva_to_hf_blip2
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.exports.blip2 import (
    Account,
    Blip2Weights,
    LanguagePart,
    Options,
    Tower,
    components,
    eva_vision,
    meta,
    plain,
    prefixed,
)
from latentmodal.experiments.exports.blip2_hf import write_safetensors
from latentmodal.experiments.exports.blip2_lavis import blip_processor, read_tower
from latentmodal.experiments.exports.hf import hf_processor
from latentmodal.experiments.exports.language import auto_class, language_part, without_ties
from latentmodal.experiments.files import write_text_atomically
from latentmodal.experiments.tensor_files import read_tensors
from latentmodal.experiments.training.freeze import is_frozen

HEAD, TOWER, LANGUAGE = "head", "image_encoder", "llm"


def of_model(model: nn.Module, end: str | None = None) -> Blip2Weights:
    """The model of an alignment or a generation run, freeze plan applied.

    Args:
        model: it.
        end: text that its prompts end in, instead of an end token.

    Raises:
        ValueError: it holds adapters, which no other format has a place for.
    """
    bridge, head, llm = model.bridge, getattr(model, "head", None), getattr(model, "llm", None)
    assert isinstance(bridge, Bridge) and isinstance(bridge.config, BridgeConfig)
    state = prefixed(bridge.state_dict(), "bridge.")
    if isinstance(head, AlignmentHead):
        state |= prefixed(head.state_dict(), "head.")
    trained = {
        name
        for name in (TOWER, LANGUAGE)
        if isinstance(part := getattr(model, name, None), nn.Module) and not is_frozen(part)
    }
    encoder: Any = model.image_encoder
    return Blip2Weights(
        bridge.config,
        head.config if isinstance(head, AlignmentHead) else None,
        state,
        _tower_of(encoder),
        None if llm is None else _language_of(llm, end),
        _processor_of(encoder),
        frozenset(trained),
    )


def read_ours(folder: Path, options: Options) -> Blip2Weights:
    """A folder that `write_ours` wrote; only the bridge has to be there.

    Raises:
        ValueError: a part of it is damaged or none at all.
    """
    bridge = load(folder)
    if not isinstance(bridge, Bridge) or not isinstance(bridge.config, BridgeConfig):
        raise ValueError(f"{folder} holds a {bridge.config.name!r}, not a bridge")
    state = prefixed(bridge.state_dict(), "bridge.")
    head = None
    if (folder / HEAD).is_dir():
        head = AlignmentHead.from_pretrained(folder / HEAD)
        state |= prefixed(head.state_dict(), "head.")
    tower, preprocess, unused = _read_tower(folder / TOWER, options)
    inside = folder / LANGUAGE
    source = options.llm or (str(inside) if inside.is_dir() else None)
    llm = None if source is None else language_part(source)
    parts = {TOWER: tower, LANGUAGE: llm if inside.is_dir() else None}
    return Blip2Weights(
        bridge.config,
        None if head is None else head.config,
        state,
        tower,
        llm,
        preprocess,
        frozenset(name for name, part in parts.items() if part is not None),
        unused,
    )


def write_ours(weights: Blip2Weights, target: Path, options: Options, remedy: str) -> Account:
    """Write the folder described above; tower and language model where `travels` names them.

    Raises:
        ValueError: a tower is to be written that is not timm's.
    """
    wanted = {TOWER} if options.with_vision else set()
    travels = weights.travels | wanted
    tower = weights.tower if TOWER in travels else None
    if tower is not None and not tower.state:
        raise ValueError(f"this image tower cannot be written: {tower.refusal}")
    llm = weights.llm if LANGUAGE in travels else None
    modules = components(weights)
    for name, module in modules.items():
        try:
            module.save_pretrained(target if name == "bridge" else target / name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{target}: could not be written ({error}); {remedy}") from error
    if tower is not None:
        _write_tower(target / TOWER, tower, weights.preprocess, remedy)
    if llm is not None:
        _write_language(target / LANGUAGE, llm, remedy)
    count = {name: len(module.state_dict()) for name, module in modules.items()}
    taken = {
        **count,
        TOWER: 0 if tower is None else len(tower.state),
        LANGUAGE: 0 if llm is None else len(llm.state),
    }
    return Account(taken, weights.unused, weights.absent)


def _tower_of(encoder: Any) -> Tower:
    if not isinstance(encoder, TimmImageEncoder):
        return Tower({}, None, f"it is a {type(encoder).__name__}, not one of timm's")
    trunk, state = encoder.trunk, encoder.trunk.state_dict()
    if not isinstance(trunk, Eva):
        return Tower(state, None, f"it is timm's {type(trunk).__name__}, not its Eva")
    if left := eva_to_hf_blip2(state).unmatched:
        return Tower(state, None, f"it has {left[0]}, which BLIP-2's EVA lacks")
    block = trunk.blocks[0]
    if encoder.activation != "gelu" or trunk.rope is not None:
        return Tower(state, None, "it is an EVA of another kind than BLIP-2's")
    return Tower(state, eva_vision(state, block.attn.num_heads, block.norm1.eps))


def _processor_of(encoder: Any) -> dict[str, Any]:
    preprocess = encoder.preprocess
    if preprocess.resize == "crop":
        return hf_processor(preprocess)
    resample = 2 if preprocess.interpolation == "bilinear" else 3
    return blip_processor(preprocess.size, preprocess.mean, preprocess.std, resample)


def _language_of(llm: Any, end: str | None) -> LanguagePart:
    state = llm.model.state_dict()
    if any(".lora_" in name for name in state):
        raise ValueError(
            "the language model has LoRA adapters, which have no place there; merge them first"
        )
    try:
        tokenizer = llm.tokenizer
    except ValueError:  # an inline configuration brings none
        tokenizer = None
    return LanguagePart(llm.model.config, state, tokenizer, end)


def _read_tower(
    folder: Path, options: Options
) -> tuple[Tower | None, dict[str, Any] | None, list[str]]:
    if options.vision is not None:
        if folder.is_dir():
            raise ValueError(f"{folder} holds an image tower already; leave --vision away")
        tower, unused = read_tower(options.vision, options)
        return tower, None, unused
    if not folder.is_dir():
        return None, None, []
    state = read_tensors(folder)
    vision = _json(folder / "config.json")
    refusal = "" if vision else "it is no EVA, or its number of heads was not known"
    return Tower(state, vision, refusal), _json(folder / "preprocessor_config.json"), []


def _json(file: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON ({error})") from error


def _write_tower(folder: Path, tower: Tower, preprocess: Any, remedy: str) -> None:
    write_safetensors(folder / "model.safetensors", plain(tower.state), remedy)
    for name, content in (("config.json", tower.vision), ("preprocessor_config.json", preprocess)):
        if content:
            write_text_atomically(folder / name, json.dumps(dict(content), indent=2), remedy)


def _write_language(folder: Path, llm: LanguagePart, remedy: str) -> None:
    model = meta(auto_class(llm.config).from_config, llm.config)
    state = plain(without_ties(llm.state, model))
    write_safetensors(folder / "model.safetensors", state, remedy)
    write_text_atomically(folder / "config.json", llm.config.to_json_string(), remedy)
    if llm.tokenizer is not None:
        llm.tokenizer.save_pretrained(folder)
