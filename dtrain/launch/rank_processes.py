"""Processes: who this rank is, and how ranks are started.

Under torchrun (or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) this
process is a rank. Otherwise it starts `launch.nproc` ranks of its own, which meet in a file and
listen to nobody else, or is the only one.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import re
import select
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    PContext,
    Std,
    start_processes,
)

from dtrain.config.errors import HOLD_LESS
from dtrain.launch.flight_recorder import LOST
from dtrain.launch.world import VARIABLES

# By the server from which ranks are forked: what every run needs, after what lets Ctrl-C end the
# import quietly.
PRELOADED = ["dtrain.launch.interrupts", "dtrain.cli", "dtrain.launch.fork_server"]
# the variable that tells a rank where to leave its last words
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
# the variable that tells ranks that we start ourselves in which file they meet
MEETING = "DTRAIN_MEETING"
A_RANK = 12  # processes and threads that a rank takes, at least
POLL_S = 0.05  # how often the launcher looks after its ranks
ENDING_S = 10.0  # how long it waits for the end of a rank that has said why it ends
# signals that have asked this process to end: what comes after this run does not begin
STOP_REQUESTS: list[int] = []
# signals that ask for the end: a checkpoint, then no more steps
STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class RanksFailed(RuntimeError):
    """Ranks that this process has started ended with an error, which they have said themselves if
    they could.

    Attributes:
        status: the exit status of the rank that failed first; negative: the signal that ended it.
        printed: whether that rank has printed why; if not, nobody has.
    """

    def __init__(self, rank: int, status: int, words: str, printed: bool, why: str = "") -> None:
        ending = f"signal {-status}" if status < 0 else f"exit status {status}"
        super().__init__(
            words if printed else f"rank {rank} ended with {ending}{f': {words}' if words else why}"
        )
        self.status, self.printed = status, printed


def exit_with_parent(starter: int) -> None:
    """End this process when that one, which has started it, is gone, however it ended."""
    threading.Thread(target=_end_with, args=(starter,), daemon=True).start()


def run_and_exit_with_parent(starter: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function in a rank that ends when the process that has started the ranks is
    gone, however it ended.
    """
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # no longer what the fork server does
            signal.signal(
                number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            )
    exit_with_parent(starter)
    return function(*arguments)


def _end_with(process: int) -> None:
    try:
        if hasattr(os, "pidfd_open"):
            select.select([os.pidfd_open(process)], [], [])
        else:
            while True:
                os.kill(process, 0)
                time.sleep(1)
    except ProcessLookupError:
        pass
    os._exit(1)


def write_error_file(line: str) -> None:
    """Let whoever has started this rank know why it ends."""
    if file := os.environ.get(ERROR_FILE):
        now = time.time()  # torchrun takes whole seconds
        words = {"message": line, "extraInfo": {"timestamp": str(int(now))}, "when": now}
        Path(file).write_text(json.dumps({"message": words}))


def _said(error_file: str) -> tuple[str, float | None, bool]:
    """The words that a rank has left, when, and whether it has said them: torch keeps to itself
    what it finds.
    """
    try:
        words = json.loads(Path(error_file).read_text())["message"]
        return (
            str(words["message"]),
            float(words.get("when") or words["extraInfo"]["timestamp"]),
            "when" in words,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "", None, False


def _speaks(alive: Iterable[int], failed: Iterable[int], error_files: Mapping[int, str]) -> bool:
    """Have those that have ended only lost another rank, and is one about to end that has said
    why it fails?
    """
    said = {rank: _said(error_files[rank])[0] for rank in (*alive, *failed)}
    lost = all(said[rank].startswith(LOST) for rank in failed)
    return lost and any(said[rank] and not said[rank].startswith(LOST) for rank in alive)


def _first(failed: Mapping[int, int], error_files: Mapping[int, str], why: str = "") -> RanksFailed:
    """What the rank says that failed before the others, by their exit statuses and where they have
    left their words.

    Those that were stopped for it are no reason; one without words has been killed, and the others
    have lost it.

    Args:
        why: the reason, where it was SIGKILL.
    """
    whys = {-signal.SIGKILL: why, -signal.SIGABRT: ABORTED}
    by_itself = {
        rank: status for rank, status in failed.items() if status != -signal.SIGTERM
    } or failed
    said = {rank: _said(error_files[rank]) for rank in by_itself}
    rank = min(by_itself, key=lambda rank: said[rank][1] or 0.0)
    words, _, printed = said[rank]
    return RanksFailed(rank, by_itself[rank], words, printed, whys.get(by_itself[rank], ""))


ABORTED = (  # by gloo, whose C++ has no other way out of a thread that cannot begin
    ": a library has aborted it, for what it says above; where a resource is unavailable, allow "
    "more processes "
    "(ulimit -u, a container's limit of pids)"
)


class MemoryWatch:
    """Has the kernel ended a process of this machine for want of memory since this was made?

    It sends SIGKILL.
    """

    def __init__(self) -> None:
        self.before = self._killed()

    @staticmethod
    def _killed() -> int:
        try:
            found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.M)
        except OSError:  # no Linux
            return 0
        return int(found[1]) if found else 0

    def __str__(self) -> str:
        """For behind what has ended; empty if not."""
        if self._killed() == self.before:
            return ""
        return (
            ": the kernel has ended a process for want of memory (the machine's, or a container's "
            "or job's limit): "
            f"allow more, or {HOLD_LESS}"
        )


def spawn(
    function: Callable[..., Any], *arguments: Any, nproc: int, output: Path | None = None
) -> Any:
    """Run `function(*arguments)` in `nproc` new ranks on this machine; return what rank 0's
    returned.

    Ranks are forked from a server that has imported what they need: the first ones wait for it,
    later ones do not. They meet in a file that nobody else can read, and listen on the loopback
    interface alone: no other machine, and no other user's process, gets a word in.

    Args:
        output: a folder for what the ranks print; None: they print here.

    Raises:
        RanksFailed: a rank ended with an error; the others were stopped.
        KeyboardInterrupt: this process was told to end, and so the ranks have; by SIGINT also where
            they ended well.
        BlockingIOError: so many processes are not allowed.
    """
    # a failing rank speaks for itself
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # others are ours
    if processes_left() < nproc * A_RANK + 2:  # the tracker of resources, and the server that forks
        raise BlockingIOError  # gloo would abort, or wait for a thread that never began
    start_tracker()
    multiprocessing.set_forkserver_preload(PRELOADED)
    told: list[int] = []
    memory = MemoryWatch()
    with tempfile.TemporaryDirectory(prefix="dtrain-") as place, _passing_on(told):
        logs = (
            DefaultLogsSpecs(str(output), redirects=Std.ALL) if output else DefaultLogsSpecs(place)
        )
        starts = {rank: (os.getpid(), function, *arguments) for rank in range(nproc)}
        environments = {
            rank: _environment(rank, nproc, f"{place}/meeting") for rank in range(nproc)
        }
        ranks = _started(starts, environments, logs)
        try:
            failed, ended = _awaited(ranks)
        finally:
            ranks.close(signal.SIGTERM)
        if signal.SIGINT in told or (told and ended.is_failed()):
            raise KeyboardInterrupt
        if ended.is_failed():
            noticed = {rank: failure.exitcode for rank, failure in ended.failures.items()}
            raise _first(failed or noticed, ranks.error_files, str(memory))
        return ended.return_values[0]


def processes_left(system: Path = Path("/")) -> float:
    """How many more processes and threads the control groups of this one allow; endless without a
    limit.

    Args:
        system: where /proc and /sys are.
    """
    left = math.inf
    with suppress(OSError, ValueError):  # no Linux, or not to be read
        for line in (system / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "pids" not in controllers.split(","):
                continue
            root = system / "sys/fs/cgroup" / ("pids" if controllers else "")
            for group in ((place := root / path.lstrip("/")), *place.parents):
                if group.is_relative_to(root) and (group / "pids.max").exists():
                    most = (group / "pids.max").read_text().strip()
                    used = int((group / "pids.current").read_text())
                    left = min(left, math.inf if most == "max" else int(most) - used)
    return left


def _awaited(ranks: PContext) -> tuple[dict[int, int], Any]:
    """Wait for the end of all ranks, or of one that fails; exit statuses of those that have
    failed by themselves.
    """
    processes, patience, failed, ended = ranks._pc.processes, ENDING_S, {}, None  # type: ignore[attr-defined]
    while ended is None:  # whoever has failed before the others are stopped has done so by itself
        time.sleep(POLL_S)
        codes = dict(enumerate([each.exitcode for each in processes]))
        failed = {rank: code for rank, code in codes.items() if code}
        alive = [rank for rank, code in codes.items() if code is None]
        patience -= POLL_S if failed else 0.0
        if failed and patience > 0 and _speaks(alive, failed, ranks.error_files):
            continue  # to end all now would end it before it has said why
        ended = ranks.wait(0)
    return failed, ended


def _started(
    starts: dict[int, tuple[Any, ...]],
    environments: dict[int, dict[str, str]],
    logs: DefaultLogsSpecs,
) -> PContext:
    try:
        return start_processes(
            "dtrain",
            run_and_exit_with_parent,
            starts,
            environments,
            logs,
            start_method="forkserver",
        )
    except EOFError:  # of the server: it could not fork, and has said so in a traceback of its own
        for rank in multiprocessing.active_children():
            rank.kill()
        raise BlockingIOError from None


def _environment(rank: int, nproc: int, meeting: str) -> dict[str, str]:
    """What a rank of ours finds in its environment; interfaces that the user has chosen stay."""
    found = {
        name: str(number)
        for name, number in zip(VARIABLES, (rank, nproc, rank, nproc), strict=False)
    }
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback else ():
        found[variable] = os.environ.get(variable, str(loopback))
    # which names their folder of output
    return found | {MEETING: meeting, "TORCHELASTIC_RUN_ID": "ranks"}


def start_tracker() -> None:
    """Start Python's tracker of shared resources so that a closed terminal does not end it;
    SIGTERM does not anyway.
    """
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it inherits that
    try:
        resource_tracker.ensure_running()
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals that ask for the end call it; one that is ignored stays so: `nohup` does that to
    SIGHUP.

    But not SIGTERM, which launch/node.sh has ignored until somebody listens.
    """

    def hear(number: int, frame: FrameType | None) -> None:
        STOP_REQUESTS.append(number)
        handler(number, frame)

    heard = [
        number
        for number in STOPS
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, hear) for number in heard}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def _passing_on(told: list[int]) -> Iterator[None]:
    """The first signal that asks for the end goes to the ranks, which may end well; another one
    ends them at once.

    It goes on as SIGTERM, of which more than one do no harm: a terminal's Ctrl-C comes to the ranks
    by itself as well.
    """

    def tell(number: int, frame: FrameType | None) -> None:
        again, ranks = bool(told), multiprocessing.active_children()
        told.append(number)
        for rank in ranks:
            rank.kill() if again else rank.terminate()
        if again or not ranks:
            raise KeyboardInterrupt

    with on_stop_signals(tell):
        yield
