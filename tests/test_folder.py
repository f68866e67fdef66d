"""Whose a run's folder is: a second run there is refused, and nothing of the first one is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from test_cli import call  # noqa: F401

from dtrain.config.groups import CONFIGS
from dtrain.config.schema import register
from dtrain.files.lock import NAME, Lock
from dtrain.launch.world import World
from dtrain.report.base import Run
from dtrain.report.files import Files
from dtrain.run import claim

Call = Callable[..., tuple[int, str, str]]
QUICK = [
    "model=tiny",
    "eval.every=0",
    "global_batch_size=4",
    "seq_len=16",
    "measure.peak_flops=1e12",
    "launch.threads=1",
]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_a_second_run_in_a_folder_is_refused_unless_it_goes_on_or_overwrites(
    call: Call, tmp_path: Path
) -> None:
    """What the first one has left stays as it is, to a byte, what was asked of it too."""
    mine = [*QUICK, "hydra.run.dir=mine"]
    assert call(*mine, "steps=3", "checkpoint.every=1")[0] == 0
    before = contents(tmp_path / "mine")
    assert {
        ".hydra/config.yaml",
        "summary.json",
        "checkpoints/step-00000003/checkpoint.json",
    } <= before.keys()
    shutil.copytree(tmp_path / "mine", tmp_path / "other", symlinks=True)
    for words in (
        ["steps=2"],
        ["steps=5", "resume=other"],
        ["steps=5", "resume=other/checkpoints/latest"],
    ):
        status, _, err = call(*mine, "seed=7", *words)
        assert status == 2 and err == (
            f"dtrain: hydra.run.dir={tmp_path}/mine holds a run (metrics.jsonl): resume=auto goes "
            f"on with it, "
            f"overwrite=true removes it, another hydra.run.dir leaves it alone\n"
        )
        assert contents(tmp_path / "mine") == before
    status, _, err = call(*mine, "steps=5", "overwrite=true", "resume=auto")
    assert (
        status == 2
        and "overwrite=true begins anew, resume=auto goes on: leave one of them out" in err
    )
    status, _, err = call(*mine, "steps=5", "overwrite=true", "init_from=mine")
    assert status == 2 and "would remove what init_from=mine is to be taken from" in err
    assert contents(tmp_path / "mine") == before
    assert call(*mine, "steps=4", "resume=mine/checkpoints/latest")[0] == 0
    (tmp_path / "mine" / "notes.txt").write_text("my own")
    (tmp_path / "mine" / "checkpoints" / "step-00000004" / "away").symlink_to(tmp_path / "other")
    assert call(*mine, "steps=2", "overwrite=true")[0] == 0
    found = contents(tmp_path / "mine")
    assert [json.loads(line)["step"] for line in found["metrics.jsonl"].splitlines()] == [1, 2]
    assert [p.name for p in (tmp_path / "mine" / "checkpoints").glob("step-*")] == ["step-00000002"]
    assert found["notes.txt"] == b"my own" and contents(tmp_path / "other").keys() == before.keys()


def test_what_stands_in_a_finished_runs_summary_is_looked_at(call: Call, tmp_path: Path) -> None:
    """By who begins it again. What only a run that was stopped says of itself is not believed."""
    mine = [*QUICK, "hydra.run.dir=mine", "steps=1"]
    assert call(*mine)[0] == 0
    file = tmp_path / "mine" / "summary.json"
    whole = json.loads(file.read_text())
    for left, said in (
        ({}, "loss=None"),
        ({**whole, "loss": "low"}, "loss=low"),
        ({**whole, "val_loss": [1]}, "val_loss=[1]"),
    ):
        file.write_text(json.dumps(left))
        status, _, err = call(*mine, "resume=auto")
        assert (status, err) == (2, f"dtrain: {file} has {said}: no run has left that\n")
    file.write_text(json.dumps({**whole, "resumable": "how", "val_loss": None}))
    status, out, err = call(*mine, "resume=auto")
    assert (status, err) == (0, "") and "nothing is left to do" in out


@pytest.fixture
def alone() -> Any:
    """`on_rank_zero` without a process group."""
    with mock.patch.object(claim, "on_rank_zero", lambda function: function()):
        yield


def _config(**values: Any) -> Any:
    return SimpleNamespace(**{"overwrite": False, "resume": None, "init_from": None} | values)


@pytest.fixture
def held(tmp_path: Path) -> Any:
    """A folder with a run in it that goes on, in another process; and what ends that one."""
    ready, end = os.pipe(), os.pipe()
    if not (child := os.fork()):
        os.close(end[1])
        lock = Lock(tmp_path)
        lock.leave(agents=["agent"])
        os.write(ready[1], b"1")
        os.read(end[0], 1)  # until the other end is closed
        os._exit(0)
    os.close(end[0])
    os.read(ready[0], 1)
    left = [end[1]]

    def finish() -> None:
        if left:
            os.close(left.pop())
            os.waitpid(child, 0)

    yield finish
    finish()


@pytest.mark.usefixtures("alone")
def test_the_folder_of_a_run_that_goes_on_is_locked(
    tmp_path: Path, held: Callable[[], None]
) -> None:
    """Whatever is said of resuming; until its process has ended, however it ends."""
    for settings in ({}, {"resume": "auto"}, {"overwrite": True}):
        with (
            pytest.raises(
                ValueError,
                match=r"is the folder of a run that is going on \(process \d+ on \S+\): wait",
            ),
            claim.claimed(tmp_path, World(), _config(**settings), {}),
        ):
            pass
    held()
    with claim.claimed(tmp_path, World(), _config(), {}) as folder:
        assert folder == tmp_path.resolve()


@pytest.mark.usefixtures("alone")
def test_a_restart_waits_for_the_attempt_before_and_needs_no_setting(
    tmp_path: Path, held: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun starts ranks again whose dead ones have left figures and no checkpoint;
    `overwrite` removes nothing.
    """
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr("dtrain.files.lock.time.sleep", lambda _: held())
    world = World(agents=frozenset({"agent", "another"}))
    with ExitStack() as stack:
        stack.enter_context(claim.claimed(tmp_path, world, _config(overwrite=True), {}))
        assert (tmp_path / "metrics.jsonl").exists()
    with (
        pytest.raises(ValueError, match="holds a run"),
        claim.claimed(tmp_path, replace(world, agents=frozenset()), _config(), {}),
    ):
        pass


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", ["file", "folder", "pipe", "link to nowhere"])
@pytest.mark.parametrize("name", [NAME, claim.HYDRA, *claim.OUTPUT])
def test_what_is_in_the_way_of_a_runs_own_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    """Before it trains, and however it begins; `overwrite` removes what a run leaves, of
    whatever kind.
    """
    place, folder = tmp_path / name, name not in (NAME, *claim.FILES)
    make = {
        "file": place.touch,
        "folder": place.mkdir,
        "pipe": lambda: os.mkfifo(place),
        "link to nowhere": lambda: place.symlink_to("nowhere"),
    }
    make[kind]()
    right = kind == ("folder" if folder else "file")
    for config in (_config(), _config(resume="auto")):
        said = (
            rf"{re.escape(name)} is (no {'folder' if folder else 'file'}|a link), and the run's "
            rf"own would be in its place"
        )
        if kind == "folder" and config.resume is None:
            said += "|holds a run"  # as far as is looked at then
        with nullcontext() if right else pytest.raises(ValueError, match=said):
            with claim.claimed(tmp_path, World(), config, {}):
                pass
            make["file"]() if name == claim.RESUMABLE and right else None  # noqa: B018
    if name in claim.OUTPUT:
        with claim.claimed(tmp_path, World(), _config(overwrite=True), {}):
            assert not os.path.lexists(place)


LINKS = {
    "file": [
        NAME,
        *claim.FILES,
        claim.TOKENIZER,
        f"{claim.HYDRA}/config.yaml",
        "logs/rank1.log",
        "profile/trace.json",
        "pictures/a.png",
    ],
    "folder": [claim.HYDRA, "tensorboard", "logs", "pictures", "profile", "logs/more"],
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in LINKS.items() for name in names]
)
def test_nothing_is_written_through_a_link(kind: str, name: str, tmp_path: Path) -> None:
    """A folder that somebody has handed in may lead to files of the user's."""
    theirs, place = tmp_path / "theirs", tmp_path / "run" / name
    (theirs if kind == "folder" else tmp_path).mkdir(exist_ok=True)
    ((theirs / "config.yaml") if kind == "folder" else theirs).write_text("{}")
    before = contents(tmp_path)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(theirs)
    with (
        pytest.raises(
            ValueError,
            match=(
                f"run: {re.escape(name)} is a link, and the run's own would be in its place: move"
            ),
        ),
        claim.claimed(tmp_path / "run", World(), _config(resume="auto"), {"config.yaml": "mine"}),
    ):
        pass
    place.unlink()
    assert contents(tmp_path) | before == contents(tmp_path) and theirs.exists()


def test_a_lock_is_no_link_also_where_one_is_made_after_all_was_looked_at(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("{}")
    (tmp_path / NAME).symlink_to("theirs")
    with mock.patch("dtrain.files.lock.check_free"), pytest.raises(OSError, match="symbolic links"):
        Lock(tmp_path).leave()
    assert (tmp_path / "theirs").read_text() == "{}"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("to", ["other/checkpoints", "other", "other/checkpoints/step-00000001"])
@pytest.mark.parametrize("known_by", [claim.HYDRA, "metrics.jsonl", "summary.json"])
def test_checkpoints_may_be_elsewhere_but_in_no_other_runs_folder(
    to: str, known_by: str, tmp_path: Path
) -> None:
    """This run's would be kept there in place of the other's."""
    (tmp_path / "other" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "other" / known_by).mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "checkpoints").symlink_to(tmp_path / to)
    with (
        pytest.raises(
            ValueError,
            match=rf"checkpoints leads into another run's folder, {tmp_path}/other: lead it",
        ),
        claim.claimed(tmp_path / "mine", World(), _config(resume="auto"), {}),
    ):
        pass


@pytest.mark.usefixtures("alone")
def test_checkpoints_on_another_disk_are_one_runs_at_a_time(
    tmp_path: Path, held: Callable[[], None]
) -> None:
    """Two runs may have the same link; `held` is where it leads to."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "checkpoints").symlink_to(tmp_path)
    for _ in range(2):  # what it leaves there is not taken for another run
        with (
            pytest.raises(
                ValueError, match=f"checkpoints={tmp_path} is the folder of a run that is going on"
            ),
            claim.claimed(tmp_path / "mine", World(), _config(resume="auto"), {}),
        ):
            pass
    held()
    for _ in range(2):
        with claim.claimed(tmp_path / "mine", World(), _config(resume="auto"), {}) as folder:
            assert folder == (tmp_path / "mine").resolve()
            if not (child := os.fork()):  # a POSIX lock is its process's
                with suppress(ValueError):
                    Lock(tmp_path)
                    os._exit(1)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("left", ["[" * 9999, '{"agents": [["agent"]]}', '{"agents": 3}', "\0"])
def test_whatever_a_lock_holds_it_can_be_taken(left: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(left)
    with claim.claimed(tmp_path, World(agents=frozenset({"agent"})), _config(), {}) as folder:
        assert folder == tmp_path.resolve()


def test_default_folders_differ_also_in_one_second() -> None:
    """Of runs and of sweeps; the jobs of one sweep share theirs."""
    register()
    found = []
    for _ in range(5):
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            hydra = compose("train", return_hydra_config=True).hydra
            assert hydra.run.dir == hydra.run.dir  # once drawn it stays
            found.append((hydra.run.dir.rpartition("-")[2], hydra.sweep.dir.rpartition("-")[2]))
    assert len({run for run, _ in found}) == len({sweep for _, sweep in found}) == 5


@pytest.mark.parametrize("name", ["a" * 300, "/".join(["b" * 200] * 25)], ids=["a name", "a path"])
def test_a_folder_whose_name_is_too_long_is_a_line(name: str, call: Call, tmp_path: Path) -> None:
    status, _, err = call(*QUICK, "steps=1", f"hydra.run.dir={name}")
    assert (
        status == 2
        and err.startswith("dtrain: ")
        and "File name too long" in err
        and err.count("\n") == 1
    )


def test_a_folder_that_is_removed_while_the_run_goes_on_ends_it(tmp_path: Path) -> None:
    """Its figures would be written to a file that nobody finds."""
    run = Run("single", {}, 1, 0, 3, tmp_path / "mine", (), {})
    run.folder.mkdir()
    files = Files()
    files.start(run)
    files.step({"step": 1})
    shutil.rmtree(run.folder)
    with (
        closing(files),
        pytest.raises(OSError, match="mine/metrics.jsonl was removed while the run went on"),
    ):
        files.step({"step": 2})
