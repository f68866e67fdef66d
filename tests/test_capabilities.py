"""What goes with what, as the code itself tells; and docs/strategies.md says the same."""

from __future__ import annotations

import sys
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch.distributed as dist
from hydra import compose, initialize_config_dir

from dtrain import cli
from dtrain.compare import capabilities
from dtrain.compare.capabilities import reasons
from dtrain.compare.survey import PARTLY, RANKS, REFUSED, SAME_AXIS, WORKS, Combination, survey
from dtrain.config.groups import CONFIGS, options
from dtrain.config.schema import register, validated
from dtrain.launch.world import World
from dtrain.report.tables import put_between
from dtrain.run.assemble import assemble
from dtrain.run.run import optimizer_of
from dtrain.strategy.fsdp import FSDP
from dtrain.strategy.pipeline.strategy import PipelineParallel
from dtrain.train import Settings, Trainer

PAGE = Path(__file__).parent.parent / "docs/strategies.md"


@pytest.fixture(scope="module")
def trials() -> list[Combination]:
    register()
    return survey()


def pair(trials: list[Combination], one: str, other: str) -> Combination:
    return next(trial for trial in trials if {part.name for part in trial.parts} == {one, other})


def test_every_strategy_is_tried_with_every_task_and_every_other(trials: list[Combination]) -> None:
    named = [trial for trial in trials if not trial.parts]
    assert sorted(trial.name for trial in named) == options("strategy")
    assert all(list(trial.refusals) == options("task") for trial in trials)
    on_one_axis = {trial.name for trial in named if len(trial.axes) == 1}
    assert {frozenset(part.name for part in trial.parts) for trial in trials if trial.parts} == set(
        map(frozenset, combinations(on_one_axis, 2))
    )


def test_one_process_trains_every_task(trials: list[Combination]) -> None:
    assert next(trial for trial in trials if trial.name == "single").tasks == "all"


def one_step(strategy: str, task: str, experts: bool, size: int) -> float:
    """The loss of one step, as a run with these settings makes it."""
    register()
    model = (
        []
        if task in ("gan", "image_classification")
        else ["model=tiny", f"model.n_experts={8 * experts}"]
    )
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = validated(
            compose("train", [f"strategy={strategy}", f"task={task}", *model, "steps=1"])
        )
        job = assemble(config, World(dist.get_rank(), size, dist.get_rank(), size))
    settings = Settings(1, config.seed, config.global_batch_size, config.micro_batch_size)
    trainer = Trainer(
        job.task, job.plan.connect(), partial(optimizer_of, config.optimizer), settings
    )
    return next(trainer.steps()).loss


@pytest.mark.deep
@pytest.mark.parametrize("task", options("task"))
@pytest.mark.timeout(1500)
def test_what_is_said_to_train_trains(task: str, trials: list[Combination], world) -> None:
    """Each strategy that is said to train the task: its first loss is that of one process."""
    expected: dict[bool, float] = {}
    for trial in trials:
        size, experts = RANKS ** len(trial.axes), "ep" in trial.axes
        if trial.parts or not trial.axes or trial.refusals[task] or size > 8:
            continue
        if any(strategy.asynchronous for strategy in trial.strategies):
            continue  # whose ranks are no equals: tests/test_parameter_server.py
        if experts not in expected:
            expected[experts] = world(2).run(one_step, "single", task, experts, 1)[0]
        for loss in world(size).run(one_step, trial.name, task, experts, size):
            assert loss == pytest.approx(expected[experts], rel=1e-5), trial.name
    assert expected


def test_every_composition_that_has_a_name_trains_a_task(trials: list[Combination]) -> None:
    refused = {trial.name for trial in trials if not trial.parts and trial.tasks == "none"}
    assert refused == {"accelerate_fsdp"}  # on a CPU


@pytest.mark.parametrize(
    "names", ["replicate fsdp", "fsdp tensor", "pipeline tensor", "expert fsdp"]
)
def test_what_composes_is_marked_so(trials: list[Combination], names: str) -> None:
    found = pair(trials, *names.split())
    assert found.mark == WORKS and not found.refusals["causal_lm"]


def test_ddp_beside_anything_is_refused_with_its_reason(trials: list[Combination]) -> None:
    beside = [trial for trial in trials if "ddp" in (part.name for part in trial.parts)]
    assert {trial.mark for trial in beside} == {REFUSED, SAME_AXIS}
    assert all(reason for trial in beside for reason in trial.refusals.values())
    told = {
        reason: whom for reason, whom in reasons(beside).items() if "ddp stands alone" in reason
    }
    assert list(map(sorted, told.values())) == [
        sorted(
            trial.name for trial in beside if trial.mark == REFUSED and any(trial.asked.values())
        )
    ]


@pytest.mark.parametrize("names", ["allreduce replicate", "fsdp zero2", "tensor tensor_sequence"])
def test_one_axis_is_for_one_strategy(trials: list[Combination], names: str) -> None:
    found = pair(trials, *names.split())
    assert found.mark == SAME_AXIS and "both want the axis" in found.refusals["causal_lm"]


def test_a_pair_is_not_blamed_for_what_its_parts_refuse() -> None:
    pipeline = Combination(
        "pipeline",
        [PipelineParallel(2)],
        {"lm": "", "masked": "", "gan": "task GAN has no pipeline split"},
    )
    fsdp = Combination("fsdp", [FSDP(2)], {"lm": "", "masked": "", "gan": ""})

    def both(masked: str) -> Combination:
        refusals = {"lm": "", "masked": masked, "gan": "task GAN has no pipeline split"}
        return Combination(
            "pipeline + fsdp", pipeline.strategies + fsdp.strategies, refusals, (pipeline, fsdp)
        )

    assert both("").mark == WORKS and both("pp x fsdp: no").mark == PARTLY
    assert reasons([fsdp, pipeline, both("pp x fsdp: no")]) == {
        "task GAN has no pipeline split": ["pipeline (gan)"],
        "pp x fsdp: no": ["pipeline + fsdp (masked)"],
    }
    assert pipeline.tasks == "all but gan" and fsdp.tasks == "all"


def test_the_command_prints_it(
    trials: list[Combination], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(capabilities, "survey", lambda: trials)
    monkeypatch.setattr(sys, "argv", ["info.py", "capabilities"])
    cli.main("info", cli.info)
    printed = capsys.readouterr().out
    assert all(
        name in printed for name in options("strategy")
    ) and "those that stand alone" in " ".join(printed.split())


def test_the_page_says_the_same(
    trials: list[Combination], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(capabilities, "survey", lambda: trials)
    copy, marks = tmp_path / "strategies.md", (capabilities.BEGIN, capabilities.END)
    copy.write_text(PAGE.read_text())
    put_between(copy, *marks, capabilities.markdown())
    assert copy.read_text() == PAGE.read_text(), "run `make readme`"
    copy.write_text("# no marks\n")
    with pytest.raises(ValueError, match="strategies.md has no <!-- capabilities -->"):
        put_between(copy, *marks, capabilities.markdown())
