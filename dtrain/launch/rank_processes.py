"""Start the ranks of a run on this machine, follow them, and end them together.

Only where no launcher has: under torchrun, or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR
and MASTER_PORT, a process is a rank already. Ranks that we start meet in a file and listen to
nobody else.
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
    RunProcsResult,
    Std,
    start_processes,
)

from dtrain.config.errors import HOLD_LESS
from dtrain.launch.flight_recorder import LOST
from dtrain.launch.world import VARIABLES

# Modules that the fork server imports, `interrupts` first: what every run needs.
PRELOADED = ["dtrain.launch.interrupts", "dtrain.cli", "dtrain.launch.fork_server"]
# The variable that names the file in which a rank writes why it ends.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
# The variable that names the file in which ranks meet that we start.
MEETING = "DTRAIN_MEETING"
A_RANK = 12  # processes and threads that a rank takes, at least
POLL_S = 0.05  # how often the launcher looks after its ranks
ENDING_S = 10.0  # how long it waits for the end of a rank that has said why it ends
# Signals that have asked this process to end: what comes after this run does not begin.
STOP_REQUESTS: list[int] = []
# Signals that ask for the end: a checkpoint, then no more steps.
STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class RanksFailed(RuntimeError):
    """Ranks that this process has started ended with an error.

    Args:
        message: what the rank that failed first has written; empty: nothing.
        reason: why a rank ended that has written nothing.

    Attributes:
        status: the exit status of the rank that failed first; negative: the signal that ended it.
        printed: whether that rank has printed why; if not, nobody has.
    """

    def __init__(
        self, rank: int, status: int, message: str, printed: bool, reason: str = ""
    ) -> None:
        ending = f"signal {-status}" if status < 0 else f"exit status {status}"
        reason = f": {message}" if message else reason
        super().__init__(message if printed else f"rank {rank} ended with {ending}{reason}")
        self.status, self.printed = status, printed


def exit_with_parent(starter: int) -> None:
    """End this process when the process `starter`, which has started it, is gone."""
    threading.Thread(target=_end_with, args=(starter,), daemon=True).start()


def run_and_exit_with_parent(starter: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function in a rank, which ends when the process that started it is gone."""
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # not the fork server's handler any more
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
    """Write why this rank ends into the file that its starter reads."""
    if file := os.environ.get(ERROR_FILE):
        now = time.time()  # torchrun takes whole seconds
        error = {"message": line, "extraInfo": {"timestamp": str(int(now))}, "when": now}
        Path(file).write_text(json.dumps({"message": error}))


def _read_error_file(path: str) -> tuple[str, float, bool]:
    """Return why a rank ends, when it wrote that, and whether it has printed it, too.

    A file without "when" is torch's, which does not print its error.
    """
    try:
        error = json.loads(Path(path).read_text())["message"]
        time_written = float(error.get("when") or error["extraInfo"]["timestamp"])
        return str(error["message"]), time_written, "when" in error
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "", 0.0, False


def _cause_is_alive(
    alive: Iterable[int], failed: Iterable[int], error_files: Mapping[int, str]
) -> bool:
    """Return whether all failed ranks have lost another one, and a live one has written why."""
    messages = {rank: _read_error_file(error_files[rank])[0] for rank in (*alive, *failed)}
    lost = {rank for rank, message in messages.items() if message.startswith(LOST)}
    return lost.issuperset(failed) and any(messages[rank] for rank in alive if rank not in lost)


def _first(
    failed: Mapping[int, int], error_files: Mapping[int, str], killed: str = ""
) -> RanksFailed:
    """Return the error of the rank that failed before the others.

    Ranks that were stopped by SIGTERM are not the reason. A rank that has written nothing has been
    killed, and the others have lost it.

    Args:
        failed: exit statuses by rank.
        killed: the reason, if the rank ended by SIGKILL.
    """
    reasons = {-signal.SIGKILL: killed, -signal.SIGABRT: ABORTED}
    by_themselves = {rank: code for rank, code in failed.items() if code != -signal.SIGTERM}
    candidates = by_themselves or failed
    errors = {rank: _read_error_file(error_files[rank]) for rank in candidates}
    rank = min(candidates, key=lambda rank: errors[rank][1])
    message, _, printed = errors[rank]
    status = candidates[rank]
    return RanksFailed(rank, status, message, printed, reasons.get(status, ""))


# gloo's C++ has no other way out of a thread that cannot begin.
ABORTED = (
    ": a library has aborted it, for what it says above; where a resource is unavailable, allow "
    "more processes (ulimit -u, a container's limit of pids)"
)


class MemoryWatch:
    """Find out whether the kernel has killed a process of this machine for want of memory."""

    def __init__(self) -> None:
        self.before = self._killed()

    @staticmethod
    def _killed() -> int:
        try:
            count = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.M)
        except OSError:  # no Linux
            return 0
        return int(count[1]) if count else 0

    def __str__(self) -> str:
        """Return the reason for a message's end; empty: no process was killed since this began."""
        if self._killed() == self.before:
            return ""
        return (
            ": the kernel has ended a process for want of memory (the machine's, or a container's "
            f"or job's limit): allow more, or {HOLD_LESS}"
        )


def spawn(
    function: Callable[..., Any], *arguments: Any, nproc: int, output: Path | None = None
) -> Any:
    """Run `function(*arguments)` in `nproc` new ranks on this machine; return rank 0's result.

    Ranks are forked from a server that has imported what they need: only the first ones wait for
    that. They meet in a file that nobody else can read, and listen on the loopback interface alone:
    no other machine, and no other user's process, can take part.

    Args:
        output: a folder for what the ranks print; None: they print here.

    Raises:
        RanksFailed: a rank ended with an error; the others were stopped.
        KeyboardInterrupt: a signal asked for the end, and the ranks have ended; by SIGINT also
            where they ended well.
        BlockingIOError: the system does not allow so many processes.
    """
    # A failing rank prints its reason itself.
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # we handle all others
    if processes_left() < nproc * A_RANK + 2:  # the tracker of resources, and the server that forks
        raise BlockingIOError  # gloo would abort, or wait for a thread that never began
    start_tracker()
    multiprocessing.set_forkserver_preload(PRELOADED)
    received: list[int] = []
    memory = MemoryWatch()
    with tempfile.TemporaryDirectory(prefix="dtrain-") as folder, _passing_on(received):
        logs = (
            DefaultLogsSpecs(str(output), redirects=Std.ALL) if output else DefaultLogsSpecs(folder)
        )
        starts = {rank: (os.getpid(), function, *arguments) for rank in range(nproc)}
        environments = {
            rank: _environment(rank, nproc, f"{folder}/meeting") for rank in range(nproc)
        }
        ranks = _start(starts, environments, logs)
        try:
            failed, result = _wait(ranks)
        finally:
            ranks.close(signal.SIGTERM)
        if signal.SIGINT in received or (received and result.is_failed()):
            raise KeyboardInterrupt
        if result.is_failed():
            failures = {rank: failure.exitcode for rank, failure in result.failures.items()}
            raise _first(failed or failures, ranks.error_files, str(memory))
        return result.return_values[0]


def processes_left(system: Path = Path("/")) -> float:
    """Return how many more processes and threads this one's control groups allow; inf: no limit.

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
            own = root / path.lstrip("/")
            for group in (own, *own.parents):
                if group.is_relative_to(root) and (group / "pids.max").exists():
                    most = (group / "pids.max").read_text().strip()
                    used = int((group / "pids.current").read_text())
                    left = min(left, math.inf if most == "max" else int(most) - used)
    return left


def _wait(ranks: PContext) -> tuple[dict[int, int], RunProcsResult]:
    """Wait for the end of all ranks, or of one that fails.

    Return the exit statuses of ranks that have failed before the others were stopped, and torch's
    result.
    """
    processes: list[Any] = ranks._pc.processes  # type: ignore[attr-defined]
    patience, result = ENDING_S, None
    failed: dict[int, int] = {}
    while result is None:
        time.sleep(POLL_S)
        codes = dict(enumerate([each.exitcode for each in processes]))
        failed = {rank: code for rank, code in codes.items() if code}
        alive = [rank for rank, code in codes.items() if code is None]
        patience -= POLL_S if failed else 0.0
        if failed and patience > 0 and _cause_is_alive(alive, failed, ranks.error_files):
            continue  # stopping all now would end that rank before it has said why
        result = ranks.wait(0)
    return failed, result


def _start(
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
    except EOFError:  # the server could not fork, and has printed a traceback
        for rank in multiprocessing.active_children():
            rank.kill()
        raise BlockingIOError from None


def _environment(rank: int, nproc: int, meeting: str) -> dict[str, str]:
    """Return the variables of a rank that we start; interfaces that the user has chosen stay."""
    numbers = (rank, nproc, rank, nproc)
    variables = {name: str(n) for name, n in zip(VARIABLES, numbers, strict=False)}
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback else ():
        variables[variable] = os.environ.get(variable, str(loopback))
    # torch names the folder of their output by the run's id.
    return variables | {MEETING: meeting, "TORCHELASTIC_RUN_ID": "ranks"}


def start_tracker() -> None:
    """Start Python's tracker of shared resources so that a closed terminal does not end it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the tracker inherits it
    try:
        resource_tracker.ensure_running()
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handler` at signals that ask for the end, while the context lasts.

    A signal that is ignored stays so (`nohup` ignores SIGHUP), except SIGTERM: launch/node.sh
    ignores that until its ranks handle it.
    """

    def receive(number: int, frame: FrameType | None) -> None:
        STOP_REQUESTS.append(number)
        handler(number, frame)

    handled = [
        number
        for number in STOPS
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, receive) for number in handled}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def _passing_on(received: list[int]) -> Iterator[None]:
    """Pass the first signal that asks for the end to the ranks as SIGTERM; kill them at another.

    More than one SIGTERM does no harm: a terminal's Ctrl-C reaches the ranks by itself as well.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        again, ranks = bool(received), multiprocessing.active_children()
        received.append(number)
        for rank in ranks:
            rank.kill() if again else rank.terminate()
        if again or not ranks:
            raise KeyboardInterrupt

    with on_stop_signals(pass_on):
        yield
