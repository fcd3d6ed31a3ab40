"""Which language model, from where, in which precision, and what of it trains."""

from dataclasses import dataclass, field
from typing import Any, Literal

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8", "int4")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on a frozen language model.

    Attributes:
        rank: inner width of each adapter.
        alpha: adapters are scaled by alpha / rank.
        dropout: on the adapters' input, while training.
        targets: names of the linear layers adapted, such as q_proj; None: the attention's query
            and value projections, or what peft holds to be usual for the model.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; it must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Exactly one of `model`, `config` and `gguf` says where the language model comes from.

    Attributes:
        model: hub name, or local folder with config.json and weights.
        config: the transformers configuration itself (`model_type` and fields): random weights,
            also on the meta device.
        gguf: a GGUF file, or `package:path/in/it.gguf` inside an installed package. Exported once
            into the cache and loaded from there afterwards.
        config_overrides: fields of the transformers configuration to change, such as
            `dense_act_fn: gelu`, with which BLIP-2 runs FlanT5; not those that shapes depend on.
        tokenizer: hub name or folder; None: the model's own.
        random_init: keep the named architecture, but start from random weights.
        dtype: of the weights.
        quantization: int8 (LLM.int8, Dettmers et al. 2022, arXiv 2208.07339) or int4 (NF4 of QLoRA,
            Dettmers et al. 2023, arXiv 2305.14314) holds the linear layers in fewer bits, by
            bitsandbytes; they are frozen and cannot be sharded. Gradients reach the soft tokens.
        lora: adapters to train on the frozen model; None: no adapters.
        grad_checkpointing: recompute every block in the backward pass instead of keeping its
            activations, for a frozen model too.
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    gguf: str | None = None
    config_overrides: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    random_init: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["none", "int8", "int4"] = "none"
    lora: LoraConfig | None = None
    grad_checkpointing: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("model", "config", "gguf") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "set exactly one of model (hub name or folder), config (inline) and gguf (file); "
                f"got {' and '.join(given) or 'none'}"
            )
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config has no model_type; add one, e.g. model_type: llama")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown; choose from {', '.join(DTYPES)}")
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(
                f"quantization={self.quantization!r} is unknown; choose from "
                f"{', '.join(QUANTIZATIONS)}"
            )
        if self.quantization != "none" and (self.random_init or self.config is not None):
            raise ValueError(
                f"quantization={self.quantization!r} needs weights to quantise, these are random: "
                "give model or gguf without random_init, or quantization: none"
            )
