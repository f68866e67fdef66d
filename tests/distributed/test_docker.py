"""docker/train.sh beside a stand-in for Docker: who trains, what is refused, and what is said of
how a run ended.

`docker/smoke.sh` does the same with an engine.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT, until

RESUMABLE, MISTAKE = 75, 2
# What it is asked it writes down; what its nodes end with stands in `statuses`, once they have
# ended.
DOCKER = r"""#!/bin/bash
echo "${0##*/} $* as ${RUN_AS:-} in ${COMPOSE_PROJECT_NAME:-}" >>"$STATE/calls"
project=${COMPOSE_PROJECT_NAME:-} last=${*: -1}
case "${0##*/} $*" in
    *" compose version") [[ ! -e $STATE/no-plugin ]] ;;
    *" version" | "docker info") ;;
    "docker image inspect"*) [[ -e $STATE/image ]] ;;
    *" build node0") until [[ -e $STATE/build ]]; do sleep 0.02; done; touch "$STATE/image" ;;
    *" up "*) touch "$STATE/$project.running" ;;
    *" down") rm -f "$STATE/$project.running" ;;
    *" ps --quiet "*) echo "$last-id" ;;
    "docker ps "*) [[ ! -e $STATE/${last##*=}.running ]] || echo "${last##*=}_node0_1" ;;
    "docker logs "*) echo "a line of $last" ;;
    "docker wait "*) until [[ -s $STATE/statuses ]]; do sleep 0.02; done; cat "$STATE/statuses" ;;
    "docker stop "*) mkdir -p "$OUTPUTS/$RUN" && echo stopped >"$OUTPUTS/$RUN/resumable" && echo $'75\n75' >"$STATE/statuses" ;;
    "docker inspect "*) [[ -e $STATE/oom ]] && echo true || echo false ;;
    *) echo "the stand-in does not know: $*" >&2; exit 99 ;;
esac
"""
ID = '#!/bin/sh\necho "${SELF:-1000}"\n'
STAT = (
    '#!/bin/sh\n[ "$2" = %u ] && echo "${OWNER:-1000}" && exit\n[ "$2" = %A ] && echo drwxr-xr-x '
    '&& exit\nexec /usr/bin/stat "$@"\n'
)

FLOCK = '#!/bin/sh\necho "flock $*" >>"$STATE/calls"\nexec /usr/bin/flock "$@"\n'


@dataclass
class Machine:
    """A host with an engine, whose users and owners are told by SELF and OWNER."""

    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(
        self, *settings: str, clone: str = "clone", **environment: str
    ) -> subprocess.Popen[str]:
        script = self.folder / clone / "docker" / "train.sh"
        if not script.exists():
            script.parent.mkdir(parents=True)
            shutil.copy(ROOT / "docker" / "train.sh", script)
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        told = {
            "PATH": f"{self.folder}/bin:/usr/bin:/bin",
            "STATE": str(self.folder),
            "OUTPUTS": str(self.folder / "out"),
        }
        self.started.append(
            subprocess.Popen(
                [script, *settings],
                env=kept | told | environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        )
        return self.started[-1]

    def run(self, **environment: str) -> tuple[int, str, str]:
        """Exit status, output, errors."""
        process = self.start(**environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def calls(self, words: str) -> list[str]:
        file = self.folder / "calls"
        return [
            line
            for line in (file.read_text() if file.exists() else "").splitlines()
            if words in line
        ]

    def ends(self, *statuses: int) -> None:
        (self.folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))


@pytest.fixture
def machine(tmp_path: Path) -> Any:
    (tmp_path / "bin").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "image").touch()
    for name, text in (
        ("docker", DOCKER),
        ("docker-compose", DOCKER),
        ("id", ID),
        ("stat", STAT),
        ("flock", FLOCK),
    ):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    made = Machine(tmp_path)
    yield made
    made.ends(1, 1)  # what waits for the nodes has a session of its own
    (tmp_path / "build").touch()
    for process in made.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("owner", ["0", "1000", "1001"])
@pytest.mark.parametrize("asked", [None, "0", "1000"])
@pytest.mark.parametrize("user", ["0", "1000"])
def test_nothing_trains_as_root_and_whoever_does_what_is_said_trains(
    user: str, asked: str | None, owner: str, machine: Machine
) -> None:
    """Root's first command with a folder of root's among them: no remedy leads to another
    refusal.
    """
    machine.ends(0, 0)
    given = {"SELF": user, "OWNER": owner} | ({"RUN_AS": asked} if asked else {})
    status, _, err = machine.run(**given)
    if status:
        assert status == MISTAKE and len(err.splitlines()) == 1 and not machine.calls(" up "), err
        if remedy := re.search(r"chown (\d+) ", err):
            given["OWNER"] = remedy[1]
        else:
            given["RUN_AS"] = re.search(r"RUN_AS=(\d+)", err)[1]  # type: ignore[index]
        status, _, err = machine.run(**given)
    assert (status, err) == (0, "")
    (up,) = machine.calls(" up ")
    assert re.search(r" as [1-9]\d* in ", up)


@pytest.mark.parametrize(
    "given",
    [{"RUN_AS": "me"}, {"NODES": "5"}, {"NODES": "0"}, {"PROCS": "0"}, {"RUN": "../other"}],
    ids=str,
)
def test_what_cannot_be_is_refused_in_a_line_that_names_it(
    given: dict[str, str], machine: Machine
) -> None:
    ((name, value),) = given.items()
    status, out, err = machine.run(**given)
    assert (
        (status, out) == (MISTAKE, "")
        and err.startswith(f"docker/train.sh: {name}={value}: ")
        and "use " in err
    )
    assert err.count("\n") == 1 and not machine.calls(" up ")


def test_another_clone_is_refused_a_run_that_goes_on(machine: Machine) -> None:
    first = machine.start(RUN="mine")
    until(lambda: machine.calls("docker wait"), 30)
    second = machine.start(RUN="mine", clone="another")
    _, err = second.communicate(timeout=60)
    assert (
        second.returncode == MISTAKE
        and "RUN=mine is being trained: wait for it, stop it (docker stop -t 60 " in err
    )
    third = machine.start(RUN="other", clone="another")
    until(lambda: len(machine.calls("docker wait")) == 2, 30)
    machine.ends(0, 0)
    assert [each.wait(60) for each in (first, third)] == [0, 0]
    assert (
        len({line.rpartition(" in ")[2] for line in machine.calls(" up ")})
        == len(machine.calls(" up "))
        == 2
    )


def test_of_two_first_starts_one_trains(machine: Machine) -> None:
    """The image must be built: a minute or ten in which neither is seen to train."""
    (machine.folder / "image").unlink()
    first = machine.start(RUN="mine")
    until(lambda: machine.calls(" build node0"), 30)
    second = machine.start(RUN="mine", clone="another")
    until(
        lambda: (
            len(machine.calls("flock ")) == 3 or len(machine.calls("docker image inspect")) == 2
        ),
        30,
    )
    (machine.folder / "build").touch()
    until(lambda: second.poll() is not None or len(machine.calls(" up ")) == 2, 30)
    machine.ends(0, 0)
    _, err = second.communicate(timeout=60)
    assert (
        second.returncode == MISTAKE
        and "waiting for another start" in err
        and "RUN=mine is being trained" in err
    )
    assert first.wait(60) == 0 and len(machine.calls(" up ")) == len(machine.calls(" build ")) == 1


@pytest.mark.parametrize(
    "tell",
    [
        lambda process: process.terminate(),
        lambda process: os.killpg(process.pid, signal.SIGINT),
    ],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_run_that_is_told_to_end_says_how_to_go_on(
    tell: Callable[[Any], None], machine: Machine
) -> None:
    process = machine.start(RUN="mine")
    until(lambda: machine.calls("docker wait"), 30)
    tell(process)
    _, err = process.communicate(timeout=60)
    assert (
        process.returncode == RESUMABLE
        and "stopped; resumable: the same command with RUN=mine goes on\n" in err
    )
    assert len(machine.calls("docker stop --time 60")) == 1 and machine.calls(" down")


@pytest.mark.parametrize(("statuses", "status", "said"), [
    ((1, 137), 1,
     ["node1 was ended by signal 9\n",
      "broken off; resumable: the same command with RUN=mine goes on"]),
    ((137, 1), 1, ["node0 was ended by signal 9\n", "broken off; resumable"]),
    ((2, 2), 2, []), ((0, 0), 0, []), ((75, 1), 1, ["broken off; resumable"]),
], ids=str)  # fmt: skip
def test_how_nodes_ended_is_told(
    statuses: tuple[int, ...], status: int, said: list[str], machine: Machine
) -> None:
    (machine.folder / "out" / "mine" / "checkpoints" / "latest").mkdir(parents=True)
    machine.ends(*statuses)
    ended, _, err = machine.run(RUN="mine")
    assert (
        ended == status
        and all(words in err for words in said)
        and len(err.splitlines()) == len(said)
    ), err
    if 137 in statuses:
        (machine.folder / "oom").touch()
        assert "was ended by signal 9: out of memory\n" in machine.run(RUN="mine")[2]


def test_an_older_compose_does_as_well(machine: Machine) -> None:
    (machine.folder / "no-plugin").touch()
    machine.ends(0, 0)
    assert machine.run()[0] == 0
    assert machine.calls("docker-compose --file") and not machine.calls("docker compose --file")


@pytest.mark.parametrize(("user", "status"), [("0", MISTAKE), ("1000", 0)])
def test_the_image_runs_nothing_as_root(user: str, status: int, machine: Machine) -> None:
    """However it is started: by plain compose, by `docker run`."""
    environment = {"PATH": f"{machine.folder}/bin:/usr/bin:/bin", "SELF": user}
    command = [ROOT / "docker" / "entrypoint.sh", "echo", "a b", "c"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "" if status else "a b c\n")
    assert (
        done.stderr.startswith("dtrain: nothing trains as root: ")
        == bool(status)
        == (done.stderr.count("\n") == 1)
    )
    assert 'ENTRYPOINT ["entrypoint.sh"]' in (ROOT / "docker" / "Dockerfile").read_text()
