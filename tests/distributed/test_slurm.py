"""launch/slurm.sbatch under a real Slurm: a controller and one node, started for these tests,
all state in a folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import ENVIRONMENT, ROOT, TINY, curve, free_port, until

PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "squeue",
    "sinfo",
    "scancel",
)
MISSING = [program for program in PROGRAMS if not shutil.which(program)]
WHY_NOT = (
    f"no {', '.join(MISSING)} here: apt-get install slurm-wlm"
    if MISSING
    else "slurmd must be root, to start jobs as their users"
    if os.geteuid()
    else ""
)

MUNGE = ("munge.key-file", "munge.socket", "munge.pid-file", "munge.log-file", "munge.seed-file")

# Without cgroups (proctrack/linuxproc), reachable from this machine alone, with a munge of its own:
# its jobs are root's. Jobs in low are preempted by those in high, and queued again.
SETTINGS = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 MaxTime=INFINITE
PartitionName=high Nodes={host} PriorityTier=2 MaxTime=INFINITE
"""


@dataclass(frozen=True)
class Slurm:
    """A cluster of one node."""

    environment: dict[str, str]

    def __call__(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return (done.stdout + done.stderr).strip()

    def answers(self) -> bool:
        return not subprocess.run(
            ["scontrol", "ping"], env=self.environment, capture_output=True
        ).returncode

    def shown(self, job: str) -> dict[str, str]:
        return dict(
            word.split("=", 1)
            for word in self("scontrol", "show", "job", job).split()
            if "=" in word
        )

    def ended(self, job: str) -> tuple[str, str]:
        """Its state and exit status, when it has one."""
        until(lambda: self.shown(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), 240)
        shown = self.shown(job)
        return shown["JobState"], shown["ExitCode"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0]
    for each in ("state", "spool"):
        (folder / each).mkdir()
    ports = {"controller_port": free_port(), "node_port": free_port()}
    (folder / "slurm.conf").write_text(SETTINGS.format(folder=folder, host=host, **ports))
    cluster = Slurm({**ENVIRONMENT, "SLURM_CONF": str(folder / "slurm.conf")})
    (folder / "munge.key-file").write_bytes(os.urandom(128))
    (folder / "munge.key-file").chmod(0o400)
    files = [f"--{name.partition('.')[2]}={folder / name}" for name in MUNGE]
    # --force: others need not reach its socket
    munge = ["munged", "--foreground", "--force", *files]
    daemons = []
    with (folder / "daemons.log").open("w") as log:
        try:
            for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
                daemons.append(
                    subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log)
                )
                until(lambda: (folder / "munge.socket").exists(), 10)
            until(
                lambda: (
                    cluster.answers()
                    and {*cluster("sinfo", "--noheader", "--format=%t").split()} == {"idle"}
                ),
                30,
            )
            yield cluster
            cluster("scancel", "--user=root")
            until(lambda: not cluster("squeue", "--noheader"), 60)
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(30)


@pytest.fixture
def submit(slurm: Slurm, tmp_path: Path) -> Callable[..., str]:
    """Submit launch/slurm.sbatch; the job's number. Its folder is tmp_path/RUN."""

    def of(*overrides: str, run: str = "run", options: tuple[str, ...] = ()) -> str:
        environment = {**slurm.environment, "RUN": str(tmp_path / run)}
        output = f"--output={tmp_path / 'printed'}-%A-%a.log"
        command = ["--parsable", output, *options, "launch/slurm.sbatch", *TINY, *overrides]
        return Slurm(environment)("sbatch", *command)

    return of


def test_a_job_that_is_told_and_preempted_has_the_losses_of_one_that_is_not(
    slurm, submit, tmp_path: Path
) -> None:
    whole = submit("steps=400", run="whole")
    assert slurm.ended(whole) == ("COMPLETED", "0:0")
    job = submit("steps=400")
    until(lambda: len(curve(tmp_path / "run")) > 50)
    # to the job's steps, as --signal does before the time limit
    slurm("scancel", "--signal=TERM", job)
    until(lambda: slurm.shown(job)["Restarts"] == "1")
    assert "stopped after step" in (tmp_path / "run" / "resumable").read_text()
    until(lambda: slurm.shown(job)["JobState"] == "RUNNING" and len(curve(tmp_path / "run")) > 150)
    slurm("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true")
    until(lambda: slurm.shown(job)["Restarts"] == "2")
    assert slurm.ended(job) == ("COMPLETED", "0:0")
    assert (
        curve(tmp_path / "run") == curve(tmp_path / "whole") and len(curve(tmp_path / "run")) == 400
    )
    assert not (tmp_path / "run" / "resumable").exists()
    printed = "".join(file.read_text() for file in tmp_path.glob(f"printed-{job}-*"))
    assert printed.count("resumed from") == 2 and "Traceback" not in printed


def test_submitit_gives_a_sweep_to_slurm(slurm, tmp_path: Path) -> None:
    pytest.importorskip(
        "hydra_plugins.hydra_submitit_launcher", reason="pip install hydra-submitit-launcher"
    )
    slurm(
        "python",
        "scripts/train.py",
        "--multirun",
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.partition=low",
        "hydra.launcher.cpus_per_task=2",
        "launch.nproc=2",
        f"hydra.sweep.dir={tmp_path}",
        *TINY,
        "steps=3",
        "seed=1,2",
    )
    assert [len(curve(tmp_path / number)) for number in "01"] == [3, 3]


def test_an_array_is_a_list_of_overrides(slurm, submit, tmp_path: Path) -> None:
    job = submit("steps=3", "--", "seed=1", "strategy=fsdp seed=2", options=("--array=0-1",))
    for task in "01":
        assert slurm.ended(f"{job}_{task}") == ("COMPLETED", "0:0")
    done = [json.loads((tmp_path / f"run_{task}" / "summary.json").read_text()) for task in "01"]
    assert [(each["strategy"], each["config"]["seed"]) for each in done] == [
        ("ddp", 1),
        ("fsdp", 2),
    ]
    outside = submit("--", "seed=1", options=("--array=5",))
    assert slurm.ended(f"{outside}_5") == ("FAILED", "2:0")


def test_a_job_that_fails_says_so_and_one_that_is_cancelled_stays_so(
    slurm, submit, tmp_path: Path
) -> None:
    wrong = submit("model.n_heads=3")
    # a mistake's, as launch/node.sh ends with the rank's own
    assert slurm.ended(wrong) == ("FAILED", "2:0")
    job = submit("steps=100000", run="cancelled")
    until(lambda: len(curve(tmp_path / "cancelled")) > 5)
    slurm("scancel", job)
    until(lambda: not slurm("squeue", "--noheader"))
    assert (tmp_path / "cancelled" / "resumable").exists() and slurm.ended(job)[0] == "CANCELLED"


def test_a_port_is_drawn_and_the_jobs_number_does_not_tell_it(tmp_path: Path) -> None:
    """Nor does any command hold the rendezvous' name: launch/node.sh draws that
    (tests/distributed/test_node.py).
    """
    for name, text in (("scontrol", "echo node-a; echo node-b"), ("srun", 'echo "$*"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    told = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "2",
    }
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **told}
    said = [
        subprocess.run(
            [ROOT / "launch/slurm.sbatch", "steps=3"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(8)
    ]
    ports = [int(re.findall(r"--rdzv-endpoint=node-a:(\d+) ", line)[0]) for line in said]
    assert all(20_000 <= port < 30_000 for port in ports) and len(set(ports)) > 4, ports
    assert not any("rdzv-id" in line for line in said)


def test_slurm_would_take_the_script(slurm) -> None:
    assert "to start at" in slurm("sbatch", "--test-only", "launch/slurm.sbatch", "strategy=fsdp")
