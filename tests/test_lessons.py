"""The lessons' formulas are dtrain's own predictions, and their grades are earned."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import runpy
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import warm
from hydra import compose, initialize_config_dir

from dtrain.config.schema import register, validated
from dtrain.cost.predict import fold
from dtrain.cost.recorder import record_footprint
from dtrain.parallel.plan import Plan
from dtrain.run.assemble import model_factories, optimizer_of, strategies_of
from dtrain.strategy.pipeline.schedule import bubble
from dtrain.strategy.pipeline.strategy import PipelineParallel
from dtrain.task.base import Supervised, Task
from dtrain.task.batch import Batch
from dtrain.task.causal_lm import count_correct, count_targets, cross_entropy

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "lessons"
LESSONS = sorted(FOLDER.glob("[0-9]*.py"))
sys.path.insert(0, str(FOLDER))

import lesson  # noqa: E402
from lesson import Given, Measured, Question, Result  # noqa: E402

# What shapes alone do not tell: losses, what a router does, and what asynchronous and broken runs do.
ONLY_BY_A_RUN = {
    "01_one_process": {"loss"},
    "02_data_parallel": {"loss"},
    "07_experts": {"alike"},
    "09_composing": {"loss"},
}
NUMBER = Question("sent", "How much?", 100.0, "hint", "Because.", unit="KiB", tolerance=0.05)
CHOICE = Question("kind", "Which?", "b", "hint", "Because.", choices=("a", "b"))


@pytest.fixture(autouse=True)
def own_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a score of its own; the data are still those of all tests."""
    monkeypatch.setattr(lesson, "kept_in", lambda: tmp_path / "lessons.json")


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"lesson_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def questions_of(module: ModuleType) -> tuple[Question, ...]:
    questions: tuple[Question, ...] = module.asked.run()[1]["questions"]
    return questions


# The notebooks


def test_there_are_ten_valid_notebooks(tmp_path: Path) -> None:
    """By marimo's own check, which also finds a cycle: here one that we make."""
    assert [file.stem[:2] for file in LESSONS] == [f"{n:02}" for n in range(1, 11)]
    check = [sys.executable, "-m", "marimo", "check", "--strict"]
    assert subprocess.run([*check, *map(str, LESSONS)]).returncode == 0
    cycle = tmp_path / "cycle.py"
    text = LESSONS[0].read_text()
    cycle.write_text(text.replace("def asked():\n", "def asked(verdicts):\n    verdicts\n"))
    found = subprocess.run([*check, str(cycle)], capture_output=True, text=True)
    assert found.returncode != 0 and "cycle" in (found.stdout + found.stderr).lower()


@pytest.mark.parametrize("file", LESSONS, ids=lambda file: file.stem)
def test_each_lesson_asks_and_explains(file: Path) -> None:
    text, questions = file.read_text(), questions_of(load(file))
    assert 2 <= len(questions) <= 4
    assert f'lesson.judge(\n        "{file.stem}"' in text  # the score's name is the file's
    assert 4 <= text.count("mo.md(r") + text.count("mo.md(f") <= 8
    assert len({each.key for each in questions}) == len(questions)
    for each in questions:
        assert each.hint and each.because and not each.prompt.endswith(".")
        assert not each.choices or each.answer in each.choices


# The formulas


class Tokens(Task):
    """Random bytes for the configured model, so that no data are needed."""

    def __init__(self, config: Any) -> None:
        self.shape = config.global_batch_size, config.seq_len or lesson.TOKENS
        self.models = model_factories(config)
        update = partial(Supervised, "model", ("tokens", "positions"))
        self.updates = (update(cross_entropy, count_targets, count_correct),)

    def batch(self, step: int) -> Batch:
        tokens = torch.zeros(self.shape, dtype=torch.int64)
        positions = torch.arange(self.shape[1]).expand(self.shape)
        return {"tokens": tokens, "positions": positions, "targets": tokens}

    def size(self, batch: Batch) -> int:
        return batch["tokens"].numel()


@cache
def predicted(*settings: str, **_: Any) -> Result:
    """What `lesson.run` would return if each figure were dtrain's prediction; no process is
    started. The losses of all are the same.
    """
    register()
    words = [*lesson._without(lesson.TINY, settings), *settings]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = validated(compose("train", words))
    ranks = next((int(w.partition("=")[2]) for w in words if w.startswith("launch.nproc=")), 1)
    plan = Plan.of(strategies_of(config), ranks)
    footprint = record_footprint(
        Tokens(config),
        plan,
        partial(optimizer_of, config.optimizer),
        global_batch_size=config.global_batch_size,
    )
    pipeline = plan.strategy_on("pp")
    micro_batches = plan.micro_batches(config.global_batch_size, None)
    theory = (
        {"theory": bubble(pipeline.schedule, micro_batches), "measured": math.nan}
        if isinstance(pipeline, PipelineParallel)
        else None
    )
    profile = {"ranks": [_profile(fold(footprint, plan, r), plan) for r in range(ranks)]}
    return Result(
        lesson.shown(words),
        0,
        "",
        {"profile": profile | {"bubble": theory}, "mesh": dict(plan.degrees)},
        [{"step": step, "loss": 1.0} for step in range(1, config.steps + 1)],
        "<svg></svg>",
    )


def _profile(cost: Any, plan: Plan) -> dict[str, Any]:
    bytes_by_kind = {
        "parameters": cost.parameter_bytes,
        "gradients": cost.gradient_bytes,
        "optimizer": cost.optimizer_bytes,
        "activations": cost.activation_bytes,
    }
    traffic = [
        {
            "axis": each.axis,
            "operation": each.operation,
            "calls": each.calls,
            "wire_bytes": each.wire_bytes(plan.degrees[each.axis]),
        }
        for each in cost.messages
    ]
    kinds = {kind: {"most": size, "predicted": size} for kind, size in bytes_by_kind.items()}
    return {"traffic": traffic, "traffic_predicted": traffic, "memory": {"kinds": kinds}}


@pytest.mark.parametrize(
    "file", [f for f in LESSONS if f.stem[:2] not in ("08", "10")], ids=lambda file: file.stem
)
def test_formulas_are_what_dtrain_predicts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole notebook, with its own settings and its own way to read the figures."""
    monkeypatch.setattr(lesson, "run", predicted)
    monkeypatch.setattr(sys, "argv", [str(file)])
    verdicts = {each.question.key: each for each in load(file).app.run()[1]["verdicts"]}
    by_run = ONLY_BY_A_RUN.get(file.stem, set())
    wrong = {key: each.text for key, each in verdicts.items() if not each.right}
    assert set(wrong) <= by_run, wrong
    assert len(verdicts.keys() - by_run) >= 3


# Grades and the score


@pytest.mark.parametrize(
    ("given", "value", "right"),
    [
        (100, 100, True), (104, 100, True), (96, 100, True), (106, 100, False), (94, 100, False),
        (-100, 100, False), (math.nan, 100, False), (math.inf, 100, False), (None, 100, False),
        (0, 0, True), (1e-9, 0, False), (100, 1, False), (100, math.nan, False),
    ],
)  # fmt: skip
def test_a_number_is_right_within_the_tolerance(given: Any, value: float, right: bool) -> None:
    verdict = lesson.grade(NUMBER, given, Measured(value))
    assert verdict.right is right
    assert verdict.text.startswith("Right:" if right else ("No:", "You gave no answer"))
    assert NUMBER.named(value) in verdict.text and verdict.text.endswith("Because.")


def test_a_grade_is_by_what_was_measured_and_by_nothing_else() -> None:
    """Neither by the formula's answer nor by dtrain's prediction."""
    assert not lesson.grade(NUMBER, 100, Measured(200, predicted=100)).right
    assert lesson.grade(NUMBER, 200, Measured(200, predicted=100)).right


def test_it_is_said_how_far_off_a_number_is() -> None:
    said = {given: lesson.grade(NUMBER, given, Measured(100)).text for given in (200, 50)}
    assert "2 times as much" in said[200] and "0.5 of it" in said[50]


def test_it_is_said_what_was_not_measured() -> None:
    text = lesson.grade(NUMBER, 100, Measured(100, by="by the schedule")).text
    assert "100 KiB by the schedule" in text and "measured" not in text


def test_a_choice_is_right_or_it_is_said_what_is() -> None:
    assert lesson.grade(CHOICE, "b", Measured("b")).right
    wrong = lesson.grade(CHOICE, "a", Measured("b"))
    assert not wrong.right and "“b”" in wrong.text and wrong.text.endswith("Because.")
    assert not lesson.grade(CHOICE, None, Measured("b")).right


def judged(name: str, *given: Any) -> str:
    measured = {"sent": Measured(100), "kind": Measured("b")}
    values = dict(zip(measured, given, strict=True))
    given_by_learner = Given(values, of_learner=True)
    return lesson.result_of(lesson.judge(name, (NUMBER, CHOICE), given_by_learner, measured))


def test_the_score_grows_over_lessons_and_is_kept() -> None:
    judged("01_one_process", 100, "b")
    assert lesson.total() == "Your score: 2 of 2 right in 1 lesson"
    assert judged("02_data_parallel", 500, "b") == "1 of 2 right"
    assert lesson.total() == "Your score: 3 of 4 right in 2 lessons"
    judged("01_one_process", 100, "a")  # the latest answers count
    assert lesson.total() == "Your score: 2 of 4 right in 2 lessons"
    assert json.loads(lesson.kept_in().read_text())["02_data_parallel"] == {
        "sent": False,
        "kind": True,
    }


@pytest.mark.parametrize("text", ["", "[]", "{", '{"01": 3}', '{"01": {"a": "yes"}}'])
def test_a_score_that_is_none_of_ours_counts_for_nothing(text: str) -> None:
    lesson.kept_in().write_text(text)
    assert "Your score: 0 of " in lesson.total()
    judged("02_data_parallel", 100, "b")
    assert "Your score: 2 of " in lesson.total()


def test_formulas_answers_are_nobodys_score() -> None:
    measured = {"sent": Measured(100)}
    verdicts = lesson.judge("x", (NUMBER,), Given({"sent": 100.0}, of_learner=False), measured)
    assert verdicts[0].right and not lesson.kept_in().exists()


def test_a_question_without_a_measurement_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was measured for kind"):
        lesson.judge("x", (NUMBER, CHOICE), Given({}, True), {"sent": Measured(1)})


def test_the_form_waits_for_every_answer() -> None:
    said = [lesson._missing((NUMBER, CHOICE), v) for v in ({}, {"sent": 0}, {"kind": "a"})]
    assert [each and each[:10] for each in said] == ["Question 1", "Question 2", "Question 1"]
    assert lesson._missing((NUMBER, CHOICE), {"sent": 0, "kind": "a"}) is None


# Whole runs


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What dtrain prints in each run of a lesson; the server of warm processes starts them."""
    outputs: list[str] = []

    def start(command: list[str], folder: str) -> warm.Ended:
        ended = warm.run(command, cwd=folder)
        outputs.append(ended.stdout)
        return subprocess.CompletedProcess(
            command, ended.returncode, ended.stdout + ended.stderr, ended.stderr
        )

    monkeypatch.setattr(lesson, "start", start)
    return outputs


def as_script(file: Path, *arguments: str, capsys: Any) -> str:
    """What `python lessons/….py` prints with these arguments."""
    with mock.patch.object(sys, "argv", [str(file), *arguments]):
        runpy.run_path(str(file), run_name="__main__")
    said: str = capsys.readouterr().out
    return said


def test_right_answers_score_in_full_and_wrong_ones_nothing(
    printed: list[str], capsys: Any
) -> None:
    file = LESSONS[0]
    right = ("--loss", "5.5", "--states", "1.84", "--largest", "4", "--double", "2")
    said = as_script(file, *right, capsys=capsys)
    assert "4 of 4 right" in said and "Your score: 4 of 4 right in 1 lesson" in said
    first = re.search(r"^step +1  loss (\S+)", printed[0], re.M)
    assert first and f"dtrain measured {float(first[1]):.3f} nats" in said  # the run's own figure
    wrong = ("--loss", "2", "--states", "0.46", "--largest", "1", "--double", "1")
    said = as_script(file, *wrong, capsys=capsys)
    assert "0 of 4 right" in said and "Your score: 0 of 4 right in 1 lesson" in said
    for question in questions_of(load(file)):
        assert lesson._plain(question.because) in said
    assert "0.25 of it" in said and "“activations”" in said


@pytest.mark.deep
@pytest.mark.parametrize("file", LESSONS, ids=lambda file: file.stem)
def test_each_lesson_runs_as_a_script(file: Path, tmp_path: Path) -> None:
    """With the formulas' answers, as a user starts it: all of them are right by real runs."""
    ended = warm.run([sys.executable, str(file)], cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    questions = len(questions_of(load(file)))
    assert f"{questions} of {questions} right (the answers are the formulas')" in ended.stdout
    assert "Your score" not in ended.stdout


@pytest.mark.deep
@pytest.mark.parametrize("file", LESSONS, ids=lambda file: file.stem)
def test_what_each_lesson_offers_to_try_runs(file: Path, printed: list[str]) -> None:
    module = load(file)
    option = module.setting.run()[1]["option"].value
    pressed = {"again": SimpleNamespace(value=True), "option": SimpleNamespace(value=option)}
    output, _ = module.tried.run(**pressed)
    assert "dtrain train model=tiny" in re.sub("<[^>]*>", "", output.text)
    assert len(printed) == 1
