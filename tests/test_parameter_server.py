"""The parameter server: its rules by drawn histories, its numbers against ddp, its workers
killed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from cases import STRATEGIES, Case, refusal
from hypothesis import given
from hypothesis import strategies as st
from runs import until

from dtrain.run.checkpoint_files import read_manifest
from dtrain.strategy.fsdp import FSDP
from dtrain.strategy.parameter_server import protocol
from dtrain.strategy.parameter_server.gradient_compression import METHODS, GradientCompression
from dtrain.strategy.parameter_server.protocol import HEADER_BYTES, Header, Kind
from dtrain.strategy.parameter_server.strategy import ParameterServer
from dtrain.strategy.parameter_server.work_queue import (
    ASYNC,
    BOUNDED,
    MODES,
    SYNC,
    SeenItems,
    WorkQueue,
)

ROOT = Path(__file__).parent.parent


# The rules


@given(
    mode=st.sampled_from(MODES),
    bound=st.integers(0, 3),
    workers=st.integers(1, 5),
    rounds=st.integers(1, 8),
    history=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=200),
)
def test_whatever_happens_each_item_is_finished_once_and_nobody_runs_ahead(
    mode: str, bound: int, workers: int, rounds: int, history: list[tuple[int, int]]
) -> None:
    """Workers that are fast, slow, dead and back, in any order; then all that are left finish
    the rest.
    """
    queue = WorkQueue(rounds * workers, workers, mode, bound)
    finished: list[int] = []
    for worker in range(workers):
        queue.add_worker(worker)

    def go_on(worker: int) -> bool:
        if worker in queue.assigned:
            finished.append(queue.assigned[worker])
            queue.complete(worker)
            return True
        slowest = min(queue.clocks.values())
        item = queue.next_item(worker)
        if item is None:
            return False
        if mode == BOUNDED:
            assert queue.clocks[worker] - slowest <= bound
        if mode == SYNC:
            assert {i for i in range(item // workers * workers)} <= set(finished)
        return True

    for worker, what in history:
        worker %= workers
        if what == 0 and worker in queue.clocks:
            queue.remove_worker(worker)
        elif what == 1 and worker not in queue.clocks:
            queue.add_worker(worker)
        elif worker in queue.clocks:
            go_on(worker)
    if not queue.clocks:
        queue.add_worker(0)
    while not queue.done:
        assert any([go_on(worker) for worker in list(queue.clocks)]), "nobody may go on"
    assert sorted(finished) == list(range(rounds * workers))
    assert queue.max_lead <= bound or mode != BOUNDED


def test_async_never_waits_while_there_is_work() -> None:
    queue = WorkQueue(100, 2, ASYNC)
    for worker in (0, 1):
        queue.add_worker(worker)
    assert queue.next_item(1) == 0  # and never hands it in
    for _ in range(99):
        assert queue.next_item(0) is not None
        queue.complete(0)
    assert queue.next_item(0) is None and not queue.done
    queue.remove_worker(1)
    assert queue.next_item(0) == 0


@given(items=st.lists(st.integers(0, 30)))
def test_a_server_takes_each_item_once(items: list[int]) -> None:
    once = SeenItems(begin=5)
    taken = [item for item in items if once.first(item)]
    assert sorted(taken) == sorted({item for item in items if item >= 5})
    assert once.begin == next(i for i in range(5, 32) if i not in items)


# What travels


HEADERS = st.builds(
    Header,
    st.sampled_from(Kind),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**63 - 1),
    *[st.floats(allow_nan=False)] * 4,
)


@given(header=HEADERS)
def test_a_header_arrives_as_it_was_sent(header: Header) -> None:
    data = header.packed()
    assert len(data) == HEADER_BYTES and Header.unpacked(data) == header


@given(header=HEADERS, bit=st.integers(0, 8 * HEADER_BYTES - 1))
def test_a_damaged_header_is_refused_in_one_line(header: Header, bit: int) -> None:
    data = bytearray(header.packed())
    data[bit // 8] ^= 1 << bit % 8
    for damaged in (bytes(data), header.packed()[:-1]):
        with pytest.raises(ValueError, match="header of the parameter server's") as error:
            Header.unpacked(damaged)
        assert "\n" not in str(error.value)


def test_a_header_of_another_version_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "VERSION", 7)
    data = Header(Kind.PULL).packed()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"^.*version 7, .*version 1: install the same dtrain.*$"):
        Header.unpacked(data)


SHAPES = st.lists(
    st.sampled_from([(), (1,), (7,), (3, 5), (16, 24), (4, 3, 3, 3)]), min_size=1, max_size=5
)


@given(shapes=SHAPES, method=st.sampled_from(METHODS), seed=st.integers(0, 99))
def test_a_message_has_the_size_that_both_ends_know(
    shapes: list[tuple[int, ...]], method: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    before = [g.clone() for g in gradients]
    ours, theirs = (
        GradientCompression(method, [g.shape for g in gradients], torch.float32, share=0.25)
        for _ in range(2)
    )
    message = ours.encode(gradients)
    assert message.dtype == torch.uint8 and message.numel() == theirs.size
    found = theirs.decode(message)
    assert [f.shape for f in found] == [g.shape for g in gradients]
    assert all(torch.equal(g, b) for g, b in zip(gradients, before, strict=True))
    if method == "none":
        assert all(torch.equal(f, g) for f, g in zip(found, gradients, strict=True))
    if method in ("fp16", "bf16"):
        for f, g in zip(found, gradients, strict=True):
            torch.testing.assert_close(f, g, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("method", ["top_k", "power_sgd"])
def test_what_is_left_out_is_sent_later(method: str) -> None:
    """Error feedback: of a constant gradient the mean of what arrives goes to the gradient
    itself.
    """
    gradient = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    compression = GradientCompression(method, [gradient.shape], torch.float32, share=0.1, rank=2)
    arrived = torch.zeros_like(gradient)
    errors = []
    for step in range(1, 61):
        arrived += compression.decode(compression.encode([gradient]))[0]
        errors.append((arrived / step - gradient).norm() / gradient.norm())
    assert errors[0] > 0.3 and errors[-1] < 0.1 * errors[0] + 0.05
    assert compression.size < 0.5 * gradient.numel() * 4


def test_top_k_sends_the_largest_and_power_sgd_is_exact_for_thin_matrices() -> None:
    gradient = torch.tensor([0.1, -5.0, 0.2, 3.0])
    top = GradientCompression("top_k", [gradient.shape], torch.float32, share=0.5)
    assert top.decode(top.encode([gradient]))[0].tolist() == [0, -5, 0, 3]
    thin = torch.randn(16, 2) @ torch.randn(2, 24)
    power = GradientCompression("power_sgd", [thin.shape], torch.float32, rank=2)
    torch.testing.assert_close(power.decode(power.encode([thin]))[0], thin, rtol=1e-4, atol=1e-4)


# The whole thing


def command(*arguments: str, ranks: int = 3) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "scripts/train.py"),
        f"launch.nproc={ranks}",
        "launch.threads=1",
        "model=tiny",
        "eval.every=0",
        "hydra.run.dir=run",
        *arguments,
    ]


def run(folder: Path, cache: Path, *arguments: str, ranks: int = 3) -> dict[str, Any]:
    """A run's summary, with the losses of its steps."""
    folder.mkdir(exist_ok=True)
    ended = warm.run(
        command(*arguments, ranks=ranks),
        cwd=folder,
        env=os.environ | {"DTRAIN_CACHE": str(cache)},
        timeout=400,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    return json.loads((folder / "run" / "summary.json").read_text()) | {"lines": lines}


def losses(summary: dict[str, Any]) -> list[float]:
    return [line["loss"] for line in summary["lines"]]


@pytest.mark.parametrize("servers", [pytest.param(1, marks=pytest.mark.deep), 2])
def test_sync_is_ddp(servers: int, tmp_path: Path, cache: Path) -> None:
    """In fp64: losses, norms and the evaluation; with clipping that cuts, on one server and on
    two.
    """
    same = ["dtype=fp64", "steps=8", "eval.every=4", "clip_norm=0.3"]
    expected = run(tmp_path / "ddp", cache, "strategy=ddp", *same, ranks=2)
    found = run(
        tmp_path / "ps",
        cache,
        "strategy=parameter_server",
        "strategy.dp.mode=sync",
        f"strategy.dp.servers={servers}",
        *same,
        ranks=2 + servers,
    )
    assert losses(found) == pytest.approx(losses(expected), rel=1e-12)
    assert [line["grad_norm"] for line in found["lines"]] == pytest.approx(
        [line["grad_norm"] for line in expected["lines"]], rel=1e-9
    )
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-12)
    assert found["synchronous"] and found["profile"]["asynchronous"]["staleness"] == {"0": 16}


def test_async_counts_what_it_does(tmp_path: Path, cache: Path) -> None:
    found = run(
        tmp_path, cache, "strategy=parameter_server", "steps=20", "global_batch_size=12", ranks=4
    )
    told = found["profile"]["asynchronous"]
    assert told["updates"] == 60 == sum(told["staleness"].values())
    seconds = sum(line["step_seconds"] for line in found["lines"])
    assert told["updates_per_second"] == pytest.approx(60 / seconds)
    assert sum(each["gradients"] for each in told["workers"].values()) == 60
    assert max(map(int, told["staleness"])) >= 1  # three workers: while one computes, others push
    assert losses(found)[-1] < losses(found)[0] - 0.3 and not found["synchronous"]
    assert [line["updates"] for line in found["lines"]] == [3 * step for step in range(1, 21)]
    server, *workers = (rank["traffic"][0] for rank in found["profile"]["ranks"])
    # as many gradients as the server sends weights
    sent = sum(each["wire_bytes"] for each in workers)
    assert server["wire_bytes"] == pytest.approx(sent) and sent > 0


@pytest.mark.parametrize(
    ("mode", "gap"), [("bounded", 2), pytest.param("async", None, marks=pytest.mark.deep)]
)
def test_a_slow_worker_is_ahead_of_nobody_and_holds_up_only_who_must_wait(
    mode: str, gap: int | None, tmp_path: Path, cache: Path
) -> None:
    found = run(
        tmp_path,
        cache,
        "strategy=parameter_server",
        f"strategy.dp.mode={mode}",
        "strategy.dp.max_staleness=2",
        "steps=16",
        "inject.straggler.rank=1",
        "inject.straggler.factor=10",
    )
    told = found["profile"]["asynchronous"]
    slow, fast = (told["workers"][worker]["gradients"] for worker in ("0", "1"))
    assert slow + fast == 32
    if gap is None:
        assert fast > 2 * slow
    else:
        assert told["most_ahead"] <= gap and fast - slow <= gap + 1


def processes(folder: Path, rank: int) -> list[int]:
    """Of the workers that a rank has looked after, as its log tells."""
    log = folder / "run" / "logs" / f"rank{rank}.log"
    return (
        [int(number) for number in re.findall(r"worker \d+, process (\d+)", log.read_text())]
        if log.exists()
        else []
    )


def lines_of(folder: Path) -> int:
    file = folder / "run" / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def started(folder: Path, cache: Path, *arguments: str, ranks: int = 3) -> warm.Process:
    folder.mkdir(exist_ok=True)
    return warm.popen(
        command("strategy=parameter_server", *arguments, ranks=ranks),
        cwd=folder,
        env=os.environ | {"DTRAIN_CACHE": str(cache)},
    )


@pytest.mark.parametrize("servers", [1, pytest.param(2, marks=pytest.mark.deep)])
def test_a_killed_worker_stops_nobody_and_comes_back(
    servers: int, tmp_path: Path, cache: Path
) -> None:
    process = started(
        tmp_path,
        cache,
        "steps=60",
        "checkpoint.every=20",
        "eval.every=1",
        f"strategy.dp.servers={servers}",
        ranks=2 + servers,
    )
    until(lambda: lines_of(tmp_path) >= 10)
    os.kill(processes(tmp_path, servers + 1)[0], signal.SIGKILL)
    before = lines_of(tmp_path)
    until(lambda: lines_of(tmp_path) > before)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-2000:]
    told = json.loads((tmp_path / "run" / "summary.json").read_text())["profile"]["asynchronous"]
    assert told["updates"] == 120 and told["lives"] == {"0": 1, "1": 2}
    assert len(processes(tmp_path, servers + 1)) == 2
    assert "worker 1 is gone" in (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert read_manifest(tmp_path / "run" / "checkpoints" / "latest")["step"] == 60


@pytest.mark.deep
def test_killed_workers_of_two_servers_change_nothing(tmp_path: Path, cache: Path) -> None:
    """In sync mode: three deaths at any moment, and still the losses of ddp."""
    same = ["dtype=fp64", "steps=80", "clip_norm=0.3"]
    expected = run(tmp_path / "ddp", cache, "strategy=ddp", *same, ranks=2)
    folder = tmp_path / "killed"
    process = started(
        folder, cache, *same, "strategy.dp.mode=sync", "strategy.dp.servers=2", ranks=4
    )
    for rank, life in ((2, 0), (3, 0), (2, 1)):
        until(lambda: lines_of(folder) >= 10 and len(processes(folder, rank)) > life)  # noqa: B023
        before = lines_of(folder)
        until(lambda: lines_of(folder) > before)  # noqa: B023
        os.kill(processes(folder, rank)[life], signal.SIGKILL)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-2000:]
    lines = [
        json.loads(line)["loss"]
        for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == pytest.approx(losses(expected), rel=1e-12)
    told = json.loads((folder / "run" / "summary.json").read_text())["profile"]["asynchronous"]
    assert told["updates"] == 80
    # the second of worker 0 may end before it begins
    assert told["lives"]["0"] >= 2 and told["lives"]["1"] == 2
    assert len(processes(folder, 2)) == 3 and len(processes(folder, 3)) == 2


@pytest.mark.deep
def test_a_stopped_worker_is_replaced_and_a_long_evaluation_costs_none(
    tmp_path: Path, cache: Path
) -> None:
    process = started(
        tmp_path, cache, "steps=40", "eval.every=20", "eval.batches=1500", "launch.timeout_s=5"
    )
    until(lambda: lines_of(tmp_path) >= 25)
    os.kill(processes(tmp_path, 2)[0], signal.SIGSTOP)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-2000:]
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 40 and "val_loss" in lines[-1]
    told = json.loads((tmp_path / "run" / "summary.json").read_text())["profile"]["asynchronous"]
    assert told["updates"] == 80
    log = (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert "worker 1 is gone" in log and "worker 0 is gone" not in log


@pytest.mark.deep
def test_a_killed_server_goes_on_from_its_checkpoint(tmp_path: Path, cache: Path) -> None:
    """In sync mode the losses after it are those of an uninterrupted run."""
    same = [
        "strategy=parameter_server",
        "strategy.dp.mode=sync",
        "dtype=fp64",
        "steps=60",
        "checkpoint.every=10",
    ]
    expected = run(tmp_path / "whole", cache, *same)
    cut = tmp_path / "cut"
    process = started(cut, cache, *same)
    latest = cut / "run" / "checkpoints" / "latest"
    until(lambda: latest.exists() and read_manifest(latest)["step"] >= 20)
    server = int(re.search(r"process (\d+)", (cut / "run" / "logs" / "rank0.log").read_text())[1])  # type: ignore[index]
    os.kill(server, signal.SIGKILL)
    assert process.wait(timeout=240) != 0
    process.communicate()
    at = read_manifest(latest)["step"]
    found = run(cut, cache, *same, "resume=latest")
    assert (
        losses(found)[at:] == pytest.approx(losses(expected)[at:], rel=1e-12)
        and len(losses(found)) == 60
    )


@pytest.mark.parametrize(("options", "said"), [
    ({"mode": "later"}, "mode=later must be one of async, bounded, sync"),
    ({"compression": "zip"}, "compression=zip must be one of"),
    ({"servers": 0}, "servers=0 must be at least 1"),
    ({"top_k_fraction": 0.0}, "top_k_fraction=0.0 must be above 0"),
])  # fmt: skip
def test_impossible_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="strategy.dp.") as error:
        ParameterServer(3, **options)
    assert said in str(error.value)


@pytest.mark.parametrize(("case", "size", "strategies", "said"), [
    (Case("next_token", "ps"), 1, [ParameterServer], "start 2 or more"),
    (Case("next_token", "ps"), 4, [lambda: ParameterServer(2), lambda: FSDP(2)],
     "stands alone, not beside fsdp"),
    (Case("next_token", "ps", model=(("n_experts", 4),)), 3, [ParameterServer], "use ddp"),
    (Case("next_token", "ps", compile=True), 3, [ParameterServer], "use compile=false"),
    (Case("next_token", "ps"), 6, [ParameterServer], "not divisible"),
])  # fmt: skip
def test_what_it_cannot_train_is_refused_in_one_line(
    case: Case, size: int, strategies: list[Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STRATEGIES, "ps", strategies)
    found = refusal(case, size)
    assert said in found and "\n" not in found


@pytest.mark.parametrize("setting", ["inject.missed_collective.rank=1", "inject.straggler.rank=0"])
def test_a_rank_that_it_cannot_hold_up_is_refused(
    setting: str, tmp_path: Path, cache: Path
) -> None:
    ended = warm.run(
        command("strategy=parameter_server", setting),
        cwd=tmp_path,
        env=os.environ | {"DTRAIN_CACHE": str(cache)},
    )
    assert (
        ended.returncode == 2
        and f"{setting} does nothing under strategy parameter_server" in ended.stderr
    )
    assert len(ended.stderr.strip().splitlines()) == 1


@given(bound=st.integers(0, 3), turns=st.lists(st.integers(0, 3), min_size=20, max_size=60))
def test_a_worker_that_comes_back_holds_up_nobody(bound: int, turns: list[int]) -> None:
    """Whoever may go on without it may do so with it, and it may go on itself."""
    queue = WorkQueue(1000, 4, BOUNDED, bound)
    for worker in range(4):
        queue.add_worker(worker)
    for worker in turns:
        if queue.next_item(worker) is not None:
            queue.complete(worker)
    queue.remove_worker(3)
    free = [worker for worker in range(3) if deepcopy(queue).next_item(worker) is not None]
    queue.add_worker(3)
    assert free and [w for w in range(4) if deepcopy(queue).next_item(w) is not None] == [*free, 3]


@given(mode=st.sampled_from(MODES), method=st.sampled_from(METHODS))
def test_it_is_called_synchronous_where_whole_gradients_are_awaited(mode: str, method: str) -> None:
    """A comparison holds such strategies to the losses of one process."""
    gradient = torch.linspace(-1, 1, 24 * 16, dtype=torch.float64).sin().view(24, 16)
    message = GradientCompression(method, [gradient.shape], gradient.dtype)
    whole = torch.equal(message.decode(message.encode([gradient]))[0], gradient)
    found = ParameterServer(3, mode=mode, compression=method).synchronous
    assert found == (mode == SYNC and whole)
