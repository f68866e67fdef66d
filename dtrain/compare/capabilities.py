"""What goes with what, for a person: on the terminal, and as a block of the README that a test
holds to it.
"""

from __future__ import annotations

import re
from pathlib import Path

from dtrain.compare.survey import ITSELF, PARTLY, REFUSED, SAME_AXIS, Combination, survey
from dtrain.config.groups import CONFIGS, strategy_comment
from dtrain.report.tables import Sheet, put_between

BEGIN, END = "<!-- capabilities -->\n", "<!-- /capabilities -->\n"


def survey_tables() -> list[Sheet]:
    """The survey as a person reads it."""
    trials = survey()
    pairs = {
        frozenset(part.name for part in trial.parts): trial.mark for trial in trials if trial.parts
    }
    alone, composed = (
        [t for t in trials if not t.parts and (len(t.axes) > 1) is several]
        for several in (False, True)
    )
    composes = {
        name for pair, mark in pairs.items() if mark not in (REFUSED, SAME_AXIS) for name in pair
    }
    names = [trial.name for trial in alone if trial.name in composes]
    lonely = [trial.name for trial in alone if trial.axes and trial.name not in composes]
    legend = (
        f"{PARTLY}: for some of the tasks; {REFUSED}: refused; {SAME_AXIS}: both want one axis; "
        f"those that stand "
        f"alone, {', '.join(lonely)}, are not here"
    )
    told = [t for t in trials if not t.parts or composes >= {part.name for part in t.parts}]
    return [
        Sheet(
            f"Strategies, for the tasks {', '.join(trials[0].refusals)}",
            ("strategy", "axis", "divides of a batch", "tasks", "in a sentence"),
            [
                (
                    t.name,
                    " ".join(t.axes),
                    "".join(s.divides or "nothing" for s in t.strategies),
                    t.tasks,
                    strategy_comment(t.name),
                )
                for t in alone
            ],
        ),
        Sheet(
            f"Two together ({legend})",
            ("", *names),
            [
                (one, *(pairs.get(frozenset((one, other)), ITSELF) for other in names))
                for one in names
            ],
        ),
        Sheet(
            "Compositions that have a name",
            ("strategy", "mesh", "tasks", "in a sentence"),
            [(t.name, " x ".join(t.axes), t.tasks, strategy_comment(t.name)) for t in composed],
        ),
        Sheet(
            "Refusals",
            ("how many", "which", "reason"),
            [(str(len(whom)), ", ".join(whom), reason) for reason, whom in reasons(told).items()],
        ),
    ]


def reasons(trials: list[Combination]) -> dict[str, list[str]]:
    """What each reason refuses; those that differ in the strategies' names alone are one, with
    … for the names.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for trial in trials:
        names = "|".join({name for s in trial.strategies for name in (type(s).__name__, s.axis)})
        for reason in dict.fromkeys(filter(None, trial.asked.values())):
            tasks = [task for task, each in trial.asked.items() if each == reason]
            whom = (
                trial.name
                if len(tasks) == len(trial.asked)
                else f"{trial.name} ({', '.join(tasks)})"
            )
            found.setdefault(re.sub(rf"\b({names})\b", "…", reason), []).append((reason, whom))
    return {
        several[0][0] if len({reason for reason, _ in several}) == 1 else kind: [
            whom for _, whom in several
        ]
        for kind, several in found.items()
    }


def show() -> None:
    """Print what goes with what."""
    for sheet in survey_tables():
        sheet.show()


def markdown() -> str:
    """The same as a block of the README."""
    return "\n".join(sheet.markdown() for sheet in survey_tables())


def write(document: Path = CONFIGS.parent / "README.md") -> None:
    """Put the block into the README, between its marks."""
    put_between(document, BEGIN, END, markdown())
