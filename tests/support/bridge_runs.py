"""Runs that train a bridge between a minute vision transformer and a minute Llama."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from byte_llama import save_byte_llama
from command_line import main

PATCHES, WIDTH, LLM_WIDTH = 4, 8, 16
TOWER = {"embed_dim": WIDTH, "depth": 1, "num_heads": 2, "class_token": False, "global_pool": "avg"}

BRIDGES = {
    "chain": "{name: chain, parts: [{name: average_pool, num_output_tokens: 1}, {name: mlp}]}",
    "mlp": "{name: mlp}",
    "resampler": "{name: resampler, num_queries: 3, layers: 1, heads: 2, head_dim: 4}",
    "qformer": "{name: qformer, num_queries: 2, width: 8, layers: 1, heads: 2, mlp_dim: 8}",
}

RECIPE = """
name: to_export
description: a run to take a bridge from
run_dir: FOLDER/KIND
system:
  name: generation
  image_encoder:
    name: timm
    model: vit_tiny_patch16_224
    image_size: 32
    weights: FOLDER/tower.safetensors
    model_kwargs: TOWER
  bridge: BRIDGE
  llm: {name: causal, model: FOLDER/llm}
  prompt: {text: "{image}{bos}{answer}{eos}", max_text_tokens: 64}
  generation: {num_beams: 1, max_new_tokens: 2}
freeze: {"image_encoder.*": frozen, "llm.*": frozen}
data:
  train: [{name: emoji, preset: tiny, split: train}]
  loader: {batch_size: 4, workers: 0}
optim: {lr: 1.0e-3}
trainer: {max_steps: 2, accelerator: cpu, checkpoint_every: 1, keep_checkpoints: 2}
evaluation:
  at_start: false
  batch_size: 50
  tasks:
    scenes: {name: captions, source: {name: emoji, preset: tiny, split: unseen_pairs}}
"""


def fit_bridge(folder: Path, kind: str) -> Path:
    """A finished run of one of `BRIDGES`; tower and language model lie beside it."""
    if not (folder / "llm").is_dir():
        save_byte_llama(folder / "llm")
        torch.manual_seed(0)
        tower = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **TOWER)
        save_file(tower.state_dict(), folder / "tower.safetensors")
    text = RECIPE.replace("BRIDGE", BRIDGES[kind]).replace("KIND", kind)
    recipe = folder / f"{kind}.yaml"
    recipe.write_text(text.replace("FOLDER", str(folder)).replace("TOWER", str(TOWER).lower()))
    assert main("fit", recipe) == 0
    return folder / kind
