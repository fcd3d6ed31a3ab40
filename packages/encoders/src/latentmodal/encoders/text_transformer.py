"""The text tower of CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343).

A pre-LayerNorm transformer over token and learned position embeddings. CLIP: causal, the feature of
the end-of-text token. SigLIP: bidirectional, the feature of the last position, padding included.

Shapes: B batch, T text length, D width, H heads, K width per head.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentmodal.encoders.activations import activation_class, activation_of
from latentmodal.encoders.encoder import TextEncoder
from latentmodal.encoders.features import Features

Pooling = Literal["eot", "last", "mean", "first"]


@dataclass(frozen=True, kw_only=True)
class TextTransformerConfig:
    """Defaults are CLIP ViT-B's text tower with OpenAI's activation.

    Attributes:
        vocab_size: ids are below this.
        context_length: the longest text, in tokens.
        width, depth, heads, mlp_ratio: of the transformer.
        causal: each token sees only itself and earlier ones.
        pooling: "eot" first end-of-text token, "last" position, "mean" of the valid tokens,
            "first" position.
        activation: "gelu", "quick_gelu" or "gelu_tanh".
        layer_norm_eps: 1e-5 in CLIP, 1e-6 in SigLIP.
        mask_padding: hide padding from a bidirectional tower. SigLIP was trained without. A causal
            tower needs none: padding comes after every token that is read.
        pad_id, eot_id: of the tokenizer. `pad_id` matters only where a mask is needed and none
            is passed.
    """

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    causal: bool = True
    pooling: Pooling = "eot"
    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    mask_padding: bool = False
    pad_id: int = 0
    eot_id: int = 49407

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}.")
        if self.pooling not in get_args(Pooling):
            raise ValueError(
                f"pooling={self.pooling!r} is unknown; choose from {', '.join(get_args(Pooling))}."
            )
        if self.pooling == "eot" and not 0 <= self.eot_id < self.vocab_size:
            raise ValueError(
                f"eot_id={self.eot_id} is outside vocab_size={self.vocab_size}; "
                "set it to the tokenizer's end-of-text id."
            )
        if self.causal and self.mask_padding:
            raise ValueError("mask_padding=true has no effect on a causal tower; remove it.")
        activation_class(self.activation)

    def build(self) -> "TextTransformer":
        return TextTransformer(self)


class TextTransformer(TextEncoder):
    """Token ids (B, T), any T up to the context length, to features.

    With `causal` and "eot" pooling nothing after the end-of-text token can reach the result, so a
    batch padded only to its longest caption gives the same features as one padded to the full
    context, and costs in proportion. (Pad on the CPU: see `Tokenizer.trim`.)
    """

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.num_tokens = config.context_length
        self.vocab_size = config.vocab_size
        self.fsdp_units = (TextBlock,)
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        self.pos_embed = nn.Parameter(torch.empty(config.context_length, config.width))
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.activation = activation_of(self)
        self._grad_checkpointing = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """CLIP's initialisation: residual branches shrink with depth so that their sum does not."""
        width, depth = self.config.width, self.config.depth
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        residual_std = width**-0.5 * (2 * depth) ** -0.5
        for block in self.blocks:
            assert isinstance(block, TextBlock)
            nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attn.proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=residual_std)
            nn.init.zeros_(block.attn.qkv.bias)
            nn.init.zeros_(block.attn.proj.bias)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Features:
        """Encode token ids.

        With "eot" pooling every row must hold the end-of-text id (the tokenizers see to it); a row
        without one is pooled at its first token, as checking would stall the device.

        Raises:
            ValueError: T exceeds the context length.
        """
        length = ids_BT.shape[1]
        if length > self.num_tokens:
            raise ValueError(
                f"texts of {length} tokens exceed context_length={self.num_tokens}; "
                "give tokenizer and tower the same context length."
            )
        valid_BT = self._valid(ids_BT, mask_BT)
        hidden_mask = valid_BT[:, None, None, :] if self.config.mask_padding else None
        x_BTD = self.token_embed(ids_BT) + self.pos_embed[:length]
        for block in self.blocks:
            if self._grad_checkpointing and self.training:
                x_BTD = checkpoint(block, x_BTD, hidden_mask, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, hidden_mask)
        tokens_BTD = self.norm(x_BTD)
        return Features(tokens_BTD, self._pool(tokens_BTD, ids_BT, valid_BT), valid_BT)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self._grad_checkpointing = enable

    def _valid(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        if mask_BT is not None:
            return mask_BT.bool()
        if self.config.pooling == "eot":
            # Not `ids != pad_id`: CLIP pads with 0, which is also the id of a real token.
            positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
            return positions_T <= self._eot_position(ids_BT)[:, None]
        return ids_BT != self.config.pad_id

    def _eot_position(self, ids_BT: Tensor) -> Tensor:
        return (ids_BT == self.config.eot_id).int().argmax(dim=1)

    def _pool(self, tokens_BTD: Tensor, ids_BT: Tensor, valid_BT: Tensor) -> Tensor:
        match self.config.pooling:
            case "eot":
                rows_B = torch.arange(tokens_BTD.shape[0], device=tokens_BTD.device)
                return tokens_BTD[rows_B, self._eot_position(ids_BT)]
            case "last":
                return tokens_BTD[:, -1]
            case "first":
                return tokens_BTD[:, 0]
            case "mean":
                return masked_mean(tokens_BTD, valid_BT)


class TextBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); parameter names follow timm's `Block`."""

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = SelfAttention(config.width, config.heads, config.causal)
        self.norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio), config.activation)

    def forward(self, x_BTD: Tensor, mask_B11T: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD), mask_B11T)
        return x_BTD + self.mlp(self.norm2(x_BTD))


class SelfAttention(nn.Module):
    """Multi-head self-attention with fused projections and PyTorch's attention kernels."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, mask_B11T: Tensor | None = None) -> Tensor:
        qkv_BT3HK = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1))
        q_BHTK, k_BHTK, v_BHTK = qkv_BT3HK.permute(2, 0, 3, 1, 4).unbind(0)
        out_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BHTK, v_BHTK, attn_mask=mask_B11T, is_causal=self.causal
        )
        out: Tensor = self.proj(out_BHTK.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = activation_class(activation)()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x_BTD)))
        return out


def masked_mean(tokens_BTD: Tensor, valid_BT: Tensor) -> Tensor:
    """The mean of each row's valid tokens; zero for a row that has none."""
    weight_BT1 = valid_BT[:, :, None].to(tokens_BTD.dtype)
    return (tokens_BTD * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1).clamp(min=1)
