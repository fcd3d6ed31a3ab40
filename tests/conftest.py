"""Fixtures every room's tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Helpers that assert tell a failure as fully as a test does.
pytest.register_assert_rewrite(
    "blip2_weights", "finished_runs", "one_line", "published_layouts", "review_server"
)

CommandLine = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def emoji_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of its own with the tiny emoji scenes; nothing of the user is touched."""
    from latentmodal.experiments.data.emoji import EmojiConfig, ensure_emoji

    folder = tmp_path_factory.mktemp("cache")
    os.environ["LATENTMODAL_CACHE"] = str(folder)
    ensure_emoji(EmojiConfig(preset="tiny"), progress=False)
    return folder


TINY = """
base: clip/emoji
name: tiny
system:
  image_encoder:
    image_size: 48
    drop_path: 0.2
    model_kwargs: {channels: [8, 8, 16, 32], stem_width: 8}
  text_encoder: {width: 32, depth: 1, heads: 1}
  head: {embed_dim: 16}
data:
  train: [{name: emoji, preset: tiny}]
  loader: {batch_size: 8, workers: 0, shuffle_window: 16}
optim: {warmup_steps: 2}
trainer: {max_steps: 6, log_every: 1, checkpoint_every: 2, eval_every: 4}
evaluation:
  batch_size: 16
  tasks:
    unseen_pairs: {source: {preset: tiny}}
    swapped_captions: {source: {preset: tiny}}
    naming_unseen_style: {source: {preset: tiny}}
    naming_seen_styles: {source: {preset: tiny}}
    naming_unseen_things: {source: {preset: tiny}}
"""


@pytest.fixture(scope="session")
def tiny_clip() -> str:
    """The text of `tiny_recipe`, without a folder for its run."""
    return TINY


@pytest.fixture
def tiny_recipe(tmp_path: Path, emoji_cache: Path) -> Path:
    """A recipe file that trains a minute CLIP on the tiny scenes; runs go under `tmp_path`."""
    path = tmp_path / "tiny.yaml"
    path.write_text(f"{TINY}run_dir: {tmp_path}/run\n")
    return path


@pytest.fixture
def latentmodal() -> CommandLine:
    """Run the command line as a user would, in a process of its own."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "latentmodal.experiments.cli", *map(str, arguments)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)

    return run
