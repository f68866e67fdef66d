"""How ranks are started and what is said of them, without starting any."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dtrain.config.schema import Straggler
from dtrain.launch import consistency, rank_processes, rendezvous
from dtrain.launch.consistency import refuse_differences
from dtrain.launch.fault_injection import slowed
from dtrain.launch.rank_processes import (
    ABORTED,
    RanksFailed,
    processes_left,
    spawn,
    write_error_file,
)
from dtrain.launch.rendezvous import process_group
from dtrain.launch.world import World

CPU = torch.device("cpu")
STOPPED = -signal.SIGTERM  # by torchrun, since another has failed


# Whose words count where several ranks fail


def _words(rank: int, at: float, words: str, folder: Path) -> str:
    """The file in which a rank has left its words at this second, if it has."""
    file = folder / f"{rank}.json"
    with (
        mock.patch.dict(os.environ, {rank_processes.ERROR_FILE: str(file)}),
        mock.patch("dtrain.launch.rank_processes.time.time", lambda: at),
    ):
        if words:
            write_error_file(words)
    return str(file)


class Ranks:
    """What `start_processes` gives: ranks that end at once.

    Args:
        statuses: with which they end; all with 0: `results` are what they return.
        stopped: ranks that are stopped since another has failed.
    """

    def __init__(
        self,
        statuses: list[int],
        files: dict[int, str] = {},  # noqa: B006
        results: Any = None,
        stopped: Any = (),
    ) -> None:
        self._pc = SimpleNamespace(
            processes=[
                SimpleNamespace(exitcode=s if r not in stopped else None)
                for r, s in enumerate(statuses)
            ]
        )
        self.error_files, self.closed = files, 0
        failures = {r: SimpleNamespace(exitcode=s) for r, s in enumerate(statuses) if s}
        self._ended = SimpleNamespace(
            is_failed=lambda: bool(failures), failures=failures, return_values=results
        )

    def wait(self, seconds: float) -> Any:
        return self._ended

    def close(self, number: int) -> None:
        self.closed += 1


Failures = list[tuple[float, int, str]]  # of each rank: second, exit status, words

OTHERS = "a collective failed"
ENDS: dict[str, tuple[Failures, int, str]] = {
    "the first": ([(100, 1, "mine"), (103, 1, OTHERS)], 1, "mine"),
    "another than rank 0": ([(103, 1, OTHERS), (100, 3, "mine")], 3, "mine"),
    "in the middle": ([(104, 1, OTHERS), (101, 2, "mine"), (109, 1, OTHERS)], 2, "mine"),
    "a signal": ([(103, 1, OTHERS), (100, -9, "")], -9, "rank 1 ended with signal 9"),
    "aborted": ([(103, 1, OTHERS), (100, -6, "")], -6, f"rank 1 ended with signal 6{ABORTED}"),
    "no words": ([(103, 1, OTHERS), (100, 7, "")], 7, "rank 1 ended with exit status 7"),
    "in the same second": ([(100.7, 1, OTHERS), (100.2, 2, "mine"), (100.9, 1, OTHERS)], 2, "mine"),
    "a signal in the same second": (
        [(100.7, 1, OTHERS), (100.5, -9, "")],
        -9,
        "rank 1 ended with signal 9",
    ),
    "beside stopped": ([(100, STOPPED, ""), (101, 4, "mine"), (102, STOPPED, "")], 4, "mine"),
    "stopped": ([(102, STOPPED, ""), (101, STOPPED, "")], STOPPED, "rank 0 ended with signal 15"),
}


@pytest.mark.parametrize("case", ENDS)
def test_the_reason_is_what_the_first_rank_to_fail_said(case: str, tmp_path: Path) -> None:
    """Not what others said later, nor the signal by which torchrun stopped them."""
    failures, status, words = ENDS[case]
    files = {
        rank: _words(rank, at, words, tmp_path) for rank, (at, _, words) in enumerate(failures)
    }
    statuses = [status for _, status, _ in failures]
    made = Ranks(
        statuses,
        files,
        stopped=[r for r, s in enumerate(statuses) if s == STOPPED and set(statuses) != {STOPPED}],
    )
    with (
        mock.patch("dtrain.launch.rank_processes.start_processes", lambda *_, **__: made),
        pytest.raises(RanksFailed) as said,
    ):
        spawn(print, nproc=len(statuses))
    assert (str(said.value), said.value.status) == (words, status) and made.closed


class Late:
    """A process that ends with status 3 at this look at it."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    @property
    def exitcode(self) -> int | None:
        self.looks -= 1
        return 3 if self.looks <= 0 else None


@pytest.mark.parametrize(
    ("words", "looks", "said"),
    [
        ("mine", 7, (3, "mine")),
        (OTHERS, 10**9, (1, OTHERS)),
        ("mine", 10**9, (1, OTHERS)),
        ("", 10**9, (1, OTHERS)),
    ],
)
def test_a_rank_that_failed_first_may_end_late(
    words: str, looks: int, said: tuple[int, str], tmp_path: Path
) -> None:
    """It leaves to rank 0 to say it, and is slow; but nobody waits for one that has lost
    another too, has said nothing, or never ends.
    """
    made = Ranks([1, 3], {0: _words(0, 103, OTHERS, tmp_path), 1: _words(1, 100, words, tmp_path)})
    made._pc.processes[1] = Late(looks)
    with (
        mock.patch("dtrain.launch.rank_processes.start_processes", lambda *_, **__: made),
        mock.patch("dtrain.launch.rank_processes.time.sleep"),
        pytest.raises(RanksFailed) as failed,
    ):
        spawn(print, nproc=2)
    assert (failed.value.status, str(failed.value)) == said and made.closed


# SIGTERM to whoever has started the ranks


def _told(ranks: list[Any], times: int, end: Callable[[], Any]) -> Any:
    """A launch that is sent SIGTERM so often while its ranks run; `end` is how they end."""

    def start(*_: Any, **__: Any) -> Any:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)
        return end()

    with (
        mock.patch("dtrain.launch.rank_processes.start_processes", start),
        mock.patch.object(multiprocessing, "active_children", lambda: ranks),
    ):
        return spawn(print, nproc=max(1, len(ranks)))


@pytest.fixture
def ending() -> Iterator[list[int]]:
    """What comes of SIGTERM where nobody catches it: noted, not done."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, before)


def test_sigterm_goes_to_every_rank_once_and_their_result_is_returned(ending: list[int]) -> None:
    ranks = [mock.Mock() for _ in range(3)]
    assert (
        _told(ranks, 1, lambda: Ranks([0, 0, 0], results={0: "stopped well", 1: "other"}))
        == "stopped well"
    )
    assert [rank.method_calls for rank in ranks] == [[mock.call.terminate()]] * 3 and not ending
    os.kill(os.getpid(), signal.SIGTERM)
    assert ending == [signal.SIGTERM]  # afterwards it is as it was


def test_a_second_signal_ends_all_at_once(ending: list[int]) -> None:
    ranks = [mock.Mock()]
    with pytest.raises(KeyboardInterrupt):
        _told(ranks, 2, lambda: Ranks([0]))
    assert ranks[0].method_calls == [mock.call.terminate(), mock.call.kill()] and not ending


def test_sigterm_before_there_is_a_rank_ends_the_launch(ending: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt):
        _told([], 1, lambda: Ranks([0]))


def test_ranks_that_fail_after_sigterm_were_told_to_end(ending: list[int], tmp_path: Path) -> None:
    """It is an interruption, and no failure of theirs."""
    failed = Ranks([1], {0: _words(0, 100, "a collective failed", tmp_path)})
    with pytest.raises(KeyboardInterrupt):
        _told([mock.Mock()], 1, lambda: failed)
    with pytest.raises(RanksFailed):
        _told([mock.Mock()], 0, lambda: failed)


@pytest.mark.parametrize(
    ("number", "heard"), [(signal.SIGTERM, True), (signal.SIGHUP, False), (signal.SIGINT, False)]
)
def test_what_is_ignored_stays_so_but_sigterm_which_nodes_ignore_until_ranks_listen(
    number: int, heard: bool
) -> None:
    before, told = signal.signal(number, signal.SIG_IGN), []
    try:
        with rank_processes.on_stop_signals(lambda number, frame: told.append(number)):
            os.kill(os.getpid(), number)
        assert told == [number] * heard and signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


# Threads


THREADS = [(1, 1), (3, 1), (5, 2), (None, 1), (None, 2), (None, 10_000)]


@pytest.mark.parametrize(("asked", "local_size"), THREADS)
def test_a_rank_has_the_threads_that_were_asked_for(asked: int | None, local_size: int) -> None:
    """Or its share of the cores, and one at least; afterwards the process has those that it had."""
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        with process_group(World(local_size=local_size), CPU, threads=asked, timeout_s=10):
            share = max(1, len(os.sched_getaffinity(0)) // local_size)
            assert torch.get_num_threads() == (asked or share)
        assert torch.get_num_threads() == 7 and not dist.is_initialized()
    finally:
        torch.set_num_threads(before)


# A rank that is slow on purpose


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0, 10.0])
def test_a_straggler_takes_so_many_times_as_long(factor: float) -> None:
    """By a clock of ours: two seconds of work; no other rank waits."""
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    clock = SimpleNamespace(perf_counter=lambda: now[0], sleep=sleep)
    with mock.patch("dtrain.launch.fault_injection.time", clock):
        for rank, expected in ((1, 2 * factor), (0, 2.0), (-1, 2.0)):
            begun = now[0]
            with slowed(Straggler(rank=1, factor=factor), rank):
                now[0] += 2
            assert now[0] - begun == expected


# Do all ranks run the same?


@contextmanager
def _ranks(size: int) -> Iterator[Callable[[Callable[[int], None]], list[str]]]:
    """Threads as ranks, whose `all_gather_object` meets: what each has raised."""
    meeting, own, given = threading.Barrier(size), threading.local(), [None] * size

    def gathered(mine: Any) -> list[Any]:
        given[own.rank] = mine
        meeting.wait(60)
        every = list(given)
        meeting.wait(60)
        return every

    def run(function: Callable[[int], None]) -> list[str]:
        said = [""] * size

        def work(rank: int) -> None:
            own.rank = rank
            try:
                function(rank)
            except ValueError as error:
                said[rank] = str(error)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return said

    with mock.patch.object(consistency, "all_gather_object", gathered):
        yield run


@pytest.fixture
def code(tmp_path: Path) -> Iterator[Path]:
    """Two files in place of all of ours."""
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text(f"# {name}\n")
    with mock.patch.object(consistency, "ROOT", tmp_path):
        yield tmp_path


@pytest.mark.parametrize("odd", range(4))
def test_whichever_rank_is_to_run_something_else_is_found(odd: int, code: Path) -> None:
    """Every rank says the same of it: of four, the first that is not as rank 0, and in what."""
    with _ranks(4) as run:
        said = run(lambda rank: refuse_differences({"a": {"steps": 5 + (rank == odd)}}, {}))
    first, (there, here) = max(odd, 1), (5, 6) if odd == 0 else (6, 5)
    assert len(set(said)) == 1 and said[0].startswith(f"rank {first} on ")
    assert said[0].endswith(f": a.steps is {there} there, {here} here")


def test_what_decides_the_result_is_compared_and_nothing_else(code: Path) -> None:
    """Settings, data and each file of the code; not how a machine starts its ranks."""
    settings: list[dict[str, Any]] = [{"steps": 5, "launch": {"threads": n}} for n in range(2)]
    with _ranks(2) as run:
        assert run(lambda rank: refuse_differences(settings[rank], {"rows": 9})) == ["", ""]
        said = run(lambda rank: refuse_differences(settings[rank], {"rows": 9 + rank}))
        assert said[0].endswith(": the prepared data.rows is 10 there, 9 here")
    facts = consistency._facts({}, {})
    (code / "two.py").write_text("# changed\n")
    changed = consistency._facts({}, {})
    assert [name for name in facts if facts[name] != changed[name]] == ["the code of dtrain/two.py"]
    digest = hashlib.sha256(b"# changed\n").hexdigest()
    assert digest.startswith(changed["the code of dtrain/two.py"]) and len(facts) == 4


def test_an_agents_name_does_not_tell_the_rendezvous_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is written into checkpoints; outside Linux nothing else tells one torchrun from the
    next of its number.
    """
    monkeypatch.setattr(rendezvous, "all_gather_object", lambda own: [own])
    monkeypatch.delenv(rendezvous.MEETING, raising=False)
    monkeypatch.setattr(Path, "exists", lambda _: False)  # no /proc
    named = {}
    for secret in ("0123456789abcdef", "another", "0123456789abcdef"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", secret)
        (agent,) = rendezvous.elastic_agents()
        assert secret not in agent and named.setdefault(secret, agent) == agent
    assert len(set(named.values())) == 2


# Limits


@pytest.mark.parametrize(("groups", "files", "left"), [
    ("0::/a/b\n", {"a/b": ("max", 3), "a": ("40", 30), "": ("max", 99)}, 10),
    ("0::/\n", {"": ("100", 1)}, 99),
    ("0::/gone\n", {}, math.inf),
    ("5:cpu,pids:/x\n1:memory:/x\n0::/\n",
     {"pids/x": ("7", 2), "pids": ("max", 50), "memory/x": ("1", 1)}, 5),
    ("3:pids:/x\n", {"pids/x": ("nonsense", 2)}, math.inf),
    ("", {}, math.inf),
],
ids=["of a group above", "a container's", "not to be seen", "the older kind", "unknown",
     "none"])  # fmt: skip
def test_what_control_groups_leave(
    groups: str, files: dict[str, Any], left: float, tmp_path: Path
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for place, (most, used) in files.items():
        group = tmp_path / "sys/fs/cgroup" / place
        group.mkdir(parents=True, exist_ok=True)
        (group / "pids.max").write_text(f"{most}\n")
        (group / "pids.current").write_text(f"{used}\n")
    assert processes_left(tmp_path) == left


@pytest.mark.parametrize(("left", "starts"), [(25, False), (26, True)])
def test_no_rank_is_started_where_two_have_no_room(left: float, starts: bool) -> None:
    """Gloo would abort one of them, or wait for a thread that could not begin."""
    made = mock.Mock(side_effect=ZeroDivisionError)
    with (
        mock.patch("dtrain.launch.rank_processes.processes_left", lambda: left),
        mock.patch("dtrain.launch.rank_processes.start_processes", made),
        pytest.raises(ZeroDivisionError if starts else BlockingIOError),
    ):
        spawn(print, nproc=2)
    assert made.called == starts
