"""What all lessons share: run dtrain, ask for predictions, grade them and keep the score.

    ask(questions) -> a form; predictions(questions, form) -> what was given, or the notebook waits
    run("strategy=ddp", "launch.nproc=2") -> Result: what a run of the model `tiny` has measured
    judge(name, questions, given, measured) -> verdicts, and the score is kept; show, score

In a notebook the predictions come from the form. In a script (`python lessons/01_one_process.py
--loss 5.5`) they come from the command line, a question's key for each. Without any, a script
gives the formulas' answers and keeps no score.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import marimo as mo
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dtrain.files import json_files

TRAIN = [sys.executable, "-m", "dtrain", "train"]
# Small and short: a run takes seconds on two cores. The profile looks at steps 3 and 4.
TINY = (
    "model=tiny",
    "steps=5",
    "global_batch_size=4",
    "eval.every=0",
    "checkpoint.last=false",
    "launch.threads=1",
    "profile=true",
)
LONGEST = 300  # seconds of a run
ROWS, TOKENS = 4, 64  # of a batch; of a row
VOCABULARY, WIDTH, BLOCKS = 256, 64, 2  # of the model tiny
FLOAT = 4  # bytes of a number in fp32
KIB, MIB = 1024, 1024**2
STATES = ("parameters", "gradients", "optimizer")  # between two steps
KINDS = (*STATES, "activations")
BY_FORMULA = "formula"  # `--answers formula`


def parameters(blocks: int = BLOCKS) -> int:
    """Return the number of parameters of the model tiny."""
    embeddings = (VOCABULARY + TOKENS) * WIDTH  # of bytes and of positions; the head shares them
    matrices = 12 * WIDTH**2  # 4 of attention, 2 x 4 of the feed-forward layer
    vectors = 13 * WIDTH  # 9 of biases, 4 of two norms
    return embeddings + blocks * (matrices + vectors) + 2 * WIDTH


# Runs


@dataclass(frozen=True)
class Result:
    """What a run has left."""

    command: str  # as a user types it
    status: int
    printed: str
    summary: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()  # an object a step
    gantt: str = ""  # SVG

    @property
    def losses(self) -> list[float]:
        return [float(step["loss"]) for step in self.metrics]

    @property
    def steps_printed(self) -> list[int]:
        """Return the steps that the run has printed, and so has trained."""
        return [int(step) for step in re.findall(r"^step +(\d+)  loss", self.printed, re.M)]

    @property
    def said(self) -> list[str]:
        """Return what dtrain says of an error, a line each."""
        return [line for line in self.printed.splitlines() if line.startswith("dtrain: ")]

    def _ranks(self) -> list[dict[str, Any]]:
        ranks: list[dict[str, Any]] = self.summary["profile"]["ranks"]
        return ranks

    def held(self, *kinds: str, rank: int = 0, predicted: bool = False) -> float:
        """Return the bytes of such tensors on a rank: the most in a step."""
        of = self._ranks()[rank]["memory"]["kinds"]
        return float(sum(of[kind]["predicted" if predicted else "most"] for kind in kinds))

    def calls(self, axis: str = "") -> int:
        """Return the collectives and messages of a step of rank 0."""
        found = self._ranks()[0]["traffic"]
        return sum(int(each["calls"]) for each in found if axis in ("", each["axis"]))

    def sent(self, axis: str = "", what: str = "", rank: int = 0, predicted: bool = False) -> float:
        """Return the bytes that leave a rank in a step, on an axis and by a collective if given."""
        found = self._ranks()[rank]["traffic_predicted" if predicted else "traffic"]
        return float(
            sum(
                each["wire_bytes"]
                for each in found
                if axis in ("", each["axis"]) and what in ("", each["operation"])
            )
        )

    @property
    def bubble(self) -> dict[str, float]:
        """Return a pipeline's idle share: `theory`, which its schedule has, and `measured`."""
        found: dict[str, float] = self.summary["profile"]["bubble"]
        return found


def run(*settings: str, folder: Path | None = None, fails: bool | None = False) -> Result:
    """Train the model tiny by a command, and return what it leaves.

    Args:
        settings: as on the command line; they replace those of `TINY`.
        folder: where the run stays; None: it is read and removed.
        fails: whether the lesson wants to see it fail; None: either will do.

    Raises:
        RuntimeError: it failed, or it did not.
    """
    with tempfile.TemporaryDirectory(prefix="lesson-") as temporary:
        place = folder or Path(temporary) / "run"
        words = [*_without(TINY, settings), *settings]
        with mo.status.spinner(title="dtrain trains", subtitle=shown(words)):
            ended = start([*TRAIN, *words, f"hydra.run.dir={place}"], temporary)
        result = _read(place, shown(words), ended)
    if fails is not None and fails is (result.status == 0):
        raise RuntimeError(
            f"{result.command} ended with status {result.status}:\n{result.printed[-2000:]}"
        )
    say(f"$ {result.command}")
    return result


def run_and_kill(*settings: str, folder: Path, rank: int, step: int) -> Result:
    """Train in the folder, and kill a rank (SIGKILL) when a step is in `metrics.jsonl`."""
    words = [*_without(TINY, settings), *settings]
    with (
        tempfile.TemporaryFile("w+") as printed,
        mo.status.spinner(title="dtrain trains, and is killed", subtitle=shown(words)),
    ):
        command = [*TRAIN, *words, f"hydra.run.dir={folder}"]
        with subprocess.Popen(
            command, cwd=folder.parent, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed
        ) as process:
            while process.poll() is None and _steps(folder) < step:
                time.sleep(0.02)
            if process.poll() is None:
                os.kill(_process_of(folder, rank), signal.SIGKILL)
            process.wait(LONGEST)
        printed.seek(0)
        ended = subprocess.CompletedProcess(command, process.returncode, printed.read())
    say(f"$ {shown(words)}  # and rank {rank} is killed")
    return _read(folder, shown(words), ended)


def _steps(folder: Path) -> int:
    return max((line["step"] for line in json_files.lines(folder / "metrics.jsonl")), default=0)


def _process_of(folder: Path, rank: int) -> int:
    """Return the process of a rank, which its log begins with."""
    found = re.findall(
        rf"rank {rank}, process (\d+)", (folder / f"logs/rank{rank}.log").read_text()
    )
    return int(found[-1])


def start(command: list[str], folder: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder until it ends."""
    return subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST,
    )


def shown(words: Iterable[str]) -> str:
    """Return the command as a user types it."""
    return shlex.join(["dtrain", "train", *words])


def _without(defaults: Sequence[str], settings: Sequence[str]) -> list[str]:
    given = {setting.partition("=")[0] for setting in settings}
    return [each for each in defaults if each.partition("=")[0] not in given]


def _read(place: Path, command: str, ended: subprocess.CompletedProcess[str]) -> Result:
    summary, gantt = place / "summary.json", place / "profile" / "gantt.svg"
    return Result(
        command,
        ended.returncode,
        ended.stdout,
        json_files.figures(summary) if summary.exists() else {},
        [*json_files.lines(place / "metrics.jsonl")],
        gantt.read_text() if gantt.exists() else "",
    )


def apart(one: Result, other: Result) -> float:
    """Return the greatest difference between the losses of two runs."""
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def compared(one: Result, other: Result) -> str:
    """Return which of `SAME`, `LOWER` and `HIGHER` the last loss of the other is."""
    if apart(one, other) < ROUNDING:
        return SAME
    return LOWER if other.losses[-1] < one.losses[-1] else HIGHER


ROUNDING = 1e-4  # of losses in fp32 that are the same
SAME, LOWER, HIGHER = "the same to rounding", "lower", "higher"


# Questions


@dataclass(frozen=True)
class Question:
    """One prediction that the lesson asks for."""

    key: str
    prompt: str
    answer: float | str  # what the formula gives; one of the choices, if there are any
    hint: str
    because: str  # said with the grade
    unit: str = ""
    tolerance: float = 0.05  # how far a number may be from the measured one, as a share of it
    choices: tuple[str, ...] = ()

    def widget(self, number: int) -> Any:
        """Return the field that asks it."""
        label = f"**{number}.** {self.prompt}"
        if self.choices:
            return mo.ui.radio(self.choices, label=label)
        return mo.ui.number(label=f"{label} [{self.unit}]" if self.unit else label)

    def named(self, value: float | str) -> str:
        """Return a value with its unit."""
        if isinstance(value, str):
            return value
        return f"{value:,.{_places(value)}f} {self.unit}".strip()


def _places(value: float) -> int:
    if not math.isfinite(value) or value == int(value) or abs(value) >= 100:
        return 0
    return 1 if abs(value) >= 10 else 3


@dataclass(frozen=True)
class Measured:
    """What a run gives for a question, and what dtrain predicts from shapes, if it does."""

    value: float | str
    predicted: float | None = None
    by: str = ""  # what it was found by, if not by measuring

    def told(self, question: Question) -> str:
        """Return it with its unit, as the end of a sentence."""
        value = question.named(self.value)
        return f"it is {value} {self.by}" if self.by else f"dtrain measured {value}"


@dataclass(frozen=True)
class Given:
    """The predictions by key; None where there is none."""

    values: Mapping[str, float | str | None]
    of_learner: bool  # else the formulas'


@dataclass(frozen=True)
class Verdict:
    """A prediction beside what was measured."""

    question: Question
    given: float | str | None
    measured: Measured
    right: bool
    text: str


def ask(questions: Sequence[Question]) -> Any:
    """Return a form of all questions, whose button starts the runs."""
    fields = mo.ui.dictionary({each.key: each.widget(n) for n, each in enumerate(questions, 1)})
    return (
        mo.md("\n\n".join(f"{{{each.key}}}" for each in questions))
        .batch(**fields.elements)
        .form(
            submit_button_label="Predict, then run dtrain",
            validate=partial(_missing, questions),
            bordered=True,
        )
    )


def _missing(questions: Sequence[Question], values: Mapping[str, Any] | None) -> str | None:
    left = [n for n, each in enumerate(questions, 1) if (values or {}).get(each.key) is None]
    return f"Question {left[0]} has no answer yet: a guess will do." if left else None


def hints(questions: Sequence[Question]) -> Any:
    """Return a folded hint for each question."""
    return mo.accordion(
        {f"Hint {n}: {each.prompt}": mo.md(each.hint) for n, each in enumerate(questions, 1)}
    )


def predictions(questions: Sequence[Question], form: Any) -> Given:
    """Return the form's answers, else those of the command line; without any, a script takes the
    formulas' and a notebook stops here.
    """
    if form.value is not None:
        return Given(form.value, of_learner=True)
    words = mo.cli_args().to_dict()
    if any(each.key in words for each in questions):
        return Given({each.key: _typed(each, words.get(each.key)) for each in questions}, True)
    by_formula = words.get("answers") == BY_FORMULA or mo.app_meta().mode == "script"
    mo.stop(not by_formula, mo.md("*dtrain runs when you have answered and pressed the button.*"))
    return Given({each.key: each.answer for each in questions}, of_learner=False)


def _typed(question: Question, word: Any) -> float | str | None:
    """Return an answer of the command line: a choice is given by its number, from 1."""
    if word is None or not question.choices:
        return None if word is None else float(word)
    number = int(word)
    return question.choices[number - 1] if 1 <= number <= len(question.choices) else None


def grade(question: Question, given: float | str | None, measured: Measured) -> Verdict:
    """Hold a prediction against what was measured."""
    value = measured.value
    if given is None:
        right, text = False, f"You gave no answer; {measured.told(question)}."
    elif isinstance(value, str) or isinstance(given, str):
        right = given == value
        text = "Right." if right else f"No: it is “{value}”."
    else:
        right = math.isfinite(given) and abs(given - value) <= question.tolerance * abs(value)
        text = _distance(question, given, measured, right)
    return Verdict(question, given, measured, right, f"{text} {question.because}")


def _distance(question: Question, given: float, measured: Measured, right: bool) -> str:
    value = float(measured.value)
    told = f"{question.named(given)}, and {measured.told(question)}"
    if right:
        return f"Right: you said {told}."
    if value > 0 and 0 < given < math.inf:
        ratio = given / value
        far = f"{ratio:.3g} times as much" if ratio > 1 else f"{ratio:.2g} of it"
        return f"No: you said {told}. Yours is {far}."
    return f"No: you said {told}."


def judge(
    name: str,
    questions: Sequence[Question],
    given: Given,
    measured: Mapping[str, Measured],
) -> list[Verdict]:
    """Grade all answers of a lesson; keep the score if they are a learner's.

    Raises:
        ValueError: a question has nothing measured.
    """
    if missing := [each.key for each in questions if each.key not in measured]:
        raise ValueError(f"nothing was measured for {', '.join(missing)}")
    verdicts = [grade(each, given.values.get(each.key), measured[each.key]) for each in questions]
    if given.of_learner:
        keep(name, verdicts)
    for number, each in enumerate(verdicts, 1):
        say(f"{number}. {_plain(each.question.prompt)}\n   {_plain(each.text)}")
    say(result_of(verdicts) + ("" if given.of_learner else " (the answers are the formulas')"))
    if given.of_learner:
        say(total())
    return verdicts


def result_of(verdicts: Sequence[Verdict]) -> str:
    """Return how many are right."""
    return f"{sum(each.right for each in verdicts)} of {len(verdicts)} right"


def show(verdicts: Sequence[Verdict]) -> Any:
    """Return a table of predictions beside what was measured, and what to say of each."""
    lines = ["| | you | the formula | dtrain predicted | dtrain measured | |", "|-|-|-|-|-|-|"]
    for number, each in enumerate(verdicts, 1):
        values = each.given, each.question.answer, each.measured.predicted, each.measured.value
        told = ("–" if value is None else each.question.named(value) for value in values)
        sign = "✓" if each.right else "✗"
        lines.append(f"| {number} | {' | '.join(told)} {each.measured.by} | {sign} |")
    words = (f"{number}. {each.text}" for number, each in enumerate(verdicts, 1))
    return mo.md("\n".join([f"### {result_of(verdicts)}\n", *lines, "", *words]))


# The score


def kept_in() -> Path:
    """Return the file of the score, in the cache that dtrain has for data too."""
    return Path(os.environ.get("DTRAIN_CACHE") or "~/.cache/dtrain").expanduser() / "lessons.json"


def kept() -> dict[str, dict[str, bool]]:
    """Return what was right, by lesson and question; nothing of a file that is none of ours."""
    try:
        found = json_files.read(kept_in())
    except (ValueError, FileNotFoundError):
        return {}
    return {
        lesson: {str(key): right is True for key, right in answers.items()}
        for lesson, answers in found.items()
        if isinstance(answers, dict)
    }


def keep(name: str, verdicts: Sequence[Verdict]) -> None:
    """Replace a lesson's score by that of its latest answers."""
    scores = kept() | {name: {each.question.key: each.right for each in verdicts}}
    file = kept_in()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as written:
        json.dump(scores, written, indent=2)
    Path(written.name).replace(file)


def total() -> str:
    """Return the score over all lessons, in words."""
    scores = kept()
    answers = [right for lesson in scores.values() for right in lesson.values()]
    lessons = "lesson" if len(scores) == 1 else "lessons"
    return f"Your score: {sum(answers)} of {len(answers)} right in {len(scores)} {lessons}"


def score(verdicts: Sequence[Verdict]) -> Any:
    """Return the score of this lesson and of all, which follows the verdicts."""
    return mo.callout(
        mo.md(f"This lesson: {result_of(verdicts)}.\n\n**{total()}.**\n\nKept in `{kept_in()}`."),
        kind="success" if all(each.right for each in verdicts) else "info",
    )


# Tables and pictures


def commands(*results: Result) -> Any:
    """Return the commands that were run."""
    return mo.md("dtrain has run\n\n```sh\n" + "\n".join(r.command for r in results) + "\n```")


def curves(runs: Mapping[str, Result]) -> Any:
    """Draw the losses of runs; equal ones lie on each other, later ones thinner on top."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for place, (label, result) in enumerate(runs.items()):
        steps = range(1, len(result.losses) + 1)
        axes.plot(steps, result.losses, label=label, linewidth=2 + 3 * (len(runs) - place - 1))
    axes.set(xlabel="step", ylabel="loss (nats a byte)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return drawn(figure)


def bars(runs: Mapping[str, Result]) -> Any:
    """Draw the memory of rank 0 by kind, and dtrain's predictions as black lines."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(runs)
    for place, (label, result) in enumerate(runs.items()):
        for at, kind in enumerate(KINDS):
            left = at + place * width
            axes.bar(
                left,
                result.held(kind) / MIB,
                width * 0.9,
                align="edge",
                color=f"C{place}",
                label=label if at == 0 else None,
            )
            predicted = result.held(kind, predicted=True) / MIB
            axes.plot([left, left + width * 0.9], [predicted, predicted], color="black")
    axes.set(ylabel="MiB on rank 0", xticks=[at + 0.4 for at in range(4)], xticklabels=KINDS)
    axes.legend()
    return drawn(figure)


def drawn(figure: Figure) -> Any:
    """Return a figure as a picture."""
    written = io.StringIO()
    figure.savefig(written, format="svg")
    return picture(written.getvalue())


def picture(svg: str) -> Any:
    """Return an SVG file's text as a picture that is no wider than the page."""
    size = r'<svg ([^>]*?)width="([^"]*)" height="[^"]*"'
    style = r'<svg \1style="width: 100%; max-width: \2; height: auto; background: white"'
    return mo.Html(re.sub(size, style, svg[svg.index("<svg") :], count=1))


def say(text: str) -> None:
    """Print, in a script alone: a notebook shows its cells' values."""
    if mo.app_meta().mode == "script":
        print(text, flush=True)


def _plain(text: str) -> str:
    return text.replace("**", "").replace("`", "")
