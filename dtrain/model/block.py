"""A block of the Transformer: attention and the feed-forward layer, each with its residual.

    x + attention(norm(x)),  then  x + feedforward(norm(x))

B batch, T tokens, C width, H query heads, G key and value heads, D = C / H.

Sources: Vaswani et al. 2017 (1706.03762); Ainslie et al. 2023 (2305.13245: grouped queries);
Shazeer 2020 (2002.05202: SwiGLU).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.model.rotary import Rotary, rotate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "swiglu": F.silu,
}
INITIAL_STD = 0.02


class Core(nn.Module):
    """softmax(q k' / sqrt(D)) v: a module of its own, so that a strategy can stand in for it."""

    def __init__(self, causal: bool, dropout: float) -> None:
        super().__init__()
        self.causal, self.dropout = causal, dropout

    # (B, H, T, D), 2 x (B, G, T, D) -> (B, H, T, D)
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, dropout_p=dropout, enable_gqa=grouped
        )


class Attention(nn.Module):
    """Multi-head attention with H query heads that share G key and value heads."""

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, bias: bool, core: Core) -> None:
        super().__init__()
        self.head_dim = d_model // n_heads
        self.query = nn.Linear(d_model, n_heads * self.head_dim, bias=bias)
        self.key = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias)
        self.value = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias)
        self.core = core
        self.output = nn.Linear(n_heads * self.head_dim, d_model, bias=bias)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:  # (B, T, C) -> (B, T, C)
        q, k, v = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        y: Tensor = self.output(self.core(q, k, v).transpose(1, 2).flatten(2))
        return y

    # (B, T, h * D) -> (B, h, T, D); h is this rank's share of the heads
    def _heads(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers around an activation; SwiGLU gates the first with a third."""

    def __init__(self, d_model: int, d_ff: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.gate = nn.Linear(d_model, d_ff, bias=bias) if activation == "swiglu" else None
        self.down = nn.Linear(d_ff, d_model, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        if self.gate is None:
            hidden = self.activation(self.up(x))
        else:
            hidden = self.activation(self.gate(x)) * self.up(x)
        y: Tensor = self.down(hidden)
        return y


class Block(nn.Module):
    """Attention and the feed-forward layer, with norms before (GPT) or after (BERT) them."""

    def __init__(
        self,
        attention: Attention,
        feedforward: nn.Module,
        norms: tuple[nn.Module, nn.Module],
        dropout: float,
        norm_first: bool,
    ) -> None:
        super().__init__()
        self.attention, self.feedforward = attention, feedforward
        self.norm1, self.norm2 = norms
        self.dropout, self.norm_first = nn.Dropout(dropout), norm_first

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:  # (B, T, C) -> (B, T, C)
        if self.norm_first:
            x = x + self.dropout(self.attention(self.norm1(x), rotary))
            x = x + self.dropout(self.feedforward(self.norm2(x)))
        else:
            x = self.norm1(x + self.dropout(self.attention(x, rotary)))
            x = self.norm2(x + self.dropout(self.feedforward(x)))
        return x
