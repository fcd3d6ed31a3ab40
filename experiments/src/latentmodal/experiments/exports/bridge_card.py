"""The model card of an exported bridge, as the Hugging Face hub shows it.

Shapes: B pictures, N feature tokens, D width of the features, M soft tokens, E their width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from latentmodal.bridges import ChainConfig
from latentmodal.bridges.format_version import FORMAT_VERSION
from latentmodal.experiments.evaluation.report import EvalReport, shown
from latentmodal.experiments.recipe import to_plain
from latentmodal.experiments.schema import Recipe

_OF_ONE_MACHINE = ("run_dir",)
_NAMING = ("model", "path", "gguf", "config")
"""Keys of an encoder or a language model, the most telling first."""
_SOURCE_NAMING = ("preset", "urls", "path", "split")


def bridge_card(name: str, recipe: Recipe, model: Any, step: int, report: EvalReport | None) -> str:
    """The text of the card.

    Args:
        name: of the folder.
        recipe: of the run.
        model: of the run, with a `bridge` and an `image_encoder`.
        step: of the checkpoint the bridge is from.
        report: what was measured at that step, if anything was.
    """
    bridge = model.bridge
    config = bridge.config
    parts = config.parts if isinstance(config, ChainConfig) else (config,)
    plain = _without_places(to_plain(recipe))
    ends, data = plain["system"], plain["data"]
    environment = Environment(
        loader=PackageLoader("latentmodal.experiments.exports", "cards"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    llm = getattr(model, "llm", None)
    return environment.get_template("bridge.md.j2").render(
        name=name,
        recipe=recipe,
        bridge=bridge,
        kinds=[part.name for part in parts],
        parameters=sum(parameter.numel() for parameter in bridge.parameters()),
        tokens=model.image_encoder.num_tokens,
        encoder=_described(ends["image_encoder"]),
        llm=None if llm is None else _described(ends["llm"]),
        llm_width=None if llm is None else llm.width,
        data=[_described(source, _SOURCE_NAMING) for source in data["train"]],
        step=step,
        sections={} if report is None else report.sections,
        shown=shown,
        format_version=FORMAT_VERSION,
        recipe_yaml=yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).rstrip(),
    )


def _without_places(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe that may be shown around: of paths on this machine the last two parts are left."""
    return {key: _public(value) for key, value in plain.items() if key not in _OF_ONE_MACHINE}


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_public(entry) for entry in value]
    if isinstance(value, str) and value.startswith(("/", "~", "file://")):
        parts = Path(value.removeprefix("file://")).expanduser()
        inside = parts.relative_to(Path.home()) if parts.is_relative_to(Path.home()) else parts
        return "/".join(inside.parts[1:][-2:] if inside.is_absolute() else inside.parts[-2:])
    return value


def _described(part: Mapping[str, Any], naming: tuple[str, ...] = _NAMING) -> str:
    """Which one it is: its kind and the keys that tell it from others of that kind."""
    told: list[str] = []
    for value in map(part.get, naming):
        if isinstance(value, str | list):
            told += [value] if isinstance(value, str) else map(str, value)
    if not told and isinstance(part.get("config"), dict):
        told = [str(part["config"].get("model_type", "of an inline configuration"))]
    return " ".join([f"{part['name']}:", *told]) if told else str(part["name"])
