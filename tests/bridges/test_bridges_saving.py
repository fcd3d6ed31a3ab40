"""Tables of names, the bridge contract for every entry, and folders on disk."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentmodal.bridges import (
    COMPONENTS,
    Component,
    ContrastiveHead,
    LinearProjection,
    LinearProjectionConfig,
    build_bridge,
    load,
)
from latentmodal.bridges.component import make_config
from latentmodal.bridges.format_version import FORMAT_VERSION
from latentmodal.bridges.registry import by_name

SMALL: dict[str, dict[str, Any]] = {
    "linear": {"in_dim": 3, "out_dim": 5, "num_input_tokens": 4},
    "qformer": {
        "in_dim": 3,
        "out_dim": 5,
        "num_queries": 2,
        "width": 8,
        "layers": 3,
        "heads": 2,
        "mlp_dim": 6,
        "dropout": 0.0,
        "vocab_size": 7,
        "num_input_positions": 4,
    },
    "mlp": {"in_dim": 3, "out_dim": 5, "num_input_tokens": 4},
    "token_merge": {"in_dim": 3, "out_dim": 5, "num_input_tokens": 4},
    "pixel_shuffle": {"in_dim": 3, "out_dim": 5, "num_input_tokens": 4, "grid": [2, 2]},
    "average_pool": {"in_dim": 3, "out_dim": 3, "num_input_tokens": 4, "num_output_tokens": 1},
    "resampler": {
        "in_dim": 3,
        "out_dim": 5,
        "num_input_tokens": 4,
        "num_queries": 2,
        "layers": 1,
        "heads": 2,
        "head_dim": 2,
    },
    "c_abstractor": {
        "in_dim": 3,
        "out_dim": 5,
        "num_input_tokens": 4,
        "num_output_tokens": 1,
        "width": 4,
        "depth": 1,
    },
    "identity": {"in_dim": 3, "out_dim": 3, "num_input_tokens": 4},
    "chain": {
        "parts": [
            {"bridge": "linear", "in_dim": 3, "out_dim": 6, "num_input_tokens": 4},
            {"bridge": "linear", "in_dim": 6, "out_dim": 5, "num_input_tokens": 4},
        ]
    },
    "contrastive": {"image_dim": 3, "text_dim": 5, "embed_dim": 4, "init_logit_bias": -10.0},
    "alignment": {"width": 3, "embed_dim": 2},
}


def make(name: str) -> Component:
    return make_config(name, SMALL[name], COMPONENTS).build()


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    module = make(name).bfloat16()
    module.save_pretrained(tmp_path / "deep" / "folder")
    before = torch.get_rng_state()
    for again in (
        load(tmp_path / "deep/folder"),
        type(module).from_pretrained(tmp_path / "deep/folder"),
    ):
        assert type(again) is type(module)
        assert again.config == module.config
        assert again.state_dict().keys() == module.state_dict().keys()
        for key, value in module.state_dict().items():
            assert again.state_dict()[key].dtype == torch.bfloat16
            assert torch.equal(again.state_dict()[key], value)
        assert all(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    files = sorted(path.name for path in (tmp_path / "deep/folder").iterdir())
    assert files == ["config.json", "model.safetensors"]
    header = json.loads((tmp_path / "deep/folder/config.json").read_text())
    assert header["format_version"] == FORMAT_VERSION and header["bridge"] == name


def test_linear_projects_each_token_and_blanks_masked_ones() -> None:
    bridge = build_bridge("linear", **SMALL["linear"])
    assert isinstance(bridge, LinearProjection)
    features = torch.randn(2, 4, 3)
    expected = features @ bridge.proj.weight.T + bridge.proj.bias
    torch.testing.assert_close(bridge(features), expected)
    mask = torch.tensor([[True, False, True, True], [False] * 4])
    tokens = bridge(features, mask)
    torch.testing.assert_close(tokens[mask], expected[mask])
    assert (tokens[~mask] == 0).all()


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 4, 2), (4, 3)])
def test_linear_names_features_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="num_input_tokens=4, in_dim=3"):
        build_bridge("linear", **SMALL["linear"])(torch.randn(shape))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("qformr", {}, "bridge 'qformr' is unknown; choose from .*linear"),
        ("contrastive", {}, "bridge 'contrastive' is unknown; choose from"),
        ("linear", SMALL["linear"] | {"in_dmi": 3}, "no field 'in_dmi'; did you mean 'in_dim'"),
        ("linear", SMALL["linear"] | {"zzz": 3}, "no field 'zzz'; it has in_dim, out_dim"),
        ("linear", {"out_dim": 3}, "needs in_dim, num_input_tokens"),
        ("linear", SMALL["linear"] | {"in_dim": 2.0}, "in_dim is 2.0"),
    ],
)
def test_build_refuses(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_bridge(name, **fields)


def test_two_configs_of_one_name_are_refused() -> None:
    class Other(LinearProjectionConfig):
        pass

    with pytest.raises(ValueError, match="claimed by LinearProjectionConfig and Other"):
        by_name(LinearProjectionConfig, Other)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        fields = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in fields.items() if v != "drop"}))

    return edit


def edit_weights(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path) | {k.replace("__", "."): v for k, v in changes.items()}
        save_file({k: v for k, v in tensors.items() if v is not None}, path)

    return edit


def link_out(name: str) -> Callable[[Path], None]:
    def move(folder: Path) -> None:
        elsewhere = folder.with_name("elsewhere")
        elsewhere.mkdir()
        (folder / name).rename(elsewhere / name)
        (folder / name).symlink_to(f"../elsewhere/{name}")

    return move


def make_fifo(name: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return replace


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: holds a list"),
        (edit_config(format_version=2), "config.json: format_version 2.0.0 is newer than 1"),
        (edit_config(format_version="2.0.0"), "newer than 1.*; upgrade latentmodal-bridges$"),
        (edit_config(format_version="0.9.0"), "format_version 0.9.0 is of a time before 1.0.0"),
        (edit_config(format_version=True), "format_version is True"),
        (edit_config(format_version="drop"), "format_version is None"),
        (edit_config(format_version="1"), "format_version is '1'"),
        (
            edit_config(format_version="1.99.0", bridge="other"),
            r"bridge 'other' is unknown; .* \(format_version 1.99.0 is newer than .*; upgrade",
        ),
        (edit_config(bridge="other"), "config.json: bridge 'other' is unknown; choose from"),
        (edit_config(bridge="os.system"), "bridge 'os.system' is unknown; choose from"),
        (edit_config(in_dim="3"), "config.json: in_dim is '3'; it must be a whole number"),
        (edit_config(in_dim=True), "config.json: in_dim is True; it must be a whole number"),
        (edit_config(in_dim=10**30), "config.json: "),
        (lambda f: (f / "config.json").write_text("[" * 99_999), "config.json: is not JSON"),
        (lambda f: (f / "config.json").write_text(" " * 2**21), "is longer than 1048576 bytes"),
        (link_out("config.json"), "config.json: is a link out of its folder; put the file"),
        (link_out("model.safetensors"), "model.safetensors: is a link out of its folder"),
        (make_fifo("config.json"), r"config.json: cannot be read \(it is no regular file"),
        (edit_config(bridge="drop"), "config.json: bridge None is unknown"),
        (edit_config(in_dim="drop"), "config.json: bridge 'linear' needs in_dim"),
        (edit_config(in_dims=4), "has no field 'in_dims'; did you mean 'in_dim'"),
        (edit_config(in_dim=-1), "config.json: in_dim is -1"),
        (edit_config(in_dim=4), r"proj.weight has shape \(5, 3\), config.json says \(5, 4\)"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: cannot be read"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"\x10" * 20),
            "model.safetensors: cannot be read as safetensors",
        ),
        (edit_weights(proj__bias=None), "proj.bias is missing"),
        (edit_weights(extra=torch.ones(1)), "extra is unknown"),
        (edit_weights(proj__bias=torch.ones(5).long()), "proj.bias holds torch.int64, expected"),
    ],
)
def test_damaged_folders_are_named(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    make("linear").save_pretrained(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("qformer", {"input_norm": "no"}, "input_norm is 'no'; it must be true or false"),
        ("qformer", {"dropout": "0.1"}, "dropout is '0.1'; it must be a number"),
        ("qformer", {"vocab_size": 2.5}, "vocab_size is 2.5; it must be a whole number or null"),
        ("pixel_shuffle", {"grid": 4}, "grid is 4; it must be a list, each a whole number or null"),
        ("pixel_shuffle", {"grid": ["2", 2]}, "it must be a list, each a whole number or null"),
        ("contrastive", {"image_projection": "mlp"}, "it must be one of linear, none"),
        ("contrastive", {"init_logit_bias": []}, "it must be a number or null"),
        ("chain", {"parts": "linear"}, "parts"),
        ("chain", {"parts": [{"bridge": "linear", "in_dim": []}] * 2}, "needs out_dim"),
    ],
)
def test_fields_of_another_type_are_named(
    name: str, wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make(name).save_pretrained(tmp_path)
    edit_config(**wrong)(tmp_path)
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        load(tmp_path)


def test_parts_that_do_not_meet_are_named_with_their_file(tmp_path: Path) -> None:
    make("chain").save_pretrained(tmp_path)
    parts = [{**part} for part in SMALL["chain"]["parts"]]
    parts[1]["in_dim"] = 7
    edit_config(parts=parts)(tmp_path)
    with pytest.raises(ValueError, match=r"config.json: parts\[0\] writes tokens of width 6"):
        load(tmp_path)


def test_a_folder_of_the_hubs_cache_is_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/0123"
    make("linear").save_pretrained(snapshot)
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / f"of-{path.name}")
        path.symlink_to(f"../../blobs/of-{path.name}")
    assert load(snapshot).config == make("linear").config


def test_from_pretrained_takes_its_own_kind_only(tmp_path: Path) -> None:
    make("linear").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bridge 'linear' is unknown; choose from contrastive"):
        ContrastiveHead.from_pretrained(tmp_path)


def test_module_without_data_is_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        bridge = make("linear")
    with pytest.raises(ValueError, match=r"'proj\.weight' has no data"):
        bridge.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_failed_save_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make("linear")
    first.save_pretrained(tmp_path)

    def full_disk(self: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="disk full"):
        make("linear").save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(
        load(tmp_path).state_dict()["proj.weight"], first.state_dict()["proj.weight"]
    )
