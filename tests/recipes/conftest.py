"""Tiny recipes shaped like CLIP and SigLIP, on a few pictures of their own; recipes and bases."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from latentmodal.encoders import TimmImageConfig
from latentmodal.experiments.data.shard_writer import write_shards
from latentmodal.experiments.recipe import find_recipe, load_recipe, to_plain
from latentmodal.experiments.training.fit import fit

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p"]

CLIP = """
name: tiny-clip
system:
  name: contrastive
  image_encoder:
    name: timm
    model: vit_base_patch16_clip_224.openai
    image_size: 32
    activation: quick_gelu
    model_kwargs: {patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}
  text_encoder:
    name: transformer
    vocab_size: 20
    context_length: 8
    width: 16
    depth: 2
    heads: 2
    eot_id: 19
  tokenizer: {name: transformers, model: TOKENIZER, context_length: 8}
  head: {embed_dim: 24}
data:
  train: [{name: shards, urls: SHARDS}]
  loader: {batch_size: 4, workers: 0, shuffle_window: 4}
trainer: {max_steps: 2, accelerator: cpu, log_every: 1}
run_dir: RUN
"""

SIGLIP = """
base: clip.yaml
name: tiny-siglip
system:
  image_encoder: {model: vit_base_patch16_siglip_224, activation: gelu_tanh}
  text_encoder:
    width: 32
    causal: false
    pooling: last
    activation: gelu_tanh
    layer_norm_eps: 1.0e-6
  tokenizer: {trim: false}
  head: {embed_dim: 32, image_projection: none, text_bias: true, init_logit_bias: -10.0}
  loss: sigmoid
"""

# BLIP-2's kind of tower, with weights of its own: a frozen tower comes from somewhere.
ALIGNMENT = """
name: tiny-alignment
system:
  name: alignment
  image_encoder:
    name: timm
    model: eva_giant_patch14_clip_224
    weights: EVA
    image_size: 32
    features: penultimate
    resize: squash
    model_kwargs: {patch_size: 8, embed_dim: 32, depth: 3, num_heads: 2, mlp_ratio: 2}
  bridge:
    name: qformer
    num_queries: 3
    width: 16
    layers: 3
    heads: 2
    mlp_dim: 24
    dropout: 0.0
    max_positions: 12
  tokenizer: {name: transformers, model: TOKENIZER-led, context_length: 6}
  embed_dim: 8
freeze: {"image_encoder.*": frozen}
data:
  train: [{name: shards, urls: SHARDS}]
  loader: {batch_size: 4, workers: 0, shuffle_window: 4}
trainer: {max_steps: 2, accelerator: cpu, log_every: 1}
run_dir: RUN
"""


def flat(node: Any, key: str = "") -> dict[str, Any]:
    """A nested mapping by dotted keys; lists stay whole."""
    if not isinstance(node, Mapping):
        return {key: node}
    items = [flat(value, f"{key}.{name}" if key else str(name)) for name, value in node.items()]
    return {inner: value for item in items for inner, value in item.items()}


def base_name(name: str) -> str | None:
    base: str | None = yaml.safe_load(find_recipe(name).read_text()).get("base")
    return base


@pytest.fixture(scope="session")
def base_of() -> Callable[[str], str | None]:
    """A shipped recipe's own `base`."""
    return base_name


@pytest.fixture(scope="session")
def changes() -> Callable[[str], dict[str, Any]]:
    """Everything in which a shipped recipe differs from its base, name and description aside.

    Evaluation tasks that only one of the two has are one entry each.
    """

    def compare(name: str) -> dict[str, Any]:
        base = base_name(name)
        assert base is not None
        new, old = to_plain(load_recipe(name)), to_plain(load_recipe(base))
        tasks, old_tasks = new["evaluation"]["tasks"], old["evaluation"]["tasks"]
        changed: dict[str, Any] = {}
        for task in tasks.keys() ^ old_tasks.keys():
            changed[f"evaluation.tasks.{task}"] = tasks.pop(task, "absent")
            old_tasks.pop(task, None)
        new, old, absent = flat(new), flat(old), object()
        return changed | {
            key: new.get(key, "absent")
            for key in new | old
            if new.get(key, absent) != old.get(key, absent) and key not in ("name", "description")
        }

    return compare


def save_tokenizer(folder: Path, template: str = "$A [EOT]") -> None:
    """Words, and an end-of-text token with the highest id, as CLIP's is."""
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "-", *WORDS])}
    vocabulary["[EOT]"] = len(vocabulary)
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, vocabulary[name]) for name in ("-", "[EOT]")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOT]"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `clip.yaml`, `siglip.yaml`, `alignment.yaml` and the data they train on."""
    folder = tmp_path_factory.mktemp("tiny_recipes")

    def png(colour: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (colour, 255 - colour, 90)).save(buffer, "PNG")
        return buffer.getvalue()

    samples = (
        {"__key__": f"{row:03d}", "png": png(15 * row), "txt": word}
        for row, word in enumerate(WORDS)
    )
    shard = write_shards(samples, folder / "shards", len(WORDS))[0]
    save_tokenizer(folder / "tokenizer")
    save_tokenizer(folder / "tokenizer-led", "- $A [EOT]")
    for name, text in (("clip", CLIP), ("alignment", ALIGNMENT)):
        text = text.replace("SHARDS", str(shard)).replace("TOKENIZER", str(folder / "tokenizer"))
        text = text.replace("EVA", str(folder / "eva.safetensors"))
        (folder / f"{name}.yaml").write_text(text.replace("RUN", str(folder / "{name}")))
    (folder / "siglip.yaml").write_text(SIGLIP)
    return folder


@pytest.fixture(scope="session")
def trained(tiny_recipes: Path) -> Callable[..., Path]:
    """`(kind, *overrides)` -> the folder of a run of two steps; each is trained once."""
    runs: dict[tuple[Any, ...], Path] = {}

    def train(kind: str, *overrides: str) -> Path:
        key = (kind, *overrides)
        if key not in runs:
            where = f"run_dir={tiny_recipes / 'runs' / str(len(runs))}"
            recipe = load_recipe(str(tiny_recipes / f"{kind}.yaml"), [where, *overrides])
            runs[key] = fit(recipe, resume=False, console=Console(file=io.StringIO()))
        return runs[key]

    return train


def save_eva(file: Path) -> None:
    """Weights of the tower of `alignment.yaml`, none zero or one."""
    torch.manual_seed(7)
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
    tower = TimmImageConfig(
        model="eva_giant_patch14_clip_224",
        image_size=32,
        features="penultimate",
        model_kwargs=kwargs,
    ).build()
    for parameter in tower.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    save_file(tower.trunk.state_dict(), file)


@pytest.fixture(scope="session")
def aligned(tiny_recipes: Path, trained: Callable[..., Path]) -> Callable[..., Path]:
    """`(*overrides)` -> an alignment run of two steps over a frozen tiny EVA."""
    if not (tiny_recipes / "eva.safetensors").exists():
        save_eva(tiny_recipes / "eva.safetensors")
    return lambda *overrides: trained("alignment", *overrides)
