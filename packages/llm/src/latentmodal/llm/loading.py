"""Where a language model comes from: hub name, local folder, inline configuration or GGUF file."""

import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)

from latentmodal.llm.config import LanguageModelConfig, LoraConfig
from latentmodal.llm.gguf import cached_gguf

Kind = Literal["causal", "seq2seq"]

SEQ2SEQ_TYPES = ("t5",)
"""Encoder-decoders whose way from the last hidden state to the logits is known here."""

# Fields by which a causal model changes its logits after the head, and the values that do not.
_LOGIT_FIELDS: dict[str, tuple[float | None, ...]] = {
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "lm_head_multiplier": (None, 1.0),
    "final_logit_softcapping": (None, 0.0),
}


def find_source(config: LanguageModelConfig) -> str | None:
    """Hub name or folder that holds the model; None for an inline configuration.

    Raises:
        ValueError: a GGUF file that is absent or cannot be read, see `cached_gguf`; or what can be
            neither a folder here nor a name on the hub.
    """
    if config.gguf is not None:
        return str(cached_gguf(config.gguf))
    if config.model is None:
        return None
    folder = Path(config.model).expanduser()
    if not folder.is_dir():
        _check_hub_name(config.model)
        return config.model
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model={config.model!r} is a folder without config.json: give the one that "
            "save_pretrained wrote"
        )
    return str(folder)


def _check_hub_name(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(
            f"model={name!r} is neither a local folder nor the name of a model on the hub; correct "
            "the path, or train the run that writes the folder first"
        ) from None


def read_config(config: LanguageModelConfig, source: str | None, kind: Kind) -> Any:
    """The transformers configuration, known to be of this `kind`.

    Raises:
        ValueError: no such model, a model of the other kind, one not supported, or an override of
            a field that the configuration has not.
    """
    if source is None:
        assert config.config is not None
        hf_config = _inline_config(dict(config.config))
    else:
        try:
            hf_config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model={source!r} is neither a local folder nor a model the hub gives out now "
                f"({_first_line(error)}): check the name, or give the path of a downloaded folder"
            ) from error
    for name, value in config.config_overrides.items():
        if not hasattr(hf_config, name):
            raise ValueError(
                f"config_overrides: {hf_config.model_type} has no field {name!r}; its "
                "config.json lists them"
            )
        setattr(hf_config, name, value)
    _check_kind(hf_config, kind)
    return hf_config


def build_model(config: LanguageModelConfig, source: str | None, hf_config: Any, kind: Kind) -> Any:
    """The transformers model in ``config.dtype``, in training mode as it is when built fresh.

    Raises:
        ValueError: the files lack weights of the model, or cannot be read, or quantisation is
            wanted and bitsandbytes is not installed.
    """
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForSeq2SeqLM
    dtype = getattr(torch, config.dtype)
    if source is None or config.random_init:
        model = auto.from_config(hf_config, dtype=dtype)
    else:
        try:
            model, report = auto.from_pretrained(
                source,
                config=hf_config,
                dtype=dtype,
                quantization_config=_quantization(config),
                output_loading_info=True,
            )
        except OSError as error:
            raise ValueError(
                f"the weights of {source!r} cannot be loaded ({_first_line(error)}): give a "
                "folder or hub name with complete safetensors or torch weights"
            ) from error
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"{source!r} has no weights for {', '.join(missing[:3])}"
                f"{' ...' if len(missing) > 3 else ''}: it is another model's checkpoint"
            )
    # A checkpoint's own sampling settings would fill in for whatever ours leave open.
    start_id = getattr(hf_config, "decoder_start_token_id", None)
    model.generation_config = GenerationConfig(decoder_start_token_id=start_id)
    return model.train()


def _quantization(config: LanguageModelConfig) -> BitsAndBytesConfig | None:
    """How bitsandbytes is to quantise; it computes in ``config.dtype``."""
    if config.quantization == "none":
        return None
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"quantization={config.quantization!r} needs the package {package}: run "
                f"`pip install {package}`, or set quantization: none"
            )
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )


def load_tokenizer(name: str, vocab_size: int) -> Any:
    """The tokenizer of a hub name or folder.

    Raises:
        ValueError: there is none, or it has more tokens than the model has embeddings.
    """
    try:
        folder = Path(name).expanduser()
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} holds no tokenizer that can be loaded ({_first_line(error)}): set "
            "tokenizer to a hub name or a folder with tokenizer files"
        ) from error
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"tokenizer {name!r} has {len(tokenizer)} tokens, the language model embeds "
            f"{vocab_size}: set tokenizer to the one it was trained with"
        )
    return tokenizer


def add_lora(model: Any, lora: LoraConfig) -> None:
    """Put adapters into `model`, freeze everything else, and keep the adapters in float32.

    Raises:
        ValueError: peft is not installed, or no layer is called as `lora.targets` says.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("lora needs the package peft: run `pip install peft`")
    import peft

    targets = list(lora.targets) if lora.targets is not None else None
    adapters = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets
    )
    try:
        peft.inject_adapter_in_model(adapters, model)
    except ValueError as error:
        linear = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        raise ValueError(
            f"lora.targets={lora.targets} names no layer of this {model.config.model_type} model: "
            f"choose from {', '.join(sorted(linear))}"
        ) from error
    for parameter in model.parameters():
        if parameter.requires_grad:  # bfloat16 would swallow an optimiser's small steps
            parameter.data = parameter.data.float()


def _inline_config(fields: dict[str, Any]) -> Any:
    model_type = fields.pop("model_type")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        raise ValueError(
            f"config.model_type={model_type!r} is unknown to transformers; use e.g. llama, opt, t5"
        ) from error


def _check_kind(hf_config: Any, kind: Kind) -> None:
    model_type = hf_config.model_type
    if kind == "seq2seq":
        if not hf_config.is_encoder_decoder:
            raise ValueError(f"{model_type} is a decoder-only model: use name: causal")
        if model_type not in SEQ2SEQ_TYPES:
            raise ValueError(
                f"encoder-decoder {model_type} is not supported: choose a model of type "
                f"{' or '.join(SEQ2SEQ_TYPES)}, such as google/flan-t5-base"
            )
        return
    if hf_config.is_encoder_decoder:
        raise ValueError(f"{model_type} is an encoder-decoder: use name: seq2seq")
    if type(hf_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{model_type} is no causal language model: choose e.g. llama or opt")
    for field, neutral in _LOGIT_FIELDS.items():
        value = getattr(hf_config, field, None)
        if value not in neutral:
            raise ValueError(
                f"{model_type} changes its logits by {field}={value}, which is not supported: "
                "choose a model whose logits come straight from its head"
            )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
