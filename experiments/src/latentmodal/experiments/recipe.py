"""Recipes: a typed schema, base + smallest diff, command-line overrides, one clear line on error.

A recipe file is YAML. `base: NAME` starts from another recipe; every other key overrides it. A
component is a mapping with a `name` out of an explicit table; naming another component than the
base does replaces the whole mapping, so that keys of the old one do not linger. `null` puts a key
that cannot be empty back to its default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from latentmodal.experiments.choose import name_in, nearest, pick
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.schema import Recipe

PATTERNS = ("freeze", "optim.layer_decay")
"""Mappings whose first match decides: patterns of a recipe stand before those of its base, and
`null` takes one of them out."""

ABLATIONS = "ablations/"
"""Where among the shipped recipes the files of ablations lie."""

T = TypeVar("T")
Layer = tuple[str, dict[str, Any]]  # (where it was written, raw mapping)


def recipes_dir() -> Path:
    """The folder of shipped recipes, in a wheel or in the source tree."""
    packaged = Path(__file__).parent / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "recipes"


def shipped_recipes() -> list[str]:
    """Names of all shipped recipes, e.g. `clip/emoji`; files of ablations are none."""
    root = recipes_dir()
    names = (path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith(ABLATIONS))


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """The file of a recipe given as a path (also relative to `beside`) or as a shipped name.

    Raises:
        UserError: neither exists; the message names the nearest shipped recipe.
    """
    candidates = [Path(name), recipes_dir() / f"{name}.yaml"]
    if beside is not None:
        candidates.insert(0, beside / name)
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        f"recipe '{name}': no such file or shipped recipe; {nearest(name, shipped_recipes())}"
    )


def load_recipe(
    name: str,
    overrides: Sequence[str] = (),
    *,
    patches: Sequence[Layer] = (),
    beside: Path | None = None,
) -> Recipe:
    """Read a recipe with its bases and `key=value` overrides into typed configs.

    Args:
        patches: raw layers between the recipe and the overrides, each with where it was written.
        beside: a folder that a path may be relative to.

    Raises:
        UserError: unknown, missing, duplicate or ill-typed key; says file, key and remedy.
    """
    layers = [
        *_read_chain(find_recipe(name, beside)),
        *patches,
        *override_layer(overrides),
    ]
    merged: dict[str, Any] = {}
    try:
        for _, raw in layers:
            merged = merge(merged, raw)
        if "system" in merged:
            merged["system"] = _with_seed(merged["system"], str(merged.get("seed", 0)))
        return build_config(Recipe, merged)
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(_explain(error, layers)) from error


def build_config(schema: type[T], raw: Mapping[str, Any], key: str = "") -> T:
    """Turn a raw mapping into an instance of the dataclass `schema`, checking names and types.

    Raises:
        ValueError: an unknown component name, or a value a config's own check refuses.
        OmegaConfBaseException: an unknown, missing or ill-typed key.
    """
    hints = get_type_hints(schema)
    flat: dict[str, Any] = {}
    nested: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    for name, value in raw.items():
        field, path = fields.get(name), f"{key}{name}"
        if field is None:
            flat[name] = value
        elif value is None:
            if type(None) in get_args(hints[name]):
                flat[name] = None
            elif not _has_default(field):
                raise ValueError(f"{path}: missing; give it a value")
        elif "table" in field.metadata:
            nested[name] = _build_component(field, value, path)
        elif dataclass_type := _dataclass_in(hints[name]):
            nested[name] = build_config(dataclass_type, _mapping(value, path), f"{path}.")
        else:
            flat[name] = value
    return _instantiate(schema, flat, nested, key)


def _is_list(hint: Any) -> bool:
    """Whether a list may be given, or None and a list."""
    return any(get_origin(each) in (list, tuple) for each in (hint, *get_args(hint)))


def _build_component(field: dataclasses.Field[Any], value: Any, path: str) -> Any:
    table, many = field.metadata["table"], field.metadata.get("many")
    if many == "list":
        if not isinstance(value, list):
            raise ValueError(f"{path}: expected a list of components, got {value!r}")
        return tuple(_component(table, item, f"{path}[{i}]") for i, item in enumerate(value))
    if many == "map":
        items = _mapping(value, path).items()
        return {name: _component(table, item, f"{path}.{name}") for name, item in items if item}
    return _component(table, value, path)


def _component(table: Mapping[str, type], value: Any, path: str) -> Any:
    node = dict(_mapping(value, path))
    if "name" not in node:
        raise ValueError(f"{path}.name: missing; choose from {', '.join(sorted(table))}")
    return build_config(pick(table, node.pop("name"), f"{path}.name"), node, f"{path}.")


def _instantiate(schema: type[T], flat: dict[str, Any], nested: dict[str, Any], key: str) -> T:
    """Let OmegaConf check the plain keys, then construct; nested configs are checked already."""
    fields = dataclasses.fields(schema)  # type: ignore[arg-type]
    hints = get_type_hints(schema)
    plain: list[tuple[str, Any, Any]] = [
        (
            f.name,
            hints[f.name],
            dataclasses.field(default=f.default, default_factory=f.default_factory),
        )
        for f in fields
        if "table" not in f.metadata and (_dataclass_in(hints[f.name]) is None)
    ]
    checker = dataclasses.make_dataclass(schema.__name__, plain, kw_only=True)
    known = [f.name for f in fields]
    if unknown := [name for name in flat if name not in known]:
        raise ValueError(f"{key}{unknown[0]}: no such key; {nearest(unknown[0], known)}")
    empty = {name: value for name, value in flat.items() if name not in {p[0] for p in plain}}
    try:
        config = OmegaConf.merge(
            OmegaConf.structured(checker), {k: v for k, v in flat.items() if k not in empty}
        )
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        name = error.full_key or ""
        what = str(error).splitlines()[0]
        if name in flat and _is_list(hints[name]) and not isinstance(flat[name], list | tuple):
            what = f"expected a list, got {flat[name]!r}: write [{flat[name]}]"
        raise ValueError(f"{f'{key}{name}' if name else key.rstrip('.')}: {what}") from error
    assert isinstance(values, dict)
    arguments = {**{str(k): _frozen(v) for k, v in values.items()}, **empty, **nested}
    # OmegaConf's "???" stands for a value still to be given.
    if absent := [
        f.name for f in fields if arguments.get(f.name, None if _has_default(f) else "???") == "???"
    ]:
        raise ValueError(f"{key}{absent[0]}: missing; give it a value")
    try:
        return schema(**arguments)
    except ValueError as error:
        raise ValueError(f"{key.rstrip('.')}: {error}" if key else str(error)) from error


def _has_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass a field holds, also inside `X | None`."""
    options = getattr(hint, "__args__", ()) or (hint,)
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: expected a mapping, got {value!r}")
    return value


def merge(base: Mapping[str, Any], diff: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """Lay `diff` over `base`, both raw mappings, by the rules above."""
    merged = dict(base)
    if key.removesuffix(".") in PATTERNS:
        merged = {name: merged.get(name) for name in (*diff, *base)}
    for name, value in diff.items():
        merged[name] = _merge_value(base.get(name), value, f"{key}{name}")
    if key.removesuffix(".") in PATTERNS:
        merged = {name: value for name, value in merged.items() if value is not None}
    return merged


def _merge_value(old: Any, new: Any, path: str) -> Any:
    if not isinstance(new, Mapping):
        return new
    if isinstance(old, Mapping):
        replaced = "name" in new and new["name"] != old.get("name")
        return dict(new) if replaced else merge(old, new, f"{path}.")
    if isinstance(old, list) and new and all(str(name).isdigit() for name in new):
        return _merge_items(old, new, path)
    return new


def _merge_items(old: list[Any], new: Mapping[str, Any], path: str) -> list[Any]:
    """Override items of a list by their number, as `data.train.0.weight=2` does."""
    merged = list(old)
    for name, value in new.items():
        index = int(name)
        if index >= len(merged):
            raise ValueError(f"{path}.{name}: no such item; the list has {len(merged)}, from 0 on")
        merged[index] = _merge_value(merged[index], value, f"{path}.{name}")
    return merged


def _with_seed(node: Any, seed: str) -> Any:
    """`{seed}` in the system's texts is the run's own: a chain of runs keeps its seeds apart."""
    if isinstance(node, Mapping):
        return {name: _with_seed(value, seed) for name, value in node.items()}
    if isinstance(node, list):
        return [_with_seed(value, seed) for value in node]
    return node.replace("{seed}", seed) if isinstance(node, str) else node


def _read_chain(path: Path, seen: tuple[Path, ...] = ()) -> list[Layer]:
    """The recipe's layers, the outermost base first."""
    if path.resolve() in seen:
        raise UserError(
            f"{path}: base: the chain of bases comes back to this file; break the circle"
        )
    raw = read_yaml(path)
    base = raw.pop("base", None)
    if base is None:
        return [(str(path), raw)]
    try:
        found = find_recipe(str(base), beside=path.parent)
    except UserError as error:
        raise UserError(f"{path}: base: {error}") from error
    return [*_read_chain(found, (*seen, path.resolve())), (str(path), raw)]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping, its references unresolved.

    Raises:
        UserError: unreadable, or no mapping.
    """
    try:
        node = OmegaConf.load(path)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{path}: a recipe is a mapping of keys; this file holds a list")
    container = OmegaConf.to_container(node, resolve=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def override_layer(overrides: Sequence[str]) -> list[Layer]:
    """`key=value` items as a layer over a recipe, or none where there are none."""
    for item in overrides:
        if "=" not in item.lstrip("="):
            raise UserError(f"'{item}': an override is key=value, for example seed=1")
    if not overrides:
        return []
    try:
        raw = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"overrides {' '.join(overrides)}: {str(error).splitlines()[0]}") from error
    assert isinstance(raw, dict)
    return [("command line", {str(key): value for key, value in raw.items()})]


def _explain(error: Exception, layers: Sequence[Layer]) -> str:
    """Prefix an error `key: what is wrong` with the last place that wrote the key."""
    message = str(error).splitlines()[0]
    parts = message.split(":")[0].replace("[", ".").replace("]", "").split(".")
    for depth in range(len(parts), 0, -1):
        for where, raw in reversed(layers):
            if _has(raw, parts[:depth]):
                return f"{where}: {message}"
    return f"{layers[-1][0]}: {message}"


def _has(node: Any, parts: Sequence[str]) -> bool:
    for part in parts:
        if isinstance(node, Mapping) and part in node:
            node = node[part]
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            return False
    return True


def to_plain(config: Any) -> Any:
    """A config as plain YAML data, each component with its `name`; undoes `build_config`."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            f.name: _plain_field(f, getattr(config, f.name)) for f in dataclasses.fields(config)
        }
    if isinstance(config, Mapping):
        return {str(key): to_plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(value) for value in config]
    return config


def _plain_field(field: dataclasses.Field[Any], value: Any) -> Any:
    table = field.metadata.get("table")
    if table is None or value is None:
        return to_plain(value)
    if isinstance(value, Mapping):
        return {k: {"name": name_in(table, v), **to_plain(v)} for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [{"name": name_in(table, v), **to_plain(v)} for v in value]
    return {"name": name_in(table, value), **to_plain(value)}


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(to_plain(recipe), sort_keys=False, allow_unicode=True, width=100)
