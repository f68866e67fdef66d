"""How a run ends that is told to: by which signal, sent to whom; and what does not end it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import warm
from runs import ROOT, alive, ranks, until
from test_cli import PYTHON, call  # noqa: F401

from dtrain.cli import start
from dtrain.launch.rank_processes import PRELOADED, run_and_exit_with_parent
from dtrain.report.terminal import keep_open
from dtrain.run.checkpoint_files import MANIFEST, read_manifest, verify, with_checksum
from dtrain.task.causal_lm import CausalLM

QUICK = [
    "model=tiny",
    "eval.every=0",
    "global_batch_size=4",
    "seq_len=16",
    "measure.peak_flops=1e12",
    "launch.threads=1",
    "hydra.run.dir=run",
]
TWO = [*PYTHON, *QUICK, "strategy=ddp", "launch.nproc=2"]


def steps(folder: Path) -> int:
    file = folder / "run" / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def begun(folder: Path, cache: Path, *words: str, **streams: int) -> warm.Process:
    """Two ranks that train for long, when they have done a step."""
    environment = {**os.environ, "DTRAIN_CACHE": str(cache)}
    process = warm.popen([*TWO, "steps=100000", *words], cwd=folder, env=environment, **streams)
    until(lambda: steps(folder), 60)
    return process


def ended(folder: Path, process: warm.Process, pids: dict[int, int]) -> tuple[int, str]:
    """Its exit status and what it said was wrong; it has left a whole checkpoint of its last
    step, and no process.
    """
    _, err = process.communicate(60)
    assert (folder / "run" / "resumable").exists(), err
    latest = folder / "run" / "checkpoints" / "latest"
    assert read_manifest(latest)["step"] == steps(folder) and verify(latest.resolve()) == ""
    assert len(pids) == 2 and not any(alive(pid) for pid in pids.values())
    until(lambda: not os.path.exists(f"/proc/{process.pid}"), 10)
    with pytest.raises(ProcessLookupError):  # the fork server's, too
        until(lambda: os.killpg(process.pid, 0), 10)
    return process.wait(), err


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        (signal.SIGTERM, 0, ""),
        (signal.SIGHUP, 0, ""),
        (signal.SIGINT, 130, "dtrain: interrupted\n"),
    ],
)
def test_a_signal_to_the_whole_group_leaves_a_checkpoint(
    number: int, status: int, words: str, tmp_path: Path, cache: Path
) -> None:
    """What `timeout`, systemd, scancel, a closed terminal and Ctrl-C send: to the launcher, its
    server and its ranks.
    """
    process = begun(tmp_path, cache)
    pids = ranks(tmp_path / "run")
    os.killpg(process.pid, number)
    assert ended(tmp_path, process, pids) == (status, words)


def test_an_ignored_sighup_ends_nothing(tmp_path: Path, cache: Path) -> None:
    """nohup has it ignored; the other signals are heard as ever, and one to the launcher alone
    is enough.
    """
    (tmp_path / "nohup.py").write_text(
        "import runpy, signal, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        f"runpy.run_path({TWO[1]!r}, run_name='__main__')\n"
    )
    with mock.patch.dict(globals(), TWO=[sys.executable, str(tmp_path / "nohup.py"), *TWO[2:]]):
        process = begun(tmp_path, cache)
    pids, before = ranks(tmp_path / "run"), steps(tmp_path)
    process.send_signal(signal.SIGHUP)
    until(lambda: steps(tmp_path) > before + 20, 60)
    process.send_signal(signal.SIGINT)
    assert ended(tmp_path, process, pids) == (130, "dtrain: interrupted\n")


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_a_run_with_its_checkpoint_and_twice_at_once(
    times: int,
    call: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    batch = CausalLM.batch

    def told(task: CausalLM, step: int) -> dict[str, torch.Tensor]:
        for _ in range(times if step == 2 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return batch(task, step)

    with mock.patch.object(CausalLM, "batch", told):
        status, out, err = call(*QUICK, "steps=9")
    assert (status, err) == (130, "dtrain: interrupted\n")
    assert steps(tmp_path) == (4 if times == 1 else 2)
    assert (
        ("stopped after step 4 of 9" in out)
        == (tmp_path / "run" / "checkpoints" / "latest").exists()
        == (times == 1)
    )


def test_a_signal_before_the_first_step_ends_at_once(call, tmp_path: Path) -> None:
    """There is nothing to lose; whatever it is that takes long then."""

    def told(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with mock.patch("dtrain.run.run.begin_from", told):
        assert call(*QUICK, "steps=9")[::2] == (130, "dtrain: interrupted\n")
    assert not steps(tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at what a process has open")
def test_sigterm_while_a_large_checkpoint_is_verified_ends_at_once(
    tmp_path: Path, cache: Path
) -> None:
    """Not after it has been read: then it would be found damaged, which ends in status 2."""
    shard = tmp_path / "theirs" / "step-00000001" / "a.safetensors"
    shard.parent.mkdir(parents=True)
    with shard.open("wb") as file:
        file.truncate(16 << 30)  # of which nothing is on the disk
    files = {shard.name: {"bytes": 16 << 30, "sha256": ""}}
    (shard.parent / MANIFEST).write_text(
        json.dumps(with_checksum({"step": 1, "tokens": 0, "files": files}))
    )
    environment = {**os.environ, "DTRAIN_CACHE": str(cache)}
    process = warm.popen(
        [*PYTHON, *QUICK, "steps=3", f"resume={shard.parent}"], cwd=tmp_path, env=environment
    )

    def reads() -> bool:
        assert process.poll() is None, process.communicate()
        return str(shard) in warm.opened_by(process.pid)

    until(reads, 60)
    process.send_signal(signal.SIGTERM)
    assert (process.wait(60), process.communicate()[1]) == (-signal.SIGTERM, "")
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists() and not steps(tmp_path)


def test_ctrl_c_while_a_script_imports_shows_no_traceback() -> None:
    """It ends by the signal; where SIGINT is ignored, as in a shell's background, it stays so."""
    script = (
        "import dtrain.launch.interrupts, os, signal; os.kill(os.getpid(), signal.SIGINT); "
        "print('goes on')"
    )
    for before, status, out in (
        ("", -signal.SIGINT, ""),
        ("import signal; signal.signal(2, signal.SIG_IGN); ", 0, "goes on\n"),
    ):
        ended = subprocess.run(
            [sys.executable, "-c", before + script], capture_output=True, text=True, timeout=240
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (status, out, "")


def test_ctrl_c_while_the_fork_server_imports_shows_no_traceback() -> None:
    """It imports for seconds before Python has it ignore SIGINT."""
    script = (
        "import importlib.abc, os, signal, sys\n"
        "class Interrupting(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'dtrain.cli': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from multiprocessing.forkserver import main\n"
        f"main(0, 0, {PRELOADED})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_ctrl_c_is_pythons_own_again_in_a_rank_that_is_forked() -> None:
    before = signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # as the fork server, which has imported dtrain.launch.interrupts, had it
    terms = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGHUP)]
    try:
        with mock.patch("dtrain.launch.rank_processes.exit_with_parent"):
            assert (
                run_and_exit_with_parent(0, signal.getsignal, signal.SIGINT)
                == signal.default_int_handler
            )
    finally:
        for number, handler in [*terms, (signal.SIGINT, before)]:
            signal.signal(number, handler)


def test_a_second_ctrl_c_while_ranks_save_leaves_nothing_behind(tmp_path: Path) -> None:
    """They are killed, so whoever has started them removes what they have left; but not what
    another run writes.
    """
    partial = tmp_path / "checkpoints" / ".partial-00000004"
    partial.mkdir(parents=True)
    config: Any = mock.Mock()
    with mock.patch.multiple(
        "dtrain.cli.ranks",
        spawn=mock.Mock(side_effect=KeyboardInterrupt),
        validated=mock.Mock(),
        assemble=mock.Mock(),
        printable=mock.Mock(),
    ):
        script = (
            "import sys, time; from pathlib import Path; from dtrain.files.lock import Lock; held "
            "= Lock(Path(sys.argv[1])); print(flush=True); time.sleep(60)"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", script, tmp_path], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert other.stdout and other.stdout.readline()
        with pytest.raises(KeyboardInterrupt):
            start(config, tmp_path, "ddp")
        assert partial.exists()
        other.kill()
        other.communicate()
        with pytest.raises(KeyboardInterrupt):
            start(config, tmp_path, "ddp")
        assert not partial.exists()
        with pytest.raises(KeyboardInterrupt):
            start(config, tmp_path / "never-begun", "ddp")


def test_an_interrupted_save_leaves_nothing_behind(call, tmp_path: Path) -> None:
    """Ctrl-C for the second time comes while the checkpoint is written."""

    def interrupted(*_: object, **__: object) -> None:
        assert list((tmp_path / "run" / "checkpoints").glob(".partial-*"))
        raise KeyboardInterrupt

    with mock.patch("dtrain.run.checkpoint.file_digests", interrupted):
        assert call(*QUICK, "steps=1")[::2] == (130, "dtrain: interrupted\n")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("config.yaml", False),
        ("metrics.jsonl", False),
        ("summary.json", True),
    ],
)
def test_a_disk_that_is_full_ends_a_run_with_a_line_at_each_moment(
    name: str,
    saved: bool,
    call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was saved before is whole."""
    opened = io.open

    def full(file: Any, mode: str = "r", *others: Any, **more: Any) -> Any:
        written = isinstance(file, str | Path) and Path(file).name == name and {*mode} & {*"wa"}
        return opened("/dev/full" if written else file, mode, *others, **more)

    monkeypatch.setattr(io, "open", full)
    monkeypatch.setattr("builtins.open", full)
    status, _, err = call(
        "model=tiny", "steps=1", "eval.every=0", "global_batch_size=4", "hydra.run.dir=run"
    )
    assert status and err.startswith("dtrain: ") and err.count("\n") == 1, err
    assert "No space left on device" in err
    step = tmp_path / "run" / "checkpoints" / "step-00000001"
    assert step.exists() == saved
    if saved:
        assert not verify(step)


@pytest.mark.parametrize("nproc", [1, 2])
def test_an_output_that_nobody_reads_ends_nothing(nproc: int, tmp_path: Path, cache: Path) -> None:
    """`| head -2`: neither the training, nor with another status, nor with words about it."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [*PYTHON, *QUICK, "steps=4", "logger=[default,tensorboard]"]
    environment = {**os.environ, "DTRAIN_CACHE": str(cache)}
    more = ["strategy=ddp", f"launch.nproc={nproc}"] if nproc > 1 else []
    process = warm.popen([*command, *more], cwd=tmp_path, env=environment, stdout=writes)
    os.close(writes)
    assert process.wait(60) == 0 and process.communicate()[1] == ""
    assert (
        json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == steps(tmp_path) == 4
    )


def test_standard_streams_that_are_closed_take_no_files_place() -> None:
    """What is opened next would get their numbers, and what is printed would go there."""
    script = (
        "import os, sys; from dtrain.report.terminal import keep_open; keep_open(); file = "
        "os.open('/dev/null', os.O_RDONLY);"
        "print('said'); sys.stdout.flush(); sys.exit(file < 3)"
    )
    if not (child := os.fork()):
        for number in (0, 1, 2):
            os.close(number)
        os.execv(sys.executable, [sys.executable, "-c", script])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_streams_that_somebody_has_put_there_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's, say."""
    theirs = mock.Mock()
    monkeypatch.setattr(sys, "stdout", theirs)
    keep_open()
    assert sys.stdout is theirs
