"""Figures against closed forms: time, MFU, memory, stages, messages, and how they are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, astuple
from itertools import combinations
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import CONTEXT, ROWS, VOCAB, Case, NextToken, adamw, trainer
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from worlds import World as Ranks

from dtrain.compare.results import Row
from dtrain.config.schema import Config, Measure
from dtrain.cost import peak_memory, timeline
from dtrain.cost.predict import fold
from dtrain.cost.profile import Profile
from dtrain.cost.recorder import record_footprint
from dtrain.cost.throughput import Throughput
from dtrain.cost.timeline import COMMUNICATION, COMPUTE, Shares, Span
from dtrain.launch.world import World
from dtrain.model.layout import Layout
from dtrain.parallel.messages import Message
from dtrain.parallel.plan import Plan
from dtrain.parallel.spans import PHASE, STAGE
from dtrain.report.console import Console
from dtrain.report.instruments import _mib
from dtrain.run.summary import facts, summary_of, throughput_meter
from dtrain.strategy.ddp import DDP
from dtrain.strategy.pipeline.stages import split_evenly
from dtrain.strategy.pipeline.strategy import PipelineParallel

CPU = torch.device("cpu")
FP32 = 4  # bytes
SCALARS = 16  # bytes: the loss, its count and its gradient
RELEASED = 0.5  # of what was freed, at least, so that a figure of the present would show it
SEEN = 0.95  # of what was allocated: pages are counted, and counted late
ROUNDING = 1e-12  # of sums and quotients in fp64
SECOND = 10**9  # nanoseconds
WIDTH, LAYERS = 24, 2  # of the model of `NextToken`

Intervals = list[tuple[int, int]]


# Where a step's time goes


def shares(computing: Intervals, talking: Intervals, *more: Span) -> Shares:
    """Of a step from 0 to 100 s, by a timeline with these spans."""
    found = timeline.Timeline()
    found.spans = [
        Span(PHASE, "forward and backward", 0, 40 * SECOND),
        Span(PHASE, "optimizer", 50 * SECOND, 100 * SECOND),
        *(Span(COMPUTE, "compute", a * SECOND, b * SECOND) for a, b in computing),
        *(Span(COMMUNICATION, "all_reduce", a * SECOND, b * SECOND, "dp") for a, b in talking),
        *more,
    ]
    return found.shares()


@pytest.mark.parametrize(
    ("computing", "talking", "communication", "overlapped"),
    [
        ([], [(10, 30), (20, 50)], 40, 0),
        ([], [(10, 50), (20, 30)], 40, 0),
        ([], [(10, 20), (20, 30)], 20, 0),
        ([], [(10, 20), (10, 20)], 10, 0),
        ([(0, 25)], [(10, 30), (20, 50)], 40, 15),
        ([(20, 30)], [(10, 50)], 40, 10),
        ([(20, 30)], [(10, 50), (15, 45)], 40, 10),
        ([(0, 100)], [(10, 20), (15, 40)], 30, 30),
        ([(0, 10), (50, 60)], [(10, 50)], 40, 0),
        ([(0, 12), (18, 30)], [(10, 20), (25, 35)], 20, 9),
        ([(0, 100)], [], 0, 0),
    ],
)
def test_no_moment_of_communication_counts_twice(
    computing: Intervals, talking: Intervals, communication: int, overlapped: int
) -> None:
    """Messages that overlap, hold or touch each other, and what is computed beside them."""
    found = shares(computing, talking)
    compute = sum(end - start for start, end in computing)
    assert found == Shares(100, compute, communication, communication - overlapped, overlapped)


SPAN = st.tuples(st.integers(-20, 110), st.integers(1, 40)).map(lambda s: (s[0], sum(s)))


@given(st.lists(SPAN, max_size=6).map(timeline.union), st.lists(SPAN, max_size=6))
def test_shares_are_those_of_the_moments(computing: Intervals, talking: Intervals) -> None:
    """Counted second by second; what lies before or after the step is no part of it."""
    step = set(range(100))
    ours, theirs = (
        {t for a, b in each for t in range(a, b)} & step for each in (computing, talking)
    )
    expected = Shares(100, len(ours), len(theirs), len(theirs - ours), len(theirs & ours))
    assert shares(computing, talking) == expected


def event(name: str, start: int, end: int, *, gpu: bool = True, annotation: bool = False) -> Any:
    """One of the profiler's, as its interface has it."""
    device = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    told = dict(
        name=name,
        start_ns=start,
        end_ns=end,
        device_type=device,
        is_user_annotation=annotation,
        is_async=False,
        start_thread_id=1,
    )
    return SimpleNamespace(**{key: lambda value=value: value for key, value in told.items()})


def test_on_a_gpu_marks_compute_nothing_and_messages_count_as_they_run() -> None:
    """The profiler shows a mark of the host's on the device too, as long as the kernels of its
    time.
    """
    phase = "dtrain:phase:backward"
    message = "dtrain:message:all_reduce:dp"
    reduce = "nccl:all_reduce"
    events = [
        event(phase, 0, 100, gpu=False, annotation=True),
        event(phase, 5, 120, annotation=True),
        event(message, 10, 11, gpu=False, annotation=True),
        event(message, 20, 60, annotation=True),
        event(reduce, 10, 12, gpu=False),
        event(reduce, 20, 60, annotation=True),
        event("ncclDevKernel_AllReduce_Sum_f32", 20, 60),
        event("gemm", 5, 30),
        event("Optimizer.step#AdamW.step", 61, 99, annotation=True),
    ]
    found = list(timeline._spans(events, "cuda"))
    assert found == [
        Span(PHASE, "backward", 0, 100),
        Span(COMPUTE, "compute", 5, 30),
        Span(COMMUNICATION, "all_reduce", 20, 60, "dp"),
    ]
    made = timeline.Timeline()
    made.spans = found
    assert astuple(made.shares()) == pytest.approx((100e-9, 25e-9, 40e-9, 30e-9, 10e-9))


def test_a_send_counts_by_its_receiver() -> None:
    send = Span(COMMUNICATION, "send", 10 * SECOND, 90 * SECOND, "pp")
    receive = Span(COMMUNICATION, "recv", 10 * SECOND, 30 * SECOND, "pp")
    assert shares([], [], send, receive) == Shares(100, 0, 20, 20, 0)


def test_a_measured_bubble_is_the_papers_where_the_schedule_is_kept() -> None:
    """1F1B, two stages, two micro-batches: 6 of 9 units are busy, (p-1)/(m+p-1) = 1/3 idle."""
    forward, backward = ([(0, 1), (1, 2)], [(1, 2), (4, 5)]), ([(4, 6), (7, 9)], [(2, 4), (5, 7)])
    ranks = [
        [
            Span(STAGE, name, 7 + 10 * start, 7 + 10 * end, "", stage, micro_batch)
            for name, done in (("forward", forward), ("backward", backward))
            for micro_batch, (start, end) in enumerate(done[stage])
        ]
        for stage in range(2)
    ]
    asked: Any = SimpleNamespace(plan=Plan.of([PipelineParallel(2)], 2))
    found = Profile._bubble(asked, ranks)
    third = pytest.approx(1 / 3, rel=ROUNDING)
    assert found == {"measured": third, "theory": third, "micro_batches": 2}


# How fast


def test_medians_and_percentiles_are_of_the_steps_that_count() -> None:
    """An even number and an odd one; the two warm-up steps would move each figure."""
    for seconds in ([4.0, 1.0, 2.0, 8.0], [4.0, 1.0, 2.0], [3.0]):
        meter = Throughput(skip_steps=2, world_size=3, flops_per_token=7.0, peak_flops=11.0)
        for each in [100.0, 200.0, *seconds]:
            meter.add(16, each)
        found, rate = meter.summary(), median(16 / s for s in seconds)
        assert found["tokens_per_second"] == pytest.approx(rate, rel=ROUNDING)
        assert found["tokens_per_second_per_rank"] == pytest.approx(rate / 3, rel=ROUNDING)
        assert found["mfu"] == pytest.approx(rate * 7 / (3 * 11), rel=ROUNDING)
        assert found["step_seconds_median"] == median(seconds)
        assert found["measured_steps"] == len(seconds)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(range(1, 22), 20.0), ((2.0, 1.0), 1.95), ((0.0, 0.0, 10.0), 9.0), ((5.0,), 5.0)],
)
def test_one_step_in_twenty_takes_longer_than_the_percentile(seconds: Any, expected: float) -> None:
    """Between two of them it is on the line that joins them."""
    meter = Throughput(skip_steps=0, world_size=1, flops_per_token=None, peak_flops=None)
    for each in seconds:
        meter.add(1, each or 1e-9)
    assert meter.summary()["step_seconds_p95"] == pytest.approx(expected, rel=1e-6)


def test_tokens_a_second_are_the_global_batchs_tokens_over_the_step(alone) -> None:
    """By a clock of ours: steps of 2 and 0.5 seconds, and a pause that belongs to none."""
    clock = iter([10.0, 12.0, 100.0, 100.5])
    with mock.patch("dtrain.train.time", SimpleNamespace(perf_counter=lambda: next(clock))):
        steps = list(trainer(Case("next_token", "single", steps=2), 1).steps())
    assert [step.step_seconds for step in steps] == [2.0, 0.5]
    assert [step.tokens_per_second for step in steps] == [ROWS * CONTEXT / 2, ROWS * CONTEXT * 2]
    assert [step.tokens for step in steps] == [ROWS * CONTEXT, 2 * ROWS * CONTEXT]


def _job(stated: float | None) -> Any:
    config = Config(global_batch_size=ROWS, micro_batch_size=3, measure=Measure(2, stated))
    data = SimpleNamespace(
        describe=lambda: {"name": "none", "train_tokens": 12345}, left_out={"empty files": 3}
    )
    parts = {"plan": Plan.of([DDP()], 2), "task": NextToken(), "data": data}
    return SimpleNamespace(config=config, written=asdict(config), tried=(), **parts)


def _summary(stated: float | None) -> dict[str, Any]:
    """Of a run on two ranks, of 1 and 3 TFLOP/s and of 10 and 30 bytes, after a step of 2 s."""
    rank, job = dist.get_rank(), _job(stated)
    world = World(rank, 2, rank, 2)
    with (
        mock.patch(
            "dtrain.run.summary.flops.peak", return_value=((1 + 2 * rank) * 1e12, "measured")
        ),
        mock.patch("dtrain.run.summary.peak_memory.peak_bytes", return_value=10 + 20 * rank),
        mock.patch("dtrain.run.summary.environment.describe", return_value={}),
    ):
        meter, source = throughput_meter(job, world)
        meter.add(ROWS * CONTEXT, 2.0)
        figures = {"step": 1, "loss": 3.0, "tokens": ROWS * CONTEXT}
        return summary_of(job, world, "ddp", figures, meter, source)


@pytest.mark.parametrize(("stated", "peak"), [(5e9, 5e9), (None, 2e12)], ids=["stated", "measured"])
def test_mfu_is_what_the_model_needs_over_what_all_ranks_could_do(
    stated: float | None,
    peak: float,
    world: Callable[[int], Ranks],
) -> None:
    """6 operations a weight of a product, 12 L C T for attention; a peak is the ranks' mean."""
    needed = 6 * (LAYERS * 12 * WIDTH**2 + VOCAB * WIDTH) + 12 * LAYERS * WIDTH * CONTEXT
    for found in world(2).run(_summary, stated):
        assert found["flops_per_token"] == needed
        assert found["peak_flops_per_rank"] == pytest.approx(peak, rel=ROUNDING)
        assert found["peak_flops_source"] == ("stated" if stated else "measured")
        assert found["mfu"] == pytest.approx(ROWS * CONTEXT / 2 * needed / (2 * peak), rel=ROUNDING)
        assert found["peak_memory_bytes"] == 30 and found["peak_memory_bytes_by_rank"] == [10, 30]


def test_a_person_is_told_a_ranks_peak_and_how_the_batch_is_divided() -> None:
    """In GFLOP/s; 12 rows over two ranks in micro-batches of three."""
    meter = Throughput(skip_steps=0, world_size=2, flops_per_token=1.0, peak_flops=2.5e12)
    told = facts(_job(2.5e12), meter, "stated")
    assert any(line.endswith("peak 2,500 GFLOP/s a rank (stated)") for line in told)
    assert "batch: 12 rows over 2 x 2 micro-batches" in told
    assert "data: name none, train_tokens 12,345" in told
    assert "left out of the data: 3 empty files" in told
    parameters = VOCAB * WIDTH + CONTEXT * WIDTH + LAYERS * (12 * WIDTH**2 + 2 * WIDTH) + WIDTH
    assert told[0].startswith(f"model: {parameters:,} parameters")


# Memory


def test_peak_memory_is_what_was_held_at_most_though_it_is_gone() -> None:
    """An eighth of a GiB, taken and given back; a new count begins without it."""

    def present() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    peak_memory.reset_peak(CPU)
    before, here = peak_memory.peak_bytes(CPU), present()
    held = torch.ones(2**27 // FP32)
    size = held.nbytes
    assert present() - here >= SEEN * size
    del held
    assert present() - here <= (1 - RELEASED) * size
    peak = peak_memory.peak_bytes(CPU)
    assert peak - before >= SEEN * size
    peak_memory.reset_peak(CPU)
    assert peak_memory.peak_bytes(CPU) <= peak - RELEASED * size


def test_what_one_block_keeps_for_its_backward_pass_is_the_textbooks() -> None:
    """Inputs of products, norms and activations; what attention gives; norms' figures."""
    rows, heads, tokens = 2, 2, 2 * CONTEXT
    task = NextToken(rows=rows, n_layers=1, n_heads=heads)
    plan = Plan.of([], 1)
    footprint = record_footprint(task, plan, adamw, global_batch_size=rows)
    (piece,) = footprint.pieces
    wide, figure = tokens * WIDTH, tokens
    norm = [wide, figure, figure]  # what it gives, and the mean and deviation of each token
    expected = [
        ("embedding", [wide]),
        ("blocks.0.norm1", norm),
        ("blocks.0.attention.query", [wide]),
        ("blocks.0.attention.key", [wide]),
        ("blocks.0.attention.value", [wide]),
        ("blocks.0.attention.core", [wide, tokens * heads]),  # and the logarithm of each row's sum
        ("blocks.0", [wide]),
        ("blocks.0.norm2", norm),
        ("blocks.0.feedforward.up", [4 * wide]),
        ("blocks.0.feedforward", [4 * wide]),
        ("blocks.0", [wide]),
        ("head.norm", norm),
        (None, [tokens * VOCAB]),  # probabilities, of the loss
    ]
    listed = [(path, FP32 * size) for path, sizes in expected for size in sizes]
    assert [(kept.path, kept.bytes) for kept in piece.kept if kept.shape] == listed
    least, found = sum(size for _, size in listed), fold(footprint, plan).activation_bytes
    assert found is not None and least <= found <= least + SCALARS


# Stages


class Chain(nn.Module):
    """Layers of given numbers of multiplications."""

    layout = Layout(first="first", blocks="blocks", last="last")

    def __init__(self, first: int, blocks: list[int], last: int) -> None:
        super().__init__()
        self.first, self.last = (nn.Linear(size, 1, bias=False) for size in (first, last))
        self.blocks = nn.ModuleList(nn.Linear(size, 1, bias=False) for size in blocks)


COSTS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@example(5, [1, 3, 8, 1], 1, 3)  # where the most even split in squares is another one
@given(st.integers(1, 30), COSTS, st.integers(1, 30), st.integers(1, 5))
def test_no_other_split_has_a_cheaper_costliest_stage(
    first: int,
    costs: list[int],
    last: int,
    stages: int,
) -> None:
    """Of all splits into consecutive blocks; the model's ends cost the stages that have them."""
    stages = min(stages, len(costs))

    def bottleneck(ends: tuple[int, ...]) -> int:
        places = zip((0, *ends), (*ends, len(costs)), strict=True)
        sums = [sum(costs[start:end]) for start, end in places]
        sums[0] += first
        sums[-1] += last
        return max(sums)

    with torch.device("meta"):
        chosen = split_evenly(Chain(first, costs, last), stages)
    assert len(chosen) == stages and sum(chosen) == len(costs) and min(chosen) >= 1
    ends = tuple(sum(chosen[:stage]) for stage in range(1, stages))
    every = combinations(range(1, len(costs)), stages - 1)
    assert bottleneck(ends) == min(map(bottleneck, every))


def test_an_embedding_costs_nothing_and_a_head_what_it_multiplies() -> None:
    """GPT-2's head is worth some blocks, its embedding none: the first stage gets more."""
    with torch.device("meta"):
        model = Chain(1, [100] * 12, 700)
        model.first = nn.Embedding(700, 1)
    assert split_evenly(model, 2) == [9, 3] and split_evenly(Chain(700, [100] * 12, 1), 2) == [3, 9]


# Messages


def _ring(operation: str, ranks: int) -> float:
    """What a rank sends to its neighbour in all turns, in shares of the whole tensor: the mean."""
    sent = [0.0] * ranks
    if operation == "send":
        return float(ranks > 1)
    if operation == "broadcast":  # from one to the next, not back to the first
        for rank in range(ranks - 1):
            sent[rank] += 1
    else:  # each turn every rank sends one part of n, until all have come by
        turns = {"all_reduce": 2}.get(operation, 1) * (ranks - 1)
        for _ in range(turns):
            for rank in range(ranks):
                sent[rank] += 1 / ranks
    return sum(sent) / ranks


OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_bytes_of_a_ring_are_those_of_its_turns(operation: str) -> None:
    for ranks in (1, 2, 3, 4, 8):
        message = Message("dp", operation, 3, 4096)
        expected = 4096 * _ring(operation, ranks)
        assert message.wire_bytes(ranks) == pytest.approx(expected, rel=ROUNDING)


# What a comparison makes of them


Lines = list[dict[str, Any]]


def _told(losses: list[float], times: list[float], **more: Any) -> tuple[dict[str, Any], Lines]:
    """A run's summary and its lines."""
    steps = enumerate(zip(losses, times, strict=True), 1)
    lines: Lines = [{"step": i, "loss": loss, "step_seconds": s} for i, (loss, s) in steps]
    ranks = [
        {
            "memory": {"kinds": {}, "peak": peak},
            "traffic_predicted": None,
            "time": asdict(Shares(step, 0.1, exposed, exposed, 0.0)),
            "traffic": [{"wire_bytes": sent}, {"wire_bytes": 1.0}],
        }
        for peak, step, exposed, sent in ((10, 0.5, 0.1, 9.0), (30, 1.0, 0.3, 5.0))
    ]
    summary = {
        "synchronous": True,
        "tokens": 64 * len(lines),
        "steps": len(lines),
        "world_size": 2,
        "mesh": {"dp": 2},
        "loss": losses[-1],
        "peak_memory_bytes": 99,
        "profile": {"bubble": None, "ranks": ranks},
    }
    return summary | more, lines


def test_a_loss_differs_whether_it_is_above_or_below() -> None:
    """The greatest difference over all steps, which need not be the last."""
    cases = [([4.0, 2.0, 1.5], 1.0), ([4.0, 4.0, 1.5], 1.0), ([4.25, 3.0, 1.0], 0.5)]
    for losses, expected in cases:
        row, reference = Row("ddp", 2), Row("single", 1)
        row.add(*_told(losses, [1.0] * 3), 0, 1.0)
        reference.add(*_told([4.0, 3.0, 1.5], [1.0] * 3), 0, 1.0)
        row.compare(reference)
        assert (row.loss_difference, row.reference) == (expected, "single")


@pytest.mark.parametrize(("times", "usual"), [([9, 9, 1, 4, 2], 2), ([9, 9, 1, 4, 2, 8], 3)])
def test_a_rows_throughput_is_that_of_its_usual_step(times: list[float], usual: float) -> None:
    """The median of those that no instrument disturbs, even or odd in number; of 64 tokens."""
    row = Row("ddp", 2)
    row.add(*_told([1.0] * len(times), times), 2, 30.0)
    assert row.step_seconds == usual and row.tokens_per_second == 64 / usual
    assert row.seconds == [sum([usual, usual, *times[2:]][: i + 1]) for i in range(len(times))]
    row.add(*_told([1.0] * 3, [9, 9, 8 * usual]), 2, 30.0)
    assert row.step_seconds == 4.5 * usual
    assert row.tokens_per_second == pytest.approx((64 + 8) / usual / 2, rel=ROUNDING)
    assert row.spread() == (8 / usual, 64 / usual)


def test_what_is_not_synchronous_is_counted_by_its_mean() -> None:
    """One step of four pays for all: its time, and its message in a ring of two."""
    summary, lines = _told([1.0] * 4, [1.0, 1.0, 1.0, 5.0], synchronous=False)
    lines[3] |= {"dp_all_reduce_calls": 1, "dp_all_reduce_bytes": 800}
    row = Row("local_sgd", 2)
    row.add(summary, lines, 0, 8.0)
    assert row.step_seconds == 2.0 and row.tokens_per_second == 32
    sent = {"calls": 0.25, "bytes": 200, "wire_bytes": 200.0}
    assert row.traffic == [[{"axis": "dp", "operation": "all_reduce"} | sent]]
    assert row.wire_bytes == 200.0 and row.exposed_share is None


def test_a_row_tells_the_fullest_and_the_busiest_rank() -> None:
    row = Row("ddp", 2)
    row.add(*_told([1.0], [1.0]), 0, 1.0)
    assert (row.memory_bytes, row.peak_memory_bytes, row.wire_bytes) == (30, 99, 10.0)
    assert row.exposed_share == pytest.approx((0.1 / 0.5 + 0.3 / 1.0) / 2, rel=ROUNDING)


# What is printed


def test_sizes_are_told_in_mebibytes(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = (0, 3 << 19, 1 << 40, None)
    assert list(map(_mib, sizes)) == ["0.00", "1.50", "1,048,576.00", "-"]
    summary = {"loss": 2.5, "tokens_per_second": 1234.5, "step_seconds_median": 0.25, "mfu": 0.125}
    Console().finish(summary | {"peak_memory_bytes": 1537 << 20, "unit": "samples"})
    told = (
        "loss 2.5000, 1,234 samples/s, 250 ms a step, MFU 12.5%, process memory at most 1.5 GiB "
        "a rank\n"
    )
    assert capsys.readouterr().out == told
