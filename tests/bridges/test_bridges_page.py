"""docs/bridges.md: its Python runs, and its table says what the code does."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from latentmodal.bridges import BRIDGES, ChainConfig, Resampler
from latentmodal.bridges.component import make_config
from latentmodal.bridges.format_version import FORMAT_VERSION

PAGE = Path(__file__).parents[2] / "docs/bridges.md"
TEXT = PAGE.read_text(encoding="utf-8")
TABLE = {row.split("`")[1]: row for row in TEXT.splitlines() if re.match(r"\| `\w+` \|", row)}
SINGLE = [name for name, config in BRIDGES.items() if config is not ChainConfig]


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's Python leaves, run from top to bottom in an empty folder."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, PAGE.name, "exec", dont_inherit=True), vars(module))
    return vars(module)


def test_the_python_of_the_page_runs(page: dict[str, Any]) -> None:
    assert isinstance(page["bridge"], Resampler)
    assert page["mixed"].shape == (2, 32, 16)


def test_the_bridge_of_the_page_never_looks_at_masked_features(page: dict[str, Any]) -> None:
    bridge = page["TokenMixConfig"](in_dim=8, out_dim=16, num_input_tokens=5, skip_tokens=1).build()
    features, mask = torch.randn(2, 5, 8), torch.tensor([[True, True, False, True, True]] * 2)
    tokens = bridge(features, mask)
    features[:, 2] = 1e4
    assert torch.equal(bridge(features, mask), tokens)
    features[:, 1] = 1e4
    assert not torch.equal(bridge(features, mask), tokens)


def test_the_table_has_every_bridge() -> None:
    assert set(TABLE) == set(BRIDGES)


@pytest.mark.parametrize("name", SINGLE)
def test_the_table_has_every_key_and_its_default(name: str) -> None:
    config = BRIDGES[name]
    for field in dataclasses.fields(config):
        if field.name in config.shape_fields:
            continue
        found = re.search(rf"`{field.name}`(?: \((.*?)\))?", TABLE[name])
        assert found, field.name
        default = field.default
        if found[1] and default is not None:
            assert found[1] == (str(default).lower() if default in (True, False) else str(default))


@pytest.mark.parametrize("name", SINGLE)
def test_the_table_counts_the_tokens(name: str) -> None:
    config = BRIDGES[name]
    fields: dict[str, Any] = {"in_dim": 64}
    known = {field.name for field in dataclasses.fields(config)}
    for key, value in {"out_dim": 64, "num_input_tokens": 577, "skip_tokens": 1}.items():
        if key in known:
            fields[key] = value
    with torch.device("meta"):
        bridge: Any = make_config(name, fields, BRIDGES).build()
    if name == "qformer":  # its own width, any number of tokens
        assert bridge.config.input_tokens is None
    assert TABLE[name].strip("| ").split(" | ")[-1] == str(bridge.num_output_tokens)


def test_the_page_names_the_version() -> None:
    assert f"now {FORMAT_VERSION}:" in TEXT
