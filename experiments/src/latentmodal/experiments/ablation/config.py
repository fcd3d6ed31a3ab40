"""The file of an ablation: what is varied, over which seeds, at which budget, and who works."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf.errors import OmegaConfBaseException

from latentmodal.experiments.choose import nearest
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.recipe import (
    ABLATIONS,
    build_config,
    merge,
    override_layer,
    read_yaml,
    recipes_dir,
    shipped_recipes,
    to_plain,
)
from latentmodal.experiments.training.config import check_choice, check_positive

ENGINES = ("local", "submitit", "ray")
MEASURES = ("steps", "samples", "tokens", "seconds", "flops")

_METRIC = re.compile(r"^[^/]+/.+$")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What every cell is given: exactly one of these."""

    steps: int | None = None
    samples: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in MEASURES if getattr(self, name) is not None]
        if len(given) != 1:
            what = " and ".join(given) or "nothing"
            raise ValueError(f"{what} given; give exactly one of {', '.join(MEASURES)}")
        check_positive(**{given[0]: getattr(self, given[0])})

    @property
    def measure(self) -> str:
        """Which of them it is."""
        return next(name for name in MEASURES if getattr(self, name) is not None)

    @property
    def amount(self) -> float:
        """How much of it."""
        return float(getattr(self, self.measure))


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """Who runs the cells.

    Attributes:
        engine: `local` processes, `submitit` (SLURM) or `ray`.
        count: cells at a time.
        threads: CPU threads of each.
        options: the engine's own: for submitit `cluster` and the parameters of its executor
            (`slurm_partition`, `timeout_min`, …), for ray those of a remote function (`num_gpus`).
    """

    engine: str = "local"
    count: int = 1
    threads: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, ENGINES)
        check_positive(count=self.count, threads=self.threads)
        if self.engine == "local" and self.options:
            raise ValueError(f"options: {next(iter(self.options))} means nothing to engine local")


@dataclass(frozen=True, kw_only=True)
class AblationSettings:
    """The keys of an ablation's file that are plain values; `AblationConfig` has all.

    Attributes:
        name: what it is called.
        base: the recipe every cell starts from: a shipped name, or a path (also beside the file).
        leave_out: coordinates not to run; an axis that is not named stands for all its values.
        seeds: each cell is run with each.
        budget: held equal for all cells.
        metrics: "section/metric" of a run's evaluation; the first decides.
        against: coordinates of the cell the others are compared with; empty for the first.
        workers: who runs the cells.
        folder: where it is kept; `{name}` is filled in.
    """

    name: str
    base: str
    leave_out: tuple[dict[str, Any], ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: BudgetConfig
    metrics: tuple[str, ...]
    against: dict[str, Any] = field(default_factory=dict)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    folder: str = "runs/ablations/{name}"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"name: '{self.name}' is to name a folder; use letters, digits and _")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"seeds: {list(self.seeds)}; give at least one, each once and 0 or more"
            )
        if not self.metrics:
            raise ValueError("metrics: is empty; name at least one, e.g. captions/CIDEr-D")
        for metric in self.metrics:
            if not _METRIC.match(metric):
                raise ValueError(
                    f"metrics: '{metric}' names no metric; write section/metric, as eval.json does"
                )


@dataclass(frozen=True, kw_only=True)
class AblationConfig(AblationSettings):
    """A whole file.

    Attributes:
        recipe: laid over the base for every cell.
        axes: by name: label -> patch of the recipe; or values, of a dotted key of the recipe or of
            a variable `${name}` that patches use. `null` takes an axis out.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """`folder` with the name filled in."""
        return Path(self.folder.replace("{name}", self.name))

    def plain(self) -> dict[str, Any]:
        """As YAML data, all defaults written out; `read_ablation` reads it back."""
        plain: dict[str, Any] = to_plain(self)
        return {key: plain[key] for key in KEYS}

    def to_yaml(self) -> str:
        """`plain` as text."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True, width=100)


KEYS: tuple[str, ...] = (
    *("name", "base", "recipe", "axes", "leave_out", "seeds"),
    *("budget", "metrics", "against", "workers", "folder"),
)
"""Of a file, in the order they are written."""


def shipped_ablations() -> list[str]:
    """Names of the ablations that come with the package."""
    return sorted(path.stem for path in (recipes_dir() / ABLATIONS).glob("*.yaml"))


def find_ablation(name: str) -> Path:
    """The file of an ablation given as a path or as a shipped name.

    Raises:
        UserError: neither exists; the message names the nearest shipped one.
    """
    short = name.removeprefix(ABLATIONS)
    for path in (Path(name), recipes_dir() / ABLATIONS / f"{short}.yaml"):
        if path.is_file():
            return path
    if name in shipped_recipes():
        raise UserError(
            f"'{name}' is a recipe: an ablation file says `base: {name}` and what to vary"
        )
    raise UserError(
        f"ablation '{name}': no such file or shipped ablation; {nearest(name, shipped_ablations())}"
    )


def read_ablation(name: str, overrides: Sequence[str] = ()) -> AblationConfig:
    """Read an ablation's file, or a shipped one, with `key=value` overrides of it.

    Raises:
        UserError: unknown, missing or ill-typed key; says file, key and remedy.
    """
    path = find_ablation(name)
    raw = read_yaml(path)
    try:
        for _, layer in override_layer(overrides):
            raw = merge(raw, _other_measure(raw, layer))
        if unknown := [key for key in raw if key not in KEYS]:
            raise ValueError(f"{unknown[0]}: no such key; {nearest(unknown[0], list(KEYS))}")
        if (path.parent / str(raw.get("base"))).is_file():
            raw["base"] = str(path.parent / raw["base"])
        # Their ${variables} are no business of OmegaConf's.
        recipe, axes = (_mapping(raw.pop(key, None) or {}, key) for key in ("recipe", "axes"))
        axes = {name: values for name, values in axes.items() if values is not None}
        settings = build_config(AblationSettings, raw)
        if not axes:
            raise ValueError("axes: is missing or empty; name at least one thing to vary")
        return AblationConfig(
            **{f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)},
            recipe=recipe,
            axes=axes,
        )
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error


def _other_measure(raw: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """An override `budget.tokens=…` takes the place of the file's `budget.steps`."""
    new, old = layer.get("budget"), raw.get("budget")
    if not isinstance(new, Mapping) or not isinstance(old, Mapping):
        return dict(layer)
    return {**layer, "budget": {**dict.fromkeys(old), **new}}


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}: expected a mapping, got {value!r}")
    return {str(name): item for name, item in value.items()}
