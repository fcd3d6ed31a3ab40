"""The freeze plan: which parameters train, how fast, and what stays as it was."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch import nn

from latentmodal.experiments.training.freeze import (
    FreezePlan,
    freeze_rows,
    freeze_table,
    frozen_names,
    is_frozen,
    keep_frozen_in_eval,
    plain_parameters,
)
from latentmodal.experiments.training.strategies import apply_activation_checkpointing


def model() -> nn.Module:
    """Two towers and a scalar, under the names a dual encoder uses."""
    tower = nn.ModuleDict(
        {
            "blocks": nn.ModuleList(
                nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)
            ),
            "norm": nn.LayerNorm(4),
        }
    )
    return nn.ModuleDict({"image_encoder": tower, "text_encoder": nn.Linear(3, 4), "head": Head()})


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.image_proj = nn.Linear(4, 2, bias=False)


def trainable(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"a.b.*": 0.5, "a.*": "frozen"}, {"a.b.w": 0.5, "a.c.w": 0.0, "d": 1.0}),
        ({"a.*": "frozen", "a.b.*": 0.5}, {"a.b.w": 0.0, "a.c.w": 0.0, "d": 1.0}),
        ({"*.w": 2, "a.*": "frozen"}, {"a.b.w": 2.0, "a.bias": 0.0, "d": 1.0}),
        ({}, {"a.b.w": 1.0}),
    ],
)
def test_the_first_pattern_that_matches_decides(
    rules: dict[str, object], expected: dict[str, float]
) -> None:
    plan = FreezePlan(rules)
    assert {name: plan.multiplier(name) for name in expected} == expected


def test_apply_sets_what_trains() -> None:
    module = model()
    FreezePlan({"*.blocks.1.*": 0.1, "image_encoder.*": "frozen"}).apply(module)
    assert trainable(module) == [
        "image_encoder.blocks.1.0.weight",
        "image_encoder.blocks.1.0.bias",
        "image_encoder.blocks.1.1.weight",
        "image_encoder.blocks.1.1.bias",
        "text_encoder.weight",
        "text_encoder.bias",
        "head.logit_scale",
        "head.image_proj.weight",
    ]


def test_a_frozen_tied_weight_is_frozen_under_both_names() -> None:
    module = model()
    module["head"].image_proj.weight = module["text_encoder"].weight
    FreezePlan({"text_encoder.*": "frozen"}).apply(module)
    assert frozen_names(module) == {
        "text_encoder.weight",
        "text_encoder.bias",
        "head.image_proj.weight",
    }


def test_a_second_plan_undoes_the_first() -> None:
    module = model()
    FreezePlan({"text_encoder.*": "frozen"}).apply(module)
    FreezePlan({"head.*": "frozen"}).apply(module)
    assert module["text_encoder"].weight.requires_grad
    assert not module["head"].logit_scale.requires_grad


def test_a_pattern_that_matches_nothing_is_named() -> None:
    plan = FreezePlan({"image_encoder.*": "frozen", "image_encodr.norm.*": 0.5})
    with pytest.raises(
        ValueError, match=r"'image_encodr\.norm\.\*' matches no parameter"
    ) as caught:
        plan.apply(model())
    assert "image_encoder.blocks" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_something_must_train() -> None:
    with pytest.raises(ValueError, match="every parameter is frozen"):
        FreezePlan({"*": "frozen"}).apply(model())


@pytest.mark.parametrize("value", ["freeze", 0, -1.0, True, None, {"*": "frozen"}])
def test_values_are_frozen_or_multipliers(value: object) -> None:
    with pytest.raises(ValueError, match=r"'a\.\*' is .*; give 'frozen' or a multiplier above 0"):
        FreezePlan({"a.*": value})


def test_frozen_parts_stay_in_eval_mode() -> None:
    module = model()
    FreezePlan({"image_encoder.blocks.0.*": "frozen", "text_encoder.*": "frozen"}).apply(module)
    for _ in range(2):  # as Lightning does at each stage
        module.train()
        keep_frozen_in_eval(module)
        first, second = module["image_encoder"]["blocks"]
        assert not any(part.training for part in first.modules())
        assert all(part.training for part in second.modules())
        assert not module["text_encoder"].training
        assert module["head"].training and module.training
    statistics = first[1].running_mean.clone()
    first(torch.randn(8, 4))
    assert torch.equal(first[1].running_mean, statistics)


def test_is_frozen() -> None:
    module = model()
    FreezePlan({"image_encoder.*": "frozen"}).apply(module)
    assert is_frozen(module["image_encoder"])
    assert not is_frozen(module["text_encoder"]) and not is_frozen(module)


def test_table_rows_add_up() -> None:
    module = model()
    plan = FreezePlan(
        {"image_encoder.blocks.0.*": "frozen", "image_encoder.blocks.1.0.*": 0.1, "head.*": 3}
    )
    plan.apply(module)
    *rows, total = freeze_rows(module, plan, lr=1e-3)
    by_module = {row.module: row for row in rows}
    assert total.parameters == sum(p.numel() for p in module.parameters())
    assert total.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert total.parameters == sum(row.parameters for row in rows)
    assert total.trainable == sum(row.trainable for row in rows)
    blocks = by_module["image_encoder.blocks"]
    assert (blocks.parameters, blocks.trainable) == (2 * (20 + 8), 20 + 8)
    assert blocks.lr == "1.00e-04 .. 1.00e-03"
    assert by_module["head.logit_scale"].lr == "3.00e-03"
    assert by_module["image_encoder.norm"].lr == "1.00e-03"

    FreezePlan({"image_encoder.*": "frozen"}).apply(module)
    frozen = freeze_rows(module, FreezePlan({"image_encoder.*": "frozen"}), lr=1e-3)[0]
    assert (frozen.trainable, frozen.lr) == (0, "frozen")


def test_table_prints_every_row() -> None:
    module, plan = model(), FreezePlan({"image_encoder.*": "frozen"})
    plan.apply(module)
    console = Console(width=100)
    with console.capture() as captured:
        console.print(freeze_table(freeze_rows(module, plan, lr=5e-4)))
    text = captured.get()
    for row in freeze_rows(module, plan, lr=5e-4):
        assert row.module in text and f"{row.parameters:,}" in text
    assert "5.00e-04" in text and "frozen" in text


def test_names_do_not_change_under_activation_checkpointing() -> None:
    module = model()
    before = [name for name, _ in plain_parameters(module)]
    apply_activation_checkpointing(module, check_fn=lambda part: isinstance(part, nn.Sequential))
    assert [name for name, _ in module.named_parameters()] != before
    assert [name for name, _ in plain_parameters(module)] == before
    assert set(before) <= module.state_dict().keys(), "checkpoints use other names"
