"""Mixture of experts: where tokens go, what comes back, and how experts are kept equally busy."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dtrain.cost.model_size import model_size
from dtrain.model.block import FeedForward
from dtrain.model.initialize import materialize
from dtrain.model.layout import StepAware
from dtrain.model.moe import MoE
from dtrain.model.transformer import Transformer
from dtrain.parallel.precision import Precision

ROUNDING = 1e-12  # fp64, sums in another order
B, T, C, F, E = 5, 9, 8, 12, 4


@pytest.fixture(autouse=True)
def fp64() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def moe(activation: str = "swiglu", **options: object) -> MoE:
    made = MoE(C, F, activation, E, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def values() -> Tensor:
    return torch.randn(B, T, C)


def slowly(moe: MoE, x: Tensor) -> Tensor:
    """One token and one expert at a time."""
    y = torch.zeros_like(x)
    for row in range(len(x)):
        taken = [0] * E
        for t in range(x.shape[1]):
            p = (x[row, t] @ moe.router.weight.T).softmax(-1)
            scores = p if moe.bias is None else p + moe.bias
            chosen = scores.topk(moe.top_k).indices.tolist()
            whole = sum(p[e] for e in chosen) if moe.top_k > 1 else 1.0
            for e in chosen:
                taken[e] += 1
                if moe.capacity_factor and taken[e] > math.ceil(
                    moe.capacity_factor * moe.top_k * x.shape[1] / E
                ):
                    continue
                hidden = x[row, t] @ moe.experts.up[e].T
                if moe.experts.gate is None:
                    hidden = moe.experts.activation(hidden)
                else:
                    hidden = moe.experts.activation(x[row, t] @ moe.experts.gate[e].T) * hidden
                y[row, t] += p[e] / whole * (hidden @ moe.experts.down[e].T)
    return y


@pytest.mark.parametrize("capacity_factor", [None, 0.5, 1.0])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_every_token_gets_what_a_loop_gives_it(
    activation: str, top_k: int, capacity_factor: float | None
) -> None:
    ours, x = moe(activation, top_k=top_k, capacity_factor=capacity_factor), values()
    ours.bias += torch.randn(E) * 0.1
    torch.testing.assert_close(ours(x), slowly(ours, x), rtol=ROUNDING, atol=ROUNDING)


def test_what_an_expert_has_no_room_for_it_adds_nothing_to() -> None:
    ours, x = moe(top_k=1, capacity_factor=0.5), values()
    ours.bias[2] = 10.0  # all want this one; it takes ceil(0.5 * 9 / 4) = 2 tokens of a row
    assert (ours(x)[:, :2] != 0).all() and (ours(x)[:, 2:] == 0).all()


def test_equal_experts_are_one_feedforward_layer() -> None:
    dense, ours = FeedForward(C, F, "swiglu", bias=False), moe(top_k=3)
    with torch.no_grad():
        for name in ("up", "gate", "down"):
            getattr(ours.experts, name).copy_(getattr(dense, name).weight.expand(E, -1, -1))
    x = values()
    torch.testing.assert_close(ours(x), dense(x), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("capacity_factor", [None, 0.75])
def test_a_row_goes_its_way_whatever_rows_are_beside_it(capacity_factor: float | None) -> None:
    ours, x, order = moe(capacity_factor=capacity_factor), values(), torch.randperm(B)
    torch.testing.assert_close(ours(x[order]), ours(x)[order], rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(ours(x[1:2]), ours(x)[1:2], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("capacity_factor", [None, 0.75])
def test_a_causal_model_with_experts_never_looks_ahead(capacity_factor: float | None) -> None:
    model = Transformer(
        31, 16, 16, 2, 2, n_experts=E, capacity_factor=capacity_factor, balance="loss"
    )
    tokens = torch.randint(31, (3, 16))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 31
    torch.testing.assert_close(
        model(tokens)[:, :9], model(changed)[:, :9], rtol=ROUNDING, atol=ROUNDING
    )


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    ours = moe(top_k=1)
    ours.bias[2] = 10.0
    ours(values()).sum().backward()
    for parameter in ours.experts.parameters():
        assert parameter.grad[2].any() and not parameter.grad[[0, 1, 3]].any()


def test_a_single_experts_probability_is_its_weight_so_that_the_router_learns() -> None:
    ours = moe(top_k=1)
    ours(values()).square().sum().backward()
    assert ours.router.weight.grad.norm() > 1e-3


def _balance(moe: MoE, x: Tensor) -> Tensor:
    """The balance loss in words: for each row, E / (k T) sum over experts of count x mean
    probability.
    """
    total = torch.zeros(())
    for row in x:
        p = (row @ moe.router.weight.T).softmax(-1)
        count = torch.bincount(p.topk(moe.top_k).indices.flatten(), minlength=E)
        total = total + E / (moe.top_k * T) * (count * p.mean(0)).sum()
    return total


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("capacity_factor", [None, 0.75])
def test_the_balance_loss_acts_as_if_it_were_part_of_the_loss(
    capacity_factor: float | None, recomputed: bool
) -> None:
    options = {"capacity_factor": capacity_factor, "balance_rate": 0.3}
    ours, plain = moe(balance="loss", **options), moe(balance="none", **options)
    plain.load_state_dict(ours.state_dict())
    x, y, direction, scale = values().requires_grad_(), values(), values(), torch.tensor(0.125)
    other = x.detach().clone().requires_grad_()
    ours.before_step(scale)
    out = checkpoint(ours, x, use_reentrant=False) if recomputed else ours(x)
    y = plain(other)
    torch.testing.assert_close(out, y, rtol=0, atol=0)  # the loss that is shown does not hold it
    ((out * direction).sum() * scale).backward()
    ((y * direction).sum() * scale + 0.3 * _balance(plain, other) * T * scale).backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=ROUNDING, atol=ROUNDING)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=ROUNDING, atol=ROUNDING)


def test_the_balance_loss_is_least_where_experts_are_equally_busy() -> None:
    ours = moe(balance="loss", top_k=1)
    with torch.no_grad():
        ours.router.weight.zero_()
    assert _balance(ours, values()).item() == pytest.approx(B)


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_bias_rises_where_an_expert_had_too_few_tokens(recomputed: bool) -> None:
    ours, x = moe(top_k=1, balance_rate=0.25), values().requires_grad_()
    assert isinstance(ours, StepAware)
    ours.bias += torch.tensor([10.0, 0.0, 0.0, 0.0])
    out = checkpoint(ours, x, use_reentrant=False) if recomputed else ours(x)
    out.sum().backward()
    ours.eval()(x)  # what is not trained on does not count
    elsewhere = torch.tensor([0, 3 * B * T, 0, 0]) * (2 if recomputed else 1)
    ours.after_step(lambda load: load.add_(elsewhere))  # the loads: 1 : 3 : 0 : 0, the mean 1
    assert ours.bias.tolist() == [10.0, -0.25, 0.25, 0.25]
    assert not ours.load.any() and ours.bias.dtype == torch.float64


def test_the_bias_balances_what_the_router_does_not() -> None:
    ours, x, busiest = moe(balance_rate=0.003), torch.randn(64, T, C) + 0.5, []
    with torch.no_grad():
        ours.router.weight.mul_(0.3)  # probabilities apart by more than one step of the bias
    for _ in range(100):
        ours(x)
        busiest.append(ours.load.max().item() / ours.load.sum().item() * E)
        ours.after_step(lambda load: load)
    assert busiest[0] > 1.3 and max(busiest[-10:]) < 1.05  # of the mean


def test_bias_and_load_have_values_whatever_device_the_model_is_built_on() -> None:
    with torch.device("meta"):
        model = Transformer(31, 16, 16, 2, 2, n_experts=E)
    materialize(model, 0, torch.device("cpu"), torch.device("cpu"), torch.float64)
    layer = model.blocks["0"].feedforward
    assert not layer.bias.any() and not layer.load.any()
    model(torch.randint(31, (2, 16))).sum().backward()
    assert layer.load.sum() == 2 * 16 * 2
    assert (
        "blocks.0.feedforward.bias" in model.state_dict()
        and "blocks.0.feedforward.load" not in model.state_dict()
    )


def test_experts_initial_weights_are_those_of_a_dense_layer() -> None:
    with torch.device("meta"):
        model = Transformer(31, 16, 64, 8, 4, n_experts=E, activation="swiglu")
    materialize(model, 0, torch.device("cpu"), torch.device("cpu"), torch.float32)
    layer = model.blocks["3"].feedforward
    assert layer.experts.up.std().item() == pytest.approx(0.02, rel=0.02)
    assert layer.experts.gate.std().item() == pytest.approx(0.02, rel=0.02)
    # sqrt(2 * 8 layers)
    assert layer.experts.down.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert layer.router.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(
    "options", [{}, {"capacity_factor": 1.25, "balance": "loss"}, {"top_k": 1, "balance": "none"}]
)
@pytest.mark.parametrize(("activation", "matrices"), [("gelu", 2), ("swiglu", 3)])
def test_flops_are_those_of_the_experts_a_token_is_sent_to(
    activation: str, matrices: int, options: dict
) -> None:
    layers, width, hidden, vocab, seq_len = 3, 16, 20, 64, 11
    model = partial(
        Transformer,
        vocab,
        32,
        width,
        layers,
        2,
        d_ff=hidden,
        n_experts=E,
        activation=activation,
        **options,
    )
    active = 4 * width * width + E * width + options.get("top_k", 2) * matrices * width * hidden
    expected = 6 * (layers * active + vocab * width) + 12 * layers * width * seq_len
    assert model_size(model, Precision(), seq_len).flops_per_token == expected


def test_the_router_computes_in_fp32_where_all_else_is_bf16() -> None:
    ours = moe().bfloat16()
    x = values().bfloat16()
    expected = (x.float() @ ours.router.weight.float().T).softmax(-1)
    assert torch.equal(ours.router(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours.router(x), expected)
        assert ours(x).dtype == torch.bfloat16
