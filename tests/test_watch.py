"""Looking on while ranks train: a false alarm does not end it, and each hang has its own
sentence.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from dtrain.config.schema import Inject, MissedCollective, Straggler
from dtrain.launch import hang_detector
from dtrain.launch.hang_detector import Hang, HangDetector
from dtrain.parallel.spans import EXCHANGE, FIGURES, FORWARD_BACKWARD
from dtrain.run.observers import observers_of

TIMEOUT_S = 0.4


def _entry(number: int, name: str, record: int, at: int = 0, over: bool = False) -> dict[str, Any]:
    return {
        "time_created_ns": at,
        "process_group": ["w", ""],
        "is_p2p": False,
        "retired": over,
        "collective_seq_id": number,
        "profiling_name": name,
        "input_sizes": [[2]],
        "input_dtypes": ["Float"],
        "record_id": record,
    }


class Ranks:
    """Watches of two ranks in one process; what each has begun is told by its name."""

    def __init__(self) -> None:
        store, self.begun = dist.HashStore(), ([], [])  # type: ignore[var-annotated]
        self.watches = []
        for rank in range(2):
            known = SimpleNamespace(
                get_rank=lambda rank=rank: rank,
                get_world_size=lambda: 2,
                get_process_group_ranks=lambda group: [0, 1],
                distributed_c10d=SimpleNamespace(_get_default_store=lambda: store),
                group=SimpleNamespace(WORLD=SimpleNamespace(group_name="w")),
            )
            with mock.patch("dtrain.launch.hang_detector.dist", known):
                self.watches.append(HangDetector({}, TIMEOUT_S))
            self.watches[rank]._thread.name = str(rank)
            self.watches[rank]._answer_s = 20.0  # the other's thread may be long in coming

    def recorded(self) -> list[list[dict[str, Any]]]:
        name = threading.current_thread().name
        rank = int(name) if name in "01" else self.asking
        whats = self.begun[rank]
        return [
            [_entry(n, f"gloo:{what}", n, at, self.over) for n, (what, at) in enumerate(whats, 1)]
        ]

    asking = 0  # the rank for whom this thread speaks
    over = False  # are the collectives that were begun?

    def begin(self, rank: int, step: int, *whats: str) -> None:
        self.watches[rank].step(step)
        self.begun[rank].extend((what, time.time_ns()) for what in whats)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks()

    def named(seconds: float, ask: Callable[[], Any]) -> Any:
        """In this thread: it tells whose notes are asked for."""
        try:
            return ask()
        except RuntimeError:
            return None

    with (
        mock.patch.object(hang_detector, "_recorded", made.recorded),
        mock.patch.object(hang_detector, "within", named),
    ):
        for watch in made.watches:
            watch.__enter__()
        yield made
        for watch in made.watches:
            watch.__exit__()
            watch._thread.join(10)


def _told(capfd: pytest.CaptureFixture[str], words: str, said: str = "") -> str:
    end = time.monotonic() + 20
    while words not in said or not said.endswith("\n"):
        assert time.monotonic() < end, said
        time.sleep(0.02)
        said += capfd.readouterr().err
    return said


def test_after_a_false_alarm_a_later_hang_is_told_with_its_own_words(
    ranks: Ranks, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first step takes long; in the third, rank 1 stays away.

    Each is told once, and the error has the latter.
    """
    for rank in (0, 1):
        ranks.begin(rank, 1, "first")
    _told(capfd, "all ranks have begun the same collectives (rank 0 in step 1, rank 1 in step 1)\n")
    time.sleep(3 * TIMEOUT_S)
    assert capfd.readouterr().err == ""  # not again, as long as nothing changes
    for rank in (1, 0):
        ranks.begin(rank, 3, *("second", "third")[: 2 - rank])
    said = _told(capfd, "rank 1 is missing")
    assert (
        said.count("\n") == 1
        and "step 3, axis world, collective 3, third of 2 float: rank 0 waits in it" in said
    )
    with pytest.raises(Hang, match="rank 1 is missing"), ranks.watches[0].explaining():
        raise RuntimeError("gloo: timed out")
    assert capfd.readouterr().err == ""


def test_where_nobody_waits_nothing_is_said(
    ranks: Ranks, capfd: pytest.CaptureFixture[str]
) -> None:
    """All collectives are over, and the next one is long in coming; it comes, and one rank is
    missing from it.
    """
    ranks.over = True
    for rank in (0, 1):
        ranks.begin(rank, 1, "first")
    time.sleep(4 * TIMEOUT_S)
    assert capfd.readouterr().err == ""
    ranks.over = False
    for rank in (1, 0):
        ranks.begin(rank, 2, *("second", "third")[: 2 - rank])
    assert "step 2, axis world, collective 3, third" in _told(capfd, "rank 1 is missing")


def test_the_notes_of_nccl_are_read_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recorder is another one, with numbers of its own: progress in either counts."""
    notes = {"_dump_fr_trace_json": [_entry(1, "gloo:barrier", 7)], "_dump_nccl_trace_json": []}
    for name, entries in notes.items():
        monkeypatch.setattr(
            hang_detector.c10d,
            name,
            lambda entries=entries: json.dumps({"entries": entries} if entries else {}),
            raising=False,
        )
    before = hang_detector._newest()
    notes["_dump_nccl_trace_json"] += [_entry(1, "nccl:all_reduce", 0)]
    assert hang_detector._newest() > before
    assert [hang_detector._what(e) for each in hang_detector._recorded() for e in each] == [
        "barrier of 2 float",
        "all_reduce of 2 float",
    ]


def test_a_rank_may_be_slow_and_stay_away() -> None:
    """A straggler and a fault on the same rank: both happen."""
    done: list[str] = []

    @contextmanager
    def noted(words: str) -> Iterator[None]:
        done.append(words)
        yield

    config = SimpleNamespace(
        inject=Inject(MissedCollective(rank=0, step=3), Straggler(rank=0, factor=2.0)),
        profile=False,
    )
    watch = SimpleNamespace(stuck_in=lambda step: noted(f"skipped in {step}"))
    with (
        mock.patch("dtrain.run.observers.dist.get_rank", lambda: 0),
        mock.patch(
            "dtrain.run.observers.slowed",
            lambda straggler, rank: noted(f"slow by {straggler.factor:g}"),
        ),
    ):
        job = SimpleNamespace(config=config, asynchronous=False)
        observers = observers_of(job, None, watch)  # type: ignore[arg-type]
        for name in (FORWARD_BACKWARD, EXCHANGE, FIGURES):
            with observers.phase(name):
                pass
    assert done == ["slow by 2", "skipped in 3"]
