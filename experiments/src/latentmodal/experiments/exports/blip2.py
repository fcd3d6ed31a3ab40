"""BLIP-2's parts between two formats: what every source is read into and every target made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from latentmodal.bridges import AlignmentHeadConfig, BridgeConfig, Component, QFormerConfig
from latentmodal.experiments.exports.export import shown

State = Mapping[str, Tensor]

EVA_HEAD_WIDTH = 88
"""Of ViT-g/14, the one tower that LAVIS' BLIP-2 files were trained with besides CLIP's."""

SHAPES_SHOWN = 4
"""Problems named in a refusal before the rest is only counted."""


@dataclass(frozen=True)
class Options:
    """What a source does not say, from the command line.

    Attributes:
        heads: attention heads of the Q-Former; default: 64 wide each.
        vision: weights of the EVA tower, for a source that has none.
        vision_heads: attention heads of that tower; default: 88 wide each.
        llm: hub name (its configuration is read) or folder (its weights too) of the language model.
        projection: what LAVIS is to call the projection; default: after the language model.
        with_vision: write the tower although it did not train.
    """

    heads: int | None = None
    vision: str | None = None
    vision_heads: int | None = None
    llm: str | None = None
    projection: str | None = None
    with_vision: bool = False


@dataclass(frozen=True)
class LanguagePart:
    """The language model: its configuration, and its weights where the source has them.

    `end` is what its answers were trained to end in, where that is text; None: its own end token,
    or what the configuration says already.
    """

    config: Any
    state: State
    tokenizer: Any = None
    end: str | None = None

    @property
    def lavis_name(self) -> str:
        """What LAVIS calls it: `opt`, `t5` or `llm`."""
        kind = str(self.config.model_type)
        return kind if kind in ("opt", "t5") else "llm"


@dataclass(frozen=True)
class Tower:
    """The image tower under timm's names.

    `vision` is its transformers configuration where it is BLIP-2's EVA; else `refusal` says why it
    has none.
    """

    state: State
    vision: Mapping[str, Any] | None = None
    refusal: str = ""


@dataclass(frozen=True)
class Blip2Weights:
    """Everything one source holds; `state` has our names, under `bridge.` and `head.`.

    `travels` names the parts besides bridge and heads that belong in every target, because nobody
    could get them elsewhere.
    """

    bridge: BridgeConfig
    head: AlignmentHeadConfig | None
    state: State
    tower: Tower | None = None
    llm: LanguagePart | None = None
    preprocess: Mapping[str, Any] | None = None
    travels: frozenset[str] = frozenset()
    unused: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Account:
    """What became of the weights, a line for each group."""

    taken: Mapping[str, int]
    unused: list[str]
    absent: list[str]

    def lines(self) -> list[str]:
        """For the terminal."""
        parts = ", ".join(f"{part} {count}" for part, count in self.taken.items() if count)
        return [
            f"taken   {parts} (tensors)",
            f"unused  {_listed(self.unused)}",
            f"absent  {_listed(self.absent)}",
        ]


def require_qformer(weights: Blip2Weights, library: str) -> QFormerConfig:
    """The Q-Former's configuration; no other bridge has a place elsewhere."""
    if not isinstance(weights.bridge, QFormerConfig):
        raise ValueError(
            f"{library} has no place for the bridge {weights.bridge.name!r}; it takes a qformer"
        )
    return weights.bridge


def components(weights: Blip2Weights) -> dict[str, Component]:
    """Bridge, and heads where there are any, as modules with their weights.

    A temperature that the source's format does not have starts as its configuration says.
    """
    modules: dict[str, Component] = {}
    for name, config in (("bridge", weights.bridge), ("head", weights.head)):
        if config is None:
            continue
        module = config.build()
        own = without_prefix(weights.state, f"{name}.")
        missing, unexpected = module.load_state_dict(own, strict=False, assign=True)
        assert not unexpected and set(missing) <= {"temperature"}, (missing, unexpected)
        modules[name] = module
    return modules


def shape_problems(found: State, expected: Mapping[str, Tensor]) -> str:
    """What stands between a state dict and the one expected; empty where nothing does."""
    problems = [f"it has no place for {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [f"it needs {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [
        f"it expects {name} as {tuple(tensor.shape)}, not {tuple(found[name].shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    return shortened(problems)


def shortened(problems: list[str]) -> str:
    """The first few problems, and how many more there are."""
    more = f" and {len(problems) - SHAPES_SHOWN} more" if len(problems) > SHAPES_SHOWN else ""
    return "; ".join(problems[:SHAPES_SHOWN]) + more


def eva_vision(state: State, heads: int | None, eps: float = 1e-6) -> dict[str, Any]:
    """The transformers configuration of an EVA tower, read off its weights under timm's names.

    Raises:
        ValueError: the number of heads is needed.
    """
    width = state["cls_token"].shape[-1]
    patch = state["patch_embed.proj.weight"].shape[-1]
    if heads is None:
        if width % EVA_HEAD_WIDTH:
            raise ValueError(
                f"the tower's width {width} does not divide into heads of {EVA_HEAD_WIDTH}; "
                "give --vision-heads"
            )
        heads = width // EVA_HEAD_WIDTH
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    return {
        "hidden_size": width,
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks")),
        "num_attention_heads": heads,
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": eps,
        "qkv_bias": True,
    }


def prefixed(state: State, prefix: str) -> dict[str, Tensor]:
    """With `prefix` before every name."""
    return {prefix + name: tensor for name, tensor in state.items()}


def without_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    """The names that begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def plain(state: State) -> dict[str, Tensor]:
    """On the CPU, out of autograd, contiguous, no two names sharing memory."""
    seen: set[int] = set()
    result = {}
    for name, tensor in state.items():
        value = tensor.detach().cpu().contiguous()
        pointer = value.untyped_storage().data_ptr()
        result[name] = value.clone() if pointer in seen and value.numel() else value
        seen.add(pointer)
    return result


def meta(build: Any, *args: Any) -> Any:
    """Build a module without data."""
    with torch.device("meta"):
        return build(*args)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return shown(names, most=6) if names else "nothing"
