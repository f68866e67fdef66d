"""Processes that are forked from one that has imported everything: a start takes 50 ms instead of 3
s.

A `Nursery` is a server process, `Process` what `subprocess.Popen` is. What runs in it runs as the
interpreter would run it: its own arguments, folder, environment, standard streams, session.
Python's own fork server and torchrun's ranks are forked from the command itself before it has any
thread, so that who is whose parent stays as it is. What a library reads from the environment when
it is imported is the server's: such tests use `subprocess`.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import gc
import importlib
import json
import multiprocessing.util
import os
import random
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
from torch.distributed.run import main as torchrun

from dtrain.launch.rank_processes import PRELOADED as PRELOADED_BY_OURS
from dtrain.launch.rank_processes import start_tracker

PRELOADED = (
    "dtrain.cli",
    "dtrain.compare.capabilities",
    "dtrain.report.files",
    "torch.distributed.run",
    "torch.distributed.tensor",
    "cases",
    "worlds",
    "pytest",
    "hypothesis.strategies",
    "sklearn.metrics",
    "scipy.linalg",
    "PIL.Image",
    "matplotlib.figure",
)
LARGEST = 1 << 20  # bytes of a request
PR_SET_PDEATHSIG = 1  # of prctl(2)
TORCHRUN = "torch.distributed.run"


# The server


def serve(address: str, *, binds: bool) -> None:
    """Fork for each request until whoever holds the other end of standard input is gone.

    Args:
        binds: what was forked is then killed.
    """
    reaped_r, reaped_w = os.pipe()
    os.set_blocking(reaped_r, False)
    os.set_blocking(reaped_w, False)
    signal.set_wakeup_fd(reaped_w, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    askers: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(address)
        listener.listen(64)
        for file in (listener.fileno(), reaped_r, 0):
            selector.register(file, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd == 0:
                    os._exit(0)
                elif key.fd == reaped_r:
                    os.read(reaped_r, 4096)
                    _reap(askers)
                else:
                    asker, _ = listener.accept()
                    request, files = _receive(asker)
                    pid = os.fork()
                    if not pid:
                        if binds:
                            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                        _become(request, files)
                    asker.sendall(f"{pid}\n".encode())
                    askers[pid] = asker
                    for file in files:
                        os.close(file)


def _reap(askers: dict[int, socket.socket]) -> None:
    while True:
        try:
            pid, status, used = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        if asker := askers.pop(pid, None):
            with suppress(BrokenPipeError):
                spent = used.ru_utime + used.ru_stime
                asker.sendall(f"{os.waitstatus_to_exitcode(status)} {spent}\n".encode())
            asker.close()


def _receive(asker: socket.socket) -> tuple[dict[str, Any], list[int]]:
    text, files, _, _ = socket.recv_fds(asker, LARGEST, 8)
    while not text.endswith(b"\n"):
        text += asker.recv(LARGEST)
    return json.loads(text), files


def _become(request: dict[str, Any], files: list[int]) -> None:
    """What the child does: it never returns."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        for target, file in enumerate(files[:3]):
            os.dup2(file, target)
        _close_all_but({0, 1, 2, *files[3:]})  # the server's own, and those of other children
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        gc.enable()
        random.seed()
        numpy.random.seed()
        status = _run(request["words"], files[3:])
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:  # as the interpreter does at its top
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status & 0xFF)


def _close_all_but(kept: set[int]) -> None:
    for file in map(int, os.listdir("/proc/self/fd")):
        if file not in kept:
            with suppress(OSError):  # the listing's own
                os.close(file)


def _run(words: list[str], given: list[int]) -> int:
    if words[0] == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        words = words[1:]
    sys.argv = words[:]
    sys.path[:0] = (
        os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.environ.get("PYTHONPATH") else []
    )
    if words[0] == "-c":
        module, _, name = words[1].partition(":")
        sys.argv = ["-c"]
        getattr(importlib.import_module(module), name)(*words[2:], *given)
    elif words[:2] == ["-m", "dtrain"]:
        _own_fork_server()
        sys.argv = ["dtrain", *words[2:]]
        runpy.run_module("dtrain", run_name="__main__")
    elif words[0] == "-m":
        assert words[1] == TORCHRUN
        _own_ranks_by_fork()
        sys.argv = words[1:]
        torchrun()
    else:
        if any(word.startswith("launch.nproc=") for word in words) or words[0].endswith(
            "compare.py"
        ):
            _own_fork_server()
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
    return 0


def _own_fork_server() -> None:
    """Python's fork server as a fork of this process, which has imported what is to be
    preloaded.
    """

    def fork(_: str, arguments: list[str], files: list[int]) -> int:
        if pid := os.fork():
            return pid
        try:
            listener, alive = files
            forkserver._forkserver._lock = threading.Lock()  # held while this is forked
            _close_all_but({0, 1, 2, listener, alive})
            forkserver.main(listener, alive, PRELOADED_BY_OURS)
        finally:
            os._exit(0)

    start_tracker()  # a small process of its own, as ever
    with mock.patch.object(multiprocessing.util, "spawnv_passfds", fork):
        forkserver.ensure_running()


def _own_ranks_by_fork() -> None:
    """torchrun's ranks as forks of a server of its own, which ends with it."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    folder = tempfile.mkdtemp(prefix="warm-")
    alive_r, alive_w = os.pipe()
    if not os.fork():
        os.dup2(alive_r, 0)
        _close_all_but({0, 1, 2})
        serve(f"{folder}/ranks", binds=False)
    os.close(alive_r)
    os.set_inheritable(alive_w, False)
    nursery = Nursery(Path(folder) / "ranks")

    def popen(self: Any, words: Sequence[str], environment: dict[str, str]) -> Process:
        streams = (0, self._stdout or 1, self._stderr or 2)
        return nursery.start(words[1:], os.getcwd(), environment, streams)

    subprocess_handler.SubprocessHandler._popen = popen  # type: ignore[method-assign,assignment]


# Who asks it


class Nursery:
    """The server's other end."""

    def __init__(self, address: Path) -> None:
        self.address = address

    def start(
        self, words: Sequence[str], cwd: Path | str, env: Mapping[str, str], streams: Sequence[Any]
    ) -> Process:
        """Run `script.py …`, `-m torch.distributed.run …` or `-c module:function …` in a session of
        its own.

        Args:
            streams: files or their numbers: the standard ones, and more for `-c`, which is called
                with their numbers.
        """
        asked = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 300
        while asked.connect_ex(str(self.address)):  # it still imports
            assert time.monotonic() < deadline, "the server of warm processes does not answer"
            time.sleep(0.01)
        request = {"words": list(words), "cwd": str(cwd), "environment": dict(env)}
        files = array.array("i", [f if isinstance(f, int) else f.fileno() for f in streams])
        text = json.dumps(request).encode() + b"\n"
        sent = asked.sendmsg([text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        asked.sendall(text[sent:])
        return Process(asked, list(words))


Ended = subprocess.CompletedProcess[str]
ALIVE: set[int] = set()  # processes that this one has had started
SPENT: list[float] = []  # CPU seconds of those that have ended, with theirs


def command_of(pid: int) -> str:
    """The command line of a process; empty if it has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def opened_by(pid: int) -> list[str]:
    """What the file descriptors of a process lead to, but for those that it closes meanwhile."""
    found = []
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    return found


class Process:
    """A command that was started so, with the methods of `subprocess.Popen` that are used."""

    def __init__(self, asked: socket.socket, words: list[str]) -> None:
        self.args, self._asked, self._heard = words, asked, b""
        self._lock = threading.Lock()
        self.returncode: int | None = None
        # where the standard streams go, if somebody wants to read them
        self.output: tuple[Path, Path] | None = None
        self.pid = int(self._line(None) or 0)
        ALIVE.add(self.pid)

    def _line(self, timeout: float | None) -> str | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._heard:
            self._asked.settimeout(
                None if deadline is None else max(deadline - time.monotonic(), 1e-4)
            )
            try:
                heard = self._asked.recv(100)
            except TimeoutError:
                return None
            self._heard += heard or b"-9 0\n"  # the server itself is gone
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode()

    def wait(self, timeout: float | None = None) -> int:
        with self._lock:
            if self.returncode is None:
                line = self._line(timeout)
                if line is None:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
                status, spent = line.split()
                self.returncode = int(status)
                self._asked.close()
                ALIVE.discard(self.pid)
                SPENT.append(float(spent))
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        assert self.output
        out, err = (path.read_text() for path in self.output)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


STARTED: list[Process | subprocess.Popen[str]] = []  # by the test that runs


def end_what_is_left() -> None:
    """Kill and wait for the sessions that a test has started and left."""
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@cache
def nursery(*preload: str) -> Nursery:
    """The server of this process that has imported these modules too, started once, or by
    whoever started this one.
    """
    if not preload and (given := os.environ.get("DTRAIN_NURSERY")):
        return Nursery(Path(given))
    address = Path(tempfile.mkdtemp(dir=_folder())) / "nursery"
    alive_r, alive_w = os.pipe()
    command = [sys.executable, "-c", "import warm; warm.main()", str(address), *preload]
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": f"{here.parent}{os.pathsep}{here}",
        "OMP_NUM_THREADS": "1",
    }
    server = subprocess.Popen(command, stdin=alive_r, env=environment, start_new_session=True)
    os.close(alive_r)
    atexit.register(server.wait, 10)
    atexit.register(os.close, alive_w)  # before the other: the server ends with it
    return Nursery(address)


def popen(
    command: Sequence[str],
    *,
    cwd: Path | str,
    env: Mapping[str, str] = os.environ,
    stdout: Any = None,
    stderr: Any = None,
) -> Process:
    """`[sys.executable, …]` as a warm process in a session of its own; what it prints goes to the
    files that are given, or can be had from `communicate`.
    """
    assert command[0] == sys.executable, command
    place = Path(tempfile.mkdtemp(prefix="said-", dir=_folder()))
    paths = place / "stdout", place / "stderr"
    with open(os.devnull) as nothing, paths[0].open("w") as out, paths[1].open("w") as err:
        process = nursery().start(
            command[1:], cwd, dict(env), (nothing, stdout or out, stderr or err)
        )
    process.output = paths
    STARTED.append(process)
    return process


def run(
    command: Sequence[str],
    *,
    cwd: Path | str,
    env: Mapping[str, str] = os.environ,
    timeout: float = 400,
) -> Ended:
    """As `subprocess.run` with its output captured; what has not ended in time is killed, with
    all its session.
    """
    process = popen(command, cwd=cwd, env=env)
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(
            f"{command} has not ended in {timeout} s: {process.communicate(10)}"
        ) from None
    out, err = process.communicate()
    return subprocess.CompletedProcess(list(command), process.wait(), out, err)


@cache
def _folder() -> str:
    folder = tempfile.mkdtemp(prefix="warm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def main(*words: str) -> None:
    """What the server does: `words` are its address and what it imports before it serves."""
    address, *preload = words or sys.argv[1:]
    gc.disable()
    for each in (*PRELOADED, *preload):
        importlib.import_module(each)
    gc.freeze()
    serve(address, binds=True)
