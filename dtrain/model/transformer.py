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
SMALLEST = {
    "vocab_size": 1, "context": 1, "d_model": 1, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1,
    "d_ff": 1, "outputs": 1, "segments": 0, "n_experts": 0,
}  # fmt: skip


class Embedding(nn.Module):
    """Token, position and segment embeddings; BERT also normalises their sum."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        context: int,  # 0: no learned positions
        segments: int,
        norm: nn.Module,
        dropout: float,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, d_model)
        self.position = nn.Embedding(context, d_model) if context else None
        self.segment = nn.Embedding(segments, d_model) if segments else None
        self.norm, self.dropout = norm, nn.Dropout(dropout)

    def forward(self, tokens: Tensor, positions: Tensor, segments: Tensor | None) -> Tensor:
        x: Tensor = self.token(tokens)  # (B, T) -> (B, T, C)
        if self.position is not None:
            x = x + self.position(positions)
        if self.segment is not None:
            x = x + self.segment(torch.zeros_like(tokens) if segments is None else segments)
        x = self.dropout(self.norm(x))
        return x


class Head(nn.Module):
    """Activations to logits. BERT's head has one more dense layer before the vocabulary."""

    def __init__(self, norm: nn.Module, transform: nn.Module, output: nn.Linear) -> None:
        super().__init__()
        self.norm, self.transform, self.output = norm, transform, output

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, V)
        logits: Tensor = self.output(self.transform(self.norm(x)))
        return logits


class Transformer(nn.Module):
    """A decoder (`causal=True`) or an encoder.

    Args:
        vocab_size: number of token ids V.
        context: the longest sequence, in tokens.
        d_model: width C.
        n_layers: number of blocks.
        n_heads: query heads H.
        n_kv_heads: key and value heads G; None: as many as query heads.
        d_ff: hidden units of the feed-forward layer, or of each expert; None: 4 C.
        norm: layernorm or rmsnorm.
        norm_eps: epsilon of the norms.
        norm_first: norms stand before each sublayer (GPT) or after it (BERT).
        activation: gelu, gelu_tanh or swiglu.
        position: learned or rotary.
        rope_theta: base of the rotary positions.
        causal: a token sees only the tokens before it.
        tied: the head shares the embedding's matrix.
        bias: linear layers and layer norms have biases.
        segments: number of segment embeddings (BERT: 2); 0: none.
        head_transform: BERT's dense layer, activation and norm before the vocabulary; its output
            has a bias.
        outputs: size of the head's output for each token, such as a number of classes, instead of
            the vocabulary; never tied.
        dropout: probability, for embeddings, attention weights and residuals.
        n_experts: experts in place of each feed-forward layer, without biases (see `MoE`); 0: none.
        top_k: experts for each token.
        capacity_factor: as of `MoE`.
        balance: as of `MoE`.
        balance_rate: as of `MoE`.

    Raises:
        ValueError: sizes do not fit each other, or a kind is unknown.
    """

    layout = Layout(
        first="embedding",
        blocks="blocks",
        last="head",
        column=(
            *(f"blocks.*.attention.{name}" for name in ("query", "key", "value")),
            *(f"blocks.*.feedforward.{name}" for name in ("up", "gate")),
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
        self.vocab_size, self.context, self.d_model = vocab_size, context, d_model
        self.n_layers, self.n_heads = n_layers, n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.d_ff = 4 * d_model if d_ff is None else d_ff
        self.segments, self.outputs, self.n_experts = segments, outputs, n_experts
        self.causal = causal
        self.rope_theta = rope_theta if position == "rotary" else None
        _check_above_zero(norm_eps=norm_eps, rope_theta=rope_theta)
        _check_sizes(self)
        _check_kinds(norm=norm, activation=activation, position=position)
        self.head_dim = d_model // n_heads

        make_feedforward: Callable[[], nn.Module] = partial(
            FeedForward, d_model, self.d_ff, activation, bias
        )
        if n_experts:
            make_feedforward = partial(
                MoE,
                d_model,
                self.d_ff,
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
        self.embedding = Embedding(vocab_size, d_model, learned, segments, embedding_norm, dropout)
        # by name, so that a pipeline stage keeps the full names of what it holds
        self.blocks = nn.ModuleDict()
        for index in range(n_layers):
            attention = Attention(d_model, n_heads, self.n_kv_heads, bias, Core(causal, dropout))
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
        x: Tensor = self.embedding(tokens, positions, segments)
        for block in self.blocks.values():
            x = block(x, rotary)
        x = self.head(x)
        return x

    @torch.no_grad()
    def initial(self, name: str, values: Tensor, generator: torch.Generator) -> None:
        """Fill a whole parameter as GPT-2 does: N(0, 0.02), residual layers scaled down."""
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


def _check_above_zero(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"model.{name}={value} must be more than 0")


def _check_sizes(model: Transformer) -> None:
    for name, least in SMALLEST.items():
        if (size := getattr(model, name)) is not None and size < least:
            raise ValueError(f"model.{name}={size} must be at least {least}")
    d_model, heads = model.d_model, model.n_heads
    if d_model % heads:
        raise ValueError(
            f"model.n_heads={heads} does not divide d_model={d_model}: use {divisors(d_model)}"
        )
    if heads % model.n_kv_heads:
        raise ValueError(
            f"model.n_kv_heads={model.n_kv_heads} does not divide n_heads={heads}: "
            f"use {divisors(heads)}"
        )
    if model.rope_theta is not None and (d_model // heads) % 2:
        raise ValueError(
            f"rotary positions need an even head width, d_model/n_heads={d_model // heads}"
        )


def _check_kinds(*, norm: str, activation: str, position: str) -> None:
    for key, kind, kinds in (
        ("norm", norm, NORMS),
        ("activation", activation, ACTIVATIONS),
        ("position", position, POSITIONS),
    ):
        if kind not in kinds:
            raise ValueError(f"model.{key}={kind} is unknown: use {', '.join(kinds)}")
