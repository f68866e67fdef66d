"""Mixture of experts: a router sends each token to `top_k` of E feed-forward layers.

    x (B, T, C) -> router -> k experts a token, and their weights
    rows (B T k, C), sorted by expert -> each expert its rows -> back in their places
    -> weighted sum over k

B batch, T tokens, C width, F hidden units of an expert, E experts, k experts a token, N rows of
experts.

A token's experts depend on its row alone, however the batch is divided.

Sources: Shazeer et al. 2017 (1701.06538); Fedus et al. 2021 (2101.03961: Switch, capacity); Jiang
et al. 2024 (2401.04088: Mixtral); DeepSeek-V3 2024 (2412.19437: eq. 17-20, balance within a
sequence); Wang et al. 2024 (2408.15664: balance by a bias).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, Function, FunctionCtx

from dtrain.model.block import ACTIVATIONS, INITIAL_STD
from dtrain.model.layout import StepAware

BALANCES = ("none", "loss", "bias")


class Router(nn.Linear):
    """The probability of each expert, in fp32 at least: rounding must not choose the expert."""

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, E)
        wide = torch.promote_types(x.dtype, torch.float32)
        # autocast has no meta device
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide)).softmax(-1)


class Experts(nn.Module):
    """The experts on this rank, their matrices stacked on dim 0."""

    def __init__(self, n_experts: int, d_model: int, d_ff: int, activation: str) -> None:
        super().__init__()
        self.up = _matrices(n_experts, d_ff, d_model)
        self.gate = _matrices(n_experts, d_ff, d_model) if activation == "swiglu" else None
        self.down = _matrices(n_experts, d_model, d_ff)
        self.activation = ACTIVATIONS[activation]

    # (N, C) sorted by expert, (E,) -> (N, C)
    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        parts = torch.split(x, _sizes(counts, len(x)))
        gates = [None] * len(parts) if self.gate is None else self.gate.unbind()
        # An expert with no rows computes on none: its gradient is zero, and there on every rank.
        return torch.cat(
            [
                self._one(*each)
                for each in zip(parts, self.up.unbind(), gates, self.down.unbind(), strict=True)
            ]
        )

    # (n, C) -> (n, C)
    def _one(self, x: Tensor, up: Tensor, gate: Tensor | None, down: Tensor) -> Tensor:
        hidden = F.linear(x, up)
        hidden = (
            self.activation(hidden) if gate is None else self.activation(F.linear(x, gate)) * hidden
        )
        return F.linear(hidden, down)


class MoE(StepAware, nn.Module):
    """Experts in place of a block's feed-forward layer.

    A token's output is the sum of its experts' outputs, weighted by their probabilities, which are
    divided by their sum. A single expert's probability is not divided, or no gradient would reach
    the router (Switch).

    Args:
        top_k: experts for each token.
        capacity_factor: an expert takes the first ceil(capacity_factor k T / E) tokens of a row and
            adds nothing to the others; None: it takes all.
        balance: how experts are kept equally busy: none, loss or bias.

            loss: for each row, balance_rate E / (k T) sum over experts of (tokens sent there) x
                (mean probability), weighted as T tokens' losses are. It acts through its gradient
                alone: no reported loss contains it.
            bias: a number is added to each expert's probability, only where experts are chosen.
                After each step it moves by balance_rate, up where an expert had fewer tokens than
                the mean.
        balance_rate: weight of the loss, or step of the bias.

    Raises:
        ValueError: an option is out of range.
    """

    bias: Tensor | None
    load: Tensor | None

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: str,
        n_experts: int,
        *,
        top_k: int = 2,
        capacity_factor: float | None = None,
        balance: str = "bias",
        balance_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        _check(n_experts, top_k, capacity_factor, balance, balance_rate)
        self.n_experts, self.top_k, self.capacity_factor = n_experts, top_k, capacity_factor
        self.balance, self.balance_rate = balance, balance_rate
        self.router = Router(d_model, n_experts, bias=False)
        self.experts = Experts(n_experts, d_model, d_ff, activation)
        # On the CPU whatever the default device is: `initial` gives buffers no values.
        biased = balance == "bias"
        self.register_buffer("bias", torch.zeros(n_experts, device="cpu") if biased else None)
        load = torch.zeros(n_experts, dtype=torch.long, device="cpu") if biased else None
        self.register_buffer("load", load, persistent=False)
        self.scale: Tensor | float = 1.0

    @property
    def whole_rows(self) -> bool:
        """Whether a rank needs all tokens of a row: capacity and the balance loss count them."""
        return self.capacity_factor is not None or self.balance == "loss"

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        probabilities = self.router(x)
        scores = probabilities.detach() if self.bias is None else probabilities.detach() + self.bias
        chosen = scores.topk(self.top_k).indices  # (B, T, k)
        weights = probabilities.gather(-1, chosen)
        if self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        # (B, T, E), 0 or 1
        sent = torch.zeros_like(scores, dtype=torch.long).scatter(-1, chosen, 1)
        if self.training and self.load is not None:
            # With recomputation every token counts twice: the signs in `after_step` are the same.
            self.load += sent.sum((0, 1))
        y: Tensor = self._apply_experts(x, chosen, sent)
        y = (y * weights.unsqueeze(-1)).sum(-2).to(x.dtype)
        if self.training and self.balance == "loss":
            # (B, E)
            share = sent.sum(1).to(probabilities.dtype) * self.n_experts / (self.top_k * x.shape[1])
            loss = self.balance_rate * (share * probabilities.mean(1)).sum()
            scale = self.scale * x.shape[1]
            y = _AddGradient.apply(y, loss, scale)  # type: ignore[no-untyped-call]
        return y

    def _apply_experts(self, x: Tensor, chosen: Tensor, sent: Tensor) -> Tensor:  # -> (B, T, k, C)
        expert, counts, rows = chosen, sent.sum((0, 1)), chosen.numel()
        if self.capacity_factor is not None:
            capacity = math.ceil(self.capacity_factor * self.top_k * x.shape[1] / self.n_experts)
            full = sent.cumsum(1).gather(-1, chosen) > capacity
            expert = chosen.masked_fill(full, self.n_experts)  # no expert: sorted last
            counts = sent.sum(1).clamp(max=capacity).sum(0)
            rows = sum(_sizes(counts, rows))
        order = expert.flatten().argsort(stable=True)[:rows]
        # Gathering by a permutation and summing over k are deterministic in both passes; adding by
        # token index is not.
        copies = x.unsqueeze(-2).expand(-1, -1, self.top_k, -1).reshape(-1, x.shape[-1])
        y: Tensor = self.experts(copies.index_select(0, order), counts)
        return y.new_zeros(len(copies), y.shape[-1]).index_copy(0, order, y).view(*chosen.shape, -1)

    def before_step(self, scale: Tensor) -> None:
        self.scale = scale

    @torch.no_grad()
    def after_step(self, total: Callable[[Tensor], Tensor]) -> None:
        """Move the bias by the loads of all ranks. Collective: every rank calls it."""
        if self.bias is None or self.load is None:
            return
        load = total(self.load)
        # in whole numbers, which are exact
        self.bias += self.balance_rate * (load.sum() - self.n_experts * load).sign()
        load.zero_()


class _AddGradient(Function):
    """Pass `y` through; in backward add the gradient of `scale * loss`."""

    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, loss: Tensor, scale: Tensor | float) -> Tensor:
        ctx.save_for_backward((torch.ones_like(loss) * scale).to(loss.dtype))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: BackwardCFunction, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], *ctx.saved_tensors, None


def _matrices(n_experts: int, outputs: int, inputs: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(n_experts, outputs, inputs).normal_(std=INITIAL_STD))


def _sizes(counts: Tensor, rows: int) -> list[int]:
    """Return `counts` as numbers; on the meta device, which has no values, share `rows` evenly.

    FLOPs depend on the sum alone.
    """
    if counts.is_meta:
        return [rows // len(counts) + (i < rows % len(counts)) for i in range(len(counts))]
    sizes: list[int] = counts.tolist()
    return sizes


def _check(
    n_experts: int, top_k: int, capacity_factor: float | None, balance: str, balance_rate: float
) -> None:
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"model.top_k={top_k} must be between 1 and n_experts={n_experts}")
    if capacity_factor is not None and capacity_factor <= 0:
        raise ValueError(
            f"model.capacity_factor={capacity_factor} must be more than 0, or null: no token "
            f"is dropped"
        )
    if balance not in BALANCES:
        raise ValueError(f"model.balance={balance} is unknown: use {', '.join(BALANCES)}")
    if balance_rate < 0:
        raise ValueError(f"model.balance_rate={balance_rate} must be at least 0")
