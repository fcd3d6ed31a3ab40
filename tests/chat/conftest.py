"""A tiny run that converses and one that captions, untrained but whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from byte_llama import save_byte_llama
from command_line import main

RECIPE = """
name: NAME
description: tiny
run_dir: RUNS/NAME
system:
  name: generation
  image_encoder:
    name: timm
    model: vit_tiny_patch16_224
    image_size: 16
    model_kwargs: {embed_dim: 16, depth: 1, num_heads: 2, patch_size: 8}
  bridge: {name: linear}
  llm: {name: causal, model: RUNS/llm}
  conversation: {style: STYLE}
  generation: {num_beams: 1, max_new_tokens: 12, min_new_tokens: 12}
freeze: {"llm.*": frozen}
data:
  train: [{name: emoji, preset: tiny}]
  loader: {batch_size: 4, workers: 0, shuffle_window: 4}
optim: {lr: 1.0e-3}
trainer: {max_steps: 1, accelerator: cpu, log_every: 1, checkpoint_every: 1}
"""


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory, emoji_cache: Path) -> Path:
    """A folder with the runs `talks` and `captions`, and their recipes."""
    runs = tmp_path_factory.mktemp("chat_runs")
    # Only plain letters are likely, so that what is said can be seen.
    save_byte_llama(runs / "llm", likely="abcdefgh")
    for name, style in (("talks", "vicuna_v1"), ("captions", "plain")):
        text = RECIPE.replace("RUNS", str(runs)).replace("NAME", name).replace("STYLE", style)
        (runs / f"{name}.yaml").write_text(text)
        assert main("fit", runs / f"{name}.yaml") == 0
    return runs


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture in a file."""
    path = tmp_path / "red.png"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(path)
    return path
