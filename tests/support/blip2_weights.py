"""BLIP-2 of random weights as each side has it, and how converted files are looked at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from latentmodal.encoders import TimmImageConfig
from latentmodal.experiments import weights
from latentmodal.experiments.exports.blip2 import Options
from latentmodal.experiments.systems.generation import GenerationConfig
from latentmodal.experiments.systems.parts import BRIDGE_CHOICES
from latentmodal.experiments.training.freeze import FreezePlan
from latentmodal.experiments.weights import convert
from latentmodal.llm import CausalConfig, PromptTemplate, Seq2SeqConfig
from one_line import one_line

State = dict[str, Tensor]
Train = Callable[..., Path]

PIXELS_BCHW = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS_BT = torch.tensor([[4, 19, 0, 0, 0, 0], [5, 6, 7, 8, 9, 19]])
VOCAB = 40

EVA: dict[str, Any] = {
    "model": "eva_giant_patch14_clip_224", "image_size": 32, "features": "penultimate",
    "resize": "squash",
    "model_kwargs": {
        "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2
    },
}  # fmt: skip
QFORMER: dict[str, Any] = {
    "num_queries": 3, "width": 16, "layers": 3, "heads": 2, "mlp_dim": 24, "dropout": 0.0,
    "max_positions": 12,
}  # fmt: skip
TUNED = 'freeze={"image_encoder.*": 1.0}'
CNN = (
    "system.image_encoder={model: test_resnet, image_size: null, features: last, resize: null, "
    "weights: null, model_kwargs: null}"
)
OPT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 20, "num_hidden_layers": 1, "ffn_dim": 8, "dropout": 0.0,
    "num_attention_heads": 2, "max_position_embeddings": 32, "word_embed_proj_dim": 20,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 19,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 20, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2,
    "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def speaker(kind: str, tokenizer: Path | None = None, seed: int = 0, **llm: Any) -> Any:
    """A generation model of random weights, both ends frozen."""
    torch.manual_seed(seed)
    fields = OPT if kind == "opt" else T5
    config = {"model_type": kind, **fields, **llm}
    language = CausalConfig if kind == "opt" else Seq2SeqConfig
    model = GenerationConfig(
        image_encoder=TimmImageConfig(**EVA),
        bridge=BRIDGE_CHOICES["qformer"](**QFORMER),
        llm=language(config=config, tokenizer=str(tokenizer)),
    ).build_model()
    FreezePlan({"image_encoder.*": "frozen", "llm.*": "frozen"}).apply(model)
    return shaken(model)


def shaken(model: Any) -> Any:
    """No weight zero or one, which would hide one that was forgotten."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def blip2(kind: Any, folder: Path, text: Any = None) -> Any:
    """A class of transformers' with random weights, saved as the hub lays it out."""
    torch.manual_seed(3)
    config = Blip2Config(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
        },
        qformer_config={
            "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
            "intermediate_size": 24, "vocab_size": 21, "max_position_embeddings": 12,
            "use_qformer_text_input": kind is Blip2ForImageTextRetrieval,
        },
        text_config=text or {"model_type": "opt", **OPT},
        num_query_tokens=3,
        image_text_hidden_size=8,
    )  # fmt: skip
    model = shaken(kind(config))
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):  # EVA has no key bias
            parameter.data[32:64] = 0
    model.save_pretrained(folder)
    return model


def give(monkeypatch: pytest.MonkeyPatch, model: nn.Module, end: str | None = None) -> None:
    """Make `model` what any run holds."""
    config = SimpleNamespace(prompt=PromptTemplate(end=end))
    system = SimpleNamespace(model=model, config=config)
    monkeypatch.setattr(weights, "_load", lambda source: system)


def lavis_of(file: Path) -> State:
    content = torch.load(file, weights_only=True)
    assert list(content) == ["model"]
    state: State = content["model"]
    return state


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def refusal(*arguments: Any, **options: Any) -> str:
    source, target, to = arguments
    form = options.pop("form", "run")
    message = one_line(lambda: convert(source, target, to, form=form, options=Options(**options)))
    assert not target.exists()
    return message


def same_epsilon(theirs: Any) -> Any:
    """LAVIS and ours have 1e-5 here, transformers 1e-6."""
    theirs.vision_model.post_layernorm.eps = 1e-5
    return theirs.eval()
