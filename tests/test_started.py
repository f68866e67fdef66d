"""Who starts a process, and with which words: other launchers, a saved configuration, a sweep."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import warm
from runs import free_port
from test_cli import PYTHON, call  # noqa: F401

from dtrain.launch import rank_processes
from dtrain.launch.launcher_variables import script_arguments
from dtrain.launch.rank_processes import spawn
from dtrain.launch.rendezvous import process_group
from dtrain.launch.world import World

Call = Callable[..., tuple[int, str, str]]
QUICK = [
    "model=tiny",
    "steps=2",
    "eval.every=0",
    "global_batch_size=4",
    "seq_len=16",
    "measure.peak_flops=1e12",
    "launch.threads=1",
]
MEET = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NTASKS": "4",
}
WHO = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "theirs",
    [MPI, SRUN, {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}],
    ids=["Open MPI", "srun", "MPICH"],
)
def test_processes_of_mpirun_and_srun_are_ranks_or_refused(theirs: dict[str, str]) -> None:
    """Never as many runs of one rank in one folder."""
    environment = theirs | MEET
    assert script_arguments(["steps=3"], environment) == ["steps=3"]
    assert {name: environment[name] for name in WHO} == WHO
    with pytest.raises(
        ValueError,
        match=r"=4: 4 processes were started, and each would train alone: use torchrun, or set "
        r"MASTER_ADDR and MASTER_PORT",
    ):
        script_arguments([], dict(theirs))
    assert script_arguments([], environment := theirs | {"RANK": "0", "WORLD_SIZE": "9"}) == []
    assert environment["RANK"] == "0"  # torchrun within srun says more


@pytest.mark.parametrize(
    "quiet",
    [
        {},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
    ],
    ids=["nothing", "one process", "a batch script of Slurm's"],
)
def test_one_process_is_one_process(quiet: dict[str, str]) -> None:
    environment = dict(quiet)
    assert script_arguments(["steps=3"], environment) == ["steps=3"] and environment == quiet


@pytest.mark.parametrize(
    "words", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"]], ids=" ".join
)
def test_an_argument_that_names_the_local_rank_is_no_setting(words: list[str]) -> None:
    environment: dict[str, str] = {}
    assert script_arguments([*words, "steps=3", "model=tiny"], environment) == [
        "steps=3",
        "model=tiny",
    ]
    assert environment == {"LOCAL_RANK": "1"}
    told = {"LOCAL_RANK": "0"}
    assert script_arguments(words, told) == [] and told == {"LOCAL_RANK": "0"}


@pytest.mark.parametrize(("told", "said"), [
    ({"RANK": "0"}, "without WORLD_SIZE: a launcher sets both"),
    ({"WORLD_SIZE": "2"}, "without RANK: a launcher sets both"),
    ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one is no number"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
])  # fmt: skip
def test_half_a_rank_is_refused(
    told: dict[str, str], said: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dtrain.cli.exits.GRACE_S", 0.0)
    status, _, err = call(*QUICK)
    assert status == 2 and said in err and err.count("\n") == 1


def test_ranks_of_one_machine_meet_by_no_name() -> None:
    """A host's name need not lead anywhere."""
    seen: list[dict[str, str]] = []

    def started(*given: Any, **_: Any) -> Any:
        seen.extend(given[3].values())
        raise ValueError("started")

    with (
        mock.patch.object(rank_processes, "start_processes", started),
        pytest.raises(ValueError, match="started"),
    ):
        spawn(print, nproc=2)
    assert [each["RANK"] for each in seen] == ["0", "1"] and not any(
        "MASTER_ADDR" in each for each in seen
    )
    assert all(each["GLOO_SOCKET_IFNAME"].startswith("lo") for each in seen)


def test_the_environment_is_after_a_run_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate and DeepSpeed leave who is which rank there, and the next job of a sweep would
    believe it.
    """
    monkeypatch.setenv("KEPT", "as it was")
    before = dict(os.environ)
    with process_group(World(), torch.device("cpu"), threads=1, timeout_s=10):
        os.environ.update(RANK="0", WORLD_SIZE="1", KEPT="changed")
    assert dict(os.environ) == before


def test_deepspeeds_launcher_and_torchs_old_one_start_ranks(tmp_path: Path, cache: Path) -> None:
    """By the words and variables that they give a script."""
    port, running = str(free_port()), []
    for rank in ("0", "1"):
        environment = {
            **os.environ,
            "DTRAIN_CACHE": str(cache),
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_SIZE": "2",
            "CROSS_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [*PYTHON, f"--local_rank={rank}", *QUICK, "strategy=ddp", "hydra.run.dir=run"]
        running.append(warm.popen(command, cwd=tmp_path, env=environment))
    for process in running:
        assert process.wait(90) == 0, process.communicate()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2


# A configuration that was composed before


def test_a_run_is_started_again_from_its_own_configuration(
    call: Call, tmp_path: Path, cache: Path
) -> None:
    """As Hydra's users do; with other settings too, and on ranks of its own.

    The curve is the same.
    """
    asked = [*QUICK, "optimizer.lr=0.01", "strategy=single"]
    assert call(*asked, "hydra.run.dir=first")[0] == 0
    again = ["--config-dir", "first/.hydra", "--config-name", "config"]
    status, out, err = call(*again)
    assert (status, err) == (0, "") and out.startswith("single on 1 rank")
    (folder,) = (tmp_path / "outputs").glob("*/*")
    # no log of Hydra's
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "first").iterdir()}
    curves = [
        [json.loads(line)["loss"] for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in (tmp_path / "first", folder)
    ]
    assert curves[0] == curves[1]
    status, _, err = call("steps=0", *again)
    assert (status, err) == (2, "dtrain: steps=0 must be at least 1\n")
    status, _, err = call(*again, "steps=0")
    assert (status, err) == (2, "dtrain: steps=0 must be at least 1\n")
    status, _, err = call("-cd=first/.hydra", "-cn=config", "stepz=1")
    assert status == 2 and "unknown key 'stepz'" in err and err.count("\n") == 1
    status, _, err = call(*again, config="compare")
    assert status == 2 and "compare takes no other configuration than its own" in err


def test_hydras_change_of_folder_is_refused(call: Call) -> None:
    status, _, err = call(*QUICK, "hydra.job.chdir=true")
    assert (
        status == 2
        and "hydra.job.chdir=true: the paths of a configuration begin where you are" in err
    )


def test_without_a_home_folder_something_else_is_asked_for(
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for words in (["data.cache='~nobody-here/x'"], ["resume='~nobody-here/x'"]):
        status, _, err = call(*QUICK, *words)
        assert status == 2 and "there is no such home folder: " in err, words
        assert err.count("\n") == 1


# A sweep


def test_a_sweep_says_which_job_is_which_and_what_came_of_each(call: Call, tmp_path: Path) -> None:
    rates = ("0.001", "0.01")
    status, out, err = call(
        "--multirun", *QUICK, f"optimizer.lr={','.join(rates)}", "hydra.sweep.dir=sweep"
    )
    assert (status, err) == (0, "")
    table = out[out.index("2 jobs") :]
    # what they share tells nothing
    assert "optimizer.lr=0.01" in table and "model=tiny" not in table
    for number, rate in enumerate(rates):
        assert f"job {number}: " in out and re.search(
            rf"job {number}: .*optimizer\.lr={re.escape(rate)}", out
        )
        summary = json.loads((tmp_path / "sweep" / str(number) / "summary.json").read_text())
        assert f"{summary['loss']:.4f}" in table
    assert "weights: " in out and sys.argv  # and where each has left its weights
