"""The Transformer: GPT-2, Llama, BERT and Mixtral are settings of it.

    tokens (B, T) -> Embedding -> blocks -> Head -> logits (B, T, V)

B batch, T tokens, C width (`d_model`), V vocabulary.

Sources: Vaswani et al. 2017 (1706.03762); Radford et al. 2019 (GPT-2: pre-norm, scaled residuals);
Devlin et al. 2018 (1810.04805: post-norm, segments).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dtrain.model.block import ACTIVATIONS, INITIAL_STD, Attention, Block, Core, FeedForward
from dtrain.model.layout import Layout, divisors
from dtrain.model.moe import MoE
from dtrain.model.rotary import rotary_table

NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}
POSITIONS = ("learned", "rotary")


class Embedding(nn.Module):
    """Token, position and segment embeddings; BERT also normalises their sum."""

    def __init__(
        self, sizes: tuple[int, int, int, int], norm: nn.Module, dropout: float
    ) -> None:  # V, context, segments (0: none of them), C
        super().__init__()
        vocab_size, context, segments, d_model = sizes
        self.token = nn.Embedding(vocab_size, d_model)
        self.position = nn.Embedding(context, d_model) if context else None
        self.segment = nn.Embedding(segments, d_model) if segments else None
        self.norm, self.dropout = norm, nn.Dropout(dropout)

    def forward(self, tokens: Tensor, positions: Tensor, segments: Tensor | None) -> Tensor:
        x = self.token(tokens)  # (B, T) -> (B, T, C)
        if self.position is not None:
            x = x + self.position(positions)
        if self.segment is not None:
            x = x + self.segment(torch.zeros_like(tokens) if segments is None else segments)
        return self.dropout(self.norm(x))


class Head(nn.Module):
    """Activations to logits. BERT's head has one more dense layer before the vocabulary."""

    def __init__(self, norm: nn.Module, transform: nn.Module, output: nn.Linear) -> None:
        super().__init__()
        self.norm, self.transform, self.output = norm, transform, output

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, V)
        return self.output(self.transform(self.norm(x)))


class Transformer(nn.Module):
    """A decoder (`causal=True`) or an encoder.

    Args:
        vocab_size: number of token ids V.
        context: the longest sequence, in tokens.
        d_model, n_layers, n_heads: width C, number of blocks, query heads H.
        n_kv_heads: key and value heads G; None: as many as query heads.
        d_ff: hidden units of the feed-forward layer, or of each expert; None: 4 C.
        norm, norm_eps, norm_first: kind, epsilon, and before (GPT) or after (BERT) each sublayer.
        activation: gelu, gelu_tanh or swiglu.
        position, rope_theta: learned or rotary, and the rotary base.
        causal: may a token see only those before it?
        tied: does the head share the embedding's matrix?
        bias: do the linear layers and layer norms have one?
        segments: kinds of segment embedding (BERT: 2); 0: none.
        head_transform: BERT's dense layer, activation and norm before the vocabulary; its output
            has a bias.
        outputs: what the head gives for each token instead of the vocabulary: classes, say. Never
            tied.
        dropout: probability, for embeddings, attention weights and residuals.
        n_experts: experts in place of each feed-forward layer, without biases (see `MoE`); 0: none.
        top_k, capacity_factor, balance, balance_rate: how a router chooses among them.

    Raises:
        ValueError: sizes that do not fit each other, or an unknown kind.
    """

    layout = Layout(
        first="embedding",
        blocks="blocks",
        last="head",
        column=tuple(
            f"blocks.*.{n}"
            for n in (
                "attention.query",
                "attention.key",
                "attention.value",
                "feedforward.up",
                "feedforward.gate",
            )
        ),
        row=("blocks.*.attention.output", "blocks.*.feedforward.down"),
        vocabulary=("embedding.token", "head.output"),
        attention="attention.core",
        experts="feedforward.experts",
        hidden=(("up", 1), ("gate", 1), ("down", 2)),
        sizes=("n_heads", "n_kv_heads", "d_ff"),
    )

    def __init__(
        self,
        vocab_size: int,
        context: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        d_ff: int | None = None,
        norm: str = "layernorm",
        norm_eps: float = 1e-5,
        norm_first: bool = True,
        activation: str = "gelu",
        position: str = "learned",
        rope_theta: float = 10000.0,
        causal: bool = True,
        tied: bool = True,
        bias: bool = True,
        segments: int = 0,
        head_transform: bool = False,
        outputs: int | None = None,
        dropout: float = 0.0,
        n_experts: int = 0,
        top_k: int = 2,
        capacity_factor: float | None = None,
        balance: str = "bias",
        balance_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        d_ff = 4 * d_model if d_ff is None else d_ff
        sizes = dict(
            vocab_size=vocab_size,
            context=context,
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_ff=d_ff,
        )
        sizes |= {} if outputs is None else {"outputs": outputs}
        _check_numbers(norm_eps=norm_eps, rope_theta=rope_theta)
        _check(
            sizes,
            {"segments": segments, "n_experts": n_experts},
            norm=norm,
            activation=activation,
            position=position,
        )
        self.vocab_size, self.context, self.causal = vocab_size, context, causal
        self.segments, self.outputs = segments, outputs
        self.n_layers, self.head_dim = n_layers, d_model // n_heads
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.d_ff = d_ff
        self.n_experts = n_experts
        self.rope_theta = rope_theta if position == "rotary" else None

        make_feedforward: Callable[[], nn.Module] = partial(
            FeedForward, d_model, d_ff, activation, bias
        )
        if n_experts:
            make_feedforward = partial(
                MoE,
                d_model,
                d_ff,
                activation,
                n_experts,
                top_k=top_k,
                balance=balance,
                capacity_factor=capacity_factor,
                balance_rate=balance_rate,
            )
        make_norm = partial(
            NORMS[norm], d_model, eps=norm_eps, **({"bias": bias} if norm == "layernorm" else {})
        )
        learned = context if position == "learned" else 0
        embedding_norm = nn.Identity() if norm_first else make_norm()
        self.embedding = Embedding(
            (vocab_size, learned, segments, d_model), embedding_norm, dropout
        )
        # by name, so that a pipeline stage keeps the full names of what it holds
        self.blocks = nn.ModuleDict()
        for index in range(n_layers):
            attention = Attention(d_model, n_heads, n_kv_heads, bias, Core(causal, dropout))
            norms = (make_norm(), make_norm())
            self.blocks[str(index)] = Block(
                attention, make_feedforward(), norms, dropout, norm_first
            )
        transform = nn.Sequential(nn.Linear(d_model, d_model), nn.GELU(), make_norm())
        self.head = Head(
            norm=make_norm() if norm_first else nn.Identity(),
            transform=transform if head_transform else nn.Identity(),
            output=nn.Linear(
                d_model, outputs or vocab_size, bias=head_transform or outputs is not None
            ),
        )
        if tied and outputs is None:
            self.head.output.weight = self.embedding.token.weight

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:  # (B, T) -> (B, T, V)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        rotary = (
            None
            if self.rope_theta is None
            else rotary_table(positions, self.head_dim, self.rope_theta)
        )
        x = self.embedding(tokens, positions, segments)
        for block in self.blocks.values():
            x = block(x, rotary)
        return self.head(x)

    @torch.no_grad()
    def initial(self, name: str, values: Tensor, generator: torch.Generator) -> None:
        """Fill `values`, the whole parameter `name`, as GPT-2 does: N(0, 0.02), residual layers
        scaled down.
        """
        if name.endswith("bias"):
            values.zero_()
        elif values.ndim == 1:  # a norm's gain
            values.fill_(1.0)
        else:
            residual = name.endswith(
                ("attention.output.weight", "feedforward.down.weight", "experts.down")
            )
            std = INITIAL_STD / math.sqrt(2 * self.n_layers) if residual else INITIAL_STD
            values.normal_(0.0, std, generator=generator)


def _check_numbers(**numbers: float) -> None:
    """Refuse what no formula can take."""
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"model.{name}={value} must be more than 0")


def _check(
    sizes: dict[str, int], optional: dict[str, int], *, norm: str, activation: str, position: str
) -> None:
    for least, group in ((1, sizes), (0, optional)):
        for name, size in group.items():
            if size < least:
                raise ValueError(f"model.{name}={size} must be at least {least}")
    d_model, heads, kv_heads = sizes["d_model"], sizes["n_heads"], sizes["n_kv_heads"]
    if d_model % heads:
        raise ValueError(
            f"model.n_heads={heads} does not divide d_model={d_model}: use {divisors(d_model)}"
        )
    if heads % kv_heads:
        raise ValueError(
            f"model.n_kv_heads={kv_heads} does not divide n_heads={heads}: use {divisors(heads)}"
        )
    if position == "rotary" and (d_model // heads) % 2:
        raise ValueError(
            f"rotary positions need an even head width, d_model/n_heads={d_model // heads}"
        )
    for key, value, known in (
        ("norm", norm, NORMS),
        ("activation", activation, ACTIVATIONS),
        ("position", position, POSITIONS),
    ):
        if value not in known:
            raise ValueError(f"model.{key}={value} is unknown: use {', '.join(known)}")
