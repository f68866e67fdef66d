"""What goes with what, as the code itself tells; and the README says the same."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import pytest

from dtrain import capabilities, cli
from dtrain.capabilities import reasons
from dtrain.config import options, register
from dtrain.strategy.fsdp import FSDP
from dtrain.strategy.pipeline import Pipeline
from dtrain.survey import PARTLY, REFUSED, SAME_AXIS, WORKS, Trial, survey

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        return survey()


def pair(trials: list[Trial], one: str, other: str) -> Trial:
    return next(trial for trial in trials if {part.name for part in trial.parts} == {one, other})


def test_every_strategy_is_tried_with_every_task_and_every_other(trials: list[Trial]) -> None:
    named = [trial for trial in trials if not trial.parts]
    assert sorted(trial.name for trial in named) == options("strategy")
    assert all(list(trial.refusals) == options("task") for trial in trials)
    on_one_axis = {trial.name for trial in named if len(trial.axes) == 1}
    assert {frozenset(part.name for part in trial.parts) for trial in trials if trial.parts} == set(
        map(frozenset, combinations(on_one_axis, 2))
    )


def test_one_process_trains_every_task(trials: list[Trial]) -> None:
    assert next(trial for trial in trials if trial.name == "single").tasks == "all"


def test_every_composition_that_has_a_name_trains_a_task(trials: list[Trial]) -> None:
    refused = {trial.name for trial in trials if not trial.parts and trial.tasks == "none"}
    assert refused == {"accelerate_fsdp"}  # on a CPU


@pytest.mark.parametrize("names", ["replicate fsdp", "fsdp tensor", "pipeline tensor", "expert fsdp"])
def test_what_composes_is_marked_so(trials: list[Trial], names: str) -> None:
    found = pair(trials, *names.split())
    assert found.mark == WORKS and not found.refusals["causal_lm"]


def test_ddp_beside_anything_is_refused_with_its_reason(trials: list[Trial]) -> None:
    beside = [trial for trial in trials if "ddp" in (part.name for part in trial.parts)]
    assert {trial.mark for trial in beside} == {REFUSED, SAME_AXIS}
    assert all(reason for trial in beside for reason in trial.refusals.values())
    told = {reason: whom for reason, whom in reasons(beside).items() if "ddp stands alone" in reason}
    assert list(map(sorted, told.values())) == [
        sorted(trial.name for trial in beside if trial.mark == REFUSED and any(trial.asked.values()))
    ]


@pytest.mark.parametrize("names", ["allreduce replicate", "fsdp zero2", "tensor tensor_sequence"])
def test_one_axis_is_for_one_strategy(trials: list[Trial], names: str) -> None:
    found = pair(trials, *names.split())
    assert found.mark == SAME_AXIS and "both want the axis" in found.refusals["causal_lm"]


def test_a_pair_is_not_blamed_for_what_its_parts_refuse() -> None:
    pipeline = Trial("pipeline", [Pipeline(2)], {"lm": "", "masked": "", "gan": "task GAN has no pipeline split"})
    fsdp = Trial("fsdp", [FSDP(2)], {"lm": "", "masked": "", "gan": ""})

    def both(masked: str) -> Trial:
        refusals = {"lm": "", "masked": masked, "gan": "task GAN has no pipeline split"}
        return Trial("pipeline + fsdp", pipeline.strategies + fsdp.strategies, refusals, (pipeline, fsdp))

    assert both("").mark == WORKS and both("pp x fsdp: no").mark == PARTLY
    assert reasons([fsdp, pipeline, both("pp x fsdp: no")]) == {
        "task GAN has no pipeline split": ["pipeline (gan)"],
        "pp x fsdp: no": ["pipeline + fsdp (masked)"],
    }
    assert pipeline.tasks == "lm, masked" and fsdp.tasks == "all"


def test_the_command_prints_it(
    trials: list[Trial], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(capabilities, "survey", lambda: trials)
    monkeypatch.setattr(sys, "argv", ["info.py", "capabilities"])
    cli.main("info", cli.info)
    printed = capsys.readouterr().out
    assert all(name in printed for name in options("strategy")) and "those that stand alone" in " ".join(
        printed.split()
    )


def test_the_readme_says_the_same(trials: list[Trial], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(capabilities, "survey", lambda: trials)
    copy = tmp_path / "README.md"
    copy.write_text(README.read_text())
    capabilities.write(copy)
    assert copy.read_text() == README.read_text(), "run `make readme`"
    copy.write_text("# no marks\n")
    with pytest.raises(ValueError, match="README.md has no <!-- capabilities -->"):
        capabilities.write(copy)
