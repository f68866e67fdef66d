"""The instruments: intervals, schedules' bubbles, memory by kind, who is missing; and the bytes
that a wire carries.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import warm
from cases import Case, trainer
from hosts import DEVICE, Hosts
from hypothesis import given
from hypothesis import strategies as st
from test_configs import composed

from dtrain.compare.page import step
from dtrain.compare.results import Row
from dtrain.config.schema import validated
from dtrain.cost.memory_tracker import MemoryTracker
from dtrain.cost.profile import RECORDED, Profile
from dtrain.cost.timeline import (
    COMMUNICATION,
    Span,
    Timeline,
    difference,
    intersection,
    length,
    union,
)
from dtrain.cost.traffic import CommunicationCounter
from dtrain.launch.flight_recorder import (
    Collective,
    RankReport,
    missing_from_collective,
    waiting_in_collective,
)
from dtrain.launch.hang_detector import Hang, HangDetector, _read, within
from dtrain.launch.world import World
from dtrain.parallel.messages import Message
from dtrain.parallel.spans import PHASE, STAGE, mark
from dtrain.report import instruments, step_chart
from dtrain.run.run import run
from dtrain.strategy.pipeline.schedule import SCHEDULES, Schedule, _work, bubble
from dtrain.strategy.pipeline.strategy import PipelineParallel
from dtrain.train import Trainer

ROOT = Path(__file__).parent.parent
INTERVALS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: (min(pair), max(pair)))
)


def _covered(intervals: list[tuple[int, int]]) -> set[int]:
    return {moment for start, end in intervals for moment in range(start, end)}


@given(INTERVALS, INTERVALS)
def test_intervals_cover_what_their_moments_do(ours: list, theirs: list) -> None:
    one, other = union(ours), union(theirs)
    assert _covered(one) == _covered(ours) and length(one) == len(_covered(ours))
    assert _covered(intersection(one, other)) == _covered(ours) & _covered(theirs)
    assert all(a[1] < b[0] for a, b in zip(one, one[1:], strict=False))


def schedule_of(ranks: int, kind: str) -> Schedule:
    return PipelineParallel(ranks, schedule=kind).schedule


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs"])
@pytest.mark.parametrize(("ranks", "rounds"), [(2, 2), (2, 4), (3, 2), (4, 3), (8, 2)])
def test_a_schedules_bubble_is_the_papers(schedule: str, ranks: int, rounds: int) -> None:
    """(p-1)/(v m+p-1): Huang et al. 2018; Narayanan et al. 2021."""
    of_ranks, m = schedule_of(ranks, schedule), rounds * ranks
    assert bubble(of_ranks, m) == pytest.approx(
        (ranks - 1) / (of_ranks.stages_per_rank * m + ranks - 1)
    )


@pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zbv", "dualpipev"])
def test_zero_bubble_schedules_leave_less_idle(schedule: str) -> None:
    for ranks, m in ((2, 8), (4, 16)):
        assert (
            0
            < bubble(schedule_of(ranks, schedule), m)
            < bubble(schedule_of(ranks, "looped_bfs"), m) / 2
        )


def test_every_schedule_has_a_bubble() -> None:
    assert all(0 < bubble(schedule_of(2, kind), 8) < 0.2 for kind in SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_rank_works_as_long_whatever_parts_its_passes_are_cut_into(schedule: str) -> None:
    """Three forward passes' time for each of its stages and micro-batches: a backward pass is
    as long as two.
    """
    of_ranks, m = schedule_of(2, schedule), 4
    work = [sum(duration for _, duration in _work(of_ranks, rank, m)) for rank in range(2)]
    assert work == [3 * m * of_ranks.stages_per_rank] * 2


def _mlp_step(tracker: MemoryTracker, rows: int, width: int) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(width, 3 * width), torch.nn.GELU(), torch.nn.Linear(3 * width, 1)
    )
    x = torch.randn(rows, width)
    tracker.label("parameters", model.parameters())
    with tracker:
        model(x).sum().backward()
        tracker.label("gradients", [p.grad for p in model.parameters()])


@given(st.integers(1, 40), st.integers(1, 20))
def test_memory_by_kind_is_that_of_the_shapes(rows: int, width: int) -> None:
    """GELU keeps its input, the second layer its own: twice (rows, 3 width).

    Of the loss itself two numbers stay.
    """
    tracker = MemoryTracker()
    _mlp_step(tracker, rows, width)
    weights = 4 * (width * 3 * width + 3 * width + 3 * width + 1)
    assert tracker.labelled_bytes == {"parameters": weights, "gradients": weights}
    assert tracker.peak("activations") == 2 * 4 * rows * 3 * width + 2 * 4
    assert (
        sum(tracker.at_peak().values()) == tracker.peak() >= weights + tracker.peak("activations")
    )


def _profiled(strategy: str, size: int, model: tuple) -> tuple[dict, list[list[Span]], list[dict]]:
    case = Case("next_token", strategy, dtype="fp32", steps=RECORDED + 1, model=model)
    made = trainer(case, size)
    with Profile(made.plan) as profile:
        observed = Trainer(made.task, made.plan, _adam, made.settings, profile.phase)
        figures = [profile.figures() for _ in profile.steps(observed)]
        return *profile.summary(), figures


_adam = partial(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3))


@pytest.mark.parametrize(
    ("strategy", "axis"),
    [
        ("ddp", "dp"),
        ("fsdp", "fsdp"),
        ("tensor", "tp"),
        ("1f1b", "pp"),
        ("zbv", "pp"),
        ("ring", "cp"),
    ],
)
def test_a_step_is_seen_as_spans(strategy: str, axis: str, world) -> None:
    found, spans, figures = world(2).run(_profiled, strategy, 2, (("n_layers", 4),))[0]
    assert len(spans) == 2 and all(own for own in spans)
    for own, rank in zip(spans, found["ranks"], strict=True):
        phases = [s.name for s in own if s.kind == PHASE]
        assert {"forward and backward", "optimizer", "figures"} <= set(phases)
        assert {s.axis for s in own if s.kind == COMMUNICATION and s.axis} == {axis}
        time = rank["time"]
        assert 0 < time["compute"] <= time["step"]
        assert time["exposed"] + time["overlapped"] == pytest.approx(time["communication"])
    assert figures[-1] == figures[-2] and all(key.startswith(f"{axis}_") for key in figures[-1])
    stages = [(s.stage, s.micro_batch, s.name) for own in spans for s in own if s.kind == STAGE]
    if axis == "pp":
        assert len(stages) == len(set(stages)) and {s[2] for s in stages} >= {"forward", "backward"}
        assert 0 < found["bubble"]["theory"] < found["bubble"]["measured"] < 1
    else:
        assert not stages and found["bubble"] is None


def test_work_that_does_not_wait_is_compute() -> None:
    """A layer's product calls small operations within: the time is the whole operation's."""
    layer, inputs = torch.nn.Linear(1536, 1536), torch.ones(512, 1536)
    timeline = Timeline()
    with timeline.recording(torch.device("cpu")), mark(PHASE, "all"), mark(STAGE, "forward", 0, 0):
        for _ in range(4):
            layer(inputs)
    shares = timeline.shares()
    assert shares.communication == 0 and shares.step >= shares.compute > 0.5 * shares.step


INTERVALS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda t: (min(t), max(t))), max_size=8
)


@given(ours=INTERVALS, theirs=INTERVALS)
def test_what_two_cover_and_what_one_covers_alone_make_up_the_one(ours: list, theirs: list) -> None:
    ours, theirs = union(ours), union(theirs)
    assert length(intersection(ours, theirs)) + length(difference(ours, theirs)) == length(ours)
    points = {x for start, end in ours for x in range(start, end)} - {
        x for start, end in theirs for x in range(start, end)
    }
    assert length(difference(ours, theirs)) == len(points)


def test_a_trace_is_chromes(tmp_path: Path) -> None:
    one = [
        Span(PHASE, "optimizer", 1000, 9000),
        Span(COMMUNICATION, "all_reduce", 2000, 4000, "dp"),
        Span(COMMUNICATION, "all_reduce", 3000, 5000, "dp"),
        Span(STAGE, "forward", 1000, 2000, "", 0, 3),
    ]
    step_chart.write(
        tmp_path,
        [one, [replace(span, start=span.start + 500, end=span.end + 500) for span in one]],
        "two ranks",
    )
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in complete} == {0, 1} and min(
        event["ts"] for event in complete
    ) == 0
    # within a thread spans are apart or nested
    for pid, tid in {(e["pid"], e["tid"]) for e in complete}:
        own = sorted(
            (e["ts"], e["ts"] + e["dur"]) for e in complete if (e["pid"], e["tid"]) == (pid, tid)
        )
        assert all(b[0] >= a[1] or b[1] <= a[1] for a, b in zip(own, own[1:], strict=False))
    assert {e["name"] for e in complete} >= {"all_reduce (dp)", "forward stage 0 micro-batch 3"}
    assert (tmp_path / "gantt.svg").read_text().count("<path") > 4 and (
        tmp_path / "gantt.png"
    ).stat().st_size > 5000


def _notes(*whats: str, step: int = 1) -> RankReport:
    return RankReport(
        step, {"g": [Collective(number, what, step) for number, what in enumerate(whats, 1)]}
    )


GROUPS = {"g": ("dp", [0, 1, 2])}


def test_who_has_not_begun_a_collective_is_missing() -> None:
    notes = {0: _notes("a", "b"), 1: _notes("a"), 2: _notes("a", "b")}
    said = missing_from_collective(notes, GROUPS)
    assert said == (
        "step 1, axis dp, collective 2, b: ranks 0, 2 wait in it; rank 1 is missing: it has "
        "begun a last, in step 1"
    )


def test_who_is_in_another_collective_is_missing() -> None:
    said = missing_from_collective(
        {0: _notes("a", "b"), 1: _notes("a", "b"), 2: _notes("a", "c")}, GROUPS
    )
    assert "collective 2, b: ranks 0, 1 wait" in said and "rank 2 is missing: it is in c" in said


def test_of_two_the_one_that_differs_from_its_step_before_is_missing() -> None:
    def steps(*later: str) -> RankReport:
        before = [Collective(n, what, 1) for n, what in enumerate(("x", "loss", "norm"), 1)]
        return RankReport(
            2, {"g": before + [Collective(n, what, 2) for n, what in enumerate(later, 4)]}
        )

    said = missing_from_collective(
        {0: steps("x", "loss"), 1: steps("x", "norm")}, {"g": ("dp", [0, 1])}
    )
    assert "collective 5, loss: rank 0 waits in it; rank 1 is missing: it is in norm" in said
    assert missing_from_collective({0: steps("x"), 1: steps("x")}, {"g": ("dp", [0, 1])}) == ""


def test_what_ranks_wait_in_for_one_that_does_not_answer() -> None:
    def notes(pending: int, step: int) -> RankReport:
        return RankReport(
            step, {"g": [Collective(n, "all_reduce", step, n == pending) for n in range(1, 5)]}
        )

    groups = {"g": ("dp", [0, 1, 2]), "h": ("tp", [0, 3])}
    said = waiting_in_collective({0: notes(4, 7), 1: notes(4, 7)}, groups, [2])
    assert said == "step 7, axis dp, collective 4, all_reduce: ranks 0, 1 wait in it"
    assert (
        waiting_in_collective({0: notes(4, 7), 1: notes(4, 7)}, groups, [3]) == ""
    )  # of another group


def test_a_skipped_collective_is_named(tmp_path: Path) -> None:
    """Rank, axis, collective and step, before the collectives' own timeout; no traceback; exit
    status 1.
    """
    command = [
        sys.executable,
        "scripts/train.py",
        "+experiment=hang",
        "strategy=fsdp",
        "launch.nproc=2",
        f"hydra.run.dir={tmp_path}",
    ]
    ended = warm.run(command, cwd=ROOT, timeout=400)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    said = next(
        line
        for line in ended.stderr.splitlines()
        if line.startswith("dtrain: ranks wait for each other")
    )
    assert re.search(
        r"step 3, axis fsdp, collective \d+, \w+ of .*: rank 0 waits in it; rank 1 is missing", said
    ), said


def test_profile_shows_all_three(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "scripts/train.py",
        "strategy=pipeline",
        "model=tiny",
        "steps=6",
        "profile=true",
        "launch.nproc=2",
        f"hydra.run.dir={tmp_path}",
    ]
    ended = warm.run(command, cwd=ROOT, timeout=200)
    assert ended.returncode == 0, ended.stderr
    for title in ("messages of a step", "memory of a step", "time of a step", "pipeline bubble"):
        assert title in ended.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())["profile"]
    for rank in summary["ranks"]:
        assert rank["traffic"] == rank["traffic_predicted"] and rank["traffic"]
        for kind in ("parameters", "gradients", "optimizer"):
            assert (
                rank["memory"]["kinds"][kind]["most"]
                == rank["memory"]["kinds"][kind]["predicted"]
                > 0
            )
        activations = rank["memory"]["kinds"]["activations"]
        assert abs(activations["most"] / activations["predicted"] - 1) < 0.1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["pp_send_bytes"] for line in lines[1:]} == {
        summary["ranks"][0]["traffic"][0]["bytes"]
    }
    assert {p.name for p in (tmp_path / "profile").iterdir()} == {
        "trace.json",
        "gantt.svg",
        "gantt.png",
    }


# What follows measures on a wire: two network namespaces, joined by a pair of virtual cables.

TALK = """
import sys, torch, torch.distributed as dist
from pathlib import Path
rank, operation, elements = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method="tcp://10.77.0.1:29571", rank=rank, world_size=2)
x, out = torch.ones(elements), torch.ones(elements)
dist.barrier()
sent = lambda: int(Path("/sys/class/net/veth/statistics/tx_bytes").read_text())
for _ in range(4):
    dist.barrier()
    before = sent()
    for _ in range(8):
        if operation == "all_reduce": dist.all_reduce(x)
        elif operation == "all_gather": dist.all_gather_into_tensor(out, x[: elements // 2])
        elif operation == "reduce_scatter": dist.reduce_scatter_tensor(out[: elements // 2], x)
        elif operation == "all_to_all": dist.all_to_all_single(out, x)
        elif rank == 0: dist.send(x, 1)
        else: dist.recv(x, 0)
    dist.barrier()
    print(sent() - before, flush=True)
dist.barrier()
"""


@pytest.mark.parametrize(
    "operation",
    [
        "all_gather",
        *(
            pytest.param(each, marks=pytest.mark.deep)
            for each in ("all_reduce", "reduce_scatter", "all_to_all", "send")
        ),
    ],
)
def test_a_wire_carries_what_the_message_says(operation: str, hosts: Hosts) -> None:
    """Of eight megabytes eight times, within 5 %: headers, and their acknowledgements.

    The least of four tries: on a busy machine TCP sends again what was acknowledged late.
    """
    elements = 2**21
    command = [sys.executable, "-c", TALK]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": DEVICE}
    ranks = [
        subprocess.Popen(
            [*hosts.on(rank), *command, str(rank), operation, str(elements)],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for rank in (0, 1)
    ]
    counted = min(map(int, ranks[0].communicate(timeout=240)[0].split()))
    ranks[1].communicate(timeout=240)
    expected = Message("dp", operation, 8, 8 * 4 * elements).wire_bytes(2, "gloo")
    assert abs(counted / expected - 1) < 0.05, (counted, expected)


def test_backends_differ_where_gloo_reduces_whole() -> None:
    message = Message("dp", "reduce_scatter", 1, 100)
    assert message.wire_bytes(2) == 50 and message.wire_bytes(2, "gloo") == 100
    assert dist.is_available()


def test_a_trace_is_in_microseconds_from_the_first_span(tmp_path: Path) -> None:
    """As Chrome's format has it; the clock is in nanoseconds.

    The page's bars are in milliseconds.
    """
    millisecond, begin = 10**6, 5 * 10**18
    spans = [
        Span(PHASE, "optimizer", begin, begin + 100 * millisecond),
        Span(
            COMMUNICATION,
            "all_reduce",
            begin + 7 * millisecond,
            begin + 7 * millisecond + 500,
            "dp",
        ),
    ]
    told = step_chart.chrome_trace([spans])
    found = {
        event["name"]: (event["ts"], event["dur"])
        for event in told["traceEvents"]
        if event["ph"] == "X"
    }
    assert found == {"optimizer": (0, 100_000), "all_reduce (dp)": (7_000, 0.5)}
    row = Row("ddp", 2)
    bars = {bar.name: (bar.base, bar.x) for bar in step.gantt(told["traceEvents"], row).figure.data}
    assert bars == {"optimizer": ((0.0,), (100.0,)), "all_reduce": ((7.0,), (0.0005,))}


def test_steps_that_an_instrument_slows_down_are_not_measured(tmp_path: Path) -> None:
    """The third, whose memory is followed, and the fourth, which is recorded; the lines of the
    file have them all.
    """
    config = composed(
        "task=gan",
        "steps=7",
        "profile=true",
        "eval.every=0",
        "measure.peak_flops=1e9",
        "measure.skip_steps=1",
        "launch.threads=1",
        "global_batch_size=8",
    )
    config.logger = {"files": {"_target_": "dtrain.report.files.Files", "pictures": False}}
    summary = run(validated(config), World(), tmp_path, "single")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    counted = [line["step_seconds"] for line in lines if line["step"] in (2, 5, 6, 7)]
    assert len(lines) == 7 and summary["measured_steps"] == len(counted)
    assert summary["step_seconds_median"] == median(counted)


# Messages


def _talk() -> list[tuple[Message, ...]]:
    """Collectives of known sizes, counted and not."""
    rank, alone = dist.get_rank(), dist.new_group([0])
    six, pair = torch.zeros(6), [torch.zeros(3), torch.zeros(3)]
    found = []
    with CommunicationCounter({(0, 1): "dp"}) as traffic:
        for counting in (False, True):
            traffic.counting = counting
            dist.all_reduce(six)
            dist.all_reduce(six.bfloat16())
            dist.all_gather_into_tensor(torch.zeros(8), torch.zeros(4))
            dist.all_gather(pair, torch.zeros(3))
            dist.reduce_scatter_tensor(torch.zeros(5), torch.zeros(10))
            dist.reduce_scatter(torch.zeros(3), pair)
            dist.all_to_all_single(
                torch.zeros(2 + rank * 2), torch.zeros(3), [1 + rank] * 2, [1, 2]
            )
            dist.broadcast(torch.zeros(7, dtype=torch.float64), 0)
            if rank:
                dist.recv(torch.zeros(9), 0)
            else:
                dist.send(torch.zeros(9), 1)
                dist.all_reduce(torch.zeros(11), group=alone)
            found += [traffic.take(), traffic.take()]
    dist.all_reduce(six)
    return [*found, traffic.take()]


def test_each_collective_is_counted_with_the_whole_tensor_that_it_is_about(world) -> None:
    """Both kinds of call; sends at the sender; what goes to no axis under `other`; nothing
    twice.
    """
    both = [
        Message("dp", "all_gather", 2, 8 * 4 + 6 * 4, 8 * 4),
        Message("dp", "all_reduce", 2, 6 * 4 + 6 * 2, 6 * 4),
        Message("dp", "all_to_all", 1, 3 * 4, 3 * 4),
        Message("dp", "broadcast", 1, 7 * 8, 7 * 8),
        Message("dp", "reduce_scatter", 2, 10 * 4 + 6 * 4, 10 * 4),
    ]
    first, second = world(2).run(_talk)
    sender = (
        *both,
        Message("dp", "send", 1, 9 * 4, 9 * 4),
        Message("other", "all_reduce", 1, 11 * 4, 11 * 4),
    )
    assert first == [(), (), sender, (), ()]
    assert second == [(), (), tuple(both), (), ()]


# Memory


def test_memory_is_of_what_lives_at_one_moment() -> None:
    """A view is no memory of its own, and what has gone makes room; sizes in fp32."""
    tracker, held = MemoryTracker(), torch.zeros(10)
    tracker.label("parameters", [held, None])
    with tracker:
        early = torch.zeros(1000)
        view = early[500:]
        other = torch.zeros(500, dtype=torch.float64)
        del early, view
        late = torch.zeros(900)
        del other, late
        tracker.label("gradients", [torch.zeros(20)])
        last = torch.zeros(30)
    assert tracker.peak() == 4 * (10 + 1000 + 2 * 500)
    assert {kind: size for kind, size in tracker.at_peak().items() if size} == {
        "parameters": 40,
        "other": 8000,
    }
    assert (tracker.peak("parameters"), tracker.peak("gradients"), tracker.peak("other")) == (
        40,
        80,
        8000,
    )
    assert tracker.labelled_bytes == {"parameters": 40, "gradients": 80} and last.numel() == 30


# Who is missing


def test_a_store_that_does_not_answer_in_time_has_no_answer() -> None:
    """Nor has one whose connection is lost."""
    never = threading.Event()

    def lost() -> int:
        raise RuntimeError("connection reset")

    assert (within(30, lambda: 7), within(30, lost), within(0.02, never.wait)) == (7, None, None)
    never.set()


def _watches(size: int, timeout_s: float) -> list[HangDetector]:
    """Of as many ranks that share a store, and have one axis besides."""
    store, made = dist.HashStore(), []
    for rank in range(size):
        known = SimpleNamespace(
            get_rank=lambda rank=rank: rank,
            get_world_size=lambda: size,
            distributed_c10d=SimpleNamespace(_get_default_store=lambda: store),
            group=SimpleNamespace(WORLD=SimpleNamespace(group_name="w")),
        )
        with mock.patch("dtrain.launch.hang_detector.dist", known):
            made.append(HangDetector({"g": ("tp", [0, 1])}, timeout_s))
    return made


def test_a_rank_notes_the_step_in_which_a_collective_began() -> None:
    """Of its plan's groups and the world's, in the order of their beginning; messages to one
    rank are left out.
    """
    (watch,) = _watches(1, 2.0)
    assert watch.groups == {"w": ("world", [0]), "g": ("tp", [0, 1])}
    watch._begun = [(0, 0), (5, 100), (6, 200)]
    entries = [
        (50, "g", False, True),
        (100, "g", False, True),
        (199, "w", False, True),
        (150, "g", True, False),
        (160, "x", False, False),
        (201, "g", False, False),
    ]
    told = [
        {
            "time_created_ns": at,
            "process_group": [group, ""],
            "is_p2p": one_to_one,
            "retired": retired,
            "collective_seq_id": number,
            "profiling_name": "gloo:all_reduce",
            "input_sizes": [[3, 4], []],
            "input_dtypes": ["Float", "Float"],
            "record_id": number,
        }
        for number, (at, group, one_to_one, retired) in enumerate(entries, 1)
    ]
    what = "all_reduce of 3x4, 1 float"
    # gloo's and NCCL's
    with mock.patch("dtrain.launch.hang_detector._recorded", lambda: [told[:3], told[3:]]):
        notes = watch._report()
    assert notes == RankReport(
        6,
        {
            "g": [Collective(1, what, 0), Collective(2, what, 5), Collective(6, what, 6, True)],
            "w": [Collective(3, what, 5)],
        },
    )
    assert _read(json.dumps(asdict(notes)).encode()) == notes


GONE = "does not answer: its process is gone or stopped"


@pytest.mark.parametrize(("answering", "speaker", "said"), [
    ((0, 1, 2), 0,
     "step 1, axis world, collective 2, b: ranks 0, 2 wait in it; rank 1 is missing: it has begun a last, "
                   "in step 1"),
    ((1, 2), 1,
     "step 1, axis world, collective 2, b: rank 2 waits in it; rank 1 is missing: it has begun a last, in step 1"
                f"; rank 0 {GONE}"),
    ((2,), 2, "rank 2 in step 1; ranks 0, 1 do not answer: their processes are gone or stopped"),
], ids=["all", "the first is silent", "the last alone"])  # fmt: skip
def test_the_first_rank_that_answers_says_for_all_what_it_finds(
    answering: tuple[int, ...], speaker: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Once, however often it is asked; of the ranks that are gone too."""
    watches = [each for each in _watches(3, 1.0) if each.rank in answering]
    for watch in watches:
        begun = _notes(*("a", "b")[: 1 if watch.rank == 1 else 2])
        watch._report = lambda found=begun: RankReport(found.step, {"w": found.groups["g"]})  # type: ignore[method-assign]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(HangDetector.explain, watches))
    assert dict(zip(answering, found, strict=True)) == {
        rank: said * (rank == speaker) for rank in answering
    }
    assert [watch.explain() for watch in watches] == found
    assert capfd.readouterr().err == f"dtrain: ranks wait for each other: {said}\n"


def test_a_failed_collective_is_told_with_its_reason_and_no_other_error() -> None:
    (watch,) = _watches(1, 2.0)
    watch.finding, watch._asked_at = "rank 1 is missing", watch._place()
    for error in (RuntimeError("[gloo] timed out"), dist.DistStoreError("gone")):
        with (
            pytest.raises(Hang, match="^a collective failed: rank 1 is missing$"),
            watch.explaining(),
        ):
            raise error
    watch.finding = ""
    with pytest.raises(Hang, match="^a collective failed: Gloo: first line$"), watch.explaining():
        raise RuntimeError("Gloo: first line\nsecond")
    for error in (RuntimeError("shape mismatch"), ValueError("gloo")):
        with pytest.raises(type(error)) as found, watch.explaining():
            raise error
        assert found.value is error


def test_what_a_recorder_has_forgotten_is_not_missing() -> None:
    """Its notes are the last ones alone: of two ranks that have done the same, one remembers
    less.
    """
    notes = {
        0: _notes("a", "b", "c"),
        1: RankReport(1, {"g": _notes("a", "b", "c").groups["g"][2:]}),
    }
    assert missing_from_collective(notes, {"g": ("dp", [0, 1])}) == ""


def test_of_several_groups_the_one_that_stopped_first_is_told() -> None:
    """By the step, for those that are missing and for those that wait."""
    groups = {"g": ("dp", [0, 1]), "h": ("tp", [2, 3])}

    def at(name: str, step: int, *whats: str) -> RankReport:
        return RankReport(
            step, {name: [Collective(n, what, step, True) for n, what in enumerate(whats, 1)]}
        )

    for first, (dp, tp) in (("axis dp", (3, 4)), ("axis tp", (4, 3))):
        told = {
            0: at("g", dp, "a", "b"),
            1: at("g", dp, "a"),
            2: at("h", tp, "a", "b"),
            3: at("h", tp, "a"),
        }
        assert missing_from_collective(told, groups).startswith(f"step 3, {first}, collective 2, b")
        both = {0: at("g", dp, "a"), 2: at("h", tp, "b")}
        assert waiting_in_collective(both, groups, [1, 3]).startswith(
            f"step 3, {first}, collective 1"
        )


# What a person reads of them


def test_tables_show_what_was_measured_beside_what_was_predicted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages and memory of the first rank, times of all, in MiB and milliseconds."""
    monkeypatch.setenv("COLUMNS", "200")
    sent = {
        "axis": "dp",
        "operation": "all_reduce",
        "calls": 3,
        "bytes": 12_345,
        "wire_bytes": 6_172.5,
    }
    foreseen = [sent | {"calls": 4, "bytes": 999}, sent | {"axis": "tp", "calls": 8, "bytes": 64}]
    kinds = {
        "parameters": {"most": 3 << 20, "predicted": 1 << 19, "at_peak": 2 << 20},
        "other": {"most": 1 << 20, "predicted": None, "at_peak": 0},
    }
    first = {
        "traffic": [sent],
        "traffic_predicted": foreseen,
        "memory": {"kinds": kinds, "peak": 5 << 20},
        "time": {"step": 1.25, "compute": 0.5},
    }
    second = {
        "traffic": [],
        "traffic_predicted": None,
        "memory": None,
        "time": {"step": 2.0, "compute": 0.0625},
    }
    instruments.show_profile(
        {"ranks": [first, second], "bubble": {"measured": 0.5, "theory": 0.333, "micro_batches": 2}}
    )
    said = [
        re.sub(r"[^\w.,%-]+", " ", line).strip() for line in capsys.readouterr().out.splitlines()
    ]
    for line in (
        "dp all_reduce 3 4 12,345 999 6,172",
        "tp all_reduce - 8 - 64 -",
        "parameters 3.00 0.50 2.00",
        "other 1.00 - 0.00",
        "together 5.00",
        "rank step compute",
        "0 1,250.0 500.0",
        "1 2,000.0 62.5",
        "pipeline bubble 50.0% measured, 33.3% in theory",
    ):
        assert line in said, said
