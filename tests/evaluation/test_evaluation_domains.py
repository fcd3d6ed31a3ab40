"""Captions of NoCaps: a figure for each domain beside those of the whole set."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from latentmodal.experiments.data.config import ShardSourceConfig
from latentmodal.experiments.evaluation.answers import CaptionsTask
from latentmodal.experiments.evaluation.captions import caption_metrics

REFERENCES = [
    ["a red dog runs over green grass", "a dog on the grass"],
    ["two blue cats sleep on a wide bed", "cats on a bed"],
    ["a man rides an old brown horse", "somebody on a horse"],
    ["a white boat lies in the calm water", "a boat"],
]
SAID = [
    "a red dog runs over green grass", "a dog", "a man rides a horse", "a boat lies in the water",
]  # fmt: skip
DOMAINS = ["in-domain", "near-domain", "out-domain", "out-domain"]


class Spoken:
    """A set whose captions are said already."""

    device = torch.device("cpu")

    def __init__(self, domains: list[str | None]) -> None:
        meta = [{} if domain is None else {"domain": domain} for domain in domains]
        self.samples = SimpleNamespace(captions=REFERENCES, meta=meta)

    def each(self, read: Any) -> list[str]:
        return SAID


def section(domains: list[str | None], **fields: Any) -> dict[str, Any]:
    task = CaptionsTask(source=ShardSourceConfig(urls="nocaps.tar"), **fields)
    data: Any = Spoken(domains)
    metrics, _ = task.run(SimpleNamespace(), data)
    return metrics


def test_each_domain_is_scored_as_a_set_of_its_own() -> None:
    found = section(list(DOMAINS))
    assert [name for name in found if "(" in name] == [
        "CIDEr-D (in-domain)", "CIDEr-D (near-domain)", "CIDEr-D (out-domain)",
    ]  # fmt: skip
    expected = caption_metrics(REFERENCES[2:], SAID[2:])["CIDEr-D"]
    assert found["CIDEr-D (out-domain)"].value == pytest.approx(expected)
    assert expected > 0
    assert found["CIDEr-D (out-domain)"].n == 2
    assert "these 2 pictures" in found["CIDEr-D (out-domain)"].protocol
    whole = section([None] * 4)
    assert found["CIDEr-D"] == whole["CIDEr-D"] and found["CIDEr-D"].n == 4


def test_a_set_without_domains_has_no_such_figures() -> None:
    assert not any("(" in name for name in section([None] * 4))
