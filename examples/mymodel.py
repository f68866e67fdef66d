"""A model of one's own, in one file: a small GPT.

    export PYTHONPATH=examples
    python scripts/train.py model._target_=mymodel.MyModel
    python scripts/train.py model._target_=mymodel.MyModel launch.nproc=2 strategy=tensor

It is given those settings of the configuration that its constructor names. Without its `layout` it
would be one piece, for strategies on dp and fsdp; with it tensor, pipeline and context parallelism
know where to cut. See docs/own-model.md.

B batch, T tokens, C width, H heads, D = C / H, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.model.layout import Layout


class Attend(nn.Module):
    """softmax(q k' / sqrt(D)) v: a module of its own, for context parallelism to stand in for."""

    causal, dropout = True, 0.0

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # each (B, H, T, D)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width, self.core = width // heads, Attend()
        # Three layers: one matrix of all of them could not be split by heads.
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        # -1 heads: under tensor parallelism a rank has some of them.
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return self.output(self.core(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.feedforward = Attention(width, heads), FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feedforward(self.norm2(x))


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, context: int, width: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab_size, width), nn.Embedding(context, width)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:  # 2 x (B, T) -> (B, T, C)
        return self.token(tokens) + self.position(positions)


class MyModel(nn.Module):
    layout = Layout(
        first="embedding",
        blocks="blocks",
        last="head",
        attention="attention.core",
        column=(
            "blocks.*.attention.query",
            "blocks.*.attention.key",
            "blocks.*.attention.value",
            "blocks.*.feedforward.up",
        ),
        row=("blocks.*.attention.output", "blocks.*.feedforward.down"),
        vocabulary=("embedding.token", "head.1"),
        sizes=("n_heads",),
    )

    def __init__(
        self, vocab_size: int, context: int, d_model: int = 128, n_layers: int = 4, n_heads: int = 4
    ) -> None:
        super().__init__()
        self.vocab_size, self.context, self.n_heads = vocab_size, context, n_heads
        self.embedding = Embedding(vocab_size, context, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads) for _ in range(n_layers))
        self.head = nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:  # 2 x (B, T) -> (B, T, V)
        x = self.embedding(tokens, positions)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
