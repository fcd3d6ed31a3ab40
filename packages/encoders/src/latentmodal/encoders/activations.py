"""The three activations of CLIP-like towers, by name, and how to recognise them in a model.

A checkpoint trained with one of them gives plausible but wrong features under another, so their
names travel with towers and checkpoints and are compared when weights are loaded.
"""

from typing import Literal, get_args

import torch.nn.functional as F
from timm.layers import activations as timm_activations
from torch import Tensor, nn
from transformers import activations as hf_activations

Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]


class QuickGELU(nn.Module):
    """x·σ(1.702x), the activation of OpenAI's CLIP.

    Written as silu(1.702x)/1.702: the same function, but autograd keeps one tensor instead of two.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702


class GELUTanh(nn.GELU):
    """GELU in its tanh approximation, with a constructor that takes no arguments."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


_CLASSES: dict[Activation, type[nn.Module]] = {
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "gelu_tanh": GELUTanh,
}

# The same three functions as timm and transformers spell them.
_KNOWN: dict[type[nn.Module], Activation] = {
    QuickGELU: "quick_gelu",
    GELUTanh: "gelu_tanh",
    timm_activations.GELU: "gelu",
    timm_activations.GELUTanh: "gelu_tanh",
    timm_activations.QuickGELU: "quick_gelu",
    hf_activations.GELUActivation: "gelu",
    hf_activations.GELUTanh: "gelu_tanh",
    hf_activations.QuickGELUActivation: "quick_gelu",
}

# `hidden_act` in transformers configs. "gelu_new" and "gelu_pytorch_tanh" are the same function.
HF_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def activation_class(name: str) -> type[nn.Module]:
    """The module class (no constructor arguments) of an activation name."""
    for known, cls in _CLASSES.items():
        if known == name:
            return cls
    choices = ", ".join(get_args(Activation))
    raise ValueError(f"activation={name!r} is unknown; choose from {choices}.")


def activation_of(model: nn.Module) -> Activation | None:
    """Which of the three a model's MLPs use; None if it uses none or more than one of them."""
    found: set[Activation] = set()
    for module in model.modules():
        if type(module) is nn.GELU:
            found.add("gelu_tanh" if module.approximate == "tanh" else "gelu")
        elif type(module) in _KNOWN:
            found.add(_KNOWN[type(module)])
    return found.pop() if len(found) == 1 else None
