"""What a power loss, SIGTERM or a careless copy may not undo: order of writing, exact state."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import Case, find, trainer
from hydra.core.global_hydra import GlobalHydra
from worlds import World

from dtrain import cli
from dtrain.launch.preemption import Preemption
from dtrain.run.checkpoint import Checkpoints, load
from dtrain.run.checkpoint_files import MANIFEST, read_manifest, verify
from dtrain.task.causal_lm import CausalLM

RANKS = 2
CASE = Case("next_token", "fsdp", steps=1)
STEPS, TOLD_IN = 6, 3  # of the runs below; SIGTERM comes within the latter
EXACT = ("step", "loss", "grad_norm", "lr", "tokens")  # of a line of metrics.jsonl: not its times


# What is on the disk when a checkpoint has its name


@dataclass(frozen=True)
class Event:
    """What was asked of the disk: `what` of `path`, when there was so much in it."""

    what: str
    path: str
    bytes: int = 0
    names: tuple[str, ...] = ()


def _recorded(folder: str, steps: list[int], keep_last: int, asynchronous: bool) -> list[Event]:
    """All that the first rank asks of the disk while it publishes the last of these checkpoints."""
    events: list[Event] = []
    sync, rename, replace, write = os.fsync, os.rename, os.replace, Checkpoints._write

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        names = tuple(sorted(os.listdir(path))) if path.is_dir() else ()
        events.append(Event("sync", str(path), 0 if names else path.stat().st_size, names))
        sync(descriptor)

    def renamed(source: Any, target: Any) -> None:
        events.append(Event("rename", str(source), names=(str(target),)))
        rename(source, target)

    def replaced(source: Any, target: Any) -> None:
        events.append(Event("replace", str(source), names=(str(target),)))
        replace(source, target)

    def begun(*arguments: Any) -> None:
        events.clear()
        write(*arguments)

    made = trainer(CASE, RANKS)
    checkpoints = Checkpoints(Path(folder), keep_last=keep_last, asynchronous=asynchronous)
    with (
        mock.patch.object(os, "fsync", synced),
        mock.patch.object(os, "rename", renamed),
        mock.patch.object(os, "replace", replaced),
        mock.patch.object(Checkpoints, "_write", begun),
    ):
        for step in steps:
            checkpoints.save(step, made.state(), {"tokens": 0})
        checkpoints.wait()
    return events


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asynchronous"])
def test_files_are_synced_before_their_checkpoint_has_a_name(
    asynchronous: bool,
    world: Callable[[int], World],
    tmp_path: Path,
) -> None:
    """All at their full size, by one rank or another, and then their folder; after the new name the
    folder around it.

    The first rank names it when all have given it the checksums of what they have synced.
    """
    events, *others = world(RANKS).run(_recorded, str(tmp_path), [3], 1, asynchronous)
    published = tmp_path / "step-00000003"
    (named,) = (i for i, event in enumerate(events) if str(published) in event.names)
    (pointed,) = (i for i, e in enumerate(events) if str(tmp_path / "latest") in e.names)
    before = [event for event in events[:named] if event.what == "sync"]
    partial_ = Path(events[named].path)
    files = {str(partial_ / file.name): file.stat().st_size for file in published.iterdir()}
    assert len(files) == RANKS + 1  # a shard a rank, and what says that it is whole
    every = [*before, *(e for theirs in others for e in theirs if e.what == "sync")]
    assert {e.path: e.bytes for e in every if e.path in files} == files
    last, names = before[-1], tuple(sorted(file.name for file in published.iterdir()))
    assert (last.path, last.names) == (str(partial_), names)
    after = [e for e in events[max(named, pointed) :] if e.what == "sync"]
    assert [e.path for e in after] == [str(tmp_path)]
    assert {"latest", published.name} <= set(after[0].names)


def test_an_older_checkpoint_goes_when_the_newer_is_there_for_good(
    world: Callable[[int], World],
    tmp_path: Path,
) -> None:
    """Its name is taken away after the folder with the new name has been synced."""
    events = world(RANKS).run(_recorded, str(tmp_path), [3, 4], 1, False)[0]
    (gone,) = (i for i, e in enumerate(events) if e.path == str(tmp_path / "step-00000003"))
    (synced,) = (i for i, e in enumerate(events) if (e.what, e.path) == ("sync", str(tmp_path)))
    assert synced < gone and "step-00000004" in events[synced].names


@pytest.mark.parametrize("keep_last", [1, 2])
@pytest.mark.usefixtures("one_rank")
def test_the_last_to_be_kept_are_the_last_that_were_written(keep_last: int, tmp_path: Path) -> None:
    """After a resume from an earlier step its number is not the largest; `latest` resolves."""
    checkpoints, tensors = Checkpoints(tmp_path, keep_last=3), {"weight": torch.ones(2)}
    for step in (1, 2, 3):
        checkpoints.save(step, tensors, {"tokens": step})
    Checkpoints(tmp_path, keep_last=keep_last).save(2, tensors, {"tokens": 2})
    kept = ["step-00000002-2", "step-00000003"][:keep_last]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == kept
    latest = tmp_path / "latest"
    assert (
        latest.resolve(strict=True).name == "step-00000002-2" and read_manifest(latest)["step"] == 2
    )
    assert find(str(tmp_path), tmp_path, tmp_path, fallback=False, note=print) == latest.resolve()


# What is taken for a checkpoint


def _saved(folder: str) -> None:
    """Two checkpoints of as many steps."""
    made = trainer(Case("next_token", "fsdp", steps=2), RANKS)
    checkpoints = Checkpoints(Path(folder), keep_last=2)
    for step in made.steps():
        checkpoints.save(step.step, made.state(), {"tokens": made.tokens})


@pytest.fixture(scope="module")
def two_shards(
    world: Callable[[int], World],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with the checkpoints of steps 1 and 2, each of two ranks."""
    folder = tmp_path_factory.mktemp("two")
    world(RANKS).run(_saved, str(folder))
    return folder


@pytest.fixture
def copied(two_shards: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of both, to be broken."""
    shutil.copytree(two_shards, tmp_path / "two", symlinks=True)
    first, second = sorted((tmp_path / "two").glob("step-*"))
    assert verify(first) == verify(second) == ""
    return first, second


def test_one_wrong_bit_in_any_file_is_found(copied: tuple[Path, Path]) -> None:
    """In the first, a middle or the last byte of each shard: whoever finds it names the file."""
    path = copied[1]
    shards = sorted(path.glob("*.safetensors"))
    assert [shard.name for shard in shards] == sorted(read_manifest(path)["files"]) and len(
        shards
    ) == RANKS
    for shard in shards:
        whole_ = shard.read_bytes()
        for place in (0, len(whole_) // 2, len(whole_) - 1):
            shard.write_bytes(whole_[:place] + bytes([whole_[place] ^ 1]) + whole_[place + 1 :])
            assert verify(path) == f"{shard.name} does not have its SHA-256"
        shard.write_bytes(whole_)
    assert verify(path) == ""


@pytest.mark.parametrize("key", ["step", "tokens", "files"])
def test_a_manifest_changed_by_hand_is_refused(key: str, copied: tuple[Path, Path]) -> None:
    path = copied[1]
    told = read_manifest(path)
    told[key] = dict(list(told[key].items())[:1]) if key == "files" else told[key] + 1
    (path / MANIFEST).write_text(json.dumps(told))
    assert verify(path) == f"{MANIFEST} does not have its SHA-256"


def test_shards_of_two_ranks_in_each_others_place_are_refused(copied: tuple[Path, Path]) -> None:
    path = copied[1]
    one, other = sorted(path.glob("*.safetensors"))
    one.rename(path / "aside")
    other.rename(one)
    (path / "aside").rename(other)
    assert verify(path) in (
        f"{one.name} does not have its SHA-256",
        f"{one.name} has {one.stat().st_size} bytes, not {other.stat().st_size}",
    )


def test_a_shard_or_a_manifest_of_another_step_is_refused(copied: tuple[Path, Path]) -> None:
    """Both are whole files of the same run and of the same size."""
    first, second = copied
    one, _ = sorted(second.glob("*.safetensors"))
    manifest = (second / MANIFEST).read_text()
    (second / MANIFEST).write_text((first / MANIFEST).read_text())
    assert verify(second) == f"{one.name} does not have its SHA-256"
    (second / MANIFEST).write_text(manifest)
    shutil.copy(first / one.name, one)
    assert verify(second) == f"{one.name} does not have its SHA-256"


def _refused(path: Path, **model: Any) -> str:
    """What is said of the checkpoint, loaded into a model with these settings."""
    made = trainer(Case("next_token", "single", steps=1, model=tuple(model.items())), 1)
    before = {name: tensor.clone() for name, tensor in made.state().items()}
    said = ""
    try:
        made.load(partial(load, path))
    except ValueError as error:
        said = str(error)
        after = made.state()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    return said


@pytest.mark.usefixtures("one_rank")
def test_a_checkpoint_of_another_model_is_refused_and_changes_no_weight(tmp_path: Path) -> None:
    """Whether it has more tensors, fewer, or other shapes than the model."""
    made = trainer(Case("next_token", "single", steps=1, model=(("d_ff", 36),)), 1)
    next(made.steps())
    Checkpoints(tmp_path, keep_last=1).save(1, made.state(), {"tokens": 0})
    path = (tmp_path / "latest").resolve()
    assert _refused(path, d_ff=36) == ""
    more, fewer = _refused(path, d_ff=36, n_layers=3), _refused(path, d_ff=36, n_layers=1)
    assert "another model: model.blocks.2." in more and "is absent there, (24, 24) here" in more
    assert "another model: model.blocks.1." in fewer and "is (24, 24) there, absent here" in fewer
    other = _refused(path, d_ff=48)
    assert "another model: model.blocks.0." in other and "(24, 36) there, (24, 48) here" in other


# What all ranks do when one of them is told to stop


@pytest.fixture
def store() -> Iterator[dist.Store]:
    """That ranks share; each of them is a `Preemption` here."""
    made = dist.HashStore()
    with mock.patch.object(dist.distributed_c10d, "_get_default_store", return_value=made):
        yield made


@pytest.mark.parametrize("margin", [1, 2])
def test_all_stop_after_the_next_step_of_who_sees_it_first(margin: int, store: dist.Store) -> None:
    """With a margin of one step it is the teller's next one, on every rank, however far it is."""
    with Preemption(margin) as teller:
        other = Preemption(margin)
        assert not teller.stops_after(4) and not other.stops_after(4)
        os.kill(os.getpid(), signal.SIGTERM)
        last = 5 + margin
        for rank in (teller, other):
            stops = [rank.stops_after(step) for step in range(5, last + 1)]
            assert stops == [False] * margin + [True]
    assert teller.stopped_before(last + 1) and other.stopped_before(last + 1)
    assert not teller.stopped_before(last)  # it has done all its steps: there is nothing to resume


def test_without_sigterm_nobody_stops(store: dist.Store) -> None:
    with Preemption() as rank:
        assert not any(rank.stops_after(step) for step in range(5)) and not rank.stopped_before(9)


# A run that was told to stop, and resumed


def _run(folder: Path, cache: Path, *more: str, told_in: int = 0) -> None:
    """The script's run in this process, SIGTERM coming within this step."""
    batch = CausalLM.batch

    def told(task: CausalLM, step: int) -> dict[str, torch.Tensor]:
        if step == told_in - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(task, step)

    arguments = [
        "model=tiny",
        "model.dropout=0.1",
        f"steps={STEPS}",
        "global_batch_size=4",
        "eval.every=0",
        "seq_len=16",
        "measure.peak_flops=1e12",
        "launch.threads=1",
        f"hydra.run.dir={folder}",
        *more,
    ]
    GlobalHydra.instance().clear()
    with (
        mock.patch.dict(os.environ, DTRAIN_CACHE=str(cache)),
        mock.patch.object(sys, "argv", ["train.py", *arguments]),
        mock.patch.object(CausalLM, "batch", told),
        mock.patch("dtrain.cost.environment._commit", return_value=None),  # git may be slow
    ):
        cli.main("train", cli.train)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _exact(folder: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in EXACT} for line in _lines(folder)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that nobody disturbs; one that is told to stop; a copy of that which goes on."""
    folder = tmp_path_factory.mktemp("runs")
    places = {name: folder / name for name in ("whole", "told", "resumed")}
    (folder / "text").mkdir()
    for number in range(40):
        text = f"document {number}: " + "words and words " * (number + 1)
        (folder / "text" / f"{number}.txt").write_text(text)
    data = ["data=files", f"data.source.path={folder / 'text'}"]
    _run(places["whole"], folder / "cache", *data)
    _run(places["told"], folder / "cache", *data, told_in=TOLD_IN)
    shutil.copytree(places["told"], places["resumed"], symlinks=True)
    _run(places["resumed"], folder / "cache", *data, "resume=auto")
    return places


def test_sigterm_ends_a_run_one_step_later_with_its_checkpoint(runs: dict[str, Path]) -> None:
    """And there is one checkpoint, of that step; the file beside it says how to go on."""
    last = TOLD_IN + 1
    assert [line["step"] for line in _lines(runs["told"])] == list(range(1, last + 1))
    (written,) = (runs["told"] / "checkpoints").glob("step-*")
    assert read_manifest(written)["step"] == last and written.name == f"step-{last:08d}"
    said = (runs["told"] / "resumable").read_text()
    assert said.startswith(f"stopped after step {last} of {STEPS}")
    assert f"resume={runs['told']}" in said
    assert not (runs["told"] / "summary.json").exists()


def test_a_resumed_run_tells_every_exact_figure_of_the_uninterrupted(runs: dict[str, Path]) -> None:
    """Loss, norm, rate, tokens and step of each line, bit for bit; no sum begins anew."""
    ours, theirs = _exact(runs["resumed"]), _exact(runs["whole"])
    assert ours == theirs and len(ours) == STEPS
    last = theirs[-1]
    assert last["tokens"] == STEPS * 4 * 16
    for name in ("resumed", "whole"):
        summary = json.loads((runs[name] / "summary.json").read_text())
        found = (summary["steps"], summary["loss"], summary["tokens"])
        assert found == (last["step"], last["loss"], last["tokens"])
