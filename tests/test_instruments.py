"""The instruments: intervals, schedules' bubbles, memory by kind, who is missing; and the bytes that a wire carries."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import Case, trainer
from hosts import DEVICE, Hosts
from hypothesis import given
from hypothesis import strategies as st

from dtrain.cost import Message
from dtrain.measure.ledger import Ledger
from dtrain.measure.timeline import COMMUNICATION, PHASE, STAGE, Span, Timeline, common, mark, merged, total, without
from dtrain.notes import Note, Notes, missing, waiting
from dtrain.profile import RECORDED, Profile
from dtrain.report import gantt
from dtrain.schedule import bubble
from dtrain.strategy.pipeline import SCHEDULES, Pipeline
from dtrain.train import Trainer

ROOT = Path(__file__).parent.parent
INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: (min(pair), max(pair))))


def _covered(intervals: list[tuple[int, int]]) -> set[int]:
    return {moment for start, end in intervals for moment in range(start, end)}


@given(INTERVALS, INTERVALS)
def test_intervals_cover_what_their_moments_do(ours: list, theirs: list) -> None:
    one, other = merged(ours), merged(theirs)
    assert _covered(one) == _covered(ours) and total(one) == len(_covered(ours))
    assert _covered(common(one, other)) == _covered(ours) & _covered(theirs)
    assert all(a[1] < b[0] for a, b in zip(one, one[1:], strict=False))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs"])
@pytest.mark.parametrize(("ranks", "rounds"), [(2, 2), (2, 4), (3, 2), (4, 3), (8, 2)])
def test_a_schedules_bubble_is_the_papers(schedule: str, ranks: int, rounds: int) -> None:
    """(p-1)/(v m+p-1): Huang et al. 2018; Narayanan et al. 2021."""
    pipeline, m = Pipeline(ranks, schedule=schedule), rounds * ranks
    assert bubble(pipeline, m) == pytest.approx((ranks - 1) / (pipeline.stages_per_rank * m + ranks - 1))


@pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zbv", "dualpipev"])
def test_zero_bubble_schedules_leave_less_idle(schedule: str) -> None:
    for ranks, m in ((2, 8), (4, 16)):
        assert 0 < bubble(Pipeline(ranks, schedule=schedule), m) < bubble(Pipeline(ranks, schedule="looped_bfs"), m) / 2


def test_every_schedule_has_a_bubble() -> None:
    assert all(0 < bubble(Pipeline(2, schedule=schedule), 8) < 0.2 for schedule in SCHEDULES)


def _mlp_step(ledger: Ledger, rows: int, width: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(width, 3 * width), torch.nn.GELU(), torch.nn.Linear(3 * width, 1))
    x = torch.randn(rows, width)
    ledger.hold("parameters", model.parameters())
    with ledger:
        model(x).sum().backward()
        ledger.hold("gradients", [p.grad for p in model.parameters()])


@given(st.integers(1, 40), st.integers(1, 20))
def test_memory_by_kind_is_that_of_the_shapes(rows: int, width: int) -> None:
    """GELU keeps its input, the second layer its own: twice (rows, 3 width). Of the loss itself two numbers stay."""
    ledger = Ledger()
    _mlp_step(ledger, rows, width)
    weights = 4 * (width * 3 * width + 3 * width + 3 * width + 1)
    assert ledger.held == {"parameters": weights, "gradients": weights}
    assert ledger.peak("activations") == 2 * 4 * rows * 3 * width + 2 * 4
    assert sum(ledger.at_peak().values()) == ledger.peak() >= weights + ledger.peak("activations")


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
    [("ddp", "dp"), ("fsdp", "fsdp"), ("tensor", "tp"), ("1f1b", "pp"), ("zbv", "pp"), ("ring", "cp")],
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
    layer, inputs = torch.nn.Linear(512, 512), torch.ones(64, 512)
    timeline = Timeline()
    with timeline.recording(torch.device("cpu")), mark(PHASE, "all"), mark(STAGE, "forward", 0, 0):
        for _ in range(50):
            layer(inputs)
    shares = timeline.shares()
    assert shares.communication == 0 and shares.step >= shares.compute > 0.8 * shares.step


INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda t: (min(t), max(t))), max_size=8)


@given(ours=INTERVALS, theirs=INTERVALS)
def test_what_two_cover_and_what_one_covers_alone_make_up_the_one(ours: list, theirs: list) -> None:
    ours, theirs = merged(ours), merged(theirs)
    assert total(common(ours, theirs)) + total(without(ours, theirs)) == total(ours)
    points = {x for start, end in ours for x in range(start, end)} - {
        x for start, end in theirs for x in range(start, end)
    }
    assert total(without(ours, theirs)) == len(points)


def test_a_trace_is_chromes(tmp_path: Path) -> None:
    one = [Span(PHASE, "optimizer", 1000, 9000), Span(COMMUNICATION, "all_reduce", 2000, 4000, "dp"),
           Span(COMMUNICATION, "all_reduce", 3000, 5000, "dp"), Span(STAGE, "forward", 1000, 2000, "", 0, 3)]  # fmt: skip
    gantt.write(
        tmp_path, [one, [replace(span, start=span.start + 500, end=span.end + 500) for span in one]], "two ranks"
    )
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in complete} == {0, 1} and min(event["ts"] for event in complete) == 0
    for pid, tid in {(e["pid"], e["tid"]) for e in complete}:  # within a thread spans are apart or nested
        own = sorted((e["ts"], e["ts"] + e["dur"]) for e in complete if (e["pid"], e["tid"]) == (pid, tid))
        assert all(b[0] >= a[1] or b[1] <= a[1] for a, b in zip(own, own[1:], strict=False))
    assert {e["name"] for e in complete} >= {"all_reduce (dp)", "forward stage 0 micro-batch 3"}
    assert (tmp_path / "gantt.svg").read_text().count("<path") > 4 and (tmp_path / "gantt.png").stat().st_size > 5000


def _notes(*whats: str, step: int = 1) -> Notes:
    return Notes(step, {"g": [Note(number, what, step) for number, what in enumerate(whats, 1)]})


GROUPS = {"g": ("dp", [0, 1, 2])}


def test_who_has_not_begun_a_collective_is_missing() -> None:
    notes = {0: _notes("a", "b"), 1: _notes("a"), 2: _notes("a", "b")}
    said = missing(notes, GROUPS)
    assert (
        said
        == "step 1, axis dp, collective 2, b: ranks 0, 2 waits in it; rank 1 is missing: it has begun a last, in step 1"
    )


def test_who_is_in_another_collective_is_missing() -> None:
    said = missing({0: _notes("a", "b"), 1: _notes("a", "b"), 2: _notes("a", "c")}, GROUPS)
    assert "collective 2, b: ranks 0, 1 waits" in said and "rank 2 is missing: it is in c" in said


def test_of_two_the_one_that_differs_from_its_step_before_is_missing() -> None:
    def steps(*later: str) -> Notes:
        before = [Note(n, what, 1) for n, what in enumerate(("x", "loss", "norm"), 1)]
        return Notes(2, {"g": before + [Note(n, what, 2) for n, what in enumerate(later, 4)]})

    said = missing({0: steps("x", "loss"), 1: steps("x", "norm")}, {"g": ("dp", [0, 1])})
    assert "collective 5, loss: rank 0 waits in it; rank 1 is missing: it is in norm" in said
    assert missing({0: steps("x"), 1: steps("x")}, {"g": ("dp", [0, 1])}) == ""


def test_what_ranks_wait_in_for_one_that_does_not_answer() -> None:
    def notes(pending: int, step: int) -> Notes:
        return Notes(step, {"g": [Note(n, "all_reduce", step, n == pending) for n in range(1, 5)]})

    groups = {"g": ("dp", [0, 1, 2]), "h": ("tp", [0, 3])}
    said = waiting({0: notes(4, 7), 1: notes(4, 7)}, groups, [2])
    assert said == "step 7, axis dp, collective 4, all_reduce: ranks 0, 1 waits in it"
    assert waiting({0: notes(4, 7), 1: notes(4, 7)}, groups, [3]) == ""  # of another group


@pytest.mark.slow
def test_a_skipped_collective_is_named(tmp_path: Path) -> None:
    """Rank, axis, collective and step, before the collectives' own timeout; no traceback; exit status 1."""
    command = [sys.executable, "scripts/train.py", "+experiment=hang", "strategy=fsdp", "launch.nproc=2",
               f"hydra.run.dir={tmp_path}"]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    said = next(line for line in ended.stderr.splitlines() if line.startswith("dtrain: ranks wait for each other"))
    assert re.search(r"step 3, axis fsdp, collective \d+, \w+ of .*: rank 0 waits in it; rank 1 is missing", said), said


@pytest.mark.slow
def test_profile_shows_all_three(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/train.py", "strategy=pipeline", "model=tiny", "steps=6", "profile=true",
               "launch.nproc=2", f"hydra.run.dir={tmp_path}"]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    for title in ("messages of a step", "memory of a step", "time of a step", "pipeline bubble"):
        assert title in ended.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())["profile"]
    for rank in summary["ranks"]:
        assert rank["traffic"] == rank["traffic_predicted"] and rank["traffic"]
        for kind in ("parameters", "gradients", "optimizer"):
            assert rank["memory"]["kinds"][kind]["most"] == rank["memory"]["kinds"][kind]["predicted"] > 0
        activations = rank["memory"]["kinds"]["activations"]
        assert abs(activations["most"] / activations["predicted"] - 1) < 0.1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["pp_send_bytes"] for line in lines[1:]} == {summary["ranks"][0]["traffic"][0]["bytes"]}
    assert {p.name for p in (tmp_path / "profile").iterdir()} == {"trace.json", "gantt.svg", "gantt.png"}


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


@pytest.mark.parametrize("operation", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"])
def test_a_wire_carries_what_the_message_says(operation: str, hosts: Hosts) -> None:
    """Of eight megabytes eight times, within 5 %: headers, and their acknowledgements.

    The least of four tries: on a busy machine TCP sends again what was acknowledged late.
    """
    elements = 2**21
    command = [sys.executable, "-c", TALK]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": DEVICE}
    ranks = [subprocess.Popen([*hosts.on(rank), *command, str(rank), operation, str(elements)],
                              stdout=subprocess.PIPE, env=environment, text=True)
             for rank in (0, 1)]  # fmt: skip
    counted = min(map(int, ranks[0].communicate(timeout=100)[0].split()))
    ranks[1].communicate(timeout=100)
    expected = Message("dp", operation, 8, 8 * 4 * elements).wire_bytes(2, "gloo")
    assert abs(counted / expected - 1) < 0.05, (counted, expected)


def test_backends_differ_where_gloo_reduces_whole() -> None:
    message = Message("dp", "reduce_scatter", 1, 100)
    assert message.wire_bytes(2) == 50 and message.wire_bytes(2, "gloo") == 100
    assert dist.is_available()
