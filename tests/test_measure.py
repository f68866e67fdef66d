from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import CONTEXT, ROWS, Case, NextToken, trainer
from hypothesis import given
from hypothesis import strategies as st

from dtrain.figures import flops_per_token
from dtrain.info import info
from dtrain.measure import flops, memory
from dtrain.measure.environment import describe
from dtrain.measure.meter import Meter
from dtrain.model.transformer import Transformer
from dtrain.optimizer import parameter_groups, rate
from dtrain.precision import Precision


@given(
    layers=st.integers(1, 4),
    heads=st.sampled_from([1, 2, 4]),
    per_head=st.sampled_from([4, 8]),
    seq_len=st.integers(2, 32),
)
def test_flops_are_the_textbooks(layers: int, heads: int, per_head: int, seq_len: int) -> None:
    """6 per weight of a matrix product and 12 L C T for attention (Chowdhery et al. 2022, appendix B)."""
    width, vocab = heads * per_head, 64
    found = info(partial(Transformer, vocab, 32, width, layers, heads), Precision(), seq_len)
    weights = layers * 12 * width * width + vocab * width
    assert found.flops_per_token == 6 * weights + 12 * layers * width * seq_len


def test_a_tasks_flops_are_its_models() -> None:
    task = NextToken()
    expected = info(task.models["model"], Precision(), CONTEXT).flops_per_token
    assert flops_per_token(task) == expected


def test_info_allocates_nothing_and_counts_bytes() -> None:
    gc.collect()
    before = memory.peak_bytes(torch.device("cpu"))
    found = info(partial(Transformer, 50257, 1024, 12288, 4, 96), Precision("bf16"), None)
    assert found.total > 7e9 and memory.peak_bytes(torch.device("cpu")) - before < 200e6
    assert found.weight_bytes == found.gradient_bytes == 4 * found.total
    assert found.optimizer_bytes == 8 * found.total


def test_warm_up_steps_do_not_count() -> None:
    meter = Meter(warmup_steps=2, world_size=4, flops_per_token=10.0, peak_flops=1000.0)
    for seconds in (9.0, 9.0, 1.0, 2.0, 3.0):
        meter.add(100, seconds)
    summary = meter.summary()
    assert summary["tokens_per_second"] == 50 and summary["tokens_per_second_per_rank"] == 12.5
    assert summary["step_seconds_median"] == 2 and summary["step_seconds_p95"] == pytest.approx(2.9)
    assert summary["mfu"] == 50 * 10 / (4 * 1000) and summary["measured_steps"] == 3
    short = Meter(warmup_steps=9, world_size=1, flops_per_token=None, peak_flops=None)
    short.add(10, 2.0)
    assert short.summary()["tokens_per_second"] == 5 and short.summary()["mfu"] is None


def test_a_measured_peak_says_how() -> None:
    peak, source = flops.peak(torch.device("cpu"), torch.float32)
    assert peak > 1e8 and source.startswith("measured: 1024 x 1024 float32")


def test_peak_memory_sees_an_allocation() -> None:
    device = torch.device("cpu")
    memory.reset_peak(device)
    before = memory.peak_bytes(device)
    held = torch.ones(50_000_000)
    assert memory.peak_bytes(device) - before >= held.nbytes * 0.95


def test_the_environment_is_told() -> None:
    found = describe()
    assert found["packages"]["torch"] == torch.__version__ and found["cores"] >= 1 and found["memory_bytes"] > 1e9


def _tokens(strategy: str, size: int) -> list[int]:
    return [step.tokens for step in trainer(Case("next_token", strategy, steps=2), size).steps()]


def test_tokens_are_counted_once_however_the_world_is_factored(world) -> None:
    for strategy in ("ddp", "fsdp", "hsdp", "tensor", "pipeline_tensor", "fsdp_context"):
        assert world(4).run(_tokens, strategy, 4) == [[ROWS * CONTEXT, 2 * ROWS * CONTEXT]] * 4


def test_matrices_decay_and_vectors_do_not() -> None:
    model = Transformer(64, 8, 16, 1, 2)
    matrices, vectors = parameter_groups(model)
    assert all(p.ndim == 2 for p in matrices["params"]) and "weight_decay" not in matrices
    assert all(p.ndim == 1 for p in vectors["params"]) and vectors["weight_decay"] == 0
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_the_rate_warms_up_and_falls_to_its_end() -> None:
    rates = [rate(step, 100, warmup_steps=10, final_ratio=0.1) for step in range(101)]
    assert rates[:3] == [0.1, 0.2, pytest.approx(0.3)] and rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False)) and rates[100] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.55)


def _drift(case: Case, size: int) -> list[float]:
    made = trainer(case, size)
    losses = [step.loss for step in made.steps()]
    return [*losses, made.evaluate()["loss"]]


@pytest.mark.parametrize(
    ("strategy", "size"),
    [("ddp", 2), ("fsdp", 2), ("zero1", 2), ("tensor_sequence", 2), ("zbv", 2), ("ring", 2), ("ulysses", 2),
     ("fsdp_tensor", 4), ("ddp_tensor", 4), ("fsdp_context", 4), ("pipeline_fsdp", 4), ("pipeline_tensor", 4), ("3d", 8)],
)  # fmt: skip
def test_bf16_drifts_no_more_than_its_rounding(strategy: str, size: int, world, alone) -> None:
    """With accumulation, recomputation and an evaluation at the end."""
    case = Case(
        "next_token", strategy, dtype="bf16", steps=5, micro_batch_size=3, recompute=True, model=(("n_layers", 4),)
    )
    exact = _drift(replace(case.reference(), dtype="fp32"), 1)
    for losses in world(size).run(_drift, case, size):
        assert losses == pytest.approx(exact, rel=2**-8) and losses != exact  # 8 bits of mantissa
