"""BLIP-2 in LAVIS' layout: a torch file with the weights under "model".

LAVIS leaves the frozen image tower and the language model out of its files; a tower that was
fine-tuned is in them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor

from latentmodal.bridges.convert import qformer_config_of, qformer_from_lavis, qformer_to_lavis
from latentmodal.encoders import CLIP_MEAN, CLIP_STD
from latentmodal.encoders.convert import eva_from_lavis, eva_to_lavis
from latentmodal.experiments.exports.blip2 import (
    Account,
    Blip2Weights,
    Options,
    State,
    Tower,
    eva_vision,
    plain,
    prefixed,
    require_qformer,
    shortened,
)
from latentmodal.experiments.exports.language import language_part
from latentmodal.experiments.files import write_atomically
from latentmodal.experiments.tensor_files import read_tensors

SUFFIXES: Final = (".pth", ".pt")

_TOWER = "visual_encoder."
_LANGUAGE = ("opt_model.", "t5_model.", "llm_model.")
# Of a whole EVA, which BLIP-2 reads before its last block.
_FINAL = ("norm.", "fc_norm.", "head.")


def read_lavis(path: Path, options: Options) -> Blip2Weights:
    """A first stage, a second stage, or either fine-tuned.

    Raises:
        ValueError: no such file, a file that needs code to be read, weights that do not fit, or
            something needed from the options.
    """
    converted = qformer_from_lavis(read_tensors(path))
    try:
        configs = qformer_config_of(converted.state, options.heads)
    except ValueError as error:
        raise ValueError(str(error).replace("; give heads", "; give --heads")) from error
    inside = {k: v for k, v in converted.rest.items() if k.startswith(_TOWER)}
    tower_state, strange = eva_from_lavis(inside)
    if inside and options.vision is not None:
        raise ValueError("the file holds an image tower of its own; leave --vision away")
    tower = None if strange or not inside else _tower(tower_state, options)
    unused = [*converted.unused, *strange]
    if not inside and options.vision is not None:
        tower, left = read_tower(options.vision, options)
        unused += left
    unused += sorted(tower_state) if strange else []

    llm = None if options.llm is None else language_part(options.llm)
    tuned = {k.partition(".")[2]: v for k, v in converted.rest.items() if k.startswith(_LANGUAGE)}
    if llm is not None:
        end = "\n" if llm.lavis_name == "opt" else None  # what LAVIS has OPT end all texts in
        llm = replace(llm, state={**llm.state, **tuned}, end=end)
    elif tuned:
        unused += sorted(k for k in converted.rest if k.startswith(_LANGUAGE))
    travels = {"image_encoder"} if tower is not None else set()
    return Blip2Weights(
        configs.bridge,
        configs.head,
        converted.state,
        tower,
        llm,
        _preprocess(tower),
        frozenset(travels | ({"llm"} if llm is not None and tuned else set())),
        sorted(unused),
        converted.absent,
    )


def write_lavis(weights: Blip2Weights, target: Path, options: Options, remedy: str) -> Account:
    """Write `{"model": state}`.

    Raises:
        ValueError: LAVIS has no place for something, or needs something the source lacks.
    """
    config = require_qformer(weights, "LAVIS")
    projection = None
    if config.out_dim is not None:
        projection = options.projection or (weights.llm and f"{weights.llm.lavis_name}_proj")
        if projection is None:
            raise ValueError(
                "LAVIS names the projection after the language model; give --projection opt_proj, "
                "t5_proj or llm_proj"
            )
    kind = cast(Literal["opt_proj", "t5_proj", "llm_proj"], projection)
    try:
        converted = qformer_to_lavis(weights.state, kind)
    except ValueError as error:
        raise ValueError(f"LAVIS: {shortened(str(error).split('; '))}") from error
    tower: dict[str, Tensor] = {}
    wanted = options.with_vision or "image_encoder" in weights.travels
    if wanted and weights.tower is not None:
        tower, strange = eva_to_lavis(weights.tower.state)
        if strange or weights.tower.vision is None:
            reason = weights.tower.refusal or shortened(strange)
            raise ValueError(f"LAVIS has no place for this image tower: {reason}")
    llm: dict[str, Tensor] = {}
    if "llm" in weights.travels and weights.llm is not None:
        llm = prefixed(weights.llm.state, f"{str(projection).removesuffix('_proj')}_model.")
    state = plain({**tower, **converted.state, **llm})
    write_atomically(target, lambda file: torch.save({"model": state}, file), remedy)
    own = len(converted.state)
    heads = sum(name.startswith("head.") for name in weights.state)
    taken = {"bridge": own - heads, "head": heads, "image_encoder": len(tower), "llm": len(llm)}
    return Account(taken, [*weights.unused, *converted.unused], weights.absent)


def read_tower(path: str, options: Options) -> tuple[Tower, list[str]]:
    """An EVA tower by itself, such as LAVIS' eva_vit_g.pth, and the names it has no use for."""
    state = {k.removeprefix(_TOWER): v for k, v in read_tensors(path).items()}
    unused = []
    if any(name.startswith(("norm.", "fc_norm.")) for name in state):
        last = max((int(k.split(".")[1]) for k in state if k.startswith("blocks.")), default=0)
        unused = [k for k in state if k.startswith((f"blocks.{last}.", *_FINAL))]
    kept = {k: v for k, v in state.items() if k not in unused}
    tower_state, strange = eva_from_lavis(prefixed(kept, _TOWER))
    if "cls_token" not in tower_state or "blocks.0.attn.qkv.weight" not in tower_state:
        raise ValueError(f"{path} holds no EVA tower; give LAVIS' eva_vit_g.pth or its like")
    left = [*unused, *(name.removeprefix(_TOWER) for name in strange)]
    return _tower(tower_state, options), left


def _tower(state: State, options: Options) -> Tower:
    try:
        return Tower(state, eva_vision(state, options.vision_heads))
    except ValueError as error:
        return Tower(state, None, str(error))


def _preprocess(tower: Tower | None) -> dict[str, Any] | None:
    """LAVIS' evaluation transform: squashed to a square, normalised as CLIP is."""
    if tower is None or tower.vision is None:
        return None
    return blip_processor(tower.vision["image_size"], CLIP_MEAN, CLIP_STD)


def blip_processor(
    size: int, mean: tuple[float, ...], std: tuple[float, ...], resample: int = 3
) -> dict[str, Any]:
    """`preprocessor_config.json` of BLIP-2 in transformers; `resample` is PIL's filter number."""
    return {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
