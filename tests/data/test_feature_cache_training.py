"""Training from cached features is training from pixels; anything else is refused in one line."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentmodal.encoders import Features, ImageEncoder
from latentmodal.encoders.preprocess import Preprocess
from latentmodal.experiments import cli
from latentmodal.experiments.data.features.key import shard_identity
from latentmodal.experiments.data.features.store import FeatureStore
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.feature_cache import filling
from latentmodal.experiments.recipe import load_recipe
from latentmodal.experiments.systems.frozen_prefix import frozen_prefix, run_prefix
from latentmodal.experiments.systems.vision_language import VisionLanguageModel
from latentmodal.experiments.training.checkpoints import latest_checkpoint, read_checkpoint
from latentmodal.experiments.training.fit import fit as run_fit

TOWER = """
    name: timm
    model: resnet10t
    image_size: 48
    model_kwargs: {channels: [8, 8, 16, 32], stem_width: 8, output_stride: 16}
"""
DATA = """
  train:
    - {name: emoji, preset: tiny}
    - {name: emoji, preset: tiny, split: seen, weight: 0.5}
  loader: {batch_size: 8, workers: 0, shuffle_window: 16}
"""
TRAINER = "{max_steps: 6, log_every: 1, checkpoint_every: 2}"
BRIDGE = "{width: 32, layers: 2, mlp_dim: 32, heads: 2, num_input_positions: 9, dropout: 0.1}"

ALIGNMENT = f"""
base: blip2/stage1_emoji
name: cached-alignment
system:
  image_encoder: {TOWER}
  tokenizer: {{path: auto}}
  bridge: {BRIDGE}
  embed_dim: 16
data: {DATA}
trainer: {TRAINER}
evaluation: {{tasks: null}}
"""
GENERATION = f"""
base: blip2/stage2_emoji
name: cached-generation
system:
  image_encoder: {TOWER}
  bridge: {BRIDGE}
  llm: {{name: causal, gguf: null, model: LM/llm}}
  pretrained: null
data: {DATA}
trainer: {TRAINER}
evaluation: {{tasks: null}}
"""
LANGUAGE_MODEL = """
base: lm/emoji
run_dir: LM
system: {width: 32, layers: 1, heads: 2, mlp_dim: 32}
data:
  train: [{name: emoji, preset: tiny}]
  loader: {batch_size: 8, workers: 0, shuffle_window: 16}
trainer: {max_steps: 1, log_every: 1}
"""


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, emoji_cache: Path) -> Path:
    """A folder of the two recipes, and a language model for one of them."""
    folder = tmp_path_factory.mktemp("recipes")
    texts = {"lm": LANGUAGE_MODEL, "alignment": ALIGNMENT, "generation": GENERATION}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text.replace("LM", str(folder / "lm")))
    run_fit(load_recipe(str(folder / "lm.yaml")), resume=False, console=quiet())
    return folder


def cache(recipe: Path, *overrides: str, **options: Any) -> Path:
    return filling.cache_features(load_recipe(str(recipe), overrides), console=quiet(), **options)


def fit(recipe: Path, run: Path, *overrides: str, resume: bool = False) -> None:
    settings = load_recipe(str(recipe), [f"run_dir={run}", *overrides])
    run_fit(settings, resume=resume, console=quiet())


@pytest.fixture(scope="module")
def caches(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float32 cache of each recipe's tower."""
    root = tmp_path_factory.mktemp("caches")
    return {
        name: cache(recipes / f"{name}.yaml", folder=root / name, dtype="float32")
        for name in ("alignment", "generation")
    }


def test_the_command_says_where_it_wrote(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    recipe, folder = str(recipes / "alignment.yaml"), str(tmp_path / "cache")
    command = ["latentmodal", "cache", recipe, "data.train.1.weight=2", "--folder", folder]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    assert capsys.readouterr().out.splitlines()[-1] == folder
    monkeypatch.setattr(sys, "argv", [*command, "--dtype", "int8"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --dtype int8: choose from")


def losses(run: Path) -> list[float]:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return [event.value for event in events.Scalars("train/loss")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    state: dict[str, torch.Tensor] = read_checkpoint(path)["state_dict"]
    return state


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["alignment", "generation"])
def test_a_cache_trains_like_pixels(
    recipes: Path, caches: dict[str, Path], tmp_path: Path, name: str, workers: int
) -> None:
    recipe, own = recipes / f"{name}.yaml", f"data.loader.workers={workers}"
    cached = (own, f"data.features={caches[name]}")
    fit(recipe, tmp_path / "pixels", own)
    fit(recipe, tmp_path / "cached", *cached)
    assert len(losses(tmp_path / "pixels")) == 6
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "pixels"), rel=1e-6)
    ours, theirs = weights(tmp_path / "cached"), weights(tmp_path / "pixels")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6, msg=key)
    # Stopped after step 4 and taken up again.
    shutil.copytree(tmp_path / "cached", tmp_path / "resumed")
    (tmp_path / "resumed" / "finished.json").unlink()
    last = latest_checkpoint(tmp_path / "resumed" / "checkpoints")
    assert last is not None
    last.unlink()
    fit(recipe, tmp_path / "resumed", *cached, resume=True)
    again = weights(tmp_path / "resumed")
    assert all(torch.equal(again[key], ours[key]) for key in ours)


def test_half_precision_trains_nearly_alike(
    recipes: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipes / "alignment.yaml"
    folder = cache(recipe, folder=tmp_path / "half")
    assert FeatureStore(folder).manifest.dtype == "bfloat16"
    fit(recipe, tmp_path / "half_run", f"data.features={folder}")
    fit(recipe, tmp_path / "full_run", f"data.features={caches['alignment']}")
    ours, theirs = losses(tmp_path / "half_run"), losses(tmp_path / "full_run")
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=5e-3)


def test_auto_finds_what_the_command_made(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emoji_cache: Path
) -> None:
    recipe = recipes / "generation.yaml"
    monkeypatch.setenv("LATENTMODAL_CACHE", str(tmp_path))
    (tmp_path / "emoji").symlink_to(emoji_cache / "emoji")
    with pytest.raises(UserError, match=r"latentmodal cache, this recipe and overrides$"):
        fit(recipe, tmp_path / "run", "data.features=auto")
    made = cache(recipe)
    assert made.parent == tmp_path / "features"
    fit(recipe, tmp_path / "run", "data.features=auto")
    assert (tmp_path / "run" / "finished.json").exists()
    with pytest.raises(UserError, match=r"overrides and --views K$"):
        fit(recipe, tmp_path / "other", "data.features=auto", "data.augment.flip=true")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "made for something else: weights;"),
        (
            ["data.augment.scale=[0.5,1.0]"],
            r"scale was \[1.0, 1.0\], is \[0.5, 1.0\]",
        ),
        (["data.loader.max_pixels=1000"], "max_pixels was 50000000, is 1000"),
        (["data.train.1.split=unseen_pairs"], "changed or was never cached"),
        (["system.image_encoder.model_kwargs.output_stride=32"], "num_tokens was 9, is 4"),
    ],
)
def test_what_does_not_fit_is_refused(
    recipes: Path, caches: dict[str, Path], tmp_path: Path, overrides: list[str], message: str
) -> None:
    keys = [f"data.features={caches['alignment']}", *overrides]
    with pytest.raises(UserError, match=message) as refused:
        fit(recipes / "alignment.yaml", tmp_path / "run", *keys)
    assert "\n" not in str(refused.value)


def test_the_same_weights_with_another_activation_are_refused(
    recipes: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    """Nothing in the weights says what lies between them."""
    import timm.layers

    keys = [f"data.features={caches['alignment']}", f"run_dir={tmp_path}/run"]
    recipe = load_recipe(str(recipes / "alignment.yaml"), keys)
    build = type(recipe.system.image_encoder).build

    def gelu(self: Any) -> Any:
        encoder = build(self)
        for module in encoder.modules():
            for name, child in module.named_children():
                if isinstance(child, torch.nn.ReLU):
                    setattr(module, name, timm.layers.GELU())
        return encoder

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="an activation"):
        patch.setattr(type(recipe.system.image_encoder), "build", gelu)
        run_fit(recipe, resume=False, console=quiet())


def test_augmentation_needs_views(recipes: Path, tmp_path: Path) -> None:
    recipe, keys = recipes / "alignment.yaml", ("data.augment.scale=[0.5,1.0]",)
    with pytest.raises(UserError, match="give --views K"):
        cache(recipe, *keys, folder=tmp_path / "cache")
    folder = cache(recipe, *keys, folder=tmp_path / "cache", views=2)
    store = FeatureStore(folder)
    assert store.manifest.views == 2
    fit(recipe, tmp_path / "run", *keys, f"data.features={folder}")
    assert len(losses(tmp_path / "run")) == 6


def test_a_system_without_frozen_tower_has_nothing_to_cache(
    recipes: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="reads pictures only"):
        cache(tiny_recipe, "data.augment.scale=[1.0,1.0]", folder=tmp_path / "cache")
    with pytest.raises(UserError, match="the image tower trains"):
        cache(
            recipes / "alignment.yaml",
            "freeze={'image_encoder.*': 0.1}",
            folder=tmp_path / "cache",
        )


def test_a_full_disk_is_noticed_before_the_work(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(UserError, match=r"needs .* kB of disk and 10 kB are free"):
        cache(recipes / "alignment.yaml", folder=tmp_path / "cache")


def test_a_shard_of_nothing_is_no_obstacle(recipes: Path, tmp_path: Path) -> None:
    shard = tmp_path / "empty.tar"
    shard.write_bytes(bytes(10240))
    keys = (f"data.train.1={{name: shards, urls: {shard}}}", "data.train.1.weight=1.0e-9")
    recipe, folder = recipes / "alignment.yaml", tmp_path / "cache"
    cache(recipe, *keys, folder=folder)
    assert FeatureStore(folder).chunks(shard_identity(str(shard)))[0].complete
    fit(recipe, tmp_path / "run", *keys, f"data.features={folder}")


@pytest.mark.parametrize("after", [1, 4])
def test_a_stopped_command_goes_on(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Stopped before file `after` got its name, and started again."""
    recipe = recipes / "alignment.yaml"
    monkeypatch.setattr(filling, "_CHUNK_BYTES", 20 * 9 * 32 * 2)  # 20 samples a file
    whole = cache(recipe, folder=tmp_path / "whole")
    write, written = FeatureStore.write, []

    def stop(self: FeatureStore, shard: str, number: int, **parts: Any) -> None:
        if len(written) == after:
            (self.folder / f".{shard}-{number:05d}.safetensors.part").write_bytes(b"half a file")
            raise KeyboardInterrupt
        written.append(number)
        write(self, shard, number, **parts)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FeatureStore, "write", stop)
        cache(recipe, folder=tmp_path / "broken")
    broken = cache(recipe, folder=tmp_path / "broken")
    ours = {path.name: path.read_bytes() for path in broken.glob("*.safetensors")}
    theirs = {path.name: path.read_bytes() for path in whole.glob("*.safetensors")}
    assert len(theirs) > after + 1
    assert ours == theirs
    assert not list(broken.glob("*.part"))


BEHIND = "freeze={'bridge.*': frozen, 'llm.*': 1.0}"


def test_features_behind_a_frozen_bridge_go_straight_on(recipes: Path, tmp_path: Path) -> None:
    recipe = recipes / "generation.yaml"
    folder = cache(recipe, BEHIND, folder=tmp_path / "cache", dtype="float32")
    key = FeatureStore(folder).manifest.key
    assert (key.depth, key.num_tokens, key.width) == (1, 8, 32)
    fit(recipe, tmp_path / "pixels", BEHIND)
    fit(recipe, tmp_path / "cached", BEHIND, f"data.features={folder}")
    ours = losses(tmp_path / "cached")
    assert ours == pytest.approx(losses(tmp_path / "pixels"), rel=1e-5)
    shallow = cache(recipe, BEHIND, folder=tmp_path / "shallow", dtype="float32", upto="encoder")
    assert FeatureStore(shallow).manifest.key.depth == 0
    fit(recipe, tmp_path / "again", BEHIND, f"data.features={shallow}")
    assert losses(tmp_path / "again") == pytest.approx(ours, rel=1e-5)
    with pytest.raises(UserError, match=r"depth was 1, is 0"):
        fit(recipe, tmp_path / "training", f"data.features={folder}")


class Tower(ImageEncoder):
    """Every pixel is a token."""

    def __init__(self) -> None:
        super().__init__(Preprocess(size=2))
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, pixels_BCHW: torch.Tensor) -> Features:
        tokens_BND = pixels_BCHW.float().flatten(2).transpose(1, 2) * self.scale
        return Features(tokens_BND, tokens_BND[:, 0])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        raise AssertionError("it has no blocks")


class Chain(torch.nn.Module):
    """Three parts in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(
            [torch.nn.Linear(3, 4), torch.nn.Linear(4, 5), torch.nn.Linear(5, 6)]
        )

    def forward(
        self, features_BND: torch.Tensor, mask_BN: torch.Tensor | None = None
    ) -> torch.Tensor:
        for part in self.parts:
            features_BND = part(features_BND)
        return features_BND


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_features_enter_a_chain_behind_its_frozen_parts(frozen: int) -> None:
    torch.manual_seed(0)
    bridge: Any = Chain()
    model = VisionLanguageModel(Tower(), bridge, cast(Any, torch.nn.Identity()))
    model.image_encoder.requires_grad_(False)
    for part in bridge.parts[:frozen]:
        part.requires_grad_(False)
    stages = frozen_prefix(model)
    assert stages == [model.image_encoder, *bridge.parts[:frozen]]
    pixels_BCHW = torch.randint(0, 256, (2, 3, 2, 2), dtype=torch.uint8)
    model.cached_parts = frozen
    features_BND = run_prefix(stages, pixels_BCHW)
    torch.testing.assert_close(
        model.read(pixels_BCHW[..., :0, :0], features_BND), model.read(pixels_BCHW)
    )


def test_nothing_behind_what_trains_is_frozen_for_ever() -> None:
    bridge: Any = Chain()
    model = VisionLanguageModel(Tower(), bridge, cast(Any, torch.nn.Identity()))
    bridge.requires_grad_(False)
    assert frozen_prefix(model) == []
    model.image_encoder.requires_grad_(False)
    bridge.parts[1].requires_grad_(True)
    assert frozen_prefix(model) == [model.image_encoder, bridge.parts[0]]
