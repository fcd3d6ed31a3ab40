"""The freeze plan: ordered name patterns decide what trains, and at which learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from rich import box
from rich.table import Table
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX

from latentmodal.encoders import ImageEncoder

FROZEN = "frozen"


@dataclass(frozen=True)
class FreezePlan:
    """Patterns over parameter names (`fnmatch` style), in order; the first that matches decides.

    A value is `frozen` or a learning-rate multiplier; a parameter no pattern matches trains at 1.
    """

    rules: Mapping[str, Any]

    def __post_init__(self) -> None:
        for pattern, value in self.rules.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
            if value != FROZEN and not number:
                raise ValueError(
                    f"freeze: '{pattern}' is {value!r}; give 'frozen' or a multiplier above 0"
                )

    def multiplier(self, name: str) -> float:
        """The learning-rate multiplier of parameter `name`; 0.0 means frozen."""
        for pattern, value in self.rules.items():
            if fnmatchcase(name, pattern):
                return 0.0 if value == FROZEN else float(value)
        return 1.0

    def apply(self, module: nn.Module) -> None:
        """Set `requires_grad` throughout `module`, and put wholly frozen submodules in eval mode.

        Raises:
            ValueError: a pattern matches no parameter; a typo would train the wrong part.
        """
        names = [name for name, _ in module.named_parameters()]
        for pattern in self.rules:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"freeze: pattern '{pattern}' matches no parameter; names begin like "
                    f"{', '.join(sorted(_heads(names)))}"
                )
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(self.multiplier(name) > 0)
        if all(not parameter.requires_grad for parameter in module.parameters()):
            raise ValueError("freeze: every parameter is frozen; leave something to train")
        keep_frozen_in_eval(module)


def plain_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters under the names recipes and checkpoints use.

    Activation checkpointing puts a wrapper into every name; a pattern must match regardless.
    """
    for name, parameter in module.named_parameters():
        yield name.replace(_CHECKPOINT_PREFIX, ""), parameter


def frozen_names(module: nn.Module) -> set[str]:
    """Every name of every frozen parameter: a head tied to the embeddings has two."""
    return {
        name.replace(_CHECKPOINT_PREFIX, "")
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }


def keep_frozen_in_eval(module: nn.Module) -> None:
    """Put submodules whose parameters are all frozen in eval mode (no dropout, no statistics)."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        keep_frozen_in_eval(child)


def freeze_pooling(tower: ImageEncoder) -> None:
    """Freeze what a model that reads the tower's tokens alone can give no gradient.

    Whatever the plan says: under DDP such parameters would end the run at its second step.
    """
    if is_frozen(tower):
        return
    parameters = dict(tower.named_parameters())
    for name in tower.pooling_parameters():
        parameters[name].requires_grad_(False)
    keep_frozen_in_eval(tower)


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of `module` trains."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def _heads(names: Iterable[str], depth: int = 2) -> set[str]:
    return {".".join(name.split(".")[:depth]) for name in names}


@dataclass(frozen=True)
class FreezeRow:
    """One line of the printed plan: a part of the model, what of it trains, and how fast."""

    module: str
    parameters: int
    trainable: int
    lr: str


def freeze_rows(
    module: nn.Module,
    plan: FreezePlan,
    lr: float,
    depth: int = 2,
    layer_scale: Mapping[str, float] | None = None,
) -> list[FreezeRow]:
    """Summarise `module`, after its plan was applied, by the first parts of its parameter names.

    `layer_scale` holds further multipliers by parameter name, as layer decay gives them.
    """
    further = layer_scale or {}
    groups: dict[str, list[tuple[int, float]]] = {}
    for name, parameter in module.named_parameters():
        head = ".".join(name.split(".")[:depth])
        scale = plan.multiplier(name) * further.get(name, 1.0) * parameter.requires_grad
        groups.setdefault(head, []).append((parameter.numel(), scale))
    rows = []
    for head, members in groups.items():
        rates = sorted({scale * lr for _, scale in members if scale > 0})
        shown = " .. ".join(f"{rate:.2e}" for rate in dict.fromkeys(rates[:1] + rates[-1:]))
        trainable = sum(count for count, scale in members if scale > 0)
        rows.append(FreezeRow(head, sum(count for count, _ in members), trainable, shown or FROZEN))
    total = FreezeRow(
        "total", sum(row.parameters for row in rows), sum(row.trainable for row in rows), ""
    )
    return [*rows, total]


def freeze_table(rows: list[FreezeRow]) -> Table:
    """The plan as a rich table."""
    table = Table(title="freeze plan", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("module")
    for column in ("parameters", "trainable", "lr"):
        table.add_column(column, justify="right")
    for row in rows:
        style = "bold" if row.module == "total" else ("dim" if not row.trainable else "")
        table.add_row(row.module, f"{row.parameters:,}", f"{row.trainable:,}", row.lr, style=style)
    return table
