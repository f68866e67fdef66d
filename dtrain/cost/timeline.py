"""Record where the time of a step goes: torch's profiler, read as spans of a few kinds.

    phase          what the loop does: forward, backward, optimizer ...
    stage          one micro-batch in one stage of a pipeline, forward or backward
    compute        operations on the device (CPU: of the training thread), gaps below GAP bridged
    communication  a collective, from its call until its result is there

Communication is overlapped while the rank computes, and exposed while it does not. A send counts at
its receiver: the sender need not wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dtrain.parallel.spans import MARK, MESSAGE, PHASE, STAGE

COMPUTE, COMMUNICATION = "compute", "communication"
OPERATIONS = ("aten::", "fsdp::", "cpp_fused", "triton_")  # names of what computes on a CPU
WAITS = ("c10d::", "_c10d_functional::", "gloo:")  # and of what may wait within it
GAP = 100_000  # nanoseconds: in a shorter gap Python prepares the next operation

Interval = tuple[int, int]


@dataclass(frozen=True)
class Span:
    """What one rank did between two moments.

    Args:
        kind: one of the kinds above.
        name: of the phase, the pass or the collective.
        start: nanoseconds, on a clock that a machine's ranks share.
        end: as `start`.
        axis: of a collective.
        stage: of a pipeline's work.
        micro_batch: of a pipeline's work.
    """

    kind: str
    name: str
    start: int
    end: int
    axis: str = ""
    stage: int = -1
    micro_batch: int = -1


@dataclass(frozen=True)
class Shares:
    """Seconds of a step, on one rank."""

    step: float
    compute: float
    communication: float
    exposed: float
    overlapped: float


class Timeline:
    """Record what this rank does."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    @contextmanager
    def recording(self, device: torch.device) -> Iterator[None]:
        """Fill `spans` with what happens within."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else it logs every start and stop
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        with profile(activities=activities, acc_events=True) as profiler:
            yield
        events = profiler.profiler.kineto_results.events()
        self.spans = sorted(_spans(events, device.type), key=lambda span: (span.start, -span.end))

    def shares(self) -> Shares:
        """Return how the time from the first phase's begin to the last one's end was spent."""
        phases = self._of(PHASE)
        begin, end = min(start for start, _ in phases), max(end for _, end in phases)
        step = [(begin, end)]  # without what this measurement does before and after
        computing = intersection(self._of(COMPUTE), step)  # merged when they were read
        messages = union(
            (s.start, s.end) for s in self.spans if s.kind == COMMUNICATION and s.name != "send"
        )
        communicating = intersection(messages, step)
        intervals = step, computing, communicating, intersection(computing, communicating)
        total, compute, communication, overlapped = (length(each) / 1e9 for each in intervals)
        return Shares(total, compute, communication, communication - overlapped, overlapped)

    def _of(self, kind: str) -> list[Interval]:
        return [(span.start, span.end) for span in self.spans if span.kind == kind]


def union(intervals: Iterable[Interval], gap: int = 0) -> list[Interval]:
    """Return disjoint intervals, in order, that cover the same; gaps of up to `gap` are filled."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start - joined[-1][1] <= gap:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def intersection(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """Return what both lists cover; each is of disjoint intervals, in order."""
    common, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            common.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return common


def difference(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """Return what the first list covers and the second does not; both are disjoint, in order."""
    if not first:
        return []
    ends = [first[0][0], *(end for interval in second for end in interval), first[-1][1]]
    gaps = [(start, end) for start, end in zip(ends[::2], ends[1::2], strict=True) if start < end]
    return intersection(first, gaps)


def length(intervals: Iterable[Interval]) -> int:
    """Return the length of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def _spans(events: list[Any], device: str) -> Iterator[Span]:
    marks = [e for e in events if e.name().startswith(f"{MARK}:") and not _on_a_gpu(e)]
    messages = []
    for event in marks:
        _, kind, *words = event.name().split(":")
        times = event.start_ns(), event.end_ns()
        if kind == MESSAGE:
            messages.append((*times, *words))
        elif kind == PHASE:
            yield Span(PHASE, words[0], *times)
        else:
            name, stage, micro_batch = words
            yield Span(STAGE, name, *times, stage=int(stage), micro_batch=int(micro_batch))
    computing = (
        _kernels(events)
        if device == "cuda"
        else _operations(events, {e.start_thread_id() for e in marks})
    )
    for start, end in union(computing, 0 if device == "cuda" else GAP):
        yield Span(COMPUTE, "compute", start, end)
    yield from _collectives(events, device, sorted(messages))


def _collectives(
    events: list[Any], device: str, messages: list[tuple[int, int, str, str]]
) -> Iterator[Span]:
    """Yield collectives, each with the axis of the first message before it that is still free.

    A GPU's are recorded twice: as the host calls them, which does not count, and as they run.
    """
    named = [event for event in events if event.name().startswith(("gloo:", "nccl:"))]
    runs = [event for event in named if (event.is_async() if device == "cpu" else _on_a_gpu(event))]
    for event in sorted(runs, key=lambda event: event.start_ns()):
        name, axis = event.name().split(":")[1], ""
        pair = name in ("send", "recv")
        before = [m for m in messages if m[0] <= event.start_ns() and (m[2] == "send") == pair]
        if before:
            axis = before[0][3]
            if name != "recv":  # which has no message of its own
                messages.remove(before[0])
        yield Span(COMMUNICATION, name, event.start_ns(), event.end_ns(), axis)


def _on_a_gpu(event: Any) -> bool:
    return bool(event.device_type() == DeviceType.CUDA)


def _kernels(events: list[Any]) -> Iterator[Interval]:
    """Yield a GPU's kernels, without the host's marks (ours and torch's), which span kernels."""
    for event in filter(_on_a_gpu, events):
        if not event.is_user_annotation() and "nccl" not in event.name().lower():
            yield event.start_ns(), event.end_ns()


def _operations(events: list[Any], threads: set[int]) -> Iterator[Interval]:
    """Yield the operations of the threads that train, without their waiting for messages."""
    for thread in threads:
        own = [e for e in events if e.start_thread_id() == thread and not e.is_async()]
        yield from difference(_covered(own, OPERATIONS), _covered(own, WAITS))


def _covered(events: list[Any], names: tuple[str, ...]) -> list[Interval]:
    return union(
        (event.start_ns(), event.end_ns()) for event in events if event.name().startswith(names)
    )
