"""Folders of other times and places: older formats, newer ones, and the Hugging Face hub."""

import inspect
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from latentmodal.bridges import BRIDGES, Bridge, LinearProjection, build_bridge, load
from latentmodal.bridges.format_version import FORMAT_VERSION
from latentmodal.bridges.hub import split_address

# As format 1.0.0 had them: config.json, and the weights with their shapes.
OLDER: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "linear": (
        '{"format_version": 1, "bridge": "linear", "in_dim": 3, "out_dim": 5,'
        ' "num_input_tokens": 4}',
        {"proj.weight": (5, 3), "proj.bias": (5,)},
    ),
    "mlp": (
        '{"format_version": 1, "bridge": "mlp", "in_dim": 3, "out_dim": 5, "num_input_tokens": 4,'
        ' "depth": 2, "hidden_dim": null, "skip_tokens": 0}',
        {
            "proj.0.weight": (5, 3),
            "proj.0.bias": (5,),
            "proj.2.weight": (5, 5),
            "proj.2.bias": (5,),
        },
    ),
    "token_merge": (
        '{"format_version": 1, "bridge": "token_merge", "in_dim": 3, "out_dim": 5,'
        ' "num_input_tokens": 4, "merge": 4, "skip_tokens": 0, "input_norm": false}',
        {"proj.weight": (5, 12), "proj.bias": (5,)},
    ),
    "pixel_shuffle": (
        '{"format_version": 1, "bridge": "pixel_shuffle", "in_dim": 3, "out_dim": 5,'
        ' "num_input_tokens": 4, "factor": 2, "grid": [2, 2], "skip_tokens": 0, "depth": 1,'
        ' "hidden_dim": null}',
        {"proj.0.weight": (5, 12), "proj.0.bias": (5,)},
    ),
    "qformer": (
        '{"format_version": 1, "bridge": "qformer", "in_dim": 3, "out_dim": 5, "num_queries": 2,'
        ' "width": 8, "layers": 1, "heads": 2, "mlp_dim": 6, "cross_attention_every": 2,'
        ' "dropout": 0.0, "vocab_size": null, "max_positions": 512, "input_norm": true,'
        ' "num_input_positions": null, "init_std": 0.02, "captioning": true}',
        {
            "queries": (1, 2, 8),
            **{f"input_norm.{part}": (3,) for part in ("weight", "bias")},
            **{f"feature_kv.0.{part}.weight": (8, 3) for part in ("key", "value")},
            **{f"feature_kv.0.{part}.bias": (8,) for part in ("key", "value")},
            **{f"norm.{part}": (8,) for part in ("weight", "bias")},
            **{
                f"layers.0.{block}.{part}.weight": (8, 8)
                for block, parts in (
                    ("attention", ("query", "key", "value", "out")),
                    ("cross_attention", ("query", "out")),
                )
                for part in parts
            },
            **{
                f"layers.0.{block}.{part}.bias": (8,)
                for block, parts in (
                    ("attention", ("query", "key", "value", "out")),
                    ("cross_attention", ("query", "out")),
                )
                for part in parts
            },
            **{
                f"layers.0.{block}.norm.{part}": (8,)
                for block in ("attention", "cross_attention", "query_mlp")
                for part in ("weight", "bias")
            },
            "layers.0.query_mlp.up.weight": (6, 8),
            "layers.0.query_mlp.up.bias": (6,),
            "layers.0.query_mlp.down.weight": (8, 6),
            "layers.0.query_mlp.down.bias": (8,),
            "proj.weight": (5, 8),
            "proj.bias": (5,),
        },
    ),
    "chain": (
        '{"format_version": 1, "bridge": "chain", "parts": ['
        '{"bridge": "linear", "in_dim": 3, "out_dim": 6, "num_input_tokens": 4},'
        '{"bridge": "linear", "in_dim": 6, "out_dim": 5, "num_input_tokens": 4}]}',
        {
            "parts.0.proj.weight": (6, 3),
            "parts.0.proj.bias": (6,),
            "parts.1.proj.weight": (5, 6),
            "parts.1.proj.bias": (5,),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OLDER)
def test_an_older_folder_still_loads(name: str, tmp_path: Path) -> None:
    text, shapes = OLDER[name]
    weights = {key: torch.randn(shape) for key, shape in shapes.items()}
    (tmp_path / "config.json").write_text(text)
    save_file(weights, tmp_path / "model.safetensors")
    bridge = load(tmp_path)
    assert isinstance(bridge, Bridge) and bridge.config.name == name
    for key, value in bridge.state_dict().items():
        assert torch.equal(value, weights[key])
    tokens = bridge(torch.randn(2, 4, 3))
    assert tokens.shape == (2, bridge.num_output_tokens, 5) and tokens.isfinite().all()

    bridge.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["format_version"] == (
        FORMAT_VERSION
    )
    assert load(tmp_path / "again").config == bridge.config


def test_whoever_may_read_the_configuration_may_read_the_weights(tmp_path: Path) -> None:
    build_bridge("linear", in_dim=3, out_dim=5, num_input_tokens=4).save_pretrained(tmp_path)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_what_the_history_says_of_1_0_0_is_all_that_was_there() -> None:
    added = {"average_pool", "resampler", "c_abstractor", "identity"}
    assert set(OLDER) == set(BRIDGES) - added


def test_a_newer_minor_loads_where_it_uses_nothing_new(tmp_path: Path) -> None:
    bridge = build_bridge("linear", in_dim=3, out_dim=5, num_input_tokens=4)
    bridge.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"format_version": "1.99.0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).config == bridge.config
    (tmp_path / "config.json").write_text(json.dumps(config | {"rank": 8}))
    with pytest.raises(ValueError, match=r"no field 'rank'.*1\.99\.0 is newer than.*; upgrade"):
        load(tmp_path)


class Hub:
    """The hub's interface over folders of this machine; takes what the real one takes."""

    def __init__(self, folder: Path, real: Any) -> None:
        self.folder = folder
        self.real = real
        self.asked: list[dict[str, Any]] = []

    def check(self, name: str, repo: str, **given: Any) -> None:
        inspect.signature(getattr(self.real, name)).bind(None, repo, **given)

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.check("create_repo", repo_id, private=private, exist_ok=exist_ok)
        self.asked.append({"repo": repo_id, "private": private})
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        self.check("create_branch", repo_id, branch=branch, exist_ok=exist_ok)
        self.asked.append({"branch": branch})

    def upload_folder(self, *, repo_id: str, folder_path: Any, **more: Any) -> Any:
        inspect.signature(self.real.upload_folder).bind(
            None, repo_id=repo_id, folder_path=folder_path, **more
        )
        self.asked.append(more)
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})()

    def snapshot_download(self, repo_id: str, **more: Any) -> str:
        self.check("snapshot_download", repo_id, **more)
        self.asked.append(more)
        if not (self.folder / repo_id).is_dir():
            raise FileNotFoundError(f"no repository {repo_id}\nmore about that")
        return str(self.folder / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    fake = Hub(tmp_path / "hub", huggingface_hub.HfApi)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_to_the_hub_and_back(hub: Hub) -> None:
    bridge = build_bridge("linear", in_dim=3, out_dim=5, num_input_tokens=4)
    url = bridge.push_to_hub("hf://me/my-bridge@v2", private=True, message="first")
    assert url == "https://hub/me/my-bridge/commit/1"
    assert hub.asked == [
        {"repo": "me/my-bridge", "private": True},
        {"branch": "v2"},
        {"revision": "v2", "commit_message": "first"},
    ]
    for again in (
        load("hf://me/my-bridge@v2"),
        LinearProjection.from_pretrained("hf://me/my-bridge"),
    ):
        assert again.config == bridge.config
        assert torch.equal(again.state_dict()["proj.weight"], bridge.state_dict()["proj.weight"])
    assert hub.asked[3:] == [
        {"revision": revision, "allow_patterns": ["config.json", "model.safetensors"]}
        for revision in ("v2", None)
    ]


def test_hf_may_be_left_out_where_only_a_repository_can_be_meant(hub: Hub) -> None:
    bridge = build_bridge("linear", in_dim=3, out_dim=5, num_input_tokens=4)
    assert bridge.push_to_hub("me/my-bridge") == "https://hub/me/my-bridge/commit/1"
    with pytest.raises(ValueError, match=r"cannot be read \(no such file\); .*hf://owner/name"):
        load("me/my-bridge")
    assert "allow_patterns" not in hub.asked[-1]


def test_a_repository_of_something_else_is_one_line(hub: Hub) -> None:
    (hub.folder / "me/other").mkdir(parents=True)
    (hub.folder / "me/other/config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"format_version is None, .* not a folder written by"):
        load("hf://me/other")


def test_what_the_hub_refuses_is_one_line(hub: Hub) -> None:
    with pytest.raises(ValueError, match="hf://me/none: cannot be fetched") as caught:
        load("hf://me/none")
    assert str(caught.value) == "hf://me/none: cannot be fetched (no repository me/none)"


@pytest.mark.parametrize(
    "address",
    ["", "hf://", "hf://owner", "hf://a/b/c", "hf://../..", "hf://a/..", "a/b@../c", "/a/b"],
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match="is no address; write hf://owner/name"):
        split_address(address)


def test_without_the_hub_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    bridge = build_bridge("linear", in_dim=3, out_dim=5, num_input_tokens=4)
    for step in (load, bridge.push_to_hub):
        with pytest.raises(ValueError, match="needs huggingface_hub; pip install huggingface_hub"):
            step("hf://me/my-bridge")


def test_a_folder_that_is_none_names_the_other_way(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_pretrained, or hf://owner/name"):
        load(tmp_path / "my-bridge")
