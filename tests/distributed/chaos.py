"""Faults, drawn by a seed and put into short runs. For each: the run completes on the curve of a
run that nothing happened to, or it stops with a clear line, from where it can be resumed onto that
curve; and nothing of it stays behind.

    python tests/distributed/chaos.py --faults 200 --seed 0
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hosts import DEVICE, NotHere, two_hosts  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from runs import TORCHRUN, alive, curve, free_port, printed, ranks, start, training, two_nodes  # noqa: E402

from dtrain.cli import start as launch  # noqa: E402
from dtrain.config.groups import CONFIGS  # noqa: E402
from dtrain.config.schema import register  # noqa: E402
from dtrain.launch.rank_processes import RanksFailed
from dtrain.run.checkpoint_files import published, verify  # noqa: E402

register()
ALONE = ("--standalone", "--nproc-per-node", "2")
STEPS, EVERY, TIMEOUT_S = 60, 5, 12
# for a run with a fault in it, whatever happens: its own timeout, torchrun's 30 s, a slow machine
LIMIT_S = 400
STRATEGIES = ("ddp", "fsdp", "zero1", "zero2")
COMPLETED, STOPPED = "completed", "stopped and resumed"
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(id, now), file;
    if (id == CLOCK_REALTIME && (file = open(getenv("CHAOS_CLOCK"), O_RDONLY)) >= 0) {
        char seconds[32] = {0};
        if (read(file, seconds, 31) > 0) now->tv_sec += atol(seconds);
        close(file);
    }
    return status;
}
"""


class Broken(AssertionError):
    """A promise that was not kept."""


@dataclass
class Case:
    """One run that a fault is put into.

    `folder` holds its run, what it prints and torchrun's temporary files; `mark` is in the
    environment of all of its processes, so that those left behind are found.
    """

    kind: str
    folder: Path
    strategy: str
    restarts: int
    random: random.Random
    cache: Path
    mark: str
    environment: dict[str, str] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    said: str = ""  # more about the fault
    hit: bool = False  # was anything broken?

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def words(self, *settings: str) -> list[str]:
        return training(
            f"strategy={self.strategy}",
            f"steps={STEPS}",
            f"checkpoint.every={EVERY}",
            "resume=auto",
            f"launch.timeout_s={TIMEOUT_S}",
            "global_batch_size=4",
            "seq_len=32",
            *settings,
        )

    def start(self, *settings: str, launcher: Sequence[str] = ALONE) -> subprocess.Popen[str]:
        """The run under torchrun."""
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        return start(
            self.folder,
            *TORCHRUN,
            *launcher,
            "--max-restarts",
            str(self.restarts),
            *self.words("hydra.run.dir=run", *settings),
            before=self.before,
            cold=True,
            DTRAIN_CACHE=str(self.cache),
            CHAOS=self.mark,
            TMPDIR=str(self.folder / "tmp"),
            OMP_NUM_THREADS="1",
            **self.environment,
        )

    def go_on(self, *settings: str) -> None:
        """The run again, whatever has started it before: by this process, whose ranks need no start
        of their own.

        Raises:
            ValueError, RanksFailed: it cannot.
        """
        os.environ["DTRAIN_CACHE"] = str(self.cache)
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("train", overrides=[*self.words(*settings)[1:], "launch.nproc=2"])
        launch(config, self.run, self.strategy, output=self.folder / "again")

    def processes(self) -> dict[int, str]:
        """All that are left of the run, and what they are."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"CHAOS={self.mark}".encode() in (entry / "environ").read_bytes() and alive(
                    int(entry.name)
                ):
                    found[int(entry.name)] = (
                        (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    )
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def ranks(self) -> list[int]:
        """Processes that are ranks: they run the script, and torchrun is their parent."""
        lines = self.processes().items()
        return sorted(
            pid for pid, line in lines if "train.py" in line and "distributed.run" not in line
        )

    def last(self) -> int:
        return max(curve(self.run), default=0)

    def until(
        self,
        condition: Callable[[], object],
        process: subprocess.Popen[str],
        seconds: float = LIMIT_S,
    ) -> bool:
        """Wait for it, or for the run's end; was it so?"""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and process.poll() is None:
            if condition():
                return True
            time.sleep(0.005)
        return bool(condition())

    def some_step(self, process: subprocess.Popen[str]) -> None:
        """Until a drawn step is done, and a moment more."""
        step = self.random.randrange(1, STEPS - 10)
        self.until(lambda: self.last() >= step, process)
        time.sleep(self.random.uniform(0, 0.1))

    def kill(self, pids: Iterable[int], number: signal.Signals = signal.SIGKILL) -> None:
        """Send one of the processes a signal, if any is left."""
        if victims := sorted(pids):
            try:
                os.kill(self.random.choice(victims), number)
                self.hit = True
            except ProcessLookupError:
                self.said += " (it had ended)"

    def gone(self, seconds: float = 15) -> bool:
        """Wait for the end of all processes of the run; have they ended?"""
        deadline = time.monotonic() + seconds
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


# The faults. Each starts the run, breaks it, and returns torchrun's processes.

Fault = Callable[[Case], list[subprocess.Popen[str]]]


def killed_rank(case: Case) -> list[subprocess.Popen[str]]:
    """kill -9 of a rank, at any time from its start to its end."""
    process = case.start()
    moment = case.random.uniform(0, 1)
    case.until(lambda: len(case.ranks()) == 2, process)
    if moment < 0.3:
        time.sleep(moment * 20)  # it imports, looks for its data, meets the others
    else:
        case.some_step(process)
    case.kill(case.ranks())
    return [process]


def killed_while_saving(case: Case) -> list[subprocess.Popen[str]]:
    """kill -9 of a rank while a checkpoint is half written."""
    process = case.start()
    nth, seen = case.random.randrange(1, 8), set()

    def at_it() -> bool:
        now = {path.name for path in (case.run / "checkpoints").glob(".partial-0*")}
        seen.update(now)
        return len(seen) >= nth and bool(now)

    case.until(at_it, process)
    time.sleep(case.random.uniform(0, 0.02))
    case.kill(case.ranks())
    return [process]


def killed_at_the_rendezvous(case: Case) -> list[subprocess.Popen[str]]:
    """kill -9 of a rank as soon as it is there, or a little later."""
    process = case.start()
    case.until(lambda: len(case.ranks()) == 2, process)
    case.until(lambda: (case.run / "logs").exists(), process, case.random.uniform(2, 8))
    case.kill(case.ranks())
    return [process]


def killed_while_preparing(case: Case) -> list[subprocess.Popen[str]]:
    """kill -9 of a rank while the data are prepared, in an empty cache."""
    case.cache = case.folder / "cache"
    process = case.start()
    case.until(lambda: case.cache.exists() and any(case.cache.rglob("*")), process)
    time.sleep(case.random.uniform(0, 3))
    case.kill(case.ranks())
    return [process]


def killed_launcher(case: Case) -> list[subprocess.Popen[str]]:
    """kill -9 of torchrun itself."""
    process = case.start()
    case.some_step(process)
    case.kill([process.pid])
    return [process]


def told_to_end(case: Case) -> list[subprocess.Popen[str]]:
    """SIGTERM to a rank."""
    return signalled(case, signal.SIGTERM)


def signalled(case: Case, number: signal.Signals) -> list[subprocess.Popen[str]]:
    process = case.start()
    case.some_step(process)
    case.kill(ranks(case.run).values(), number)
    return [process]


def stopped_rank(case: Case) -> list[subprocess.Popen[str]]:
    """SIGSTOP of a rank, which never goes on."""
    return signalled(case, signal.SIGSTOP)


def full_disk(case: Case) -> list[subprocess.Popen[str]]:
    """The disk fills while checkpoints are written; somebody makes room before it is resumed."""
    case.run.mkdir(parents=True)
    size = case.random.randrange(3500, 12000)
    if mount("-t", "tmpfs", "-o", f"size={size}k", "chaos", str(case.run)):
        raise NotHere("a file system of its own cannot be mounted here")
    case.said, case.hit = f"{size} KiB", True
    process = case.start()
    wait([process])
    mount("-o", "remount,size=200m", str(case.run))
    return [process]


def mount(*words: str) -> int:
    return subprocess.run(["mount", *words], capture_output=True).returncode


def damaged(case: Case, damage: Callable[[Path], None]) -> list[subprocess.Popen[str]]:
    """A file of the newest checkpoint is damaged after its run was killed.

    It must be refused by its name.
    """
    process = case.start()
    case.until(lambda: case.last() >= 3 * EVERY + case.random.randrange(20), process)
    case.kill([process.pid])
    process.wait()
    case.gone()
    newest = published(case.run / "checkpoints")[-1]
    file = case.random.choice(sorted(newest.iterdir()))
    damage(file)
    case.said = file.name
    again = case.start()
    if again.wait(LIMIT_S) == 0:
        raise Broken(f"a damaged checkpoint was taken: {file.name}")
    if not re.search(rf"dtrain: .*{newest.name} is damaged: ", printed(case.folder)):
        raise Broken(f"a damaged checkpoint was not refused by name: {file.name}")
    return [again]


def truncated(case: Case) -> list[subprocess.Popen[str]]:
    """A checkpoint's file is cut short."""
    return damaged(case, lambda file: os.truncate(file, case.random.randrange(file.stat().st_size)))


def flipped(case: Case) -> list[subprocess.Popen[str]]:
    """A bit of a checkpoint's file is not what it was."""

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[case.random.randrange(len(content))] ^= 1 << case.random.randrange(8)
        file.write_bytes(content)

    return damaged(case, flip)


def cut_network(case: Case) -> list[subprocess.Popen[str]]:
    """Two hosts, and no packet between them for a second, or until both have ended."""
    with two_hosts() as hosts:
        processes = []
        for host in (0, 1):
            case.before, case.environment = hosts.on(host), {"GLOO_SOCKET_IFNAME": DEVICE}
            processes.append(case.start(launcher=hosts.node(host)))
        case.before, case.environment = (), {}
        case.some_step(processes[0])
        for_long = case.random.random() < 0.5
        case.said, case.hit = "for long" if for_long else "for a second", True
        hosts.cable(plugged=False)
        case.until(lambda: for_long and not case.ranks(), processes[0], 60 if for_long else 1)
        hosts.cable(plugged=True)
        wait(processes)
    return processes


def restarted_host(case: Case) -> list[subprocess.Popen[str]]:
    """Two torchruns; the one that keeps the rendezvous is killed, and started again."""
    endpoint = f"localhost:{free_port()}"
    first = case.start(launcher=two_nodes(endpoint, "is_host=1"))
    second = case.start(launcher=two_nodes(endpoint, "is_host=0"))
    case.some_step(first)
    case.kill([first.pid])
    first.wait()
    time.sleep(case.random.uniform(0, 3))
    third = case.start(launcher=two_nodes(endpoint, "is_host=1,join_timeout=20"))
    wait([second, third])
    return [first, second, third]


def jumped_clock(case: Case) -> list[subprocess.Popen[str]]:
    """The wall clock jumps by hours, forward or back."""
    case.folder.mkdir(parents=True, exist_ok=True)
    clock, library = case.folder / "clock", case.folder / "clock.so"
    clock.write_text("0")
    if not shutil.which("cc"):
        raise NotHere("there is no C compiler to make a clock with")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library), "-ldl"],
        input=CLOCK,
        text=True,
        check=True,
    )
    case.environment = {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(clock)}
    process = case.start()
    case.some_step(process)
    hours = case.random.choice((-30, -2, 2, 30))
    clock.write_text(str(hours * 3600))
    # the disk's clock is the kernel's
    for manifest in case.run.glob("checkpoints/step-*/checkpoint.json"):
        told = manifest.stat().st_mtime_ns - hours * 3600 * 10**9
        os.utime(manifest, ns=(told, told))
    case.said, case.hit = f"{hours:+d} hours", True
    wait([process])
    case.environment = {}
    return [process]


FAULTS: dict[str, Fault] = {
    "a rank killed": killed_rank, "killed while saving": killed_while_saving,
    "killed at the rendezvous": killed_at_the_rendezvous,
    "killed while preparing data": killed_while_preparing, "torchrun killed": killed_launcher,
    "told to end": told_to_end, "a rank stopped": stopped_rank, "disk full": full_disk,
    "a file cut short": truncated, "a bit flipped": flipped, "network cut": cut_network,
    "rendezvous host restarted": restarted_host, "clock jumped": jumped_clock,
}  # fmt: skip


def wait(processes: list[subprocess.Popen[str]]) -> None:
    """For the end of all.

    Raises:
        Broken: they have not ended in time.
    """
    deadline = time.monotonic() + LIMIT_S
    for process in processes:
        try:
            process.wait(max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise Broken(f"not ended after {LIMIT_S} s") from None


@functools.cache
def expected(strategy: str, cache: Path, folder: Path) -> dict[int, tuple[float, float]]:
    """The curve of a run that nothing happens to."""
    case = Case(
        "none",
        folder / f"whole-{strategy}",
        strategy,
        0,
        random.Random(0),
        cache,
        f"whole-{strategy}",
    )
    case.go_on()
    return curve(case.run)


def check(
    case: Case, processes: list[subprocess.Popen[str]], want: dict[int, tuple[float, float]]
) -> str:
    """What became of the run; it is resumed if it has stopped.

    Raises:
        Broken: a promise that was not kept.
    """
    wait(processes)
    if not case.gone():
        raise Broken(f"processes are left: {case.processes()}")
    text, last = printed(case.folder), case.last()
    if 'dtrain/train.py", line' in text or 'dtrain/run/run.py", line' in text:
        raise Broken("a traceback of ours is shown")
    outcome = COMPLETED if last == STEPS and (case.run / "summary.json").exists() else STOPPED
    if (
        outcome == STOPPED and FAULTS[case.kind] is killed_while_preparing
    ):  # ranks that do not know the cache look at it
        again = case.start()
        wait([again])
        if again.returncode:
            raise Broken(f"its data cannot be used: {printed(case.folder)[-1500:]}")
    elif outcome == STOPPED:
        resume(case, last)
    if (found := curve(case.run)) != want:
        raise Broken(
            f"another curve: {next(s for s in want if found.get(s) != want[s])} is the first step "
            f"that differs"
        )
    for checkpoint in published(case.run / "checkpoints"):
        if damage := verify(checkpoint):
            raise Broken(f"{checkpoint.name}: {damage}")
    if left := [
        *case.run.rglob(".partial-*"),
        *case.run.rglob(".writable"),
        *case.run.rglob("resumable"),
    ]:
        raise Broken(f"files are left: {left}")
    return outcome


def resume(case: Case, last: int) -> None:
    spoken = re.search(
        r"^dtrain: |exitcode +: -9|resumable: |^torch.*Rendezvous\w+Error",
        printed(case.folder),
        re.MULTILINE,
    )
    if not spoken and FAULTS[case.kind] is not killed_launcher:
        raise Broken("it stopped without a word")
    sound = [path for path in published(case.run / "checkpoints") if not verify(path)]
    newest = max(
        (json.loads((path / "checkpoint.json").read_text())["step"] for path in sound), default=0
    )
    if last - newest > 2 * EVERY:
        raise Broken(f"step {last} was done, and the newest checkpoint is of step {newest}")
    try:
        case.go_on("checkpoint.fallback=true")
    except (ValueError, RanksFailed) as error:
        raise Broken(f"it cannot be resumed: {error}") from None


def one(kind: str, seed: int, folder: Path, cache: Path) -> tuple[str, str]:
    """Put one fault into one run: what became of it, and more about the fault.

    Raises:
        Broken: a promise that was not kept.
        NotHere: this machine allows no such fault.
    """
    drawn = random.Random(f"{kind} {seed}")
    strategy, restarts = drawn.choice(STRATEGIES), drawn.choice((0, 0, 1, 2))
    want = expected(strategy, cache, folder)
    case = Case(
        kind,
        folder / f"{kind.replace(' ', '-')}-{seed}",
        strategy,
        restarts,
        drawn,
        cache,
        f"{os.getpid()}-{kind}-{seed}",
    )
    case.folder.mkdir(parents=True)
    try:
        outcome = check(case, FAULTS[kind](case), want)
    except Broken as error:
        raise Broken(
            f"{kind}, seed {seed}, {strategy}, {restarts} restarts {case.said}: {error} (see "
            f"{case.folder})"
        ) from None
    finally:
        for pid in case.processes():
            os.kill(pid, signal.SIGKILL)
        if os.path.ismount(case.run):
            subprocess.run(["umount", "--lazy", str(case.run)])
    if not case.hit:
        raise NotHere("the run had ended before")
    shutil.rmtree(case.folder)
    return outcome, f"{strategy}, {restarts} restarts {case.said}"


def drawn(faults: int, seed: int) -> list[tuple[str, int]]:
    """Kinds in turn, so that each is tried; each with a seed of its own."""
    return [(list(FAULTS)[index % len(FAULTS)], seed * 1000 + index) for index in range(faults)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Put faults into short runs, and look what becomes of them."
    )
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a kind of fault")
    parser.add_argument(
        "--part", default="1/1", help="of several that run at a time: 1/3, 2/3, 3/3"
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in FAULTS}
    reasons: list[str] = []
    part, parts = map(int, options.part.split("/"))
    for number, (kind, seed) in enumerate(drawn(options.faults, options.seed), 1):
        if options.only not in kind or number % parts != part % parts:
            continue
        begun = time.monotonic()
        try:
            outcome, about = one(kind, seed, folder, folder / "cache")
        except NotHere as reason:
            outcome, about = "not tried", str(reason)
        except Broken as error:
            outcome, about = "BROKEN", str(error)
            reasons.append(about)
        counts[kind][outcome] += 1
        print(
            f"{number:4} {kind:28} {outcome:20} {time.monotonic() - begun:5.0f} s  {about}",
            flush=True,
        )
    print(f"\n{'fault':30}{'tried':>7}{COMPLETED:>12}{STOPPED:>22}{'not tried':>12}{'broken':>8}")
    for kind, each in counts.items():
        tried = sum(each.values()) - each["not tried"]
        print(
            f"{kind:30}{tried:7}{each[COMPLETED]:12}{each[STOPPED]:22}{each['not tried']:12}{each['BROKEN']:8}"
        )
    print(*reasons, sep="\n")
    if not reasons:
        shutil.rmtree(folder)
    sys.exit(bool(reasons))


if __name__ == "__main__":
    main()
