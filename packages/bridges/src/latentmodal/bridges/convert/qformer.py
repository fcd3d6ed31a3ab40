"""BLIP-2's Q-Former and heads: LAVIS' and transformers' state dicts to ours and back.

Ours are the names of `QFormer` under `bridge.` and of `AlignmentHead` under `head.`. Values stay as
they are, bit by bit, but for the temperature, which is of shape () in LAVIS and (1,) here.

    LAVIS                      stage 1, stage 2 and fine-tuned files alike
    transformers               Blip2Model, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

transformers has no caption head and no temperature. Its norm over the features has eps 1e-6 where
LAVIS and this package have 1e-5, so outputs differ by about as much.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from latentmodal.bridges.alignment import AlignmentHeadConfig
from latentmodal.bridges.component import Component
from latentmodal.bridges.convert.inference import QFormerConfigs, qformer_config_of
from latentmodal.bridges.convert.names import (
    HF_TO_OURS,
    LAVIS_CAPTION_BIAS,
    LAVIS_DECODER,
    LAVIS_DECODER_BIAS,
    LAVIS_PROJECTIONS,
    LAVIS_TO_OURS,
    LAVIS_WORDS,
    OURS_TO_HF,
    ours_to_lavis,
    rename,
)
from latentmodal.bridges.qformer import QFormerConfig

StateDict = Mapping[str, Tensor]

_LAVIS_REST = ("visual_encoder.", "opt_model.", "t5_model.", "llm_model.")
_HF_REST = ("vision_model.", "language_model.")

# Index buffers 0, 1, 2, …, which nobody needs to store.
_LAVIS_BUFFERS = ("Qformer.bert.embeddings.position_ids",)
_HF_BUFFERS = ("embeddings.position_ids",)

# What one stage has and another has no use for.
_TEXT_BRANCH = ("bridge.word_embed.", "bridge.position_embed.", "bridge.caption_head.")
_MAY_BE_NEW = ("bridge.proj.", "head.")
_LEFT_OUT = (*_TEXT_BRANCH, *_MAY_BE_NEW)


class Converted(NamedTuple):
    """A converted state dict, and an account of everything that is not in it."""

    state: dict[str, Tensor]
    rest: dict[str, Tensor]
    """Other parts of the source (image encoder, language model), untouched."""
    unused: list[str]
    """Source keys of the Q-Former and its heads that the result has no place for."""
    absent: list[str]
    """Weights of ours that are left to initialise: the source's format never has them, or this
    source has nothing of the projection, or of the heads, that the config asks for."""


def qformer_from_lavis(
    state: StateDict,
    config: QFormerConfig | None = None,
    head: AlignmentHeadConfig | None = None,
) -> Converted:
    """A LAVIS checkpoint (what is under its key "model") to ours.

    Args:
        state: theirs.
        config: the Q-Former the weights are for. Without a text branch or a projection in it,
            theirs is left out and listed; with a projection that theirs has nothing of, as a second
            stage that begins from a first has, it is listed in `absent`. None: all is taken.
        head: the heads they are for; looked at only with `config`, where None leaves heads out.

    Raises:
        ValueError: unknown, missing or wrongly shaped weights, all in one line; among them a
            caption head that is not tied to the word embedding.
    """
    names, repeats, problems = read_lavis_names(state)
    once = {key: value for key, value in state.items() if key not in repeats}
    inverse = _inverse(names)
    return _from_theirs(once, names, inverse, _LAVIS_REST, _LAVIS_BUFFERS, config, head, problems)


def qformer_from_hf(
    state: StateDict,
    config: QFormerConfig | None = None,
    head: AlignmentHeadConfig | None = None,
) -> Converted:
    """The weights of a BLIP-2 class of transformers to ours; see `qformer_from_lavis`.

    The temperature, and the caption head where `config` has one, are `absent` from the result.
    """
    names = rename(state, HF_TO_OURS)
    return _from_theirs(state, names, OURS_TO_HF, _HF_REST, _HF_BUFFERS, config, head, [])


def qformer_to_lavis(
    state: StateDict, projection: Literal["opt_proj", "t5_proj", "llm_proj"] | None = None
) -> Converted:
    """Ours to LAVIS.

    With a text branch it is the file of a first stage, which has the caption head and all heads of
    `AlignmentHead`: weights that come from transformers lack the temperature and the caption head,
    which have to be added before.

    Args:
        state: ours; keys of neither `bridge.` nor `head.` go to `rest`.
        projection: what LAVIS calls the projection; needed where there is one.

    Raises:
        ValueError: unknown or missing weights, all in one line, or `projection` is needed.
    """
    if projection is None and "bridge.proj.weight" in state:
        raise ValueError(
            "there is a projection, bridge.proj; give the name it has in LAVIS: "
            f"projection={' or '.join(map(repr, LAVIS_PROJECTIONS))}"
        )
    if projection is not None and projection not in LAVIS_PROJECTIONS:
        raise ValueError(
            f"projection is {projection!r}; choose from {', '.join(LAVIS_PROJECTIONS)}"
        )
    table = ours_to_lavis(projection or LAVIS_PROJECTIONS[0])
    converted = _to_theirs(state, table, never=())
    result = converted.state
    if LAVIS_WORDS in result:
        # Copies, because safetensors stores no tensor twice.
        result[LAVIS_DECODER] = result[LAVIS_WORDS].clone()
        result[LAVIS_DECODER_BIAS] = result[LAVIS_CAPTION_BIAS].clone()
    if "temp" in result:
        result["temp"] = result["temp"].reshape(())
    return converted


def qformer_to_hf(state: StateDict) -> Converted:
    """Ours to transformers: with a text branch to `Blip2ForImageTextRetrieval`, else to the others.

    Caption head and temperature have no place there and are listed in `unused`.

    Args:
        state: ours; keys of neither `bridge.` nor `head.` go to `rest`.

    Raises:
        ValueError: unknown or missing weights, all in one line.
    """
    return _to_theirs(state, OURS_TO_HF, never=("bridge.caption_head.", "head.temperature"))


class LavisNames(NamedTuple):
    """How the keys of a LAVIS checkpoint, or of BERT in its place, are to be read."""

    ours: dict[str, str]
    repeats: list[str]
    """Keys that hold another weight of the caption head once more."""
    problems: list[str]


def read_lavis_names(state: StateDict) -> LavisNames:
    """Our names for LAVIS' keys; a weight stored twice has to have one value."""
    names = rename(state, LAVIS_TO_OURS)
    if LAVIS_DECODER_BIAS in state and LAVIS_CAPTION_BIAS not in state:
        names[LAVIS_DECODER_BIAS] = LAVIS_TO_OURS[LAVIS_CAPTION_BIAS]
    twice = {LAVIS_DECODER: LAVIS_WORDS, LAVIS_DECODER_BIAS: LAVIS_CAPTION_BIAS}
    repeats = [key for key, original in twice.items() if key in state and original in state]
    problems = [
        f"{key} differs from {twice[key]}, to which it should be tied"
        for key in repeats
        if not torch.equal(state[key], state[twice[key]])
    ]
    return LavisNames(names, repeats, problems)


def expected_shapes(configs: QFormerConfigs) -> dict[str, torch.Size]:
    """Our names and shapes of everything these components hold."""
    with torch.device("meta"):
        modules: dict[str, Component] = {"bridge": configs.bridge.build()}
        if configs.head is not None:
            modules["head"] = configs.head.build()
    return {
        f"{prefix}.{key}": value.shape
        for prefix, module in modules.items()
        for key, value in module.state_dict().items()
    }


def refuse(problems: list[str]) -> None:
    """Raise one ValueError that lists all problems, if there are any."""
    if problems:
        raise ValueError(f"weights do not fit a Q-Former: {'; '.join(problems)}")


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    """The table towards LAVIS, calling the projection what the checkpoint calls it."""
    present = [name for name in LAVIS_PROJECTIONS if f"{name}.weight" in names]
    return ours_to_lavis(present[0] if present else LAVIS_PROJECTIONS[0])


def _from_theirs(
    state: StateDict,
    names: Mapping[str, str],
    inverse: Mapping[str, str],
    rest_prefixes: tuple[str, ...],
    buffers: tuple[str, ...],
    config: QFormerConfig | None,
    head: AlignmentHeadConfig | None,
    problems: list[str],
) -> Converted:
    rest = {k: v for k, v in state.items() if k not in names and k.startswith(rest_prefixes)}
    unused = [key for key in state if key in buffers]
    problems = [
        *(f"{key} is unknown" for key in state.keys() - {*names, *rest, *unused}),
        *problems,
    ]
    ours: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    for key, name in names.items():
        if name in source:
            problems.append(f"{key} and {source[name]} are the same thing")
        ours[name], source[name] = state[key], key
    if "head.temperature" in ours and ours["head.temperature"].numel() == 1:
        ours["head.temperature"] = ours["head.temperature"].reshape(1)

    # The number of heads leaves no trace in shapes.
    configs = qformer_config_of(ours, heads=1) if config is None else QFormerConfigs(config, head)
    wanted = expected_shapes(configs)
    elsewhere = rename(wanted, inverse)
    new = tuple(part for part in _MAY_BE_NEW if not any(name.startswith(part) for name in ours))
    problems += [
        f"{elsewhere[name]} is missing"
        for name in wanted
        if name in elsewhere and name not in ours and not name.startswith(new)
    ]
    for name in [name for name in ours if name not in wanted]:
        del ours[name]
        if name.startswith(_LEFT_OUT) or ".text_mlp." in name:
            unused.append(source[name])
        else:
            problems.append(f"{source[name]} is unknown")
    problems += [
        f"{source[name]} has shape {tuple(value.shape)}, expected {tuple(wanted[name])}"
        for name, value in ours.items()
        if value.shape != wanted[name]
    ]
    refuse(sorted(problems))
    absent = [name for name in wanted if name not in ours]
    return Converted(ours, rest, sorted(unused), absent)


def _to_theirs(state: StateDict, table: Mapping[str, str], never: tuple[str, ...]) -> Converted:
    """`never` are the prefixes of what the target has no place for."""
    mine = {key: value for key, value in state.items() if key.startswith(("bridge.", "head."))}
    configs = qformer_config_of(mine, heads=1)
    if configs.bridge.vocab_size is not None:
        head = configs.head or AlignmentHeadConfig(width=configs.bridge.width)
        configs = QFormerConfigs(
            replace(configs.bridge, captioning=True), replace(head, contrastive=True, matching=True)
        )
    wanted = expected_shapes(configs)
    names = rename(mine, table)
    unused = sorted(key for key in mine if key not in names and key.startswith(never))
    problems = [
        f"{key} has no place there" for key in mine if key not in names and key not in unused
    ]
    problems += [f"{key} is unknown" for key in names if key not in wanted]
    problems += [
        f"{key} is missing" for key in wanted if key not in mine and not key.startswith(never)
    ]
    problems += [
        f"{key} has shape {tuple(mine[key].shape)}, expected {tuple(wanted[key])}"
        for key in names
        if key in wanted and mine[key].shape != wanted[key]
    ]
    refuse(sorted(problems))
    rest = {key: value for key, value in state.items() if key not in mine}
    return Converted({names[key]: mine[key] for key in names}, rest, unused, [])
