"""Where the time of a step goes: torch's profiler, read as spans of a few kinds.

    phase          what the loop does: forward, backward, optimizer ...
    stage          one micro-batch in one stage of a pipeline, forward or backward
    compute        operations on the device (CPU: of the training thread), gaps below GAP bridged
    communication  a collective, from its call until its result is there

Communication is overlapped while something is computed, and exposed while nothing is. A send counts
by its receiver: the sender has no need to wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dtrain.parallel.spans import MARK, MESSAGE, PHASE, STAGE

COMPUTE, COMMUNICATION = "compute", "communication"
OPERATIONS = ("aten::", "fsdp::", "cpp_fused", "triton_")  # names of what computes on a CPU
WAITS = ("c10d::", "_c10d_functional::", "gloo:")  # and of what may wait within it
GAP = 100_000  # nanoseconds between two operations in which Python prepares the next one

Interval = tuple[int, int]


@dataclass(frozen=True)
class Span:
    """Something that one rank did: nanoseconds on a clock that a machine's ranks share.

    Args:
        kind, name: one of the kinds above; what.
        axis: of a collective.
        stage, micro_batch: of a pipeline's work.
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
    """What this rank does while it is recorded."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    @contextmanager
    def recording(self, device: torch.device) -> Iterator[None]:
        """Fill `spans` with what happens within."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # it tells of every start and stop
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        with profile(activities=activities, acc_events=True) as profiler:
            yield
        events = profiler.profiler.kineto_results.events()
        self.spans = sorted(_spans(events, device.type), key=lambda span: (span.start, -span.end))

    def shares(self) -> Shares:
        """How the time between the first phase's begin and the last one's end was spent."""
        phases = self._of(PHASE)
        begin, end = min(start for start, _ in phases), max(end for _, end in phases)
        # what comes before or after it, such as this measurement's own, is no part of it
        step = [(begin, end)]
        computing = intersection(self._of(COMPUTE), step)  # merged when they were read
        messages = union(
            (s.start, s.end) for s in self.spans if s.kind == COMMUNICATION and s.name != "send"
        )
        talking = intersection(messages, step)
        overlapped = length(intersection(computing, talking))
        seconds = [x / 1e9 for x in (end - begin, length(computing), length(talking), overlapped)]
        return Shares(seconds[0], seconds[1], seconds[2], seconds[2] - seconds[3], seconds[3])

    def _of(self, kind: str) -> list[Interval]:
        return [(span.start, span.end) for span in self.spans if span.kind == kind]


def union(intervals: Iterable[Interval], gap: int = 0) -> list[Interval]:
    """Disjoint intervals in order that cover the same; those less than `gap` apart are joined."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start - found[-1][1] <= gap:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def intersection(ours: list[Interval], theirs: list[Interval]) -> list[Interval]:
    """What two lists of disjoint intervals, in order, both cover."""
    found, i, j = [], 0, 0
    while i < len(ours) and j < len(theirs):
        start, end = max(ours[i][0], theirs[j][0]), min(ours[i][1], theirs[j][1])
        if start < end:
            found.append((start, end))
        if ours[i][1] < theirs[j][1]:
            i += 1
        else:
            j += 1
    return found


def difference(ours: list[Interval], theirs: list[Interval]) -> list[Interval]:
    """What the first of two lists of disjoint intervals, in order, covers and the second does
    not.
    """
    if not ours:
        return []
    ends = [ours[0][0], *(t for interval in theirs for t in interval), ours[-1][1]]
    return intersection(
        ours,
        [(start, end) for start, end in zip(ends[::2], ends[1::2], strict=True) if start < end],
    )


def length(intervals: Iterable[Interval]) -> int:
    """The length of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def _spans(events: list[Any], device: str) -> Iterator[Span]:
    marks = [
        event for event in events if event.name().startswith(f"{MARK}:") and not _on_a_gpu(event)
    ]
    messages = []
    for event in marks:
        _, kind, *words = event.name().split(":")
        if kind == MESSAGE:
            messages.append((event.start_ns(), event.end_ns(), *words))
        elif kind == PHASE:
            yield Span(PHASE, words[0], event.start_ns(), event.end_ns())
        else:
            name, stage, micro_batch = words
            yield Span(
                STAGE, name, event.start_ns(), event.end_ns(), "", int(stage), int(micro_batch)
            )
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
    """Each with the axis of its message: the first one before it that has no other collective yet.

    On a GPU they are there twice, as the host calls them and as they run.
    """
    named = [event for event in events if event.name().startswith(("gloo:", "nccl:"))]
    seen = [event for event in named if (event.is_async() if device == "cpu" else _on_a_gpu(event))]
    for event in sorted(seen, key=lambda event: event.start_ns()):
        name, axis = event.name().split(":")[1], ""
        pair = name in ("send", "recv")
        before = [m for m in messages if m[0] <= event.start_ns() and (m[2] == "send") == pair]
        if before:
            axis = before[0][3]
            if name != "recv":  # which has no message of its own
                messages.remove(before[0])
        yield Span(COMMUNICATION, name, event.start_ns(), event.end_ns(), axis)


def _on_a_gpu(event: Any) -> bool:
    return bool(event.device_type() == torch.autograd.DeviceType.CUDA)


def _kernels(events: list[Any]) -> Iterator[Interval]:
    """What a GPU computes: not the marks of the host, ours or torch's, each of which spans the
    kernels of its time.
    """
    for event in filter(_on_a_gpu, events):
        if not event.is_user_annotation() and "nccl" not in event.name().lower():
            yield event.start_ns(), event.end_ns()


def _operations(events: list[Any], threads: set[int]) -> Iterator[Interval]:
    """What the threads that train compute: their operations, without the messages that some of
    them wait for.
    """
    for thread in threads:
        own = [e for e in events if e.start_thread_id() == thread and not e.is_async()]
        yield from difference(_covered(own, OPERATIONS), _covered(own, WAITS))


def _covered(events: list[Any], names: tuple[str, ...]) -> list[Interval]:
    return union(
        (event.start_ns(), event.end_ns()) for event in events if event.name().startswith(names)
    )
