"""Which language model, from where, in which precision, and what of it trains."""

from dataclasses import dataclass
from typing import Any, Literal

DTYPES = ("float32", "bfloat16", "float16")


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
        tokenizer: hub name or folder; None: the model's own.
        random_init: keep the named architecture, but start from random weights.
        dtype: of the weights.
        lora: adapters to train on the frozen model; None: no adapters.
        grad_checkpointing: recompute every block in the backward pass instead of keeping its
            activations, for a frozen model too.
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    gguf: str | None = None
    tokenizer: str | None = None
    random_init: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
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
