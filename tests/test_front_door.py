"""The command `dtrain`: its sub-commands, their help, completion, and what a plan costs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from hydra.core.global_hydra import GlobalHydra

import dtrain.__main__ as front_door

Said = tuple[int, str, str]
COMMANDS = tuple(front_door.COMMANDS)


@pytest.fixture
def call(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """Call `dtrain` with words; its exit status, what it printed, and what it said was wrong."""

    def of(*words: str) -> Said:
        monkeypatch.setenv("DTRAIN_CACHE", str(cache))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["dtrain", *words])
        GlobalHydra.instance().clear()
        status = 0
        try:
            with mock.patch.dict(os.environ):  # a launcher's argument becomes a variable
                front_door.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        out = capfd.readouterr()
        return status, out.out, out.err

    return of


# The command itself


def test_alone_it_tells_what_there_is(call) -> None:
    status, out, err = call()
    assert (status, err) == (0, "") and out == call("--help")[1]
    assert set(re.findall(r"^  dtrain (\w+) ", out, re.M)) == set(COMMANDS)
    assert call("--version") == (0, f"dtrain {front_door.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["trian"], "'trian' is no command: did you mean train?"),
        (
            ["strategy=fsdp"],
            "'strategy' is no command: a setting follows a command: dtrain train strategy=…",
        ),
        (["data.token=secret"], "is no command: a setting follows a command: dtrain train"),
        (["--cfg", "job"], "'--cfg' is no command: use train, compare, info"),
    ],
)
def test_what_is_no_command_is_told_in_a_line(call, words: list[str], answer: str) -> None:
    status, out, err = call(*words)
    assert (status, out) == (2, "") and err.count("\n") == 1 and answer in err
    assert "secret" not in err


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_help_of_its_own(call, command: str) -> None:
    status, out, err = call(command, "--help")
    assert (status, err) == (0, "") and out.startswith(f"dtrain {command}: ")
    head = out.partition("== Groups")[0]
    assert len(re.findall(rf"^  dtrain {command}", head, re.M)) == 3  # examples
    assert "prints" in head and "strategy: 3d, " in out and "global_batch_size: " in out


def test_a_folder_of_its_name_hides_no_part_of_it(tmp_path: Path) -> None:
    """A clone of the project is one, if PYTHONPATH names the folder that it is in."""
    (tmp_path / "dtrain/launch").mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    said = subprocess.run(
        [sys.executable, "-m", "dtrain", "--version"],
        cwd="/",
        env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (said.stdout, said.stderr) == (f"dtrain {front_door.__version__}\n", "")


def test_train_trains_and_takes_a_launchers_own_argument(call, tmp_path: Path) -> None:
    """`python -m torch.distributed.launch` puts its argument before all others."""
    small = ["model=tiny", "steps=1", "eval.every=0", "global_batch_size=2", "hydra.run.dir=here"]
    status, out, err = call("--local_rank=0", "train", *small)
    assert (status, err) == (0, "") and "single on 1 rank" in out
    assert json.loads((tmp_path / "here/summary.json").read_text())["steps"] == 1


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("dtrain ", {"train", "compare", "info"}),
        ("dtrain tra", {"train", "compare", "info"}),  # bash keeps those that begin so
        (
            "dtrain train strategy=fs",
            {"strategy=fsdp", "strategy=fsdp_context", "strategy=fsdp_tensor"},
        ),
        ("dtrain compare strategies=[ddp] basel", {"baseline="}),
        ("  dtrain  info world", {"world_size="}),
    ],
)
def test_a_shell_completes_commands_and_settings(
    call, line: str, offers: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    status, out, _ = call("-sc", "query=bash")
    assert status == 0 and set(out.split()) == offers


@pytest.mark.deep
def test_bash_completes_the_installed_command() -> None:
    """As a person has it: the installed `dtrain`, in a shell that evaluates what it prints."""
    script = """
    eval "$(dtrain -sc install=bash)"
    COMP_LINE="dtrain train strategy=pipeline_" COMP_CWORD=2 COMP_POINT=31
    hydra_bash_completion
    echo "${COMPREPLY[@]}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert shutil.which("dtrain", path=path)
    said = subprocess.run(
        ["bash", "-c", script], env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert said.stdout.split() == ["strategy=pipeline_fsdp", "strategy=pipeline_tensor"], said


# What a plan costs


def told(out: str) -> dict[str, str]:
    """The rows of the table."""
    cells = (re.split("[│|]", line) for line in out.splitlines())
    return {row[1].strip(): row[2].strip() for row in cells if len(row) == 4}


def test_a_plans_memory_and_messages_are_told_without_ranks(call) -> None:
    """The tiny model has 120,576 weights: fp32, Adam with two numbers each and a step count for
    each parameter; hybrid sharding over 2 x 4 ranks keeps a quarter, and sends what formulas say.
    """
    words = ["info", "model=tiny", "strategy=hsdp", "strategy.fsdp.degree=4", "world_size=8"]
    status, out, err = call(*words)
    assert (status, err) == (0, "") and "dp=2 x fsdp=4 (8 ranks), 8 rows a step" in out
    rows = told(out)
    whole = 120_576 * 4
    assert rows["weights"] == rows["gradients"] == in_words(whole / 4)
    # all-gather twice and reduce-scatter once along fsdp; an all-reduce of a shard along dp
    assert rows["sent a step, fsdp"] == in_words(3 * whole * 3 / 4)
    assert rows["sent a step, dp"] == in_words(whole / 4)
    assert "fits in 8 GiB a rank" in out


def in_words(size: float) -> str:
    from dtrain.report.amounts import in_bytes

    return in_bytes(size)


def test_what_is_predicted_for_a_plan_is_what_its_run_predicts_and_measures(
    call, tmp_path: Path
) -> None:
    words = ["model=tiny", "strategy=fsdp", "global_batch_size=4", "eval.every=0"]
    status, out, _ = call("info", *words, "world_size=2")
    rows = told(out)
    run = ["launch.nproc=2", "launch.threads=1", "steps=4", "profile=true", "hydra.run.dir=here"]
    assert status == 0 and call("train", *words, *run)[0] == 0
    first = json.loads((tmp_path / "here/summary.json").read_text())["profile"]["ranks"][0]
    kinds = first["memory"]["kinds"]
    names = {"weights": "parameters", "gradients": "gradients", "optimizer states": "optimizer"}
    for name, kind in names.items():
        assert rows[name] == in_words(kinds[kind]["most"]), name
    assert rows["activations"] == in_words(kinds["activations"]["predicted"])
    traffic = first["traffic"]
    assert rows["sent a step, fsdp"] == in_words(sum(m["wire_bytes"] for m in traffic))
    assert rows["largest messages"] == in_words(sum(m["largest"] for m in traffic))


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (
            ["strategy=ddp"],
            "strategy=ddp is a plan for several ranks: say for how many, world_size=8",
        ),
        (["strategy=ddp", "world_size=0"], "world_size=0 must be at least 1"),
        (["strategy=hsdp", "world_size=3"], "needs at least 2 ranks on each of dp and fsdp"),
        (["strategy=pipeline", "world_size=4"], "4 stages, the model has 2 blocks"),
        (["strategy=tensor", "world_size=64"], "is not divisible by"),
        (["strategy=ddp", "world_size=3", "global_batch_size=4"], "use global_batch_size=3 or 6"),
        (
            ["strategy=parameter_server", "world_size=3"],
            "nothing is predicted of strategy parameter",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_a_line(call, words: list[str], answer: str) -> None:
    status, out, err = call("info", "model=tiny", *words)
    assert (status, out) == (2, "") and err.count("\n") == 1 and answer in err


def test_the_shipped_example_of_a_large_plan_answers(call) -> None:
    """8 B on 64 ranks: an eighth of the published 8,030,261,248 weights on each."""
    words = ["model=llama_8b", "strategy=hsdp", "strategy.fsdp.degree=8", "world_size=64"]
    status, out, err = call("info", *words, "seq_len=128")
    assert (status, err) == (0, "") and told(out)["weights"] == in_words(8_030_261_248 / 2)
