from __future__ import annotations

import gc
import itertools
import math
import os
import re
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases import CONTEXT, ROWS, Case, NextToken, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch.utils.flop_counter import FlopCounterMode

from dtrain.cost import environment, flops, peak_memory
from dtrain.cost.environment import cores, describe
from dtrain.cost.model_size import model_size
from dtrain.cost.throughput import Throughput
from dtrain.model.transformer import Transformer
from dtrain.parallel.optimizer import lr_factor, parameter_groups
from dtrain.parallel.precision import Precision
from dtrain.run.summary import flops_per_token
from dtrain.task import sample_quality


@settings(max_examples=8)
@given(
    layers=st.integers(1, 4),
    heads=st.sampled_from([1, 2, 4]),
    per_head=st.sampled_from([4, 8]),
    seq_len=st.integers(2, 32),
)
def test_flops_are_the_textbooks(layers: int, heads: int, per_head: int, seq_len: int) -> None:
    """6 per weight of a matrix product and 12 L C T for attention (Chowdhery et al. 2022,
    appendix B).
    """
    width, vocab = heads * per_head, 64
    found = model_size(partial(Transformer, vocab, 32, width, layers, heads), Precision(), seq_len)
    weights = layers * 12 * width * width + vocab * width
    assert found.flops_per_token == 6 * weights + 12 * layers * width * seq_len


def test_a_tasks_flops_are_its_models() -> None:
    task = NextToken()
    expected = model_size(task.models["model"], Precision(), CONTEXT).flops_per_token
    assert flops_per_token(task) == expected


def test_info_allocates_nothing_and_counts_bytes() -> None:
    gc.collect()
    before = peak_memory.peak_bytes(torch.device("cpu"))
    found = model_size(partial(Transformer, 50257, 1024, 12288, 4, 96), Precision("bf16"), None)
    assert found.total > 7e9 and peak_memory.peak_bytes(torch.device("cpu")) - before < 200e6
    assert found.weight_bytes == found.gradient_bytes == 4 * found.total
    assert found.optimizer_bytes == 8 * found.total


def test_warm_up_steps_do_not_count() -> None:
    meter = Throughput(skip_steps=2, world_size=4, flops_per_token=10.0, peak_flops=1000.0)
    for seconds in (9.0, 9.0, 1.0, 2.0, 3.0):
        meter.add(100, seconds)
    summary = meter.summary()
    assert summary["tokens_per_second"] == 50 and summary["tokens_per_second_per_rank"] == 12.5
    assert summary["step_seconds_median"] == 2 and summary["step_seconds_p95"] == pytest.approx(2.9)
    assert summary["mfu"] == 50 * 10 / (4 * 1000) and summary["measured_steps"] == 3
    short = Throughput(skip_steps=9, world_size=1, flops_per_token=None, peak_flops=None)
    short.add(10, 2.0)
    assert short.summary()["tokens_per_second"] == 5 and short.summary()["mfu"] is None


def test_a_measured_peak_says_how() -> None:
    peak, source = flops.peak(torch.device("cpu"), torch.float32)
    assert peak > 1e8 and source.startswith("measured: 1024 x 1024 float32")


def test_peak_memory_sees_an_allocation() -> None:
    device = torch.device("cpu")
    peak_memory.reset_peak(device)
    before = peak_memory.peak_bytes(device)
    held = torch.ones(50_000_000)
    assert peak_memory.peak_bytes(device) - before >= held.nbytes * 0.95


def test_the_environment_is_told() -> None:
    found = describe()
    assert (
        found["packages"]["torch"] == torch.__version__
        and found["cores"] >= 1
        and found["memory_bytes"] > 1e9
    )


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
    rates = [lr_factor(step, 100, warmup_steps=10, min_lr_ratio=0.1) for step in range(101)]
    assert rates[:3] == [0.1, 0.2, pytest.approx(0.3)] and rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False)) and rates[
        100
    ] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.55)


def _drift(case: Case, size: int) -> list[float]:
    made = trainer(case, size)
    losses = [step.loss for step in made.steps()]
    return [*losses, made.evaluate()["loss"]]


@pytest.mark.parametrize(
    ("strategy", "size"),
    [("ddp", 2), ("fsdp", 2), ("tensor_sequence", 2), ("zbv", 2), ("ring", 2),
     *(pytest.param(*each, marks=pytest.mark.deep)
     for each in [("zero1", 2), ("ulysses", 2), ("fsdp_tensor", 4), ("replicate_tensor", 4),
                  ("fsdp_context", 4),
                  ("pipeline_fsdp", 4), ("pipeline_tensor", 4), ("3d", 8)])],
)  # fmt: skip
def test_bf16_drifts_no_more_than_its_rounding(strategy: str, size: int, world, alone) -> None:
    """With accumulation, recomputation and an evaluation at the end."""
    case = Case(
        "next_token",
        strategy,
        dtype="bf16",
        steps=5,
        micro_batch_size=3,
        recompute=True,
        model=(("n_layers", 4),),
    )
    exact = _drift(replace(case.reference(), dtype="fp32"), 1)
    for losses in world(size).run(_drift, case, size):
        assert losses == pytest.approx(exact, rel=2**-8) and losses != exact  # 8 bits of mantissa


def test_cores_are_those_that_this_process_may_use() -> None:
    """In a container they are fewer than the machine's."""
    allowed = os.sched_getaffinity(0)
    try:
        with mock.patch.object(os, "cpu_count", lambda: 64):
            os.sched_setaffinity(0, {min(allowed)})
            assert cores() == 1
            os.sched_setaffinity(0, allowed)
            assert cores() == len(allowed)
    finally:
        os.sched_setaffinity(0, allowed)


def _git(folder: Path, *words: str) -> str:
    named = {
        f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    environment = (
        os.environ | named | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    )
    ran = subprocess.run(
        ["git", *words], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    return ran.stdout.strip()


def test_a_commit_is_told_as_what_ran_if_the_tree_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `+changes` is told with it; a tag does not stand in for it; outside a checkout there
    is none.
    """
    code = tmp_path / "dtrain" / "measure" / "environment.py"
    code.parent.mkdir(parents=True)
    code.write_text("one\n")
    monkeypatch.setattr(environment, "__file__", str(code))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert describe()["commit"] is None
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-q", "-m", "one")
    _git(tmp_path, "tag", "-m", "v1", "v1")
    commit = _git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert describe()["commit"] == commit
    code.write_text("two\n")
    assert describe()["commit"] == f"{commit}+changes"
    _git(tmp_path, "add", ".")
    assert describe()["commit"] == f"{commit}+changes"


def test_a_commit_of_this_checkout_has_twelve_digits() -> None:
    told = describe()["commit"]
    assert told is None or re.fullmatch(r"[0-9a-f]{12}(\+changes)?", told)


# Units, operations of one of them a cycle (dense, bf16, a multiply-add is two), and cycles a
# second.
UNITS = {
    "NVIDIA H200": (132, 4096, 1.83e9),
    "NVIDIA H100 80GB HBM3": (132, 4096, 1.83e9),
    "NVIDIA A100-SXM4-80GB": (108, 2048, 1.41e9),
    "NVIDIA A100-SXM4-40GB": (108, 2048, 1.41e9),
    "NVIDIA A100 80GB PCIe": (108, 2048, 1.41e9),
    "NVIDIA L4": (58, 1024, 2.04e9),
}


@pytest.mark.parametrize("name", flops.STATED_PEAKS)
def test_a_stated_peak_is_what_the_units_of_the_device_can_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiprocessors x operations x boost clock (NVIDIA's papers on Hopper, Ampere and Ada),
    to three digits.
    """
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak, source = flops.peak(torch.device("cuda"), torch.bfloat16)
    assert (
        peak == pytest.approx(math.prod(UNITS[name]), rel=2e-3)
        and source == f"data sheet of {name}, bf16 dense"
    )


def test_a_measured_peak_is_the_operations_of_the_quickest_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As torch's own counter has them; the first product, which loads the library, does not
    count.
    """
    seconds, shapes = itertools.chain([1e-9, 0.5, 0.25], itertools.repeat(0.75)), []

    def timed(a: torch.Tensor, b: torch.Tensor) -> float:
        shapes.append((a.shape, b.shape))
        return next(seconds)

    monkeypatch.setattr(flops, "_timed_product", timed)
    monkeypatch.setattr(flops, "SECONDS", 0.01)
    peak, _ = flops.peak(torch.device("cpu"), torch.float32)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        torch.mm(*map(torch.empty, shapes[0]))
    assert len(set(shapes)) == 1 and peak == counter.get_total_flops() / 0.25


def test_precision_and_recall_reach_to_a_samples_third_neighbour() -> None:
    """As scikit-learn finds it, which does not count the sample itself."""
    generator = torch.Generator().manual_seed(0)
    for rows, others in ((40, 30), (5, 9), (4, 4)):
        real = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
        made = 0.5 + 0.7 * torch.randn(others, 3, generator=generator, dtype=torch.float64)

        def inside(points: torch.Tensor, of: torch.Tensor) -> float:
            reach = NearestNeighbors(n_neighbors=3).fit(of.numpy()).kneighbors()[0][:, -1]
            near = [
                any((p - o).norm() <= r for o, r in zip(of, reach, strict=True)) for p in points
            ]
            return sum(near) / len(near)

        expected = (inside(made, real), inside(real, made))
        assert sample_quality.precision_recall(real, made) == pytest.approx(expected, rel=1e-12)
        assert rows < 10 or 0 < min(expected) < max(expected) < 1
    line = torch.tensor([[0.0], [1.0], [2.0], [4.0], [8.0]])  # reaches: 4, 3, 2, 4, 7
    made = torch.tensor([[-4.0], [-4.1], [15.0], [15.1]])
    assert sample_quality.precision_recall(line, made)[0] == 0.5


PARTS = [
    (dict(n_kv_heads=None), True, True),
    (dict(n_kv_heads=2, norm="rmsnorm", position="rotary", activation="swiglu"), False, False),
]


@pytest.mark.parametrize(("model", "tied", "bias"), PARTS, ids=["like GPT-2", "like Llama"])
@pytest.mark.parametrize(
    ("precision", "size"),
    [(Precision(), 4), (Precision("bf16", "bf16"), 2), (Precision("fp64"), 8)],
)
def test_a_models_parts_and_bytes_are_those_of_its_shapes(
    model: dict[str, Any], tied: bool, bias: bool, precision: Precision, size: int
) -> None:
    """By hand; a shared matrix counts once, where it is first used.

    Adam keeps two numbers a weight.
    """
    v, t, c, layers, heads = 61, 10, 24, 3, 6
    kv, one = c // heads * (model["n_kv_heads"] or heads), int(bias)
    norms, gates = (2 if bias else 1) * c, 1 if bias else 2
    parts = {
        "embedding": v * c + (t * c if tied else 0),
        "blocks: attention": layers * (2 * c * c + 2 * c * kv + one * (2 * c + 2 * kv)),
        "blocks: feedforward": layers * ((gates + 1) * 4 * c * c + one * 5 * c),
        "blocks: norm1": layers * norms,
        "blocks: norm2": layers * norms,
        "head": norms + (0 if tied else v * c),
    }
    found = model_size(
        partial(Transformer, v, t, c, layers, heads, tied=tied, bias=bias, **model), precision, None
    )
    assert found.parameters == parts and found.seq_len == t
    total = sum(parts.values())
    assert (found.total, found.weight_bytes, found.gradient_bytes) == (
        total,
        total * size,
        total * size,
    )
    assert found.optimizer_bytes == 2 * total * size
