"""A tiny run that converses and one that captions, untrained but whole."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from latentmodal.experiments import cli

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


def save_language_model(folder: Path) -> None:
    """A minute Llama that reads and says letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *letters])}
    bytes_ = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=bytes_, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # only plain letters are likely, so that what is said can be seen
        model.lm_head.weight.zero_()
        for number, letter in enumerate("abcdefgh"):
            model.lm_head.weight[vocabulary[letter], number] = 1.0
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def command() -> Callable[..., int]:
    """The exit code of the command line, run in this process."""

    def main(*arguments: object) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["latentmodal", *map(str, arguments)])
            try:
                cli.main()
            except SystemExit as end:
                return int(end.code or 0)
        return 0

    return main


@pytest.fixture(scope="session")
def tiny_runs(
    tmp_path_factory: pytest.TempPathFactory, emoji_cache: Path, command: Callable[..., int]
) -> Path:
    """A folder with the runs `talks` and `captions`, and their recipes."""
    runs = tmp_path_factory.mktemp("chat_runs")
    save_language_model(runs / "llm")
    for name, style in (("talks", "vicuna_v1"), ("captions", "plain")):
        text = RECIPE.replace("RUNS", str(runs)).replace("NAME", name).replace("STYLE", style)
        (runs / f"{name}.yaml").write_text(text)
        assert command("fit", runs / f"{name}.yaml") == 0
    return runs


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture in a file."""
    path = tmp_path / "red.png"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(path)
    return path
