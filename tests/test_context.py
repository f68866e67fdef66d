"""Context parallel: attention over slices equals attention over the whole, and so does all of
training.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import (
    STRATEGIES,
    TOLERANCE,
    Case,
    MaskedToken,
    NextToken,
    Outcome,
    assert_equal,
    reference,
    train,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dtrain.model.layout import Layout
from dtrain.model.transformer import Transformer
from dtrain.parallel.plan import Plan
from dtrain.parallel.strategy import Strategy
from dtrain.run.assemble import COMPILERS
from dtrain.strategy.allreduce import AllReduce
from dtrain.strategy.context.ring import Ring
from dtrain.strategy.context.strategy import ContextParallel
from dtrain.strategy.fsdp import FSDP
from dtrain.strategy.replicate import Replicate
from dtrain.strategy.tensor.strategy import TensorParallel
from dtrain.task.batch import Batch

BF16_TOLERANCE = 0.02  # bf16 keeps 8 bits: inputs and results are rounded to 2^-9, a few times over
RING = partial(ContextParallel)
UNBALANCED = partial(ContextParallel, balanced=False)
ULYSSES = partial(ContextParallel, method="ulysses")


class Core(nn.Module):
    """The oracle: torch's own attention, on all tokens."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.dropout = causal, 0.0

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)


class Attending(nn.Module):
    """The smallest model with a Layout for attention: one block that is attention alone."""

    layout = Layout(blocks="blocks", attention="core")

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"core": Core(causal)})])


def errors(
    strategy: partial[ContextParallel], causal: bool, sizes: tuple[int, ...], dtype: torch.dtype
) -> list[float]:
    """Errors of y, dq, dk, dv on this rank, relative to their norms over the whole sequence,
    computed in fp64.
    """
    batch, tokens, heads, kv_heads, width = sizes
    plan = Plan.of([strategy()], dist.get_world_size()).connect()
    generator = torch.Generator().manual_seed(sum(sizes))
    whole = {
        name: torch.randn(batch, tokens, h, width, generator=generator, dtype=torch.float64).to(
            dtype
        )
        for name, h in (("q", heads), ("k", kv_heads), ("v", kv_heads), ("dy", heads))
    }
    model = Attending(causal)
    expected = attended(model, {name: x.double() for name, x in whole.items()})
    ours = attended(plan.strategies[0].parallelize(model, plan), plan.shard(whole))
    mine = plan.shard({name: x.transpose(1, 2) for name, x in expected.items()})
    return [
        ((ours[name].double() - mine[name].transpose(1, 2)).norm() / expected[name].norm()).item()
        for name in expected
    ]


def attended(model: nn.Module, batch: Batch) -> Batch:
    q, k, v, dy = (x.transpose(1, 2).detach().requires_grad_() for x in batch.values())
    y = model.blocks[0]["core"](q, k, v)
    return {"y": y.detach()} | dict(
        zip(("dq", "dk", "dv"), torch.autograd.grad(y, (q, k, v), dy), strict=True)
    )


SLICED = [
    pytest.param(
        strategy,
        causal,
        size,
        id=f"{name}-{'causal' if causal else 'full'}-{size}",
        marks=[] if (number + causal) % 3 == size - 2 else pytest.mark.deep,
    )
    for number, (name, strategy) in enumerate(
        {"balanced": RING, "unbalanced": UNBALANCED, "ulysses": ULYSSES}.items()
    )
    for causal in (True, False)
    for size in (2, 3, 4)
]


@pytest.mark.parametrize(("strategy", "causal", "size"), SLICED)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(drawn=st.data())
def test_sliced_attention_equals_whole_attention(
    strategy: partial[ContextParallel], causal: bool, size: int, drawn: st.DataObject, world
) -> None:
    draw = partial(drawn.draw, st.integers(1, 3))
    batch, chunk, kv_heads, group, width = draw(), draw(), draw(), draw(), draw() + 1
    # the ranks divide the heads: of keys and values too, or these are repeated
    if strategy is ULYSSES:
        kv_heads, group = drawn.draw(
            st.sampled_from([(kv_heads * size, group), (kv_heads, group * size)])
        )
    sizes = (batch, 2 * size * chunk, kv_heads * group, kv_heads, width)
    for found in world(size).run(errors, strategy, causal, sizes, torch.float64):
        assert max(found) <= TOLERANCE["fp64"], f"y, dq, dk, dv: {found}"


@pytest.mark.parametrize("strategy", [RING, ULYSSES], ids=["ring", "ulysses"])
def test_bf16_attention_is_as_good_as_bf16(strategy: partial[ContextParallel], world) -> None:
    for found in world(2).run(errors, strategy, True, (2, 16, 4, 2, 8), torch.bfloat16):
        assert max(found) <= BF16_TOLERANCE, f"y, dq, dk, dv: {found}"


def test_a_ring_of_one_is_plain_attention(alone) -> None:
    assert max(errors(RING, True, (2, 8, 4, 2, 4), torch.float64)) <= TOLERANCE["fp64"]


def test_autocast_leaves_the_ring_its_precision(alone) -> None:
    q, k, v = (torch.randn(1, 2, 8, 4).requires_grad_() for _ in "qkv")
    expected = torch.autograd.grad(Core(True)(q, k, v).sum(), q)[0]
    # the backward, too, as a pipeline's schedule has it
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = Ring(Core(True), dist.group.WORLD, balanced=True)(q, k, v)
        (gradient,) = torch.autograd.grad(y.sum(), q)
    assert y.dtype == torch.float32 and (gradient - expected).abs().max() < TOLERANCE["fp32"]


def bytes_sent(tokens: int) -> tuple[int, int]:
    """What this rank hands to its neighbour for one attention, forward and backward."""
    sent: list[int] = []
    ring = Ring(Core(True), dist.group.WORLD, balanced=True)
    send = ring.send
    ring.send = lambda x: sent.append(x.nbytes) or send(x)  # type: ignore[method-assign]
    q = torch.randn(1, 4, tokens, 8, requires_grad=True)
    k, v = (torch.randn(1, 2, tokens, 8, requires_grad=True) for _ in "kv")
    y = ring(q, k, v)
    forward = sum(sent)
    y.sum().backward()
    return forward, sum(sent) - forward


def test_a_ring_sends_what_its_docstring_says(world) -> None:
    n, s, g = 3, 4 * 4 * 6 * 8, 2 / 4  # S: fp32 of 4 heads, 6 tokens, width 8
    for forward, backward in world(n).run(bytes_sent, 6):
        assert forward == 2 * g * (n - 1) * s
        assert backward == 2 * g * (2 * n - 1) * s


def trained(case: Case, strategies: list[partial[Strategy]], size: int) -> Outcome:
    STRATEGIES[case.strategy] = strategies  # in a rank's process alone
    return train(case, size)


ROTARY = (("position", "rotary"), ("norm", "rmsnorm"), ("activation", "swiglu"), ("n_kv_heads", 2))
RUNS: list[tuple[str, int, list[partial[Strategy]], dict[str, Any]]] = [
    ("next_token", 2, [RING], {}),
    ("next_token", 3, [RING], {"micro_batch_size": 2}),
    ("next_token", 3, [RING], {"model": ROTARY, "recompute": True}),
    ("next_token", 2, [RING], {"dtype": "fp32"}),
    ("masked_token", 2, [RING], {"recompute": True}),
    ("masked_token", 3, [RING], {"model": ROTARY, "clip_norm": None}),
    ("next_token", 4, [UNBALANCED], {"model": ROTARY}),
    ("masked_token", 4, [UNBALANCED], {"micro_batch_size": 4}),
    ("next_token", 2, [ULYSSES], {"recompute": True, "micro_batch_size": 3}),
    ("next_token", 4, [ULYSSES], {"model": ROTARY}),
    ("masked_token", 4, [ULYSSES], {}),
    ("next_token", 3, [ULYSSES], {"model": (("n_heads", 6), ("n_kv_heads", 3))}),
    (
        "next_token",
        4,
        [partial(FSDP, 2), partial(ContextParallel, 2)],
        {"micro_batch_size": 3, "recompute": True},
    ),
    ("masked_token", 4, [partial(FSDP, 2), partial(ULYSSES, 2)], {"model": ROTARY}),
    (
        "masked_token",
        4,
        [partial(Replicate, 2), partial(ContextParallel, 2)],
        {"micro_batch_size": 3},
    ),
    ("next_token", 4, [partial(AllReduce, 2), partial(ULYSSES, 2)], {}),
    ("next_token", 4, [partial(TensorParallel, 2), partial(ContextParallel, 2)], {"model": ROTARY}),
    ("masked_token", 4, [partial(TensorParallel, 2), partial(ULYSSES, 2)], {"model": ROTARY}),
    (
        "next_token",
        4,
        [partial(TensorParallel, 2, sequence_parallel=True), partial(ContextParallel, 2)],
        {},
    ),
]


def named(run: Any) -> str:
    """A test's name: strategies by class and arguments, the rest as it is."""
    if isinstance(run, list):
        return "+".join(
            f"{make.func.__name__}{[*make.args, *make.keywords.values()] or ''}" for make in run
        )
    return str(run)


@pytest.mark.parametrize(
    ("task", "size", "strategies", "settings"),
    [pytest.param(*run, marks=[] if number % 4 == 1 else pytest.mark.deep) for number,
     run in enumerate(RUNS)], ids=named,
)  # fmt: skip
def test_sliced_sequences_train_as_whole_ones(
    task: str,
    size: int,
    strategies: list[partial[Strategy]],
    settings: dict[str, Any],
    world,
    alone,
) -> None:
    case = Case(task, "context", steps=4, **settings)
    expected = reference(replace(case, strategy="single", micro_batch_size=None, recompute=False))
    for ours in world(size).run(trained, case, strategies, size):
        assert_equal(ours, expected, TOLERANCE[case.dtype])


@pytest.mark.deep
@pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="torch.compile needs a C++ compiler: none here"
)
@pytest.mark.parametrize("strategy", [RING, ULYSSES], ids=["ring", "ulysses"])
def test_compiled_blocks_equal_one_plain_process(
    strategy: partial[ContextParallel], world, alone
) -> None:
    case = Case("next_token", "context", dtype="fp32", compile=True, model=ROTARY)
    expected = reference(replace(case, strategy="single", compile=False))
    for ours in world(2).run(trained, case, [strategy], 2):
        assert_equal(ours, expected, TOLERANCE["fp32"])


def shards(balanced: bool) -> Batch:
    plan = Plan.of([ContextParallel(balanced=balanced)], dist.get_world_size()).connect()
    return plan.shard({"tokens": torch.arange(8).expand(2, 8), "weights": torch.ones(2)})


@pytest.mark.parametrize(
    ("balanced", "expected"),
    [(True, [[0, 1, 6, 7], [2, 3, 4, 5]]), (False, [[0, 1, 2, 3], [4, 5, 6, 7]])],
)
def test_each_rank_reads_its_tokens(balanced: bool, expected: list[list[int]], world) -> None:
    for batch, mine in zip(world(2).run(shards, balanced), expected, strict=True):
        assert batch["tokens"].tolist() == [mine, mine] and batch["tokens"].is_contiguous()
        assert batch["weights"].shape == (2,)


def of_tokens(*shapes: tuple[int, ...]) -> Any:
    update = SimpleNamespace(inputs=("tensor0", "positions"))
    return SimpleNamespace(
        batch=lambda step: {f"tensor{i}": torch.zeros(s) for i, s in enumerate(shapes)},
        updates=(update,),
    )


@pytest.mark.parametrize(
    ("strategy", "tokens", "message"),
    [
        (ContextParallel(4), 100,
         r"seq_len=100 is not divisible by 2 x cp=4 \(each rank takes two chunks of the balanced "
                          r"ring\): use 96 or 104, or strategy.cp.balanced=false$"),
        (ContextParallel(4), 99, r"use 96 or 104$"),
        (ContextParallel(4), 3, r"use 8$"),
        (ContextParallel(4, balanced=False), 10,
         r"seq_len=10 is not divisible by cp=4: use 8 or 12$"),
        (ContextParallel(4, method="ulysses"), 10,
         r"seq_len=10 is not divisible by cp=4: use 8 or 12$"),
    ],
)  # fmt: skip
def test_sequences_that_do_not_divide_are_refused(
    strategy: ContextParallel, tokens: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        strategy.check_task(of_tokens((2, tokens)), Plan.of([strategy], 4))


def test_a_value_a_row_is_refused() -> None:
    plan = Plan.of([ContextParallel()], 2)
    with pytest.raises(
        ValueError, match=r"`tensor1` of the batch is not one value a token: cp=2 cannot cut it"
    ):
        plan.strategies[0].check_task(of_tokens((2, 8), (2,)), plan)
    for task in (NextToken(), MaskedToken()):
        plan.check_task(task)


def test_later_batches_are_checked_too(alone) -> None:
    plan = Plan.of([ContextParallel()], 1).connect()
    with pytest.raises(ValueError, match="seq_len=5 is not divisible by 2 x cp=1"):
        plan.shard({"tokens": torch.zeros(2, 5)})


def test_attention_that_was_not_replaced_is_found() -> None:
    plan = Plan.of([ContextParallel()], 2)
    with pytest.raises(AssertionError, match="attention is Core, not ring"):
        plan.strategies[0].verify(Attending(causal=True), plan)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strategy.cp.method=x is unknown: use ring, ulysses"):
        Plan.of([ContextParallel(method="x")], 2)


@pytest.mark.parametrize(
    ("strategies", "model", "message"),
    [
        ([ContextParallel()], {"dropout": 0.1},
         r"ring attention cannot drop attention weights \(dropout=0.1\): use "
                                        r"strategy.cp.method=ulysses or model.dropout=0"),
        ([ContextParallel(method="ulysses")], {},
         r"n_heads=6 is not divisible by cp=4: use 1, 2, 3, 6"),
        ([ContextParallel(2, method="ulysses"), TensorParallel(2)], {},
         r"n_heads=6 / tp=2 is not divisible by cp=2: use 1, 3"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused(
    strategies: list[Strategy], model: dict[str, Any], message: str
) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        Plan.of(strategies, 4).check_model(Transformer(16, 8, 12, 2, 6, **model))


def test_ulysses_takes_dropout_and_a_model_without_attention_is_refused() -> None:
    Plan.of([ContextParallel(method="ulysses")], 2).check_model(
        Transformer(16, 8, 12, 2, 6, dropout=0.1)
    )
    with pytest.raises(
        ValueError, match="Linear names no `attention` in its Layout: nothing to exchange over cp"
    ):
        Plan.of([ContextParallel()], 2).check_model(nn.Linear(2, 2))


class Windowed(Core):
    """Attends to the last two tokens only."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril().triu(-1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def test_attention_of_another_kind_is_not_quietly_replaced() -> None:
    model = Attending(causal=True)
    assert not Plan.of([ContextParallel()], 2).check_model(model)
    model.blocks[0].core = Windowed(causal=True)
    with pytest.raises(ValueError, match="is not softmax.*use strategy.cp.method=ulysses"):
        Plan.of([ContextParallel()], 2).check_model(model)


def test_long_slices_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch, alone) -> None:
    """Queries by fives: the same numbers, with fewer scores at a time."""
    expected = errors(RING, True, (2, 24, 4, 2, 4), torch.float64)
    monkeypatch.setattr("dtrain.strategy.context.ring.QUERIES", 5)
    assert (
        max(errors(RING, True, (2, 24, 4, 2, 4), torch.float64)) <= 1e-12 and max(expected) <= 1e-12
    )


def test_a_task_without_positions_is_refused() -> None:
    task = NextToken()
    task.updates = (replace(task.updates[0], inputs=("tokens",)),)
    with pytest.raises(ValueError, match="NextToken tells its model no `positions`"):
        Plan.of([ContextParallel()], 2).check_task(task)
